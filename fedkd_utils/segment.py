"""A real knee in, its three cartilages out: any orientation, spacing and field of view.

The volume is reordered to RAS (axes permuted and flipped, never rotated: the grid follows the slices as they were
scanned), resampled to the spacing on which the network learned, cut into overlapping windows of the grid's shape,
segmented, and the probabilities are brought back to the volume's own grid before the class is chosen. Every window is
z-scored by itself, because that is what the network saw in training: one grid, normalised by its own mean and spread.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.inferers import sliding_window_inference
from nibabel import orientations
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedkd_utils.metrics import keep_largest_components
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES, Settings

#: Share of a window that its neighbour sees too; MONAI weighs each window by a Gaussian round its centre.
WINDOW_OVERLAP = 0.5

#: How far a field of view with a knee in it may reach along each axis: beyond, the header means other units.
PLAUSIBLE_EXTENT_MM = (20.0, 1000.0)

RAS = np.array([[0, 1], [1, 1], [2, 1]])
MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}
ROWS_AT_ONCE = 8  # of the native grid, when probabilities come back: bounds the memory


@dataclass(frozen=True)
class Volume:
    """A volume as stored: ``image`` (X, Y, Z) float32 in the file's order, ``affine`` (4, 4) voxel -> RAS mm."""

    path: Path
    image: NDArray[np.float32]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class Segmentation:
    """The classes of a volume on its own grid, and how much cartilage that is."""

    label: NDArray[np.uint8]  # (X, Y, Z), 0 background, 1 femoral, 2 tibial, 3 patellar
    affine: NDArray[np.float64]  # (4, 4), voxel -> RAS mm
    volumes_ml: dict[str, float]  # by name of the cartilage
    path: Path | None  # the file that was written, if any


def segment_volume(
    path: str | Path,
    network: Callable[[Tensor], Tensor],
    settings: Settings,
    out: str | Path | None = None,
) -> Segmentation:
    """Segment the knee in a NIfTI file and, when ``out`` is given, write the classes on the volume's own grid.

    Args:
        path: a three-dimensional ``.nii`` or ``.nii.gz``.
        network: (B, 1, D, H, W) z-scored -> (B, C, D, H, W) logits; a module must be in evaluation mode.
        settings: of the network: ``grid_shape`` and ``grid_spacing_mm``.
        out: the ``.nii`` or ``.nii.gz`` to write (uint8, same shape and affine), replaced in one step.

    Raises:
        FileNotFoundError: the volume, or the folder of ``out``, does not exist.
        ValueError: the file cannot be a knee (see :func:`read_volume`), ``out`` would overwrite it, or the network
            is in training mode or gives NaN.
    """
    target = None if out is None else _checked_target(Path(out), Path(path))
    volume = read_volume(path)
    label = label_volume(volume, network, settings)
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    volumes = {CLASS_NAMES[c]: np.count_nonzero(label == c) * voxel_ml for c in CARTILAGES}
    if target is not None:
        _write_label(target, label, volume.path)
    return Segmentation(label, volume.affine, volumes, target)


def default_output(path: str | Path) -> Path:
    """``any/knee.nii.gz`` -> ``knee_cartilage.nii.gz`` in the current folder (the other may be read-only)."""
    return Path(Path(path).name.removesuffix(".gz").removesuffix(".nii") + "_cartilage.nii.gz")


# ------------------------------------------------------------------------------------------------ the network


def label_volume(volume: Volume, network: Callable[[Tensor], Tensor], settings: Settings) -> NDArray[np.uint8]:
    """The classes of a volume on its own grid, (X, Y, Z) uint8, largest components kept."""
    if isinstance(network, nn.Module) and network.training:
        raise ValueError("The network is in training mode (dropout, batch statistics): call network.eval() first.")
    turn = orientations.io_orientation(volume.affine)
    image = np.ascontiguousarray(orientations.apply_orientation(volume.image, turn))
    spacing = orientations.apply_orientation(np.arange(3), turn) if False else _ras_spacing(volume.affine, turn)
    probabilities = grid_probabilities(torch.from_numpy(image), spacing, network, settings)
    label = native_classes(probabilities, settings.grid_spacing_mm, image.shape, spacing)
    back = orientations.ornt_transform(RAS, turn)
    return keep_largest_components(np.ascontiguousarray(orientations.apply_orientation(label, back)))
