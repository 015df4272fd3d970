"""checkpoint.py -- how does a run survive, and where do its numbers come from?

A run lives in one folder, which one process owns at a time. Every file there is written whole or
not at all. Its checkpoint holds all that the other files are made of, and a digest of its own
bytes; the one before it is kept, in case the newest is damaged later. Only tensors and primitives
are stored, so a stranger's file can be opened without running its code. Every result names the
commit, the device and the versions that made it.
"""
import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

# While a thread of an OpenMP team waits for the others it spins, as if it had the core for itself.
# On a busy machine it takes the core from those it waits for. So it sleeps soon, unless the user
# has decided otherwise: after so many turns an idle machine is as fast, and a busy one several
# times faster (notebooks/threads.py). torch reads this as it is imported: import this file first.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

import numpy as np
import torch

# The fields of a configuration that say where and how a run runs, not what it is: a resumed run may
# change them, and two runs that differ in nothing else are the same experiment.
HOW = ("device", "backend", "data_dir", "compile", "out", "resume", "eval", "images", "export",
       "save_every")
NAME, LOCK = "checkpoint.pt", ".lock"
SEAL, LENGTH = b"sha256:", (7 + 64).to_bytes(2, "little")      # of the comment that ends a file


# --- a folder that one process owns ---

def free_folder(name):
    """Make `name`, or name-2, name-3 ...: the first that does not exist, and nobody else's."""
    for number in range(1, 10_000):
        path = Path(name if number == 1 else f"{name}-{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return str(path)
    raise ValueError(f"there are too many folders like {name}: choose a name with --out")


@contextlib.contextmanager
def claim(folder, wait_for=None, flag="--out"):
    """Own a folder, which is made where it is missing, until the block or the process ends.

    Where another process owns it, ValueError; with `wait_for`, a clause like "to train the
    teacher", say so and wait instead. OSError where nothing can be written there. `flag` is what
    both tell the user to change.
    """
    folder, told = Path(folder), False
    made = not folder.exists()
    while not (file := lock(folder, flag)):
        owner = owner_of(folder)
        if wait_for is None:
            raise ValueError(f"{owner} is writing to {folder}: wait for it, or choose another "
                             f"{flag}")
        if not told:
            print(f"waiting for {owner} {wait_for} in {folder}", flush=True)
        told = True
        time.sleep(0.2)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        for part in folder.glob(".*.part"):         # of a process that was killed while it wrote
            part.unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):          # Windows keeps the name of an open file
            (folder / LOCK).unlink()
        file.close()
        if made:
            with contextlib.suppress(OSError):      # nothing came of it: nothing is left behind
                folder.rmdir()


def lock(folder, flag):
    """The folder's lock file, open and locked, or None where another process holds it.

    The system unlocks it when the process ends, however it ends.
    """
    path, file = folder / LOCK, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")   # noqa: SIM115 (claim closes it)
        take(file)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except OSError as error:
        if not file or error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise OSError(f"{folder} cannot be used ({error.strerror}): choose another {flag}"
                          ) from error
    file.close()                                    # held, or its last holder has just removed it
    return None


def take(file):
    """Lock an open file, or OSError where another process has."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:                             # Windows locks bytes: one beyond the text
        import msvcrt
        file.seek(4096)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def owner_of(folder):
    try:
        return (folder / LOCK).read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"


# --- a file that is written whole or not at all ---

def write(path, content, keep=None):
    """Replace the file at `path` by `content`, bytes or text (UTF-8), or leave it as it was.

    The file that stood there moves to `keep`, if given. OSError with one sentence if it fails.
    """
    path, content = Path(path), encoded(content)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())                 # on the disk before the name points to it
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error.strerror}): what was there before is "
                      f"kept") from error
    if hasattr(os, "O_DIRECTORY"):                  # the names too; Windows opens no folder
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):          # and some file systems sync none
            os.fsync(folder)
        os.close(folder)


def encoded(content):
    # a file's name may hold what is no UTF-8
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def mend(path, content):
    """Write a file unless `content` is what it holds already; returns whether it was written."""
    content = encoded(content)
    if path.is_file() and path.read_bytes() == content:
        return False
    write(path, content)
    return True


def printable():
    """Let no character that the terminal lacks end a run: it is printed as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# --- the checkpoint ---

def save(path, state):
    """Write a checkpoint and keep the whole one before it; FloatingPointError where a number in
    `state` is not finite."""
    path, content = Path(path), seal(state)
    whole = path.is_file() and is_whole(path.read_bytes())
    write(path, content, keep=before(path) if whole else None)


def before(path):
    """Where the checkpoint before the newest one is kept."""
    return Path(path).with_suffix(".before.pt")


def exists(path):
    return Path(path).is_file() or before(path).is_file()


def seal(state):
    """The bytes of a checkpoint, which torch.load reads, and at their end their own SHA-256."""
    if bad := not_finite(state):
        raise FloatingPointError(f"{bad} is not finite, so nothing is saved")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()         # a zip archive; its last two bytes are a comment's length
    return content[:-2] + LENGTH + SEAL + hashlib.sha256(content).hexdigest().encode()


def is_whole(content):
    """Whether the bytes of a checkpoint are those that were sealed; None where there is no seal,
    as in a file of an older version."""
    end = content.rfind(b"PK\5\6") + 20             # a zip archive ends in 22 bytes and a comment
    if end < 20 or content[end:] == b"\0\0":
        return None
    right = hashlib.sha256(content[:end] + b"\0\0").hexdigest().encode()
    return content[end:] == LENGTH + SEAL + right


