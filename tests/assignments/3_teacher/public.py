"""The public checks of assignment 3: the KL, the teacher's routers, the guide, three measures."""
import math
from types import SimpleNamespace

import torch
from checking import D, E, T, answered, check, gradient, random, require, same

N = 10              # tokens of an image of 24 x 24 pixels in patches of 8, with the class token


def shares(row):
    """softmax of one row of numbers."""
    total = sum(map(math.exp, row))
    return [math.exp(v) / total for v in row]


def divergence(t, z):
    """KL(softmax(t) || softmax(z)) of one token."""
    return sum(p * math.log(p / q) for p, q in zip(shares(t), shares(z), strict=True))


def vit(student, depth=6, dim=D, **options):
    return student.moe.ViT(dim, depth, heads=2, hidden=24, patch=8, n_classes=3, image_size=24,
                           **options)


def pupil(student, depth=6, moe_blocks=(2, 5)):
    """A student with sparse blocks, narrower than its teacher."""
    return vit(student, depth, 16, moe_blocks=moe_blocks,
               make_sparse=lambda: student.moe.MoE(16, 24, E, k=1))


def pictures(g, n=3):
    return random(g, n, 3, 24, 24, dtype=torch.float32)


def stand_ins(student):
    """load_loss and entropy_loss, which belong to assignment 1 and may be blank or wrong here."""
    def load(probs):
        even = probs.sum(dim=0) * probs.shape[1] / probs.sum()
        return (even * even).sum() / len(even) - 1

    def entropy(logits):
        surprise = torch.logsumexp(logits, 1, keepdim=True) - logits
        return ((-surprise).exp() * surprise).sum() / len(logits)
    for module in (student.router, student.teacher):
        module.load_loss, module.entropy_loss = load, entropy
    return SimpleNamespace(load=load, entropy=entropy)


# --- A: the guidance ---

@check(points=2, hint="sum over experts of p_t (log p_t - log p), then the mean over the tokens")
def guidance_is_the_kl_divergence_from_the_teachers_side(student, g):
    guidance = student.teacher.guidance_loss
    t = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()      # p_teacher = (3/4, 1/4)
    z = torch.tensor([[5.0, 5.0]], dtype=torch.float64).log()      # p         = (1/2, 1/2)
    # a cross-entropy of log 2 minus an entropy of 0.56
    same("guidance_loss for (3/4, 1/4) against (1/2, 1/2)", guidance(t, z),
         torch.tensor(0.75 * math.log(1.5) - 0.25 * math.log(2), dtype=torch.float64),
         scale=math.log(2) + 0.57)
    t, z = random(g, T, E), random(g, T, E)
    expected = sum(map(divergence, t.tolist(), z.tolist())) / T
    same("guidance_loss of random logits", guidance(t, z),
         torch.tensor(expected, dtype=torch.float64))


@check(points=2, hint="p - p_teacher for every expert, over T for the mean over the tokens")
def its_gradient_reaches_every_expert_of_every_token(student, g):
    t, z = random(g, T, E), random(g, T, E)
    expected = torch.tensor([[(p - q) / T for p, q in zip(shares(a), shares(b), strict=True)]
                             for a, b in zip(z.tolist(), t.tolist(), strict=True)],
                            dtype=torch.float64)
    slope = gradient(lambda z: student.teacher.guidance_loss(t, z), z)
    same("gradient on the student's logits", slope, expected)


@check(hint="stop the gradient at the target, not at the student: detach its logits")
def the_target_gets_no_gradient_from_the_student(student, g):
    t, z = random(g, T, E), random(g, T, E)
    to_target, to_student = gradient(student.teacher.guidance_loss, t, z)
    require(to_student.any(), "gradient of guidance_loss on the student's logits", "not zero",
            "zero everywhere")
    same("gradient of guidance_loss on the teacher router's logits", to_target,
         torch.zeros(T, E, dtype=torch.float64))


