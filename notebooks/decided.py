"""decided.py -- what was decided before any run?

The recipe, the arms and the grids, then what is measured and expected, and how it is judged. Arms
differ from each other only in what their line says. Arms of one seed share the first weights of
their trunk, the order of the images and the augmentation, so they are compared seed by seed.
study.py runs all this and reports it. "ours" marks what no paper defines.

This is the second edition. A review of the first (its grids are FIRST, its rows history) asked for
blocks, for factors crossed, and for claims no stronger than their intervals.
"""
import base64
import itertools
import math
import statistics
from functools import cache
from typing import NamedTuple

import numpy as np

import report

# --- the recipe ---

# What a scale's arms share. cpu is the first edition's. whole has all images and all 100 classes,
# and the setting of tiny in which experts came nearest to paying (regime.py): a narrow MLP in every
# block, 32 experts. V-MoE was 0.3 points above its dense twin there, which is not beyond chance.
SCALES = {
    "cpu": "--preset tiny --data cifar100 --labels coarse --train_images 10000 --epochs 12 "
           "--precision fp32 --device cpu",
    "whole": "--preset tiny --data cifar100 --labels fine --train_images 0 --epochs 12 "
             "--moe_blocks 1,2,3,4,5,6 --expert_ratio 0.0625 --n_experts 32 --precision fp32 "
             "--device cpu",
    "gpu": "--preset small --data cifar100 --labels fine --train_images 0 --epochs 100 "
           "--device cuda",
}
WORKERS = {"cpu": 2, "whole": 2, "gpu": 4}
# The dense teacher of a block, whose seed is this one and the block's. No student has such a seed:
# it would start from the teacher's own first weights. At scale cpu the teacher learns from all
# 50,000 images, because the paper's teacher too has seen more than its students. At the others it
# knows no image that they do not.
TEACHERS_SEED = 1000
TEACHER = {"cpu": "--method dense --train_images 0",
           "whole": "--method dense --moe_blocks= --expert_ratio 2",
           "gpu": "--method dense"}
# What the words in capitals of an arm's flags stand for at each scale. LATE are the paper's blocks
# (8, 10, 12 of 12), TWICE the epochs of teacher and student together, ALL the experts. BEST is the
# weight of the logits' KL that was best on the tenth of the training images that --split val holds
# out, never on the test images (measure.py logits). None: not chosen yet.
WORDS = {
    "cpu": {"LATE": "4,5,6", "TWICE": "24", "ALL": "8", "BEST": None},
    "whole": {"LATE": "4,5,6", "TWICE": "24", "ALL": "32", "BEST": "30"},
    "gpu": {"LATE": "8,10,12", "TWICE": "200", "ALL": "8", "BEST": None},
}

# --- the arms ---


class Arm(NamedTuple):
    flags: str                      # of train.py
    control: str | None = None      # a name in controls.py or remedies.py, for what no flag can say
    teacher: str = "dense"          # a name in controls.TEACHERS
    placed: tuple = ()              # words of remedies.Placed: what is as under a hash, which hash


TGR, MOE = "--method tgr --k 1", "--method moe --k 1"
NO_AUX = f"{MOE} --load_weight 0 --entropy_weight 0"
# alpha: its arm at K=2, in order; 0 is the plain V-MoE
SWEEP = {"0": "moe-k2", "0.001": "mode-k2-alpha-0.001", "0.01": "mode-k2",
         "0.1": "mode-k2-alpha-0.1", "1": "mode-k2-alpha-1", "10": "mode-k2-alpha-10",
         "100": "mode-k2-alpha-100"}
# router and features, each guided or free: what does guidance guide?
CELLS = {("free", "free"): "moe-k1", ("guided", "free"): "tgr-k1-router-alone",
         ("free", "guided"): "moe-k1-features-alone", ("guided", "guided"): "tgr-k1"}
CELL_ARMS = {"moe-k1": Arm(MOE), "tgr-k1-router-alone": Arm(TGR, "router alone"),
             "moe-k1-features-alone": Arm(MOE, "features alone"), "tgr-k1": Arm(TGR)}
# a name in remedies.py: does it keep V-MoE's own two losses? The others have their own balance, or
# a router that does not learn whom to choose
REMEDIES = {"loss-free bias": False, "expert choice": False, "default outputs": True,
            "sparse mixer": True, "dense mixer": True, "relu": False, "stable": True,
            "grouter": False, "coupled": True, "similar": False, "random fixed": False,
            "hash": False}
REMEDIED = {name: f"moe-k1-{name.replace(' ', '-')}" for name in REMEDIES}
# From V-MoE without its own losses to the floor 'hash', by what they differ in: eight models
WORDS_OF_HASH = "class token", "patches", "gate 1"
PLACED = {words: f"moe-k1-placed-{'-'.join(words).replace(' ', '-')}"
          for n in range(4) for words in itertools.combinations(WORDS_OF_HASH, n)}
PLACED |= {(): "moe-k1-no-aux", WORDS_OF_HASH: REMEDIED["hash"]}
# other maps of the patches' places to experts, and more or fewer of these
MAPS = {name: f"{REMEDIED['hash']}-{name.replace(' ', '-')}"
        for name in ("neighbours", "another in each block", "coin")}
