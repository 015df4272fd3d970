"""probes.py -- what is asked of a trained model?

Are its experts alike? Does the task teach its router what all experts would? Does its gate choose
experts that are right? Whom does an expert serve? study.py asks `closing_look` after every run, the
notebooks ask single questions. Whose measure it is stands beside it, or in distill.py.
"""
import base64
import math

import numpy as np
import torch
import torch.nn.functional as F

import distill
import report
import train
from moe import check_blocks, routers
from notebooks.controls import dispatch
from notebooks.decided import SEVERAL

PROBED = 2_000      # test images on which every expert is forced in turn
MOVED = 128         # test images whose tokens are sent elsewhere, one at a time


@torch.no_grad()
def expert_similarity(moe, h):
    """Mean cosine of two experts' outputs for one token, over all pairs and tokens (ours).

    h (T, D) is the input of the layer `moe`. None where a lone expert has no pair.
    """
    E = len(moe.experts.w_in)
    if E == 1:
        return None
    f = F.normalize(moe.experts.batched(h.expand(E, *h.shape)), dim=-1)     # (E, T, D)
    pairs = f.sum(dim=0).square().sum(dim=-1) - E                       # (T,) each pair twice
    return (pairs / (E * (E - 1))).mean().item()


def oracle_cosine(student, images, labels, block, draws=1, also=None):
    """Cosine of a router's gradient with the one that it would get if it saw every expert (ours).

    The oracle keeps dL/dy of the sparse pass and puts all experts into the formula of the same
    gate. Gradients are of the task loss, with respect to the router's weight (E, D), each the sum
    over `draws` passes; also(output, block) is a loss that the router learns from beside it, and
    the oracle does not. None where the router's gradient is 0.
    """
    check_blocks("block", [block], routers(student))
    moe, seen = student.blocks[block - 1].mlp, {}
    if not getattr(moe, "has_oracle", True):                # a remedy without such a gate
        return None
    hook = moe.register_forward_hook(lambda m, x, out: seen.update(x=x[0], y=out[0]))
    totals = torch.zeros(2, *moe.router.weight.shape, dtype=moe.router.weight.dtype)
    for _ in range(draws):
        output = student(images)
        task = F.cross_entropy(output.logits, labels)
        loss = task + also(output, block) if also else task
        sparse, = torch.autograd.grad(loss, [moe.router.weight], retain_graph=True,
                                      allow_unused=True)
        dy, = torch.autograd.grad(task, [seen["y"]])
        if sparse is None:
            break
        h, dy = (v.detach().flatten(0, 1) for v in (seen["x"], dy))     # (T, D) both
        with torch.no_grad():
            f = moe.experts.batched(h.expand(len(moe.experts.w_in), *h.shape))      # (E, T, D)
            q = torch.einsum("td,etd->te", dy, f)                       # what each expert is worth
        logits = F.linear(h, moe.router.weight)                         # (T, E)
        gates = logits.sigmoid() if moe.router.gate == "sigmoid" else logits.softmax(dim=-1)
        dense, = torch.autograd.grad((gates * q).sum(), moe.router.weight)
        totals += torch.stack([sparse, dense]).cpu()
    hook.remove()
    sparse, dense = totals.flatten(1)
    return F.cosine_similarity(sparse, dense, dim=0).item() if sparse.any() else None


@torch.no_grad()
def probe_experts(student, images, labels, block):
    """Force each expert on all images, and judge it on the domains of the model's own gate.

    Returns own-domain, other-domain and gate accuracy, 0 to 1, as distill.py defines them, the
    first two also where tokens keep their gates, and the mean accuracy of blind gates, each of
    which asks one expert about every image (ours).
    """
    parts = list(zip(images.split(500), labels.split(500), strict=True))
    with distill.evaluating(student):
        correct, kept = (torch.cat([ask(student, *part, block) for part in parts], dim=1)
                         for ask in (distill.probe, probe_keeping_gates))       # (E, B) both
        probs = torch.cat([student(x).layers[block].routing.probs for x, _ in parts])
    domain = distill.domains(probs, student.n_tokens)
    own, others = distill.own_and_others(distill.accuracy_matrix(correct, domain))
    own_kept, others_kept = distill.own_and_others(distill.accuracy_matrix(kept, domain))
    found = {"own": own.nanmean().item(), "others": others.nanmean().item(),
             "own_kept": own_kept.nanmean().item(), "others_kept": others_kept.nanmean().item(),
             "gate_accuracy": distill.gate_accuracy(correct, domain),
             "blind": np.mean([distill.gate_accuracy(correct, torch.full_like(domain, e))
                               for e in range(len(correct))]).item()}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


