"""The public checks of assignment 2. Expected values are made one token at a time."""
import math

import torch
import torch.nn.functional as F
from checking import D, E, Failure, H, K, T, answered, check, random, require, same
from torch.overrides import TorchFunctionMode


def a_world(g, tokens=T, k=K, experts=E, dtype=torch.float64):
    """x, chosen, gates and the four weights of E experts; no gate or bias is 0 or 1."""
    chosen = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])
    gates = torch.rand(tokens, k, generator=g, dtype=torch.float64) + 0.1
    shapes = (experts, D, H), (experts, H), (experts, H, D), (experts, D)
    weights = [random(g, *shape) / math.sqrt(shape[1]) for shape in shapes]
    return [v if v.dtype == torch.long else v.to(dtype)
            for v in (random(g, tokens, D), chosen, gates, *weights)]


def mlp(x, e, w_in, b_in, w_out, b_out):
    """Expert e on one token or on rows, written out."""
    return F.gelu(x @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e]


def token_by_token(x, chosen, gates, *weights):
    """(y, raw) by two loops."""
    raw = torch.stack([torch.stack([mlp(x[t], e, *weights) for e in row])
                       for t, row in enumerate(chosen.tolist())])
    return torch.einsum("tk,tkd->td", gates.to(raw.dtype), raw), raw


def served(experts, C):
    """Which choices find room, by counting: (T, K) bool."""
    T, K = experts.shape
    room, kept = {}, torch.zeros(T, K, dtype=torch.bool)
    for k in range(K):
        for t in range(T):
            e = int(experts[t, k])
            room[e] = room.get(e, C) - 1
            kept[t, k] = room[e] >= 0
    return kept


def alone(student, *names):
    """Take away the other rungs of the ladder: what is asked for is not a call of one of them."""
    def other(name):
        def call(*_, **__):
            raise Failure(f"a call of {name}", "code of your own", f"{name}(...)",
                          f"{name} is another rung of the ladder")
        return call
    for name in names:
        setattr(student.kernels, name, other(name))


class Products(TorchFunctionMode):
    """Counts the entries that matrix products put out."""
    NAMES = ("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "linear", "mv",
             "grouped_mm", "tensordot")
    entries = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.__name__ in self.NAMES:
            self.entries += out.numel()
        return out


@check(hint="stack all experts' outputs (T, E, D), then pick the chosen ones")
def the_definition_gives_each_token_the_gated_sum_of_its_experts(student, g):
    alone(student, "sliced", "grouped", "lean", "fused")
    for k in (1, 3):
        world = a_world(g, k=k)
        y, raw = token_by_token(*world)
        same(f"y of reference, K={k}", student.kernels.reference(*world), y)
        both = student.kernels.reference(*world, return_choices=True)
        require(isinstance(both, tuple) and len(both) == 2, "reference with return_choices=True",
                "a pair (y, raw)", type(both).__name__)
        same(f"raw of reference, K={k}", both[1], raw)


@check(hint="multiply raw (T, K, D) by the gates (T, K), add up over K; raw comes back as it was")
def a_gated_sum_weighs_each_choice_and_adds_up(student, g):
    raw, gates = random(g, T, K, D), random(g, T, K)
    y = torch.stack([sum(gates[t, k] * raw[t, k] for k in range(K)) for t in range(T)])
    same("y of gated_sum", student.kernels.gated_sum(raw, gates, False), y)
    both = student.kernels.gated_sum(raw, gates, True)
    require(isinstance(both, tuple), "gated_sum with return_choices=True", "a pair (y, raw)",
            type(both).__name__)
    same("y of gated_sum with return_choices=True", both[0], y)
    same("raw of gated_sum", both[1], raw)


@check(points=2, hint="sort chosen.reshape(-1) stably; offsets say where each expert's rows begin")
def a_plan_lists_the_choices_expert_by_expert(student, g):
    # nobody visits expert 1; choice s = t*K + k
    made = student.kernels.plan_choices(torch.tensor([[2, 0], [0, 3], [2, 3]]), E=4)
    for name, expected in (("ids", [0, 0, 2, 2, 3, 3]), ("order", [1, 2, 0, 4, 3, 5]),
                           ("offsets", [0, 2, 2, 4, 6])):
        same(f"{name} of [[2, 0], [0, 3], [2, 3]]", getattr(made, name), torch.tensor(expected))
    chosen = torch.randint(0, E, (T, K), generator=g)
    made = student.kernels.plan_choices(chosen, E + 1)         # nobody visits the last either
    flat = chosen.flatten().tolist()
    order = [s for e in range(E) for s in range(T * K) if flat[s] == e]
    same("order", made.order, torch.tensor(order))
    same("ids", made.ids, torch.tensor([flat[s] for s in order]))
    same("offsets", made.offsets, torch.tensor([sum(v < e for v in flat) for e in range(E + 2)]))


