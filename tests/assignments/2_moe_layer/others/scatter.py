"""Assignment 2, solved by masks, index_add and argsort; the experts' bias goes in by its index."""
import math

import torch
import torch.nn.functional as F

from kernels import Plan


def reference(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    T, K = chosen.shape
    raw = x.new_zeros(T, K, x.shape[1])
    for e in range(w_in.shape[0]):
        everyone = F.linear(F.gelu(F.linear(x, w_in[e].mT, b_in[e])), w_out[e].mT, b_out[e])
        raw = torch.where((chosen == e)[..., None], everyone[:, None], raw)
    return gated_sum(raw, gates, return_choices)


def gated_sum(raw, gates, return_choices):
    T, K, D = raw.shape
    weighted = (gates.reshape(-1, 1) * raw.reshape(-1, D))
    token = torch.arange(T, device=raw.device).repeat_interleave(K)
    y = weighted.new_zeros(T, D).index_add(0, token, weighted)
    return (y.to(raw.dtype), raw) if return_choices else y.to(raw.dtype)


def plan_choices(chosen, E):
    flat = chosen.contiguous().view(-1)
    order = torch.argsort(flat, stable=True)
    ids = torch.take(flat, order)
    offsets = flat.new_zeros(E + 1).scatter_add(0, flat + 1, torch.ones_like(flat))
    return Plan(ids=ids, order=order, offsets=offsets.cumsum(0))


def sliced(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    T, K = chosen.shape
    plan = plan_choices(chosen, len(w_in))
    rows = torch.gather(x, 0, (plan.order // K)[:, None].expand(-1, x.shape[1]))
    out = sliced_mlp(rows, plan, w_in, b_in, w_out, b_out)
    raw = torch.zeros_like(out).index_copy(0, plan.order, out)
    return gated_sum(raw.reshape(T, K, x.shape[1]), gates, return_choices)


def sliced_mlp(rows, plan, w_in, b_in, w_out, b_out):
    out = torch.zeros_like(rows)
    for e in range(len(w_in)):
        mine = torch.nonzero(plan.ids == e).flatten()
        if len(mine):
            hidden = F.gelu(rows[mine] @ w_in[e] + b_in[e])
            out = out.index_add(0, mine, hidden @ w_out[e] + b_out[e])
    return out


def within_capacity(chosen, n_experts, capacity_factor):
    T, K = chosen.shape
    C = T if capacity_factor > n_experts else math.ceil(capacity_factor * K * T / n_experts - 1e-9)
    flat = torch.cat([chosen[:, k] for k in range(K)])                 # in service order
    kept = torch.zeros_like(flat, dtype=torch.bool)
    for e in range(n_experts):
        kept[torch.nonzero(flat == e).flatten()[:C]] = True
    return torch.stack(kept.chunk(K), dim=1) if T else kept.view(T, K)


class MoE:
    def forward(self, x, routing=None):
        *batch, D = x.shape
        tokens = x.contiguous().view(-1, D)
        chosen = self.router(tokens) if routing is None else routing
        result = self.experts.forward(tokens, chosen.chosen, chosen.gates, self.backend,
                                      self.keep_raw)
        if not self.keep_raw:
            result = result, None
        return result[0].view(*batch, D), chosen, result[1]


class Experts:
    def copy_mlp(self, mlp):
        state = {"w_in": mlp.fc_in.weight.T, "b_in": mlp.fc_in.bias,
                 "w_out": mlp.fc_out.weight.T, "b_out": mlp.fc_out.bias}
        self.load_state_dict({k: v.expand(len(self.w_in), *v.shape) for k, v in state.items()})


def upcycle(sparse, dense):
    own, given = sparse.state_dict(), dense.state_dict()
    inside = [f"blocks.{n - 1}.mlp." for n in sparse.moe_blocks]
    for name in given:
        if not any(name.startswith(p) for p in inside):
            own[name] = given[name]
    sparse.load_state_dict(own)
    for n in sparse.moe_blocks:
        sparse.blocks[n - 1].mlp.experts.copy_mlp(dense.blocks[n - 1].mlp)
