"""The benchmark: its arithmetic from clocks that are not real, its file, its refusals. No time is asserted."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import TINY
from torch import nn

from fedkd_utils import bench, bench_growth, bench_learning, bench_steps, engine_recorded, timing
from fedkd_utils.__main__ import main
from fedkd_utils.bench import Part
from fedkd_utils.federation import run_federation
from fedkd_utils.networks import build_network, copy_state, largest_difference, nbytes
from fedkd_utils.objectives import Batch, dual_distillation
from fedkd_utils.seeds import seed_of
from fedkd_utils.settings import CARTILAGES, PROJECT, QUICK
from fedkd_utils.teacher import freeze, teacher_signals
from fedkd_utils.timing import Effort, Line

ONE = Effort(1, 0.1, True)


class Machine:
    """A clock that only work moves."""

    def __init__(self):
        self.now, self.done = 0.0, []

    def clock(self):
        return self.now

    def work(self, name, *seconds):
        left = list(seconds)

        def run():
            self.done.append(name)
            self.now += left.pop(0)

        return run


def test_cases_are_measured_in_turn_after_one_that_does_not_count():
    machine = Machine()
    cases = {"a": machine.work("a", 100, 2, 4, 6), "b": machine.work("b", 100, 1, 1, 2)}
    seconds = timing.in_turn(cases, 3, machine.clock)
    assert machine.done == list("ababbaab")
    assert seconds == {"a": [2, 4, 6], "b": [1, 1, 2]}
    assert timing.ratios(seconds["a"], seconds["b"]) == [2, 4, 3]
    three = {name: machine.work(name, 0, 1, 1, 1) for name in "abc"}
    machine.done.clear()
    timing.in_turn(three, 3, machine.clock)
    assert "".join(machine.done) == "abcabcbcacab"


def test_a_ratio_is_that_of_pairs_not_of_medians():
    machine = Machine()  # it becomes ten times slower on the way
    seconds = timing.in_turn({"a": machine.work("a", 0, 3, 30), "b": machine.work("b", 0, 2, 20)}, 2, machine.clock)
    assert timing.ratios(seconds["a"], seconds["b"]) == [1.5, 1.5]
    with pytest.raises(ValueError):
        timing.ratios([1.0, 2.0], [1.0])


def test_a_line_holds_median_and_spread():
    one = timing.line("x", "s", [*range(101)])
    assert (one.low, one.median, one.high, one.repeats) == (5, 50, 95, 101)
    with pytest.raises(ValueError, match="x: nothing was measured"):
        timing.line("x", "s", [])


@pytest.mark.parametrize(
    ("median", "at_most", "at_least", "met"),
    [(1.0, None, None, None), (1.0, 1.0, None, True), (1.1, 1.0, None, False), (1.7, None, 1.7, True)]
    + [(1.6, None, 1.7, False), (math.inf, 0.5, None, False)],
)
def test_a_target_is_met_or_missed(median, at_most, at_least, met):
    one = Line("x", "ratio", median, median, median, 1, at_most, at_least)
    assert one.met is met
    text = bench.table("part", [one])
    assert ("missed" in text, ": met" in text) == (met is False, met is True)


def test_the_peak_of_memory_is_in_bytes():
    before = timing.peak_bytes()
    held = np.ones(before // 8 + 1_000_000)
    assert timing.peak_bytes() >= max(before, held.nbytes)


# The run and its file


def parts(**measured):
    return {name: Part(lambda effort, lines=lines: lines) for name, lines in measured.items()}


def test_a_run_says_and_keeps_every_line(tmp_path):
    lines = [
        Line("a step", "ms", 1.23456, 1.0, 2.0, 3),
        Line("reached after", "s", math.inf, math.inf, math.inf, 1, 0.5),
    ]
    said = []
    facts = bench.run(effort=ONE, command="these words", parts=parts(one=lines, two=lines[:1]), say=said.append)
    read = json.loads(bench.write(facts, tmp_path / "new" / "bench.json").read_text())
    assert list(read["parts"]) == ["one", "two"] and read["command"] == "these words"
    assert read["effort"] == {"repeats": 1, "training": 0.1, "quick": True}
    assert {"date", "versions", "machine", "load"} <= read.keys()
    assert read["parts"]["one"]["lines"] == [
        {"what": "a step", "unit": "ms", "median": 1.235, "low": 1.0, "high": 2.0, "repeats": 3},
        {"what": "reached after", "unit": "s", "median": None, "low": None, "high": None, "repeats": 1}
        | {"at_most": 0.5, "met": False},
    ]
    assert bench.medians(read) == {"one: a step, ms": 1.235, "one: reached after, s": None, "two: a step, ms": 1.235}
    assert len(said) == 2 and "1.235" in said[0] and "never" in said[0] and "missed" in said[0]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    facts = bench.run(effort=ONE, parts=parts(one=[]), say=lambda text: None)
    path = bench.write(facts, tmp_path / "bench.json")
    before = path.read_bytes()

    def killed(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="bench.json"):
        bench.write({**facts, "load": 1.0}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_machine_is_a_class_and_has_no_name():
    facts = bench.run(effort=ONE, parts={}, say=print)
    assert facts["machine"].keys() == {"cores", "processor", "system", "device", "threads", "workers"}
    assert facts["machine"]["device"] == "cpu" and platform.node() not in facts["machine"].values()


def test_threads_and_device_are_put_back_also_after_a_failure(monkeypatch):
    monkeypatch.delenv("FEDKD_DEVICE", raising=False)

    def fail(effort):
        assert os.environ["FEDKD_DEVICE"] == "cpu" and torch.get_num_threads() == 1
        raise RuntimeError("broken")

    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        bench.run(effort=ONE, parts={"one": Part(fail)})
    assert "FEDKD_DEVICE" not in os.environ and torch.get_num_threads() == threads


def test_an_unknown_part_is_refused_before_anything_is_measured(capsys):
    with pytest.raises(ValueError, match=r"no part of the benchmark 'stepps': choose one of steps, profile"):
        bench.run(["steps", "stepps"], ONE)
    assert main(["bench", "stepps"]) == 1
    assert capsys.readouterr().err.startswith("error: There is no part of the benchmark 'stepps'")


def test_parts_run_in_their_order_and_some_only_on_request():
    some = {"a": Part(lambda effort: []), "b": Part(lambda effort: [], on_request=True), "c": Part(lambda effort: [])}
    assert bench.chosen_parts([], some) == ["a", "c"]
    assert bench.chosen_parts(["c", "b"], some) == ["b", "c"]
    assert {"viewer", "gpu"} == {name for name, part in bench.PARTS.items() if part.on_request}


def test_without_the_engine_its_part_is_left_out_and_the_run_is_not_whole(monkeypatch):
    some = {"a": Part(lambda effort: []), "b": Part(lambda effort: [], engine=True)}
    assert "flwr" in bench.run(effort=ONE, parts=some, say=print)["versions"]
    monkeypatch.setattr(engine_recorded, "installed", lambda: False)
    said = []
    facts = bench.run(effort=ONE, parts=some, say=said.append)
    assert list(facts["parts"]) == ["a"] and "flwr" not in facts["versions"]
    assert said[0].startswith("left out: b, for the engine is not installed") and said[0].endswith("with --out.")
    assert not bench.is_whole(facts | {"effort": {"quick": False}}, some)
    with pytest.raises(RuntimeError, match="the engine is not installed"):
        bench.run(["a", "b"], ONE, parts=some, say=said.append)
    assert len(said) == 2  # nothing was measured


def test_only_a_whole_run_goes_to_the_place_of_the_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "FILE", tmp_path / "bench.json")
    for name in bench.PARTS:
        monkeypatch.setitem(bench.PARTS, name, replace(bench.PARTS[name], measure=lambda effort: [], engine=False))
    assert main(["bench", "--quick"]) == 0 and main(["bench", "steps"]) == 0
    assert not bench.FILE.exists() and "Nothing was written" in capsys.readouterr().out
    assert main(["bench", "steps", "viewer", "--repeats", "3", "--out", str(tmp_path / "x.json")]) == 0
    some = json.loads((tmp_path / "x.json").read_bytes())
    assert some["command"] == "python -m fedkd_utils bench steps viewer --repeats 3"
    assert some["effort"]["repeats"] == 3 and list(some["parts"]) == ["steps", "viewer"]
    assert main(["bench"]) == 0
    whole = json.loads(bench.FILE.read_bytes())
    assert list(whole["parts"]) == [name for name, part in bench.PARTS.items() if not part.on_request]


# What is measured is what is said


def test_the_bare_loop_gives_the_weights_of_the_federation():
    settings = replace(TINY, rounds=1)
    sites = [bench_steps.noise_site(name, settings, 2, 0) for name in ("east", "west")]
    ours = run_federation(settings, "fedavg", sites, seed=5, workers=1).models["east"]
    assert largest_difference(ours, bench_growth.bare_loop(settings, sites, 5, True)) == 0
    other = bench_growth.bare_loop(settings, sites, 6, False)
    assert largest_difference(ours, other) > 0


def test_the_bare_loop_distils_as_the_federation_does():
    settings = replace(TINY, rounds=1)
    sites = [bench_steps.noise_site(name, settings, 2, 2) for name in ("east", "west")]
    taught = freeze(build_network(settings, 9))
    ours = run_federation(settings, "dual_kd", sites, taught, seed=5, workers=1).models["east"]
    assert largest_difference(ours, bench_growth.bare_loop(settings, sites, 5, True, "dual_kd", taught)) == 0


@pytest.fixture
def hospitals(monkeypatch):
    """The engine's benchmark with three tiny hospitals, and real processes that are none and took 12 s."""
    engine_bench = pytest.importorskip("fedkd_utils.engine_bench", reason="the engine is not installed")
    sites = [bench_steps.noise_site(name, TINY, 2, 2) for name in ("east", "north", "west")]

    def processes(case, folder):
        order = replace(case.order(folder / "run"), job=replace(case.order(folder).job, seed=processes.seed))
        _, report = engine_bench.federate(engine_bench.local_grid(case.sites, folder / "nodes"), order, case.state)
        return report, 12.0

    processes.seed = 0
    monkeypatch.setattr(engine_bench, "QUICK", TINY)
    monkeypatch.setattr(engine_bench, "LESSON", replace(TINY, steps_per_epoch=1))
    monkeypatch.setattr(engine_bench, "_hospitals", lambda settings: ({site.name: PROJECT for site in sites}, sites))
    monkeypatch.setattr(engine_bench, "_processes", processes)
    return engine_bench, processes


