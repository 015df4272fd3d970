"""Tests of router.py: who is chosen, how much it counts, and which gradients that lets through.

Letters as in router.py. f_te is expert e's output for token t, made by hand here, and
q_te = <dL/dy_t, f_te>: how much the loss would like more of it.
"""
import doctest
import math
import warnings

import pytest
import torch
from torch.testing import assert_close

import router
from router import (
    GATES,
    TopKRouter,
    balance_loss,
    entropy_loss,
    load_loss,
    within_capacity,
    z_loss,
)

T, D, E = 37, 20, 7
EVERY_K = (1, 2, 3, E)


def route(logits, k=2, gate="softmax_topk", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # topk_softmax with k=1 is one of our subjects
        chooser = TopKRouter(D, logits.shape[1], k, gate, **options)
    return chooser.eval().route(logits)


def a_world():
    """Logits z (T, E), expert outputs f (T, E, D) and dL/dy (T, D), in float64."""
    return (torch.randn(shape, dtype=torch.float64) for shape in ((T, E), (T, E, D), (T, D)))


def chosen_by(routing, E):
    """(T, E) of 0 and 1: S, the experts that each token visits."""
    return torch.zeros(len(routing.chosen), E).double().scatter(1, routing.chosen, 1.0)


def logit_gradient(z, f, dy, k, gate, rescale=False):
    """dL/dz of L = <dy, y> with y_t = sum_k gates_tk f_{t, experts_tk}; and S."""
    z = z.clone().requires_grad_()
    routing = route(z, k, gate)
    gates = routing.gates / routing.gates.sum(1, keepdim=True) if rescale else routing.gates
    outputs = f.gather(1, routing.chosen[..., None].expand(-1, -1, f.shape[2]))
    ((gates[..., None] * outputs).sum(1) * dy).sum().backward()
    return z.grad, chosen_by(routing, z.shape[1])


def gradient_of(loss, logits):
    z = logits.clone().requires_grad_()
    loss(z).backward()
    return z.grad


def test_the_docstring_example_is_true():
    assert doctest.testmod(router) == (0, 2)


# --- who is chosen, and how much it counts ---

def test_the_three_gates_worked_by_hand():
    # e^z = 1, 4, 3, 2, of sum 10; the two largest are experts 1 and 2
    z = torch.tensor([[1.0, 4.0, 3.0, 2.0]]).log()
    for gate, gates in (("softmax_topk", [4 / 10, 3 / 10]), ("topk_softmax", [4 / 7, 3 / 7]),
                        ("sigmoid", [4 / 5, 3 / 4])):
        routing = route(z, 2, gate)
        assert routing.chosen.tolist() == [[1, 2]]
        assert_close(routing.gates, torch.tensor([gates]))
        assert_close(routing.probs, torch.tensor([[0.1, 0.4, 0.3, 0.2]]))
        assert routing.dropped == 0


@pytest.mark.parametrize("k", EVERY_K)
def test_a_tie_goes_to_the_lowest_index(k):
    assert route(torch.zeros(T, E), k).chosen.tolist() == [list(range(k))] * T


def test_visiting_every_expert_is_the_dense_weighted_sum():
    z, f, dy = a_world()
    p = z.softmax(1)
    q = torch.einsum("ted,td->te", f, dy)
    gradient, _ = logit_gradient(z, f, dy, E, "softmax_topk")
    assert_close(gradient, p * (q - (p * q).sum(1, keepdim=True)))
    assert_close(route(z, E).gates, p.sort(descending=True).values)


@pytest.mark.parametrize("gate", GATES)
def test_shuffling_the_tokens_shuffles_their_routing_and_nothing_else(gate):
    z, order = torch.randn(T, E), torch.randperm(T)
    for a, b in zip(route(z[order], gate=gate)[:4], route(z, gate=gate)[:4], strict=True):
        assert_close(a, b[order])


@pytest.mark.parametrize("gate", GATES)
def test_relabelling_the_experts_changes_their_names_and_nothing_else(gate):
    z, names = torch.randn(T, E), torch.randperm(E)
    relabelled, original = route(z[:, names], gate=gate), route(z, gate=gate)
    assert_close(names[relabelled.chosen], original.chosen)
    assert_close(relabelled.gates, original.gates)


def test_a_router_is_linear_and_starts_almost_undecided():
    chooser, x = TopKRouter(D, E), torch.randn(T, D)
    routing = chooser(x)
    assert_close(routing.logits, x @ chooser.weight.T)
    assert 0.015 < chooser.weight.std() < 0.025
    assert (routing.probs - 1 / E).abs().max() < 0.1
    assert list(dict(chooser.named_parameters())) == ["weight"]


def test_the_router_thinks_in_float32_whatever_the_autocast():
    chooser, x = TopKRouter(D, E), torch.randn(T, D)
    with torch.autocast("cpu", torch.bfloat16):
        inside, rounded = chooser(x), chooser(x.bfloat16())
    for a, b in zip(inside[:4], chooser(x)[:4], strict=True):
        assert_close(a, b, rtol=0, atol=0)
    assert rounded.logits.dtype == rounded.gates.dtype == rounded.probs.dtype == torch.float32
    routed = chooser.route(inside.logits.bfloat16())                    # a teacher's, for example
    assert routed.logits.dtype == routed.gates.dtype == routed.probs.dtype == torch.float32
    chooser.bfloat16()
    assert chooser(x).gates.dtype == torch.float32


def test_no_tokens_are_routed_nowhere():
    routing = TopKRouter(D, E, k=2, capacity_factor=1.0)(torch.randn(0, D))
    assert routing.chosen.shape == (0, 2) and routing.probs.shape == (0, E)


# --- noise ---

def test_noise_has_a_standard_deviation_of_one_over_e():
    # sigmoid gates of all experts give the noisy logits back
    for noise in (1.0, 3.0):
        chooser = TopKRouter(D, E, k=E, gate="sigmoid", noise=noise)
        noisy = chooser.route(torch.zeros(5000, E)).gates.logit()
        assert noisy.std().item() == pytest.approx(noise / E, rel=0.02)
        assert noisy.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("gate", GATES)
def test_noise_moves_the_choice_and_the_gates_but_not_the_reported_probs(gate):
    z, chooser = torch.randn(T, E), TopKRouter(D, E, gate=gate, noise=5.0)
    one, two = chooser.route(z), chooser.route(z)
    assert not torch.equal(one.chosen, two.chosen) and not torch.equal(one.gates, two.gates)
    assert torch.equal(one.logits, z) and torch.equal(one.probs, z.softmax(1))
    assert (one.gates[:, 0] >= one.gates[:, 1]).all()       # the noisy favourite counts the most


def test_evaluation_is_deterministic():
    z, chooser = torch.randn(T, E), TopKRouter(D, E, noise=5.0).eval()
    for a, b in zip(chooser.route(z)[:4], route(z)[:4], strict=True):
        assert torch.equal(a, b)


# --- what is refused ---

@pytest.mark.parametrize("k", [0, E + 1])
def test_a_token_cannot_visit_more_experts_than_there_are_nor_none(k):
    with pytest.raises(ValueError, match=f"k cannot be {k} of {E} experts: choose 1 to {E}"):
        TopKRouter(D, E, k)


def test_an_unknown_gate_is_refused_with_the_list_of_known_ones():
    with pytest.raises(ValueError, match="no gate 'softmax': choose one of softmax_topk, topk_s"):
        TopKRouter(D, E, gate="softmax")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_raise_with_the_name_of_the_layer(bad):
    chooser = TopKRouter(D, E)
    chooser.name = "the router of block 5"
    z = torch.randn(T, E)
    z[3, 1] = z[3, 2] = z[8, 0] = bad
    sentence = "the router of block 5: the logits of 2 of 37 tokens are not finite"
    with pytest.raises(FloatingPointError, match=sentence):
        chooser.route(z)


def test_a_router_that_the_task_loss_cannot_reach_says_so():
    with pytest.warns(UserWarning, match="never reaches the router"):
        TopKRouter(D, E, k=1, gate="topk_softmax")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k, gate in ((2, "topk_softmax"), (1, "softmax_topk"), (1, "sigmoid")):
            TopKRouter(D, E, k, gate)


# --- capacity ---

def test_first_choices_are_served_before_second_ones_worked_by_hand():
    # C = ceil(0.5 * 2 * 4 / 3) = ceil(4/3) = 2. Expert 0: the first choices of tokens 0 and 1 fit,
    # token 2's does not, nor token 3's second. Expert 1: token 3's first, then token 0's second,
    # and token 1's second is too late. Expert 2: one choice, served.
    experts = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
    served = [[True, True], [True, False], [False, True], [True, False]]
    assert within_capacity(experts, 3, 0.5).tolist() == served


@pytest.mark.parametrize("k", EVERY_K)
@pytest.mark.parametrize("factor", [0.3, 0.7, 1.0])
def test_an_expert_serves_its_load_or_its_capacity_whichever_is_smaller(k, factor):
    z = torch.randn(T, E)
    free, full = route(z, k), route(z, k, capacity_factor=factor)
    load = chosen_by(free, E).sum(0)
    served = torch.zeros(E).index_add(0, full.chosen.flatten(), (full.gates > 0).flatten().float())
    C = math.ceil(factor * k * T / E)
    assert served.tolist() == load.clamp(max=C).tolist()
    assert full.dropped == k * T - served.sum()


def test_a_dropped_choice_keeps_its_expert_and_loses_its_gate():
    z = torch.randn(T, E)
    free, full = route(z), route(z, capacity_factor=0.5)
    kept = within_capacity(free.chosen, E, 0.5)
    assert_close(full.chosen, free.chosen)
    assert_close(full.gates, torch.where(kept, free.gates, 0.0), rtol=0, atol=0)
    assert 0 < (~kept).sum() == full.dropped


def test_capacity_is_what_the_formula_says_and_not_its_rounding_error():
    crowd = torch.zeros(100, 2).long() + torch.tensor([0, 1])      # everyone visits experts 0, 1
    assert within_capacity(crowd, 4, 1.1).sum(dim=0).tolist() == [55, 55]   # 1.1 * 2 * 100 / 4


@pytest.mark.parametrize("factor", [-0.1, math.nan])
def test_a_capacity_that_is_no_share_is_refused(factor):
    with pytest.raises(ValueError, match="0 or more"):
        TopKRouter(D, E, capacity_factor=factor)


def test_capacity_factor_0_drops_every_choice_and_infinity_none():
    z = torch.randn(T, E)
    assert route(z, capacity_factor=0.0).dropped == 2 * T
    assert not route(z, capacity_factor=0.0).gates.any()
    for factor in (E / 2, math.inf):      # E / K: every token's favourite could be the same
        assert route(z, capacity_factor=factor).dropped == 0
        assert_close(route(z, capacity_factor=factor).gates, route(z).gates, rtol=0, atol=0)


# --- gradient blocking: which gradients the gates let through ---

@pytest.mark.parametrize("k", EVERY_K)
def test_softmax_topk_pushes_all_unselected_logits_the_same_way(k):
    z, f, dy = a_world()
    gradient, S = logit_gradient(z, f, dy, k, "softmax_topk")
    p, q = z.softmax(1), torch.einsum("ted,td->te", f, dy)
    u = (S * p * q).sum(1, keepdim=True)
    assert_close(gradient, torch.where(S > 0, p * (q - u), -p * u))


@pytest.mark.parametrize("k", EVERY_K)
@pytest.mark.parametrize("rescale", [False, True])
def test_gates_that_sum_to_1_give_unselected_logits_no_gradient(k, rescale):
    # top-k then softmax, and softmax then top-k then divided by the sum, are the same function
    z, f, dy = a_world()
    gate = "softmax_topk" if rescale else "topk_softmax"
    gradient, S = logit_gradient(z, f, dy, k, gate, rescale)
    q = torch.einsum("ted,td->te", f, dy)
    w = z.masked_fill(S == 0, -math.inf).softmax(1)
    assert_close(gradient, w * (q - (w * q).sum(1, keepdim=True)))
    if not rescale:
        assert not gradient[S == 0].any()                           # exactly


@pytest.mark.parametrize("k", EVERY_K)
def test_sigmoid_gates_teach_each_selected_logit_on_its_own(k):
    z, f, dy = a_world()
    gradient, S = logit_gradient(z, f, dy, k, "sigmoid")
    s, q = z.sigmoid(), torch.einsum("ted,td->te", f, dy)
    assert_close(gradient, S * s * (1 - s) * q)
    assert not gradient[S == 0].any()


@pytest.mark.parametrize("gate", GATES)
def test_what_an_unselected_expert_would_have_said_never_reaches_the_logits(gate):
    z, f, dy = a_world()
    gradient, S = logit_gradient(z, f, dy, 2, gate)
    other = torch.where(S[..., None] > 0, f, 1e6 * torch.randn_like(f))
    assert torch.equal(gradient, logit_gradient(z, other, dy, 2, gate)[0])
    heard, _ = logit_gradient(z, f + S[..., None], dy, 2, gate)
    assert not torch.equal(gradient, heard)


def test_a_softmax_gate_cannot_tell_a_common_shift_of_the_logits_but_a_sigmoid_can():
    world = tuple(a_world())
    for gate in GATES:
        total = logit_gradient(*world, 2, gate)[0].sum(1).abs().max()
        assert total > 0.1 if gate == "sigmoid" else total < 1e-12


def test_the_task_loss_reaches_a_top_1_router_unless_its_gate_is_rescaled():
    z, f, dy = a_world()
    assert logit_gradient(z, f, dy, 1, "softmax_topk")[0].norm() > 0.1
    assert not logit_gradient(z, f, dy, 1, "topk_softmax")[0].any()
    divided, _ = logit_gradient(z.float(), f.float(), dy.float(), 1, "softmax_topk", rescale=True)
    assert divided.abs().max() < 1e-6 * dy.norm()


def test_a_top_1_softmax_gate_worked_by_hand():
    # p = [3/4, 1/4], q = [2, 100]: dz_0 = 3/4 * (1 - 3/4) * 2 = 3/8 and dz_1 = -3/4 * 1/4 * 2;
    # the 100 of the expert that was not visited is nowhere
    z, f, dy = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[[2.0], [100.0]]]), torch.ones(1, 1)
    assert_close(logit_gradient(z, f, dy, 1, "softmax_topk")[0], torch.tensor([[3 / 8, -3 / 8]]))


