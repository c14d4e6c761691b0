"""A client: what it must have, and one round of its local training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedkd_utils import transforms
from fedkd_utils.compression import codec_named, compress
from fedkd_utils.methods import Method
from fedkd_utils.networks import (
    State,
    TappedNetwork,
    build_network,
    build_student,
    check_finite,
    copy_state,
    load_state,
    normalisation_names,
    place,
)
from fedkd_utils.objectives import Batch
from fedkd_utils.seeds import generator_of, seed_of
from fedkd_utils.settings import Settings
from fedkd_utils.teacher import (
    FROZEN,
    TeacherSignals,
    TeacherUpdate,
    agreement,
    blend,
    freeze,
    release_rate,
    teacher_signals,
)
from fedkd_utils.training import (
    Augmentation,
    LabelledBatches,
    MakeOptimiser,
    Progress,
    TrainingLog,
    adamw,
    draw_batches,
    fit,
    in_time,
)
from fedkd_utils.transforms import SiteData


class FederationError(ValueError):
    """A site or an update that cannot take part; the message names the client, the fault and the remedy."""


@dataclass(frozen=True)
class Update:
    """What a client sends back."""

    client: str
    state: State
    n_examples: int  # n_k, labelled + unlabelled volumes
    metrics: dict[str, float]  # means over the round's steps, seconds, data_seconds, cpu_seconds (of all), steps
    teacher_state: State | None = None  # only when the teacher travels too (the released code)
    kept: State = field(default_factory=dict)  # what the client keeps for its next round; it never travels
    class_shares: dict[int, float] = field(default_factory=dict)  # see SiteData.class_shares; empty: all are drawn
    packet: State | None = None  # what travels in the place of ``state`` when updates are compressed

    @property
    def sent(self) -> State:
        """The tensors that travel to the server for the student."""
        return self.state if self.packet is None else self.packet


def steps_per_round(settings: Settings) -> int:
    """Optimiser steps of one client in one round."""
    return settings.local_epochs * settings.steps_per_epoch


def check_site(site: SiteData, method: Method) -> None:
    """Refuse a client that cannot run a method.

    Raises:
        FederationError: no labelled, unlabelled (when the method distils) or validation volume, or NaN voxels.
    """
    missing = {
        "labelled training": method.objective is not None and len(site.labelled_images) == 0,
        "unlabelled": method.needs_unlabelled and len(site.unlabelled_images) == 0,
        "validation": len(site.validation) == 0,
    }
    for what, is_missing in missing.items():
        if is_missing:
            raise FederationError(
                f"Client {site.name} has no {what} volume, which {method.title!r} needs: add one, or leave the client "
                "out."
            )
    for what, tensor in (("a labelled", site.labelled_images), ("an unlabelled", site.unlabelled_images)):
        if not bool(torch.isfinite(tensor).all()):
            raise FederationError(f"Client {site.name}: {what} volume holds NaN or infinite voxels. Export it again.")


def signals_for(
    teacher: TappedNetwork,
    site: SiteData,
    settings: Settings,
    seed: int,
    progress: Progress | None = None,
    classes: tuple[int, ...] | None = None,
) -> TeacherSignals:
    """The teacher's signals on a client's unlabelled volumes, with one seed per run, client and volume.

    ``classes`` are those that the teacher was taught, None means all; what both it and the client know is compared.
    """
    seeds = [seed_of(seed, "signals", site.name, index) for index in range(len(site.unlabelled_images))]
    passes = settings.teacher_passes if settings.response_weight else 0  # else nobody asks how sure it is
    signals = teacher_signals(teacher, site.unlabelled_images, passes, seeds, progress, classes)
    return replace(signals, trust=trust_in(teacher, site, classes))


def trust_in(teacher: TappedNetwork, site: SiteData, classes: tuple[int, ...] | None = None) -> float:
    """How far a teacher agrees with a client's few labels, 0 to 1, in the classes that both know."""
    both = [tuple(c for c in own if classes is None or c in classes) for own in site.classes_by_volume]
    return agreement(teacher, site.labelled_images, site.labels, both)


