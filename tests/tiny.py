"""A federation small enough to train in a second, and knees made of boxes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedkd_utils.acquisition import T1, Scan, Scanner
from fedkd_utils.settings import QUICK

TINY = replace(
    QUICK,
    name="tiny",
    grid_shape=(4, 16, 16),
    channels=(4, 8),
    repository_training=3,
    repository_validation=1,
    repository_test=1,
    clients=2,
    client_labelled=1,
    client_unlabelled=2,
    client_validation=1,
    client_test=2,
    teacher_steps=6,
    teacher_passes=2,
    rounds=2,
    local_epochs=1,
    steps_per_epoch=3,
)


def blobs(subject: int, scanner: Scanner, scan_seed: int) -> Scan:
    """Three bright boxes at places that depend on the subject: a volume in a millisecond."""
    rng = np.random.default_rng([subject, scan_seed])
    label = np.zeros((4, 18, 18), np.uint8)
    for c in (1, 2, 3):
        row, column = 5 * (c - 1) + rng.integers(1, 3), rng.integers(1, 9)
        label[1:3, row : row + 4, column : column + 7] = c
    image = (100 * label + rng.normal(100, 20, label.shape)).astype(np.float32)
    return Scan(image, label, np.diag([4.0, 1.2, 1.2, 1.0]), "left", T1)
