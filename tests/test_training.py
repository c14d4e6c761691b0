"""Training: schedule, draws, reproducibility, best weights, evaluation on the native grid, and progress bars."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkd_utils import losses, metrics, networks, training, transforms
from fedkd_utils.seeds import seed_of, seeded
from fedkd_utils.settings import QUICK
from fedkd_utils.training import LabelledBatches, TrainingError
from fedkd_utils.transforms import Case

TINY = replace(QUICK, name="tiny", grid_shape=(4, 16, 16), channels=(4, 8), dropout=0.2)
SHAPE = TINY.grid_shape


def knees(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright blobs whose brightness is their class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros((count, *SHAPE), dtype=torch.long)
    for volume in labels:
        for c in (1, 2, 3):
            row = 2 + 4 * (c - 1) + int(torch.randint(0, 2, (1,), generator=generator))
            column = int(torch.randint(1, 9, (1,), generator=generator))
            volume[1:3, row : row + 3, column : column + 6] = c
    images = labels[:, None].float() + 0.3 * torch.randn((count, 1, *SHAPE), generator=generator)
    return images, labels


def case(seed: int, classes: tuple[int, ...] = (1, 2, 3)) -> Case:
    images, labels = knees(1, seed)
    native = labels[0].numpy().astype(np.uint8)
    affine = np.diag([*TINY.grid_spacing_mm, 1.0])
    return Case(f"case {seed}", images[0], labels[0], affine, native, SHAPE, affine, classes)


def train(network: networks.TappedNetwork, seed: int = 0, **changes: object) -> training.TrainingLog:
    images, labels = knees(4, 1)
    options: dict = {"steps": 12, "batch": 2, "learning_rate": 1e-2, "weight_decay": 1e-4, "augmentation": None}
    return training.train_supervised(network, images, labels, seed=seed, **(options | changes))


@given(st.floats(1e-5, 1), st.integers(1, 1000))
def test_schedule_falls_from_the_start_to_zero_over_the_run(rate: float, total: int) -> None:
    values = [training.poly_learning_rate(rate, step, total) for step in range(total)]
    assert values[0] == rate and min(values) > 0
    assert all(a > b for a, b in zip(values, values[1:], strict=False))
    assert training.poly_learning_rate(rate, total, total) == 0


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 20), st.integers(0, 5))
def test_draws_are_even_and_fixed_by_the_seed(count: int, batch: int, steps: int, seed: int) -> None:
    first, again = (training.draw_batches(count, batch, steps, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert first.shape == (steps, batch) and torch.equal(first, again)
    seen = torch.bincount(first.flatten(), minlength=count)
    assert seen.max() - seen.min() <= 1


def test_seeds_are_independent_and_named() -> None:
    assert seed_of(1, "a") == seed_of(1, "a")
    assert len({seed_of(1, "a"), seed_of("1", "a"), seed_of("1a"), seed_of(1, "b"), seed_of(11, "")}) == 5
    before = torch.get_rng_state()
    with seeded(7):
        a = torch.rand(3)
    with seeded(7):
        assert torch.equal(a, torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_learns_and_is_repeatable_to_the_last_bit() -> None:
    states = []
    for seed in (0, 0, 1):
        network = networks.build_network(TINY, 0)
        log = train(network, seed, steps=60)
        frame = log.frame()
        assert frame["loss"].iloc[-5:].mean() < 0.6 * frame["loss"].iloc[:5].mean()
        assert list(frame["step"]) == list(range(60)) and log.best_step == 60 and not network.training
        states.append(networks.copy_state(network))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_one_step_is_adamw_by_hand() -> None:
    """Against the textbook: m = g (after bias correction), v = g^2, decay first."""
    network = networks.build_network(replace(TINY, dropout=0.0), 0).double()
    images, labels = knees(2, 3)
    before = networks.copy_state(network)
    losses.supervised_loss(network(images.double()), labels).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    training.train_supervised(
        network,
        images.double(),
        labels,
        steps=1,
        batch=2,
        learning_rate=0.01,
        weight_decay=0.1,
        seed=0,
        augmentation=None,
    )
    for name, parameter in network.named_parameters():
        g = gradients[name]
        expected = before[name] * (1 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8)
        # the batch comes in a drawn order, so sums round differently
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-7), name


def test_dropout_of_a_step_does_not_depend_on_the_steps_before() -> None:
    """A stretch of steps in two calls of fit equals one call."""
    images, labels = knees(4, 1)
    batches = LabelledBatches(images, labels, 2, 6, 5, None)
    states = []
    for cuts in ([range(6)], [range(2), range(2, 6)]):
        network = networks.build_network(TINY, 0)
        optimiser = training.adamw(network.parameters(), 0.01, 0.0)
        for steps in cuts:
            training.fit(
                network,
                optimiser,
                batches,
                lambda n, b, p: {"loss": losses.supervised_loss(n(b[0]), b[1])},
                steps=steps,
                total_steps=6,
                learning_rate=0.01,
                seed=5,
                log=training.TrainingLog(),
            )
        states.append(networks.copy_state(network))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_weights_that_validate_best_are_kept() -> None:
    cases = [case(10), case(11)]
    network = networks.build_network(TINY, 0)
    log = train(network, steps=30, validation=cases, validate_every=4)
    assert [line["step"] for line in log.validation] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert log.best_dice == max(line["dice"] for line in log.validation)
    assert training.validate(network, cases) == log.best_dice
    twin = networks.build_network(TINY, 0)
    train(twin, steps=30)
    replay = networks.build_network(TINY, 0)  # validation leaves no trace in the training
    train(replay, steps=30, validation=cases, validate_every=30)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), replay.parameters(), strict=True))


class _Killed(Exception):
    """Stands for a process that is killed."""


@pytest.mark.parametrize("after", [1, 5, 8])
def test_a_killed_training_goes_on_to_the_same_numbers(after: int, tmp_path: Path) -> None:
    def run(checkpoint: Path | None, stop: int | None = None) -> tuple[networks.State, training.TrainingLog]:
        network = networks.build_network(TINY, 3)
        done = 0

        def count(steps: int, note: str) -> None:
            nonlocal done
            done += steps
            if done == stop:
                raise _Killed

        log = train(
            network,
            steps=9,
            validation=[case(10)],
            validate_every=2,
            augmentation=transforms.augment,
            progress=count,
            checkpoint=checkpoint,
        )
        assert done == 9
        return networks.copy_state(network), log

    whole, log = run(None)
    file = tmp_path / "standing.safetensors"
    with pytest.raises(_Killed):
        run(file, after)
    assert file.is_file() == (after > 2)
    resumed, again = run(file)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert again.steps == log.steps and again.validation == log.validation
    assert (again.best_step, again.best_dice) == (log.best_step, log.best_dice)
    file.write_bytes(file.read_bytes()[:-7])
    afresh, _ = run(file)
    assert all(torch.equal(afresh[name], tensor) for name, tensor in whole.items())


def test_batches_made_ahead_are_the_same_in_the_same_order_and_at_most_one_ahead() -> None:
    made: list[int] = []

    def batch(step: int) -> int:
        made.append(step)
        return 10 * step

    assert training.in_time(batch, range(3, 9), torch.device("cpu")) is batch
    early = training.in_time(batch, range(3, 9), torch.device("cuda"))
    for seen in range(3, 9):
        assert early(seen) == 10 * seen and len(made) <= seen - 3 + 2
    assert made == list(range(3, 9))

    def broken(step: int) -> int:
        if step == 1:
            raise TrainingError("no such volume")
        return step

    early = training.in_time(broken, range(3), torch.device("cuda"))
    assert early(0) == 0
    with pytest.raises(TrainingError, match="no such volume"):
        early(1)


def test_the_share_of_time_waiting_for_data_is_measured() -> None:
    import time

    def slow(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple:
        time.sleep(0.05)
        return images, labels

    log = train(networks.build_network(TINY, 0), steps=4, augmentation=slow)
    assert 0.2 <= log.data_seconds <= log.seconds and log.data_share == log.data_seconds / log.seconds > 0.5


def test_bad_training_input_says_what_to_do() -> None:
    network = networks.build_network(TINY, 0)
    with pytest.raises(TrainingError, match="at least one pair"):
        training.train_supervised(
            network,
            torch.zeros((0, 1, *SHAPE)),
            torch.zeros((0, *SHAPE), dtype=torch.long),
            steps=1,
            batch=1,
            learning_rate=0.1,
            weight_decay=0,
            seed=0,
        )
    images, labels = knees(2, 0)
    images[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="north: the loss is nan at step 0.*learning rate"):
        training.train_supervised(
            network,
            images,
            labels,
            steps=1,
            batch=2,
            learning_rate=0.1,
            weight_decay=0,
            seed=0,
            augmentation=None,
            label="north",
        )
    with pytest.raises(TrainingError, match="no case"):
        training.validate(network, [])
    with pytest.raises(TrainingError, match="no case"):
        training.evaluate_cases(network, [])
    for function in (training.validate, training.evaluate_cases):
        with pytest.raises(TrainingError, match="case 0.*label"):
            function(network, [replace(case(0), label=None, native_label=None)])


def test_prediction_leaves_statistics_modes_and_generator_alone() -> None:
    vnet = networks.build_network(replace(QUICK, architecture="vnet", grid_shape=(16, 16, 16)), 0).train()
    vnet.body.get_submodule("in_tr").eval()
    modes = [m.training for m in vnet.modules()]
    before = networks.copy_state(vnet)
    x = torch.randn(3, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    together = training.predict_probabilities(vnet, x)
    assert torch.equal(together[1], training.predict_probabilities(vnet, x[1]))
    assert torch.allclose(together.sum(1), torch.ones(3, 16, 16, 16)) and not together.is_inference()
    assert all(torch.equal(before[k], v) for k, v in vnet.state_dict().items())
    assert [m.training for m in vnet.modules()] == modes


def test_grid_dice_is_that_of_the_masks_and_skips_what_was_not_drawn() -> None:
    network = networks.build_network(TINY, 0)
    train(network, steps=40)
    full, partial = case(20), case(21, classes=(1, 2))
    scores = training.grid_dice(network, [full, partial])
    predicted = training.predict_probabilities(network, full.image).argmax(0)
    assert full.label is not None
    for c in (1, 2, 3):
        p, t = predicted == c, full.label == c
        assert scores[0, c - 1] == pytest.approx((2 * (p & t).sum() / (p.sum() + t.sum())).item())
    assert np.isnan(scores[1, 2]) and not np.isnan(scores[1, :2]).any()
    by_hand = np.mean([scores[:, 0].mean(), scores[:, 1].mean(), scores[0, 2]])
    assert training.mean_dice(scores) == pytest.approx(by_hand)
    assert np.isnan(training.mean_dice(np.full((2, 3), np.nan)))
    assert training.is_better(0.1, float("nan")) and not training.is_better(float("nan"), 0.1)
    assert not training.is_better(0.1, 0.1) and not training.is_better(float("nan"), float("nan"))


def test_evaluation_happens_on_the_native_grid_in_mm() -> None:
    """A volume stored flipped, permuted and twice as fine gets the metrics of the grid map carried over."""
    network = networks.build_network(TINY, 0)
    train(network, steps=40)
    plain = case(30)
    table = training.evaluate_cases(network, [plain])
    assert list(table["components"]) == ["all", "largest"] * 3 and set(table["case"]) == {"case 30"}
    predicted = training.predict_probabilities(network, plain.image).argmax(0).numpy().astype(np.uint8)
    assert plain.native_label is not None
    expected = metrics.case_metrics(predicted, plain.native_label, TINY.grid_spacing_mm, components=("all", "largest"))
    for row, want in zip(table.to_dict("records"), expected, strict=True):
        assert {k: row[k] for k in want} == pytest.approx(want, nan_ok=True)
    # the same knee as a file in LPS order with its axes permuted
    turned = np.ascontiguousarray(plain.native_label.transpose(2, 0, 1)[:, ::-1, ::-1])
    d, h, w = SHAPE
    sd, sh, sw = TINY.grid_spacing_mm
    affine = np.array([[0, -sd, 0, sd * (d - 1)], [0, 0, -sh, sh * (h - 1)], [sw, 0, 0, 0], [0, 0, 0, 1]], dtype=float)
    other = replace(plain, native_label=turned, native_shape=(w, d, h), native_affine=affine)
    pairs = zip(table.to_dict("records"), training.evaluate_cases(network, [other]).to_dict("records"), strict=True)
    for a, b in pairs:
        assert a == pytest.approx(b, nan_ok=True)
