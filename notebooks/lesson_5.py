"""lesson_5.py -- small worlds in which the remedies of notebook 5 can be watched for seconds.

Tokens are random numbers, the layers are those that the study trains.
"""
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import report
from moe import MoE
from notebooks.decided import (
    BEST_ARM,
    BEST_IDEA,
    MAPS,
    MAPS_OF,
    METRICS,
    PLACED,
    REMEDIED,
    block,
    contrast,
)
from notebooks.decided import WORDS_OF_HASH as HASH
from notebooks.lesson import dots, show
from notebooks.remedies import REMEDIES
from report import COLOURS

T, D, H, E = 512, 16, 32, 8
JOB = SimpleNamespace()         # what a remedy may ask of the run that it is part of: here nothing


def layer(name=None, spread=1.0, seed=0, scale=0.5):
    """A layer of K = 1 in training, remedied by `name`; expert e answers m_e + spread * g_e(x)."""
    torch.manual_seed(seed)
    moe = MoE(D, H, E, k=1)
    torch.nn.init.normal_(moe.router.weight, std=scale)
    with torch.no_grad():
        for weight, std in ((moe.experts.w_in, D ** -0.5), (moe.experts.w_out, spread),
                            (moe.experts.b_out, 1.0)):
            weight.normal_(std=std)
    return (REMEDIES[name](moe, JOB) if name else moe).train()


def tokens(common=0.0, n=T):
    """(n, D) random tokens that share a direction, `common` times the same normal vector."""
    shared = torch.randn(D, generator=torch.Generator().manual_seed(1))
    return torch.randn(n, D) + common * shared


def router_gradient(moe, x, slope):
    """d(slope . y) / dW (E, D) of a layer's router, by autograd."""
    y, _, _ = moe(x)
    return torch.autograd.grad((y * slope).sum(), moe.router.weight)[0]


def oracle_gradient(moe, x, slope):
    """The same if all experts were chosen, with their outputs weighed by p: (E, D)."""
    f = moe.experts.batched(x.expand(E, *x.shape)).detach()             # (E, T, D)
    p = F.linear(x, moe.router.weight).softmax(dim=1)                   # (T, E)
    worth = torch.einsum("td,etd->te", slope, f)
    return torch.autograd.grad((p * worth).sum(), moe.router.weight)[0]


def cosine(a, b):
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def nearness(name, spread, draws=1, seed=0):
    """Cosine of a remedied router's gradient, the sum of `draws` passes, with its oracle's."""
    moe = layer(name, spread, seed)
    x, slope = tokens(), torch.randn(T, D)
    if name == "default outputs":                                       # its means settle first
        moe.decay = 0.9
        with torch.no_grad():
            for _ in range(60):
                moe(tokens())
    total = sum(router_gradient(moe, x, slope) for _ in range(draws))
    return cosine(total, oracle_gradient(moe, x, slope))


def load(routing):
    """(E,) how many tokens each expert gets as their first choice."""
    return torch.bincount(routing.chosen[:, 0], minlength=E)


def switched_on(steps, common=1.0):
    """Train a ReLU-routed layer; (steps,) how many of E experts are on, and lambda's course."""
    moe, other = layer("relu", 0.3, scale=0.2), layer(None, 0.3, seed=1)
    optimizer = torch.optim.Adam(moe.parameters(), lr=3e-3)
    on, strength = [], []
    for _ in range(steps):
        x = tokens(common, 256)
        with torch.no_grad():
            goal = other(x)[0]
        y, routing, _ = moe(x)
        optimizer.zero_grad()
        (F.mse_loss(y, goal) + moe.penalty).backward()
        optimizer.step()
        on.append(E * (routing.logits > 0).float().mean().item())
        strength.append(moe.strength.item())
    return np.array(on), np.array(strength)


# --- figures ---

def curves(title, x, lines, xlabel, ylabel, alt, **axis):
    """One axes with a labelled line per name: lines {name: values, or (mean, spread)}."""
    fig, axes = report.sheet(title, 1, 1, 9, 3.8)
    for k, (name, values) in enumerate(lines.items()):
        mean, sd = values if isinstance(values, tuple) else (values, None)
        axes[0, 0].plot(x, mean, "o-" if len(x) < 20 else "-", color=COLOURS[k], lw=2.5, label=name)
        if sd is not None:
            axes[0, 0].fill_between(x, mean - sd, mean + sd, color=COLOURS[k], alpha=0.2)
    axes[0, 0].set(xlabel=xlabel, ylabel=ylabel, **axis)
    axes[0, 0].legend()
    show(fig, alt)


