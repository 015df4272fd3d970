"""report.py -- what happened in this run?

Was the routing consistent over time, what did the model reach and cost, and how does it look?
All from the files of a run: metrics.jsonl, result.json and, where there is a router, routing.npz.

    python report.py runs/tgr                          # closing table and figures of one run
    python report.py --page PAGE.md results.jsonl    # the results of many, on a page

L is the number of MoE layers, B that of probe images, N that of tokens per image; the class token
is number 0. An assignment says which of E experts each token visits. The same probe images are
routed after every epoch, in eval mode, so two assignments differ by training alone.
"""

import argparse
import io
import json
import math
import os
import re
import shlex
import textwrap
from pathlib import Path
from zipfile import BadZipFile

from checkpoint import HOW, printable, write

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from router import expect

# --- numbers: is a token still with the same expert? ---


def agreement(a, b):
    """Share of tokens with the same first expert in both assignments (TGR-MoE, arXiv:2604.21330).

    >>> agreement([0, 1, 2, 2], [0, 1, 2, 0])
    0.75
    """
    return float(np.mean(np.equal(*of_the_same_tokens(a, b))))


def of_the_same_tokens(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"two assignments must be of the same tokens, not {a.shape} and {b.shape}")
    return a, b


def ids(a, n, name="an assignment"):
    a = np.asarray(a)
    if a.size == 0 or a.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold whole numbers, not {a.size} of {a.dtype}")
    if not 0 <= a.min() <= a.max() < n:
        raise ValueError(f"{name} must be 0 to {n - 1}, not {a.min()} to {a.max()}")
    return a


def overlap(a, b):
    """Share of its K experts (last axis) that a token keeps, in any order; ours, for K > 1."""
    a, b = of_the_same_tokens(a, b)
    kept = a[..., :, None] == b[..., None, :]               # (..., K, K) choice i of a is j of b
    return float(kept.any(axis=-1).mean())


def load_share(a, n_experts):
    """Share of all choices that falls on each expert, (E,)."""
    return np.bincount(ids(a, n_experts).ravel(), minlength=n_experts) / np.size(a)


def kappa(a, b, n_experts):
    """Agreement beyond chance (Cohen's kappa; ours here). None where chance alone always agrees."""
    chance = float(load_share(a, n_experts) @ load_share(b, n_experts))
    return None if chance == 1 else (agreement(a, b) - chance) / (1 - chance)


def load_entropy(share):
    """Evenness of a load: 1 is even, 0 is one expert for everything. A lone expert is even: 1."""
    expect("share", share, "E")
    used = share[share > 0]
    return float(-(used * np.log(used)).sum() / np.log(len(share))) if len(share) > 1 else 1.0


def last_fluctuation(first):
    """Last epoch, counted from 1, that found a token away from its final expert; 0 if none did.

    From the history (epochs, ...) of first experts. StableMoE, arXiv:2204.08396; steps are epochs.
    """
    expect("first", first, "epochs", *first.shape[1:])
    away = first != first[-1]                               # (epochs, ...)
    epoch = np.arange(1, len(first) + 1).reshape(-1, *[1] * (first.ndim - 1))
    return (away * epoch).max(axis=0)