MAPS_OF = {E: f"{REMEDIED['hash']}-E{E}" for E in (4, 16)}
# own ideas for guiding the routing alone, in ideas.py; the last one has no teacher
GUIDED = ("near the top", "while unsure", "evened", "by value")
VAL = "--split val"         # a tenth of the training images stands for the test images
IDEAS = {name: f"idea-{name.replace(' ', '-')}" for name in GUIDED}
GUIDED_BY = {name: TGR if name != "by value" else f"{MOE} --guide_weight 1" for name in GUIDED}
# the idea with the highest mean accuracy in the three blocks of `ideas`, and its arm in `routing`
BEST_IDEA = "evened"
BEST_ARM = f"tgr-k1-{BEST_IDEA.replace(' ', '-')}"
ARMS = {
    "dense": Arm("--method dense"),                        # = active FLOPs of moe-k1
    **CELL_ARMS,
    "moe-k1-no-aux": Arm(NO_AUX),                          # without V-MoE's own two losses
    "moe-k1-twice": Arm(f"{MOE} --epochs TWICE"),          # pays for teacher and student
    "dense-features-alone": Arm("--method dense", "features alone"),
    "moe-k1-logits": Arm(f"{MOE} --guide_weight BEST", "logits"),
    "tgr-k1-oracle-alone": Arm(TGR, "oracle alone"),
    # the same cells and controls by other teachers
    **{f"{arm}-lite0": CELL_ARMS[arm]._replace(teacher="lite0")
       for arm in CELLS.values() if arm != "moe-k1"},
    **{f"tgr-k1-router-alone-{teacher}": Arm(TGR, "router alone", teacher)
       for teacher in ("untrained", "random", "k-means")},
    # what others do about blocking and fluctuation, and the floor
    **{arm: Arm(MOE if REMEDIES[name] else NO_AUX, name) for name, arm in REMEDIED.items()},
    # what of the floor 'hash' is it? And the same for V-MoE and for a router guided by TGR
    **{arm: Arm(NO_AUX, placed=words) for words, arm in PLACED.items()
       if words not in ((), WORDS_OF_HASH)},
    **{arm: Arm(NO_AUX, placed=(*WORDS_OF_HASH, name)) for name, arm in MAPS.items()},
    **{arm: Arm(f"{NO_AUX} --n_experts {E}", "hash") for E, arm in MAPS_OF.items()},
    "dense-told-the-place": Arm("--method dense", "told the place"),
    "moe-k1-class-token": Arm(MOE, placed=("class token",)),
    "tgr-k1-router-alone-class-token": Arm(TGR, "router alone", placed=("class token",)),
    # ideas are looked at on validation images
    "moe-k1-val": Arm(f"{MOE} {VAL}"), "moe-k1-no-aux-val": Arm(f"{NO_AUX} {VAL}"),
    "tgr-k1-router-alone-val": Arm(f"{TGR} {VAL}", "router alone"),
    **{arm: Arm(f"{GUIDED_BY[name]} {VAL}", name) for name, arm in IDEAS.items()},
    BEST_ARM: Arm(GUIDED_BY[BEST_IDEA], BEST_IDEA),
    # the cells where the paper's experts are
    **{f"{arm}-late": a._replace(flags=f"{a.flags} --moe_blocks LATE")
       for arm, a in CELL_ARMS.items()},
    # when does guidance act, from which layer, how strongly, and who has trained its targets?
    "tgr-k1-first-half": Arm(f"{TGR} --guide_until 0.5"),
    "tgr-k1-last-layer": Arm(TGR, "last layer"),
    "tgr-k1-weight-0.5": Arm(f"{TGR} --guide_weight 0.5"),
    "tgr-k1-weight-50": Arm(f"{TGR} --guide_weight 50"),
    "tgr-k1-distil-only": Arm(TGR, "distil only"),
    "tgr-k1-settled": Arm(TGR, None, "settled"),
    # how strong may mutual distillation be, and does a gate of all experts need it?
    **{arm: Arm("--method moe --k 2" if arm == "moe-k2" else f"--method mode --k 2 --alpha {alpha}")
       for alpha, arm in SWEEP.items() if alpha in ("0", "0.01", "0.1", "1")},
    "moe-kE": Arm("--method moe --k ALL"),
    "mode-kE": Arm("--method mode --k ALL --alpha 0.01"),
    # does the gain grow with the number of experts?
    **{f"{arm}-E{E}": Arm(f"{flags} --n_experts {E}") for E in (8, 32)
       for arm, flags in (("moe-k1", MOE), ("moe-k1-no-aux", NO_AUX), ("tgr-k1", TGR))},
}

# --- the grids ---


class Grid(NamedTuple):
    """`blocks` seeds, each of which trains every arm at one commit on one machine."""
    scale: str                      # without a GPU
    blocks: int
    arms: dict                      # arm: the arm that it is compared with, or None
    first: int = 0                  # the first seed

    @property
    def seeds(self):
        return range(self.first, self.first + self.blocks)


GRIDS = {
    # what does guidance guide, by whose knowledge, and what would its cost buy otherwise?
    "factors": Grid("whole", 5, {
        "moe-k1-features-alone-lite0": "moe-k1", "tgr-k1-lite0": "moe-k1",
        "tgr-k1-router-alone-lite0": "moe-k1", "moe-k1-twice": "moe-k1",
        "tgr-k1": "moe-k1", "tgr-k1-router-alone": "moe-k1", "moe-k1-features-alone": "moe-k1",
        "tgr-k1-oracle-alone": "moe-k1", "moe-k1-logits": "moe-k1", "moe-k1": "dense",
        "moe-k1-no-aux": "moe-k1", "dense-features-alone": "dense", "dense": None}),
    # does it matter where the experts are?
    "placement": Grid("cpu", 5, {
        **{arm: "moe-k1" if arm != "moe-k1" else None for arm in CELL_ARMS},
        **{f"{arm}-late": "moe-k1-late" if arm != "moe-k1" else "moe-k1" for arm in CELL_ARMS}}),
    # does guided routing alone help, and do other remedies? Features are free in every arm
    "routing": Grid("cpu", 10, {
        "moe-k1": "dense", "moe-k1-no-aux": "moe-k1", "tgr-k1-router-alone": "moe-k1",
        **{f"tgr-k1-router-alone-{teacher}": "moe-k1"
           for teacher in ("lite0", "untrained", "random", "k-means")},
        "tgr-k1-oracle-alone": "moe-k1", **dict.fromkeys(REMEDIED.values(), "moe-k1"),
        BEST_ARM: "moe-k1", "dense": None}),
    # can the routing alone be guided better? Validation images, which no teacher has seen either.
    # The best became an arm of `routing`, whose seeds are fresh, before the first block of that
    "ideas": Grid("cpu", 3, {
        "moe-k1-val": None, "moe-k1-no-aux-val": "moe-k1-val",
        "tgr-k1-router-alone-val": "moe-k1-val", **dict.fromkeys(IDEAS.values(), "moe-k1-val")},
        first=100),
    # Why was a hash of the place ahead of V-MoE and of every remedy, in the first six blocks of
    # `routing`? A hash gives one expert to the class tokens of all images, and V-MoE need not: in
    # three of those blocks, looked at by hand, it did not. These seeds are fresh
    "place": Grid("cpu", 5, {
        "moe-k1": "dense", "moe-k1-class-token": "moe-k1", "tgr-k1-router-alone": "moe-k1",
        "tgr-k1-router-alone-class-token": "tgr-k1-router-alone",
        **{arm: "moe-k1-no-aux" if words else "moe-k1" for words, arm in PLACED.items()},
        "dense": None}, first=20),
    # It was the patches' place. So what of a place is it? Our hash gives an expert two patches,
    # one two rows below the other, in every image and block
    "maps": Grid("cpu", 5, {
        REMEDIED["hash"]: "dense",
        **dict.fromkeys((*MAPS.values(), *MAPS_OF.values()), REMEDIED["hash"]),
        "dense-told-the-place": "dense", "dense": None}, first=30),
    # Is it so at the larger scale too, where there are more experts than places?
    "places": Grid("whole", 3, {
        REMEDIED["hash"]: "moe-k1", "moe-k1": "dense", "dense-told-the-place": "dense",
        "dense": None}, first=30),
    "schedule": Grid("cpu", 5, {
        "moe-k1": None, "tgr-k1": "moe-k1",
        **{f"tgr-k1-{name}": "tgr-k1" for name in (
            "first-half", "last-layer", "weight-0.5", "weight-50", "distil-only", "settled")}}),
    "mutual": Grid("whole", 5, {
        "moe-k2": None, "mode-k2": "moe-k2", "mode-k2-alpha-0.1": "moe-k2",
        "mode-k2-alpha-1": "moe-k2", "moe-kE": "moe-k2", "mode-kE": "moe-kE"}),
    "experts": Grid("whole", 5, {
        f"{arm}-E{E}": None if arm == "moe-k1" else f"moe-k1-E{E}"
        for E in (8, 32) for arm in ("moe-k1", "moe-k1-no-aux", "tgr-k1")}),
}
# The first edition, at scale cpu, arm: (seeds announced, the arm it is compared with). An untrained
# teacher was called a random one. Its grids "experts" and "gates" never ran, nor did scale gpu.
FIRST = {
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
}
# the alpha of mode-k8-best-alpha, best at K=2 on images that no student trained on (measure sweep)
BEST_ALPHA = {"cpu": "0.01"}

