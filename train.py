"""train.py -- how is a sparse ViT trained, by which loss, and what came of it?

    python train.py                                 the main job, TGR + MoDE; a demo on a CPU
    python train.py --method moe --k 1              V-MoE, the baseline of TGR-MoE
    python train.py --method tgr --k 1 --seed 3     teacher-guided routing as in its paper
    python train.py --resume --out runs/NAME        go on where an interrupted run stopped
    python train.py --eval runs/NAME/checkpoint.pt  test a checkpoint, also by class; with
                                                    --images DIR ask it, with --export FILE take it
    torchrun --nproc-per-node=2 train.py            the same on two GPUs, half of each batch on each

From top to bottom: what can be set, what is minimised, how a model is looked at, one epoch, the
whole run, what the flags ask for, what a trained model is asked, several processes, the command.
"""
import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import checkpoint

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

import kernels
import report
from data import (
    Data,
    Sets,
    batches,
    class_names,
    load,
    split,
    square,
    steps_per_epoch,
    trainable,
)
from distill import mutual_distillation_loss
from kernels import BACKENDS, why_not_fused
from moe import MLP, MoE, SoftMoE, ViT
from router import GATES, averaged, entropy_loss, load_loss, processes
from teacher import Guide, guidance_loss, pretrained, teacher_router_losses

# --- what can be set: every field is a flag, a help line and a part of every result ---

METHODS = {     # what each one adds to the task loss
    "dense": (),                                # no experts
    "soft": (),                                 # Soft MoE: every token mixes into every expert
    "moe": ("balance",),                        # V-MoE as the TGR paper trains it
    "tgr": ("guide",),                          # teacher-guided routing, TGR-MoE
    "mode": ("balance", "mutual"),              # mutual distillation among experts, MoDE
    "tgr+mode": ("guide", "mutual"),
}

# Which flags has a method no use for? Those of a part that it lacks; without any part it has no
# router either.
USED_BY = {"guide": ("teacher", "teacher_pixels", "teacher_epochs", "guide_weight", "guide_until",
                     "guide_tokens"),
           "mutual": ("alpha",)}
ROUTED = ("k", "gate", "noise", "capacity_factor", "load_weight", "entropy_weight", "backend")