@check(hint="row b * n_tokens is the class token of image b; the rest are its patches")
def a_mean_over_all_tokens_over_the_class_tokens_or_over_the_patches(student, g):
    B = 4
    t, z = random(g, B * N, E), random(g, B * N, E)
    per_token = list(map(divergence, t.tolist(), z.tolist()))
    parts = {"all": per_token, "class": per_token[::N],
             "patches": [v for i, v in enumerate(per_token) if i % N]}
    for tokens, values in parts.items():
        same(f"guidance_loss of tokens={tokens!r}", student.teacher.guidance_loss(t, z, tokens, N),
             torch.tensor(sum(values) / len(values), dtype=torch.float64))


# --- B: the teacher's routers ---

@check(hint="features times the transposed weight; no bias, no softmax")
def a_teacher_router_is_one_linear_map(student, g):
    router = student.teacher.TeacherRouter(D, E)
    h, weight = random(g, T, D, dtype=torch.float32), random(g, E, D, dtype=torch.float32)
    with torch.no_grad():
        router.weight.copy_(weight)
    expected = torch.einsum("td,ed->te", h.double(), weight.double()).float()
    same("logits of a TeacherRouter", router(h), expected,
         scale=torch.einsum("td,ed->te", h.abs(), weight.abs()).max())


@check(points=2, hint="a pair: L_load from probs, L_ent from logits, each a sum over the blocks")
def the_teacher_routers_losses_are_two_sums_over_the_blocks(student, g):
    losses = stand_ins(student)
    targets = {2: random(g, T, E), 5: 3 * random(g, T, E), 6: random(g, T, E) / 2}
    load, entropy = student.teacher.teacher_router_losses(targets)
    expected = sum(losses.load(torch.tensor([shares(r) for r in z.tolist()], dtype=torch.float64))
                   for z in targets.values())
    # as E[x^2] - E[x]^2, by E[x]^2, it is what two terms leave that are 1 + L and 1
    same("L_load over three blocks", load, expected, scale=3 * 2 + expected)
    surprise = sum(-p * math.log(p) for z in targets.values() for row in z.tolist()
                   for p in shares(row))
    same("L_ent over three blocks", entropy, torch.tensor(surprise / T, dtype=torch.float64))


# --- C: the guide ---

@check(points=2, hint="requires_grad_(False) and eval() on the teacher; its routers are new and "
                      "do learn")
def a_guide_freezes_its_teacher_and_not_its_teacher_routers(student, g):
    dense = vit(student)
    guide = student.teacher.Guide(dense, pupil(student), E)
    require(guide.teacher is dense, "guide.teacher", "the very ViT that was given", "another one",
            "freeze it in place, do not copy it")
    learning = sum(p.requires_grad for p in dense.parameters())
    require(learning == 0, "parameters of the teacher that require a gradient", 0, learning)
    require(not any(m.training for m in dense.modules()), "the teacher's mode", "evaluation",
            "training")
    same("names of guide.routers", sorted(guide.routers), ["2", "5"])
    for name, router in guide.routers.items():
        same(f"weight of the router of block {name}, shape", tuple(router.weight.shape), (E, D))
        require(router.weight.requires_grad, f"the router of block {name}", "learning", "frozen")


@check(hint="call super().train(mode), put the teacher back into evaluation, return self")
def a_guide_that_is_told_to_train_keeps_its_teacher_in_evaluation(student, g):
    dense = vit(student, drop_path=0.5).train()
    guide = student.teacher.Guide(dense, pupil(student), E)
    for mode in (True, False):
        returned = guide.train(mode)
        require(returned is guide, f"what guide.train({mode}) returns", "the guide",
                repr(type(returned).__name__))
        for what, got, expected in (("the guide", guide.training, mode),
                                    ("its routers", guide.routers.training, mode),
                                    ("its teacher", dense.training, False),
                                    ("a block of its teacher", dense.blocks[3].training, False)):
            require(got == expected, f"training of {what} after guide.train({mode})", expected, got)
    guide.train()
    x = pictures(g)
    one, two = guide.features(x), guide.features(x)
    same("features of one batch, asked for twice", two[5], one[5])


@check(hint="student block b of d is aligned with teacher block round(b * depth / d), at least 1")
def blocks_are_aligned_by_relative_depth(student, g):
    for depth, expected in ((12, {1: 2, 4: 8, 6: 12}), (8, {1: 1, 4: 5, 6: 8}),
                            (2, {1: 1, 4: 1, 6: 2})):
        guide = student.teacher.Guide(vit(student, depth), pupil(student, 6, (1, 4, 6)), E)
        same(f"blocks for a teacher of {depth} blocks and a student of 6", dict(guide.blocks),
             expected)


