"""The hidden checks of assignment 4: gradients, edges, a real ViT, and the answers measured."""
import copy
import math
import warnings

import torch
import torch.nn.functional as F
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
    random,
    require,
    same,
    tolerance,
    where_given,
    with_gradients,
)
from torch import nn

NAN = math.nan
TWO_DECIMALS = 0.005    # of 1/3, 2/3 and the like


# --- what is expected, written down without the student's code ---

def spread(raw):
    """L_md of raw (T, K, D) from all pairs of experts."""
    K = raw.shape[1]
    pairs = ((raw[:, :, None] - raw[:, None]) ** 2).sum(dim=(1, 2)).mean()      # all K * K
    return pairs / (2 if K == 2 else 2 * K * K)


def size(raw):
    """The mean square of the outputs: what cancels in L_md as E[x^2] - E[x]^2, a right way too."""
    return raw.double().square().mean().item()


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
        expected, scale = spread(raw.double()).float(), size(raw)
        for of, said in (("", raw), (" of the same experts in another order", raw.flip(1)),
                         (" of twice the tokens", raw.repeat(2, 1, 1)),
                         (" of twice the features", raw.repeat(1, 1, 2))):
            same(f"L_md{of}, K={K}", loss(said), expected, scale=scale)
        alike = raw[:, :1].repeat(1, K, 1)
        same(f"L_md of {K} experts that agree", loss(alike), torch.tensor(0.0), scale=size(alike))
        for of, said in (("one token", raw[:1]), ("one feature", raw[..., :1])):
            same(f"L_md of {of}, K={K}", loss(said), spread(said.double()).float(),
                 scale=size(said))


