"""Metrics against all pairs of surface points, closed forms, MONAI, and their invariants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from scipy.spatial.distance import cdist

from fedkd_utils import metrics

few = hypothesis_settings(max_examples=40, deadline=None)
shapes = st.tuples(*[st.integers(1, 6)] * 3)
spacings = st.tuples(*[st.floats(0.2, 6)] * 3)
seeds = st.integers(0, 2**31 - 1)
DISTANCES = ("assd_mm", "hd95_mm", "hd_mm")


def draw_masks(seed, shape, share=0.4):
    rng = np.random.default_rng(seed)
    return rng.random(shape) < share, rng.random(shape) < share


def surface_points(mask, spacing):
    """Centres in mm of the voxels with a face neighbour outside, spelled out."""
    inside = {tuple(v) for v in np.argwhere(mask).tolist()}
    points = []
    for v in inside:
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbour = list(v)
            neighbour[axis] += step
            if tuple(neighbour) not in inside:
                points.append([i * s for i, s in zip(v, spacing, strict=True)])
                break
    return np.array(points)


def percentile(values, share):
    """Linear interpolation between order statistics, spelled out."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def distances_by_all_pairs(p, t, spacing):
    pairs = cdist(surface_points(p, spacing), surface_points(t, spacing))
    forth, back = pairs.min(axis=1).tolist(), pairs.min(axis=0).tolist()
    return {
        "assd_mm": math.fsum(forth + back) / len(forth + back),
        "hd95_mm": max(percentile(forth, 0.95), percentile(back, 0.95)),
        "hd_mm": max(forth + back),
    }


def distances(p, t, spacing):
    return {name: getattr(metrics, name)(p, t, spacing) for name in DISTANCES}


# ---------------------------------------------------------------------------------------------- brute force


@few
@given(seeds, shapes, spacings, st.floats(0.05, 0.95))
def test_distances_equal_all_pairs(seed, shape, spacing, share):
    p, t = draw_masks(seed, shape, share)
    p.flat[seed % p.size] = t.flat[(seed // 7) % t.size] = True  # neither is empty
    assert distances(p, t, spacing) == pytest.approx(distances_by_all_pairs(p, t, spacing), rel=1e-9, abs=1e-9)


@few
@given(seeds, shapes)
def test_overlaps_equal_counting(seed, shape):
    p, t = draw_masks(seed, shape)
    ps, ts = ({tuple(v) for v in np.argwhere(m).tolist()} for m in (p, t))
    if ps | ts:
        assert metrics.dice(p, t) == pytest.approx(2 * len(ps & ts) / (len(ps) + len(ts)))
        assert metrics.voe(p, t) == pytest.approx(1 - len(ps & ts) / len(ps | ts))
    if ts:
        assert metrics.vd(p, t) == pytest.approx((len(ps) - len(ts)) / len(ts))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.5, 0.3, 0.35), (0.4, 2.0, 0.9)])
def test_monai_agrees_also_with_anisotropic_voxels(spacing):
    rng = np.random.default_rng(5)
    lattice = np.indices((9, 16, 14))
    p = ((lattice - np.array([4, 8, 7])[:, None, None, None]) ** 2 / np.array([9, 30, 20])[:, None, None, None]).sum(
        0
    ) < 1
    t = np.roll(p, (1, 2, -1), axis=(0, 1, 2)) & (rng.random(p.shape) < 0.97)
    as_monai = [torch.from_numpy(m)[None, None].float() for m in (p, t)]
    options = {"include_background": True, "spacing": spacing}
    assd = compute_average_surface_distance(*as_monai, symmetric=True, **options).item()
    hd95 = compute_hausdorff_distance(*as_monai, percentile=95, **options).item()
    hd = compute_hausdorff_distance(*as_monai, **options).item()
    expected = {"assd_mm": assd, "hd95_mm": hd95, "hd_mm": hd}
    assert distances(p, t, spacing) == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_cube_moved_along_one_axis(axis):
    """Side n moved by k < n: overlap (n - k) / n; the far faces lie k spacings away; other distances by
    hand.
    """
    n, k, spacing = 6, 2, (4.0, 1.2, 0.5)
    p = np.zeros((14, 14, 14), dtype=bool)
    p[3 : 3 + n, 3 : 3 + n, 3 : 3 + n] = True
    t = np.roll(p, k, axis=axis)
    assert metrics.dice(p, t) == pytest.approx((n - k) / n)
    assert metrics.voe(p, t) == pytest.approx(1 - (n - k) / (n + k))
    assert metrics.vd(p, t) == 0
    assert metrics.hd_mm(p, t, spacing) == pytest.approx(k * spacing[axis])