def idle_flags(argv, method):
    """The flags of a command that change nothing with its method."""
    parts, given = METHODS[method], {
        word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    idle = [name for part, names in USED_BY.items() if part not in parts for name in names]
    idle += [] if parts else ROUTED
    idle += ["n_experts"] if method == "dense" else []
    return [name for name in idle if name in given]


def flag(default, help, choices=None, own=False, **bounds):
    """A field that is a flag; `bounds` on a number: at_least, at_most, above, below."""
    return field(default=default, metadata={"help": help, "choices": choices, "own": own,
                                            "bounds": bounds})


def own(*given, **bounds):
    """A flag of the student alone; every other one is also its teacher's."""
    return flag(*given, own=True, **bounds)


@dataclass
class Config:
    """Train a dense or sparse ViT. A preset fills only the fields that you do not give."""
    method: str = own("tgr+mode", "what is trained", tuple(METHODS))
    preset: str = flag(None, "sizes and recipe; by default small on a GPU, tiny without",
                       ("tiny", "small"))
    seed: int = own(0, "of the weights, the order of the images and their augmentation",
                    at_least=0, at_most=99_999_999)
    # data
    data: str = flag("auto", "which images: auto, cifar100, cifar10, synthetic or folder:DIR")
    image_size: int = flag(32, "pixels on a side; pictures of another size are resized", at_least=8,
                           at_most=1_024)
    data_dir: str = flag("data", "where CIFAR-100 or CIFAR-10 lies or is put")
    labels: str = flag("fine", "100 fine or 20 coarse classes", ("fine", "coarse"))
    split: str = flag("full", "full: train on all, test once at the end; val: hold a tenth of the "
                      "training images out, look at them every epoch, never test", ("full", "val"))
    train_images: int = flag(None, "train on this many; 0 is all, as it is of a folder", at_least=0)
    augment: str = flag(None, "none, light: crop and flip, heavy: and affine, colour, erasing",
                        ("none", "light", "heavy"))
    mixup: float = flag(None, "alpha of mixup; 0 is off", at_least=0)
    cutmix: float = flag(None, "alpha of cutmix; 0 is off", at_least=0)
    # model
    dim: int = flag(None, "D, the width", at_least=1, at_most=16_384)
    depth: int = flag(None, "blocks", at_least=1, at_most=1_000)
    heads: int = flag(None, "attention heads", at_least=1)
    patch: int = flag(None, "pixels on a patch's side", at_least=1)
    mlp_ratio: float = flag(None, "H / D of a plain MLP", above=0, at_most=1_000)
    drop_path: float = flag(None, "stochastic depth of the last block", at_least=0, below=1)
    moe_blocks: str = own(None, "blocks that are sparse, counted from 1: 5,7,9")
    expert_ratio: float = own(None, "H / D of one expert, or of the MLPs in moe_blocks with "
                              "--method dense; by default mlp_ratio", above=0, at_most=1_000)
    n_experts: int = own(8, "E", at_least=1, at_most=4_096)
    k: int = own(2, "K, experts per token", at_least=1)
    gate: str = own("softmax_topk", "how a chosen expert is weighted", GATES)
    noise: float = own(0.0, "router noise in training, in units of V-MoE's 1/E", at_least=0)
    capacity_factor: float = own(None, "room per expert over an even share; not given: dropless",
                                 at_least=0)
    # objective
    label_smoothing: float = flag(None, "of the task loss", at_least=0, below=1)
    load_weight: float = own(0.005, "of L_load, on the routers or with tgr on the teacher's",
                             at_least=0)
    entropy_weight: float = own(0.005, "of L_ent, likewise", at_least=0)
    guide_weight: float = own(5.0, "of the KL to the teacher's routers, over the MoE blocks' mean",
                              at_least=0)
    guide_until: float = own(1.0, "the share of training that is guided; 0.5 is the first half",
                             at_least=0, at_most=1)
    guide_tokens: str = own("all", "which tokens are guided", ("all", "class", "patches"))
    alpha: float = own(0.01, "of the mutual distillation, over the MoE blocks' mean", at_least=0)
    # optimiser
    epochs: int = own(None, "passes over the training images", at_least=1)
    batch_size: int = flag(None, "images per step", at_least=1)
    lr: float = flag(None, "AdamW's peak learning rate; warm-up, then cosine to 0", above=0)
    warmup_epochs: float = flag(None, "epochs of linear warm-up", at_least=0)
    weight_decay: float = flag(0.05, "AdamW's, on matrices only", at_least=0)
    clip: float = flag(1.0, "largest norm of the gradient", above=0)
    # teacher
    teacher: str = own(None, "checkpoint of a dense run, torchvision:NAME or "
                       "torchvision:NAME:FILE; without one a teacher is trained first")
    teacher_pixels: int = own(None, "on a side of what a torchvision teacher sees; by default 224, "
                              "and 64 without CUDA", at_least=32, at_most=1_024)
    teacher_epochs: int = own(None, "by default as --epochs", at_least=1)
    # machine and files
    device: str = flag("auto", "cuda, cpu, ...; auto: cuda where there is one")
    precision: str = flag("auto", "auto: bf16 on a GPU that has it, else fp16 there; fp32 on a CPU",
                          ("auto", "fp32", "bf16", "fp16"))
    compile: bool = flag(None, "torch.compile; by default on a GPU with Triton and bf16")
    backend: str = own("auto", "rung of kernels.py that computes the experts", ("auto", *BACKENDS))
    out: str = own(None, "folder of the run; by default a new one under runs/")
    save_every: int = flag(None, "epochs between checkpoints", at_least=1)
    probe_images: int = flag(256, "fixed training images whose routing is recorded every epoch",
                             at_least=1)
    resume: bool = own(False, "continue the run in --out")
    eval: str = own(None, "only test this checkpoint")
    images: str = own(None, "with --eval: a folder of pictures to be classified instead")
    export: str = own(None, "with --eval: write the model to this file, .safetensors or .pt2")


PRESETS = {
    # 2.7 M dense parameters, 190 MMAC: the ViT of SPT_LSA, with its recipe's augmentation
    "small": dict(dim=192, depth=9, heads=12, patch=4, mlp_ratio=2.0, moe_blocks="5,7,9",
                  drop_path=0.1, epochs=100, warmup_epochs=10.0, batch_size=512, lr=2e-3,
                  augment="heavy", mixup=0.8, cutmix=1.0, label_smoothing=0.1, train_images=0,
                  save_every=10),
    # what two CPU cores train in a minute
    "tiny": dict(dim=96, depth=6, heads=3, patch=8, mlp_ratio=2.0, moe_blocks="2,4,6",
                 drop_path=0.0, epochs=5, warmup_epochs=0.5, batch_size=128, lr=2e-3,
                 augment="light", mixup=0.0, cutmix=0.0, label_smoothing=0.0, train_images=10_000,
                 save_every=1),
}
TEACHERS_SEED = 99_999_999
# a checkpoint may be used on another machine than its own, which chooses these anew
OF_THE_MACHINE = {"device": "auto", "backend": "auto", "compile": None}
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse(argv):
    """The flags that were given, as a dict; an unknown flag ends with one sentence and code 2."""
    # not from `Config` itself: a preset must know which flags were left open
    parser = argparse.ArgumentParser(
        description=Config.__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False,
        usage="python train.py [--FLAG VALUE ...]; --help explains every flag")
    for f in fields(Config):
        how = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        shown = "from the preset" if f.name in PRESETS["tiny"] else f.default
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} [{shown}]", **how)
    parser.add_argument("--config", help="a result.json: repeat its run, but for the flags given")
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        # an unset shell variable, most likely; argparse makes a list of --
        if value == [] or (value == "" and name != "moe_blocks"):
            parser.error(f"--{name} is empty: give it a value, or leave it out")
    if "config" in given:
        try:
            repeated = json.loads(Path(given.pop("config")).read_text(encoding="utf-8"))["config"]
            Config(**repeated)
            for f in fields(Config):
                its, kinds = repeated.get(f.name), (f.type, int) if f.type is float else f.type
                if its is not None and (not isinstance(its, kinds)
                                        or its not in (f.metadata["choices"] or [its])):
                    raise ValueError(f"its {f.name} cannot be {its!r}")
            made_by = repeated["preset"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            parser.error(f"--config needs the result.json of a run ({error})")
        if given.get("preset", made_by) != made_by:
            parser.error(f"--config has the numbers of preset {made_by}: leave --preset out, or "
                         f"--config")
        given = {name: value for name, value in repeated.items()
                 if name not in checkpoint.HOW and value is not None} | given
    return given


def resolve(given):
    """A Config with nothing left open: the flags, then the preset, then what follows.

    ValueError with one sentence that names the flag where a value cannot be.
    """
    cfg = Config(**given)
    cuda = torch.cuda.is_available()
    if cfg.device == "auto":
        cfg.device = "cuda" if cuda else "cpu"
    if processes() > 1:
        cfg.device = device_of_this_process(cfg.device)
    check_device(cfg.device)
    on_gpu = cfg.device.startswith("cuda")
    cfg.preset = cfg.preset or ("small" if on_gpu else "tiny")
    if cfg.train_images is None and cfg.data.startswith("folder:"):
        cfg.train_images = 0                                # of your own pictures, all
    for name, value in PRESETS[cfg.preset].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.expert_ratio is None:
        cfg.expert_ratio = cfg.mlp_ratio
    if cfg.teacher_epochs is None:
        cfg.teacher_epochs = cfg.epochs
    if cfg.teacher_pixels is None and is_torchvision(cfg.teacher):
        cfg.teacher_pixels = 224 if on_gpu else 64
    if cfg.precision == "auto":
        native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.precision = ("bf16" if native else "fp16") if on_gpu else "fp32"
    if cfg.compile is None:
        # by `grouped`, routed experts are one graph in bfloat16 alone
        one_graph = (cfg.precision == "bf16" or cfg.backend == "fused"
                     or cfg.method in ("dense", "soft"))
        cfg.compile = on_gpu and one_graph and find_spec("triton") is not None
    if cfg.compile and on_gpu and torch.cuda.get_device_capability(cfg.device) < (7, 0):
        print(f"not compiled, for torch.compile needs a GPU of compute capability 7.0 or newer: "
              f"{checkpoint.describe(cfg.device)} is older", flush=True)
        cfg.compile = False
    if cfg.backend == "fused" and (why := no_fused_run(cfg)):
        raise ValueError(f"--backend fused cannot run here: {why}; leave it out")
    check_numbers(cfg)
    return cfg


def no_fused_run(cfg):
    """Why can a run on this device and in this precision not use the fused rung? None if it can."""
    probe = torch.empty(0, device=cfg.device, dtype=AUTOCAST[cfg.precision])
    return why_not_fused(probe, probe)


def is_torchvision(teacher):
    return teacher is not None and teacher.startswith("torchvision:")


def check_device(name):
    """ValueError where the device cannot be had; a build of torch without CUDA is told apart, and
    so is one that was not made for a card as old as this."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"there is no device {name!r}: choose auto, cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        raise ValueError(("there is no CUDA device here" if built else
                          "this build of torch has no CUDA (pytorch.org says how to get one)")
                         + ": leave --device out or give --device cpu")
    if kind == "cuda":
        if (torch.device(name).index or 0) >= (count := torch.cuda.device_count()):
            raise ValueError(f"there is no {name}, for they are counted from 0 and this machine "
                             f"has {count}: leave --device out or give --device cuda")
        its = torch.cuda.get_device_capability(name)
        made_for = [divmod(int(re.sub(r"\D", "", arch)), 10)           # of sm_75, sm_90a, sm_120
                    for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
        if made_for and its < min(made_for):
            raise ValueError(
                "this build of torch was made for GPUs of compute capability {}.{} and newer, and "
                "{} has {}.{}".format(*min(made_for), checkpoint.describe(name), *its)
                + ": install one that was made for it (pytorch.org lists them), or give "
                  "--device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("there is no MPS device here: leave --device out or give --device cpu")
    if kind not in ("cpu", "cuda", "mps") or (kind == "cpu" and torch.device(name).index):
        raise ValueError(f"--device {name} is not one that train.py knows: choose cpu, cuda or mps")


def check_numbers(cfg):
    """ValueError where a number is out of its bounds, or does not go with another one."""
    words = {"at_least": ("at least", lambda a, b: a >= b), "above": ("above", lambda a, b: a > b),
             "at_most": ("at most", lambda a, b: a <= b), "below": ("below", lambda a, b: a < b)}
    for f in fields(cfg):
        value, bounds = getattr(cfg, f.name), f.metadata["bounds"]
        inside = value is None or not bounds or (
            math.isfinite(value) and all(words[b][1](value, n) for b, n in bounds.items()))
        if not inside:
            wanted = " and ".join(f"{words[b][0]} {n:,}" for b, n in bounds.items())
            raise ValueError(f"--{f.name} {value} is out of range: choose a number {wanted}")
    for name, epochs in (("epochs", cfg.epochs), ("teacher_epochs", cfg.teacher_epochs)):
        teaches = name == "epochs" or ("guide" in METHODS[cfg.method] and not cfg.teacher)
        if cfg.warmup_epochs >= epochs and teaches:
            raise ValueError(f"--warmup_epochs {cfg.warmup_epochs:g} must be below --{name} "
                             f"{epochs}: the learning rate would end before its peak")
    for name in ("mixup", "cutmix"):
        if 0 < getattr(cfg, name) < 0.01:
            raise ValueError(f"--{name} {getattr(cfg, name):g} is too small for the draw from "
                             f"Beta(alpha, alpha): give 0, which is off, or 0.01 or more")
    if cfg.batch_size % processes():
        raise ValueError(f"--batch_size {cfg.batch_size} does not divide among {processes()} "
                         f"processes: choose a multiple of that")
    for name in ("mlp_ratio", "expert_ratio"):
        if int(cfg.dim * getattr(cfg, name)) < 1:
            raise ValueError(f"--{name} {getattr(cfg, name)} times --dim {cfg.dim} leaves no "
                             f"hidden unit: choose a larger one")


def build(cfg, data):
    """The ViT that cfg describes, on its device, drawn from cfg.seed."""
    hidden, expert_hidden = int(cfg.dim * cfg.mlp_ratio), int(cfg.dim * cfg.expert_ratio)
    n_tokens = (cfg.image_size // cfg.patch) ** 2 + 1
    try:
        blocks = tuple(int(b) for b in cfg.moe_blocks.split(",") if b)
    except ValueError:
        raise ValueError(f"--moe_blocks {cfg.moe_blocks} are no block numbers: "
                         f"write them as 5,7,9") from None

    if len(set(blocks)) < len(blocks):
        raise ValueError(f"--moe_blocks {cfg.moe_blocks} names a block twice")
    if not blocks and cfg.method != "dense":
        raise ValueError(f"--method {cfg.method} needs at least one block in --moe_blocks")

    def make_sparse():
        if cfg.method == "dense":
            return MLP(cfg.dim, expert_hidden)
        if cfg.method == "soft":
            return SoftMoE(cfg.dim, expert_hidden, cfg.n_experts, n_tokens)
        return MoE(cfg.dim, expert_hidden, cfg.n_experts, cfg.k, "mutual" in METHODS[cfg.method],
                   backend=cfg.backend, gate=cfg.gate, noise=cfg.noise,
                   capacity_factor=cfg.capacity_factor)

    torch.manual_seed(cfg.seed)
    vit = ViT(cfg.dim, cfg.depth, cfg.heads, hidden, cfg.patch, len(class_names(cfg, data)), blocks,
              make_sparse, cfg.drop_path, cfg.image_size)
    return vit.to(cfg.device)


# --- what is minimised ---

def objective(cfg, output, targets, teacher_logits=None):
    """Every term of the loss, already weighted; their sum is what training minimises.

    output of the student, targets (B, n_classes), teacher_logits {block: (T, E)} from a `Guide`,
    or None where nothing is guided: in the other methods, and after --guide_until. The guidance is
    the mean over the blocks that the Guide has: all sparse ones, as in the paper, unless its caller
    chose some (ours).
    """
    terms = {"task": F.cross_entropy(output.logits.float(), targets,
                                     label_smoothing=cfg.label_smoothing)}
    routed = {b: layer for b, layer in output.layers.items() if layer.routing is not None}
    if "balance" in METHODS[cfg.method]:
        terms["load"] = cfg.load_weight * sum(
            load_loss(layer.routing.probs) for layer in routed.values())
        terms["entropy"] = cfg.entropy_weight * sum(
            entropy_loss(layer.routing.logits) for layer in routed.values())
    if teacher_logits is not None:
        # load and entropy shape the teacher's routers; the student's only follow them
        load, entropy = teacher_router_losses(teacher_logits)
        terms["teacher_load"] = cfg.load_weight * load
        terms["teacher_entropy"] = cfg.entropy_weight * entropy
        n_tokens = len(next(iter(output.layers.values())).h) // len(targets)
        terms["guidance"] = cfg.guide_weight / len(teacher_logits) * sum(
            guidance_loss(z, routed[b].routing.logits, cfg.guide_tokens, n_tokens)
            for b, z in teacher_logits.items())
    if "mutual" in METHODS[cfg.method]:
        terms["mutual"] = cfg.alpha / len(routed) * sum(
            mutual_distillation_loss(layer.raw) for layer in routed.values())
    return terms


def losses(cfg, student, guide, images, targets):
    """One forward pass of student and, unless guide is None, teacher: the terms of `objective`."""
    with autocast(cfg, images):
        return objective(cfg, student(images), targets, guide(images) if guide else None)


def autocast(cfg, images):
    return torch.autocast(images.device.type, AUTOCAST[cfg.precision], cfg.precision != "fp32")


# --- how a model is looked at ---

@torch.no_grad()
def outputs(model, images, cfg, data, batch=500):
    """The model's `Output` on each batch of clean images, in evaluation mode."""
    model.eval()
    for some in images.split(batch):
        with autocast(cfg, some):
            yield model(data.normalise(some))


def accuracy(model, images, labels, cfg, data):
    logits = torch.cat([out.logits for out in outputs(model, images, cfg, data)])
    return (logits.argmax(dim=1) == labels).float().mean().item()


class Look(NamedTuple):
    """What a model says and does on B images; None where nothing is routed, over L blocks."""
    logits: Tensor                          # (B, n_classes)
    chosen: Tensor | None = None            # (L, B, N, K), as small as E allows
    probs: Tensor | None = None             # (L, B, N, E) float16
    dropped: float | None = None            # share of the choices that found their expert full


def look(model, images, cfg, data):
    """Logits and routing of clean images: a `Look`."""
    logits, chosen, probs, dropped = [], [], [], 0
    small = torch.uint8 if cfg.n_experts <= 256 else torch.int16
    for out in outputs(model, images, cfg, data):           # an Output holds far more than is kept
        logits.append(out.logits)
        routed = [layer.routing for layer in out.layers.values() if layer.routing is not None]
        for kept, name, dtype in ((chosen, "chosen", small), (probs, "probs", torch.float16)):
            of_some = [getattr(r, name).view(len(out.logits), model.n_tokens, -1) for r in routed]
            kept += [torch.stack(of_some).to("cpu", dtype)] if routed else []   # (L, B, N, K or E)
        dropped += sum(int(r.dropped) for r in routed)
    if not chosen:
        return Look(torch.cat(logits))
    chosen = torch.cat(chosen, dim=1)
    return Look(torch.cat(logits), chosen, torch.cat(probs, dim=1), dropped / chosen.numel())


# --- one epoch ---

class Job(NamedTuple):
    """One model to train, a dense teacher or a student, and where it stands."""
    cfg: Config
    data: Data
    sets: Sets
    model: ViT
    state: dict | None       # the checkpoint it continues from

    @property
    def ended(self):
        return self.state is not None and self.state["result"] is not None


@dataclass
class Progress:
    """How far a run has come: what its checkpoint holds beside the weights and the optimiser."""
    epoch: int = 0           # so many have ended
    step: int = 0            # and so many steps of the next one, where it was asked to stop
    spent: float = 0.0       # seconds in the next epoch
    seconds: float = 0.0     # in those that have ended
    sums: dict = field(default_factory=dict)        # of each term over the next epoch's steps
    rng: list = field(default_factory=list)         # states of the generators: CPU, then GPU
    command: str = ""        # that began it
    lines: list = field(default_factory=list)       # of metrics.jsonl
    history: list = field(default_factory=list)     # Look.chosen after each epoch
    probs: Tensor | None = None                     # Look.probs of the last one


# what a checkpoint must hold for its run to go on
RESUMABLE = ("data_md5", "optimizer", "scaler", "routers", "teacher", "result",
             *(f.name for f in fields(Progress)))


def one_epoch(job, guide, losses, optimizer, scaler, progress, asked):
    """Train on every batch once; returns the epoch's mean of each term, {name: float}.

    Begins after `progress.step` steps. Once `asked` is not empty it stops after the step that it
    is at, notes in `progress` where that was, and returns None. Raises FloatingPointError when loss
    or gradient stop being finite, before that step is taken.
    """
    cfg, data, sets, model, _ = job
    epoch, steps = progress.epoch + 1, steps_per_epoch(cfg, sets)
    on_gpu = torch.device(cfg.device).type != "cpu"
    # a check makes the host wait for a GPU, which should find its next work waiting instead
    check_every = 50 if on_gpu else 1
    torch.manual_seed(cfg.seed * 100_003 + epoch)      # of stochastic depth and router noise
    if progress.rng and processes() == 1:
        checkpoint.set_rng(progress.rng, cfg.device)
    model.train()
    bar = tqdm(batches(cfg, data, sets, epoch), total=steps, leave=False, ascii=True,
               desc=f"epoch {epoch}/{cfg.epochs}", disable=rank() > 0 or not sys.stderr.isatty())
    for step, (images, targets) in enumerate(bar):
        if step < progress.step:                       # trained on before the run was interrupted
            continue
        now = epoch - 1 + step / steps                 # in epochs
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, now)
        images, targets = own_share(images, targets)
        if processes() > 1:
            torch.manual_seed(hash((cfg.seed, epoch, step, rank())))

        # forward; once guidance has ended, the teacher is not even asked
        guided = guide if now < cfg.guide_until * cfg.epochs else None
        where = f"epoch {epoch}, step {step + 1}"
        with told(where, cfg):                         # on a CPU a router looks, and speaks up
            terms = losses(cfg, model, guided, images, targets)
        loss = sum(terms.values())

        # backward; in fp16 the loss is scaled up, or small gradients would round to 0
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if processes() > 1:
            average_gradients(optimizer)
        scaler.unscale_(optimizer)
        # the student's gradient alone is clipped: its teacher's routers must not slow it down
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        check = step % check_every == 0 or step == steps - 1
        if check:
            first(stop_unless_finite, averaged(loss), norm, scaler, model, images, cfg, where)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.clip, norm)
        scaler.step(optimizer)
        scaler.update()

        # note; .item() would wait for the GPU in every step
        for name, term in terms.items():
            progress.sums[name] = progress.sums.get(name, 0) + term.detach()
        progress.step = step + 1
        # processes would have to wait for each other's answer, so these ask seldom
        if (check or processes() == 1) and agreed(asked) and progress.step < steps:
            progress.rng = checkpoint.get_rng(cfg.device)
            progress.sums = {name: averaged(total) for name, total in progress.sums.items()}
            return None
    means = {name: averaged(total / steps).item() for name, total in progress.sums.items()}
    progress.epoch, progress.step, progress.sums, progress.rng = epoch, 0, {}, []
    return means


