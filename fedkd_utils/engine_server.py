"""The server on the engine: rounds, checks, checkpoints and resume, with the course's own server step.

The rounds are those of :mod:`federation` with one difference: a hospital scores a student when it receives it, at the
start of the next round, so that a student travels once and not twice. The scores of the last round come with a last
message.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedkd_utils import transforms
from fedkd_utils.checkpoints import Run, fingerprint_of, resume, save_run
from fedkd_utils.clients import FederationError, Update, steps_per_round
from fedkd_utils.engine_messages import (
    EVALUATE,
    HELLO,
    NO_TEACHER,
    TEACHER,
    TRAIN,
    Job,
    check_job,
    facts_of,
    our_code,
    payload_bytes,
    read_scores,
    read_update,
    record,
)
from fedkd_utils.engine_report import Report
from fedkd_utils.federation import FederationResult, Plan, begin, choose, collect
from fedkd_utils.networks import CheckpointError, State, TappedNetwork, build_network, load_state
from fedkd_utils.provenance import state_hash
from fedkd_utils.server import Ledger
from fedkd_utils.teacher import FROZEN
from fedkd_utils.training import adamw
from fedkd_utils.transforms import SiteData

#: Seconds between two looks for answers, or for hospitals that join.
PAUSE_S = 0.2


@dataclass(frozen=True)
class Order:
    """A federation to be run: the job, who takes part, and for how long the server waits."""

    job: Job
    clients: tuple[str, ...]  # the names of the hospitals, which are those of their data folders
    folder: Path  # where the checkpoint, the report and the chosen model go
    least: int = 2  # answers that a round needs
    patience_s: float = 3600.0  # for the answers of a round
    join_s: float = 600.0  # for the hospitals at the start


def federate(grid: Grid, order: Order, teacher: State | None = None) -> tuple[FederationResult, Report]:
    """Run a job from the first round to the last, or on from its checkpoint.

    A hospital that is late, fails or sends what it should not is left out of that round, and the report says why.

    Raises:
        ValueError, FederationError: what the engine does not carry (:func:`engine_messages.check_job`), too few
            hospitals or answers (what is finished stays in the checkpoint: the same order goes on from there), or a
            checkpoint of another run.
    """
    session = _Session(grid, order, teacher)
    session.join(order.join_s)
    return session.run_rounds()


class _Session:
    """One sitting of a run: who is connected, and what was noted."""

    def __init__(self, grid: Grid, order: Order, teacher: State | None) -> None:
        check_job(order.job)
        if len(set(order.clients)) < len(order.clients) or not 1 <= order.least <= len(order.clients):
            raise FederationError(f"{order.clients} need names of their own, and at least one and at most all answer.")
        self.grid, self.order, self.job, self.teacher = grid, order, order.job, teacher
        if self.job.teacher and (teacher is None or state_hash(teacher) != self.job.teacher):
            raise FederationError("The teacher is not the one of the job.")
        self.settings = self.job.method.adapt(self.job.settings)
        self.nodes: dict[str, int] = {}  # by client
        self.examples: dict[str, int] = {}
        self.data: dict[str, str] = {}
        self.has_teacher: set[str] = set()
        self.refused: set[int] = set()
        self.report = Report("")
        self.number = 0

    # --- messages

    def ask(self, kind: str, contents: Mapping[int, RecordDict], patience_s: float) -> dict[int, RecordDict | str]:
        """Send one message to each node and wait; an answer, or why there is none."""
        names = {node: client for client, node in self.nodes.items()}
        messages = [
            Message(content, node, kind, ttl=patience_s, group_id=str(self.number))
            for node, content in contents.items()
        ]
        waiting: dict[str, int] = {}
        for message, sent in zip(messages, self.grid.push_messages(messages), strict=True):
            node = message.metadata.dst_node_id
            self.report.count(self.number, names.get(node, str(node)), kind, "down", payload_bytes(message))
            if sent:
                waiting[sent] = node
        answers: dict[int, RecordDict | str] = dict.fromkeys(contents, "no answer in time")
        end = time.monotonic() + patience_s
        while waiting and time.monotonic() < end:
            for reply in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id)
                self.report.count(self.number, names.get(node, str(node)), kind, "up", payload_bytes(reply))
                answers[node] = reply.content if reply.has_content() else _why(reply.error)
            if waiting:
                time.sleep(PAUSE_S)
        return {node: _without_error(answer) for node, answer in answers.items()}

    def ask_clients(
        self, kind: str, contents: Mapping[str, RecordDict], patience_s: float
    ) -> dict[str, RecordDict | str]:
        """The same by the names of the clients."""
        answers = self.ask(kind, {self.nodes[name]: content for name, content in contents.items()}, patience_s)
        return {name: answers[self.nodes[name]] for name in contents}

    def facts(self, **more: object) -> dict[str, object]:
        return {"job": self.job.to_json(), **more}

    # --- who is there

    def join(self, wait_s: float) -> None:
        """Greet the nodes that are connected, until all clients are there or the time is over."""
        end = time.monotonic() + wait_s
        while True:
            known = {*self.nodes.values(), *self.refused}
            new = [node for node in self.grid.get_node_ids() if node not in known]
            patience = max(min(self.order.patience_s, end - time.monotonic()), 30.0)
            hello = {node: record(self.facts(code=our_code())) for node in new}
            for node, answer in (self.ask(HELLO, hello, patience) if new else {}).items():
                self._admit(node, answer)
            if set(self.nodes) == set(self.order.clients) or time.monotonic() >= end:
                return
            time.sleep(PAUSE_S)

    def _admit(self, node: int, answer: RecordDict | str) -> None:
        facts = {} if isinstance(answer, str) else facts_of(answer)
        name, why = str(facts.get("client", "")), answer if isinstance(answer, str) else ""
        if not why and name not in self.order.clients:
            why = f"{name!r} is not one of {', '.join(self.order.clients)}"
        elif not why and name in self.nodes:
            why = f"{name} is connected already"
        elif not why and self.data.get(name, facts.get("data")) != facts.get("data"):
            why = f"the volumes of {name} are others than when the run began"
        if why:
            if not why.startswith("no answer"):  # who did not answer is asked again
                self.refused.add(node)
            self.report.note(self.number, name or f"node {node}", "not admitted", why)
            return
        self.nodes[name], self.examples[name] = node, int(facts["examples"])
        self.data[name] = str(facts["data"])
        for line in self.report.traffic:  # its greeting was counted before its name was known
            line["client"] = name if line["client"] == str(node) else line["client"]
        if self.job.teacher and facts.get("teacher") == self.job.teacher:
            self.has_teacher.add(name)
        self.report.note(self.number, name, "joined", f"{facts['examples']} volumes")

    def send_teacher(self, run: Run, names: Iterable[str]) -> None:
        """Send the teacher to those who lack it."""
        lacking = sorted(set(names) - self.has_teacher) if self.teacher is not None else []
        contents = {name: record(self.facts(), self.teacher) for name in lacking}
        for name, answer in (self.ask_clients(TEACHER, contents, self.order.patience_s) if lacking else {}).items():
            assert self.teacher is not None
            run.ledger.record(self.number, "down", name, "teacher", self.teacher)
            if isinstance(answer, str):
                self.report.note(self.number, name, "teacher not received", answer)
            else:
                self.has_teacher.add(name)
                self.report.note(self.number, name, "teacher received")

    # --- rounds

    def run_rounds(self) -> tuple[FederationResult, Report]:
        order, folder = self.order, self.order.folder
        path, noted = folder / "round.safetensors", folder / "report.json"
        if len(self.nodes) < order.least:
            self.report.save(noted)
            raise FederationError(
                f"{len(self.nodes)} of {len(order.clients)} hospitals are connected, and {order.least} are needed. "
                f"{noted} says who was not admitted. Start the others, then give the same command."
            )
        plan = self._plan()
        mark = fingerprint_of(order.job.settings, order.job.row, {}, [], order.job.mark, order.job.seed)
        before, self.report = self.report, Report.read(noted, mark)
        self.report.events += before.events
        self.report.traffic += before.traffic
        run = resume(path, mark)
        if run is None:
            run = self._begin(plan)
        elif run.finished:
            self.number = run.finished
            self.report.note(run.finished, "", "resumed", f"after round {run.finished}")
        while run.finished < self.settings.rounds:
            self.number, start, cpu = run.finished + 1, time.perf_counter(), time.process_time()
            try:
                self._play_round(plan, run)
            finally:
                self.report.save(noted)
            run.seconds += time.perf_counter() - start
            run.cpu_seconds += time.process_time() - cpu
            save_run(path, mark, run)
        answers = self._ask_all(EVALUATE, run, run.finished)
        self._score(plan, run, answers, run.finished)
        save_run(path, mark, run)
        self.report.note(run.finished, "", "finished", f"best after round {run.best_round['']}")
        self.report.save(noted)
        return self._result(run), self.report

    def _plan(self) -> Plan:
        """The plan of the simulation; of its sites the server knows the names only."""
        none, job = torch.zeros(0), self.job
        sites = [SiteData(name, none, none, none, [], [], ()) for name in sorted(self.order.clients)]
        classes, augment = job.teacher_classes, transforms.augment
        return Plan(self.settings, job.method, sites, job.seed, FROZEN, classes, augment, adamw, None, lambda n, t: None)

    def _begin(self, plan: Plan) -> Run:
        network: TappedNetwork | None = None
        if self.teacher is not None:
            network = build_network(self.settings, 0)
            load_state(network, self.teacher, "The teacher")
        run = begin(self.settings, self.job.method, plan.sites, network, self.job.seed)
        run.teacher = None  # it lies at the hospitals
        run.ledger = Ledger([line for line in run.ledger.entries if line["what"] != "teacher"])  # noted when sent
        return run

    def _ask_all(self, kind: str, run: Run, number: int) -> dict[str, RecordDict | str]:
        """The same question to every client that is connected; who lacks the teacher gets it and is asked again."""
        student = run.students[""]
        if len(self.nodes) < len(self.order.clients):
            self.join(0.0)
        if kind == TRAIN:
            self.send_teacher(run, self.nodes)
        content = {name: record(self.facts(round=number), student) for name in sorted(self.nodes)}
        answers = self.ask_clients(kind, content, self.order.patience_s)
        again = [name for name, answer in answers.items() if answer == NO_TEACHER]
        if again:
            self.has_teacher -= set(again)
            self.send_teacher(run, again)
            answers |= self.ask_clients(kind, {name: content[name] for name in again}, self.order.patience_s)
        for name in self.order.clients:
            if name not in answers:
                self.report.note(self.number, name, "absent", "not connected")
        return answers

    def _play_round(self, plan: Plan, run: Run) -> None:
        number, student = self.number, run.students[""]
        began, updates = state_hash(student), list[Update]()
        answers = self._ask_all(TRAIN, run, number)
        for name, answer in answers.items():
            if isinstance(answer, str):
                self.report.note(number, name, "no update", answer)
                continue
            try:
                updates.append(read_update(answer, name, self.examples[name], student, began))
            except (FederationError, CheckpointError) as error:
                self.report.note(number, name, "rejected", str(error))
        if number > 1:
            self._score(plan, run, answers, number - 1)
        if len(updates) < self.order.least:
            raise FederationError(
                f"Round {number}: {len(updates)} hospitals sent a usable update, and {self.order.least} are needed. "
                f"Rounds up to {number - 1} are kept in {self.order.folder}, and report.json there says why. Mend "
                "that, then give the same command: it goes on from there."
            )
        collect(plan, run, updates, number)
        run.history += [{"round": number, "client": update.client, **update.metrics} for update in updates]
        run.finished = number
        self.report.note(number, "", "averaged", ", ".join(sorted(update.client for update in updates)))

    def _score(self, plan: Plan, run: Run, answers: Mapping[str, RecordDict | str], number: int) -> None:
        """Add the validation scores of a round to its lines, and keep its student if it is the best."""
        began, found = state_hash(run.students[""]), dict[str, float]()
        for name, answer in answers.items():
            if isinstance(answer, str):
                if number == self.settings.rounds:
                    self.report.note(number, name, "no scores", answer)
                continue
            scores, facts = read_scores(answer), facts_of(answer)
            if facts.get("began") != began or not 0 <= scores.get("validation", 0.0) <= 1:
                continue
            found[name] = scores.get("validation", float("nan"))
            lines = [line for line in run.history if (line["round"], line["client"]) == (number, name)]
            if not lines:
                run.history.append({"round": number, "client": name})
            (lines or run.history[-1:])[0].update(scores)
        choose(plan, run, found, number)

    def _result(self, run: Run) -> FederationResult:
        clients = self.order.clients
        return FederationResult(
            method=self.job.method,
            models={name: run.best[""] for name in clients},
            best_round={name: run.best_round[""] for name in clients},
            history=pd.DataFrame(run.history),
            ledger=run.ledger,
            seconds=run.seconds,
            cpu_seconds=run.cpu_seconds,
            steps=len(run.history) * steps_per_round(self.settings),
        )


def _why(error: Error) -> str:
    """What the engine says in the place of an answer, in our words where there are any."""
    reasons = {
        ErrorCode.MESSAGE_UNAVAILABLE: "no answer in time",
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "no answer in time",
        ErrorCode.NODE_UNAVAILABLE: "no answer: its node is not connected any more",
        ErrorCode.CLIENT_APP_CRASHED: "no answer: its app was killed",
    }
    return reasons.get(error.code, f"no answer: {error.reason}")


def _without_error(answer: RecordDict | str) -> RecordDict | str:
    """An answer that says an error becomes the text of the error."""
    if isinstance(answer, str):
        return answer
    try:
        error = facts_of(answer).get("error")
    except FederationError as fault:
        return str(fault)
    return str(error)[:500] if error else answer