def local_names(method: Method, network: TappedNetwork) -> frozenset[str]:
    """The tensors of a student that never leave a client: of FedBN all of the normalisation, else none."""
    return normalisation_names(network) if method.local_normalisation else frozenset()


def kept_part(kept: Mapping[str, Tensor], part: str) -> State:
    """One part of what a client keeps: "own" tensors of its student, the "average", or what is "missing"."""
    return {name.removeprefix(f"{part}/"): t for name, t in kept.items() if name.startswith(f"{part}/")}


@torch.no_grad()
def follow(average: TappedNetwork, student: TappedNetwork, done: int, decay: float) -> None:
    """theta_T <- a theta_T + (1 - a) theta_S after step ``done`` (from 1), a = min(1 - 1/done, decay), in place.

    (Tarvainen and Valpola, arXiv 1703.01780; the start of a as in UA-MT's code: after the first step the average is
    the student.) ``done`` counts the whole run, not the round.
    """
    rate = 1 - min(1 - 1 / done, decay)
    source = student.state_dict()
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(source[name], rate)
        else:
            tensor.copy_(source[name])


def client_update(
    global_state: Mapping[str, Tensor],
    site: SiteData,
    method: Method,
    settings: Settings,
    round_number: int,
    seed: int,
    *,
    teacher: TappedNetwork | None = None,
    signals: TeacherSignals | None = None,
    kept: Mapping[str, Tensor] | None = None,
    teacher_update: TeacherUpdate = FROZEN,
    teacher_classes: tuple[int, ...] | None = None,
    augmentation: Augmentation | None = transforms.augment,
    make_optimiser: MakeOptimiser = adamw,
    progress: Progress | None = None,
) -> Update:
    """Train a client for one round: a function of its arguments, whoever calls it (simulation, process, Flower).

    It computes on the device on which the site's volumes lie.

    The optimiser is fresh each round; the schedule and the ramps count the whole run. Labelled batches, their
    augmentation and the dropout of the labelled pass depend on seed, client and round only, so every row sees the
    same.

    Args:
        global_state: the student as received, on the CPU; it is not changed.
        round_number: from 1.
        seed: of the run.
        teacher: needed by rows that distil, when ``signals`` are not given or the teacher follows the student.
        signals: of this teacher for this client (:func:`signals_for`); computed here when not given.
        teacher_classes: those that the teacher was taught; None: all.
        kept: ``Update.kept`` of this client's last round, nothing in the first: the mean teacher, FedBN's layers, or
            what compression has not delivered yet.
        progress: gets :func:`steps_per_round` steps.

    Raises:
        FederationError: the client lacks volumes, or a teacher, that the method needs.
        TrainingError: the loss is no longer finite.
        CheckpointError: the weights are no longer finite, which compression would hide.
    """
    started = time.thread_time()
    check_site(site, method)
    if method.objective is None:
        raise FederationError(f"{method.title!r} has no local training.")
    settings, objective, kept = method.adapt(settings), method.objective, kept or {}
    device = site.labelled_images.device
    moving = method.distils and teacher_update.kind == "release"
    if method.distils and teacher is None and (signals is None or moving):
        raise FederationError(f"{method.title!r} needs the teacher: send it to client {site.name} first.")
    network = build_student(settings, 0)
    local = local_names(method, network)
    own = {name: tensor for name, tensor in copy_state(network).items() if name in local} | kept_part(kept, "own")
    load_state(network, {**global_state, **own}, f"The student sent to client {site.name}")
    place(network, device)
    received = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    per_round = steps_per_round(settings)
    total, before = settings.rounds * per_round, (round_number - 1) * per_round
    own_seed = seed_of(seed, "client", site.name, round_number)
    labelled = LabelledBatches(
        site.labelled_images,
        site.labels,
        settings.batch_labelled,
        per_round,
        own_seed,
        augmentation,
        site.classes_by_volume,
    )
    order: Tensor | None = None
    if method.needs_unlabelled:
        if method.distils and teacher is not None and signals is None:
            signals = signals_for(teacher, site, settings, seed, classes=teacher_classes)
        count = len(site.unlabelled_images)
        order = draw_batches(count, settings.batch_unlabelled, per_round, generator_of(own_seed, "unlabelled"))
    teacher_state = copy_state(teacher) if moving and teacher is not None else None
    average: TappedNetwork | None = None
    if method.mean_teacher:
        average = freeze(build_student(settings, 0))
        load_state(average, kept_part(kept, "average") or global_state, f"The mean teacher of client {site.name}")
        place(average, device)

    def batch(step: int) -> Batch:
        images, labels = labelled(step - before)
        drawn = seed_of(own_seed, "objective", step)
        plain = Batch(images, labels, labelled.classes_of(step - before) or (), received=received, seed=drawn)
        if order is None:
            return plain
        chosen = order[step - before]
        half = replace(plain, unlabelled=site.unlabelled_images[chosen])
        return half if signals is None else _taught(half, signals.of(chosen), method)

    def loss(network: TappedNetwork, batch: Batch, progress: float) -> Mapping[str, Tensor]:
        if average is not None and batch.unlabelled is not None:  # it moved since the last step: nothing to cache
            seeds = [seed_of(batch.seed, "mean teacher", i) for i in range(len(batch.unlabelled))]
            batch = _taught(batch, teacher_signals(average, batch.unlabelled, settings.teacher_passes, seeds), method)
        return objective(network, batch, progress, settings)

    def after(done: int) -> None:
        if average is not None:
            follow(average, network, done, settings.average_decay)

    # A teacher that moves within the round changes what the next batch holds.
    batches = batch if moving else in_time(batch, range(before, before + per_round), device)
    optimiser = make_optimiser(network.parameters(), settings.learning_rate, settings.weight_decay)
    log = TrainingLog()
    for epoch in range(settings.local_epochs):
        first = before + epoch * settings.steps_per_epoch
        fit(
            network,
            optimiser,
            batches,
            loss,
            steps=range(first, first + settings.steps_per_epoch),
            total_steps=total,
            learning_rate=settings.learning_rate,
            seed=own_seed,
            log=log,
            label=f"round {round_number}, {site.name}",
            progress=progress,
            after_step=after if average is not None else None,
        )
        rate = release_rate((round_number - 1) * settings.local_epochs + epoch, settings.local_epochs)
        if teacher_state is not None and rate > 0:
            teacher_state = blend(teacher_state, copy_state(network), rate)
            moved = build_network(settings, 0).eval()
            load_state(moved, teacher_state)
            signals = signals_for(moved, site, settings, seed, classes=teacher_classes)
    parts = {name: float(np.mean([step[name] for step in log.steps])) for name in log.steps[0] if name != "step"}
    times = {
        "seconds": log.seconds,
        "data_seconds": log.data_seconds,
        "cpu_seconds": time.thread_time() - started,
        "steps": float(len(log.steps)),
    }
    trained = copy_state(network)
    keeps = {f"own/{name}": tensor for name, tensor in trained.items() if name in local}
    if average is not None:
        keeps |= {f"average/{name}": tensor for name, tensor in copy_state(average).items()}
    shared = {name: tensor for name, tensor in trained.items() if name not in local}
    packet: State | None = None
    if settings.compression is not None:
        check_finite(shared, f"The update of client {site.name}")  # an integer of 8 bits would hide NaN
        codec = codec_named(settings.compression)
        packet, shared, missing = compress(shared, global_state, kept_part(kept, "missing"), codec)
        keeps |= {f"missing/{name}": tensor for name, tensor in missing.items()}
    return Update(site.name, shared, site.examples, parts | times, teacher_state, keeps, site.class_shares, packet)


def _taught(batch: Batch, signals: TeacherSignals, method: Method) -> Batch:
    """A batch with what the teacher says about its unlabelled volumes."""
    return replace(
        batch,
        teacher_probabilities=signals.probabilities,
        teacher_entropy=signals.entropy,
        teacher_features=signals.features,
        teacher_classes=signals.classes,
        trust=signals.trust if method.weighs_trust else 1.0,
    )
