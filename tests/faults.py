"""faults.py -- what does a run lose when it is killed, damaged, starved of space or run twice?

    python tests/faults.py                     # every campaign, about an hour on one core
    python tests/faults.py kills damage        # some of them
    python tests/faults.py --short             # a few trials of each, as in tests/test_faults.py
    python tests/faults.py --sabotage          # break the code first: does each campaign notice?
    python tests/faults.py --elsewhere data    # make runs of the study again: who moves how far?
    python tests/faults.py --page README.md    # rewrite the table of promises

A trial is a whole run of train.py, TGR with its teacher on 64 drawn images, in a folder and a
process of its own. The process is forked from this one, for importing torch takes longer than the
run. A campaign does something to such runs, lets them go on with --resume, and compares what comes
out with an undisturbed run, bit for bit. It yields None for a trial that kept its promise, and
otherwise a sentence about what went wrong.
"""
import argparse
import builtins
import contextlib
import errno
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import fields
from hashlib import md5
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint

import numpy as np
import torch

import data
import report
import train

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results" / "faults.json"
ELSEWHERE = RESULTS.with_name("elsewhere.json")
MARKERS = "<!-- faults:begin -->", "<!-- faults:end -->"
RUN = shlex.split(
    "--method tgr --preset tiny --device cpu --dim 16 --depth 2 --heads 2 --patch 16 "
    "--moe_blocks 2 --n_experts 4 --k 1 --noise 1 --drop_path 0.2 --augment heavy --mixup 0.8 "
    "--train_images 0 --batch_size 16 --probe_images 8 --epochs 2 --teacher_epochs 1 "
    "--warmup_epochs 0.5")
torch.set_num_threads(1)        # a thread of this process would be missing in those forked from it
SMALL = data.synthetic(seed=5, n_train=64, n_test=40)
FILES = {"checkpoint.pt", "checkpoint.before.pt", "metrics.jsonl", "routing.npz", "result.json",
         "loss.png"}


# --- a trial ---

def start(folder, *argv, hook=None):
    """Run `train.py ARGV` in `folder` and a process of its own; `hook` prepares the fault there."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(folder)
        for number, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(f"{os.getpid()}-{name}", os.O_CREAT | os.O_WRONLY), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if hook:
            hook()
        train.main(list(argv))
        os._exit(0)
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(99)


def end(folder, pid):
    """(exit code, what it said on stdout, on stderr); the code is negative after a signal."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = []
    for name in ("out.txt", "err.txt"):
        path = Path(folder, f"{pid}-{name}")
        said.append(path.read_text(encoding="utf-8") if path.exists() else "")
        path.unlink(missing_ok=True)
    return code, *said


def go(folder, *argv, hook=None):
    return end(folder, start(folder, *argv, hook=hook))


@contextlib.contextmanager
def a_folder():
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        yield Path(folder)


def outcome(folder, out="run"):
    """All that a run may not lose, and that no fault may change by a bit: times are left out."""
    run = Path(folder, out)
    state = torch.load(run / checkpoint.NAME, weights_only=True)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    lines = report.read_lines(run / "metrics.jsonl")
    for table in (result, *lines):
        for name in ("seconds", "images_per_second", "out", "config", "command"):
            table.pop(name, None)
    return {"weights": checkpoint.fingerprint(state["student"]),
            "teacher's routers": checkpoint.fingerprint(state["routers"]), "metrics": lines,
            "routing": md5((run / "routing.npz").read_bytes()).hexdigest(), "result": result,
            "files": {p.name for p in run.iterdir()}, "teacher": state["teacher"]}


def undisturbed():
    if not hasattr(undisturbed, "found"):
        with a_folder() as folder:
            code, _, said = go(folder, *RUN, "--out", "run")
            assert code == 0, said
            undisturbed.found = outcome(folder)
            assert undisturbed.found["files"] == FILES
    return undisturbed.found


def differs(folder, out="run"):
    """What a run that has ended lacks or has wrong; None if nothing."""
    try:
        found = outcome(folder, out)
    except Exception as error:
        return f"cannot be read: {error}"
    return next((f"{name} differs" for name, right in undisturbed().items()
                 if found[name] != right), None)


