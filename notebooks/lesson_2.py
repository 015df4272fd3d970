"""lesson_2.py -- how does notebook 2 draw clusters, targets, a film of patches and a crossed pair
of factors, and say whom a loss moves?
"""
import checkpoint  # noqa: F401 (before torch: it says how torch's threads wait)

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm, to_rgb

import report
from moe import routers
from notebooks import decided
from notebooks.decided import CELLS, NAMES
from notebooks.lesson import RESULTS, Table, display, dots, patch_map, rows, show
from notebooks.study import interaction
from report import COLOURS

SHOWN = (0, 3, 5, 10, 14, 25)           # probe images whose objects can be told at 32 pixels


# --- what the teacher knows, and what its routers ask for ---

def neighbours_figure(found):
    """Draw, from pixels to the last block, how many neighbours share class and place:
    found {"class" or "place": a % for each depth}."""
    (first, *_, last), (_, place, *_) = found.values()
    fig, [[axis]] = report.sheet(f"Same class: from {first:.0f} % in pixels to {last:.0f} % in the "
                                 f"last block. Same place: {place:.0f} % from block 1 on",
                                 1, 1, 8, 3.4)
    for (name, shares), mark, colour, chance in zip(found.items(), ("o-", "s--"), COLOURS,
                                                    (5, 100 / 16), strict=False):
        axis.plot(shares, mark, color=colour, label=f"same {name}")
        axis.axhline(chance, color=colour, ls=":", label=f"{name}, by chance")
    depths = len(found["class"])
    axis.set(ylabel="neighbours that share it, %", ylim=0, xticks=range(depths),
             xticklabels=["pixels", *(f"block {b}" for b in range(1, depths))])
    axis.legend(ncols=2, loc="lower right")
    show(fig, "Share of nearest patches of the same class and place, pixels to block 6: class "
              "rises with depth, place is flat from block 1")


def planes(tokens, cluster, made, reached):
    """Draw tokens (T, 3) of four clusters in their plane, and which expert of each of the
    routers `made` {name: router} wins where; reached {name: its I}."""
    palette = torch.tensor([to_rgb(colour) for colour in COLOURS])                  # (8, 3)
    ticks = torch.linspace(-3.5, 3.5, 141)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)             # (141, 141, 2)
    best = max(reached, key=reached.get)
    fig, axes = report.sheet(f"The four clusters are told apart by {best}: I = "
                             f"{reached[best]:.2f} of {np.log(4):.2f} nats", 1, len(made), 10, 4)
    for axis, (name, router) in zip(axes[0], made.items(), strict=True):
        with torch.no_grad():
            prob = router(F.pad(grid, (0, 1), value=2.0)).softmax(dim=-1)           # (141, 141, 4)
        sure, expert = prob.max(dim=-1)
        axis.imshow(1 - (1 - palette[expert]) * (sure[..., None] - 0.25), origin="lower",
                    extent=(-3.5, 3.5, -3.5, 3.5))
        for c, marker in enumerate("os^D"):
            own = tokens[cluster == c, :2]
            axis.scatter(*own.T, s=9, marker=marker, c="black", alpha=0.6, lw=0)
            x, y = (1.6 * own.mean(dim=0) * 20 + 70).long().tolist()
            axis.text(*1.6 * own.mean(dim=0), expert[y, x].item(), fontsize=13)
        axis.set(title=f"{name}: I = {abs(reached[name]):.2f}", xticks=[], yticks=[])
    show(fig, "The plane of four clusters, coloured by expert, after three trainings: "
              + "; ".join(f"{name} reaches {abs(v):.2f} nats" for name, v in reached.items()))


