"""tiles.py -- which block sizes make the fused kernels fast on this GPU?

    python notebooks/tiles.py --json notebooks/results/tiles_h200.json
    python notebooks/tiles.py --page PAGE.md notebooks/results/tiles_h200{_before,}.json

`fused` is six products: "up" and "down" forward, "da", "dx" and two of "dw" backward. Each kind is
timed alone on one layer in bfloat16, with every block of `BLOCKS`. A block that gives another
result than the one in use is refused. Triton compiles for seconds, so --workers processes compile
first, and one process alone then times what they left in Triton's cache. Letters as in kernels.py.
"""
import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import commit, printable

import torch

import kernels
from notebooks.bench import sample, save, sizes
from notebooks.contenders import draw
from report import put_between


def blocks(steps_and_stages):
    """Every block that keeps 32 to 128 sums in a thread and fits into shared memory."""
    return [kernels.Block(rows, columns, step, warps, stages)
            for rows, columns, warps in itertools.product((64, 128), (64, 128, 256), (4, 8))
            if 32 <= rows * columns // (32 * warps) <= 128
            for step, stages in steps_and_stages
            if 2 * stages * step * (rows + columns) <= 227 * 1024]      # bytes, in bfloat16


SHAPE = "T", "D", "H", "E", "K"
GEMM, DW = blocks([(32, 4), (64, 3), (64, 4)]), blocks([(32, 4), (64, 2), (64, 4), (64, 6)])
BLOCKS = {"up": GEMM, "down": GEMM, "da": GEMM, "dx": GEMM, "dw": DW}


