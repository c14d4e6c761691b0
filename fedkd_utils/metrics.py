"""How well a segmentation agrees with the truth: overlap, volume and distances in mm, per class, on one grid.

Conventions (they differ between libraries and change the numbers, so they are stated):

- P and T are the voxels of one class in prediction and truth; both live on the volume's *own* grid.
- The surface of a mask is the centres of its voxels that have at least one face neighbour outside it (the
world
  beyond the array counts as outside). Distances are Euclidean, between voxel centres, in mm with the spacing
  of each axis. MONAI's surface metrics use the same surface.
- ASSD is the mean over all points of both surfaces together of the distance to the other surface; HD95 the
larger
  of the two directed 95th percentiles (linear interpolation); HD the larger of the two directed maxima.
- A class missing on one side: Dice 0 and VOE 1 (the full penalty), VD -1 if the prediction is empty and NaN
if the
  truth is, distances NaN. Missing on both sides: everything NaN, there was nothing to measure. A distance is
  never 0 for a missing class, as it is in the released code. ``empty`` says which side is missing: count
  those cases beside every mean distance, because a mean over the rest flatters the method that misses the
  most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from fedkd_utils.settings import CARTILAGES, CLASS_NAMES

Mask = NDArray[np.bool_]
Distances = NDArray[np.float64]

#: How many connected components of each cartilage are kept: the tibia has a medial and a lateral plateau.
COMPONENTS_KEPT: dict[int, int] = {1: 1, 2: 2, 3: 1}

#: The numbers of a case in the order of every table: overlap and volume as fractions, distances in mm.
METRIC_NAMES = ("dice", "voe", "vd", "assd_mm", "hd95_mm", "hd_mm")


def dice(prediction: ArrayLike, truth: ArrayLike) -> float:
    """2 |P and T| / (|P| + |T|), 0 to 1; NaN when both masks are empty."""
    p, t = _masks(prediction, truth)
    size = np.count_nonzero(p) + np.count_nonzero(t)
    return 2 * np.count_nonzero(p & t) / size if size else math.nan


def voe(prediction: ArrayLike, truth: ArrayLike) -> float:
    """Volumetric overlap error 1 - |P and T| / |P or T|, 0 to 1; NaN when both masks are empty."""
    p, t = _masks(prediction, truth)
    union = np.count_nonzero(p | t)
    return 1 - np.count_nonzero(p & t) / union if union else math.nan


def vd(prediction: ArrayLike, truth: ArrayLike) -> float:
    """Signed volume difference (|P| - |T|) / |T|: positive when too much is drawn, NaN when the truth is
    empty.
    """
    p, t = _masks(prediction, truth)
    size = np.count_nonzero(t)
    return (np.count_nonzero(p) - size) / size if size else math.nan


def assd_mm(prediction: ArrayLike, truth: ArrayLike, spacing_mm: Sequence[float]) -> float:
    """Average symmetric surface distance in mm; NaN when a mask is empty."""
    return _average(*surface_distances_mm(prediction, truth, spacing_mm))


def hd95_mm(prediction: ArrayLike, truth: ArrayLike, spacing_mm: Sequence[float]) -> float:
    """The larger of the directed 95th percentiles of the surface distances in mm; NaN when a mask is
    empty.
    """
    return _percentile(*surface_distances_mm(prediction, truth, spacing_mm), 95)


def hd_mm(prediction: ArrayLike, truth: ArrayLike, spacing_mm: Sequence[float]) -> float:
    """Hausdorff distance between the surfaces in mm; NaN when a mask is empty."""
    return _percentile(*surface_distances_mm(prediction, truth, spacing_mm), 100)


def surface_distances_mm(
    prediction: ArrayLike, truth: ArrayLike, spacing_mm: Sequence[float]
) -> tuple[Distances, Distances]:
    """The distance in mm of every surface point of P to T's surface, and of every one of T to P's.

    Two empty arrays when either mask is empty. Exact (Euclidean distance transform), and computed inside the
    bounding box of both masks only, so a full-size knee takes about a second.

    Raises:
        ValueError: shapes differ, or a spacing is not positive and finite.
    """
    p, t = _masks(prediction, truth)
    spacing = _checked_spacing(spacing_mm, p.ndim)
    if not (p.any() and t.any()):
        return np.empty(0), np.empty(0)
    box = _bounding_box(p | t)
    p_surface, t_surface = _surface(p[box]), _surface(t[box])
    to_truth = ndimage.distance_transform_edt(~t_surface, sampling=spacing)
    to_prediction = ndimage.distance_transform_edt(~p_surface, sampling=spacing)
    return to_truth[p_surface], to_prediction[t_surface]


def _average(forth: Distances, back: Distances) -> float:
    return float((forth.sum() + back.sum()) / (forth.size + back.size)) if forth.size else math.nan


def _percentile(forth: Distances, back: Distances, percent: float) -> float:
    return float(max(np.percentile(forth, percent), np.percentile(back, percent))) if forth.size else math.nan


def _surface(mask: Mask) -> Mask:
    return mask & ~ndimage.binary_erosion(mask)  # SciPy: face neighbours; outside the array is False


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box round a mask that is not empty (beyond it all is outside, so no surface is lost)."""
    return ndimage.find_objects(mask.view(np.uint8))[0]


