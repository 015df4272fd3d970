"""course.py -- how do the modules become assignments, and a student's work a grade?

    python tests/assignments/course.py release DIR                  # lecturer: write two trees
    python tests/assignments/course.py check [1 2 ...]              # student: the public checks
    python tests/assignments/course.py grade DIR --json report.json # lecturer: all checks, points
    python tests/assignments/course.py grade CLASS --csv marks.csv  # of a folder of trees or .zips
    python tests/assignments/course.py self-test [--seeds N]        # does the grader deserve trust?

The modules hold no markers. A folder N_name/ beside this file is assignment N: its assignment.py
names functions of the real modules, and exactly their bodies are blanked in the student tree.
README.md says how to teach with it and how to add an assignment.
"""
import argparse
import ast
import base64
import contextlib
import csv
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOOL = "tests/assignments"
SHIPPED = ("course.py", "checking.py", "worker.py")   # the tools that students get
SECONDS = 10        # of computing for one check; the slowest of the reference takes a tenth


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("release", help="write the trees that students get")
    p.add_argument("dir", type=Path)
    p.add_argument("--only", type=int, nargs="+", help="assignments that are asked; default: all")
    p = commands.add_parser("check", help="run the public checks, inside a student tree")
    p.add_argument("only", type=int, nargs="*", help="numbers of assignments; default: all")
    p = commands.add_parser("grade", help="run all checks on a student tree, or on a class of them")
    p.add_argument("dir", type=Path, help="a tree, a .zip of one, or with --csv a folder of these")
    p.add_argument("--csv", type=Path, help="grade each entry of DIR: a row per student")
    p.add_argument("--gradescope", type=Path, help="also write Gradescope's results.json here")
    p.add_argument("--only", type=int, nargs="+", help="numbers of assignments; default: all")
    p.add_argument("--json", type=Path, help="also write the report here")
    p.add_argument("--seed", type=int, help="of the checks' inputs; default: drawn, and reported")
    p = commands.add_parser("self-test", help="prove that the grader notices what it must")
    p.add_argument("--only", type=int, nargs="+", help="numbers of assignments; default: all")
    p.add_argument("--seeds", type=int, default=5, help="how often the reference must pass")
    p.add_argument("--jobs", type=int, default=2, help="assignments at a time")
    # as checkpoint.printable, whose file would import torch and may be a student's
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    args = parser.parse_args()
    if not hasattr(os, "fork"):
        return "this system cannot fork: use Linux, macOS or the Windows Subsystem for Linux"
    student = not (HERE / "selftest.py").exists()
    if student and args.command != "check":
        return f"{ROOT} is a student tree: its one command is `course.py check`"
    if args.command == "release":
        return release(args.dir, args.only)
    if args.command == "check":
        return check(args.only)
    if args.command == "grade":
        if args.csv:
            return grade_class(args.dir, args.csv, args.only, args.seed)
        with tree_in(args.dir) as tree:
            return show(grade(tree, args.only, args.seed), args.json, args.gradescope)
    import selftest
    return selftest.main(assignments(args.only), args.seeds, args.jobs)


# --- an assignment is a folder ---

def folders(only=None):
    """The assignments' folders, by number."""
    found = {int(p.name.split("_")[0]): p for p in sorted(HERE.glob("[0-9]_*")) if p.is_dir()}
    if unknown := set(only or ()) - set(found):
        sys.exit(f"there is no assignment {min(unknown)}: choose from {', '.join(map(str, found))}")
    return {n: p for n, p in found.items() if not only or n in only}


def assignments(only=None):
    """The manifests: what assignment.py says, its number and its folder."""
    return [a for a in manifests() if a.number in folders(only)]


