"""Does `python train.py` do what its flags, its help and its files say?

In process, on 64 drawn images and a ViT of 5 tokens: importing torch once costs more than a run.
"""
import csv
import itertools
import json
import math
import re
import shlex
import shutil
import signal
import sys
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import checkpoint

import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.transforms import v2

import kernels
import report
import train
from data import batches, split, square, synthetic
from moe import Output
from train import Config, main, resolve

LOAD, FIGURES = train.load, report.figures
SMALL = synthetic(seed=5, n_train=64, n_test=40)
BASE = ["--epochs", "1", "--batch_size", "16", "--dim", "16", "--depth", "2", "--heads", "2",
        "--patch", "16", "--moe_blocks", "2", "--n_experts", "4", "--probe_images", "8",
        "--train_images", "0"]
RESULT = {"config", "command", "seed", "commit", "versions", "device", "data", "data_md5",
          "test_accuracy", "agreement_adjacent", "agreement_final", "load_entropy",
          "images_per_second", "flops_per_image", "params_total", "params_active", "seconds"}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", lambda *args, **how: SMALL)
    monkeypatch.setattr(report, "figures", lambda out: {})


def run(*flags, out="run", method="moe"):
    """Train with BASE and flags; returns (result, metrics lines, checkpoint)."""
    main([*BASE, "--method", method, "--out", out, *flags])
    return read_run(out)


def read_run(out):
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return (json.loads(Path(out, "result.json").read_text()), lines,
            torch.load(Path(out, "checkpoint.pt"), weights_only=True))


def config(*flags, method="moe"):
    return resolve(train.parse([*BASE, "--method", method, *flags]))


def vit(*flags, method="moe"):
    return train.build(config(*flags, method=method), SMALL)


def first_batch(*flags):
    cfg = config(*flags)
    return next(batches(cfg, SMALL, split(cfg, SMALL), epoch=1))


def terms(*flags, method="moe"):
    """The objective of one fixed batch."""
    cfg = config("--augment", "none", *flags, method=method)
    student = train.build(cfg, SMALL)
    guide = None
    if "tgr" in method:
        torch.manual_seed(1)
        teacher = train.build(config(method="dense"), SMALL)
        guide = train.Guide(teacher, student, cfg.n_experts)
        with torch.no_grad():
            for router in guide.routers.values():
                router.weight.normal_()
    images, targets = next(batches(cfg, SMALL, split(cfg, SMALL), epoch=1))
    return train.losses(cfg, student, guide, images, targets)


def refusal(capsys, *flags):
    """The one sentence that train.py ends with, code 2."""
    return refusal_of(capsys, *BASE, *flags)


def refusal_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


# --- the six methods and what a run leaves behind ---

@pytest.mark.parametrize("method, expected", [
    ("dense", {"task"}), ("soft", {"task"}), ("moe", {"task", "load", "entropy"}),
    ("tgr", {"task", "teacher_load", "teacher_entropy", "guidance"}),
    ("mode", {"task", "load", "entropy", "mutual"}),
    ("tgr+mode", {"task", "teacher_load", "teacher_entropy", "guidance", "mutual"})])
def test_every_method_trains_with_its_own_terms_and_no_other(method, expected):
    result, lines, _ = run("--method", method, method=method)
    assert lines[0]["terms"].keys() == expected
    assert result.keys() >= RESULT and result["method"] == method
    routed = method not in ("dense", "soft")
    assert (result["load_entropy"] is not None) == routed
    assert Path("run/routing.npz").exists() == routed
    assert (result["teacher_accuracy"] is not None) == ("tgr" in method)


def test_two_epochs_have_an_agreement_and_one_has_none():
    assert run("--epochs", "2")[0]["agreement_adjacent"] is not None
    assert run(out="one")[0]["agreement_final"] is None


def test_a_checkpoint_holds_tensors_and_primitives_only_and_the_whole_config():
    result, _, state = run()                                # run() loads with weights_only=True
    assert state["config"] == result["config"] == asdict(Config(**state["config"]))
    assert state["epoch"] == 1 and state["data_md5"] == SMALL.md5


def test_the_figures_are_drawn_into_the_run_folder(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(train, "load", lambda *args, **how: SMALL)
    out = Path("figures")
    try:
        run("--epochs", "2", out=str(out))
        assert {p.name for p in out.glob("*.png")} == {
            "loss.png", "load.png", "agreement.png", "patches.png"}
    finally:
        for file in out.glob("*"):
            file.unlink()
        out.rmdir()


def test_the_first_line_calls_tiny_a_demonstration_and_names_the_data(capsys):
    run()
    first = capsys.readouterr().out.splitlines()[0]
    assert "a demonstration" in first and SMALL.note in first


def test_training_fits_64_images_better_than_chance_could():
    _, lines, _ = run("--epochs", "30", "--lr", "0.01", "--labels", "coarse", "--augment", "none",
                      "--save_every", "30")
    assert lines[-1]["terms"]["task"] < 0.5 * lines[0]["terms"]["task"]


def test_the_test_images_are_looked_at_once_and_with_split_val_never(monkeypatch):
    seen, original = [], train.accuracy

    def watched(model, images, *rest):
        seen.append(len(images))
        return original(model, images, *rest)

    monkeypatch.setattr(train, "accuracy", watched)
    run("--epochs", "3")
    assert seen == [40]
    seen.clear()
    result, lines, _ = run("--epochs", "3", "--split", "val", out="val")
    assert 40 not in seen and len(seen) == 4                # 6 held-out images, and the last look
    assert result["test_accuracy"] is None and result["train_images"] == 58
    assert result["val_accuracy"] == lines[-1]["val_accuracy"]


def test_a_model_is_looked_at_in_evaluation_mode():
    model, cfg = vit("--drop_path", "0.5", "--noise", "5"), config()
    first, second = (next(iter(train.outputs(model.train(), SMALL.train.images, cfg, SMALL)))
                     for _ in range(2))
    assert torch.equal(first.logits, second.logits)


def test_the_recorded_routing_is_that_of_every_token_of_every_probe_image():
    cfg = config("--moe_blocks", "1,2", "--probe_images", "6")
    model, sets = train.build(cfg, SMALL), split(cfg, SMALL)
    seen = train.look(model, sets.probe[0], cfg, SMALL)
    assert torch.equal(seen.logits, model(SMALL.normalise(sets.probe[0])).logits)
    assert seen.chosen.shape == (2, 6, 5, 2) and seen.probs.shape == (2, 6, 5, 4)
    layers = model.eval()(SMALL.normalise(sets.probe[0][3:4])).layers
    for l, block in enumerate((1, 2)):                      # the fourth image, by itself
        assert (seen.chosen[l, 3] == layers[block].routing.chosen.numpy()).all()
        assert (seen.probs[l, 3] - layers[block].routing.probs.detach()).abs().max() < 1e-3


# --- the same run twice, an interrupted run, a spoilt run ---

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_seed_fixes_every_bit_and_another_seed_does_not():
    flags = ["--epochs", "2", "--augment", "heavy", "--drop_path", "0.2", "--noise", "1"]
    states = [run(*flags, "--seed", seed, out=out)[2]["student"]
              for seed, out in (("0", "a"), ("0", "b"), ("1", "c"))]
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_an_interrupted_run_continues_bit_for_bit(monkeypatch, capsys):
    flags = ["--epochs", "3", "--augment", "heavy", "--mixup", "0.8", "--drop_path", "0.2",
             "--noise", "1", "--k", "1"]
    whole_result, whole_lines, whole = run(*flags, method="tgr", out="whole")

    def stop(path, content, original=checkpoint.save):
        if content["config"]["method"] == "tgr" and content["epoch"] == 2:
            raise KeyboardInterrupt                         # its line and routing are there already
        original(path, content)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(checkpoint, "save", stop)
        run(*flags, method="tgr", out="broken")
    assert ended.value.code == 130
    assert "python train.py --resume --out broken" in capsys.readouterr().err
    main(["--resume", "--out", "broken"])
    again = torch.load("broken/checkpoint.pt", weights_only=True)
    assert same(whole["student"], again["student"]) and same(whole["routers"], again["routers"])
    lines = [json.loads(line) for line in Path("broken/metrics.jsonl").read_text().splitlines()]
    assert [line["terms"] for line in lines] == [line["terms"] for line in whole_lines]
    result = json.loads(Path("broken/result.json").read_text())
    assert result["consistency"] == whole_result["consistency"]


def test_a_run_that_is_asked_to_stop_ends_its_step_and_goes_on_bit_for_bit(monkeypatch, capsys):
    flags = ["--epochs", "2", "--augment", "heavy", "--mixup", "0.8", "--drop_path", "0.2",
             "--noise", "1", "--k", "1", "--save_every", "9"]
    whole_result, whole_lines, whole = run(*flags, method="tgr", out="whole")
    capsys.readouterr()
    taken, original = [], train.losses

    def asked(cfg, *rest):
        taken.append(1)
        if len(taken) in (3, 4, 8):                         # amid an epoch, at its end, at all's
            signal.raise_signal(signal.SIGTERM if len(taken) == 3 else signal.SIGINT)
        return original(cfg, *rest)

    monkeypatch.setattr(train, "losses", asked)
    words = [*BASE, *flags, "--method", "tgr", "--out", "it's here"]
    for steps, code, epochs in ((3, 143, 0), (4, 130, 1), (8, 130, 2)):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert len(taken) == steps and ended.value.code == code
        assert len(Path("it's here/metrics.jsonl").read_text().splitlines()) == epochs
        command = capsys.readouterr().err.splitlines()[-1].removeprefix("stopped; to go on: ")
        words = shlex.split(command)[2:]
        assert words == ["--resume", "--out", "it's here"]
    main(words)
    assert len(taken) == 8                                  # each step once
    result, lines, again = read_run("it's here")
    assert same(whole["student"], again["student"]) and same(whole["routers"], again["routers"])
    assert [line["terms"] for line in lines] == [line["terms"] for line in whole_lines]
    assert result["consistency"] == whole_result["consistency"]
    assert result["command"] == shlex.join(["python", "train.py", *BASE, *flags, "--method", "tgr",
                                            "--out", "it's here"])


@pytest.mark.parametrize("where, foretold, seconds", [
    ("say", "about 60 s left", 90),     # after an epoch; the next one, and a look, took 30 s each
    # amid an epoch: two parts of 30 s, then a look of 30 s; two more like this take 3 minutes
    ("losses", "60.0 s  about 3 minutes left", 120)])
def test_what_an_interrupted_run_has_spent_and_will_is_counted_over_all_its_parts(
        where, foretold, seconds, monkeypatch, capsys):
    clock = itertools.count(step=30.0)                      # every look at it is 30 s later
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    original = getattr(train, where)

    def stop(*args):
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, where, stop)
        run("--epochs", "3")
    capsys.readouterr()
    main(["--resume", "--out", "run"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  epoch ")]
    assert said[0].endswith(foretold) and "left" not in said[1]
    assert read_run("run")[0]["seconds"] == seconds


def test_a_resumed_run_scales_its_loss_as_it_did_before():
    cfg = config("--out", "run")
    job = train.Job(cfg, SMALL, split(cfg, SMALL), train.build(cfg, SMALL), None)
    optimizer = torch.optim.AdamW(job.model.parameters())
    before, after = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 65536.0))
    before.scale(torch.ones(()))                            # which is when the scale is made
    Path("run").mkdir()
    state = train.keep(job, train.Progress(), None, optimizer, before)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = True                               # as on another device
    train.resume(job._replace(state=state), None, optimizer, after)
    assert after.get_scale() == 8.0
    assert not any(group["fused"] for group in optimizer.param_groups)


