"""The rules of the course's notebooks, as code: what :func:`problems` finds in an executed notebook breaks one."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

PACKAGE = Path(__file__).resolve().parent
#: The course, in order.
NAMES = (
    "00_start_here",
    "01_knee_volumes",
    "02_teacher",
    "03_few_labels",
    "04_federated_averaging",
    "05_distillation",
    "06_dual_distillation",
    "07_baselines_and_ablations",
    "08_communication_and_privacy",
    "09_claims_and_cards",
    "10_your_own_data",
    "11_real_hospitals",
    "12_final_project",
)
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

MAX_CODE_LINES = 25
MAX_OUTPUT_LINES = 40
MAX_BYTES = 1_000_000
MAX_IGNORED = 2
MIN_WORDS = 4  # of a picture's description
FIRST_WORDS = ("Why", "You will learn", "Prerequisites", "Paper")
MINUTES = re.compile(r"(\d+(?: ?(?:-|to|–) ?\d+)?)\s+minutes?\b")
LAST_WORDS = ("Recap", "Go further", "References")
_ABSOLUTE = re.compile(
    r"(?:(?<![\w.:/)}\]~$-])|file:/*)/(?:home|root|work|tmp|Users|mnt|media|opt|private|srv|var|content|Volumes|workspace)(?=/|\b)|\b[A-Za-z]:(?:\\(?!n)|/Users)"
)
#: What breaks strict validation, a public code host, or the promise of no network and no GPU; and why.
_FORBIDDEN = {
    r"\binteract(?:ive|_manual)?\(": "interact stores nothing to see: use viewer.show_volume",
    r"\bOutput\(": "an Output widget is empty when reopened",
    r"\bclear_output\b": "clear_output makes the stored output depend on time",
    r"\bdisplay_id\b|\bupdate_display\b": "a display handle is updated after the fact",
    r"\bplt\.show\(|\bplt\.gcf\(|%matplotlib": "figures are shown by figures.show, with alt text",
    r"^\s*[!%]": "a line magic or shell command",
    r"\.cuda\(|['\"]cuda": "the course needs no GPU",
    r"\b(?:urlopen|urlretrieve|requests|socket)\b|['\"]https?://": "the course needs no network",
    r"\bget_ipython\b": "a magic line or shell command in another dress",
}
_CLOCK = re.compile(r"\bperf_counter\b|\bmonotonic\b|\btime\.time\(|\bdatetime\.now\(|%%?time")
#: Text that names an object instead of saying something; an address in it changes every run.
_BARE = re.compile(r"<matplotlib\.|<Axes|<Figure size|^\[?(?:Text|Line2D)\(|\b0x[0-9a-f]{6,}\b", re.M)
_STYLED = re.compile(r"<style.*#T_", re.S)  # pandas' Styler, whose ids change every run
#: `python -m fedkd_utils` in a shell line, or in the list of a subprocess.
_COMMAND_LINE = re.compile(r"-m\W+fedkd_utils\b")
_FIGURE = re.compile(r"^<Figure size .*>$")


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook, in order."""
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def _tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _tree(source: str) -> ast.AST:
    """Python source, without the magic lines of a notebook."""
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()))


