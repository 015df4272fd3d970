"""The hidden checks of assignment 5: more epilogues, odd sizes, dirty memory, float16, answers."""
import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from checking import answered, check, gradient, random, require, same, tolerance, where_given
from torch.autograd.profiler import profile

# what the public checks expect is expected here too; a copy, so that no submission can reach it
_spec = importlib.util.spec_from_file_location("of_public", Path(__file__).with_name("public.py"))
public = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(public)
D, H, E, K, kernels, a_world, loop = (public.D, public.H, public.E, public.K, public.kernels,
                                      public.a_world, public.loop)


def as_good_as_the_loop(quantity, got, plain, true):
    """At most twice the error of the plain code in the same precision, root mean square.

    FlashAttention's rule takes the largest error, which for so few numbers is luck.
    """
    same(f"{quantity}, shape and dtype", (tuple(got.shape), got.dtype),
         (tuple(plain.shape), plain.dtype))
    error, noise = ((v.detach().double() - true).square().mean().sqrt().item()
                    for v in (got, plain))
    bound = 2 * noise + tolerance(torch.float32, true.abs().max().item())   # in another order
    require(error <= bound, f"error of {quantity}", f"at most {bound:.3g}, from the "
            f"{noise:.3g} of plain torch in {got.dtype}", f"{error:.3g}",
            "add products up in float32 and round once, when the result is stored")


# --- part A ---

@check(points=2, hint="offsets beyond 2**31 are int64 all the way; no tile for an idle expert")
def tiles_are_right_for_no_rows_one_expert_and_rows_beyond_2_to_the_31(student, g):
    module = kernels(student, launches=False)
    for starts in ([0, 0, 0], [0, 7], [0, 0, 8, 8], [0] * 40 + [3]):
        for rows in (1, 4, 16):
            public.tiles_cover(module, starts, rows)
    n = 2 ** 31 + 1
    expert, start = module.plan_tiles(torch.tensor([0, n, n, 3 * n]), 3 * n, 2 ** 29)
    used = sorted((e, r) for e, r in zip(expert.tolist(), start.tolist(), strict=True) if e < 3)
    same("(expert, first row) of the tiles of offsets 0, n, n, 3 n, where n = 2**31 + 1", used,
         [(0, i << 29) for i in range(5)] + [(2, n + (i << 29)) for i in range(9)])
    same("dtypes of the tiles", (expert.dtype, start.dtype), (torch.int64, torch.int64))


# --- part B ---

@check(points=2, hint="gates is None: dout is (T, K, D), a row for each choice, and no gate counts")
def the_outputs_before_the_gates_have_a_backward_too(student, g):
    x, chosen, gates, *weights = a_world(g, (3, 0, 4, 1), dtype=torch.float64)
    d, Lean = random(g, 4, K, D), kernels(student, launches=False).Lean
    got = gradient(lambda x, *w: (Lean.apply(x, chosen, None, *w) * d).sum(), x, *weights)
    expected = gradient(lambda x, *w: (loop(x, chosen, gates, *w)[1] * d).sum(), x, *weights)
    for name, a, b in zip(("x", "w_in", "b_in", "w_out", "b_out"), got, expected, strict=True):
        same(f"d{name} of lean, through raw", a, b)


@check(points=2, hint="K is ctx.K, and a gate of 0, as a choice has that a full expert dropped, is "
                      "nothing to divide by")
def the_backward_by_hand_takes_any_number_of_choices_and_gates_of_0(student, g):
    lean = kernels(student, launches=False).lean
    for sizes, k in (((3, 0, 4, 1), 1), ((3, 0, 6), 3), ((4, 4, 4), 3)):
        world = a_world(g, sizes, k, torch.float64)
        world[2][::2] = 0
        try:
            public.same_results(lean, world, random(g, len(world[0]), D), f"lean, K={k}")
        except RuntimeError as error:               # of autograd, that counts the versions
            require("inplace" not in str(error), "what forward saved for Lean.backward",
                    "as forward saved it", "changed by the backward",
                    "who keeps the graph may ask again: write into new tensors")
            raise


@check(hint="make tensors with device=, that of what you were given, or with empty_like, new_zeros")
def on_a_gpu_nothing_is_made_on_the_cpu(student, g):
    module, d = kernels(student, launches=False), random(g, 4, D)
    offsets, rows = torch.tensor([0, 2, 2, 7]), random(g, 8, D)
    where_given("over_choices", lambda: module.over_choices(rows, 2))
    where_given("plan_tiles", lambda: module.plan_tiles(offsets, 7, 4))
    x, chosen, *rest = a_world(g, (3, 0, 4, 1), dtype=torch.float64)
    y = module.lean(x.requires_grad_(), chosen, *rest)
    where_given("Lean.backward", lambda: module.Lean.backward(y.grad_fn, d))


