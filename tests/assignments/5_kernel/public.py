"""The public checks of assignment 5: tiles, gradients in torch, the kernels in the interpreter.

Every launch is watched: a lane that reads or writes outside the tensors of its launch is a failure,
and so is a product of float32 in TF32; masked lanes of a load without other= hold NaN, as they may
on a GPU.
"""
import linecache
import math
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from checking import CannotRun, Failure, answered, check, gradient, random, require, same

try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:
    triton = None

D, H, E, K = 20, 24, 3, 2            # neither D nor H is a multiple of a block
BLOCK = 16
SIZES = (17, 0, 1)                   # rows of each expert: two tiles, an idle expert, one row
NAMES = ("x", "gates", "w_in", "b_in", "w_out", "b_out")


# --- a world, and what is expected of it ---

def a_world(g, sizes=SIZES, k=K, dtype=torch.float32, d=D, h=H):
    """x, chosen (T, k) with sizes[e] choices of expert e, gates and the four weights."""
    ids = torch.tensor([e for e, n in enumerate(sizes) for _ in range(n)],
                       dtype=torch.long)
    chosen = ids[torch.randperm(len(ids), generator=g)].view(-1, k)
    T, n = len(chosen), len(sizes)
    weights = [random(g, n, d, h) / math.sqrt(d), random(g, n, h),
               random(g, n, h, d) / math.sqrt(h), random(g, n, d)]
    wide = torch.promote_types(dtype, torch.float32)
    gates = (torch.rand(T, k, generator=g, dtype=torch.float64) + 0.1).to(wide)
    return [random(g, T, d).to(dtype), chosen, gates, *(w.to(dtype) for w in weights)]


def loop(x, chosen, gates, w_in, b_in, w_out, b_out):
    """(y, raw), expert by expert, each on all tokens."""
    raw, y = torch.zeros(*chosen.shape, x.shape[1], dtype=x.dtype), torch.zeros_like(x)
    for e in range(len(w_in)):
        out = F.gelu(x @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e]
        mine = chosen == e
        raw = raw + mine[..., None] * out[:, None]
        y = y + ((gates * mine).sum(dim=1, keepdim=True) * out).to(x.dtype)
    return y, raw


def doubles(world):
    return [v if v.dtype == torch.long else v.double() for v in world]


def gradients(run, world, d):
    """The gradient of <run(world), d> on everything but the choices."""
    x, chosen, *rest = world
    return gradient(lambda x, *rest: (run(x, chosen, *rest) * d.to(x.dtype)).sum(), x, *rest)


def same_results(run, world, d, of):
    """Compare y and the gradients of <y, d> with those of the loop, by autograd, in float64."""
    def noted(*world):
        results.append(run(*world))
        return results[0]
    results, true_y = [], loop(*doubles(world))[0]
    expected = gradients(lambda *w: loop(*w)[0], doubles(world), d)
    found = gradients(noted, world, d)
    same(f"y of {of}", results[0], true_y.to(world[0].dtype))
    for name, got, true, v in zip(NAMES, found, expected, (world[0], *world[2:]), strict=True):
        same(f"d{name} of {of}", got, true.to(v.dtype))


# --- the student's kernels, watched ---

def kernels(student, launches=True):
    """The student's kernels.py, what other assignments write put in, and its launches watched."""
    if launches and triton is None:
        raise CannotRun("Triton is not installed here: pip install triton, on Linux")
    module = student.kernels

    def plan_choices(chosen, n_experts):
        flat = chosen.flatten().tolist()
        order = sorted(range(len(flat)), key=flat.__getitem__)
        starts = [sum(v < e for v in flat) for e in range(n_experts + 1)]
        return module.Plan(*(torch.tensor(v, dtype=torch.long)
                             for v in ([flat[s] for s in order], order, starts)))

    def gated_sum(raw, gates, return_choices):
        y = torch.einsum("tkd,tk->td", raw.to(gates.dtype), gates).to(raw.dtype)
        return [y, raw] if return_choices else y

    module.plan_choices, module.gated_sum = plan_choices, gated_sum
    if launches and not isinstance(module.grouped_gemm, Watched):        # a second seed
        module.grouped_gemm = Watched(module.grouped_gemm)
        module.grouped_dw = Watched(module.grouped_dw)
    return module


