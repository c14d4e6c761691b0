"""What travels between the server and a hospital on the engine (Flower): records, checks, and byte counts.

A message is a Flower ``RecordDict``. The job and the facts travel as JSON in one ``ConfigRecord``, weights in one
``ArrayRecord`` (Flower's own modifiers refuse two of either), scores and losses in one ``MetricRecord``.

=================  ========================================  ================================================
message            down to the hospital                      up to the server
=================  ========================================  ================================================
``query.hello``    job                                       name, counts, hashes of data, code and teacher
``query.teacher``  job, the teacher                          its hash
``train``          job, round, the student                   name, n_k, losses, validation Dice, the student
``evaluate``       job, round, the student                   name, validation Dice
=================  ========================================  ================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedkd_utils.checkpoints import FEDERATION_CODE
from fedkd_utils.clients import FederationError, Update
from fedkd_utils.federation import check_messages
from fedkd_utils.methods import Method, row_named
from fedkd_utils.networks import CheckpointError, State, build_student, check_finite, check_layout
from fedkd_utils.provenance import code_hash
from fedkd_utils.settings import CARTILAGES, Settings
from fedkd_utils.teacher import FROZEN, TeacherUpdate

HELLO, SEND_TEACHER, TRAIN, EVALUATE = "query.hello", "query.teacher", "train", "evaluate"

#: The code whose digits a server and a hospital must share.
ENGINE_CODE = (*FEDERATION_CODE, "methods", "engine_messages", "engine_privacy", "engine_client")

#: What a hospital answers when the teacher is not, or no longer, on its disk.
NO_TEACHER = "the teacher is not here: send it"


@dataclass(frozen=True)
class Job:
    """What the server asks the hospitals to do together: all that their numbers depend on besides their volumes."""

    row: str
    settings: Settings
    seed: int
    teacher: str = ""  # hash of the teacher's weights (:func:`provenance.state_hash`); "": the row needs none
    teacher_classes: tuple[int, ...] | None = None  # that it was taught; None: all
    secure: bool = False  # updates are masked, and the server sees their sum only

    @property
    def method(self) -> Method:
        """The row of the comparison."""
        return row_named(self.row)

    @property
    def mark(self) -> str:
        """A short name for this job and no other."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """As text, to travel."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Back from text.

        Raises:
            FederationError: not a job of this version of the course.
        """
        try:
            facts = json.loads(text)
            facts["settings"] = Settings(**{k: _tuple(v) for k, v in facts["settings"].items()})
            return cls(**{name: _tuple(value) for name, value in facts.items()})
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise FederationError(
                f"The job of the server cannot be read ({error}): use the same version everywhere."
            ) from error


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_job(job: Job, teacher_update: TeacherUpdate = FROZEN) -> None:
    """Refuse what the engine does not carry, before anything starts.

    Raises:
        ValueError: an unknown row.
        FederationError: the row or a setting needs what does not travel here; says what to use instead.
    """
    method = job.method
    settings = method.adapt(job.settings)
    reasons = {
        f"{method.title!r} holds all data in one place, which hospitals do not do": method.pooled,
        f"{method.title!r} averages no students: use the simulation": not method.federated or method.objective is None,
        f"{method.title!r} averages within groups of clients": method.groups,
        f"{method.title!r} chooses a model for each client, which would have to leave it": (
            method.federated and not method.shares_model
        ),
        f"{method.title!r} chooses between two teachers": method.chooses_teacher,
        f"a teacher that moves ({teacher_update.kind}) would travel in every round": teacher_update != FROZEN,
        f"compression {settings.compression!r} is not decoded there": settings.compression is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise FederationError(f"The engine does not carry this run: {reason}.")
    check_messages(method, settings, [], teacher_update)
    if method.needs_teacher != bool(job.teacher):
        raise FederationError(f"{method.title!r} needs {'a' if method.needs_teacher else 'no'} teacher.")
    if job.secure and not all(t.is_floating_point() for t in build_student(settings, 0).state_dict().values()):
        raise FederationError('Masks hide sums of real numbers: set normalisation to "instance" or "group".')


def our_code() -> str:
    """A hash of the code that has to be the same at the server and at every hospital."""
    return code_hash(ENGINE_CODE)


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """A state as it travels: each tensor as bytes with its type and shape, in the same order."""
    return ArrayRecord({name: Array(np.asarray(tensor.detach().cpu().numpy())) for name, tensor in state.items()})


def from_arrays(record: ArrayRecord) -> State:
    """A state as it arrived, bit by bit what :func:`to_arrays` was given.

    Raises:
        CheckpointError: an array that cannot be read.
    """
    state = {}
    for name, array in record.items():
        try:
            state[name] = torch.from_numpy(np.array(array.numpy()))
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise CheckpointError(f"The array {name} cannot be read ({type(error).__name__}).") from error
    return state


def record(
    facts: Mapping[str, Any], state: Mapping[str, Tensor] | None = None, numbers: Mapping[str, float] | None = None
) -> RecordDict:
    """The content of a message: facts as JSON, weights where there are any, numbers where there are any."""
    content = RecordDict({"facts": ConfigRecord({"json": json.dumps(dict(facts), sort_keys=True)})})
    if state is not None:
        content["weights"] = to_arrays(state)
    if numbers:
        content["numbers"] = MetricRecord(dict(numbers))
    return content


def facts_of(content: RecordDict) -> dict[str, Any]:
    """The facts of a message.

    Raises:
        FederationError: there are none, or they are not JSON.
    """
    try:
        facts = json.loads(str(content.config_records["facts"]["json"]))
    except (KeyError, ValueError) as error:
        raise FederationError("The message does not hold the facts that belong into it.") from error
    if not isinstance(facts, dict):
        raise FederationError("The message does not hold the facts that belong into it.")
    return facts


def weights_of(content: RecordDict) -> State:
    """The weights of a message.

    Raises:
        FederationError: there are none, or several sets.
        CheckpointError: an array that cannot be read.
    """
    records = list(content.array_records.values())
    if len(records) != 1:
        raise FederationError(f"The message holds {len(records)} sets of weights and not one.")
    return from_arrays(records[0])


def numbers_of(content: RecordDict) -> dict[str, float]:
    """The numbers of a message, none when it has none."""
    numbers: dict[str, Any] = {k: v for part in content.metric_records.values() for k, v in part.items()}
    return {name: float(value) for name, value in numbers.items() if not isinstance(value, list)}


def read_update(content: RecordDict, client: str, examples: int, student: State, began: str) -> Update:
    """The update in an answer, checked before anything is averaged.

    Args:
        client: whose answer it must be.
        examples: n_k as the client gave it when it joined.
        student: what was sent, for the layout.
        began: the hash of the student that was sent; an answer that began from another one is refused.

    Raises:
        FederationError, CheckpointError: the reason for which the update is rejected.
    """
    facts = facts_of(content)
    if facts.get("client") != client:
        raise FederationError(f"The update is signed {facts.get('client')!r} and not {client!r}.")
    if facts.get("began") != began:
        raise FederationError(f"The update of client {client} did not begin from the student of this round.")
    if facts.get("examples") != examples:
        raise FederationError(
            f"The update of client {client} counts {facts.get('examples')!r} examples; it joined with {examples}."
        )
    shares = facts.get("shares", {})
    if not isinstance(shares, dict) or not all(
        k.isdigit() and int(k) in CARTILAGES and isinstance(v, int | float) and 0 <= v <= 1 for k, v in shares.items()
    ):
        raise FederationError(f"The update of client {client} has no valid shares of classes: {shares!r}.")
    state, source = weights_of(content), f"The update of client {client}"
    check_layout(state, student, source)
    for name, tensor in state.items():
        if tensor.dtype != student[name].dtype:
            raise CheckpointError(f"{source}: {name} is {tensor.dtype} and not {student[name].dtype}.")
    check_finite(state, source)
    metrics = {k: v for k, v in numbers_of(content).items() if not k.startswith("score ")}
    return Update(
        client,
        {name: state[name] for name in student},
        examples,
        metrics,
        class_shares={int(k): float(v) for k, v in shares.items()},
    )


def read_scores(content: RecordDict) -> dict[str, float]:
    """The validation Dice in an answer, mean and by cartilage; NaN where nothing could be measured."""
    return {k.removeprefix("score "): v for k, v in numbers_of(content).items() if k.startswith("score ")}


def payload_bytes(message: Message) -> int:
    """The bytes of a message's records: arrays with their headers, texts, 8 for a number, names; not the envelope."""
    parts = list(message.content.values()) if message.has_content() else []
    arrays = sum(part.count_bytes() for part in parts if isinstance(part, ArrayRecord))
    others = [item for part in parts if not isinstance(part, ArrayRecord) for item in part.items()]
    return arrays + sum(len(str(name)) + _size(value) for name, value in others)


def _size(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value.encode() if isinstance(value, str) else value) if isinstance(value, str | bytes) else 8