def wishes(pixels, labels, names, wish):
    """Draw which expert the targets favour for the patches of SHOWN images, block by block:
    wish {block: (probability, expert), each (B, 16)}."""
    top = wish[max(wish)].indices.view(-1, 4, 4)
    pairs = torch.cat([top[:, 1:] == top[:, :-1], (top[..., 1:] == top[..., :-1]).mT])
    chance = (top.flatten().bincount() / top.numel()).square().sum()
    fig, axes = report.sheet(f"{pairs.float().mean():.0%} of neighbouring patches share their "
                             f"target in block {max(wish)}; by chance {chance:.0%} would",
                             1 + len(wish), len(SHOWN), 8, 5.8)
    for column, i in zip(axes.T, SHOWN, strict=True):
        patch_map(column[0], pixels[i], title=names[labels[i]].replace("_", "\n"))
        for axis, w in zip(column[1:], wish.values(), strict=True):
            patch_map(axis, pixels[i], w.indices[i], w.values[i] ** 2 * 0.8)
    for axis, b in zip(axes[1:, 0], wish, strict=True):
        axis.set_ylabel(f"block {b}")
    show(fig, "Six images, and below each the experts that the teacher routers of three blocks "
              "want for its 16 patches")


def gradient_maps(maps, chosen):
    """Draw |dL/dz| of one image's tokens, maps {name: (N, E)}; chosen (N,). In the first map what
    is blocked is struck out."""
    away = F.one_hot(chosen, maps["task"].shape[1]) == 0                            # (N, E)
    fig, axes = report.sheet(f"The task has news of {(~away).sum()} of {away.numel()} logits, the "
                             f"guidance a wish for {(maps['guidance'] != 0).sum()}", 1, 2, 8, 5.2)
    for axis, (name, m) in zip(axes[0], maps.items(), strict=True):
        picture = axis.imshow(m.abs(), cmap="cividis", norm=LogNorm(1e-7, 1e-2), aspect="auto")
        axis.plot(chosen, range(len(chosen)), "wx", ms=6)
        axis.set(title=name, xlabel="expert (x: chosen)", ylabel="token (0: class token)")
    axes[0, 0].set_xlabel("expert (x: chosen, –: blocked)")
    axes[0, 0].plot(*away.nonzero().T.flip(0), "_", color="w", ms=14, alpha=0.6)
    fig.colorbar(picture, ax=axes, label="|dL/dz|", extend="both")
    show(fig, "Two maps of 17 tokens by 8 experts: the size of the task's gradient, struck out "
              "but for one entry a token, and of the guidance's, whole")


def who_is_moved(terms, student, guide):
    """Put on the page how large a gradient each term of the loss sends to whom: its norm."""
    own = [router.weight for router in routers(student).values()]
    parties = {"the student's routers": own,
               "the rest of the student": [p for p in student.parameters()
                                           if all(p is not weight for weight in own)],
               "the teacher routers": [*guide.routers.parameters()],
               "the teacher": [*guide.teacher.parameters()]}
    body = []
    for name, term in terms.items():
        sent = [torch.autograd.grad(term, learns, retain_graph=True, allow_unused=True)
                if (learns := [p for p in party if p.requires_grad]) else ()
                for party in parties.values()]
        norms = [torch.nn.utils.get_total_norm([g for g in grads if g is not None]).item()
                 for grads in sent]
        body.append((name, f"{term.item():.2g}", *(f"{n:.2g}" if n else "–" for n in norms)))
    display(Table("", ("term", "its value", *parties), body))


# --- trained students ---

def film(path, pixels, epoch):
    """Draw which expert the patches of four images visit after `epoch`, and the share of patches
    that have their last one: path {name: (epochs, B, 16)}."""
    settled = {name: 100 * (p == p[-1]).float().mean(dim=(1, 2)) for name, p in path.items()}
    said = ", ".join(f"{s[epoch - 1]:.0f} % of {name}'s" for name, s in settled.items())
    fig, axes = report.sheet(f"After epoch {epoch}: {said} patches have their last expert", 3, 5,
                             10, 5.2, width_ratios=[1, 1, 1, 1, 2.2])
    for column, i in zip(axes.T, (0, 5, 14, 25), strict=False):
        patch_map(column[0], pixels[i])
        for axis, p in zip(column[1:], path.values(), strict=True):
            now, last = p[epoch - 1, i], p[-1, i]
            patch_map(axis, pixels[i], now, (now == last) * 0.65 + 0.15)
    for axis, name in zip(axes[1:, 0], path, strict=True):
        axis.set_ylabel(name)
    whole = axes[0, 4].get_gridspec()[:, 4]
    for axis in axes[:, 4]:
        axis.remove()
    axis = fig.add_subplot(whole)
    for (name, s), style, colour in zip(settled.items(), ("--", "-"), COLOURS, strict=False):
        axis.plot(range(1, len(s) + 1), s, style, lw=2.5, color=colour, label=name)
    axis.axvline(epoch, color="0.6", lw=1)
    axis.set_ylim(0, 103)
    report.by_epoch(axis, "patches that have their last expert, %")
    axis.legend(loc="lower right")
    show(fig, f"Four images with the experts of their patches after epoch {epoch}, and the share "
              f"of settled patches over epochs. {said}")


