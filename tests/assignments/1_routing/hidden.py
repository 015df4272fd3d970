"""The hidden checks of assignment 1: gradients, edges, and the answers measured."""
import math

import torch
import torch.nn.functional as F
from checking import (
    D,
    E,
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

GATES = ("softmax_topk", "topk_softmax", "sigmoid")


def route(student, logits, k=K, gate="softmax_topk", training=False, **options):
    router = student.router.TopKRouter(D, logits.shape[1], k, gate, **options)
    return router.train(training).route(logits)


# --- what is expected, written down without the student's code ---

def weights(z, k, gate):
    """(T, E) gates of the chosen experts and 0 elsewhere, ties to the lowest index."""
    ranks = [sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in z.tolist()]
    chosen = torch.zeros_like(z).scatter(1, torch.tensor(ranks), 1.0)
    if gate == "sigmoid":
        return chosen / (1 + (-z).exp())
    over = torch.ones_like(z) if gate == "softmax_topk" else chosen
    power = (z - z.detach().amax(dim=1, keepdim=True)).exp() * over
    return chosen * power / power.sum(dim=1, keepdim=True)


def task_gradient(z, f, dy, k, gate):
    """dL/dz of a loss whose gradient on y = sum_i w_i f_i is dy."""
    return gradient(lambda z: torch.einsum("te,ted,td->", weights(z, k, gate), f, dy), z)


def largest_gain(f, dy):
    """The largest |<f_e, dy>| if no term cancelled another: of what dL/dz is a difference."""
    return torch.einsum("ted,td->te", f.abs(), dy.abs()).max()


def a_world(g, tokens=1, experts=E):
    return random(g, tokens, experts), random(g, tokens, experts, D), random(g, tokens, D)


def gradient_after_a_drop(z, f, dy, gate):
    """dL/dz (T, E) with K = 2 where each token's first choice is dropped, and whose it was."""
    first = torch.zeros_like(z).scatter(1, z.argmax(dim=1, keepdim=True), 1.0)
    return gradient(lambda z: torch.einsum(
        "te,ted,td->", weights(z, 2, gate) * (1 - first), f, dy), z), first > 0


LOSSES = ("load_loss", "entropy_loss", "balance_loss", "z_loss")


def losses_of(z, chosen):
    """The four losses L of logits (T, E), from their formulas.

    Their terms add up to less than 2 + L: those of the load are E[x^2] and E[x]^2, by E[x]^2.
    """
    (T, E), K = z.shape, chosen.shape[1]
    log_p = z - z.logsumexp(dim=1, keepdim=True)
    importance = log_p.exp().sum(dim=0) / T
    count = torch.tensor([chosen.flatten().tolist().count(e) for e in range(E)])
    return {"load_loss": ((importance * E - 1) ** 2).sum() / E,
            "entropy_loss": -(log_p.exp() * log_p).sum() / T,
            "balance_loss": ((count * importance).sum() * E / (T * K)).float(),
            "z_loss": (z.logsumexp(dim=1) ** 2).sum() / T}


def a_loss(student, name):
    """The student's loss `name`, as a function of logits and choices. Shares are float32."""
    loss = getattr(student.router, name)
    return {"load_loss": lambda z, chosen: loss(z.softmax(dim=1)),
            "balance_loss": lambda z, chosen: loss(z.softmax(dim=1).float(), chosen)}.get(
                name, lambda z, chosen: loss(z))


# --- the code ---

@check(points=2, hint="gates must be differentiable, and the K of softmax_topk are not rescaled")
def the_task_loss_reaches_the_logits_as_the_gate_says(student, g):
    z, f, dy = a_world(g, T)
    for gate in GATES:
        for k in (1, 2, E):
            def loss(z, k=k, gate=gate):
                routing = route(student, z, k, gate)
                picked = f.gather(1, routing.chosen[..., None].expand(-1, -1, D))
                return torch.einsum("tk,tkd,td->", routing.gates, picked, dy)
            same(f"dL/dlogits of {gate}, K={k}", gradient(loss, z),
                 task_gradient(z, f, dy, k, gate), scale=2 * largest_gain(f, dy))


@check(points=2, hint="with noise, order and gates both come from the noisy logits")
def noise_has_a_standard_deviation_of_noise_over_e(student, g):
    # sigmoid gates of all experts give the noisy logits back
    noisy = route(student, torch.zeros(2000, E), E, "sigmoid", True, noise=2.0).gates.logit()
    n, sigma, beyond = noisy.numel(), 2 / E, 0.0455     # the share of normal numbers beyond 2 sigma
    for name, got, expected, error, hint in (
            ("standard deviation of the noise", noisy.std(), sigma, sigma / (2 * n) ** 0.5,
             "V-MoE: 1/E for noise=1"),
            ("mean of the noise", noisy.mean(), 0, sigma / n ** 0.5, "torch.randn_like has mean 0"),
            ("share of the noise beyond two standard deviations",
             (noisy.abs() > 2 * sigma).double().mean(), beyond, (beyond * (1 - beyond) / n) ** 0.5,
             "normal noise: torch.randn, not torch.rand")):
        # seven standard errors of n numbers: luck fails one right answer in 10 ** 11
        require(abs(got - expected) < 7 * error, f"{name}, noise=2",
                f"{expected:.4f} within {7 * error:.4f}", f"{got:.4f}", hint)
    z = random(g, T, E)
    seeded = []
    for _ in range(2):
        router = student.router.TopKRouter(D, E, E, "softmax_topk", noise=5.0)
        torch.manual_seed(g.initial_seed())
        seeded.append(router.route(z).gates)
    same("gates in training with noise=5, after torch.manual_seed with the same number", *seeded,
         "draw from torch's own generator, or a run cannot be repeated")
    routing = route(student, z, E, "softmax_topk", True, noise=5.0)
    require((routing.gates.diff(dim=1) <= 0).all(), "gates in training with noise=5",
            "the favourite's first, so falling from left to right", "a gate larger than the one "
            "before it", "choose and weigh by the same noisy logits")
    same("sum of the gates of all experts", routing.gates.sum(dim=1),
         torch.ones(T, dtype=torch.float64))


@check(points=2, hint="a full expert keeps its place in experts; only its gate becomes 0")
def a_choice_that_finds_its_expert_full_gets_gate_0_and_is_counted(student, g):
    z = random(g, T, E)
    kept = torch.rand(T, K, generator=g) < 0.6
    asked = []

    def within_capacity(experts, n_experts, capacity_factor):     # assignment 2 writes the real one
        asked.append((n_experts, capacity_factor))
        return kept
    student.router.within_capacity = within_capacity
    for factor in (0.75, 0.0):
        free, full = route(student, z), route(student, z, capacity_factor=factor)
        same("(n_experts, capacity_factor) that within_capacity was called with", asked[-1:],
             [(E, factor)], "call it wherever self.capacity_factor is not None, 0 included")
        same("experts with a capacity", full.chosen, free.chosen)
        same("gates with a capacity", full.gates, torch.where(kept, free.gates, 0.0))
        require(isinstance(full.dropped, torch.Tensor), "dropped", "a tensor", repr(full.dropped))
        same("dropped", int(full.dropped), T * K - int(kept.sum()))
    same("dropped without a capacity", int(route(student, z).dropped), 0)


@check(hint="softmax(NaN) chooses an expert as if nothing had happened, so look at logits first")
def logits_that_are_not_finite_stop_with_the_number_of_tokens(student, g):
    for value, training in ((math.nan, True), (math.inf, False), (-math.inf, True),
                            (math.nan, False)):
        z = random(g, T, E)
        z[3, 1] = z[3, 2] = z[8, 0] = value
        router = student.router.TopKRouter(D, E, K).train(training)
        router.name = "the router of block 7"
        error = raises(f"logits with {value}", FloatingPointError, lambda z=z, r=router: r.route(z))
        for part in (router.name, f"2 of {T}"):
            require(part in str(error), f"the message for logits with {value} in 2 tokens",
                    f"something with {part!r}", repr(str(error)),
                    "name self.name and how many tokens, not entries, are affected")


@check(hint="use shapes, not constants: T may be 0, and K may be E")
def the_edges_no_token_and_every_expert(student, g):
    routing = route(student, torch.zeros(0, E))
    same("experts of no token", routing.chosen, torch.zeros(0, K, dtype=torch.long))
    same("gates of no token", routing.gates, torch.zeros(0, K))
    z = random(g, T, 1)
    same("the gate of the only expert", route(student, z, 1).gates,
         torch.ones(T, 1, dtype=torch.float64))
    z = -3 * random(g, T, E).abs() - 20
    same("gates of K=E, logits near -20", route(student, z, E).gates,
         weights(z, E, "softmax_topk").sort(dim=1, descending=True).values)


@check(points=2, hint="variance over squared mean, not (std / mean)^2: a square root has slope "
                      "infinity at 0")
def load_loss_has_a_finite_slope_at_perfect_balance(student, g):
    loss = student.router.load_loss
    even = torch.full((T, E), 1 / E, dtype=torch.float64)
    # (imp - E[imp^2] / E[imp]) times 2 / (E T E[imp]^2): the first of them is 2 / T here
    same("gradient of load_loss at perfect balance", gradient(loss, even), torch.zeros_like(even),
         scale=2 * 2 / T)
    probs = random(g, T, E).softmax(dim=1)
    imp = probs.sum(dim=0) / T
    mean = imp.sum() / E
    expected = (imp * imp).sum() / E / mean ** 2 - 1
    same("load_loss of random probs", loss(probs), expected, scale=2 + expected)
    unit, less = 2 / (E * T * mean ** 2), (imp * imp).sum() / mean / E
    same("gradient of load_loss", gradient(loss, probs), (unit * (imp - less)).expand(T, E),
         scale=unit * (imp.max() + less))


@check(points=2, hint="log_softmax of the logits: log(p) is -inf where p underflows to 0")
def entropy_loss_stays_finite_where_a_probability_underflows(student, g):
    z = torch.tensor([[0.0, -200.0, -1.0], [300.0, 0.0, 0.0]])
    p = math.exp(-1) / (1 + math.exp(-1))
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / 2
    same("entropy_loss with a p of 0", student.router.entropy_loss(z), torch.tensor(entropy))
    slope = gradient(student.router.entropy_loss, z)
    require(slope.isfinite().all(), "gradient of entropy_loss with a p of 0", "finite numbers",
            f"{int((~slope.isfinite()).sum())} entries that are not")
    same("gradient of entropy_loss on the middle logits", slope[0, 2],
         torch.tensor(p * (1 - p) / 2))


@check(points=2, hint="F.one_hot has no gradient and needs none: P, over all tokens, has it")
def balance_loss_moves_every_logit_through_the_mean_probability(student, g):
    z = random(g, T, E)
    experts = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    share = torch.tensor([sum(row.count(e) for row in experts.tolist()) / (T * K)
                          for e in range(E)], dtype=torch.float64)
    p = z.softmax(dim=1).float()
    same("balance_loss of random choices", student.router.balance_loss(p, experts),
         E * (p.double().sum(dim=0) / T @ share).float())
    same("gradient of balance_loss on probs",
         gradient(lambda p: student.router.balance_loss(p, experts), p),
         (E * share.expand(T, E) / T).float())


@check(hint="square after the log-sum-exp, average after the square; logsumexp does not overflow")
def z_loss_pulls_every_logit_and_does_not_overflow(student, g):
    z = random(g, T, E)
    lse = z.exp().sum(dim=1, keepdim=True).log()
    same("z_loss of random logits", student.router.z_loss(z), (lse * lse).sum() / T)
    same("gradient of z_loss", gradient(student.router.z_loss, z), 2 * lse * z.softmax(dim=1) / T)
    same("z_loss of logits 500", student.router.z_loss(torch.full((T, 1), 500.0)),
         torch.tensor(250000.0))


# --- what a formula does not show ---

@check(points=2, hint="every field but the choice and the count carries a gradient: no detach, "
                      "no_grad, item or tolist on the way, in training or with a capacity")
def each_field_of_a_routing_hands_its_own_gradient_to_the_logits(student, g):
    z, kept = random(g, T, E), torch.rand(T, E, generator=g) < 0.8
    student.router.within_capacity = lambda *_: kept
    w = random(g, T, E)
    p = z.softmax(dim=1)
    spread = p * (w - (p * w).sum(dim=1, keepdim=True))         # d <p, w> / dz
    for gate in GATES:
        for options in ({}, {"training": True, "noise": 1.0}):
            leaf = z.clone().requires_grad_()
            routing = route(student, leaf, E, gate, capacity_factor=1.0, **options)
            gates, of = routing.gates.detach(), f"of {gate}{', in training' * bool(options)}"
            if gate == "sigmoid":
                slope = gates * (1 - gates) * w
            else:       # of a token that nobody dropped, for what a dropped gate was is not known
                slope = gates * (w - (gates * w).sum(dim=1, keepdim=True))
            known = kept.all(dim=1) if gate != "sigmoid" else kept.any(dim=1)
            for name, weight, expected in (("probs", w, spread), ("logits", w, w),
                                           ("gates", w * known[:, None], None)):
                field = getattr(routing, name)
                require(field.requires_grad, f"{name} {of}", "a graph back to the logits",
                        "none: it was detached")
                got, = torch.autograd.grad((field * weight).sum(), leaf, retain_graph=True)
                if name == "gates":
                    got, expected = got.gather(1, routing.chosen)[known], (slope * kept)[known]
                # p_e (w_e - sum_i p_i w_i), of two terms
                same(f"the gradient through the {name} {of}", got, expected,
                     scale=2 * w.abs().max())


@check(points=2, hint="keep nothing on self, on a function or in the module: a second batch of the "
                      "same shape has other numbers, and a .grad is the optimizer's")
def a_second_batch_knows_nothing_of_the_first(student, g):
    module = student.router
    for gate in GATES:
        router = with_gradients(module.TopKRouter(D, E, K, gate, capacity_factor=1.0)).eval()
        for batch in range(3):
            z, kept = random(g, T, E), torch.rand(T, K, generator=g) < 0.6
            module.within_capacity = lambda *_, kept=kept: kept
            routing = router.route(z)
            whole = weights(z, K, gate).gather(1, routing.chosen)
            same(f"gates of batch {batch + 1}, {gate}", routing.gates, whole * kept)
            same(f"dropped in batch {batch + 1}, {gate}", int(routing.dropped), int((~kept).sum()))
        stirred = module.TopKRouter(D, E, E, gate, noise=5.0)
        one, two = stirred.route(z).gates, stirred.route(z).gates
        require(not torch.equal(one, two), f"gates of {gate} in two training passes of one router",
                "different noise", "the same values twice")
        keeps_nothing(f"route, {gate}", lambda router=router: router.route(random(g, T, E)))
    for batch in range(2):
        z = random(g, T, E)
        chosen = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
        for name, expected in losses_of(z, chosen).items():
            same(f"{name} of batch {batch + 1}", a_loss(student, name)(z, chosen), expected,
                 scale=2 + expected)
    for name in LOSSES:
        keeps_nothing(name, lambda name=name: a_loss(student, name)(
            random(g, T, E).requires_grad_(), chosen))


@check(hint="take sizes from shapes: one token, one expert and K = E are sizes as any other")
def any_number_of_tokens_experts_and_choices_will_do(student, g):
    for tokens, experts, k in ((1, 1, 1), (1, 5, 3), (2, 3, 3), (3, 7, 4), (64, 8, 1)):
        z, of = random(g, tokens, experts), f"T={tokens}, E={experts}, K={k}"
        for gate in GATES:
            routing = route(student, z, k, gate)
            same(f"gates of {gate}, {of}", routing.gates,
                 weights(z, k, gate).gather(1, routing.chosen))
        for name, expected in losses_of(z, routing.chosen).items():
            same(f"{name}, {of}", a_loss(student, name)(z, routing.chosen), expected,
                 scale=2 + expected)


@check(points=2, hint="exp overflows at 89 in float32: subtract each token's own largest logit, as "
                      "softmax and logsumexp do, and sort the logits themselves")
def large_logits_and_near_ties_lose_nothing_and_float32_stays_float32(student, g):
    z = 200 * torch.randint(-1, 2, (T, E), generator=g) + random(g, T, E)
    z[0], z[1] = -200 - torch.arange(E), 200 + torch.arange(E)
    z = z.float()
    wide = z.double()
    for gate in GATES:
        for k in (2, E):
            routing, of = route(student, z, k, gate), f"{gate}, K={k}, logits near -200, 0 and 200"
            ranks = wide.argsort(dim=1, descending=True)[:, :k]
            same(f"experts of {of}", routing.chosen, ranks)
            # exp(z - log sum exp z) rounds a number near 200
            same(f"gates of {of}", routing.gates, weights(wide, k, gate).gather(1, ranks).float(),
                 scale=wide.abs().max())
            same(f"probs of {of}", routing.probs, wide.softmax(dim=1).float(),
                 scale=wide.abs().max())
    for name, expected in losses_of(wide, ranks).items():
        same(f"{name} of logits near -200, 0 and 200", a_loss(student, name)(z, ranks),
             expected.float(), scale=wide.abs().max() + expected)
    # neighbours in float32: 1, 1 + eps, 1 + 2 eps ...
    order = torch.stack([torch.randperm(E, generator=g) for _ in range(T)])
    near = 1 + order.float() * torch.finfo(torch.float32).eps
    same("experts of logits that differ by one rounding", route(student, near, E).chosen,
         order.argsort(dim=1, descending=True))


@check(hint="whoever reads the loss must see that the logits were NaN: do not replace them")
def a_loss_of_numbers_that_are_none_is_none(student, g):
    z, chosen = random(g, T, E), torch.arange(T * K).view(T, K) % E
    z[4, 2] = math.nan
    for name in LOSSES:
        loss = a_loss(student, name)(z, chosen)
        same(f"{name} with a NaN in one token", loss, torch.full_like(loss, math.nan))


@check(hint="draw only while self.training and with noise: an evaluation must not change the next "
            "training step")
def an_evaluation_draws_no_random_number(student, g):
    z = random(g, T, E)
    for gate in GATES:
        router = student.router.TopKRouter(D, E, K, gate, noise=5.0).eval()
        before = torch.get_rng_state()
        router.route(z)
        require(torch.equal(before, torch.get_rng_state()),
                f"torch's random state after an evaluation with noise=5, {gate}", "as before",
                "another one")


@check(hint="device=logits.device wherever a tensor is made, or randn_like, zeros_like, new_zeros")
def what_is_made_lies_where_the_logits_lie(student, g):
    z, chosen = random(g, T, E), torch.arange(T * K).view(T, K) % E
    kept = torch.rand(T, K, generator=g) < 0.6
    student.router.within_capacity = lambda *_: kept
    for gate in GATES:
        for training in (True, False):
            where_given(f"route, {gate}", lambda gate=gate, training=training: route(
                student, z, gate=gate, training=training, noise=1.0, capacity_factor=1.0))
    for name in LOSSES:
        where_given(name, lambda name=name: a_loss(student, name)(z, chosen))


# --- the answers, measured ---

@check(points=2, hint="in which of the gates does the second weight depend on the first logit?")
def which_logits_of_dropped_choices_get_a_gradient(student, g):
    found = answered(student, "dropped_logit_gets_zero", dict.fromkeys(GATES, True))
    for gate in GATES:
        grad, dropped = gradient_after_a_drop(*a_world(g, 20), gate)
        same(f"C1, {gate}: the dropped choice's gradient is zero", found[gate],
             bool((grad[dropped] == 0).all()))


@check(points=2, hint="does the second weight change when all logits grow by the same number?")
def whether_the_gradient_adds_up_to_zero_after_a_drop(student, g):
    found = answered(student, "gradient_adds_up_to_zero", dict.fromkeys(GATES, True))
    for gate in GATES:
        grad, _ = gradient_after_a_drop(*a_world(g, 20), gate)
        same(f"C2, {gate}: the gradient adds up to zero", found[gate],
             bool((grad.sum(dim=1).abs() <= tolerance(grad.dtype, grad.abs().sum(dim=1))).all()))


@check(points=2, hint="is the output of a dropped choice in y? Then can it be in a gradient?")
def whether_a_better_dropped_expert_is_noticed(student, g):
    found = answered(student, "better_dropped_expert_is_noticed", dict.fromkeys(GATES, True))
    for gate in GATES:
        z, f, dy = a_world(g, 20)
        grad, dropped = gradient_after_a_drop(z, f, dy, gate)
        better = torch.where(dropped[..., None], -50 * dy[:, None], f)
        same(f"C3, {gate}: some entry of dL/dz changes", found[gate],
             bool((gradient_after_a_drop(z, better, dy, gate)[0] != grad).any()))


@check(points=3, hint="C4: who is chosen, ties included? C5: over what is P a mean? C6: E sum f P")
def what_the_losses_reach_and_where_they_end(student, g):
    z = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 3.0]],
                     dtype=torch.float64)
    _, f, dy = a_world(g, 3, 4)
    reached = torch.tensor(answered(student, "reached", [[1] * 4] * 3))
    same("C4, reached", reached.long(), (task_gradient(z, f, dy, 2, "topk_softmax") != 0).long())
    unchosen = weights(z, 2, "topk_softmax") == 0
    share = F.normalize((~unchosen).double().sum(dim=0), p=1, dim=0)
    balance = gradient(lambda z: 4 * (share * z.softmax(dim=1)).sum() / 3, z)
    squares = gradient(lambda z: (z.exp().sum(dim=1).log() ** 2).sum() / 3, z)
    for name, grad in (("balance_loss", balance), ("z_loss", squares)):
        found = answered(student, f"{name}_skips_the_unchosen", True)
        same(f"C5, {name} skips the unchosen", found, bool((grad[unchosen] == 0).all()))
    for end, expected in (("even", 8 * sum(1 / 8 * 1 / 8 for _ in range(8))),
                          ("collapsed", 8 * (1 / 2 * 1))):
        same(f"C6, balance_loss when {end}",
             float(answered(student, f"balance_loss_when_{end}", 1.0)), float(expected))
