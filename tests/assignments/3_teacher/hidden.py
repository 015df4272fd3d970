"""The hidden checks of assignment 3: edges, who learns from what, and the answers measured."""
import math
from types import SimpleNamespace

import numpy as np
import torch
from checking import (
    TYPED,
    D,
    E,
    T,
    answered,
    check,
    gradient,
    keeps_nothing,
    on_a_gpu,
    raises,
    random,
    require,
    same,
    tolerance,
    where_given,
    with_gradients,
)

N = 10              # tokens of an image of 24 x 24 pixels in patches of 8, with the class token
TWO_DECIMALS = 0.01     # "two decimals are enough", says answers.py


# --- what is expected, written down without the student's code ---

def divergences(t, z):
    """KL(softmax(t) || softmax(z)) of each token, from two logits (T, E)."""
    log_t, log_p = (v - torch.logsumexp(v, 1, keepdim=True) for v in (t, z))
    return (log_t.exp() * (log_t - log_p)).sum(dim=1)


def size(t, z):
    """Of what KL(softmax(t) || softmax(z)) is a difference: logits, and log sum exp of them."""
    return (t.abs().max() + z.abs().max()).item() + 2 * math.log(E)


def products(h, weight):
    """The largest sum of a product h (T, D), weight (E, D), if no term cancelled another."""
    return torch.einsum("td,ed->te", h.abs().double(), weight.abs().double()).max().item()


def load(probs):
    even = probs.sum(dim=0) * probs.shape[1] / probs.sum()
    return (even * even).sum() / len(even) - 1


def entropy(logits):
    surprise = torch.logsumexp(logits, 1, keepdim=True) - logits
    return ((-surprise).exp() * surprise).sum() / len(logits)


def cohen(a, b, n_experts):
    """(agreement, chance) of two lists of experts."""
    together = sum(p == q for p, q in zip(a, b, strict=True)) / len(a)
    return together, sum(a.count(e) * b.count(e) for e in range(n_experts)) / len(a) ** 2


# --- what is given to the student's code ---

def vit(student, depth=6, dim=D, patch=8, **options):
    return student.moe.ViT(dim, depth, heads=2, hidden=24, patch=patch, n_classes=3, image_size=24,
                           **options)


def pupil(student, moe_blocks=(2, 5)):
    return vit(student, 6, 16, moe_blocks=moe_blocks,
               make_sparse=lambda: student.moe.MoE(16, 24, E, k=1))


def pictures(g, n=3):
    return random(g, n, 3, 24, 24, dtype=torch.float32)


def stand_ins(student):
    """load_loss and entropy_loss belong to assignment 1 and may be wrong in a student's tree."""
    for module in (student.router, student.teacher):
        module.load_loss, module.entropy_loss = load, entropy


# --- A: the guidance ---

@check(hint="0 log 0 is 0: F.kl_div knows it, p * p.log() does not")
def a_teacher_may_rule_an_expert_out(student, g):
    learner = random(g, T, E)
    for no in (-math.inf, -2000.0):                 # the softmax of the second underflows to 0
        t = random(g, T, E)
        t[:, 1] = no
        rest = [0, 2, 3, 4]
        of_all = learner.softmax(1)[:, rest].sum(1)         # what the student leaves to the others
        expected = (divergences(t[:, rest], learner[:, rest]) - of_all.log()).sum() / T
        same(f"guidance_loss with a teacher's logit of {no}",
             student.teacher.guidance_loss(t, learner), expected)
        slope = gradient(lambda z, t=t: student.teacher.guidance_loss(t, z), learner)
        same(f"its gradient with a teacher's logit of {no}", slope,
             (learner.softmax(1) - t.softmax(1)) / T)


@check(hint="log_softmax of the student's logits: the log of a softmax is -inf where it "
                      "underflows")