@cache
def manifests():
    found = []
    for number, path in folders().items():
        spec = importlib.util.spec_from_file_location(path.name, path / "assignment.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        manifest = {k.lower(): v for k, v in vars(module).items() if k.isupper()}
        place = {"number": number, "folder": path.name, "path": path}
        found.append(SimpleNamespace(**{"not_asked": {}, "may": {}} | manifest | place))
    return found


# --- a body is some lines of a file ---

@cache
def functions(source):
    """{"name" or "Class.name": its node} of a module."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}": f for f in node.body
                      if isinstance(f, ast.FunctionDef)}
    return found


def statements(node):
    """A function's statements without its docstring."""
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


def body_span(source, node):
    """(start, end), the lines [start:end] after a function's signature and docstring."""
    lines = source.split("\n")
    if ast.get_docstring(node) is not None:
        start = node.body[0].end_lineno
    else:
        # a comment above the first statement belongs to the body: it may give it away
        before = range(node.lineno - 1, node.body[0].lineno - 1)
        start = 1 + max(i for i in before if re.sub(r"#.*", "", lines[i]).rstrip().endswith(":"))
    return start, node.end_lineno


def with_bodies(source, bodies):
    """A module's source with the bodies {name: lines} in place of its own."""
    nodes, lines = functions(source), source.split("\n")
    spans = {name: body_span(source, nodes[name]) for name in bodies if name in nodes}
    for name, (start, end) in sorted(spans.items(), key=lambda item: -item[1][0]):
        lines[start:end] = bodies[name]
    return "\n".join(lines)


def bodies_of(source, names=None):
    """{name: the lines of its body}, to put into another module."""
    nodes, lines = functions(source), source.split("\n")
    return {name: lines[slice(*body_span(source, node))] for name, node in nodes.items()
            if names is None or name in names}


def is_blank(node):
    """Whether nobody has written this function yet."""
    body = statements(node)
    return (len(body) == 1 and isinstance(body[0], ast.Raise)
            and "NotImplementedError" in ast.dump(body[0]))


def blank(assignment, name, hint, indent):
    """The lines that stand in a blanked body."""
    words = textwrap.wrap(f"assignment {assignment.number}, {name}: {hint}", 80)
    lines = ["raise NotImplementedError(", *(f'    "{w} "' for w in words[:-1]),
             f'    "{words[-1]}")']
    return [" " * indent + line for line in lines]


# --- release ---

# What is released is for students: work/ to write in, and for each week class/week_N/, whose pages
# run before anything is written.

def work_tree(only=None):
    """The tree that a student works in, {path: bytes}: what is asked for is blank."""
    tree, asked = common("student.md"), assignments(only)
    for file, names in hidden_bodies(asked).items():
        source = (ROOT / file).read_text(encoding="utf-8")
        for a, name, hint in names:
            node = functions(source)[name]
            source = with_bodies(source, {name: blank(a, name, hint, node.col_offset + 4)})
        tree[file] = source.encode()
    for a in asked:
        for name in ("handout.md", "answers.py", "public.py"):
            if (a.path / name).exists():
                tree[f"{TOOL}/{a.folder}/{name}"] = (a.path / name).read_bytes()
        hidden = [name.replace("_", " ") for name, node in functions(
            (a.path / "hidden.py").read_text(encoding="utf-8")).items() if is_check(node)]
        tree[f"{TOOL}/{a.folder}/hidden.txt"] = ("\n".join(hidden) + "\n").encode()
        tree[f"{TOOL}/{a.folder}/watched.json"] = (
            json.dumps(watched(a), indent=1) + "\n").encode()
    for name in SHIPPED:
        tree[f"{TOOL}/{name}"] = (HERE / name).read_bytes()
    return {path: without_telling_outputs(content, asked) if path.endswith(".ipynb") else content
            for path, content in tree.items()}


@cache
def released():
    """The tree that a student works in when every assignment is asked, {path: bytes}."""
    return work_tree()


def class_tree(week, only=None):
    """The tree that is used in class in one week, {path: bytes}: its pages, and those of the weeks
    before, over complete modules; what is not due yet is packed."""
    tree, closed = common("class.md"), not_due(week, only)
    tree["packed.py"] = (HERE / "packed.py").read_bytes()
    for file, names in hidden_bodies(closed).items():
        tree[file], tree[f"to_read/{file}"] = packed_module(file, names)
    later = {a.notebook for a in manifests() if a.weeks[0] > week}
    return {path: without_outputs(content) if path.endswith(".ipynb") else content
            for path, content in tree.items() if path not in later}


def not_due(week, only=None):
    """The assignments whose solutions may not be read in a week."""
    return [a for a in assignments(only) if a.weeks[1] > week]


def common(readme):
    """What all trees have: the modules, and the pages with all that they import and read."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "notebooks").rglob("*"),
             *(ROOT / name for name in ("requirements.txt", "pyproject.toml", "LICENSE"))]
    names = {path: str(path.relative_to(ROOT)) for path in sorted(paths) if path.is_file()}
    tree = {name: path.read_bytes() for path, name in names.items()
            if not re.search(r"/[._]", name)}
    return tree | {"README.md": (HERE / readme).read_bytes()}


def watched(a):
    """{file: {function: what it may do that others may not}} of an assignment, for the watch."""
    return {file: {name: sorted(a.may.get(name, ())) for name in names}
            for file, names in a.blanks.items()}


def hidden_bodies(chosen):
    """{file: [(assignment, function, hint)]} of what some assignments ask for."""
    found = {}
    for a in chosen:
        for file, names in a.blanks.items():
            found[file] = found.get(file, []) + [(a, *item) for item in names.items()]
    return found


def packed_module(file, names):
    """A module that runs and cannot be read, and its text without the bodies `names`, line by line.

    `names` is as `hidden_bodies` has it.
    """
    source = (ROOT / file).read_text(encoding="utf-8")
    asked, bodies = sorted({a.number for a, _, _ in names}), {}
    for a, name, _ in names:
        node = functions(source)[name]
        start, end = body_span(source, node)
        note = f"...     # assignment {a.number} asks for {name}"
        bodies[name] = [" " * (node.col_offset + 4) + note, *[""] * (end - start - 1)]
    packed = [
        f'"""{file} as it runs, packed, for of its parts some belong to assignment '
        f'{" and ".join(map(str, asked))}.',
        "", f"Its text without them is in to_read/{file}.", '"""',
        "from packed import run", "", 'run(globals(), """',
        *textwrap.wrap(base64.b85encode(source.encode()).decode(), 98, break_on_hyphens=False),
        '""")', ""]
    return "\n".join(packed).encode(), with_bodies(source, bodies).encode()


