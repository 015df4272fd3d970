"""contenders.py -- who computes a sparse layer, and is each one right?

Ours are the rungs of kernels.py and a few plain ways; the peers are other libraries, imported when
they are asked for. Each is an adapter: given a `Layer`, that is tokens, weights, choices and dL/dy,
it returns a `Contender` that computes the layer from them, or raises `Skip` and says why it cannot.
`check` compares a contender's output and gradients with float64. Two peers route by themselves:
they cannot be compared, and their notes say so. Letters as in kernels.py: T tokens, D width, H
hidden, E experts, K per token.
"""
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels

# room for an error beyond twice the plain loop's, as a share of the largest true value
TINY = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
TOO_LARGE = 128 * 2 ** 20                       # bytes of z = (T, E, H), for those that form it all


# --- one layer to compute, and the truth about it ---

class Layer(NamedTuple):
    """What every contender is given."""
    leaves: dict            # x (T, D), gates (T, K), w_in, b_in, w_out, b_out: all that has a grad
    chosen: torch.Tensor    # (T, K)
    dy: torch.Tensor        # (T, D)
    images: int             # of T / images tokens each, for peers that route image by image


def draw(images, tokens, D, H, E, K, dtype, device):
    """Inputs of order 1 and the choices of a mildly uneven softmax, the same on every call."""
    cpu, T = torch.Generator().manual_seed(0), images * tokens

    def normal(*size):
        return torch.randn(size, generator=cpu)

    probs = (normal(T, E) + 0.5 * normal(E)).softmax(dim=-1)
    gates, chosen = probs.topk(K)                                       # (T, K)
    leaves = {"x": normal(T, D), "gates": gates, "w_in": normal(E, D, H) * D ** -0.5,
              "b_in": normal(E, H), "w_out": normal(E, H, D) * H ** -0.5, "b_out": normal(E, D)}
    # gates stay float32, as a router under autocast makes them
    leaves = {name: t.to(device, t.dtype if name == "gates" else dtype)
              for name, t in leaves.items()}
    return Layer(leaves, chosen.to(device), normal(T, D).to(device, dtype), images)


def definition(leaves, chosen, act=F.gelu):
    """kernels.reference expert by expert, each on its own rows: room for 65,536 tokens."""
    x, gates, *weights = leaves.values()
    raw = x.new_zeros(*chosen.shape, x.shape[1])                        # (T, K, D)
    for e, (wi, bi, wo, bo) in enumerate(zip(*(w.unbind() for w in weights), strict=True)):
        t, k = (chosen == e).nonzero(as_tuple=True)
        raw[t, k] = act(x[t] @ wi + bi) @ wo + bo
    return (raw * gates[..., None]).sum(dim=1).to(x.dtype)


def swiglu(z):
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


class Contender(NamedTuple):
    """One way to compute a layer; `forward()` reads the leaves, which have their own layout."""
    forward: Callable                           # () -> y
    leaves: dict                                # name -> what autograd differentiates
    truth: dict | None                          # the same leaves in our layout; None: no check
    ours: Callable = lambda grads: grads        # gradients in its layout -> in ours
    chosen: torch.Tensor | None = None          # if not the layer's own choices
    act: Callable = F.gelu
    note: str = ""

    def step(self, dy):
        """y and its gradients by name: what is timed."""
        y = self.forward()
        leaves = dict(self.leaves)
        return y, dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy), strict=True))


class Skip(Exception):
    """Why a contender does not run on this layer."""


def leaf(t):
    return t.detach().clone().contiguous().requires_grad_()


def check(c, layer):
    """The contender's worst error, over that of a plain loop in the same dtype; None if unchecked.

    Raises Skip if an error against float64 is more than twice the plain loop's (FlashAttention's
    rule) and TINY.
    """
    if c.truth is None:
        return None
    chosen = layer.chosen if c.chosen is None else c.chosen

    def run(cast):
        leaves = {name: leaf(cast(t)) for name, t in c.truth.items()}
        y = definition(leaves, chosen, c.act)
        grads = torch.autograd.grad(y, leaves.values(), layer.dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    true, plain = run(torch.Tensor.double), run(lambda t: t)
    y, grads = c.step(layer.dy)
    worst = 0.0
    for name, value in {"y": y.detach(), **c.ours(grads)}.items():
        if not value.isfinite().all():
            raise Skip(f"refused: {name} is not finite")
        error, usual = ((v.double() - true[name]).abs().max().item() for v in (value, plain[name]))
        room = TINY[layer.dy.dtype] * true[name].abs().max().item()
        if error > 2 * usual + room:
            raise Skip(f"refused: {name} is off by {error:.1e}, a plain loop by {usual:.1e}")
        worst = max(worst, error / (usual or room or 1.0))
    return worst


def flops(step):
    """FLOPs of step(), as torch counts them. Its counter knows no price for grouped_mm: ours does.

    (S, D) by (E, D, H) takes 2 S D H. So does each gradient: (S, H) by (E, H, D) for the rows, and
    (D, S) by (S, H) for the matrices.
    """
    price = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=price) as counter:
        step()
    return counter.get_total_flops()


