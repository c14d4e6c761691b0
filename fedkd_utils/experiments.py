"""Experiments: one row, setting and seed -> one result on disk, made once; and the table that compares them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from fedkd_utils import cohorts, shares, transforms
from fedkd_utils.checkpoints import FEDERATION_CODE
from fedkd_utils.clients import trust_in
from fedkd_utils.device import compute_device, repeatable, surroundings
from fedkd_utils.federation import FederationResult, run_federation, total_progress
from fedkd_utils.files import write_atomically
from fedkd_utils.live import progress_bar
from fedkd_utils.methods import ROWS, Method, row_named
from fedkd_utils.networks import (
    CheckpointError,
    State,
    TappedNetwork,
    build_network,
    build_student,
    load_checkpoint,
    load_state,
    place,
    save_checkpoint,
)
from fedkd_utils.parallel import once_a_thread, side_by_side, threads_that_fit
from fedkd_utils.provenance import code_hash, files_hash, state_hash, versions
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES, Settings, any_contrast, cache_folder
from fedkd_utils.site_folder import Cohort, Site
from fedkd_utils.teacher import FROZEN, Teacher, TeacherUpdate, teacher_on
from fedkd_utils.training import Progress, TrainingError, evaluate_cases
from fedkd_utils.transforms import SiteData

T = TypeVar("T")

_CODE = (*FEDERATION_CODE, "experiments")


@dataclass(frozen=True)
class Result:
    """All numbers of one run; what the result file holds."""

    row: str
    setting: str
    seed: int
    settings: dict[str, Any]
    versions: dict[str, str]
    inputs: str  # hash of settings, cohort, teacher, code and seed
    best_round: dict[str, int]  # by client
    history: list[dict[str, Any]]  # per round and client: losses, validation Dice, seconds
    test: list[dict[str, Any]]  # per client, case, class and component choice: metrics in mm on the native grid
    messages: list[dict[str, Any]]  # the ledger
    bytes_down: int
    bytes_up: int
    wall_seconds: float  # of training and validation; the teacher's and the test's are not in it
    cpu_seconds: float
    steps: int
    teacher: dict[str, Any] = field(default_factory=dict)  # the pretrained one: seconds, Dice, hash; or empty

    def history_frame(self) -> pd.DataFrame:
        """Per round and client: losses, validation Dice (mean and by cartilage), seconds."""
        return pd.DataFrame(self.history)

    def test_frame(self) -> pd.DataFrame:
        """Per client, case, class and component choice: the metrics, missing ones NaN."""
        frame = pd.DataFrame(self.test)
        numbers = [name for name in frame.columns if name not in ("client", "case", "cartilage", "components", "empty")]
        return frame.astype({name: float for name in numbers} | {"class": int})


def load_clients(cohort: Cohort, settings: Settings) -> list[SiteData]:
    """All clients of a cohort on the grid, in memory; read side by side, which changes no number."""
    with ThreadPoolExecutor(threads_that_fit()) as pool:
        return list(pool.map(transforms.load_site, cohort.clients, repeat(settings)))


def run_row(
    row: str,
    setting: str,
    seed: int,
    settings: Settings,
    root: Path | None = None,
    *,
    teacher_update: TeacherUpdate = FROZEN,
    on_disk: Settings | None = None,
    cohort_seed: int = 0,
    sites: Sequence[SiteData] | None = None,
    workers: int | None = None,
    show_progress: bool = True,
    keep: bool = True,
) -> Result:
    """Run a row once and keep it: the next call with the same inputs reads the result file.

    Under ``<root>/runs`` every run has a folder with ``result.json``, ``model.safetensors`` (the students chosen on
    validation) and, while it is under way, the checkpoint it resumes from. A damaged result is made again.

    Args:
        root: the cache folder, :func:`settings.cache_folder` when not given.
        on_disk: settings of a larger cohort, of which each client uses what ``settings`` says (:func:`shares.share`).
        cohort_seed: whose knees, of repository and clients (:func:`cohorts.make_cohort`).
        sites: the clients of this seed in memory (:func:`load_clients`), to load them once for many rows.
        show_progress: a bar in Jupyter or on a terminal.
        keep: leave result and models in the cache; else only the checkpoint, until :func:`forget`.

    Raises:
        ValueError: an unknown row.
    """
    ready = _ready(row, setting, seed, settings, root, on_disk, show_progress, cohort_seed)
    return _run(
        ready,
        row,
        setting,
        seed,
        root,
        teacher_update=teacher_update,
        sites=sites,
        workers=workers,
        show_progress=show_progress,
        keep=keep,
    )


def run_sites(
    row: str,
    cohort: Cohort,
    settings: Settings,
    seed: int = 0,
    root: Path | None = None,
    *,
    workers: int | None = None,
    show_progress: bool = True,
) -> Result:
    """Run a row on a reader's own sites (:func:`sites.open_sites`) with all their volumes, and keep it like any run.

    The teacher learns from the cohort's repository; when that is empty, and in a row of an any-contrast teacher, from
    made knees of random contrasts. A row that chooses its teacher chooses between these two. The pooled row has the
    labelled volumes of all clients.

    Raises:
        ValueError: an unknown row, one whose teacher needs the clients' sequences or new contrasts of the repository's
            images, which is done for made knees only, or a client without labelled volumes to train, validate or
            test on.
    """
    method = row_named(row)
    contrast = method.adapt(settings).teacher_contrast
    if contrast == "protocols":
        raise ValueError(
            f"{method.title!r} needs the sequences of the scanners, which volumes do not hold: run teacher_random, "
            "finetune_random or chosen_finetune."
        )
    if contrast == "recontrasted":
        raise ValueError(
            f"{method.title!r} changes the contrast of made knees only: run teacher_random, finetune_random or "
            "chosen_finetune."
        )
    for site in cohort.clients:  # now, and not after the teacher's training
        for part in ("training", "validation", "test"):
            if not getattr(site, part):
                raise ValueError(
                    f"{site.folder}: no labelled {part} volume. Name some in dataset.json, or run `prepare`."
                )
    settings = method.for_run(replace(settings, clients=len(cohort.clients)))
    own = cohort.repository if cohort.repository.training and contrast != "random" else None
    if method.needs_teacher and own is None:
        settings = any_contrast(settings)
    teachers = []
    if method.needs_teacher:
        teachers = [_teacher(settings, cohort.setting, seed, root, show_progress, own)]
    if method.chooses_teacher and own is not None:
        teachers.append(_teacher(any_contrast(settings), cohort.setting, seed, root, show_progress))
    if method.pooled:
        cohort = replace(cohort, clients=tuple(replace(site, unlabelled=()) for site in cohort.clients))
    ready = _Ready(method, settings, cohort, tuple(teachers))
    return _run(ready, row, cohort.setting, seed, root, workers=workers, show_progress=show_progress)


def _run(
    ready: _Ready,
    row: str,
    setting: str,
    seed: int,
    root: Path | None,
    *,
    teacher_update: TeacherUpdate = FROZEN,
    sites: Sequence[SiteData] | None = None,
    workers: int | None = None,
    show_progress: bool = True,
    keep: bool = True,
) -> Result:
    method, settings, cohort, base = ready.method, ready.settings, ready.cohort, root or cache_folder()
    inputs = _inputs(row, setting, seed, settings, cohort, ready.teachers, teacher_update)
    folder = base / "runs" / _folder_name(settings.name, setting, row, seed, inputs)
    label = f"{method.title}, {setting}"
    stored = _stored(folder, inputs)
    if stored is not None:
        with progress_bar(1, label) if show_progress else nullcontext(_silent) as advance:
            advance(1, "read from its file")
        return stored
    data = list(sites) if sites is not None else load_clients(cohort, settings)
    trained = _trained_on(ready, data)
    teacher = _chosen_teacher(ready, trained)
    total = total_progress(settings, row, trained, teacher_update) + len(data)
    bar = progress_bar(total, label) if show_progress else nullcontext(_silent)
    with repeatable(), bar as advance:
        outcome = run_federation(
            settings,
            row,
            trained,
            teacher.network if teacher is not None else None,
            seed,
            folder,
            teacher_update=teacher_update,
            teacher_classes=teacher.classes if teacher is not None else None,
            workers=workers,
            progress=advance,
        )
        if method.pooled:
            outcome = for_all(outcome, [site.name for site in data])
        test = _test(outcome, data, settings, workers, advance)
    for other in ready.teachers:
        if other is not teacher:
            for site in trained:
                outcome.ledger.record(0, "down", site.name, "teacher not chosen", other.network.state_dict())
    result = Result(
        row=row,
        setting=setting,
        seed=seed,
        settings=dataclasses.asdict(settings),
        versions=versions(),
        inputs=inputs,
        best_round=outcome.best_round,
        history=outcome.history.to_dict("records"),
        test=test,
        messages=outcome.ledger.entries,
        bytes_down=outcome.ledger.total("down"),
        bytes_up=outcome.ledger.total("up"),
        wall_seconds=outcome.seconds,
        cpu_seconds=outcome.cpu_seconds,
        steps=outcome.steps,
        teacher=_facts(teacher) if teacher is not None else {},
    )
    if not keep:
        return result
    save_models(folder / "model.safetensors", outcome, inputs, settings)
    write_atomically(folder / "result.json", result_json(result))
    (folder / "round.safetensors").unlink(missing_ok=True)
    return result


def _facts(teacher: Teacher) -> dict[str, Any]:
    weights = state_hash(teacher.network.state_dict())
    return {"seconds": teacher.seconds, "validation": teacher.best_dice, "weights_sha256": weights}


def _chosen_teacher(ready: _Ready, sites: Sequence[SiteData]) -> Teacher | None:
    """The teacher of a row; where it may choose, the one with the higher mean Dice on the clients' few labels."""
    if len(ready.teachers) < 2:
        return ready.teachers[0] if ready.teachers else None
    return max(
        ready.teachers,
        key=lambda teacher: np.mean([trust_in(teacher.network, site, teacher.classes) for site in sites]),
    )


