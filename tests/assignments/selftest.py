"""selftest.py -- does the grader deserve trust? `python tests/assignments/course.py self-test`

It is shown right solutions, which must pass, and wrong ones, which must not: nothing written at
all, every line of tests/mutants.py that lies in a blanked body, what students get wrong in ways
that KINDS names, wrong answers to questions, four cheats, loops that never end. Students do not
get this file.
"""
import ast
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from course import (
    HERE,
    ROOT,
    TOOL,
    Worker,
    assignments,
    bodies_of,
    body_span,
    functions,
    grade,
    graded_tree,
    leaks,
    released,
    waits,
    with_bodies,
)

sys.path.insert(0, str(ROOT / "tests"))
from mutants import MUTANTS

LEAST_MUTANTS, LEAST_WRONG, LEAST_OTHERS, GRADING_SECONDS = 15, 15, 5, 60
SEED = 12345        # stands for the one that is drawn at grading

KINDS = {       # of plausible wrong answers, in wrong.py of each assignment
    "detached": "a result has the right value and no gradient, or that of a part only",
    "input changed": "an argument, or what lies in it, has another value after the call",
    "grad wiped": "a .grad that was there before the call is gone, or a flag that decides of it",
    "state kept": "a call depends on an earlier one, changes its result, keeps its tensors, or "
                  "leaves a setting of torch behind",
    "replaced": "an object that others hold, such as an optimizer, gives way to a new one",
    "random state": "numbers are drawn, or the generator is seeded, where nobody asked for it",
    "one size only": "right for the sizes of the example, such as K = 2 or four experts",
    "numerics": "overflow, underflow, cancellation, ties and rounding where the formula is right",
    "dtype": "a result of another dtype, or a step in one that is too narrow",
    "device": "a tensor is made on the CPU whatever the device of the arguments",
    "another definition": "a formula that somebody uses, but not the one that is asked for",
    "left out": "a part of the task, or a case that the docstring names, is forgotten",
}


def main(chosen, seeds, jobs):
    started = time.monotonic()
    # of the assignments, the last takes longest: begun last, it would keep one core idle
    steps = [the_release_is_repeatable_and_tells_nothing,
             *(partial(prove, a, seeds) for a in reversed(chosen)),
             partial(a_full_solution_is_graded_in_time, chosen)]
    try:
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            _, *counts, _ = pool.map(lambda step: step(), steps)
    except Wrong as wrong:
        return f"self-test failed: {wrong}"
    print(f"the grader is right about {len(chosen)} assignments, "
          f"{sum(c[0] for c in counts)} checks, {sum(c[1] for c in counts)} mutants and "
          f"{sum(c[2] for c in counts)} plausible wrong answers "
          f"({time.monotonic() - started:.0f} s, {computing():.0f} s of computing)")


class Wrong(Exception):
    """What the grader got wrong."""


def demand(condition, message):
    if not condition:
        raise Wrong(message)


# --- trees ---

def write(tree, files):
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text, encoding="utf-8")
    return tree


def unsolved():
    """A fresh student tree without its notebooks, {path: text}."""
    return {path: content.decode() for path, content in released().items()
            if not path.startswith("notebooks/")}


def reference_bodies(a):
    return {file: bodies_of((ROOT / file).read_text(encoding="utf-8"), names)
            for file, names in a.blanks.items()}


def solved(a, bodies=None, answers=True):
    """A student tree with assignment `a` solved, and nothing else; bodies {file: {name: lines}}."""
    tree = unsolved()
    for file, written in (reference_bodies(a) if bodies is None else bodies).items():
        tree[file] = with_bodies(tree[file], written)
    if answers and (a.path / "solution.py").exists():
        tree[f"{TOOL}/{a.folder}/answers.py"] = (a.path / "solution.py").read_text(encoding="utf-8")
    return tree


def other_solution(a, path):
    """The reference with the bodies of a file of others/ in it."""
    found, bodies = functions(path.read_text(encoding="utf-8")), reference_bodies(a)
    demand(found, f"{path} solves nothing")
    for name in found:
        file = next((f for f, names in a.blanks.items() if name in names), None)
        demand(file, f"{path.name} has {name}, which assignment {a.number} does not ask for")
        bodies[file] |= bodies_of(path.read_text(encoding="utf-8"), [name])
    return solved(a, bodies)


