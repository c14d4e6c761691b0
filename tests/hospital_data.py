"""Three hospitals with knees made of boxes, on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tiny import blobs

from fedkd_utils.acquisition import SCANNERS
from fedkd_utils.prepare import Entry, write_site

NAMES = ("east", "north", "south")
SPLITS = ("training", "unlabelled", "unlabelled", "validation", "test")


def write_hospitals(folder: Path, names: tuple[str, ...] = NAMES) -> dict[str, Path]:
    """A site for each name, of different sizes; the folders by name."""
    for number, name in enumerate(names):
        write_site(folder / name, "boxes", _volumes(name, 100 * (number + 1), ("training",) * number + SPLITS))
    return {name: folder / name for name in names}


def _volumes(name: str, first: int, splits: tuple[str, ...]) -> Iterator[Entry]:
    for number, split in enumerate(splits):
        scan = blobs(first + number, SCANNERS["pd_fs"], 1)
        label = None if split == "unlabelled" else np.asarray(scan.label)
        person = f"{name} {number}"
        yield Entry(f"{name}_{number}", split, person, np.asarray(scan.image), label, scan.affine, (1, 2, 3))
