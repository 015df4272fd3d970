"""Tests of notebooks/remedies.py: each remedy obeys the law that its paper promises.

What a router's gradient should be is computed by enumeration: all experts, all draws. The layers
are small and float64 where a law is exact.
"""
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import report
import train
from data import synthetic
from moe import MLP, MoE
from notebooks import ideas, measure, remedies
from notebooks.decided import SEVERAL, WORDS_OF_HASH
from notebooks.probes import closing_look, oracle_cosine
from notebooks.remedies import REMEDIES, hashed

T, D, H, E = 13, 6, 10, 5
SMALL = synthetic(seed=5, n_train=64, n_test=40)
BASE = ["--method", "moe", "--k", "1", "--epochs", "2", "--batch_size", "16", "--dim", "16",
        "--depth", "2", "--heads", "2", "--patch", "16", "--moe_blocks", "1,2", "--n_experts", "4",
        "--probe_images", "8", "--train_images", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", lambda *_, **__: SMALL)
    monkeypatch.setattr(report, "figures", lambda out: {})
    torch.manual_seed(1)


def a_trained_one(n_experts=4):
    """A V-MoE whose routers look at brightness, a thing that a linear map of pixels can learn."""
    with torch.random.fork_rng():
        _, job = train.plan(train.parse([*BASE, "--n_experts", str(n_experts), "--out", "trained"]))
    for b in job.model.moe_blocks:
        moe = job.model.blocks[b - 1].mlp
        torch.nn.init.normal_(moe.router.weight, generator=torch.Generator().manual_seed(b))
    return job.model.eval()


def a_layer(name, k=1, **job):
    """A remedied layer in float64 whose router has an opinion, in training."""
    moe = MoE(D, H, E, k).double()
    torch.nn.init.normal_(moe.router.weight)
    torch.nn.init.normal_(moe.experts.b_out)
    return REMEDIES[name](moe, SimpleNamespace(**job)).double().train()


def tokens(n=T):
    return torch.randn(n, D, dtype=torch.float64)


def plan(name, *flags, out="run"):
    trained = [a_trained_one()] * (name == "grouter")
    return train.plan(train.parse([*BASE, *flags, "--out", out]),
                      change=remedies.remedy(name, *trained))[1]


def outputs_of(layer, x):
    """(T, E, D): what each expert makes of each token."""
    e = layer.experts
    return torch.stack([F.gelu(x @ e.w_in[i] + e.b_in[i]) @ e.w_out[i] + e.b_out[i]
                        for i in range(len(e.w_in))], dim=1)


def dense_gradient(layer, x, dy):
    """The router's gradient (E, D) if all experts were chosen and dL/dy is dy."""
    p = (x @ layer.router.weight.T).softmax(dim=1)
    q = (outputs_of(layer, x).detach() * dy[:, None]).sum(dim=2)        # (T, E)
    return torch.autograd.grad((p * q).sum(), layer.router.weight)[0]


# --- select otherwise ---

def test_a_bias_changes_who_is_chosen_and_never_what_a_gate_is_worth():
    layer, x = a_layer("loss-free bias", k=2), tokens()
    plain = layer.router(x)
    layer.bias[3] = 5.0
    y, routing, _ = layer(x)
    assert (routing.chosen[:, 0] == 3).all() and (plain.chosen[:, 0] != 3).any()
    assert torch.equal(routing.gates, plain.probs.gather(1, routing.chosen))
    raw = outputs_of(layer, x).gather(1, routing.chosen[..., None].expand(-1, -1, D))
    assert_close(y, (routing.gates[..., None] * raw).sum(dim=1))


def test_a_bias_moves_against_the_load_by_hand_and_in_training_alone():
    # one-hot tokens: three go to expert 0, one to 1, one to 4; the mean load is 1
    layer = a_layer("loss-free bias")
    with torch.no_grad():
        layer.router.weight.copy_(9 * torch.eye(E, D))
    x = torch.eye(D, dtype=torch.float64)[[0, 0, 0, 1, 4]]
    layer(x)
    assert_close(layer.bias, torch.tensor([-1.0, 0, 1, 1, 0], dtype=torch.float64) / 1000)
    layer.eval()(x)
    layer.train()(x)
    assert_close(layer.bias, torch.tensor([-2.0, 0, 2, 2, 0], dtype=torch.float64) / 1000)


def test_biases_even_out_a_load_that_is_not():
    layer, x = a_layer("loss-free bias"), tokens(500)

    def spread():
        return layer(x)[1].chosen.flatten().bincount(minlength=E).double().std()

    before, layer.u = spread(), 0.005
    for _ in range(300):
        layer(x)
    assert spread() < 0.1 * before


@pytest.mark.parametrize("k, C", [(1, 3), (2, 6)])          # ceil(13 / 5), ceil(26 / 5)
def test_experts_that_choose_have_exactly_the_same_load(k, C):
    layer, x = a_layer("expert choice", k), tokens()
    x[:, 0] = 1
    layer.router.weight.data[0, 0] += 2                     # more want expert 0 than it takes
    y, routing, _ = layer(x)
    p, f, expected = routing.probs, outputs_of(layer, x), torch.zeros(T, D, dtype=torch.float64)
    takers = [[] for _ in range(T)]
    for e in range(E):
        for t in sorted(range(T), key=lambda t: -p[t, e])[:C]:
            expected[t] += p[t, e] * f[t, e]
            takers[t].append(e)
    assert_close(y, expected)
    rows = layer.takes(p)
    assert rows.shape == (E, C) and all(len(set(own)) == C for own in rows.tolist())
    assert len({len(own) for own in takers}) > 1            # but tokens are not served alike
    assert any(own and p[t].argmax() not in own for t, own in enumerate(takers))
    for t, own in enumerate(takers):
        wanted = sorted(range(E), key=lambda e: (e not in own, -p[t, e]))[:k]
        assert routing.chosen[t].tolist() == wanted
        assert [g > 0 for g in routing.gates[t].tolist()] == [e in own for e in wanted]


# --- estimate the gradient that is blocked ---

def test_a_default_output_is_the_running_mean_of_an_experts_own_tokens():
    layer, x = a_layer("default outputs", k=2), tokens()
    layer.mean = before = torch.randn(E, D, dtype=torch.float64)
    x[:, 0] = 1
    layer.router.weight.data[4, 0] = -50                    # idle: its mean stays
    y, routing, _ = layer(x)
    f, p = outputs_of(layer, x), routing.probs
    assert not (routing.chosen == 4).any()
    for e in range(E):
        own = [t for t in range(T) if e in routing.chosen[t]]
        expected = before[e] * 0.99 + 0.01 * f[own, e].mean(dim=0) if own else before[e]
        assert_close(layer.mean[e], expected)
    on = F.one_hot(routing.chosen, E).sum(dim=1)[..., None].bool()
    assert_close(y, (p[..., None] * torch.where(on, f, before)).sum(dim=1))
    kept = layer.mean
    layer.eval()(x)
    assert layer.mean is kept


def test_where_experts_are_constant_default_outputs_give_the_routers_dense_gradient():
    layer, x, dy = a_layer("default outputs"), tokens(), tokens()
    torch.nn.init.zeros_(layer.experts.w_out)
    layer.mean = layer.experts.b_out.detach()
    y, *_ = layer(x)
    assert_close(torch.autograd.grad(y, layer.router.weight, dy)[0], dense_gradient(layer, x, dy))


def test_a_drawn_expert_gives_the_gradient_of_the_draw_for_every_loss_of_third_degree(monkeypatch):
    # E[gradient] over all draws = d/dz sum_e p_e L(p_e f_e) with L held fixed, by enumeration
    layer, x = a_layer("sparse mixer"), tokens(1)
    layer.router.weight.data *= 0.3                                     # no draw is a rare one
    a, b, c = (torch.randn(*[D] * n, dtype=torch.float64) for n in (1, 2, 3))

    def loss(y):
        return y @ a + y @ b @ y + torch.einsum("i,j,k,ijk->", y, y, y, c)

    p = (x @ layer.router.weight.T).softmax(dim=1)
    f = outputs_of(layer, x).detach()[0]                                # (E, D)
    favourite = p.argmax().item()
    worth = torch.stack([loss(p[0, e].detach() * f[e]) for e in range(E)])
    expected = torch.zeros(E, D, dtype=torch.float64)
    found = torch.zeros_like(expected)
    for e in range(E):
        monkeypatch.setattr(torch, "multinomial", lambda probs, n, e=e: torch.full((1, 1), e))
        for draw, chance in ((0.5, 0.75), (0.9, 0.25)):
            monkeypatch.setattr(torch, "rand_like", lambda t, draw=draw: torch.full_like(t, draw))
            y, routing, _ = layer(x)
            scale = 1 if e == favourite or draw > 0.75 else 1 / 3
            assert_close(routing.gates, p[:, e:e + 1] * scale)
            if e != favourite:
                g, = torch.autograd.grad(loss(y[0]), layer.router.weight)
                found += chance * p[0, e].item() * g
    held = sum(worth[e] * p[0, e] for e in range(E) if e != favourite)  # L(0) = 0
    expected, = torch.autograd.grad(held, layer.router.weight)
    assert_close(found, expected)
    assert expected.abs().max() > 0.1


def test_the_sparse_mixer_draws_in_proportion_to_the_probabilities_and_in_training_alone():
    layer, x = a_layer("sparse mixer"), tokens(1).expand(20_000, D)
    p = layer.router(x[:1]).probs[0]
    share = layer(x)[1].chosen.flatten().bincount(minlength=E) / len(x)
    assert ((share - p).abs() < 5 * (p * (1 - p) / len(x)).sqrt()).all()
    layer.eval()
    plain = layer.router(x)
    assert torch.equal(layer(x)[1].chosen, plain.chosen)
    assert torch.equal(layer(x)[1].gates, plain.gates)


@pytest.mark.parametrize("k", [1, 2])
def test_the_dense_mixer_has_the_oracles_gradient_and_all_else_as_v_moe_has_it(k):
    layer, x, dy = a_layer("dense mixer", k), tokens().requires_grad_(), tokens()
    y, routing, _ = layer(x)
    plain, its, _ = MoE.forward(layer, x, layer.router(x))
    assert torch.equal(y, plain) and torch.equal(routing.gates, its.gates)
    weight, experts = layer.router.weight, list(layer.experts.parameters())
    got, *ours = torch.autograd.grad(y, [weight, *experts], dy)
    assert_close(got, dense_gradient(layer, x.detach(), dy))
    sparse, *theirs = torch.autograd.grad(plain, [weight, *experts], dy)
    assert F.cosine_similarity(got.flatten(), sparse.flatten(), dim=0) < 0.99
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_relu_gates_ask_the_experts_that_are_on_and_no_others():
    layer, x, dy = a_layer("relu"), tokens(), tokens()
    y, routing, _ = layer(x)
    z = routing.logits
    gates = z.clamp(min=0)
    assert_close(y, (gates[..., None] * outputs_of(layer, x)).sum(dim=1))
    assert torch.equal(routing.gates[:, 0], gates.max(dim=1).values)
    dz, = torch.autograd.grad(y, z, dy)
    assert ((dz != 0) == (z > 0)).all() and (z < 0).any() and ((z > 0).sum(dim=1) > 1).any()


def test_the_relu_penalty_by_hand():
    # two tokens; expert 0 is on for both, expert 1 for one: on = 1, 1/2, K = 1, E = 5
    layer = a_layer("relu")
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0], layer.router.weight[1, 1] = 2.0, 3.0
        layer.strength.fill_(0.5)
    layer(torch.eye(D, dtype=torch.float64)[[0, 0]] + torch.tensor([[0.0, 1, 0, 0, 0, 0],
                                                                     [0.0, -1, 0, 0, 0, 0]]))
    assert_close(layer.penalty.item(), 0.5 * 5 * ((1 * 2 + 0.5 * 3) + (1 * 2)) / 2)
    assert_close(layer.strength.item(), 0.5 * 1.2)          # 1.5 of 5 are on, and 1 is wanted


