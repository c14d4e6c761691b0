"""A reader's own hospitals: one folder per site, inspected before training, and opened for it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from fedkd_utils import cohorts, readers, segment, site_folder, transforms
from fedkd_utils.errors import VolumeError, one_line, printable
from fedkd_utils.readers import Loaded, Reading
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES
from fedkd_utils.site_folder import Cohort, Site
from fedkd_utils.transforms import by_axis, middle_mm

#: The site that teaches, where there is one.
REPOSITORY = "repository"

#: What an adult knee may have, in ml: wide, to find wrong units and wrong classes and not unusual people. (Chosen.)
PLAUSIBLE_ML = {1: (3.0, 30.0), 2: (1.0, 12.0), 3: (0.4, 8.0)}

#: So many times the upper end no knee has: the unit or the classes are wrong. (Chosen.)
ABSURD = 3

#: Voxel sizes of knee protocols, in mm. (Chosen.)
PLAUSIBLE_SPACING_MM = (0.1, 8.0)

#: Grey levels that any scanner's image has; a label map has fewer.
LEAST_GREY_LEVELS = 16

#: How far the block means of two copies of one image may differ; 8 bits change them by 0.002, another scan by 1.
SAME_PATTERN = 0.005

#: The splits that nobody trains on.
HELD_OUT = ("validation", "test")

#: Parts of file names that tell visits and sides of one person apart: V00, 12m, visit2, ses-01, baseline, a date, L,
#: left, and the L behind a number.
VISIT_OR_SIDE = re.compile(
    r"(?i)(?:^|[-_. ])(?:v\d{1,2}|\d{1,3}m|visit[-_]?\d+|ses-\w+?|ses\d+|baseline|bl|follow[-_]?up\d*|fu\d*"
    r"|(?:19|20)\d\d[-_]?\d\d[-_]?\d\d|l|r|left|right)(?=[-_. ]|$)|(?<=\d)[lr](?=[-_. ]|$)"
)

#: Layouts that :func:`site_folder.open_site` reads.
OPENED = ("nifti", "oaizib_cm")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """Something to know about a file or a site."""

    level: str  # "error": training would be wrong or impossible; "warning": look at it
    text: str  # begins with the file or folder


@dataclass(frozen=True)
class VolumeFacts:
    """What a volume says about itself."""

    subject: str
    split: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, float, float]
    axes: str  # codes of the stored order, as "PIR"
    volumes_ml: dict[int, float]  # of the classes that its source drew
    grey: tuple[float, ...]  # median, 1st and 99th percentile of the image; empty without one
    content: str  # hash of the voxels as they are stored
    pattern: NDArray[np.float64]  # (64,), see :func:`_pattern`
    drawn: str  # hash of the label in RAS order; "" without one
    path: Path


@dataclass
class Report:
    """What :func:`check_sites` found."""

    facts: dict[str, list[VolumeFacts]] = field(default_factory=dict)  # by site
    layouts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: str, text: str) -> None:
        """Add a finding, in characters that any terminal and file takes."""
        self.findings.append(Finding(level, printable(text)))

    @property
    def errors(self) -> list[Finding]:
        """Those that must be mended first."""
        return [finding for finding in self.findings if finding.level == "error"]

    def stop(self) -> None:
        """Raise the first error as a :class:`VolumeError`, if there is one."""
        if self.errors:
            raise VolumeError(f"{self.errors[0].text} (`check` looks for all errors.)")

    def _labelled(self, site: str) -> set[str]:
        """The splits in which a site has labelled volumes; "" where it does not name them."""
        return {volume.split for volume in self.facts[site] if volume.volumes_ml}

    @property
    def verdict(self) -> str:
        """What to do next, in a sentence."""
        if self.errors:
            return "Mend the errors first."
        clients = [site for site in self.facts if site != REPOSITORY]
        if not any(self._labelled(site) for site in clients):
            return (
                "No client has labels, so nothing can be trained: draw some (`prepare` brings the volumes to one grid "
                "first), or `segment` them with a model."
            )
        whole = {"training", "validation", "test"}
        step = "`prepare`"
        if all(self.layouts[site] == "nifti" and self._labelled(site) >= whole for site in clients):
            step = "`run`, which takes the middle of every field of view, or `prepare`, which looks for the joint"
        return f"Look at the warnings, then go on with {step}." if self.findings else f"Ready for {step}."

    def text(self) -> str:
        """The report for a terminal: a paragraph per site, then the findings, then the verdict."""
        lines = []
        for site, volumes in self.facts.items():
            people = len({volume.subject for volume in volumes})
            lines.append(f"{site} ({self.layouts[site]}): {len(volumes)} volumes, counted as {people} people")
            for title, values in (
                ("voxels", [by_axis(v.shape) for v in volumes]),
                ("mm", [by_axis(v.spacing_mm) for v in volumes]),
                ("axes", [v.axes for v in volumes]),
            ):
                counts = {value: values.count(value) for value in dict.fromkeys(values)}
                lines.append(f"  {title:8s}" + ", ".join(f"{value} ({n})" for value, n in list(counts.items())[:4]))
            if grey := [v.grey for v in volumes if v.grey]:
                median, low, high = np.median(grey, axis=0)
                lines.append(f"  {'grey':8s}median {median:.4g}, 1st to 99th percentile {low:.4g} to {high:.4g}")
            for c in CARTILAGES:
                ml = [v.volumes_ml[c] for v in volumes if c in v.volumes_ml]
                words = f"{np.mean(ml):.1f} ml ({min(ml):.1f} to {max(ml):.1f}) in {len(ml)}" if ml else "not labelled"
                lines.append(f"  {CLASS_NAMES[c]:8s}  {words}")
        lines += [f"{finding.level}: {finding.text}" for finding in self.findings]
        warnings = len(self.findings) - len(self.errors)
        return "\n".join([*lines, f"{len(self.errors)} errors, {warnings} warnings. {self.verdict}"])


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
        return {site_folder.name_of(folder): folder}
    inside = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] != "." and readers.layout(p)]
    if not inside and readers.layout(folder):
        inside = [folder]
    if not inside:
        raise VolumeError(
            f"{folder}: no site in it. Make one folder per site with imagesTr and labelsTr, or an unpacked set."
        )
    return {site_folder.name_of(path): path for path in inside}


def check_sites(folder: str | Path, progress: Progress | None = None, *, dealt: bool = False) -> Report:
    """Inspect one folder per site: every file is read, nothing is written, and no fault hides the next one.

    Errors: what cannot be read, no spacing or orientation, unknown label values, labels without or on another grid than
    their image, empty labels, a femur below its tibia or before its patella, one person in two splits or sites, one
    content twice (also stored in another order or type), cartilage beyond any knee's, too few labelled people for the
    splits, label maps without images. Warnings: implausible spacing, intensities or volumes, a class that is said to be
    labelled and is nowhere, or the other way round, one label under the images of two people, names that differ in
    visit or side and count as several people, a client without labels, volumes that were held out but cannot be scored,
    files that are not read, a folder that is no site.

    Args:
        progress: called with the name of each file.
        dealt: the sites keep the splits that they have, so that nobody has to be dealt to others.

    Raises:
        FileNotFoundError, VolumeError: see :func:`site_folders`.
    """
    report = Report()
    for site, path in begin(report, folder).items():
        for reading in readings(report, site, path, dealt=dealt):
            inspect(report, site, reading, progress)
    compare(report)
    return report


def begin(report: Report, folder: str | Path) -> dict[str, Path]:
    """The sites of a folder; a sub-folder that is none is reported."""
    found = site_folders(folder)
    for path in sorted(Path(folder).iterdir()) if Path(folder) not in found.values() else []:
        if path.is_dir() and path not in found.values() and path.name[0] != "." and path.name != cohorts.HIDDEN:
            text = f"{path}: in no layout that is known here, so it is left out. Put images in imagesTr."
            report.add("warning", text)
    return found


def readings(report: Report, site: str, path: Path, *, dealt: bool = False) -> list[Reading]:
    """The volumes of a site, with what can be said before any is loaded; ``dealt`` as for :func:`check_sites`."""
    report.layouts[site] = readers.layout(path) or ""
    report.facts[site] = []
    try:
        found = readers.read_set(path)
    except (ValueError, OSError) as error:
        report.add("error", one_line(error))
        return []
    if report.layouts[site] in readers.WITHOUT_IMAGES:
        text = f"{path}: label maps without images. Make images for them with `simulate` first."
        report.add("error", text)
        return found
    _warn_of_names(report, site, path, found)
    try:
        split_by_person([] if dealt else found, path, 0)
    except VolumeError as error:
        report.add("error", str(error))
    if held := sum(reading.split in HELD_OUT and not reading.classes for reading in found):
        text = (
            f"{path}: {held} volumes of its own validation or test part have no label. They cannot be scored, and are "
        )
        report.add("warning", f"{text}left out of training, too.")
    if not any(reading.classes for reading in found) and site != REPOSITORY:
        text = (
            f"{path}: no labels, and `run` refuses a client without any. Draw some, or leave the folder out of `run`."
        )
        report.add("warning", text)
    return found


def _warn_of_names(report: Report, site: str, path: Path, found: Sequence[Reading]) -> None:
    """What the names of a site's files show: visits that count as people, files that are not read, odd characters."""
    seen: dict[str, Reading] = {}
    pairs = []
    for reading in found:
        person = VISIT_OR_SIDE.sub("", reading.name)
        other = seen.setdefault(person, reading)
        told = site_folder.is_named(reading.subject) and site_folder.is_named(other.subject)
        if person and other.subject != reading.subject and not told:
            pairs.append(f"{other.name} and {reading.name}")
    if pairs:
        text = f"{path}: {pairs[0]} look like visits or sides of one person, but count as two people"
        more = f" ({len(pairs)} such pairs)" if len(pairs) > 1 else ""
        way = "Give both one PatientID" if report.layouts[site] == "dicom" else "Say in `subjects` of dataset.json"
        report.add("warning", f"{text}{more}. {way}, if they are one.")
    strangers = [reading.path.name for reading in found if not site_folder.is_named(reading.subject)]
    if report.layouts[site] == "dicom" and len(strangers) > 1:
        text = f"{path}: {len(strangers)} series without a PatientID ({', '.join(strangers[:3])}"
        more = ", .." if len(strangers) > 3 else ""
        report.add("warning", f"{text}{more}) count as people of their own. Are some of them of one person?")
    others = site_folder.passed_over(path) if report.layouts[site] in OPENED else []
    if others:
        names = ", ".join([str(other.relative_to(path)) for other in others[:3]] + [".."] * (len(others) > 3))
        text = f"{path}: not read, since their names do not end in .nii or .nii.gz in small letters: {names}"
        report.add("warning", f"{text} ({len(others)} in all). Convert or rename them, or move them away.")
    for reading in found:
        if (name := reading.path.name) != printable(name):
            text = "characters in its name that are no UTF-8 or cannot be printed"
            report.add("warning", f"{reading.path}: {text}, so it is called {reading.name} here. Rename it.")