def learning_rate(cfg, progress):
    """Linear warm-up, then cosine to 0; progress in epochs."""
    if progress < cfg.warmup_epochs:
        return cfg.lr * progress / cfg.warmup_epochs
    left = (cfg.epochs - progress) / max(cfg.epochs - cfg.warmup_epochs, 1e-9)
    return cfg.lr * 0.5 * (1 - math.cos(math.pi * left))


def stop_unless_finite(loss, norm, scaler, model, images, cfg, where):
    # Under a loss scaler an infinite gradient is routine: its step is skipped and the scale halved.
    # But where next to nothing is left of the scale, no step has been taken for long.
    routine = scaler.is_enabled() and scaler.get_scale() > 1e-3
    if torch.isfinite(loss) and (routine or torch.isfinite(norm)):
        return
    with told(where, cfg):
        with torch.no_grad(), autocast(cfg, images):
            model.eval()(images)    # only here would a router that is compiled, or on a GPU, speak
        bad = [name for name, p in model.named_parameters()
               if p.grad is not None and not torch.isfinite(p.grad).all()]
        raise FloatingPointError(
            f"the loss is {loss.item():.4g} and the gradient of {bad[0] if bad else 'nothing'} is "
            f"{'not ' if bad else ''}finite")


@contextlib.contextmanager
def told(where, cfg):
    """Of a number that is not finite, say where that was and what to do."""
    try:
        yield
    except FloatingPointError as error:
        other = "" if cfg.precision == "fp32" else " or with --precision fp32"
        error.args = (f"{where}: {error}; the last checkpoint is kept. Start another run, with "
                      f"another --out, at a lower --lr than {cfg.lr:g}{other}",)
        raise


