"""worker.py -- how is a student's code run so that it can hang, crash or cheat and be graded still?

    python worker.py FOLDER      then one job per line of stdin, one answer per line of stdout

A worker imports torch once and the checks of one assignment; every check of every job runs in a
forked child of its own, which alone imports the student's modules. A job is

    {"tree": the tree to grade, "public": the public checks alone?, "seeds": [0],
     "seconds": CPU time per check, "guard": a folder that must not be read, or null,
     "quiet": hide what the student prints,
     "watched": {file: {function: what it may do that others may not}},
     "together": all checks in one child, up to the first that fails, which is faster,
     "backwards": the last check first}
"""
import builtins
import contextlib
import gc
import importlib.util
import json
import linecache
import math
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import checking
import torch
import torch.nn.functional as F
from checking import CannotRun, Failure, Student, checks_of, generator

HERE = Path(__file__).resolve().parent
PARTS = ("kind", "quantity", "expected", "got", "hint")
TORCH = str(Path(torch.__file__).parent) + os.sep
GUARDED = (torch, torch.Tensor, torch.nn, torch.nn.Module, F, torch.testing, torch.autograd,
           torch.linalg, torch.random, checking, checking.Failure, builtins, math)
FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn",
             "os.spawn"}


# torch asks inspect.stack() who calls it, which reads the files on the stack; students have these
KNOWN = {str(HERE / name) for name in ("worker.py", "checking.py")}