def read(path, config, needs=()):
    """The newest whole checkpoint at `path`, on the CPU; ValueError where there is none.

    `config` is the class that its configuration must be one of; `needs` are keys that it must hold
    beside its configuration, epoch and weights. Where the one before the newest has to serve, this
    is said.
    """
    path, why = Path(path), None
    if not path.name:
        raise ValueError(f"{path} is no checkpoint but a folder: name the file in it")
    # only a run writes two files; a mistyped name must not find the older one
    for file in (path, before(path)) if path.suffix == Path(NAME).suffix else (path,):
        if not file.is_file():
            continue
        try:
            state = read_one(file, config, needs)
        except ValueError as error:
            why = why or error
            continue
        if file != path:
            print(f"{why or f'{path} is gone'}. Going on with {file}, epoch {state['epoch']}")
        return state
    raise ValueError(f"{why}. Train it again, or name another" if why else
                     f"there is no checkpoint at {path}")


def read_one(path, config, needs):
    content = path.read_bytes()
    if is_whole(content) is False:
        raise ValueError(f"{path} is damaged: its content is not what was written")
    if path.suffix == ".safetensors":
        safetensors()                                   # speaks up if it is missing
    try:
        state = from_safetensors(content) if path.suffix == ".safetensors" else torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True)
        given = dict(state["config"])
    except Exception as error:
        raise ValueError(f"{path} is damaged or no checkpoint of train.py "
                         f"({type(error).__name__})") from error
    if missing := [key for key in ("epoch", "student", *needs) if key not in state]:
        raise ValueError(f"{path} was written by another version of train.py: it has no "
                         f"{missing[0]!r}")
    if odd := set(given) - {f.name for f in fields(config)}:
        raise ValueError(f"{path} was written by another version of train.py: this one has no "
                         f"--{min(odd)}")
    if state["epoch"] not in range((given.get("epochs") or 0) + 1):
        raise ValueError(f"{path} cannot be right: epoch {state['epoch']} of "
                         f"{given.get('epochs')}")
    if bad := not_finite(state):
        raise ValueError(f"{path} holds a number that is not finite, in {bad}")
    return state


def to_safetensors(state, path):
    """Write the weights of a checkpoint to a safetensors file, and all else that `read` needs of it
    into the file's own notes."""
    buffer = safetensors().save(
        {name: tensor.contiguous() for name, tensor in state["student"].items()},
        {key: json.dumps(state[key]) for key in ("config", "epoch", "data_md5", "shown")
         if key in state})
    write(path, buffer)


def from_safetensors(content):
    """A checkpoint's state, as far as a safetensors file holds it."""
    length = int.from_bytes(content[:8], "little")
    notes = json.loads(content[8:8 + length]).get("__metadata__", {})
    return {key: json.loads(value) for key, value in notes.items()} | {
        "student": safetensors().load(content)}


def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("safetensors is not installed here: pip install safetensors") from None
    return safetensors.torch


def not_finite(state, name=""):
    """The name of the first tensor in nested dicts and lists that is not finite, or None."""
    if isinstance(state, torch.Tensor):
        sound = not state.is_floating_point() or torch.isfinite(state).all()
        return None if sound else name
    parts = state.items() if isinstance(state, dict) else (
        enumerate(state) if isinstance(state, list | tuple) else ())
    return next((bad for key, part in parts
                 if (bad := not_finite(part, f"{name}.{key}" if name else str(key)))), None)


def restore(model, weights, path):
    """Load the weights of the checkpoint at `path`; ValueError where they are of another shape."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} holds a model of another shape ({first})") from None


def fingerprint(weights):
    """SHA-256 of named tensors: two models have the same one if they are the same bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def get_rng(device):
    """The states of the generators that a run draws from: the CPU's and, on a GPU, that one's."""
    kind = torch.device(device).type
    on_gpu = [torch.cuda.get_rng_state(device)] if kind == "cuda" else (
        [torch.mps.get_rng_state()] if kind == "mps" else [])
    return [torch.get_rng_state(), *on_gpu]


def set_rng(states, device):
    torch.set_rng_state(states[0])
    kind, on_gpu = torch.device(device).type, states[1:]    # none where the run began on a CPU
    if on_gpu and kind == "cuda":
        torch.cuda.set_rng_state(*on_gpu, device)
    elif on_gpu and kind == "mps":
        torch.mps.set_rng_state(*on_gpu)


# --- a request to stop ---

class Stopped(Exception):
    """A run was asked to stop and has saved all that it had."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number               # as a shell would say it


@contextlib.contextmanager
def until_asked_to_stop(what="stopping after this step"):
    """Catch Ctrl-C and SIGTERM: the list in `as` is empty until one has come, and then names it.

    So a training step is never cut in two. The same request once more ends the process at once;
    torchrun follows Ctrl-C by a SIGTERM of its own. `what` is what the caller does about the first.
    """
    asked, earlier = [], {}

    def note(number, frame):
        if number in asked:
            raise KeyboardInterrupt
        asked.append(number)
        if what:
            print(f"\n{what}; once more to stop at once", file=sys.stderr, flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):       # only a process's main thread may listen
            earlier[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


# --- provenance ---

def provenance(device):
    """What every result says of its origin: {"commit", "device", "versions"}."""
    return {"commit": commit(), "device": describe(device),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                         "torchvision": version("torchvision"), "numpy": np.__version__}}


def commit():
    """The commit that this runs at: from git, else from GUIDED_MOE_COMMIT, else None."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:                                 # there is no git on this machine
        here = None
    return here.stdout.strip() if here and here.stdout else os.environ.get("GUIDED_MOE_COMMIT")


def describe(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads, {platform.machine()}"
