"""Progress: a bar and a training curve that grow while a long cell runs, and leave one sentence that never changes."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from fedkd_utils import figures
from fedkd_utils.training import Progress

#: How ``training.fit`` tells its loss in the note of a step.
_LOSS = re.compile(r"\bloss (-?\d+(?:\.\d+)?)")
#: Drawing takes at most this share of the time.
SHARE = 0.02


@contextmanager
def progress_bar(total: int, label: str) -> Iterator[Progress]:
    """What a person sees while something long goes on, and nobody else: nothing in a pipe, a test or a log.

    In Jupyter a bar, and below it the loss as a curve once a training tells one; the stored output is one sentence
    that never changes, and nothing goes to stderr. On a terminal tqdm's line.

    >>> with progress_bar(10, "Teacher") as advance:
    ...     advance(1, "loss 1.20")
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and hasattr(shell, "kernel"):
        with _bar_and_curve(total, label) as advance:
            yield advance
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=label, dynamic_ncols=True, mininterval=0.2) as line:

            def tell(steps: int, note: str) -> None:
                line.set_postfix_str(note, refresh=False)
                line.update(steps)

            yield tell
    else:
        yield lambda steps, note: None


@contextmanager
def _bar_and_curve(total: int, label: str) -> Iterator[Progress]:
    import ipywidgets
    from IPython.display import display

    bar, text = ipywidgets.IntProgress(max=max(total, 1)), ipywidgets.Label(label)
    layout = {"align_self": "flex-start", "width": "520px", "display": "none"}
    picture = ipywidgets.Image(format="png", layout=layout)
    box = ipywidgets.VBox([ipywidgets.HBox([bar, text]), picture])
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    display({"text/plain": f"{label}: finished", "application/vnd.jupyter.widget-view+json": view}, raw=True)
    curve, start, shown = Curve(total, label), time.perf_counter(), 0.0

    def show(drawn: bytes | None) -> None:
        if drawn is not None:
            picture.value, picture.layout.display = drawn, "block"

    def advance(steps: int, note: str) -> None:
        nonlocal shown
        show(curve.add(steps, note))
        if time.perf_counter() - shown > 0.2 or curve.done >= total:
            shown = time.perf_counter()
            bar.value, text.value = curve.done, f"{label} {curve.done}/{total}, {shown - start:.0f} s  {note}"

    yield advance
    if curve.losses:
        show(curve.png())


class Curve:
    """The losses so far and when to draw them again."""

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label, self.done = total, label, 0
        self.losses: list[tuple[int, float]] = []
        self._next = 0.0

    def add(self, steps: int, note: str) -> bytes | None:
        """Count steps and the loss in a note; gives a new picture from time to time."""
        self.done += steps
        found = _LOSS.search(note)
        if found is None:
            return None
        self.losses.append((self.done, float(found[1])))
        start = time.perf_counter()
        if start < self._next:
            return None
        drawn = self.png()
        end = time.perf_counter()
        self._next = end + max((end - start) / SHARE, 1.0)
        return drawn

    def png(self) -> bytes:
        """Every loss as a dot, their running mean as a line."""
        steps, losses = np.array(self.losses).T
        width = max(len(losses) // 20, 1)
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        with rc_context(figures.STYLE):
            figure = Figure(figsize=(5.4, 2.6), layout="constrained")
            axis = figure.add_subplot()
            axis.plot(steps, losses, ".", color="#999999", markersize=3, label="one step")
            axis.plot(steps[width - 1 :], mean, "-", color="#0077BB", linewidth=2, label=f"mean of {width}")
            axis.set(xlabel="step", ylabel="loss", xlim=(0, max(self.total, self.done)), title=self.label)
            axis.legend(frameon=False, fontsize=8)
            out = io.BytesIO()
            figure.savefig(out, format="png")
        return out.getvalue()