def case_metrics(
    prediction: ArrayLike,
    label: ArrayLike,
    spacing_mm: Sequence[float],
    classes: Sequence[int] = CARTILAGES,
    components: Sequence[str] = ("all",),
) -> list[dict[str, Any]]:
    """One row per class and entry of ``components`` for one case.

    Args:
        prediction: (X, Y, Z) class numbers.
        label: (X, Y, Z) class numbers on the same grid.
        spacing_mm: of the three array axes.
        classes: the classes that this source labels; leave unknown ones out.
        components: ``"all"`` measures the prediction as it is, ``"largest"`` what is left of it by
            :func:`keep_largest_components`; both together report with and without.

    Returns:
        Rows with ``class`` (number), ``cartilage`` (name), ``components``, the six :data:`METRIC_NAMES`,
        ``prediction_ml``, ``truth_ml`` and ``empty`` ("", "prediction", "truth" or "both").

    Raises:
        ValueError: shapes differ, a spacing is not positive and finite, or values are not class numbers.
    """
    predicted, truth = _class_numbers(prediction, "prediction"), _class_numbers(label, "label")
    _check_shapes(predicted, truth)
    spacing = _checked_spacing(spacing_mm, truth.ndim)
    if not set(components) <= {"all", "largest"}:
        raise ValueError(f"components may hold 'all' and 'largest', not {tuple(components)}.")
    if not set(classes) <= set(CARTILAGES):
        raise ValueError(f"classes may hold {CARTILAGES}, not {tuple(classes)}.")
    rows: list[dict[str, Any]] = []
    for c in classes:
        p, t = predicted == c, truth == c
        if p.any() or t.any():
            box = _bounding_box(p | t)
            p, t = p[box], t[box]
        measured: dict[int, dict[str, Any]] = {}  # by size: of a mask and its part, equal sizes are equal masks
        for choice in components:
            mask = _largest_components(p, COMPONENTS_KEPT[c]) if choice == "largest" else p
            size = int(np.count_nonzero(mask))
            if size not in measured:
                measured[size] = _mask_metrics(mask, t, spacing)
            rows.append({"class": c, "cartilage": CLASS_NAMES[c], "components": choice, **measured[size]})
    return rows


def _mask_metrics(p: Mask, t: Mask, spacing: Sequence[float]) -> dict[str, Any]:
    """All metrics of one pair of masks; the distances are computed once for the three that need them."""
    forth, back = surface_distances_mm(p, t, spacing)
    voxel_ml = math.prod(spacing) / 1000
    missing = {(True, True): "", (False, True): "prediction", (True, False): "truth", (False, False): "both"}
    return {
        "dice": dice(p, t),
        "voe": voe(p, t),
        "vd": vd(p, t),
        "assd_mm": _average(forth, back),
        "hd95_mm": _percentile(forth, back, 95),
        "hd_mm": _percentile(forth, back, 100),
        "prediction_ml": np.count_nonzero(p) * voxel_ml,
        "truth_ml": np.count_nonzero(t) * voxel_ml,
        "empty": missing[bool(p.any()), bool(t.any())],
    }


def keep_largest_components(label: NDArray[Any], counts: Mapping[int, int] = COMPONENTS_KEPT) -> NDArray[Any]:
    """A copy of a label map in which each class keeps its ``counts[class]`` largest components, by voxels.

    The rest becomes background. Voxels that touch by a face, an edge or a corner are connected (a thin sheet
    of cartilage cut by thick slices often goes on across an edge); of equal components the first in array
    order stays. Classes that ``counts`` does not name are left alone.
    """
    kept = np.array(label)
    for c, count in counts.items():
        mask = kept == c
        if mask.any():
            box = _bounding_box(mask)
            part = kept[box]  # a view
            part[mask[box] & ~_largest_components(mask[box], count)] = 0
    return kept


def _largest_components(mask: Mask, count: int) -> Mask:
    components, found = ndimage.label(mask, structure=np.ones((3,) * mask.ndim, dtype=bool))
    if found <= count:
        return mask
    sizes = np.bincount(components.ravel())[1:]
    largest = np.argsort(-sizes, kind="stable")[:count] + 1
    return np.isin(components, largest)


def volumes_ml(label: ArrayLike, spacing_mm: Sequence[float], classes: Sequence[int] = CARTILAGES) -> dict[int, float]:
    """The volume of each class of a label map in millilitres."""
    values = _class_numbers(label, "label")
    voxel_ml = math.prod(_checked_spacing(spacing_mm, values.ndim)) / 1000
    return {c: np.count_nonzero(values == c) * voxel_ml for c in classes}


def _masks(prediction: ArrayLike, truth: ArrayLike) -> tuple[Mask, Mask]:
    p, t = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    _check_shapes(p, t)
    return p, t


def _check_shapes(prediction: NDArray[Any], truth: NDArray[Any]) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(
            f"The prediction has shape {prediction.shape} and the truth {truth.shape}: bring the prediction "
            "to the truth's own grid first."
        )


def _checked_spacing(spacing_mm: Sequence[float], ndim: int) -> tuple[float, ...]:
    spacing = tuple(float(s) for s in spacing_mm)
    if len(spacing) != ndim or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(
            f"A spacing of {ndim} positive numbers in mm is needed, not {spacing}: check the header of the file."
        )
    return spacing


def _class_numbers(values: ArrayLike, what: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype.kind not in "biu" and not (array.dtype.kind == "f" and np.array_equal(array, np.rint(array))):
        raise ValueError(f"The {what} must hold class numbers (0, 1, 2, 3), not {array.dtype} values between them.")
    return array
