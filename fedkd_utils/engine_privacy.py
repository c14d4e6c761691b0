"""Clipping, noise and secure aggregation on the engine, by Flower's own components.

*Noise*: ``settings.clip_norm`` S and ``settings.noise_multiplier`` z. Each hospital's app clips its change to the norm
S (``fixedclipping_mod``), the server averages with equal weights and adds noise of deviation z S / K
(``DifferentialPrivacyClientSideFixedClipping``; McMahan et al., ICLR 2018, arXiv 1710.06963). Its noise comes from
NumPy's global generator. What it is worth says :func:`disclosure.epsilon`.

*Masks*: ``Job.secure``. SecAgg+ (Bell et al., CCS 2020, doi:10.1145/3372297.3417885) in four exchanges a round: keys,
shares of them, masked weights, and what removes the masks. The server sees the sum only, so it cannot reject one bad
update; weights are rounded to steps, and the components exist in Flower's older interface only, whose messages are
translated here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.mod import fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.compat.common import recorddict_compat
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM

from fedkd_utils.clients import FederationError, Update
from fedkd_utils.engine_connections import Connections
from fedkd_utils.engine_messages import Job, facts_of, from_arrays, numbers_of, record, to_arrays, weights_of
from fedkd_utils.networks import CheckpointError, State, check_finite

#: Masked weights lie within this range; Flower cuts others off and says nothing.
LARGEST = 8.0

# --- at a hospital


def clip_if_asked(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower's clipping of the change, when the server's message names a norm."""
    if KEY_CLIPPING_NORM not in message.content.config_records["facts"]:
        return call_next(message, context)
    replies: list[Message] = []

    def train(message: Message, context: Context) -> Message:
        replies.append(call_next(message, context))
        return replies[-1]

    clipped = fixedclipping_mod(message, context, train)
    failed = bool(replies) and "error" in facts_of(replies[-1].content)  # it holds no weights to clip
    return replies[-1] if failed else clipped