def load_checked(reading: Reading) -> Loaded:
    """Load a reading and refuse what no network may see.

    Raises:
        FileNotFoundError, VolumeError: one line that begins with the file.
    """
    try:
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
        femoral, tibial, patellar = (middle_mm(label == c, affine) for c in CARTILAGES)
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


def inspect(report: Report, site: str, reading: Reading, progress: Progress | None) -> Loaded | None:
    """Load a volume and report on it; None, and an error in the report, when it cannot be used."""
    if progress is not None:
        progress(f"{site}: {reading.name}")
    try:
        image, label, affine = load_checked(reading)
    except (VolumeError, FileNotFoundError) as error:
        report.add("error", str(error))
        return None
    spacing = transforms.voxel_sizes_mm(affine)
    array = image if image is not None else label
    assert array is not None
    warnings = []
    if not all(PLAUSIBLE_SPACING_MM[0] <= step <= PLAUSIBLE_SPACING_MM[1] for step in spacing):
        warnings.append(f"voxels of {by_axis(spacing)} mm are unusual for a knee; check the unit in the header.")
    if image is not None:
        warnings += _intensity_warnings(image)
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    volumes = {c: float(np.count_nonzero(label == c)) * voxel_ml for c in reading.classes if label is not None}
    absurd = []
    for c, ml in volumes.items():
        low, high = PLAUSIBLE_ML[c]
        if ml == 0:
            warnings.append(f"says that {CLASS_NAMES[c]} cartilage is labelled, but has none; see labelled_classes.")
        elif ml > ABSURD * high:
            absurd.append(f"{ml:.0f} ml of {CLASS_NAMES[c]}")
        elif not low <= ml <= high:
            warnings.append(f"{ml:.1f} ml of {CLASS_NAMES[c]} cartilage; adults have {low:g} to {high:g} ml.")
    if absurd:
        text = f"{', '.join(absurd)} cartilage, far more than any knee has. Check spacing and classes of the label."
        report.add("error", f"{reading.path}: {text}")
    for c in set(CARTILAGES) - volumes.keys() if label is not None else ():
        if np.any(label == c):
            text = f"has {CLASS_NAMES[c]} cartilage, which its site does not name as labelled: it is not learned from."
            warnings.append(f"{text} See labels and labelled_classes in dataset.json.")
    facts = VolumeFacts(
        reading.subject,
        reading.split,
        tuple(array.shape),
        spacing,
        "".join(nib.aff2axcodes(affine)),
        volumes,
        () if image is None else tuple(float(x) for x in np.percentile(_some(image), (50, 1, 99))),
        _hash(array),
        _pattern(array, affine),
        "" if label is None else _hash(transforms.to_ras(label, affine)[0]),
        reading.path,
    )
    report.facts[site].append(facts)
    for text in warnings:
        report.add("warning", f"{reading.path}: {text}")
    return image, label, affine


