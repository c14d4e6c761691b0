"""The ``ServerApp`` of the course, and the file that tells it what to run.

The order lies on the machine of the server, as JSON, with the teacher beside it. The engine is told its path and
nothing else, so that a run is the same whoever starts it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd_utils import experiments
from fedkd_utils.clients import FederationError
from fedkd_utils.engine_connections import Order
from fedkd_utils.engine_messages import Job, check_job
from fedkd_utils.engine_server import federate
from fedkd_utils.files import write_atomically
from fedkd_utils.networks import State, load_checkpoint, save_checkpoint
from fedkd_utils.training import TrainingError

_NUMBERS = ("least", "patience_s", "join_s")


def write_order(path: Path, order: Order, teacher: State | None = None) -> Path:
    """Write an order, and the teacher beside it; nothing is written that the engine does not carry.

    Raises:
        ValueError, FederationError: see :func:`engine_messages.check_job`.
    """
    check_job(order.job)
    if teacher is not None:
        save_checkpoint(path.with_suffix(".safetensors"), teacher, {})
    facts = {"job": order.job.to_json(), "clients": order.clients, "folder": str(order.folder.resolve())}
    facts |= {name: getattr(order, name) for name in _NUMBERS}
    return write_atomically(path, json.dumps(facts, indent=1).encode())


def read_order(path: Path) -> tuple[Order, State | None]:
    """The order in a file, and the teacher.

    Raises:
        FederationError: it cannot be read.
        FileNotFoundError, CheckpointError: the teacher's file is missing or damaged.
    """
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
        numbers = {name: facts[name] for name in _NUMBERS}
        order = Order(Job.from_json(facts["job"]), tuple(facts["clients"]), Path(facts["folder"]), **numbers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FederationError(f"{path}: not an order of this version ({error}). Write it again.") from error
    teacher = load_checkpoint(path.with_suffix(".safetensors"))[0] if order.job.teacher else None
    return order, teacher


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the order that the engine's run configuration names; leave the model and ``outcome.json`` in its folder."""
    order, teacher = read_order(Path(str(context.run_config["order"])))
    try:
        result, report = federate(grid, order, teacher)
        settings = order.job.method.adapt(order.job.settings)
        experiments.save_models(order.folder / "model.safetensors", result, order.job.mark, settings)
        outcome = {"error": "", "best_round": result.best_round}
        logging.getLogger("flwr").info("\n%s", report.text())
    except (FederationError, TrainingError) as error:
        outcome = {"error": str(error)}
    write_atomically(order.folder / "outcome.json", json.dumps(outcome).encode())