def goes_on(folder, out="run"):
    """Resume a run until it ends; the sentence about what went wrong, or None."""
    path = Path(folder, out, checkpoint.NAME)
    if checkpoint.exists(path):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                checkpoint.read(path, train.Config)
        except ValueError as error:
            return f"a checkpoint is lost: {error}"
    code, _, said = go(folder, *RUN, "--out", out, "--resume")
    return f"a dead end: {said.strip()}" if code else differs(folder, out)


def one_sentence(code, said, codes=(2,)):
    if code not in codes or "Traceback" in said or len(said.strip().splitlines()) != 1:
        return f"exit code {code}, and not one sentence: {said.strip()[-300:]}"
    return None


# --- the campaigns: each yields None or a sentence for every trial ---

def kills(n, rng):
    with a_folder() as folder:
        began = time.monotonic()
        go(folder, *RUN, "--out", "run")
        takes = time.monotonic() - began
    for _ in range(n):
        with a_folder() as folder:
            again = []
            for _ in range(rng.choice((1, 1, 2))):
                pid = start(folder, *RUN, "--out", "run", *again)
                time.sleep(rng.uniform(0, takes))
                os.kill(pid, signal.SIGKILL)
                end(folder, pid)
                again = ["--resume"]
            yield goes_on(folder)


