"""The course as pages: complete without a network, found by search and links, readable for everybody.

The committed notebooks are written once; a headless browser then reads them, and axe checks their accessibility.
"""

from __future__ import annotations

import copy
import json
import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from links import broken_links
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fedkd_utils import pages, rules
from fedkd_utils.__main__ import main
from fedkd_utils.notebooks import NOTEBOOKS, read

FILES = [*(f"{name}.html" for name in rules.NAMES), "glossary.html", "notation.html", "index.html"]
# Without preload: axe would read the style sheet again, which a browser forbids for files.
AXE = {"resultTypes": ["violations"], "preload": False}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The pages of the committed notebooks, made by the command of the README; nothing may be executed for them."""

    def never(*arguments, **options):
        raise AssertionError("a notebook was executed")

    before = {path: path.read_bytes() for path in NOTEBOOKS.iterdir() if path.is_file()}
    out = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NotebookClient, "execute", never)
        assert main(["pages", "--out", str(out)]) == 0
    assert before == {path: path.read_bytes() for path in before}
    return out


@pytest.fixture(scope="module")
def soups(course):
    return {name: BeautifulSoup((course / name).read_text(), "html.parser") for name in FILES}


# ------------------------------------------------------------------------------------------------------ without browser
def test_there_is_a_page_for_everything_and_nothing_else(course):
    assert sorted(path.name for path in course.iterdir()) == sorted([*FILES, "pages.css", "pages.js", "sections.js"])


def test_pages_are_complete_without_a_network(course):
    for name in FILES:
        assert not pages.outside((course / name).read_text()), name
    assert "http" not in (course / "pages.js").read_text() and "url(" not in (course / "pages.css").read_text()


@pytest.mark.parametrize("name", FILES)
def test_every_link_leads_somewhere(course, name):
    assert not broken_links(course / name)


def test_what_is_folded_stays_folded(course, soups):
    for name, soup in soups.items():
        source = NOTEBOOKS / name.replace(".html", ".ipynb")
        folded = soup.find_all("details")
        assert all(
            block.find("summary") and len(block.get_text()) > len(block.summary.get_text()) + 20 for block in folded
        )
        if source.is_file():
            prose = "".join(cell.source for cell in read(source).cells if cell.cell_type == "markdown")
            assert len(folded) == prose.count("<details>"), name
            assert sum(block.find("pre") is not None for block in folded) == prose.count("<summary>Solution"), name


def test_pages_are_in_a_row(soups):
    row = FILES[:-1]
    for i, name in enumerate(row):
        ends = {"prev": row[i - 1] if i else None, "next": row[i + 1] if i + 1 < len(row) else None}
        for rel, file in ends.items():
            link = soups[name].find("a", rel=rel)
            assert (link and link["href"]) == file, (name, rel)
        course = soups[name].find("nav", attrs={"aria-label": "Course"})
        assert [a["href"] for a in course.find_all("a")] == row
        assert [a["href"] for a in course.find_all("a", attrs={"aria-current": "page"})] == [name]
        here = soups[name].find("nav", attrs={"aria-label": "This page"})
        assert [a.get_text() for a in here.find_all("a")] == [h.get_text() for h in soups[name].main.find_all("h2")]


def test_every_figure_of_the_notebooks_is_there_with_its_words(soups):
    for name in rules.NAMES:
        nb = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        outputs = [o for cell in rules.code_cells(nb) for o in cell.outputs if "image/png" in o.get("data", {})]
        shown = soups[f"{name}.html"].find_all("img")
        assert [img["alt"] for img in shown] == [rules.alt_text(output) for output in outputs] and shown
        assert all(img["src"].startswith("data:image/png;base64,") for img in shown)


def levels_skipped(soup):
    """Headings that are more than one level below the one before; a page begins with its only h1."""
    levels = [int(h.name[1]) for h in soup.main.find_all(re.compile("^h[1-6]$"))]
    faults = [] if levels[:1] == [1] and levels.count(1) == 1 else ["not one h1 at the beginning"]
    return faults + [f"h{b} after h{a}" for a, b in zip(levels, levels[1:], strict=False) if b > a + 1]


def test_pages_have_a_language_landmarks_labels_and_headings_in_order(soups):
    for name, soup in soups.items():
        assert soup.html["lang"] == "en" and soup.title.get_text(strip=True)
        assert not levels_skipped(soup), name
        assert len(soup.find_all("main")) == len(soup.find_all("header")) == len(soup.find_all("aside")) == 1
        labels = [nav["aria-label"] for nav in soup.find_all("nav")]
        assert len(labels) == len(set(labels)) > 0
        for field in soup.find_all(["input", "select", "textarea"]):
            assert soup.find("label", attrs={"for": field["id"]}), name
        ids = [tag["id"] for tag in soup.find_all(id=True)]
        assert len(ids) == len(set(ids)), name


def test_skipped_headings_are_found():
    found = levels_skipped(BeautifulSoup("<main><h1>a</h1><h3>b</h3><h2>c</h2><h1>d</h1></main>", "html.parser"))
    assert found == ["not one h1 at the beginning", "h3 after h1"]


def test_the_search_knows_every_heading_and_every_word(course, soups):
    text = (course / "sections.js").read_text()
    known = json.loads(text.removeprefix("window.courseSections = ").rstrip().removesuffix(";"))
    for name in FILES[:-1]:
        main = copy.copy(soups[name].main)
        here = [s for s in known if s["file"] == name]
        anchors = [h["id"] for h in main.find_all(re.compile("^h[1-6]$"))]
        assert [s["anchor"] for s in here] == anchors  # each once, and nothing before the first
        words = " ".join(s["title"] + " " + s["text"] for s in here)
        main.find("nav").extract()
        assert set(main.get_text(" ").split()) <= set(words.split())


# -------------------------------------------------------------------------------------------------------- small pages
def book(folder, name, *cells):
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), folder / name)
    return folder / name


def test_tables_are_mended(tmp_path):
    frame = (
        "<style scoped>p {}</style><table border='1' class='dataframe'><thead><tr><th></th><th>Dice</th></tr></thead>"
    )
    frame += "<tbody><tr><th>a</th><td>1</td></tr></tbody></table>"
    cells = [new_markdown_cell("# A\n\n| | |\n|---|---|\n| x | y |"), new_markdown_cell("Why?")]
    output = new_output("display_data", {"text/html": frame, "text/plain": "a 1"})
    path = book(tmp_path / "n", "00_a.ipynb", *cells, new_code_cell("t", execution_count=1, outputs=[output]))
    page = BeautifulSoup(pages.build([path], tmp_path / "out").with_name("00_a.html").read_text(), "html.parser")
    one, two = page.find_all("table")
    assert one.find("thead") is None and [td.get_text() for td in one.find_all("td")] == ["x", "y"]
    assert [(th["scope"], th.get_text()) for th in two.find_all("th")] == [("col", "Dice"), ("row", "a")]
    assert not page.find_all("style") and one.parent["tabindex"] == "0" and one.parent["aria-label"] == "Table"


def test_the_search_has_one_entry_a_heading_and_none_without_words(tmp_path):
    def known(text):
        path = book(tmp_path / "n", "00_a.ipynb", new_markdown_cell(text))
        pages.build([path], tmp_path / "out")
        entries = (tmp_path / "out" / "sections.js").read_text().removeprefix("window.courseSections = ")
        return [(s["anchor"], s["title"], s["text"]) for s in json.loads(entries.rstrip().removesuffix(";"))]

    assert known("# A\n\n## B\n\nOne *two*.") == [("a", "A", ""), ("b", "B", "One two .")]
    assert known("Before.\n\n## B\n") == [("", "00_a", "Before."), ("b", "B", "")]


def test_equal_headings_get_anchors_of_their_own(tmp_path):
    path = book(tmp_path / "n", "00_a.ipynb", new_markdown_cell("# A\n\n## What?\n\nOne.\n\n## What?\n\nTwo."))
    page = pages.build([path], tmp_path / "out").with_name("00_a.html").read_text()
    assert '<h2 id="what">' in page and '<h2 id="what-1">' in page and 'href="#what-1"' in page


def test_links_are_meant_from_the_folder_of_the_notebooks(tmp_path):
    text = "# A\n\n[b](01_b.ipynb#x) [g](glossary.md#dice) [r](../README.md) [w](https://a.org/00_a.ipynb) [h](#a)"
    folder = tmp_path / "n"
    paths = [book(folder, "00_a.ipynb", new_markdown_cell(text)), book(folder, "01_b.ipynb", new_markdown_cell("# B"))]
    (folder / "glossary.md").write_text("# Glossary\n\n## One\n\n### Dice\n\nA $d_1$.")
    index = pages.build(paths, tmp_path / "build" / "pages", note="A < B.")
    page = BeautifulSoup(index.with_name("00_a.html").read_text(), "html.parser")
    assert [a["href"] for a in page.find("h1").find_next("p").find_all("a")] == [
        "01_b.html#x",
        "glossary.html#dice",
        "../../README.md",
        "https://a.org/00_a.ipynb",
        "#a",
    ]
    assert "<msub><mi>d</mi><mn>1</mn></msub>" in index.with_name("glossary.html").read_text()
    assert "<p>A &lt; B.</p>" in index.read_text()


@pytest.mark.parametrize(
    "latex",
    [
        r"\mathcal{L}_{\mathrm{KD}} = \frac{1}{|\Omega|}\sum_{v \in \Omega} \mathbb{1}[u_v < \tau]\,\lVert p \rVert^2",
        r"\theta \leftarrow \sum_{k=1}^{K} \frac{n_k}{n}\,\theta_k, \qquad \operatorname{KL}(p \,\|\, q)",
        r"\sum p \log\frac{p}{q}",
        r"\begin{cases} a & x \le 0 \\ b & \text{else} \end{cases}",
        r"\begin{aligned} a &= \hat{b} \\ c &= \bar{d} \end{aligned}",
        r"S = \left(1 - e^{-T_R/T_1}\right) e^{-T_E/T_2}",
    ],
)
def test_equations_become_mathml(latex):
    assert pages.mathml(latex, display=True).startswith("<math") and 'display="block"' in pages.mathml(latex, True)


@pytest.mark.parametrize(
    ("latex", "spaced"),
    [(r"\ln C", True), (r"\log\frac{p}{q}", True), (r"\ln\bar q", True), (r"\ln(x)", False), (r"\ln_2", False)]
    + [(r"\ln\left(x\right)", False), (r"\max_x y", False)],
)
def test_a_function_name_does_not_touch_its_argument(latex, spaced):
    assert ("<mspace" in pages.mathml(latex, False)) == spaced


@pytest.mark.parametrize("latex", [r"\notacommand{x}", r"\frac{1}{"])
def test_a_wrong_equation_is_an_error(latex):
    with pytest.raises(ValueError, match="cannot set the equation"):
        pages.mathml(latex, display=False)


@pytest.mark.parametrize(
    "markup",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<script>alert(1)</script>",
        '<link rel="stylesheet" href="//cdn.example/x.css">',
        '<img alt="a knee" src="https://example.org/knee.png">',
        "<style>@import 'https://example.org/x.css';</style>",
        "<style>p { background: url(https://example.org/x.png) }</style>",
        '<img src="data:image/png;base64,AA">',
    ],
)
def test_what_needs_the_network_is_found(markup):
    assert pages.outside(markup)
    assert not pages.outside('<a href="https://arxiv.org">paper</a><img alt="a knee" src="data:image/png;base64,AA">')


def test_a_page_with_an_outside_picture_is_refused(tmp_path):
    path = tmp_path / "00_a.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A\n\n![knee](https://example.org/knee.png)")]), path)
    with pytest.raises(ValueError, match="00_a.html: the page is not complete offline"):
        pages.build([path], tmp_path / "site")


# ---------------------------------------------------------------------------------------------------- in a real browser
@pytest.fixture(scope="module")
def reader(browser_page, course):
    (page, errors), asked = browser_page, []
    page.on("request", lambda request: asked.append(request.url))
    return Reader(page, errors, asked, course)


class Reader:
    """A page of the course in a browser, the console's errors, and every address that was asked for."""

    def __init__(self, page, errors, asked, course):
        self.page, self.errors, self.asked, self.course = page, errors, asked, course

    def open(self, name):
        self.page.goto((self.course / name).as_uri())
        return self.page

    def found(self, words):
        self.page.fill("#words", words)
        return self.page.locator("#results a").all_text_contents(), self.page.inner_text("#found")


