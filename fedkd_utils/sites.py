"""A reader's own hospitals: one folder per site, inspected before training, and brought to the common grid."""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import html
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fedkd_utils import cohorts, figures, readers, segment, transforms
from fedkd_utils.cohorts import Cohort, Site
from fedkd_utils.files import write_atomically
from fedkd_utils.readers import Loaded, Reading
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES, Settings
from fedkd_utils.transforms import VolumeError

#: The site that teaches, where there is one.
REPOSITORY = "repository"

#: What an adult knee may have, in ml: wide, to find wrong units and wrong classes and not unusual people. (Chosen.)
PLAUSIBLE_ML = {1: (3.0, 30.0), 2: (1.0, 12.0), 3: (0.4, 8.0)}

#: Voxel sizes of knee protocols, in mm. (Chosen.)
PLAUSIBLE_SPACING_MM = (0.1, 8.0)

#: Grey levels that any scanner's image has; a label map has fewer.
LEAST_GREY_LEVELS = 16

#: Volumes of a site that the preview page shows.
SHOWN = 12

#: The share of its cartilage that a volume may lose at the edge of the common grid.
MOST_OUTSIDE = 0.2


@dataclass(frozen=True)
class Finding:
    """Something to know about a file or a site."""

    level: str  # "error": training would be wrong or impossible; "warning": look at it
    text: str  # begins with the file or folder


@dataclass(frozen=True)
class VolumeFacts:
    """What a volume says about itself."""

    name: str
    subject: str
    split: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, float, float]
    axes: str  # codes of the stored order, as "PIR"
    volumes_ml: dict[int, float]  # of the classes that its source drew
    content: str  # hash of the voxels
    path: Path


@dataclass
class Report:
    """What :func:`check_sites` found."""

    facts: dict[str, list[VolumeFacts]] = field(default_factory=dict)  # by site
    layouts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """Those that must be mended first."""
        return [finding for finding in self.findings if finding.level == "error"]

    def text(self) -> str:
        """The report for a terminal: a paragraph per site, then the findings, then the verdict."""
        lines = []
        for site, volumes in self.facts.items():
            people = len({volume.subject for volume in volumes})
            lines.append(f"{site} ({self.layouts[site]}): {len(volumes)} volumes of {people} people")
            for title, values in (
                ("voxels", [" x ".join(map(str, v.shape)) for v in volumes]),
                ("mm", [" x ".join(f"{s:.3g}" for s in v.spacing_mm) for v in volumes]),
                ("axes", [v.axes for v in volumes]),
            ):
                counts = {value: values.count(value) for value in dict.fromkeys(values)}
                lines.append(f"  {title:8s}" + ", ".join(f"{value} ({n})" for value, n in list(counts.items())[:4]))
            for c in CARTILAGES:
                ml = [v.volumes_ml[c] for v in volumes if c in v.volumes_ml]
                words = f"{np.mean(ml):.1f} ml ({min(ml):.1f} to {max(ml):.1f}) in {len(ml)}" if ml else "not labelled"
                lines.append(f"  {CLASS_NAMES[c]:8s}  {words}")
        lines += [f"{finding.level}: {finding.text}" for finding in self.findings]
        warnings = len(self.findings) - len(self.errors)
        verdict = (
            "Mend the errors first." if self.errors else "Ready for `prepare`, or for `run` where splits are named."
        )
        return "\n".join([*lines, f"{len(self.errors)} errors, {warnings} warnings. {verdict}"])


