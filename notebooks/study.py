"""study.py -- do the papers' findings come back, from scratch on CIFAR-100, beyond chance?

    python notebooks/study.py list                                    what is done, what it takes
    python notebooks/study.py run main --scale cpu --workers 2        go on with a grid
    python notebooks/study.py run main --scale gpu --workers 4 --minutes 9
    python notebooks/study.py report main --readme README.md          tables, verdicts, figures
    python notebooks/study.py report --check README.md                is README what the rows say?

Everything that is decided before a run stands above the first function: the recipe, the arms, the
grids, the hypotheses and the analysis. A run becomes one row of notebooks/results/GRID.jsonl: the
result.json of train.py and what is measured here at the end. Arms differ from each other only in
what their line says; those of one seed share their trunk's first weights, the order of the images
and the augmentation, so they are compared seed by seed. "ours" marks what no paper defines.
"""
import argparse
import fcntl
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402
import report  # noqa: E402
import train  # noqa: E402
from data import normalise  # noqa: E402
from notebooks.controls import LOSSES, SETUPS, dispatch  # noqa: E402
from teacher import Guide  # noqa: E402

RESULTS, FIGURES = ROOT / "notebooks" / "results", ROOT / "notebooks" / "figures"

# --- decided in advance: the recipe ---

SCALES = {
    "cpu": "--preset tiny --data cifar100 --labels coarse --train_images 10000 --epochs 12 "
           "--device cpu",
    "gpu": "--preset small --data cifar100 --labels fine --train_images 0 --epochs 100 "
           "--device cuda",
}
WORKERS = {"cpu": 2, "gpu": 4}
# One dense teacher per scale, for every grid, arm and seed; no student has its seed, for a student
# of the teacher's seed would start from the teacher's own first weights. At scale cpu it learns
# from all 50,000 images, for the paper's teacher too has seen more than its students; one of
# their 10,000 images knew no more than they did (32.1 %: the dense row of results/cpu.jsonl). What
# its knowledge is worth by itself is what the arm moe-k1-logits measures.
TEACHER = {"cpu": "--method dense --seed 1000 --train_images 0",
           "gpu": "--method dense --seed 1000"}

# --- decided in advance: the arms, all with E=8 unless they say otherwise ---


class Arm(NamedTuple):
    flags: str                      # of train.py
    control: str | None = None      # a name in controls.py: what no flag can say


# alpha: its arm at K=2, in order; 0 is the plain V-MoE, 0.01 what the other grids use
SWEEP = {"0": "moe-k2", "0.001": "mode-k2-alpha-0.001", "0.01": "mode-k2",
         "0.1": "mode-k2-alpha-0.1", "1": "mode-k2-alpha-1", "10": "mode-k2-alpha-10",
         "100": "mode-k2-alpha-100"}
# What mode-k8-best-alpha takes: the best at K=2 on the tenth of the training images that --split
# val holds out, never on the test split. None: not chosen yet. At scale cpu no student trains on
# that tenth, so `python notebooks/measure.py sweep` asks the ended runs of the grid themselves.
BEST_ALPHA = {"cpu": "0.01", "gpu": None}
EXPERTS = (4, 8, 16, 32, 64)
ARMS = {
    "dense": Arm("--method dense"),                        # = active FLOPs of moe-k1
    "dense-total": Arm("--method dense --expert_ratio 16"),     # = total parameters of moe-k1
    "soft": Arm("--method soft"),
    "moe-k1": Arm("--method moe --k 1"),                   # V-MoE, alpha 0 of MoDE
    "moe-k2": Arm("--method moe --k 2"),
    "tgr-k1": Arm("--method tgr --k 1"),
    "tgr-k1-router-alone": Arm("--method tgr --k 1", "router alone"),
    "moe-k1-logits": Arm("--method moe --k 1", "logits"),
    "mode-k2": Arm("--method mode --k 2 --alpha 0.01"),
    "tgr+mode-k2": Arm("--method tgr+mode --k 2 --alpha 0.01"),
    # how strong may mutual distillation be, and does a gate of all experts need it?
    **{arm: Arm(f"--method mode --k 2 --alpha {alpha}") for alpha, arm in SWEEP.items()
       if "alpha" in arm},
    "moe-k8": Arm("--method moe --k 8"),
    "mode-k8-best-alpha": Arm("--method mode --k 8 --alpha BEST"),      # of BEST_ALPHA
    # when does guidance act, by whose knowledge, from which layer?
    "tgr-k1-first-half": Arm("--method tgr --k 1 --guide_until 0.5"),
    "tgr-k1-distil-only": Arm("--method tgr --k 1", "distil only"),
    "tgr-k1-random-router": Arm("--method tgr --k 1", "random router"),
    "tgr-k1-random-teacher": Arm("--method tgr --k 1", "random teacher"),
    "tgr-k1-kmeans": Arm("--method tgr --k 1", "k-means"),
    "tgr-k1-last-layer": Arm("--method tgr --k 1", "last layer"),
    "tgr-k1-oracle": Arm("--method tgr --k 1", "oracle"),
    "tgr-k1-weight-0.5": Arm("--method tgr --k 1 --guide_weight 0.5"),
    "tgr-k1-weight-50": Arm("--method tgr --k 1 --guide_weight 50"),
    # does the gain grow with the number of experts?
    **{f"{m}-k1-E{E}": Arm(f"--method {m} --k 1 --n_experts {E}") for E in EXPERTS if E != 8
       for m in ("moe", "tgr")},
    # which gates let the task teach the router?
    "moe-k2-topk-softmax": Arm("--method moe --k 2 --gate topk_softmax"),
    "moe-k2-sigmoid": Arm("--method moe --k 2 --gate sigmoid"),
    "moe-k1-topk-softmax": Arm("--method moe --k 1 --gate topk_softmax"),
}

