"""decided.py -- what was decided before any run?

The recipe, the arms and the grids, then what is measured and expected, and how it is judged. Arms
differ from each other only in what their line says. Arms of one seed share the first weights of
their trunk, the order of the images and the augmentation, so they are compared seed by seed.
study.py runs all this and reports it. What was thought of after the first rows is no arm: see
features_alone in measure.py. "ours" marks what no paper defines.
"""
import math
import statistics
from typing import NamedTuple

# --- the recipe ---

SCALES = {
    "cpu": "--preset tiny --data cifar100 --labels coarse --train_images 10000 --epochs 12 "
           "--device cpu",
    "gpu": "--preset small --data cifar100 --labels fine --train_images 0 --epochs 100 "
           "--device cuda",
}
WORKERS = {"cpu": 2, "gpu": 4}
# One dense teacher per scale serves every grid, arm and seed. No student has its seed: such a
# student would start from the teacher's own first weights. At scale cpu the teacher learns from all
# 50,000 images, because the paper's teacher too has seen more than its students. A teacher of the
# students' own 10,000 images knows no more than they do: see the dense row of results/cpu.jsonl.
# The arm moe-k1-logits measures what the teacher's knowledge is worth by itself.
TEACHER = {"cpu": "--method dense --seed 1000 --train_images 0",
           "gpu": "--method dense --seed 1000"}

# --- the arms, all with E=8 unless they say otherwise ---


class Arm(NamedTuple):
    flags: str                      # of train.py
    control: str | None = None      # a name in controls.py, for what no flag can say


# alpha: its arm at K=2, in order; 0 is the plain V-MoE, 0.01 what the other grids use
SWEEP = {"0": "moe-k2", "0.001": "mode-k2-alpha-0.001", "0.01": "mode-k2",
         "0.1": "mode-k2-alpha-0.1", "1": "mode-k2-alpha-1", "10": "mode-k2-alpha-10",
         "100": "mode-k2-alpha-100"}
# The alpha of mode-k8-best-alpha: the best one at K=2 on the tenth of the training images that
# --split val holds out, never on the test images. None: not chosen yet. At scale cpu no student
# trains on that tenth, so `python notebooks/measure.py sweep` asks the ended runs themselves.
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
    "mode-k8-best-alpha": Arm("--method mode --k 8 --alpha BEST"),      # see BEST_ALPHA
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

# --- the grids, arm: (seeds, the arm it is compared with) ---

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

# --- what is measured, and what is expected ---


def over_time(name):
    return lambda row: row["consistency"].get(name)


def probing(name):
    return lambda row: (row.get("probing") or {}).get(name)


# A metric takes a row and gives None where the run has no such number. The first two are percent,
# all others lie between -1 and 1.
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
    "own minus others": lambda row: None if probing("own")(row) is None else (
        probing("own")(row) - probing("others")(row)),
    "gate accuracy": probing("gate_accuracy"),
    "oracle cosine": lambda row: row.get("oracle_cosine"),
}

# what a grid's table shows beside the accuracy
COLUMNS = {
    "alpha": ("expert similarity", "own-domain accuracy", "other-domain accuracy", "gate accuracy"),
    "guidance": ("accuracy, dispatched as in training", "agreement adjacent, first quarter",
                 "load entropy"),
    "gates": ("oracle cosine", "agreement adjacent, first quarter", "load entropy")}
USUAL = ("agreement adjacent, first quarter", "agreement with the end at 1/2", "load entropy")


