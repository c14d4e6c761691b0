"""The course as HTML pages that need no network: contents, previous and next, search, glossary, equations, figures.

Nothing is executed here: the pages show the outputs that the notebooks hold.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import latex2mathml.converter
from bs4 import BeautifulSoup, Tag
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from fedkd_utils.files import write_atomically
from fedkd_utils.glossary import anchor
from fedkd_utils.notebooks import COURSE, NOTEBOOKS, notebooks_in, read
from fedkd_utils.rules import MINUTES, PACKAGE, WIDGET_VIEW, alt_text, code_cells

TITLE = "Federated few-shot segmentation of the knee"
#: Pages beside the notebooks, in the order of the contents.
BESIDE = ("glossary.md", "notation.md")
#: What every page loads, from its own folder; the script reads the sections from the second file.
STYLE, SECTIONS, SCRIPT = "pages.css", "sections.js", "pages.js"
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_NO_ALT = ("", "No description has been provided for this image")


@dataclass(frozen=True)
class Page:
    """A page of the course: its file, its title, minutes and goals if it is a notebook's, and what stands in it."""

    file: str
    title: str
    minutes: str
    goals: str
    body: BeautifulSoup


# ---------------------------------------------------------------------------------------------------------- equations
def mathml(latex: str, display: bool) -> str:
    """An equation as MathML, which browsers draw without a script; an unknown command is an error."""
    spaced = re.sub(r"(\\(?:ln|log|exp))\b(?=\s*(?:[A-Za-z]|\\(?!left)[A-Za-z]))", r"\1\\,", latex.strip())
    try:
        markup = latex2mathml.converter.convert(spaced, display="block" if display else "inline")
    except Exception as error:
        raise ValueError(f"cannot set the equation {latex!r}: {error or type(error).__name__}") from error
    if unknown := re.search(r">(\\[A-Za-z]+)<", markup):
        raise ValueError(f"cannot set the equation {latex!r}: {unknown[1]} is unknown")
    return markup


class _Renderer(IPythonRenderer):
    def block_html(self, html: str) -> str:
        # What embeds pictures would close a folded block at its first blank line.
        return str(super().block_html(html)) if "<img" in html else html

    def block_math(self, body: str) -> str:
        return mathml(body, display=True)

    def multiline_math(self, text: str) -> str:
        return mathml(text, display=True)

    def inline_math(self, body: str) -> str:
        return mathml(body, display=False)

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", display=True)


def _markdown(source: str, folder: Path, attachments: Any = None) -> str:
    renderer = _Renderer(
        escape=False,
        attachments=attachments or {},
        embed_images=True,
        path=str(folder),
        anchor_link_text="",
        exclude_anchor_links=True,
    )
    return str(MarkdownWithMath(renderer=renderer).render(source))


class _Exporter(HTMLExporter):
    """Only the cells, no scripts; equations as MathML."""

    @jinja2.pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        folder = Path(context.get("resources", {}).get("metadata", {}).get("path", ""))
        return _markdown(source, folder, context.get("cell", {}).get("attachments"))


# -------------------------------------------------------------------------------------------------------- what is shown
def _notebook_page(nb: NotebookNode, stem: str, folder: Path) -> Page:
    for cell in code_cells(nb):
        for output in cell.outputs:
            output.get("data", {}).pop(WIDGET_VIEW, None)
            if "image/png" in output.get("data", {}):
                output.metadata.setdefault("image/png", NotebookNode())["alt"] = alt_text(output)
    nb.metadata.pop("widgets", None)
    exporter = _Exporter(template_name="basic", embed_images=True)
    body, _ = exporter.from_notebook_node(nb, {"metadata": {"name": stem, "path": str(folder)}})
    first = nb.cells[0].source if nb.cells else ""
    minutes, goals = MINUTES.search(first), re.search(r"\*\*You will learn\*\*(.+?)(?:\n\n|\Z)", first, re.S)
    words = BeautifulSoup(_markdown(goals[1], folder), "html.parser").get_text() if goals else ""
    return Page(
        f"{stem}.html",
        _title(first, stem),
        minutes[0] if minutes else "",
        " ".join(f"You will learn {words}".split()) if words else "",
        BeautifulSoup(body, "html.parser"),
    )


def _markdown_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    body = BeautifulSoup(_markdown(text, path.parent), "html.parser")
    return Page(f"{path.stem}.html", _title(text, path.stem), "", "", body)


