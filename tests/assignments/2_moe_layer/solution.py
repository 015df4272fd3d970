"""The reference answers of assignment 2."""
capacity = 3
dropped = [[0, 0], [0, 1], [0, 0], [1, 0], [0, 1], [0, 0]]
a_dropped_token_keeps_its_residual = True
a_dropped_token_becomes_zero = False
reference_costs_times = 4
upcycled_is_the_same = {
    "topk_softmax, K=2 of 4": True,
    "softmax_topk, K=2 of 4": False,
    "softmax_topk, K=4 of 4": True,
    "sigmoid, K=4 of 4": False,
}
