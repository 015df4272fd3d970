"""Tests of kernels.py: every rung of the ladder gives the numbers and gradients of the first.

Only `reference` is trusted, and it is itself worked by hand below. Without a GPU the Triton kernels
run in Triton's interpreter, in float32 and float16, and are compiled for a GPU that is not there:
green here says that they are right, not that they are fast. With one, `pytest -m gpu` goes on.
"""
import ast
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import kernels
from kernels import BACKENDS, expert_mlp, plan_choices, plan_tiles, sliced_mlp
from moe import MoE

T, D, H, E, K = 37, 20, 45, 5, 2            # no multiple of any block
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")

# Every way through the ladder: (rung, by what, device, dtypes, D, H); grouped_mm wants rows of a
# multiple of 16 bytes, which `grouped` fills up for H, and Triton's interpreter multiplies bfloat16
# wrongly.
WAYS = {
    "sliced": ("sliced", None, "cpu", (f64, f32, bf16), D, H),
    "grouped by slices": ("grouped", "slices", "cpu", (f64, f32, bf16), D, H),
    "grouped by grouped_mm": ("grouped", "grouped_mm", "cpu", (f32, bf16), 24, 48),
    "grouped by grouped_mm, filled up": ("grouped", "grouped_mm", "cpu", (f32, bf16), 24, 42),
    "grouped by grouped_mm, sizes unknown": ("grouped", "blind", "cpu", (f32, bf16), 24, 48),
    "lean by slices": ("lean", "slices", "cpu", (f64, f32, bf16), D, H),
    "lean by grouped_mm": ("lean", "grouped_mm", "cpu", (f32, bf16), 24, 48),
    "fused": ("fused", None, DEVICE, (f32, f16, bf16) if CUDA else (f32, f16), D, H),
}
MARKS = {"fused": needs_triton}
IN_FLOAT64 = [name for name in BACKENDS if name != "fused"]
BY_HAND = ["lean", pytest.param("fused", marks=needs_triton)]
every_way = pytest.mark.parametrize("way", [pytest.param(w, marks=MARKS.get(w, ())) for w in WAYS])
every_way_and_dtype = pytest.mark.parametrize(
    "way, dtype", [pytest.param(w, dtype, marks=MARKS.get(w, ()))
                   for w, (*_, dtypes, _, _) in WAYS.items() for dtype in dtypes],
    ids=lambda p: str(p).removeprefix("torch."))


def distinct(T, E, K):
    """K different experts for each token, in no particular order."""
    return torch.rand(T, E).argsort(dim=1)[:, :K]


def without(idle):
    """The choices of a batch in which nobody visits expert `idle`."""
    others = torch.tensor([e for e in range(E) if e != idle])
    return others[distinct(T, E - 1, K)]


CASES = {       # name: (E, the experts that the tokens chose)
    "any": lambda: (E, distinct(T, E, K)),
    "the first expert is idle": lambda: (E, without(0)),
    "the last expert is idle": lambda: (E, without(E - 1)),
    "a middle expert is idle": lambda: (E, without(2)),
    "all tokens on one expert": lambda: (E, torch.full((T, 1), 3)),
    "no tokens": lambda: (E, distinct(0, E, K)),
    "one token": lambda: (E, distinct(1, E, K)),
    "K = 1": lambda: (E, distinct(T, E, 1)),
    "K = 3": lambda: (E, distinct(T, E, 3)),
    "K = E": lambda: (E, distinct(T, E, E)),
    "E = 1": lambda: (1, distinct(T, 1, 1)),
    "E = 1, full tiles": lambda: (1, distinct(65, 1, 1)),
    "E = 128, most of them idle": lambda: (128, distinct(9, 128, K)),
    "the same expert twice": lambda: (E, torch.tensor([[1, 1]]).expand(T, 2)),
}


def an_mlp_layer(E, chosen, dtype=f64, D=D, H=H, device="cpu"):
    """x, gates, w_in, b_in, w_out, b_out: inputs of order 1 whose outputs are of order 1.

    The gates are never less precise than float32, as a router's, and some are 0: dropped choices.
    """
    T, K = chosen.shape
    sizes = {"x": (T, D), "gates": (T, K), "w_in": (E, D, H), "b_in": (E, H),
             "w_out": (E, H, D), "b_out": (E, D)}
    scale = {"w_in": D ** -0.5, "w_out": H ** -0.5}
    layer = {name: torch.randn(size, dtype=f64).mul(scale.get(name, 1)).to(device, dtype)
             for name, size in sizes.items()}
    layer["gates"] = layer["gates"].to(torch.promote_types(dtype, f32))
    layer["gates"][::5, 0] = 0
    return layer


def everything(backend, tensors, chosen, asked=True, view=lambda name, t: t):
    """y, and if asked raw, and the gradient of every input, for fixed dL/dy, dL/draw of order 1."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    x, gates, *weights = (view(name, t) for name, t in leaves.items())
    out = expert_mlp(x, chosen.to(x.device), gates, *weights, backend, return_choices=asked)
    out = dict(zip(("y", "raw"), out, strict=True)) if asked else {"y": out}
    grid = torch.Generator().manual_seed(1)
    sum((t * torch.randn(t.shape, generator=grid, dtype=f64).to(t)).sum()
        for t in out.values()).backward()
    return out | {f"d{name}": t.grad for name, t in leaves.items()}


def assert_as_good_as_a_loop(backend, layer, chosen, asked):
    """FlashAttention's rule: at most twice the error of the plain loop in the same precision."""
    truth = everything("reference", {n: t.double() for n, t in layer.items()}, chosen, asked)
    ours = everything(backend, layer, chosen, asked)
    if layer["x"].dtype == f64:
        return assert_same(ours, truth)
    loop = everything("reference", layer, chosen, asked)
    for name, mine in ours.items():
        true = truth[name]
        assert mine.shape == true.shape and mine.dtype == loop[name].dtype, name
        if true.numel():
            error, noise = ((v.double() - true).abs().max() for v in (mine, loop[name]))
            tiny = 8 * torch.finfo(f32).eps * true.abs().max()      # sums in another order
            times = 2 if true.numel() > 8 else 4                    # the largest of few says little
            assert error <= times * noise + tiny, f"{name}: {error} and not {noise}"
            assert noise <= 0.1 * true.abs().max()          # the bar itself means something


