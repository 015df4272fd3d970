"""Assignment 2: every token through its own experts and no others, and back into its place."""
TITLE = "The MoE layer"
NOTEBOOK = "notebooks/04_fast_dispatch.ipynb"
WEEKS = (1, 3)               # of its page; from which its solution may be read
BLANKS = {
    "kernels.py": {
        "reference": "the definition, every expert on every token; handout.md, part A",
        "gated_sum": "y is the gated sum over a token's choices; handout.md, part A",
        "sliced": "gather, multiply slice by slice, undo the sort; handout.md, part B",
        "plan_choices": "sort the choices by expert; handout.md, part B, and the docstring's "
                        "example",
        "sliced_mlp": "a slice of rows per expert; handout.md, part B",
    },
    "router.py": {
        "within_capacity": "who comes too late; handout.md, part C, and its docstring",
    },
    "moe.py": {
        "MoE.forward": "tokens, router, experts, and the old shape; handout.md, part D",
        "Experts.copy_mlp": "mind which way the weights are stored; handout.md, part D",
        "upcycle": "the trunk as it is, each MLP into every expert; handout.md, part D",
    },
}
MAY = {"Experts.copy_mlp": {"writes self": "the experts become copies"},
       "upcycle": {"writes sparse": "it gets the dense weights"}}
CHECKS = (13, 20)
HARD_CODED = ("router.py", "within_capacity")
NOT_ASKED = {
    "[w_in[e] for e in range(len(w_in))], b_in.unbind()":
        "the same numbers; what it costs in memory is in tests/test_kernels.py",
}
