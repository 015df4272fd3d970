"""lesson.py -- what do the four notebooks share?

Guesses and checks, figures, and what was measured before, with its origin. No class or function of
the modules is defined here a second time.
"""
import inspect
import io
import json
import os
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from IPython.display import Image, display
from matplotlib.colors import to_rgb
from PIL import Image as Picture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm as bar

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before kernels.py imports triton

import kernels
import train
from data import normalise
from notebooks import decided, study
from report import COLOURS
from teacher import Guide

RESULTS = Path(__file__).parent / "results"
SMOKE = bool(os.environ.get("SMOKE_TEST"))      # set by the tests: live cells stay small


def tqdm(items, **kwargs):
    """A progress bar, shown to a person who watches and not on a page that is kept."""
    return bar(items, leave=False, disable=not os.isatty(2), **kwargs)


# --- predict, then run ---

def predict(guess, truth, what=""):
    """Print what came out beside the reader's guess; an Ellipsis is no guess yet."""
    truth = f"{truth:.4g}" if isinstance(truth, float) else truth
    said = "no guess written yet" if guess is ... else f"your guess: {guess}"
    print(f"{what + ': ' if what else ''}{truth}   ({said})")


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
          f"    hint: {hint}")


def same(got, expected):
    if isinstance(expected, bool | str | type(None)) or got is None:
        return type(got) is type(expected) and got == expected
    try:
        got, expected = (torch.as_tensor(v).detach().double() for v in (got, expected))
    except (TypeError, ValueError, RuntimeError):
        return got == expected
    return got.shape == expected.shape and torch.allclose(
        got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def brief(value):
    if isinstance(value, torch.Tensor):
        value = value.detach()
        shape = f"shape {tuple(value.shape)}"
        return f"{shape}, {value.flatten()[:6].tolist()}{' ...' if value.numel() > 6 else ''}"
    return repr(value)


# --- figures ---

def show(fig, alt):
    """Put a figure on the page as a small PNG; `alt` tells it to those who cannot see it."""
    drawn, small = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=80)
    # 256 colours are enough for a figure and halve its file
    Picture.open(drawn).convert("RGB").quantize(256).save(small, "png", optimize=True)
    display(Image(small.getvalue(), alt=alt))


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
    palette = np.array([to_rgb(colour) for colour in COLOURS])               # (8, 3)
    tiles = np.concatenate([palette[experts], np.asarray(strength)[:, None]], axis=1)
    axis.imshow(image.float().mean(dim=0), cmap="gray", vmin=-100, vmax=255)
    axis.imshow(tiles.reshape(4, 4, 4), extent=(0, 32, 32, 0), interpolation="nearest")
    for place, (expert, s) in enumerate(zip(experts.tolist(), strength, strict=True)):
        axis.text(4 + place % 4 * 8, 4 + place // 4 * 8, expert, ha="center", va="center",
                  color="white" if expert == 7 and s > 0.5 else "black", fontsize=9)


def box(axis, x, y, width, height, text, colour, size=8):
    """One labelled rectangle of a drawing; (x, y) is its first corner."""
    axis.fill([x, x + width, x + width, x], [y, y, y + height, y + height],
              facecolor=(*to_rgb(colour), 0.3), edgecolor=colour, linewidth=1)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def journey(axis, experts, plan):
    """Draw a `kernels.Plan`: every choice of experts (T, K), to its row and back to its token."""
    (T, K), chosen = experts.shape, experts.flatten().tolist()
    for s, e in enumerate(chosen):
        box(axis, 0, s, 4, 0.8, f"choice {s}: token {s // K} to expert {e}", COLOURS[e])
        box(axis, 10.5, s, 3.3, 0.8, f"choice {s}: from expert {e}", COLOURS[e])
    for r, s in enumerate(plan.order.tolist()):
        e = chosen[s]
        box(axis, 5.5, r, 3.5, 0.8, f"row {r}: expert {e}, token {s // K}", COLOURS[e])
        axis.plot([4, 5.5], [s + 0.4, r + 0.4], [9, 10.5], [r + 0.4, s + 0.4], color=COLOURS[e])
    for t in range(T):
        box(axis, 14, K * t, 3.6, K - 0.2, f"token {t}: {K} gated\noutputs, added", "0.5")
    heads = {0: "as routed", 5.5: "as computed", 10.5: "put back", 14: "added up"}
    for x, head in heads.items():
        axis.text(x, -0.3, head, weight="bold")
    axis.set(xlim=(-0.1, 17.7), ylim=(T * K, -1))
    axis.axis("off")