@check(points=2, hint="da, dw_out, dw_in, dx: four products, and d(gate) from da without a fifth")
def the_backward_makes_four_products_and_none_of_the_forward_again(student, g):
    world = a_world(g, (6, 6, 6, 6), dtype=torch.float64)       # padding them costs nothing
    leaves = [v if v.dtype == torch.long else v.requires_grad_() for v in world]
    y = kernels(student, launches=False).lean(*leaves)
    with profile(with_flops=True, record_shapes=True) as seen:
        y.backward(random(g, 12, D))
    work = sum(e.flops for e in seen.key_averages() if e.key.endswith(("::mm", "bmm", "addmm")))
    one = 2 * 24 * D * H
    require(work < 5 * one, "work of the products in Lean.backward", f"{4 * one} operations, "
            f"four products of all choices (and less than five, {5 * one})", work)


@check(points=2, hint="torch.promote_types(x.dtype, torch.float32) for d(gate), a sum of products")
def the_backward_by_hand_is_as_exact_in_bfloat16_as_autograds(student, g):
    the_rung_is_as_exact(kernels(student, launches=False).lean, g, (90, 0, 130, 20),
                         torch.bfloat16, "lean")


def the_rung_is_as_exact(rung, g, sizes, dtype, name, forward=False):
    world = a_world(g, sizes, dtype=dtype)
    d = random(g, len(world[0]), D).to(dtype).double()
    true = public.gradients(lambda *w: loop(*w)[0], public.doubles(world), d)
    plain = public.gradients(lambda *w: loop(*w)[0], world, d)
    results = []

    def noted(*world):
        results.append(rung(*world))
        return results[0]
    for of, a, b, c in zip(public.NAMES, public.gradients(noted, world, d), plain, true,
                           strict=True):
        as_good_as_the_loop(f"d{of} of {name} in {dtype}", a, b, c)
    if forward:
        as_good_as_the_loop(f"y of {name} in {dtype}", results[0], loop(*world)[0],
                            loop(*public.doubles(world))[0])


# --- part D ---

@check(points=2, hint="w has three strides, and need not be contiguous: 'dx' multiplies by w_in^T")
def dx_multiplies_by_the_transposed_and_scatters(student, g):
    launch = public.a_launch(student, g)
    launch.w = launch.w.mT.contiguous().mT
    public.launched(launch, "dx", launch.rows)
    same("OUT of 'dx'", launch.out,
         public.in_order(launch, public.products(launch, launch.rows, 0)).float())


if public.triton is not None:
    tl = public.tl

    @public.triton.jit
    def a_part(DA, GATE, Z, DZ, GATED_A, DB, SHARE, FUNCTION: tl.constexpr):
        row, column = tl.arange(0, 16), tl.arange(0, 8)
        r = (20 + row).to(tl.int64)
        share = FUNCTION(tl.load(DA + row[:, None] * 8 + column[None, :]),
                         tl.load(GATE + row)[:, None], 8 + column, r, row < 11,
                         tl.program_id(0) + 2, Z, DZ, GATED_A, DB, 13)
        tl.store(SHARE + row, share)


@check(points=2, hint="dz = gate da gelu'(z), and db is its sum over the rows; the share of "
                      "d(gate) is <da, a>, without the gate")
def backward_of_gelu_stores_three_things_of_its_columns_and_returns_the_fourth(student, g):
    # columns 8 to 15 of 13, rows 20 to 30 alive; what a product leaves beyond these is 0
    function, inside = kernels(student).backward_of_gelu, (slice(20, 31), slice(8, 13))
    da, z = torch.zeros(16, 8), random(g, 31, 13).float()
    da[:11, :5], gate, share = random(g, 11, 5), random(g, 16).float(), torch.empty(16)
    gate[::5] = 0                                   # of choices that a full expert dropped
    dz, gated_a, db = (torch.full((n, 13), math.nan) for n in (31, 31, 3))
    public.Watched(a_part)[(1,)](da, gate, z, dz, gated_a, db, share, function)
    da, z, gate = da[:11, :5].double(), z[inside].double(), gate[:11, None].double()
    a, true_dz = F.gelu(z), gate * da * gradient(lambda z: F.gelu(z).sum(), z)
    for name, got, place, true in (("DZ", dz, inside, true_dz),
                                   ("GATED_A", gated_a, inside, gate * a),
                                   ("DB", db, (2, inside[1]), true_dz.sum(dim=0))):
        expected = torch.full_like(got, math.nan)
        expected[place] = true.float()
        same(f"{name} of backward_of_gelu, NaN where nothing belongs", got, expected,
             scale=true_dz.abs().sum(dim=0).max() if name == "DB" else None)
    same("what backward_of_gelu returns, <da, gelu(z)> of each row", share[:11],
         (da * a).sum(dim=1).float(), scale=(da * a).abs().sum(dim=1).max())


