"""The reference answers of assignment 4."""
taught_at_k2 = [False, True, False, True]
taught_at_k1 = [False, False, False, False]
router_is_taught = False
pull = [-0.5, -0.5, -0.5, 1.5]
pull_of_two = [-8, 8]
pull_depends_on_the_gates = False
loss_of_raw_outputs = 0
loss_of_gated_outputs = 10
alpha_at_k4 = 0.04
own_0, own_1 = 1 / 2, 1
others_0, others_2 = 1 / 2, 1 / 8
gate = 4 / 5
own_2_is_defined = False
of_copies = {
    "gate accuracy is 1": True,
    "every column of the accuracy matrix is constant": True,
    "own equals others for every expert": False,
    "L_md is 0": True,
    "narrow vision is 1 / E for every expert": False,
}
