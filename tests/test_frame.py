"""The project's frame: pins that agree, files that exist, targets that are there, no path of a build machine."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from fedkd_utils import notebooks, rules
from fedkd_utils.__main__ import _parser
from fedkd_utils.settings import QUICK, REFERENCE, SETTINGS_OF_CLIENTS

PROJECT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([A-Za-z0-9_.+!-]+)$")
# Spelled in two parts so that this file does not find itself.
BUILD_PATHS = tuple("/" + rest for rest in ("work/main", "work/shared", "root/", "tmp/bash_jobs"))

SUMMARIES = ("The course in one page", "コースの概要（日本語）")


def pins_of_pyproject(text: str) -> dict[str, str]:
    project = tomllib.loads(text)["project"]
    wanted = project["dependencies"] + [d for group in project["optional-dependencies"].values() for d in group]
    return _pins(wanted)


def pins_of_environment(text: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in text.split("- pip:", 1)[1].splitlines()]
    items = [line[1:].strip() for line in lines if line.startswith("-")]
    return _pins([item for item in items if item != "-e ."])


def _pins(requirements: list[str]) -> dict[str, str]:
    pins = {}
    for requirement in requirements:
        match = PIN.match(requirement)
        assert match, f"{requirement!r} is not pinned with =="
        pins[match[1].lower().replace("_", "-")] = match[2]
    return pins


def disagreements(pyproject: str, environment: str) -> list[str]:
    one, other = pins_of_pyproject(pyproject), pins_of_environment(environment)
    names = sorted(one.keys() | other.keys())
    return [f"{n}: {one.get(n)} and {other.get(n)}" for n in names if one.get(n) != other.get(n)]


def test_environment_and_pyproject_agree():
    assert not disagreements((PROJECT / "pyproject.toml").read_text(), (PROJECT / "environment.yml").read_text())


@pytest.mark.parametrize(
    ("find", "replace", "name"),
    [("torch==", "torch==9", "torch"), ("- tqdm==", "- other==", "tqdm"), ("- -e .", "- extra==1.0", "extra")],
)
def test_a_disagreement_is_found(find, replace, name):
    pyproject, environment = (PROJECT / "pyproject.toml").read_text(), (PROJECT / "environment.yml").read_text()
    assert find in environment
    found = disagreements(pyproject, environment.replace(find, replace, 1))
    assert any(line.startswith(name + ":") for line in found)


def test_an_unpinned_requirement_is_found():
    with pytest.raises(AssertionError, match="not pinned"):
        _pins(["torch>=2"])


@pytest.mark.parametrize(
    "name",
    ["README.md", "LICENSE", "CITATION.cff", "Makefile", "pyproject.toml", "environment.yml", ".gitignore", ".ci/run"]
    + [".github/workflows/ci.yml"],
)
def test_file_exists(name):
    assert (PROJECT / name).is_file()


def test_a_start_parses_no_grammar():
    """See the pin of jsonschema in pyproject.toml."""
    code = "import sys, fedkd_utils.experiments; print('monai' in sys.modules, 'rfc3987_syntax' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["True", "False"]


def test_ci_calls_make_test():
    ci = PROJECT / ".ci" / "run"
    assert ci.stat().st_mode & 0o100, ".ci/run is not executable"
    assert "set -euo pipefail" in ci.read_text() and re.search(r"^make test$", ci.read_text(), re.M)
    assert "make test" in (PROJECT / ".github" / "workflows" / "ci.yml").read_text()


def test_ci_brings_a_browser():
    for name in (".ci/run", ".github/workflows/ci.yml"):
        text = (PROJECT / name).read_text()
        assert re.search(r"apt-get install .*chromium", text) and text.index("chromium") < text.index("make test\n")


def test_makefile_has_the_targets():
    text = (PROJECT / "Makefile").read_text()
    for target in ("run", "test", "lab", "notebooks", "clean", "help"):
        assert re.search(rf"^{target}:", text, re.M), target
    shown = subprocess.run(["make", "help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert "make run" in shown and "make test" in shown


def test_make_says_which_python_is_missing(tmp_path):
    (tmp_path / "Makefile").write_text((PROJECT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").write_text("")
    done = subprocess.run(["make", "setup", "PYTHON="], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "No Python 3.11 or newer found" in done.stdout


def test_threads_are_the_same_in_makefile_and_tests():
    makefile = re.search(r"OMP_NUM_THREADS \?= (\d+)", (PROJECT / "Makefile").read_text())
    tests = re.search(r'"OMP_NUM_THREADS", "(\d+)"', (PROJECT / "tests" / "conftest.py").read_text())
    assert makefile and tests and makefile[1] == tests[1]


def course_map(text: str) -> list[tuple[str, str, str]]:
    """The rows of a map of the course: (file, question, minutes); glossary links are taken off the words."""
    words = re.sub(r"\[([^\]]*)\]\(glossary\.md[^)]*\)", r"\1", text)
    return re.findall(r"^\| \[[^\]]+\]\((?:notebooks/)?(\d\d_\w+\.ipynb)\) \| (.+?) \| (\d+) \|$", words, re.M)


def names_in_map(text: str) -> dict[str, str]:
    """What a map of the course calls a notebook, by its file."""
    return {file: name for name, file in re.findall(r"^\| \[([^\]]+)\]\((?:notebooks/)?([^)]+)\)", text, re.M)}


def test_the_maps_of_the_course_agree_with_each_other_and_with_the_notebooks():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    books = {f"{name}.ipynb": notebooks.read(notebooks.NOTEBOOKS / f"{name}.ipynb") for name in rules.NAMES}
    inside = "\n".join(c.source for c in books["00_start_here.ipynb"].cells if c.cell_type == "markdown")
    assert [row[0] for row in course_map(readme)] == list(books)
    assert course_map(inside) == course_map(readme)[1:]  # notebook 00 leaves itself out
    assert names_in_map(inside).items() <= names_in_map(readme).items()
    for file, _, minutes in course_map(readme):
        first = books[file].cells[0].source
        number, title = re.match(r"# (\d\d) · (.+)", first).groups()
        assert f"{number} {title}".lower().startswith(names_in_map(readme)[file]), file
        assert rules.MINUTES.search(first)[1] == minutes, file


#: What a name with a dot may end in without being a name of the package.
DATA = r"json|csv|html|png|safetensors|gz"


def code_in(text: str) -> list[str]:
    """What a guide shows as code: each line of a fence, without its comment, and each span."""
    fence = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.M | re.S)
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for part in fence.findall(text) for line in part.splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", fence.sub("", text))]
    return [*filter(None, lines), *spans]


def is_command(words: str) -> bool:
    """Whether the command line takes these words."""
    try:
        _parser().parse_args(shlex.split(words.partition("fedkd_utils")[2]))
    except SystemExit as error:
        return error.code == 0  # --help
    return True


def untrue(text: str) -> list[str]:
    """What a guide names that is not there: files, make targets, commands with their options, names of the package."""
    makefile, package = (PROJECT / "Makefile").read_text(), PROJECT / "fedkd_utils"
    found = []
    for words in code_in(text):
        if make := re.match(r"make ([a-z]+)(?!\S)", words):
            there = bool(re.search(rf"^{make[1]}:", makefile, re.M))
        elif re.match(r"(?:\S*/)?python -m fedkd_utils\b", words):
            there = is_command(words)
        elif script := re.match(r"python (\S+\.py)$", words):
            there = (PROJECT / script[1]).is_file()
        elif re.fullmatch(r"\w+\.(?:py|js|css)", words):
            there = (package / words).is_file()
        elif re.fullmatch(r"(?:tests|notebooks|data|fedkd_utils)/[\w./-]*|\w+\.(?:md|toml|yml|cff)", words):
            there = "NN_" in words or words.startswith("data/cache") or (PROJECT / words).exists()
        elif module := re.fullmatch(r"fedkd_utils\.(\w+)", words):
            there = (package / f"{module[1]}.py").is_file()
        elif (name := re.fullmatch(r"(\w+)\.(\w+)", words)) and not re.fullmatch(DATA, name[2]):
            there = (package / f"{name[1]}.py").is_file() and hasattr(
                importlib.import_module(f"fedkd_utils.{name[1]}"), name[2]
            )
        elif re.fullmatch(r"[A-Z]{4,}", words):
            there = any(f"\n{words}" in path.read_text() for path in package.glob("*.py"))
        else:
            continue
        if not there:
            found.append(words)
    return found


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "data/README.md", "docs/scaling.md"])
def test_a_guide_names_what_is_there(name):
    assert not untrue((PROJECT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", rules.NAMES)
def test_the_commands_and_files_in_a_notebook_are_there(name):
    cells = notebooks.read(notebooks.NOTEBOOKS / f"{name}.ipynb").cells
    spans = [words for cell in cells if cell.cell_type == "markdown" for words in code_in(cell.source)]
    assert not untrue("\n".join(f"`{words}`" for words in spans if re.search(r"^make |fedkd_utils|/", words)))


def test_the_guide_tells_how_to_add_each_thing():
    text = (PROJECT / "CONTRIBUTING.md").read_text()
    for needed in ("make notebooks", "## A notebook", "## An exercise", "## A row", "## A dataset"):
        assert needed in text
    assert f"at most {rules.MAX_CODE_LINES} lines" in " ".join(text.split())
    commands = [words for words in code_in(text) if re.search(r"fedkd_utils (?:tune|run|results|seconds)\b", words)]
    assert commands and all("--profile reference" in words for words in commands)


@pytest.mark.parametrize(
    "wrong",
    ["make gone", "python -m fedkd_utils gone", "python -m fedkd_utils pages --gone", "python tests/gone.py"]
    + ["python -m fedkd_utils run --profile gone", "python -m fedkd_utils segment", "make gone PIP_OPTIONS=x"]
    + ["tests/gone.py", "GONE.md", "gone.py", "fedkd_utils.gone", "gone.NAMES", "rules.gone", "GONE"],
)
def test_a_guide_that_names_what_is_not_there_is_found(wrong):
    assert untrue(f"See `make test`, `rules.problems`, then `{wrong}`.") == [wrong]
    assert untrue(f"```bash\nmake test  # first\n{wrong}  # then\nmake lab\n```\n\n`rules.py`") == [wrong]
    assert untrue(f"1. In a list:\n\n   ```bash\n   {wrong}\n   ```\n") == [wrong]


def test_the_readme_lists_every_file_of_the_package_once():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| `fedkd_utils/` | holds |") :].split("\n\n")[0]
    listed = Counter(re.findall(r"`(\w+\.(?:py|js|css))`", table))
    there = {path.name for path in (PROJECT / "fedkd_utils").iterdir() if path.suffix in (".py", ".js", ".css")}
    assert listed == Counter(there - {"__init__.py"})


def summaries() -> tuple[str, str]:
    """The one-page summary of the README, in English and in Japanese."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    one, other = (re.search(rf"^## {re.escape(head)}\n(.*?)^## ", text, re.M | re.S) for head in SUMMARIES)
    assert one and other
    return one[1], other[1]