def above(rows, arms, plain, called, exam):
    """Draw how far arms of the study {name: label} are above the arm `plain`, which is `called` so,
    on its `exam`: a ring for every seed, a bar for the mean, a line for its 95 % interval."""
    fig, axes = report.sheet("", 1, 1, 10, 4)
    axis = axes[0, 0]
    found = [dots(axis, at, rows, "accuracy", (name,), (plain,), COLOURS[0])
             for at, name in enumerate(arms)]
    axis.axhline(0, color="black", lw=0.8)
    axis.set(ylabel=f"points of {exam} accuracy\nabove {called}", xticks=range(len(arms)),
             xticklabels=arms.values())
    fig.suptitle(f"Above 0: {sum(e.low > 0 for e in found)} of {len(arms)} intervals, and "
                 f"{sum(e.mean > 0 for e in found)} of {len(arms)} means")
    show(fig, f"Accuracy, paired differences from {called}: a ring for every seed, and their mean")


# The arms of `maps`: how many experts there are, and which patches share one
PLACES = {"dense-told-the-place": "none, but told\nthe place", MAPS["coin"]: "8, by a\ncoin",
          MAPS_OF[4]: "4, for four\nfar apart", REMEDIED["hash"]: "8, for two\nfar apart",
          MAPS["another in each block"]: "8, for two, others\nin each block",
          MAPS["neighbours"]: "8, for two\nneighbours", MAPS_OF[16]: "16, one for\neach patch"}


# Section 1's kinds, and arms of `routing`: {kind: {label: arm}}. One arm is not shown: the teacher
# dispatches it in training, so that its own router, by which it is tested, leads it astray.
KINDS = {
    "a teacher guides the router": {
        "dense teacher": "tgr-k1-router-alone", "pretrained": "tgr-k1-router-alone-lite0",
        "untrained": "tgr-k1-router-alone-untrained", "random router": "tgr-k1-router-alone-random",
        "k-means": "tgr-k1-router-alone-k-means", BEST_IDEA: BEST_ARM},
    **{kind: {name: REMEDIED[name] for name in names} for kind, names in {
        "estimate what is missing": ("default outputs", "sparse mixer", "dense mixer"),
        "choose otherwise": ("loss-free bias", "expert choice", "relu"),
        "fix the choice": ("stable", "grouter", "random fixed", "hash"),
        "add a loss": ("coupled", "similar")}.items()},
    "leave something out": {"no losses of its own": "moe-k1-no-aux", "no experts": "dense"}}


def above_vmoe(rows):
    """{label: Estimate}, how far each arm of KINDS is above V-MoE, the highest first."""
    found = {label: contrast(rows, "accuracy", (arm,), ("moe-k1",))
             for arms in KINDS.values() for label, arm in arms.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].mean))


def paid(rows, found):
    """Draw what `above_vmoe` found, and the same against the cosine with the oracle's gradient."""
    best = next(iter(found))
    sure = sum(e.low > 0 for e in found.values())
    fig, axes = report.sheet(
        f"Above V-MoE are {sure} of {len(found)} intervals; highest is {best}, by "
        f"{found[best].mean:.1f} points", 1, 2, 11, 6)

    cosines = {}
    for arm in {row["arm"] for row in rows}:
        its = [METRICS["oracle cosine"](row) for row in rows if row["arm"] == arm]
        cosines[arm] = None if None in its else np.mean(its)

    marks = [("V-MoE", cosines["moe-k1"], 0.0, "black")]
    place = {label: at for at, label in enumerate(reversed(found))}
    for colour, (kind, arms) in zip(COLOURS, KINDS.items(), strict=False):
        for label, arm in arms.items():
            e, at = found[label], place[label]
            axes[0, 0].plot([e.low, e.high], [at, at], color=colour, lw=2)
            axes[0, 0].plot(e.mean, at, "o", color=colour)
            if near := cosines.get(arm):
                marks.append((label, near, e.mean, colour))
        axes[0, 0].plot([], [], "o", color=colour, label=kind)
    for label, near, gain, colour in marks:                 # right of who has a neighbour at left
        right = near >= cosines["moe-k1"] or any(
            0 < near - x < 0.12 and abs(gain - y) < 0.03 for _, x, y, _ in marks)
        axes[0, 1].plot(near, gain, "o", color=colour, ms=8)
        axes[0, 1].annotate(label, (near, gain), xytext=(5 if right else -5, 4), fontsize=8,
                            ha="left" if right else "right", textcoords="offset points")
    axes[0, 0].axvline(0, color="black", lw=0.8)
    axes[0, 0].set(yticks=range(len(place)), yticklabels=place,
                   xlabel="points of test accuracy above V-MoE, 95 % interval")
    fig.legend(loc="outside lower center", ncols=3)
    axes[0, 1].axhline(0, color="black", lw=0.8)
    axes[0, 1].set(xlabel="cosine with the oracle's gradient, at the end", xlim=(0.3, 1.2),
                   ylabel="points of test accuracy above V-MoE")
    show(fig, "Left: paired differences of test accuracy from V-MoE, sorted, a colour for each "
              "kind. Right: the same differences against the cosine with the oracle's gradient")


