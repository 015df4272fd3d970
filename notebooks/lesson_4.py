"""lesson_4.py -- how does notebook 4 draw a plan, count what moves, ask who was how fast, and share
the experts out?

Import it before anything that imports kernels.py: where there is no GPU it makes Triton interpret.
"""
import inspect
import json
import multiprocessing
import os
import tempfile
import textwrap
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import checkpoint  # noqa: F401 (before torch: it says how torch's threads wait)

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.colors import to_rgb
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before kernels.py imports triton

import kernels
from notebooks import bench, contenders
from report import COLOURS

# --- drawings ---

def box(axis, x, y, width, height, text, colour, size=8):
    """One labelled rectangle of a drawing; (x, y) is its first corner."""
    axis.fill([x, x + width, x + width, x], [y, y, y + height, y + height],
              facecolor=(*to_rgb(colour), 0.3), edgecolor=colour, linewidth=1)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def journey(axis, chosen, plan):
    """Draw a `kernels.Plan`: each choice of chosen (T, K), on its way to its row and back."""
    (T, K), expert = chosen.shape, chosen.flatten().tolist()
    for s, e in enumerate(expert):
        box(axis, 0, s, 4, 0.8, f"choice {s}: token {s // K} to expert {e}", COLOURS[e])
        box(axis, 10.5, s, 3.3, 0.8, f"choice {s}: from expert {e}", COLOURS[e])
    for r, s in enumerate(plan.order.tolist()):
        e = expert[s]
        box(axis, 5.5, r, 3.5, 0.8, f"row {r}: expert {e}, token {s // K}", COLOURS[e])
        axis.plot([4, 5.5], [s + 0.4, r + 0.4], [9, 10.5], [r + 0.4, s + 0.4], color=COLOURS[e])
    for t in range(T):
        box(axis, 14, K * t, 3.6, K - 0.2, f"token {t}: {K} gated\noutputs, added", "0.5")
    heads = {0: "as routed", 5.5: "as computed", 10.5: "put back", 14: "added up"}
    for x, head in heads.items():
        axis.text(x, -0.3, head, weight="bold")
    axis.set(xlim=(-0.1, 17.7), ylim=(T * K, -1))
    axis.axis("off")


