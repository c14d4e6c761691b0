"""From volumes on disk to the common grid and back.

Every network of the course sees the same grid (``settings.grid_shape`` at ``settings.grid_spacing_mm``, in RAS order,
z-scored per volume); every metric is computed on a volume's own grid. Resampling is separable: along each axis one
matrix holds the share of every source voxel in every target voxel. Where the target is coarser that is the exact area
average (point sampling would alias thin cartilage away), where it is finer it is linear interpolation.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from fedkd_utils.errors import VolumeError, one_line
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES, Settings
from fedkd_utils.site_folder import Item, Site

#: How far the corner of a label may lie from that of its image: headers round.
SAME_PLACE_MM = 0.1

#: How far two axes of a volume may be from a right angle: headers round, and scanners do not shear.
RIGHT_ANGLE_DEGREES = 1.0

#: How far apart the two places that a NIfTI header may give, its qform and its sform, may put a corner: headers round.
TWO_PLACES_MM = 1.0


def by_axis(values: Iterable[float]) -> str:
    """One number per axis, as a person reads them: ``0.36 x 0.36 x 0.7``."""
    return " x ".join(f"{value:g}" for value in values)


def read_volume(path: str | Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Read a three-dimensional NIfTI volume and refuse what cannot be a knee.

    Returns:
        the voxels (X, Y, Z) as float32 in the order of the file, and the affine (4, 4), voxel index to RAS mm.

    Raises:
        FileNotFoundError: there is no such file.
        VolumeError: damaged or of wrong checksum, no spacing or orientation in the header, a qform and an sform that
            disagree, not three-dimensional, colour or complex, NaN or infinite voxels, singular or sheared affine; one
            line.
    """
    voxels, affine, _ = read_nifti(path)
    return voxels, affine


def read_nifti(
    path: str | Path, *, by_qform: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float64], nib.Nifti1Header]:
    """:func:`read_volume`, and the header as it is on disk. The one place where a NIfTI volume is read.

    Args:
        by_qform: where the header has a qform, the volume lies there, whatever the sform says. Otherwise the two must
            agree.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Check the path; a cohort is made by `python -m fedkd_utils cohort`."
        )
    if not path.name.endswith((".nii", ".nii.gz")):
        raise VolumeError(f"{path}: not a .nii or .nii.gz file. Convert the series, for example with dcm2niix.")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.name.endswith(".gz") else content  # also checks its checksum
        second = content[:4] in (b"\x1c\2\0\0", b"\0\0\2\x1c")
        header = (nib.Nifti2Header if second else nib.Nifti1Header)(content[: 540 if second else 348], check=False)
        _check_header(header, path)  # before nibabel mends a spacing of 0
        image: Any = (nib.Nifti2Image if second else nib.Nifti1Image).from_bytes(content)
        needed = int(image.dataobj.offset) + math.prod(image.shape) * image.get_data_dtype().itemsize
        if len(content) < needed:  # before room is made for what a damaged header claims
            raise ValueError(f"{len(content)} bytes instead of {needed}")
        raw = np.asanyarray(image.dataobj)
        qform = image.header.get_qform() if int(header["qform_code"]) > 0 else None
    except VolumeError:
        raise
    except Exception as error:  # nibabel, gzip and zlib raise many kinds for a damaged file
        raise VolumeError(
            f"{path}: damaged or not a NIfTI file ({one_line(error)}). Copy or export it again."
        ) from error
    affine = np.asarray(qform if by_qform and qform is not None else image.affine, dtype=np.float64)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or sizes.min() <= 1e-3 or abs(np.linalg.det(affine[:3, :3] / sizes)) < 0.1:
        raise VolumeError(
            f"{path}: the affine is singular (voxel sizes {by_axis(sizes)} mm). Repair the header's sform/qform."
        )
    refuse_sheared(affine, path)
    voxels = checked_voxels(raw, path)
    if qform is not None and not by_qform:
        _refuse_two_places(voxels.shape, affine, qform, path)
    return voxels, affine, header


def checked_voxels(raw: NDArray[Any], path: Path) -> NDArray[np.float32]:
    """The voxels of one volume as float32 (X, Y, Z); further axes of length 1 are dropped.

    Raises:
        VolumeError: not three-dimensional, colour or complex, NaN or infinite voxels.
    """
    if raw.dtype.kind not in "iufb":
        raise VolumeError(f"{path}: colour or complex voxels. Export a magnitude image with one value per voxel.")
    while raw.ndim > 3 and raw.shape[-1] == 1:
        raw = raw[..., 0]
    if raw.ndim != 3 or min(raw.shape) < 2:
        raise VolumeError(f"{path}: shape {raw.shape} is not a 3D volume. Split a series into single volumes first.")
    with np.errstate(over="ignore"):  # becomes infinite, and is refused
        voxels = raw.astype(np.float32)
    if not np.isfinite(voxels).all():
        raise VolumeError(
            f"{path}: {int((~np.isfinite(voxels)).sum())} voxels are NaN or infinite. Mask or export again."
        )
    return voxels


def refuse_sheared(affine: NDArray[np.float64], path: Path) -> None:
    """Refuse axes that do not meet at right angles: nothing here resamples along sheared ones.

    Raises:
        VolumeError: two axes are further than :data:`RIGHT_ANGLE_DEGREES` from a right angle.
    """
    along = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    off = math.degrees(math.asin(min(float(np.abs(along.T @ along - np.eye(3)).max()), 1.0)))
    if off > RIGHT_ANGLE_DEGREES:
        raise VolumeError(
            f"{path}: the affine is sheared (two of its axes meet at {90 - off:.0f} degrees, not at 90). Resample the "
            "volume to a grid with right angles, or convert the original series again."
        )


def _refuse_two_places(
    shape: tuple[int, ...], affine: NDArray[np.float64], qform: NDArray[np.float64], path: Path
) -> None:
    """Refuse a header whose qform puts the volume elsewhere than its affine, which is the sform if there is one."""
    apart = _apart_mm(shape, affine, qform)
    if not apart <= TWO_PLACES_MM:
        raise VolumeError(
            f"{path}: the qform and the sform of its header disagree by up to {apart:.3g} mm. Find out which is right, "
            "and overwrite the other with it (in nibabel: image.set_qform(image.get_sform()), or the reverse)."
        )


def _apart_mm(shape: Sequence[int], one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """How far two affines put a corner of a volume from each other, at most."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(len(shape), -1).T
    places = [nib.affines.apply_affine(affine, corners) for affine in (one, other)]
    return float(np.linalg.norm(places[0] - places[1], axis=1).max())


