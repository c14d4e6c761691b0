"""The federation: one client update, one server step, the rounds between them, and what every message costs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fedkd_utils import transforms
from fedkd_utils.methods import ROWS, Batch, Method
from fedkd_utils.networks import (
    CheckpointError,
    State,
    TappedNetwork,
    build_network,
    check_finite,
    check_layout,
    copy_state,
    load_checkpoint,
    load_state,
    nbytes,
    save_checkpoint,
)
from fedkd_utils.provenance import code_hash, state_hash
from fedkd_utils.seeds import generator_of, seed_of
from fedkd_utils.settings import Settings
from fedkd_utils.teacher import FROZEN, TeacherSignals, TeacherUpdate, blend, release_rate, teacher_signals
from fedkd_utils.training import (
    Augmentation,
    LabelledBatches,
    MakeOptimiser,
    Progress,
    TrainingLog,
    adamw,
    class_columns,
    draw_batches,
    fit,
    grid_dice,
    is_better,
    mean_dice,
)
from fedkd_utils.transforms import Case, SiteData

#: Code that a run depends on, besides its teacher's.
FEDERATION_CODE = (
    "seeds",
    "transforms",
    "losses",
    "metrics",
    "networks",
    "training",
    "teacher",
    "methods",
    "federation",
)

T = TypeVar("T")


class FederationError(ValueError):
    """A site or an update that cannot take part; the message names the client, the fault and the remedy."""


@dataclass(frozen=True)
class Update:
    """What a client sends back."""

    client: str
    state: State
    n_examples: int  # n_k, labelled + unlabelled volumes
    metrics: dict[str, float]  # means over the round's steps, seconds, data_seconds, steps
    teacher_state: State | None = None  # only when the teacher travels too (the released code)


def steps_per_round(settings: Settings) -> int:
    """Optimiser steps of one client in one round."""
    return settings.local_epochs * settings.steps_per_epoch


def check_site(site: SiteData, method: Method) -> None:
    """Refuse a client that cannot run a method.

    Raises:
        FederationError: no labelled, unlabelled (when the method distils) or validation volume, or NaN voxels.
    """
    missing = {
        "labelled training": method.objective is not None and len(site.labelled_images) == 0,
        "unlabelled": method.distils and len(site.unlabelled_images) == 0,
        "validation": len(site.validation) == 0,
    }
    for what, is_missing in missing.items():
        if is_missing:
            raise FederationError(
                f"Client {site.name} has no {what} volume, which {method.title!r} needs: add one, or leave the client "
                "out."
            )
    for what, tensor in (("a labelled", site.labelled_images), ("an unlabelled", site.unlabelled_images)):
        if not bool(torch.isfinite(tensor).all()):
            raise FederationError(f"Client {site.name}: {what} volume holds NaN or infinite voxels. Export it again.")


def signals_for(
    teacher: TappedNetwork, site: SiteData, settings: Settings, seed: int, progress: Progress | None = None
) -> TeacherSignals:
    """The teacher's signals on a client's unlabelled volumes, with one seed per run, client and volume."""
    seeds = [seed_of(seed, "signals", site.name, index) for index in range(len(site.unlabelled_images))]
    return teacher_signals(teacher, site.unlabelled_images, settings.teacher_passes, seeds, progress)


def client_update(
    global_state: Mapping[str, Tensor],
    site: SiteData,
    method: Method,
    settings: Settings,
    round_number: int,
    seed: int,
    *,
    teacher: TappedNetwork | None = None,
    signals: TeacherSignals | None = None,
    teacher_update: TeacherUpdate = FROZEN,
    augmentation: Augmentation | None = transforms.augment,
    make_optimiser: MakeOptimiser = adamw,
    progress: Progress | None = None,
) -> Update:
    """Train a client for one round: a function of its arguments, whoever calls it (simulation, process, Flower).

    The optimiser is fresh each round; the schedule and the ramps count the whole run. Labelled batches, their
    augmentation and the dropout of the labelled pass depend on seed, client and round only, so every row sees the
    same.

    Args:
        global_state: the student as received; it is not changed.
        round_number: from 1.
        seed: of the run.
        teacher: needed by rows that distil, when ``signals`` are not given or the teacher follows the student.
        signals: of this teacher for this client (:func:`signals_for`); computed here when not given.
        progress: gets :func:`steps_per_round` steps.

    Raises:
        FederationError: the client lacks volumes, or a teacher, that the method needs.
        TrainingError: the loss is no longer finite.
    """
    check_site(site, method)
    if method.objective is None:
        raise FederationError(f"{method.title!r} has no local training.")
    objective = method.objective
    moving = method.distils and teacher_update.kind == "release"
    if method.distils and teacher is None and (signals is None or moving):
        raise FederationError(f"{method.title!r} needs the teacher: send it to client {site.name} first.")
    network = build_network(settings, 0)
    load_state(network, global_state, f"The student sent to client {site.name}")
    per_round = steps_per_round(settings)
    total = settings.rounds * per_round
    own_seed = seed_of(seed, "client", site.name, round_number)
    labelled = LabelledBatches(
        site.labelled_images, site.labels, settings.batch_labelled, per_round, own_seed, augmentation
    )
    order: Tensor | None = None
    if method.distils:
        if teacher is not None and signals is None:
            signals = signals_for(teacher, site, settings, seed)
        count = len(site.unlabelled_images)
        order = draw_batches(count, settings.batch_unlabelled, per_round, generator_of(own_seed, "unlabelled"))
    teacher_state = copy_state(teacher) if moving and teacher is not None else None

    before = (round_number - 1) * per_round

    def batch(step: int) -> Batch:
        images, labels = labelled(step - before)
        if order is None or signals is None:
            return Batch(images, labels, site.labelled_classes)
        chosen = order[step - before]
        return Batch(
            images,
            labels,
            site.labelled_classes,
            site.unlabelled_images[chosen],
            signals.probabilities[chosen],
            signals.entropy[chosen],
            signals.features[chosen],
        )

    def loss(network: TappedNetwork, batch: Batch, progress: float) -> Mapping[str, Tensor]:
        return objective(network, batch, progress, settings)

    optimiser = make_optimiser(network.parameters(), settings.learning_rate, settings.weight_decay)
    log = TrainingLog()
    for epoch in range(settings.local_epochs):
        first = before + epoch * settings.steps_per_epoch
        fit(
            network,
            optimiser,
            batch,
            loss,
            steps=range(first, first + settings.steps_per_epoch),
            total_steps=total,
            learning_rate=settings.learning_rate,
            seed=own_seed,
            log=log,
            label=f"round {round_number}, {site.name}",
            progress=progress,
        )
        rate = release_rate((round_number - 1) * settings.local_epochs + epoch, settings.local_epochs)
        if teacher_state is not None and rate > 0:
            teacher_state = blend(teacher_state, network.state_dict(), rate)
            moved = build_network(settings, 0).eval()
            load_state(moved, teacher_state)
            signals = signals_for(moved, site, settings, seed)
    parts = {name: float(np.mean([step[name] for step in log.steps])) for name in log.steps[0] if name != "step"}
    times = {"seconds": log.seconds, "data_seconds": log.data_seconds, "steps": float(len(log.steps))}
    return Update(site.name, copy_state(network), site.examples, parts | times, teacher_state)


def aggregate(updates: Sequence[Update]) -> State:
    """FedAvg (McMahan et al., arXiv 1602.05629): theta = sum_k n_k theta_k / sum_k n_k.

    Floating tensors, batch statistics too, are summed in float64 in the order of the clients' names, so the
    result does not depend on who answered first; integer counters are copied from the first name.

    Raises:
        FederationError: no update, two of one client, a count below 1.
        CheckpointError: NaN, or names or shapes that differ; names the client.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    _check_updates(ordered)
    return _weighted([update.state for update in ordered], [update.n_examples for update in ordered])