def load(folder):
    """[(check, its module, is it public?)] of an assignment; students have no hidden ones."""
    found = []
    for name in ("public", "hidden"):
        path = HERE / folder / f"{name}.py"
        if path.exists():
            spec = importlib.util.spec_from_file_location(f"{name}_checks", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            linecache.getlines(str(path))           # so that nobody has to open it later
            found += [(check, module, name == "public") for check in checks_of(module)]
    return found


def describe(error, check, tree):
    """A failed check as (kind, quantity, expected, got, hint)."""
    sentence = check.__name__.replace("_", " ")
    if isinstance(error, Failure):
        return ("failed", str(error.quantity), str(error.expected), str(error.got),
                error.hint or check.hint)
    chain, seen = error, set()
    while chain is not None and id(chain) not in seen:      # Triton's interpreter wraps errors
        if isinstance(chain, NotImplementedError):
            return "blank", sentence, "code or an answer of yours", str(chain), check.hint
        seen.add(id(chain))
        chain = chain.__cause__ or chain.__context__
    while type(error).__name__ == "InterpreterError" and error.__cause__:
        error = error.__cause__                             # whose traceback leads into the kernel
    files = ((f, Path(f.filename).resolve()) for f in traceback.extract_tb(error.__traceback__))
    frames = [f for f, path in files if path.is_relative_to(tree)
              and (path.name == "answers.py" or not path.is_relative_to(HERE))]
    if isinstance(error, CannotRun) and not frames:         # a submission cannot excuse itself
        return "cannot run", sentence, "what the check needs", str(error), check.hint
    text = f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
    if isinstance(error, SyntaxError):                      # it names its own file and line
        return "error", sentence, "code that Python can read", text, "write that line again"
    for f in frames[-1:]:
        text += f" ({Path(f.filename).name}, line {f.lineno}, in {f.name})"
    return "error", sentence, "a result", text, check.hint


def snapshot(extra):
    return [(place, dict(vars(place))) for place in (*GUARDED, *extra)]


def replaced(before):
    """What a student's code must leave as it is: the names of the checks, and those of torch and
    Python, as two lists. What torch itself renews when a part is first used is in neither."""
    found = [], []
    for place, names in before:
        for name, value in names.items():
            now = vars(place).get(name)
            if callable(value) and now is not value and not torchs_own(now, name):
                ours = str(getattr(place, "__name__", place)).startswith(
                    ("checking", "public", "hidden", "Failure"))
                found[not ours].append(f"{getattr(place, '__name__', place)}.{name}")
    return found


def torchs_own(function, name):
    code = getattr(function, "__code__", None)
    return code is not None and function.__name__ == name and code.co_filename.startswith(TORCH)


def attempt(check, module, job):
    """Run one check in this process, for every seed: (kind, quantity, expected, got, hint)."""
    tree, sentence = Path(job["tree"]).resolve(), check.__name__.replace("_", " ")
    student = Student(tree, job["folder"], job["watched"])
    before, watching, reached = snapshot([module]), True, []
    guard = job["guard"] and str(Path(job["guard"]).resolve())

    def watch(event, args):
        if not watching or not guard:
            return
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            inside = path.startswith(guard + os.sep) and path not in KNOWN
            if inside and not path.startswith((sys.prefix + os.sep, str(tree) + os.sep)):
                reached.append(path)
                raise PermissionError(f"{path} is not part of the submission")
        elif event in FORBIDDEN:
            reached.append(event)
            raise PermissionError("a submission starts no other program")

    sys.addaudithook(watch)
    outcome = ("passed", "", "", "", "")
    for seed in job["seeds"]:
        g = generator(seed, check.__name__)
        torch.manual_seed(g.initial_seed())
        try:
            check(student, g)
        except BaseException as error:
            watching = False
            outcome = describe(error, check, tree)
            break
    watching = False
    checks, others = replaced(before)
    if others:
        outcome = ("changed torch", sentence, "torch and Python as they are",
                   f"{', '.join(others[:3])} replaced by your code (the check itself: "
                   f"{outcome[0]})", "compute with torch as it is; whoever grades looks at it")
    if checks:
        outcome = ("cheated", sentence, "the checks as they are",
                   f"{', '.join(checks[:3])} replaced by your code", "leave the checks alone")
    if reached:
        outcome = ("cheated", sentence, "code that reads its own tree only",
                   f"{reached[0]} opened or started by your code", "write the function yourself")
    return outcome


def in_a_child(checks, job):
    """The outcomes of some checks in one forked child that may take its time, but no more."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(reader)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(0 if job["quiet"] else 2, 1)        # stdout is the worker's, for its answers
            if job["quiet"]:
                os.dup2(0, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"] + 1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.path.insert(0, job["tree"])
            os.chdir(job["tree"])
            warnings.simplefilter("ignore")
            known, outcomes = set(sys.modules), []
            for check, module in checks:
                outcomes.append(attempt(check, module, job))
                if outcomes[-1][0] == "failed":
                    break
                for name in set(sys.modules) - known:   # the next check imports them anew
                    if str(getattr(sys.modules[name], "__file__", "")).startswith(job["tree"]):
                        del sys.modules[name]
            sys.stdout.flush()
            os.write(writer, json.dumps(outcomes).encode())     # less than a pipe holds
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], 6 * job["seconds"])     # a sleeper uses no CPU
    answer = os.read(reader, 65536) if ready else b""
    os.close(reader)
    if not ready:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if answer:
        return json.loads(answer)
    sentence = checks[0][0].__name__.replace("_", " ")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return [("timeout", sentence, f"an answer within {job['seconds']} s of computing",
                 "none: the check was stopped", "look for a loop that never ends")]
    how = (f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status)
           else f"exit code {os.WEXITSTATUS(status)}")
    return [("crashed", sentence, "a result", f"the end of the process ({how})",
             "no exit() in a module; an index out of range can end the process too")]


def warm_up():
    """Use the parts of torch that rebind names of it when they are first used: no student did."""
    x = torch.ones(2, 3, requires_grad=True)
    torch.func.vmap(torch.func.grad(lambda row: row.square().sum()))(x.detach())
    torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
    torch.optim.SGD([x], lr=0.1).step()
    with contextlib.suppress(RuntimeError):                 # not on every version of Python
        torch.compile(lambda row: row + 1, backend="eager")(x.detach())


def main(folder):
    torch.set_num_threads(1)
    # what the students' modules import: once here, and every child has it
    for name in ("einops", "triton", "matplotlib.figure", "torchvision", "torch._dynamo"):
        with contextlib.suppress(ImportError):
            __import__(name)
    warm_up()
    own = (HERE, HERE.parent, HERE.parent.parent)
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() not in own]
    loaded = load(folder)
    gc.collect()
    gc.freeze()         # a child that collects garbage looks at its own alone
    for line in sys.stdin:
        job = json.loads(line) | {"folder": folder}
        job["tree"] = str(Path(job["tree"]).resolve())
        checks = [(check, module, public) for check, module, public in loaded
                  if public or not job["public"]][::-1 if job["backwards"] else 1]
        results = []
        for group in [checks] if job["together"] else [[c] for c in checks]:
            started = time.monotonic()
            outcomes = in_a_child([c[:2] for c in group], job)
            if outcomes[-1][0] == "timeout":         # an endless loop may stand in the way of all
                job["seconds"] = min(job["seconds"], 3)
            seconds = round(time.monotonic() - started, 2)
            for (check, _, public), outcome in zip(group, outcomes, strict=False):
                results.append({"check": check.__name__, "public": public,
                                "of": check.points * (outcome[0] != "cannot run"),
                                "points": check.points * (outcome[0] == "passed")}
                               | dict(zip(PARTS, outcome, strict=True)) | {"seconds": seconds})
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
