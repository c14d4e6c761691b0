"""Links between the files of the project lead to a file and a heading; pages are checked where they are made."""

from __future__ import annotations

from pathlib import Path

import pytest
from links import broken_links, links_and_anchors
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fedkd_utils import rules

PROJECT = Path(__file__).resolve().parent.parent
GUIDES = ["README.md", "CONTRIBUTING.md", "data/README.md", "notebooks/glossary.md", "notebooks/notation.md"]
GUIDES += sorted(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md"))


@pytest.mark.parametrize("name", [*GUIDES, *(f"notebooks/{name}.ipynb" for name in rules.NAMES)])
def test_links_lead_somewhere(name):
    assert not broken_links(PROJECT / name)


TEXT = (
    "[a](b.md), [b](b.md#two-words), [c](https://example.org/x#y), [d](#here), ![e](gone.png), [f](02_gone.ipynb),"
    ' [g](b.md#gone), [h](#gone), [i](b.md#two-words-1), `[j](code.md)`, [k](gone.md "title"), [l](<b.md>), [m][n],'
    ' <a class="x" href="o.html">o</a>, <img src=p.png>\n\n[n]: q.md "title"\n\n## Here'
)
GONE = ["gone.png", "02_gone.ipynb", "b.md#gone", "#gone", "gone.md", "q.md", "o.html", "p.png"]


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# Two [words](a.md)\n\n```text\n# Gone\n```\n\n## Two words!")
    (tmp_path / "a.md").write_text(TEXT)
    assert broken_links(tmp_path / "a.md") == GONE
    write(new_notebook(cells=[new_markdown_cell(TEXT), new_code_cell("# [x](y.md)")]), tmp_path / "a.ipynb")
    assert broken_links(tmp_path / "a.ipynb") == GONE
    page = '<h2 id="here">x</h2><a href="b.html#zwei-wörter">b</a><a href="#here">c</a><a href="mailto:x">d</a>'
    (tmp_path / "a.html").write_text(f'{page}<img src="gone.png"><script src="gone.js"></script><a href="#gone">e</a>')
    (tmp_path / "b.html").write_text('<h1 id="zwei-wörter">x</h1>')
    assert broken_links(tmp_path / "a.html") == ["gone.png", "gone.js", "#gone"]


def test_equal_headings_have_anchors_of_their_own(tmp_path):
    (tmp_path / "a.md").write_text("# Why?\n\n## Why?\n\n## Rényi divergence")
    assert links_and_anchors(tmp_path / "a.md")[1] == {"why", "why-1", "rényi-divergence"}
