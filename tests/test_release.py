"""Does what students get run? Every page in the tree that they hold that week, and its checks.

The pages run as test_notebooks.py runs them, small, but in processes that are forked when torch is
loaded: a kernel for each of them would take minutes.
"""
import ast
import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.notebook

HERE = Path(__file__).parent / "assignments"
sys.path.append(str(HERE))
import course  # noqa: E402

PAGES = sorted(path.name for path in (course.ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOK = {a.notebook.split("/")[1]: a for a in course.manifests()}
WEEKS = {a.weeks[0] for a in course.manifests()}
# the student's README has a table: which assignments' functions does a page need?
TABLE = re.findall(r"^\| `(\S+\.ipynb)` \| ([\d, ]+|none) \|$",
                   (HERE / "student.md").read_text(encoding="utf-8"), flags=re.M)
NEEDS = {page: {int(n) for n in re.findall(r"\d", needs)} for page, needs in TABLE}

RUNNER = '''
import contextlib, io, json, os, sys, traceback
import IPython.display, matplotlib.pyplot, torch, torchvision.transforms.v2, tqdm.auto
with contextlib.suppress(ImportError):
    import triton

def run(page):
    os.chdir(page.rpartition("/")[0])
    sys.path[:] = [p for p in sys.path if p]
    with open(page, encoding="utf-8") as file:
        cells = json.load(file)["cells"]
    printed, names = io.StringIO(), {"__name__": "page"}
    for cell in (c for c in cells if c["cell_type"] == "code"):
        try:
            with contextlib.redirect_stdout(printed):
                exec("".join(cell["source"]), names)
        except Exception as error:
            return {"error": type(error).__name__, "said": str(error), "cell": cell["id"],
                    "where": traceback.format_exc(), "printed": printed.getvalue()}
    return {"error": None, "printed": printed.getvalue()}

for line in sys.stdin:
    back, there = os.pipe()
    if not (child := os.fork()):
        os.write(there, json.dumps(run(line.rstrip())).encode())
        os._exit(0)
    os.close(there)
    with os.fdopen(back) as answer:
        print(answer.read(), flush=True)
    os.waitpid(child, 0)
'''


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """The folder in which a lecturer's one command has written all trees."""
    target = tmp_path_factory.mktemp("release") / "trees"
    done = subprocess.run([sys.executable, "-B", HERE / "course.py", "release", target],
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r".*work: for students to write in.*\n.*class: for class, .*\n",
                        done.stdout)
    return target


@pytest.fixture(scope="module")
def run():
    """A function that runs a page until a cell raises, and tells what happened."""
    small = os.environ | {"SMOKE_TEST": "1", "MPLBACKEND": "agg"}
    with subprocess.Popen([sys.executable, "-B", "-c", RUNNER], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, encoding="utf-8", env=small) as process:
        def run(page):
            process.stdin.write(f"{page}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        yield run
        process.stdin.close()


def solve(work, numbers):
    """Write the reference into the blanks of some assignments, and blanks into the others."""
    for file in {file for a in course.manifests() for file in a.blanks}:
        text = course.released()[file].decode()
        ours = (course.ROOT / file).read_text(encoding="utf-8")
        for a in course.manifests():
            if a.number in numbers:
                text = course.fill(text, ours, a.blanks.get(file, {}))
        (work / file).write_text(text, encoding="utf-8")


def awaited(done):
    """The assignments whose blanks stopped the page, or made one of its checks wait."""
    said = re.findall(r"^not yet: .*\(assignment (\d+),", done["printed"], flags=re.M)
    if done["error"]:
        stop = re.match(r"assignment (\d+), ", done["said"])
        assert stop and done["error"] == "NotImplementedError", done["where"]
        said.append(stop[1])
    return set(map(int, said))


@pytest.mark.parametrize("page", PAGES)
def test_in_class_a_page_runs_before_anything_is_solved_and_prints_no_solution(page, trees, run):
    week = NOTEBOOK[page].weeks[0] if page in NOTEBOOK else min(WEEKS)
    done = run(trees / f"class/week_{week}/notebooks" / page)
    assert not done["error"], done["where"]
    assert not awaited(done)
    assert not course.leaks({page + ".txt": done["printed"].encode()}, course.not_due(week))


@pytest.mark.parametrize("page", PAGES)
def test_at_work_a_page_stops_at_a_blank_alone_and_runs_when_what_its_table_names_is_solved(
        page, trees, run):
    own = {a.number for a in course.manifests() if a.notebook.endswith(page)}
    solved, waits = set(), own or {0}
    while waits:
        solve(trees / "work", solved)
        waits = awaited(run(trees / "work/notebooks" / page))
        assert not waits & solved
        assert waits or solved                  # with nothing solved, every page has to stop
        solved |= waits if own <= solved else own
    assert solved == NEEDS[page]
    assert own <= solved


def test_the_checks_run_at_work_before_and_after_an_assignment_is_solved(trees):
    def check(passed):
        done = subprocess.run([sys.executable, "-B", trees / "work" / course.TOOL / "course.py",
                               "check", "4"], capture_output=True, encoding="utf-8")
        assert (done.returncode, done.stderr) == (int(passed == 0), "")
        assert f"{passed} of {a.checks[0]} public checks passed" in done.stdout
        assert "FAIL" not in done.stdout

    a, = course.assignments([4])
    answers = trees / "work" / course.TOOL / a.folder / "answers.py"
    solve(trees / "work", set())
    check(passed=0)
    solve(trees / "work", {4})
    answers.write_bytes((a.path / "solution.py").read_bytes())
    check(passed=a.checks[0])


def test_what_is_packed_is_the_module_and_what_is_due_can_be_read(trees):
    for week in WEEKS:
        tree, closed = trees / f"class/week_{week}", course.not_due(week)
        packed = {file for a in closed for file in a.blanks}
        for path in course.ROOT.glob("*.py"):
            source, here = path.read_text(encoding="utf-8"), (tree / path.name).read_text("utf-8")
            if path.name in packed:
                text = re.search(r'"""\n([^"]*)"""\)\n$', here)[1]
                assert base64.b85decode("".join(text.split())).decode() == source
                here = (tree / "to_read" / path.name).read_text(encoding="utf-8")
                assert here.count("\n") == source.count("\n")   # so tracebacks show the right line
            mine, true = course.functions(here), course.functions(source)
            hidden = {name for a in closed for name in a.blanks.get(path.name, {})}
            assert {n for n in true if ast.dump(true[n]) != ast.dump(mine[n])} == hidden
    route = course.bodies_of((course.ROOT / "router.py").read_text("utf-8"), ["TopKRouter.route"])
    for week, due in ((1, False), (2, True)):
        text = (trees / f"class/week_{week}/to_read/router.py").read_text(encoding="utf-8")
        assert ("\n".join(route["TopKRouter.route"]) in text) is due


def test_in_class_there_are_the_pages_up_to_that_week_without_outputs(trees):
    for week in WEEKS:
        pages = (trees / f"class/week_{week}/notebooks").glob("*.ipynb")
        cells = {page.name: json.loads(page.read_text(encoding="utf-8"))["cells"] for page in pages}
        assert set(cells) == {p for p in PAGES if p not in NOTEBOOK or NOTEBOOK[p].weeks[0] <= week}
        assert not any(cell.get("outputs") for page in cells.values() for cell in page)


def test_what_is_not_asked_is_there_for_all_to_read():
    asked = course.assignments([1, 3])
    for tree in (course.work_tree([1, 3]), course.class_tree(1, [1, 3])):
        assert tree["moe.py"] == (course.ROOT / "moe.py").read_bytes()
        assert not any(re.search("/[245]_", path) for path in tree)
        modules = {path: content for path, content in tree.items() if "/" not in path}
        assert not course.leaks(modules, asked)
        assert course.leaks(modules)                # of the others
    assert b"assignment 1, TopKRouter.route" in course.work_tree([1, 3])["router.py"]
    assert b"assignment 2, within_capacity" not in course.work_tree([1, 3])["router.py"]


def test_the_students_readme_has_a_line_for_every_page():
    assert sorted(NEEDS) == PAGES