# --- what is measured, and what is expected ---


# controls of which some metrics would say something else: in the first two a token has no one
# expert; the sparse mixer draws in training alone; no router of the others is to follow a teacher
SEVERAL = "expert choice", "relu"
DRAWN = "sparse mixer",
FREE = "features alone", "logits"


def unless(controls, metric):
    """The metric, and None for the arms with these controls."""
    arms = {arm for arm, a in ARMS.items() if a.control in controls}
    return lambda row: None if row["arm"] in arms else metric(row)


def over_time(name):
    return unless(SEVERAL, lambda row: row["consistency"].get(name))


def probing(name):
    return lambda row: (row.get("probing") or {}).get(name)


def difference(a, b):
    return lambda row: None if a(row) is None or b(row) is None else a(row) - b(row)


# A metric takes a row and gives None where the run has no such number. The first two are percent,
# experts are counted, and all others lie between -1 and 1.
METRICS = {
    "accuracy": lambda row: 100 * report.reached(row),
    # an arm that trained on the teacher's dispatch is tested on it too
    "accuracy, dispatched as in training":
        lambda row: 100 * row.get("oracle_accuracy", report.reached(row)),
    "agreement adjacent, first quarter": over_time("first_quarter_agreement_adjacent"),
    "kappa adjacent, first quarter": over_time("first_quarter_kappa_adjacent"),
    "agreement with the end at 1/6": over_time("sixth_agreement_final"),
    "agreement with the end at 1/2": over_time("half_agreement_final"),
    "load entropy": unless(SEVERAL, lambda row: row["load_entropy"]),
    # of the class tokens alone: 0 is one expert for those of all images
    "class token's load entropy": unless(SEVERAL, lambda row: row.get("class_load_entropy")),
    "expert similarity": lambda row: row.get("similarity"),
    "own-domain accuracy": probing("own"),
    "other-domain accuracy": probing("others"),
    "own minus others": difference(probing("own"), probing("others")),
    "own minus others, gates kept": difference(probing("own_kept"), probing("others_kept")),
    "gate accuracy": probing("gate_accuracy"),
    "gate's lead over blind ones": difference(probing("gate_accuracy"), probing("blind")),
    "oracle cosine": unless(DRAWN, lambda row: row.get("oracle_cosine")),
    "mean gate": unless(SEVERAL, lambda row: row.get("mean_gate")),
    "experts per token": lambda row: row.get("experts_per_token"),
    # what it takes off the loss, over what the best of all experts would
    "worth of the choice": lambda row: row.get("choice"),
    "follows the teacher": unless(FREE, lambda row: row.get("followed")),
    # what a patch's expert tells of them, as a share of the most that it could
    "experts tell of the place": lambda row: row.get("place_information"),
    "experts tell of the class": lambda row: row.get("class_information"),
}

# what a grid's table shows beside the accuracy
COLUMNS = {
    **dict.fromkeys(("factors", "placement", "schedule"), (
        "accuracy, dispatched as in training", "agreement with the end at 1/2", "load entropy",
        "mean gate", "follows the teacher")),
    **dict.fromkeys(("routing", "ideas"), (
        "accuracy, dispatched as in training", "agreement with the end at 1/2", "load entropy",
        "oracle cosine", "worth of the choice", "experts tell of the place",
        "experts tell of the class", "mean gate", "experts per token", "follows the teacher")),
    "place": ("agreement with the end at 1/2", "load entropy", "class token's load entropy",
              "mean gate", "follows the teacher"),
    **dict.fromkeys(("maps", "places"), ("load entropy", "expert similarity")),
    "mutual": ("expert similarity", "own-domain accuracy", "other-domain accuracy",
               "gate accuracy", "gate's lead over blind ones"),
    "alpha": ("expert similarity", "own-domain accuracy", "other-domain accuracy", "gate accuracy"),
    "guidance": ("accuracy, dispatched as in training", "agreement adjacent, first quarter",
                 "load entropy")}
USUAL = ("agreement adjacent, first quarter", "agreement with the end at 1/2", "load entropy")