@check(points=2, hint="acc is da before the gate; DGATES has one number for all columns of a "
                      "block, DB a row for each tile")
def da_stores_dz_the_gated_activations_and_its_share_of_two_sums(student, g):
    launch = public.a_launch(student, g, depth=H, n=D + 3)
    n, tiles_n = D + 3, -(-(D + 3) // public.BLOCK)
    launch.z, order = random(g, launch.S, n).float(), launch.plan.order
    launch.gates[::5] = 0                           # of choices that a full expert dropped
    dgates = torch.full((launch.S, tiles_n), math.nan)
    db = torch.zeros(len(launch.tiles.expert), n)
    public.launched(launch, "da", launch.rows, gates=launch.gates, z=launch.z,
                    gated_a=launch.extra, dgates=dgates, db=db)
    z, gate = launch.z.double(), launch.gates.double()[order, None]
    da, slope = public.products(launch, launch.rows, 0), gradient(lambda z: F.gelu(z).sum(), z)
    dz = gate * da * slope
    same("OUT of 'da', which is dz, sorted by expert", launch.out, dz.float())
    same("GATED_A, gate gelu(z), sorted by expert", launch.extra, (gate * F.gelu(z)).float())
    same("DGATES, <da, gelu(z)> of each choice, summed over its tiles", dgates.sum(dim=1),
         public.in_order(launch, (da * F.gelu(z)).sum(dim=1)).float(),
         scale=(da * F.gelu(z)).abs().sum(dim=1).max())
    expected = torch.zeros(E, n, dtype=torch.float64)
    for r, e in enumerate(launch.ids):
        expected[e] += dz[r]
    got = torch.zeros(E + 1, n).index_add_(0, launch.tiles.expert, db)[:E]
    same("DB, the sum of dz over each expert's rows, summed over its tiles", got,
         expected.float(), scale=dz.abs().sum(dim=0).max())
    launch = public.a_launch(student, g, (3, 0, 1), n=5, depth=H)
    launch.z = random(g, 4, 5).float()
    public.launched(launch, "da", launch.rows, z=launch.z, gated_a=launch.extra,
                    dgates=torch.empty(4, 1), db=torch.empty(len(launch.tiles.expert), 5))
    slope = gradient(lambda z: F.gelu(z).sum(), launch.z.double())
    same("OUT of 'da' without gates", launch.out,
         (public.products(launch, launch.rows, 0) * slope).float())
    same("GATED_A of 'da' without gates", launch.extra, F.gelu(launch.z.double()).float())


@check(points=2, hint="mask lanes beyond DEPTH, WIDTH and HEIGHT, and after the group's last row")
def sizes_smaller_than_a_block_and_just_above_one_are_right(student, g):
    for n, depth in ((17, 3), (3, 33), (64, 16)):
        launch = public.a_launch(student, g, (2, 18), n=n, depth=depth)
        launch.blocks = dict.fromkeys(launch.blocks, launch.blocks["up"]._replace(columns=32))
        of = f"WIDTH={n}, DEPTH={depth}, blocks of 16 rows and 32 columns"
        public.launched(launch, "up", launch.x, K, bias=launch.bias, z=launch.z)
        z = public.products(launch, launch.x, K) + launch.bias.double()[launch.ids]
        same(f"Z of 'up', {of}", launch.z, z.float())
        same(f"OUT of 'up', {of}", launch.out, F.gelu(z).float())
        dw = launch.module.gemm_dw(launch.blocks, launch.plan, launch.rows, launch.z)
        expected = [launch.rows[r].double().mT @ launch.z[r].double()
                    for r in (slice(0, 2), slice(2, 20))]
        same(f"DW, HEIGHT={depth}, WIDTH={n}", dw, torch.stack(expected).float())


@check(points=2, hint="accumulate in tl.float32 and convert once, when the result is stored")
def long_sums_are_made_in_float32(student, g):
    # about 1000, where float16 has steps of 0.5, in steps of 32 products
    launch = public.a_launch(student, g, (16,), 1, n=16, depth=1024, dtype=torch.float16)
    launch.blocks = dict.fromkeys(launch.blocks, launch.blocks["dx"]._replace(step=32))
    launch.rows.uniform_(0.5, 1.5, generator=g)
    launch.w.uniform_(0.5, 1.5, generator=g)
    public.launched(launch, "dx", launch.rows)
    as_good_as_the_loop(
        "1024 products, added up by grouped_gemm,", launch.out,
        public.in_order(launch, launch.rows @ launch.w[0]),
        public.in_order(launch, public.products(launch, launch.rows, 0)))
    tall = torch.rand(2, 1024, 16, generator=g).add(0.5).half()
    plan = launch.module.Plan(None, torch.arange(1024), torch.tensor([0, 1024]))
    as_good_as_the_loop(
        "1024 products, added up by grouped_dw,", launch.module.gemm_dw(launch.blocks, plan, *tall),
        (tall[0].mT @ tall[1])[None], (tall[0].double().mT @ tall[1].double())[None])


@check(points=2, hint="e * stride and row * stride may exceed 2**31: int64, by .to(tl.int64)")
def rows_and_experts_far_apart_in_memory_are_found(student, g):
    # address space, not memory: only the pages of a few rows are ever touched
    far, n = 2 ** 30 + 8, 16
    memory = torch.empty(2 * far + 2 * n + n * n, dtype=torch.float16)
    launch = public.a_launch(student, g, (1, 1, 1), 1, n, n, torch.float16)
    rows = memory.as_strided((3, n), (far, 1)).copy_(launch.rows)
    launch.w = memory[2 * n:].as_strided((3, n, n), (far, n, 1)).copy_(launch.w)
    expected = public.products(launch, rows, 0)
    public.launched(launch, "dx", rows)
    same(f"OUT of rows and matrices {far} elements apart", launch.out,
         public.in_order(launch, expected).half())
    del memory, rows
    launch, first = public.a_launch(student, g, (1, 1, 1), 1, n, n, torch.float16), 2 ** 31 // n
    order = torch.tensor([7, first + 2, first + 1])
    launch.plan = launch.plan._replace(order=order)
    launch.out = torch.empty(first + 3, n, dtype=torch.float16)
    public.launched(launch, "dx", launch.rows)
    same(f"OUT of choices {order.tolist()}", launch.out[order],
         public.products(launch, launch.rows, 0).half())
    rows = launch.out                                   # no longer a result, but rows
    rows[first:] = launch.rows
    plan = launch.plan._replace(offsets=launch.plan.offsets + first)
    same(f"DW of rows {first} to {first + 2}, one of each expert",
         launch.module.gemm_dw(launch.blocks, plan, rows, rows),
         torch.stack([torch.outer(row, row) for row in launch.rows.double()]).half())


# --- all of it ---

@check(points=2, hint="shapes, not constants: T may be 0, K may be 1 or E, E may be 1")
def the_edges_no_token_one_token_one_expert_and_every_expert(student, g):
    module = kernels(student)
    for sizes, k in (((0, 0, 0), 2), ((1, 1, 1), 3), ((5,), 1), ((0, 0, 18), 1)):
        of = f"fused, K={k}, {list(sizes)} choices of the experts"
        world = a_world(g, sizes, k, d=5, h=7)
        public.same_results(module.fused, world, random(g, len(world[0]), 5), of)


@check(points=2, hint="every entry is written: a tile's rows, and zeros for an expert without rows")
def idle_experts_get_zeros_from_dirty_memory(student, g):
    module, world = kernels(student), a_world(g, (3, 0, 3), d=5, h=7)
    for w in world[3:]:
        w[1] = math.nan                                   # nobody visits expert 1
    # as torch.use_deterministic_algorithms, which imports a compiler first: torch.empty gives NaN
    for name, rung in (("lean", module.lean), ("fused", module.fused)):
        x, chosen, *rest = world
        torch._C._set_deterministic_algorithms(True, warn_only=True)
        try:
            grads = gradient(lambda x, *rest, r=rung, c=chosen: r(x, c, *rest), x, *rest)
        finally:                                          # empty memory of 4 GB comes in a check
            torch._C._set_deterministic_algorithms(False)
        for of, grad in zip(public.NAMES, grads, strict=True):
            require(bool(grad.isfinite().all()), f"d{of} of {name}", "finite numbers",
                    f"{int((~grad.isfinite()).sum())} entries that are not")
        for of, grad in zip(public.NAMES[2:], grads[2:], strict=True):
            same(f"d{of} of {name}, of the expert that nobody visits", grad[1],
                 torch.zeros_like(grad[1]))


@check(points=2, hint="accumulate in tl.float32; convert with .to(dtype) only what is stored")
def fused_is_as_exact_in_float16_as_plain_torch(student, g):
    the_rung_is_as_exact(kernels(student).fused, g, (9, 0, 15), torch.float16,
                         "fused", forward=True)


# --- the answers, measured ---

@check(points=2, hint="F1: the length of Tiles times the blocks across. F2: which have expert E?")
def how_many_programs_start_and_how_many_find_work(student, g):
    tiles, columns = -(-37 * 2 // 32) + 5, -(-45 // 32)
    used = len(range(0, 37 * 2, 32))
    for name, value in (("programs_started", tiles * columns),
                        ("programs_without_work", (tiles - used) * columns)):
        same(f"F1, F2: {name}", float(answered(student, name, 1)), float(value))


@check(points=2, hint="0 * NaN is NaN. Over what is each number a sum, and is it stored?")
def which_masked_lanes_may_hold_anything(student, g):
    # 12 rows of 16 are the group's, 20 columns of A of 32 are there, 10 columns of W of 16
    a, w, z = torch.zeros(16, 32), torch.zeros(32, 16), torch.zeros(16, 16)
    a[:12, :20], w[:20, :10], z[:12, :10] = 1, 1, 1
    found = answered(student, "nan_is_seen", dict.fromkeys((
        "A beyond DEPTH", "W beyond WIDTH, up", "A after the group, up", "Z after the group, da",
        "A after the group, dw"), True))
    def stored(a=a, w=w, z=z):
        return (a @ w)[:12, :10], ((a @ w) * F.gelu(z)).sum(dim=0)[:10], (a.mT @ z)[:20, :10]
    depth, columns, after, after_z = a.clone(), w.clone(), a.clone(), z.clone()
    depth[:, 20:] = columns[:, 10:] = after[12:] = after_z[12:] = math.nan
    for name, value in (("A beyond DEPTH", stored(a=depth)[0]),
                        ("W beyond WIDTH, up", stored(w=columns)[0]),
                        ("A after the group, up", stored(a=after)[0]),
                        ("Z after the group, da", stored(z=after_z)[1]),
                        ("A after the group, dw", stored(a=after)[2])):
        same(f"F3, {name}", found[name], bool(value.isnan().any()))


@check(points=3, hint="F4: which is multiplied by the gate? F5, F6: the docstring of lean. F7: "
                      "which number comes after 2048 in float16?")
def what_a_gate_of_0_stops_what_is_kept_and_how_float16_counts(student, g):
    x, chosen, gates, *weights = a_world(g, (1,), 1, torch.float64)
    leaves = x, torch.zeros_like(gates), *weights
    d = random(g, 1, D)
    grads = dict(zip(public.NAMES, gradient(
        lambda x, *rest: (loop(x, chosen, *rest)[0] * d).sum(), *leaves), strict=True))
    grads["gate"] = grads["gates"]
    found = answered(student, "gets_nothing_from_gate_0",
                     dict.fromkeys(("x", "w_in", "b_out", "gate"), True))
    for name, answer in found.items():
        same(f"F4, {name}", answer, not grads[name].any())

    module, saved = kernels(student, launches=False), []
    x, chosen, gates, *weights = a_world(g, (7, 7), K, torch.float16, 192, 768)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        module.Lean.apply(x.requires_grad_(), chosen, gates, *weights)
    order = sorted(range(14), key=chosen.flatten().tolist().__getitem__)
    z = torch.stack([x[s // K].double() @ weights[0][e].double() + weights[1][e]
                     for s, e in zip(order, [0] * 7 + [1] * 7, strict=True)])
    parts = {"x": x, "z": z, "gelu(z)": F.gelu(z), "raw": loop(x, chosen, gates, *weights)[1]}
    kept, bytes_kept = answered(student, "kept", dict.fromkeys(parts, True)), 0
    for name, part in parts.items():
        near = tolerance(torch.float16, part.abs().max())
        there = any(v.shape == part.shape and (v.double() - part).abs().max() <= near
                    for v in saved)
        bytes_kept += part.numel() * x.itemsize * there
        same(f"F5, {name} is kept", kept[name], there)
    same("F6, bytes kept per token", float(answered(student, "bytes_kept_per_token", 1)),
         bytes_kept / 7)
    total = torch.zeros((), dtype=torch.float16)
    for _ in range(4096):
        total += 1
    same("F7, 4096 ones in float16", float(answered(student, "ones_in_float16", 1)), total.item())
