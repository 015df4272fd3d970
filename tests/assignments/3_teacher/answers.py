"""Assignment 3, part E: who learns what from whom? Replace every None.

A student with two sparse blocks, 2 and 5, top-1 routing and the gate softmax_topk, and a `Guide`
with a frozen teacher. "Gets a gradient" means one that is not zero for every input.
"""

# E1. Which parameters get a gradient from which loss? True or False.
#     "router" and "experts" are those of block 5, the student's last sparse block; "trunk" is the
#     student's patch embedding; "teacher router" is block 5's; "teacher" is the teacher's weights.
from_the_task = {"router": None, "experts": None, "trunk": None, "teacher router": None,
                 "teacher": None}
from_the_guidance = {"router": None, "experts": None, "trunk": None, "teacher router": None,
                     "teacher": None}
from_the_teacher_router_losses = {"router": None, "experts": None, "trunk": None,
                                  "teacher router": None, "teacher": None}

# E2. One token, E = 4, K = 1. The student's p = (1/2, 1/4, 1/8, 1/8), the teacher's
#     p = (1/8, 1/8, 1/2, 1/4). What is the gradient of guidance_loss on the student's four logits?
gradient_on_logits = [None, None, None, None]

# E3. In training the loss is L_task + 5 / |S| * (sum of guidance_loss over the |S| sparse blocks).
#     |S| = 2 and a batch has T = 10 tokens. What is the gradient of the *guidance terms* on the
#     logit of an expert that was NOT selected, for a token with p = 0.25 and p_teacher = 0.5 there?
gradient_on_an_unselected_logit = None
# Does it change when that expert's output changes? True or False
depends_on_the_experts_output = None

# E4. A router starts with weight 0, so that all its logits are 0. Does its weight get a gradient
#     (features and targets are random) ... True or False
zero_start_gets_a_gradient = {
    "teacher router, from L_load": None,
    "teacher router, from L_ent": None,
    "student's router, from the guidance": None,
}

# E5. [L_load, L_ent] of a teacher router with E = 8, for three things that it may do to its tokens
#     (two decimals are enough; the logarithm is the natural one):
#     even and unsure: every token gives 1/8 to each expert
#     sure and collapsed: every token gives 1 to expert 0
#     sure and even: every token gives 1 to one expert, and each expert is given as many tokens
load_and_entropy = {"even and unsure": [None, None], "sure and collapsed": [None, None],
                    "sure and even": [None, None]}

# E6. Two routings of the same tokens, one epoch apart. Agreement between them? (a number)
#     coin: each epoch, each token draws expert 0 with probability 0.9 and else expert 1, anew
#     swapped: half the tokens each; what was expert 0's is now expert 1's, and the reverse
#     collapsed: expert 3 takes every token, in both epochs
#     wandering: one expert takes every token, in the next epoch another one does
agreement_of = {"coin": None, "swapped": None, "collapsed": None, "wandering": None}
# Kappa, where it is defined? (a number)
kappa_of = {"coin": None, "swapped": None, "wandering": None}
# Is kappa undefined? True or False
kappa_is_undefined = {"coin": None, "swapped": None, "collapsed": None, "wandering": None}
