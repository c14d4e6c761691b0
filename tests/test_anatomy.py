"""The analytic knee: calibrated against the literature, reproducible, independent of the lattice it is sampled on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import skeletonize

from fedkd_utils import anatomy
from fedkd_utils.anatomy import LABEL_OF_TISSUE, LITERATURE, Pose, draw_knee, tissue_map

SPACING_MM = 1.0
CODES = {"femoral": anatomy.FEMORAL, "tibial": anatomy.TIBIAL, "patellar": anatomy.PATELLAR}


@pytest.fixture(scope="module")
def fifty() -> dict[str, np.ndarray]:
    """(50, 4) per cartilage: volume in ml and extents along x, y, z in mm."""
    rows: dict[str, list[list[float]]] = {name: [] for name in CODES}
    for seed in range(50):
        tissue = tissue_map(draw_knee(seed), (100, 112, 112), (SPACING_MM,) * 3)
        for name, code in CODES.items():
            where = np.argwhere(tissue == code)
            extent = (where.max(axis=0) - where.min(axis=0) + 1) * SPACING_MM
            rows[name].append([len(where) * SPACING_MM**3 / 1000, *extent])
    return {name: np.array(values) for name, values in rows.items()}


@pytest.mark.parametrize("name", CODES)
def test_volumes_of_fifty_subjects_are_those_of_manual_maps(fifty, name):
    volumes_ml = fifty[name][:, 0]
    assert volumes_ml.mean() == pytest.approx(LITERATURE[name]["mean_ml"][0], rel=0.12)
    assert volumes_ml.min() < LITERATURE[name]["one_knee_ml"][0] < volumes_ml.max()
    assert volumes_ml.std() / volumes_ml.mean() > 0.15, "subjects must differ"


def test_every_femoral_volume_lies_in_the_measured_range(fifty):
    low, high = LITERATURE["femoral"]["range_ml"]
    assert fifty["femoral"][:, 0].min() >= low and fifty["femoral"][:, 0].max() <= high


@pytest.mark.parametrize("name", ["femoral", "patellar"])
def test_extents_resemble_the_measured_knee(fifty, name):
    measured = np.array(LITERATURE[name]["extent_mm"])
    np.testing.assert_allclose(fifty[name][:, 1:].mean(axis=0), measured, rtol=0.2)


def test_tibial_extents_resemble_the_measured_knee(fifty):
    across, along = LITERATURE["tibial"]["extent_mm"][:2]
    # One box around both plateaus of a tilted tibia is higher than the boxes of either, so only x and y are compared.
    np.testing.assert_allclose(fifty["tibial"][:, 1:3].mean(axis=0), [across, along], rtol=0.15)


@pytest.mark.parametrize("name", CODES)
def test_local_thickness_falls_in_the_measured_range(name):
    """Twice the distance to the border on the medial surface, a measure that knows nothing of the model's thickness."""
    values = []
    for seed in range(4):
        tissue = tissue_map(draw_knee(seed), (170, 190, 150), (0.5, 0.5, 0.5))
        mask = tissue == CODES[name]
        depth = ndimage.distance_transform_edt(mask, sampling=0.5)
        values.append(2 * depth[skeletonize(mask)])
    p10, p90 = np.percentile(np.concatenate(values), [10, 90])
    low, high = LITERATURE[name]["thickness_mm"]
    assert low - 0.75 <= p10 <= p90 <= high + 0.75, (p10, p90)


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