@functools.cache
def _imported(source: str) -> frozenset[str]:
    """The modules of the package, without its name, that code imports at its top or inside a function."""
    names = set[str]()
    for node in ast.walk(_tree(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name.removeprefix("fedkd_utils.") for name in names if name.startswith("fedkd_utils."))


#: What a code cell says that reads data of the project, and their folder in ``data``.
_DATA = {
    r"results_folder\(PROJECT, REFERENCE\)": "results/reference",
    r"results_folder\(PROJECT, QUICK\)": "results/quick",
    r"engine_recorded": "results/engine",
    r"\bDEMO\b|data/demo": "demo",
}


def files_behind(nb: NotebookNode, package: Path = PACKAGE) -> list[Path]:
    """The files that can change an output of the notebook.

    These are the modules of the package that its code imports or calls from the command line, those that these import,
    and so on, the scripts and styles that one of them names, and the files in ``data`` that its code reads.
    """
    sources = {path.stem: path.read_text(encoding="utf-8") for path in package.glob("*.py")}
    found, todo = set[str](), {"__init__"}
    for cell in code_cells(nb):
        todo |= {"__main__"} if _COMMAND_LINE.search(cell.source) else set()
        try:
            todo |= _imported(cell.source)
        except SyntaxError:
            pass  # problems() says so
    while todo := (todo - found) & sources.keys():
        found |= todo
        todo = set().union(*(_imported(sources[module]) for module in todo))
    code = "\n".join(cell.source for cell in code_cells(nb))
    folders = [package.parent / "data" / folder for words, folder in _DATA.items() if re.search(words, code)]
    data = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    pages = (path for path in package.iterdir() if path.suffix in (".js", ".css"))
    named = [path for path in pages if any(f'"{path.name}"' in sources[module] for module in found)]
    return sorted([*(package / f"{module}.py" for module in found), *named, *data])


def fingerprint(nb: NotebookNode, package: Path = PACKAGE) -> str:
    """SHA-256 of the code cells and the files behind them: another value means that the stored outputs are stale."""
    digest = hashlib.sha256()
    for cell in code_cells(nb):
        digest.update(cell.source.encode() + b"\0")
    for path in files_behind(nb, package):
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def outputs_hash(nb: NotebookNode) -> str:
    """SHA-256 of all stored outputs, pictures too, which nbval does not compare: another value, another hand."""
    return hashlib.sha256(json.dumps([cell.outputs for cell in code_cells(nb)], sort_keys=True).encode()).hexdigest()


def stamp(nb: NotebookNode) -> dict[str, str]:
    """What a clean run leaves in the metadata of a notebook."""
    return {"fingerprint": fingerprint(nb), "outputs": outputs_hash(nb)}


def alt_text(output: NotebookNode) -> str:
    """What a picture shows, in words: the output's metadata or its text twin (not matplotlib's `<Figure ...>`)."""
    metadata = output.get("metadata", {})
    words = metadata.get("image/png", {}).get("alt") or metadata.get("alt") or twin(output)
    return str(words).strip()


def twin(output: NotebookNode) -> str:
    """The sentence beside a picture; empty where matplotlib wrote `<Figure ...>`."""
    text = "".join(output.get("data", {}).get("text/plain", "")).strip().strip("'\"")
    return "" if _FIGURE.match(text) else text


def texts(output: NotebookNode) -> Iterator[tuple[str, str]]:
    """The (kind, text) parts of an output that a reader sees as text."""
    if output.output_type == "stream":
        yield "stream", output.text
    elif output.output_type == "error":
        yield "error", re.sub(r"\x1b\[[0-9;]*m", "", "\n".join([*output.traceback, output.evalue]))
    else:
        for kind, data in output.data.items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield kind, "".join(data)
        yield "alt text", alt_text(output) if "image/png" in output.data else ""


def problems(nb: NotebookNode) -> list[str]:
    """What breaks a rule of the course in an executed notebook; an empty list when nothing does."""
    return [*_problems_of_form(nb), *_problems_of_code(nb), *_problems_of_outputs(nb)]


def _problems_of_form(nb: NotebookNode) -> Iterator[str]:
    if not nb.cells:
        yield "no cells"
        return
    first, last = nb.cells[0], nb.cells[-1]
    if first.cell_type != "markdown" or not re.match(r"# \S", first.source):
        yield "the first cell has no title (a markdown cell beginning with '# ')"
    for word in FIRST_WORDS:
        if word not in first.source:
            yield f"the first cell lacks {word!r}"
    if not MINUTES.search(first.source):
        yield "the first cell does not say how many minutes the notebook takes"
    for word in LAST_WORDS:
        if last.cell_type != "markdown" or not re.search(rf"^## {word}\s*$", last.source, re.M):
            yield f"the last cell lacks {word!r}"
    if last.cell_type == "markdown" and not re.search(r"^## References\s+- [\s\S]*\]\(http", last.source, re.M):
        yield "the last cell names no reference with its address"
    if "widgets" in nb.metadata:
        yield "widget state is stored"
    if (size := len(nbformat.writes(nb).encode())) >= MAX_BYTES:
        yield f"{size} bytes, allowed are fewer than {MAX_BYTES}"
    if nb.metadata.get("fedkd", {}).get("fingerprint") != fingerprint(nb):
        yield "stale: the fingerprint does not match the code or the data; run make notebooks"
    elif nb.metadata.get("fedkd", {}).get("outputs") != outputs_hash(nb):
        yield "the outputs are not those of the run that was stamped; run make notebooks"
    counts = [cell.execution_count for cell in code_cells(nb)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts {counts} are not 1 to {len(counts)}: not one clean run"


def _problems_of_code(nb: NotebookNode) -> Iterator[str]:
    ignored = 0
    for position, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        where = f"cell {position + 1}"
        first = cell is code_cells(nb)[0]
        if (lines := len(cell.source.splitlines())) > MAX_CODE_LINES:
            yield f"{where}: {lines} lines of code, allowed are {MAX_CODE_LINES}"
        before = nb.cells[position - 1] if position else None
        if before is None or before.cell_type != "markdown" or not before.source.strip():
            yield f"{where}: no markdown cell before it"
        nodes: list[ast.AST] = []
        try:
            nodes = list(ast.walk(_tree(cell.source)))
        except SyntaxError as error:
            yield f"{where}: not Python: {error.msg}"
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes) and not first:
            yield f"{where}: imports outside the first code cell"
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            if _draws_without_a_name(call):
                yield f"{where}: {ast.unparse(call.func)} is not used so: every draw names its generator or seed"
        if match := _ABSOLUTE.search(cell.source):
            yield f"{where}: absolute path {match[0]} in the code"
        for pattern, why in _FORBIDDEN.items():
            if match := re.search(pattern, cell.source, re.M):
                yield f"{where}: {match[0].strip()} is not used in this course: {why}"
        tags = _tags(cell)
        if _CLOCK.search(cell.source) and "nbval-ignore-output" not in tags:
            yield f"{where}: reads a clock, but nbval compares its output"
        if "nbval-skip" in tags:
            yield f"{where}: nbval-skip"
        if "nbval-ignore-output" in tags:
            ignored += 1
            if not any(isinstance(node, ast.Assert) for node in nodes):
                yield f"{where}: nbval-ignore-output without an assert"
        if re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", cell.source):
            yield f"{where}: a comment steers nbval; use tags"
    if ignored > MAX_IGNORED:
        yield f"nbval-ignore-output on {ignored} cells, allowed are {MAX_IGNORED}"


#: Draws of PyTorch, which take a generator.
_TORCH_DRAWS = re.compile(r"torch\.(?:(?:rand|randn|randint)(?:_like)?|randperm|normal|bernoulli|multinomial)")
#: What sets or uses a global generator.
_GLOBAL = re.compile(r"torch\.(?:manual_seed|seed)|(?:np|numpy)\.random\.[a-z]\w*|random\.[a-z]\w*")


def _draws_without_a_name(call: ast.Call) -> bool:
    """Whether a call draws from, or seeds, a generator that everybody shares, or one without a seed."""
    name = ast.unparse(call.func)
    if name.endswith("default_rng"):
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        return not given or (isinstance(given[0], ast.Constant) and given[0].value is None)
    if _TORCH_DRAWS.fullmatch(name):
        return all(keyword.arg != "generator" for keyword in call.keywords)
    return _GLOBAL.fullmatch(name) is not None


def _problems_of_outputs(nb: NotebookNode) -> Iterator[str]:
    for position, cell in enumerate(nb.cells):
        where, outputs = f"cell {position + 1}", cell.get("outputs", [])
        if "raises-exception" in _tags(cell) and not any(output.output_type == "error" for output in outputs):
            yield f"{where}: the tag raises-exception without an error"
        for output in outputs:
            if output.output_type == "stream" and output.name == "stderr":
                yield f"{where}: output on stderr"
            if output.output_type == "error" and "raises-exception" not in _tags(cell):
                yield f"{where}: an error without the tag raises-exception"
            data = output.get("data", {})
            if "image/png" in data and not alt_text(output):
                yield f"{where}: a picture without alt text"
            elif "image/png" in data and len(alt_text(output).split()) < MIN_WORDS:
                yield f"{where}: a picture with fewer than {MIN_WORDS} words"
            elif "image/png" in data and alt_text(output) != twin(output):
                yield f"{where}: the alt text is not the sentence that nbval compares"
            if WIDGET_VIEW in data and not {"image/png", "text/plain"} & data.keys():
                yield f"{where}: a widget without a picture or a sentence beside it"
            if "image/svg+xml" in data or _STYLED.search("".join(data.get("text/html", ""))):
                yield f"{where}: SVG or a styled table, which nbval cannot compare"
            for kind, text in texts(output):
                if match := _ABSOLUTE.search(text):
                    yield f"{where}: absolute path {match[0]} in the output"
                speaks = kind == "stream" or (kind == "text/plain" and "image/png" not in data)
                if speaks and (match := _BARE.search(text)):
                    yield f"{where}: a bare object in the output, {match[0]!r}: show it, or write _ = ..."
                if kind in ("stream", "text/plain", "error") and (n := len(text.splitlines())) > MAX_OUTPUT_LINES:
                    yield f"{where}: {n} lines of output, allowed are {MAX_OUTPUT_LINES}"
