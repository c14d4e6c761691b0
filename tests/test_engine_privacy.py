"""Clipping, noise and masks of the engine against the course's own, in one process."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Message
from test_engine import NAMES, STATE, TWO, disturbed, order, run
from test_federation import SITES, TEACHER, TINY, equal

from fedkd_utils import engine_privacy, federation, server
from fedkd_utils.clients import FederationError
from fedkd_utils.engine_local import local_grid
from fedkd_utils.engine_messages import TRAIN, payload_bytes
from fedkd_utils.engine_privacy import with_noise
from fedkd_utils.engine_server import federate
from fedkd_utils.networks import State, nbytes

ONE = replace(TINY, rounds=1)


def furthest(a: State, b: State) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def secure(row: str, folder: Path, settings: Any = TWO, grid: Any = None, **more: Any) -> Any:
    made = order(row, folder, settings, **more)
    made = replace(made, job=replace(made.job, secure=True))
    return federate(grid or local_grid(SITES, folder), made, STATE if made.job.teacher else None)


@pytest.mark.parametrize("row", ["fedavg", "dual_kd"])
def test_clipping_by_the_engine_is_the_clipping_of_the_course(row: str, tmp_path: Path) -> None:
    clipped = replace(TWO, clip_norm=0.05)
    expected = federation.run_federation(clipped, row, SITES, TEACHER, 0)
    result, _ = run(row, tmp_path, settings=clipped)
    assert furthest(result.models["east"], expected.models["east"]) < 1e-6
    free = federation.run_federation(TWO, row, SITES, TEACHER, 0)
    assert furthest(result.models["east"], free.models["east"]) > 1e-3


def test_the_noise_has_the_deviation_that_the_accountant_is_told() -> None:
    mean = {"w": torch.zeros(200, 200), "count": torch.tensor(3)}
    noisy = with_noise(mean, clip_norm=2.0, noise_multiplier=0.6, clients=4)
    assert noisy["w"].std().item() == pytest.approx(0.6 * 2.0 / 4, rel=0.02)
    assert noisy["w"].mean().item() == pytest.approx(0, abs=0.01) and noisy["w"].dtype == torch.float32
    assert noisy["count"].item() == 3 and noisy["count"].dtype == torch.int64
    again = with_noise(mean, clip_norm=2.0, noise_multiplier=0.6, clients=4)
    assert not torch.equal(noisy["w"], again["w"])  # not from a seed
    change = {"w": torch.full((2,), 30.0)}
    assert server.clipped(change, 1.0)["w"].norm().item() == pytest.approx(1.0)


def test_a_run_with_noise_moves_by_it(tmp_path: Path) -> None:
    settings = replace(ONE, clip_norm=0.05, noise_multiplier=1.0)
    without, _ = run("fedavg", tmp_path / "a", settings=replace(settings, noise_multiplier=None))
    noisy, _ = run("fedavg", tmp_path / "b", settings=settings)
    gaps = [(noisy.models["east"][n] - t).flatten() for n, t in without.models["east"].items()]
    assert torch.cat(gaps).std().item() == pytest.approx(0.05 / 3, rel=0.2)


def test_the_sum_of_masked_updates_is_their_mean(tmp_path: Path) -> None:
    expected = federation.run_federation(TWO, "dual_kd", SITES, TEACHER, 0)
    result, report = secure("dual_kd", tmp_path)
    assert 0 < furthest(result.models["east"], expected.models["east"]) < 1e-3
    assert [who for _, _, who in report.happened("averaged")] == ["east, north, south"] * 2
    assert len(report.happened("teacher received")) == 3
    history = result.history.set_index(["round", "client"])
    for line in expected.history.to_dict("records"):
        assert history.loc[(line["round"], line["client"]), "validation"] == pytest.approx(line["validation"], abs=0.2)
    assert nbytes(STATE) < result.ledger.total("up") / 6 < 3 * nbytes(STATE)  # integers of 8 bytes


def test_no_message_of_a_masked_round_holds_the_weights_of_a_hospital(tmp_path: Path) -> None:
    seen: list[Message] = []

    def change(kind: str, node: int, reply: Message) -> Message:
        seen.append(reply)
        return reply

    secure("fedavg", tmp_path, ONE, disturbed(tmp_path, change))
    assert len([reply for reply in seen if reply.metadata.message_type == TRAIN]) == 12  # four exchanges
    with (tmp_path / "node_1" / "traffic.csv").open() as file:
        noted = sum(int(line["bytes_sent"]) for line in csv.DictReader(file))
    assert noted == sum(payload_bytes(reply) for reply in seen if reply.metadata.src_node_id == 1)
    for reply in seen:
        assert not any(len(part) for part in reply.content.array_records.values())


def test_masks_of_a_hospital_that_leaves_are_taken_off(tmp_path: Path) -> None:
    asked: list[int] = []

    def change(kind: str, node: int, reply: Message) -> Message | None:
        asked.extend([node] * (kind == TRAIN))
        return None if kind == TRAIN and node == 2 and asked.count(2) == 3 else reply

    result, report = secure("fedavg", tmp_path, ONE, disturbed(tmp_path, change), patience_s=2.0)
    two = [site for site in SITES if site.name != "north"]
    expected = federation.run_federation(ONE, "fedavg", two, None, 0)
    assert furthest(result.models["east"], expected.models["east"]) < 1e-3
    assert [fault[:2] for fault in report.happened("no update")] == [(1, "north")]


def test_a_client_with_partial_labels_does_not_mask(tmp_path: Path) -> None:
    partial = [replace(SITES[0], labelled_classes=(1, 2)), *SITES[1:]]
    _, report = secure("fedavg", tmp_path, ONE, local_grid(partial, tmp_path))
    assert report.happened("no update")[0][1] == "south" and "does not draw every one" in str(report.events)
    only_south: dict[str, Any] = {"settings": replace(ONE, clip_norm=1.0), "least": 1, "join_s": 0.5}
    with pytest.raises(FederationError, match="0 hospitals sent a usable"):
        run("fedavg", tmp_path / "clip", local_grid(partial[:1], tmp_path / "clip"), **only_south)


def test_a_weight_that_the_masks_would_cut_off_is_not_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_privacy, "LARGEST", 0.01)
    with pytest.raises(FederationError, match="0 hospitals sent a usable"):
        secure("fedavg", tmp_path, ONE)
    assert "masked it would be cut there" in (tmp_path / "server" / "report.json").read_text()


def test_masks_and_clipping_go_together(tmp_path: Path) -> None:
    settings = replace(ONE, clip_norm=0.05)
    expected = federation.run_federation(settings, "fedavg", SITES, None, 0)
    result, _ = secure("fedavg", tmp_path, settings)
    assert furthest(result.models["east"], expected.models["east"]) < 1e-3
    assert not equal(result.models["east"], expected.models["east"]) and len(NAMES) == 3
