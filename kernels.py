"""kernels.py -- how does every token get through its own experts and no others?

A ladder of five rungs, the clearest first:

    reference    the definition: every expert on every token
    sliced       sort the choices by expert, then each expert multiplies its own rows
    grouped      the same steps, and one call for all experts where that is faster
    lean         the same products, with a backward by hand that keeps less memory
    fused        the steps of lean, inside two Triton kernels

Each rung is called as

    rung(x (T, D), chosen (T, K), gates (T, K),
         w_in (E, D, H), b_in (E, H), w_out (E, H, D), b_out (E, D), return_choices=False)

and returns y (T, D), y_t = sum_k gates_tk MLP_{chosen_tk}(x_t). With return_choices=True it returns
(y, raw), where raw (T, K, D) are the experts' outputs before their gates. The tests trust the first
rung alone and compare the others with it. The model calls `expert_mlp`, at the end of the file.

Letters: T tokens, D width, H hidden, E experts, K experts per token. There are S = T*K choices;
choice s = t*K + k is the k-th of token t.
"""
import os
import time
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from router import expect

try:
    import triton
    import triton.language as tl
    jit, constexpr = triton.jit, tl.constexpr
except ImportError:      # on Windows and macOS torch brings no Triton: four rungs run without it
    triton, jit, constexpr = None, lambda kernel: kernel, None

# --- 1. the definition: every expert on every token, then keep the chosen ones ---

def reference(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    """What is to be computed? Every expert sees every token: E / K times the necessary work."""
    everything = torch.stack([
        F.gelu(x @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e] for e in range(len(w_in))
    ], dim=1)                                                           # (T, E, D)
    raw = everything.gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))        # (T, K, D)
    return gated_sum(raw, gates, return_choices)


def gated_sum(raw, gates, return_choices):
    """Weigh raw (T, K, D) by the gates and add up each token's choices: y (T, D), or (y, raw).

    Gates are float32 even where raw is bfloat16. So are the products and sums; y is rounded once.
    """
    y = raw * gates[..., None]
    # a sum over one choice would only copy it, forward and backward
    y = (y.sum(dim=1) if y.shape[1] > 1 else y.squeeze(1)).to(raw.dtype)
    return (y, raw) if return_choices else y


# --- 2. sort the choices by expert, multiply slice by slice, undo the sort ---

