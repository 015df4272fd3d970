"""The public checks of assignment 4: the loss in its three cases, domains, probing, shares."""
import math
import warnings

import torch
from checking import D, E, T, answered, check, random, require, same, tolerance
from torch import nn

NAN = math.nan


def outputs(g, K):
    """Raw outputs (T, K, D) of unlike experts, in float32, and the same as a list."""
    raw = random(g, T, K, D, dtype=torch.float32)
    return raw, raw.tolist()


def apart(a, b):
    """Mean squared difference of two lists of features."""
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / len(a)


def centre(experts):
    return [sum(feature) / len(feature) for feature in zip(*experts, strict=True)]


def dominant(g, n):
    """The dominant experts of n images; nobody's is expert 3, and 0, 1, 2 and 4 have one each."""
    return torch.tensor([0, 1, 2, 4])[torch.cat([torch.arange(4), torch.randint(
        4, (n - 4,), generator=g)])][torch.randperm(n, generator=g)]


class Toy(nn.Module):
    """Two sparse blocks of linear experts on one input of 12 numbers, and nothing else.

    The scores of the three classes are the sum of what the blocks say, averaged over the image's
    three (equal) tokens. In training every score is stirred by noise, as stochastic depth would.
    """

    def __init__(self, student, g):
        super().__init__()
        self.n_tokens, self.output = 3, student.moe.Output
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.mlp = nn.Module()
            block.mlp.router, block.mlp.experts = nn.Module(), nn.Module()
            block.mlp.router.n_experts = E
            block.mlp.experts.w = nn.Parameter(random(g, E, 12, 3, dtype=torch.float32))
            block.mlp.experts.b = nn.Parameter(random(g, E, 3, dtype=torch.float32))

    def own(self, x, number):
        """(experts, gates), each (B, 2), that block `number` chooses for x (B, 12)."""
        favourite = x[:, 3 * number:3 * number + E].argmax(dim=1)
        gates = torch.tensor([0.75, 0.25]).expand(len(x), 2)
        return torch.stack([favourite, (favourite + number) % E], dim=1), gates

    def say(self, number, x, experts, gates):
        at = self.blocks[number - 1].mlp.experts
        said = torch.einsum("td,tkdc->tkc", x, at.w[experts]) + at.b[experts]
        return torch.einsum("tk,tkc->tc", gates, said)

    def forward(self, images, routings=None):
        x = images.flatten(1).repeat_interleave(self.n_tokens, 0)       # (T, 12)
        scores = 0
        for number in (1, 2):
            if number in (routings or {}):
                experts, gates = routings[number].chosen, routings[number].gates
            else:
                experts, gates = self.own(x, number)
            scores = scores + self.say(number, x, experts, gates)
        scores = scores.view(len(images), self.n_tokens, 3).mean(dim=1)
        if self.training:
            scores = scores + 10 * torch.randn_like(scores)
        return self.output(scores, {})


def a_toy(student, g, n=12):
    """A toy in training, n images and labels, and the images' numbers (n, 12)."""
    images = random(g, n, 3, 2, 2, dtype=torch.float32)
    return (Toy(student, g).train(), images, torch.randint(3, (n,), generator=g),
            images.flatten(1))


# --- A: the loss ---

@check(points=2, hint="K=2: the MSE of the two; K>2: mean over experts of the MSE to their mean")
def the_loss_in_its_cases_by_hand(student, g):
    loss = student.distill.mutual_distillation_loss
    two = torch.tensor([[[1.0, 2.0], [4.0, 0.0]], [[5.0, 5.0], [5.0, 6.0]]])    # (T=2, K=2, D=2)
    # ((1-4)^2 + (2-0)^2) / 2 = 6.5 and (0 + 1) / 2 = 0.5
    same("L_md of two experts", loss(two), torch.tensor(3.5))
    three = torch.tensor([[[0.0, 1.0], [3.0, 1.0], [6.0, 4.0]], [[2.0, 7.0]] * 3])
    # mean (3, 2): (9+0+9)/3 = 6 and (1+1+4)/3 = 2, so 4; the second token's three agree
    same("L_md of three experts", loss(three), torch.tensor(2.0))
    raw, rows = outputs(g, 2)
    same("L_md of two random experts", loss(raw),
         torch.tensor(sum(apart(*token) for token in rows) / T))
    raw, rows = outputs(g, 4)
    same("L_md of four random experts", loss(raw), torch.tensor(
        sum(apart(e, centre(token)) for token in rows for e in token) / (4 * T)))


