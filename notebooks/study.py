"""study.py -- do the papers' findings come back, from scratch on CIFAR-100, beyond chance?

    python notebooks/study.py list                                    what is done, what it takes
    python notebooks/study.py run factors --seed 0                    go on with one block of a grid
    python notebooks/study.py run factors --workers 13 --minutes 9 \
        --how "--device cuda --backend fused --no-compile"            the same runs, on a GPU
    python notebooks/study.py look routing --seed 0                   ask its models again
    python notebooks/study.py report factors                          tables, verdicts, figures
    python notebooks/study.py report --page notebooks/RESULTS.md      write those of all grids there
    python notebooks/study.py report --front README.md                what guidance guides, in short
    python notebooks/study.py report --check README.md                is it what the rows say?

decided.py holds what was decided before any run, controls.py what an arm does that no flag of
train.py says, probes.py what a trained model is asked. A run becomes one row of
notebooks/results/GRID.jsonl: the result.json of train.py and the answers to probes.closing_look.

A block is all arms of one seed, made at one commit on one machine, with a teacher of its own. Runs
are compared within their block alone: the same flags on another machine, or at a later commit, end
up to 0.6 points away, which is as much as some effects. So run a block from a clone of its commit.
"""
import argparse
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint

import report
import train
from notebooks import decided, lite0, remedies
from notebooks.controls import LOSSES, SETUPS, TEACHERS, guide_by
from notebooks.decided import ACC, ARMS, FIRST, GRIDS, METRICS, SCALES, STEADY, VAL
from notebooks.ideas import IDEAS
from notebooks.probes import MOVED, closing_look, what_experts_tell

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "notebooks" / "results", ROOT / "notebooks" / "figures"
PAGE = ROOT / "notebooks" / "RESULTS.md"

# --- rows, and whose they are ---


def read_rows():
    """Every row of the study. A rerun in its block, or in the first edition, replaces the first."""
    found = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for row in report.read_lines(path):
            if "arm" in row:
                where = row["grid"] if "machine" in row else None
                found[where, row["scale"], row["arm"], decided.block(row)] = row
    return list(found.values())


def rows_of(grid, scale):
    """The grid's rows at one scale, arm by arm and seed by seed."""
    arms = GRIDS[grid].arms if grid in GRIDS else FIRST[grid]
    if grid in GRIDS:
        rows = [row for row in read_rows() if "machine" in row and row["grid"] == grid
                and row["arm"] in arms and row["seed"] in GRIDS[grid].seeds]
    else:                                                   # whose grids shared their arms' rows
        rows = [row for row in read_rows() if "machine" not in row and row["arm"] in arms
                and row["seed"] < arms[row["arm"]][0]]
    return alike([row for row in rows if row["scale"] == scale], list(arms))


def alike(rows, arms):
    """The rows in the order of `arms`; all runs of an arm must differ in their seed alone."""
    settings = {}
    for row in rows:
        # an arm says who teaches; the teacher's file lies in a folder named after seed and commit
        asked = report.experiment(row) | {"teacher": None}, row["data_md5"]
        if settings.setdefault(row["arm"], asked) != asked:
            raise ValueError(f"scale {row['scale']}: {row['arm']}, seed {row['seed']} was run with "
                             f"other settings than the seed before: its config says which")
    return sorted(rows, key=lambda row: (arms.index(row["arm"]), row["seed"]))


def append(path, row):
    """Add a row in a single write, so that rows of processes side by side stay whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        if os.write(file, line) != len(line):
            raise OSError(f"{path}: the disk is full and the last line is torn: delete it")
    finally:
        os.close(file)


def unclean():
    """The files of code that differ from their commit; rows, figures and texts may differ."""
    if not (ROOT / ".git").exists():
        return "" if checkpoint.commit() else "everything (no git here, and no GUIDED_MOE_COMMIT)"
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".",
              ":!notebooks/results", ":!notebooks/figures", ":!*.md"]
    found = subprocess.run(status, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    return ", ".join(line[3:] for line in found.stdout.splitlines())


def commit_of_row(dirty):
    """HEAD, with "-dirty" if the code differs from it: rows that were just added are no code."""
    commit = checkpoint.commit() or ""
    return commit.removesuffix("-dirty") + ("-dirty" if dirty and unclean() else "")


def machine(scale, how=""):
    """Which machine this is: its name and its processor, or the GPU that is asked for."""
    if train.parse(shlex.split(f"{SCALES[scale]} {how}"))["device"].startswith("cuda"):
        return f"{platform.node()}, {checkpoint.describe('cuda')}"
    cpu = Path("/proc/cpuinfo")                             # where there is Linux
    told = re.search("model name.*: (.*)", cpu.read_text()) if cpu.exists() else None
    return f"{platform.node()}, {told[1] if told else platform.processor()}"


# --- one run ---


def flags_of(arm, scale):
    """An arm's flags, its words in capitals replaced by what they stand for at the scale."""
    flags = ARMS[arm].flags
    for word, value in decided.WORDS[scale].items():
        if word in flags and value is None:
            raise ValueError(f"scale {scale} has no {word} yet, which {arm} needs: decided.py says "
                             f"how it is chosen")
        flags = flags.replace(word, str(value))
    return flags


def prepare(flags, folder, data_dir, seed=None, teacher=None, change=None):
    """train.py's plan for these flags; a run that has a checkpoint goes on from it."""
    argv = [*shlex.split(flags), "--out", str(folder), "--data_dir", data_dir, "--resume"]
    argv += ["--seed", str(seed)] if seed is not None else []
    argv += ["--teacher", str(teacher)] if teacher else []
    return train.plan(train.parse(argv), **{"change": change} if change else {})


