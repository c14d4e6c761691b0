"""Glossary and notation: links lead somewhere, each term is linked at its first use, symbols and code names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from links import slug
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fedkd_utils import glossary, rules
from fedkd_utils.notebooks import read

PROJECT = Path(__file__).resolve().parent.parent
FOLDER = PROJECT / "notebooks"
TERMS = glossary.read_terms(FOLDER)
# Abbreviations that whoever knows PyTorch knows; a licence, and names of data sets that a notebook lists.
KNOWN = {"CPU", "GPU", "MB", "IT", "MONAI", "HTML", "JSON", "PNG", "CC", "BY", "IWOAI", "SKI10"}
ABBREVIATION = re.compile(r"(?<![\w-])(?:[A-Z]{2,}[0-9]*|[A-Z][0-9]+)(?![\w-])")
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.S)
LETTERS = "alpha beta gamma delta varepsilon epsilon eta kappa lambda mu nu xi pi rho sigma tau phi theta omega Delta"
GREEK = re.compile(rf"\\({LETTERS.replace(' ', '|')})(?![A-Za-z])")


def notebooks():
    return [read(FOLDER / f"{name}.ipynb") for name in rules.NAMES]


def words_of(nb):
    return " ".join(glossary.prose(c.source).replace("\0", " ") for c in nb.cells if c.cell_type == "markdown")


def abbreviations(text):
    return set(ABBREVIATION.findall(text))


# ------------------------------------------------------------------------------------------------- the committed pages
def test_each_entry_has_a_text_and_a_name_of_its_own():
    text = (FOLDER / "glossary.md").read_text()
    names = [name.lower() for term in TERMS for name in term.names]
    assert len(names) == len(set(names)) and len({t.anchor for t in TERMS}) == len(TERMS) > 50
    for section in text.split("\n### ")[1:]:
        body = re.sub(r"\*Also: .*?\.\*", "", section.split("\n", 1)[1].split("\n## ")[0]).strip()
        assert len(body) > 20 and body.endswith("."), section.splitlines()[0]


@pytest.mark.parametrize("name", rules.NAMES)
def test_each_term_is_linked_at_its_first_use(name):
    assert not glossary.problems(read(FOLDER / f"{name}.ipynb"), TERMS), "run python -m fedkd_utils glossary"


@pytest.mark.parametrize("name", rules.NAMES)
def test_each_abbreviation_is_in_the_glossary(name):
    known = KNOWN | {word for term in TERMS for word in term.names}
    found = abbreviations(words_of(read(FOLDER / f"{name}.ipynb")))
    assert not found - known, "explain them in notebooks/glossary.md, at an entry or as *Also: ...*"


def test_no_term_is_unused():
    assert not glossary.unused(notebooks(), TERMS)


def symbols(latex: str) -> set[str]:
    """The letters of a formula and its indices, without functions and words."""
    latex = re.sub(r"\\(?:text|mathrm)\{[^}]*\}|_\{?(?:sup|resp|feat|max|global|ch)\b\}?|\bKL\b|\be\^", " ", latex)
    return set(GREEK.findall(latex)) | set(re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", latex))


def formulas(text: str) -> list[str]:
    return [a or b for a, b in MATH.findall(text)]


def notation() -> list[list[str]]:
    """The rows of the notation: symbol, meaning, unit, names in the code, notebooks."""
    lines = (FOLDER / "notation.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| $")]


def test_each_symbol_of_a_notebook_is_in_the_notation_with_that_notebook_and_no_other_is():
    rows = notation()
    assert {len(row) for row in rows} == {5}
    for name, nb in zip(rules.NAMES, notebooks(), strict=True):
        used = set[str]().union(
            *(symbols(f) for c in nb.cells if c.cell_type == "markdown" for f in formulas(c.source))
        )
        here = [row for row in rows if name[:2] in row[4].split(", ")]
        known = set[str]().union(*(symbols(f) for row in here for f in formulas(f"{row[0]} {row[1]}")))
        assert used <= known, name
        named = set[str]().union(*(symbols(f) for row in here for f in formulas(row[0])))
        assert named <= used, name
    known = {*(name[:2] for name in rules.NAMES), "shapes"}
    assert all(set(row[4].split(", ")) <= known for row in rows)


def test_the_notation_explains_a_symbol_once_a_notebook_and_group():
    for group in (FOLDER / "notation.md").read_text().split("\n## ")[1:]:
        rows = [line.strip("| ").split(" | ") for line in group.splitlines() if line.startswith("| $")]
        found = [(f, where) for row in rows for f in formulas(row[0]) for where in row[-1].split(", ")]
        assert len(found) == len(set(found)), group.splitlines()[0]


def test_every_name_of_the_notation_is_in_the_code():
    code = "\n".join(p.read_text() for p in (PROJECT / "fedkd_utils").glob("*.py"))
    names = [name for row in notation() for name in re.findall(r"`(\w+)`", row[3])]
    assert len(names) > 25 and [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_symbols_are_read_from_formulas():
    loss = r"L_{sup} = \frac{1}{2}\,\mathrm{CE}(z, y) + e^{-T_R/T_1} \sum_c \bar q_{cv} \ln\delta"
    assert symbols(loss) == {*"LzyTRcqv", "delta"}
    assert symbols(r"KL(a \Vert b), \theta_{global}, \theta_k, |A \cap B|, 127\,x, zS") == {*"abkABxzS", "theta"}


# ------------------------------------------------------------------------------------------------ the checker, checked
PAGE = """# Glossary

