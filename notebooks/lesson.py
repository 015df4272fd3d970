"""lesson.py -- what do the four notebooks share? Guesses, checks, figures, whose number it is.

No class or function of the modules is defined here a second time.
"""
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from IPython.display import Image, display
from tqdm.auto import tqdm as bar

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before kernels.py imports triton

import train
from data import normalise

RESULTS = Path(__file__).parent / "results"
SMOKE = bool(os.environ.get("SMOKE_TEST"))      # set by the tests: live cells stay small


def tqdm(items, **kwargs):
    """A progress bar for a person who watches; a page that is kept shows none."""
    return bar(items, leave=False, disable=not os.isatty(2), **kwargs)


# --- predict, then run ---

def predict(guess, truth, what=""):
    """Put the reader's guess beside what came out; an Ellipsis is no guess yet."""
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
    """Put a figure on the page as a small PNG; `alt` says it in words to who cannot see it."""
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=80)
    display(Image(png.getvalue(), alt=alt))


def dots(axis, at, rows, metric, plus, minus=(), colour="black"):
    """Draw sum(plus) - sum(minus) of the study's arms above `at`: a ring per seed that all of them
    have, a bar at the mean, a line over its 95 % interval. Returns the study's Estimate."""
    import study
    found = study.contrast(rows, metric, plus, minus)
    each = [study.contrast([r for r in rows if r["seed"] == seed], metric, plus, minus).mean
            for seed in sorted({r["seed"] for r in rows})]
    each = [value for value in each if value is not None]
    axis.plot([at] * len(each), each, "o", ms=7, mfc="none", mew=1.5, color=colour)
    if each:
        axis.plot(at, found.mean, "_", ms=18, mew=3, color=colour)
    if found.low is not None:
        axis.plot([at, at], [found.low, found.high], lw=1.2, color=colour)
    return found


# --- what was measured before, and by whom ---

def measured(about):
    """Say who made a number: the line above every figure that was not computed on this page."""
    versions = about["versions"]
    print(f"Measured by `{about['command']}` on {about['device']}, seed {about['seed']}, torch "
          f"{versions['torch']}, commit {(about['commit'] or 'unknown')[:12]}.")


def read(name):
    """The arrays of notebooks/results/NAME.npz and, under "about", who measured them."""
    with np.load(RESULTS / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    arrays["about"] = json.loads(str(arrays["about"]))
    return arrays


def rows(grid, scale="cpu"):
    """The study's runs of one grid, a dict per run; arms shared with other grids are among them."""
    import study  # it imports half the repository: only who asks pays for it
    return study.rows_of(grid, scale)


def probe_images():
    """64 of the study's probe images, never augmented: standardised, as uint8 (64, 3, 32, 32),
    their labels, and the names of the classes."""
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
