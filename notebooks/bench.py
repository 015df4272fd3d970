"""bench.py -- what does a sparse layer cost, beside a dense one and beside everyone else's?

    python notebooks/bench.py                                      # the table, on this machine
    python notebooks/bench.py --threads 1,2 --json notebooks/results/kernels_cpu.json
    python notebooks/bench.py --page PAGE.md notebooks/results/kernels_{cpu,h200}.json
    python notebooks/bench.py notebooks/results/kernels_cpu.json   # which goals are met

One MLP layer, forward and backward, from the same weights, routing and dL/dy for everybody in
contenders.py; whoever is wrong is refused there and not timed. `dense` is a plain MLP of equal
active FLOPs, hidden K*H. Contenders take turns in one process and in a new order each round. Peers
are optional: install them, or put them on PYTHONPATH. Letters as in kernels.py: T tokens, D width,
H hidden, E experts, K per token.
"""
import argparse
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import commit, printable, write

import torch

from notebooks.contenders import PEERS, Skip, check, draw, everybody, kept
from report import put_between

SHAPES = {                                      # images, tokens of an image, D, H
    "tiny": (128, 17, 96, 192), "small": (128, 65, 192, 384),       # the presets of train.py
    "perf": (64, 65, 384, 1536), "perf32k": (512, 64, 384, 1536), "perf64k": (1024, 64, 384, 1536),
}


# --- the clock ---