def mean(values):
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def consistency(chosen, n_experts):
    """Every curve and summary of a routing history (epochs, L, B, N, K), ready for JSON.

    A curve is a list over layers of lists over epochs. `adjacent` compares an epoch with the one
    before it, `final` with the last one. "At half of training" is the last epoch that has ended by
    then, or the first epoch where none has.
    """
    epochs, L, *_ = expect("chosen", ids(chosen, n_experts), "epochs", "L", "B", "N", "K")
    first = chosen[..., 0]                                  # (epochs, L, B, N) the argmax expert
    every, later = range(epochs), range(1, epochs)

    def curves(measure, steps):
        return [[measure(t, l) for t in steps] for l in range(L)]

    def chance_free(t, s, l):
        return kappa(first[t, l], first[s, l], n_experts)

    def fluctuation(last):                                  # last (B, N); compared in whole numbers
        return {"mean": float(last.mean())} | {
            f"share_after_{percent}_percent": float((100 * last > percent * epochs).mean())
            for percent in (20, 50, 80)}

    report = {
        "agreement_adjacent": curves(lambda t, l: agreement(first[t, l], first[t - 1, l]), later),
        "agreement_final": curves(lambda t, l: agreement(first[t, l], first[-1, l]), every),
        "kappa_adjacent": curves(lambda t, l: chance_free(t, t - 1, l), later),
        "kappa_final": curves(lambda t, l: chance_free(t, -1, l), every),
        "overlap_adjacent": curves(lambda t, l: overlap(chosen[t, l], chosen[t - 1, l]), later),
        # the load counts all K choices: it is the work an expert is given
        "load_entropy": curves(
            lambda t, l: load_entropy(load_share(chosen[t, l], n_experts)), every),
        "last_fluctuation": [fluctuation(last_fluctuation(first[:, l])) for l in range(L)],
    }

    def over_layers(name, steps):
        return mean(curve[t] for curve in report[name] for t in steps)

    # The late learning rate is small, so late epochs agree whatever the method: compare the first
    # quarter. The last epoch agrees with itself: compare a sixth and a half of training with it.
    quarter = range(min(epochs, max(2, math.ceil(epochs / 4))) - 1)     # pairs (1, 2), (2, 3), ...
    sixth, half = ([max(1, epochs // n) - 1] if epochs > 1 else [] for n in (6, 2))
    return report | {
        "mean_agreement_adjacent": over_layers("agreement_adjacent", range(epochs - 1)),
        "first_quarter_agreement_adjacent": over_layers("agreement_adjacent", quarter),
        "first_quarter_kappa_adjacent": over_layers("kappa_adjacent", quarter),
        "sixth_agreement_final": over_layers("agreement_final", sixth),
        "half_agreement_final": over_layers("agreement_final", half),
        "final_load_entropy": over_layers("load_entropy", [-1]),
    }


# --- numbers: how right and how sure is a model? ---


def top_k_accuracy(probs, labels, k=5):
    """Share of images whose class is among the k most probable, from probs (B, classes).

    >>> top_k_accuracy([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], [1, 0], k=2)
    0.5
    """
    probs, labels = judged(probs, labels)
    if not k >= 1:
        raise ValueError(f"k cannot be {k}: choose 1 or more")
    best = np.argsort(-probs, axis=1, kind="stable")[:, :k]             # (B, k)
    return float((best == labels[:, None]).any(axis=1).mean())


def judged(probs, labels):
    """Probabilities (B, classes) and labels (B,) as arrays, if they are that."""
    probs = np.asarray(probs, dtype=np.float64)
    B, classes = expect("probs", probs, "B", "classes")
    expect("labels", ids(labels, classes, "labels"), B)
    if not (probs.min() >= 0 and probs.max() <= 1 + 1e-3):              # of float16 roundings
        raise ValueError(f"probs must be 0 to 1, not {probs.min():g} to {probs.max():g}")
    return probs, np.asarray(labels)


def calibration_error(probs, labels, bins=15):
    """How far is confidence from accuracy? The mean gap over equal bins of confidence, weighted by
    their images (expected calibration error, arXiv:1706.04599, eq. 3).

    Sure by 0.9 and right both times is a gap of 0.1; sure by 0.6 and right once of twice as well:

    >>> probs = [[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.6, 0.4]]
    >>> round(calibration_error(probs, [0, 1, 0, 1]), 6)
    0.1
    """
    probs, labels = judged(probs, labels)
    if not bins >= 1:
        raise ValueError(f"bins cannot be {bins}: choose 1 or more")
    confidence, hit = probs.max(axis=1), probs.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)       # (B,) confidence 1 is in
    gaps = np.bincount(place, weights=confidence - hit, minlength=bins)     # the last bin
    return float(np.abs(gaps).sum() / len(hit))


# --- tables: one run, then all runs ---


def show(value, form="{:.2f}"):
    return "–" if value is None else form.format(value)


def exam_table(probs, labels, names):
    """What a test says of a model, in three lines, from probs (B, classes), labels and names."""
    probs, labels = judged(probs, labels)
    expect("probs", probs, len(labels), len(names))
    hit = np.argmax(probs, axis=1) == labels
    by_class = sorted(((hit[labels == c].mean(), name) for c, name in enumerate(names)
                       if (labels == c).any()), reverse=True)
    lines = [f"accuracy {hit.mean():.2%}   top-5 {top_k_accuracy(probs, labels):.2%}   "
             f"calibration error {calibration_error(probs, labels):.2%}"]
    for word, some in (("best", by_class[:5]), ("worst", by_class[::-1][:5])):
        lines.append(f"{word:6}" + ", ".join(f"{name} {share:.0%}" for share, name in some))
    return "\n".join(lines)


def closing_table(result):
    """The few lines a run ends with; – is a number this run does not have."""
    r = result
    key = "test" if exam(r) == "test" else "val"
    lines = {
        "run": f"{r['method']}, preset {r['preset']}, seed {r['seed']}; epochs: {r['epochs']}, "
               f"training images: {r['train_images']:,} ({r['data']})",
        f"{key} accuracy": f"{show(reached(r), '{:.1%}')} of {r['labels']} labels; dense "
                           f"teacher {show(r['teacher_accuracy'], '{:.1%}')}",
        "parameters": f"{r['params_total'] / 1e6:.2f} M total, "
                      f"{r['params_active'] / 1e6:.2f} M active",
        "FLOPs per image": f"{r['flops_per_image'] / 1e6:.1f} M",
        "agreement": f"{show(r['agreement_adjacent'])} with the epoch before, "
                     f"{show(r['agreement_final'])} of half-time with the end",
        "load entropy": f"{show(r['load_entropy'])} (1 is even, 0 is one expert for all)",
        "speed": f"{r['images_per_second']:,.0f} images/s on {r['device']}",
        "files": r["out"],
    }
    return "\n".join(f"{name:<17}{line}" for name, line in lines.items())


# Rows of one setting share a table; rows of one experiment differ in the seed alone and are pooled.
SETTING = ("data", "data_md5", "labels", "train_images", "test_images", "epochs", "preset")


def experiment(row):
    """What was run, from its config: two paths that differ in their runs' seeds count as one, as
    runs/dense-0/x and runs/dense-1/x do, or seed0/x and seed1/x."""
    seed = rf"\b([A-Za-z_]*){row['seed']}\b"
    return {name: re.sub(seed, r"\1*", value) if "/" in str(value) else value
            for name, value in row["config"].items() if name not in ("seed", *HOW)}


def settings(rows):
    """For each setting its experiments, each a list of runs; a rerun of a seed replaces the first.
    """
    found = {}                                              # setting > experiment > seed > row
    for row in rows:
        setting = *(row[name] for name in SETTING), exam(row)
        same = row["method"], row["device"], json.dumps(experiment(row), sort_keys=True)
        found.setdefault(setting, {}).setdefault(same, {})[row["seed"]] = row
    return [[list(seeds.values()) for seeds in groups.values()] for groups in found.values()]


def exam(row):
    """Which images its accuracy is of; with --split val no test image was looked at."""
    return "test" if row["test_accuracy"] is not None else "validation"


def reached(row):
    """A row's accuracy, of those images."""
    return row["test_accuracy"] if exam(row) == "test" else row["val_accuracy"]


def results_table(rows):
    """Markdown: one table and its caption per setting."""
    return "\n\n".join(map(one_table, settings(rows))) or "Nothing has been measured yet."


def names_of(groups):
    """What each of several experiments is called: its method, and in what it differs from others
    of the same method."""
    names = []
    for row, *_ in groups:
        rivals = [experiment(other[0]) for other in groups if other[0]["method"] == row["method"]]
        differs = [f"{name}={value}" for name, value in experiment(row).items()
                   if name != "k" and any(rival.get(name) != value for rival in rivals)]
        names.append(row["method"] + (f" ({', '.join(differs)})" if differs else ""))
    return names


def pooled(values, form="{:.2f}"):
    """Mean ± sample standard deviation of the known values; a lone one stands alone."""
    known = [value for value in values if value is not None]
    spread = f" ± {form.format(np.std(known, ddof=1))}" if len(known) > 1 else ""
    return show(mean(known), form) + spread


def early_agreement(row):
    """Adjacent agreement over the first quarter; None without a router or with a single epoch."""
    return (row.get("consistency") or {}).get("first_quarter_agreement_adjacent")


def one_table(groups):
    asked = exam(groups[0][0])
    lines = [f"| method | K | params total / active | MFLOPs per image | {asked} accuracy "
             "| agreement adjacent, first quarter | load entropy | seconds | n | device |",
             "|-|-|-|-|-|-|-|-|-|-|"]
    for name, group in zip(names_of(groups), groups, strict=True):
        row, routed = group[0], group[0]["load_entropy"] is not None
        lines.append("| " + " | ".join([
            name,
            show(row["config"].get("k") if routed else None, "{}"),
            f"{row['params_total'] / 1e6:.2f} M / {row['params_active'] / 1e6:.2f} M",
            f"{row['flops_per_image'] / 1e6:.1f}",
            pooled(map(reached, group), "{:.1%}"),
            pooled([early_agreement(r) for r in group]),
            pooled([r["load_entropy"] for r in group]),
            f"{mean(r['seconds'] for r in group):.0f}",
            f"{len(group)}",
            row["device"],
        ]) + " |")

    def all_of(value):
        return ", ".join(str(v) for v in sorted({value(r) for group in groups for r in group}))

    return "\n".join([*lines, "", (
        f"{row['data']} (md5 {row['data_md5']}), {row['labels']} labels, {row['train_images']:,} "
        f"training and {row['test_images']:,} {asked} images, preset {row['preset']}; epochs: "
        f"{row['epochs']}; seeds: {all_of(lambda r: r['seed'])}; torch "
        f"{all_of(lambda r: r['versions']['torch'])}; commit "
        f"{all_of(lambda r: r['commit'] or 'unknown')}. Mean ± sample standard deviation over n "
        f"seeds. Agreement: share of probe tokens that keep their first expert from one epoch to "
        f"the next. Load entropy: 1 is even, 0 is one expert for all. –: no such number.")])


BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def write_page(page, results_path):
    """Put the tables of a file of results, each with its picture, between two markers of a page, or
    on a new one."""
    path, tables = Path(results_path), settings(read_lines(results_path))

    def content():
        parts = []
        for number, groups in enumerate(tables, start=1):
            parts.append(one_table(groups))
            names = {id(row): f"{name}, K={row['config']['k']}"
                     for name, group in zip(names_of(groups), groups, strict=True) for row in group}
            rows = [row for group in groups for row in group]
            if all(early_agreement(row) is None for row in rows):       # a picture needs a router
                continue
            picture = path.with_name(f"{path.stem}{f'-{number}' if number > 1 else ''}.png")
            write(picture, png(plot_methods(rows, lambda row, names=names: names[id(row)])))
            link = Path(os.path.relpath(picture, Path(page).resolve().parent)).as_posix()
            parts.append(f"![agreement over epochs, by method](<{link}>)" if " " in link else
                         f"![agreement over epochs, by method]({link})")
        return "\n\n".join(parts) or results_table([])

    if not Path(page).exists():
        write(page, f"{BEGIN}\n{END}\n")
    put_between(page, BEGIN, END, content,
                f"python report.py --page {shlex.join([str(page), str(results_path)])}")


def cut(path, begin, end):
    """The text of a file (before, between, after) its two markers."""
    text = Path(path).read_bytes().decode()                 # bytes: line endings stay as they are
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path} needs one line {begin} and, below it, one line {end}")
    before, rest = text.split(begin)
    return before, *rest.split(end)


def put_between(path, begin, end, content, command):
    """Write content() and the command that did it between two markers; touch nothing else."""
    before, _, after = cut(path, begin, end)
    write(path, f"{before}{begin}\n{content()}\n\nWritten by `{command}`.\n{end}{after}")


def read_lines(path):
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


# --- figures: every title says what the numbers say ---

# Okabe and Ito's eight colours: colour-blind eyes tell them apart too
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]


