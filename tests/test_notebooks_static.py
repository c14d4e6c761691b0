"""The committed notebooks keep the rules of the course, and the checker finds every way to break one."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fedkd_utils import rules

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
# A notebook added to the course is added to rules.NAMES: then it must exist, and every rule below holds for it.
EXPECTED = [f"{name}.ipynb" for name in rules.NAMES]


def test_the_course_is_complete_and_holds_nothing_else():
    assert [path.name for path in sorted(FOLDER.glob("*.ipynb"))] == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_a_notebook_keeps_the_rules(name):
    assert not rules.problems(nbformat.read(FOLDER / name, as_version=4))


@pytest.mark.parametrize("name", EXPECTED[1:])
def test_from_notebook_01_on_one_predicts_meets_a_mistake_and_does_exercises(name):
    """As the README promises."""
    cells = nbformat.read(FOLDER / name, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    asked = len(re.findall(r"\*Predict", prose))  # *Predict first:* with its answer folded below what is run
    assert 1 <= asked <= prose.count("<summary>Answer</summary>") and re.search(r"one realistic mistake", prose, re.I)
    assert re.search(r"by[_ ]hand", "\n".join(cell.source for cell in cells), re.I)
    assert prose.count("<summary>Solution</summary>") >= 3


@pytest.mark.parametrize("name", EXPECTED)
def test_every_reference_has_its_doi(name):
    """Or leads to a page that has none."""
    (_, references) = nbformat.read(FOLDER / name, as_version=4).cells[-1].source.split("## References")
    for reference in re.split(r"^- | · ", references, flags=re.M)[1:]:
        doi = re.search(r"\[doi:(10\.\d{4,}/[^\]\s]+)\]\(https://doi\.org/(\S+)\)", reference)
        assert doi is None or doi[1] == doi[2], reference
        assert doi is not None or "https://nipy.org/" in reference, reference


#: "Yu et al., 2019", "Laine and Aila, 2017", "Hinton et al. (2015)", "Owen, 2007".
CITATION = re.compile(r"\b([A-Z][a-zé-]+(?: et al\.| and [A-Z][a-zé-]+)?),? \(?((?:19|20)\d\d)\b")


def uncited(nb):
    """The citations in the prose of a notebook whose first author or year no reference of it has."""
    prose = " ".join("\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown").split())
    text, _, references = prose.partition("## References")
    entries = re.split(r" - | · ", references)
    found = {(name.split()[0], year) for name, year in CITATION.findall(text)}
    return sorted(f"{a} {year}" for a, year in found if not any(a in e and year in e for e in entries))


@pytest.mark.parametrize("name", EXPECTED)
def test_every_citation_has_its_reference(name):
    assert not uncited(nbformat.read(FOLDER / name, as_version=4))


def test_a_citation_of_nobody_is_found():
    nb = good()
    nb.cells[4].source = "Shown before (Nobody et al., 1999; Known, 2001; Known and Other, 2002)."
    nb.cells[6].source += "\n- A. Known. *Title.* 2001. [doi:2](https://doi.org/2)"
    assert uncited(nb) == ["Known 2002", "Nobody 1999"]


# ------------------------------------------------------------------------------------------------ the checker, checked
PNG = "iVBORw0KGgo="
FIRST = (
    "# 07 · A title\n\n**Why.** Because.\n\n**You will learn** to.\n\n"
    "| **Time** | 1 minute on 2 CPU cores |\n| **Prerequisites** | none |\n| **Paper** | section 2 |"
)


def stamped(nb):
    nb.metadata["fedkd"] = rules.stamp(nb)
    return nb


def good():
    """A notebook that breaks no rule: markdown, imports, markdown, a picture, markdown, numbers, last cell."""
    picture = new_output("display_data", {"image/png": PNG, "text/plain": "One dot, in the middle."})
    picture.metadata = {"image/png": {"alt": "One dot, in the middle."}}
    printed = new_output("stream", name="stdout", text="Dice > 0.80: True\n")
    cells = [
        new_markdown_cell(FIRST),
        new_code_cell("import numpy as np\nfrom pathlib import Path", execution_count=1),
        new_markdown_cell("Why?"),
        new_code_cell("figures.show(fig, alt)", execution_count=2, outputs=[picture]),
        new_markdown_cell("What you should see."),
        new_code_cell("print('Dice > 0.80:', dice > 0.8)\nassert dice > 0.8", execution_count=3, outputs=[printed]),
        new_markdown_cell("## Recap\n\n## Go further\n\n## References\n\n- A paper. [doi:1](https://doi.org/1)"),
    ]
    return stamped(new_notebook(cells=cells))


def test_a_good_notebook_has_no_problems():
    assert not rules.problems(good())


def source(cell, text):
    return lambda nb: nb.cells[cell].__setitem__("source", text)


def tagged(tags, text):
    def fault(nb):
        nb.cells[5].metadata["tags"] = tags
        nb.cells[5].source = text

    return fault


def printed(text, name="stdout"):
    return lambda nb: nb.cells[5].outputs.append(new_output("stream", name=name, text=text))


def shown(**data):
    data = {kind.replace("__", "/").replace("_plus_", "+"): value for kind, value in data.items()}
    return lambda nb: nb.cells[5].outputs.append(new_output("display_data", data))


def wordless(nb):
    nb.cells[3].outputs[0].metadata = {}
    nb.cells[3].outputs[0].data["text/plain"] = "<Figure size 640x480 with 1 Axes>"


def worded(alt, text):
    def fault(nb):
        nb.cells[3].outputs[0].metadata = {"image/png": {"alt": alt}}
        nb.cells[3].outputs[0].data["text/plain"] = text

    return fault


def ignored_three_times(nb):
    for cell in (nb.cells[1], nb.cells[3], nb.cells[5]):
        cell.metadata["tags"] = ["nbval-ignore-output"]
        cell.source += "\nassert True"


FAULTS = {
    "no title": (source(0, FIRST.replace("# 07", "07")), "no title"),
    "no why": (source(0, FIRST.replace("Why", "Well")), "lacks 'Why'"),
    "no goals": (source(0, FIRST.replace("You will learn", "Goals")), "lacks 'You will learn'"),
    "no minutes": (source(0, FIRST.replace("1 minute", "a moment")), "how many minutes"),
    "no prerequisites": (source(0, FIRST.replace("Prerequisites", "Needs")), "lacks 'Prerequisites'"),
    "no section of the paper": (source(0, FIRST.replace("Paper", "Text")), "lacks 'Paper'"),
    "no recap": (source(6, "## Go further\n## References\n- [a](https://doi.org/1)"), "the last cell lacks 'Recap'"),
    "no outlook": (source(6, "## Recap\n## References\n- [a](https://doi.org/1)"), "the last cell lacks 'Go further'"),
    "no references": (source(6, "## Recap\n## Go further"), "the last cell lacks 'References'"),
    "bare words": (source(6, "Recap, Go further\n\n## References\n\n- [doi:1](https://doi.org/1)"), "lacks 'Recap'"),
    "no paper named": (source(6, "## Recap\n\n## Go further\n\n## References\n\nmany"), "names no reference"),
    "ends in code": (lambda nb: nb.cells.pop(), "the last cell lacks 'Recap'"),
    "counts with a gap": (lambda nb: nb.cells[5].__setitem__("execution_count", 4), "[1, 2, 4] are not 1 to 3"),
    "stripped": (lambda nb: nb.cells[1].__setitem__("execution_count", None), "not one clean run"),
    "out of order": (lambda nb: nb.cells.insert(2, nb.cells.pop(5)), "not one clean run"),
    "widget state": (lambda nb: nb.metadata.__setitem__("widgets", {}), "widget state"),
    "too large": (printed("x" * 1_000_001), "allowed are fewer than 1000000"),
    "long cell": (source(5, "\n".join(["assert True"] * 26)), "26 lines of code"),
    "empty prose": (source(4, " \n"), "cell 6: no markdown cell before it"),
    "no prose": (lambda nb: nb.cells.pop(4), "cell 5: no markdown cell before it"),
    "late import": (source(5, "def f():\n    import os"), "cell 6: imports outside"),
    "not Python": (source(5, "print("), "cell 6: not Python"),
    "interact": (source(5, "interact(f, x=3)"), "interact( is not used"),
    "output widget": (source(5, "out = widgets.Output()"), "Output( is not used"),
    "clear_output": (source(5, "clear_output(wait=True)"), "clear_output is not used"),
    "display handle": (source(5, "h = display(x, display_id=True)"), "display_id is not used"),
    "figure without the helper": (source(5, "plt.show()"), "plt.show( is not used"),
    "install": (source(5, "!pip install thing"), "! is not used"),
    "magic": (source(5, "%pip install thing"), "% is not used"),
    "GPU": (source(5, "x = x.cuda()"), "needs no GPU"),
    "device": (source(5, 'x = x.to("cuda:0")'), "needs no GPU"),
    "network": (source(5, "requests.get(url)"), "needs no network"),
    "network in a string": (source(5, 'pd.read_csv("https://example.org/x.csv")'), "needs no network"),
    "disguised shell": (source(5, "get_ipython().system('ls')"), "get_ipython is not used"),
    "no seed": (source(5, "rng = np.random.default_rng()"), "names its generator"),
    "global draw": (source(5, "x = np.random.normal(0, 1, 3)"), "names its generator"),
    "global draw of torch": (source(5, "x = torch.randn(3)"), "names its generator"),
    "one of two draws": (source(5, "x = torch.rand(3) + torch.rand(3, generator=g)"), "names its generator"),
    "global seed": (source(5, "torch.manual_seed(0)"), "names its generator"),
    "draw of Python": (source(5, "x = random.random()"), "names its generator"),
    "no seed given": (source(5, "rng = np.random.default_rng(None)"), "names its generator"),
    "clock": (source(5, "print(time.perf_counter())"), "reads a clock"),
    "skip": (tagged(["nbval-skip"], "x = 1"), "nbval-skip"),
    "ignored without assert": (tagged(["nbval-ignore-output"], "x = 1"), "without an assert"),
    "assert in a comment": (tagged(["nbval-ignore-output"], "x = 1  # assert"), "without an assert"),
    "error that never came": (tagged(["raises-exception"], "x = 1"), "raises-exception without an error"),
    "ignored too often": (ignored_three_times, "on 3 cells, allowed are 2"),
    "comment for nbval": (source(5, "# NBVAL_IGNORE_OUTPUT\nassert x"), "a comment steers nbval"),
    "stderr": (printed("careful\n", "stderr"), "cell 6: output on stderr"),
    "long output": (printed("x\n" * 41), "41 lines of output"),
    "long table": (shown(text__plain="x\n" * 41), "41 lines of output"),
    "path printed": (printed("saved in /home/me/x.pt\n"), "absolute path /home"),
    "path of another system": (printed("saved in /Users/me/x.pt\n"), "absolute path /Users"),
    "path as address": (printed("see file:///mnt/x\n"), "absolute path file:///mnt"),
    "path in the code": (source(5, "x = open('/home/me/x')"), "absolute path /home in the code"),
    "path in a table": (shown(text__html="<td>/tmp/x</td>"), "absolute path /tmp"),
    "path on Windows": (printed("C:\\Users\\me\n"), "absolute path C:"),
    "error": (
        lambda nb: nb.cells[5].outputs.append(new_output("error", ename="E", evalue="e", traceback=[])),
        "an error without the tag",
    ),
    "picture without words": (wordless, "cell 4: a picture without alt text"),
    "picture with a word": (worded("figure", "figure"), "fewer than 4 words"),
    "words that nobody compares": (
        worded("One dot, in the middle.", "<Figure size 1x1>"),
        "not the sentence that nbval",
    ),
    "address": (printed("<torch.Generator object at 0x7f12ab34cd56>\n"), "a bare object"),
    "bare artist": (shown(text__plain="[<matplotlib.lines.Line2D>]"), "a bare object"),
    "bare text": (shown(text__plain="Text(0.5, 1.0, 'x')"), "a bare object"),
    "svg": (shown(image__svg_plus_xml="<svg/>", text__plain="words"), "SVG"),
    "styler": (shown(text__html="<style>\n#T_ab12 {}</style><table>", text__plain="words"), "styled table"),
    "lonely widget": (
        lambda nb: nb.cells[5].outputs.append(new_output("display_data", {rules.WIDGET_VIEW: {"model_id": "x"}})),
        "a widget without",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_else(name):
    fault, words = FAULTS[name]
    nb = good()
    fault(nb)
    found = rules.problems(stamped(nb))
    assert any(words in problem for problem in found), found
    others = {
        "ends in code": 3,
        "too large": 1,
        "out of order": 4,
        "no references": 2,
        "bare words": 2,
    }  # a fault that breaks several rules
    assert len(found) <= others.get(name, 1), found


def test_a_stale_notebook_is_found():
    nb = good()
    nb.cells[5].source = "assert True"
    assert rules.problems(nb) == ["stale: the fingerprint does not match the code or the data; run make notebooks"]
    del nb.metadata["fedkd"]
    assert len(rules.problems(nb)) == 1
    assert rules.problems(new_notebook()) == ["no cells"]


def test_outputs_of_another_run_are_found_pictures_too():
    nb = good()
    nb.cells[3].outputs[0].data["image/png"] = "iVBORw0KGgp="
    assert rules.problems(nb) == ["the outputs are not those of the run that was stamped; run make notebooks"]


def test_every_notebook_that_reads_committed_data_is_stale_when_they_change():
    """What a notebook opened while it ran is not known here; that it names a folder of data is."""
    for path in (FOLDER / name for name in EXPECTED):
        nb = nbformat.read(path, as_version=4)
        code = "\n".join(cell.source for cell in rules.code_cells(nb))
        data = [file for file in rules.files_behind(nb) if file.is_relative_to(FOLDER.parent / "data")]
        behind = {file.relative_to(FOLDER.parent / "data").parts[0] for file in data}
        named = {"results"} if re.search(r"results_folder|engine_recorded|seconds_file|rates_file", code) else set()
        assert named | ({"demo"} if re.search("DEMO|data/demo", code) else set()) == behind, path.name


def test_an_expected_error_and_a_measured_time_are_allowed():
    nb = good()
    nb.cells[5].metadata["tags"] = ["raises-exception"]
    nb.cells[5].outputs.append(new_output("error", ename="ValueError", evalue="e", traceback=["ValueError: e"]))
    nb.cells[3].metadata["tags"] = ["nbval-ignore-output"]
    nb.cells[3].source = "start = time.perf_counter()\nassert start"
    assert not rules.problems(stamped(nb))


@pytest.mark.parametrize(
    "code",
    [
        "x = torch.randn(\n    3,\n    generator=g,\n)",
        "rng = np.random.Generator(np.random.PCG64(1))",
        "rng = np.random.default_rng([1, 2])",
        "x = (a - b)/var",
        'path = f"{out}/home/x"',
        'print("A:\\n")',
    ],
)
def test_what_only_looks_like_a_fault_is_allowed(code):
    nb = good()
    nb.cells[5].source = code
    assert not rules.problems(stamped(nb))


def test_checking_changes_nothing():
    nb = good()
    before = copy.deepcopy(nb)
    rules.problems(nb)
    assert nb == before
