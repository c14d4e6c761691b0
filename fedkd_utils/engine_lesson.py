"""The federation of notebook 11: three hospitals on the engine in one process, of which one sends nonsense once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkd_utils.engine_connections import Order
from fedkd_utils.engine_local import LocalGrid, local_grid
from fedkd_utils.engine_messages import TRAIN, Job, to_arrays, weights_of
from fedkd_utils.engine_server import federate
from fedkd_utils.federation import run_federation
from fedkd_utils.networks import TappedNetwork, copy_state, largest_difference
from fedkd_utils.provenance import state_hash
from fedkd_utils.settings import Settings
from fedkd_utils.transforms import SiteData


class _NaNOnce(ClientApp):  # type: ignore[misc, unused-ignore]
    """An app whose first update holds a NaN."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__()
        self.app, self.done = app, False

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        if message.metadata.message_type == TRAIN and not self.done:
            self.done, state = True, weights_of(reply.content)
            next(iter(state.values())).view(-1)[0] = float("nan")
            reply.content["weights"] = to_arrays(state)
        return reply


def lesson(settings: Settings, row: str, sites: Sequence[SiteData], taught: TappedNetwork) -> dict[str, Any]:
    """Two runs on the engine: one without a fault, beside the simulation, and one in which the last hospital sends NaN.

    Returns:
        ``largest_difference``: of a weight, between simulation and engine; ``traffic`` and ``events`` of the run
        without a fault; ``faulty``: the events of the other.
    """
    state = copy_state(taught)
    simulated = run_federation(settings, row, sites, taught, 0)
    job = Job(row, settings, 0, state_hash(state))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        order = Order(job, tuple(site.name for site in sites), place / "server", patience_s=600.0, join_s=10.0)
        result, report = federate(local_grid(sites, place / "nodes"), order, state)
        apps = list(local_grid(sites, place / "faulty").apps.values())
        grid = LocalGrid([*apps[:-1], _NaNOnce(apps[-1])], place / "faulty")
        _, faulty = federate(grid, Order(**{**vars(order), "folder": place / "other"}), state)
    name = sites[0].name
    return {
        "settings": asdict(settings),
        "largest_difference": largest_difference(result.models[name], simulated.models[name]),
        "events": _certain(report.events),
        "traffic": report.traffic,
        "faulty": _certain(faulty.events),
    }


def _certain(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is the same on every processor: which round was the best is not."""
    return [event for event in events if event["what"] != "finished"]