def test_the_engine_is_measured_beside_the_loop_and_gives_its_weights(hospitals):
    engine_bench, processes = hospitals
    lines = engine_bench.flower(Effort(3, 0.1, False))
    found = {(one.what, one.unit): one for one in lines}
    job, real = "a round of 3 clients (dual_kd): ", "Flower on real processes"
    assert found[job + real, "CPU s"].median == 12
    assert {one.repeats for one in lines if "real" in one.what} == {1}
    assert found[job + "simulation", "CPU s"].repeats == 3
    bare = found[job + "bare loop", "CPU s"]
    assert found[f"{real} / bare loop", "ratio"].median == pytest.approx(12 / bare.median)
    assert found["simulation / bare loop", "ratio"].at_most == bench_growth.LOOP
    assert found["weights after the last round, largest difference", ""].met is True
    processes.seed = 1  # they do something else
    assert engine_bench.flower(ONE)[-1].met is False


def test_the_record_of_the_engine_compares_four_ways(hospitals, tmp_path):
    engine_bench, processes = hospitals
    folders, sites = engine_bench._hospitals(TINY)
    case = engine_bench.Case(TINY, folders, sites, freeze(build_network(TINY, 9)))
    notes = []
    lines, report = engine_bench.overhead(case, tmp_path / "one", notes.append)
    assert [line["way"] for line in lines] == notes == [*engine_bench._ways(case), engine_bench.REAL]
    assert all(line["largest_difference_of_a_weight"] == 0 for line in lines)
    assert lines[0]["ratio"] == 1 and lines[3]["cpu_seconds"] == 12
    assert (lines[0]["bytes_up"], lines[3]["bytes_up"]) == (0, report.bytes("up")) and lines[2]["bytes_down"] > 0
    processes.seed = 1
    (*alike, other), _ = engine_bench.overhead(case, tmp_path / "two", notes.append)
    assert other["largest_difference_of_a_weight"] > 0 == max(one["largest_difference_of_a_weight"] for one in alike)


