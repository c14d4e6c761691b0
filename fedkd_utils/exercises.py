"""The exercises of the course: a reference, inputs to try an answer on, and the classic wrong answers with their hints.

One entry each, in the order of the notebooks. A new exercise is an entry here, a stub with
``name = course.check("name", name)`` in a notebook, and its solution folded right below; the tests run that solution
and each of the mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Function = Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """What is needed to judge an answer."""

    reference: Function
    probes: Sequence[tuple[Any, ...]]  # the arguments of each call that is compared
    mistakes: Mapping[str, Function]  # hint -> the wrong answer it belongs to


_rng = np.random.default_rng(20231)
_torch_rng = torch.Generator().manual_seed(20231)
_affine = np.array([[0, 0, 4.0, -30], [-1.2, 0, 0, 40], [0, -1.1, 0, 50], [0, 0, 0, 1]])
_labels = _rng.integers(0, 4, (2, 6, 5, 4))
_points = _rng.permutation(200)[:24].reshape(8, 3)
_logits = torch.randn(2, 4, 3, 4, 5, generator=_torch_rng, dtype=torch.float64)
_targets = torch.randint(4, (2, 3, 4, 5), generator=_torch_rng)
_state = [{"w": torch.randn(3, 2, generator=_torch_rng), "b": torch.randn(2, generator=_torch_rng)} for _ in range(3)]
_mixed = {"w": torch.zeros(3, 2), "half": torch.zeros(5, dtype=torch.float16), "count": torch.tensor(3)}
_features = [torch.randn(2, 8, 2, 3, 2, generator=_torch_rng, dtype=torch.float64) for _ in range(2)]


_oblique = np.eye(4)  # turned by 0.3 about x and by 0.5 about z, with an origin
_oblique[:3, :3] = (
    np.array([[math.cos(0.5), -math.sin(0.5), 0], [math.sin(0.5), math.cos(0.5), 0], [0, 0, 1]])
    @ np.array([[1, 0, 0], [0, math.cos(0.3), -math.sin(0.3)], [0, math.sin(0.3), math.cos(0.3)]])
    @ np.diag([4.0, 1.2, 0.7])
)
_oblique[:3, 3] = (-30, 12, 7)


def _hausdorff(a: Any, b: Any, spacing_mm: Any, of_two: Any, of_many: Any) -> float:
    apart = np.linalg.norm((a[:, None] - b[None]) * np.asarray(spacing_mm), axis=2)
    return float(of_two(of_many(apart.min(axis=1)), of_many(apart.min(axis=0))))


def _weighted(values: Any, weights: Any) -> float:
    return float((weights * values).sum() / weights.sum())


def _dice(a: Any, b: Any, value: int) -> float:
    p, t = a == value, b == value
    total = p.sum() + t.sum()
    return float(2 * (p & t).sum() / total) if total else math.nan


def _soft_dice(logits: torch.Tensor, labels: torch.Tensor, first: int = 0, smooth: float = 1.0) -> torch.Tensor:
    p = logits.softmax(dim=1).flatten(2)  # (B, C, V)
    y = torch.nn.functional.one_hot(labels.flatten(1), logits.shape[1]).movedim(-1, 1).to(p)
    overlap, total = (p * y).sum(2)[:, first:], (p.sum(2) + y.sum(2))[:, first:]
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def _one_volume(batch: torch.Tensor) -> torch.Tensor:
    """(B, C, D, H, W) -> (1, C, B D, H, W): as if the batch were one volume."""
    return batch.movedim(0, 1).flatten(1, 2)[None]


def _average(states: Sequence[Mapping[str, torch.Tensor]], counts: Sequence[int]) -> dict[str, torch.Tensor]:
    return {n: sum(s[n] * (c / sum(counts)) for s, c in zip(states, counts, strict=True)) for n in states[0]}  # type: ignore[misc]


def _squared_distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([((a[n] - b[n]) ** 2).sum() for n in a]).sum()


def _mask(p: torch.Tensor, progress: float, classes: float, start: float = 0.75, power: int = 2) -> torch.Tensor:
    h = -torch.special.xlogy(p, p).sum(dim=1)
    return h < (start + (1 - start) * math.exp(-5 * (1 - progress) ** power)) * math.log(classes)


def _kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))).sum(1)


def _pairs_won(members: Any, others: Any, tie: float = 0.5) -> float:
    members, others = np.asarray(members)[:, None], np.asarray(others)[None]
    return float(((members > others) + tie * (members == others)).mean())


def _clip(change: Any, largest_norm: float) -> Any:
    return change * min(1.0, largest_norm / max(float(np.linalg.norm(change)), 1e-300))


def _largest(values: Any, sizes: Any, k: int) -> Any:
    """The values with the k largest sizes; zero elsewhere."""
    out = np.zeros_like(values)
    chosen = np.argsort(-sizes)[:k]
    out[chosen] = values[chosen]
    return out


def _with_feedback(change: Any, missing: Any, k: int) -> dict[str, Any]:
    wanted = change + missing
    sent = _largest(wanted, abs(wanted), k)
    return {"sent": sent, "missing": wanted - sent}


def _first_reached(dice: Any, seconds_per_round: float, target: float) -> float:
    for done, value in enumerate(dice, start=1):
        if value >= target:
            return done * seconds_per_round
    return math.inf


def _on_front(dice: Any, cost: Any, equal_is_beaten: bool = True) -> Any:
    """Whether nobody is better at no higher cost, or as good at a lower one."""
    dice, cost = np.asarray(dice), np.asarray(cost)
    better = (dice > dice[:, None]) & (cost <= cost[:, None])
    cheaper = (dice >= dice[:, None]) & (cost < cost[:, None])
    return ~(better | (cheaper & equal_is_beaten)).any(axis=1)


def _half_width(a: Any, b: Any, of_pairs: bool = True, root: bool = True) -> float:
    a, b = np.asarray(a), np.asarray(b)
    spread = np.std(a - b, ddof=1) if of_pairs else math.hypot(np.std(a, ddof=1), np.std(b, ddof=1))
    return float(1.96 * spread / (math.sqrt(len(a)) if root else 1))


def _best_echo(a: float, b: float) -> float:
    return a * b / (a - b) * math.log(a / b)


def _soft_dice_gradient(p: Any, y: Any, smooth: float = 1.0) -> Any:
    """d/dp of 1 - (2 sum p y + 1) / (sum p + sum y + 1), for every voxel."""
    overlap, total = 2 * (p * y).sum() + smooth, p.sum() + y.sum() + smooth
    return overlap / total**2 - 2 * y / total


def _masked(values: Any, secrets: Any) -> Any:
    """Each integer with the secrets of its pairs: the first of a pair adds, the second subtracts; modulo 2^32."""
    upper = np.triu(secrets, 1)
    return (values + upper.sum(axis=1) - upper.sum(axis=0)) % 2**32


def _sum_of_answers(messages: Any, answered: Any, secrets: Any, second: int = -1) -> int:
    total = int(messages[answered].sum())
    for k in np.flatnonzero(answered):
        for j in np.flatnonzero(~answered):
            total -= int(secrets[k, j]) if k < j else second * int(secrets[j, k])
    total %= 2**32
    return total - 2**32 if total >= 2**31 else total


def _test_side(people: Sequence[str], share: float, order: Sequence[str] | None = None) -> Any:
    """Person after person goes to the test side, with all volumes, until there are enough."""
    chosen: list[str] = []
    for person in order or dict.fromkeys(people):
        if sum(p in chosen for p in people) < share * len(people) - 1e-9:
            chosen.append(person)
    return np.array([p in chosen for p in people])


_change, _missing = _rng.normal(size=12), _rng.normal(size=12)
_integers = np.array([-7, 30, -52, 11])
_secrets = np.triu(np.random.default_rng(20238).integers(0, 2**32, (4, 4)), 1)
_half, _drawn = np.random.default_rng(20239).random((3, 4)), np.random.default_rng(20240).integers(0, 2, (3, 4)) / 1.0
_peaked = (4 * _logits).softmax(dim=1)
_wide = 300 * _logits
_certain = torch.nn.functional.one_hot(_targets, 4).movedim(-1, 1).to(_peaked)  # (B, C, D, H, W) zeros and ones
_shares = _peaked[0].numpy()  # (C, D, H, W)
_table = np.random.default_rng(20237).normal(size=(4, 6))  # (seeds, subjects)

_sent = np.arange(6.0).reshape(2, 3)
_one_missing = np.where(_sent == 4, math.nan, _sent)


def _run_bytes(weights: int, hospitals: int, rounds: int, teachers: int = 1, last: int = 1) -> dict[str, int]:
    return {"down": hospitals * (teachers + rounds + last) * weights, "up": hospitals * rounds * weights}


def _usable(arrays: Sequence[Any], began: Sequence[int], sent: Any, number: int) -> list[bool]:
    pairs = zip(arrays, began, strict=True)
    return [n == number and x.shape == sent.shape and bool(np.isfinite(x).all()) for x, n in pairs]


def _round_time(seconds: Sequence[float], patience: float) -> dict[str, float]:
    return {"seconds": min(max(seconds), patience), "answers": sum(s <= patience for s in seconds)}


EXERCISES: dict[str, Exercise] = {
    "spacing_from_affine": Exercise(
        lambda affine: np.linalg.norm(affine[:3, :3], axis=0),
        [(_affine,), (np.diag([2.0, 3.0, 4.0, 1.0]),), (_oblique,)],
        {
            "the diagonal holds the voxel sizes only when the axes are not permuted.": lambda a: np.abs(np.diag(a)[:3]),
            "these are the lengths of the rows; a step along an index is a column.": lambda a: np.linalg.norm(
                a[:3, :3], axis=1
            ),
            "the largest entry of a column is its length only when the slices are not tilted.": lambda a: np.abs(
                a[:3, :3]
            ).max(axis=0),
            "the length of a column is the root of the sum of its squares, not the sum of its sizes.": lambda a: np.abs(
                a[:3, :3]
            ).sum(axis=0),
        },
    ),
    "volume_ml": Exercise(
        lambda label, spacing_mm, value: (label == value).sum() * np.prod(spacing_mm) / 1000,
        [(_labels[0], (4.0, 1.2, 1.2), 2), (_labels[1], (1.5, 0.4, 0.4), 1)],
        {
            "that is in cubic millimetres; a millilitre has 1000 of them.": lambda x, s, v: (x == v).sum() * np.prod(s),
            "that is the number of voxels; each is as large as the product of its sizes.": lambda x, s, v: (
                x == v
            ).sum(),
            "that counts every cartilage, not the one asked for.": lambda x, s, v: (x > 0).sum() * np.prod(s) / 1000,
        },
    ),
    "spin_echo_signal": Exercise(
        lambda tr_ms, te_ms, t1_ms, t2_ms: (1 - np.exp(-tr_ms / t1_ms)) * np.exp(-te_ms / t2_ms),
        [(650.0, 12.0, 1240.0, 37.0), (3000.0, 35.0, 365.0, 133.0)],
        {
            "T1 belongs to the recovery (with TR), T2 to the decay (with TE).": lambda tr, te, t1, t2: (
                (1 - np.exp(-tr / t2)) * np.exp(-te / t1)
            ),
            "recovery is one minus the exponential.": lambda tr, te, t1, t2: np.exp(-tr / t1) * np.exp(-te / t2),
        },
    ),
    "z_score": Exercise(
        lambda image: (image - image.mean()) / image.std(),
        [(_rng.normal(3, 5, (4, 5, 6)),), (_rng.random((3, 3, 3)),)],
        {
            "divide by the standard deviation, not by the variance.": lambda x: (x - x.mean()) / x.var(),
            "the mean has to become zero as well.": lambda x: x / x.std(),
            "ddof=1 is for a sample; here are all voxels: the population's deviation, np.std(x).": (
                lambda x: (x - x.mean()) / x.std(ddof=1)
            ),
            "that scales to the range 0 to 1, which one bright voxel decides.": lambda x: (x - x.min()) / np.ptp(x),
        },
    ),
    "best_echo_ms": Exercise(
        _best_echo,
        [(133.0, 37.0), (37.0, 133.0), (800.0, 40.0)],
        {
            "set the derivative of the *difference* to zero; the mean of the two is a guess.": lambda a, b: (a + b) / 2,
            "the geometric mean is near, but set the derivative to zero and solve for the echo time.": lambda a, b: (
                math.sqrt(a * b)
            ),
            "the derivative brings the factors 1 / T2 down: a logarithm of their quotient stays.": lambda a, b: (
                a * b / abs(a - b)
            ),
        },
    ),
    "dice": Exercise(
        _dice,
        [(_labels[0], _labels[1], 1), (_labels[0], _labels[0], 3), (_labels[0], _labels[1], 7)],
        {
            "that is the Jaccard index: Dice counts the overlap twice.": lambda a, b, v: (
                float(((a == v) & (b == v)).sum() / u) if (u := ((a == v) | (b == v)).sum()) else math.nan
            ),
            "when both are empty nothing was measured: NaN, not 1.": lambda a, b, v: (
                1.0 if not ((a == v) | (b == v)).any() else _dice(a, b, v)
            ),
            "when both are empty nothing was measured: NaN, not 0.": lambda a, b, v: (
                0.0 if not ((a == v) | (b == v)).any() else _dice(a, b, v)
            ),
        },
    ),
    "soft_dice_loss": Exercise(
        _soft_dice,
        [(_logits, _targets), (_logits[:1], _targets[:1])],
        {
            "the background counts too in this loss.": lambda z, y: _soft_dice(z, y, first=1),
            "the + 1 in numerator and denominator is missing.": lambda z, y: _soft_dice(z, y, smooth=0.0),
            "that is the Dice score; a loss is one minus it.": lambda z, y: 1 - _soft_dice(z, y),
            "sum over the voxels of each volume, not over the whole batch: then average.": lambda z, y: _soft_dice(
                _one_volume(z), _one_volume(y[:, None])[:, 0]
            ),
        },
    ),
    "soft_dice_gradient": Exercise(
        _soft_dice_gradient,
        [(_half, _drawn), (_half, 0 * _drawn), (_drawn, _drawn)],
        {
            "p stands in the denominator too: use the quotient rule.": lambda p, y: -2 * y / (p.sum() + y.sum() + 1),
            "the sign: the loss is one *minus* the quotient.": lambda p, y: -_soft_dice_gradient(p, y),
            "the + 1 in numerator and denominator is missing.": lambda p, y: _soft_dice_gradient(p, y, smooth=0.0),
            "the square of the denominator is missing.": lambda p, y: (
                _soft_dice_gradient(p, y) * (p.sum() + y.sum() + 1)
            ),
        },
    ),
    "poly_learning_rate": Exercise(
        lambda initial, step, total_steps: initial * (1 - step / total_steps) ** 0.9,
        [(0.01, 0, 144), (0.01, 36, 144), (0.1, 143, 144)],
        {
            "that is a straight line: the power 0.9 is missing.": lambda i, s, n: i * (1 - s / n),
            "the power belongs to the bracket, not to the quotient alone.": lambda i, s, n: i * (1 - (s / n) ** 0.9),
            "it falls from the initial rate to zero, not the other way.": lambda i, s, n: i * (s / n) ** 0.9,
        },
    ),
    "voe": Exercise(
        lambda dice: 1 - dice / (2 - dice),
        [(0.8,), (0.5,), (1.0,)],
        {
            "one minus Dice is not the overlap error: the union is not the sum.": lambda d: 1 - d,
            "that is the Jaccard index itself; the error is one minus it.": lambda d: d / (2 - d),
        },
    ),
    "volume_difference": Exercise(
        lambda prediction, truth: (prediction.sum() - truth.sum()) / truth.sum() if truth.any() else math.nan,
        [(_labels[0] == 1, _labels[1] < 3), (_labels[0] > 0, _labels[1] == 2), (_labels[0] == 1, _labels[1] > 9)],
        {
            "keep the sign: too much is positive, too little negative.": lambda p, t: (
                abs(int(p.sum()) - int(t.sum())) / t.sum() if t.any() else math.nan
            ),
            "it is a share of the truth, not of the prediction.": lambda p, t: (
                (p.sum() - t.sum()) / p.sum() if t.any() else math.nan
            ),
            "without a truth there is no share of it: NaN.": lambda p, t: (
                (p.sum() - t.sum()) / t.sum() if t.any() else 0.0
            ),
        },
    ),
    "hausdorff_mm": Exercise(
        lambda a, b, spacing_mm: _hausdorff(a, b, spacing_mm, max, np.max),
        [
            (_points[:1], _points[1:], (4.0, 1.2, 1.2)),
            (_points[1:], _points[:1], (4.0, 1.2, 1.2)),
            (_points[3:], _points[:6], (1.5, 0.4, 0.7)),
        ],
        {
            "that is in voxels: multiply each axis by its spacing.": lambda a, b, s: _hausdorff(
                a, b, (1, 1, 1), max, np.max
            ),
            "both directions count: take the larger, not the smaller.": lambda a, b, s: _hausdorff(
                a, b, s, min, np.max
            ),
            "that is the way from a to b alone; a piece that only b has is not seen.": lambda a, b, s: _hausdorff(
                a, b, s, lambda forth, back: forth, np.max
            ),
            "that is the way from b to a alone; a piece that only a has is not seen.": lambda a, b, s: _hausdorff(
                a, b, s, lambda forth, back: back, np.max
            ),
            "the largest of the nearest distances, not their mean.": lambda a, b, s: _hausdorff(a, b, s, max, np.mean),
        },
    ),
    "bootstrap_spread": Exercise(
        lambda values: float(np.std(values) / math.sqrt(len(values))),
        [(np.array([0.55, 0.61, 0.47, 0.7]),), (np.array([0.1, 0.4]),), (np.array([0.3, 0.3, 0.3]),)],
        {
            "ddof=1 is the honest standard error; the bootstrap draws from these values alone, and is smaller.": (
                lambda values: float(np.std(values, ddof=1) / math.sqrt(len(values)))
            ),
            "that is how one draw spreads; a mean of n draws spreads less.": lambda values: float(np.std(values)),
            "the variance of a mean falls with n, its standard deviation with the root of n.": lambda values: float(
                np.std(values) / len(values)
            ),
        },
    ),
    "fedavg": Exercise(
        _average,
        [(_state, [10, 20, 5]), (_state[:2], [1, 3])],
        {
            "the clients are weighted by their counts.": lambda s, c: _average(s, [1] * len(c)),
            "divide by the sum of the counts.": lambda s, c: {n: v * sum(c) for n, v in _average(s, c).items()},
        },
    ),
    "bytes_of_state": Exercise(
        lambda state: sum(t.numel() * t.element_size() for t in state.values()),
        [(_mixed,), (_state[0],)],
        {
            "not every tensor has 4 bytes a value: ask element_size().": lambda s: sum(
                4 * t.numel() for t in s.values()
            ),
            "that is the number of values.": lambda s: sum(t.numel() for t in s.values()),
        },
    ),
    "fedprox_term": Exercise(
        lambda state, global_state, mu: mu / 2 * _squared_distance(state, global_state),
        [(_state[0], _state[1], 0.1), (_state[0], _state[0], 1.0)],
        {
            "the factor is mu / 2.": lambda s, g, mu: mu * _squared_distance(s, g),
            "the distance is squared: no root.": lambda s, g, mu: mu / 2 * _squared_distance(s, g).sqrt(),
        },
    ),
    "fedavg_end": Exercise(
        lambda pulls, wishes, counts, steps, rate: _weighted(wishes, counts * (1 - (1 - rate * pulls) ** steps)),
        [
            (np.array([1.0, 4.0]), np.array([0.0, 1.0]), np.array([10, 30]), 5, 0.1),
            (np.array([0.5, 2.0, 3.0]), np.array([1.0, -1.0, 2.0]), np.array([8, 2, 5]), 20, 0.2),
            (np.array([1.0, 4.0]), np.array([0.0, 1.0]), np.array([10, 30]), 1, 0.1),
        ],
        {
            "a hospital with more volumes counts more: its weight has n_k in it.": lambda a, c, n, e, r: _weighted(
                c, 1 - (1 - r * a) ** e
            ),
            "that is the optimum of all together; with several local steps FedAvg ends elsewhere.": (
                lambda a, c, n, e, r: _weighted(c, n * a)
            ),
            "(1 - eta a)^E is the part of the way that is left; the weight is the part that was gone.": (
                lambda a, c, n, e, r: _weighted(c, n * (1 - r * a) ** e)
            ),
        },
    ),
    "temperature_softmax": Exercise(
        lambda logits, tau: (logits / tau).softmax(dim=1),
        [(_logits, 2.0), (_wide, 0.5)],
        {
            "divide by the temperature, do not multiply.": lambda z, tau: (z * tau).softmax(dim=1),
            "exp overflows for large logits: subtract the largest first.": lambda z, tau: (
                (z / tau).exp() / (z / tau).exp().sum(1, keepdim=True)
            ),
            "softmax over the class axis, 1.": lambda z, tau: (z / tau).softmax(dim=-1),
        },
    ),
    "entropy_mask": Exercise(
        lambda probabilities, progress: _mask(probabilities, progress, probabilities.shape[1]),
        [
            (_logits.softmax(1), 0.0),
            (_peaked, 0.5),
            (_logits.softmax(1), 0.5),
            (_logits.softmax(1), 1.0),
            (_certain, 0.5),
        ],
        {
            "that is the released threshold, ln 2; with C classes it is ln C.": lambda p, t: _mask(p, t, 2),
            "True where the entropy is *below* the threshold.": lambda p, t: ~_mask(p, t, p.shape[1]),
            "0 ln 0 counts as 0; 0 times minus infinity is NaN, and NaN is below nothing.": lambda p, t: (
                _mask(p, t, p.shape[1]) & (p > 0).all(dim=1)
            ),
            "the ramp falls with the *square* of what is left of the progress.": lambda p, t: _mask(
                p, t, p.shape[1], power=1
            ),
            "the threshold opens with progress: ramp up, not a constant 0.75.": lambda p, t: (
                -torch.special.xlogy(p, p).sum(1) < 0.75 * math.log(p.shape[1])
            ),
        },
    ),
    "feature_kl": Exercise(
        lambda teacher_features, student_features: _kl(teacher_features, student_features).mean(),
        [(_features[0], _features[1]), (_features[1], _features[1])],
        {
            "the teacher is the reference: KL(teacher || student).": lambda t, s: _kl(s, t).mean(),
            "a mean over channels as well makes it F times weaker; average over positions only.": lambda t, s: (
                _kl(t, s).mean() / t.shape[1]
            ),
        },
    ),
    "ramp": Exercise(
        lambda s, s_max: math.exp(-5 * (1 - min(max(s / s_max, 0.0), 1.0)) ** 2),
        [(0.0, 10.0), (5.0, 10.0), (10.0, 10.0), (15.0, 10.0)],
        {
            "beyond s_max the ramp stays at 1: clip the ratio.": lambda s, m: math.exp(-5 * (1 - s / m) ** 2),
            "that is a line; the ramp is exp(-5 (1 - x)^2).": lambda s, m: min(max(s / m, 0.0), 1.0),
        },
    ),
    "distillation_gradient": Exercise(
        lambda teacher, student, tau: tau * ((student / tau).softmax(1) - (teacher / tau).softmax(1)),
        [(_logits, _logits.flip(2), 2.0), (_logits.flip(0), _logits, 0.5), (_logits, _logits, 1.0)],
        {
            "tau squared times 1/tau is tau, not 1/tau: the square is missing.": lambda t, s, tau: (
                ((s / tau).softmax(1) - (t / tau).softmax(1)) / tau
            ),
            "the loss falls when the student moves towards the teacher: mind the sign.": lambda t, s, tau: (
                tau * ((t / tau).softmax(1) - (s / tau).softmax(1))
            ),
            "that is the limit for a high temperature only.": lambda t, s, tau: (
                (s - s.mean(1, keepdim=True) - t + t.mean(1, keepdim=True)) / t.shape[1]
            ),
        },
    ),
    "hand_over": Exercise(
        lambda theta_t, theta_s, a: {n: (1 - a) * theta_t[n] + a * theta_s[n] for n in theta_t},
        [(_state[0], _state[1], 0.2), (_state[0], _state[1], 0.0)],
        {
            "a is the share of the student, not of the teacher.": lambda t, s, a: {
                n: a * t[n] + (1 - a) * s[n] for n in t
            },
            "the teacher has to shrink by what the student adds.": lambda t, s, a: {n: t[n] + a * s[n] for n in t},
        },
    ),
    "teacher_left": Exercise(
        lambda rates: math.prod(1 - a for a in rates),
        [([0.0, 0.2, 0.5],), ([0.9, 0.99],), ([0.1] * 10,)],
        {
            "each blend leaves 1 - a of what was left before: multiply, do not subtract the sum.": lambda r: 1 - sum(r),
            "that is the share of the students; what is left of the teacher is the rest.": lambda r: (
                1 - math.prod(1 - a for a in r)
            ),
            "a is the share that the student takes, 1 - a what stays.": math.prod,
        },
    ),
    "bytes_saved": Exercise(
        lambda teacher_bytes, rounds, clients: clients * (2 * rounds * teacher_bytes - teacher_bytes),
        [(1000, 6, 4), (77, 1, 2)],
        {
            "the release sends the teacher in both directions each round.": lambda b, r, c: c * (r * b - b),
            "once it still has to travel: subtract that.": lambda b, r, c: c * 2 * r * b,
            "every client gets its own copy.": lambda b, r, c: 2 * r * b - b,
        },
    ),
    "fold_unknown": Exercise(
        lambda p, known: np.concatenate([1 - p[list(known)].sum(axis=0, keepdims=True), p[list(known)]]),
        [(_shares, [1, 2]), (_shares, [2]), (_shares, [1, 2, 3])],
        {
            "what is unknown may be background or not: its probability belongs to the first entry.": lambda p, known: p[
                [0, *known]
            ],
            "the unknown classes are not impossible: add their probabilities, do not divide them away.": (
                lambda p, known: p[[0, *known]] / p[[0, *known]].sum(axis=0)
            ),
            "the background comes first, and then the known classes.": lambda p, known: np.concatenate(
                [p[list(known)], 1 - p[list(known)].sum(axis=0, keepdims=True)]
            ),
        },
    ),
    "world_mm": Exercise(
        lambda affine, index: affine[:3, :3] @ np.asarray(index) + affine[:3, 3],
        [(_affine, (0, 0, 0)), (_affine, (5, 2, 7))],
        {
            "index 0 is not at the origin of the scanner: the last column says where it is.": lambda a, i: (
                a[:3, :3] @ np.asarray(i)
            ),
            "a step along an index is a column of the affine, not a row.": lambda a, i: (
                a[:3, :3].T @ np.asarray(i) + a[:3, 3]
            ),
            "voxel sizes alone do not say which way an axis runs.": lambda a, i: (
                np.linalg.norm(a[:3, :3], axis=0) * np.asarray(i) + a[:3, 3]
            ),
        },
    ),
    "test_side": Exercise(
        _test_side,
        [
            (["mary", "bob", "mary", "ann", "bob", "zoe"], 0.5),
            (["zoe", "zoe", "ann", "bob", "zoe", "ann", "cal", "dan"], 0.3),
            (["a", "b", "c", "d", "a"], 0.3),
        ],
        {
            "a cut through the list may leave one person on both sides: go person by person.": lambda people, share: (
                np.arange(len(people)) < math.ceil(share * len(people) - 1e-9)
            ),
            "count volumes, not people: some come more often than others.": lambda people, share: np.isin(
                people, list(dict.fromkeys(people))[: math.ceil(share * len(set(people)) - 1e-9)]
            ),
            "in the order in which they appear, not in that of the alphabet.": lambda people, share: _test_side(
                people, share, sorted(set(people))
            ),
        },
    ),
    "auc": Exercise(
        _pairs_won,
        [
            (np.array([0.9, 0.4]), np.array([0.1, 0.5, 0.3])),
            (np.array([1.0, 2.0, 2.0]), np.array([2.0, 0.0])),
            (np.array([0.0]), np.array([1.0])),
        ],
        {
            "a tie is half a win, not a whole one.": lambda m, o: _pairs_won(m, o, tie=1.0),
            "a tie is half a win, not none.": lambda m, o: _pairs_won(m, o, tie=0.0),
            "count the pairs in which the *member* scores higher.": lambda m, o: _pairs_won(o, m),
            "that asks only whether the best member beats the best other; compare every pair.": lambda m, o: float(
                max(m) > max(o)
            ),
        },
    ),
    "clip_change": Exercise(
        _clip,
        [(_change, 1.0), (_change, 100.0), (np.zeros(3), 1.0)],
        {
            "a change that is short already stays as it is.": lambda c, s: c * s / max(np.linalg.norm(c), 1e-300),
            "shorten the whole arrow; cutting each number turns it, and it may still be too long.": lambda c, s: (
                np.clip(c, -s, s)
            ),
            "without any change there is nothing to divide by: 0 / 0 is NaN.": lambda c, s: (
                c * min(1.0, s / np.linalg.norm(c)) if c.any() else c * np.nan
            ),
        },
    ),
    "noise_for_rounds": Exercise(
        lambda noise_multiplier, rounds: noise_multiplier * math.sqrt(rounds),
        [(1.0, 12), (0.5, 4), (2.0, 1)],
        {
            "the divergences of the rounds add up, and each falls with the *square* of the noise.": lambda z, t: z * t,
            "more rounds need more noise, not less.": lambda z, t: z / math.sqrt(t),
        },
    ),
    "send_largest": Exercise(
        _with_feedback,
        [(_change, _missing, 3), (_change, 0 * _missing, 1), (0 * _change, _missing, 12)],
        {
            "what is still missing belongs to what is to be sent.": lambda c, e, k: {
                "sent": (sent := _largest(c, abs(c), k)),
                "missing": c + e - sent,
            },
            "the largest by size: a large negative number matters as much.": lambda c, e, k: {
                "sent": (sent := _largest(c + e, c + e, k)),
                "missing": c + e - sent,
            },
            "what was missing before and is not sent now is still missing.": lambda c, e, k: {
                "sent": (sent := _largest(c + e, abs(c + e), k)),
                "missing": c - sent,
            },
        },
    ),
    "sum_of_answers": Exercise(
        _sum_of_answers,
        [
            (_masked(_integers, _secrets), np.array([True, True, False, True]), _secrets),
            (_masked(_integers, _secrets), np.array([False, True, True, False]), _secrets),
            (_masked(_integers, _secrets), np.array([True, True, True, True]), _secrets),
        ],
        {
            "the masks that the answers share with whoever is missing still stand in the sum.": lambda m, a, s: (
                _sum_of_answers(m, a, 0 * s)
            ),
            "whoever stands first in a pair added the secret, and the second subtracted it: mind which is missing.": (
                lambda m, a, s: _sum_of_answers(m, a, s, second=1)
            ),
            "the upper half of the integers stands for negative sums.": lambda m, a, s: (
                _sum_of_answers(m, a, s) % 2**32
            ),
            "what has not arrived cannot be added.": lambda m, a, s: _sum_of_answers(m, np.full(len(m), True), s),
        },
    ),
    "crossed_resample": Exercise(
        lambda table, seeds, subjects: table[np.ix_(seeds, subjects)].mean(),
        [(_table, [0, 0, 2, 2], [1, 4, 4, 0]), (_table, [1, 1, 1, 3], [2, 2, 3, 5])],
        {
            "every drawn seed meets every drawn subject; pairing them off uses four cells of sixteen.": (
                lambda table, seeds, subjects: table[seeds, subjects].mean()
            ),
            "a subject that is drawn twice counts twice; a set forgets that.": lambda table, seeds, subjects: table[
                np.ix_(sorted(set(seeds)), sorted(set(subjects)))
            ].mean(),
            "the subjects are drawn as well as the seeds.": lambda table, seeds, subjects: table[seeds].mean(),
        },
    ),
    "seconds_to_reach": Exercise(
        _first_reached,
        [
            (np.array([0.2, 0.5, 0.6, 0.55]), 3.0, 0.5),
            (np.array([0.7, 0.6]), 2.0, 0.65),
            (np.array([0.1, 0.2]), 2.0, 0.3),
        ],
        {
            "a round has to end before its Dice is there: the first round costs one round, not none.": (
                lambda dice, seconds, target: _first_reached(dice, seconds, target) - seconds
            ),
            "never reached is not reached at once: argmax of nothing true is 0.": (
                lambda dice, seconds, target: (int(np.argmax(np.asarray(dice) >= target)) + 1) * seconds
            ),
            "when it is there first, not when it is highest.": lambda dice, seconds, target: (
                (int(np.argmax(dice)) + 1) * seconds if max(dice) >= target else math.inf
            ),
        },
    ),
    "on_front": Exercise(
        _on_front,
        [
            (np.array([0.7, 0.8, 0.75, 0.9]), np.array([1.0, 2.0, 3.0, 9.0])),
            (np.array([0.5, 0.5, 0.4]), np.array([1.0, 2.0, 1.0])),
        ],
        {
            "the best is on the front, but so is whoever is cheaper than all that are better.": lambda dice, cost: (
                np.asarray(dice) == max(dice)
            ),
            "Dice per second is no currency: on the front is whom nobody beats in both.": lambda dice, cost: (
                np.asarray(dice) / np.asarray(cost) >= np.median(np.asarray(dice) / np.asarray(cost))
            ),
            "as good and dearer is beaten too.": lambda dice, cost: _on_front(dice, cost, equal_is_beaten=False),
        },
    ),
    "honest_score": Exercise(
        lambda validation, test: test[int(np.argmax(validation))],
        [
            (np.array([0.5, 0.7, 0.6]), np.array([0.4, 0.55, 0.65])),
            (np.array([0.8, 0.2, 0.4]), np.array([0.7, 0.9, 0.6])),
        ],
        {
            "the best round on the test volumes was chosen by the test volumes.": lambda validation, test: max(test),
            "report the test volumes; the validation volumes have done their work.": lambda validation, test: max(
                validation
            ),
            "the last round is honest, but not what was asked.": lambda validation, test: test[-1],
        },
    ),
    "smallest_detectable": Exercise(
        _half_width,
        [
            (np.array([0.8, 0.7, 0.6, 0.9]), np.array([0.75, 0.66, 0.58, 0.82])),
            (np.array([0.5, 0.5, 0.9]), np.array([0.4, 0.6, 0.7])),
        ],
        {
            "the two rows saw the same knees: what counts is the spread of the *differences*.": lambda a, b: (
                _half_width(a, b, of_pairs=False)
            ),
            "a mean of n differences spreads less than one of them, by the root of n.": lambda a, b: _half_width(
                a, b, root=False
            ),
        },
    ),
    "verdict": Exercise(
        lambda low, high: 1 if low > 0 else -1 if high < 0 else 0,
        [(0.01, 0.04), (-0.03, -0.01), (-0.01, 0.04), (-0.04, 0.01)],
        {
            "an interval that holds zero decides nothing, whatever side most of it lies on.": lambda low, high: (
                1 if low + high > 0 else -1
            ),
            "undecided is not refuted.": lambda low, high: 1 if low > 0 else -1,
            "both ends must lie above zero; the lower one says whether they do.": lambda low, high: (
                1 if high > 0 else -1
            ),
        },
    ),
    "plan_mb": Exercise(
        lambda message_mb, rounds, up_share: message_mb * (rounds + 1) + message_mb * rounds * up_share,
        [(2.0, 12, 1.0), (0.12, 4, 0.25), (1.0, 1, 0.0)],
        {
            "the first student travels before the first round: one message more goes down than rounds are played.": (
                lambda message_mb, rounds, up_share: message_mb * rounds * (1 + up_share)
            ),
            "only what goes up is made smaller.": lambda message_mb, rounds, up_share: (
                message_mb * (2 * rounds + 1) * up_share
            ),
        },
    ),
    "rounds_within": Exercise(
        lambda budget_mb, message_mb, up_share: math.floor(
            (budget_mb - message_mb) / (message_mb * (1 + up_share)) + 1e-9
        ),
        [(1.5, 0.12, 1.0), (12.0, 2.0, 0.25), (10.0, 1.0, 0.0)],
        {
            "the first message is paid for before the first round.": lambda budget_mb, message_mb, up_share: math.floor(
                budget_mb / (message_mb * (1 + up_share)) + 1e-9
            ),
            "a round that is paid for in part is over the budget: round down.": (
                lambda budget_mb, message_mb, up_share: math.ceil(
                    (budget_mb - message_mb) / (message_mb * (1 + up_share)) - 1e-9
                )
            ),
        },
    ),
    "best_within": Exercise(
        lambda dice, mb, budget_mb: max(d for d, m in zip(dice, mb, strict=True) if m <= budget_mb),
        [
            (np.array([0.7, 0.9, 0.8]), np.array([0.0, 5.0, 1.5]), 1.5),
            (np.array([0.6, 0.65]), np.array([0.0, 0.1]), 1.0),
            (np.array([0.7, 0.5]), np.array([0.0, 1.0]), 2.0),
        ],
        {
            "what costs exactly the budget is within it.": lambda dice, mb, budget_mb: max(
                d for d, m in zip(dice, mb, strict=True) if m < budget_mb
            ),
            "the best of all may be too dear.": lambda dice, mb, budget_mb: max(dice),
            "the dearest that can be paid need not be the best.": lambda dice, mb, budget_mb: max(
                (m, d) for d, m in zip(dice, mb, strict=True) if m <= budget_mb
            )[1],
        },
    ),
    "run_bytes": Exercise(
        _run_bytes,
        [(1_950_928, 3, 2), (100, 4, 12), (7, 1, 1)],
        {
            "the teacher goes out once, not in every round.": lambda w, k, r: _run_bytes(w, k, r, teachers=r),
            "besides those of the rounds two more come down to each: the teacher first, and the last student.": (
                lambda w, k, r: _run_bytes(w, k, r, last=0)
            ),
            "the teacher never goes back up.": lambda w, k, r: {
                **_run_bytes(w, k, r),
                "up": k * (r + 1) * w,
            },
            "every hospital gets its own copy.": lambda w, k, r: {**_run_bytes(w, k, r), "down": (r + 2) * w},
        },
    ),
    "usable": Exercise(
        _usable,
        [
            (
                [_sent + 1, _sent * math.nan, _sent[:1], _sent + 2, _sent + math.inf, _sent.T, _one_missing],
                [5, 5, 5, 4, 5, 5, 5],
                _sent,
                5,
            ),
            ([_sent], [1], _sent, 1),
            ([_sent[:, :1]], [1], _sent, 1),
        ],
        {
            "an update that began from another student is late, however good it looks.": lambda a, b, s, n: _usable(
                a, [n] * len(b), s, n
            ),
            "infinity is no weight either: ask for finite numbers, not for the absence of NaN.": lambda a, b, s, n: [
                m == n and x.shape == s.shape and not bool(np.isnan(x).any()) for x, m in zip(a, b, strict=True)
            ],
            "one weight that is no number spoils the average: all must be finite, not any.": lambda a, b, s, n: [
                m == n and x.shape == s.shape and bool(np.isfinite(x).any()) for x, m in zip(a, b, strict=True)
            ],
            "NumPy stretches some arrays to fit, a server must not: compare the shapes.": lambda a, b, s, n: [
                m == n and x.shape in (s.shape, s[:1].shape, s[:, :1].shape) and bool(np.isfinite(x).all())
                for x, m in zip(a, b, strict=True)
            ],
            "the same number of values is not the same shape.": lambda a, b, s, n: [
                m == n and x.size == s.size and bool(np.isfinite(x).all()) for x, m in zip(a, b, strict=True)
            ],
        },
    ),
    "round_time": Exercise(
        _round_time,
        [
            (np.array([3.0, 10.0, 4.0]), 60.0),
            (np.array([3.0, math.inf, 4.0]), 60.0),
            (np.array([90.0, 70.0]), 60.0),
            (np.array([60.0, 1.0]), 60.0),
        ],
        {
            "they work side by side: the slowest decides, not the sum.": lambda s, p: {
                **_round_time(s, p),
                "seconds": min(sum(s), p),
            },
            "the server does not wait longer than its patience.": lambda s, p: {**_round_time(s, p), "seconds": max(s)},
            "who answers after that is not in the round.": lambda s, p: {**_round_time(s, p), "answers": len(s)},
            "while one is missing the server waits until its patience is over; it cannot know that nobody comes.": (
                lambda s, p: {**_round_time(s, p), "seconds": max([x for x in s if x <= p], default=p)}
            ),
        },
    ),
}
