"""The hidden checks of assignment 2: gradients, edges, the whole ViT, and the answers measured."""
import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from checking import (
    Coarse,
    D,
    E,
    H,
    K,
    T,
    answered,
    check,
    gradient,
    keeps_nothing,
    raises,
    random,
    require,
    same,
    tolerance,
    where_given,
    with_gradients,
)


def a_world(g, tokens=T, k=K, experts=E):
    # a view, as the router's: its rows do not lie side by side
    chosen = torch.stack([torch.randperm(experts, generator=g) for _ in range(tokens)])[:, :k]
    gates = torch.rand(tokens, k, generator=g, dtype=torch.float64) + 0.1
    shapes = (experts, D, H), (experts, H), (experts, H, D), (experts, D)
    weights = [random(g, *shape) / math.sqrt(shape[1]) for shape in shapes]
    return random(g, tokens, D), chosen, gates, weights


def outputs(x, w_in, b_in, w_out, b_out):
    """What every expert makes of every token, (T, E, D)."""
    hidden = F.gelu(torch.einsum("td,edh->teh", x, w_in) + b_in)
    return torch.einsum("teh,ehd->ted", hidden, w_out) + b_out


def every_expert(x, chosen, gates, *weights):
    """The same sum by one einsum over all experts, with gates (T, E) that are mostly 0."""
    weight = torch.zeros(len(x), len(weights[0]), dtype=gates.dtype).scatter(1, chosen, gates)
    return torch.einsum("te,ted->td", weight, outputs(x, *weights))


def of_the_chosen(x, chosen, *weights):
    """raw (T, K, D)."""
    return torch.take_along_dim(outputs(x, *weights), chosen[..., None], dim=1)


def in_the_queue(chosen, C):
    """Which choices (T, K) are among the first C of their expert, by counting."""
    seen, kept = {}, torch.zeros_like(chosen, dtype=torch.bool)
    for k, t in ((k, t) for k in range(chosen.shape[1]) for t in range(len(chosen))):
        e = int(chosen[t, k])
        seen[e] = seen.get(e, 0) + 1
        kept[t, k] = seen[e] <= C
    return kept


def a_layer(student, routings, **options):
    """A layer of random experts whose router hands out `routings` in turn, or makes them."""
    class Router(torch.nn.Module):
        def forward(self, tokens):
            return routings(tokens) if callable(routings) else next(routings)
    layer = student.moe.MoE(D, H, E, K, **options).double()
    layer.router = Router()
    return layer


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
    terms = raw.double() * gates[..., None].double()
    true = terms.sum(dim=1)
    # rounded once, by half a unit in the last place at most, after sums in float32
    bound = (torch.finfo(torch.bfloat16).eps / 2 * true.abs()
             + tolerance(torch.float32, terms.abs().sum(dim=1)))
    wrong = int(((y.double() - true).abs() > bound).sum())
    require(wrong == 0, f"entries of y ({T}, {D}) further from the sum than float32, rounded once",
            0, wrong)


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
    held = dict(sparse.named_parameters())                      # by an optimizer, for instance
    before = deepcopy(dense.state_dict())
    student.moe.upcycle(sparse, dense)
    for b, router in zip((0, 2), routers, strict=True):
        same(f"the router of block {b + 1}", sparse.blocks[b].mlp.router.weight, router)
    other = [name for name, p in sparse.named_parameters() if p is not held[name]]
    require(not other, "parameters of the sparse ViT that are new objects", "none",
            f"{len(other)}, such as {other[:1]}", "fill them: an optimizer holds the old ones")
    experts = sparse.blocks[0].mlp.experts
    for name, p in experts.named_parameters():
        require(isinstance(p, torch.nn.Parameter) and p.requires_grad and p.is_leaf,
                f"{name} after upcycling", "a parameter that learns", "something else")
        with torch.no_grad():
            p[0] += 1
        same(f"{name}: expert 1 minus expert 0, after 1 was added to expert 0",
             (p[1] - p[0]).mean(), torch.tensor(-1.0, dtype=torch.float64),
             scale=2 * p.detach().abs().max())
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
    refused = ValueError, RuntimeError
    raises("upcycling with 7 and 8 classes", refused, lambda: moe.upcycle(sparse, wide))
    deep = moe.ViT(dim=12, depth=4, heads=2, hidden=10, patch=16, n_classes=7).double()
    raises("upcycling 4 blocks into 3", refused, lambda: moe.upcycle(sparse, deep))


