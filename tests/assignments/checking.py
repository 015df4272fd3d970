"""checking.py -- what is a check made of, and what does it say when it fails?

A check is a function `name(student, g)`; its name is the sentence that it checks. `student.router`,
`student.moe` ... are the student's modules and `student.answers` is the student's answers.py; `g`
is the check's own generator, so no check depends on the order in which they run.
"""
import importlib
import importlib.util
import zlib
from pathlib import Path

import torch

T, D, H, E, K = 37, 20, 24, 5, 2     # tokens, width, hidden, experts, choices: odd, and tiny


class Failure(AssertionError):
    """Why a check failed, in the four parts that every message has."""

    def __init__(self, quantity, expected, got, hint=""):
        super().__init__(f"{quantity}: expected {expected}, got {got}")
        self.quantity, self.expected, self.got, self.hint = quantity, expected, got, hint


class CannotRun(Exception):
    """Why a check cannot run on this machine: it counts neither for the student nor against."""


def check(points=1, hint=""):
    """Make a function a check that is worth `points`; `hint` is for failures without one."""
    def mark(function):
        function.points, function.hint = points, hint
        return function
    return mark


def checks_of(module):
    """The checks of a module in the order of its lines."""
    return [f for f in vars(module).values() if hasattr(f, "points")]


def require(condition, quantity, expected, got, hint=""):
    if not condition:
        raise Failure(quantity, expected, got, hint)


def same(quantity, got, expected, hint="", scale=None):
    """Fail unless `got` is `expected`: exactly, or for floats up to their dtype's rounding.

    The tolerance is 64 eps of the expected dtype times `scale`, by default the largest expected
    magnitude: there is no absolute part under which all small numbers would be right. Give `scale`
    where the expected value is what is left after large terms cancelled.
    """
    if not isinstance(expected, torch.Tensor):
        if isinstance(expected, float) and isinstance(got, int | float):
            got, expected = (torch.tensor(v, dtype=torch.float64) for v in (got, expected))
        else:
            return require(type(got) is type(expected) and got == expected, quantity,
                           repr(expected), repr(got), hint)
    shape = tuple(expected.shape)
    require(isinstance(got, torch.Tensor), quantity, f"a tensor {shape}", brief(got), hint)
    require(got.shape == expected.shape, f"{quantity}, shape", shape, tuple(got.shape), hint)
    floats = expected.is_floating_point()
    require(got.is_floating_point() == floats and (got.dtype == torch.bool)
            == (expected.dtype == torch.bool), f"{quantity} {shape}, dtype", expected.dtype,
            got.dtype, hint)
    a, b = got.detach(), expected.detach()
    if floats:
        a, b = a.double(), b.double()
        if scale is None:
            finite = b[b.isfinite()]
            scale = finite.abs().max().item() if finite.numel() else 0.0
        tolerance = 64 * torch.finfo(expected.dtype).eps * scale
        good = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance)
    else:
        good = a == b
    if good.all():
        return None
    bad = (~good).nonzero()
    first = tuple(bad[0].tolist())
    at = f" at {first}" if shape else ""
    wrong = f" ({len(bad)} of {good.numel()} entries are wrong; this is the first)" if shape else ""
    raise Failure(f"{quantity} {shape}", f"{number(b[first])}{at}",
                  f"{number(a[first])}{at}{wrong}", hint)


def raises(quantity, error, call, hint=""):
    """Fail unless `call()` raises `error`; the exception is returned. A blank is still a blank."""
    try:
        result = call()
    except NotImplementedError:
        raise
    except error as raised:
        return raised
    raise Failure(quantity, error.__name__, f"no error, but {brief(result)}", hint)


def answered(student, name, like):
    """The student's answer `name`, of the form of `like`: a bool, a number, a list or a dict."""
    value = getattr(student.answers, name, None)
    missing = f"{student.folder}, answers.py: {name} is not answered yet"
    if value is None:
        raise NotImplementedError(missing)

    def walk(value, like, where):
        if value is None:
            raise NotImplementedError(missing)
        if isinstance(like, dict | list):
            require(type(value) is type(like) and len(value) == len(like)
                    and (isinstance(like, list) or value.keys() == like.keys()),
                    f"the form of {where} in answers.py", f"something like {like}", brief(value),
                    "keep the form that the template has and replace every None")
            for key in like if isinstance(like, dict) else range(len(like)):
                walk(value[key], like[key], f"{where}[{key!r}]")
        else:
            kind = (bool,) if isinstance(like, bool) else (int, float)
            require(isinstance(value, kind) and isinstance(value, bool) == isinstance(like, bool),
                    f"the form of {where} in answers.py",
                    "True or False" if isinstance(like, bool) else "a number", brief(value),
                    "keep the form that the template has and replace every None")
    walk(value, like, name)
    return value


def random(g, *shape, dtype=torch.float64):
    """Standard normal numbers; float64, so that a wrong formula cannot hide in the rounding."""
    return torch.randn(*shape, generator=g, dtype=dtype)


def gradient(loss, *leaves):
    """d loss(leaves) / d leaves; zeros where the loss does not depend on a leaf."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    require(isinstance(value, torch.Tensor) and value.requires_grad, "the loss, for autograd",
            "a tensor with a gradient", brief(value), "detach, item and no_grad cut the graph")
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    grads = [torch.zeros_like(v) if grad is None else grad
             for v, grad in zip(leaves, grads, strict=True)]
    return grads[0] if len(grads) == 1 else grads


def brief(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else f"{text[:76]} ..."


def number(value):
    value = value.item()
    return f"{value:.9g}" if isinstance(value, float) else str(value)


class Student:
    """The modules of a student tree, imported when a check first asks for them."""

    def __init__(self, tree, folder):
        self.tree, self.folder = Path(tree), folder

    def __getattr__(self, name):
        if name == "answers":
            path = self.tree / "tests/assignments" / self.folder / "answers.py"
            spec = importlib.util.spec_from_file_location("answers", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(name)
        setattr(self, name, module)
        return module


def generator(seed, name):
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
