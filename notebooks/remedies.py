"""remedies.py -- what else unblocks a router, or steadies it?

TGR is one answer among many. Here the others stand side by side, each in its smallest faithful
form: a layer that takes the place of a `MoE` with the same first weights, one line of which differs
from V-MoE. Where it needs a loss of its own, that is its `penalty`. Nothing here is made for speed.
"ours" marks what no paper defines; all take V-MoE's gate, the softmax over all experts.
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import train
from data import batches, steps_per_epoch
from moe import MoE
from notebooks.decided import MAPS, WORDS_OF_HASH
from router import averaged


class Remedy(MoE):
    """A MoE whose own routing is remedied; a routing that is given, as a probe's, is followed.

    It takes over the router and the experts of `moe`, a layer of job.model.
    """
    penalty = 0.0               # what the layer adds to the loss, from its last forward pass
    runs_all = False            # does every expert compute every token of a training step?
    has_oracle = True           # would its router's gradient be another one if it saw all experts?
    tells_raw = True            # can it return the outputs of a token's K experts before gating?

    def __init__(self, moe, job):
        nn.Module.__init__(self)
        if (moe.router.gate != "softmax_topk" or moe.router.noise
                or moe.router.capacity_factor is not None):
            raise ValueError("a remedy has the gate softmax_topk, no noise and room for all: leave "
                             "--gate, --noise and --capacity_factor out")
        if moe.keep_raw and not self.tells_raw:
            raise ValueError(f"{type(self).__name__} has no K outputs of a token that MoDE could "
                             f"compare: take --method moe or tgr")
        self.router, self.experts = moe.router, moe.experts
        self.keep_raw, self.backend = moe.keep_raw, moe.backend

    def forward(self, x, routing=None):
        if routing is not None:
            self.penalty = 0.0
            return super().forward(x, routing)
        return self.remedied(x, self.router(x.reshape(-1, x.shape[-1])))

    def __getstate__(self):     # a copy has no part in the graph that its penalty hangs on
        return self.__dict__ | {"penalty": 0.0}

    def remedied(self, x, routing):
        """x (B, N, D) or (T, D), and what its router would do -> (y, routing, raw) of a MoE."""
        raise NotImplementedError

    def flops(self, N):
        E, D, H = self.experts.w_in.shape
        others = (E - self.router.k) * 4 * N * D * H if self.runs_all else 0
        return super().flops(N) + others

    def all_outputs(self, x):
        """What each expert makes of every token of x: (E, T, D), E / K times the usual work."""
        tokens = x.reshape(-1, x.shape[-1])
        return self.experts.batched(tokens.expand(self.router.n_experts, *tokens.shape))


def product(equation, *factors):
    """torch.einsum in the factors' own precision, which autocast would lower: as in a router."""
    with torch.autocast(factors[0].device.type, enabled=False):
        return torch.einsum(equation, *factors)


def number_of(layer, job):
    """The number of the block whose MLP is `layer`, counted from 1."""
    return 1 + [block.mlp for block in job.model.blocks].index(layer)