def without_outputs(content):
    """A notebook as if nobody had run it."""
    notebook = json.loads(content)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()


def without_telling_outputs(content, asked):
    """A notebook without the outputs that print a blanked body; in a student's hands it prints
    the student's own."""
    notebook = json.loads(content)
    told = [cell for cell in notebook["cells"] if cell.get("outputs") and leaks(
        {"cell.ipynb": json.dumps({"cells": [cell | {"source": []}]}).encode()}, asked)]
    for cell in told:
        cell["outputs"] = []
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode() if told else content


def is_check(node):
    """Whether a function of public.py or hidden.py has the decorator @check."""
    return any(isinstance(d, ast.Call) and getattr(d.func, "id", None) == "check"
               for d in node.decorator_list)


def release(target, only=None):
    if target.exists() and any(target.iterdir()):
        return f"{target} is not empty: name a folder that does not exist yet"
    weeks = sorted({a.weeks[0] for a in manifests()})
    trees = {"work": (work_tree(only), assignments(only))}
    trees |= {f"class/week_{n}": (class_tree(n, only), not_due(n, only)) for n in weeks}
    found = [f"{name}: {leak}" for name, (tree, secret) in trees.items()
             for leak in leaks(tree, secret)]
    if found:
        return "nothing was written, for students would find:\n" + "\n".join(found)
    for name, (tree, _) in trees.items():
        for path, content in tree.items():
            (target / name / path).parent.mkdir(parents=True, exist_ok=True)
            (target / name / path).write_bytes(content)
    asked = ", ".join(str(a.number) for a in assignments(only))
    print(f"{target / 'work'}: for students to write in, with the blanks of assignments {asked}\n"
          f"{target / 'class'}: for class, a folder for each week, whose pages run as they are")