def test_a_run_killed_before_its_first_checkpoint_begins_afresh_and_says_so(capsys):
    main([*BASE, "--method", "moe", "--out", "run", "--resume"])
    assert "no checkpoint in run to resume: the run begins afresh" in capsys.readouterr().out
    Path("half").mkdir()
    Path("half", "metrics.jsonl").write_text("{half a li")
    assert len(run(out="half")[1]) == 1
    assert "was stopped before its first checkpoint: it begins afresh" in capsys.readouterr().out


def test_a_run_has_a_checkpoint_before_its_teacher_is_trained(monkeypatch, capsys):
    def killed(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "one_epoch", killed)
        run(method="tgr")
    assert capsys.readouterr().err.endswith("to go on: python train.py --resume --out run\n")
    main(["--resume", "--out", "run"])
    assert read_run("run")[2]["epoch"] == 1


def test_what_is_missing_or_damaged_of_an_ended_run_is_made_again_from_its_checkpoint(
        monkeypatch, capsys):
    monkeypatch.setattr(report, "figures", lambda out: {"loss.png": b"a picture"})
    run("--epochs", "2")
    files = {path: path.read_bytes() for path in Path("run").iterdir()}
    for name, content in (("metrics.jsonl", b""), ("routing.npz", b"half"), ("result.json", None),
                          ("loss.png", b"a Picture")):
        path = Path("run", name)
        path.unlink() if content is None else path.write_bytes(content)
        capsys.readouterr()
        main(["--resume", "--out", "run"])
        assert f"made again from the checkpoint in run: {name}\n" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in Path("run").iterdir()} == files


def test_a_folder_that_another_process_writes_to_is_refused(capsys):
    with checkpoint.claim("run"):
        assert "is writing to run" in refusal(capsys, "--out", "run")
        assert "is writing to run" in refusal(capsys, "--out", "run", "--resume")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_step_is_taken(
        where, monkeypatch, capsys):
    original, calls = train.losses, []

    def spoilt(cfg, student, *rest):
        calls.append(1)
        found = original(cfg, student, *rest)
        if len(calls) == 6:                                 # the second step of the second epoch
            weight = student.blocks[1].mlp.router.weight
            zero = (weight - weight).sum()
            found["task"] = found["task"] + (torch.nan if where == "loss" else zero.sqrt())
        return found

    monkeypatch.setattr(train, "losses", spoilt)
    with pytest.raises(SystemExit) as stop:
        run("--epochs", "3")
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "lower --lr than 0.002" in said
    assert "epoch 2, step 2" in said and "Traceback" not in said
    assert where == "loss" or "blocks.1.mlp.router.weight" in said
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1 and all(v.isfinite().all() for v in state["student"].values())


@pytest.mark.parametrize("epoch, step, where", [
    (1, 3, "epoch 2, after step 3: "), (2, 0, "after the last step of epoch 2: ")])
def test_weights_that_are_not_finite_are_never_saved(epoch, step, where, monkeypatch, capsys):
    original = train.keep

    def spoilt(job, progress, *rest):
        if (progress.epoch, progress.step) == (epoch, step):
            job.model.head.weight.data[0, 0] = torch.nan
        return original(job, progress, *rest)

    calls = []
    monkeypatch.setattr(train, "keep", spoilt)
    monkeypatch.setattr(train, "losses", lambda *args, losses=train.losses: (
        calls.append(1) or (step and len(calls) == 4 + step and signal.raise_signal(signal.SIGINT))
        or losses(*args)))
    with pytest.raises(SystemExit) as stop:
        run("--epochs", "3")
    said = capsys.readouterr().err
    assert stop.value.code == 1 and where in said
    assert "student.head.weight is not finite, so nothing is saved" in said
    assert checkpoint.read("run/checkpoint.pt", Config)["epoch"] == 1


def test_a_gradient_that_no_loss_scale_makes_finite_ends_the_run(monkeypatch, capsys):
    monkeypatch.setattr(train, "losses", lambda cfg, student, *rest, losses=train.losses: {
        name: term + 0 * student.head.bias[0].sqrt() for name, term in losses(
            cfg, student, *rest).items()})                  # at 0 a root's slope is infinite
    with pytest.raises(SystemExit) as stop:
        run("--precision", "fp16", "--epochs", "9")
    said = capsys.readouterr().err
    # of four steps an epoch: 65,536 is below 0.001 after 26 halvings
    assert stop.value.code == 1 and said.startswith("train.py: epoch 7, step 3: ")
    assert "the gradient of head.bias is not finite" in said


def test_a_router_that_is_not_finite_is_named(monkeypatch, capsys):
    original = train.losses

    def broken(cfg, student, *rest):
        student.blocks[1].mlp.router.weight.data[0, 0] = torch.inf
        return original(cfg, student, *rest)

    monkeypatch.setattr(train, "losses", broken)
    with pytest.raises(SystemExit) as stop:
        run()
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert said.startswith("train.py: epoch 1, step 1: the router of block 2: ")
    assert "the last checkpoint is kept" in said


def test_a_compiled_router_that_is_not_finite_is_named_where_the_loss_is_checked(
        monkeypatch, capsys):
    """So is one on a GPU, where no router waits to look."""
    def broken(losses, compile=torch.compile):
        compiled = compile(losses, backend="eager")

        def spoilt(cfg, student, *rest):
            student.blocks[1].mlp.router.weight.data[0, 0] = torch.inf
            return compiled(cfg, student, *rest)
        return spoilt

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(SystemExit) as stop:
        run("--compile", "--precision", "bf16")
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "epoch 1, step 1: the router of block 2: the logits of" in said
    assert "the last checkpoint is kept" in said and "lower --lr than 0.002" in said
    assert checkpoint.read("run/checkpoint.pt", Config)["epoch"] == 0