## One

### Dice

*Also: soft Dice.* A score.

### T1 and T2

Times.

### ASSD, HD95 and HD

Distances.

### voxel

An element.
"""
SMALL = glossary.terms(PAGE)


def book(*sources):
    return new_notebook(cells=[new_markdown_cell(source) for source in sources])


def uses(nb):
    return {name: (use.cell, use.words) for name, use in glossary.first_uses(nb, SMALL).items()}


def test_entries_are_read_from_headings():
    assert [term.names for term in SMALL] == [("Dice", "soft Dice"), ("T1", "T2"), ("ASSD", "HD95", "HD"), ("voxel",)]
    assert [term.anchor for term in SMALL] == [slug(term.title) for term in SMALL]
    assert SMALL[2].anchor == "assd-hd95-and-hd"


def test_first_uses_skip_code_equations_headings_links_and_references():
    nb = book(
        "# Voxels\n\n`voxel` $HD$ [a Dice of 1](x.md) ![T1](t.png) <b title='T2'>\n\n```python\nDice\n```\n\n$$T1$$",
        "Nothing of it: Dices, dice, T12, HD95s are words. Voxels, soft\nDice.",
        "A voxel, T2.\n\n## References\n\nOn HD.",
    )
    assert uses(nb) == {
        "dice": (1, "Dices"),
        "assd-hd95-and-hd": (1, "HD95s"),
        "voxel": (1, "Voxels"),
        "t1-and-t2": (2, "T2"),
    }
    nb.cells[1].source = "Of dice and T12. The soft\nDice."
    assert uses(nb)["dice"] == (1, "soft\nDice")


def test_linking_changes_the_first_use_only_and_can_be_repeated():
    nb = book("# Dice\n\nThe **Dice** of two voxels. Dice again.", "A voxel.")
    nb.cells.insert(1, new_code_cell("Dice"))
    assert glossary.link(nb, SMALL) == 2 and not glossary.problems(nb, SMALL)
    first = "# Dice\n\nThe **[Dice](glossary.md#dice)** of two [voxels](glossary.md#voxel). Dice again."
    assert [cell.source for cell in nb.cells] == [first, "Dice", "A voxel."]
    nb.cells[0].source = nb.cells[0].source.replace("\n\nThe", "\n\nSoft Dice, HD and T1. The")
    assert len(glossary.problems(nb, SMALL)) == 3
    glossary.link(nb, SMALL)
    assert nb.cells[0].source.count("#dice)") == 1 and not glossary.problems(nb, SMALL)
    assert glossary.unused([nb], SMALL) == []


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["A voxel."], ["cell 1: 'voxel' is not linked to the glossary at its first use"]),
        (["A voxel.", "A [voxel](glossary.md#voxel)."], ["cell 1: 'voxel' is not linked"]),
        (["[Voxel](glossary.md#voxel).", "[voxel](glossary.md#voxel)"], ["cell 2: 'voxel' is linked a second time"]),
        (["[Knee](glossary.md#knee)"], ["cell 1: the glossary has no entry 'knee'"]),
        (["[Voxel](glossary.md#voxel), a voxel"], []),
    ],
)
def test_faults_are_found(sources, words):
    found = glossary.problems(book(*sources), SMALL)
    assert len(found) == len(words) and all(a.startswith(b) for a, b in zip(found, words, strict=True))


def test_an_entry_that_nobody_links_to_is_found():
    assert glossary.unused([book("[Voxel](glossary.md#voxel)")], SMALL) == ["Dice", "T1 and T2", "ASSD, HD95 and HD"]


def test_abbreviations_are_found():
    assert abbreviations("A PD image, HD95 and T1, at 3 T; AdamW, NaN, U-Net, X. He") == {"PD", "HD95", "T1"}