def facts(text: str) -> Counter[str]:
    """Numbers, abbreviations and names that are written alike in both languages."""
    return Counter(re.findall(r"[0-9]+|(?<![A-Za-z])(?:[A-Z]{2,}[0-9]*|T[12]|Dice|NIfTI|PyTorch|mm)(?![A-Za-z])", text))


def test_the_summaries_say_the_same_numbers_and_names():
    english, japanese = summaries()
    assert facts(english) == facts(japanese)
    assert [len(re.findall(r"^\*\*.+?\*\*", text, re.M)) for text in (english, japanese)] == [7, 7]
    assert len(re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]", japanese)) > 800
    assert facts("4 knees, T1, HD95") != facts("5 knees, T1, HD95") != facts("5 knees, T2, HD95")


def test_the_numbers_of_the_summaries_are_those_of_the_course():
    wanted = [
        (rf"{QUICK.clients} hospitals", f"病院は{QUICK.clients}施設"),
        (f"{QUICK.client_labelled} labelled and {QUICK.client_unlabelled} unlabelled knees",)
        + (f"ラベル付き{QUICK.client_labelled}膝とラベルなし{QUICK.client_unlabelled}膝",),
        (f"{QUICK.repository_training} labelled knees", f"ラベル付き{QUICK.repository_training}膝"),
        (f"{REFERENCE.rounds} rounds", f"{REFERENCE.rounds}ラウンド"),
        (f"({QUICK.rounds} where notebooks 03 to 06 train)", f"（ノートブック03〜06の学習では{QUICK.rounds}ラウンド）"),
        (f"{len(SETTINGS_OF_CLIENTS)} settings", f"実験設定は{len(SETTINGS_OF_CLIENTS)}通り"),
        ("2 CPU cores", "CPU 2コア"),
    ]
    for text, words in zip(summaries(), zip(*wanted, strict=True), strict=True):
        flat = re.sub(r"\s+", " ", text)
        assert all(word in flat for word in words), [word for word in words if word not in flat]


def paths_of_a_machine(text: str) -> list[str]:
    return [path for path in BUILD_PATHS if path in text]


def test_no_tracked_file_holds_a_path_of_a_build_machine():
    assert paths_of_a_machine("see /" + "work/main/x")
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    found = {}
    for name in filter(None, listed.stdout.split("\0")):
        path = PROJECT / name
        if path.is_file() and path.suffix not in {".gz", ".png", ".safetensors"}:
            if hits := paths_of_a_machine(path.read_text(encoding="utf-8", errors="ignore")):
                found[name] = hits
    assert not found
