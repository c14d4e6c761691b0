"""Real knee sets as they lie on disk: every one becomes the same readings, and those a site (:mod:`sites`).

The course ships none of these sets. Whatever a set calls its classes, a reading has 0 background, 1 femoral, 2 tibial,
3 patellar cartilage, and says which of the three its source drew: what was not drawn is unknown, never background.
Voxels stay as they are stored; the affine says where they lie. Nothing is read before ``load`` is called.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from nibabel.processing import resample_from_to
from numpy.typing import NDArray

from fedkd_utils import site_folder
from fedkd_utils.errors import VolumeError, one_line
from fedkd_utils.formats import hdf5_keys, holds_no_image, is_dicom, read_dicom, read_hdf5, read_metaimage
from fedkd_utils.settings import CARTILAGES
from fedkd_utils.transforms import (
    checked_voxels,
    middle_mm,
    read_nifti,
    read_volume,
    refuse_other_grid,
)

#: Voxels (X, Y, Z) float32 or None, classes (X, Y, Z) uint8 or None, affine (4, 4) voxel -> RAS mm.
Loaded = tuple[NDArray[np.float32] | None, NDArray[np.uint8] | None, NDArray[np.float64]]

NO_PATELLA = (1, 2)

#: So many DICOM files of a folder are looked at for an image: reports may come first.
LOOKED_AT = 500


@dataclass(frozen=True)
class Reading:
    """One volume of a set. ``subject`` is the same for all visits and both knees of a person."""

    name: str
    subject: str
    split: str  # "training", "validation" or "test"; "" where the set does not say
    classes: tuple[int, ...]  # drawn by the source; empty when there is no label
    path: Path  # the file to name when something is wrong
    load: Callable[[], Loaded]


# --- labels ------------------------------------------------------------


def _relabel(raw: NDArray[Any], mapping: Mapping[int, int], path: Path) -> NDArray[np.uint8]:
    """Class numbers of a set -> those of the course.

    Raises:
        VolumeError: a value that the set does not have.
    """
    values = np.unique(raw)
    unknown = [float(v) for v in values if v not in mapping]
    if unknown:
        raise VolumeError(
            f"{path}: unknown label values {unknown[:5]}; this set has {sorted(mapping)}. Is it this set?"
        )
    out = np.zeros(raw.shape, np.uint8)
    for value, c in mapping.items():
        if c:
            out[raw == value] = c
    return out


def _one_hot(channels: NDArray[Any], mapping: Mapping[int, int], path: Path) -> NDArray[np.uint8]:
    """(X, Y, Z, channels) of 0 and 1 -> class numbers of the course (X, Y, Z).

    Raises:
        VolumeError: another number of channels than six, or values other than 0 and 1.
    """
    if channels.ndim != 4 or channels.shape[-1] != 6 or not np.isin(channels, (0, 1)).all():
        raise VolumeError(f"{path}: masks of shape {channels.shape} are not six channels of 0 and 1. Fetch it again.")
    out = np.zeros(channels.shape[:3], np.uint8)
    for channel, c in mapping.items():
        out[channels[..., channel] > 0] = c
    return out


def _affine(order: str, spacing: Sequence[float], shape: Sequence[int]) -> NDArray[np.float64]:
    """The affine of a volume without a stored pose, from its axis codes ("IPR": down, back, right); centred on 0."""
    codes = "LPI", "RAS"
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(order):
        world = [i for i in range(3) if code in (codes[0][i], codes[1][i])][0]
        affine[world, axis] = spacing[axis] * (1 if code in codes[1] else -1)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape[:3]) - 1) / 2)
    return affine


# --- the sets ------------------------------------------------------------


def _pair(image: Path | None, label: Path | None, mapping: Mapping[int, int]) -> Loaded:
    """A NIfTI image and its label, or one of them."""
    voxels, affine = read_volume(image) if image is not None else (None, np.eye(4))
    classes = None
    if label is not None:
        raw, place = read_volume(label)
        if voxels is not None and image is not None:
            refuse_other_grid((raw.shape, place), (voxels.shape, affine), label, image)
        classes, affine = _relabel(raw, mapping, label), place if voxels is None else affine
    return voxels, classes, affine


def _site(folder: Path, mapping: Mapping[int, int], classes: tuple[int, ...] | None = None) -> list[Reading]:
    """A folder in the layout of the Decathlon or nnU-Net."""
    site = site_folder.open_site(folder)
    out = []
    for split in (*site_folder.SPLITS, "left_out"):
        for item in getattr(site, split):
            own = () if item.label is None else classes or item.labelled_classes
            load = partial(_pair, item.image, item.label, mapping)
            part = {"unlabelled": "training", "left_out": "test"}.get(split, split)
            out.append(Reading(item.name, str(item.subject), part, own, item.image, load))
    return out


def nifti_site(folder: Path) -> list[Reading]:
    """The course's own layout: ``imagesTr``, ``labelsTr``, ``imagesTs``, ``labelsTs``, ``dataset.json``."""
    return _site(folder, {c: c for c in (0, *CARTILAGES)})


