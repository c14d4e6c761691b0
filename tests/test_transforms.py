"""Resampling against closed forms, orientation against the world, and every kind of unusable file."""

from __future__ import annotations

import gzip
from dataclasses import replace
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_utils import transforms
from fedkd_utils.cohorts import Item, Site
from fedkd_utils.settings import QUICK
from fedkd_utils.transforms import VolumeError, axis_weights, from_grid, label_to_grid, load_case, load_site, to_grid

SMALL = replace(QUICK, grid_shape=(8, 16, 16), grid_spacing_mm=(4.0, 2.0, 2.0))
RAS = nib.orientations.axcodes2ornt("RAS")


def blob(shape=(16, 32, 32), centre=(0.4, 0.6, 0.5), radius=0.25):
    axes = [np.linspace(0, 1, n) for n in shape]
    grid = np.meshgrid(*axes, indexing="ij")
    return (sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < radius**2).astype(np.uint8)


def affine_of(spacing, shape):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.asarray(spacing) * (np.asarray(shape) - 1) / 2 + [3.0, -7.0, 11.0]
    return affine


def write(path, array, affine):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def all_orientations():
    for order in permutations("RAS"):
        for flips in product([False, True], repeat=3):
            yield "".join({"R": "L", "A": "P", "S": "I"}[c] if f else c for c, f in zip(order, flips, strict=True))


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.3, 5.0))
@settings(max_examples=60, deadline=None)
def test_rows_of_the_resampling_matrix_sum_to_the_covered_part(n_in, n_out, ratio):
    weights = axis_weights(n_in, n_out, ratio)
    sums = weights.sum(dim=1)
    assert weights.min() >= 0 and sums.max() <= 1 + 1e-5
    edge = (np.arange(n_out) - (n_out - 1) / 2) * ratio + (n_in - 1) / 2
    inside = (edge - ratio / 2 > -0.5 + 1e-6) & (edge + ratio / 2 < n_in - 0.5 - 1e-6)
    np.testing.assert_allclose(sums.numpy()[inside], 1, atol=1e-5)