@check(points=2, hint="rows[offsets[e]:offsets[e+1]] are expert e's; an idle expert has none")
def a_slice_of_rows_goes_through_its_own_expert(student, g):
    x, _, _, *weights = a_world(g)
    sizes = [7, 0, 19, 1, 10]
    ids = torch.tensor([e for e in range(E) for _ in range(sizes[e])])
    plan = student.kernels.Plan(ids, torch.randperm(T, generator=g),
                                torch.tensor([sum(sizes[:e]) for e in range(E + 1)]))
    expected = torch.stack([mlp(x[r], e, *weights) for r, e in enumerate(ids.tolist())])
    same("rows out of sliced_mlp", student.kernels.sliced_mlp(x, plan, *weights), expected)


@check(points=3, hint="row r of the plan is choice order[r] of token order[r] // K; undo it last")
def sliced_gives_what_the_definition_gives(student, g):
    alone(student, "reference", "grouped", "lean", "fused")
    for k in (1, 2, E):
        world = a_world(g, k=k)
        y, raw = token_by_token(*world)
        got = student.kernels.sliced(*world, return_choices=True)
        require(isinstance(got, tuple), "sliced with return_choices=True", "a pair (y, raw)",
                type(got).__name__)
        same(f"raw of sliced, K={k}", got[1], raw)
        same(f"y of sliced, K={k}", got[0], y)


@check(hint="each expert multiplies its own rows: T*K rows in all, not T*E of them")
def experts_that_were_not_chosen_cost_nothing(student, g):
    alone(student, "reference", "grouped", "lean", "fused")
    x, _, gates, *weights = a_world(g, tokens=35, k=1)
    even = torch.arange(35).view(35, 1) % E
    with Products() as products:
        student.kernels.sliced(x, even, gates, *weights)
    needed = 35 * (H + D)
    require(products.entries <= 2 * needed, "entries that the products of sliced put out, K=1 of "
            f"E={E}", f"{needed} = 35 rows of H + D, twice that at most", products.entries)


@check(points=2, hint="C = ceil(capacity_factor * K * T / E)")
def an_expert_accepts_an_even_share_times_the_factor_rounded_up(student, g):
    everybody = torch.zeros(10, 1, dtype=torch.long)
    for factor, C in ((1.0, 3), (1.5, 4), (0.5, 2), (2.0, 5)):          # 10 / 4 * factor
        same(f"choices served, T=10, K=1, E=4, factor {factor}",
             int(student.router.within_capacity(everybody, 4, factor).sum()), C)
    experts = torch.randint(0, E, (T, K), generator=g)
    load = [int((experts == e).sum()) for e in range(E)]
    for factor in (0.3, 0.8, 1.2):
        C = math.ceil(factor * K * T / E)
        kept = student.router.within_capacity(experts, E, factor)
        same(f"choices served by each expert, factor {factor}",
             torch.tensor([int(kept[experts == e].sum()) for e in range(E)]),
             torch.tensor([min(n, C) for n in load]))


@check(points=2, hint="the queue is choice 0 of all tokens, then choice 1 of all tokens, ...")
def first_choices_are_served_before_second_ones_and_then_in_token_order(student, g):
    # C = 2: expert 1 is the second choice of token 0 and the first of tokens 1 and 2
    same("served of [[0, 1], [1, 2], [1, 0], [2, 0]]", student.router.within_capacity(
        torch.tensor([[0, 1], [1, 2], [1, 0], [2, 0]]), 4, 1.0),
        torch.tensor([[True, False], [True, True], [True, True], [True, False]]))
    experts = torch.stack([torch.randperm(E, generator=g)[:3] for _ in range(T)])
    same("served, K=3", student.router.within_capacity(experts, E, 0.75),
         served(experts, math.ceil(0.75 * 3 * T / E)))