@dataclass(frozen=True)
class _Ready:
    """What a run of a row needs before any volume is loaded."""

    method: Method
    settings: Settings  # those of the row
    cohort: Cohort
    teachers: tuple[Teacher, ...]  # those that the row may use: none, one, or the two of which it chooses


def _ready(
    row: str,
    setting: str,
    seed: int,
    settings: Settings,
    root: Path | None,
    on_disk: Settings | None,
    show_progress: bool,
    cohort_seed: int = 0,
) -> _Ready:
    method = row_named(row)
    settings = method.for_run(settings)
    cohort = shares.share(cohorts.make_cohort(on_disk or settings, setting, cohort_seed, root), settings, seed)
    contrasts = [settings.teacher_contrast] if method.needs_teacher else []
    if method.chooses_teacher:
        contrasts.append("random")
    choices = [replace(settings, teacher_contrast=contrast) for contrast in contrasts]
    teachers = (_teacher(s, setting, seed, root, show_progress, cohort_seed=cohort_seed) for s in choices)
    return _Ready(method, settings, cohort, tuple(teachers))


def _training_sites(ready: _Ready, sites: Sequence[SiteData]) -> Sequence[SiteData]:
    """Where a row trains: at the clients, or at one site with all their volumes."""
    return [shares.pooled_site(ready.cohort, ready.settings)] if ready.method.pooled else sites


