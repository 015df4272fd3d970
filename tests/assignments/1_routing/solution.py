"""The reference answers of assignment 1."""
unchosen_logit_gets_zero = {"softmax_topk": False, "topk_softmax": True, "sigmoid": True}
whole_router_gets_zero = {"softmax_topk": False, "topk_softmax": True, "sigmoid": False}
better_unchosen_expert_is_noticed = {"softmax_topk": False, "topk_softmax": False, "sigmoid": False}
reached = [[1, 1, 0, 0],
           [0, 1, 1, 0],
           [1, 0, 0, 1]]
balance_loss_skips_the_unchosen = False
z_loss_skips_the_unchosen = False
balance_loss_when_even = 1
balance_loss_when_collapsed = 4