def ranked(scores, k):
    """The k largest of each row (T, E); of equals the lowest index, as in the router."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


# --- select otherwise ---

class LossFreeBias(Remedy):
    """Choose by p + b, weigh by p; b_e rises while expert e has too few tokens.

    b_e += u sign(mean load - load_e) after each step, u = 0.001 (arXiv:2408.15664, algorithm 1).
    The paper's scores are sigmoids in its main runs; ours are V-MoE's.
    """
    u = 0.001

    def __init__(self, moe, job):
        super().__init__(moe, job)
        self.register_buffer("bias", torch.zeros(self.router.n_experts))

    def remedied(self, x, routing):
        chosen = ranked(routing.probs + self.bias, self.router.k)
        if self.training:
            load = averaged(F.one_hot(chosen, len(self.bias)).sum(dim=(0, 1)).float())      # (E,)
            self.bias = self.bias + self.u * (load.mean() - load).sign()
        gates = routing.probs.gather(1, chosen)
        return MoE.forward(self, x, routing._replace(chosen=chosen, gates=gates))


class ExpertChoice(Remedy):
    """Each expert takes its C = ceil(K T / E) best tokens (arXiv:2202.09368, section 3.2).

    The load is exactly even. A token is taken by several experts or by none, and by whom depends
    on the batch that it is in. The routing notes its first K takers, then its favourites (ours).
    """
    tells_raw = False

    def takes(self, probs):
        """The tokens of each expert: probs (T, E) -> (E, C)."""
        C = math.ceil(self.router.k * len(probs) / self.router.n_experts)
        return ranked(probs.T, C)

    def remedied(self, x, routing):
        tokens, probs = x.reshape(-1, x.shape[-1]), routing.probs
        rows = self.takes(probs)                                        # (E, C)
        out = self.experts.batched(tokens[rows]) * probs.T.gather(1, rows)[..., None]
        y = torch.zeros_like(tokens, dtype=out.dtype).index_add(
            0, rows.flatten(), out.flatten(0, 1))                       # (T, D)
        taken = torch.zeros_like(probs).scatter(0, rows.T, 1.0)         # (T, E) 0 or 1
        chosen = ranked(probs + taken, self.router.k)
        routing = routing._replace(chosen=chosen, gates=(probs * taken).gather(1, chosen))
        return y.view_as(x), routing, None


# --- estimate the gradient that is blocked ---

class DefaultMoE(Remedy):
    """An unchosen expert answers with the running mean of its outputs: dL/dp_e = <dL/dy, mean_e>.

    y = sum over the chosen p_e f_e(x) + sum over the others p_e m_e, where m_e is a moving average
    of f_e's outputs over its tokens (arXiv:2504.12463). Its decay is ours.
    """
    decay = 0.99

    def __init__(self, moe, job):
        super().__init__(moe, job)
        self.keep_raw = True
        self.register_buffer("mean", torch.zeros_like(self.experts.b_out))              # (E, D)

    def forward(self, x, routing=None):
        return super().forward(x) if routing is None else self.answered(x, routing)

    def answered(self, x, routing):
        y, routing, raw = MoE.forward(self, x, routing)
        others = routing.probs.scatter(1, routing.chosen, 0.0)          # (T, E)
        told = product("te,ed->td", others, self.mean)
        return y + told.to(y.dtype).view_as(y), routing, raw

    def remedied(self, x, routing):
        y, routing, raw = self.answered(x, routing)
        if self.training:
            with torch.no_grad():
                hot = F.one_hot(routing.chosen, len(self.mean)).float()             # (T, K, E)
                sums = averaged(product("tke,tkd->ed", hot, raw.float()))
                counts = averaged(hot.sum(dim=(0, 1)))[:, None]                     # (E, 1)
                now = torch.where(counts > 0, sums / counts.clamp(min=1e-9), self.mean)
                self.mean = self.mean.lerp(now, 1 - self.decay)
        return y, routing, raw


class SparseMixer(Remedy):
    """Draw the expert from p in training, and estimate the gradient through the draw. K = 1.

    A drawn expert that is not the favourite is scaled by 1/3 in three of four cases. That makes of
    p_e <dL/dy, f_e> a quadrature of L(p_e f_e) - L(0), exact for a loss of third degree, and the
    gradient on the logits is this number times (onehot - p) (SparseMixer, arXiv:2310.00811; so in
    its second version, 2409.12136). The mask of unlikely experts is left out.
    """

    def __init__(self, moe, job):
        super().__init__(moe, job)
        if self.router.k != 1:
            raise ValueError(f"SparseMixer draws one expert: --k cannot be {self.router.k}, give 1")

    def remedied(self, x, routing):
        if not self.training:
            return MoE.forward(self, x, routing)
        chosen = torch.multinomial(routing.probs.detach(), 1)           # (T, 1)
        whole = (chosen == routing.chosen) | (torch.rand_like(routing.gates) > 0.75)
        p = routing.probs.gather(1, chosen)
        gates = p + (p * torch.where(whole, 1.0, 1 / 3) - p).detach()   # dp/dz = p (onehot - p)
        return MoE.forward(self, x, routing._replace(chosen=chosen, gates=gates))


class DenseMixer(Remedy):
    """Run all experts forward, and give the router the gradient that it has when all are chosen.

    The output is the sparse layer's; a straight-through term adds d(sum_e p_e f_e) to its gradient,
    and experts learn from their own tokens alone (DenseMixer, Yao et al. 2025). With dL/dy as it
    is, the router's gradient is exact: it is that of the oracle in notebook 1.
    """
    runs_all = True

    def remedied(self, x, routing):
        if not torch.is_grad_enabled():
            return MoE.forward(self, x, routing)
        y, _, raw = MoE.forward(self, x, routing._replace(gates=routing.gates.detach()))
        f = self.all_outputs(x.detach()).detach()                       # (E, T, D)
        dense = product("te,etd->td", routing.probs, f.to(routing.probs.dtype))
        return y + (dense - dense.detach()).to(y.dtype).view_as(y), routing, raw


class ReMoE(Remedy):
    """Gates relu(z), as many as are positive: continuous, and an expert that is off is not asked.

    An L1 penalty lambda sum_e f_e relu(z_e) makes them sparse and even, f_e being E / K times the
    share of tokens for which e is on. lambda grows by 1.2 while more than K of E experts are on,
    and shrinks by 1.2 while fewer are (arXiv:2412.14711, section 3). One lambda per layer is ours,
    and so is that experts which are off are computed and multiplied by 0.
    """
    growth, first, runs_all, has_oracle, tells_raw = 1.2, 1e-8, True, False, False

    def __init__(self, moe, job):
        super().__init__(moe, job)
        self.register_buffer("strength", torch.tensor(self.first))

    def remedied(self, x, routing):
        gates = routing.logits.relu()                                   # (T, E)
        y = product("te,etd->td", gates, self.all_outputs(x).to(gates.dtype))
        E, K = self.router.n_experts, self.router.k
        on = averaged((gates > 0).float().mean(dim=0))                  # (E,)
        self.penalty = self.strength * (E / K * on * gates).sum(dim=1).mean()
        if self.training:
            self.strength = self.strength * self.growth ** (on.mean() - K / E).sign()
        routing = routing._replace(gates=gates.gather(1, routing.chosen))
        return y.to(x.dtype).view_as(x), routing, None


# --- fix the routing, sooner or later ---

class StableMoE(Remedy):
    """Distil the router into a light one in the first tenth of training, then freeze that.

    The light router sees what no training changes: a patch's own pixels and its place, as the
    paper's sees a word and not its context (arXiv:2204.08396, section 2; its stages 1 and 2). Once
    it is frozen, the task loss is the only one, as in the authors' code. Ours: the class token has
    the pixels of the mean patch, or one expert would serve it in every image. The gate stays the
    learning router's softmax; the paper's is a sigmoid. The weight of the distillation is small: at
    weight 1 the light router's gradient would be a good part of what is clipped, though AdamW
    itself is all but blind to that weight.
    """
    share, weight = 0.1, 0.01

    def __init__(self, moe, job):
        super().__init__(moe, job)
        vit, E = job.model, self.router.n_experts
        self.learning = round(self.share * job.cfg.epochs * steps_per_epoch(job.cfg, job.sets))
        self.pixels = nn.Parameter(torch.zeros(E, vit.embed.in_features))
        self.place = nn.Parameter(torch.zeros(vit.n_tokens, E))
        self.register_buffer("steps", torch.tensor(0))
        vit.register_forward_pre_hook(self.look)

    def look(self, vit, inputs):
        p = vit.patch
        patches = rearrange(inputs[0], "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        self.patches = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)   # (B, N, .)

    def light(self):
        said = product("bnp,ep->bne", self.patches.float(), self.pixels) + self.place
        return said.flatten(0, 1)                                       # (T, E)

    def remedied(self, x, routing):
        light = self.light()
        if self.steps < self.learning:
            self.steps = self.steps + int(self.training)
            self.penalty = self.weight * F.cross_entropy(light, routing.chosen[:, 0])
            return MoE.forward(self, x, routing)
        self.penalty = 0.0
        chosen = ranked(light.detach(), self.router.k)
        # V-MoE's two losses would be of a router that chooses nobody any more: they reach nothing
        return MoE.forward(self, x, routing._replace(
            chosen=chosen, gates=routing.probs.gather(1, chosen), probs=routing.probs.detach(),
            logits=routing.logits.detach()))


class Grouter(StableMoE):
    """A trained model's routing, distilled beforehand and fixed from the first step on.

    The paper distils it into a router of its own (arXiv:2603.06626); its folding and tuning of
    experts are left out. Ours: what is distilled are the choices of `trained`, a V-MoE of the same
    sizes and another seed, block by block, in one epoch, into the light router of `StableMoE`.
    """
    share = 0.0

    def __init__(self, moe, job, trained=None):
        super().__init__(moe, job)
        if job.state is not None:                           # its checkpoint will bring it
            return
        b = number_of(moe, job)
        if trained is None or (trained.n_tokens, trained.moe_blocks) != (
                job.model.n_tokens, job.model.moe_blocks) or (
                trained.blocks[b - 1].mlp.router.n_experts != self.router.n_experts):
            raise ValueError("Grouter needs a trained V-MoE that has this one's tokens, "
                             "--moe_blocks and --n_experts")
        optimizer = torch.optim.AdamW([self.pixels, self.place], lr=0.01)
        for images, _ in batches(job.cfg, job.data, job.sets, epoch=1):
            self.look(job.model, (images.cpu(),))
            with torch.no_grad():
                chosen = trained(images.cpu()).layers[b].routing.chosen[:, 0]
            optimizer.zero_grad()
            F.cross_entropy(self.light(), chosen).backward()
            optimizer.step()


class RandomFixed(Remedy):
    """The floor: the router's first weights, for ever, and gates of 1."""
    has_oracle = False

    def __init__(self, moe, job):
        super().__init__(moe, job)
        self.router.requires_grad_(False)

    def remedied(self, x, routing):
        return MoE.forward(self, x, routing._replace(gates=torch.ones_like(routing.gates)))