def a_student_that_ruled_an_expert_out_is_guided_back(student, g):
    t, z = random(g, T, E), random(g, T, E)
    z[:, 3] = -2000.0
    same("guidance_loss with a student's logit of -2000", student.teacher.guidance_loss(t, z),
         divergences(t, z).sum() / T)
    slope = gradient(lambda z: student.teacher.guidance_loss(t, z), z)
    same("its gradient", slope, (z.softmax(1) - t.softmax(1)) / T)


@check(hint="reshape the T tokens to (images, n_tokens), then take the first or leave it out")
def the_tokens_that_are_not_asked_about_get_no_gradient(student, g):
    t, z = random(g, 2 * N, E), random(g, 2 * N, E)
    for n in (N, 5, 2):                     # 2, 4 and 10 images
        is_class = torch.tensor([i % n == 0 for i in range(2 * N)])
        for tokens, asked in (("class", is_class), ("patches", ~is_class)):
            slope = gradient(lambda z, k=tokens, n=n: student.teacher.guidance_loss(t, z, k, n), z)
            expected = (z.softmax(1) - t.softmax(1)) * asked[:, None] / asked.sum()
            same(f"gradient with tokens={tokens!r}, n_tokens={n}", slope, expected)


@check(hint="a mean, not a sum; softmax over the experts (the last axis), at temperature 1")
def guidance_is_silent_where_the_student_agrees_and_no_louder_for_more_tokens(student, g):
    guidance = student.teacher.guidance_loss
    t, z = random(g, T, E), random(g, T, E)
    same("guidance_loss of logits that differ by a constant", guidance(t, t + 3),
         torch.tensor(0.0, dtype=torch.float64), scale=size(t, t + 3))
    expected = divergences(t, z).sum() / T
    same("guidance_loss of every token twice", guidance(t.repeat(2, 1), z.repeat(2, 1)), expected)
    same("guidance_loss of T tokens, and of T more that agree", guidance(
        torch.cat([t, z]), torch.cat([z, z])), expected / 2)
    for c in (0.1, 4.0):
        same(f"guidance_loss of logits times {c}", guidance(c * t, c * z),
             divergences(c * t, c * z).sum() / T, scale=size(c * t, c * z))


@check(points=2, hint="exp overflows at 89 in float32, and log of what underflowed is -inf: take "
                      "softmax, log_softmax and the losses that are imported")
def logits_of_200_are_no_more_than_large_and_float32_stays_float32(student, g):
    stand_ins(student)
    t, z = (200 * torch.randint(-1, 2, (T, E), generator=g) + random(g, T, E) for _ in range(2))
    z[0], t[0] = 200, -200                                      # all of them: still even
    t, z = t.float().double(), z.float().double()
    guidance = student.teacher.guidance_loss
    same("guidance_loss of float32 logits near -200, 0 and 200", guidance(t.float(), z.float()),
         (divergences(t, z).sum() / T).float(), scale=size(t, z))
    slope = gradient(lambda z: guidance(t.float(), z), z.float())
    # exp(z - log sum exp z) rounds a number near 200
    same("its gradient", slope, ((z.softmax(1) - t.softmax(1)) / T).float(), scale=size(t, z) / T)
    losses = student.teacher.teacher_router_losses({2: t.float(), 4: z.float()})
    for name, loss, got in (("L_load", lambda z: load(z.softmax(1)), losses[0]),
                            ("L_ent", entropy, losses[1])):
        same(f"{name} of float32 logits near -200, 0 and 200", got,
             (loss(t) + loss(z)).float(), scale=size(t, z) + loss(t) + loss(z))


@check(hint="make tensors with device=, that of the logits, and hand h.device.type to autocast")
def on_a_gpu_nothing_is_made_on_the_cpu(student, g):
    stand_ins(student)
    t, z = random(g, 2 * N, E), random(g, 2 * N, E)
    for tokens in ("all", "class", "patches"):
        where_given(f"guidance_loss, tokens={tokens!r}",
                    lambda k=tokens: student.teacher.guidance_loss(t, z, k, N))
    where_given("teacher_router_losses",
                lambda: student.teacher.teacher_router_losses({2: t, 5: z}))
    guide, x = student.teacher.Guide(vit(student), pupil(student), E), pictures(g)
    where_given("Guide.forward", lambda: guide(x))
    router = student.teacher.TeacherRouter(D, E)

    def under_autocast(h, weight):
        router.weight = torch.nn.Parameter(weight)
        torch.set_autocast_enabled("cuda", True)        # torch.autocast asks whether there is a GPU
        try:
            return router(h)
        finally:
            torch.set_autocast_enabled("cuda", False)
    z = on_a_gpu(student, under_autocast, torch.empty(T, D), router.weight)
    require(z is None or z.dtype == torch.float32, "dtype of a TeacherRouter's logits on a GPU, "
            "under autocast", torch.float32, getattr(z, "dtype", None))


