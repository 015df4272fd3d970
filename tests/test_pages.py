"""Do README.md and RESULTS.md say what is true? Their tables, commands, links, list of tests."""
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import kernels
import report
from notebooks import bench, decided, regime, steps, study, tiles
from train import METHODS, Config

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "notebooks" / "RESULTS.md"
each = pytest.mark.parametrize("page", [README, RESULTS], ids=lambda page: page.name)


def test_the_results_table_is_what_its_rows_say():
    rows = report.read_lines(ROOT / "notebooks/results/cpu.jsonl")
    _, between, _ = report.cut(RESULTS, report.BEGIN, report.END)
    assert report.results_table(rows) in between


def test_the_table_of_speeds_is_what_its_rows_say():
    _, between, _ = report.cut(RESULTS, bench.BEGIN, bench.END)
    for name in ("kernels_cpu.json", "kernels_h200.json"):
        assert bench.table(ROOT / "notebooks/results" / name) in between


def test_the_table_of_tiles_is_what_its_rows_say():
    _, between, _ = report.cut(RESULTS, tiles.BEGIN, tiles.END)
    for name in ("tiles_h200_before.json", "tiles_h200.json"):
        assert tiles.page(ROOT / "notebooks/results" / name) in between


def test_the_blocks_in_use_are_the_fastest_of_their_rows():
    path = ROOT / "notebooks/results/tiles_h200.json"
    us = {(row["product"], kernels.Block(*(row[name] for name in kernels.Block._fields))): row["us"]
          for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    for name, block in kernels.choose_blocks(65536 * 2, 8, torch.bfloat16).items():
        assert us[name, block] <= 1.01 * min(time for (product, other), time in us.items()
                                             if product == name and other.rows == block.rows)


def test_the_table_of_steps_is_what_its_rows_say():
    _, between, _ = report.cut(RESULTS, steps.BEGIN, steps.END)
    assert steps.table(ROOT / "notebooks/results/steps_cpu.json") in between


@each
def test_the_study_says_what_its_rows_say(page):
    assert study.disagreement(page) is None


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks/results").glob("*.jsonl")),
                         ids=lambda path: path.name)
def test_every_row_says_where_it_comes_from(path):
    for row in report.read_lines(path):
        assert all(row[name] for name in ("command", "commit", "versions", "device", "data_md5"))
        assert row["seed"] is not None and "dirty" not in row["commit"]


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "notebooks/results").iterdir()
                                        if p.suffix in (".json", ".jsonl", ".txt")),
                         ids=lambda path: path.name)
def test_no_result_names_a_folder_of_the_machine_that_made_it(path):
    assert re.findall(r"(?<![\w.])/(?:home|root|tmp|work|Users)/\w+",
                      path.read_text(encoding="utf-8")) == []