@pytest.mark.parametrize("k", [1, 2])
def test_relu_gates_become_as_sparse_as_they_should(k):
    # a task that wants half of the gates open, against the penalty
    layer, x = a_layer("relu", k), tokens(400)
    wanted = (x @ torch.randn(D, E, dtype=torch.float64)).relu()
    optimizer, shares = torch.optim.SGD([layer.router.weight], lr=0.2), []
    for _ in range(450):
        z = layer(x + 1)[1].logits
        optimizer.zero_grad()
        (layer.penalty + (z.relu() - wanted).square().mean()).backward()
        optimizer.step()
        shares.append((z > 0).double().mean())
    assert shares[0] > k / E + 0.1
    assert torch.stack(shares[-150:]).mean().item() == pytest.approx(k / E, abs=0.02)


# --- fix the routing, sooner or later ---

def test_the_light_router_is_frozen_bit_for_bit_after_a_tenth_of_training():
    job = plan("stable", "--epochs", "5")                   # 4 steps each: 2 steps are stage one
    layer = job.model.blocks[1].mlp
    images, labels = SMALL.normalise(SMALL.train.images[:16]), SMALL.train.fine[:16]
    optimizer = torch.optim.AdamW(job.model.parameters(), lr=0.05)
    seen = []
    for _ in range(6):
        job.model.train()
        terms = remedies.losses(job.cfg, job.model, None, images,
                                F.one_hot(labels, 100).float())
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        output = job.model.eval()(images)
        seen.append((layer.pixels.detach().clone(), layer.place.detach().clone(),
                     output.layers[2].routing.chosen, output.layers[2].h, terms["remedy"].item()))
    assert int(layer.steps) == layer.learning == 2
    assert not torch.equal(seen[0][0], seen[1][0]) and seen[1][4] > 0
    for pixels, place, chosen, _, penalty in seen[2:]:
        assert torch.equal(pixels, seen[1][0]) and torch.equal(place, seen[1][1]) and penalty == 0
        assert torch.equal(chosen, seen[2][2])              # while what the router sees moves on
    assert not torch.allclose(seen[2][3], seen[5][3])