@check(hint="raise ValueError with a sentence that names what was given")
def what_cannot_be_compared_is_refused(student, g):
    z = random(g, 2 * N, E)
    for shape in ((1, E), (2 * N, 1), (N, E)):
        t = random(g, *shape)
        error = raises(f"guidance_loss of logits {shape} and {(2 * N, E)}", ValueError,
                       lambda t=t: student.teacher.guidance_loss(t, z))
        require(str(shape) in str(error), "the message for a wrong shape",
                f"something with {shape}", repr(str(error)), "name both shapes as tuples")
    error = raises("guidance_loss with tokens='cls'", ValueError,
                   lambda: student.teacher.guidance_loss(z, z, "cls", N))
    require("cls" in str(error), "the message for tokens='cls'", "something with 'cls'",
            repr(str(error)), "say what was given and what can be chosen")


# --- B: the teacher's routers ---

@check(hint="switch autocast off around the product and make both sides float32")
def targets_are_float32_whatever_the_autocast(student, g):
    router = student.teacher.TeacherRouter(D, E)
    h, weight = random(g, T, D, dtype=torch.float32).bfloat16(), random(g, E, D)
    with torch.no_grad():
        router.weight.copy_(weight)
    expected = torch.einsum("td,ed->te", h.double(), weight.float().double()).float()
    scale = products(h, weight)
    same("logits of bfloat16 features", router(h), expected, scale=scale)
    with torch.autocast("cpu", torch.bfloat16):
        same("logits of bfloat16 features under autocast", router(h), expected, scale=scale)
        same("logits of float32 features under autocast", router(h.float()), expected, scale=scale)


@check(points=2, hint="no detach, no mean over the blocks, the signs of router.py")
def both_losses_of_the_teacher_routers_have_a_gradient(student, g):
    stand_ins(student)
    zs = [random(g, T, E), random(g, T, E), 2 * random(g, T + 3, E)]
    for which, name, loss in ((0, "L_load", lambda z: load(z.softmax(1))), (1, "L_ent", entropy)):
        got = gradient(lambda *zs, i=which: student.teacher.teacher_router_losses(
            dict(zip((1, 4, 6), zs, strict=True)))[i], *zs)
        expected = gradient(lambda *zs, loss=loss: sum(map(loss, zs)), *zs)
        for block, mine, theirs in zip((1, 4, 6), got, expected, strict=True):
            # p (g - sum p g), where g is 2 E (imp - E[imp^2] / E[imp]) / T, or (log p + H) / T
            same(f"gradient of {name} on the logits of block {block}", mine, theirs,
                 scale=2 * 2 * E * 2 / T)


# --- C: the guide ---

@check(hint="each sparse block has a TeacherRouter of its own, on its own features")
def every_block_gets_targets_from_its_own_router(student, g):
    guide = student.teacher.Guide(vit(student, 12), pupil(student), E)
    x = pictures(g)
    weights = {b: random(g, E, D, dtype=torch.float32) for b in (2, 5)}
    require(not torch.equal(guide.routers["2"].weight, guide.routers["5"].weight),
            "the first weights of two teacher routers", "different ones", "the same")
    other = student.teacher.Guide(vit(student, 12), pupil(student), E)
    require(not torch.equal(guide.routers["2"].weight, other.routers["2"].weight),
            "the first weights of the teacher routers of two guides", "different ones", "the same",
            "do not set the seed: that is for whoever starts the run")
    with torch.no_grad():
        for b, weight in weights.items():
            guide.routers[str(b)].weight.copy_(weight)
    h, z = guide.features(x), guide(x)
    same("the blocks with targets", sorted(z), [2, 5])
    for b in (2, 5):
        expected = torch.einsum("td,ed->te", h[b].double(), weights[b].double()).float()
        same(f"targets of block {b}", z[b], expected, scale=products(h[b], weights[b]))
    alone = guide(x[2:])
    same("targets of the third image, sent alone", alone[5], z[5][2 * N:],
         scale=products(h[5], weights[5]))