def _check_header(header: nib.Nifti1Header, path: Path) -> None:
    """Refuse a header without a spacing or an orientation."""
    spacing = np.asarray(header["pixdim"][1:4], dtype=float)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise VolumeError(
            f"{path}: the spacing in its header is {by_axis(spacing)}, not three positive numbers. "
            "Convert the original series again."
        )
    if int(header["qform_code"]) <= 0 and int(header["sform_code"]) <= 0:
        raise VolumeError(
            f"{path}: its header has no orientation (qform and sform code 0), so up and down are unknown. "
            "Convert the original series again."
        )


def refuse_constant(image: NDArray[np.float32], path: Path) -> None:
    """Refuse a volume without an image in it (:class:`VolumeError`)."""
    if image.min() == image.max():
        raise VolumeError(f"{path}: all voxels are {image.min():g}, there is no image in it. Export it again.")


def refuse_other_grid(
    label: tuple[tuple[int, ...], NDArray[np.float64]],
    image: tuple[tuple[int, ...], NDArray[np.float64]],
    label_path: str | Path,
    image_path: str | Path,
) -> None:
    """Refuse a label that does not lie on the voxels of its image.

    Args:
        label, image: shape, and affine (4, 4) voxel index to RAS mm.

    Raises:
        VolumeError: another shape, or a corner more than 0.1 mm away from the image's; names both files.
    """
    if tuple(label[0]) != tuple(image[0]):
        raise VolumeError(
            f"{label_path}: another grid than its image {image_path}: shape {tuple(label[0])}, but the image has "
            f"{tuple(image[0])}. Pair the right files."
        )
    apart = _apart_mm(image[0], label[1], image[1])
    if not apart < SAME_PLACE_MM:
        raise VolumeError(
            f"{label_path}: another grid than its image {image_path}: up to {apart:.3g} mm away from it. Pair the "
            "right files, or resample the label to the image."
        )