def test_the_light_router_sees_a_patch_and_its_place_and_nothing_else():
    job = plan("stable")
    layer, model = job.model.blocks[0].mlp, job.model.eval()
    torch.nn.init.normal_(layer.pixels)
    torch.nn.init.normal_(layer.place)
    layer.steps.fill_(layer.learning)
    images = torch.randn(2, 3, 32, 32)
    model(images)
    light = layer.patches @ layer.pixels.T + layer.place                # (B, N, E)
    changed = images.clone()
    changed[:, :, :16, :16] += 1                                        # the first patch alone
    chosen = model(changed).layers[1].routing.chosen
    again = layer.patches @ layer.pixels.T + layer.place
    # the class token has the mean of all patches
    assert (light != again).any(dim=2).tolist() == [[True, True, False, False, False]] * 2
    assert_close(layer.patches[:, 0], layer.patches[:, 1:].mean(dim=1))
    assert torch.equal(chosen[:, 0].view(2, 5), again.argmax(dim=2))


def test_in_stage_two_no_loss_moves_a_router_that_chooses_nobody_but_the_tasks():
    job = plan("stable")
    images = SMALL.normalise(SMALL.train.images[:16])
    targets = F.one_hot(SMALL.train.fine[:16], 100).float()
    for layer in (job.model.blocks[b - 1].mlp for b in job.model.moe_blocks):
        torch.nn.init.normal_(layer.router.weight)
    routers = [job.model.blocks[b - 1].mlp.router.weight for b in job.model.moe_blocks]

    def moved_by():
        terms = remedies.losses(job.cfg, job.model.train(), None, images, targets)
        return {name for name, term in terms.items() if term.requires_grad and any(
            g is not None and g.any() for g in torch.autograd.grad(
                term, routers, retain_graph=True, allow_unused=True))}

    assert moved_by() == {"task", "load", "entropy"}
    for layer in (job.model.blocks[b - 1].mlp for b in job.model.moe_blocks):
        layer.steps.fill_(layer.learning)
    assert moved_by() == {"task"}