def assert_same(actual, expected):
    for name in expected:
        assert_close(actual[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def go(monkeypatch):
    """go(way): its rung, device, D and H, with grouped_mm chosen or not as it says."""
    def go(way):
        backend, by, device, _, D, H = WAYS[way]
        monkeypatch.setattr(kernels, "use_grouped_mm", lambda *_, **pads: by != "slices")
        if by == "blind":           # as on a GPU and while compiling: the host must not look
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        return backend, device, D, H
    return go


# --- the definition ---

def test_the_reference_worked_by_hand():
    # D = H = 1. Expert 0: gelu(3x - 1) * 2 + 1; expert 1: gelu(-x) * 5. At x = 2 with
    # gelu(5) = 5 and gelu(-2) = -.0455: raw = 11 and -.2275, y = .5 * 11 - 2 * .2275 = 5.045
    x, chosen, gates = torch.tensor([[2.0]]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 2.0]])
    w_in, b_in = torch.tensor([[[3.0]], [[-1.0]]]), torch.tensor([[-1.0], [0.0]])
    w_out, b_out = torch.tensor([[[2.0]], [[5.0]]]), torch.tensor([[1.0], [0.0]])
    y, raw = expert_mlp(x, chosen, gates, w_in, b_in, w_out, b_out, "reference", True)
    assert_close(raw, torch.tensor([[[11.0], [-0.2275]]]), rtol=0, atol=1e-4)
    assert_close(y, torch.tensor([[5.0450]]), rtol=0, atol=1e-4)


def test_every_masked_load_says_what_the_masked_lanes_hold():
    # no CPU run can see it: the interpreter and most GPUs happen to fill in zeros
    source = Path(kernels.__file__).read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"]
    words = [{word.arg for word in call.keywords} for call in calls]
    assert sum("mask" in w for w in words) >= 8
    assert all("other" in w for w in words if "mask" in w)


# --- every rung against it ---

@pytest.mark.parametrize("case", CASES)
@every_way_and_dtype
def test_every_rung_is_as_exact_as_a_loop_over_the_experts(way, dtype, case, go):
    backend, device, D, H = go(way)
    n_experts, chosen = CASES[case]()
    layer = an_mlp_layer(n_experts, chosen, dtype, D, H, device)
    for asked in (False, True)[:1 if n_experts == 128 else 2]:      # Triton's interpreter is slow
        assert_as_good_as_a_loop(backend, layer, chosen, asked)


@pytest.mark.parametrize("backend", ["auto", "sliced", "grouped", "lean"])
def test_weights_may_lie_in_memory_in_any_order(backend):
    chosen = torch.tensor([[1, 3], [0, 2], [3, 1], [2, 2]])
    layer = an_mlp_layer(E, chosen, f32, D=8, H=12)
    expected = everything("reference", layer, chosen, False)
    for lie in (lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1),         # experts last
                lambda w: torch.cat([w, w], dim=2)[..., :w.shape[2]],               # a part of more
                lambda w: w.repeat_interleave(2, dim=2)[..., ::2]):                 # every second
        def view(name, t, lie=lie):
            return lie(t) if name in ("w_in", "w_out") else t

        assert torch.equal(lie(layer["w_in"]), layer["w_in"])
        assert not lie(layer["w_in"]).is_contiguous()
        assert_same(everything(backend, layer, chosen, False, view), expected)


@every_way
def test_transposed_and_expanded_inputs_are_as_good_as_contiguous_ones(way, go):
    backend, device, D, H = go(way)
    chosen = torch.tensor([[1, 3, 0]]).expand(T, 3)
    layer = an_mlp_layer(E, chosen, f32, D, H, device)
    layer |= {name: layer[name].mT.contiguous() for name in ("x", "w_in", "w_out", "b_in")}
    layer["gates"] = layer["gates"][:1]

    def view(name, t):
        if name == "gates":
            return t.expand(T, 3)
        return t.mT if name in ("x", "w_in", "w_out", "b_in") else t

    for asked in (False, True):
        assert_same(everything(backend, layer, chosen, asked, view),
                    everything("reference", layer, chosen, asked, view))


@every_way
def test_rows_of_a_wider_tensor_and_expanded_gradients_are_as_good(way, go):
    backend, device, D, H = go(way)
    chosen = distinct(T, E, K).to(device)
    results = []
    for rung in (backend, "reference"):
        torch.manual_seed(2)
        layer = an_mlp_layer(E, chosen, f32, D + 4, H, device)
        x, gates, w_in, b_in, w_out, b_out = (t.requires_grad_() for t in layer.values())
        weights = w_in[:, 4:], b_in, w_out[..., 4:], b_out[:, 4:]
        y, raw = expert_mlp(x[:, 4:], chosen, gates, *weights, rung, return_choices=True)
        alone = expert_mlp(x[:, 4:], chosen, gates, *weights, rung)
        (y.sum() + 2 * raw.sum() + 3 * alone.sum()).backward()     # .sum() gives strides of 0
        results.append({n: t.grad for n, t in layer.items()})
    assert_same(*results)


@pytest.mark.parametrize("rung", IN_FLOAT64)
@pytest.mark.parametrize("asked", [False, True])
def test_the_gradients_are_those_of_finite_differences(rung, asked):
    chosen = torch.tensor([[0, 2], [2, 0], [0, 1]])                # nobody visits expert 3
    x, *rest = (t.requires_grad_() for t in an_mlp_layer(4, chosen, D=3, H=2).values())
    assert torch.autograd.gradcheck(
        lambda x, *rest: expert_mlp(x, chosen, *rest, rung, asked), (x, *rest))


@pytest.mark.parametrize("rung", ["sliced", "grouped"])
@pytest.mark.parametrize("asked", [False, True])
def test_where_autograd_wrote_the_backward_it_has_second_derivatives_too(rung, asked):
    chosen = torch.tensor([[0, 2], [2, 0], [0, 1]])                # nobody visits expert 3
    x, *rest = (t.requires_grad_() for t in an_mlp_layer(4, chosen, D=3, H=2).values())
    assert torch.autograd.gradgradcheck(
        lambda x, *rest: expert_mlp(x, chosen, *rest, rung, asked), (x, *rest))