def oaizib_cm(folder: Path) -> list[Reading]:
    """OAIZIB-CM (CC-BY-NC-4.0): nnU-Net layout; 1 femur, 2 FC, 3 tibia, 4 medial and 5 lateral TC; no patella.

    One knee a person, so ``subInfo`` and ``kneeSideInfo`` are not needed. The numbers are its own: who they are in
    OAI-ZIB, whose masks these are, cannot be seen (:data:`FROM_OAI`).
    """
    return _site(folder, {0: 0, 1: 0, 2: 1, 3: 0, 4: 2, 5: 2}, NO_PATELLA)


#: Field of view 140 mm over 384 voxels; the 0.3125 mm of one toolkit is wrong.
IWOAI_SPACING_MM = (0.3646, 0.3646, 0.7)


def iwoai(folder: Path) -> list[Reading]:
    """IWOAI 2019: ``{train,valid,test}/*_NNN_V0{0,1}.im`` and ``.seg``, HDF5; V00 and V01 are visits of one subject.

    Channels 0 FC, 1 and 2 TC, 3 PC, menisci. Neither spacing nor pose is stored: 0.3646 x 0.3646 x 0.7 mm, and axes
    down, back, right as the toolkit of the challenge has them.
    """
    mapping = {0: 1, 1: 2, 2: 2, 3: 3}

    def load(image: Path, label: Path | None) -> Loaded:
        voxels = checked_voxels(read_hdf5(image, "data"), image)
        classes = None if label is None else _one_hot(read_hdf5(label, "data"), mapping, label)
        affine = _affine("IPR", IWOAI_SPACING_MM, voxels.shape)
        if classes is not None and label is not None:  # neither stores a pose: only the shape can differ
            refuse_other_grid((classes.shape, affine), (voxels.shape, affine), label, image)
        return voxels, classes, affine

    out = []
    for part, split in (("train", "training"), ("valid", "validation"), ("test", "test")):
        for image in sorted((folder / part).glob("*.im")):
            label = image.with_suffix(".seg")
            known = label if label.is_file() else None
            subject = re.sub(r"_V\d+$", "", image.stem)
            own = CARTILAGES if known else ()
            out.append(Reading(image.stem, f"iwoai/{subject}", split, own, image, partial(load, image, known)))
    return out


SKM_TEA_SPACING_MM = (0.3125, 0.3125, 0.8)


