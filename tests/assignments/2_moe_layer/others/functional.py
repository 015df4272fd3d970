"""Assignment 2, solved with torch.func, one expert mapped over all, and pairs instead of sorts."""
import torch
import torch.nn.functional as F

from kernels import Plan


def reference(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    def expert(w_in, b_in, w_out, b_out):
        return F.gelu(x @ w_in + b_in) @ w_out + b_out
    everything = torch.func.vmap(expert)(w_in, b_in, w_out, b_out)      # (E, T, D)
    token = torch.arange(len(x), device=x.device)[:, None]
    return gated_sum(everything[chosen, token], gates, return_choices)


def gated_sum(raw, gates, return_choices):
    def of_a_token(raw, gates):
        return gates @ raw.to(gates.dtype)
    y = torch.func.vmap(of_a_token)(raw, gates).to(raw.dtype)
    return (y, raw) if return_choices else y


def plan_choices(chosen, E):
    flat = chosen.flatten()
    mine = flat == torch.arange(E, device=flat.device)[:, None]         # (E, S)
    ids, order = mine.nonzero().unbind(dim=1)
    return Plan(ids, order, torch.cat([flat.new_zeros(1), mine.sum(dim=1).cumsum(0)]))


def sliced(x, chosen, gates, w_in, b_in, w_out, b_out, return_choices=False):
    T, K = chosen.shape
    plan = plan_choices(chosen, w_in.shape[0])
    out = sliced_mlp(x.repeat_interleave(K, 0)[plan.order], plan, w_in, b_in, w_out, b_out)
    unsorted = torch.zeros_like(out).scatter(0, plan.order[:, None].expand_as(out), out)
    return gated_sum(unsorted.unflatten(0, (T, K)), gates, return_choices)


def sliced_mlp(rows, plan, w_in, b_in, w_out, b_out):
    def expert(rows, w_in, b_in, w_out, b_out):
        return torch.func.vmap(lambda row: F.gelu(row @ w_in + b_in) @ w_out + b_out)(rows)
    parts = torch.tensor_split(rows, plan.offsets[1:-1].tolist())
    return torch.cat([expert(part, *w) if len(part) else part
                      for part, *w in zip(parts, w_in, b_in, w_out, b_out, strict=True)])


def within_capacity(chosen, n_experts, capacity_factor):
    T, K = chosen.shape
    share = min(capacity_factor * K * T / n_experts, T)
    C = int(share) + (share - int(share) > 1e-9)
    flat = chosen.mT.flatten()                                          # in service order
    earlier = torch.ones(K * T, K * T, dtype=torch.bool, device=flat.device).tril(-1)
    before = (earlier & (flat == flat[:, None])).sum(dim=1)
    return (before < C).unflatten(0, (K, T)).mT


class MoE:
    def forward(self, x, routing=None):
        D = x.shape[-1]
        tokens = torch.cat(tuple(x)) if x.dim() == 3 else x
        if routing is None:
            routing = self.router(tokens)
        y = self.experts(tokens, routing.chosen, routing.gates, backend=self.backend,
                         return_choices=self.keep_raw)
        y, *raw = y if self.keep_raw else (y, None)
        return y.reshape(*x.shape[:-1], D), routing, *raw


class Experts:
    def copy_mlp(self, mlp):
        with torch.no_grad():
            self.w_in[:], self.b_in[:] = mlp.fc_in.weight.mT, mlp.fc_in.bias
            self.w_out[:], self.b_out[:] = mlp.fc_out.weight.mT, mlp.fc_out.bias


def upcycle(sparse, dense):
    theirs = dict(dense.named_parameters())
    if len(sparse.blocks) != len(dense.blocks):
        raise RuntimeError(f"{len(dense.blocks)} blocks do not go into {len(sparse.blocks)}")
    for name, p in sparse.named_parameters():
        if name in theirs and theirs[name].shape != p.shape:
            raise RuntimeError(f"{name} is {tuple(p.shape)} here and {tuple(theirs[name].shape)}")
    for name, p in sparse.named_parameters():
        if name in theirs:
            p.data.copy_(theirs[name])
    for number in sparse.moe_blocks:
        mlp = dense.blocks[number - 1].mlp
        sparse.blocks[number - 1].mlp.experts.copy_mlp(mlp)