def sliced(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    """How do the other experts cost nothing? Each expert multiplies its own rows and no others.

    Sort, gather, multiply, put back, add up: autograd writes the backward of all five.
    """
    T, K = chosen.shape
    plan = plan_choices(chosen, len(w_in))
    rows = x[plan.order // K]                                           # (S, D) sorted by expert
    out = sliced_mlp(rows, plan, w_in, b_in, w_out, b_out)              # (S, D) still sorted
    raw = torch.empty_like(out)
    raw[plan.order] = out                                               # (S, D) as chosen
    return gated_sum(raw.view(T, K, x.shape[1]), gates, return_choices)


class Plan(NamedTuple):
    """The choices in the order in which they are computed: expert 0's first, then expert 1's."""
    ids: Tensor              # (S,) the expert of each row, ascending
    order: Tensor            # (S,) the choice computed in each row, of token order[r] // K
    offsets: Tensor          # (E+1,) expert e has the rows offsets[e] up to offsets[e+1]


def plan_choices(chosen, E):
    """Which row computes which choice? All of expert 0's come first, then all of expert 1's.

    >>> plan_choices(torch.tensor([[2, 0], [0, 3]]), E=4)
    Plan(ids=tensor([0, 0, 2, 3]), order=tensor([1, 2, 0, 3]), offsets=tensor([0, 2, 2, 3, 4]))
    """
    ids, order = chosen.reshape(-1).sort(stable=True)
    # bincount would size its result by the largest entry, and on a GPU the host would wait for that
    offsets = torch.searchsorted(ids, torch.arange(E + 1, device=ids.device))
    return Plan(ids, order, offsets)


def sliced_mlp(rows, plan, w_in, b_in, w_out, b_out):
    """The experts' MLPs on rows (S, D) sorted by expert, each on its own slice -> (S, D)."""
    sizes = plan.offsets.diff().tolist()                                # 0 for an idle expert
    # unbind once: indexing w_in[e] in the loop would write a full-size zero gradient per expert
    weights = zip(w_in.unbind(), b_in.unbind(), w_out.unbind(), b_out.unbind(), strict=True)
    return torch.cat([
        torch.addmm(bo, F.gelu(torch.addmm(bi, own, wi)), wo)
        for own, (wi, bi, wo, bo) in zip(rows.split(sizes), weights, strict=True)])


# --- 3. the same steps, and one call for all experts where that is faster ---

def grouped(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    """What if the experts are many? One call multiplies for all, and rows only move by gathers.

    That call is grouped_mm. Where a slice per expert is faster, `sliced_mlp` takes its place.
    """
    (T, D), K = x.shape, chosen.shape[1]
    plan = plan_choices(chosen, len(w_in))
    row = torch.arange(T * K, device=x.device)
    undo = torch.empty_like(plan.order).scatter_(0, plan.order, row)    # (S,) a choice's row
    choices = x[:, None].expand(T, K, D).reshape(T * K, D)              # (S, D) a row per choice
    rows = Permute.apply(choices, plan.order, undo)                     # (S, D) sorted by expert
    one_call = use_grouped_mm(rows, w_in, FEW_ROWS, pads=True)
    mlp = grouped_mm_mlp if one_call else sliced_mlp
    out = mlp(rows, plan, w_in, b_in, w_out, b_out)                     # (S, D) still sorted
    raw = Permute.apply(out, undo, plan.order).view(T, K, D)
    return gated_sum(raw, gates, return_choices)


class Permute(torch.autograd.Function):
    """Rows (S, n) in another order: row i of the result is rows[order[i]]; `undo` is the inverse.

    Each row is wanted exactly once, so the gradient is a gather as well, dout[undo]. Autograd
    cannot know that: its backward of rows[order] adds dout to a tensor of zeros, row by row.
    """

    @staticmethod
    def forward(ctx, rows, order, undo):
        ctx.save_for_backward(undo)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, dout):
        undo, = ctx.saved_tensors
        return dout.index_select(0, undo), None, None


def grouped_mm_mlp(rows, plan, w_in, b_in, w_out, b_out):
    """What `sliced_mlp` computes, in two calls of grouped_mm. It has no bias: `OwnBias` adds it.

    grouped_mm takes rows of whole 16 bytes. Hidden units without weights fill up what is missing.
    It takes few layouts in memory, so weights in another one than a model's own are copied.
    """
    w_in, w_out = w_in.contiguous(), w_out.contiguous()
    if missing := -w_in.shape[2] % (16 // rows.element_size()):
        w_in, b_in = F.pad(w_in, (0, missing)), F.pad(b_in, (0, missing))
        w_out = F.pad(w_out, (0, 0, 0, missing))
    ends = plan.offsets[1:].int()
    # sizes are read on an eager CPU alone: on a GPU the host would have to wait for the sort, and
    # a compiled graph has to serve all sizes
    at_hand = not (rows.is_cuda or torch.compiler.is_compiling())
    sizes = plan.offsets.diff().tolist() if at_hand else None
    z = F.grouped_mm(rows, w_in, offs=ends)                             # (S, H)
    z = OwnBias.apply(z, b_in, plan.ids, sizes)
    out = F.grouped_mm(F.gelu(z), w_out, offs=ends)                     # (S, D)
    return OwnBias.apply(out, b_out, plan.ids, sizes)


class OwnBias(torch.autograd.Function):
    """out (S, n) plus the bias of each row's own expert, b (E, n) at ids (S,).

    If the experts' `sizes` are given it adds in place, a slice per expert, and makes no second
    tensor (S, n).
    """

    @staticmethod
    def forward(ctx, out, b, ids, sizes):
        ctx.E, ctx.sizes = len(b), sizes
        ctx.save_for_backward(ids)
        if sizes is None:
            return out + b.index_select(0, ids)
        ctx.mark_dirty(out)
        for rows, own in zip(out.split(sizes), b.unbind(), strict=True):
            rows += own
        return out

    @staticmethod
    def backward(ctx, dout):
        ids, = ctx.saved_tensors
        if ctx.sizes is None:
            # autograd would add row by row, on a GPU in an order that changes from run to run;
            # a product with one-hot rows gives the same bits every time
            db = F.one_hot(ids, ctx.E).to(dout.dtype).mT @ dout
        else:
            db = torch.stack([rows.sum(dim=0) for rows in dout.split(ctx.sizes)])
        return dout, db, None, None


# On a CPU one call is the faster below either of two limits. Both are ours, chosen by timing. What
# is one worth? Set it to 0 and run `python notebooks/bench.py`: the layers that it times, as those
# in notebooks/results/kernels_cpu.json, lie on both sides of each.
HIDDEN_FITS = 8 * 2 ** 20   # bytes of all hidden rows (S, H): fewer stay in the cache between calls
# Rows per expert, for `grouped` alone. The backward of unbind copies the slices' gradients into one
# tensor, and the fewer the rows, the more that copy counts. grouped_mm writes them there at once.
FEW_ROWS = 200


def use_grouped_mm(rows, w_in, few_rows=0, pads=False):
    """Is grouped_mm the faster product for rows (S, D), and does it accept these tensors?

    With `pads` the caller can fill up hidden units to rows of whole 16 bytes. That copies the
    weights, so it is for a narrow hidden layer with fewer numbers than the rows have (ours, timed
    on an eager CPU and nowhere else).
    """
    compiling, (E, D, H) = torch.compiler.is_compiling(), w_in.shape
    fills = pads and not (rows.is_cuda or compiling) and H < D and len(rows) >= E * H
    aligned = all(n * rows.element_size() % 16 == 0 for n in ((D,) if fills else (D, H)))
    small = len(rows) < few_rows * E or len(rows) * H * rows.element_size() < HIDDEN_FITS
    fast = rows.is_cuda or compiling or (small and E > 1)       # one expert is a plain MLP
    takes = (torch.bfloat16,) if compiling else (torch.bfloat16, torch.float16, torch.float32)
    return fast and aligned and rows.dtype in takes


# --- 4. the same products, and a backward by hand that keeps less ---

def lean(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    """What must be kept for the backward pass? x, z before the GELU, the gates and the plan.

    Per token these are D + K*H elements for x and z, and less than 64*K bytes for the rest. With
    return_choices=True raw is kept too, K*D elements more. There are no second derivatives: for
    those take `grouped`, whose backward autograd writes.
    """
    weights = w_in, b_in, w_out, b_out
    if not return_choices:
        return Lean.apply(x, chosen, gates, *weights)
    return gated_sum(Lean.apply(x, chosen, None, *weights), gates, True)


class Lean(torch.autograd.Function):
    """y (T, D), or raw (T, K, D) where gates is None.

    The backward of one choice, with d = dL/dy of its token, is

        da = W_out d      dgate = <da, gelu(z)> + <d, b_out>      dz = gate da gelu'(z)

    It reads no expert's output, for d(gate) comes from da (SonicMoE, arXiv:2512.14080), and it
    computes gelu(z) again from z. So neither is kept.
    """

    @staticmethod
    def forward(ctx, x, chosen, gates, w_in, b_in, w_out, b_out):
        (T, K), plan = chosen.shape, plan_choices(chosen, len(w_in))
        ctx.K = K                                                       # len(z) / T, but T may be 0
        w_in, w_out = w_in.contiguous(), w_out.contiguous()             # as in grouped_mm_mlp
        rows = x.index_select(0, plan.order // K)                       # (S, D)
        z, out = rows.new_empty(len(rows), w_in.shape[2]), torch.empty_like(rows)
        for r, e, b, mm, _ in groups(plan, rows, w_in):
            z[r] = mm(rows[r], w_in[e]).add_(b_in[b])                   # (S, H)
            out[r] = mm(F.gelu(z[r]), w_out[e]).add_(b_out[b])          # (S, D) still sorted
        raw = torch.empty_like(out).index_copy_(0, plan.order, out).view(T, K, x.shape[1])
        ctx.save_for_backward(x, gates, z, *plan, w_in, w_out, b_out)
        return raw if gates is None else gated_sum(raw, gates, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gates, z, *plan, w_in, w_out, b_out = ctx.saved_tensors
        (T, D), K, plan = x.shape, ctx.K, Plan(*plan)
        wide = torch.promote_types(x.dtype, torch.float32)              # dgate is a sum of products
        ungated = gates is None                                         # dout (T, K, D), not (T, D)
        d = dout.reshape(-1, D).index_select(0, plan.order if ungated else plan.order // K)
        rows = x.index_select(0, plan.order // K)                       # (S, D), and so is d
        gate = None if ungated else gates.flatten()[plan.order, None]   # (S, 1)
        dx, dgate = torch.empty_like(rows), rows.new_empty(len(rows), dtype=wide)
        dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
        db_in, db_out = w_in.new_empty(w_in.shape[::2]), torch.empty_like(b_out)
        for r, e, b, mm, per_expert in groups(plan, rows, w_in):
            a, da, dr = F.gelu(z[r]), mm(d[r], w_out[e].mT), d[r]       # (S, H), (S, H), (S, D)
            if not ungated:
                dgate[r] = (da.to(wide) * a).sum(dim=1) + (dr.to(wide) * b_out[b]).sum(dim=1)
                da, dr = da.mul_(gate[r]), dr.mul_(gate[r])             # from here on with the gate
            dz = torch.ops.aten.gelu_backward(da, z[r])
            dw_out[e], db_out[e] = mm(a.mT, dr), per_expert(dr)
            dw_in[e], db_in[e] = mm(rows[r].mT, dz), per_expert(dz)
            dx[r] = mm(dz, w_in[e].mT)
        dx = torch.empty_like(dx).index_copy_(0, plan.order, dx).view(T, K, D).sum(dim=1)
        if not ungated:
            dgate = torch.empty_like(dgate).index_copy_(0, plan.order, dgate).view(T, K)
        return dx, None, None if ungated else dgate.to(gates.dtype), dw_in, db_in, dw_out, db_out


def groups(plan, rows, w_in):
    """What is multiplied in one call? All rows, by grouped_mm, or else one expert's at a time.

    Yields (its rows, its matrices, the bias of each row, the product, the sum over an expert's
    rows) for each call.
    """
    if use_grouped_mm(rows, w_in):
        one_hot = F.one_hot(plan.ids, len(w_in)).to(rows.dtype)         # (S, E)
        product = partial(F.grouped_mm, offs=plan.offsets[1:].int())
        yield slice(None), slice(None), plan.ids, product, partial(torch.mm, one_hot.mT)
    else:
        # all products of one expert in a row: the next finds its hidden rows still in the cache
        for e, (start, end) in enumerate(pairwise(plan.offsets.tolist())):
            yield slice(start, end), e, e, torch.mm, partial(torch.sum, dim=0)


# --- 5. what happens between two products happens inside them ---
#
# Rows are gathered while a product loads them and scattered while it stores them (scattermoe,
# arXiv:2403.08245). Bias, GELU, gates and sums work on a product's numbers while these are still in
# registers, in its epilogue (SonicMoE, arXiv:2512.14080). Two kernels serve six products:
#
#     grouped_gemm  up    x at order // K, times w_in          -> z and gelu(z)
#                   down  gelu(z), times w_out                 -> out, at order
#                   da    dy, times w_out^T                    -> dz, gate gelu(z), d(gate), db_in
#                   dx    dz, times w_in^T                     -> dx, at order
#     grouped_dw    each expert's a^T b                        -> dw_in, dw_out
#
# Backward gathers its rows of x and dy once, before the products. A sum over rows that looked each
# of them up through `order` was slower, by more than the gathers cost.

def fused(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    """What must still pass through memory? What six products move, and 3*S*H + 4*S*D numbers more.

    Notebook 4 counts them. `fused` keeps for its backward what `lean` keeps, and it has no second
    derivatives either. torch.compile sees two operations, and nothing of what happens inside.
    """
    x = x if x.stride(1) == 1 else x.contiguous()           # a row's numbers lie side by side
    chosen = chosen.contiguous()        # the router's are a view into all E, which would be kept
    weights = w_in, b_in, w_out, b_out
    if not return_choices:
        return fused_forward(x, chosen, gates, *weights)[0]
    return gated_sum(fused_forward(x, chosen, None, *weights)[0], gates, True)


@torch.library.custom_op(f"{__name__}::fused", mutates_args=())
def fused_forward(
        x: Tensor, chosen: Tensor, gates: Tensor | None, w_in: Tensor, b_in: Tensor, w_out: Tensor,
        b_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (T, D), or raw (T, K, D) where gates is None, and what the backward reads: z (S, H), a
    Plan's order and offsets, and its Tiles.

    The host never reads how many rows an expert has, so one CUDA graph serves every routing.
    """
    (T, K), (E, D, H), S = chosen.shape, w_in.shape, chosen.numel()
    blocks, plan = choose_blocks(S, E, x.dtype), plan_choices(chosen, E)
    tiles = plan_tiles(plan.offsets, S, blocks["up"].rows)
    z, a = x.new_empty(S, H), x.new_empty(S, H)             # two tensors: z is kept, a is freed
    raw = x.new_empty(S, D)                                 # row s is choice s, not sorted
    gemm("up", blocks, plan, tiles, x, w_in, a, shared_by=K, bias=b_in, z=z)
    gemm("down", blocks, plan, tiles, a, w_out, raw, bias=b_out, gates=gates)
    y = raw.view(T, K, D) if gates is None else over_choices(raw, K)
    return y, z, *plan[1:], *tiles


@fused_forward.register_fake
def _(x, chosen, gates, w_in, b_in, w_out, b_out):
    (T, K), (E, D, H), S = chosen.shape, w_in.shape, chosen.numel()
    tiles = -(-S // choose_blocks(S, E, x.dtype)["up"].rows) + E
    y = x.new_empty((T, K, D) if gates is None else (T, D))
    return y, x.new_empty(S, H), *(chosen.new_empty(n) for n in (S, E + 1, tiles, tiles))


@torch.library.custom_op(f"{__name__}::fused_backward", mutates_args=())
def fused_backward(
        dout: Tensor, x: Tensor, chosen: Tensor, gates: Tensor | None, w_in: Tensor, w_out: Tensor,
        b_out: Tensor, z: Tensor, order: Tensor, offsets: Tensor, expert: Tensor, start: Tensor
        ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, gates, w_in, b_in, w_out and b_out; that of gates that are None is empty.
    """
    plan, tiles = Plan(None, order, offsets), Tiles(expert, start)
    (T, K), (E, D, H), S = chosen.shape, w_in.shape, len(z)
    blocks = choose_blocks(S, E, x.dtype)
    dout = dout.reshape(-1, D)
    shared = 1 if gates is None else K                      # choices per row of dout
    rows, d = x.index_select(0, order // K), dout.index_select(0, order // shared)  # (S, D) sorted
    dz, a, dx = (x.new_empty(S, n) for n in (H, H, D))
    dgates = z.new_empty(S, -(-H // blocks["da"].columns), dtype=torch.float32)
    db = z.new_zeros(len(tiles.expert), H, dtype=torch.float32)
    gemm("da", blocks, plan, tiles, d, w_out.mT, dz, gates=gates, z=z, gated_a=a, dgates=dgates,
         db=db)
    gemm("dx", blocks, plan, tiles, dz, w_in.mT, dx)
    dw_in, dw_out = gemm_dw(blocks, plan, rows, dz), gemm_dw(blocks, plan, a, d)
    # the gradients of biases are products with a side of E, small enough for torch
    every = torch.arange(E, device=x.device)
    db_in = (every[:, None] == tiles.expert).float() @ db               # (E, tiles) @ (tiles, H)
    weight = (chosen[..., None] == every).float()                       # (T, K, E)
    if gates is None:
        dgates = dgates.new_empty(0)
    else:
        wide = x.dtype if x.dtype == torch.bfloat16 else torch.float32  # float16 could overflow
        dots = dout.to(wide) @ b_out.to(wide).mT                        # (T, E)
        dgates = dgates.sum(dim=1).view(T, K) + dots.gather(1, chosen)
        dgates, weight = dgates.to(gates.dtype), weight * gates[..., None]
    db_out = weight.view(-1, shared, E).sum(dim=1).to(x.dtype).mT @ dout            # (E, D)
    return over_choices(dx, K), dgates, dw_in, db_in.to(x.dtype), dw_out, db_out


@fused_backward.register_fake
def _(dout, x, chosen, gates, w_in, w_out, b_out, z, order, offsets, expert, start):
    E, D, H = w_in.shape
    dgates = z.new_empty(0, dtype=torch.float32) if gates is None else torch.empty_like(gates)
    return (x.new_empty(x.shape), dgates, w_in.new_empty(E, D, H), x.new_empty(E, H),
            w_out.new_empty(E, H, D), x.new_empty(E, D))


def keep_for_backward(ctx, inputs, output):
    x, chosen, gates, w_in, _, w_out, b_out = inputs
    ctx.set_materialize_grads(False)                        # no gradient of zeros for z
    ctx.save_for_backward(x, chosen, gates, w_in, w_out, b_out, *output[1:])


@once_differentiable
def backward_of_fused(ctx, dy, *_):
    dx, dgates, *dw = fused_backward(dy, *ctx.saved_tensors)
    return dx, None, dgates if ctx.needs_input_grad[2] else None, *dw


fused_forward.register_autograd(backward_of_fused, setup_context=keep_for_backward)


def over_choices(rows, K):
    """Add up each token's K rows of (S, D) -> (T, D), in their dtype: autocast's sum is float32."""
    return rows if K == 1 else rows.view(-1, K, rows.shape[1]).sum(dim=1, dtype=rows.dtype)


class Tiles(NamedTuple):
    """Which rows does each program compute? A tile holds rows of one expert alone."""
    expert: Tensor           # (ceil(S / rows) + E,) whose rows; E if the tile is not needed
    start: Tensor            # the tile's first row


def plan_tiles(offsets, S, rows):
    """Cut every expert's rows into tiles. ceil(S / rows) + E are enough, however tokens choose.

    >>> plan_tiles(torch.tensor([0, 2, 2, 7]), S=7, rows=4)
    Tiles(expert=tensor([0, 2, 2, 3, 3]), start=tensor([0, 2, 6, 0, 0]))
    """
    E = len(offsets) - 1
    ends = ((offsets.diff() + rows - 1) // rows).cumsum(0)              # (E,) tiles up to e
    tile = torch.arange(-(-S // rows) + E, device=offsets.device)
    expert = torch.searchsorted(ends, tile, right=True)
    first = F.pad(ends, (1, 0))                                         # (E+1,) tiles before e
    start = offsets[expert] + (tile - first[expert]) * rows
    return Tiles(expert, torch.where(expert < E, start, 0))


class Block(NamedTuple):
    """How large a part of its result does one program compute, and in what steps?"""
    rows: int
    columns: int
    step: int                # along the sums, at a time
    warps: int
    stages: int              # steps that are loaded ahead


def choose_blocks(S, E, dtype):
    """Three fixed choices, ours, by shape and dtype. Trying out others would wait for the GPU.

    Returns a `Block` for each product; all but "dw" share tiles, and so their rows. Those for half
    precision are the fastest of 64 rows by `notebooks/tiles.py` on an H200: 128 rows are about as
    fast there, and waste more on small experts. The others were never timed.
    """
    if S < 64 * E:
        block = Block(rows=32, columns=32, step=16, warps=4, stages=2)
        return dict.fromkeys(("up", "down", "da", "dx"), block) | {"dw": block._replace(stages=4)}
    if dtype == torch.float32:
        block = Block(rows=64, columns=64, step=32, warps=4, stages=2)
        return {"up": block, "down": block, "da": block._replace(columns=32), "dx": block,
                "dw": block._replace(stages=4)}
    wide = Block(rows=64, columns=128, step=64, warps=4, stages=3)
    return {"up": Block(rows=64, columns=64, step=32, warps=4, stages=4), "down": wide,
            "da": Block(rows=64, columns=64, step=64, warps=4, stages=3), "dx": wide,
            "dw": Block(rows=128, columns=128, step=64, warps=8, stages=6)}


def gemm(epilogue, blocks, plan, tiles, a, w, out, shared_by=0, bias=None, gates=None, z=None,
         gated_a=None, dgates=None, db=None):
    """Launch `grouped_gemm`. Each row of a serves `shared_by` choices; 0: its rows are sorted."""
    (E, depth, width), block = w.shape, blocks[epilogue]
    bias, gates = (v if v is None else v.contiguous() for v in (bias, gates))
    with torch.cuda.device_of(a):
        grouped_gemm[(len(tiles.expert) * -(-width // block.columns),)](
            a, w, out, bias, gates, z, gated_a, dgates, db, plan.order, plan.offsets, *tiles,
            a.stride(0), *w.stride(), E, depth, width, shared_by, epilogue, PRECISION,
            *block[:3], num_warps=block.warps, num_stages=block.stages)


def gemm_dw(blocks, plan, a, b):
    """Launch `grouped_dw`: each expert's a^T b, of sorted rows -> (E, columns of a, columns of b).
    """
    (E, height, width), block = (len(plan.offsets) - 1, a.shape[1], b.shape[1]), blocks["dw"]
    dw = a.new_empty(E, height, width)
    with torch.cuda.device_of(a):
        grouped_dw[(E * -(-height // block.rows) * -(-width // block.columns),)](
            a, b, dw, plan.offsets, height, width, PRECISION, *block[:3],
            num_warps=block.warps, num_stages=block.stages)
    return dw


PRECISION = "ieee"       # float32 products in float32, not TF32; half precision ignores it


@jit
def grouped_gemm(A, W, OUT,                  # A (., DEPTH), W (E, DEPTH, WIDTH), OUT (S, WIDTH)
                 BIAS, GATES, Z, GATED_A,    # (E, WIDTH), (S,), (S, WIDTH), (S, WIDTH)
                 DGATES, DB,                 # (S, blocks across WIDTH), (tiles, WIDTH)
                 ORDER, OFFSETS, EXPERT, START,      # a Plan and its Tiles
                 stride_a, stride_we, stride_wd, stride_wc,
                 E: constexpr, DEPTH: constexpr, WIDTH: constexpr, SHARED_BY: constexpr,
                 EPILOGUE: constexpr, PRECISION: constexpr,
                 ROWS: constexpr, COLUMNS: constexpr, STEP: constexpr):
    """One program: ROWS rows of one expert's times COLUMNS columns of its matrix."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // across                # neighbours share rows of A, so L2 has them
    part = tl.program_id(0) % across
    e = tl.load(EXPERT + tile)                       # int64, like the whole plan: there may be
    if e == E:                                       # more than 2**31 numbers in Z or in W
        return
    r = tl.load(START + tile) + tl.arange(0, ROWS)
    alive = r < tl.load(OFFSETS + e + 1)
    choice = tl.load(ORDER + r, mask=alive, other=0)
    row = choice // SHARED_BY if SHARED_BY else r
    i = tl.arange(0, STEP)
    c = part * COLUMNS + tl.arange(0, COLUMNS)
    a_at = A + row[:, None] * stride_a + i[None, :]
    w_at = W + e * stride_we + i[:, None] * stride_wd + c[None, :] * stride_wc
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(0, DEPTH, STEP):
        inside = i < DEPTH - done
        a = tl.load(a_at, mask=alive[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at, mask=inside[:, None] & (c < WIDTH)[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        a_at += STEP
        w_at += STEP * stride_wd

    dtype = OUT.dtype.element_ty
    mask = alive[:, None] & (c < WIDTH)[None, :]
    here = r[:, None] * WIDTH + c[None, :]           # sorted by expert
    there = choice[:, None] * WIDTH + c[None, :]     # in the tokens' own order again
    if BIAS is not None:
        acc += tl.load(BIAS + e * WIDTH + c, mask=c < WIDTH, other=0.0).to(tl.float32)[None, :]
    gate = tl.full((ROWS, 1), 1.0, tl.float32)
    if GATES is not None:
        gate = tl.load(GATES + choice, mask=alive, other=0.0).to(tl.float32)[:, None]
    if EPILOGUE == "up":
        z = acc.to(dtype)                            # rounded here, as backward will read it
        tl.store(Z + here, z, mask=mask)
        tl.store(OUT + here, gelu(z.to(tl.float32))[0].to(dtype), mask=mask)
    elif EPILOGUE == "down":
        tl.store(OUT + there, (acc * gate).to(dtype), mask=mask)
    elif EPILOGUE == "dx":
        tl.store(OUT + there, acc.to(dtype), mask=mask)
    else:
        # "da", one half of the columns after the other: fewer numbers are in registers at a time,
        # so an SM holds more programs, and one computes while another waits
        left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        c = part * COLUMNS + tl.arange(0, COLUMNS // 2)
        dgate = backward_of_gelu(left, gate, c, r, alive, tile, Z, OUT, GATED_A, DB, WIDTH)
        c += COLUMNS // 2
        dgate += backward_of_gelu(right, gate, c, r, alive, tile, Z, OUT, GATED_A, DB, WIDTH)
        # this block's share of <da, a>; no atomics, so two runs give the same bits
        tl.store(DGATES + choice * across + part, dgate, mask=alive)


@jit
def backward_of_gelu(da, gate, c, r, alive, tile, Z, DZ, GATED_A, DB, WIDTH: constexpr):
    """From da, dL/da before the gate, at rows r and columns c: stores dz, gate * a and this tile's
    share of db; returns each row's share of <da, a>.
    """
    mask = alive[:, None] & (c < WIDTH)[None, :]
    here = r[:, None] * WIDTH + c[None, :]
    a, slope = gelu(tl.load(Z + here, mask=mask, other=0.0).to(tl.float32))
    dz = da * gate * slope
    tl.store(DZ + here, dz.to(DZ.dtype.element_ty), mask=mask)
    tl.store(GATED_A + here, (a * gate).to(DZ.dtype.element_ty), mask=mask)
    tl.store(DB + tile * WIDTH + c, tl.sum(dz, 0), mask=c < WIDTH)
    return tl.sum(da * a, 1)


@jit
def gelu(z):
    """gelu(z) = z Phi(z) and its derivative Phi(z) + z phi(z)."""
    Phi = 0.5 * (1 + tl.math.erf(z * 0.7071067811865476))               # sqrt(1/2)
    phi = 0.3989422804014327 * tl.exp(-0.5 * z * z)                     # sqrt(1/(2 pi))
    return z * Phi, Phi + z * phi


@jit
def grouped_dw(A, B, DW,                     # A (S, HEIGHT), B (S, WIDTH), DW (E, HEIGHT, WIDTH)
               OFFSETS, HEIGHT: constexpr, WIDTH: constexpr, PRECISION: constexpr,
               ROWS: constexpr, COLUMNS: constexpr, STEP: constexpr):
    """One program: ROWS x COLUMNS of one expert's gradient, over all its rows; 0 if it has none."""
    down: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    e = (tl.program_id(0) // (across * down)).to(tl.int64)
    h = tl.program_id(0) // across % down * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(OFFSETS + e + 1)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(tl.load(OFFSETS + e), end, STEP):
        r = start + tl.arange(0, STEP).to(tl.int64)
        alive = r < end
        a = tl.load(A + r[None, :] * HEIGHT + h[:, None],
                    mask=(h < HEIGHT)[:, None] & alive[None, :], other=0.0)     # (ROWS, STEP)
        b = tl.load(B + r[:, None] * WIDTH + c[None, :],
                    mask=alive[:, None] & (c < WIDTH)[None, :], other=0.0)      # (STEP, COLUMNS)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = e * HEIGHT * WIDTH + h[:, None] * WIDTH + c[None, :]
    mask = (h < HEIGHT)[:, None] & (c < WIDTH)[None, :]
    tl.store(DW + at, acc.to(DW.dtype.element_ty), mask=mask)


# --- the one name that the model calls ---

BACKENDS = {"reference": reference, "sliced": sliced, "grouped": grouped, "lean": lean,
            "fused": fused}


def expert_mlp(x, chosen, gates, w_in, b_in, w_out, b_out, backend="auto", return_choices=False):
    """Send each token through its chosen experts and add up their gated outputs.

    x (T, D); chosen (T, K) int64; gates (T, K); w_in (E, D, H); b_in (E, H); w_out (E, H, D);
    b_out (E, D). Returns y (T, D), or (y, raw (T, K, D)) with return_choices=True. "auto" runs
    everywhere; a backend that cannot run raises RuntimeError and says why. torch.compile takes
    "auto" in one graph in bfloat16 and "fused" in any precision; in torch.export "auto" is
    "reference".
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"there is no backend {backend!r}: choose auto, {', '.join(BACKENDS)}")
    if backend == "fused" and (why := why_not_fused(x, w_in)):
        raise RuntimeError(f"backend='fused' cannot run here: {why}; choose auto")
    check_operands(x, chosen, gates, w_in, b_in, w_out, b_out)
    if backend == "auto":
        backend = choose_rung()
    return BACKENDS[backend](x, chosen, gates, w_in, b_in, w_out, b_out, return_choices)


def choose_rung():
    """Which rung is "auto"? `grouped`, on every device and in every dtype, but not in torch.export,
    whose program must hold every expert, nor in torch.func.

    Its grad and jvp differentiate plain operations alone, those of `sliced`; a Function that they
    too could enter takes four times as long to call.
    """
    if torch.compiler.is_exporting():
        return "reference"
    if torch.compiler.is_compiling():
        return "grouped"
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if any("Vmap" in str(transform.key()) for transform in transforms):
        return "reference"                                  # no slices of many routings at once
    return "sliced" if transforms or torch.autograd.forward_ad._current_level >= 0 else "grouped"


def check_operands(x, chosen, gates, w_in, b_in, w_out, b_out):
    """Refuse what no rung could compute, or would compute wrongly."""
    E, D, H = expect("w_in", w_in, "E", "D", "H")
    T, K = expect("chosen", chosen, x.shape[0], "K", below=E)
    for name, v, *sizes in (("x", x, T, D), ("gates", gates, T, K), ("b_in", b_in, E, H),
                            ("w_out", w_out, E, H, D), ("b_out", b_out, E, D)):
        expect(name, v, *sizes)
    for name, v in (("w_in", w_in), ("b_in", b_in), ("w_out", w_out), ("b_out", b_out)):
        if v.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype}, as x is, not {v.dtype}")


# --- on a GPU that we have never seen: is `fused` right there, and is it the faster? ---

def contest(T, D, H, E, K, dtype, device, compiled=False, rounds=3, steps=10):
    """What is `fused` worth beside `grouped`, for a layer of these sizes? Returns two ratios to it.

    The first is of errors, by float64 on 64*E tokens: the largest among y and all gradients. The
    second is a list of one ratio of times per round, each of some forward and backward passes of T
    tokens, compiled or not.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size, of=1, dtype=dtype):
        t = torch.randn(size, generator=generator, device=device) / of ** 0.5
        return t.to(dtype).requires_grad_()

    def layer(T):
        chosen = torch.rand(T, E, generator=generator, device=device).argsort(dim=1)[:, :K]
        return chosen, [randn(T, D), randn(T, K, dtype=torch.float32), randn(E, D, H, of=D),
                        randn(E, H), randn(E, H, D, of=H), randn(E, D)]

    def results(rung, chosen, tensors, mlp=expert_mlp):
        y = mlp(tensors[0], chosen, *tensors[1:], rung)
        return y, *torch.autograd.grad(y, tensors, tensors[0].detach())

    chosen, tensors = layer(min(T, 64 * E))                     # the same block sizes as with T
    truth = results("reference", chosen, [t.detach().double().requires_grad_() for t in tensors])
    off = [[((a.double() - t).abs().max() / t.abs().max()).item()
            for a, t in zip(results(rung, chosen, tensors), truth, strict=True)]
           for rung in ("fused", "grouped")]
    tiny = 8 * torch.finfo(torch.float32).eps                   # float32 sums in another order
    error = max(ours / (its + tiny) for ours, its in zip(*off, strict=True))

    chosen, tensors = layer(T)
    mlp = torch.compile(expert_mlp, dynamic=False) if compiled else expert_mlp
    times = {"fused": [], "grouped": []}
    for i in range(rounds + 1):                                 # the first one warms up
        for rung, seconds in times.items():
            began = time.perf_counter()
            for _ in range(steps):
                dx = results(rung, chosen, tensors, mlp)[1]
            dx.sum().item()                                     # waits for the GPU
            seconds += [time.perf_counter() - began] if i else []
    return error, [ours / its for ours, its in zip(*times.values(), strict=True)]


def why_not_fused(x, w_in):
    """Why can the kernels not take these tensors? One clause, or None if they can."""
    if triton is None:
        return "Triton is not installed"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.dtype != w_in.dtype:
        return f"it multiplies two of float32, float16 or bfloat16, not {x.dtype} and {w_in.dtype}"
    if not x.is_cuda and not INTERPRETED:
        return f"the tensors are on the {x.device.type} and TRITON_INTERPRET=1 was not set"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU is older than compute capability 8.0, the least that Triton compiles for"
    return None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"     # Triton read it when it was imported