class Placed(Remedy):
    """What is it that a hash does otherwise than V-MoE? Three things, each of which can be had
    alone (ours). K = 1.

    `words` says which: the expert of the "class token", or of the "patches", is named by a hash of
    the place, and not by the router; with "gate 1" a chosen expert counts in full. Where the router
    chooses, such a gate keeps a gradient, that of log p, straight through. Without words it is
    V-MoE, with all three `HashRouting`.

    One more word, of `MAPS`, names the patches' experts otherwise: "neighbours" share one; what the
    hash names is shuffled, and so "another in each block"; or a "coin" is tossed for each patch in
    each step, and in evaluation an image's number in its batch is added to the hash.
    """
    WORDS = (*WORDS_OF_HASH, *MAPS)
    has_oracle = False

    def __init__(self, moe, job, *words):
        super().__init__(moe, job)
        if self.router.k != 1:
            raise ValueError(f"a hash names one expert: --k cannot be {self.router.k}, give 1")
        if other := set(words) - set(self.WORDS):
            raise ValueError(f"{', '.join(sorted(other))} cannot be had of a hash: choose from "
                             f"{', '.join(self.WORDS)}")
        self.in_full, self.drawn = "gate 1" in words, "coin" in words
        E, N = self.router.n_experts, job.model.n_tokens
        expert_of = torch.tensor([hashed(n, E) for n in range(N)])
        if "neighbours" in words:
            expert_of[1:] = torch.arange(N - 1) * E // (N - 1)
        elif "another in each block" in words:
            draw = torch.Generator().manual_seed(number_of(moe, job))
            expert_of[1:] = expert_of[1:][torch.randperm(N - 1, generator=draw)]
        named = torch.tensor(["class token" in words, *["patches" in words] * (N - 1)])
        self.register_buffer("expert_of", expert_of)                                    # (N,)
        self.register_buffer("named", named, persistent=False)

    def remedied(self, x, routing):
        B = len(routing.gates) // len(self.named)
        named = self.named.repeat(B)[:, None]                           # (T, 1)
        chosen = torch.where(named, self.experts_named(B).view(-1, 1), routing.chosen)
        gates = routing.probs.gather(1, chosen)
        if self.in_full:
            log_p = routing.logits.log_softmax(dim=1).gather(1, chosen)
            gates = torch.where(named, 1.0, (log_p - log_p.detach()).exp())
        return MoE.forward(self, x, routing._replace(chosen=chosen, gates=gates))

    def experts_named(self, B):
        """(B, N) the expert that is named for each token."""
        experts, E = self.expert_of.repeat(B, 1), self.router.n_experts
        if self.drawn and self.training:
            experts[:, 1:].random_(E)
        elif self.drawn:
            experts[:, 1:] += torch.arange(B, device=experts.device)[:, None]
        return experts % E