def test_the_light_router_takes_hardly_a_part_of_the_clip():
    job = plan("stable")
    images = SMALL.normalise(SMALL.train.images[:16])
    terms = remedies.losses(job.cfg, job.model.train(), None, images,
                            F.one_hot(SMALL.train.fine[:16], 100).float())
    sum(terms.values()).backward()
    norms = {light: torch.nn.utils.get_total_norm([
        p.grad for name, p in job.model.named_parameters()
        if p.grad is not None and name.endswith(("pixels", "place")) == light])
        for light in (True, False)}
    assert 0 < norms[True] < 0.1 * norms[False]


def test_grouter_follows_a_trained_router_from_the_first_step_and_never_changes():
    job = plan("grouter")
    layers = [job.model.blocks[b - 1].mlp for b in job.model.moe_blocks]
    before = [(layer.pixels.clone(), layer.place.clone()) for layer in layers]
    assert all(p.any() and q.any() for p, q in before)
    images = SMALL.normalise(SMALL.train.images)
    with torch.no_grad():
        ours, its = ([out.layers[b].routing.chosen.view(64, 5)[:, 1:] for b in (1, 2)]
                     for out in (job.model(images), a_trained_one()(images)))       # of the patches
    for mine, wanted in zip(ours, its, strict=True):
        often = wanted.flatten().bincount(minlength=4).max().item() / 256
        assert (mine == wanted).float().mean().item() > often + 0.1
    train.fit(job, own_losses=remedies.losses)
    for layer, (pixels, place) in zip(layers, before, strict=True):
        assert torch.equal(layer.pixels, pixels) and torch.equal(layer.place, place)
    for other in (a_trained_one(n_experts=8), None):
        with pytest.raises(ValueError, match="needs a trained V-MoE that has this one's tokens"):
            train.plan(train.parse([*BASE, "--out", "other"]),
                       change=remedies.remedy("grouter", other))


def test_a_hash_gives_the_same_expert_on_every_machine():
    assert [hashed(n, 8) for n in range(17)] == [
        0, 4, 1, 6, 3, 0, 5, 2, 7, 4, 1, 6, 3, 0, 5, 2, 7]
    for n_experts in (3, 8, 32):
        shares = torch.tensor([hashed(n, n_experts) for n in range(10_000)]).bincount() / 10_000
        assert (shares - 1 / n_experts).abs().max() < 0.1 / n_experts


@pytest.mark.parametrize("name", ["hash", "random fixed"])
def test_a_floor_has_gates_of_1_and_a_router_that_never_learns(name):
    job = plan(name, "--load_weight", "0", "--entropy_weight", "0")
    before = job.model.blocks[1].mlp.router.weight.clone()
    train.fit(job, own_losses=remedies.losses)
    layer = job.model.blocks[1].mlp
    assert torch.equal(layer.router.weight, before)
    routing = job.model(torch.randn(3, 3, 32, 32)).layers[2].routing
    assert (routing.gates == 1).all()
    if name == "hash":
        assert routing.chosen.view(3, 5).tolist() == [[hashed(n, 4) for n in range(5)]] * 3


