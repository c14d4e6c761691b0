"""Own sites: clean ones pass, every fault gets one line that names its file, and nothing half-written stays."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_formats import metaimage, sagittal_series
from test_segment import bright, with_header
from tiny import TINY

from fedkd_utils import experiments, networks, prepare, segment, site_folder, sites, transforms
from fedkd_utils.__main__ import main
from fedkd_utils.errors import CohortError, VolumeError
from fedkd_utils.files import folder_in_one_step, nifti_bytes
from fedkd_utils.readers import Reading

SPACING = (4.0, 1.2, 1.2)
SHAPE = (10, 30, 32)
OWN = replace(TINY, grid_shape=(10, 32, 32))  # as large as a volume: 40 x 38 x 38 mm


def knee(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Femoral above tibial cartilage, the patella in front: RAS, a few ml each; no two labels are alike."""
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    shift = int(rng.integers(0, 3))
    label[1:9, 6:24, 18 + shift : 22 + shift] = 1
    label[1:9, 6:24, 12 + shift : 14 + shift] = 2
    label[2:8, 25:28, 20:26] = 3
    label[4, 10:20, 20] = [not seed >> bit & 1 for bit in range(10)]
    image = 200.0 * label + 100 + rng.normal(0, 20, SHAPE)
    return np.abs(image).astype(np.float32), label


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*SPACING, 1]) if affine is None else affine), path)
    return path


def hospital(folder: Path, first: int, labelled: int = 4, unlabelled: int = 1) -> Path:
    for k in range(labelled + unlabelled):
        image, label = knee(first + k)
        save(folder / "imagesTr" / f"k{k}_0000.nii.gz", image)
        if k < labelled:
            save(folder / "labelsTr" / f"k{k}.nii.gz", label)
    return folder


@pytest.fixture()
def two(tmp_path: Path) -> Path:
    """Two hospitals, one with a blank and an umlaut in its name."""
    hospital(tmp_path / "sites" / "north", 0)
    hospital(tmp_path / "sites" / "Süd Klinik", 100)
    return tmp_path / "sites"


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- check ------------------------------------------------------------