@check(hint="`blocks` given replaces the alignment: {student block: teacher block}")
def another_alignment_is_followed(student, g):
    dense = vit(student, 12)
    guide = student.teacher.Guide(dense, pupil(student), E, blocks={2: 12, 5: 3})
    x = pictures(g)
    layers = dense(x).layers
    h = guide.features(x)
    for mine, theirs in ((2, 12), (5, 3)):
        same(f"features for block {mine} with blocks={{2: 12, 5: 3}}", h[mine],
             layers[theirs].h.detach())
    same("the blocks with targets", sorted(guide(x)), [2, 5])
    guide = student.teacher.Guide(dense, pupil(student), E, blocks={5: 7})
    same("the blocks with a router, blocks={5: 7} for a student with sparse blocks 2 and 5",
         sorted(guide.routers), ["5"])
    guide = student.teacher.Guide(vit(student, 8), pupil(student), E)
    same("blocks for a teacher of 8 blocks and a student of 6", dict(guide.blocks), {2: 3, 5: 7})


@check(hint="on_grid brings features (B, N, D) to as many tokens as the student has")
def a_teacher_that_cuts_images_into_other_patches_is_brought_on_the_students_grid(student, g):
    coarse, x = vit(student, patch=12), pictures(g)                 # 5 tokens for a student's 10
    guide = student.teacher.Guide(coarse, pupil(student), E)
    h = guide.features(x)
    for mine, number in guide.blocks.items():
        theirs = coarse(x).layers[number].h.detach().unflatten(0, (len(x), 5))
        same(f"the shape of block {mine}'s features by a teacher of 5 tokens an image",
             tuple(h[mine].shape), (10 * len(x), theirs.shape[2]))
        tokens = h[mine].unflatten(0, (len(x), 10))
        same("the class token", tokens[:, 0], theirs[:, 0])
        same("the middle patch, as near to all four", tokens[:, 5], theirs[:, 1:].mean(dim=1))
    fine = vit(student, patch=6)                                    # 17 tokens
    h = student.teacher.Guide(fine, pupil(student), E).features(x)
    theirs = fine(x).layers[2].h.detach().unflatten(0, (len(x), 17))
    same("the shape of block 2's features by a teacher of 17 tokens an image", tuple(h[2].shape),
         (10 * len(x), theirs.shape[2]))
    same("the first of 9 patches, over four of 16", h[2].unflatten(0, (len(x), 10))[:, 1],
         theirs[:, [1, 2, 5, 6]].mean(dim=1), scale=theirs.abs().max().item())


@check(points=2, hint="Guide.train sets modes and nothing else; a look at images keeps neither "
                      "features nor targets")
def what_somebody_set_stays_and_a_second_batch_gets_features_of_its_own(student, g):
    guide = with_gradients(student.teacher.Guide(vit(student), pupil(student), E))
    for learning in (False, True):
        guide.routers.requires_grad_(learning)          # the paper has a control that is frozen
        for mode in (True, False, True):
            guide.train(mode)
            found = {p.requires_grad for p in guide.routers.parameters()}
            require(found == {learning}, f"requires_grad of teacher routers that somebody set to "
                    f"{learning}, after guide.train({mode})", learning, not learning)
    for name, p in guide.routers.named_parameters():
        same(f"the .grad that {name} of a guide had before guide.train()", p.grad,
             torch.ones_like(p))
    one, two = pictures(g), pictures(g)
    guide(one)
    seen = {}
    for number, block in enumerate(guide.teacher.blocks, start=1):
        block.norm2.register_forward_hook(lambda m, args, y, n=number: seen.update({n: y}))
    guide.teacher(two)
    expected = {mine: seen[theirs].flatten(0, 1) for mine, theirs in guide.blocks.items()}
    for mine, h in guide.features(two).items():
        same(f"features for block {mine} of a second batch", h, expected[mine])
    keeps_nothing("a guide", lambda: guide(pictures(g)))