# --- a machine that cannot do what is asked ---

HARD = ["--epochs", "2", "--noise", "1", "--drop_path", "0.2", "--augment", "heavy"]


def test_where_torch_compile_fails_it_is_said_and_the_run_is_the_one_that_is_not_compiled(
        monkeypatch, capsys):
    _, whole_lines, whole = run(*HARD, out="whole")

    def no_compiler(graph, inputs):
        raise OSError("there is no C compiler\n\nand much more")

    monkeypatch.setattr(torch, "compile", lambda f, compile=torch.compile: compile(
        f, backend=no_compiler))
    capsys.readouterr()
    result, lines, state = run(*HARD, "--compile")
    said = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert len(said) == 1 and said[0].startswith("torch.compile failed (BackendCompilerFailed: ")
    assert "there is no C compiler; torch 2." in said[0] and "much more" not in said[0]
    assert "report it with this line" in said[0] and said[0].endswith("with --no-compile")
    assert result["config"]["compile"] is state["config"]["compile"] is False
    assert [line["terms"] for line in lines] == [line["terms"] for line in whole_lines]
    assert same(whole["student"], state["student"])


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
def test_where_a_kernel_fails_it_is_said_and_the_run_is_the_one_of_the_grouped_rung(
        monkeypatch, capsys):
    from triton.runtime.errors import OutOfResources
    _, whole_lines, whole = run(*HARD, "--backend", "grouped", method="tgr", out="whole")

    def too_large(*args, **how):                            # in the backward pass
        raise OutOfResources(300_000, 200_000, "shared memory")

    monkeypatch.setattr(kernels, "gemm_dw", too_large)
    capsys.readouterr()
    result, lines, state = run(*HARD, "--backend", "fused", method="tgr")
    said = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert len(said) == 1 and said[0].startswith("--backend fused failed (OutOfResources: out of")
    assert said[0].endswith("goes on with --backend grouped")
    assert result["config"]["backend"] == state["config"]["backend"] == "grouped"
    assert [line["terms"] for line in lines] == [line["terms"] for line in whole_lines]
    assert same(whole["student"], state["student"]) and same(whole["routers"], state["routers"])


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
def test_where_a_kernel_fails_in_a_compiled_step_the_rung_is_given_up_and_not_the_compiler(
        monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda f, compile=torch.compile: compile(
        f, backend="aot_eager"))
    torch._dynamo.reset()

    def too_large(*args, **how):
        from triton.runtime.errors import OutOfResources
        raise OutOfResources(300_000, 200_000, "shared memory")

    monkeypatch.setattr(kernels, "gemm_dw", too_large)
    cfg = config("--backend", "fused", "--compile", "--device", "cpu")
    job = train.Job(cfg, SMALL, split(cfg, SMALL), train.build(cfg, SMALL), None)
    train.rehearsed(job, None, train.losses, train.Progress())
    said = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert len(said) == 1 and said[0].startswith("--backend fused failed (OutOfResources: out of")
    assert (cfg.backend, cfg.compile) == ("grouped", True)
    assert job.model.blocks[1].mlp.backend == "grouped"


def test_a_layer_that_counts_its_steps_counts_no_rehearsal(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)
    cfg = config("--compile", "--device", "cpu")
    job = train.Job(cfg, SMALL, split(cfg, SMALL), train.build(cfg, SMALL), None)
    layer = job.model.blocks[1].mlp
    layer.register_buffer("steps", torch.tensor(3))
    seen = []
    layer.register_forward_hook(lambda m, *_: seen.append(setattr(m, "steps", m.steps + 1)))
    train.rehearsed(job, None, train.losses, train.Progress())
    assert seen and layer.steps == 3


def raised(error, module):
    """The error after it was raised in a function of the module of that name."""
    space = {"__name__": module, "error": error}
    exec("def launch():\n    raise error", space)
    try:
        space["launch"]()
    except Exception as caught:
        return caught


@pytest.mark.parametrize("error, module, theirs", [
    (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "triton.runtime", True),
    (OSError("no space left for the cache"), "torch._inductor.codecache", True),
    (FloatingPointError("nan"), "torch._inductor.codecache", False),
    (torch.OutOfMemoryError("CUDA out of memory"), "torch._inductor.codecache", False),
    (ValueError("T must be more"), "torch._dynamo.eval_frame", False),
    (RuntimeError("our own"), "moe", False)])
def test_a_failure_of_a_compiler_is_told_from_one_of_ours(error, module, theirs):
    assert train.of_a_compiler(raised(error, module)) == theirs


def test_a_failure_of_ours_is_raised_as_it_is_and_not_blamed_on_a_compiler(monkeypatch, capsys):
    def wrong(*args):
        raise ValueError("there are no targets")

    monkeypatch.setattr(train, "losses", wrong)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    with pytest.raises(SystemExit) as stop:
        run("--compile")
    said = capsys.readouterr()
    assert stop.value.code == 2 and "there are no targets" in said.err and "failed" not in said.out


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_too_little_memory_is_one_sentence_that_says_what_to_halve(where, monkeypatch, capsys):
    calls, original = [], train.losses

    def greedy(*args):
        calls.append(1)
        if len(calls) == 6:                                 # in the second epoch
            if where == "gpu":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            torch.empty(2 ** 60, dtype=torch.uint8)
        return original(*args)

    monkeypatch.setattr(train, "losses", greedy)
    with pytest.raises(SystemExit) as stop:
        run("--epochs", "3")
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(said) == 1
    assert said[0].startswith("train.py: out of memory; the last checkpoint is kept")
    assert "--batch_size 8, which halves" in said[0] and "lower --lr than 0.002" in said[0]
    assert "teacher_pixels" not in said[0]
    assert checkpoint.read("run/checkpoint.pt", Config)["epoch"] == 1


def test_a_torchvision_teacher_can_see_fewer_pixels_where_there_is_too_little_memory(
        monkeypatch, capsys):
    torch.save(models.get_model("resnet18", weights=None).state_dict(), "w.pt")

    def greedy(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "losses", greedy)
    with pytest.raises(SystemExit) as stop:
        run("--teacher", "torchvision:resnet18:w.pt", "--teacher_pixels", "96", method="tgr")
    assert stop.value.code == 1 and "or at --teacher_pixels 48" in capsys.readouterr().err


def test_too_little_memory_for_the_images_alone_asks_for_another_device(monkeypatch, capsys):
    monkeypatch.setattr(train, "load", lambda *args, **how: torch.empty(2 ** 60))
    with pytest.raises(SystemExit) as stop:
        run()
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "out of memory; give another --device" in said


def test_another_error_of_torch_is_not_taken_for_too_little_memory(monkeypatch):
    def wrong(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(train, "losses", wrong)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run()


# --- the teacher ---

def test_a_teacher_is_trained_first_kept_and_not_trained_again(monkeypatch, capsys):
    run("--teacher_epochs", "2", method="tgr", out="a")
    kept = list(Path("runs/teachers").glob("*/checkpoint.pt"))
    assert len(kept) == 1 and torch.load(kept[0], weights_only=True)["epoch"] == 2
    stamp = kept[0].stat().st_mtime_ns
    claimed, claim = [], checkpoint.claim
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "claim", lambda folder, **how: claimed.append(folder)
                      or claim(folder, **how))
        run("--teacher_epochs", "2", "--seed", "3", "--k", "1", method="tgr", out="b")
    assert kept[0].stat().st_mtime_ns == stamp              # one teacher for all seeds and methods
    assert claimed == ["b"]                                 # its folder may be read-only by now
    run("--teacher_epochs", "2", "--lr", "0.01", method="tgr", out="c")
    assert len(list(Path("runs/teachers").glob("*/checkpoint.pt"))) == 2


def test_a_teacher_that_another_run_trained_meanwhile_is_taken_as_it_is(capsys):
    planned, job = train.plan(train.parse([*BASE, "--method", "tgr", "--out", "late"]))
    run(method="tgr", out="early")
    kept, = Path("runs/teachers").glob("*/checkpoint.pt")
    stamp = kept.stat().st_mtime_ns
    capsys.readouterr()
    teacher = train.trained(planned, job, "a command")
    assert not planned.ended and teacher.ended and kept.stat().st_mtime_ns == stamp
    assert same(torch.load(kept)["student"], teacher.model.state_dict())
    assert not capsys.readouterr().out


def test_a_given_teacher_is_used_as_it_is_and_learns_nothing(monkeypatch):
    _, _, dense = run(method="dense", out="dense")
    guides, original = [], train.fit
    monkeypatch.setattr(train, "fit", lambda job, guide=None, command="": guides.append(guide)
                        or original(job, guide, command))
    run("--teacher", "dense/checkpoint.pt", method="tgr")
    assert not Path("runs").exists()
    assert same(dense["student"], guides[0].teacher.state_dict())