def on_graph(c, dy):
    """The step as a CUDA graph, which forgives no host sync."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            c.step(dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.outputs = c.step(dy)              # as long as the graph lives, so does its memory
    return graph.replay


def sample(step, on_gpu, steps=10):
    """Milliseconds of one step; on a GPU the mean of a few, so that the queue stays full."""
    if not on_gpu:
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps


def clock(steps, repeats, seconds, on_gpu):
    """name -> a sample per round. A slow one leaves after its seconds, not before round 5."""
    for step in steps.values():
        sample(step, on_gpu)                    # warm-up
    samples = {name: [] for name in steps}
    for done in range(repeats):
        racing = [n for n in steps if done < 5 or sum(samples[n]) < 1e3 * seconds]
        for name in random.sample(racing, len(racing)):
            samples[name].append(sample(steps[name], on_gpu))
    return samples


def others_cpu():
    """CPU seconds that other programs have used so far; None where /proc/stat does not tell."""
    if not Path("/proc/stat").exists():
        return None
    spent = Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]
    user, nice, system, _, _, *interrupts = spent
    ticks = sum(map(int, (user, nice, system, *interrupts)))
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def race(layer, builds, args, absent):
    """Rows of every contender on one layer: checked once, then timed at each number of threads."""
    (T, K), (E, D, H) = layer.chosen.shape, layer.leaves["w_in"].shape
    shape = {"device": layer.dy.device.type, "dtype": str(layer.dy.dtype)[6:],
             "T": T, "D": D, "H": H, "E": E, "K": K}
    rows, ready, steps = {}, {}, {}
    for name, build in builds.items():
        rows[name] = {"backend": name, **shape, "ms": None, "ms_q25": None, "ms_q75": None,
                      "times_dense": None, "bytes_kept_per_token": None, "tflops": None, "n": 0,
                      "error_over_plain": None, "cuda_graph": bool(args.cuda_graph), "note": ""}
        try:
            c = build(layer)
            rows[name] |= {"error_over_plain": check(c, layer), "note": c.note,
                           "bytes_kept_per_token": kept(c) / T}
            steps[name] = on_graph(c, layer.dy) if args.cuda_graph else lambda c=c: c.step(layer.dy)
            ready[name] = c
        except ImportError as error:
            absent[name] = str(error)
            del rows[name]
        except Skip as why:
            rows[name]["note"] = str(why)
        except Exception as error:              # a peer's or a rung's own refusal
            rows[name]["note"] = f"refused: {type(error).__name__}: {error}".splitlines()[0][:160]
    for count in args.threads:
        torch.set_num_threads(count)
        before, start = others_cpu(), time.perf_counter()
        samples = clock(steps, args.repeats, args.seconds, layer.dy.is_cuda)
        others = None if before is None else round(
            (others_cpu() - before) / (time.perf_counter() - start), 2)
        for name, row in rows.items():
            row = {**row, "threads": count, "cores_of_others": others}
            if ms := samples.get(name):
                q25, q50, q75 = statistics.quantiles(ms, n=4, method="inclusive")
                same_round = zip(ms, samples.get("dense", ()), strict=False)
                pairs = [own / theirs for own, theirs in same_round]
                row |= {"ms": q50, "ms_q25": q25, "ms_q75": q75, "n": len(ms),
                        "tflops": 12 * T * K * D * H / q50 / 1e9,
                        "times_dense": statistics.median(pairs) if pairs else None}
            yield row


# --- what is shown: rows, goals, the page's table ---

LAYER = ("device", "dtype", "T", "D", "H")      # rows of one layer share a table of the page
WIDE = "{:<24}{:>9}  {:>19}{:>8}{:>12}{:>9}  {}"


def print_rows(rows):
    """The side-by-side table of one layer, at one number of threads."""
    first = rows[0]
    print("\n" + ", ".join(f"{name}={first[name]}" for name in
                           (*LAYER, "E", "K", "threads", "cores_of_others")))
    print(WIDE.format("", "ms", "quartiles", "x dense", "bytes/token", "TFLOP/s", ""))
    for r in rows:
        if r["ms"] is None:
            print(f"{r['backend']:<24}        –  {r['note']}", flush=True)
            continue
        print(WIDE.format(
            r["backend"], f"{r['ms']:.2f}", f"{r['ms_q25']:.2f} – {r['ms_q75']:.2f}",
            f"{r['times_dense'] or float('nan'):.2f}", f"{r['bytes_kept_per_token']:,.0f}",
            f"{r['tflops']:.2g}", r["note"]), flush=True)


def disturbed(row):
    """Whether others took a tenth of a core while the CPU rows of this layer were timed."""
    return row["device"] == "cpu" and (row["cores_of_others"] or 0) >= 0.1


def over(name, *rivals, field="times_dense"):
    """A ratio of two contenders on the same layer, against the best of the rivals."""
    def ratio(at):
        best = min((at[r][field] for r in rivals if r in at), default=None)
        return at[name][field] / best if name in at and best else None
    return ratio


def lean_bytes(at):
    if "lean" not in at:
        return None
    r = at["lean"]
    size = {"float32": 4}.get(r["dtype"], 2)
    room = (r["D"] + r["K"] * r["H"]) * size + 64 * r["K"]
    return r["bytes_kept_per_token"] / room


FP32 = {"device": "cpu", "dtype": "float32"}
GOALS = [       # what, where, ratio, then the most it may be: must, ambitious, stretch
    *((f"auto / dense, E={E}, {n} thread{'s'[:n - 1]}", FP32 | {"E": E, "threads": n},
       over("auto", "dense"), goal) for (E, n), goal in {
           (8, 1): (1.20, 1.05), (32, 1): (1.40, 1.25),
           (8, 2): (1.30, 1.15), (32, 2): (1.90, 1.60)}.items()),
    ("auto / fastest dropless peer", FP32,
     over("auto", "transformers_eager", "transformers_grouped_mm"), (1.10, 1.00)),
    ("bytes kept: lean / ((D + KH) itemsize + 64 K)", {}, lean_bytes, (1.00,)),
    ("bytes kept: lean / dense, H = 4D", {"D": 384, "H": 1536},
     over("lean", "dense", field="bytes_kept_per_token"), (0.60,)),
    *((f"fused / {rival}", {"device": "cuda", "dtype": "bfloat16", "D": 384},
       over("fused", rival), goal) for rival, goal in (
           ("dense", (1.45, 1.20, 1.05)), ("grouped", (1.00, 0.80, 0.70)),
           ("grouped_compiled", (1.10, 0.90, 0.80)), ("scattermoe", (0.85, 0.67, 0.57)),
           ("liger", (1.00, 0.85, 0.75)))),
    ("330 TFLOP/s / fused's", {"device": "cuda", "T": 65536, "E": 8, "K": 2},
     lambda at: 330 / at["fused"]["tflops"] if "fused" in at else None,
     (1.00, 330 / 400, 330 / 450)),
    ("bytes kept: fused / scattermoe", {"device": "cuda"},
     over("fused", "scattermoe", field="bytes_kept_per_token"), (0.50,)),
    ("error over plain loop's: fused / grouped", {"device": "cuda"},
     over("fused", "grouped", field="error_over_plain"), (1.20,)),
]


def goals(rows):
    """Markdown: each goal against the worst case that was measured and not disturbed."""
    races = {}
    for r in rows:
        if r["ms"] is not None and not disturbed(r):
            case = tuple((name, r[name]) for name in (*LAYER, "E", "K", "threads"))
            races.setdefault(case, {})[r["backend"]] = r
    lines = ["| ratio | must | ambitious | stretch | worst | where | cases | |", "|-" * 8 + "|"]
    for what, where, ratio, limits in GOALS:
        found = [(value, case) for case, at in races.items() if where.items() <= set(case)
                 and (value := ratio(at)) is not None]
        if not found:
            continue
        value, case = max(found)
        met = [name for name, limit in zip(("must", "ambitious", "stretch"), limits, strict=False)
               if value <= limit]
        shown = [f"{limit:.2f}" for limit in limits] + ["–"] * (3 - len(limits))
        place = " ".join(f"{n}={v}" for n, v in case if n in ("T", "D", "E", "K", "threads"))
        within = sum(v <= limits[0] for v, _ in found)
        lines.append(f"| {what} | {' | '.join(shown)} | {value:.2f} | {place} | {within} of "
                     f"{len(found)} within must | {met[-1] + ' met' if met else 'MISSED'} |")
    return "\n".join(lines)


def table(json_path):
    """Markdown for a page: one table per layer, and in words who is slower than dense."""
    record = json.loads(Path(json_path).read_text(encoding="utf-8"))
    env, layers = record["env"], {}
    for r in record["rows"]:
        layers.setdefault(tuple(r[name] for name in LAYER), []).append(r)
    versions = ", ".join(f"{name} {v}" for name, v in env["versions"].items())
    others = max((r["cores_of_others"] for r in record["rows"] if disturbed(r)), default=0)
    busiest = f"†: meanwhile other programs kept up to {others:.1f} cores busy. " if others else ""
    caption = (
        f"{env['device']}; {versions}; commit {env['commit']}; `{env['command']}`. Time, forward "
        f"and backward, over a dense MLP of equal active FLOPs: median over up to {env['repeats']} "
        f"rounds (at least 5) of the ratio within a round"
        + (f", with {' / '.join(map(str, env['threads']))} threads" if len(env["threads"]) > 1 else
           f", with {env['threads'][0]} thread{'s'[:env['threads'][0] - 1]}")
        + ". Bytes: kept for backward per token, parameters apart, at the smallest E. "
        + busiest + "".join(f"{name} was not installed. " for name in env["absent"])).strip()
    return "\n\n".join([*(one_table(rows, env["threads"]) for rows in layers.values()), caption])


def one_table(rows, threads):
    at = {(r["backend"], r["E"], r["K"], r["threads"]): r for r in rows if r["ms"] is not None}
    columns = sorted({(r["E"], r["K"]) for r in rows})
    ks, fewest = sorted({K for _, K in columns}), min(E for E, _ in columns)
    names = list(dict.fromkeys(r["backend"] for r in rows))
    marks = {(r["E"], r["K"]): " †" for r in rows if disturbed(r)}
    notes = {name: {r["note"]: 0 for r in rows if r["backend"] == name and r["note"]}
             for name in names}

    def cell(name, E, K):
        known = [at.get((name, E, K, n)) for n in threads]
        if name == "dense":
            return " / ".join(f"{r['ms']:.1f}" for r in known) + " ms"
        return " / ".join("–" if r is None else f"{r['times_dense']:.2f}" for r in known)

    def kept_at(name, K):
        r = at.get((name, fewest, K, threads[0]))
        return "–" if r is None else f"{r['bytes_kept_per_token']:,.0f}"

    r = rows[0]
    lines = [f"**D={r['D']}, H={r['H']}, T={r['T']:,}** ({r['device']}, {r['dtype']})", "",
             "| | " + " | ".join([*(f"E={E} K={K}{marks.get((E, K), '')}" for E, K in columns),
                                  *(f"bytes K={K}" for K in ks)]) + " | |",
             "|-" * (len(columns) + len(ks) + 2) + "|"]
    timed = [name for name in names if any(key[0] == name for key in at)]
    for name in timed:
        cells = [*(cell(name, E, K) for E, K in columns), *(kept_at(name, K) for K in ks)]
        lines.append(f"| {name} | {' | '.join(cells)} | {'; '.join(notes[name])} |")
    idle = [f"{name} ({'; '.join(notes[name])})" for name in names if name not in timed]
    slower = {"in every case": [], "in some cases": [], "in no case": []}
    for name in timed[1:]:
        ratios = [r["times_dense"] for key, r in at.items() if key[0] == name and not disturbed(r)]
        if not ratios:
            continue
        count = sum(ratio > 1 for ratio in ratios)
        when = ("in no case" if count == 0 else
                "in every case" if count == len(ratios) else "in some cases")
        slower[when].append(f"{name} ({min(ratios):.2f}–{max(ratios):.2f})")
    lines += ["", f"Slower than dense{', † apart,' * bool(marks)} " + "; ".join(
        f"{when}: {', '.join(who)}" for when, who in slower.items() if who) + "."]
    return "\n".join(lines + [f"Not timed: {', '.join(idle)}."] * bool(idle))


BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"


def write_page(page, *json_paths):
    """Put the `table` of each file onto a page."""
    put_between(page, BEGIN, END, lambda: "\n\n".join(map(table, json_paths)),
                f"python notebooks/bench.py --page {page} {' '.join(map(str, json_paths))}")


# --- the command ---

def environment(args, argv, absent):
    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((l.split(": ")[1] for l in lines if l.startswith("model name")), name)
    found = {p: version(p) for p in ("torch", "triton", *(pip for pip, _ in PEERS.values()))}
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else
                  f"{name}, {os.cpu_count()} cores",
        "threads": args.threads, "repeats": args.repeats, "seconds": args.seconds,
        "torch": torch.__version__, "triton": found["triton"], "python": platform.python_version(),
        "versions": {"Python": platform.python_version(), **{p: v for p, v in found.items() if v}},
        "absent": absent, "commit": commit(),
        "command": f"python notebooks/bench.py {shlex.join(argv)}".strip(),
    }


def save(path, env, rows):
    """JSON with a line per row, so that a diff of two files can be read."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, f'{{"env": {json.dumps(env)},\n"rows": [\n{lines}\n]}}\n')