# --- what a formula does not show ---

@check(points=2, hint="y and raw both lead back to x, to the gates and to the weights, and the "
                      "gates of a layer to its tokens: no detach and no no_grad on these ways")
def y_and_raw_teach_whoever_asks_for_both(student, g):
    x, chosen, gates, weights = a_world(g)
    dy, d, look = random(g, T, D), random(g, T, K, D), random(g, D, K)

    def both(y, raw):
        return (y * dy).sum() + (raw * d).sum()

    def true(x, gates, *w):
        return both(every_expert(x, chosen, gates, *w), of_the_chosen(x, chosen, *w))
    expected = gradient(true, x, gates, *weights)
    for rung in ("reference", "sliced"):
        run = getattr(student.kernels, rung)
        got = gradient(lambda x, gates, *w, run=run: both(*run(
            x, chosen, gates, *w, return_choices=True)), x, gates, *weights)
        for name, a, b in zip(("x", "gates", "w_in", "b_in", "w_out", "b_out"), got, expected,
                              strict=True):
            same(f"d{name} of {rung}, of a loss of y and raw", a, b)
    layer = a_layer(student, lambda tokens: student.router.Routing(
        chosen, (tokens @ look).sigmoid(), None, None), keep_raw=True)
    weights = list(layer.experts.parameters())

    def through(x):
        y, _, raw = layer(x)
        require(isinstance(raw, torch.Tensor) and raw.requires_grad, "raw of a layer with "
                "keep_raw=True", "a graph back to the experts", "none")
        return both(y, raw)
    same("dx of a layer, through its experts and its router", gradient(through, x),
         gradient(lambda x: true(x, (x @ look).sigmoid(), *weights), x))


@check(points=2, hint="keep no plan, buffer or routing on self, on a function or in the module: a "
                      "second batch of the same shape has other numbers, and a .grad is the "
                      "optimizer's")
def a_second_batch_knows_nothing_of_the_first(student, g):
    for rung in ("reference", "sliced"):
        run, worlds = getattr(student.kernels, rung), [a_world(g) for _ in range(3)]
        made = [run(x, chosen, gates, *w, return_choices=True) for x, chosen, gates, w in worlds]
        for i, ((y, raw), (x, chosen, gates, w)) in enumerate(zip(made, worlds, strict=True)):
            same(f"raw of {rung}, batch {i + 1}", raw, of_the_chosen(x, chosen, *w))
            same(f"y of {rung}, batch {i + 1}", y, every_expert(x, chosen, gates, *w))
        keeps_nothing(rung, lambda run=run, x=x, rest=(chosen, gates, *w): run(
            x.clone().requires_grad_(), *rest))
    routings = [student.router.Routing(*a_world(g)[1:3], None, None) for _ in range(3)]
    layer, x = with_gradients(a_layer(student, iter(routings))), random(g, T, D)
    for i, given in enumerate(routings):
        y, routing, _ = layer(x)
        require(routing is given, f"the routing of batch {i + 1}", "what the router now says",
                "another")
        same(f"y of a layer, batch {i + 1}", y, every_expert(
            x, given.chosen, given.gates, *layer.experts.parameters()).detach())
    keeps_nothing("a layer", lambda: layer(
        x.clone().requires_grad_(), routings[0]._replace(gates=random(g, T, K))))
    for i in range(2):
        chosen = torch.randint(0, E, (T, K), generator=g)
        same(f"served, batch {i + 1}", student.router.within_capacity(chosen, E, 0.8),
             in_the_queue(chosen, math.ceil(0.8 * K * T / E)))
        same(f"ids of plan_choices, batch {i + 1}", student.kernels.plan_choices(chosen, E).ids,
             torch.tensor(sorted(chosen.flatten().tolist())))


