"""checking.py -- what is a check made of, and what does it say when it fails?

A check is a function `name(student, g)`; its name is the sentence that it checks. `student.router`,
`student.moe` ... are the student's modules and `student.answers` is the student's answers.py; `g`
is the check's own generator, so no check depends on the order in which they run.
"""
import functools
import gc
import importlib
import importlib.util
import inspect
import random as dice
import weakref
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

T, D, H, E, K = 37, 20, 24, 5, 2     # tokens, width, hidden, experts, choices: odd, and tiny
TYPED = 1e-6        # how far an answer may be that somebody typed: none has more decimals


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


def tolerance(dtype, scale):
    """How far from the truth right code may be: 64 eps of the dtype, times the size of its terms.

    A sum of n numbers, in any order, is off by less than n eps / 2 times the sum of their
    magnitudes. So this is enough for 128 terms at the worst, and for thousands whose roundings do
    not all go the same way.
    """
    return 64 * torch.finfo(dtype).eps * scale


def same(quantity, got, expected, hint="", scale=None):
    """Fail unless `got` is `expected`: of its dtype, and for floats up to the `tolerance`.

    Its `scale` is by default the largest expected magnitude: there is no absolute part under which
    all small numbers would be right. Give it where the expected value is what is left after larger
    terms cancelled: their sum, without signs.
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
    require(got.dtype == expected.dtype, f"{quantity} {shape}, dtype", expected.dtype, got.dtype,
            hint)
    a, b = got.detach(), expected.detach()
    if floats:
        a, b = a.double(), b.double()
        if scale is None:
            finite = b[b.isfinite()]
            scale = finite.abs().max().item() if finite.numel() else 0.0
        good = (a == b) | (a.isnan() & b.isnan()) | (
            (a - b).abs() <= tolerance(expected.dtype, float(scale)))
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
    """Fail unless `call()` raises `error`, a class or a tuple of them; the exception is returned.
    A blank is still a blank."""
    try:
        result = call()
    except NotImplementedError:
        raise
    except error as raised:
        return raised
    named = " or ".join(e.__name__ for e in (error if isinstance(error, tuple) else (error,)))
    raise Failure(quantity, named, f"no error, but {brief(result)}", hint)


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


# --- what shows in a second call, on another device or with larger numbers ---

def with_gradients(module):
    """A module whose parameters have a .grad already, which is nobody's to wipe."""
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    return module


def keeps_nothing(quantity, call, hint="keep no inputs and no results in a list, or on self"):
    """Fail if tensors pile up when `call()` is called again and again and its results dropped."""
    def alive():
        gc.collect()
        return sum(issubclass(type(v), torch.Tensor) for v in gc.get_objects())
    call()                                              # constants may stay, and the last results
    gc.collect()
    gc.freeze()                                         # what is there now is not looked at again
    call()
    before, calls = alive(), 4
    for _ in range(calls):
        call()
    more = alive() - before
    require(more < calls, f"tensors that {calls} more calls of {quantity} leave behind", 0, more,
            hint)


def where_given(quantity, call, hint="give it device=, that of an argument"):
    """What `call()` returns; fail where a GPU would: a tensor was made without `device=`."""
    with OneDevice(quantity, hint):
        result = call()
    for name, v in parts("the result", result):
        require(not hasattr(v, "made_by"), f"the device of {name} of {quantity}", "its arguments'",
                f"the CPU: torch.{getattr(v, 'made_by', '')} without device=", hint)
    return result


class OneDevice(TorchFunctionMode):
    """Notes what is made without `device=`, and fails where it meets a tensor that was given.

    As on a GPU, a tensor without dimensions may meet any other, an index may lie on the CPU, and
    copies cross over.
    """
    MADE = tuple(getattr(torch, name) for name in (
        "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint",
        "randn", "randperm", "tensor", "zeros"))
    CROSSING = torch.Tensor.copy_, torch.Tensor.__setitem__

    def __init__(self, quantity, hint):
        super().__init__()
        self.quantity, self.hint = quantity, hint

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [v for _, v in parts("", [args, kwargs]) if isinstance(v, torch.Tensor)
                   and v.dim()]
        made = [v for v in tensors if hasattr(v, "made_by")]
        given = [v for v in tensors if not hasattr(v, "made_by")]
        if function is torch.Tensor.__getitem__ and given and given[0] is args[0]:
            made = []
        name = getattr(function, "__name__", "a function")
        moves = name == "type_as" or (name == "to" and any(
            isinstance(v, torch.Tensor | torch.device | str)
            for v in (*args[1:], *kwargs.values())))
        if made and given and not moves and function not in self.CROSSING:
            raise Failure(f"the device of what {self.quantity} makes", "its arguments'",
                          f"the CPU: torch.{made[0].made_by} without device=, and then {name}() of "
                          f"that and of an argument", self.hint)
        out = function(*args, **kwargs)
        by = made[0].made_by if made and not given else None
        if function in self.MADE and not tensors and kwargs.get("device") is None:
            by = name
        if moves:
            return out.view_as(out) if hasattr(out, "made_by") else out
        for _, v in parts("", out) if by else ():
            if isinstance(v, torch.Tensor) and v.dim():
                v.made_by = by
        return out


