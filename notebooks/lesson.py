"""lesson.py -- what do the notebooks share?

Guesses and checks, figures, and what was measured before, with its origin. No class or function of
the modules is defined here a second time.
"""
import html
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import checkpoint  # noqa: F401 (before torch: it says how torch's threads wait)

import numpy as np
import torch
from IPython.display import Image, display
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from torchvision.transforms import v2
from tqdm.auto import tqdm as bar

import report
import train
from data import unit
from notebooks import decided, study
from report import COLOURS, ids
from teacher import Guide

RESULTS = Path(__file__).parent / "results"
SMOKE = bool(os.environ.get("SMOKE_TEST"))      # set by the tests: live cells stay small
KEPT = bool(os.environ.get("KEPT_PAGE"))        # set where a page's outputs will be committed


def tqdm(items, **kwargs):
    """A progress bar, shown to a person who watches and not on a page that is kept."""
    return bar(items, leave=False, disable=SMOKE or KEPT, **kwargs)


# --- predict, then run ---

def predict(guess, truth, what="What came out"):
    """Show what came out: folded where there is no guess yet, an Ellipsis, and otherwise with how
    far the guess was off."""
    said = f"{what}: {f'{truth:.4g}' if isinstance(truth, float) else truth}"
    if guess is ...:
        return display(Folded(f"{what}: guess, then open this", said))
    print(f"{said}   (your guess: {guess}{distance(guess, truth)})")


def distance(guess, truth):
    try:
        off = abs(float(guess) - float(truth))
    except (TypeError, ValueError):
        return ", right" if guess == truth else ""
    return f", off by {off:.3g}" if off else ", right"


class Folded:
    """A text that is read when its summary is clicked; in a terminal it is just read."""

    def __init__(self, summary, text):
        self.summary, self.text = summary, text

    def __repr__(self):
        return self.text

    def _repr_html_(self):
        return f"<details><summary>{html.escape(self.summary)}</summary>{self.inside()}</details>"

    def inside(self):
        text = re.sub("`(.*?)`", r"<code>\1</code>", html.escape(self.text))
        return text.replace("\n", "<br>")


class Table(Folded):
    """Rows of cells under their head, open where there is no summary; in a terminal, columns."""

    def __init__(self, summary, head, rows):
        self.rows = [[str(cell) for cell in row] for row in (head, *rows)]
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        super().__init__(summary, "\n".join(
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in self.rows))

    def _repr_html_(self):
        return super()._repr_html_() if self.summary else self.inside()

    def inside(self):
        lines = ["".join(f'<{tag} style="text-align: left">{html.escape(cell)}</{tag}>'
                         for cell in row)
                 for tag, row in zip(["th"] + ["td"] * len(self.rows), self.rows, strict=False)]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def move(draw, **sliders):
    """Call draw(**values) again whenever a slider is moved: name=(first value, low, high, step).

    A kept page shows the first values, and so does a place without ipywidgets.
    """
    first = {name: value for name, (value, *_) in sliders.items()}
    if SMOKE or KEPT:
        return draw(**first)
    try:
        import ipywidgets
    except ImportError:
        print("the sliders need ipywidgets (pip install ipywidgets); this is their first position")
        return draw(**first)
    made = {}
    for name, (value, low, high, step) in sliders.items():
        kind = ipywidgets.IntSlider if isinstance(step, int) else ipywidgets.FloatSlider
        made[name] = kind(value, min=low, max=high, step=step, continuous_update=False)
    ipywidgets.interact(draw, **made)


def claims(found):
    """Show what a page says of trained models beside what the seeds say: {claim: Estimate}.

    A claim is a difference or a number, and what its interval leaves open is called open.
    """
    display(Table(None, ("", "measured, 95 % interval", "n", ""), [
        (claim, decided.signed(e, 3), e.n, "no interval" if e.low is None else
         "too few" if e.n < 3 else "above 0" if e.low > 0 else "below 0" if e.high < 0 else "open")
        for claim, e in found.items()]))


def verdicts(summary, judged):
    """Show, folded, what was decided before the runs beside what came: a dict of decided.judge."""
    head = ("decided before", "by", "at least", "measured", "p, Holm", "verdict")
    display(Table(summary, head, [
        (h.claim, h.source, f"{h.least:g}" if h.margin is None else f"within ±{h.margin:g}",
         decided.signed(e), study.shown(p), verdict) for h, (e, p, verdict) in judged.items()]))
    display(Folded("By whom, and when is it met?", study.RULE))