def _hash(array: NDArray[np.generic]) -> str:
    """A hash of shape and voxels, the same for every type that they are stored in."""
    values = np.ascontiguousarray(array, dtype=np.float32) + np.float32(0)  # -0 becomes 0
    return hashlib.sha256(f"{array.shape}".encode() + values.tobytes()).hexdigest()


def _pattern(array: NDArray[np.generic], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of 4 x 4 x 4 blocks in RAS order, z-scored, (64,): the same however a volume is stored or scaled."""
    turned = torch.from_numpy(transforms.to_ras(array, affine)[0].astype(np.float64))
    blocks = torch.nn.functional.adaptive_avg_pool3d(turned[None], 4)[0]
    means = (blocks - blocks.mean()) / blocks.std().clamp(min=1e-6)
    return means.flatten().numpy()


def _some(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """About 200,000 voxels of an image, evenly spread."""
    return image.ravel()[:: max(image.size // 200_000, 1)]


def _intensity_warnings(image: NDArray[np.float32]) -> list[str]:
    out = []
    some = _some(image)
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


def _same_image(one: VolumeFacts, other: VolumeFacts) -> bool:
    """Whether two volumes hold one image: the same voxels, also in another order, type or scale."""
    alike = sorted(one.shape) == sorted(other.shape) and np.abs(one.pattern - other.pattern).max() < SAME_PATTERN
    return one.content == other.content or bool(alike)


def compare(report: Report) -> None:
    """What only several volumes together show: copies, copied labels, and people in two places."""
    before: list[VolumeFacts] = []
    labels: dict[str, VolumeFacts] = {}
    people: dict[str, tuple[str, str, str]] = {}
    for site, volumes in report.facts.items():
        for volume in volumes:
            here = f"{site} {volume.split or 'volumes'}"
            twin = next((other for other in before if _same_image(volume, other)), None)
            if twin is not None:
                report.add("error", f"{volume.path}: the same image as {twin.path}. Keep one of them.")
            before.append(volume)
            drawn = labels.setdefault(volume.drawn, volume) if volume.drawn else volume
            if twin is None and drawn.subject != volume.subject:
                text = f"{volume.path}: its label is that of {drawn.path}, voxel by voxel, but the image is another one"
                report.add("warning", f"{text}. Was it copied to the wrong name?")
            there, where, other = people.setdefault(volume.subject, (here, site, str(volume.path)))
            if there != here:
                text = f"{volume.path}: the same person as {other} ({here}, {there}). Keep people in one split."
                counted = volume.subject.isdecimal() and site != where
                report.add("error", f"{text} {site_folder.NUMBERED}" if counted else text)
        sizes = np.array([volume.spacing_mm for volume in volumes])
        if len(sizes) and (np.sort(sizes, axis=1).max(axis=0) / np.sort(sizes, axis=1).min(axis=0)).max() > 3:
            report.add("warning", f"{site}: voxel sizes differ more than threefold; several protocols?")
    if told := readers.maybe_shared(report.layouts):
        report.add("warning", told)


def split_by_person(found: Sequence[Reading], source: Path, seed: int) -> list[tuple[Reading, str]]:
    """Every reading with its split; nobody is in two of them, and a client has all three.

    Whom the set holds out for validation or test stays held out with all volumes. Unlabelled volumes of the others are
    training data; those of people who validate or test are left out.

    Raises:
        VolumeError: fewer labelled people than splits that have to be filled.
    """
    strictness = ("training", *HELD_OUT)
    place: dict[str, str] = {}
    for reading in found:
        parts = place.get(reading.subject, "training"), reading.split or "training"
        place[reading.subject] = max(parts, key=strictness.index)
    labelled = {reading.subject for reading in found if reading.classes}
    free = sorted(subject for subject in labelled if place[subject] == "training")
    free = [free[i] for i in np.random.default_rng(seed).permutation(len(free))]
    wanted = [split for split in ("test", "validation") if split not in {place[subject] for subject in labelled}]
    if labelled and len(free) <= len(wanted):
        raise VolumeError(
            f"{source}: {len(free)} people with labels are too few to train, validate and test on. Label at least "
            f"{len(wanted) + 1}, or name the splits in dataset.json."
        )
    count = max(len(free) // 5, 1)
    for k, split in enumerate(wanted):
        place |= dict.fromkeys(free[k * count : (k + 1) * count], split)
    split_of = [(reading, place[reading.subject]) for reading in found]
    return [(reading, split) for reading, split in split_of if reading.classes or split == "training"]


def open_sites(folder: str | Path) -> Cohort:
    """A reader's own sites as a cohort: the one called "repository" teaches; without one the repository is empty.

    Only names and stored bytes are looked at: :func:`check_sites` reads every volume.

    Raises:
        FileNotFoundError, VolumeError: no folder, no site, or one that has to be prepared first.
        CohortError: see :func:`site_folder.open_site`; also one person in two splits or sites, or one content twice.
    """
    found = site_folders(folder)
    for path in found.values():
        if readers.layout(path) != "nifti":
            raise VolumeError(f"{path}: the layout of {readers.layout(path)}. Run `prepare` first.")
    opened = {name: site_folder.open_site(path) for name, path in found.items()}
    repository = opened.pop(REPOSITORY, Site(REPOSITORY, Path(folder), (), (), (), ()))
    if not opened:
        raise VolumeError(f"{folder}: a repository without clients. Add a folder for each hospital.")
    cohort = Cohort(repository, tuple(opened.values()), "own")
    site_folder.assert_no_leakage(cohort)
    return cohort
