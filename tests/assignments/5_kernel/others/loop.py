"""Assignment 5, solved row by row in torch, and in the kernels without tl.dot."""
import torch
import torch.nn.functional as F
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import Tiles


def over_choices(rows, K):
    return torch.stack([rows[k::K] for k in range(K)]).sum(dim=0)


def plan_tiles(offsets, S, rows):
    expert, start = [], []
    for e in range(len(offsets) - 1):
        first, end = offsets[e].item(), offsets[e + 1].item()
        while first < end:
            expert.append(e)
            start.append(first)
            first += rows
    E = len(offsets) - 1
    missing = -(-S // rows) + E - len(expert)
    return Tiles(torch.tensor([E] * missing + expert, device=offsets.device),
                 torch.tensor([0] * missing + start, device=offsets.device))


class Lean:
    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, gates, z, ids, order, _, w_in, w_out, b_out = ctx.saved_tensors
        K = ctx.K
        wide = torch.promote_types(x.dtype, torch.float32)
        dx = torch.zeros_like(x, dtype=wide)
        dgates = None if gates is None else torch.zeros_like(gates)
        dw_in, dw_out = torch.zeros_like(w_in, dtype=wide), torch.zeros_like(w_out, dtype=wide)
        db_in = torch.zeros_like(w_in[:, 0], dtype=wide)
        db_out = torch.zeros_like(b_out, dtype=wide)
        for r, (e, s) in enumerate(torch.stack([ids, order], dim=1).tolist()):
            t, k = s // K, s % K
            d = (dout[t, k] if gates is None else dout[t]).to(wide)
            zr, we = z[r].to(wide), w_out[e].to(wide)
            a, da = F.gelu(zr), (we @ d[:, None])[:, 0]
            if gates is not None:
                dgates[t, k] = (da * a).sum() + (d * b_out[e].to(wide)).sum()
                gate = gates[t, k].to(wide)
                da, d = da * gate, d * gate
            half = torch.special.erf(zr / 2 ** 0.5) / 2 + 0.5
            dz = da * (half + zr * torch.exp(-zr * zr / 2) / (2 * torch.pi) ** 0.5)
            dw_out[e] += torch.outer(a, d)
            db_out[e] += d
            dw_in[e] += torch.outer(x[t].to(wide), dz)
            db_in[e] += dz
            dx[t] += (w_in[e].to(wide) @ dz[:, None])[:, 0]
        weights = (v.to(x.dtype) for v in (dw_in, db_in, dw_out, db_out))
        return dx.to(x.dtype), None, dgates, *weights


def gelu(z):
    Phi = 0.5 + 0.5 * tl.erf(z / 1.4142135623730951)
    return z * Phi, Phi + z * tl.exp(z * z / -2) / 2.5066282746310002


def grouped_gemm(A, W, OUT, BIAS, GATES, Z, GATED_A, DGATES, DB, ORDER, OFFSETS, EXPERT, START,
                 stride_a, stride_we, stride_wd, stride_wc, E: tl.constexpr, DEPTH: tl.constexpr,
                 WIDTH: tl.constexpr, SHARED_BY: tl.constexpr, EPILOGUE: tl.constexpr,
                 PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 STEP: tl.constexpr):
    columns = tl.cdiv(WIDTH, COLUMNS)
    tile, part = tl.program_id(0) // columns, tl.program_id(0) % columns
    e = tl.load(EXPERT + tile).to(tl.int64)
    if e < E:
        r = tl.load(START + tile).to(tl.int64) + tl.arange(0, ROWS)
        rows = r < tl.load(OFFSETS + e + 1)
        n = part * COLUMNS + tl.arange(0, COLUMNS)
        cols = n < WIDTH
        s = tl.load(ORDER + r, mask=rows, other=0)
        row = r
        if SHARED_BY != 0:
            row = s // SHARED_BY
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, DEPTH, STEP):
            d = first + tl.arange(0, STEP)
            a = tl.load(A + row[:, None] * stride_a + d[None, :],
                        mask=rows[:, None] & (d < DEPTH)[None, :], other=0.0)
            w = tl.load(W + e * stride_we + d[:, None] * stride_wd + n[None, :] * stride_wc,
                        mask=(d < DEPTH)[:, None] & cols[None, :], other=0.0)
            acc += tl.sum(a.to(tl.float32)[:, :, None] * w.to(tl.float32)[None, :, :], axis=1)
        both = rows[:, None] & cols[None, :]
        if BIAS is not None:
            acc = acc + tl.load(BIAS + e * WIDTH + n, mask=cols, other=0.0).to(tl.float32)[None, :]
        by_expert, by_choice = r[:, None] * WIDTH + n[None, :], s[:, None] * WIDTH + n[None, :]
        if GATES is not None:
            gate = tl.load(GATES + s, mask=rows, other=0.0).to(tl.float32)[:, None]
        else:
            gate = tl.zeros((ROWS, 1), tl.float32) + 1
        if EPILOGUE == "up":
            tl.store(Z + by_expert, acc.to(Z.dtype.element_ty), mask=both)
            tl.store(OUT + by_expert, gelu(acc)[0].to(OUT.dtype.element_ty), mask=both)
        if EPILOGUE == "down":
            tl.store(OUT + by_choice, (gate * acc).to(OUT.dtype.element_ty), mask=both)
        if EPILOGUE == "dx":
            tl.store(OUT + by_choice, acc.to(OUT.dtype.element_ty), mask=both)
        if EPILOGUE == "da":
            dots = backward_of_gelu(acc, gate, n, r, rows, tile, Z, OUT, GATED_A, DB, WIDTH)
            tl.store(DGATES + s * columns + part, dots, mask=rows)