def less_memory(job):
    """What to do where there was not enough of it."""
    if job is None:
        return "give another --device, or end what else uses the memory of this one"
    cfg, other = job.cfg, ""
    if is_torchvision(cfg.teacher):
        other = f"; or at --teacher_pixels {max(32, cfg.teacher_pixels // 2)}"
    return (f"the last checkpoint is kept. Start another run, with another --out, at --batch_size "
            f"{max(1, cfg.batch_size // 2)}, which halves what a step needs, and at a lower --lr "
            f"than {cfg.lr:g}{other}")


# --- the run ---

def begin(job, command):
    """The job with its first checkpoint, of epoch 0: from then on its folder knows what it is."""
    if job.state:
        return job
    first(Path(job.cfg.out).mkdir, parents=True, exist_ok=True)
    return job._replace(state=keep(job, Progress(command=command)))


def keep(job, progress, guide=None, optimizer=None, scaler=None, result=None):
    """Save all that a run is; returns what was saved."""
    state = {"config": asdict(job.cfg), "data_md5": job.data.md5, **vars(progress),
             "student": job.model.state_dict(), "shown": job.data.shown(),
             "optimizer": optimizer and optimizer.state_dict(),
             "scaler": scaler and scaler.state_dict(),
             "routers": guide.routers.state_dict() if guide else {},
             "teacher": checkpoint.fingerprint(guide.teacher.state_dict()) if guide else None,
             "result": result}
    where = f"epoch {progress.epoch + 1}, after step {progress.step}" if progress.step else \
        f"after the last step of epoch {progress.epoch}"
    with told(where, job.cfg):
        first(checkpoint.save, Path(job.cfg.out, checkpoint.NAME), state)
    return state


def fit(job, guide=None, command="", own_losses=None):
    """Train job.model, write its run folder and return the content of its result.json.

    `own_losses` has the signature of `losses` and replaces it: this is how a study adds a control.
    A run that has ended already is only read, and its files are made again where they are not what
    the checkpoint says. FloatingPointError where a number stops being finite, `checkpoint.Stopped`
    where the process was asked to stop; both leave a checkpoint to go on from.
    """
    job = begin(job, command)
    cfg, model = job.cfg, job.model
    if job.ended:
        if mended := first(write_files, job, progress_of(job.state), job.state["result"]):
            print(f"made again from the checkpoint in {cfg.out}: {', '.join(mended)}")
        return job.state["result"]
    optimizer = torch.optim.AdamW(parameter_groups(model, guide, cfg.weight_decay),
                                  fused=cfg.device.startswith("cuda"))
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.precision == "fp16")
    progress = resume(job, guide, optimizer, scaler)
    compute = rehearsed(job, guide, own_losses or losses, progress)
    begun = progress.epoch
    if processes() > 1:
        same_everywhere(optimizer)
    with checkpoint.until_asked_to_stop("" if rank() else "stopping after this step") as asked:
        while progress.epoch < cfg.epochs:
            started = time.perf_counter() - progress.spent      # an interrupted epoch goes on
            terms = one_epoch(job, guide, compute, optimizer, scaler, progress, asked)
            progress.spent = time.perf_counter() - started
            if terms is not None:
                first(look_and_note, job, progress, terms, optimizer.param_groups[0]["lr"])
                first(say, cfg, progress, begun, time.perf_counter() - started)
            stop = agreed(asked)
            if stop or progress.epoch % cfg.save_every == 0 or progress.epoch == cfg.epochs:
                keep(job, progress, guide, optimizer, scaler)
            first(write_files, job, progress)
            if stop:
                raise checkpoint.Stopped(stop)
        result = first(conclude, job, guide, progress)
        keep(job, progress, guide, optimizer, scaler, result)
        first(write_files, job, progress, result)
    return result