def test_asking_at_every_step_costs_nine_passes_a_volume_and_gives_the_same_loss_as_the_same_signals():
    passed = []
    teacher = freeze(build_network(TINY, 1))
    teacher.body.register_forward_hook(lambda module, inputs, output: passed.append(len(inputs[0])))
    settings = replace(TINY, teacher_passes=8)
    site = bench_steps.noise_site("x", settings, 2, 2)
    batch = Batch(site.labelled_images, site.labels, CARTILAGES, site.unlabelled_images, seed=3)
    asked = bench_steps.asked_at_every_step(teacher).objective(build_network(TINY, 0), batch, 0.5, settings)
    assert sum(passed) == 9 * len(site.unlabelled_images)
    said = teacher_signals(teacher, site.unlabelled_images, 8, [seed_of(3, "asked", i) for i in range(2)])
    told = replace(
        batch,
        teacher_probabilities=said.probabilities,
        teacher_entropy=said.entropy,
        teacher_features=said.features,
    )
    assert asked["loss"] == dual_distillation(build_network(TINY, 0), told, 0.5, settings)["loss"]


def test_the_shares_of_a_step_sum_to_one_and_convolutions_are_counted():
    lines = bench_steps.profile(ONE)
    shares = {one.what.removeprefix("share of a step: "): one for one in lines if one.what.startswith("share")}
    assert list(shares) == ["teacher", "data", "student forward", "student backward", "optimiser", "the rest"]
    assert sum(one.median for one in shares.values()) == pytest.approx(1)
    assert all(0 < one.median < 1 for one in shares.values())
    assert [one.what for one in lines if one.at_most is not None] == ["share of a step: data"]
    assert sum(one.unit == "GFLOP/s" and one.median > 0 for one in lines) == 4