def tiling(axis, plan, tiles, rows, width, columns):
    """Draw which program of grouped_gemm computes which tile of a result (S, width)."""
    S, E, across = len(plan.ids), len(plan.offsets) - 1, -(-width // columns)
    for tile, (e, start) in enumerate(zip(*(t.tolist() for t in tiles), strict=True)):
        alive = min(rows, plan.offsets[e + 1].item() - start) if e < E else 0
        what = f"expert {e}, {alive} of {rows} rows" if alive else "return at once"
        y, height = (start, alive) if alive else (tile, 0.8)    # idle ones stand beside the result
        for part in range(across):
            x, wide = columns * part, min(columns, width - columns * part)
            if not alive:
                x, wide = width + 5 + 1.3 * part, 1.2
            box(axis, x, y, wide, height, tile * across + part, COLOURS[e] if alive else "0.5", 9)
        at = width + (0.2 if alive else 5.2 + 1.3 * across)
        axis.text(at, y + height / 2, f"tile {tile}: {what}", va="center", fontsize=8)
    axis.set(xlim=(-0.1, width + 10 + 1.3 * across), ylim=(S + 0.1, -0.1), yticks=range(S),
             xticks=range(width), ylabel="row, sorted by expert",
             xlabel="column of the result; the numbers in the boxes are those of the programs")


def crossing(axis, chosen, tokens, E):
    """Draw the way of chosen (T, K) to the experts: process p has tokens[p] tokens, E / P experts.
    """
    K, P, sent = chosen.shape[1], len(tokens), []           # sent: each row as it leaves
    for p, own in enumerate(chosen.split(tokens)):
        plan = kernels.plan_choices(own, E)
        sent += [(p, e, sum(tokens[:p]) + s // K)
                 for e, s in zip(plan.ids.tolist(), plan.order.tolist(), strict=True)]
    host = [e * P // E for _, e, _ in sent]
    arrive = sorted(range(len(sent)), key=host.__getitem__)             # stable: by sender
    for j, i in enumerate(arrive):
        (p, e, t), q = sent[i], host[i]
        left, right = i + 2 * p, j + 2 * q                  # a gap between the processes
        box(axis, 0, left, 4, 0.8, f"token {t} to expert {e}", COLOURS[e], 9)
        box(axis, 8, right, 4, 0.8, f"expert {e}, token {t}", COLOURS[e], 9)
        axis.plot([4, 8], [left + 0.4, right + 0.4], color=COLOURS[e], lw=1 if p == q else 3,
                  ls="-" if p == q else "--")
    for p in range(P):
        experts = ", ".join(str(e) for e in range(E) if e * P // E == p)
        for x, y, what in ((0, K * sum(tokens[:p]), f"the choices of its {tokens[p]} tokens"),
                           (8, sum(q < p for q in host), f"its experts {experts}")):
            axis.text(x, y + 2 * p - 0.3, f"process {p}: {what}", weight="bold", fontsize=10)
    axis.set(xlim=(-0.1, 12.1), ylim=(len(sent) + 2 * P - 1.9, -1.2))
    axis.axis("off")


def finish(axis, xlabel, ylabel="", log_ticks=()):
    """The axes' names and the legend; with `log_ticks` a logarithmic x axis marked there."""
    if log_ticks:
        axis.set_xscale("log")
        axis.set_xticks(log_ticks, [f"{value:g}" for value in log_ticks])
        axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=8, framealpha=1)


# --- code: how it is written, what it moves ---

def source(function, first="", last=""):
    """Print a function of the modules, or its lines from the one with `first` to that with `last`.

    One that nobody has written yet has no such lines, nor need a student's: then from its head on,
    or to its end.
    """
    # a Triton kernel is an object, with the function that was written in its `fn`
    lines = inspect.getsource(getattr(function, "fn", function)).splitlines()
    start = next((i for i, line in enumerate(lines) if first in line), 0)
    end = next((i for i in range(start, len(lines)) if last and last in lines[i]), len(lines))
    print(textwrap.dedent("\n".join(lines[start:end + 1])))


def moved(step):
    """How many numbers do the operators of step() read and write? Each operand of each, once."""
    with Moved() as count:
        step()
    return count.elements


def errors(mlp, layer):
    """What is the largest error of a rung of kernels.py, on its output and on every gradient?

    `layer` is a contenders.Layer. The truth is kernels.reference in float64; an error is divided
    by the largest true value. Returns the names and the errors.
    """
    def run(mlp, cast):
        leaves = {name: cast(t).clone().requires_grad_() for name, t in layer.leaves.items()}
        x, gates, *weights = leaves.values()
        y = mlp(x, layer.chosen, gates, *weights)
        grads = torch.autograd.grad(y, leaves.values(), layer.dy.to(y.dtype))
        return {"y": y.detach(),
                **{f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}}

    true, got = run(kernels.reference, torch.Tensor.double), run(mlp, torch.Tensor.detach)
    return list(true), np.array([((got[name].double() - t).abs().max() / t.abs().max()).item()
                                 for name, t in true.items()])


class Moved(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result, name = operator(*args, **(kwargs or {})), operator.__name__
        aliases = [r.alias_info for r in operator._schema.returns if r.alias_info]
        view = bool(aliases) and not any(a.is_write for a in aliases)
        if not view and not name.startswith(("empty", "new_empty", "detach")):
            # the first operand of these is written, or asked for its dtype, and never read
            read = args[1:] if name.startswith(("copy_", "index_copy_", "new_")) else args
            self.elements += sum(t.numel() for t in tree_leaves((read, kwargs, result))
                                 if isinstance(t, torch.Tensor))
        return result


# --- what was timed before, and by whom ---

def timings():
    """Who made results/kernels_cpu.json, and those of its rows that no other program disturbed."""
    path = Path(__file__).parent / "results/kernels_cpu.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    timed = [r for r in record["rows"] if r["ms"] and not bench.disturbed(r)]
    return (record["env"] | {"seed": 0},                    # contenders.draw knows no other seed
            sorted(timed, key=lambda r: (-r["D"], -r["E"], -r["K"], r["threads"])))


def over(timed, name, rival="dense", field="times_dense", **where):
    """A field of one contender's rows over a rival's, for every race that both ran: a list."""
    def race(r):
        return r["D"], r["E"], r["K"], r["threads"]

    rivals = {race(r): r[field] for r in timed if r["backend"] == rival}
    return [r[field] / rivals[race(r)] for r in timed
            if r["backend"] == name and race(r) in rivals and where.items() <= r.items()]


# --- experts on several processes ---

def expert_parallel(x, chosen, gates, w_in, b_in, w_out, b_out):
    """`kernels.expert_mlp` for one of P processes: its own tokens x (T, D), its own E/P experts.

    `chosen` numbers all E experts; process p has those from p E/P on. All P call this at once.
    """
    (T, K), P, own = chosen.shape, dist.get_world_size(), len(w_in)
    plan = kernels.plan_choices(chosen, P * own)                # by expert, and so by process
    leaving = plan.offsets.diff()                               # (E,) my rows for each expert
    arriving = torch.empty_like(leaving)                        # (E,) each sender's for my experts
    dist.all_to_all_single(arriving, leaving)
    there, here = (n.view(P, own).sum(dim=1).tolist() for n in (leaving, arriving))

    rows = Exchange.apply(x[plan.order // K], there, here)      # (R, D) everybody's, for my experts
    expert = torch.arange(own).repeat(P).repeat_interleave(arriving)[:, None]       # (R, 1)
    out = kernels.expert_mlp(rows, expert, torch.ones_like(rows[:, :1]), w_in, b_in, w_out, b_out)
    out = Exchange.apply(out, here, there)                      # (S, D) mine again, as they left

    raw = torch.empty_like(out)
    raw[plan.order] = out                                       # (S, D) as chosen
    return kernels.gated_sum(raw.view(T, K, x.shape[1]), gates, False)


class Exchange(torch.autograd.Function):
    """Rows (S, D), there[p] of them for process p -> (R, D), here[p] of them from process p.

    A gradient goes the way back: the same exchange with the sizes swapped.
    """

    @staticmethod
    def forward(ctx, rows, there, here):
        ctx.way_back = here, there
        got = rows.new_empty(sum(here), rows.shape[1])
        dist.all_to_all_single(got, rows.contiguous(), here, there)
        return got

    @staticmethod
    def backward(ctx, dout):
        return Exchange.apply(dout, *ctx.way_back), None, None


def step(mlp, x, router, weights, chosen, dy):
    """y of a layer whose choices are given, and the gradients of all that learns, by name."""
    x, router, *weights = map(contenders.leaf, (x, router, *weights))
    gates = (x @ router).softmax(dim=1).gather(1, chosen)       # (T, K)
    y = mlp(x, chosen, gates, *weights)
    grads = torch.autograd.grad(y, (x, gates, router, *weights), dy)
    names = "y", "x", "gates", "router", "w_in", "b_in", "w_out", "b_out"
    return dict(zip(names, (y.detach(), *grads), strict=True))


def share(*layer):
    """`step` in one of the processes, for its tokens and its experts."""
    got = step(expert_parallel, *layer)
    dist.all_reduce(got["router"])      # a sum: each process saw what its own tokens ask of it
    return got


def on_processes(task, shares):
    """[task(*share) for share in shares], each in a process of its own; gloo joins them by TCP."""
    P, spawn = len(shares), multiprocessing.get_context("spawn")        # as Windows has no other
    # arrays travel by value; tensors would share memory, and a socket's folder outlive the call
    shares = [tree_map(torch.Tensor.numpy, share) for share in shares]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(P, spawn) as pool:
        meet = partial(joined, task, str(Path(folder) / "who is where"), P)
        return [tree_map(torch.from_numpy, got) for got in pool.map(meet, range(P), shares)]


def joined(task, meeting, P, rank, share):
    torch.set_num_threads(1)
    # they find each other by a file: a port might be taken by the time they want it
    dist.init_process_group("gloo", store=dist.FileStore(meeting, P), rank=rank, world_size=P,
                            timeout=timedelta(seconds=60))
    try:
        return tree_map(torch.Tensor.numpy, task(*tree_map(torch.from_numpy, share)))
    finally:
        dist.destroy_process_group()    # one that failed keeps nobody waiting
