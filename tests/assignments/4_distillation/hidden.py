"""The hidden checks of assignment 4: gradients, edges, a real ViT, and the answers measured."""
import copy
import math
import warnings

import torch
import torch.nn.functional as F
from checking import D, E, T, answered, check, gradient, random, require, same

NAN = math.nan


# --- what is expected, written down without the student's code ---

def spread(raw):
    """L_md of raw (T, K, D) from all pairs of experts."""
    K = raw.shape[1]
    pairs = ((raw[:, :, None] - raw[:, None]) ** 2).sum(dim=(1, 2)).mean()      # all K * K
    return pairs / (2 if K == 2 else 2 * K * K)


def table(correct, domain):
    """The accuracies (E, E) as lists."""
    rows, domain, E = correct.tolist(), domain.tolist(), len(correct)
    return [[sum(r for r, d in zip(row, domain, strict=True) if d == j) / n
             if (n := domain.count(j)) else NAN for j in range(E)] for row in rows]


def own_others(A):
    """(own, others) of a matrix of accuracies as lists; empty domains count for nobody."""
    rest = [[v for j, v in enumerate(row) if j != i and v == v] for i, row in enumerate(A)]
    return [row[i] for i, row in enumerate(A)], [sum(r) / len(r) if r else NAN for r in rest]


def gate_of(correct, domain):
    columns = list(zip(*correct.tolist(), strict=True))
    hits = sum(column[d] for column, d in zip(columns, domain.tolist(), strict=True))
    return hits / sum(map(any, columns))


# --- what is given to the student's code ---

def small_vit(student, g, drop_path=0.0):
    """A ViT with two sparse blocks of loud experts, images and labels; MoE.forward is a stand-in.

    The real one belongs to assignment 2. This one asks every expert and keeps what was chosen.
    """
    def forward(self, x, routing=None):
        tokens, at = x.flatten(0, -2), self.experts
        logits = tokens @ self.router.weight.T
        if routing is None:
            gates, experts = logits.softmax(1).topk(2)
        else:
            gates, experts = routing.gates, routing.chosen
        said = F.gelu(torch.einsum("td,edh->teh", tokens, at.w_in) + at.b_in)
        said = torch.einsum("teh,ehd->ted", said, at.w_out) + at.b_out
        weight = torch.zeros_like(logits).scatter(1, experts, gates)
        return torch.einsum("te,ted->td", weight, said).view_as(x), routing, None
    student.moe.MoE.forward = forward
    vit = student.moe.ViT(16, 3, heads=2, hidden=24, patch=8, n_classes=4, image_size=24,
                          moe_blocks=(1, 2), drop_path=drop_path,
                          make_sparse=lambda: student.moe.MoE(16, 24, E, 2))
    for number in (1, 2):
        for p in vit.blocks[number - 1].mlp.experts.parameters():
            torch.nn.init.normal_(p)
    return vit, random(g, 6, 3, 24, 24, dtype=torch.float32), torch.randint(4, (6,), generator=g)


def with_one_expert(student, vit, block, e):
    """The same ViT with the plain MLP of expert e in that block."""
    vit = copy.deepcopy(vit)
    at, mlp = vit.blocks[block - 1].mlp.experts, student.moe.MLP(16, 24)
    with torch.no_grad():
        for mine, theirs in ((mlp.fc_in.weight, at.w_in[e].T), (mlp.fc_in.bias, at.b_in[e]),
                             (mlp.fc_out.weight, at.w_out[e].T), (mlp.fc_out.bias, at.b_out[e])):
            mine.copy_(theirs)
    vit.blocks[block - 1].mlp = mlp
    return vit


# --- A: the loss ---

@check(points=2, hint="the gradient on e_i is 2 / (K D T) (e_i - mean): no detach is needed, and a "
                      "variance over K, not over K - 1")
def every_one_of_three_or_more_is_pulled_to_the_mean_of_all(student, g):
    for K in (3, 4, E):
        raw = random(g, T, K, D, dtype=torch.float32)
        slope = gradient(student.distill.mutual_distillation_loss, raw)
        wide = raw.double()
        expected = 2 / (K * D * T) * (wide - wide.sum(dim=1, keepdim=True) / K)
        same(f"gradient of L_md on the outputs, K={K}", slope, expected.float())