def rehearsed(job, guide, losses, progress):
    """`losses`, compiled if cfg says so, once forward and backward have gone well.

    Where torch.compile or a kernel of ours fails, this is said, and cfg and the model are changed
    to what is used instead; several processes end with it. No step is taken here, and an epoch
    seeds its own generators and begins without gradients; buffers that a layer moves are put back.
    """
    cfg, data, sets, model, _ = job
    guided = guide if progress.epoch < cfg.guide_until * cfg.epochs else None
    while cfg.compile or cfg.backend == "fused":
        began, compute = time.perf_counter(), torch.compile(losses) if cfg.compile else losses
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        images, targets = own_share(*next(batches(cfg, data, sets, progress.epoch + 1)))
        model.train()
        try:
            sum(compute(cfg, model, guided, images, targets).values()).backward()
            return compute
        except Exception as error:
            if not of_a_compiler(error):
                raise
            ours = cfg.backend == "fused" and (not cfg.compile or "kernels" in modules_of(error))
            what, instead = ("--backend fused", "--backend grouped") if ours else (
                "torch.compile", "--no-compile")
            why = " ".join(str(error).split("\n\n")[0].split())[:300]
            said = (f"{what} failed ({type(error).__name__}: {why}; torch {torch.__version__}, "
                    f"{checkpoint.describe(cfg.device)}): please report it with this line")
            if processes() > 1:             # where it has not failed, the step waits for this one
                raise ValueError(f"{said}, and add {instead}") from error
            print(f"{said}. Nothing is lost, and the run goes on with {instead}", flush=True)
        finally:
            progress.spent += time.perf_counter() - began
            with torch.no_grad():
                for name, b in model.named_buffers():
                    b.copy_(buffers[name])
        if ours:
            use_backend("grouped", cfg, model)
        else:
            cfg.compile = False
    return losses


def use_backend(name, cfg, model):
    cfg.backend = name
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.backend = name


def of_a_compiler(error):
    """Is it torch.compile or Triton that failed, and not our code, a number or the memory?"""
    if isinstance(error, FloatingPointError) or out_of_memory(error):
        return False
    inside = modules_of(error)
    # not dynamo's frames, which lie between ours wherever a function of ours is compiled
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")) or any(
        name.startswith(("torch._inductor", "triton")) for name in inside)


def modules_of(error):
    """The names of the modules through which an error came, the innermost last."""
    return [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(
        error.__traceback__)]


def out_of_memory(error):
    # of torch's own class on some devices alone: a CPU's allocator raises a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(
            words in str(error) for words in ("out of memory", "can't allocate memory")))


def look_and_note(job, progress, terms, lr):
    """Look at the model after an epoch and write down what was seen: a line of metrics.jsonl."""
    cfg, data, sets, model, _ = job
    images, labels = sets.probe
    seen = look(model, images, cfg, data)
    hit = (seen.logits.argmax(dim=1) == labels).float().mean().item()
    line = {"epoch": progress.epoch, "terms": terms, "lr": lr, "probe_accuracy": hit}
    if sets.val:
        line["val_accuracy"] = accuracy(model, *sets.val, cfg, data)
    if cfg.capacity_factor is not None and seen.dropped is not None:
        line["dropped"] = seen.dropped
    line |= {"seconds": progress.spent,
             "images_per_second": steps_per_epoch(cfg, sets) * cfg.batch_size / progress.spent}
    progress.lines.append(line)
    if seen.chosen is not None:
        progress.history.append(seen.chosen)
        progress.probs = seen.probs
    progress.seconds, progress.spent = progress.seconds + progress.spent, 0.0


def write_files(job, progress, result=None):
    """Write what people and plots read, all of it from `progress`; returns the names of the files
    that were missing or held something else."""
    contents = {"metrics.jsonl": "".join(json.dumps(line) + "\n" for line in progress.lines)}
    if progress.history:
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, experts=torch.stack(progress.history).numpy(), probs=progress.probs.numpy(),
            images=job.sets.probe[0][:8].cpu().numpy(), n_experts=job.cfg.n_experts,
            layers=np.array(job.model.moe_blocks))
        contents["routing.npz"] = buffer.getvalue()
    if result:
        contents["result.json"] = json.dumps(result) + "\n"    # one line: cat makes a jsonl
    out = Path(job.cfg.out)
    mended = [name for name, content in contents.items() if checkpoint.mend(out / name, content)]
    figures = report.figures(out) if result else {}             # drawn from these files
    return mended + [name for name, png in figures.items() if checkpoint.mend(out / name, png)]


def parameter_groups(model, guide, weight_decay):
    """Weight decay on matrices alone: not on biases (an expert's are stacked), norms, positions."""
    named = [*model.named_parameters(), *(guide.routers.named_parameters() if guide else ())]
    matrix = [name.endswith(("weight", "w_in", "w_out")) and p.ndim > 1 for name, p in named]
    return [
        {"params": [p for (_, p), m in zip(named, matrix, strict=True) if m],
         "weight_decay": weight_decay},
        {"params": [p for (_, p), m in zip(named, matrix, strict=True) if not m],
         "weight_decay": 0.0}]


def resume(job, guide, optimizer, scaler):
    """Put the optimiser, the teacher's routers and the `Progress` back as job.state holds them.

    The weights are there already, since the job was made. ValueError where they do not fit, or
    where the teacher is not the one that the run began with.
    """
    state, cfg = job.state, job.cfg
    if state["optimizer"] is None:                     # only its first weights were saved
        return progress_of(state)
    if guide and checkpoint.fingerprint(guide.teacher.state_dict()) != state["teacher"]:
        raise ValueError(f"the run in {cfg.out} began with another teacher, and this one would "
                         f"change its targets: bring that one back, or start another run")
    try:
        for group in state["optimizer"]["param_groups"]:    # the run may have changed its device
            group["fused"] = optimizer.defaults["fused"]
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if guide:
            guide.routers.load_state_dict(state["routers"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint in {cfg.out} does not fit its own run "
                         f"({str(error).splitlines()[0]}): start another one") from error
    return progress_of(state)


def progress_of(state):
    return Progress(**{f.name: state[f.name] for f in fields(Progress)})


def say(cfg, progress, begun, took):
    """Print an epoch's line. The first after epoch `begun`, which took so many seconds, also says
    how long the rest will take."""
    line, left = progress.lines[-1], (cfg.epochs - progress.epoch) * took
    terms = "  ".join(f"{name} {value:.4f}" for name, value in line["terms"].items())
    seen = f"probe {line['probe_accuracy']:.1%}"
    if "val_accuracy" in line:
        seen += f"  validation {line['val_accuracy']:.1%}"
    if "dropped" in line:
        seen += f"  dropped {line['dropped']:.1%}"
    rest = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} minutes"
    spent = f"{line['seconds']:.1f} s"
    if left and progress.epoch == begun + 1:
        spent += f"  about {rest} left"
    print(f"  epoch {line['epoch']:3d}/{cfg.epochs}  {terms}  {seen}  {spent}", flush=True)


def conclude(job, guide, progress):
    """The one look at the test set: the content of result.json."""
    cfg, data, sets, model, _ = job
    exam = sets.val or sets.test
    knows = guide is not None and isinstance(guide.teacher, ViT) and (
        guide.teacher.head.out_features == model.head.out_features)
    reached = accuracy(model, *exam, cfg, data)
    total, active = model.params()
    over_time = report.consistency(torch.stack(progress.history).numpy(), cfg.n_experts) \
        if progress.history else {}
    return {
        "method": cfg.method, "preset": cfg.preset, "data": data.name, "data_md5": data.md5,
        "labels": cfg.labels, "seed": cfg.seed, "command": progress.command,
        **checkpoint.provenance(cfg.device), "processes": processes(),
        "epochs": cfg.epochs, "train_images": len(sets.train[0]), "test_images": len(exam[0]),
        "test_accuracy": None if sets.val else reached,
        "val_accuracy": reached if sets.val else None,
        "teacher_accuracy": accuracy(guide.teacher, *exam, cfg, data) if knows else None,
        "agreement_adjacent": over_time.get("mean_agreement_adjacent"),
        "agreement_final": over_time.get("half_agreement_final"),
        "load_entropy": over_time.get("final_load_entropy"),
        "images_per_second": statistics.median(
            line["images_per_second"] for line in progress.lines),
        "seconds": progress.seconds, "flops_per_image": model.flops(),
        "params_total": total, "params_active": active,
        "out": cfg.out, "config": asdict(cfg), "consistency": over_time}


