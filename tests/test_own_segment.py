"""Segmenting as in a clinic: DICOM in, thickness without bone, and the joint found in a wide field of view."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from test_formats import sagittal_series
from test_segment import SMALL, bright, knee_like, save

from fedkd_utils import acquisition, anatomy, formats, networks, segment, training, transforms
from fedkd_utils.acquisition import SCANNERS, Scan
from fedkd_utils.calibration import sheet_thickness_mm
from fedkd_utils.settings import QUICK

# --- thickness ------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (0.36, 0.36, 0.7), (4.5, 0.3, 0.3)])
@pytest.mark.parametrize("voxels", [1, 4, 7, 10])
def test_plates_along_the_axes_are_within_one_percent(spacing: tuple[float, float, float], voxels: int) -> None:
    mask = np.zeros((24, 70, 70), bool)
    mask[2:22, 20 : 20 + voxels, 5:65] = True
    expected = voxels * spacing[1]
    assert sheet_thickness_mm(mask, spacing) == pytest.approx(expected, rel=0.01)


def layers(thickness: float, spacing: tuple[float, float, float]) -> list[np.ndarray]:
    """Half a shell, a plate that runs obliquely within the slices, and one that runs obliquely through them."""
    shape = [round(40 / s) for s in spacing]
    x, y, z = np.moveaxis((np.indices(shape).T * spacing).T - 20, 0, 0)
    r = np.sqrt(x**2 + y**2 + z**2)
    shell = (np.abs(r - 16) < thickness / 2) & (z > 0)
    within, through = 0.36 * x + 0.48 * y + 0.8 * z, 0.8 * x + 0.48 * y + 0.36 * z
    return [shell, *((np.abs(across) < thickness / 2) & (r < 17) for across in (within, through))]


@pytest.mark.parametrize("thickness", [1.5, 2.5, 4.0])
@pytest.mark.parametrize("spacing", [(0.4, 0.4, 0.4), (0.7, 0.36, 0.36)])
def test_half_a_shell_and_tilted_plates(thickness: float, spacing: tuple[float, float, float]) -> None:
    for layer in layers(thickness, spacing):
        assert sheet_thickness_mm(layer, spacing) == pytest.approx(thickness, rel=0.12)


@pytest.mark.parametrize("spacing", [(3.0, 0.4, 0.4), (4.5, 0.3, 0.3)])
def test_thick_slices_cannot_say_how_thick_a_thin_plate_is(spacing: tuple[float, float, float]) -> None:
    """What the docstring warns of is so: half as thick again."""
    assert sheet_thickness_mm(layers(1.5, spacing)[2], spacing) == pytest.approx(1.5 * 1.5, rel=0.05)


def test_nothing_has_no_thickness_and_a_speck_has_its_own() -> None:
    mask = np.zeros((5, 5, 5), bool)
    assert np.isnan(sheet_thickness_mm(mask, (1, 1, 1)))
    mask[2, 2, 2] = True
    assert sheet_thickness_mm(mask, (1.0, 1.0, 1.0)) == pytest.approx(1.0, abs=0.3)


# --- DICOM in ------------------------------------------------------------


def test_a_dicom_series_gives_the_same_label_as_its_nifti_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    volume = np.abs(knee_like((40, 38, 12))).astype(np.float32)
    series = sagittal_series(tmp_path / "knee series", volume, (1.3, 1.1, 4.0))
    voxels, affine = formats.read_dicom(series)
    first = segment.segment_volume(series, bright, SMALL)
    second = segment.segment_volume(save(tmp_path / "copy.nii.gz", voxels, affine), bright, SMALL)
    assert first.path.name == "knee series_cartilage.nii.gz" and first.path.is_file()
    written = nib.load(first.path)
    assert np.array_equal(first.label, second.label) and first.label.any()
    assert np.allclose(written.affine, affine, atol=1e-4) and written.shape == voxels.shape
    table = first.table()
    assert list(table["cartilage"]) == ["femoral", "tibial", "patellar"]
    assert table["volume_ml"][0] == pytest.approx(second.volumes_ml["femoral"])
    assert table["mean_thickness_mm"][0] == pytest.approx(first.thickness_mm["femoral"]) and pd.isna(
        table["mean_thickness_mm"][1]
    )
    segment.preview(segment.read_volume(series), first.label, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


# --- a wide field of view ------------------------------------------------------------


def test_the_joint_is_where_most_cartilage_is() -> None:
    p = torch.zeros((4, 20, 60, 90))
    p[1, 8:12, 10:30, 50:75] = 0.4
    p[1, 8:12, 10:15, 50:60] = 0.9  # denser in a corner: the extent counts, not the mass
    p[2, 2, 50:53, 4:8] = 1.0  # a few sure voxels elsewhere
    p[3] += 0.05  # doubt everywhere
    p[0] = 1 - p[1:].sum(0)
    assert segment.joint_centre(p, (8, 24, 30)) == pytest.approx((9.5, 19.5, 62), abs=1)
    nothing = torch.zeros((4, 4, 6, 8))
    nothing[0] = 1
    assert segment.joint_centre(nothing, (4, 4, 4)) is None


@pytest.mark.parametrize("place", [(20, 24, 24), (30, 100, 40), (14, 60, 150)])
def test_a_knee_in_a_wide_view_is_found_and_what_is_far_from_it_left_out(
    tmp_path: Path, place: tuple[int, int, int]
) -> None:
    settings = dataclasses.replace(SMALL, grid_shape=(8, 24, 24), grid_spacing_mm=(4.0, 2.0, 2.0))
    image = np.full((40, 130, 180), 100, np.float32)
    image += np.random.default_rng(0).normal(0, 5, image.shape).astype(np.float32)
    (a, b, c) = place
    image[a - 4 : a + 4, b - 10 : b + 10, c - 10 : c + 10] = 900
    far = tuple(5 if edge > n // 2 else n - 12 for edge, n in zip(place, image.shape, strict=True))
    image[far[0] : far[0] + 3, far[1] : far[1] + 6, far[2] : far[2] + 6] = 900
    path = save(tmp_path / "wide.nii", image, np.diag([2.0, 1.0, 1.0, 1.0]))
    looks: list[torch.Tensor] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        looks.append(x)
        return bright(x)

    result = segment.segment_volume(path, watch, settings, tmp_path / "l.nii", locate=True)
    found = np.argwhere(result.label == 1)
    assert np.allclose(found.mean(axis=0), np.array(place) - 0.5, atol=1.5)
    assert result.volumes_ml["femoral"] == pytest.approx(8 * 20 * 20 * 2 / 1000, rel=0.3)
    assert len(torch.cat(looks)) > 20


@pytest.mark.parametrize("order", ["RAS", "PIR", "LSA"])
def test_the_joint_has_a_place_in_the_world(order: str) -> None:
    """Whatever the order of axes of the file; and none where nothing looks like cartilage."""
    image = 100 + np.random.default_rng(0).normal(0, 1, (40, 130, 180)).astype(np.float32)
    place, affine = np.array([12, 90, 40]), np.diag([2.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = (-30, 400, 5)
    image[8:16, 80:100, 30:50] = 900
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(order))
    )
    stored = nib.Nifti1Image(image, affine).as_reoriented(turn)
    found = segment.locate_joint(np.asarray(stored.dataobj), stored.affine, bright, SMALL)
    assert found is not None and np.allclose(found, nib.affines.apply_affine(affine, place - 0.5), atol=3)
    assert segment.locate_joint(np.asarray(stored.dataobj), stored.affine, lambda x: bright(x - 99), SMALL) is None


COARSE = dataclasses.replace(QUICK, grid_shape=(12, 32, 32), grid_spacing_mm=(6.0, 2.4, 2.4), channels=(8, 16, 32))


def scanned(subject: int, shape: tuple[int, int, int], offset_mm: tuple[float, float, float] = (0, 0, 0)) -> Scan:
    """A made knee on voxels of the coarse grid, in a field of view of any size and place."""
    scanner = dataclasses.replace(SCANNERS["pd_fs"], shape=shape, spacing_mm=COARSE.grid_spacing_mm)
    rng, sequence, pose = acquisition.begin_scan(subject, scanner, 1)
    x, y, z = np.add(pose.offset_mm, offset_mm)
    knee = anatomy.draw_knee(subject)
    tissue = anatomy.tissue_map(
        knee, *acquisition.fine_lattice(scanner), anatomy.Pose(pose.angles_deg, (float(x), float(y), float(z)))
    )
    return acquisition.scan_tissue(tissue, scanner, subject, knee.side, sequence, rng)


@pytest.fixture(scope="module")
def trained() -> networks.TappedNetwork:
    """A small network that has seen six knees, each in the middle of its view, for some seconds."""
    grid = (COARSE.grid_spacing_mm, COARSE.grid_shape)
    knees = [scanned(subject, COARSE.grid_shape) for subject in range(6)]
    images = torch.stack([transforms.z_score(transforms.to_grid(k.image, k.affine, *grid)[0])[None] for k in knees])
    labels = torch.stack([transforms.label_to_grid(k.label, k.affine, *grid) for k in knees])
    network = networks.build_network(COARSE, 0)
    training.train_supervised(
        network, images, labels, steps=150, batch=2, learning_rate=1e-2, weight_decay=1e-4, seed=0
    )
    return network


@pytest.mark.parametrize(
    ("subject", "shape", "offset_mm"),
    [
        (40, (12, 48, 80), (0, 0, 0)),
        (41, (12, 48, 80), (0, 20, 60)),
        (42, (12, 48, 80), (0, -20, -55)),
        (43, (22, 32, 60), (25, 0, 30)),
    ],
)
def test_a_trained_network_finds_the_joint_in_a_wide_view(
    trained: networks.TappedNetwork, subject: int, shape: tuple[int, int, int], offset_mm: tuple[float, float, float]
) -> None:
    knee = scanned(subject, shape, offset_mm)
    drawn = np.argwhere(knee.label)
    places = nib.affines.apply_affine(knee.affine, drawn)
    truth = nib.affines.apply_affine(knee.affine, (drawn.min(axis=0) + drawn.max(axis=0)) / 2)
    middle = nib.affines.apply_affine(knee.affine, (np.array(knee.image.shape) - 1) / 2)
    found = segment.locate_joint(knee.image, knee.affine, trained, COARSE)
    assert found is not None and np.linalg.norm(found - truth) < 20
    if any(offset_mm):
        assert np.linalg.norm(middle - truth) > 30  # the middle of the view would have been wrong
    half = np.multiply(COARSE.grid_shape, COARSE.grid_spacing_mm) / 2
    assert (np.abs(places - found) < half).all(axis=1).mean() > 0.8  # of the cartilage, in a grid round the place


def test_a_narrow_view_is_looked_at_once(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", knee_like())
    wide = dataclasses.replace(SMALL, grid_shape=(16, 32, 32))
    plain = segment.segment_volume(path, bright, wide, tmp_path / "l.nii")
    located = segment.segment_volume(path, bright, wide, tmp_path / "l.nii", locate=True)
    assert np.array_equal(plain.label, located.label)


# --- full size ------------------------------------------------------------

FULL_SIZE = """
import resource, sys
import nibabel as nib, numpy as np
from fedkd_utils import anatomy, networks, segment
from fedkd_utils.settings import PAPER
path, out = sys.argv[1:]
tissue = anatomy.tissue_map(anatomy.draw_knee(1), (160, 384, 384), (0.7, 0.365, 0.365))
image = (60.0 * tissue + np.random.default_rng(0).normal(100, 10, tissue.shape)).astype(np.int16)
nib.save(nib.Nifti1Image(image, np.diag([0.7, 0.365, 0.365, 1])), path)
network = networks.build_network(PAPER, 0).eval()
result = segment.segment_volume(path, network, PAPER, out, locate=True, progress=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, *result.label.shape)
"""


def test_a_full_size_volume_takes_less_than_8_gb_and_shows_how_far_it_is(tmp_path: Path) -> None:
    """The paper's network in sliding windows over 160 x 384 x 384 voxels. Seconds are for the benchmark to measure."""
    command = [sys.executable, "-c", FULL_SIZE, str(tmp_path / "knee.nii.gz"), str(tmp_path / "label.nii.gz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    peak_bytes, *shape = map(float, done.stdout.split())
    assert shape == [160, 384, 384] and peak_bytes < 8e9
    assert "100%" in done.stderr  # the windows as they are done
