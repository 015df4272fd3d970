"""Tests of notebooks/ideas.py: each idea guides the routers, and whom it says, and nothing else."""
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import train
from data import synthetic
from moe import MoE, routers
from notebooks import controls, ideas, study
from notebooks.decided import ARMS, BEST_ARM, BEST_IDEA, GRIDS, HYPOTHESES, IDEAS
from teacher import guidance_loss

T, E = 26, 5
SMALL = synthetic(seed=6, n_train=64, n_test=40)
BASE = ("--epochs 1 --batch_size 16 --dim 16 --depth 2 --heads 2 --patch 16 --moe_blocks 1,2 "
        "--n_experts 4 --probe_images 8 --train_images 0 --device cpu --out unused")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", lambda *_, **__: SMALL)
    torch.manual_seed(2)


def two_logits():
    return (2 * torch.randn(T, E, dtype=torch.float64),
            2 * torch.randn(T, E, dtype=torch.float64).requires_grad_())


def pushed(divergence, t, z):
    """What a divergence does to the student's logits, times T."""
    return T * torch.autograd.grad(divergence(t, z), z)[0]


# --- the three divergences ---

def test_experts_that_are_not_among_a_routers_favourites_are_left_alone_by_a_teacher():
    t, z = two_logits()
    push, own = pushed(ideas.near_the_top, t, z), z.topk(3, dim=1).indices
    far = torch.ones_like(z, dtype=torch.bool).scatter(1, own, False)
    assert not push[far].any() and (push.gather(1, own) != 0).all()
    # among the three it is the KL of three experts
    for i in range(T):
        p, q = (v[i, own[i]].softmax(dim=0) for v in (z, t))
        assert_close(push[i, own[i]], p - q)
    assert_close(ideas.near_the_top(t, z, n=E), guidance_loss(t, z))
    assert_close(ideas.near_the_top(t, z, n=E + 4), guidance_loss(t, z))


def test_guidance_fades_as_a_router_makes_up_its_mind():
    t, z = two_logits()
    p, q = z.softmax(dim=1), t.softmax(dim=1)
    unsure = torch.distributions.Categorical(probs=p).entropy() / torch.tensor(E).log()
    assert_close(pushed(ideas.while_unsure, t, z), (unsure[:, None] * (p - q)).detach())
    even = torch.zeros_like(z, requires_grad=True)
    assert_close(ideas.while_unsure(t, even), guidance_loss(t, even))
    sure = (1e3 * F.one_hot(torch.arange(T) % E, E)).double().requires_grad_()
    assert ideas.while_unsure(t, sure) == 0 == pushed(ideas.while_unsure, t, sure).abs().max()


def test_evened_targets_are_shared_out_evenly_and_an_even_teacher_is_left_as_it_is():
    t, z = two_logits()
    t = t + torch.tensor([4.0, 2.0, 0.0, 0.0, -2.0])        # a teacher with a favourite
    target = z.softmax(dim=1) - pushed(ideas.evened, t, z)
    assert_close(target.sum(dim=1), torch.ones(T, dtype=torch.float64))
    assert t.softmax(dim=1).sum(dim=0).max() > 2 * T / E
    assert ((target.sum(dim=0) * E / T - 1).abs() < 0.02).all()
    # it is the teacher's own table, rows and columns rescaled: cross-ratios stay
    def cross(log_q):
        return log_q[:-1, :-1] + log_q[1:, 1:] - log_q[1:, :-1] - log_q[:-1, 1:]
    assert_close(cross(target.log()), cross(t))
    even = torch.eye(E, dtype=torch.float64).repeat(3, 1) * 3           # every expert three times
    z = torch.zeros(3 * E, E, dtype=torch.float64)
    assert_close(ideas.evened(even, z), guidance_loss(even, z))


# --- the losses ---

def prepared(name):
    """(job, guide, the idea's terms of a batch, the batch) for a student with opinions."""
    flags = ARMS[IDEAS[name]].flags
    _, job = train.plan(train.parse(f"{flags} {BASE}".replace("tgr", "moe").split()))
    job.cfg.method = "tgr" if "tgr" in flags else "moe"
    for router in routers(job.model).values():
        torch.nn.init.normal_(router.weight)
    guide = None
    if job.cfg.method == "tgr":
        words = f"--method dense --seed 1 {BASE} --moe_blocks=".split()
        dense = job._replace(state=None,
                             model=train.build(train.resolve(train.parse(words)), SMALL))
        guide = controls.guide_by("dense", job, dense)
        for router in guide.routers.values():
            torch.nn.init.normal_(router.weight)
    x, y = SMALL.normalise(SMALL.train.images[:12]), F.one_hot(SMALL.train.fine[:12], 100).float()
    return job, guide, ideas.IDEAS[name], (x, y)


@pytest.mark.parametrize("name", IDEAS)
def test_an_idea_reaches_every_router_and_no_feature_expert_or_teacher(name):
    job, guide, losses, batch = prepared(name)
    terms = losses(job.cfg, job.model, guide, *batch)
    named = [*job.model.named_parameters(), *(guide.named_parameters() if guide else ())]
    named = [(n, p) for n, p in named if p.requires_grad]
    grads = torch.autograd.grad(terms["guidance"], [p for _, p in named], allow_unused=True)
    reached = {n for (n, _), grad in zip(named, grads, strict=True)
               if grad is not None and grad.any()}
    assert reached == {f"blocks.{b - 1}.mlp.router.weight" for b in (1, 2)}


