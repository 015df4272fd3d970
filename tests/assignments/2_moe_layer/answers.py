"""Assignment 2, part E: predict. Replace every None."""

# E1. T = 6 tokens, E = 4 experts, K = 2, capacity factor 1. How many choices does an expert accept?
capacity = None

# E2. The choices (first, second) of those tokens are
#         [[0, 1], [0, 1], [0, 2], [0, 3], [1, 0], [1, 2]]
#     Write 1 for a choice that is dropped and 0 for one that is served.
dropped = [[None, None], [None, None], [None, None], [None, None], [None, None], [None, None]]

# E3. A token loses all of its choices. What does its block (moe.py, Block) put out for it?
#     The token as the block's attention left it? Zeros? One is True, one is False
a_dropped_token_keeps_its_residual = None
a_dropped_token_becomes_zero = None

# E4. How many times the multiplications that are needed does `reference` do, for E = 8 and K = 2?
reference_costs_times = None

# E5. A dense ViT is upcycled. Does the sparse one compute what the dense one does? True or False
upcycled_is_the_same = {
    "topk_softmax, K=2 of 4": None,
    "softmax_topk, K=2 of 4": None,
    "softmax_topk, K=4 of 4": None,
    "sigmoid, K=4 of 4": None,
}