# --- decided in advance: the grids, arm: (seeds, the arm it is compared with) ---

GRIDS = {
    "main": {
        "dense": (5, None), "dense-total": (5, "moe-k1"), "soft": (5, "moe-k1"),
        "moe-k1": (5, "dense"), "tgr-k1": (5, "moe-k1"), "tgr-k1-router-alone": (5, "tgr-k1"),
        "moe-k1-logits": (5, "moe-k1"), "moe-k2": (8, "moe-k1"), "mode-k2": (8, "moe-k2"),
        "tgr+mode-k2": (8, "moe-k2")},
    "alpha": {
        **{arm: (5, None if arm == "moe-k2" else "moe-k2") for arm in SWEEP.values()},
        "moe-k8": (5, "moe-k2"), "mode-k8-best-alpha": (5, "moe-k8")},
    "guidance": {
        "moe-k1": (5, None), "tgr-k1": (5, "moe-k1"),
        **{f"tgr-k1-{name}": (5, "tgr-k1") for name in (
            "first-half", "distil-only", "random-router", "random-teacher", "kmeans", "last-layer",
            "oracle", "weight-0.5", "weight-50")}},
    "experts": {f"{m}-k1" + (f"-E{E}" if E != 8 else ""): (
        5, ("moe-k1" + (f"-E{E}" if E != 8 else "")) if m == "tgr" else None)
        for E in EXPERTS for m in ("moe", "tgr")},
    "gates": {
        "moe-k2": (5, None), "moe-k2-topk-softmax": (5, "moe-k2"), "moe-k2-sigmoid": (5, "moe-k2"),
        "moe-k1": (5, None), "moe-k1-topk-softmax": (5, "moe-k1")},
}

# --- decided in advance: what is measured, and what is expected ---


def over_time(name):
    return lambda row: row["consistency"].get(name)


def probing(name):
    return lambda row: (row.get("probing") or {}).get(name)


# from a row; None where a run has no such number. Accuracies in points (percent).
METRICS = {
    "accuracy": lambda row: 100 * row["test_accuracy"],
    # an arm that trained on the teacher's dispatch is tested on it too
    "accuracy, dispatched as in training":
        lambda row: 100 * row.get("oracle_accuracy", row["test_accuracy"]),
    "agreement adjacent, first quarter": over_time("first_quarter_agreement_adjacent"),
    "kappa adjacent, first quarter": over_time("first_quarter_kappa_adjacent"),
    "agreement with the end at 1/6": over_time("sixth_agreement_final"),
    "agreement with the end at 1/2": over_time("half_agreement_final"),
    "load entropy": lambda row: row["load_entropy"],
    "expert similarity": lambda row: row.get("similarity"),
    "own-domain accuracy": probing("own"),
    "other-domain accuracy": probing("others"),
    "gate accuracy": probing("gate_accuracy"),
    "oracle cosine": lambda row: row.get("oracle_cosine"),
}


# beside the accuracy, what a grid's table shows
COLUMNS = {
    "alpha": ("expert similarity", "own-domain accuracy", "other-domain accuracy", "gate accuracy"),
    "guidance": ("accuracy, dispatched as in training", "agreement adjacent, first quarter",
                 "load entropy"),
    "gates": ("oracle cosine", "agreement adjacent, first quarter", "load entropy")}
USUAL = ("agreement adjacent, first quarter", "agreement with the end at 1/2", "load entropy")


class Hypothesis(NamedTuple):
    """sum of `plus` - sum of `minus`, seed by seed, is at least `least` and surely above 0."""
    grid: str
    claim: str
    source: str                     # whose claim: T the TGR paper, M the MoDE paper, ours
    metric: str
    plus: tuple
    minus: tuple = ()
    least: float = 0.0
    scales: tuple = ("cpu", "gpu")  # a threshold may mean something at one scale alone