def _trained_on(ready: _Ready, sites: Sequence[SiteData]) -> Sequence[SiteData]:
    """The same with its volumes on the device that computes."""
    return [site.to(compute_device()) for site in _training_sites(ready, sites)]


def validated(
    row: str,
    setting: str,
    seed: int,
    settings: Settings,
    root: Path | None = None,
    *,
    sites: Sequence[SiteData] | None = None,
    workers: int | None = None,
) -> float:
    """The mean validation Dice of a row after its best round; no test volume is looked at. Nothing is kept.

    It chooses learning rates. A loss that is no longer finite counts as NaN.
    """
    ready = _ready(row, setting, seed, settings, root, None, False)
    data = list(sites) if sites is not None else load_clients(ready.cohort, ready.settings)
    try:
        with repeatable():
            trained = _trained_on(ready, data)
            teacher = _chosen_teacher(ready, trained)
            network = teacher.network if teacher is not None else None
            outcome = run_federation(ready.settings, row, trained, network, seed, workers=workers)
    except (TrainingError, CheckpointError):
        return float("nan")
    history = outcome.history.set_index(["client", "round"])["validation"]
    return float(np.mean([history[client, chosen] for client, chosen in outcome.best_round.items()]))


def timed(row: str, setting: str, settings: Settings, root: Path | None = None) -> pd.DataFrame:
    """The history of a row on the first two clients of a cohort, one after the other on the CPU; for its seconds."""
    ready = _ready(row, setting, 0, settings, root, None, False)
    trained = _training_sites(ready, load_clients(ready.cohort, ready.settings))[:2]
    teacher = _chosen_teacher(ready, trained)
    network = teacher.network if teacher is not None else None
    return run_federation(ready.settings, row, trained, network, 0, workers=1).history


def _silent(steps: int, note: str) -> None:
    return None