def tiling(axis, plan, tiles, rows, width, columns):
    """Draw which program of grouped_gemm computes which tile of a result (S, width)."""
    S, E, across = len(plan.ids), len(plan.offsets) - 1, -(-width // columns)
    for tile, (e, start) in enumerate(zip(*(t.tolist() for t in tiles), strict=True)):
        alive = min(rows, plan.offsets[e + 1].item() - start) if e < E else 0
        what = f"expert {e}, {alive} of {rows} rows" if alive else "return at once"
        y, height = (start, alive) if alive else (tile, 0.8)    # idle ones stand beside the result
        for n in range(across):
            x, wide = columns * n, min(columns, width - columns * n)
            if not alive:
                x, wide = width + 5 + 1.3 * n, 1.2
            box(axis, x, y, wide, height, tile * across + n, COLOURS[e] if alive else "0.5", size=9)
        at = width + (0.2 if alive else 5.2 + 1.3 * across)
        axis.text(at, y + height / 2, f"tile {tile}: {what}", va="center", fontsize=8)
    axis.set(xlim=(-0.1, width + 10 + 1.3 * across), ylim=(S + 0.1, -0.1), yticks=range(S),
             xticks=range(width), ylabel="row, sorted by expert",
             xlabel="column of the result; the numbers in the boxes are those of the programs")


def finish(axis, xlabel, ylabel="", log_ticks=()):
    """The axes' names and the legend; with `log_ticks` a logarithmic x axis marked there."""
    if log_ticks:
        axis.set_xscale("log")
        axis.set_xticks(log_ticks, [f"{value:g}" for value in log_ticks])
        axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=8, framealpha=1)


# --- code: how it is written, what it moves ---

def source(function, first="", last=""):
    """Print a function of the modules, or its lines from the one with `first` to that with `last`.

    A Triton kernel keeps what was written in `fn`.
    """
    lines = inspect.getsource(getattr(function, "fn", function)).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i in range(start, len(lines)) if last in lines[i]) if last else len(lines)
    print(textwrap.dedent("\n".join(lines[start:end + 1])))


def moved(step):
    """Elements that the operators of step() read and write, each operand of each operator once."""
    with Moved() as count:
        step()
    return count.elements


def errors(mlp, layer):
    """What is the largest error of a rung of kernels.py, on its output and on every gradient?

    `layer` is one of bench.py's. Against kernels.reference in float64, over the largest true
    value of each. Returns their names and the errors.
    """
    def run(mlp, cast):
        leaves = {name: cast(t).clone().requires_grad_() for name, t in layer.leaves.items()}
        x, gates, *weights = leaves.values()
        y = mlp(x, layer.experts, gates, *weights)
        grads = torch.autograd.grad(y, leaves.values(), layer.dy.to(y.dtype))
        return {"y": y.detach(),
                **{f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}}

    true, got = run(kernels.reference, torch.Tensor.double), run(mlp, torch.Tensor.detach)
    return list(true), np.array([((got[name].double() - t).abs().max() / t.abs().max()).item()
                                 for name, t in true.items()])


class Moved(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result, name = operator(*args, **(kwargs or {})), operator.__name__
        aliases = [r.alias_info for r in operator._schema.returns if r.alias_info]
        view = bool(aliases) and not any(a.is_write for a in aliases)
        if not view and not name.startswith(("empty", "new_empty", "detach")):
            # the first operand of these is written, or asked for its dtype, and never read
            read = args[1:] if name.startswith(("copy_", "index_copy_", "new_")) else args
            self.elements += sum(t.numel() for t in tree_leaves((read, kwargs, result))
                                 if isinstance(t, torch.Tensor))
        return result


# --- what was measured before, and by whom ---

def measured(about):
    """Print where a number comes from, above every figure that was not computed on this page."""
    versions = about["versions"]
    print(f"Measured by `{about['command']}` on {about['device']}, seed {about['seed']}, torch "
          f"{versions['torch']}, commit {(about['commit'] or 'unknown')[:12]}.")


def read(name):
    """The arrays of notebooks/results/NAME.npz and, under "about", where they come from."""
    with np.load(RESULTS / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    arrays["about"] = json.loads(str(arrays["about"]))
    return arrays


def rows(grid, scale="cpu"):
    """The rows of one grid of the study, with those of arms that it shares with other grids."""
    return study.rows_of(grid, scale)


def timings():
    """Who made results/kernels_cpu.json, and its rows that nobody else's work disturbed."""
    from notebooks import bench
    record = json.loads((RESULTS / "kernels_cpu.json").read_text())
    timed = [r for r in record["rows"] if r["ms"] and not bench.disturbed(r)]
    return (record["env"] | {"seed": 0},                    # bench.draw knows no other seed
            sorted(timed, key=lambda r: (-r["D"], -r["E"], -r["K"], r["threads"])))


def over(timed, name, rival="dense", field="times_dense", **where):
    """A field of one contender over a rival's, for every race that both ran."""
    def race(r):
        return r["D"], r["E"], r["K"], r["threads"]

    rivals = {race(r): r[field] for r in timed if r["backend"] == rival}
    return [r[field] / rivals[race(r)] for r in timed
            if r["backend"] == name and race(r) in rivals and where.items() <= r.items()]


def probe_images():
    """64 of the study's probe images, which are never augmented.

    Returns them standardised, as uint8 (64, 3, 32, 32), their labels, and the classes' names.
    """
    kept = read("probe")
    images = torch.from_numpy(kept["images"])
    mean, std = kept["mean"].tolist(), kept["std"].tolist()
    return normalise(images, mean, std), images, kept["labels"], kept["names"].tolist()


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