ACC, TGR_MOE = "accuracy", (("tgr-k1",), ("moe-k1",))
HYPOTHESES = [
    Hypothesis("main", "the dense ViT is a fair baseline", "ours", ACC, ("dense",), (), 70,
               ("gpu",)),
    Hypothesis("main", "experts help", "T", ACC, ("moe-k1",), ("dense",), 0.8),
    Hypothesis("main", "guidance helps", "T", ACC, *TGR_MOE, 0.8),
    Hypothesis("main", "guidance steadies routing", "T", "agreement adjacent, first quarter",
               *TGR_MOE),
    Hypothesis("main", "... beyond chance", "ours", "kappa adjacent, first quarter", *TGR_MOE),
    Hypothesis("main", "guided tokens settle early", "T", "agreement with the end at 1/6",
               *TGR_MOE),
    Hypothesis("main", "... and at half-time", "ours", "agreement with the end at 1/2", *TGR_MOE),
    Hypothesis("main", "70 % have settled at 1/6", "T", "agreement with the end at 1/6",
               ("tgr-k1",), (), 0.7),
    Hypothesis("main", "guidance works through the backbone too", "ours", ACC, ("tgr-k1",),
               ("tgr-k1-router-alone",)),
    Hypothesis("main", "guiding the router alone helps", "ours", ACC, ("tgr-k1-router-alone",),
               ("moe-k1",)),
    Hypothesis("main", "guidance is more than a teacher's information", "ours", ACC, ("tgr-k1",),
               ("moe-k1-logits",)),
    Hypothesis("main", "mutual distillation helps", "M", ACC, ("mode-k2",), ("moe-k2",), 0.5),
    Hypothesis("main", "both together help more than mutual distillation", "ours", ACC,
               ("tgr+mode-k2",), ("mode-k2",)),
    Hypothesis("alpha", "too large an alpha hurts", "M", ACC, ("mode-k2",),
               ("mode-k2-alpha-100",)),
    Hypothesis("alpha", "a moderate alpha helps", "M", ACC, ("mode-k2",), ("moe-k2",)),
    Hypothesis("alpha", "a large alpha makes experts alike", "M", "expert similarity",
               ("mode-k2-alpha-100",), ("moe-k2",), 0.1),
    Hypothesis("alpha", "the gate chooses better", "M", "gate accuracy", ("mode-k2",),
               ("moe-k2",)),
    Hypothesis("alpha", "experts do better on their own domain", "M", "own-domain accuracy",
               ("mode-k2",), ("moe-k2",)),
    Hypothesis("guidance", "guiding the first half is best", "T", ACC, ("tgr-k1-first-half",),
               ("tgr-k1",)),
    Hypothesis("guidance", "the last layer is the wrong one", "T", ACC, ("tgr-k1",),
               ("tgr-k1-last-layer",)),
    Hypothesis("guidance", "the teacher's own dispatch is far above", "T",
               "accuracy, dispatched as in training", ("tgr-k1-oracle",), ("tgr-k1",), 1.0),
    Hypothesis("guidance", "a student trained on it cannot route by itself", "T", ACC,
               ("moe-k1",), ("tgr-k1-oracle",)),
    *(Hypothesis("guidance", f"a trained teacher router beats {what}", "ours", ACC, ("tgr-k1",),
                 (f"tgr-k1-{arm}",)) for what, arm in (
        ("a frozen random one", "random-router"), ("one on an untrained teacher", "random-teacher"),
        ("frozen k-means", "kmeans"))),
    *(Hypothesis("guidance", f"the KL's weight of 5 beats {w}", "ours", ACC, ("tgr-k1",),
                 (f"tgr-k1-weight-{w}",)) for w in ("0.5", "50")),
    Hypothesis("experts", "the gain grows from E=4 to E=64", "T", ACC,
               ("tgr-k1-E64", "moe-k1-E4"), ("moe-k1-E64", "tgr-k1-E4")),
    Hypothesis("experts", "guidance helps with 64 experts", "T", ACC, ("tgr-k1-E64",),
               ("moe-k1-E64",), 0.8),
    Hypothesis("gates", "a router that cannot learn costs accuracy", "ours", ACC, ("moe-k1",),
               ("moe-k1-topk-softmax",)),
]

# --- decided in advance: the analysis ---

# t with 97.5 % below it, for 1 to 30 degrees of freedom (any t table; tests integrate the density)
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
         2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
         2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


class Estimate(NamedTuple):
    mean: float | None
    low: float | None               # the 95 % t-interval; None with fewer than two seeds
    high: float | None
    n: int
    left_out: tuple = ()            # (arm, seed) of the runs that have no partner


def interval(values, left_out=()):
    """Mean and 95 % t-interval of independent values."""
    n = len(values)
    if n < 2:
        return Estimate(values[0] if values else None, None, None, n, left_out)
    half = T_975[min(n - 1, len(T_975)) - 1] * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.fmean(values)
    return Estimate(mean, mean - half, mean + half, n, left_out)


def contrast(rows, metric, plus, minus=()):
    """sum(plus) - sum(minus) over the seeds that every arm has; the others are left out by name."""
    known = {arm: {r["seed"]: value for r in rows if r["arm"] == arm
                   if (value := METRICS[metric](r)) is not None} for arm in (*plus, *minus)}
    seeds = sorted(set.intersection(*map(set, known.values())))
    left_out = tuple((arm, s) for arm in known for s in sorted(known[arm]) if s not in seeds)
    return interval([sum(known[a][s] for a in plus) - sum(known[a][s] for a in minus)
                     for s in seeds], left_out)


