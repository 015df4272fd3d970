"""controls.py -- if guidance helps, what did it guide?

Each control takes one explanation away. It is what an arm does that no flag of train.py says: one
of LOSSES replaces train.losses, one of SETUPS changes job and guide before the first step. Guided
features alone are no arm, because they were thought of after the study's first rows: measure.py
trains them. "ours" marks what no paper defines.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F

import train
from moe import check_blocks, routers
from teacher import guidance_loss, teacher_router_losses


def router(student, block):
    check_blocks("block", [block], routers(student))
    return student.blocks[block - 1].mlp.router


def ask_again(student, output, change):
    """`output` with every routing made anew from change(h). The KL alone reads these routings."""
    return output._replace(layers={
        b: layer if layer.routing is None else layer._replace(
            routing=router(student, b)(change(layer.h)))
        for b, layer in output.layers.items()})


def guide_the_router_alone(cfg, student, guide, images, targets):
    """TGR with the KL stopped at the router's input: it trains nothing but the router's weight."""
    with train.autocast(cfg, images):
        output = ask_again(student, student(images), torch.Tensor.detach)
        return train.objective(cfg, output, targets, guide(images) if guide else None)


def guide_the_features_alone(cfg, student, guide, images, targets):
    """TGR's KL on linear heads that look at h like a router and dispatch nothing (ours).

    The KL reaches the backbone as in TGR. The student's own router, where it has one, learns as in
    V-MoE.
    """
    with train.autocast(cfg, images):
        output, asked = student(images), guide(images)
        terms = train.objective(cfg, output, targets)
        load, entropy = teacher_router_losses(asked)
        kl = sum(guidance_loss(z, student.heads[str(b)](output.layers[b].h).logits)
                 for b, z in asked.items())
    return terms | {"teacher_load": cfg.load_weight * load,
                    "teacher_entropy": cfg.entropy_weight * entropy,
                    "guidance": cfg.guide_weight / len(asked) * kl}


def learn_the_teachers_logits(cfg, student, guide, images, targets, temperature=3.0):
    """L + KL(softmax(t / 3) || softmax(s / 3)), mean over images: a teacher's plain information.

    DeiT's soft distillation 0.9 L_task + 0.1 tau^2 KL with its own tau = 3 (arXiv:2012.12877,
    eq. 2), divided by 0.9, which makes the KL's weight exactly 1. The weight is published, so it is
    not tuned here.
    """
    with train.autocast(cfg, images):
        output = student(images)
        with torch.no_grad():
            taught = guide.teacher(images).logits
        terms = train.objective(cfg, output, targets)
    wide = torch.promote_types(taught.dtype, torch.float32)
    s, t = ((z.to(wide) / temperature).log_softmax(dim=1) for z in (output.logits, taught))
    return terms | {"logits": F.kl_div(s, t, reduction="batchmean", log_target=True)}


def dispatch(student, targets):
    """Routings {block: Routing} that obey the teacher routers' logits {block: (T, E)}."""
    return {b: router(student, b).route(z.detach()) for b, z in targets.items()}


def follow_the_teacher(cfg, student, guide, images, targets):
    """Oracle dispatch: teacher routers send the tokens, the KL teaches the student's to follow."""
    with train.autocast(cfg, images):
        asked = guide(images)
        output = student(images, dispatch(student, asked))
        return train.objective(cfg, ask_again(student, output, lambda h: h), targets, asked)


def detach_gates(job, guide):
    """Distil only: the task loss sees the gates as constants, so the KL alone trains a router."""
    for b in job.model.moe_blocks:
        router(job.model, b).register_forward_hook(
            lambda module, inputs, routing: routing._replace(gates=routing.gates.detach()))


def untrained_teacher(job, guide):
    """A teacher with first weights of a seed of its own: its features hold no knowledge."""
    cfg = replace(job.cfg, method="dense", moe_blocks="", seed=1001)
    guide.teacher = train.build(cfg, job.data).requires_grad_(False).eval()


def last_layer(job, guide):
    """Every block is guided by the features of the teacher's last block."""
    guide.blocks = dict.fromkeys(guide.blocks, len(guide.teacher.dims))


@torch.no_grad()
def freeze_routers(job, guide, directions):
    """Give each teacher router fixed weights: directions(features (T, D), E) -> unit rows (E, D).

    The features are those of the first 1,000 training images. Rows of length sqrt(D) make targets
    as confident as trained teacher routers are (ours).
    """
    cfg, data, sets = job.cfg, job.data, job.sets
    features = guide.features(data.normalise(sets.train[0][:1_000]))
    for b, h in features.items():
        rows = directions(h.float().cpu(), cfg.n_experts)               # (E, D)
        guide.routers[str(b)].weight.copy_(rows * rows.shape[1] ** 0.5)
    guide.routers.requires_grad_(False)


def random_directions(h, E):
    """Random unit rows (E, D) that do not see the mean of h (T, D).

    What all tokens share would send every token to the same expert.
    """
    rows = torch.randn(E, h.shape[1], generator=torch.Generator().manual_seed(0))
    common = F.normalize(h.mean(dim=0), dim=0)
    return F.normalize(rows - (rows @ common)[:, None] * common, dim=1)


def centroids(h, E, steps=25):
    """Spherical k-means of features (T, D): E unit centroids, nearest by cosine.

    The nearest by distance would need a bias of |c|^2 / 2, and a teacher router has no bias. Among
    unit centroids the one with the largest dot product is the nearest on the sphere, whatever |h|.
    """
    if not 1 <= E <= len(h):
        raise ValueError(f"{len(h)} features have no {E} centroids: choose 1 to {len(h)}")
    h = F.normalize(h, dim=1)
    c = h[torch.randperm(len(h), generator=torch.Generator().manual_seed(0))[:E]]
    for _ in range(steps):
        sums = torch.zeros_like(c).index_add_(0, (h @ c.T).argmax(dim=1), h)
        c = torch.where(sums.any(dim=1, keepdim=True), F.normalize(sums, dim=1), c)
    return c


LOSSES = {"router alone": guide_the_router_alone, "logits": learn_the_teachers_logits,
          "oracle": follow_the_teacher}
SETUPS = {"distil only": detach_gates, "random teacher": untrained_teacher,
          "last layer": last_layer,
          "random router": lambda job, guide: freeze_routers(job, guide, random_directions),
          "k-means": lambda job, guide: freeze_routers(job, guide, centroids)}