def on_a_gpu(student, call, *tensors):
    """What `call` returns of such tensors on a GPU: its dtype and shape, without a GPU.

    torch's fakes hold no numbers: of code that looks at them nothing can be said, and that is None.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        fakes = [torch.empty(v.shape, dtype=v.dtype, device="cuda") for v in tensors]
        inside, student.watch.inside = student.watch.inside, True       # no numbers to watch
        try:
            return call(*fakes)
        except NotImplementedError:
            raise
        except RuntimeError:
            return None
        finally:
            student.watch.inside = inside


class Coarse(TorchFunctionMode):
    """Gives float32 the 8 bits of bfloat16: a count above 256 goes wrong as one over 2**24 does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.dim():
            out.detach().copy_(out.detach().bfloat16())
        return out


def brief(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else f"{text[:76]} ..."


def number(value):
    value = value.item()
    return f"{value:.9g}" if isinstance(value, float) else str(value)


# --- what a function that is asked for must leave as it is ---

STATES = {"torch's": lambda: torch.get_rng_state().numpy().tobytes(),
          "Python's": dice.getstate,
          "numpy's": lambda: [getattr(v, "tobytes", lambda v=v: v)()
                              for v in np.random.get_state()]}     # noqa: NPY002
SETTINGS = {"torch.is_grad_enabled": torch.is_grad_enabled,
            "torch.get_default_dtype": torch.get_default_dtype,
            "torch.are_deterministic_algorithms_enabled":
                torch.are_deterministic_algorithms_enabled}


class Watch:
    """Looks at every call that a check makes of a function that is asked for.

    Afterwards its arguments are as before: tensors (and their .grad), arrays, lists, the parameters
    and modes of modules. So are the random states, torch's settings and the results of earlier
    calls. `may` has what a function is meant to do all the same: {"draws", "writes ARGUMENT"}. What
    it calls itself is its own affair, and under torch.func and torch.compile there is nothing to
    see.
    """

    def __init__(self):
        self.inside, self.calls, self.results = False, 0, []

    def over(self, module, functions):
        """Put a watch on the functions {name: what it may} of a module; kernels cannot have one."""
        for path, may in functions.items():
            *owner, name = path.split(".")
            place = functools.reduce(getattr, owner, module)
            given = vars(place).get(name)
            function = given.__func__ if isinstance(given, staticmethod) else given
            if inspect.isfunction(function) and not hasattr(function, "watched"):
                call = self.watched(function, path, set(may))
                setattr(place, name, staticmethod(call) if function is not given else call)

    def watched(self, function, name, may):
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args, **kwargs):
            if (self.inside or torch.compiler.is_compiling()
                    or torch._C._are_functorch_transforms_active()):
                return function(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            given = {k: v for k, v in given.items() if f"writes {k}" not in may
                     and not (k == "self" and name.endswith("__init__"))}
            earlier = {} if any(m.startswith("writes") for m in may) else {
                what: v for ref, what in self.results if (v := ref()) is not None}
            before = state(given, copy=True), state(earlier, copy=True)
            states = {of: get() for of, get in STATES.items()}
            seed = torch.initial_seed()
            settings = {of: get() for of, get in SETTINGS.items()}
            self.inside, self.calls = True, self.calls + 1
            try:
                result = function(*args, **kwargs)
            finally:
                self.inside = False
            unchanged(before[0], state(given), f"{name}, after the call", "as it was given",
                      "leave arguments alone: x = x + 1 makes another tensor, x += 1 writes")
            unchanged(before[1], state(earlier), f"after a call of {name}", "as it was",
                      "make a new tensor in every call")
            require(seed == torch.initial_seed(), f"the seed of torch after {name}",
                    "as before the call", "another one", "do not call torch.manual_seed: whoever "
                    "seeds a run is to have other numbers in every call")
            for of, get in STATES.items():
                require("draws" in may or states[of] == get(), f"{of} random state after {name}",
                        "as before the call", "another one", "draw no number and set no seed here: "
                        "a run must not depend on whether this was called")
            for of, get in SETTINGS.items():
                require(settings[of] == get(), f"{of}() after {name}", str(settings[of]),
                        str(get()), "change a setting for some lines only, in a `with`")
            alive = [(ref, what) for ref, what in self.results if ref() is not None]
            new = [(weakref.ref(v), f"{part} of call {self.calls}, of {name}")
                   for part, v in parts("the result", result) if isinstance(v, torch.Tensor)]
            self.results = (alive + new)[-16:]
            return result
        call.watched = True
        return call


def parts(name, value):
    """(its name, the part) of all that is inside nested tuples, lists, dicts and modules."""
    if isinstance(value, dict):
        yield f"the keys of {name}", list(value)
        inside = [(f"{name}[{k!r}]", v) for k, v in value.items()]
    elif hasattr(value, "_fields"):
        inside = [(f"{field} of {name}", getattr(value, field)) for field in value._fields]
    elif isinstance(value, list | tuple):
        yield f"the length of {name}", len(value)
        inside = [(f"{name}[{i}]", v) for i, v in enumerate(value)]
    elif isinstance(value, nn.Module):
        inside = [(f"{n} of {name}", v) for n, v in
                  (*value.named_parameters(), *value.named_buffers())]
        for n, module in value.named_modules():
            yield f"training of {n} of {name}" if n else f"training of {name}", module.training
    elif isinstance(value, torch.autograd.function.FunctionCtx):
        inside = [(f"ctx.saved_tensors[{i}]", v) for i, v in enumerate(value.saved_tensors)]
    else:
        yield name, value
        return
    for n, v in inside:
        yield from parts(n, v)


def state(named, copy=False):
    """{its name: what can be compared of it} of everything in a dict of arguments."""
    found = {}
    for name, v in (part for item in named.items() for part in parts(*item)):
        if isinstance(v, torch.Tensor):
            for of, tensor in ((name, v), (f"{name}.grad", v.grad if v.is_leaf else None)):
                if tensor is not None and not tensor.is_meta:
                    tensor = tensor.detach()
                    found[of] = tensor.clone() if copy else tensor
                elif of != name:
                    found[of] = None
            found[f"{name}.requires_grad"] = v.requires_grad
        elif isinstance(v, np.ndarray):
            found[name] = v.copy() if copy else v
        elif isinstance(v, bool | int | float | str | list):
            found[name] = v
    return found


def equal(a, b):
    if a is None and isinstance(b, torch.Tensor):       # a .grad of zeros is as good as none
        return not b.any()
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and (
            torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all()))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return type(a) is type(b) and (a == b or a != a)


def unchanged(before, after, of, expected, hint):
    for name in before | after:
        a, b = before.get(name, "missing"), after.get(name, "missing")
        if not equal(a, b):
            tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
            if tensors and a.shape == b.shape and a.dtype == b.dtype:
                at = tuple((~((a == b) | (a.isnan() & b.isnan()))).nonzero()[0].tolist())
                a, b = (f"{v[at].item()!r} at {at}" for v in (a, b))
            else:
                a, b = brief(a), brief(b)
            raise Failure(f"{name}, {of}", f"{expected}: {a}", b, hint)


class Student:
    """The modules of a student tree, imported when a check first asks for them.

    A watch stands over the functions `watched`, {file: {function: what it may}}.
    """

    def __init__(self, tree, folder, watched):
        self.tree, self.folder, self.watched, self.watch = Path(tree), folder, watched, Watch()

    def __getattr__(self, name):
        if name == "answers":
            path = self.tree / "tests/assignments" / self.folder / "answers.py"
            spec = importlib.util.spec_from_file_location("answers", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(name)
            self.watch.over(module, self.watched.get(f"{name}.py", {}))
        setattr(self, name, module)
        return module


def generator(seed, name):
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
