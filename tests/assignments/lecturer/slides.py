"""slides.py -- which part of the pages does a lecturer show, and in which week?

    python tests/assignments/lecturer/slides.py OUT_DIR

writes week1.ipynb and week1.slides.html into OUT_DIR, and so for week 2, and for the seminar as
week 3. Headings, first paragraphs, guesses, exercises and figures are taken from the pages as they
are stored: no text is written here a second time, and no cell is run. Folded answers stay on the
pages. Press S for the speaker's view, which has the whole text of each section. Three dots stand
for sentences that are left out. A browser needs the network to show the slides, for reveal.js and
MathJax.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

PAGES = Path(__file__).resolve().parents[3] / "notebooks"
WEEKS = {                   # {week: {page: its sections}}, in the order of plan.md; None is all
    1: {"00": None, "01": None, "04": (1, 2, 3, 4, 5)},
    2: {"02": None, "03": None},
    3: {"05": None},
}
WORDS = 60                  # on one slide
LINES = 6                   # of code on one slide
GUESS = re.compile(r"\*\*(Predict|Look before)|^Predict|[Bb]efore you look|you (guess|predict)\b")


def main():
    if len(sys.argv) != 2:
        return "usage: python tests/assignments/lecturer/slides.py OUT_DIR"
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    decks = []
    for week, pages in WEEKS.items():
        try:
            deck = notebook(week, pages)
        except ValueError as error:
            return str(error)
        decks.append(out / f"week{week}.ipynb")
        decks[-1].write_text(json.dumps(deck, indent=1, ensure_ascii=False), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "nbconvert", "--to", "slides",
                           *map(str, decks)], capture_output=True, text=True)
    if done.returncode:
        return f"nbconvert made no slides: {' '.join(done.stderr.strip().splitlines()[-1:])}"
    print(*(deck.with_suffix(".slides.html") for deck in decks), sep="\n")


def notebook(week, pages):
    """The week's slides as a notebook. A page that is not there is named, and left out."""
    cells = []
    for number, wanted in pages.items():
        found = sorted(PAGES.glob(f"{number}_*.ipynb"))
        if not found:
            print(f"week {week} has no slides of page {number}: there is no "
                  f"{PAGES.name}/{number}_*.ipynb")
            continue
        page = json.loads(found[0].read_text(encoding="utf-8"))
        parts = sections(page)
        if missing := set(wanted or ()) - {n for n, _ in parts}:
            raise ValueError(f"{found[0].name} has no section {min(missing)}, which week {week} "
                             f"of slides.py asks for")
        for n, blocks in parts:
            if wanted is None or n in (0, *wanted):
                cells += slides(blocks)
    if not cells:
        raise ValueError(f"week {week} has no slides: none of its pages is in {PAGES}")
    cells[1]["source"] += STYLE                                         # among the first notes
    for i, cell in enumerate(cells):
        cell["id"] = f"slide-{i}"
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                "title": f"Week {week}"}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


STYLE = """

<style>
.reveal .slides section { font-size: 80%; }
.reveal .anchor-link { display: none; }
.reveal img { max-height: 75vh; width: auto; }
.reveal pre, .reveal table { font-size: 60%; width: 100%; }
</style>"""


# --- a page is a list of sections, a section a list of blocks ---

