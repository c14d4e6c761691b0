"""A reader's own hospitals brought to the common grid: cut round the joint, split by person, with a page to look at."""

from __future__ import annotations

import base64
import functools
import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fedkd_utils import cohorts, figures, segment, site_folder, sites, transforms
from fedkd_utils.errors import VolumeError
from fedkd_utils.files import folder_in_one_step, nifti_bytes, write_atomically
from fedkd_utils.readers import Reading
from fedkd_utils.settings import Settings
from fedkd_utils.site_folder import Site
from fedkd_utils.sites import Finding, Progress, Report
from fedkd_utils.transforms import by_axis

#: Volumes of a site that the preview page shows.
SHOWN = 12

#: The share of its cartilage that a volume may lose at the edge of the common grid.
MOST_OUTSIDE = 0.2

#: From how many grids along some axis on a network looks for the joint of a volume without a label.
MUCH_LARGER = 1.1

#: Makes a network that sees cartilage, and says which settings it has.
Finder = Callable[[], tuple[segment.Network, Settings]]


@dataclass(frozen=True)
class Crop:
    """Where a volume larger than the common grid was cut."""

    name: str
    round: str  # "its label", "the joint that the network found" or "the middle of its field of view"
    place_mm: tuple[float, float, float]  # of the middle of the grid, RAS
    off_mm: float  # from the middle of the field of view

    @property
    def text(self) -> str:
        """In words."""
        x, y, z = self.place_mm
        return f"cut round {self.round}, at ({x:.0f}, {y:.0f}, {z:.0f}) mm in RAS, {self.off_mm:.0f} mm off the middle"


@dataclass(frozen=True)
class Prepared:
    """Sites on the common grid, where their volumes were cut, and what a person should look at."""

    sites: dict[str, Site]
    crops: dict[str, list[Crop]]  # by site; of the volumes that were larger than the grid
    warnings: list[Finding]

    def text(self) -> str:
        """What was made, for a terminal."""
        lines = []
        for name, site in self.sites.items():
            lines.append(f"{name:20s} {site.counts}")
            crops = self.crops[name]
            if crops:
                ways = [crop.round for crop in crops]
                counts = ", ".join(f"{ways.count(way)} round {way}" for way in dict.fromkeys(ways))
                far = max(crop.off_mm for crop in crops)
                lines.append(f"{'':20s} larger than the grid and cut: {counts}; up to {far:.0f} mm off the middle")
        return "\n".join([*lines, *(f"{finding.level}: {finding.text}" for finding in self.warnings)])


def prepare_sites(
    folder: str | Path,
    out: str | Path,
    settings: Settings,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    centred: bool = False,
    network: Finder | None = None,
) -> Prepared:
    """Bring one folder per site to the common grid: RAS, ``settings.grid_spacing_mm`` and ``grid_shape``, as NIfTI.

    A volume that is larger than the grid is cut round its joint: the middle of what its label marks, or, without a
    label, where a network sees most cartilage (:func:`segment.locate_joint`). Test volumes with labels are cut round
    them, too: scores on prepared sites say nothing about finding the joint. Writes a site in the Decathlon layout for
    each, with splits by person (those of the set where it has them; else every fifth labelled person is for test and
    every fifth for validation, at least one each), the labelled classes and people in ``dataset.json``, and
    ``preview.html``, which says and shows where each volume was cut. Every volume is read once, and everything is
    written beside ``out`` and moved there at the end: a fault or a full disk leaves nothing. Metrics are in mm on the
    grid then; ``run`` also takes sites that were not prepared, and measures on the volumes' own grids.

    Args:
        progress: called with the name of each file.
        centred: the joint lies in the middle of every field of view: do not look for it.
        network: makes the network that looks for the joint, and its settings; called once, and only for an unlabelled
            volume that is much larger than the grid. Without it such a volume is cut round its middle, with a warning.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError, VolumeError: the first error of :func:`sites.check_sites`, or a label that the grid does not
            hold.
        OSError: ``out`` cannot be written.
    """
    out = Path(out)
    find = None if network is None else functools.cache(network)
    report = Report()
    with folder_in_one_step(out) as building:
        found, crops, pages = sites.begin(report, folder), {}, []
        for site, path in found.items():
            readings = sites.readings(report, site, path)
            report.stop()
            split = sites.split_by_person(readings, path, seed)
            volumes = _on_grid(report, site, split, settings, progress, centred, find)
            crops[site], page = _write_prepared(building / site, report.layouts[site], volumes, settings)
            pages.append(page)
        sites.compare(report)
        report.stop()
        notes = "".join(f"<p>{html.escape(finding.text)}</p>" for finding in report.findings)
        page = "<!doctype html><meta charset=utf-8><title>Prepared sites</title>" + notes + "".join(pages)
        write_atomically(building / "preview.html", page.encode())
    return Prepared({site: site_folder.open_site(out / site) for site in found}, crops, report.findings)


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