def site_folders(folder: str | Path) -> dict[str, Path]:
    """The sites in a folder by name: its sub-folders, or the folder itself when it is one.

    Raises:
        FileNotFoundError: no such folder.
        VolumeError: no site in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Give the folder that holds one folder per site.")
    if readers.layout(folder) not in (None, "dicom"):
        return {folder.resolve().name: folder}
    inside = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] != "." and readers.layout(p)]
    if not inside and readers.layout(folder):
        inside = [folder]
    if not inside:
        raise VolumeError(
            f"{folder}: no site in it. Make one folder per site with imagesTr and labelsTr, or an unpacked set."
        )
    return {path.resolve().name: path for path in inside}


def check_sites(folder: str | Path, progress: Callable[[str], None] | None = None) -> Report:
    """Inspect one folder per site: every file is read, nothing is written, and no fault hides the next one.

    Errors: what cannot be read, no spacing or orientation, unknown label values, labels without or on another grid than
    their image, empty labels, a femur below its tibia or before its patella, one person in two splits or sites, one
    content twice. Warnings: implausible spacing, intensities or volumes, a class that is said to be labelled and is
    nowhere, a folder that is no site.

    Args:
        progress: called with the name of each file.

    Raises:
        FileNotFoundError, VolumeError: see :func:`site_folders`.
    """
    report = Report()
    found_sites = site_folders(folder)
    for path in sorted(Path(folder).iterdir()) if Path(folder) not in found_sites.values() else []:
        if path.is_dir() and path not in found_sites.values() and path.name != "hidden" and path.name[0] != ".":
            text = f"{path}: in no layout that is known here, so it is left out. Put images in imagesTr."
            report.findings.append(Finding("warning", text))
    for site, path in found_sites.items():
        report.layouts[site] = readers.layout(path) or ""
        report.facts[site] = []
        try:
            found = readers.read_set(path)
        except (ValueError, OSError) as error:
            report.findings.append(Finding("error", one_line(error)))
            continue
        for reading in found:
            if progress is not None:
                progress(f"{site}: {reading.name}")
            facts, findings = _inspect(reading, report.layouts[site])
            report.findings += findings
            if facts is not None:
                report.facts[site].append(facts)
        if not any(reading.classes for reading in found) and site != REPOSITORY:
            report.findings.append(Finding("warning", f"{path}: no labels; a client needs some to train on."))
    _compare(report)
    return report


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, at most some lines of a terminal long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:597] + "..."


def load_checked(reading: Reading, layout: str) -> Loaded:
    """Load a reading and refuse what no network may see.

    Raises:
        FileNotFoundError, VolumeError: one line that begins with the file.
    """
    try:
        if layout in ("nifti", "oaizib_cm"):
            segment.check_header(reading.path)
        with np.errstate(over="ignore"):  # becomes infinite, and is refused
            image, label, affine = reading.load()
    except (VolumeError, FileNotFoundError) as error:
        raise type(error)(one_line(error)) from error
    except Exception as error:  # whatever a library makes of a damaged file
        raise VolumeError(f"{reading.path}: cannot be read ({one_line(error)}). Export it again.") from error
    if image is not None:
        segment.refuse_implausible(image, affine, reading.path)
    if label is not None and not label.any():
        raise VolumeError(f"{reading.path}: its label is empty. Remove the label file, or draw it.")
    if label is not None:
        femoral, tibial, patellar = (_centre(label == c, affine) for c in CARTILAGES)
        if femoral[2] < tibial[2]:
            raise VolumeError(
                f"{reading.path}: femoral cartilage lies below tibial cartilage: the header turns the knee upside "
                "down, or the classes are swapped. Repair one of them."
            )
        if patellar[1] < femoral[1]:
            raise VolumeError(
                f"{reading.path}: patellar cartilage lies behind femoral cartilage: the header turns the knee back to "
                "front, or the classes are swapped. Repair one of them."
            )
    return image, label, affine


def _centre(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The middle of a mask in RAS mm; NaN of an empty one, which is neither above nor below anything."""
    found = np.argwhere(mask)
    return np.asarray(nib.affines.apply_affine(affine, found.mean(axis=0) if len(found) else np.full(3, np.nan)))


