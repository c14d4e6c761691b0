"""The live curve: it reads what training says, draws seldom enough, and leaves sentences without digits."""

from __future__ import annotations

import io
import sys
import types

import numpy as np
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
    assert 0.2 * drawn / (now[0] - 100) < 0.06 and drawn > 5


def test_a_picture_holds_every_loss():
    curve = live.Curve(100, "Teacher")
    for k in range(60):
        curve.add(1, f"teacher, loss {2 / (k + 1):.3f}")
    assert Image.open(io.BytesIO(curve.png())).width > 400


def test_outside_a_notebook_there_is_only_the_bar():
    with live.training_curve(3, "x") as advance:
        advance(1, "x, loss 1.0")


def test_in_a_notebook_the_stored_output_holds_no_digit_of_the_training(monkeypatch):
    shown = []
    shell = types.SimpleNamespace(kernel=True)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell)
    monkeypatch.setattr("IPython.display.display", lambda bundle, **more: shown.append(bundle))
    with live.training_curve(30, "Teacher") as advance:
        for _ in range(30):
            advance(1, "teacher, loss 0.731")
    texts = [bundle["text/plain"] for bundle in shown]
    assert texts[1:] == ["Teacher: the loss is drawn here while it runs"] and "0.731" not in "".join(texts)
