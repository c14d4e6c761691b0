"""Benchmark: networks at equal computing time, and what each row had cost when it reached the best rival."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, UNet
from torch import Tensor, nn

from fedkd_utils import cohorts, records, runner, statistics
from fedkd_utils.grids import SEEDS
from fedkd_utils.methods import RIVALS, ROWS
from fedkd_utils.networks import CLASS_FREQUENCY, TappedNetwork, build_network
from fedkd_utils.records import Record
from fedkd_utils.seeds import seed_of, seeded
from fedkd_utils.settings import CLASS_NAMES, PROFILES, PROJECT, QUICK, SETTINGS_OF_CLIENTS
from fedkd_utils.timing import Effort, Line, line
from fedkd_utils.training import grid_dice, mean_dice, train_supervised
from fedkd_utils.transforms import Case, SiteData, load_site

#: The first seed is trained with each rate; the one that is better on validation serves all seeds.
RATES, NETWORK_SEEDS = (3e-3, 1e-2), 3

#: Our targets: the best rival's final Dice in at most half its time and a quarter of its bytes.
TIME, BYTES = 0.5, 0.25
#: The rows that are to do so: the paper's method, all of our ideas about it in one row, and the row of ours that is
#: near the top in both settings without knowing the hospitals' sequences.
AIMED = (runner.REFERENCE_ROW, "combined_kd", "chosen_finetune")


class Padded(nn.Module):
    """A network for volumes of any size: noughts are added at the ends up to a multiple, and cut off again."""

    def __init__(self, body: nn.Module, multiple: int) -> None:
        super().__init__()
        self.body, self.multiple = body, multiple

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, D, H, W) -> (B, C, D, H, W)."""
        d, h, w = x.shape[2:]
        missing = [-size % self.multiple for size in (d, h, w)]
        padded = nn.functional.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
        out: Tensor = self.body(padded)[:, :, :d, :h, :w]
        return out


_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
_COUNT = len(CLASS_NAMES)
_VNET = replace(QUICK, architecture="vnet", grid_shape=(32, 80, 80))

#: Networks with as many parameters as the course's, within a factor of two where their makers' design allows it, for 20
#: thick slices.
RIVAL_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MONAI UNet, as it comes": lambda: UNet(3, 1, _COUNT, (16, 32, 64, 128), _STRIDES),  # type: ignore[arg-type]
    "BasicUNet": lambda: BasicUNet(3, 1, _COUNT, features=(8, 16, 32, 64, 64, 8)),
    "SegResNet": lambda: SegResNet(3, 16, 1, _COUNT, blocks_down=(1, 2, 2), blocks_up=(1, 1)),
    "DynUNet": lambda: DynUNet(
        3,
        1,
        _COUNT,
        [3] * 4,
        [1, *_STRIDES],
        [*_STRIDES],
        filters=[8, 16, 32, 64],
    ),
}


def networks_by_name(seed: int = 0) -> dict[str, Callable[[], TappedNetwork]]:
    """The course's network and the others, each with initial weights from one seed and the same last bias."""
    seed = seed_of(seed, "network")

    def wrapped(make: Callable[[], nn.Module]) -> TappedNetwork:
        with seeded(seed):
            body = make()
        last = [m for m in body.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d)) and m.bias is not None]
        bias = [m.bias for m in last if m.bias is not None and len(m.bias) == _COUNT][-1]
        with torch.no_grad():
            bias.copy_(torch.tensor(CLASS_FREQUENCY).log())
        return _any_grid(body)

    return {
        "the course's network": lambda: build_network(QUICK, seed),
        "the course's network, without dropout": lambda: build_network(replace(QUICK, dropout=0.0), seed),
        **{name: partial(wrapped, make) for name, make in RIVAL_NETWORKS.items()},
        "V-Net of the release": lambda: _any_grid(Padded(build_network(_VNET, seed).body, 16)),
    }


def _any_grid(body: nn.Module) -> TappedNetwork:
    return TappedNetwork(body, {"all": ""}, "all", (1, 1, 1))