class Hypothesis(NamedTuple):
    """Seed by seed, sum(plus) - sum(minus) is at least `least` and its interval is above 0; or,
    with `margin`, it is no further than that from 0."""
    grid: str
    claim: str
    source: str                     # whose claim: T the TGR paper, M the MoDE paper, R a remedy's
                                    # own, ours
    metric: str
    plus: tuple
    minus: tuple = ()
    least: float = 0.0
    margin: float | None = None


MARGIN = 0.5        # points of accuracy within which two models count as equal
ACC, TGR_MOE = "accuracy", (("tgr-k1",), ("moe-k1",))
DISPATCHED, HALF = "accuracy, dispatched as in training", "agreement with the end at 1/2"
STEADY = "agreement adjacent, first quarter"
NONE, ROUTER, FEATURES, BOTH = CELLS.values()
FLOOR = "random fixed", "hash"


def cells(grid, mark=""):
    """The four arms of CELLS in a grid, whose names end in `mark`; V-MoE may serve two teachers."""
    return [arm + mark if arm + mark in GRIDS[grid].arms else arm for arm in CELLS.values()]


def crossed(grid, mark=""):
    """What each factor of four cells does, and what they do together."""
    none, router, features, both = cells(grid, mark)
    said = mark.replace("-", ", ")
    return [
        Hypothesis(grid, f"guided features help, router free{said}", "ours", ACC, (features,),
                   (none,), 0.8),
        Hypothesis(grid, f"guided features help, router guided{said}", "ours", ACC, (both,),
                   (router,), 0.8),
        Hypothesis(grid, f"a guided router helps, features free{said}", "T", ACC, (router,),
                   (none,)),
        Hypothesis(grid, f"a guided router helps, features guided{said}", "T", ACC, (both,),
                   (features,)),
        Hypothesis(grid, f"one makes the other less useful{said}", "ours", ACC,
                   (router, features), (both, none)),
        Hypothesis(grid, f"TGR is as accurate as guided features alone{said}", "ours", ACC,
                   (both,), (features,), margin=MARGIN)]


def with_and_without(word):
    """The arms of PLACED that have a word, and those that have it not."""
    return (tuple(arm for words, arm in PLACED.items() if word in words),
            tuple(arm for words, arm in PLACED.items() if word not in words))