def test_two_voxels_and_two_planes():
    p, t = np.zeros((5, 6, 7), dtype=bool), np.zeros((5, 6, 7), dtype=bool)
    p[0, 0, 0] = t[3, 4, 6] = True
    spacing = (4.0, 0.5, 1.5)
    expected = math.hypot(12.0, 2.0, 9.0)
    assert distances(p, t, spacing) == pytest.approx(dict.fromkeys(DISTANCES, expected))
    plane, other = np.zeros((5, 6, 7), dtype=bool), np.zeros((5, 6, 7), dtype=bool)
    plane[:, 1], other[:, 4] = True, True
    assert distances(plane, other, spacing) == pytest.approx(dict.fromkeys(DISTANCES, 1.5))


def test_hd95_forgives_an_outlier_that_hd_does_not():
    t = np.zeros((3, 40, 40), dtype=bool)
    t[1, 5:30, 5:30] = True
    p = t.copy()
    p[1, 39, 39] = True  # one voxel out of 626
    assert metrics.hd_mm(p, t, (4.0, 1.0, 1.0)) == pytest.approx(math.hypot(10, 10))
    assert metrics.hd95_mm(p, t, (4.0, 1.0, 1.0)) == 0
    assert metrics.assd_mm(p, t, (4.0, 1.0, 1.0)) == pytest.approx(math.hypot(10, 10) / (626 + 625))


def test_distances_use_the_spacing_of_their_own_axis():
    p, t = np.zeros((4, 4, 4), dtype=bool), np.zeros((4, 4, 4), dtype=bool)
    p[0, 0, 0] = t[1, 0, 0] = True
    for order in itertools.permutations(range(3)):
        spacing = np.array([4.5, 0.3, 0.7])[list(order)]
        assert metrics.hd_mm(p.transpose(order), t.transpose(order), spacing) == pytest.approx(4.5)


# ----------------------------------------------------------------------------------------------- invariants


@few
@given(seeds, shapes, spacings, st.floats(0.1, 10))
def test_symmetric_scaled_moved_and_identical(seed, shape, spacing, factor):
    p, t = draw_masks(seed, shape)
    p.flat[0] = t.flat[-1] = True
    value = distances(p, t, spacing)
    assert distances(t, p, spacing) == pytest.approx(value, abs=1e-9)
    assert distances(p, t, [s * factor for s in spacing]) == pytest.approx(
        {name: d * factor for name, d in value.items()}, abs=1e-9
    )
    wide = [np.pad(m, [(2, 5), (1, 0), (0, 3)]) for m in (p, t)]
    assert distances(*wide, spacing) == pytest.approx(value, abs=1e-9)
    assert distances(p, p, spacing) == dict.fromkeys(DISTANCES, 0.0)
    assert metrics.dice(p, p) == 1 and metrics.voe(p, p) == 0 == metrics.vd(p, p)
    assert value["assd_mm"] <= value["hd_mm"] and value["hd95_mm"] <= value["hd_mm"] + 1e-12
    # Dice and VOE carry the same information.
    d = metrics.dice(p, t)
    assert metrics.voe(p, t) == pytest.approx(1 - d / (2 - d))


# ---------------------------------------------------------------------------------- cases, missing classes


def test_case_rows_hold_every_class_and_name_what_is_missing():
    label, prediction = np.zeros((4, 8, 8), dtype=np.uint8), np.zeros((4, 8, 8), dtype=np.int64)
    label[1:3, 2:5, 2:5] = 1
    prediction[1:3, 2:5, 3:6] = 1
    label[0, 7] = 2  # never predicted
    prediction[3, 0] = 3  # not there
    rows = {row["class"]: row for row in metrics.case_metrics(prediction, label, (4.0, 1.2, 1.2))}
    assert [row["cartilage"] for row in rows.values()] == ["femoral", "tibial", "patellar"]
    assert rows[1]["dice"] == pytest.approx(2 / 3) and rows[1]["hd_mm"] == pytest.approx(1.2)
    assert rows[1]["truth_ml"] == rows[1]["prediction_ml"] == pytest.approx(18 * 4 * 1.2 * 1.2 / 1000)
    assert rows[1]["empty"] == ""
    assert (rows[2]["dice"], rows[2]["voe"], rows[2]["vd"], rows[2]["empty"]) == (0, 1, -1, "prediction")
    assert (rows[3]["dice"], rows[3]["voe"], rows[3]["empty"]) == (0, 1, "truth")
    assert math.isnan(rows[3]["vd"])
    assert all(math.isnan(rows[c][name]) for c in (2, 3) for name in DISTANCES)
    (nothing,) = metrics.case_metrics(label * 0, label * 0, (1, 1, 1), classes=(2,))
    assert nothing["empty"] == "both" and all(math.isnan(nothing[name]) for name in metrics.METRIC_NAMES)


