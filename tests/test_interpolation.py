"""Interpolation axis by axis against PyTorch's own, and boxes that leave out nothing."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from fedkd_utils import anatomy
from fedkd_utils.anatomy import Pose, draw_knee, tissue_map
from fedkd_utils.interpolation import WHOLE, reach, trilinear

FIELDS = ("leg", "muscle", "blood", "fluid", "ligament", "meniscus", "tibia", "tibial_mm", "face", "patellar_mm")
FIELDS += ("femur", "femoral_mm", "small bones")

lengths = st.tuples(*[st.integers(2, 9)] * 3)
shapes = st.tuples(*[st.integers(2, 30)] * 3)


def whole(fields: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    return interpolate(fields[None], shape, mode="trilinear", align_corners=True)[0]


def noise(channels: int, nodes: tuple[int, int, int], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((channels, *nodes), dtype=np.float32))


@given(nodes=lengths, shape=shapes, channels=st.integers(1, 3), seed=st.integers(0, 9), data=st.data())
@settings(deadline=None, max_examples=40)
def test_axis_by_axis_is_all_at_once(nodes, shape, channels, seed, data):
    fields = noise(channels, nodes, seed)
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = tuple(slice(a, b) for a, b in ends)
    found, wanted = trilinear(fields, shape, box), whole(fields, shape)[:, box[0], box[1], box[2]]
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)  # with one or two channels bit for bit, see below


@pytest.mark.parametrize("channels", [1, 2, 13])  # with three PyTorch takes another kernel, which rounds otherwise
def test_the_bits_are_those_of_which_the_committed_knees_are_made(channels):
    fields = noise(channels, (30, 50, 45), 1) * 20
    apart = (trilinear(fields, (61, 180, 133)) - whole(fields, (61, 180, 133))).abs().max()
    assert float(apart) <= (0.0 if torch.backends.cpu.get_cpu_capability().startswith("AVX") else 1e-4)


@given(nodes=lengths, shape=shapes, seed=st.integers(0, 99), share=st.floats(0, 0.2))
@settings(deadline=None, max_examples=60)
def test_no_point_outside_the_box_feels_a_node(nodes, shape, seed, share):
    on = np.random.default_rng(seed).random(nodes) < share
    felt = whole(torch.from_numpy(on.astype(np.float32))[None], shape)[0].numpy() > 0
    felt[reach(on, shape)] = False
    assert not felt.any()


def test_a_box_is_no_larger_than_the_cells_around_its_nodes():
    on = np.zeros((11, 11, 11), bool)
    on[4, 5:7, 10] = True
    assert reach(on, (101, 101, 101)) == (slice(30, 51), slice(40, 71), slice(90, 101))
    assert reach(np.zeros_like(on), (101, 101, 101)) == (slice(0, 0),) * 3


def hot(nodes, seed: int, share: float) -> dict[str, np.ndarray]:
    """Fields of no knee: outside everything, but for some nodes, and thicknesses around the least that is drawn."""
    rng = np.random.default_rng(seed)
    fields = {}
    for name in FIELDS:
        inside = rng.random(nodes) < share
        if name.endswith("_mm"):
            fields[name] = np.where(inside, rng.uniform(0.35, 0.5, nodes), 0.0).astype(np.float32)
        else:
            fields[name] = np.where(inside, rng.uniform(-3, 0, nodes), rng.uniform(0, 3, nodes)).astype(np.float32)
    fields["leg"] = fields["leg"] - np.float32(8)  # in the flesh
    fields["face"] = np.abs(fields["face"])
    return fields


def classify(fields, shape, boxed: bool = True):
    with patch.object(anatomy, "reach", reach if boxed else lambda nodes, shape: WHOLE):
        return anatomy._classify(fields, shape)


@given(nodes=lengths, shape=shapes, seed=st.integers(0, 999), share=st.sampled_from([0.01, 0.05, 0.3]))
@settings(deadline=None, max_examples=80)
def test_tissue_of_any_fields_is_the_same_with_and_without_boxes(nodes, shape, seed, share):
    fields = hot(nodes, seed, share)
    assert np.array_equal(classify(fields, shape), classify(fields, shape, boxed=False))


@pytest.mark.parametrize(
    ("name", "code"),
    [("muscle", anatomy.MUSCLE), ("blood", anatomy.BLOOD), ("fluid", anatomy.FLUID), ("ligament", anatomy.LIGAMENT)]
    + [("meniscus", anatomy.MENISCUS), ("tibia", anatomy.MARROW), ("femur", anatomy.MARROW)]
    + [("small bones", anatomy.MARROW), ("tibial_mm", anatomy.TIBIAL), ("femoral_mm", anatomy.FEMORAL)]
    + [("patellar_mm", anatomy.PATELLAR)],
)
def test_one_node_of_a_structure_is_drawn_and_a_box_too_small_is_seen(name, code):
    fields = hot((9, 9, 9), 0, 0.0)
    fields |= {bone: np.full((9, 9, 9), 0.1, np.float32) for bone in ("tibia", "femur", "face")}
    fields[name][4, 4, 4] = 0.4 if name.endswith("_mm") else -3
    shape = (41, 41, 41)
    drawn = classify(fields, shape)
    assert (drawn == code).any() and np.array_equal(drawn, classify(fields, shape, boxed=False))

    def short(nodes, shape):
        box = reach(nodes, shape)
        return box if nodes.all() else (slice(box[0].start, (box[0].start + box[0].stop) // 2), *box[1:])

    with patch.object(anatomy, "reach", short):
        assert not np.array_equal(anatomy._classify(fields, shape), drawn)


def test_tissue_is_the_same_with_and_without_boxes(monkeypatch):
    cases = [
        (seed, shape, spacing_mm, Pose((4.0, -3.0, 2.0), (2.0, 0.0, offset_mm)))
        for seed in (1, 2)
        for shape, spacing_mm, offset_mm in [
            ((40, 60, 60), (3.0, 1.5, 1.5), 0.0),
            ((24, 20, 20), (5.0, 8.0, 8.0), 0.0),  # coarser than the lattice
            ((30, 40, 3), (3.0, 3.0, 2.0), -80.0),  # no cartilage, no patella
        ]
    ]
    boxed = [tissue_map(draw_knee(seed), *rest) for seed, *rest in cases]
    monkeypatch.setattr(anatomy, "reach", lambda nodes, shape: WHOLE)
    for (seed, *rest), tissue in zip(cases, boxed, strict=True):
        assert np.array_equal(tissue_map(draw_knee(seed), *rest), tissue)
