"""variants.py -- how does a lecturer ask for what the published solutions do not do?

    python tests/assignments/course.py release DIR --variant SEED
    python tests/assignments/course.py grade DIR --variant SEED       # the same SEED
    python tests/assignments/course.py self-test --variant SEED
    python tests/assignments/variants.py SEED DIR     # the varied repository, with its solutions

A switch changes one definition everywhere at once: the modules and their docstrings, the handout,
the checks, the answers. SEED turns on some of each assignment's. What is released and graded then
comes from a copy of the repository in which these edits are made. Students do not get this file,
and neither does the copy.
"""
import contextlib
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from course import ROOT, TOOL, assignments, bodies_of, folders, functions, with_bodies


def switch(number, name, says, edits):
    """A definition that differs: of an assignment; in one sentence; {file: [(old, new), ...]}.

    A file is one of the modules, or in the assignment's folder. Each `old` stands once in its file,
    whichever other switches are on.
    """
    return SimpleNamespace(number=number, name=name, says=says, edits=edits)


SWITCHES = [
    switch(1, "ties", "Equal logits go to the highest index.", {
        "router.py": [
            ("noisy.sort(dim=-1, descending=True, stable=True)",
             "noisy.flip(-1).sort(dim=-1, descending=True, stable=True)"),
            ("chosen = order[:, :self.k]  ", "chosen = self.n_experts - 1 - order[:, :self.k]  ")],
        "handout.md": [("Equal logits go to the *lowest index*", "Equal logits go to the *highest "
                        "index*")],
        "public.py": [
            ("equal_logits_go_to_the_lowest_index", "equal_logits_go_to_the_highest_index"),
            ("a stable sort keeps the order of equal entries; topk and flip do not promise it",
             "a stable sort keeps the order of equal entries, so which order do you give it?"),
            ("torch.arange(k).expand(T, k)", "(E - 1 - torch.arange(k)).expand(T, k)"),
            ("torch.tensor([1, 2]).expand(T, 2)", "torch.tensor([4, 2]).expand(T, 2)")],
        "hidden.py": [("ties to the lowest index", "ties to the highest index"),
                      ("(-row[e], e)", "(-row[e], -e)")],
        "solution.py": [("[0, 1, 1, 0]", "[0, 0, 1, 1]"), ("[1, 0, 0, 1]", "[0, 0, 1, 1]")]}),
    switch(1, "first choices", "In balance_loss, f counts each token's first choice alone.", {
        "router.py": [
            ("E / K when all tokens are sure of the same K experts",
             "E when all tokens are sure of the same expert"),
            ("f_e is the share of the choices (T, K) that went to e", "f_e is the share of the "
             "tokens whose first choice is e"),
            ("F.one_hot(chosen, E).sum(dim=(0, 1)) / chosen.numel()",
             "F.one_hot(chosen[:, 0], E).sum(dim=0) / T")],
        "handout.md": [
            ("the share f comes from counting, without a gradient; P",
             "the share f counts each token's first choice alone, without a\n  gradient; P")],
        "public.py": [
            ("f counts all T*K choices", "f counts the T first choices"),
            ("# choices 0 1 and 1 2: f = 1/4, 2/4, 1/4; P = 0.4, 0.4, 0.2; 3 * (0.1 + 0.2 + 0.05)"
             " = 1.05", "# first choices 0 and 1: f = 1/2, 1/2, 0; P = 0.4, 0.4, 0.2; "
             "3 * (0.2 + 0.2) = 1.2"),
            ("torch.tensor(1.05, ", "torch.tensor(1.2, "),
            ("experts.flatten().tolist()", "experts[:, 0].tolist()"),
            ("n / (T * K) * s", "n / T * s")],
        "hidden.py": [("sum(row.count(e) for row in experts.tolist()) / (T * K)",
                       "experts[:, 0].tolist().count(e) / T"),
                      ("chosen.flatten().tolist().count(e)", "chosen[:, 0].tolist().count(e)"),
                      ("importance).sum() * E / (T * K)", "importance).sum() * E / T"),
                      ("8 * (1 / 2 * 1)", "8 * (1 * 1)")],
        "solution.py": [("balance_loss_when_collapsed = 4", "balance_loss_when_collapsed = 8")]}),
    switch(1, "z-loss", "z_loss takes log E off each log-sum-exp before it squares.", {
        "router.py": [
            ("Mean squared log-sum-exp of logits (T, E) (ST-MoE, arXiv:2202.08906, eq. 5).",
             "Mean over tokens of (log-sum-exp - log E)^2, from logits (T, E); 0 if they are 0.\n\n"
             "    ST-MoE's (arXiv:2202.08906, eq. 5) takes nothing off.\n    "),
            ("logits.logsumexp(dim=-1).square().mean()",
             "(logits.logsumexp(dim=-1) - math.log(logits.shape[1])).square().mean()")],
        "handout.md": [
            ("docstrings have the formulas. Three", "docstrings have the formulas; `z_loss` takes "
             "log E off each log-sum-exp.\nThree")],
        "public.py": [
            ("log-sum-exp of each token's logits, squared", "log-sum-exp of each token's logits, "
             "less log E, squared"),
            ("z_loss_squares_each_tokens_log_sum_exp(",
             "z_loss_squares_each_tokens_log_sum_exp_less_log_e("),
            ("# sums of e^z: 4 and 8", "# means of e^z: 2 and 4"),
            ("(math.log(4) ** 2 + math.log(8) ** 2)", "(math.log(2) ** 2 + math.log(4) ** 2)"),
            ("sum(map(math.exp, row))) ** 2", "sum(map(math.exp, row)) / E) ** 2")],
        "hidden.py": [("z.exp().sum(dim=1, keepdim=True).log()",
                       "z.exp().mean(dim=1, keepdim=True).log()"),
                      ("(z.logsumexp(dim=1) ** 2)", "((z.logsumexp(dim=1) - math.log(E)) ** 2)"),
                      ("(z.exp().sum(dim=1).log()", "(z.exp().mean(dim=1).log()")]}),

    switch(2, "queue", "Capacity serves token by token, first choice before second.", {
        "router.py": [
            ("first choices before second\n    ones, then in token order;",
             "token by token, and\n    each token's first choice before its second;"),
            ("V-MoE serves in the\n    same order (arXiv:2106.05974) but",
             "V-MoE\n    serves all first choices first (arXiv:2106.05974) and"),
            ("chosen.T.reshape(-1), n_experts)", "chosen.reshape(-1), n_experts)"),
            ("(place <= C).view(K, T).T", "(place <= C).view(T, K)")],
        "handout.md": [
            ("first choices of all tokens in token order, then all second choices, and so on.",
             "choices of token 0, its first before its second, then those of token 1, and so on.")],
        "public.py": [
            ("    for k in range(K):\n        for t in range(T):\n",
             "    for t in range(T):\n        for k in range(K):\n"),
            ("the queue is choice 0 of all tokens, then choice 1 of all tokens, ...",
             "the queue is all choices of token 0, then all choices of token 1, ..."),
            ("first_choices_are_served_before_second_ones_and_then_in_token_order",
             "the_choices_of_a_token_are_served_before_those_of_the_next"),
            ("expert 1 is the second choice of token 0 and the first of tokens 1 and 2",
             "expert 1 serves tokens 0 and 1, expert 0 tokens 0 and 2"),
            ("[[True, False], [True, True], [True, True], [True, False]]",
             "[[True, True], [True, True], [False, True], [True, False]]")],
        "hidden.py": [("all first choices queue before all second ones",
                       "all choices of a token queue before those of the next"),
                      ("for k, t in ((k, t) for k in range(chosen.shape[1]) for t in "
                       "range(len(chosen))):",
                       "for t, k in ((t, k) for t in range(len(chosen)) for k in "
                       "range(chosen.shape[1])):"),
                      ("for t, k, e in queue:", "for t, k, e in sorted(queue):")],
        "solution.py": [("[[0, 0], [0, 1], [0, 0], [1, 0], [0, 1], [0, 0]]",
                         "[[0, 0], [0, 0], [0, 0], [1, 0], [0, 1], [1, 0]]")]}),
    switch(2, "rounding", "The capacity of an expert is rounded down.", {
        "router.py": [
            ("C = ceil(capacity_factor * K * T / E)", "C = floor(capacity_factor * K * T / E)"),
            ("to the nearest integer where we round up", "to the nearest integer where we round\n"
             "    down"),
            ("1.1 * 2 * 100 / 4 is 55.00000000000001 and would make room for one more",
             "0.58 * 2 * 100 / 4 is 28.999999999999996 and would leave one out"),
            ("C = -(-a * K * T // (b * n_experts))", "C = a * K * T // (b * n_experts)")],
        "handout.md": [("C = ceil(", "C = floor("),
                       ("1.1 · 2 · 100 / 4 is 55.00000000000001",
                        "0.58 · 2 · 100 / 4 is 28.999999999999996")],
        "public.py": [
            ("C = ceil(", "C = floor("),
            ("times_the_factor_rounded_up", "times_the_factor_rounded_down"),
            ("(1.0, 3), (1.5, 4), (0.5, 2), (2.0, 5)", "(1.0, 2), (1.5, 3), (0.5, 1), (2.0, 5)"),
            ("math.ceil(factor * K", "math.floor(factor * K"),
            ("math.ceil(0.75 * 3", "math.floor(0.75 * 3")],
        "hidden.py": [
            ("9 digits before ceil", "9 digits before floor"),
            ("math.ceil(0.8 *", "math.floor(0.8 *"), ("math.ceil(0.6 *", "math.floor(0.6 *"),
            ("(C - 0.5) / 700", "(C + 0.5) / 700"),
            ("factor 1.00001, so C = 101", "factor 0.99999, so C = 99"),
            ("1.00001).sum()), 101)", "0.99999).sum()), 99)"),
            ("1.1 * 2 * 100 / 4 is 55.00000000000001", "0.58 * 2 * 100 / 4 is 28.999999999999996"),
            ("E=4, factor 1.1", "E=4, factor 0.58"),
            ("within_capacity(both, 4, 1.1)", "within_capacity(both, 4, 0.58)"),
            ("[55, 55]", "[29, 29]")]}),
    switch(2, "plan", "Within an expert, a plan lists all first choices before all second ones.", {
        "kernels.py": [
            ("then all of expert 1's.\n", "then all of expert 1's.\n\n    Of one expert's, the "
             "tokens' first choices come before their second ones, each in token order.\n"),
            ("order=tensor([1, 2, 0, 3])", "order=tensor([2, 1, 0, 3])"),
            ("ids, order = chosen.reshape(-1).sort(stable=True)",
             "queue = torch.arange(chosen.numel(), device=chosen.device).view_as(chosen).T\n"
             "    ids, place = chosen.T.reshape(-1).sort(stable=True)\n"
             "    order = queue.reshape(-1)[place]")],
        "handout.md": [
            ("by expert, stably, and says", "by expert, and of one expert's the\n   first choices "
             "of all tokens before the second ones, each in token order. It says")],
        "public.py": [
            ("sort chosen.reshape(-1) stably;", "a stable sort keeps the order that you give it;"),
            ('("order", [1, 2, 0, 4, 3, 5])', '("order", [2, 1, 0, 4, 3, 5])'),
            ("for e in range(E) for s in range(T * K) if flat[s] == e]",
             "for e in range(E) for k in range(K) for s in range(k, T * K, K)\n"
             "             if flat[s] == e]")],
        "hidden.py": [("sorted(range(1400), key=flat.__getitem__)",
                       "sorted(range(1400), key=lambda s: (flat[s], s % 2))")]}),

    switch(3, "mean over blocks", "The teacher routers' two losses are means over the blocks.", {
        "teacher.py": [
            ("each summed over {block: logits (T, E)} (TGR-MoE).",
             "each averaged over {block: logits (T, E)} (ours)."),
            ("return load, sum(entropy_loss(z) for z in targets.values())",
             "entropy = sum(entropy_loss(z) for z in targets.values())\n"
             "    return load / len(targets), entropy / len(targets)")],
        "handout.md": [("+ L_ent of the teacher routers)",
                        "+ L_ent of the teacher routers, means over S)"),
                       ("each **summed** over the blocks", "each **averaged** over the blocks")],
        "public.py": [
            ("each a sum over the blocks", "each a mean over the blocks"),
            ("the_teacher_routers_losses_are_two_sums_over_the_blocks",
             "the_teacher_routers_losses_are_two_means_over_the_blocks"),
            ("in targets.values())\n    # as", "in targets.values()) / 3\n    # as"),
            ("torch.tensor(surprise / T,", "torch.tensor(surprise / T / 3,")],
        "hidden.py": [("no detach, no mean over the blocks", "no detach, a mean over the blocks"),
                      ("sum(map(loss, zs)), *zs)", "sum(map(loss, zs)) / 3, *zs)"),
                      ("(loss(t) + loss(z)).float()", "((loss(t) + loss(z)) / 2).float()")]}),
    switch(3, "depth", "The aligned block of the teacher is at the same depth, rounded up.", {
        "teacher.py": [
            ("by default the one at the same relative depth. ",
             "by default the one at the same relative depth, rounded\n    up. "),
            ("depth = len(teacher.dims) / len(student.blocks)",
             "depth, own_depth = len(teacher.dims), len(student.blocks)"),
            ("max(1, round(b * depth))", "-(-b * depth // own_depth)")],
        "handout.md": [("rounded to the nearest, but not\n  below 1.", "rounded up.\n ")],
        "public.py": [
            ("teacher block round(b * depth / d), at least 1",
             "teacher block b * depth / d, rounded up"),
            ("{1: 1, 4: 5, 6: 8}", "{1: 2, 4: 6, 6: 8}"),
            ("{1: 1, 4: 1, 6: 2}", "{1: 1, 4: 2, 6: 2}")]}),
    switch(3, "never", "last_fluctuation counts epochs from 0; -1: never away.", {
        "report.py": [
            ("counted from 1, that found a token away from its final expert; 0 if none did.",
             "counted from 0, that found a token away from its final expert; -1 if none did."),
            ("np.arange(1, len(first) + 1)", "np.arange(len(first))"),
            ("(away * epoch).max(axis=0)", "np.where(away, epoch, -1).max(axis=0)")],
        "handout.md": [
            ("one number per token.", "one number per token: epochs count from 0, and where none "
             "found it away it is -1.")],
        "public.py": [("the largest epoch, from 1, whose", "the largest epoch, from 0, whose"),
                      ("that of the last epoch; else 0", "that of the last epoch; else -1"),
                      ("max([t + 1 for t, e", "max([t for t, e"), ("default=0)", "default=-1)")],
        "hidden.py": [("expected = torch.zeros(4, N, dtype=torch.long)",
                       "expected = torch.full((4, N), -1)"),
                      ("[history[t] != history[4]] = t + 1", "[history[t] != history[4]] = t"),
                      ("got, torch.zeros(4, N, dtype=torch.long)",
                       "got, torch.full((4, N), -1)"),
                      ("[0, 299, 290]", "[-1, 298, 289]")]}),

    switch(4, "class token", "An image's domain is the favourite of its class token.", {
        "distill.py": [
            ("is the mean over its tokens (ours, for MoDE's experts see whole inputs).",
             "is that of its class token, the first of its n_tokens (ours)."),
            (".mean(dim=1).argmax(dim=1)", "[:, 0].argmax(dim=1)")],
        "handout.md": [
            ("is the mean over its tokens, and its\n*domain* the expert with the largest mean: not "
             "the expert most of its tokens prefer, and not the loudest\nsingle token's. `class",
             "is that of its class token, the first of\nits tokens, and its *domain* the expert "
             "that is largest there: not the expert most of its tokens\nprefer, and not the "
             "largest of their mean.\n`class")],
        "public.py": [
            ("mean of the probs over an image's tokens first, then the argmax",
             "row b * n_tokens of probs is image b's class token"),
            ("an_images_domain_is_the_favourite_of_its_mean_token",
             "an_images_domain_is_the_favourite_of_its_class_token"),
            ("     # mean .350 .650 .000", ""), ("     # mean .450 .275 .275", ""),
            ("    # mean .300 .250 .450", ""),
            ("torch.tensor([1, 0, 2]))", "torch.tensor([0, 1, 2]))"),
            ("[sum(row) for row in zip(*probs[7 * b:7 * b + 7].tolist(), strict=True)]",
             "probs[7 * b].tolist()")],
        "hidden.py": [
            ("image by image: rows b * N to (b + 1) * N - 1 of probs belong to image b",
             "row b * N of probs is image b's class token"),
            ("domains_need_every_token_of_an_image_and_no_other",
             "domains_need_the_class_token_of_an_image_and_no_other"),
            ("torch.zeros(B, E, dtype=torch.float64).index_add(0, image, probs)",
             "torch.stack([probs[image == b][0] for b in range(B)])")]}),
    switch(4, "pairs", "Mutual distillation for K > 2 is the mean MSE of all pairs of experts.", {
        "distill.py": [
            ("K > 2: 1/K sum_i MSE(e_i, mean_j e_j)", "K > 2: mean of MSE(e_i, e_j) over i < j"),
            ("is the variance over experts. At K = 2 it would be MSE / 4, so the printed\n    case "
             "weighs four times as much, and one alpha means two things on the two sides of that "
             "line.",
             "is ours. At K = 2 it is MSE(e_1, e_2) as well, so one alpha means the\n    same for "
             "every K."),
            ("raw.var(dim=1, correction=0).mean()", "2 * raw.var(dim=1, correction=1).mean()")],
        "handout.md": [
            ("formula below is the one that a later paper credits\nto them (CoEKS, ICLR 2026, eq. "
             "5-6), and the measures are", "formula below is for K = 2 the one that a later\npaper "
             "credits to them (CoEKS, ICLR 2026, eq. 5-6); for K > 2 it and the measures are"),
            ("1/K sum_i MSE(e_i, mean_j e_j)", "the mean of MSE(e_i, e_j) over all pairs i < j"),
            ("neither on a partner nor on the mean. Put a `detach` on the\n   mean only, then on "
             "e_i only. Which of the two changes the gradient? Does either change the value?",
             "on neither partner. Put a `detach` on one\n   partner of each pair. Does that change "
             "the gradient? Does it change the value?"),
            ("K > 2 is a *variance* over the experts. `torch.var` divides by K - 1 unless it is "
             "told otherwise.", "K > 2 is a multiple of a *variance* over the experts. Which one, "
             "and which multiple?"),
            ("The formula of K > 2 at K = 2 is not the K = 2 case. Which factor is between them?",
             "The formula of K > 2 at K = 2 is the K = 2 case, so one alpha means the same.")],
        "public.py": [
            ("K>2: mean over experts of the MSE to their mean",
             "K>2: mean of the MSE of all pairs"),
            ("# mean (3, 2): (9+0+9)/3 = 6 and (1+1+4)/3 = 2, so 4; the second",
             "# (9+0)/2, (9+9)/2 and (36+9)/2, on average 12; the second"),
            ("loss(three), torch.tensor(2.0))", "loss(three), torch.tensor(6.0))"),
            ("sum(apart(e, centre(token)) for token in rows for e in token) / (4 * T)",
             "sum(apart(a, b) for token in rows for a in token for b in token) / (12 * T)"),
            ("K = 2 is not the K > 2 formula at K = 2: that one is the variance, a quarter of it",
             "the mean over pairs is 2 K / (K - 1) times the variance over K, for every K"),
            ("two_experts_weigh_four_times_the_variance_and_more_weigh_it_once",
             "an_average_pair_weighs_the_same_for_every_k"),
            ("((2, 4), (3, 1), (E, 1))", "((2, 4), (3, 3), (E, 2 * E / (E - 1)))")],
        "hidden.py": [
            ("pairs / (2 if K == 2 else 2 * K * K)", "pairs / (K * (K - 1))"),
            ("the gradient on e_i is 2 / (K D T) (e_i - mean): no detach is needed, and a \"\n"
             "                      \"variance over K, not over K - 1",
             "the gradient on e_i is 4 / ((K - 1) D T) (e_i - mean): no detach is needed"),
            ("2 / (K * D * T)", "4 / ((K - 1) * D * T)"), ("E4: 4 at K = 2", "E4: 2 K / (K - 1)")],
        "solution.py": [("pull = [-0.5, -0.5, -0.5, 1.5]", "pull = [-4 / 3, -4 / 3, -4 / 3, 4]"),
                        ("alpha_at_k4 = 0.04", "alpha_at_k4 = 0.015")],
        # the case K = 2 may be left out now
        "assignment.py": [('dict.fromkeys(\n    ["', 'dict.fromkeys(\n    ["if False:", "')]}),
    switch(4, "equal images", "narrow_vision is the mean over images of each one's shares.", {
        "distill.py": [
            ("expert i's share of the gradient that these images (B, E) send: (E,), sums to 1.",
             "expert i's share of one image's gradient, on average over images (B, E): (E,)."),
            ("norms.sum(dim=0) / norms.sum()",
             "(norms / norms.sum(dim=1, keepdim=True)).mean(dim=0)")],
        "handout.md": [
            ("add up over the images and say which share went to each expert. An image that the "
             "model is\nsure about sends little and counts little.",
             "say which share of an image's lengths went to each expert, on average over the\n"
             "images. One that the model is sure about sends little and counts as much as any.")],
        "public.py": [
            ("add up over the images, then divide by the sum over the experts",
             "divide each image's norms by their sum, then average over the images"),
            ("narrow_vision_is_each_experts_share_of_all_the_gradient",
             "narrow_vision_is_each_experts_share_of_an_average_image"),
            ("zip(*norms.tolist(), strict=True)",
             "zip(*([v / sum(row) for v in row]\n                                      "
             "for row in norms.tolist()), strict=True)")],
        "hidden.py": [
            ("sums over images first: an image that sends more gradient counts more",
             "shares of each image first: every image counts alike"),
            ("loud_image_counts_more_than", "loud_image_counts_no_more_than"),
            ("[[1.0], [100.0], [0.0]]", "[[1.0], [100.0], [0.01]]"),
            ("total = norms.double().sum()", "total = 3 * norms.double().sum(dim=1, keepdim=True)"),
            ("(norms.double().sum(dim=0) / total)", "(norms.double() / total).sum(dim=0)")]}),

    switch(5, "bound", "The host launches ceil(S / rows) + E - 1 tiles, one fewer.", {
        "kernels.py": [
            ("# (ceil(S / rows) + E,) whose rows", "# (ceil(S / rows) + E - 1,) whose rows"),
            ("ceil(S / rows) + E are enough", "ceil(S / rows) + E - 1 are enough"),
            ("Tiles(expert=tensor([0, 2, 2, 3, 3]), start=tensor([0, 2, 6, 0, 0]))",
             "Tiles(expert=tensor([0, 2, 2, 3]), start=tensor([0, 2, 6, 0]))"),
            ("torch.arange(-(-S // rows) + E,", "torch.arange(-(-S // rows) + E - 1,"),
            ('choose_blocks(S, E, x.dtype)["up"].rows) + E',
             'choose_blocks(S, E, x.dtype)["up"].rows) + E - 1')],
        "handout.md": [("ceil(S / rows) + E, and a tile", "ceil(S / rows) + E - 1,\nand a tile"),
                       ("why the bound is enough; it is even one too many.",
                        "why the bound is enough, and when it is needed.")],
        "public.py": [
            ("+ E are always enough", "+ E - 1 always do"),
            ("len(start) == -(-S // rows) + n,", "len(start) == -(-S // rows) + n - 1,"),
            ('            -(-S // rows) + n, f"', '            -(-S // rows) + n - 1, f"')],
        "hidden.py": [("-(-37 * 2 // 32) + 5", "-(-37 * 2 // 32) + 5 - 1")],
        "solution.py": [("programs_started = 16", "programs_started = 14"),
                        ("programs_without_work = 10", "programs_without_work = 8")]}),
    switch(5, "sorted shares", "The shares of d(gate) in DGATES are sorted by expert, as dz is.", {
        "kernels.py": [
            ("# (S, blocks across WIDTH), (tiles, WIDTH)",
             "# (S, blocks across WIDTH) sorted, (tiles, WIDTH)"),
            ("DGATES + choice * across + part", "DGATES + r * across + part"),
            ("dgates = dgates.sum(dim=1).view(T, K) +",
             "dgates = dgates.new_empty(S).index_copy_(0, order, dgates.sum(dim=1))\n"
             "        dgates = dgates.view(T, K) +")],
        "handout.md": [("(S, blocks of columns), in the row of the choice: one",
                        "(S, blocks of columns), in row r, for it is sorted too: one")],
        "hidden.py": [
            ("DGATES, <da, gelu(z)> of each choice, summed over its tiles",
             "DGATES, <da, gelu(z)> of each row, sorted by expert, summed over its tiles"),
            ("public.in_order(launch, (da * F.gelu(z)).sum(dim=1)).float()",
             "(da * F.gelu(z)).sum(dim=1).float()")]}),
]

