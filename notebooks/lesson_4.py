"""lesson_4.py -- how does notebook 4 draw a plan, count what moves, ask who was how fast, and share
the experts out?

Import it before anything that imports kernels.py: where there is no GPU it makes Triton interpret.
Whatever draws returns its figure.
"""
import html
import inspect
import json
import multiprocessing
import os
import statistics
import tempfile
import textwrap
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import checkpoint  # noqa: F401 (before torch: it says how torch's threads wait)

import numpy as np
import torch
import torch.distributed as dist
from IPython.display import display
from matplotlib.colors import to_rgb
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before kernels.py imports triton

import kernels
import report
from notebooks import bench, contenders
from notebooks.lesson import Folded, Table, measured, predict
from report import COLOURS

# --- drawings ---

def box(axis, x, y, width, height, text, colour, size=9):
    """One labelled rectangle of a drawing; (x, y) is its first corner."""
    axis.fill([x, x + width, x + width, x], [y, y, y + height, y + height],
              facecolor=(*to_rgb(colour), 0.3), edgecolor=colour, linewidth=1)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def journey(chosen, plan):
    """Draw a `kernels.Plan`: each choice of chosen (T, K), on its way to its row and back."""
    fig, [[axis]] = report.sheet(
        f"Sorting by expert turns {chosen.numel()} scattered choices into one block of rows for "
        f"each expert; the same list, read backwards, undoes it", 1, 1, 9.5, 5.6)
    (T, K), expert = chosen.shape, chosen.flatten().tolist()
    for s, e in enumerate(expert):
        box(axis, 0, s, 4, 0.8, f"choice {s}: token {s // K} to expert {e}", COLOURS[e])
        box(axis, 10.5, s, 3.3, 0.8, f"choice {s}: from expert {e}", COLOURS[e])
    for r, s in enumerate(plan.order.tolist()):
        e = expert[s]
        box(axis, 5.4, r, 3.7, 0.8, f"row {r}: expert {e}, token {s // K}", COLOURS[e])
        axis.plot([4, 5.4], [s + 0.4, r + 0.4], [9.1, 10.5], [r + 0.4, s + 0.4], color=COLOURS[e])
    for t in range(T):
        box(axis, 14, K * t, 3.6, K - 0.2, f"token {t}: {K} gated\noutputs, added", "0.5")
    heads = {0: "as routed", 5.4: "as computed", 10.5: "put back", 14: "added up"}
    for x, head in heads.items():
        axis.text(x, -0.3, head, weight="bold")
    axis.set(xlim=(-0.1, 17.7), ylim=(T * K, -1))
    axis.axis("off")
    return fig


def roofline():
    """Draw the benchmark's shapes under the roofs of two GPUs, whose peaks their vendor reports."""
    gpus = {"H200": (989, 4.8, "-"), "H100": (989, 3.35, "--")}     # TFLOP/s in bfloat16, TB/s
    arms = {f"E={E}, K={K}: M = T/{E // K}": (K / E, 1) for E in (32, 8) for K in (1, 2)}
    arms |= {f"dense, K={K}": (1, K) for K in (1, 2)}               # (rows over T, width over H)
    at = {shape: np.array([1 / (1 / (rows * B * N) + 1 / D + 1 / (wide * H))
                           for rows, wide in arms.values()])
          for shape, (B, N, D, H) in list(bench.SHAPES.items())[:3]}
    most = max(at["tiny"].max(), at["small"].max())
    ridges = {name: peak / speed for name, (peak, speed, _) in gpus.items()}
    fig, [[top], [below]] = report.sheet(
        f"No product of the presets tiny and small, dense or sparse, gets beyond {most:.0f} FLOP "
        f"per byte; the ridge of an H200 is at {ridges['H200']:.0f}", 2, 1, 9.5, 6.6, sharex=True)
    for name, (peak, speed, style) in gpus.items():
        top.plot([0, peak / speed, 350], [0, peak, peak], style, color="black",
                 label=f"roof of an {name}")
        below.axvline(ridges[name], linestyle=style, color="black", label=f"ridge of an {name}")
    peak, speed, _ = gpus["H200"]
    for i, (shape, x) in enumerate(at.items()):
        B, N, D, H = bench.SHAPES[shape]
        look = {"color": COLOURS[i], "label": f"{shape}: {B * N} x {D} x {H}"}
        top.plot(x, np.minimum(peak, speed * x), "osD"[i], **look)
        below.plot(x, list(arms), "osD"[i], **look)
    top.set_ylabel("attainable TFLOP/s")
    top.legend(fontsize=9, framealpha=1)
    finish(below, "FLOP per byte of one product, in bfloat16; T x D x H in the legend")
    return fig


