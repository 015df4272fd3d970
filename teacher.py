"""teacher.py -- what can a frozen dense model tell a sparse one about routing?

TGR-MoE (arXiv:2604.21330): top-k routing hides the unselected experts from the task loss, so a
light router on a frozen teacher's features sets a target for *all* experts of every token. "Ours"
marks what the paper leaves open and we chose.
"""
import copy
import math
import re
import sys

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.transforms import v2

from data import per_channel, standardise
from moe import MLP, check_blocks, routers
from router import entropy_loss, expect, load_loss


class TeacherRouter(nn.Module):
    """The teacher's features (..., D) -> logits (..., E) that the student's router should come to.

    It is one linear map without a bias (ours). It makes targets and never dispatches a token.
    """

    def __init__(self, dim, n_experts):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        # not zeros: from perfectly even targets, neither of its losses would ever move it
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, h):
        expect("h", h, *h.shape[:-1], self.weight.shape[1])
        wide = torch.promote_types(h.dtype, torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.to(wide), self.weight.to(wide))           # (..., E)


class Guide(nn.Module):
    """A frozen teacher and one `TeacherRouter` per MoE block of the student.

    `guide(images)` sees the images that the student sees, augmented and mixed (ours), and gives
    {student's block number: logits (T, E)}. `blocks` maps a student's block to the teacher's block
    that feeds it, by default the one at the same relative depth. A sparse block that it leaves out
    is not guided. The feature of our ViT is what that block's MLP is given (ours). The teacher is
    frozen in place. It and its routers are dropped at inference. A dense student has no routers but
    may have heads, as in notebooks/controls.py.

    A teacher is a module with `dims`, {block: D}, and `features(images)`, {block: (B, N, D)} with
    the class token first: a `ViT` or a `Pretrained`. N may differ from the student's.

    The paper's controls are compositions: an untrained ViT as `teacher`,
    `guide.routers.requires_grad_(False)`, `blocks={5: 9, 7: 9, 9: 9}`, centroids copied into a
    router's `weight`, or oracle dispatch, `student(images, {block: router.route(z.detach())})`.
    """

    def __init__(self, teacher, student, n_experts, blocks=None):
        super().__init__()
        if getattr(teacher, "image_size", student.image_size) != student.image_size:
            raise ValueError(f"the teacher sees images of {teacher.image_size} pixels and the "
                             f"student of {student.image_size}: give both the same --image_size")
        self.teacher, self.n_tokens = teacher.requires_grad_(False).eval(), student.n_tokens
        depth = len(teacher.dims) / len(student.blocks)
        aligned = {b: max(1, round(b * depth)) for b in student.moe_blocks}
        self.blocks = aligned if blocks is None else blocks
        own = routers(student) or {b: None for b, block in enumerate(student.blocks, start=1)
                                   if blocks or isinstance(block.mlp, MLP)}
        check_blocks("a student's blocks", self.blocks, own)
        check_blocks("a teacher's", set(self.blocks.values()), teacher.dims)
        if any(own[b] and own[b].n_experts != n_experts for b in self.blocks):
            raise ValueError(f"n_experts cannot be {n_experts}: the student's routers have others")
        self.routers = nn.ModuleDict({str(b): TeacherRouter(teacher.dims[its], n_experts)
                                      for b, its in self.blocks.items()})

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()      # a frozen teacher has no stochastic depth in its targets
        return self

    def features(self, images):
        """The teacher's features at the aligned blocks, {student's block number: h (T, D)}."""
        with torch.no_grad():
            h = self.teacher.features(images)
            return {student: on_grid(h[teacher], self.n_tokens).flatten(0, 1)
                    for student, teacher in self.blocks.items()}

    def forward(self, images):
        return {b: self.routers[str(b)](h) for b, h in self.features(images).items()}


def on_grid(h, n_tokens):
    """Tokens (B, N, D), class token first, on the grid of n_tokens: a finer one is averaged over
    the patches that it cuts smaller, a coarser one is interpolated between their centres (ours)."""
    if h.shape[1] == n_tokens:
        return h
    side, wanted = math.isqrt(h.shape[1] - 1), math.isqrt(n_tokens - 1)
    grid = rearrange(h[:, 1:], "b (h w) d -> b d h w", h=side)
    grid = F.adaptive_avg_pool2d(grid, wanted) if side > wanted else F.interpolate(
        grid, size=(wanted, wanted), mode="bilinear", align_corners=False)
    return torch.cat([h[:, :1], rearrange(grid, "b d h w -> b (h w) d")], dim=1)


def guidance_loss(target_logits, logits, tokens="all", n_tokens=None):
    """KL(stopgrad(p_teacher) || p), averaged over tokens, from two logits (T, E) (TGR-MoE).

    Its gradient on the student's logits is (p - p_teacher) / T: an entry for every expert, selected
    or not. With `tokens` "class" or "patches", only that part of each image's `n_tokens` tokens
    counts. The paper can be read in more than one way; "all" is ours.
    """
    if tokens not in ("all", "class", "patches"):
        raise ValueError(f"tokens cannot be {tokens!r}: choose all, class or patches")
    if target_logits.shape != logits.shape:
        raise ValueError(f"the teacher's logits are {tuple(target_logits.shape)} and the student's "
                         f"{tuple(logits.shape)}: both need the same tokens and experts")
    T, _ = expect("logits", logits, "T", "E")
    if tokens != "all" and (not n_tokens or n_tokens < 2 or T % n_tokens):
        raise ValueError(f"{T} tokens are no images of n_tokens={n_tokens}: a class token, patches")
    target = target_logits.detach().softmax(dim=-1)                     # (T, E)
    # F.kl_div knows that 0 log 0 = 0, so a teacher may give an expert no probability at all
    kl = F.kl_div(logits.log_softmax(dim=-1), target, reduction="none").sum(dim=-1)    # (T,)
    if tokens == "class":
        kl = kl.view(-1, n_tokens)[:, 0]
    elif tokens == "patches":
        kl = kl.view(-1, n_tokens)[:, 1:]
    return kl.mean()


