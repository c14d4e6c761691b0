"""Every loss against a loop in double precision that spells out its equation, and against its invariants."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from monai.losses import DiceCELoss
from torch import Tensor, nn

from fedkd_utils import losses

C = 4
SHAPE = (2, C, 3, 2, 4)  # (B, C, D, H, W)
few = hypothesis_settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def draw(seed: int, shape: tuple[int, ...] = SHAPE, scale: float = 2.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def draw_labels(seed: int, shape: tuple[int, ...] = SHAPE, classes: int = C) -> Tensor:
    size = (shape[0], *shape[2:])
    return torch.randint(0, classes, size, generator=torch.Generator().manual_seed(seed))


def voxels(tensor: Tensor) -> list[list[list[float]]]:
    """(B, C, ...) as nested lists [volume][voxel][channel]."""
    return tensor.detach().double().flatten(2).transpose(1, 2).tolist()


def softmax_loop(z: list[float]) -> list[float]:
    top = max(z)
    exponentials = [math.exp(value - top) for value in z]
    return [value / math.fsum(exponentials) for value in exponentials]


def supervised_loop(logits: Tensor, labels: Tensor, groups: list[list[int]]) -> float:
    """The equation on probabilities added up over each group of classes; groups = [[0], [1], ...] when all
    labelled.
    """
    total = []
    for volume, y in zip(voxels(logits), labels.flatten(1).tolist(), strict=True):
        p = [[math.fsum(softmax_loop(z)[c] for c in group) for group in groups] for z in volume]
        truth = [next(k for k, group in enumerate(groups) if value in group) for value in y]
        ce = -math.fsum(math.log(p[v][t]) for v, t in enumerate(truth)) / len(truth)
        dice = []
        for k in range(len(groups)):
            overlap = math.fsum(p[v][k] for v, t in enumerate(truth) if t == k)
            size = math.fsum(row[k] for row in p) + truth.count(k)
            dice.append(1 - (2 * overlap + 1) / (size + 1))
        total.append(0.5 * ce + 0.5 * math.fsum(dice) / len(groups))
    return math.fsum(total) / len(total)


def response_loop(logits: Tensor, q: Tensor, mask: Tensor, channels: int = C) -> float:
    total, count = [], 0
    for volume, teacher, m in zip(voxels(logits), voxels(q), mask.flatten(1).tolist(), strict=True):
        for z, target, trusted in zip(volume, teacher, m, strict=True):
            if trusted:
                count += 1
                total += [(a - b) ** 2 for a, b in zip(softmax_loop(z), target, strict=True)]
    return math.fsum(total) / (channels * count + 1e-16)


def feature_loop(student: Tensor, teacher: Tensor, tau: float) -> float:
    terms = []
    for volume, target in zip(voxels(student), voxels(teacher), strict=True):
        for f_s, f_t in zip(volume, target, strict=True):
            a, b = softmax_loop([x / tau for x in f_t]), softmax_loop([x / tau for x in f_s])
            terms.append(math.fsum(i * math.log(i / j) for i, j in zip(a, b, strict=True)))
    return tau**2 * math.fsum(terms) / len(terms)


# ---------------------------------------------------------------------------------------------- brute force


@few
@given(seeds, st.sampled_from([None, (1, 2, 3), (0, 1, 2, 3), (1, 2), (3,), ()]))
def test_supervised_loss_is_its_equation(seed, labelled):
    logits, labels = draw(seed), draw_labels(seed + 1)
    kept = [1, 2, 3] if labelled is None else [c for c in labelled if c]
    groups = [[c for c in range(C) if c not in kept]] + [[c] for c in kept]
    expected = supervised_loop(logits, labels, groups)
    assert losses.supervised_loss(logits, labels, labelled).item() == pytest.approx(expected, rel=1e-12)
    in_float32 = losses.supervised_loss(logits.float(), labels.to(torch.uint8), labelled)
    assert in_float32.item() == pytest.approx(expected, rel=1e-5)


def test_supervised_loss_agrees_with_monai_value_and_gradient():
    logits, labels = draw(3, (3, C, 5, 6, 7)).requires_grad_(), draw_labels(4, (3, C, 5, 6, 7))
    monai = DiceCELoss(softmax=True, to_onehot_y=True, smooth_nr=1, smooth_dr=1, lambda_dice=0.5, lambda_ce=0.5)
    ours, theirs = losses.supervised_loss(logits, labels), monai(logits, labels.unsqueeze(1))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0], rtol=1e-6, atol=1e-9
    )


@few
@given(seeds, st.floats(0, 1))
def test_response_distillation_is_its_equation(seed, share):
    logits, q = draw(seed), draw(seed + 1).softmax(1)
    chance = torch.rand((2, 3, 2, 4), generator=torch.Generator().manual_seed(seed))
    mask = chance < share
    assert losses.response_distillation(logits, q, mask).item() == pytest.approx(response_loop(logits, q, mask))
    released = losses.release_response_distillation(logits, q, mask).item()
    assert released == pytest.approx(response_loop(logits, q, mask, channels=2))


@few
@given(seeds, st.floats(0.2, 50))
def test_feature_distillation_is_its_equation(seed, tau):
    student, teacher = draw(seed, (2, 5, 2, 3, 2)), draw(seed + 1, (2, 5, 2, 3, 2))
    value = losses.feature_distillation(student, teacher, tau).item()
    assert value == pytest.approx(feature_loop(student, teacher, tau), rel=1e-9, abs=1e-12)
    released = losses.release_feature_distillation(student, teacher).item()
    # The release lets kl_div average over every element.
    by_torch = nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="sum") / student.numel()
    assert released == pytest.approx(by_torch.item())
    assert released == pytest.approx(feature_loop(student, teacher, 1.0) / 5)


@few
@given(seeds)
def test_entropy_and_mask_are_their_equations(seed):
    q = draw(seed, scale=4.0).softmax(1)
    h = losses.entropy(q)
    loop = [[-math.fsum(x * math.log(x) for x in row) for row in volume] for volume in voxels(q)]
    torch.testing.assert_close(h.flatten(1), torch.tensor(loop, dtype=torch.float64))
    for progress in (0.0, 0.3, 1.0):
        threshold = (0.75 + 0.25 * math.exp(-5 * (1 - progress) ** 2)) * math.log(C)
        expected = torch.tensor([[value < threshold for value in volume] for volume in loop])
        assert torch.equal(losses.uncertainty_mask(h, progress, C).flatten(1), expected)


# ------------------------------------------------------------------------------------------------ gradients


def test_gradients_are_right_in_float64():
    shape = (2, C, 2, 1, 2)
    z, q, labels = draw(1, shape).requires_grad_(), draw(2, shape).softmax(1), draw_labels(3, shape)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1], dtype=torch.bool).view(2, 2, 1, 2)
    features = draw(4, shape)
    check = torch.autograd.gradcheck
    assert check(lambda x: losses.supervised_loss(x, labels), z)
    assert check(lambda x: losses.supervised_loss(x, labels, (1, 3)), z)
    assert check(lambda x: losses.response_distillation(x, q, mask), z)
    assert check(lambda x: losses.feature_distillation(x, features, 3.0), z)
    assert check(lambda x: losses.entropy(x.softmax(1)), z)


def test_gradient_reaches_the_student_only():
    torch.manual_seed(0)
    student, teacher = nn.Conv3d(1, C, 1).double(), nn.Conv3d(1, C, 1).double()
    x = draw(0, (2, 1, 2, 3, 3))
    z_t = teacher(x)
    mask = losses.uncertainty_mask(losses.entropy(z_t.softmax(1)), 1.0, C)
    loss = losses.response_distillation(student(x), z_t.softmax(1), mask) + losses.feature_distillation(student(x), z_t)
    loss.backward()
    assert not mask.requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.parameters())


def test_projection_matches_widths_and_learns():
    student, teacher = draw(0, (2, 3, 2, 2, 2)).requires_grad_(), draw(1, (2, 6, 2, 2, 2))
    with pytest.raises(ValueError, match="projection"):
        losses.feature_distillation(student, teacher)
    torch.manual_seed(0)
    projection = nn.Conv3d(3, 6, 1).double()
    value = losses.feature_distillation(student, teacher, 2.0, projection)
    assert value.item() == pytest.approx(feature_loop(projection(student), teacher, 2.0))
    value.backward()
    assert student.grad.abs().sum() > 0 and projection.weight.grad.abs().sum() > 0


def test_masked_out_voxels_have_no_gradient():
    z, q = draw(5).requires_grad_(), draw(6).softmax(1)
    mask = draw_labels(7, classes=2).bool()
    losses.response_distillation(z, q, mask).backward()
    trusted = z.grad.abs().sum(1) > 0
    assert torch.equal(trusted, mask)


def test_empty_mask_is_zero_loss_and_zero_gradient_in_float32():
    z, q = draw(5).float().requires_grad_(), draw(6).softmax(1).float()
    loss = losses.response_distillation(z, q, torch.zeros(2, 3, 2, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0 and torch.count_nonzero(z.grad) == 0


# ----------------------------------------------------------------------------------------------- invariants


@few
@given(seeds, st.floats(0.3, 20))
def test_equal_networks_have_nothing_to_learn(seed, tau):
    z = draw(seed).requires_grad_()
    response = losses.response_distillation(z, z.detach().softmax(1), torch.ones(2, 3, 2, 4, dtype=torch.bool))
    feature = losses.feature_distillation(z, z.detach(), tau)
    (response + feature).backward()
    assert response.item() == 0.0
    assert feature.item() == pytest.approx(0.0, abs=1e-12)
    assert z.grad.abs().max() < 1e-12


@few
@given(seeds, st.floats(0.3, 20))
def test_feature_distillation_is_never_negative_and_ignores_a_constant(seed, tau):
    student, teacher = draw(seed), draw(seed + 1)
    value = losses.feature_distillation(student, teacher, tau).item()
    assert value >= -1e-12
    shifted = losses.feature_distillation(student + 3.0, teacher - 7.0, tau).item()
    assert shifted == pytest.approx(value, rel=1e-9, abs=1e-12)


@few
@given(seeds)
def test_order_of_voxels_volumes_and_classes_does_not_matter(seed):
    z, t, labels = draw(seed), draw(seed + 1), draw_labels(seed + 2)
    mask = draw_labels(seed + 3, classes=2).bool()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))

    def values(z: Tensor, t: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return torch.stack(
            [
                losses.supervised_loss(z, labels),
                losses.response_distillation(z, t.softmax(1), mask),
                losses.feature_distillation(z, t, 2.0),
            ]
        )

    expected = values(z, t, labels, mask)
    voxel_wise = values(
        z.flatten(2)[:, :, order],
        t.flatten(2)[:, :, order],
        labels.flatten(1)[:, order],
        mask.flatten(1)[:, order],
    )
    torch.testing.assert_close(voxel_wise, expected)
    torch.testing.assert_close(values(z.flip(0), t.flip(0), labels.flip(0), mask.flip(0)), expected)
    torch.testing.assert_close(values(z.flip(1), t.flip(1), C - 1 - labels, mask), expected)


def test_batch_loss_is_the_mean_over_its_volumes():
    """What makes one federated full-batch step equal the centralised one."""
    z, labels = draw(8, (5, C, 3, 3, 3)), draw_labels(9, (5, C, 3, 3, 3))
    single = [losses.supervised_loss(z[k : k + 1], labels[k : k + 1]) for k in range(5)]
    torch.testing.assert_close(losses.supervised_loss(z, labels), torch.stack(single).mean())


def test_perfect_and_opposite_predictions():
    labels = draw_labels(1)
    perfect = nn.functional.one_hot(labels, C).movedim(-1, 1).double() * 1e4
    assert losses.supervised_loss(perfect, labels).item() == pytest.approx(0.0, abs=1e-12)
    # Flat logits: CE = ln C, and p_c = 1/C in each Dice term.
    sizes = [torch.bincount(volume, minlength=C).double() for volume in labels.flatten(1)]
    v, dice = 24, []
    for n in sizes:
        dice.append((1 - (2 * n / C + 1) / (v / C + n + 1)).mean())
    expected = 0.5 * math.log(C) + 0.5 * torch.stack(dice).mean().item()
    assert losses.supervised_loss(torch.zeros(SHAPE), labels).item() == pytest.approx(expected, rel=1e-6)


def test_unlabelled_class_is_not_punished():
    """Patella unknown: moving probability between background and patella changes nothing, as does its
    label.
    """
    z, labels = draw(1), draw_labels(2, classes=3)
    p = z.softmax(1)
    background_and_patella = p[:, 0] + p[:, 3]
    moved = p.clone()
    moved[:, 0], moved[:, 3] = 0.1 * background_and_patella, 0.9 * background_and_patella
    value = losses.supervised_loss(z, labels, (1, 2))
    torch.testing.assert_close(losses.supervised_loss(moved.log(), labels, (1, 2)), value)
    drawn = torch.where(labels == 0, 3, labels)
    torch.testing.assert_close(losses.supervised_loss(z, drawn, (1, 2)), value)
    assert losses.supervised_loss(moved.log(), labels).item() > value.item()


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_mask_fills_and_empties_at_the_thresholds(progress):
    threshold = losses.uncertainty_threshold(progress, C)
    just = torch.tensor([[threshold - 1e-9, threshold, threshold + 1e-9]], dtype=torch.float64)
    assert losses.uncertainty_mask(just, progress, C).tolist() == [[True, False, False]]
    one_hot = torch.eye(C)[None]  # certain: always in
    assert losses.uncertainty_mask(losses.entropy(one_hot), progress, C).all()
    flat = torch.full((1, C, 5), 1 / C)  # knows nothing: never in
    assert not losses.uncertainty_mask(losses.entropy(flat), progress, C).any()


def test_threshold_grows_to_ln_c_and_the_release_stays_below_half_of_it():
    values = [losses.uncertainty_threshold(k / 50, C) for k in range(51)]
    assert all(b > a for a, b in itertools.pairwise(values))
    assert values[0] == pytest.approx((0.75 + 0.25 * math.exp(-5)) * math.log(4))
    assert values[-1] == math.log(4)
    # A voxel torn between two classes is trusted at the end, and never by the release.
    torn = losses.entropy(torch.tensor([[0.5, 0.5, 0.0, 0.0]]).double())
    assert losses.uncertainty_mask(torn, 1.0, C).all()
    assert losses.release_uncertainty_threshold(1.0) == pytest.approx(math.log(2))
    assert torn.item() == pytest.approx(math.log(2)) and torn.item() >= losses.release_uncertainty_threshold(0.99)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ramp_stays_between_its_ends_and_grows(a, b):
    value = losses.sigmoid_ramp_up(a, b)
    assert math.exp(-5) <= value <= 1
    assert losses.sigmoid_ramp_up(a + 0.1 * b, b) >= value


def test_ramp_ends():
    assert losses.sigmoid_ramp_up(0, 10) == math.exp(-5) == losses.sigmoid_ramp_up(-3, 10)
    assert losses.sigmoid_ramp_up(10, 10) == 1.0 == losses.sigmoid_ramp_up(99, 10) == losses.sigmoid_ramp_up(0, 0)
    assert losses.sigmoid_ramp_up(5, 10) == pytest.approx(math.exp(-1.25))
    for bad in ((math.nan, 1.0), (1.0, math.inf), (1.0, -1.0)):
        with pytest.raises(ValueError, match="ramp"):
            losses.sigmoid_ramp_up(*bad)


def test_temperature_squared_keeps_the_size_of_the_gradient():
    """At high temperature tau^2 KL -> (1/2F) sum_c (f_S - f_T, both centred)^2: its gradient does not depend
    on tau.
    """
    student, teacher = draw(1).requires_grad_(), draw(2)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = difference.detach() / C / 48  # 48 = positions of the batch
    for tau in (1e3, 1e4):
        (gradient,) = torch.autograd.grad(losses.feature_distillation(student, teacher, tau), student)
        torch.testing.assert_close(gradient, limit, rtol=20 / tau, atol=1 / tau)
    value = losses.feature_distillation(student, teacher, 1e4).item()
    assert value == pytest.approx((difference.square().sum() / (2 * C) / 48).item(), rel=1e-2)
    norms = [
        torch.autograd.grad(losses.feature_distillation(student, teacher, tau), student)[0].norm().item()
        for tau in (2.0, 4.0, 8.0, 16.0)
    ]
    assert max(norms) / min(norms) < 2.5
    unscaled = [norm / tau**2 for norm, tau in zip(norms, (2.0, 4.0, 8.0, 16.0), strict=True)]
    assert max(unscaled) / min(unscaled) > 25


@few
@given(seeds)
def test_extreme_logits_stay_finite(seed):
    """+-1e4 in float32, student and teacher certain of different classes."""
    signs = torch.randint(0, 2, SHAPE, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    z, t = (1e4 * signs).requires_grad_(), -1e4 * signs
    labels, q = draw_labels(seed), t.softmax(1)
    h = losses.entropy(q)
    mask = losses.uncertainty_mask(h, 0.0, C)
    total = (
        losses.supervised_loss(z, labels)
        + losses.supervised_loss(z, labels, (2,))
        + losses.response_distillation(z, q, mask)
        + losses.feature_distillation(z, t)
        + losses.feature_distillation(z, t, 0.5)
    )
    total.backward()
    assert torch.isfinite(h).all() and torch.isfinite(total) and torch.isfinite(z.grad).all()
    certain = torch.tensor([[1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    losses.entropy(certain).sum().backward()
    assert torch.isfinite(certain.grad).all()


def test_clipped_noise_is_seeded_bounded_and_normal_inside():
    noise = losses.clipped_noise((40, 50, 60), torch.Generator().manual_seed(3))
    again = losses.clipped_noise((40, 50, 60), torch.Generator().manual_seed(3))
    other = losses.clipped_noise((40, 50, 60), torch.Generator().manual_seed(4))
    assert torch.equal(noise, again) and not torch.equal(noise, other) and noise.dtype == torch.float32
    assert noise.abs().max().item() == pytest.approx(0.2)
    # N(0, 1) beyond two sigma on either side: 4.55 %; within one: 68.27 %.
    assert (noise.abs() >= 0.2).float().mean().item() == pytest.approx(0.0455, abs=0.003)
    assert (noise.abs() < 0.1).float().mean().item() == pytest.approx(0.6827, abs=0.006)
    assert losses.clipped_noise((1000,), torch.Generator().manual_seed(0), 1.0, 0.5).abs().max() == 0.5


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_named():
    z = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="shape"):
        losses.supervised_loss(z, torch.zeros(2, 3, 2, 5, dtype=torch.long))
    for value in (4, -1, -100, 255):
        with pytest.raises(ValueError, match="classes 0 to 3"):
            losses.supervised_loss(z, torch.full((2, 3, 2, 4), value))
    with pytest.raises(ValueError, match="labelled_classes"):
        losses.supervised_loss(z, torch.zeros(2, 3, 2, 4, dtype=torch.long), (1, 7))
    with pytest.raises(ValueError, match="shape"):
        losses.response_distillation(z, torch.zeros(2, 3, 3, 2, 4), torch.ones(2, 3, 2, 4))
    with pytest.raises(ValueError, match="mask"):
        losses.response_distillation(z, z, torch.ones(2, 1, 3, 2, 4))
    for tau in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            losses.feature_distillation(z, z, tau)


# --- ours, and pseudo-labels ------------------------------------------------------------------------------------


def test_strong_response_is_its_equation_and_zero_only_at_the_teacher() -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn((2, 4, 2, 3, 3), generator=generator, dtype=torch.float64, requires_grad=True)
    q = torch.randn((2, 4, 2, 3, 3), generator=generator, dtype=torch.float64).softmax(1)
    mask = torch.rand((2, 2, 3, 3), generator=generator) < 0.6
    p = z.softmax(1)
    cross, dice = 0.0, 0.0
    for b in range(2):
        for c in range(4):
            top, bottom = 1.0, 1.0
            for v in itertools.product(range(2), range(3), range(3)):
                if mask[(b, *v)]:
                    pv, qv = p[(b, c, *v)].item(), q[(b, c, *v)].item()
                    cross -= qv * math.log(pv) / int(mask.sum())
                    top += 2 * pv * qv
                    bottom += pv**2 + qv**2
            dice += (1 - top / bottom) / 8
    loss = losses.response_cross_entropy_dice(z, q, mask)
    assert loss.item() == pytest.approx(0.5 * cross + 0.5 * dice, rel=1e-12)
    loss.backward()
    assert z.grad is not None and z.grad.abs().sum() > 0
    same = q.log().requires_grad_(True)
    least = losses.response_cross_entropy_dice(same, q, mask)
    least.backward()
    assert same.grad is not None and same.grad.abs().max() < 1e-12  # a minimum, also for a soft teacher
    entropy = losses.entropy(q)[mask].mean().item()
    assert least.item() == pytest.approx(0.5 * entropy, rel=1e-9) and least < loss
    nothing = losses.response_cross_entropy_dice(z, q, torch.zeros_like(mask))
    assert nothing.item() == 0
    with pytest.raises(ValueError, match="differ in shape"):
        losses.response_cross_entropy_dice(z, q[:, :3], mask)


def test_pseudo_labels_count_where_they_are_sure_and_move_logits_only() -> None:
    generator = torch.Generator().manual_seed(4)
    z = torch.randn((2, 4, 3, 3), generator=generator, dtype=torch.float64, requires_grad=True)
    p = (2 * torch.randn((2, 4, 3, 3), generator=generator, dtype=torch.float64)).softmax(1).requires_grad_(True)
    for confidence in (0.0, 0.5, 0.8, 1.0):
        expected = 0.0
        for b, i, j in itertools.product(range(2), range(3), range(3)):
            best = max(range(4), key=lambda c: p[b, c, i, j].item())
            if p[b, best, i, j].item() >= confidence:
                expected -= math.log(z[b, :, i, j].softmax(0)[best].item()) / 18
        assert losses.pseudo_label_loss(z, p, confidence).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    losses.pseudo_label_loss(z, p, 0.5).backward()
    assert p.grad is None and z.grad is not None and z.grad.abs().sum() > 0
    assert losses.pseudo_label_loss(z, p, 1.0).item() == 0


def test_cross_entropy_is_that_of_torch_and_half_of_the_supervised_loss() -> None:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn((2, 4, 3, 3), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 3, 3), generator=generator)
    assert losses.cross_entropy(z, labels).item() == pytest.approx(
        torch.nn.functional.cross_entropy(z, labels).item(), rel=1e-12
    )
    part = losses.cross_entropy(z, torch.where(labels == 3, 0, labels), (1, 2)).item()
    assert 0 < part < losses.cross_entropy(z, torch.where(labels == 3, 0, labels)).item()