def teachers_flags(scale, val=False):
    """What a block's dense teacher is trained by: no model has seen images that are held out."""
    return f"{decided.TEACHER[scale]} {VAL}" if val else decided.TEACHER[scale]


def train_teacher(flags, scale, seed, folder, data_dir, how=""):
    """The checkpoint of a model that a block's students learn from, its dense teacher or the V-MoE
    of Grouter, by flags of train.py; whoever comes first trains it, the others wait."""
    with checkpoint.claim(folder, wait_for="to train the teacher"):
        flags = f"{SCALES[scale]} {flags} {how}"
        _, job = prepare(flags, folder, data_dir, decided.TEACHERS_SEED + seed)
        train.fit(job, command=f"python notebooks/study.py run GRID --scale {scale} --seed {seed}")
    return folder / checkpoint.NAME


def block_folder(grid, scale, seed, commit, out):
    return Path(out, scale, grid, f"seed{seed}-{commit[:8]}")


def plan_one(arm, seed, scale, block, data_dir, how=""):
    """An arm's (job, guide or None, own losses or None), its teachers trained where they are not.

    A run in the folder `block` that has ended is only read.
    """
    _, control, teacher, placed = ARMS[arm]
    flags, dense, trained = flags_of(arm, scale), None, []
    taught = "tgr" in flags or control in LOSSES
    if taught and TEACHERS[teacher][0] is TEACHERS["dense"][0]:
        dense = train_teacher(teachers_flags(scale, VAL in flags), scale, seed, block / "teacher",
                              data_dir, how)
    if control == "grouter":
        other = train_teacher(flags_of("moe-k1", scale), scale, seed, block / "other", data_dir,
                              how)
        trained = [train.load_model(other, device="cpu")[0]]
    change = (remedies.remedy("placed", *placed) if placed else
              remedies.remedy(control, *trained) if control in remedies.LAYERS else None)
    planned, job = prepare(f"{SCALES[scale]} {flags} {how}", block / arm, data_dir, seed, dense,
                           change)
    guide = None
    if taught:                         # a method that needs no teacher is planned without one
        guide = guide_by(teacher, job, dense and (planned or train.teacher_of(job)))
    if control in SETUPS:
        SETUPS[control](job, guide)
    if guide and job.ended:
        guide.routers.load_state_dict(job.state["routers"])
    losses = dict.fromkeys(remedies.REMEDIES, remedies.losses) | LOSSES | IDEAS
    return job, guide, losses.get(control)


def answers(grid, arm, job, guide):
    """What probes.closing_look says of a trained arm of a grid."""
    return closing_look(job, guide, ARMS[arm].control, MOVED * (grid in ("routing", "ideas")))


def train_one(grid, arm, seed, scale, out, data_dir, dirty=False, how=""):
    """Train one arm with one seed and append its row, unless it is there.

    `how` are flags of train.py that say how it is computed, as the device, and not what.
    """
    commit = commit_of_row(dirty)
    block = block_folder(grid, scale, seed, commit, out)
    with checkpoint.claim(block / arm, wait_for="to train the same arm and seed"):
        if (arm, seed) not in to_do(grid, scale):
            return
        job, guide, loss = plan_one(arm, seed, scale, block, data_dir, how)
        command = f"python notebooks/study.py run {grid} --scale {scale} --seed {seed} --only {arm}"
        command += f" --how={shlex.quote(how)}" if how else ""
        result = train.fit(job, guide, command, loss)
        row = {"grid": grid, "arm": arm, "scale": scale, "machine": machine(scale, how)} | result
        began = time.monotonic()                           # an interrupted run's seconds add up
        row |= answers(grid, arm, job, guide)
        row["consistency"] = {name: short(value) for name, value in row["consistency"].items()}
        row["wall_seconds"] = result["seconds"] + time.monotonic() - began
        row["terms"] = report.read_lines(block / arm / "metrics.jsonl")[-1]["terms"]
        row["commit"] = commit
        append(RESULTS / f"{grid}.jsonl", row)


def look(args):
    """Ask the trained models of a block again, where probes.py has been mended since.

    Their rows keep what training wrote, and note the commit that looked.
    """
    refuse_uncommitted(args.dirty)
    path, scale = RESULTS / f"{args.grid}.jsonl", args.scale or GRIDS[args.grid].scale
    rows = [row for row in rows_of(args.grid, scale) if row["seed"] == args.seed]
    if not rows:
        raise ValueError(f"{args.grid}, scale {scale}: no row of seed {args.seed}, run it first")
    for row in rows:
        block = block_folder(args.grid, scale, args.seed, row["commit"], args.out)
        if not (block / row["arm"] / checkpoint.NAME).exists():
            raise ValueError(f"{block} has no trained {row['arm']}: put or link the block's folder "
                             f"there, from where it was trained on {row['machine']}")
        job, guide, _ = plan_one(row["arm"], args.seed, scale, block, args.data_dir)
        commit = commit_of_row(args.dirty)
        row.pop("experts_looked_at", None)
        if args.experts:                                   # all else was asked when it was
            row |= what_experts_tell(job, ARMS[row["arm"]].control) | {"experts_looked_at": commit}
        else:
            row |= answers(args.grid, row["arm"], job, guide) | {"looked_at": commit}
        append(path, row)                                  # the last of two rows counts
        print(f"{row['arm']}, seed {args.seed}: asked again")
    kept = {(r["scale"], r["arm"], decided.block(r)): r for r in report.read_lines(path)}
    checkpoint.write(path, "".join(json.dumps(row) + "\n" for row in kept.values()))


