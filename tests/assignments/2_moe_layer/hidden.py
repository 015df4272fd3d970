"""The hidden checks of assignment 2: gradients, edges, the whole ViT, and the answers measured."""
import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from checking import D, E, H, K, T, answered, check, gradient, raises, random, require, same


def a_world(g, tokens=T, k=K, experts=E):
    chosen = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])
    gates = torch.rand(tokens, k, generator=g, dtype=torch.float64) + 0.1
    shapes = (experts, D, H), (experts, H), (experts, H, D), (experts, D)
    weights = [random(g, *shape) / math.sqrt(shape[1]) for shape in shapes]
    return random(g, tokens, D), chosen, gates, weights


def every_expert(x, chosen, gates, w_in, b_in, w_out, b_out):
    """The same sum by one einsum over all experts, with gates (T, E) that are mostly 0."""
    hidden = F.gelu(torch.einsum("td,edh->teh", x, w_in) + b_in)
    out = torch.einsum("teh,ehd->ted", hidden, w_out) + b_out
    weight = torch.zeros(len(x), len(w_in), dtype=gates.dtype).scatter(1, chosen, gates)
    return torch.einsum("te,ted->td", weight, out)


def a_vit(student, g, dtype=torch.float64, **sparse):
    """A small ViT whose parameters are far from their start."""
    moe = student.moe
    make = (lambda: moe.MoE(12, 10, 4, **sparse)) if sparse else None
    vit = moe.ViT(dim=12, depth=3, heads=2, hidden=10, patch=16, n_classes=7,
                  moe_blocks=(1, 3) if sparse else (), make_sparse=make).to(dtype)
    for name, p in vit.named_parameters():
        if "norm" not in name:
            p.data = random(g, *p.shape, dtype=dtype) / 2
    return vit


# --- dispatch and combine ---

@check(points=3, hint="gathers and products carry gradients; .data and detach do not")
def gradients_reach_x_the_gates_and_every_weight(student, g):
    names = ("x", "gates", "w_in", "b_in", "w_out", "b_out")
    x, experts, gates, weights = a_world(g)
    dy = random(g, T, D)
    expected = gradient(lambda x, gates, *w: every_expert(x, experts, gates, *w) * dy,
                        x, gates, *weights)
    for rung in ("reference", "sliced"):
        run = getattr(student.kernels, rung)
        got = gradient(lambda x, gates, *w, run=run: run(x, experts, gates, *w) * dy,
                       x, gates, *weights)
        for name, a, b in zip(names, got, expected, strict=True):
            same(f"d{name} of {rung}", a, b)


@check(hint="raw is what the experts put out before the gates, and MoDE learns through it")
def gradients_flow_through_the_choices_themselves(student, g):
    raw, gates, d = random(g, T, K, D), random(g, T, K), random(g, T, K, D)
    got = gradient(lambda raw, gates: (student.kernels.gated_sum(raw, gates, True)[1] * d).sum(),
                   raw, gates)
    same("d raw, through raw itself", got[0], d)
    same("d gates, through raw itself", got[1], torch.zeros_like(gates))


@check(hint="multiply in the gates' own dtype and round the sum once, at the end")
def gates_multiply_in_float32_and_the_sum_has_the_dtype_of_raw(student, g):
    raw = random(g, T, K, D).bfloat16()
    gates = torch.rand(T, K, generator=g)
    y = student.kernels.gated_sum(raw, gates, False)
    require(y.dtype == torch.bfloat16, "dtype of y for bfloat16 raw", torch.bfloat16, y.dtype)
    expected = sum(raw[:, k].float() * gates[:, k:k + 1] for k in range(K)).bfloat16()
    wrong = int((y != expected).sum())
    require(wrong <= 2, f"entries of y ({T}, {D}) that differ from the sum in float32",
            "0 (2 for another order of adding)", wrong)


