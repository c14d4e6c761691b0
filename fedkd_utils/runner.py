"""The runner: grids point by point into ``data/results``, safe to stop any moment; and the learning rates of rows."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkd_utils import cohorts, experiments, grids, records, shares, statistics
from fedkd_utils.device import compute_device, device_title
from fedkd_utils.errors import VolumeError
from fedkd_utils.files import write_atomically
from fedkd_utils.grids import Point
from fedkd_utils.methods import RIVALS, ROWS
from fedkd_utils.networks import CheckpointError
from fedkd_utils.provenance import NUMBERS, versions
from fedkd_utils.records import Record
from fedkd_utils.settings import SETTINGS_OF_CLIENTS, Settings
from fedkd_utils.training import TrainingError
from fedkd_utils.transforms import SiteData

#: The one grid of learning rates for every row, and the seed and the part of the rounds with which it is searched.
LEARNING_RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
TUNING_SEED = 1000
TUNING_PART = 3

#: The row with which the others are compared.
REFERENCE_ROW = "dual_kd"

Say = Callable[[str], None]


def _print(text: str) -> None:
    print(text, flush=True)  # into a log file at once


@dataclass(frozen=True)
class Standing:
    """How far a grid is: its points by what has to be done."""

    done: dict[Point, Record]
    stale: dict[Point, list[str]]  # with the reasons
    missing: list[Point]
    damaged: dict[Point, str]


def with_rates(points: Iterable[Point], folder: Path) -> list[Point]:
    """The points with the learning rate that was chosen for their row, where one was and the point names none."""
    rates = chosen_rates(folder)
    return [replace(point, chosen_rate=rates[point.row]) if point.row in rates else point for point in points]


def standing(points: Sequence[Point], profile: Settings, folder: Path) -> Standing:
    """Compare points with their files: no volume is made, nothing is trained."""
    found = Standing({}, {}, [], {})
    for point in points:
        path = folder / f"{point.name}.json"
        if not path.is_file():
            found.missing.append(point)
            continue
        try:
            record = records.read_record(path)
        except ValueError as error:
            found.damaged[point] = str(error)
            continue
        reasons = records.stale(record, point, profile)
        if reasons:
            found.stale[point] = reasons
        else:
            found.done[point] = record
    return found


def choose(points: Iterable[Point], only: Sequence[str] = (), part: tuple[int, int] = (1, 1)) -> list[Point]:
    """The points whose name fits one of the patterns (all without any), and of those every n-th from the k-th.

    Two processes with the parts (1, 2) and (2, 2) share the work without meeting.

    Raises:
        ValueError: a part that is none.
    """
    k, n = part
    if not 1 <= k <= n:
        raise ValueError(f"Part {k}/{n} is none: 1/2 and 2/2 are the two halves.")
    fitting = [p for p in points if not only or any(fnmatch.fnmatch(p.name, pattern) for pattern in only)]
    return fitting[k - 1 :: n]


def run_points(
    points: Sequence[Point],
    profile: Settings,
    folder: Path,
    root: Path | None = None,
    *,
    again: bool = False,
    workers: int | None = None,
    say: Say = _print,
) -> Standing:
    """Run what has no file yet, one file each; returns where it stands afterwards.

    A point that is stopped goes on where it was: its checkpoint stays in the cache. One whose loss is no longer finite
    is reported, and the others go on. Stale results are reported, and
    made again only with ``again``; damaged ones are always made again.

    Args:
        folder: where the results are, ``data/results/<profile>``.
        root: the cache folder.
        say: gets a line per point, with an estimate of the time left.
    """
    before = standing(points, profile, folder)
    for point, reasons in before.stale.items():
        say(f"stale: {point.name}: {'; '.join(reasons)}" + ("" if again else " (made again with --again)"))
    todo = [p for p in points if p in before.missing or p in before.damaged or (again and p in before.stale)]
    say(f"{len(points)} points: {len(before.done)} done, {len(before.stale)} stale, {len(todo)} to run")
    untuned = {p.row for p in todo if p.chosen_rate is None and ROWS[p.row].objective is not None}
    if untuned and rates_file(folder).is_file():
        say(f"not tuned, at the profile's learning rate: {', '.join(sorted(untuned))} (see `tune`)")
    lasted: dict[str, list[float]] = {}
    for record in before.done.values():
        lasted.setdefault(record.row, []).append(record.elapsed)
    loaded: tuple[tuple[Any, ...], list[SiteData]] | None = None
    for index, point in enumerate(todo):
        start = time.perf_counter()
        settings, disk = point.settings(profile), point.disk(profile)
        key = (point.setting, point.seed, point.cohort_seed, cohorts.sizes(settings), cohorts.sizes(disk))
        if loaded is None or loaded[0] != key:
            whole = cohorts.make_cohort(disk, point.setting, point.cohort_seed, root)
            cohort = shares.share(whole, settings, point.seed)
            loaded = (key, experiments.load_clients(cohort, settings))
        try:
            result = experiments.run_row(
                point.row,
                point.setting,
                point.seed,
                settings,
                root,
                teacher_update=point.teacher_update,
                on_disk=disk,
                cohort_seed=point.cohort_seed,
                sites=loaded[1],
                workers=workers,
                keep=False,
            )
        except (TrainingError, CheckpointError, VolumeError) as error:
            say(f"[{index + 1}/{len(todo)}] {point.name} has no result: {error}")
            continue
        elapsed = max(time.perf_counter() - start, result.wall_seconds)  # of all sittings, where there were several
        command = f"python -m fedkd_utils run --profile {profile.name} --only {point.name}"
        made = records.record(result, point, profile, command, elapsed, workers)
        records.write_record(folder, made, point.name)
        experiments.forget(result, root)
        lasted.setdefault(point.row, []).append(elapsed)
        frame = result.test_frame()
        dice = frame.loc[frame["components"] == "all", "dice"].mean()
        left = _left(todo[index + 1 :], lasted)
        say(f"[{index + 1}/{len(todo)}] {point.name}  Dice {dice:.3f}  {elapsed:.0f} s  ({left} left)")
    return standing(points, profile, folder)


def _left(todo: Sequence[Point], lasted: dict[str, list[float]]) -> str:
    """How long the rest takes, from what points of the same row took, or any."""
    every = float(np.mean([seconds for row in lasted.values() for seconds in row]))
    seconds = sum(float(np.mean(lasted[point.row])) if point.row in lasted else every for point in todo)
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{math.ceil(seconds / 60)} min"


def rates_file(folder: Path) -> Path:
    """Where the chosen learning rates of a profile are."""
    return folder / "learning_rates.json"


def chosen_rates(folder: Path) -> dict[str, float]:
    """The learning rate of every row whose trials are complete; empty before :func:`tune`.

    Raises:
        ValueError: a damaged file.
    """
    rows = _tried(folder)
    return {row: float(facts["chosen"]) for row, facts in rows.items() if "chosen" in facts}


def _tried(folder: Path) -> dict[str, Any]:
    """By row: its trials and, when they are complete, the chosen rate."""
    path = rates_file(folder)
    if not path.is_file():
        return {}
    try:
        rows: dict[str, Any] = json.loads(path.read_bytes())["rows"]
        for facts in rows.values():
            float(facts.get("chosen", 0.0))
            assert {t["setting"] for t in facts["trials"]} and {t["learning_rate"] for t in facts["trials"]}
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{path}: damaged ({error}). Delete it and run `python -m fedkd_utils tune`.") from error
    return rows


def tune(
    rows: Sequence[str],
    profile: Settings,
    folder: Path,
    root: Path | None = None,
    *,
    settings: Sequence[str] = SETTINGS_OF_CLIENTS,
    workers: int | None = None,
    say: Say = _print,
) -> dict[str, float]:
    """Choose each row's learning rate by validation Dice, mean over settings, from :data:`LEARNING_RATES`.

    One seed that no result uses, and the same third of the rounds for every row. (Its labelled knees are those of seed
    0, and validation knees are the same in all seeds; teacher, initial weights and batches are its own.) Every trial is
    written at once, so a stopped search goes on; what was tried with other code or settings is tried again. A row has
    no rate before its last trial. Test volumes are not looked at.
    """
    shorter = replace(profile, rounds=max(profile.rounds // TUNING_PART, 1))
    path = rates_file(folder)

    def edition(row: str) -> dict[str, Any]:
        used = dataclasses.asdict(ROWS[row].for_run(shorter))
        return {
            "numbers": NUMBERS,
            "method": ROWS[row].identity(),
            "settings": records.settings_hash(used, ["learning_rate"]),
        }

    rows = [row for row in rows if ROWS[row].objective is not None]
    wanted = [(row, setting, rate) for setting in settings for row in rows for rate in LEARNING_RATES]
    known = {
        (row, trial["setting"], trial["learning_rate"]): trial
        for row, tried in _tried(folder).items()
        for trial in tried["trials"]
        if row in ROWS and {name: trial.get(name) for name in ("numbers", "method", "settings")} == edition(row)
    }
    todo = [trial for trial in wanted if trial not in known]
    say(f"{len(wanted)} trials: {len(wanted) - len(todo)} done, {len(todo)} to run")
    loaded: tuple[str, list[SiteData]] | None = None
    start = time.perf_counter()
    for index, (row, setting, rate) in enumerate(todo):
        if loaded is None or loaded[0] != setting:
            cohort = shares.share(cohorts.make_cohort(profile, setting, root=root), profile, TUNING_SEED)
            loaded = (setting, experiments.load_clients(cohort, profile))
        dice = experiments.validated(
            row, setting, TUNING_SEED, replace(shorter, learning_rate=rate), root, sites=loaded[1], workers=workers
        )
        trial = {"setting": setting, "learning_rate": rate, "validation": None if math.isnan(dice) else round(dice, 5)}
        trial |= {"device": device_title(compute_device()), "versions": versions()}
        known[row, setting, rate] = trial | edition(row)
        facts = {
            "command": f"python -m fedkd_utils tune --profile {profile.name}",
            "grid": LEARNING_RATES,
            "seed": TUNING_SEED,
            "rounds": shorter.rounds,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "rows": _chosen(known, settings),
        }
        write_atomically(path, (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode())
        left = (time.perf_counter() - start) / (index + 1) * (len(todo) - index - 1) / 60
        say(f"[{index + 1}/{len(todo)}] {row} {setting} {rate:g}: validation Dice {dice:.3f}  ({left:.0f} min left)")
    return chosen_rates(folder)


def _chosen(trials: dict[tuple[str, str, float], dict[str, Any]], settings: Sequence[str]) -> dict[str, Any]:
    """By row: the trials, and the rate with the highest mean validation Dice; a rate that diverged once is out.

    A row has a rate when each was tried in each of the settings.
    """
    out: dict[str, Any] = {}
    for row in [name for name in ROWS if any(key[0] == name for key in trials)]:
        own = [trial for (name, _, _), trial in trials.items() if name == row]
        scores: dict[float, list[float]] = {}
        for trial in own:
            dice = -1.0 if trial["validation"] is None else trial["validation"]
            scores.setdefault(trial["learning_rate"], []).append(dice)
        out[row] = {"trials": own}
        if all(len(scores.get(rate, ())) >= len(settings) for rate in LEARNING_RATES):
            means = {rate: min(v) if min(v) < 0 else sum(v) / len(v) for rate, v in scores.items()}
            out[row] = {"chosen": max(means, key=lambda rate: means[rate])} | out[row]
    return out


def seconds_file(folder: Path) -> Path:
    """Where the measured seconds of a profile are."""
    return folder / "seconds.json"


def measure_seconds(
    rows: Sequence[str], profile: Settings, folder: Path, root: Path | None = None, *, say: Say = _print
) -> Path:
    """Measure what a round of each row costs a client, in CPU seconds, one row after the other on this machine.

    Results may come from several processes on a GPU, or from a machine that did other work too; their times cannot be
    compared. Here every row is timed the same way: two clients, one at a time, on the CPU with one thread, the faster
    of two rounds; and what looking at the unlabelled volumes with the teacher costs, once. Every round has the same
    steps, so the seconds of a run are these times its rounds (:func:`records.with_seconds`).
    """
    setting = SETTINGS_OF_CLIENTS[0]
    measured: dict[str, Any] = {}
    threads = torch.get_num_threads()
    for row in [name for name in rows if ROWS[name].objective is not None]:
        torch.set_num_threads(1)
        try:
            history = experiments.timed(row, setting, replace(profile, rounds=2), root)
        finally:
            torch.set_num_threads(threads)
        by_client = history.groupby("client")
        looking = by_client["teacher_cpu_seconds"].sum().mean() if "teacher_cpu_seconds" in history else 0.0
        used = dataclasses.asdict(ROWS[row].for_run(profile))
        measured[row] = {
            "round": round(by_client["cpu_seconds"].min().mean(), 3),
            "looking": round(float(looking), 3),
            "settings": records.settings_hash(used, records.NO_SECONDS),
        }
        say(f"{row}: {measured[row]['round']:.2f} s a round and client, {looking:.2f} s looking")
    facts = {
        "command": f"python -m fedkd_utils seconds --profile {profile.name}",
        "machine": records.machine(1) | {"device": "cpu", "threads": 1},
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "rows": measured,
    }
    return write_atomically(seconds_file(folder), (json.dumps(facts, indent=1) + "\n").encode())


def report(name: str, profile: Settings, folder: Path, seeds: Sequence[int] = grids.SEEDS) -> str:
    """How far a grid is, what is stale, and of what is whole the mean Dice and :data:`REFERENCE_ROW` minus it."""
    points = points_of(name, profile, folder, seeds)
    found = standing(points, profile, folder)
    facts = f"{len(found.stale)} stale, {len(found.damaged)} damaged, {len(found.missing)} to run"
    lines = [f"{name}: {len(found.done)} of {len(points)} points done, {facts}"]
    lines += [f"  stale: {point.name}: {'; '.join(reasons)}" for point, reasons in found.stale.items()]
    lines += [f"  {text}" for text in found.damaged.values()]
    references = [point for point in points_of("rows", profile, folder, seeds) if point.row == REFERENCE_ROW]
    known = standing(references, profile, folder).done
    for setting in SETTINGS_OF_CLIENTS:
        reference = [record for point, record in known.items() if point.setting == setting]
        for key, runs in records.by_row(found.done, setting).items():
            if len(runs) == len(seeds):
                dice = statistics.mean_score(runs)
                lines.append(f"  {setting:14s} {key:50s} Dice {dice:.3f}  {_against(reference, runs)}".rstrip())
    return "\n".join(lines)


def cost_report(profile: Settings, folder: Path, seeds: Sequence[int] = grids.SEEDS) -> str:
    """When each row reaches the final validation Dice of the best semi-supervised rival, and what it had cost then.

    Of rows of which all seeds are there; seconds are those of :func:`measure_seconds`, or of the runs before that.
    """
    points = points_of("rows", profile, folder, seeds) + points_of("beyond", profile, folder, seeds)
    done = standing(points, profile, folder).done
    if seconds_file(folder).is_file():
        done = dict(zip(done, records.with_seconds(done.values(), seconds_file(folder)), strict=True))
    lines = []
    for setting in SETTINGS_OF_CLIENTS:
        whole = {row: runs for row, runs in records.by_row(done, setting).items() if len(runs) == len(seeds)}
        rivals = [row for row in RIVALS if row in whole]
        if not rivals:
            continue
        rival = statistics.best_rival(whole, rivals)
        target = statistics.final_dice(whole[rival])
        lines.append(f"{setting}: final validation Dice {target:.3f} of {rival}, the best rival, is reached after")
        lines.append(f"  {'row':28s} {'runs':>5s} {'rounds':>7s} {'seconds':>8s} {'MB':>8s}")
        for line in statistics.reach_table(whole, target).to_dict("records"):
            share = f"{line['reached']}/{line['runs']}"
            costs = f"{line['round']:7.0f} {line['seconds']:8.1f} {line['mb']:8.1f}"
            lines.append(f"  {line['row']:28s} {share:>5s} {costs}")
    return "\n".join(lines) or "costs: no setting has whole rows yet"


def _against(reference: Sequence[Record], runs: Sequence[Record]) -> str:
    """The difference in words; nothing when the two are not pairs: other seeds, or other test volumes."""
    try:
        return f"{REFERENCE_ROW} minus it {statistics.difference(reference, runs)}"
    except ValueError:
        return ""


def results_folder(project: Path, profile: Settings) -> Path:
    """``data/results/<profile>``."""
    return project / "data" / "results" / profile.name


def points_of(name: str, profile: Settings, folder: Path, seeds: Sequence[int] = grids.SEEDS) -> list[Point]:
    """The points of a grid with the learning rates chosen for their rows."""
    return with_rates(grids.grid(name, profile, seeds), folder)