def short(value):
    """Its numbers with four digits: the curves are most of a row, and rows are kept for good."""
    if isinstance(value, list):
        return [round(v, 4) if isinstance(v, float) else short(v) for v in value]
    return value


# --- many runs ---


def to_do(grid, scale, only=None, seed=None):
    """(arm, seed) of runs without a row, block by block."""
    have = {(r["arm"], r["seed"]) for r in rows_of(grid, scale)}
    return [(arm, s) for s in GRIDS[grid].seeds if seed in (None, s)
            for arm in GRIDS[grid].arms
            if (only is None or arm in only) and (arm, s) not in have]


def refuse_half_a_block(grid, scale, runs, here):
    """ValueError where a block that lacks runs was begun elsewhere than `here`, (commit, machine).
    """
    for row in rows_of(grid, scale):
        if row["seed"] in {seed for _, seed in runs} and (row["commit"], row["machine"]) != here:
            raise ValueError(
                f"{grid}, seed {row['seed']} was begun at commit {row['commit'][:12]} on "
                f"{row['machine']}: go on there, or begin it again here with --anew --seed "
                f"{row['seed']}, which drops its rows")


def drop_block(grid, scale, seed):
    """Take a block's rows out of the results, before it is begun again."""
    path = RESULTS / f"{grid}.jsonl"
    if path.exists():
        kept = [row for row in report.read_lines(path)
                if (row["scale"], row["seed"]) != (scale, seed)]
        checkpoint.write(path, "".join(json.dumps(row) + "\n" for row in kept))


