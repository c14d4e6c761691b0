"""A hospital on the engine: the Flower ``ClientApp`` that calls the course's own client update.

Its node keeps three things in a folder of its own: the teacher, what the client carries from round to round
(``Update.kept``), and ``traffic.csv``, one line for each message that came in or went out. An engine may start a new
process for each message, so nothing else is remembered.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from fedkd_utils import site_folder, transforms
from fedkd_utils.checkpoints import data_hash
from fedkd_utils.clients import FederationError, check_site, client_update, signals_for
from fedkd_utils.device import compute_device, repeatable
from fedkd_utils.engine_messages import (
    NO_TEACHER,
    Job,
    check_job,
    facts_of,
    our_code,
    payload_bytes,
    record,
    weights_of,
)
from fedkd_utils.engine_privacy import MODS
from fedkd_utils.federation import scores_on
from fedkd_utils.networks import (
    CheckpointError,
    State,
    TappedNetwork,
    build_network,
    build_student,
    check_finite,
    load_checkpoint,
    load_state,
    save_checkpoint,
)
from fedkd_utils.provenance import state_hash
from fedkd_utils.settings import Settings
from fedkd_utils.teacher import TeacherSignals, freeze
from fedkd_utils.training import TrainingError
from fedkd_utils.transforms import SiteData

#: Jobs of which a node remembers what its client carries from round to round; of older ones it forgets it.
KEPT_JOBS = 3

OpenSite = Callable[[Context, Settings], SiteData]


def site_on_disk(context: Context, settings: Settings) -> SiteData:
    """The site in the folder that the node's configuration calls ``data``, on the grid of the settings.

    Raises:
        FederationError: the node was started without ``data``.
    """
    if "data" not in context.node_config:
        raise FederationError("This node was started without the folder of its volumes: see docs/hospital.md.")
    return transforms.load_site(site_folder.open_site(str(context.node_config["data"])), settings)


def client_app(open_site: OpenSite = site_on_disk) -> ClientApp:
    """The ``ClientApp`` of a hospital.

    Args:
        open_site: gives the volumes; those of a test, or of a notebook, may lie in memory.
    """
    app, memory = ClientApp(), _Memory(open_site)

    @app.query("hello", mods=[_write_down])
    def hello(message: Message, context: Context) -> Message:
        return _answer(_hello, memory, message, context)

    @app.query("teacher", mods=[_write_down])
    def teacher(message: Message, context: Context) -> Message:
        return _answer(_keep_teacher, memory, message, context)

    @app.train(mods=[_write_down, *MODS])
    def train(message: Message, context: Context) -> Message:
        return _answer(_train, memory, message, context)

    @app.evaluate(mods=[_write_down])
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(_evaluate, memory, message, context)

    return app


def _write_down(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Add a line on a message and its answer, as they travel, to the node's list."""
    path, received = folder_of(context) / "traffic.csv", payload_bytes(message)
    reply = call_next(message, context)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["time", "message", "bytes_received", "bytes_sent"])
        now = datetime.now(UTC).isoformat(timespec="seconds")
        writer.writerow([now, message.metadata.message_type, received, payload_bytes(reply)])
    return reply


class _Memory:
    """What a process that lives for several messages need not read or compute again."""

    def __init__(self, open_site: OpenSite) -> None:
        self._open, self._sites, self._signals = open_site, {}, {}  # type: ignore[var-annotated]

    def site(self, context: Context, job: Job) -> SiteData:
        if job.mark not in self._sites:
            site = self._open(context, job.settings).to(compute_device())
            check_site(site, job.method)
            self._sites = {job.mark: site}
        found: SiteData = self._sites[job.mark]
        return found

    def signals(self, job: Job, site: SiteData, teacher: TappedNetwork) -> TeacherSignals:
        if job.mark not in self._signals:
            settings = job.method.adapt(job.settings)
            said = signals_for(teacher, site, settings, job.seed, classes=job.teacher_classes)
            self._signals = {job.mark: said}
        found: TeacherSignals = self._signals[job.mark]
        return found


_Work = Callable[[_Memory, Context, Job, dict[str, Any], RecordDict], RecordDict]


def _answer(work: _Work, memory: _Memory, message: Message, context: Context) -> Message:
    """Do the work; a fault becomes an answer that names it, and no file of the node."""
    try:
        facts = facts_of(message.content)
        job = Job.from_json(facts["job"])
        check_job(job)
        with repeatable():
            content = work(memory, context, job, facts, message.content)
    except (FederationError, TrainingError, CheckpointError) as error:
        content = record({"error": str(error)})
    except Exception as error:  # its text may name files of the hospital: it stays in the log here
        logging.getLogger(__name__).exception("The work on a message of the server failed")
        content = record({"error": f"{type(error).__name__}; the log of the node says more"})
    return Message(content, reply_to=message)


