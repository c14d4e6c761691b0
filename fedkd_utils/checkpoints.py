"""A run between two rounds, and its checkpoint on disk: a killed run goes on from there with the same numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedkd_utils.clients import FederationError
from fedkd_utils.device import surroundings
from fedkd_utils.methods import ROWS
from fedkd_utils.networks import CheckpointError, State, TappedNetwork, load_checkpoint, save_checkpoint
from fedkd_utils.provenance import code_hash, state_hash
from fedkd_utils.server import Ledger
from fedkd_utils.settings import Settings
from fedkd_utils.teacher import TeacherUpdate
from fedkd_utils.transforms import SiteData

#: Code that a run depends on, besides its teacher's and the definition of its row (:meth:`methods.Method.identity`).
FEDERATION_CODE = (
    "seeds",
    "transforms",
    "losses",
    "metrics",
    "networks",
    "training",
    "teacher",
    "objectives",
    "compression",
    "clients",
    "server",
    "federation",
    "shares",
)


@dataclass
class Run:
    """All that a run carries from one round to the next; it is what the checkpoint holds."""

    students: dict[str, State]  # by client where each has its own, and under "" the one that all share
    teacher: State | None
    best: dict[str, State] = field(default_factory=dict)  # by client, or under "" when all have the same
    scores: dict[str, float] = field(default_factory=dict)  # validation Dice of the best
    best_round: dict[str, int] = field(default_factory=dict)
    kept: dict[str, State] = field(default_factory=dict)  # by client: what it keeps to itself
    finished: int = 0  # rounds
    history: list[dict[str, Any]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def fingerprint(
    settings: Settings,
    row: str,
    sites: Sequence[SiteData],
    teacher: TappedNetwork | None,
    seed: int,
    teacher_update: TeacherUpdate,
    teacher_classes: tuple[int, ...] | None = None,
) -> str:
    """A hash of all that moves a number of a run; a checkpoint of another one is refused."""
    parts = {
        "settings": dataclasses.asdict(settings),
        "row": row,
        "method": ROWS[row].identity(),
        "data": {site.name: data_hash(site) for site in sites},
        "teacher": state_hash(teacher.state_dict()) if teacher is not None else "",
        "seed": seed,
        "teacher_update": dataclasses.asdict(teacher_update),
        "code": code_hash(FEDERATION_CODE),
        "classes": [teacher_classes, *[site.classes_by_volume for site in sites]],
        "surroundings": surroundings(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def data_hash(site: SiteData) -> str:
    """A hash of the volumes that a site trains and validates on."""
    tensors = {"images": site.labelled_images, "labels": site.labels, "unlabelled": site.unlabelled_images}
    for index, case in enumerate(site.validation):
        tensors[f"validation {index}"] = case.image
    return state_hash(tensors)


def save_run(path: Path, fingerprint: str, run: Run) -> None:
    """One file, replaced in one step, holds the whole run after a round."""
    groups = {"student": run.students, "best": run.best, "kept": run.kept}
    owners = {part: sorted(states) for part, states in groups.items()}
    tensors: State = {f"teacher/0/{name}": tensor for name, tensor in (run.teacher or {}).items()}
    for part, states in groups.items():
        for index, owner in enumerate(owners[part]):
            tensors |= {f"{part}/{index}/{name}": tensor for name, tensor in states[owner].items()}
    facts = {
        "fingerprint": fingerprint,
        "owners": owners,
        "scores": [None if np.isnan(run.scores[owner]) else run.scores[owner] for owner in owners["best"]],
        "best_round": [run.best_round[owner] for owner in owners["best"]],
        "finished": run.finished,
        "history": [
            {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in line.items()}
            for line in run.history
        ],
        "ledger": run.ledger.entries,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
    }
    save_checkpoint(path, tensors, facts)


def resume(path: Path, fingerprint: str) -> Run | None:
    """The run in a checkpoint; None when there is none or it is damaged, and the run begins again.

    Raises:
        FederationError: the checkpoint belongs to another run.
    """
    if not path.is_file():
        return None
    try:
        tensors, facts = load_checkpoint(path)
    except CheckpointError:
        path.unlink(missing_ok=True)
        return None
    if facts.get("fingerprint") != fingerprint:
        raise FederationError(
            f"{path} belongs to a run with other settings, data, teacher, seed, code, versions or device: choose "
            "another folder, or delete the file to begin again."
        )
    parts: dict[str, dict[int, State]] = {"student": {}, "best": {}, "kept": {}, "teacher": {}}
    for key, tensor in tensors.items():
        part, index, name = key.split("/", 2)
        parts[part].setdefault(int(index), {})[name] = tensor
    owners, nan = facts["owners"], float("nan")
    return Run(
        students={owner: parts["student"][index] for index, owner in enumerate(owners["student"])},
        teacher=parts["teacher"].get(0),
        best={owner: parts["best"][index] for index, owner in enumerate(owners["best"])},
        scores={o: nan if score is None else score for o, score in zip(owners["best"], facts["scores"], strict=True)},
        best_round=dict(zip(owners["best"], facts["best_round"], strict=True)),
        kept={owner: parts["kept"].get(index, {}) for index, owner in enumerate(owners["kept"])},
        finished=facts["finished"],
        history=[{k: nan if v is None else v for k, v in line.items()} for line in facts["history"]],
        ledger=Ledger(facts["ledger"]),
        seconds=facts["seconds"],
        cpu_seconds=facts["cpu_seconds"],
    )