def kept(c):
    """How many bytes does forward save for backward, parameters apart? Each storage counts once."""
    own = {t.untyped_storage().data_ptr() for name, t in c.leaves.items()
           if name not in ("x", "gates")}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = c.forward()                         # alive, so that no address is given out twice
    del y
    return sum(size for where, size in storages.items() if where not in own)


# --- ours ---

def rung(name):
    def build(layer):
        if name == "fused" and (not layer.dy.is_cuda or kernels.INTERPRETED):
            raise Skip("CUDA only: the interpreter's time means nothing")
        if name == "reference":
            small_enough(layer)
        leaves = {n: leaf(t) for n, t in layer.leaves.items()}
        x, gates, *weights = leaves.values()
        return Contender(
            lambda: kernels.expert_mlp(x, layer.chosen, gates, *weights, backend=name),
            leaves, layer.leaves)
    return build


def small_enough(layer):
    E, _, H = layer.leaves["w_in"].shape
    size = len(layer.dy) * E * H * layer.dy.element_size()
    if size > TOO_LARGE:
        raise Skip(f"too large: every expert on every token would make {size / 2 ** 20:.0f} MiB")


def dense(layer):
    """The first K experts side by side: what `definition` gives if all choose 0 .. K-1, gates 1."""
    T, K = layer.chosen.shape
    given = {name: t if name in ("x", "gates") else t[:K] for name, t in layer.leaves.items()}
    given["gates"] = torch.ones_like(given["gates"])
    leaves = {"x": leaf(given["x"]), "w_in": leaf(given["w_in"].movedim(0, 1).flatten(1)),
              "b_in": leaf(given["b_in"].flatten()), "w_out": leaf(given["w_out"].flatten(0, 1)),
              "b_out": leaf(given["b_out"].sum(0))}
    x, wi, bi, wo, bo = leaves.values()

    def ours(grads):
        return {"x": grads["x"], "w_in": grads["w_in"].unflatten(1, (K, -1)).movedim(1, 0),
                "b_in": grads["b_in"].unflatten(0, (K, -1)),
                "w_out": grads["w_out"].unflatten(0, (K, -1)),
                "b_out": grads["b_out"].expand(K, -1)}

    return Contender(lambda: torch.addmm(bo, F.gelu(torch.addmm(bi, x, wi)), wo), leaves, given,
                     ours, chosen=torch.arange(K, device=x.device).expand(T, K))


def compiled(build):
    def build_compiled(layer):
        c = build(layer)
        return c._replace(forward=torch.compile(c.forward))
    return build_compiled


def every_expert(layer):
    """Every expert on every token as two batched products, then gates that are mostly zero."""
    small_enough(layer)
    leaves = {name: leaf(t) for name, t in layer.leaves.items()}
    x, gates, wi, bi, wo, bo = leaves.values()

    def forward():
        share = gates.new_zeros(len(x), len(wi)).scatter_add(1, layer.chosen, gates)    # (T, E)
        z = torch.baddbmm(bi[:, None], x.expand(len(wi), -1, -1), wi)                   # (E, T, H)
        out = torch.baddbmm(bo[:, None], F.gelu(z), wo)                                 # (E, T, D)
        return (out * share.T[..., None]).sum(dim=0).to(x.dtype)

    return Contender(forward, leaves, layer.leaves)


# --- peers, each adapted to our weights and routing where it can be ---

def without_biases(layer):
    return {name: torch.zeros_like(t) if name in ("b_in", "b_out") else t
            for name, t in layer.leaves.items()}


