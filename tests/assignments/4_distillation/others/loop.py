"""Assignment 4, solved expert by expert, image by image."""
import torch
import torch.nn.functional as F

from distill import _warn_that_one_expert_is_alone
from router import Routing


def mutual_distillation_loss(raw):
    experts = [e.float() for e in raw.unbind(dim=1)]
    if len(experts) == 1:
        _warn_that_one_expert_is_alone()
        return torch.tensor(0.0)
    if len(experts) == 2:
        return (experts[0] - experts[1]).pow(2).mean()
    middle = sum(experts) / len(experts)
    return sum(F.mse_loss(e, middle) for e in experts) / len(experts)


def domains(probs, n_tokens):
    return torch.stack([image.sum(dim=0).argmax() for image in probs.split(n_tokens)])


def class_domains(domain, labels, n_experts, n_classes):
    shares = torch.full((n_experts, n_classes), float("nan"))
    for c in range(n_classes):
        mine = domain[labels == c]
        for i in range(n_experts):
            if len(mine):
                shares[i, c] = (mine == i).sum() / len(mine)
    return shares


def forced(expert, n_tokens, n_experts, device="cpu"):
    experts = torch.tensor([[expert]] * n_tokens, device=device)
    gates = torch.tensor([[1.0]] * n_tokens, device=device)
    probs = torch.zeros(n_tokens, n_experts, device=device)
    logits = torch.full((n_tokens, n_experts), -torch.inf, device=device)
    probs[:, expert], logits[:, expert] = 1, 7
    return Routing(experts, gates, probs, logits)


def probe(vit, images, labels, block):
    mode = vit.training
    vit.eval()
    E = len(vit.blocks[block - 1].mlp.router.weight) if hasattr(
        vit.blocks[block - 1].mlp.router, "weight") else vit.blocks[block - 1].mlp.router.n_experts
    correct = torch.zeros(E, len(images), dtype=torch.bool)
    with torch.no_grad():
        for i in range(E):
            for b, image in enumerate(images):
                routing = forced(i, vit.n_tokens, E, image.device)
                scores = vit(image[None], {block: routing}).logits[0]
                correct[i, b] = scores.argmax() == labels[b]
    vit.train(mode)
    return correct


def accuracy_matrix(correct, domain):
    E = len(correct)
    A = torch.empty(E, E, device=domain.device)
    for i in range(E):
        for j in range(E):
            A[i, j] = correct[i, domain == j].float().mean()            # NaN of nothing
    return A


def own_and_others(A):
    own = torch.stack([A[i, i] for i in range(len(A))])
    others = []
    for i, row in enumerate(A):
        rest = torch.cat([row[:i], row[i + 1:]])
        others.append(rest[~rest.isnan()].mean())
    return own, torch.stack(others)


def gate_accuracy(correct, domain):
    right = solvable = 0
    for b in range(correct.shape[1]):
        if correct[:, b].any():
            solvable += 1
            right += bool(correct[domain[b], b])
    return right / solvable if solvable else float("nan")


def expert_gradient_norms(vit, images, labels, block):
    mode = vit.training
    vit.eval()
    parameters = dict(vit.blocks[block - 1].mlp.experts.named_parameters())
    E = len(next(iter(parameters.values())))
    norms = torch.zeros(len(images), E)
    for b in range(len(images)):
        loss = F.cross_entropy(vit(images[b:b + 1]).logits, labels[b:b + 1])
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for e in range(E):
            norms[b, e] = torch.cat([g[e].ravel() for g in grads]).norm()
    vit.train(mode)
    return norms


def narrow_vision(norms):
    heard = [norms[:, e].sum() for e in range(norms.shape[1])]
    return torch.stack([h / sum(heard) for h in heard])