# --- what the flags ask for ---

def plan(given, own=lambda folder: None, change=lambda job: None):
    """What the flags ask for, checked before anything long begins: (teacher, student) jobs.

    teacher is None where the method needs none. `own` is called with the run's folder before its
    content is looked at; by default the caller owns it. `change` is called with the student's job
    before a checkpoint is read into its model: this is how a study adds a layer. Raises ValueError
    or OSError with one sentence.
    """
    state = None
    if given.get("resume"):
        if not given.get("out"):
            raise ValueError("--resume continues the run in --out: name its folder")
        first(own, given["out"])
        state = first(run_in, given["out"])
        if state:
            refuse_other(given, state, f"the run in {given['out']} was started")
            given = state["config"] | OF_THE_MACHINE | given
    cfg = resolve(given)
    if cfg.out and not state:
        if not cfg.resume:
            first(own, cfg.out)
        first(refuse_to_overwrite, cfg)
    data = load(cfg.data, cfg.data_dir, cfg.device, size=cfg.image_size)
    cfg.data = data.name
    if "train_images" not in given and cfg.train_images > trainable(cfg, data):
        cfg.train_images = 0            # a preset's number is a ceiling: nobody has asked for it
    sets = split(cfg, data)
    model = build(cfg, data)
    job = Job(cfg, data, sets, model, state)
    change(job)
    if state:
        refuse_other_images(state, data, f"the run in {cfg.out} was started")
        checkpoint.restore(model, state["student"], cfg.out)
    # a run that has ended is only read, and its teacher may be gone
    guided = "guide" in METHODS[cfg.method] and not job.ended
    teacher = teacher_of(job) if guided else None
    if cfg.out is None:
        images = re.sub(r"\W+", "-", data.name).strip("-")
        name = f"{cfg.method}-{cfg.preset}-{images}-seed{cfg.seed}"
        cfg.out = first(checkpoint.free_folder, f"runs/{name}")
        first(own, cfg.out)
    return teacher, job


def run_in(out):
    """The state to resume in a run's folder, or None where the run has not begun."""
    path = Path(out, checkpoint.NAME)
    if checkpoint.exists(path):
        return checkpoint.read(path, Config, RESUMABLE)
    print(f"there is no checkpoint in {out} to resume: the run begins afresh")
    return None


def refuse_to_overwrite(cfg):
    if checkpoint.exists(Path(cfg.out, checkpoint.NAME)):
        raise ValueError(f"{cfg.out} already holds a run: add --resume to continue it, or choose "
                         f"another --out")
    if Path(cfg.out, "result.json").exists():
        raise ValueError(f"{cfg.out} already holds a result, whose checkpoint is gone: choose "
                         f"another --out")
    if Path(cfg.out, "metrics.jsonl").exists() and not cfg.resume:
        print(f"the run in {cfg.out} was stopped before its first checkpoint: it begins afresh")


def refuse_other(given, state, sentence):
    """ValueError where a given flag is not what a checkpoint says, and is more than a HOW."""
    for name, value in list(given.items()):
        if not hasattr(Config, name):
            raise ValueError(f"there is no flag --{name}: python train.py --help names them all")
        its = state["config"].get(name, getattr(Config, name))
        if name in checkpoint.HOW or value == its:
            continue
        if name == "data" and all(str(v).startswith("folder:") for v in (value, its)):
            continue                                        # moved, perhaps: the md5 will say
        if value == "auto":                                 # it chose `its` then
            del given[name]
            continue
        raise ValueError(f"{sentence} with --{name} {its}, not {value}: leave the flag out, or "
                         f"train another run")


def refuse_other_images(state, data, sentence):
    """ValueError where a checkpoint has seen other images: some may be of the test now."""
    if state["data_md5"] != data.md5:
        raise ValueError(f"{sentence} on other images: its data had the md5 {state['data_md5']}, "
                         f"{data.name} has {data.md5}")


def teacher_of(job):
    """The job of the dense model that teaches job.model: a given one has ended already.

    Without --teacher it is a dense run with the student's data, trunk and recipe, always of the
    seed TEACHERS_SEED, which no student has: one teacher for all seeds and methods, so that they
    differ in nothing else. A network of torchvision has no cfg.
    """
    cfg, data, sets, student, _ = job
    if is_torchvision(cfg.teacher):
        _, name, *file = cfg.teacher.split(":", 2)
        model = pretrained(name, *file or [None], cfg.teacher_pixels, (data.mean, data.std))
        return Job(None, data, sets, model.to(cfg.device), None)
    if cfg.teacher:
        state = first(checkpoint.read, cfg.teacher, Config)
        if state["config"]["method"] != "dense":
            raise ValueError(f"{cfg.teacher} is a {state['config']['method']} run: a teacher is "
                             f"dense (python train.py --method dense)")
        # as it is, however far it came
        its = replace(Config(**state["config"]), device=cfg.device, epochs=state["epoch"])
        learned = its.train_images or len(data.train.fine)
        if (cfg.split == "val" and its.split == "full" and learned > trainable(cfg, data)
                and state.get("data_md5") == data.md5):
            raise ValueError(f"{cfg.teacher} has learned the images that --split val holds out: "
                             f"train it with --split val too, or leave --split out")
        model, path = build(its, data), cfg.teacher
        checkpoint.restore(model, state["student"], path)
        if shown := state.get("shown"):
            restandardise(model, shown["mean"], shown["std"], data)
        Guide(model, student, cfg.n_experts)               # speaks up if their images differ
        return Job(its, data, sets, model, state)
    shared = {f.name: getattr(cfg, f.name) for f in fields(Config) if not f.metadata["own"]}
    if cfg.seed == TEACHERS_SEED:
        raise ValueError(f"--seed {cfg.seed} is the one of the teacher, which would then begin as "
                         f"its student: choose another")
    its = replace(Config(**shared), method="dense", seed=TEACHERS_SEED, moe_blocks="",
                  expert_ratio=cfg.mlp_ratio, epochs=cfg.teacher_epochs,
                  teacher_epochs=cfg.teacher_epochs)
    # which images, the md5 says: a folder may have moved
    recipe = {name: value for name, value in asdict(its).items()
              if name not in (*checkpoint.HOW, "data")}
    key = hashlib.md5(json.dumps([recipe, data.md5]).encode()).hexdigest()[:8]
    kind = data.name.partition(":")[0]
    its.out = str(Path("runs", "teachers", f"{cfg.preset}-{kind}-{key}"))
    if cfg.out and Path(cfg.out).resolve() == Path(its.out).resolve():
        raise ValueError(f"--out {cfg.out} is the folder of this run's teacher: choose another")
    model, path = build(its, data), Path(its.out, checkpoint.NAME)
    state = first(checkpoint.exists, path) and first(checkpoint.read, path, Config, RESUMABLE)
    if state:
        checkpoint.restore(model, state["student"], path)
    return Job(its, data, sets, model, state or None)


def restandardise(vit, mean, std, data):
    """Let a ViT that learned images standardised by mean and std, three numbers each, be given them
    as `data` standardises them: by its first layer, which then takes back what `data` did."""
    (mean, std), (mean_now, std_now) = (torch.tensor(v, dtype=torch.float64) for v in (
        (mean, std), (data.mean, data.std)))
    if torch.equal(mean, mean_now) and torch.equal(std, std_now):
        return
    # its own x is scale * x + shift; a patch's numbers are channel after channel
    scale, shift = (v.repeat_interleave(vit.patch ** 2) for v in (
        std_now / std, (mean_now - mean) / std))
    with torch.no_grad():
        weight = vit.embed.weight.double().cpu()
        vit.embed.bias += (weight @ shift).to(vit.embed.bias)
        vit.embed.weight.copy_(weight * scale)