def mutants_of(a):
    """The mutants of the repository's list that lie in a blanked body: (file, old, new).

    One that names its own test is about more than an assignment asks for.
    """
    found = []
    for file, old, new in (mutant for mutant in MUTANTS if len(mutant) == 3):
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in a.blanks.get(file, {}):
            start, end = body_span(source, functions(source)[name])
            first = source.count("\n", 0, source.index(old))
            if start <= first < end:
                found.append((file, old, new))
    return found


def without(may, name, watched):
    """What a worker watches, when the function `name` may do one thing less."""
    return {file: {f: [m for m in allowed if (f, m) != (name, may)] for f, allowed in names.items()}
            for file, names in watched.items()}


def plausible(a):
    """The plausible wrong answers of its wrong.py: [(kind, file, old, new)]."""
    if not (a.path / "wrong.py").exists():
        return []
    spec = importlib.util.spec_from_file_location("wrong", a.path / "wrong.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kind, file, old, new in module.WRONG:
        demand(kind in KINDS, f"{a.folder}, wrong.py: there is no kind {kind!r}")
        source = (ROOT / file).read_text(encoding="utf-8")
        demand(source.count(old) == 1, f"{a.folder}, wrong.py: {old!r} is not once in {file}")
        first = source.count("\n", 0, source.index(old))
        last = first + old.rstrip("\n").count("\n")
        spans = [body_span(source, functions(source)[name]) for name in a.blanks.get(file, ())]
        demand(any(start <= first and last < end for start, end in spans),
               f"{a.folder}, wrong.py: {old!r} lies in no body that is asked for")
        ast.parse(source.replace(old, new))
    return module.WRONG


def wrong(value):
    """Wrong answers in the place of a right one."""
    if isinstance(value, dict):
        return [value | {key: v} for key in value for v in wrong(value[key])]
    if isinstance(value, list):
        return [[*value[:i], v, *value[i + 1:]] for i in range(len(value))
                for v in wrong(value[i])]
    return [not value] if isinstance(value, bool) else [value + 1]


# --- one assignment ---

def prove(a, seeds):
    started, n = time.monotonic(), sum(a.checks)
    with tempfile.TemporaryDirectory() as folder, Worker(a.folder) as worker:
        folder = Path(folder)

        def run(files, **how):
            """What the grader says of a student tree."""
            graded = {path: text for path, text in files.items()
                      if "/" not in path or path.endswith("answers.py")}
            student = write(folder / "student", graded)         # over the one before
            tree = graded_tree(student, folder / "tree", a.number)
            limit = {"seconds": 100} if how.get("together") else {}     # for all checks at once
            return worker.run(tree, **{"seeds": [0, SEED], "guard": ROOT} | limit | how)

        def passed(results):
            return [r["check"] for r in results if r["kind"] == "passed"]

        def all_pass(results, who):
            bad = [f"{r['check']}: {r}" for r in results if r["kind"] != "passed"]
            demand(not bad, f"{a.folder}: {who} fails {bad[:1]}")
            demand(len(results) == n, f"{a.folder}: {len(results)} checks ran, not {n}")

        # right solutions
        right = solved(a)
        for file in a.blanks:
            tree = graded_tree(write(folder / f"right_{file}", right), folder / f"full_{file}",
                               a.number)
            demand((tree / file).read_bytes() == (ROOT / file).read_bytes(),
                   f"{file} with every blank filled is not {file}")
        many = {"seeds": range(seeds), "seconds": 100 + 50 * seeds}
        results = run(right, **many)
        all_pass(results, f"the reference, {seeds} seeds,")
        others = sorted((a.path / "others").glob("*.py"))
        demand(len(others) >= LEAST_OTHERS, f"{a.folder} has {len(others)} other solutions")
        for path in others:
            all_pass(run(other_solution(a, path), **many, together=True), path.name)
        public = worker.run(write(folder / "public", right), seeds=[0], public=True)
        bad = [r for r in public if r["kind"] != "passed" and not waits(r, a.number)]
        demand(not bad, f"{a.folder}: with other assignments blank, the student is told {bad[:1]}")
        demand(len(public) == a.checks[0], f"{a.folder}: {len(public)} public checks ran")

        # nothing written
        results = run(unsolved())
        demand(len(results) == n and all(r["kind"] == "blank" for r in results),
               f"{a.folder}: on an untouched tree {[r for r in results if r['kind'] != 'blank']}")

        # what a function may do that others may not, the reference does, and the watch sees it
        for name, may in ((f, may) for f, reasons in a.may.items() for may in reasons):
            sees = [r["quantity"] for r in run(right, watched=without(may, name, worker.watched))
                    if r["kind"] == "failed"]
            where = "random state after" if may == "draws" else may.split()[1]
            demand(any(name in quantity and where in quantity for quantity in sees),
                   f"{a.folder}: MAY lets {name} do what it does not do: {may}")

        def noticed(file, old, new, **how):
            """Whether some check says in words that a part is wrong."""
            demand(right[file].count(old) == 1, f"{a.folder}: {old!r} is not once in {file}")
            files = right | {file: right[file].replace(old, new)}
            failed = [r for r in run(files, together=True, **how) if r["kind"] == "failed"]
            for r in failed:
                silent = [key for key in ("quantity", "expected", "got", "hint") if not r[key]]
                demand(not silent, f"{r['check']} fails on {new!r} without {silent}")
            return bool(failed)

        # wrong lines: each is noticed, in words
        mutants = mutants_of(a)
        demand(len(mutants) - len(a.not_asked) >= LEAST_MUTANTS,
               f"{a.folder} has {len(mutants)} mutants, {len(a.not_asked)} of them not asked for")
        survivors = [new for file, old, new in mutants if not noticed(file, old, new)]
        demand(set(survivors) == set(a.not_asked),
               f"{a.folder}: survivors {set(survivors) - set(a.not_asked)}, and killed though "
               f"not asked for {set(a.not_asked) - set(survivors)}")

        # what students get wrong
        plausibles = plausible(a)
        demand(len(plausibles) >= LEAST_WRONG, f"{a.folder} has {len(plausibles)} wrong answers")
        # what finds them stands for the most part at the end of hidden.py
        unseen = [f"{kind}: {new}" for kind, file, old, new in plausibles
                  if not noticed(file, old, new, seeds=[SEED], backwards=True)]
        demand(not unseen, f"{a.folder}: full points for\n" + "\n\n".join(unseen))

        # wrong answers to questions
        wrongs, answers = 0, f"{TOOL}/{a.folder}/answers.py"
        if answers in right:
            values = {}
            exec(right[answers], values)
            for name in (v for v in values if not v.startswith("__")):
                for value in wrong(values[name]):
                    files = right | {answers: f"{right[answers]}\n{name} = {value!r}\n"}
                    wrongs += 1
                    results = run(files, together=True, backwards=True)
                    demand(any(r["kind"] == "failed" for r in results),
                           f"{a.folder}: {name} = {value!r} passes")

        # it is the student's file that is graded
        shout = 'raise RuntimeError("the student\'s own line")'
        for file, bodies in reference_bodies(a).items():
            for name in bodies:
                one = functions((ROOT / file).read_text(encoding="utf-8"))[name].col_offset + 4
                files = right | {file: with_bodies(right[file], {name: [" " * one + shout]})}
                demand(any("the student's own line" in r["got"] for r in run(files, together=True)),
                       f"{a.folder}: nothing notices a raise in {name}")
        files = right | {file: f"{right[file]}\n{shout}\n" for file in (*a.blanks, answers)
                         if file in right}
        demand(not passed(run(files)), f"{a.folder}: checks pass without the student's files")

        cheats(a, run, worker, folder)
        endings(a, run, right, passed)
        honest = right | {f: right[f] + USES_OF_TORCH for f in a.blanks}
        all_pass(run(honest, together=True), "who tries parts of torch that rebind names of it")

    others = ", ".join(p.stem for p in others)
    print(f"{a.folder}: {a.checks[0]} public and {a.checks[1]} hidden checks; the reference passes "
          f"with {seeds} seeds, and so do {others}; {len(mutants) - len(survivors)} of "
          f"{len(mutants)} mutants killed"
          + (f" ({len(survivors)} not asked for)" if survivors else "")
          + f", {len(plausibles)} plausible wrong answers and {wrongs} to questions; 4 cheats; "
          f"{time.monotonic() - started:.0f} s", flush=True)
    return n, len(mutants) - len(survivors), len(plausibles)


USES_OF_TORCH = """
import torch
from torch.utils.checkpoint import checkpoint
_x = torch.ones(2, 3, requires_grad=True)
torch.func.vmap(torch.func.grad(lambda row: row.square().sum()))(_x.detach())
checkpoint(torch.sin, _x, use_reentrant=False).sum().backward()
torch.optim.AdamW([_x]).step()
torch.compile(lambda row: row + 1, backend="eager")(_x)
"""


def cheats(a, run, worker, folder):
    """Four ways to get points without the work, and what they get."""
    blank = unsolved()

    # 1. import the reference
    files = dict(blank)
    for file, names in a.blanks.items():
        files[file] += (f"\nimport importlib.util\n"
                        f"_path = {str(ROOT / file)!r}\n"
                        f"_s = importlib.util.spec_from_file_location('ref', _path)\n"
                        f"_m = importlib.util.module_from_spec(_s)\n_s.loader.exec_module(_m)\n"
                        + "".join(f"{name} = _m.{name}\n" for name in names))
    results = run(files)
    demand(all(r["kind"] in ("cheated", "blank") for r in results)
           and any(r["kind"] == "cheated" for r in results),
           f"{a.folder}: importing the reference gives {[r for r in results if r['points']]}")

    # 2. edit the checks, so that all is well in the student's own tree
    public = f"{TOOL}/{a.folder}/public.py"
    names = [name for name, node in functions(blank[public]).items() if node.decorator_list]
    files = blank | {public: "from checking import check\n" + "".join(
        f"@check()\ndef {name}(student, g):\n    pass\n" for name in names)}
    tree = write(folder / "edited", files)
    own = subprocess.run([sys.executable, "-B", str(tree / TOOL / "course.py"), "check",
                          str(a.number)], capture_output=True, encoding="utf-8")
    demand(own.returncode == 0, f"{a.folder}: the edited checks were to pass: {own.stdout}")
    report = grade(tree, [a.number], SEED)
    demand(report["points"] == 0 and report["edited"] == [public],
           f"{a.folder}: edited checks give {report['points']} points, edited {report['edited']}")

    # 3. hard-code what the public checks expect
    file, name = a.hard_coded
    key = "repr([v.tolist() if hasattr(v, 'tolist') else v for v in args])"
    record = (f"\n_real = {name}\ndef {name}(*args):\n    value = _real(*args)\n"
              f"    with open('table.txt', 'a') as f:\n"
              f"        f.write(repr(({key}, value.tolist(), str(value.dtype))) + '\\n')\n"
              f"    return value\n")
    source = (ROOT / file).read_text(encoding="utf-8")
    tree = write(folder / "recording", solved(a) | {file: source + record})
    worker.run(tree, seeds=[0], public=True)
    table = {k: (v, dtype) for k, v, dtype in map(
        ast.literal_eval, (tree / "table.txt").read_text(encoding="utf-8").splitlines())}
    files = blank | {file: blank[file] + f"\n_table = {table!r}\ndef {name}(*args):\n"
                     f"    value, dtype = _table.get({key}, next(iter(_table.values())))\n"
                     f"    return torch.tensor(value, dtype=eval(dtype))\n"}
    tree = write(folder / "hard_coded", files)
    known = [r for r in worker.run(tree, seeds=[0], public=True) if r["points"]]
    demand(known, f"{a.folder}: looking {name} up was to work where the numbers are known")
    demand(not (got := [r for r in run(files) if r["points"]]),
           f"{a.folder}: looking {name} up gives {got}")

    # 4. make torch agree with everything
    patch = ("\nimport sys\nimport torch\n"
             "torch.equal = torch.allclose = lambda *a, **k: True\n"
             "torch.Tensor.all = lambda *a, **k: True\n"
             "sys.modules['checking'].same = lambda *a, **k: None\n")
    right = solved(a, answers=False)
    results = run(right | {f: right[f] + patch for f in a.blanks})
    demand(not [r for r in results if r["points"]] and any("replaced" in r["got"] for r in results),
           f"{a.folder}: a replaced torch gives {[r for r in results if r['points']]}")
    demand("cheated" in {r["kind"] for r in results}, f"{a.folder}: replaced checks are no cheat")

    # who changes torch alone may have a reason: no points, and somebody looks at it
    patch = "\nimport torch\ntorch.allclose = lambda *a, **k: True\n"
    results = run(right | {f: right[f] + patch for f in a.blanks})
    kinds = {r["kind"] for r in results}
    demand(not [r for r in results if r["points"]] and "changed torch" in kinds
           and "cheated" not in kinds, f"{a.folder}: torch.allclose alone gives {results}")


def endings(a, run, right, passed):
    """A function that never ends, or ends the process: its checks fail, the others are graded."""
    file, name = a.hard_coded
    # the seconds are each check's: those that meet the endless loop use up all of theirs
    for body, kinds, seconds in (("while True: pass", {"timeout"}, 2),
                                 ("import os; os._exit(0)", {"crashed"}, 6),
                                 ("import os; os.abort()", {"crashed"}, 6),
                                 ("import sys; sys.exit(0)", {"error"}, 6)):
        files = right | {file: with_bodies(right[file], {name: ["    " + body]})}
        results = run(files, seconds=seconds)
        ended = [r for r in results if r["kind"] != "passed"]
        demand(len(results) == sum(a.checks) and passed(results) and ended
               and {r["kind"] for r in ended} == kinds,
               f"{a.folder}: with {body!r} in {name} {[(r['check'], r['kind']) for r in ended]}")


# --- all of them ---

def the_release_is_repeatable_and_tells_nothing():
    with tempfile.TemporaryDirectory() as folder:
        trees = []
        for seed in ("1", "2"):
            target = Path(folder) / seed
            subprocess.run([sys.executable, "-B", HERE / "course.py", "release", target],
                           check=True, capture_output=True,
                           env=os.environ | {"PYTHONHASHSEED": seed})
            trees.append({str(p.relative_to(target)): p.read_bytes()
                          for p in sorted(target.rglob("*")) if p.is_file()})
        demand(trees[0] == trees[1], "two releases are not the same to the byte")
        work = {path[5:]: content for path, content in trees[0].items()
                if path.startswith("work/")}
        demand(work == released(), "a released tree is not what was to be released")
    # and the search finds what it is for
    for a in assignments():
        for file, names in a.blanks.items():
            source = (ROOT / file).read_text(encoding="utf-8")
            for name in names:
                body = "\n".join(bodies_of(source, [name])[name])
                renamed = ast.unparse(ast.parse("def f():\n" + body))      # its comments are gone
                cell = {"cell_type": "code", "source": [renamed], "outputs": []}
                for path, text in (("x.py", renamed), ("x.ipynb", json.dumps({"cells": [cell]}))):
                    demand(leaks({path: text.encode()}), f"a copy of {name} in {path} is not found")


def a_full_solution_is_graded_in_time(chosen):
    with tempfile.TemporaryDirectory() as folder:
        files = unsolved()
        for a in chosen:
            mine = solved(a)
            for file, bodies in reference_bodies(a).items():
                files[file] = with_bodies(files[file], bodies)
            if (name := f"{TOOL}/{a.folder}/answers.py") in mine:
                files[name] = mine[name]
        tree, said, started = Path(folder) / "student", Path(folder) / "said", time.monotonic()
        # in a process of its own, whose computing is counted apart from that of the other steps
        grading = subprocess.Popen(
            [sys.executable, "-B", HERE / "course.py", "grade", write(tree, files), "--json", said,
             "--only", *(str(a.number) for a in chosen)], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(grading.pid, 0)
        grading.returncode = os.waitstatus_to_exitcode(status)
        seconds, computed = time.monotonic() - started, used.ru_utime + used.ru_stime
        demand(grading.returncode == 0, "a full solution is not graded: see the message above")
        report = json.loads(said.read_text(encoding="utf-8"))
    demand(report["points"] == report["of"] and not report["edited"],
           f"a full solution gets {report['points']} of {report['of']}")
    # of computing: a machine that does other things as well is no fault of the grader
    demand(computed < GRADING_SECONDS, f"grading took {computed:.0f} s of computing")
    print(f"a full solution gets all {report['of']} points in {seconds:.0f} s, {computed:.0f} s of "
          f"computing")


def computing():
    """Seconds of CPU that the workers and their children have used so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
