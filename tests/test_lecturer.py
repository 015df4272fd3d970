"""Tests of assignments/lecturer/: are exam and key right, and does a week become slides?"""
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bs4 import BeautifulSoup  # comes with jupyter

import distill
import kernels
import report
from moe import MoE
from notebooks import decided
from router import TopKRouter, balance_loss, load_loss, within_capacity
from teacher import guidance_loss

HERE = Path(__file__).parent / "assignments"
KIT, ROOT = HERE / "lecturer", HERE.parent.parent
sys.path += [str(HERE), str(KIT)]
import course  # noqa: E402
import slides  # noqa: E402

EXAM = (KIT / "exam.md").read_text(encoding="utf-8")
KEY = (KIT / "key.md").read_text(encoding="utf-8")
SAID = {name: [float(v) for v in values.split()]
        for name, values in re.findall(r"`(\w+) = (-?\d[\d.]*(?: -?\d[\d.]*)*)`", EXAM)}


def given(name, dtype=torch.float64):
    return torch.tensor(SAID[name], dtype=dtype)


# --- the exam ---

def task_gradient(p, q, k, gate="softmax_topk"):
    moe = MoE(dim=1, hidden=1, n_experts=len(p), k=k, gate=gate, backend="reference").double()
    moe.experts.w_out.data.zero_()
    moe.experts.b_out.data.copy_(q[:, None])            # D = 1 and dL/dy = 1
    z = p.log()[None].requires_grad_()
    y, _, _ = moe(torch.zeros(1, 1, dtype=p.dtype), moe.router.route(z))
    return torch.autograd.grad(y.sum(), z)[0][0].tolist()


def answers():
    """{name: numbers} of every answer of the exam, from the numbers of its question."""
    p, q = given("p"), given("q")
    yield "1a", task_gradient(p, q, 2)
    yield "1b", task_gradient(p, q, 2, "topk_softmax")
    yield "1c", task_gradient(p, q, 4)

    z = torch.stack([given("p0"), 1 - given("p0")], dim=1).log().requires_grad_()
    routing = TopKRouter(1, 2, k=1).route(z)
    losses = balance_loss(routing.probs, routing.chosen), load_loss(routing.probs)
    yield "3a", [*routing.chosen.flatten().bincount().tolist(), *(v.item() for v in losses)]
    yield "3b", [g for loss in losses
                 for g in torch.autograd.grad(loss, z, retain_graph=True)[0][0].tolist()]

    T, E, K, factor = (SAID[name][0] for name in ("T", "E", "K", "factor"))
    served = within_capacity(given("chosen", torch.int64).view(int(T), int(K)), int(E), factor)
    yield "4a", [math.ceil(round(factor * K * T / E, 9)), *(~served).flatten().int().tolist()]
    T, E, K, D, H = (SAID[name][0] for name in ("T4", "E4", "K4", "D4", "H4"))
    M = T * K / E
    yield "4c", [M, M * D * H / (M * D + D * H + M * H), D * H / (D + H)]

    z = given("p5").log()[None].requires_grad_()
    kl = guidance_loss(given("t5").log()[None], z)
    gradient = torch.autograd.grad(kl, z)[0][0]
    yield "5a", [kl.item(), *gradient.tolist()]
    yield "5b", [5 / SAID["blocks"][0] * gradient[2].item() / SAID["T5"][0]]

    T, E = 37, 8
    z, asked = torch.randn(T, E), torch.randn(T, E)
    yield "7b", [(guidance_loss(asked, z) / code(7)["guidance"](asked, z)).item()]

    two = torch.stack([given("e8"), given("f8")])[None].requires_grad_()        # (1, 2, D)
    three = given("g8")[None, :, None].requires_grad_()                         # (1, 3, 1)
    for name, raw, taught in (("8a", two, 1), ("8b", three, 3)):
        loss = distill.mutual_distillation_loss(raw)
        yield name, [loss.item(),
                     *torch.autograd.grad(loss, raw)[0][0, :taught].flatten().tolist()]
    ratio = distill.mutual_distillation_loss(two) / two.var(dim=1, correction=0).mean()
    yield "8d", [SAID["alpha"][0] * ratio.item()]

    t = {n: decided.within(0.95, n - 1) for n in range(2, 31)}
    yield "10c", [next(n for n in t if t[n] * SAID["s10"][0] / math.sqrt(n) <= 0.3)]


