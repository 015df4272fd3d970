"""Tests of moe.py: what a sparse Vision Transformer computes, and what it must not change.

Letters as in router.py: B images, N tokens per image, T = B*N, D width, H hidden, E experts, K.
"""
import doctest
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import moe
from moe import MLP, Attention, Block, Experts, MoE, SoftMoE, ViT, upcycle
from notebooks import contenders
from router import Routing

B, N, D, H, E, K = 3, 13, 20, 45, 5, 2
T = B * N


def excite(module, gain=20.0):
    """Scale up the router's start, so that its gates are far from equal; then float64."""
    for name, p in module.named_parameters():
        if name.endswith("router.weight"):
            p.data.mul_(gain)
        elif name.split(".")[-1] in ("b_in", "b_out", "bias"):
            p.data.normal_()                    # a bias of 0 hides whose bias it is
    return module.double()


def a_moe(k=K, **options):
    return excite(MoE(D, H, E, k, **options))


def mlp_of(experts, e):
    """Expert e as a function, written out."""
    return lambda x: (F.gelu(x @ experts.w_in[e] + experts.b_in[e]) @ experts.w_out[e]
                      + experts.b_out[e])


def a_vit(make_sparse=None, moe_blocks=(), seed=0, **changes):
    """24 wide, 4 blocks, 17 tokens for an image of 32x32."""
    torch.manual_seed(seed)
    sizes = dict(dim=24, depth=4, heads=3, hidden=40, patch=8, n_classes=11) | changes
    return ViT(**sizes, moe_blocks=moe_blocks, make_sparse=make_sparse)


def a_sparse_vit(k=K, n_experts=E, hidden=36, seed=0, **changes):
    return a_vit(lambda: MoE(24, hidden, n_experts, k), (2, 4), seed, **changes)


def some_images(n=B):
    return torch.randn(n, 3, 32, 32)


def test_the_docstring_examples_are_true():
    failed, attempted = doctest.testmod(moe)
    assert failed == 0 and attempted == 6


# --- a mixture of experts ---

def test_one_expert_is_a_plain_mlp():
    # to the last bit on the machine of its author; 1e-13 leaves room for another's BLAS
    mlp, layer = excite(MLP(D, H)), MoE(D, H, 1, k=1).double()
    layer.experts.copy_mlp(mlp)
    x, dy = torch.randn(2, B, N, D, dtype=torch.float64)
    y, plain = layer(x)[0], mlp(x)
    ours = torch.autograd.grad(y, tuple(layer.experts.parameters()), dy)
    w_in, b_in, w_out, b_out = torch.autograd.grad(plain, tuple(mlp.parameters()), dy)
    for a, b in zip((y, *ours), (plain, w_in.T[None], b_in[None], w_out.T[None], b_out[None]),
                    strict=True):
        assert_close(a, b, rtol=0, atol=1e-13)


def test_one_expert_is_the_plain_mlp_of_the_same_products_bit_for_bit():
    layer, x = MoE(D, H, 1, k=1), torch.randn(B * N, D)
    w_in, b_in, w_out, b_out = (w[0] for w in layer.experts.parameters())
    plain = torch.addmm(b_out, nn.functional.gelu(torch.addmm(b_in, x, w_in)), w_out)
    assert torch.equal(layer(x)[0], plain)


def test_an_mlp_is_two_linear_layers_around_a_gelu():
    mlp, x = MLP(D, H).double(), torch.randn(B, N, D, dtype=torch.float64)
    expected = nn.Sequential(mlp.fc_in, nn.GELU(), mlp.fc_out)(x)
    assert_close(mlp(x), expected)


def test_every_expert_starts_as_an_mlp_of_its_sizes_does():
    bound = math.sqrt(6 / (D + H))              # xavier, whatever the number of experts
    experts, mlp = Experts(D, H, 16), MLP(D, H)
    for w in (*experts.w_in, *experts.w_out, mlp.fc_in.weight, mlp.fc_out.weight):
        assert 0.97 * bound < w.abs().max() <= bound
    assert not experts.b_in.any() and not experts.b_out.any() and not mlp.fc_in.bias.any()