@check(points=2, hint="offsets repeat where an expert has no rows; sizes may be 0, and so may T")
def idle_experts_one_busy_expert_and_no_tokens_at_all(student, g):
    for name, ids in (("nobody visits expert 2", [0, 1, 3, 4]), ("all visit expert 3", [3])):
        x, _, gates, weights = a_world(g, k=1)
        experts = torch.tensor(ids)[torch.randint(0, len(ids), (T, 1), generator=g)]
        expected = every_expert(x, experts, gates, *weights)
        idle = next(e for e in range(E) if e not in ids)
        for w in weights:
            w[idle] = math.nan                                  # whoever reads it will show it
        grads = gradient(lambda x, *w, e=experts, gates=gates: student.kernels.sliced(
            x, e, gates, *w), x, *[w.nan_to_num(0.5) for w in weights])
        same(f"y where {name}", student.kernels.sliced(x, experts, gates, *weights), expected)
        for w, dw in zip(("w_in", "b_in", "w_out", "b_out"), grads[1:], strict=True):
            same(f"d{w} of an idle expert where {name}", dw[idle], torch.zeros_like(dw[idle]))
    _, _, _, weights = a_world(g)
    for rung in ("reference", "sliced"):
        y = getattr(student.kernels, rung)(
            torch.zeros(0, D, dtype=torch.float64), torch.zeros(0, K, dtype=torch.long),
            torch.zeros(0, K, dtype=torch.float64), *weights)
        same(f"y of {rung} for no tokens", y, torch.zeros(0, D, dtype=torch.float64))


# --- capacity ---

@check(points=2, hint="C is at most T; round the product to, say, 9 digits before ceil")
def capacity_has_no_rounding_error_and_its_ends_are_all_and_none(student, g):
    experts = torch.randint(0, E, (T, K), generator=g)
    for factor, kept in ((0.0, False), (math.inf, True), (100, True)):
        same(f"served, factor {factor}", student.router.within_capacity(experts, E, factor),
             torch.full((T, K), kept))
    # 1.1 * 2 * 100 / 4 is 55.00000000000001 in floats
    both = torch.tensor([[0, 1]]).repeat(100, 1)
    same("choices served, T=100, K=2, E=4, factor 1.1",
         student.router.within_capacity(both, 4, 1.1).sum(dim=0), torch.tensor([55, 55]))
    same("served, T=0", student.router.within_capacity(experts[:0], E, 1.0),
         torch.zeros(0, K, dtype=torch.bool))
    same("served, 1 token to 1 of 1 experts", student.router.within_capacity(
        torch.zeros(1, 1, dtype=torch.long), 1, 1.0), torch.tensor([[True]]))


# --- the layer ---

@check(points=2, hint="the router sees tokens (T, D); its Routing comes back as the second result")
def a_layer_without_a_given_routing_asks_its_own_router_and_teaches_it(student, g):
    _, experts, gates, _ = a_world(g, tokens=21)
    made = student.router.Routing(experts, gates, None, None)
    seen = []

    class Router(torch.nn.Module):
        def forward(self, tokens):
            seen.append(tokens)
            return made
    layer, x = student.moe.MoE(D, H, E, K).double(), random(g, 3, 7, D)
    layer.router = Router()
    y, routing, _ = layer(x)
    require(routing is made, "the routing that MoE gives back", "its router's", "another")
    same("what the router is given", seen[0], x.view(21, D))
    weights = list(layer.experts.parameters())
    same("y", y, every_expert(x.view(21, D), experts, gates, *weights).view(3, 7, D))
    same("dL/dgates, what the router learns from",
         gradient(lambda v: layer(x, made._replace(gates=v))[0], gates),
         gradient(lambda v: every_expert(x.view(21, D), experts, v, *weights), gates))


@check(hint="Experts gives (y, raw) where keep_raw asks for it; hand both on, raw not gated")
def a_layer_that_keeps_raw_shows_the_outputs_before_their_gates(student, g):
    layer, x = student.moe.MoE(D, H, E, K, keep_raw=True).double(), random(g, T, D)
    _, experts, gates, _ = a_world(g)
    _, _, raw = layer(x, student.router.Routing(experts, gates, None, None))
    one = torch.ones(T, 1, dtype=torch.float64)
    for k in range(K):
        require(isinstance(raw, torch.Tensor) and raw.shape == (T, K, D), "raw with keep_raw=True",
                f"a tensor {(T, K, D)}", getattr(raw, "shape", raw))
        same(f"raw of choice {k}", raw[:, k],
             every_expert(x, experts[:, k:k + 1], one, *layer.experts.parameters()))
    other = student.moe.MoE(D, H, E, K, backend="abacus").double()
    raises("a layer with backend='abacus'", ValueError,
           lambda: other(x, student.router.Routing(experts, gates, None, None)),
           "hand self.backend on to the experts")


# --- upcycling ---

@check(points=2, hint="where a token's gates sum to 1, equal experts give what one MLP gives")
def an_upcycled_vit_computes_what_the_dense_one_does(student, g):
    images = random(g, 2, 3, 32, 32)
    dense = a_vit(student, g)
    for k, gate in ((2, "topk_softmax"), (4, "softmax_topk")):
        sparse = a_vit(student, g, k=k, gate=gate)
        student.moe.upcycle(sparse, dense)
        # float32, for the router computes its gates in float32 whatever the rest does
        same(f"logits of the upcycled ViT, {gate}, K={k} of 4", sparse(images).logits.float(),
             dense(images).logits.float())


