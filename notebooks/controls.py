"""controls.py -- if guidance helps, what did it guide?

Each control takes one explanation away. It is what an arm does that no flag of train.py says: one
of TEACHERS guides it, one of SETUPS changes job and guide before the first step, one of LOSSES
replaces train.losses. "ours" marks what no paper defines.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F

import data
import train
from moe import check_blocks, routers
from notebooks import lite0
from router import TopKRouter
from teacher import teacher_router_losses


def router(student, block):
    check_blocks("block", [block], routers(student))
    return student.blocks[block - 1].mlp.router


# --- by whom? ---

def pretrained(job, dense):
    """EfficientNet-Lite0, which has seen ImageNet and none of our images: its last block that has
    the 4 x 4 patches of `tiny` at 64 pixels guides all blocks."""
    return lite0.teacher(64, (job.data.mean, job.data.std), blocks=[11])


def untrained(job, dense):
    """First weights of a seed of their own: its features hold no knowledge."""
    return train.build(replace(job.cfg, method="dense", moe_blocks="", seed=2_000 + job.cfg.seed),
                       job.data)


def the_dense_one(job, dense):
    return dense


@torch.no_grad()
def freeze_routers(job, guide, directions):
    """Give each teacher router fixed weights: directions(features (T, D), E, seed) -> unit rows
    (E, D).

    The features are those of the first 1,000 training images. Rows of length sqrt(D) make targets
    about as confident as those of trained teacher routers, or more so (ours). No loss evens their
    load, and all blocks share the seed.
    """
    cfg, images, sets = job.cfg, job.data, job.sets
    features = guide.features(images.normalise(sets.train[0][:1_000]))
    for b, h in features.items():
        rows = directions(h.float().cpu(), cfg.n_experts, cfg.seed)     # (E, D)
        guide.routers[str(b)].weight.copy_(rows * rows.shape[1] ** 0.5)
    guide.routers.requires_grad_(False)


def random_directions(h, E, seed=0):
    """Random unit rows (E, D) that do not see the mean of h (T, D).

    What all tokens share would send every token to the same expert.
    """
    rows = torch.randn(E, h.shape[1], generator=torch.Generator().manual_seed(seed))
    common = F.normalize(h.mean(dim=0), dim=0)
    return F.normalize(rows - (rows @ common)[:, None] * common, dim=1)


def centroids(h, E, seed=0, steps=25):
    """Spherical k-means of features (T, D): E unit centroids, nearest by cosine.

    The nearest by distance would need a bias of |c|^2 / 2, and a teacher router has no bias. Among
    unit centroids the one with the largest dot product is the nearest on the sphere, whatever |h|.
    """
    if not 1 <= E <= len(h):
        raise ValueError(f"{len(h)} features have no {E} centroids: choose 1 to {len(h)}")
    h = F.normalize(h, dim=1)
    c = h[torch.randperm(len(h), generator=torch.Generator().manual_seed(seed))[:E]]
    for _ in range(steps):
        sums = torch.zeros_like(c).index_add_(0, (h @ c.T).argmax(dim=1), h)
        c = torch.where(sums.any(dim=1, keepdim=True), F.normalize(sums, dim=1), c)
    return c


def settle(job, guide):
    """Train the teacher routers by their own two losses on one epoch of images, and freeze them."""
    cfg = job.cfg
    optimizer = torch.optim.AdamW(guide.routers.parameters(), lr=cfg.lr, weight_decay=0)
    for images, _ in data.batches(cfg, job.data, job.sets, epoch=1):
        load, entropy = teacher_router_losses(guide(images))
        (cfg.load_weight * load + cfg.entropy_weight * entropy).backward()
        optimizer.step()
        optimizer.zero_grad()
    guide.routers.requires_grad_(False)


# name: (whose features are the teacher's, how its routers get the weights that they keep; None
# where they learn beside the student as in TGR)
TEACHERS = {
    "dense": (the_dense_one, None),
    "lite0": (pretrained, None),
    "untrained": (untrained, None),
    "random": (the_dense_one, lambda job, guide: freeze_routers(job, guide, random_directions)),
    "k-means": (the_dense_one, lambda job, guide: freeze_routers(job, guide, centroids)),
    "settled": (the_dense_one, settle),
}


def guide_by(name, job, dense):
    """The Guide of a job by one of TEACHERS; `dense` is the job of a trained dense ViT, or None."""
    features, routers_of = TEACHERS[name]
    model = features(job, dense and dense.model).to(job.cfg.device)
    teacher = dense or train.Job(None, job.data, job.sets, model, None)
    guide = train.guide_of(teacher._replace(model=model), job)
    if routers_of:
        routers_of(job, guide)
    return guide


# --- what does the loss reach? ---

def guided(router, features, obey=False):
    """A loss: TGR's, whose KL reaches the student's routers, its features, both or neither (ours).

    Where `router` is False the KL is taken of heads beside the routers, which dispatch nothing, and
    the routers learn as the method says. Where `features` is False it ends at what a router is
    given. With `obey` the teacher's routers dispatch the tokens. TGR is guided(True, True).

    Features are free but for one thing: the routers' gradient is part of the norm that train.py
    clips, so the KL has a say in how much the trunk's gradient is scaled down.
    """
    def losses(cfg, student, guide, images, targets):
        with train.autocast(cfg, images):
            asked = guide(images) if guide else None
            output = student(images, dispatch(student, asked) if obey and guide else None)
            terms = train.objective(cfg, output, targets)
            if guide is None:                               # guidance has ended
                return terms
            layers = {}
            for b in asked:                                 # the KL alone reads these routings
                ask = routers(student)[b] if router else guide.routers[f"head {b}"]
                h = output.layers[b].h
                layers[b] = output.layers[b]._replace(routing=ask(h if features else h.detach()))
            again = output._replace(layers=layers)
            return train.objective(cfg, again, targets, asked) | terms

    return losses


def dispatch(student, targets):
    """Routings {block: Routing} that obey the teacher routers' logits {block: (T, E)}."""
    return {b: router(student, b).route(z.detach()) for b, z in targets.items()}


