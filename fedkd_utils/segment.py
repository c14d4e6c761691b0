"""A real knee in, its three cartilages out: any orientation, spacing and field of view.

The volume is brought to RAS order and to the spacing on which the network learned (axes permuted and flipped,
never rotated: the grid follows the slices as they were scanned), cut into overlapping windows of the network's
grid, segmented, and the probabilities are brought back to the volume's own grid before the class is chosen.

In training one grid is one knee, z-scored by its own mean and spread. Here a window plays that part, so every
window is z-scored by itself: the statistics of a whole field of view (more air, more thigh) would shift the
contrast away from what the network knows.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from fedkd_utils import figures, formats, transforms
from fedkd_utils.calibration import THICK_SLICES_MM, sheet_thickness_mm
from fedkd_utils.errors import VolumeError, one_line
from fedkd_utils.files import write_atomically, zipped
from fedkd_utils.metrics import keep_largest_components
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES, Settings
from fedkd_utils.transforms import by_axis

Network = Callable[[Tensor], Tensor]

#: Share of a window that its neighbour sees too; MONAI weighs each window by a Gaussian round its centre.
WINDOW_OVERLAP = 0.5

#: From how many grids along some axis on the joint is looked for first, and how many are then cut out round it.
WIDE, MARGIN = 1.6, 1.25

#: So much of the cartilage that was seen may lie beyond either end of its extent: specks do not count.
EDGE_SHARE = 0.05

#: Of a window, as a share of that of the whole volume: a window of nothing but air is not stretched to an image.
LEAST_SPREAD = 0.1

#: How far a field of view with a knee in it may reach along each axis: beyond, the header means other units.
PLAUSIBLE_EXTENT_MM = (20.0, 1000.0)

#: The fields of a NIfTI header that place the voxels in the world.
GEOMETRY = ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z") + tuple(
    f"{kind}_{axis}" for kind, axes in (("quatern", "bcd"), ("qoffset", "xyz")) for axis in axes
)


@dataclass(frozen=True)
class Volume:
    """A volume as stored, in the file's own order."""

    path: Path
    image: NDArray[np.float32]  # (X, Y, Z)
    affine: NDArray[np.float64]  # (4, 4), voxel -> RAS mm
    header: nib.Nifti1Header  # as on disk


@dataclass(frozen=True)
class Segmentation:
    """The classes of a volume on its own grid, and how much cartilage that is."""

    label: NDArray[np.uint8]  # (X, Y, Z), 0 background, 1 femoral, 2 tibial, 3 patellar
    affine: NDArray[np.float64]  # (4, 4), voxel -> RAS mm
    volumes_ml: dict[str, float]  # by name of the cartilage
    thickness_mm: dict[str, float]  # mean, by name of the cartilage; NaN where none was found
    source: Path
    path: Path  # the file that was written

    def report(self) -> str:
        """What was read, how much cartilage was found, and where it is written: for a terminal."""
        voxels = by_axis(self.label.shape)
        size, code = by_axis(nib.affines.voxel_sizes(self.affine)), "".join(nib.aff2axcodes(self.affine))
        lines = [f"{self.source}: {voxels} voxels of {size} mm, axes {code}"]
        for name, ml in self.volumes_ml.items():
            thick = self.thickness_mm[name]
            mean = "none found" if math.isnan(thick) else f"{thick:.1f} mm thick on average"
            lines.append(f"  {name + ' cartilage':<20}{ml:6.1f} ml  {mean}")
        if (step := max(transforms.voxel_sizes_mm(self.affine))) >= THICK_SLICES_MM:
            lines.append(f"  with slices of {step:g} mm the thickness of thin cartilage may be off by half")
        return "\n".join([*lines, f"written: {self.path}"])

    def table(self) -> pd.DataFrame:
        """One line per cartilage: source, cartilage, volume_ml, mean_thickness_mm."""
        names = list(self.volumes_ml)
        columns = {"volume_ml": self.volumes_ml.values(), "mean_thickness_mm": self.thickness_mm.values()}
        return pd.DataFrame({"source": str(self.source), "cartilage": names, **columns})