HYPOTHESES = [
    # --- the second edition ---
    *crossed("factors"), *crossed("factors", "-lite0"),
    Hypothesis("factors", "experts help", "T", ACC, (NONE,), ("dense",), 0.8),
    Hypothesis("factors", "guidance helps", "T", ACC, (BOTH,), (NONE,), 0.8),
    Hypothesis("factors", "guidance by a pretrained teacher helps", "T", ACC, (f"{BOTH}-lite0",),
               (NONE,), 0.8),
    Hypothesis("factors", "a teacher of the task beats a pretrained one", "ours", ACC, (BOTH,),
               (f"{BOTH}-lite0",)),
    Hypothesis("factors", "guidance beats the time that it costs", "ours", ACC, (BOTH,),
               ("moe-k1-twice",)),
    Hypothesis("factors", "guidance beats distilled logits at their best weight", "ours", ACC,
               (BOTH,), ("moe-k1-logits",)),
    Hypothesis("factors", "guided features help a dense model as much", "ours", ACC,
               ("dense-features-alone", NONE), ("dense", FEATURES), margin=MARGIN),
    Hypothesis("factors", "V-MoE needs its own losses", "ours", ACC, (NONE,), ("moe-k1-no-aux",)),
    Hypothesis("factors", "a router guided alone beats V-MoE without its own losses", "ours", ACC,
               (ROUTER,), ("moe-k1-no-aux",)),
    Hypothesis("factors", "the teacher's dispatch is worth something by itself", "T", DISPATCHED,
               ("tgr-k1-oracle-alone",), (NONE,)),
    Hypothesis("factors", "a router guided alone settles tokens", "T", HALF, (ROUTER,), (NONE,)),
    Hypothesis("factors", "guided features alone settle tokens", "ours", HALF, (FEATURES,),
               (NONE,)),
    *crossed("placement"), *crossed("placement", "-late"),
    Hypothesis("placement", "late experts are better", "T", ACC, (f"{NONE}-late",), (NONE,)),
    Hypothesis("placement", "TGR gains as much from late experts' teachers", "ours", ACC,
               (f"{BOTH}-late", NONE), (f"{NONE}-late", BOTH), margin=MARGIN),
    *(Hypothesis("routing", f"a router guided by {what} beats {whom}", "T" if not mark and
                 other == NONE else "ours", ACC, (ROUTER + mark,), (other,))
      for other, whom in ((NONE, "V-MoE"), ("moe-k1-no-aux", "V-MoE without its own losses"))
      for what, mark in (
        ("a dense teacher", ""), ("a pretrained one", "-lite0"), ("an untrained one", "-untrained"),
        ("a frozen random router on a dense teacher", "-random"),
        ("frozen k-means on a dense teacher", "-k-means"))),
    Hypothesis("routing", "V-MoE without its own losses collapses to few experts", "T",
               "load entropy", (NONE,), ("moe-k1-no-aux",), 0.2),
    Hypothesis("routing", "the teacher's dispatch is worth something by itself", "T", DISPATCHED,
               ("tgr-k1-oracle-alone",), (NONE,)),
    Hypothesis("routing", "a router guided alone settles tokens", "T", HALF, (ROUTER,), (NONE,)),
    *(Hypothesis("routing", f"the remedy {name!r} beats V-MoE", "R", ACC, (arm,), (NONE,))
      for name, arm in REMEDIED.items() if name not in FLOOR),
    *(Hypothesis("routing", f"the remedy {name!r} beats a V-MoE that lacks the same losses",
                 "ours", ACC, (REMEDIED[name],), ("moe-k1-no-aux",))
      for name, keeps in REMEDIES.items() if not keeps and name not in FLOOR),
    *(Hypothesis("routing", f"the floor {name!r} is no more than half a point below V-MoE", "ours",
                 ACC, (REMEDIED[name],), (NONE,), -MARGIN) for name in FLOOR),
    # the best of four ideas: is there anything in it?
    *(Hypothesis("routing", f"a router guided {BEST_IDEA!r} beats {whom}", "ours", ACC,
                 (BEST_ARM,), (other,))
      for whom, other in (("V-MoE", NONE), ("V-MoE without its own losses", "moe-k1-no-aux"),
                          ("one guided by TGR's KL", ROUTER))),
    Hypothesis("routing", "the router's exact gradient settles no tokens", "ours", HALF,
               (REMEDIED["dense mixer"],), (NONE,), margin=0.05),
    Hypothesis("routing", "a router guided by a dense teacher beats the exact gradient", "ours",
               ACC, (ROUTER,), (REMEDIED["dense mixer"],)),
    # what is hoped of each: the teacher decides only where the router doubts; guidance ends by
    # itself; targets that are even leave no expert idle; the task's own values need no teacher
    *(Hypothesis("ideas", f"a router guided {name!r} beats {what}", "ours", ACC, (arm,), (other,))
      for name, arm in IDEAS.items() for what, other in (
        ("V-MoE", "moe-k1-val"), ("V-MoE without its own losses", "moe-k1-no-aux-val"),
        ("one guided by TGR's KL", "tgr-k1-router-alone-val"))),
    # What serves an image's class token learns from that image, and behind the last block nothing
    # else is read: so experts that share the class tokens learn from a part of the images each.
    # Sums are over the four pairs of models that differ in one word alone
    Hypothesis("place", "a hash of the place beats V-MoE", "ours", ACC, (REMEDIED["hash"],),
               (NONE,), 0.8),
    Hypothesis("place", "one expert for all class tokens helps, by half a point (sum of four)",
               "ours", ACC, *with_and_without("class token"), 4 * MARGIN),
    Hypothesis("place", "the patches' place is as good as their router (sum of four)", "ours", ACC,
               *with_and_without("patches"), margin=4 * MARGIN),
    Hypothesis("place", "a gate of 1 helps (sum of four)", "ours", ACC,
               *with_and_without("gate 1")),
    Hypothesis("place", "one expert for all class tokens helps V-MoE with its own losses", "ours",
               ACC, ("moe-k1-class-token",), (NONE,), MARGIN),
    Hypothesis("place", "... so that experts help", "ours", ACC, ("moe-k1-class-token",),
               ("dense",), 0.8),
    Hypothesis("place", "a guided router shares class tokens among fewer experts than V-MoE",
               "ours", "class token's load entropy", (NONE,), (ROUTER,), 0.1),
    Hypothesis("place", "guiding the router adds less where class tokens have one expert anyway",
               "ours", ACC, (ROUTER, PLACED["class token",]),
               ("moe-k1-no-aux", "tgr-k1-router-alone-class-token")),
    # Weights of a place's own, or just to know the place, which a dense ViT can be told? If they
    # are weights, the more places are told apart the better, and like places may share them
    Hypothesis("maps", "a hash of the place beats a dense ViT that is told the place", "ours", ACC,
               (REMEDIED["hash"],), ("dense-told-the-place",), 0.8),
    Hypothesis("maps", "a dense ViT gains nothing when it is told the place", "ours", ACC,
               ("dense-told-the-place",), ("dense",), margin=MARGIN),
    Hypothesis("maps", "an expert for each patch beats one for two", "ours", ACC, (MAPS_OF[16],),
               (REMEDIED["hash"],)),
    Hypothesis("maps", "... and that one for four", "ours", ACC, (REMEDIED["hash"],),
               (MAPS_OF[4],)),
    Hypothesis("maps", "an expert of two neighbours beats one of patches two rows apart", "ours",
               ACC, (MAPS["neighbours"],), (REMEDIED["hash"],)),
    Hypothesis("maps", "other pairs in each block are as good", "ours", ACC,
               (MAPS["another in each block"],), (REMEDIED["hash"],), margin=MARGIN),
    Hypothesis("maps", "a coin, as even and as blind, is worse", "ours", ACC, (REMEDIED["hash"],),
               (MAPS["coin"],), 0.8),
    Hypothesis("maps", "... and worse than no experts", "ours", ACC, ("dense",),
               (MAPS["coin"],)),
    *(Hypothesis("places", f"an expert for each place beats {whom}", "ours", ACC,
                 (REMEDIED["hash"],), (other,), 0.8) for whom, other in (
        ("V-MoE", NONE), ("the dense ViT", "dense"),
        ("a dense ViT that is told the place", "dense-told-the-place"))),
    Hypothesis("places", "a dense ViT gains when it is told the place", "ours", ACC,
               ("dense-told-the-place",), ("dense",)),
    Hypothesis("schedule", "guiding the first half is best", "T", ACC, ("tgr-k1-first-half",),
               (BOTH,)),
    Hypothesis("schedule", "guided by the last layer alone, TGR ends below V-MoE", "T", ACC,
               (NONE,), ("tgr-k1-last-layer",)),
    Hypothesis("schedule", "aligned layers beat the last one", "T", ACC, (BOTH,),
               ("tgr-k1-last-layer",)),
    *(Hypothesis("schedule", f"the KL's weight of 5 beats {w}", "T", ACC, (BOTH,),
                 (f"tgr-k1-weight-{w}",)) for w in ("0.5", "50")),
    Hypothesis("schedule", "a router that the KL alone trains is as good", "ours", ACC,
               ("tgr-k1-distil-only",), (BOTH,), margin=MARGIN),
    Hypothesis("schedule", "targets that have settled before are as good", "ours", ACC,
               ("tgr-k1-settled",), (BOTH,), margin=MARGIN),
    Hypothesis("mutual", "mutual distillation helps", "M", ACC, ("mode-k2",), ("moe-k2",), 0.5),
    Hypothesis("mutual", "... at 0.1", "ours", ACC, ("mode-k2-alpha-0.1",), ("moe-k2",)),
    Hypothesis("mutual", "at 1 it hurts", "M", ACC, ("moe-k2",), ("mode-k2-alpha-1",)),
    Hypothesis("mutual", "a gate of all experts gains too", "M", ACC, ("mode-kE",), ("moe-kE",)),
    Hypothesis("mutual", "experts do better on their own domain", "M", "own-domain accuracy",
               ("mode-k2",), ("moe-k2",)),
    Hypothesis("mutual", "they stay specialised: own minus others does not shrink at 0.1", "M",
               "own minus others", ("mode-k2-alpha-0.1",), ("moe-k2",), -0.005),
    # probing sets an expert's gate to 1, where the gates of two sum to less
    Hypothesis("mutual", "... nor where tokens keep their gates", "ours",
               "own minus others, gates kept", ("mode-k2-alpha-0.1",), ("moe-k2",), -0.005),
    Hypothesis("mutual", "the gate chooses better", "M", "gate accuracy", ("mode-k2",),
               ("moe-k2",)),
    # alike experts are right together, which helps a gate that chooses blindly as well
    Hypothesis("mutual", "... beyond what blind gates gain", "ours", "gate's lead over blind ones",
               ("mode-k2",), ("moe-k2",)),
    Hypothesis("experts", "the gain grows from E=8 to E=32", "T", ACC,
               ("tgr-k1-E32", "moe-k1-E8"), ("moe-k1-E32", "tgr-k1-E8")),
    Hypothesis("experts", "guidance helps with 32 experts", "T", ACC, ("tgr-k1-E32",),
               ("moe-k1-E32",), 0.8),
    Hypothesis("experts", "without its own losses V-MoE collapses more with 32 experts", "T",
               "load entropy", ("moe-k1-E32", "moe-k1-no-aux-E8"),
               ("moe-k1-no-aux-E32", "moe-k1-E8")),
    # --- the first ---
    Hypothesis("main", "experts help", "T", ACC, ("moe-k1",), ("dense",), 0.8),
    Hypothesis("main", "guidance helps", "T", ACC, *TGR_MOE, 0.8),
    Hypothesis("main", "guidance steadies routing", "T", STEADY, *TGR_MOE),
    Hypothesis("main", "... beyond chance", "ours", "kappa adjacent, first quarter", *TGR_MOE),
    Hypothesis("main", "guided tokens settle early", "T", "agreement with the end at 1/6",
               *TGR_MOE),
    Hypothesis("main", "... and at half-time", "ours", "agreement with the end at 1/2", *TGR_MOE),
    Hypothesis("main", "70 % have settled at 1/6", "T", "agreement with the end at 1/6",
               ("tgr-k1",), (), 0.7),
    Hypothesis("main", "guidance works through the backbone too", "ours", ACC, ("tgr-k1",),
               ("tgr-k1-router-alone",)),
    Hypothesis("main", "a router guided alone, without its own losses, beats V-MoE with them",
               "ours", ACC, ("tgr-k1-router-alone",), ("moe-k1",)),
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
    Hypothesis("alpha", "experts stay specialised: own minus others does not shrink at 0.1", "M",
               "own minus others", ("mode-k2-alpha-0.1",), ("moe-k2",), -0.005),
    Hypothesis("guidance", "guiding the first half is best", "T", ACC, ("tgr-k1-first-half",),
               ("tgr-k1",)),
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
]

