"""Digits that must not move: committed results are worth as much as the code that would give them again.

Every row, and what else the grids vary, is run on knees made of boxes, and every scanner scans one knee. When a digit
moves on purpose, raise
``provenance.NUMBERS``, which marks all committed results as old, and write the new digits with
``python tests/test_golden.py``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TINY, blobs

from fedkd_utils import acquisition, cohorts, experiments
from fedkd_utils.acquisition import SCANNERS
from fedkd_utils.compression import CODECS
from fedkd_utils.methods import ROWS
from fedkd_utils.provenance import NUMBERS
from fedkd_utils.teacher import FROZEN, RELEASE, TeacherUpdate

FILE = Path(__file__).parent / "golden.json"

#: Another processor rounds otherwise, and training makes more of it; another draw or another formula moves far more.
RELATIVE = 5e-4
#: A voxel that changes sides makes these jump.
JUMPS = {"validation": 0.02, "femoral": 0.02, "tibial": 0.02, "patellar": 0.02}
JUMPS |= {"dice": 0.02, "voe": 0.02, "vd": 0.05, "assd_mm": 0.5, "hd95_mm": 0.5, "hd_mm": 0.5, "prediction_ml": 0.01}

#: What is run besides the rows as they are: (row, settings that differ, how the teacher moves).
VARIANTS: dict[str, tuple[str, dict[str, Any], TeacherUpdate]] = {
    **{f"fedavg {codec}": ("fedavg", {"compression": codec}, FROZEN) for codec in CODECS},
    "fedavg clipped": ("fedavg", {"clip_norm": 0.5}, FROZEN),
    "fedavg noisy": ("fedavg", {"clip_norm": 0.5, "noise_multiplier": 0.1}, FROZEN),
    "dual_kd handed over": ("dual_kd", {}, TeacherUpdate("hand_over", 1, 0.5)),
    "dual_kd released": ("dual_kd", {"rounds": 8}, RELEASE),
    "dual_kd batch": ("dual_kd", {"normalisation": "batch"}, FROZEN),
    "dual_kd group": ("dual_kd", {"normalisation": "group"}, FROZEN),
}
POINTS = {row: (row, {}, FROZEN) for row in ROWS} | VARIANTS

_NOT_COMPARED = ("seconds", "data_seconds", "cpu_seconds", "teacher_cpu_seconds", "round", "client")


def digits_of(name: str, root: Path) -> dict[str, float]:
    """The means over rounds and clients of all that a run logs, and over cases and classes of the test metrics."""
    row, changes, update = POINTS[name]
    settings = replace(TINY, **changes)
    result = experiments.run_row(
        row, "heterogeneous", 3, settings, root, teacher_update=update, show_progress=False, keep=False
    )
    history = result.history_frame()
    logged = history[[name for name in history if name not in _NOT_COMPARED]].mean()
    test = result.test_frame()
    metrics = [name for name in test.select_dtypes("number") if name != "class"]
    tested = {
        f"test {'largest ' if components == 'largest' else ''}{metric}": part[metric].mean()
        for components, part in test.groupby("components")
        for metric in metrics
    }
    counts = {"bytes_down": result.bytes_down, "bytes_up": result.bytes_up, "steps": result.steps}
    return {name: float(f"{value:.6g}") for name, value in {**logged, **tested, **counts}.items() if value == value}


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
        if not np.isclose(value, expected[name], rtol=RELATIVE, atol=JUMPS.get(name.split()[-1], 1e-6))
    }
    assert not moved, f"(before, now): {moved}"


@pytest.mark.parametrize("name", list(POINTS))
def test_a_run_gives_the_digits_it_gave(name: str, cache: Path, golden: dict[str, Any]) -> None:
    check(digits_of(name, cache), golden["runs"][name])


@pytest.mark.parametrize("scanner", list(SCANNERS))
def test_a_scanner_gives_the_digits_it_gave(scanner: str, golden: dict[str, Any]) -> None:
    check(digits_of_scanner(scanner), golden["scanners"][scanner])


def test_nothing_is_golden_that_is_gone(golden: dict[str, Any]) -> None:
    assert golden["runs"].keys() == POINTS.keys() and golden["scanners"].keys() == SCANNERS.keys()


def test_a_digit_that_moves_is_found(golden: dict[str, Any]) -> None:
    row = golden["runs"]["dual_kd"]
    with pytest.raises(AssertionError, match="loss"):
        check({**row, "loss": row["loss"] * 1.002}, row)


def _write(root: Path) -> None:
    for name in ("make_cohort", "make_repository"):
        setattr(cohorts, name, functools.partial(getattr(cohorts, name), workers=1, scan=blobs))
    facts = {
        "numbers": NUMBERS,
        "runs": {name: digits_of(name, root) for name in POINTS},
        "scanners": {name: digits_of_scanner(name) for name in SCANNERS},
    }
    FILE.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
