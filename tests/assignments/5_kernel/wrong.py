"""Wrong answers to assignment 5, each a bug that a student could have: (kind, file, old, new)."""
WRONG = [
    # over_choices, plan_tiles
    ("input changed", "kernels.py",
     "    return rows if K == 1 else rows.view(-1, K, rows.shape[1]).sum(dim=1, dtype=rows.dtype)",
     "    total = rows[::K]\n"
     "    for k in range(1, K):\n"
     "        total += rows[k::K]\n"
     "    return total"),
    ("dtype", "kernels.py",
     ".sum(dim=1, dtype=rows.dtype)",
     ".sum(dim=1, dtype=torch.float64)"),
    ("numerics", "kernels.py",
     "    ends = ((offsets.diff() + rows - 1) // rows).cumsum(0) ",
     "    ends = (offsets.diff() / rows).ceil().long().cumsum(0) "),
    ("device", "kernels.py",
     "    tile = torch.arange(-(-S // rows) + E, device=offsets.device)",
     "    tile = torch.arange(-(-S // rows) + E)"),
    ("state kept", "kernels.py",
     "    start = offsets[expert] + (tile - first[expert]) * rows\n"
     "    return Tiles(expert, torch.where(expert < E, start, 0))",
     "    start = offsets[expert] + (tile - first[expert]) * rows\n"
     "    made = Tiles(expert, torch.where(expert < E, start, 0))\n"
     "    return plan_tiles.__dict__.setdefault((S, E, rows), made)"),
    # Lean.backward
    ("one size only", "kernels.py",
     "        d = dout.reshape(-1, D).index_select(0, plan.order if ungated else plan.order // K)",
     "        d = dout.reshape(-1, D).index_select(0, plan.order if ungated else plan.order // 2)"),
    ("numerics", "kernels.py",
     "                dgate[r] = (da.to(wide) * a).sum(dim=1) + "
     "(dr.to(wide) * b_out[b]).sum(dim=1)\n"
     "                da, dr = da.mul_(gate[r]), dr.mul_(gate[r])             "
     "# from here on with the gate",
     "                da, dr = da.mul_(gate[r]), dr.mul_(gate[r])\n"
     "                dgate[r] = ((da.to(wide) * a).sum(dim=1)\n"
     "                            + (dr.to(wide) * b_out[b]).sum(dim=1)) / gate[r, 0]"),
    ("state kept", "kernels.py",
     "            dz = torch.ops.aten.gelu_backward(da, z[r])",
     "            dz = z[r].copy_(torch.ops.aten.gelu_backward(da, z[r]))"),
    ("state kept", "kernels.py",
     "        dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)",
     "        if getattr(Lean, 'work', x).shape != w_in.shape or Lean.work.dtype != w_in.dtype:\n"
     "            Lean.work = torch.empty_like(w_in)         # once for all steps\n"
     "        dw_in, dw_out = Lean.work, torch.empty_like(w_out)"),
    ("another definition", "kernels.py",
     "a, da, dr = F.gelu(z[r]), mm(d[r], w_out[e].mT), d[r]",
     'a, da, dr = F.gelu(z[r], approximate="tanh"), mm(d[r], w_out[e].mT), d[r]'),
    ("device", "kernels.py",
     "        dx, dgate = torch.empty_like(rows), rows.new_empty(len(rows), dtype=wide)",
     "        dx, dgate = torch.empty_like(rows), torch.empty(len(rows), dtype=wide)"),
    ("detached", "kernels.py",
     "dgate.to(gates.dtype), dw_in, db_in, dw_out, db_out",
     "dgate.to(gates.dtype), dw_in, db_in, dw_out, None"),
    # gelu
    ("numerics", "kernels.py",
     "    phi = 0.3989422804014327 * tl.exp(-0.5 * z * z)                     # sqrt(1/(2 pi))\n"
     "    return z * Phi, Phi + z * phi",
     "    grown = tl.exp(0.5 * z * z)\n"
     "    return z * Phi, (Phi * grown + z * 0.3989422804014327) / grown"),
    # grouped_gemm
    ("numerics", "kernels.py",
     "acc = tl.dot(a, w, acc, input_precision=PRECISION)",
     "acc = tl.dot(a, w, acc)"),
    ("one size only", "kernels.py",
     "    row = choice // SHARED_BY if SHARED_BY else r\n",
     "    row = choice // 2 if SHARED_BY else r\n"),
    ("one size only", "kernels.py",
     "    c = part * COLUMNS + tl.arange(0, COLUMNS)\n",
     "    c = part * ROWS + tl.arange(0, COLUMNS)\n"),
    ("one size only", "kernels.py",
     "    there = choice[:, None] * WIDTH + c[None, :] ",
     "    there = choice.to(tl.int32)[:, None] * WIDTH + c[None, :] "),
    ("another definition", "kernels.py",
     "tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))",
     "tl.split(tl.reshape(acc, (ROWS, COLUMNS // 2, 2)))         # even and odd"),
    ("one size only", "kernels.py",
     "        c += COLUMNS // 2\n",
     "        c += 8\n"),
    # backward_of_gelu
    ("numerics", "kernels.py",
     "    return tl.sum(da * a, 1)",
     "    return tl.sum(dz / slope * a, 1) / tl.sum(gate, 1)"),
    ("one size only", "kernels.py",
     "    tl.store(DB + tile * WIDTH + c, tl.sum(dz, 0), mask=c < WIDTH)",
     "    tl.store(DB + tile * WIDTH + c, tl.sum(dz, 0))"),
    ("numerics", "kernels.py",
     "    a, slope = gelu(tl.load(Z + here, mask=mask, other=0.0).to(tl.float32))",
     "    a, slope = gelu(tl.load(Z + here, mask=mask).to(tl.float32))"),
    # grouped_dw
    ("one size only", "kernels.py",
     "    h = tl.program_id(0) // across % down * ROWS + tl.arange(0, ROWS)",
     "    h = tl.program_id(0) // across % down * COLUMNS + tl.arange(0, ROWS)"),
    ("numerics", "kernels.py",
     "        acc = tl.dot(a, b, acc, input_precision=PRECISION)",
     "        acc = tl.dot(a, b, acc)"),
    ("one size only", "kernels.py",        # a's zeros make zeros of whatever b holds, but of NaN
     "                    mask=alive[:, None] & (c < WIDTH)[None, :], other=0.0)      "
     "# (STEP, COLUMNS)",
     "                    mask=(c < WIDTH)[None, :], other=0.0)"),
    ("one size only", "kernels.py",
     "    acc = tl.zeros((ROWS, COLUMNS), tl.float32)\n    for start in range(",
     "    if tl.load(OFFSETS + e) == end:\n        return\n"
     "    acc = tl.zeros((ROWS, COLUMNS), tl.float32)\n    for start in range("),
]