@check(hint="teacher(images).layers[number].h, from the aligned teacher block")
def features_are_what_the_mlp_of_the_aligned_block_was_given(student, g):
    dense, seen = vit(student, 12), {}
    guide = student.teacher.Guide(dense, pupil(student), E)
    for number, block in enumerate(dense.blocks, start=1):
        block.norm2.register_forward_hook(lambda m, args, y, n=number: seen.update({n: y}))
    x = pictures(g)
    h = guide.features(x)
    dense(x)                                        # all images at once, and the last to be seen
    same("the student's blocks with features", sorted(h), [2, 5])
    for mine, theirs in ((2, 4), (5, 10)):
        same(f"features for block {mine}", h[mine], seen[theirs].detach().flatten(0, 1))


# --- D: the measures ---

@check(hint="the share of places with equal numbers; a float")
def agreement_is_the_share_of_tokens_with_the_same_expert(student, g):
    a, b = torch.randint(E, (2, 4, T), generator=g)
    matches = sum(p == q for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    same("agreement of two random assignments", student.report.agreement(a.numpy(), b.numpy()),
         matches / (4 * T))
    same("agreement of lists", student.report.agreement([0, 1, 2, 2], [0, 1, 2, 0]), 0.75)


@check(hint="(agreement - chance) / (1 - chance); chance is a product of two loads")
def kappa_takes_off_the_agreement_that_chance_has(student, g):
    a, b = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 1])
    # agree 1/2; loads (3/4, 1/4, 0) and (1/4, 1/2, 1/4), chance 3/16 + 2/16 = 5/16; (8-5)/(16-5)
    same("kappa worked by hand", student.report.kappa(a.numpy(), b.numpy(), 3), 3 / 11)
    a, b = torch.randint(E, (2, T), generator=g).tolist()
    together = sum(p == q for p, q in zip(a, b, strict=True)) / T
    chance = sum(a.count(e) * b.count(e) for e in range(E)) / T ** 2
    got = student.report.kappa(torch.tensor(a).numpy(), torch.tensor(b).numpy(), E)
    same("kappa of two random assignments", got, (together - chance) / (1 - chance),
         scale=(together + chance) / (1 - chance))


@check(hint="the largest epoch, from 1, whose expert differs from that of the last epoch; else 0")
def the_last_fluctuation_is_the_last_epoch_away_from_the_final_expert(student, g):
    history = torch.randint(3, (7, T), generator=g)                     # 7 epochs
    expected = [max([t + 1 for t, e in enumerate(column) if e != column[-1]], default=0)
                for column in history.T.tolist()]
    got = student.report.last_fluctuation(history.numpy())
    same("last_fluctuation of a random history", torch.as_tensor(got), torch.tensor(expected))


@check(hint="this check looks at the form alone; the hidden ones measure whether you are right")
def every_question_has_an_answer_of_the_right_form(student, g):
    parts = dict.fromkeys(("router", "experts", "trunk", "teacher router", "teacher"), True)
    for loss in ("task", "guidance", "teacher_router_losses"):
        answered(student, f"from_the_{loss}", parts)
    answered(student, "gradient_on_logits", [0.5] * 4)
    answered(student, "gradient_on_an_unselected_logit", 0.5)
    answered(student, "depends_on_the_experts_output", True)
    answered(student, "zero_start_gets_a_gradient", dict.fromkeys((
        "teacher router, from L_load", "teacher router, from L_ent",
        "student's router, from the guidance"), True))
    ends = ("even and unsure", "sure and collapsed", "sure and even")
    answered(student, "load_and_entropy", {end: [0.5, 0.5] for end in ends})
    four = ("coin", "swapped", "collapsed", "wandering")
    answered(student, "agreement_of", dict.fromkeys(four, 0.5))
    answered(student, "kappa_of", dict.fromkeys(("coin", "swapped", "wandering"), 0.5))
    answered(student, "kappa_is_undefined", dict.fromkeys(four, True))