def test_a_saturated_top_1_router_learns_nothing():
    z, f, dy = a_world()
    z[:, 4] += 100
    assert logit_gradient(z, f, dy, 1, "softmax_topk")[0].abs().max() < 1e-12


# --- the losses on the routing ---

def test_load_loss_worked_by_hand():
    # Imp = [.4, .4, .2], mean 1/3: var = (2 * .0044 + .0178) / 3 = .0089, and .0089 * 9 = .08
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    assert load_loss(probs).item() == pytest.approx(0.08, rel=1e-5)


def test_entropy_loss_worked_by_hand():
    # (1/2, 1/4, 1/4) has 3/2 ln 2 nats and (1/3, 1/3, 1/3) ln 3, whatever is added to the logits
    z = torch.tensor([[2.0, 1.0, 1.0], [5.0, 5.0, 5.0]]).log()
    assert entropy_loss(z).item() == pytest.approx((1.5 * math.log(2) + math.log(3)) / 2)


def test_balance_loss_worked_by_hand():
    # f = [2, 1, 1] / 4, P = [.55, .2, .25]: 3 * (.5 * .55 + .25 * .2 + .25 * .25) = 1.1625
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]])
    experts = torch.tensor([[0, 1], [0, 2]])
    assert balance_loss(probs, experts).item() == pytest.approx(1.1625)


