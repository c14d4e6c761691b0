"""The viewer on the side of Python: what it sends, where it begins, what it stores. The page is tested in a browser."""

from __future__ import annotations

import gzip
import io

import numpy as np
import pytest
import traitlets
from PIL import Image

from fedkd_utils import figures, viewer

SHAPE, SPACING = (6, 20, 30), (4.0, 1.5, 1.0)


def ramp():
    """Every voxel another value."""
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) - 500


def blocks():
    """One class per slab of slices: femoral in 1, tibial in 3 (twice as large), patellar in 4."""
    label = np.zeros(SHAPE, np.uint8)
    label[1, 5:10, 5:10], label[3, 2:12, 2:12], label[4, 5:8, 5:8] = 1, 2, 3
    return label


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr(viewer, "display", lambda bundle, **more: found.append((bundle, more)))
    return found


@pytest.mark.parametrize("image", [ramp(), ramp().astype(np.int16), np.full(SHAPE, 5.0), 1e-4 * ramp()])
def test_the_page_gets_every_value_and_every_label(shown, image):
    view = viewer.show_volume(image, blocks(), SPACING)
    low, step = view._facts["scale"]
    values = low + step * np.frombuffer(view._voxels, "<u2").reshape(SHAPE)
    assert np.allclose(values, image, atol=step)
    (label,) = view._labels
    assert (np.frombuffer(gzip.decompress(label), np.uint8).reshape(SHAPE) == blocks()).all()
    assert view._facts["shape"] == list(SHAPE) and view._facts["spacing"] == list(SPACING)


def test_it_begins_on_cartilage_in_the_fullest_slice(shown):
    view = viewer.show_volume(ramp(), blocks(), SPACING)
    assert view.position[0] == 3 and blocks()[tuple(view.position)] == 2
    assert viewer.show_volume(ramp()).position == [n // 2 for n in SHAPE]
    assert viewer.show_volume(ramp()).window == pytest.approx(np.percentile(ramp(), [1, 99.5]))


def test_a_close_up_holds_all_labels_and_a_margin(shown):
    view = viewer.show_comparison(ramp(), {"moved": np.roll(blocks(), 4, 2)}, blocks(), SPACING)
    assert view.closeup and view._facts["closeup"] == [[0, 6], [0, 17], [0, 24]]
    assert not viewer.show_volume(ramp(), blocks(), SPACING).closeup


def test_settings_are_checked(shown):
    view = viewer.show_volume(ramp(), blocks(), SPACING)
    view.position = [5, 0, 29]
    for name, value in (("position", [6, 0, 0]), ("position", [0, 0]), ("plane", "oblique"), ("shown", ["meniscus"])):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, value)
    assert view.position == [5, 0, 29]


def test_one_bundle_holds_the_viewer_the_picture_and_the_sentence(shown):
    view = viewer.show_volume(ramp(), blocks(), SPACING, "Blocks")
    ((bundle, more),) = shown
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.model_id
    assert Image.open(io.BytesIO(bundle["image/png"])).width > 300
    assert bundle["text/plain"].startswith("Blocks: ") and "femoral, tibial, patellar cartilage" in bundle["text/plain"]
    assert more == {"metadata": {"image/png": {"alt": bundle["text/plain"]}}, "raw": True}
    assert not figures.plt.get_fignums()


def test_a_comparison_names_its_methods_and_may_hold_one_that_drew_nothing(shown):
    view = viewer.show_comparison(ramp(), {"A": np.roll(blocks(), 1, 1), "B": 0 * blocks()}, blocks(), SPACING, "Two")
    assert view._facts["layers"] == ["truth", "A", "B"] and view._facts["compare"] and len(view._labels) == 3
    ((bundle, _),) = shown
    assert bundle["text/plain"].startswith("Two: 4 sagittal slices")
    assert "then A, B, with a + on each voxel drawn but not true and an o" in bundle["text/plain"]


@pytest.mark.parametrize(
    ("predictions", "truth", "words"),
    [
        ({"A": blocks()}, None, "no truth to compare with"),
        ({}, blocks(), "at least one prediction"),
        ({"truth": blocks()}, blocks(), "taken"),
        ({"A": blocks()[1:]}, blocks(), "A has shape"),
        ({"A": blocks() + 3}, blocks(), r"A holds \[4"),
        ({"A": blocks()}, 0 * blocks(), "label is empty"),
    ],
)
def test_a_comparison_without_sense_is_refused(predictions, truth, words):
    with pytest.raises(ValueError, match=words):
        viewer.show_comparison(ramp(), predictions, truth, SPACING)