def class_figure(tables, known, names):
    """Draw which share of each class's patches visits each expert; tables {name: (classes, E)},
    known {name: nats}."""
    more, less = sorted(tables, key=known.get, reverse=True)
    fig, axes = report.sheet(f"{less}'s experts tell less of the class than {more}'s (block 6, one "
                             f"run each)", 1, 2, 10, 5.2)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        share = 100 * table / table.sum(axis=1, keepdims=True)
        order = np.lexsort((-share.max(axis=1), share.argmax(axis=1)))      # by favourite expert
        picture = axis.imshow(share[order], cmap="cividis", vmin=0, vmax=50, aspect="auto")
        axis.set_yticks(range(20), [names[c].replace("_", " ") for c in order], fontsize=8)
        axis.set(title=f"{name}: {known[name]:.2f} nats", xlabel="expert")
    fig.colorbar(picture, ax=axes, label="of the class's patches, %", extend="max")
    show(fig, "Two tables of 20 classes by 8 experts, ordered by the favourite expert: a "
              f"staircase for {more}, hardly one for {less}")


def place_figure(tables, where):
    """Draw where in the picture each expert works; tables {name: (16, E)}, where {name: nats}."""
    fig, axes = report.sheet(f"TGR's experts share out the picture: they tell {where['TGR']:.2f} "
                             f"nats of the place, V-MoE's {where['V-MoE']:.2f}", len(tables), 8,
                             10, 4.4)
    for row, (name, table) in zip(axes, tables.items(), strict=True):
        row[0].set_ylabel(name.replace(" ", "\n"))
        for expert, axis in enumerate(row):
            share = 16 * (table / table.sum(axis=0))[:, expert].reshape(4, 4)
            picture = axis.imshow(share, cmap="cividis", vmin=0, vmax=4)
            axis.set(xticks=[], yticks=[], title=f"expert {expert}" if axis in axes[0] else "")
    fig.colorbar(picture, ax=axes, label="patches, times fair share", extend="max")
    show(fig, "Where in the picture each of eight experts works: even for V-MoE, rims and middles "
              "for TGR and for its teacher's routers")


def exchanged(tally):
    """Put on the page, folded, how many test images are right when tokens visit experts of others:
    the arrays of results/classes.npz."""
    names = {"vmoe": "V-MoE", "tgr": "TGR"}
    trials = [trial.split(": ") for trial in tally["trials"].tolist()]
    display(Table("Does the division matter? Let tokens visit the experts of others",
                  ["model", "whose experts", "test images that are right, %"],
                  [(names[model], whose, f"{right / 100:.1f}")
                   for (model, whose), right in zip(trials, tally["right"], strict=True)]))


# --- two factors, crossed ---

def estimates(of, metric, cells):
    """{what changes: its Estimate}, from the blocks that have all four arms."""
    of = decided.complete(of, cells)
    return {name: decided.contrast(of, metric, *arms)
            for name, arms in decided.effects(cells).items()}


