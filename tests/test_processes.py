"""Do several processes, as torchrun starts them, train the model that one trains?

Real processes with gloo on this machine, on the 64 drawn images of test_train.py.
"""
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import checkpoint

import pytest
import torch

import report
import train
from data import synthetic
from router import balance_loss, load_loss

ROOT = Path(__file__).parent.parent
SMALL = synthetic(seed=5, n_train=64, n_test=40)
BASE = ["--batch_size", "18", "--dim", "16", "--depth", "2", "--heads", "2", "--patch", "16",
        "--moe_blocks", "1,2", "--n_experts", "4", "--probe_images", "8", "--train_images", "0",
        "--epochs", "2", "--device", "cpu", "--load_weight", "9"]

# A process that has imported torch once and starts the others by fork, where the system can.
FORKED = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
FORKED.set_forkserver_preload(["train", "report", "data", "pytest"])


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", lambda *args, **how: SMALL)
    monkeypatch.setattr(report, "figures", lambda out: {})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_process(rank, n, ports, runs, before, at_each_step):
    """Run one `train.main` after the other; the code is run once, and at each training step."""
    sys.stdout, sys.stderr = (open(f"{name}{rank}", "w") for name in ("out", "err"))  # noqa: SIM115
    os.environ |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "RANK": str(rank),
                   "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    train.load, report.figures = lambda *args, **how: SMALL, lambda out: {}
    names, compute, steps = globals() | {"rank": rank}, train.losses, itertools.count(1)

    def losses(cfg, student, guide, images, targets):
        exec(at_each_step, names | {"images": images, "n_steps": next(steps)})
        return compute(cfg, student, guide, images, targets)

    train.losses = losses
    exec(before, names)
    for argv, port in zip(runs, ports, strict=True):        # the one before may not be closed yet
        os.environ["MASTER_PORT"] = str(port)
        train.main(argv)


def start(n, *runs, before="", at_each_step=""):
    """Start n processes on these argument lists."""
    shared = n, [free_port() for _ in runs], runs, before, at_each_step
    started = [FORKED.Process(target=one_process, args=(rank, *shared)) for rank in range(n)]
    for process in started:
        process.start()
    return started


def ended(processes):
    """[(exit code, stdout, stderr)] of each."""
    for process in processes:
        process.join(timeout=240)
        process.kill()                                      # in vain where all is well
    return [(process.exitcode, Path(f"out{rank}").read_text(), Path(f"err{rank}").read_text())
            for rank, process in enumerate(processes)]


def go(n, *runs, **code):
    found = ended(start(n, *runs, **code))
    assert [code for code, *_ in found] == [0] * n, found
    return found


def alone(out, *flags):
    train.main([*BASE, *flags, "--out", out])


