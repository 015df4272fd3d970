"""Does a variant ask for something else everywhere, and is the published solution wrong there?

Each switch is tested alone, and the draws of 20 seeds. A variant's own self-test and its pages are
the long form:

    for seed in $(seq 20); do python tests/assignments/course.py self-test --variant $seed; done
    python tests/assignments/variants.py 7 DIR && python -m pytest DIR/tests/test_release.py
"""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "assignments"
sys.path.append(str(HERE))
import course  # noqa: E402
import selftest  # noqa: E402
import variants  # noqa: E402

SEEDS = range(1, 21)
every_switch = pytest.mark.parametrize("switch", variants.SWITCHES,
                                       ids=[f"{s.number} {s.name}" for s in variants.SWITCHES])

# what the published solution is told first, and words of the published definition that students of
# the variant must not find
TOLD = {
    "ties": ("equal logits", "lowest index"),
    "first choices": ("balance_loss", r"share of the choices|f counts all|from counting"),
    "z-loss": ("z_loss", "Mean squared log-sum-exp"),
    "queue": ("served", "first choices (before|of all)|choice 0 of all"),
    "rounding": ("choices served", r"ceil\((cap|factor)|rounded.up|round up|55\.0"),
    "plan": ("order", "stably, and|sort chosen"),
    "mean over blocks": ("over three blocks", "summed|two.sums|a sum over"),
    "depth": ("blocks for a teacher of 8 blocks", "nearest, but|at least 1"),
    "never": ("last_fluctuation", "counted from 1|epoch, from 1|[ ,;] 0 if none| else 0"),
    "class token": ("domains", "mean over its tokens|mean.token|over an image's tokens"),
    "pairs": ("three experts", r"1/K|mean of all|MSE / 4|four.times|quarter"),
    "equal images": ("narrow_vision", "add up over the images|counts.more|counts little"),
    "bound": ("number of tiles", r"rows\) \+ E(?! - 1)|one too many"),
    "sorted shares": ("DGATES|dgates", r"columns\), in the row of the choice|WIDTH\), \(tiles"),
}

# one process imports torch and Triton, and forks as worker.py for each variant
RUNNER = """
import contextlib, io, json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import worker
for name in ("einops", "triton", "matplotlib.figure", "torchvision", "torch._dynamo"):
    with contextlib.suppress(ImportError):
        __import__(name)
worker.warm_up()
for line in sys.stdin:
    if not (child := os.fork()):
        worker.HERE, sys.stdin = Path(json.loads(line)["tool"]), io.StringIO(line)
        worker.main(json.loads(line)["folder"])
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("[]", flush=True)         # its traceback is on stderr
"""


