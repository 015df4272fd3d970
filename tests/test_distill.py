"""What must be true of experts that imitate each other, and of the measures of what each sees."""
import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import distill
from distill import (
    accuracy_matrix,
    class_domains,
    domains,
    expert_gradient_norms,
    forced,
    gate_accuracy,
    mutual_distillation_loss,
    narrow_vision,
    own_and_others,
    probe,
)
from moe import MLP, MoE, ViT

T, D, H = 37, 20, 45


def outputs(K, seed=0):
    torch.manual_seed(seed)
    return torch.randn(T, K, D) + torch.arange(1.0, K + 1)[:, None]    # unlike experts


# --- mutual distillation by hand ---

def test_an_expert_alone_has_nobody_to_learn_from_and_says_so_once():
    distill._warn_that_one_expert_is_alone.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = (mutual_distillation_loss(outputs(1).bfloat16()) for _ in range(2))
    assert first == second == 0 and first.shape == () and first.dtype == torch.float32
    assert len(caught) == 1 and "--k 2 or more" in str(caught[0].message)
    assert caught[0].filename == __file__          # the warning points at the caller


def test_two_experts_meet_in_their_squared_difference():
    raw = torch.tensor([[[1.0, 2.0], [4.0, 0.0]],
                        [[5.0, 5.0], [5.0, 6.0]]])             # (T=2, K=2, D=2)
    # token 0: ((1-4)^2 + (2-0)^2) / 2 = 6.5    token 1: (0 + 1) / 2 = 0.5    mean 3.5
    assert mutual_distillation_loss(raw).item() == pytest.approx(3.5)


def test_three_experts_meet_in_their_mean():
    raw = torch.tensor([[[0.0, 1.0], [3.0, 1.0], [6.0, 4.0]],
                        [[2.0, 7.0], [2.0, 7.0], [2.0, 7.0]]])  # (T=2, K=3, D=2)
    # token 0: means (3, 2); (9+0+9)/3 = 6 and (1+1+4)/3 = 2, averaged 4    token 1: 0    mean 2
    assert mutual_distillation_loss(raw).item() == pytest.approx(2)


# --- mutual distillation, its laws ---

@pytest.mark.parametrize("K", [3, 4, 8])
def test_approaching_the_mean_is_approaching_each_other(K):
    raw = outputs(K).double()
    pairs = sum(F.mse_loss(raw[:, i], raw[:, j]) for i in range(K) for j in range(K))
    torch.testing.assert_close(mutual_distillation_loss(raw), pairs / (2 * K * K))


@pytest.mark.parametrize("K", [3, 5])
def test_every_expert_is_pulled_to_the_mean_of_all(K):
    raw = outputs(K).requires_grad_()
    mutual_distillation_loss(raw).backward()
    pull = 2 / (K * D) * (raw - raw.mean(dim=1, keepdim=True)) / T
    torch.testing.assert_close(raw.grad, pull.detach())
    assert raw.grad.abs().amax(dim=(0, 2)).gt(1e-5).all()


def test_both_of_two_experts_learn():
    raw = outputs(2).requires_grad_()
    mutual_distillation_loss(raw).backward()
    pull = 2 / D * (raw[:, 0] - raw[:, 1]).detach() / T
    torch.testing.assert_close(raw.grad, torch.stack([pull, -pull], dim=1))


def test_two_experts_weigh_four_times_as_much_as_the_variance_would():
    raw = outputs(2)
    variance = raw.var(dim=1, correction=0).mean()
    torch.testing.assert_close(mutual_distillation_loss(raw), 4 * variance)


@pytest.mark.parametrize("K", [2, 3])
def test_identical_experts_lose_nothing(K):
    raw = outputs(1).expand(T, K, D).clone().requires_grad_()
    loss = mutual_distillation_loss(raw)
    loss.backward()
    assert loss < 1e-12 and raw.grad.abs().max() < 1e-8


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("dim", [0, 2])
def test_more_tokens_or_features_do_not_make_it_larger(K, dim):
    raw = outputs(K)
    doubled = mutual_distillation_loss(torch.cat([raw, raw], dim=dim))
    torch.testing.assert_close(doubled, mutual_distillation_loss(raw))


