"""What can be looked at: arrays, files in any order of axes, items of a cohort; everything else is named."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from fedkd_utils.opened import opened
from fedkd_utils.site_folder import Item

SHAPE, SPACING = (6, 20, 30), (4.0, 1.5, 1.0)
#: Every way to store three axes: 48.
CODES = ["".join(p) for q in itertools.permutations(("RL", "AP", "SI")) for p in itertools.product(*q)]


def ramp():
    """Every voxel another value, growing to the right, the front and the top."""
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def marks():
    label = np.zeros(SHAPE, np.uint8)
    label[1, 5:10, 5:10], label[3, 2:12, 2:12], label[4, 15:18, 25:28] = 1, 2, 3
    return label


def saved(folder, name, array, code="RAS", affine=None):
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(code))
    affine = np.diag([*SPACING, 1.0]) if affine is None else affine
    affine = affine @ inv_ornt_aff(turn, array.shape)
    stored = nib.orientations.apply_orientation(array, turn)
    nib.save(nib.Nifti1Image(stored, affine), folder / name)
    return folder / name, stored


@pytest.mark.parametrize("code", CODES)
def test_a_file_in_any_order_of_axes_opens_as_the_same_volume(tmp_path, code):
    image, _ = saved(tmp_path, "image.nii.gz", ramp(), code)
    label, stored = saved(tmp_path, "label.nii.gz", marks(), code)
    for given in (label, str(label), stored):
        held = opened(image, given)
        assert (held.image == ramp()).all() and (held.label == marks()).all()
        assert np.allclose(held.affine, np.diag([*SPACING, 1.0])) and held.spacing_mm == pytest.approx(SPACING)


def test_an_item_brings_its_label(tmp_path):
    image, _ = saved(tmp_path, "image.nii.gz", ramp(), "PIR")
    label, stored = saved(tmp_path, "label.nii.gz", marks(), "PIR")
    held = opened(Item("knee", 1, image, label, (1, 2, 3)))
    assert (held.label == marks()).all() and (held.marks(stored) == marks()).all()
    assert opened(Item("knee", 1, image, None, (1, 2, 3))).label is None


def test_an_array_stands_as_it_is():
    held = opened(ramp(), marks(), SPACING)
    assert (held.image == ramp()).all() and held.spacing_mm == SPACING
    assert opened(ramp()).spacing_mm == (1, 1, 1)


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
        (np.zeros(SHAPE), np.full(SHAPE, 0.5), SPACING, r"\[0.5\]; known are"),
        (np.zeros(SHAPE), np.zeros(SHAPE), SPACING, "label is empty.*leave the label out"),
        (np.zeros(SHAPE), "label.nii.gz", SPACING, "both as files, or both as arrays"),
        (np.zeros(SHAPE), None, (1.0, 1.0), "not three numbers"),
        (np.zeros(SHAPE), None, (1.0, 0.0, 1.0), "not positive"),
        (np.zeros(SHAPE), None, (1.0, np.nan, 1.0), "not positive"),
    ],
)
def test_a_bad_array_is_named(image, label, spacing, words):
    with pytest.raises(ValueError, match=words):
        opened(image, label, spacing)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 5, 6, 2), np.float32), r"\(4, 5, 6, 2\) is not a 3D volume.*Split a series"),
        (np.zeros((4, 5), np.float32), "is not a 3D volume"),
        (np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colour.*one value per voxel"),
    ],
)
def test_a_bad_file_is_named(tmp_path, array, words):
    path = tmp_path / "bad.nii.gz"
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    with pytest.raises(ValueError, match=rf"bad.nii.gz.*{words}"):
        opened(path)


def test_an_empty_label_file_a_missing_file_and_a_spacing_too_many(tmp_path):
    image, _ = saved(tmp_path, "image.nii.gz", ramp())
    empty, _ = saved(tmp_path, "empty.nii.gz", 0 * marks())
    with pytest.raises(ValueError, match="label is empty"):
        opened(image, empty)
    with pytest.raises(FileNotFoundError, match="no such file"):
        opened(tmp_path / "gone.nii.gz")
    with pytest.raises(ValueError, match="knows its own spacing"):
        opened(image, spacing_mm=SPACING)
