"""Assignment 1, solved expert by expert: checkpoints, boolean masks and sums in another order."""
import torch

from router import Routing, within_capacity


class TopKRouter:
    def route(self, logits):
        from torch.utils.checkpoint import checkpoint
        bad = {t for t, e in (logits - logits != 0).nonzero().tolist()}         # NaN != 0
        if bad:
            raise FloatingPointError(f"{self.name}: {len(bad)} of {len(logits)} tokens")
        noisy = logits
        if self.noise and self.training:
            noisy = logits.lerp(logits + self.noise * torch.randn_like(logits), 1 / self.n_experts)
        order = sorted(range(self.n_experts), reverse=True)
        backwards = noisy[:, order].argsort(dim=1, stable=True).flip(1)
        chosen = (self.n_experts - 1 - backwards)[:, :self.k]

        def weigh(z):
            top = torch.cat([z[:, :0], z.gather(1, chosen)], dim=1)
            if self.gate == "sigmoid":
                return torch.where(top > 0, 1 / (1 + torch.exp(-top.abs())),
                                   torch.exp(-top.abs()) / (1 + torch.exp(-top.abs())))
            among = z if self.gate == "softmax_topk" else top
            return torch.exp(top - torch.logsumexp(among, dim=1, keepdim=True))
        gates = checkpoint(weigh, noisy, use_reentrant=False)
        dropped = 0
        if self.capacity_factor is not None:
            served = within_capacity(chosen, self.n_experts, self.capacity_factor)
            gates = gates * served.to(gates.dtype)
            dropped = torch.sum(served == 0)
        probs = torch.exp(logits - torch.logsumexp(logits, dim=1, keepdim=True))
        return Routing(chosen, gates, probs, logits, dropped)


def load_loss(probs):
    variance, mean = torch.var_mean(probs.mean(dim=0), correction=0)
    return variance / mean ** 2


def entropy_loss(logits):
    from torch.distributions import Categorical
    return Categorical(logits=logits, validate_args=False).entropy().mean()


def balance_loss(probs, chosen):
    T, E = probs.shape
    total = probs.sum(dim=0).gather(0, chosen.flatten())        # a choice finds its expert's mean
    return E * total.sum() / (chosen.numel() * T)


def z_loss(logits):
    log_sum = logits[:, 0]
    for column in logits.unbind(dim=1)[1:]:
        log_sum = torch.logaddexp(log_sum, column)
    return (log_sum * log_sum).sum() / log_sum.numel()
