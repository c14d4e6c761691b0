"""The federation: rounds of client updates and server steps, in one process."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fedkd_utils import transforms
from fedkd_utils.checkpoints import Run, fingerprint, resume, save_run
from fedkd_utils.clients import (
    FederationError,
    Update,
    check_site,
    client_update,
    kept_part,
    local_names,
    signals_for,
    steps_per_round,
)
from fedkd_utils.compression import codec_named
from fedkd_utils.methods import Method, row_named
from fedkd_utils.networks import (
    State,
    TappedNetwork,
    build_network,
    build_student,
    check_finite,
    class_axes,
    copy_state,
    load_state,
    place,
)
from fedkd_utils.parallel import once_a_thread, side_by_side
from fedkd_utils.seeds import generator_of, seed_of
from fedkd_utils.server import FedAvg, Ledger, RunningMean, group_step, private_step
from fedkd_utils.settings import Settings
from fedkd_utils.teacher import FROZEN, TeacherSignals, TeacherUpdate, blend
from fedkd_utils.training import (
    Augmentation,
    MakeOptimiser,
    Progress,
    adamw,
    class_columns,
    grid_dice,
    is_better,
    mean_dice,
)
from fedkd_utils.transforms import Case, SiteData

#: Where a row mixes: the shares of the average in a client's next student that it may choose from.
MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class FederationResult:
    """A finished run: the model chosen on validation for each client, and how it came about."""

    method: Method
    models: dict[str, State]  # by client; one and the same state when students are averaged and not mixed
    best_round: dict[str, int]  # by client
    history: pd.DataFrame  # one line per round and client: losses, validation Dice (mean and by cartilage), seconds
    ledger: Ledger
    seconds: float  # wall time, over all sittings of a resumed run
    cpu_seconds: float
    steps: int  # optimiser steps of all clients

    def validation_by_round(self) -> pd.Series:
        """Mean validation Dice over the clients, by round."""
        return self.history.groupby("round")["validation"].mean()


def total_progress(
    settings: Settings, row: str, sites: Sequence[SiteData], teacher_update: TeacherUpdate = FROZEN
) -> int:
    """The steps that ``progress`` of :func:`run_federation` gets in all."""
    method = row_named(row)
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
    teacher_classes: tuple[int, ...] | None = None,
    augmentation: Augmentation | None = transforms.augment,
    make_optimiser: MakeOptimiser = adamw,
    workers: int | None = None,
    progress: Progress | None = None,
) -> FederationResult:
    """Run a row of the comparison from the first round to the last, or on from where it was stopped.

    Clients train side by side in threads; the numbers do not depend on how many there are (``workers``). "Local
    only" is the same loop without averaging. The model is chosen by its mean validation Dice: over all clients
    when students are averaged, by each client for itself when they are not, or are mixed.

    Args:
        folder: where the run leaves a checkpoint after each round; a run that was killed goes on from there and
            ends with the same numbers. Nothing is kept when not given.
        teacher_classes: those that the teacher was taught (:attr:`teacher.Teacher.classes`); None: all.
        progress: gets :func:`total_progress` steps, those of finished rounds at once, in the calling thread.

    Raises:
        ValueError: an unknown row.
        FederationError: no client, two of one name, a client that lacks volumes, no teacher, or a
            checkpoint of another run in ``folder``.
        TrainingError: the loss of a client is no longer finite.
    """
    method = _check_run(row, settings, sites, teacher, teacher_update)
    settings = method.adapt(settings)
    sites = sorted(sites, key=lambda site: site.name)
    advance: Progress = progress or (lambda steps, note: None)
    if method.objective is None:
        assert teacher is not None
        return _use_teacher(method, sites, teacher, advance)
    path = folder / "round.safetensors" if folder is not None else None
    told = teacher if method.needs_teacher else None
    mark = fingerprint(settings, row, sites, told, seed, teacher_update, teacher_classes)
    run = resume(path, mark) if path is not None else None
    if run is None:
        run = begin(settings, method, sites, teacher, seed)
    elif run.finished:
        advance(run.finished * len(sites) * steps_per_round(settings), f"round {run.finished} read from its checkpoint")
    plan = Plan(
        settings, method, sites, seed, teacher_update, teacher_classes, augmentation, make_optimiser, workers, advance
    )
    signals: dict[str, TeacherSignals] = {}
    while run.finished < settings.rounds:
        wall, cpu = time.perf_counter(), time.process_time()
        signals = _play_round(plan, run, signals)
        run.seconds += time.perf_counter() - wall
        run.cpu_seconds += time.process_time() - cpu
        if path is not None:
            save_run(path, mark, run)
    key = {site.name: plan.model_key(site) for site in sites}
    return FederationResult(
        method=method,
        models={name: run.best[key[name]] for name in key},
        best_round={name: run.best_round[key[name]] for name in key},
        history=pd.DataFrame(run.history),
        ledger=run.ledger,
        seconds=run.seconds,
        cpu_seconds=run.cpu_seconds,
        steps=settings.rounds * steps_per_round(settings) * len(sites),
    )


@dataclass(frozen=True)
class Plan:
    """All that stays the same during a run."""

    settings: Settings
    method: Method
    sites: Sequence[SiteData]  # in the order of their names
    seed: int
    teacher_update: TeacherUpdate
    teacher_classes: tuple[int, ...] | None
    augmentation: Augmentation | None
    make_optimiser: MakeOptimiser
    workers: int | None
    advance: Progress

    @functools.cached_property
    def axes(self) -> dict[str, int]:
        """The tensors of the student's last layer, with the axis of the classes."""
        return class_axes(build_student(self.settings, 0))

    def owner(self, run: Run, site: SiteData) -> str:
        """The key of the student with which a client starts a round: "" when all start with the same."""
        return site.name if site.name in run.students else ""

    def model_key(self, site: SiteData) -> str:
        """The key of the model that is chosen for a client: "" when all have the same."""
        return "" if self.method.shares_model else site.name

    def model(self, run: Run, site: SiteData) -> State:
        """The model of a client after a round: the average, with its own layers where it keeps some."""
        shared = run.students["" if self.method.groups else self.owner(run, site)]
        return {**shared, **kept_part(run.kept.get(site.name, {}), "own")}


