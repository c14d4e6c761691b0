"""Made knees beside real ones: sizes of cartilages measured on tissue maps, and what manual label maps say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedkd_utils.anatomy import CORTICAL, FEMORAL, MARROW, PATELLAR, TIBIAL, Knee, tissue_map

#: What manual label maps of real knees say. ``mean_ml`` and ``range_ml``: volumes over 68 knees (the range is known for
#: the femur only). ``one_knee_ml`` and ``extent_mm`` (LR, AP, SI): one right knee. ``thickness_mm``: 10th and 90th
#: percentile of the local thickness.
LITERATURE: dict[str, dict[str, tuple[float, ...]]] = {
    "femoral": {
        "mean_ml": (11.9,),
        "range_ml": (7.5, 20.9),
        "one_knee_ml": (11.9,),
        "extent_mm": (71, 65, 42),
        "thickness_mm": (1.5, 3.0),
    },
    "tibial": {"mean_ml": (4.4,), "one_knee_ml": (3.8,), "extent_mm": (71, 41, 10), "thickness_mm": (1.5, 4.0)},
    "patellar": {"mean_ml": (2.8,), "one_knee_ml": (1.2,), "extent_mm": (39, 13, 31), "thickness_mm": (1.5, 5.0)},
}

#: Tissue codes of the cartilages by name.
CODES = {"femoral": FEMORAL, "tibial": TIBIAL, "patellar": PATELLAR}

#: The field of view that is measured: all of the cartilages of any subject.
_FIELD_MM = (85.0, 95.0, 75.0)

#: Cartilage thins out at its margin; thickness is measured further in than this.
_MARGIN_MM = 2.0


@dataclass(frozen=True)
class Cartilage:
    """One cartilage of one knee, measured."""

    volume_ml: float
    extent_mm: tuple[float, float, float]  # of its bounding box: left-right, anterior-posterior, inferior-superior
    thickness_mm: NDArray[np.float64]  # at every voxel of its free surface away from the margin

    @property
    def thickness_range_mm(self) -> tuple[float, float]:
        """The 10th and the 90th percentile of the local thickness."""
        low, high = np.percentile(self.thickness_mm, [10, 90])
        return float(low), float(high)


def measure_cartilages(knee: Knee, spacing_mm: float = 0.5) -> dict[str, Cartilage]:
    """Volume, extent and local thickness of the cartilages of a made knee, by name.

    Everything is read from voxels, as from a manual label map: nothing here knows the thickness that a knee was drawn
    with.
    """
    shape = tuple(round(length / spacing_mm) for length in _FIELD_MM)
    tissue = tissue_map(knee, (shape[0], shape[1], shape[2]), (spacing_mm,) * 3)
    bone = np.isin(tissue, (CORTICAL, MARROW))
    measured: dict[str, Cartilage] = {}
    for name, code in CODES.items():
        cartilage = tissue == code
        (box,) = ndimage.find_objects(cartilage.astype(np.uint8))
        sides = [(edge.stop - edge.start) * spacing_mm for edge in box]
        near = tuple(slice(max(edge.start - 2, 0), edge.stop + 2) for edge in box)
        thickness = local_thickness(cartilage[near], bone[near], spacing_mm)
        volume_ml = np.count_nonzero(cartilage) * spacing_mm**3 / 1000
        measured[name] = Cartilage(volume_ml, (sides[0], sides[1], sides[2]), thickness)
    return measured


def local_thickness(cartilage: NDArray[np.bool_], bone: NDArray[np.bool_], spacing_mm: float) -> NDArray[np.float64]:
    """From every voxel of the free surface, the way to the bone in mm: one value per voxel, in no order.

    A voxel's centre lies half a voxel inside the free surface, the nearest bone voxel's half a voxel inside the
    bone: the halves cancel. Left out is what lies within 2 mm of the margin, where free surface and bone meet.

    Args:
        cartilage, bone: (X, Y, Z), isotropic voxels.
    """
    to_bone = ndimage.distance_transform_edt(~bone, sampling=spacing_mm)
    free = cartilage & ndimage.binary_dilation(~cartilage & ~bone)
    margin = free & (to_bone < 1.5 * spacing_mm)
    inside = free
    if margin.any():
        inside = free & (ndimage.distance_transform_edt(~margin, sampling=spacing_mm) > _MARGIN_MM)
    return np.asarray(to_bone[inside], dtype=np.float64)


#: On the middle sheet of a layer the nearest points of both faces lie on opposite sides, so the distance has (next to)
#: no slope; elsewhere its slope is 1, and about 0.7 where a rim is bisected. Between the two lies the limit.
_MIDDLE_SLOPE = 0.6

#: From here on a thickness says little: see :func:`sheet_thickness_mm`.
THICK_SLICES_MM = 3.0

#: Stairs in a face look like middles of thin layers: left out is what is much thinner than the layer within 1 mm.
_STAIRS = 0.6


def sheet_thickness_mm(mask: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> float:
    """The mean thickness of a layer without knowing its bone: twice the distance to the outside on its middle sheet.

    Voxels are halved along every axis first (quartered along one of at least one and a half times the shortest), their
    faces smoothed by linear interpolation: a layer of any number of voxels then has a middle between two of them.
    Measured on layers of known thickness (tests/test_own_segment.py): plates along the axes are within 1 %, tilted
    plates and half shells of 1.5 to 4 mm within 12 % at the spacing of DESS. With slices of :data:`THICK_SLICES_MM` and
    more it is no measure of thin cartilage: a plate of 1.5 mm that runs obliquely through the slices comes out half as
    thick again.

    Args:
        mask: (X, Y, Z) of one cartilage.

    Returns:
        mm; NaN of an empty mask.
    """
    if not mask.any():
        return float("nan")
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    cuts = [4 if step >= 1.5 * min(spacing_mm) else 2 for step in spacing_mm]
    coarse = np.pad(mask[box], 1).astype(np.float32)
    part = ndimage.zoom(coarse, cuts, order=1, grid_mode=True, mode="grid-constant") > 0.5
    if not part.any():  # a single voxel loses its corners
        part = coarse.repeat(cuts[0], 0).repeat(cuts[1], 1).repeat(cuts[2], 2) > 0.5
    steps = [step / cut for step, cut in zip(spacing_mm, cuts, strict=True)]
    distance = ndimage.distance_transform_edt(part, sampling=steps).astype(np.float32)
    slope = np.zeros(part.shape, np.float32)
    for axis, step in enumerate(steps):
        slope += np.gradient(distance, step, axis=axis) ** 2
    around = ndimage.maximum_filter(distance, size=[2 * int(1 / step) + 1 for step in steps])
    middle = part & (slope < _MIDDLE_SLOPE**2) & (distance >= _STAIRS * around)
    if not middle.any():
        middle = distance == distance.max()
    return 2 * float(distance[middle].mean())