@pytest.mark.parametrize("sizes", [[2, 0, 3], None])
def test_a_bias_of_ones_own_has_first_and_second_derivatives(sizes):
    out, b = torch.randn(5, 4, dtype=f64), torch.randn(3, 4, dtype=f64)
    leaves = out.requires_grad_(), b.requires_grad_()

    def plus(out, b):               # 1 * out, for a leaf must not be written to
        return kernels.OwnBias.apply(1 * out, b, torch.tensor([0, 0, 2, 2, 2]), sizes).square()

    assert torch.autograd.gradcheck(plus, leaves) and torch.autograd.gradgradcheck(plus, leaves)
    once = torch.autograd.grad(plus(*leaves).sum(), leaves, create_graph=True)
    assert all(d.requires_grad for d in once)       # gradgradcheck looks away where one is not


@pytest.mark.parametrize("rung", BY_HAND)
def test_second_derivatives_are_refused_where_the_backward_is_written_by_hand(rung):
    chosen = distinct(T, E, K).to(DEVICE)
    x, *rest = an_mlp_layer(E, chosen, f32, device=DEVICE).values()
    y = expert_mlp(x.requires_grad_(), chosen, *rest, rung)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@every_way
def test_nothing_uninitialised_is_read_and_idle_experts_get_gradients_of_exactly_0(way, go):
    backend, device, D, H = go(way)
    torch.use_deterministic_algorithms(True, warn_only=True)        # torch.empty now gives NaN
    try:
        for idle, asked in itertools.product((0, 2, E - 1), (False, True)):
            chosen = without(idle).to(device)
            x, gates, *weights = an_mlp_layer(E, chosen, f32, D, H, device).values()
            leaves = [t.requires_grad_() for t in (x, *weights)]
            for times in (1, 2):
                out = expert_mlp(x, chosen, gates, *weights, backend, return_choices=asked)
                sum(t.square().sum() for t in (out if asked else [out])).backward()
                assert all(torch.isfinite(t.grad).all() for t in leaves), times
                for w in weights:
                    assert not w.grad[idle].any()
                    assert all(w.grad[e].any() for e in range(E) if e != idle)
    finally:
        torch.use_deterministic_algorithms(False)


@every_way
def test_weights_that_nobody_visits_could_be_anything(way, go):
    backend, device, D, H = go(way)
    chosen = without(2)
    layer = an_mlp_layer(E, chosen, f32, D, H, device)
    before = everything(backend, layer, chosen, asked=False)
    for name in ("w_in", "b_in", "w_out", "b_out"):
        layer[name][2] = torch.nan
    for name, after in everything(backend, layer, chosen, asked=False).items():
        assert torch.equal(after, before[name])


@every_way
def test_two_runs_give_the_same_bits(way, go):
    backend, device, D, H = go(way)
    chosen = distinct(T, E, K)
    layer = an_mlp_layer(E, chosen, f32, D, H, device)
    one, two = (everything(backend, layer, chosen, asked=False) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@every_way
def test_shuffling_the_tokens_shuffles_the_outputs_and_nothing_else(way, go):
    backend, device, D, H = go(way)
    chosen = distinct(T, E, K).to(device)
    x, gates, *weights = an_mlp_layer(E, chosen, f32, D, H, device).values()
    shuffle = torch.randperm(T, device=device)
    assert_close(expert_mlp(x[shuffle], chosen[shuffle], gates[shuffle], *weights, backend),
                 expert_mlp(x, chosen, gates, *weights, backend)[shuffle])


# --- sliced and grouped: by autograd ---

def steps_of_the_backward(rung):
    """The names of the operators that autograd will run."""
    chosen = distinct(T, E, K)
    leaves = [t.requires_grad_() for t in an_mlp_layer(E, chosen).values()]
    todo, names = [expert_mlp(leaves[0], chosen, *leaves[1:], rung).grad_fn], set()
    while todo:
        node = todo.pop()
        names.add(node.name())
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    return names


@pytest.mark.parametrize("rung", ["sliced", "grouped"])
def test_no_expert_writes_a_full_size_gradient_of_zeros(rung):
    # w_in[e] in a loop would: a SelectBackward for every expert and weight
    names = steps_of_the_backward(rung)
    assert "SelectBackward0" not in names and "AddmmBackward0" in names


def test_grouped_adds_no_row_to_another_in_its_backward_and_sliced_does():
    # IndexBackward adds the rows of x[order // K] one by one; Permute's backward is a gather
    assert "IndexBackward0" in steps_of_the_backward("sliced")
    names = steps_of_the_backward("grouped")
    assert "PermuteBackward" in names and not any(name.startswith("Index") for name in names)


def test_in_sliced_each_expert_multiplies_its_own_rows_alone(monkeypatch):
    seen = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda b, rows, w: seen.append(len(rows)) or
                        addmm(b, rows, w))
    chosen = torch.tensor([[0, 2], [2, 0], [0, 3]])                 # nobody visits experts 1 and 4
    x, *rest = an_mlp_layer(E, chosen).values()
    expert_mlp(x, chosen, *rest, "sliced")
    assert seen == [n for n in (3, 0, 2, 1, 0) for product in ("in", "out")]


def test_grouped_mm_is_asked_only_for_what_it_takes(monkeypatch):
    w, odd = torch.zeros(E, D, 44), torch.zeros(E, D, 45)
    x = torch.zeros(T, D)
    monkeypatch.setattr(kernels, "HIDDEN_FITS", T * 44 * 4)         # bytes of x's hidden rows
    assert not kernels.use_grouped_mm(x, w)                      # a CPU needs no grouped_mm
    assert kernels.use_grouped_mm(x[1:], w)                      # ... unless they are fewer
    assert kernels.use_grouped_mm(torch.zeros(T * E - 1, D), w, T)       # ... or an expert's are
    assert not kernels.use_grouped_mm(torch.zeros(T * E, D), w, T)
    assert not kernels.use_grouped_mm(x[1:], w[:1], T)           # one expert is a plain MLP
    narrow = odd[:, :, :7]                                       # 7 * 4 bytes: not a 16th
    assert not kernels.use_grouped_mm(x, narrow) and kernels.use_grouped_mm(x, narrow, pads=True)
    assert kernels.use_grouped_mm(x[:E * 7], narrow, pads=True)
    assert not kernels.use_grouped_mm(x[:E * 7 - 1], narrow, pads=True)  # more weights than rows
    many = torch.zeros(110, D)                                   # is 22 * E
    assert kernels.use_grouped_mm(many, odd[:, :, :D - 1], T, pads=True)
    assert not kernels.use_grouped_mm(many, odd[:, :, :D + 1], T, pads=True)     # not narrow
    assert not kernels.use_grouped_mm(x[:, 1:], narrow[:, 1:], pads=True)     # nor is D filled up
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels.use_grouped_mm(torch.zeros(T, 24).bfloat16(), torch.zeros(E, 24, 48))
    assert not kernels.use_grouped_mm(x.bfloat16(), w)           # 20 * 2 bytes: not a 16th
    assert not kernels.use_grouped_mm(torch.zeros(T, 24).bfloat16(), torch.zeros(E, 24, 7),
                                      pads=True)                 # filled up in eager mode alone
    assert not kernels.use_grouped_mm(x, odd) and not kernels.use_grouped_mm(x.double(), w)
    assert not kernels.use_grouped_mm(x, w)                      # float32 compiles to slices
    assert not kernels.use_grouped_mm(torch.zeros(T, 24).half(), torch.zeros(E, 24, 48))  # so this