def test_integer_coarsening_is_block_averaging():
    x = torch.rand(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(axis_weights(12, 4, 3.0) @ x, x.reshape(4, 3).mean(dim=1))


def test_refining_is_linear_interpolation():
    x = np.random.default_rng(0).random(10)
    got = axis_weights(10, 16, 0.6).double().numpy() @ x
    at = (np.arange(16) - 7.5) * 0.6 + 4.5
    np.testing.assert_allclose(got, np.interp(at, np.arange(10), x), atol=1e-6)


def test_same_grid_is_the_identity():
    x = np.random.default_rng(0).random((8, 16, 16)).astype(np.float32)
    affine = affine_of((4.0, 2.0, 2.0), x.shape)
    grid, grid_affine = to_grid(x, affine, SMALL.grid_spacing_mm, SMALL.grid_shape)
    np.testing.assert_allclose(grid.numpy(), x, atol=1e-6)
    np.testing.assert_allclose(grid_affine, affine, atol=1e-9)


def test_a_thin_sheet_keeps_its_integral_when_slices_get_thick():
    x = np.zeros((32, 32, 32), dtype=np.float32)
    x[13] = 1.0
    grid, _ = to_grid(x, affine_of((1.0, 1.0, 1.0), x.shape), (4.0, 2.0, 2.0), (8, 16, 16))
    assert float(grid.sum()) * 16 == pytest.approx(float(x.sum()), rel=1e-4)


@pytest.mark.parametrize("codes", list(all_orientations()))
def test_every_orientation_gives_the_same_grid_and_its_own_way_back(codes):
    image = blob().astype(np.float32) * np.linspace(1, 2, 32, dtype=np.float32)
    label = blob()
    affine = affine_of((2.0, 1.0, 1.0), label.shape)
    turn = nib.orientations.ornt_transform(RAS, nib.orientations.axcodes2ornt(tuple(codes)))
    turned_affine = affine @ nib.orientations.inv_ornt_aff(turn, label.shape)
    turned = nib.orientations.apply_orientation(label, turn)
    expected, expected_affine = to_grid(image, affine, (4.0, 2.0, 2.0), (8, 16, 16))
    got, got_affine = to_grid(
        nib.orientations.apply_orientation(image, turn), turned_affine, (4.0, 2.0, 2.0), (8, 16, 16)
    )
    torch.testing.assert_close(got, expected)
    np.testing.assert_allclose(got_affine, expected_affine, atol=1e-9)
    on_grid = label_to_grid(turned, turned_affine, (4.0, 2.0, 2.0), (8, 16, 16))
    back = from_grid(
        torch.nn.functional.one_hot(on_grid, 4).permute(3, 0, 1, 2).float(), got_affine, turned.shape, turned_affine
    )
    assert back.shape == turned.shape
    plain = from_grid(
        torch.nn.functional.one_hot(label_to_grid(label, affine, (4.0, 2.0, 2.0), (8, 16, 16)), 4).permute(3, 0, 1, 2),
        expected_affine,
        label.shape,
        affine,
    )
    assert np.array_equal(back, nib.orientations.apply_orientation(plain, turn))
    assert 2 * np.sum(plain & label) / (plain.sum() + label.sum()) > 0.85


def test_a_landmark_stays_where_it_is_in_the_world():
    x = np.zeros((40, 60, 50), dtype=np.float32)
    x[10:14, 40:46, 20:26] = 1.0
    affine = affine_of((1.0, 0.7, 0.9), x.shape)
    grid, grid_affine = to_grid(x, affine, (2.0, 1.3, 1.1), (30, 40, 50))

    def centre(volume, to_world):
        weights = volume / volume.sum()
        index = [float((weights * g).sum()) for g in np.meshgrid(*map(np.arange, volume.shape), indexing="ij")]
        return (to_world @ [*index, 1])[:3]

    np.testing.assert_allclose(
        centre(grid.numpy().astype(float), grid_affine), centre(x.astype(float), affine), atol=0.02
    )


def test_round_trip_through_a_coarser_grid_keeps_the_label():
    label = blob((40, 48, 48))
    affine = affine_of((1.0, 1.0, 1.0), label.shape)
    on_grid = label_to_grid(label, affine, (2.0, 1.2, 1.2), (20, 40, 40))
    probabilities = torch.nn.functional.one_hot(on_grid, 4).permute(3, 0, 1, 2).float()
    back = from_grid(probabilities, to_grid(label, affine, (2.0, 1.2, 1.2), (20, 40, 40))[1], label.shape, affine)
    assert 2 * np.sum(back & label) / (back.sum() + label.sum()) > 0.95


def test_augment_moves_image_and_label_together_and_obeys_its_generator():
    label = torch.from_numpy(blob((20, 40, 40), radius=0.3)).long()[None].repeat(2, 1, 1, 1)
    image = label[:, None].float() * 4
    first = transforms.augment(image, label, torch.Generator().manual_seed(3))
    again = transforms.augment(image, label, torch.Generator().manual_seed(3))
    other = transforms.augment(image, label, torch.Generator().manual_seed(4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    for k in range(2):
        inside, outside = first[0][k, 0][first[1][k] == 1], first[0][k, 0][first[1][k] == 0]
        assert inside.mean() - outside.mean() > 2.0
        bright = first[0][k, 0] > (inside.mean() + outside.mean()) / 2
        overlap = 2 * (bright & (first[1][k] == 1)).sum() / (bright.sum() + (first[1][k] == 1).sum())
        assert overlap > 0.9


def item(tmp_path, image=None, label=None, affine=None, label_affine=None):
    affine = np.diag([4.0, 2.0, 2.0, 1.0]) if affine is None else affine
    rng = np.random.default_rng(0)
    image = rng.random((8, 16, 16)).astype(np.float32) if image is None else image
    label = blob((8, 16, 16)) if label is None else label
    write(tmp_path / "knee.nii.gz", image, affine)
    write(tmp_path / "label.nii.gz", label, affine if label_affine is None else label_affine)
    return Item("knee", 1, tmp_path / "knee.nii.gz", tmp_path / "label.nii.gz", (1, 2, 3))


def test_a_case_is_z_scored_and_goes_back_to_its_file(tmp_path):
    case = load_case(item(tmp_path), SMALL)
    assert case.image.shape == (1, 8, 16, 16) and case.label.shape == (8, 16, 16)
    assert float(case.image.mean()) == pytest.approx(0, abs=1e-5) and float(case.image.std()) == pytest.approx(
        1, rel=1e-4
    )
    probabilities = torch.nn.functional.one_hot(case.label, 4).permute(3, 0, 1, 2).float()
    assert np.array_equal(transforms.to_native(probabilities, case), case.native_label)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"label": blob((8, 16, 15))}, "shape"),
        ({"label_affine": np.diag([4.0, 2.0, 3.0, 1.0])}, "affine differs"),
        ({"label": blob((8, 16, 16)) * 7}, "unknown label values"),
        ({"image": np.full((8, 16, 16), np.nan, np.float32)}, "NaN"),
        ({"image": np.full((8, 16, 16), 5.0, np.float32)}, "same value"),
        ({"image": np.zeros((8, 16, 16, 3), np.float32)}, "not a 3D volume"),
        ({"image": np.ones((8, 16, 16), np.complex64)}, "complex"),
    ],
)
def test_unusable_volumes_are_refused_with_their_name(tmp_path, fault, words):
    with pytest.raises(VolumeError, match=words) as error:
        load_case(item(tmp_path, **fault), SMALL)
    assert ".nii.gz" in str(error.value)