def schedule(runs, start, workers, minutes=None, took=(), now=time.monotonic, sleep=time.sleep,
             asked=()):
    """Keep `workers` runs going and return those that failed.

    start(run) gives a Popen. With `minutes`, no run starts that would end too late if it took as
    long as the median run, and what still runs at the end, or when `asked` is no longer empty, is
    interrupted. It goes on from its checkpoint in the next call, and so do runs that are longer
    than a call.
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
            if left <= 0 or asked:
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


def refuse_uncommitted(dirty):
    if not dirty and (changed := unclean()):
        raise ValueError(f"a row must name its commit, and these are not committed: {changed}; "
                         f"commit them, or give --dirty for a trial")


def run(args):
    grid, scale = args.grid, args.scale or GRIDS[args.grid].scale
    if args.only and (unknown := set(args.only) - set(GRIDS[grid].arms)):
        raise ValueError(f"{grid} has no arm {', '.join(sorted(unknown))}: "
                         f"choose from {', '.join(GRIDS[grid].arms)}")
    refuse_uncommitted(args.dirty)
    if args.seed is not None and args.seed not in (seeds := GRIDS[grid].seeds):
        raise ValueError(f"{grid} has no seed {args.seed}: choose from {seeds[0]} to {seeds[-1]}")
    if args.anew:
        if args.seed is None:
            raise ValueError("--anew begins one block again: say which with --seed")
        drop_block(grid, scale, args.seed)
    if other := set(train.parse(shlex.split(args.how))) - set(checkpoint.HOW):
        raise ValueError(f"--how says how a run is computed, not what: leave out "
                         f"--{', --'.join(sorted(other))}")
    runs = to_do(grid, scale, args.only, args.seed)
    refuse_half_a_block(grid, scale, runs, (commit_of_row(args.dirty), machine(scale, args.how)))
    for arm, _ in runs:                                     # speak up before anything is trained
        flags_of(arm, scale)
    if any(ARMS[arm].teacher == "lite0" for arm, _ in runs):
        lite0.published()
    print(f"{grid}, scale {scale}: {len(runs)} runs to do")
    if args.here:
        for arm, seed in runs:
            train_one(grid, arm, seed, scale, args.out, args.data_dir, args.dirty, args.how)
        return 0

    def log_of(arm, seed):
        return Path(args.out, scale, grid, f"{arm}-seed{seed}.txt")

    def start(run):
        arm, seed = run
        log = log_of(arm, seed)
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{time.strftime('%H:%M:%S')} {arm}, seed {seed}: {log}", flush=True)
        words = ["run", grid, "--only", arm, "--seed", str(seed), "--scale", scale,
                 "--out", args.out, "--data_dir", args.data_dir, f"--how={args.how}", "--here"]
        with open(log, "a", encoding="utf-8") as file:
            return subprocess.Popen(
                [sys.executable, __file__, *words, *(["--dirty"] if args.dirty else [])],
                stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})

    took = [r["wall_seconds"] for r in rows_of(grid, scale)]
    with checkpoint.until_asked_to_stop("interrupting the runs") as asked:
        failed = schedule(runs, start, args.workers or decided.WORKERS[scale], args.minutes,
                          took, asked=asked)
    if asked:
        raise checkpoint.Stopped(asked[0])
    for arm, seed in failed:
        said = log_of(arm, seed).read_text(encoding="utf-8", errors="replace").splitlines() or ["?"]
        print(f"{arm}, seed {seed}: {said[-1]}", file=sys.stderr)
    print(f"{len(to_do(grid, scale, args.only, args.seed))} runs are left")
    return int(bool(failed))


def overview():
    """Grids and arms, the runs done and to do, and the hours that the rest will take."""
    lines = []
    for (grid, its), scale in itertools.product(GRIDS.items(), (None, "gpu")):
        scale = scale or its.scale
        rows, todo = rows_of(grid, scale), to_do(grid, scale)
        took, workers = [row["wall_seconds"] for row in rows], decided.WORKERS[scale]
        hours = "hours unknown: no run yet" if not took else (
            f"about {len(todo) * statistics.mean(took) / 3600 / workers:.1f} hours with {workers} "
            f"workers")
        lines.append(f"{grid}, scale {scale}: {its.blocks * len(its.arms) - len(todo)} done, "
                     f"{len(todo)} to do" + (f", {hours}" if todo else ""))
        for arm in its.arms:
            left = sum(a == arm for a, _ in todo)
            lines.append(f"    {arm:<36}{its.blocks - left} of {its.blocks} blocks")
    return "\n".join(lines)


# --- the report ---


def arms_of(grid):
    """{arm: the arm that it is compared with, or None} of a grid of either edition."""
    return GRIDS[grid].arms if grid in GRIDS else {arm: to for arm, (_, to) in FIRST[grid].items()}


def arms_table(grid, rows):
    columns = decided.COLUMNS.get(grid, decided.USUAL)
    lines = ["| arm | n | params total / active | MFLOPs | accuracy, points | against | difference "
             f"[95 %] | {' | '.join(columns)} | images/s | seconds |",
             "|-|-|-|-|-|-|-" + len(columns) * "|-" + "|-|-|"]
    for arm, other in arms_of(grid).items():
        some = [row for row in rows if row["arm"] == arm]
        if not some:
            continue
        pair = decided.contrast(rows, ACC, (arm,), (other,)) if other else decided.interval([])
        lines.append("| " + " | ".join([
            arm, str(len(some)),
            f"{some[0]['params_total'] / 1e6:.2f} / {some[0]['params_active'] / 1e6:.2f} M",
            f"{some[0]['flops_per_image'] / 1e6:.1f}",
            report.pooled([METRICS[ACC](row) for row in some]), other or "–", decided.signed(pair),
            *(report.pooled([METRICS[name](row) for row in some]) for name in columns),
            *(on_each_device(rows, some, name) for name in ("images_per_second", "seconds"))])
            + " |")
    return "\n".join(lines)


def on_each_device(rows, some, name):
    """The mean of `some` rows on each device of all `rows`, in the order of `recipe`."""
    return " / ".join(
        report.show(report.mean(row[name] for row in some if row["device"] == device), "{:,.0f}")
        for device in sorted({row["device"] for row in rows}))


def contrast_of(h):
    return " + ".join(h.plus) + "".join(f" − {arm}" for arm in h.minus)


def estimates(rows, h, e, drawn):
    """A hypothesis' cells: its estimate `e` and, if any row is `drawn` from, that over images too.
    """
    cells = [decided.signed(e, 2 if h.metric.startswith(ACC) else 3)]
    if drawn:
        both = decided.over_images(rows, h.plus, h.minus) if h.metric == ACC else None
        cells.append(f"[{both[0]:+.2f}, {both[1]:+.2f}]" if both else "–")
    return [*cells, str(e.n)]


def hypotheses_table(grid, rows):
    """What was expected of a grid and what came; the last interval draws test images anew too."""
    drawn = any("hits" in row for row in rows)
    lines = ["| expected | by | metric | contrast | at least | estimate [95 %] "
             + "| over images too " * drawn + "| n | p, Holm | verdict |",
             "|-|-|-|-|-|-|-|-|-|" + "-|" * drawn]
    judged = decided.judge(grid, rows)
    for h, (e, p, verdict) in judged.items():
        least = f"{h.least:g}" if h.margin is None else f"within ±{h.margin:g}"
        cells = [h.claim, h.source, h.metric, contrast_of(h), least,
                 *estimates(rows, h, e, drawn)]
        lines.append(f"| {' | '.join([*cells, shown(p), verdict])} |")
    if least := decided.detectable(judged):
        lines.append(f"\nAt the median standard error of these contrasts in accuracy, the first is "
                     f"met from {least:.2f} points on, and a true difference of that size every "
                     f"second time.")
    if best := decided.attainable(judged):
        lines.append(f"\nWith means of exactly 0, equivalence would have had p = "
                     f"{', '.join(map(shown, best))} before Holm's correction.")
    return "\n".join(lines)


def afterwards(grid, rows):
    """A table in a list, or an empty list: what was asked when rows were known."""
    drawn = any("hits" in row for row in rows)
    lines = []
    for h in (h for h in decided.AFTERWARDS if h.grid == grid):
        e = decided.contrast(rows, h.metric, h.plus, h.minus)
        lines.append(f"| {h.claim} | {h.metric} | {contrast_of(h)} | "
                     f"{' | '.join(estimates(rows, h, e, drawn))} |")
    return [] if not lines else ["\n".join([
        "Asked after the first rows were seen, so without p and verdict:", "",
        "| asked | metric | contrast | estimate [95 %] " + "| over images too " * drawn + "| n |",
        "|-|-|-|-|-|" + "-|" * drawn, *lines])]


def shown(p):
    """A p-value to two digits; – where there is none."""
    return "–" if p is None else "< .001" if p < 0.001 else f"{p:.2g}"


# router and features guided or free: (title, the grid that has the four cells, how they end)
CROSSED = [("by a dense teacher", "factors", ""), ("by Lite0", "factors", "-lite0"),
           ("experts in blocks 2, 4, 6", "placement", ""),
           ("experts in the paper's blocks", "placement", "-late")]


def factors(title, rows, arms):
    """The four models of which router and features are guided or free, and what each factor does.

    `arms` are those of decided.CELLS. Empty unless three blocks have all of them.
    """
    rows = alike(decided.complete(rows, arms), list(arms))
    blocks = {decided.block(row) for row in rows}
    if len(blocks) < 3:
        return ""
    none, router, features, both = arms
    lines = [f"| accuracy, %; {decided.HALF} | features free | features guided |", "|-|-|-|"]
    for name, pair in (("free", (none, features)), ("guided", (router, both))):
        cells = [[row for row in rows if row["arm"] == arm] for arm in pair]
        lines.append(f"| router {name} | " + " | ".join(
            f"{report.pooled([METRICS[ACC](row) for row in some])}; "
            f"{report.pooled([METRICS[decided.HALF](row) for row in some])}" for some in cells)
            + " |")
    lines += ["", "| effect | on accuracy, points [95 %] | on the agreement [95 %] |", "|-|-|-|"]
    for name, (plus, minus) in decided.effects(arms).items():
        cells = (decided.signed(decided.contrast(rows, metric, plus, minus), digits)
                 for metric, digits in ((ACC, 2), (decided.HALF, 3)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    last = decided.contrast(rows, ACC, (both,), (features,))
    p = decided.equivalence(last, decided.MARGIN)
    same = "is" if p < 0.05 else "is not"
    return "\n\n".join([
        f"#### what does guidance guide? {title}", "\n".join(lines),
        f"{len(blocks)} seeds that all four have; not corrected for the number of intervals. That "
        f"TGR and guided features alone are equally accurate within {decided.MARGIN} points {same} "
        f"established (two one-sided tests, p = {shown(p)}). A guided router differs from V-MoE's "
        f"in more than the guidance: it has no load and entropy losses of its own."])


def unpaired(grid, rows):
    """A sentence on the runs that no difference uses; empty where all are used.

    An arm that has not run has no difference, and so leaves no run out.
    """
    lost = {}
    for arm, other in arms_of(grid).items():
        if other and (pair := decided.contrast(rows, ACC, (arm,), (other,))).n:
            for name, seed in pair.left_out:
                lost.setdefault(f"from {arm} − {other}: {name}, seed ", []).append(str(seed))
    return "" if not lost else " Left out for want of a partner: " + "; ".join(
        where + ", ".join(seeds) for where, seeds in lost.items()) + "."


def recipe(rows, scale):
    """What these runs were trained and tested on, their teacher, and where they ran."""
    first = rows[0]
    taught = [row["teacher_accuracy"] for row in rows if row["teacher_accuracy"] is not None
              and row["arm"] != "tgr-k1-random-teacher" and "untrained" not in row["arm"]]
    teacher = (f"dense teacher (`{teachers_flags(scale, report.exam(first) == 'validation')}`): "
               f"{report.mean(taught):.1%}; " if taught else "")
    return (f"{first['data']} (md5 {first['data_md5']}), {first['labels']} labels, "
            f"{first['train_images']:,} training and {first['test_images']:,} {report.exam(first)} "
            f"images, preset {first['preset']}; epochs: {first['epochs']}; {teacher}device: "
            f"{all_of(rows, lambda r: r['device'])}; torch "
            f"{all_of(rows, lambda r: r['versions']['torch'])}")


def all_of(rows, value):
    return ", ".join(sorted({str(value(row)) for row in rows}))


# how to read the tables of all grids
RULE = (
    "T: the TGR-MoE paper, M: the MoDE paper, R: a remedy's own, ours: a control. Met: the "
    "estimate is at least the threshold, its interval above 0 (or above a threshold below 0) and "
    "p, corrected by Holm for the contrasts of its table, below .05. Not met: the interval, which "
    "is not corrected, is below the threshold. \"Within\" is met if two one-sided tests say so, "
    "and not met if the interval lies beyond. What compares nothing has no p. Below three seeds "
    "there is no verdict, and before the last announced block it is one so far.")
LEGEND = (
    f"Mean ± sample standard deviation over n seeds, 95 % t-intervals. MFLOPs are an image's, "
    f"forward, in training; images/s and seconds are for each device apart. Agreement, load, "
    f"gates, similarity, cosines and who follows the teacher are means over all tokens of "
    f"{train.Config.probe_images} fixed training images and over the sparse blocks; what patches "
    f"leave the last block with is read by nobody.\n\n"
    f"{RULE} Over images too: as if the images had been drawn anew as well.")


def section(grid, scale, page=PAGE):
    """All that one grid's rows at one scale say, as markdown for `page`; empty without rows."""
    rows = rows_of(grid, scale)
    if not any(row["grid"] == grid for row in rows):       # shared arms alone are no grid
        return ""
    if grid in GRIDS:
        more = ", which has seen every training image that is not held out" * (
            "--train_images 0" in decided.TEACHER[scale])
        whose, over = ((f", which has a dense teacher of its own{more}", " and dense teachers")
                       if any(row["teacher_accuracy"] is not None for row in rows) else ("", ""))
        made = (f"{len({decided.block(row) for row in rows})} of {GRIDS[grid].blocks} blocks, on "
                f"{all_of(rows, lambda row: row['machine'])}. Differences are taken within a "
                f"block{whose}: intervals are over seeds{over}, for one Lite0, one hash, one set "
                f"of training and one of {report.exam(rows[0])} images.")
        command = f"`python notebooks/study.py run {grid} --scale {scale}`"
    else:
        some = {arm: (sum(row["arm"] == arm for row in rows), n)
                for arm, (n, _) in FIRST[grid].items()}
        lacking = ", ".join(f"{arm} {n} of {of}" for arm, (n, of) in some.items() if n < of)
        made = ("Differences are paired by seed, across commits and perhaps machines; intervals "
                "are over seeds alone, for one teacher, one set of training images and one test "
                "set." + f" Announced and not completed, in seeds: {lacking}." * bool(lacking))
        command = f"The first edition: `python notebooks/study.py run {grid}` at those commits"
    asked = "".join(
        f"; {what} at {all_of(again, lambda r, name=name: r[name])}" for name, what in (
            ("looked_at", "asked again"), ("experts_looked_at", "what experts tell, asked"))
        if (again := [row for row in rows if name in row]))
    caption = " ".join(filter(None, (
        f"{recipe(rows, scale)}; commit {all_of(rows, lambda r: r['commit'] or 'unknown')}{asked}.",
        made, shared(grid, rows), decided.REMARKS.get(grid))))
    pictures = "\n".join(f"![{grid}, {name}]({link(path, page)})"
                         for name, path in picture_paths(grid, scale, rows).items())
    its = [factors(title, rows, tuple(decided.cells(grid, mark)))
           for title, of, mark in CROSSED if of == grid]
    return "\n\n".join([
        f"### {grid}, scale {scale}", command, arms_table(grid, rows), caption
        + unpaired(grid, rows), *filter(None, its), hypotheses_table(grid, rows),
        *afterwards(grid, rows), *unrelated(grid, rows), pictures])


