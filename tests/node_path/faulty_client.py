"""The ``ClientApp`` of a hospital that goes wrong in the rounds that ``faults.json`` in its folder names."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkd_utils import engine_client
from fedkd_utils.engine_client import folder_of
from fedkd_utils.engine_messages import TRAIN, facts_of, from_arrays, to_arrays
from fedkd_utils.networks import State


def nan(state: State) -> State:
    next(iter(state.values())).view(-1)[0] = float("nan")
    return state


def wrong_shape(state: State) -> State:
    name = next(iter(state))
    return {**state, name: torch.zeros(2, *state[name].shape)}


def other_model(state: State) -> State:
    return {f"encoder.{name}": tensor for name, tensor in state.items()}


class Faulty(ClientApp):
    """The course's app, and what may happen to its answer."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer, or not."""
        fault = ""
        if message.metadata.message_type == TRAIN:
            fault = fault_of(folder_of(context), int(facts_of(message.content)["round"]))
        if fault == "slow":
            time.sleep(2)
        elif fault == "silent":
            (folder_of(context) / "asked").touch()
            time.sleep(600)
        reply = engine_client.app(message, context)
        if fault in ("nan", "wrong_shape", "other_model"):
            state = from_arrays(reply.content.array_records["weights"])
            reply.content["weights"] = to_arrays(globals()[fault](state))
        return reply


def fault_of(folder: Path, round_number: int) -> str:
    path = folder / "faults.json"
    faults: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    return faults.get(str(round_number), "")


app = Faulty()
