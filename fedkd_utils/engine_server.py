"""The server on the engine: rounds, checks, checkpoints and resume, with the course's own server step.

The rounds are those of :mod:`federation` with one difference: a hospital scores a student when it receives it, at the
start of the next round, so that a student travels once and not twice. The scores of the last round come with a last
message.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pandas as pd
import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedkd_utils import transforms
from fedkd_utils.checkpoints import Run, resume, save_run
from fedkd_utils.clients import FederationError, Update, steps_per_round
from fedkd_utils.engine_connections import Connections, Order
from fedkd_utils.engine_messages import (
    EVALUATE,
    NO_TEACHER,
    SEND_TEACHER,
    TRAIN,
    facts_of,
    our_code,
    read_scores,
    read_update,
    record,
)
from fedkd_utils.engine_privacy import ask_to_clip, secure_updates, with_noise
from fedkd_utils.engine_report import Report
from fedkd_utils.federation import FederationResult, Plan, begin, choose, collect
from fedkd_utils.networks import CheckpointError, State, TappedNetwork, build_network, load_state
from fedkd_utils.provenance import state_hash
from fedkd_utils.server import Ledger
from fedkd_utils.teacher import FROZEN
from fedkd_utils.training import adamw
from fedkd_utils.transforms import SiteData


def federate(grid: Grid, order: Order, teacher: State | None = None) -> tuple[FederationResult, Report]:
    """Run a job from the first round to the last, or on from its checkpoint.

    A hospital that is late, fails or sends what it should not is left out of that round, and the report says why.

    Raises:
        ValueError, FederationError: what the engine does not carry (:func:`engine_messages.check_job`), a checkpoint
            of another run, or too few hospitals or answers; what is finished stays in the checkpoint, and the same
            order goes on from there.
    """
    return _Session(grid, order, teacher).run_rounds()


class _Session:
    """One sitting of a run."""

    def __init__(self, grid: Grid, order: Order, teacher: State | None) -> None:
        self.order, self.job, self.teacher = order, order.job, teacher
        self.mark = f"{self.job.mark} {our_code()}"
        self.path, self.noted = order.folder / "round.safetensors", order.folder / "report.json"
        self.hospitals = Connections(grid, order, Report.read(self.noted, self.mark))
        if self.job.teacher and (teacher is None or state_hash(teacher) != self.job.teacher):
            raise FederationError("The teacher is not the one of the job.")
        self.settings = self.job.method.adapt(self.job.settings)

    @property
    def report(self) -> Report:
        """What happened so far, in this sitting and those before it."""
        return self.hospitals.report

    def send_teacher(self, run: Run, names: Iterable[str]) -> None:
        """Send the teacher to those who lack it."""
        lacking = sorted(set(names) - self.hospitals.has_teacher) if self.job.method.distils else []
        contents = {name: record(self.hospitals.facts(), self.teacher) for name in lacking}
        for name, answer in self.hospitals.ask_clients(SEND_TEACHER, contents).items():
            assert self.teacher is not None
            run.ledger.record(self.hospitals.number, "down", name, "teacher", self.teacher)
            if isinstance(answer, str):
                self.report.note(self.hospitals.number, name, "teacher not received", answer)
            else:
                self.hospitals.has_teacher.add(name)
                self.report.note(self.hospitals.number, name, "teacher received")

    def run_rounds(self) -> tuple[FederationResult, Report]:
        plan, run = self._plan(), resume(self.path, self.mark)
        self.hospitals.number = run.finished if run is not None else 0
        self.hospitals.join(self.order.join_s)
        if len(self.hospitals.nodes) < self.order.least:
            self.report.save(self.noted)
            raise FederationError(
                f"{len(self.hospitals.nodes)} of {len(self.order.clients)} hospitals are connected, and "
                f"{self.order.least} are needed. {self.noted} says who was not admitted. Start the others, then give "
                "the same command."
            )
        if run is None:
            run = self._begin(plan)
        elif run.finished:
            self.report.note(run.finished, "", "resumed", f"after round {run.finished}")
        while run.finished < self.settings.rounds:
            self.hospitals.number, start, cpu = run.finished + 1, time.perf_counter(), time.process_time()
            try:
                self._play_round(plan, run)
            finally:
                self.report.save(self.noted)
            run.seconds += time.perf_counter() - start
            run.cpu_seconds += time.process_time() - cpu
            save_run(self.path, self.mark, run)
        answers = self._ask_all(EVALUATE, run, run.finished)
        self._score(plan, run, answers, run.finished)
        save_run(self.path, self.mark, run)
        self.report.note(run.finished, "", "finished", f"best after round {run.best_round['']}")
        self.report.save(self.noted)
        return self._result(run), self.report

    def _plan(self) -> Plan:
        """The plan of the simulation; of its sites the server knows the names only."""
        none, job = torch.zeros(0), self.job
        sites = [SiteData(name, none, none, none, [], [], ()) for name in sorted(self.order.clients)]
        settings = replace(self.settings, clip_norm=None, noise_multiplier=None)  # see engine_privacy
        local = transforms.augment, adamw, None, lambda steps, note: None  # of the clients: not used here
        return Plan(settings, job.method, sites, job.seed, FROZEN, job.teacher_classes, *local)

    def _begin(self, plan: Plan) -> Run:
        network: TappedNetwork | None = None
        if self.teacher is not None:
            network = build_network(self.settings, 0)
            load_state(network, self.teacher, "The teacher")
        run = begin(self.settings, self.job.method, plan.sites, network, self.job.seed)
        run.teacher = None  # it lies at the hospitals
        if self.job.method.starts_at_teacher:  # it goes out as the first student
            run.ledger = Ledger([{**line, "what": "student"} for line in run.ledger.entries])
        else:
            run.ledger = Ledger([line for line in run.ledger.entries if line["what"] != "teacher"])  # noted when sent
        return run

    def _ask_all(self, kind: str, run: Run, number: int) -> dict[str, RecordDict | str]:
        """The same question to every client that is connected; who lacks the teacher gets it and is asked again."""
        student = run.students[""]
        self.hospitals.join(0.0)
        if kind == TRAIN:
            self.send_teacher(run, self.hospitals.nodes)
        facts = self.hospitals.facts(round=number)
        content = {name: record(facts, student) for name in sorted(self.hospitals.nodes)}
        for one in content.values() if kind == TRAIN else ():
            ask_to_clip(one, self.job)
        answers = self.hospitals.ask_clients(kind, content)
        again = [name for name, answer in answers.items() if answer == NO_TEACHER]
        if again:
            self.hospitals.has_teacher -= set(again)
            self.send_teacher(run, again)
            answers |= self.hospitals.ask_clients(kind, {name: content[name] for name in again})
        for name in self.order.clients:
            if name not in answers:
                self.report.note(self.hospitals.number, name, "absent", "not connected")
        return answers

    def _play_round(self, plan: Plan, run: Run) -> None:
        number = self.hospitals.number
        updates, answers = self._secure_updates(run) if self.job.secure else self._updates(run)
        if number > 1:
            self._score(plan, run, answers, number - 1)
        if len(updates) < self.order.least:
            raise FederationError(
                f"Round {number}: {len(updates)} hospitals sent a usable update, and {self.order.least} are needed. "
                f"Rounds up to {number - 1} are kept in {self.order.folder}, and report.json there says why. Mend "
                "that, then give the same command: it goes on from there."
            )
        clip_norm, noise = self.settings.clip_norm, self.settings.noise_multiplier
        if clip_norm is not None:  # all count the same, else one could move the mean by more than the norm allows
            updates = [replace(update, n_examples=1) for update in updates]
        collect(plan, run, sorted(updates, key=lambda update: update.client), number)
        if clip_norm is not None:
            run.students[""] = with_noise(run.students[""], clip_norm, noise or 0.0, len(updates))
        run.history += [{"round": number, "client": update.client, **update.metrics} for update in updates]
        run.finished = number
        self.report.note(number, "", "averaged", ", ".join(sorted(update.client for update in updates)))

    def _updates(self, run: Run) -> tuple[list[Update], dict[str, RecordDict | str]]:
        """The updates of a round that may be averaged, and every answer."""
        number, student, updates = self.hospitals.number, run.students[""], list[Update]()
        answers, began = self._ask_all(TRAIN, run, number), state_hash(student)
        for name, answer in answers.items():
            if isinstance(answer, str):
                self.report.note(number, name, "no update", answer)
                continue
            try:
                update = read_update(answer, name, self.hospitals.examples[name], student, began)
                if update.class_shares and self.settings.clip_norm is not None:
                    raise FederationError(
                        f"clip_norm counts all the same, but client {name} does not draw every class."
                    )
                updates.append(update)
            except (FederationError, CheckpointError) as error:
                self.report.note(number, name, "rejected", str(error))
        return updates, answers

    def _secure_updates(self, run: Run) -> tuple[list[Update], dict[str, RecordDict | str]]:
        """The same where the server learns the mean only."""
        self.hospitals.join(0.0)
        self.send_teacher(run, self.hospitals.nodes)
        number = self.hospitals.number
        updates, answers = secure_updates(self.hospitals, run.students[""], self.hospitals.facts(round=number))
        for name, answer in answers.items():
            if isinstance(answer, str):
                self.report.note(number, name, "no update", answer)
                if NO_TEACHER in answer:
                    self.hospitals.has_teacher.discard(name)  # it gets one before the next round
        return updates, answers

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
