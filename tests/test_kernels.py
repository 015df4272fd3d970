"""Tests of kernels.py: every rung of the ladder gives the numbers and gradients of the first.

Only `reference` is trusted, and it is itself worked by hand below. A new rung joins by its name in
BACKENDS; whatever it does on a GPU alone, these CPU runs do not see.
"""
import pytest
import torch
from torch.testing import assert_close

import kernels
from kernels import BACKENDS, expert_mlp, grouped_mm_mlp, sliced_mlp

T, D, H, E, K = 37, 20, 44, 5, 2            # grouped_mm wants rows of a multiple of 16 bytes
RUNGS = [name for name in BACKENDS if name != "reference"]
PRODUCTS = [sliced_mlp, grouped_mm_mlp]


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
    "E = 128, most of them idle": lambda: (128, distinct(T, 128, K)),
    "the same expert twice": lambda: (E, torch.tensor([[1, 1]]).expand(T, 2)),
}


def an_mlp_layer(E, experts, dtype=torch.float64, D=D, H=H):
    """x, gates, w_in, b_in, w_out, b_out: inputs of order 1 whose outputs are of order 1."""
    T, K = experts.shape
    sizes = {"x": (T, D), "gates": (T, K), "w_in": (E, D, H), "b_in": (E, H),
             "w_out": (E, H, D), "b_out": (E, D)}
    scale = {"w_in": D ** -0.5, "w_out": H ** -0.5}
    return {name: torch.randn(size, dtype=torch.float64).mul(scale.get(name, 1)).to(dtype)
            for name, size in sizes.items()}


