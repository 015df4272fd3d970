"""Assignment 5, solved with every product transposed and the programs in another order."""
import torch
import torch.nn.functional as F
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import Tiles


def over_choices(rows, K):
    token = torch.arange(len(rows), device=rows.device) // K
    return rows.new_zeros(len(rows) // K, rows.shape[1]).index_add_(0, token, rows)


def plan_tiles(offsets, S, rows):
    # a tile starts at every row whose place in its group is a multiple of `rows`; longest first
    E, n = len(offsets) - 1, -(-S // rows) + len(offsets) - 1
    pairs = [(e, r) for e in range(E) for r in range(int(offsets[e]), int(offsets[e + 1]), rows)]
    pairs.sort(key=lambda pair: pair[1] - int(offsets[pair[0] + 1]))
    expert, start = offsets.new_full((n,), E), offsets.new_zeros(n)
    for i, (e, r) in enumerate(pairs):
        expert[i], start[i] = e, r
    return Tiles(expert, start)


class Lean:
    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gates, z, ids, order, offsets, w_in, w_out, b_out = ctx.saved_tensors
        D, K = x.shape[1], ctx.K
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.enable_grad():                        # autograd for the gelu, and for it alone
            leaf = z.detach().to(wide).requires_grad_()
            a = F.gelu(leaf)
            (slope,) = torch.autograd.grad(a.sum(), leaf)
        a = a.detach()
        per_choice = dout if gates is None else dout[:, None].expand(-1, K, -1)
        d = per_choice.reshape(-1, D)[order].to(wide)
        rows = x.repeat_interleave(K, dim=0)[order].to(wide)
        w_in, w_out, bias = w_in.to(wide), w_out.to(wide), b_out.to(wide)
        groups = [slice(*pair) for pair in zip(offsets[:-1].tolist(), offsets[1:].tolist(),
                                               strict=True)]
        da = torch.cat([(w_out[e] @ d[g].T).T for e, g in enumerate(groups)])
        dgates = None
        if gates is not None:
            gate = gates.reshape(-1)[order].to(wide)
            mine = torch.einsum("sh,sh->s", da, a) + torch.einsum("sd,sd->s", d, bias[ids])
            dgates = torch.empty_like(mine)
            dgates[order] = mine
            dgates = dgates.view(-1, K).to(gates.dtype)
            da, d = da * gate[:, None], d * gate[:, None]
        dz = da * slope
        dx = torch.zeros_like(rows)
        dx[order] = torch.cat([(w_in[e] @ dz[g].T).T for e, g in enumerate(groups)])
        grads = (dx.view(-1, K, D).sum(1), None, dgates,
                 torch.stack([(dz[g].T @ rows[g]).T for g in groups]),
                 torch.stack([dz[g].sum(0) for g in groups]),
                 torch.stack([(d[g].T @ a[g]).T for g in groups]),
                 torch.stack([d[g].sum(0) for g in groups]))
        return tuple(v if v is None or v is dgates else v.to(x.dtype) for v in grads)


def gelu(z):
    phi = tl.exp(-z * z / 2) / 2.5066282746310002
    Phi = tl.where(z < 0, 0.5 - 0.5 * tl.math.erf(-z * 0.7071067811865476),
                   0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476))
    return Phi * z, phi * z + Phi


def grouped_gemm(A, W, OUT, BIAS, GATES, Z, GATED_A, DGATES, DB, ORDER, OFFSETS, EXPERT, START,
                 stride_a, stride_we, stride_wd, stride_wc, E: tl.constexpr, DEPTH: tl.constexpr,
                 WIDTH: tl.constexpr, SHARED_BY: tl.constexpr, EPILOGUE: tl.constexpr,
                 PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 STEP: tl.constexpr):
    parts: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tiles = tl.num_programs(0) // parts
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    e = tl.load(EXPERT + tile)
    if e == E:
        return
    r = (tl.load(START + tile) + tl.arange(0, ROWS)).to(tl.int64)[None, :]        # rows go right
    n = (part * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[:, None]        # columns go down
    mine = r < tl.load(OFFSETS + e + 1)
    mask = mine & (n < WIDTH)
    s = tl.load(ORDER + r, mask=mine, other=0)
    row = s // SHARED_BY if SHARED_BY else r
    acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    d = tl.arange(0, STEP)
    while tl.min(d, axis=0) < DEPTH:
        a = tl.load(A + d[:, None] + row * stride_a, mask=(d < DEPTH)[:, None] & mine, other=0.0)
        w = tl.load(W + e * stride_we + n * stride_wc + d[None, :] * stride_wd,
                    mask=(n < WIDTH) & (d < DEPTH)[None, :], other=0.0)
        acc = tl.dot(w, a, acc, input_precision=PRECISION)
        d += STEP
    gate = 1.0
    if GATES is not None:
        gate = tl.load(GATES + s, mask=mine, other=0.0).to(tl.float32)
    if BIAS is not None:
        acc += tl.load(BIAS + e * WIDTH + n, mask=n < WIDTH, other=0.0).to(tl.float32)
    out = OUT.dtype.element_ty
    if EPILOGUE == "da":
        per_row = tl.trans(tl.zeros((1, ROWS), tl.float32) + gate)
        share = backward_of_gelu(tl.trans(acc), per_row, tl.reshape(n, (COLUMNS,)),
                                 tl.reshape(r, (ROWS,)), tl.reshape(mine, (ROWS,)), tile, Z, OUT,
                                 GATED_A, DB, WIDTH)
        tl.store(DGATES + s * parts + part, share[None, :], mask=mine)
    elif EPILOGUE == "up":
        tl.store(Z + r * WIDTH + n, acc.to(out), mask=mask)
        value, _ = gelu(acc.to(out).to(tl.float32))
        tl.store(OUT + r * WIDTH + n, value.to(out), mask=mask)
    else:
        tl.store(OUT + s * WIDTH + n, (gate * acc).to(out), mask=mask)


def backward_of_gelu(da, gate, c, r, alive, tile, Z, DZ, GATED_A, DB, WIDTH: tl.constexpr):
    da, gate, n, r = tl.trans(da), tl.trans(gate), c[:, None], r[None, :]
    mask, out = alive[None, :] & (n < WIDTH), DZ.dtype.element_ty
    a, slope = gelu(tl.load(Z + r * WIDTH + n, mask=mask, other=0.0).to(tl.float32))
    tl.store(GATED_A + r * WIDTH + n, (gate * a).to(out), mask=mask)
    dz = gate * slope * da
    tl.store(DZ + r * WIDTH + n, dz.to(out), mask=mask)
    tl.store(DB + tile * WIDTH + n, tl.sum(dz, axis=1)[:, None], mask=n < WIDTH)
    return tl.sum(da * a, axis=0)


def grouped_dw(A, B, DW, OFFSETS, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
               PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               STEP: tl.constexpr):
    down, right = tl.cdiv(HEIGHT, ROWS), tl.cdiv(WIDTH, COLUMNS)
    experts = tl.num_programs(0) // (down * right)
    e = (tl.program_id(0) % experts).to(tl.int64)
    m = tl.program_id(0) // experts % down * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) // experts // down * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    first, end = tl.load(OFFSETS + e), tl.load(OFFSETS + e + 1)
    r = first + tl.arange(0, STEP)
    while first < end:
        a = tl.load(A + r[:, None] * HEIGHT + m[None, :],
                    mask=(r < end)[:, None] & (m < HEIGHT)[None, :], other=0.0)  # (STEP, ROWS)
        b = tl.load(B + r[None, :] * WIDTH + n[:, None],
                    mask=(r < end)[None, :] & (n < WIDTH)[:, None], other=0.0)   # (COLUMNS, STEP)
        acc = tl.dot(b, a, acc, input_precision=PRECISION)
        first += STEP
        r += STEP
    at = e * HEIGHT * WIDTH + m[None, :] * WIDTH + n[:, None]
    tl.store(DW + at, acc.to(DW.dtype.element_ty),
             mask=(m < HEIGHT)[None, :] & (n < WIDTH)[:, None])
