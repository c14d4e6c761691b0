"""The engine in one process gives the same numbers as the simulation, and refuses what it does not carry."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Context, Error, Message
from test_federation import SITES, TEACHER, TINY, equal, numbers

from fedkd_utils import engine_client, federation
from fedkd_utils.clients import FederationError
from fedkd_utils.engine_connections import Order
from fedkd_utils.engine_local import LocalGrid, local_grid
from fedkd_utils.engine_messages import (
    EVALUATE,
    HELLO,
    SEND_TEACHER,
    TRAIN,
    Job,
    check_job,
    facts_of,
    record,
    to_arrays,
    weights_of,
)
from fedkd_utils.engine_orders import read_order, write_order
from fedkd_utils.engine_report import Report
from fedkd_utils.engine_server import federate
from fedkd_utils.methods import ROWS
from fedkd_utils.networks import copy_state, nbytes
from fedkd_utils.provenance import state_hash
from fedkd_utils.settings import Settings
from fedkd_utils.teacher import TeacherUpdate
from fedkd_utils.transforms import SiteData

TWO = replace(TINY, rounds=2)
STATE = copy_state(TEACHER)
NAMES = tuple(site.name for site in SITES)


def order(row: str, folder: Path, settings: Any = TWO, **more: Any) -> Order:
    teacher = state_hash(STATE) if ROWS[row].needs_teacher else ""
    job = Job(row, settings, 0, teacher, more.pop("teacher_classes", None))
    return Order(job, NAMES, folder / "server", **{"patience_s": 60.0, "join_s": 5.0, **more})


def run(row: str, folder: Path, grid: LocalGrid | None = None, **more: Any) -> Any:
    grid = grid or local_grid(SITES, folder)
    made = order(row, folder, **more)
    return federate(grid, made, STATE if made.job.teacher else None)


@pytest.mark.parametrize("row", ["dual_kd", "fedavg", "uamt", "finetune", "fedprox"])
def test_the_engine_gives_every_weight_of_the_simulation(row: str, tmp_path: Path) -> None:
    expected = federation.run_federation(TWO, row, SITES, TEACHER, 0)
    result, report = run(row, tmp_path)
    for name in NAMES:
        assert equal(result.models[name], expected.models[name])
    assert result.best_round == expected.best_round
    assert sorted(map(repr, map(sorted, map(dict.items, numbers(result))))) == sorted(
        map(repr, map(sorted, map(dict.items, numbers(expected))))
    )
    assert not report.happened("rejected") and not report.happened("no update")
    assert result.ledger.total("down") == expected.ledger.total("down")
    assert bool(report.happened("teacher received")) == ROWS[row].distils


def test_both_sides_count_the_same_bytes_and_the_teacher_goes_out_once(tmp_path: Path) -> None:
    result, report = run("dual_kd", tmp_path)
    for node, name in enumerate(NAMES, start=1):
        with (tmp_path / f"node_{node}" / "traffic.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert [line["message"] for line in lines] == [HELLO, SEND_TEACHER, TRAIN, TRAIN, EVALUATE]
        for kind in (HELLO, SEND_TEACHER, TRAIN, EVALUATE):
            own = [line for line in lines if line["message"] == kind]
            assert sum(int(line["bytes_received"]) for line in own) == report.bytes("down", kind, name)
            assert sum(int(line["bytes_sent"]) for line in own) == report.bytes("up", kind, name)
    taught = [line for line in result.ledger.entries if line["what"] == "teacher"]
    assert len(taught) == 3 and {line["bytes"] for line in taught} == {nbytes(STATE)}
    small = 400 * len(STATE) + 2000  # names, headers of arrays, the job
    assert nbytes(STATE) < report.bytes("down", SEND_TEACHER) / 3 < nbytes(STATE) + small
    assert report.bytes("up", SEND_TEACHER) + report.bytes("up", HELLO) + report.bytes("up", EVALUATE) < 3000
    expected = federation.run_federation(TWO, "dual_kd", SITES, TEACHER, 0).ledger
    assert all(result.ledger.total(*which) == expected.total(*which) for which in [("up",), ("down", "teacher")])
    assert result.ledger.total("down", "student") == expected.total("down", "student")


class Disturbed(LocalGrid):
    """A grid on which answers are changed or lost on their way."""

    change: Callable[[str, int, Message], Message | None]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        changed = []
        for reply in super().pull_messages(message_ids):
            kind, node = reply.metadata.message_type, reply.metadata.src_node_id
            changed.append(self.change(kind, node, reply))
        return [reply for reply in changed if reply is not None]


def disturbed(folder: Path, change: Callable[[str, int, Message], Message | None]) -> Disturbed:
    grid = local_grid(SITES, folder)
    grid.__class__ = Disturbed
    grid.change = change  # type: ignore[attr-defined]
    return cast(Disturbed, grid)


def altered(what: str) -> Callable[[str, int, Message], Message | None]:
    """North (node 2) sends something else in its first answer to a round."""
    done: list[int] = []

    def change(kind: str, node: int, reply: Message) -> Message | None:
        if kind != TRAIN or node != 2 or done:
            return reply
        done.append(node)
        facts, state = facts_of(reply.content), weights_of(reply.content)
        first = next(iter(state))
        if what == "lost":
            return None
        if what == "error":
            failed = Message(Error(code=2, reason="out of memory"), reply_to=reply)
            failed.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
            return failed
        if what == "not json":
            reply.content["facts"] = ConfigRecord({"json": "{"})
        elif what == "another client":
            reply.content["facts"] = record({**facts, "client": "east"})["facts"]
        elif what == "another round":
            reply.content["facts"] = record({**facts, "began": "0" * 64})["facts"]
        elif what == "more examples":
            reply.content["facts"] = record({**facts, "examples": 10**6})["facts"]
        elif what == "a share":
            reply.content["facts"] = record({**facts, "shares": {"1": 7}})["facts"]
        elif what == "two sets":
            reply.content["more"] = reply.content["weights"]
        elif what == "another type":
            reply.content["weights"] = to_arrays({**state, first: state[first].double()})
        elif what == "infinite":
            state[first].view(-1)[0] = float("inf")
            reply.content["weights"] = to_arrays(state)
        elif what == "damaged":
            array = reply.content.array_records["weights"][first]
            array.data = array.data[:20]
        return reply

    return change


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("not json", "does not hold the facts"),
        ("another client", "signed 'east' and not 'north'"),
        ("another round", "did not begin from the student of this round"),
        ("more examples", "counts 1000000 examples; it joined with 8"),
        ("a share", "no valid shares"),
        ("two sets", "2 sets of weights"),
        ("another type", "is torch.float64 and not torch.float32"),
        ("infinite", "holds NaN or infinite"),
        ("damaged", "cannot be read"),
    ],
)
def test_a_bad_update_is_rejected_with_its_reason_and_the_round_goes_on(what: str, reason: str, tmp_path: Path) -> None:
    one = replace(TINY, rounds=1)
    result, report = run("fedavg", tmp_path, disturbed(tmp_path, altered(what)), settings=one)
    faults = report.happened("rejected") + report.happened("no update")
    assert [fault[:2] for fault in faults] == [(1, "north")] and reason in faults[0][2]
    assert [who for _, _, who in report.happened("averaged")] == ["east, south"]
    two = [site for site in SITES if site.name != "north"]
    expected = federation.run_federation(one, "fedavg", two, None, 0)
    assert equal(result.models["north"], expected.models["east"])


@pytest.mark.parametrize(("what", "reason"), [("lost", "no answer in time"), ("error", "out of memory")])
def test_who_does_not_answer_is_left_out_of_the_round(what: str, reason: str, tmp_path: Path) -> None:
    _, report = run("fedavg", tmp_path, disturbed(tmp_path, altered(what)), patience_s=1.0)
    assert [(number, client) for number, client, _ in report.happened("no update")] == [(1, "north")]
    assert reason in report.happened("no update")[0][2]
    assert [number for number, _, _ in report.happened("averaged")] == [1, 2]


def two_lost_in_round_two() -> Callable[[str, int, Message], Message | None]:
    """A network that loses the updates of two of three hospitals, once, in the second round."""
    asked: list[int] = []

    def change(kind: str, node: int, reply: Message) -> Message | None:
        asked.extend([node] * (kind == TRAIN))
        return None if kind == TRAIN and len(asked) in (4, 5) else reply

    return change


def test_a_run_with_too_few_answers_stops_and_goes_on_from_its_last_round(tmp_path: Path) -> None:
    expected = federation.run_federation(TWO, "dual_kd", SITES, TEACHER, 0)
    with pytest.raises(FederationError, match="Round 2: 1 hospitals.*Rounds up to 1 are kept"):
        run("dual_kd", tmp_path, disturbed(tmp_path, two_lost_in_round_two()), patience_s=1.0)
    result, report = run("dual_kd", tmp_path)
    assert all(equal(result.models[name], expected.models[name]) for name in NAMES)
    assert result.best_round == expected.best_round
    assert report.happened("resumed") and len(report.happened("teacher received")) == 3
    again, report = run("dual_kd", tmp_path)  # a run that is finished is not run again
    assert equal(again.models["north"], expected.models["north"])
    assert len(report.happened("averaged")) == 2


def test_a_mean_teacher_at_the_hospital_survives_a_round_that_is_asked_twice(tmp_path: Path) -> None:
    expected = federation.run_federation(TINY, "uamt", SITES, None, 0)
    with pytest.raises(FederationError, match="Round 2"):
        run("uamt", tmp_path, disturbed(tmp_path, two_lost_in_round_two()), settings=TINY, patience_s=1.0)
    result, _ = run("uamt", tmp_path, settings=TINY)
    assert all(equal(result.models[name], expected.models[name]) for name in NAMES)


def test_a_teacher_that_was_lost_or_damaged_at_a_hospital_is_sent_again(tmp_path: Path) -> None:
    expected = federation.run_federation(TWO, "dual_kd", SITES, TEACHER, 0)
    grid, seen = local_grid(SITES, tmp_path), list[int]()

    def change(kind: str, node: int, reply: Message) -> Message | None:
        if kind == TRAIN and node == 3 and not seen:
            seen.append(node)
            (tmp_path / "node_1" / "teacher.safetensors").unlink()
            (tmp_path / "node_2" / "teacher.safetensors").write_bytes(b"damaged")
        return reply

    grid = disturbed(tmp_path, change)
    result, report = run("dual_kd", tmp_path, grid)
    assert all(equal(result.models[name], expected.models[name]) for name in NAMES)
    sent = [(number, client) for number, client, _ in report.happened("teacher received")]
    names = [site.name for site in SITES]
    assert sorted(sent) == sorted([(1, name) for name in NAMES] + [(2, names[0]), (2, names[1])])


def test_partial_labels_travel_as_shares(tmp_path: Path) -> None:
    partial = [replace(SITES[0], labelled_classes=(1, 2)), *SITES[1:]]
    expected = federation.run_federation(TWO, "fedavg", partial, None, 0)
    result, _ = run("fedavg", tmp_path, local_grid(partial, tmp_path))
    assert all(equal(result.models[name], expected.models[name]) for name in NAMES)
    whole = federation.run_federation(TWO, "fedavg", SITES, None, 0)
    assert not equal(whole.models["east"], expected.models["east"])


def test_a_teacher_of_some_classes_travels_with_what_it_was_taught(tmp_path: Path) -> None:
    expected = federation.run_federation(TWO, "dual_kd", SITES, TEACHER, 0, teacher_classes=(1, 2))
    result, _ = run("dual_kd", tmp_path, teacher_classes=(1, 2))
    assert all(equal(result.models[name], expected.models[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        ("local_only", {}, "averages no students"),
        ("teacher_only", {}, "averages no students"),
        ("pooled", {}, "all data in one place"),
        ("fedbn", {}, "chooses a model for each client"),
        (next(row for row in ROWS if ROWS[row].mixes), {}, "chooses a model for each client"),
        ("ssfl_published", {}, "within groups"),
        ("fedavg", {"compression": "int8"}, "compression 'int8'"),
        ("fedavg", {"noise_multiplier": 1.0}, "noise_multiplier needs clip_norm"),
    ],
)
def test_what_the_engine_does_not_carry_is_refused_before_anything_starts(
    row: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    grid = local_grid(SITES, tmp_path)
    with pytest.raises(FederationError, match=words):
        federate(grid, order(row, tmp_path, replace(TWO, **changes)))
    with pytest.raises(FederationError, match=words):
        write_order(tmp_path / "order.json", order(row, tmp_path, replace(TWO, **changes)))
    assert not list(tmp_path.rglob("*.csv")) and not (tmp_path / "order.json").exists()


def test_a_teacher_that_moves_is_refused() -> None:
    with pytest.raises(FederationError, match="a teacher that moves"):
        check_job(Job("dual_kd", TWO, 0, "a"), TeacherUpdate("hand_over"))
    with pytest.raises(FederationError, match="needs a teacher"):
        check_job(Job("dual_kd", TWO, 0))
    with pytest.raises(FederationError, match="Masks hide sums of real numbers"):
        check_job(Job("fedavg", replace(TWO, normalisation="batch"), 0, secure=True))


def test_who_does_not_belong_is_not_admitted(tmp_path: Path) -> None:
    twice = [*SITES, replace(SITES[0], labels=SITES[0].labels.clone()), replace(SITES[0], name="west")]
    _, report = run("fedavg", tmp_path, local_grid(twice, tmp_path))
    reasons = [why for _, _, why in report.happened("not admitted")]
    assert reasons == ["south is connected already", "'west' is not one of south, north, east"]
    with pytest.raises(FederationError, match="1 of 3 hospitals are connected, and 2 are needed"):
        run("fedavg", tmp_path / "few", local_grid(SITES[:1], tmp_path / "few"), join_s=0.5)


def test_a_hospital_whose_volumes_changed_may_not_go_on(tmp_path: Path) -> None:
    lost = disturbed(tmp_path, lambda kind, node, reply: None if kind == TRAIN else reply)
    with pytest.raises(FederationError, match="Round 1: 0 hospitals"):
        run("fedavg", tmp_path, lost, patience_s=0.5)
    changed = [replace(SITES[0], labelled_images=SITES[0].labelled_images + 1), *SITES[1:]]
    _, report = run("fedavg", tmp_path, local_grid(changed, tmp_path), join_s=0.5)
    assert {why[:34] for _, _, why in report.happened("not admitted")} == {"the volumes of south are others th"}
    assert [who for _, _, who in report.happened("averaged")] == ["east, north"] * 2


def test_a_greeting_that_lacks_its_facts_admits_nobody(tmp_path: Path) -> None:
    def change(kind: str, node: int, reply: Message) -> Message:
        if kind == HELLO and node == 1:
            reply.content["facts"] = record({"client": "south", "examples": "many"})["facts"]
        return reply

    _, report = run("fedavg", tmp_path, disturbed(tmp_path, change), join_s=0.5)
    assert report.happened("not admitted")[0][1:] == (
        "south",
        "its greeting lacks the number of volumes, or their hash",
    )


def test_a_hospital_that_comes_late_takes_part_from_then_on(tmp_path: Path) -> None:
    grid, rounds = local_grid(SITES, tmp_path), list[str]()

    def change(kind: str, node: int, reply: Message) -> Message:
        rounds.append(kind)
        return reply

    grid = disturbed(tmp_path, change)
    all_ids = grid.get_node_ids()
    grid.get_node_ids = lambda: all_ids if TRAIN in rounds else all_ids[:2]  # type: ignore[method-assign]
    _, report = run("dual_kd", tmp_path, grid, join_s=0.5)
    assert [who for _, _, who in report.happened("averaged")] == ["north, south", "east, north, south"]
    assert [fault[:2] for fault in report.happened("absent")] == [(1, "east")]


def test_a_hospital_with_another_version_is_not_admitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "our_code", lambda: "older")
    with pytest.raises(FederationError, match="0 of 3"):
        run("fedavg", tmp_path, join_s=0.5)
    text = (tmp_path / "server" / "report.json").read_text()
    assert "different versions of the course: install the same" in text


def test_a_fault_at_a_hospital_tells_the_server_no_file_of_it(tmp_path: Path) -> None:
    def broken(context: Context, settings: Settings) -> SiteData:
        raise FileNotFoundError("/archive/person_17.nii.gz")

    apps = [engine_client.client_app(broken), *local_grid(SITES, tmp_path).apps.values()]
    _, report = run("fedavg", tmp_path, LocalGrid(apps, tmp_path))
    (_, _, why) = report.happened("not admitted")[0]
    assert "FileNotFoundError" in why and "log of the node" in why and "person" not in why


def test_an_order_comes_back_from_its_file(tmp_path: Path) -> None:
    made = order("dual_kd", tmp_path, teacher_classes=(1, 2))
    path = write_order(tmp_path / "order.json", made, STATE)
    found, teacher = read_order(path)
    assert found == made and teacher is not None and equal(teacher, STATE)
    path.write_text("{}")
    with pytest.raises(FederationError, match="not an order of this version"):
        read_order(path)
    with pytest.raises(FederationError, match="cannot be read"):
        Job.from_json('{"row": "fedavg"}')


def test_a_report_says_events_and_bytes(tmp_path: Path) -> None:
    _, report = run("fedavg", tmp_path)
    text = report.text()
    assert "joined: 5 volumes" in text and "averaged: east, north, south" in text
    assert f"{report.bytes('up', TRAIN):,d} bytes" in text
    assert Report.read(tmp_path / "server" / "report.json", report.mark) == report
    assert Report.read(tmp_path / "server" / "report.json", "another").events == []