def mask_if_asked(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower's SecAgg+, when the server's message belongs to it; the app below sees a message as without masks."""
    if RECORD_KEY_CONFIGS not in message.content.config_records:
        return call_next(message, context)

    def train(message: Message, context: Context) -> Message:
        asked = recorddict_compat.recorddict_to_fitins(message.content, keep_input=True)
        facts = json.loads(str(asked.config["json"]))
        names, arrays = facts.pop("names"), parameters_to_ndarrays(asked.parameters)
        student = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
        content = ask_to_clip(record(facts, student), Job.from_json(facts["job"]))
        inner = Message(content, message.metadata.dst_node_id, message.metadata.message_type)
        inner.metadata.__dict__["_message_id"] = message.metadata.message_id
        reply = call_next(inner, context)
        answer = facts_of(reply.content)
        if answer.get("error"):
            raise FederationError(answer["error"])
        if answer["shares"]:
            raise FederationError("Masked updates count all classes the same, but this client does not draw every one.")
        state = weights_of(reply.content)
        check_finite(state, "The update")  # nobody could reject it when it is masked
        if any(float(tensor.abs().max()) > LARGEST for tensor in state.values()):
            raise FederationError(f"A weight of this client is beyond {LARGEST:g}; masked it would be cut there.")
        weight = 1 if Job.from_json(facts["job"]).settings.clip_norm is not None else answer["examples"]
        metrics: dict[str, Any] = {"json": json.dumps(answer), **numbers_of(reply.content)}
        sent = ndarrays_to_parameters([state[name].numpy() for name in names])
        fit = FitRes(Status(Code.OK, ""), sent, weight, metrics)
        return Message(recorddict_compat.fitres_to_recorddict(fit, keep_input=True), reply_to=message)

    return secaggplus_mod(message, context, train)


#: What every hospital's app is wrapped in, the outermost first.
MODS = [mask_if_asked, clip_if_asked]

# --- at the server


def ask_to_clip(content: RecordDict, job: Job) -> RecordDict:
    """Name the norm in a message, where the job has one."""
    if job.settings.clip_norm is not None:
        content.config_records["facts"][KEY_CLIPPING_NORM] = float(job.settings.clip_norm)
    return content


class _Mean(FedAvg):  # type: ignore[misc, unused-ignore]
    """A strategy whose average was computed before, for Flower's wrapper to add its noise to."""

    mean: ArrayRecord

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return self.mean, None


def with_noise(mean: State, clip_norm: float, noise_multiplier: float, clients: int) -> State:
    """The mean of clipped updates of K clients, with Flower's noise of deviation z S / K in every floating number."""
    floats = {name: tensor for name, tensor in mean.items() if tensor.is_floating_point()}
    inner = _Mean()
    inner.mean = to_arrays(floats)
    wrapped = DifferentialPrivacyClientSideFixedClipping(inner, noise_multiplier, clip_norm, clients)
    empty = Message(RecordDict(), 0, "train")
    arrays, _ = wrapped.aggregate_train(1, [Message(RecordDict(), reply_to=empty)] * clients)
    assert arrays is not None
    return {**mean, **from_arrays(arrays)}


class _Sum(LegacyFedAvg):  # type: ignore[misc, unused-ignore]
    """The strategy that the SecAgg+ workflow asks whom to ask, and to which it gives the sum."""

    def __init__(self, asked: list[tuple[Any, FitIns]]) -> None:
        super().__init__()
        self.asked, self.results = asked, list[tuple[Any, FitRes]]()

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[tuple[Any, FitIns]]:
        return self.asked

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[Any, dict[str, Any]]:
        self.results = results
        return results[0][1].parameters if results else None, {}


def secure_updates(
    hospitals: Connections, student: State, facts: Mapping[str, Any]
) -> tuple[list[Update], dict[str, RecordDict | str]]:
    """A round of SecAgg+ with all hospitals that are connected.

    Returns:
        An update for each that took part, all with the one mean that the server learned; and their answers without
        weights, or why there is none.

    Raises:
        FederationError: fewer than two hospitals.
        CheckpointError: the sum is no student: somebody's update was none, and nobody can say whose.
    """
    if len(hospitals.nodes) < 2:
        raise FederationError("Masks need two hospitals or more.")
    names = {node: client for client, node in hospitals.nodes.items()}
    config: dict[str, Any] = {"json": json.dumps({**facts, "names": list(student)})}
    sent = ndarrays_to_parameters([tensor.numpy() for tensor in student.values()])
    strategy = _Sum([(SimpleNamespace(node_id=node), FitIns(sent, config)) for node in names])
    answers: dict[str, RecordDict | str] = {client: "left the masked round" for client in hospitals.nodes}
    sizes: dict[str, int] = {}

    def send_and_receive(messages: Iterable[Message], timeout: float | None) -> list[Message]:
        replies = hospitals.exchange(list(messages), hospitals.order.patience_s)
        for reply in replies:
            name = names.get(reply.metadata.src_node_id, "")
            if reply.has_error() and name:
                answers[name] = f"left the masked round: {reply.error.reason}"
            elif name and Key.MASKED_PARAMETERS in reply.content.config_records[RECORD_KEY_CONFIGS]:
                masked: Any = reply.content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
                sizes[name] = sum(map(len, masked))
        return replies

    context = LegacyContext(Context(0, 0, {}, RecordDict(), {}), strategy=strategy)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({"current_round": hospitals.number})
    context.state.array_records[MAIN_PARAMS_RECORD] = recorddict_compat.parameters_to_arrayrecord(sent, True)
    largest = 1.0 if hospitals.order.job.settings.clip_norm is not None else float(max(hospitals.examples.values()))
    workflow = SecAggPlusWorkflow(
        num_shares=1.0, reconstruction_threshold=0.5, max_weight=largest, clipping_range=LARGEST
    )
    counted: Any = SimpleNamespace(send_and_receive=send_and_receive)
    workflow(counted, context)
    if not strategy.results:
        return [], answers
    arrays = parameters_to_ndarrays(strategy.results[0][1].parameters)
    mean = {
        name: torch.from_numpy(array).to(tensor.dtype)
        for (name, tensor), array in zip(student.items(), arrays, strict=True)
    }
    if any(mean[name].shape != tensor.shape for name, tensor in student.items()):
        raise CheckpointError("The sum of the masked updates is no student: one of them had another shape.")
    check_finite(mean, "The sum of the masked updates")
    updates = []
    for proxy, fit in strategy.results:
        name, metrics = names[proxy.node_id], dict(fit.metrics)
        answer = record(json.loads(str(metrics.pop("json"))), None, {k: float(v) for k, v in metrics.items()})
        answers[name] = answer
        losses = {k: v for k, v in numbers_of(answer).items() if not k.startswith("score ")}
        packet = {"masked": torch.empty(sizes[name], dtype=torch.uint8)}
        updates.append(Update(name, mean, 1, losses, packet=packet))
    return updates, answers