class HashRouting(Placed):
    """The other floor: a token's place decides, by a hash (arXiv:2106.04426, whose hash is of the
    word). K = 1, and gates of 1. So one expert serves the class token of every image."""

    def __init__(self, moe, job):
        super().__init__(moe, job, *WORDS_OF_HASH)
        self.router.requires_grad_(False)


class Told(nn.Module):
    """A dense MLP that is told each token's place (ours): a vector of D numbers, learned from 0, is
    added to its input. So it may know what a hash's experts know, without weights for each place.
    """

    def __init__(self, mlp, job):
        super().__init__()
        self.mlp = mlp
        self.place = nn.Parameter(torch.zeros(job.model.n_tokens, mlp.fc_in.in_features))   # (N, D)

    def forward(self, x):
        return self.mlp(x + self.place)

    def flops(self, N):
        return self.mlp.flops(N)


def hashed(n, E):
    """A whole number -> one of E, the same on every machine (Knuth's multiplicative hash)."""
    return (n * 2654435761 % 2 ** 32) * E >> 32


# --- couple router and experts by a loss ---

class ERC(Remedy):
    """A router's row, taken for a token, must excite its own expert most, and its own expert it.

    M_ij = |r_i W_in^j|, r_i the row with bounded noise that leaves it nearest to itself. The loss
    is the sum over i != j of relu(M_ij - M_ii) + relu(M_ji - M_ii), over E^2
    (arXiv:2512.23447, with alpha = 1). Weight 1 and the plain W_in are ours: theirs has a GLU.
    """

    def remedied(self, x, routing):
        R, E = self.router.weight, self.router.n_experts
        with torch.no_grad():
            apart = torch.cdist(R, R).fill_diagonal_(torch.inf).min(dim=1).values       # (E,)
            apart = apart.nan_to_num(posinf=0.0)            # a lone row has no other
            reach = (apart / (2 * R.norm(dim=1)))[:, None]
            noise = 1 + reach * (2 * torch.rand_like(R) - 1)            # (E, D)
        M = product("id,jdh->ijh", R * noise, self.experts.w_in).norm(dim=-1)           # (E, E)
        own = M.diagonal()[:, None]
        self.penalty = ((M - own).relu() + (M.T - own).relu()).sum() / E ** 2   # 0 where i = j
        return MoE.forward(self, x, routing)