def _inspect(reading: Reading, layout: str) -> tuple[VolumeFacts | None, list[Finding]]:
    try:
        image, label, affine = load_checked(reading, layout)
    except (VolumeError, FileNotFoundError) as error:
        return None, [Finding("error", str(error))]
    spacing = transforms.voxel_sizes_mm(affine)
    array = image if image is not None else label
    assert array is not None
    warnings = []
    if not all(PLAUSIBLE_SPACING_MM[0] <= step <= PLAUSIBLE_SPACING_MM[1] for step in spacing):
        sizes = " x ".join(f"{step:g}" for step in spacing)
        warnings.append(f"voxels of {sizes} mm are unusual for a knee; check the unit in the header.")
    if image is not None:
        warnings += _intensity_warnings(image)
    voxel_ml = float(np.prod(spacing)) / 1000
    volumes = {c: float(np.count_nonzero(label == c)) * voxel_ml for c in reading.classes if label is not None}
    for c, ml in volumes.items():
        low, high = PLAUSIBLE_ML[c]
        if ml == 0:
            warnings.append(f"says that {CLASS_NAMES[c]} cartilage is labelled, but has none; see labelled_classes.")
        elif not low <= ml <= high:
            warnings.append(f"{ml:.1f} ml of {CLASS_NAMES[c]} cartilage; adults have {low:g} to {high:g} ml.")
    content = hashlib.sha256(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
    facts = VolumeFacts(
        reading.name,
        reading.subject,
        reading.split,
        tuple(array.shape),
        spacing,
        "".join(nib.aff2axcodes(affine)),
        volumes,
        content,
        reading.path,
    )
    return facts, [Finding("warning", f"{reading.path}: {text}") for text in warnings]


def _intensity_warnings(image: NDArray[np.float32]) -> list[str]:
    out = []
    some = image.ravel()[:: max(image.size // 200_000, 1)]
    if len(np.unique(some)) < LEAST_GREY_LEVELS:
        out.append(f"only {len(np.unique(some))} grey levels; is it a label map?")
    if (some < 0).mean() > 0.02:
        out.append(f"{(some < 0).mean():.0%} of the voxels are negative; magnitude images of MR are not.")
    high = float(np.percentile(some, 99.5))
    if high > 0 and image.max() > 50 * high:
        out.append("single voxels are 50 times brighter than the rest; mask them.")
    if (some == some.min()).mean() > 0.9:
        out.append("nine of ten voxels are the darkest there is; was it masked or cropped?")
    return out


def _compare(report: Report) -> None:
    """What only several volumes together show: copies, and people in two places."""
    contents: dict[str, str] = {}
    people: dict[str, tuple[str, str]] = {}
    for site, volumes in report.facts.items():
        for volume in volumes:
            here = f"{site} {volume.split or 'volumes'}"
            if volume.content in contents:
                text = f"{volume.path}: the same voxels as {contents[volume.content]}. Keep one of them."
                report.findings.append(Finding("error", text))
            contents.setdefault(volume.content, str(volume.path))
            there, other = people.setdefault(volume.subject, (here, str(volume.path)))
            if there != here:
                text = f"{volume.path}: the same person as {other} ({here}, {there}). Keep people in one split."
                report.findings.append(Finding("error", text))
        sizes = np.array([volume.spacing_mm for volume in volumes])
        if len(sizes) and (np.sort(sizes, axis=1).max(axis=0) / np.sort(sizes, axis=1).min(axis=0)).max() > 3:
            report.findings.append(
                Finding("warning", f"{site}: voxel sizes differ more than threefold; several protocols?")
            )


# --- preparing ------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Sites on the common grid, and what a person should look at before training on them."""

    sites: dict[str, Site]
    warnings: list[Finding]


def prepare_sites(
    folder: str | Path,
    out: str | Path,
    settings: Settings,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Prepared:
    """Bring one folder per site to the common grid: RAS, ``settings.grid_spacing_mm`` and ``grid_shape``, as NIfTI.

    The grid lies round the middle of each field of view. Writes a site in the Decathlon layout for each, with splits by
    person (those of the set where it has them; else every fifth labelled person is for test and every fifth for
    validation, at least one each), the labelled classes and people in ``dataset.json``, and ``preview.html``.
    Everything is written beside ``out`` and moved there at the end: a fault or a full disk leaves nothing. Metrics are
    in mm on the grid then; ``run`` also takes sites that were not prepared, and measures on the volumes' own grids.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError, VolumeError: the first fault of :func:`check_sites`, or too few labelled people.
        OSError: ``out`` cannot be written.
    """
    out = Path(out)
    with beside(out) as building:
        report = check_sites(folder, progress)
        if report.errors:
            raise VolumeError(f"{report.errors[0].text} ({len(report.errors)} errors in all: run `check`.)")
        warnings, pages = list(report.findings), []
        for site, path in site_folders(folder).items():
            page, found = _prepare_site(path, building / site, site, settings, seed, progress)
            pages.append(page)
            warnings += found
        page = "<!doctype html><meta charset=utf-8><title>Prepared sites</title>" + "".join(pages)
        write_atomically(building / "preview.html", page.encode())
    return Prepared({site: cohorts.open_site(out / site) for site in site_folders(folder)}, warnings)


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that becomes it when the block ends well, and is gone when not.

    Raises:
        FileExistsError: ``out`` exists.
        OSError: it cannot be written.
    """
    if out.exists():
        raise FileExistsError(errno.EEXIST, "exists already; name a new folder, or remove it first", str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield building
        building.chmod(0o755)
        os.replace(building, out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Entry:
    """A volume that :func:`write_site` writes."""

    name: str
    split: str  # "training", "unlabelled", "validation" or "test"
    person: str
    image: NDArray[np.float32]  # (X, Y, Z)
    label: NDArray[np.uint8] | None  # None: unlabelled
    affine: NDArray[np.float64]  # (4, 4), voxel index -> RAS mm
    classes: tuple[int, ...]  # that were drawn


def write_site(folder: Path, description: str, volumes: Iterable[Entry]) -> dict[str, int]:
    """Write a site in the Decathlon layout, one volume after the other; returns how many each split has.

    Raises:
        OSError: it cannot be written; names the file.
    """
    entries: dict[str, list[Any]] = {"training": [], "unlabelled": [], "validation": [], "test": []}
    classes: dict[str, list[int]] = {}
    people: dict[str, int] = {}
    for volume in volumes:
        file, half = f"{volume.name}.nii.gz", "Ts" if volume.split == "test" else "Tr"
        write_volume(folder / f"images{half}" / file, volume.image, volume.affine)
        people[file] = number_of(volume.person)
        if volume.label is None:
            entries["unlabelled"].append(f"./images{half}/{file}")
            continue
        write_volume(folder / f"labels{half}" / file, volume.label, volume.affine)
        classes[file] = list(volume.classes)
        entries[volume.split].append({"image": f"./images{half}/{file}", "label": f"./labels{half}/{file}"})
    facts = {
        "name": folder.name,
        "description": description,
        "modality": {"0": "MRI"},
        "labels": {str(i): word for i, word in enumerate(CLASS_NAMES)},
        **entries,
        "labelled_classes": classes,
        "subjects": people,
    }
    write_atomically(folder / "dataset.json", json.dumps(facts, indent=1).encode())
    return {split: len(listed) for split, listed in entries.items()}


def number_of(person: str) -> int:
    """A number for a person's name: always the same, and hardly ever that of another one."""
    return int(hashlib.sha256(person.encode()).hexdigest()[:12], 16)


def write_volume(path: Path, array: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Write a ``.nii.gz``, images in 16 bits; equal arrays give equal bytes.

    Raises:
        OSError: it cannot be written; names the file.
    """
    image = nib.Nifti1Image(array, affine)
    if array.dtype != np.uint8:
        image.set_data_dtype(np.int16)  # nibabel scales
    image.header.set_xyzt_units("mm")
    write_atomically(path, gzip.compress(image.to_bytes(), 1, mtime=0))


def _prepare_site(
    source: Path, target: Path, name: str, settings: Settings, seed: int, progress: Callable[[str], None] | None
) -> tuple[str, list[Finding]]:
    """Writes one site; returns its part of the preview page, and what was cut off."""
    layout = readers.layout(source) or ""
    spacing, shape = settings.grid_spacing_mm, settings.grid_shape
    pictures: list[str] = []
    warnings: list[Finding] = []

    def on_grid() -> Iterator[Entry]:
        for reading, split in split_by_person(readers.read_set(source), source, seed):
            if progress is not None:
                progress(f"{name}: {reading.name}")
            image, label, affine = load_checked(reading, layout)
            if image is None:
                raise VolumeError(
                    f"{reading.path}: a label without an image. Make images for these labels with `simulate` first."
                )
            grid, place = transforms.to_grid(image, affine, spacing, shape)
            drawn = None
            if label is not None:
                if lost := _share_outside(label, affine, place, shape):
                    text = f"{reading.path}: {lost:.0%} of its cartilage lies outside the common grid; "
                    text += "crop the volume to the joint."
                    if lost > MOST_OUTSIDE:
                        raise VolumeError(text)
                    warnings.append(Finding("warning", text))
                drawn = transforms.label_to_grid(label, affine, spacing, shape).numpy().astype(np.uint8)
                if len(pictures) < SHOWN:
                    pictures.append(_picture(reading.name, grid.numpy(), drawn, spacing))
            yield Entry(reading.name, split, reading.subject, grid.numpy(), drawn, place, reading.classes)

    counts = write_site(target, f"{layout}, {shape} voxels of {spacing} mm", on_grid())
    words = ", ".join(f"{count} {split}" for split, count in counts.items())
    notes = "".join(f"<p>{html.escape(finding.text)}</p>" for finding in warnings)
    return f"<h1>{html.escape(name)}</h1><p>{html.escape(layout)}: {words}</p>{notes}" + "".join(pictures), warnings


def _share_outside(
    label: NDArray[np.uint8], affine: NDArray[np.float64], grid: NDArray[np.float64], shape: tuple[int, int, int]
) -> float:
    """The share of the cartilage voxels whose middle lies outside a grid."""
    at = nib.affines.apply_affine(np.linalg.inv(grid) @ affine, np.argwhere(label > 0))
    return float((~((at >= -0.5) & (at <= np.array(shape) - 0.5)).all(axis=1)).mean())


def split_by_person(found: Sequence[Reading], source: Path, seed: int) -> list[tuple[Reading, str]]:
    """Every reading with its split; nobody is in two of them, and a client has all three.

    Unlabelled volumes go to training; those of a person who validates or tests are left out.

    Raises:
        VolumeError: fewer labelled people than splits that have to be filled.
    """
    labelled = [reading for reading in found if reading.classes]
    place = {reading.subject: reading.split or "training" for reading in labelled}
    free = sorted(subject for subject, split in place.items() if split == "training")
    free = [free[i] for i in np.random.default_rng(seed).permutation(len(free))]
    wanted = [split for split in ("test", "validation") if split not in place.values()]
    if labelled and len(free) <= len(wanted):
        raise VolumeError(
            f"{source}: {len(free)} people with labels are too few to train, validate and test on. Label at least "
            f"{len(wanted) + 1}, or name the splits in dataset.json."
        )
    count = max(len(free) // 5, 1)
    for k, split in enumerate(wanted):
        place |= dict.fromkeys(free[k * count : (k + 1) * count], split)
    split_of = [(reading, place.get(reading.subject, "training")) for reading in found]
    return [(reading, split) for reading, split in split_of if reading.classes or split == "training"]


def _picture(name: str, image: NDArray[np.float32], label: NDArray[np.uint8], spacing_mm: Sequence[float]) -> str:
    figure, alt = figures.montage(image, spacing_mm, label, 12, name)
    code = base64.b64encode(figures.png(figure)).decode()
    return f'<img width=100% alt="{html.escape(alt)}" src="data:image/png;base64,{code}">'


# --- running ------------------------------------------------------------


def open_sites(folder: str | Path) -> Cohort:
    """A reader's own sites as a cohort: the one called "repository" teaches; without one the repository is empty.

    Raises:
        FileNotFoundError, VolumeError: no folder, no site, or one that has to be prepared first.
        CohortError: see :func:`cohorts.open_site`; also one person in two splits or sites, or one content twice.
    """
    found = site_folders(folder)
    for path in found.values():
        if readers.layout(path) != "nifti":
            raise VolumeError(f"{path}: the layout of {readers.layout(path)}. Run `prepare` first.")
    opened = {name: cohorts.open_site(path) for name, path in found.items()}
    repository = opened.pop(REPOSITORY, Site(REPOSITORY, Path(folder), (), (), (), ()))
    if not opened:
        raise VolumeError(f"{folder}: a repository without clients. Add a folder for each hospital.")
    cohort = Cohort(repository, tuple(opened.values()), "own")
    cohorts.assert_no_leakage(cohort)
    return cohort