def test_a_teacher_that_was_half_trained_is_trained_to_its_end(monkeypatch, capsys):
    def stop(cfg, progress, *rest, original=train.say):
        original(cfg, progress, *rest)
        if progress.epoch == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "say", stop)
        run("--teacher_epochs", "3", method="tgr")
    capsys.readouterr()
    main(["--resume", "--out", "run"])
    said = capsys.readouterr().out
    assert "(1 epochs are there)" in said and "epoch   2/3" in said and "epoch   1/3" not in said
    kept, = Path("runs/teachers").glob("*/checkpoint.pt")
    assert torch.load(kept)["epoch"] == 3


def test_a_run_goes_on_with_no_other_teacher_than_it_began_with(capsys):
    run(method="dense", out="dense")
    run("--teacher", "dense/checkpoint.pt", method="tgr", out="tgr")
    state = torch.load("tgr/checkpoint.before.pt")          # before its result was known
    Path("tgr/checkpoint.pt").unlink()
    assert state["result"] is None
    other = torch.load("dense/checkpoint.pt")
    other["student"]["pos"] += 1
    checkpoint.save("dense/checkpoint.pt", other)
    with pytest.raises(SystemExit) as stop:
        main(["--resume", "--out", "tgr"])
    assert stop.value.code == 2 and "began with another teacher" in capsys.readouterr().err


def test_the_plan_names_a_given_teacher_and_says_if_it_saw_other_images(capsys, monkeypatch):
    run("--epochs", "2", method="dense", out="dense")
    run("--teacher", "dense/checkpoint.pt", method="tgr", out="same")
    assert "taught by dense/checkpoint.pt, a dense model trained for 2 epochs; " in (
        capsys.readouterr().out)
    monkeypatch.setattr(train, "load", lambda *args, **how: SMALL._replace(md5="other"))
    run("--teacher", "dense/checkpoint.pt", method="tgr", out="other")
    assert "trained for 2 epochs on other images; " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_a_network_of_torchvision_teaches_and_an_interrupted_run_goes_on_bit_for_bit(
        name, monkeypatch, capsys):
    torch.manual_seed(0)
    torch.save(models.get_model(name, weights=None).state_dict(), "w.pt")
    flags = ["--epochs", "2", "--teacher", f"torchvision:{name}:w.pt", "--teacher_pixels", "48"]
    whole, whole_lines, whole_state = run(*flags, method="tgr", out="whole")
    assert whole["teacher_accuracy"] is None                # its 1,000 classes are not ours
    assert re.search(rf"taught by torchvision:{name}:w.pt at 48 pixels, which costs [\d.e-]+ s a "
                     r"step; then the tgr model", capsys.readouterr().out)
    assert not Path("runs").exists()                        # no teacher is trained
    with monkeypatch.context() as stop, pytest.raises(SystemExit):
        stop.setattr(train, "say", lambda *args, **how: signal.raise_signal(signal.SIGTERM))
        run(*flags, method="tgr")
    main(["--resume", "--out", "run"])
    result, lines, state = read_run("run")
    assert [line["terms"] for line in lines] == [line["terms"] for line in whole_lines]
    assert same(state["student"], whole_state["student"])
    assert same(state["routers"], whole_state["routers"]) and state["routers"]
    assert result["test_accuracy"] == whole["test_accuracy"]


def test_what_a_torchvision_teacher_sees_is_64_pixels_wide_on_a_cpu_unless_asked():
    resnet = "--teacher", "torchvision:resnet18"
    assert config(*resnet).teacher_pixels == 64
    assert config(*resnet, "--teacher_pixels", "96").teacher_pixels == 96
    assert config().teacher_pixels is None


def test_no_student_begins_as_its_teacher(capsys):
    run(method="tgr")
    dense = torch.load(next(Path("runs/teachers").glob("*/checkpoint.pt")), weights_only=True)
    assert dense["config"]["seed"] == train.TEACHERS_SEED
    assert f"--seed {train.TEACHERS_SEED} is the one of the teacher" in refusal(
        capsys, "--method", "tgr", "--seed", str(train.TEACHERS_SEED))
    main(["--eval", str(next(Path("runs/teachers").glob("*/checkpoint.pt")))])


def test_a_student_of_another_seed_starts_from_other_weights_and_methods_share_a_trunk():
    a, b, c = vit(method="moe"), vit(method="tgr"), vit("--seed", "1")
    assert same(a.state_dict(), b.state_dict()) and not same(a.state_dict(), c.state_dict())
    dense = vit(method="dense")
    assert torch.equal(a.blocks[0].mlp.fc_in.weight, dense.blocks[0].mlp.fc_in.weight)


def test_the_teachers_routers_start_from_the_students_seed_whatever_came_before():
    noise = itertools.count(1)

    def drawn(seed):
        teacher, job = train.plan(train.parse([*BASE, "--method", "tgr", "--seed", seed]))
        torch.rand(next(noise))                             # whatever was drawn before
        return train.guide_of(teacher, job).routers["2"].weight

    assert torch.equal(drawn("0"), drawn("0")) and not torch.equal(drawn("0"), drawn("1"))


def test_a_teacher_shares_every_flag_that_is_not_the_students_own():
    flags = ["--lr", "0.01", "--dim", "32", "--labels", "coarse", "--k", "1", "--n_experts", "3",
             "--expert_ratio", "5", "--seed", "4", "--teacher_epochs", "7"]
    teacher, job = train.plan(train.parse([*BASE, "--method", "tgr", *flags]))
    shared = {f.name for f in fields(Config) if not f.metadata["own"]}
    assert all(getattr(teacher.cfg, name) == getattr(job.cfg, name) for name in shared)
    assert (teacher.cfg.method, teacher.cfg.seed, teacher.cfg.epochs) == (
        "dense", train.TEACHERS_SEED, 7)
    assert teacher.model.blocks[1].mlp.fc_in.out_features == 2 * 32     # mlp_ratio, as elsewhere
    assert shared >= {"lr", "data", "augment", "device", "probe_images"} and "k" not in shared


# --- every flag changes what it says ---

def test_a_preset_fills_only_what_was_not_given():
    cfg = resolve({"preset": "small", "depth": 5, "device": "cpu"})
    assert (cfg.depth, cfg.dim, cfg.patch, cfg.epochs) == (5, 192, 4, 100)
    assert resolve(train.parse(["--preset", "tiny", "--device", "cpu"])).dim == 96


def test_data_flags_reach_the_loader(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "load", lambda *args, size: asked.append((*args, size)) or SMALL)
    run("--data", "synthetic", "--data_dir", "elsewhere", "--device", "cpu", "--image_size", "32")
    assert asked == [("synthetic", "elsewhere", "cpu", 32)]


def test_a_model_of_64_pixels_has_64_pixels_and_learns_from_a_folder_of_pictures(
        monkeypatch, capsys):
    monkeypatch.setattr(train, "load", LOAD)
    monkeypatch.setattr(report, "figures", FIGURES)
    for kind, colour in (("cat", 0), ("dog", 200)):
        folder = Path("zoo", kind)
        folder.mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (70, 90), (colour, 10 * i, 0)).save(folder / f"{i}.png")
    result, _, state = run("--data", "folder:zoo", "--image_size", "64", "--epochs", "8",
                           "--batch_size", "6", method="tgr")
    assert result["config"]["data"] == "folder:zoo" and state["student"]["pos"].shape[1] == 17
    assert result["test_accuracy"] == 1.0 and result["train_images"] == 36
    assert next(iter(Path("runs/teachers").iterdir())).name.startswith("tiny-folder-")
    capsys.readouterr()
    main(["--eval", "run/checkpoint.pt"])
    assert "best  " in capsys.readouterr().out
    assert "has no coarse labels" in refusal(capsys, "--data", "folder:zoo", "--labels", "coarse")
    assert {"load.png", "patches.png"} <= {file.name for file in Path("run").iterdir()}


def test_labels_choose_100_or_20_classes():
    assert vit().head.out_features == 100
    assert vit("--labels", "coarse").head.out_features == 20
    sets = split(config("--labels", "coarse"), SMALL)
    assert sets.train[1].max() < 20 and len(sets.train[1]) == 64


def test_train_images_is_how_many_are_trained_on():
    assert run("--train_images", "32")[0]["train_images"] == 32


@pytest.mark.parametrize("flag", ["--mixup", "--cutmix"])
def test_mixing_shares_a_target_between_two_classes(flag):
    assert first_batch("--augment", "none")[1].max(dim=1).values.min() == 1
    assert first_batch(flag, "1.0")[1].max(dim=1).values.min() < 1