def verdict(estimate, least):
    """met: at least `least`, and surely above 0. not met: surely below `least`. Else undecided."""
    if estimate.n == 0:
        return "not run"
    if estimate.low is None:
        return "undecided"
    if estimate.mean >= least and estimate.low > 0:
        return "met"
    return "not met" if estimate.high < least or estimate.high <= 0 else "undecided"


# --- what is measured at the end of a run ---

PROBED = 2_000       # test images whose experts are forced one by one


@torch.no_grad()
def expert_similarity(moe, h):
    """Mean cosine of two experts' outputs for one token, over pairs and tokens h (T, D) (ours)."""
    E = len(moe.experts.w_in)
    f = F.normalize(moe.experts.batched(h.expand(E, *h.shape)), dim=-1)     # (E, T, D)
    pairs = f.sum(dim=0).square().sum(dim=-1) - E                       # (T,) both ways round
    return (pairs / (E * (E - 1))).mean().item()


def oracle_cosine(student, images, labels, block):
    """Cosine of the router's gradient with the one it would have if it saw every expert (ours).

    dL/dy of the sparse pass is kept, every expert is evaluated, and the same gate's formula is
    given all experts. None where the sparse gradient is 0.
    """
    moe, seen = student.blocks[block - 1].mlp, {}
    hook = moe.register_forward_hook(lambda m, x, out: seen.update(x=x[0], y=out[0]))
    loss = F.cross_entropy(student(images).logits, labels)
    hook.remove()
    sparse, dy = torch.autograd.grad(loss, [moe.router.weight, seen["y"]], allow_unused=True)
    if sparse is None or not sparse.any():
        return None
    h, dy = (v.detach().flatten(0, 1) for v in (seen["x"], dy))         # (T, D) both
    with torch.no_grad():
        f = moe.experts.batched(h.expand(len(moe.experts.w_in), *h.shape))   # (E, T, D)
        q = torch.einsum("td,etd->te", dy, f)                           # what each expert is worth
    logits = F.linear(h, moe.router.weight)                             # (T, E)
    gates = logits.sigmoid() if moe.router.gate == "sigmoid" else logits.softmax(dim=-1)
    dense, = torch.autograd.grad((gates * q).sum(), moe.router.weight)
    return F.cosine_similarity(sparse.flatten(), dense.flatten(), dim=0).item()


@torch.no_grad()
def probe_experts(student, images, labels, block):
    """Each expert by force, on the domains of the model's own gate: distill.py says what this is"""
    parts = list(zip(images.split(500), labels.split(500), strict=True))
    correct = torch.cat([distill.probe(student, *part, block) for part in parts], dim=1)   # (E, B)
    probs = torch.cat([student(x).layers[block].routing.probs for x, _ in parts])
    domain = distill.domains(probs, student.n_tokens)
    own, others = distill.own_and_others(distill.accuracy_matrix(correct, domain))
    found = {"own": own.nanmean().item(), "others": others.nanmean().item(),
             "gate_accuracy": distill.gate_accuracy(correct, domain)}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def closing_look(job, guide, control):
    """The fields that a row has beyond result.json: means over the MoE blocks, in float32."""
    cfg, data, sets, student, _ = job
    if cfg.method in ("dense", "soft"):
        return {}
    student.eval()
    images, labels = (part[:PROBED] for part in sets.test)
    images = normalise(images, data.mean, data.std)
    x, y = normalise(sets.probe[0], data.mean, data.std), sets.probe[1]
    blocks = student.moe_blocks
    with torch.no_grad():
        layers = student(x).layers
    found = {"similarity": report.mean(
                 expert_similarity(student.blocks[b - 1].mlp, layers[b].h) for b in blocks),
             "oracle_cosine": report.mean(oracle_cosine(student, x, y, b) for b in blocks)}
    if cfg.k > 1:
        probed = [probe_experts(student, images, labels, b) for b in blocks]
        found["probing"] = {name: report.mean(p[name] for p in probed) for name in probed[0]}
    if control == "oracle":
        hits = []
        with torch.no_grad():
            for x, y in zip(*(part.split(500) for part in sets.test), strict=True):
                x = normalise(x, data.mean, data.std)
                with train.autocast(cfg, x):
                    logits = student(x, dispatch(student, guide(x))).logits
                hits.append(logits.argmax(dim=1) == y)
        found["oracle_accuracy"] = torch.cat(hits).float().mean().item()
    return found


# --- one run ---


def read_rows():
    """Every row of the study, whichever grid ran it; a rerun replaces the first run."""
    found = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for row in report.read_lines(path):
            if "arm" in row:
                found[row["scale"], row["arm"], row["seed"]] = row
    return list(found.values())


