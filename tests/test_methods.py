"""Methods: every objective against its equation, its limits, and where its gradient goes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fedkd_utils import losses, networks, objectives, teacher
from fedkd_utils.methods import ROWS
from fedkd_utils.objectives import Batch
from fedkd_utils.seeds import generator_of
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
        parts = objectives.dual_distillation(student, b, progress, TINY)
        expected = brute_force(student, b, progress)
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-9), name
    assert 0 <= parts["trusted"].item() <= 1


def test_gradient_reaches_the_student_only_and_equals_finite_differences() -> None:
    student, master, b = batch()
    master.requires_grad_(True)
    parts = objectives.dual_distillation(student, b, 0.5, TINY)
    parts["loss"].backward()
    assert all(p.grad is None for p in master.parameters())
    weight = next(student.parameters())
    assert weight.grad is not None
    index, step = (0,) * weight.ndim, 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[index] += sign * step
            values.append(objectives.dual_distillation(student, b, 0.5, TINY)["loss"].item())
            weight[index] -= sign * step
    assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8)


def test_without_weights_it_is_the_supervised_objective_bit_by_bit() -> None:
    student, _, b = batch(double=False)
    none = replace(TINY, response_weight=0.0, feature_weight=0.0)
    one, other = objectives.dual_distillation(student, b, 0.5, none), objectives.supervised(student, b, 0.5, none)
    assert torch.equal(one["loss"], other["loss"])


def test_each_weight_scales_its_own_part_and_the_response_ramps_up() -> None:
    student, _, b = batch()
    only_response = replace(TINY, feature_weight=0.0, response_weight=1.0)
    only_feature = replace(TINY, feature_weight=2.0, response_weight=0.0)
    with torch.no_grad():
        for progress in (0.0, 0.5, 1.0):
            r = objectives.dual_distillation(student, b, progress, only_response)
            ramp = math.exp(-5 * (1 - progress) ** 2)
            assert (r["loss"] - r["supervised"]).item() == pytest.approx(ramp * r["response"].item(), rel=1e-9)
            f = objectives.dual_distillation(student, b, progress, only_feature)
            assert (f["loss"] - f["supervised"]).item() == pytest.approx(2 * f["feature"].item(), rel=1e-9)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_its_features() -> None:
    """On the same input both distillation losses are exactly zero."""
    student, _, b = batch()
    assert b.unlabelled is not None
    with torch.no_grad():
        logits, features = student.forward_with_features(b.unlabelled)
        same = replace(b, teacher_probabilities=logits.softmax(1), teacher_features=features)
        parts = objectives.dual_distillation(student, same, 1.0, TINY)
    assert parts["response"].item() == pytest.approx(0, abs=1e-15)
    assert parts["feature"].item() == pytest.approx(0, abs=1e-12)


def test_an_uncertain_teacher_is_not_listened_to() -> None:
    student, _, b = batch()
    assert b.teacher_entropy is not None
    doubtful = replace(b, teacher_entropy=torch.full_like(b.teacher_entropy, math.log(4)))
    parts = objectives.dual_distillation(student, doubtful, 1.0, replace(TINY, feature_weight=0.0))
    assert parts["response"].item() == 0 and parts["trusted"].item() == 0
    assert torch.equal(parts["loss"], parts["supervised"])


def test_the_released_mask_is_the_stricter_one_and_means_are_over_what_it_trusts() -> None:
    student, _, b = batch()
    assert b.teacher_entropy is not None and b.unlabelled is not None and b.teacher_probabilities is not None
    entropy = torch.linspace(0.0, 1.4, b.teacher_entropy.numel(), dtype=torch.float64).view_as(b.teacher_entropy)
    b = replace(b, teacher_entropy=entropy)
    for classes, ceiling in ((4, math.log(4)), (2, math.log(2))):
        parts = objectives.dual_distillation(student, b, 1.0, replace(TINY, mask_classes=classes, feature_weight=0.0))
        mask = entropy < ceiling
        assert parts["trusted"].item() == pytest.approx(mask.double().mean().item())
        squares = (student(b.unlabelled).softmax(1) - b.teacher_probabilities).square().sum(dim=1)
        assert parts["response"].item() == pytest.approx((squares[mask].sum() / (4 * mask.sum())).item())


def test_rows_say_what_travels() -> None:
    assert list(ROWS)[:2] == ["teacher_only", "local_only"] and {"fedavg", "dual_kd", "pooled"} < set(ROWS)
    assert all(name == method.name for name, method in ROWS.items())
    assert len({method.title for method in ROWS.values()}) == len(ROWS)
    assert len({method.identity() for method in ROWS.values()}) == len(ROWS)
    alone = {name for name, m in ROWS.items() if not m.federated}
    teachers = {"teacher_only", "teacher_random", "teacher_protocols", "teacher_recontrasted"}
    tuned = {"finetune_local", "finetune_random_local", "finetune_protocols_local"}
    assert alone == teachers | tuned | {"local_only", "local_uamt", "pooled"}
    untaught = {name for name, m in ROWS.items() if not m.needs_teacher}
    assert untaught == {
        *(
            "local_only",
            "local_uamt",
            "fedavg",
            "fedavg_bn",
            "fedprox",
            "fedbn",
            "mean_teacher",
            "uamt",
            "ssfl_released",
        ),
        *("ssfl_published", "fedsemi", "pooled", "small_fedavg"),
    }
    for method in ROWS.values():
        assert sum((method.distils, method.mean_teacher, method.pseudo_labels)) <= 1
        assert method.adapt(method.adapt(TINY)) == method.adapt(TINY)
        assert bool(method.assumes) == (method.needs_teacher or method.pooled)
        for name in ("rounds", "local_epochs", "steps_per_epoch", "batch_labelled", "batch_unlabelled"):
            assert getattr(method.adapt(TINY), name) == getattr(TINY, name), "the same budget for every row"


def test_a_title_may_be_reworded_but_a_number_may_not() -> None:
    dual = ROWS["dual_kd"]
    assert replace(dual, title="x", source="y", assumes="z").identity() == dual.identity()
    for other in ({"changes": {"confidence": 0.1}}, {"groups": True}, {"objective": objectives.supervised}):
        assert replace(dual, **other).identity() != dual.identity()


def cross_entropy_and_dice(student: networks.TappedNetwork, b: Batch) -> tuple[float, float]:
    """CE and L_sup of the labelled half, voxel sums written out."""
    p = functional.softmax(student(b.images), 1)
    y = functional.one_hot(b.labels, 4).movedim(-1, 1).double()
    ce = -(y * p.log()).sum().item() / b.labels.numel()
    return ce, brute_force(student, b, 0.0)["supervised"]


def clipped(shape: torch.Size, seed: int, name: str, sigma: float) -> torch.Tensor:
    drawn = torch.randn(shape, generator=generator_of(seed, name))
    return (sigma * drawn).clamp(-2 * sigma, 2 * sigma).double()


def pseudo(z: torch.Tensor, p: torch.Tensor, confidence: float) -> float:
    logs, total = z.log_softmax(1), 0.0
    for b in range(len(z)):
        for v in itertools.product(*(range(n) for n in z.shape[2:])):
            named = int(p[(b, slice(None), *v)].argmax())
            if p[(b, named, *v)] >= confidence:
                total -= logs[(b, named, *v)].item()
    return total * z.shape[1] / z.numel()


def surer(student: networks.TappedNetwork) -> networks.TappedNetwork:
    """A student that is sure of some voxels and not of others, as random weights never are."""
    with torch.no_grad():
        student.body.get_submodule("model.2.conv").weight.mul_(4)  # type: ignore[operator, union-attr]
    return student


@pytest.mark.parametrize("confidence", [0.5, 0.8, 1.0])
def test_pseudo_label_objectives_are_their_equations(confidence: float) -> None:
    student, _, b = batch()
    student, b = surer(student), replace(b, seed=7)
    assert b.unlabelled is not None
    settings = replace(TINY, confidence=confidence)
    with torch.no_grad():
        ce, supervised = cross_entropy_and_dice(student, b)
        u = b.unlabelled
        views = {"clean": u, "noisy": u + clipped(u.shape, 7, "noisy", 0.1)}
        views |= {"weak": u + clipped(u.shape, 7, "weak", 0.25), "strong": u + clipped(u.shape, 7, "strong", 0.75)}
        z = {name: student(view) for name, view in views.items()}
        p = {name: logits.softmax(1) for name, logits in z.items()}
        released = ce + sum(pseudo(z[name], p[name], confidence) for name in ("clean", "noisy"))
        published = supervised + pseudo(z["strong"], p["weak"], confidence)
        parts = objectives.pseudo_labels_released(student, b, 0.3, settings)
        assert parts["loss"].item() == pytest.approx(released, rel=1e-6)
        parts = objectives.weak_to_strong(student, b, 0.3, settings)
        assert parts["loss"].item() == pytest.approx(published, rel=1e-6)
        assert (parts["pseudo"].item() > 0) == (confidence < 1)
    with pytest.raises(ValueError, match="Pseudo-labels need unlabelled"):
        objectives.weak_to_strong(student, replace(b, unlabelled=None), 0.3, settings)


def test_weak_to_strong_teaches_the_strong_view_only() -> None:
    """The gradient is that of the strong view with fixed labels: nothing flows through the names."""
    student, _, b = batch()
    student, b, settings = surer(student), replace(b, seed=7), replace(TINY, confidence=0.5)
    assert b.unlabelled is not None
    objectives.weak_to_strong(student, b, 0.3, settings)["loss"].backward()
    got = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    with torch.no_grad():
        named = student(b.unlabelled + clipped(b.unlabelled.shape, 7, "weak", 0.25)).softmax(1)
    sure, classes = named.max(1)
    z = student(b.unlabelled + clipped(b.unlabelled.shape, 7, "strong", 0.75))
    loss = objectives.supervised(student, b, 0.3, settings)["loss"]
    (loss + (functional.cross_entropy(z, classes, reduction="none") * (sure >= 0.5)).mean()).backward()
    expected = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(torch.allclose(a, e, rtol=1e-9, atol=1e-12) for a, e in zip(got, expected, strict=True))


def test_the_proximal_term_is_half_mu_times_the_squared_distance() -> None:
    student, _, b = batch()
    start = {name: p.detach() + 0.1 * i for i, (name, p) in enumerate(student.named_parameters())}
    b, settings = replace(b, received=start), replace(TINY, proximal_weight=0.3)
    parts = objectives.proximal(student, b, 0.0, settings)
    distance = sum(0.01 * i**2 * p.numel() for i, p in enumerate(student.parameters()))
    assert parts["distance"].item() == pytest.approx(distance, rel=1e-9)
    assert parts["loss"].item() == pytest.approx(parts["supervised"].item() + 0.15 * distance, rel=1e-9)
    parts["loss"].backward()
    with_term = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    objectives.supervised(student, b, 0.0, settings)["loss"].backward()
    for i, (p, grad) in enumerate(zip(student.parameters(), with_term, strict=True)):
        assert p.grad is not None and torch.allclose(grad - p.grad, torch.full_like(p, -0.3 * 0.1 * i), atol=1e-12)
    none = objectives.proximal(student, replace(b, received=None), 0.0, replace(TINY, proximal_weight=0.0))
    assert torch.equal(none["loss"], objectives.supervised(student, b, 0.0, settings)["loss"])
    with pytest.raises(ValueError, match="FedProx needs the parameters"):
        objectives.proximal(student, replace(b, received=None), 0.0, settings)


def test_trust_scales_both_terms_and_a_ramp_of_no_length_is_none() -> None:
    student, _, b = batch()
    with torch.no_grad():
        full, half, none = (
            objectives.dual_distillation(student, replace(b, trust=t), 0.4, TINY) for t in (1.0, 0.5, 0.0)
        )
        added = full["loss"] - full["supervised"]
        assert (half["loss"] - half["supervised"]).item() == pytest.approx(added.item() / 2, rel=1e-9)
        assert none["loss"].item() == none["supervised"].item()
        strong = replace(TINY, response_loss="cross_entropy_dice", response_weight=1.0, response_ramp=0.0)
        strong = replace(strong, feature_weight=0.0)
        parts = objectives.dual_distillation(student, b, 0.0, strong)
        assert (parts["loss"] - parts["supervised"]).item() == pytest.approx(parts["response"].item(), rel=1e-9)
        assert b.teacher_probabilities is not None and b.teacher_entropy is not None and b.unlabelled is not None
        mask = b.teacher_entropy < (0.75 + 0.25 * math.exp(-5)) * math.log(4)
        expected = losses.response_cross_entropy_dice(student(b.unlabelled), b.teacher_probabilities, mask)
        assert parts["response"].item() == pytest.approx(expected.item(), rel=1e-9) and "feature" not in parts
    with pytest.raises(ValueError, match="response_loss must be one of squares, cross_entropy_dice, not 'l1'"):
        objectives.dual_distillation(student, b, 0.0, replace(TINY, response_loss="l1"))


def test_distillation_without_signals_is_refused() -> None:
    student, _, b = batch()
    with pytest.raises(ValueError, match="unlabelled volumes"):
        objectives.dual_distillation(student, replace(b, unlabelled=None), 0.5, TINY)
