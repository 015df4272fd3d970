"""Does a run survive, and does a result say where it comes from? On files of a few bytes."""
import contextlib
import errno
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import checkpoint

import pytest
import torch

from train import Config

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Two:
    epochs: int = 0
    b: int = 0


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


STATE = {"config": {"epochs": 3, "b": 2}, "epoch": 1, "student": {"w": torch.tensor([0.5, -2.0])}}


def read(path="c.pt", **needs):
    return checkpoint.read(path, Two, **needs)


# --- torch's threads ---

ENTRIES = ("train", "report", "data", "tests.conftest", "notebooks.lesson", "notebooks.lesson_4",
           "notebooks.study", "notebooks.measure", "notebooks.bench", "notebooks.regime")


@pytest.mark.parametrize("name", ENTRIES)
def test_how_threads_wait_is_decided_before_torch_is_loaded(name):
    code = f"""
import importlib, os, sys
class Torch:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Torch)
importlib.import_module("{name}")
"""
    for given, right in (({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"),
                         ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")):
        env = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"} | given
        said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                              stdout=subprocess.PIPE, check=True).stdout
        assert said == f"{right}\n"


def test_what_comes_first_leaves_triton_alone_which_reads_its_settings_as_it_is_imported():
    code = "import checkpoint, sys; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- a file is written whole or not at all ---

@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_is_one_sentence_and_leaves_the_old_file_and_nothing_else(
        fails, monkeypatch):
    checkpoint.write("f", "old")

    def full_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full_disk)
    with pytest.raises(OSError, match=r"^f cannot be written \(No space left on device\): what"):
        checkpoint.write("f", "new")
    assert os.listdir() == ["f"] and Path("f").read_text() == "old"


def test_the_content_is_on_the_disk_before_the_name_points_to_it_and_then_the_name(monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: calls.append("fsync") or fsync(*a))
    monkeypatch.setattr(os, "replace", lambda *a: calls.append("replace") or replace(*a))
    checkpoint.write("f", "as\u00df\u7530")
    assert calls == ["fsync", "replace", "fsync"]
    assert Path("f").read_bytes() == "as\u00df\u7530".encode()           # in any locale


def test_two_processes_write_to_files_of_their_own_before_either_replaces(monkeypatch):
    written, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: written.update(Path().glob(".f.*")) or fsync(n))
    for number in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        checkpoint.write("f", "text")
    assert len(written) == 2


def test_mending_writes_what_is_missing_or_differs_and_nothing_else():
    assert checkpoint.mend(Path("f"), "text") and not checkpoint.mend(Path("f"), "text")
    assert checkpoint.mend(Path("f"), b"Text") and Path("f").read_bytes() == b"Text"


def test_a_name_that_is_no_utf8_is_written_with_its_odd_bytes_escaped():
    checkpoint.write(Path("f"), "q\udcff.png")
    assert Path("f").read_text(encoding="utf-8") == "q\\udcff.png"
    assert not checkpoint.mend(Path("f"), "q\udcff.png")


def test_a_mistyped_ending_finds_no_older_checkpoint():
    for _ in range(2):
        checkpoint.save("checkpoint.pt", STATE)
    with pytest.raises(ValueError, match="there is no checkpoint at checkpoint"):
        read("checkpoint.safetensors")


