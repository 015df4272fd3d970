"""measure.py -- the notebooks show numbers that are in no row of the study: how are they made?

    python notebooks/measure.py keep --runs runs/study/cpu       two students, for the notebooks
    python notebooks/measure.py experts --runs runs/study/cpu    what does each expert know?
    python notebooks/measure.py sweep --runs runs/study/cpu      how alike does alpha make experts?
    python notebooks/measure.py gradients       is a router's gradient right? Five runs, 20 minutes
    python notebooks/measure.py classes         which classes do the kept students' experts serve?
    python notebooks/measure.py logits          how strongly may logits be distilled? Four runs
    python notebooks/measure.py remedies --seed 0       which remedy brings a router nearest to the
                                                truth, and what does a step of it cost? Eleven runs

Every file that it writes under notebooks/results/ says which command, seed, commit and device made
it.
"""
import argparse
import copy
import io
import itertools
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint

import numpy as np
import torch
import torch.nn.functional as F

import data
import distill
import report
import train
from notebooks import bench, probes, remedies, study
from notebooks.controls import LOSSES, guide_by, learn_the_teachers_logits
from notebooks.decided import ARMS, FIRST, MOE, REMEDIED, SCALES, SWEEP, TEACHER, TEACHERS_SEED, TGR
from notebooks.lesson import guide_of, trained
from router import expect

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results"
DRAWS = 4           # passes whose gradients are averaged: some remedies draw
WEIGHTS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def about(command, seed, commit=None, device="cpu"):
    """Where a number comes from, under the names that a run's result.json uses."""
    return {"command": command, "seed": seed, **checkpoint.provenance(device),
            "commit": commit or study.commit_of_row(dirty=True)}


def write(name, origin, **arrays):
    RESULTS.mkdir(exist_ok=True)
    path, buffer = RESULTS / f"{name}.npz", io.BytesIO()
    np.savez_compressed(buffer, about=json.dumps(origin), **arrays)
    checkpoint.write(path, buffer.getvalue())
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB")


def narrow(ids):
    """Ids in the narrowest whole numbers that hold them all: the files are in the repository."""
    return ids.astype(np.min_scalar_type(ids.max()))


def half(weights):
    return {key: w.half() for key, w in weights.items()}


def ended(run, data_dir):
    """(result, cfg, images, vit) of a run that has ended; vit keeps its experts' raw outputs."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    cfg = train.Config(**result["config"] | train.OF_THE_MACHINE | {"device": "cpu"})
    images = data.load(cfg.data, data_dir)
    vit = train.build(cfg, images)
    path = run / "checkpoint.pt"
    checkpoint.restore(vit, checkpoint.read(path, train.Config)["student"], path)
    for b in vit.moe_blocks:
        vit.blocks[b - 1].mlp.keep_raw = True
    return result, cfg, images, vit.eval()


def keep(args):
    """Keep two trained students, the teacher of one, 64 probe images and every epoch's routing."""
    runs = {name: Path(args.runs, arm, "seed0")
            for name, arm in (("vmoe", "moe-k1"), ("tgr", "tgr-k1"))}
    results = {name: json.loads((run / "result.json").read_text(encoding="utf-8"))
               for name, run in runs.items()}
    cfg = train.Config(**results["tgr"]["config"] | {"device": "cpu"})
    images = data.load(cfg.data, args.data_dir)
    names = images.coarse_names if cfg.labels == "coarse" else images.fine_names
    origins = {name: {key: r[key] for key in ("command", "seed", "commit", "device", "versions")}
               for name, r in results.items()}

    probe, labels = (part[:64].numpy() for part in data.split(cfg, images).probe)
    write("probe", origins["tgr"], images=probe, labels=labels, names=np.array(names),
          mean=images.mean, std=images.std)
    histories = {name: narrow(np.load(run / "routing.npz")["experts"])
                 for name, run in runs.items()}             # (epochs, L, B, N, K)
    both = " and ".join(origin["command"] for origin in origins.values())
    write("routing", origins["tgr"] | {"command": both},
          layers=np.load(runs["tgr"] / "routing.npz")["layers"], **histories)
    for name, run in runs.items():
        state = checkpoint.read(run / "checkpoint.pt", train.Config)
        kept = {"config": state["config"], "names": list(names), "about": origins[name],
                "student": half(state["student"])}
        if state["routers"]:
            teacher = checkpoint.read(Path(args.runs, "teacher", "checkpoint.pt"), train.Config)
            kept |= {"routers": half(state["routers"]), "teacher": half(teacher["student"]),
                     "teacher_config": teacher["config"]}
        checkpoint.write(RESULTS / f"{name}.pt", checkpoint.seal(kept))
        print(f"{name}.pt: {(RESULTS / f'{name}.pt').stat().st_size / 1e6:.2f} MB")