@check(points=2, hint="both sides learn: no detach")
def both_of_two_experts_learn(student, g):
    raw = random(g, T, 2, D, dtype=torch.float32)
    slope = gradient(student.distill.mutual_distillation_loss, raw)
    apart = 2 / (D * T) * (raw[:, 0] - raw[:, 1]).double()
    for e, expected in ((0, apart), (1, -apart)):
        same(f"gradient of L_md on expert {e} of two", slope[:, e], expected.float())


@check(hint="a mean over tokens and features, symmetric in the experts, from K=2 to the dense gate")
def only_differences_between_experts_count(student, g):
    loss = student.distill.mutual_distillation_loss
    for K in (2, 3, 4, E):
        raw = random(g, T, K, D, dtype=torch.float32)
        expected = spread(raw.double()).float()
        same(f"L_md, K={K}", loss(raw), expected)
        same(f"L_md of the same experts in another order, K={K}", loss(raw.flip(1)), expected)
        same(f"L_md of twice the tokens, K={K}", loss(raw.repeat(2, 1, 1)), expected)
        same(f"L_md of twice the features, K={K}", loss(raw.repeat(1, 1, 2)), expected)
        alike = raw[:, :1].repeat(1, K, 1)
        same(f"L_md of {K} experts that agree", loss(alike), torch.tensor(0.0), scale=1e-3)


