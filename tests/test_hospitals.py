"""Real processes on loopback, with TLS and node keys: the same numbers, faults, restarts, and nothing left behind.

One federation serves all tests, in order; a SuperNode starts a process that imports torch for every message.
"""

from __future__ import annotations

import csv
import http.client
import json
import os
import signal
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import psutil
from hospital_data import NAMES, write_hospitals
from test_federation import equal
from tiny import TINY

from fedkd_utils import experiments, federation, hospital_keys, hospitals, networks, site_folder, teacher, transforms
from fedkd_utils.clients import FederationError
from fedkd_utils.engine_connections import Order
from fedkd_utils.engine_messages import HELLO, SEND_TEACHER, TRAIN, Job
from fedkd_utils.engine_orders import write_order
from fedkd_utils.engine_report import Report
from fedkd_utils.hospitals import Federation
from fedkd_utils.provenance import state_hash

TAUGHT = teacher.freeze(networks.build_network(TINY, 99))
STATE = networks.copy_state(TAUGHT)
NODE_PATH = {"PYTHONPATH": str(Path(__file__).parent / "node_path")}
#: Seconds after which a test gives up; a quiet machine needs a tenth of it.
LIMIT = 400


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_hospitals(tmp_path_factory.mktemp("hospitals"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    with pytest.MonkeyPatch.context() as patch, hospitals.federation(folder, "faulty_client:app") as made:
        patch.setenv("PYTHONPATH", NODE_PATH["PYTHONPATH"])
        made.start_superlink()
        for name in NAMES:
            made.register(name)
            made.start_node(name, folders[name])
        yield made
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


def order(folder: Path, row: str, rounds: int = 2, **more: Any) -> Path:
    distils = row == "dual_kd"
    job = Job(row, replace(TINY, rounds=rounds), 0, state_hash(STATE) if distils else "")
    made = Order(job, NAMES, folder / row, **{"least": 3, "patience_s": 180.0, "join_s": 180.0, **more})
    return write_order(folder / f"{row}.json", made, STATE if distils else None)


def report_of(order: Path) -> Report:
    path = Path(json.loads(order.read_bytes())["folder"]) / "report.json"
    facts = json.loads(path.read_bytes()) if path.exists() else {"mark": ""}
    return Report.read(path, facts["mark"])


def simulated(row: str, folders: dict[str, Path]) -> federation.FederationResult:
    sites = [transforms.load_site(site_folder.open_site(folders[name]), TINY) for name in NAMES]
    return federation.run_federation(TINY, row, sites, TAUGHT, 0)


def traffic(made: Federation, name: str) -> list[dict[str, str]]:
    with (made.folder / "nodes" / name / "traffic.csv").open() as file:
        return list(csv.DictReader(file))


def wait_for(what: Any, seconds: float = LIMIT) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.3)


def test_real_processes_give_the_weights_of_the_simulation(
    running: Federation, folders: dict[str, Path], tmp_path: Path
) -> None:
    hospital_keys.write_node_key(running.secrets, "stranger")
    running.start_node("stranger", folders["east"])  # with a key that nobody registered
    made = order(tmp_path, "dual_kd")
    running.wait(made, running.submit(made), LIMIT)
    models = experiments.load_models(tmp_path / "dual_kd" / "model.safetensors")
    expected = simulated("dual_kd", folders)
    assert all(equal(models[name], expected.models[name]) for name in NAMES)

    report = report_of(made)
    for name in NAMES:  # both sides counted the same, and the teacher went out once
        seen = traffic(running, name)
        for kind in (HELLO, SEND_TEACHER, TRAIN):
            lines = [line for line in seen if line["message"] == kind]
            assert sum(int(line["bytes_received"]) for line in lines) == report.bytes("down", kind, name)
            assert sum(int(line["bytes_sent"]) for line in lines) == report.bytes("up", kind, name)
            assert len(lines) == {HELLO: 1, SEND_TEACHER: 1, TRAIN: 2}[kind]
        assert (
            report.bytes("up", SEND_TEACHER, name)
            < 1000
            < networks.nbytes(STATE)
            < report.bytes("down", SEND_TEACHER, name)
        )

    log = (running.folder / "logs" / "stranger.log").read_text()
    assert running.processes["stranger"].poll() == 1 and "Failed to activate SuperNode" in log
    assert not (running.folder / "nodes" / "stranger").exists()
    running.stop("stranger")


def test_a_server_that_was_killed_goes_on_after_its_last_round(
    running: Federation, folders: dict[str, Path], tmp_path: Path
) -> None:
    made = order(tmp_path, "fedavg")
    running.submit(made)
    wait_for(lambda: report_of(made).happened("averaged"))
    superlink = psutil.Process(running.processes["superlink"].pid)
    for process in [*superlink.children(recursive=True), superlink]:
        process.kill()
    running.stop("superlink")
    assert len(report_of(made).happened("averaged")) == 1
    running.start_superlink()
    running.wait(made, running.submit(made), LIMIT)
    models = experiments.load_models(tmp_path / "fedavg" / "model.safetensors")
    expected = simulated("fedavg", folders)
    assert all(equal(models[name], expected.models[name]) for name in NAMES)
    assert report_of(made).happened("resumed") == [(1, "", "after round 1")]
    assert [number for number, _, _ in report_of(made).happened("averaged")] == [1, 2]


def test_the_run_goes_on_without_those_who_fail_and_says_why(running: Federation, tmp_path: Path) -> None:
    faults = {
        "north": {"1": "nan", "2": "wrong_shape", "3": "silent"},
        "south": {"1": "slow", "2": "other_model", "3": "silent"},
    }
    for name, what in faults.items():
        (running.folder / "nodes" / name / "faults.json").write_text(json.dumps(what))
    made = order(tmp_path, "fedavg", 3, least=1, patience_s=60.0)
    number = running.submit(made)
    asked = running.folder / "nodes" / "north" / "asked"
    wait_for(asked.exists)  # north is at work on round 3, and dies
    node = psutil.Process(running.processes["north"].pid)
    for process in [*node.children(recursive=True), node]:
        process.kill()
    running.wait(made, number, LIMIT)
    report = report_of(made)
    assert [who for _, _, who in report.happened("averaged")] == ["east, south", "east", "east"]
    (first, second, third) = report.happened("rejected")
    assert first[:2] == (1, "north") and "holds NaN" in first[2]
    assert second[:2] == (2, "north") and "has shape" in second[2]
    assert third[:2] == (2, "south") and "belongs to another architecture" in third[2]
    late = {(number, client): why for number, client, why in report.happened("no update")}
    assert late.keys() == {(3, "north"), (3, "south")} and all("no answer" in why for why in late.values())
    assert report.happened("finished")


def test_a_key_that_was_revoked_is_refused(running: Federation, folders: dict[str, Path]) -> None:
    before = nodes(running)
    running.register("guest")
    (number,) = nodes(running) - before
    running.flwr("supernode", "unregister", number, hospitals.SUPERLINK)
    running.start_node("guest", folders["east"])
    wait_for(lambda: running.processes["guest"].poll() is not None, 60)
    assert running.processes["guest"].poll() == 1
    assert "Failed to activate SuperNode" in (running.folder / "logs" / "guest.log").read_text()
    running.stop("guest")


def nodes(running: Federation) -> set[str]:
    said = running.flwr("supernode", "list", hospitals.SUPERLINK, "--format", "json")
    return {node["node-id"] for node in json.loads(said[said.index("{") :])["nodes"]}


def test_secrets_are_for_the_owner_only_and_in_no_log(running: Federation) -> None:
    for path in running.secrets.iterdir():
        assert path.stat().st_mode & 0o077 == 0
    secret = [line for p in running.secrets.glob("*.key") for line in p.read_text().splitlines() if "-" not in line]
    for log in (running.folder / "logs").iterdir():
        assert not any(line in log.read_text() for line in secret)
    for path in running.folder.rglob("pyproject.toml"):
        assert "PRIVATE" not in path.read_text()


def test_everything_listens_on_loopback_only(running: Federation) -> None:
    pids = {p.pid for one in running.processes.values() if one.poll() is None for p in _family(one.pid)}
    listening = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.pid in pids]
    assert listening and {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1"}


def test_who_speaks_no_tls_or_trusts_another_authority_gets_no_answer(running: Federation, tmp_path: Path) -> None:
    plain = http.client.HTTPConnection(hospitals.HOST, running.port, timeout=10)
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.request("GET", "/")
        plain.getresponse()
    hospital_keys.write_certificates(tmp_path, hospitals.HOST)
    trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with pytest.raises(ssl.SSLCertVerificationError):
        http.client.HTTPSConnection(hospitals.HOST, running.port, context=trusting, timeout=10).request("GET", "/")


def _family(pid: int) -> list[psutil.Process]:
    one = psutil.Process(pid)
    return [one, *one.children(recursive=True)]


def test_a_polite_kill_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), hospitals.federation(tmp_path) as made:
        made.start("sleeper", ["sh", "-c", "sleep 300 & sleep 300"])
        wait_for(lambda: len(_family(made.processes["sleeper"].pid)) >= 2, 20)
        family = _family(made.processes["sleeper"].pid)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


def test_a_command_of_the_engine_that_fails_says_why(running: Federation) -> None:
    with pytest.raises(FederationError, match="flwr supernode failed"):
        running.flwr("supernode", "register", str(running.secrets / "ca.pem"), hospitals.SUPERLINK)
