"""Committed results: one small file per point, what it was made with, and whether that still holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fedkd_utils import cohorts
from fedkd_utils.device import compute_device, device_title, precision_title
from fedkd_utils.experiments import Result, read_facts
from fedkd_utils.files import rounded, write_atomically
from fedkd_utils.grids import Point
from fedkd_utils.methods import ROWS
from fedkd_utils.parallel import default_workers
from fedkd_utils.provenance import NUMBERS
from fedkd_utils.settings import CLASS_NAMES, Settings

#: Settings that do not move the seconds of a round.
NO_SECONDS = ("rounds", "learning_rate")

_TABLES = ("history", "test", "messages")


@dataclass(frozen=True)
class Record:
    """A result and its provenance."""

    result: Result
    label: str  # of the point: what differs from the profile
    made_with: dict[str, Any]  # the row's identity, the edition of the digits, the sizes of the cohort
    machine: dict[str, Any]  # cores, processor, device, threads, workers: a class of machines, never a name
    date: str  # UTC, YYYY-MM-DD
    command: str
    elapsed: float  # seconds of the whole point: loading, training, validation and test

    @property
    def row(self) -> str:
        """The row's name."""
        return self.result.row

    @property
    def setting(self) -> str:
        """Of the clients."""
        return self.result.setting

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.result.seed

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Bytes by round, direction and kind, over all clients."""
        return self.result.messages

    def test_frame(self) -> pd.DataFrame:
        """See :meth:`experiments.Result.test_frame`."""
        return self.result.test_frame()

    def history_frame(self) -> pd.DataFrame:
        """See :meth:`experiments.Result.history_frame`."""
        return self.result.history_frame()


def made_with(point: Point, profile: Settings) -> dict[str, Any]:
    """The row's definition, the edition of the digits, and sizes and seed of the cohort, when it is not the first."""
    return {
        "method": ROWS[point.row].identity(),
        "numbers": NUMBERS,
        "sizes": cohorts.sizes(point.disk(profile)),
        "teacher_update": dataclasses.asdict(point.teacher_update),
    } | ({"cohort_seed": point.cohort_seed} if point.cohort_seed else {})


def settings_hash(settings: Mapping[str, Any], without: Iterable[str]) -> str:
    """A short hash of settings as they are written, but for some; None is as good as nothing."""
    left_out = {*without, "name"}
    chosen = {name: value for name, value in settings.items() if name not in left_out and value is not None}
    return hashlib.sha256(_dense(dict(sorted(chosen.items()))).encode()).hexdigest()[:16]


def expected_settings(point: Point, profile: Settings) -> dict[str, Any]:
    """The settings that a record of this point must name."""
    settings = ROWS[point.row].for_run(point.settings(profile))
    facts: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return facts


def machine(workers: int | None) -> dict[str, Any]:
    """The class of machine that computes, never its name."""
    device = compute_device()
    precision = {"precision": precision_title(device)} if device.type == "cuda" else {}
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "system": platform.system(),
        "device": device_title(device),
        "threads": torch.get_num_threads(),
        "workers": workers or default_workers(),
    } | precision


def record(
    result: Result, point: Point, profile: Settings, command: str, elapsed: float, workers: int | None
) -> Record:
    """A result with its provenance, as it will be written."""
    messages = pd.DataFrame(result.messages, columns=["round", "direction", "client", "what", "bytes"])
    grouped = messages.groupby(["round", "direction", "what"], sort=False)["bytes"]
    sums = grouped.agg(["size", "sum"]).reset_index().rename(columns={"size": "messages", "sum": "bytes"})
    compact = dataclasses.replace(result, messages=json.loads(sums.to_json(orient="records")))
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return Record(compact, point.label, made_with(point, profile), machine(workers), date, command, elapsed)