def leaks(tree, asked=None):
    """Where a tree {path: bytes} shows a body that some assignments ask for (default: all of
    them): its syntax, or a telling line."""
    found, hidden = [], secrets(tuple(a.number for a in (manifests() if asked is None else asked)))
    for path, content in tree.items():
        if b"\0" in content:         # weights and pictures
            continue
        text = content.decode(errors="replace")
        blocks, values = dumps(path, text) if path.endswith((".py", ".ipynb")) else ([], set())
        shown = as_text(path, text)
        for name, body, value, lines in hidden:
            if any(block[i:i + len(body)] == body for block in blocks
                   for i in range(len(block) - len(body) + 1)):
                found.append(f"{path} has the body of {name}")
            if value in values:
                found.append(f"{path} has the expression that {name} returns")
            found += [f"{path} has a line of {name}: {line}" for line in lines if line in shown]
    return found


@cache
def secrets(numbers):
    """Each body that the assignments `numbers` ask for: (its name, its statements, what it returns
    if that is all, its lines).

    Lines of more than 40 characters that no file has outside these bodies.
    """
    sources, found = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}, []
    asked = {file: {name for a in manifests() if a.number in numbers
                    for name in a.blanks.get(file, ())} for file in sources}
    public = "".join(with_bodies(s, {n: [] for n in asked[f]}) for f, s in sources.items())
    for file, names in asked.items():
        for name in names:
            body = statements(functions(sources[file])[name])
            lines = map(str.strip, bodies_of(sources[file])[name])
            value = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
            found.append((name, [ast.dump(s) for s in body], value and ast.dump(value),
                          [line for line in lines if len(line) > 40 and line not in public]))
    return found


def as_text(path, text):
    """A file as its reader sees it: of a notebook, the cells and what they printed."""
    if not path.endswith(".ipynb"):
        return text
    return "\n".join("".join(cell["source"]) + json.dumps(cell.get("outputs", []))
                     for cell in json.loads(text)["cells"])


def dumps(path, text):
    """(every block of statements, every expression) of a file, as dumps of syntax trees."""
    if path.endswith(".ipynb"):
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]
                 if cell["cell_type"] == "code"]
        parts = [re.sub(r"^(\s*)[%!].*", r"\1pass", cell, flags=re.M) for cell in cells]
    else:
        parts = [text]
    blocks, values = [], set()
    for part in parts:
        for node in ast.walk(ast.parse(part)):
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if isinstance(block, list):
                    blocks.append([ast.dump(s) for s in block])
            if isinstance(node, ast.expr):
                values.add(ast.dump(node))
    return blocks, values


# --- running checks ---

class Worker:
    """A process that runs one assignment's checks on as many trees as it is given."""

    def __init__(self, folder):
        env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
                            "PYTHONIOENCODING": "utf-8:replace"}
        self.folder, listed = folder, HERE / folder / "watched.json"    # in a student's tree
        self.watched = (json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else
                        watched(next(a for a in manifests() if a.folder == folder)))
        self.process = subprocess.Popen([sys.executable, "-B", str(HERE / "worker.py"), folder],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        encoding="utf-8", env=env)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def run(self, tree, *, seeds, guard=None, public=False, seconds=SECONDS, quiet=True,
            together=False, backwards=False, watched=None):
        job = {"tree": str(tree), "public": public, "seeds": list(seeds), "seconds": seconds,
               "guard": guard and str(guard), "quiet": quiet, "together": together,
               "backwards": backwards, "watched": watched or self.watched}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the checks of {self.folder} did not run: see the message above")
        return json.loads(answer)


# --- check: what a student sees ---

def check(only):
    complete = True
    print(f"Python {platform.python_version()}, torch {version('torch')}")
    for number, path in folders(only).items():
        print(f"\nAssignment {number}, {path.name.split('_', 1)[1]}")
        with Worker(path.name) as worker:
            results = worker.run(ROOT, seeds=[0], public=True, quiet=False)
        waiting = [r for r in results if waits(r, number)]
        for r in results:
            marks = {"passed": "ok   ", "blank": "to do", "cannot run": "n/a  "}
            mark = "later" if r in waiting else marks.get(r["kind"], "FAIL ")
            print(f"  {mark} {r['check'].replace('_', ' ')}")
            if r in waiting:
                print(f"          needs {r['got'].split(':')[0]}, which is still blank here; "
                      f"the grader fills it in")
            elif r["kind"] != "passed":
                print(message(r))
        passed = sum(r["kind"] == "passed" for r in results)
        complete &= passed == len(results)
        print(f"  {passed} of {len(results)} public checks passed", end="")
        print(f", {len(waiting)} wait for other assignments" if waiting else "", end="")
        here = sum(r["kind"] == "cannot run" for r in results)
        print(f", {here} cannot run here" if here else "", end="")
        if (path / "hidden.py").exists():
            print(".")
            continue
        hidden = (path / "hidden.txt").read_text(encoding="utf-8").split("\n")[:-1]
        print(f"; {len(hidden)} hidden run at grading, on other random numbers. They cover:")
        print("\n".join(f"    - {sentence}" for sentence in hidden))
    return int(not complete)


