"""Statistics: intervals against closed forms and SciPy, pairing, and what a target costs, by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_utils import statistics


@dataclass
class Run:
    """A run by hand."""

    row: str = "x"
    setting: str = "near"
    seed: int = 0
    test: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def test_frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.test)

    def history_frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.history)


def runs(table: np.ndarray, setting: str = "near", classes: int = 1) -> list[Run]:
    """A run per line, a case per column; the classes scatter round the value."""
    out = []
    for seed, values in enumerate(table):
        test = []
        for case, value in enumerate(values):
            for c in range(classes):
                shift = 0.01 * (c - (classes - 1) / 2)
                line = {"client": f"client_{case % 2}", "case": f"k{case}", "class": c + 1, "dice": value + shift}
                test += [line | {"components": "all"}, line | {"components": "largest", "dice": -5.0}]
        out.append(Run(setting=setting, seed=seed, test=test))
    return out


def test_one_seed_is_scipys_bootstrap_over_subjects_and_one_subject_that_over_seeds() -> None:
    values = np.random.default_rng(3).normal(0.1, 0.05, 40)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = expected.high - expected.low
    for table in (values[None], values[:, None]):
        found = statistics.bootstrap_interval(table, resamples=50_000)
        assert found.mean == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02 * width)
        assert (found.seeds, found.subjects) == table.shape


def test_crossed_spread_is_its_closed_form() -> None:
    """Of seed + subject effects the resampled mean has the variance var/S + var/N, and is close to normal."""
    rng = np.random.default_rng(5)
    by_seed, by_subject = rng.normal(0, 0.03, 30), rng.normal(0, 0.06, 32)
    table = 0.02 + by_seed[:, None] + by_subject[None]
    found = statistics.bootstrap_interval(table, resamples=60_000)
    sigma = np.sqrt(by_seed.var() / 30 + by_subject.var() / 32)
    half = 1.96 * sigma
    assert (found.low, found.high) == pytest.approx((table.mean() - half, table.mean() + half), abs=0.04 * half)


def test_the_spread_of_subjects_does_not_vanish_with_more_seeds() -> None:
    """Subjects drawn anew for every seed would shrink it by the root of the number of seeds."""
    by_subject = np.random.default_rng(0).normal(0, 1, 25)
    one = statistics.bootstrap_interval(by_subject[None])
    many = statistics.bootstrap_interval(np.tile(by_subject, (5, 1)))
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000), st.floats(-1, 1))
def test_intervals_hold_their_mean_move_with_the_data_and_turn_with_its_sign(
    seeds: int, subjects: int, draw: int, shift: float
) -> None:
    table = np.random.default_rng(draw).normal(0, 0.1, (seeds, subjects))
    found = statistics.bootstrap_interval(table, resamples=500)
    assert found.low - 1e-9 <= found.high and table.min() - 1e-9 <= found.low and found.high <= table.max() + 1e-9
    moved = statistics.bootstrap_interval(table + shift, resamples=500)
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift), abs=1e-9)
    turned = statistics.bootstrap_interval(-table, resamples=500)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    same = statistics.bootstrap_interval(np.full((seeds, subjects), 0.25))
    assert same.low == pytest.approx(0.25) and same.high == pytest.approx(0.25) and same.excludes_zero


def test_missing_numbers_are_left_out_and_nothing_is_refused() -> None:
    table = np.array([[0.1, np.nan, 0.3], [0.2, np.nan, 0.4]])
    found = statistics.bootstrap_interval(table)
    assert found.mean == pytest.approx(0.25) and 0.1 <= found.low < found.high <= 0.4
    with pytest.raises(ValueError, match="nothing to compare"):
        statistics.bootstrap_interval(np.full((2, 2), np.nan))


def test_a_difference_is_paired_by_seed_and_subject() -> None:
    """Hard and easy cases cancel: what is left is the constant advantage."""
    base = np.random.default_rng(1).uniform(0.2, 0.9, (5, 8))
    found = statistics.difference(runs(base + 0.05, classes=3)[::-1], runs(base, classes=3))
    assert (found.mean, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05), abs=1e-9)
    assert found.excludes_zero and str(found) == "+0.050 [+0.050, +0.050]" and (found.seeds, found.subjects) == (5, 8)
    one = statistics.score_table(runs(base, classes=3), classes=[1])
    assert one.to_numpy().mean() == pytest.approx(base.mean() - 0.01)


def test_two_settings_are_the_same_subjects_once() -> None:
    near, far = np.full((2, 4), 0.1), np.full((2, 4), -0.3)
    both = statistics.difference(
        [*runs(near), *runs(far, "far")], [*runs(np.zeros((2, 4))), *runs(np.zeros((2, 4)), "far")]
    )
    assert both.mean == pytest.approx(-0.1) and both.subjects == 4
    with pytest.raises(ValueError, match="do not have the same cases and settings"):
        statistics.score_table([*runs(near), *runs(far, "far")[:1]])


def test_what_is_not_paired_is_refused() -> None:
    table = np.full((3, 4), 0.5)
    with pytest.raises(ValueError, match="Only pairs can be compared"):
        statistics.difference(runs(table), runs(table[:2]))
    with pytest.raises(ValueError, match="Only pairs can be compared"):
        statistics.difference(runs(table), runs(table[:, :3]))
    with pytest.raises(ValueError, match="run the row first"):
        statistics.difference([], runs(table))


def test_the_table_subtracts_every_row_from_one() -> None:
    base = np.random.default_rng(2).uniform(0.4, 0.6, (5, 6))
    table = statistics.difference_table(
        {"dual_kd": runs(base), "fedavg": runs(base - 0.1), "uamt": runs(base + 0.2)}, "dual_kd"
    )
    assert list(table["row"]) == ["fedavg", "uamt"] and list(table["seeds"]) == [5, 5]
    assert list(table["difference"]) == pytest.approx([0.1, -0.2])
    assert list(table["dice"]) == pytest.approx([base.mean() - 0.1, base.mean() + 0.2])


def test_an_effect_is_the_variant_minus_its_row_over_the_seeds_that_both_have() -> None:
    rng = np.random.default_rng(8)
    plain, variant = rng.normal(0.7, 0.02, (3, 6)), rng.normal(0.8, 0.02, (2, 6))
    table = statistics.effect_table({"x wider_2": runs(variant)}, {"x": runs(plain), "y": runs(plain)})
    (line,) = table.to_dict("records")
    expected = statistics.bootstrap_interval(variant - plain[:2])
    assert line["row"] == "x wider_2" and line["seeds"] == 2 and line["dice"] == pytest.approx(variant.mean())
    interval = (expected.mean, expected.low, expected.high)  # of the same draws, for cases in another order
    assert (line["difference"], line["low"], line["high"]) == pytest.approx(interval, abs=5e-4)
    backwards = statistics.difference_table({"x": runs(variant), "y": runs(plain[:2])}, "x").iloc[0]
    assert line["difference"] == pytest.approx(backwards["difference"])  # the same, asked the other way round
    with pytest.raises(ValueError, match="run the row 'z'"):
        statistics.effect_table({"z wider_2": runs(variant)}, {"x": runs(plain)})
    other = [Run(seed=7, test=runs(variant)[0].test)]
    with pytest.raises(ValueError, match="no seed in common"):
        statistics.effect_table({"x wider_2": other}, {"x": runs(plain)})


def timed(dice: list[float], seconds: float, teacher: float = 0.0) -> Run:
    history = [
        {
            "round": r,
            "client": c,
            "validation": d + (0.1 if c == "b" else -0.1),
            "cpu_seconds": seconds * (1 + (c == "b")),
        }
        | ({"teacher_cpu_seconds": teacher if r == 1 else 0.0} if teacher else {})
        for r, d in enumerate(dice, 1)
        for c in ("a", "b")
    ]
    messages = [{"round": 0, "bytes": 4_000_000}]
    messages += [{"round": r, "bytes": 1_000_000} for r in range(1, len(dice) + 1) for _ in range(2)]
    return Run(history=history, messages=messages)


def test_seconds_are_those_of_the_slowest_client_and_bytes_those_of_all() -> None:
    course = statistics.course_of(timed([0.3, 0.6, 0.5], 2.0, teacher=1.5))
    assert list(course["dice"]) == pytest.approx([0.3, 0.6, 0.5])
    assert list(course["seconds"]) == pytest.approx([5.5, 9.5, 13.5]) and list(course["mb"]) == [6.0, 8.0, 10.0]
    assert statistics.reach(timed([0.3, 0.6, 0.5], 2.0), 0.55) == statistics.Reach(2, 8.0, 8.0)
    assert statistics.reach(timed([0.3, 0.6, 0.5], 2.0), 0.7) is None
    untrained = Run(
        history=[{"round": 0, "client": c, "validation": 0.4} for c in "ab"], messages=[{"round": 0, "bytes": 10**6}]
    )
    assert statistics.reach(untrained, 0.4) == statistics.Reach(0, 0.0, 1.0)


def test_who_chooses_a_round_alone_has_the_dice_of_the_models_so_far() -> None:
    """One client is best in round 1 and one in round 2: together they have a Dice that no single round has."""
    values = {"a": [0.8, 0.2], "b": [0.3, 0.6]}
    history = [
        {"round": r + 1, "client": c, "validation": values[c][r], "cpu_seconds": 1.0} for c in "ab" for r in (0, 1)
    ]
    shared, alone = (Run(row=row, history=history, messages=[]) for row in ("dual_kd", "local_uamt"))
    assert list(statistics.course_of(shared)["dice"]) == pytest.approx([0.55, 0.4])
    assert list(statistics.course_of(alone)["dice"]) == pytest.approx([0.55, 0.7])
    assert statistics.final_dice([shared]) == pytest.approx(0.55)
    assert statistics.final_dice([alone]) == pytest.approx(0.7)
    assert statistics.reach(alone, 0.7) == statistics.Reach(2, 2.0, 0.0)


def test_a_rival_is_timed_by_what_each_of_its_runs_reaches() -> None:
    runs = [timed([0.2, 0.8], 2.0), replace(timed([0.9, 0.5], 2.0), seed=1)]
    table = statistics.reach_table({"rival": runs}, statistics.final_dice(runs)).set_index("row")
    assert table.loc["rival", "reached"] == 1 and np.isinf(table.loc["rival", "seconds"])  # of its mean, not all are
    ours = [
        timed([0.86], 1.0),
        replace(timed([0.7, 0.86], 1.0), seed=1),
    ]  # to 0.85, the mean of 0.8 and 0.9: one round and two
    own = [statistics.reach(run, statistics.final_dice([run])) for run in runs]  # after two rounds and after one
    assert [there.round for there in own if there is not None] == [2, 1]
    assert statistics.reach_ratios(ours, runs, "round") == [0.5, 2.0]
    assert statistics.reach_ratios(ours, runs, "seconds") == [
        statistics.course_of(ours[0])["seconds"][0] / statistics.course_of(runs[0])["seconds"][1],
        statistics.course_of(ours[1])["seconds"][1] / statistics.course_of(runs[1])["seconds"][0],
    ]
    assert statistics.reach_ratios([timed([0.1], 1.0), ours[1]], runs, "mb")[0] == math.inf
    free = Run(history=[{"round": 0, "client": "a", "validation": 0.4}], messages=[])
    assert statistics.reach_ratios([free], [free], "mb") == [math.inf]  # the rival sends nothing: no share of it
    for other in (runs[:1], runs[::-1]):
        with pytest.raises(ValueError, match="bring the same ones"):
            statistics.reach_ratios(ours, other, "mb")


def test_the_target_is_the_best_rivals_chosen_round_on_validation() -> None:
    results = {
        "dual_kd": [timed([0.5, 0.8], 3.0), timed([0.6, 0.7], 3.0)],
        "fedavg": [timed([0.2, 0.55, 0.5], 2.0), timed([0.2, 0.65, 0.3], 2.0)],
        "uamt": [timed([0.1, 0.2], 2.0)],
    }
    assert statistics.best_rival(results, ["uamt", "fedavg"]) == "fedavg"
    target = statistics.final_dice(results["fedavg"])
    assert target == pytest.approx(0.6)
    table = statistics.reach_table(results, target - 1e-9).set_index("row")
    assert list(table["reached"]) == [2, 1, 0] and list(table["runs"]) == [2, 2, 1]
    assert table.loc["dual_kd", "round"] == 1.5 and table.loc["dual_kd", "seconds"] == 9.0
    assert np.isinf(table.loc["fedavg", "mb"]), "one of two runs never gets there"
    assert np.isinf(table.loc["uamt", "seconds"])


def test_a_class_that_one_side_misses_is_left_out_on_both() -> None:
    def run(hd: dict[int, float | None]) -> Run:
        test = [
            {"client": "a", "case": "x", "class": c, "components": "all", "hd95_mm": np.nan if v is None else v}
            for c, v in hd.items()
        ]
        return Run(test=test)

    one, other = run({1: 1.0, 2: 2.0, 3: None}), run({1: 2.0, 2: 4.0, 3: 30.0})
    assert statistics.difference([one], [other], metric="hd95_mm").mean == pytest.approx(-1.5)
