"""The analytic knee: calibrated against the literature, reproducible, independent of the lattice it is sampled on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from fedkd_utils import anatomy
from fedkd_utils.anatomy import LABEL_OF_TISSUE, Pose, draw_knee, tissue_map
from fedkd_utils.calibration import CODES, LITERATURE, Cartilage, local_thickness, measure_cartilages
from fedkd_utils.settings import PROJECT

#: How many made knees are compared with real ones, and how close their mean volumes and extents must come.
SUBJECTS, VOLUMES, EXTENTS = 50, 0.12, 0.2


@pytest.fixture(scope="module")
def fifty() -> dict[str, list[Cartilage]]:
    """The cartilages of fifty subjects, measured."""
    knees = [measure_cartilages(draw_knee(seed)) for seed in range(SUBJECTS)]
    return {name: [knee[name] for knee in knees] for name in CODES}


@pytest.mark.parametrize("name", CODES)
def test_volumes_of_fifty_subjects_are_those_of_manual_maps(fifty, name):
    volumes_ml = np.array([cartilage.volume_ml for cartilage in fifty[name]])
    assert volumes_ml.mean() == pytest.approx(LITERATURE[name]["mean_ml"][0], rel=VOLUMES)
    assert volumes_ml.min() < LITERATURE[name]["one_knee_ml"][0] < volumes_ml.max()
    assert volumes_ml.std() / volumes_ml.mean() > 0.15, "subjects must differ"


def test_every_femoral_volume_lies_in_the_measured_range(fifty):
    low, high = LITERATURE["femoral"]["range_ml"]
    assert all(low <= cartilage.volume_ml <= high for cartilage in fifty["femoral"])


@pytest.mark.parametrize("name", CODES)
def test_extents_resemble_the_measured_knee(fifty, name):
    """One knee was measured, and people differ: it lies among the fifty, and their mean within a fifth of it."""
    extents_mm = np.array([cartilage.extent_mm for cartilage in fifty[name]])
    measured_mm = np.array(LITERATURE[name]["extent_mm"])
    if name == "tibial":  # the file gives the height of each plateau; the box around two tilted ones is higher
        extents_mm, measured_mm = extents_mm[:, :2], measured_mm[:2]
    np.testing.assert_allclose(extents_mm.mean(axis=0), measured_mm, rtol=EXTENTS)
    assert (extents_mm.min(axis=0) <= measured_mm).all() and (measured_mm <= extents_mm.max(axis=0)).all()


@pytest.mark.parametrize("name", CODES)
def test_local_thickness_of_fifty_subjects_falls_in_the_measured_range(fifty, name):
    low, high = LITERATURE[name]["thickness_mm"]
    p10, p90 = np.percentile(np.concatenate([cartilage.thickness_mm for cartilage in fifty[name]]), [10, 90])
    assert low <= p10 < p90 <= high
    medians = [float(np.median(cartilage.thickness_mm)) for cartilage in fifty[name]]
    assert low <= min(medians) < max(medians) <= high, "every subject's own median too"
    assert max(medians) > 1.3 * min(medians), "subjects must differ"


def test_the_readme_says_how_close_they_come():
    text = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    words = f"over {SUBJECTS} subjects, mean volumes agree within {VOLUMES:.0%}, mean extents within {EXTENTS:.0%},"
    assert words.replace("%", " %") in text


@pytest.mark.parametrize("thick_mm", [1.5, 3.0])
def test_thickness_of_a_shell_around_a_ball_is_measured(thick_mm):
    spacing_mm, radius_mm = 0.5, 15.0
    away = np.linalg.norm(np.indices((80, 80, 80)) - 39.5, axis=0) * spacing_mm
    bone = away < radius_mm
    shell = ~bone & (away < radius_mm + thick_mm)
    measured = local_thickness(shell, bone, spacing_mm)
    assert measured.mean() == pytest.approx(thick_mm, abs=0.15)
    assert abs(measured - thick_mm).max() < spacing_mm


def test_thickness_leaves_out_the_margin():
    bone = np.zeros((60, 60, 20), bool)
    bone[..., :8] = True
    plate = np.zeros_like(bone)
    plate[10:50, 10:50, 8:12] = True  # 2 mm of cartilage on a plane
    plate[10:50, 10:30, 9:] = False  # thinned to 0.5 mm in one half
    assert local_thickness(plate, bone, 0.5) == pytest.approx(2.0)


def test_same_seed_same_bits_and_other_seeds_other_knees():
    a, b, c = (tissue_map(draw_knee(s), (40, 48, 48), (2.0,) * 3) for s in (7, 7, 8))
    assert np.array_equal(a, b)
    assert np.mean(a != c) > 0.05


def test_left_knee_is_the_mirror_image_of_the_right():
    right = replace(draw_knee(3), side="right")
    left = replace(right, side="left")
    shape, spacing = (45, 40, 40), (2.0, 2.4, 2.4)
    mirrored = tissue_map(left, shape, spacing)[::-1]
    assert np.mean(tissue_map(right, shape, spacing) == mirrored) > 0.9999


def test_lateral_side_is_where_the_fibula_is():
    knee = replace(draw_knee(1), side="right")
    below = tissue_map(knee, (90, 110, 3), (1.0, 1.0, 1.0), Pose(offset_mm=(0, 0, -60)))[:, :45, 1]
    bone = below == anatomy.MARROW
    assert bone[60:].sum() > 2 * bone[:30].sum(), "x must run from medial to lateral in a right knee"


def test_volume_does_not_depend_on_the_voxel_size():
    knee = draw_knee(5)
    coarse = tissue_map(knee, (90, 100, 100), (1.0, 1.0, 1.0))
    fine = tissue_map(knee, (180, 200, 200), (0.5, 0.5, 0.5))
    for code in CODES.values():
        assert (coarse == code).sum() == pytest.approx((fine == code).sum() / 8, rel=0.03)


def test_lattice_is_fine_enough(monkeypatch):
    knee = draw_knee(11)
    shape, spacing = (80, 90, 90), (1.0, 1.0, 1.0)
    usual = LABEL_OF_TISSUE[tissue_map(knee, shape, spacing)]
    monkeypatch.setattr(anatomy, "LATTICE_MM", 1.0)
    exact = LABEL_OF_TISSUE[tissue_map(knee, shape, spacing)]
    for label in (1, 2, 3):
        overlap = 2 * np.sum((usual == label) & (exact == label)) / (np.sum(usual == label) + np.sum(exact == label))
        assert overlap > 0.95


def test_lesions_take_cartilage_away_and_nothing_else():
    knee = draw_knee(2)
    whole = replace(knee, lesions=np.zeros((0, 5)))
    hole = replace(knee, lesions=np.array([[-22.0, 6.0, 2.0, 9.0, 1.3]]))
    shape, spacing = (90, 100, 100), (1.0, 1.0, 1.0)
    a, b = tissue_map(whole, shape, spacing), tissue_map(hole, shape, spacing)
    lost = np.isin(a, [anatomy.FEMORAL, anatomy.TIBIAL]) & ~np.isin(b, [anatomy.FEMORAL, anatomy.TIBIAL])
    gained = (LABEL_OF_TISSUE[b] > 0) & (LABEL_OF_TISSUE[a] == 0)
    assert lost.sum() > 100 and gained.sum() == 0
    assert np.array_equal(a == anatomy.MARROW, b == anatomy.MARROW)
    assert not np.any(b[lost] == anatomy.MARROW), "where cartilage is gone there is fluid or fat, not bone"


def test_cartilage_lies_on_its_bone():
    tissue = tissue_map(draw_knee(9), (90, 100, 100), (1.0, 1.0, 1.0))
    bone = np.isin(tissue, [anatomy.CORTICAL, anatomy.MARROW])
    distance = ndimage.distance_transform_edt(~bone)
    for code in CODES.values():
        assert distance[tissue == code].max() < 7.0


def test_pose_moves_the_knee():
    knee = draw_knee(4)
    straight = tissue_map(knee, (50, 60, 60), (2.0,) * 3)
    moved = tissue_map(knee, (50, 60, 60), (2.0,) * 3, Pose(offset_mm=(0, 8.0, 0)))
    assert np.mean(straight[:, 4:] == moved[:, :-4]) > 0.98


def test_a_lattice_of_one_plane_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        tissue_map(draw_knee(0), (10, 10, 1), (1.0, 1.0, 1.0))