def segment_volume(
    volume: str | Path | Volume,
    network: Network,
    settings: Settings,
    out: str | Path | None = None,
    *,
    locate: bool = False,
    progress: bool = False,
) -> Segmentation:
    """Segment the knee in a NIfTI file or a folder with a DICOM series and write the classes on the volume's own grid.

    Without a file: ``label_volume(read_volume(path), network, settings)``.

    Args:
        volume: a three-dimensional ``.nii`` or ``.nii.gz``, the folder of a DICOM series, or what :func:`read_volume`
            made of one of them.
        network: (B, 1, D, H, W) z-scored -> (B, C, D, H, W) logits; a module must be in evaluation mode.
        settings: of the network: ``grid_shape`` and ``grid_spacing_mm``.
        out: the ``.nii`` or ``.nii.gz`` to write (uint8, same shape and affine), replaced in one step; without
            it ``any/knee.nii.gz`` becomes ``knee_cartilage.nii.gz`` in the current folder.
        locate: find the joint first where the field of view is much larger than the network's, see
            :func:`label_volume`.
        progress: show MONAI's bar of windows on the error stream.

    Raises:
        FileNotFoundError: the volume, or the folder of ``out``, does not exist.
        VolumeError: the file cannot be a knee, see :func:`read_volume`.
        ValueError: ``out`` would overwrite the volume, or the network is in training mode or gives NaN.
        OSError: ``out`` cannot be written, see :func:`check_outputs`.
    """
    path = volume.path if isinstance(volume, Volume) else Path(volume)
    target = default_output(path) if out is None else Path(out)
    check_outputs(path, target)
    volume = volume if isinstance(volume, Volume) else read_volume(path)
    label = label_volume(volume, network, settings, locate=locate, progress=progress)
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    volumes = {CLASS_NAMES[c]: int(np.count_nonzero(label == c)) * voxel_ml for c in CARTILAGES}
    spacing = transforms.voxel_sizes_mm(volume.affine)
    thickness = {CLASS_NAMES[c]: sheet_thickness_mm(label == c, spacing) for c in CARTILAGES}
    _write_label(target, label, volume.header)
    return Segmentation(label, volume.affine, volumes, thickness, volume.path, target)


def default_output(path: str | Path) -> Path:
    """``any/knee.nii.gz`` -> ``knee_cartilage.nii.gz`` in the current folder (the other may be read-only)."""
    return Path(Path(path).name.removesuffix(".gz").removesuffix(".nii") + "_cartilage.nii.gz")