def cut_short(at, act):
    """Let file operation number `at` of this process be cut short by `act`; returns the counter.

    Of a write, half of the bytes arrive first.
    """
    count = [0]

    def now():
        count[0] += 1
        return count[0] == at

    def cut(real):
        return lambda *args, **how: act() if now() else real(*args, **how)

    class File(io.FileIO):
        def write(self, content):
            if now():
                super().write(content[:len(content) // 2])
                act()
            return super().write(content)

    def open_(path, mode="r", *rest, **how):
        if now():
            act()
        return File(path, "w") if mode == "wb" else builtins.open(path, mode, *rest, **how)

    checkpoint.open = open_
    for name in ("replace", "fsync", "open", "unlink", "mkdir", "rmdir"):
        setattr(os, name, cut(getattr(os, name)))
    return count


def file_operations():
    """How many a whole run makes."""
    with a_folder() as folder:
        def hook():
            count = cut_short(0, None)
            leave, os._exit = os._exit, lambda code: (Path("count").write_text(str(count[0])),
                                                      leave(code))
        go(folder, *RUN, "--out", "run", hook=hook)
        return int(Path(folder, "count").read_text())


def kills_in_files(n, rng):
    for at in some(range(1, file_operations() + 1), n, rng):
        with a_folder() as folder:
            go(folder, *RUN, "--out", "run", hook=lambda at=at: cut_short(
                at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            yield goes_on(folder)


def full_disks(n, rng):
    for at in some(range(1, file_operations() + 1), n, rng):
        for number in (errno.ENOSPC, errno.EACCES, errno.EIO):
            def fail(number=number):
                raise OSError(number, os.strerror(number))

            with a_folder() as folder:
                code, _, said = go(folder, *RUN, "--out", "run",
                                   hook=lambda at=at, fail=fail: cut_short(at, fail))
                wrong = one_sentence(code, said) if code else None  # clearing up may fail unseen
                left = [str(p) for p in Path(folder).rglob("*.part")]
                yield wrong or (f"{left[0]} is left behind" if left and code else None) or (
                    goes_on(folder))


def damage(n, rng):
    with a_folder() as folder:
        go(folder, *RUN, "--out", "run")
        os.chdir(folder)
        try:
            given = train.parse([*RUN, "--out", "run", "--resume"])
            _, job = train.plan(dict(given))
            whole = {path: path.read_bytes() for path in Path("run").iterdir()}
            for path in sorted(whole):
                for trial in range(n + n // 10):
                    path.write_bytes(spoilt(whole[path], rng, cut=trial >= n))
                    yield noticed(path, job)
                    for restored, content in whole.items():
                        if restored.read_bytes() != content:
                            if restored.suffix != ".pt":
                                yield f"{restored} was not made whole again"
                            restored.write_bytes(content)
        finally:
            os.chdir(ROOT)


def spoilt(content, rng, cut):
    if cut:
        return content[:rng.randrange(len(content))]
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]


def noticed(path, job):
    """Whether damage in one file of an ended run is found and said."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if path.name == checkpoint.NAME:
            state = train.run_in("run")
            return None if "damaged" in said.getvalue() and state["epoch"] == 2 else "not noticed"
        if path.suffix == ".pt":            # matters when the newest is damaged too
            newest = Path("run", checkpoint.NAME)
            newest.write_bytes(newest.read_bytes()[:-1])
            try:
                train.run_in("run")
                return "two damaged checkpoints were read"
            except ValueError as error:
                return None if "damaged" in str(error) else str(error)
        mended = train.write_files(job, train.progress_of(job.state), job.state["result"])
        return None if path.name in mended else "not noticed"


def pairs(n, rng):
    kinds = (same_command, same_teacher, two_resumes, two_downloads, two_unpackings)
    for kind in kinds:
        for _ in range(n):
            with a_folder() as folder:
                yield kind(folder)


def both(folder, first, second):
    pids = [start(folder, *first), start(folder, *second)]
    return [end(folder, pid) for pid in pids]


def same_command(folder, *more):
    ends = sorted(both(folder, *2 * [[*RUN, "--out", "run", *more]]))
    if ends[0][0] != 0:
        return f"nobody ended: {ends}"
    if ends[1][0] and (one_sentence(ends[1][0], ends[1][2]) or not any(
            words in ends[1][2] for words in ("is writing to run", "already holds a run"))):
        return f"{ends[1]}"
    return differs(folder)


def same_teacher(folder):
    ends = both(folder, [*RUN, "--out", "run"], [*RUN, "--out", "other", "--seed", "1"])
    if any(code for code, _, _ in ends):
        return f"{ends}"
    return differs(folder) or (None if len(list(folder.glob("runs/teachers/*"))) == 1
                               else "two teachers")


def two_resumes(folder):
    def stop():
        real = train.say
        train.say = lambda *args, **how: (real(*args, **how), os.kill(os.getpid(), signal.SIGTERM))
    go(folder, *RUN, "--out", "run", hook=stop)
    return same_command(folder, "--resume")


def two_downloads(folder):
    return two_loads(folder, archive_there=False)


def two_unpackings(folder):
    return two_loads(folder, archive_there=True)


def two_loads(folder, archive_there):
    """Two processes bring the same small CIFAR-100 into one folder."""
    def part(n):
        return {"data": np.arange(3072 * n, dtype=np.uint8).reshape(n, 3072),
                "fine_labels": list(range(n)), "coarse_labels": list(range(n))}

    C, archive = data.CIFAR100, Path(folder, "source.tar.gz")
    meta = {"fine_label_names": [str(i) for i in range(100)],
            "coarse_label_names": [str(i) for i in range(20)]}
    sums = {}
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in (("train", part(7)), ("test", part(5)), ("meta", meta)):
            content = pickle.dumps(content)
            sums[name] = md5(content).hexdigest()
            info = tarfile.TarInfo(f"{C.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if archive_there:
        Path(folder, "data").mkdir()
        shutil.copy(archive, Path(folder, "data", C.filename))

    def hook():
        C.train_list, C.test_list = [["train", sums["train"]]], [["test", sums["test"]]]
        C.meta, C.url = C.meta | {"md5": sums["meta"]}, archive.as_uri()
        C.tgz_md5 = md5(archive.read_bytes()).hexdigest()
        train.main = lambda argv: print(len(data.load("cifar100", "data").train.images))

    ends = [end(folder, pid) for pid in [start(folder, hook=hook) for _ in range(2)]]
    if any(code or out.splitlines()[-1:] != ["7"] for code, out, _ in ends):
        return f"{ends}"
    found = {path.name for path in Path(folder, "data").iterdir()}
    return None if found == {C.base_folder, C.filename} else f"left behind: {found}"


def stops(n, rng):
    for _ in range(n):
        at, number = rng.randrange(1, 13), rng.choice((signal.SIGTERM, signal.SIGINT))

        def hook(at=at, number=number):
            real, calls = train.objective, []

            def objective(*args):
                calls.append(1)
                if len(calls) == at:
                    os.kill(os.getpid(), number)
                return real(*args)
            train.objective = objective

        with a_folder() as folder:
            code, _, said = go(folder, *RUN, "--out", "it's a run", hook=hook)
            command = said.strip().splitlines()[-1].removeprefix("stopped; to go on: ")
            if code != 128 + number or not command.startswith("python train.py --resume"):
                yield f"exit code {code}: {said}"
                continue
            code, _, said = go(folder, *shlex.split(command)[2:])
            yield f"a dead end: {said}" if code else differs(folder, "it's a run")


def numbers(n, rng):
    for _ in range(n):
        what = rng.choice(("weight", "gradient", "moment", "router"))
        at, bad = rng.randrange(1, 9), rng.choice((math.nan, math.inf, -math.inf))

        def hook(what=what, at=at, bad=bad):
            groups, real, seen = train.parameter_groups, torch.optim.AdamW.step, []

            def parameter_groups(model, guide, *rest):
                seen[:] = [model.head.weight, guide and next(guide.routers.parameters()), 0]
                return groups(model, guide, *rest)

            def step(optimizer, *args, **how):
                weight, router, count = seen
                seen[2] = count + (router is not None)      # the student's steps
                if seen[2] == at and router is not None:
                    spoilt = {"weight": weight.data, "router": router.data, "gradient": weight.grad,
                              "moment": optimizer.state[weight].get("exp_avg", weight.data)}[what]
                    spoilt.view(-1)[0] = bad
                return real(optimizer, *args, **how)

            train.parameter_groups = parameter_groups
            torch.optim.AdamW.step = step

        with a_folder() as folder:
            code, _, said = go(folder, *RUN, "--out", "run", hook=hook)
            named = "epoch" in said and ("step" in said or "router" in said)
            yield one_sentence(code, said, (1,)) or (None if named else said) or goes_on(folder)


def flags(n, rng):
    bad = [*((name, "--") for name in ("out", "moe_blocks", "method", "teacher", "eval")),
           ("out", ""), ("eval", ""), ("teacher", ""), ("data_dir", ""), ("device", "abacus"),
           ("device", "cuda:99"), ("moe_blocks", "2,2"), ("moe_blocks", "0"), ("moe_blocks", "3"),
           ("moe_blocks", "a"), ("moe_blocks", "1.5"), ("moe_blocks", "-1"), ("heads", "3"),
           ("patch", "5"), ("k", "5"), ("train_images", "65"), ("batch_size", "65"),
           ("warmup_epochs", "2"), ("mlp_ratio", "0.01"), ("expert_ratio", "0.01"),
           ("out", "/dev/null"), ("out", "/dev/null/deeper"), ("teacher", "nowhere.pt"),
           ("eval", "nowhere.pt"), ("method", "magic"), ("preset", "huge"), ("gate", "hard")]
    for f in fields(train.Config):
        if f.type not in (int, float):
            bad += [(f.name, "magic")] if f.metadata["choices"] else []
            continue
        low = f.metadata["bounds"].get("at_least", f.metadata["bounds"].get("above"))
        high = f.metadata["bounds"].get("at_most", f.metadata["bounds"].get("below"))
        values = ["abc", "", "1e", "--", str(low - 1)]
        values += ["nan", "inf", "-inf", "1e400"] if f.type is float else ["0.5", "nan", "1e3"]
        values += [str(high + 1), "9" * 30] if high is not None else []
        values += [str(low)] if "above" in f.metadata["bounds"] else []
        bad += [(f.name, value) for value in values]
    for name, value in some(bad, n, rng):
        with a_folder() as folder:
            code, out, said = go(folder, *RUN, f"--{name}={value}")
            last = said.strip().splitlines()[-1:] or [""]
            named = name in last[0] or value in last[0]
            if code != 2 or "Traceback" in said or out or not named:
                yield f"--{name}={value!r}: exit code {code}: {out}{said[-300:]}"
            else:
                yield None if not list(folder.iterdir()) else f"--{name}={value!r} made a file"


def calls(n, rng):
    """Those that the tests refuse: each module's table says what is said."""
    refused = [case for path in sorted(ROOT.glob("tests/test_*.py")) for case in getattr(
        importlib.import_module(f"tests.{path.stem}"), "REFUSED", ())]
    for call, sentence in some(refused, n, rng):
        try:
            call()
            yield f"nothing was said instead of {sentence!r}"
        except Exception as error:
            fits = isinstance(error, ValueError | TypeError) and re.search(sentence, str(error))
            yield None if fits else f"{error!r} instead of {sentence!r}"


def locales(n, rng):
    settings = [{"PYTHONIOENCODING": name} for name in ("cp932", "gbk", "ascii")]
    settings += [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
    flags = shlex.join(RUN).replace("--method tgr", "--method mode").replace("--k 1", "--k 2")
    chains = [[f"train.py --data synthetic {flags} --out run", "train.py --eval run/checkpoint.pt",
               "report.py run"],
              ["notebooks/study.py list", "notebooks/study.py report main"],
              ["tests/assignments/course.py release tree",
               "tests/assignments/course.py grade . --only 1"]]
    for setting, commands in some(itertools.product(settings, chains), n, rng):
        with a_folder() as folder:
            shutil.copytree(ROOT, folder, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns(".*", "runs", "data", "__pycache__"))
            for command in commands:
                done = subprocess.run([sys.executable, *shlex.split(command)], cwd=folder,
                                      capture_output=True, env=os.environ | setting)
                yield f"{setting}, {command}: {done.stderr[-300:]!r}" if done.returncode else None


def versions(n, rng):
    """A run of each commit that changed what makes checkpoints: of one dense model and of TGR."""
    git = ["git", "-C", str(ROOT)]
    log = subprocess.run([*git, "log", "--format=%H", "--", "train.py", "checkpoint.py"],
                         capture_output=True, encoding="utf-8")
    flags = [*RUN, "--train_images", "64", "--data", "synthetic", "--epochs", "1"]
    for commit in some(log.stdout.split(), n, rng):
        with a_folder() as folder:
            archive = subprocess.run([*git, "archive", commit], capture_output=True, check=True)
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
                tar.extractall(folder, filter="data")

            def run(*argv, folder=folder, root=folder):
                done = subprocess.run([sys.executable, f"{root}/train.py", *argv], cwd=folder,
                                      capture_output=True, encoding="utf-8")
                return done.returncode, done.stdout, done.stderr

            its = run(*flags, "--out", "run")
            if its[0]:
                yield f"{commit[:12]} makes no run: {its[2][-300:]}"
                continue
            reached = json.loads(Path(folder, "run", "result.json").read_text())["test_accuracy"]
            teacher = next(Path(folder).glob("runs/teachers/*/checkpoint.pt"))
            for argv, right in ((["--eval", "run/checkpoint.pt"], f"{reached:.2%}"),
                                (["--resume", "--out", "run"], f"{reached:.1%}"),
                                ([*flags, "--teacher", str(teacher), "--out", "new"], "taught by")):
                code, out, said = run(*argv, root=ROOT)
                named = re.search(r"it has no '\w+'|this one has no --\w+", said)
                fits = not one_sentence(code, said) and named if code else right in out
                yield None if fits else (
                    f"{commit[:12]}, {argv[0]}: exit code {code}: {out[-200:]}{said[-300:]}")


def same_bits(n, rng):
    for seed in range(n):
        found = []
        for _ in range(2):
            with a_folder() as folder:
                go(folder, *RUN, "--out", "run", "--epochs", "50", "--seed", str(seed))
                found.append(outcome(folder))
        yield None if found[0] == found[1] else "the two differ"


def orders(n, rng):
    """All tests but the pages, which run alone, and these campaigns."""
    for seed in rng.sample(range(1000), n):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "not notebook", "--ignore=tests/test_faults.py",
             f"--shuffle={seed}"], cwd=ROOT, capture_output=True, encoding="utf-8")
        yield f"--shuffle={seed}: {done.stdout[-300:]}" if done.returncode else None


def some(trials, n, rng):
    """All trials, or n of them chosen at random."""
    trials = list(trials)
    return trials if n is None or n >= len(trials) else rng.sample(trials, n)


CAMPAIGNS = {   # what happens, what is promised, how many trials: long, short; None is all of them
    kills: ("SIGKILL at a random moment, perhaps once more while it resumes",
            "it goes on to the same bits", 200, 4),
    kills_in_files: ("SIGKILL before each file operation and amid each write",
                     "it goes on to the same bits", None, 5),
    full_disks: ("no space, no permission or a broken disk at each file operation",
                 "one sentence, no half file, and it goes on to the same bits", None, 2),
    damage: ("a flipped bit or a missing end in any of its files",
             "said, and made whole from what is left", 2000, 20),
    pairs: ("two at once: same command, untrained teacher, resume, download or unpacking",
            "all whole; who waits or gives up says why", 20, 1),
    stops: ("Ctrl-C or SIGTERM at a random step",
            "exit code 130 or 143; the command it prints goes on to the same bits", 50, 3),
    numbers: ("NaN or infinity in a weight, a gradient, a moment of AdamW or a teacher's router",
              "named with its epoch, never saved; it goes on to the same bits", 60, 4),
    flags: ("a flag out of range, of another type, empty or at odds with another",
            "one sentence that names it, nothing made", None, 12),
    calls: ("a function called with wrong shapes, numbers, types or blocks",
            "one sentence that names the argument", None, 60),
    locales: ("a terminal with Japanese, Chinese or ASCII letters alone",
              "every command ends", None, 1),
    versions: ("a checkpoint of each earlier version of this code",
               "tests, resumes and teaches, or what it lacks is named", None, 0),
    same_bits: ("the same seed on the same machine, 200 steps in two processes",
                "the same bits", 5, 1),
    orders: ("the tests in a random order", "they pass", 20, 0),
}


# --- a campaign that cannot fail says nothing ---

def write_in_place(path, content, keep=None):
    with getattr(checkpoint, "open", open)(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def claim_nothing(folder, *args, **how):
    Path(folder).mkdir(parents=True, exist_ok=True)
    yield


SABOTAGE = {        # what is broken before a campaign; locales and versions run a tree of their own
    kills: [(train, "progress_of", lambda state: train.Progress())],
    kills_in_files: [(checkpoint, "write", write_in_place)],
    full_disks: [(checkpoint, "write", write_in_place)],
    damage: [(checkpoint, "is_whole", lambda content: None)],
    pairs: [(checkpoint, "claim", claim_nothing), (data, "claim", claim_nothing)],
    stops: [(checkpoint, "set_rng", lambda states, device: None)],
    numbers: [(checkpoint, "not_finite", lambda state, name="": None)],
    flags: [(train, "check_numbers", lambda cfg: None)],
    calls: [(report, "ids", lambda a, n, name="": np.asarray(a))],
    same_bits: [(torch, "manual_seed", lambda seed: torch.seed())],
}


def noticed_sabotage(which):
    """What a campaign says first of broken code; None where it notices nothing."""
    with contextlib.ExitStack() as until_mended, on_small_runs():
        undisturbed()
        for thing, name, broken in SABOTAGE[which]:
            until_mended.enter_context(mock.patch.object(thing, name, broken))
        return next(filter(None, which(CAMPAIGNS[which][2], random.Random(0))), None)


# --- the command ---

@contextlib.contextmanager
def on_small_runs():
    """Few images, and figures that take no time."""
    def figures(out):
        return {"loss.png": b"drawn from " + Path(out, "metrics.jsonl").read_bytes()}

    with mock.patch.object(train, "load", lambda *args, **how: SMALL), \
            mock.patch.object(report, "figures", figures):
        yield


def campaign(which, short=False):
    """{"happens", "promise", "tried", "failed", "sentences", "seconds"} of one campaign."""
    happens, promise, *counts = CAMPAIGNS[which]
    began = time.monotonic()
    with on_small_runs():
        found = list(which(counts[short], random.Random(0)))
    wrong = [sentence for sentence in found if sentence]
    return {"happens": happens, "promise": promise, "tried": len(found), "failed": len(wrong),
            "sentences": wrong[:5], "seconds": time.monotonic() - began}


def elsewhere(data_dir):
    """[{"arm", "seed", "then", "now"}]: test accuracies of runs of the study, made again here."""
    found = []
    for row in report.read_lines(RESULTS.with_name("main.jsonl")):
        if row["scale"] == "cpu" and row["arm"] in ("dense", "moe-k1"):
            flags = [f"--{name}={value}" for name, value in row["config"].items()
                     if value is not None and name not in checkpoint.HOW]
            with a_folder() as folder:
                subprocess.run(
                    [sys.executable, "train.py", *flags, "--device", "cpu", "--data_dir", data_dir,
                     "--out", folder / "run"], cwd=ROOT, check=True, capture_output=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"})
                result = json.loads(Path(folder, "run", "result.json").read_text(encoding="utf-8"))
            found.append({"arm": row["arm"], "seed": row["seed"], "then": row["test_accuracy"],
                          "now": result["test_accuracy"]})
            print(*found[-1].values(), flush=True)
    return found


def results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))["campaigns"] if RESULTS.exists() else {}


def page():
    rows = results()
    lines = ["| what happens | what is promised | tried | broken |", "|-|-|-|-|"]
    for row in rows.values():
        lines.append(f"| {row['happens']} | {row['promise']} | {row['tried']:,} | "
                     f"{row['failed']:,} |")
    again, moved = json.loads(ELSEWHERE.read_text(encoding="utf-8")), {}
    for run in again["rows"]:
        moved.setdefault(run["arm"], []).append(100 * abs(run["now"] - run["then"]))
    most = ", ".join(f"{arm} {max(points):.1f}" for arm, points in sorted(moved.items()))
    return "\n".join([
        *lines, "", f"Tried on {row['device']}; torch {row['versions']['torch']}; commit "
        f"{row['commit'][:12]}. Equal bits are promised for one machine, number of threads, set of "
        f"versions and commit. Made again at commit {again['commit'][:12]}, {len(again['rows'])} "
        f"runs of the study moved in test accuracy by up to so many points: {most}; on another "
        f"machine, as a reviewer reports, one of moe-k1 by 0.6."])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = {which.__name__: which for which in CAMPAIGNS}
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=", ".join(names))
    parser.add_argument("--short", action="store_true", help="a few trials of each")
    parser.add_argument("--sabotage", action="store_true", help="break the code first")
    parser.add_argument("--elsewhere", metavar="DATA_DIR", help="make runs of the study again")
    parser.add_argument("--page", help="rewrite the table in this file from the last results")
    args = parser.parse_args(argv)
    if unknown := set(args.campaigns) - set(names):
        parser.error(f"there is no campaign {min(unknown)}: choose from {', '.join(names)}")
    if args.page:
        command = f"python tests/faults.py --page {args.page}"
        return report.put_between(args.page, *MARKERS, page, command)
    if args.sabotage:
        found = {name: noticed_sabotage(names[name]) for name in args.campaigns or names
                 if names[name] in SABOTAGE}
        print(*(f"{name}: {sentence}" for name, sentence in found.items()), sep="\n")
        return int(not all(found.values()))
    about = {"command": shlex.join(["python", "tests/faults.py", *(argv or sys.argv[1:])]),
             **checkpoint.provenance("cpu")}
    if args.elsewhere:
        rows = elsewhere(args.elsewhere)
        return checkpoint.write(ELSEWHERE, json.dumps(about | {"rows": rows}, indent=1) + "\n")
    failed = 0
    for name in args.campaigns or names:
        row = campaign(names[name], args.short) | about
        failed += row["failed"]
        print(f"{name}: {row['failed']} of {row['tried']} failed, {row['seconds']:.0f} s",
              *row["sentences"], sep="\n    ", flush=True)
        if not args.short:
            found = results() | {name: row}
            found = {name: found[name] for name in names if name in found}
            checkpoint.write(RESULTS, json.dumps({"campaigns": found}, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