def test_small_layers_are_multiplied_in_one_call(monkeypatch):
    seen = []
    for name in ("grouped_mm_mlp", "sliced_mlp"):
        monkeypatch.setattr(kernels, name, lambda rows, *_, name=name: seen.append(name) or rows)
    w = [torch.zeros(E, D, 44), torch.zeros(E, 44), torch.zeros(E, 44, D), torch.zeros(E, D)]

    def calls(rows):
        chosen = torch.arange(rows)[:, None] % E
        kernels.grouped(torch.zeros(rows, D), chosen, torch.ones(rows, 1), *w)
        return seen.pop(), len(list(kernels.groups(
            plan_choices(chosen, E), torch.zeros(rows, D), w[0])))

    few = kernels.FEW_ROWS * E
    monkeypatch.setattr(kernels, "HIDDEN_FITS", 0)
    assert calls(few - 1) == ("grouped_mm_mlp", E) and calls(few) == ("sliced_mlp", E)
    monkeypatch.setattr(kernels, "HIDDEN_FITS", 2 * few * 44 * 4)
    assert calls(2 * few - 1) == ("grouped_mm_mlp", 1) and calls(2 * few) == ("sliced_mlp", E)
    w[:3] = w[0][..., :19], w[1][:, :19], w[2][:, :19]      # `grouped` fills up, `lean` does not
    assert calls(2 * few) == ("grouped_mm_mlp", E)              # and fewer units fit


@pytest.mark.parametrize("rung, dtype, tolerance, steps", [
    ("auto", bf16, 0.02, 20), pytest.param("fused", f32, 1e-4, 4, marks=needs_triton)])
