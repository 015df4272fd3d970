"""Tests of assignments/: the fast ones. `course.py self-test` there is the long one."""
import ast
import csv
import random
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

HERE = Path(__file__).parent / "assignments"
sys.path.append(str(HERE))
import checking  # noqa: E402
import course  # noqa: E402
import selftest  # noqa: E402

EVERY = course.assignments()
every_assignment = pytest.mark.parametrize("a", EVERY, ids=[a.folder for a in EVERY])


def checks(a, name):
    """{name: points} of the checks in public.py or hidden.py, without running them."""
    nodes = course.functions((a.path / name).read_text(encoding="utf-8"))
    points = {}
    for check, node in nodes.items():
        if course.is_check(node):
            given = {k.arg: k.value.value for k in node.decorator_list[0].keywords
                     if isinstance(k.value, ast.Constant)}
            points[check] = given.get("points", 1)
    return points


def test_a_student_tree_is_repeatable_and_gives_no_body_away():
    selftest.the_release_is_repeatable_and_tells_nothing()


def test_a_function_is_blank_in_one_assignment_only():
    names = [(file, name) for a in EVERY for file in a.blanks for name in a.blanks[file]]
    assert len(names) == len(set(names))


@every_assignment
def test_every_blank_names_a_function_and_is_blank_for_students(a):
    tree = selftest.unsolved()
    for file, names in a.blanks.items():
        for name in names:
            ours = course.functions((course.ROOT / file).read_text(encoding="utf-8"))[name]
            theirs = course.functions(tree[file])[name]
            assert course.is_blank(theirs) and not course.is_blank(ours)
            assert ast.dump(ours.args) == ast.dump(theirs.args)
            assert ast.get_docstring(ours) == ast.get_docstring(theirs)


@every_assignment
def test_blanks_that_are_filled_again_give_the_module(a):
    tree = selftest.unsolved()
    for file in a.blanks:
        source = (course.ROOT / file).read_text(encoding="utf-8")
        every = [name for other in EVERY for name in other.blanks.get(file, ())]
        assert course.fill(tree[file], source, every) == source
        mine = course.fill(tree[file], source, list(a.blanks[file]))
        assert (mine == source) is (len(every) == len(a.blanks[file]))


@every_assignment
def test_the_numbers_in_manifest_and_handout_are_those_of_the_checks(a):
    public, hidden = checks(a, "public.py"), checks(a, "hidden.py")
    assert (len(public), len(hidden)) == a.checks and not set(public) & set(hidden)
    handout = (a.path / "handout.md").read_text(encoding="utf-8")
    of = sum(public.values()) + sum(hidden.values())
    assert f"worth {sum(public.values())} of the {of} points" in " ".join(handout.split())
    assert sum(map(int, re.findall(r"(\d+) points\)", handout))) == of          # part by part
    for name in (name for names in a.blanks.values() for name in names):
        assert f"`{name}`" in handout


@every_assignment
def test_an_assignment_has_enough_mutants_and_other_solutions(a):
    assert len(selftest.mutants_of(a)) - len(a.not_asked) >= selftest.LEAST_MUTANTS
    assert len(list((a.path / "others").glob("*.py"))) >= selftest.LEAST_OTHERS


@every_assignment
def test_what_a_function_may_do_is_said_of_functions_that_are_asked_for(a):
    for name, reasons in a.may.items():
        arguments = next(course.functions((course.ROOT / file).read_text(encoding="utf-8"))[name]
                         for file, names in a.blanks.items() if name in names).args.args
        for may, reason in reasons.items():
            assert reason and may in ("draws", *(f"writes {arg.arg}" for arg in arguments))


@every_assignment
def test_every_wrong_answer_is_of_a_kind_and_lies_in_a_body_that_is_asked_for(a):
    found = selftest.plausible(a)
    assert len(found) >= selftest.LEAST_WRONG and len(found) == len({v[1:] for v in found})