@torch.no_grad()
def probe_keeping_gates(student, images, labels, block):
    """`distill.probe`, (E, B) bool, but each token's expert has what its own gates sum to (ours).

    A gate of 1 is more than K < E gates of softmax_topk sum to: it makes a block louder than it is.
    """
    routing = student(images).layers[block].routing
    gates = routing.gates.sum(dim=1, keepdim=True)                              # (T, 1)
    correct = []
    for e in range(routing.probs.shape[1]):
        asked = routing._replace(chosen=torch.full_like(routing.chosen[:, :1], e), gates=gates)
        correct.append(student(images, {block: asked}).logits.argmax(dim=1) == labels)
    return torch.stack(correct)


@torch.no_grad()
def forced_losses(student, images, labels, block, tokens=None):
    """Each image's loss when one of its tokens visits expert e in `block`, all else as it is.

    (B, n, E) for the n `tokens`, by default all, of a model with K = 1; the token keeps its gate.
    """
    routing, N = student(images).layers[block].routing, student.n_tokens
    tokens, E = range(N) if tokens is None else tokens, routing.probs.shape[1]
    losses = torch.empty(len(images), len(tokens), E, device=images.device)
    for i, n in enumerate(tokens):
        for e in range(E):
            chosen = routing.chosen.view(-1, N).clone()
            chosen[:, n] = e
            logits = student(images, {block: routing._replace(chosen=chosen.view(-1, 1))}).logits
            losses[:, i, e] = F.cross_entropy(logits, labels, reduction="none")
    return losses


def worth_of_choice(losses, chosen):
    """What the router's choice takes off the loss, over what the best of all experts would (ours).

    0 is a blind choice, 1 the best in hindsight. losses (B, n, E) as above, chosen (B, n). None
    where no expert makes a difference that float32 can tell.
    """
    behind = losses - losses.min(dim=2, keepdim=True).values            # (B, n, E) the best one
    blind, own = behind.mean(dim=2), behind.gather(2, chosen[..., None])[..., 0]
    best = blind.mean().item()
    return (blind - own).mean().item() / best if best > 1e-6 else None


def worth_of_choices(student, images, labels, block):
    """`worth_of_choice` of a block's router; behind the last block only the class token is read."""
    tokens = [0] if block == len(student.blocks) else range(student.n_tokens)
    with torch.no_grad():
        chosen = student(images).layers[block].routing.chosen.view(-1, student.n_tokens)
    return worth_of_choice(forced_losses(student, images, labels, block, tokens),
                           chosen[:, list(tokens)])


def mutual_information(counts):
    """I(row; column) in nats of a table of counts (R, C): what the one tells of the other."""
    if counts.ndim != 2 or not counts.min(initial=0) >= 0 or not counts.sum() > 0:
        raise ValueError(f"counts must be a table (R, C) that counts something, not {counts.shape} "
                         f"with the sum {counts.sum()}")
    joint = counts / counts.sum()
    alone = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0                                        # 0 log 0 = 0
    return float((joint[seen] * np.log(joint[seen] / alone[seen])).sum())