@check(points=2, hint="flatten x to tokens, follow the given routing, give y the shape of x")
def a_layer_follows_a_given_routing_for_images_and_for_tokens(student, g):
    layer = student.moe.MoE(D, H, E, K).double()
    x = random(g, 3, 7, D)
    _, experts, gates, *_ = a_world(g, tokens=21)
    routing = student.router.Routing(experts, gates, None, None)
    expected = token_by_token(x.view(21, D), experts, gates, *layer.experts.parameters())[0]
    for name, v, y in (("images (3, 7, D)", x, expected.view(3, 7, D)),
                       ("tokens (21, D)", x.view(21, D), expected)):
        out = layer(v, routing)
        require(isinstance(out, tuple) and len(out) == 3, f"what MoE gives for {name}",
                "three things, (y, routing, raw)", type(out).__name__)
        same(f"y for {name}", out[0], y)
        require(out[1] is routing, f"the routing for {name}", "the one that was given", "another")
        same(f"raw for {name} with keep_raw=False", out[2], None)


@check(hint="a gate of 0 must give zeros, not the token itself: the block adds the residual")
def a_dropped_token_adds_nothing(student, g):
    layer, x = student.moe.MoE(D, H, E, K).double(), random(g, T, D)
    _, experts, gates, *_ = a_world(g)
    gates[::3] = 0.0
    y = layer(x, student.router.Routing(experts, gates, None, None))[0]
    same("y of the dropped tokens", y[::3], torch.zeros_like(x[::3]))
    require(bool(y[1::3].any(dim=1).all()), "y of the served tokens", "not zero", "zeros")


@check(points=2, hint="nn.Linear keeps its weight as (out, in), Experts keeps (E, in, out)")
def one_expert_is_a_plain_mlp(student, g):
    dense, layer = student.moe.MLP(D, H).double(), student.moe.MoE(D, H, 1, k=1).double()
    for p in dense.parameters():
        p.data = random(g, *p.shape) / 4
    layer.experts.copy_mlp(dense)
    x, ones = random(g, T, D), torch.ones(T, 1, dtype=torch.float64)
    routing = student.router.Routing(torch.zeros(T, 1, dtype=torch.long), ones, ones, ones)
    same("y of one expert copied from an MLP", layer(x, routing)[0], dense(x))


@check(points=2, hint="load_state_dict wants the dense trunk and the sparse blocks' own entries")
def upcycling_copies_the_trunk_and_every_mlp_into_every_expert(student, g):
    moe = student.moe
    sizes = dict(dim=12, depth=3, heads=2, hidden=10, patch=16, n_classes=7)
    dense = moe.ViT(**sizes)
    for p in dense.parameters():
        p.data = random(g, *p.shape, dtype=torch.float32)
    sparse = moe.ViT(**sizes, moe_blocks=(1, 3), make_sparse=lambda: moe.MoE(12, 10, 4, 2))
    moe.upcycle(sparse, dense)
    got, trunk = sparse.state_dict(), dense.state_dict()
    for name, value in trunk.items():
        if not name.startswith(("blocks.0.mlp", "blocks.2.mlp")):
            same(f"{name} after upcycling", got[name], value)
    for b in (0, 2):
        for ours, theirs in (("w_in", "fc_in.weight"), ("b_in", "fc_in.bias"),
                             ("w_out", "fc_out.weight"), ("b_out", "fc_out.bias")):
            value = trunk[f"blocks.{b}.mlp.{theirs}"]
            value = value.T if theirs.endswith("weight") else value
            same(f"{ours} of block {b + 1} after upcycling", got[f"blocks.{b}.mlp.experts.{ours}"],
                 torch.stack([value] * 4))


@check(hint="this check looks at the form alone; the hidden ones measure whether you are right")
def every_question_has_an_answer_of_the_right_form(student, g):
    for name in ("capacity", "reference_costs_times"):
        answered(student, name, 1)
    answered(student, "dropped", [[0, 0]] * 6)
    for name in ("a_dropped_token_keeps_its_residual", "a_dropped_token_becomes_zero"):
        answered(student, name, True)
    answered(student, "upcycled_is_the_same", dict.fromkeys((
        "topk_softmax, K=2 of 4", "softmax_topk, K=2 of 4", "softmax_topk, K=4 of 4",
        "sigmoid, K=4 of 4"), True))
