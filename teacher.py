"""teacher.py -- what can a frozen dense model tell a sparse one about routing?

TGR-MoE (arXiv:2604.21330): top-k routing hides the unselected experts from the task loss, so a
light router on a frozen teacher's features sets a target for *all* experts of every token. "Ours"
marks what the paper leaves open and we chose.
"""
import torch
import torch.nn.functional as F
from torch import nn

from moe import check_blocks, routers
from router import entropy_loss, expect, load_loss


class TeacherRouter(nn.Module):
    """The teacher's features (..., D) -> logits (..., E) that the student's router should come to.

    It is one linear map without a bias (ours). It makes targets and never dispatches a token.
    """

    def __init__(self, dim, n_experts):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        # not zeros: from perfectly even targets, neither of its losses would ever move it
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, h):
        expect("h", h, *h.shape[:-1], self.weight.shape[1])
        wide = torch.promote_types(h.dtype, torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.to(wide), self.weight.to(wide))           # (..., E)


class Guide(nn.Module):
    """A frozen teacher and one `TeacherRouter` per MoE block of the student.

    `guide(images)` sees the images that the student sees, augmented and mixed (ours), and gives
    {student's block number: logits (T, E)}. `blocks` maps a student's block to the teacher's block
    that feeds it, by default the one at the same relative depth. The feature is what that block's
    MLP is given (ours). The teacher is frozen in place. It and its routers are dropped at
    inference. A dense student has no routers but may have heads, as in notebooks/measure.py.

    The paper's controls are compositions: an untrained ViT as `teacher`,
    `guide.routers.requires_grad_(False)`, `blocks={5: 9, 7: 9, 9: 9}`, centroids copied into a
    router's `weight`, or oracle dispatch, `student(images, {block: router.route(z.detach())})`.
    """

    def __init__(self, teacher, student, n_experts, blocks=None):
        super().__init__()
        if teacher.n_tokens != student.n_tokens:
            raise ValueError(f"the teacher cuts an image into {teacher.n_tokens} tokens and the "
                             f"student into {student.n_tokens}: give both the same --patch")
        self.teacher = teacher.requires_grad_(False).eval()
        depth = len(teacher.blocks) / len(student.blocks)
        aligned = {b: max(1, round(b * depth)) for b in student.moe_blocks}
        self.blocks = aligned if blocks is None else blocks
        own = routers(student) or dict.fromkeys(range(1, 1 + len(student.blocks)) if blocks else [])
        check_blocks("a student's blocks", self.blocks, own)
        check_blocks("a teacher's", set(self.blocks.values()), range(1, 1 + len(teacher.blocks)))
        if any(own[b] and own[b].n_experts != n_experts for b in self.blocks):
            raise ValueError(f"n_experts cannot be {n_experts}: the student's routers have others")
        dim = teacher.embed.out_features
        self.routers = nn.ModuleDict({str(b): TeacherRouter(dim, n_experts) for b in self.blocks})

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()      # a frozen teacher has no stochastic depth in its targets
        return self

    def features(self, images):
        """The teacher's features at the aligned blocks, {student's block number: h (T, D)}."""
        with torch.no_grad():
            layers = self.teacher(images).layers
        return {student: layers[teacher].h for student, teacher in self.blocks.items()}

    def forward(self, images):
        return {b: self.routers[str(b)](h) for b, h in self.features(images).items()}


def guidance_loss(target_logits, logits, tokens="all", n_tokens=None):
    """KL(stopgrad(p_teacher) || p), averaged over tokens, from two logits (T, E) (TGR-MoE).

    Its gradient on the student's logits is (p - p_teacher) / T: an entry for every expert, selected
    or not. With `tokens` "class" or "patches", only that part of each image's `n_tokens` tokens
    counts. The paper can be read in more than one way; "all" is ours.
    """
    if tokens not in ("all", "class", "patches"):
        raise ValueError(f"tokens cannot be {tokens!r}: choose all, class or patches")
    if target_logits.shape != logits.shape:
        raise ValueError(f"the teacher's logits are {tuple(target_logits.shape)} and the student's "
                         f"{tuple(logits.shape)}: both need the same tokens and experts")
    T, _ = expect("logits", logits, "T", "E")
    if tokens != "all" and (not n_tokens or n_tokens < 2 or T % n_tokens):
        raise ValueError(f"{T} tokens are no images of n_tokens={n_tokens}: a class token, patches")
    target = target_logits.detach().softmax(dim=-1)                     # (T, E)
    # F.kl_div knows that 0 log 0 = 0, so a teacher may give an expert no probability at all
    kl = F.kl_div(logits.log_softmax(dim=-1), target, reduction="none").sum(dim=-1)    # (T,)
    if tokens == "class":
        kl = kl.view(-1, n_tokens)[:, 0]
    elif tokens == "patches":
        kl = kl.view(-1, n_tokens)[:, 1:]
    return kl.mean()


def teacher_router_losses(targets):
    """(L_load, L_ent) of the teacher routers, each summed over {block: logits (T, E)} (TGR-MoE).

    L_ent asks for a sure choice for every token, L_load for an even load over all tokens. To have
    both, a teacher router must cluster the frozen features: it maximises the mutual information of
    token and expert. No task loss enters.
    """
    if not targets:
        raise ValueError("there are no targets: guide at least one block")
    load = sum(load_loss(z.softmax(dim=-1)) for z in targets.values())
    return load, sum(entropy_loss(z) for z in targets.values())
