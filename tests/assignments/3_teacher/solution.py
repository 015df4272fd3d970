"""The reference answers of assignment 3."""
from_the_task = {"router": True, "experts": True, "trunk": True, "teacher router": False,
                 "teacher": False}
from_the_guidance = {"router": True, "experts": False, "trunk": True, "teacher router": False,
                     "teacher": False}
from_the_teacher_router_losses = {"router": False, "experts": False, "trunk": False,
                                  "teacher router": True, "teacher": False}
gradient_on_logits = [3 / 8, 1 / 8, -3 / 8, -1 / 8]
gradient_on_an_unselected_logit = -0.0625
depends_on_the_experts_output = False
zero_start_gets_a_gradient = {
    "teacher router, from L_load": False,
    "teacher router, from L_ent": False,
    "student's router, from the guidance": True,
}
load_and_entropy = {"even and unsure": [0, 2.08], "sure and collapsed": [7, 0],
                    "sure and even": [0, 0]}
agreement_of = {"coin": 0.82, "swapped": 0, "collapsed": 1, "wandering": 0}
kappa_of = {"coin": 0, "swapped": -1, "wandering": 0}
kappa_is_undefined = {"coin": False, "swapped": False, "collapsed": True, "wandering": False}