@pytest.mark.parametrize("name", IDEAS)
def test_beside_its_guidance_an_idea_minimises_what_its_method_does(name):
    job, guide, losses, batch = prepared(name)
    terms = losses(job.cfg, job.model, guide, *batch)
    plain = train.losses(job.cfg, job.model, guide, *batch)
    assert terms.keys() == plain.keys() | {"guidance"}
    for term in terms.keys() - {"guidance"}:
        assert_close(terms[term], plain[term])
    if guide:                                               # after --guide_until only the task
        assert losses(job.cfg, job.model, None, *batch).keys() == {"task"}
    assert not job.model.blocks[0].mlp._forward_hooks


@pytest.mark.parametrize("name", ["near the top", "while unsure", "evened"])
def test_the_guidance_is_the_weighted_mean_of_the_blocks(name):
    job, guide, losses, batch = prepared(name)
    divergence = getattr(ideas, name.replace(" ", "_"))
    output, asked = job.model(batch[0]), guide(batch[0])
    each = [divergence(asked[b], output.layers[b].routing.logits) for b in (1, 2)]
    assert job.cfg.guide_weight == 5 and each[0] != each[1]
    assert_close(losses(job.cfg, job.model, guide, *batch)["guidance"], 5 * sum(each) / 2)


def test_an_expert_is_worth_what_a_little_more_of_it_takes_off_the_loss():
    job, _, losses, (x, y) = prepared("by value")
    vit = job.model
    # more of expert e, for every token of block 1: its output is added, times c
    moe, c = vit.blocks[0].mlp, torch.zeros(12 * vit.n_tokens, 4, requires_grad=True)

    def more(module, inputs, out):
        h = inputs[0].flatten(0, 1)
        f = moe.experts.batched(h.expand(4, *h.shape)).detach()
        return (out[0] + torch.einsum("te,etd->td", c, f).view_as(out[0]), *out[1:])

    hook = moe.register_forward_hook(more)
    loss = F.cross_entropy(vit(x).logits, y, label_smoothing=job.cfg.label_smoothing)
    q, = torch.autograd.grad(loss, c)
    hook.remove()
    seen = []
    real = ideas.worth
    ideas.worth = lambda *args: seen.append(real(*args)) or seen[-1]
    try:
        losses(job.cfg, vit, None, x, y)
    finally:
        ideas.worth = real
    centred = q - q.mean(dim=1, keepdim=True)
    assert_close(seen[0], -centred / q.std(dim=1, keepdim=True), atol=1e-3, rtol=1e-3)
    assert_close(seen[0].std(dim=1), torch.ones(len(q)), atol=1e-3, rtol=1e-3)


def test_what_an_expert_is_worth_is_not_rounded_to_bfloat16():
    moe = MoE(16, 8, 4)
    torch.nn.init.zeros_(moe.experts.w_out)                 # each expert says, whatever it sees,
    moe.experts.b_out.data = torch.randn(4, 16).bfloat16().float()      # what bfloat16 can hold
    h, slope = torch.randn(7, 16), torch.randn(7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ideas.worth(moe, h, slope)
    assert_close(rounded, ideas.worth(moe, h, slope))


def test_where_all_experts_are_worth_the_same_none_is_preferred():
    moe = prepared("by value")[0].model.blocks[0].mlp
    assert not ideas.worth(moe, torch.randn(7, 16), torch.zeros(7, 16)).any()


def test_tokens_whose_output_nobody_reads_are_told_nothing():
    # in the last block these are all patches
    job, _, losses, (x, y) = prepared("by value")
    output = job.model(x)
    seen, real = [], ideas.guidance_loss
    ideas.guidance_loss = lambda t, z: seen.append((t, z)) or real(t, z)
    try:
        found = losses(job.cfg, job.model, None, x, y)["guidance"]
    finally:
        ideas.guidance_loss = real
    (t, z), (last, its) = seen
    assert len(t) == len(z) == 12 * 5 and len(last) == len(its) == 12
    assert_close(its, output.layers[2].routing.logits.view(12, 5, 4)[:, 0])
    assert_close(last.std(dim=1), torch.ones(12), atol=1e-3, rtol=1e-3)
    assert_close(found, (real(t, z) + real(last, its)) / 2)


def test_an_idea_is_an_arm_that_the_study_trains_on_validation_images():
    for name, arm in IDEAS.items():
        cfg = train.resolve(train.parse(f"{study.flags_of(arm, 'cpu')} {BASE}".split()))
        assert cfg.split == "val" and ARMS[arm].control == name
        assert (cfg.method, cfg.guide_weight) == (("moe", 1) if name == "by value" else ("tgr", 5))


def test_the_idea_that_was_best_on_validation_images_is_tried_again_on_the_test_images():
    rows, block = study.rows_of("ideas", "cpu"), Counter()
    for row in rows:
        block[row["arm"]] += row["val_accuracy"]
        assert row["test_accuracy"] is None
    assert Counter(row["seed"] for row in rows) == dict.fromkeys((100, 101, 102), 7)
    assert max(IDEAS, key=lambda name: block[IDEAS[name]]) == BEST_IDEA
    arm, screened = ARMS[BEST_ARM], ARMS[IDEAS[BEST_IDEA]]
    assert arm == screened._replace(flags=screened.flags.removesuffix(" --split val"))
    assert "split" not in arm.flags and GRIDS["routing"].arms[BEST_ARM] == "moe-k1"
    asked = {h.minus for h in HYPOTHESES if h.plus == (BEST_ARM,)}
    assert asked == {("moe-k1",), ("moe-k1-no-aux",), ("tgr-k1-router-alone",)}
