"""Assignment 1, part C: what can a router learn? Replace every None.

One token, E = 5 experts with outputs f_i, K of them chosen, y = sum over the chosen of gate_i f_i,
and a task loss L(y) with some generic gradient. "Zero" means exactly zero, for every input.
"""

# In C1 to C3, K = 2 and the token's first choice finds its expert full: it is dropped and gets gate
# 0. The second choice is served.

# C1. Is dL/dz_j zero for the logit z_j of the expert whose choice was DROPPED? True or False
dropped_logit_gets_zero = {"softmax_topk": None, "topk_softmax": None, "sigmoid": None}

# C2. Do the five entries of dL/dz add up to zero? True or False
gradient_adds_up_to_zero = {"softmax_topk": None, "topk_softmax": None, "sigmoid": None}

# C3. The expert whose choice was dropped is replaced by one that would have been perfect for this
#     token. Does any entry of dL/dz change? True or False
better_dropped_expert_is_noticed = {"softmax_topk": None, "topk_softmax": None, "sigmoid": None}

# C4. Three tokens, E = 4, K = 2, gate topk_softmax, logits
#         [[2.0, 1.0, 0.0, -1.0],
#          [0.0, 0.5, 0.5,  0.5],
#          [1.0, 1.0, 1.0,  3.0]]
#     Write 1 where dL/dz is not zero and 0 where it is.
reached = [[None, None, None, None],
           [None, None, None, None],
           [None, None, None, None]]

# C5. The same tokens, but the loss is balance_loss alone. Is its gradient zero on the logits of
#     experts that were not chosen? And the one of z_loss? True or False
balance_loss_skips_the_unchosen = None
z_loss_skips_the_unchosen = None

# C6. E = 8, K = 2. What is balance_loss when every expert is chosen equally often and all probs are
#     1/8? And when every token's probs are (1, 0, ..., 0) and its choices are experts 0 and 1?
balance_loss_when_even = None
balance_loss_when_collapsed = None
