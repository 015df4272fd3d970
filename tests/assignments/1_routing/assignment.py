"""Assignment 1: who is chosen, how much it counts, and what the router can learn from that."""
TITLE = "Routing"
NOTEBOOK = "notebooks/01_gradient_blocking.ipynb"
WEEKS = (1, 2)               # of its page; from which its solution may be read
BLANKS = {
    "router.py": {
        "TopKRouter.route": "sort, choose K, weigh them; handout.md, part A, and the docstring of "
                            "the class",
        "load_loss": "its docstring has the formula; handout.md, part B",
        "entropy_loss": "its docstring says from what and why; handout.md, part B",
        "balance_loss": "its docstring has the formula; handout.md, part B",
        "z_loss": "its docstring names the paper's equation; handout.md, part B",
    },
}
MAY = {"TopKRouter.route": {"draws": "noise, in training"}}
CHECKS = (10, 20)            # public, hidden
NOT_ASKED = {"logits.clone()": "that logits of half precision are widened is in "
                               "tests/test_router.py"}
HARD_CODED = ("router.py", "load_loss")      # what the cheat that looks values up pretends to be
