"""What a federation on the engine leaves behind for people: what happened, and what every message cost."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fedkd_utils.files import write_atomically


@dataclass
class Report:
    """The events of a run in order, and one line for each message with its bytes on the way."""

    mark: str  # of the job and the code
    events: list[dict[str, Any]] = field(default_factory=list)  # round, client ("" for all), what, why
    traffic: list[dict[str, Any]] = field(default_factory=list)  # round, client, message, direction, bytes
    data: dict[str, str] = field(default_factory=dict)  # hash of each client's volumes when it joined first

    def note(self, round_number: int, client: str, what: str, why: str = "") -> None:
        """Add an event."""
        self.events.append({"round": round_number, "client": client, "what": what, "why": why})

    def count(self, round_number: int, client: str, message: str, direction: str, size: int) -> None:
        """Add a message that travelled."""
        line = {"round": round_number, "client": client, "message": message, "direction": direction, "bytes": size}
        self.traffic.append(line)

    def bytes(self, direction: str | None = None, message: str | None = None, client: str | None = None) -> int:
        """Bytes of all messages, or of those in one direction, of one kind, of one client."""
        return sum(
            line["bytes"]
            for line in self.traffic
            if direction in (None, line["direction"])
            and message in (None, line["message"])
            and client in (None, line["client"])
        )

    def happened(self, what: str) -> list[tuple[int, str, str]]:
        """Round, client and reason of the events of one kind."""
        return [(e["round"], e["client"], e["why"]) for e in self.events if e["what"] == what]

    def text(self) -> str:
        """For a terminal: the events, then the bytes by message."""
        lines = [
            f"round {e['round']:2d}  {e['client'] or 'all':16s} {e['what']}" + (f": {e['why']}" if e["why"] else "")
            for e in self.events
        ]
        frame = pd.DataFrame(self.traffic, columns=["round", "client", "message", "direction", "bytes"])
        table = frame.groupby(["message", "direction"])["bytes"].agg(["count", "sum"]).reset_index()
        lines += [
            f"{line['message']:14s} {line['direction']:4s} {line['count']:4d} messages {line['sum']:12,d} bytes"
            for line in table.to_dict("records")
        ]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1).encode())

    @classmethod
    def read(cls, path: Path, mark: str) -> Report:
        """The report of a run that goes on, or a new one when there is none of this run."""
        try:
            facts = json.loads(path.read_bytes())
            if facts["mark"] == mark:
                return cls(**facts)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return cls(mark)