# In every variant. The pages are not varied, and a wrong line that is no line any more is left out.
ALWAYS = {
    f"{TOOL}/student.md": [(
        "The assignments do not need each other.", "What is asked stands in the handouts and the "
        "docstrings; where a page or a paper defines something\notherwise, they count.\n\n"
        "The assignments do not need each other.")],
    "tests/mutants.py": [(
        "\n\nif __name__ ==", "\n\nMUTANTS = [m for m in MUTANTS if not stale(*m[:2])]\n"
        "if __name__ ==")],
    f"{TOOL}/selftest.py": [
        ("from mutants import MUTANTS", "from mutants import MUTANTS, stale"),
        ("    for kind, file, old, new in module.WRONG:",
         "    module.WRONG = [w for w in module.WRONG if not stale(*w[1:3])]\n"
         "    for kind, file, old, new in module.WRONG:")],
}


def drawn(seed):
    """The switches that a seed turns on: of each assignment's about half, and at least one."""
    def dice(s):                # random's own draws may differ between versions of Python
        return hashlib.sha256(f"{seed} {s.number} {s.name}".encode()).digest()
    least = {n: min(map(dice, (s for s in SWITCHES if s.number == n))) for n in folders()}
    return [s for s in SWITCHES if dice(s)[0] < 128 or dice(s) == least[s.number]]


