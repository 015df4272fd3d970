"""Assignment 4: experts that learn from each other, and how to see what each one knows."""
TITLE = "Mutual distillation"
NOTEBOOK = "notebooks/03_mutual_distillation.ipynb"
WEEKS = (2, 4)               # of its page; from which its solution may be read
BLANKS = {
    "distill.py": {
        "mutual_distillation_loss": "its docstring has the three cases; handout.md, part A",
        "domains": "its docstring; handout.md, part B",
        "class_domains": "its docstring; handout.md, part B",
        "forced": "what a Routing of router.py holds; handout.md, part C",
        "probe": "its docstring, and the one of ViT in moe.py; handout.md, part C",
        "accuracy_matrix": "its docstring; handout.md, part C",
        "own_and_others": "its docstring; handout.md, part C",
        "gate_accuracy": "its docstring; handout.md, part C",
        "expert_gradient_norms": "its docstring; handout.md, part D",
        "narrow_vision": "its docstring; handout.md, part D",
    },
}
CHECKS = (13, 19)            # public, hidden
NOT_ASKED = dict.fromkeys(
    ["torch.float32", "", *('[], routers(vit))\n    expect("labels", labels, ' + n
                            for n in ("*", '"B'))],
    "what the function's arguments may be is in tests/test_distill.py")
NOT_ASKED["evaluating(vit)"] = "so is that it looks where gradients are switched off"
HARD_CODED = ("distill.py", "mutual_distillation_loss")