def _check_updates(updates: Sequence[Update]) -> None:
    if not updates:
        raise FederationError("No client sent an update: nothing can be averaged.")
    names = [update.client for update in updates]
    if len(set(names)) < len(names):
        raise FederationError(f"Two updates of one client among {names}: count every client once a round.")
    for update in updates:
        source = f"The update of client {update.client}"
        if update.n_examples < 1:
            raise FederationError(f"{source} counts {update.n_examples} examples: it must have at least 1.")
        check_layout(update.state, updates[0].state, source)
        check_finite(update.state, source)


def _weighted(states: Sequence[Mapping[str, Tensor]], counts: Sequence[int]) -> State:
    total = sum(counts)
    averaged = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            weighted = torch.zeros_like(first, dtype=torch.float64)
            for state, count in zip(states, counts, strict=True):
                weighted += state[name].double() * (count / total)
            averaged[name] = weighted.to(first.dtype)
        else:
            averaged[name] = first.clone()
    return averaged


def server_step(global_state: Mapping[str, Tensor], updates: Sequence[Update]) -> State:
    """The next global student from the last one and the updates of a round.

    Raises:
        CheckpointError: an update does not have the layout of the global student; names the client.
    """
    for update in updates:
        check_layout(update.state, global_state, f"The update of client {update.client}")
    return aggregate(updates)


