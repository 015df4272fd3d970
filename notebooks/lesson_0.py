"""lesson_0.py -- the figures of notebook 0: what a layer costs, and who gets the patches."""
import torch.nn.functional as F
from einops import rearrange

import report
from notebooks.lesson import show
from report import COLOURS


def alike(share):
    """With which probability two tokens have the same expert, from the shares (..., E)."""
    return share.square().sum(dim=-1)


def costs(title, E, lines):
    """Draw {name: costs} against the numbers of experts E; a shorter line has the last of them."""
    fig, axes = report.sheet(title, 1, 1, 9, 4)
    for (name, values), look, k in zip(lines.items(), ("-", "--", "-"), (0, 3, 3), strict=True):
        axes[0, 0].loglog(E[-len(values):], values, look, marker="o", lw=2.5, color=COLOURS[k],
                          label=name)
    for ticks in (axes[0, 0].set_xticks, axes[0, 0].set_yticks):
        ticks(E, E, fontsize=12, minor=False)
    axes[0, 0].minorticks_off()
    axes[0, 0].set_xlabel("experts E", fontsize=12)
    axes[0, 0].set_ylabel("times the dense MLP", fontsize=12)
    axes[0, 0].legend(fontsize=12)
    show(fig, "Parameters grow with the number of experts; multiplications hardly do, for K=1 or 2")


def bands(axis, share):
    """Draw who got which share (STEPS, E) of the patches, an expert on top of another."""
    axis.stackplot(range(len(share)), 100 * share.T.numpy(), colors=COLOURS,
                   labels=[f"expert {e}" for e in range(share.shape[1])])
    axis.set(xlim=(0, len(share) - 1), ylim=(0, 100))


def layers(title, shares, in_use):
    """A panel of bands for each of several layers: shares [(STEPS, E)], in_use a number of each."""
    fig, axes = report.sheet(title, 2, len(shares) // 2, 11, 5, sharey=True)
    for seed, (axis, share) in enumerate(zip(axes.flat, shares, strict=True)):
        bands(axis, share)
        axis.set_title(f"seed {seed}: {in_use[seed]} in use")
    with_legend(fig, axes)
    show(fig, "A panel for each seed: bands of eight experts; two or three soon hold nearly all")


def layer(title, share):
    """The bands of a single layer."""
    fig, axes = report.sheet(title, 1, 1, 9, 3.6)
    bands(axes[0, 0], share)
    with_legend(fig, axes)
    show(fig, f"Bands of eight experts over the steps of a training. {title}")


def with_legend(fig, axes):
    fig.supxlabel("step", fontsize=12)
    fig.supylabel("share of the patches, %", fontsize=12)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=12,
               reverse=True)


def served(groups):
    """Sixteen patches of each expert, a row for each: groups {expert: its patches (n, 48)}."""
    dark, bright = sorted(own.mean() for own in sorted(groups.values(), key=len)[-2:])
    fig, axes = report.sheet(f"The two experts with the most patches divide them by brightness: "
                             f"{dark:+.2f} and {bright:+.2f} on average",
                             len(groups), 1, 9, 0.6 + 0.9 * len(groups))
    total = sum(map(len, groups.values()))
    for axis, (e, own) in zip(axes[:, 0], groups.items(), strict=True):
        few = rearrange(own[::len(own) // 16][:16], "n (c p q) -> n p q c", p=4, q=4)
        few = F.pad(0.5 + few / 5, (0, 0, 0, 1), value=1)               # a gap beside each patch
        axis.imshow(rearrange(few, "n p q c -> p (n q) c").clip(0, 1).numpy())
        axis.set_title(f"expert {e}: {len(own) / total:.0%} of these patches, mean brightness "
                       f"{own.mean():+.2f}", loc="left", fontsize=12)
        axis.axis("off")
    show(fig, "Rows of small patches, one row for each expert in use; bright ones and dark ones "
              "apart")


def spread(title, groups):
    """Lines with bands: of each group of layers {name: (SEEDS, STEPS)} the mean and the range."""
    fig, axes = report.sheet(title, 1, 1, 9, 4, subplot_kw={"ylim": (1, 8)})
    for (name, curve), look, k in zip(groups.items(), ("-", "--"), (3, 0), strict=True):
        steps = range(curve.shape[1])
        axes[0, 0].plot(steps, curve.mean(dim=0), look, lw=3, color=COLOURS[k],
                        label=f"{name}: mean of {len(curve)} layers")
        axes[0, 0].fill_between(steps, curve.amin(dim=0), curve.amax(dim=0), color=COLOURS[k],
                                alpha=0.25, lw=0, label="from the least to the most")
    axes[0, 0].set_xlabel("step", fontsize=12)
    axes[0, 0].set_ylabel("effective number of experts", fontsize=12)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=11,
               ncols=2)
    show(fig, "Effective number of experts over steps: 2 or 3 without the load loss, more with it")