@check(points=2, hint="the teacher runs without a graph, the teacher routers with one; handout, C")
def the_teacher_learns_from_nothing_and_its_routers_from_their_own_losses(student, g):
    stand_ins(student)
    guide = student.teacher.Guide(vit(student), pupil(student), E)
    x = pictures(g)
    guide.teacher.requires_grad_(True)              # somebody thaws it: still no graph is kept
    require(not any(h.requires_grad for h in guide.features(x).values()),
            "features of a teacher that somebody thawed", "no graph", "a graph")
    require(not any(h.is_inference() for h in guide.features(x).values()),
            "features of a guide", "tensors that a router can learn from",
            "those of torch.inference_mode, which no backward accepts", "torch.no_grad will do")
    guide.teacher.requires_grad_(False)
    mine = random(g, E, 16, dtype=torch.float32).requires_grad_()       # a student's router
    logits = random(g, 3 * N, 16, dtype=torch.float32) @ mine.T
    targets = guide(x)
    require(all(z.requires_grad for z in targets.values()), "targets of a guide",
            "a graph back to the teacher routers", "no graph")
    sum(student.teacher.guidance_loss(z, logits) for z in targets.values()).backward()
    require(mine.grad is not None and mine.grad.any(),
            "gradient of the guidance on the student's router", "not zero", "none")
    taught = [name for name, p in guide.named_parameters()
              if p.grad is not None and p.grad.abs().max() > 0]
    require(not taught, "parameters of the guide with a gradient from the guidance", "none",
            ", ".join(taught))
    sum(student.teacher.teacher_router_losses(guide(x))).backward()
    taught = sorted(name for name, p in guide.named_parameters() if p.grad is not None)
    same("parameters of the guide with a gradient from the teacher routers' losses", taught,
         ["routers.2.weight", "routers.5.weight"])


# --- D: the measures ---

@check(points=2, hint="None where chance always agrees, both routings on the same expert; else not")
def kappa_is_undefined_where_chance_always_agrees_and_nowhere_else(student, g):
    kappa = student.report.kappa
    one, other = torch.full((T,), 3).numpy(), torch.full((T,), 1).numpy()
    same("kappa of a router that is collapsed on expert 3 in both epochs", kappa(one, one, E), None)
    same("agreement of that router", student.report.agreement(one, one), 1.0)
    for name, a, b in (("collapsed on 3, then on 1", one, other),
                       ("collapsed on 3, then random", one, torch.randint(
                           E, (T,), generator=g).numpy()),
                       ("random, twice the same", *2 * [torch.arange(T).remainder(E).numpy()])):
        together, chance = cohen(a.tolist(), b.tolist(), E)
        got, expected = kappa(a, b, E), (together - chance) / (1 - chance)
        same(f"kappa of {name}", got, expected, scale=(together + chance) / (1 - chance))
    # one of 400 tokens changed its expert, of 12
    a = torch.randint(E, (1,), generator=g).repeat(400)
    b, c = (torch.where(torch.arange(400) < n, 11, a) for n in (1, 100))
    for name, one, two in (("a router that sends one of 400 tokens elsewhere", a, b),
                           ("two that send 1 and 100 of 400 to expert 11 of 12", b, c)):
        together, chance = cohen(one.tolist(), two.tolist(), 12)
        got, expected = kappa(one.numpy(), two.numpy(), 12), (together - chance) / (1 - chance)
        same(f"kappa of {name}", got, expected, "chance is 1 only where both are one expert's",
             scale=(together + chance) / (1 - chance))
    # images and tokens, and an expert that nobody visits
    a, b = torch.randint(E - 1, (2, 4, T), generator=g)
    together, chance = cohen(a.flatten().tolist(), b.flatten().tolist(), E)
    got = kappa(a.numpy(), b.numpy(), E)
    same("kappa of assignments (4, 37)", got, (together - chance) / (1 - chance),
         scale=(together + chance) / (1 - chance))