def append(path, row):
    """One write in append mode: rows of processes side by side stay whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        if os.write(file, line) != len(line):
            raise OSError(f"{path}: the disk is full and the last line is torn: delete it")
    finally:
        os.close(file)


@contextmanager
def locked(folder):
    """Only one process at a time; the lock ends with the process that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unclean():
    """The files of code that differ from their commit; rows, figures and texts may differ."""
    if not (ROOT / ".git").exists():
        return "" if train.commit() else "everything (no git here, and no GUIDED_MOE_COMMIT)"
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".",
              ":!notebooks/results", ":!notebooks/figures", ":!*.md"]
    found = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return ", ".join(line[3:] for line in found.splitlines())


def best_alpha(scale):
    """The alpha that was chosen for the dense gate at this scale, on no test image."""
    if BEST_ALPHA[scale] is None:
        raise ValueError(f"scale {scale} has no BEST_ALPHA yet: train mode-k2 with each alpha and "
                         f"train.py's --split val, and write the one of the best val_accuracy "
                         f"into {Path(__file__).name}")
    return BEST_ALPHA[scale]


def prepare(flags, folder, data_dir, seed=None, teacher=None):
    """train.py's plan for these flags; a run that has a checkpoint goes on from it."""
    argv = [*shlex.split(flags), "--out", str(folder), "--data_dir", data_dir]
    argv += ["--seed", str(seed)] if seed is not None else []
    argv += ["--teacher", str(teacher)] if teacher else []
    if (folder / "checkpoint.pt").exists():
        argv.append("--resume")
    else:
        (folder / "metrics.jsonl").unlink(missing_ok=True)   # it stopped before its first one
    return train.plan(train.parse(argv))


def train_teacher(scale, out, data_dir):
    """The dense teacher's checkpoint; whoever comes first trains it, the others wait."""
    folder = Path(out, scale, "teacher")
    with locked(folder):
        _, job = prepare(f"{SCALES[scale]} {TEACHER[scale]}", folder, data_dir)
        train.fit(job, command=f"python notebooks/study.py run GRID --scale {scale}")
    return folder / "checkpoint.pt"


def load_teacher(job, path):
    state = train.read(path)
    vit = train.build(replace(train.Config(**state["config"]), device=job.cfg.device), job.data)
    train.restore(vit, state["student"], path)
    return vit


def train_one(grid, arm, seed, scale, out, data_dir, dirty=False):
    """Train one arm with one seed and append its row, unless it is there."""
    flags, control = ARMS[arm]
    folder = Path(out, scale, arm, f"seed{seed}")
    with locked(folder):
        if (scale, arm, seed) in {(r["scale"], r["arm"], r["seed"]) for r in read_rows()}:
            return
        taught = "tgr" in flags or control == "logits"
        teacher = train_teacher(scale, out, data_dir) if taught else None
        if "BEST" in flags:
            flags = flags.replace("BEST", best_alpha(scale))
        _, job = prepare(f"{SCALES[scale]} {flags}", folder, data_dir, seed, teacher)
        guide = None
        if taught:
            vit = load_teacher(job, teacher)               # first, for it draws from another seed
            torch.manual_seed(seed)                        # the teacher routers' own weights
            guide = Guide(vit, job.student, job.cfg.n_experts).to(job.cfg.device)
        if control in SETUPS:
            SETUPS[control](job, guide)
        if guide and job.state:                            # a run that has ended is only read
            guide.routers.load_state_dict(job.state["routers"])
        command = f"python notebooks/study.py run {grid} --only {arm} --seed {seed} --scale {scale}"
        result = train.fit(job, guide, command, LOSSES.get(control))
        row = {"grid": grid, "arm": arm, "scale": scale} | result
        began = time.monotonic()                           # an interrupted run's seconds add up
        row |= closing_look(job, guide, control)
        row["wall_seconds"] = result["seconds"] + time.monotonic() - began
        row["commit"] = commit_of_row(dirty)
        append(RESULTS / f"{grid}.jsonl", row)


def commit_of_row(dirty):
    """HEAD; "-dirty" only if code differs, for rows that were just added are no code."""
    commit = train.commit() or ""
    return commit.removesuffix("-dirty") + ("-dirty" if dirty and unclean() else "")


# --- many runs ---


def to_do(grid, scale, only=None, seed=None):
    """(arm, seed) without a row, all arms of one seed before the next: pairs are soon complete."""
    have = {(r["scale"], r["arm"], r["seed"]) for r in read_rows()}
    runs = [(s, arm) for arm, (seeds, _) in GRIDS[grid].items() for s in range(seeds)
            if (only is None or arm in only) and seed in (None, s)]
    # what waits for the others' result comes last
    runs.sort(key=lambda run: ("BEST" in ARMS[run[1]].flags, run[0]))
    return [(arm, s) for s, arm in runs if (scale, arm, s) not in have]