def test_clean_sites_pass(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(two)
    assert main(["check", str(two)]) == 0
    shown = capsys.readouterr().out
    assert "north (nifti): 5 volumes, counted as 5 people" in shown and "Süd Klinik" in shown
    assert "10 x 30 x 32 (5)" in shown and "RAS (5)" in shown
    assert shown.splitlines()[-1] == "0 errors, 0 warnings. Ready for `prepare`."
    assert tree(two) == before


def relabel(two: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    path = two / "north/labelsTr/k0.nii.gz"
    return save(path, change(knee(0)[1]))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty label": (lambda d: relabel(d, lambda x: 0 * x), "label is empty"),
    "label out of range": (lambda d: relabel(d, lambda x: x + 7), "unknown label values"),
    "label of another shape": (lambda d: relabel(d, lambda x: x[1:]), "another grid"),
    "label upside down": (lambda d: relabel(d, lambda x: x[:, :, ::-1]), "upside down"),
    "label back to front": (lambda d: relabel(d, lambda x: x[:, ::-1]), "back to front"),
    "label of another place": (
        lambda d: save(d / "north/labelsTr/k0.nii.gz", knee(0)[1], np.diag([4.0, 1.2, 1.3, 1])),
        "another grid",
    ),
    "label without image": (lambda d: os.remove(d / "north/imagesTr/k0_0000.nii.gz"), "no image of this name"),
    "truncated": (lambda d: cut(d / "north/imagesTr/k0_0000.nii.gz"), "damaged"),
    "not NIfTI": (lambda d: (d / "north/imagesTr/k0_0000.nii.gz").write_bytes(gzip.compress(b"x" * 999)), "damaged"),
    "NaN": (lambda d: save(d / "north/imagesTr/k0_0000.nii.gz", np.full(SHAPE, np.nan, np.float32)), "NaN"),
    "overflow": (lambda d: save(d / "north/imagesTr/k0_0000.nii.gz", knee(0)[0].astype(np.float64) * 1e300), "NaN"),
    "constant": (lambda d: save(d / "north/imagesTr/k0_0000.nii.gz", np.ones(SHAPE, np.float32)), "no image in it"),
    "4D": (lambda d: save(d / "north/imagesTr/k0_0000.nii.gz", np.stack([knee(0)[0]] * 2, -1)), "not a 3D volume"),
    "complex": (lambda d: save(d / "north/imagesTr/k0_0000.nii.gz", knee(0)[0].astype(np.complex64)), "complex"),
    "metres": (
        lambda d: save(d / "north/imagesTr/k4_0000.nii.gz", knee(4)[0], np.diag([4e3, 1.2e3, 1.2e3, 1])),
        "unit in the header",
    ),
    "copy in another site": (
        lambda d: shutil.copy(d / "north/imagesTr/k1_0000.nii.gz", d / "Süd Klinik/imagesTr/new.nii.gz"),
        "same image",
    ),
    "one person at two sites": (
        lambda d: [(d / s / "dataset.json").write_text('{"subjects": {"k0.nii.gz": 7}}') for s in os.listdir(d)],
        "same person",
    ),
    "copy stored in another order": (
        lambda d: reordered(d / "north/imagesTr/k1_0000.nii.gz", d / "Süd Klinik/imagesTr/new.nii.gz"),
        "same image",
    ),
    "copy stored in integers": (lambda d: as_integers(d), "same image"),
    "far too much cartilage": (
        lambda d: [
            save(d / f"north/{part}", array, np.diag([20.0, 6, 6, 1]))
            for part, array in zip(("imagesTr/k0_0000.nii.gz", "labelsTr/k0.nii.gz"), knee(0), strict=True)
        ],
        "ml of femoral, 207 ml of tibial, 78 ml of patellar cartilage, far more than any knee has",
    ),
    "too few people": (lambda d: [os.remove(d / f"north/labelsTr/k{k}.nii.gz") for k in (0, 1)], "are too few"),
    "class of no file": (
        lambda d: (d / "north/dataset.json").write_text('{"labelled_classes": {"K0": [1, 2]}}'),
        "no image is called so",
    ),
    "bad dataset.json": (lambda d: (d / "north/dataset.json").write_text("{"), "not readable as JSON"),
}


def reordered(path: Path, to: Path) -> None:
    """The same volume stored from right to left and from front to back."""
    volume = nib.load(path).as_reoriented(nib.orientations.axcodes2ornt(("L", "P", "S")))
    nib.save(nib.Nifti1Image(np.asarray(volume.dataobj, dtype=np.float32), volume.affine), to)


def as_integers(folder: Path) -> None:
    """One knee as float32 at one site, and as int16 with a scale factor and from right to left at another."""
    image = knee(4)[0] + np.float32(0.123)
    save(folder / "north/imagesTr/k4_0000.nii.gz", image)
    content = nifti_bytes(image[::-1].copy(), np.diag([-SPACING[0], *SPACING[1:], 1]))
    (folder / "Süd Klinik/imagesTr/new.nii.gz").write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def unzipped(path: Path, **fields: object) -> None:
    """Another header in the place of a gzipped file's."""
    plain = path.with_name(path.name.removesuffix(".gz"))
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    with_header(plain, **fields)


HEADERS: dict[str, tuple[dict[str, object], str]] = {
    "zero spacing": ({"pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}, "not three positive numbers"),
    "negative spacing": ({"pixdim": [1, 1, -2, 1, 0, 0, 0, 0]}, "not three positive numbers"),
    "no orientation": ({"qform_code": 0, "sform_code": 0}, "no orientation"),
    "singular": ({"srow_z": 0}, "singular"),
    "sheared": ({"srow_x": [4, 1.2, 0, 0], "srow_y": [4, 1.21, 0, 0]}, "singular"),
    "integers that overflow": ({"scl_slope": 3e38, "scl_inter": 0}, "NaN or infinite"),
    "unknown datatype": ({"datatype": 999}, "damaged"),
}
FAULTS |= {
    name: (lambda d, f=fields: unzipped(d / "north/imagesTr/k0_0000.nii.gz", **f), words)  # type: ignore[misc]
    for name, (fields, words) in HEADERS.items()
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_the_file_and_stops_preparing(
    two: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = FAULTS[fault]
    spoil(two)
    assert main(["check", str(two)]) == 1
    shown = capsys.readouterr().out.splitlines()
    lines = [line for line in shown if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert shown[-1].startswith("1 errors, ") and shown[-1].endswith(" Mend the errors first.")
    assert words in lines[0] and str(two) in lines[0] and len(lines[0]) < 700
    before = tree(two.parent)
    assert main(["prepare", str(two), str(two.parent / "out")]) == 1
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("error: ") and words in shown and "\n" not in shown
    assert tree(two.parent) == before


WARNINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "class that is nowhere": (lambda d: relabel(d, lambda x: np.where(x == 3, 0, x)), "has none; see labelled_classes"),
    "label map as image": (lambda d: save(d / "north/imagesTr/k4_0000.nii.gz", knee(4)[1]), "grey levels"),
    "negative": (lambda d: save(d / "north/imagesTr/k4_0000.nii.gz", knee(4)[0] - 150), "negative"),
    "a spike": (lambda d: save(d / "north/imagesTr/k4_0000.nii.gz", spike(knee(4)[0])), "brighter than the rest"),
    "a folder that is no site": (lambda d: (d / "west" / "images").mkdir(parents=True), "west: in no layout"),
    "no labels": (lambda d: shutil.rmtree(d / "north/labelsTr"), "no labels"),
    "label of another knee": (
        lambda d: shutil.copy(d / "north/labelsTr/k1.nii.gz", d / "Süd Klinik/labelsTr/k2.nii.gz"),
        "voxel by voxel, but the image is another one",
    ),
    "patella that is not named": (
        lambda d: (d / "north/dataset.json").write_text('{"labels": {"femoral": 1, "tibial": 2}}'),
        "has patellar cartilage, which its site does not name as labelled",
    ),
    "another format": (lambda d: (d / "north/imagesTr/k9.NII.GZ").write_bytes(b""), "not read, since their names"),
    "a name that is no UTF-8": (
        lambda d: os.rename(d / "north/imagesTr/k4_0000.nii.gz", os.fsencode(d) + b"/north/imagesTr/k\xff_0000.nii.gz"),
        r"k\udcff_0000.nii.gz: characters in its name that are no UTF-8",
    ),
}


def spike(image: np.ndarray) -> np.ndarray:
    image[3, 3, 3] = 1e6
    return image


@pytest.mark.parametrize("kind", WARNINGS)
def test_what_only_looks_odd_is_a_warning(two: Path, kind: str) -> None:
    spoil, words = WARNINGS[kind]
    spoil(two)
    report = sites.check_sites(two)
    assert not report.errors and any(words in finding.text for finding in report.findings)
    assert report.verdict == "Look at the warnings, then go on with `prepare`."
    assert main(["check", str(two)]) == 0


VISITS = ("P1_V00 P1_V01", "P1_v1 P1_v2", "P1_00m P1_12m", "P1_visit1 P1_visit2", "P1_L P1_R", "P1-left P1-right")
VISITS += ("P1_ses-01 P1_ses-02", "P1-ses-01 P1-ses-02", "sub-1_ses-a_T2w sub-1_ses-b_T2w", "P1_V00_L P1_V01_R")
VISITS += ("9006L 9006R", "9008_12m 9008_baseline", "9009_2019-01-02 9009_20200102", "P1_bl P1_fu2")


@pytest.mark.parametrize("pair", VISITS)
def test_names_that_differ_in_visit_or_side_ask_for_subjects(two: Path, pair: str) -> None:
    names = pair.split()
    for k, name in enumerate(names):
        (two / f"north/imagesTr/k{k}_0000.nii.gz").rename(two / f"north/imagesTr/{name}_0000.nii.gz")
        (two / f"north/labelsTr/k{k}.nii.gz").rename(two / f"north/labelsTr/{name}.nii.gz")
    (finding,) = sites.check_sites(two).findings
    assert finding.level == "warning" and f"{names[0]} and {names[1]} look like visits" in finding.text
    assert str(two / "north") in finding.text and "Say in `subjects` of dataset.json" in finding.text
    for people in (("P1", "P1"), (1, 2)):  # somebody who says that they are two people is believed
        (two / "north/dataset.json").write_text(json.dumps({"subjects": dict(zip(names, people, strict=True))}))
        assert not [finding for finding in sites.check_sites(two).findings if "look like visits" in finding.text]


def test_series_without_a_patient_are_asked_about(two: Path) -> None:
    for name in ("P1_V00", "P1_V01", "P2"):
        sagittal_series(two / "scans" / name, knee(len(name))[0], patient="")
    texts = [finding.text for finding in sites.check_sites(two).findings if "scans: " in finding.text]
    assert any("P1_V00 and P1_V01 look like visits" in text and "one PatientID" in text for text in texts)
    assert any("3 series without a PatientID (P1_V00, P1_V01, P2) count as people of their own" in t for t in texts)
    for series in (two / "scans").iterdir():
        for path in series.iterdir():
            header = pydicom.dcmread(path)
            header.PatientID = series.name[:2]
            header.save_as(path)
    texts = [finding.text for finding in sites.check_sites(two).findings]
    assert not [text for text in texts if "look like visits" in text or "PatientID" in text]


def test_what_a_made_cohort_hides_is_no_site(two: Path) -> None:
    (two / "hidden/labelsTr").mkdir(parents=True)
    assert not sites.check_sites(two).findings
    (two / "other").mkdir()
    (finding,) = sites.check_sites(two).findings
    assert "other: in no layout that is known" in finding.text


def test_sites_that_are_links_keep_the_names_under_which_they_lie(two: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for name, target in (("a", "north"), ("repository", "Süd Klinik")):
        (tmp_path / "data" / name).mkdir(parents=True)
        (two / target).rename(tmp_path / "data" / name / "nifti")
        (links / name).symlink_to(tmp_path / "data" / name / "nifti")
    report = sites.check_sites(links)
    assert list(report.facts) == ["a", "repository"] and not report.errors
    cohort = sites.open_sites(links)
    assert cohort.repository.name == "repository" and [site.name for site in cohort.clients] == ["a"]
    people = [{item.subject for item in site.items} for site in (cohort.repository, *cohort.clients)]
    assert not people[0] & people[1]


def test_a_number_at_two_hospitals_is_explained(two: Path) -> None:
    for site, file in (("north", "k0.nii.gz"), ("Süd Klinik", "k0.nii.gz")):
        (two / site / "dataset.json").write_text(json.dumps({"subjects": {file: 7}}))
    (error,) = sites.check_sites(two).errors
    assert "the same person as" in error.text and "count over all sites: where a hospital counts its own" in error.text


def test_a_patients_disc_is_read_through_its_folders(two: Path) -> None:
    """With the DICOMDIR, a report and the shadows that a Mac leaves."""
    disc = two / "disc"
    for name in ("S1", "S2"):
        sagittal_series(disc / "DICOM" / name, knee(ord(name[1]))[0], (3.0, 3.0, 3.0), patient=name)
    for path in sorted((disc / "DICOM/S1").iterdir())[:1]:
        for shadow in range(60):
            path.with_name(f"._{shadow}").write_bytes(b"a Mac was here")
        for name, uid in (("DICOMDIR", "1.2.840.10008.1.3.10"), ("report.dcm", "1.2.840.10008.5.1.4.1.1.88.33")):
            header = pydicom.dcmread(path)
            del header.PixelData, header.Rows
            header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = uid
            header.save_as(disc / name)
    (disc / "report.dcm").rename(disc / "DICOM/S2/report.dcm")
    report = sites.check_sites(two)
    assert not report.errors, report.errors
    assert [facts.path.name for facts in report.facts["disc"]] == ["S1", "S2"]


def test_a_series_that_was_cut_on_the_way_or_lies_behind_reports_is_not_lost(two: Path) -> None:
    for name in ("cut", "behind"):
        sagittal_series(two / "scans" / name, knee(len(name))[0], (3.0, 3.0, 3.0))
    for path in (two / "scans/cut").iterdir():
        path.write_bytes(path.read_bytes()[:600])
    header = pydicom.dcmread(next((two / "scans/behind").iterdir()))
    del header.PixelData, header.Rows
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.11.1"
    for number in range(60):
        header.save_as(two / f"scans/behind/!{number}")
    report = sites.check_sites(two)
    assert [facts.path.name for facts in report.facts["scans"]] == ["behind"]
    assert "scans/cut/" in report.errors[0].text and "damaged" in report.errors[0].text


def test_sites_that_are_dealt_keep_their_splits(two: Path) -> None:
    """One volume to train on, one to validate on and one to test on are enough to run, and too few to deal again."""
    (two / "north/labelsTr/k3.nii.gz").unlink()
    facts = {"validation": ["imagesTr/k1_0000.nii.gz"], "test": ["imagesTr/k2_0000.nii.gz"]}
    (two / "north/dataset.json").write_text(json.dumps(facts))
    for dealt in (False, True):
        assert not sites.check_sites(two, dealt=dealt).errors
    (two / "north/dataset.json").write_text(json.dumps({"test": facts["test"]}))
    assert not sites.check_sites(two, dealt=True).errors
    for k in (1, 2):
        (two / f"north/labelsTr/k{k}.nii.gz").unlink()
    (error,) = sites.check_sites(two).errors
    assert "too few to train, validate and test on" in error.text
    assert not sites.check_sites(two, dealt=True).errors


def test_people_whom_nobody_named_are_still_that_after_prepare(two: Path, tmp_path: Path) -> None:
    for k, name in enumerate(("P1_V00", "P1_V01")):
        (two / f"north/imagesTr/k{k}_0000.nii.gz").rename(two / f"north/imagesTr/{name}_0000.nii.gz")
        (two / f"north/labelsTr/k{k}.nii.gz").rename(two / f"north/labelsTr/{name}.nii.gz")
    assert main(["prepare", str(two), str(tmp_path / "prepared")]) == 0
    told = [finding.text for finding in sites.check_sites(tmp_path / "prepared").findings]
    assert any("look like visits" in text and "P1_V00" in text for text in told)


def test_the_same_pseudonym_at_two_hospitals_is_two_people(two: Path) -> None:
    for site in ("north", "Süd Klinik"):
        names = sorted(path.name for path in (two / site / "imagesTr").iterdir())
        (two / site / "dataset.json").write_text(
            json.dumps({"subjects": {name: f"P-{i}" for i, name in enumerate(names)}})
        )
    assert not [finding for finding in sites.check_sites(two).findings if "same person" in finding.text]


def test_a_name_that_is_no_utf_8_is_printed_and_hides_nothing(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = two / "north/imagesTr/k4_0000.nii.gz"
    path.write_bytes(b"damaged")
    os.rename(path, os.fsencode(path.parent) + b"/k\xff_0000.nii.gz")
    cut(two / "north/imagesTr/k2_0000.nii.gz")
    assert main(["check", str(two)]) == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and any(r"k\udcff_0000.nii.gz: damaged" in line for line in errors)


def test_intensities_are_told_for_every_site(two: Path) -> None:
    lines = [line for line in sites.check_sites(two).text().splitlines() if line.startswith("  grey")]
    pixels = [knee(k)[0].ravel() for k in range(5)]
    median, low, high = np.median(np.percentile(pixels, (50, 1, 99), axis=1), axis=1)
    assert len(lines) == 2
    assert lines[1] == f"  grey    median {median:.4g}, 1st to 99th percentile {low:.4g} to {high:.4g}"


def test_volumes_of_slanted_voxels_are_those_of_the_determinant() -> None:
    slanted = np.diag([*SPACING, 1.0])
    slanted[0, 1] = 1.2  # a column of 1.7 mm, voxels as large as before
    report = sites.Report(facts={"north": []})
    reading = Reading("k", "1", "", (1, 2, 3), Path("k.nii.gz"), lambda: (*knee(0), slanted))
    assert sites.inspect(report, "north", reading, None) is not None
    (facts,) = report.facts["north"]
    assert facts.volumes_ml[2] == pytest.approx((knee(0)[1] == 2).sum() * 4 * 1.2 * 1.2 / 1000)


def test_the_verdict_says_what_can_be_done_with_the_sites(two: Path) -> None:
    named = {"validation": ["imagesTr/k0.nii.gz"], "test": ["imagesTr/k1.nii.gz"]}
    for site in ("north", "Süd Klinik"):
        (two / site / "dataset.json").write_text(json.dumps(named))
    report = sites.check_sites(two)
    assert not report.findings and report.verdict.startswith("Ready for `run`, which takes the middle")
    cohort = sites.open_sites(two)
    assert all(client.training and client.validation and client.test for client in cohort.clients)  # and it is so
    sagittal_series(two / "scans" / "one", np.abs(knee(300)[0].transpose(1, 2, 0)), (1.2, 1.2, 4.0))
    report = sites.check_sites(two)
    (finding,) = report.findings
    assert finding.text.startswith(f"{two / 'scans'}: no labels, and `run` refuses a client without any.")
    assert report.verdict == "Look at the warnings, then go on with `prepare`."
    assert "scans (dicom): 1 volumes, counted as 1 people" in report.text()
    for site in ("north", "Süd Klinik"):
        shutil.rmtree(two / site)
    assert sites.check_sites(two).verdict.startswith("No client has labels, so nothing can be trained")


def test_label_maps_without_images_are_sent_to_simulate(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(two / "maps" / "9001_Cartilage.nii.gz", np.array([0, 2, 4, 6], np.uint8)[knee(9)[1]])
    assert main(["check", str(two)]) == 1
    with pytest.raises(VolumeError, match="maps: .*`simulate` first"):
        prepare.prepare_sites(two, two.parent / "out", OWN)
    assert not (two.parent / "out").exists()


def test_volumes_held_out_without_a_label_are_said_and_trained_on_by_nobody(two: Path) -> None:
    """In imagesTs, or named for validation; and in a set with a test part of its own."""
    for k in range(3):
        save(two / "north/imagesTs" / f"t{k}_0000.nii.gz", knee(50 + k)[0])
    (two / "north/dataset.json").write_text('{"validation": ["imagesTr/k4_0000.nii.gz"]}')
    for k, part in enumerate(("train", "train", "train", "valid", "test", "test")):
        small = (x.transpose(2, 1, 0)[::-1, ::-1] for x in knee(400 + k))  # down, back, right
        image, label = (x.repeat(3, 0).repeat(3, 1).repeat(4, 2) for x in small)  # 35 x 33 x 28 mm
        path = two / "iwoai" / part / f"{part}_{k:03d}_V00.im"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["data"] = image
        if part != "test":
            with h5py.File(path.with_suffix(".seg"), "w") as file:
                file["data"] = (np.array([-1, 0, 1, 3])[label][..., None] == np.arange(6)).astype(np.uint8)
    report = sites.check_sites(two)
    said = [finding.text for finding in report.findings if "no label." in finding.text]
    assert [text.split(": ")[1][:50] for text in said] == [
        "2 volumes of its own validation or test part have ",
        "4 volumes of its own validation or test part have ",
    ] and not report.errors
    assert len(report.facts["north"]) == 8  # they are read, too
    made = prepare.prepare_sites(two, two.parent / "out", OWN).sites
    north = {part: {item.name for item in getattr(made["north"], part)} for part in site_folder.SPLITS}
    assert set.union(*north.values()) == {"k0", "k1", "k2", "k3"} and not north["unlabelled"] and north["test"]
    challenge = {part: [item.name for item in getattr(made["iwoai"], part)] for part in site_folder.SPLITS}
    assert challenge["validation"] == ["valid_003_V00"] and challenge["unlabelled"] == []
    assert len(challenge["training"]) == 2 and challenge["test"][0].startswith("train_")  # drawn: its own is blind


def test_splits_do_not_depend_on_where_the_sites_lie(two: Path) -> None:
    first = prepare.prepare_sites(two, two.parent / "out", OWN)
    (two.parent / "far" / "away").mkdir(parents=True)
    moved = two.rename(two.parent / "far" / "away" / "data")
    second = prepare.prepare_sites(moved, moved.parent / "out", OWN)
    for name in first.sites:
        for part in site_folder.SPLITS:
            assert [(i.name, i.subject) for i in getattr(first.sites[name], part)] == [
                (i.name, i.subject) for i in getattr(second.sites[name], part)
            ]


def test_every_volume_is_read_once(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    original = transforms.read_nifti

    def counted(path: Path) -> object:
        read.append(Path(path))
        return original(path)

    monkeypatch.setattr(transforms, "read_nifti", counted)
    for work in (lambda: sites.check_sites(two), lambda: prepare.prepare_sites(two, two.parent / "out", OWN)):
        read.clear()
        work()
        assert sorted(read) == sorted(two.rglob("*.nii.gz"))


def test_what_is_prepared_of_oaizib_cm_is_a_site_of_the_course(two: Path) -> None:
    """The files keep their names, which tell OAIZIB-CM from others: the labels are the course's now."""
    for k in range(4):
        image, label = knee(600 + k)
        save(two / "oai/imagesTr" / f"oaizib_{k:03d}_0000.nii.gz", image)
        save(two / "oai/labelsTr" / f"oaizib_{k:03d}.nii.gz", np.array([0, 2, 4, 0], np.uint8)[label])
    prepare.prepare_sites(two, two.parent / "out", OWN)
    assert sites.check_sites(two.parent / "out").layouts["oai"] == "nifti"
    (oai,) = [site for site in sites.open_sites(two.parent / "out").clients if site.name == "oai"]
    for item in (*oai.training, *oai.validation, *oai.test):
        truth = np.where((truth := knee(600 + int(item.name[-3:]))[1]) == 3, 0, truth)
        assert item.labelled_classes == (1, 2) and item.label is not None
        assert np.array_equal(np.asarray(nib.load(item.label).dataobj)[:, 1:31], truth)


def test_big_endian_and_partial_labels_are_fine(two: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(knee(4)[0].astype(np.int16), np.diag([*SPACING, 1]), header)
    nib.save(image, two / "north/imagesTr/k4_0000.nii.gz")
    relabel(two, lambda x: np.where(x == 3, 0, x))
    (two / "north/dataset.json").write_text(json.dumps({"labelled_classes": {"k0": [1, 2]}}))
    assert not sites.check_sites(two).findings


@hypothesis_settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=10),
    st.sampled_from(["imagesTr/k0_0000.nii", "labelsTr/k0.nii"]),
    st.booleans(),
    st.integers(0, 400),
)
def test_damaged_bytes_are_read_or_named_but_never_crash(
    tmp_path: Path, changes: list[tuple[int, int]], which: str, zipped: bool, lost: int
) -> None:
    folder = tmp_path / "sites" / "north"
    if not folder.exists():
        hospital(folder, 0, labelled=3, unlabelled=0)
    good = {path: path.read_bytes() for path in folder.rglob("*.nii.gz")}
    victim = folder / f"{which}.gz"
    content = bytearray(gzip.decompress(good[victim]))
    for place, value in changes:
        content[place] = value
    spoiled = bytes(content[: len(content) - lost])
    target = victim if zipped else folder / which
    victim.unlink()
    target.write_bytes(gzip.compress(spoiled, 1) if zipped else spoiled)
    try:
        report = sites.check_sites(tmp_path / "sites")
        for finding in report.findings:
            assert str(folder) in finding.text and "\n" not in finding.text
        assert report.errors or report.facts["north"]
    finally:
        target.unlink(missing_ok=True)
        for path, content_before in good.items():
            path.write_bytes(content_before)


def test_folders_without_sites_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nowhere", "."):
        assert main(["check", str(tmp_path / name)]) == 1
    shown = capsys.readouterr().err.splitlines()
    assert "no such folder" in shown[0] and "no site in it" in shown[1] and len(shown) == 2


# --- prepare ------------------------------------------------------------


def test_prepared_sites_lie_on_the_grid_with_splits_by_person(two: Path) -> None:
    settings = OWN
    ski = two / "ski"
    for k in range(4):
        image, label = knee(200 + k)
        coded = np.array([0, 2, 4, 0], np.uint8)[label]
        metaimage(ski / f"image-{k:03d}.mhd", image[::-1, ::-1], SPACING)  # stored LPS
        metaimage(ski / f"labels-{k:03d}.mhd", coded[::-1, ::-1], SPACING)
    sagittal_series(two / "scans" / "one", np.abs(knee(300)[0].transpose(1, 2, 0)), (1.2, 1.2, 4.0))
    prepared = prepare.prepare_sites(two, two.parent / "out", settings)
    made = prepared.sites
    assert [finding.text.split(": ")[1] for finding in prepared.warnings] == [
        "no labels, and `run` refuses a client without any. Draw some, or leave the folder out of `run`."
    ]
    assert set(made) == {"north", "Süd Klinik", "ski", "scans"}
    for name in ("north", "Süd Klinik", "ski"):
        site = made[name]
        assert [len(getattr(site, s)) for s in ("training", "validation", "test")] == [2, 1, 1]
        assert len(site.unlabelled) == (0 if name == "ski" else 1)
        assert len({item.subject for item in site.items}) == len(site.items)
        for item in site.items:
            volume = nib.load(item.image)
            assert volume.shape == settings.grid_shape and np.allclose(volume.header.get_zooms(), SPACING)
            assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
        assert {item.labelled_classes for item in site.training} == {(1, 2) if name == "ski" else (1, 2, 3)}
    assert len(made["scans"].unlabelled) == 1
    page = (two.parent / "out" / "preview.html").read_text(encoding="utf-8")
    assert page.count("<img") == 15 and "Süd Klinik" in page  # twelve with labels, three without
    assert not any(prepared.crops.values()) and "cut round" not in page
    assert not list((two.parent / "out").rglob(".*"))
    report = sites.check_sites(two.parent / "out")
    assert not report.errors
    with pytest.raises(FileExistsError, match="exists already"):
        prepare.prepare_sites(two, two.parent / "out", settings)
    again = prepare.prepare_sites(two, two.parent / "out2", settings)
    assert [i.name for i in again.sites["north"].test] == [i.name for i in made["north"].test]


def test_too_few_people_are_refused(tmp_path: Path) -> None:
    hospital(tmp_path / "sites" / "small", 0, labelled=2)
    with pytest.raises(VolumeError, match="2 people with labels are too few"):
        prepare.prepare_sites(tmp_path / "sites", tmp_path / "out", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["sites"]


def test_cartilage_beyond_the_grid_is_reported_and_refused_when_it_is_much(two: Path) -> None:
    """A femoral cartilage of 18 rows and a patella behind a gap, 22 rows in all: a grid of 18 lies round the middle."""
    narrow = replace(OWN, grid_shape=(10, 18, 32))
    made = prepare.prepare_sites(two, two.parent / "out", narrow)
    label = knee(0)[1] > 0
    rows = np.flatnonzero(label.any(axis=(0, 2)))
    assert (rows[0], rows[-1]) == (6, 27)
    share = 1 - label[:, 8:26].sum() / label.sum()
    assert 0.05 < share < prepare.MOST_OUTSIDE
    found = [f.text for f in made.warnings if "k0_0000" in f.text and "north" in f.text]
    assert [text.split(": ")[1] for text in found] == [
        f"{share:.0%} of its cartilage lies outside the common grid, and is cut off."
    ]
    assert f"{share:.0%} of its cartilage" in (two.parent / "out" / "preview.html").read_text(encoding="utf-8")
    with pytest.raises(VolumeError, match="k0_0000.nii.gz: .* of its cartilage lies outside the common grid. Is all"):
        prepare.prepare_sites(two, two.parent / "out2", replace(OWN, grid_shape=(4, 16, 16)))


# --- prepare: where the joint is ------------------------------------------------------------

#: The voxel of the whole field of view in which the first voxel of a knee lies: far from its middle.
CORNER = (2, 60, 10)


def wide(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A knee in a field of view of 96 x 120 x 108 mm, in a corner of it; the rest is dark."""
    image, label = knee(seed)
    whole = np.random.default_rng(seed).normal(100, 0.2, (24, 100, 90)).astype(np.float32)
    marks = np.zeros(whole.shape, np.uint8)
    box = tuple(slice(first, first + n) for first, n in zip(CORNER, SHAPE, strict=True))
    whole[box], marks[box] = image, label
    return whole, marks


@pytest.fixture()
def large(tmp_path: Path) -> Path:
    """A hospital whose volumes are stored from front to back and from top to bottom, in a place of its own."""
    place = np.diag([*SPACING, 1.0])
    place[:3, 3] = (-40, 300, 1000)
    order = nib.orientations.axcodes2ornt(("P", "I", "R"))
    for k in range(5):
        arrays = dict(zip(("images", "labels"), wide(700 + k), strict=True))
        for kind in ("images", "labels") if k < 4 else ("images",):
            stored = nib.Nifti1Image(arrays[kind], place).as_reoriented(order)
            save(tmp_path / "sites/north" / f"{kind}Tr" / f"k{k}.nii.gz", np.asarray(stored.dataobj), stored.affine)
    return tmp_path / "sites"


def test_a_large_field_of_view_is_cut_round_the_joint_and_the_page_says_where(large: Path) -> None:
    """With a label round it, to the voxel; without one where the network sees cartilage, within a voxel of the grid."""
    asked: list[int] = []

    def network() -> tuple[object, object]:
        asked.append(1)
        return bright, OWN  # takes what stands out of its window for cartilage

    made = prepare.prepare_sites(large, large.parent / "out", OWN, network=network)  # type: ignore[arg-type]
    assert asked == [1] and not made.warnings
    crops = {crop.name: crop for crop in made.crops["north"]}
    assert {name: crop.round for name, crop in crops.items()} == {
        **dict.fromkeys(["k0", "k1", "k2", "k3"], "its label"),
        "k4": "the joint that the network found",
    }
    page = (large.parent / "out" / "preview.html").read_text(encoding="utf-8")
    for item in made.sites["north"].items:
        _, marks = wide(700 + int(item.name[1:]))
        found = np.argwhere(marks)
        middle = (found.min(axis=0) + found.max(axis=0)) / 2
        expected = middle * SPACING + (-40, 300, 1000)
        crop = crops[item.name]
        assert np.allclose(crop.place_mm, expected, atol=0.01 if item.label else 6)
        volume = nib.load(item.image)
        held = nib.affines.apply_affine(volume.affine, (np.array(OWN.grid_shape) - 1) / 2)
        assert np.allclose(held, crop.place_mm, atol=0.01)  # the file's own header says so
        off = np.linalg.norm(expected - (np.array([23, 99, 89]) / 2 * SPACING + (-40, 300, 1000)))
        assert crop.off_mm == pytest.approx(float(off), abs=0.01 if item.label else 8) and off > 40
        assert page.count(f"{item.name}: {crop.text}") == 1 and f'alt="{item.name}, {crop.text}' in page
        if item.label is not None:  # nothing is lost, and it lies on its image
            label = np.asarray(nib.load(item.label).dataobj)
            assert (label > 0).sum() == (marks > 0).sum() and np.allclose(nib.load(item.label).affine, volume.affine)
            grey = volume.get_fdata()
            assert grey[label == 3].mean() > grey[label == 1].mean() > grey[label == 0].mean()
    shown = made.text()
    far = max(crop.off_mm for crop in crops.values())
    assert (
        f"cut: 4 round its label, 1 round the joint that the network found; up to {far:.0f} mm off the middle" in shown
    )


def test_looking_for_the_joint_can_be_switched_off(
    large: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the knee in the corner is lost, which is refused for what has a label."""
    monkeypatch.setattr("fedkd_utils.__main__.PROFILES", {"quick": OWN})

    def never() -> tuple[object, object]:
        raise AssertionError("asked for a network")

    with pytest.raises(VolumeError, match="k[0-9].nii.gz: .* of its cartilage lies outside the common grid"):
        prepare.prepare_sites(large, large.parent / "out", OWN, centred=True, network=never)  # type: ignore[arg-type]
    assert main(["prepare", str(large), str(large.parent / "out"), "--centred"]) == 1
    assert "lies outside the common grid" in capsys.readouterr().err
    for k in range(4):
        (large / f"north/labelsTr/k{k}.nii.gz").unlink()
    made = prepare.prepare_sites(large, large.parent / "out", OWN, centred=True, network=never)  # type: ignore[arg-type]
    assert {crop.round for crop in made.crops["north"]} == {"the middle of its field of view"}
    assert max(crop.off_mm for crop in made.crops["north"]) < 0.01


def test_a_joint_that_nobody_looks_for_or_finds_is_said(large: Path) -> None:
    def blind() -> tuple[object, object]:
        return lambda x: bright(x - 99), OWN

    for number, (network, words) in enumerate(((None, "no network looked"), (blind, "sees no cartilage"))):
        made = prepare.prepare_sites(large, large.parent / f"out{number}", OWN, network=network)  # type: ignore[arg-type]
        (warning,) = made.warnings
        assert warning.level == "warning" and words in warning.text and "k4.nii.gz" in warning.text
        assert words in (large.parent / f"out{number}" / "preview.html").read_text(encoding="utf-8")
        (crop,) = [crop for crop in made.crops["north"] if crop.name == "k4"]
        assert crop.round == "the middle of its field of view" and crop.off_mm < 0.01


def test_the_command_looks_with_a_checkpoint_or_a_teacher_of_its_own(
    large: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDKD_CACHE", str(cache))
    monkeypatch.setattr("fedkd_utils.__main__.PROFILES", {"quick": OWN})
    monkeypatch.setattr(segment, "locate_joint", lambda image, affine, network, settings: asked.append(network))
    asked: list[object] = []
    assert main(["prepare", str(large), str(large.parent / "out")]) == 0
    assert "1 round the middle of its field of view" in capsys.readouterr().out and len(asked) == 1
    (teacher,) = (cache / "teachers").glob("*.safetensors")
    command = ["prepare", str(large), str(large.parent / "out2"), "--checkpoint", str(teacher)]
    assert main(command) == 0 and len(asked) == 2
    states = [networks.copy_state(network) for network in asked]  # type: ignore[arg-type]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_visits_of_a_person_stay_together(two: Path) -> None:
    for k, person in enumerate((5, 5, 6, 7, 5)):
        facts = json.loads((two / "north/dataset.json").read_text()) if k else {"subjects": {}}
        facts["subjects"][f"k{k}.nii.gz"] = person
        (two / "north/dataset.json").write_text(json.dumps(facts))
    for seed in range(4):
        site = prepare.prepare_sites(two, two.parent / f"out{seed}", OWN, seed).sites["north"]
        parts = [{item.subject for item in part} for part in (site.training, site.validation, site.test)]
        assert all(parts) and sum(map(len, parts)) == 3 == len(set.union(*parts))
        assert {item.subject for item in site.unlabelled} <= parts[0]
        assert sites.open_sites(two.parent / f"out{seed}")


FULL = """
import resource, signal, sys
from fedkd_utils import sites
from fedkd_utils.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
sys.exit(main(["prepare", sys.argv[1], sys.argv[2]]))
"""


@pytest.mark.parametrize("room", [0, 9_000, 100_000])
def test_a_disk_without_room_leaves_nothing_and_is_named(two: Path, room: int) -> None:
    """The system itself refuses to write so much: at the first file, at a later one, and at the preview page."""
    before, out = tree(two.parent), two.parent / "out"
    command = [sys.executable, "-c", FULL, str(two), str(out), str(room)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=Path(__file__).parent.parent)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be written (File too large): make room, or write elsewhere" in done.stderr
    assert str(out) in done.stderr and ".building" not in done.stderr
    assert tree(two.parent) == before


def test_a_place_that_cannot_be_written_is_named(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (two.parent / "file").write_text("")
    assert main(["prepare", str(two), str(two.parent / "file" / "out")]) == 1
    assert f"{two.parent / 'file'}" in capsys.readouterr().err


def test_a_folder_that_is_read_only_is_named_as_the_user_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / ".out-x1.building"))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(OSError, match="cannot be written .*: write elsewhere") as caught:
        folder_in_one_step(tmp_path / "out").__enter__()
    assert caught.value.filename == str(tmp_path / "out")


# --- run ------------------------------------------------------------


@pytest.fixture()
def prepared(two: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDKD_CACHE", str(cache))
    prepare.prepare_sites(two, two.parent / "out", OWN)
    return two.parent / "out"


def test_a_row_that_needs_the_scanners_sequences_is_refused_on_own_sites(prepared: Path) -> None:
    with pytest.raises(ValueError, match="which volumes do not hold: run teacher_random"):
        experiments.run_sites("mixed_protocols", sites.open_sites(prepared), OWN, show_progress=False)
    with pytest.raises(ValueError, match="contrast of made knees only: run teacher_random"):
        experiments.run_sites("finetune_recontrasted", sites.open_sites(prepared), OWN, show_progress=False)


@pytest.mark.parametrize(
    "row", ["fedavg", "dual_kd", "teacher_only", "local_only", "pooled", "fedbn", "chosen_finetune"]
)
def test_rows_run_on_own_sites(prepared: Path, row: str) -> None:
    cohort = sites.open_sites(prepared)
    result = experiments.run_sites(row, cohort, OWN, show_progress=False)
    assert result.setting == "own" and set(result.best_round) == {"north", "Süd Klinik"}
    assert len(result.test) == 2 * 3 * 2  # clients, classes, with and without components
    assert experiments.comparison_table([result])["Dice"].notna().all()
    model = experiments.result_folder(result) / "model.safetensors"
    apart = row in ("local_only", "fedbn", "chosen_finetune")
    if apart:
        with pytest.raises(ValueError, match=f"{model.name}: has a model for each of Süd Klinik, north"):
            experiments.open_model(model)
    network, settings = experiments.open_model(model, "north" if apart else None)
    assert settings.grid_shape == OWN.grid_shape and not network.training
    assert networks.copy_state(network).keys() == experiments.load_models(model)["north"].keys()
    with pytest.raises(ValueError, match="Name one of them"):
        experiments.open_model(model, "west")


def test_a_repository_of_ones_own_teaches_what_it_labels(prepared: Path) -> None:
    made = experiments.run_sites("teacher_only", sites.open_sites(prepared), OWN, show_progress=False)
    hospital(prepared / "repository", 500, labelled=3)
    (prepared / "repository/dataset.json").write_text(
        '{"validation": ["imagesTr/k0.nii.gz"], "labelled_classes": [1, 2]}'
    )
    cohort = sites.open_sites(prepared)
    assert cohort.repository.name == "repository" and len(cohort.clients) == 2
    anyway = experiments.run_sites("teacher_random", cohort, OWN, show_progress=False)
    assert anyway.teacher["weights_sha256"] == made.teacher["weights_sha256"]  # as without a repository
    taught = experiments.run_sites("teacher_only", cohort, OWN, show_progress=False)
    assert taught.teacher["weights_sha256"] != made.teacher["weights_sha256"]
    assert set(taught.best_round) == {"north", "Süd Klinik"}


def test_a_result_is_made_again_when_a_site_says_another_thing_of_the_same_files(prepared: Path) -> None:
    first = experiments.run_sites("fedavg", sites.open_sites(prepared), OWN, show_progress=False)
    again = experiments.run_sites("fedavg", sites.open_sites(prepared), OWN, show_progress=False)
    assert (again.inputs, again.wall_seconds) == (first.inputs, first.wall_seconds)  # read from its file
    described = prepared / "north" / "dataset.json"
    facts = json.loads(described.read_text())
    facts["labelled_classes"] = {name: [1, 2] for name in facts["labelled_classes"]}
    described.write_text(json.dumps(facts))
    second = experiments.run_sites("fedavg", sites.open_sites(prepared), OWN, show_progress=False)
    assert second.inputs != first.inputs
    frame = second.test_frame()
    assert set(frame.loc[frame["client"] == "north", "class"]) == {1, 2}
    assert set(frame.loc[frame["client"] != "north", "class"]) == {1, 2, 3}


@pytest.mark.parametrize("part", ["training", "validation", "test"])
def test_clients_need_labelled_volumes_of_every_split(two: Path, part: str) -> None:
    cohort = sites.open_sites(two)
    clients = []
    for site in cohort.clients:
        parts = dict(zip(("training", "validation", "test"), ((item,) for item in site.training), strict=False))
        clients.append(dataclasses.replace(site, **parts))  # type: ignore[arg-type]
    whole = dataclasses.replace(cohort, clients=tuple(clients))
    clients[1] = dataclasses.replace(clients[1], **{part: ()})  # type: ignore[arg-type]
    lacking = dataclasses.replace(whole, clients=tuple(clients))
    with pytest.raises(ValueError, match=f"no labelled {part} volume. Name some in dataset.json"):
        experiments.run_sites("fedavg", lacking, OWN, show_progress=False)


def test_a_volume_that_cannot_be_used_stops_a_run_before_any_training(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments, "run_sites", lambda *_, **__: pytest.fail("trained"))
    path = sorted((prepared / "north" / "imagesTs").iterdir())[0]
    nib.save(nib.Nifti1Image(np.ones((9, 9, 9, 2), np.float32), np.eye(4)), path)
    assert main(["run", "--sites", str(prepared)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {path}: ") and "not a 3D volume" in shown and shown.count("\n") == 1


def test_from_folders_to_a_label_of_another_volume(
    two: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a person does with volumes of their own: check, prepare, run, segment."""
    monkeypatch.setenv("FEDKD_CACHE", str(cache))
    monkeypatch.setattr("fedkd_utils.__main__.PROFILES", {"quick": OWN})
    out, new = two.parent / "out", two.parent / "neues Knie.nii.gz"
    assert main(["check", str(two)]) == main(["prepare", str(two), str(out)]) == 0
    assert "2 training, 1 unlabelled, 1 validation, 1 test" in capsys.readouterr().out
    assert main(["run", "--sites", str(out), "--row", "fedavg", "--seed", "0"]) == 0
    shown = capsys.readouterr().out
    assert "FedAvg" in shown
    model = Path(shown.splitlines()[0].split(": ", 1)[1]) / "model.safetensors"
    save(new, knee(77)[0])
    table = two.parent / "knee.csv"
    command = ["segment", str(new), "--checkpoint", str(model), "--out", str(two.parent / "l.nii.gz")]
    assert main([*command, "--table", str(table)]) == 0
    assert nib.load(two.parent / "l.nii.gz").shape == SHAPE
    assert table.read_text().splitlines()[0] == "source,cartilage,volume_ml,mean_thickness_mm"
    assert main(["run", "--row", "fedavg"]) == 1 and "--row belongs to --sites" in capsys.readouterr().err


def test_sites_that_are_not_in_the_layout_have_to_be_prepared(two: Path) -> None:
    metaimage(two / "ski" / "image-001.mhd", knee(1)[0])
    with pytest.raises(VolumeError, match="Run `prepare` first"):
        sites.open_sites(two)
    shutil.rmtree(two / "ski")
    shutil.copytree(two / "north", two / "west")
    with pytest.raises(CohortError, match="same content twice"):
        sites.open_sites(two)