@dataclass
class Ledger:
    """One line per message: round, direction ("down" to a client, "up" to the server), client, what, bytes.

    Bytes are those of the tensors. Example counts and scores, some bytes a message, are left out.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)

    def record(self, round_number: int, direction: str, client: str, what: str, state: Mapping[str, Tensor]) -> None:
        """Note one message; round 0 is before training."""
        entry = {"round": round_number, "direction": direction, "client": client, "what": what, "bytes": nbytes(state)}
        self.entries.append(entry)

    def total(self, direction: str | None = None, what: str | None = None) -> int:
        """Bytes of all messages, or of those in one direction or of one kind."""
        return sum(
            entry["bytes"]
            for entry in self.entries
            if direction in (None, entry["direction"]) and what in (None, entry["what"])
        )

    def frame(self) -> pd.DataFrame:
        """The lines as a table."""
        return pd.DataFrame(self.entries, columns=["round", "direction", "client", "what", "bytes"])


@dataclass(frozen=True)
class FederationResult:
    """A finished run: the model chosen on validation for each client, and how it came about."""

    method: Method
    models: dict[str, State]  # by client; one and the same state when students are averaged
    best_round: dict[str, int]  # by client
    history: pd.DataFrame  # one line per round and client: losses, validation Dice (mean and by cartilage), seconds
    ledger: Ledger
    seconds: float  # wall time, over all sittings of a resumed run
    cpu_seconds: float
    steps: int  # optimiser steps of all clients

    def validation_by_round(self) -> pd.Series:
        """Mean validation Dice over the clients, by round."""
        return self.history.groupby("round")["validation"].mean()


@dataclass
class _Run:
    """All that a run carries from one round to the next; it is what the checkpoint holds."""

    students: dict[str, State]  # by owner: every client, or "" for the one that all share
    best: dict[str, State]
    scores: dict[str, float]  # validation Dice of the best
    best_round: dict[str, int]
    teacher: State | None
    finished: int = 0  # rounds
    history: list[dict[str, Any]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def default_workers() -> int:
    """How many clients train side by side: as many as the cores hold with torch's threads for each."""
    return max((os.cpu_count() or 1) // torch.get_num_threads(), 1)


def total_progress(
    settings: Settings, row: str, sites: Sequence[SiteData], teacher_update: TeacherUpdate = FROZEN
) -> int:
    """The steps that ``progress`` of :func:`run_federation` gets in all."""
    method = ROWS[row]
    if method.objective is None:
        return 1
    looks = sum(len(site.unlabelled_images) for site in sites) if method.distils else 0
    if teacher_update.kind == "hand_over":
        looks *= max(settings.rounds - max(teacher_update.warm_up_rounds, 1) + 1, 1)
    elif teacher_update.kind == "release":
        looks = 0
    return looks + settings.rounds * len(sites) * steps_per_round(settings)


def run_federation(
    settings: Settings,
    row: str,
    sites: Sequence[SiteData],
    teacher: TappedNetwork | None = None,
    seed: int = 0,
    folder: Path | None = None,
    *,
    teacher_update: TeacherUpdate = FROZEN,
    augmentation: Augmentation | None = transforms.augment,
    make_optimiser: MakeOptimiser = adamw,
    workers: int | None = None,
    progress: Progress | None = None,
) -> FederationResult:
    """Run a row of the comparison from the first round to the last, or on from where it was stopped.

    Clients train side by side in threads; the numbers do not depend on how many there are (``workers``). "Local
    only" is the same loop without averaging. The model is chosen by its mean validation Dice: over all clients
    when students are averaged, by each client for itself otherwise.

    Args:
        folder: where the run leaves a checkpoint after each round; a run that was killed goes on from there and
            ends with the same numbers. Nothing is kept when not given.
        progress: gets :func:`total_progress` steps, those of finished rounds at once, in the calling thread.

    Raises:
        FederationError: an unknown row, no client, two of one name, a client that lacks volumes, no teacher, or a
            checkpoint of another run in ``folder``.
        TrainingError: the loss of a client is no longer finite.
    """
    method = _check_run(row, sites, teacher)
    sites = sorted(sites, key=lambda site: site.name)
    advance: Progress = progress or (lambda steps, note: None)
    if method.objective is None:
        assert teacher is not None
        return _use_teacher(method, sites, teacher, advance)
    path = folder / "round.safetensors" if folder is not None else None
    fingerprint = _fingerprint(settings, row, sites, teacher if method.distils else None, seed, teacher_update)
    run = _resume(path, fingerprint) if path is not None else None
    if run is None:
        run = _begin(settings, method, sites, teacher, seed)
    elif run.finished:
        advance(run.finished * len(sites) * steps_per_round(settings), f"round {run.finished} read from its checkpoint")
    plan = _Plan(settings, method, sites, seed, teacher_update, augmentation, make_optimiser, workers, advance)
    signals: dict[str, TeacherSignals] = {}
    while run.finished < settings.rounds:
        wall, cpu = time.perf_counter(), time.process_time()
        signals = _play_round(plan, run, signals)
        run.seconds += time.perf_counter() - wall
        run.cpu_seconds += time.process_time() - cpu
        if path is not None:
            _save(path, fingerprint, run)
    owner = {site.name: plan.owner(site) for site in sites}
    return FederationResult(
        method=method,
        models={name: run.best[key] for name, key in owner.items()},
        best_round={name: run.best_round[key] for name, key in owner.items()},
        history=pd.DataFrame(run.history),
        ledger=run.ledger,
        seconds=run.seconds,
        cpu_seconds=run.cpu_seconds,
        steps=settings.rounds * steps_per_round(settings) * len(sites),
    )


@dataclass(frozen=True)
class _Plan:
    """All that stays the same during a run."""

    settings: Settings
    method: Method
    sites: Sequence[SiteData]  # in the order of their names
    seed: int
    teacher_update: TeacherUpdate
    augmentation: Augmentation | None
    make_optimiser: MakeOptimiser
    workers: int | None
    advance: Progress

    def owner(self, site: SiteData) -> str:
        """The key of a client's student in the run: all clients share one when students are averaged."""
        return "" if self.method.federated else site.name


def _play_round(plan: _Plan, run: _Run, signals: dict[str, TeacherSignals]) -> dict[str, TeacherSignals]:
    """Steps 2 to 5 of figure 1, once; returns the teacher's signals for the next round."""
    settings, number = plan.settings, run.finished + 1
    teacher: TappedNetwork | None = None
    if run.teacher is not None:
        moves = plan.teacher_update.kind == "hand_over" and run.finished >= max(plan.teacher_update.warm_up_rounds, 1)
        if moves:
            run.teacher = blend(run.teacher, run.students[""], plan.teacher_update.rate)
        teacher = build_network(settings, 0).eval().requires_grad_(False)
        load_state(teacher, run.teacher, "The teacher")
        if plan.teacher_update.kind != "release" and (moves or not signals):
            signals = _look(plan, teacher)

    def train(site: SiteData, report: Progress) -> Update:
        return client_update(
            run.students[plan.owner(site)],
            site,
            plan.method,
            settings,
            number,
            plan.seed,
            teacher=teacher,
            signals=signals.get(site.name),
            teacher_update=plan.teacher_update,
            augmentation=plan.augmentation,
            make_optimiser=plan.make_optimiser,
            progress=report,
        )

    updates = _side_by_side(train, plan.sites, plan.workers, plan.advance)
    _collect(run, plan.method, updates, number)
    _validate(plan, run, updates, number)
    run.finished = number
    return signals


def _look(plan: _Plan, teacher: TappedNetwork) -> dict[str, TeacherSignals]:
    def look(site: SiteData, report: Progress) -> TeacherSignals:
        return signals_for(teacher, site, plan.settings, plan.seed, report)

    looked = _side_by_side(look, plan.sites, plan.workers, plan.advance)
    return {site.name: signals for site, signals in zip(plan.sites, looked, strict=True)}


def _check_run(row: str, sites: Sequence[SiteData], teacher: TappedNetwork | None) -> Method:
    if row not in ROWS:
        raise FederationError(f"There is no row {row!r}: choose one of {', '.join(ROWS)}.")
    method = ROWS[row]
    names = [site.name for site in sites]
    if not names or len(set(names)) < len(names):
        raise FederationError(f"A federation needs clients with names of their own, not {names}.")
    for site in sites:
        check_site(site, method)
    if method.needs_teacher and teacher is None:
        raise FederationError(f"{method.title!r} needs a teacher: get one with teacher.teacher_for.")
    return method


def _begin(
    settings: Settings, method: Method, sites: Sequence[SiteData], teacher: TappedNetwork | None, seed: int
) -> _Run:
    first = copy_state(build_network(settings, seed_of(seed, "student")))
    owners = [""] if method.federated else [site.name for site in sites]
    run = _Run(
        students={owner: first for owner in owners},
        best={},
        scores={},
        best_round={},
        teacher=copy_state(teacher) if method.distils and teacher is not None else None,
    )
    for site in sites:
        if run.teacher is not None:
            run.ledger.record(0, "down", site.name, "teacher", run.teacher)
        if method.federated:
            run.ledger.record(0, "down", site.name, "student", first)
    return run


def _collect(run: _Run, method: Method, updates: Sequence[Update], number: int) -> None:
    """Steps 3 to 5 of figure 1: collect, average, send back."""
    if not method.federated:
        for update in updates:
            check_finite(update.state, f"The student of client {update.client}")
            run.students[update.client] = update.state
        return
    run.students[""] = server_step(run.students[""], updates)
    teachers = [update.teacher_state for update in updates if update.teacher_state is not None]
    if teachers:
        run.teacher = _weighted(teachers, [update.n_examples for update in updates])
    for update in updates:
        run.ledger.record(number, "up", update.client, "student", update.state)
        if update.teacher_state is not None:
            run.ledger.record(number, "up", update.client, "teacher", update.teacher_state)
    for update in updates:
        run.ledger.record(number, "down", update.client, "student", run.students[""])
        if update.teacher_state is not None and run.teacher is not None:
            run.ledger.record(number, "down", update.client, "teacher", run.teacher)


def _validate(plan: _Plan, run: _Run, updates: Sequence[Update], number: int) -> None:
    """Score the students of a round on validation volumes only, and keep the best so far."""
    network = build_network(plan.settings, 0)
    scores: dict[str, list[float]] = {owner: [] for owner in run.students}
    for site, update in zip(plan.sites, updates, strict=True):
        owner = plan.owner(site)
        load_state(network, run.students[owner])
        line = _scores(network, site.validation)
        scores[owner].append(line["validation"])
        run.history.append({"round": number, "client": site.name, **line, **update.metrics})
    for owner, values in scores.items():
        score = float(np.mean(values))
        if owner not in run.best or is_better(score, run.scores[owner]):
            run.best[owner], run.scores[owner], run.best_round[owner] = run.students[owner], score, number


def _scores(network: TappedNetwork, cases: Sequence[Case]) -> dict[str, float]:
    dice = grid_dice(network, cases)
    return {"validation": mean_dice(dice), **class_columns(dice)}


def _use_teacher(
    method: Method, sites: Sequence[SiteData], teacher: TappedNetwork, advance: Progress
) -> FederationResult:
    """Teacher only: send it once, and use it as it is."""
    wall, cpu = time.perf_counter(), time.process_time()
    state, ledger, history = copy_state(teacher), Ledger(), []
    for site in sites:
        ledger.record(0, "down", site.name, "teacher", state)
        history.append({"round": 0, "client": site.name, **_scores(teacher, site.validation)})
    advance(1, "teacher validated")
    return FederationResult(
        method=method,
        models={site.name: state for site in sites},
        best_round={site.name: 0 for site in sites},
        history=pd.DataFrame(history),
        ledger=ledger,
        seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
        steps=0,
    )


class _Stopped(Exception):
    """Ends a client's thread when another one, or the caller, failed."""


def _side_by_side(
    work: Callable[[SiteData, Progress], T], sites: Sequence[SiteData], workers: int | None, advance: Progress
) -> list[T]:
    """Work on every site in threads, results in the order of the sites; progress goes to the calling thread.

    When one fails, or the caller is interrupted, the others stop at their next step, and the first error in the
    order of the sites is raised.
    """
    count = min(default_workers() if workers is None else workers, len(sites))
    if count <= 1:
        return [work(site, advance) for site in sites]
    notes: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    stop = threading.Event()

    def report(steps: int, note: str) -> None:
        if stop.is_set():
            raise _Stopped
        notes.put((steps, note))

    def start(site: SiteData) -> T:
        report(0, "")
        return work(site, report)

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(start, site) for site in sites]
        for future in futures:
            future.add_done_callback(lambda done: notes.put((0, "")))
        try:
            while not all(future.done() for future in futures) or not notes.empty():
                steps, note = notes.get()
                if steps:
                    advance(steps, note)
                if any(future.done() and future.exception() is not None for future in futures):
                    break
        finally:
            stop.set()  # after the loop nobody runs, or somebody failed
    errors = [future.exception() for future in futures]
    real = [error for error in errors if error is not None and not isinstance(error, _Stopped)]
    if real:
        raise real[0]
    return [future.result() for future in futures]