def label_volume(
    volume: Volume, network: Network, settings: Settings, *, locate: bool = False, progress: bool = False
) -> NDArray[np.uint8]:
    """The classes of a volume on its own grid, (X, Y, Z) uint8, largest components kept.

    ``locate`` looks twice where the field of view reaches beyond :data:`WIDE` times the network's grid: over all of it,
    and then round the joint (:func:`joint_in`), which lies in the middle of the view as in training. What lies
    elsewhere is background then.
    """
    _refuse_training(network)
    least = settings.grid_shape
    view, grid_affine = _view(volume.image, volume.affine, settings)
    if locate and any(n > WIDE * size for n, size in zip(view.shape, least, strict=True)):
        found = joint_in(view, network, least, progress=progress)
        d, h, w = view.shape
        box = _box_round(found or (d // 2, h // 2, w // 2), least, (d, h, w))
        probabilities = torch.zeros((len(CLASS_NAMES), d, h, w))
        probabilities[0] = 1
        probabilities[:, *box] = window_probabilities(view[box], network, least, progress=progress)
    else:
        probabilities = window_probabilities(view, network, least, progress=progress)
    x, y, z = volume.image.shape
    return keep_largest_components(transforms.from_grid(probabilities, grid_affine, (x, y, z), volume.affine))


def locate_joint(
    image: NDArray[np.float32], affine: NDArray[np.float64], network: Network, settings: Settings
) -> NDArray[np.float64] | None:
    """Where the joint is in a field of view, in RAS mm, as a network sees it; None where it sees no cartilage.

    Args:
        image: (X, Y, Z) in the order of the file.
        affine: (4, 4) voxel index to RAS mm.
        network, settings: as for :func:`segment_volume`.

    Raises:
        ValueError: the network is in training mode or gives NaN.
    """
    _refuse_training(network)
    view, grid_affine = _view(image, affine, settings)
    found = joint_in(view, network, settings.grid_shape)
    return None if found is None else np.asarray(nib.affines.apply_affine(grid_affine, found))


def _refuse_training(network: Network) -> None:
    if isinstance(network, nn.Module) and network.training:
        raise ValueError("The network is in training mode: call network.eval() before it segments.")


def _view(
    image: NDArray[np.float32], affine: NDArray[np.float64], settings: Settings
) -> tuple[Tensor, NDArray[np.float64]]:
    """The whole field of view at the network's spacing, at least one grid large, and its affine."""
    spacing, least = settings.grid_spacing_mm, settings.grid_shape
    view, grid_affine = transforms.to_grid(image, affine, spacing)
    d, h, w = (max(have, want) for have, want in zip(view.shape, least, strict=True))
    if (d, h, w) != tuple(view.shape):  # fills up with the smallest value, as the training grid does
        view, grid_affine = transforms.to_grid(image, affine, spacing, (d, h, w))
    return view, grid_affine


def joint_in(
    view: Tensor, network: Network, window: tuple[int, int, int], *, progress: bool = False
) -> tuple[int, int, int] | None:
    """The voxel of a view (D, H, W) in which the joint's middle lies: windows that hardly overlap look for it."""
    return joint_centre(window_probabilities(view, network, window, overlap=0.25, progress=progress), window)


def joint_centre(probabilities: Tensor, window: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Where the joint is: the middle of the extent of the cartilage in that window which holds most of it, as voxel.

    A few bright voxels anywhere do not make a joint; a window full of probable cartilage does.

    Args:
        probabilities: (C, D, H, W) of the whole field of view.

    Returns:
        None where no voxel is probably cartilage.
    """
    cartilage = (1 - probabilities[0]).clamp(min=0).numpy()
    cartilage = np.where(cartilage > 0.2, cartilage, 0)  # else the many doubtful voxels of a large view outweigh it
    if not cartilage.any():
        return None
    held = ndimage.uniform_filter(cartilage, size=window, mode="constant")
    best = np.unravel_index(int(held.argmax()), held.shape)
    near = [slice(max(int(k) - n // 2, 0), int(k) + n // 2 + 1) for k, n in zip(best, window, strict=True)]
    part = cartilage[tuple(near)]
    middle = []
    for axis, edge in enumerate(near):
        along = part.sum(axis=tuple(other for other in range(3) if other != axis)).cumsum()
        low, high = np.searchsorted(along, (EDGE_SHARE * along[-1], (1 - EDGE_SHARE) * along[-1]))
        middle.append(edge.start + round(float(low + high) / 2))
    return middle[0], middle[1], middle[2]


def _box_round(
    centre: tuple[int, int, int], window: tuple[int, int, int], shape: tuple[int, int, int]
) -> tuple[slice, slice, slice]:
    """A box of :data:`MARGIN` windows round a place, inside the view."""
    edges = []
    for middle, size, n in zip(centre, window, shape, strict=True):
        length = min(round(MARGIN * size), n)
        start = min(max(middle - length // 2, 0), n - length)
        edges.append(slice(start, start + length))
    return edges[0], edges[1], edges[2]


@torch.inference_mode()
def window_probabilities(
    view: Tensor,
    network: Network,
    window: tuple[int, int, int],
    *,
    overlap: float = WINDOW_OVERLAP,
    progress: bool = False,
) -> Tensor:
    """Class probabilities (C, D, H, W) of a view (D, H, W) that is at least as large as the window.

    Raises:
        ValueError: the network's output is not finite, or not one channel per class.
    """
    least_spread = LEAST_SPREAD * float(view.std())

    def predict(windows: Tensor) -> Tensor:  # (B, 1, D, H, W)
        logits = network(z_scored(windows, least_spread))
        if logits.ndim != 5 or logits.shape[1] != len(CLASS_NAMES) or not torch.isfinite(logits).all():
            raise ValueError(
                f"The network gives NaN or not {len(CLASS_NAMES)} classes (output {tuple(logits.shape)}): "
                "train it or fetch its checkpoint again."
            )
        return logits.softmax(dim=1)

    probabilities = sliding_window_inference(
        view[None, None],
        window,
        sw_batch_size=2,
        predictor=predict,
        overlap=overlap,
        mode="gaussian",
        progress=progress,
    )
    return torch.as_tensor(probabilities)[0]


def z_scored(windows: Tensor, least_spread: float) -> Tensor:
    """(x - mean) / max(standard deviation, least_spread) of every window (B, 1, D, H, W) by itself."""
    spread, mean = torch.std_mean(windows, dim=(1, 2, 3, 4), keepdim=True)
    return (windows - mean) / spread.clamp_min(least_spread)


def read_volume(path: str | Path) -> Volume:
    """Read a NIfTI volume or the folder of a DICOM series; refuse what :func:`transforms.read_volume` refuses.

    And what only a stranger's file can be: without image, with an extent that no knee has, a series that lacks a slice.

    Raises:
        FileNotFoundError: no such file.
        VolumeError: one line with the file, what is wrong, and the remedy.
    """
    path = Path(path)
    if path.is_dir():
        image, affine = formats.read_dicom(path)
        return Volume(path, refuse_implausible(image, affine, path), affine, nib.Nifti1Image(image, affine).header)
    image, affine, header = transforms.read_nifti(path)
    return Volume(path, refuse_implausible(image, affine, path), affine, header)


def refuse_implausible(image: NDArray[np.float32], affine: NDArray[np.float64], path: Path) -> NDArray[np.float32]:
    """The image itself, unless it is constant or reaches over what no scan of a knee does (:class:`VolumeError`)."""
    transforms.refuse_constant(image, path)
    extent = transforms.extent_mm(image.shape, affine)
    if not ((extent >= PLAUSIBLE_EXTENT_MM[0]) & (extent <= PLAUSIBLE_EXTENT_MM[1])).all():
        raise VolumeError(
            f"{path}: it reaches over {by_axis(extent)} mm, which no scan of a knee does. "
            "Check the spacing and its unit in the header."
        )
    return image


def preview(volume: Volume, label: NDArray[np.uint8], out: str | Path) -> None:
    """Draw a segmentation as all volumes of the course are drawn: twelve sagittal slices through the cartilage.

    Args:
        volume: of :func:`read_volume`.
        label: (X, Y, Z), its segmentation, in the order of the file.
        out: the picture to write, ``.png``.

    Raises:
        VolumeError: the label has another shape.
    """
    transforms.refuse_other_grid(
        (label.shape, volume.affine), (volume.image.shape, volume.affine), "label", volume.path
    )
    image, ras = transforms.to_ras(volume.image, volume.affine)
    classes, _ = transforms.to_ras(label, volume.affine)
    figure, _ = figures.montage(image, transforms.voxel_sizes_mm(ras), classes, 12, volume.path.name)
    width, height = figure.get_size_inches()
    figure.set_size_inches(2 * width, 2 * height)  # a scanner has more pixels than a made knee
    write_atomically(Path(out), figures.png(figure))


#: What can be written, and how its file is called.
OUTPUTS = {
    "segmentation": ("a NIfTI file", (".nii.gz", ".nii")),
    "table": ("a CSV file", (".csv",)),
    "preview": ("a PNG picture", (".png",)),
}


def check_outputs(
    source: Path, segmentation: Path | None = None, table: Path | None = None, preview: Path | None = None
) -> None:
    """Refuse what could not be written in the end, before minutes are spent on it; nothing is left on the disk.

    Args:
        source: the volume, which no output may replace.
        segmentation, table, preview: the files to write.

    Raises:
        ValueError: a name with another ending than :data:`OUTPUTS` says, or the volume itself.
        FileNotFoundError: the folder of a file does not exist.
        OSError: that folder cannot be written to, or a folder has the name of the file; names it.
    """
    for what, out in (("segmentation", segmentation), ("table", table), ("preview", preview)):
        if out is None:
            continue
        kind, endings = OUTPUTS[what]
        if not out.name.endswith(endings):
            raise ValueError(f"{out}: the {what} is {kind}. Give a name that ends in {endings[0]}.")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"{out.parent}: no such folder. Make it, or write elsewhere.")
        if out.is_dir():
            raise IsADirectoryError(f"{out}: that is a folder. Give the name of a file for the {what}.")
        if out.exists() and source.exists() and out.samefile(source):
            raise ValueError(f"{out}: that is the volume itself. Give another name for the {what}.")
        try:
            tempfile.TemporaryFile(dir=out.parent).close()
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise OSError(f"{out}: cannot be written ({reason}). Write elsewhere.") from error


def _write_label(out: Path, label: NDArray[np.uint8], source: nib.Nifti1Header) -> None:
    """Of ``source`` it takes the geometry and nothing else."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_xyzt_units("mm")
    header["pixdim"][:4] = source["pixdim"][:4]
    for field in GEOMETRY:
        header[field] = source[field]
    content = nib.Nifti1Image(label, None, header).to_bytes()
    write_atomically(out, zipped(content) if out.name.endswith(".gz") else content)
