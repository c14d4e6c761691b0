"""Digits that must not move: committed results are worth as much as the code that would give them again.

Every row is run on knees made of boxes, and every scanner scans one knee. When a digit moves on purpose, raise
``provenance.NUMBERS``, which marks all committed results as old, and write the new digits with
``python tests/test_golden.py``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TINY, blobs

from fedkd_utils import acquisition, cohorts, experiments
from fedkd_utils.acquisition import SCANNERS
from fedkd_utils.methods import ROWS
from fedkd_utils.provenance import NUMBERS

FILE = Path(__file__).parent / "golden.json"

#: Another processor rounds otherwise, and training makes more of it; another draw or another formula moves far more.
#: A Dice jumps when a voxel changes sides.
RELATIVE, DICE = 5e-4, 0.02

_DICE = ("validation", "femoral", "tibial", "patellar")
_NOT_COMPARED = ("seconds", "data_seconds", "cpu_seconds", "teacher_cpu_seconds", "round", "client")


def digits_of_row(row: str, root: Path) -> dict[str, float]:
    """The means over rounds and clients of all that a run logs."""
    result = experiments.run_row(row, "heterogeneous", 3, TINY, root, show_progress=False, keep=False)
    history = result.history_frame()
    logged = history[[name for name in history if name not in _NOT_COMPARED]].mean()
    bytes_ = {"bytes_down": result.bytes_down, "bytes_up": result.bytes_up, "steps": result.steps}
    return {name: float(f"{value:.6g}") for name, value in {**logged, **bytes_}.items()}


def digits_of_scanner(name: str) -> dict[str, float]:
    """What is left of a scan in a few numbers that depend on every voxel."""
    scan = acquisition.scan(7, SCANNERS[name], 1)
    image, where = scan.image.astype(np.float64), np.indices(scan.image.shape)
    centre = {f"centre {axis}": (w * image).sum() / image.sum() for axis, w in enumerate(where)}
    counts = {f"voxels {c}": (scan.label == c).sum() for c in (1, 2, 3)}
    moments = {"mean": image.mean(), "deviation": image.std()}
    return {name: float(f"{value:.6g}") for name, value in {**moments, **centre, **counts}.items()}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(FILE.read_bytes())
    assert facts["numbers"] == NUMBERS, "NUMBERS was changed: write the digits with `python tests/test_golden.py`"
    return facts


def check(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    moved = {
        name: (expected[name], value)
        for name, value in found.items()
        if not np.isclose(value, expected[name], rtol=RELATIVE, atol=DICE if name in _DICE else 1e-6)
    }
    assert not moved, f"(before, now): {moved}"


@pytest.mark.parametrize("row", list(ROWS))
def test_a_row_gives_the_digits_it_gave(row: str, cache: Path, golden: dict[str, Any]) -> None:
    check(digits_of_row(row, cache), golden["rows"][row])


@pytest.mark.parametrize("scanner", list(SCANNERS))
def test_a_scanner_gives_the_digits_it_gave(scanner: str, golden: dict[str, Any]) -> None:
    check(digits_of_scanner(scanner), golden["scanners"][scanner])


def test_nothing_is_golden_that_is_gone(golden: dict[str, Any]) -> None:
    assert golden["rows"].keys() == ROWS.keys() and golden["scanners"].keys() == SCANNERS.keys()


def test_a_digit_that_moves_is_found(golden: dict[str, Any]) -> None:
    row = golden["rows"]["dual_kd"]
    with pytest.raises(AssertionError, match="loss"):
        check({**row, "loss": row["loss"] * 1.002}, row)


def _write(root: Path) -> None:
    for name in ("make_cohort", "make_repository"):
        setattr(cohorts, name, functools.partial(getattr(cohorts, name), workers=1, scan=blobs))
    facts = {
        "numbers": NUMBERS,
        "rows": {row: digits_of_row(row, root) for row in ROWS},
        "scanners": {name: digits_of_scanner(name) for name in SCANNERS},
    }
    FILE.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