def folder_of(context: Context) -> Path:
    """The node's own folder, called ``state`` in its configuration.

    Raises:
        FederationError: the node was started without it.
    """
    if "state" not in context.node_config:
        raise FederationError("This node was started without a folder of its own: see docs/hospital.md.")
    return Path(str(context.node_config["state"]))


def _hello(memory: _Memory, context: Context, job: Job, facts: dict[str, Any], content: RecordDict) -> RecordDict:
    if facts.get("code") != our_code():
        raise FederationError("Server and hospital have different versions of the course: install the same.")
    site, folder = memory.site(context, job), folder_of(context)
    for old in sorted((folder / "kept").glob("*"), key=lambda path: path.stat().st_mtime)[:-KEPT_JOBS]:
        shutil.rmtree(old, ignore_errors=True)
    data = hashlib.sha256(f"{data_hash(site)} {site.classes_by_volume}".encode()).hexdigest()
    return record(
        {
            "client": site.name,
            "examples": site.examples,
            "data": data,
            "teacher": job.teacher if _teacher(folder, job) is not None else "",
        }
    )


def _keep_teacher(
    memory: _Memory, context: Context, job: Job, facts: dict[str, Any], content: RecordDict
) -> RecordDict:
    state = weights_of(content)
    if state_hash(state) != job.teacher:
        raise FederationError("The teacher was damaged on its way.")
    load_state(build_network(job.settings, 0), state, "The teacher")
    check_finite(state, "The teacher")
    save_checkpoint(folder_of(context) / "teacher.safetensors", state, {"teacher": job.teacher})  # replaces the last
    return record({"client": memory.site(context, job).name, "teacher": job.teacher})


def _teacher(folder: Path, job: Job) -> State | None:
    """The teacher of the job from the node's disk; None when it is another one, damaged or not there."""
    try:
        state, facts = load_checkpoint(folder / "teacher.safetensors")
    except (FileNotFoundError, CheckpointError):
        return None
    return state if facts.get("teacher") == job.teacher else None


def _train(memory: _Memory, context: Context, job: Job, facts: dict[str, Any], content: RecordDict) -> RecordDict:
    site, folder, number = memory.site(context, job), folder_of(context), int(facts["round"])
    settings, student = job.method.adapt(job.settings), weights_of(content)
    times, signals = {}, None
    if job.method.distils:
        state = _teacher(folder, job)
        if state is None:
            raise FederationError(NO_TEACHER)
        network, start = freeze(build_network(settings, 0)), time.thread_time()
        load_state(network, state, "The teacher")
        signals = memory.signals(job, site, network)
        times["teacher_cpu_seconds"] = time.thread_time() - start
    numbers = _scores(student, site, settings) if number > 1 else {}
    kept = _kept(folder / "kept" / job.mark, number)
    update = client_update(student, site, job.method, settings, number, job.seed, signals=signals, kept=kept)
    if update.kept:
        check_finite(update.kept, f"What client {site.name} keeps")
        save_checkpoint(folder / "kept" / job.mark / f"{number:06d}.safetensors", update.kept, {})
    answer = {
        "client": site.name,
        "examples": update.n_examples,
        "shares": {str(c): share for c, share in update.class_shares.items()},
        "began": state_hash(student),
    }
    return record(answer, update.state, {**numbers, **update.metrics, **times})


def _kept(folder: Path, number: int) -> State:
    """What the client kept of its last round before this one; a round that is asked for again finds the same.

    Raises:
        FederationError: it is damaged.
    """
    rounds = sorted(path for path in folder.glob("*.safetensors") if int(path.stem) < number)
    for old in rounds[:-2]:
        old.unlink(missing_ok=True)
    try:
        return load_checkpoint(rounds[-1])[0] if rounds else {}
    except CheckpointError as error:
        raise FederationError("What this client kept of its last round is damaged: delete it to go on.") from error


def _evaluate(memory: _Memory, context: Context, job: Job, facts: dict[str, Any], content: RecordDict) -> RecordDict:
    site, student = memory.site(context, job), weights_of(content)
    answer = {"client": site.name, "began": state_hash(student)}
    return record(answer, None, _scores(student, site, job.method.adapt(job.settings)))


def _scores(student: State, site: SiteData, settings: Settings) -> dict[str, float]:
    network = build_student(settings, 0)
    load_state(network, student, f"The student sent to client {site.name}")
    network.to(site.labelled_images.device)
    return {f"score {name}": value for name, value in scores_on(network, site.validation).items()}


#: What the engine starts at a hospital.
app = client_app()
