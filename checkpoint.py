"""checkpoint.py -- how does a run survive, and where do its numbers come from?

A run lives in one folder. Its checkpoint holds tensors and primitives alone, so that a stranger's
file can be opened without running code; it is replaced whole or not at all. Every result names the
commit, the device and the versions that made it.
"""
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch
import torchvision

# The fields of a configuration that say where and how a run runs, not what it is: a resumed run may
# change them, and two runs that differ in nothing else are the same experiment.
HOW = ("device", "data_dir", "compile", "out", "resume", "eval", "save_every")


# --- files ---

def free_folder(name):
    """`name`, or name-2, name-3 ...: the first that does not exist."""
    number, path = 1, Path(name)
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}")
    return str(path)


def save(path, state):
    """Write a checkpoint so that `path` always holds either the old one or the new one, whole."""
    path = Path(path)
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())     # on the disk before the name points to it
    os.replace(unfinished, path)


def read(path, config):
    """A checkpoint that `save` wrote, on the CPU; ValueError where the file is none.

    `config` is the class that its configuration must be one of.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config(**state["config"])
        return state
    except Exception as error:
        raise ValueError(f"{path} is damaged or no checkpoint of train.py "
                         f"({type(error).__name__}): train it again or name another") from error


def restore(model, weights, path):
    """Load the weights of the checkpoint at `path`; ValueError where they are of another shape."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} holds a model of another shape ({first})") from None


# --- provenance ---

def provenance(device):
    """What every result says of its origin: {"commit", "device", "versions"}."""
    return {"commit": commit(), "device": describe(device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__}}


def commit():
    """The commit that this runs at: from git, else from GUIDED_MOE_COMMIT, else None."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:                 # there is no git on this machine
        here = None
    return here.stdout.strip() if here and here.stdout else os.environ.get("GUIDED_MOE_COMMIT")


def describe(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads, {platform.machine()}"
