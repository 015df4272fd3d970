"""lesson_3.py -- what do experts see, say and know, as notebook 3 draws it?

The world of two experts on a line, its sliders, and the page's figures. The experts and the loss
are those of moe.py and distill.py.
"""
import torch

import report
from notebooks import decided, lesson
from report import COLOURS

# One input (T, 1), the truth that is to be learnt (T, 1), and whose half it is (E, T).
LINE = torch.linspace(-1, 1, 64)[:, None]
TRUTH = torch.where(LINE < 0, -torch.cos(6 * LINE), torch.cos(4 * LINE) - 2)
HALVES = torch.stack([LINE[:, 0] < 0, LINE[:, 0] > 0])
BLIND = 0.2                 # how often a gate errs


def keeps(f, *given):
    """f of copies of what it is given; an error if it has changed one of them."""
    copies = [v.clone() if isinstance(v, torch.Tensor) else v for v in given]
    out = f(*copies)
    for before, after in zip(given, copies, strict=True):
        if isinstance(before, torch.Tensor) and not torch.equal(before, after):
            raise ValueError("your function has changed its argument: work on a copy")
    return out


# --- two experts on a line ---

def says(layer):
    """What each of two experts says on the line: (E, T)."""
    return layer.experts.batched(LINE.expand(2, *LINE.shape)).detach()[..., 0]


def errors(layer):
    """The experts' mean squared errors on their own halves, and on the other's."""
    wrong = (says(layer) - TRUTH.T).square()
    return wrong[HALVES].mean().item(), wrong[~HALVES].mean().item()


def speak(axis, layer, title):
    axis.plot(LINE, TRUTH, lw=8, color="0.85", label="the truth")
    for i, (said, colour) in enumerate(zip(says(layer), (COLOURS[0], COLOURS[3]), strict=True)):
        axis.plot(LINE, said, "--", color=colour, label=f"expert {i}, the other's half")
        axis.plot(LINE[HALVES[i]], said[HALVES[i]], color=colour, lw=3,
                  label=f"expert {i}, own half")
    own, other = errors(layer)
    axis.set(title=f"{title}: own {own:.2f}, other {other:.2f}", ylim=(-4, 2), xlabel="input")


def curves(layers):
    """A panel for each {alpha: layer}: what its two experts say."""
    off = [errors(layer)[1] for layer in layers.values()]
    fig, axes = report.sheet(
        f"On the other's half an expert is {off[0]:.2f} off when it is alone, {off[1]:.2f} with a "
        f"little distillation, {off[-1]:.2f} when distillation drowns the task", 1, len(layers),
        11, 4.6, sharey=True)
    for axis, (alpha, layer) in zip(axes[0], layers.items(), strict=True):
        speak(axis, layer, f"alpha {alpha}")
    axes[0, 0].set(ylabel="output")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
               fontsize=9)
    lesson.show(fig, "Two experts' curves at three weights: on the other's half they are far from "
                     "the truth, then near it, then identical and poor")


def position(layer, power, sweep, grid, lone):
    """Left: the experts of one alpha, 10 ** power. Right: where it stands on the sweep.

    grid (alphas, seeds, 2) has the errors (own, other) of the alphas of `sweep`, 0 and the powers
    of ten from -3; lone is the error of one network alone.
    """
    mixed = {"own half": grid[..., 0], "other's half": grid[..., 1],
             "a gate that errs 1 in 5": (1 - BLIND) * grid[..., 0] + BLIND * grid[..., 1]}
    best = sweep[mixed["a gate that errs 1 in 5"].mean(dim=1).argmin()]
    fig, (axes,) = report.sheet(f"With a gate that errs once in five, alpha = {best} is the best "
                                f"of the sweep", 1, 2, 11, 4.4, width_ratios=(2, 3))
    speak(axes[0], layer, f"alpha {10 ** power:.3g}")
    axes[0].set(ylabel="output", xticks=(-1, 0, 1))
    axes[0].legend(*zip(*((line, name) for line, name in zip(
        *axes[0].get_legend_handles_labels(), strict=True) if "other" not in name), strict=True),
        fontsize=9, loc="lower left")
    own, other = errors(layer)
    here = (own, other, (1 - BLIND) * own + BLIND * other)
    for (name, values), now, colour, mark in zip(mixed.items(), here, COLOURS[:3], "os^",
                                                 strict=True):
        axes[1].plot(values, mark, color=colour, mfc="none")
        axes[1].plot(values.mean(dim=1), mark + "-", color=colour, lw=2, label=name)
        axes[1].plot(power + 4, now, mark, color=colour, ms=12, mec="black", mew=2)
    axes[1].axvline(power + 4, color="0.7", lw=8, zorder=0, label="the alpha of the left panel")
    axes[1].axhline(lone, ls=":", color="black", label="one network alone")
    axes[1].set(yscale="log", xticks=range(len(sweep)), xticklabels=sweep, xlabel="alpha",
                ylabel="mean squared error")
    axes[1].legend(fontsize=9, ncols=2, loc="upper right")
    axes[1].set_ylim(top=8)
    lesson.show(fig, "Left: two experts' curves at one alpha. Right: over alpha the error at home "
                     "rises, the error abroad falls and then rises, and their mixture has a valley")


