"""moe.py -- what is a sparse Vision Transformer?

A ViT in which some blocks replace their MLP by several experts and a router that chooses among
them. Blocks are numbered from 1, as in the papers. Letters as in router.py: B N T D H E K C.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from kernels import expert_mlp
from router import Routing, TopKRouter, expect


class Layer(NamedTuple):
    """What a block shows of itself: all that a loss, a teacher or a plot reads."""
    h: Tensor                     # (T, D) what the block's MLP, or its router, was given
    routing: Routing | None       # None in dense and Soft MoE blocks, where nothing chooses
    raw: Tensor | None            # (T, K, D) the experts' outputs before gating, if asked for


class Output(NamedTuple):
    logits: Tensor                # (B, n_classes)
    layers: dict[int, Layer]      # by block number, 1 .. depth


# --- what can stand in a block: one MLP, routed experts, or soft slots ---

class MLP(nn.Module):
    """The dense two-layer MLP of a Transformer block, (..., D) to (..., D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc_in, self.fc_out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for fc in (self.fc_in, self.fc_out):
            nn.init.xavier_uniform_(fc.weight)
            nn.init.zeros_(fc.bias)

    def forward(self, x):
        return self.fc_out(F.gelu(self.fc_in(x)))

    def flops(self, N):
        return 2 * N * (self.fc_in.weight.numel() + self.fc_out.weight.numel())


class Experts(nn.Module):
    """E two-layer MLPs whose weights are stacked, each initialised like an `MLP` of its sizes."""

    def __init__(self, dim, hidden, n_experts):
        super().__init__()
        whole(dim=dim, hidden=hidden, n_experts=n_experts)
        self.w_in = nn.Parameter(torch.empty(n_experts, dim, hidden))
        self.b_in = nn.Parameter(torch.zeros(n_experts, hidden))
        self.w_out = nn.Parameter(torch.empty(n_experts, hidden, dim))
        self.b_out = nn.Parameter(torch.zeros(n_experts, dim))
        bound = (6 / (dim + hidden)) ** 0.5     # of xavier_uniform_, which knows no stack
        nn.init.uniform_(self.w_in, -bound, bound)
        nn.init.uniform_(self.w_out, -bound, bound)

    def forward(self, x, chosen, gates, backend="auto", return_choices=False):
        """x (T, D), chosen and gates (T, K) -> what `kernels.expert_mlp` returns."""
        x, *weights = self.cast(x)
        return expert_mlp(x, chosen, gates, *weights, backend, return_choices)

    def batched(self, x):
        """x (E, M, D), M rows for each expert -> (E, M, D)."""
        expect("x", x, self.w_in.shape[0], None, self.w_in.shape[1])
        x, w_in, b_in, w_out, b_out = self.cast(x)
        return torch.baddbmm(b_out[:, None], F.gelu(torch.baddbmm(b_in[:, None], x, w_in)), w_out)

    def cast(self, x):
        """x and the weights in the dtype of autocast, which itself knows no grouped product."""
        device = x.device.type
        on = torch.is_autocast_enabled(device) and x.dtype != torch.float64     # as autocast itself
        dtype = torch.get_autocast_dtype(device) if on else x.dtype
        return [v.to(dtype) for v in (x, self.w_in, self.b_in, self.w_out, self.b_out)]

    def copy_mlp(self, mlp):
        """Make every expert a copy of a dense `MLP` (Sparse Upcycling, arXiv:2212.05055)."""
        with torch.no_grad():
            self.w_in.copy_(mlp.fc_in.weight.T)
            self.b_in.copy_(mlp.fc_in.bias)
            self.w_out.copy_(mlp.fc_out.weight.T)
            self.b_out.copy_(mlp.fc_out.bias)


class MoE(nn.Module):
    """A router and its experts: `moe(x)` with x (B, N, D) or (T, D) gives (y, routing, raw).

    `moe(x, routing)` follows the given routing and not its own router's: a teacher's (oracle
    dispatch), a forced expert (probing), or its own with one field replaced. With keep_raw=True,
    `raw` (T, K, D) holds the chosen experts' outputs before their gates, which MoDE compares;
    otherwise it is None.

    >>> moe = MoE(dim=8, hidden=16, n_experts=4, k=2, keep_raw=True)
    >>> y, routing, raw = moe(torch.randn(3, 5, 8))
    >>> y.shape, routing.chosen.shape, raw.shape
    (torch.Size([3, 5, 8]), torch.Size([15, 2]), torch.Size([15, 2, 8]))
    """

    def __init__(self, dim, hidden, n_experts, k=2, keep_raw=False, backend="auto", **router):
        super().__init__()
        whole(dim=dim, n_experts=n_experts)
        self.router = TopKRouter(dim, n_experts, k, **router)
        self.experts = Experts(dim, hidden, n_experts)
        self.keep_raw, self.backend = keep_raw, backend

    def forward(self, x, routing=None):
        tokens = x.reshape(-1, x.shape[-1])                             # (T, D)
        if routing is None:
            routing = self.router(tokens)
        out = self.experts(tokens, routing.chosen, routing.gates, self.backend, self.keep_raw)
        y, raw = out if self.keep_raw else (out, None)
        return y.view_as(x), routing, raw

    def flops(self, N):
        E, D, H = self.experts.w_in.shape
        return 2 * N * D * E + self.router.k * 4 * N * D * H


class SoftMoE(nn.Module):
    """Soft MoE: every slot is a mixture of the image's tokens, x (B, N, D) to (B, N, D).

    A softmax over tokens fills the slots, a softmax over slots combines their outputs
    (arXiv:2308.00951, section 2), and both sides are l2-normalised (2.3). Each expert has
    ceil(N / E) slots, so that there are about as many slots as tokens.
    """

    def __init__(self, dim, hidden, n_experts, n_tokens):
        super().__init__()
        whole(dim=dim, n_experts=n_experts, n_tokens=n_tokens)
        self.slots = -(-n_tokens // n_experts)                          # per expert
        self.experts = Experts(dim, hidden, n_experts)
        self.phi = nn.Parameter(torch.randn(dim, n_experts * self.slots) * dim ** -0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        E, D, _ = self.experts.w_in.shape
        expect("x", x, None, None, D)
        keys = self.scale * F.normalize(self.phi, dim=0)                # (D, E*slots)
        logits = F.normalize(x, dim=-1) @ keys                          # (B, N, E*slots)
        mixed = logits.softmax(dim=1).transpose(1, 2) @ x               # (B, E*slots, D)
        out = self.experts.batched(rearrange(mixed, "b (e s) d -> e (b s) d", e=E))
        out = rearrange(out, "e (b s) d -> b (e s) d", s=self.slots)
        return logits.softmax(dim=2).to(out.dtype) @ out                # (B, N, D)

    def flops(self, N):
        E, D, H = self.experts.w_in.shape
        return E * self.slots * (6 * N * D + 4 * D * H)   # logits, dispatch, combine; the experts


# --- the Transformer around them ---

class Attention(nn.Module):
    """Multi-head self-attention over the tokens of an image, (B, N, D) to (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} does not divide into {heads} heads: "
                             f"choose --dim as a multiple of --heads")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        for fc in (self.qkv, self.proj):
            nn.init.xavier_uniform_(fc.weight)
            nn.init.zeros_(fc.bias)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)                 # (B, heads, N, D/heads)
        return self.proj(rearrange(mixed, "b h n d -> b n (h d)"))

    def flops(self, N):
        D = self.proj.in_features
        return 8 * N * D * D + 4 * N * N * D


class Block(nn.Module):
    """A pre-norm Transformer block; `mlp` is an `MLP`, a `MoE` or a `SoftMoE`."""

    def __init__(self, dim, heads, mlp, drop_path=0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), mlp
        self.drop_path = drop_path

    def forward(self, x, routing=None):
        x = x + self.drop(self.attn(self.norm1(x)))
        h = self.norm2(x)                                               # (B, N, D)
        routed = isinstance(self.mlp, MoE)
        y, routing, raw = self.mlp(h, routing) if routed else (self.mlp(h), None, None)
        return x + self.drop(y), Layer(h.flatten(0, 1), routing, raw)

    def drop(self, y):
        """In training, leave the branch out for some of the images (arXiv:1603.09382)."""
        return stochastic_depth(y, self.drop_path, "row", self.training)


class ViT(nn.Module):
    """A Vision Transformer: `vit(images)` with normalised images gives an `Output`.

    Images are (B, 3, image_size, image_size). `make_sparse()` builds what replaces the MLP of the
    blocks in `moe_blocks`. All MLPs are drawn first, so two ViTs of one seed start from the same
    trunk whatever is sparse. `hidden` is H of the plain MLPs. The class token is routed like any
    other.

    >>> vit = ViT(dim=8, depth=4, heads=2, hidden=16, patch=8, n_classes=10, moe_blocks=(2, 4),
    ...           make_sparse=lambda: MoE(8, 16, n_experts=4, k=2))
    >>> logits, layers = vit(torch.randn(3, 3, 32, 32))
    >>> logits.shape, layers[2].routing.chosen.shape, layers[3].h.shape
    (torch.Size([3, 10]), torch.Size([51, 2]), torch.Size([51, 8]))
    """

    def __init__(self, dim, depth, heads, hidden, patch, n_classes, moe_blocks=(),
                 make_sparse=None, drop_path=0.0, image_size=32):
        super().__init__()
        whole(dim=dim, depth=depth, heads=heads, hidden=hidden, patch=patch, n_classes=n_classes,
              image_size=image_size)
        if image_size % patch:
            raise ValueError(f"{image_size}x{image_size} pixels do not divide into patches of "
                             f"{patch}: choose --patch as a divisor of {image_size}")
        if moe_blocks and make_sparse is None:
            raise ValueError("moe_blocks needs make_sparse, a function that builds what goes there")
        check_blocks("moe_blocks", moe_blocks, range(1, depth + 1))
        self.image_size, self.patch = image_size, patch
        self.n_tokens = (image_size // patch) ** 2 + 1
        self.moe_blocks = tuple(sorted(moe_blocks))
        self.embed = nn.Linear(3 * patch * patch, dim)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.empty(1, self.n_tokens, dim))
        # stochastic depth grows linearly with the block's number
        self.blocks = nn.ModuleList(
            Block(dim, heads, MLP(dim, hidden), drop_path * i / max(1, depth - 1))
            for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, n_classes)
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.trunc_normal_(self.pos, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        for number in self.moe_blocks:
            mlp = make_sparse()
            if isinstance(mlp, MoE):
                mlp.router.name = f"the router of block {number}"
            self.blocks[number - 1].mlp = mlp

    def forward(self, images, routings=None):
        """`routings` maps block numbers to a `Routing` that replaces the block's own."""
        check_blocks("routings", routings or (), routers(self))
        expect("images", images, None, 3, self.image_size, self.image_size)
        cast = torch.is_autocast_enabled(images.device.type) and images.dtype in (
            torch.float32, torch.float16, torch.bfloat16)           # by autocast, and no others
        if images.dtype != self.pos.dtype and not cast:
            raise TypeError(f"images must be normalised and {self.pos.dtype}, not {images.dtype}")
        p = self.patch
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        x = self.embed(patches)                                         # (B, N-1, D)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1) + self.pos
        layers = {}
        for number, block in enumerate(self.blocks, start=1):
            x, layers[number] = block(x, (routings or {}).get(number))
        return Output(self.head(self.norm(x[:, 0])), layers)

    @property
    def dims(self):
        """What a teacher's blocks are and how wide: {block number: D}."""
        return dict.fromkeys(range(1, 1 + len(self.blocks)), self.head.in_features)

    def features(self, images):
        """What each block's MLP is given: {block number: h (B, N, D)}."""
        layers = self(images).layers
        return {n: layer.h.unflatten(0, (len(images), self.n_tokens))
                for n, layer in layers.items()}

    def flops(self):
        """FLOPs of one image's forward pass: two per multiply-add, matrix products alone."""
        N = self.n_tokens
        blocks = sum(block.attn.flops(N) + block.mlp.flops(N) for block in self.blocks)
        return 2 * (N - 1) * self.embed.weight.numel() + blocks + 2 * self.head.weight.numel()

    def params(self):
        """Numbers of parameters: (all, all but those of the E - K experts that a token misses)."""
        total = sum(p.numel() for p in self.parameters())
        idle = 0
        for moe in (block.mlp for block in self.blocks if isinstance(block.mlp, MoE)):
            size = sum(p.numel() for p in moe.experts.parameters())
            idle += size - size * moe.router.k // moe.router.n_experts
        return total, total - idle


def upcycle(sparse, dense):
    """Copy a dense ViT into a sparse one: the trunk as it is, each MLP into every expert.

    Where a token's gates sum to 1 (topk_softmax, or K = E) the sparse ViT then computes what the
    dense one does; with softmax_topk and K < E, each sparse block's output is scaled by their sum.
    ValueError, and nothing is copied, where their sizes differ (Sparse Upcycling,
    arXiv:2212.05055).
    """
    replaced = tuple(f"blocks.{number - 1}.mlp." for number in sparse.moe_blocks)
    trunk = {k: v for k, v in dense.state_dict().items() if not k.startswith(replaced)}
    own = {k: v for k, v in sparse.state_dict().items() if k.startswith(replaced)}
    check_trunks(sparse, dense, trunk, own)
    sparse.load_state_dict(trunk | own)
    for number in sparse.moe_blocks:
        sparse.blocks[number - 1].mlp.experts.copy_mlp(dense.blocks[number - 1].mlp)


def check_trunks(sparse, dense, trunk, own):
    """Refuse a dense ViT whose `trunk` is not that of the sparse one, which keeps its `own`."""
    mine = {name: v for name, v in sparse.state_dict().items() if name not in own}
    for name in sorted(trunk.keys() ^ mine.keys()):
        raise ValueError(f"only one of the two has {name}: give both the same depth")
    for name, v in trunk.items():
        expect(f"the dense ViT's {name}", v, *mine[name].shape)
    for number in sparse.moe_blocks:
        mlp, moe = (vit.blocks[number - 1].mlp for vit in (dense, sparse))
        if not isinstance(mlp, MLP):
            raise ValueError(f"block {number} of the dense ViT must have an MLP, not experts")
        expect("the dense MLP's weight", mlp.fc_in.weight.T, *moe.experts.w_in.shape[1:])


def routers(vit):
    """{block number: its router}, of the blocks that have one."""
    return {n: b.mlp.router for n, b in enumerate(vit.blocks, 1) if hasattr(b.mlp, "router")}


def check_blocks(name, named, known):
    """Refuse block numbers that are not known, or come twice."""
    if not set(named) <= set(known) or len(set(named)) < len(named):
        raise ValueError(f"{name} cannot be {list(named)}: choose from {list(known)}, each once")


def whole(**sizes):
    for name, n in sizes.items():
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, not {n!r}")