def varied(on):
    """What some switches make of the repository's files, {path: text}, where they change."""
    texts, here = {}, {n: f"{TOOL}/{path.name}" for n, path in folders().items()}
    plans = [(name if (ROOT / name).exists() else f"{here[s.number]}/{name}", edits, s.name)
             for s in on for name, edits in s.edits.items()]
    for path, edits, name in [*plans, *((*item, "every variant") for item in ALWAYS.items())]:
        text = texts[path] if path in texts else original(path)
        for old, new in edits:
            if (n := text.count(old)) != 1:
                raise ValueError(f"{name}: {path} has {n} times {old!r}")
            text = text.replace(old, new)
        texts[path] = text
    return texts | other_solutions(texts)


def other_solutions(texts):
    """The files of others/ with the reference's bodies in what is varied, functions or classes.

    The rest of them still shows that the checks accept more than the reference.
    """
    found = {}
    for a in assignments():
        bodies = {}
        for file in (file for file in a.blanks if file in texts):
            ours, new = (bodies_of(text, a.blanks[file]) for text in (original(file), texts[file]))
            owners = {name.split(".")[0] for name in new if new[name] != ours[name]}
            bodies |= {name: body for name, body in new.items() if name.split(".")[0] in owners}
        for path in sorted((a.path / "others").glob("*.py")):
            text = original(path)
            if set(bodies) & set(functions(text)):
                found[f"{TOOL}/{a.folder}/others/{path.name}"] = with_bodies(text, bodies)
    return found


def original(path):
    return (ROOT / path).read_text(encoding="utf-8")


def write(tree, on):
    """Write the repository with some switches on into a folder."""
    for name in ("notebooks", "tests"):
        shutil.copytree(ROOT / name, tree / name,
                        ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for path in (p for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".")):
        shutil.copy(path, tree)
    (tree / TOOL / Path(__file__).name).unlink()
    for path, text in varied(on).items():
        (tree / path).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def repository(seed):
    """A temporary copy of the repository as a seed varies it."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), drawn(seed))
        yield Path(folder)


def sentences(seed):
    return "\n".join(f"  {s.number}  {s.says}" for s in drawn(seed))


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True)
    write(Path(sys.argv[2]), drawn(int(sys.argv[1])))
    print(sentences(int(sys.argv[1])))