def _title(markdown: str, fallback: str) -> str:
    match = re.match(r"# +(.+)", markdown)
    return match[1].strip() if match else fallback


def _mend(page: Page, source: Path, out: Path, names: set[str]) -> None:
    """Anchors for headings, tables that a screen reader understands and a narrow window can scroll, links that hold."""
    body, seen = page.body, set[str]()
    for style in body.find_all("style"):
        style.decompose()
    for heading in body.find_all(_HEADINGS):
        name = first = anchor(heading.get_text())
        number = 0
        while name in seen:
            number += 1
            name = f"{first}-{number}"
        seen.add(name)
        heading["id"] = name
    for table in body.find_all("table"):
        del table["border"]
        for head in table.find_all("thead"):
            if not head.get_text(strip=True):
                head.decompose()
        for cell in table.find_all("th"):
            if not cell.get_text(strip=True):
                cell.name = "td"
            else:
                cell["scope"] = "col" if cell.find_parent("thead") else "row"
        _scroll(table, "Table")
    for equation in body.find_all("math", display="block"):
        _scroll(equation, "Equation")
    for link in body.find_all("a", href=True):
        link["href"] = _from_here(str(link["href"]), source, out, names)


def _scroll(wide: Tag, label: str) -> None:
    """What may be wider than a narrow window scrolls by itself, with the keyboard as well."""
    frame = BeautifulSoup("", "html.parser").new_tag("div")
    frame.attrs = {"class": "scroll", "role": "group", "aria-label": label, "tabindex": "0"}
    wide.wrap(frame)


def _from_here(address: str, source: Path, out: Path, names: set[str]) -> str:
    """Links between notebooks become links between pages; links to project files hold from the new place."""
    target, hash_, name = address.partition("#")
    if re.match(r"[a-z]+:|//", target) or not target:
        return address
    path = Path(target)
    if path.parent == Path() and f"{path.stem}.html" in names and path.suffix in (".ipynb", ".md"):
        return f"{path.stem}.html{hash_}{name}"
    return Path(os.path.relpath(source / target, out)).as_posix() + hash_ + name


# ------------------------------------------------------------------------------------------------------------ the frame
def _contents(pages: Sequence[Page], here: Page | None) -> str:
    lines = []
    for page in pages:
        current = ' aria-current="page"' if page is here else ""
        lines.append(f'<li><a href="{page.file}"{current}>{html.escape(page.title)}</a></li>')
    course = f'<nav aria-label="Course"><h2>Course</h2>\n<ul>\n{chr(10).join(lines)}\n</ul></nav>'
    if here is None:
        return course
    inside = "\n".join(
        f'<li><a href="#{heading["id"]}">{html.escape(heading.get_text())}</a></li>'
        for heading in here.body.find_all("h2")
    )
    return f'<nav aria-label="This page"><h2>This page</h2>\n<ul>\n{inside}\n</ul></nav>\n{course}'


def _neighbours(pages: Sequence[Page], here: Page) -> str:
    i = pages.index(here)
    links = []
    if i > 0:
        links.append(f'<a rel="prev" href="{pages[i - 1].file}">← {html.escape(pages[i - 1].title)}</a>')
    if i + 1 < len(pages):
        links.append(f'<a rel="next" href="{pages[i + 1].file}">{html.escape(pages[i + 1].title)} →</a>')
    return f'<nav class="neighbours" aria-label="Previous and next page">{" ".join(links)}</nav>'


def _whole(title: str, main: str, side: str) -> str:
    full = TITLE if title == TITLE else f"{title} - {TITLE}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(full)}</title>