def sheet(title, rows, columns, width, height, **layout):
    """A figure that needs no display, its conclusion on top, and its axes (rows, columns)."""
    fig = Figure(figsize=(width, height), dpi=90, layout="constrained")
    fig.suptitle(textwrap.fill(title, int(10.5 * width)), fontsize=12)
    return fig, fig.subplots(rows, columns, squeeze=False, **layout)


def by_epoch(axis, ylabel):
    axis.set(xlabel="epoch", ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axis.grid(alpha=0.25)


def terms(line):
    """The terms of the objective in a line of metrics.jsonl, {name: weighted loss}."""
    if "terms" in line:
        return line["terms"]
    # lines of older runs hold them among everything else
    older = ("task", "load", "entropy", "teacher_load", "teacher_entropy", "guidance", "mutual")
    return {name: line[name] for name in older if name in line}


def plot_loss(metrics, result):
    """Task loss, the other terms of the objective, and accuracy, over epochs."""
    if not metrics:
        raise ValueError("there are no metrics to draw: no epoch has ended")
    epoch, last = [m["epoch"] for m in metrics], metrics[-1]
    losses = [terms(line) for line in metrics]
    extra = list(dict.fromkeys(name for line in losses for name, value in line.items()
                               if name != "task" and value > 0))        # one of weight 0 is not
    test, teacher = result.get("test_accuracy"), result.get("teacher_accuracy")
    title = (f"The task loss ended at {losses[-1]['task']:.2f} "
             f"(first epoch: {losses[0]['task']:.2f})")
    title += f"; {test:.1%} of the test images are right" if test is not None else ""
    title += f" (dense teacher: {teacher:.1%})" if teacher is not None else ""
    fig, axes = sheet(title, 1, 3 if extra else 2, 10.5 if extra else 8, 3.8)

    axes[0, 0].plot(epoch, [line["task"] for line in losses], ".-", color=COLOURS[0])
    by_epoch(axes[0, 0], "task loss")
    for term, colour in zip(extra, COLOURS, strict=False):  # guidance may end before training
        axes[0, 1].plot(epoch, [line.get(term, math.nan) for line in losses], ".-", color=colour,
                        label=term.replace("_", " "))
    if extra:
        by_epoch(axes[0, 1], "weighted loss, log scale")
        axes[0, 1].set_yscale("log")                        # the weights differ by powers of ten
        axes[0, 1].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)

    accuracy = axes[0, -1]
    kinds = {"probe_accuracy": "training images (probe)", "val_accuracy": "held-out images (val)"}
    for (name, label), colour in zip(kinds.items(), (COLOURS[0], COLOURS[2]), strict=True):
        if name in last:
            accuracy.plot(epoch, [100 * m[name] for m in metrics], ".-", color=colour, label=label)
    if test is not None:
        accuracy.plot(epoch[-1], 100 * test, "*", ms=13, color=COLOURS[3], label="test images")
    if teacher is not None:
        accuracy.axhline(100 * teacher, ls="--", color="black", label="dense teacher")
    by_epoch(accuracy, "images classified right, %")
    accuracy.set_ylim(bottom=0)
    accuracy.legend()
    return fig