def test_a_character_that_the_terminal_lacks_is_printed_as_a_question_mark():
    code = "import checkpoint; checkpoint.printable(); print('\u03b1 \u2013 x')"
    said = subprocess.run([sys.executable, "-c", code], cwd=Path(checkpoint.__file__).parent,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert said.stdout.split() == [b"?", b"?", b"x"]


# --- the checkpoint ---

def test_what_is_read_is_what_was_saved_and_torch_reads_it_too():
    checkpoint.save("c.pt", STATE)
    for found in (read(), torch.load("c.pt", weights_only=True)):
        assert found["config"] == STATE["config"]
        assert torch.equal(found["student"]["w"], STATE["student"]["w"])


def test_the_one_before_is_kept_and_serves_when_the_newest_is_damaged_or_gone(capsys):
    checkpoint.save("c.pt", STATE)
    checkpoint.save("c.pt", STATE | {"epoch": 2})
    assert read()["epoch"] == 2 and capsys.readouterr().out == ""
    newest = bytearray(Path("c.pt").read_bytes())
    newest[len(newest) // 2] ^= 4                           # one bit
    Path("c.pt").write_bytes(newest)
    assert read()["epoch"] == 1
    assert capsys.readouterr().out == ("c.pt is damaged: its content is not what was written. "
                                       "Going on with c.before.pt, epoch 1\n")
    Path("c.pt").unlink()
    assert read()["epoch"] == 1
    assert "c.pt is gone. Going on with c.before.pt" in capsys.readouterr().out


def test_a_damaged_checkpoint_never_takes_the_place_of_the_whole_one_before_it():
    for epoch in (1, 2):
        checkpoint.save("c.pt", STATE | {"epoch": epoch})
    Path("c.pt").write_bytes(Path("c.pt").read_bytes()[:-5])
    checkpoint.save("c.pt", STATE | {"epoch": 3})
    assert read("c.before.pt")["epoch"] == 1


@pytest.mark.parametrize("place", [0, 99, -1, -40, -66, -70, -72, -73, -74])
def test_any_bit_that_flips_or_end_that_is_lost_is_noticed_in_content_and_seal(place):
    checkpoint.save("c.pt", STATE)
    whole = Path("c.pt").read_bytes()
    for bit in range(8):
        Path("c.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + (
            whole[place:][1:]))
        with pytest.raises(ValueError, match=r"c\.pt is damaged"):
            read()
    Path("c.pt").write_bytes(whole[:place] if place else b"")
    with pytest.raises(ValueError, match=r"c\.pt is damaged"):
        read()


def test_a_file_of_an_older_version_has_no_seal_and_is_read(tmp_path):
    torch.save(STATE, "c.pt")
    assert read()["epoch"] == 1


def test_what_cannot_be_used_is_refused_in_one_sentence_that_names_it(tmp_path):
    for content in (b"", b"half a checkp"):
        Path("c.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.pt is damaged or no checkpoint of train\.py \("):
            read()
    with pytest.raises(ValueError, match=r"no checkpoint at nowhere\.pt"):
        read("nowhere.pt")
    for change, words in [({"config": {"epochs": 3, "c": 2}}, "another version.* has no --c"),
                          ({"epoch": 4}, "cannot be right: epoch 4 of 3"),
                          ({"epoch": -1}, "cannot be right: epoch -1 of 3"),
                          ({"epoch": "1"}, "cannot be right"),
                          ({"config": {"b": 1}}, "cannot be right: epoch 1 of None")]:
        Path("c.pt").write_bytes(checkpoint.seal(STATE | change))
        with pytest.raises(ValueError, match=rf"^c\.pt .*{words}.*\. Train it again, or name"):
            read()
    Path("c.pt").write_bytes(checkpoint.seal(STATE))
    with pytest.raises(ValueError, match=r"another version.*it has no 'lines'"):
        read(needs=("epoch", "lines"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_neither_saved_nor_read_and_is_named(bad):
    assert checkpoint.not_finite({"a": [1, (torch.tensor(0.0), torch.tensor(bad))]}) == "a.1.1"
    checkpoint.save("c.pt", STATE)
    spoilt = STATE | {"optimizer": {"state": {7: [torch.tensor([1.0, bad])]}}}
    with pytest.raises(FloatingPointError, match=r"optimizer\.state\.7\.0 is not finite, so noth"):
        checkpoint.save("c.pt", spoilt)
    assert read()["epoch"] == 1 and not Path("c.before.pt").exists()
    torch.save(spoilt, "c.pt")
    with pytest.raises(ValueError, match=r"not finite, in optimizer\.state\.7\.0"):
        read()


class Trap:
    def __reduce__(self):
        return Path("sprung").touch, ()


def test_a_strangers_file_is_opened_without_running_its_code():
    torch.save(STATE | {"trap": Trap()}, "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is damaged or no checkpoint"):
        read()
    assert not Path("sprung").exists()


def test_weights_of_another_shape_are_refused_and_the_file_is_named():
    with pytest.raises(ValueError, match=r"r/c\.pt holds a model of another shape \(size mismatch"):
        checkpoint.restore(torch.nn.Linear(3, 2), torch.nn.Linear(4, 2).state_dict(), "r/c.pt")


def test_two_models_have_one_fingerprint_only_if_they_are_the_same_bit_for_bit():
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(0.0)}
    mark = checkpoint.fingerprint(weights)
    assert mark == checkpoint.fingerprint({k: v.clone() for k, v in weights.items()})
    for other in ({"a": torch.tensor([1.0, 2.0 + 2**-22])}, {"b": torch.tensor(-0.0)},
                  {"a": torch.tensor([[1.0], [2.0]])}, {"b": torch.tensor(0, dtype=torch.int32)}):
        assert checkpoint.fingerprint(weights | other) != mark
    assert checkpoint.fingerprint({"a": weights["a"], "c": weights["b"]}) != mark
    wide = torch.tensor([1.0], dtype=torch.float64)
    assert checkpoint.fingerprint({"a": wide}) != checkpoint.fingerprint({"a": wide + 1e-12})


def test_of_two_damaged_checkpoints_the_newest_is_named():
    for _ in range(2):
        checkpoint.save("c.pt", STATE)
    for name in ("c.pt", "c.before.pt"):
        Path(name).write_bytes(Path(name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^c\.pt is damaged: .* Train it again, or name another"):
        read()


def test_a_generator_goes_on_where_it_was():
    state = checkpoint.get_rng("cpu")
    first = torch.rand(5)
    checkpoint.set_rng(state, "cpu")
    assert torch.equal(torch.rand(5), first)


# --- a folder that one process owns ---

OWN = """
import checkpoint, sys, time
with checkpoint.claim("run"):
    print("mine", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def owner_elsewhere():
    """Another process that owns the folder "run"."""
    path = str(Path(checkpoint.__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", OWN], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": path})
    try:
        assert process.stdout.readline() == "mine\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_folder_is_one_processs_and_who_has_it_is_said():
    with owner_elsewhere() as owner:
        with (pytest.raises(ValueError, match=rf"^process {owner.pid} on .* is writing to run: "
                            r"wait for it, or choose another --out$"), checkpoint.claim("run")):
            pytest.fail("two have it")
        assert Path("run/.lock").exists()


def test_a_lock_dies_with_its_holder_and_who_waits_says_for_what(capsys):
    with owner_elsewhere() as owner:
        threading.Timer(0.5, owner.kill).start()
        with checkpoint.claim("run", wait_for="to train the teacher"):
            assert owner.wait() == -9
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"waiting for process {owner.pid} on " in said and "to train the teacher in run" in said


def test_what_a_killed_process_left_half_written_is_cleared_and_nothing_else():
    Path("run").mkdir()
    for name in (".checkpoint.pt.123.part", "notes.part", "metrics.jsonl"):
        Path("run", name).touch()
    with checkpoint.claim("run"):
        pass
    assert sorted(os.listdir("run")) == ["metrics.jsonl", "notes.part"]


def test_a_folder_in_which_nothing_was_made_is_not_left_behind():
    with pytest.raises(ZeroDivisionError), checkpoint.claim("run"):
        raise ZeroDivisionError
    assert not Path("run").exists()
    Path("run").mkdir()                                     # the user's own
    with checkpoint.claim("run"):
        pass
    assert os.listdir() == ["run"] and os.listdir("run") == []


def test_a_holder_that_removes_its_lock_file_leaves_no_room_for_two(monkeypatch):
    # a waits with the file open while b, who holds it, removes it: a's lock is then on no name
    def take(file, first=[True]):   # noqa: B006 (remembered on purpose)
        if first.pop() if first else False:
            Path("run/.lock").unlink()

    monkeypatch.setattr(checkpoint, "take", take)
    Path("run").mkdir()
    assert checkpoint.lock(Path("run"), "--out") is None
    checkpoint.lock(Path("run"), "--out").close()


@pytest.mark.parametrize("place", ["file", "file/deeper", "/dev/null"])
def test_a_place_that_can_hold_no_folder_is_one_sentence_with_the_flag(place):
    Path("file").touch()
    with pytest.raises(OSError, match=rf"^{place} cannot be used \(.*\): choose another --there$"):
        checkpoint.claim(place, flag="--there").__enter__()


def test_windows_locks_a_byte_and_another_error_is_told(monkeypatch):
    answers, tried = [OSError(errno.EACCES, "held"), None, OSError(errno.EBADF, "odd")], []

    def locking(number, mode, size):
        tried.append((os.lseek(number, 0, os.SEEK_CUR), mode, size))
        if answer := answers.pop(0):
            raise answer

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.delattr(os, "O_DIRECTORY")                  # and no folder can be synced there
    with checkpoint.claim("run", wait_for="to go on"):
        checkpoint.write("run/f", "text")
    assert tried == 2 * [(4096, 2, 1)] and os.listdir("run") == ["f"]
    with pytest.raises(OSError, match=r"cannot be used \(odd\)"):
        checkpoint.claim("run").__enter__()


def test_a_run_exists_as_long_as_one_of_its_two_checkpoints_does():
    for _ in range(2):
        checkpoint.save("c.pt", STATE)
    Path("c.pt").unlink()
    assert checkpoint.exists("c.pt") and read()["epoch"] == 1
    checkpoint.before("c.pt").unlink()
    assert not checkpoint.exists("c.pt")


def test_a_folder_that_exists_is_never_given_out(tmp_path, monkeypatch):
    assert checkpoint.free_folder("runs/a") == "runs/a"
    assert checkpoint.free_folder("runs/a") == "runs/a-2"
    (tmp_path / "runs" / "b").touch()
    assert checkpoint.free_folder("runs/b") == "runs/b-2"
    monkeypatch.setattr(Path, "exists", lambda path: False)             # another process is faster
    assert checkpoint.free_folder("runs/a") == "runs/a-3"


# --- a request to stop ---

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_request_is_noted_and_the_second_ends_at_once(number, code, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with checkpoint.until_asked_to_stop() as asked:
        assert asked == []
        signal.raise_signal(number)
        assert asked == [number] and checkpoint.Stopped(*asked).exit_code == code
        assert "stopping after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


# --- provenance ---

def test_a_result_names_its_commit_device_and_versions(monkeypatch):
    origin = checkpoint.provenance("cpu")
    assert origin["versions"]["torch"] == torch.__version__ and "threads" in origin["device"]
    monkeypatch.setenv("GUIDED_MOE_COMMIT", "abc")
    empty = subprocess.CompletedProcess([], 128, stdout="")             # a copy without .git
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: empty)
    assert checkpoint.commit() == "abc"
    clean = subprocess.CompletedProcess([], 0, stdout="def\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: clean)
    assert checkpoint.commit() == "def"


def test_what_says_how_a_run_runs_is_a_field_of_its_configuration():
    assert set(checkpoint.HOW) <= {f.name for f in fields(Config)}
