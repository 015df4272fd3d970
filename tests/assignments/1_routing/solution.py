"""The reference answers of assignment 1."""
dropped_logit_gets_zero = {"softmax_topk": False, "topk_softmax": False, "sigmoid": True}
gradient_adds_up_to_zero = {"softmax_topk": True, "topk_softmax": True, "sigmoid": False}
better_dropped_expert_is_noticed = {"softmax_topk": False, "topk_softmax": False, "sigmoid": False}
reached = [[1, 1, 0, 0],
           [0, 1, 1, 0],
           [1, 0, 0, 1]]
balance_loss_skips_the_unchosen = False
z_loss_skips_the_unchosen = False
balance_loss_when_even = 1
balance_loss_when_collapsed = 4
