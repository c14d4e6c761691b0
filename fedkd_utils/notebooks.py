"""Where the notebooks of the course are, and how they are read and written."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat import NotebookNode

from fedkd_utils.files import write_atomically
from fedkd_utils.settings import PROJECT

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
    write_atomically(path, (nbformat.writes(nb) + "\n").encode())


def notebooks_in(folder: Path | str) -> list[Path]:
    """The notebooks of the course in `folder`, in order."""
    paths = sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise ValueError(f"no notebook such as 00_start_here.ipynb in {folder}")
    return paths