def code(question):
    """What the code of a question defines."""
    block = re.search(rf"## {question}\..*?```python\n(.*?)```", EXAM, flags=re.S)[1]
    made = {"torch": torch, "F": F}
    exec(block, made)
    return made


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")         # that is the bug of question 7
def test_every_number_of_the_exam_is_what_the_modules_compute():
    computed = dict(answers())
    assert set(computed) == {name for name in SAID if name[0].isdigit()}
    for name, numbers in computed.items():
        assert SAID[name] == pytest.approx(numbers, abs=6e-4), name


def test_the_points_of_the_exam_add_up():
    whole = [int(n) for n in re.findall(r"^## .*\((\d+) points\)$", EXAM, flags=re.M)]
    assert len(whole) == 10 and f"{sum(whole)} points, 90 minutes" in EXAM
    for part, points in zip(re.split(r"^## ", EXAM, flags=re.M)[1:], whole, strict=True):
        question = part.split("<details>")[0].split("\n", 1)[1]
        parts = [int(n) for n in re.findall(r"\((\d+)\s+points?\)", question)]
        assert not parts or sum(parts) == points, part.split("\n")[0]


def test_the_sparse_layer_of_the_exam_has_that_one_bug():
    T, K, E, D = 7, 2, 3, 5
    x, gates, chosen = torch.randn(T, D), torch.rand(T, K), torch.randn(T, E).argsort()[:, :K]
    weights = [torch.randn(E, *size) for size in ((D, 4), (4,), (4, D), (D,))]
    experts = [lambda rows, w=w: F.gelu(rows @ w[0] + w[1]) @ w[2] + w[3]
               for w in zip(*weights, strict=True)]
    wrong, truth = code(6)["layer"], kernels.reference(x, chosen, gates, *weights)
    assert wrong(x, chosen, gates, experts).shape == truth.shape
    assert not torch.allclose(wrong(x, chosen, gates, experts), truth, atol=0.01)
    even = torch.full((T, K), 0.3)
    torch.testing.assert_close(wrong(x, chosen, even, experts),
                               kernels.reference(x, chosen, even, *weights))
    line, = re.findall(r"`(out = out \* [^`]*)`", EXAM)
    block = re.search(r"## 6\..*?```python\n(.*?)```", EXAM, flags=re.S)[1]
    made = {"torch": torch}
    exec(re.sub(r"out = out \* .*", line, block), made)
    torch.testing.assert_close(made["layer"](x, chosen, gates, experts), truth)


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_the_guidance_of_the_exam_has_those_two_bugs():
    asked, z = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    wrong = code(7)["guidance"](asked, z)
    torch.testing.assert_close(wrong * 4, guidance_loss(asked, z))
    pull = torch.autograd.grad(guidance_loss(asked, z), z)[0]
    reaches, learns = torch.autograd.grad(wrong, (asked, z))
    torch.testing.assert_close(learns * 4, pull)
    assert reaches.abs().max() > 1e-3
    reverse = (z.softmax(1) * (z.log_softmax(1) - asked.log_softmax(1))).sum(1).mean()
    assert not torch.isclose(wrong * 4, reverse)


def test_the_tables_of_the_exam_are_what_the_rows_say():
    results = ROOT / "notebooks/results"
    rows = [row for name in ("main", "features_alone", "guidance")
            for row in report.read_lines(results / f"{name}.jsonl")]
    for arm, name in (("tgr-k1", "TGR"), ("moe-k1-features-alone", "features alone"),
                      ("tgr-k1-router-alone", "routers alone"),
                      ("moe-k1-logits", "V-MoE with the teacher's logits")):
        own = [r for r in rows if r["arm"] in (arm, "moe-k1")]
        e = decided.contrast(own, "accuracy", (arm,), ("moe-k1",))
        row, = re.findall(rf"^\| {name} \|.*", EXAM, flags=re.M)
        assert row.endswith(f"| {decided.signed(e)} | {e.n} |"), (row, e)
    swept = np.load(results / "sweep.npz")
    for at, alpha in enumerate(swept["alpha"]):
        if row := re.search(rf"^\| {alpha:g} \| .*%.*", EXAM, flags=re.M):
            gate, blind = swept["gate"][at], swept["blind"][at]
            lead = decided.interval((100 * (gate - blind)).tolist())
            assert row[0] == (f"| {alpha:g} | {100 * gate.mean():.1f} % | "
                              f"{100 * blind.mean():.1f} % | {decided.signed(lead, 1)} |")
    assert len(re.findall(r"^\| [\d.]+ \| [\d.]+ % ", EXAM, flags=re.M)) == 3
    t, = re.findall(r"^\| t \| (.*) \|$", EXAM, flags=re.M)
    assert [float(v) for v in t.split(" | ")] == [
        round(decided.within(0.95, n - 1), 3) for n in range(5, 13)]


