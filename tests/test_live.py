"""The live curve: it reads what training says, draws seldom enough, and leaves sentences without digits."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from fedkd_utils import live, networks, training
from fedkd_utils.settings import QUICK


def test_it_reads_the_loss_that_training_tells():
    curve = live.Curve(2, "Teacher")
    network = networks.build_network(QUICK, 0)
    images, labels = torch.randn(2, 1, 16, 32, 32), torch.zeros(2, 16, 32, 32, dtype=torch.int64)
    labels[:, 4:8, 8:16, 8:16] = 1
    log = training.train_supervised(
        network, images, labels, steps=2, batch=2, learning_rate=1e-3, weight_decay=0.0, seed=0, progress=curve.add
    )
    assert [step for step, _ in curve.losses] == [1, 2]
    assert np.allclose([loss for _, loss in curve.losses], log.frame()["loss"], atol=6e-4)


def test_other_notes_only_count():
    curve = live.Curve(10, "x")
    assert curve.add(3, "teacher read from the cache") is None and curve.done == 3 and not curve.losses


def test_drawing_takes_a_small_share_of_the_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
    curve, drawn = live.Curve(1000, "x"), 0

    def png(self):
        now[0] += 0.2
        return b"picture"

    monkeypatch.setattr(live.Curve, "png", png)
    for _ in range(1000):
        now[0] += 0.05
        drawn += curve.add(1, "x, loss 0.5") is not None
    assert 0.2 * drawn / (now[0] - 100) < 1.2 * live.SHARE and drawn >= 5


def test_a_picture_holds_every_loss():
    curve = live.Curve(100, "Teacher")
    for k in range(60):
        curve.add(1, f"teacher, loss {2 / (k + 1):.3f}")
    assert Image.open(io.BytesIO(curve.png())).width > 400


def test_in_a_notebook_the_stored_output_is_one_sentence_without_a_digit_of_the_training(monkeypatch):
    shown = []
    shell = types.SimpleNamespace(kernel=True)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell)
    monkeypatch.setattr("IPython.display.display", lambda bundle, **more: shown.append(bundle))
    with live.progress_bar(30, "Teacher") as advance:
        for _ in range(30):
            advance(1, "teacher, loss 0.731")
    assert [bundle["text/plain"] for bundle in shown] == ["Teacher: finished"]


def test_progress_is_silent_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    with live.progress_bar(3, "Teacher") as advance:
        for _ in range(3):
            advance(1, "loss 1.0")
    assert capfd.readouterr() == ("", "")


def test_progress_draws_a_line_on_a_terminal() -> None:
    import pty
    import termios

    program = (
        "from fedkd_utils.live import progress_bar\n"
        "with progress_bar(3, 'Teacher') as advance:\n"
        "    [advance(1, 'loss 1.0') for _ in range(3)]\n"
    )
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], stderr=terminal, stdout=subprocess.PIPE)
    os.close(terminal)
    shown = ""
    while "3/3" not in shown:
        try:
            shown += os.read(master, 10_000).decode()
        except OSError:  # Linux says so when the other end is closed and empty
            break
    os.close(master)
    assert done.returncode == 0 and done.stdout == b"" and "Teacher" in shown and "3/3" in shown


def test_progress_passes_strict_nbval_with_an_output_that_never_changes(tmp_path: Path) -> None:
    """A notebook whose committed output is the sentence alone is executed and compared; stderr must be empty."""
    source = (
        "from fedkd_utils.live import progress_bar\n"
        "with progress_bar(3, 'Teacher') as advance:\n"
        "    for step in range(3):\n"
        "        advance(1, f'loss {step}')"
    )
    cell = nbformat.v4.new_code_cell(source, execution_count=1)
    widget = {"model_id": "0123456789abcdef", "version_major": 2, "version_minor": 0}
    data = {"application/vnd.jupyter.widget-view+json": widget, "text/plain": "Teacher: finished"}
    cell.outputs = [nbformat.v4.new_output("display_data", data=data)]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, tmp_path / "bar.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    result = subprocess.run(
        [*command, "--nbval-cell-timeout=60", str(tmp_path / "bar.ipynb")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