def in_block(b, mlp, n_tokens):
    """A job whose model has this MLP in its block b."""
    blocks = [SimpleNamespace(mlp=None)] * (b - 1) + [SimpleNamespace(mlp=mlp)]
    return SimpleNamespace(model=SimpleNamespace(n_tokens=n_tokens, blocks=blocks))


def placed(*words, B=3):
    """(a V-MoE's layer, the same one with these words of a hash, B images of 4 tokens)."""
    moe = MoE(D, H, E, 1).double()
    torch.nn.init.normal_(moe.router.weight)
    job = in_block(2, moe, n_tokens=4)
    return moe, remedies.Placed(moe, job, *words).double(), torch.randn(
        B, 4, D, dtype=torch.float64, requires_grad=True)


def answer_and_gradients(layer, x, dy):
    y = layer(x)[0]
    return y, *torch.autograd.grad((y * dy).sum(), [x, layer.router.weight, layer.experts.w_in],
                                   allow_unused=True)


def test_a_hash_of_which_nothing_is_taken_is_v_moe_to_the_bit_and_of_which_all_is_a_hash():
    moe, layer, x = placed()
    dy = torch.randn_like(x)
    for ours, theirs in zip(answer_and_gradients(layer, x, dy), answer_and_gradients(moe, x, dy),
                            strict=True):
        assert torch.equal(ours, theirs)
    moe, layer, x = placed(*WORDS_OF_HASH)
    _, routing, _ = layer(x)
    assert routing.chosen.view(3, 4).tolist() == 3 * [[hashed(n, E) for n in range(4)]]
    _, to_x, to_router, _ = answer_and_gradients(layer, x, dy)
    f = outputs_of(layer, x.flatten(0, 1))[torch.arange(12), routing.chosen[:, 0]]
    assert_close(to_x, torch.autograd.grad((f.view_as(x) * dy).sum(), x)[0])
    assert to_router is None or not to_router.any()         # it chooses nobody and weighs nobody


def named_in(b, word, training=True, B=64):
    """(B, 17) which of 8 experts a map names for a class token and 4 x 4 patches in block b."""
    moe = MoE(D, H, 8, 1)
    layer = remedies.Placed(moe, in_block(b, moe, 17), *WORDS_OF_HASH, *word).train(training)
    _, routing, _ = layer(torch.randn(B, 17, D))
    assert (routing.gates == 1).all()
    return routing.chosen.view(B, 17)


def test_a_map_gives_each_expert_two_patches_that_lie_side_by_side_or_apart_or_anywhere():
    pairs = {}
    for name, b, *word in (("hash", 2), ("neighbours", 2, "neighbours"),
                           *((f"block {b}", b, "another in each block") for b in (2, 4))):
        found = named_in(b, word)
        assert (found == found[0]).all() and found[0, 0] == 0   # in every image; the class token's
        experts = found[0, 1:].tolist()
        pairs[name] = {tuple(n for n in range(16) if experts[n] == e) for e in range(8)}
    assert pairs["hash"] == {(n, n + 8) for n in range(8)}      # two rows of four below
    assert pairs["neighbours"] == {(n, n + 1) for n in range(0, 16, 2)}
    assert {len(pair) for pair in set().union(*pairs.values())} == {2}
    assert len({frozenset(each) for each in pairs.values()}) == 4


def test_a_coin_is_tossed_for_each_patch_and_step_and_in_evaluation_it_is_as_blind_and_even():
    a, b = named_in(2, ["coin"]), named_in(2, ["coin"])
    assert (a[:, 0] == 0).all()
    assert a[:, 1:].flatten().bincount(minlength=8).min() > 80  # of 1,024, 128 each
    assert 0.05 < (a == b)[:, 1:].float().mean() < 0.2          # 1 in 8 by chance
    found = named_in(2, ["coin"], training=False)
    assert found[:, 0].tolist() == 64 * [0]
    assert found[:, 1:].tolist() == [[(hashed(n, 8) + image) % 8 for n in range(1, 17)]
                                     for image in range(64)]


def test_who_is_told_the_place_begins_as_the_plain_mlp_and_each_place_teaches_its_own_vector():
    mlp, x = MLP(D, H), torch.randn(3, 5, D)
    told = remedies.Told(mlp, in_block(1, mlp, 5))
    assert torch.equal(told(x), mlp(x)) and told.flops(5) == mlp.flops(5)
    told(x)[:, 2].square().sum().backward()
    assert told.place.grad[2].all() and not told.place.grad[[0, 1, 3, 4]].any()
    with torch.no_grad():
        told.place[2] = 1
    assert_close(told(x)[:, 2], mlp(x[:, 2] + 1))