def test_z_loss_worked_by_hand():
    # e^z sums to 4 and to 6
    z = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).log()
    assert z_loss(z).item() == pytest.approx((math.log(4) ** 2 + math.log(6) ** 2) / 2)


def test_perfect_balance_costs_nothing_and_has_a_finite_gradient():
    z = torch.zeros(32, 4)                        # powers of 2, so that the balance is exact
    assert load_loss(z.softmax(1)) == 0
    assert not gradient_of(lambda z: load_loss(z.softmax(1)), z).any()            # NaN is "any"
    experts = torch.arange(2 * E * 3).view(-1, 2) % E
    assert balance_loss(torch.full((E * 3, E), 1 / E), experts).item() == pytest.approx(1)


@pytest.mark.parametrize("n_experts", [2, E])
def test_collapse_costs_e_minus_1_and_e(n_experts):
    probs = torch.eye(n_experts)[1].expand(T, -1)
    assert load_loss(probs).item() == pytest.approx(n_experts - 1)
    experts = torch.ones(T, 1, dtype=torch.long)
    assert balance_loss(probs, experts).item() == pytest.approx(n_experts)


def test_entropy_stays_finite_where_probabilities_underflow():
    z = torch.tensor([[0.0, 1e3, -1e3], [1.0, 0.0, 2.0]])
    assert torch.isfinite(gradient_of(entropy_loss, z)).all()
    assert entropy_loss(z[:1]) == 0


