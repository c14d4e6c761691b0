"""What was measured on a GPU: the CPU's numbers but for less than a seed's spread, and the page about it."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from fedkd_utils import bench, records, runner
from fedkd_utils.grids import BOTH, SEEDS
from fedkd_utils.settings import PAPER, PAPER_SHORT, PROJECT, REFERENCE
from fedkd_utils.statistics import mean_score

RESULTS = PROJECT / "data" / "results"
PAGE = " ".join((PROJECT / "docs" / "scaling.md").read_text(encoding="utf-8").split())
FACTS = json.loads((RESULTS / "bench" / "gpu.json").read_bytes())
MEASURED = bench.medians(FACTS)
POINTS = runner.points_of("rows", REFERENCE, RESULTS / "reference", SEEDS)
ON_GPU = runner.standing([p for p in POINTS if p.seed == 0], REFERENCE, RESULTS / "reference_gpu")
ON_CPU = records.read_all(RESULTS / "reference", POINTS)


def differences() -> dict[str, float]:
    """Mean test Dice on the GPU minus that on the CPU, by point of seed 0."""
    return {p.name: mean_score([record]) - mean_score([ON_CPU[p]]) for p, record in ON_GPU.done.items()}


def spread_of_a_seed() -> float:
    """The standard deviation over seeds on the CPU, pooled over the same rows and settings."""
    squares, degrees = 0.0, 0
    for one in ON_GPU.done:
        same = [r for p, r in ON_CPU.items() if (p.row, p.setting) == (one.row, one.setting)]
        scores = np.array([mean_score([r]) for r in same if r.machine["device"] == "cpu"])
        squares, degrees = squares + float(((scores - scores.mean()) ** 2).sum()), degrees + len(scores) - 1
    return float(np.sqrt(squares / degrees))


def test_every_file_is_a_record_of_today_that_a_gpu_computed() -> None:
    assert not ON_GPU.stale and not ON_GPU.damaged
    assert {p.name for p in ON_GPU.done} == {path.stem for path in (RESULTS / "reference_gpu").iterdir()}
    assert {p.setting for p in ON_GPU.done} == set(BOTH) and len({p.row for p in ON_GPU.done}) >= 6
    for record in ON_GPU.done.values():
        assert record.machine["device"] == FACTS["gpu"] and record.machine["precision"] == "mixed (bfloat16)"


def test_numbers_of_a_gpu_stay_within_the_seed_spread_of_the_cpus() -> None:
    found, spread = np.array(list(differences().values())), spread_of_a_seed()
    rms, largest = float(np.sqrt((found**2).mean())), float(np.abs(found).max())
    assert rms < spread and largest < 2 * spread
    assert f"root mean square {rms:.4f}, at most {largest:.4f}" in PAGE
    assert f"a standard deviation of {spread:.4f}" in PAGE
    assert f"{len(found)} points" in PAGE


def test_the_page_says_what_was_measured() -> None:
    def step(network: str, way: str) -> float:
        return MEASURED[f"gpu: {network}: {way}, ms"]

    for words, network in (
        ("V-Net, 4 volumes of 16 x 288 x 352", "V-Net, paper's grid"),
        ("UNet, 2 volumes of 20 x 80 x 80", "UNet, reference grid"),
    ):
        numbers = [step(network, way) for way in ("float32", "mixed", "mixed, channels last")]
        assert f"| {words} | " + " | ".join(f"{value:.3g}" for value in numbers) + " |" in PAGE
    assert 1 < MEASURED["gpu: V-Net, paper's grid: float32, channels last / float32, ratio"] < 1.1  # "does nothing"
    gain = step("V-Net, paper's grid", "float32") / step("V-Net, paper's grid", "mixed, channels last")
    assert round(gain) == 14 and "14 times" in PAGE  # and fedkd_utils/device.py says a fourteenth
    small = [step("UNet, reference grid", way) for way in ("float32", "mixed, channels last")]
    assert "gains nothing" in PAGE and abs(small[1] / small[0] - 1) < 0.1
    ratio = MEASURED["gpu: dual distillation / supervised, 8 volumes, ratio"]
    waited = MEASURED["gpu: dual distillation: waiting for data, share"]
    peak = MEASURED["gpu: peak memory of the GPU, GB"]
    assert f"{ratio:.2f} of a supervised one" in PAGE
    assert f"{100 * waited:.1f} % of it is waiting for data" in PAGE
    assert f"{peak:.1f} GB" in PAGE


def test_the_profile_fits_a_gpu_and_the_short_one_is_a_thirtieth_of_it() -> None:
    voxels = int(np.prod(PAPER.grid_shape))
    volumes = PAPER.client_labelled + PAPER.client_unlabelled
    images, labels = 4 * voxels * volumes, 8 * voxels * PAPER.client_labelled
    signals = PAPER.client_unlabelled * 4 * 5 * voxels  # the bottleneck is a thousandth of it
    held = PAPER.clients * (images + labels + signals) / 1e9
    assert f"{held:.0f} GB of volumes and signals" in PAGE
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    peak = MEASURED["gpu: peak memory of the GPU, GB"]
    assert (
        f"for a GPU of 24 GB (its volumes, signals and steps take {held + peak:.0f}); an H200 has run its first round"
        in readme
    )
    for profile in (PAPER, PAPER_SHORT):
        assert (profile.grid_shape, profile.architecture, profile.clients) == ((16, 288, 352), "vnet", 4)
    steps = [p.rounds * p.local_epochs * p.steps_per_epoch for p in (PAPER, PAPER_SHORT)]
    assert steps[0] == 30 * steps[1] and PAPER.teacher_steps == 30 * PAPER_SHORT.teacher_steps


def data_share(history: pd.DataFrame) -> float:
    """Per cent of the clients' seconds that they waited for data."""
    return 100 * float(history["data_seconds"].sum() / history["seconds"].sum())