@pytest.fixture(scope="module")
def run():
    """A function that runs the checks of a variant in turn, up to the first that fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    with subprocess.Popen([sys.executable, "-B", "-c", RUNNER, HERE], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, encoding="utf-8", env=env) as process:
        def run(tool, tree, a):
            job = {"tool": str(tool), "tree": str(tree), "folder": a.folder, "public": False,
                   "seeds": [0], "seconds": 100, "guard": None, "quiet": True, "together": True,
                   "backwards": False, "watched": course.watched(a)}
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        yield run
        process.stdin.close()


def solved(a, texts, bodies, answers):
    """A tree {path: text} with assignment `a` solved by the bodies of some files and an answers.py.
    """
    tree = {path.name: texts.get(path.name) or path.read_text(encoding="utf-8")
            for path in course.ROOT.glob("*.py")}
    tree |= {file: course.with_bodies(tree[file], course.bodies_of(bodies[file], names))
             for file, names in a.blanks.items()}
    return tree | {f"{course.TOOL}/{a.folder}/answers.py": answers}


@every_switch
def test_its_own_solution_gets_all_points_and_the_published_one_is_told_what_is_wrong(
        switch, run, tmp_path):
    a, = course.assignments([switch.number])
    texts = variants.varied([switch])
    published = {file: variants.original(file) for file in a.blanks}
    solution = f"{course.TOOL}/{a.folder}/solution.py"
    for name in ("public.py", "hidden.py"):
        path = f"{course.TOOL}/{a.folder}/{name}"
        selftest.write(tmp_path, {path: texts.get(path) or variants.original(path)})

    def results(who, bodies, answers):
        tree = selftest.write(tmp_path / who, solved(a, texts, bodies, answers))
        return run(tmp_path / course.TOOL, tree, a)

    own = results("own", published | texts, texts.get(solution) or variants.original(solution))
    assert not [r for r in own if r["kind"] != "passed"]
    assert len(own) == sum(a.checks)
    failed = results("published", published, variants.original(solution))[-1]
    assert failed["kind"] == "failed" and re.search(TOLD[switch.name][0], failed["quantity"])
    assert all(failed[part] for part in ("expected", "got", "hint"))


def for_students(a, texts):
    """What a student who writes assignment `a` reads of it, in one text."""
    def text(path):
        return texts.get(path) or variants.original(path)
    files = [f"{course.TOOL}/{a.folder}/{name}" for name in ("handout.md", "public.py",
                                                              "answers.py")]
    hidden = course.functions(text(f"{course.TOOL}/{a.folder}/hidden.py"))
    modules = [course.with_bodies(text(file), {name: [] for other in course.manifests()
                                               for name in other.blanks.get(file, ())})
               for file in a.blanks]
    return "\n".join([*map(text, files), *hidden, *modules])


@every_switch
def test_what_students_read_says_the_new_definition_and_nowhere_the_old_one(switch):
    a, = course.assignments([switch.number])
    texts = variants.varied([switch])
    assert f"{course.TOOL}/{a.folder}/handout.md" in texts
    assert re.search(TOLD[switch.name][1], for_students(a, {}))
    assert not re.findall(TOLD[switch.name][1], for_students(a, texts))


def test_the_edits_of_twenty_seeds_fit_and_each_assignment_is_varied():
    draws = {seed: variants.drawn(seed) for seed in SEEDS}
    for on in (*draws.values(), variants.SWITCHES, variants.SWITCHES[::-1]):
        variants.varied(on)             # each edit finds its text once, or raises
    names = {tuple(s.name for s in on) for on in draws.values()}
    assert len(names) >= 18
    assert {name for on in names for name in on} == {s.name for s in variants.SWITCHES} == set(TOLD)
    for on in draws.values():
        assert {s.number for s in on} == {a.number for a in course.manifests()}
    # a seed means the same next year, and with every Python
    assert [s.name for s in draws[13]] == ["ties", "queue", "depth", "pairs", "bound"]
    broken = variants.switch(1, "broken", "", {"router.py": [("no such line", "")]})
    with pytest.raises(ValueError, match=r"broken: router.py has 0 times 'no such line'"):
        variants.varied([broken])


def test_one_command_releases_a_variant_and_the_same_seed_grades_it(tmp_path):
    def call(*words):
        done = subprocess.run([sys.executable, "-B", HERE / "course.py", *words, "--variant", "13"],
                              capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("variant 13:\n  1  Equal logits go to the highest index.\n")

    call("release", tmp_path / "trees")
    work, texts = tmp_path / "trees/work", variants.varied(variants.drawn(13))
    files = {str(p.relative_to(work)): p.read_bytes() for p in work.rglob("*") if p.is_file()}
    assert set(files) == set(course.released())
    same = {path for path, content in course.released().items() if files[path] == content}
    assert set(files) - same == {"README.md"} | set(texts) & set(files)
    for a in course.manifests():
        for file, names in a.blanks.items():
            ours = course.functions(texts.get(file) or variants.original(file))
            theirs = course.functions(files[file].decode())
            for name in names:
                assert course.is_blank(theirs[name])
                assert ast.get_docstring(theirs[name]) == ast.get_docstring(ours[name])

    a, = course.assignments([1])        # somebody hands in the published solution
    selftest.write(work, {
        "router.py": course.with_bodies(files["router.py"].decode(), course.bodies_of(
            variants.original("router.py"), a.blanks["router.py"])),
        f"{course.TOOL}/{a.folder}/answers.py": variants.original(
            f"{course.TOOL}/{a.folder}/solution.py")})
    call("grade", work, "--only", "1", "--seed", "7", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    lost = [r["check"] for r in report["assignments"][0]["checks"] if r["kind"] != "passed"]
    assert lost == ["equal_logits_go_to_the_highest_index",
                    "what_the_losses_reach_and_where_they_end"]
    assert report["of"] - report["points"] == 4 and not report["edited"]