# --- what does each expert know, and who teaches it? (notebook 3) ---

# One run of each arm, seed 0. The first is V-MoE: notebook 3 also judges the others on its domains.
EXPERTS_OF = ("moe-k2", "mode-k2", "mode-k2-alpha-1", "mode-k2-alpha-100", "tgr+mode-k2")
HEARD = 400         # test images on which gradients are taken; experts are forced on probes.PROBED


def pulls(vit, images, labels):
    """How strongly do the task and mutual distillation pull at an expert's output for a token?

    (L, 2) for L MoE blocks: the mean length of the gradient of the task loss, and of mutual
    distillation with alpha = 1, as one step of `train.objective` would send it.
    """
    output = vit(images)
    raws = [output.layers[b].raw for b in vit.moe_blocks]               # L of (T, K, D)
    mutual = sum(distill.mutual_distillation_loss(raw) for raw in raws) / len(raws)
    sent = [torch.autograd.grad(loss, raws, retain_graph=True)
            for loss in (F.cross_entropy(output.logits, labels), mutual)]
    return torch.stack([torch.stack([g.norm(dim=-1).mean() for g in grads])
                        for grads in sent], dim=1)


def experts(args):
    """Force every expert, take gradients and count shared tokens, in one run of each arm."""
    commit = study.commit_of_row(dirty=True)     # before the minutes in which a file may be edited
    kept = {name: [] for name in ("arms", "domain", "correct", "norms", "meet", "first_share",
                                  "pulls")}
    trained_by = {}
    for arm in EXPERTS_OF:
        result, cfg, images, vit = ended(Path(args.runs, arm, "seed0"), args.data_dir)
        trained_by[arm] = {key: result[key] for key in ("command", "commit", "device")}
        sets = data.split(cfg, images)
        x = images.normalise(sets.test[0][:probes.PROBED])
        y = sets.test[1][:probes.PROBED]
        E, N, blocks = cfg.n_experts, vit.n_tokens, vit.moe_blocks

        with torch.no_grad():
            layers = vit(x).layers
        routings = [layers[b].routing for b in blocks]
        pairs = [F.one_hot(r.chosen, E).sum(dim=1).float() for r in routings]      # (T, E) 0 or 1
        share = [r.gates[:, 0] / r.gates.sum(dim=1) for r in routings]  # (T,) of the favourite
        probe = (images.normalise(sets.probe[0]), sets.probe[1])
        found = {
            "arms": arm,
            "domain": narrow(np.stack([distill.domains(r.probs, N) for r in routings])),
            "correct": torch.stack([distill.probe(vit, x, y, b) for b in blocks]),
            "norms": torch.stack([distill.expert_gradient_norms(vit, x[:HEARD], y[:HEARD], b)
                                  for b in blocks]),
            "meet": torch.stack([p.T @ p for p in pairs]).int(),        # tokens that e and f share
            "first_share": torch.stack([s.mean() for s in share]),
            "pulls": pulls(vit, *probe)}
        for name, value in found.items():
            kept[name].append(np.asarray(value))
        print(arm, flush=True)
    origin = about(f"python notebooks/measure.py experts --runs {args.runs}", 0, commit)
    write("experts", origin | {"trained_by": trained_by}, blocks=np.array(blocks),
          **{name: np.stack(values) for name, values in kept.items()})


# --- how alike does alpha make the experts that serve a token together? (notebook 3) ---

def colleagues(raw):
    """(cosine, length) of the outputs of the two experts that serve a token, means over tokens.

    Distillation sees nothing of the experts but these raw outputs (T, K=2, D).
    """
    expect("raw", raw, "T", 2, "D")
    return F.cosine_similarity(raw[:, 0], raw[:, 1], dim=-1).mean(), raw.norm(dim=-1).mean()