def for_all(outcome: FederationResult, names: Sequence[str]) -> FederationResult:
    """A result of one site as that of several, which all use its model."""
    (model,), (best_round,) = outcome.models.values(), outcome.best_round.values()
    return replace(outcome, models=dict.fromkeys(names, model), best_round=dict.fromkeys(names, best_round))


def _teacher(
    settings: Settings,
    setting: str,
    seed: int,
    root: Path | None,
    show_progress: bool,
    repository: Site | None = None,
    cohort_seed: int = 0,
) -> Teacher:
    """The teacher of a seed: runs of several seeds differ in teacher, labelled volumes, initial student and batches.

    It learns from ``repository``, or from the course's own through ``settings.teacher_contrast``.
    """
    with progress_bar(settings.teacher_steps, "Teacher") if show_progress else nullcontext(_silent) as advance:
        if repository is None:
            scanner = cohorts.teacher_scanner(settings, setting)
            repository = cohorts.make_repository(settings, scanner, cohort_seed, root)
        return teacher_on(repository, settings, seed, root, advance)


def _inputs(
    row: str,
    setting: str,
    seed: int,
    settings: Settings,
    cohort: Cohort,
    teachers: Sequence[Teacher],
    teacher_update: TeacherUpdate,
) -> str:
    paths: list[Path] = []
    for site in cohort.clients:
        for item in site.items:
            paths += [item.image] if item.label is None else [item.image, item.label]
        if ROWS[row].pooled:
            paths += [cohorts.hidden_label(item) for item in site.unlabelled]
    parts = {
        "row": row,
        "method": ROWS[row].identity(),
        "setting": setting,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "clients": [site.name for site in cohort.clients],
        "classes": [item.labelled_classes for site in cohort.clients for item in site.items],
        "splits": [
            [len(part) for part in (site.training, site.unlabelled, site.validation)] for site in cohort.clients
        ],
        "files": files_hash(paths),
        "teachers": [state_hash(teacher.network.state_dict()) for teacher in teachers],
        "teacher_update": dataclasses.asdict(teacher_update),
        "code": code_hash(_CODE),
        "surroundings": surroundings(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _test(
    outcome: FederationResult, sites: Sequence[SiteData], settings: Settings, workers: int | None, advance: Progress
) -> list[dict[str, Any]]:
    build = build_network if outcome.method.objective is None else build_student
    network = once_a_thread(lambda: place(build(settings, 0), compute_device()))

    def measure(site: SiteData, report: Progress) -> list[dict[str, Any]]:
        load_state(network(), outcome.models[site.name])
        rows = evaluate_cases(network(), site.test).to_dict("records")
        report(1, f"test volumes of {site.name}")
        return [{"client": site.name, **row} for row in rows]

    with closing(side_by_side(measure, sites, workers, advance)) as measured:
        return [row for rows in measured for row in rows]


def result_json(result: Result) -> bytes:
    """A result as JSON: NaN becomes null, the order of the lines never changes."""
    return (json.dumps(_without_nan(dataclasses.asdict(result)), indent=1, allow_nan=False) + "\n").encode()


def read_result(path: Path) -> Result:
    """The result in a file of :func:`result_json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a result; names the file and the remedy.
    """
    return read_facts(path, lambda facts: Result(**facts), "run the row")


def read_facts(path: Path, build: Callable[[dict[str, Any]], T], again: str) -> T:
    """What ``build`` makes of a JSON file; ``again`` says what a reader does when the file is no good.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not what it should be; names the file and the remedy.
    """
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged or not a result ({error}). Delete it and {again} again.") from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stored(folder: Path, inputs: str) -> Result | None:
    """A finished run; None when there is none, or its files are damaged and it has to be made again."""
    try:
        result = read_result(folder / "result.json")
        _, facts = load_checkpoint(folder / "model.safetensors")
    except (FileNotFoundError, CheckpointError, ValueError):
        return None
    return result if result.inputs == inputs and facts.get("inputs") == inputs else None


def save_models(path: Path, outcome: FederationResult, inputs: str, settings: Settings) -> None:
    """The chosen students in one file: one when all clients share it, else one per client."""
    names = sorted(outcome.models)
    first = outcome.models[names[0]]
    shared = all(outcome.models[name] is first for name in names)
    owners = names[:1] if shared else names
    tensors = {f"{i}/{name}": t for i, owner in enumerate(owners) for name, t in outcome.models[owner].items()}
    if outcome.method.objective is None:  # the models are the teacher
        settings = replace(settings, student_shrink=1)
    facts = {"inputs": inputs, "clients": names, "shared": shared, "settings": dataclasses.asdict(settings)}
    save_checkpoint(path, tensors, facts)


def load_models(path: Path) -> dict[str, State]:
    """The students of a ``model.safetensors`` by client; all the same when they were averaged and not mixed.

    Raises:
        FileNotFoundError, CheckpointError: see :func:`networks.load_checkpoint`.
    """
    tensors, facts = load_checkpoint(path)
    states: dict[int, State] = {}
    for key, tensor in tensors.items():
        index, name = key.split("/", 1)
        states.setdefault(int(index), {})[name] = tensor
    return {client: states[0 if facts["shared"] else i] for i, client in enumerate(facts["clients"])}


def open_model(path: Path, client: str | None = None) -> tuple[TappedNetwork, Settings]:
    """The network in a teacher's file or in the ``model.safetensors`` of a run, ready to segment, and its settings.

    Args:
        client: whose model, when each client of the run has its own.

    Raises:
        FileNotFoundError, CheckpointError: see :func:`networks.load_checkpoint`.
        ValueError: there is a model for each client and none was named, or there is none of this name.
    """
    state, facts = load_checkpoint(path)
    try:
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in facts["settings"].items()}
        settings = Settings(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: does not say its settings ({error}). Train it again.") from error
    names = facts.get("clients")
    if names is None:
        network = build_network(settings, 0)
    else:
        if client is None and not facts["shared"] or client is not None and client not in names:
            raise ValueError(f"{path}: has a model for each of {', '.join(names)}. Name one of them as the client.")
        network, state = build_student(settings, 0), load_models(path)[client or names[0]]
    load_state(network, state, str(path))
    return network.eval(), settings


def result_folder(result: Result, root: Path | None = None) -> Path:
    """Where :func:`run_row` keeps a result and its models."""
    name = _folder_name(result.settings["name"], result.setting, result.row, result.seed, result.inputs)
    return (root or cache_folder()) / "runs" / name


def forget(result: Result, root: Path | None = None) -> None:
    """Delete what a run left in the cache, when its result is safe elsewhere."""
    shutil.rmtree(result_folder(result, root), ignore_errors=True)


def _folder_name(profile: str, setting: str, row: str, seed: int, inputs: str) -> str:
    return f"{profile}-{setting}-{row}-seed{seed}-{inputs[:12]}"


def comparison_table(results: Iterable[Result]) -> pd.DataFrame:
    """One line per setting and row: test metrics, traffic and time, averaged over seeds.

    "Dice" is the mean over the three cartilages, "Dice largest" the same after keeping the largest components, on
    each volume's own grid; HD95 is the mean over the cases in which prediction and truth both hold the class, and
    "missing" counts the predictions in which a class that is there was not found (their distance is undefined, so
    read the two together). MB are 10^6 bytes over the whole run; seconds and steps are those of training.
    """
    results = list(results)
    if not results:
        raise ValueError("No result to compare: run a row first, with run_row.")
    lines = [_line(result) for result in results]
    frame = pd.DataFrame(lines)
    counts = frame.groupby(["setting", "row"], sort=False)["seed"].nunique()
    means = frame.drop(columns="seed").groupby(["setting", "row"], sort=False).mean()
    means.insert(0, "seeds", counts)
    order = {name: i for i, name in enumerate(ROWS)}
    table = means.reset_index()
    table = table.sort_values(
        ["setting", "row"], key=lambda column: column.map(order) if column.name == "row" else column, ascending=True
    )
    table["row"] = table["row"].map(lambda name: ROWS[name].title)
    return table.reset_index(drop=True)


def _line(result: Result) -> dict[str, Any]:
    frame = result.test_frame()
    whole, largest = frame[frame["components"] == "all"], frame[frame["components"] == "largest"]
    line: dict[str, Any] = {"setting": result.setting, "row": result.row, "seed": result.seed}
    for c in CARTILAGES:
        line[f"Dice {CLASS_NAMES[c]}"] = whole.loc[whole["class"] == c, "dice"].mean()
    return line | {
        "Dice": whole.groupby("class")["dice"].mean().mean(),
        "Dice largest": largest.groupby("class")["dice"].mean().mean(),
        "HD95 mm": largest.groupby("class")["hd95_mm"].mean().mean(),
        "missing": int((whole["empty"] == "prediction").sum()),
        "MB down": result.bytes_down / 1e6,
        "MB up": result.bytes_up / 1e6,
        "seconds": result.wall_seconds,
        "steps": result.steps,
    }
