"""Assignment 4, solved with torch.func, shifts among the experts, and sorted pairs."""
import torch
import torch.nn.functional as F

from distill import _warn_that_one_expert_is_alone
from router import Routing


def mutual_distillation_loss(raw):
    def of_one_token(said):                                             # (K, D)
        K = len(said)
        shifts = [(said - said.roll(s, dims=0)).square().mean() for s in range(1, K)]
        return sum(shifts) / (1 if K == 2 else 2 * K)

    if raw.shape[1] == 1:
        _warn_that_one_expert_is_alone()
        return torch.zeros_like(raw[0, 0, 0], dtype=torch.float32)
    return torch.func.vmap(of_one_token)(raw.float()).mean()


def domains(probs, n_tokens):
    return torch.func.vmap(lambda image: image.mean(dim=0).argmax())(
        probs.unflatten(0, (-1, n_tokens)))


def class_domains(domain, labels, n_experts, n_classes):
    found, n = torch.unique(labels * n_experts + domain, return_counts=True)
    pairs = torch.zeros(n_classes * n_experts).index_add(0, found, n.float())
    pairs = pairs.view(n_classes, n_experts).T
    return pairs / pairs.sum(dim=0, keepdim=True)


def forced(expert, n_tokens, n_experts, device="cpu"):
    with torch.device(device):
        chosen = torch.tensor([expert]).expand(n_tokens).unsqueeze(1).clone()
        probs = (torch.arange(n_experts) == expert).float().expand(n_tokens, -1).clone()
        return Routing(chosen, probs.gather(1, chosen), probs, torch.special.xlogy(1, probs))


def probe(vit, images, labels, block):
    E, mode = vit.blocks[block - 1].mlp.router.n_experts, vit.training
    vit.eval()
    still = {name: p.detach() for name, p in vit.named_parameters()}

    def correct(expert):
        routing = forced(expert, len(images) * vit.n_tokens, E, images.device)
        scores = torch.func.functional_call(vit, still, (images, {block: routing})).logits
        return torch.topk(scores, 1).indices[:, 0] == labels
    rows = list(map(correct, range(E)))
    vit.train(mode)
    return torch.stack(rows)


def accuracy_matrix(correct, domain):
    def of_one_expert(row):
        hits = row.new_zeros(E).index_add(0, domain, row)
        return hits / row.new_zeros(E).index_add(0, domain, torch.ones_like(row))
    E = len(correct)
    return torch.stack([of_one_expert(row) for row in correct.float().unbind()])


def own_and_others(A):
    def of_one(i, row):
        rest = torch.where(torch.arange(len(row), device=row.device) == i, torch.nan, row)
        return row[i], rest.nanmean()
    own, others = zip(*(of_one(i, row) for i, row in enumerate(A)), strict=True)
    return torch.stack(own), torch.stack(others)


def gate_accuracy(correct, domain):
    hits = torch.take_along_dim(correct.T, domain[:, None], dim=1).sum()
    return torch.true_divide(hits, correct.amax(dim=0).sum()).item()


def expert_gradient_norms(vit, images, labels, block):
    path, mode = f"blocks.{block - 1}.mlp.experts.", vit.training
    vit.eval()
    parameters = {name: p.detach() for name, p in vit.named_parameters()}
    experts = {name: p for name, p in parameters.items() if name.startswith(path)}

    def loss(experts, image, label):
        scores = torch.func.functional_call(vit, parameters | experts, (image[None],)).logits
        return F.cross_entropy(scores, label[None])
    slopes = [torch.func.grad(loss)(experts, image, label)
              for image, label in zip(images, labels, strict=True)]
    vit.train(mode)
    return torch.stack([torch.cat([g.flatten(1) for g in slope.values()], dim=1).norm(dim=1)
                        for slope in slopes])


def narrow_vision(norms):
    return torch.func.vmap(torch.sum, in_dims=1)(norms) / norms.sum()