def sweep(args):
    """Measure the ended runs of grid alpha at K=2: arrays (alphas, seeds), NaN where none ended.

    `held_out` is the accuracy on the tenth that --split val holds out, for decided.BEST_ALPHA. All
    others are means over the blocks, on 1,000 test images: the cosine and length of `colleagues`,
    the number of `strangers` (pairs of experts that share under 1 % of the tokens), the gate's
    accuracy and that of a blind gate, which asks the same expert about every image.
    """
    commit, seeds = study.commit_of_row(dirty=True), range(FIRST["alpha"]["mode-k2"][0])
    names = ("colleagues", "length", "strangers", "gate", "blind")
    found = {name: np.full((len(SWEEP), len(seeds)), np.nan) for name in ("held_out", *names)}
    for (at, arm), seed in itertools.product(enumerate(SWEEP.values()), seeds):
        run = Path(args.runs, arm, f"seed{seed}")
        if not (run / "result.json").exists():
            continue
        _, cfg, images, vit = ended(run, args.data_dir)
        sets = data.split(replace(cfg, split="val"), images)       # the same training images
        found["held_out"][at, seed] = train.accuracy(vit, *sets.val, cfg, images)
        x, y = images.normalise(sets.test[0][:1_000]), sets.test[1][:1_000]
        with torch.no_grad():
            layers = vit(x).layers
        values = []
        for b in vit.moe_blocks:
            routing, correct = layers[b].routing, distill.probe(vit, x, y, b)       # (E, 1000)
            both = F.one_hot(routing.chosen, len(correct)).sum(dim=1).float()      # (T, E)
            rare = both.T @ both < 0.01 * len(both)
            domain = distill.domains(routing.probs, vit.n_tokens)
            blind = [distill.gate_accuracy(correct, torch.full_like(domain, e))
                     for e in range(len(correct))]
            values.append((*colleagues(layers[b].raw), rare.triu(1).sum(),
                           distill.gate_accuracy(correct, domain), np.mean(blind)))
        for name, value in zip(names, np.mean(values, axis=0), strict=True):
            found[name][at, seed] = value
        print(arm, seed, *(f"{value[at, seed]:.3f}" for value in found.values()), flush=True)
    origin = about(f"python notebooks/measure.py sweep --runs {args.runs}", list(seeds), commit)
    write("sweep", origin, alpha=np.array(list(SWEEP), dtype=float), **found)


def gradients(args):
    """Train five gates and measure probes.oracle_cosine on the probe images: (runs, epochs + 1, L).

    Epoch 0 stands for the first weights. NaN where the sparse gradient is 0. Looking changes
    nothing: the runs are the study's own, bit for bit.
    """
    arms = {"softmax, then top-1": "--k 1", "softmax, then top-2": "--k 2",
            "top-2, then softmax": "--k 2 --gate topk_softmax",
            "sigmoid, top-2": "--k 2 --gate sigmoid", "sigmoid, top-1": "--k 1 --gate sigmoid"}
    origin, curves = about("python notebooks/measure.py gradients", seed=0), []
    for name, flags in arms.items():
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            curves.append(cosines(f"{SCALES['cpu']} --method moe {flags}", folder, args.data_dir))
        write("gradients", origin, names=np.array(list(arms)[:len(curves)]),
              cosine=np.array(curves, dtype=np.float32))                # None becomes NaN


def cosines(flags, folder, data_dir, change=None, seed=0, dense=None):
    """Train one run; (epochs + 1, L) cosines before the first step of each epoch and at the end.

    With `dense`, a teacher's checkpoint, it is TGR's that guides the routers alone, and there are
    two curves, (2, epochs + 1, L): of the task's gradient, and of all that a router learns from.
    """
    planned, job = study.prepare(flags, Path(folder), data_dir, seed, dense, change)
    guide = guide_by("dense", job, planned or train.teacher_of(job)) if dense else None
    minimised = LOSSES["router alone"] if dense else remedies.losses if change else train.losses
    x, labels = job.data.normalise(job.sets.probe[0]), job.sets.probe[1]
    step, found = 0, [[], []] if dense else [[]]

    def guidance(output, block):
        with torch.no_grad():
            targets = guide(x)
        return train.objective(job.cfg, output, F.one_hot(labels, output.logits.shape[1]).float(),
                               targets)["guidance"]

    def look(student):
        # a copy, for a remedy learns from every look; in training, for some are at work there alone
        with torch.random.fork_rng():
            seen = copy.deepcopy(student).train()
            for curve, also in zip(found, (None, guidance), strict=False):
                curve.append([probes.oracle_cosine(seen, x, labels, block, DRAWS, also)
                              for block in student.moe_blocks])

    def losses(cfg, student, guide, images, targets):
        nonlocal step
        if step % data.steps_per_epoch(cfg, job.sets) == 0:
            look(student)
        step += 1
        return minimised(cfg, student, guide, images, targets)

    train.fit(job, guide, own_losses=losses)
    look(job.model)
    return found if dense else found[0]