def crossed(of, metric, cells, title, ylabel, digits=1):
    """Draw the four cells and what each factor changes, in one metric: a ring stands for a block,
    a bar for the mean, a line for its 95 % interval. `title` may name the effects in braces."""
    found = list(estimates(of, metric, cells).values())
    fig, axes = report.sheet(title.format(*(f"{e.mean:+.{digits}f}" for e in found)), 1, 2, 10, 4.6,
                             width_ratios=[1, 1.3])
    interaction(axes[0, 0], of, metric, cells)
    axes[0, 0].set_ylabel(ylabel)
    axes[0, 0].legend(loc="upper left")
    axes[0, 1].axhline(0, color="black", lw=0.8)
    for at, (plus, minus) in enumerate(list(decided.effects(cells).values())[:4]):
        dots(axes[0, 1], at, of, metric, plus, minus, COLOURS[2 if at < 2 else 4])
    axes[0, 1].set(xlim=(-0.5, 3.5), xticks=range(4), ylabel="difference, within a block",
                   xticklabels=["guided features,\nrouter free", "guided features,\nrouter guided",
                                "guided router,\nfeatures free",
                                "guided router,\nfeatures guided"])
    axes[0, 1].tick_params(axis="x", labelsize=8)
    show(fig, f"Left: {ylabel} of four models, features free or guided, router free or guided. "
              f"Right: what each guidance changes. {fig.get_suptitle()}")


def elsewhere():
    """Put on the page, folded, the same 2 x 2 in other settings, and what other arms add."""
    cells, metrics = [*CELLS.values()], {"points": (decided.ACC, 2), "settled": (decided.HALF, 3)}
    first = rows("main") + report.read_lines(RESULTS / "features_alone.jsonl")
    whole, late = rows("factors", "whole"), rows("placement")
    display(effects_table("The same 2 × 2 in other settings", metrics, {
        "experts in blocks 4, 5, 6, as in the paper": (late, decided.cells("placement", "-late")),
        "the first study: history": (first, cells),
        "the README's: 50,000 images, a teacher of the same": (whole, cells),
        "the same, teacher pretrained elsewhere": (whole, decided.cells("factors", "-lite0"))}))
    schedule = rows("schedule")         # five blocks, of arms that the first study had in few runs
    have = {*cells, *(r["arm"] for r in schedule)}
    guidance = [r for r in rows("guidance") if r["arm"] not in have]        # main has the cells
    equal = [r | {"arm": f"{r['method']}-k{r['config']['k']}"}
             for r in report.read_lines(RESULTS / "cpu.jsonl")]
    display(arms_table(
        "Every arm: what it adds to V-MoE, or a dense arm to the dense ViT", metrics, [
            *others(first + guidance), (NAMES["tgr"], equal, "tgr-k1", "moe-k1"),
            *others(schedule, ", other blocks"),
            *others(whole, ", 50,000 images")]))


def effects_table(summary, metrics, settings):
    """A Table of the effects in metrics {name: (metric, digits)} and settings {name: (rows,
    cells)}."""
    body = []
    for setting, (of, cells) in settings.items():
        for what, (metric, digits) in metrics.items():
            found = estimates(of, metric, cells)
            body.append([setting, what, *(decided.signed(e, digits) for e in found.values()),
                         min(e.n for e in found.values())])
    return Table(summary, ["setting", "measure", *decided.effects("abcd"), "blocks"], body)


def arms_table(summary, metrics, arms):
    """A Table of single arms, [(name, rows, arm, the arm it is compared with)]."""
    body = []
    for name, of, arm, other in arms:
        found = {metric: decided.contrast(of, metric, (arm,), (other,))
                 for metric, _ in metrics.values()}
        body.append([name, *(decided.signed(found[m], digits) for m, digits in metrics.values()),
                     found[decided.ACC].n])
    return Table(summary, ["arm", *metrics, "runs"], body)


def others(of, mark=""):
    """What arms_table() lists of some rows: the arms that have a name here, with what they are
    compared with."""
    arms = [arm for arm in dict.fromkeys(r["arm"] for r in of)
            if arm in NAMES and arm not in ("moe-k1", "dense")]
    return [(NAMES[arm] + mark, of, arm, "dense" if arm.startswith("dense") else "moe-k1")
            for arm in arms]
