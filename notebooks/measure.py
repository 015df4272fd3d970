"""measure.py -- how are the numbers made that the notebooks show and the study's rows do not hold?

    python notebooks/measure.py keep --runs runs/study/cpu    what they keep of the study's runs

Every file it writes under notebooks/results/ says which command, seed, commit and device made it.
"""
import argparse
import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
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


MEASURES = {"keep": keep}


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