def test_a_singular_affine_is_refused(tmp_path):
    good = item(tmp_path)
    image = nib.load(good.image)
    header = image.header.copy()
    header["srow_z"] = 0
    header["sform_code"], header["qform_code"] = 1, 0
    raw = header.binaryblock + b"\0\0\0\0" + np.asarray(image.dataobj).tobytes(order="F")
    bad = tmp_path / "flat.nii"
    bad.write_bytes(raw)
    with pytest.raises(VolumeError, match="flat.nii: the affine is singular"):
        load_case(replace(good, image=bad), SMALL)


def test_missing_and_damaged_files(tmp_path):
    good = item(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing.nii.gz"):
        load_case(replace(good, image=tmp_path / "missing.nii.gz"), SMALL)
    whole = good.image.read_bytes()
    good.image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VolumeError, match=r"knee.nii.gz: damaged"):
        load_case(good, SMALL)
    good.image.write_bytes(gzip.compress(b"not a volume"))
    with pytest.raises(VolumeError, match="damaged or not a NIfTI"):
        load_case(good, SMALL)


def test_sites_without_usable_labels_are_refused(tmp_path):
    good = item(tmp_path)
    nothing = Site("client_1", tmp_path, (), (replace(good, label=None),), (), ())
    with pytest.raises(VolumeError, match="no labelled training volume"):
        load_site(nothing, SMALL)
    empty = item(tmp_path, label=np.zeros((8, 16, 16), np.uint8))
    with pytest.raises(VolumeError, match="is empty on the grid"):
        load_site(Site("client_1", tmp_path, (empty,), (), (), ()), SMALL)


def test_a_site_is_stacked_and_counted(tmp_path):
    good = item(tmp_path)
    data = load_site(Site("client_1", tmp_path, (good, good), (replace(good, label=None),), (good,), (good,)), SMALL)
    assert data.labelled_images.shape == (2, 1, 8, 16, 16) and data.labels.dtype == torch.int64
    assert data.unlabelled_images.shape == (1, 1, 8, 16, 16)
    assert data.examples == 3 and len(data.validation) == 1 and len(data.test) == 1
