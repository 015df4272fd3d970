"""ideas.py -- can the routing alone be guided better than by a teacher's clusters? (All ours.)

Each idea is a loss in the place of TGR's KL that reaches the student's routers and nothing else:
the features stay free, so that only routing is at stake. What was expected of each stands in
decided.py, and was written before any run. They are looked at on validation images first.
"""
import math

import torch
import torch.nn.functional as F

import train
from moe import routers
from notebooks.remedies import product
from teacher import guidance_loss, teacher_router_losses


def idea(divergence):
    """A loss: TGR's, whose KL of a block is divergence(teacher's logits (T, E), student's (T, E)).

    The student's logits are made of features that are cut off, the teacher's are constants.
    """
    def losses(cfg, student, guide, images, targets):
        with train.autocast(cfg, images):
            asked = guide(images) if guide else None
            output = student(images)
            terms = train.objective(cfg, output, targets)
            if guide is None:                               # guidance has ended
                return terms
            load, entropy = teacher_router_losses(asked)
            found = [divergence(z.detach(), logits_of(student, output, b))
                     for b, z in asked.items()]
        return terms | {"teacher_load": cfg.load_weight * load,
                        "teacher_entropy": cfg.entropy_weight * entropy,
                        "guidance": cfg.guide_weight / len(found) * sum(found)}

    return losses


def logits_of(student, output, block):
    """What a router says of features that it cannot change."""
    return routers(student)[block](output.layers[block].h.detach()).logits


# --- guidance by a teacher, otherwise ---

def near_the_top(t, z, n=3):
    """KL among the student's own n favourites: the teacher decides between experts that are in
    question, and leaves the others alone."""
    own = z.detach().topk(min(n, z.shape[1]), dim=1).indices            # (T, n)
    return guidance_loss(t.gather(1, own), z.gather(1, own))


def while_unsure(t, z):
    """KL of each token times its entropy over log E: guidance fades as a router makes up its mind.
    """
    log_p = z.log_softmax(dim=1)
    unsure = -(log_p.exp() * log_p).sum(dim=1).detach() / (math.log(z.shape[1]) or 1)
    kl = F.kl_div(log_p, t.log_softmax(dim=1), reduction="none", log_target=True).sum(dim=1)
    return (unsure * kl).mean()


def evened(t, z, steps=10):
    """KL to the teacher's targets after Sinkhorn's balancing: in each batch every expert is the
    target of an even share of the tokens (as SwAV balances its clusters, arXiv:2006.09882)."""
    log_q = t.log_softmax(dim=1)
    for _ in range(steps):
        log_q = log_q - log_q.logsumexp(dim=0) + math.log(len(t) / t.shape[1])
        log_q = log_q.log_softmax(dim=1)
    return guidance_loss(log_q, z)


# --- guidance by nobody: what would each expert have been worth? ---

def by_value(cfg, student, guide, images, targets):
    """V-MoE's loss and a KL to softmax(-q / std(q)), q_e = <dL/dy, f_e> of all experts.

    To first order q says what more of an expert would do to the task's loss (notebook 1). The
    exact gradient moves logits by p_e (q_e - mean), hardly where p is small; this KL moves them by
    target_e - p_e. A token whose output nothing reads, as a patch's in the last block, is worth the
    same to all experts, and it is left out.
    """
    seen, hooks = {}, []
    for b in student.moe_blocks:
        layer = student.blocks[b - 1].mlp
        hooks.append(layer.register_forward_hook(
            lambda m, inputs, out, b=b: seen.update({b: out[0]})))
    with train.autocast(cfg, images):
        output = student(images)
        terms = train.objective(cfg, output, targets)
    for hook in hooks:
        hook.remove()
    slopes = torch.autograd.grad(terms["task"], [seen[b] for b in student.moe_blocks],
                                 retain_graph=True)
    found = []
    for b, dy in zip(student.moe_blocks, slopes, strict=True):
        read = dy.flatten(0, 1).any(dim=1)                              # (T,)
        with train.autocast(cfg, images):
            asked = worth(student.blocks[b - 1].mlp, output.layers[b].h.detach()[read],
                          dy.flatten(0, 1)[read])                       # (read tokens, E)
        found.append(guidance_loss(asked, logits_of(student, output, b)[read]))
    return terms | {"guidance": cfg.guide_weight / len(found) * sum(found)}


@torch.no_grad()
def worth(moe, h, slope):
    """-q / std(q) of each token, (T, E): how much better than its mean is each expert?

    h (T, D) is the input of the layer `moe`, slope (T, D) is dL/dy.
    """
    f = moe.experts.batched(h.expand(len(moe.experts.w_in), *h.shape))                # (E, T, D)
    q = product("td,etd->te", slope.float(), f.float())
    std = q.std(dim=1, keepdim=True, correction=min(1, q.shape[1] - 1))     # 0 of a lone expert
    return -(q - q.mean(dim=1, keepdim=True)) / std.clamp(min=1e-12)


IDEAS = {"near the top": idea(near_the_top), "while unsure": idea(while_unsure),
         "evened": idea(evened), "by value": by_value}