def schedule(runs, start, workers, minutes=None, took=(), now=time.monotonic, sleep=time.sleep):
    """Keep `workers` runs going; returns those that failed.

    start(run) gives a Popen. With `minutes`, no run starts that the median run says would end too
    late, and what still runs at the end is interrupted: its checkpoint is where it goes on. Where
    no run fits into the time at all, checkpoints carry them from call to call.
    """
    began, waiting, going, took, failed = now(), list(runs), {}, list(took), []
    limit = math.inf if minutes is None else 60 * minutes
    try:
        while waiting or going:
            for run, (process, since) in list(going.items()):
                if process.poll() is not None:
                    del going[run]
                    if process.returncode:
                        failed.append(run)
                    else:
                        took.append(now() - since)
            left = limit - (now() - began)
            median = statistics.median(took) if took else 0
            if left <= 0 or left < median <= limit:
                waiting = []
            if left <= 0:
                break
            while waiting and len(going) < workers:
                run = waiting.pop(0)
                going[run] = start(run), now()
            sleep(1)
    finally:
        for process, _ in going.values():
            process.send_signal(signal.SIGINT)
        for process, _ in going.values():
            process.wait()
    return failed


def run(args):
    if args.only and (unknown := set(args.only) - set(GRIDS[args.grid])):
        raise ValueError(f"{args.grid} has no arm {', '.join(sorted(unknown))}: "
                         f"choose from {', '.join(GRIDS[args.grid])}")
    if not args.dirty and (changed := unclean()):
        raise ValueError(f"a row must name its commit, and these are not committed: {changed}; "
                         f"commit them, or give --dirty for a trial")
    runs = to_do(args.grid, args.scale, args.only, args.seed)
    print(f"{args.grid}, scale {args.scale}: {len(runs)} runs to do")
    if args.here:
        for arm, seed in runs:
            train_one(args.grid, arm, seed, args.scale, args.out, args.data_dir, args.dirty)
        return 0

    def start(run):
        arm, seed = run
        log = Path(args.out, args.scale, arm, f"seed{seed}", "log.txt")
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{time.strftime('%H:%M:%S')} {arm}, seed {seed}: {log}", flush=True)
        words = ["run", args.grid, "--only", arm, "--seed", str(seed), "--scale", args.scale,
                 "--out", args.out, "--data_dir", args.data_dir, "--here"]
        with open(log, "a") as file:
            return subprocess.Popen(
                [sys.executable, __file__, *words, *(["--dirty"] if args.dirty else [])],
                stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})

    took = [r["wall_seconds"] for r in read_rows()
            if r["scale"] == args.scale and r["arm"] in GRIDS[args.grid]]
    failed = schedule(runs, start, args.workers or WORKERS[args.scale], args.minutes, took)
    for arm, seed in failed:
        log = Path(args.out, args.scale, arm, f"seed{seed}", "log.txt")
        print(f"{arm}, seed {seed}: {(log.read_text().splitlines() or ['?'])[-1]}", file=sys.stderr)
    print(f"{len(to_do(args.grid, args.scale, args.only, args.seed))} runs are left")
    return int(bool(failed))


def overview():
    """Grids, arms, runs done and to do, and the hours that a median run says the rest will take."""
    rows, lines = read_rows(), []
    for scale in SCALES:
        for grid, arms in GRIDS.items():
            todo = to_do(grid, scale)
            total = sum(seeds for seeds, _ in arms.values())
            took = [r["wall_seconds"] for r in rows if r["scale"] == scale]
            hours = "hours unknown: no run yet" if not took else (
                f"about {len(todo) * statistics.median(took) / 3600 / WORKERS[scale]:.1f} hours "
                f"with {WORKERS[scale]} workers")
            lines.append(f"{grid}, scale {scale}: {total - len(todo)} done, {len(todo)} to do"
                         + (f", {hours}" if todo else ""))
            for arm, (seeds, _) in arms.items():
                left = sum(a == arm for a, _ in todo)
                lines.append(f"    {arm:<24}{seeds - left} of {seeds} seeds")
    return "\n".join(lines)


# --- the report ---


def rows_of(grid, scale):
    """The grid's rows at one scale; all runs of an arm must differ in their seed alone."""
    arms = GRIDS[grid]
    rows = [row for row in read_rows() if row["scale"] == scale and row["arm"] in arms
            and row["seed"] < arms[row["arm"]][0]]
    settings = {}
    for row in rows:
        same = settings.setdefault(row["arm"], (report.experiment(row), row["data_md5"]))
        if same != (report.experiment(row), row["data_md5"]):
            raise ValueError(f"scale {scale}: {row['arm']}, seed {row['seed']} was run with other "
                             f"settings than seed 0: its config says which")
    return sorted(rows, key=lambda row: (list(arms).index(row["arm"]), row["seed"]))


def signed(estimate, digits=2):
    """`+0.81 [+0.20, +1.42]`; – is what there is no number for."""
    if estimate.mean is None:
        return "–"
    text = f"{estimate.mean:+.{digits}f}"
    return text if estimate.low is None else (
        text + f" [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]")


