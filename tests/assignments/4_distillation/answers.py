"""Assignment 4, part E: who is taught, how loudly, what do measures hide? Replace every None.

L_md is the mutual distillation loss of one token, unless it says otherwise; e_i are the experts'
outputs before gating.
"""

# E1. Four experts, K = 2: the router chose experts 3 and 1. Which experts' weights get a gradient
#     from L_md? True or False for experts 0, 1, 2, 3
taught_at_k2 = [None, None, None, None]
# And with K = 1, when it chose expert 3?
taught_at_k1 = [None, None, None, None]
# Does the router's weight get a gradient from L_md?
router_is_taught = None

# E2. K = 4 and one feature: the experts say 0, 0, 0 and 4. What is dL_md/de_i for each of the four?
#     (gradient descent moves against it)
pull = [None, None, None, None]
# K = 2 and one feature: the experts say 0 and 4. What is dL_md/de_i for each of the two?
pull_of_two = [None, None]
# The gates of those two are 0.9 and 0.1. If they were 0.5 and 0.5, would the pulls differ?
pull_depends_on_the_gates = None

# E3. K = 2 and two features. Both experts say (4, 8); their gates are 0.75 and 0.25.
loss_of_raw_outputs = None
# The K = 2 formula, but from the outputs *after* gating, gate_i * e_i:
loss_of_gated_outputs = None

# E4. You tuned alpha = 0.01 with K = 2. Which alpha gives the variance over the experts the same
#     weight when K = 4?
alpha_at_k4 = None

# E5. Three experts, six images.
#         correct, expert 0:   1 1 0 0 1 0
#                  expert 1:   0 0 1 1 1 0
#                  expert 2:   0 1 0 0 0 0
#         domain:              0 0 0 1 1 0
#     own of experts 0 and 1; others of experts 0 and 2; the gate accuracy
own_0, own_1 = None, None
others_0, others_2 = None, None
gate = None
# Is the accuracy of expert 2 on its own domain defined (not NaN)?
own_2_is_defined = None

# E6. A huge alpha has made all experts copies of each other. They get some images right, not all.
#     Is each of these true, whatever the images and the router (no domain is empty)?
of_copies = {
    "gate accuracy is 1": None,
    "every column of the accuracy matrix is constant": None,
    "own equals others for every expert": None,
    "L_md is 0": None,
    "narrow vision is 1 / E for every expert": None,
}