def test_the_gradient_of_the_load_loss_in_closed_form():
    z, *_ = a_world()
    p = z.softmax(1)
    c = 2 * E * (p.mean(0) - 1 / E)
    expected = p * (c - (p * c).sum(1, keepdim=True)) / T
    assert_close(gradient_of(lambda z: load_loss(z.softmax(1)), z), expected)
    assert_close(load_loss(p), E * p.mean(0).square().sum() - 1)


def test_the_gradient_of_the_entropy_in_closed_form():
    z, *_ = a_world()
    p = z.softmax(1)
    H = -(p * p.log()).sum(1, keepdim=True)
    assert_close(gradient_of(entropy_loss, z), -p * (p.log() + H) / T)


@pytest.mark.parametrize("k", EVERY_K)
def test_the_gradient_of_the_balance_loss_in_closed_form(k):
    z, *_ = a_world()
    p, routing = z.softmax(1), route(z, k)
    f = chosen_by(routing, E).sum(0) / (k * T)
    expected = E / T * p * (f - (p * f).sum(1, keepdim=True))
    actual = gradient_of(lambda z: balance_loss(z.softmax(1), routing.chosen), z)
    assert_close(actual, expected, rtol=1e-6, atol=1e-8)      # f is a float32 constant


def test_the_gradient_of_the_z_loss_in_closed_form():
    z, *_ = a_world()
    assert_close(gradient_of(z_loss, z), 2 / T * z.logsumexp(1, keepdim=True) * z.softmax(1))