def plot_load(chosen, n_experts, layers):
    """How much work has each expert? One map per MoE layer, experts by epochs."""
    epochs, L, *_ = expect("chosen", ids(chosen, n_experts), "epochs", len(layers), "B", "N", "K")
    load = n_experts * np.array([[load_share(chosen[t, l], n_experts) for t in range(epochs)]
                                 for l in range(L)])        # (L, epochs, E) 1 is a fair share
    idle = int((load[:, -1] == 0).sum())
    fig, axes = sheet(f"The last epoch leaves {idle} of {L * n_experts} experts idle; the "
                      f"busiest has {load[:, -1].max():.1f} times its fair share",
                      1, L, 2 + 2.4 * L, 3.8)
    for axis, of_layer, block in zip(axes[0], load, layers, strict=True):
        # one scale for every run, so that the figures of two runs can be laid side by side
        picture = axis.imshow(of_layer.T, vmin=0, vmax=2, aspect="auto", interpolation="nearest",
                              origin="lower", extent=(0.5, epochs + 0.5, -0.5, n_experts - 0.5))
        by_epoch(axis, "expert")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(False)
        axis.set_title(f"block {block}", fontsize=11)
    fig.colorbar(picture, ax=axes, extend="max", ticks=range(3),
                 label="load / fair share (0 idle, 1 fair)")
    return fig