def compared(args):
    """The cosine of each remedy's router gradient with the oracle's over training, as in
    `gradients`, and the median time of its training step over V-MoE's: (curves, epochs + 1, L) and
    (curves,). The gradient is the mean of DRAWS passes, for one remedy draws its experts.
    """
    def another(name, flags):
        return study.train_teacher(flags, "cpu", args.seed,
                                   Path(args.runs, f"{name}-seed{args.seed}"), args.data_dir)

    command = f"python notebooks/measure.py remedies --seed {args.seed}"
    origin, names, curves = about(command, seed=args.seed), [], []
    other = train.load_model(another("v-moe", MOE), device="cpu")[0]     # for "grouter"
    arms = {"V-MoE": None} | {
        name: remedies.remedy(name, *[other] * (name == "grouter"))
        for name in REMEDIED if remedies.REMEDIES[name].has_oracle} | {"TGR": None}
    flags = {name: f"{SCALES['cpu']} {ARMS[REMEDIED[name]].flags if change else MOE}"
             for name, change in arms.items()} | {"TGR": f"{SCALES['cpu']} {TGR}"}
    dense = dict.fromkeys(arms) | {"TGR": another("teacher", study.teachers_flags("cpu"))}
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: a_step(flags[name], Path(folder, name), args.data_dir, change, dense[name])
                 for name, change in arms.items()}
        samples = bench.clock(steps, 15, 600, False)
        times = {name: np.median(np.divide(own, samples["V-MoE"])) for name, own in samples.items()}
        print({name: round(float(t), 2) for name, t in times.items()}, flush=True)
    for name, change in arms.items():
        with tempfile.TemporaryDirectory() as folder:
            found = cosines(flags[name], folder, args.data_dir, change, args.seed, dense[name])
        both = name == "TGR"
        names += [f"{name}, task alone", f"{name}, task and guidance"] if both else [name]
        curves += found if both else [found]
        print(name, found[-1], flush=True)
        write(f"remedies{args.seed}", origin, names=np.array(names),
              cosine=np.array(curves, dtype=np.float32),
              times=np.array([times[name.split(",")[0]] for name in names]))


def a_step(flags, folder, data_dir, change, dense):
    planned, job = study.prepare(flags, folder, data_dir, 0, dense, change)
    guide = guide_by("dense", job, planned or train.teacher_of(job)) if dense else None
    batch = next(data.batches(job.cfg, job.data, job.sets, epoch=1))
    optimizer = torch.optim.AdamW(train.parameter_groups(job.model, guide, 0.05), lr=1e-4)
    minimised = LOSSES["router alone"] if dense else remedies.losses if change else train.losses

    def step():
        optimizer.zero_grad(set_to_none=True)
        sum(minimised(job.cfg, job.model.train(), guide, *batch).values()).backward()
        optimizer.step()

    return step


# --- whom does an expert serve? (notebook 2) ---

def exchanges(B, N):
    """Three orders (T,), T = B*N: whose expert does each token visit, its own or another's?"""
    other = torch.randperm(B)[:, None] * N + torch.arange(N)
    return {"own": torch.arange(B * N), "same place, other image": other.flatten(),
            "any other token": torch.randperm(B * N)}


