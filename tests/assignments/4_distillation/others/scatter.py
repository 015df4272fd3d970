"""Assignment 4, solved with scatter, bincount and moments; it looks at copies of the model."""
import torch
import torch.nn.functional as F

from distill import _warn_that_one_expert_is_alone
from router import Routing


def mutual_distillation_loss(raw):
    raw = raw.type(torch.float32)
    K = raw.size(1)
    if K < 2:
        _warn_that_one_expert_is_alone()
        return raw.sum() * 0
    off = raw - raw.mean(dim=1, keepdim=True)
    # two experts are each half their distance away from their mean
    return off.square().mean() * (4 if K == 2 else 1)


def domains(probs, n_tokens):
    row = torch.arange(len(probs), device=probs.device)
    image = torch.div(row, n_tokens, rounding_mode="floor")
    total = probs.new_zeros(len(probs) // n_tokens, probs.shape[1])
    return total.index_add(0, image, probs).sort(dim=1, descending=True, stable=True).indices[:, 0]


def class_domains(domain, labels, n_experts, n_classes):
    pairs = torch.bincount(domain * n_classes + labels, minlength=n_experts * n_classes)
    pairs = pairs.view(n_experts, n_classes)
    return pairs.float() / torch.bincount(labels, minlength=n_classes)


def forced(expert, n_tokens, n_experts, device="cpu"):
    experts = torch.zeros(n_tokens, 1, dtype=torch.long, device=device) + expert
    gates = torch.ones(n_tokens, 1, device=device)
    probs = torch.zeros(n_tokens, n_experts, device=device).scatter(1, experts, gates)
    return Routing(experts, gates, probs, torch.log(probs), dropped=0)


def probe(vit, images, labels, block):
    import copy
    calm = copy.deepcopy(vit).eval().requires_grad_(False)
    E = calm.blocks[block - 1].mlp.router.n_experts
    rows = []
    for e in range(E):
        routing = forced(e, len(images) * calm.n_tokens, E, images.device)
        rows.append(calm(images, {block: routing}).logits.max(dim=1)[1] == labels)
    return torch.vstack(rows)


def accuracy_matrix(correct, domain):
    E, B = correct.shape
    none = torch.zeros(E, E, device=domain.device)
    hits = none.scatter_add(1, domain.expand(E, B), correct.float())
    return hits / torch.bincount(domain, minlength=E)


def own_and_others(A):
    own = torch.diagonal(A)
    counted = (~A.isnan()).sum(dim=1) - (~own.isnan()).long()
    return own, (A.nansum(dim=1) - own.nan_to_num()) / counted


def gate_accuracy(correct, domain):
    solvable = correct.sum(dim=0) > 0
    hit = correct[domain, torch.arange(len(domain))]
    return hit[solvable].double().mean().item()


def expert_gradient_norms(vit, images, labels, block):
    import copy
    calm = copy.deepcopy(vit).eval()
    experts, rows = calm.blocks[block - 1].mlp.experts, []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        calm.zero_grad()
        F.nll_loss(calm(image).logits.log_softmax(dim=1), label).backward()
        rows.append(torch.cat([p.grad.flatten(1) for p in experts.parameters()], dim=1).norm(dim=1))
    return torch.stack(rows)


def narrow_vision(norms):
    return F.normalize(norms.sum(dim=0), p=1, dim=0)