<link rel="stylesheet" href="{STYLE}">
<script defer src="{SECTIONS}"></script>
<script defer src="{SCRIPT}"></script>
</head>
<body>
<header>
<a class="skip" href="#text">Skip to the text</a>
<a href="index.html">{html.escape(TITLE)}</a>
<a class="narrow" href="#contents">Contents</a>
<form role="search" hidden>
<label for="words">Search the course</label>
<input id="words" type="search" autocomplete="off">
<p id="found" role="status"></p>
<ol id="results"></ol>
</form>
</header>
<div class="columns">
<main id="text" tabindex="-1">
{main}
</main>
<aside id="contents" aria-label="Contents">
{side}
</aside>
</div>
</body>
</html>
"""


# ----------------------------------------------------------------------------------------------------------- the search
def sections(page: Page) -> Iterator[dict[str, str]]:
    """The parts of a page, as the search knows them: file and anchor, titles, text.

    A part begins at a heading; what stands before the first heading is one, too, if there is anything.
    """
    parts = [{"file": page.file, "page": page.title, "anchor": "", "title": page.title, "text": ""}]
    for element in page.body.descendants:
        if isinstance(element, Tag):
            if element.name in _HEADINGS:
                parts.append({**parts[0], "anchor": str(element["id"]), "title": element.get_text(), "text": ""})
            elif element.name == "img":
                parts[-1]["text"] += f" {element.get('alt', '')}"
        elif not element.find_parent(_HEADINGS):
            parts[-1]["text"] += f" {element}"
    for part in parts:
        part["text"] = " ".join(part["text"].split())
        if part["anchor"] or part["text"]:
            yield part


# ------------------------------------------------------------------------------------------------------------ the check
def outside(page: str) -> list[str]:
    """What would not work without a network, or for a reader who cannot see pictures."""
    found = []
    for tag in BeautifulSoup(page, "html.parser").find_all(True):
        for name in ("src", "srcset", "data", "poster", *(("href",) if tag.name != "a" else ())):
            if re.match(r"\s*(https?:)?//", str(tag.get(name, ""))):
                found.append(f"<{tag.name} {name}={tag.get(name)}>")
        if tag.name == "script" and not tag.get("src"):
            found.append("<script> in the page")
        if tag.name == "img" and str(tag.get("alt", "")).strip() in _NO_ALT:
            found.append("<img> without alt text")
    return found + re.findall(r"@import\s+[^;]+|url\(\s*['\"]?(?:https?:)?//[^)]*\)", page)


# ------------------------------------------------------------------------------------------------------------ the build
def build(notebooks: Sequence[Path | str], out: Path | str, source: Path | str | None = None, note: str = "") -> Path:
    """Write one page a notebook, glossary, notation and an index under `out`; returns the index.

    Args:
        notebooks: the notebooks, in order.
        out: the folder of the pages.
        source: the folder from which links in the notebooks are meant (default: the notebooks' own).
        note: a sentence for the index, for example on where the outputs come from.
    """
    paths, out = [Path(path) for path in notebooks], Path(out)
    folder = Path(source) if source is not None else paths[0].parent
    pages = []
    for path in paths:
        try:
            pages.append(_notebook_page(read(path), path.stem, folder))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
    pages += [_markdown_page(folder / name) for name in BESIDE if (folder / name).exists()]
    names = {page.file for page in pages}
    for page in pages:
        _mend(page, folder, out, names)
        whole = _whole(page.title, f"{page.body}\n{_neighbours(pages, page)}", _contents(pages, page))
        if found := outside(whole):
            raise ValueError(f"{page.file}: the page is not complete offline: {'; '.join(found[:5])}")
        write_atomically(out / page.file, whole.encode())
    known = [section for page in pages for section in sections(page)]
    write_atomically(out / SECTIONS, (f"window.courseSections = {json.dumps(known, ensure_ascii=False)};\n").encode())
    write_atomically(out / SCRIPT, (PACKAGE / SCRIPT).read_bytes())
    code_style = HtmlFormatter(style="default").get_style_defs(".highlight")
    write_atomically(out / STYLE, (f"{code_style}\n" + (PACKAGE / STYLE).read_text(encoding="utf-8")).encode())
    index = out / "index.html"
    write_atomically(index, _whole(TITLE, _index(pages, note), _contents(pages, None)).encode())
    return index


def _index(pages: Sequence[Page], note: str) -> str:
    items = []
    for page in pages:
        words = f"<p>{html.escape(page.goals)}</p>" if page.goals else ""
        minutes = f" ({page.minutes})" if page.minutes else ""
        items.append(f'<li><a href="{page.file}">{html.escape(page.title)}</a>{minutes}{words}</li>')
    return f'<h1>{TITLE}</h1>\n<p>{html.escape(note)}</p>\n<ul class="pages">\n{chr(10).join(items)}\n</ul>'


def build_committed(out: Path | None = None) -> Path:
    """The pages of the committed notebooks with the outputs they hold; nothing is executed."""
    note = "The outputs are those that the notebooks were committed with; nothing was executed to make these pages."
    return build(notebooks_in(NOTEBOOKS), out or COURSE, note=note)
