"""Assignment 5: a grouped GEMM, from the list of tiles to the kernels and the gradients."""
TITLE = "A kernel"
NOTEBOOK = "notebooks/04_fast_dispatch.ipynb"
WEEKS = (1, 4)               # of its page; from which its solution may be read
BLANKS = {
    "kernels.py": {
        "over_choices": "what a token's choices add up to; handout.md, part A",
        "plan_tiles": "no tile has rows of two experts; handout.md, part A, and the docstring",
        "Lean.backward": "the docstring of Lean has the formulas; handout.md, part B",
        "gelu": "its docstring has both formulas; handout.md, part C",
        "grouped_gemm": "its signature and the table of part 5 say what is where; handout.md, "
                        "part D",
        "backward_of_gelu": "its docstring says what it stores and returns; handout.md, part D, "
                            "step 7",
        "grouped_dw": "one expert's a^T b, summed over its rows; handout.md, part E",
    },
}
CHECKS = (9, 18)             # public, hidden
HARD_CODED = ("kernels.py", "over_choices")
NOT_ASKED = {
    "choice = tl.load(ORDER + r, mask=alive)\n    row":
        "the choices of masked lanes are only ever addresses in masked lanes",
    ".sum(dim=1)":
        "only a GPU's autocast makes float32 of a sum, and a student need not have one",
}
