"""Where the notebooks of the course are, and how they are read and written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOKS = PROJECT / "notebooks"
#: Where the HTML copy goes.
COURSE = PROJECT / "build" / "course"


def read(path: Path | str) -> NotebookNode:
    """The notebook at `path`; an error names the file."""
    try:
        return nbformat.read(str(path), as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise ValueError(f"{path} is not a notebook: {error}. Restore it, for example with git checkout.") from error


def write(nb: NotebookNode, path: Path) -> None:
    """Write a notebook, completely or not at all."""
    write_text(nbformat.writes(nb) + "\n", path)


def write_text(text: str, path: Path) -> None:
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
