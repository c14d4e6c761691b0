"""The engine in one process: a Flower ``Grid`` that calls each hospital's ``ClientApp`` directly.

No socket, no other process, no thread: for tests, for the notebook, and for whoever wants to step through a round in a
debugger. The server cannot tell the difference.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedkd_utils.engine_client import client_app
from fedkd_utils.settings import Settings
from fedkd_utils.transforms import SiteData


class LocalGrid(Grid):
    """Nodes 1, 2, ... in this process, each an app with the context that a SuperNode would give it."""

    def __init__(self, apps: Sequence[ClientApp], folder: Path) -> None:
        self.apps = {node: app for node, app in enumerate(apps, start=1)}
        self.contexts = {
            node: Context(0, node, {"state": str(folder / f"node_{node}")}, RecordDict(), {}) for node in self.apps
        }
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 0, 0, 0  # else no message can be made
        logging.getLogger("flwr").setLevel(logging.WARNING)  # it tells every message
        self._replies: dict[str, Message] = {}
        self._numbers = itertools.count(1)

    def set_run(self, run: Any) -> None:
        """There is only one run."""

    @property
    def run(self) -> Any:
        """There is only one run, and nothing to know of it."""
        raise NotImplementedError("A federation in one process has no run of a SuperLink.")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As Flower's own; new code calls ``Message``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All of them, always."""
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let each node work on its message at once, one after the other."""
        return [self._work(message) for message in messages]

    def _work(self, message: Message) -> str:
        number = f"message {next(self._numbers)}"
        message.metadata.__dict__["_message_id"] = number  # as Flower's own grid does
        node = message.metadata.dst_node_id
        sent = copy.deepcopy(message)  # no node may change what another one gets
        try:
            self._replies[number] = self.apps[node](sent, self.contexts[node])
        except Exception as error:  # what a SuperNode answers then
            self._replies[number] = Message(Error(code=0, reason=repr(error)), reply_to=message)
        return number

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers to some messages, each once."""
        return [self._replies.pop(number) for number in list(message_ids) if number in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Both at once."""
        return self.pull_messages(self.push_messages(messages))


def local_grid(sites: Sequence[SiteData], folder: Path) -> LocalGrid:
    """A grid of hospitals whose volumes lie in memory; their nodes keep their files in ``folder``."""
    return LocalGrid([client_app(partial(_in_memory, site)) for site in sites], folder)


def _in_memory(site: SiteData, context: Context, settings: Settings) -> SiteData:
    return site