def plot_agreement(consistency, layers):
    """Do tokens keep their expert, do they have their final one yet, and is the load even?"""
    kept, settled = consistency["mean_agreement_adjacent"], consistency["half_agreement_final"]
    title = ("One epoch: there is no other assignment to compare with" if kept is None else
             f"{kept:.0%} of tokens keep their expert from one epoch to the next; "
             f"at half of training {settled:.0%} have their final one")
    collapsed = [str(block) for block, curve in zip(layers, consistency["kappa_final"], strict=True)
                 if curve[-1] is None]
    if collapsed:
        title += (f". One expert takes every token in block {', '.join(collapsed)}: "
                  f"agreement there means nothing")

    fig, axes = sheet(title, 2, 2, 9, 5.8, sharex=True, height_ratios=[5, 3])
    panels = {"agreement_adjacent": ("same expert as an epoch ago", "tokens, %"),
              "agreement_final": ("same expert as at the end", "tokens, %"),
              "kappa_adjacent": ("as an epoch ago, beyond chance", "kappa, %"),
              "load_entropy": ("a collapsed router agrees too: look here", "load entropy, %")}
    for axis, (name, (panel, ylabel)) in zip(axes.flat, panels.items(), strict=True):
        curves = 100 * np.array(consistency[name], dtype=float)     # (L, steps), None becomes nan
        epoch = np.arange(curves.shape[1]) + (2 if name.endswith("adjacent") else 1)
        axis.set_prop_cycle(color=COLOURS)
        for curve, block in zip(curves, layers, strict=True):
            axis.plot(epoch, curve, ".-", label=f"block {block}")
        by_epoch(axis, ylabel)
        axis.set_ylim(np.fmin.reduce(curves, axis=None, initial=0) - 3, 103)    # fmin skips nan
        axis.set_title(panel, fontsize=11)
    for axis in axes[0]:
        axis.set_xlabel("")
    axes[0, 1].legend()
    return fig


