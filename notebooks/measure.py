"""measure.py -- how are the numbers made that the notebooks show and the study's rows do not hold?

    python notebooks/measure.py keep --runs runs/study/cpu    what they keep of the study's runs
    python notebooks/measure.py experts --runs runs/study/cpu    what each expert knows and hears
    python notebooks/measure.py sweep                         short runs over alpha, K=2

Every file it writes under notebooks/results/ says which command, seed, commit and device made it.
"""
import argparse
import itertools
import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import distill  # noqa: E402
import train  # noqa: E402

RESULTS = ROOT / "notebooks" / "results"


def about(command, seed, commit=None, device="cpu"):
    """Who measured this, in the words of a run's result.json."""
    return {"command": command, "seed": seed, "commit": commit or train.commit(),
            "device": train.describe(device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__}}


def write(name, origin, **arrays):
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.npz"
    np.savez_compressed(path, about=json.dumps(origin), **arrays)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB")


def half(weights):
    return {key: w.half() for key, w in weights.items()}


def keep(args):
    """Two trained students, the teacher of one, 64 probe images and the routing of every epoch."""
    runs = {name: Path(args.runs, arm, "seed0")
            for name, arm in (("vmoe", "moe-k1"), ("tgr", "tgr-k1"))}
    results = {name: json.loads((run / "result.json").read_text()) for name, run in runs.items()}
    cfg = train.Config(**results["tgr"]["config"] | {"device": "cpu"})
    images = data.load(cfg.data, args.data_dir)
    names = images.coarse_names if cfg.labels == "coarse" else images.fine_names
    origins = {name: {key: r[key] for key in ("command", "seed", "commit", "device", "versions")}
               for name, r in results.items()}

    probe, labels = (part[:64].numpy() for part in train.split(cfg, images).probe)
    write("probe", origins["tgr"], images=probe, labels=labels, names=np.array(names),
          mean=images.mean, std=images.std)
    histories = {name: np.load(run / "routing.npz")["experts"].astype(np.int8)
                 for name, run in runs.items()}             # (epochs, L, B, N, K)
    both = " and ".join(origin["command"] for origin in origins.values())
    write("routing", origins["tgr"] | {"command": both}, layers=np.load(runs["tgr"] / "routing.npz")["layers"],
          **histories)
    for name, run in runs.items():
        state = train.read(run / "checkpoint.pt")
        kept = {"config": state["config"], "names": list(names), "about": origins[name],
                "student": half(state["student"])}
        if state["routers"]:
            teacher = train.read(Path(args.runs, "teacher", "checkpoint.pt"))
            kept |= {"routers": half(state["routers"]), "teacher": half(teacher["student"]),
                     "teacher_config": teacher["config"]}
        train.save(RESULTS / f"{name}.pt", kept)
        print(f"{name}.pt: {(RESULTS / f'{name}.pt').stat().st_size / 1e6:.2f} MB")


# --- what does each expert know, and from whom does it hear? (notebook 3) ---

# those of them that have ended; the first one's gate gives the partition that all share
EXPERTS_OF = ("moe-k2", "mode-k2", "mode-k2-alpha-1", "mode-k2-alpha-100", "tgr+mode-k2")
PROBED, HEARD = 2_000, 400     # test images: experts are forced on these, gradients taken on those


def pulls(vit, images, labels):
    """(L, 2): mean size of what the task and mutual distillation with alpha = 1 send to an expert's
    output for a token, as one training step of `train.objective` would, for L MoE blocks."""
    output = vit(images)
    raws = [output.layers[b].raw for b in vit.moe_blocks]               # L of (T, K, D)
    mutual = sum(distill.mutual_distillation_loss(raw) for raw in raws) / len(raws)
    sent = [torch.autograd.grad(loss, raws, retain_graph=True)
            for loss in (F.cross_entropy(output.logits, labels), mutual)]
    return torch.stack([torch.stack([g.norm(dim=-1).mean() for g in grads])
                        for grads in sent], dim=1)


