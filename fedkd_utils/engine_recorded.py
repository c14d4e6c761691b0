"""What was recorded of the engine, for whoever has not installed it: ``data/results/engine/engine.json``."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from typing import Any

import pandas as pd

from fedkd_utils.settings import PROJECT, QUICK

FILE = PROJECT / "data" / "results" / "engine" / "engine.json"

#: The federation of notebook 11: the knees of the quick profile at a quarter of the voxels, two rounds.
LESSON = replace(
    QUICK,
    grid_shape=(20, 40, 40),
    grid_spacing_mm=(4.0, 2.4, 2.4),
    rounds=2,
    local_epochs=1,
    steps_per_epoch=4,
    teacher_passes=2,
)


def installed() -> bool:
    """Whether the engine is: the extra ``engine`` of the package."""
    return importlib.util.find_spec("flwr") is not None


#: How the engine comes, for whoever needs it.
MISSING = 'the engine is not installed: .venv/bin/python -m pip install -e ".[engine]"'


def need_engine() -> None:
    """Go on only with the engine.

    Raises:
        RuntimeError: it is not installed; says how to install it.
    """
    if not installed():
        raise RuntimeError(MISSING)


def recorded() -> dict[str, Any]:
    """The file that ``python -m fedkd_utils bench engine`` writes.

    Raises:
        FileNotFoundError: there is none; says how to make it.
    """
    if not FILE.is_file():
        raise FileNotFoundError(f"{FILE}: not there. Make it with: python -m fedkd_utils bench engine")
    facts: dict[str, Any] = json.loads(FILE.read_bytes())
    return facts


def messages(traffic: list[dict[str, Any]]) -> pd.DataFrame:
    """Number and bytes of the messages of a run, by kind and direction."""
    frame = pd.DataFrame(traffic, columns=["round", "client", "message", "direction", "bytes"])
    table = frame.groupby(["message", "direction"], sort=False)["bytes"].agg(["size", "sum"]).reset_index()
    return table.rename(columns={"size": "messages", "sum": "bytes"})


def say(events: list[dict[str, Any]]) -> str:
    """Events as lines."""
    return "\n".join(
        f"round {e['round']} · {e['client'] or 'all':8s} · {e['what']}" + (f": {e['why']}" if e["why"] else "")
        for e in events
    )
