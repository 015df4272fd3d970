"""Assignment 3: what a frozen teacher tells a router, and whether the router keeps to it."""
TITLE = "Teacher-guided routing"
NOTEBOOK = "notebooks/02_teacher_guided_routing.ipynb"
WEEKS = (2, 3)               # of its page; from which its solution may be read
BLANKS = {
    "teacher.py": {
        "guidance_loss": "its docstring says what and over which tokens; handout.md, part A",
        "TeacherRouter.forward": "the docstring of the class; handout.md, part B",
        "teacher_router_losses": "its docstring; load_loss and entropy_loss are imported; "
                                 "handout.md, part B",
        "Guide.__init__": "the docstring of the class; handout.md, part C",
        "Guide.train": "which part of a guide never trains? handout.md, part C",
        "Guide.features": "what a Layer of moe.py holds; handout.md, part C",
        "Guide.forward": "one teacher router per sparse block; handout.md, part C",
    },
    "report.py": {
        "agreement": "its docstring has an example; handout.md, part D",
        "kappa": "its docstring; load_share above it helps; handout.md, part D",
        "last_fluctuation": "its docstring; handout.md, part D",
    },
}
MAY = {"Guide.__init__": {"writes teacher": "it is frozen in place",
                          "draws": "the first weights of the teacher routers"},
       "Guide.train": {"writes self": "its mode, and that of its routers"}}
CHECKS = (14, 21)            # public, hidden
NOT_ASKED = dict.fromkeys([
    "set(self.blocks.values()), [*teacher.dims, 0])", "False", "if any(False", "or n_tokens < 2",
    "torch.float32", "TeacherRouter(max(teacher.dims.values()), n_experts)"],
    "what the function's arguments may be is in tests/test_teacher.py")
HARD_CODED = ("teacher.py", "guidance_loss")
