"""Who is connected on the engine, and a question to each of them: the server's side of every message."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedkd_utils.clients import FederationError
from fedkd_utils.engine_messages import HELLO, Job, check_job, facts_of, our_code, payload_bytes, record
from fedkd_utils.engine_report import Report

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


class Connections:
    """The hospitals that were admitted in this sitting, by name, and what each said of itself.

    Raises:
        ValueError, FederationError: an order that cannot be carried out.
    """

    def __init__(self, grid: Grid, order: Order, report: Report) -> None:
        check_job(order.job)
        if len(set(order.clients)) < len(order.clients) or not 1 <= order.least <= len(order.clients):
            raise FederationError(f"{order.clients} need names of their own, and at least one and at most all answer.")
        self.grid, self.order, self.report = grid, order, report
        self.number = 0  # of the round
        self.nodes: dict[str, int] = {}  # by client
        self.examples: dict[str, int] = {}
        self.has_teacher: set[str] = set()
        self._refused: set[int] = set()
        self._asked: dict[str, int] = {}  # node by message, of the last exchange

    def ask(self, kind: str, contents: Mapping[int, RecordDict], patience_s: float) -> dict[int, RecordDict | str]:
        """Send one message to each node and wait; an answer, or why there is none."""
        number = str(self.number)
        messages = [Message(content, node, kind, group_id=number) for node, content in contents.items()]
        answers: dict[int, RecordDict | str] = dict.fromkeys(contents, "no answer in time")
        for reply in self.exchange(messages, patience_s):
            node = self._asked[reply.metadata.reply_to_message_id]
            answers[node] = reply.content if reply.has_content() else _why(reply.error)
        return {node: _without_error(answer) for node, answer in answers.items()}

    def exchange(self, messages: Sequence[Message], patience_s: float) -> list[Message]:
        """Send messages, wait for the replies until time is over, and count the bytes of both."""
        names = {node: client for client, node in self.nodes.items()}
        for message in messages:
            message.metadata.ttl = patience_s
        self._asked = {}
        for message, sent in zip(messages, self.grid.push_messages(messages), strict=True):
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            self.report.count(self.number, names.get(node, str(node)), kind, "down", payload_bytes(message))
            if sent:
                self._asked[sent] = node
        waiting, end, replies = dict(self._asked), time.monotonic() + patience_s, list[Message]()
        while waiting and time.monotonic() < end:
            for reply in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id)
                kind = messages[0].metadata.message_type
                self.report.count(self.number, names.get(node, str(node)), kind, "up", payload_bytes(reply))
                replies.append(reply)
            if waiting:
                time.sleep(PAUSE_S)
        return replies

    def ask_clients(self, kind: str, contents: Mapping[str, RecordDict]) -> dict[str, RecordDict | str]:
        """The same by the names of the clients, with the patience of a round."""
        by_node = {self.nodes[name]: content for name, content in contents.items()}
        answers = self.ask(kind, by_node, self.order.patience_s)
        return {name: answers[self.nodes[name]] for name in contents}

    def facts(self, **more: object) -> dict[str, object]:
        """The facts of a message to a hospital: the job, and more."""
        return {"job": self.order.job.to_json(), **more}

    def join(self, wait_s: float) -> None:
        """Forget who left, and greet the new nodes until all clients are there or the time is over."""
        end = time.monotonic() + wait_s
        self._refused.clear()
        while True:
            online = set(self.grid.get_node_ids())
            self.nodes = {name: node for name, node in self.nodes.items() if node in online}
            new = sorted(online - set(self.nodes.values()) - self._refused)
            if set(self.nodes) == set(self.order.clients):
                return
            patience = max(min(self.order.patience_s, end - time.monotonic()), 30.0)
            hello = {node: record(self.facts(code=our_code())) for node in new}
            for node, answer in self.ask(HELLO, hello, patience).items():
                self._admit(node, answer)
            if time.monotonic() >= end:
                return
            time.sleep(PAUSE_S)

    def _admit(self, node: int, answer: RecordDict | str) -> None:
        facts = {} if isinstance(answer, str) else facts_of(answer)
        name = str(facts.get("client", ""))
        why = answer if isinstance(answer, str) else self._why_not(name, facts)
        if why:
            if not why.startswith("no answer"):  # who did not answer is asked again
                self._refused.add(node)
            self.report.note(self.number, name or f"node {node}", "not admitted", why)
            return
        self.nodes[name], self.examples[name] = node, facts["examples"]
        self.report.data[name] = facts["data"]
        for line in self.report.traffic:  # its greeting was counted before its name was known
            line["client"] = name if line["client"] == str(node) else line["client"]
        self.has_teacher.discard(name)
        if self.order.job.teacher and facts.get("teacher") == self.order.job.teacher:
            self.has_teacher.add(name)
        self.report.note(self.number, name, "joined", f"{facts['examples']} volumes")

    def _why_not(self, name: str, facts: Mapping[str, Any]) -> str:
        """Why a node that answered may not take part; "" when it may."""
        examples, data = facts.get("examples"), facts.get("data")
        if name not in self.order.clients:
            return f"{name!r} is not one of {', '.join(self.order.clients)}"
        if name in self.nodes:
            return f"{name} is connected already"
        if type(examples) is not int or examples < 1 or not isinstance(data, str):
            return "its greeting lacks the number of volumes, or their hash"
        if self.report.data.get(name, data) != data:
            return f"the volumes of {name} are others than when the run began: choose another folder for a new run"
        return ""


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
