"""Privacy: masks that cancel to the last bit, noise by its moments, epsilon between an exact value and a bound."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import kstest, norm
from test_federation import SITES, TINY, equal, run, state

from fedkd_utils import disclosure, federation, losses, networks, server
from fedkd_utils.clients import FederationError, Update
from fedkd_utils.networks import CheckpointError
from fedkd_utils.teacher import RELEASE

NAMES = ("north", "east", "south", "west")


# --- membership -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_auc_is_the_share_of_pairs(members: list[int], others: list[int]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    assert disclosure.auc(members, others) == pytest.approx(sum(pairs) / len(pairs))


def test_an_auc_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="one member and one other"):
        disclosure.auc([], [1.0])


def test_case_losses_are_the_losses_of_single_volumes_and_leave_the_network_as_it_was() -> None:
    network = networks.build_network(TINY, 0).train()
    images, labels = SITES[0].labelled_images, SITES[0].labels
    found = disclosure.case_losses(network, images, labels)
    assert network.training
    network.eval()
    each = [losses.supervised_loss(network(images[[i]]), labels[[i]]).item() for i in range(len(images))]
    assert found.tolist() == pytest.approx(each, rel=1e-5)


# --- secure aggregation -----------------------------------------------------------------------------------------


def drawn(seed: int, size: int = 200) -> torch.Tensor:
    return 10 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def masked(seeds: dict[str, dict[str, int]], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (disclosure.to_fixed(x, len(seeds)) + disclosure.mask_of(name, seeds[name], len(x))) % disclosure.MODULUS
        for name, x in values.items()
    }


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 1000))
def test_masks_cancel_exactly(count: int, seed: int) -> None:
    names = [f"h{k}" for k in range(count)]
    seeds = disclosure.pair_seeds(names, seed, 1)
    total = sum(disclosure.mask_of(name, seeds[name], 50) for name in names)
    assert bool((total % disclosure.MODULUS == 0).all())


def test_the_sum_is_exact_in_fixed_point_and_within_half_a_step_of_each_number() -> None:
    values = {name: drawn(k) for k, name in enumerate(NAMES)}
    found = disclosure.unmasked_sum(masked(disclosure.pair_seeds(NAMES, 0, 1), values))
    integers = sum((x.double() * 2**20).round() for x in values.values())  # no masks, no modulus
    assert torch.equal(found, integers / 2**20)
    assert float((found - sum(x.double() for x in values.values())).abs().max()) <= len(NAMES) * 2**-21


def test_one_message_says_nothing_and_another_round_or_pair_has_another_mask() -> None:
    seeds = disclosure.pair_seeds(NAMES, 0, 1)
    message = masked(seeds, {"north": torch.zeros(20_000)})["north"]
    assert kstest(message.numpy() / disclosure.MODULUS, "uniform").pvalue > 0.001
    other = disclosure.mask_of("north", disclosure.pair_seeds(NAMES, 0, 2)["north"], 20_000)
    assert abs(np.corrcoef(message, other)[0, 1]) < 0.03
    assert all(seeds[a][b] == seeds[b][a] for a in NAMES for b in NAMES if a != b)
    assert len({seeds[a][b] for a in NAMES for b in NAMES if a < b}) == 6


def test_who_drops_out_leaves_noise_until_the_others_hand_over_their_secrets() -> None:
    values = {name: drawn(k) for k, name in enumerate(NAMES)}
    seeds = disclosure.pair_seeds(NAMES, 0, 1)
    messages = masked(seeds, values)
    del messages["south"], messages["east"]
    truth = values["north"].double() + values["west"].double()
    assert float((disclosure.unmasked_sum(messages) - truth).abs().median()) > 100
    shared = {gone: {name: seeds[name][gone] for name in messages} for gone in ("south", "east")}
    assert torch.allclose(disclosure.unmasked_sum(messages, shared), truth, atol=2**-20)
    del shared["south"]["north"]  # one secret is missing
    assert float((disclosure.unmasked_sum(messages, shared) - truth).abs().median()) > 100


def test_numbers_that_do_not_fit_are_refused() -> None:
    largest = (2**31 - 4) / (2**20 * 4)
    whole = {name: torch.full((3,), largest, dtype=torch.float64) for name in NAMES}
    seeds = disclosure.pair_seeds(NAMES, 0, 1)
    for sign in (1, -1):  # the farthest sums do not wrap round
        found = disclosure.unmasked_sum(masked(seeds, {name: sign * x for name, x in whole.items()}))
        assert torch.allclose(found, torch.full((3,), sign * 4 * largest, dtype=torch.float64), atol=1e-5)
    for bad in (largest * 1.01, float("nan"), float("-inf")):
        with pytest.raises(ValueError, match="must lie within .* for 4 parties"):
            disclosure.to_fixed(torch.tensor([0.0, bad], dtype=torch.float64), 4)


# --- clip and noise ---------------------------------------------------------------------------------------------


def test_a_change_is_shortened_and_not_turned() -> None:
    change = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]]), "count": torch.tensor(7)}
    short = server.clipped(change, 1.0)
    assert short["a"].tolist() == pytest.approx([0.6, 0.0]) and short["b"].item() == pytest.approx(0.8)
    assert "count" not in short
    assert equal(server.clipped(change, 5.0), {"a": change["a"], "b": change["b"]})
    assert server.clipped({"a": torch.zeros(2)}, 1.0)["a"].tolist() == [0.0, 0.0]


def updates(*values: tuple[float, float]) -> list[Update]:
    return [Update(f"c{i}", state(*v, count=i + 5), 1, {}) for i, v in enumerate(values)]


def test_without_noise_and_with_a_wide_clip_it_is_the_plain_mean() -> None:
    start, given_ = state(0.5, 0.5), updates((1.0, 2.0), (3.0, -2.0), (2.0, 6.0))
    found = server.private_step(start, given_, 1e6, 0.0, torch.Generator())
    assert torch.allclose(found["w"], server.aggregate(given_)["w"])
    assert found["steps"].item() == start["steps"].item()  # a counter of the clients does not get through
    again = server.private_step(start, given_[::-1], 1e6, 0.0, torch.Generator())
    assert equal(found, again)


def test_one_client_moves_the_average_by_no_more_than_the_norm_over_the_count() -> None:
    start, calm = state(0.0, 0.0), updates((0.1, 0.0), (0.0, 0.1))
    means = [
        server.private_step(start, [*calm, Update("wild", state(x, -x), 1, {})], 0.5, 0.0, torch.Generator())["w"]
        for x in (1e4, 0.0)
    ]
    assert float((means[0] - means[1]).norm()) <= 0.5 / 3 * 1.0001


def test_the_noise_has_the_moments_it_should() -> None:
    start = {"w": torch.zeros(200_000)}
    given_ = [Update(name, {"w": torch.zeros(200_000)}, 1, {}) for name in NAMES]
    noise = server.private_step(start, given_, 2.0, 3.0, torch.Generator().manual_seed(1))["w"]
    assert noise.std().item() == pytest.approx(3.0 * 2.0 / 4, rel=0.01) and abs(noise.mean().item()) < 0.02
    assert kstest(noise.numpy(), norm(scale=1.5).cdf).pvalue > 0.001
    same = server.private_step(start, given_, 2.0, 3.0, torch.Generator().manual_seed(1))["w"]
    assert torch.equal(noise, same)


def test_bad_updates_and_numbers_are_refused() -> None:
    start, good = state(0, 0), updates((1.0, 2.0))
    for bad, kind in (
        (Update("x", state(1, float("nan")), 1, {}), CheckpointError),
        (Update("x", state(1, 2, 3), 1, {}), CheckpointError),
        (Update("c0", state(1, 2), 1, {}), FederationError),
    ):
        with pytest.raises(kind):
            server.private_step(start, [*good, bad], 1.0, 1.0, torch.Generator())
    for clip, noise in ((0.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="clip_norm must be above 0"):
            server.private_step(start, good, clip, noise, torch.Generator())


def test_a_federation_with_noise_repeats_itself_and_noise_has_its_price() -> None:
    plain = run("fedavg", settings=replace(TINY, clip_norm=1e6))
    noisy = [run("fedavg", settings=replace(TINY, clip_norm=1.0, noise_multiplier=z)) for z in (1.0, 1.0, 1e-6)]
    assert equal(noisy[0].models["south"], noisy[1].models["south"])
    last = [result.history.groupby("round")["loss"].mean().iloc[-1] for result in (plain, noisy[0])]
    assert last[1] > last[0]
    short = run("fedavg", settings=replace(TINY, clip_norm=1.0))
    assert all(torch.allclose(t, short.models["south"][n], atol=1e-3) for n, t in noisy[2].models["south"].items())


@pytest.mark.parametrize(
    ("row", "changes", "update", "words"),
    [
        ("local_only", {"clip_norm": 1.0}, federation.FROZEN, "sends no update"),
        ("fedavg", {"noise_multiplier": 1.0}, federation.FROZEN, "noise_multiplier needs clip_norm"),
        ("ssfl_published", {"clip_norm": 1.0}, federation.FROZEN, "does not reach: groups"),
        ("dual_kd", {"clip_norm": 1.0}, RELEASE, "does not reach"),
    ],
)
def test_a_promise_that_would_not_hold_is_refused(row, changes, update, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FederationError, match=words):
        run(row, settings=replace(TINY, **changes), teacher_update=update)


def test_noise_is_refused_where_a_client_draws_only_some_classes() -> None:
    partial = replace(SITES[0], volume_classes=((1, 2, 3), (1,)), labelled_classes=(1, 2, 3))
    with pytest.raises(FederationError, match="client south does not draw every class"):
        run("fedavg", sites=[partial, *SITES[1:]], settings=replace(TINY, clip_norm=1.0))


# --- accounting -------------------------------------------------------------------------------------------------


def exact_epsilon(noise: float, rounds: int, delta: float) -> float:
    """Without sampling T Gaussian rounds are one of noise z / sqrt(T), whose curve is exact.

    (Balle and Wang, ICML 2018, arXiv 1805.06530, theorem 8.)
    """
    mu = math.sqrt(rounds) / noise

    def excess(epsilon: float) -> float:
        tail = math.exp(min(epsilon + norm.logcdf(-mu / 2 - epsilon / mu), 0.0))
        return float(norm.cdf(mu / 2 - epsilon / mu) - tail - delta)

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-12))


@pytest.mark.parametrize("noise", [0.05, 0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("rounds", [1, 12, 100])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_epsilon_lies_between_the_exact_value_and_the_textbook_bound(noise: float, rounds: int, delta: float) -> None:
    found = disclosure.epsilon(noise, rounds, delta)
    exact = exact_epsilon(noise, rounds, delta)
    rho = rounds / (2 * noise**2)  # Bun and Steinke, arXiv 1605.02065, proposition 1.3
    assert exact <= found * (1 + 1e-6)
    assert found <= (rho + 2 * math.sqrt(rho * math.log(1 / delta))) * 1.001
    assert found <= 1.35 * exact + 0.1


def test_epsilon_at_one_round_without_sampling_by_hand() -> None:
    """Renyi divergence a / (2 z^2), turned into (epsilon, delta) and minimised by brute force."""
    orders = np.linspace(1.001, 200, 400_000)
    by_hand = orders / 2 + np.log1p(-1 / orders) - (np.log(1e-5) + np.log(orders)) / (orders - 1)
    assert disclosure.epsilon(1.0, 1, 1e-5) == pytest.approx(by_hand.min(), rel=1e-4)


@pytest.mark.parametrize("noise", [0.001, 0.01, 100.0])
def test_very_little_and_very_much_noise_find_their_order(noise: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Opacus warns when the best order is the first or the last
        found = disclosure.epsilon(noise, 6, 1e-2)
    assert exact_epsilon(noise, 6, 1e-2) <= found * (1 + 1e-6)


def test_epsilon_falls_with_noise_and_sampling_and_grows_with_rounds() -> None:
    base = disclosure.epsilon(1.0, 10, 1e-5)
    assert disclosure.epsilon(2.0, 10, 1e-5) < base < disclosure.epsilon(1.0, 11, 1e-5)
    assert disclosure.epsilon(1.0, 10, 1e-5, sample_rate=0.01) < base / 5
    assert disclosure.epsilon(1.0, 10, 1e-3) < base
    # a sample rate near 1 tends to no sampling
    assert disclosure.epsilon(1.0, 10, 1e-5, sample_rate=0.9999) == pytest.approx(base, rel=0.02)


@pytest.mark.parametrize(
    "bad", [(0.0, 1, 1e-5), (1.0, 0, 1e-5), (1.0, 1, 0.0), (1.0, 1, 1.0), (1.0, 1, 0.1, 0.0), (1.0, 1, 0.1, 1.1)]
)
def test_epsilon_refuses_what_is_out_of_range(bad: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="epsilon needs"):
        disclosure.epsilon(*bad)  # type: ignore[arg-type]
