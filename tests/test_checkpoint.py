"""Does a run survive, and does a result say where it comes from? On files of a few bytes."""
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

import checkpoint
from train import Config


@dataclass
class Two:
    a: int = 0
    b: int = 0


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_write_that_fails_leaves_the_old_checkpoint_whole(monkeypatch):
    checkpoint.save("c.pt", {"value": torch.ones(3)})

    def full_disk(content, file):
        file.write(b"half a checkp")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        checkpoint.save("c.pt", {"value": torch.zeros(3)})
    assert torch.load("c.pt", weights_only=True)["value"].sum() == 3


def test_what_is_read_is_what_was_saved():
    state = {"config": {"a": 1, "b": 2}, "weight": torch.randn(3, 5)}
    checkpoint.save("c.pt", state)
    found = checkpoint.read("c.pt", Two)
    assert found["config"] == state["config"] and torch.equal(found["weight"], state["weight"])


def test_a_file_that_is_no_checkpoint_or_of_another_config_is_refused_in_one_sentence(tmp_path):
    for content in (b"", b"half a checkp"):
        (tmp_path / "c.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.pt is damaged or no checkpoint"):
            checkpoint.read("c.pt", Two)
    checkpoint.save("c.pt", {"config": {"a": 1, "c": 2}})
    with pytest.raises(ValueError, match=r"c\.pt is damaged or no checkpoint of train\.py \(TypeE"):
        checkpoint.read("c.pt", Two)
    with pytest.raises(ValueError, match=r"no checkpoint at nowhere\.pt"):
        checkpoint.read("nowhere.pt", Two)


class Trap:
    def __reduce__(self):
        return Path("sprung").touch, ()


def test_a_strangers_file_is_opened_without_running_its_code():
    torch.save({"config": {"a": 1, "b": 2}, "trap": Trap()}, "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is damaged or no checkpoint"):
        checkpoint.read("c.pt", Two)
    assert not Path("sprung").exists()


def test_weights_of_another_shape_are_refused_and_the_file_is_named():
    with pytest.raises(ValueError, match=r"r/c\.pt holds a model of another shape \(size mismatch"):
        checkpoint.restore(torch.nn.Linear(3, 2), torch.nn.Linear(4, 2).state_dict(), "r/c.pt")


def test_a_folder_that_exists_is_never_given_out(tmp_path):
    assert checkpoint.free_folder("runs/a") == "runs/a"
    for name in ("a", "a-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert checkpoint.free_folder("runs/a") == "runs/a-3"


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