def sections(page):
    """[(number, blocks)] of a page: 0 is what stands before its first "## ".

    A heading without a number belongs to the section before it. A block is ("text", a paragraph),
    ("code", a cell) or ("figure", (png in base64, alt text)).
    """
    found = [(0, [])]
    for cell in page["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for text in paragraphs(source):
                if text.startswith("## "):
                    number = re.match(r"## (\d+)\.", text)
                    found.append((int(number[1]) if number else found[-1][0], []))
                found[-1][1].append(("text", text))
        elif cell["cell_type"] == "code":
            found[-1][1].append(("code", source))
            for output in cell["outputs"]:
                if png := output.get("data", {}).get("image/png"):
                    alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
                    found[-1][1].append(("figure", ("".join(png).replace("\n", ""), alt)))
    return found


def paragraphs(source):
    """A cell's paragraphs without what is folded, and without links to files."""
    source = re.sub(r"<details>.*?</details>", "", source, flags=re.S)
    source = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", source)
    return [p.strip() for p in re.split(r"\n\s*\n", source) if p.strip()]


def slides(blocks):
    """The cells of one section: its heading with what follows, guesses, exercises, figures."""
    cells, shown = [], []
    for i, (kind, block) in enumerate(blocks):
        if kind == "figure":
            cells.append(figure(*block))
        elif kind == "text" and block.startswith("#"):
            body = opening(blocks[i + 1:])
            first, *more = shortened(body)
            cells.append(markdown("\n\n".join([block, first]).strip()))
            cells += map(markdown, more)
            shown += [block, *body]
        elif kind == "text" and GUESS.search(block) and block not in shown:
            cells.append(markdown(shortened([block])[0]))
        elif kind == "code" and is_stub(block):
            cells.append(markdown(f"```python\n{block.strip()}\n```"))
    for cell in cells[1:]:
        cell["metadata"]["slideshow"]["slide_type"] = "subslide"
    told = "\n\n".join(text for kind, text in blocks if kind == "text" and text[0] != "#")
    return [*cells[:1], markdown(told, "notes"), *cells[1:]]


def opening(blocks):
    """The first paragraph, and the formula, list or table that it ends on."""
    texts = []
    for kind, text in blocks:
        if kind != "text" or text.startswith("#") or (texts and not is_display(text)):
            break
        texts.append(text)
    return texts


def is_display(text):
    return text.startswith(("$$", "- ", "1. ", "|"))


def is_stub(code):
    """Whether a cell is short and is what an exercise asks the reader to write."""
    return "raise NotImplementedError" in code and len(code.strip().split("\n")) <= LINES


def shortened(texts):
    """What a slide says of these paragraphs, and slides for the rows of what does not fit on it."""
    kept, more, room = [], [], WORDS - 15                               # 15 for a heading
    for at, text in enumerate(texts):
        if not is_display(text):
            text = sentences(text, room, to_the_end=at + 1 < len(texts))
        if words(text) <= room:
            kept.append(text)
            room -= words(text)
        else:
            more += in_pieces(text)
    return ["\n\n".join(kept), *more]


def sentences(text, room, to_the_end):
    """As many whole sentences as there is room for: the first, questions, the last before a
    formula, then the others in order; three dots where some are missing in between."""
    every = re.sub(r"([.?!:]\*{0,2})\s+(?=[A-Z*$`(\[])", "\\1\0", text).split("\0")
    last = len(every) - 1

    def rank(i):
        return (i > 0, "?" not in every[i], not (to_the_end and i == last), i)

    chosen = []
    for i in sorted(range(len(every)), key=rank):
        if words(every[i]) <= room:
            chosen.append(i)
            room -= words(every[i])
        elif i == 0:
            every[0] = " ".join(every[0].split()[:room - 5]) + " …"
            chosen, room = [0], 0
        elif "?" not in every[i]:
            break
    told = " ".join(("… " if i and i - 1 not in chosen else "") + every[i] for i in sorted(chosen))
    return told[:-1] + "." if told.endswith(":") and not to_the_end else told


def in_pieces(text):
    """A long list or table as several: the items or rows of each fit on a slide."""
    head, items = "", re.split(r"\n(?=- |\d+\. |\|)", text)
    if text.startswith("|"):
        head, items = "\n".join(items[:2]), items[2:]
    pieces = [[]]
    for item in items:
        if pieces[-1] and words("\n".join([head, *pieces[-1], item])) > WORDS:
            pieces.append([])
        pieces[-1].append(item)
    return ["\n".join([head, *piece]).strip() for piece in pieces]


def words(text):
    """How many words a listener reads; a formula counts as one."""
    text = re.sub(r"\$\$.*?\$\$|\$[^$]+\$|`[^`]+`", "x", text, flags=re.S)
    return len(re.findall(r"\w[\w'’.-]*", re.sub(r"\]\([^)]*\)", "]", text)))


# --- a slide is a cell ---

def markdown(source, kind="slide"):
    return {"cell_type": "markdown", "metadata": {"slideshow": {"slide_type": kind}},
            "source": source}


def figure(png, alt):
    cell = markdown(f"![{alt}](attachment:figure.png)")
    return cell | {"attachments": {"figure.png": {"image/png": png}}}


if __name__ == "__main__":
    sys.exit(main())
