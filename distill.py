"""distill.py -- how do experts learn from each other, and what does each one fail to see?

MoDE (arXiv:2402.00893): a gate hands each expert few samples, so its vision is narrow; experts
that are active together and imitate each other *moderately* see more. That much is the paper's
abstract. The formula below is the one that CoEKS (ICLR 2026, eq. 5-6) credits to it. "Ours" marks
the measures whose definition in the paper was not at hand.
"""
import warnings
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F

from moe import check_blocks, routers, whole
from router import Routing, expect


def mutual_distillation_loss(raw):
    """L_md of the co-active experts, from their outputs before gating raw (T, K, D).

        K = 1: 0        K = 2: MSE(e_1, e_2)        K > 2: 1/K sum_i MSE(e_i, mean_j e_j)

    averaged over features, then tokens, in float32 or wider; both sides learn (no stop-gradient).
    The form for K > 2 is the variance over experts. At K = 2 it would be MSE / 4, so the printed
    case weighs four times as much, and one alpha means two things on the two sides of that line. A
    dense gate is K = E. A choice that a full expert dropped still takes part (ours).
    """
    _, K, _ = expect("raw", raw, "T", "K", "D")
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if K == 1:
        if not torch.compiler.is_compiling():       # a warning would cut the graph in two
            _warn_that_one_expert_is_alone()
        return raw.new_zeros(())
    if K == 2:
        return F.mse_loss(raw[:, 0], raw[:, 1])
    return raw.var(dim=1, correction=0).mean()


@cache
def _warn_that_one_expert_is_alone():
    warnings.warn("mutual distillation with K=1 is 0: an expert that is active alone has nobody "
                  "to learn from; use --k 2 or more", stacklevel=3)


# --- expert probing: freeze the model, force one expert at a time (ours, after MoDE) ---

def domains(probs, n_tokens):
    """d(x) = argmax_i gate_i(x): the dominant expert (B,) of each image, from probs (B*N, E).

    An image's gate is the mean over its tokens (ours, for MoDE's experts see whole inputs).
    """
    whole(n_tokens=n_tokens)
    expect(f"probs of {n_tokens} tokens an image", probs, len(probs) // n_tokens * n_tokens, "E")
    return probs.view(-1, n_tokens, probs.shape[1]).mean(dim=1).argmax(dim=1)


def class_domains(domain, labels, n_experts, n_classes):
    """The share of class c that expert i dominates, at [i, c], (E, n_classes): MoDE's D.

    domain and labels are (B,). Columns sum to 1; that of a class without images is NaN.
    """
    expect("domain", domain.cpu(), "B", below=n_experts)
    expect("labels", labels.cpu(), *domain.shape, below=n_classes)
    count = torch.zeros(n_experts, n_classes, dtype=torch.int64)
    count.index_put_((domain.cpu(), labels.cpu()), torch.tensor(1), accumulate=True)
    return count / count.sum(dim=0)


def forced(expert, n_tokens, n_experts, device="cpu"):
    """The `Routing` that sends all of n_tokens tokens to one expert with gate 1."""
    expect("expert", torch.tensor([expert]), 1, below=n_experts)
    chosen = torch.full((n_tokens, 1), expert, device=device)
    probs = F.one_hot(chosen[:, 0], n_experts).float()
    return Routing(chosen, torch.ones_like(chosen, dtype=torch.float32), probs, probs.log())


@contextmanager
def evaluating(vit):
    """The model in evaluation mode, and afterwards as each part of it was, whatever happens."""
    training = [module for module in vit.modules() if module.training]
    vit.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def probe(vit, images, labels, block):
    """Which images are classified right when expert i alone serves `block`? (E, B) bool."""
    check_blocks("block", [block], routers(vit))
    expect("labels", labels, *images.shape[:1])
    E, T = vit.blocks[block - 1].mlp.router.n_experts, len(images) * vit.n_tokens
    with evaluating(vit):
        return torch.stack([
            vit(images, {block: forced(i, T, E, images.device)}).logits.argmax(dim=1) == labels
            for i in range(E)])


def accuracy_matrix(correct, domain):
    """A[i, j], the accuracy of expert i on DS_j = {x: d(x) = j}, (E, E); NaN where DS_j is empty.

    correct (E, B) comes from `probe`, domain (B,) from `domains`. Take the domains from the same
    model; or, to compare models on one partition, take the plain MoE's for all of them.
    """
    expect("domain", domain, *expect("correct", correct, "E", "B")[1:], below=len(correct))
    inside = F.one_hot(domain, len(correct)).float()                    # (B, E)
    return correct.float() @ inside / inside.sum(dim=0)


def own_and_others(A):
    """(own, others), each (E,): expert i on its own domain, and its mean on the other domains."""
    expect("A", A, *A.shape[:1], *A.shape[:1])
    off = A.masked_fill(torch.eye(len(A), dtype=torch.bool, device=A.device), float("nan"))
    return A.diagonal(), off.nanmean(dim=1)


def gate_accuracy(correct, domain):
    """Of the images that some expert gets right, the share that expert d(x) does; NaN if none."""
    expect("domain", domain, *expect("correct", correct, "E", "B")[1:], below=len(correct))
    solvable = correct.any(dim=0)                                       # (B,)
    hit = correct.gather(0, domain[None])[0]                            # (B,)
    return (hit.float().sum() / solvable.float().sum()).item()


# --- narrow vision: who learns from whom (MoDE, figure 1; the measure is ours) ---

def expert_gradient_norms(vit, images, labels, block):
    """||dL(x)/d theta_i|| for every image x and expert i of `block`, (B, E); one backward each."""
    check_blocks("block", [block], routers(vit))
    expect("labels", labels, "B")
    weights = list(vit.blocks[block - 1].mlp.experts.parameters())      # each (E, ...)
    norms = []
    with evaluating(vit), torch.enable_grad():
        for image, label in zip(images, labels, strict=True):
            loss = F.cross_entropy(vit(image[None]).logits, label[None])
            grads = torch.autograd.grad(loss, weights)
            norms.append(sum(g.flatten(1).square().sum(dim=1) for g in grads).sqrt())    # (E,)
    return torch.stack(norms)


def narrow_vision(norms):
    """r_i, expert i's share of the gradient that these images (B, E) send: (E,), sums to 1."""
    expect("norms", norms, "B", "E")
    return norms.sum(dim=0) / norms.sum()
