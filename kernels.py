"""kernels.py -- how does every token get through its own experts and no others?

A ladder of rungs, clearest first: reference, grouped, lean, triton. Each is called as

    rung(x (T, D), experts (T, K), gates (T, K),
         w_in (E, D, H), b_in (E, H), w_out (E, H, D), b_out (E, D), return_choices=False)

and returns y (T, D), y_t = sum_k gates_tk MLP_{experts_tk}(x_t), and with return_choices=True also
raw (T, K, D), the experts' outputs before their gates. The gates multiply in their own float32.
The tests trust only the first rung. `expert_mlp`, at the end, is the one name that others import.
S = T*K is the number of choices: choice s = t*K + k is token t's k-th.
"""
import os
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    jit, constexpr = triton.jit, tl.constexpr
except ImportError:      # Windows, macOS: the three rungs in torch are complete without it
    triton, jit, constexpr = None, lambda kernel: kernel, None

# --- 1. the definition: every expert on every token, then keep the chosen ones ---

def reference(x, experts, gates, w_in, b_in, w_out, b_out, return_choices=False):
    """What is to be computed? At E / K times the necessary work."""
    everything = torch.stack([
        F.gelu(x @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e] for e in range(len(w_in))
    ], dim=1)                                                           # (T, E, D)
    raw = everything.gather(1, experts[..., None].expand(-1, -1, x.shape[1]))
    return gated_sum(raw, gates, return_choices)


def gated_sum(raw, gates, return_choices):
    """y (T, D), and raw (T, K, D) itself where it was asked for."""
    y = raw * gates[..., None]
    # a sum over one choice would only copy it, forward and backward
    y = (y.sum(dim=1) if y.shape[1] > 1 else y.squeeze(1)).to(raw.dtype)
    return (y, raw) if return_choices else y


# --- 2. sort the choices by expert, multiply group by group, undo the sort ---

class Plan(NamedTuple):
    """The choices in the order in which they are computed: expert 0's first, then expert 1's."""
    ids: Tensor              # (S,) the expert of each row, ascending
    order: Tensor            # (S,) the choice computed in each row, of token order[r] // K
    offsets: Tensor          # (E+1,) expert e has the rows offsets[e] up to offsets[e+1]


def plan(experts, E):
    """Where does each choice go? Sorting answers, and the host need not know any group's size.

    >>> plan(torch.tensor([[2, 0], [0, 3]]), E=4)
    Plan(ids=tensor([0, 0, 2, 3]), order=tensor([1, 2, 0, 3]), offsets=tensor([0, 2, 2, 3, 4]))
    """
    ids, order = experts.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(E + 1, device=ids.device))
    return Plan(ids, order, offsets)


def grouped(x, experts, gates, w_in, b_in, w_out, b_out, return_choices=False):
    """How do the other experts cost nothing? Each multiplies its own rows; autograd does the rest.

    grouped_mm where it takes the tensors and is the faster, a slice per expert elsewhere.
    """
    (T, D), K = x.shape, experts.shape[1]
    p = plan(experts, len(w_in))
    undo = torch.empty_like(p.order).scatter_(0, p.order, torch.arange(T * K, device=x.device))
    choices = x[:, None].expand(T, K, D).reshape(T * K, D)              # (S, D) a row per choice
    rows = Permute.apply(choices, p.order, undo)                        # (S, D) now by expert
    mlp = grouped_mm_mlp if _grouped_mm_takes(rows, w_in, FEW_ROWS) else sliced_mlp
    out = mlp(rows, p, w_in, b_in, w_out, b_out)                        # (S, D) still by expert
    raw = Permute.apply(out, undo, p.order).view(T, K, D)
    return gated_sum(raw, gates, return_choices)


class Permute(torch.autograd.Function):
    """rows (S, n) in another order: row i of the result is rows[order[i]]; `undo` leads back.

    The gradient takes the way back. Autograd, which cannot know that no row is asked for twice,
    would add the rows one by one to a tensor of zeros.
    """

    @staticmethod
    def forward(ctx, rows, order, undo):
        ctx.save_for_backward(undo)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, d):
        undo, = ctx.saved_tensors
        return d.index_select(0, undo), None, None