@check(hint="raw.float() first: bfloat16 has 8 bits, and a mean of many squares loses them")
def it_is_computed_in_float32_from_bfloat16_outputs(student, g):
    for K in (1, 2, 3):
        raw = random(g, T, K, D).bfloat16()
        expected = spread(raw.double()).float() if K > 1 else torch.tensor(0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = student.distill.mutual_distillation_loss(raw)
        same(f"L_md of bfloat16 outputs, K={K}", got, expected)
        require(got.dtype == torch.float32, f"dtype of L_md of bfloat16 outputs, K={K}",
                torch.float32, got.dtype)


# --- B: domains ---

@check(hint="image by image: rows b * N to (b + 1) * N - 1 of probs belong to image b")
def domains_need_every_token_of_an_image_and_no_other(student, g):
    B, N = 9, 5
    probs = random(g, B * N, E).mul(2).softmax(dim=1)
    image = torch.tensor([i // N for i in range(B * N)])
    whole = torch.zeros(B, E, dtype=torch.float64).index_add(0, image, probs)
    same("domains", student.distill.domains(probs, N), whole.argmax(dim=1))


@check(hint="a column adds up to 1, and the column of a class without images is NaN, not 0")
def the_classes_may_be_few_or_absent(student, g):
    domain, labels = torch.randint(E, (T,), generator=g), torch.randint(3, (T,), generator=g) * 2
    shares = student.distill.class_domains(domain, labels, E, 6)
    same("column sums of class_domains", shares.sum(dim=0),
         torch.tensor([1.0, NAN, 1.0, NAN, 1.0, NAN]))
    pairs = list(zip(domain.tolist(), labels.tolist(), strict=True))
    for c in (0, 2, 4):
        n = labels.tolist().count(c)
        same(f"class_domains of class {c}", shares[:, c],
             torch.tensor([pairs.count((i, c)) / n for i in range(E)]))


# --- C: probing ---

@check(points=2, hint="blocks are numbered from 1; all T = images * vit.n_tokens tokens are forced")
def a_forced_expert_is_the_blocks_plain_mlp(student, g):
    vit, images, labels = small_vit(student, g)
    for block in (1, 2):
        expected = torch.stack([with_one_expert(student, vit, block, e)(images).logits
                                .argmax(dim=1) == labels for e in range(E)])
        same(f"correct of block {block}", student.distill.probe(vit, images, labels, block),
             expected)


@check(hint="evaluation mode while one looks, afterwards the old mode; no gradient stays behind")
def looking_at_a_model_leaves_it_as_it_was(student, g):
    vit, images, labels = small_vit(student, g, drop_path=0.6)
    for look in (student.distill.probe, student.distill.expert_gradient_norms):
        for mode in (True, False):
            vit.train(mode)
            before = copy.deepcopy(vit.state_dict())
            first, second = (look(vit, images, labels, 2) for _ in range(2))
            what = f"{look.__name__} of a model with training={mode}"
            require(torch.equal(first, second), f"{what}, asked twice", "the same values",
                    "different ones: stochastic depth is on")
            require(all(m.training is mode for m in vit.modules()), f"training after {what}", mode,
                    not mode)
            changed = [n for n, v in vit.state_dict().items() if not torch.equal(v, before[n])]
            require(not changed, f"parameters changed by {what}", "none", ", ".join(changed))
            left = [n for n, p in vit.named_parameters()
                    if p.grad is not None and p.grad.abs().max() > 0]
            require(not left, f"parameters with a gradient left by {what}", "none",
                    f"{len(left)}, such as {left[:1]}")


@check(hint="rows are experts, columns domains; divide by the images of the domain")
def an_empty_domain_is_nan_and_not_zero(student, g):
    for empty in (0, E - 1):
        correct = torch.rand(E, T, generator=g) < 0.5
        domain = torch.randint(E - 1, (T,), generator=g) + (empty == 0)
        got = student.distill.accuracy_matrix(correct, domain)
        same(f"accuracy_matrix without images of domain {empty}", got,
             torch.tensor(table(correct, domain)))


@check(hint="a domain without images is NaN in its column: nanmean leaves it out of the others")
def an_empty_domain_counts_for_nobody(student, g):
    A = torch.rand(E, E, generator=g)
    A[:, 2] = NAN
    own, others = student.distill.own_and_others(A)
    expected_own, expected_others = own_others(A.tolist())
    same("own, domain 2 is empty", own, torch.tensor(expected_own))
    same("others, domain 2 is empty", others, torch.tensor(expected_others))


@check(points=2, hint="divide by the number of images that some expert gets right; 0 / 0 is NaN")
def a_gate_with_nothing_to_solve_has_no_accuracy(student, g):
    gate = student.distill.gate_accuracy
    domain = torch.randint(E, (T,), generator=g)
    got = gate(torch.zeros(E, T, dtype=torch.bool), domain)
    require(isinstance(got, float) and math.isnan(got), "gate_accuracy if no expert is right",
            "nan, a float", repr(got))
    one = torch.rand(1, T, generator=g) < 0.5
    for name, correct in (("random experts", torch.rand(E, T, generator=g) < 0.3),
                          ("copies of one expert", one.repeat(E, 1))):
        got, expected = gate(correct, domain), gate_of(correct, domain)
        require(isinstance(got, float) and abs(got - expected) < 1e-6, f"gate_accuracy of {name}",
                f"{expected:.7g}", repr(got))


# --- D: narrow vision ---

@check(points=2, hint="all four weights of an expert; the root of the sum of all their squares")
def the_norm_is_over_all_parameters_of_an_expert_in_a_real_vit(student, g):
    vit, images, labels = small_vit(student, g)
    norms = student.distill.expert_gradient_norms(vit, images, labels, 2)
    expected = torch.zeros(6, E)
    for n in range(6):
        twin = copy.deepcopy(vit)
        F.cross_entropy(twin(images[n:n + 1]).logits, labels[n:n + 1]).backward()
        for e in range(E):
            parts = [p.grad[e].flatten() for p in twin.blocks[1].mlp.experts.parameters()]
            expected[n, e] = torch.cat(parts).double().norm()
    same("expert_gradient_norms of block 2", norms, expected, scale=10 * expected.max().item())
    require(not norms.requires_grad, "expert_gradient_norms", "no graph", "a graph")


@check(hint="sums over images first: an image that sends more gradient counts more")
def a_loud_image_counts_more_than_a_quiet_one(student, g):
    loudness = torch.tensor([[1.0], [100.0], [0.0]])
    norms = torch.rand(3, E, generator=g) * loudness
    total = norms.double().sum()
    same("narrow_vision", student.distill.narrow_vision(norms),
         (norms.double().sum(dim=0) / total).float())


# --- the answers, measured ---

@check(points=2, hint="only experts that are active together are compared, before any gate")
def whom_the_loss_teaches(student, g):
    experts, x, router = random(g, 4, D, D), random(g, D), random(g, 4, D)

    def taught(chosen):
        def loss(experts, router):
            gates = torch.softmax(router @ x, 0)            # they weigh y, and L_md does not see y
            raw = torch.einsum("d,kdf->kf", x, experts[chosen])[None]
            return 0 * gates.sum() + (spread(raw) if len(chosen) > 1 else 0 * raw.sum())
        grads = gradient(loss, experts, router)
        return (grads[0].abs().amax(dim=(1, 2)) > 0).tolist(), bool(grads[1].abs().max() > 0)
    for k, chosen in ((2, [3, 1]), (1, [3])):
        found = answered(student, f"taught_at_k{k}", [True] * 4)
        learning, router_learns = taught(chosen)
        for e in range(4):
            same(f"E1, K={k}: expert {e} gets a gradient", found[e], learning[e])
        same("E1, the router gets a gradient", answered(student, "router_is_taught", True),
             router_learns)


@check(points=3, hint="E2: differentiate the loss by hand; E3: gates rescale; E4: 4 at K = 2")
def how_strong_the_pull_is(student, g):
    for name, said in (("pull", [0.0, 0.0, 0.0, 4.0]), ("pull_of_two", [0.0, 4.0])):
        slope = gradient(spread, torch.tensor(said, dtype=torch.float64)[None, :, None]).flatten()
        found = answered(student, name, [0.5] * len(said))
        for e, value in enumerate(slope.tolist()):
            require(abs(found[e] - value) < 1e-6, f"E2, {name}: dL_md/de_{e}", value, found[e])
    # the loss has no gate among its inputs
    same("E2, the pull depends on the gates", answered(student, "pull_depends_on_the_gates", True),
         False)
    raw = torch.tensor([[[4.0, 8.0], [4.0, 8.0]]], dtype=torch.float64)
    gates = torch.tensor([0.75, 0.25], dtype=torch.float64)[None, :, None]
    four = random(g, 1, 4, D)
    as_for_two = 4 * four.var(dim=1, correction=0).mean()          # how the K = 2 case weighs it
    for name, value in (("loss_of_raw_outputs", spread(raw)),
                        ("loss_of_gated_outputs", spread(gates * raw)),
                        ("alpha_at_k4", 0.01 * as_for_two / spread(four))):
        found = answered(student, name, 0.5)
        question = "E4" if name.startswith("alpha") else "E3"
        require(abs(found - value.item()) < 1e-6, f"{question}, {name}", f"{value:.4g}", found)


@check(points=2, hint="own: column of its own domain; others: mean of the *domains*, not of images")
def what_the_table_of_six_images_says(student, g):
    correct = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]])
    domain = torch.tensor([0, 0, 0, 1, 1, 0])
    own, others = own_others(table(correct, domain))
    for name, value in (("own_0", own[0]), ("own_1", own[1]), ("others_0", others[0]),
                        ("others_2", others[2]), ("gate", gate_of(correct, domain))):
        found = answered(student, name, 0.5)
        require(abs(found - value) < 0.005, f"E5, {name}", f"{value:.4g}", found)
    same("E5, own_2_is_defined", answered(student, "own_2_is_defined", True), own[2] == own[2])


@check(points=2, hint="copies are right about the same images, but domains differ in difficulty")
def what_holds_of_copies(student, g):
    domain = torch.arange(T) % 3
    correct = (torch.rand(1, T, generator=g) < 0.5).repeat(3, 1)
    correct[:, :3] = torch.tensor([True, False, True])
    correct[:, 3::3] = True                         # domain 0 is easy, 1 and 2 are not
    A = table(correct, domain)
    own, others = own_others(A)
    gates = random(g, T, 3).softmax(dim=1)          # a copy's gradient is its gate times one vector
    heard = gates.sum(dim=0) / gates.sum()
    measured = {
        "gate accuracy is 1": gate_of(correct, domain) == 1,
        "every column of the accuracy matrix is constant": all(
            len(set(column)) == 1 for column in zip(*A, strict=True)),
        "own equals others for every expert": own == others,
        "L_md is 0": spread(random(g, T, 1, D).repeat(1, 3, 1)).item() == 0,
        "narrow vision is 1 / E for every expert": bool((heard - 1 / 3).abs().max() < 1e-9),
    }
    found = answered(student, "of_copies", dict.fromkeys(measured, True))
    for name, value in measured.items():
        same(f"E6, {name}", found[name], value)