def _fingerprint(
    settings: Settings,
    row: str,
    sites: Sequence[SiteData],
    teacher: TappedNetwork | None,
    seed: int,
    teacher_update: TeacherUpdate,
) -> str:
    data = {}
    for site in sites:
        tensors = {"images": site.labelled_images, "labels": site.labels, "unlabelled": site.unlabelled_images}
        for index, case in enumerate(site.validation):
            tensors[f"validation {index}"] = case.image
        data[site.name] = state_hash(tensors)
    parts = {
        "settings": dataclasses.asdict(settings),
        "row": row,
        "data": data,
        "teacher": state_hash(teacher.state_dict()) if teacher is not None else "",
        "seed": seed,
        "teacher_update": dataclasses.asdict(teacher_update),
        "code": code_hash(FEDERATION_CODE),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _save(path: Path, fingerprint: str, run: _Run) -> None:
    """One file, replaced in one step, holds the whole run after a round."""
    owners = sorted(run.students)
    tensors: State = {}
    for index, owner in enumerate(owners):
        tensors |= {f"student/{index}/{name}": tensor for name, tensor in run.students[owner].items()}
        tensors |= {f"best/{index}/{name}": tensor for name, tensor in run.best[owner].items()}
    tensors |= {f"teacher/0/{name}": tensor for name, tensor in (run.teacher or {}).items()}
    facts = {
        "fingerprint": fingerprint,
        "owners": owners,
        "scores": [None if np.isnan(run.scores[owner]) else run.scores[owner] for owner in owners],
        "best_round": [run.best_round[owner] for owner in owners],
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


def _resume(path: Path, fingerprint: str) -> _Run | None:
    """The run in a checkpoint; None when there is none or it is damaged, and the run begins again."""
    if not path.is_file():
        return None
    try:
        tensors, facts = load_checkpoint(path)
    except CheckpointError:
        path.unlink(missing_ok=True)
        return None
    if facts.get("fingerprint") != fingerprint:
        raise FederationError(
            f"{path} belongs to a run with other settings, data, teacher, seed or code: choose another folder, or "
            "delete the file to begin again."
        )
    parts: dict[str, dict[int, State]] = {"student": {}, "best": {}, "teacher": {}}
    for key, tensor in tensors.items():
        part, index, name = key.split("/", 2)
        parts[part].setdefault(int(index), {})[name] = tensor
    owners = facts["owners"]
    nan = float("nan")
    return _Run(
        students={owner: parts["student"][index] for index, owner in enumerate(owners)},
        best={owner: parts["best"][index] for index, owner in enumerate(owners)},
        scores={o: nan if score is None else score for o, score in zip(owners, facts["scores"], strict=True)},
        best_round=dict(zip(owners, facts["best_round"], strict=True)),
        teacher=parts["teacher"].get(0),
        finished=facts["finished"],
        history=[{k: nan if v is None else v for k, v in line.items()} for line in facts["history"]],
        ledger=Ledger(facts["ledger"]),
        seconds=facts["seconds"],
        cpu_seconds=facts["cpu_seconds"],
    )
