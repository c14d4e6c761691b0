"""Benchmark: a local step of each row against a supervised one, and where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fedkd_utils import transforms
from fedkd_utils.clients import client_update, signals_for, steps_per_round
from fedkd_utils.methods import ROWS, Method
from fedkd_utils.networks import TappedNetwork, build_network, build_student, copy_state
from fedkd_utils.objectives import Batch, dual_distillation, supervised
from fedkd_utils.seeds import generator_of, seed_of
from fedkd_utils.settings import CARTILAGES, QUICK, REFERENCE, Settings
from fedkd_utils.teacher import freeze, teacher_signals
from fedkd_utils.timing import Effort, Line, in_turn, line, ratios
from fedkd_utils.training import adamw
from fedkd_utils.transforms import Case, SiteData

#: Of the issue: a dual-distillation step against a supervised one on as many student volumes; waiting for data.
STEP, DATA = 1.25, 0.05

#: Rows whose step is measured, besides dual distillation in two formulations.
RIVAL_ROWS = ("uamt", "mean_teacher", "ssfl_released", "ssfl_published", "fedsemi")


def noise_site(name: str, settings: Settings, labelled: int, unlabelled: int, validation: int = 1) -> SiteData:
    """A site whose volumes are noise on the grid, with every class in a box: how long a step takes is all the same."""
    drawn = generator_of("noise site", name)
    shape = settings.grid_shape
    label = torch.zeros(shape, dtype=torch.int64)
    for c in CARTILAGES:
        label[:, c * shape[1] // 5 : (c + 1) * shape[1] // 5, shape[2] // 4 : shape[2] // 2] = c

    def images(count: int) -> Tensor:
        return torch.randn((count, 1, *shape), generator=drawn)

    affine = np.diag([*settings.grid_spacing_mm, 1.0])
    cases = [
        Case(f"{name}-{i}", image, label, affine, label.numpy().astype(np.uint8), shape, affine, CARTILAGES)
        for i, image in enumerate(images(validation))
    ]
    labels = label.expand(labelled, *shape).contiguous()
    return SiteData(name, images(labelled), labels, images(unlabelled), cases, [], CARTILAGES)


def asked_at_every_step(teacher: TappedNetwork) -> Method:
    """Dual distillation as the authors released it: nine teacher passes per unlabelled volume at every step."""

    def objective(network: TappedNetwork, batch: Batch, progress: float, settings: Settings) -> Mapping[str, Tensor]:
        assert batch.unlabelled is not None
        seeds = [seed_of(batch.seed, "asked", i) for i in range(len(batch.unlabelled))]
        said = teacher_signals(teacher, batch.unlabelled, settings.teacher_passes, seeds)
        asked = replace(
            batch,
            teacher_probabilities=said.probabilities,
            teacher_entropy=said.entropy,
            teacher_features=said.features,
        )
        return dual_distillation(network, asked, progress, settings)

    return Method("asked", "Dual distillation as released", objective, pseudo_labels=True)


def steps(effort: Effort) -> list[Line]:
    """CPU milliseconds of a local step, the client update's own work included, and its ratio to a supervised step.

    The supervised step has as many volumes in its batch as the student sees in the others, labelled and unlabelled.
    """
    count = 2 if effort.quick else 4
    settings = replace(QUICK, local_epochs=1, steps_per_epoch=count)
    double = replace(settings, batch_labelled=settings.batch_labelled + settings.batch_unlabelled)
    site = noise_site("steps", settings, double.batch_labelled, 2 * settings.batch_unlabelled)
    teacher = freeze(build_network(settings, 1))
    state = copy_state(build_student(settings, 0))
    signals = signals_for(teacher, site, settings, 0)

    def update(method: Method, chosen: Settings = settings, plain: bool = False) -> Callable[[], object]:
        return lambda: client_update(
            copy_state(build_student(method.adapt(chosen), 0)) if method.changes else state,
            site,
            method,
            chosen,
            1,
            0,
            signals=signals if method.distils else None,
            augmentation=None if plain else transforms.augment,
        )

    volumes = double.batch_labelled
    base, bare = f"supervised, {volumes} volumes", f"supervised, {volumes} volumes, not augmented"
    cases = {
        base: update(ROWS["fedavg"], double),
        "dual distillation": update(ROWS["dual_kd"]),
        "dual distillation, nine teacher passes a step": update(asked_at_every_step(teacher)),
        **{ROWS[row].title: update(ROWS[row]) for row in RIVAL_ROWS},
        f"supervised, {settings.batch_labelled} volumes": update(ROWS["fedavg"]),
        bare: update(ROWS["fedavg"], double, plain=True),
        "dual distillation, not augmented": update(ROWS["dual_kd"], plain=True),
    }
    seconds = in_turn(cases, effort.repeats)
    lines = [line(f"step: {name}", "ms", [1000 * s / count for s in own]) for name, own in seconds.items()]
    for name, own in seconds.items():
        against = bare if name.endswith("not augmented") else base
        if name not in (base, bare):
            target = STEP if name in ("dual distillation", "dual distillation, not augmented") else None
            lines.append(line(f"{name} / {against}", "ratio", ratios(own, seconds[against]), at_most=target))
    return lines


class _Stamps:
    """CPU seconds of each share of the steps of a client update, taken where it takes functions from outside."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("data", "student forward", "student backward", "optimiser"), 0.0)
        self._forward_done = 0.0

    def augment(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = time.thread_time()
        augmented = transforms.augment(images, labels, generator)
        self.seconds["data"] += time.thread_time() - start
        return augmented

    def objective(
        self, network: TappedNetwork, batch: Batch, progress: float, settings: Settings
    ) -> Mapping[str, Tensor]:
        start = time.thread_time()
        parts = dual_distillation(network, batch, progress, settings)
        self._forward_done = time.thread_time()
        self.seconds["student forward"] += self._forward_done - start
        return parts

    def optimiser(self, parameters: Iterator[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
        made = adamw(parameters, rate, decay)

        def before(*_: Any) -> None:
            self._started = time.thread_time()
            self.seconds["student backward"] += self._started - self._forward_done

        made.register_step_pre_hook(before)
        made.register_step_post_hook(lambda *_: self._count("optimiser", self._started))
        return made

    def _count(self, name: str, start: float) -> None:
        self.seconds[name] += time.thread_time() - start


class _Convolutions(TorchDispatchMode):
    """CPU seconds inside convolutions, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {"forward": 0.0, "backward": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.seconds["forward"] += time.thread_time() - start
        elif func is torch.ops.aten.convolution_backward.default:
            self.seconds["backward"] += time.thread_time() - start
        return out


def profile(effort: Effort) -> list[Line]:
    """The shares of a dual-distillation step, and the convolutions' GFLOP/s against a large product of matrices.

    What the teacher says is asked once a run; its share is that of the steps of a run of the reference profile. Shares
    are of CPU time, and what is left over is the update's own: building the student, copying its state, indexing.
    """
    count = 2 if effort.quick else 5
    settings = replace(QUICK, local_epochs=1, steps_per_epoch=count)
    site = noise_site("profile", settings, QUICK.client_labelled, QUICK.client_unlabelled)
    teacher, state = freeze(build_network(settings, 1)), copy_state(build_student(settings, 0))
    start = time.thread_time()
    signals = signals_for(teacher, site, settings, 0)
    looking = (time.thread_time() - start) / (REFERENCE.rounds * steps_per_round(REFERENCE))
    shares: dict[str, list[float]] = {}
    for repeat in range(effort.repeats + 1):
        stamps = _Stamps()
        method = replace(ROWS["dual_kd"], objective=stamps.objective)
        start = time.thread_time()
        client_update(
            state,
            site,
            method,
            settings,
            1,
            0,
            signals=signals,
            augmentation=stamps.augment,
            make_optimiser=stamps.optimiser,
        )
        whole = (time.thread_time() - start) / count + looking
        own = {"teacher": looking, **{name: seconds / count for name, seconds in stamps.seconds.items()}}
        own["the rest"] = whole - sum(own.values())
        for name, seconds in own.items():
            if repeat:  # the first one warms up
                shares.setdefault(name, []).append(seconds / whole)
    targets = {"data": DATA}
    lines = [line(f"share of a step: {name}", "share", own, at_most=targets.get(name)) for name, own in shares.items()]
    return lines + _convolutions(effort, settings, site)


def _convolutions(effort: Effort, settings: Settings, site: SiteData) -> list[Line]:
    """GFLOP/s (10^9 multiplications and additions a second) of one thread, in turn with two that are easy to compute.

    The peak is the faster of a product of matrices and a wide convolution: on some processors the library behind the
    one uses narrower instructions than that behind the other. Multiplications with the padding's zeros count.
    """
    network = build_student(settings, 0)
    batch = Batch(site.labelled_images, site.labels, CARTILAGES)

    def step() -> None:
        network.zero_grad()
        supervised(network, batch, 0.0, settings)["loss"].backward()

    with FlopCounterMode(display=False) as counter:
        step()
    counted = counter.get_flop_counts()["Global"]
    flop = {
        "forward": counted[torch.ops.aten.convolution],
        "backward": counted[torch.ops.aten.convolution_backward],
    }
    side, width = (512, 32) if effort.quick else (1024, 128)
    matrices = torch.randn(side, side), torch.randn(side, side)
    volume, kernels = torch.randn(2, width, 10, 20, 20), torch.randn(width, width, 3, 3, 3)
    easy: dict[str, tuple[int, Callable[[], Tensor]]] = {
        f"product of {side} x {side} matrices": (2 * side**3, lambda: matrices[0] @ matrices[1]),
        f"convolution of {width} channels": (
            2 * 27 * width * volume.numel(),
            lambda: nn.functional.conv3d(volume, kernels, padding=1),
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in (*easy, *flop)}
    for repeat in range(effort.repeats + 1):
        with _Convolutions() as measured:
            step()
        seconds = {name: (flop[name], spent) for name, spent in measured.seconds.items()}
        for name, (work, compute) in easy.items():
            start = time.thread_time()
            compute()
            seconds[name] = (work, time.thread_time() - start)
        if repeat:  # the first one warms up
            for name, (work, spent) in seconds.items():
                speeds[name].append(work / spent / 1e9)
    peaks = [max(pair) for pair in zip(*(speeds[name] for name in easy), strict=True)]
    lines = [line(f"{name}, one thread", "GFLOP/s", speeds[name]) for name in easy]
    for name in flop:
        lines.append(line(f"convolutions of a step, {name}", "GFLOP/s", speeds[name]))
        lines.append(line(f"convolutions of a step, {name} / peak", "share", ratios(speeds[name], peaks)))
    return lines