class Watched:
    """A kernel whose loads and stores are looked at before they happen."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | options
            tensors = {name: v for name, v in named.items() if isinstance(v, torch.Tensor)}
            with Lanes(self.kernel.__name__, tensors):
                self.kernel[grid](*args, **options)
        return launch


class Lanes:
    """While open, no lane leaves the tensors, masked lanes hold NaN unless other= says, and float32
    is multiplied as float32."""

    def __init__(self, kernel, tensors):
        self.kernel, self.failure = kernel, None
        self.spans = []
        for name, v in tensors.items():
            last = sum((n - 1) * stride for n, stride in zip(v.shape, v.stride(), strict=True))
            start, size = v.data_ptr(), v.itemsize
            if v.numel():
                self.spans.append((start, start + last * size, size, name))

    def look(self, how, addresses, mask):
        live = addresses[np.broadcast_to(mask, addresses.shape)]
        for low, high, size, name in self.spans:
            if len(live) and low <= int(live.min()) <= high:
                if int(live.max()) > high:
                    beyond = (int(live.max()) - high) // size
                    self.fail(how, f"element {beyond} after the end of {name}")
                return
        if len(live):
            self.fail(how, "an address before or after all of them")

    def fail(self, how, where, expected="elements of its tensors", hint="mask lanes beyond the "
             "group's rows, DEPTH, WIDTH or HEIGHT; int64 indices"):
        frame = sys._getframe()
        while frame and not frame.f_code.co_filename.endswith("kernels.py"):
            frame = frame.f_back
        place = f"line {frame.f_lineno} of kernels.py" if frame else "a launch"
        self.failure = Failure(f"what {self.kernel} {how} in {place}", expected, where, hint)
        raise self.failure

    def __enter__(self):
        builder = interpreter.interpreter_builder
        load, store = builder.create_masked_load, builder.create_masked_store
        dot = builder.create_dot

        def watched_load(ptrs, mask, other, *rest):
            self.look("reads", ptrs.data, mask.data)
            if other is None:
                kind = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty()))
                dirt = np.nan if kind.kind == "f" else np.iinfo(kind).max
                other = interpreter.TensorHandle(np.full(ptrs.data.shape, dirt, kind),
                                                 ptrs.get_element_ty())
            return load(ptrs, mask, other, *rest)

        def watched_store(ptrs, value, mask, *rest):
            self.look("writes", ptrs.data, mask.data)
            return store(ptrs, value, mask, *rest)

        def watched_dot(a, b, acc, precision, *rest):
            half = a.dtype.primitive_bitwidth == 16
            if not half and precision == interpreter._ir.INPUT_PRECISION.TF32:
                self.fail("multiplies", "TF32, which has 10 bits, the default of tl.dot",
                          "float32 in float32", "tl.dot(..., input_precision=PRECISION)")
            return dot(a, b, acc, precision, *rest)
        builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
        builder.create_dot = watched_dot

    def __exit__(self, *_):
        for name in ("create_masked_load", "create_masked_store", "create_dot"):
            delattr(interpreter.interpreter_builder, name)              # the class's own again
        if self.failure:
            raise self.failure


def a_launch(student, g, sizes=SIZES, k=K, n=H, depth=D, dtype=torch.float32):
    """A plan for rows of `sizes`, cut into tiles of 16, and tensors for one launch of a kernel.

    Its results are full of NaN, so an entry that is not written is noticed. The tiles are cut here,
    two of them not needed.
    """
    module, S = kernels(student), sum(sizes)
    starts = [sum(sizes[:e]) for e in range(len(sizes) + 1)]
    tiles = [(e, r) for e in range(len(sizes)) for r in range(starts[e], starts[e + 1], BLOCK)]
    expert, start = zip(*tiles, *[(len(sizes), 0)] * 2, strict=True)
    nothing = torch.full((S, n), math.nan, dtype=dtype)
    return SimpleNamespace(
        module=module, S=S, k=k, ids=[e for e, m in enumerate(sizes) for _ in range(m)],
        blocks=dict.fromkeys(("up", "down", "da", "dx", "dw"),
                             module.Block(BLOCK, BLOCK, BLOCK, warps=4, stages=2)),
        plan=module.Plan(None, torch.randperm(S, generator=g), torch.tensor(starts)),
        tiles=module.Tiles(torch.tensor(expert), torch.tensor(start)),
        x=random(g, S // k, depth).to(dtype), rows=random(g, S, depth).to(dtype),
        w=(random(g, len(sizes), depth, n) / math.sqrt(depth)).to(dtype),
        bias=random(g, len(sizes), n).to(dtype), gates=random(g, S).to(torch.float32),
        out=nothing.clone(), z=nothing.clone(), extra=nothing.clone())


def products(launch, rows, shared_by):
    """Row r of the plan times its expert's matrix, one by one, in float64."""
    order, w = launch.plan.order.tolist(), launch.w.double()
    return torch.stack([rows[order[r] // shared_by if shared_by else r].double() @ w[launch.ids[r]]
                        for r in range(launch.S)])


def in_order(launch, rows):
    """Rows of the plan -> rows of the choices."""
    out = torch.empty_like(rows)
    for r, s in enumerate(launch.plan.order.tolist()):
        out[s] = rows[r]
    return out


def launched(launch, epilogue, a, shared_by=0, **options):
    launch.module.gemm(epilogue, launch.blocks, launch.plan, launch.tiles, a, launch.w, launch.out,
                       shared_by=shared_by, **options)


# --- part A ---

@check(hint="row t*K + k is token t's k-th choice: add up K neighbouring rows")
def a_token_gets_the_sum_of_its_choices(student, g):
    over = kernels(student, launches=False).over_choices
    for k in (1, 2, 3):
        for dtype in (torch.float64, torch.float32):
            rows = random(g, 5 * k, 3, dtype=dtype)
            expected = torch.tensor([[sum(rows[t * k + i, j].item() for i in range(k))
                                      for j in range(3)] for t in range(5)], dtype=dtype)
            same(f"over_choices, K={k}", over(rows, k), expected, scale=k * rows.abs().max())


@check(points=3, hint="expert e needs ceil(n_e / rows) tiles; ceil(S / rows) + E are always enough")
def every_row_is_in_one_tile_and_a_tile_has_rows_of_one_expert(student, g):
    module = kernels(student, launches=False)
    for sizes in ((2, 0, 5), (4, 3, 0), (0, 4, 0, 1),
                  torch.randint(0, 9, (6,), generator=g).tolist()):
        starts = [sum(sizes[:e]) for e in range(len(sizes) + 1)]
        for rows in (1, 2, 4):
            tiles_cover(module, starts, rows)


def tiles_cover(module, starts, rows):
    n, S = len(starts) - 1, starts[-1]
    of = f"of offsets {starts}, {rows} rows per tile"
    tiles = module.plan_tiles(torch.tensor(starts), S, rows)
    expert, start = (v.tolist() for v in tiles)
    require(len(expert) == len(start) == -(-S // rows) + n, f"number of tiles {of}",
            -(-S // rows) + n, f"{len(expert)} experts and {len(start)} starts",
            "an upper bound that needs S, rows and E alone: the host does not look at offsets")
    seen = [0] * S
    for i, (e, r) in enumerate(zip(expert, start, strict=True)):
        if e == n:
            continue
        require(0 <= e < n and starts[e] <= r < starts[e + 1], f"first row of tile {i} {of}",
                f"a row of expert {e}" if 0 <= e < n else f"an expert, or {n} for none",
                f"expert {e}, row {r}", "a tile without rows has expert E")
        for row in range(r, min(r + rows, starts[e + 1])):
            seen[row] += 1
    require(seen == [1] * S, f"how many tiles each row is in, {of}", [1] * S, seen,
            "tile number j of expert e starts at offsets[e] + j * rows")


# --- part B ---

@check(points=4, hint="da = W_out d; dgate = <da, gelu(z)> + <d, b_out>; dz = gate da gelu'(z)")
def the_backward_written_by_hand_is_autograds(student, g):
    lean = kernels(student, launches=False).lean
    world = a_world(g, (3, 0, 4, 1), dtype=torch.float64)
    same_results(lean, world, random(g, 4, D), "lean")


# --- part C ---

if triton is not None:
    linecache.getlines(__file__)         # the interpreter reads it, which a check itself may not

    @triton.jit
    def twice(X, VALUE, SLOPE, FUNCTION: tl.constexpr):
        i = tl.arange(0, 32)
        value, slope = FUNCTION(tl.load(X + i))
        tl.store(VALUE + i, value)
        tl.store(SLOPE + i, slope)


@check(points=2, hint="Phi by tl.math.erf and phi by tl.exp; both are returned, the value first")
def gelu_comes_with_its_slope(student, g):
    z, gelu = random(g, 32).float() * 3, kernels(student).gelu
    value, slope = torch.empty(32), torch.empty(32)
    twice[(1,)](z, value, slope, gelu)
    Phi = torch.tensor([(1 + math.erf(v / math.sqrt(2))) / 2 for v in z.tolist()])
    phi = torch.tensor([math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for v in z.tolist()])
    same("gelu(z)", value, z * Phi)
    same("gelu'(z)", slope, Phi + z * phi)
    z = torch.tensor([20.0, -20.0, 200.0, -200.0]).repeat(8)
    twice[(1,)](z, value, slope, gelu)
    same("gelu of +-20 and +-200", value, z.clamp(min=0))
    same("gelu' of +-20 and +-200", slope, (z > 0).float())


# --- part D ---

@check(points=3, hint="row r is choice ORDER[r], of token ORDER[r] // SHARED_BY; Z is before gelu")
def up_gathers_each_row_and_keeps_what_comes_before_the_gelu(student, g):
    launch = a_launch(student, g)
    launched(launch, "up", launch.x, K, bias=launch.bias, z=launch.z)
    z = products(launch, launch.x, K) + launch.bias.double()[launch.ids]
    same("Z of 'up', sorted by expert", launch.z, z.float())
    same("OUT of 'up', gelu(Z)", launch.out, F.gelu(z).float())


@check(points=2, hint="A is sorted (SHARED_BY = 0), C and GATES are in the order of the choices")
def down_scatters_each_gated_row_to_its_choice(student, g):
    for sizes, n, of in ((SIZES, H, "with gates"), ((3, 0, 1), 5, "without gates")):
        launch = a_launch(student, g, sizes, n=n)
        out = in_order(launch, products(launch, launch.rows, 0) + launch.bias.double()[launch.ids])
        gates = launch.gates if of == "with gates" else None
        launched(launch, "down", launch.rows, bias=launch.bias, gates=gates)
        same(f"OUT of 'down' {of}", launch.out,
             (out * (1 if gates is None else gates.double()[:, None])).float())


# --- part E ---

@check(points=3, hint="loop over the rows offsets[e] to offsets[e+1] in blocks of STEP; rows of A "
                      "lie along the columns of a^T")
def each_expert_gets_a_transposed_times_b_over_its_rows(student, g):
    launch = a_launch(student, g)
    for of, m, n in (("x and dz", D, H), ("a and dout", H, D), ("rows of 7 and of 3", 7, 3)):
        left, right = random(g, launch.S, m).float(), random(g, launch.S, n).float()
        expected = torch.zeros(E, m, n, dtype=torch.float64)
        for r, e in enumerate(launch.ids):
            expected[e] += torch.outer(left[r].double(), right[r].double())
        same(f"DW of {of}", launch.module.gemm_dw(launch.blocks, launch.plan, left, right),
             expected.float())


@check(points=3, hint="the parts are right alone? Then look at what fused_forward hands to them")
def forward_and_backward_are_those_of_the_loop(student, g):
    same_results(kernels(student).fused, a_world(g, (5, 0, 13)), random(g, 9, D), "fused")


# --- part F ---

@check(hint="this check looks at the form alone; the hidden ones measure whether you are right")
def every_question_has_an_answer_of_the_right_form(student, g):
    for name in ("programs_started", "programs_without_work", "bytes_kept_per_token",
                 "ones_in_float16"):
        answered(student, name, 1)
    for name, keys in (("nan_is_seen", ("A beyond DEPTH", "W beyond WIDTH, up",
                                        "A after the group, up", "Z after the group, da",
                                        "A after the group, dw")),
                       ("gets_nothing_from_gate_0", ("x", "w_in", "b_out", "gate")),
                       ("kept", ("x", "z", "gelu(z)", "raw"))):
        answered(student, name, dict.fromkeys(keys, True))