@check(hint="return a float32 zero without dimensions and call _warn_that_one_expert_is_alone()")
def an_expert_alone_loses_nothing_and_is_told_so(student, g):
    raw, _ = outputs(g, 1)
    student.distill._warn_that_one_expert_is_alone.cache_clear()        # of an earlier seed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same("L_md of one expert", student.distill.mutual_distillation_loss(raw), torch.tensor(0.0))
        student.distill.mutual_distillation_loss(raw)
    said = sum("--k 2 or more" in str(w.message) for w in caught)
    require(said == 1, "warnings in two calls with K=1", 1, said)


@check(hint="K = 2 is not the K > 2 formula at K = 2: that one is the variance, a quarter of it")
def two_experts_weigh_four_times_the_variance_and_more_weigh_it_once(student, g):
    for K, times in ((2, 4), (3, 1), (E, 1)):
        raw, rows = outputs(g, K)
        pairs = sum(apart(a, b) for token in rows for a in token for b in token)
        same(f"L_md for K={K}, {times} times the variance over the experts",
             student.distill.mutual_distillation_loss(raw),
             torch.tensor(times * pairs / (2 * K * K * T)))


# --- B: domains ---

@check(hint="mean of the probs over an image's tokens first, then the argmax")
def an_images_domain_is_the_favourite_of_its_mean_token(student, g):
    probs = torch.tensor([
        [0.60, 0.40, 0.00], [0.10, 0.90, 0.00],     # mean .350 .650 .000
        [0.45, 0.55, 0.00], [0.45, 0.00, 0.55],     # mean .450 .275 .275
        [0.10, 0.20, 0.70], [0.50, 0.30, 0.20]])    # mean .300 .250 .450
    same("domains of three images of two tokens", student.distill.domains(probs, 2),
         torch.tensor([1, 0, 2]))
    probs = random(g, 8 * 7, E).softmax(dim=1)
    expected = []
    for b in range(8):
        whole = [sum(row) for row in zip(*probs[7 * b:7 * b + 7].tolist(), strict=True)]
        expected.append(whole.index(max(whole)))
    same("domains of random probs", student.distill.domains(probs, 7), torch.tensor(expected))


@check(hint="count (expert, class) pairs, divide by the images of the class; 0 / 0 is NaN")
def class_domains_are_shares_of_a_class(student, g):
    domain, labels = torch.randint(E, (T,), generator=g), torch.randint(6, (T,), generator=g)
    labels[labels == 4] = 5                         # a class without images
    pairs = list(zip(domain.tolist(), labels.tolist(), strict=True))
    expected = [[pairs.count((i, c)) / n if (n := labels.tolist().count(c)) else NAN
                 for c in range(6)] for i in range(E)]
    same("class_domains", student.distill.class_domains(domain, labels, E, 6),
         torch.tensor(expected))


# --- C: probing ---

@check(hint="experts (T, 1) and gates (T, 1) of ones; probs one-hot; logits are their logarithm")
def a_forced_routing_sends_every_token_to_one_expert(student, g):
    for expert in torch.randperm(E, generator=g)[:3].tolist():
        routing = student.distill.forced(expert, T, E)
        same("the type of forced", type(routing).__name__, "Routing")
        same(f"experts of forced({expert}, {T}, {E})", routing.chosen,
             torch.tensor([[expert]] * T))
        same("its gates", routing.gates, torch.ones(T, 1))
        certain = torch.tensor([[float(e == expert) for e in range(E)]] * T)
        same("its probs", routing.probs, certain)
        same("the softmax of its logits", routing.logits.softmax(dim=1), certain)


@check(points=2, hint="one pass per expert in evaluation mode, vit(images, {block: forced(...)})")
def probing_asks_each_expert_in_turn(student, g):
    toy, images, labels, x = a_toy(student, g)
    correct = student.distill.probe(toy, images, labels, 2)
    require(toy.training, "the mode of a model that was in training when probed", "training",
            "evaluation", "put the model back into the mode that it had")
    with torch.no_grad():
        rest = toy.say(1, x, *toy.own(x, 1))
        expected = [(rest + toy.say(2, x, torch.full((12, 1), e), torch.ones(12, 1)))
                    .argmax(dim=1) == labels for e in range(E)]
    same("correct", correct, torch.stack(expected))


