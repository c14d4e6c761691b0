"""Every number in the prose of a notebook stands in code or outputs beside it: text and output cannot disagree.

Numbers in digits are compared, and words from "eleven" to "ninety". Smaller ones count what the reader sees ("two
labels"), larger ones are sizes ("hundreds"). Numbers in headings, equations, code and links are not prose, and some
only name something ("notebook 03", "hospital 4", a year).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fedkd_utils import glossary, rules
from fedkd_utils.notebooks import NOTEBOOKS, read

#: What is true without a cell, by notebook and number; and why.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "01_knee_volumes": {"fifty": "tests/test_anatomy.py draws as many, too many for a notebook, and the cell says so"},
    "10_your_own_data": {
        "4": "the shape of an affine, in an exercise",
        "507": "the size of a public set, by its authors; the course does not hold it",
        "68": "the size of a public set; calibration.LITERATURE says which",
    },
}

WORDS = dict(
    zip(
        "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(),
        range(11, 20),
        strict=True,
    )
)
WORDS |= dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
NUMBER = re.compile(rf"(?i)(?<![\w.])(?:\d+(?:\.\d+)?(?:e-?\d+)?(?!\w)(?: ?%)?|(?:{'|'.join(WORDS)})\b)")
_LIST = r"\d+(?:(?:, | and | or | to )\d+)*"
#: A number that names something: a notebook, a part of the paper, a hospital or a round of a story, a licence, a year;
#: and the minutes of a notebook, which tests/test_frame.py compares.
NAMING = re.compile(
    rf"\b(?:notebooks?|figures?|sections?|steps?|rounds?|hospitals?|slices?|BY(?:-[A-Z]+)*) {_LIST}\b(?:\.0)?"
    r"|\b(?:19|20)\d\d\b|^\| \*\*Time\*\* .*$|^\| +\| [^|]+ \| \d+ \|$",
    re.M | re.I,
)
#: So many code cells before the prose and after it hold its numbers.
NEAR = 2


def numbers_in_prose(source: str) -> list[str]:
    """The numbers that Markdown states, as they are written."""
    return NUMBER.findall(NAMING.sub(" ", glossary.prose(source).replace("\0", " ")))


def known_numbers(cells: Sequence[NotebookNode]) -> set[float]:
    """The numbers in code cells and in the text of their outputs, alt text among it."""
    texts = [cell.source for cell in cells]
    parts = (part for cell in cells for output in cell.outputs for part in rules.texts(output))
    texts += [text for kind, text in parts if kind != "text/html"]  # which repeats the plain text, with a layout
    return {float(n) for text in texts for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)}


def backed(number: str, known: set[float]) -> bool:
    """Whether a known number, rounded to the digits of this one, is equal to it; a percentage may be a share."""
    digits, percent = number.rstrip("% "), number.endswith("%")
    value = float(WORDS.get(digits.lower(), digits))
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2]) * (1 + 1e-9)
    return any(abs(k - value) <= half or (percent and abs(100 * k - value) <= half) for k in known)


def unbacked(nb: NotebookNode) -> Iterator[tuple[int, str]]:
    """Cell and number of what prose states and no code or output near it holds; a recap may look back at all."""
    for position, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            code = [[c for c in part if c.cell_type == "code"] for part in (nb.cells[:position], nb.cells[position:])]
            recap = cell is nb.cells[-1]
            known = known_numbers([*(code[0] if recap else code[0][-NEAR:]), *code[1][:NEAR]])
            yield from ((position + 1, n) for n in numbers_in_prose(cell.source) if not backed(n, known))


@pytest.mark.parametrize("name", rules.NAMES)
def test_every_number_in_prose_is_in_the_code_or_an_output(name):
    allowed = EXCEPTIONS.get(name, {})
    found = list(unbacked(read(NOTEBOOKS / f"{name}.ipynb")))
    assert [(cell, number) for cell, number in found if number not in allowed] == []
    assert allowed.keys() == {number for _, number in found}, "an exception that is not needed any more"


# ------------------------------------------------------------------------------------------------ the checker, checked
def book(prose: str, code: str = "", printed: str = "") -> NotebookNode:
    output = new_output("stream", name="stdout", text=printed)
    return new_notebook(cells=[new_markdown_cell(prose), new_code_cell(code, outputs=[output])])


@pytest.mark.parametrize(
    ("prose", "numbers"),
    [
        ("About 6 ml, 2 to 3 of 4.0 x 1.2 mm; 62 % or 5%.", ["6", "2", "3", "4.0", "1.2", "62 %", "5%"]),
        ("Twelve knees, thirty rounds, two labels, hundreds.", ["Twelve", "thirty"]),
        ("## 3 things\n\n$x^2$, `range(7)`, T1, HD95, 3D, [9](a8.md), <b id=4>, 2.5e-3", ["2.5e-3"]),
        ("CC BY-SA 3.0, slice 3, Hospital 4 of 4, Notebooks 01, 02 and 03", ["4"]),
        ("Notebooks count: notebook 03, notebooks 04 to 06, figure 1, steps 3 and 5, round 6 (He et al., 2023).", []),
        ("| **Time** | 3 minutes |\n| [02 teacher](x.ipynb) | Where? | 3 |\n| rows | 17 |", ["17"]),
        ("```text\n12\n```\n\nText.\n\n## References\n\n- A. B. *C.* 12, 2019.", []),
    ],
)
def test_numbers_are_found_in_prose_alone(prose: str, numbers: list[str]) -> None:
    assert numbers_in_prose(prose) == numbers


@pytest.mark.parametrize(
    ("number", "code", "printed", "there"),
    [
        ("0.79", "", "Dice 0.794", True),
        ("0.79", "", "Dice 0.796", False),
        ("0.8", "", "Dice 0.794", True),
        ("0.80", "", "Dice 0.8", True),
        ("62 %", "", "0.6182 of them", True),
        ("62 %", "", "62 of 100", True),
        ("62", "", "0.62", False),
        ("48", "assert count == 48", "", True),
        ("48", "x48 = 1", "", False),
        ("twelve", "range(12)", "", True),
        ("twelve", "range(13)", "", False),
        ("1000", "n = 1e3", "", True),
        ("6", "", "volume 6.4 ml", True),
        ("6", "", "volume 6.6 ml", False),
    ],
)
def test_a_number_that_disagrees_is_found(number: str, code: str, printed: str, there: bool) -> None:
    assert list(unbacked(book(f"It is {number}.", code, printed))) == ([] if there else [(1, number)])


def test_a_wrong_number_in_a_notebook_of_the_course_is_found() -> None:
    nb = read(NOTEBOOKS / "02_teacher.ipynb")
    cell = next(cell for cell in nb.cells if "The repository has 48 labelled knees" in cell.source)
    cell.source = cell.source.replace("48", "47")
    assert [number for _, number in unbacked(nb)] == ["47"]
