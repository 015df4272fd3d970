"""threads.py -- how should threads wait for each other on a machine that others use too?

    python notebooks/threads.py run         # about 15 minutes; leave the machine alone meanwhile
    python notebooks/threads.py table

torch's OpenMP threads spin while they wait, as if each had a core. With busy neighbours they take
the cores from the very threads that they wait for. Each setting trains preset tiny for some steps
in a process of its own; the settings take turns, so that a slow minute is slow for all of them.
checkpoint.py sets what was chosen by this table.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROWS = Path(__file__).resolve().parent / "results" / "threads.json"
SETTINGS = {
    "two threads, as torch is": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"},
    **{f"two threads, a spin of {n:,}": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": str(n)}
       for n in (100, 1_000, 10_000, 100_000)},
    "two threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
NEIGHBOURS = {0: (5, 40), 2: (3, 20), 12: (2, 6)}       # how many: (rounds, steps)


def steps(n):
    """The milliseconds of each of n training steps of tgr+mode, preset tiny, after three others."""
    import train
    from data import batches
    flags = "--data synthetic --preset tiny --device cpu --train_images 10000 --out unused"
    _, job = train.plan(train.parse(flags.split()))
    teacher = train.teacher_of(job)
    guide = train.guide_of(teacher, job)
    optimizer = train.torch.optim.AdamW(train.parameter_groups(job.model, guide, 0.05))
    took = []
    for images, targets in batches(job.cfg, job.data, job.sets, epoch=1):
        began = time.perf_counter()
        optimizer.zero_grad()
        sum(train.losses(job.cfg, job.model, guide, images, targets).values()).backward()
        optimizer.step()
        took.append(1000 * (time.perf_counter() - began))
        if len(took) == n + 3:
            return took[3:]


def run():
    from checkpoint import provenance, write
    found = {}
    for neighbours, (rounds, n) in NEIGHBOURS.items():
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                for _ in range(neighbours)]
        try:
            for _ in range(rounds):
                for name, setting in SETTINGS.items():
                    said = subprocess.run([sys.executable, __file__, "steps", str(n)], text=True,
                                          env=os.environ | setting, stdout=subprocess.PIPE,
                                          check=True).stdout
                    took = json.loads(said.splitlines()[-1])
                    found.setdefault(name, {}).setdefault(str(neighbours), []).extend(took)
                    print(f"{neighbours:2} neighbours, {name}: {statistics.median(took):.0f} ms, "
                          f"worst {max(took):.0f} ms", flush=True)
        finally:
            for process in busy:
                process.kill()
    about = {"command": "python notebooks/threads.py run", **provenance("cpu")}
    write(ROWS, json.dumps({**about, "ms": found}) + "\n")


def table():
    found = json.loads(ROWS.read_text(encoding="utf-8"))["ms"]
    print("| a step, ms: median (worst) | " + " | ".join(
        f"{n} neighbours" if n else "idle" for n in NEIGHBOURS) + " |")
    print("|-|" + "-|" * len(NEIGHBOURS))
    for name, cases in found.items():
        cells = (f"{statistics.median(ms):,.0f} ({max(ms):,.0f})" for ms in cases.values())
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["steps"]:
        print(json.dumps(steps(int(sys.argv[2]))))
    else:
        {"run": run, "table": table}[sys.argv[1]]()
