"""The public checks of assignment 1: who is chosen, how much it counts, four losses by hand."""
import math

import torch
from checking import D, E, K, T, answered, check, random, require, same

GATES = ("softmax_topk", "topk_softmax", "sigmoid")


def route(student, logits, k=K, gate="softmax_topk", training=False, **options):
    router = student.router.TopKRouter(D, logits.shape[1], k, gate, **options)
    return router.train(training).route(logits)


@check(points=2, hint="sort each token's logits from large to small and keep the first K indices")
def a_token_goes_to_the_k_largest_logits_the_favourite_first(student, g):
    z = random(g, T, E)
    for k in (1, 2, 3, E):
        expected = torch.tensor([sorted(range(E), key=lambda e: -row[e])[:k] for row in z.tolist()])
        same(f"experts for K={k}", route(student, z, k).chosen, expected)


@check(hint="a stable sort keeps the order of equal entries; topk and flip do not promise it")
def equal_logits_go_to_the_lowest_index(student, g):
    for k in (1, 2, 3):
        same(f"experts for K={k} and equal logits", route(student, torch.zeros(T, E), k).chosen,
             torch.arange(k).expand(T, k))
    z = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]]).repeat(T, 1)
    same("experts for logits 1, 3, 3, 0, 3", route(student, z, 2).chosen,
         torch.tensor([1, 2]).expand(T, 2))


@check(points=3, hint="which is first, the softmax or the choice? See the docstring of TopKRouter")
def the_three_gates_by_hand(student, g):
    # e^z = 1, 4, 3, 2, of sum 10; the two largest are experts 1 and 2
    z = torch.tensor([[1.0, 4.0, 3.0, 2.0]], dtype=torch.float64).log()
    for gate, gates in (("softmax_topk", [4 / 10, 3 / 10]), ("topk_softmax", [4 / 7, 3 / 7]),
                        ("sigmoid", [4 / 5, 3 / 4])):
        same(f"gates of {gate}", route(student, z, 2, gate).gates,
             torch.tensor([gates], dtype=torch.float64))


@check(hint="probs is the softmax over all E experts of the logits without noise, for every gate")
def a_routing_reports_probs_and_logits_without_noise(student, g):
    z = random(g, T, E)
    whole = torch.tensor([[math.exp(v) / sum(map(math.exp, row)) for v in row]
                          for row in z.tolist()], dtype=torch.float64)
    for gate in GATES:
        routing = route(student, z, gate=gate, training=True, noise=3.0)
        same(f"probs of {gate}", routing.probs, whole)
        same(f"logits of {gate}", routing.logits, z)


@check(hint="add noise only while self.training, and then to what is sorted and gated")
def noise_stirs_the_training_and_leaves_the_evaluation_alone(student, g):
    z = random(g, T, E)
    calm = route(student, z)
    same("experts in evaluation with noise=5", route(student, z, noise=5.0).chosen, calm.chosen)
    same("gates in evaluation with noise=5", route(student, z, noise=5.0).gates, calm.gates)
    for gate in GATES:
        one, two = (route(student, z, gate=gate, training=True, noise=5.0) for _ in range(2))
        for name in ("chosen", "gates"):
            require(not torch.equal(getattr(one, name), getattr(two, name)),
                    f"{name} of {gate} in two training passes with noise=5", "different values",
                    "the same values twice", "draw torch.randn_like(logits) anew in every call")