def skm_tea(folder: Path) -> list[Reading]:
    """SKM-TEA: ``image_files/MTR_NNN.h5`` with ``echo1``, ``echo2``, ``seg``; splits and directions in annotations.

    The image is the root of the sum of squares of the two echoes, as for DESS. Channel 0 is the **patella**, 1 FC, 2
    and 3 TC. Masks lie in the HDF5 file or in ``segmentation_masks/*-track`` (channel + 1). Where the annotations give
    the slices as RL they are flipped, so that all run from left to right. Without annotations nobody can know that, or
    who is who, so a scan that they do not describe is refused when it is loaded, and a set without any at once.

    Raises:
        VolumeError: no annotations, or damaged ones.
    """
    root = folder / "v1-release" if (folder / "v1-release").is_dir() else folder
    mapping = {0: 3, 1: 1, 2: 2, 3: 2}
    facts: dict[str, tuple[str, str, bool]] = {}
    notes = sorted({*folder.glob("annotations/*/*.json"), *root.glob("annotations/*/*.json")})
    if not notes:
        raise VolumeError(
            f"{root / 'annotations'}: no annotations (v1.0.0/train.json, val.json, test.json), so which slices run "
            "from right to left, the splits and the people are unknown. Put the set's annotations there."
        )
    for file in notes:
        split = {"train": "training", "val": "validation", "test": "test"}.get(file.stem, "")
        try:
            for entry in json.loads(file.read_text(encoding="utf-8"))["images"]:
                name = str(entry.get("scan_id") or Path(str(entry["file_name"])).stem)
                facts[name] = (split, str(entry["subject_id"]), "RL" in entry["orientation"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VolumeError(
                f"{file}: not an annotation file of SKM-TEA ({one_line(error)}). Fetch it again."
            ) from error

    def load(path: Path, mask: Path | None, flipped: bool | None) -> Loaded:
        if flipped is None:
            raise VolumeError(
                f"{path}: not in the set's annotations, so whether its slices run from right to left is unknown. Fetch "
                "the annotations again, or leave the file out."
            )
        echoes = [checked_voxels(read_hdf5(path, key), path) for key in ("echo1", "echo2")]
        if echoes[0].shape != echoes[1].shape:
            raise VolumeError(f"{path}: the two echoes differ in shape. Fetch it again.")
        voxels = np.hypot(*echoes).astype(np.float32)
        classes = None
        if mask == path:
            classes = _one_hot(read_hdf5(path, "seg"), mapping, path)
        elif mask is not None:
            classes = _relabel(read_volume(mask)[0], {0: 0, **{k + 1: c for k, c in mapping.items()}, 5: 0, 6: 0}, mask)
        affine = _affine("IPR", SKM_TEA_SPACING_MM, voxels.shape)
        if classes is not None and mask is not None:  # the image stores no pose: only the shape can differ
            refuse_other_grid((classes.shape, affine), (voxels.shape, affine), mask, path)
        if flipped:
            voxels = voxels[..., ::-1]
            classes = None if classes is None else classes[..., ::-1]
        return voxels, classes, affine

    out = []
    for path in sorted((root / "image_files").glob("*.h5")):
        split, subject, flipped = facts.get(path.stem, ("", path.stem, None))
        masks = [root / "segmentation_masks" / t / f"{path.stem}.nii.gz" for t in ("dicom-track", "raw-data-track")]
        try:
            own = path if "seg" in hdf5_keys(path) else next((mask for mask in masks if mask.is_file()), None)
        except VolumeError:
            own = None  # loading says so
        classes = CARTILAGES if own else ()
        out.append(Reading(path.stem, f"skm-tea/{subject}", split, classes, path, partial(load, path, own, flipped)))
    return out


def oai_zib(folder: Path) -> list[Reading]:
    """OAI-ZIB: ``segmentation_masks/<id>.segmentation_masks.mhd``, with the OAI series of each in ``dicom/<id>``.

    1 femur, 2 FC, 3 tibia, 4 TC; no patella. Its people may be those of other sets (:data:`FROM_OAI`). The masks carry
    no pose: axis 0 is flipped, the axis with as many entries as there are slices is taken as theirs, and the geometry
    is that of the series. A result with the femur below the tibia is refused. (In the folder ``classification`` the
    tibia is 2; it is not read.)
    """

    def load(mask: Path, series: Path) -> Loaded:
        voxels, affine = read_dicom(series)
        raw = read_metaimage(mask, posed=False)[0].T[::-1]  # (z, y, x), the order in which the flip is meant
        slices = voxels.shape[2]
        axis = [i for i in range(3) if raw.shape[i] == slices and sorted(raw.shape) == sorted(voxels.shape)]
        if not axis:
            raise VolumeError(
                f"{mask}: shape {raw.shape}, but the series {series} has {voxels.shape}. Pair the right ones."
            )
        rows = np.moveaxis(raw, axis[0], 0)  # (slices, rows, columns)
        raw = rows.transpose(2, 1, 0)
        if raw.shape != voxels.shape:
            raise VolumeError(f"{mask}: rows and columns do not fit the series {series}. Pair the right ones.")
        if middle_mm(raw == 1, affine)[2] < middle_mm(raw == 3, affine)[2]:
            raise VolumeError(f"{mask}: on the series {series} the femur lies below the tibia. Pair the right ones.")
        return voxels, _relabel(raw, {0: 0, 1: 0, 2: 1, 3: 0, 4: 2}, mask), affine

    out = []
    for mask in sorted((folder / "segmentation_masks").glob("*.segmentation_masks.mhd")):
        name = mask.name.split(".")[0]
        load_one = partial(load, mask, folder / "dicom" / name)
        out.append(Reading(f"oai_{name}", f"oai/{name}", "", NO_PATELLA, mask, load_one))
    return out


def ski10(folder: Path) -> list[Reading]:
    """SKI10: ``image-NNN.mhd`` with ``labels-NNN.mhd``; 1 femur, 2 FC, 3 tibia, 4 TC; no patella."""

    def load(image: Path, label: Path | None) -> Loaded:
        raw, affine = read_metaimage(image)
        classes = None
        if label is not None:
            drawn, place = read_metaimage(label)
            refuse_other_grid((drawn.shape, place), (raw.shape, affine), label, image)
            classes = _relabel(drawn, {0: 0, 1: 0, 2: 1, 3: 0, 4: 2}, label)
        return checked_voxels(raw, image), classes, affine

    out = []
    for image in sorted(folder.glob("image-*.mhd")):
        label = image.with_name(image.name.replace("image-", "labels-"))
        known = label if label.is_file() else None
        own = NO_PATELLA if known else ()
        name = f"ski10_{image.stem.removeprefix('image-')}"
        out.append(Reading(name, f"ski10/{name}", "", own, image, partial(load, image, known)))
    return out


#: The binary masks of Open Knee(s): a part of the file's name, and the class.
OPEN_KNEES_MASKS = (("_FMC_AGS", 1), ("_TBC-M_AGS", 2), ("_TBC-L_AGS", 2), ("_PTC_AGS", 3))


def open_knees(folder: Path) -> list[Reading]:
    """Open Knee(s) (MRI CC BY 4.0, masks CC BY-SA 3.0): ``mri/mri-oksNNN/*.nii``, one binary mask per tissue.

    Every series of a knee is a view of the same subject with the same masks, brought to its grid by their own
    geometry (they may be cropped): that of the qform, on which the set is aligned, where a file has one, and of the
    sform otherwise. What has no mask was not drawn.
    """

    def load(image: Path, masks: Mapping[int, Sequence[Path]]) -> Loaded:
        voxels, affine, _ = read_nifti(image, by_qform=True)
        classes = np.zeros(voxels.shape, np.uint8)
        for c, paths in masks.items():
            for path in paths:
                raw, place, _ = read_nifti(path, by_qform=True)
                if not np.isin(raw, (0, raw.max())).all():
                    raise VolumeError(f"{path}: not a mask of two values. Fetch it again.")
                shares = nib.Nifti1Image((raw > 0).astype(np.float32), place)
                moved = resample_from_to(shares, (voxels.shape, affine), order=1)
                classes[np.asarray(moved.dataobj) >= 0.5] = c
        return voxels, classes, affine

    out = []
    for knee in sorted(path for path in (folder / "mri").glob("mri-oks*") if path.is_dir()):
        subject = knee.name.removeprefix("mri-")
        found = sorted(path for path in folder.rglob(f"{subject}_*.nii*") if "_AGS" in path.name)
        masks = {c: [p for p in found for part, k in OPEN_KNEES_MASKS if k == c and part in p.name] for c in CARTILAGES}
        masks = {c: paths for c, paths in masks.items() if paths}
        for image in sorted(path for path in knee.glob("*.nii*") if path not in found):
            name = f"{subject}_{image.name.removesuffix('.gz').removesuffix('.nii')}"
            out.append(Reading(name, f"oks/{subject}", "", tuple(masks), image, partial(load, image, masks)))
    return out


#: 1 femur, 3 tibia, 5 patella, 7 to 9 lesions of bone.
QUEENSLAND = {0: 0, 1: 0, 2: 1, 3: 0, 4: 2, 5: 0, 6: 3, 7: 0, 8: 0, 9: 0}


def oai_queensland(folder: Path) -> list[Reading]:
    """Label maps of OAI knees (Queensland) without images: ``<OAI id>[_00m|_96m]_*Cartilage*.nii.gz``."""
    out = []
    for path in sorted(folder.glob("*Cartilage*.nii.gz")):
        subject = path.name.split("_")[0]
        name = path.name.removesuffix(".nii.gz")
        load = partial(_pair, None, path, QUEENSLAND)
        out.append(Reading(name, f"oai/{subject}", "", CARTILAGES, path, load))
    return out


def dicom_folder(folder: Path) -> list[Reading]:
    """One DICOM series in every sub-folder (or in the folder itself), without labels.

    Series with the same PatientID are the same person, known by a number that is made of it: a word that was put in
    the place of every ID makes one person of all. A series without one is a person of its own. Hospitals count their
    patients apart, so people of two sites are never the same.
    """

    def load(path: Path) -> Loaded:
        voxels, affine = read_dicom(path)
        return voxels, None, affine

    found = [path for path in (folder, *sorted(folder.rglob("*"))) if path.is_dir() and _first_image(path) is not None]
    return [
        Reading(
            "_".join(p.relative_to(folder).parts) or site_folder.name_of(p),
            _patient(folder, p),
            "",
            (),
            p,
            partial(load, p),
        )
        for p in found
    ]


def _first_image(folder: Path) -> Path | None:
    """The first DICOM file of a folder that holds an image, or may; None in one of a DICOMDIR or reports only."""
    for number, path in enumerate(filter(is_dicom, sorted(folder.iterdir()))):
        try:
            with warnings.catch_warnings(action="ignore"):
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Rows", "SOPClassUID"])
                if number < LOOKED_AT and holds_no_image(header):
                    continue
        except Exception:  # loading says so
            pass
        return path
    return None


def _patient(folder: Path, series: Path) -> str:
    """The person of a series: a number made of its PatientID, which is shown nowhere itself; without one its own."""
    try:
        with warnings.catch_warnings(action="ignore"):
            header = pydicom.dcmread(str(_first_image(series)), stop_before_pixels=True, specific_tags=["PatientID"])
        name = str(header.get("PatientID") or "").strip()
    except Exception:  # damaged: loading says so
        name = ""
    if not name:
        return str(site_folder.own_number(folder, series.relative_to(folder).as_posix()))
    return f"dicom/{site_folder.name_of(folder)}/patient {site_folder.number_of(name)}"


#: By name: the reader, and what tells its layout from the others (the first that fits).
READERS: dict[str, tuple[Callable[[Path], list[Reading]], Callable[[Path], bool]]] = {
    "oaizib_cm": (oaizib_cm, lambda f: any(f.glob(site_folder.OAIZIB_CM))),
    "nifti": (nifti_site, lambda f: (f / "imagesTr").is_dir() or (f / "imagesTs").is_dir()),
    "iwoai": (iwoai, lambda f: any(f.glob("*/*_V0?.im"))),
    "skm_tea": (skm_tea, lambda f: any(f.glob("image_files/MTR_*.h5")) or any(f.glob("v1-release/image_files/*.h5"))),
    "oai_zib": (oai_zib, lambda f: any(f.glob("segmentation_masks/*.segmentation_masks.mhd"))),
    "ski10": (ski10, lambda f: any(f.glob("image-*.mhd"))),
    "open_knees": (open_knees, lambda f: any(f.glob("mri/mri-oks*"))),
    "oai_queensland": (oai_queensland, lambda f: any(f.glob("*Cartilage*.nii.gz"))),
    "dicom": (dicom_folder, lambda f: bool(dicom_folder(f))),
}


#: Layouts of label maps without images.
WITHOUT_IMAGES = ("oai_queensland",)

#: Sets of knees of the Osteoarthritis Initiative, where one person may be in several. OAI-ZIB and the Queensland maps
#: keep the Initiative's numbers, so that this is seen; OAIZIB-CM has numbers of its own.
FROM_OAI = ("oaizib_cm", "oai_zib", "oai_queensland")


def maybe_shared(layouts: Mapping[str, str]) -> str | None:
    """A warning where sites may hold the same people under other numbers; None where that cannot be.

    Args:
        layouts: of the sites, by name.
    """
    alike = {site: name for site, name in layouts.items() if name in FROM_OAI}
    if len(alike) < 2 or set(alike.values()) <= {"oai_zib", "oai_queensland"}:
        return None
    return (
        f"{', '.join(alike)}: all from the Osteoarthritis Initiative, and not all with its numbers, so the same people "
        "may be in several of them. Compare the sets' own lists (subInfo of OAIZIB-CM), or keep to one of them."
    )


def layout(folder: str | Path) -> str | None:
    """The name of the reader whose layout a folder has; None when it has none."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    return next((name for name, (_, fits) in READERS.items() if fits(folder)), None)


def read_set(folder: str | Path) -> list[Reading]:
    """The volumes of a set in any layout of :data:`READERS`; nothing is loaded yet.

    Raises:
        VolumeError: a folder in no known layout, or no volume in it.
        CohortError: see :func:`site_folder.open_site`.
    """
    folder = Path(folder)
    name = layout(folder)
    if name is None:
        raise VolumeError(
            f"{folder}: in no layout that is known here. Put images in imagesTr and labels in labelsTr, or see "
            f"{', '.join(READERS)}."
        )
    found = READERS[name][0](folder)
    if not found:
        raise VolumeError(f"{folder}: no volume of {name} in it. Check the folder against the set's layout.")
    return found
