"""Assignment 2, solved with boolean masks, checkpoints and numpy for what has no gradient."""
import math

import torch
import torch.nn.functional as F

from kernels import Plan


def reference(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    raw = torch.zeros_like(x)[:, None].repeat(1, chosen.shape[1], 1)
    for e in range(len(w_in)):
        out = F.linear(F.gelu(F.linear(x, w_in[e].T, b_in[e])), w_out[e].T, b_out[e])
        token, k = (chosen == e).nonzero(as_tuple=True)
        raw = raw.index_put((token, k), out[token])
    return gated_sum(raw, gates, return_choices)


def gated_sum(raw, gates, return_choices):
    wide = torch.promote_types(gates.dtype, raw.dtype)
    y = torch.bmm(gates.to(wide).unsqueeze(1), raw.to(wide)).squeeze(1).type_as(raw)
    if return_choices:
        return y, raw
    return y


def plan_choices(chosen, E):
    import numpy as np
    flat = chosen.cpu().numpy().reshape(-1)
    order = np.lexsort((np.arange(len(flat)), flat))
    offsets = np.concatenate([[0], np.bincount(flat, minlength=E).cumsum()]).astype(np.int64)
    return Plan(*(torch.from_numpy(v).to(chosen.device) for v in (flat[order], order, offsets)))


def sliced(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    from torch.utils.checkpoint import checkpoint
    (T, K), plan = chosen.shape, plan_choices(chosen, len(w_in))

    def dispatched(x, *weights):
        rows = x.unsqueeze(1).expand(-1, K, -1).reshape(T * K, x.shape[1])
        out = sliced_mlp(rows.index_select(0, plan.order), plan, *weights)
        return out.index_select(0, plan.order.argsort()).view(T, K, x.shape[1])
    raw = checkpoint(dispatched, x, w_in, b_in, w_out, b_out, use_reentrant=False)
    return gated_sum(raw, gates, return_choices)


def sliced_mlp(rows, plan, w_in, b_in, w_out, b_out):
    out = rows.clone()                              # its own: every row is written over
    for e in plan.ids.unique().tolist():
        mine = plan.ids == e
        hidden = F.gelu(rows[mine].matmul(w_in[e]).add(b_in[e]))
        out[mine] = hidden.matmul(w_out[e]).add(b_out[e])
    return out


def within_capacity(chosen, n_experts, capacity_factor):
    import numpy as np
    T, K = chosen.shape
    C = T if math.isinf(capacity_factor) else math.ceil(
        round(capacity_factor * K * T / n_experts, 7))
    queue = chosen.cpu().numpy().T.reshape(-1)
    kept = np.zeros(K * T, dtype=bool)
    for e in np.unique(queue):
        kept[np.flatnonzero(queue == e)[:C]] = True
    return torch.from_numpy(np.ascontiguousarray(kept.reshape(K, T).T)).to(chosen.device)


class MoE:
    def forward(self, x, routing=None):
        from einops import rearrange
        images = x.dim() == 3
        tokens = rearrange(x, "b n d -> (b n) d") if images else x
        if routing is None:
            routing = self.router(tokens)
        out = self.experts(tokens, routing.chosen, routing.gates, self.backend, self.keep_raw)
        y, raw = out if self.keep_raw else (out, None)
        return rearrange(y, "(b n) d -> b n d", b=len(x)) if images else y, routing, raw


class Experts:
    def copy_mlp(self, mlp):
        one = {"w_in": mlp.fc_in.weight.T, "b_in": mlp.fc_in.bias,
               "w_out": mlp.fc_out.weight.T, "b_out": mlp.fc_out.bias}
        self.load_state_dict({name: torch.stack([v] * len(self.b_in)) for name, v in one.items()})


def upcycle(sparse, dense):
    import copy
    trunk = copy.deepcopy(dense)
    for number in sparse.moe_blocks:        # give the copy the sparse blocks, and it is all there
        mlp = copy.deepcopy(sparse.blocks[number - 1].mlp)
        mlp.experts.copy_mlp(trunk.blocks[number - 1].mlp)
        trunk.blocks[number - 1].mlp = mlp
    sparse.load_state_dict(trunk.state_dict())
