"""Does faults.py find what it looks for, and nothing in this code? Its short form and its table."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import report
from tests import faults

ROOT = Path(__file__).resolve().parent.parent
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults.py forks its runs")


@forks
def test_no_run_is_lost_to_a_few_faults_of_each_kind():
    done = subprocess.run([sys.executable, "tests/faults.py", "--short"], cwd=ROOT,
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{which.__name__}: 0 of" in done.stdout for which in faults.CAMPAIGNS)


def test_the_table_of_promises_is_what_the_campaigns_found():
    _, between, _ = report.cut(ROOT / "README.md", *faults.MARKERS)
    assert faults.page() in between


def test_every_promise_was_tried_as_often_as_it_says_and_kept():
    record = faults.results()
    assert list(record) == [which.__name__ for which in faults.CAMPAIGNS]
    for which, (happens, promise, trials, _) in faults.CAMPAIGNS.items():
        row = record[which.__name__]
        assert (row["happens"], row["promise"], row["failed"]) == (happens, promise, 0)
        assert row["tried"] >= (trials or 1)
        assert row["commit"] and "dirty" not in row["commit"]


@forks
def test_a_campaign_on_broken_code_fails():
    subprocess.run([sys.executable, "tests/faults.py", "--sabotage"], cwd=ROOT, check=True,
                   capture_output=True)