@check(hint="take sizes from shapes: one token, one expert, K = 3 and K = E are sizes as any other")
def any_number_of_tokens_experts_and_choices_will_do(student, g):
    for tokens, experts, k in ((5, 7, 4), (64, 6, 1), (2, 3, 3), (1, 1, 1)):
        of = f"T={tokens}, E={experts}, K={k}"
        x, chosen, gates, weights = a_world(g, tokens, k, experts)
        raw = of_the_chosen(x, chosen, *weights)
        y = every_expert(x, chosen, gates, *weights)
        same(f"y of gated_sum, {of}", student.kernels.gated_sum(raw, gates, False), y)
        for rung in ("reference", "sliced"):
            same(f"y of {rung}, {of}", getattr(student.kernels, rung)(x, chosen, gates, *weights),
                 y)
        C = math.ceil(0.6 * k * tokens / experts)
        same(f"served, {of}", student.router.within_capacity(chosen, experts, 0.6),
             in_the_queue(chosen, C))
        mlp, copies = student.moe.MLP(D, H), student.moe.Experts(D, H, experts)
        torch.nn.init.normal_(mlp.fc_in.bias, generator=g)
        torch.nn.init.normal_(mlp.fc_out.bias, generator=g)
        copies.copy_mlp(mlp)
        for name, value in (("w_in", mlp.fc_in.weight.T), ("b_in", mlp.fc_in.bias),
                            ("w_out", mlp.fc_out.weight.T), ("b_out", mlp.fc_out.bias)):
            same(f"{name} of {experts} copies", getattr(copies, name),
                 value.expand(experts, *value.shape))


@check(hint="multiply in the dtype of x; only the gates and their sum are wider")
def experts_compute_in_the_dtype_of_x(student, g):
    for dtype in (torch.float32, torch.bfloat16):
        x, chosen, gates, weights = a_world(g)
        x, gates, weights = x.to(dtype), gates.float(), [w.to(dtype) for w in weights]
        wide = [w.double() for w in weights]
        for rung in ("reference", "sliced"):
            y, raw = getattr(student.kernels, rung)(x, chosen, gates, *weights,
                                                    return_choices=True)
            same(f"raw of {rung} in {dtype}", raw, of_the_chosen(x.double(), chosen, *wide)
                 .to(dtype))
            same(f"y of {rung} in {dtype}", y, every_expert(x.double(), chosen, gates.double(),
                                                            *wide).to(dtype))


@check(hint="device=x.device wherever a tensor is made, or new_zeros, empty_like and the like")
def what_is_made_lies_where_the_tokens_lie(student, g):
    x, chosen, gates, weights = a_world(g)
    kernels = student.kernels
    plan = where_given("plan_choices", lambda: kernels.plan_choices(chosen, E))
    where_given("sliced_mlp", lambda: kernels.sliced_mlp(x[plan.order // K], plan, *weights))
    for name in ("reference", "sliced"):
        where_given(name, lambda name=name: getattr(kernels, name)(x, chosen, gates, *weights))
    raw = of_the_chosen(x, chosen, *weights)
    where_given("gated_sum", lambda: kernels.gated_sum(raw, gates, False))
    where_given("within_capacity", lambda: student.router.within_capacity(chosen, E, 0.7))
    routing, layer = student.router.Routing(chosen, gates, None, None), a_layer(student, None)
    where_given("a layer", lambda: layer(x, routing))


@check(hint="do not replace NaN: who sees it finds the cause; and never sum over other tokens")
def a_token_that_is_no_number_spoils_itself_alone(student, g):
    x, chosen, gates, weights = a_world(g)
    expected = every_expert(x, chosen, gates, *weights)
    x[4], expected[4] = math.nan, math.nan
    for rung in ("reference", "sliced"):
        same(f"y of {rung}, token 4 is NaN", getattr(student.kernels, rung)(
            x, chosen, gates, *weights), expected)


@check(hint="count in whole numbers: float32 has none above 2**24, and misses some in between")
def counts_are_exact_however_many(student, g):
    # what float32 does to sums above 2**24, it does here to those above 256
    chosen = torch.randint(0, 2, (700, 2), generator=g)
    for C in (301, 303, 407, 599):
        with Coarse():
            kept = student.router.within_capacity(chosen, 2, (C - 0.5) / 700)
        same(f"served, T=700, E=2, C={C}", kept, in_the_queue(chosen, C))
    flat = chosen.flatten().tolist()
    with Coarse():
        plan = student.kernels.plan_choices(chosen, 3)
    same("order of 1400 choices", plan.order,
         torch.tensor(sorted(range(1400), key=flat.__getitem__)))
    same("offsets of 1400 choices", plan.offsets, torch.tensor([0, flat.count(0), 1400, 1400]))
    everybody = torch.zeros(200, 1, dtype=torch.long)
    same("choices served, T=200, K=1, E=2, factor 1.00001, so C = 101",
         int(student.router.within_capacity(everybody, 2, 1.00001).sum()), 101)


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
        same(f"E5, {name}", found[name], bool(((total - 1).abs() <= tolerance(z.dtype, 1)).all()))