def trained(teacher, job, command):
    """The teacher of a job, trained unless it is; of several runs that need it one trains it."""
    if job.cfg.teacher or teacher.ended:
        return teacher
    with contextlib.nullcontext() if rank() else checkpoint.claim(
            teacher.cfg.out, wait_for="to train the teacher"):
        teacher = teacher_of(job)                           # another run may have trained it now
        if not teacher.ended:
            print(f"teacher: dense, {teacher.cfg.out}")
            fit(teacher, command=command)
    return teacher


def guide_of(teacher, job):
    """The trained teacher of a job and its teacher routers, drawn from the student's seed."""
    torch.manual_seed(job.cfg.seed)
    return Guide(teacher.model, job.model, job.cfg.n_experts).to(job.cfg.device)


def try_fused(job):
    """Let "auto" be `fused` on a GPU where that is right and the faster rung in every round of
    `kernels.contest`; returns a clause that says so, or "" where nothing is to be chosen.

    A card and the code that it ran meet once: what came out is kept in torch's cache folder.
    """
    cfg, experts = job.cfg, [m.experts for m in job.model.modules() if isinstance(m, MoE)]
    if cfg.backend != "auto" or not experts or not cfg.device.startswith("cuda"):
        return ""
    E, D, H = experts[0].w_in.shape
    T = cfg.batch_size // processes() * job.model.n_tokens
    dtype = AUTOCAST[cfg.precision] or torch.float32
    if why := no_fused_run(cfg):
        return f" by the rung grouped (fused cannot run here: {why})"
    try:
        error, times = first(contest_once, T, D, H, E, cfg.k, dtype, cfg.device, cfg.compile)
    except ValueError as failure:
        return f" by the rung grouped ({failure})"
    if not error <= 2:                                      # not a number is wrong as well
        return (f" by the rung grouped (fused is wrong here, with {error:.3g} times the error: "
                f"please report this line, with torch {torch.__version__})")
    spans = f"{min(times):.2f} to {max(times):.2f} of "
    if max(times) >= 1:
        return f" by the rung grouped (fused is right here but takes {spans}its time)"
    use_backend("fused", cfg, job.model)
    return f" by the rung fused (right here, and it takes {spans}grouped's time)"


def contest_once(*layer):
    """`kernels.contest` for a layer, or what it returned here before; ValueError if it failed."""
    source = Path(kernels.__file__).read_bytes()
    of = [checkpoint.describe(layer[6]), torch.__version__, kernels.triton.__version__,
          hashlib.md5(source).hexdigest(), *map(str, layer)]
    name = hashlib.md5(json.dumps(of).encode()).hexdigest()
    kept = Path(torch.hub.get_dir(), "guided_moe", f"{name}.json")
    try:
        return json.loads(kept.read_text(encoding="utf-8"))["came_out"]
    except (OSError, ValueError, KeyError):
        pass                                                # never held, or the note is damaged
    try:
        came_out = kernels.contest(*layer)
    except Exception as error:                              # whatever a card unknown to us can do
        raise ValueError(f"fused failed here, {type(error).__name__}: "
                         f"{' '.join(str(error).split())[:300]}") from error
    with contextlib.suppress(OSError):                      # then the next run holds it again
        kept.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(kept, json.dumps({"of": of, "came_out": came_out}))
    return came_out


def announce(teacher, job, rung=""):
    """Print what will be done, on what, and by which `rung` of kernels.py."""
    cfg = job.cfg
    demo = " (a demonstration: the full recipe is preset small, on a GPU)"
    several = f" in {processes()} processes" if processes() > 1 else ""
    print(f"{cfg.method}, preset {cfg.preset}{demo if cfg.preset == 'tiny' else ''} on "
          f"{checkpoint.describe(cfg.device)}{several}, {cfg.precision}, "
          f"{'compiled' if cfg.compile else 'not compiled'}. Data: {job.data.note}")
    steps = []
    if teacher and is_torchvision(cfg.teacher):
        steps.append(f"taught by {cfg.teacher} at {teacher.model.pixels} pixels, which costs "
                     f"{seconds_of(teacher.model, job):.2g} s a step")
    elif teacher and cfg.teacher:
        other = "" if teacher.state.get("data_md5") == job.data.md5 else " on other images"
        steps.append(f"taught by {cfg.teacher}, a dense model trained for {teacher.state['epoch']} "
                     f"epochs{other}")
    elif teacher:
        begun = teacher.state["epoch"] if teacher.state else 0
        steps.append(f"a dense teacher for {teacher.cfg.epochs} epochs on the same images, kept in "
                     f"{teacher.cfg.out}" + (f" ({begun} epochs are there)" if begun else ""))
    sparse = "" if cfg.method == "dense" else f", E={cfg.n_experts} in blocks {cfg.moe_blocks}"
    sparse += f", K={cfg.k}" if cfg.method not in ("dense", "soft") else ""
    if "mutual" in METHODS[cfg.method] and cfg.k == 1:      # a compiled loss cannot warn of it
        sparse += " (one expert alone has nobody to learn from: its mutual distillation is 0)"
    steps.append(f"the {cfg.method} model for {cfg.epochs} epochs of {len(job.sets.train[0]):,} "
                 f"images{sparse}{rung}, in {cfg.out}")
    print("plan: " + "; then ".join(steps), flush=True)


def seconds_of(teacher, job, batch=32):
    """What a teacher costs in a training step, measured on a part of one."""
    images = job.data.normalise(job.sets.train[0][:batch])
    with autocast(job.cfg, images):
        for _ in range(2):                                  # the first one warms up
            began = time.perf_counter()
            teacher.features(images)[1].sum().item()        # waits for a GPU
    return (time.perf_counter() - began) * job.cfg.batch_size / len(images)


# --- what a trained model is asked, and how it leaves ---

def evaluate(given):
    """Test one checkpoint as it was trained: overall, by class, calibration, load of the experts.

    A checkpoint's word makes no folder and downloads nothing: the images lie in --data_dir, or a
    --data cifar100 of the user's own asks for them.
    """
    state = checkpoint.read(given["eval"], Config, ["data_md5"])
    refuse_other(given, state, f"{given['eval']} was trained")
    here = {"data_dir": "data"} | OF_THE_MACHINE | {"compile": False}
    cfg = resolve(state["config"] | here | given)
    data = load(cfg.data, cfg.data_dir, cfg.device, "data" in given, cfg.image_size)
    refuse_other_images(state, data, f"{given['eval']} was trained")
    model = build(cfg, data)
    checkpoint.restore(model, state["student"], given["eval"])
    images, labels = split(cfg, data).test
    seen = look(model, images, cfg, data)
    probs = seen.logits.float().softmax(dim=1)
    print(f"{given['eval']}: {cfg.method}, epoch {state['epoch']}, on the {len(labels):,} test "
          f"images of {data.name} ({cfg.labels} classes), {checkpoint.describe(cfg.device)}")
    print(report.exam_table(probs.cpu().numpy(), labels.cpu().numpy(), class_names(cfg, data)))
    if seen.chosen is not None:
        for b, chosen in zip(model.moe_blocks, seen.chosen, strict=True):
            shares = report.load_share(chosen.numpy(), cfg.n_experts)
            print(f"load of block {b}'s experts: " + " ".join(f"{share:.1%}" for share in shares))


def load_model(path, **given):
    """(model, its Config, its Data without pictures) of a checkpoint, to be shown other pictures.

    `given` are flags, as device="cuda". ValueError where the file cannot serve.
    """
    state = checkpoint.read(path, Config, ["shown"])
    refuse_other(given, state, f"{path} was trained")
    cfg = resolve(state["config"] | OF_THE_MACHINE | {"compile": False} | given)
    data = Data(**state["shown"], note="", train=None, test=None)
    model = build(cfg, data)
    checkpoint.restore(model, state["student"], path)
    return model.eval(), cfg, data


