"""Execute the notebooks in one clean run, and write the course as HTML that needs no network."""

from __future__ import annotations

import html
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import latex2mathml.converter
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from fedkd_utils.rules import MINUTES, PACKAGE, WIDGET_VIEW, alt_text, code_cells, fingerprint, problems

PROJECT = PACKAGE.parent
NOTEBOOKS = PROJECT / "notebooks"
COURSE = PROJECT / "build" / "course"
#: Digits of a training depend on the number of threads: the Makefile and tests/conftest.py say the same.
KERNEL_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "JUPYTER_PREFER_ENV_PATH": "1"}


# ----------------------------------------------------------------------------------------------- reading and writing
def read(path: Path | str) -> NotebookNode:
    """The notebook at `path`; an error names the file."""
    try:
        return nbformat.read(str(path), as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise ValueError(f"{path} is not a notebook: {error}. Restore it, for example with git checkout.") from error


def _write_text(text: str, path: Path) -> None:
    """Write beside and rename, so that `path` is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def notebooks_in(folder: Path | str) -> list[Path]:
    """The notebooks of the course in `folder`, in order."""
    paths = sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise ValueError(f"no notebook such as 00_start_here.ipynb in {folder}")
    return paths


# --------------------------------------------------------------------------------------------------------- execution
def execute_notebook(
    path: Path | str,
    out: Path | str | None = None,
    on_cell: Callable[[int, int], None] | None = None,
    *,
    folder: Path | str | None = None,
    timeout_s: int = 900,
) -> NotebookNode:
    """Restart and run all; stamp; write to `out` (default: in place). A failed run leaves the file as it was.

    `on_cell(k, m)` is called when code cell k of m starts. The kernel runs in `folder` (default: the notebook's own).
    """
    path = Path(path)
    nb = read(path)
    code = code_cells(nb)
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    begun = 0

    def starts(cell: NotebookNode, cell_index: int) -> None:
        nonlocal begun
        begun += 1
        if on_cell is not None:
            on_cell(begun, len(code))

    environment = {**KERNEL_ENVIRONMENT, **os.environ}
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", KERNEL_ENVIRONMENT["JUPYTER_PREFER_ENV_PATH"])
    client = NotebookClient(
        nb,
        kernel_name="python3",
        timeout=timeout_s,
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],
        record_timing=False,
        coalesce_streams=True,
        on_cell_execute=starts,
        resources={"metadata": {"path": str(Path(folder) if folder else path.parent)}},
    )
    where = f"{path.name}, code cell {{}} of {len(code)}"
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", error.traceback).splitlines()[-25:]
        raise RuntimeError(f"{where.format(begun)} failed.\n" + "\n".join(lines)) from error
    except CellTimeoutError as error:
        raise RuntimeError(f"{where.format(begun)} took more than {timeout_s} s.") from error
    except DeadKernelError as error:
        raise RuntimeError(f"{where.format(begun)}: the kernel died; is there enough memory?") from error
    for number, cell in enumerate(code, start=1):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                raise RuntimeError(f"{where.format(number)} wrote to stderr:\n{output.text[-2000:]}")
    _tidy(nb)
    _write_text(nbformat.writes(nb) + "\n", Path(out) if out is not None else path)
    return nb


def _tidy(nb: NotebookNode) -> None:
    """Fixed cell ids, only the metadata that says something, and the fingerprint."""
    for number, cell in enumerate(nb.cells, start=1):
        cell.id = f"cell-{number:02d}"
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in ("tags", "alt") and v})
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "fedkd": {"fingerprint": fingerprint(nb)},
        }
    )
    nbformat.validate(nb)


class _Progress:
    """Notebook i of n, cell k of m, seconds: a live line on a terminal, one line a notebook elsewhere."""

    def __init__(self, count: int) -> None:
        self.count, self.index, self.name = count, 0, ""
        self.cell, self.cells = 0, 0
        self.live = sys.stdout.isatty()
        self.began = time.monotonic()

    def __call__(self, cell: int, cells: int) -> None:
        self.cell, self.cells = cell, cells

    def _head(self, seconds: float) -> str:
        place = f"notebook {self.index} of {self.count}  {self.name:24s} cell {self.cell:2d} of {self.cells:2d}"
        return f"{place}  {seconds:4.0f} s"

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        self.index, self.name, self.cell, self.cells = self.index + 1, name, 0, 0
        began, done = time.monotonic(), threading.Event()

        def tick() -> None:
            while not done.wait(0.5):
                whole = time.monotonic() - self.began
                print(f"\r{self._head(time.monotonic() - began)}  (all {whole:.0f} s)", end="", flush=True)

        ticker = threading.Thread(target=tick, daemon=True)
        if self.live:
            ticker.start()
        try:
            return work()
        finally:
            done.set()
            if self.live:
                ticker.join()
            whole = time.monotonic() - self.began
            start = "\r" if self.live else ""
            print(f"{start}{self._head(time.monotonic() - began)}  (all {whole:.0f} s)", flush=True)


def run_course(folder: Path | str = NOTEBOOKS, out: Path | str = COURSE) -> Path:
    """Execute copies of the notebooks in order, write them as HTML under `out`, return the first page."""
    folder, out = Path(folder), Path(out)
    paths = notebooks_in(folder)
    progress = _Progress(len(paths))
    copies = []
    for path in paths:
        copy = out / "notebooks" / path.name

        def work(path: Path = path, copy: Path = copy) -> NotebookNode:
            return execute_notebook(path, copy, progress, folder=folder)

        progress.run(path.stem, work)
        copies.append(copy)
    return build_site(copies, out, folder)


def stamp_all(folder: Path | str = NOTEBOOKS, names: Sequence[str] = ()) -> list[Path]:
    """Execute the committed notebooks in place (those whose name begins as one of `names`), print what is amiss."""
    paths = [p for p in notebooks_in(folder) if not names or p.name.startswith(tuple(names))]
    if not paths:
        raise ValueError(f"no notebook in {folder} begins with {', '.join(names)}")
    progress = _Progress(len(paths))
    for path in paths:

        def work(path: Path = path) -> NotebookNode:
            return execute_notebook(path, on_cell=progress)

        for problem in problems(progress.run(path.stem, work)):
            print(f"  {path.name}: {problem}")
    return paths


# -------------------------------------------------------------------------------------------------------------- HTML
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
    def block_math(self, body: str) -> str:
        return mathml(body, display=True)

    def multiline_math(self, text: str) -> str:
        return mathml(text, display=True)

    def inline_math(self, body: str) -> str:
        return mathml(body, display=False)

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", display=True)


class _Exporter(HTMLExporter):
    """Only the cells, no scripts; equations as MathML."""

    @jinja2.pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        cell, resources = context.get("cell", {}), context.get("resources", {})
        renderer = _Renderer(
            escape=False,
            attachments=cell.get("attachments", {}),
            embed_images=self.embed_images,
            path=resources.get("metadata", {}).get("path", ""),
            anchor_link_text="",
            exclude_anchor_links=True,
        )
        return MarkdownWithMath(renderer=renderer).render(source)


_STYLE = """
:root { color-scheme: light; }
body { font: 17px/1.6 system-ui, sans-serif; color: #1c2430; background: #fff; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem 1.2rem 4rem; }
nav { background: #12324a; color: #fff; padding: .6rem 1.2rem; display: flex; gap: 1.2rem; flex-wrap: wrap; }
nav a { color: #fff; } nav .next { margin-left: auto; }
h1, h2, h3 { line-height: 1.25; margin-top: 1.6em; } a { color: #0b5d8f; }
pre { margin: 0; padding: .6rem .8rem; overflow-x: auto; font: 13px/1.45 ui-monospace, Consolas, monospace; }
code { font-family: ui-monospace, Consolas, monospace; font-size: .9em; background: #eef2f6; padding: 0 .2em; }
pre code { background: none; padding: 0; font-size: inherit; }
.highlight, .rendered_html pre, .text_cell pre { background: #f4f6f9; border-left: 4px solid #6d8bab; }
.code_cell { margin: .8rem 0; } .prompt { display: none; } .output_area { margin: .3rem 0; }
.output_area pre { background: #fff; border-left: 4px solid #d9dfe6; } .output_error pre { border-color: #b3261e; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d9dfe6; text-align: right; } th { background: #f4f6f9; }
details { border: 1px solid #d9dfe6; padding: .4rem .8rem; margin: .6rem 0; } summary { cursor: pointer; }
math[display=block] { margin: 1rem 0; overflow-x: auto; }
blockquote { border-left: 4px solid #d9dfe6; margin-left: 0; padding-left: 1rem; }
"""


def _title(nb: NotebookNode, fallback: str) -> str:
    match = re.match(r"# +(.+)", nb.cells[0].source) if nb.cells else None
    return match[1].strip() if match else fallback


def _minutes(nb: NotebookNode) -> str:
    match = MINUTES.search(nb.cells[0].source) if nb.cells else None
    return match[0] if match else ""


def _page(title: str, body: str, bar: str) -> str:
    style = _STYLE + HtmlFormatter(style="default").get_style_defs(".highlight")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n{bar}\n<main>\n{body}\n</main>\n{bar}\n</body>\n</html>\n"
    )


def _link_home(markup: str, source: Path, out: Path, names: set[str]) -> str:
    """Links between notebooks become links between pages; links to project files hold from the new place."""

    def replace(match: re.Match[str]) -> str:
        target, hash_, anchor = html.unescape(match[1]).partition("#")
        if re.match(r"[a-z]+:|//", target) or not target:
            return match[0]
        name = Path(target)
        if name.suffix == ".ipynb" and name.stem in names:
            target = f"{name.stem}.html"
        else:
            target = Path(os.path.relpath(source / target, out)).as_posix()
        return f'href="{html.escape(target + hash_ + anchor)}"'

    return re.sub(r'href="([^"]*)"', replace, markup)


class _Outside(HTMLParser):
    """Collects what a page would fetch from the network, and pictures without words."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("src", "srcset", "data", "poster", *(("href",) if tag != "a" else ())):
            if re.match(r"\s*(https?:)?//", values.get(name) or ""):
                self.found.append(f"<{tag} {name}={values[name]}>")
        if tag == "script":
            self.found.append("<script>")
        if tag == "img" and (values.get("alt") or "").strip() in (
            "",
            "No description has been provided for this image",
        ):
            self.found.append("<img> without alt text")


def outside(page: str) -> list[str]:
    """What would not work without a network, or for a reader who cannot see pictures."""
    parser = _Outside()
    parser.feed(page)
    return parser.found + re.findall(r"@import\s+[^;]+|url\(\s*['\"]?(?:https?:)?//[^)]*\)", page)


def build_site(notebooks: Sequence[Path | str], out: Path | str, source: Path | str | None = None) -> Path:
    """One page a notebook and an index under `out`; links in the notebooks are meant from `source` (their folder)."""
    paths, out = [Path(p) for p in notebooks], Path(out)
    loaded = [read(path) for path in paths]
    titles = [_title(nb, path.stem) for nb, path in zip(loaded, paths, strict=True)]
    pages = [f"{path.stem}.html" for path in paths]
    for i, (nb, path) in enumerate(zip(loaded, paths, strict=True)):
        folder = Path(source) if source is not None else path.parent
        for cell in code_cells(nb):
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET_VIEW, None)
                if "image/png" in output.get("data", {}):
                    output.metadata.setdefault("image/png", NotebookNode())["alt"] = alt_text(output)
        nb.metadata.pop("widgets", None)
        exporter = _Exporter(template_name="basic", embed_images=True)
        try:
            body, _ = exporter.from_notebook_node(nb, {"metadata": {"name": path.stem, "path": str(folder)}})
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        body = _link_home(body, folder, out, {p.stem for p in paths})
        links = ['<a href="index.html">Contents</a>']
        if i > 0:
            links.append(f'<a rel="prev" href="{pages[i - 1]}">← {html.escape(titles[i - 1])}</a>')
        if i + 1 < len(pages):
            links.append(f'<a rel="next" class="next" href="{pages[i + 1]}">{html.escape(titles[i + 1])} →</a>')
        page = _page(titles[i], body, f'<nav aria-label="Course">{" ".join(links)}</nav>')
        if found := outside(page):
            raise ValueError(f"{path.name}: the page is not complete offline: {'; '.join(found[:5])}")
        _write_text(page, out / pages[i])
    items = "\n".join(
        f'<li><a href="{page}">{html.escape(title)}</a> {_minutes(nb)}</li>'
        for page, title, nb in zip(pages, titles, loaded, strict=True)
    )
    heading = "Federated few-shot segmentation of the knee"
    bar = '<nav aria-label="Course"><a href="index.html">Contents</a></nav>'
    index = out / "index.html"
    body = f"<h1>{heading}</h1>\n<p>The course, executed on this machine.</p>\n<ul>\n{items}\n</ul>"
    _write_text(_page(heading, body, bar), index)
    return index
