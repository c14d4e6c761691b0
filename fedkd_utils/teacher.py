"""The teacher: pretrained on the repository, kept on disk, and what it says about unlabelled volumes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fedkd_utils import cohorts, losses, metrics, transforms
from fedkd_utils.device import compute_device, repeatable, surroundings
from fedkd_utils.networks import (
    ChannelDropout,
    CheckpointError,
    State,
    TappedNetwork,
    build_network,
    load_checkpoint,
    load_state,
    nbytes,
    place,
    save_checkpoint,
)
from fedkd_utils.provenance import code_hash, files_hash, versions
from fedkd_utils.seeds import generator_of, seed_of
from fedkd_utils.settings import CARTILAGES, Settings, cache_folder
from fedkd_utils.site_folder import Site
from fedkd_utils.training import (
    Progress,
    TrainingLog,
    as_json,
    evaluating,
    mean_dice,
    predict_probabilities,
    train_supervised,
)
from fedkd_utils.transforms import SiteData

#: Code that a trained teacher depends on.
TEACHER_CODE = ("seeds", "transforms", "losses", "networks", "training", "teacher")

#: Settings that a trained teacher depends on; the others may change without a new teacher.
_TEACHER_SETTINGS = (
    "grid_shape",
    "grid_spacing_mm",
    "architecture",
    "channels",
    "normalisation",
    "dropout",
    "teacher_steps",
    "teacher_learning_rate",
    "batch_labelled",
    "weight_decay",
)

#: Stochastic passes in one batch: more are no faster on a CPU and take more memory.
_PASSES_AT_ONCE = 4


@dataclass(frozen=True)
class Teacher:
    """A trained teacher, frozen: evaluation mode, no gradient."""

    network: TappedNetwork
    path: Path
    validation: pd.DataFrame  # step, dice
    best_step: int
    best_dice: float  # on the repository's validation volumes
    seconds: float  # that its training took, then
    data_share: float  # of these, waiting for data
    classes: tuple[int, ...] | None = None  # that the repository labels; None: all

    @property
    def bytes(self) -> int:
        """The size of the one message that carries it."""
        return nbytes(self.network.state_dict())


def freeze(network: TappedNetwork) -> TappedNetwork:
    """Evaluation mode and no gradient, in place."""
    return network.eval().requires_grad_(False)


def pretrain_teacher(
    repository: SiteData,
    settings: Settings,
    seed: int,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> tuple[TappedNetwork, TrainingLog]:
    """Train a network from scratch on the repository at the grid; the best on its validation volumes is frozen.

    On :func:`device.compute_device`; the network comes back to the CPU. With a ``checkpoint`` it can be stopped at any
    moment (:func:`training.train_supervised`).
    """
    network = place(build_network(settings, seed_of(seed, "teacher")), compute_device())
    with repeatable():
        log = train_supervised(
            network,
            repository.labelled_images.to(compute_device()),
            repository.labels.to(compute_device()),
            steps=settings.teacher_steps,
            batch=settings.batch_labelled,
            learning_rate=settings.teacher_learning_rate,
            weight_decay=settings.weight_decay,
            seed=seed_of(seed, "teacher training"),
            labelled_classes=repository.classes_by_volume,
            validation=repository.validation,
            validate_every=max(settings.teacher_steps // 10, 1),
            label="teacher",
            progress=progress,
            checkpoint=checkpoint,
        )
    return freeze(place(network, torch.device("cpu"))), log


def teacher_for(
    settings: Settings, setting: str, seed: int = 0, root: Path | None = None, progress: Progress | None = None
) -> Teacher:
    """The teacher of a cohort: trained on first use, then read from ``<cache>/teachers``.

    It learns from the cohort's repository, or from the same subjects through ``settings.teacher_contrast``.
    The file is named by a hash of all it depends on (settings, the repository's files, code, seed, versions, device),
    so it is made anew when one of them changes, and also when it is damaged. ``progress`` gets
    ``settings.teacher_steps`` steps in all, at once when there is nothing to train.

    Args:
        root: the cache folder, :func:`settings.cache_folder` when not given.
    """
    if settings.teacher_contrast == "repository_dess":
        repository = cohorts.make_cohort(settings, setting, root=root).repository
    else:
        repository = cohorts.make_repository(settings, cohorts.teacher_scanner(settings, setting), root=root)
    return teacher_on(repository, settings, seed, root, progress)


def teacher_on(
    repository: Site,
    settings: Settings,
    seed: int = 0,
    root: Path | None = None,
    progress: Progress | None = None,
) -> Teacher:
    """The teacher of any labelled site on disk, cached like :func:`teacher_for`."""
    key = _cache_key(repository, settings, seed)
    path = (root or cache_folder()) / "teachers" / f"{settings.name}-{key[:16]}.safetensors"
    network = build_network(settings, 0)
    if path.is_file():
        try:
            state, facts = load_checkpoint(path)
            load_state(network, state, str(path))
            if progress is not None:
                progress(settings.teacher_steps, "teacher read from the cache")
            return _teacher(freeze(network), path, facts, repository)
        except CheckpointError:
            path.unlink(missing_ok=True)  # damaged: make it again
    standing = path.with_suffix(".training.safetensors")
    data = transforms.load_site(repository, settings)
    network, log = pretrain_teacher(data, settings, seed, progress, standing)
    facts = {
        "key": key,
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "versions": versions(),
        "validation": [{**line, "dice": as_json(line["dice"])} for line in log.validation],
        "best_step": log.best_step,
        "best_dice": as_json(log.best_dice),
        "seconds": log.seconds,
        "data_share": log.data_share,
    }
    save_checkpoint(path, network.state_dict(), facts)
    standing.unlink(missing_ok=True)
    return _teacher(network, path, facts, repository)


def _teacher(network: TappedNetwork, path: Path, facts: Mapping[str, Any], repository: Site) -> Teacher:
    taught = {c for item in repository.training for c in item.labelled_classes}
    return Teacher(
        network=network,
        path=path,
        validation=pd.DataFrame(facts["validation"], columns=["step", "dice"]).astype({"dice": float}),
        best_step=facts["best_step"],
        best_dice=float("nan") if facts["best_dice"] is None else facts["best_dice"],
        seconds=facts["seconds"],
        data_share=facts["data_share"],
        classes=None if taught >= set(CARTILAGES) else tuple(sorted(taught)),
    )


def _cache_key(repository: Site, settings: Settings, seed: int) -> str:
    files = [path for item in (*repository.training, *repository.validation) for path in (item.image, item.label)]
    parts = {
        "settings": {name: getattr(settings, name) for name in _TEACHER_SETTINGS},
        "classes": [item.labelled_classes for item in (*repository.training, *repository.validation)],
        "files": files_hash([path for path in files if path is not None]),
        "code": code_hash(TEACHER_CODE),
        "seed": seed,
        "surroundings": surroundings(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TeacherSignals:
    """What a teacher says about U unlabelled volumes, computed once because it is frozen and they stay clean.

    float32, so that a signal from memory equals one computed again to the last bit. Memory per volume:
    4 (C + 1) bytes a voxel and 4 F a position of the bottleneck, 2.8 MB at the quick grid, 32 MB at the paper's.
    """

    probabilities: Tensor  # q (U, C, D, H, W)
    entropy: Tensor  # H of the mean of the stochastic predictions (U, D, H, W), nats
    features: Tensor  # f_T at the bottleneck (U, F, d, h, w)
    trust: float = 1.0  # the teacher's mean Dice on the client's few labels (:func:`agreement`)
    classes: tuple[int, ...] | None = None  # that the teacher was taught; None: all

    def of(self, chosen: Tensor) -> TeacherSignals:
        """The signals of some of the volumes, by their numbers."""
        return replace(
            self,
            probabilities=self.probabilities[chosen],
            entropy=self.entropy[chosen],
            features=self.features[chosen],
        )

    @property
    def bytes(self) -> int:
        """Memory of the three tensors."""
        return nbytes({"q": self.probabilities, "h": self.entropy, "f": self.features})


def teacher_signals(
    teacher: TappedNetwork,
    images: Tensor,
    passes: int,
    seeds: Sequence[int],
    progress: Progress | None = None,
    classes: tuple[int, ...] | None = None,
) -> TeacherSignals:
    """q, H and f_T for unlabelled volumes, as UA-MT (doi:10.1007/978-3-030-32245-8_67) estimates uncertainty.

    Without stochastic passes nothing is known of the uncertainty: H = 0, the teacher is trusted everywhere.
    q = p_T(u + xi_0) and f_T come from one clean pass (no dropout) on the noisy volume; H is the entropy of the
    mean of ``passes`` predictions p_T(u + xi_i), each with its own noise and dropout. Normalisation layers stay in
    evaluation mode, so batch statistics do not drift. The teacher is not touched (a copy works).

    Args:
        images: (U, 1, D, H, W) z-scored; the copy works, and the signals lie, on their device.
        passes: M.
        seeds: one per volume; a volume's signals depend on nothing else.
        progress: gets one step per volume.
        classes: that the teacher was taught; H is over these and one background for all the rest. None: all.
    """
    if passes < 0 or len(seeds) != len(images) or len(images) == 0:
        raise ValueError(
            f"{len(images)} volumes, {len(seeds)} seeds and {passes} passes: at least one volume, a seed for each "
            "and no negative number of passes are needed."
        )
    network = place(copy.deepcopy(teacher), images.device)
    q, uncertainty, features = [], [], []
    with evaluating(network):
        for image, seed in zip(images, seeds, strict=True):
            noise = generator_of(seed, "noise")
            network.seed_dropout(seed_of(seed, "dropout"))
            logits, bottleneck = network.forward_with_features(_noisy(image[None], noise))
            q.append(logits.softmax(dim=1))
            features.append(bottleneck)
            _dropout(network, True)
            mean = torch.zeros_like(q[-1])
            for first in range(0, passes, _PASSES_AT_ONCE):
                copies = image[None].expand(min(_PASSES_AT_ONCE, passes - first), *image.shape)
                mean += network(_noisy(copies, noise)).softmax(dim=1).sum(dim=0, keepdim=True)
            _dropout(network, False)
            mean = mean / max(passes, 1)
            uncertainty.append(losses.entropy(mean if classes is None else losses.fold_probabilities(mean, classes)))
            if progress is not None:
                progress(1, "teacher looks at unlabelled volumes")
        said = torch.cat(q), torch.cat(uncertainty), torch.cat(features)
    probabilities, entropy, bottleneck = (tensor.clone() for tensor in said)  # no inference tensors outside
    return TeacherSignals(probabilities, entropy, bottleneck, classes=classes)


def agreement(teacher: TappedNetwork, images: Tensor, labels: Tensor, classes: Sequence[Sequence[int]]) -> float:
    """How far a teacher agrees with a client's few labels: its mean Dice on them, 0 to 1.

    0 also when there is nothing to measure.

    Args:
        images: (L, 1, D, H, W) z-scored.
        labels: (L, D, H, W).
        classes: those that the client labels, for each volume.
    """
    every = sorted({c for own in classes for c in own})
    found = predict_probabilities(teacher, images).argmax(dim=1).numpy() if len(images) else np.empty(0)
    pairs = zip(found, labels.cpu().numpy(), strict=True)
    scores = [
        [metrics.dice(predicted == c, truth == c) if c in own else math.nan for c in every]
        for (predicted, truth), own in zip(pairs, classes, strict=True)
    ]
    dice = mean_dice(np.array(scores).reshape(-1, max(len(every), 1)))
    return 0.0 if np.isnan(dice) else dice


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + losses.clipped_noise(images.shape, generator).to(images)


def _dropout(network: TappedNetwork, active: bool) -> None:
    for module in network.modules():
        if isinstance(module, ChannelDropout):
            module.train(active)


@dataclass(frozen=True)
class TeacherUpdate:
    """How the teacher follows the students.

    ``"frozen"``: never (the paper). ``"hand_over"``: after ``warm_up_rounds`` rounds (at least one), theta_T <-
    (1 - a) theta_T + a theta_S at the start of each round, theta_S the average all clients just received, so
    nothing more travels.
    ``"release"``: the released counter (:func:`release_rate`) on each client after each local epoch; its teachers
    travel in both directions and are averaged like the students.
    """

    kind: str = "frozen"
    warm_up_rounds: int = 0
    rate: float = 0.0  # a

    def __post_init__(self) -> None:
        if self.kind not in ("frozen", "hand_over", "release"):
            raise ValueError(f"A teacher is 'frozen', 'hand_over' or 'release', not {self.kind!r}.")
        if not 0 <= self.rate <= 1 or self.warm_up_rounds < 0:
            raise ValueError("The rate must lie between 0 and 1 and warm_up_rounds must not be negative.")


FROZEN = TeacherUpdate()
RELEASE = TeacherUpdate("release")


def blend(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], rate: float) -> State:
    """(1 - a) theta_T + a theta_S, in float64; integer counters of the teacher are copied."""
    mixed = {}
    for name, tensor in teacher.items():
        if tensor.is_floating_point():
            mixed[name] = ((1 - rate) * tensor.double() + rate * student[name].double()).to(tensor.dtype)
        else:
            mixed[name] = tensor.clone()
    return mixed


def release_rate(epoch: int, local_epochs: int) -> float:
    """a of the released code after local epoch e, counted from 0 over the whole run: min(e / E, 0.99) from e = 6.

    Frozen for six epochs, and then gone: of a teacher, the product of 1 - a is left, 2e-12 after one round of 30.
    """
    return 0.0 if epoch < 6 else min(epoch / local_epochs, 0.99)
