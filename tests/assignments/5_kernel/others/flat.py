"""Assignment 5, solved with one-hot sums and vmap in torch, and kernels that store flat blocks."""
import torch
import torch.nn.functional as F
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import Tiles


def over_choices(rows, K):
    return torch.func.vmap(lambda own: own.sum(dim=0), in_dims=0)(
        rows.view(len(rows) // K, K, rows.shape[1])).to(rows.dtype)


def plan_tiles(offsets, S, rows):
    E, n = len(offsets) - 1, -(-S // rows) + len(offsets) - 1
    expert, start = [E] * n, [0] * n
    bounds, tile = offsets.tolist(), n          # from the last one to the first
    for e in range(E - 1, -1, -1):
        for first in reversed(range(bounds[e], bounds[e + 1], rows)):
            tile -= 1
            expert[tile], start[tile] = e, first
    return Tiles(*(torch.tensor(v, dtype=torch.int64, device=offsets.device)
                   for v in (expert, start)))


class Lean:
    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gates, z, ids, order, offsets, w_in, w_out, b_out = ctx.saved_tensors
        (T, D), K, E = x.shape, ctx.K, len(w_in)
        wide = torch.promote_types(x.dtype, torch.float32)
        undo, slices = order.argsort(), list(zip(offsets[:-1].tolist(), offsets[1:].tolist(),
                                                 strict=True))

        def each(left, right):
            """A product per expert, of its rows."""
            return [p @ q for p, q in zip(left, right, strict=True)]

        def own(v):
            return [v[start:end] for start, end in slices]
        d = dout.reshape(T, -1, D).expand(T, K, D).reshape(T * K, D)[order].to(wide)
        rows = x[:, None].expand(T, K, D).reshape(T * K, D)[order].to(wide)
        h = z.to(wide)
        a = F.gelu(h)
        slope = torch.func.vmap(torch.func.vmap(torch.func.grad(F.gelu)))(h) if len(h) else h
        da = torch.cat(each(own(d), w_out.to(wide).mT.unbind()))
        dgates, gate = None, 1
        if gates is not None:
            gate = gates.reshape(-1)[order].to(wide).unsqueeze(1)
            ours = torch.cat([da, d], dim=1), torch.cat([a, b_out.to(wide)[ids]], dim=1)
            dgates = torch.linalg.vecdot(*ours)[undo].view(T, K).to(gates.dtype)
        dr, dz = gate * d, gate * da * slope
        dx = torch.cat(each(own(dz), w_in.to(wide).mT.unbind()))[undo].view(T, K, D).sum(dim=1)
        dw_in = torch.stack(each([v.mT for v in own(rows)], own(dz)))
        dw_out = torch.stack(each([v.mT for v in own(a)], own(dr)))
        db_in = dz.new_zeros(E, dz.shape[1]).index_add_(0, ids, dz)
        db_out = dr.new_zeros(E, D).index_add_(0, ids, dr)
        return (dx.to(x.dtype), None, dgates,
                *(v.to(x.dtype) for v in (dw_in, db_in, dw_out, db_out)))


def gelu(z):
    # Phi and phi of |z|, and the other half of them by symmetry
    far = tl.abs(z)
    above = 0.5 - 0.5 * tl.math.erf(far * 0.7071067811865476)
    Phi = tl.where(z > 0, 1 - above, above)
    return Phi * z, Phi + z * (tl.exp(-0.5 * far * far) / 2.5066282746310002)


def grouped_gemm(A, W, OUT, BIAS, GATES, Z, GATED_A, DGATES, DB, ORDER, OFFSETS, EXPERT, START,
                 stride_a, stride_we, stride_wd, stride_wc, E: tl.constexpr, DEPTH: tl.constexpr,
                 WIDTH: tl.constexpr, SHARED_BY: tl.constexpr, EPILOGUE: tl.constexpr,
                 PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 STEP: tl.constexpr):
    N: tl.constexpr = ROWS * COLUMNS
    parts: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    part, tile = tl.program_id(0) % parts, tl.program_id(0).to(tl.int64) // parts
    e = tl.load(EXPERT + tile)
    if e >= E:
        return
    r = tl.load(START + tile) + tl.arange(0, ROWS)
    alive = r < tl.load(OFFSETS + e + 1)
    s = tl.load(ORDER + r, mask=alive, other=0)
    row = (s // SHARED_BY if SHARED_BY else r) * stride_a
    c = part * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range((DEPTH + STEP - 1) // STEP):
        i = step * STEP + tl.arange(0, STEP)
        a = tl.load(A + row[:, None] + i[None, :], mask=alive[:, None] & (i < DEPTH)[None, :],
                    other=0.0)
        w = tl.load(W + e * stride_we + i[:, None] * stride_wd + c[None, :] * stride_wc,
                    mask=(i < DEPTH)[:, None] & (c < WIDTH)[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    if BIAS is not None:
        acc += tl.load(BIAS + e * WIDTH + c[None, :], mask=(c < WIDTH)[None, :],
                       other=0.0).to(tl.float32)
    # the block in one row of lanes
    lane = tl.arange(0, N)
    fr = tl.load(START + tile) + lane // COLUMNS
    fc = part * COLUMNS + lane % COLUMNS
    mask = (fr < tl.load(OFFSETS + e + 1)) & (fc < WIDTH)
    fs = tl.load(ORDER + fr, mask=mask, other=0)
    flat = tl.reshape(acc, (N,))
    gate = tl.full((N,), 1.0, tl.float32)
    if GATES is not None:
        gate = tl.load(GATES + fs, mask=mask, other=0.0).to(tl.float32)
    to = OUT.dtype.element_ty
    if EPILOGUE == "da":            # backward_of_gelu would want a block, not a row of lanes
        a, slope = gelu(tl.load(Z + fr * WIDTH + fc, mask=mask, other=0.0).to(tl.float32))
        tl.store(GATED_A + fr * WIDTH + fc, (gate * a).to(to), mask=mask)
        dz = flat * gate * slope
        tl.store(OUT + fr * WIDTH + fc, dz.to(to), mask=mask)
        tl.store(DGATES + s * parts + part, tl.sum(tl.reshape(flat * a, (ROWS, COLUMNS)), axis=1),
                 mask=alive)
        tl.store(DB + tile * WIDTH + c, tl.sum(tl.reshape(dz, (ROWS, COLUMNS)), axis=0),
                 mask=c < WIDTH)
    elif EPILOGUE == "up":
        z = flat.to(to)
        tl.store(Z + fr * WIDTH + fc, z, mask=mask)
        tl.store(OUT + fr * WIDTH + fc, gelu(z.to(tl.float32))[0].to(to), mask=mask)
    else:
        tl.store(OUT + fs * WIDTH + fc, (gate * flat).to(to), mask=mask)


def backward_of_gelu(da, gate, c, r, alive, tile, Z, DZ, GATED_A, DB, WIDTH: tl.constexpr):
    rows: tl.constexpr = da.shape[0]
    columns: tl.constexpr = da.shape[1]
    n: tl.constexpr = rows * columns
    mask = tl.reshape(alive[:, None] & (c < WIDTH)[None, :], (n,))
    at = tl.reshape(r[:, None] * WIDTH + c[None, :], (n,))
    flat, scale = tl.reshape(da, (n,)), tl.reshape(tl.broadcast_to(gate, (rows, columns)), (n,))
    a, slope = gelu(tl.load(Z + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(GATED_A + at, (scale * a).to(GATED_A.dtype.element_ty), mask=mask)
    tl.store(DZ + at, (scale * slope * flat).to(DZ.dtype.element_ty), mask=mask)
    share = tl.sum(tl.reshape(scale * slope * flat, (rows, columns)), axis=0)
    tl.store(DB + tile * WIDTH + c, share, mask=c < WIDTH)
    return tl.sum(tl.reshape(flat * a, (rows, columns)), axis=1)


def grouped_dw(A, B, DW, OFFSETS, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
               PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               STEP: tl.constexpr):
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    blocks: tl.constexpr = across * ((HEIGHT + ROWS - 1) // ROWS)
    e = tl.program_id(0).to(tl.int64) // blocks
    m = tl.program_id(0) % blocks // across * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % blocks % across * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(OFFSETS + e)
    count = tl.load(OFFSETS + e + 1) - first
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(tl.cdiv(count, STEP)):
        i = step * STEP + tl.arange(0, STEP)
        r = first + i
        a = tl.load(A + m[:, None] + r[None, :] * HEIGHT,
                    mask=(m < HEIGHT)[:, None] & (i < count)[None, :], other=0.0)
        b = tl.load(B + n[None, :] + r[:, None] * WIDTH,
                    mask=(n < WIDTH)[None, :] & (i < count)[:, None], other=0.0)
        acc += tl.dot(a, b, input_precision=PRECISION)
    lane = tl.arange(0, ROWS * COLUMNS)
    row = tl.program_id(0) % blocks // across * ROWS + lane // COLUMNS
    column = tl.program_id(0) % blocks % across * COLUMNS + lane % COLUMNS
    tl.store(DW + (e * HEIGHT + row) * WIDTH + column,
             tl.reshape(acc, (ROWS * COLUMNS,)).to(DW.dtype.element_ty),
             mask=(row < HEIGHT) & (column < WIDTH))