def lines(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def weights(out):
    """A run's weights, without the key biases: their gradient is 0, and AdamW follows its rounding.
    """
    found = torch.load(Path(out, "checkpoint.pt"), weights_only=True)["student"]
    return {k: torch.cat([v[:16], v[32:]]) if k.endswith("qkv.bias") else v
            for k, v in found.items()}


def assert_the_same_run(a, b):
    apart = {name: (weights(b)[name] - w).abs().max().item() for name, w in weights(a).items()}
    assert max(apart.values()) < 2e-6, apart
    for mine, its in zip(lines(a), lines(b), strict=True):
        assert its["terms"] == pytest.approx(mine["terms"], abs=2e-6)
        assert its["probe_accuracy"] == mine["probe_accuracy"]


@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_train_the_model_that_one_trains_and_only_the_first_one_speaks(n):
    kinds = {"moe": ("--method", "moe", "--k", "1"), "both": ("--method", "tgr+mode"),
             "soft": ("--method", "soft", "--mixup", "0.8", "--cutmix", "1")}
    for name, flags in kinds.items():
        alone(f"one-{name}", *flags)
    first, *others = go(n, *([*BASE, *flags, "--out", name] for name, flags in kinds.items()),
                        at_each_step=f"assert len(images) == {18 // n}")
    for name in kinds:
        assert_the_same_run(f"one-{name}", name)
        result = json.loads(Path(name, "result.json").read_text())
        assert result["processes"] == n
        assert result["command"].startswith(f"torchrun --nproc-per-node={n} train.py ")
    assert f"in {n} processes" in first[1] and "test accuracy" in first[1]
    assert all(out == "" for _, out, _ in others)


def test_a_compiled_step_averages_over_the_processes_too():
    flags = ("--method", "moe")
    alone("one", *flags)
    go(2, [*BASE, *flags, "--compile", "--out", "two"], before=(
        "from functools import partial; torch.compile = partial(torch.compile, backend='eager')"
    ))
    assert_the_same_run("one", "two")


def test_where_one_process_cannot_compile_all_end_and_that_one_says_what_to_add():
    found = ended(start(2, [*BASE, "--method", "moe", "--compile", "--out", "two"], before="""
def compile(f, compile=torch.compile):
    def never(graph, inputs):
        raise OSError("no compiler here")
    return compile(f, backend=never if rank else "eager")
torch.compile = compile
"""))
    assert all(code for code, *_ in found)
    assert "no compiler here" in found[1][2] and found[1][2].endswith("and add --no-compile\n")


def test_the_balance_of_the_experts_is_that_over_the_tokens_of_all_processes():
    torch.manual_seed(1)
    logits, chosen = 3 * torch.randn(12, 4), torch.randint(3, (12, 2))
    whole = logits.clone().requires_grad_()
    loss = load_loss(whole.softmax(dim=1)) + 7 * balance_loss(whole.softmax(dim=1), chosen)
    loss.backward()
    torch.save((logits, chosen, loss.detach(), whole.grad), "whole.pt")
    go(2, [*BASE, "--method", "moe", "--out", "run"], at_each_step="""
logits, chosen, loss, grad = torch.load("whole.pt")
part = slice(0, 6) if rank == 0 else slice(6, 12)
own = logits[part].clone().requires_grad_()
here = load_loss(own.softmax(dim=1)) + 7 * balance_loss(own.softmax(dim=1), chosen[part])
here.backward()
torch.testing.assert_close(here.detach(), loss)
torch.testing.assert_close(own.grad / 2, grad[part])        # training averages over the two
""")


def test_noise_is_drawn_by_each_process_for_itself_and_anew_at_each_step():
    draws = "print(torch.get_rng_state().sum().item(), file=sys.stderr)"
    found = go(2, [*BASE, "--method", "moe", "--out", "run", "--noise", "1", "--drop_path", "0.2",
                   "--capacity_factor", "1"], at_each_step=draws)
    drawn = [err.split() for *_, err in found]
    assert len(drawn[0]) == len(drawn[1]) == 6              # 2 epochs of 3 batches
    assert len({*drawn[0], *drawn[1]}) == 12
    assert 0 < lines("run")[-1]["dropped"] < 1


def test_a_run_that_one_process_was_asked_to_stop_goes_on_in_one_process_and_in_two_again():
    flags = ("--method", "moe", "--epochs", "3")
    alone("whole", *flags)
    stop = "if rank == 1 and n_steps == {}: os.kill(os.getpid(), 15)"
    first, second = ended(start(2, [*BASE, *flags, "--out", "run"], at_each_step=stop.format(2)))
    assert first[0] == second[0] == 128 + signal.SIGTERM
    assert first[2].strip().splitlines()[-1] == (
        "stopped; to go on: torchrun --nproc-per-node=2 train.py --resume --out run")
    assert "to go on" not in second[2]
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, 2)
    with pytest.MonkeyPatch.context() as patch:             # one process, up to the second epoch
        patch.setattr(train, "agreed", lambda asked: 15 if train.Path(
            "run/metrics.jsonl").stat().st_size else 0)
        with pytest.raises(SystemExit):
            train.main(["--resume", "--out", "run"])
    assert torch.load("run/checkpoint.pt", weights_only=True)["epoch"] == 1
    go(2, ["--resume", "--out", "run"])
    assert_the_same_run("whole", "run")