# Which of them, or of their metrics, were not yet so when a grid's first rows were known?
REVIEWED = "After the rows, a review"
REMARKS = {
    "routing": "The first edition had shown a router guided alone in five of these seeds. The "
               "worth of a choice was redefined when two blocks were known, which were asked "
               "again: of test images, which no expert has learned, and not of training images.",
    "places": "Its hypotheses were written when the first block of maps was known, in which the "
              "dense ViT gained.",
    "main": f"{REVIEWED} renamed two claims. \"Guiding the router alone helps\" passed over that "
            f"its arm differs in more, and \"guidance is more than a teacher's information\" is "
            f"nothing that logits at one untuned weight can decide.",
    "alpha": f"{REVIEWED} added that experts stay specialised, for so the paper says.",
    "guidance": f"{REVIEWED} set the paper's finding on the last layer, that it ends below V-MoE, "
                f"beside ours."}

# What is expected of the arms of `routing` together (ours), of Spearman's rho over the arms that
# have both metrics: its interval contains 0. The gradient's nearness to the truth, and how good the
# choices are, tell neither accuracy nor steadiness.
UNRELATED = {"routing": [(cause, effect) for cause in ("oracle cosine", "worth of the choice")
                         for effect in (ACC, HALF)]}
# The same, asked when the rows were known: of what do the experts of accurate models tell?
RANKED = {"routing": [("experts tell of the place", ACC), ("experts tell of the class", ACC)]}

# What readers of the first rows asked. It was not decided before, so it gets no p and no verdict.
# V-MoE's own two losses steady its routing, so what a guided router adds is seen beside a V-MoE
# that lacks them as well. "stable" keeps them for a tenth of the training. The floors have a gate
# of 1, where other gates are below: they are comparable with each other.
AFTERWARDS = [
    *(Hypothesis(grid, f"what {what}", "ours", HALF, (arm + mark,), (f"moe-k1-no-aux{mark}",))
      for grid, mark in (("routing", ""), ("ideas", "-val"))
      for arm, what in ((ROUTER, "guiding the router adds where neither has V-MoE's own losses"),
                        (NONE, "V-MoE's own losses add"))),
    Hypothesis("routing", "'stable' beside V-MoE without its own losses", "ours", ACC,
               (REMEDIED["stable"],), ("moe-k1-no-aux",)),
    *(Hypothesis("routing", f"the floor 'hash' beside {what}", "ours", ACC, (REMEDIED["hash"],),
                 (other,)) for other, what in (
        (REMEDIED["random fixed"], "the floor 'random fixed'"), (NONE, "V-MoE"),
        ("moe-k1-no-aux", "V-MoE without its own losses"), (ROUTER, "a router guided by TGR"))),
    *(Hypothesis("place", what, "ours", ACC, (arm,), (other,)) for what, arm, other in (
        ("a hash beside the dense ViT", REMEDIED["hash"], "dense"),
        ("a hash beside V-MoE without its own losses", REMEDIED["hash"], "moe-k1-no-aux"),
        ("the patches' place alone", PLACED["patches",], "moe-k1-no-aux"),
        ("... beside V-MoE", PLACED["patches",], NONE),
        ("... beside the dense ViT", PLACED["patches",], "dense"))),
    Hypothesis("maps", "an expert for each patch beside one for two neighbours", "ours", ACC,
               (MAPS_OF[16],), (MAPS["neighbours"],)),
    *(Hypothesis("maps", f"{what} beside the dense ViT", "ours", ACC, (arm,), ("dense",))
      for what, arm in (("an expert for each patch", MAPS_OF[16]),
                        ("an expert for four patches", MAPS_OF[4]),
                        ("an expert for two neighbours", MAPS["neighbours"]))),
    Hypothesis("placement", "TGR beside guided features alone, in the sum of both placements",
               "ours", ACC, (BOTH, f"{BOTH}-late"), (FEATURES, f"{FEATURES}-late")),
]

