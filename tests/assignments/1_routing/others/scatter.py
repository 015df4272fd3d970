"""Assignment 1, solved with numpy's order, scatter and bincount."""
import torch
import torch.nn.functional as F

from router import Routing, within_capacity


class TopKRouter:
    def route(self, logits):
        import numpy as np
        bad = torch.isfinite(logits).logical_not().sum(dim=1).count_nonzero().item()
        if bad > 0:
            raise FloatingPointError(f"in {self.name}, {bad} of {len(logits)} tokens")
        z = logits
        if self.training and self.noise > 0:
            z = z + torch.empty_like(z).normal_(0, self.noise / self.n_experts)
        order = np.argsort(-z.detach().numpy(), axis=1, kind="stable")
        experts = torch.from_numpy(order[:, :self.k].copy())
        if self.gate == "topk_softmax":
            mask = torch.full_like(z, -torch.inf).scatter(1, experts, 0.0)
            weight = F.softmax(z + mask, dim=1)
        elif self.gate == "softmax_topk":
            weight = F.log_softmax(z, dim=1).exp()
        else:
            weight = F.logsigmoid(z).exp()
        gates = torch.take_along_dim(weight, experts, dim=1)
        drops = 0
        if self.capacity_factor is not None:
            kept = within_capacity(experts, self.n_experts, self.capacity_factor)
            gates = kept.to(gates.dtype) * gates
            drops = kept.numel() - kept.count_nonzero()
        return Routing(chosen=experts, gates=gates, probs=F.log_softmax(logits, 1).exp(),
                       logits=logits, dropped=drops)


def load_loss(probs):
    importance = probs.sum(dim=0)
    E = len(importance)
    return E * importance.square().sum() / importance.sum().square() - 1


def entropy_loss(logits):
    log_p = F.log_softmax(logits, dim=1)
    p = F.softmax(logits, dim=1)
    return -(p * log_p).sum() / len(logits)


def balance_loss(probs, chosen):
    count = torch.bincount(chosen.flatten(), minlength=probs.shape[1]).to(probs.dtype)
    return probs.shape[1] * torch.dot(count / count.sum(), probs.sum(dim=0) / len(probs))


def z_loss(logits):
    return F.mse_loss(torch.logsumexp(logits, dim=1), torch.zeros_like(logits[:, 0]))