def test_the_losses_say_how_many_tokens_an_expert_gets_and_never_which():
    # tokens 0 and 1 have equal logits, hence equal gradients, whatever their experts would say
    z, *_ = a_world()
    z[1] = z[0]
    experts = route(z).chosen
    for loss in (lambda z: load_loss(z.softmax(1)), entropy_loss, z_loss,
                 lambda z: balance_loss(z.softmax(1), experts)):
        gradient = gradient_of(loss, z)
        assert_close(gradient[0], gradient[1], rtol=0, atol=1e-15)
        assert gradient.abs().min() > 0                        # every logit hears of it


# --- what is refused ---

NAN, INF = math.nan, math.inf
Z, IDS, LOADS = torch.zeros(T, E), torch.zeros(T, 2, dtype=torch.int64), (load_loss, z_loss,
                                                                           entropy_loss)
REFUSED = [
    *((lambda k=k: TopKRouter(D, E, k), f"k cannot be {k} of {E} experts: choose 1 to {E}")
      for k in (-1, 0, E + 1, 1.0, 2.5, None, "2")),
    (lambda: TopKRouter(D, 0, 1), "k cannot be 1 of 0 experts"),
    *((lambda g=g: TopKRouter(D, E, gate=g), f"there is no gate {g!r}: choose one of softmax_topk")
      for g in ("softmax", "", None, 1)),
    *((lambda v=v: TopKRouter(D, E, noise=v), f"noise cannot be {v}: choose 0 or more")
      for v in (-1, -1e-9, NAN, -INF, INF)),
    *((lambda v=v: TopKRouter(D, E, capacity_factor=v), f"capacity_factor cannot be {v}: choose 0")
      for v in (-1, -1e-9, NAN, -INF)),
    *((lambda v=v: within_capacity(IDS, E, v), f"capacity_factor cannot be {v}: choose 0 or more")
      for v in (-1, -1e-9, NAN, -INF)),
    *((lambda s=s: TopKRouter(D, E).route(torch.zeros(s)), f"logits must be .*{E}.*, not ")
      for s in ((T, E - 1), (T, E + 1), (T, 1), (E,), (2, T, E), (0, 3))),
    *((lambda s=s: TopKRouter(D, E)(torch.zeros(s)), rf"x must be \(any, {D}\), not ")
      for s in ((T, D - 1), (T, 1), (D,), (2, T, D))),
    *((lambda s=s: within_capacity(torch.zeros(s, dtype=torch.int64), E, 1.0),
       "chosen must be .*K.*, not ") for s in ((T,), (T, 0), (2, T, 2))),
    *((lambda i=i: within_capacity(IDS + i, E, 1.0), f"chosen must be 0 to {E - 1}, not {i} to {i}")
      for i in (-1, E, 2**40)),
    *((lambda f=f, s=s: f(torch.zeros(s)), r"(probs|logits) must be \(T, E\), not ")
      for f in LOADS for s in ((0, E), (T, 0), (T,), (2, T, E))),
    *((lambda s=s: balance_loss(torch.zeros(s), IDS), r"probs must be \(T, E\), not ")
      for s in ((0, E), (T, 0), (T,))),
    *((lambda s=s: balance_loss(Z, torch.zeros(s, dtype=torch.int64)),
       rf"chosen must be \({T}, K\), not ") for s in ((T,), (T - 1, 2), (1, 2), (T, 0))),
    *((lambda i=i: balance_loss(Z, IDS + i), f"chosen must be 0 to {E - 1}, ") for i in (-1, E)),
    *((lambda f=f, d=d: f(IDS.to(d)), f"chosen must be int64, not {d}")
      for d in (torch.uint8, torch.int32, torch.bool, torch.float32) for f in (
          lambda c: balance_loss(Z, c), lambda c: within_capacity(c, E, 1.0))),
]


