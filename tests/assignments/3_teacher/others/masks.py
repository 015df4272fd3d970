"""Assignment 3, solved with masks, einsum, log-targets and another first weight."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def guidance_loss(target_logits, logits, tokens="all", n_tokens=None):
    if tokens not in {"all", "class", "patches"}:
        raise ValueError(f"{tokens!r}?")
    if target_logits.shape != logits.shape:
        raise ValueError(f"shapes {tuple(target_logits.shape)}, {tuple(logits.shape)}")
    place = torch.arange(len(logits)) % (n_tokens or len(logits) + 1)
    mask = {"all": place >= 0, "class": place == 0, "patches": place > 0}[tokens]
    t = target_logits.detach()[mask].log_softmax(dim=1)
    log_p = logits[mask].log_softmax(dim=1)
    # with log_target, 0 log 0 would be NaN; exp of the smallest finite log is 0 as well
    t = t.clamp(min=torch.finfo(t.dtype).min)
    return F.kl_div(log_p, t, reduction="batchmean", log_target=True)


class TeacherRouter:
    def forward(self, h):
        with torch.autocast(h.device.type, enabled=False):
            return torch.einsum("td,ed->te", h.to(torch.float32), self.weight)


def teacher_router_losses(targets):
    load, entropy = [], []
    for z in targets.values():
        importance = z.softmax(dim=1).sum(dim=0)
        load.append(len(importance) * importance.square().sum() / importance.sum().square() - 1)
        log_p = z.log_softmax(dim=1)
        entropy.append(torch.einsum("te,te->t", log_p.exp(), -log_p).mean())
    return torch.stack(load).sum(), torch.stack(entropy).sum()


class Guide:
    def __init__(self, teacher, student, n_experts, blocks=None):
        nn.Module.__init__(self)
        self.wanted = student.n_tokens
        for module in teacher.modules():
            module.training = False
            module.requires_grad_(False)
        self.teacher = teacher
        if blocks is None:
            ratio = len(teacher.blocks) / len(student.blocks)
            blocks = dict(zip(student.moe_blocks, torch.tensor(
                [b * ratio for b in student.moe_blocks], dtype=torch.float64)
                .round().clamp(min=1).long().tolist(), strict=True))
        self.blocks = blocks
        width = teacher.pos.shape[-1]
        self.routers = nn.ModuleDict((f"{b}", TeacherRouter(width, n_experts)) for b in blocks)
        for router in self.routers.values():
            nn.init.orthogonal_(router.weight, gain=0.1)

    def train(self, mode=True):
        super().train(mode)
        for module in self.teacher.modules():
            module.training = False
        return self

    def features(self, images):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            output = self.teacher.eval().forward(images)
        finally:
            torch.set_grad_enabled(before)
        h = {b: output.layers[self.blocks[b]].h.unflatten(0, (len(images), -1))
             for b in self.blocks}
        fit = on_grid                                               # noqa: F821 (of teacher.py)
        return {b: fit(tokens, self.wanted).flatten(0, 1) for b, tokens in h.items()}

    def forward(self, images):
        h = self.features(images)
        return {b: self.routers[str(b)](h[b]) for b in h}


def agreement(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return 1 - np.count_nonzero(a - b) / a.size


def kappa(a, b, n_experts):
    table = np.zeros((n_experts, n_experts))
    np.add.at(table, (np.ravel(a), np.ravel(b)), 1)
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    n = table.sum()
    chance = rows @ columns / n ** 2
    if chance >= 1:
        return None
    return float((np.trace(table) / n - chance) / (1 - chance))


def last_fluctuation(first):
    # from the end: how many epochs already had the final expert?
    settled = np.cumprod((first == first[-1])[::-1], axis=0).sum(axis=0)
    return len(first) - settled