def arms_table(grid, rows):
    columns = COLUMNS.get(grid, USUAL)
    lines = ["| arm | n | params total / active | MFLOPs | accuracy, points | against | difference "
             f"[95 %] | {' | '.join(columns)} | images/s | seconds |",
             "|-|-|-|-|-|-|-" + len(columns) * "|-" + "|-|-|"]
    for arm, (_, other) in GRIDS[grid].items():
        some = [row for row in rows if row["arm"] == arm]
        if not some:
            continue
        pair = contrast(rows, ACC, (arm,), (other,)) if other else Estimate(None, None, None, 0)
        lines.append("| " + " | ".join([
            arm, str(len(some)),
            f"{some[0]['params_total'] / 1e6:.2f} / {some[0]['params_active'] / 1e6:.2f} M",
            f"{some[0]['flops_per_image'] / 1e6:.1f}",
            report.pooled([METRICS[ACC](row) for row in some]), other or "–", signed(pair),
            *(report.pooled([METRICS[name](row) for row in some]) for name in columns),
            f"{report.mean(row['images_per_second'] for row in some):,.0f}",
            f"{report.mean(row['seconds'] for row in some):.0f}"]) + " |")
    return "\n".join(lines)


def hypotheses_table(grid, scale, rows):
    lines = ["| expected | by | metric | contrast | at least | estimate [95 %] | n | verdict |",
             "|-|-|-|-|-|-|-|-|"]
    for h in HYPOTHESES:
        if h.grid == grid and scale in h.scales:
            found = contrast(rows, h.metric, h.plus, h.minus)
            digits = 2 if h.metric.startswith(ACC) else 3
            words = " + ".join(h.plus) + "".join(f" − {arm}" for arm in h.minus)
            lines.append(f"| {h.claim} | {h.source} | {h.metric} | {words} | {h.least:g} "
                         f"| {signed(found, digits)} | {found.n} | {verdict(found, h.least)} |")
    return "\n".join(lines)


def unpaired(grid, rows):
    """Which runs no difference uses, in a sentence; empty where all are used.

    Where an arm has not run at all, its difference is missing and no run is left out of it.
    """
    lost = {}
    for arm, (_, other) in GRIDS[grid].items():
        if other and (pair := contrast(rows, ACC, (arm,), (other,))).n:
            for name, seed in pair.left_out:
                lost.setdefault(f"from {arm} − {other}: {name}, seed ", []).append(str(seed))
    return "" if not lost else " Left out for want of a partner: " + "; ".join(
        where + ", ".join(seeds) for where, seeds in lost.items()) + "."


def section(grid, scale):
    """Everything that the rows of one grid at one scale say, as markdown; empty without rows."""
    rows = rows_of(grid, scale)
    if not any(row["grid"] == grid for row in rows):       # shared arms alone are no grid
        return ""

    def all_of(value):
        return ", ".join(sorted({str(value(row)) for row in rows}))

    first = rows[0]
    taught = [row["teacher_accuracy"] for row in rows if row["teacher_accuracy"] is not None
              and ARMS[row["arm"]].control != "random teacher"]
    teacher = f"dense teacher (`{TEACHER[scale]}`): {report.mean(taught):.1%}; " if taught else ""
    caption = (
        f"{first['data']} (md5 {first['data_md5']}), {first['labels']} labels, "
        f"{first['train_images']:,} training and {first['test_images']:,} test images, preset "
        f"{first['preset']}; epochs: {first['epochs']}; {teacher}device: "
        f"{all_of(lambda r: r['device'])}; torch {all_of(lambda r: r['versions']['torch'])}; "
        f"commit {all_of(lambda r: r['commit'] or 'unknown')}. Mean ± sample standard deviation "
        f"over n seeds; differences are paired by seed, with 95 % t-intervals. T: the TGR-MoE "
        f"paper, M: the MoDE paper, ours: a control. Met: the estimate is at least the threshold "
        f"and its interval above 0; not met: the interval is below the threshold.")
    pictures = "\n".join(f"![{grid}, {name}]({path.relative_to(ROOT).as_posix()})"
                         for name, path in picture_paths(grid, scale, rows).items())
    return "\n\n".join([
        f"**{grid}, scale {scale}** (`python notebooks/study.py run {grid} --scale {scale}`)",
        arms_table(grid, rows), caption + unpaired(grid, rows),
        hypotheses_table(grid, scale, rows), pictures])


def picture_paths(grid, scale, rows):
    routed = any(report.early_agreement(row) is not None for row in rows)
    names = ["differences", *["agreement"] * routed, *["alpha"] * (grid == "alpha")]
    return {name: FIGURES / f"study-{scale}-{grid}-{name}.png" for name in names}


def plot_differences(grid, rows):
    """A forest plot: every arm's accuracy minus that of the arm it is compared with."""
    found = {f"{arm} − {other}": contrast(rows, ACC, (arm,), (other,))
             for arm, (_, other) in GRIDS[grid].items() if other}
    found = {name: e for name, e in found.items() if e.mean is not None}
    sure = sum(e.low is not None and (e.low > 0 or e.high < 0) for e in found.values())
    fig, axes = report.sheet(f"{sure} of {len(found)} differences in accuracy have an interval "
                             f"without 0", 1, 1, 8, 1.4 + 0.35 * len(found))
    for y, e in enumerate(found.values()):
        if e.low is not None:
            axes[0, 0].plot([e.low, e.high], [y, y], color=report.COLOURS[0], lw=2)
        axes[0, 0].plot(e.mean, y, "o", color=report.COLOURS[0])
    axes[0, 0].axvline(0, color="black", lw=1)
    axes[0, 0].set_yticks(range(len(found)), [f"{name} (n={e.n})" for name, e in found.items()])
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_xlabel("points of test accuracy, paired by seed, 95 % interval")
    axes[0, 0].grid(axis="x", alpha=0.25)
    return fig