@pytest.mark.parametrize("gate", ["softmax_topk", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 3, E])
@pytest.mark.filterwarnings("ignore:topk_softmax")
def test_a_token_gets_the_gated_sum_of_its_experts_one_token_at_a_time(k, gate):
    layer, x = a_moe(k, gate=gate, keep_raw=True), torch.randn(B, N, D, dtype=torch.float64)
    y, routing, raw = layer(x)
    for t in range(T):
        outputs = [mlp_of(layer.experts, e)(x[t // N, t % N]) for e in routing.chosen[t]]
        assert_close(raw[t], torch.stack(outputs))
        assert_close(y[t // N, t % N], sum(g * f for g, f in zip(routing.gates[t], outputs,
                                                                  strict=True)))


def test_the_shape_of_a_batch_is_only_a_way_to_write_its_tokens():
    layer, x = a_moe(), torch.randn(B, N, D, dtype=torch.float64)
    y, _, raw = layer(x)
    assert raw is None and y.shape == x.shape
    assert_close(layer(x.view(T, D))[0], y.view(T, D))
    assert_close(layer(x[1])[0], y[1])                         # dropless: an image stands alone
    assert_close(layer(x.transpose(0, 1))[0], y.transpose(0, 1))


def test_a_given_routing_is_followed():
    layer, x = a_moe(), torch.randn(T, D, dtype=torch.float64)
    for e in range(E):
        forced = Routing(torch.full((T, 1), e), torch.ones(T, 1), None, None)
        y, routing, _ = layer(x, forced)
        assert routing is forced
        assert_close(y, mlp_of(layer.experts, e)(x))


def test_a_dropped_token_adds_nothing():
    layer = a_moe(k=1, capacity_factor=0.5)
    x = torch.randn(T, D, dtype=torch.float64).requires_grad_()
    y, routing, _ = layer(x)
    dropped = (routing.gates == 0).flatten()
    y.sum().backward()
    assert 0 < dropped.sum() == routing.dropped < T
    assert not y[dropped].any() and not x.grad[dropped].any()
    assert y[~dropped].all() and x.grad[~dropped].any(dim=1).all()


def test_an_expert_without_a_served_token_gets_exactly_no_gradient():
    # expert 2 is visited by nobody, expert 4 by a token that was too late (gate 0)
    layer, x = a_moe(), torch.randn(T, D, dtype=torch.float64)
    experts, gates = torch.tensor([[0, 1]]).repeat(T, 1), torch.rand(T, 2) + 0.1
    experts[3], gates[3, 1] = torch.tensor([3, 4]), 0.0
    layer(x, Routing(experts, gates, None, None))[0].square().sum().backward()
    for p in layer.experts.parameters():
        assert [bool(g.any()) for g in p.grad] == [True, True, False, True, False]


def test_an_unselected_experts_weights_never_reach_the_router():
    # 2 tokens with one expert each: at least 3 of the 5 experts are visited by nobody
    layer, x = a_moe(k=1), torch.randn(2, D, dtype=torch.float64)
    y, routing, _ = layer(x)
    y.square().sum().backward()
    other = deepcopy(layer)
    for p in other.experts.parameters():
        p.data[[e for e in range(E) if e not in routing.chosen]] = 1e3
    other.router.weight.grad = None
    other(x)[0].square().sum().backward()
    assert torch.equal(other.router.weight.grad, layer.router.weight.grad)
    assert layer.router.weight.grad.abs().min() > 0          # yet every row hears something


def test_bfloat16_autocast_runs_the_experts_in_bfloat16_and_stays_close():
    layer, x = a_moe(keep_raw=True).float(), torch.randn(B, N, D)
    y, routing, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, same, raw = layer(x)
    assert rounded.dtype == raw.dtype == torch.bfloat16
    assert torch.equal(same.chosen, routing.chosen) and torch.equal(same.gates, routing.gates)
    assert (rounded - y).norm() < 0.01 * y.norm()
    rounded.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_reached_every_operand_when_the_kernels_see_it(dtype, monkeypatch):
    seen = []

    def expert_mlp(x, chosen, gates, *weights):
        seen.extend(v.dtype for v in (x, *weights[:4]))
        return x

    monkeypatch.setattr(moe, "expert_mlp", expert_mlp)
    with torch.autocast("cpu", dtype):
        a_moe().float()(torch.randn(T, D))
    assert seen == [dtype] * 5


# --- soft slots ---

def soft_moe_by_loops(layer, x):
    y = torch.zeros_like(x)
    phi = [layer.scale * c / c.norm() for c in layer.phi.T]                 # one (D,) per slot
    for image, tokens in enumerate(x):
        score = torch.stack([torch.stack([(t / t.norm()) @ c for c in phi]) for t in tokens])
        for slot in range(len(phi)):
            mixed = score[:, slot].softmax(0) @ tokens                      # over tokens
            out = mlp_of(layer.experts, slot // layer.slots)(mixed)
            for token in range(len(tokens)):
                y[image, token] = y[image, token] + score[token].softmax(0)[slot] * out
    return y


def test_soft_moe_is_what_its_explicit_loop_over_slots_computes():
    layer = excite(SoftMoE(D, H, 4, n_tokens=6))
    layer.scale.data.fill_(3.0)
    x = torch.randn(2, 6, D, dtype=torch.float64)
    dy, results = torch.randn_like(x), []
    for f in (layer, lambda x: soft_moe_by_loops(layer, x)):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        results.append([y, *torch.autograd.grad(y, (leaf, *layer.parameters()), dy)])
    for ours, loops in zip(*results, strict=True):
        assert_close(ours, loops)


def test_soft_moe_has_about_as_many_slots_as_tokens():
    for n_tokens, n_experts, slots in ((16, 4, 4), (17, 4, 5), (65, 8, 9), (3, 8, 1)):
        layer = SoftMoE(D, H, n_experts, n_tokens)
        assert layer.slots == slots and layer.phi.shape == (D, n_experts * slots)
        assert layer.phi.norm(dim=0).mean().item() == pytest.approx(1, abs=0.2) and layer.scale == 1


def test_soft_moe_of_equal_experts_and_equal_tokens_is_an_mlp():
    mlp, layer = MLP(D, H), SoftMoE(D, H, E, N)
    layer.experts.copy_mlp(mlp)
    x = torch.randn(B, 1, D).expand(B, N, D)
    assert_close(layer(x), mlp(x))


# --- the Transformer around them ---

def test_attention_is_the_attention_of_torch():
    ours, theirs = Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    x = torch.randn(B, N, 24)
    assert_close(ours(x), theirs(x, x, x)[0])


def test_a_block_adds_attention_and_then_its_mlp_each_of_normalised_tokens():
    block, x = excite(Block(24, 3, MLP(24, H))), torch.randn(B, N, 24, dtype=torch.float64)
    middle = x + block.attn(block.norm1(x))
    y, layer = block(x)
    assert_close(y, middle + block.mlp(block.norm2(middle)))
    assert_close(layer.h, block.norm2(middle).view(T, 24))
    assert layer.routing is layer.raw is None


def test_a_layer_shows_what_its_router_saw():
    vit = a_sparse_vit()
    layers = vit(some_images()).layers
    assert list(layers) == [1, 2, 3, 4]
    assert all(layer.h.shape == (B * vit.n_tokens, 24) for layer in layers.values())
    for number in vit.moe_blocks:
        router = vit.blocks[number - 1].mlp.router
        assert_close(layers[number].routing.logits, layers[number].h @ router.weight.T)
    assert layers[1].routing is layers[3].routing is None


def test_patches_are_read_row_by_row():
    vit, images, seen = a_vit(), some_images(), []
    vit.embed.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    vit(images)
    assert_close(seen[0], F.unfold(images, 8, stride=8).mT)


def test_moving_patches_together_with_their_positions_changes_nothing():
    vit, images = a_vit().double(), some_images().double()
    order = torch.randperm(16)
    moved = F.fold(F.unfold(images, 8, stride=8)[..., order], 32, 8, stride=8)
    logits = vit(images).logits
    assert not torch.allclose(vit(moved).logits, logits)
    vit.pos.data[:, 1:] = vit.pos.data[:, 1:][:, order]
    assert_close(vit(moved).logits, logits)


def test_the_class_token_is_routed_like_any_other_and_alone_reaches_the_head():
    vit, images = a_sparse_vit(), some_images()
    logits, layers = vit(images)
    own = layers[4].routing                                       # the last block
    is_cls = (torch.arange(len(own.chosen)) % vit.n_tokens == 0)[:, None]
    for silent, same in ((~is_cls, True), (is_cls, False)):
        quiet = own._replace(gates=own.gates.masked_fill(silent, 0.0))
        assert torch.allclose(vit(images, {4: quiet}).logits, logits) is same


def test_a_routing_given_to_one_block_leaves_the_other_to_its_own_router():
    vit, images = excite(a_sparse_vit()), some_images().double()
    forced = Routing(torch.full((51, 1), 3), torch.ones(51, 1), None, None)
    free, bound = vit(images).layers, vit(images, {4: forced}).layers
    assert bound[4].routing is forced
    assert torch.equal(bound[2].routing.chosen, free[2].routing.chosen)


def test_shuffling_the_images_shuffles_the_logits():
    vit, images = excite(a_sparse_vit()), some_images(5).double()
    order = torch.randperm(5)
    assert_close(vit(images[order]).logits, vit(images).logits[order])
    assert_close(vit(images[:1]).logits, vit(images).logits[:1])


def test_one_seed_gives_one_trunk_whatever_is_sparse():
    dense, other = a_vit(seed=3).state_dict(), a_vit(seed=4).state_dict()
    soft = a_vit(lambda: SoftMoE(24, 36, E, 17), (2, 4), seed=3)
    for vit in (a_sparse_vit(seed=3), a_sparse_vit(k=1, n_experts=9, seed=3), soft):
        trunk = {k: v for k, v in vit.state_dict().items() if k in dense}
        assert len(trunk) == len(dense) - 2 * 4              # 2 blocks without their 4 MLP tensors
        assert all(torch.equal(v, dense[k]) for k, v in trunk.items())
    assert not torch.equal(dense["pos"], other["pos"])


def test_a_fresh_vit_is_undecided_between_the_classes():
    logits, _ = a_vit(n_classes=100)(some_images())
    assert logits.std() < 0.3
    assert a_vit().head.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_stochastic_depth_drops_whole_branches_of_images_and_keeps_the_mean():
    # a block whose two branches each add 1 to every number
    block, x = Block(24, 3, MLP(24, H), drop_path=0.3), torch.zeros(20_000, 2, 24)
    for fc in (block.attn.proj, block.mlp.fc_out):
        fc.weight.data.zero_()
        fc.bias.data.fill_(1.0)
    kept = block(x)[0]
    assert_close(kept.unique(), torch.tensor([0.0, 1 / 0.7, 2 / 0.7]))
    assert torch.equal(kept[:, :1, :1].expand_as(x), kept)
    assert kept.mean().item() == pytest.approx(2, abs=0.03)
    assert (block.eval()(x)[0] == 2).all()


def test_stochastic_depth_grows_linearly_and_sleeps_in_evaluation():
    vit, images = a_sparse_vit(drop_path=0.6), some_images()
    assert [b.drop_path for b in vit.blocks] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert not torch.equal(vit(images).logits, vit(images).logits)
    assert torch.equal(vit.eval()(images).logits, a_sparse_vit()(images).logits)
    assert [b.drop_path for b in a_vit(depth=1, drop_path=0.6).blocks] == [0]


def test_bfloat16_autocast_stays_close_on_the_same_routing():
    vit, images = a_sparse_vit(), some_images()
    logits, layers = vit(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = vit(images, {n: layers[n].routing for n in vit.moe_blocks})
    assert 0 < (rounded - logits).norm() < 0.02 * logits.norm()


def test_a_router_that_fails_says_in_which_block():
    vit = a_sparse_vit()
    with pytest.raises(FloatingPointError, match="the router of block 2: the logits of 17 of"):
        vit(some_images().index_fill(0, torch.tensor(1), math.nan))


@pytest.mark.parametrize("changes, sentence", [
    (dict(heads=5), "a width of 24 does not divide into 5 heads: choose --dim as a multiple of"),
    (dict(patch=5), "32x32 pixels do not divide into patches of 5: choose --patch as a divisor"),
    (dict(moe_blocks=(2, 5)), r"cannot be \[2, 5\]: choose from \[1, 2, 3, 4\], each once"),
    (dict(moe_blocks=(0,)), r"cannot be \[0\]: choose from \[1, 2, 3, 4\], each once"),
])
def test_sizes_that_do_not_fit_are_refused_in_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        a_vit(lambda: MoE(24, 36, E), **changes)


# --- what it costs ---

@pytest.mark.parametrize("make", [
    pytest.param(lambda: a_vit(), id="dense"),
    pytest.param(lambda: a_sparse_vit(k=1), id="K = 1"),
    pytest.param(lambda: a_sparse_vit(k=3), id="K = 3"),
    pytest.param(lambda: a_sparse_vit(k=3).double(), id="K = 3, slice by slice"),
    pytest.param(lambda: a_vit(lambda: SoftMoE(24, 36, E, 17), (2, 4)), id="soft"),
    pytest.param(lambda: a_vit(patch=4, n_classes=7), id="another patch"),
])
def test_the_flops_are_those_that_torch_counts(make):
    # exactly; only in its MATH form does the counter see the products of attention on a CPU
    vit = make()
    images = some_images(1).to(next(vit.parameters()).dtype)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        assert vit.flops() == contenders.flops(lambda: vit(images))


def test_the_dense_vit_of_the_tables_has_2_7_million_parameters_and_about_190_mmac():
    vit = ViT(dim=192, depth=9, heads=12, hidden=384, patch=4, n_classes=100)
    assert vit.params()[0] == vit.params()[1] == pytest.approx(2.7e6, rel=0.01)
    assert vit.flops() / 2 == pytest.approx(190e6, rel=0.02)


def test_active_parameters_worked_by_hand():
    # an expert has 24 * 36 + 36 + 36 * 24 + 24 = 1788; 2 blocks in which 5 - 2 = 3 experts idle
    total, active = a_sparse_vit().params()
    assert total - active == 2 * 3 * 1788
    # each MLP of 24 * 40 + 40 + 40 * 24 + 24 = 1984 made room for 5 experts and a router of 5 * 24
    assert total - a_vit().params()[0] == 2 * (5 * 1788 + 120 - 1984)
    assert len(set(a_vit(lambda: SoftMoE(24, 36, E, 17), (2, 4)).params())) == 1


def test_images_that_autocast_casts_may_be_of_half_precision():
    vit, x = a_vit(), some_images(2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vit(x).logits, vit(x.float()).logits)


# --- sparse upcycling ---

@pytest.mark.parametrize("k, gate", [(2, "topk_softmax"), (4, "softmax_topk")])
def test_an_upcycled_vit_computes_what_the_dense_one_does(k, gate):
    dense, images = excite(a_vit(seed=1)), some_images().double()
    sparse = a_vit(lambda: MoE(24, 40, 4, k, gate=gate), (2, 4)).double()
    upcycle(sparse, dense)
    assert_close(sparse(images).logits, dense(images).logits, rtol=1e-5, atol=1e-5)
    assert_close(sparse.blocks[1].mlp.experts.w_in[3].T, dense.blocks[1].mlp.fc_in.weight)


def test_with_unscaled_gates_an_upcycled_block_is_scaled_by_their_sum():
    dense, sparse = excite(a_vit(seed=1)), a_sparse_vit(hidden=40).double()
    upcycle(sparse, dense)
    x = torch.randn(T, 24, dtype=torch.float64)
    y, routing, _ = sparse.blocks[3].mlp(x)
    assert_close(y, routing.gates.sum(1, keepdim=True) * dense.blocks[3].mlp(x))


def test_upcycling_copies_and_shares_nothing():
    dense, sparse = a_vit(seed=1), a_sparse_vit(hidden=40)
    router, before = sparse.blocks[1].mlp.router.weight.clone(), deepcopy(dense.state_dict())
    upcycle(sparse, dense)
    assert torch.equal(sparse.blocks[1].mlp.router.weight, router)     # drawn, not copied
    for p in sparse.parameters():
        p.data.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


@pytest.mark.parametrize("sparse, dense, sentence", [
    ({"hidden": 40}, {"n_classes": 12}, "head.weight must be "),
    ({}, {"depth": 3}, "only one of the two has blocks.3.attn"),
    ({"depth": 5}, {}, "only one of the two has blocks.4.attn"),
    ({}, {"hidden": 16}, "blocks.0.mlp.fc_in.weight must be "),             # of a plain block
    ({"experts": 36}, {}, r"the dense MLP's weight must be \(24, 36\), not \(24, 40\)"),
    # a hidden size of 1 would be spread over all of an expert's
    ({"hidden": 1, "experts": 36}, {"hidden": 1}, r"must be \(24, 36\), not \(24, 1\)"),
    ({}, {"moe_blocks": (2,), "make_sparse": lambda: MoE(24, 40, E)},
     "block 2 of the dense ViT must have an MLP")])
def test_what_cannot_be_upcycled_is_refused_before_anything_is_copied(sparse, dense, sentence):
    sizes = {"hidden": 40, "experts": 40} | sparse
    experts = sizes.pop("experts")
    one = a_vit(lambda: MoE(24, experts, E), moe_blocks=(2, 4), **sizes)
    before = {name: v.clone() for name, v in one.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        upcycle(one, a_vit(**{"hidden": 40} | dense))
    assert all(torch.equal(v, before[name]) for name, v in one.state_dict().items())


def test_no_images_are_mixed_and_have_features_of_no_tokens():
    assert SoftMoE(D, H, E, N)(torch.randn(0, N, D)).shape == (0, N, D)
    features = a_sparse_vit().features(some_images(2)[:0])
    assert {h.shape for h in features.values()} == {(0, 17, 24)} and len(features) == 4


# --- what other tools make of it (the slow ones, last) ---

def test_every_expert_survives_export_whoever_the_example_visited():
    layer = MoE(D, H, E, K, backend="reference").eval()
    example = torch.ones(B, N, D)                             # all its tokens visit the same two
    program = torch.export.export(layer, (example,)).module()
    x = torch.randn(B, N, D)
    assert layer(x)[1].chosen.unique().numel() == E
    assert_close(program(x)[0], layer(x)[0])


@pytest.mark.parametrize("D, H", [(D, H), (24, 48)])         # (24, 48): rows of 16 bytes
def test_a_compiled_mixture_computes_the_same(D, H):
    layer, x = MoE(D, H, E, K), torch.randn(B, N, D)
    assert_close(torch.compile(layer, backend="eager")(x)[0], layer(x)[0])


def test_a_vit_is_exported_for_any_number_of_images():
    vit, batch = a_vit(lambda: MoE(24, 36, E, backend="reference"), (2, 4)).eval(), some_images(4)
    sizes = {"images": {0: torch.export.Dim("B", min=1, max=64)}}
    program = torch.export.export(vit, (batch,), dynamic_shapes=sizes).module()
    for n in (1, 9):
        images = some_images(n)
        assert_close(program(images)[0], vit(images).logits)


# --- beside another library's layer ---

@pytest.mark.parametrize("k", [2, 3])
def test_our_weights_in_mixtrals_layer_give_our_outputs_and_gradients(k):
    """Mixtral's experts have no biases and a second factor: with a 1 at the end of each token, the
    last column of a weight is a bias, the factor is 1, and a hidden unit that never changes carries
    the last bias."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral",
                                  reason="pip install transformers")
    from transformers import MixtralConfig
    ours = excite(MoE(D, H, E, k, gate="topk_softmax"))
    theirs = mixtral.MixtralSparseMoeBlock(MixtralConfig(
        hidden_size=D + 1, intermediate_size=H + 1, num_local_experts=E, num_experts_per_tok=k,
        hidden_act="gelu")).double()
    constant = F.gelu(torch.tensor(2.0, dtype=torch.float64))
    w = ours.experts
    with torch.no_grad():
        for v in theirs.parameters():
            v.zero_()
        theirs.gate.weight[:, :D] = ours.router.weight
        gate, up = theirs.experts.gate_up_proj.chunk(2, dim=1)              # (E, H + 1, D + 1) each
        gate[:, :H, :D], gate[:, :H, D], gate[:, H, D], up[:, :, D] = w.w_in.mT, w.b_in, 2.0, 1.0
        down = theirs.experts.down_proj                                     # (E, D + 1, H + 1)
        down[:, :D, :H], down[:, :D, H] = w.w_out.mT, w.b_out / constant
    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(B, N, D, dtype=torch.float64)
    y = ours(x)[0]
    (y * slope).sum().backward()
    same, x.grad = x.grad, None
    with_one = torch.cat([x, torch.ones(B, N, 1, dtype=torch.float64)], dim=2)
    other = theirs(with_one)
    (other[..., :D] * slope).sum().backward()
    d_gate, d_down = theirs.experts.gate_up_proj.grad[:, :H], theirs.experts.down_proj.grad[:, :D]
    for mine, yours in ((y, other[..., :D]), (same, x.grad),
                        (ours.router.weight.grad, theirs.gate.weight.grad[:, :D]),
                        (w.w_in.grad, d_gate[..., :D].mT), (w.b_in.grad, d_gate[..., D]),
                        (w.w_out.grad, d_down[..., :H].mT),
                        (w.b_out.grad, d_down[..., H] / constant)):
        assert_close(mine, yours, rtol=1e-5, atol=1e-5)     # its softmax is in float32


# --- what is refused ---

def built(**changes):
    return lambda: a_vit(lambda: MoE(24, 36, E), **changes)


def shown(images, routings=None):
    """A ViT with routers in blocks 2 and 4 is shown these."""
    return lambda: a_sparse_vit()(images, routings)


def cast(dtype):
    """A ViT under autocast, which takes care of three dtypes of images and no other."""
    def call():
        with torch.autocast("cpu", torch.bfloat16):
            a_vit()(some_images(2).to(dtype))
    return call


def routed(**changes):
    """Two images are routed by a `Routing` of which some fields are changed."""
    good = dict(chosen=torch.zeros(34, 1, dtype=torch.int64), gates=torch.ones(34, 1))
    return shown(some_images(2), {4: Routing(**good | changes, probs=None, logits=None)})


WHOLE = "must be a whole number of 1 or more, not "
REFUSED = [
    *((built(**{size: n}), f"{size} {WHOLE}{n}") for n in (0, -1, 24.0, None)
      for size in ("dim", "depth", "heads", "hidden", "patch", "n_classes")),
    *((lambda size=size, n=n: MoE(**{"dim": D, "hidden": H, "n_experts": E, size: n}),
       f"{size} {WHOLE}{n}") for n in (0, -1, 2.5) for size in ("dim", "hidden", "n_experts")),
    *((lambda size=size: SoftMoE(**{"dim": D, "hidden": H, "n_experts": E, "n_tokens": N, size: 0}),
       f"{size} {WHOLE}0") for size in ("dim", "hidden", "n_experts", "n_tokens")),
    (built(heads=5), "a width of 24 does not divide into 5 heads"),
    (built(patch=64), "32x32 pixels do not divide into patches of 64"),
    (lambda: a_vit(moe_blocks=(2,)), "moe_blocks needs make_sparse"),
    *((built(moe_blocks=blocks), r"moe_blocks cannot be .*: choose from \[1, 2, 3, 4\], each once")
      for blocks in ((0,), (-1,), (5,), (2, 5), (2, 2), (1.5,), ("2",))),
    *((shown(torch.randn(size)), r"images must be .*3, 32, 32\), not ") for size in (
        (2, 3, 16, 64), (2, 3, 64, 16), (2, 3, 64, 64), (2, 3, 31, 32), (2, 1, 32, 32),
        (2, 4, 32, 32), (2, 32, 32, 3), (3, 32, 32), (2, 3, 1024), (1, 2, 3, 32, 32))),
    *((shown(some_images(2).to(dtype)), f"images must be normalised and torch.float32, not {dtype}")
      for dtype in (torch.uint8, torch.float64, torch.bfloat16, torch.int64)),
    *((shown(some_images(2), dict.fromkeys(blocks)),
       r"routings cannot be .*: choose from \[2, 4\], each once")
      for blocks in ((0,), (1,), (-1,), (5,), (2, 3), ("2",))),
    (routed(chosen=torch.zeros(17, 1, dtype=torch.int64)), r"chosen must be \(34, K\), not \(17"),
    (routed(chosen=torch.full((34, 1), E)), f"chosen must be 0 to {E - 1}, not {E} to {E}"),
    (routed(chosen=torch.full((34, 1), -1)), f"chosen must be 0 to {E - 1}, not -1 to -1"),
    (routed(chosen=torch.zeros(34, 1)), "chosen must be int64, not torch.float32"),
    (routed(gates=torch.ones(34)), r"gates must be \(34, 1\), not \(34,\)"),
    (routed(gates=torch.ones(34, 2)), r"gates must be \(34, 1\), not \(34, 2\)"),
    (lambda: MoE(D, H, E)(torch.randn(B, N, D + 1)), rf"x must be \(any, {D}\), not"),
    (lambda: SoftMoE(D, H, E, N)(torch.randn(B, N, D + 1)), rf"x must be .*{D}\), not"),
    (lambda: SoftMoE(D, H, E, N)(torch.randn(T, D)), r"x must be .*, not"),
    (lambda: Experts(D, H, E).batched(torch.randn(E - 1, T, D)), rf"x must be \({E}, any, {D}\)"),
    (lambda: Experts(D, H, E).batched(torch.randn(T, D)), rf"x must be \({E}, any, {D}\), not"),
    *((built(image_size=n), f"image_size {WHOLE}{n}") for n in (0, -32, 32.0)),
    *((cast(dtype), f"images must be normalised and torch.float32, not {dtype}")
      for dtype in (torch.uint8, torch.int64, torch.float64)),
]


@pytest.mark.parametrize("call, sentence", REFUSED)
def test_what_a_vit_cannot_be_or_be_shown_is_refused_in_a_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()


def test_a_soft_block_has_no_router_that_a_routing_could_replace():
    soft = a_vit(lambda: SoftMoE(24, 36, E, 17), (2,))
    with pytest.raises(ValueError, match=r"routings cannot be \[2\]: choose from \[\], each once"):
        soft(some_images(), {2: None})


# --- other numbers, other transforms ---

@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_in_float64_stays_there(autocast):
    vit, images = a_sparse_vit().double(), some_images().double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, layers = vit(images)
    assert logits.dtype == layers[2].routing.gates.dtype == torch.float64
    assert_close(logits, vit(images).logits, rtol=0, atol=0)


@pytest.mark.parametrize("gate", ["softmax_topk", "topk_softmax", "sigmoid"])
def test_a_mixture_in_float64_has_the_gradients_of_finite_differences(gate):
    layer = excite(MoE(4, 6, 3, 2, gate=gate, keep_raw=True))
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: (layer(x)[0], layer(x)[2]),
                                    (x, *layer.parameters()))


def test_torch_func_takes_every_image_and_its_gradient_at_once():
    vit, images = a_sparse_vit().double(), some_images().double()
    weights = dict(vit.named_parameters())

    def loss(weights, image):
        return torch.func.functional_call(vit, weights, (image[None],)).logits.square().sum()

    assert_close(torch.func.vmap(lambda image: vit(image[None]).logits[0])(images),
                 vit(images).logits)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images)
    for i, image in enumerate(images):
        vit.zero_grad()
        loss(weights, image).backward()
        for name, p in vit.named_parameters():
            assert_close(each[name][i], torch.zeros_like(p) if p.grad is None else p.grad)