@pytest.mark.parametrize("words", [("class token",), ("patches",), ("class token", "patches")])
def test_a_named_token_goes_where_its_place_says_by_its_routers_gate_and_others_are_routed(words):
    moe, layer, x = placed(*words)
    own = moe.router(x.flatten(0, 1))
    routing = layer(x)[1]
    here = torch.tensor(["class token" in words, *3 * ["patches" in words]]).repeat(3)
    place = torch.tensor([hashed(n, E) for n in range(4)]).repeat(3)
    assert (own.chosen[:, 0] != place)[here].any()
    expected = torch.where(here, place, own.chosen[:, 0])
    assert routing.chosen[:, 0].tolist() == expected.tolist()
    assert torch.equal(routing.gates[:, 0], own.probs[torch.arange(12), expected])
    # dL/dz = q p_c (onehot(c) - p), whoever chose c
    dy = torch.randn_like(x)
    q = (outputs_of(layer, x.flatten(0, 1))[torch.arange(12), expected]
         * dy.flatten(0, 1)).sum(dim=1, keepdim=True)
    dz = q * routing.gates * (F.one_hot(expected, E) - own.probs)
    assert_close(answer_and_gradients(layer, x, dy)[2], dz.T @ x.flatten(0, 1))


def test_a_gate_of_1_has_the_slope_of_log_p_where_the_router_chose_and_none_where_a_place_did():
    _, layer, x = placed("class token", "gate 1")
    y, routing, _ = layer(x)
    assert (routing.gates == 1).all()
    f = outputs_of(layer, x.flatten(0, 1))[torch.arange(12), routing.chosen[:, 0]]
    assert_close(y.flatten(0, 1), f)
    dy = torch.randn_like(x)
    q = (f * dy.flatten(0, 1)).sum(dim=1, keepdim=True)
    dz = q * (F.one_hot(routing.chosen[:, 0], E) - routing.probs)
    dz[::4] = 0                                             # the class tokens
    assert_close(answer_and_gradients(layer, x, dy)[2], dz.T @ x.flatten(0, 1))


# --- couple router and experts by a loss ---

def test_the_coupling_by_hand(monkeypatch):
    # rows r_0 = (1, 0), r_1 = (0, 2); W^0 stretches the axes by (1, 3), W^1 by (2, 1.5):
    # M = |r_i W^j| = [[1, 2], [6, 3]]; relu(2-1) + relu(6-1) for i=0, relu(6-3) + relu(2-3) for 1
    layer = REMEDIES["coupled"](MoE(2, 2, 2, 1).double(), None)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0], [0, 2]]))
        layer.experts.w_in.copy_(torch.stack([torch.diag(torch.tensor(d)) for d in (
            [1.0, 3.0], [2.0, 1.5])]))
    monkeypatch.setattr(torch, "rand_like", lambda t: torch.full_like(t, 0.5))      # no noise
    layer(torch.randn(3, 2, dtype=torch.float64))
    assert_close(layer.penalty.item(), (1 + 5 + 3 + 0) / 4)


def test_the_coupling_is_0_where_every_expert_answers_its_own_row_most_and_noise_stays_near():
    layer = a_layer("coupled")
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E, D))
        layer.experts.w_in.zero_()
        layer.experts.w_in[range(E), range(E)] = 1.0
    layer(tokens())
    assert layer.penalty == 0
    torch.nn.init.normal_(layer.router.weight)
    layer(tokens())
    assert layer.penalty > 0 and all(
        g.any() for g in torch.autograd.grad(layer.penalty, [layer.router.weight,
                                                             layer.experts.w_in]))
    seen = []
    original = torch.einsum
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "einsum", lambda how, a, b: seen.append(a) or original(how, a, b))
        for _ in range(50):
            layer(tokens(1))
    R = layer.router.weight.detach()
    assert len(seen) == 50 and len({tuple(a.flatten().tolist()) for a in seen}) == 50
    for a in seen:
        assert torch.cdist(a.detach(), R).argmin(dim=1).tolist() == list(range(E))


def test_rows_alike_are_penalised_and_orthonormal_ones_are_not():
    layer = a_layer("similar")
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E, D))
    layer(tokens())
    assert layer.penalty == 0
    with torch.no_grad():
        layer.router.weight[1, 0] = 0.5     # |r_1|^2 - 1 = .25, r_0 r_1 = .5 twice
    layer(tokens())
    assert_close(layer.penalty.item(), remedies.SimBal.weight * 1.25)


# --- all of them, in training ---