def shared(grid, rows):
    """Which of a grid's runs do others have too, to the last test image? They are no second
    evidence."""
    mine, found = {row["hits"]: row for row in rows if "hits" in row}, {}
    for other in read_rows():
        if other.get("grid") != grid and (row := mine.get(other.get("hits"))):
            found.setdefault((row["arm"], other["grid"]), []).append(row["seed"])
    return "" if not found else "Of the same flags and seeds, and so the same runs: " + "; ".join(
        f"{arm} of {other}, seeds {', '.join(map(str, sorted(seeds)))}"
        for (arm, other), seeds in sorted(found.items())) + "."


# the arm that is tested by a router that it was not trained with
ASTRAY = "tgr-k1-oracle-alone"


def unrelated(grid, rows):
    """A table in a list, or an empty list: does any metric of the arms foretell another?"""
    lines, rho = [], "{:+.2f} [{:+.2f}, {:+.2f}]"
    before = decided.UNRELATED.get(grid, ())
    for cause, effect in (*before, *decided.RANKED.get(grid, ())):
        if found := decided.rank_correlation(rows, cause, effect):
            _, low, high, arms, n = found
            others = [r for r in rows if r["arm"] != ASTRAY]
            fewer = decided.rank_correlation(others, cause, effect)
            lines.append(" | ".join([
                f"| {effect}", cause, rho.format(*found), rho.format(*fewer) if fewer else "–",
                str(arms), str(n),
                *(f"{decided.reliability(others, name):.2f}" for name in (effect, cause)),
                f"{'' if low <= 0 <= high else 'not '}as expected |" if (cause, effect) in before
                else "asked afterwards |"]))
    return [] if not lines else ["\n".join([
        "Expected of the arms together: none of two metrics foretells one of two others.", "",
        "| of | by | Spearman's rho of the arms' means [95 %] | without the teacher's dispatch "
        "| arms | n | reliability: of | by | verdict |", "|-|-|-|-|-|-|-|-|-|", *lines, "",
        "As expected: the interval contains 0. That shows no relation and excludes none: every rho "
        "in it is compatible with the rows. Blocks alone are drawn anew, so it is about these arms "
        "and not about remedies at large, and they are not corrected for their number. "
        "Reliability is the share of the variance of the arms' means that is no noise; where it is "
        "low, any rho is pulled towards 0. The model that the teacher dispatches is tested astray, "
        "by its own router; it is left out of the reliabilities too."])]