def teacher_router_losses(targets):
    """(L_load, L_ent) of the teacher routers, each summed over {block: logits (T, E)} (TGR-MoE).

    L_ent asks for a sure choice for every token, L_load for an even load over all tokens. To have
    both, a teacher router must cluster the frozen features: it maximises the mutual information of
    token and expert. No task loss enters.
    """
    if not targets:
        raise ValueError("there are no targets: guide at least one block")
    load = sum(load_loss(z.softmax(dim=-1)) for z in targets.values())
    return load, sum(entropy_loss(z) for z in targets.values())


# --- a teacher that somebody else has trained ---

FAMILIES = {    # of torchvision: the names of its blocks, the node of one that is taken, its axes
    "resnet": (r"layer\d\.\d+", "", "b d h w"),
    "resnext": (r"layer\d\.\d+", "", "b d h w"),
    "wide_resnet": (r"layer\d\.\d+", "", "b d h w"),
    "convnext": (r"features\.\d\.\d+", "", "b d h w"),
    "efficientnet": (r"features\.\d\.\d+", "", "b d h w"),
    # a Transformer's is the MLP's input, as ours
    "swin": (r"features\.\d\.\d+", ".norm2", "b h w d"),
    "swin_v2": (r"features\.\d\.\d+", ".add", "b h w d"),     # its norms come after
    "vit": (r"encoder\.layers\.\w+", ".ln_1", "b n d"),         # the graph calls ln_2 so
}


class Pretrained(nn.Module):
    """Any dense network as a teacher: block i is what its graph's i-th of `nodes` puts out.

    `axes` are those of the nodes, "b d h w", "b h w d" or, with a class token, "b n d". The
    network is copied. It sees the student's images: `shown`, the (mean, std) that they were
    standardised by, is undone, they are made `pixels` wide and standardised by its own `mean` and
    `std`. Nothing is cropped, or every token would leave its patch. The class token is the
    network's or the mean of its patches. A LayerNorm without parameters brings the features of all
    networks to one scale (both ours).
    """

    def __init__(self, network, nodes, axes, pixels, shown, mean, std, interpolation="bilinear"):
        super().__init__()
        self.nodes = {node: str(block) for block, node in enumerate(nodes, start=1)}
        self.network = create_feature_extractor(copy.deepcopy(network).eval(), self.nodes)
        self.axes, self.pixels, self.shown, self.own = axes, pixels, shown, (mean, std)
        self.interpolation = v2.InterpolationMode(interpolation)
        found = self.features(torch.zeros(1, 3, pixels, pixels))
        self.dims = {block: h.shape[-1] for block, h in found.items()}

    @torch.no_grad()
    def features(self, images):
        mean, std = (per_channel(n, images) for n in self.shown)
        images = v2.functional.resize(images * std + mean, [self.pixels, self.pixels],
                                      self.interpolation, antialias=True)
        found = self.network(standardise(images, *self.own))
        return {int(block): self.tokens(h) for block, h in found.items()}

    def tokens(self, h):
        if self.axes != "b n d":
            h = rearrange(h, f"{self.axes} -> b (h w) d")
            h = torch.cat([h.mean(dim=1, keepdim=True), h], dim=1)
        return F.layer_norm(h, h.shape[-1:])                            # (B, N, D)


def pretrained(name, file, pixels, shown):
    """A `Pretrained` of torchvision by its name, with published weights or those in `file`.

    `pixels` None is 64, rounded up to whole patches. ValueError or OSError with one sentence.
    """
    if file == "":                                          # an unset variable, most likely
        raise ValueError(f"torchvision:{name}: names no file: leave the second colon out to "
                         f"download the published weights")
    family = max((f for f in FAMILIES if name.startswith(f)), key=len, default=None)
    if family is None or name not in models.list_models(models):
        raise ValueError(f"torchvision:{name} is no teacher that is known: choose a network of "
                         f"torchvision whose name begins with {', '.join(FAMILIES)}")
    weights = models.get_model_weights(name).DEFAULT
    seen, pixels, size = weights.transforms(), pixels or 64, {}
    if family == "vit":
        patch = int(name.rpartition("_")[2])
        pixels = -(-pixels // patch) * patch
        size = {"image_size": pixels}
    state = weights_in(file) if file else published(name, weights)
    network = models.get_model(name, weights=None, **size)
    try:
        if family == "vit":
            state = interpolate_embeddings(pixels, patch, state)
        network.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file or weights.url} does not hold the weights of {name} "
                         f"({str(error).splitlines()[-1].strip()})") from error
    pattern, node, axes = FAMILIES[family]
    blocks = [block for block, module in network.named_modules()
              if re.fullmatch(pattern, block) and any(module.children())]
    return Pretrained(network, [block + node for block in blocks], axes, pixels, shown, seen.mean,
                      seen.std, seen.interpolation.value)


def weights_in(file):
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise ValueError(f"{file} cannot be read as the weights of a network ({why}): it must be a "
                         f"state dict that torch.save wrote") from error


def published(name, weights):
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "reason", None) or error
        raise OSError(f"the weights of {name} cannot be downloaded ({why}): bring {weights.url} "
                      f"here and give --teacher torchvision:{name}:FILE") from error