# --- trained models ---

def patches(pixels, first, images):
    """The patches (N, 16) that each of eight experts is given of some images (B, 3, 32, 32)."""
    sees = torch.stack([first >= 0, *(first == i for i in range(8))], dim=1).view(-1, 9, 4, 4)
    each, blind = sees[:, 1:].sum(dim=(2, 3)).float(), ~sees[:, 1:].any(dim=(2, 3))
    fig, axes = report.sheet(
        f"An expert sees {each.mean():.0f} of 16 patches on average, and of "
        f"{blind.float().mean():.0%} of the images none at all (V-MoE, K = 1, block 4)",
        len(images), 9, 11, 1.42 * len(images))
    for row, n in zip(axes, images, strict=True):
        for axis, mask, name in zip(row, sees[n], ["whole image", *range(8)], strict=True):
            mask = mask.float().kron(torch.ones(8, 8))[..., None]                   # (32, 32, 1)
            axis.imshow(0.8 + mask * (pixels[n].permute(1, 2, 0) / 255 - 0.8))
            axis.set(xticks=[], yticks=[], xlabel=name if axis is row[0] else f"expert {name}")
    lesson.show(fig, f"{len(images)} photographs, and beside each the patches that each of eight "
                     f"experts is given: for most experts none")


def maps(title, tables, axis_names, label, alt, **colours):
    """A heat map (E, E) for each {name: table}, all on one scale."""
    fig, axes = report.sheet(title, 1, len(tables), 11, 4.3)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        drawn = axis.imshow(table, **colours)
        axis.set(title=name, xlabel=axis_names[1], xticks=range(8), yticks=range(8))
    axes[0, 0].set(ylabel=axis_names[0])
    fig.colorbar(drawn, ax=axes, label=label, shrink=0.8)
    lesson.show(fig, alt)


def explained(axis, colour, **where):
    """A legend for what lesson.dots draws."""
    axis.plot([], [], "o", ms=7, mfc="none", mew=1.5, color=colour, label="a run")
    axis.plot([], [], "_", ms=18, mew=3, color=colour, label="mean of the runs")
    axis.plot([], [], lw=1.2, color=colour, label="its 95 % interval")
    axis.legend(fontsize=9, **where)


def alphas(rows, swept):
    """Accuracy and likeness of experts over alpha, and for the dense gate."""
    arms = (*decided.SWEEP.values(), "moe-k8", "mode-k8-best-alpha")
    fig, ((top,), (low,)) = report.sheet("", 2, 1, 9.5, 7, sharex=True)
    drawn = {arm: lesson.dots(top, at, rows, "accuracy", (arm,), ("moe-k2",), COLOURS[0])
             for at, arm in enumerate(arms)}
    for at, arm in enumerate(arms):
        lesson.dots(low, at, rows, "expert similarity", (arm,), (), COLOURS[3])
    low.plot(swept["colleagues"], "s", color=COLOURS[2], mfc="none")
    low.plot([], "s", color=COLOURS[2], mfc="none", label="colleagues, a run")
    low.plot([], "o", color=COLOURS[3], mfc="none", label="all pairs, a run")
    low.legend(fontsize=9, loc="upper left")
    explained(top, COLOURS[0], loc="lower left")
    top.axhline(0, color="black", lw=0.8)
    top.set(yscale="symlog", ylabel="points above V-MoE", ylim=(-30, 3))
    top.set_yticks(ticks := (-20, -10, -5, -2, -1, 0, 1, 2), ticks)
    low.set(ylabel="mean cosine of two experts", xlabel="alpha", xticks=range(9),
            xticklabels=[*decided.SWEEP, "K=E, 0", f"K=E, {decided.BEST_ALPHA['cpu']}"])
    some, much = (drawn[f"mode-k2-alpha-{alpha}"].mean for alpha in ("0.1", "100"))
    fig.suptitle(f"alpha = 0.1: {some:+.1f} points; alpha = 100: {much:+.1f} points, and the "
                 f"likeness of colleagues is {swept['colleagues'][-1].mean():.2f}")
    lesson.show(fig, "Above: accuracy over seven alphas hardly moves up to 1 and falls at 10 and "
                     "100. Below: colleagues get alike, all pairs less so. Right: the dense gate")