def link(path, page):
    return Path(os.path.relpath(path, Path(page).resolve().parent)).as_posix()


def may_change(row):
    """Has a token one expert, unlike under expert choice, that may change, unlike under a hash?"""
    return METRICS[STEADY](row) not in (None, 1)


def picture_paths(grid, scale, rows):
    names = ["differences", *["crossed"] * bool(crossed_in(grid, rows)),
             *["agreement"] * any(map(may_change, rows)),
             *["alpha"] * (grid in ("alpha", "mutual"))]
    return {name: FIGURES / f"study-{scale}-{grid}-{name}.png" for name in names}


def plot_differences(grid, rows):
    """A forest plot: every arm's accuracy minus that of the arm it is compared with."""
    found = {f"{arm} − {other}": decided.contrast(rows, ACC, (arm,), (other,))
             for arm, other in arms_of(grid).items() if other}
    found = {name: e for name, e in found.items() if e.mean is not None}
    told = [e for e in found.values() if e.n >= 3]          # as for a verdict
    sure = sum(e.low > 0 or e.high < 0 for e in told)
    title = (f"{sure} of {len(told)} differences in accuracy have an interval without 0"
             if told else "Fewer than three blocks: no verdict yet")
    fig, axes = report.sheet(title, 1, 1, 8, 1.4 + 0.35 * len(found))
    for y, e in enumerate(found.values()):
        if e.low is not None:
            axes[0, 0].plot([e.low, e.high], [y, y], color=report.COLOURS[0], lw=2)
        axes[0, 0].plot(e.mean, y, "o", color=report.COLOURS[0])
    axes[0, 0].axvline(0, color="black", lw=1)
    axes[0, 0].set_yticks(range(len(found)), [f"{name} (n={e.n})" for name, e in found.items()])
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_xlabel(f"points of {report.exam(rows[0])} accuracy, paired by seed, 95 % "
                          f"interval", loc="right")         # for long names leave little room
    axes[0, 0].grid(axis="x", alpha=0.25)
    return fig