@pytest.mark.parametrize("call, sentence", REFUSED)
def test_what_a_router_cannot_be_or_be_given_is_refused_in_a_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()


# --- other numbers, other transforms ---

@pytest.mark.parametrize("autocast", [False, True])
def test_a_routing_is_as_wide_as_its_input_and_never_narrower_than_float32(autocast):
    x = torch.randn(T, D, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for module, dtype in ((TopKRouter(D, E).double(), torch.float64),
                              (TopKRouter(D, E), torch.float32),
                              (TopKRouter(D, E).bfloat16(), torch.float32)):
            routing = module(x.to(module.weight.dtype))
            assert routing.logits.dtype == routing.gates.dtype == routing.probs.dtype == dtype


@pytest.mark.parametrize("gate", GATES)
def test_a_router_in_float64_has_the_gradients_of_finite_differences(gate):
    module = TopKRouter(D, E, k=2, gate=gate).double()
    module.weight.data.mul_(20)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: module(x)[1:4], (x, module.weight))


def test_a_router_is_vmapped_and_differentiated_by_torch_func():
    module, x = TopKRouter(D, E, k=2, capacity_factor=1.0).double(), torch.randn(3, T, D).double()
    gates = torch.func.vmap(lambda x: module(x).gates)(x)
    assert torch.equal(gates, torch.stack([module(image).gates for image in x]))
    slope, = torch.autograd.grad(module(y := x[0].clone().requires_grad_()).gates.sum(), y)
    assert_close(torch.func.grad(lambda x: module(x).gates.sum())(x[0]), slope)