# --- the analysis ---

# Student's t is written out here, for scipy is not among the packages.

def central(t, df):
    """The probability of Student's t between -t and t (Abramowitz and Stegun, 26.7.3 and .4)."""
    angle, odd = math.atan(t / math.sqrt(df)), df % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(odd + 1, df, 2):                         # df // 2 terms
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


@cache
def within(share, df):
    """The t that Student's t stays within, on both sides, with this probability."""
    low, high = 0.0, 1e3
    while high - low > 1e-9:                                # central grows with t
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle, df) < share else (low, middle)
    return high


class Estimate(NamedTuple):
    mean: float | None
    low: float | None               # the 95 % t-interval; None with fewer than two seeds
    high: float | None
    n: int
    left_out: tuple = ()            # (arm, seed) of the runs without a partner

    def t(self, null=0.0):
        """How many standard errors the mean lies above `null`."""
        error = (self.high - self.mean) / within(0.95, self.n - 1)
        away = self.mean - null
        return away / error if error else math.copysign(math.inf, away) if away else 0.0

    def p(self, null=0.0):
        """Two-sided, of the hypothesis that the mean is `null`; None with fewer than two seeds."""
        return None if self.low is None else 1 - central(abs(self.t(null)), self.n - 1)


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
    half = within(0.95, n - 1) * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.fmean(values)
    return Estimate(mean, mean - half, mean + half, n, left_out)


def block(row):
    """What two runs must share to be paired: their seed and, since the second edition, the commit
    and the machine that made them."""
    return row["seed"], row.get("machine") and row["commit"], row.get("machine")


def contrast(rows, metric, plus, minus=()):
    """sum(plus) - sum(minus), block by block: the Estimate over the blocks that have every arm."""
    if metric not in METRICS or not (*plus, *minus):
        raise ValueError(f"a contrast is of arms, not {(*plus, *minus)}, and in one of "
                         f"{', '.join(METRICS)}, not {metric!r}")
    known = {arm: {block(r): value for r in rows if r["arm"] == arm
                   if (value := METRICS[metric](r)) is not None} for arm in (*plus, *minus)}
    blocks = sorted(set.intersection(*map(set, known.values())), key=str)
    left_out = tuple((arm, b[0]) for arm in known for b in sorted(known[arm], key=str)
                     if b not in blocks)
    return interval([sum(known[a][b] for a in plus) - sum(known[a][b] for a in minus)
                     for b in blocks], left_out)


def effects(arms):
    """{what a factor does: (plus, minus)}, for `contrast`, of four arms as `cells` has them."""
    none, router, features, both = arms
    return {"guided features, router free": ((features,), (none,)),
            "guided features, router guided": ((both,), (router,)),
            "guided router, features free": ((router,), (none,)),
            "guided router, features guided": ((both,), (features,)),
            "both together, beyond the sum": ((both, none), (router, features))}


def complete(rows, arms):
    """The rows of the blocks that have all of some arms."""
    blocks = set.intersection(*({block(r) for r in rows if r["arm"] == arm} for arm in arms))
    return [r for r in rows if r["arm"] in arms and block(r) in blocks]


def over_images(rows, plus, minus):
    """The contrast's 95 % interval in test accuracy, in points, if the test images had been others
    too: (low, high).

    The t-interval is conditional on the test images. Here their sampling error is added to it
    (ours; what varies by image and block at once is counted twice, so it is a little too wide).
    None below three blocks, or where a row does not hold which images it got right.
    """
    hits = {arm: {block(r): bits(r) for r in rows if r["arm"] == arm and "hits" in r}
            for arm in (*plus, *minus)}
    blocks = sorted(set.intersection(*map(set, hits.values())), key=str)
    if len(blocks) < 3:
        return None
    each = 100 * np.array([sum(hits[a][b] for a in plus) - sum(hits[a][b] for a in minus)
                           for b in blocks], dtype=np.float64)          # (n, images)
    mean, low, *_ = interval(each.mean(axis=1).tolist())
    of_images = 1.96 * each.mean(axis=0).std(ddof=1) / each.shape[1] ** 0.5
    half = math.hypot(mean - low, of_images)
    return mean - half, mean + half


def midranks(values):
    """(n, ...) the rank of each of n values; equal ones share the mean of theirs."""
    return (values[:, None] > values).sum(axis=1) + (values[:, None] == values).sum(axis=1) / 2


def spearman(means):
    """(...) the correlation of the arms' ranks in two metrics, from (arms, 2, ...); NaN where all
    arms are equal in one."""
    ranks = midranks(means)
    off = ranks - ranks.mean(axis=0)
    with np.errstate(invalid="ignore"):
        return off.prod(axis=1).sum(axis=0) / np.sqrt(np.square(off).sum(axis=0).prod(axis=0))


@cache
def draws_of(n):
    """All ways to draw n of n blocks, each as often as it comes: how often each block is drawn,
    (C(2n - 1, n), n), and the probability of each way. Of ten blocks there are 92,378."""
    drawn = np.array([*itertools.combinations_with_replacement(range(n), n)])
    times = (drawn[..., None] == np.arange(n)).sum(axis=1)
    factorial = np.array([math.factorial(k) for k in range(n + 1)], dtype=np.float64)
    return times, factorial[n] / factorial[times].prod(axis=1) / n ** n


def means_of(rows, *metrics):
    """(arms, blocks, metrics) of the arms that have all metrics, over the blocks that have all
    those arms."""
    known = {}
    for row in rows:
        values = [METRICS[name](row) for name in metrics]
        if None not in values:
            known.setdefault(row["arm"], {})[block(row)] = values
    blocks = sorted(set.intersection(*map(set, known.values())), key=str) if known else []
    return np.array([[own[name] for name in blocks] for own in known.values()], dtype=np.float64)


