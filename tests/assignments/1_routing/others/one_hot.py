"""Assignment 1, solved with one-hot matrices and einsum: K times the largest that is left."""
import torch

from router import Routing, within_capacity


class TopKRouter:
    def route(self, logits):
        finite = torch.isfinite(logits).all(dim=1)
        if not finite.all():
            raise FloatingPointError(f"{self.name}: {int((~finite).sum())} of {len(logits)} tokens")
        scores = logits
        if self.training and self.noise:
            scores = logits + torch.normal(torch.zeros_like(logits), self.noise / self.n_experts)
        left, picks = scores.detach().clone(), []
        for _ in range(self.k):
            best = left == left.amax(dim=1, keepdim=True)
            first = best & (best.cumsum(dim=1) == 1)                    # of equals, the lowest
            picks.append(first)
            left = left.masked_fill(first, -torch.inf)
        hot = torch.stack(picks, dim=1).to(scores.dtype)                # (T, K, E)
        if self.gate == "sigmoid":
            weight = torch.sigmoid(scores)
        else:
            power = torch.exp(scores - scores.amax(dim=1, keepdim=True))
            over = hot.sum(dim=1) if self.gate == "topk_softmax" else torch.ones_like(power)
            weight = power / (power * over).sum(dim=1, keepdim=True)
        gates = torch.einsum("tke,te->tk", hot, weight)
        experts = torch.einsum("tke,e->tk", hot, torch.arange(
            self.n_experts, dtype=hot.dtype, device=hot.device)).long()
        dropped = 0
        if self.capacity_factor is not None:
            kept = within_capacity(experts, self.n_experts, self.capacity_factor)
            gates, dropped = gates.masked_fill(~kept, 0.0), (~kept).long().sum()
        return Routing(experts, gates, torch.softmax(logits, dim=1), logits, dropped)


def load_loss(probs):
    importance = torch.einsum("te->e", probs)
    deviation = importance / importance.mean() - 1
    return torch.einsum("e,e->", deviation, deviation) / len(importance)


def entropy_loss(logits):
    p = torch.softmax(logits, dim=1)
    # H = log sum e^z - sum p z, with z shifted so that it cannot overflow
    z = logits - logits.amax(dim=1, keepdim=True)
    return (torch.logsumexp(z, dim=1) - torch.einsum("te,te->t", p, z)).mean()


def balance_loss(probs, chosen):
    T, E = probs.shape
    hot = (chosen[..., None] == torch.arange(E, device=chosen.device)).to(probs.dtype)
    return E * torch.einsum("ske,te->", hot, probs) / (chosen.numel() * T)


def z_loss(logits):
    top = logits.amax(dim=1).detach()
    lse = top + torch.log(torch.einsum("te->t", torch.exp(logits - top[:, None])))
    return torch.einsum("t,t->", lse, lse) / len(lse)