def write_record(folder: Path, record: Record, name: str) -> Path:
    """Write ``<name>.json``, completely or not at all: a line per fact, tables without repeated names."""
    facts = dataclasses.asdict(record)
    result = facts.pop("result")
    for line in result["test"]:
        line.pop("cartilage")  # its class says it
    for table in _TABLES:
        result[table] = _pack(result[table])
    lines = [f"{json.dumps(key)}: {_dense(value)}" for key, value in {**result, **facts}.items()]
    return write_atomically(folder / f"{name}.json", ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _dense(value: Any) -> str:
    return json.dumps(rounded(value), separators=(",", ":"), allow_nan=False)


def _pack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return {"columns": columns, "rows": [[row.get(name) for name in columns] for row in rows]}


def read_record(path: Path) -> Record:
    """The record in a file of :func:`write_record`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a record; names the file and the remedy.
    """
    return read_facts(path, _unpacked, "run its grid")


def _unpacked(facts: dict[str, Any]) -> Record:
    for table in _TABLES:
        packed = facts[table]
        facts[table] = [dict(zip(packed["columns"], row, strict=True)) for row in packed["rows"]]
    for line in facts["test"]:
        line["cartilage"] = CLASS_NAMES[line["class"]]
    names = {field.name for field in dataclasses.fields(Result)}
    result = Result(**{name: facts.pop(name) for name in list(facts) if name in names})
    return Record(result=result, **facts)


def stale(record: Record, point: Point, profile: Settings) -> list[str]:
    """Why a record is no longer what its point would give; empty when it is."""
    reasons = []
    wanted, had = expected_settings(point, profile), record.result.settings
    for name in dict.fromkeys([*wanted, *had]):
        if rounded(wanted.get(name)) != had.get(name):
            reasons.append(f"{name} was {had.get(name)} and is {wanted.get(name)}")
    now = made_with(point, profile)
    words = {
        "method": "the row is defined otherwise",
        "numbers": "the digits of the code have changed",
        "sizes": "the cohort has other sizes",
        "teacher_update": "the teacher moves otherwise",
        "cohort_seed": "the knees are others",
    }
    return reasons + [words[key] for key in now if rounded(now[key]) != record.made_with.get(key)]


def same_teacher(one: Record, other: Record) -> bool:
    """Whether two runs had one teacher, weight by weight (or neither had any).

    A teacher of one seed is trained from the same start on the same volumes; on machines that round otherwise, a
    thousand steps make two of it. The difference of two such runs holds that of their teachers, too.
    """
    return bool(one.result.teacher.get("weights_sha256") == other.result.teacher.get("weights_sha256"))


def read_all(folder: Path, points: Iterable[Point]) -> dict[Point, Record]:
    """The records of those points that have a file."""
    paths = {point: folder / f"{point.name}.json" for point in points}
    return {point: read_record(path) for point, path in paths.items() if path.is_file()}


def with_seconds(records: Iterable[Record], path: Path) -> list[Record]:
    """The same records with the seconds of :func:`runner.measure_seconds` in the place of those of their runs.

    Raises:
        FileNotFoundError, ValueError: no such file, no seconds for a row in it, or a record of other settings than
            those that were measured.
    """
    rows = json.loads(path.read_bytes())["rows"]
    return [_with_seconds(record, rows, path) for record in records]


def _with_seconds(record: Record, rows: Mapping[str, Any], path: Path) -> Record:
    if record.label:
        raise ValueError(f"{record.row} {record.label}: only rows as they are were timed, not with other settings.")
    if ROWS[record.row].objective is None:
        return record
    if record.row not in rows:
        raise ValueError(f"{path} has no seconds for {record.row}: run `python -m fedkd_utils seconds`.")
    cost = rows[record.row]
    if cost["settings"] != settings_hash(record.result.settings, NO_SECONDS):
        raise ValueError(f"{path}: {record.row} was timed with other settings: run `python -m fedkd_utils seconds`.")
    history = [
        {**line, "cpu_seconds": cost["round"], "teacher_cpu_seconds": cost["looking"] if line["round"] == 1 else 0.0}
        for line in record.result.history
    ]
    return dataclasses.replace(record, result=dataclasses.replace(record.result, history=history))


def shared_seeds(runs: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    """The same rows, of each the records of those seeds that all of them have, in order."""
    seeds = set.intersection(*({record.seed for record in found} for found in runs.values())) if runs else set()
    chosen = {name: sorted((r for r in found if r.seed in seeds), key=lambda r: r.seed) for name, found in runs.items()}
    return chosen if seeds else {}


def by_row(records: Mapping[Point, Record], setting: str | None = None) -> dict[str, list[Record]]:
    """The records by row and label, "row" or "row label", in the order of the points; of one setting or of all."""
    grouped: dict[str, list[Record]] = {}
    for point, found in records.items():
        if setting in (None, point.setting):
            grouped.setdefault(f"{point.row} {point.label}".strip(), []).append(found)
    return grouped