@pytest.mark.parametrize("flags, read, expected", [
    (["--dim", "32"], lambda m: m.embed.out_features, 32),
    (["--depth", "3"], lambda m: len(m.blocks), 3),
    (["--heads", "4"], lambda m: m.blocks[0].attn.heads, 4),
    (["--patch", "8"], lambda m: m.n_tokens, 17),
    (["--mlp_ratio", "3"], lambda m: m.blocks[0].mlp.fc_in.out_features, 48),
    (["--mlp_ratio", "3"], lambda m: m.blocks[1].mlp.experts.w_in.shape[2], 48),
    (["--expert_ratio", "5"], lambda m: m.blocks[1].mlp.experts.w_in.shape[2], 80),
    (["--drop_path", "0.3"], lambda m: m.blocks[1].drop_path, 0.3),
    (["--moe_blocks", "1,2"], lambda m: m.moe_blocks, (1, 2)),
    (["--n_experts", "6"], lambda m: len(m.blocks[1].mlp.experts.w_in), 6),
    (["--k", "3"], lambda m: m.blocks[1].mlp.router.k, 3),
    (["--gate", "sigmoid"], lambda m: m.blocks[1].mlp.router.gate, "sigmoid"),
    (["--noise", "1.5"], lambda m: m.blocks[1].mlp.router.noise, 1.5),
    (["--capacity_factor", "1.25"], lambda m: m.blocks[1].mlp.router.capacity_factor, 1.25)])
def test_a_model_flag_shapes_the_model(flags, read, expected):
    assert read(vit()) != expected and read(vit(*flags)) == expected


def test_expert_ratio_widens_the_same_blocks_of_a_dense_model_and_leaves_the_others():
    dense = vit("--expert_ratio", "5", method="dense")
    assert [b.mlp.fc_in.out_features for b in dense.blocks] == [32, 80]


@pytest.mark.parametrize("flag, name, method", [
    ("--load_weight", "load", "moe"), ("--entropy_weight", "entropy", "moe"),
    ("--load_weight", "teacher_load", "tgr"), ("--entropy_weight", "teacher_entropy", "tgr"),
    ("--guide_weight", "guidance", "tgr"), ("--alpha", "mutual", "mode"),
    ("--alpha", "mutual", "tgr+mode")])
def test_a_weight_multiplies_its_own_term_and_no_other(flag, name, method):
    one, three = terms(flag, "1", method=method), terms(flag, "3", method=method)
    for term in one:
        torch.testing.assert_close(three[term], one[term] * (3 if term == name else 1))
    assert one[name] > 0


def test_label_smoothing_is_in_the_task_loss():
    cfg = config("--label_smoothing", "0.2", method="dense")
    logits, targets = torch.randn(7, 100), torch.eye(100)[:7]
    smooth = 0.8 * targets + 0.2 / 100                      # a fifth of every target is spread
    task = train.objective(cfg, Output(logits, {}), targets)["task"]
    torch.testing.assert_close(task, -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean())


def test_guidance_is_the_mean_over_blocks_and_the_teachers_losses_the_sum():
    one = terms("--moe_blocks", "2", "--depth", "3", method="tgr")
    both = terms("--moe_blocks", "2,3", "--depth", "3", method="tgr")
    assert 0.5 < both["guidance"] / one["guidance"] < 1.5
    assert both["teacher_entropy"] / one["teacher_entropy"] > 1.5


def test_blocks_that_nobody_guides_take_no_part_in_the_guidance():
    cfg = config("--moe_blocks", "1,2", "--augment", "none", method="tgr")
    student, teacher = train.build(cfg, SMALL), vit(method="dense")
    images, targets = next(batches(cfg, SMALL, split(cfg, SMALL), epoch=1))
    each = {}
    for blocks in ({1: 2}, {2: 1}, {1: 2, 2: 1}):
        torch.manual_seed(1)
        guide = train.Guide(teacher, student, cfg.n_experts, blocks)
        with torch.no_grad():
            for b, router in guide.routers.items():
                router.weight.normal_(generator=torch.Generator().manual_seed(int(b)))
        each[len(blocks), min(blocks)] = train.losses(cfg, student, guide, images, targets)[
            "guidance"]
    torch.testing.assert_close(each[2, 1], (each[1, 1] + each[1, 2]) / 2)
    assert each[1, 1] > 0 < each[1, 2]


def test_guide_until_ends_the_guidance_there():
    _, lines, _ = run("--epochs", "4", "--guide_until", "0.5", method="tgr")
    assert ["guidance" in line["terms"] for line in lines] == [True, True, False, False]


def test_guide_tokens_chooses_which_tokens_are_guided():
    values = {terms("--guide_tokens", t, method="tgr")["guidance"].item()
              for t in ("all", "class", "patches")}
    assert len(values) == 3


def test_a_study_may_bring_a_loss_of_its_own_which_is_trained_printed_and_drawn(capsys):
    _, job = train.plan(train.parse([*BASE, "--method", "moe", "--out", "own"]))
    before = job.model.head.weight.abs().sum().item()

    def shrink(cfg, model, *rest):
        return {"task": train.losses(cfg, model, *rest)["task"],
                "small_head": 100 * model.head.weight.square().sum()}

    train.fit(job, own_losses=shrink)
    assert job.model.head.weight.abs().sum().item() < before
    line = json.loads(Path("own/metrics.jsonl").read_text())
    assert line["terms"].keys() == {"task", "small_head"}
    assert f"small_head {line['terms']['small_head']:.4f}" in capsys.readouterr().out
    labels = report.plot_loss([line], {}).axes[1].get_legend_handles_labels()[1]
    assert labels == ["small head"]


def test_with_a_capacity_the_share_of_dropped_choices_is_said(capsys):
    # an expert accepts ceil(0.5 * 2 * T / 4), so at most half of the choices; some experts get less
    _, lines, _ = run("--capacity_factor", "0.5")
    assert 0.5 <= lines[0]["dropped"] < 1
    assert f"dropped {lines[0]['dropped']:.1%}" in capsys.readouterr().out
    assert "dropped" not in run(out="free")[1][0]


def test_the_first_epoch_says_how_long_the_rest_will_take(monkeypatch, capsys):
    clock = itertools.count(step=30.0)                      # every look at it is 30 s later
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    _, lines, _ = run("--epochs", "3")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  epoch ")]
    # training took 30 s and looking at the model another 30; two more epochs will take 2 minutes
    assert said[0].endswith("30.0 s  about 2 minutes left")
    assert not any("left" in line for line in said[1:])
    assert [line["seconds"] for line in lines] == [30] * 3


def test_epochs_and_batch_size_count_passes_and_steps(monkeypatch):
    steps, original = [], train.losses
    monkeypatch.setattr(train, "losses", lambda *a: steps.append(len(a[3])) or original(*a))
    _, lines, _ = run("--epochs", "3", "--batch_size", "24")
    assert len(lines) == 3 and steps == [24] * 6            # 64 = 24 + 24 + 16 left for next time


def test_a_warm_up_may_outlast_a_teacher_that_nobody_trains():
    assert config("--epochs", "5", "--warmup_epochs", "3", "--teacher_epochs", "2").epochs == 5


def test_the_learning_rate_warms_up_to_lr_and_ends_at_zero():
    cfg = config("--lr", "0.3", "--epochs", "10", "--warmup_epochs", "2")
    rates = [train.learning_rate(cfg, progress) for progress in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.15, 0.3, 0.15, 0], abs=1e-12)


def test_weight_decay_pulls_on_matrices_and_on_nothing_else():
    model = vit("--weight_decay", "0.7")
    decayed, free = train.parameter_groups(model, None, 0.7)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.7, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in (decayed, free))
    assert {"blocks.1.mlp.experts.w_in", "blocks.1.mlp.router.weight", "head.weight"} <= decayed
    assert {"blocks.1.mlp.experts.b_in", "pos", "cls", "blocks.0.norm1.weight", "head.bias"} <= free
    assert len(decayed) + len(free) == len(names)


def test_clip_is_the_largest_norm_of_a_step(monkeypatch):
    asked, original = [], torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_",
                        lambda p, most, norm: asked.append(most) or original(p, most, norm))
    run("--clip", "0.25")
    assert set(asked) == {0.25}


def test_weight_decay_flag_reaches_the_optimiser():
    state = run("--weight_decay", "0.7")[2]["optimizer"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.7, 0.0]


def test_precision_changes_the_arithmetic_and_not_the_router():
    cfg = config("--precision", "bf16")
    images, _ = first_batch()
    plain, rough = (next(iter(train.outputs(vit(), SMALL.train.images[:16], c, SMALL)))
                    for c in (config(), cfg))
    assert plain.logits.dtype == torch.float32 and rough.logits.dtype == torch.bfloat16
    assert rough.layers[2].routing.logits.dtype == torch.float32
    torch.testing.assert_close(rough.logits.float(), plain.logits, atol=0.05, rtol=0.05)
    assert run("--precision", "bf16", "--mixup", "0.5")[0]["config"]["precision"] == "bf16"
    assert images.dtype == torch.float32