def waits(result, number):
    """Whether a check stopped at a blank of another assignment."""
    found = re.match(r"assignment (\d+),", result["got"]) if result["kind"] == "blank" else None
    return bool(found) and int(found[1]) != number


def message(r):
    """Why a check did not pass: the four parts of a failure, or one line where nothing ran."""
    plain = {"blank": "not written", "cannot run": "not run"}
    if r["kind"] in plain:
        return f"          {plain[r['kind']]}: {r['got']}"
    return textwrap.indent("\n".join(f"{part:>8}: {r[key]}" for part, key in (
        ("quantity", "quantity"), ("expected", "expected"), ("got", "got"), ("hint", "hint"))
        if r[key]), "          ")


# --- grade ---

@contextlib.contextmanager
def tree_in(given, largest=200e6):
    """The student tree in a folder, at most two folders deeper, or in a .zip; ValueError where
    there is not exactly one."""
    with tempfile.TemporaryDirectory() as folder:
        root = given
        if given.is_file() and given.suffix == ".zip":
            try:
                with zipfile.ZipFile(given) as packed:
                    names = packed.namelist()
                    size = sum(info.file_size for info in packed.infolist())
                    if size > largest or any(
                            Path(n).is_absolute() or ".." in Path(n).parts for n in names):
                        raise ValueError(f"{given} is not unpacked: it holds {size / 1e6:,.0f} MB, "
                                         f"or names that lie outside of it")
                    packed.extractall(folder)
            except zipfile.BadZipFile:
                raise ValueError(f"{given} is damaged, or no .zip") from None
            root = Path(folder)
        found = [p.parent.parent for depth in ("", "*/", "*/*/") for p in root.glob(depth + TOOL)]
        if len(found) != 1:
            raise ValueError(f"{given} is not a student tree: it has no {TOOL}/" if not found else
                             f"{given} holds {len(found)} student trees: name one, or give --csv")
        yield found[0]