@check(hint="one number per token, whatever the axes after the first")
def a_history_may_have_images_and_tokens(student, g):
    history = torch.randint(3, (5, 4, N), generator=g)
    history[:, 0, 0] = 2                            # a token that never moves
    expected = torch.zeros(4, N, dtype=torch.long)
    for t in range(5):
        expected[history[t] != history[4]] = t + 1
    got = torch.as_tensor(student.report.last_fluctuation(history.numpy()))
    same("last_fluctuation of a history (5, 4, 10)", got, expected)
    got = torch.as_tensor(student.report.last_fluctuation(history[:, :1].numpy()))
    same("last_fluctuation of a history (5, 1, 10)", got, expected[:1])
    long = np.zeros((300, 3), dtype=np.uint8)       # of 300 epochs, as a run may have
    long[:299, 1], long[270:290, 2] = 4, 200
    same("last_fluctuation of 300 epochs", torch.as_tensor(student.report.last_fluctuation(long)),
         torch.tensor([0, 299, 290]))
    got = torch.as_tensor(student.report.last_fluctuation(history[4:].numpy()))
    same("last_fluctuation of one epoch", got, torch.zeros(4, N, dtype=torch.long))


# --- the answers, measured ---

def a_world(g):
    """The losses of a two-block student and its guide, and their parameters, in plain tensors."""
    names = ("trunk", "router 2", "experts 2", "router", "experts", "teacher", "teacher router 2",
             "teacher router")
    shapes = ((D, D), (E, D), (E, D, D), (E, D), (E, D, D), (D, D), (E, D), (E, D))
    values = [random(g, *shape) / D ** 0.5 for shape in shapes]
    x, goal = random(g, T, D), random(g, T, D)

    def losses(*values):
        w = dict(zip(names, values, strict=True))
        h, guidance, own = x @ w["trunk"], 0, 0
        for block in (" 2", ""):
            z = h @ w["router" + block].T
            p, first = z.softmax(1).max(dim=1)
            y = torch.einsum("td,tdf->tf", h, w["experts" + block][first])
            with torch.no_grad():
                feature = x @ w["teacher"]
            t = feature @ w["teacher router" + block].T
            guidance = guidance + divergences(t.detach(), z).sum() / T
            own = own + load(t.softmax(1)) + entropy(t)
            h = h + p[:, None] * y
        return SimpleNamespace(task=((h - goal) ** 2).sum(), guidance=guidance,
                               teacher_router_losses=own)
    return names, values, losses


@check(points=3, hint="follow each loss back: what was it computed from, and where is a detach?")
def who_gets_a_gradient_from_which_loss(student, g):
    names, values, losses = a_world(g)
    parts = ("router", "experts", "trunk", "teacher router", "teacher")
    for loss in ("task", "guidance", "teacher_router_losses"):
        found = answered(student, f"from_the_{loss}", dict.fromkeys(parts, True))
        grads = gradient(lambda *v, loss=loss: getattr(losses(*v), loss), *values)
        reached = {n: bool(v.abs().max() > 0) for n, v in zip(names, grads, strict=True)}
        for part in parts:
            same(f"E1, from_the_{loss}: {part} gets a gradient", found[part], reached[part])