def networks(effort: Effort) -> list[Line]:
    """Dice of each network on the repository's test volumes after the same CPU seconds of training, quick profile.

    How many steps fit is measured first; validation, which chooses the step, is not counted. It also chooses the
    learning rate, with the first seed; the other seeds, of weights and batches, are trained with that one.
    """
    data = load_site(cohorts.make_repository(QUICK, QUICK.teacher_contrast), QUICK)
    lines = []
    for name, make in networks_by_name().items():
        network = make()
        size = sum(parameter.numel() for parameter in network.parameters())
        _trained(network, data, 2, RATES[0])
        step = _trained(network, data, 4, RATES[0])[0] / 4
        steps = max(round(effort.training / step), 5)
        tried = {rate: _scores(name, data, steps, rate, 0) for rate in (RATES[-1:] if effort.quick else RATES)}
        rate = max(tried, key=lambda rate: tried[rate][0])
        others = range(1, 1 if effort.quick else NETWORK_SEEDS)
        dice = [tried[rate][1], *(_scores(name, data, steps, rate, seed)[1] for seed in others)]
        lines += [
            line(f"{name}: Dice after {effort.training:g} CPU s", "Dice", [mean_dice(one) for one in dice]),
            line(f"{name}: the thinnest, {CLASS_NAMES[3]}", "Dice", [mean_dice(one[:, 2:]) for one in dice]),
            line(f"{name}: a step", "CPU ms", [1000 * step]),
            line(f"{name}: parameters", "thousand", [size / 1000]),
        ]
    return lines


def _scores(name: str, data: SiteData, steps: int, rate: float, seed: int) -> tuple[float, np.ndarray]:
    """Train a network anew; its best Dice on validation, and the Dice of the test volumes by class."""
    network = networks_by_name(seed)[name]()
    _, chosen = _trained(network, data, steps, rate, data.validation, seed)
    return chosen, grid_dice(network, data.test)


def _trained(
    network: TappedNetwork,
    data: SiteData,
    steps: int,
    rate: float,
    validation: Sequence[Case] = (),
    seed: int = 0,
) -> tuple[float, float]:
    """Train in place; CPU seconds, and the best Dice on validation."""
    start = time.thread_time()
    log = train_supervised(
        network,
        data.labelled_images,
        data.labels,
        steps=steps,
        batch=QUICK.batch_labelled,
        learning_rate=rate,
        weight_decay=QUICK.weight_decay,
        seed=seed,
        validation=validation,
        validate_every=max(steps // 5, 1),
    )
    return time.thread_time() - start, log.best_dice


def reach(effort: Effort, folder: Path | None = None) -> list[Line]:
    """Seconds and bytes with which each row reaches the best rival's final validation Dice, from committed results.

    Only seeds that all rows share count, whose number the line says; a row that never gets there has no number.
    """
    profile = PROFILES["reference"]
    folder = folder or runner.results_folder(PROJECT, profile)
    points = runner.points_of("rows", profile, folder, SEEDS) + runner.points_of("beyond", profile, folder, SEEDS)
    done = runner.standing(points, profile, folder).done
    if runner.seconds_file(folder).is_file():
        done = dict(zip(done, records.with_seconds(done.values(), runner.seconds_file(folder)), strict=True))
    lines = []
    for setting in SETTINGS_OF_CLIENTS:
        lines += reach_lines(setting, records.shared_seeds(records.by_row(done, setting)))
    return lines


def reach_lines(setting: str, runs: Mapping[str, Sequence[Record]]) -> list[Line]:
    """The lines of one setting: each row, then against the rival; nothing where no rival has been run.

    The best rival may be a hospital alone. It sends nothing, and of nothing there is no quarter: bytes are held against
    the best of those that send any.
    """
    rivals = [row for row in RIVALS if row in runs]
    senders = [row for row in rivals if ROWS[row].federated]
    best = statistics.best_rival(runs, rivals) if rivals else None
    sender = statistics.best_rival(runs, senders) if senders else None
    costs = [("seconds", "CPU s", best, TIME), ("mb", "MB", sender, BYTES)]
    lines = []
    for rival in dict.fromkeys(found for found in (best, sender) if found is not None):
        titles = [
            title for title, row in (("the best rival", best), ("the best that sends any", sender)) if row == rival
        ]
        dice = statistics.final_dice(runs[rival])
        lines.append(line(f"{setting}: final validation Dice of {rival}, {' and '.join(titles)}", "Dice", [dice]))
        table = statistics.reach_table(runs, dice).set_index("row")
        for what, unit, _, _ in costs:
            for row in table.index:
                own, count = float(table.loc[row, what]), int(table.loc[row, "runs"])
                lines.append(Line(f"{setting}: {row} has the Dice of {rival} after", unit, own, own, own, count))
        for what, unit, against, goal in costs:
            if what == "mb" and rival not in senders:
                continue
            for row in table.index.drop(rival):
                ratios = statistics.reach_ratios(runs[row], runs[rival], what)
                name = f"{setting}: {row} / {rival}, {unit}"
                target = goal if row in AIMED and against == rival else None
                low, high = np.percentile(ratios, [5, 95], method="nearest")  # may be infinite: nothing is in between
                lines.append(
                    Line(name, "ratio", float(np.median(ratios)), float(low), float(high), len(ratios), target)
                )
    return lines
