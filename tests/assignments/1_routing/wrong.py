"""What students get wrong in assignment 1: (kind, file, what stands there, what they write).

selftest.py says which kinds there are, and wants each noticed by a check, in words.
"""
NOISE = "noisy = logits + torch.randn_like(logits) * (self.noise / self.n_experts)"
SORT = "order = noisy.sort(dim=-1, descending=True, stable=True).indices"
RETURN = "return Routing(chosen, gates, probs, logits, dropped)"
SHARE = "f = over_all_tokens(F.one_hot(chosen, E).sum(dim=(0, 1)) / chosen.numel())"

WRONG = [
    # TopKRouter.route
    ("detached", "router.py", "probs = logits.softmax(dim=-1)",
     "probs = logits.softmax(dim=-1).detach()"),
    ("detached", "router.py", RETURN,
     "return Routing(chosen, gates, probs, logits.detach(), dropped)"),
    ("detached", "router.py", NOISE, f"""with torch.no_grad():
                {NOISE}"""),
    ("detached", "router.py", NOISE,        # which has no gradient for its mean
     "noisy = torch.normal(logits, self.noise / self.n_experts)"),
    ("detached", "router.py", "gates = gates * served", "gates = gates.detach() * served"),
    ("input changed", "router.py", NOISE,
     "noisy = logits.add_(torch.randn_like(logits) * (self.noise / self.n_experts))"),
    ("input changed", "router.py", "gates = kept.softmax(dim=-1)",
     """hidden = torch.ones_like(noisy).scatter(1, chosen, 0).bool()
            gates = noisy.masked_fill_(hidden, -torch.inf).softmax(dim=-1).gather(1, chosen)"""),
    ("grad wiped", "router.py", "probs = logits.softmax(dim=-1)", """self.zero_grad()
        probs = logits.softmax(dim=-1)"""),
    ("state kept", "router.py", "dropped = (~served).sum()",
     'self.lost = dropped = getattr(self, "lost", 0) + (~served).sum()'),
    ("state kept", "router.py", NOISE,
     """if getattr(self, "stirred", logits[:0]).shape != logits.shape:
                self.stirred = torch.randn_like(logits)
            noisy = logits + self.stirred * (self.noise / self.n_experts)"""),
    ("state kept", "router.py", RETURN, f"""self.history = [*getattr(self, "history", []), gates]
        {RETURN}"""),
    ("random state", "router.py", f"""if self.training and self.noise > 0:
            {NOISE}""", """if self.noise > 0:
            stir = torch.randn_like(logits) * (self.noise / self.n_experts)
            noisy = logits + stir if self.training else logits"""),
    ("random state", "router.py", NOISE,
     """dice = TopKRouter.dice = getattr(TopKRouter, "dice", torch.Generator().manual_seed(0))
            noisy = logits + torch.randn(
                logits.shape, generator=dice, dtype=logits.dtype, device=logits.device
                ) * (self.noise / self.n_experts)"""),
    ("random state", "router.py", SORT,
     "order = (noisy + 1e-12 * torch.rand_like(noisy)).sort(dim=-1, descending=True).indices"),
    ("one size only", "router.py", "gates = kept.softmax(dim=-1)",
     """first = (kept[:, :1] - kept[:, 1:2]).sigmoid()
            gates = torch.cat([first, 1 - first], dim=1)"""),
    ("one size only", "router.py", RETURN,
     "return Routing(chosen, gates.squeeze(), probs, logits, dropped)"),
    ("numerics", "router.py", "gates = noisy.softmax(dim=-1).gather(1, chosen)",
     """power = noisy.exp()
            gates = (power / power.sum(dim=-1, keepdim=True)).gather(1, chosen)"""),
    ("numerics", "router.py", "gates = kept.sigmoid()", "gates = kept.exp() / (1 + kept.exp())"),
    ("numerics", "router.py", SORT,
     """order = (noisy - 1e-6 * torch.arange(self.n_experts, device=noisy.device)).sort(
            dim=-1, descending=True).indices"""),
    ("numerics", "router.py", SORT,
     "order = noisy.softmax(dim=-1).sort(dim=-1, descending=True, stable=True).indices"),
    ("dtype", "router.py", "gates = kept.sigmoid()", "gates = kept.double().sigmoid()"),
    ("device", "router.py", NOISE,
     "noisy = logits + torch.randn(logits.shape) * (self.noise / self.n_experts)"),
    ("another definition", "router.py", NOISE,
     """stir = (torch.rand_like(logits) - 0.5) * math.sqrt(12)
            noisy = logits + stir * (self.noise / self.n_experts)"""),
    ("another definition", "router.py", NOISE,
     "noisy = logits + torch.randn_like(logits[:1]) * (self.noise / self.n_experts)"),
    ("left out", "router.py", "if may_look() and not waits and not",
     "if not self.training and not"),
    ("left out", "router.py", "gates = gates * served",
     "gates = gates * served if self.training else gates"),
    # the losses
    ("input changed", "router.py", "importance = over_all_tokens(probs.mean(dim=0))",
     """probs.div_(probs.sum(dim=1, keepdim=True))
    importance = over_all_tokens(probs.mean(dim=0))"""),
    ("state kept", "router.py", "importance = over_all_tokens(probs.mean(dim=0))",
     """now = probs.mean(dim=0)
    importance = (getattr(load_loss, "before", now) + now) / 2
    load_loss.before = now.detach()"""),
    ("dtype", "router.py", "importance = over_all_tokens(probs.mean(dim=0))",
     "importance = over_all_tokens(probs.double().mean(dim=0))"),
    ("state kept", "router.py", "importance = over_all_tokens(probs.mean(dim=0))",
     """torch.set_default_dtype(torch.float64)
    importance = over_all_tokens(probs.mean(dim=0))"""),
    ("detached", "router.py", "return -(log_p.exp() * log_p)",
     "return -(log_p.exp().detach() * log_p)"),
    ("numerics", "router.py", "return -(log_p.exp() * log_p)",
     "return -(log_p.exp() * (log_p.exp() + 1e-9).log())"),
    ("input changed", "router.py", "log_p = logits.log_softmax(dim=-1)",
     """logits.data.nan_to_num_()
    log_p = logits.log_softmax(dim=-1)"""),
    ("another definition", "router.py", "log_p = logits.log_softmax(dim=-1)",
     "log_p = logits.softmax(dim=-1).mean(dim=0, keepdim=True).log()"),
    ("state kept", "router.py", SHARE, """counts = getattr(balance_loss, "counts", {})
    balance_loss.counts = {chosen.shape: F.one_hot(chosen, E).sum(dim=(0, 1))} | counts
    f = balance_loss.counts[chosen.shape] / chosen.numel()"""),
    ("one size only", "router.py", SHARE,
     "f = over_all_tokens(F.one_hot(chosen, E).sum(dim=(0, 1)) / (2 * len(chosen)))"),
    ("device", "router.py", SHARE,
     "f = (chosen[..., None] == torch.arange(E)).sum(dim=(0, 1)) / chosen.numel()"),
    ("another definition", "router.py", SHARE,
     "f = F.one_hot(probs.topk(chosen.shape[1]).indices, E).sum(dim=(0, 1)) / chosen.numel()"),
    ("numerics", "router.py", "return logits.logsumexp(dim=-1).square().mean()",
     """top = logits.max()
    return ((logits - top).exp().sum(dim=-1).log() + top).square().mean()"""),
    ("numerics", "router.py", "return logits.logsumexp(dim=-1).square().mean()",
     "return logits.nan_to_num().logsumexp(dim=-1).square().mean()"),
    ("input changed", "router.py", "return logits.logsumexp(dim=-1).square().mean()",
     """top = logits.amax(dim=-1, keepdim=True)
    return (logits.sub_(top).exp().sum(dim=-1).log() + top[:, 0]).square().mean()"""),
    ("grad wiped", "router.py", "return logits.logsumexp(dim=-1).square().mean()",
     "return logits.requires_grad_().logsumexp(dim=-1).square().mean()"),
]