@pytest.mark.parametrize("K", [2, 4])
def test_the_order_of_the_experts_does_not_matter(K):
    raw = outputs(K)
    torch.testing.assert_close(mutual_distillation_loss(raw.flip(1)), mutual_distillation_loss(raw))


@pytest.mark.parametrize("K", [2, 3])
def test_it_is_computed_in_float32_from_bfloat16_experts(K):
    raw = outputs(K).bfloat16()
    loss = mutual_distillation_loss(raw)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mutual_distillation_loss(raw.float()), rtol=0, atol=0)


def moe(n_experts, k):
    torch.manual_seed(0)
    return MoE(D, H, n_experts, k, keep_raw=True), torch.randn(T, D)


def test_the_gates_do_not_enter():
    layer, x = moe(4, k=2)
    _, routing, raw = layer(x)
    _, _, louder = layer(x, routing._replace(gates=3 * routing.gates))
    loss = mutual_distillation_loss(raw)
    assert loss == mutual_distillation_loss(louder) and loss > 0
    assert torch.autograd.grad(loss, layer.router.weight, allow_unused=True) == (None,)


def test_a_dense_gate_teaches_every_expert():
    layer, x = moe(5, k=5)
    mutual_distillation_loss(layer(x)[2]).backward()
    for p in layer.experts.parameters():
        assert p.grad.flatten(1).abs().amax(dim=1).gt(1e-5).all()