def products(layer):
    """Every kind of launch on one layer: name -> a function of a block that returns what it wrote.
    """
    x, gates, w_in, b_in, w_out, b_out = layer.leaves.values()
    (T, K), (E, D, H) = layer.chosen.shape, w_in.shape
    S, plan = T * K, kernels.plan_choices(layer.chosen, E)
    d, z, a, dz = (torch.randn(S, n, device=x.device, dtype=x.dtype) for n in (D, H, H, H))
    tiles = {rows: kernels.plan_tiles(plan.offsets, S, rows) for rows in (32, 64, 128)}

    def gemm(name, block, *operands, width, **words):
        out = x.new_empty(S, width)
        kernels.gemm(name, {name: block}, plan, tiles[block.rows], *operands, out, **words)
        return out

    def up(block):
        z = x.new_empty(S, H)
        return gemm("up", block, x, w_in, width=H, shared_by=K, bias=b_in, z=z), z

    def down(block):
        return [gemm("down", block, a, w_out, width=D, bias=b_out, gates=gates)]

    def da(block):
        gated_a, dgates = x.new_empty(S, H), gates.new_empty(S, -(-H // block.columns))
        db = gates.new_zeros(len(tiles[block.rows].expert), H)
        dz = gemm("da", block, d, w_out.mT, width=H, gates=gates, z=z, gated_a=gated_a,
                  dgates=dgates, db=db)
        return dz, gated_a, dgates.sum(dim=1), db.sum(dim=0)

    def dx(block):
        return [gemm("dx", block, dz, w_in.mT, width=D)]

    def dw(block):
        return [kernels.gemm_dw({"dw": block}, plan, d, dz)]

    return {"up": up, "down": down, "da": da, "dx": dx, "dw": dw}


def close(ours, theirs):
    """Whether two results differ by a few roundings of bfloat16 at most."""
    return all((a.double() - b.double()).norm() <= 0.01 * b.double().norm()
               for a, b in zip(ours, theirs, strict=True))


REPEATS = 15


def microseconds(launch):
    """The median time of one launch, after a first sample that warms up."""
    return 1e3 * statistics.median([sample(launch, True) for _ in range(1 + REPEATS)][1:])


def compile_share(layer, worker, workers):
    """Launch every workers-th block once, for what it leaves in Triton's cache."""
    everything = [(launch, block) for name, launch in products(layer).items()
                  for block in BLOCKS[name]]
    for launch, block in everything[worker::workers]:
        try:
            launch(block)
        except Exception as error:              # too much shared memory, say: the race notes it
            print(block, type(error).__name__, error)
    torch.cuda.synchronize()


def race(layer):
    """A row for each product and block, the fastest of each product first."""
    (T, K), (E, D, H) = layer.chosen.shape, layer.leaves["w_in"].shape
    dtype = layer.dy.dtype
    for name, launch in products(layer).items():
        usual, rows = kernels.choose_blocks(T * K, E, dtype)[name], []
        truth = launch(usual)
        for block in dict.fromkeys([usual, *BLOCKS[name]]):
            row = {"product": name, "dtype": str(dtype)[6:], "T": T, "D": D, "H": H, "E": E, "K": K,
                   **block._asdict(), "in_use": block == usual,
                   "us": None, "tflops": None, "note": ""}
            try:
                if close(launch(block), truth):
                    row["us"] = microseconds(partial(launch, block))
                    row["tflops"] = 2 * T * K * D * H / row["us"] / 1e6
                else:
                    row["note"] = "refused: another result"
            except Exception as error:
                row["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            rows.append(row)
        yield from sorted(rows, key=lambda row: row["us"] or float("inf"))


BEGIN, END = "<!-- tiles:begin -->", "<!-- tiles:end -->"


def page(path):
    """Markdown for a page: the table of a file, and where its numbers are from."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    env = record["env"]
    return (f"{table(record['rows'], best=1)}\n\n{env['device']}; torch {env['torch']}, triton "
            f"{env['triton']}; commit {env['commit']}; `{env['command']}`. {env['timed']}.")


def table(rows, best=3):
    """Markdown: for each layer and product the fastest blocks, and the one in use."""
    head = *SHAPE, "product", *kernels.Block._fields, "µs", "TFLOP/s", ""
    lines = [f"| {' | '.join(head)} |", "|-" * len(head) + "|"]
    for _, own in itertools.groupby(rows, key=lambda r: (*(r[n] for n in SHAPE), r["product"])):
        own = [r for r in own if r["us"]]
        for r in own[:best] + [r for r in own[best:] if r["in_use"]]:
            cells = [*(r[n] for n in SHAPE), r["product"], *(r[n] for n in kernels.Block._fields),
                     f"{r['us']:.0f}", f"{r['tflops']:.0f}", "in use" if r["in_use"] else ""]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv=None):
    printable()
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("paths", nargs="*", help="JSON files to show, by --page")
    add("--page", help="rewrite the tiles tables of this file")
    add("--shapes", default="perf64k", help="as in bench.py")
    add("--experts", type=int, default=8)
    add("--k", type=int, default=2)
    add("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="compile first")
    add("--worker", type=int, help=argparse.SUPPRESS)
    add("--json", help="write the rows to this file")
    args = parser.parse_args(argv)
    if args.page:
        return put_between(args.page, BEGIN, END, lambda: "\n\n".join(map(page, args.paths)),
                           f"python notebooks/tiles.py --page {args.page} {' '.join(args.paths)}")
    rows = []
    for name in args.shapes.split(","):
        (shape,) = sizes(name, "cuda")
        layer = draw(*shape, args.experts, args.k, torch.bfloat16, "cuda")
        if args.worker is not None:
            return compile_share(layer, args.worker, args.workers)
        command = [sys.executable, __file__, *argv, "--shapes", name, "--worker"]
        for process in [subprocess.Popen([*command, str(i)]) for i in range(args.workers)]:
            process.wait()
        rows += race(layer)
        if args.json:
            save(args.json, {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                             "triton": kernels.triton.__version__, "commit": commit(),
                             "command": f"python notebooks/tiles.py {shlex.join(argv)}".strip(),
                             "timed": f"Medians of {REPEATS} means of ten launches"},
                 rows)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