# --- the key ---

def test_the_key_has_every_answer_as_the_solutions_have_it_and_every_checks_points():
    said = dict(re.findall(r"`(\w+) = ([^`]+)`", KEY))
    for a in course.assignments():
        exec((a.path / "solution.py").read_text(encoding="utf-8"), solution := {})
        for name in solution.keys() - {"__builtins__", "__doc__"}:
            assert said[name] == repr(solution[name]), name
    hidden = {name: node for a in course.assignments() for name, node in course.functions(
        (a.path / "hidden.py").read_text(encoding="utf-8")).items() if course.is_check(node)}
    named = re.findall(r"`(\w{15,})`,\s+(\d)", KEY)
    assert len(named) == 19
    for name, points in named:
        given = {k.arg: k.value.value for k in hidden[name].decorator_list[0].keywords
                 if k.arg == "points"}
        assert given.get("points", 1) == int(points), name


@pytest.mark.parametrize("number", ["00", "01", "02", "03", "04", "05"])
def test_the_key_has_what_the_page_prints_beside_a_guess(number):
    path, = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    printed = [float(v) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
               for output in cell.get("outputs", ())
               if "guess, then open" in "".join(output.get("data", {}).get("text/html", ""))
               for v in re.findall(r"-?\d+(?:\.\d+)?", "".join(output["data"]["text/plain"]))]
    section = re.search(rf"^## Page {number}.*?(?=^## |\Z)", KEY, flags=re.M | re.S)[0]
    rows = [row.split(" | ")[1] for row in re.findall(r"^\| .*\d.*", section, flags=re.M)]
    asked = [found for row in rows if (found := re.findall(r"-?\d+(?:\.\d+)?(?: %)?", row))]
    assert len(asked) > 3
    for answers in asked:
        assert any(is_rounded(answer, value) for answer in answers for value in printed), answers


def is_rounded(answer, value):
    """Whether "63 %" or "0.66" is that value, rounded."""
    number, digits = float(answer.rstrip(" %")), len(answer.rstrip(" %").partition(".")[2])
    return round(value * (100 if "%" in answer else 1), digits) == number


# --- slides ---

def page(tmp_path, monkeypatch, number, *cells):
    """A page of texts and (code, png or None), in a folder that slides.py takes for the pages'."""
    monkeypatch.setattr(slides, "PAGES", tmp_path)
    made = []
    for cell in cells:
        if isinstance(cell, str):
            made.append({"cell_type": "markdown", "source": cell.splitlines(keepends=True)})
        else:
            output = {"data": {"image/png": cell[1]}, "metadata": {"image/png": {"alt": "drawn"}}}
            made.append({"cell_type": "code", "source": [cell[0]],
                         "outputs": [output] if cell[1] else []})
    (tmp_path / f"{number}_page.ipynb").write_text(json.dumps({"cells": made}), encoding="utf-8")


def shown(deck):
    return [cell["source"] for cell in deck["cells"]
            if cell["metadata"]["slideshow"]["slide_type"] != "notes"]