def learn_the_teachers_logits(cfg, student, guide, images, targets, temperature=3.0):
    """L + w KL(softmax(t / 3) || softmax(s / 3)), mean over images: a teacher's plain information.

    DeiT's soft distillation 0.9 L_task + 0.1 tau^2 KL with its own tau = 3 (arXiv:2012.12877,
    eq. 2), divided by 0.9, has w = 1. Here w is --guide_weight.
    """
    with train.autocast(cfg, images):
        output = student(images)
        terms = train.objective(cfg, output, targets)
        if guide is None:                                   # guidance has ended
            return terms
        with torch.no_grad():
            taught = guide.teacher(images).logits
    wide = torch.promote_types(taught.dtype, torch.float32)
    s, t = ((z.to(wide) / temperature).log_softmax(dim=1) for z in (output.logits, taught))
    kl = F.kl_div(s, t, reduction="batchmean", log_target=True)
    return terms | {"logits": cfg.guide_weight * kl}


# --- what is changed before the first step? ---

def detach_gates(job, guide):
    """Distil only: the task loss sees the gates as constants, so the KL alone trains a router."""
    for b in job.model.moe_blocks:
        router(job.model, b).register_forward_hook(
            lambda module, inputs, routing: routing._replace(gates=routing.gates.detach()))


def last_layer(job, guide):
    """Every block is guided by the features of the teacher's last block."""
    guide.blocks = dict.fromkeys(guide.blocks, len(guide.teacher.dims))


def add_heads(job, guide):
    """Linear heads that look at h as the routers do. They are trained and dropped as the teacher's
    routers are."""
    for b in guide.blocks:
        guide.routers[f"head {b}"] = TopKRouter(job.cfg.dim, job.cfg.n_experts, k=1)
    guide.routers.to(job.cfg.device)


LOSSES = {"router alone": guided(True, False), "features alone": guided(False, True),
          "oracle alone": guided(True, False, obey=True), "logits": learn_the_teachers_logits}
SETUPS = {"features alone": add_heads, "distil only": detach_gates, "last layer": last_layer}
