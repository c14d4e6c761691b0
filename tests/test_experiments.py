"""Experiments: made once, resumed, remade when damaged, and a table whose numbers are those of the files."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import TINY, blobs

from fedkd_utils import (
    cohorts,
    experiments,
    federation,
    metrics,
    networks,
    provenance,
    shares,
    teacher,
    training,
    transforms,
)
from fedkd_utils.acquisition import Scan, Scanner
from fedkd_utils.errors import VolumeError
from fedkd_utils.experiments import Result
from fedkd_utils.methods import ROWS


def run(row: str, root: Path, setting: str = "paper_like", seed: int = 0, **more: Any) -> Result:
    return experiments.run_row(row, setting, seed, more.pop("settings", TINY), root, **more)


@pytest.fixture()
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original = federation.run_federation

    def counted(settings: Any, row: str, *args: Any, **more: Any) -> Any:
        calls.append(row)
        return original(settings, row, *args, **more)

    monkeypatch.setattr(experiments, "run_federation", counted)
    return calls


def without_clock(result: Result) -> dict[str, Any]:
    facts = json.loads(experiments.result_json(result))
    facts["teacher"].pop("seconds", None)
    for name in ("wall_seconds", "cpu_seconds"):
        facts.pop(name)
    for line in facts["history"]:
        line.pop("seconds", None)
        line.pop("data_seconds", None)
        line.pop("teacher_cpu_seconds", None)
        line.pop("cpu_seconds", None)
    return facts


@pytest.mark.parametrize("row", list(ROWS))
def test_a_row_is_run_once_and_read_back(row: str, cache: Path, trainings: list[str]) -> None:
    first = run(row, cache)
    folder = experiments.result_folder(first, cache)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "result.json"]
    again = run(row, cache)
    assert trainings == [row]
    assert experiments.result_json(first) == experiments.result_json(again)
    assert str(cache) not in (folder / "result.json").read_text()  # no path of this machine
    assert first.settings["name"] == "tiny" and first.versions["torch"] == torch.__version__
    assert first.steps == (0 if ROWS[row].objective is None else 2 * 2 * 3)  # pooled too


def test_the_numbers_are_those_of_the_stored_models_on_the_test_volumes(cache: Path) -> None:
    for row in ("local_only", "dual_kd", "teacher_only"):
        result = run(row, cache)
        models = experiments.load_models(experiments.result_folder(result, cache) / "model.safetensors")
        shared = provenance.state_hash(models["client_1"]) == provenance.state_hash(models["client_2"])
        assert shared == (ROWS[row].federated or ROWS[row].objective is None)
        sites = experiments.load_clients(cohorts.make_cohort(TINY, "paper_like", root=cache), TINY)
        network = networks.build_network(TINY, 0)
        frames = []
        for site in sites:
            networks.load_state(network, models[site.name])
            assert training.validate(network, site.validation) == max(
                line["validation"]
                for line in result.history
                if line["client"] == site.name and line["round"] == result.best_round[site.name]
            )
            frames.append(training.evaluate_cases(network, site.test).assign(client=site.name))
        expected = pd.concat(frames, ignore_index=True)
        got = result.test_frame()
        assert len(got) == 2 * 2 * 3 * 2
        for column in ("dice", "voe", "vd", "assd_mm", "hd95_mm", "hd_mm", "truth_ml"):
            assert np.array_equal(got[column], expected[column].astype(float), equal_nan=True), column
        assert list(got["client"]) == list(expected["client"]) and list(got["empty"]) == list(expected["empty"])


def test_other_inputs_are_other_runs(cache: Path, trainings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = run("fedavg", cache)
    others = [
        run("fedavg", cache, seed=1),
        run("fedavg", cache, setting="heterogeneous"),
        run("fedavg", cache, settings=replace(TINY, learning_rate=1e-3)),
    ]
    monkeypatch.setattr(experiments, "code_hash", lambda modules: "another code")
    others.append(run("fedavg", cache))
    monkeypatch.undo()
    elsewhere = {"versions": {"torch": "another"}, "device": "cpu", "precision": "float32"}
    monkeypatch.setattr(experiments, "surroundings", lambda: elsewhere)
    others.append(run("fedavg", cache))
    inputs = {one.inputs for one in (base, *others)}
    assert len(inputs) == 6
    kept = experiments.read_result(experiments.result_folder(base, cache) / "result.json")
    assert kept.inputs == base.inputs  # untouched by the others


def test_damaged_results_are_made_again_with_the_same_numbers(cache: Path, trainings: list[str]) -> None:
    first = run("fedavg", cache, seed=2)
    folder = experiments.result_folder(first, cache)
    for name, content in (("result.json", b"{"), ("result.json", b"{}"), ("model.safetensors", b"junk")):
        (folder / name).write_bytes(content)
        assert without_clock(run("fedavg", cache, seed=2)) == without_clock(first)
    (folder / "model.safetensors").unlink()
    assert without_clock(run("fedavg", cache, seed=2)) == without_clock(first)
    assert len(trainings) == 5
    with pytest.raises(ValueError, match="result.json.*Delete it"):
        (folder / "result.json").write_bytes(b"[1]")
        experiments.read_result(folder / "result.json")


def test_a_killed_row_goes_on_where_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = run("dual_kd", cache, seed=3)
    for path in experiments.result_folder(whole, cache).iterdir():
        path.unlink()
    original = federation.client_update
    rounds: list[int] = []

    def killed(state: Any, site: Any, method: Any, settings: Any, number: int, *args: Any, **more: Any) -> Any:
        rounds.append(number)
        if number == 2 and len(rounds) <= 4:
            raise KeyboardInterrupt
        return original(state, site, method, settings, number, *args, **more)

    monkeypatch.setattr(federation, "client_update", killed)
    with pytest.raises(KeyboardInterrupt):
        run("dual_kd", cache, seed=3, workers=1)
    folder = experiments.result_folder(whole, cache)
    assert [p.name for p in folder.iterdir()] == ["round.safetensors"]
    rounds[:] = [0] * 10
    assert without_clock(run("dual_kd", cache, seed=3, workers=1)) == without_clock(whole)
    assert rounds[10:] == [2, 2]  # the first round was not trained again
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "result.json"]


def test_sites_in_memory_give_the_same_result(cache: Path) -> None:
    sites = experiments.load_clients(cohorts.make_cohort(TINY, "paper_like", root=cache), TINY)
    assert isinstance(sites[0], transforms.SiteData)
    first = run("fedavg", cache, seed=4, sites=sites)
    for path in experiments.result_folder(first, cache).iterdir():
        path.unlink()
    assert without_clock(run("fedavg", cache, seed=4)) == without_clock(first)


def test_clients_read_side_by_side_are_those_read_one_after_another(cache: Path) -> None:
    cohort = cohorts.make_cohort(TINY, "heterogeneous", root=cache)
    sites = experiments.load_clients(cohort, TINY)
    assert [site.name for site in sites] == [site.name for site in cohort.clients]
    for made, site in zip(sites, cohort.clients, strict=True):
        alone = transforms.load_site(site, TINY)
        for name in ("labelled_images", "labels", "unlabelled_images"):
            assert torch.equal(getattr(made, name), getattr(alone, name))
        for part in ("validation", "test"):
            pairs = zip(getattr(made, part), getattr(alone, part), strict=True)
            assert all(a.name == b.name and torch.equal(a.image, b.image) for a, b in pairs)
    bad = tuple(replace(site, training=()) for site in cohort.clients)
    with pytest.raises(VolumeError, match="client_1: no labelled training volume"):
        experiments.load_clients(replace(cohort, clients=bad), TINY)
    assert experiments.load_clients(replace(cohort, clients=()), TINY) == []


def test_each_of_two_clients_side_by_side_is_tested_with_its_own_weights(cache: Path, monkeypatch: Any) -> None:
    sites = experiments.load_clients(cohorts.make_cohort(TINY, "paper_like", root=cache), TINY)
    first = experiments.run_row("local_only", "paper_like", 5, TINY, cache, sites=sites, workers=1, show_progress=False)
    both, used = threading.Barrier(2, timeout=60), {}

    def together(network: torch.nn.Module, cases: Any) -> pd.DataFrame:
        both.wait()  # both clients have loaded their weights
        used[cases[0].name] = id(network), provenance.state_hash(network.state_dict())
        return training.evaluate_cases(network, cases)

    monkeypatch.setattr(experiments, "evaluate_cases", together)
    (experiments.result_folder(first, cache) / "result.json").unlink()
    again = experiments.run_row("local_only", "paper_like", 5, TINY, cache, sites=sites, workers=2, show_progress=False)
    assert len(used) == len({one for one, _ in used.values()}) == len({weights for _, weights in used.values()}) == 2
    assert without_clock(again) == without_clock(first)


def test_pooled_trains_once_on_every_volume_with_its_hidden_label(cache: Path) -> None:
    cohort = cohorts.make_cohort(TINY, "paper_like", root=cache)
    everything = shares.pooled_site(cohort, TINY)
    sites = experiments.load_clients(cohort, TINY)
    assert len(everything.labelled_images) == 2 * (1 + 2) and len(everything.unlabelled_images) == 0
    images = torch.cat([torch.cat([s.labelled_images, s.unlabelled_images]) for s in sites])
    assert torch.equal(everything.labelled_images, images) and all(bool((y > 0).any()) for y in everything.labels)
    assert torch.equal(everything.labels[0], sites[0].labels[0]) and len(everything.validation) == 2
    result = run("pooled", cache)
    assert result.messages == [] and {line["client"] for line in result.history} == {"pooled"}
    assert {line["client"] for line in result.test} == {"client_1", "client_2"}
    models = experiments.load_models(experiments.result_folder(result, cache) / "model.safetensors")
    assert list(models) == ["client_1", "client_2"] and models["client_1"] is models["client_2"]
    hidden = cohorts.hidden_label(cohort.clients[0].unlabelled[0])
    content = hidden.read_bytes()
    hidden.unlink()
    with pytest.raises(VolumeError, match="no hidden truth"):
        shares.pooled_site(cohort, TINY)
    hidden.write_bytes(content)


def test_a_larger_cohort_can_be_used_in_part(cache: Path) -> None:
    large = replace(TINY, client_labelled=2, client_unlabelled=4)
    cohort = cohorts.make_cohort(large, "paper_like", root=cache)
    result = run("fedavg", cache, on_disk=large)
    assert {line["case"] for line in result.test} == {item.name for site in cohort.clients for item in site.test}
    assert result.settings["client_labelled"] == 1
    assert run("fedavg", cache, settings=large).inputs != result.inputs != run("fedavg", cache).inputs


def test_another_cohort_has_other_knees_everywhere(cache: Path) -> None:
    """Repository and clients: nothing of a run has seen the knees of the first one; also through new contrasts."""
    first = cohorts.make_cohort(TINY, "paper_like", root=cache)
    other = cohorts.make_cohort(TINY, "paper_like", 1, cache)
    for row in ("dual_kd", "mixed_protocols"):
        one, new = run(row, cache), run(row, cache, cohort_seed=1)
        assert {line["case"] for line in new.test} == {item.name for site in other.clients for item in site.test}
        assert not {line["case"] for line in new.test} & {line["case"] for line in one.test}
        assert new.teacher["weights_sha256"] != one.teacher["weights_sha256"] and new.inputs != one.inputs
    names = [{item.name for site in (c.repository, *c.clients) for item in site.items} for c in (first, other)]
    assert not names[0] & names[1]


def test_a_seed_has_its_own_teacher(cache: Path) -> None:
    first, again, other = (run("teacher_only", cache, seed=seed) for seed in (0, 0, 1))
    assert first.teacher == again.teacher and first.teacher["weights_sha256"] != other.teacher["weights_sha256"]


def made(row: str, seed: int, dice: float, hd: float | None, setting: str = "paper_like", empty: str = "") -> Result:
    """A result by hand: two cases, all classes alike, but the patella of the second case."""
    test = []
    for case in ("a", "b"):
        for c in (1, 2, 3):
            gone = empty if (case, c) == ("b", 3) else ""
            for components, more in (("all", 0.0), ("largest", 0.05)):
                test.append(
                    {
                        "client": "client_1",
                        "case": case,
                        "class": c,
                        "cartilage": "x",
                        "components": components,
                        "dice": 0.0 if gone else dice + more,
                        "hd95_mm": None if gone else hd,
                        "empty": gone,
                    }
                )
    return Result(row, setting, seed, {}, {}, "", {}, [], test, [], 3_000_000, 1_000_000, 10.0 + seed, 5.0, 40)


def test_the_table_averages_cases_classes_and_seeds_by_hand() -> None:
    results = [
        made("dual_kd", 0, 0.8, 2.0),
        made("fedavg", 0, 0.6, 4.0),
        made("fedavg", 1, 0.4, 2.0, empty="prediction"),
    ]
    table = experiments.comparison_table(results)
    assert list(table["row"]) == [ROWS["fedavg"].title, ROWS["dual_kd"].title]  # the order of ROWS
    fedavg, dual = table.iloc[0], table.iloc[1]
    assert (fedavg["seeds"], dual["seeds"]) == (2, 1)
    assert dual["Dice"] == pytest.approx(0.8) and dual["Dice largest"] == pytest.approx(0.85)
    assert fedavg["Dice femoral"] == pytest.approx(0.5) and fedavg["Dice patellar"] == pytest.approx((0.6 + 0.2) / 2)
    assert fedavg["Dice"] == pytest.approx((0.6 + (0.4 + 0.4 + 0.2) / 3) / 2)
    assert fedavg["HD95 mm"] == pytest.approx(3.0) and fedavg["missing"] == 0.5  # a mean over seeds
    assert (fedavg["MB down"], fedavg["MB up"], fedavg["steps"], fedavg["seconds"]) == (3.0, 1.0, 40, 10.5)
    both = experiments.comparison_table([*results, made("teacher_only", 0, 0.1, None, "heterogeneous")])
    assert list(both["setting"]) == ["heterogeneous", "paper_like", "paper_like"] and np.isnan(both["HD95 mm"][0])


def test_the_table_of_real_runs_is_complete(cache: Path) -> None:
    table = experiments.comparison_table([run(row, cache) for row in ROWS])
    assert list(table["row"]) == [method.title for method in ROWS.values()]
    assert list(table["MB up"] > 0) == [method.federated for method in ROWS.values()]
    assert list(table["MB down"] > 0) == [method.federated or method.needs_teacher for method in ROWS.values()]
    assert table["Dice"].between(0, 1).all()


def test_bad_requests_say_what_to_do(cache: Path) -> None:
    with pytest.raises(ValueError, match="no row 'fedsgd': choose one of"):
        run("fedsgd", cache)
    with pytest.raises(ValueError, match="run a row first"):
        experiments.comparison_table([])
    with pytest.raises(FileNotFoundError):
        experiments.read_result(cache / "none.json")


@pytest.mark.parametrize("setting", ["paper_like", "heterogeneous"])
def test_the_protocol_teacher_learns_from_the_sequences_of_its_setting(setting: str, cache: Path) -> None:
    result = run("teacher_protocols", cache, setting)
    repository = cohorts.make_repository(TINY, f"protocols_{setting}", root=cache)
    settings = ROWS["teacher_protocols"].adapt(TINY)
    for made in (
        teacher.teacher_on(repository, settings, root=cache),
        teacher.teacher_for(settings, setting, root=cache),
    ):
        assert provenance.state_hash(made.network.state_dict()) == result.teacher["weights_sha256"]


@pytest.mark.parametrize("blind", ["repository_dess", "random"])
def test_the_few_labels_choose_the_teacher_and_both_are_paid_for(
    blind: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two repositories sees the clinics' boxes as holes."""
    original = cohorts.make_repository

    def inverted(subject: int, scanner: Scanner, scan_seed: int) -> Scan:
        scan = blobs(subject, scanner, scan_seed)
        return replace(scan, image=scan.image.max() - scan.image)

    def make(settings: Any, contrast: str = "repository_dess", *args: Any, **more: Any) -> Any:
        return original(settings, contrast, *args, **{**more, **({"scan": inverted} if contrast == blind else {})})

    monkeypatch.setattr(cohorts, "make_repository", make)
    settings = replace(TINY, teacher_steps=60)
    result = run("chosen_finetune", tmp_path, settings=settings)
    cohort = cohorts.make_cohort(TINY, "paper_like", root=tmp_path)
    sites = experiments.load_clients(shares.share(cohort, TINY, 0), TINY)
    scores = {}
    for contrast in ("repository_dess", "random"):
        one = teacher.teacher_on(cohorts.make_repository(settings, contrast, root=tmp_path), settings, root=tmp_path)
        cases = [
            [
                metrics.dice(p == c, y == c)
                for c in (1, 2, 3)
                for p, y in zip(
                    training.predict_probabilities(one.network, site.labelled_images).argmax(dim=1).numpy(),
                    site.labels.numpy(),
                    strict=True,
                )
            ]
            for site in sites
        ]
        scores[contrast] = np.mean(cases)
        chosen = provenance.state_hash(one.network.state_dict()) == result.teacher["weights_sha256"]
        assert chosen == (contrast != blind)
    assert scores[blind] < min(score for contrast, score in scores.items() if contrast != blind)
    down = pd.DataFrame(result.messages).query("round == 0 and direction == 'down'")
    assert sorted(down["what"]) == ["teacher"] * 2 + ["teacher not chosen"] * 2
    assert down["bytes"].nunique() == 1
