"""The viewer: controls moved in code change the pixels they must, proportions and letters hold, bad input is named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fedkd_utils import figures, viewer

SHAPE, SPACING = (6, 20, 30), (4.0, 1.5, 1.0)


def ramp():
    """Every voxel another value, growing to the right, the front and the top."""
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def blocks():
    """One class per slab of slices: femoral in 1, tibial in 3 (twice as large), patellar in 4."""
    label = np.zeros(SHAPE, np.uint8)
    label[1, 5:10, 5:10] = 1
    label[3, 2:12, 2:12] = 2
    label[4, 5:8, 5:8] = 3
    return label


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_the_slider_shows_the_slice_it_names():
    image = np.zeros(SHAPE, np.float32)
    image += np.arange(SHAPE[0], dtype=np.float32)[:, None, None]
    view = viewer.Viewer(image, None, SPACING, "steps")
    shown = []
    for k in range(SHAPE[0]):
        view.index.value = k
        assert view.picture.value == view.png("sagittal", k)
        shown.append(pixels(view.picture.value)[100, 100, 0])
    low, high = np.percentile(image, [1, 99.5])
    assert shown == [int(255 * np.clip((k - low) / (high - low), 0, 1)) for k in range(SHAPE[0])]


@pytest.mark.parametrize(
    ("plane", "letters", "proportion"),
    [("sagittal", "APSI", 20 * 1.5 / 30), ("coronal", "RLSI", 6 * 4 / 30), ("axial", "RLAP", 6 * 4 / (20 * 1.5))],
)
def test_proportions_and_direction_of_each_plane(plane, letters, proportion):
    view = viewer.Viewer(ramp(), None, SPACING, "ramp")
    view.plane.value = plane
    height, width, _ = pixels(view.picture.value).shape
    assert width / height == pytest.approx(proportion, abs=0.01)
    assert viewer.PLANES[plane][3] == letters
    # A bright corner voxel at the right, front and top appears where the letters say it must.
    axis = viewer.PLANES[plane][0]
    corner = np.zeros(SHAPE, np.float32)
    corner[-2:, -4:, -5:] = 100
    view = viewer.Viewer(corner, None, SPACING, "corner")
    grey = pixels(view.png(plane, SHAPE[axis] - 1))[..., 0]
    high = {"R": True, "A": True, "S": True, "L": False, "P": False, "I": False}
    bright = np.unravel_index(np.argmax(_smooth(grey)), grey.shape)
    assert (bright[1] < grey.shape[1] / 2) == high[letters[0]]
    assert (bright[0] < grey.shape[0] / 2) == high[letters[2]]


def _smooth(grey):
    """Means over 9 x 9 pixels, so that a thin letter does not win over a block."""
    total = np.pad(grey, ((5, 4), (5, 4))).cumsum(0).cumsum(1)
    return total[9:, 9:] - total[:-9, 9:] - total[9:, :-9] + total[:-9, :-9]


def test_the_letters_are_drawn():
    dark = viewer.Viewer(np.zeros(SHAPE, np.float32), None, SPACING, "dark")
    seen = pixels(dark.picture.value)
    height, width, _ = seen.shape
    middle = slice(width // 2 - 10, width // 2 + 20)
    for edge in (
        seen[height // 2 - 5 : height // 2 + 15, :20],
        seen[height // 2 - 5 : height // 2 + 15, -20:],
        seen[:20, middle],
        seen[-20:, middle],
    ):
        assert (edge[..., 0] > 200).any()
    assert not seen[40:180, 40:180].any()


def test_switches_and_opacity_change_only_the_labelled_pixels():
    view = viewer.Viewer(np.full(SHAPE, 1.0, np.float32), blocks(), SPACING, "blocks")
    assert view.index.value == 3, "the slice with most cartilage comes first"
    full = pixels(view.picture.value)
    view.classes["femoral"].value = False
    assert (pixels(view.picture.value) == full).all(), "there is no femoral cartilage in this slice"
    view.classes["tibial"].value = False
    bare = pixels(view.picture.value)
    plain = viewer.Viewer(view.image, None, SPACING, "bare")
    assert (bare == pixels(plain.png("sagittal", 3))).all()
    view.classes["tibial"].value = True
    view.opacity.value = 1.0
    solid = pixels(view.picture.value)
    green = [int(figures.CLASS_COLOURS["tibial"][i : i + 2], 16) for i in (1, 3, 5)]
    share = (solid == green).all(axis=-1).mean()
    assert share == pytest.approx(81 / (20 * 30), abs=0.005), "10 x 10 of 600 voxels, half a voxel blended all round"
    view.opacity.value = 0.0
    assert (pixels(view.picture.value) == bare).all()


def test_the_window_brightens_and_darkens():
    view = viewer.Viewer(ramp(), None, SPACING, "ramp")
    means = []
    for window in ((0.0, 0.5), (0.0, 1.0), (0.0, 1.5), (0.5, 1.5)):
        view.window.value = window
        means.append(pixels(view.picture.value).mean())
    assert means == sorted(means, reverse=True) and len(set(means)) == 4
    view.window.value = (1.0, 1.0)  # a closed window is no division by zero
    assert view.picture.value


def test_changing_the_plane_keeps_the_slice_inside_and_draws_once(monkeypatch):
    view = viewer.Viewer(ramp(), None, SPACING, "ramp")
    drawn = []
    original = viewer.Viewer.png
    monkeypatch.setattr(viewer.Viewer, "png", lambda self, *a, **k: drawn.append(a[:2]) or original(self, *a, **k))
    view.plane.value = "axial"
    view.index.value = 29
    view.plane.value = "sagittal"
    assert drawn == [("axial", 15), ("axial", 29), ("sagittal", 3)] and view.index.max == 5


def test_one_bundle_holds_the_viewer_the_picture_and_the_sentence(monkeypatch):
    shown = []
    monkeypatch.setattr(viewer, "display", lambda bundle, **more: shown.append((bundle, more)))
    view = viewer.show_volume(ramp(), blocks(), SPACING, "Blocks")
    ((bundle, more),) = shown
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.widget.model_id
    assert Image.open(io.BytesIO(bundle["image/png"])).width > 300
    assert bundle["text/plain"].startswith("Blocks: ") and "femoral, tibial, patellar cartilage" in bundle["text/plain"]
    assert more == {"metadata": {"image/png": {"alt": bundle["text/plain"]}}, "raw": True}
    assert not figures.plt.get_fignums()


def test_without_a_label_there_are_no_switches():
    with_label, without = (viewer.Viewer(ramp(), label, SPACING, "x") for label in (blocks(), None))
    assert len(with_label.widget.children) == len(without.widget.children) + 2
    assert viewer.Viewer(ramp(), np.zeros(SHAPE), SPACING, "x").index.value == SHAPE[0] // 2


@pytest.mark.parametrize(
    ("image", "label", "spacing", "words"),
    [
        (np.zeros((2, 3, 4, 5)), None, SPACING, "4 axes.*one channel"),
        (np.zeros((20, 30)), None, SPACING, "2 axes"),
        (np.zeros((40, 50, 3), np.uint8), None, SPACING, "colour picture"),
        (np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")]), None, SPACING, "colours"),
        (np.full(SHAPE, np.nan), None, SPACING, "NaN"),
        (np.zeros((0, 3, 4)), None, SPACING, "empty"),
        (np.zeros(SHAPE), np.zeros((6, 20, 31)), SPACING, r"\(6, 20, 31\), the volume \(6, 20, 30\)"),
        (np.zeros(SHAPE), np.full(SHAPE, 7), SPACING, r"\[7\]; known are 0 to 3"),
        (np.zeros(SHAPE), None, (1.0, 1.0), "not three numbers"),
        (np.zeros(SHAPE), None, (1.0, 0.0, 1.0), "not positive"),
        (np.zeros(SHAPE), None, (1.0, np.nan, 1.0), "not positive"),
    ],
)
def test_bad_input_is_named(image, label, spacing, words):
    with pytest.raises(ValueError, match=words):
        viewer.show_volume(image, label, spacing)


def test_a_constant_volume_and_a_single_slice_can_be_shown():
    view = viewer.Viewer(np.full((1, 8, 9), 5.0), None, (1, 1, 1), "flat")
    assert view.index.max == 0 and view.picture.value