def everything(backend, tensors, experts, view=lambda name, t: t):
    """y, raw and the gradient of every input, for fixed dL/dy and dL/draw of order 1."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    x, gates, *weights = (view(name, t) for name, t in leaves.items())
    y, raw = expert_mlp(x, experts, gates, *weights, backend, return_choices=True)
    grid = torch.Generator().manual_seed(1)
    dy, draw = (torch.randn(t.shape, generator=grid, dtype=torch.float64) for t in (y, raw))
    ((y * dy).sum() + (raw * draw).sum()).backward()
    return {"y": y, "raw": raw} | {f"d{name}": t.grad for name, t in leaves.items()}


def assert_same(actual, expected):
    for name in expected:
        assert_close(actual[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


def on_rows(product, tensors, experts):
    """The same for one of the two products inside `grouped`, on rows already sorted by expert."""
    expert = experts.flatten().sort().values
    leaves = [tensors[n].detach().clone().requires_grad_() for n in list(tensors)[2:]]
    rows = tensors["x"].repeat_interleave(experts.shape[1], 0).requires_grad_()
    out = product(rows, expert, *leaves)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return [out, rows.grad, *(leaf.grad for leaf in leaves)]


def use(product, monkeypatch):
    monkeypatch.setattr(kernels, "_grouped_mm_takes", lambda *_: product is grouped_mm_mlp)


# --- the definition ------------------------------------------------------------------------------

def test_the_reference_worked_by_hand():
    # D = H = 1. Expert 0: gelu(3x - 1) * 2 + 1; expert 1: gelu(-x) * 5. At x = 2 with
    # gelu(5) = 5 and gelu(-2) = -.0455: raw = 11 and -.2275, y = .5 * 11 - 2 * .2275 = 5.045
    x, experts, gates = torch.tensor([[2.0]]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 2.0]])
    w_in, b_in = torch.tensor([[[3.0]], [[-1.0]]]), torch.tensor([[-1.0], [0.0]])
    w_out, b_out = torch.tensor([[[2.0]], [[5.0]]]), torch.tensor([[1.0], [0.0]])
    y, raw = expert_mlp(x, experts, gates, w_in, b_in, w_out, b_out, "reference", True)
    assert_close(raw, torch.tensor([[[11.0], [-0.2275]]]), rtol=0, atol=1e-4)
    assert_close(y, torch.tensor([[5.0450]]), rtol=0, atol=1e-4)


# --- every rung against it -----------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_gives_the_numbers_and_gradients_of_the_definition(rung, case, dtype):
    n_experts, experts = CASES[case]()
    layer = an_mlp_layer(n_experts, experts, dtype)
    assert_same(everything(rung, layer, experts), everything("reference", layer, experts))


@pytest.mark.parametrize("rung", RUNGS)
def test_transposed_and_expanded_inputs_are_as_good_as_contiguous_ones(rung):
    experts = torch.tensor([[1, 3, 0]]).expand(T, 3)
    layer = an_mlp_layer(E, experts)
    layer |= {name: layer[name].mT.contiguous() for name in ("x", "w_in", "w_out")}
    layer["gates"] = layer["gates"][:1]

    def view(name, t):
        if name == "gates":
            return t.expand(T, 3)
        return t.mT if name in ("x", "w_in", "w_out") else t

    assert_same(everything(rung, layer, experts, view),
                everything("reference", layer, experts, view))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_both_products_inside_grouped_agree_with_the_definition(product, case, monkeypatch):
    use(product, monkeypatch)
    n_experts, experts = CASES[case]()
    layer = an_mlp_layer(n_experts, experts, torch.float32)
    assert_same(everything("grouped", layer, experts), everything("reference", layer, experts))
    for a, b in zip(on_rows(product, layer, experts), on_rows(sliced_mlp, layer, experts),
                    strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("product", PRODUCTS)
def test_bfloat16_is_no_worse_than_a_plain_loop_in_bfloat16(product, monkeypatch):
    use(product, monkeypatch)
    experts = without(2)
    exact = an_mlp_layer(E, experts, torch.bfloat16, D=24, H=48)
    truth = everything("reference", {n: t.double() for n, t in exact.items()}, experts)
    loop, ours = everything("reference", exact, experts), everything("grouped", exact, experts)
    for name, true in truth.items():
        error, noise = ((a[name].double() - true).abs().max() for a in (ours, loop))
        assert error <= 2 * noise + 1e-3, name
        assert noise < 0.1 * true.abs().max()                       # the bar itself means something


@pytest.mark.parametrize("rung", RUNGS)
def test_the_gradients_are_those_of_finite_differences(rung):
    experts = torch.tensor([[0, 2], [2, 0], [0, 1]])                # nobody visits expert 3
    x, *rest = (t.requires_grad_() for t in an_mlp_layer(4, experts, D=3, H=2).values())
    assert torch.autograd.gradcheck(
        lambda x, gates, *weights: expert_mlp(x, experts, gates, *weights, rung, True), (x, *rest))


@pytest.mark.parametrize("product", PRODUCTS)
def test_an_idle_experts_gradient_stays_exactly_0_over_two_backward_passes(product, monkeypatch):
    use(product, monkeypatch)
    for idle in (0, 2, E - 1):
        experts = without(idle)
        x, gates, *weights = an_mlp_layer(E, experts, torch.float32).values()
        weights = [w.requires_grad_() for w in weights]
        for times in (1, 2):
            torch.full((1 << 16,), torch.nan)          # what an allocator may hand out next
            expert_mlp(x, experts, gates, *weights).square().sum().backward()
            for w in weights:
                assert not w.grad[idle].any() and torch.isfinite(w.grad).all(), times
                assert all(w.grad[e].any() for e in range(E) if e != idle)


@pytest.mark.parametrize("rung", RUNGS)
def test_weights_that_nobody_visits_could_be_anything(rung):
    experts = without(2)
    layer = an_mlp_layer(E, experts)
    before = everything(rung, layer, experts)
    for name in ("w_in", "b_in", "w_out", "b_out"):
        layer[name][2] = torch.nan
    for name, after in everything(rung, layer, experts).items():
        assert torch.equal(after, before[name])


# --- the one name that the rest imports ----------------------------------------------------------

def test_y_is_the_gated_sum_in_float32_even_of_bfloat16_outputs():
    experts = distinct(T, E, 3)
    x, gates, *weights = an_mlp_layer(E, experts, torch.bfloat16).values()
    gates = torch.rand(T, 3)                                        # float32, no bfloat16 number
    y, raw = expert_mlp(x, experts, gates, *weights, return_choices=True)
    assert y.dtype == raw.dtype == torch.bfloat16
    by_hand = sum(raw[:, k].float() * gates[:, k, None] for k in range(3))
    assert_close(y, by_hand.bfloat16(), rtol=0, atol=0)


def test_the_outputs_before_the_gates_come_only_when_asked_for():
    experts = distinct(T, E, K)
    x, gates, *weights = an_mlp_layer(E, experts).values()
    y, raw = expert_mlp(x, experts, gates, *weights, return_choices=True)
    assert torch.equal(raw, expert_mlp(x, experts, 7 * gates, *weights, return_choices=True)[1])
    assert torch.equal(y, expert_mlp(x, experts, gates, *weights))


def test_the_outputs_before_the_gates_teach_the_experts_and_not_the_gates():
    experts = without(2)
    leaves = [t.requires_grad_() for t in an_mlp_layer(E, experts).values()]
    expert_mlp(leaves[0], experts, *leaves[1:], return_choices=True)[1].sum().backward()
    # d raw / d b_out = 1 for every choice of the expert
    assert_close(leaves[-1].grad[:, 0], experts.flatten().bincount(minlength=E).double())
    assert leaves[1].grad is None


def test_auto_is_grouped_and_does_no_work_for_the_others(monkeypatch):
    rows = []
    monkeypatch.setattr(kernels, "sliced_mlp",
                        lambda r, *rest: rows.append(len(r)) or sliced_mlp(r, *rest))
    experts = distinct(T, E, K)
    x, gates, *weights = an_mlp_layer(E, experts).values()
    assert torch.equal(expert_mlp(x, experts, gates, *weights),
                       expert_mlp(x, experts, gates, *weights, backend="grouped"))
    assert rows == [T * K, T * K]


def test_no_expert_writes_a_full_size_gradient_of_zeros():
    # w_in[e] in a loop would: a SelectBackward for every expert and weight
    experts = distinct(T, E, K)
    leaves = [t.requires_grad_() for t in an_mlp_layer(E, experts).values()]
    todo, names = [expert_mlp(leaves[0], experts, *leaves[1:]).grad_fn], set()
    while todo:
        node = todo.pop()
        names.add(node.name())
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert "SelectBackward0" not in names and "AddmmBackward0" in names


def test_grouped_mm_is_asked_only_for_what_it_takes(monkeypatch):
    w, odd = torch.zeros(E, D, H), torch.zeros(E, D, 45)
    x = torch.zeros(T, D)
    assert not kernels._grouped_mm_takes(x, w)                      # a CPU needs no grouped_mm
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels._grouped_mm_takes(torch.zeros(T, 24).bfloat16(), torch.zeros(E, 24, 48))
    assert not kernels._grouped_mm_takes(x.bfloat16(), w)           # 20 * 2 bytes: not a 16th
    assert not kernels._grouped_mm_takes(x, odd) and not kernels._grouped_mm_takes(x.double(), w)
    assert not kernels._grouped_mm_takes(x, w)                      # float32 compiles to slices


def test_an_unknown_backend_is_refused_with_the_list_of_known_ones():
    experts = distinct(T, E, K)
    x, gates, *weights = an_mlp_layer(E, experts).values()
    with pytest.raises(ValueError, match="no backend 'tpu': choose auto, reference, grouped"):
        expert_mlp(x, experts, gates, *weights, backend="tpu")