@torch.no_grad()
def classes(args):
    """Whom does each expert serve, and does it matter? Both kept students, every test image.

    `counts` (router, block, class, token, expert) are of the routers of V-MoE, of TGR and of TGR's
    teacher; token 0 is the class token. `dealt` sums the patches and deals the classes out anew
    among the images: it holds the information that chance alone would show. `right` counts the
    images that a student gets right when its tokens keep their experts, when they exchange them
    (each keeps its own gates), and when the teacher routers send them.
    """
    torch.manual_seed(0)
    vmoe, _ = trained("vmoe")
    tgr, state = trained("tgr")
    guide, routers = guide_of(tgr, state), ("vmoe", "tgr", "teacher")
    images = data.load("cifar100", args.data_dir)
    labels, N, E = images.test.coarse, tgr.n_tokens, guide.routers["2"].weight.shape[0]
    anew = labels[torch.randperm(len(labels))]
    counts = np.zeros((len(routers), len(guide.blocks), len(images.coarse_names), N, E), np.int32)
    dealt, right = np.zeros_like(counts[:, :, :, 0]), {}
    for some in torch.arange(len(labels)).split(500):
        x, y = images.normalise(images.test.images[some]), labels[some]
        targets = guide(x)
        sent = {b: tgr.blocks[b - 1].mlp.router.route(z) for b, z in targets.items()}
        routings = {"teacher": sent}
        orders = exchanges(len(x), N)
        for name, student in (("vmoe", vmoe), ("tgr", tgr)):
            layers = student(x).layers
            own = routings[name] = {b: layers[b].routing for b in sent}
            trials = {how: {b: r._replace(chosen=r.chosen[order]) for b, r in own.items()}
                      for how, order in orders.items()}
            trials |= {"the teacher routers'": sent} if name == "tgr" else {}
            for how, trial in trials.items():
                hits = (student(x, trial).logits.argmax(dim=1) == y).sum().item()
                right[name, how] = right.get((name, how), 0) + hits
        for r, name in enumerate(routers):
            for i, routing in enumerate(routings[name].values()):
                chosen = routing.chosen[:, 0].view(-1, N).numpy()      # (B, N)
                np.add.at(counts[r, i], (y.numpy()[:, None], np.arange(N), chosen), 1)
                np.add.at(dealt[r, i], (anew[some].numpy()[:, None], chosen[:, 1:]), 1)
    write("classes", about("python notebooks/measure.py classes", 0), counts=counts, dealt=dealt,
          routers=np.array(routers), blocks=np.array(list(guide.blocks)),
          names=np.array(images.coarse_names), right=np.array(list(right.values())),
          trials=np.array([f"{name}: {how}" for name, how in right]))


# --- does guidance need a router at all? (notebook 2) ---

def logits(args):
    """Which weight of the teacher's logits is best, on images that neither student nor teacher saw?

    One run of each at the scale of the grid `factors`, of a seed that no block has. A row per run;
    decided.WORDS is told the best by hand.
    """
    path, runs = RESULTS / "logits.jsonl", Path("runs", "logits")
    rows = report.read_lines(path) if path.exists() else []
    done = {row["config"]["guide_weight"] for row in rows}
    recipe, seed = f"{SCALES['whole']} --split val", 100
    _, dense = study.prepare(f"{recipe} {TEACHER['whole']}", runs / "teacher", args.data_dir,
                             TEACHERS_SEED + seed)
    with checkpoint.claim(runs / "teacher", wait_for="to train the teacher"):
        train.fit(dense, command="python notebooks/measure.py logits")
    for weight in WEIGHTS:
        if weight in done:
            continue
        _, job = study.prepare(f"{recipe} {MOE} --guide_weight {weight}", runs / f"{weight:g}",
                               args.data_dir, seed, runs / "teacher" / checkpoint.NAME)
        result = train.fit(job, guide_by("dense", job, train.teacher_of(job)),
                           "python notebooks/measure.py logits", learn_the_teachers_logits)
        study.append(path, result | {"commit": study.commit_of_row(dirty=True)})
        print(f"{weight:g}: {result['val_accuracy']:.2%}", flush=True)


MEASURES = {"keep": keep, "gradients": gradients, "classes": classes, "experts": experts,
            "sweep": sweep, "logits": logits, "remedies": compared}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the numbers that the notebooks show.")
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--runs", default="runs/study/cpu", help="the study's runs at one scale")
    parser.add_argument("--seed", type=int, default=0, help="of remedies: a file per seed")
    parser.add_argument("--data_dir", default="data", help="where CIFAR-100 lies or is put")
    checkpoint.printable()
    args = parser.parse_args(argv)
    try:
        MEASURES[args.what](args)
    except (ValueError, OSError) as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