def test_an_expert_that_was_not_chosen_learns_nothing():
    layer, x = moe(4, k=2)
    routing = layer.router(x)
    routing = routing._replace(chosen=torch.tensor([3, 1]).expand(T, 2))
    mutual_distillation_loss(layer(x, routing)[2]).backward()
    learns = layer.experts.w_in.grad.flatten(1).abs().amax(dim=1)
    assert (learns > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("E", [2, 4])
def test_moderate_experts_pull_each_other_together(E):
    def spread(alpha):
        layer, x = moe(E, k=E)
        y = torch.randn(T, D)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(20):
            out, _, raw = layer(x)
            optimizer.zero_grad()
            (F.mse_loss(out, y) + alpha * mutual_distillation_loss(raw)).backward()
            optimizer.step()
        return layer(x)[2].var(dim=1).mean().item()

    alone, moderate, large = spread(0), spread(1), spread(30)
    assert large < 0.5 * moderate < 0.45 * alone


# --- domains ---

def test_an_images_domain_is_the_favourite_of_its_mean_token():
    probs = torch.tensor([
        [0.60, 0.40, 0.00], [0.10, 0.90, 0.00],    # mean .350 .650 .000: not its first token's
        [0.45, 0.55, 0.00], [0.45, 0.00, 0.55],    # mean .450 .275 .275: nobody's loudest
        [0.10, 0.20, 0.70], [0.50, 0.30, 0.20],    # mean .300 .250 .450: not its last token's
    ])
    assert domains(probs, n_tokens=2).tolist() == [1, 0, 2]


def test_class_domains_are_shares_of_a_class():
    domain = torch.tensor([1, 0, 2, 1, 1, 0])
    labels = torch.tensor([0, 0, 1, 1, 1, 3])
    shares = class_domains(domain, labels, n_experts=3, n_classes=4)
    nan = math.nan                                 # class 2 has no image
    torch.testing.assert_close(shares, torch.tensor([
        [1 / 2, 0.0, nan, 1.0],
        [1 / 2, 2 / 3, nan, 0.0],
        [0.0, 1 / 3, nan, 0.0]]), equal_nan=True)
    torch.testing.assert_close(shares.sum(dim=0)[[0, 1, 3]], torch.ones(3))


# --- probing ---

def sparse_vit(k=1, n_experts=3, drop_path=0.0):
    """A ViT with experts loud enough to disagree, biases included; 10 tokens per image."""
    torch.manual_seed(0)
    vit = ViT(16, 3, heads=2, hidden=23, patch=8, n_classes=5, image_size=24, moe_blocks=(1, 2),
              make_sparse=lambda: MoE(16, 23, n_experts, k), drop_path=drop_path)
    for number in vit.moe_blocks:
        for p in vit.blocks[number - 1].mlp.experts.parameters():
            torch.nn.init.normal_(p)
    return vit, torch.randn(8, 3, 24, 24), torch.randint(5, (8,))


def with_one_expert(vit, block, e):
    """The same ViT with the plain MLP of expert e in that block."""
    vit = copy.deepcopy(vit)
    experts, mlp = vit.blocks[block - 1].mlp.experts, MLP(16, 23)
    with torch.no_grad():
        mlp.fc_in.weight.copy_(experts.w_in[e].T)
        mlp.fc_in.bias.copy_(experts.b_in[e])
        mlp.fc_out.weight.copy_(experts.w_out[e].T)
        mlp.fc_out.bias.copy_(experts.b_out[e])
    vit.blocks[block - 1].mlp = mlp
    return vit


@pytest.mark.parametrize("expert", [0, 2])
def test_a_forced_expert_is_the_blocks_plain_mlp(expert):
    vit, x, _ = sparse_vit(k=2)
    logits, layers = vit(x, {2: forced(expert, n_tokens=80, n_experts=3)})
    plain = with_one_expert(vit, 2, expert)(x)
    torch.testing.assert_close(logits, plain.logits)
    torch.testing.assert_close(layers[3].h, plain.layers[3].h)


def test_a_forced_routing_is_certain():
    routing = forced(2, n_tokens=4, n_experts=3)
    assert routing.chosen.tolist() == [[2]] * 4 and routing.gates.tolist() == [[1.0]] * 4
    assert routing.probs.tolist() == [[0.0, 0.0, 1.0]] * 4
    assert torch.equal(routing.logits.softmax(dim=-1), routing.probs)


def test_probing_asks_each_expert_in_turn():
    vit, x, labels = sparse_vit(k=2)
    correct = probe(vit, x, labels, block=2)
    by_hand = [with_one_expert(vit, 2, e)(x).logits.argmax(dim=1) == labels for e in range(3)]
    assert torch.equal(correct, torch.stack(by_hand))
    assert correct.dtype == torch.bool and correct.unique(dim=0).shape == (3, 8)   # they disagree


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("look", [probe, expert_gradient_norms])
def test_looking_at_a_model_leaves_it_as_it_was(look, training):
    vit, x, labels = sparse_vit(drop_path=0.6)
    vit.train(training)
    before = copy.deepcopy(vit.state_dict())
    first, second = look(vit, x, labels, 2), look(vit, x, labels, 2)
    assert torch.equal(first, second)              # no stochastic depth while one looks
    assert all(m.training is training for m in vit.modules())
    vit.train().blocks[0].eval()                   # as one freezes a part
    look(vit, x, labels, 2)
    assert vit.training and vit.blocks[1].training and not vit.blocks[0].attn.training
    assert all(torch.equal(v, before[name]) for name, v in vit.state_dict().items())
    assert all(p.grad is None for p in vit.parameters())


@pytest.mark.parametrize("look", [probe, expert_gradient_norms])
def test_looking_with_the_wrong_images_leaves_a_model_in_training(look):
    vit, x, labels = sparse_vit()
    vit.train()
    with pytest.raises(TypeError, match="images must be normalised"):
        look(vit, x.byte(), labels, 2)
    assert all(m.training for m in vit.modules())


def test_gradients_are_looked_at_where_nobody_asks_for_them():
    vit, x, labels = sparse_vit()
    norms = expert_gradient_norms(vit, x, labels, 2)
    with torch.no_grad():
        assert torch.equal(expert_gradient_norms(vit, x, labels, 2), norms) and norms.max() > 0


CORRECT = torch.tensor([[1, 1, 0, 0, 1],
                        [0, 0, 1, 1, 1],
                        [0, 1, 0, 0, 0]]).bool()   # (E=3, B=5)


def test_accuracy_is_counted_expert_by_domain():
    A = accuracy_matrix(CORRECT, torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(A, torch.tensor([    # domain 0: images 0-2; 1: 3-4; 2: none
        [2 / 3, 1 / 2, math.nan],
        [1 / 3, 1.0, math.nan],
        [1 / 3, 0.0, math.nan]]), equal_nan=True)


def test_own_and_others_by_hand():
    A = torch.tensor([[0.9, 0.2, 0.4],
                      [0.1, 0.8, 0.5],
                      [0.3, 0.6, 0.7]])
    own, others = own_and_others(A)
    torch.testing.assert_close(own, torch.tensor([0.9, 0.8, 0.7]))
    torch.testing.assert_close(others, torch.tensor([0.3, 0.3, 0.45]))


def test_an_empty_domain_counts_for_nobody():
    nan = math.nan
    own, others = own_and_others(torch.tensor([[0.9, 0.2, nan], [0.1, 0.8, nan], [0.3, 0.6, nan]]))
    torch.testing.assert_close(own, torch.tensor([0.9, 0.8, nan]), equal_nan=True)
    torch.testing.assert_close(others, torch.tensor([0.2, 0.1, 0.45]))


def test_a_gate_is_not_blamed_for_images_that_no_expert_gets_right():
    correct = CORRECT.clone()
    correct[:, 4] = False                          # images 0-3 are solvable, image 4 is not
    domain = torch.tensor([0, 2, 0, 1, 1])         # right, right, wrong (expert 1 knew), right
    assert gate_accuracy(correct, domain) == pytest.approx(3 / 4)
    assert gate_accuracy(torch.ones(3, 5).bool(), domain) == 1
    assert math.isnan(gate_accuracy(torch.zeros(3, 5).bool(), domain))


# --- narrow vision ---

def test_an_experts_gradient_norm_is_over_all_its_parameters():
    vit, x, labels = sparse_vit(k=2)
    norms = expert_gradient_norms(vit, x, labels, block=2)
    experts = vit.blocks[1].mlp.experts
    for n in (0, 7):
        vit.zero_grad()
        F.cross_entropy(vit(x[n:n + 1]).logits, labels[n:n + 1]).backward()
        for e in range(3):
            g = torch.cat([p.grad[e].flatten() for p in experts.parameters()])
            torch.testing.assert_close(norms[n, e], g.norm())
    assert norms.shape == (8, 3) and not norms.requires_grad


def test_an_expert_that_serves_alone_has_all_the_gradient():
    vit, x, labels = sparse_vit()
    served_by = iter([2, 0, 2])
    vit.blocks[1].mlp.router.forward = lambda h: forced(next(served_by), len(h), n_experts=3)
    norms = expert_gradient_norms(vit, x[:3], labels[:3], block=2)
    assert (norms > 0).int().tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert narrow_vision(norms[[0, 2]]).tolist() == [0.0, 0.0, 1.0]    # exactly one-hot


def test_two_experts_active_together_share_what_they_see():
    vit, x, labels = sparse_vit(k=2, n_experts=2)
    share = narrow_vision(expert_gradient_norms(vit, x, labels, block=2))
    assert (share > 0.05).all()
    assert share.sum().item() == pytest.approx(1)


def test_narrow_vision_is_each_experts_share_of_all_the_gradient():
    norms = torch.tensor([[1.0, 0.0, 2.0],
                          [3.0, 0.0, 4.0]])        # (B=2, E=3)
    # (1+3, 0, 2+4) / 10; a mean of the images' own shares would be (.381, 0, .619)
    torch.testing.assert_close(narrow_vision(norms), torch.tensor([0.4, 0.0, 0.6]))


# --- what is refused ---

D3, L3, RIGHT = torch.tensor([0, 1, 2]), torch.tensor([0, 3, 1]), torch.ones(3, 3).bool()


def looked_at(look, block=2, n=8):
    """probe or expert_gradient_norms, at a ViT whose blocks 1 and 2 of 3 have routers."""
    def call():
        vit, x, labels = sparse_vit()
        return look(vit, x, labels[:n], block)
    return call


def replaced(ids, at, by):
    return ids.index_fill(0, torch.tensor(at), by)


REFUSED = [
    *((lambda s=s: mutual_distillation_loss(torch.zeros(s)), r"raw must be \(T, K, D\), not")
      for s in ((0, 2, D), (T, 0, D), (T, 2, 0), (T, D), (T,), (2, T, 2, D), (0, 1, D))),
    *((lambda s=s: domains(torch.zeros(s), 3), "probs of 3 tokens an image must be ")
      for s in ((7, 5), (2, 5), (6, 0), (6,), (2, 3, 5))),
    *((lambda i=i: class_domains(replaced(D3, 1, i), L3, 3, 4), f"domain must be 0 to 2, not .*{i}")
      for i in (-1, 3, 300)),
    *((lambda i=i: class_domains(D3, replaced(L3, 1, i), 3, 4), f"labels must be 0 to 3, not .*{i}")
      for i in (-1, 4, 300)),
    (lambda: class_domains(D3, L3[:2], 3, 4), r"labels must be \(3\), not \(2,\)"),
    (lambda: class_domains(D3, L3[:1], 3, 4), r"labels must be \(3\), not \(1,\)"),
    (lambda: class_domains(D3[:0], L3[:0], 3, 4), r"domain must be \(B\), not \(0,\)"),
    (lambda: class_domains(D3[None], L3[None], 3, 4), r"domain must be \(B\), not \(1, 3\)"),
    *((lambda e=e: forced(e, 4, 3), f"expert must be 0 to 2, not {e}") for e in (-1, 3, 256)),
    *((looked_at(look, block), r"block cannot be .*: choose from \[1, 2\], each once")
      for look in (probe, expert_gradient_norms) for block in (0, -1, 3, 4, 1.5, None)),
    *((looked_at(probe, n=n), rf"labels must be \(8\), not \({n},\)") for n in (1, 7, 0)),
    (looked_at(expert_gradient_norms, n=7), "argument 2 is shorter"),
    (looked_at(expert_gradient_norms, n=0), r"labels must be \(B\), not \(0,\)"),
    *((lambda n=n: domains(torch.zeros(6, 5), n), "n_tokens must be a whole number of 1 or more")
      for n in (0, -3, 2.0)),
    # bytes would be a mask, where numbers say which
    *((lambda f=f, d=d: f(D3.to(d)), f"domain must be int64, not {d}")
      for d in (torch.uint8, torch.bool, torch.int32) for f in (
          lambda domain: class_domains(domain, L3, 3, 4),
          lambda domain: gate_accuracy(RIGHT, domain),
          lambda domain: accuracy_matrix(RIGHT, domain))),
    *((lambda f=f, i=i: f(RIGHT, replaced(D3, 1, i)), f"domain must be 0 to 2, not .*{i}")
      for f in (accuracy_matrix, gate_accuracy) for i in (-1, 3)),
    *((lambda f=f: f(RIGHT, D3[:1]), r"domain must be \(3\), not \(1,\)")
      for f in (accuracy_matrix, gate_accuracy)),
    *((lambda f=f, s=s: f(torch.ones(s), D3), r"correct must be \(E, B\), not")
      for f in (accuracy_matrix, gate_accuracy) for s in ((3,), (0, 3), (3, 0), (1, 3, 3))),
    *((lambda s=s: own_and_others(torch.ones(s)), "A must be ") for s in ((3, 4), (3, 1), (3,),
                                                                            (3, 3, 3))),
    *((lambda s=s: narrow_vision(torch.ones(s)), r"norms must be \(B, E\), not")
      for s in ((0, 3), (3, 0), (3,), (2, 3, 3))),
]


@pytest.mark.parametrize("call, sentence", REFUSED)
def test_what_cannot_be_measured_is_refused_in_a_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()


@pytest.mark.parametrize("K", [2, 3])
def test_distillation_in_float64_has_the_gradients_of_finite_differences(K):
    raw = outputs(K)[:4, :, :5].double().requires_grad_()
    assert mutual_distillation_loss(raw).dtype == torch.float64
    assert torch.autograd.gradcheck(mutual_distillation_loss, (raw,))
