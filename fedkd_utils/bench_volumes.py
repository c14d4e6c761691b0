"""Benchmark: how long a made knee takes, and a segmented volume of full size."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from fedkd_utils import acquisition, segment
from fedkd_utils.acquisition import SCANNERS
from fedkd_utils.bench_growth import alone
from fedkd_utils.networks import build_network
from fedkd_utils.settings import PAPER, QUICK, Settings
from fedkd_utils.teacher import freeze
from fedkd_utils.timing import Effort, Line, in_turn, line, peak_bytes
from fedkd_utils.transforms import label_to_grid, to_grid

#: The target for the CPU seconds of a made volume.
PHANTOM = 0.5

#: The targets for seconds and bytes of a segmented volume of full size, on two cores.
INFERENCE, MEMORY = 60.0, 8e9

#: A volume of the repository in full: voxels and mm.
SHAPE, SPACING_MM = (160, 384, 384), (0.7, 0.365, 0.365)


def _made(scanner: str) -> None:
    scan = acquisition.scan(7, SCANNERS[scanner], 1)
    to_grid(scan.image, scan.affine, QUICK.grid_spacing_mm, QUICK.grid_shape)
    label_to_grid(scan.label, scan.affine, QUICK.grid_spacing_mm, QUICK.grid_shape)


def phantom(effort: Effort) -> list[Line]:
    """CPU seconds of a knee, from its seed to image and label on the quick grid, by scanner."""
    names = ("repository_dess", "pd_fs") if effort.quick else ("repository_dess", "pd_fs", "t1", "t2_fs", "gre")
    seconds = in_turn({name: lambda name=name: _made(name) for name in names}, min(effort.repeats, 3))  # type: ignore[misc]
    return [line(f"a knee through {name}", "CPU s", own, at_most=PHANTOM) for name, own in seconds.items()]


def segmented(shape: tuple[int, int, int], settings: Settings, threads: int) -> dict[str, float]:
    """Segment a volume of noise from file to file: seconds, and peak bytes. Call it in a process of its own."""
    torch.set_num_threads(threads)
    network = freeze(build_network(settings, 0))
    began = peak_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "knee.nii.gz"
        noise = np.random.default_rng(0).integers(0, 1000, shape, dtype=np.int16)
        nib.save(nib.Nifti1Image(noise, np.diag([*SPACING_MM, 1.0])), path)
        wall, cpu = time.perf_counter(), time.process_time()
        segment.segment_volume(path, network, settings, Path(folder) / "label.nii.gz", locate=True)
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return {**seconds, "peak": float(peak_bytes() - began)}


def inference(effort: Effort) -> list[Line]:
    """A volume of full size, from file to file, with the course's network and the paper's, on up to two cores."""
    shape, threads = (40, 96, 96) if effort.quick else SHAPE, min(os.cpu_count() or 1, 2)
    lines = []
    for network, settings in (("course's network", QUICK), ("paper's network", PAPER)):
        name = f"{' x '.join(map(str, shape))} voxels, {network}"
        repeats = [alone(segmented, shape, settings, threads) for _ in range(min(effort.repeats, 3))]
        wall, cpu, peak = ([facts[what] for facts in repeats] for what in ("seconds", "cpu_seconds", "peak"))
        lines += [
            line(f"segment {name}, {threads} threads", "s", wall, at_most=INFERENCE),
            line(f"segment {name}", "CPU s", cpu),
            line(f"segment {name}, peak memory", "MB", [held / 1e6 for held in peak], at_most=MEMORY / 1e6),
        ]
    return lines