def sliced_mlp(rows, p, w_in, b_in, w_out, b_out):
    """The experts' MLPs on rows (S, D) sorted by expert: two plain products per expert."""
    sizes = p.offsets.diff().tolist()                                # 0 for an idle expert
    # unbind once: indexing w_in[e] in the loop would write a full-size zero gradient per expert
    weights = zip(w_in.unbind(), b_in.unbind(), w_out.unbind(), b_out.unbind(), strict=True)
    out = []
    for group, (wi, bi, wo, bo) in zip(rows.split(sizes), weights, strict=True):
        out.append(torch.addmm(bo, F.gelu(torch.addmm(bi, group, wi)), wo))
    return torch.cat(out)                                               # (S, D)


def grouped_mm_mlp(rows, p, w_in, b_in, w_out, b_out):
    """The same in two launches; grouped_mm has no bias, so it is added by hand."""
    ends = p.offsets[1:].int()
    # a GPU would have to be waited for, and a compiler wants no sizes that change with every batch
    known = not (rows.is_cuda or torch.compiler.is_compiling())
    sizes = p.offsets.diff().tolist() if known else None
    z = OwnBias.apply(F.grouped_mm(rows, w_in, offs=ends), b_in, p.ids, sizes)            # (S, H)
    return OwnBias.apply(F.grouped_mm(F.gelu(z), w_out, offs=ends), b_out, p.ids, sizes)  # (S, D)


