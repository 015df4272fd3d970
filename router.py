"""router.py -- which experts does each token visit, and how much does each one count?

Letters, here and in every other file:
    B images, N tokens per image, T = B*N tokens, D width, H hidden,
    E experts, K experts per token, C capacity (tokens one expert accepts)
"""
import math
import warnings
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

GATES = ("softmax_topk", "topk_softmax", "sigmoid")


class Routing(NamedTuple):
    """Where every token goes: what the experts, the losses and the plots all read."""
    chosen: Tensor             # (T, K) int64, the experts a token visits, its favourite first
    gates: Tensor              # (T, K) float32 or wider, the weight of each chosen expert's output
    probs: Tensor              # (T, E) as wide, softmax(logits) whatever the gate, without noise
    logits: Tensor             # (T, E) as wide, without noise
    dropped: Tensor | int = 0  # () how many of the T*K choices found their expert full


def expect(name, x, *sizes, below=None):
    """The sizes of x, if they are these: a letter is any size but 0, None any at all. With `below`
    it holds whole numbers, from 0 to the last one below."""
    fits = (s is None or (n > 0 if isinstance(s, str) else n == s)
            for n, s in zip(x.shape, sizes, strict=False))
    if len(x.shape) != len(sizes) or not all(fits):
        wanted = ", ".join("any" if s is None else str(s) for s in sizes)
        raise ValueError(f"{name} must be ({wanted}), not {tuple(x.shape)}")
    if below and x.dtype != torch.int64:        # bytes would be taken for a mask
        raise TypeError(f"{name} must be int64, not {x.dtype}")
    if below and x.device.type == "cpu" and may_look() and x.numel():   # a GPU's host would wait
        low, high = map(int, x.aminmax())
        if not 0 <= low <= high < below:
            raise ValueError(f"{name} must be 0 to {below - 1}, not {low} to {high}")
    return x.shape