def test_what_a_round_sends_is_three_students_a_client():
    few, more = bench_growth.federations([1, 3])
    student = nbytes(copy_state(build_network(QUICK, 0)))  # down before training, up, and the average down
    assert few["student"] == student and (few["sent"], more["sent"]) == (3 * student, 9 * student)
    volume = 4 * 16 * 16  # 2 labelled images and 1 for validation in 4 bytes a voxel, 2 labels in 8
    assert more["volumes"] == 3 * volume * (3 * 4 + 2 * 8) and more["peak"] >= few["peak"]


def test_growth_is_what_one_more_client_costs():
    facts = {"clients": 4.0, "seconds": 2.0, "peak": 30e6, "volumes": 10e6, "sent": 6e6, "student": 1e6}
    more = facts | {"clients": 14.0, "seconds": 7.0, "peak": 75e6, "volumes": 35e6, "sent": 21e6}
    found = {one.what: one for one in bench_growth.growth_lines([facts, more])}
    assert found["one more client, a round of one step"].median == 0.5
    assert found["one more client, memory beyond its volumes"].median == pytest.approx(2.0)  # (40 - 20) / 10 MB
    assert found["one more client, memory beyond its volumes"].met is False
    assert found["14 clients, peak memory beyond volumes"].median == pytest.approx(40)


@pytest.mark.parametrize("name", list(bench_learning.networks_by_name()))
def test_every_network_starts_from_its_seed(name):
    first, second, other = (copy_state(bench_learning.networks_by_name(seed)[name]()) for seed in (0, 0, 1))
    assert largest_difference(first, second) == 0 < largest_difference(first, other)


@pytest.mark.parametrize("name", list(bench_learning.networks_by_name()))
def test_every_network_takes_the_slices_of_the_course(name):
    network = bench_learning.networks_by_name()[name]().eval()
    with torch.inference_mode():
        logits = network(torch.randn(1, 1, 20, 32, 32))
    assert logits.shape == (1, 4, 20, 32, 32)
    size = sum(p.numel() for p in network.parameters())
    assert 0.3 < size / sum(p.numel() for p in build_network(QUICK, 0).parameters()) < 2 or "V-Net" in name


def test_what_is_padded_is_cut_off_again():
    class Adds(nn.Module):
        def forward(self, x):
            assert x.shape[2:] == (8, 8, 12)
            return x + 1

    x = torch.randn(1, 1, 5, 8, 9)
    assert torch.equal(bench_learning.Padded(Adds(), 4)(x), x + 1)


@dataclass
class Run:
    """As much of a record as the costs need: Dice by round; seconds and bytes of every round."""

    row: str
    dice: list[float]
    seconds: float
    bytes: int
    seed: int = 0
    messages: list[dict] = field(init=False)

    def __post_init__(self):
        self.messages = [{"round": r + 1, "bytes": self.bytes} for r in range(len(self.dice))]

    def history_frame(self):
        rounds = range(1, len(self.dice) + 1)
        return pd.DataFrame({"round": rounds, "client": "a", "validation": self.dice, "cpu_seconds": self.seconds})