def interaction(axis, rows, metric, cells):
    """Draw four models of two crossed factors: a ring for each block, a line through the means."""
    none, router, features, both = cells
    for pair, name, style, colour in (((none, features), "router free", "o--", report.COLOURS[0]),
                                      ((router, both), "router guided", "s-", report.COLOURS[3])):
        each = [[METRICS[metric](r) for r in rows if r["arm"] == arm] for arm in pair]
        axis.plot([statistics.fmean(values) for values in each], style[1:], color=colour, lw=2)
        for at, values in enumerate(each):
            axis.plot([at] * len(values), values, style[0], ms=7, mfc="none", mew=1.5, color=colour)
        axis.plot([], [], style, color=colour, mfc="none", label=name)
    axis.set(xlim=(-0.3, 1.3), xticks=(0, 1), xticklabels=("features free", "features guided"))


def crossed_in(grid, rows):
    """{setting: (the rows of the blocks that have all four models, the models)} of a grid."""
    found = {}
    for title, its, mark in CROSSED:
        if its == grid and (some := decided.complete(rows, four := decided.cells(grid, mark))):
            found[title] = some, four
    return found


def plot_crossed(grid, rows):
    """Accuracy and settled tokens, with router and features guided or free, in every setting."""
    settings = crossed_in(grid, rows)
    gains = [decided.contrast(some, ACC, (arms[at],), arms[:1])
             for at in (2, 1) for some, arms in settings.values()]
    fig, axes = report.sheet(
        "Fewer than three blocks: no verdict yet" if min(e.n for e in gains) < 3 else
        "Points above V-MoE{}: features alone {}; routers alone {}".format(
            ", left and right" * (len(settings) == 2), *(
                ", ".join(f"{e.mean:+.1f}" for e in some)
                for some in (gains[:len(settings)], gains[len(settings):]))),
        2, len(settings), 4.5 * len(settings), 7, sharey="row")
    for column, (setting, (some, arms)) in zip(axes.T, settings.items(), strict=True):
        for axis, metric in zip(column, (ACC, decided.HALF), strict=True):
            interaction(axis, some, metric, arms)
        column[0].set_title(f"{setting} (n={len({decided.block(r) for r in some})})")
    axes[0, 0].set_ylabel(f"{report.exam(rows[0])} accuracy, %")
    axes[1, 0].set_ylabel("settled at half-time")
    axes[0, 0].legend(loc="upper left")
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
            e = decided.interval([v for v in values if v is not None])
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
             "crossed": lambda: plot_crossed(grid, rows),
             "agreement": lambda: report.plot_methods(
                 [row for row in rows if may_change(row)], lambda row: row["arm"]),
             "alpha": lambda: plot_alpha(rows)}
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, path in picture_paths(grid, scale, rows).items():
        checkpoint.write(path, report.png(plots[name](), few_colours=True))


# --- what is written between two markers of a file ---


def results(page):
    """Every grid that has rows, the second edition first, and above them a link to each."""
    sections = {(grid, scale): text for grid in (*GRIDS, *FIRST) for scale in SCALES
                if (text := section(grid, scale, page))}
    if not sections:
        return "The study has no rows yet."
    links = [f"[{grid}, scale {scale}](#{grid}-scale-{scale})" for grid, scale in sections]
    old = [row for row in read_rows() if "machine" not in row and row["scale"] == "cpu"]
    again = factors("the first edition", old, tuple(decided.CELLS.values()))
    return "\n\n".join(filter(None, [" · ".join(links), LEGEND, *sections.values(), again]))


# The front page shows one grid, and of it these arms: what they are called there, who teaches them,
# and whether router and features are guided.
FRONT_GRID = "factors"
FRONT = {"dense": ("dense ViT, as wide as one expert", "–", "–"),
         "moe-k1": ("V-MoE", "–", "no / no"),
         "moe-k1-twice": ("V-MoE, twice the epochs", "–", "no / no"),
         **{arm + mark: (model, teacher, guided)
            for mark, teacher in (("", "dense ViT"), ("-lite0", "Lite0, pretrained"))
            for arm, model, guided in (
                ("tgr-k1-router-alone", "router guided alone", "yes / no"),
                ("moe-k1-features-alone", "features guided alone", "no / yes"),
                ("tgr-k1", "TGR", "yes / yes"))}}


