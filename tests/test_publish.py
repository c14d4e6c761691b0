"""Publishing on tiny notebooks: clean runs, failures that leave files intact, pages of what was executed."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fedkd_utils import pages, publish, rules
from fedkd_utils.notebooks import NOTEBOOKS, notebooks_in, read

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
# The kind is spelled in two parts so that the page's listing of this source does not hold it.
PICTURE = f"""view = "application/vnd.jupyter." + "widget-view+json"
display({{"image/png": "{PNG}", "text/plain": "one dot", view: {{"model_id": "x"}}}}, raw=True)"""


def write(path, *sources, tags=()):
    cells = [new_markdown_cell(f"# {path.stem}\n\nIt takes 5 minutes. See [next](01_b.ipynb#x), [file](../README.md).")]
    for source in sources:
        cells += [new_markdown_cell("Why $a_1 < b$?"), new_code_cell(source, metadata={"tags": list(tags), "x": 1})]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"widgets": {}, "other": 1}), path)
    return path


def test_execution_stamps_trims_and_reports_cells(tmp_path):
    probe = (
        "import os, sys\nprint(sys.executable, os.getcwd(), os.environ['OMP_NUM_THREADS'], os.path.exists('a.ipynb'))"
    )
    path = write(tmp_path / "a.ipynb", probe, "1 / 0", PICTURE, tags=["raises-exception"])
    before, seen = path.read_bytes(), []
    nb = publish.execute_notebook(path, tmp_path / "out" / "b.ipynb", lambda k, m: seen.append((k, m)))
    assert path.read_bytes() == before and read(tmp_path / "out" / "b.ipynb") == nb
    assert seen == [(1, 3), (2, 3), (3, 3)]
    code = [c for c in nb.cells if c.cell_type == "code"]
    threads = publish.os.environ.get("OMP_NUM_THREADS", publish.KERNEL_ENVIRONMENT["OMP_NUM_THREADS"])
    assert code[0].outputs[0].text == f"{sys.executable} {tmp_path} {threads} True\n"
    assert [c.execution_count for c in code] == [1, 2, 3] and code[1].outputs[0].ename == "ZeroDivisionError"
    assert [c.id for c in nb.cells] == [f"cell-{i:02d}" for i in range(1, 8)]
    assert code[0].metadata == {"tags": ["raises-exception"]} and nb.cells[0].metadata == {}
    assert set(nb.metadata) == {"kernelspec", "language_info", "fedkd"}
    assert nb.metadata["fedkd"]["fingerprint"] == rules.fingerprint(nb)
    assert list(tmp_path.joinpath("out").iterdir()) == [tmp_path / "out" / "b.ipynb"]


@pytest.mark.parametrize(
    ("source", "words"),
    [("x = 1 / 0", "ZeroDivisionError"), ("import sys\nprint('careful', file=sys.stderr)", "wrote to stderr")],
)
def test_a_failed_run_names_the_cell_and_leaves_the_file(tmp_path, source, words):
    path = write(tmp_path / "a.ipynb", "2", source)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match=rf"(?s)a.ipynb, code cell 2 of 2.*{words}"):
        publish.execute_notebook(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_damaged_notebook_is_named(tmp_path):
    (tmp_path / "00_a.ipynb").write_text("{")
    with pytest.raises(ValueError, match="00_a.ipynb is not a notebook"):
        publish.execute_notebook(tmp_path / "00_a.ipynb")
    with pytest.raises(ValueError, match="no notebook such as"):
        publish.run_course(tmp_path / "none", tmp_path)


MODULES = {
    "__init__.py": "",
    "__main__.py": "from fedkd_utils import lonely",
    "used.py": "def f():\n    from fedkd_utils.deep import g\n    return g",
    "deep.py": "import numpy\nSTYLE = 'x'\n(here / \"deep.css\").read_text()",
    "lonely.py": "import fedkd_utils.used",
    "deep.css": "",
    "other.css": "",
}
DEEP = {"__init__.py", "used.py", "deep.py", "deep.css"}


@pytest.mark.parametrize(
    ("source", "behind"),
    [
        ("1", {"__init__.py"}),
        ("import numpy\nfrom other import used", {"__init__.py"}),
        ("from fedkd_utils import (\n    used,\n)", DEEP),
        ("import fedkd_utils.used as u", DEEP),
        ("def late():\n    from fedkd_utils.deep import g", DEEP - {"used.py"}),
        ("!python -m fedkd_utils pages", {*DEEP, "__main__.py", "lonely.py"}),
        ("run([sys.executable, '-m', 'fedkd_utils', 'pages'])", {*DEEP, "__main__.py", "lonely.py"}),
        ("from fedkd_utils.__main__ import main\nmain(['pages'])", {*DEEP, "__main__.py", "lonely.py"}),
        ("print(", {"__init__.py"}),
    ],
)
def test_fingerprint_follows_the_code_and_what_it_imports_and_nothing_else(tmp_path, source, behind):
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    nb = new_notebook(cells=[new_code_cell(source), new_markdown_cell("x")])
    first = rules.fingerprint(nb, tmp_path)
    nb.cells[1].source = "prose is free"
    assert rules.fingerprint(nb, tmp_path) == first
    moving = set()
    for name, text in MODULES.items():
        (tmp_path / name).write_text(f"{text}\n# changed")
        moving |= {name} if rules.fingerprint(nb, tmp_path) != first else set()
        (tmp_path / name).write_text(text)
    assert moving == behind and rules.fingerprint(nb, tmp_path) == first
    nb.cells[0].source += "\n2"
    assert rules.fingerprint(nb, tmp_path) != first


def test_what_breaks_a_rule_is_written_and_then_refused(tmp_path):
    """So that `make notebooks` fails, after it has executed all of them."""
    for name in ("00_a", "01_b"):
        nbformat.write(
            new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("1 + 1")]), tmp_path / f"{name}.ipynb"
        )
    with pytest.raises(ValueError, match="against the rules") as found:
        publish.stamp_all(tmp_path)
    assert "00_a.ipynb: the first cell lacks 'Why'" in str(found.value) and "01_b.ipynb: " in str(found.value)
    assert all(rules.code_cells(nbformat.read(path, 4))[0].execution_count == 1 for path in tmp_path.glob("*.ipynb"))


def test_fingerprint_follows_the_data_that_the_code_reads(tmp_path):
    (tmp_path / "fedkd_utils").mkdir()
    (tmp_path / "fedkd_utils" / "__init__.py").write_text("")
    knee = tmp_path / "data" / "demo" / "knee.nii.gz"
    knee.parent.mkdir(parents=True)
    knee.write_bytes(b"a")
    reads, plain = (new_notebook(cells=[new_code_cell(code)]) for code in ("DEMO / 'knee.nii.gz'", "x = 1"))
    before = [rules.fingerprint(nb, tmp_path / "fedkd_utils") for nb in (reads, plain)]
    knee.write_bytes(b"b")
    after = [rules.fingerprint(nb, tmp_path / "fedkd_utils") for nb in (reads, plain)]
    assert after[0] != before[0] and after[1] == before[1]


def test_no_notebook_is_made_stale_by_what_only_shows_it():
    shown_by = {
        "pages.py",
        "pages.js",
        "pages.css",
        "glossary.py",
        "publish.py",
        "rules.py",
        "notebooks.py",
        "bench.py",
        "bench_steps.py",
        "timing.py",
    }
    for path in notebooks_in(NOTEBOOKS):
        names = {file.name for file in rules.files_behind(read(path))}
        assert not names & shown_by and {"course.py", "exercises.py", "settings.py"} <= names
        assert ("viewer.py" in names) == ({"viewer.js", "viewer.css", "slices.js"} <= names)


def test_the_course_runs_in_order_and_reads_offline(tmp_path, capsys):
    folder = tmp_path / "notebooks"
    write(folder / "00_a.ipynb", "open('made.txt', 'w').write('x')")
    write(folder / "01_b.ipynb", "open('made.txt').read()", PICTURE)
    before = (folder / "00_a.ipynb").read_bytes()
    index = publish.run_course(folder, tmp_path / "build" / "course")
    assert (folder / "00_a.ipynb").read_bytes() == before
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and re.match(r"notebook 2 of 2  01_b +cell  2 of  2 +\d+ s", shown[1])
    made = {name: (index.parent / name).read_text() for name in ("index.html", "00_a.html", "01_b.html")}
    assert '<a href="00_a.html">00_a</a> (5 minutes)' in made["index.html"]
    assert "executed on this machine" in made["index.html"]
    assert 'href="01_b.html#x"' in made["00_a.html"] and 'href="../../README.md"' in made["00_a.html"]
    assert "<msub><mi>a</mi><mn>1</mn></msub>" in made["00_a.html"] and "$a_1" not in made["00_a.html"]
    assert 'alt="one dot"' in made["01_b.html"] and rules.WIDGET_VIEW not in made["01_b.html"]


def test_a_notebook_beside_another_is_executed_once_and_its_error_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    monkeypatch.setattr(publish, "BESIDE", {"00_a.ipynb": ("02_c.ipynb", "09_not_there.ipynb")})
    waits = "import pathlib, time\nfor _ in range(200):\n    {}\n    time.sleep(0.1)"
    write(folder / "00_a.ipynb", waits.format("if pathlib.Path('made.txt').exists(): break"), "open('made.txt').read()")
    niceness = "import os\nopen('{}.txt', 'w').write(str(os.nice(0) if hasattr(os, 'nice') else ''))"
    niceness += "\nif os.access('/proc/self/autogroup', os.W_OK):\n"  # Linux: of the session, too
    niceness += "    open('{}.txt', 'a').write(open('/proc/self/autogroup').read().partition('nice')[2])"
    write(folder / "01_b.ipynb", "open('made.txt').read()", niceness.format("front", "front"))
    write(folder / "02_c.ipynb", niceness.format("beside", "beside"), "open('made.txt', 'a').write('once')")
    index = publish.run_course(folder, tmp_path / "build" / "course")  # the first waits for what the last writes
    assert (folder / "made.txt").read_text() == "once" and (index.parent / "02_c.html").is_file()
    front, beside = (list(map(int, (folder / f"{name}.txt").read_text().split())) for name in ("front", "beside"))
    assert len(front) == len(beside) and beside == [min(own + 10, 19) for own in front]
    write(folder / "02_c.ipynb", "1 / 0")
    with pytest.raises(RuntimeError, match="02_c.ipynb, code cell 1 of 1 failed"):
        publish.run_course(folder, tmp_path / "build" / "course")


def test_those_in_front_do_not_wait_for_one_beside_them_that_comes_earlier(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "notebooks"
    monkeypatch.setattr(publish, "BESIDE", {"00_a.ipynb": ("01_b.ipynb",)})
    write(folder / "00_a.ipynb", "1")
    waits = "import os, time\nfor _ in range(300):\n    if os.path.exists('made.txt'): break\n    time.sleep(0.1)"
    write(folder / "01_b.ipynb", waits, "open('made.txt').read()")
    write(folder / "02_c.ipynb", "open('made.txt', 'w').write('x')")
    contents = publish.run_course(folder, tmp_path / "build" / "course").read_text()
    reported = re.findall(r"notebook \d of 3  (\w+)", capsys.readouterr().out)
    assert list(dict.fromkeys(reported)) == ["00_a", "02_c", "01_b"]
    assert contents.index("00_a.html") < contents.index("01_b.html") < contents.index("02_c.html")


def test_a_failure_in_front_ends_what_runs_beside_it(tmp_path, monkeypatch):
    folder, began = tmp_path / "notebooks", time.monotonic()
    monkeypatch.setattr(publish, "BESIDE", {"00_a.ipynb": ("01_b.ipynb", "02_c.ipynb")})
    waits = "import pathlib, time\nwhile not pathlib.Path('pid.txt').exists():\n    time.sleep(0.1)\n1 / 0"
    write(folder / "00_a.ipynb", waits)
    write(folder / "01_b.ipynb", "import os, time\nopen('pid.txt', 'w').write(str(os.getpid()))\ntime.sleep(600)")
    write(folder / "02_c.ipynb", "1")
    with pytest.raises(RuntimeError, match="(?s)00_a.ipynb, code cell 1 of 1 failed.*ZeroDivisionError"):
        publish.run_course(folder, tmp_path / "out")
    assert time.monotonic() - began < 60
    kernel = int((folder / "pid.txt").read_text())
    while time.monotonic() - began < 90:
        try:
            publish.os.kill(kernel, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        pytest.fail("the kernel of the notebook beside is still there")


def test_a_process_beside_that_dies_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    monkeypatch.setattr(publish, "BESIDE", {"00_a.ipynb": ("01_b.ipynb",)})
    write(folder / "00_a.ipynb", "1")
    write(folder / "01_b.ipynb", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    with pytest.raises(RuntimeError, match="01_b.ipynb: its process died"):
        publish.run_course(folder, tmp_path / "out")


def test_what_runs_beside_is_in_the_course_and_comes_later():
    names = [f"{name}.ipynb" for name in rules.NAMES]
    for front, beside in publish.BESIDE.items():
        assert all(names.index(name) > names.index(front) for name in beside)
    beside = [name for group in publish.BESIDE.values() for name in group]
    assert len(beside) == len(set(beside)) and not set(beside) & publish.BESIDE.keys()


def test_alt_text_comes_from_metadata_or_twin():
    def output(metadata, text):
        return new_output("display_data", {"image/png": PNG, "text/plain": text}, metadata=metadata)

    assert rules.alt_text(output({"image/png": {"alt": "a knee"}}, "<Figure size 6x4 with 1 Axes>")) == "a knee"
    assert rules.alt_text(output({}, "'a knee'")) == "a knee"
    assert rules.alt_text(output({}, "<Figure size 6x4 with 1 Axes>")) == ""


def nbval(path):
    """Strict validation, as `make test` does it: (passed, report)."""
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=60"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, str(path)], capture_output=True, text=True, cwd=path.parent
    )
    return done.returncode == 0, done.stdout


def test_figures_and_viewer_survive_the_whole_way(tmp_path):
    """Executed, checked, validated strictly, published; and a changed figure fails."""
    path = write(
        tmp_path / "00_a.ipynb",
        "import numpy as np\n\nfrom fedkd_utils import figures, live, surfaces, viewer",
        "figures.show(*figures.curves({'a': [(0, 0.0), (1, 1.0)]}, 'round', 'Dice', 'Dice by round'))",
        "view = viewer.show_volume(np.arange(24.0).reshape(2, 3, 4), None, (4, 1, 1), 'Numbers')",
        "label = np.zeros((10, 20, 20), int)\nlabel[2:8, 3:17, 5:9] = 1\n"
        "two = viewer.show_comparison(1.0 * label, {'moved': np.roll(label, 1, 2)}, label, (2, 1, 1), 'Two')",
        "solid = surfaces.show_surfaces({'truth': label, 'moved': np.roll(label, 1, 2)}, (2, 1, 1), 'distance')",
        "with live.progress_bar(2, 'Teacher') as advance:\n    for k in 1, 2:\n        advance(1, f'x, loss {k}')",
    )
    nb = publish.execute_notebook(path)
    assert [p for p in rules.problems(nb) if not p.startswith(("the first", "the last"))] == []
    assert path.stat().st_size < 200_000 and "widgets" not in nb.metadata
    passed, report = nbval(path)
    assert passed and "6 passed" in report, report
    page = pages.build([path], tmp_path / "site").with_name("00_a.html").read_text()
    assert 'alt="Dice by round: Dice over round, 1 line; at its end, a higher."' in page
    assert 'alt="Numbers: ' in page and page.count("data:image/png;base64,") == 4
    assert "Teacher: finished" in page
    nb.cells[4].source = nb.cells[4].source.replace("(1, 1.0)", "(1, -1.0)")
    nbformat.write(nb, path)
    passed, report = nbval(path)
    assert not passed and "a lower" in report and "a higher" in report


@pytest.mark.parametrize(("times", "runs"), [(1, True), (2, False)])
def test_a_kernel_that_found_its_port_taken_is_started_once_more(tmp_path, monkeypatch, times, runs):
    tries = []
    execute = publish.NotebookClient.execute

    def unlucky(client, **more):
        tries.append(client)
        if len(tries) <= times:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return execute(client, **more)

    monkeypatch.setattr(publish.NotebookClient, "execute", unlucky)
    write(tmp_path / "00_a.ipynb", "print(6 * 7)")
    if runs:
        done = publish.execute_notebook(tmp_path / "00_a.ipynb")
        assert publish.code_cells(done)[0].outputs[0].text == "42\n"
    else:
        with pytest.raises(RuntimeError, match="died before replying"):
            publish.execute_notebook(tmp_path / "00_a.ipynb")
    assert len(tries) == 2
