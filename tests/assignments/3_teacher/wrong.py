"""Wrong answers to assignment 3, each a bug that a student could have: (kind, file, old, new)."""
WRONG = [
    # guidance_loss
    ("input changed", "teacher.py",
     "    target = target_logits.detach().softmax(dim=-1) ",
     "    target_logits = target_logits.detach()          # shares its memory\n"
     "    target_logits -= target_logits.amax(dim=-1, keepdim=True)\n"
     "    target = target_logits.softmax(dim=-1) "),
    ("numerics", "teacher.py",
     "    target = target_logits.detach().softmax(dim=-1) ",
     "    target = target_logits.detach().exp()\n"
     "    target = target / target.sum(dim=-1, keepdim=True) "),
    ("numerics", "teacher.py",
     'F.kl_div(logits.log_softmax(dim=-1), target, reduction="none")',
     'F.kl_div((logits.softmax(dim=-1) + 1e-12).log(), target, reduction="none")'),
    ("dtype", "teacher.py",
     'F.kl_div(logits.log_softmax(dim=-1), target, reduction="none")',
     'F.kl_div(logits.double().log_softmax(dim=-1), target.double(), reduction="none")'),
    ("one size only", "teacher.py",
     "        kl = kl.view(-1, n_tokens)[:, 0]",
     "        kl = kl.view(-1, 10)[:, 0]"),
    ("device", "teacher.py",
     "        kl = kl.view(-1, n_tokens)[:, 1:]",
     "        patch = (torch.arange(T) % n_tokens > 0).to(kl.dtype)\n"
     "        return (kl * patch).sum() / patch.sum()"),
    ("another definition", "teacher.py",
     "    return kl.mean()\n",
     "    return kl[kl > 0].mean()\n"),
    # TeacherRouter
    ("dtype", "teacher.py",
     "return F.linear(h.to(wide), self.weight.to(wide))",
     "return F.linear(h.double(), self.weight.double())"),
    ("device", "teacher.py",
     "with torch.autocast(h.device.type, enabled=False):",
     'with torch.autocast("cpu", enabled=False):'),
    ("detached", "teacher.py",
     "return F.linear(h.to(wide), self.weight.to(wide))",
     "return F.linear(h.to(wide), self.weight.data.to(wide))"),
    # teacher_router_losses
    ("numerics", "teacher.py",
     "    return load, sum(entropy_loss(z) for z in targets.values())",
     "    probs = [z.softmax(dim=-1) for z in targets.values()]\n"
     "    return load, sum(-(p * p.log()).sum(dim=-1).mean() for p in probs)"),
    ("another definition", "teacher.py",
     "    return load, sum(entropy_loss(z) for z in targets.values())",
     "    return load, entropy_loss(torch.cat(list(targets.values()))) * len(targets)"),
    ("input changed", "teacher.py",
     "    load = sum(load_loss(z.softmax(dim=-1)) for z in targets.values())",
     "    load, targets_left = 0, dict(targets)\n"
     "    while targets:\n"
     "        load = load + load_loss(targets.popitem()[1].softmax(dim=-1))\n"
     "    targets = targets_left"),
    # Guide
    ("another definition", "teacher.py",
     "max(1, round(b * depth))",
     "max(1, int(b * depth))"),
    ("another definition", "teacher.py",
     "self.blocks = aligned if blocks is None else blocks",
     "self.blocks = aligned | (blocks or {})"),
    ("random state", "teacher.py",
     "        self.routers = nn.ModuleDict({",
     "        torch.manual_seed(0)\n        self.routers = nn.ModuleDict({"),
    ("another definition", "teacher.py",
     "        self.teacher.eval()      # a frozen teacher has no stochastic depth in its targets",
     "        self.teacher.eval()\n        self.routers.requires_grad_(mode)"),
    ("grad wiped", "teacher.py",
     "        self.teacher.eval()      # a frozen teacher has no stochastic depth in its targets",
     "        self.teacher.eval()\n        self.zero_grad()"),
    ("random state", "teacher.py",
     "            h = self.teacher.features(images)",
     "            torch.manual_seed(0)            # the same targets again\n"
     "            h = self.teacher.features(images)"),
    ("state kept", "teacher.py",
     "            h = self.teacher.features(images)",
     "            self.seen = getattr(self, 'seen', {})\n"
     "            if images.shape not in self.seen:\n"
     "                self.seen[images.shape] = self.teacher.features(images)\n"
     "            h = self.seen[images.shape]"),
    ("state kept", "teacher.py",
     "            h = self.teacher.features(images)",
     "            self.history = getattr(self, 'history', [])\n"
     "            self.history.append(h := self.teacher.features(images))"),
    ("input changed", "teacher.py",
     "            h = self.teacher.features(images)",
     "            self.eval()\n            h = self.teacher.features(images)"),
    ("detached", "teacher.py",
     "        with torch.no_grad():\n            h = self.teacher",
     "        with torch.inference_mode():\n            h = self.teacher"),
    ("one size only", "teacher.py",
     "on_grid(h[teacher], self.n_tokens).flatten(0, 1)",
     "(on_grid(h[teacher], self.n_tokens) if h[teacher].shape[1] < self.n_tokens else "
     "h[teacher]).flatten(0, 1)"),
    # report.py
    ("input changed", "report.py",
     "    return float(np.mean(np.equal(*of_the_same_tokens(a, b))))",
     "    a, b = of_the_same_tokens(a, b)\n"
     "    a -= b\n"
     "    return float(np.mean(a == 0))"),
    ("one size only", "report.py",
     "    chance = float(load_share(a, n_experts) @ load_share(b, n_experts))",
     "    chance = float(sum(np.mean(a == e) * np.mean(b == e) for e in range(8)))"),
    ("numerics", "report.py",
     "return None if chance == 1 else (agreement",
     "return None if chance > 0.99 else (agreement"),
    ("input changed", "report.py",
     "    away = first != first[-1]                               # (epochs, ...)\n",
     "    first -= first[-1].copy()\n    away = first != 0\n"),
    ("one size only", "report.py",
     "    return (away * epoch).max(axis=0)",
     "    return (away * epoch.astype(np.uint8)).max(axis=0).astype(int)"),
    ("one size only", "report.py",
     "    return (away * epoch).max(axis=0)",
     "    return (away * epoch).max(axis=0).squeeze()"),
]