def _play_round(plan: Plan, run: Run, signals: dict[str, TeacherSignals]) -> dict[str, TeacherSignals]:
    """Steps 2 to 5 of figure 1, once; returns the teacher's signals for the next round."""
    settings, number = plan.settings, run.finished + 1
    teacher: TappedNetwork | None = None
    looking = {site.name: 0.0 for site in plan.sites}
    if run.teacher is not None:
        moves = plan.teacher_update.kind == "hand_over" and run.finished >= max(plan.teacher_update.warm_up_rounds, 1)
        if moves:
            run.teacher = blend(run.teacher, run.students[""], plan.teacher_update.rate)
        teacher = build_network(settings, 0).eval().requires_grad_(False)
        load_state(teacher, run.teacher, "The teacher")
        place(teacher, plan.sites[0].labelled_images.device)
        if plan.teacher_update.kind != "release" and (moves or not signals):
            signals, seconds = _look(plan, teacher)
            if moves or not run.finished:  # else it was looked at before a kill, and counted then
                looking = seconds

    def train(site: SiteData, report: Progress) -> Update:
        return client_update(
            run.students[plan.owner(run, site)],
            site,
            plan.method,
            settings,
            number,
            plan.seed,
            teacher=teacher,
            signals=signals.get(site.name),
            kept=run.kept.get(site.name),
            teacher_update=plan.teacher_update,
            teacher_classes=plan.teacher_classes,
            augmentation=plan.augmentation,
            make_optimiser=plan.make_optimiser,
            progress=report,
        )

    with closing(side_by_side(train, plan.sites, plan.workers, plan.advance)) as updates:
        metrics = collect(plan, run, updates, number)
    _validate(plan, run, metrics, looking, number)
    run.finished = number
    return signals


def _look(plan: Plan, teacher: TappedNetwork) -> tuple[dict[str, TeacherSignals], dict[str, float]]:
    """The teacher's signals for every client, and the CPU seconds that each client spends on them."""

    def look(site: SiteData, report: Progress) -> tuple[TeacherSignals, float]:
        start = time.thread_time()
        said = signals_for(teacher, site, plan.settings, plan.seed, report, plan.teacher_classes)
        return said, time.thread_time() - start

    with closing(side_by_side(look, plan.sites, plan.workers, plan.advance)) as looked:
        by_client = dict(zip((site.name for site in plan.sites), looked, strict=True))
    return {name: said for name, (said, _) in by_client.items()}, {name: s for name, (_, s) in by_client.items()}


