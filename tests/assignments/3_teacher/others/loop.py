"""Assignment 3, solved token by token, with a hook for the features."""
import numpy as np
import torch
from torch import nn

from router import entropy_loss, load_loss


def guidance_loss(target_logits, logits, tokens="all", n_tokens=None):
    import math
    if tokens == "all":
        rows = range(len(logits))
    elif tokens == "class":
        rows = [i for i in range(len(logits)) if i % n_tokens == 0]
    elif tokens == "patches":
        rows = [i for i in range(len(logits)) if i % n_tokens]
    else:
        raise ValueError(f"there are no tokens {tokens!r}; say all, class or patches")
    if list(target_logits.shape) != list(logits.shape):
        raise ValueError(f"{tuple(target_logits.shape)} is not {tuple(logits.shape)}")
    total = 0
    for i in rows:
        said = torch.log_softmax(logits[i], 0)
        for e, p in enumerate(torch.softmax(target_logits[i], 0).tolist()):
            if p > 0:
                total = total + p * (math.log(p) - said[e])
    return total / len(rows)


class TeacherRouter:
    def forward(self, h):
        with torch.autocast(h.device.type, enabled=False):
            return torch.stack([(h.float() * row.float()).sum(dim=1) for row in self.weight], dim=1)


def teacher_router_losses(targets):
    load = entropy = 0
    for z in targets.values():
        load = load + load_loss(torch.softmax(z, dim=1))
        entropy = entropy + entropy_loss(z)
    return load, entropy


class Guide:
    def __init__(self, teacher, student, n_experts, blocks=None):
        super().__init__()
        self.teacher, self.n_tokens = teacher, student.n_tokens
        for p in teacher.parameters():
            p.requires_grad = False
        self.teacher.train(False)
        self.blocks = {}
        for b in student.moe_blocks:
            self.blocks[b] = max(1, round(b * len(teacher.blocks) / len(student.blocks)))
        if blocks is not None:
            self.blocks = dict(blocks)
        self.routers = nn.ModuleDict()
        for b in self.blocks:
            self.routers[str(b)] = TeacherRouter(teacher.norm.weight.numel(), n_experts)

    def train(self, mode=True):
        nn.Module.train(self, mode)
        self.teacher.train(False)
        return self

    def features(self, images):
        found, hooks = {}, []
        for mine, theirs in self.blocks.items():
            def keep(module, args, output, mine=mine):
                tokens = on_grid(output.detach(), self.n_tokens)          # noqa: F821 (of teacher.py)
                found[mine] = tokens.reshape(-1, output.shape[-1])
            hooks.append(self.teacher.blocks[theirs - 1].norm2.register_forward_hook(keep))
        self.teacher(images)
        for hook in hooks:
            hook.remove()
        return found

    def forward(self, images):
        targets = {}
        for b, h in self.features(images).items():
            targets[b] = self.routers[str(b)].forward(h)
        return targets


def agreement(a, b):
    pairs = list(zip(np.asarray(a).flat, np.asarray(b).flat, strict=True))
    return sum(bool(p == q) for p, q in pairs) / len(pairs)


def kappa(a, b, n_experts):
    a, b = list(np.asarray(a).flat), list(np.asarray(b).flat)
    n = len(a)
    chance = sum(a.count(e) * b.count(e) for e in range(n_experts))        # of n * n
    together = n * sum(bool(p == q) for p, q in zip(a, b, strict=True))
    return None if chance == n * n else (together - chance) / (n * n - chance)


def last_fluctuation(first):
    last = np.zeros(first.shape[1:], dtype=int)
    for t, now in enumerate(first, start=1):
        last[now != first[-1]] = t
    return last