def test_what_the_readme_says_below_its_table_is_in_the_rows():
    none, router, features, both = decided.CELLS.values()

    def gain(arm, other, grid="factors", scale="whole", metric="accuracy"):
        return decided.contrast(study.rows_of(grid, scale), metric, (arm,), (other,))

    crossed = decided.judge("factors", study.rows_of("factors", "whole"))
    verdicts = {h.claim: verdict for h, (*_, verdict) in crossed.items()}
    for mark, whose in (("", ""), ("-lite0", ", lite0")):
        same, alone = gain(both + mark, features + mark), gain(router + mark, none)
        assert same.n >= 3 and max(-same.low, same.high) < 1.1
        assert 0.7 < alone.mean < 1.3 and alone.low > 0     # "about one point, but corrected ..."
        assert verdicts[f"a guided router helps, features free{whose}"] == "undecided"
        assert gain(features + mark, none).low > 3
    assert len(verdicts) == 24
    assert verdicts["a router guided alone beats V-MoE without its own losses"] == "undecided"
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert decided.signed(gain(router, "moe-k1-no-aux")) in text
    for other, within in (("moe-k1-logits", 0.3), ("moe-k1-twice", 1.2)):
        beside = gain(both, other)
        assert max(-beside.low, beside.high) < within and gain(other, none).low > 0
    assert 1.8 < gain(f"{both}-lite0", none).mean / gain(both, none).mean < 2.2
    others = [arm for arm in study.FRONT if arm not in ("dense", both)]
    assert min(gain(both, arm, metric=decided.HALF).low for arm in others) > 0      # "earliest"
    smaller = "placement", "cpu"                            # "say the same"
    same = gain(both, features, *smaller)
    assert same.n == 5 and max(-same.low, same.high) < 1.1
    assert gain(features, none, *smaller).low > 3
    assert min(gain(both, arm, *smaller, decided.HALF).low for arm in (none, router, features)) > 0
    rows, guided = study.rows_of("routing", "cpu"), "tgr-k1-router-alone"
    for arm, other in ((guided, "moe-k1"), (guided, "moe-k1-no-aux"), ("dense", "moe-k1")):
        found = decided.contrast(rows, "accuracy", (arm,), (other,))
        assert found.n == 10 and decided.signed(found) in text
    judged = decided.judge("routing", rows)
    said = {h.claim: (p, verdict) for h, (_, p, verdict) in judged.items()}
    claim = "a router guided by a dense teacher beats V-MoE"
    assert len(said) == 35
    for its in (claim, f"{claim} without its own losses"):
        assert said[its][1] == "undecided"
    assert [p > 0.04 for its, (p, verdict) in said.items() if verdict == "met"
            and its.startswith("a router guided") and "beats" in its] == [True] * 2     # "a hair"
    fresh = study.rows_of("place", "cpu")
    have, lack = decided.with_and_without("patches")
    of_four = [value / 4 for value in decided.contrast(fresh, "accuracy", have, lack)[:3]]
    by_gate = {False: [], True: []}
    for words, arm in decided.PLACED.items():
        if "patches" in words:
            other = decided.PLACED[tuple(word for word in words if word != "patches")]
            by_gate["gate 1" in words].append(
                decided.contrast(fresh, "accuracy", (arm,), (other,)).mean)
    assert max(by_gate[False]) < min(by_gate[True]) and min(by_gate[False]) > 0     # "and most"
    announced = {h.claim: (e, verdict) for grid in ("place", "maps") for h, (e, _, verdict) in
                 decided.judge(grid, study.rows_of(grid, "cpu")).items()}
    for claim in ("a hash of the place beats V-MoE", "an expert for each patch beats one for two",
                  "a hash of the place beats a dense ViT that is told the place"):
        found, verdict = announced[claim]
        assert found.n == 5 and decided.signed(found) in text and verdict == "met"
    larger = {h.claim: (e, verdict) for h, (e, _, verdict) in decided.judge(
        "places", study.rows_of("places", "whole")).items()}
    for whom, its in (("V-MoE", "met"), ("the dense ViT", "undecided")):
        found, verdict = larger[f"an expert for each place beats {whom}"]
        assert found.n == 3 and decided.signed(found) in text and verdict == its
    assert "{:+.2f} [{:+.2f}, {:+.2f}] on average".format(*of_four) in text
    mixer = decided.contrast(rows, "accuracy", ("moe-k1-dense-mixer",), ("moe-k1",))
    assert max(-mixer.low, mixer.high) < 0.4


def test_no_setting_that_was_searched_came_nearer_to_paying_than_the_front_pages():
    reached, gains = {}, {}
    for row in regime.rows():
        reached.setdefault(regime.setting(row)[:-1], []).append(row["val_accuracy"])
    for setting, own in reached.items():
        if setting[2] is not None:                          # its twin has no experts
            twin = reached[(*setting[:2], None, *setting[3:])]
            assert len(own) == len(twin) == 2
            gains[setting] = sum(own) - sum(twin)
    row = study.rows_of(study.FRONT_GRID, "whole")[0]
    assert max(gains, key=gains.get) == regime.setting(row)[:-1]


def test_every_flag_in_a_command_exists_and_every_method_is_known():
    known = {f.name for f in fields(Config)} | {"help", "config"}
    text = README.read_text(encoding="utf-8") + RESULTS.read_text(encoding="utf-8")
    commands = re.findall(r"python train\.py[^#`\n]*", text)
    assert len(commands) > 5
    for command in commands:
        assert {flag.rstrip() for flag in re.findall(r"--(\w+)", command)} <= known
        assert set(re.findall(r"--method (\S+)", command)) <= set(METHODS)


def test_every_quoted_test_exists():
    tests = (ROOT / "tests").glob("test_*.py")
    source = "".join(path.read_text(encoding="utf-8") for path in tests)
    quoted = re.findall(r"^([a-z0-9_]{20,})$", README.read_text(encoding="utf-8"), flags=re.M)
    assert len(quoted) > 7
    assert [name for name in quoted if f"def test_{name}(" not in source] == []


@each
def test_every_link_leads_to_a_file_or_to_a_heading(page):
    links = re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text(encoding="utf-8"))
    assert len(links) > 5
    for link in links:
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        text = target.read_text(encoding="utf-8") if heading else ""
        headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
        assert not heading or heading in [
            re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], link