def transformers(implementation):
    """NemotronHExperts: two products without a gate branch, as ours, but no biases."""
    def build(layer):
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
        E, D, H = layer.leaves["w_in"].shape
        mlp = NemotronHExperts(SimpleNamespace(
            n_routed_experts=E, hidden_size=D, moe_intermediate_size=H, moe_latent_size=None,
            mlp_hidden_act="gelu", _experts_implementation=implementation))
        mlp.up_proj.data = leaf(layer.leaves["w_in"].mT).data           # (E, H, D)
        mlp.down_proj.data = leaf(layer.leaves["w_out"].mT).data        # (E, D, H)
        leaves = {"x": leaf(layer.leaves["x"]), "gates": leaf(layer.leaves["gates"]),
                  "w_in": mlp.up_proj, "w_out": mlp.down_proj}
        return Contender(
            lambda: mlp(leaves["x"], layer.chosen, leaves["gates"]), leaves,
            without_biases(layer), lambda g: {n: t.mT if n[0] == "w" else t for n, t in g.items()},
            note="no biases")
    return build


def drops_tokens(layer, moe, note):
    """A peer that takes images and chooses, and drops, by itself: nothing to compare it with."""
    T, D = layer.dy.shape
    moe = moe.to(layer.dy)
    x = leaf(layer.leaves["x"])
    return Contender(lambda: moe(x.view(layer.images, -1, D))[0].reshape(T, D),
                     {"x": x} | dict(moe.named_parameters()), None,
                     note=f"unchecked: drops tokens, own routing, {note}")


def lucidrains(layer):
    from mixture_of_experts import MoE
    E, D, H = layer.leaves["w_in"].shape
    if layer.chosen.shape[1] != 2:
        raise Skip("knows K = 2 alone")
    moe = MoE(D, num_experts=E, hidden_dim=H, activation=torch.nn.GELU)
    return drops_tokens(layer, moe, "no biases")


def st_moe(layer):
    from st_moe_pytorch import MoE
    E, D, H = layer.leaves["w_in"].shape
    K = layer.chosen.shape[1]
    if K < 2:
        raise Skip("knows K >= 2 alone")
    moe = MoE(D, num_experts=E, expert_hidden_mult=H / D, gating_top_n=K)
    return drops_tokens(layer, moe, "GEGLU of hidden 2H/3")


def scattermoe(layer):
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear
    cuda_only(layer)
    leaves = {name: leaf(t.to(layer.dy.dtype)) for name, t in layer.leaves.items()}
    x, gates, wi, bi, wo, bo = leaves.values()

    def forward():
        *order, ends = flatten_sort_count(layer.chosen, len(wi))
        z = parallel_linear(x, wi, layer.chosen.shape[1], *order, ends, bi, grouped_out=True)
        return parallel_linear(F.gelu(z), wo, 1, *order, ends, bo, gates, grouped_in=True)

    return Contender(forward, leaves, leaves, note=f"gates in {str(gates.dtype)[6:]}")


def liger(layer):
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    cuda_only(layer)
    E, _, H = layer.leaves["w_in"].shape
    wi, wo = layer.leaves["w_in"], layer.leaves["w_out"]
    given = without_biases(layer)
    half = 2 * H // 3
    given |= {"w_in": torch.cat([wi, wi.flip(1)], dim=2)[..., :2 * half],
              "b_in": wi.new_zeros(E, 2 * half), "w_out": wo[:, :half]}
    leaves = {name: leaf(given[name].mT if name[0] == "w" else given[name])
              for name in ("x", "gates", "w_in", "w_out")}
    chosen = layer.chosen.int()
    return Contender(
        lambda: LigerFusedMoEFunction.apply(leaves["x"], leaves["w_in"], leaves["w_out"], chosen,
                                            leaves["gates"]),
        leaves, given, lambda g: {n: t.mT if n[0] == "w" else t for n, t in g.items()},
        act=swiglu, note="SwiGLU of hidden 2H/3, no biases")


def cuda_only(layer):
    if not layer.dy.is_cuda:
        raise Skip("CUDA only")


PEERS = {       # name: (what pip calls it, adapter)
    "transformers_eager": ("transformers", transformers("eager")),
    "transformers_grouped_mm": ("transformers", transformers("grouped_mm")),
    "lucidrains": ("mixture-of-experts", lucidrains), "st_moe": ("st-moe-pytorch", st_moe),
    "scattermoe": ("scattermoe", scattermoe), "liger": ("liger-kernel", liger),
}


def everybody(with_compiled):
    """All adapters by name, `dense` first: the others are measured against it."""
    ours = {"dense": dense}
    if with_compiled:
        ours |= {"dense_compiled": compiled(dense), "grouped_compiled": compiled(rung("grouped"))}
    ours |= {name: rung(name) for name in ("auto", *kernels.BACKENDS)}
    return ours | {"every_expert": every_expert} | {name: peer[1] for name, peer in PEERS.items()}