@check(points=2, hint="importance is the mean over tokens (dim 0); then variance over squared mean")
def load_loss_is_the_squared_coefficient_of_variation(student, g):
    loss = student.router.load_loss
    collapsed = torch.zeros(T, E, dtype=torch.float64)
    collapsed[:, 2] = 1
    same("load_loss of a collapsed router, E - 1", loss(collapsed),
         torch.tensor(E - 1.0, dtype=torch.float64))
    # importances 2/8, 3/8, 3/8 of mean 1/3: variance (1/144 + 2/576) / 3 = 1/288, which is 9/288
    # squared means. As E[x^2] - E[x]^2 it is what two terms leave that are 1 + 9/288 and 1
    by_hand = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]], dtype=torch.float64)
    same("load_loss of importances 2/8, 3/8, 3/8", loss(by_hand),
         torch.tensor(9 / 288, dtype=torch.float64), scale=2.0)
    probs = random(g, T, E).softmax(dim=1)
    sums = [sum(column) for column in zip(*probs.tolist(), strict=True)]
    expected = sum((s * E / sum(sums) - 1) ** 2 for s in sums) / E
    same("load_loss of random probs", loss(probs), torch.tensor(expected, dtype=torch.float64),
         scale=2.0 + expected)


@check(points=2, hint="sum over the experts of -p log p, then the mean over the tokens; nats")
def entropy_loss_is_the_mean_entropy_of_a_token(student, g):
    z = random(g, T, E)
    entropies = []
    for row in z.tolist():
        total = sum(map(math.exp, row))
        entropies.append(-sum(math.exp(v) / total * (v - math.log(total)) for v in row))
    loss = student.router.entropy_loss
    same("entropy_loss", loss(z), torch.tensor(sum(entropies) / T, dtype=torch.float64))
    same("entropy_loss of equal logits, log E", loss(torch.zeros(T, E, dtype=torch.float64)),
         torch.tensor(math.log(E), dtype=torch.float64))


@check(points=2, hint="f counts all T*K choices, P averages all T tokens; E times their product")
def balance_loss_multiplies_the_share_chosen_by_the_mean_probability(student, g):
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)
    # choices 0 1 and 1 2: f = 1/4, 2/4, 1/4; P = 0.4, 0.4, 0.2; 3 * (0.1 + 0.2 + 0.05) = 1.05
    loss = student.router.balance_loss
    same("balance_loss worked by hand", loss(probs, torch.tensor([[0, 1], [1, 2]])),
         torch.tensor(1.05, dtype=torch.float64))
    probs, experts = random(g, T, E).softmax(dim=1).float(), torch.arange(T * K).view(T, K) % 3
    counts = [experts.flatten().tolist().count(e) for e in range(E)]
    sums = [sum(column) for column in zip(*probs.tolist(), strict=True)]
    expected = E * sum(n / (T * K) * s / T for n, s in zip(counts, sums, strict=True))
    same("balance_loss of choices of experts 0, 1 and 2 alone", loss(probs, experts),
         torch.tensor(expected))


@check(hint="log-sum-exp of each token's logits, squared, then averaged over the tokens")
def z_loss_squares_each_tokens_log_sum_exp(student, g):
    # sums of e^z: 4 and 8
    z = torch.tensor([[1.0, 3.0], [2.0, 6.0]], dtype=torch.float64).log()
    expected = (math.log(4) ** 2 + math.log(8) ** 2) / 2
    same("z_loss worked by hand", student.router.z_loss(z),
         torch.tensor(expected, dtype=torch.float64))
    z = random(g, T, E)
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in z.tolist()) / T
    same("z_loss of random logits", student.router.z_loss(z),
         torch.tensor(expected, dtype=torch.float64))


@check(hint="this check looks at the form alone; the hidden ones measure whether you are right")
def every_question_has_an_answer_of_the_right_form(student, g):
    gates = dict.fromkeys(GATES, True)
    for name in ("dropped_logit_gets_zero", "gradient_adds_up_to_zero",
                 "better_dropped_expert_is_noticed"):
        answered(student, name, gates)
    answered(student, "reached", [[1] * 4] * 3)
    for name in ("balance_loss_skips_the_unchosen", "z_loss_skips_the_unchosen"):
        answered(student, name, True)
    for name in ("balance_loss_when_even", "balance_loss_when_collapsed"):
        answered(student, name, 1.0)
