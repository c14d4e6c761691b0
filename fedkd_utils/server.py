"""The server: it averages what clients send, and notes what every message costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fedkd_utils.clients import FederationError, Update
from fedkd_utils.networks import State, check_finite, check_layout, nbytes
from fedkd_utils.seeds import generator_of

#: All classes have the same weights: nothing is known of the tensors of the last layer.
NO_CLASSES: Mapping[str, int] = MappingProxyType({})


class RunningMean:
    """The weighted mean of states that come one after the other: all it keeps are sums, however many come.

    Floating tensors, batch statistics too, are summed in float64 and divided at the end; integer counters are those of
    the first state.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._sums: State = {}
        self._types: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Count a state; it is neither changed nor kept."""
        for name, tensor in state.items():
            if name not in self._types:
                self._types[name] = tensor.dtype
                floating = tensor.is_floating_point()
                self._sums[name] = torch.zeros_like(tensor, dtype=torch.float64) if floating else tensor.clone()
            if self._sums[name].is_floating_point():
                self._sums[name].add_(tensor.double() * weight)
        self.weight += weight

    def mean(self) -> State:
        """The mean of what was counted; the weights must not sum to 0."""
        return {
            name: (total / self.weight).to(self._types[name]) if total.is_floating_point() else total.clone()
            for name, total in self._sums.items()
        }


class FedAvg:
    """FedAvg (McMahan et al., arXiv 1602.05629): theta = sum_k n_k theta_k / sum_k n_k, one update after the other.

    It holds sums and no update, so its memory does not grow with the number of clients. Add the updates in the order
    of the clients' names, so that the result does not depend on who answered first.

    A client that draws a class in only a share of its labelled volumes has that share of its weight n_k in the
    weights of this class in the last layer: who never saw a patella has no say in what one looks like. (Ours; where
    all draw everything it is FedAvg, and so it is for a class that nobody draws.)

    Args:
        class_axes: the tensors of the last layer with the axis of the classes (:func:`networks.class_axes`).
        like: a state with the layout that every update must have; the first update's when not given.
    """

    def __init__(self, class_axes: Mapping[str, int] = NO_CLASSES, like: Mapping[str, Tensor] | None = None) -> None:
        self._axes = class_axes
        self._like = like
        self._names: set[str] = set()
        self._whole = RunningMean()
        self._classes: dict[int, RunningMean] = {}
        self._partial: set[int] = set()

    def add(self, update: Update) -> None:
        """Count an update.

        Raises:
            FederationError: the second of one client, a count below 1, or partial classes without ``class_axes``.
            CheckpointError: NaN, or names or shapes that differ; names the client.
        """
        if update.class_shares and not self._axes:
            raise FederationError("A client does not draw every class: say class_axes, or its weights count wrongly.")
        if self._like is None:
            self._like = {name: tensor.to("meta") for name, tensor in update.state.items()}  # shapes, no numbers
        _check_update(update, self._like, self._names)
        self._names.add(update.client)
        self._whole.add(update.state, update.n_examples)
        for c in range(next((update.state[name].shape[axis] for name, axis in self._axes.items()), 0)):
            row = {name: update.state[name].select(axis, c) for name, axis in self._axes.items()}
            share = update.class_shares.get(c, 1.0)
            self._classes.setdefault(c, RunningMean()).add(row, update.n_examples * share)
        self._partial |= update.class_shares.keys()

    def average(self) -> State:
        """The average of the updates.

        Raises:
            FederationError: there was none.
        """
        if not self._names:
            raise FederationError("No client sent an update: nothing can be averaged.")
        averaged = self._whole.mean()
        for c in sorted(self._partial):
            if self._classes[c].weight > 0:
                for name, row in self._classes[c].mean().items():
                    averaged[name].select(self._axes[name], c).copy_(row)
        return averaged


def _check_update(update: Update, like: Mapping[str, Tensor], names: set[str]) -> None:
    source = f"The update of client {update.client}"
    if update.client in names:
        raise FederationError(f"Two updates of one client, {update.client}: count every client once a round.")
    if update.n_examples < 1:
        raise FederationError(f"{source} counts {update.n_examples} examples: it must have at least 1.")
    check_layout(update.state, like, source)
    check_finite(update.state, source)


def aggregate(updates: Sequence[Update], class_axes: Mapping[str, int] = NO_CLASSES) -> State:
    """The average of updates that are all there, whatever their order; see :class:`FedAvg`.

    Raises:
        FederationError, CheckpointError: as :class:`FedAvg`.
    """
    return _average(FedAvg(class_axes), updates)


def _average(running: FedAvg, updates: Sequence[Update]) -> State:
    for update in sorted(updates, key=lambda update: update.client):
        running.add(update)
    return running.average()


def server_step(
    global_state: Mapping[str, Tensor], updates: Sequence[Update], class_axes: Mapping[str, int] = NO_CLASSES
) -> State:
    """The next global student from the last one and the updates of a round.

    Raises:
        CheckpointError: an update does not have the layout of the global student; names the client.
    """
    return _average(FedAvg(class_axes, global_state), updates)


def clipped(change: Mapping[str, Tensor], largest_norm: float) -> State:
    """A change, made shorter where its norm over all floating tensors together exceeds ``largest_norm``.

    Its direction stays, and a shorter change stays as it is. Integer tensors are left out.
    """
    floats = {name: tensor for name, tensor in change.items() if tensor.is_floating_point()}
    norm = torch.stack([tensor.double().square().sum() for tensor in floats.values()]).sum().sqrt().item()
    return {name: tensor * min(1.0, largest_norm / max(norm, 1e-300)) for name, tensor in floats.items()}


def private_step(
    global_state: Mapping[str, Tensor],
    updates: Sequence[Update],
    clip_norm: float,
    noise_multiplier: float,
    generator: torch.Generator,
) -> State:
    """theta <- theta + (sum_k clip(theta_k - theta, S) + z S n) / K, n ~ N(0, I): DP-FedAvg, fixed clip.

    (McMahan et al., ICLR 2018, arXiv 1710.06963, algorithm 1, all K clients in every round.) The clients count the
    same, so that adding or removing one moves the sum by at most S; :func:`disclosure.epsilon` says what the noise is
    worth. Floating tensors, batch statistics too, get noise; integer counters stay the server's. A server that means
    it draws ``generator`` from the entropy of its machine, not from a seed.

    Raises:
        FederationError, CheckpointError: as :func:`aggregate`.
        ValueError: a norm that is not above 0, or a negative noise.
    """
    if not clip_norm > 0 or noise_multiplier < 0:
        raise ValueError(
            f"clip_norm must be above 0 and noise_multiplier at least 0, not {clip_norm}, {noise_multiplier}."
        )
    ordered, names = sorted(updates, key=lambda update: update.client), set[str]()
    if not ordered:
        raise FederationError("No client sent an update: nothing can be averaged.")
    for update in ordered:
        _check_update(update, global_state, names)
        names.add(update.client)
    changes = [clipped({n: u.state[n] - t for n, t in global_state.items()}, clip_norm) for u in ordered]
    new = {name: tensor.clone() for name, tensor in global_state.items()}
    for name in changes[0]:
        noise = torch.randn(new[name].shape, generator=generator, dtype=torch.float64) * (noise_multiplier * clip_norm)
        total = torch.stack([change[name].double() for change in changes]).sum(dim=0) + noise
        new[name] = (new[name].double() + total / len(changes)).to(new[name].dtype)
    return new


def random_groups(names: Sequence[str], seed: int, round_number: int) -> list[list[str]]:
    """Clients in random groups of two, or three when their number is odd; new ones in every round.

    For group averaging (Zhang et al., arXiv 2008.11364): fewer models in one average differ less. Three
    clients or fewer are one group, which is FedAvg.
    """
    ordered = sorted(names)
    shuffled = torch.randperm(len(ordered), generator=generator_of(seed, "groups", round_number)).tolist()
    count = max(len(ordered) // 2, 1)
    return [[ordered[k] for k in shuffled[first::count]] for first in range(count)]


def group_step(
    updates: Sequence[Update], seed: int, round_number: int, class_axes: Mapping[str, int] = NO_CLASSES
) -> dict[str, State]:
    """What each client gets back when averages are taken within :func:`random_groups`, by client."""
    sent: dict[str, State] = {}
    for group in random_groups([update.client for update in updates], seed, round_number):
        average = aggregate([update for update in updates if update.client in group], class_axes)
        sent |= {name: average for name in group}
    return sent


@dataclass
class Ledger:
    """One line per message: round, direction ("down" to a client, "up" to the server), client, what, bytes.

    Bytes are those of the tensors that travel, of a compressed update its packet. Example counts and scores, some
    bytes a message, are left out.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)

    def record(self, round_number: int, direction: str, client: str, what: str, state: Mapping[str, Tensor]) -> None:
        """Note one message; round 0 is before training."""
        entry = {"round": round_number, "direction": direction, "client": client, "what": what, "bytes": nbytes(state)}
        self.entries.append(entry)

    def total(self, direction: str | None = None, what: str | None = None) -> int:
        """Bytes of all messages, or of those in one direction or of one kind."""
        return sum(
            entry["bytes"]
            for entry in self.entries
            if direction in (None, entry["direction"]) and what in (None, entry["what"])
        )

    def frame(self) -> pd.DataFrame:
        """The lines as a table."""
        return pd.DataFrame(self.entries, columns=["round", "direction", "client", "what", "bytes"])