def front(page):
    """What does guidance guide, by whose knowledge? A row for each of the models that say it."""
    scale = GRIDS[FRONT_GRID].scale
    rows = decided.complete(rows_of(FRONT_GRID, scale), FRONT)
    if not rows:
        return "The study has no rows yet."
    lines = ["| model | teacher | guided: router / features | test accuracy, % "
             "| against V-MoE [95 %] | settled at half-time |", "|-|-|-|-|-|-|"]
    for arm, (model, teacher, guided) in FRONT.items():
        some = [row for row in rows if row["arm"] == arm]
        against = "–" if arm == "moe-k1" else decided.signed(
            decided.contrast(rows, ACC, (arm,), ("moe-k1",)))
        accuracy, settled = (report.pooled([METRICS[metric](row) for row in some])
                             for metric in (ACC, decided.HALF))
        lines.append(f"| {model} | {teacher} | {guided} | {accuracy} | {against} | {settled} |")
    first = next(row for row in rows if row["arm"] == "moe-k1")
    hidden = round(first["config"]["expert_ratio"] * first["config"]["dim"])
    return "\n".join([*lines, "", (
        f"CIFAR-100, {first['labels']} labels, {first['train_images']:,} training images, "
        f"{first['epochs']} epochs of preset {first['preset']}, K = {first['config']['k']} of "
        f"{first['config']['n_experts']} experts of {hidden} hidden units in every Transformer "
        f"block: of the settings that we "
        f"[searched]({link(ROOT / 'notebooks' / 'regime.py', page)}), the one in which experts "
        f"came nearest to paying. The dense ViT that teaches is wider and learned from the same "
        f"images; Lite0 is an EfficientNet that knows ImageNet. Mean ± sample standard deviation "
        f"over {len({decided.block(row) for row in rows})} of {GRIDS[FRONT_GRID].blocks} announced "
        f"blocks, repetitions of one seed, dense teacher, machine and commit each, within which "
        f"differences are taken. Settled is the share of the tokens of "
        f"{first['config']['probe_images']} training images that half-way through have the expert "
        f"that they will have in the end."),
        "", (
        f"<details><summary>How these rows were made, and what they cannot say</summary>\n\n"
        f"{recipe(rows, scale)}; commit {all_of(rows, lambda r: r['commit'])}. A guided router has "
        f"no load and entropy losses of its own; V-MoE's has. The t-intervals are over blocks, for "
        f"one set of images, and not corrected for their number. All grids, verdicts and figures: "
        f"[{PAGE.name}]({link(PAGE, page)}).\n\n</details>")])


BLOCKS = {"page": ("study", results), "front": ("front", front)}    # option: (marker, its text)


def markers(option):
    name, _ = BLOCKS[option]
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def write(option, path):
    report.put_between(path, *markers(option), lambda: BLOCKS[option][1](path),
                       f"python notebooks/study.py report --{option} {path}")


def disagreement(path):
    """Why a file and the rows disagree, in a sentence; None where they agree."""
    text = Path(path).read_bytes().decode()
    written = [option for option in BLOCKS if markers(option)[0] in text]
    if not written:
        return f"{path} has no markers of the study: {' or '.join(markers(o)[0] for o in BLOCKS)}"
    for option in written:
        _, between, _ = report.cut(path, *markers(option))
        if between.strip().rpartition("\n\nWritten by")[0] != BLOCKS[option][1](path):
            return (f"{path} is not what the rows say: run python notebooks/study.py report "
                    f"--{option} {path}")
    return None


def tell(args):
    if args.check:
        if wrong := disagreement(args.check):
            raise ValueError(wrong)
    elif args.front:
        write("front", args.front)
    else:
        grids = [args.grid] if args.grid else (*GRIDS, *FIRST)
        for grid, scale in itertools.product(grids, SCALES):
            if text := section(grid, scale):
                draw(grid, scale)
                print(text, end="\n\n")
            else:
                print(f"{grid}, scale {scale}: no rows yet")
        print(LEGEND)
        if args.page:
            write("page", args.page)


# --- the command ---


def main(argv=None):
    parser = argparse.ArgumentParser(description="Do the papers' findings come back?")
    command = parser.add_subparsers(dest="command", required=True)
    command.add_parser("list", help="grids, arms, what is done and to do")
    one = command.add_parser("run", help="go on with a grid, block by block")
    one.add_argument("grid", choices=GRIDS)
    one.add_argument("--scale", choices=SCALES, help="by default the grid's own, without a GPU")
    one.add_argument("--how", default="", metavar="FLAGS",
                     help="flags of train.py on the machine alone: '--device cuda --no-compile'")
    one.add_argument("--workers", type=int, help="runs side by side")
    one.add_argument("--minutes", type=float, help="how long this call may take")
    one.add_argument("--only", type=lambda text: text.split(","), help="these arms: ARM,ARM")
    one.add_argument("--seed", type=int, help="the block of this seed alone")
    one.add_argument("--anew", action="store_true", help="drop the block's rows and begin it again")
    three = command.add_parser("look", help="ask a block's trained models again, by newer probes")
    three.add_argument("grid", choices=GRIDS)
    three.add_argument("--scale", choices=SCALES)
    three.add_argument("--seed", type=int, required=True, help="the block of this seed")
    three.add_argument("--experts", action="store_true", help="only what experts tell of a patch")
    for its in (one, three):
        its.add_argument("--out", default="runs/study", help="where checkpoints and logs go")
        its.add_argument("--data_dir", default="data", help="where CIFAR-100 lies or is put")
        its.add_argument("--dirty", action="store_true", help="a trial: rows without a commit")
    one.add_argument("--here", action="store_true", help="in this process, as a worker does")
    two = command.add_parser("report", help="tables, verdicts and figures from the rows")
    two.add_argument("grid", nargs="?", choices=(*GRIDS, *FIRST))
    two.add_argument("--page", help="write all grids between the study markers of this file")
    two.add_argument("--front", help="only write the short table between this file's front markers")
    two.add_argument("--check", help="only say whether this file is what the rows say")
    checkpoint.printable()
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            print(overview())
        its = {"list": lambda args: 0, "run": run, "look": look, "report": tell}
        return its[args.command](args) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 2
    except (checkpoint.Stopped, KeyboardInterrupt) as stop:
        print("study.py: stopped; the same command goes on", file=sys.stderr)
        return getattr(stop, "exit_code", 130)


if __name__ == "__main__":
    sys.exit(main())