def backward_of_gelu(da, gate, c, r, alive, tile, Z, DZ, GATED_A, DB, WIDTH: tl.constexpr):
    cols = c < WIDTH
    dots, sums = tl.zeros((da.shape[0],), tl.float32), tl.zeros((da.shape[1],), tl.float32)
    by_expert, both = r[:, None] * WIDTH + c[None, :], alive[:, None] & cols[None, :]
    z = tl.load(Z + by_expert, mask=both, other=0.0).to(tl.float32)
    a, slope = gelu(z)
    tl.store(DZ + by_expert, (da * slope * gate).to(DZ.dtype.element_ty), mask=both)
    tl.store(GATED_A + by_expert, (a * gate).to(GATED_A.dtype.element_ty), mask=both)
    dots += tl.sum(da * a, axis=1)
    sums += tl.sum(da * slope * gate, axis=0)
    tl.store(DB + tile * WIDTH + c, sums, mask=cols)
    return dots


def grouped_dw(A, B, DW, OFFSETS, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
               PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               STEP: tl.constexpr):
    per_row, per_expert = tl.cdiv(WIDTH, COLUMNS), tl.cdiv(HEIGHT, ROWS) * tl.cdiv(WIDTH, COLUMNS)
    e = tl.program_id(0).to(tl.int64) // per_expert
    inside = tl.program_id(0) % per_expert
    m = inside // per_row * ROWS + tl.arange(0, ROWS)
    n = inside % per_row * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    first, end = tl.load(OFFSETS + e), tl.load(OFFSETS + e + 1)
    while first < end:
        r = first + tl.arange(0, STEP)
        a = tl.load(A + r[:, None] * HEIGHT + m[None, :],
                    mask=(r < end)[:, None] & (m < HEIGHT)[None, :], other=0.0).to(tl.float32)
        b = tl.load(B + r[:, None] * WIDTH + n[None, :],
                    mask=(r < end)[:, None] & (n < WIDTH)[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(a[:, :, None] * b[:, None, :], axis=0)
        first += STEP
    at = DW + e * HEIGHT * WIDTH + m[:, None] * WIDTH + n[None, :]
    tl.store(at, acc.to(DW.dtype.element_ty), mask=(m < HEIGHT)[:, None] & (n < WIDTH)[None, :])