def added(rows):
    """What each word of a hash adds to V-MoE without its own losses, beside the other words:
    {word: {the others: Estimate}}, from models that differ in that word alone."""
    return {word: {others: contrast(rows, "accuracy", (PLACED[tuple(
        w for w in HASH if w in (word, *others))],), (arm,))
        for others, arm in PLACED.items() if word not in others} for word in HASH}


def on_average(its):
    """The mean of some Estimates {name: Estimate}."""
    return np.mean([e.mean for e in its.values()]).item()


def apart(adds):
    """Draw what `added` found: a line for each pair of models."""
    fig, axes = report.sheet("On average over the others, " + ", ".join(
        f"“{word}” adds {on_average(its):+.1f}" for word, its in adds.items()), 1, 1, 9, 4.6)
    labels = []
    for colour, (word, its) in zip(COLOURS, adds.items(), strict=False):
        for others, e in its.items():
            axes[0, 0].plot([e.low, e.high], [len(labels)] * 2, color=colour, lw=2)
            axes[0, 0].plot(e.mean, len(labels), "o", color=colour)
            labels.append(f"{word}, beside {' and '.join(others)}" if others else f"{word} alone")
    axes[0, 0].axvline(0, color="black", lw=0.8)
    axes[0, 0].set(yticks=range(len(labels)), yticklabels=labels,
                   xlabel="points of test accuracy that it adds, 95 % interval")
    axes[0, 0].invert_yaxis()
    show(fig, "What each of a hash's three differences adds to V-MoE in points of test accuracy, "
              "alone and beside the others: twelve paired differences with their intervals")


def by_luck(rows, arms, plain, draws=100_000):
    """How far would the best of these arms be above the arm `plain` if all were equally good?

    In points of accuracy: the mean, and what one case of twenty exceeds. Arms scatter alike, by
    what neither arm nor block explains of their rows.
    """
    known = {arm: {block(r): METRICS["accuracy"](r) for r in rows if r["arm"] == arm}
             for arm in (*arms, plain)}
    blocks = sorted(set.intersection(*map(set, known.values())), key=str)
    each = np.array([[own[b] for b in blocks] for own in known.values()])   # (arms + 1, n)
    left = each - each.mean(axis=0) - each.mean(axis=1, keepdims=True) + each.mean()
    free = len(arms) * (len(blocks) - 1)
    error = (np.square(left).sum() / free / len(blocks)) ** 0.5
    random = np.random.default_rng(0)
    means = random.standard_normal((draws, len(arms) + 1))
    lead = means[:, :-1].max(axis=1) - means[:, -1]
    lead *= error / (random.chisquare(free, draws) / free) ** 0.5           # for `error` is a guess
    return lead.mean(), np.quantile(lead, 0.95)


def loads(found, counts):
    """Bars: the tokens of each expert {name: (E,)}; and by how many experts a token is taken."""
    fig, axes = report.sheet(f"Expert choice: even to the token, and {counts[0] / sum(counts):.0%} "
                             f"of the tokens see no expert", 1, 2, 10, 3.8, width_ratios=(2, 1))
    for k, (name, each) in enumerate(found.items()):
        axes[0, 0].bar(np.arange(E) + 0.28 * (k - 1), each, 0.28, color=COLOURS[k], label=name)
    axes[0, 0].set(xlabel="expert", ylabel="tokens", xticks=range(E))
    axes[0, 0].legend()
    axes[0, 1].bar(range(len(counts)), counts, color=COLOURS[2])
    axes[0, 1].set(xlabel="experts that take a token", ylabel="tokens", xticks=range(len(counts)))
    show(fig, "Left: tokens of eight experts, skewed, nearly even, and even. Right: under expert "
              "choice many tokens are taken by no expert, most by one, some by two or three")