def test_reach_compares_with_the_best_rival():
    runs = {
        "uamt": [Run("uamt", [0.2, 0.6, 0.8], 4.0, 10_000_000)],  # the best rival: 0.8 after 12 s and 30 MB
        "fedsemi": [Run("fedsemi", [0.5, 0.6, 0.7], 2.0, 10_000_000)],
        "dual_kd": [Run("dual_kd", [0.7, 0.8, 0.9], 2.5, 5_000_000)],  # after 5 s and 10 MB
    }
    lines = bench_learning.reach_lines("here", runs)
    found = {(one.what, one.unit): one for one in lines}
    assert found[
        "here: final validation Dice of uamt, the best rival and the best that sends any", "Dice"
    ].median == pytest.approx(0.8)
    assert found["here: dual_kd has the Dice of uamt after", "CPU s"].median == 5
    assert found["here: dual_kd / uamt, CPU s", "ratio"].median == pytest.approx(5 / 12)
    assert found["here: dual_kd / uamt, CPU s", "ratio"].met is True
    assert found["here: dual_kd / uamt, MB", "ratio"].median == pytest.approx(1 / 3)
    assert found["here: dual_kd / uamt, MB", "ratio"].met is False
    assert math.isinf(found["here: fedsemi has the Dice of uamt after", "MB"].median)
    assert math.isinf(found["here: fedsemi / uamt, MB", "ratio"].low)
    for seed, seconds in ((1, 8.0), (2, 3.0)):  # two seeds more: after 24 s, and after 9
        runs["dual_kd"].append(Run("dual_kd", [0.1, 0.1, 0.8], seconds, 5_000_000, seed))
        runs["uamt"].append(Run("uamt", [0.2, 0.6, 0.75], 4.0, 10_000_000, seed))
    both = {one.what: one for one in bench_learning.reach_lines("here", {r: runs[r] for r in ("uamt", "dual_kd")})}
    spread = both["here: dual_kd / uamt, CPU s"]
    assert (spread.low, spread.high, spread.repeats) == (pytest.approx(5 / 12), 2.0, 3)
    assert spread.median == 9 / 12 and spread.met is False  # the mean is above 1
    assert bench_learning.reach_lines("here", {"dual_kd": runs["dual_kd"]}) == []


def test_bytes_are_held_against_the_best_rival_that_sends_any():
    """A hospital alone may be the best rival, and nothing is a quarter of its bytes."""
    runs = {
        "local_uamt": [Run("local_uamt", [0.7, 0.8], 4.0, 0)],
        "uamt": [Run("uamt", [0.5, 0.6], 4.0, 10_000_000)],  # 0.6 after 20 MB
        "dual_kd": [Run("dual_kd", [0.7, 0.8], 2.0, 5_000_000)],  # 0.6 after 5 MB, 0.8 after 4 s
    }
    found = {one.what: one for one in bench_learning.reach_lines("here", runs)}
    assert found["here: final validation Dice of local_uamt, the best rival"].median == pytest.approx(0.8)
    assert found["here: final validation Dice of uamt, the best that sends any"].median == pytest.approx(0.6)
    assert found["here: dual_kd / local_uamt, CPU s"].median == pytest.approx(0.5)
    assert found["here: dual_kd / uamt, MB"].median == pytest.approx(0.25) and found["here: dual_kd / uamt, MB"].met
    assert found["here: dual_kd / uamt, CPU s"].median == pytest.approx(2 / 8)
    assert found["here: dual_kd / uamt, CPU s"].met is None  # a target is held against the better rival only
    assert "here: dual_kd / local_uamt, MB" not in found
    alone = {row: runs[row] for row in ("local_uamt", "dual_kd")}
    assert not any(one.unit == "ratio" and "MB" in one.what for one in bench_learning.reach_lines("here", alone))


def test_reach_reads_the_committed_results():
    lines = bench_learning.reach(ONE)
    assert {one.what.split(":")[0] for one in lines} == {"paper_like", "heterogeneous"}
    assert any("the best rival" in one.what and 0 < one.median < 1 for one in lines)
    recorded = json.loads(bench.FILE.read_bytes())["parts"]["reach"]["lines"]
    assert [bench._packed(one) for one in lines] == recorded, "other results than those of the run: `make bench` again"


def test_the_readme_says_how_long_a_volume_of_full_size_takes() -> None:
    facts = json.loads(bench.FILE.read_bytes())
    measured = bench.medians(facts)
    text = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    assert "within a minute and 8 GB on two cores" in text
    assert all(one.get("met", True) for one in facts["parts"]["inference"]["lines"])
    for network in ("course's", "paper's"):
        name = f"inference: segment 160 x 384 x 384 voxels, {network} network"
        words = f"in {measured[f'{name}, 2 threads, s']:.0f} s and {measured[f'{name}, peak memory, MB'] / 1000:.1f} GB"
        assert f"{words} with the {network}" in text


def test_the_committed_run_is_whole():
    facts = json.loads(bench.FILE.read_bytes())
    assert bench.is_whole(facts)
    minutes = sum(part["seconds"] for part in facts["parts"].values()) / 60
    text = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    assert f"alone for the {minutes:.0f} minutes or more that it takes" in text
