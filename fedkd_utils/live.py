"""A training curve that grows while a long cell runs, and leaves one sentence that never changes."""

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

from fedkd_utils import figures, training
from fedkd_utils.training import Progress

#: How ``training.fit`` tells its loss in the note of a step.
_LOSS = re.compile(r"\bloss (-?\d+(?:\.\d+)?)")
#: Drawing takes at most this share of the time.
SHARE = 0.05


@contextmanager
def training_curve(total: int, label: str) -> Iterator[Progress]:
    """A progress bar with the loss drawn below it, for a person in JupyterLab; elsewhere only the bar.

    Use it as :func:`training.progress_bar`. The stored output is two sentences without digits of the training.

    >>> with training_curve(600, "Teacher") as advance:
    ...     taught = teacher_for(QUICK, "paper_like", progress=advance)
    """
    with training.progress_bar(total, label) as advance:
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython is not None else None
        if shell is None or not hasattr(shell, "kernel"):
            yield advance
            return
        import ipywidgets
        from IPython.display import display

        layout = {"align_self": "flex-start", "width": "520px", "display": "none"}
        picture = ipywidgets.Image(format="png", layout=layout)
        box = ipywidgets.VBox([picture])
        view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
        plain = f"{label}: the loss is drawn here while it runs"
        display({"text/plain": plain, "application/vnd.jupyter.widget-view+json": view}, raw=True)
        curve = Curve(total, label)

        def show(drawn: bytes) -> None:
            picture.value, picture.layout.display = drawn, "block"

        def both(steps: int, note: str) -> None:
            advance(steps, note)
            if (drawn := curve.add(steps, note)) is not None:
                show(drawn)

        yield both
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
