"""Is what report.py says about a run true? Numbers by hand, then the tables, then the figures."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import report
from report import (
    agreement,
    closing_table,
    consistency,
    kappa,
    last_fluctuation,
    load_entropy,
    load_share,
    overlap,
    results_table,
    write_page,
)

# --- numbers ---


def test_agreement_is_the_share_of_tokens_that_keep_their_expert():
    assert agreement(np.array([[0, 1], [2, 2]]), np.array([[0, 1], [1, 2]])) == 3 / 4


def test_kappa_takes_off_the_agreement_that_two_unlike_loads_have_by_chance():
    a, b = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 2])
    # agree 2/4; loads [3/4, 1/4, 0] and [1/2, 1/4, 1/4]: c = 3/8 + 1/16 = 7/16
    # (1/2 - 7/16) / (1 - 7/16) = 1/9; with the load of a twice, c = 10/16 and kappa < 0
    assert kappa(a, b, 3) == pytest.approx(1 / 9)


def test_kappa_of_all_shuffles_of_an_assignment_is_zero_on_average():
    a = np.array([0, 0, 1, 2, 0])
    shuffles = [kappa(a, np.array(b), 3) for b in itertools.permutations(a)]
    assert min(shuffles) < 0 < max(shuffles) == pytest.approx(1)
    assert np.mean(shuffles) == pytest.approx(0, abs=1e-12)


def test_a_collapsed_router_agrees_with_itself_but_kappa_is_undefined_and_its_load_is_not_even():
    collapsed = np.full((3, 2, 4, 5, 1), 6, dtype=np.uint8)  # 3 epochs, 2 layers: all to expert 6
    c = consistency(collapsed, 8)
    assert c["mean_agreement_adjacent"] == c["half_agreement_final"] == 1
    assert c["kappa_adjacent"] == [[None, None]] * 2
    assert c["first_quarter_kappa_adjacent"] is None
    assert c["final_load_entropy"] == 0


def test_overlap_ignores_the_order_of_a_tokens_experts():
    assert overlap([[0, 1], [2, 3]], [[1, 0], [3, 2]]) == 1
    # token 0 keeps 2 of 3, token 1 keeps 0 of 3
    assert overlap([[0, 1, 2], [3, 4, 5]], [[2, 7, 1], [0, 1, 2]]) == pytest.approx(1 / 3)


def test_load_share_counts_every_choice_and_an_idle_expert_has_none():
    assert load_share(np.array([[0, 1], [0, 3]]), 5).tolist() == [0.5, 0.25, 0, 0.25, 0]


def test_load_entropy_is_one_when_even_zero_when_collapsed_and_halfway_for_half_the_experts():
    assert load_entropy(np.full(8, 1 / 8)) == pytest.approx(1)
    assert load_entropy(np.array([0, 1.0, 0, 0])) == 0
    assert load_entropy(np.array([0.5, 0, 0.5, 0])) == pytest.approx(0.5)  # log 2 / log 4
    assert load_entropy(np.array([1.0])) == 1  # a lone expert has its fair share


def test_the_last_fluctuation_is_the_last_epoch_away_from_the_final_expert():
    history = np.array([[0, 5, 1, 2],
                        [0, 5, 2, 2],
                        [0, 5, 1, 3],
                        [0, 6, 1, 2]])
    # never away; away through 3; away at 2 although 1 and 3 were right; away at 3
    assert last_fluctuation(history).tolist() == [0, 3, 2, 3]


def one_layer(rows):
    """A history (epochs, 1, 1, N, 1) from rows of the experts of N tokens."""
    return np.array(rows, dtype=np.uint8)[:, None, None, :, None]


def test_a_token_counts_as_late_only_beyond_the_share_of_training_not_at_it():
    # 5 epochs, 4 tokens whose last fluctuations are 0, 1, 2 and 4; 20 % of 5 epochs is 1, 80 % is 4
    rows = [[0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    (last,) = consistency(one_layer(rows), 2)["last_fluctuation"]
    assert last == {"mean": 7 / 4, "share_after_20_percent": 2 / 4,
                    "share_after_50_percent": 1 / 4, "share_after_80_percent": 0}


def test_the_curves_and_summaries_of_six_epochs_by_hand():
    rows = [[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]]
    c = consistency(one_layer(rows), 2)
    assert c["agreement_adjacent"] == [[2 / 4, 2 / 4, 3 / 4, 4 / 4, 3 / 4]]
    assert c["agreement_final"] == [[0, 2 / 4, 2 / 4, 3 / 4, 3 / 4, 1]]
    assert c["mean_agreement_adjacent"] == pytest.approx((2 + 2 + 3 + 4 + 3) / 20)
    assert c["sixth_agreement_final"] == 0  # after epoch 1 of 6
    assert c["half_agreement_final"] == 2 / 4  # after epoch 3 of 6
    # a quarter of 6 epochs is 1.5, so pairs up to epoch 2: only (1, 2)
    assert c["first_quarter_agreement_adjacent"] == 2 / 4
    assert c["load_entropy"][0][1] == pytest.approx(1) and c["final_load_entropy"] == 0
    # share of expert 1: 0, 1/2, 1/2, 3/4, 3/4, 1, so neighbours agree by chance 1/2, 1/2,
    # 1/2 * 1/4 + 1/2 * 3/4 = 1/2, 1/16 + 9/16 = 5/8, 3/4: kappa 0, 0, (3/4 - 1/2) / (1/2), 1, 0
    assert c["kappa_adjacent"] == [[0, 0, 1 / 2, 1, 0]]
    assert c["first_quarter_kappa_adjacent"] == 0
    # the end has expert 1 everywhere: agreement with it is the share of expert 1, which is chance
    assert c["kappa_final"] == [[0, 0, 0, 0, 0, None]]


def test_the_first_quarter_is_rounded_up_and_a_sixth_down_but_neither_is_ever_empty():
    rows = [[0, 0], [0, 1], *[[1, 0]] * 7]  # neighbours agree 1/2, 0, 1, 1, ...
    nine = consistency(one_layer(rows), 2)  # 9/4 epochs: pairs up to epoch 3; 9/6: epoch 1
    assert nine["first_quarter_agreement_adjacent"] == pytest.approx((1 / 2 + 0) / 2)
    assert nine["sixth_agreement_final"] == 1 / 2
    assert nine["final_load_entropy"] == pytest.approx(1)
    four = consistency(one_layer(rows[:4]), 2)  # 4/4: epoch 1 has no pair, so the first pair
    assert four["first_quarter_agreement_adjacent"] == 1 / 2
    assert four["sixth_agreement_final"] == 1 / 2


def test_the_summaries_average_over_layers_and_only_first_choices_agree():
    still, moving = [[0, 1], [0, 1]], [[0, 1], [2, 1]]  # the K = 2 experts of a token, two epochs
    experts = np.array([still, moving]).transpose(1, 0, 2)[:, :, None, None, :]  # (2, L=2, 1, 1, 2)
    c = consistency(experts, 4)
    assert c["agreement_adjacent"] == [[1], [0]] and c["mean_agreement_adjacent"] == 1 / 2
    assert c["overlap_adjacent"] == [[1], [1 / 2]]
    assert c["final_load_entropy"] == pytest.approx(1 / 2)  # both choices count: log 2 / log 4


def test_one_epoch_can_be_compared_with_nothing_and_the_report_is_still_json():
    c = consistency(np.zeros((1, 2, 3, 5, 1), dtype=np.uint8), 1)
    assert json.loads(json.dumps(c)) == c
    assert c["agreement_adjacent"] == [[], []] and c["agreement_final"] == [[1], [1]]
    for name in ("mean_agreement_adjacent", "half_agreement_final", "sixth_agreement_final",
                 "first_quarter_agreement_adjacent", "first_quarter_kappa_adjacent"):
        assert c[name] is None


# --- tables ---


def a_row(**changes):
    return {
        "method": "tgr", "preset": "tiny", "data": "cifar100", "data_md5": "eb9058", "seed": 0,
        "device": "cpu, 2 cores", "commit": "abc1234", "command": "python train.py",
        "versions": {"torch": "2.14.0"}, "config": {"k": 2, "seed": 0, "guide_weight": 5.0},
        "epochs": 10, "train_images": 5000, "test_images": 10000, "labels": "fine",
        "test_accuracy": 0.40, "teacher_accuracy": 0.45, "agreement_adjacent": 0.83,
        "agreement_final": 0.71, "load_entropy": 0.9, "images_per_second": 1234.5,
        "consistency": {"first_quarter_agreement_adjacent": 0.6, "agreement_adjacent": [[0.6]],
                        "agreement_final": [[0.5, 1.0]]}, "flops_per_image": 38_200_000,
        "params_total": 2_690_000, "params_active": 1_100_000, "seconds": 100, "out": "runs/tgr-0",
    } | changes


DENSE = {"method": "dense", "agreement_adjacent": None, "agreement_final": None,
         "load_entropy": None, "consistency": None, "teacher_accuracy": None}


def body(table):
    return [line for line in table.splitlines() if line.startswith("| ") and "method" not in line]


def test_the_examples_in_the_docstrings_are_true():
    import doctest
    assert doctest.testmod(report) == (0, 4)


def test_the_right_class_may_be_anywhere_among_the_k_most_probable():
    probs = np.array([[0.1, 0.4, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    labels = np.array([3, 2, 1])                            # ranks 3, 3 and, by order, 2
    assert [report.top_k_accuracy(probs, labels, k) for k in (1, 2, 3)] == [0, 1 / 3, 1]


def test_over_and_under_confidence_in_two_bins_do_not_cancel():
    # sure by 0.9 and wrong: gap 0.9; sure by 0.6 and right: gap 0.4; in one bin, 0.25 would be left
    probs, labels = np.array([[0.9, 0.1], [0.6, 0.4]]), np.array([1, 0])
    assert report.calibration_error(probs, labels) == pytest.approx((0.9 + 0.4) / 2)
    assert report.calibration_error(probs, labels, bins=1) == pytest.approx(0.25)
    sure = np.array([[1.0, 0.0]] * 3)
    assert report.calibration_error(sure, np.array([0, 0, 1])) == pytest.approx(1 / 3)
    # certain and wrong shares the last bin with almost certain and right: 1 - 0.04, over two
    sure[1] = 0.96, 0.04
    assert report.calibration_error(sure[:2], np.array([1, 0])) == pytest.approx(0.48)


def test_an_exam_names_the_best_and_the_worst_classes_and_leaves_out_those_without_an_image():
    names = [f"class {c}" for c in range(8)]
    labels = np.repeat(np.arange(7), 4)                     # none of class 7
    probs = np.eye(8)[labels]
    for c in range(7):                                      # c of the 7 classes' 4 images go wrong
        wrong = np.flatnonzero(labels == c)[:min(c, 4)]
        probs[wrong] = np.eye(8)[7]
    first, best, worst = report.exam_table(probs, labels, names).splitlines()
    assert first.startswith("accuracy 35.71%   top-5 ")     # (4 + 3 + 2 + 1) / 28
    assert best == "best  class 0 100%, class 1 75%, class 2 50%, class 3 25%, class 6 0%"
    assert worst == "worst class 4 0%, class 5 0%, class 6 0%, class 3 25%, class 2 50%"


def test_lines_of_an_older_run_still_tell_their_terms():
    old = {"epoch": 1, "task": 2.0, "load": 0.1, "lr": 0.3, "seconds": 4.0}
    assert report.terms(old) == {"task": 2.0, "load": 0.1}
    assert report.terms({"terms": {"task": 1.0, "mine": 3.0}, "lr": 0.3}) == {"task": 1, "mine": 3}


def test_the_closing_table_names_what_the_run_reached_what_it_cost_and_where_it_lies():
    table = closing_table(a_row())
    for said in ("40.0% of fine labels", "dense teacher 45.0%", "2.69 M total", "1.10 M active",
                 "38.2 M", "0.83", "0.71", "0.90", "1,234 images/s", "runs/tgr-0"):
        assert said in table


def test_a_run_that_held_images_out_closes_with_their_accuracy_and_no_test_accuracy():
    table = closing_table(a_row(test_accuracy=None, val_accuracy=0.25))
    assert "val accuracy     25.0% of fine labels" in table and "test accuracy" not in table


def test_a_run_without_router_or_teacher_closes_with_dashes():
    table = closing_table(a_row(**DENSE))
    assert "dense teacher –" in table and "– with the epoch before" in table
    assert "None" not in table


def test_the_seeds_of_one_experiment_are_pooled_to_mean_and_sample_deviation():
    rows = [a_row(seed=s, config={"k": 2, "seed": s, "teacher": f"runs/dense-{s}/model.pt"},
                  test_accuracy=accuracy, load_entropy=entropy, seconds=seconds)
            for s, accuracy, entropy, seconds in [(0, 0.40, 0.9, 100), (1, 0.42, 0.8, 104),
                                                  (2, 0.47, 0.7, 102)]]
    # accuracy: mean 43, deviations -3, -1, 4: sqrt((9 + 1 + 16) / 2) = 3.606 points
    # load entropy: mean 0.8, sqrt((0.01 + 0 + 0.01) / 2) = 0.1; seconds: mean 102
    table = results_table(rows)
    assert body(table) == ["| tgr | 2 | 2.69 M / 1.10 M | 38.2 | 43.0% ± 3.6% | 0.60 ± 0.00 "
                           "| 0.80 ± 0.10 | 102 | 3 | cpu, 2 cores |"]
    assert "seeds: 0, 1, 2; torch 2.14.0; commit abc1234" in table
    assert "cifar100 (md5 eb9058), fine labels, 5,000 training" in table and "epochs: 10" in table


def test_paths_that_differ_in_more_than_the_seed_are_two_experiments():
    def rows(path):
        return [a_row(seed=s, config={"k": 2, "seed": s, "teacher": path.format(s)})
                for s in (0, 1)]

    nets = rows("torchvision:resnet18:/w/resnet18.pth") + rows("torchvision:resnet50:/w/50.pth")
    lines = body(results_table(nets))
    assert len(lines) == 2 and all("| 2 | cpu" in line and "resnet" in line for line in lines)
    for path in ("runs/seed{}/b0c1.pt", "runs/teacher_{}/x", "runs/dense-{}-0b1c/x", "t{}/0a.pt"):
        (line,) = body(results_table(rows(path)))
        assert "| 2 | cpu" in line


def test_runs_that_held_images_out_stand_in_a_table_of_their_own():
    held = a_row(test_accuracy=None, val_accuracy=0.25)
    tested, validated = results_table([a_row(), held]).split("\n\n| method")
    assert "test accuracy" in tested and "40.0%" in tested and " test images, preset" in tested
    assert "validation accuracy" in validated and "25.0%" in validated
    assert " validation images, preset" in validated


def test_a_page_has_a_picture_for_each_setting_and_counts_a_seed_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(report, "plot_methods", lambda rows, name: drawn.append(
        [(name(row), row["epochs"], row["seed"]) for row in rows]))
    monkeypatch.setattr(report, "png", lambda figure: b"drawn")
    rows = [a_row(), a_row(), a_row(seed=1), a_row(epochs=20),
            a_row(epochs=20, config={"k": 2, "seed": 0, "guide_weight": 0.0})]
    Path("my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_page("page.md", "my rows.jsonl")
    assert drawn == [[("tgr, K=2", 10, 0), ("tgr, K=2", 10, 1)],
                     [("tgr (guide_weight=5.0), K=2", 20, 0),
                      ("tgr (guide_weight=0.0), K=2", 20, 0)]]
    text = Path("page.md").read_text()
    assert "](<my rows.png>)" in text and "](<my rows-2.png>)" in text
    assert "Written by `python report.py --page page.md 'my rows.jsonl'`." in text
    assert Path("my rows-2.png").read_bytes() == b"drawn"


def test_a_lone_patch_has_no_neighbours():
    fig = report.plot_patches(np.zeros((1, 3, 8, 8), np.uint8), np.zeros((1, 2, 1), int),
                              np.ones((1, 2, 2)) / 2, 3)
    assert " ".join(fig.get_suptitle().split()) == "A lone patch has no neighbours"


def reported(monkeypatch, capsys, *argv):
    """What report.py says of these, and its exit code."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, argv)])
    try:
        code = report.main() or 0
    except SystemExit as stop:
        code = stop.code
    return code, " ".join(capsys.readouterr())