@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedied_model_begins_as_v_moe_learns_and_resumes_to_the_bit(name, monkeypatch):
    plain = train.build(plan(name, out="plain").cfg, SMALL).state_dict()
    job = plan(name, out="whole")
    assert all(torch.equal(job.model.state_dict()[key], v) for key, v in plain.items())
    whole = train.fit(job, own_losses=remedies.losses)
    assert all((job.model.state_dict()[key] != v).any() for key, v in plain.items()
               if "experts.w" in key)
    stopped, epochs = [], train.one_epoch

    def interrupted(*args):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(1)
        return epochs(*args)

    monkeypatch.setattr(train, "one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.fit(plan(name, out="half"), own_losses=remedies.losses)
    monkeypatch.setattr(train, "one_epoch", epochs)
    again = plan(name, "--resume", out="half")
    assert again.state["epoch"] == 1
    result = train.fit(again, own_losses=remedies.losses)
    for key, v in job.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], v), key
    assert result["test_accuracy"] == whole["test_accuracy"]
    lines = [json.loads(line) for line in Path("half/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all("remedy" in line["terms"] for line in lines)
    json.dumps(closing_look(job, None, None))               # what a row of the study asks


def test_the_dense_mixer_is_its_own_oracle_and_draws_are_averaged():
    job = plan("dense mixer")
    for block in job.model.moe_blocks:
        torch.nn.init.normal_(job.model.blocks[block - 1].mlp.router.weight)
    x, y = SMALL.normalise(SMALL.train.images[:16]), SMALL.train.fine[:16]
    assert oracle_cosine(job.model, x, y, 1) == pytest.approx(1, abs=1e-5)
    drawn = plan("sparse mixer", out="drawn").model.train()
    drawn.load_state_dict(job.model.state_dict())

    def spread(draws):
        return torch.tensor([oracle_cosine(drawn, x, y, 2, draws) for _ in range(20)]).std()

    assert spread(16) < 0.5 * spread(1)


@pytest.mark.parametrize("name", ["loss-free bias", "sparse mixer", "dense mixer", "stable"])
def test_looking_at_a_remedys_gradient_changes_nothing_in_its_training(name):
    found = torch.tensor(measure.cosines(" ".join(BASE), "looked", "data", remedies.remedy(name)))
    assert found.shape == (3, 2)                            # epochs + 1, blocks
    assert ((found - 1).abs() < 1e-4).all() == (name == "dense mixer")
    train.fit(plan(name, out="plain"), own_losses=remedies.losses)
    plain, looked = (torch.load(f"{folder}/checkpoint.pt")["student"]
                     for folder in ("plain", "looked"))
    for key, v in plain.items():
        assert torch.equal(looked[key], v), key


def test_of_a_guided_router_the_tasks_gradient_is_looked_at_and_that_of_all_it_learns_from():
    _, teacher = train.plan(train.parse([*BASE, "--method", "dense", "--moe_blocks", "",
                                         "--out", "teacher"]))
    train.fit(teacher)
    tgr = " ".join([*BASE, "--method", "tgr"])
    found = torch.tensor(measure.cosines(tgr, "looked", "data", dense="teacher/checkpoint.pt"))
    assert found.shape == (2, 3, 2)                         # curves, epochs + 1, blocks
    # before the first step a guided model is V-MoE, and guidance knows nothing of the task
    plain = torch.tensor(measure.cosines(" ".join(BASE), "plain", "data"))
    assert_close(found[0, 0], plain[0])
    assert ((found[1] - found[0]).abs() > 0.01).all()


def test_a_cosine_is_of_the_task_and_of_what_a_router_learns_from_beside_it():
    student, x = a_trained_one(), SMALL.normalise(SMALL.train.images[:16])
    y = SMALL.train.fine[:16]

    def cosine(times):
        return oracle_cosine(student, x, y, 2, also=times and (
            lambda output, block: times * F.cross_entropy(output.logits, y)))

    alone = cosine(0)
    assert alone == pytest.approx(cosine(2)) == pytest.approx(-cosine(-2)) and abs(alone) < 0.99

    def to_expert_0_of_its_block(output, block):
        assert block == 2
        return -1e6 * output.layers[block].routing.logits[:, 0].sum()

    assert abs(oracle_cosine(student, x, y, 2, also=to_expert_0_of_its_block) - alone) > 0.01


@pytest.mark.parametrize("name", REMEDIES)
def test_a_routing_that_is_given_is_followed_as_in_v_moe(name):
    job = plan(name)
    layer, x = job.model.blocks[0].mlp, torch.randn(3, 5, 16)
    routing = MoE.forward(layer, x)[1]
    forced = routing._replace(chosen=(routing.chosen + 1) % 4, gates=routing.gates + 0.5)
    assert torch.equal(layer(x, forced)[0], MoE.forward(layer, x, forced)[0])


@pytest.mark.parametrize("name", [name for name in REMEDIES if name not in SEVERAL])
def test_who_is_sent_where_it_goes_anyway_gets_the_same_answer(name):
    job = plan(name)
    model, images = job.model.eval(), torch.randn(3, 3, 32, 32)
    for block in model.blocks:
        if name == "default outputs":
            block.mlp.mean.normal_()
        elif name == "loss-free bias":
            block.mlp.bias.normal_()
    with torch.no_grad():
        plain = model(images)
        again = model(images, {b: plain.layers[b].routing for b in model.moe_blocks})
    assert torch.equal(plain.logits, again.logits) and plain.logits.std() > 0


def test_what_a_remedy_cannot_do_it_says():
    for flags, sentence in ((["--gate", "sigmoid"], "leave --gate"),
                            (["--noise", "1"], "leave --gate, --noise and"),
                            (["--capacity_factor", "1"], "leave --gate, --noise and --capacity"),
                            (["--method", "mode", "--k", "2"], "ReMoE has no K outputs of a tok")):
        with pytest.raises(ValueError, match=sentence):
            plan("relu", *flags)
    with pytest.raises(ValueError, match="ExpertChoice has no K outputs"):
        plan("expert choice", "--method", "mode", "--k", "2")
    for name in ("sparse mixer", "hash"):
        with pytest.raises(ValueError, match="--k cannot be 2, give 1"):
            plan(name, "--k", "2")
    with pytest.raises(ValueError, match="place cannot be had of a hash: choose from class token"):
        placed("place")


@pytest.mark.parametrize("name", ["dense mixer", "relu", "coupled", "similar", "stable"])
def test_what_a_router_learns_of_a_remedy_is_not_rounded_to_bfloat16(name):
    job = plan(name, "--epochs", "5")                      # "stable" learns for 2 steps
    layer = job.model.blocks[0].mlp
    torch.nn.init.normal_(layer.router.weight)
    torch.nn.init.zeros_(layer.experts.w_out)               # each expert says, whatever it sees,
    layer.experts.b_out.data = torch.randn(4, 16).bfloat16().float()    # what bfloat16 can hold
    if name == "stable":
        torch.nn.init.normal_(layer.pixels)
        layer.look(job.model, (torch.randn(3, 3, 32, 32),))
    x, dy = torch.randn(3, 5, 16), torch.randn(3, 5, 16).bfloat16().float()
    found = []
    for rounding in (False, True):
        torch.manual_seed(4)                                # of the noise in "coupled"
        with torch.autocast("cpu", torch.bfloat16, rounding):
            y, *_ = layer(x)
        by_task = name in ("dense mixer", "relu")
        loss = (y * dy).sum() if by_task else layer.penalty
        asked = layer.pixels if name == "stable" else layer.router.weight
        found.append(torch.autograd.grad(loss, asked)[0])
    assert found[0].abs().max() > 1e-3
    assert_close(found[1], found[0])


def test_a_run_that_a_gpu_made_by_the_fused_rung_is_measured_on_a_cpu(monkeypatch):
    train.main([*BASE, "--out", "run"])
    result = json.loads(Path("run/result.json").read_text())
    result["config"] |= {"backend": "fused", "device": "cuda"}
    Path("run/result.json").write_text(json.dumps(result))
    monkeypatch.setattr(measure.data, "load", lambda *_: SMALL)
    _, cfg, _, vit = measure.ended(Path("run"), "data")
    assert (cfg.device, vit.blocks[0].mlp.backend) == ("cpu", "auto")
    assert vit(SMALL.normalise(SMALL.test.images[:2])).layers[1].raw.shape == (10, 1, 16)


def test_a_lone_expert_is_coupled_to_nobody_and_is_worth_nothing_more_than_itself():
    moe = MoE(D, H, 1, 1)
    layer = REMEDIES["coupled"](moe, None)
    y, *_ = layer(torch.randn(T, D))
    assert layer.penalty == 0 and y.isfinite().all()
    assert not ideas.worth(moe, torch.randn(T, D), torch.randn(T, D)).any()
    z = torch.zeros(T, 1, requires_grad=True)
    assert ideas.while_unsure(torch.zeros(T, 1), z) == 0


def test_a_penalty_is_of_the_last_forward_pass_and_no_copy_has_a_part_in_its_graph():
    for name in ("similar", "relu"):
        layer, x = a_layer(name), tokens()
        _, routing, _ = layer(x)
        assert layer.penalty.requires_grad and layer.penalty > 0
        twin = copy.deepcopy(layer)
        assert twin.penalty == 0 < layer.penalty and torch.equal(twin(x)[0], layer(x)[0])
        layer(x, routing)                                   # whoever is told where to go pays none
        assert layer.penalty == 0


def test_dense_work_is_counted():
    plain, dense = plan("hash").model.flops(), plan("dense mixer", out="b").model.flops()
    H, per_layer = 32, 2 * 5 * 16 * 4 + 4 * 5 * 16 * 32     # the router's, one expert's
    assert plan("hash", out="c").model.blocks[0].mlp.experts.w_in.shape[2] == H
    assert dense - plain == 2 * 3 * 4 * 5 * 16 * 32 and plain > 2 * per_layer
    assert plan("relu", out="d").model.flops() == dense