def rank_correlation(rows, a, b):
    """Do arms that are high in metric a stand high in b? Spearman's rho of the arms' means over
    blocks, and the middle 95 % of its values when blocks are drawn anew, in every way that there
    is: (rho, low, high, arms, blocks).

    None below three blocks that have every arm with both metrics, below three such arms, or where
    all arms are equal in a metric.
    """
    each = means_of(rows, a, b)
    if min(each.shape[:2]) < 3:
        return None
    arms, n = each.shape[:2]
    times, p = draws_of(n)
    drawn = np.einsum("anm,xn->amx", each, times) / n       # (arms, 2, draws)
    # rounded, for equal arms must stay equal in whatever order they are summed
    rho, middle = spearman(drawn.round(12)), spearman(each.mean(axis=1).round(12))
    if math.isnan(middle):
        return None
    order = np.flatnonzero(~np.isnan(rho))
    order = order[rho[order].argsort()]
    below = p[order].cumsum()
    low, high = rho[order[np.searchsorted(below, [0.025 * below[-1], 0.975 * below[-1]])]]
    return middle, low, high, arms, n


def reliability(rows, metric):
    """Which share of the variance of the arms' means is no noise? From 0 to 1 (Hoyt, 1941).

    Noise makes ranks random, so a low one hides a relation. None below two arms or blocks.
    """
    each = means_of(rows, metric)
    if min(each.shape[:2]) < 2:
        return None
    each = each[..., 0]
    arms = each.mean(axis=1, keepdims=True) - each.mean()
    noise = each - each.mean(axis=0) - arms
    of_arms = each.shape[1] * np.square(arms).sum() / (len(each) - 1)
    of_noise = np.square(noise).sum() / (len(each) - 1) / (each.shape[1] - 1)
    return max(0.0, 1 - of_noise / of_arms) if of_arms else 0.0


def bits(row):
    """(images,) of 0 and 1: which test images a run got right."""
    packed = np.frombuffer(base64.b64decode(row["hits"]), dtype=np.uint8)
    return np.unpackbits(packed)[:row["test_images"]].astype(np.float32)


def verdict(estimate, least, p=None, margin=None):
    """met: mean at least `least`, interval above 0 (above `least` where that is below 0). not met:
    interval below `least`. With `margin`, met: two one-sided tests say that the mean is within it.
    not met: interval beyond it.

    `p`, corrected for the number of questions, must be below 0.05 too for "met".
    """
    mean, low, high, n, _ = estimate
    if n == 0:
        return "not run"
    if n < 3:
        return "too few seeds"
    if margin is not None:
        beyond = low > margin or high < -margin
        return "met" if p < 0.05 else "not met" if beyond else "undecided"
    if mean >= least and low > min(least, 0):
        return "met" if p is None or p < 0.05 else "undecided"
    return "not met" if high < least or high <= min(least, 0) else "undecided"


def judge(grid, rows):
    """{hypothesis: (its Estimate, p corrected by Holm or None, its verdict)} of a grid's rows.

    Those that compare nothing, and those below three seeds, are not counted by Holm.
    """
    found = {h: contrast(rows, h.metric, h.plus, h.minus) for h in HYPOTHESES if h.grid == grid}
    p = holm({h: e.p(min(h.least, 0)) if h.margin is None else equivalence(e, h.margin)
              for h, e in found.items() if h.minus and e.n >= 3})
    return {h: (e, p.get(h), verdict(e, h.least, p.get(h), h.margin)) for h, e in found.items()}


def detectable(judged):
    """How many points of accuracy must the first contrast of a grid reach to be met?

    So many that its p, times the number of contrasts, is 0.05 at their median standard error. None
    where there is none. `judged` is what `judge` returns.
    """
    errors = [(e.high - e.mean) / within(0.95, e.n - 1) for h, (e, p, _) in judged.items()
              if p is not None and h.metric == ACC and h.margin is None]
    if not errors:
        return None
    n = min(e.n for e, p, _ in judged.values() if p is not None)
    asked = 1 - 0.05 / sum(p is not None for _, p, _ in judged.values())
    return within(asked, n - 1) * statistics.median(errors)


def attainable(judged):
    """The p that each equivalence would have had, before Holm, with a mean of exactly 0.

    Where it is not small, the question was too fine for its seeds. `judged` is of `judge`.
    """
    return [equivalence(e._replace(mean=0.0, low=e.low - e.mean, high=e.high - e.mean), h.margin)
            for h, (e, p, _) in judged.items() if h.margin is not None and p is not None]


def signed(estimate, digits=2):
    """`+0.81 [+0.20, +1.42]`; – stands for what has no number."""
    if estimate.mean is None:
        return "–"
    text = f"{estimate.mean:+.{digits}f}"
    return text if estimate.low is None else (
        text + f" [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]")


# --- what the arms are called where people read ---

# In the tables of notebook 2. *: no arm, but two controls thought of after the first rows. "tgr"
# stands for the runs in results/cpu.jsonl, whose teacher saw 10,000 images.
NAMES = {
    "dense": "dense ViT", "dense-features-alone": "dense ViT, KL on its features*",
    "moe-k1": "V-MoE", "moe-k1-logits": "V-MoE, teacher's logits",
    "moe-k1-features-alone": "V-MoE, KL on features alone*",
    "tgr-k1-router-alone": "TGR, KL on routers alone", "tgr-k1": "TGR: KL on both",
    "tgr-k1-distil-only": "TGR, KL and no task on routers",
    "tgr-k1-first-half": "TGR, KL in the first half only",
    "tgr-k1-weight-0.5": "TGR, a tenth of the KL", "tgr-k1-weight-50": "TGR, ten times the KL",
    "tgr-k1-oracle": "TGR, the teacher dispatches",
    "tgr-k1-oracle-alone": "TGR, the teacher dispatches, KL on routers alone",
    "tgr-k1-settled": "TGR, targets that have settled before",
    "tgr-k1-last-layer": "TGR, teacher's last layer",
    "tgr-k1-kmeans": "TGR, k-means teacher router",
    "tgr-k1-random-router": "TGR, random teacher router",
    "tgr": "TGR by the teacher of 10,000", "tgr-k1-random-teacher": "TGR, untrained teacher"}