def test_the_page_says_how_far_the_papers_size_was_run() -> None:
    points = runner.points_of("rows", PAPER_SHORT, RESULTS / "paper_short", (0,))
    short = runner.standing(points, PAPER_SHORT, RESULTS / "paper_short")
    assert not short.stale and not short.damaged
    assert {p.name for p in short.done} == {path.stem for path in (RESULTS / "paper_short").iterdir()}
    found = {record.row: record for record in short.done.values()}
    titles = {
        "teacher only": "teacher_only",
        "FedAvg": "fedavg",
        "dual distillation": "dual_kd",
        "fine-tuning": "finetune",
    }
    assert set(found) == set(titles.values())
    claims = []
    for title, row in titles.items():
        record = found[row]
        assert (record.setting, record.seed, record.machine["device"]) == ("paper_like", 0, FACTS["gpu"])
        frame = record.result.test_frame()
        by_class = frame[frame["components"] == "all"].groupby("class")["dice"].mean()
        dice = " | ".join(f"{value:.3f}" for value in [mean_score([record]), *by_class])
        seconds = "-" if row == "teacher_only" else f"{record.result.wall_seconds:.0f}"
        sent = (record.result.bytes_down + record.result.bytes_up) / 1e6
        claims.append(f"| {title} | {dice} | {seconds} | {sent:.0f} |")
    near = {p.row: mean_score([r]) for p, r in ON_CPU.items() if p.setting == "paper_like" and p.seed == 0}
    for scores in (near, {row: mean_score([record]) for row, record in found.items()}):
        assert scores["finetune"] > scores["fedavg"] + 0.05  # "far ahead"
    first, again = found["teacher_only"].result.teacher, found["dual_kd"].result.teacher
    assert first["weights_sha256"] == again["weights_sha256"]  # trained twice, on two days
    assert found["teacher_only"].date != found["dual_kd"].date
    waits = {row: data_share(found[row].result.history_frame()) for row in ("dual_kd", "finetune", "fedavg")}
    claims.append("it was {dual_kd:.0f} %, {finetune:.0f} % and {fedavg:.0f} %".format(**waits))
    claims += [
        f"{PAPER_SHORT.teacher_steps} steps in {again['seconds']:.0f} seconds ({first['seconds']:.0f} on a busier day",
        f"Dice {again['validation']:.3f} on the repository's validation",
        f"{PAPER.rounds} rounds of {PAPER.local_epochs * PAPER.steps_per_epoch} steps",
    ]
    assert [claim for claim in claims if claim not in PAGE] == []


def test_the_page_says_how_the_papers_profile_was_begun() -> None:
    begun = json.loads((RESULTS / "bench" / "paper_begun.json").read_bytes())
    assert begun["finished"] == 1 and begun["machine"]["device"] == FACTS["gpu"]
    assert "--profile paper " in begun["command"] and len(begun["history"]) == PAPER.clients
    steps = PAPER.local_epochs * PAPER.steps_per_epoch
    assert {line["steps"] for line in begun["history"]} == {steps}
    own = PAPER.client_labelled + PAPER.client_unlabelled + PAPER.client_validation + PAPER.client_test
    repository = PAPER.repository_training + PAPER.repository_validation + PAPER.repository_test
    seconds = begun["seconds"]
    making = [seconds[name] for name in seconds if name.startswith("making") and name.endswith("14 processes")]
    assert len(making) == 2 and sum(making) < 240
    assert round(seconds["reading the clients' volumes"] / 60) == 3
    rows = {
        row: records.read_record(RESULTS / "paper_short" / f"{row}-paper_like-seed0.json")
        for row in ("dual_kd", "fedavg")
    }
    fedavg = PAPER.rounds * begun["wall_seconds"] / 60
    dual = fedavg * rows["dual_kd"].result.wall_seconds / rows["fedavg"].result.wall_seconds
    taught = rows["dual_kd"].result.teacher["seconds"] * PAPER.teacher_steps / PAPER_SHORT.teacher_steps / 60
    assert 25 < fedavg < 40 and min(dual, taught) > 45  # "about half an hour", "three quarters of an hour or more"
    claims = (
        f"14 processes made its {PAPER.clients * own + repository} volumes in under 4 minutes",
        f"reading the clients' {PAPER.clients * own} side by side took 3",
        f"{steps} steps of each of {PAPER.clients} clients and the validation of",
        f"{PAPER.clients * PAPER.client_validation} volumes, {begun['wall_seconds']:.0f} seconds",
    )
    assert [claim for claim in claims if claim not in PAGE] == []