def test_a_compiled_layer_learns_as_an_eager_one_in_one_graph_for_any_group_sizes(
        rung, dtype, tolerance, steps):
    device = DEVICE if rung == "fused" else "cpu"

    def losses_of(layer_of):
        torch.manual_seed(3)
        layer = an_mlp_layer(E, distinct(T, E, K), dtype, D=24, H=48, device=device)
        x, gates, *weights = layer.values()
        weights = [w.requires_grad_() for w in weights]
        optimizer, losses = torch.optim.SGD(weights, lr=0.1), []
        for _ in range(steps):
            chosen = distinct(T, E, K).to(device)                  # other group sizes every time
            loss = (layer_of(x, chosen, gates, *weights, rung).float() - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    torch._dynamo.reset()
    compiled = losses_of(torch.compile(expert_mlp, backend=count, fullgraph=True))
    assert len(graphs) == 1                                         # no break, no recompilation
    assert ("kernels.fused" in graphs[0].code) == (rung == "fused")
    assert_close(compiled, losses_of(expert_mlp), rtol=tolerance, atol=0)
    assert compiled[-1] < 0.99 ** steps * compiled[0]


@needs_triton
@pytest.mark.parametrize("K, gated", [(1, False), (3, True)])
def test_torch_finds_the_two_operations_of_fused_to_be_what_they_are_registered_as(K, gated):
    # their schemas, shapes, strides and dtypes, their gradients, and both inside torch.compile
    layer = an_mlp_layer(E, chosen := distinct(T, E, K).to(DEVICE), f32, device=DEVICE)
    x, gates, *weights = (t.requires_grad_() for t in layer.values())
    gates = gates if gated else None
    torch.library.opcheck(kernels.fused_forward, (x, chosen, gates, *weights))
    with torch.no_grad():
        y, *kept = kernels.fused_forward(x, chosen, gates, *weights)
        w_in, _, w_out, b_out = (w.detach() for w in weights)
        torch.library.opcheck(kernels.fused_backward, (
            torch.randn_like(y), x.detach(), chosen, gates if gates is None else gates.detach(),
            w_in, w_out, b_out, *kept))


# --- lean and fused: what is kept, and the plan ---

def kept(backend, asked, K, dtype):
    """Bytes of distinct memory, weights apart, that one layer keeps for its backward."""
    chosen = distinct(T, E, K).to(DEVICE if backend == "fused" else "cpu")
    layer = an_mlp_layer(E, chosen, dtype, device=chosen.device)
    x, gates, *weights = (t.requires_grad_() for t in layer.values())
    memory = {}

    def note(t):
        memory[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = expert_mlp(x, chosen, gates, *weights, backend, return_choices=asked)
    for w in weights:
        memory.pop(w.untyped_storage().data_ptr(), None)
    del out
    return sum(memory.values())


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("rung, dtype", [("lean", f64), ("lean", f32), ("lean", bf16),
                                         pytest.param("fused", f32, marks=needs_triton),
                                         pytest.param("fused", f16, marks=needs_triton)])
def test_only_x_the_preactivations_the_gates_and_the_plan_are_kept(rung, dtype, K):
    size, gate = dtype.itemsize, max(4, dtype.itemsize)
    # int64: order and ids, or for fused order and chosen; E+1 offsets and the tiles of fused
    index = 2 * 8 * T * K + 8 * (E + 1)
    if rung == "fused":
        index += 2 * 8 * (-(-T * K // 32) + E)
    exact = (D + K * H) * size * T + gate * T * K + index
    assert kept(rung, False, K, dtype) == exact <= ((D + K * H) * size + 64 * K) * T
    # asking for raw keeps raw: K * D elements more, and no less
    assert kept(rung, True, K, dtype) == exact + K * D * size * T
    assert kept(rung, False, K, dtype) < 0.6 * kept("grouped", False, K, dtype)


@needs_triton
def test_no_gradient_of_zeros_is_made_for_the_preactivations_that_fused_returns():
    chosen = distinct(T, E, K).to(DEVICE)
    x, *rest = an_mlp_layer(E, chosen, f32, device=DEVICE).values()
    y = expert_mlp(x.requires_grad_(), chosen, *rest, "fused")
    with torch.profiler.profile(profile_memory=True) as seen:
        y.sum().backward()
    bytes_of = [max(e.cpu_memory_usage, e.device_memory_usage) for e in seen.events()
                if e.name == "aten::zeros"]
    assert T * K * H * 4 not in bytes_of


def test_the_plan_worked_by_hand():
    ids, order, offsets = plan_choices(torch.tensor([[2, 0], [0, 3], [2, 2]]), E=5)
    assert ids.tolist() == [0, 0, 2, 2, 2, 3] and order.tolist() == [1, 2, 0, 4, 5, 3]
    assert offsets.tolist() == [0, 2, 2, 5, 6, 6]           # experts 1 and 4 are idle
    # tiles of 2 rows: 1 for expert 0, 2 for expert 2, 1 for expert 3; 8 were made room for
    expert, start = plan_tiles(offsets, S=6, rows=2)
    assert expert.tolist() == [0, 2, 2, 3, 5, 5, 5, 5] and start.tolist()[:4] == [0, 2, 4, 5]


@pytest.mark.parametrize("rows", [1, 2, 3, 32])
@pytest.mark.parametrize("case", CASES)
def test_the_tiles_cover_every_row_once_and_never_two_experts(case, rows):
    n_experts, chosen = CASES[case]()
    ids, order, offsets = plan_choices(chosen, n_experts)
    S, seen = chosen.numel(), []
    assert order.sort().values.tolist() == list(range(S))
    for e, start in zip(*(v.tolist() for v in plan_tiles(offsets, S, rows)), strict=True):
        if e < n_experts:
            seen += range(start, min(start + rows, offsets[e + 1]))
            assert set(ids[start:min(start + rows, offsets[e + 1])].tolist()) == {e}
    assert seen == list(range(S))


def test_the_plan_counts_beyond_2_to_the_31():
    n = 2 ** 31
    offsets = torch.tensor([0, n, n, 3 * n])
    expert, start = plan_tiles(offsets, S=3 * n, rows=2 ** 29)
    assert expert.tolist() == [0] * 4 + [2] * 8 + [3] * 3
    assert start.tolist()[:12] == [i * 2 ** 29 for i in range(12)]
    plan = plan_choices(torch.tensor([[0]]), 1)
    assert all(v.dtype == torch.int64 for v in (*plan, expert, start))


# --- fused: what the other tests cannot see ---

@needs_triton
@pytest.mark.skipif(CUDA, reason="the interpreter's test; tests marked gpu do it for real")
@pytest.mark.parametrize("epilogue", ["up", "down", "dx", "da"])
def test_rows_whose_elements_lie_beyond_2_to_the_31_are_computed_as_any_others(epilogue):
    # address space, not memory: only the pages of the last rows are ever touched
    width, depth, few = 45, 20, 7
    w, bias = torch.randn(1, depth, width).half(), torch.randn(1, width).half()
    rows, z_rows = torch.randn(few, depth).half(), torch.randn(few, width).half()
    gates = torch.rand(few)
    blocks = kernels.choose_blocks(few, 1, f16)
    results = []
    for first in (0, 2 ** 31 // depth + 5):
        S = first + few
        a, z, out, extra = (torch.empty(S, n, dtype=f16) for n in (depth, width, width, width))
        dgates, gate, order = torch.empty(S, 2), torch.empty(S), torch.empty(S, dtype=torch.int64)
        a[first:], z[first:], gate[first:] = rows, z_rows, gates
        order[first:] = torch.arange(first, S).flip(0)
        plan = kernels.Plan(None, order, torch.tensor([first, S]))
        tiles = kernels.Tiles(torch.tensor([0]), torch.tensor([first]))
        words = {"up": {"bias": bias, "z": z}, "down": {"bias": bias, "gates": gate}, "dx": {},
                 "da": {"gates": gate, "z": z, "gated_a": extra, "dgates": dgates,
                        "db": torch.empty(1, width)}}[epilogue]
        kernels.gemm(epilogue, blocks, plan, tiles, a, w, out, **words)
        dw = kernels.gemm_dw(blocks, plan, a, z)
        results.append([v[-few:].clone() for v in (out, z)] + [dw] +
                       ([extra[-few:].clone(), dgates[-few:].clone()] if epilogue == "da" else []))
    for near, far in zip(*results, strict=True):
        assert near.any() and torch.equal(near, far)


@needs_triton
@pytest.mark.skipif(CUDA, reason="the interpreter's test; tests marked gpu do it for real")
def test_tokens_and_experts_far_apart_in_memory_are_found():
    far = 2 ** 30 + 8
    apart = torch.empty(2 * far + D, dtype=f16).as_strided((3, D), (far, 1))
    w_apart = torch.empty(2 * far + D * H, dtype=f16).as_strided((3, D, H), (far, H, 1))
    chosen = torch.tensor([[2], [1], [2]])
    layer = an_mlp_layer(3, chosen, f16)
    x, gates, w_in, *weights = layer.values()
    expected = expert_mlp(x, chosen, gates, w_in, *weights, "fused")
    apart.copy_(x)
    w_apart.copy_(w_in)
    assert torch.equal(expert_mlp(apart, chosen, gates, w_apart, *weights, "fused"), expected)


@needs_triton
def test_long_sums_are_made_in_float32():
    # y is a sum of 2048 positive products, near 2000: float16 has steps of 1 there, and a sum made
    # in float16 would round to them after every block
    chosen = torch.zeros(16, 1, dtype=torch.int64)
    layer = an_mlp_layer(1, chosen, f16, D=16, H=2048, device=DEVICE)
    for name in ("x", "w_in", "w_out"):
        layer[name].uniform_(0.5, 1.5)
    layer["w_in"].div_(16)
    layer["gates"].fill_(1.0)
    assert_as_good_as_a_loop("fused", layer, chosen, False)


@needs_triton
def test_the_kernels_compile_for_a_hopper_gpu_with_tensor_cores_and_no_spills():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, Path(__file__).parent / "sm90.py", "--json"], env=env,
                         capture_output=True, encoding="utf-8", timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels_seen = json.loads(run.stdout)
    assert len(kernels_seen) == 6
    for name, seen in kernels_seen.items():
        assert seen["wgmma"] > 0 and seen["spills"] == 0 and seen["registers"] <= 255, (name, seen)


# --- the one name that the rest imports ---

def test_y_is_the_gated_sum_in_float32_even_of_bfloat16_outputs():
    chosen = distinct(T, E, 3)
    x, gates, *weights = an_mlp_layer(E, chosen, bf16).values()
    gates = torch.rand(T, 3)                                        # float32, no bfloat16 number
    for rung in ("reference", "sliced", "grouped", "lean"):
        y, raw = expert_mlp(x, chosen, gates, *weights, rung, return_choices=True)
        assert y.dtype == raw.dtype == bf16
        by_hand = sum(raw[:, k].float() * gates[:, k, None] for k in range(3))
        assert_close(y, by_hand.bfloat16(), rtol=0, atol=0)
        assert_close(y, expert_mlp(x, chosen, gates, *weights, rung), rtol=0, atol=0)


@every_way
def test_the_outputs_before_the_gates_come_only_when_asked_for(way, go):
    backend, device, D, H = go(way)
    chosen = distinct(T, E, K).to(device)
    x, gates, *weights = an_mlp_layer(E, chosen, f32, D, H, device).values()
    y, raw = expert_mlp(x, chosen, gates, *weights, backend, return_choices=True)
    assert torch.equal(raw, expert_mlp(x, chosen, 7 * gates, *weights, backend, True)[1])
    assert_close(y, expert_mlp(x, chosen, gates, *weights, backend))


@every_way
def test_the_outputs_before_the_gates_teach_the_experts_and_not_the_gates(way, go):
    backend, device, D, H = go(way)
    chosen = without(2).to(device)
    layer = an_mlp_layer(E, chosen, f32, D, H, device)
    leaves = [t.requires_grad_() for t in layer.values()]
    expert_mlp(leaves[0], chosen, *leaves[1:], backend, return_choices=True)[1].sum().backward()
    # d raw / d b_out = 1 for every choice of the expert
    assert_close(leaves[-1].grad[:, 0], chosen.flatten().bincount(minlength=E).float())
    assert leaves[1].grad is None or not leaves[1].grad.any()


def test_in_an_export_auto_is_the_definition_which_holds_every_expert(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert kernels.choose_rung() == "reference"


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype", [f64, f32, f16, bf16])
def test_auto_is_grouped_whatever_else_could_run(dtype, compiling, monkeypatch):
    taken = []
    for name in BACKENDS:
        monkeypatch.setitem(BACKENDS, name, lambda *_, name=name: taken.append(name))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for device, interpreted in itertools.product(("cpu", "meta"), (False, True)):
        monkeypatch.setattr(kernels, "INTERPRETED", interpreted)
        x, gates, *weights = an_mlp_layer(1, torch.zeros(1, 1, dtype=torch.int64), dtype).values()
        expert_mlp(x.to(device), torch.zeros(1, 1, dtype=torch.int64, device=device),
                   *(v.to(device) for v in (gates, *weights)))
    assert taken == ["grouped"] * 4


def test_auto_does_no_work_for_experts_that_were_not_chosen(monkeypatch):
    rows = []
    monkeypatch.setattr(kernels, "sliced_mlp",
                        lambda r, *rest: rows.append(len(r)) or sliced_mlp(r, *rest))
    chosen = distinct(T, E, K)
    x, gates, *weights = an_mlp_layer(E, chosen).values()
    assert torch.equal(expert_mlp(x, chosen, gates, *weights),
                       expert_mlp(x, chosen, gates, *weights, backend="grouped"))
    assert rows == [T * K, T * K]


def test_only_an_explicit_backend_is_refused_and_the_reason_is_given(monkeypatch):
    chosen = distinct(T, E, K)
    x, gates, *weights = an_mlp_layer(E, chosen).values()
    with pytest.raises(ValueError, match="no backend 'tpu': choose auto, reference, sliced, "):
        expert_mlp(x, chosen, gates, *weights, backend="tpu")
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(RuntimeError, match="cannot run here: Triton is not installed; choose auto"):
        expert_mlp(x, chosen, gates, *weights, backend="fused")
    assert torch.isfinite(expert_mlp(x, chosen, gates, *weights)).all()
    monkeypatch.setattr(kernels, "triton", object())
    with pytest.raises(RuntimeError, match=r"not torch\.float64 and torch\.float64"):
        expert_mlp(x, chosen, gates, *weights, backend="fused")
    x, gates, *weights = an_mlp_layer(E, chosen, bf16).values()
    with pytest.raises(RuntimeError, match=r"not torch\.bfloat16 and torch\.float32"):
        expert_mlp(x, chosen, gates, *(w.float() for w in weights), backend="fused")
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 wrongly"):
        expert_mlp(x, chosen, gates, *weights, backend="fused")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="on the cpu and TRITON_INTERPRET=1 was not set"):
        expert_mlp(x, chosen, gates, *weights, backend="fused")


@needs_triton
def test_the_kernels_take_half_and_single_precision_from_compute_capability_8_on(monkeypatch):
    def on_a_gpu(dtype):                            # as much of a tensor as is looked at
        return SimpleNamespace(dtype=dtype, device=torch.device("cuda"), is_cuda=True)

    monkeypatch.setattr(kernels, "INTERPRETED", False)
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        for dtype in (f32, f16, bf16):
            assert kernels.why_not_fused(on_a_gpu(dtype), on_a_gpu(dtype)) is None
    assert "float64" in kernels.why_not_fused(on_a_gpu(f64), on_a_gpu(f64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "8.0" in kernels.why_not_fused(on_a_gpu(f16), on_a_gpu(f16))


def test_without_triton_the_file_is_whole_and_every_other_rung_runs():
    code = """if True:
        import sys; sys.modules["triton"] = None
        import torch, kernels
        chosen, w, b = torch.tensor([[0, 1]]), torch.ones(2, 4, 4), torch.ones(2, 4)
        for backend in ("auto", *kernels.BACKENDS):
            try:
                y = kernels.expert_mlp(b[:1], chosen, b[:1, :2], w, b, w, b, backend)
                print(backend, y[0, 0].item())
            except RuntimeError as refusal:
                print(refusal)
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(kernels.__file__).parent,
                         capture_output=True, encoding="utf-8", timeout=120)
    *ran, refused = run.stdout.splitlines()
    assert [line.split()[0] for line in ran] == ["auto", *list(BACKENDS)[:-1]], run.stderr
    assert len({line.split()[1] for line in ran}) == 1
    assert refused == "backend='fused' cannot run here: Triton is not installed; choose auto"


# --- on a GPU that is not there: tensors with a dtype, a shape and a device, but no numbers ---

def test_autocast_of_a_gpu_leaves_the_sum_over_choices_in_half_precision(monkeypatch):
    """Its own sum is float32, and so would be the gradient that two bfloat16 products wait for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode(), torch.autocast("cuda", f16):
        rows = torch.ones(6, D, dtype=f16, device="cuda")
        assert rows.view(3, 2, D).sum(dim=1).dtype == f32
        assert kernels.over_choices(rows, 2).dtype == kernels.over_choices(rows, 1).dtype == f16


# --- is fused right here, and is it the faster? ---

@needs_triton
@pytest.mark.parametrize("dtype", [f32, f16])
def test_a_contest_finds_fused_as_exact_as_grouped_and_leaves_no_trace(dtype):
    before = torch.get_rng_state()
    error, times = kernels.contest(*CONTEST, dtype, DEVICE, rounds=2, steps=1)
    assert 0 < error <= 2 and len(times) == 2 and all(t > 0 for t in times)
    assert torch.equal(torch.get_rng_state(), before)


CONTEST = 40, 20, 45, 3, 2          # T, D, H, E, K


@pytest.mark.parametrize("wrong", [
    lambda y, gates: y * 1.01, lambda y, gates: y * torch.nan,
    lambda y, gates: y + (gates - gates.detach()).sum()])           # right, but not its gradient
def test_a_contest_finds_what_is_wrong(wrong, monkeypatch):
    monkeypatch.setitem(BACKENDS, "fused", lambda x, chosen, gates, *rest: wrong(
        kernels.sliced(x, chosen, gates, *rest), gates))
    monkeypatch.setattr(kernels, "why_not_fused", lambda *_: None)
    error, _ = kernels.contest(*CONTEST, f32, "cpu", rounds=1, steps=1)
    assert not error <= 2


@pytest.mark.parametrize("T", [50, 500])
def test_what_a_contest_finds_right_is_what_the_run_will_use(T, monkeypatch):
    seen = []
    monkeypatch.setitem(BACKENDS, "fused", lambda x, chosen, *rest: seen.append(
        kernels.choose_blocks(chosen.numel(), 3, f16)) or kernels.sliced(x, chosen, *rest))
    monkeypatch.setattr(kernels, "why_not_fused", lambda *_: None)
    kernels.contest(T, 20, 45, 3, 2, f32, "cpu", rounds=1, steps=1)
    assert all(blocks == kernels.choose_blocks(T * 2, 3, f16) for blocks in seen) and seen


@pytest.mark.parametrize("slow, compiled", [("fused", False), ("grouped", False), ("fused", True)])
def test_a_contest_finds_the_faster_in_every_round(slow, compiled, monkeypatch):
    def delayed(*args):
        time.sleep(0.05)
        return kernels.sliced(*args)

    for rung in ("fused", "grouped"):
        monkeypatch.setitem(BACKENDS, rung, delayed if rung == slow else kernels.sliced)
    monkeypatch.setattr(kernels, "why_not_fused", lambda *_: None)
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: asked.append(how) or f)
    _, times = kernels.contest(*CONTEST, f32, "cpu", compiled=compiled, steps=2)
    assert len(times) == 3 and len(asked) == compiled
    assert min(times) > 1 if slow == "fused" else max(times) < 1


# --- on a real GPU ---

gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("sizes", [(4160, 192, 384, 8), (4160, 384, 1536, 8), (512, 96, 192, 64)])
@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_on_a_gpu_bfloat16_is_as_exact_as_a_loop(backend, sizes):
    T, D, H, E = sizes
    chosen = distinct(T, E, K)
    layer = an_mlp_layer(E, chosen, bf16, D, H, "cuda")
    for asked in (False, True):
        assert_as_good_as_a_loop(backend, layer, chosen, asked)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu_autocast_trains_two_experts_per_token_on_every_rung(backend):
    moe = MoE(96, 192, n_experts=8, k=2, backend=backend).cuda()
    x = torch.randn(4, 65, 96, device="cuda")
    with torch.autocast("cuda", bf16):
        y, *_ = moe(x)
        loss = y.float().square().mean()
    loss.backward()
    assert y.dtype == bf16
    for name, p in moe.named_parameters():
        assert p.grad.dtype == f32 and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [f32, f16, bf16])
def test_on_a_gpu_fused_holds_its_own_in_a_contest(dtype, compiled):
    error, times = kernels.contest(4160, 192, 384, 8, 2, dtype, "cuda", compiled)
    assert 0 < error <= 2 and len(times) == 3


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [f32, f16, bf16])
def test_on_a_gpu_a_compiled_layer_of_the_fused_rung_is_the_eager_one(dtype):
    chosen = distinct(999, 8, K).cuda()
    layer = an_mlp_layer(8, chosen, dtype, 96, 192, "cuda")
    leaves = [t.requires_grad_() for t in layer.values()]
    results = []
    for mlp in (expert_mlp, torch.compile(expert_mlp, fullgraph=True)):
        y = mlp(leaves[0], chosen, *leaves[1:], "fused")
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager)


@pytest.mark.gpu
@gpu
def test_on_a_gpu_a_cuda_graph_holds_forward_and_backward_for_any_routing():
    chosen = distinct(4096, 8, K).cuda()
    x, *rest = an_mlp_layer(8, chosen, bf16, 128, 256, "cuda").values()
    leaves = [t.requires_grad_() for t in (x, *rest)]
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.autograd.grad(expert_mlp(x, chosen, *rest, "fused").sum(), leaves)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        y = expert_mlp(x, chosen, *rest, "fused")
        grads = torch.autograd.grad(y.sum(), leaves)
    chosen.copy_(distinct(4096, 8, K))             # other groups than those that were recorded
    graph.replay()
    again = expert_mlp(x, chosen, *rest, "fused")
    assert torch.equal(y, again)
    for a, b in zip(grads, torch.autograd.grad(again.sum(), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@gpu
def test_on_a_gpu_more_than_2_to_the_31_elements_are_as_good_as_few():
    # the last tokens, computed in a batch whose z has more than 2**31 elements and in a small one
    T, D, H, E = 2 ** 31 // 2048 + 999, 64, 2048, 4
    chosen = distinct(T, E, 1).cuda()
    x, gates, *weights = an_mlp_layer(E, chosen[:8], bf16, D, H, "cuda").values()
    x = torch.randn(T, D, device="cuda", dtype=bf16).requires_grad_()
    gates = torch.rand(T, 1, device="cuda")
    y = expert_mlp(x, chosen, gates, *weights, "fused")
    (dx,) = torch.autograd.grad(y.sum(), x)
    few = slice(-500, None)
    part = x[few].detach().requires_grad_()
    y_few = expert_mlp(part, chosen[few], gates[few], *weights, "fused")
    (dx_few,) = torch.autograd.grad(y_few.sum(), part)
    assert_close(y[few], y_few)
    assert_close(dx[few], dx_few)


# --- what is refused, and what torch.func makes of the rest ---

def bent(**changes):
    """A call of expert_mlp with some of its operands changed."""
    chosen = distinct(T, E, K)
    operands = an_mlp_layer(E, chosen, f32) | {"chosen": chosen}
    return lambda backend="auto": expert_mlp(**{name: changes.get(name, lambda v: v)(v)
                                         for name, v in operands.items()}, backend=backend)


def one_is(expert):
    return bent(chosen=lambda c: c.index_put((torch.tensor(3), torch.tensor(1)),
                                             torch.tensor(expert)))


REFUSED = [
    (one_is(-1), f"chosen must be 0 to {E - 1}, not -1 to "),
    (one_is(E), f"chosen must be 0 to {E - 1}, not 0 to {E}"),
    (one_is(2**40), "chosen must be 0 to "),
    (one_is(-2**40), "chosen must be 0 to "),
    (bent(chosen=lambda c: c[1:]), rf"chosen must be \({T}, K\), not \({T - 1}, {K}\)"),
    (bent(chosen=lambda c: c[:1]), rf"chosen must be \({T}, K\), not \(1, {K}\)"),
    (bent(chosen=lambda c: c[:, 0]), rf"chosen must be \({T}, K\), not \({T},\)"),
    (bent(chosen=lambda c: c[:, :0]), rf"chosen must be \({T}, K\), not \({T}, 0\)"),
    (bent(chosen=lambda c: c.int()), "chosen must be int64, not torch.int32"),
    (bent(chosen=lambda c: c.byte()), "chosen must be int64, not torch.uint8"),
    (bent(chosen=lambda c: c.float()), "chosen must be int64, not torch.float32"),
    (bent(gates=lambda g: g[:, :1]), rf"gates must be \({T}, {K}\), not \({T}, 1\)"),
    (bent(gates=lambda g: g[:1]), rf"gates must be \({T}, {K}\), not \(1, {K}\)"),
    (bent(gates=lambda g: g[:, 0]), rf"gates must be \({T}, {K}\), not \({T},\)"),
    (bent(gates=lambda g: g.T), rf"gates must be \({T}, {K}\), not \({K}, {T}\)"),
    (bent(x=lambda x: x[:, 1:]), rf"x must be \({T}, {D}\), not \({T}, {D - 1}\)"),
    (bent(x=lambda x: x[None]), r"chosen must be \(1, K\), not"),
    (bent(x=lambda x: x[1:]), rf"chosen must be \({T - 1}, K\), not"),
    (bent(x=lambda x: x.double()), "must be torch.float64, as x is, not torch.float32"),
    (bent(w_in=lambda w: w.double()), "w_in must be torch.float32, as x is, not torch.float64"),
    (bent(w_out=lambda w: w.half()), "w_out must be torch.float32, as x is, not torch.float16"),
    (bent(b_in=lambda b: b.double()), "b_in must be torch.float32, as x is, not torch.float64"),
    (bent(b_out=lambda b: b.half()), "b_out must be torch.float32, as x is, not torch.float16"),
    (bent(w_in=lambda w: w[0]), r"w_in must be \(E, D, H\), not"),
    (bent(w_in=lambda w: w[:0]), r"w_in must be \(E, D, H\), not \(0, "),
    (bent(w_in=lambda w: w.mT), rf"x must be \({T}, {H}\), not"),
    (bent(w_out=lambda w: w.mT), rf"w_out must be \({E}, {H}, {D}\), not"),
    (bent(w_out=lambda w: w[:1]), rf"w_out must be \({E}, {H}, {D}\), not \(1, "),
    (bent(b_in=lambda b: b[:1]), rf"b_in must be \({E}, {H}\), not \(1, {H}\)"),
    (bent(b_in=lambda b: b[:, :1]), rf"b_in must be \({E}, {H}\), not \({E}, 1\)"),
    (bent(b_out=lambda b: b[0]), rf"b_out must be \({E}, {D}\), not \({D},\)"),
    (bent(b_out=lambda b: b.T), rf"b_out must be \({E}, {D}\), not"),
]


@pytest.mark.parametrize("backend", ["auto", "reference", "lean"])
@pytest.mark.parametrize("call, sentence", REFUSED)
def test_operands_that_do_not_fit_are_refused_in_a_sentence_on_every_rung(call, sentence, backend):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call(backend)


@pytest.mark.parametrize("dtype, D, H", [(f64, D, H), (f32, 24, 48)])       # the latter: grouped_mm
def test_auto_in_torch_func_is_differentiated_forward_backward_and_by_the_batch(dtype, D, H):
    from torch.func import grad, jvp, vmap
    chosen = distinct(T, E, K)
    x, *rest = an_mlp_layer(E, chosen, dtype, D, H).values()

    def loss(x, *rest, chosen=chosen, backend="auto"):
        return expert_mlp(x, chosen, *rest, backend=backend).square().mean()

    def plainly(x, *rest):
        return loss(x, *rest, backend="reference")

    operands, every = (x, *rest), tuple(range(6))
    for ours, theirs in ((grad(loss, every)(*operands), grad(plainly, every)(*operands)),
                         (jvp(loss, operands, operands), jvp(plainly, operands, operands)),
                         (jvp(grad(loss), operands, operands), jvp(grad(plainly), operands,
                                                                   operands))):
        assert_close(ours, theirs)
    many = torch.stack([distinct(T, E, K) for _ in range(3)])
    slopes = vmap(lambda chosen: grad(loss)(x, *rest, chosen=chosen))(many)
    assert_close(slopes, torch.stack([grad(loss)(x, *rest, chosen=own) for own in many]))
    slope = jvp(lambda x: plainly(x, *rest), (x,), (x,))[1]
    with torch.autograd.forward_ad.dual_level():            # forward mode without torch.func
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual, *rest)).tangent, slope)