def both(rows):
    """TGR and MoDE, alone and together: what changes in accuracy and in steadiness."""
    pairs = {"MoDE\n- V-MoE": ("mode-k2", "moe-k2"), "TGR+MoDE\n- V-MoE": (
        "tgr+mode-k2", "moe-k2"), "TGR+MoDE\n- MoDE": ("tgr+mode-k2", "mode-k2")}
    panels = {"accuracy": "test accuracy, points",
              "agreement adjacent, first quarter": "share of tokens that keep their expert"}
    drawn, (fig, axes) = [], report.sheet("", 1, 2, 10.5, 4.4)
    for axis, (metric, label) in zip(axes[0], panels.items(), strict=True):
        for at, (plus, minus) in enumerate(pairs.values()):
            drawn.append(lesson.dots(axis, at, rows, metric, (plus,), (minus,), COLOURS[at]))
        axis.axhline(0, color="black", lw=0.8)
        axis.set(xticks=range(3), xticklabels=pairs, ylabel=label, xlim=(-0.5, 2.5))
    explained(axes[0, 1], "0.4", loc="upper left")
    fig.suptitle(f"TGR + MoDE is {drawn[2].mean:.1f} points above MoDE alone; of 100 tokens "
                 f"{100 * drawn[5].mean:.0f} more keep their expert (n = {drawn[2].n})")
    lesson.show(fig, "Paired differences of accuracy and of routing agreement, a ring for every "
                     "seed: both are far larger with TGR than for MoDE alone")


# --- what the page claims ---

def claimed(rows, main, swept):
    """({claim: Estimate}, the study's hypotheses on mutual distillation as their rule judges them).

    rows and main are those of the grids alpha and main, swept has (alphas, seeds) arrays.
    """
    def against(what, alpha):
        return decided.contrast(rows, what, (decided.SWEEP[alpha],), ("moe-k2",))

    at = {alpha: i for i, alpha in enumerate(decided.SWEEP)}
    lead = swept["gate"] - swept["blind"]                                   # (alphas, seeds)
    seen = {f"accuracy, alpha {alpha} - V-MoE": against("accuracy", alpha)
            for alpha in ("0.01", "0.1", "100")}
    seen["held-out accuracy, alpha 0.01 - V-MoE"] = decided.interval(
        (100 * (swept["held_out"][at["0.01"]] - swept["held_out"][0])).tolist())
    seen["likeness of all pairs, alpha 100 - V-MoE"] = against("expert similarity", "100")
    seen["gate accuracy, alpha 0.01 - V-MoE"] = against("gate accuracy", "0.01")
    seen["lead over a blind gate, V-MoE"] = decided.interval(lead[0].tolist())
    seen["lead over a blind gate, alpha 1"] = decided.interval(lead[at["1"]].tolist())
    for alpha in ("0.01", "1"):
        seen[f"lead over a blind gate, alpha {alpha} - V-MoE"] = decided.interval(
            (lead[at[alpha]] - lead[0]).tolist())
    for what, alpha in (("own-domain accuracy", "0.01"), ("own-domain accuracy", "0.1"),
                        ("other-domain accuracy", "0.1"), ("own minus others", "0.1")):
        seen[f"{what}, alpha {alpha} - V-MoE"] = against(what, alpha)
    for what in ("accuracy", "agreement adjacent, first quarter"):
        seen[f"{what.split()[0].rstrip(',')}, TGR + MoDE - MoDE"] = decided.contrast(
            main, what, ("tgr+mode-k2",), ("mode-k2",))
    judged = {h: v for grid, found in (("main", main), ("alpha", rows))
              for h, v in decided.judge(grid, found).items()
              if h.source == "M" or h.claim.startswith("both together")}
    return seen, judged
