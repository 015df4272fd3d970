"""Assignment 1, solved token by token."""
import math

import torch

from router import Routing, within_capacity


class TopKRouter:
    def route(self, logits):
        bad = sum(1 for row in logits.tolist() if not all(map(math.isfinite, row)))
        if bad:
            raise FloatingPointError(f"{self.name}: {bad} of {len(logits)} tokens are broken")
        noisy = logits
        if self.training:
            noisy = logits + self.noise / self.n_experts * torch.randn(
                logits.shape, device=logits.device)
        experts, gates = [], []
        for row in noisy:
            ranked = sorted(range(self.n_experts), key=lambda e: (-row[e].item(), e))[:self.k]
            experts.append(ranked)
            if self.gate == "softmax_topk":
                gates.append(torch.stack([torch.softmax(row, 0)[e] for e in ranked]))
            elif self.gate == "topk_softmax":
                gates.append(torch.softmax(torch.stack([row[e] for e in ranked]), 0))
            else:
                gates.append(torch.stack([1 / (1 + torch.exp(-row[e])) for e in ranked]))
        experts = torch.tensor(experts, dtype=torch.long, device=logits.device).reshape(-1, self.k)
        gates = torch.stack(gates) if gates else logits[:, :self.k]
        dropped = 0
        if self.capacity_factor is not None:
            kept = within_capacity(experts, self.n_experts, self.capacity_factor)
            gates = torch.where(kept, gates, torch.zeros_like(gates))
            dropped = torch.tensor(kept.numel()) - kept.sum()
        return Routing(experts, gates, torch.softmax(logits, 1), logits, dropped)


def load_loss(probs):
    T, E = probs.shape
    importance = [sum(probs[t, e] for t in range(T)) / T for e in range(E)]
    mean = sum(importance) / E
    return sum((i - mean) ** 2 for i in importance) / E / mean ** 2


def entropy_loss(logits):
    total = 0
    for row in logits:
        log_p = row - torch.logsumexp(row, 0)
        total = total - sum(torch.exp(v) * v for v in log_p)
    return total / len(logits)


def balance_loss(probs, chosen):
    T, E = probs.shape
    total = 0
    for e in range(E):
        share = (chosen == e).sum() / chosen.numel()
        total = total + share.to(probs.dtype) * sum(probs[t, e] for t in range(T)) / T
    return E * total


def z_loss(logits):
    return sum(torch.logsumexp(row, 0) ** 2 for row in logits) / len(logits)