def write_site(folder: Path, description: str, volumes: Iterable[Entry]) -> None:
    """Write a site in the Decathlon layout, one volume after the other.

    Raises:
        OSError: it cannot be written; names the file.
    """
    files: dict[str, list[str]] = {split: [] for split in site_folder.SPLITS}
    classes: dict[str, list[int]] = {}
    people: dict[str, int] = {}
    for volume in volumes:
        file, half = f"{volume.name}.nii.gz", "Ts" if volume.split == "test" else "Tr"
        write_atomically(folder / f"images{half}" / file, nifti_bytes(volume.image, volume.affine))
        people[file] = site_folder.number_kept(volume.person)
        files[volume.split if volume.label is not None else "unlabelled"].append(file)
        if volume.label is not None:
            write_atomically(folder / f"labels{half}" / file, nifti_bytes(volume.label, volume.affine))
            classes[file] = list(volume.classes)
    content = cohorts.dataset_json(folder.name, description, files, classes, people)
    write_atomically(folder / "dataset.json", content)


def _on_grid(
    report: Report,
    site: str,
    split: Sequence[tuple[Reading, str]],
    settings: Settings,
    progress: Progress | None,
    centred: bool,
    find: Finder | None,
) -> Iterator[tuple[Entry, Crop | None]]:
    """The volumes of a site on the common grid, and where they were cut.

    Raises:
        VolumeError: the first error that the report gets; a label that the grid does not hold.
    """
    spacing, shape = settings.grid_spacing_mm, settings.grid_shape
    for reading, part in split:
        loaded = sites.inspect(report, site, reading, progress)
        report.stop()
        assert loaded is not None  # else there was an error
        image, label, affine = loaded
        assert image is not None  # or WITHOUT_IMAGES, which is an error, too
        extent, held = transforms.extent_mm(image.shape, affine), np.array(shape) * spacing
        place, way = None, "the middle of its field of view"
        if centred:
            pass
        elif label is not None:
            marked = np.argwhere(label)
            place = nib.affines.apply_affine(affine, (marked.min(axis=0) + marked.max(axis=0)) / 2)
            way = "its label"
        elif (extent > MUCH_LARGER * held).any():
            place = segment.locate_joint(image, affine, *find()) if find is not None else None
            if place is not None:
                way = "the joint that the network found"
            else:
                why = "no network looked for the joint" if find is None else "the network sees no cartilage in it"
                text = f"{reading.path}: larger than the common grid, and {why}: cut round its middle. Look at it."
                report.add("warning", text)
        grid, grid_affine = transforms.to_grid(image, affine, spacing, shape, centre_mm=place)
        drawn = None
        if label is not None:
            if lost := _share_outside(label, affine, grid_affine, shape):
                text = f"{reading.path}: {max(lost, 0.01):.0%} of its cartilage lies outside the common grid"
                if lost > MOST_OUTSIDE:
                    raise VolumeError(f"{text}. Is all of the label cartilage, and the spacing in the header right?")
                report.add("warning", f"{text}, and is cut off.")
            drawn = transforms.label_to_grid(label, affine, spacing, shape, place).numpy().astype(np.uint8)
        crop = None
        if (extent > held + spacing).any():
            middle = nib.affines.apply_affine(grid_affine, (np.array(shape) - 1) / 2)
            off = np.linalg.norm(middle - nib.affines.apply_affine(affine, (np.array(image.shape) - 1) / 2))
            crop = Crop(reading.name, way, (float(middle[0]), float(middle[1]), float(middle[2])), float(off))
        yield Entry(reading.name, part, reading.subject, grid.numpy(), drawn, grid_affine, reading.classes), crop


def _write_prepared(
    target: Path, layout: str, volumes: Iterable[tuple[Entry, Crop | None]], settings: Settings
) -> tuple[list[Crop], str]:
    """Writes one site; returns where its volumes were cut, and its part of the preview page."""
    crops: list[Crop] = []
    pictures: dict[bool, list[str]] = {True: [], False: []}  # with and without a label

    def watched() -> Iterator[Entry]:
        for entry, crop in volumes:
            crops.extend([] if crop is None else [crop])
            shown = pictures[entry.label is not None]
            if len(shown) < SHOWN:
                title = entry.name if crop is None else f"{entry.name}, {crop.text}"
                shown.append(_picture(title, entry.image, entry.label, settings.grid_spacing_mm))
            yield entry

    size = f"{by_axis(settings.grid_shape)} voxels of {by_axis(settings.grid_spacing_mm)} mm"
    write_site(target, f"{layout}, {size}", watched())
    lines = "".join(f"<li>{html.escape(f'{crop.name}: {crop.text}')}</li>" for crop in crops)
    words = f"{layout}: {site_folder.open_site(target).counts}; {size}"
    page = f"<h1>{html.escape(target.name)}</h1><p>{html.escape(words)}</p><ul>{lines}</ul>"
    return crops, page + "".join(pictures[True] + pictures[False])


def _share_outside(
    label: NDArray[np.uint8], affine: NDArray[np.float64], grid: NDArray[np.float64], shape: tuple[int, int, int]
) -> float:
    """The share of the cartilage voxels whose middle lies outside a grid."""
    at = nib.affines.apply_affine(np.linalg.inv(grid) @ affine, np.argwhere(label > 0))
    return float((~((at >= -0.5) & (at <= np.array(shape) - 0.5)).all(axis=1)).mean())


def _picture(
    title: str, image: NDArray[np.float32], label: NDArray[np.uint8] | None, spacing_mm: Sequence[float]
) -> str:
    figure, alt = figures.montage(image, spacing_mm, label, 12, title)
    code = base64.b64encode(figures.png(figure)).decode()
    return f'<img width=100% alt="{html.escape(alt)}" src="data:image/png;base64,{code}">'