def experts(args):
    """Force every expert, take gradients, count who meets whom, in every run that has ended."""
    commit = train.commit()                # before the minutes in which a file may be edited
    runs = [(arm, run) for arm in EXPERTS_OF for run in sorted(Path(args.runs, arm).glob("seed*"))
            if (run / "result.json").exists()]
    kept = {name: [] for name in ("arms", "seeds", "domain", "correct", "norms", "meet",
                                  "first_share", "pulls")}
    trained_by = {}
    for arm, run in runs:
        result = json.loads((run / "result.json").read_text())
        trained_by[f"{arm}, seed {result['seed']}"] = {
            key: result[key] for key in ("command", "commit", "device")}
        cfg = train.Config(**result["config"] | {"device": "cpu"})
        images = data.load(cfg.data, args.data_dir)
        vit = train.build(cfg, images)
        train.restore(vit, train.read(run / "checkpoint.pt")["student"], run / "checkpoint.pt")
        vit.eval()
        for b in vit.moe_blocks:
            vit.blocks[b - 1].mlp.keep_raw = True
        sets = train.split(cfg, images)
        x = data.normalise(sets.test[0][:PROBED], images.mean, images.std)
        y = sets.test[1][:PROBED]
        E, N, blocks = cfg.n_experts, vit.n_tokens, vit.moe_blocks

        with torch.no_grad():
            layers = vit(x).layers
        routings = [layers[b].routing for b in blocks]
        pairs = [F.one_hot(r.experts, E).sum(dim=1).float() for r in routings]      # (T, E) 0 or 1
        share = [r.gates[:, 0] / r.gates.sum(dim=1) for r in routings]  # (T,) of the favourite
        probe = (data.normalise(sets.probe[0], images.mean, images.std), sets.probe[1])
        found = {
            "arms": arm, "seeds": result["seed"],
            "domain": torch.stack([distill.domains(r.probs, N) for r in routings]).byte(),
            "correct": torch.stack([distill.probe(vit, x, y, b) for b in blocks]),
            "norms": torch.stack([distill.expert_gradient_norms(vit, x[:HEARD], y[:HEARD], b)
                                  for b in blocks]),
            "meet": torch.stack([p.T @ p for p in pairs]).int(),        # tokens that e and f share
            "first_share": torch.stack([s.mean() for s in share]),
            "pulls": pulls(vit, *probe)}
        for name, value in found.items():
            kept[name].append(np.asarray(value))
        print(list(trained_by)[-1], flush=True)
    origin = about(f"python notebooks/measure.py experts --runs {args.runs}",
                   sorted({int(seed) for seed in kept["seeds"]}), commit)
    write("experts", origin | {"trained_by": trained_by}, blocks=np.array(blocks),
          **{name: np.stack(values) for name, values in kept.items()})


# --- what does alpha do, in runs short enough to repeat before lunch? (notebook 3) ---

SHORT, SEEDS = 4, 1                     # epochs instead of the study's 12; all else is the same
SWEEP = (0, 0.001, 0.01, 0.1, 1, 10, 100)               # 0 is the plain V-MoE
ENDS_FIRST = (0, 6, 2, 4, 5, 3, 1)                      # so that an interrupted sweep says most


def colleagues(raws):
    """(cosine of two experts' outputs for a token that both serve, their length), from L raw
    outputs (T, K=2, D): what distillation sees of the experts, and all that it sees."""
    alike = [F.cosine_similarity(raw[:, 0], raw[:, 1], dim=-1).mean() for raw in raws]
    return sum(alike) / len(raws), sum(raw.norm(dim=-1).mean() for raw in raws) / len(raws)


def sweep(args):
    """Accuracy, expert similarity and the gate at every alpha; block 4, 1,000 images probed."""
    import study
    origin = about("python notebooks/measure.py sweep", list(range(SEEDS)))
    names = ("accuracy", "similarity", "colleagues", "length", "strangers", "gate", "blind")
    found = {name: np.full((len(SWEEP), SEEDS), np.nan) for name in names}  # NaN: not run yet
    for seed, at in itertools.product(range(SEEDS), ENDS_FIRST):
        method = f"mode --alpha {SWEEP[at]}" if at else "moe"
        flags = f"{study.SCALES['cpu']} --epochs {SHORT} --k 2 --method {method}"
        folder = ROOT / "runs" / "sweep" / f"alpha{SWEEP[at]}-seed{seed}"
        _, job = study.prepare(flags, folder, args.data_dir, seed)
        result = train.fit(job, command=origin["command"])
        vit, images = job.student.eval(), job.data
        for b in vit.moe_blocks:
            vit.blocks[b - 1].mlp.keep_raw = True

        x = data.normalise(job.sets.test[0][:1_000], images.mean, images.std)
        correct = distill.probe(vit, x, job.sets.test[1][:1_000], 4)        # (E, 1000)
        with torch.no_grad():
            layers = vit(data.normalise(job.sets.probe[0], images.mean, images.std)).layers
            domain = distill.domains(vit(x).layers[4].routing.probs, vit.n_tokens)
        both = F.one_hot(layers[4].routing.experts, len(correct)).sum(dim=1).float()    # (T, E)
        rare = both.T @ both < 0.01 * len(both)             # pairs that share < 1 % of the tokens
        stubborn = [torch.full_like(domain, e) for e in range(len(correct))]
        values = (result["test_accuracy"],
                  np.mean([study.expert_similarity(vit.blocks[b - 1].mlp, layers[b].h)
                           for b in vit.moe_blocks]),
                  *colleagues([layers[b].raw for b in vit.moe_blocks]), rare.triu(1).sum(),
                  distill.gate_accuracy(correct, domain),
                  np.mean([distill.gate_accuracy(correct, d) for d in stubborn]))
        for name, value in zip(names, values, strict=True):
            found[name][at, seed] = value
        print(SWEEP[at], seed, *map(float, values), flush=True)
        write("sweep", origin, alpha=SWEEP, epochs=SHORT, **found)


MEASURES = {"keep": keep, "experts": experts, "sweep": sweep}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the numbers that the notebooks show.")
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--runs", default="runs/study/cpu", help="the study's runs at one scale")
    parser.add_argument("--data_dir", default="data", help="where CIFAR-100 lies or is put")
    args = parser.parse_args(argv)
    try:
        MEASURES[args.what](args)
    except (ValueError, OSError) as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