def _check_run(
    row: str,
    settings: Settings,
    sites: Sequence[SiteData],
    teacher: TappedNetwork | None,
    teacher_update: TeacherUpdate,
) -> Method:
    method = row_named(row)
    names = [site.name for site in sites]
    if not names or len(set(names)) < len(names):
        raise FederationError(f"A federation needs clients with names of their own, not {names}.")
    if method.pooled and len(sites) > 1:
        raise FederationError(f"{method.title!r} trains on one site with everything: see shares.pooled_site.")
    for site in sites:
        check_site(site, method)
    if method.needs_teacher and teacher is None:
        raise FederationError(f"{method.title!r} needs a teacher: get one with teacher.teacher_for.")
    check_messages(method, method.adapt(settings), sites, teacher_update)
    shrunk = method.adapt(settings).student_shrink != 1
    if shrunk and (method.starts_at_teacher or (method.distils and teacher_update.kind != "frozen")):
        raise FederationError(
            f"{method.title!r} mixes the weights of teacher and student, so student_shrink must be 1 and not "
            f"{method.adapt(settings).student_shrink}."
        )
    return method


def check_messages(
    method: Method, settings: Settings, sites: Sequence[SiteData], teacher_update: TeacherUpdate
) -> None:
    """Refuse compression and noise where they would not do what they say."""
    private = settings.clip_norm is not None
    if settings.compression is not None:
        codec_named(settings.compression)
    if not method.federated and (private or settings.compression is not None):
        raise FederationError(f"{method.title!r} sends no update: leave compression and clip_norm at None.")
    if method.mixes and (private or settings.compression is not None):
        raise FederationError(
            f"{method.title!r} starts each client at a mixture that the server does not know, so no change can be "
            "counted from there: leave compression and clip_norm at None."
        )
    if private or settings.compression is not None:
        network = build_student(settings, 0)
        if any(name.endswith("running_var") for name in set(network.state_dict()) - local_names(method, network)):
            raise FederationError(
                "Batch statistics must not be clipped, blurred or rounded: a variance may turn negative. Leave "
                'compression and clip_norm at None, or set normalisation to "instance" or "group".'
            )
    if (settings.clip_norm is not None and not settings.clip_norm > 0) or (settings.noise_multiplier or 0.0) < 0:
        raise FederationError(
            "clip_norm must be above 0 and noise_multiplier at least 0, not "
            f"{settings.clip_norm}, {settings.noise_multiplier}."
        )
    if settings.noise_multiplier is not None and not private:
        raise FederationError("noise_multiplier needs clip_norm: what is not clipped may change by any amount.")
    if private and (method.groups or teacher_update.kind == "release"):
        raise FederationError(f"{method.title!r} sends what clip_norm does not reach: groups, or a trained teacher.")
    partial = [site.name for site in sites if site.class_shares]
    if private and partial:
        raise FederationError(
            f"clip_norm counts all clients the same, but client {partial[0]} does not draw every class: leave it out."
        )


def begin(
    settings: Settings, method: Method, sites: Sequence[SiteData], teacher: TappedNetwork | None, seed: int
) -> Run:
    """A run before its first round, with what is sent to each client before it in the ledger."""
    network = build_student(settings, seed_of(seed, "student"))
    local = local_names(method, network)
    first = copy_state(teacher) if method.starts_at_teacher and teacher is not None else copy_state(network)
    first = {name: tensor for name, tensor in first.items() if name not in local}
    owners = [""] * method.federated + [site.name for site in sites] * (method.groups or not method.federated)
    run = Run(
        students={owner: first for owner in owners},
        teacher=copy_state(teacher) if method.distils and teacher is not None else None,
    )
    for site in sites:
        if method.needs_teacher and teacher is not None:
            run.ledger.record(0, "down", site.name, "teacher", teacher.state_dict())
        if method.federated and not method.starts_at_teacher:  # else the teacher is the first student
            run.ledger.record(0, "down", site.name, "student", first)
    return run


