"""What students get wrong in assignment 2: (kind, file, what stands there, what they write).

selftest.py says which kinds there are, and wants each noticed by a check, in words.
"""
PRODUCT = "y = raw * gates[..., None]"
BOTH = "return (y, raw) if return_choices else y"
ROWS = "rows = x[plan.order // K]"
EMPTY = """raw = torch.empty_like(out)
    raw[plan.order] = out"""
SORT = "ids, order = chosen.reshape(-1).sort(stable=True)"
SLICES = """return torch.cat([
        torch.addmm(bo, F.gelu(torch.addmm(bi, own, wi)), wo)
        for own, (wi, bi, wo, bo) in zip(rows.split(sizes), weights, strict=True)])"""
QUEUE = "queue = F.one_hot(chosen.T.reshape(-1), n_experts)"
SERVED = "return (place <= C).view(K, T).T"
OWN = """routing = self.router(tokens)
        out ="""
LAYER = "return y.view_as(x), routing, raw"
TRUNK = "sparse.load_state_dict(trunk | own)"

WRONG = [
    # gated_sum
    ("input changed", "kernels.py", PRODUCT, "y = raw.mul_(gates[..., None])"),
    ("detached", "kernels.py", BOTH, "return (y.detach(), raw) if return_choices else y"),
    ("one size only", "kernels.py", "(y.sum(dim=1) if y.shape[1] > 1 else y.squeeze(1))",
     "(y[:, 0] + y[:, 1] if y.shape[1] > 1 else y.squeeze(1))"),
    # reference
    ("dtype", "kernels.py", "F.gelu(x @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e] for",
     "F.gelu(x.to(gates.dtype) @ w_in[e].to(gates.dtype) + b_in[e])\n"
     "        @ w_out[e].to(gates.dtype) + b_out[e] for"),
    ("numerics", "kernels.py", "raw = everything.gather(1,",
     "raw = everything.nan_to_num().gather(1,"),
    ("state kept", "kernels.py", "raw = everything.gather(1,",
     """everything = reference.__dict__.setdefault(str(everything.shape), everything)
    raw = everything.gather(1,"""),
    # sliced
    ("state kept", "kernels.py", EMPTY,
     """if getattr(sliced, "buffer", out[:0]).shape != out.shape:
        sliced.buffer = torch.empty_like(out)
    raw = sliced.buffer = sliced.buffer.detach()
    raw[plan.order] = out"""),
    ("state kept", "kernels.py", ROWS,
     f"""plan = sliced.__dict__.setdefault(str(chosen.shape), plan)
    {ROWS}"""),
    ("state kept", "kernels.py", ROWS, f"""sliced.plans = [*getattr(sliced, "plans", []), plan]
    {ROWS}"""),
    ("input changed", "kernels.py", ROWS, f"""x.data.nan_to_num_()
    {ROWS}"""),
    ("random state", "kernels.py", ROWS, f"""torch.manual_seed(0)
    {ROWS}"""),
    ("detached", "kernels.py", "raw.view(T, K, x.shape[1]), gates, return_choices",
     "raw.view(T, K, x.shape[1]), gates.detach() if return_choices else gates, return_choices"),
    ("device", "kernels.py", EMPTY, """raw = torch.zeros(T * K, x.shape[1], dtype=out.dtype)
    raw[plan.order] = out"""),
    # plan_choices
    ("input changed", "kernels.py", SORT, """flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    ids = flat.copy_(flat[order])"""),
    ("numerics", "kernels.py", SORT, """flat = chosen.reshape(-1)
    later = torch.arange(len(flat), device=flat.device) / len(flat)
    order = (flat + later).argsort()
    ids = flat[order]"""),
    ("device", "kernels.py", "torch.arange(E + 1, device=ids.device)", "torch.arange(E + 1)"),
    ("dtype", "kernels.py", "return Plan(ids, order, offsets)",
     "return Plan(ids.int(), order, offsets)"),
    # sliced_mlp
    ("input changed", "kernels.py", SLICES,
     """for own, (wi, bi, wo, bo) in zip(rows.split(sizes), weights, strict=True):
        own.copy_(torch.addmm(bo, F.gelu(torch.addmm(bi, own, wi)), wo))
    return rows"""),
    ("another definition", "kernels.py", SLICES,
     SLICES.replace("torch.addmm(bi, own, wi))", "torch.addmm(bi, own, wi), approximate='tanh')")),
    # within_capacity
    ("numerics", "router.py", QUEUE, f"{QUEUE}.float()"),
    ("numerics", "router.py", "limit_denominator(10 ** 9)", "limit_denominator(100)"),
    ("input changed", "router.py", SERVED, f"""chosen.T.reshape(-1)[place > C] = -1
    {SERVED}"""),
    ("device", "router.py", SERVED, """served = torch.zeros(K * T, dtype=torch.bool)
    served[place <= C] = True
    return served.view(K, T).T"""),
    ("state kept", "router.py", "place = (queue.cumsum(dim=0) * queue).sum(dim=1)",
     """before = getattr(within_capacity, "load", {}).get(n_experts, 0)
    within_capacity.load = {n_experts: before + queue.sum(dim=0)}
    place = ((queue.cumsum(dim=0) + before) * queue).sum(dim=1)"""),
    ("random state", "router.py", "place = (queue.cumsum(dim=0) * queue).sum(dim=1)",
     """turn = torch.randperm(K * T)
    place = torch.empty_like(turn)
    place[turn] = (queue[turn].cumsum(dim=0) * queue[turn]).sum(dim=1)"""),
    ("another definition", "router.py", "place = (queue.cumsum(dim=0) * queue).sum(dim=1)",
     "place = (queue.view(K, T, -1).cumsum(dim=1).flatten(0, 1) * queue).sum(dim=1)"),
    # MoE.forward
    ("detached", "moe.py", OWN, OWN.replace("tokens)", "tokens.detach())")),
    ("detached", "moe.py", LAYER,
     "return y.view_as(x), routing, raw.detach() if self.keep_raw else None"),
    ("input changed", "moe.py", LAYER, f"""tokens[routing.gates.sum(dim=1) == 0] = 0
        {LAYER}"""),
    ("grad wiped", "moe.py", LAYER, f"""self.zero_grad()
        {LAYER}"""),
    ("state kept", "moe.py", OWN,
     OWN.replace("routing =", 'routing = self.last = getattr(self, "last", None) or')),
    ("state kept", "moe.py", LAYER, f"""self.seen = [*getattr(self, "seen", []), routing]
        {LAYER}"""),
    # Experts.copy_mlp
    ("one size only", "moe.py", "self.w_out.copy_(mlp.fc_out.weight.T)",
     """for e in range(4):
                self.w_out[e] = mlp.fc_out.weight.T"""),
    ("input changed", "moe.py", "self.w_in.copy_(mlp.fc_in.weight.T)",
     "self.w_in.copy_(mlp.fc_in.weight.t_())"),
    ("replaced", "moe.py", "self.w_in.copy_(mlp.fc_in.weight.T)",
     "self.w_in = nn.Parameter(mlp.fc_in.weight.T.repeat(len(self.w_in), 1, 1))"),
    ("random state", "moe.py", "self.w_in.copy_(mlp.fc_in.weight.T)",
     "self.w_in.copy_(mlp.fc_in.weight.T + 1e-3 * torch.randn_like(self.w_in))"),
    # upcycle
    ("grad wiped", "moe.py", TRUNK, f"""dense.requires_grad_(False)
    {TRUNK}"""),
    ("input changed", "moe.py", TRUNK, f"""dense.eval()
    {TRUNK}"""),
    ("random state", "moe.py", TRUNK, f"""torch.manual_seed(0)
    {TRUNK}"""),
    ("state kept", "moe.py", TRUNK, f"""torch.set_grad_enabled(False)
    {TRUNK}"""),
    ("another definition", "moe.py", TRUNK, f"""{TRUNK}
    with torch.no_grad():                   # as many as the gates divide it by
        for number in sparse.moe_blocks:
            mlp = dense.blocks[number - 1].mlp
            mlp.fc_out.weight.mul_(sparse.blocks[number - 1].mlp.router.k)"""),
]