def sizes(names, device):
    """The shapes' (images, tokens, D, H): "presets,perf", names in SHAPES, or 64x65x192x768."""
    groups = {"presets": "tiny,small", "perf": "perf32k,perf64k" if device == "cuda" else "perf"}
    names = ",".join(groups.get(name, name) for name in names.split(","))
    return [SHAPES.get(name) or tuple(map(int, name.split("x"))) for name in names.split(",")]


def parse(argv):
    def numbers(text):
        return [int(n) for n in text.split(",")]

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("paths", nargs="*", help="JSON files to show, by --page or else their goals")
    add("--page", help="rewrite the kernels tables of this file")
    add("--device", default="cuda" if gpu else "cpu", choices=("cuda", "cpu"))
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    add("--shapes", default="presets,perf", help="also tiny, small, IMAGESxTOKENSxDxH")
    add("--experts", type=numbers, default=[8, 32], metavar="E,E")
    add("--k", type=numbers, default=[1, 2], metavar="K,K")
    add("--threads", type=numbers, default=[torch.get_num_threads()], metavar="N,N")
    add("--repeats", type=int, default=30, help="rounds at most")
    add("--seconds", type=float, default=3.0, help="after which a contender leaves, from round 5")
    add("--compiled", action=argparse.BooleanOptionalAction, default=None,
        help="time torch.compile too; by default on a GPU")
    add("--cuda_graph", action="store_true", help="time CUDA graphs of the steps")
    add("--json", help="write the rows to this file")
    add("--goals", action="store_true", help="print which goals are met")
    return parser.parse_args(argv)


def main(argv=None):
    printable()
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.page:
        return write_page(args.page, *args.paths)
    if args.paths:
        return print(goals([row for path in args.paths for row in
                            json.loads(Path(path).read_text(encoding="utf-8"))["rows"]]))
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    builds = everybody(args.device == "cuda" if args.compiled is None else args.compiled)
    random.seed(0)
    rows, absent = [], {}
    env = environment(args, argv, absent)
    print(f"{env['device']}; " + ", ".join(f"{n} {v}" for n, v in env["versions"].items()))
    for shape in sizes(args.shapes, args.device):
        for E in args.experts:
            for K in args.k:
                torch._dynamo.reset()
                torch.manual_seed(0)            # peers with their own weights and routing draw here
                new = list(race(draw(*shape, E, K, dtype, args.device), builds, args, absent))
                for n in args.threads:
                    print_rows([row for row in new if row["threads"] == n])
                rows += new
                if args.json:
                    save(args.json, env, rows)
    for name, why in absent.items():
        print(f"absent: {name} ({why})")
    if args.goals:
        print("\n" + goals(rows))
    return rows


if __name__ == "__main__":
    main()
