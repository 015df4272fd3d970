"""train.py -- how is a sparse ViT trained, by which loss, and what came of it?

    python train.py                                 the main job, TGR + MoDE; a demo on a CPU
    python train.py --method moe --k 1              V-MoE, the baseline of TGR-MoE
    python train.py --method tgr --k 1 --seed 3     teacher-guided routing as in its paper
    python train.py --resume --out runs/NAME        go on where an interrupted run stopped
    python train.py --eval runs/NAME/checkpoint.pt  test a checkpoint, class by class

dense   L_task
soft    L_task, with Soft MoE blocks
moe     L_task + load and entropy losses on its own routers (V-MoE as the TGR paper trains it)
tgr     L_task + KL to the teacher's routers, which have the load and entropy losses instead
mode    moe + alpha * mutual distillation among a token's K experts
tgr+mode  tgr + alpha * mutual distillation
"""
import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from tqdm.auto import tqdm

import report
from data import Data, augment, load, mix, normalise
from distill import mutual_distillation_loss
from moe import MLP, MoE, SoftMoE, ViT
from router import GATES, entropy_loss, load_loss
from teacher import Guide, guidance_loss, teacher_router_losses

METHODS = ("dense", "soft", "moe", "tgr", "mode", "tgr+mode")

# --- the configuration: every field is a flag, a help line and a part of every result ---