def graded_tree(source, target, number, replaced=None):
    """Copy what is graded of a student tree. Blanks of *other* assignments become the reference,
    and so does a file of theirs that Python cannot read, whose name is added to `replaced`."""
    target.mkdir(parents=True, exist_ok=True)
    its = next(a for a in assignments() if a.number == number).blanks
    for path in sorted(source.glob("*.py")):
        text = path.read_text(errors="replace", encoding="utf-8")
        if path.name not in its and (ROOT / path.name).exists() and not readable(text):
            text = (ROOT / path.name).read_text(encoding="utf-8")
            if replaced is not None:
                replaced.append(path.name)
        for a in assignments():
            if a.number != number and path.name in a.blanks:
                ours = (ROOT / path.name).read_text(encoding="utf-8")
                text = fill(text, ours, a.blanks[path.name])
        (target / path.name).write_text(text, encoding="utf-8")
    folder = folders()[number].name
    answers = source / TOOL / folder / "answers.py"
    if answers.exists():
        (target / TOOL / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(answers, target / TOOL / folder / "answers.py")
    return target


def readable(text):
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def fill(text, reference, names):
    """Put the reference's bodies where the student's are blank, and nowhere else."""
    try:
        nodes = functions(text)
    except SyntaxError:
        return text                      # importing it will say where the error is
    blanks = [name for name in names if name in nodes and is_blank(nodes[name])]
    return with_bodies(text, bodies_of(reference, blanks)) if blanks else text


def grade(student, only=None, seed=None):
    """The report of a student tree: points, and the result of every check."""
    seed = random.randrange(2**31) if seed is None else seed
    edited = [path for path, content in work_tree(only).items()
              if path.startswith(TOOL) and not path.endswith("answers.py")
              and (not (student / path).exists() or (student / path).read_bytes() != content)]

    def one(a):
        with tempfile.TemporaryDirectory() as folder, Worker(a.folder) as worker:
            replaced = []
            tree = graded_tree(student, Path(folder) / "tree", a.number, replaced)
            results = worker.run(tree, seeds=[0, seed], guard=ROOT)
        if len(results) != sum(a.checks):
            sys.exit(f"{a.folder} ran {len(results)} checks; its assignment.py says {a.checks}")
        return {"assignment": a.folder, "points": sum(r["points"] for r in results),
                "of": sum(r["of"] for r in results), "checks": results, "replaced": replaced}

    with ThreadPoolExecutor(max_workers=2) as pool:
        parts = list(pool.map(one, assignments(only)))
    return {"student": student.resolve().name, "seed": seed, "python": platform.python_version(),
            "torch": version("torch"), "edited": edited, "points": sum(p["points"] for p in parts),
            "of": sum(p["of"] for p in parts), "assignments": parts}


def grade_class(folder, path, only, seed):
    """Grade every tree and .zip in a folder into a .csv, and say how many passed each check."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of student trees")
    seed = random.randrange(2**31) if seed is None else seed    # the same questions for all
    rows, passed, graded = [], {}, 0
    for entry in sorted(p for p in folder.iterdir() if p.is_dir() or p.suffix == ".zip"):
        row = {"student": entry.stem if entry.is_file() else entry.name, "note": ""}
        try:
            with tree_in(entry) as tree:
                report = grade(tree, only, seed)
        except ValueError as error:
            row["note"] = str(error)
        else:
            graded += 1
            row |= {"points": report["points"], "of": report["of"]}
            for part in report["assignments"]:
                row["note"] += "".join(f"{name} cannot be read. " for name in part["replaced"])
                for r in part["checks"]:
                    name = f"{part['assignment'].split('_')[0]}: {r['check'].replace('_', ' ')}"
                    row[name] = r["points"]
                    passed[name] = passed.get(name, 0) + (r["kind"] == "passed")
                    if r["kind"] in ("cheated", "changed torch"):
                        row["note"] += f"{name}: {r['kind']}. "
        rows.append(row)
        print(f"{row['student']}: {row.get('points', '-')} of {row.get('of', '-')}. {row['note']}",
              flush=True)
    columns = ["student", "points", "of", "note", *passed]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{path}: {graded} of {len(rows)} graded (seed {seed}). Who passed what:")
    for name, n in sorted(passed.items(), key=lambda item: item[1]):
        print(f"  {n:4d} of {graded}  {name}")


def gradescope(report):
    """Gradescope's results.json: a test per check; students see the public ones at once."""
    tests = [{"name": f"{part['assignment']}: {r['check'].replace('_', ' ')}",
              "score": r["points"], "max_score": r["of"],
              "output": "" if r["kind"] == "passed" else message(r),
              "visibility": "visible" if r["public"] else "after_published"}
             for part in report["assignments"] for r in part["checks"]]
    return {"score": report["points"], "tests": tests}


def show(report, path, for_gradescope=None):
    for part in report["assignments"]:
        print(f"\n{part['assignment']}: {part['points']} of {part['of']} points")
        for name in part["replaced"]:
            print(f"  {name} cannot be read by Python; it is no part of this assignment, and the "
                  f"reference's was taken")
        for r in part["checks"]:
            print(f"  {r['points']}/{r['of']}  {'public' if r['public'] else 'hidden'}  "
                  f"{r['check'].replace('_', ' ')}")
            if r["kind"] != "passed":
                print(message(r))
    for name in report["edited"]:
        print(f"\nunlike the repository's, and not used here: {name}")
    print(f"\n{report['points']} of {report['of']} points (seed {report['seed']}, "
          f"torch {report['torch']})")
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if for_gradescope:
        for_gradescope.write_text(json.dumps(gradescope(report), indent=1) + "\n",
                                  encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as wrong:
        sys.exit(str(wrong))