@check(hint="raw.float() first: bfloat16 has 8 bits, and a mean of many squares loses them")
def it_is_computed_in_float32_from_bfloat16_outputs(student, g):
    for K in (1, 2, 3):
        raw = random(g, T, K, D).bfloat16()
        expected = spread(raw.double()).float() if K > 1 else torch.tensor(0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = student.distill.mutual_distillation_loss(raw)
        same(f"L_md of bfloat16 outputs, K={K}", got, expected, scale=size(raw))


# --- B: domains ---

@check(hint="image by image: rows b * N to (b + 1) * N - 1 of probs belong to image b")
def domains_need_every_token_of_an_image_and_no_other(student, g):
    for B, N in ((9, 5), (1, 4), (6, 1)):
        probs = random(g, B * N, E).mul(2).softmax(dim=1)
        image = torch.tensor([i // N for i in range(B * N)])
        whole = torch.zeros(B, E, dtype=torch.float64).index_add(0, image, probs)
        same(f"domains of {B} images of {N} tokens", student.distill.domains(probs, N),
             whole.argmax(dim=1))
    first = torch.full((T, E), 0.25, dtype=torch.float64)       # with no other numbers added
    last = torch.randint(E, (T,), generator=g)
    first[torch.arange(T), last] += 1e-9
    same("domains where two means differ by 1e-9", student.distill.domains(first, 1), last)


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
    shares = student.distill.class_domains(domain, labels, E + 2, 6)
    same("class_domains of two more experts, who dominate no image", shares[E:, ::2],
         torch.zeros(2, 3))
    # as many images as a data set has
    domain = (torch.rand(9000, generator=g) < 0.3).long()
    shares = student.distill.class_domains(domain, torch.zeros_like(domain), 2, 1)
    n = int(domain.sum())
    same("class_domains of 9000 images of one class", shares[:, 0],
         torch.tensor([(9000 - n) / 9000, n / 9000]))


# --- C: probing ---

@check(points=2, hint="chosen is int64 and the rest float32, as a router makes them; a second call "
                      "may be about other tokens")
def every_forced_routing_is_made_for_its_call_and_as_a_router_makes_it(student, g):
    for n in (T, 1, 2 * T):
        routing = student.distill.forced(2, n, E)
        for field, expected in (("chosen", torch.full((n, 1), 2)), ("gates", torch.ones(n, 1)),
                                ("probs", torch.eye(E)[[2] * n])):
            same(f"{field} of forced(2, {n}, {E})", getattr(routing, field), expected)
        same(f"dtype of the logits of forced(2, {n}, {E})", routing.logits.dtype, torch.float32)
    keeps_nothing("forced", lambda: student.distill.forced(2, T, E))


@check(points=2, hint="make tensors with device=, that of the arguments; probe has images.device "
                      "for forced")
def on_a_gpu_nothing_is_made_on_the_cpu(student, g):
    distill, found = student.distill, []
    correct, domain = torch.rand(E, T, generator=g) < 0.5, torch.arange(T) % E
    probs, pair = random(g, 2 * T, E).softmax(dim=1), random(g, T, 2, D)
    for name, *given in (("mutual_distillation_loss", random(g, T, 3, D)),
                         ("mutual_distillation_loss", pair), ("domains", probs, 2),
                         ("forced", 2, T, E, domain.device), ("accuracy_matrix", correct, domain),
                         ("own_and_others", random(g, E, E)), ("gate_accuracy", correct, domain),
                         ("narrow_vision", probs)):
        where_given(name, lambda name=name, given=given: getattr(distill, name)(*given))

    class Any(nn.Module):
        """A model that any expert serves alike; it notes where its routings lie."""
        n_tokens = 3

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Module()])
            self.blocks[0].mlp = nn.Module()
            self.blocks[0].mlp.router = nn.Module()
            self.blocks[0].mlp.router.n_experts = E

        def forward(self, images, routings=None):
            found.extend(v.device.type for r in routings.values() for v in r[:2])
            return student.moe.Output(images.flatten(1), {})
    on_a_gpu(student, lambda *batch: distill.probe(Any(), *batch, 1), torch.ones(4, 3),
             torch.arange(4))
    require("cpu" not in found, "the device of the routings that probe makes for images on a GPU",
            "the images'", "the CPU")


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
    with_gradients(vit)                             # a step of training is half done
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
            other = [n for n, p in vit.named_parameters()
                     if p.grad is None or not bool((p.grad == 1).all()) or not p.requires_grad]
            require(not other, f"parameters whose .grad or requires_grad is another after {what}",
                    "none", f"{len(other)}, such as {other[:1]}")
        keeps_nothing(look.__name__, lambda look=look: look(vit, images[:1], labels[:1], 2))


@check(hint="rows are experts, columns domains; divide by the images of the domain")
def an_empty_domain_is_nan_and_not_zero(student, g):
    for empty in (0, E - 1):
        correct = torch.rand(E, T, generator=g) < 0.5
        domain = torch.randint(E - 1, (T,), generator=g) + (empty == 0)
        got = student.distill.accuracy_matrix(correct, domain)
        same(f"accuracy_matrix without images of domain {empty}", got,
             torch.tensor(table(correct, domain)))
    correct, domain = torch.rand(2, 9000, generator=g) < 0.7, torch.zeros(9000, dtype=torch.long)
    same("accuracy_matrix of 9000 images of one domain",
         student.distill.accuracy_matrix(correct, domain), torch.tensor(table(correct, domain)))


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
        close = tolerance(torch.float32, expected)      # two sums of ones, divided in float32
        require(isinstance(got, float) and abs(got - expected) <= close, f"gate_accuracy of {name}",
                f"{expected:.7g}", repr(got))


# --- D: narrow vision ---

@check(points=2, hint="all four weights of an expert; the root of the sum of all their squares")
def the_norm_is_over_all_parameters_of_an_expert_in_a_real_vit(student, g):
    vit, images, labels = small_vit(student, g)
    for loud in (1, 3000):                          # scores of some hundreds, sure and often wrong
        with torch.no_grad():
            vit.head.weight *= loud
        norms = student.distill.expert_gradient_norms(vit, images, labels, 2)
        expected = torch.zeros(6, E)
        for n in range(6):
            twin = copy.deepcopy(vit)
            F.cross_entropy(twin(images[n:n + 1]).logits, labels[n:n + 1]).backward()
            for e in range(E):
                parts = [p.grad[e].flatten() for p in twin.blocks[1].mlp.experts.parameters()]
                expected[n, e] = torch.cat(parts).double().norm()
        # p, which is exp(score - log sum exp), rounds as the scores do
        scale = expected.max().item() * max(1, vit(images).logits.abs().max().item())
        of = "" if loud == 1 else ", of a model with scores in the hundreds"
        same(f"expert_gradient_norms of block 2{of}", norms, expected, scale=scale)
        require(not norms.requires_grad, "expert_gradient_norms", "no graph", "a graph")
    same("expert_gradient_norms of one image",
         student.distill.expert_gradient_norms(vit, images[:1], labels[:1], 2), expected[:1],
         scale=scale)


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
            require(abs(found[e] - value) < TYPED, f"E2, {name}: dL_md/de_{e}", value, found[e])
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
        require(abs(found - value.item()) < TYPED, f"{question}, {name}", f"{value:.4g}", found)


@check(points=2, hint="own: column of its own domain; others: mean of the *domains*, not of images")
def what_the_table_of_six_images_says(student, g):
    correct = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]])
    domain = torch.tensor([0, 0, 0, 1, 1, 0])
    own, others = own_others(table(correct, domain))
    for name, value in (("own_0", own[0]), ("own_1", own[1]), ("others_0", others[0]),
                        ("others_2", others[2]), ("gate", gate_of(correct, domain))):
        found = answered(student, name, 0.5)
        require(abs(found - value) < TWO_DECIMALS, f"E5, {name}", f"{value:.4g}", found)
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
        "narrow vision is 1 / E for every expert": bool(
            (heard - 1 / 3).abs().max() <= tolerance(heard.dtype, 1)),
    }
    found = answered(student, "of_copies", dict.fromkeys(measured, True))
    for name, value in measured.items():
        same(f"E6, {name}", found[name], value)