def test_when_a_process_is_killed_the_others_end_at_once_and_say_how_to_go_on():
    flags = ("--method", "moe", "--epochs", "3")
    kill = "if rank == 1 and n_steps == 5: os.kill(os.getpid(), 9)"
    running = start(3, [*BASE, *flags, "--out", "run"], at_each_step=kill)
    running[1].join(timeout=240)
    assert running[1].exitcode == -signal.SIGKILL
    since = time.monotonic()
    for code, _, err in (found for i, found in enumerate(ended(running)) if i != 1):
        assert code == 1 and "has lost another one" in err and "Traceback" not in err
        assert "to go on: torchrun --nproc-per-node=3 train.py --resume --out run" in err
    assert time.monotonic() - since < 30
    alone("whole", *flags)
    go(2, ["--resume", "--out", "run"])
    assert_the_same_run("whole", "run")


def test_what_the_first_process_refuses_all_refuse_and_one_says_it():
    alone("there", "--method", "moe")
    full = "checkpoint.save = lambda *args: (_ for _ in ()).throw(OSError('the disk is full'))"
    nan = "if rank == 1 and n_steps == 2: images.fill_(float('nan'))"
    for flags, sentence, status, code in (
            (["--out", "there"], "there already holds a run", 2, {}),
            (["--teacher", "nowhere.pt", "--method", "tgr"], "no checkpoint at nowhere.pt", 2, {}),
            (["--out", "full"], "the disk is full", 2, {"before": full}),
            (["--out", "nan", "--method", "dense"], "epoch 1, step 2: the loss is nan", 1,
             {"at_each_step": nan})):
        found = ended(start(2, [*BASE, "--method", "moe", *flags], **code))
        assert [code for code, *_ in found] == [status] * 2, found
        assert sentence in found[0][2] and found[1][2] == "", found


@pytest.mark.parametrize("flags, sentence", [
    (["--batch_size", "15"], "--batch_size 15 does not divide among 2 processes"),
    (["--device", "cuda:1"], "--device cuda:1 is one device, and torchrun started 2 processes"),
    (["--device", "cuda"], "more processes on this machine than it has GPUs: give it "
                           "--nproc-per-node=1")])
def test_flags_that_do_not_go_with_several_processes_are_refused(flags, sentence, monkeypatch):
    for where in (train, sys.modules["router"]):
        monkeypatch.setattr(where, "processes", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=sentence):
        train.resolve(train.parse([*BASE, "--method", "moe", *flags]))


def test_each_process_takes_the_gpu_of_its_number_on_its_machine(monkeypatch):
    taken = []
    monkeypatch.setattr(train, "processes", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert train.device_of_this_process("cuda") == "cuda:3" and taken == [3]


def test_only_training_knows_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train.main(["--eval", "run/checkpoint.pt"])
    assert "--eval needs one process: start it without torchrun" in capsys.readouterr().err


def test_ctrl_c_at_torchrun_leaves_a_checkpoint_to_go_on_from():
    run = [*BASE, "--method", "moe", "--epochs", "500", "--out", "run"]
    Path("here.py").write_text(
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n"
        f"import test_processes as t\n"
        f"t.train.load, t.report.figures = lambda *args, **how: t.SMALL, lambda out: {{}}\n"
        f"t.train.main({run})\n")
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         f"--master-port={free_port()}", "here.py"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not Path("run/metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    torchrun.send_signal(signal.SIGINT)
    _, err = torchrun.communicate(timeout=120)
    assert "stopped; to go on: torchrun --nproc-per-node=2 train.py --resume --out run" in err
    state = checkpoint.read("run/checkpoint.pt", train.Config, train.RESUMABLE)
    assert state["epoch"] > 0