def test_a_slide_takes_its_words_from_the_page_and_leaves_code_and_answers_there(
        tmp_path, monkeypatch):
    page(tmp_path, monkeypatch, "07", "# 7. Why?\n\nBecause.", ("import os\n" * 9, None),
         "## 1. First\n\nOne thing. See [page 2](02_b.ipynb).\n\n**Predict:** how many?",
         ("draw()", "cG5n"), "<details><summary>Answer</summary>\n\nforty-two\n</details>\n\n"
         "### Exercise 1: do it\n\nWrite it.", ("def it():\n    raise NotImplementedError", None),
         "## Break it\n\nStill the first.", "## 2. Second\n\nAnother thing.")
    assert shown(slides.notebook(1, {"07": (1,)})) == [
        "# 7. Why?\n\nBecause.", "## 1. First\n\nOne thing. See page 2.", "**Predict:** how many?",
        "![drawn](attachment:figure.png)", "### Exercise 1: do it\n\nWrite it.",
        "```python\ndef it():\n    raise NotImplementedError\n```",
        "## Break it\n\nStill the first."]
    deck = slides.notebook(1, {"07": None})
    assert shown(deck)[-1] == "## 2. Second\n\nAnother thing."
    assert "forty-two" not in json.dumps(deck) and "import os" not in json.dumps(deck)
    png, = (cell["attachments"] for cell in deck["cells"] if "attachments" in cell)
    assert png == {"figure.png": {"image/png": "cG5n"}}


def test_a_long_paragraph_is_shortened_to_whole_sentences_and_keeps_its_question(
        tmp_path, monkeypatch):
    long = " ".join(f"Sentence {i} has some six words." for i in range(20))
    rows = "".join(f"| {i} | {'word ' * 20}|\n" for i in range(4))
    page(tmp_path, monkeypatch, "07",
         f"# Title\n\n{long} Is that so?\n\n| a | b |\n|-|-|\n{rows}")
    first, *more = shown(slides.notebook(1, {"07": None}))
    assert first.endswith("words. … Is that so?") and "Sentence 0" in first
    assert all(slides.words(text) <= slides.WORDS for text in (first, *more))
    assert len(more) == 2 and all(text.startswith("| a | b |\n|-|-|\n") for text in more)
    assert [f"| {i} |" in "".join(more) for i in range(4)] == [True] * 4


def test_a_missing_page_or_section_is_named_in_a_sentence(tmp_path, monkeypatch, capsys):
    page(tmp_path, monkeypatch, "07", "# Title\n\nText.\n\n## 1. First\n\nText.")
    assert len(shown(slides.notebook(2, {"07": (1,), "08": None}))) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no slides of page 08: there is no" in said
    with pytest.raises(ValueError, match=r"07_page.* has no section 3, which week 2"):
        slides.notebook(2, {"07": (1, 3)})
    with pytest.raises(ValueError, match="week 2 has no slides: none of its pages"):
        slides.notebook(2, {"08": None})


def test_both_weeks_become_html_with_every_figure_and_few_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["slides.py", str(tmp_path)])
    assert slides.main() is None, capsys.readouterr()
    for week, pages in slides.WEEKS.items():
        html = BeautifulSoup((tmp_path / f"week{week}.slides.html").read_text(encoding="utf-8"),
                             "html.parser")
        for note in html.select("aside.notes, a.anchor-link"):
            note.decompose()
        every = [s for s in html.select(".slides section") if not s.find("section")]
        deck = json.loads((tmp_path / f"week{week}.ipynb").read_text(encoding="utf-8"))
        assert len(every) == len(shown(deck)) > 30
        assert not course.leaks({f"week{week}.md": "\n\n".join(
            cell["source"] for cell in deck["cells"]).encode()})        # it may go to students
        for slide in every:
            text = " ".join(p.get_text() for p in slide.select("h1, h2, h3, p, li, td, th"))
            assert slides.words(text) <= slides.WORDS, text
            assert text.strip() or slide.select("img, pre")
        figures = sum(kind == "figure" for number, wanted in pages.items()
                      for path in slides.PAGES.glob(f"{number}_*.ipynb")
                      for n, blocks in slides.sections(json.loads(path.read_text(encoding="utf-8")))
                      if wanted is None or n in (0, *wanted) for kind, _ in blocks)
        images = html.select(".slides img")
        assert len(images) == figures > 9
        assert all(i["src"].startswith("data:image/png;base64,") and i["alt"] for i in images)


# --- what students get ---

def test_a_release_holds_nothing_of_the_lecturers():
    tree = course.released()
    names = {part for path in tree for part in Path(path).parts}
    assert "handout.md" in names and not names & {"lecturer", *(p.name for p in KIT.glob("*.*"))}
    assert not set(tree.values()) & {p.read_bytes() for p in KIT.glob("*.*")}