def may_look():
    """May Python look at values? Inside torch.compile and torch.func there are none to see."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


class TopKRouter(nn.Module):
    """A linear router with top-k selection: `router(x)` with x (T, D) gives a `Routing`.

    gate="softmax_topk"  the K largest of softmax(z), not rescaled   V-MoE, arXiv:2106.05974
    gate="topk_softmax"  softmax over the K largest logits alone     Shazeer, arXiv:1701.06538
    gate="sigmoid"       one sigmoid per expert, not rescaled

    In training, noise=1.0 adds noise of standard deviation 1/E to the logits, as V-MoE does.
    capacity_factor=None drops nothing. Otherwise `within_capacity` says which choices come too
    late: they keep their expert and get gate 0.

    >>> routing = TopKRouter(dim=8, n_experts=4, k=2)(torch.randn(5, 8))
    >>> routing.chosen.shape, routing.gates.shape, routing.probs.shape
    (torch.Size([5, 2]), torch.Size([5, 2]), torch.Size([5, 4]))
    """

    def __init__(self, dim, n_experts, k=2, gate="softmax_topk", noise=0.0, capacity_factor=None):
        super().__init__()
        if not isinstance(k, int) or not 1 <= k <= n_experts:
            raise ValueError(f"k cannot be {k} of {n_experts} experts: choose 1 to {n_experts}")
        if gate not in GATES:
            raise ValueError(f"there is no gate {gate!r}: choose one of {', '.join(GATES)}")
        for name, value in (("noise", noise), ("capacity_factor", capacity_factor or 0)):
            if not value >= 0 or (name == "noise" and value == math.inf):
                raise ValueError(f"{name} cannot be {value}: choose 0 or more")
        if gate == "topk_softmax" and k == 1:
            warnings.warn("topk_softmax with k=1: the only gate is 1, and the task loss never "
                          "reaches the router; use softmax_topk", stacklevel=2)
        self.n_experts, self.k, self.gate = n_experts, k, gate
        self.noise, self.capacity_factor = noise, capacity_factor
        self.name = "router"     # a ViT writes the block's number here, for the error below
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x):
        expect("x", x, None, self.weight.shape[1])
        wide = torch.promote_types(x.dtype, torch.float32)  # in bfloat16 a few would choose others
        with torch.autocast(x.device.type, enabled=False):
            return self.route(F.linear(x.to(wide), self.weight.to(wide)))

    def route(self, logits):
        """Turn logits (T, E) into a `Routing`; FloatingPointError where they are not finite, but
        not while training on a GPU."""
        expect("logits", logits, None, self.n_experts)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # NaN logits sort without an error and send every token to the same expert: the model would
        # go on as a dense one. In training a GPU's host would wait here, block by block. There NaN
        # or infinite logits spoil the loss; who sees that can ask again in evaluation mode.
        waits = self.training and logits.device.type != "cpu"
        if may_look() and not waits and not torch.isfinite(logits).all():
            bad = int((~torch.isfinite(logits)).any(dim=1).sum())
            raise FloatingPointError(
                f"{self.name}: the logits of {bad} of {len(logits)} tokens are not finite; lower "
                f"the learning rate or look for inf in the inputs")
        probs = logits.softmax(dim=-1)                                  # (T, E)
        noisy = logits
        if self.training and self.noise > 0:
            noisy = logits + torch.randn_like(logits) * (self.noise / self.n_experts)
        # A stable sort, for topk may break ties differently on another device.
        order = noisy.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, :self.k]                                      # (T, K)
        kept = noisy.gather(1, chosen)                                  # (T, K) their logits
        if self.gate == "softmax_topk":
            # The K gates are not rescaled to sum to 1. With K=1 a rescaled gate would be the
            # constant 1, and the task loss would never reach the router.
            gates = noisy.softmax(dim=-1).gather(1, chosen)             # (T, K)
        elif self.gate == "topk_softmax":
            gates = kept.softmax(dim=-1)
        else:
            gates = kept.sigmoid()

        dropped = 0
        if self.capacity_factor is not None:
            served = within_capacity(chosen, self.n_experts, self.capacity_factor)
            gates = gates * served
            dropped = (~served).sum()
        return Routing(chosen, gates, probs, logits, dropped)


def within_capacity(chosen, n_experts, capacity_factor):
    """Which of the choices (T, K) does their expert have room for? (T, K) bool.

    Each expert serves C = ceil(capacity_factor * K * T / E) choices, first choices before second
    ones, then in token order; a factor of 0 drops every choice, infinity none. V-MoE serves in the
    same order (arXiv:2106.05974) but rounds C to the nearest integer where we round up.
    """
    T, K = expect("chosen", chosen, None, "K", below=n_experts)
    if not capacity_factor >= 0:
        raise ValueError(f"capacity_factor cannot be {capacity_factor}: choose 0 or more")
    if capacity_factor * K >= n_experts:
        C = T                                                           # room for every token
    else:
        # as a fraction, for 1.1 * 2 * 100 / 4 is 55.00000000000001 and would make room for one more
        a, b = Fraction(capacity_factor).limit_denominator(10 ** 9).as_integer_ratio()
        C = -(-a * K * T // (b * n_experts))
    queue = F.one_hot(chosen.T.reshape(-1), n_experts)                  # (K*T, E) in service order
    place = (queue.cumsum(dim=0) * queue).sum(dim=1)                    # (K*T,) 1 = served first
    return (place <= C).view(K, T).T                                    # (T, K)


# --- losses on the routing ---
#
# Why does a router need any? Left alone it feeds the experts that are ahead: they are chosen, so
# they learn, so they are chosen again, and the others fall idle. load_loss and balance_loss ask for
# an even load, entropy_loss for sure routers, z_loss for small logits. None of them looks at what
# an expert would do with a token, so none can say which expert that token needs.

def load_loss(probs):
    """CV^2 of the experts' importance, from probs (T, E): 0 when even, E - 1 when collapsed.

    Imp_e = mean_t p_te, and the loss is var(Imp) / mean(Imp)^2 with the population variance
    (V-MoE, arXiv:2106.05974, appendix A; TGR-MoE, arXiv:2604.21330, L_load). Written as
    (std / mean)^2, the same number would have a NaN gradient at perfect balance.
    """
    expect("probs", probs, "T", "E")
    importance = over_all_tokens(probs.mean(dim=0))                     # (E,)
    return importance.var(correction=0) / importance.mean().square()


def entropy_loss(logits):
    """Mean entropy in nats of the tokens' routing, from logits (T, E) (TGR-MoE, L_ent).

    It takes logits because p log p, from probabilities, has an infinite slope where p underflows.
    """
    expect("logits", logits, "T", "E")
    log_p = logits.log_softmax(dim=-1)                                  # (T, E)
    return -(log_p.exp() * log_p).sum(dim=-1).mean()


def balance_loss(probs, chosen):
    """E * sum_e f_e P_e: 1 when even, E / K when all tokens are sure of the same K experts (Switch,
    arXiv:2101.03961, eq. 4-6, where K is 1).

    f_e is the share of the choices (T, K) that went to e, a constant for autograd; P_e is the mean
    over all tokens of probs (T, E).
    """
    T, E = expect("probs", probs, "T", "E")
    expect("chosen", chosen, T, "K", below=E)
    f = over_all_tokens(F.one_hot(chosen, E).sum(dim=(0, 1)) / chosen.numel())      # (E,)
    P = over_all_tokens(probs.mean(dim=0))                              # (E,)
    return E * (f * P).sum()


def z_loss(logits):
    """Mean squared log-sum-exp of logits (T, E) (ST-MoE, arXiv:2202.08906, eq. 5)."""
    expect("logits", logits, "T", "E")
    return logits.logsumexp(dim=-1).square().mean()


# --- one process among several ---

def processes():
    """How many train together, as torchrun started them."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def averaged(x):
    """The mean of x over all processes, without a gradient."""
    total = x.detach().clone()
    if processes() > 1:
        dist.all_reduce(total)
    return total / processes()


def over_all_tokens(mean):
    """A mean over the tokens of this process -> over those of all, of which each has as many.

    The gradient is that of the own tokens, for training averages the gradients of all processes.
    """
    return mean + (averaged(mean) - mean).detach() if processes() > 1 else mean