def read_label(
    path: str | Path, image_path: str | Path, shape: tuple[int, ...], affine: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Read the label of an image: on the grid of the image, values 0 to 3 only.

    Raises:
        VolumeError: see :func:`read_volume`, :func:`refuse_other_grid`; or a value that is not a class.
    """
    voxels, label_affine = read_volume(path)
    refuse_other_grid((voxels.shape, label_affine), (tuple(shape), affine), path, image_path)
    values = np.unique(voxels)
    unknown = [float(v) for v in values if v not in range(len(CLASS_NAMES))]
    if unknown:
        raise VolumeError(
            f"{path}: unknown label values {unknown[:5]}; expected 0 background, 1 femoral, 2 tibial, 3 patellar."
        )
    return voxels.astype(np.uint8)


def middle_mm(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean place of a mask in RAS mm; NaN of an empty one, which is neither above nor below anything."""
    found = np.argwhere(mask)
    return np.asarray(nib.affines.apply_affine(affine, found.mean(axis=0) if len(found) else np.full(3, np.nan)))


def to_ras(array: NDArray[np.generic], affine: NDArray[np.float64]) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """Permute and flip axes so that they run closest to left-right, posterior-anterior, inferior-superior."""
    turn = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(array, turn)
    return np.ascontiguousarray(turned), affine @ nib.orientations.inv_ornt_aff(turn, array.shape)


def voxel_sizes_mm(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel sizes in mm along the array axes: the lengths of the columns of the affine."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def extent_mm(shape: Sequence[int], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far a volume stored in any orientation reaches along the axes nearest to RAS, in mm (3,), edge to edge."""
    along = nib.orientations.io_orientation(affine)[:, 0].astype(int)
    out = np.zeros(3)
    out[along] = np.asarray(voxel_sizes_mm(affine)) * np.asarray(shape)
    return out


def axis_weights(n_in: int, n_out: int, ratio: float, shift: float = 0.0) -> torch.Tensor:
    """Resampling along one axis: (n_out, n_in) shares of the source voxels, both axes centred on each other.

    Args:
        n_in: source voxels.
        n_out: target voxels.
        ratio: target voxel size over source voxel size. Above 1: exact area average, otherwise linear interpolation.
        shift: move the target by this many source voxels.

    A row sums to the part of its voxel that the source covers: 1 inside, 0 outside.
    """
    centre = (torch.arange(n_out, dtype=torch.float64) - (n_out - 1) / 2) * ratio + (n_in - 1) / 2 + shift
    source = torch.arange(n_in, dtype=torch.float64)
    if ratio > 1:
        low = torch.maximum(centre[:, None] - ratio / 2, source[None] - 0.5)
        high = torch.minimum(centre[:, None] + ratio / 2, source[None] + 0.5)
        weights = (high - low).clamp(min=0) / ratio
    else:
        inside = (centre > -0.5 - 1e-9) & (centre < n_in - 0.5 + 1e-9)
        held = centre.clamp(0, n_in - 1)
        weights = (1 - (held[:, None] - source[None]).abs()).clamp(min=0) * inside[:, None]
    return weights.float()


def resample(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Apply one matrix per axis to the last three axes: (..., D, H, W) -> (..., D', H', W')."""
    x = torch.einsum("ad,...dhw->...ahw", weights[0], x)
    x = torch.einsum("bh,...dhw->...dbw", weights[1], x)
    return torch.einsum("cw,...dhw->...dhc", weights[2], x)


def to_grid(
    array: NDArray[np.generic],
    affine: NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, int, int] | None = None,
    fill: float | None = None,
    centre_mm: NDArray[np.float64] | None = None,
) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Bring an image to RAS order at a spacing, around the middle of its field of view or another place.

    Args:
        array: (X, Y, Z) voxels in any orientation.
        affine: (4, 4) voxel index to RAS mm.
        spacing_mm: target voxel sizes.
        shape: target shape; the whole field of view when not given.
        fill: value beyond the image; its smallest value when not given.
        centre_mm: where the middle of the grid shall lie, in RAS mm. Where the field of view is larger than the grid,
            the grid stays inside it; where it is not, it lies round the middle.

    Returns:
        float32 tensor (D, H, W) and the affine of the grid.
    """
    turned, ras = to_ras(np.asarray(array, dtype=np.float32), affine)
    sizes = voxel_sizes_mm(ras)
    if shape is None:
        d, h, w = (max(round(n * s / t), 2) for n, s, t in zip(turned.shape, sizes, spacing_mm, strict=True))
        shape = (d, h, w)
    step = np.asarray(spacing_mm) / np.asarray(sizes)
    spare = np.maximum((np.asarray(turned.shape) - step * np.asarray(shape)) / 2, 0)  # source voxels on either side
    middle = (np.asarray(turned.shape) - 1) / 2
    shift = np.zeros(3)
    if centre_mm is not None:
        shift = np.clip(nib.affines.apply_affine(np.linalg.inv(ras), centre_mm) - middle, -spare, spare)
    weights = [axis_weights(*one) for one in zip(turned.shape, shape, step.tolist(), shift.tolist(), strict=True)]
    x = torch.from_numpy(turned)
    low = float(x.min()) if fill is None else fill
    cover = torch.einsum("d,h,w->dhw", *[w.sum(dim=1) for w in weights])
    grid = resample(x - low, weights) / cover.clamp(min=0.25) + low
    start = middle + shift - step * (np.asarray(shape) - 1) / 2
    grid_affine = ras @ np.vstack([np.column_stack([np.diag(step), start]), [0, 0, 0, 1]])
    return grid.float(), grid_affine


def label_to_grid(
    label: NDArray[np.uint8],
    affine: NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, int, int] | None = None,
    centre_mm: NDArray[np.float64] | None = None,
) -> torch.Tensor:
    """Bring a label map to the grid of :func:`to_grid`: every class's share is resampled, the largest share wins."""
    shares = [
        to_grid((label == c).astype(np.float32), affine, spacing_mm, shape, 0.0, centre_mm)[0]
        for c in range(1, len(CLASS_NAMES))
    ]
    stack = torch.stack(shares)
    return torch.cat([1 - stack.sum(dim=0, keepdim=True), stack]).argmax(dim=0)


def from_grid(
    probabilities: torch.Tensor,
    grid_affine: NDArray[np.float64],
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
) -> NDArray[np.uint8]:
    """Undo :func:`to_grid`: class probabilities on the grid to a label map on the volume's own grid.

    Args:
        probabilities: (C, D, H, W) on the grid.
        grid_affine: affine of the grid, with axes along those of the volume.
        shape: shape of the volume on disk.
        affine: affine of the volume on disk.

    Returns:
        uint8 (X, Y, Z) in the order of the file; background where the grid does not reach.
    """
    turn = nib.orientations.io_orientation(affine)
    ras = affine @ nib.orientations.inv_ornt_aff(turn, shape)
    ras_shape = [0, 0, 0]
    for axis, (target, _) in enumerate(turn):
        ras_shape[int(target)] = shape[axis]
    between = np.linalg.inv(grid_affine) @ ras  # voxel index (RAS order) -> grid index
    weights = []
    for axis in range(3):
        n_in, n_out, ratio = probabilities.shape[axis + 1], ras_shape[axis], float(between[axis, axis])
        centre = ratio * (n_out - 1) / 2 + between[axis, 3]
        weights.append(axis_weights(n_in, n_out, ratio, shift=float(centre - (n_in - 1) / 2)))
    foreground = resample(probabilities[1:].float(), weights)
    background = 1 - foreground.sum(dim=0, keepdim=True)
    voted = torch.cat([background, foreground]).argmax(dim=0).to(torch.uint8).numpy()
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn)
    return np.ascontiguousarray(nib.orientations.apply_orientation(voted, back))


def z_score(image: torch.Tensor) -> torch.Tensor:
    """(x - mean) / standard deviation over the last three axes: (..., D, H, W)."""
    mean = image.mean(dim=(-3, -2, -1), keepdim=True)
    return (image - mean) / image.std(dim=(-3, -2, -1), keepdim=True).clamp(min=1e-6)


@dataclass
class Case:
    """One volume on the common grid, with the way back to its own."""

    name: str
    image: torch.Tensor  # (1, D, H, W) float32, z-scored
    label: torch.Tensor | None  # (D, H, W) int64 on the grid
    grid_affine: NDArray[np.float64]
    native_label: NDArray[np.uint8] | None  # (X, Y, Z) in the order of the file
    native_shape: tuple[int, int, int]
    native_affine: NDArray[np.float64]
    labelled_classes: tuple[int, ...]


def load_case(item: Item, settings: Settings) -> Case:
    """Load one item of a cohort onto the grid of ``settings``.

    Raises:
        FileNotFoundError, VolumeError: see :func:`read_volume` and :func:`read_label`; also a constant image.
    """
    voxels, affine = read_volume(item.image)
    refuse_constant(voxels, item.image)
    grid, grid_affine = to_grid(voxels, affine, settings.grid_spacing_mm, settings.grid_shape)
    native = label = None
    if item.label is not None:
        native = read_label(item.label, item.image, voxels.shape, affine)
        label = label_to_grid(native, affine, settings.grid_spacing_mm, settings.grid_shape)
    return Case(
        name=item.name,
        image=z_score(grid)[None],
        label=label,
        grid_affine=grid_affine,
        native_label=native,
        native_shape=(voxels.shape[0], voxels.shape[1], voxels.shape[2]),
        native_affine=affine,
        labelled_classes=item.labelled_classes,
    )


def to_native(probabilities: torch.Tensor, case: Case) -> NDArray[np.uint8]:
    """Class probabilities (C, D, H, W) of a case -> label map on the case's own grid."""
    return from_grid(probabilities, case.grid_affine, case.native_shape, case.native_affine)


@dataclass
class SiteData:
    """Everything a site needs in memory, loaded once."""

    name: str
    labelled_images: torch.Tensor  # (L, 1, D, H, W)
    labels: torch.Tensor  # (L, D, H, W) int64
    unlabelled_images: torch.Tensor  # (U, 1, D, H, W)
    validation: list[Case]
    test: list[Case]
    labelled_classes: tuple[int, ...]  # that some labelled volume holds
    volume_classes: tuple[tuple[int, ...], ...] | None = None  # of each labelled volume; None: the same for all

    @property
    def classes_by_volume(self) -> tuple[tuple[int, ...], ...]:
        """The classes that were drawn in each labelled volume; the others are unknown there, not background."""
        return self.volume_classes or (self.labelled_classes,) * len(self.labelled_images)

    @property
    def class_shares(self) -> dict[int, float]:
        """The share of the labelled volumes in which a class was drawn, of the classes that are not in all."""
        drawn = self.classes_by_volume
        shares = {c: sum(c in own for own in drawn) / max(len(drawn), 1) for c in CARTILAGES}
        return {c: share for c, share in shares.items() if share < 1}

    @property
    def examples(self) -> int:
        """n_k, the weight of the site in federated averaging: labelled + unlabelled volumes."""
        return len(self.labelled_images) + len(self.unlabelled_images)

    def to(self, device: torch.device) -> SiteData:
        """The same site with its training volumes on a device; validation and test volumes stay on the CPU."""
        tensors = ("labelled_images", "labels", "unlabelled_images")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


def load_site(site: Site, settings: Settings) -> SiteData:
    """Load a site onto the grid.

    Raises:
        VolumeError: the site has no labelled training volume, or a volume is unusable.
    """
    if not site.training:
        raise VolumeError(
            f"{site.folder}: no labelled training volume. Add label files to labelsTr, or leave the site out."
        )
    labelled = [load_case(item, settings) for item in site.training]
    unlabelled = [load_case(item, settings) for item in site.unlabelled]
    empty = [case.name for case in labelled if case.label is None or not bool((case.label > 0).any())]
    if empty:
        raise VolumeError(f"{site.folder}: the label of {empty[0]} is empty on the grid. Check the pair of files.")
    blank = torch.zeros((0, 1, *settings.grid_shape))
    return SiteData(
        name=site.name,
        labelled_images=torch.stack([case.image for case in labelled]),
        labels=torch.stack([case.label for case in labelled if case.label is not None]),
        unlabelled_images=torch.stack([case.image for case in unlabelled]) if unlabelled else blank,
        validation=[load_case(item, settings) for item in site.validation],
        test=[load_case(item, settings) for item in site.test],
        labelled_classes=tuple(sorted({c for item in site.training for c in item.labelled_classes})),
        volume_classes=tuple(item.labelled_classes for item in site.training),
    )


def _uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Uniform numbers in [-1, 1)."""
    return torch.rand(shape, generator=generator) * 2 - 1


def move(
    images: torch.Tensor,
    labels: torch.Tensor,
    mirrored: torch.Tensor,
    zoom: torch.Tensor,
    angle: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror, scale, rotate in the sagittal plane and shift: images linearly, labels by the nearest voxel.

    Slices and plane do not mix, so that one 2D sampling with the slices as channels and one small matrix along them do
    what a 3D sampling does, four times faster. In-plane voxels are taken as square.

    Args:
        images: (B, 1, D, H, W). Beyond the volume its border is repeated.
        labels: (B, D, H, W) int64. Beyond the volume there is background.
        mirrored: (B,) bool, left and right swapped first.
        zoom: (B, 3) size of what is seen over what is shown, along D, H, W: above 1 a knee looks smaller.
        angle: (B,) radians.
        shift: (B, 3) of the field of view along D, H, W, as parts of half its size.
    """
    batch, _, d, h, w = images.shape
    cos, sin = angle.cos(), angle.sin()
    plane = torch.zeros(batch, 2, 3, device=images.device)  # affine_grid orders its axes (W, H), each from -1 to 1
    plane[:, 0, 0], plane[:, 0, 1] = cos * zoom[:, 2], -sin * zoom[:, 1] * h / w
    plane[:, 1, 0], plane[:, 1, 1] = sin * zoom[:, 2] * w / h, cos * zoom[:, 1]
    plane[:, 0, 2], plane[:, 1, 2] = shift[:, 2], shift[:, 1]
    where = torch.nn.functional.affine_grid(plane, [batch, 1, h, w], align_corners=False)
    sample = torch.nn.functional.grid_sample
    seen = sample(images[:, 0], where, mode="bilinear", padding_mode="border", align_corners=False)
    classes = sample(labels.float(), where, mode="nearest", align_corners=False).long()

    slices = torch.arange(d, device=images.device)
    centre = (2 * slices + 1) / d - 1
    centre = zoom[:, :1] * centre + shift[:, :1]
    centre = torch.where(mirrored[:, None], -centre, centre)
    at = ((centre + 1) * d - 1) / 2  # (B, D) slice to read, in voxels
    weights = (1 - (at.clamp(0, d - 1)[:, :, None] - slices).abs()).clamp(min=0)
    seen = torch.bmm(weights, seen.flatten(2)).reshape(images.shape)
    nearest = at.round()
    inside = (nearest >= 0) & (nearest < d)
    classes = (
        classes[torch.arange(batch, device=images.device)[:, None], nearest.clamp(0, d - 1).long()]
        * inside[:, :, None, None]
    )
    return seen, classes


def bend(images: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Gamma correction: intensities (B, 1, D, H, W) to the power ``gamma`` (B,) between their own ends, which stay."""
    low, high = images.amin((1, 2, 3, 4), keepdim=True), images.amax((1, 2, 3, 4), keepdim=True)
    span = (high - low).clamp(min=1e-6)
    return ((images - low) / span).pow(gamma[:, None, None, None, None]) * span + low


def augment(
    images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random geometry and contrast for a batch, drawn from ``generator``.

    Half of the volumes are mirrored left to right; all are scaled (up to 10 %), moved (up to 5 % of the field of view)
    and rotated in the sagittal plane (up to 8 degrees); then gamma (0.8 to 1.25), gain, offset and noise. Left and
    right knees stay in a cohort as they were scanned: mirroring is how a network learns both from either.

    Args:
        images: (B, 1, D, H, W) z-scored.
        labels: (B, D, H, W) int64, on the device of the images.
        generator: on the CPU, so that every device sees the same draws.
    """
    batch, device = len(images), images.device
    mirrored = (torch.rand(batch, generator=generator) < 0.5).to(device)
    zoom = (1 + 0.1 * _uniform(generator, batch, 3)).to(device)
    angle = (math.radians(8) * _uniform(generator, batch)).to(device)
    shift = (0.1 * _uniform(generator, batch, 3)).to(device)
    images, labels = move(images, labels, mirrored, zoom, angle, shift)
    images = bend(images, (math.log(1.25) * _uniform(generator, batch)).exp().to(device))
    gain = (1 + 0.2 * _uniform(generator, batch, 1, 1, 1, 1)).to(device)
    offset = (0.2 * _uniform(generator, batch, 1, 1, 1, 1)).to(device)
    noise = 0.1 * torch.rand(1, generator=generator) * torch.randn(images.shape, generator=generator)
    return images * gain + offset + noise.to(device), labels
