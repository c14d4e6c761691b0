"""Training and evaluation of one network: the loop that the teacher, a hospital alone and a client share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedkd_utils import losses, metrics, transforms
from fedkd_utils.networks import (
    CheckpointError,
    State,
    TappedNetwork,
    copy_state,
    load_checkpoint,
    load_state,
    save_checkpoint,
)
from fedkd_utils.seeds import generator_of, seed_of
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES
from fedkd_utils.transforms import Case

#: Called with (steps done since the last call, a short note) while something long goes on.
Progress = Callable[[int, str], None]

#: (images, labels, generator) -> (images, labels)
Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]

#: (parameters, learning rate, weight decay) -> optimiser
MakeOptimiser = Callable[[Iterator[nn.Parameter], float, float], torch.optim.Optimizer]

B = TypeVar("B")


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says where, why and what to do."""


def adamw(parameters: Iterator[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)


def poly_learning_rate(initial: float, step: int, total_steps: int, power: float = 0.9) -> float:
    """initial (1 - step / total)^power, step from 0. The release restarts it each round; here total is the run."""
    return initial * (1 - step / total_steps) ** power


def draw_batches(count: int, batch: int, steps: int, generator: torch.Generator) -> Tensor:
    """Which examples each step sees, (steps, batch): random orders of all ``count``, one after the other.

    Every example is seen as often as any other, give or take one. A batch larger than ``count`` repeats some.
    """
    orders = -(-steps * batch // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(orders)])[: steps * batch].view(
        steps, batch
    )


@dataclass
class LabelledBatches:
    """The labelled batches of a stretch of training, all of them fixed by one seed.

    Call it with 0 .. steps - 1 in turn: images (B, 1, D, H, W) and labels (B, D, H, W), augmented.
    """

    images: Tensor  # (L, 1, D, H, W)
    labels: Tensor  # (L, D, H, W)
    batch: int
    steps: int
    seed: int
    augmentation: Augmentation | None = transforms.augment
    classes: Sequence[tuple[int, ...]] | None = None  # that the source of each volume labelled; None: all

    def __post_init__(self) -> None:
        if len(self.images) == 0 or len(self.images) != len(self.labels):
            raise TrainingError(
                f"{len(self.images)} labelled images and {len(self.labels)} labels: training needs at least one "
                "pair. Put images in imagesTr and their labels in labelsTr."
            )
        self.order = draw_batches(len(self.images), self.batch, self.steps, generator_of(self.seed, "batches"))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        chosen = self.order[step]
        images, labels = self.images[chosen], self.labels[chosen]
        if self.augmentation is None:
            return images, labels
        return self.augmentation(images, labels, generator_of(self.seed, "augmentation", step))

    def classes_of(self, step: int) -> tuple[int, ...] | tuple[tuple[int, ...], ...] | None:
        """The classes that the sources of a batch labelled: one tuple for all, or one per volume where they differ."""
        if self.classes is None or len(set(self.classes)) == 1:
            return self.classes[0] if self.classes else None
        return tuple(self.classes[number] for number in self.order[step].tolist())


@dataclass
class TrainingLog:
    """What happened in a training: one dictionary per step, and where the time went."""

    steps: list[dict[str, float]] = field(default_factory=list)  # step, learning_rate, loss, its parts
    validation: list[dict[str, float]] = field(default_factory=list)  # step, dice
    best_step: int = 0
    best_dice: float = float("nan")
    seconds: float = 0.0  # wall time of the steps, without validation
    data_seconds: float = 0.0  # of these, waiting for a batch

    @property
    def data_share(self) -> float:
        """The share of the time that training waited for data."""
        return self.data_seconds / self.seconds if self.seconds else 0.0

    def frame(self) -> pd.DataFrame:
        """The steps as a table."""
        return pd.DataFrame(self.steps)


def fit(
    network: TappedNetwork,
    optimiser: torch.optim.Optimizer,
    batches: Callable[[int], B],
    loss: Callable[[TappedNetwork, B, float], Mapping[str, Tensor]],
    *,
    steps: range,
    total_steps: int,
    learning_rate: float,
    seed: int,
    log: TrainingLog,
    label: str = "training",
    progress: Progress | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Optimise a network in place, one call of ``loss`` per step.

    Args:
        batches: from a step to its batch.
        loss: (network, batch, progress in [0, 1)) -> scalars by name; "loss" is the one to minimise.
        steps: global step numbers; the poly schedule and the progress count them against ``total_steps``.
        seed: of the dropout masks; every step starts them anew, so a row that adds a second pass through the
            network sees the same masks in the first.
        log: grows by this stretch.
        after_step: called with the number of steps done.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    network.train()
    for step in steps:
        start = time.perf_counter()
        batch = batches(step)
        ready = time.perf_counter()
        rate = poly_learning_rate(learning_rate, step, total_steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        network.seed_dropout(seed_of(seed, "dropout", step))
        optimiser.zero_grad()
        parts = loss(network, batch, step / total_steps)
        parts["loss"].backward()
        optimiser.step()
        numbers = {name: value.item() for name, value in parts.items()}
        if not np.isfinite(numbers["loss"]):
            raise TrainingError(
                f"{label}: the loss is {numbers['loss']} at step {step}. Lower the learning rate (now {rate:.2g}) or "
                "look for broken voxels in its volumes."
            )
        end = time.perf_counter()
        log.steps.append({"step": step, "learning_rate": rate, **numbers})
        log.seconds += end - start
        log.data_seconds += ready - start
        if progress is not None:
            progress(1, f"{label}, loss {numbers['loss']:.3f}")
        if after_step is not None:
            after_step(step + 1)
            network.train()


def in_time(batches: Callable[[int], B], steps: range, device: torch.device) -> Callable[[int], B]:
    """The same batches; on a GPU each is made by another thread while the one before is used.

    A GPU computes a step by itself, and meanwhile the CPU draws the numbers of the next batch. Call the result with
    ``steps`` in turn.
    """
    if device.type != "cuda":
        return batches
    coming = _ahead(batches, steps)
    return lambda step: next(coming)


def _ahead(batches: Callable[[int], B], steps: range) -> Iterator[B]:
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(batches, step) for step in steps[:1]]
        for step in steps:
            batch = coming.pop().result()
            coming += [pool.submit(batches, following) for following in range(step + 1, min(step + 2, steps.stop))]
            yield batch


def train_supervised(
    network: TappedNetwork,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    labelled_classes: Sequence[tuple[int, ...]] | None = None,
    validation: Sequence[Case] = (),
    validate_every: int = 50,
    augmentation: Augmentation | None = transforms.augment,
    make_optimiser: MakeOptimiser = adamw,
    label: str = "training",
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> TrainingLog:
    """Train a network in place with L_sup, and keep the weights that validate best.

    Network, images and labels lie on one device.

    Args:
        images: (L, 1, D, H, W) z-scored.
        labels: (L, D, H, W).
        labelled_classes: that the source of each volume drew; None: all.
        validation: cases that choose the weights; without any, the last ones stay.
        checkpoint: the file of this very training. It is written after each validation; a training that was killed goes
            on from there and ends with the same numbers. The caller deletes it.

    Raises:
        TrainingError: no labelled volume, or a loss that is no longer finite.
        CheckpointError: the checkpoint belongs to another network.
    """
    batches = LabelledBatches(images, labels, batch, steps, seed, augmentation, labelled_classes)
    optimiser = make_optimiser(network.parameters(), learning_rate, weight_decay)
    log, best, begun = TrainingLog(), State(), 0
    if checkpoint is not None and checkpoint.is_file():
        log, best, begun = _take_up(checkpoint, network, optimiser)
        if progress is not None:
            progress(begun, f"{label}, {begun} steps read from their checkpoint")

    def triple(step: int) -> tuple[Tensor, Tensor, losses.LabelledClasses]:
        return *batches(step), batches.classes_of(step)

    def loss(
        network: TappedNetwork, batch: tuple[Tensor, Tensor, losses.LabelledClasses], progress: float
    ) -> dict[str, Tensor]:
        return {"loss": losses.supervised_loss(network(batch[0]), *batch[1:])}

    def choose(done: int) -> None:
        nonlocal best
        if done % validate_every and done < steps:
            return
        dice = validate(network, validation)
        log.validation.append({"step": done, "dice": dice})
        if not best or is_better(dice, log.best_dice):
            log.best_step, log.best_dice, best = done, dice, copy_state(network)
        if checkpoint is not None:
            _leave_off(checkpoint, network, optimiser, log, best)

    fit(
        network,
        optimiser,
        in_time(triple, range(begun, steps), images.device),
        loss,
        steps=range(begun, steps),
        total_steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        log=log,
        label=label,
        progress=progress,
        after_step=choose if len(validation) else None,
    )
    if best:
        load_state(network, best)
    else:
        log.best_step = steps
    network.eval()
    return log


def _leave_off(
    path: Path, network: TappedNetwork, optimiser: torch.optim.Optimizer, log: TrainingLog, best: State
) -> None:
    """Write where a training stands, in one step."""
    moments = optimiser.state_dict()["state"]
    tensors = {f"network/{name}": tensor for name, tensor in copy_state(network).items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    tensors |= {f"optimiser/{i}/{name}": value for i, own in moments.items() for name, value in own.items()}
    facts = vars(log) | {"best_dice": as_json(log.best_dice)}
    facts["validation"] = [{**line, "dice": as_json(line["dice"])} for line in log.validation]
    save_checkpoint(path, tensors, facts)


def _take_up(path: Path, network: TappedNetwork, optimiser: torch.optim.Optimizer) -> tuple[TrainingLog, State, int]:
    """Put a training back to where :func:`_leave_off` wrote it: the log, the best weights and the steps done.

    A damaged file counts as none.
    """
    try:
        tensors, facts = load_checkpoint(path)
    except CheckpointError:
        path.unlink(missing_ok=True)
        return TrainingLog(), {}, 0
    parts: dict[str, State] = {"network": {}, "best": {}, "optimiser": {}}
    for key, tensor in tensors.items():
        part, name = key.split("/", 1)
        parts[part][name] = tensor
    load_state(network, parts["network"], str(path))
    moments: dict[int, State] = {}
    for key, tensor in parts["optimiser"].items():
        index, name = key.split("/", 1)
        moments.setdefault(int(index), {})[name] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    nan = float("nan")
    for line in (*facts["validation"], facts):
        name = "best_dice" if line is facts else "dice"
        line[name] = nan if line[name] is None else line[name]
    log = TrainingLog(**facts)
    return log, parts["best"], len(log.steps)


def as_json(dice: float) -> float | None:
    """A Dice as JSON holds it: null where nothing could be measured."""
    return None if np.isnan(dice) else dice


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; batch statistics stay, dropout is off."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def predict_probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """p = softmax(z): (B, 1, D, H, W) -> (B, C, D, H, W), or (1, D, H, W) -> (C, D, H, W).

    One volume at a time, so the digits do not depend on what else is in the batch. The volumes may lie anywhere; they
    go to the network's device, and the probabilities come back to the CPU.
    """
    single = images.ndim == 4
    device = next(network.parameters()).device
    with evaluating(network):
        batch = images[None] if single else images
        p = torch.cat([network(volume[None].to(device)).softmax(dim=1).cpu() for volume in batch])
    return p[0].clone() if single else p.clone()


def grid_dice(network: nn.Module, cases: Sequence[Case], classes: Sequence[int] = CARTILAGES) -> NDArray[np.float64]:
    """Dice on the common grid, (cases, classes); NaN where a class is in neither, or its source did not draw it.

    Raises:
        TrainingError: no cases, or one without a label.
    """
    if not cases:
        raise TrainingError("There is no case to validate on: give the site validation volumes with labels.")
    scores = np.full((len(cases), len(classes)), np.nan)
    for row, case in enumerate(cases):
        if case.label is None:
            raise TrainingError(f"{case.name}: a case without a label cannot be validated. Add its label file.")
        predicted, truth = predict_probabilities(network, case.image).argmax(dim=0).numpy(), case.label.numpy()
        for column, c in enumerate(classes):
            if c in case.labelled_classes:
                scores[row, column] = metrics.dice(predicted == c, truth == c)
    return scores


def mean_dice(scores: NDArray[np.float64]) -> float:
    """The mean over the classes of the mean over the cases, NaN left out; NaN if nothing is left."""
    by_class = [column[~np.isnan(column)] for column in scores.T]
    means = [column.mean() for column in by_class if column.size]
    return float(np.mean(means)) if means else float("nan")


def is_better(dice: float, than: float) -> bool:
    """Whether a validation Dice is strictly higher; NaN (nothing to measure) is lower than any number."""
    return not np.isnan(dice) and (bool(np.isnan(than)) or dice > than)


def validate(network: nn.Module, cases: Sequence[Case]) -> float:
    """The mean foreground Dice on the common grid, which chooses checkpoints."""
    return mean_dice(grid_dice(network, cases))


def evaluate_cases(network: nn.Module, cases: Sequence[Case]) -> pd.DataFrame:
    """Every metric of every case and class in mm on the volume's own grid.

    The probabilities go back to the volume's own grid, then the largest one wins. Two lines per case and class:
    ``components`` "all" and "largest" (:func:`metrics.case_metrics`).

    Raises:
        TrainingError: no cases, or one without a label.
    """
    if not cases:
        raise TrainingError("There is no case to evaluate: give the site test volumes with labels.")
    rows: list[dict[str, Any]] = []
    for case in cases:
        if case.native_label is None:
            raise TrainingError(f"{case.name}: a case without a label cannot be evaluated. Add its label file.")
        prediction = transforms.to_native(predict_probabilities(network, case.image), case)
        measured = metrics.case_metrics(
            prediction,
            case.native_label,
            transforms.voxel_sizes_mm(case.native_affine),
            classes=[c for c in CARTILAGES if c in case.labelled_classes],
            components=("all", "largest"),
        )
        rows += [{"case": case.name, **row} for row in measured]
    return pd.DataFrame(rows)


def class_columns(scores: NDArray[np.float64]) -> dict[str, float]:
    """Mean Dice over cases by name of the cartilage, from :func:`grid_dice` of all cartilages."""
    return {CLASS_NAMES[c]: mean_dice(scores[:, [i]]) for i, c in enumerate(CARTILAGES)}
