"""Wrong answers to assignment 4, each a bug that a student could have: (kind, file, old, new)."""
WRONG = [
    # mutual_distillation_loss
    ("input changed", "distill.py",
     "    return raw.var(dim=1, correction=0).mean()",
     "    raw -= raw.mean(dim=1, keepdim=True)\n    return raw.square().mean()"),
    ("detached", "distill.py",
     "        return F.mse_loss(raw[:, 0], raw[:, 1])",
     "        return F.mse_loss(raw[:, 0].detach(), raw[:, 1])"),
    ("random state", "distill.py",
     "    return raw.var(dim=1, correction=0).mean()",
     "    raw = raw[torch.randperm(len(raw))[:4096]]          # enough tokens for a mean\n"
     "    return raw.var(dim=1, correction=0).mean()"),
    ("one size only", "distill.py",
     "    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))",
     "    raw = raw.squeeze().to(torch.promote_types(raw.dtype, torch.float32))"),
    ("dtype", "distill.py",
     "        return raw.new_zeros(())",
     "        return torch.zeros((), dtype=torch.float64)"),
    ("another definition", "distill.py",
     "    return raw.var(dim=1, correction=0).mean()",
     "    return sum(F.mse_loss(raw[:, i], raw.sum(dim=1).sub(raw[:, i]) / (K - 1)) "
     "for i in range(K)) / K"),
    # domains, class_domains
    ("input changed", "distill.py",
     "    return probs.view(-1, n_tokens, probs.shape[1]).mean(dim=1).argmax(dim=1)",
     "    total = probs[::n_tokens]\n"
     "    for i in range(1, n_tokens):\n"
     "        total += probs[i::n_tokens]\n"
     "    return total.argmax(dim=1)"),
    ("numerics", "distill.py",
     ".mean(dim=1).argmax(dim=1)",
     ".mean(dim=1).sub(1e-6 * torch.arange(probs.shape[1])).argmax(dim=1)"),
    ("one size only", "distill.py",
     "    return probs.view(-1, n_tokens, probs.shape[1]).mean(dim=1).argmax(dim=1)",
     "    return probs.view(-1, n_tokens, probs.shape[1]).mean(dim=1).squeeze().argmax(dim=-1)"),
    ("one size only", "distill.py",
     "    count = torch.zeros(n_experts, n_classes, dtype=torch.int64)",
     "    count = torch.zeros(domain.max() + 1, n_classes, dtype=torch.int64)"),
    ("input changed", "distill.py",
     "    count.index_put_((domain.cpu(), labels.cpu()), torch.tensor(1), accumulate=True)",
     "    domain *= n_classes\n    domain += labels\n"
     "    count = torch.bincount(domain, minlength=count.numel()).view_as(count)"),
    # forced
    ("dtype", "distill.py",
     "return Routing(chosen, torch.ones_like",
     "return Routing(chosen.int(), torch.ones_like"),
    ("dtype", "distill.py",
     "torch.ones_like(chosen, dtype=torch.float32)",
     "torch.ones_like(chosen, dtype=torch.float64)"),
    ("device", "distill.py",
     "    chosen = torch.full((n_tokens, 1), expert, device=device)",
     "    chosen = torch.full((n_tokens, 1), expert)"),
    ("state kept", "distill.py",
     "    chosen = torch.full((n_tokens, 1), expert, device=device)",
     "    made = forced.__dict__.setdefault(expert, torch.full((n_tokens, 1), expert))\n"
     "    chosen = made.to(device)"),
    # probe
    ("grad wiped", "distill.py",
     "    with evaluating(vit):\n        return",
     "    with evaluating(vit):\n        vit.zero_grad()\n        return"),
    ("input changed", "distill.py",
     "    with evaluating(vit):\n        return",
     "    with evaluating(vit.requires_grad_(False)):         # frozen\n        return"),
    ("random state", "distill.py",
     "    with evaluating(vit):\n        return",
     "    torch.manual_seed(0)\n    with evaluating(vit):\n        return"),
    ("device", "distill.py",
     "{block: forced(i, T, E, images.device)}",
     "{block: forced(i, T, E)}"),
    # the measures
    ("numerics", "distill.py",
     "    return correct.float() @ inside / inside.sum(dim=0)",
     "    return (correct.half() @ inside.half() / inside.sum(dim=0)).float()"),
    ("input changed", "distill.py",
     '    off = A.masked_fill(torch.eye(len(A), dtype=torch.bool, device=A.device), float("nan"))\n'
     "    return A.diagonal(), ",
     "    own = A.diagonal().clone()\n"
     '    off = A.fill_diagonal_(float("nan"))\n'
     "    return own, "),
    ("another definition", "distill.py",
     "    return A.diagonal(), off.nanmean(dim=1)",
     "    return A.diagonal(), off.nansum(dim=1) / (len(A) - 1)"),
    ("another definition", "distill.py",
     "    hit = correct.gather(0, domain[None])[0]                            # (B,)",
     "    hit = correct.long().argmax(dim=0) == domain"),
    # expert_gradient_norms, narrow_vision
    ("grad wiped", "distill.py",
     "        grads = torch.autograd.grad(loss, weights)",
     "        vit.zero_grad()\n            loss.backward()\n"
     "            grads = [w.grad for w in weights]\n            vit.zero_grad()"),
    ("input changed", "distill.py",
     "    norms = []\n",
     "    vit.requires_grad_(False)               # the gradient of these alone\n"
     "    for w in weights:\n        w.requires_grad_()\n    norms = []\n"),
    ("numerics", "distill.py",
     "F.cross_entropy(vit(image[None]).logits, label[None])",
     "F.nll_loss(vit(image[None]).logits.softmax(dim=1).log(), label[None])"),
    ("one size only", "distill.py",
     "    return torch.stack(norms)\n",
     "    return torch.stack(norms).squeeze()\n"),
    ("input changed", "distill.py",
     "    return norms.sum(dim=0) / norms.sum()",
     "    norms /= norms.sum()\n    return norms.sum(dim=0)"),
]