def test_search_finds_words_and_its_links_lead_to_them(reader):
    page = reader.open("index.html")
    titles, said = reader.found("Hausdorff distance")
    assert "Hausdorff distance" in titles and re.fullmatch(r"\d+ sections found\.", said)
    page.locator("#results a", has_text=re.compile("^Hausdorff distance$")).click()
    page.wait_for_url("**/glossary.html#hausdorff-distance")
    box = page.locator("#hausdorff-distance").bounding_box()
    assert 0 <= box["y"] < 1000  # scrolled to
    titles, said = reader.found("dephased magnetisation")  # prose of one section; the query is given in another order
    assert titles == ["Why is cartilage bright here and dark there?"] and said == "1 section found."
    page.press("#words", "Enter")
    page.wait_for_url("**/01_knee_volumes.html#why-is-cartilage-bright-here-and-dark-there")
    assert reader.found("DICE")[0] == reader.found("dice")[0] != []
    assert "Rényi divergence" in reader.found("renyi")[0]
    assert reader.found("xyzzy") == ([], "Nothing found.") and reader.found(" ") == ([], "")
    assert len(reader.found("the")[0]) == 30 and "the first 30 are below" in page.inner_text("#found")
    page.locator("#results a").last.focus()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "words" and page.locator("#results a").count() == 0
    assert reader.found("<b>") == ([], "Nothing found.")


