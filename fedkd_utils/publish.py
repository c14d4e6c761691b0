"""Execute the notebooks, each in one clean run, stamp them, and hand them on to be written as pages."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from fedkd_utils import pages
from fedkd_utils.notebooks import COURSE, NOTEBOOKS, notebooks_in, read, write
from fedkd_utils.rules import code_cells, problems, stamp

#: Digits of a training depend on the number of threads: the Makefile and tests/conftest.py say the same.
KERNEL_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "JUPYTER_PREFER_ENV_PATH": "1"}

#: What another process executes from the start of a notebook on: it needs nothing that is trained in front later on. A
#: cohort that both need is made by whoever comes first.
BESIDE = {
    "00_start_here.ipynb": ("01_knee_volumes.ipynb",),
    "02_teacher.ipynb": ("10_your_own_data.ipynb", "08_communication_and_privacy.ipynb"),
    "03_few_labels.ipynb": (
        "12_final_project.ipynb",
        "07_baselines_and_ablations.ipynb",
        "09_claims_and_cards.ipynb",
        "11_real_hospitals.ipynb",
    ),
}


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

    def run() -> None:
        client: Any = NotebookClient(
            nb,
            kernel_name="python3",
            timeout=timeout_s,
            store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],
            record_timing=False,
            coalesce_streams=True,
            on_notebook_start=lambda notebook: _pass_on_niceness(client.km.provisioner.pid),
            on_cell_execute=starts,
            resources={"metadata": {"path": str(Path(folder) if folder else path.parent)}},
        )
        client.execute(env=environment)

    where = f"{path.name}, code cell {{}} of {len(code)}"
    try:
        try:
            run()
        except RuntimeError as error:
            if "died before replying" not in str(error):
                raise
            run()  # two kernels that start at once may have taken one port; no cell had begun
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
    write(nb, Path(out) if out is not None else path)
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
            "fedkd": stamp(nb),
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
    """Execute copies of the notebooks, write them as HTML under `out`, return the first page.

    In order, but for those of :data:`BESIDE`: another process executes them meanwhile, on what time the cores have
    left, so that those in front lose little. They are reported last.
    """
    folder, out = Path(folder), Path(out)
    paths = notebooks_in(folder)
    copies = {path.name: out / "notebooks" / path.name for path in paths}
    progress = _Progress(len(paths))
    begun: dict[str, Future[NotebookNode]] = {}
    others = set(multiprocessing.active_children())
    waited = {name for front in copies.keys() & BESIDE.keys() for name in BESIDE[front]}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_give_way) as pool:
        try:
            for path in sorted(paths, key=lambda path: path.name in waited):
                for name in BESIDE.get(path.name, ()):
                    if name in copies:
                        begun[name] = pool.submit(execute_notebook, folder / name, copies[name], folder=folder)

                def work(path: Path = path) -> NotebookNode:
                    if path.name in begun:
                        try:
                            done = begun[path.name].result()
                        except BrokenProcessPool as error:
                            raise RuntimeError(f"{path.name}: its process died; is there enough memory?") from error
                        progress(len(code_cells(done)), len(code_cells(done)))
                        return done
                    return execute_notebook(path, copies[path.name], progress, folder=folder)

                progress.run(path.stem, work)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # the notebook beside the one that failed; its kernel follows
            raise
    return pages.build(list(copies.values()), out, folder, "Every notebook was executed on this machine just before.")


def _give_way() -> None:
    """Let processes in front have the cores first, where the system knows such an order."""
    if hasattr(os, "nice"):
        os.nice(10)


def _pass_on_niceness(kernel: int) -> None:
    """Give the session of a kernel the niceness of this process: Linux weighs sessions before it weighs processes."""
    if hasattr(os, "nice") and os.nice(0) > 0:
        with contextlib.suppress(OSError):  # not Linux, or not allowed
            Path(f"/proc/{kernel}/autogroup").write_text(str(os.nice(0)), encoding="ascii")


def stamp_all(folder: Path | str = NOTEBOOKS, names: Sequence[str] = ()) -> list[Path]:
    """Execute the committed notebooks in place (those whose name begins as one of `names`).

    Raises:
        ValueError: no such notebook; or, when all were executed, what breaks a rule of the course.
    """
    paths = [p for p in notebooks_in(folder) if not names or p.name.startswith(tuple(names))]
    if not paths:
        raise ValueError(f"no notebook in {folder} begins with {', '.join(names)}")
    progress, found = _Progress(len(paths)), list[str]()
    for path in paths:

        def work(path: Path = path) -> NotebookNode:
            return execute_notebook(path, on_cell=progress)

        found += [f"{path.name}: {problem}" for problem in problems(progress.run(path.stem, work))]
    if found:
        raise ValueError("executed and written, but against the rules of the course:\n  " + "\n  ".join(found))
    return paths
