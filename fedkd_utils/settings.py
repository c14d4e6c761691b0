"""Every knob of the course in one frozen object, with four instances: quick, reference, paper and paper_short."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: The folder of the whole project.
PROJECT = Path(__file__).resolve().parent.parent

CLASS_NAMES = ("background", "femoral", "tibial", "patellar")
CARTILAGES = (1, 2, 3)
SETTINGS_OF_CLIENTS = ("paper_like", "heterogeneous")


@dataclass(frozen=True)
class Settings:
    """One profile of the course. Shapes are (slices, anterior-posterior, inferior-superior) in RAS order."""

    name: str
    # The common grid on which every network works.
    grid_shape: tuple[int, int, int]
    grid_spacing_mm: tuple[float, float, float]
    # Who has what (numbers of volumes).
    repository_training: int
    repository_validation: int
    repository_test: int
    clients: int
    client_labelled: int
    client_unlabelled: int
    client_validation: int
    client_test: int
    # Networks.
    architecture: str  # "unet" or "vnet"
    channels: tuple[int, ...]  # of the UNet; ignored by the V-Net
    dropout: float
    # Teacher pretraining.
    teacher_steps: int
    teacher_learning_rate: float
    # The federation.
    rounds: int
    local_epochs: int
    steps_per_epoch: int
    batch_labelled: int
    batch_unlabelled: int
    learning_rate: float
    weight_decay: float
    # Distillation (see fedkd_utils/losses.py for the equations).
    response_weight: float  # lambda_max
    feature_weight: float  # beta
    feature_temperature: float
    teacher_passes: int  # M, the stochastic teacher predictions behind the uncertainty mask; 0: no mask
    mask_classes: int  # ln of it is the mask's ceiling: 4, all classes, as we read the paper; 2 in the released code
    response_loss: str  # "squares" as the paper, or "cross_entropy_dice"
    response_ramp: float  # the share of the run over which the response's weight ramps up; 0: none
    teacher_contrast: str  # a scanner of acquisition.SCANNERS, or "protocols": those of the clients (see cohorts.py)
    student_shrink: int  # the student's channels are the teacher's divided by this
    # The other rows (see fedkd_utils/methods.py).
    normalisation: str  # "own" (UNet: instance, V-Net: batch), "batch", "group" or "instance"
    proximal_weight: float  # mu of FedProx
    average_decay: float  # of the mean teacher
    confidence: float  # from which probability a pseudo-label counts
    # What an update becomes before it travels, and what the server does with it; None: nothing.
    compression: str | None  # a codec of fedkd_utils/compression.py, hospital to server
    clip_norm: float | None  # S: no client's change counts for more than this norm
    noise_multiplier: float | None  # z: noise of deviation z S on the sum of the clipped changes


QUICK = Settings(
    name="quick",
    grid_shape=(20, 80, 80),
    grid_spacing_mm=(4.0, 1.2, 1.2),
    repository_training=48,
    repository_validation=4,
    repository_test=6,
    clients=4,
    client_labelled=2,
    client_unlabelled=8,
    client_validation=2,
    client_test=4,
    architecture="unet",
    channels=(16, 32, 64, 128),
    dropout=0.1,
    teacher_steps=500,
    teacher_learning_rate=1e-2,
    rounds=10,
    local_epochs=2,
    steps_per_epoch=5,
    batch_labelled=2,
    batch_unlabelled=2,
    learning_rate=1e-2,
    weight_decay=1e-4,
    response_weight=0.1,
    feature_weight=1.0,
    feature_temperature=1.0,
    teacher_passes=8,
    mask_classes=4,
    response_loss="squares",
    response_ramp=1.0,
    teacher_contrast="repository_dess",
    student_shrink=1,
    normalisation="own",
    proximal_weight=0.01,
    average_decay=0.99,
    confidence=0.95,
    compression=None,
    clip_norm=None,
    noise_multiplier=None,
)


#: For results over several seeds: a fifth more rounds, a teacher trained twice as long, twice the test volumes.
REFERENCE = replace(QUICK, name="reference", rounds=12, teacher_steps=1000, client_test=8)

#: The paper's geometry and schedule, for a GPU: 16 x 288 x 352 voxels of 4.5 x 0.30 x 0.30 mm, V-Net, 30 rounds of 30
#: local epochs of 4 iterations, 17 labelled volumes a client. The paper has 1000 unlabelled volumes a client; what a
#: teacher says about one takes 32 MB, and 100 of them a client fit on one GPU.
PAPER = replace(
    QUICK,
    name="paper",
    grid_shape=(16, 288, 352),
    grid_spacing_mm=(4.5, 0.30, 0.30),
    repository_training=300,
    repository_validation=40,
    repository_test=40,
    client_labelled=17,
    client_unlabelled=100,
    client_validation=10,
    client_test=20,
    architecture="vnet",
    teacher_steps=30_000,
    rounds=30,
    local_epochs=30,
    steps_per_epoch=4,
    batch_labelled=4,
    batch_unlabelled=4,
    weight_decay=1e-7,
)


#: The same geometry and networks in short: a thirtieth of the steps, and fewer volumes.
PAPER_SHORT = replace(
    PAPER,
    name="paper_short",
    repository_training=48,
    repository_validation=4,
    repository_test=2,
    client_labelled=4,
    client_unlabelled=16,
    client_validation=2,
    client_test=4,
    teacher_steps=1000,
    rounds=6,
    local_epochs=5,
)


def any_contrast(settings: Settings) -> Settings:
    """The same with a teacher for images of unknown contrast: every contrast at once takes three times as long."""
    return replace(settings, teacher_contrast="random", teacher_steps=3 * settings.teacher_steps)


def entry_named(entries: Mapping[str, T], name: str, what: str) -> T:
    """The entry of a name.

    Raises:
        ValueError: there is none; names those that there are.
    """
    if name not in entries:
        raise ValueError(f"There is no {what} {name!r}: choose one of {', '.join(entries)}.")
    return entries[name]


PROFILES = {settings.name: settings for settings in (QUICK, REFERENCE, PAPER, PAPER_SHORT)}


def cache_folder() -> Path:
    """The folder of everything that is made on first use: ``data/cache``, or ``$FEDKD_CACHE`` when set."""
    named = os.environ.get("FEDKD_CACHE")
    return Path(named) if named else PROJECT / "data" / "cache"
