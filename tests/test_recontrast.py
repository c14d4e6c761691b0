"""New contrasts from image and label alone: anatomy stays, brightness changes, cartilage stays one class."""

from __future__ import annotations

import numpy as np
import pytest

from fedkd_utils.acquisition import SCANNERS, scan
from fedkd_utils.recontrast import cluster_rest, recontrast


@pytest.fixture(scope="module")
def balls() -> tuple[np.ndarray, np.ndarray]:
    """A labelled shell around a dark ball in a bright box in nothing."""
    away = np.linalg.norm(np.indices((30, 30, 30)) - 14.5, axis=0)
    box = np.zeros((30, 30, 30), np.float32)
    box[3:27, 3:27, 3:27] = 2.0
    image = np.where(away < 8, 0.5, np.where(away < 10, 1.0, box)).astype(np.float32)
    label = ((away >= 8) & (away < 10)).astype(np.uint8)
    return image, label


def test_clusters_are_the_tissues_from_dark_to_bright(balls) -> None:
    image, label = balls
    classes = cluster_rest(image, label, np.random.default_rng(0), clusters=3)
    away = np.linalg.norm(np.indices(image.shape) - 14.5, axis=0)
    assert (classes[label > 0] == 0).all() and (classes[label == 0] > 0).all()
    assert np.mean(classes[away < 5] == classes[14, 14, 14]) == 1.0
    order = [classes[0, 0, 0], classes[14, 14, 14], classes[5, 5, 5]]  # nothing, ball, box
    assert order == sorted(order) and len(set(order)) == 3


def test_same_generator_same_bits_and_other_draws_other_contrasts(balls) -> None:
    a, b, c = (recontrast(*balls, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and abs(np.corrcoef(a.ravel(), c.ravel())[0, 1]) < 0.99
    assert a.dtype == np.float32 and np.isfinite(a).all() and a.min() >= 0


def test_either_side_of_cartilage_gets_brighter_and_darker_than_it(balls) -> None:
    image, label = balls
    signs = set()
    for seed in range(20):
        new = recontrast(image, label, np.random.default_rng(seed))
        signs.add(bool(new[label > 0].mean() > new[12:18, 12:18, 12:18].mean()))
    assert signs == {True, False}, "a network cannot learn which of the two is the brighter one"


def test_a_flat_volume_and_an_unlabelled_one_do_no_harm() -> None:
    flat = np.ones((8, 8, 8), np.float32)
    for image in (flat, 0 * flat):
        assert np.isfinite(recontrast(image, np.zeros((8, 8, 8), np.uint8), np.random.default_rng(0))).all()


def test_a_recontrasted_scan_has_the_labels_and_edges_of_its_dess_scan() -> None:
    dess, new = (scan(3, SCANNERS[name], 1) for name in ("repository_dess", "recontrasted"))
    assert np.array_equal(dess.label, new.label) and np.array_equal(dess.affine, new.affine)
    assert not np.allclose(dess.image, new.image)
    inside, outside = new.image[new.label == 1], dess.image[dess.label == 1]
    assert inside.std() / np.ptp(new.image) < 0.25 > outside.std() / np.ptp(dess.image)  # one tissue in both
