"""Assignment 4, solved with one-hot matrices, einsum, and all pairs of experts."""
import torch
import torch.nn.functional as F

from distill import _warn_that_one_expert_is_alone
from router import Routing


def mutual_distillation_loss(raw):
    T, K, D = raw.shape
    raw = raw.to(torch.float32)
    if K == 1:
        _warn_that_one_expert_is_alone()
    gaps = raw[:, :, None] - raw[:, None]                               # (T, K, K, D)
    squares = torch.einsum("tijd,tijd->", gaps, gaps) / (T * D)
    return squares / (2 if K == 2 else 2 * K * K)


def domains(probs, n_tokens):
    images = probs.reshape(len(probs) // n_tokens, n_tokens, -1)
    return torch.einsum("bne->be", images).max(dim=1).indices


def class_domains(domain, labels, n_experts, n_classes):
    d, c = F.one_hot(domain, n_experts).float(), F.one_hot(labels, n_classes).float()
    return torch.einsum("bi,bc->ic", d, c) / torch.einsum("bc->c", c)


def forced(expert, n_tokens, n_experts, device="cpu"):
    probs = torch.eye(n_experts, device=device)[expert].repeat(n_tokens, 1)
    return Routing(chosen=probs.argmax(dim=1, keepdim=True), gates=probs.amax(dim=1, keepdim=True),
                   probs=probs, logits=torch.where(probs > 0, 0.0, -torch.inf))


def probe(vit, images, labels, block):
    from contextlib import ExitStack
    E = vit.blocks[block - 1].mlp.router.n_experts
    with ExitStack() as after, torch.no_grad():
        after.callback(vit.train, vit.training)
        vit.train(False)
        scores = [vit(images, routings={block: forced(e, vit.n_tokens * len(images), E,
                                                images.device)})[0]
                  for e in range(E)]
    return torch.stack(scores).max(dim=2).indices.eq(labels)


def accuracy_matrix(correct, domain):
    hot = (domain[:, None] == torch.arange(len(correct), device=domain.device)).to(torch.float32)
    return torch.einsum("ib,bj->ij", correct.to(torch.float32), hot) / torch.einsum("bj->j", hot)


def own_and_others(A):
    known = A == A
    away = known & ~torch.eye(len(A), device=A.device).bool()
    others = torch.where(away, A, 0.0).sum(dim=1) / away.sum(dim=1)
    return torch.einsum("ii->i", A), others


def gate_accuracy(correct, domain):
    hot = F.one_hot(domain, len(correct)).float()
    hits = torch.einsum("ib,bi->", correct.float(), hot)
    return float(hits / correct.sum(dim=0).clamp(max=1).sum())


def expert_gradient_norms(vit, images, labels, block):
    mode = vit.training
    vit.eval()
    weights = [p for p in vit.blocks[block - 1].mlp.experts.parameters()]
    # one graph for all images; they do not mix, so one backward each gives their own gradients
    losses = F.cross_entropy(vit(images).logits, labels, reduction="none")
    squares = []
    for loss in losses:
        grads = torch.autograd.grad(loss, weights, retain_graph=True)
        squares.append(sum(torch.einsum("ex,ex->e", g.flatten(1), g.flatten(1)) for g in grads))
    vit.train(mode)
    return torch.stack(squares) ** 0.5


def narrow_vision(norms):
    return torch.einsum("be->e", norms) / torch.einsum("be->", norms)