def classify(given):
    """Say what the model of a checkpoint sees on the pictures of a folder, and who saw it."""
    path = given["eval"]
    model, cfg, data = load_model(path, **{n: v for n, v in given.items() if n != "eval"})
    folder, out = Path(cfg.images), given.get("out")
    files = sorted(p for p in folder.rglob("*")
                   if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
    if not files:
        raise ValueError(f"--images {folder} holds no pictures: name a folder that does")
    if out and Path(out, "pictures.csv").exists():
        raise ValueError(f"{out} already holds what was seen on pictures: choose another --out")
    try:
        images = torch.stack([square(file, cfg.image_size) for file in files]).to(cfg.device)
    except OSError as error:
        raise ValueError(f"--images {folder}: {str(error).splitlines()[0]}") from error
    seen, names = look(model, images, cfg, data), class_names(cfg, data)
    confidence, best = seen.logits.float().softmax(dim=1).max(dim=1)
    rows = [(file.relative_to(folder).as_posix(), names[c], p)
            for file, c, p in zip(files, best.tolist(), confidence.tolist(), strict=True)]
    out = Path(out or checkpoint.free_folder(Path(path).parent / "pictures"))
    out.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("file", "class", "confidence"), *rows])
    checkpoint.write(out / "pictures.csv", table.getvalue())
    for i, (file, name, p) in enumerate(rows):
        print(f"{file}: {name} {p:.1%}")
        if seen.chosen is not None:
            picture = report.plot_patches(
                images[i:i + 1].cpu().numpy(), seen.chosen[:, i:i + 1].numpy(),
                seen.probs[:, i:i + 1].numpy(), model.moe_blocks)
            checkpoint.write(out / f"{i:04}-{files[i].stem[:50]}.png", report.png(picture))
    beside = "" if seen.chosen is None else " and who saw which patch beside it"
    print(f"{len(files)} pictures, as {out}/pictures.csv{beside}")


def export(given):
    """Write the model of a checkpoint for use without this code, or with safetensors alone."""
    path, file = given["eval"], Path(given["export"])
    given = {n: v for n, v in given.items() if n != "eval"}
    if file.suffix == ".safetensors":
        state = checkpoint.read(path, Config)
        refuse_other(given, state, f"{path} was trained")
        checkpoint.to_safetensors(state, file)
    elif file.suffix == ".pt2":
        if given.get("backend", "auto") != "auto":
            raise ValueError(f"--export {file} is for any machine: leave --backend out")
        model, cfg, data = load_model(path, **given)
        example = torch.zeros(2, 3, cfg.image_size, cfg.image_size, device=cfg.device)
        program = torch.export.export(
            Standalone(model, data), (example,),
            dynamic_shapes={"images": {0: torch.export.Dim("B", min=1, max=65_536)}})
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        checkpoint.write(file, buffer.getvalue())
    else:
        raise ValueError(f"--export {file} must end in .safetensors or .pt2")
    print(f"written: {file}")


class Standalone(torch.nn.Module):
    """Images in [0, 1], (B, 3, S, S) -> the model's logits: the standardisation is inside."""

    def __init__(self, model, data):
        super().__init__()
        self.model, self.data = model, data

    def forward(self, images):
        return self.model(self.data.normalise(images)).logits


# --- several processes, as torchrun starts them ---
#
# Each has a copy of the model and a share of every batch. Their gradients are averaged, so a step
# is that of one process with the whole batch; load_loss sees all tokens (router.over_all_tokens).
# Per process are the capacity of an expert, router noise and stochastic depth. Files are read and
# written by process 0 alone.

def rank():
    return dist.get_rank() if processes() > 1 else 0


@contextlib.contextmanager
def joined(given):
    """Be one of torchrun's processes, if it has started several; only process 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if "eval" in given:
        raise ValueError("--eval needs one process: start it without torchrun")
    cards = torch.cuda.is_available() and given.get("device", "auto") != "cpu"
    # so long may one run wait for another that trains the teacher
    dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", timeout=timedelta(hours=12))
    with contextlib.redirect_stdout(None if rank() else sys.stdout):
        yield
    dist.destroy_process_group()


def device_of_this_process(name):
    """The GPU of this process's number on its machine; ValueError where there are too few."""
    if name == "cpu":
        return name
    if name != "cuda":
        raise ValueError(f"--device {name} is one device, and torchrun started {processes()} "
                         f"processes: leave the flag out, or give --device cpu")
    here, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if here >= cards:
        raise ValueError(f"torchrun started more processes on this machine than it has GPUs: give "
                         f"it --nproc-per-node={cards}")
    torch.cuda.set_device(here)
    return f"cuda:{here}"


def first(do, *args, **named):
    """What process 0 gets when it does this, for all of them; its error is raised in all."""
    if processes() == 1:
        return do(*args, **named)
    said = [None, None]
    if rank() == 0:
        try:
            said[0] = do(*args, **named)
        except (ValueError, OSError, FloatingPointError) as error:
            said[1] = error
    dist.broadcast_object_list(said, device="cpu")
    if said[1]:
        said[1].elsewhere = rank() > 0
        raise said[1]
    return said[0]


def agreed(asked):
    """The number of the signal that asked any process to stop, the same in all, or 0."""
    number = torch.tensor(asked[0] if asked else 0)
    if processes() > 1:
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def own_share(*batch):
    """This process's part of a batch, which all processes have drawn alike."""
    return [x.chunk(processes())[rank()] for x in batch]


def same_everywhere(optimizer):
    """Give all processes the weights of process 0."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            dist.broadcast(p.data, 0)


def average_gradients(optimizer):
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]
             if p.grad is not None]
    mean = averaged(torch.nn.utils.parameters_to_vector(grads))
    torch.nn.utils.vector_to_parameters(mean, grads)


def typed(argv):
    """The command of this run, as a user types it."""
    starter = f"torchrun --nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE')}"
    return f"{starter if processes() > 1 else 'python'} {shlex.join(['train.py', *argv])}"


def lost(error):
    """Is this how the connection to another process ends?"""
    said = str(error)
    return processes() > 1 and (isinstance(error, dist.DistError) or "gloo" in said
                                or "NCCL" in said)


# --- the command ---

def main(argv=None):
    checkpoint.printable()
    argv = sys.argv[1:] if argv is None else argv
    given, job = parse(argv), None
    try:
        with joined(given), contextlib.ExitStack() as owned:
            for name in ("images", "export"):
                if name in given and "eval" not in given:
                    raise ValueError(f"--{name} needs --eval: name a checkpoint with it")
            if "images" in given and "export" in given:
                raise ValueError("--images and --export are two commands: give one at a time")
            if "images" in given:
                return classify(given)
            if "export" in given:
                return export(given)
            if "eval" in given:
                return evaluate(given)
            command = typed(argv)
            teacher, job = plan(given, lambda out: owned.enter_context(checkpoint.claim(out)))
            announce(teacher, job, try_fused(job))
            if rank() == 0 and (idle := idle_flags(argv, job.cfg.method)):
                print(f"not used by --method {job.cfg.method}: --{', --'.join(idle)}", flush=True)
            job, guide = begin(job, command), None
            if teacher:
                guide = guide_of(trained(teacher, job, command), job)
                print(f"student: {job.cfg.method}, {job.cfg.out}")
            print(report.closing_table(fit(job, guide, command)))
    except (ValueError, OSError, FloatingPointError) as error:
        if not getattr(error, "elsewhere", False):          # then process 0 says it
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except (checkpoint.Stopped, KeyboardInterrupt) as stop:
        if rank() == 0:
            print(f"stopped; to go on: {go_on(job, argv)}", file=sys.stderr)
        sys.exit(getattr(stop, "exit_code", 130))
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            print(f"train.py: out of memory; {less_memory(job)}", file=sys.stderr)
            sys.exit(1)
        if not lost(error):
            raise
        print(f"train.py: process {rank()} of {processes()} has lost another one, whose own "
              f"message says why; to go on: {go_on(job, argv)}", file=sys.stderr, flush=True)
        os._exit(1)                    # to leave the group as usual would be to wait for the others


def go_on(job, argv):
    begun = job and Path(job.cfg.out, checkpoint.NAME).exists()
    return typed(["--resume", "--out", job.cfg.out] if begun else argv)


if __name__ == "__main__":
    main()