def ladder(timed, kept, tab, parts):
    """Draw the races against the dense MLP, and what the rungs keep for the backward.

    kept {rung: bytes per token}, as measured; tab (rungs, parts), as counted.
    """
    auto, share = over(timed, "auto"), kept["lean"] / kept["dense"]
    fig, [[left, right]] = report.sheet(
        f"On this CPU auto is slower than the dense MLP in {sum(t > 1 for t in auto)} of "
        f"{len(auto)} races; lean keeps {share:.0%} of the dense MLP's bytes", 1, 2, 11, 5.4,
        width_ratios=(3, 2))
    for i, name in enumerate(("auto", "lean", "transformers_eager", "reference")):
        layers = [f"D={r['D']}, E={r['E']}, K={r['K']}" for r in timed if r["backend"] == name]
        left.plot(over(timed, name), layers, "oDxs"[i], color=COLOURS[i], label=name)
    left.axvline(1, color="black", label="the dense MLP")
    finish(left, "time, forward and backward, over the dense MLP's", "", (1, 2, 5, 10, 20, 50))
    for i, part in enumerate(parts):
        right.barh(list(kept), tab[:, i], 0.7, tab[:, :i].sum(1), fc=COLOURS[i], hatch="-/.x"[i],
                   label=part)
    right.plot(list(kept.values()), list(kept), "kD", label="measured on this page")
    right.set_ylim(len(kept) + 1.2, -0.6)                   # the legend stands below the bars
    finish(right, "bytes kept per token", where="lower right")
    return fig


def drops(factors, dropped, even):
    """Draw the share of choices dropped, {model: (factors, blocks)}, against the room reserved."""
    fig, [[axis]] = report.sheet(
        "Room for an even share drops " + " and ".join(
            f"{share:.0%} of this {name}'s" for name, share in zip(dropped, even, strict=True))
        + " choices; dropping none takes room for the busiest expert", 1, 1, 9, 4.2)
    for i, (name, share) in enumerate(dropped.items()):
        axis.plot(factors, share, "-:"[i], color=COLOURS[3 - 3 * i], lw=2,
                  label=[name, None, None])
    finish(axis, "rows reserved, over rows needed", "share of choices dropped")
    return fig