@check(points=2, hint="of the images of domain j, the share that expert i gets right; 0/0 is NaN")
def accuracy_is_counted_expert_by_domain(student, g):
    correct, domain = torch.rand(E, T, generator=g) < 0.4, dominant(g, T)
    rows = correct.tolist()
    where = [[b for b, d in enumerate(domain.tolist()) if d == j] for j in range(E)]
    expected = [[sum(rows[i][b] for b in where[j]) / len(where[j]) if where[j] else NAN
                 for j in range(E)] for i in range(E)]
    same("accuracy_matrix, domain 3 is empty", student.distill.accuracy_matrix(correct, domain),
         torch.tensor(expected))


@check(hint="the diagonal, and the mean of each row without it")
def own_and_others_are_the_diagonal_and_the_rest_of_each_row(student, g):
    A = torch.rand(E, E, generator=g)
    own, others = student.distill.own_and_others(A)
    rows = A.tolist()
    same("own", own, torch.tensor([rows[i][i] for i in range(E)]))
    same("others", others, torch.tensor([(sum(rows[i]) - rows[i][i]) / (E - 1)
                                         for i in range(E)]))


@check(hint="of the images with a True in their column, the share for which expert d(x) is right")
def a_gate_is_not_blamed_for_images_that_no_expert_gets_right(student, g):
    correct, domain = torch.rand(E, T, generator=g) < 0.2, torch.randint(E, (T,), generator=g)
    correct[:, 0], correct[:, 1] = False, True
    columns = list(zip(*correct.tolist(), strict=True))
    hits = sum(column[d] for column, d in zip(columns, domain.tolist(), strict=True))
    got = student.distill.gate_accuracy(correct, domain)
    expected = hits / sum(map(any, columns))
    close = tolerance(torch.float32, expected)          # two sums of ones, divided in float32
    require(isinstance(got, float) and abs(got - expected) <= close, "gate_accuracy, a float",
            f"{expected:.7g}", repr(got))


# --- D: narrow vision ---

@check(points=2, hint="per image one backward; per expert the norm over all its parameters")
def gradient_norms_are_per_image_and_per_expert(student, g):
    toy, images, labels, x = a_toy(student, g)
    norms = student.distill.expert_gradient_norms(toy, images, labels, 2)
    require(toy.training, "the mode of a model that was in training when looked at", "training",
            "evaluation", "put the model back into the mode that it had")
    # dL/dw_e = gate_e * x outer (p - y) and dL/db_e = gate_e * (p - y)
    experts, gates = toy.own(x, 2)
    with torch.no_grad():
        scores = toy.say(1, x, *toy.own(x, 1)) + toy.say(2, x, experts, gates)
    wrong = scores.double().softmax(dim=1) - torch.eye(3, dtype=torch.float64)[labels]
    length = (x.double().square().sum(dim=1) + 1).sqrt()
    size = length * wrong.square().sum(dim=1).sqrt()
    expected = torch.zeros(12, E, dtype=torch.float64)
    expected.scatter_(1, experts, gates.double() * size[:, None])
    # p, which is exp(score - log sum exp), rounds as the scores do
    same("norms", norms, expected.float(), scale=(length.max() * scores.abs().max()).item())


@check(hint="add up over the images, then divide by the sum over the experts")
def narrow_vision_is_each_experts_share_of_all_the_gradient(student, g):
    norms = torch.rand(T, E, generator=g)
    norms[:, 1] = 0
    sums = [sum(column) for column in zip(*norms.tolist(), strict=True)]
    same("narrow_vision", student.distill.narrow_vision(norms),
         torch.tensor([s / sum(sums) for s in sums]))


@check(hint="this check looks at the form alone; the hidden ones measure whether you are right")
def every_question_has_an_answer_of_the_right_form(student, g):
    for name in ("taught_at_k2", "taught_at_k1"):
        answered(student, name, [True] * 4)
    for name in ("router_is_taught", "pull_depends_on_the_gates", "own_2_is_defined"):
        answered(student, name, True)
    answered(student, "pull", [0.5] * 4)
    answered(student, "pull_of_two", [0.5] * 2)
    for name in ("loss_of_raw_outputs", "loss_of_gated_outputs", "alpha_at_k4", "own_0", "own_1",
                 "others_0", "others_2", "gate"):
        answered(student, name, 0.5)
    answered(student, "of_copies", dict.fromkeys((
        "gate accuracy is 1", "every column of the accuracy matrix is constant",
        "own equals others for every expert", "L_md is 0",
        "narrow vision is 1 / E for every expert"), True))