def plot_methods(rows, name=lambda row: f"{row['method']}, K={row['config']['k']}"):
    """Which method settles first? Mean agreement over the MoE layers, a thin line for each seed.

    Runs of the same name(row) are one method; at least one run needs an `early_agreement`. Where
    there are more than nine methods, the three steadiest and the three least steady have a colour.
    """
    groups = {}                                             # "tgr, K=1" > runs
    for row in rows:
        if early_agreement(row) is not None:
            groups.setdefault(name(row), []).append(row)
    if not groups:
        raise ValueError("no run has a router and two epochs, so there is no agreement to draw")
    early = {group: mean(map(early_agreement, runs)) for group, runs in groups.items()}
    ranked = sorted(early, key=early.get, reverse=True)
    best, worst = ranked[0], ranked[-1]
    named = list(groups) if len(groups) <= 9 else [*ranked[:3], *ranked[-3:]]
    fig, axes = sheet(
        f"In the first quarter of training {early[best]:.0%} of tokens keep their expert from one "
        f"epoch to the next with {best}, {early[worst]:.0%} with {worst}", 1, 2, 10, 4.2)
    panels = {"agreement_adjacent": ("same expert as an epoch ago", 2),
              "agreement_final": ("same expert as at the end", 1)}
    for axis, (curve, (panel, start)) in zip(axes[0], panels.items(), strict=True):
        for group, runs in groups.items():
            curves = 100 * np.array([np.mean(run["consistency"][curve], axis=0) for run in runs])
            epoch = np.arange(curves.shape[1]) + start
            if group not in named:
                axis.plot(epoch, curves.mean(axis=0), lw=1, color="0.8", zorder=1)
                continue
            i = named.index(group)
            style = ["-", "--", ":"][i // 3 % 3]
            axis.plot(epoch, curves.T, style, lw=0.8, alpha=0.5, color=COLOURS[i % 8])
            axis.plot(epoch, curves.mean(axis=0), style, lw=2.5, color=COLOURS[i % 8],
                      label=f"{group} (n={len(runs)})")
        by_epoch(axis, "tokens, %")
        axis.set_title(panel, fontsize=11)
    if others := len(groups) - len(named):
        axes[0, 1].plot([], color="0.8", label=f"the {others} others")
    axes[0, 1].legend()
    return fig


def plot_patches(images, chosen, probs, layer):
    """Who sees what: the first expert of every patch, over the image.

    images (n, 3, height, width) uint8 are the first n of B. For one block number `layer`, chosen is
    (B, N, K) and probs (B, N, E), of one epoch; for L block numbers both have L in front.
    """
    layers, E, n = np.atleast_1d(layer), probs.shape[-1], len(images)
    chosen = chosen.reshape(-1, *chosen.shape[-3:])                 # (L, B, N, K)
    probs = probs.reshape(-1, *probs.shape[-3:]).astype(float)      # (L, B, N, E)
    if not len(chosen) == len(probs) == len(layers):
        raise ValueError(f"chosen has {len(chosen)} layers, probs {len(probs)}, and {len(layers)} "
                         f"are named: one epoch, please, as in chosen[-1]")
    L, B, N, _ = expect("chosen", ids(chosen, E), len(layers), "B", *probs.shape[2:3], "K")
    expect("images", images, *images.shape[:1], 3, "height", "width")
    side = math.isqrt(N - 1)
    if side * side != N - 1 or not 1 <= n <= B:
        raise ValueError(f"{N} tokens must be a class token and a square of patches, and the {n} "
                         f"images some of the {B} that were routed")
    first = chosen[:, :, 1:, 0].reshape(L, B, side, side)           # without the class token
    alpha = probs[:, :, 1:].max(axis=-1).reshape(L, B, side, side)

    deepest = first[-1]                                             # (B, side, side)
    below, right = deepest[:, 1:] == deepest[:, :-1], deepest[:, :, 1:] == deepest[:, :, :-1]
    pairs = np.concatenate([below.ravel(), right.ravel()])
    chance = (load_share(deepest, E) ** 2).sum()
    # expert numbers have no order, so beyond eight colours neighbouring numbers are set far apart
    palette = np.array([to_rgb(colour) for colour in COLOURS])      # (at least E, 3)
    if len(palette) < E:
        palette = colormaps["viridis"](np.arange(E) * 0.618 % 1)[:, :3]

    fig, axes = sheet(f"In block {layers[-1]}, {pairs.mean():.0%} of neighbouring patches share "
                      f"an expert; by chance {chance:.0%} would" if len(pairs) else
                      "A lone patch has no neighbours",
                      1 + L, n, 0.9 + 1.1 * n, 1.1 + 1.12 * (1 + L))
    for axis, name in zip(axes[:, 0], ["image", *(f"block {b}" for b in layers)], strict=True):
        axis.set_ylabel(name)
    for i, image in enumerate(images):
        axes[0, i].imshow(image.transpose(1, 2, 0))
        grey = image.mean(axis=0)                           # (height, width)
        for l in range(L):
            axis = axes[1 + l, i]
            axis.imshow(grey, cmap="gray", vmin=-255, vmax=255)     # pale, under the colours
            axis.imshow(np.dstack([palette[first[l, i]], alpha[l, i]]), interpolation="nearest",
                        extent=(-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    fig.legend(handles=[Patch(color=palette[e], label=f"{e}") for e in range(E) if E <= 16],
               title="colour: the patch's first expert; strength: its probability",
               loc="outside lower center", ncols=8, frameon=False)
    return fig


def figures(run_dir):
    """Draw what the files of a run allow: {name: the bytes of a PNG}."""
    run = Path(run_dir)
    ended = (run / "result.json").exists()                  # a stopped run still has its curves
    result = json.loads((run / "result.json").read_text(encoding="utf-8")) if ended else {}
    drawn = {"loss.png": plot_loss(read_lines(run / "metrics.jsonl"), result)}
    if (run / "routing.npz").exists():                      # dense and soft models have no router
        routing = np.load(run / "routing.npz")
        chosen, probs, images = routing["experts"], routing["probs"], routing["images"]
        layers, E = routing["layers"], int(routing["n_experts"])
        drawn["load.png"] = plot_load(chosen, E, layers)
        drawn["agreement.png"] = plot_agreement(consistency(chosen, E), layers)
        drawn["patches.png"] = plot_patches(images, chosen[-1], probs, layers)
    return {name: png(figure) for name, figure in drawn.items()}


def png(figure, few_colours=False, dpi="figure"):
    """A figure as a file. With `few_colours` it has 256, which halves it at least; they are chosen
    to cover all that the figure has, so that a colour bar is not falsified."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    if not few_colours:
        return drawn.getvalue()
    few = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    few.save(small, "png", optimize=True)
    return small.getvalue()


# --- the command ---


def main():
    printable()
    parser = argparse.ArgumentParser(description="What happened in this run?")
    parser.add_argument("path", help="a run folder; with --page, a file of results")
    parser.add_argument("--page", help="rewrite the results table of this file")
    args = parser.parse_args()
    try:
        if args.page:
            write_page(args.page, args.path)
        else:
            run = Path(args.path)
            if (run / "metrics.jsonl").exists() and not (run / "result.json").exists():
                if not read_lines(run / "metrics.jsonl"):
                    return print(f"in {run} no epoch has ended yet: there is nothing to draw")
                print(f"{run} has not ended: these are its curves so far")
            else:
                result = (run / "result.json").read_text(encoding="utf-8")
                print(closing_table(json.loads(result)))
            for name, drawn in figures(args.path).items():
                write(Path(args.path, name), drawn)
                print(Path(args.path, name))
    except OSError as error:
        unread = f"{error.filename} cannot be read: {error.strerror}"
        parser.exit(2, f"report.py: {unread if error.filename else error}\n")
    except ValueError as error:
        damaged = "" if args.page else f"a file of {args.path} is damaged: "
        parser.exit(2, f"report.py: {damaged}{error}\n")
    except (KeyError, AttributeError, TypeError, EOFError, BadZipFile) as error:
        parser.exit(2, f"report.py: {args.path} holds something else than train.py writes "
                       f"({type(error).__name__}: {error}): give it "
                       f"{'lines of result.json' if args.page else 'the folder of a run'}\n")


if __name__ == "__main__":
    main()