def check(claim, answer, expected=True, hint="read the cell above once more"):
    """Print whether answer(), the reader's code, gives what is expected: yes, no, or not yet.

    Numbers and tensors agree to 1e-5, relative or absolute; all else must be equal.
    """
    try:
        got = answer()
    except NotImplementedError as todo:
        return print(f"not yet: {claim} ({todo})")
    except Exception as error:                          # a reader's mistake is an answer too
        return print(f"no: {claim}\n    your code raised {type(error).__name__}: {error}\n"
                     f"    hint: {hint}")
    if same(got, expected):
        return print(f"yes: {claim}")
    print(f"no: {claim}\n    expected {brief(expected)}\n    got      {brief(got)}\n"
          f"{first_difference(got, expected)}    hint: {hint}")


def same(got, expected):
    if isinstance(expected, bool | str | type(None)) or got is None:
        return type(got) is type(expected) and got == expected
    try:
        got, expected = (torch.as_tensor(v).detach().double() for v in (got, expected))
    except (TypeError, ValueError, RuntimeError):
        return got == expected
    return got.shape == expected.shape and torch.allclose(
        got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def first_difference(got, expected):
    """A line that says where two tensors of one shape first differ, or "" for anything else."""
    try:
        got, expected = (torch.as_tensor(v).detach().double() for v in (got, expected))
    except (TypeError, ValueError, RuntimeError):
        return ""
    if got.ndim == 0 or got.shape != expected.shape:
        return ""
    apart = ~torch.isclose(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    at = tuple(apart.nonzero()[0].tolist())
    return (f"    {int(apart.sum())} of {apart.numel()} differ, first at {list(at)}: expected "
            f"{expected[at]:.6g}, got {got[at]:.6g}\n")


def brief(value):
    if isinstance(value, torch.Tensor):
        value = value.detach()
        shape = f"shape {tuple(value.shape)}"
        return f"{shape}, {value.flatten()[:6].tolist()}{' ...' if value.numel() > 6 else ''}"
    return repr(value)


# --- figures ---

def show(fig, alt):
    """Put a figure on the page, with the dots of a projector; `alt` tells it to those who cannot
    see it."""
    display(Image(report.png(fig, few_colours=True, dpi=150), width=round(80 * fig.get_figwidth()),
                  alt=alt))


ABOUT = {       # the parts of the picture below, and what the page that marks one of them is about
    "router": "which experts does the router hear of?",
    "teacher": "what can a teacher tell the router?",
    "experts": "what do experts learn from each other?",
    "dispatch": "how do tokens get to their experts, and back?",
    "remedies": "what else could a router hear from, or obey?",
}


def picture(part=None):
    """Put on the page how a sparse layer serves one token, with E = 4 experts and K = 2.

    On a later page it is small, and `part` marks in black what that page is about.
    """
    width, size = (6, 10) if part else (9, 13)
    title = (f"This page: {ABOUT[part]}" if part else
             "A token visits the K = 2 experts that its router likes best, and no others")
    fig, [[axis]] = report.sheet(title, 1, 1, width, 0.46 * width)

    def look(*names):
        return {"color": "black", "lw": 3} if part in names else {"color": "0.6", "lw": 1.5}

    def arrow(x, y, to_x, to_y, look, style="-|>"):
        axis.annotate("", (to_x, to_y), (x, y), arrowprops=look | {
            "arrowstyle": style, "mutation_scale": size, "shrinkA": 0, "shrinkB": 0})

    def box(x, y, width, text, look, fill="0.5"):
        axis.add_patch(Rectangle((x, y), width, 0.9, fc=(*to_rgb(fill), 0.3), ec=look["color"],
                                 lw=look["lw"]))
        axis.text(x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=size)

    box(0, 3.7, 2, "token x", look())
    arrow(1, 4.6, 2.6, 6.3, look())
    box(2.6, 6, 2.4, "router", look("router", "teacher", "remedies"))
    arrow(5, 6.3, 7.2, 5.4, look())
    for e, p in enumerate((0.4, 0.3, 0.2, 0.1)):            # as in the first example of notebook 1
        y, used = 4.5 - 1.5 * e, e < 2
        box(6, y, 2.4, f"expert {e}", look("experts") if used else look(),
            COLOURS[e] if used else "white")
        if used:
            arrow(2, 4.15, 6, y + 0.45, look("dispatch"))
            arrow(8.4, y + 0.45, 11.2, 4.15, look("dispatch"))
            axis.text(9.8, (5.2, 2.8)[e], f"$f_{e}$ times $p_{e}$ = {p}", fontsize=size)
        else:
            axis.text(8.6, y + 0.3, f"$p_{e}$ = {p}: not chosen, computes nothing", fontsize=size)
    axis.text(11.5, 4.15, "+", ha="center", va="center", fontsize=2 * size)
    arrow(11.9, 4.15, 13.4, 4.15, look())
    box(13.4, 3.7, 2.2, "output y", look())
    if part == "router":
        axis.plot([14.5, 14.5], [4.6, 6.45], **look("router"))
        arrow(14.57, 6.45, 5, 6.45, look("router"))
        axis.text(6.6, 6.65, "a gradient, from what was added up", fontsize=size)
    if part == "teacher":
        box(9.6, 6, 4.2, "a dense teacher", look("teacher"))
        arrow(9.6, 6.45, 5, 6.45, look("teacher"))
    if part == "remedies":                      # from the two that were not chosen
        arrow(6, 1.95, 3.9, 6, look("remedies") | {"ls": "--"})
        arrow(6, 0.45, 3.3, 6, look("remedies") | {"ls": "--"})
    if part == "experts":
        arrow(7.2, 4.5, 7.2, 3.9, look("experts"), "<|-|>")
    axis.set(xlim=(-0.1, 15.7), ylim=(-0.1, 7.3))
    axis.axis("off")
    show(fig, f"A token, its router, four experts of which two are at work, their sum. {title}")


def gradient_bars(logits, q, k=2):
    """Draw dL/dz of one token under V-MoE's gate, of its K chosen experts and of all (the oracle);
    logits (E,), q (E,) the harm that a little more of each expert does."""
    p = torch.tensor(logits).softmax(dim=0)
    q, order = torch.tensor(q), sorted(range(len(q)), key=lambda e: -logits[e])
    fig, axes = report.sheet(f"Experts {order[0]} and {order[1]} are chosen; expert 3 does "
                             f"{q[3]:+.1f} harm", 1, 2, 9, 3.4, sharey=True)
    for axis, title, chosen in zip(axes[0], ("V-MoE's gate", "the oracle"), (order[:k], order),
                                   strict=True):
        u = (p * q)[chosen].sum()
        gradient = p * (q.where(torch.isin(torch.arange(len(q)), torch.tensor(chosen)), 0) - u)
        for e, g in enumerate(gradient.tolist()):
            look = ({"color": COLOURS[0], "label": "chosen"} if e in chosen else
                    {"color": "white", "ec": COLOURS[3], "hatch": "///", "label": "not chosen"})
            axis.bar(e, g, **look)
            axis.text(e, max(g, 0) + 0.03, f"{g:+.3f}", ha="center")
        axis.set(title=title, xlabel="expert", ylim=(-1.3, 1.3), xticks=range(len(q)))
    once = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    axes[0, 0].legend(once.values(), once.keys(), loc="lower left")
    show(fig, "Bars: the gradient on four logits, of the chosen experts and of all")


def cures_figure(curve, price, shown):
    """Draw each remedy's cosine with the oracle, over epochs and against the price of a step.

    curve {name: (epochs + 1,)}, price {name: times V-MoE's step}; those of `shown` are named.
    """
    near = {name: c[1:].mean() for name, c in curve.items()}            # from epoch 1 on
    fig, axes = report.sheet(f"From epoch 1 on, the cosine with the oracle is {near[shown[0]]:.2f} "
                             f"for {shown[0]}, {near[shown[1]]:.2f} for {shown[1]}", 1, 2, 11, 4.4,
                             sharey=True, subplot_kw={"ylim": (-0.55, 1.05)})
    for name, c in sorted(curve.items(), key=lambda item: item[0] in shown):
        look = {"color": "0.75", "lw": 1}
        if name in shown:
            look = {"color": COLOURS[shown.index(name)], "lw": 3, "label": name}
        axes[0, 0].plot(c, **look)
        axes[0, 1].plot(price[name], near[name], "o", ms=9, **look)
    axes[0, 0].plot([], color="0.75", label="the other remedies")
    axes[0, 0].legend(loc="lower left", fontsize=9, ncols=2)
    report.by_epoch(axes[0, 0], "cosine with the oracle's gradient")
    axes[0, 1].set(xlabel="time of a training step, V-MoE = 1", title="mean from epoch 1 on")
    show(fig, "Left: cosine with the oracle over epochs, a line per remedy. Right: its mean, "
              "against the price of a step")


def dots(axis, at, rows, metric, plus, minus=(), colour="black"):
    """Draw sum(plus) - sum(minus) of the study's arms at x = `at`, and return its Estimate.

    A ring stands for a seed that all arms have, a bar for the mean, a line for its 95 % interval.
    """
    found = decided.contrast(rows, metric, plus, minus)
    each = [decided.contrast([r for r in rows if r["seed"] == seed], metric, plus, minus).mean
            for seed in sorted({r["seed"] for r in rows})]
    each = [value for value in each if value is not None]
    axis.plot([at] * len(each), each, "o", ms=7, mfc="none", mew=1.5, color=colour)
    if each:
        axis.plot(at, found.mean, "_", ms=18, mew=3, color=colour)
    if found.low is not None:
        axis.plot([at, at], [found.low, found.high], lw=1.2, color=colour)
    return found


def patch_map(axis, image, experts=None, strength=None, title=""):
    """Draw an image (3, 32, 32) of bytes; given experts (16,), draw each patch's expert over it.

    Colour and number say which expert; strength (16,), 0 to 1, says how strong the colour is.
    """
    axis.set(xticks=[], yticks=[], title=title)
    if experts is None:
        return axis.imshow(image.permute(1, 2, 0))
    ids(experts, len(COLOURS), "experts")
    palette = np.array([to_rgb(colour) for colour in COLOURS])               # (8, 3)
    tiles = np.concatenate([palette[experts], np.asarray(strength)[:, None]], axis=1)
    axis.imshow(image.float().mean(dim=0), cmap="gray", vmin=-100, vmax=255)
    axis.imshow(tiles.reshape(4, 4, 4), extent=(0, 32, 32, 0), interpolation="nearest")
    for place, (expert, s) in enumerate(zip(experts.tolist(), strength, strict=True)):
        axis.text(4 + place % 4 * 8, 4 + place // 4 * 8, expert, ha="center", va="center",
                  color="white" if expert == 7 and s > 0.5 else "black", fontsize=9)


# --- what was measured before, and by whom ---

def measured(*runs):
    """Say, folded, where numbers come from that were not computed on this page: a line for each."""
    display(Folded("Measured before: by what?", "\n".join(
        f"`{about['command']}` on {about['device']}, seed {about['seed']}, torch "
        f"{about['versions']['torch']}, commit {(about['commit'] or 'unknown')[:12]}"
        for about in runs)))


def read(name):
    """The arrays of notebooks/results/NAME.npz and, under "about", where they come from."""
    with np.load(RESULTS / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    arrays["about"] = json.loads(str(arrays["about"]))
    return arrays


def rows(grid, scale="cpu"):
    """The rows of one grid of the study, with those of arms that it shares with other grids."""
    return study.rows_of(grid, scale)


def probe_images():
    """64 of the study's probe images, which are never augmented.

    Returns them standardised, as uint8 (64, 3, 32, 32), their labels, and the classes' names.
    """
    kept = read("probe")
    images = torch.from_numpy(kept["images"])
    x = v2.functional.normalize(unit(images), kept["mean"].tolist(), kept["std"].tolist())
    return x, images, kept["labels"], kept["names"].tolist()


def trained(name):
    """A model from notebooks/results/NAME.pt in eval mode, and all that the file says about it.

    Weights are kept in float16 and computed with in float32.
    """
    state = torch.load(RESULTS / f"{name}.pt", map_location="cpu", weights_only=True)
    return rebuild(state["config"], state["student"], state["names"]), state


def rebuild(config, weights, names):
    classes = SimpleNamespace(fine_names=names, coarse_names=names)
    vit = train.build(train.Config(**config | {"device": "cpu"}), classes)
    vit.load_state_dict({key: w.float() for key, w in weights.items()})
    return vit.eval()


def guide_of(student, state):
    """The frozen teacher of a kept student and its teacher routers, as training left them."""
    teacher = rebuild(state["teacher_config"], state["teacher"], state["names"])
    guide = Guide(teacher, student, state["config"]["n_experts"])
    guide.routers.load_state_dict({key: w.float() for key, w in state["routers"].items()})
    return guide.requires_grad_(False)