@check(points=2, hint="p - p_teacher for one token; then the mean over T and the weight 5 / |S|")
def what_an_unselected_expert_gets(student, g):
    p, q = torch.tensor([[4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 4.0, 2.0]], dtype=torch.float64) / 8
    slope = gradient(lambda z: divergences(q.log()[None], z).sum(), p.log()[None])[0]
    found = answered(student, "gradient_on_logits", [0.5] * 4)
    for e in range(4):
        require(abs(found[e] - slope[e]) < TYPED, f"E2, gradient on the logit of expert {e}",
                f"{slope[e]:.4f}", found[e])
    t, z = random(g, 10, 4), random(g, 10, 4)
    t[7], z[7] = torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), torch.tensor(
        [0.25, 0.5, 0.125, 0.125]).log()
    slope = gradient(lambda z: 5 / 2 * divergences(t, z).mean(), z)[7, 0].item()
    found = answered(student, "gradient_on_an_unselected_logit", 0.5)
    require(abs(found - slope) < TYPED, "E3, gradient on an unselected logit", f"{slope:.4f}",
            found)
    names, values, losses = a_world(g)
    others = [2 * v if name == "experts" else v for name, v in zip(names, values, strict=True)]
    here, there = (gradient(lambda *v: losses(*v).guidance, *v)[names.index("router")]
                   for v in (values, others))
    same("E3, depends on the expert's output", answered(
        student, "depends_on_the_experts_output", True), not torch.equal(here, there))


@check(points=2, hint="weight 0 makes every p 1/E. Where do L_load and L_ent have their extrema?")
def which_routers_can_start_from_zero(student, g):
    h, t, zero = random(g, T, D), random(g, T, E), torch.zeros(E, D, dtype=torch.float64)
    measured = {
        "teacher router, from L_load": gradient(lambda w: load((h @ w.T).softmax(1)), zero),
        "teacher router, from L_ent": gradient(lambda w: entropy(h @ w.T), zero),
        "student's router, from the guidance": gradient(
            lambda w: divergences(t, h @ w.T).sum() / T, zero),
    }
    found = answered(student, "zero_start_gets_a_gradient", dict.fromkeys(measured, True))
    for name, slope in measured.items():
        rounding = tolerance(slope.dtype, h.abs().max())
        same(f"E4, {name}", found[name], bool(slope.abs().max() > rounding))


@check(hint="L_load is 0 when even and E - 1 when collapsed; L_ent is between 0 and log E")
def where_the_two_losses_of_a_teacher_router_end(student, g):
    sure = 1000.0 * torch.eye(8, dtype=torch.float64)
    ends = {"even and unsure": 0 * sure, "sure and collapsed": sure[[0] * 8], "sure and even": sure}
    found = answered(student, "load_and_entropy", {end: [0.5, 0.5] for end in ends})
    for name, z in ends.items():
        for i, what, value in ((0, "L_load", load(z.softmax(1)).item()),
                               (1, "L_ent", entropy(z).item())):
            require(abs(found[name][i] - value) < TWO_DECIMALS, f"E5, {what} when {name}",
                    f"{value:.2f}", found[name][i])


@check(points=2, hint="chance is the sum over experts of the product of its two loads")
def which_routers_agree_and_which_agree_beyond_chance(student, g):
    # as many tokens as there are chances: 100 for the coin's four cases
    routers = {"coin": ([0] * 90 + [1] * 10, [0] * 81 + [1] * 9 + [0] * 9 + [1]),
               "swapped": ([0, 1] * 50, [1, 0] * 50),
               "collapsed": ([3] * 100, [3] * 100), "wandering": ([3] * 100, [1] * 100)}
    agree = answered(student, "agreement_of", dict.fromkeys(routers, 0.5))
    undefined = answered(student, "kappa_is_undefined", dict.fromkeys(routers, True))
    beyond = answered(student, "kappa_of", {n: 0.5 for n in routers if n != "collapsed"})
    for name, (a, b) in routers.items():
        together, chance = cohen(a, b, 4)
        require(abs(agree[name] - together) < TYPED, f"E6, agreement of {name}", together,
                agree[name])
        same(f"E6, kappa of {name} is undefined", undefined[name], chance == 1)
        if chance < 1:
            kappa = (together - chance) / (1 - chance)
            require(abs(beyond[name] - kappa) < TYPED, f"E6, kappa of {name}", f"{kappa:.2f}",
                    beyond[name])
