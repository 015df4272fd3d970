"""Does the README say what is true? Its table, its commands, its list of tests."""
import re
from dataclasses import fields
from pathlib import Path

import pytest
from mutants import MUTANTS

import report
from notebooks import bench, study
from train import METHODS, Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_results_table_is_what_its_rows_say():
    rows = report.read_lines(ROOT / "notebooks/results/cpu.jsonl")
    between = README.split(report.BEGIN)[1].split(report.END)[0]
    assert report.results_table(rows) in between


def test_the_table_of_speeds_is_what_its_rows_say():
    between = README.split(bench.BEGIN)[1].split(bench.END)[0]
    assert bench.table(ROOT / "notebooks/results/kernels_cpu.json") in between


def test_the_study_says_what_its_rows_say():
    assert study.check_readme() is None


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks/results").glob("*.jsonl")),
                         ids=lambda path: path.name)
def test_every_row_says_where_it_comes_from(path):
    for row in report.read_lines(path):
        assert all(row[name] for name in ("command", "commit", "versions", "device", "data_md5"))
        assert row["seed"] is not None and "dirty" not in row["commit"]


def test_every_flag_in_a_command_exists_and_every_method_is_known():
    known = {f.name for f in fields(Config)} | {"help"}
    commands = re.findall(r"python train\.py[^#`\n]*", README)
    assert len(commands) > 5
    for command in commands:
        assert {flag.rstrip() for flag in re.findall(r"--(\w+)", command)} <= known
        assert set(re.findall(r"--method (\S+)", command)) <= set(METHODS)


def test_every_quoted_test_exists():
    source = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    quoted = re.findall(r"^([a-z0-9_]{20,})$", README, flags=re.M)
    assert len(quoted) > 10
    assert [name for name in quoted if f"def test_{name}(" not in source] == []


def test_the_number_of_mutants_is_the_number_of_mutants():
    assert f"breaks {len(MUTANTS)} lines" in README


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)h][^)]*)\)", README))
def test_every_link_leads_to_a_file(link):
    assert (ROOT / link).exists()