def test_a_reader_can_walk_through_the_course(reader):
    page = reader.open(FILES[0])
    for name in FILES[1:-1]:
        page.click("a[rel=next]")
        page.wait_for_url(f"**/{name}")
    page.click("header a[href='index.html']")
    page.wait_for_url("**/index.html")
    page = reader.open(FILES[0])
    assert page.locator("img").evaluate_all("(all) => all.every((img) => img.complete && img.naturalWidth > 100)")
    page.locator("main a[href='glossary.html#dess']").click()
    page.wait_for_url("**/glossary.html#dess")
    page = reader.open(FILES[0])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"  # the way past the header comes first


@pytest.mark.parametrize("width", [1400, 400])
def test_axe_finds_no_fault(reader, width):
    from axe_playwright_python.sync_playwright import Axe

    reader.page.set_viewport_size({"width": width, "height": 900})
    # Wide: every page. Narrow: one of each kind, for what only a small window does.
    for name in FILES if width > 1000 else ("05_distillation.html", "notation.html", "index.html"):
        page = reader.open(name)
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        reader.found("voxel")  # results are checked, too
        violations = Axe().run(page, options=AXE).response["violations"]
        found = [(v["id"], node["html"][:120], node["failureSummary"]) for v in violations for node in v["nodes"]]
        assert not found, name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    reader.page.set_viewport_size({"width": 1400, "height": 1000})


def test_axe_finds_planted_faults(reader):
    from axe_playwright_python.sync_playwright import Axe

    page = reader.open("index.html")
    page.evaluate(
        """() => { document.documentElement.removeAttribute('lang');
        document.querySelector('label').remove();
        document.querySelector('main').insertAdjacentHTML('beforeend',
            '<h4>skipped</h4><p style="color: #ccc">pale</p><img src="x.png">'); }"""
    )
    found = {violation["id"] for violation in Axe().run(page, options=AXE).response["violations"]}
    assert {"html-has-lang", "label", "heading-order", "color-contrast", "image-alt"} <= found
    reader.errors.clear()  # x.png is not there


def test_nothing_was_asked_of_the_network_and_the_console_is_clean(reader):
    reader.open("06_dual_distillation.html")
    assert reader.asked and {url.split(":")[0] for url in reader.asked} <= {"file", "data"}
    assert reader.errors == []
