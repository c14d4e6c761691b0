"""The glossary of the course: its terms, where the prose of a notebook uses one first, and the links between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

#: The page, as notebooks beside it link to it.
PAGE = "glossary.md"

_ALSO = re.compile(r"\*Also: (.+?)\.\*")
#: Parts of Markdown that are not prose of ours: code, equations, links and pictures, headings, quotations, HTML; what
#: follows References.
_NO_PROSE = re.compile(
    r"""^(?P<fence>```|~~~).*?^(?P=fence)[^\n]*$ | (?P<ticks>`+).+?(?P=ticks) | \$\$.+?\$\$ | \$[^$\n]+\$
    | !?\[[^\]]*\]\([^)]*\) | ^\#{1,6}[ ][^\n]*$ | ^>[^\n]*$ | <[^>]+> | https?://\S+""",
    re.X | re.M | re.S,
)
_REFERENCES = re.compile(r"^## References\b.*\Z", re.M | re.S)
_LINK = re.compile(r"\]\(" + re.escape(PAGE) + r"#([^)\s]*)\)")


@dataclass(frozen=True)
class Term:
    """An entry of the glossary: its heading, the anchor of that heading, and every way in which it is written."""

    title: str
    anchor: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Use:
    """A place in the prose of a notebook: which cell, where in its source, and the words that stand there."""

    cell: int
    start: int
    words: str


def anchor(heading: str) -> str:
    """The anchor that code hosts give a heading: small letters, hyphens for spaces, no punctuation.

    >>> anchor("ASSD, HD95 and HD")
    'assd-hd95-and-hd'
    """
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def terms(text: str) -> list[Term]:
    """The entries of a glossary page: its headings of the third level, and the names in "Also: ..."."""
    found = []
    for section in re.split(r"^### ", text, flags=re.M)[1:]:
        title, _, body = section.partition("\n")
        also = _ALSO.match(body.strip())
        names = [*re.split(r", | and ", title.strip()), *(re.split(r", ", also[1]) if also else [])]
        found.append(Term(title.strip(), anchor(title), tuple(dict.fromkeys(names))))
    return found


def read_terms(folder: Path | str) -> list[Term]:
    """The entries of the glossary in a folder of notebooks."""
    return terms((Path(folder) / PAGE).read_text(encoding="utf-8"))


def prose(source: str) -> str:
    """Markdown with everything blanked that is not prose; every character that is left stays in its place."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", "\0", match[0])

    return _NO_PROSE.sub(blank, _REFERENCES.sub(blank, source))


def _pattern(terms: Sequence[Term]) -> re.Pattern[str]:
    """All names, the longest first. Names in small letters may begin a sentence; a word may have its plural."""
    named = sorted(((name, i) for i, term in enumerate(terms) for name in term.names), key=lambda x: -len(x[0]))
    ways = []
    for number, (name, i) in enumerate(named):
        words = r"\s+".join(map(re.escape, name.split()))
        if name[0].islower():
            words = f"[{name[0]}{name[0].upper()}]{words[1:]}"
        ways.append(rf"(?P<n{number}_{i}>{words}(?:e?s)?)")
    return re.compile(rf"(?<!\w)(?:{'|'.join(ways)})(?!\w)")


def first_uses(nb: NotebookNode, terms: Sequence[Term]) -> dict[str, Use]:
    """Where the prose of a notebook uses each term first outside of links, by the term's anchor."""
    pattern = _pattern(terms)
    found: dict[str, Use] = {}
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            for match in pattern.finditer(prose(cell.source)):
                term = terms[int(str(match.lastgroup).split("_")[1])]
                found.setdefault(term.anchor, Use(index, match.start(), match[0]))
    return found


def links(nb: NotebookNode) -> list[tuple[str, Use]]:
    """The links to the glossary in a notebook, in order: the anchor and the place."""
    return [
        (match[1], Use(index, match.start(), match[0]))
        for index, cell in enumerate(nb.cells)
        if cell.cell_type == "markdown"
        for match in _LINK.finditer(cell.source)
    ]


def problems(nb: NotebookNode, terms: Sequence[Term]) -> list[str]:
    """Terms that are not linked where they are used first, links that lead nowhere, and links too many."""
    uses, found = first_uses(nb, terms), []
    linked: dict[str, Use] = {}
    for name, place in links(nb):
        if name not in {term.anchor for term in terms}:
            found.append(f"cell {place.cell + 1}: the glossary has no entry {name!r}")
        elif name in linked:
            found.append(f"cell {place.cell + 1}: {name!r} is linked a second time")
        linked.setdefault(name, place)
    for name, use in uses.items():
        link = linked.get(name)
        if link is None or (use.cell, use.start) < (link.cell, link.start):
            words = " ".join(use.words.split())
            found.append(f"cell {use.cell + 1}: {words!r} is not linked to the glossary at its first use")
    return found


def link(nb: NotebookNode, terms: Sequence[Term]) -> int:
    """Link each term at its first use, in place, and take away the links elsewhere; returns how many links there are.

    Only the Markdown cells change, so that the outputs stay valid.
    """
    anywhere = re.compile(r"\[([^\]]*)" + _LINK.pattern)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = anywhere.sub(r"\1", cell.source)
    uses = first_uses(nb, terms)
    for name, use in sorted(uses.items(), key=lambda item: (item[1].cell, -item[1].start)):
        source = nb.cells[use.cell].source
        end = use.start + len(use.words)
        nb.cells[use.cell].source = f"{source[: use.start]}[{use.words}]({PAGE}#{name}){source[end:]}"
    return len(uses)


def unused(notebooks: Iterable[NotebookNode], terms: Sequence[Term]) -> list[str]:
    """The titles of entries to which no notebook links."""
    used = {name for nb in notebooks for name, _ in links(nb)}
    return [term.title for term in terms if term.anchor not in used]
