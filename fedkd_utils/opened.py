"""What a person wants to look at - an array, a NIfTI file, an item of a cohort - as arrays in RAS order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedkd_utils import transforms
from fedkd_utils.settings import CLASS_NAMES
from fedkd_utils.site_folder import Item

Volume = ArrayLike | str | Path | Item


@dataclass(frozen=True)
class Opened:
    """A volume (LR, AP, SI), growing to the right, the front and the top, with its label and its place in mm."""

    image: NDArray[Any]
    label: NDArray[np.uint8] | None
    affine: NDArray[np.float64]  # (4, 4) voxel index to RAS mm
    file: tuple[Path, tuple[int, ...], NDArray[np.float64]] | None = None  # path, shape and affine as stored

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel sizes along the three axes."""
        return transforms.voxel_sizes_mm(self.affine)

    def marks(self, label: ArrayLike | str | Path, name: str = "the label") -> NDArray[np.uint8]:
        """Another label of this volume: a file, or an array in the order of the volume as it was given.

        Raises:
            ValueError: another shape, or values that are no class.
        """
        if isinstance(label, str | Path):
            if self.file is None:
                raise ValueError(f"{name} is a file, but the volume an array: give both as files, or both as arrays.")
            marks = transforms.read_label(label, *self.file)
        else:
            shape = self.image.shape if self.file is None else self.file[1]
            marks = _checked_label(np.asarray(label), tuple(shape), name)
        return marks if self.file is None else transforms.to_ras(marks, self.file[2])[0].astype(np.uint8)


def opened(
    volume: Volume,
    label: ArrayLike | str | Path | None = None,
    spacing_mm: Sequence[float] | None = None,
) -> Opened:
    """Open a volume to look at.

    Args:
        volume: an array in RAS order, the path of a NIfTI file (turned to RAS order), or an item of a cohort.
        label: for an array, another one; for a file, its label file, or an array in the order of the file. An item
            brings its own, if it has one.
        spacing_mm: voxel sizes of an array, 1 mm when not given. A file knows its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not three-dimensional, colour, NaN, a spacing that is none, a label that does not fit or is empty.
    """
    if isinstance(volume, Item):
        label = volume.label if label is None else label
        volume = volume.image
    if isinstance(volume, str | Path):
        if spacing_mm is not None:
            raise ValueError(f"{volume}: a file knows its own spacing; leave spacing_mm out.")
        voxels, affine = transforms.read_volume(volume)
        image, ras = transforms.to_ras(voxels, affine)
        held = Opened(image, None, ras, (Path(volume), voxels.shape, affine))
    else:
        image = _checked_image(np.asarray(volume))
        held = Opened(image, None, np.diag([*_checked_spacing(spacing_mm), 1.0]))
    if label is None:
        return held
    marks = held.marks(label)
    if not marks.any():
        raise ValueError("the label is empty: no voxel is cartilage. Check the file, or leave the label out.")
    return Opened(held.image, marks, held.affine, held.file)


def _checked_image(volume: NDArray[Any]) -> NDArray[Any]:
    if volume.dtype.fields is not None:
        raise ValueError("the volume holds colours (a structured type); the viewer shows grey volumes (LR, AP, SI).")
    if volume.ndim != 3:
        raise ValueError(
            f"an array of shape {volume.shape} has {volume.ndim} axes; the viewer shows the three of one volume, "
            "(LR, AP, SI). Take one channel, or one time point, first."
        )
    if volume.shape[-1] in (3, 4) and min(volume.shape[:2]) > 16:
        raise ValueError(
            f"an array of shape {volume.shape} looks like a colour picture; the viewer shows grey volumes (LR, AP, SI)."
        )
    if not volume.size or not np.isfinite(volume).all():
        raise ValueError("the volume is empty, or holds NaN or infinite voxels: mask them before looking at it.")
    return volume


def _checked_spacing(spacing_mm: Sequence[float] | None) -> tuple[float, float, float]:
    if spacing_mm is None:
        return (1.0, 1.0, 1.0)
    try:
        x, y, z = (float(s) for s in spacing_mm)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the spacing {spacing_mm} is not three numbers in mm.") from error
    if not all(0 < s < np.inf for s in (x, y, z)):
        raise ValueError(f"the spacing {(x, y, z)} mm is not positive.")
    return x, y, z


def _checked_label(marks: NDArray[Any], shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    if marks.shape != shape:
        raise ValueError(f"{name} has shape {marks.shape}, the volume {shape}: show a pair that belongs together.")
    if unknown := [v for v in np.unique(marks).tolist() if v not in range(len(CLASS_NAMES))]:
        raise ValueError(
            f"{name} holds {unknown[:5]}; known are 0 to {len(CLASS_NAMES) - 1} ({', '.join(CLASS_NAMES)})."
        )
    return marks.astype(np.uint8)