def test_compile_compiles_the_losses_and_is_off_on_a_cpu(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f.__name__) or f)
    run()
    run(method="dense", out="dense")
    assert not compiled
    clock = itertools.count(step=30.0)                      # every look at it is 30 s later
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    result, *_ = run("--compile", out="compiled")
    assert compiled == ["losses"] and result["config"]["compile"]
    assert result["seconds"] == 60                          # compiling takes its time too


def test_the_backend_that_is_asked_for_computes_the_experts_and_a_checkpoint_runs_without_it(
        monkeypatch, capsys):
    asked = []
    for name, rung in kernels.BACKENDS.items():
        monkeypatch.setitem(kernels.BACKENDS, name, lambda *a, name=name, rung=rung: (
            asked.append(name), rung(*a))[1])
    run("--backend", "lean")
    assert set(asked) == {"lean"}
    asked.clear()
    main(["--eval", "run/checkpoint.pt"])                   # perhaps on another machine
    assert set(asked) == {"grouped"}
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(SystemExit) as ended:
        run("--backend", "fused", out="never")
    assert ended.value.code == 2 and not Path("never").exists()
    assert "the tensors are on the cpu" in capsys.readouterr().err


def test_save_every_counts_epochs_between_checkpoints(monkeypatch):
    saved, original = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda p, c: saved.append(c["epoch"]) or original(p, c))
    run("--epochs", "5", "--save_every", "2")
    assert saved == [0, 2, 4, 5, 5]                         # its first weights; its result


def test_without_out_a_run_never_overwrites_another():
    main([*BASE, "--method", "dense"])
    main([*BASE, "--method", "dense"])
    assert {p.name for p in Path("runs").iterdir()} == {
        "dense-tiny-synthetic-seed0", "dense-tiny-synthetic-seed0-2"}


def test_eval_tests_a_checkpoint_class_by_class(capsys):
    result, _, _ = run("--labels", "coarse")
    capsys.readouterr()
    main(["--eval", "run/checkpoint.pt"])
    said = capsys.readouterr().out
    assert f"accuracy {result['test_accuracy']:.2%}" in said
    assert "calibration error" in said and "worst" in said and "block 2" in said


def test_eval_refuses_images_that_are_not_the_ones_of_the_training(capsys, monkeypatch):
    run()
    monkeypatch.setattr(train, "load", lambda *args, **how: SMALL._replace(md5="other"))
    assert "run/checkpoint.pt was trained on other images: its data had the md5" in refusal_of(
        capsys, "--eval", "run/checkpoint.pt")


# --- a model leaves ---

def shots(folder, n=3):
    """A folder of pictures that no model has seen, of two sizes."""
    for i in range(n):
        file = Path(folder, f"{i % 2}", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        v2.functional.to_pil_image(SMALL.test.images[i]).resize((32 + 8 * i, 32)).save(file)
    return sorted(Path(folder).rglob("*.png"))


def no_pictures(*args, **how):
    raise AssertionError("a model that leaves needs no data set")


@pytest.mark.parametrize("method", ["tgr", "dense"])
def test_the_pictures_of_a_folder_are_classified_and_who_saw_which_patch_is_drawn(
        method, capsys, monkeypatch):
    run(method=method)
    files = shots("shots")
    monkeypatch.setattr(train, "load", no_pictures)
    capsys.readouterr()
    seen_by, draw = [], report.plot_patches
    monkeypatch.setattr(report, "plot_patches", lambda images, chosen, *rest: (
        seen_by.append((images, chosen)), draw(images, chosen, *rest))[1])
    main(["--eval", "run/checkpoint.pt", "--images", "shots"])
    said = capsys.readouterr().out.splitlines()
    model, cfg, data = train.load_model("run/checkpoint.pt")
    assert not model.training
    x = torch.stack([square(file, 32) for file in files])
    with torch.no_grad():
        probs = model(data.normalise(x)).logits.softmax(dim=1)
    rows = list(csv.reader(Path("run/pictures/pictures.csv").read_text().splitlines()))
    assert rows[0] == ["file", "class", "confidence"] and len(rows) == 4
    for file, row, p, line in zip(files, rows[1:], probs, said, strict=False):
        assert row[0] == file.relative_to("shots").as_posix()
        assert row[1] == SMALL.fine_names[p.argmax()]
        assert float(row[2]) == pytest.approx(p.max().item(), abs=1e-6)
        assert line == f"{row[0]}: {row[1]} {p.max():.1%}"
    drawn = {"0000-0.png", "0001-2.png", "0002-1.png"} if method == "tgr" else set()
    chosen = train.look(model, x, cfg, data).chosen
    for i, (picture, its) in enumerate(seen_by):
        assert (picture == x[i].numpy()).all() and (its == chosen[:, i:i + 1].numpy()).all()
    assert len(seen_by) == len(drawn)
    assert {file.name for file in Path("run/pictures").iterdir()} == {"pictures.csv", *drawn}
    assert ("beside it" in said[-1]) == bool(drawn)


def test_a_teacher_of_other_images_sees_them_as_it_learned_to():
    theirs = SMALL._replace(mean=(0.1, 0.2, 0.3), std=(0.05, 0.1, 0.4))
    dense = vit(method="dense")
    torch.nn.init.normal_(dense.embed.bias)
    x = SMALL.test.images[:3]
    meant = dense(theirs.normalise(x)).logits
    before = dense.embed.weight.clone()
    train.restandardise(dense, SMALL.mean, SMALL.std, SMALL)
    assert torch.equal(dense.embed.weight, before)          # it learned from these
    train.restandardise(dense, theirs.mean, theirs.std, SMALL)
    torch.testing.assert_close(dense(SMALL.normalise(x)).logits, meant, rtol=1e-4, atol=1e-4)


def test_a_teachers_checkpoint_says_how_its_images_were_standardised():
    _, _, state = run(method="dense", out="dense")
    twice = tuple(2 * s for s in SMALL.std)
    checkpoint.save(Path("other.pt"), state | {"shown": state["shown"] | {"std": twice}})
    for file, factor in (("dense/checkpoint.pt", 1.0), ("other.pt", 0.5)):
        teacher, _ = train.plan(train.parse([*BASE, "--method", "tgr", "--teacher", file]))
        torch.testing.assert_close(teacher.model.embed.weight.detach(),
                                   factor * state["student"]["embed.weight"])


def test_what_was_seen_on_pictures_is_never_mixed_with_what_is_seen_on_others(capsys):
    run()
    shots("shots", n=2)
    shots("one", n=1)
    main(["--eval", "run/checkpoint.pt", "--images", "shots"])
    before = {file: file.read_bytes() for file in Path("run/pictures").iterdir()}
    main(["--eval", "run/checkpoint.pt", "--images", "one"])
    assert {p.name for p in Path("run/pictures-2").iterdir()} == {"pictures.csv", "0000-0.png"}
    with pytest.raises(SystemExit):
        main(["--eval", "run/checkpoint.pt", "--images", "one", "--out", "run/pictures"])
    assert "run/pictures already holds what was seen on pictures" in capsys.readouterr().err
    assert len(before) == 3 and before == {
        file: file.read_bytes() for file in Path("run/pictures").iterdir()}


@pytest.mark.parametrize("flags, words", [
    (["--images", "shots"], "--images needs --eval"), (["--export", "m.pt2"], "needs --eval"),
    (["--eval", "run/checkpoint.pt", "--images", "nowhere"], "--images nowhere holds no pictures"),
    (["--eval", "run/checkpoint.pt", "--images", "broken"], "--images broken: .*x.png"),
    (["--eval", "run/checkpoint.pt", "--export", "m.onnx"], "must end in .safetensors or .pt2"),
    (["--eval", "run/checkpoint.pt", "--images", "shots", "--k", "2"], "was trained with --k 1"),
    (["--config", "nowhere.json"], "--config needs the result.json of a run"),
    (["--config", "shots/x.json"], "--config needs the result.json of a run"),
    (["--config", "shots/y.json"], "its k cannot be '2'"),
    (["--config", "shots/z.json"], "its method cannot be 'best'"),
    (["--config", "run/result.json", "--preset", "small"], "has the numbers of preset tiny: leave"),
    (["--eval", "run/checkpoint.pt", "--images", "shots", "--export", "x.pt2"],
     "--images and --export are two commands"),
    (["--config", "shots/e.json"], "needs the result.json of a run"),
    (["--eval", "run/checkpoint.pt", "--export", "m.safetensors", "--k", "4"], "--k 1, not 4"),
    (["--eval", "run/checkpoint.pt", "--export", "m.pt2", "--backend", "lean"],
     "m.pt2 is for any machine: leave --backend out"),
    (["--eval", "."], "is no checkpoint but a folder: name the file in it"),
    (["--device", "cpu:1"], "--device cpu:1 is not one that train.py knows")])
def test_what_cannot_leave_is_one_sentence(flags, words, capsys):
    run("--k", "1")
    shots("shots")
    Path("shots/x.json").write_text('{"config": {"colour": 3}}')
    repeated = json.loads(Path("run/result.json").read_text())["config"]
    Path("shots/e.json").write_text('{"config": {}}')
    for name, odd in (("y", {"k": "2"}), ("z", {"method": "best"})):
        Path(f"shots/{name}.json").write_text(json.dumps({"config": repeated | odd}))
    Path("broken").mkdir()
    Path("broken/x.png").write_text("no picture")
    with pytest.raises(SystemExit) as stop:
        main(flags)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and re.search(words, said)


def test_a_model_leaves_for_any_number_of_images_with_every_expert(monkeypatch):
    run("--n_experts", "5", "--k", "2", method="mode")
    monkeypatch.setattr(train, "load", no_pictures)
    main(["--eval", "run/checkpoint.pt", "--export", "m.pt2"])
    exported = torch.export.load("m.pt2")
    model, _, data = train.load_model("run/checkpoint.pt")
    assert [v.shape[0] for name, v in exported.state_dict.items() if name.endswith("w_in")] == [5]
    for n in (1, 2, 9):
        x = torch.rand(n, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(x), model(data.normalise(x)).logits,
                                       rtol=1e-5, atol=1e-5)


def test_a_model_with_a_capacity_leaves_too(monkeypatch):
    run("--k", "2", "--capacity_factor", "0.7")
    monkeypatch.setattr(train, "load", no_pictures)
    main(["--eval", "run/checkpoint.pt", "--export", "m.pt2"])
    exported = torch.export.load("m.pt2").module()
    model, _, data = train.load_model("run/checkpoint.pt")
    for n in (1, 3, 8):
        x = torch.rand(n, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), model(data.normalise(x)).logits, rtol=1e-5,
                                       atol=1e-5)