def tiling(plan, tiles, rows, width, columns):
    """Draw which program of grouped_gemm computes which tile of a result (S, width)."""
    S, E, across = len(plan.ids), len(plan.offsets) - 1, -(-width // columns)
    idle = across * (tiles.expert == E).sum().item()
    fig, [[axis]] = report.sheet(
        f"{across * len(tiles.expert) - idle} programs compute a tile of one expert each; {idle} "
        f"more are launched because the host does not look", 1, 1, 9.5, 5)
    for tile, (e, start) in enumerate(zip(*(t.tolist() for t in tiles), strict=True)):
        alive = min(rows, plan.offsets[e + 1].item() - start) if e < E else 0
        what = f"expert {e}, {alive} of {rows} rows" if alive else "return at once"
        y, height = (start, alive) if alive else (tile, 0.8)    # idle ones stand beside the result
        for part in range(across):
            x, wide = columns * part, min(columns, width - columns * part)
            if not alive:
                x, wide = width + 5.6 + 1.3 * part, 1.2
            box(axis, x, y, wide, height, tile * across + part, COLOURS[e] if alive else "0.5", 10)
        at = width + (0.2 if alive else 5.8 + 1.3 * across)
        axis.text(at, y + height / 2, f"tile {tile}: {what}", va="center", fontsize=9)
    axis.set(xlim=(-0.1, width + 10.8 + 1.3 * across), ylim=(S + 0.1, -0.1), yticks=range(S),
             xticks=range(width), ylabel="row, sorted by expert",
             xlabel="column of the result; the numbers in the boxes are those of the programs")
    return fig


def padding(rows, skew, experts, S=2176):
    """Draw S choices of a batch over the experts, in tiles of `rows` rows and in equal rectangles.

    Expert e has a share of the choices that falls as (e + 1) ** -skew.
    """
    exact = np.arange(1, experts + 1.0) ** -skew
    exact *= S / exact.sum()
    sizes = np.floor(exact).astype(int)
    sizes[np.argsort(sizes - exact)[:S - sizes.sum()]] += 1         # the largest rests round up
    tiled, room = -(-sizes // rows) * rows, sizes.max()
    fig, [[axis]] = report.sheet(
        f"Tiles of {rows} rows: {S / tiled.sum():.0%} of the computed rows hold a choice; "
        f"equal rectangles: {S / (experts * room):.0%}", 1, 1, 9, 3.8)
    axis.bar(range(experts), sizes, color=COLOURS[0], label="rows with a choice")
    axis.bar(range(experts), tiled - sizes, bottom=sizes, color="white", ec=COLOURS[3],
             hatch="///", label="padding of its tiles")
    axis.axhline(room, ls="--", color="black", label="room for the busiest, if all are equal")
    axis.set_xticks(range(0, experts, -(-experts // 16)))
    axis.set_ylim(0, 1.35 * max(room, tiled.max()))
    finish(axis, f"expert, {S} choices in all", "rows", where="upper right")
    return fig


def error_marks(names, plain, own, rule):
    """Draw the errors of plain operators and of the kernel, and what the rule allows the kernel.

    Each is {dtype: an error for each of `names`}.
    """
    within = sum(int((own[dtype] <= rule[dtype]).sum()) for dtype in own)
    fig, [[axis]] = report.sheet(
        f"{within} of {len(names) * len(own)} errors of the kernel are within the rule: twice the "
        f"error of plain operators, and one eps", 1, 1, 9.5, 4.8)
    for i, dtype in enumerate(plain):
        axis.plot(plain[dtype], names, "osD"[i], color=COLOURS[i], label=f"plain, {dtype}")
    for look, errors_of, label in (("kx", own, "the kernel"), ("k|", rule, "the rule's bar")):
        for i, dtype in enumerate(own):
            axis.plot(errors_of[dtype], names, look, ms=10, label=None if i else label)
    finish(axis, "largest error, over the largest true value",
           log_ticks=[10.0 ** k for k in range(-7, -1)], where="upper center")
    return fig


def crossing(chosen, tokens, E):
    """Draw the way of chosen (T, K) to the experts: process p has tokens[p] tokens, E / P experts.
    """
    K, P, sent = chosen.shape[1], len(tokens), []           # sent: each row as it leaves
    for p, own in enumerate(chosen.split(tokens)):
        plan = kernels.plan_choices(own, E)
        sent += [(p, e, sum(tokens[:p]) + s // K)
                 for e, s in zip(plan.ids.tolist(), plan.order.tolist(), strict=True)]
    host = [e * P // E for _, e, _ in sent]
    travel = sum(p != q for (p, _, _), q in zip(sent, host, strict=True))
    fig, [[axis]] = report.sheet(
        f"{travel} of {len(sent)} rows change process (dashed); " + ", ".join(
            f"process {q} computes {host.count(q)}" for q in range(P)), 1, 1, 9.5, 6)
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
    return fig


def finish(axis, xlabel, ylabel="", log_ticks=(), where="best"):
    """The axes' names and the legend; with `log_ticks` a logarithmic x axis marked there."""
    if log_ticks:
        axis.set_xscale("log")
        axis.set_xticks(log_ticks, [f"{value:g}" for value in log_ticks])
        axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=9, framealpha=1, loc=where)


# --- code: how it is written, what it moves ---

class Listing(Folded):
    """Lines that stay lines."""

    def inside(self):
        return f"<pre>{html.escape(self.text)}</pre>"


def fold(summary, text):
    display(Listing(summary, text))


def source(function, first="", last="", folded=""):
    """Print a function of the modules, or its lines from the one with `first` to that with `last`;
    with `folded`, a summary, fold them.

    One that nobody has written yet has no such lines, nor need a student's: then from its head on,
    or to its end.
    """
    # a Triton kernel is an object, with the function that was written in its `fn`
    lines = inspect.getsource(getattr(function, "fn", function)).splitlines()
    start = next((i for i, line in enumerate(lines) if first in line), 0)
    end = next((i for i in range(start, len(lines)) if last and last in lines[i]), len(lines))
    text = textwrap.dedent("\n".join(lines[start:end + 1])).rstrip()
    if folded:
        fold(folded, text)
    else:
        print(text)


def refusal(function, *args):
    """What function(*args) cannot do, in its own words."""
    try:
        return function(*args)
    except (NotImplementedError, RuntimeError) as why:
        return str(why)


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


def launched(device):
    """A layer of T = 24 tokens, D = 20, H = 36, E = 4, K = 2 whose `up` has run, into NaNs.

    Tiles have 16 rows and 16 columns. Without Triton nothing runs, and the NaNs stay.
    """
    layer = contenders.draw(4, 6, 20, 36, 4, 2, torch.float32, device)
    x, _, w_in, b_in, *_ = layer.leaves.values()
    plan = kernels.plan_choices(layer.chosen, 4)
    tiles = kernels.plan_tiles(plan.offsets, S=48, rows=16)
    blocks = {"up": kernels.Block(rows=16, columns=16, step=16, warps=4, stages=2)}
    z, a = (torch.full((48, 36), torch.nan, device=device) for _ in "za")
    if kernels.triton:
        kernels.gemm("up", blocks, plan, tiles, x, w_in, a, shared_by=2, bias=b_in, z=z)
    return SimpleNamespace(x=x, w_in=w_in, b_in=b_in, plan=plan, tiles=tiles, z=z)


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

def record_of(name):
    return json.loads((Path(__file__).parent / f"results/{name}.json").read_text(encoding="utf-8"))


def timings(name="kernels_cpu"):
    """Who made results/NAME.json, and those of its rows that no other program disturbed."""
    record = record_of(name)
    timed = [r for r in record["rows"] if r["ms"] and not bench.disturbed(r)]
    return (record["env"] | {"seed": 0},                    # contenders.draw knows no other seed
            sorted(timed, key=lambda r: (-r["D"], -r["E"], -r["K"], r["threads"])))


def products(name):
    """What each product of `fused` took, by results/NAME.json: {product: (µs, TFLOP/s)}."""
    return {r["product"]: (r["us"], r["tflops"]) for r in record_of(name)["rows"] if r["in_use"]}


def on_an_h200(guess):
    """Ask for a guess of what `fused` takes over dense, and fold the answers.

    Returns the rows of the race, and `products` before and after the kernels were changed for it.
    """
    about, timed = timings("kernels_h200")
    before, now = products("tiles_h200_before"), products("tiles_h200")
    measured(about)
    predict(guess, over(timed, "fused")[0], "times the dense MLP's time, fused on an H200")
    display(Table("Everybody's times there, over the dense MLP's", ("", "times dense", ""), [
        (r["backend"], f"{r['times_dense']:.2f}", r["note"]) for r in timed]))
    display(Table("Its products, each timed alone", ("", "µs", "10¹² FLOPs a second"), [
        (name, f"{us:,.0f}", f"{rate:.0f}") for name, (us, rate) in before.items()]))
    return timed, before, now


def over(timed, name, rival="dense", field="times_dense", **where):
    """A field of one contender's rows over a rival's, for every race that both ran: a list."""
    def race(r):
        return r["D"], r["E"], r["K"], r["threads"]

    rivals = {race(r): r[field] for r in timed if r["backend"] == rival}
    return [r[field] / rivals[race(r)] for r in timed
            if r["backend"] == name and race(r) in rivals and where.items() <= r.items()]


def ranges(claims):
    """Show what a page says of all races beside what they say: {claim: a ratio for each race}.

    Races are no sample of anything, so what stands here is their range, and no confidence interval.
    """
    display(Table(None, ("", "median [smallest, largest]", "above 1"), [
        (claim, f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
         f"{sum(r > 1 for r in ratios)} of {len(ratios)}") for claim, ratios in claims.items()]))


# --- experts on several processes ---

def shared_out(block, served, D, H, E):
    """What travels and who waits, if E experts of width D x H serve block (T,) on P processes?

    `served` (T,) says whose choice a capacity keeps. Returns the megabytes that travel for P in 2,
    4, 8, those of all weights, both in float32, and the lines that tell them.
    """
    T, sent, weigh = len(block), [], 2 * D * H * E * 4 / 1e6
    lines = [f"all experts' weights: {weigh:.1f} MB; choices that a capacity factor of 1 drops: "
             f"{1 - served.float().mean().item():.0%} of {T}"]
    for P in (2, 4, 8):
        home, host = torch.arange(T) * P // T, block * P // E
        load, capped = (h.bincount(minlength=P) for h in (host, host[served]))
        sent.append((home != host).sum().item() * D * 4 * 4 / 1e6)      # four journeys
        lines.append(f"{P} processes: {sent[-1]:.1f} MB travel; busiest over an even share "
                     f"{load.max() * P / T:.2f}, capped {capped.max() * P / T:.2f}; rows of each: "
                     + " ".join(map(str, load.tolist())))
    return sent, weigh, "\n".join(lines)


def two_against_one(chosen):
    """The largest difference, by name, that a layer's results and gradients have on two processes.

    chosen (T=6, K): process 0 has tokens 0 to 3 and experts 0 and 1, process 1 has the rest.
    """
    layer = contenders.draw(1, 6, 20, 36, 4, 2, torch.float64, "cpu")   # D=20, H=36, E=4
    x, _, *weights = layer.leaves.values()
    router = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = step(kernels.expert_mlp, x, router, weights, chosen, layer.dy)
    cut = (slice(0, 4), slice(0, 2)), (slice(4, 6), slice(2, 4))    # each one's tokens and experts
    two = on_processes(share, [(x[t], router, [w[e] for w in weights], chosen[t], layer.dy[t])
                               for t, e in cut])
    whole = {name: two[1][name] if name == "router" else torch.cat([part[name] for part in two])
             for name in one}
    return {name: (whole[name] - true).abs().max().item() for name, true in one.items()}


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