class OwnBias(torch.autograd.Function):
    """out (S, n) plus the bias of each row's own expert, b (E, n) at ids (S,).

    Where the host knows the experts' `sizes`, in place, expert by expert: no second tensor.
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
    def backward(ctx, d):
        ids, = ctx.saved_tensors
        if ctx.sizes is None:
            # autograd would add row by row, in any order; a product with one-hot rows does not
            return d, F.one_hot(ids, ctx.E).to(d.dtype).mT @ d, None, None
        return d, torch.stack([rows.sum(dim=0) for rows in d.split(ctx.sizes)]), None, None


# Where one call is faster than slices on a CPU too: where all hidden rows (S, H) are so few bytes
# that passes over them stay in the cache, and, for `grouped` alone, where experts have so few rows
# each that gathering their weights' gradients costs more than the products. Both were chosen by
# timing, and notebooks/results/kernels_cpu.json has cases on both sides of each.
HIDDEN_FITS = 8 * 2 ** 20
FEW_ROWS = 200


def _grouped_mm_takes(rows, w_in, few_rows=0):
    """Whether grouped_mm is the better product for rows (S, D) and accepts these tensors."""
    aligned = all(n * rows.element_size() % 16 == 0 for n in w_in.shape[1:])  # rows of 16 bytes
    compiling, (E, _, H) = torch.compiler.is_compiling(), w_in.shape
    small = len(rows) < few_rows * E or len(rows) * H * rows.element_size() < HIDDEN_FITS
    fast = rows.is_cuda or compiling or (small and E > 1)       # one expert is a plain MLP
    half = rows.dtype in (torch.bfloat16, torch.float16)   # all that it takes while compiling
    return fast and aligned and (half or (rows.dtype == torch.float32 and not compiling))


# --- 3. the same products, and a backward by hand that keeps less ---

def lean(x, experts, gates, w_in, b_in, w_out, b_out, return_choices=False):
    """What must be kept for the backward pass? x, the pre-activations, the gates and the plan.

    That is D + K*H elements and less than 64 K bytes per token. return_choices=True keeps raw as
    well, K*D elements more. For second derivatives take `grouped`: autograd wrote its backward.
    """
    weights = w_in, b_in, w_out, b_out
    if not return_choices:
        return Lean.apply(x, experts, gates, *weights)
    return gated_sum(Lean.apply(x, experts, None, *weights), gates, True)


class Lean(torch.autograd.Function):
    """y (T, D), or raw (T, K, D) where gates is None. With d = dL/dy, for one choice

        da = W_out d      dgate = <da, gelu(z)> + <d, b_out>      dz = gate da gelu'(z)

    so that neither gelu(z) nor raw is needed again (d(gate) from da: SonicMoE, arXiv:2512.14080).
    """

    @staticmethod
    def forward(ctx, x, experts, gates, w_in, b_in, w_out, b_out):
        (T, K), p = experts.shape, plan(experts, len(w_in))
        ctx.K = K                                                       # len(z) / T, were T not 0
        rows = x.index_select(0, p.order // K)                          # (S, D)
        z, out = rows.new_empty(len(rows), w_in.shape[2]), torch.empty_like(rows)
        for r, e, b, mm, _ in groups(p, rows, w_in):
            z[r] = mm(rows[r], w_in[e]).add_(b_in[b])                   # (S, H)
            out[r] = mm(F.gelu(z[r]), w_out[e]).add_(b_out[b])          # (S, D) still by expert
        raw = torch.empty_like(out).index_copy_(0, p.order, out).view(T, K, x.shape[1])
        ctx.save_for_backward(x, gates, z, *p, w_in, w_out, b_out)
        return raw if gates is None else gated_sum(raw, gates, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gates, z, *p, w_in, w_out, b_out = ctx.saved_tensors
        (T, D), K, p = x.shape, ctx.K, Plan(*p)
        wide = torch.promote_types(x.dtype, torch.float32)              # sums of products are
        choices = gates is None                                         # dout (T, K, D) or (T, D)
        d = dout.reshape(-1, D).index_select(0, p.order if choices else p.order // K)
        rows = x.index_select(0, p.order // K)                          # (S, D), as is d
        gate = None if choices else gates.flatten()[p.order, None]      # (S, 1)
        dx, dgate = torch.empty_like(rows), rows.new_empty(len(rows), dtype=wide)
        dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
        db_in, db_out = w_in.new_empty(w_in.shape[::2]), torch.empty_like(b_out)
        for r, e, b, mm, per_expert in groups(p, rows, w_in):
            a, da, dr = F.gelu(z[r]), mm(d[r], w_out[e].mT), d[r]       # (S, H), (S, H), (S, D)
            if not choices:
                dgate[r] = (da.to(wide) * a).sum(dim=1) + (dr.to(wide) * b_out[b]).sum(dim=1)
                da, dr = da.mul_(gate[r]), dr.mul_(gate[r])             # from here on gated
            dz = torch.ops.aten.gelu_backward(da, z[r])
            dw_out[e], db_out[e] = mm(a.mT, dr), per_expert(dr)
            dw_in[e], db_in[e] = mm(rows[r].mT, dz), per_expert(dz)
            dx[r] = mm(dz, w_in[e].mT)
        dx = torch.empty_like(dx).index_copy_(0, p.order, dx).view(T, K, D).sum(dim=1)
        if not choices:
            dgate = torch.empty_like(dgate).index_copy_(0, p.order, dgate).view(T, K)
        return dx, None, None if choices else dgate.to(gates.dtype), dw_in, db_in, dw_out, db_out


def groups(p, rows, w_in):
    """What is multiplied at once? All rows by grouped_mm, or else one expert's after another's.

    Yields (which rows, which matrices, which bias for each row, the product, sums per expert).
    """
    if _grouped_mm_takes(rows, w_in):
        one_hot = F.one_hot(p.ids, len(w_in)).to(rows.dtype)            # (S, E)
        product = partial(F.grouped_mm, offs=p.offsets[1:].int())
        yield slice(None), slice(None), p.ids, product, partial(torch.mm, one_hot.mT)
    else:
        # one expert at a time, for its tile of H stays in the cache from product to product
        for e, (start, end) in enumerate(pairwise(p.offsets.tolist())):
            yield slice(start, end), e, e, torch.mm, partial(torch.sum, dim=0)


# --- 4. one launch per product, everything between the products inside it ---
#
# After scattermoe (arXiv:2403.08245: rows gathered on the way into a product, scattered on the way
# out) and SonicMoE (arXiv:2512.14080: what Lean does, in the products' epilogues). Two kernels:
#
#     grouped_gemm  up    x at order // K, times w_in          -> z and gelu(z)
#                   down  gelu(z), times w_out                 -> out, at order
#                   da    dy at order // K, times w_out^T      -> dz, gate gelu(z), d(gate), db_in
#                   dx    dz, times w_in^T                     -> dx, at order
#     grouped_dw    each expert's a^T b                        -> dw_in, dw_out

def fused(x, experts, gates, w_in, b_in, w_out, b_out, return_choices=False):
    """What must still move through memory? x, z, gelu(z) and the outputs, hardly anything twice.

    Keeps for backward what `lean` keeps, and has first derivatives only, as it has.
    """
    weights = w_in, b_in, w_out, b_out
    if not return_choices:
        return Fused.apply(x, experts, gates, *weights)
    return gated_sum(Fused.apply(x, experts, None, *weights), gates, True)


class Fused(torch.autograd.Function):
    """Lean in two kernels. The host learns no group's size, so a CUDA graph can hold all of it."""

    @staticmethod
    def forward(ctx, x, experts, gates, w_in, b_in, w_out, b_out):
        (T, K), (E, D, H) = experts.shape, w_in.shape
        tile, p = choose_tile(T * K, E, x.dtype), plan(experts, E)
        tiles = plan_tiles(p.offsets, T * K, tile.rows)
        x = x if x.stride(1) == 1 else x.contiguous()                   # strided rows are welcome
        z, a = x.new_empty(T * K, H), x.new_empty(T * K, H)             # apart, for z alone is kept
        raw = x.new_empty(T * K, D)                                     # row s is choice s's
        gemm("up", tile, p, tiles, x, w_in, a, shared_by=K, bias=b_in, z=z)
        gemm("down", tile, p, tiles, a, w_out, raw, bias=b_out, gates=gates)
        # contiguous: the router's choices are a view of all E, sorted
        ctx.save_for_backward(x, experts.contiguous(), gates, z, *p[1:], *tiles, w_in, w_out, b_out)
        return raw.view(T, K, D) if gates is None else over_choices(raw, K)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, experts, gates, z, *p, w_in, w_out, b_out = ctx.saved_tensors
        p, tiles, (T, K), (S, H) = Plan(None, *p[:2]), Tiles(*p[2:]), experts.shape, z.shape
        tile = choose_tile(S, len(w_in), x.dtype)
        dout = dout.reshape(-1, x.shape[1]).contiguous()                # .sum() gives strides of 0
        shared = 1 if gates is None else K                              # choices per row of dout
        dz, a, dx = (x.new_empty(S, n) for n in (H, H, x.shape[1]))
        dgates = z.new_empty(S, -(-H // tile.narrow), dtype=torch.float32)
        db = z.new_zeros(len(tiles.expert), H, dtype=torch.float32)
        gemm("da", tile, p, tiles, dout, w_out.mT, dz, shared_by=shared, gates=gates, z=z,
             gated_a=a, dgates=dgates, db=db)
        gemm("dx", tile, p, tiles, dz, w_in.mT, dx)
        dw_in = gemm_dw(tile, p, x, dz, a_shared_by=K)
        dw_out = gemm_dw(tile, p, a, dout, b_shared_by=shared)
        # what the biases take part in is small: torch itself, in float32, with E columns or rows
        every, dout = torch.arange(len(w_in), device=x.device), dout.float()
        db_in = (every[:, None] == tiles.expert).float() @ db           # (E, tiles) @ (tiles, H)
        weight = (experts[..., None] == every).float()                  # (T, K, E)
        if gates is not None:
            dgates = dgates.sum(dim=1).view(T, K) + (dout @ b_out.float().mT).gather(1, experts)
            weight = weight * gates[..., None]
        db_out = weight.view(-1, shared, len(w_in)).sum(dim=1).mT @ dout            # (E, D)
        return (over_choices(dx, K), None, None if gates is None else dgates.to(gates.dtype),
                dw_in, db_in.to(x.dtype), dw_out, db_out.to(x.dtype))


def over_choices(rows, K):
    """Sum rows (T*K, D) over each token's choices -> (T, D)."""
    return rows if K == 1 else rows.view(-1, K, rows.shape[1]).sum(dim=1)


class Tiles(NamedTuple):
    """Which rows does each program compute? One tile holds rows of one expert only."""
    expert: Tensor           # (ceil(S / rows) + E,) E for a tile that is not needed
    start: Tensor            # the tile's first row


def plan_tiles(offsets, S, rows):
    """Cut every expert's rows into tiles. Their number, an upper bound, is known without looking.

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


class Tile(NamedTuple):
    """The block of the result that one program computes, and how."""
    rows: int
    columns: int
    narrow: int              # columns of "da", whose epilogue needs the registers for itself
    depth: int
    warps: int
    stages: int


def choose_tile(S, E, dtype):
    """A few fixed choices, by shape: nothing is tried out, so nothing waits for the GPU."""
    if S < 64 * E:
        return Tile(rows=32, columns=32, narrow=32, depth=16, warps=4, stages=2)
    if dtype == torch.float32:
        return Tile(rows=64, columns=64, narrow=32, depth=32, warps=4, stages=2)
    return Tile(rows=128, columns=128, narrow=64, depth=64, warps=8, stages=3)


def gemm(epilogue, tile, p, tiles, a, w, c, shared_by=0, bias=None, gates=None, z=None,
         gated_a=None, dgates=None, db=None):
    """Launch `grouped_gemm`. shared_by: how many choices share a row of a; 0: a is sorted."""
    E, depth, N = w.shape
    columns = tile.narrow if epilogue == "da" else tile.columns
    bias, gates = (v if v is None else v.contiguous() for v in (bias, gates))
    with torch.cuda.device_of(a):
        grouped_gemm[(len(tiles.expert) * -(-N // columns),)](
            a, w, c, bias, gates, z, gated_a, dgates, db, p.order, p.offsets, *tiles,
            a.stride(0), *w.stride(), E, depth, N, shared_by, epilogue, PRECISION,
            tile.rows, columns, tile.depth, num_warps=tile.warps, num_stages=tile.stages)


def gemm_dw(tile, p, a, b, a_shared_by=0, b_shared_by=0):
    """Launch `grouped_dw`: each expert's a^T b -> (E, M, N)."""
    E, M, N = len(p.offsets) - 1, a.shape[1], b.shape[1]
    dw = a.new_empty(E, M, N)
    with torch.cuda.device_of(a):
        grouped_dw[(E * -(-M // tile.rows) * -(-N // tile.columns),)](
            a, b, dw, p.order, p.offsets, a.stride(0), b.stride(0),
            M, N, a_shared_by, b_shared_by, PRECISION, tile.rows, tile.columns, tile.depth,
            # rows are found through `order`, a load before the load: twice the stages
            num_warps=tile.warps, num_stages=2 * tile.stages)
    return dw


PRECISION = "ieee"       # float32 products in float32, not TF32; half precision ignores it


@jit
def grouped_gemm(A, W, C,                            # A (., DEPTH), W (E, DEPTH, N), C (S, N)
                 BIAS, GATES, Z, GATED_A,            # (E, N), (S,), (S, N), (S, N)
                 DGATES, DB,                         # (S, tiles of N), (tiles of S, N)
                 ORDER, OFFSETS, EXPERT, START,      # a Plan and its Tiles
                 stride_a, stride_we, stride_wd, stride_wn,
                 E: constexpr, DEPTH: constexpr, N: constexpr, SHARED_BY: constexpr,
                 EPILOGUE: constexpr, PRECISION: constexpr,
                 BM: constexpr, BN: constexpr, BD: constexpr):
    """One program: BM rows of one expert's times BN columns of its matrix."""
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    tile = tl.program_id(0) // tiles_n               # neighbours share rows of A, so L2 has them
    tile_n = tl.program_id(0) % tiles_n
    e = tl.load(EXPERT + tile)                       # int64, as all of the plan: S * H and
    if e == E:                                       # E * D * H may be more than 2**31
        return
    r = tl.load(START + tile) + tl.arange(0, BM)
    alive = r < tl.load(OFFSETS + e + 1)
    slot = tl.load(ORDER + r, mask=alive, other=0)
    row = slot // SHARED_BY if SHARED_BY else r
    d = tl.arange(0, BD)
    n = tile_n * BN + tl.arange(0, BN)
    a_at = A + row[:, None] * stride_a + d[None, :]
    w_at = W + e * stride_we + d[:, None] * stride_wd + n[None, :] * stride_wn
    acc = tl.zeros((BM, BN), tl.float32)
    for done in range(0, DEPTH, BD):
        inside = d < DEPTH - done
        a = tl.load(a_at, mask=alive[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        a_at += BD
        w_at += BD * stride_wd

    dtype = C.dtype.element_ty
    mask = alive[:, None] & (n < N)[None, :]
    here = r[:, None] * N + n[None, :]               # sorted by expert
    there = slot[:, None] * N + n[None, :]           # in the tokens' own order again
    if BIAS is not None:
        acc += tl.load(BIAS + e * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    gate = tl.full((BM, 1), 1.0, tl.float32)
    if GATES is not None:
        gate = tl.load(GATES + slot, mask=alive, other=0.0).to(tl.float32)[:, None]
    if EPILOGUE == "up":
        z = acc.to(dtype)                            # rounded here, as backward will read it
        tl.store(Z + here, z, mask=mask)
        tl.store(C + here, gelu(z.to(tl.float32))[0].to(dtype), mask=mask)
    elif EPILOGUE == "down":
        tl.store(C + there, (acc * gate).to(dtype), mask=mask)
    elif EPILOGUE == "dx":
        tl.store(C + there, acc.to(dtype), mask=mask)
    else:                                            # "da": acc is dL/da before the gate
        z = tl.load(Z + here, mask=mask, other=0.0).to(tl.float32)
        a, slope = gelu(z)
        dz = acc * gate * slope
        tl.store(C + here, dz.to(dtype), mask=mask)
        tl.store(GATED_A + here, (a * gate).to(dtype), mask=mask)
        # this tile's share of <da, a> and of db; no atomics, so two runs give the same bits
        tl.store(DGATES + slot * tiles_n + tile_n, tl.sum(acc * a, 1), mask=alive)
        tl.store(DB + tile * N + n, tl.sum(dz, 0), mask=n < N)


@jit
def gelu(z):
    """gelu(z) = z Phi(z) and its derivative Phi(z) + z phi(z)."""
    Phi = 0.5 * (1 + tl.math.erf(z * 0.7071067811865476))               # sqrt(1/2)
    phi = 0.3989422804014327 * tl.exp(-0.5 * z * z)                     # sqrt(1/(2 pi))
    return z * Phi, Phi + z * phi


@jit
def grouped_dw(A, B, DW,                             # A (., M), B (., N), DW (E, M, N)
               ORDER, OFFSETS, stride_a, stride_b,
               M: constexpr, N: constexpr, A_SHARED_BY: constexpr, B_SHARED_BY: constexpr,
               PRECISION: constexpr, BM: constexpr, BN: constexpr, BS: constexpr):
    """One program: BM x BN of one expert's gradient, over all its rows; zeros if it has none."""
    tiles_m: tl.constexpr = (M + BM - 1) // BM
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    tile_n, tile_m = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n % tiles_m
    e = (tl.program_id(0) // (tiles_n * tiles_m)).to(tl.int64)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    end = tl.load(OFFSETS + e + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(tl.load(OFFSETS + e), end, BS):
        r = start + tl.arange(0, BS).to(tl.int64)
        alive = r < end
        slot = tl.load(ORDER + r, mask=alive, other=0)
        row_a = slot // A_SHARED_BY if A_SHARED_BY else r
        row_b = slot // B_SHARED_BY if B_SHARED_BY else r
        a = tl.load(A + row_a[None, :] * stride_a + m[:, None],
                    mask=(m < M)[:, None] & alive[None, :], other=0.0)              # (BM, BS)
        b = tl.load(B + row_b[:, None] * stride_b + n[None, :],
                    mask=alive[:, None] & (n < N)[None, :], other=0.0)              # (BS, BN)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = e * M * N + m[:, None] * N + n[None, :]
    tl.store(DW + at, acc.to(DW.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


# --- the one name that the rest of the code imports ---

BACKENDS = {"reference": reference, "grouped": grouped, "lean": lean, "triton": fused}


def expert_mlp(x, experts, gates, w_in, b_in, w_out, b_out, backend="auto", return_choices=False):
    """Send each token through its chosen experts and add up their gated outputs.

    x (T, D); experts (T, K) int64; gates (T, K); w_in (E, D, H); b_in (E, H); w_out (E, H, D);
    b_out (E, D). Returns y (T, D), or (y, raw (T, K, D)) with return_choices=True. "auto" runs
    everywhere, on the rung that `choose` names; another backend runs or says why it cannot.
    torch.export takes "reference" alone in float32, for group sizes are data.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"there is no backend {backend!r}: choose auto, {', '.join(BACKENDS)}")
    if backend == "triton" and (why := why_not_triton(x, w_in)):
        raise RuntimeError(f"backend='triton' cannot run here: {why}; choose auto")
    name = choose(x, w_in)[0] if backend == "auto" else backend
    return BACKENDS[name](x, experts, gates, w_in, b_in, w_out, b_out, return_choices)


# What compiles for a GPU and is right in the interpreter may still fail on one. Set this once
# `pytest -m gpu` has passed there and `python notebooks/bench.py` shows which rung is the faster.
SEEN_ON_A_GPU = False


def choose(x, w_in):
    """Which rung is the fastest correct one for these tensors, and why? (name, one sentence)"""
    if torch.compiler.is_compiling():
        return "grouped", "torch.compile takes it without a break and fuses around it"
    if not x.is_cuda:
        return "grouped", "on a CPU it is faster than lean, which keeps less memory"
    if why := why_not_triton(x, w_in):
        return "grouped", why
    if x.dtype == torch.float32:
        return "grouped", "Triton would multiply float32 without the tensor cores"
    if INTERPRETED:
        return "grouped", "TRITON_INTERPRET=1 is set, for tests"
    if not SEEN_ON_A_GPU:
        return "grouped", "no GPU has run the kernels yet: backend='triton' would be the first"
    return "triton", "half precision on a GPU with tensor cores"


def why_not_triton(x, w_in):
    """Why these tensors cannot go through the kernels, or None if they can."""
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
