"""regime.py -- where do experts pay? The search for a setting in which routing can win anything.

    python notebooks/regime.py run --workers 2      # go on with the search, a row per ended run
    python notebooks/regime.py table                # what it found

Guided routing can only pay where routing does, and routing only where experts do. Each setting of
preset tiny on whole CIFAR-100 trains V-MoE (K=1) and its twin of equal active FLOPs: the dense ViT
whose MLPs have the experts' width in the same blocks. All numbers are of the tenth of the training
images that --split val holds out: the test images are not looked at. Sought: V-MoE above its twin
by a point, mean of two seeds, within the two hours that a block of the study may take.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import printable

from notebooks import study

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "notebooks" / "results" / "regime.jsonl"
RECIPE = "--preset tiny --data cifar100 --labels fine --train_images 0 --split val --device cpu"
SEEDS = (0, 1)
ALL, PAPER = "1,2,3,4,5,6", "4,5,6"     # every block; the relative depths of the TGR paper

# (sparse blocks, H / D of an expert, E, epochs, mixed); E None is the dense twin. Narrow layers in
# all blocks come first: in a pilot of six epochs width paid there alone. None of the unmixed
# settings paid, and V-MoE ended at a lower training loss than its twin and at a lower validation
# accuracy: it overfits. So the second half mixes images (mixup 0.8, cutmix 1, as preset small).
SEARCH = [
    *((ALL, ratio, E, 12, False) for ratio in (0.0625, 0.25) for E in (None, 8, 32)),
    *((ALL, ratio, None, 12, False) for ratio in (0.5, 2.0)),   # how much there is to win by width
    *((PAPER, ratio, E, 12, False) for ratio in (0.25, 2.0) for E in (None, 8)),
    *((ALL, ratio, E, 24, False) for ratio in (0.0625, 0.25) for E in (None, 8, 32)),
    *((ALL, 0.25, E, 24, True) for E in (None, 8, 32)),
    *((PAPER, 2.0, E, 12, True) for E in (None, 8, 32)),
    *((ALL, 0.0625, E, 12, True) for E in (None, 8, 32)),
]


def flags(blocks, ratio, E, epochs, mixed, seed):
    method = "--method dense" if E is None else f"--method moe --k 1 --n_experts {E}"
    return (f"{RECIPE} {method} --moe_blocks {blocks} --expert_ratio {ratio} --epochs {epochs} "
            f"--seed {seed}" + mixed * " --mixup 0.8 --cutmix 1.0")


def setting(row):
    """The entry of SEARCH, and the seed, that a row belongs to."""
    c = row["config"]
    E = None if row["method"] == "dense" else c["n_experts"]
    return c["moe_blocks"], c["expert_ratio"], E, c["epochs"], c["cutmix"] > 0, row["seed"]


def rows():
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    return [json.loads(line) for line in lines]


def run(args):
    have = {setting(row) for row in rows()}
    waiting = [(*s, seed) for seed in SEEDS for s in SEARCH if (*s, seed) not in have]
    going = {}
    while waiting or going:
        for s, process in list(going.items()):
            if process.poll() is None:
                continue
            del going[s]
            result = Path(args.out, name(s), "result.json")
            if process.returncode:
                print(f"{name(s)} failed: see its log", file=sys.stderr)
                continue
            row = json.loads(result.read_text(encoding="utf-8"))
            study.append(ROWS, row | {"commit": study.commit_of_row(dirty=True)})
        while waiting and len(going) < args.workers:
            s = waiting.pop(0)
            folder = Path(args.out, name(s))
            folder.mkdir(parents=True, exist_ok=True)
            words = [*flags(*s).split(), "--out", str(folder), "--data_dir", args.data_dir]
            words += ["--resume"] if (folder / "checkpoint.pt").exists() else []
            print(f"{time.strftime('%H:%M:%S')} {name(s)}", flush=True)
            with open(folder / "log.txt", "a", encoding="utf-8") as log:
                going[s] = subprocess.Popen([sys.executable, ROOT / "train.py", *words], cwd=ROOT,
                                            stdout=log, stderr=log,
                                            env=os.environ | {"OMP_NUM_THREADS": "1"})
        time.sleep(1)


def name(s):
    blocks, ratio, E, epochs, mixed, seed = s
    return f"{'dense' if E is None else f'moe-E{E}'}-{blocks.replace(',', '')}-{ratio}-" \
           f"epochs{epochs}{'-mixed' * mixed}-seed{seed}"


def table(args):
    found = {setting(row): row for row in rows()}
    print("| sparse blocks | H / D | epochs | mixed | dense twin | E=8 | E=32 | seconds of a run |")
    print("|-|-|-|-|-|-|-|-|")
    for blocks, ratio, epochs, mixed in dict.fromkeys((b, r, n, m) for b, r, _, n, m in SEARCH):
        cells, seconds = [], []
        for E in (None, 8, 32):
            some = [found[blocks, ratio, E, epochs, mixed, seed] for seed in SEEDS
                    if (blocks, ratio, E, epochs, mixed, seed) in found]
            cells.append(", ".join(f"{100 * row['val_accuracy']:.2f}" for row in some) or "–")
            seconds += [row["seconds"] for row in some]
        spent = f"{min(seconds):.0f} to {max(seconds):.0f}" if seconds else "–"
        print(f"| {blocks} | {ratio:g} | {epochs} | {'yes' if mixed else 'no'} "
              f"| {' | '.join(cells)} | {spent} |")


def main():
    parser = argparse.ArgumentParser(description="Where do experts pay?")
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="runs/regime")
    parser.add_argument("--data_dir", default="data")
    printable()
    args = parser.parse_args()
    {"run": run, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