@check(points=2, hint="copy_ under no_grad copies; assigning .data or expand shares memory")
def upcycling_shares_nothing_and_leaves_the_routers_alone(student, g):
    dense, sparse = a_vit(student, g), a_vit(student, g, k=2)
    routers = [sparse.blocks[b].mlp.router.weight.detach().clone() for b in (0, 2)]
    before = deepcopy(dense.state_dict())
    student.moe.upcycle(sparse, dense)
    for b, router in zip((0, 2), routers, strict=True):
        same(f"the router of block {b + 1}", sparse.blocks[b].mlp.router.weight, router)
    experts = sparse.blocks[0].mlp.experts
    for name, p in experts.named_parameters():
        require(isinstance(p, torch.nn.Parameter) and p.requires_grad and p.is_leaf,
                f"{name} after upcycling", "a parameter that learns", "something else")
        with torch.no_grad():
            p[0] += 1
        same(f"{name}: expert 1 minus expert 0, after 1 was added to expert 0",
             (p[1] - p[0]).mean(), torch.tensor(-1.0, dtype=torch.float64), scale=10.0)
    with torch.no_grad():
        for p in sparse.parameters():
            p.add_(1.0)
    for name, value in dense.state_dict().items():
        same(f"the dense {name} after the sparse ViT changed", value, before[name])


@check(hint="load_state_dict is strict by itself: do not pass strict=False")
def trunks_of_different_shapes_are_refused(student, g):
    sparse = a_vit(student, g, k=2)
    moe = student.moe
    wide = moe.ViT(dim=12, depth=3, heads=2, hidden=10, patch=16, n_classes=8).double()
    raises("upcycling with 7 and 8 classes", RuntimeError, lambda: moe.upcycle(sparse, wide))
    deep = moe.ViT(dim=12, depth=4, heads=2, hidden=10, patch=16, n_classes=7).double()
    raises("upcycling 4 blocks into 3", RuntimeError, lambda: moe.upcycle(sparse, deep))


# --- the answers, measured ---

@check(points=2, hint="E1, E2: all first choices queue before all second ones")
def who_comes_too_late(student, g):
    same("E1, capacity", int(answered(student, "capacity", 1)), -(-2 * 6 // 4))
    queue = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 1), (5, 0, 1),       # (t, k, e)
             (0, 1, 1), (1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, 0), (5, 1, 2)]
    expected, load = torch.zeros(6, 2, dtype=torch.long), [0] * 4
    for t, k, e in queue:
        load[e] += 1
        expected[t, k] = load[e] > 3
    same("E2, dropped", torch.tensor(answered(student, "dropped", [[0, 0]] * 6)), expected)


@check(points=2, hint="E3: Block adds the MLP's output to x. E4: E experts where K were needed")
def what_a_dropped_token_becomes_and_what_the_definition_costs(student, g):
    block = student.moe.Block(D, 4, torch.nn.Linear(D, D).double()).double()
    torch.nn.init.zeros_(block.mlp.weight)                     # an MLP that adds nothing
    torch.nn.init.zeros_(block.mlp.bias)
    x = random(g, 1, 5, D)
    y, left = block(x)[0], x + block.attn(block.norm1(x))
    for name, value in (("keeps_its_residual", left), ("becomes_zero", torch.zeros_like(y))):
        same(f"E3, a dropped token {name}", answered(student, f"a_dropped_token_{name}", True),
             torch.equal(y, value))
    same("E4, reference costs times", float(answered(student, "reference_costs_times", 1)), 8 / 2)


@check(points=2, hint="E5: do the gates of a token sum to 1?")
def which_upcycled_layers_start_as_the_dense_one(student, g):
    z = random(g, T, 4)
    top = z.sort(dim=1, descending=True).values
    sums = {"topk_softmax, K=2 of 4": top[:, :2].softmax(dim=1).sum(dim=1),
            "softmax_topk, K=2 of 4": top.softmax(dim=1)[:, :2].sum(dim=1),
            "softmax_topk, K=4 of 4": top.softmax(dim=1).sum(dim=1),
            "sigmoid, K=4 of 4": top.sigmoid().sum(dim=1)}
    found = answered(student, "upcycled_is_the_same", dict.fromkeys(sums, True))
    for name, total in sums.items():
        same(f"E5, {name}", found[name], bool(((total - 1).abs() < 1e-9).all()))