@torch.no_grad()
def what_experts_tell(job, control=None):
    """What a patch's expert tells of its place and of its image's class, as shares of the most that
    it could tell (ours): means over the sparse blocks, on test or held-out images.

    Of K > 1 experts the first is asked. Empty where a patch has no first one.
    """
    cfg, data, sets, student, _ = job
    if cfg.method in ("dense", "soft") or control in SEVERAL:
        return {}
    images, labels = ((sets.val or sets.test)[i][:PROBED] for i in (0, 1))
    chosen = [{b: out.layers[b].routing.chosen[:, 0] for b in student.moe_blocks}
              for out in train.outputs(student, images, cfg, data)]
    E, told = cfg.n_experts, {"place_information": [], "class_information": []}
    for b in student.moe_blocks:
        expert = torch.cat([of_some[b] for of_some in chosen])
        expert = expert.view(len(images), -1)[:, 1:].cpu().numpy()              # (B, N - 1)
        of = (np.arange(expert.shape[1])[None], labels.cpu().numpy()[:, None])
        for values, what in zip(told.values(), of, strict=True):
            n = what.max() + 1                              # places, or classes
            counts = np.bincount((what * E + expert).ravel(), minlength=n * E).reshape(n, E)
            values.append(mutual_information(counts) / (math.log(min(n, E)) or 1))
    return {name: report.mean(values) for name, values in told.items()}


def packed(right):
    """Which images (n,) were got right, in as few characters as text allows."""
    return base64.b64encode(np.packbits(right.cpu().numpy())).decode()


def closing_look(job, guide, control, moved=0):
    """What a row of the study says beyond result.json: means over the MoE blocks, in float32.

    It looks at the test images, or with --split val at the held-out ones alone, `moved` of which
    say what the choice of an expert is worth: experts know the images that they were trained on.
    What routers do and hear is asked on the probe images.
    """
    cfg, data, sets, student, _ = job
    exam = sets.val or sets.test
    answers = torch.cat([out.logits.argmax(dim=1)
                         for out in train.outputs(student, exam[0], cfg, data)])
    found = {"hits": packed(answers == exam[1])}
    if cfg.method in ("dense", "soft"):
        return found
    images, labels = data.normalise(exam[0][:PROBED]), exam[1][:PROBED]
    x, y = data.normalise(sets.probe[0]), sets.probe[1]
    blocks = student.moe_blocks
    with torch.no_grad():
        layers = student(x).layers
    routings = {b: layers[b].routing for b in blocks}
    found |= {"similarity": report.mean(
                  expert_similarity(student.blocks[b - 1].mlp, layers[b].h) for b in blocks),
              "oracle_cosine": report.mean(oracle_cosine(student, x, y, b) for b in blocks),
              "class_load_entropy": report.mean(report.load_entropy(report.load_share(
                  r.chosen.view(-1, student.n_tokens, cfg.k)[:, 0].cpu().numpy(), cfg.n_experts))
                  for r in routings.values()),
              # what all chosen experts of a token weigh together
              "mean_gate": report.mean(r.gates.sum(dim=1).mean().item() for r in routings.values()),
              "experts_per_token": report.mean(
                  (r.logits > 0).sum(dim=1).float().mean().item() if control == "relu" else cfg.k
                  for r in routings.values())}
    if guide:                       # the share of tokens that go where it would send them
        with torch.no_grad():
            asked = guide(x)
        found["followed"] = report.mean(
            (routings[b].chosen[:, 0] == z.argmax(dim=1)).float().mean().item()
            for b, z in asked.items())
    found |= what_experts_tell(job, control)
    if moved and control not in SEVERAL:
        found["choice"] = report.mean(
            worth_of_choices(student, images[:moved], labels[:moved], b) for b in blocks)
    if cfg.k > 1:
        probed = [probe_experts(student, images, labels, b) for b in blocks]
        found["probing"] = {name: report.mean(p[name] for p in probed) for name in probed[0]}
    if control == "oracle alone":
        hits = []
        with torch.no_grad():
            for x, y in zip(*(part.split(500) for part in exam), strict=True):
                x = data.normalise(x)
                with train.autocast(cfg, x):
                    logits = student(x, dispatch(student, guide(x))).logits
                hits.append(logits.argmax(dim=1) == y)
        found["oracle_accuracy"] = torch.cat(hits).float().mean().item()
    return found
