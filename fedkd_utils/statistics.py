"""Honest comparisons: paired differences with bootstrap intervals, and what a target costs in seconds and bytes.

Every row is run with the same seeds on the same test subjects, so differences are paired by both. Seeds and subjects
are crossed: the same subjects are scanned in every seed. A resample therefore draws seeds, then subjects, once for all
drawn seeds (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007); drawing subjects anew for every
seed would count one difficult knee as often as there are seeds. Intervals are percentiles. With five seeds they are a
little too narrow in what concerns seeds: read an end close to zero as undecided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedkd_utils.methods import ROWS

#: Resamples behind an interval: its ends move by less than a hundredth of its width from one draw to another.
RESAMPLES = 10_000


class Measured(Protocol):
    """What is compared: a run of a row, from memory or from a file."""

    @property
    def row(self) -> str: ...
    @property
    def setting(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def messages(self) -> list[dict[str, Any]]: ...
    def test_frame(self) -> pd.DataFrame:
        """Per client, case, class and component choice: the metrics."""
        ...

    def history_frame(self) -> pd.DataFrame:
        """Per round and client: validation Dice and seconds."""
        ...


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float
    seeds: int
    subjects: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def bootstrap_interval(
    values: NDArray[np.float64], confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of a (seeds, subjects) table and its percentile interval; NaN is left out.

    One seed or one subject: that axis adds no spread, and the interval says nothing about it.

    Raises:
        ValueError: no number in the table.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError("There is nothing to compare: no seed and subject has a number on both sides.")
    rng, (seeds, subjects) = np.random.default_rng(seed), values.shape
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)  # how often each is drawn
    drawn_subjects = rng.multinomial(subjects, np.full(subjects, 1 / subjects), resamples)
    sums = ((drawn_seeds @ np.where(known, values, 0.0)) * drawn_subjects).sum(axis=1)
    counts = ((drawn_seeds @ known.astype(np.float64)) * drawn_subjects).sum(axis=1)
    means = sums[counts > 0] / counts[counts > 0]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values[known].mean()), float(low), float(high), seeds, subjects)


def score_table(
    results: Iterable[Measured], metric: str = "dice", components: str = "all", classes: Sequence[int] | None = None
) -> pd.DataFrame:
    """One line per seed and one column per (client, case): the mean over classes, and over settings when several.

    The cases of two settings are the same subjects on other scanners, so their mean is taken before anything is drawn.

    Raises:
        ValueError: no result, or one seed that is there more often than another, or with other cases.
    """
    return _by_case(_values(results, metric, components, classes))


def _values(results: Iterable[Measured], metric: str, components: str, classes: Sequence[int] | None) -> pd.Series:
    """The metric by seed, setting, client, case and class."""
    frames = []
    for result in results:
        frame = result.test_frame()
        frame = frame[frame["components"] == components]
        if classes is not None:
            frame = frame[frame["class"].isin(classes)]
        frames.append(frame.assign(seed=result.seed, setting=result.setting))
    if not frames:
        raise ValueError("No result to compare: run the row first.")
    table = pd.concat(frames)
    counts = table.groupby(["seed", "client", "case"]).size().unstack("seed")
    if counts.isna().any(axis=None) or counts.to_numpy().min() != counts.to_numpy().max():
        raise ValueError("Seeds do not have the same cases and settings: finish the runs, or leave a seed out.")
    return table.set_index(["seed", "setting", "client", "case", "class"])[metric].sort_index()


def _by_case(values: pd.Series) -> pd.DataFrame:
    """Means over classes, then over settings, NaN left out: a line per seed, a column per client and case."""
    cases = values.groupby(["seed", "setting", "client", "case"]).mean()
    return cases.groupby(["seed", "client", "case"]).mean().unstack(["client", "case"]).sort_index(axis=1)


def difference(one: Iterable[Measured], other: Iterable[Measured], **options: object) -> Interval:
    """one - other, paired by seed, subject and class; ``options`` as for :func:`score_table`.

    A class that one side misses has no distance there, so it is left out on both.

    Raises:
        ValueError: the two sides do not have the same seeds and subjects.
    """
    chosen = {"metric": "dice", "components": "all", "classes": None} | options
    a, b = _values(one, **chosen), _values(other, **chosen)  # type: ignore[arg-type]
    if not a.index.equals(b.index):
        sides = [f"seeds {sorted(set(side.index.get_level_values('seed')))} and {len(side)} values" for side in (a, b)]
        raise ValueError(f"Only pairs can be compared: there {sides[0]}, here {sides[1]}. Run what is missing.")
    return bootstrap_interval(_by_case(a - b).to_numpy(np.float64))


def difference_table(
    results: Mapping[str, Sequence[Measured]], against: str, metric: str = "dice", components: str = "all"
) -> pd.DataFrame:
    """One line per name, but for ``against``: ``against`` minus it, its interval, and its own mean."""
    lines = []
    for name, runs in results.items():
        if name != against:
            found = difference(results[against], runs, metric=metric, components=components)
            facts = {"difference": found.mean, "low": found.low, "high": found.high}
            lines.append({"row": name, metric: mean_score(runs, metric, components), **facts, "seeds": found.seeds})
    return pd.DataFrame(lines, columns=["row", metric, "difference", "low", "high", "seeds"])


def effect_table(variants: Mapping[str, Sequence[Measured]], rows: Mapping[str, Sequence[Measured]]) -> pd.DataFrame:
    """One line per variant of a row, named "row what differs": it minus the row as it is, and its own mean Dice.

    Pairs are formed over the seeds that both have; ``rows`` holds the rows as they are.

    Raises:
        ValueError: a row is not there, has no seed in common with its variant, or was tested on other knees.
    """
    lines = []
    for name, runs in variants.items():
        row = name.partition(" ")[0]
        if row not in rows:
            raise ValueError(f"{name!r} has nothing to be compared with: run the row {row!r} as it is.")
        seeds = {run.seed for run in runs} & {run.seed for run in rows[row]}
        if not seeds:
            raise ValueError(f"{name!r} and {row!r} have no seed in common: run what is missing.")
        own, plain = ([run for run in side if run.seed in seeds] for side in (runs, rows[row]))
        found = difference(own, plain)
        facts = {"difference": found.mean, "low": found.low, "high": found.high, "seeds": found.seeds}
        lines.append({"row": name, "dice": mean_score(own), **facts})
    return pd.DataFrame(lines, columns=["row", "dice", "difference", "low", "high", "seeds"])


def mean_score(results: Iterable[Measured], metric: str = "dice", components: str = "all") -> float:
    """The mean of :func:`score_table`, NaN left out."""
    return float(np.nanmean(score_table(results, metric, components).to_numpy(np.float64)))


def course_of(result: Measured) -> pd.DataFrame:
    """One line per round: mean validation Dice over clients, seconds and MB (10^6 bytes) since the start.

    Where each client has a model of its own, of the round that it liked best, Dice is that of the models so far.
    Seconds are those of a processor core, so that it does not matter what else a machine did. Clients train side by
    side in a federation, so a round lasts as long as its slowest client; looking at unlabelled volumes with the
    teacher counts in the round where it happens, pretraining the teacher at the repository does not count. MB are
    those of all clients in both directions, the first messages included. Round 0 is before training.
    """
    history = result.history_frame()
    rounds, when = np.unique(history["round"].to_numpy(), return_inverse=True)
    clients, who = np.unique(history["client"].to_numpy(str), return_inverse=True)
    dice, seconds = np.full((len(rounds), len(clients)), np.nan), np.zeros((len(rounds), len(clients)))
    dice[when, who] = history["validation"]
    for name in ("cpu_seconds", "teacher_cpu_seconds"):
        if name in history:
            seconds[when, who] += np.nan_to_num(history[name].to_numpy(np.float64))
    if result.row in ROWS and not ROWS[result.row].shares_model:
        dice = np.fmax.accumulate(dice, axis=0)
    sent = np.zeros(int(rounds[-1]) + 1)
    for message in result.messages:
        if message["round"] < len(sent):
            sent[message["round"]] += message["bytes"]
    columns = {"dice": np.nanmean(dice, axis=1), "seconds": seconds.max(axis=1).cumsum()}
    return pd.DataFrame({"round": rounds, **columns, "mb": sent.cumsum()[rounds] / 1e6})


@dataclass(frozen=True)
class Reach:
    """When a validation Dice was first reached: round, seconds and MB since the start."""

    round: int
    seconds: float
    mb: float


def reach(result: Measured, target: float) -> Reach | None:
    """When a run first has a mean validation Dice of ``target``; None when it never has."""
    course = course_of(result)
    there = course[course["dice"] >= target]
    if there.empty:
        return None
    first = there.iloc[0]
    return Reach(int(first["round"]), float(first["seconds"]), float(first["mb"]))


def final_dice(results: Iterable[Measured]) -> float:
    """The mean over runs of the validation Dice of the chosen models: the highest of :func:`course_of`."""
    return float(np.mean([course_of(result)["dice"].max() for result in results]))


def reach_ratios(runs: Sequence[Measured], rival: Sequence[Measured], what: str) -> list[float]:
    """What a run takes to the rival's final Dice over what the rival's run of the same seed takes to its own.

    Args:
        runs: one a seed.
        rival: of the same seeds in the same order; the Dice to reach is the mean over all of them.
        what: "round", "seconds" or "mb".

    Returns: by seed; infinite where the Dice is never reached, or where it costs the rival nothing.

    Raises:
        ValueError: other seeds, or in another order.
    """
    seeds, others = [run.seed for run in runs], [run.seed for run in rival]
    if seeds != others:
        raise ValueError(f"Runs of seeds {seeds} cannot be held against those of seeds {others}: bring the same ones.")
    target, found = final_dice(rival), []
    for run, other in zip(runs, rival, strict=True):
        there, own = reach(run, target), course_of(other)
        cost = float(own[what][own["dice"].idxmax()])
        found.append(math.inf if there is None or cost == 0 else getattr(there, what) / cost)
    return found


def best_rival(results: Mapping[str, Sequence[Measured]], rivals: Iterable[str]) -> str:
    """The rival with the highest :func:`final_dice`: chosen on validation, never on test."""
    return max(rivals, key=lambda name: final_dice(results[name]))


def reach_table(results: Mapping[str, Sequence[Measured]], target: float) -> pd.DataFrame:
    """One line per row: in how many runs the target is reached, and the median round, seconds and MB.

    A run that does not reach it takes longer than any that does: the median is infinite when half of them do not.
    """
    lines = []
    for name, runs in results.items():
        found = [reach(result, target) for result in runs]
        medians = {
            what: float(np.median([math.inf if there is None else getattr(there, what) for there in found]))
            for what in ("round", "seconds", "mb")
        }
        lines.append({"row": name, "reached": sum(there is not None for there in found), "runs": len(runs), **medians})
    return pd.DataFrame(lines)