class Hypothesis(NamedTuple):
    """Seed by seed, sum(plus) - sum(minus) is at least `least` and its interval is above 0."""
    grid: str
    claim: str
    source: str                     # whose claim: T the TGR paper, M the MoDE paper, ours
    metric: str
    plus: tuple
    minus: tuple = ()
    least: float = 0.0
    scales: tuple = ("cpu", "gpu")  # some thresholds mean something at one scale only


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
    # after a review: it was called "guiding the router alone helps", but the arm differs in more
    Hypothesis("main", "a router guided alone, without its own losses, beats V-MoE with them",
               "ours", ACC, ("tgr-k1-router-alone",), ("moe-k1",)),
    # after a review: it was called "guidance is more than a teacher's information", which a
    # distillation of logits at one untuned weight cannot decide
    Hypothesis("main", "TGR beats logits distilled at weight 1", "ours", ACC, ("tgr-k1",),
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
    # after a review: the paper says that distillation keeps the experts' specialisation
    Hypothesis("alpha", "experts stay specialised: own minus others does not shrink at 0.1", "M",
               "own minus others", ("mode-k2-alpha-0.1",), ("moe-k2",), -0.005),
    Hypothesis("guidance", "guiding the first half is best", "T", ACC, ("tgr-k1-first-half",),
               ("tgr-k1",)),
    # after a review: the paper's finding is that it ends below V-MoE; the next one is ours
    Hypothesis("guidance", "guided by the last layer alone, TGR ends below V-MoE", "T", ACC,
               ("moe-k1",), ("tgr-k1-last-layer",)),
    Hypothesis("guidance", "aligned layers beat the last one", "ours", ACC, ("tgr-k1",),
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

# Router and features, each guided or free: what does guidance guide? The third cell was thought of
# after the first rows.
FACTORS = {("free", "free"): "moe-k1", ("guided", "free"): "tgr-k1-router-alone",
           ("free", "guided"): "moe-k1-features-alone", ("guided", "guided"): "tgr-k1"}
MARGIN = 0.5        # points of accuracy within which two models count as equal

# --- the analysis ---

# t with 97.5 % below it, for 1 to 30 degrees of freedom. Typed from a table, because scipy is not
# among the packages; a test integrates the density.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
         2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
         2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


class Estimate(NamedTuple):
    mean: float | None
    low: float | None               # the 95 % t-interval; None with fewer than two seeds
    high: float | None
    n: int
    left_out: tuple = ()            # (arm, seed) of the runs without a partner

    def t(self, null=0.0):
        """How many standard errors the mean lies above `null`."""
        error = (self.high - self.mean) / T_975[min(self.n - 1, len(T_975)) - 1]
        away = self.mean - null
        return away / error if error else math.copysign(math.inf, away) if away else 0.0

    def p(self, null=0.0):
        """Two-sided, of the hypothesis that the mean is `null`; None with fewer than two seeds."""
        return None if self.low is None else 1 - central(abs(self.t(null)), self.n - 1)


def central(t, df):
    """The probability of Student's t between -t and t (Abramowitz and Stegun, 26.7.3 and .4)."""
    angle, odd = math.atan(t / math.sqrt(df)), df % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(odd + 1, df, 2):                         # df // 2 terms
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def holm(ps):
    """p-values corrected for their number (Holm, 1979): the k-th smallest of m times m - k + 1."""
    adjusted, least = dict.fromkeys(ps), 0.0
    for k, name in enumerate(sorted(ps, key=ps.get)):
        least = adjusted[name] = max(least, min(1.0, (len(ps) - k) * ps[name]))
    return adjusted


def equivalence(estimate, margin):
    """p of the hypothesis that the mean is `margin` or more away from 0: two one-sided tests, as
    one asks where "as much as" is to be said; None with fewer than two seeds."""
    if estimate.low is None:
        return None
    def tail(t):
        inside = central(abs(t), estimate.n - 1)
        return (1 - inside) / 2 if t > 0 else (1 + inside) / 2
    return max(tail(estimate.t(-margin)), tail(-estimate.t(margin)))


def interval(values, left_out=()):
    """Mean and 95 % t-interval of independent values."""
    n = len(values)
    if n < 2:
        return Estimate(values[0] if values else None, None, None, n, left_out)
    half = T_975[min(n - 1, len(T_975)) - 1] * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.fmean(values)
    return Estimate(mean, mean - half, mean + half, n, left_out)


def contrast(rows, metric, plus, minus=()):
    """sum(plus) - sum(minus), seed by seed: the Estimate over the seeds that every arm has."""
    if metric not in METRICS or not (*plus, *minus):
        raise ValueError(f"a contrast is of arms, not {(*plus, *minus)}, and in one of "
                         f"{', '.join(METRICS)}, not {metric!r}")
    known = {arm: {r["seed"]: value for r in rows if r["arm"] == arm
                   if (value := METRICS[metric](r)) is not None} for arm in (*plus, *minus)}
    seeds = sorted(set.intersection(*map(set, known.values())))
    left_out = tuple((arm, s) for arm in known for s in sorted(known[arm]) if s not in seeds)
    return interval([sum(known[a][s] for a in plus) - sum(known[a][s] for a in minus)
                     for s in seeds], left_out)


def verdict(estimate, least, p=None):
    """met: mean at least `least`, interval above 0. not met: interval below `least` or below 0.

    `p`, corrected for the number of questions, must be below 0.05 too for "met".
    """
    if estimate.n == 0:
        return "not run"
    if estimate.n < 3:
        return "too few seeds"
    if estimate.mean >= least and estimate.low > 0:
        return "met" if p is None or p < 0.05 else "undecided"
    return "not met" if estimate.high < least or estimate.high <= 0 else "undecided"


def judge(grid, scale, rows):
    """{hypothesis: (its Estimate, p corrected by Holm or None, its verdict)} of a grid's rows.

    Those that compare nothing, and those below three seeds, are not counted by Holm.
    """
    found = {h: contrast(rows, h.metric, h.plus, h.minus) for h in HYPOTHESES
             if h.grid == grid and scale in h.scales}
    p = holm({h: e.p() for h, e in found.items() if h.minus and e.n >= 3})
    return {h: (e, p.get(h), verdict(e, h.least, p.get(h))) for h, e in found.items()}


def signed(estimate, digits=2):
    """`+0.81 [+0.20, +1.42]`; – stands for what has no number."""
    if estimate.mean is None:
        return "–"
    text = f"{estimate.mean:+.{digits}f}"
    return text if estimate.low is None else (
        text + f" [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]")


# --- what the arms are called where people read ---

# In the order of the figure of notebook 2. *: no arm, but two controls thought of after the first
# rows. "tgr" stands for the runs in results/cpu.jsonl, whose teacher saw 10,000 images.
NAMES = {
    "dense": "dense ViT", "dense-features-alone": "dense ViT, KL on its features*",
    "moe-k1": "V-MoE", "moe-k1-logits": "V-MoE, teacher's logits",
    "moe-k1-features-alone": "V-MoE, KL on features alone*",
    "tgr-k1-router-alone": "TGR, KL on routers alone", "tgr-k1": "TGR: KL on both",
    "tgr-k1-distil-only": "TGR, KL and no task on routers",
    "tgr-k1-first-half": "TGR, KL in the first half only",
    "tgr-k1-weight-0.5": "TGR, a tenth of the KL", "tgr-k1-weight-50": "TGR, ten times the KL",
    "tgr-k1-oracle": "TGR, the teacher dispatches",
    "tgr-k1-last-layer": "TGR, teacher's last layer",
    "tgr-k1-kmeans": "TGR, k-means teacher router",
    "tgr-k1-random-router": "TGR, random teacher router",
    "tgr": "TGR by the teacher of 10,000", "tgr-k1-random-teacher": "TGR, untrained teacher"}
