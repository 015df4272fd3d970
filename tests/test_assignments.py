"""Tests of assignments/: the fast ones. `course.py self-test` there is the long one."""
import ast
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "assignments"
sys.path.append(str(HERE))
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
    with pytest.raises(SystemExit, match=sentence):
        sys.exit(course.main())
