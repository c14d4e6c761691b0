"""Grids, records and the runner: what is run, what a file says, and that stopping or repeating changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY

from fedkd_utils import __main__, experiments, federation, grids, networks, records, runner, statistics
from fedkd_utils.grids import Point
from fedkd_utils.methods import ROWS
from fedkd_utils.settings import PROFILES, REFERENCE
from fedkd_utils.teacher import RELEASE, TeacherUpdate
from fedkd_utils.training import TrainingError

POINTS = [Point("fedavg", "paper_like"), Point("dual_kd", "paper_like", 1), Point("pooled", "heterogeneous")]


def go(points: list[Point], folder: Path, cache: Path, **more: Any) -> tuple[runner.Standing, list[str]]:
    said: list[str] = []
    return runner.run_points(points, more.pop("profile", TINY), folder, cache, say=said.append, **more), said


# --- grids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", list(PROFILES.values()), ids=list(PROFILES))
def test_every_grid_is_whole_and_its_points_are_told_apart(profile: Any) -> None:
    whole = grids.grid("all", profile)
    assert len({point.name for point in whole}) == len(whole) == len(set(whole))
    for name in grids.GRIDS:
        points = grids.grid(name, profile)
        assert points and {point.seed for point in points} == set(grids.SEEDS)
        assert (set(points) <= set(whole)) == (name not in grids.APART)
        assert grids.GRIDS[name].__doc__
    for point in whole:
        assert point.row in ROWS and set(point.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_+-.")
        settings = ROWS[point.row].adapt(point.settings(profile))
        disk = point.disk(profile)
        assert disk.client_labelled >= settings.client_labelled
        assert disk.client_unlabelled >= settings.client_unlabelled
        for change, value in point.changes:  # no row undoes what its point asks for
            assert getattr(settings, change) == value
        steps = settings.rounds * settings.local_epochs * settings.steps_per_epoch
        assert steps == profile.rounds * profile.local_epochs * profile.steps_per_epoch, "the same budget"
    rows = {(point.row, point.setting) for name in ("rows", "beyond") for point in grids.grid(name, profile)}
    assert rows == {(row, setting) for row in ROWS for setting in grids.BOTH}
    with pytest.raises(ValueError, match="no grid 'none': choose all or one of rows, beyond"):
        grids.grid("none", profile)


def test_the_issues_ablations_are_there() -> None:
    def values(name: str, field: str) -> set[Any]:
        return {dict(point.changes).get(field) for point in grids.grid(name, REFERENCE)}

    assert values("labelled", "client_labelled") == {1, 2, 4, 8}
    assert values("clients", "clients") == {2, 8} and values("normalisation", "normalisation") == {"batch", "group"}
    assert {1, 4, 8} <= values("local_epochs", "local_epochs") and values("mask", "teacher_passes") == {0, None}
    assert values("mask", "mask_classes") == {2, None} and REFERENCE.mask_classes == 4
    assert len(values("unlabelled", "client_unlabelled")) == len(values("temperature", "feature_temperature")) + 1 == 4
    assert len(values("teacher_quality", "teacher_steps")) == len(values("teacher_quality", "repository_training")) == 3
    assert values("distance", "teacher_contrast") == {"pd_fs", "t1"}
    feature, response = (values("weights", name) - {None} for name in ("feature_weight", "response_weight"))
    assert min(feature) < REFERENCE.feature_weight < max(feature) and max(response) > REFERENCE.response_weight
    assert {p.teacher_update for p in grids.grid("teacher_updates", REFERENCE)} >= {
        RELEASE,
        TeacherUpdate("hand_over", REFERENCE.rounds // 3, 0.1),
        TeacherUpdate("hand_over", REFERENCE.rounds // 3, 1.0),
    }


@pytest.mark.parametrize("profile", list(PROFILES.values()), ids=list(PROFILES))
def test_the_released_weight_is_a_mean_over_the_channels_of_the_profiles_bottleneck(profile: Any) -> None:
    network = networks.build_network(profile, 0).eval()
    _, features = network.forward_with_features(torch.zeros(1, 1, *(2 * stride for stride in network.strides)))
    weights = {dict(point.changes).get("feature_weight") for point in grids.grid("weights", profile, [0])}
    assert features.shape[1] == networks.bottleneck_width(profile) and 1 / features.shape[1] in weights


def test_new_knees_are_another_cohort_in_name_and_record() -> None:
    points = grids.grid("new_knees", REFERENCE)
    assert {point.cohort_seed for point in points} == {1} and {point.seed for point in points} == set(grids.SEEDS)
    assert all("-cohort_1-seed" in point.name and not point.changes for point in points)
    point = points[0]
    assert records.made_with(point, REFERENCE)["cohort_seed"] == 1
    assert "cohort_seed" not in records.made_with(replace(point, cohort_seed=0), REFERENCE)


def test_the_best_rival_is_given_what_rows_of_ours_were_given() -> None:
    points = grids.grid("rival_weights", REFERENCE, [0])
    assert {(point.row, point.setting) for point in points} == {("mean_teacher", setting) for setting in grids.BOTH}
    given = [ROWS["mean_teacher"].adapt(point.settings(REFERENCE)) for point in points]
    ours = ROWS["strong_kd"].adapt(REFERENCE)
    assert {settings.response_weight for settings in given} == {ours.response_weight}
    shapes = {(settings.response_loss, settings.response_ramp) for settings in given}
    assert shapes == {(s.response_loss, s.response_ramp) for s in (REFERENCE, ours)}


def test_a_reader_is_told_in_words_what_differs() -> None:
    points = [*grids.grid("all", REFERENCE, [0]), *grids.grid("new_knees", REFERENCE, [0])]
    said = {point.label: grids.in_words(point.label) for point in points}
    assert said["feature_temperature_0.5"] == "feature temperature 0.5" and said[""] == ""
    assert said["response_weight_1.0+response_ramp_0.0"] == "response weight 1.0, no ramp"
    updates = ["handed over slowly", "handed over at once", "erased as released"]
    assert [grids.in_words(p.label) for p in grids.grid("teacher_updates", REFERENCE, [0])[:3]] == updates
    # Every wording is used, and no two points of a grid are said to be the same.
    assert set(grids._IN_WORDS.values()) <= {part for words in said.values() for part in words.split(", ")}
    assert len(set(said.values())) == len(said)


def test_points_are_chosen_by_name_and_shared_between_processes() -> None:
    points = grids.grid("rows", TINY, [0, 1])
    halves = [runner.choose(points, part=(k, 2)) for k in (1, 2)]
    assert not set(halves[0]) & set(halves[1]) and set(halves[0]) | set(halves[1]) == set(points)
    assert [p.name for p in runner.choose(points, ["fedavg-paper_like-seed0"])] == ["fedavg-paper_like-seed0"]
    assert len(runner.choose(points, ["fedavg-*"])) == 4
    with pytest.raises(ValueError, match="Part 3/2 is none"):
        runner.choose(points, part=(3, 2))


# --- running ----------------------------------------------------------------------------------------------------


def test_a_file_holds_the_numbers_of_the_run_and_where_they_come_from(cache: Path, tmp_path: Path) -> None:
    standing, said = go(POINTS, tmp_path, cache)
    assert set(standing.done) == set(POINTS) and not standing.missing and not standing.stale
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{p.name}.json" for p in POINTS)
    assert said[0] == "3 points: 0 done, 0 stale, 3 to run" and said[-1].startswith("[3/3] pooled-heterogeneous-seed0")
    assert "left)" in said[1] and "Dice 0." in said[1]
    full = experiments.run_row("dual_kd", "paper_like", 1, TINY, cache)
    record = standing.done[POINTS[1]]
    assert (record.row, record.setting, record.seed, record.label) == ("dual_kd", "paper_like", 1, "")
    a, b = record.test_frame(), full.test_frame()
    assert len(a) == len(b) == 2 * 2 * 3 * 2 and list(a["case"]) == list(b["case"])
    for column in ("dice", "hd95_mm", "truth_ml"):
        assert np.allclose(a[column], b[column], rtol=6e-4, atol=1e-9, equal_nan=True)
    assert np.allclose(record.history_frame()["validation"], full.history_frame()["validation"], rtol=6e-4)
    assert sum(line["bytes"] for line in record.messages) == full.bytes_down + full.bytes_up
    assert sum(line["messages"] for line in record.messages) == len(full.messages)
    sent = statistics.course_of(record)["mb"].iloc[-1]
    assert sent == pytest.approx((full.bytes_down + full.bytes_up) / 1e6) == statistics.course_of(full)["mb"].iloc[-1]
    text = (tmp_path / f"{POINTS[1].name}.json").read_text()
    assert len(text) < 20_000 and str(cache) not in text and len(text.splitlines()) < 40
    facts = json.loads(text)
    assert facts["machine"].keys() == {"cores", "processor", "system", "device", "threads", "workers"}
    assert facts["command"] == "python -m fedkd_utils run --profile tiny --only dual_kd-paper_like-seed1"
    assert facts["teacher"]["seconds"] > 0 and facts["steps"] == 12 and facts["versions"]["torch"] and facts["date"]
    assert not list((cache / "runs").glob("*pooled*"))  # nothing is left behind


def test_what_is_done_is_not_done_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(POINTS[:1], tmp_path, cache)
    before = (tmp_path / f"{POINTS[0].name}.json").read_bytes()
    monkeypatch.setattr(experiments, "run_federation", lambda *a, **m: pytest.fail("trained again"))
    _, said = go(POINTS[:1], tmp_path, cache)
    assert said == ["1 points: 1 done, 0 stale, 0 to run"]
    assert (tmp_path / f"{POINTS[0].name}.json").read_bytes() == before


def test_a_stopped_grid_goes_on_inside_the_point_with_the_same_numbers(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point("uamt", "paper_like", 2)
    whole, _ = go([point], tmp_path / "whole", cache)
    original, rounds = federation.client_update, []

    def killed(state: Any, site: Any, method: Any, settings: Any, number: int, *args: Any, **more: Any) -> Any:
        rounds.append(number)
        if number == 2 and rounds.count(2) == 1:
            raise KeyboardInterrupt
        return original(state, site, method, settings, number, *args, **more)

    monkeypatch.setattr(federation, "client_update", killed)
    with pytest.raises(KeyboardInterrupt):
        go([point], tmp_path / "cut", cache, workers=1)
    assert not (tmp_path / "cut").exists()
    resumed, _ = go([point], tmp_path / "cut", cache, workers=1)
    assert rounds.count(1) == 2  # the first round was not trained again
    a, b = whole.done[point], resumed.done[point]
    assert a.test_frame().equals(b.test_frame())
    columns = [
        name
        for name in a.history_frame()
        if name not in ("seconds", "data_seconds", "cpu_seconds", "teacher_cpu_seconds")
    ]
    assert a.history_frame()[columns].equals(b.history_frame()[columns])


def test_a_record_that_cannot_be_written_costs_no_training(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point("fedavg", "paper_like", 3)

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(records, "write_record", full)
    with pytest.raises(OSError, match="No space"):
        go([point], tmp_path, cache)
    monkeypatch.undo()
    assert list((cache / "runs").glob("*fedavg-seed3*"))
    monkeypatch.setattr(federation, "client_update", lambda *a, **m: pytest.fail("trained again"))
    standing, _ = go([point], tmp_path, cache)
    assert list(standing.done) == [point] and not list((cache / "runs").glob("*fedavg-seed3*"))


def test_stale_results_are_reported_with_their_reasons_and_made_again_on_demand(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = POINTS[0]
    go([point], tmp_path, cache)
    other = replace(TINY, learning_rate=0.02)
    standing, said = go([point], tmp_path, cache, profile=other)
    assert standing.stale == {point: ["learning_rate was 0.01 and is 0.02"]} and "made again with --again" in said[0]
    standing, _ = go([point], tmp_path, cache, profile=other, again=True)
    assert standing.done and standing.done[point].result.settings["learning_rate"] == 0.02
    bigger = runner.standing([point], replace(other, client_test=3), tmp_path)
    assert "the cohort has other sizes" in bigger.stale[point]
    monkeypatch.setattr(records, "NUMBERS", -1)
    assert runner.standing([point], other, tmp_path).stale[point] == ["the digits of the code have changed"]
    monkeypatch.undo()
    monkeypatch.setitem(ROWS, "fedavg", replace(ROWS["fedavg"], starts_at_teacher=True))
    assert runner.standing([point], other, tmp_path).stale[point] == ["the row is defined otherwise"]
    monkeypatch.setitem(ROWS, "fedavg", replace(ROWS["fedavg"], starts_at_teacher=False, title="Another title"))
    assert runner.standing([point], other, tmp_path).done


def test_a_record_from_before_a_setting_existed_holds_while_that_setting_is_none(cache: Path, tmp_path: Path) -> None:
    point = POINTS[0]
    go([point], tmp_path, cache)
    path = tmp_path / f"{point.name}.json"
    facts = json.loads(path.read_text())
    for name in ("compression", "clip_norm", "noise_multiplier"):
        assert facts["settings"].pop(name) is None
    path.write_text(json.dumps(facts))
    assert point in runner.standing([point], TINY, tmp_path).done
    other = runner.standing([point], replace(TINY, compression="half"), tmp_path)
    assert other.stale[point] == ["compression was None and is half"]


def test_a_point_that_diverges_does_not_stop_the_others(cache: Path, tmp_path: Path) -> None:
    wild = Point("fedavg", "paper_like", 0, (("learning_rate", 1e30),))
    standing, said = go([wild, POINTS[0]], tmp_path, cache)
    assert standing.missing == [wild] and list(standing.done) == [POINTS[0]]
    assert said[1].startswith(f"[1/2] {wild.name} has no result: ") and "learning rate" in said[1]


def test_a_damaged_file_is_made_again(cache: Path, tmp_path: Path) -> None:
    go(POINTS[:1], tmp_path, cache)
    path = tmp_path / f"{POINTS[0].name}.json"
    for content in (b"{", b"{}", b"[1]"):
        path.write_bytes(content)
        assert "Delete it and run its grid again" in runner.standing(POINTS[:1], TINY, tmp_path).damaged[POINTS[0]]
        assert go(POINTS[:1], tmp_path, cache)[0].done


def test_ablations_of_volumes_share_one_cohort_and_its_test_volumes(cache: Path, tmp_path: Path) -> None:
    disk = (("client_labelled", 2),)
    points = [Point("fedavg", "paper_like", 0, (("client_labelled", n),), disk) for n in (1, 2)]
    points.append(Point("dual_kd", "paper_like", 0, (), (), TeacherUpdate("hand_over", 1, 0.5)))
    standing, _ = go(points, tmp_path, cache)
    assert points[2].name == "dual_kd-paper_like-hand_over_0.5_after_1-seed0"
    one, two = (standing.done[p] for p in points[:2])
    assert set(one.test_frame()["case"]) == set(two.test_frame()["case"])
    assert statistics.difference([one], [two]).subjects == 4
    assert records.by_row(standing.done).keys() == {
        "fedavg client_labelled_1",
        "fedavg client_labelled_2",
        "dual_kd hand_over_0.5_after_1",
    }
    assert records.read_all(tmp_path, points).keys() == set(points)


# --- learning rates ---------------------------------------------------------------------------------------------


def test_rates_are_chosen_on_validation_and_used(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "evaluate_cases", lambda *a: pytest.fail("looked at test volumes"))
    said: list[str] = []
    rates = runner.tune(["fedavg", "pooled", "teacher_only"], TINY, tmp_path, cache, say=said.append)
    assert set(rates) == {"fedavg", "pooled"} and said[0] == "16 trials: 0 done, 16 to run"
    facts = json.loads((tmp_path / "learning_rates.json").read_text())
    trials = facts["rows"]["fedavg"]["trials"]
    assert {(t["setting"], t["learning_rate"]) for t in trials} == {
        (setting, rate) for setting in grids.BOTH for rate in runner.LEARNING_RATES
    }
    means = {
        rate: np.mean([t["validation"] for t in trials if t["learning_rate"] == rate]) for rate in runner.LEARNING_RATES
    }
    assert rates["fedavg"] == max(means, key=lambda rate: means[rate])
    assert facts["seed"] not in grids.SEEDS and facts["rounds"] == 1
    again: list[str] = []
    assert runner.tune(["fedavg"], TINY, tmp_path, cache, say=again.append)["fedavg"] == rates["fedavg"]
    assert again == ["8 trials: 8 done, 0 to run"]
    points = runner.with_rates([Point("fedavg", "paper_like"), Point("dual_kd", "paper_like")], tmp_path)
    assert points[0].settings(TINY).learning_rate == rates["fedavg"] and points[0].name == "fedavg-paper_like-seed0"
    assert points[1].settings(TINY).learning_rate == TINY.learning_rate
    own = replace(points[0], changes=(("learning_rate", 0.5),))
    assert own.settings(TINY).learning_rate == 0.5
    monkeypatch.undo()
    _, said = go([Point("local_only", "paper_like")], tmp_path, cache)
    assert said[1] == "not tuned, at the profile's learning rate: local_only (see `tune`)"
    longer: list[str] = []
    monkeypatch.setattr(experiments, "validated", lambda *args, **more: 0.5)
    runner.tune(["fedavg"], replace(TINY, batch_labelled=TINY.batch_labelled + 1), tmp_path, cache, say=longer.append)
    assert longer[0] == "8 trials: 0 done, 8 to run"  # what was tried with other settings says nothing
    for text in ("{", '{"rows": {"fedavg": {"trials": 3}}}', '{"rows": []}'):
        (tmp_path / "learning_rates.json").write_text(text)
        with pytest.raises(ValueError, match="learning_rates.json: damaged"):
            runner.chosen_rates(tmp_path)
        with pytest.raises(ValueError, match="learning_rates.json: damaged"):
            runner.tune(["fedavg"], TINY, tmp_path, cache, say=lambda text: None)


def test_a_stopped_search_keeps_its_trials(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.5, 0.6, float("nan"), KeyboardInterrupt, 0.2, 0.7, 0.1, 0.9, 0.3])

    def validated(*args: Any, **more: Any) -> float:
        value = next(values)
        if value is KeyboardInterrupt:
            raise KeyboardInterrupt
        return float(value)  # type: ignore[arg-type]

    monkeypatch.setattr(experiments, "validated", validated)
    with pytest.raises(KeyboardInterrupt):
        runner.tune(["fedavg"], TINY, tmp_path, cache, say=lambda text: None)
    assert runner.chosen_rates(tmp_path) == {}  # three of eight trials choose nothing
    said: list[str] = []
    rates = runner.tune(["fedavg"], TINY, tmp_path, cache, say=said.append)
    assert said[0] == "8 trials: 3 done, 5 to run"
    assert rates["fedavg"] == runner.LEARNING_RATES[0]  # means 0.6, 0.35, 0.25; the third diverged once
    text = (tmp_path / "learning_rates.json").read_text()
    assert '"validation": null' in text


def test_a_row_that_diverges_has_no_validation(cache: Path) -> None:
    wild = replace(TINY, learning_rate=1e30, weight_decay=0.0)
    assert np.isnan(experiments.validated("fedavg", "paper_like", 0, wild, cache))
    calm = experiments.validated("local_only", "paper_like", 0, TINY, cache)
    history = experiments.run_row("local_only", "paper_like", 0, TINY, cache).history_frame()
    assert calm == pytest.approx(history.groupby("client")["validation"].max().mean())


# --- seconds ----------------------------------------------------------------------------------------------------


def test_seconds_are_measured_by_row_and_replace_those_of_the_runs(cache: Path, tmp_path: Path) -> None:
    said: list[str] = []
    path = runner.measure_seconds(["teacher_only", "fedavg", "dual_kd"], TINY, tmp_path, cache, say=said.append)
    facts = json.loads(path.read_bytes())
    assert facts["rows"].keys() == {"fedavg", "dual_kd"} and len(said) == 2 and facts["machine"]["workers"] == 1
    cost = facts["rows"]["dual_kd"]
    assert cost["round"] > 0 and cost["looking"] > 0 and facts["rows"]["fedavg"]["looking"] == 0
    points = [Point("teacher_only", "paper_like"), Point("fedavg", "paper_like"), Point("dual_kd", "paper_like")]
    standing, _ = go(points, tmp_path, cache)
    runs = [standing.done[point] for point in points]
    timed = records.with_seconds(runs, path)
    assert list(statistics.course_of(timed[2])["seconds"]) == pytest.approx(
        [cost["looking"] + cost["round"], cost["looking"] + 2 * cost["round"]]
    )
    assert statistics.course_of(timed[0])["seconds"].sum() == 0  # nothing is trained
    assert statistics.course_of(timed[1])["dice"].equals(statistics.course_of(runs[1])["dice"])
    with pytest.raises(ValueError, match=r"no seconds for pooled: run `python -m fedkd_utils seconds`"):
        records.with_seconds(go([Point("pooled", "paper_like")], tmp_path, cache)[0].done.values(), path)
    longer = replace(TINY, steps_per_epoch=TINY.steps_per_epoch + 1)
    changed = go([Point("fedavg", "paper_like")], tmp_path / "longer", cache, profile=longer)[0].done.values()
    with pytest.raises(ValueError, match="fedavg was timed with other settings"):
        records.with_seconds(changed, path)
    rounds = go([Point("fedavg", "paper_like")], tmp_path / "rounds", cache, profile=replace(TINY, rounds=1))[0]
    assert records.with_seconds(rounds.done.values(), path)
    other = [Point("fedavg", "paper_like", changes=(("batch_labelled", 1),))]
    with pytest.raises(ValueError, match="only rows as they are were timed"):
        records.with_seconds(go(other, tmp_path, cache)[0].done.values(), path)


def test_costs_are_reported_against_the_best_rival(cache: Path, tmp_path: Path) -> None:
    assert "no setting has whole rows yet" in runner.cost_report(TINY, tmp_path, [0])
    runner.measure_seconds(["mean_teacher", "fedsemi", "dual_kd"], TINY, tmp_path, cache, say=lambda text: None)
    points = [Point(row, "paper_like") for row in ("mean_teacher", "fedsemi", "dual_kd")]
    found = go(points, tmp_path, cache)[0].done
    best = max(("mean_teacher", "fedsemi"), key=lambda row: statistics.final_dice([found[Point(row, "paper_like")]]))
    text = runner.cost_report(TINY, tmp_path, [0])
    target = statistics.final_dice([found[Point(best, "paper_like")]])
    assert f"paper_like: final validation Dice {target:.3f} of {best}" in text
    line = next(line for line in text.splitlines() if line.split()[:1] == [best])
    assert line.split()[1] == "1/1" and "seconds" in text.splitlines()[1]


# --- command line -----------------------------------------------------------------------------------------------


def test_the_command_line_lists_runs_tunes_and_reports(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROFILES, "tiny", TINY)
    monkeypatch.setattr(__main__, "PROJECT", tmp_path)
    monkeypatch.setenv("FEDKD_CACHE", str(cache))

    def call(*words: str) -> str:
        assert __main__.main([*words]) == 0
        return capsys.readouterr().out

    seeds = ("--seed", "0", "1")
    rows = ("--profile", "tiny", "--grid", "rows", "--setting", "paper_like", *seeds)
    listed = call("run", *rows, "--only", "*avg-*", "--list").split()
    assert listed == ["fedavg-paper_like-seed0", "fedavg-paper_like-seed1"]
    assert "2 points: 0 done, 0 stale, 2 to run" in call("run", *rows, "--only", "fedavg-*")
    call("run", *rows, "--only", "dual_kd-*")
    assert "fedavg" in call("tune", "--profile", "tiny", "--row", "fedavg")
    assert "seconds.json" in call("seconds", "--profile", "tiny")
    text = call("results", "--profile", "tiny", *seeds)
    assert "rows: " in text and "dual_kd minus it +0.000 [+0.000, +0.000]" in text
    monkeypatch.setattr(federation, "client_update", lambda *a, **m: (_ for _ in ()).throw(TrainingError("diverged")))
    assert __main__.main(["run", *rows, "--only", "fedprox-*"]) == 1
    told = capsys.readouterr()
    assert "fedprox-paper_like-seed0 has no result: diverged" in told.out
    assert "2 points have no result" in told.err and "fedprox-paper_like-seed1" in told.err
    assert __main__.main(["run", "--profile", "tiny", "--part", "2"]) == 1
    assert "--part takes two numbers" in capsys.readouterr().err
    assert __main__.main(["run", "--grid", "none"]) == 1 and "There is no grid" in capsys.readouterr().err
