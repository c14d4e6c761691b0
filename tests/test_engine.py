"""The engine in one process gives the same numbers as the simulation, and refuses what it does not carry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from test_federation import SITES, TEACHER, TINY, equal, numbers

from fedkd_utils import federation
from fedkd_utils.engine_local import LocalGrid, local_grid
from fedkd_utils.engine_messages import Job
from fedkd_utils.engine_server import Order, federate
from fedkd_utils.methods import ROWS
from fedkd_utils.networks import copy_state
from fedkd_utils.provenance import state_hash

TWO = replace(TINY, rounds=2)
STATE = copy_state(TEACHER)
NAMES = tuple(site.name for site in SITES)


def order(row: str, folder: Path, settings: Any = TWO, **more: Any) -> Order:
    teacher = state_hash(STATE) if ROWS[row].distils else ""
    job = Job(row, settings, 0, teacher, more.pop("teacher_classes", None))
    return Order(job, NAMES, folder / "server", **{"patience_s": 60.0, "join_s": 5.0, **more})


def run(row: str, folder: Path, grid: LocalGrid | None = None, **more: Any) -> Any:
    grid = grid or local_grid(SITES, folder)
    made = order(row, folder, **more)
    return federate(grid, made, STATE if made.job.teacher else None)


@pytest.mark.parametrize("row", ["dual_kd", "fedavg", "uamt"])
def test_the_engine_gives_every_weight_of_the_simulation(row: str, tmp_path: Path) -> None:
    expected = federation.run_federation(TWO, row, SITES, TEACHER, 0)
    result, report = run(row, tmp_path)
    for name in NAMES:
        assert equal(result.models[name], expected.models[name])
    assert result.best_round == expected.best_round
    assert sorted(map(repr, map(sorted, map(dict.items, numbers(result))))) == sorted(
        map(repr, map(sorted, map(dict.items, numbers(expected))))
    )
    assert not report.happened("rejected") and not report.happened("no update")