def test_what_train_py_has_not_written_is_no_traceback(monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    code, said = reported(monkeypatch, capsys, run)
    assert code == 0 and "no epoch has ended yet: there is nothing to draw" in said
    (run / "metrics.jsonl").write_text('{"epoch": 1, "terms": {"task": 1.0}, "lr": 0.1}\n')
    (run / "result.json").write_text("{}")
    code, said = reported(monkeypatch, capsys, run)
    assert code == 2 and "holds something else than train.py writes (KeyError: 'test_acc" in said
    (run / "result.json").write_text(json.dumps(a_row()))
    (run / "routing.npz").write_bytes(b"PK\3\4 and no more")
    code, said = reported(monkeypatch, capsys, run)
    assert code == 2 and "give it the folder of a run" in said
    for line in ('{"epoch": 1}', "[1]"):
        (tmp_path / "rows.jsonl").write_text(line)
        code, said = reported(monkeypatch, capsys, "--page", tmp_path / "p.md",
                              tmp_path / "rows.jsonl")
        assert code == 2 and "give it lines of result.json" in said
        assert not (tmp_path / "p.md").exists()


def test_one_seed_has_no_deviation_and_a_dense_model_no_k():
    assert body(results_table([a_row(**DENSE)])) == [
        "| dense | – | 2.69 M / 1.10 M | 38.2 | 40.0% | – | – | 100 | 1 | cpu, 2 cores |"]


def test_a_rerun_of_a_seed_replaces_the_first_run_instead_of_counting_twice():
    (line,) = body(results_table([a_row(), a_row(test_accuracy=0.5)]))
    assert "| 50.0% |" in line and "| 1 |" in line


def test_runs_that_differ_in_a_setting_of_the_method_are_told_apart_not_averaged():
    lines = body(results_table([a_row(), a_row(config={"k": 2, "seed": 0, "guide_weight": 0.0})]))
    assert [line.split(" |")[0] for line in lines] == ["| tgr (guide_weight=5.0)",
                                                       "| tgr (guide_weight=0.0)"]
    assert len(body(results_table([a_row(), a_row(device="one H200")]))) == 2
    lines = body(results_table([a_row(config={"k": k, "seed": 0}) for k in (1, 2)]))
    assert ["| tgr | 1 |" in lines[0], "| tgr | 2 |" in lines[1]] == [True, True]


def test_runs_on_other_data_stand_in_a_table_of_their_own():
    table = results_table([a_row(), a_row(train_images=50_000), a_row(method="vmoe")])
    assert table.count("| method |") == 2
    assert "5,000 training" in table and "50,000 training" in table


def test_a_null_result_is_printed_like_any_other():
    lines = body(results_table([a_row(method="vmoe"), a_row(test_accuracy=0.1)]))
    assert "40.0%" in lines[0] and "10.0%" in lines[1]
    assert results_table([]) == "Nothing has been measured yet."


@pytest.fixture
def readme(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(a_row()) + "\n\n", encoding="utf-8")
    path = tmp_path / "README.md"
    path.write_bytes(f"# é\r\nabove\n{report.BEGIN}\nold\n{report.END}\nbelow\n".encode())
    return path


def test_a_page_is_rewritten_between_the_markers_and_nowhere_else(readme):
    for _ in range(2):  # twice: the table is replaced, not added
        write_page(readme, readme.parent / "rows.jsonl")
        before, rest = readme.read_bytes().decode().split(report.BEGIN)
        table, after = rest.split(report.END)
        assert (before, after) == ("# é\r\nabove\n", "\nbelow\n")
        assert "old" not in table and table.count("| tgr |") == 1
        assert "rows.png)" in table and (readme.parent / "rows.png").stat().st_size > 5000
        assert f"{readme.parent / 'rows.jsonl'}`" in table


@pytest.mark.parametrize("row", [
    a_row(**DENSE), a_row(consistency={"first_quarter_agreement_adjacent": None})],
    ids=["no router", "a single epoch"])
def test_a_page_without_any_agreement_needs_no_picture(readme, row):
    (readme.parent / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    write_page(readme, readme.parent / "rows.jsonl")
    text = readme.read_text(encoding="utf-8")
    assert f"| {row['method']} |" in text and "png" not in text


@pytest.mark.parametrize("broken", [
    "no markers at all", report.BEGIN, f"{report.END}\n{report.BEGIN}",
    f"{report.BEGIN}{report.END}{report.END}", f"{report.BEGIN}{report.BEGIN}{report.END}",
])
def test_a_page_without_its_two_markers_is_refused_and_left_alone(readme, broken):
    readme.write_text(broken, encoding="utf-8")
    with pytest.raises(ValueError, match="needs one line <!-- results:begin --> and, below it"):
        write_page(readme, readme.parent / "rows.jsonl")
    assert readme.read_text(encoding="utf-8") == broken


# --- figures and the command ---

HERE = os.path.dirname(report.__file__)


def a_run(folder, epochs=6, E=8, K=1, L=2, images=2, router=True):
    """The files of an invented run; experts are those of random, slowly moving logits."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    guidance = {"guidance": 0.1} if router else {}
    metrics = [{"epoch": t, "task": 4.0 - t / 4, "lr": 1e-3, "probe_accuracy": t / 20,
                "seconds": 1.0, "images_per_second": 100.0} | guidance
               for t in range(1, epochs + 1)]
    lines = "\n".join(json.dumps(m) for m in metrics)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if router:
        logits = rng.normal(size=(epochs, L, 9, 17, E)).cumsum(axis=0)  # 17 = class + 4 * 4
        probs = np.exp(logits[-1]) / np.exp(logits[-1]).sum(axis=-1, keepdims=True)
        np.savez(folder / "routing.npz", n_experts=E, layers=np.arange(L) * 2 + 3,
                 experts=(-logits).argsort(axis=-1)[..., :K].astype(np.uint8),
                 probs=probs.astype(np.float16),
                 images=rng.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8))
    row = json.dumps(a_row(**({} if router else DENSE)))
    (folder / "result.json").write_text(row, encoding="utf-8")
    return folder


def title(fig):
    return " ".join(fig.get_suptitle().split())


@pytest.mark.parametrize("shape", [{"epochs": 1, "images": 8}, {"E": 1}, {"E": 64, "K": 2}])
def test_every_run_with_a_router_gets_four_small_pictures(tmp_path, shape):
    drawn = report.figures(a_run(tmp_path / "run", **shape))
    assert list(drawn) == ["loss.png", "load.png", "agreement.png", "patches.png"]
    for png in drawn.values():
        assert png[:4] == b"\x89PNG" and len(png) < 200_000


def test_a_run_without_a_router_gets_its_losses_only(tmp_path):
    assert list(report.figures(a_run(tmp_path / "run", router=False))) == ["loss.png"]


def test_a_stopped_run_without_a_result_still_has_its_pictures(tmp_path):
    run = a_run(tmp_path / "run")
    (run / "result.json").unlink()
    assert len(report.figures(run)) == 4


@pytest.mark.filterwarnings("error")
def test_a_loss_of_weight_0_is_not_drawn_and_no_logarithm_is_taken_of_it():
    metrics = [{"epoch": 1, "task": 4.5, "probe_accuracy": 0.1, "load": 0.0}]
    fig = report.plot_loss(metrics, a_row())
    fig.canvas.draw()
    assert len(fig.axes) == 2                               # task loss, accuracy
    fig = report.plot_loss([metrics[0] | {"entropy": 0.5}], a_row())
    fig.canvas.draw()
    assert [t.get_text() for t in fig.axes[1].get_legend().get_texts()] == ["entropy"]


def test_titles_are_conclusions_computed_from_the_data():
    metrics = [{"epoch": 1, "task": 4.5, "probe_accuracy": 0.1, "val_accuracy": 0.2,
                "guidance": 0.5},  # guided in the first half only
               {"epoch": 2, "task": 2.25, "probe_accuracy": 0.3, "val_accuracy": 0.3}]
    fig = report.plot_loss(metrics, a_row())
    assert len(fig.axes) == 3  # task loss, guidance, accuracy
    assert title(fig) == (
        "The task loss ended at 2.25 (first epoch: 4.50); 40.0% of the test images are right "
        "(dense teacher: 45.0%)")

    # last epoch: [0, 0, 0, 1], so experts 2 and 3 are idle and expert 0 has 3/4 = 3 times 1/4
    experts = one_layer([[0, 0, 0, 0], [0, 0, 2, 1], [0, 0, 0, 1]])
    assert title(report.plot_load(experts, 4, [5])) == (
        "The last epoch leaves 2 of 4 experts idle; the busiest has 3.0 times its fair share")

    # neighbours agree 2/4 and 3/4; half of 3 epochs is epoch 1: 3/4
    assert title(report.plot_agreement(consistency(experts, 4), [5])) == (
        "62% of tokens keep their expert from one epoch to the next; at half of training 75% have "
        "their final one")


def test_the_agreement_figure_says_when_a_router_has_collapsed():
    still = np.stack([one_layer([[0, 1, 2]] * 3), one_layer([[4, 4, 4]] * 3)], axis=1)[:, :, 0]
    fig = report.plot_agreement(consistency(still, 8), [5, 7])
    assert "One expert takes every token in block 7: agreement there means nothing" in title(fig)


def test_methods_are_compared_by_the_mean_over_their_layers_and_seeds():
    def run(method, early, adjacent, final):
        return a_row(method=method, consistency={
            "first_quarter_agreement_adjacent": early, "agreement_adjacent": adjacent,
            "agreement_final": final})

    fig = report.plot_methods([
        run("moe", 0.5, [[0.4, 0.6], [0.2, 0.8]], [[0.1, 0.3, 1.0], [0.3, 0.5, 1.0]]),
        run("moe", 0.7, [[0.5, 0.9], [0.5, 0.9]], [[0.2, 0.4, 1.0], [0.2, 0.4, 1.0]]),
        run("tgr", 0.9, [[0.8, 0.9]], [[0.7, 0.9, 1.0]]), a_row(**DENSE),
        run("mode", None, [[]], [[1.0]])])          # one epoch: nothing to agree with
    adjacent, final = fig.axes
    *_, moe, _, tgr = adjacent.lines                # the last of each method is its thick mean
    # seed 1 keeps (.4 + .2) / 2 = .3 and .7, seed 2 .5 and .9: the mean is .4 and .8
    np.testing.assert_allclose(moe.get_xydata(), [[2, 40], [3, 80]])
    np.testing.assert_allclose(tgr.get_xydata(), [[2, 80], [3, 90]])
    np.testing.assert_allclose(final.lines[2].get_xydata(), [[1, 20], [2, 40], [3, 100]])
    assert [t.get_text() for t in final.get_legend().texts] == ["moe, K=2 (n=2)", "tgr, K=2 (n=1)"]
    assert "90% of tokens" in title(fig) and "tgr" in title(fig).split("60%")[0]


def test_of_many_methods_the_steadiest_and_the_least_steady_are_named():
    def drawn(n):
        # in an order that is not that of their agreement
        rows = [a_row(method=f"m{i}", consistency={
            "first_quarter_agreement_adjacent": 0.05 * i, "agreement_adjacent": [[0.05 * i]],
            "agreement_final": [[0.04 * i, 1.0]]}) for i in sorted(range(n), key=lambda i: i % 4)]
        adjacent, final = report.plot_methods(rows, lambda row: row["method"]).axes
        grey = {round(line.get_ydata()[0]) for line in adjacent.lines if line.get_color() == "0.8"}
        return grey, [text.get_text() for text in final.get_legend().texts]

    grey, said = drawn(9)
    assert not grey and len(said) == 9
    grey, said = drawn(11)
    assert grey == {15, 20, 25, 30, 35} and said[-1] == "the 5 others"
    assert sorted(text.split()[0] for text in said[:-1]) == ["m0", "m1", "m10", "m2", "m8", "m9"]


def test_patches_are_coloured_by_their_expert_row_by_row_and_the_class_token_is_left_out():
    images = np.zeros((1, 3, 8, 8), dtype=np.uint8)
    experts = np.array([5, 0, 0, 1, 1])[None, :, None]  # class token: 5, then a square of 2 * 2
    probs = np.full((1, 5, 6), 0.1)
    probs[0, np.arange(5), experts[0, :, 0]] = [0.5, 0.6, 0.7, 0.8, 0.9]
    fig = report.plot_patches(images, experts, probs, 3)
    _, (_, drawn) = (axis.images for axis in fig.axes)  # the image; then grey with the colours on
    blue, orange = (report.to_rgb(colour) for colour in report.COLOURS[:2])
    rgba = np.asarray(drawn.get_array())
    np.testing.assert_allclose(rgba[..., :3], [[blue, blue], [orange, orange]])
    np.testing.assert_allclose(rgba[..., 3], [[0.6, 0.7], [0.8, 0.9]])
    # 2 of the 4 pairs of neighbours are equal; by chance 1/4 + 1/4
    assert title(fig) == (
        "In block 3, 50% of neighbouring patches share an expert; by chance 50% would")


def test_a_whole_history_of_patches_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="one epoch, please"):
        report.plot_patches(np.zeros((1, 3, 8, 8)), np.zeros((3, 2, 1, 5, 1), dtype=int),
                            np.ones((2, 1, 5, 4)), [3, 5])


def test_the_command_prints_the_table_and_the_pictures_paths_without_a_display(tmp_path):
    a_run(tmp_path / "run", epochs=2, L=1)
    # pyplot is what would look for a display: exit code 1 if anything has imported it
    program = ("import sys, report; sys.argv[1:] = ['run']; report.main(); "
               "sys.exit('matplotlib.pyplot' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, encoding="utf-8",
                          capture_output=True, env=os.environ | {"PYTHONPATH": HERE})
    assert done.returncode == 0 and "test accuracy" in done.stdout
    assert done.stdout.splitlines()[-1] == "run/patches.png"
    assert (tmp_path / "run/patches.png").exists()


@pytest.mark.parametrize("arguments, said", [
    (["nowhere"], "report.py: nowhere/result.json cannot be read: No such file or directory\n"),
    (["--page", "new.md", "nowhere.jsonl"],
     "report.py: nowhere.jsonl cannot be read: No such file or directory\n"),
    (["damaged"], "report.py: a file of damaged is damaged: Expecting property name enclosed in "
                  "double quotes: line 1 column 2 (char 1)\n"),
    (["run"], "report.py: run/loss.png cannot be written (Is a directory): what was there before "
              "is kept\n"),
    (["--page", "README.md", "rows.jsonl"],
     f"report.py: README.md needs one line {report.BEGIN} and, below it, one line {report.END}\n"),
])
def test_a_missing_file_or_marker_or_place_is_one_sentence_and_exit_code_2(
        tmp_path, monkeypatch, capsys, arguments, said):
    a_run(tmp_path / "run", epochs=2, L=1)
    (tmp_path / "run/loss.png").mkdir()
    (tmp_path / "README.md").write_text("no markers", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    (a_run(tmp_path / "damaged") / "result.json").write_text("{", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert (stopped.value.code, capsys.readouterr().err) == (2, said)
    assert not Path("new.md").exists()


def test_a_run_that_has_not_ended_shows_its_curves_so_far(tmp_path, monkeypatch, capsys):
    (a_run(tmp_path / "run", epochs=2, L=1) / "result.json").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "run"])
    report.main()
    assert capsys.readouterr().out.splitlines() == [
        "run has not ended: these are its curves so far", *(
            f"run/{name}.png" for name in ("loss", "load", "agreement", "patches"))]


def test_a_page_that_is_not_there_is_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(a_row()) + "\n", encoding="utf-8")
    for _ in range(2):
        report.write_page("new.md", "rows.jsonl")
        text = Path("new.md").read_text(encoding="utf-8")
        assert text.startswith(f"{report.BEGIN}\n| method") and text.endswith(f"{report.END}\n")
        assert text.count(report.BEGIN) == 1


# --- what is refused ---


IDS, P, NAMES = np.array([[0, 1], [2, 3]]), np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), "abc"
HISTORY = np.zeros((2, 3, 4, 5, 1), dtype=np.uint8)         # (epochs, L, B, N, K), a square of 4
PROBS, PICTURES = np.ones((3, 4, 5, 8)) / 8, np.zeros((2, 3, 8, 8), dtype=np.uint8)


def patches(images=PICTURES, chosen=HISTORY[-1], probs=PROBS, layer=(2, 4, 6)):
    return lambda: report.plot_patches(images, chosen, probs, layer)


REFUSED = [
    *((lambda f=f, b=b: f(IDS, b), "of the same tokens, not") for f in (agreement, overlap)
      for b in (IDS[0], IDS[:1], IDS[:, :1], IDS[None], 0, [])),
    *((lambda f=f: f([], []), r"of the same tokens, not \(0,\) and \(0,\)")
      for f in (agreement, overlap)),
    *((lambda b=b: kappa(IDS, b, 4), "assignment") for b in (IDS[:1], IDS + 1, IDS - 1, [])),
    *((lambda a=a: load_share(a, 4), "an assignment must be 0 to 3, not ")
      for a in (IDS + 1, IDS - 1, [300])),
    *((lambda a=a: load_share(a, 4), "an assignment must hold whole numbers, not ")
      for a in ([], IDS / 1, [0.5], ["a"])),
    *((lambda s=s: load_entropy(np.ones(s)), r"share must be \(E\), not") for s in ((0,), (2, 2))),
    (lambda: last_fluctuation(HISTORY[:0]), r"first must be \(epochs, .*, not \(0, "),
    *((lambda c=c: consistency(c, 8), "chosen must be .*L.*, not ")
      for c in (HISTORY[0], HISTORY[..., 0], HISTORY[None])),
    *((lambda c=c: consistency(c, 8), "an assignment must ")
      for c in (HISTORY[:0], HISTORY + 8, HISTORY / 1, HISTORY.astype(int) - 1)),
    *((lambda f=f, y=y: f(P, y), "labels must ")
      for f in (report.top_k_accuracy, report.calibration_error, lambda p, y:
                report.exam_table(p, y, NAMES))
      for y in ([0], [0, 1, 2], [[0], [1]], [0, 3], [-1, 0], [0.0, 1.0], [])),
    *((lambda f=f, p=p: f(p, [0, 1]), "probs must be ")
      for f in (report.top_k_accuracy, report.calibration_error)
      for p in (P[0], P[None], -P, 2 * P, P * np.nan, np.log(P))),
    *((lambda f=f: f(P[:0], []), "probs must be") for f in (report.top_k_accuracy,
                                                           report.calibration_error)),
    *((lambda k=k: report.top_k_accuracy(P, [0, 1], k), f"k cannot be {k}") for k in (0, -1)),
    *((lambda b=b: report.calibration_error(P, [0, 1], b), f"bins cannot be {b}") for b in (0, -3)),
    *((lambda n=n: report.exam_table(P, [0, 1], n), r"probs must be \(2, ") for n in ("a", "abcd")),
    (lambda: report.plot_loss([], {}), "there are no metrics to draw"),
    (lambda: report.plot_methods([]), "no run has a router and two epochs"),
    *((lambda c=c, l=l: report.plot_load(c, 8, l), "must be ")
      for c, l in ((HISTORY, [2, 4]), (HISTORY[0], [2]), (HISTORY + 8, [2, 4, 6]))),
    (patches(chosen=HISTORY), "one epoch, please"),
    (patches(layer=(2, 4)), "3 layers, probs 3, and 2 are named: one epoch, please"),
    (patches(probs=PROBS[:2]), "3 layers, probs 2, and 3 are named: one epoch, please"),
    (patches(chosen=HISTORY[-1] + 8), "an assignment must be 0 to 7, not 8 to 8"),
    (patches(chosen=HISTORY[-1][:, :, 1:]), r"chosen must be \(3, B, 5, K\), not \(3, 4, 4, 1\)"),
    (patches(chosen=HISTORY[-1][:, :, 1:], probs=PROBS[:, :, 1:]), "4 tokens must be a class tok"),
    (patches(images=PICTURES[:0]), "the 0 images some of the 4 that were routed"),
    (patches(images=np.zeros((5, 3, 8, 8))), "the 5 images some of the 4 that were routed"),
    (patches(images=np.zeros((2, 8, 8, 3))), "images must be .*3, height, width"),
]


@pytest.mark.parametrize("call, sentence", REFUSED)
def test_what_cannot_be_reported_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_list_of_labels_and_whole_numbers_of_any_width_are_as_good_as_an_array():
    labels = np.array([0, 1], dtype=np.uint8)
    assert report.exam_table(P, [0, 1], NAMES) == report.exam_table(P.tolist(), labels, NAMES)
    wide = np.full((2, 1, 1, 1, 1), 299)                    # more experts than a byte can name
    assert load_share(wide, 300)[299] == 1 == consistency(wide, 300)["mean_agreement_adjacent"]


# --- every terminal ---

ROOT = Path(report.__file__).parent
TERMINALS = {name: {"PYTHONIOENCODING": name} for name in ("cp932", "gbk", "ascii")} | {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}}
ASK_ALL = """
import runpy, sys
for command in sys.argv[1:]:
    words = command.split()
    sys.stdout.reconfigure(errors="strict")                 # as the command before found it
    print("--", words[0], flush=True)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (command, end.code)
"""


@pytest.mark.parametrize("terminal", TERMINALS)
def test_no_printed_character_ends_a_command_and_every_file_is_utf_8(tmp_path, terminal):
    run = a_run(tmp_path / "r", router=False)               # whose table has dashes
    commands = [f"report.py {run}", "notebooks/study.py report main", "notebooks/bench.py --help",
                "notebooks/bench.py notebooks/results/kernels_cpu.json",
                "notebooks/regime.py table"]
    if terminal == "C":                                     # where open() itself would read ASCII
        commands.append(f"tests/assignments/course.py release {tmp_path / 'students'}")
    done = subprocess.run([sys.executable, "-c", ASK_ALL, *commands], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | TERMINALS[terminal])
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout.count(b"--") >= len(commands)