class SimBal(Remedy):
    """Keep the router's rows orthonormal, so that alike tokens get alike experts: |R R^T - I|_1.

    It takes the place of the load loss (arXiv:2506.14038). Ours: its weight, and that the entropy
    loss goes as well.
    """
    weight = 0.01

    def remedied(self, x, routing):
        R = self.router.weight
        eye = torch.eye(len(R), device=R.device)
        self.penalty = self.weight * (product("id,jd->ij", R, R) - eye).abs().sum()
        return MoE.forward(self, x, routing)


# --- what the study calls ---

REMEDIES = {"loss-free bias": LossFreeBias, "expert choice": ExpertChoice,
            "default outputs": DefaultMoE, "sparse mixer": SparseMixer, "dense mixer": DenseMixer,
            "relu": ReMoE, "stable": StableMoE, "grouter": Grouter, "coupled": ERC,
            "similar": SimBal, "random fixed": RandomFixed, "hash": HashRouting}
LAYERS = REMEDIES | {"placed": Placed, "told the place": Told}     # and what a hash is made of


def remedy(name, *more):
    """The change that puts one of `LAYERS` into every sparse block of a job's model, or of its
    dense twin (train.plan).

    `more` is the V-MoE, on a CPU, whose routing "grouter" takes, or the words of `Placed`.
    """
    def change(job):
        for b in job.model.moe_blocks:
            block = job.model.blocks[b - 1]
            block.mlp = LAYERS[name](block.mlp, job, *more).to(job.cfg.device)

    return change


def losses(cfg, student, guide, images, targets):
    """What train.losses returns, and the layers' own penalties; for `own_losses` of train.fit."""
    terms = train.losses(cfg, student, guide, images, targets)
    own = [student.blocks[b - 1].mlp.penalty for b in student.moe_blocks]
    return terms | {"remedy": terms["task"].new_zeros(()) + sum(own)}
