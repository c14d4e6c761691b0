"""Benchmark of the GPU: precision and layout of a step, whole local steps of the paper's profile, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fedkd_utils import losses
from fedkd_utils.bench_steps import noise_site
from fedkd_utils.clients import Update, client_update, signals_for, steps_per_round
from fedkd_utils.device import repeatable
from fedkd_utils.methods import ROWS, Method
from fedkd_utils.networks import build_network, build_student, copy_state, place
from fedkd_utils.settings import CARTILAGES, PAPER_SHORT, REFERENCE, Settings
from fedkd_utils.teacher import freeze
from fedkd_utils.timing import Effort, Line, in_turn, line, ratios

#: A dual-distillation step in supervised steps with as many volumes, and the share of a step that waits for data.
STEP, DATA = 1.25, 0.05

#: Precision and layout of the tensors: what is measured, and whether it is mixed and channels last.
WAYS = {
    "float32": (False, False),
    "float32, channels last": (False, True),
    "mixed": (True, False),
    "mixed, channels last": (True, True),
}


def gpu(effort: Effort) -> list[Line]:
    """Milliseconds of a supervised step by precision and layout, and of the local steps of two rows.

    Raises:
        RuntimeError: PyTorch finds no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(f"bench gpu: PyTorch {torch.__version__} finds no GPU.")
    lines: list[Line] = []
    for name, settings in (("V-Net, paper's grid", PAPER_SHORT), ("UNet, reference grid", REFERENCE)):
        with repeatable():
            seconds = in_turn({way: _step(settings, *WAYS[way]) for way in WAYS}, effort.repeats, time.perf_counter)
        lines += [line(f"{name}: {way}", "ms", [1000 * s for s in own]) for way, own in seconds.items()]
        lines += [
            line(f"{name}: {way} / float32", "ratio", ratios(own, seconds["float32"]))
            for way, own in seconds.items()
            if way != "float32"
        ]
    return lines + _local_steps(effort)


def _step(settings: Settings, mixed: bool, last: bool) -> Callable[[], None]:
    """A supervised step on noise, all of it on the GPU, in one precision and layout."""
    layout = torch.channels_last_3d if last else torch.contiguous_format
    body = build_network(settings, 0).body.to("cuda", memory_format=layout)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(body.parameters(), lr=1e-3)
    site = noise_site("gpu", settings, settings.batch_labelled, 0).to(torch.device("cuda"))

    def work() -> None:
        optimiser.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            logits = body(site.labelled_images)
        loss = losses.supervised_loss(logits.float(), site.labels, CARTILAGES)
        loss.backward()
        optimiser.step()
        loss.item()  # waits for the GPU

    return work


def _local_steps(effort: Effort) -> list[Line]:
    """What a client does in a round, in the precision and layout of the course: milliseconds a step, data, memory."""
    settings = replace(PAPER_SHORT, local_epochs=1, steps_per_epoch=2) if effort.quick else PAPER_SHORT
    count = steps_per_round(settings)
    double = replace(settings, batch_labelled=settings.batch_labelled + settings.batch_unlabelled)
    site = noise_site("gpu", settings, double.batch_labelled, settings.batch_unlabelled).to(torch.device("cuda"))
    teacher, state = freeze(build_network(settings, 1)), copy_state(build_student(settings, 0))
    with repeatable():
        signals = signals_for(place(teacher, torch.device("cuda")), site, settings, 0)
    waited: list[float] = []

    def update(method: Method, chosen: Settings) -> Callable[[], Update]:
        def work() -> Update:
            said = signals if method.distils else None
            with repeatable():
                made = client_update(state, site, method, chosen, 1, 0, signals=said)
            if method.distils:
                waited.append(made.metrics["data_seconds"] / made.metrics["seconds"])
            return made

        return work

    torch.cuda.reset_peak_memory_stats()
    supervised, dual = f"supervised, {double.batch_labelled} volumes", "dual distillation"
    cases = {supervised: update(ROWS["fedavg"], double), dual: update(ROWS["dual_kd"], settings)}
    seconds = in_turn(cases, effort.repeats, time.perf_counter)
    return [
        *[line(f"local step: {name}", "ms", [1000 * s / count for s in own]) for name, own in seconds.items()],
        line(f"{dual} / {supervised}", "ratio", ratios(seconds[dual], seconds[supervised]), at_most=STEP),
        line(f"{dual}: waiting for data", "share", waited[1:], at_most=DATA),
        line("peak memory of the GPU", "GB", [torch.cuda.max_memory_allocated() / 1e9]),
    ]