class Layer(nn.Module):
    """Stands for a module with functions that are asked for, each of which does as it is told."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def method(self, do):
        return do(self)


def function(x, do):
    return do(x)


def watched(may=()):
    module = SimpleNamespace(Layer=type("Layer", (Layer,), {"method": Layer.method}),
                             function=function)
    checking.Watch().over(module, {"Layer.method": may, "function": may, "Layer.gone": may})
    return module


@pytest.mark.parametrize("do, quantity", [
    (lambda x: x.add_(1), "x, function, after the call"),
    (lambda x: x.data.nan_to_num_(), "x, function"),
    (lambda x: x.requires_grad_(), "x.requires_grad, function"),
    (lambda x: torch.rand(2), "torch's random state after function"),
    (lambda x: torch.manual_seed(1), "the seed of torch after function"),
    (lambda x: random.random(), "Python's random state after function"),
    (lambda x: np.random.seed(0), "numpy's random state after function"),           # noqa: NPY002
    (lambda x: torch.set_grad_enabled(False), "torch.is_grad_enabled() after function"),
])
def test_a_watch_sees_what_a_function_leaves_changed(do, quantity):
    x = torch.tensor([1.0, float("nan"), 3.0])
    try:
        with pytest.raises(checking.Failure) as seen:
            watched().function(x, do)
    finally:
        torch.set_grad_enabled(True)
    assert str(seen.value.quantity).startswith(quantity)
    assert seen.value.expected and seen.value.got and seen.value.hint


def test_a_watch_looks_into_modules_lists_dicts_and_at_earlier_results():
    module = watched()
    layer, seen = module.Layer(), [torch.zeros(2)]

    def refused(call, words):
        with pytest.raises(checking.Failure, match=words):
            call()
    layer.weight.grad = torch.ones(3)
    refused(lambda: layer.method(lambda self: self.zero_grad()), "weight of self.grad, Layer")
    refused(lambda: layer.method(lambda self: self.eval()), "training of self, Layer")
    refused(lambda: layer.method(lambda self: self.weight.data.mul_(2)), "weight of self, Layer")
    refused(lambda: module.function({"a": seen}, lambda x: x["a"].append(1)), "the length of x")
    refused(lambda: module.function({"a": seen}, lambda x: x.clear()), "the keys of x")
    refused(lambda: module.function([np.zeros(2)], lambda x: x[0].fill(1)), r"x\[0\], function")
    first = module.function(0, lambda x: {"y": torch.zeros(3)})
    refused(lambda: module.function(0, lambda x: first["y"].add_(1)),
            r"the result\['y'\] of call 7, of function, after a call of function")
    assert module.function(0, lambda x: x + 1) == 1


def test_a_watch_lets_be_what_a_function_may_do_what_it_calls_itself_and_torch_func():
    free = watched(("draws", "writes x", "writes self"))
    x, layer = torch.zeros(3), free.Layer()
    free.function(x, lambda x: x.add_(torch.rand(3)))
    layer.method(lambda self: self.eval())
    with pytest.raises(checking.Failure, match="the seed of torch after function"):
        free.function(x, lambda x: torch.manual_seed(5))
    module = watched()
    module.function(x, lambda x: module.function(x.clone(), lambda own: own.add_(1)))
    assert module.function(torch.ones(2, device="meta"), lambda x: x * 2).is_meta
    square = torch.func.vmap(torch.func.grad(lambda v: module.function(v, lambda v: v * v)))
    assert square(torch.ones(3)).tolist() == [2.0] * 3
    x.requires_grad_().grad = None                  # a gradient of zeros is as good as none
    module.function(x, lambda x: setattr(x, "grad", torch.zeros(3)))


X, CHOSEN = torch.arange(24.0).view(6, 4), torch.arange(12).view(6, 2) % 4


@pytest.mark.parametrize("call", [
    lambda: X * torch.arange(4),
    lambda: X * torch.arange(4).to(torch.float64),
    lambda: torch.arange(6)[CHOSEN[:, 0]],
    lambda: torch.zeros(6, 4).scatter(1, CHOSEN, 1.0),
    lambda: torch.cat([X, torch.zeros(1, 4)]),
    lambda: torch.tensor(CHOSEN.tolist()),
    lambda: {"a": (torch.zeros(3) + 1).sort()},
    lambda: torch.zeros(6, 4).copy_(X),
])
def test_what_is_made_without_a_device_is_noticed(call):
    with pytest.raises(checking.Failure, match=r"the CPU: torch\.\w+ without device="):
        checking.where_given("f", call)


@pytest.mark.parametrize("call", [
    lambda: X * torch.arange(4, device=X.device),
    lambda: X * torch.arange(4).to(X.device),
    lambda: X * torch.arange(4).to(X),
    lambda: X * torch.arange(4).type_as(X),
    lambda: X + torch.tensor(3.0),                          # a number may meet any tensor
    lambda: X[torch.arange(3)],                             # and an index may lie on the CPU
    lambda: torch.zeros_like(X).scatter(1, CHOSEN, 1.0),
    lambda: X.new_zeros(3) + torch.as_tensor(X)[0, :3],
    lambda: torch.tensor(CHOSEN.tolist(), device=CHOSEN.device),
    lambda: torch.func.vmap(lambda row: row * torch.arange(4, device=X.device))(X),
])
def test_what_a_gpu_would_take_is_taken(call):
    checking.where_given("f", call)


def test_tensors_that_pile_up_and_counts_that_are_not_whole_numbers_are_noticed():
    kept, last = [], {}
    checking.keeps_nothing("f", lambda: last.update(x=X * 2))
    with pytest.raises(checking.Failure, match="tensors that 4 more calls of f leave behind"):
        checking.keeps_nothing("f", lambda: kept.append(X * 2))
    assert all(p.grad.all() for p in checking.with_gradients(Layer()).parameters())
    with checking.Coarse():
        whole, short = torch.ones(600, dtype=torch.int64).cumsum(0), torch.ones(600).cumsum(0)
    assert whole.tolist() == list(range(1, 601)) and 301 not in short.tolist()


def test_a_blank_of_another_assignment_is_filled_and_ones_own_is_left(tmp_path):
    tree = selftest.write(tmp_path / "student", selftest.unsolved())
    for a in EVERY:
        graded = course.graded_tree(tree, tmp_path / a.folder, a.number)
        for other in EVERY:
            for file, names in other.blanks.items():
                nodes = course.functions((graded / file).read_text(encoding="utf-8"))
                assert {course.is_blank(nodes[name]) for name in names} == {other is a}


def test_what_a_student_has_written_is_not_replaced(tmp_path):
    files = selftest.unsolved()
    other = {"within_capacity": ["    return 'mine'"]}
    files["router.py"] = course.with_bodies(files["router.py"], other)
    graded = course.graded_tree(selftest.write(tmp_path / "student", files), tmp_path / "tree", 1)
    assert "return 'mine'" in (graded / "router.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("words, sentence", [
    (["release", str(HERE)], "is not empty: name a folder that does not exist yet"),
    (["grade", str(HERE)], "is not a student tree"),
    (["self-test", "--only", "9"], "there is no assignment 9"),
])
def test_a_wrong_call_is_answered_in_a_sentence(monkeypatch, words, sentence):
    monkeypatch.setattr(sys, "argv", ["course.py", *words])
    with pytest.raises((SystemExit, ValueError), match=sentence):
        sys.exit(course.main())


def packed(path, files):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return path


def test_a_tree_is_found_in_a_zip_and_in_a_folder_of_a_folder(tmp_path):
    tool = {f"{course.TOOL}/note": "", "router.py": "x = 1"}
    selftest.write(tmp_path / "plain", tool)
    selftest.write(tmp_path / "deep" / "Ann Example" / "work", tool)
    for given in (tmp_path / "plain", tmp_path / "deep", packed(tmp_path / "a.zip", tool),
                  packed(tmp_path / "b.zip", {f"work/{n}": c for n, c in tool.items()})):
        with course.tree_in(given) as tree:
            assert (tree / "router.py").read_text(encoding="utf-8") == "x = 1"
    selftest.write(tmp_path / "second", tool)
    (tmp_path / "broken.zip").write_bytes(b"PK but not for long")
    for given, sentence in (
            (tmp_path, "holds 2 student trees: name one, or give --csv"),
            (packed(tmp_path / "c.zip", {"router.py": ""}), "is not a student tree"),
            (packed(tmp_path / "d.zip", tool | {"../evil": ""}), "lie outside of it"),
            (tmp_path / "broken.zip", "is damaged, or no .zip"),
            (tmp_path / "no", "is not a student tree")):
        with pytest.raises(ValueError, match=sentence), course.tree_in(given):
            pass
    with pytest.raises(ValueError, match="is not unpacked: it holds"), course.tree_in(
            tmp_path / "a.zip", largest=3):
        pass
    assert not (tmp_path.parent / "evil").exists()


def test_a_file_of_another_assignment_that_python_cannot_read_costs_nothing(tmp_path):
    files = selftest.unsolved()
    files["router.py"] += "\ndef half_a_line(:\n"           # of assignment 1
    tree, replaced = selftest.write(tmp_path / "student", files), []
    graded = course.graded_tree(tree, tmp_path / "4", 4, replaced)
    assert replaced == ["router.py"]
    assert (graded / "router.py").read_text(encoding="utf-8") == (
        course.ROOT / "router.py").read_text(encoding="utf-8")
    own = course.graded_tree(tree, tmp_path / "1", 1, replaced)
    assert replaced == ["router.py"] and "half_a_line" in (own / "router.py").read_text("utf-8")


def test_a_class_becomes_a_table_and_gradescope_gets_a_test_per_check(
        tmp_path, monkeypatch, capsys):
    def report(points, kind):
        checks = [{"check": "a_law_holds", "points": points, "of": 2, "kind": kind, "public": True,
                   "quantity": "y", "expected": "1", "got": "2", "hint": "look"},
                  {"check": "another", "points": 1, "of": 1, "kind": "passed", "public": False}]
        return {"points": points + 1, "of": 3, "assignments": [
            {"assignment": "1_routing", "checks": checks, "replaced": ["teacher.py"]}]}

    seeds, found = [], {"ann": report(2, "passed"), "bob": report(0, "changed torch")}
    for name in found:
        selftest.write(tmp_path / "class" / name, {f"{course.TOOL}/note": ""})
    packed(tmp_path / "class" / "cid.zip", {"essay.txt": "I was ill"})
    monkeypatch.setattr(course, "grade", lambda tree, only, seed: seeds.append(seed)
                        or found[tree.name])
    course.grade_class(tmp_path / "class", tmp_path / "marks.csv", None, None)
    with open(tmp_path / "marks.csv", newline="", encoding="utf-8") as file:
        ann, bob, cid = csv.DictReader(file)
    assert (ann["student"], ann["points"], ann["1: a law holds"]) == ("ann", "3", "2")
    assert bob["1: a law holds"] == "0" and "changed torch" in bob["note"]
    assert "teacher.py cannot be read" in ann["note"]
    assert cid["points"] == "" and "not a student tree" in cid["note"]
    assert len(set(seeds)) == 1                             # the same questions for all
    said = capsys.readouterr().out
    assert "2 of 3 graded" in said and "1 of 2  1: a law holds" in said
    results = course.gradescope(found["bob"])
    assert results["score"] == 1 and [t["visibility"] for t in results["tests"]] == [
        "visible", "after_published"]
    assert "expected: 1" in results["tests"][0]["output"] and not results["tests"][1]["output"]
