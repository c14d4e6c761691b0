"""Resampling against closed forms, orientation against the world, and every kind of unusable file."""

from __future__ import annotations

import gzip
import tempfile
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Orientation
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fedkd_utils import transforms
from fedkd_utils.errors import VolumeError
from fedkd_utils.settings import QUICK
from fedkd_utils.site_folder import Item, Site
from fedkd_utils.transforms import axis_weights, from_grid, label_to_grid, load_case, load_site, to_grid

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


def write_image(path, image):
    nib.save(image, path)
    return path


def write(path, array, affine):
    return write_image(path, nib.Nifti1Image(array, affine))


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


def tilted(spacing, shift=(5.0, -40.0, 9.0)):
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [12, -9, 15], degrees=True).as_matrix()
    affine[:3, :3], affine[:3, 3] = turn @ np.diag(spacing), shift
    return affine


def voxels_of(shape, to_world, to_voxel):
    """Voxel coordinates (3, N) in one volume of every voxel of another, by way of the world."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1)
    return (np.linalg.inv(to_voxel) @ to_world @ np.vstack([index, np.ones(index.shape[1])]))[:3]


def smooth_noise(shape, seed=0):
    return ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 1.5).astype(np.float32)


def test_oblique_volumes_are_read_where_they_lie_in_the_world():
    volume, affine = smooth_noise((18, 40, 30)), tilted((3.0, 1.0, 1.5))
    grid, grid_affine = to_grid(volume, affine, (2.0, 0.8, 0.9), (16, 30, 30))
    expected = ndimage.map_coordinates(volume, voxels_of(grid.shape, grid_affine, affine), order=1, mode="nearest")
    np.testing.assert_allclose(grid.numpy().ravel(), expected, atol=1e-5)


@pytest.mark.parametrize("codes", ["RAS", "PIR", "LPS", "SLA"])
def test_way_back_agrees_with_scipy_in_the_world(codes):
    shape, affine = (30, 52, 44), tilted((1.5, 0.7, 0.8))
    turn = nib.orientations.ornt_transform(RAS, nib.orientations.axcodes2ornt(tuple(codes)))
    affine = affine @ nib.orientations.inv_ornt_aff(turn, shape)
    shape = nib.orientations.apply_orientation(np.zeros(shape), turn).shape
    grid_affine = to_grid(np.zeros(shape, np.float32), affine, (4.0, 1.2, 1.2), (14, 36, 36))[1]
    noise = np.stack([smooth_noise((14, 36, 36), c) for c in range(4)])
    probabilities = torch.from_numpy(noise * 60).softmax(dim=0)
    at = voxels_of(shape, affine, grid_affine)
    inside = np.all((at > 0) & (at < np.array([[13], [35], [35]])), axis=0).reshape(shape)
    expected = np.stack([ndimage.map_coordinates(p, at, order=1, mode="nearest") for p in probabilities.numpy()])
    sure = inside & (np.diff(np.sort(expected, axis=0)[-2:], axis=0)[0].reshape(shape) > 1e-4)
    got = from_grid(probabilities, grid_affine, shape, affine)
    assert got.shape == shape and sure.mean() > 0.6 and set(np.unique(got)) == {0, 1, 2, 3}
    assert np.array_equal(got[sure], expected.argmax(axis=0).reshape(shape)[sure])


@pytest.mark.parametrize("codes", list(all_orientations()))
def test_ras_order_is_that_of_monai(codes):
    array, affine = smooth_noise((4, 6, 5)), tilted((3.0, 1.0, 1.5))
    turn = nib.orientations.ornt_transform(RAS, nib.orientations.axcodes2ornt(tuple(codes)))
    affine = affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
    array = np.ascontiguousarray(nib.orientations.apply_orientation(array, turn))
    expected = Orientation("RAS", labels=None)(MetaTensor(array[None], affine=affine))
    got, got_affine = transforms.to_ras(array, affine)
    np.testing.assert_array_equal(got, expected[0].numpy())
    np.testing.assert_allclose(got_affine, expected.affine.numpy(), atol=1e-9)


@given(
    st.tuples(*[st.integers(2, 9)] * 3),
    st.tuples(*[st.floats(0.3, 5.0)] * 3),
    st.sampled_from(list(all_orientations())),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_label_on_its_own_grid_comes_back_voxel_by_voxel(shape, spacing, codes, seed):
    label = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    turn = nib.orientations.ornt_transform(RAS, nib.orientations.axcodes2ornt(tuple(codes)))
    affine = tilted(spacing) @ nib.orientations.inv_ornt_aff(turn, shape)
    stored = np.ascontiguousarray(nib.orientations.apply_orientation(label, turn))
    on_grid = label_to_grid(stored, affine, spacing, shape)
    assert np.array_equal(on_grid.numpy(), label)
    probabilities = torch.nn.functional.one_hot(on_grid, 4).permute(3, 0, 1, 2).float()
    grid_affine = to_grid(stored, affine, spacing, shape)[1]
    assert np.array_equal(from_grid(probabilities, grid_affine, stored.shape, affine), stored)


def test_thick_slices_take_the_class_that_fills_most_of_them():
    label = np.random.default_rng(0).integers(0, 4, (12, 8, 8)).astype(np.uint8)
    got = label_to_grid(label, affine_of((1.0, 1.0, 1.0), label.shape), (3.0, 2.0, 2.0), (4, 4, 4)).numpy()
    for d, h, w in product(range(4), repeat=3):
        votes = np.bincount(label[3 * d : 3 * d + 3, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].ravel(), minlength=4)
        assert votes[got[d, h, w]] == votes.max()


def test_beyond_the_field_of_view_there_is_darkness_and_background():
    image, label = smooth_noise((10, 12, 14)) + 3, np.full((10, 12, 14), 2, np.uint8)
    affine = tilted((1.0, 1.0, 1.0))
    grid, grid_affine = to_grid(image, affine, (1.0, 1.0, 1.0), (16, 16, 18))
    inner = (slice(3, 13), slice(2, 14), slice(2, 16))
    np.testing.assert_allclose(grid[inner].numpy(), image, atol=1e-5)
    outside = torch.ones(grid.shape, dtype=torch.bool)
    outside[inner] = False
    assert torch.equal(grid[outside], torch.full((int(outside.sum()),), float(image.min())))
    on_grid = label_to_grid(label, affine, (1.0, 1.0, 1.0), (16, 16, 18))
    assert (on_grid[inner] == 2).all() and (on_grid[outside] == 0).all()
    everywhere = torch.zeros(4, 6, 6, 6)
    everywhere[1] = 1.0
    small = to_grid(image, affine, (1.0, 1.0, 1.0), (6, 6, 6))[1]
    back = from_grid(everywhere, small, image.shape, affine)
    assert back.sum() == 6**3 and (back[2:8, 3:9, 4:10] == 1).all()
    assert grid_affine.shape == (4, 4)


def test_a_voxel_partly_outside_shows_its_covered_part():
    image = np.full((9, 9, 9), 5.0, np.float32)
    image[4, 4, 4] = 0.0
    grid, _ = to_grid(image, affine_of((1.0, 1.0, 1.0), image.shape), (3.0, 2.0, 2.0), (3, 5, 5))
    np.testing.assert_allclose(grid[0].numpy(), 5.0, atol=1e-5)  # the plane's outer voxels are covered by 3/4, 9/16
    label = np.full((9, 9, 9), 3, np.uint8)
    on_grid = label_to_grid(label, affine_of((1.0, 1.0, 1.0), label.shape), (3.0, 2.0, 2.0), (3, 5, 5))
    assert (on_grid == 3).all()


def test_way_back_from_a_grid_that_is_not_centred_on_the_volume():
    label = np.random.default_rng(0).integers(1, 4, (10, 12, 14)).astype(np.uint8)
    affine = tilted((3.0, 1.0, 1.5))
    corner = np.eye(4)
    corner[:3, 3] = [4, 1, 6]
    part = torch.nn.functional.one_hot(torch.from_numpy(label[4:9, 1:8, 6:12]).long(), 4).permute(3, 0, 1, 2).float()
    expected = np.zeros_like(label)
    expected[4:9, 1:8, 6:12] = label[4:9, 1:8, 6:12]
    assert np.array_equal(from_grid(part, affine @ corner, label.shape, affine), expected)


@pytest.mark.parametrize("order", ["RAS", "PIR", "LSA"])
def test_a_grid_lies_round_the_place_it_is_given_as_far_as_the_volume_reaches(order):
    """A ball 20 mm off the middle: in the middle of the grid where there is room, and the grid stays in the volume."""
    spacing, shape, grid_shape = (2.0, 1.0, 1.0), (20, 90, 60), (10, 20, 40)  # 40 x 90 x 60 mm
    affine = affine_of(spacing, shape)
    index = np.moveaxis(np.indices(shape), 0, -1)
    place = np.array([10, 25, 50])  # above: within half a grid of the edge
    ball = (np.linalg.norm((index - place) * spacing, axis=-1) < 6).astype(np.uint8)
    turn = nib.orientations.ornt_transform(RAS, nib.orientations.axcodes2ornt(order))
    stored = nib.orientations.apply_orientation(ball, turn)
    own = affine @ nib.orientations.inv_ornt_aff(turn, shape)
    centre_mm = nib.affines.apply_affine(affine, place)
    grid, grid_affine = to_grid(stored.astype(np.float32), own, (4.0, 1.0, 1.0), grid_shape, centre_mm=centre_mm)
    label = label_to_grid(stored, own, (4.0, 1.0, 1.0), grid_shape, centre_mm)
    clear = np.abs(grid.numpy() - 0.5) > 1e-4  # a tie is background
    assert np.array_equal((label.numpy() > 0)[clear], (grid.numpy() > 0.5)[clear]) and label.any()
    seen = nib.affines.apply_affine(grid_affine, ndimage.center_of_mass(grid.numpy()))
    np.testing.assert_allclose(seen, centre_mm, atol=0.3)  # wherever the grid is, the ball is where it was
    low = nib.affines.apply_affine(np.linalg.inv(affine) @ grid_affine, np.array([-0.5, -0.5, -0.5]))
    high = nib.affines.apply_affine(np.linalg.inv(affine) @ grid_affine, np.array(grid_shape) - 0.5)
    np.testing.assert_allclose([low, high], [[-0.5, 15, 19.5], [19.5, 35, 59.5]], atol=1e-6)


@pytest.mark.parametrize("move", [0.05, 0.2])
def test_one_rule_says_whether_a_label_lies_on_its_image(move):
    """Of a tenth of a millimetre at the corner that is furthest away, also where a header is turned a little."""
    shape, affine = (10, 100, 100), affine_of((4.0, 1.0, 1.0), (10, 100, 100))
    moved = affine.copy()
    moved[0, 3] += move
    turned = affine @ np.block([[Rotation.from_euler("x", move / 99).as_matrix(), np.zeros((3, 1))], [0, 0, 0, 1]])
    for other in (moved, turned):
        if move < 0.1:
            transforms.refuse_other_grid((shape, other), (shape, affine), "label", "image")
        else:
            with pytest.raises(VolumeError, match="label: another grid than its image image: up to 0.2"):
                transforms.refuse_other_grid((shape, other), (shape, affine), "label", "image")
    with pytest.raises(VolumeError, match=r"shape \(10, 100, 99\), but the image has \(10, 100, 100\)"):
        transforms.refuse_other_grid(((10, 100, 99), affine), (shape, affine), "label", "image")


def test_whole_field_of_view_is_kept_when_no_shape_is_named():
    image = smooth_noise((30, 41, 27))
    grid, _ = to_grid(image, affine_of((1.0, 0.5, 2.0), image.shape), (4.0, 1.2, 1.2))
    assert grid.shape == (round(30 / 4), round(41 * 0.5 / 1.2), round(27 * 2 / 1.2))


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


def test_move_is_what_scipy_does_in_millimetres():
    rng = np.random.default_rng(0)
    shape = (7, 18, 26)  # a plane that is not square: a rotation in it must not shear
    image, label = smooth_noise((2, *shape)), rng.integers(0, 4, (2, *shape))
    mirrored, zoom = torch.tensor([True, False]), torch.tensor([[0.9, 1.1, 1.04], [1.7, 0.93, 0.97]])
    angle, shift = torch.tensor([0.3, -0.2]), torch.tensor([[0.06, -0.1, 0.08], [-0.05, 0.1, 0.02]])
    seen, classes = transforms.move(
        torch.from_numpy(image)[:, None], torch.from_numpy(label), mirrored, zoom, angle, shift
    )
    for k in range(2):
        turn = Rotation.from_euler("x", -float(angle[k])).as_matrix()  # of (D, H, W) about D
        matrix = turn @ np.diag(zoom[k].double().numpy())
        middle = (np.asarray(shape) - 1) / 2
        offset = middle - matrix @ middle + shift[k].double().numpy() * np.asarray(shape) / 2
        sources = [v[k][::-1] if mirrored[k] else v[k] for v in (image, label)]
        expected = ndimage.affine_transform(sources[0], matrix, offset, order=1, mode="nearest")
        np.testing.assert_allclose(seen[k, 0].numpy(), expected, atol=1e-4)
        # SciPy's own nearest neighbour rejects what lies up to half a voxel outside: one voxel of margin for both
        padded = np.pad(sources[1], 1)
        wide = np.asarray(shape) + 2
        centre = (wide - 1) / 2
        shifted = centre - matrix @ centre + shift[k].double().numpy() * np.asarray(shape) / 2
        nearest = ndimage.affine_transform(padded, matrix, shifted, order=0, mode="constant")[1:-1, 1:-1, 1:-1]
        assert (classes[k].numpy() != nearest).mean() < 2e-3  # ties may fall either way
    still = torch.zeros(2), torch.zeros(2, 3)
    alike = transforms.move(
        torch.from_numpy(image)[:, None], torch.from_numpy(label), mirrored, torch.ones(2, 3), *still
    )
    torch.testing.assert_close(alike[0][0, 0], torch.from_numpy(image[0]).flip(0), atol=1e-5, rtol=0)
    assert torch.equal(alike[1][0], torch.from_numpy(label[0]).flip(0)) and torch.equal(
        alike[1][1], torch.from_numpy(label[1])
    )


def test_bend_keeps_the_ends_and_the_order_of_intensities():
    x = torch.randn(2, 1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    bent = transforms.bend(x, torch.tensor([0.8, 1.25]))
    for k, darker in ((0, False), (1, True)):
        assert float(bent[k].min()) == pytest.approx(float(x[k].min()), abs=1e-5)
        assert float(bent[k].max()) == pytest.approx(float(x[k].max()), abs=1e-5)
        assert torch.equal(bent[k].flatten().argsort(), x[k].flatten().argsort())
        assert bool((bent[k].mean() < x[k].mean()) == darker)
    torch.testing.assert_close(transforms.bend(x, torch.ones(2)), x)
    assert transforms.bend(torch.full((1, 1, 2, 2, 2), 3.0), torch.tensor([1.2])).isfinite().all()


def test_augment_mirrors_half_of_the_volumes_with_their_labels():
    x = torch.zeros(64, 1, 3, 4, 4)
    x[:, :, 0] = 4.0  # left slice bright, right slice dark
    y = torch.zeros(64, 3, 4, 4, dtype=torch.int64)
    y[:, 0] = 3
    images, labels = transforms.augment(x, y, torch.Generator().manual_seed(0))
    right = (labels[:, 2] == 3).flatten(1).any(dim=1)
    assert 20 < int(right.sum()) < 44 and set(labels.unique().tolist()) == {0, 3}
    assert bool((images[right, 0, 2].mean(dim=(1, 2)) > images[right, 0, 0].mean(dim=(1, 2)) + 1).all())
    assert images.shape == x.shape and labels.shape == y.shape and labels.dtype == torch.int64


def test_augment_draws_offset_gain_gamma_and_noise_for_every_volume_within_its_ranges():
    levels = torch.tensor([-1.0, 0.5, 2.0]).repeat_interleave(10)  # three thick bands, so that their middles stay pure
    x = levels.reshape(1, 1, 1, 1, 30).expand(64, 1, 4, 30, 30).contiguous()
    y = torch.zeros(64, 4, 30, 30, dtype=torch.int64)
    images, _ = transforms.augment(x, y, torch.Generator().manual_seed(1))
    low, middle, high = (images[:, 0, :, 13:17, k - 1 : k + 2].mean(dim=(1, 2, 3)) for k in (4, 15, 26))
    # x * gain + offset at the two ends that gamma leaves alone
    gain, offset = (high - low) / 3, (high + 2 * low) / 3
    gamma = ((middle - low) / (high - low)).log() / torch.tensor(0.5).log()
    for drawn, centre, reach in ((gain, 1.0, 0.2), (offset, 0.0, 0.2), (gamma.log(), 0.0, float(np.log(1.25)))):
        assert float((drawn - centre).abs().max()) < reach + 0.06  # bands hold a little noise
        assert float(drawn.max() - drawn.min()) > 1.5 * reach and float(drawn.std()) > 0.4 * reach
    pairs = torch.stack([gain, offset, gamma]).corrcoef() - torch.eye(3)
    assert float(pairs.abs().max()) < 0.5  # drawn apart
    grain = images[:, 0, :, 13:17, 3:6].flatten(1).std(dim=1)
    assert 0.001 < float(grain.min()) and float(grain.max()) < 0.15


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
        ({"label_affine": np.diag([4.0, 2.0, 3.0, 1.0])}, "another grid than its image"),
        ({"label": blob((8, 16, 16)) * 7}, "unknown label values"),
        ({"image": np.full((8, 16, 16), np.nan, np.float32)}, "NaN"),
        ({"image": np.full((8, 16, 16), 5.0, np.float32)}, "no image in it"),
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


@pytest.mark.parametrize(("shear", "degrees"), [(0.9, 53), (-0.9, 53), (0.05, 88), (0.025, 89)])
def test_a_sheared_affine_is_refused(tmp_path, shear, degrees):
    affine = np.diag([1.2, 1.2, 1.2, 1.0])
    affine[1, 2] = shear
    path = write(tmp_path / "leaning.nii.gz", np.ones((8, 16, 16), np.float32), affine)
    words = f"leaning.nii.gz: the affine is sheared .* at {degrees} degrees, not at 90.*Resample"
    with pytest.raises(VolumeError, match=words) as caught:
        transforms.read_volume(path)
    assert "\n" not in str(caught.value)


@given(
    st.tuples(*[st.floats(-180, 180)] * 3),
    st.tuples(st.floats(0.2, 1.5), st.floats(0.2, 6.0), st.floats(0.2, 1.5)),
    st.tuples(*[st.floats(-500, 500)] * 3),
    st.sampled_from([(1, 1), (1, 0), (0, 1)]),
    st.booleans(),
)
@example((2.0, 180.0, 2.0), (1.5, 6.0, 1.5), (0.0, 0.0, 0.0), (1, 1), False)
@settings(max_examples=150, deadline=None)
def test_oblique_headers_of_scanners_pass_and_so_does_their_rounding(angles, spacing, origin, coded, mirrored):
    """Any rotation, with either form or both: the sform often with few digits, and the qform as a float32 quaternion.

    Near half a turn that leaves an angle of 0.0007, the root of what a float32 rounds.
    """
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 0] *= -1 if mirrored else 1
    affine[:3, 3] = origin
    image = nib.Nifti1Image(np.ones((160, 2, 384), np.uint8), affine)
    image.set_sform(affine.round(4), coded[0])
    image.set_qform(affine, coded[1])
    with tempfile.TemporaryDirectory() as folder:
        path = write_image(Path(folder) / "tilted.nii", image)
        _, got = transforms.read_volume(path)
    np.testing.assert_allclose(got, affine, atol=1.5e-3 * max(1, *spacing))


def two_places(path, sform, qform, codes):
    image = nib.Nifti1Image(np.ones((8, 16, 16), np.float32), sform)
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1])
    return write_image(path, image)


@pytest.mark.parametrize("fault", ["shifted", "turned", "mirrored", "another spacing"])
def test_a_qform_and_an_sform_that_disagree_are_refused(tmp_path, fault):
    sform = affine_of((2.0, 1.0, 1.0), (8, 16, 16))
    qform = sform.copy()
    if fault == "shifted":
        qform[0, 3] += 3
    elif fault == "turned":
        qform[:3, :3] = Rotation.from_euler("x", 20, degrees=True).as_matrix() @ qform[:3, :3]
    elif fault == "mirrored":
        qform[:, 0] *= -1
    else:
        qform[:3, 0] *= 1.5
    for codes in ((1, 1), (3, 1), (2, 4)):
        path = two_places(tmp_path / "two.nii.gz", sform, qform, codes)
        with pytest.raises(VolumeError, match=r"two.nii.gz: the qform and the sform of its header disagree by up to"):
            transforms.read_volume(path)
        np.testing.assert_allclose(transforms.read_nifti(path, by_qform=True)[1], qform, atol=1e-5)
    for codes, place in (((1, 0), sform), ((0, 1), qform)):  # one of them: there is nothing to disagree with
        path = two_places(tmp_path / "one.nii.gz", sform, qform, codes)
        np.testing.assert_allclose(transforms.read_volume(path)[1], place, atol=1e-5)
        np.testing.assert_allclose(transforms.read_nifti(path, by_qform=True)[1], place, atol=1e-5)
    near = sform.copy()
    near[0, 3] += 0.5
    path = two_places(tmp_path / "near.nii.gz", sform, near, (1, 1))
    np.testing.assert_allclose(transforms.read_volume(path)[1], sform, atol=1e-5)


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


def test_a_site_without_unlabelled_volumes_has_an_empty_stack(tmp_path):
    good = item(tmp_path)
    data = load_site(Site("client_1", tmp_path, (good,), (), (), ()), SMALL)
    assert data.unlabelled_images.shape == (0, 1, 8, 16, 16) and data.examples == 1
    assert data.labelled_classes == (1, 2, 3) and data.validation == data.test == []


def test_infinite_voxels_and_single_slices_are_refused_and_a_last_axis_of_one_is_not(tmp_path):
    image = np.random.default_rng(0).random((8, 16, 16)).astype(np.float32)
    assert load_case(item(tmp_path, image=image[..., None]), SMALL).image.shape == (1, 8, 16, 16)
    image[0, 0, 0] = np.inf
    with pytest.raises(VolumeError, match="1 voxels are NaN or infinite"):
        load_case(item(tmp_path, image=image), SMALL)
    with pytest.raises(VolumeError, match=r"shape \(8, 16, 1\) is not a 3D volume"):
        load_case(item(tmp_path, image=np.ones((8, 16, 1), np.float32)), SMALL)