def collect(plan: Plan, run: Run, updates: Iterable[Update], number: int) -> dict[str, dict[str, float]]:
    """Steps 3 to 5 of figure 1: collect, average, send back; returns the metrics of each client.

    Updates come in the order of the clients' names, and each is let go when the next one comes, so that a plain
    average takes the same memory for any number of clients. Clipping, groups and mixtures need all of them at once.
    """
    settings, before = plan.settings, run.students.get("", {})
    together = settings.clip_norm is not None or plan.method.groups or plan.method.mixes
    running = FedAvg(plan.axes, before) if plan.method.federated and settings.clip_norm is None else None
    teachers, held = RunningMean(), list[Update]()
    metrics: dict[str, dict[str, float]] = {}
    kept: dict[str, State] = {}
    for update in updates:
        metrics[update.client] = dict(update.metrics)
        if update.kept:
            kept[update.client] = update.kept
        if not plan.method.federated:
            check_finite(update.state, f"The student of client {update.client}")
            run.students[update.client] = update.state
            continue
        if together:
            held.append(update)
        if running is not None:
            running.add(update)
        run.ledger.record(number, "up", update.client, "student", update.sent)
        if update.teacher_state is not None:
            teachers.add(update.teacher_state, update.n_examples)
            run.ledger.record(number, "up", update.client, "teacher", update.teacher_state)
    run.kept = kept
    if not plan.method.federated:
        return metrics
    if running is not None:
        run.students[""] = running.average()
    elif settings.clip_norm is not None:
        noise, drawn = settings.noise_multiplier or 0.0, generator_of(plan.seed, "privacy", number)
        run.students[""] = private_step(before, held, settings.clip_norm, noise, drawn)
    if plan.method.groups:
        run.students |= group_step(held, plan.seed, number, plan.axes)
    if teachers.weight:
        run.teacher = teachers.mean()
    for site in plan.sites:
        run.ledger.record(number, "down", site.name, "student", run.students[plan.owner(run, site)])
        if teachers.weight and run.teacher is not None:
            run.ledger.record(number, "down", site.name, "teacher", run.teacher)
    if plan.method.mixes:
        for update in held:
            wall, cpu = time.perf_counter(), time.thread_time()
            run.students[update.client], share = _mix(plan, run.students[""], update)
            metrics[update.client]["common_share"] = share
            metrics[update.client]["seconds"] += time.perf_counter() - wall  # a client's work, as its steps are
            metrics[update.client]["cpu_seconds"] += time.thread_time() - cpu
    return metrics


def _mix(plan: Plan, average: State, update: Update) -> tuple[State, float]:
    """The mixture of the average with a client's own student that its validation volumes like best; and its share.

    (After APFL, Deng et al., 2020, arXiv 2003.13461; there a client keeps a second student for itself and learns the
    share, here its one student is both sent and mixed, and one of :data:`MIXTURES` is chosen anew in every round.)
    Of equals it is the smallest share; where nothing can be scored it is the average. What a class that the client
    never draws looks like it takes from the others whatever the share.
    """
    site = next(site for site in plan.sites if site.name == update.client)
    network = place(build_student(plan.settings, 0), site.labelled_images.device)
    best, chosen, highest = average, 1.0, float("nan")
    for share in MIXTURES:
        mixed = blend(update.state, average, share)
        for c in (c for c, drawn in update.class_shares.items() if drawn == 0):
            for name, axis in plan.axes.items():
                mixed[name].select(axis, c).copy_(average[name].select(axis, c))
        load_state(network, mixed)
        score = scores_on(network, site.validation)["validation"]
        if is_better(score, highest):
            best, chosen, highest = mixed, share, score
    return best, chosen


def _validate(
    plan: Plan, run: Run, metrics: Mapping[str, Mapping[str, float]], looking: Mapping[str, float], number: int
) -> None:
    """Score the students of a round on validation volumes only, and keep the best so far."""
    network = once_a_thread(lambda: place(build_student(plan.settings, 0), plan.sites[0].labelled_images.device))

    def score(site: SiteData, report: Progress) -> dict[str, float]:
        load_state(network(), plan.model(run, site))
        return scores_on(network(), site.validation)

    own: dict[str, float] = {}
    with closing(side_by_side(score, plan.sites, plan.workers, plan.advance)) as lines:
        for site, line in zip(plan.sites, lines, strict=True):
            own[site.name] = line["validation"]
            times = {"teacher_cpu_seconds": looking[site.name]} if plan.method.distils else {}
            run.history.append({"round": number, "client": site.name, **line, **metrics[site.name], **times})
    choose(plan, run, own, number)


def choose(plan: Plan, run: Run, scores: Mapping[str, float], number: int) -> None:
    """Keep the students of a round where their validation Dice, by client, is the best so far.

    Where students are averaged, the mean over the clients decides, else every client for itself; so it does where each
    makes its own mixture, unless it has labels of nothing that can be scored (NaN).
    """
    known = [score for score in scores.values() if not np.isnan(score)]
    together = float(np.mean(known)) if known else float("nan")
    for site in plan.sites:
        averaged = plan.method.federated and (not plan.method.mixes or np.isnan(scores[site.name]))
        key, score = plan.model_key(site), together if averaged else scores[site.name]
        if key not in run.best or is_better(score, run.scores[key]):
            run.best[key], run.scores[key], run.best_round[key] = plan.model(run, site), score, number


def scores_on(network: TappedNetwork, cases: Sequence[Case]) -> dict[str, float]:
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
        history.append({"round": 0, "client": site.name, **scores_on(teacher, site.validation)})
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