def plot_alpha(rows):
    """Accuracy and expert similarity over alpha at K=2; 0 stands at the left end."""
    arms = [row for row in rows if row["config"]["k"] == 2]
    panels = {ACC: "test accuracy, points", "expert similarity": "mean cosine of two experts"}
    points = {metric: {} for metric in panels}              # metric > alpha > values
    for metric, row in itertools.product(panels, arms):
        alpha = row["config"]["alpha"] if row["method"] == "mode" else 0.0
        points[metric].setdefault(alpha, []).append(METRICS[metric](row))
    best = max(points[ACC], key=lambda alpha: statistics.fmean(points[ACC][alpha]), default=None)
    fig, axes = report.sheet(f"Of {len(points[ACC])} alphas, {best:g} has the highest mean accuracy"
                             if points[ACC] else "No run at K=2 yet", 1, 2, 9, 3.8)
    for axis, (metric, label) in zip(axes[0], panels.items(), strict=True):
        for alpha, values in sorted(points[metric].items()):
            e = interval([v for v in values if v is not None])
            axis.plot([alpha] * len(values), values, ".", color="grey", ms=4)
            if e.low is not None:
                axis.plot([alpha, alpha], [e.low, e.high], color=report.COLOURS[0], lw=2)
            axis.plot(alpha, e.mean, "o", color=report.COLOURS[0])
        axis.set_xscale("symlog", linthresh=1e-3)
        axis.set(xlabel="alpha", ylabel=label)
        axis.grid(alpha=0.25)
    return fig


def draw(grid, scale):
    rows = rows_of(grid, scale)
    plots = {"differences": lambda: plot_differences(grid, rows),
             "agreement": lambda: report.plot_methods(rows, lambda row: row["arm"]),
             "alpha": lambda: plot_alpha(rows)}
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, path in picture_paths(grid, scale, rows).items():
        plots[name]().savefig(path)


BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"


def readme_block():
    """Every grid that has rows; all but the first, main, are folded."""
    sections = {(grid, scale): text for grid in GRIDS for scale in SCALES
                if (text := section(grid, scale))}
    return "\n\n".join(
        text if grid == "main" else f"<details><summary>{grid}, scale {scale}: arms, verdicts, "
        f"figures</summary>\n\n{text}\n\n</details>"
        for (grid, scale), text in sections.items()) or "The study has no rows yet."


def check_readme(readme=ROOT / "README.md"):
    """Why README and rows disagree, in a sentence; None where they agree."""
    _, between, _ = report.cut(readme, BEGIN, END)
    return None if between.strip() == readme_block() else (
        f"{readme} is not what the rows say: run python notebooks/study.py report --readme "
        f"{readme}")


def tell(args):
    if args.check:
        if wrong := check_readme(args.check):
            raise ValueError(wrong)
        return
    for grid in [args.grid] if args.grid else GRIDS:
        for scale in SCALES:
            if text := section(grid, scale):
                draw(grid, scale)
                print(text, end="\n\n")
            else:
                print(f"{grid}, scale {scale}: no rows yet")
    if args.readme:
        before, _, after = report.cut(args.readme, BEGIN, END)
        Path(args.readme).write_bytes(f"{before}{BEGIN}\n{readme_block()}\n{END}{after}".encode())


# --- the command ---


def main(argv=None):
    parser = argparse.ArgumentParser(description="Do the papers' findings come back?")
    command = parser.add_subparsers(dest="command", required=True)
    command.add_parser("list", help="grids, arms, what is done and to do")
    one = command.add_parser("run", help="go on with a grid")
    one.add_argument("grid", choices=GRIDS)
    one.add_argument("--scale", choices=SCALES, default="cpu")
    one.add_argument("--workers", type=int, help="runs side by side")
    one.add_argument("--minutes", type=float, help="how long this call may take")
    one.add_argument("--only", type=lambda text: text.split(","), help="these arms: ARM,ARM")
    one.add_argument("--seed", type=int, help="this seed alone")
    one.add_argument("--out", default="runs/study", help="where checkpoints and logs go")
    one.add_argument("--data_dir", default="data", help="where CIFAR-100 lies or is put")
    one.add_argument("--dirty", action="store_true", help="a trial: write rows without a commit")
    one.add_argument("--here", action="store_true", help="in this process, as a worker does")
    two = command.add_parser("report", help="tables, verdicts and figures from the rows")
    two.add_argument("grid", nargs="?", choices=GRIDS)
    two.add_argument("--readme", help="write all grids between its two study markers")
    two.add_argument("--check", help="only say whether this README is what the rows say")
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            print(overview())
        return {"list": lambda args: 0, "run": run, "report": tell}[args.command](args) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study.py: stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
