"""Assignment 2, solved by einsum, with every expert's rows padded to the longest group."""
import math

import torch
import torch.nn.functional as F

from kernels import Plan


def reference(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    hidden = F.gelu(torch.einsum("td,edh->teh", x, w_in) + b_in)
    out = torch.einsum("teh,ehd->ted", hidden, w_out) + b_out
    hot = F.one_hot(chosen, len(w_in)).to(out.dtype)                    # (T, K, E)
    return gated_sum(torch.einsum("tke,ted->tkd", hot, out), gates, return_choices)


def gated_sum(raw, gates, return_choices):
    wide = torch.promote_types(raw.dtype, gates.dtype)
    y = torch.einsum("tkd,tk->td", raw.to(wide), gates.to(wide)).to(raw.dtype)
    return (y, raw) if return_choices else y


def plan_choices(chosen, E):
    flat = chosen.flatten()
    load = torch.bincount(flat, minlength=E)
    order = torch.cat([(flat == e).nonzero().flatten() for e in range(E)])
    return Plan(flat[order], order, F.pad(load.cumsum(0), (1, 0)))


def sliced(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    T, K = chosen.shape
    plan = plan_choices(chosen, len(w_in))
    token = torch.div(plan.order, K, rounding_mode="floor")
    out = sliced_mlp(x[token], plan, w_in, b_in, w_out, b_out)
    raw = out[plan.order.argsort()].reshape(T, K, x.shape[1])
    return gated_sum(raw, gates, return_choices)


def sliced_mlp(rows, plan, w_in, b_in, w_out, b_out):
    E, M = len(w_in), max(plan.offsets.diff().max().item(), 1)
    # the place of each row within its group
    place = torch.arange(len(rows), device=rows.device) - plan.offsets[plan.ids]
    padded = rows.new_zeros(E, M, rows.shape[1]).index_put((plan.ids, place), rows)
    hidden = F.gelu(torch.einsum("emd,edh->emh", padded, w_in) + b_in[:, None])
    out = torch.einsum("emh,ehd->emd", hidden, w_out) + b_out[:, None]
    return out[plan.ids, place]


def within_capacity(chosen, n_experts, capacity_factor):
    T, K = chosen.shape
    even = round(K * T * capacity_factor / n_experts, 6) if math.isfinite(capacity_factor) else T
    hot = torch.nn.functional.one_hot(chosen.mT, n_experts)            # (K, T, E)
    before = torch.cumsum(hot.flatten(0, 1), 0).view(K, T, n_experts) - hot
    place = torch.einsum("kte,kte->tk", before, hot)
    return place < math.ceil(even)


class MoE:
    def forward(self, x, routing=None):
        tokens = x.flatten(0, -2)
        if not routing:
            routing = self.router(tokens)
        out = self.experts(tokens, *routing[:2], backend=self.backend,
                           return_choices=self.keep_raw)
        y, raw = out if isinstance(out, tuple) else (out, None)
        return y.unflatten(0, x.shape[:-1]), routing, raw


class Experts:
    def copy_mlp(self, mlp):
        E = len(self.w_in)
        for ours, theirs in ((self.w_in, mlp.fc_in.weight.mT), (self.b_in, mlp.fc_in.bias),
                             (self.w_out, mlp.fc_out.weight.mT), (self.b_out, mlp.fc_out.bias)):
            ours.data = torch.stack([theirs.detach()] * E)


def upcycle(sparse, dense):
    state, mlps = dense.state_dict(), [b.mlp for b in dense.blocks]
    for number in sparse.moe_blocks:
        mlp = sparse.blocks[number - 1].mlp
        mlp.experts.copy_mlp(mlps[number - 1])
        prefix = f"blocks.{number - 1}.mlp."
        state = {k: v for k, v in state.items() if not k.startswith(prefix)}
        state |= {prefix + k: v for k, v in mlp.state_dict().items()}
    sparse.load_state_dict(state, strict=True)