def test_a_model_leaves_by_safetensors_and_comes_back(capsys, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    _, _, state = run("--n_experts", "5")
    main(["--eval", "run/checkpoint.pt", "--export", "m.safetensors"])
    assert same(safetensors.load_file("m.safetensors"), state["student"])
    tests = []
    for path in ("run/checkpoint.pt", "m.safetensors"):
        capsys.readouterr()
        main(["--eval", path])
        tests.append(capsys.readouterr().out.replace(path, ""))
    assert tests[0] == tests[1]
    Path("m.safetensors").write_bytes(Path("m.safetensors").read_bytes()[:-9])
    assert "m.safetensors is damaged" in refusal(capsys, "--eval", "m.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in refusal(capsys, "--eval", "m.safetensors")


def test_the_snippet_in_the_readme_says_what_a_picture_shows_and_who_served_it(capsys):
    run(method="tgr")
    readme = Path(train.__file__).with_name("README.md").read_text(encoding="utf-8")
    snippet, = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    v2.functional.to_pil_image(SMALL.test.images[0]).save("cat.jpg")
    capsys.readouterr()
    exec(snippet.replace("runs/NAME", "run"), {})
    said = capsys.readouterr().out
    assert any(said.startswith(name) for name in SMALL.fine_names) and said.count("[") == 5 + 1


def test_a_checkpoint_that_does_not_know_its_classes_is_refused_in_a_sentence():
    _, _, state = run()
    checkpoint.save(Path("old.pt"), {name: v for name, v in state.items() if name != "shown"})
    with pytest.raises(ValueError, match=r"another version of train\.py: it has no 'shown'"):
        train.load_model("old.pt")


def test_a_run_is_repeated_from_its_result_but_for_the_flags_given():
    _, _, state = run("--lr", "0.003", "--n_experts", "5", method="mode")
    main(["--config", "run/result.json", "--out", "again"])
    assert same(read_run("again")[2]["student"], state["student"])
    main(["--config", "run/result.json", "--out", "other", "--seed", "1"])
    config = read_run("other")[0]["config"]
    assert (config["seed"], config["lr"], config["n_experts"]) == (1, 0.003, 5)


def test_every_flag_is_named_in_these_tests():
    source = Path(__file__).read_text()
    assert [f.name for f in fields(Config) if f'"--{f.name}"' not in source] == []


# --- bad input gets one sentence and code 2 ---

@pytest.mark.parametrize("flags, words", [
    (["--no_such_flag", "1"], "no_such_flag"),
    (["--meth", "moe"], "--meth"),                          # half a flag is no flag
    (["--method", "magic"], "magic"),
    (["--k", "9"], "9 of 4 experts"),
    (["--k", "0"], "--k 0 is out of range"),
    (["--heads", "3"], "3 heads"),
    (["--patch", "5"], "patches of 5"),
    (["--moe_blocks", "7"], "moe_blocks cannot be [7]: choose from [1, 2]"),
    (["--moe_blocks", "two"], "5,7,9"),
    (["--moe_blocks", ""], "at least one block"),
    (["--moe_blocks", "2,1,2"], "names a block twice"),
    (["--train_images", "65"], "has 64 to train on"),
    (["--batch_size", "65"], "more than the 64"),
    (["--epochs", "0"], "--epochs"),
    (["--device", "cuda"], "--device cpu"),
    (["--device", "mps"], "no MPS device"),
    (["--device", "abacus"], "no device 'abacus'"),
    (["--device", "meta"], "choose cpu, cuda or mps"),
    (["--clip", "nan"], "--clip nan is out of range: choose a number above 0"),
    (["--drop_path", "1"], "--drop_path 1.0 is out of range: choose a number at least 0 and below"),
    (["--lr", "inf"], "--lr inf"),
    (["--train_images", "-5"], "--train_images -5"),
    (["--seed", "9223372036854775807"], "--seed 9223372036854775807 is out of range"),
    (["--mixup", "0.001"], "--mixup 0.001 is too small for the draw"),
    (["--cutmix", "0.009"], "--cutmix 0.009 is too small for the draw"),
    (["--warmup_epochs", "1"], "--warmup_epochs 1 must be below --epochs 1"),
    (["--method", "tgr", "--warmup_epochs", "3", "--epochs", "4", "--teacher_epochs", "2"],
     "must be below --teacher_epochs 2"),
    (["--expert_ratio", "0.01"], "leaves no hidden unit"),
    (["--seed=--"], "--seed"),
    (["--moe_blocks=--"], "--moe_blocks"),
    (["--eval", ""], "--eval is empty"),
    (["--teacher", ""], "--teacher is empty"),
    (["--out", ""], "--out is empty"),
    (["--resume", "--out", ""], "--out is empty"),
    (["--data_dir", ""], "--data_dir is empty"),
    (["--out", "/dev/null"], "/dev/null cannot be used"),
    (["--resume"], "--out"),
    (["--eval", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["--teacher", "nowhere.pt"], "no checkpoint at nowhere.pt")])
def test_a_bad_flag_is_refused_in_one_sentence(flags, words, capsys):
    if "--device" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert words in refusal(capsys, *flags)


@pytest.mark.parametrize("field", [f for f in fields(Config) if f.metadata["bounds"]],
                         ids=lambda f: f.name)
def test_every_number_has_bounds_and_what_lies_outside_is_refused_by_name(field, capsys):
    bounds = field.metadata["bounds"]
    outside = [bounds[word] - 1 for word in ("at_least", "above") if word in bounds]
    outside += [bounds[word] for word in ("above", "below") if word in bounds]
    outside += [bounds[word] + 1 for word in ("at_most", "below") if word in bounds]
    outside += [math.nan, math.inf, -math.inf] if field.type is float else [10**30, -10**30]
    for value in map(field.type, outside):
        if field.type is int and not ("at_most" in bounds or value < bounds["at_least"]):
            continue                                        # an int may be as large as it likes
        said = refusal(capsys, f"--{field.name}={value}")
        assert f"--{field.name} {value} is out of range" in said
    assert not list(Path().iterdir())


def test_every_number_that_can_be_given_has_bounds():
    assert [f.name for f in fields(Config) if f.type in (int, float) and not f.metadata["bounds"]
            ] == []


def test_a_build_of_torch_without_cuda_is_told_apart_from_a_machine_without_a_gpu(
        capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, words in ((None, "this build of torch has no CUDA"), ("13.0", "no CUDA device")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert words in refusal(capsys, "--device", "cuda")


def test_what_a_checkpoint_fixes_is_not_changed_by_a_flag(capsys):
    run("--k", "1")
    for flag, value, its in (("--k", "2", "1"), ("--gate", "sigmoid", "softmax_topk"),
                             ("--capacity_factor", "0.5", "None"), ("--n_experts", "8", "4")):
        for words in (["--eval", "run/checkpoint.pt"], ["--resume", "--out", "run"]):
            with pytest.raises(SystemExit) as stop:
                main([*words, flag, value])
            said = capsys.readouterr().err
            assert stop.value.code == 2 and f"with {flag} {its}, not {value}" in said
    main(["--resume", "--out", "run", "--data", "auto", "--precision", "auto", "--k", "1"])
    main(["--eval", "run/checkpoint.pt", "--data", "auto", "--k", "1"])


def test_a_checkpoints_word_makes_no_folder_and_downloads_nothing(capsys, monkeypatch):
    run(out="run")
    for name in ("checkpoint.pt", "checkpoint.before.pt"):
        state = torch.load(f"run/{name}")
        state["config"] |= {"data": "cifar100", "data_dir": "elsewhere"}
        Path("run", name).write_bytes(checkpoint.seal(state))
    import data
    monkeypatch.setattr(train, "load", data.load)
    monkeypatch.setattr(data, "download", lambda *args: pytest.fail("a download"))
    with pytest.raises(SystemExit) as stop:
        main(["--eval", "run/checkpoint.pt"])
    assert stop.value.code == 2 and "is not in data/: say where with" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["run"]


def test_an_unreadable_data_folder_is_refused_in_one_sentence(capsys, monkeypatch):
    import data
    monkeypatch.setattr(train, "load", data.load)
    Path("file").write_text("not a folder")
    assert "--data_dir" in refusal(capsys, "--data", "cifar100", "--data_dir", "file")


def test_a_folder_that_holds_a_run_is_not_overwritten(capsys):
    run()
    assert "--resume" in refusal(capsys, "--out", "run")
    for path in Path("run").glob("checkpoint*"):
        path.unlink()
    assert "a result, whose checkpoint is gone" in refusal(capsys, "--out", "run")


def test_a_checkpoint_of_another_shape_is_refused_in_one_sentence(capsys):
    run()
    assert "--dim 16, not 32" in refusal(capsys, "--resume", "--out", "run", "--dim", "32",
                                         "--method", "moe")
    _, _, state = run(method="dense", out="large")
    state["config"]["image_size"], state["student"]["pos"] = 64, torch.zeros(1, 17, 16)
    checkpoint.save("large/checkpoint.pt", state)
    assert "give both the same --image_size" in refusal(capsys, "--teacher", "large/checkpoint.pt")
    assert "a teacher is dense" in refusal(capsys, "--teacher", "run/checkpoint.pt")
    state = torch.load("run/checkpoint.pt", weights_only=True)
    state["student"]["pos"] = torch.zeros(1, 9, 16)
    checkpoint.save("run/checkpoint.pt", state)
    assert "another shape" in refusal(capsys, "--eval", "run/checkpoint.pt")


def test_a_damaged_checkpoint_is_refused_in_one_sentence(capsys):
    run()
    for path in Path("run").glob("checkpoint*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert "damaged" in refusal(capsys, "--eval", "run/checkpoint.pt")


def test_a_run_is_not_continued_on_other_images(capsys, monkeypatch):
    run()
    monkeypatch.setattr(train, "load", lambda *args, **how: SMALL._replace(md5="other"))
    with pytest.raises(SystemExit):
        main(["--resume", "--out", "run"])
    assert "other images" in capsys.readouterr().err


@pytest.mark.parametrize("method, flags, idle", [
    ("moe", ["--alpha", "7", "--teacher=none", "--k", "1"], "teacher, --alpha"),
    ("dense", ["--k", "1", "--guide_weight", "-0"], "guide_weight, --k, --n_experts"),
    ("soft", ["--gate", "sigmoid", "--backend", "lean"], "gate, --backend"),
    ("mode", ["--k", "1", "--alpha", "1"], None)])
def test_a_flag_that_its_method_does_not_use_is_named(method, flags, idle, capsys):
    run(*flags, method=method)
    said = [line for line in capsys.readouterr().out.splitlines() if "not used" in line]
    assert said == ([f"not used by --method {method}: --{idle}"] if idle else [])


def test_flags_that_a_method_does_not_use_do_not_end_its_run():
    for method in ("dense", "soft"):
        _, lines, _ = run("--capacity_factor", "1", method=method, out=method)
        assert "dropped" not in lines[0]


def test_a_presets_number_of_images_is_a_ceiling_and_a_given_one_is_not(capsys):
    flags = [*BASE[:BASE.index("--train_images")], "--method", "dense"]
    main([*flags, "--split", "val", "--out", "all"])        # tiny's 10,000 of 64
    assert read_run("all")[0]["train_images"] == 58
    assert "has 58 to train on" in refusal_of(capsys, *flags, "--split", "val", "--train_images",
                                              "59")


def test_a_teacher_that_knows_the_held_out_images_is_refused(capsys):
    for name, its in (("all", []), ("val", ["--split", "val"]), ("few", ["--train_images", "58"])):
        run(*its, method="dense", out=name)
    tgr = ["--method", "tgr", "--k", "1", "--split", "val", "--teacher"]
    assert "all/checkpoint.pt has learned the images that --split val holds out" in refusal(
        capsys, *tgr, "all/checkpoint.pt")
    for name in ("val", "few"):                             # 58 of 64, and the same ones
        main([*BASE, *tgr, f"{name}/checkpoint.pt", "--out", f"by-{name}"])
        assert read_run(f"by-{name}")[0]["teacher_accuracy"] is not None


def test_a_run_that_has_ended_is_read_without_its_teacher(capsys):
    run(method="dense", out="teacher")
    result, *_ = run("--k", "1", "--teacher", "teacher/checkpoint.pt", method="tgr")
    shutil.rmtree("teacher")
    shutil.rmtree("runs", ignore_errors=True)
    capsys.readouterr()
    main(["--resume", "--out", "run"])
    assert f"{result['test_accuracy']:.1%}" in capsys.readouterr().out and not Path("runs").exists()


def test_a_folder_that_has_moved_is_known_by_its_pictures(monkeypatch):
    for kind in ("cat", "dog"):
        shots(f"pictures/{kind}", n=12)
    monkeypatch.setattr(train, "load", LOAD)
    main([*BASE, "--method", "dense", "--data", "folder:pictures", "--batch_size", "4", "--out",
          "run"])
    Path("pictures").rename("moved")
    main(["--eval", "run/checkpoint.pt", "--data", "folder:moved"])
    main(["--resume", "--out", "run", "--data", "folder:moved/"])
    taught = [*BASE, "--method", "tgr", "--batch_size", "4", "--data"]
    main([*taught, "folder:moved", "--out", "first"])
    Path("moved").rename("back")
    teacher, _ = train.plan(train.parse([*taught, "folder:back", "--out", "second"]))
    assert teacher.ended                                    # it is not trained again


def test_a_student_does_not_wait_for_itself(capsys):
    run("--k", "1", method="tgr", out="first")
    folder, = Path("runs/teachers").iterdir()
    shutil.rmtree(folder)
    assert "is the folder of this run's teacher" in refusal(
        capsys, "--method", "tgr", "--k", "1", "--out", str(folder))


def test_a_folder_of_your_own_pictures_is_trained_on_whole():
    assert resolve(train.parse(["--data", "folder:shots"])).train_images == 0
    assert resolve(train.parse(["--data", "folder:shots", "--train_images", "9"])).train_images == 9
    assert resolve(train.parse(["--data", "synthetic", "--preset", "tiny"])).train_images == 10_000


def test_a_flag_that_there_is_not_is_named(capsys):
    run()
    with pytest.raises(ValueError, match="there is no flag --precission"):
        train.load_model("run/checkpoint.pt", precission="fp32")


def test_the_help_names_every_flag_with_a_line_of_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert all(f"--{f.name}" in said and f.metadata["help"].split("%")[0] in said
               for f in fields(Config))


def test_one_expert_per_token_and_mutual_distillation_warns_once_and_the_plan_says_so(capsys):
    import distill
    distill._warn_that_one_expert_is_alone.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, lines, _ = run("--k", "1", "--epochs", "2", method="mode")
    assert sum("nobody to learn from" in str(w.message) for w in caught) == 1
    assert all(line["terms"]["mutual"] == 0 for line in lines)
    assert "its mutual distillation is 0" in capsys.readouterr().out
    run(method="mode", out="two")
    assert "is 0" not in capsys.readouterr().out