@few
@given(seeds, spacings)
def test_case_rows_equal_the_single_functions_with_and_without_components(seed, spacing):
    rng = np.random.default_rng(seed)
    prediction, label = rng.integers(0, 4, (2, 5, 6, 4), dtype=np.uint8)
    prediction[rng.random(prediction.shape) < 0.6] = 0
    largest = metrics.keep_largest_components(prediction)
    rows = metrics.case_metrics(prediction, label, spacing, components=("all", "largest"))
    assert [(row["class"], row["components"]) for row in rows] == [
        (c, choice) for c in (1, 2, 3) for choice in ("all", "largest")
    ]
    for row in rows:
        p = (prediction if row["components"] == "all" else largest) == row["class"]
        t = label == row["class"]
        expected = {name: getattr(metrics, name)(p, t) for name in ("dice", "voe", "vd")}
        expected |= distances(p, t, spacing)
        assert {name: row[name] for name in metrics.METRIC_NAMES} == pytest.approx(expected, nan_ok=True)
        assert row["prediction_ml"] == pytest.approx(p.sum() * math.prod(spacing) / 1000)


def flood_fill_components(mask):
    """Components of a mask by hand, voxels touching by face, edge or corner, in array order."""
    left = {tuple(v) for v in np.argwhere(mask).tolist()}
    components = []
    for start in sorted(left):
        if start not in left:
            continue
        left.remove(start)
        component, frontier = {start}, [start]
        while frontier:
            v = frontier.pop()
            for step in itertools.product((-1, 0, 1), repeat=3):
                neighbour = tuple(a + b for a, b in zip(v, step, strict=True))
                if neighbour in left:
                    left.remove(neighbour)
                    component.add(neighbour)
                    frontier.append(neighbour)
        components.append(component)
    return components


@few
@given(seeds, st.floats(0.02, 0.3), st.integers(0, 3))
def test_largest_components_equal_a_flood_fill(seed, share, count):
    rng = np.random.default_rng(seed)
    label = (rng.random((6, 7, 5)) < share).astype(np.uint8) * rng.integers(1, 3, (6, 7, 5), dtype=np.uint8)
    before = label.copy()
    kept = metrics.keep_largest_components(label, {1: count})
    components = sorted(flood_fill_components(label == 1), key=len, reverse=True)[:count]
    expected = np.zeros(label.shape, dtype=bool)
    for v in set().union(*components):
        expected[v] = True
    assert np.array_equal(kept == 1, expected) and np.array_equal(kept == 2, label == 2)
    assert np.array_equal(label, before)


def test_the_tibia_keeps_both_plateaus_and_the_others_one_piece():
    label = np.zeros((12, 10, 10), dtype=np.uint8)
    for c, z in ((1, 0), (2, 4), (3, 8)):
        label[0:4, :4, z], label[6:8, :4, z], label[11, :2, z] = c, c, c
    kept = metrics.keep_largest_components(label)
    assert [int((kept == c).sum()) for c in (1, 2, 3)] == [16, 24, 16]


def test_volumes_in_ml():
    label = np.zeros((10, 10, 10), dtype=np.uint8)
    label[:5], label[5:7] = 1, 2
    assert metrics.volumes_ml(label, (2.0, 1.0, 0.5)) == pytest.approx({1: 0.5, 2: 0.2, 3: 0.0})


def test_a_full_size_knee():
    shape, spacing = (160, 384, 384), (0.7, 0.365, 0.365)
    x, y, z = np.ogrid[:160, :384, :384]
    radius = np.sqrt(((x - 80) * 0.7) ** 2 + ((y - 190) * 0.365) ** 2 + ((z - 190) * 0.365) ** 2)
    label, prediction = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.uint8)
    label[(abs(radius - 30) < 1.2) & (z < 190)] = 1
    prediction[(abs(radius - 30.4) < 1.3) & (z < 195)] = 1
    label[(radius < 20) & (abs(z - 210) < 5)] = 2
    prediction[0, 0, :3] = 1  # an island that stretches the box
    rows = metrics.case_metrics(prediction, label, spacing, components=("all", "largest"))
    assert rows[0]["hd_mm"] > 50 > rows[1]["hd_mm"] and rows[1]["assd_mm"] < 1


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_named():
    a, b = np.zeros((3, 3, 3), dtype=np.uint8), np.zeros((3, 3, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="own grid"):
        metrics.case_metrics(a, b, (1, 1, 1))
    with pytest.raises(ValueError, match="own grid"):
        metrics.dice(a, b)
    for spacing in [(1, 1), (1, 1, 0), (1, -1, 1), (1, math.nan, 1), (math.inf, 1, 1)]:
        for call in (metrics.case_metrics, metrics.assd_mm, metrics.hd_mm):
            with pytest.raises(ValueError, match="spacing"):
                call(a, a, spacing)
        with pytest.raises(ValueError, match="spacing"):
            metrics.volumes_ml(a, spacing)
    for values in (a + 0.5, np.full((3, 3, 3), np.nan), a + 1j):
        with pytest.raises(ValueError, match="class numbers"):
            metrics.case_metrics(values, a, (1, 1, 1))
    with pytest.raises(ValueError, match="components"):
        metrics.case_metrics(a, a, (1, 1, 1), components=("biggest",))
    with pytest.raises(ValueError, match="classes"):
        metrics.case_metrics(a, a, (1, 1, 1), classes=(0, 1))
    assert metrics.volumes_ml(a.astype(float), (1, 1, 1)) == {1: 0, 2: 0, 3: 0}
