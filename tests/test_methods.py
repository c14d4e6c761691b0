"""Methods: every objective against its equation, its limits, and where its gradient goes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fedkd_utils import methods, networks, teacher
from fedkd_utils.methods import ROWS, Batch
from fedkd_utils.settings import QUICK

TINY = replace(QUICK, name="tiny", grid_shape=(4, 16, 16), channels=(4, 8), dropout=0.0, feature_temperature=1.0)
SHAPE = TINY.grid_shape


def batch(seed: int = 0, double: bool = True) -> tuple[networks.TappedNetwork, networks.TappedNetwork, Batch]:
    """A student, a teacher, and a batch with this teacher's signals."""
    generator = torch.Generator().manual_seed(seed)
    student, master = networks.build_network(TINY, seed), networks.build_network(TINY, seed + 1)
    if double:
        student.double()
        master.double()
    kind = torch.float64 if double else torch.float32
    images = torch.randn((2, 1, *SHAPE), generator=generator, dtype=kind)
    labels = torch.randint(0, 4, (2, *SHAPE), generator=generator)
    unlabelled = torch.randn((2, 1, *SHAPE), generator=generator, dtype=kind)
    signals = teacher.teacher_signals(teacher.freeze(master), unlabelled, 3, [5, 6])
    return (
        student,
        master,
        Batch(images, labels, (1, 2, 3), unlabelled, signals.probabilities, signals.entropy, signals.features),
    )


def brute_force(student: networks.TappedNetwork, b: Batch, progress: float) -> dict[str, float]:
    """The losses of shared notation, voxel sums written out, from logits and features alone."""
    z = student(b.images)
    p = functional.softmax(z, 1)
    y = functional.one_hot(b.labels, 4).movedim(-1, 1).double()
    ce = -(y * p.log()).sum() / b.labels.numel()
    dice = 0.0
    for i in range(2):
        for c in range(4):
            top = 2 * (p[i, c] * y[i, c]).sum() + 1
            dice += (1 - top / (p[i, c].sum() + y[i, c].sum() + 1)).item() / 8
    supervised = 0.5 * ce.item() + 0.5 * dice
    assert b.unlabelled is not None and b.teacher_entropy is not None
    assert b.teacher_probabilities is not None and b.teacher_features is not None
    zu, f = student.forward_with_features(b.unlabelled)
    ramp = math.exp(-5 * (1 - progress) ** 2)
    mask = b.teacher_entropy < (0.75 + 0.25 * ramp) * math.log(4)
    squares = (functional.softmax(zu, 1) - b.teacher_probabilities).square().sum(1)
    response = (squares * mask).sum().item() / (4 * mask.sum().item() + 1e-16)
    a, q = functional.softmax(b.teacher_features, 1), functional.softmax(f, 1)
    feature = (a * (a / q).log()).sum(1).mean().item()
    total = supervised + TINY.response_weight * ramp * response + TINY.feature_weight * feature
    return {"loss": total, "supervised": supervised, "response": response, "feature": feature}


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.999])
def test_dual_distillation_is_its_equation(progress: float) -> None:
    student, _, b = batch()
    with torch.no_grad():
        parts = methods.dual_distillation(student, b, progress, TINY)
        expected = brute_force(student, b, progress)
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-9), name
    assert 0 <= parts["trusted"].item() <= 1


def test_gradient_reaches_the_student_only_and_equals_finite_differences() -> None:
    student, master, b = batch()
    master.requires_grad_(True)
    parts = methods.dual_distillation(student, b, 0.5, TINY)
    parts["loss"].backward()
    assert all(p.grad is None for p in master.parameters())
    weight = next(student.parameters())
    assert weight.grad is not None
    index, step = (0,) * weight.ndim, 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[index] += sign * step
            values.append(methods.dual_distillation(student, b, 0.5, TINY)["loss"].item())
            weight[index] -= sign * step
    assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8)


def test_without_weights_it_is_the_supervised_objective_bit_by_bit() -> None:
    student, _, b = batch(double=False)
    none = replace(TINY, response_weight=0.0, feature_weight=0.0)
    one, other = methods.dual_distillation(student, b, 0.5, none), methods.supervised(student, b, 0.5, none)
    assert torch.equal(one["loss"], other["loss"])


def test_each_weight_scales_its_own_part_and_the_response_ramps_up() -> None:
    student, _, b = batch()
    only_response = replace(TINY, feature_weight=0.0, response_weight=1.0)
    only_feature = replace(TINY, feature_weight=2.0, response_weight=0.0)
    with torch.no_grad():
        for progress in (0.0, 0.5, 1.0):
            r = methods.dual_distillation(student, b, progress, only_response)
            ramp = math.exp(-5 * (1 - progress) ** 2)
            assert (r["loss"] - r["supervised"]).item() == pytest.approx(ramp * r["response"].item(), rel=1e-9)
            f = methods.dual_distillation(student, b, progress, only_feature)
            assert (f["loss"] - f["supervised"]).item() == pytest.approx(2 * f["feature"].item(), rel=1e-9)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_its_features() -> None:
    """On the same input both distillation losses are exactly zero."""
    student, _, b = batch()
    assert b.unlabelled is not None
    with torch.no_grad():
        logits, features = student.forward_with_features(b.unlabelled)
        same = replace(b, teacher_probabilities=logits.softmax(1), teacher_features=features)
        parts = methods.dual_distillation(student, same, 1.0, TINY)
    assert parts["response"].item() == pytest.approx(0, abs=1e-15)
    assert parts["feature"].item() == pytest.approx(0, abs=1e-12)


def test_an_uncertain_teacher_is_not_listened_to() -> None:
    student, _, b = batch()
    assert b.teacher_entropy is not None
    doubtful = replace(b, teacher_entropy=torch.full_like(b.teacher_entropy, math.log(4)))
    parts = methods.dual_distillation(student, doubtful, 1.0, replace(TINY, feature_weight=0.0))
    assert parts["response"].item() == 0 and parts["trusted"].item() == 0
    assert torch.equal(parts["loss"], parts["supervised"])


def test_rows_say_what_travels() -> None:
    assert list(ROWS) == ["teacher_only", "local_only", "fedavg", "dual_kd"]
    assert {name: (m.federated, m.needs_teacher, m.objective is not None) for name, m in ROWS.items()} == {
        "teacher_only": (False, True, False),
        "local_only": (False, False, True),
        "fedavg": (True, False, True),
        "dual_kd": (True, True, True),
    }
    assert all(name == method.name for name, method in ROWS.items())
    assert len({method.title for method in ROWS.values()}) == len(ROWS)


def test_distillation_without_signals_is_refused() -> None:
    student, _, b = batch()
    with pytest.raises(ValueError, match="unlabelled volumes"):
        methods.dual_distillation(student, replace(b, unlabelled=None), 0.5, TINY)