def flag(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Train a dense or sparse ViT. A preset fills only the fields that you do not give."""
    method: str = flag("tgr+mode", "what is trained", METHODS)
    preset: str = flag(None, "sizes and recipe; by default small on a GPU, tiny without",
                       ("tiny", "small"))
    seed: int = flag(0, "of the weights, the order of the images and their augmentation")
    # data
    data: str = flag("auto", "which images", ("auto", "cifar100", "synthetic"))
    data_dir: str = flag("data", "where CIFAR-100 lies or is put")
    labels: str = flag("fine", "100 fine or 20 coarse classes", ("fine", "coarse"))
    split: str = flag("full", "full: train on all, test once at the end; val: hold a tenth of the "
                      "training images out, look at them every epoch, never test", ("full", "val"))
    train_images: int = flag(None, "train on this many; 0 is all")
    augment: str = flag(None, "none, light: crop and flip, heavy: and affine, colour, erasing",
                        ("none", "light", "heavy"))
    mixup: float = flag(None, "alpha of mixup; 0 is off")
    cutmix: float = flag(None, "alpha of cutmix; 0 is off")
    # model
    dim: int = flag(None, "D, the width")
    depth: int = flag(None, "blocks")
    heads: int = flag(None, "attention heads")
    patch: int = flag(None, "pixels on a patch's side")
    mlp_ratio: float = flag(None, "H / D of a plain MLP")
    drop_path: float = flag(None, "stochastic depth of the last block")
    moe_blocks: str = flag(None, "blocks that are sparse, counted from 1: 5,7,9")
    expert_ratio: float = flag(None, "H / D of one expert, or of the MLPs in moe_blocks with "
                               "--method dense; by default mlp_ratio")
    n_experts: int = flag(8, "E")
    k: int = flag(2, "K, experts per token")
    gate: str = flag("softmax_topk", "how a chosen expert is weighted", GATES)
    noise: float = flag(0.0, "router noise in training, in units of V-MoE's 1/E")
    capacity_factor: float = flag(None, "room per expert over an even share; not given: dropless")
    # objective
    label_smoothing: float = flag(None, "of the task loss")
    load_weight: float = flag(0.005, "of L_load, on the routers or with tgr on the teacher's")
    entropy_weight: float = flag(0.005, "of L_ent, likewise")
    guide_weight: float = flag(5.0, "of the KL to the teacher's routers, over the MoE blocks' mean")
    guide_until: float = flag(1.0, "the share of training that is guided; 0.5 is the first half")
    guide_tokens: str = flag("all", "which tokens are guided", ("all", "class", "patches"))
    alpha: float = flag(0.01, "of the mutual distillation, over the MoE blocks' mean")
    # optimiser
    epochs: int = flag(None, "passes over the training images")
    batch_size: int = flag(None, "images per step")
    lr: float = flag(None, "AdamW's peak learning rate; warm-up, then cosine to 0")
    warmup_epochs: float = flag(None, "epochs of linear warm-up")
    weight_decay: float = flag(0.05, "AdamW's, on matrices only")
    clip: float = flag(1.0, "largest norm of the gradient")
    # teacher
    teacher: str = flag(None, "checkpoint of a dense run; without one a teacher is trained first")
    teacher_epochs: int = flag(None, "by default as --epochs")
    # machine and files
    device: str = flag("auto", "cuda, cpu, ...; auto: cuda where there is one")
    precision: str = flag("auto", "auto: bf16 on a GPU that has it, else fp16 there; fp32 on a CPU",
                          ("auto", "fp32", "bf16", "fp16"))
    compile: bool = flag(None, "torch.compile; by default on a GPU with Triton")
    out: str = flag(None, "folder of the run; by default a new one under runs/")
    save_every: int = flag(None, "epochs between checkpoints")
    probe_images: int = flag(256, "fixed training images whose routing is recorded every epoch")
    resume: bool = flag(False, "continue the run in --out")
    eval: str = flag(None, "only test this checkpoint")


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
# flags that say where and how to run, not what: a resumed run may change them
ELSEWHERE = ("device", "data_dir", "compile", "out", "resume", "eval", "save_every")
# what a student's own dense teacher has in common with it
SHARED_WITH_TEACHER = (
    "preset", "data", "data_dir", "labels", "split", "train_images", "augment", "mixup", "cutmix",
    "dim", "depth", "heads", "patch", "mlp_ratio", "drop_path", "label_smoothing", "batch_size",
    "lr", "warmup_epochs", "weight_decay", "clip", "device", "precision", "compile", "save_every",
    "probe_images")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse(argv):
    """The flags that were given, as a dict; an unknown flag ends with one sentence and code 2."""
    parser = argparse.ArgumentParser(
        description=Config.__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False,
        usage="python train.py [--FLAG VALUE ...]; --help explains every flag")
    for f in fields(Config):
        how = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        shown = "from the preset" if f.name in PRESETS["tiny"] else f.default
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} [{shown}]", **how)
    return vars(parser.parse_args(argv))


def resolve(given):
    """A Config with nothing left open: the flags, then the preset, then what follows."""
    cfg = Config(**given)
    cuda = torch.cuda.is_available()
    if cfg.device == "auto":
        cfg.device = "cuda" if cuda else "cpu"
    if cfg.device.startswith("cuda") and not cuda:
        raise ValueError("there is no CUDA device here: leave --device out or give --device cpu")
    on_gpu = cfg.device.startswith("cuda")
    cfg.preset = cfg.preset or ("small" if on_gpu else "tiny")
    for name, value in PRESETS[cfg.preset].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    cfg.expert_ratio = cfg.expert_ratio or cfg.mlp_ratio
    cfg.teacher_epochs = cfg.teacher_epochs or cfg.epochs
    if cfg.precision == "auto":
        native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.precision = ("bf16" if native else "fp16") if on_gpu else "fp32"
    for name in ("epochs", "batch_size", "teacher_epochs", "probe_images", "save_every", "depth",
                 "dim", "heads", "patch"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name} {getattr(cfg, name)} is too small: choose 1 or more")
    return cfg


# --- from the configuration to images and models ---

class Sets(NamedTuple):
    """(images uint8, labels) for each use; `val` is None where all is trained on."""
    train: tuple[Tensor, Tensor]
    probe: tuple[Tensor, Tensor]      # fixed, never augmented; the held-out ones with --split val
    val: tuple[Tensor, Tensor] | None
    test: tuple[Tensor, Tensor]


def split(cfg, data):
    """Share the images out; the order in which a subset or a held-out tenth is taken is fixed."""
    labels = getattr(data.train, cfg.labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order.to(labels.device)
    held_out = len(labels) // 10 if cfg.split == "val" else 0
    kept = order[:len(labels) - held_out]
    if cfg.train_images > len(kept):
        raise ValueError(f"--train_images {cfg.train_images}: {data.name} has {len(kept)} to train "
                         f"on; 0 takes them all")
    kept = kept[:cfg.train_images or len(kept)]
    if cfg.batch_size > len(kept):
        raise ValueError(f"--batch_size {cfg.batch_size} is more than the {len(kept)} training "
                         f"images: choose a smaller one")
    val = order[len(labels) - held_out:]
    probe = (val if held_out else kept)[:cfg.probe_images]

    def pick(rows):
        return data.train.images[rows], labels[rows]

    return Sets(pick(kept), pick(probe), pick(val) if held_out else None,
                (data.test.images, getattr(data.test, cfg.labels)))


def build(cfg, data):
    """The ViT that cfg describes, on its device, drawn from cfg.seed."""
    hidden, expert_hidden = int(cfg.dim * cfg.mlp_ratio), int(cfg.dim * cfg.expert_ratio)
    n_tokens = (32 // cfg.patch) ** 2 + 1
    try:
        blocks = tuple(int(b) for b in cfg.moe_blocks.split(",") if b)
    except ValueError:
        raise ValueError(f"--moe_blocks {cfg.moe_blocks} are no block numbers: "
                         f"write them as 5,7,9") from None

    if not blocks and cfg.method != "dense":
        raise ValueError(f"--method {cfg.method} needs at least one block in --moe_blocks")

    def make_sparse():
        if cfg.method == "dense":
            return MLP(cfg.dim, expert_hidden)
        if cfg.method == "soft":
            return SoftMoE(cfg.dim, expert_hidden, cfg.n_experts, n_tokens)
        return MoE(cfg.dim, expert_hidden, cfg.n_experts, cfg.k, keep_raw="mode" in cfg.method,
                   gate=cfg.gate, noise=cfg.noise, capacity_factor=cfg.capacity_factor)

    torch.manual_seed(cfg.seed)
    vit = ViT(cfg.dim, cfg.depth, cfg.heads, hidden, cfg.patch, n_classes(cfg, data), blocks,
              make_sparse, cfg.drop_path)
    return vit.to(cfg.device)


def n_classes(cfg, data):
    return len(data.fine_names if cfg.labels == "fine" else data.coarse_names)


def teacher_config(cfg, data):
    """The dense run that teaches cfg's student: its data, trunk and recipe, always seed 0.

    One teacher for all seeds and methods, so that they differ in nothing else.
    """
    teacher = replace(
        Config(**{name: getattr(cfg, name) for name in SHARED_WITH_TEACHER}),
        method="dense", seed=0, epochs=cfg.teacher_epochs, teacher_epochs=cfg.teacher_epochs,
        moe_blocks="", expert_ratio=cfg.mlp_ratio)
    recipe = {k: v for k, v in asdict(teacher).items() if k not in ELSEWHERE}
    key = hashlib.md5(json.dumps([recipe, data.md5]).encode()).hexdigest()[:8]
    teacher.out = str(Path("runs", "teachers", f"{cfg.preset}-{data.name}-{key}"))
    return teacher


# --- the objective ---

def objective(cfg, output, targets, teacher_logits=None):
    """Every term of the loss, already weighted; their sum is what training minimises.

    output of the student, targets (B, n_classes), teacher_logits {block: (T, E)} from a `Guide`,
    or None where nothing is guided: in the other methods, and after --guide_until.
    """
    terms = {"task": F.cross_entropy(output.logits.float(), targets,
                                     label_smoothing=cfg.label_smoothing)}
    routed = {b: layer for b, layer in output.layers.items() if layer.routing is not None}
    if cfg.method in ("moe", "mode"):
        terms["load"] = cfg.load_weight * sum(load_loss(r.routing.probs) for r in routed.values())
        terms["entropy"] = cfg.entropy_weight * sum(
            entropy_loss(r.routing.logits) for r in routed.values())
    if teacher_logits is not None:
        load, entropy = teacher_router_losses(teacher_logits)
        terms["teacher_load"] = cfg.load_weight * load
        terms["teacher_entropy"] = cfg.entropy_weight * entropy
        n_tokens = len(teacher_logits[min(routed)]) // len(targets)
        terms["guidance"] = cfg.guide_weight / len(routed) * sum(
            guidance_loss(teacher_logits[b], r.routing.logits, cfg.guide_tokens, n_tokens)
            for b, r in routed.items())
    if cfg.method in ("mode", "tgr+mode"):
        terms["mutual"] = cfg.alpha / len(routed) * sum(
            mutual_distillation_loss(r.raw) for r in routed.values())
    return terms


def autocast(cfg, images):
    return torch.autocast(images.device.type, AUTOCAST[cfg.precision], cfg.precision != "fp32")


# --- looking at a model ---

@torch.no_grad()
def outputs(model, images, cfg, data, batch=500):
    """The model's `Output` on each batch of clean images, in evaluation mode."""
    model.eval()
    for some in images.split(batch):
        with autocast(cfg, some):
            yield model(normalise(some, data.mean, data.std))


def accuracy(model, images, labels, cfg, data):
    logits = torch.cat([out.logits for out in outputs(model, images, cfg, data)])
    return (logits.argmax(dim=1) == labels).float().mean().item()


def look(student, sets, cfg, data):
    """Accuracy and routing on the probe images: (accuracy, experts, probs).

    experts uint8 (L, B, N, K) and probs float16 (L, B, N, E) over the L routed blocks; None, None
    where nothing is routed.
    """
    images, labels = sets.probe
    outs = list(outputs(student, images, cfg, data))
    logits = torch.cat([out.logits for out in outs])
    hit = (logits.argmax(dim=1) == labels).float().mean().item()
    blocks = [b for b, layer in outs[0].layers.items() if layer.routing is not None]
    if not blocks:
        return hit, None, None

    def gather(name, dtype):
        per_block = [torch.cat([getattr(out.layers[b].routing, name) for out in outs])
                     for b in blocks]                                   # L of (B*N, K or E)
        stacked = torch.stack(per_block).view(len(blocks), len(images), student.n_tokens, -1)
        return stacked.to("cpu", dtype).numpy()

    return hit, gather("chosen", torch.uint8), gather("probs", torch.float16)


# --- files ---

def save(path, content):
    """Write a checkpoint so that `path` always holds either the old one or the new one, whole."""
    path = Path(path)
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read(path):
    """A checkpoint that `save` wrote, on the CPU; a file that is none raises ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        Config(**state["config"])
        return state
    except Exception as error:
        raise ValueError(f"{path} is damaged or no checkpoint of train.py "
                         f"({type(error).__name__}): train it again or name another") from error


def restore(model, state, path):
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} holds a model of another shape ({first})") from None


def commit():
    """The commit this runs at: from git, else from GUIDED_MOE_COMMIT, else None."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        here = None
    return here.stdout.strip() if here and here.stdout else os.environ.get("GUIDED_MOE_COMMIT")


def describe(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads, {platform.machine()}"


# --- the loop ---

class Job(NamedTuple):
    """One model to train, dense teacher or student, and where it stands."""
    cfg: Config
    data: Data
    sets: Sets
    student: ViT
    state: dict | None       # the checkpoint it continues from


def batches(cfg, data, sets, epoch):
    """The epoch's augmented (images, targets), on the device; seed and epoch fix all of it.

    A last batch that is not full is left out; another order leaves other images out next time.
    """
    images, labels = sets.train
    generator = torch.Generator(images.device).manual_seed(cfg.seed * 100_003 + epoch)
    order = torch.randperm(len(images), generator=generator, device=images.device)
    for some in order.split(cfg.batch_size)[:steps_per_epoch(cfg, sets)]:
        x = augment(images[some], cfg.augment, generator)
        targets = F.one_hot(labels[some], n_classes(cfg, data)).float()
        x, targets = mix(x, targets, cfg.mixup, cfg.cutmix, generator)
        yield normalise(x, data.mean, data.std), targets


def steps_per_epoch(cfg, sets):
    return len(sets.train[0]) // cfg.batch_size


def losses(cfg, student, guide, images, targets):
    """One forward pass of student and, unless guide is None, teacher: the terms of `objective`."""
    with autocast(cfg, images):
        return objective(cfg, student(images), targets, guide(images) if guide else None)


def parameter_groups(student, guide, weight_decay):
    """Weight decay on matrices alone: not on biases (an expert's are stacked), norms, positions."""
    named = [*student.named_parameters(), *(guide.routers.named_parameters() if guide else ())]
    matrix = [name.endswith(("weight", "w_in", "w_out")) and p.ndim > 1 for name, p in named]
    return [
        {"params": [p for (_, p), m in zip(named, matrix, strict=True) if m],
         "weight_decay": weight_decay},
        {"params": [p for (_, p), m in zip(named, matrix, strict=True) if not m],
         "weight_decay": 0.0}]


def learning_rate(cfg, progress):
    """Linear warm-up, then cosine to 0; progress in epochs."""
    if progress < cfg.warmup_epochs:
        return cfg.lr * progress / cfg.warmup_epochs
    left = (cfg.epochs - progress) / max(cfg.epochs - cfg.warmup_epochs, 1e-9)
    return cfg.lr * 0.5 * (1 - math.cos(math.pi * left))


def fit(job, guide=None, command="", own_losses=None):
    """Train job.student, write its run folder and return the content of its result.json.

    `own_losses` has the signature of `losses` and replaces it: how a study adds a control. A run
    that has ended already is only read. Raises FloatingPointError when loss or gradient stop being
    finite, before a checkpoint is spoilt.
    """
    cfg, data, sets, student, state = job
    out, on_gpu = Path(cfg.out), cfg.device.startswith("cuda")
    if state and state["epoch"] == cfg.epochs and (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(parameter_groups(student, guide, cfg.weight_decay), fused=on_gpu)
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.precision == "fp16")
    compute = own_losses or losses
    compute = torch.compile(compute) if cfg.compile else compute

    done, seconds, history, metrics = 0, 0.0, [], out / "metrics.jsonl"
    if state:
        done, seconds = state["epoch"], state["seconds"]
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if guide:
            guide.routers.load_state_dict(state["routers"])
        if (out / "routing.npz").exists():
            history = list(np.load(out / "routing.npz")["experts"][:done])
    lines = metrics.read_text().splitlines()[:done] if done else []
    metrics.write_text("".join(line + "\n" for line in lines))

    steps = steps_per_epoch(cfg, sets)
    check_every = 50 if on_gpu else 1          # a check makes the host wait for the GPU
    for epoch in range(done + 1, cfg.epochs + 1):
        started, sums = time.perf_counter(), {}
        torch.manual_seed(cfg.seed * 100_003 + epoch)      # stochastic depth and router noise
        student.train()
        bar = tqdm(batches(cfg, data, sets, epoch), total=steps, leave=False, ascii=True,
                   desc=f"epoch {epoch}/{cfg.epochs}", disable=not sys.stderr.isatty())
        for step, (images, targets) in enumerate(bar):
            progress = epoch - 1 + step / steps
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(cfg, progress)

            # forward
            guided = guide if progress < cfg.guide_until * cfg.epochs else None
            terms = compute(cfg, student, guided, images, targets)
            loss = sum(terms.values())

            # backward
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            grads = [p.grad for p in student.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            if step % check_every == 0 or step == steps - 1:
                stop_unless_finite(loss, norm, scaler, student, f"epoch {epoch}, step {step + 1}")
            torch.nn.utils.clip_grads_with_norm_(student.parameters(), cfg.clip, norm)
            scaler.step(optimizer)
            scaler.update()

            # look
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach()

        line = {"epoch": epoch, **{name: (total / steps).item() for name, total in sums.items()},
                "lr": learning_rate(cfg, progress)}
        spent = time.perf_counter() - started              # .item() above has waited for the GPU
        seconds += spent
        line["probe_accuracy"], experts, probs = look(student, sets, cfg, data)
        if sets.val:
            line["val_accuracy"] = accuracy(student, *sets.val, cfg, data)
        line |= {"seconds": spent, "images_per_second": steps * len(images) / spent}
        if experts is not None:
            history.append(experts)
        with open(metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        say(cfg, line)
        if epoch % cfg.save_every == 0 or epoch == cfg.epochs:
            if history:
                np.savez_compressed(
                    out / "routing.npz", experts=np.stack(history), probs=probs,
                    images=sets.probe[0][:8].cpu().numpy(), n_experts=cfg.n_experts,
                    layers=np.array(student.moe_blocks))
            save(out / "checkpoint.pt", {
                "config": asdict(cfg), "data_md5": data.md5, "epoch": epoch, "seconds": seconds,
                "student": student.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "routers": guide.routers.state_dict() if guide else {}})
    return conclude(job, guide, command, history, seconds)


def stop_unless_finite(loss, norm, scaler, student, where):
    # under a loss scaler an infinite gradient is routine: that step is skipped and the scale halved
    if torch.isfinite(loss) and (scaler.is_enabled() or torch.isfinite(norm)):
        return
    bad = [name for name, p in student.named_parameters()
           if p.grad is not None and not torch.isfinite(p.grad).all()]
    raise FloatingPointError(
        f"{where}: the loss is {loss.item():.4g} and the gradient of {bad[0] if bad else 'nothing'}"
        f" is {'not ' if bad else ''}finite; the last checkpoint is kept. Try a lower --lr, or "
        f"--precision fp32")


def say(cfg, line):
    terms = "  ".join(f"{name} {line[name]:.4f}" for name in ("task", *report.TERMS)
                      if name in line)
    seen = f"probe {line['probe_accuracy']:.1%}"
    if "val_accuracy" in line:
        seen += f"  validation {line['val_accuracy']:.1%}"
    print(f"  epoch {line['epoch']:3d}/{cfg.epochs}  {terms}  {seen}  {line['seconds']:.1f} s",
          flush=True)


def conclude(job, guide, command, history, seconds):
    """The one look at the test set, result.json, the figures."""
    cfg, data, sets, student, _ = job
    out = Path(cfg.out)
    exam = sets.val or sets.test
    classes = student.head.out_features
    knows = guide is not None and guide.teacher.head.out_features == classes
    reached = accuracy(student, *exam, cfg, data)
    total, active = student.params()
    speeds = [json.loads(line)["images_per_second"]
              for line in (out / "metrics.jsonl").read_text().splitlines()]
    over_time = report.consistency(np.stack(history), cfg.n_experts) if history else {}
    result = {
        "method": cfg.method, "preset": cfg.preset, "data": data.name, "data_md5": data.md5,
        "labels": cfg.labels, "device": describe(cfg.device), "seed": cfg.seed,
        "commit": commit(), "command": command,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "numpy": np.__version__},
        "epochs": cfg.epochs, "train_images": len(sets.train[0]), "test_images": len(exam[0]),
        "test_accuracy": None if sets.val else reached,
        "val_accuracy": reached if sets.val else None,
        "teacher_accuracy": accuracy(guide.teacher, *exam, cfg, data) if knows else None,
        "agreement_adjacent": over_time.get("mean_agreement_adjacent"),
        "agreement_final": over_time.get("half_agreement_final"),
        "load_entropy": over_time.get("final_load_entropy"),
        "images_per_second": statistics.median(speeds), "seconds": seconds,
        "flops_per_image": student.flops(), "params_total": total, "params_active": active,
        "out": str(out), "config": asdict(cfg), "consistency": over_time}
    (out / "result.json").write_text(json.dumps(result) + "\n")    # one line: cat makes a jsonl
    report.figures(out)
    return result


# --- the command ---

def plan(given):
    """What the flags ask for, checked before anything long begins: (teacher, student) jobs.

    teacher is None, a ViT that was given, or the job that trains one. Raises ValueError or OSError
    with one sentence.
    """
    state = None
    if given.get("resume"):
        if "out" not in given:
            raise ValueError("--resume continues the run in --out: name its folder")
        state = read(Path(given["out"], "checkpoint.pt"))
        for name, value in given.items():
            if name not in ELSEWHERE and state["config"][name] != value:
                raise ValueError(f"the run in {given['out']} was started with --{name} "
                                 f"{state['config'][name]}, not {value}: leave the flag out, or "
                                 f"start another run with another --out")
        cfg = resolve(state["config"] | {"device": "auto", "compile": None} | given)
    else:
        cfg = resolve(given)
    if cfg.compile is None:
        cfg.compile = cfg.device.startswith("cuda") and find_spec("triton") is not None

    data = load(cfg.data, cfg.data_dir, cfg.device)
    cfg.data = data.name
    sets = split(cfg, data)
    if cfg.out is None:
        cfg.out = free_folder(f"runs/{cfg.method}-{cfg.preset}-{cfg.data}-seed{cfg.seed}")
    elif not state and Path(cfg.out, "metrics.jsonl").exists():
        raise ValueError(f"{cfg.out} already holds a run: add --resume to continue it, or choose "
                         f"another --out")
    student = build(cfg, data)
    if state:
        if state["data_md5"] != data.md5:
            raise ValueError(f"the run in {cfg.out} was started on other images: its data had the "
                             f"md5 {state['data_md5']}, {data.name} has {data.md5}")
        restore(student, state["student"], cfg.out)

    teacher = None
    if "tgr" in cfg.method and cfg.teacher:
        taught = read(cfg.teacher)
        if taught["config"]["method"] != "dense":
            raise ValueError(f"{cfg.teacher} is a {taught['config']['method']} run: a teacher is "
                             f"dense (python train.py --method dense)")
        shape = Config(**taught["config"])
        shape.device = cfg.device
        teacher = build(shape, data)
        restore(teacher, taught["student"], cfg.teacher)
        Guide(teacher, student, cfg.n_experts)             # speaks up if their tokens differ
    elif "tgr" in cfg.method:
        teacher_cfg = teacher_config(cfg, data)
        model, checkpoint = build(teacher_cfg, data), Path(teacher_cfg.out, "checkpoint.pt")
        taught = read(checkpoint) if checkpoint.exists() else None
        if taught:
            restore(model, taught["student"], checkpoint)
        teacher = Job(teacher_cfg, data, sets, model, taught)
    return teacher, Job(cfg, data, sets, student, state)


def free_folder(name):
    """`name`, or name-2, name-3 ...: the first that does not exist."""
    number, path = 1, Path(name)
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}")
    return str(path)


def seconds_left(job, teacher=None):
    """How long the rest of a job will take, from three steps that are timed now and not taken."""
    cfg, data, sets, student, state = job
    guide = Guide(teacher, student, cfg.n_experts).to(cfg.device) if teacher else None
    took = []
    for _ in range(4):
        started = time.perf_counter()
        images, targets = next(batches(cfg, data, sets, epoch=0))
        sum(losses(cfg, student.train(), guide, images, targets).values()).backward()
        if cfg.device.startswith("cuda"):
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    student.zero_grad(set_to_none=True)
    epochs = cfg.epochs - (state["epoch"] if state else 0)
    return statistics.median(took[1:]) * steps_per_epoch(cfg, sets) * epochs   # took[0] warmed up


def announce(teacher, job):
    """What will be done, on what, and how long it should take."""
    cfg = job.cfg
    demo = " (a demonstration: the full recipe is preset small, on a GPU)"
    print(f"{cfg.method}, preset {cfg.preset}{demo if cfg.preset == 'tiny' else ''} on "
          f"{describe(cfg.device)}, {cfg.precision}, "
          f"{'compiled' if cfg.compile else 'not compiled'}. Data: {job.data.note}")
    left, steps = 0.0, []
    if isinstance(teacher, Job):
        left += seconds_left(teacher)
        begun = teacher.state["epoch"] if teacher.state else 0
        steps.append(f"a dense teacher for {teacher.cfg.epochs} epochs on the same images, kept in "
                     f"{teacher.cfg.out}" + (f" ({begun} epochs are there)" if begun else ""))
        teacher = build(teacher.cfg, job.data)             # as good for a timing
    left += seconds_left(job, teacher)
    sparse = "" if cfg.method == "dense" else f", E={cfg.n_experts} in blocks {cfg.moe_blocks}"
    sparse += f", K={cfg.k}" if cfg.method not in ("dense", "soft") else ""
    steps.append(f"the {cfg.method} model for {cfg.epochs} epochs of {len(job.sets.train[0]):,} "
                 f"images{sparse}, in {cfg.out}")
    print("plan: " + "; then ".join(steps))
    print(f"estimate: {left / 60:.1f} minutes, from a few steps timed just now"
          + (" without compilation: expect less" if cfg.compile else ""), flush=True)


def evaluate(given):
    """Test one checkpoint: overall, best and worst classes, calibration, load of the experts."""
    state = read(given["eval"])
    cfg = resolve(state["config"] | {"device": "auto"} | given)
    data = load(cfg.data, cfg.data_dir, cfg.device)
    student = build(cfg, data)
    restore(student, state["student"], given["eval"])
    images, labels = split(cfg, data).test
    outs = list(outputs(student, images, cfg, data))
    probs = torch.cat([out.logits for out in outs]).float().softmax(dim=1)
    confidence, guess = probs.max(dim=1)
    hit = (guess == labels).float()
    names = getattr(data, f"{cfg.labels}_names")
    by_class = sorted(((hit[labels == c].mean().item(), name) for c, name in enumerate(names)
                       if (labels == c).any()), reverse=True)
    top5 = (probs.topk(5).indices == labels[:, None]).any(dim=1).float().mean()
    # expected calibration error over 15 equal bins of confidence (arXiv:1706.04599, eq. 3)
    bins = (confidence * 15).long().clamp(max=14)
    gap = sum(((confidence - hit)[bins == b].sum().abs() for b in range(15)), torch.zeros(()))
    print(f"{given['eval']}: {cfg.method}, epoch {state['epoch']}, on the {len(labels):,} test "
          f"images of {data.name} ({cfg.labels} classes), {describe(cfg.device)}")
    print(f"accuracy {hit.mean():.2%}   top-5 {top5:.2%}   "
          f"calibration error {gap / len(labels):.2%}")
    for word, some in (("best", by_class[:5]), ("worst", by_class[::-1][:5])):
        print(f"{word:6}" + ", ".join(f"{name} {share:.0%}" for share, name in some))
    for b, layer in outs[0].layers.items():
        if layer.routing is not None:
            chosen = torch.cat([out.layers[b].routing.chosen for out in outs]).flatten()
            shares = chosen.bincount(minlength=cfg.n_experts) / len(chosen)
            print(f"load of block {b}'s experts: " + " ".join(f"{share:.1%}" for share in shares))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command, given = " ".join(["python train.py", *argv]), parse(argv)
    try:
        if given.get("eval"):
            return evaluate(given)
        teacher, job = plan(given)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        announce(teacher, job)
        if isinstance(teacher, Job):
            print(f"teacher: dense, {teacher.cfg.out}")
            fit(teacher, command=command)
            teacher = teacher.student
            print(f"student: {job.cfg.method}, {job.cfg.out}")
        guide = None
        if teacher:
            torch.manual_seed(job.cfg.seed)                # the teacher routers' own weights
            guide = Guide(teacher, job.student, job.cfg.n_experts).to(job.cfg.device)
        result = fit(job, guide, command)
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        begun = Path(job.cfg.out, "checkpoint.pt").exists()
        again = f"python train.py --resume --out {job.cfg.out}" if begun else command
        print(f"\nstopped; to go on from the last checkpoint: {again}", file=sys.stderr)
        sys.exit(130)
    print(report.closing_table(result))


if __name__ == "__main__":
    main()
