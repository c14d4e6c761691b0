"""A federation of real processes on this machine: certificates, keys, a SuperLink, a SuperNode for each hospital.

Everything listens on 127.0.0.1 only. Keys and certificates lie in a folder that the caller names and no repository
holds; none is printed. Flower's telemetry, update check and installation at run time are off.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedkd_utils import cohorts, networks, teacher
from fedkd_utils.clients import FederationError
from fedkd_utils.engine_connections import Order
from fedkd_utils.engine_messages import Job, our_code
from fedkd_utils.engine_orders import write_order
from fedkd_utils.engine_report import Report
from fedkd_utils.hospital_keys import write_certificates, write_node_key
from fedkd_utils.methods import row_named
from fedkd_utils.networks import State
from fedkd_utils.provenance import state_hash
from fedkd_utils.settings import PROJECT, Settings

HOST = "127.0.0.1"

_JSON = ("--format", "json")

#: Named in Flower's configuration.
SUPERLINK = "hospitals"

#: What the processes of the engine must not do, and the threads that the course's digits are made with.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "OMP_WAIT_POLICY": "PASSIVE",
}

_APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedkd-hospitals"
version = "1.0.0"
description = "Dual distillation over hospitals"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41.0,<1.42"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedkd"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "fedkd_utils.engine_orders:app"
clientapp = "{clientapp}"

[tool.flwr.app.config]
order = ""
"""


def write_app(folder: Path, clientapp: str = "fedkd_utils.engine_client:app") -> Path:
    """The folder that ``flwr run`` submits: it names the apps of the installed package and holds no code.

    Args:
        clientapp: another one is for tests.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(_APP.format(clientapp=clientapp))
    (folder / "README.md").write_text("The apps are in the package fedkd_utils, which is installed on every node.\n")
    shutil.copy(PROJECT / "LICENSE", folder / "LICENSE")
    return folder


def free_port() -> int:
    """A port of the loopback device that nobody uses now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


@dataclass
class Federation:
    """A SuperLink and its SuperNodes, as processes of this machine; :func:`federation` stops them all."""

    folder: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    clientapp: str = "fedkd_utils.engine_client:app"

    @property
    def secrets(self) -> Path:
        """Keys and certificates; readable for the owner only."""
        return self.folder / "secrets"

    def environment(self) -> dict[str, str]:
        """Of every process; the programs of this Python come first."""
        own = str(Path(sys.executable).parent)
        path = os.pathsep.join([own, os.environ.get("PATH", "")])
        return {**os.environ, **QUIET, "PATH": path, "FLWR_HOME": str(self.folder / "flwr")}

    def start(self, name: str, words: Sequence[str], more: Mapping[str, str] | None = None) -> None:
        """Start a process in a session of its own; what it says goes to ``<folder>/logs/<name>.log``."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.processes[name] = subprocess.Popen(
                words,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**self.environment(), **(more or {})},
                cwd=self.folder,
                start_new_session=True,
            )

    def stop(self, name: str, patience_s: float = 10.0) -> None:
        """End a process with all that it started: first politely, then by force."""
        process = self.processes.pop(name, None)
        if process is None:
            return
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            pass
        for one in family:  # apps at work, and whatever did not end
            try:
                one.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(family, timeout=patience_s)
        process.wait()

    def stop_all(self) -> None:
        """The SuperNodes first, then the SuperLink."""
        for name in sorted(self.processes, key=lambda name: name == "superlink"):
            self.stop(name)

    def start_superlink(self, patience_s: float = 60.0) -> None:
        """Start the SuperLink and wait until it answers; it knows the nodes that were registered before.

        Raises:
            FederationError: it does not answer in time; names its log.
        """
        if not (self.secrets / "server.pem").exists():
            write_certificates(self.secrets, HOST)
        home = self.folder / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{SUPERLINK}"\n\n[superlink.{SUPERLINK}]\naddress = "{HOST}:{self.port}"\n'
            f'root-certificates = "{self.secrets / "ca.pem"}"\n'
        )
        words = ["flower-superlink", "--host", HOST, "--port", str(self.port), "--enable-supernode-auth"]
        words += ["--ssl-ca-certfile", str(self.secrets / "ca.pem"), "--ssl-certfile", str(self.secrets / "server.pem")]
        words += ["--ssl-keyfile", str(self.secrets / "server.key"), "--disable-runtime-dependency-installation"]
        words += ["--database", str(self.folder / "superlink.db")]
        self.start("superlink", words)
        end = time.monotonic() + patience_s
        while time.monotonic() < end and self.processes["superlink"].poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, self.port)) == 0:
                    return
            time.sleep(0.2)
        raise FederationError(f"The SuperLink does not answer: see {self.folder / 'logs' / 'superlink.log'}.")

    def register(self, name: str) -> None:
        """Make a key for a hospital and let the SuperLink know its public half."""
        public = write_node_key(self.secrets, name)
        self.flwr("supernode", "register", str(public), SUPERLINK)

    def start_node(self, name: str, data: Path, more: Mapping[str, str] | None = None, key: str | None = None) -> None:
        """Start the SuperNode of a hospital.

        Args:
            data: its site in the Decathlon layout; the name of the folder is the name of the client.
            more: variables of its environment.
            key: whose key it shows, its own when not given.
        """
        config = {"data": str(data.resolve()), "state": str((self.folder / "nodes" / name).resolve())}
        words = ["flower-supernode", "--root-certificates", str(self.secrets / "ca.pem")]
        words += ["--superlink", f"{HOST}:{self.port}", "--host", HOST, "--port", str(free_port())]
        words += ["--auth-supernode-private-key", str(self.secrets / f"{key or name}.key")]
        words += ["--node-config", " ".join(f"{word}={json.dumps(value)}" for word, value in config.items())]
        self.start(name, words, more)

    def flwr(self, *words: str) -> str:
        """Run Flower's command line against this SuperLink; what it printed.

        Raises:
            FederationError: it failed; with what it said.
        """
        done = subprocess.run(
            ["flwr", *words], env=self.environment(), capture_output=True, text=True, cwd=self.folder, timeout=120
        )
        said = done.stdout + done.stderr
        if done.returncode != 0 or '"success": false' in said:
            raise FederationError(f"flwr {words[0]} failed: {' '.join(said.split())[-500:]}")
        return done.stdout

    def submit(self, order: Path) -> int:
        """Start an order (:func:`engine_orders.write_order`); the number of the run."""
        app = write_app(self.folder / "app", self.clientapp)
        folder = Path(json.loads(order.read_bytes())["folder"])
        (folder / "outcome.json").unlink(missing_ok=True)
        said = self.flwr("run", str(app), SUPERLINK, "--run-config", f"order={json.dumps(str(order))}", *_JSON)
        return int(json.loads(said[said.index("{") :])["run-id"])

    def wait(self, order: Path, run: int, patience_s: float) -> dict[str, Any]:
        """Wait for the outcome of an order that was submitted as a run.

        Raises:
            FederationError: the run ended with an error, or not in time.
        """
        path = Path(json.loads(order.read_bytes())["folder"]) / "outcome.json"
        end, look = time.monotonic() + patience_s, time.monotonic() + 60
        while time.monotonic() < end:
            if path.exists():
                outcome: dict[str, Any] = json.loads(path.read_bytes())
                if outcome["error"]:
                    raise FederationError(outcome["error"])
                return outcome
            if time.monotonic() > look:  # an app that died writes no outcome
                look = time.monotonic() + 60
                said = self.flwr("list", SUPERLINK, "--run-id", str(run), *_JSON)
                if "finished:failed" in said and not path.exists():
                    raise FederationError(f"The server's app failed: see {self.folder / 'logs' / 'superlink.log'}.")
            time.sleep(0.3)
        raise FederationError(f"No outcome within {patience_s:g} s: see the logs in {self.folder / 'logs'}.")


@contextmanager
def federation(folder: Path, clientapp: str = "fedkd_utils.engine_client:app") -> Iterator[Federation]:
    """A federation whose processes are gone when the block ends, also by Ctrl-C or a polite kill."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    made = Federation(folder, clientapp=clientapp)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield made
    finally:
        signal.signal(signal.SIGTERM, before)
        ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of them
        try:
            made.stop_all()
        finally:
            signal.signal(signal.SIGINT, ignored)


def three_hospitals(row: str, settings: Settings, seed: int, folder: Path) -> str:
    """Run a row over the first three clients of a made cohort, each a SuperNode of its own, and say what happened.

    The run stays in ``folder``: the same call goes on with a run that was stopped. Keys and certificates are made for
    one sitting and are deleted after it.

    Raises:
        ValueError, FederationError: see :func:`engine_server.federate`.
    """
    cohort = cohorts.make_cohort(settings, "heterogeneous", seed)
    folders = {site.name: site.folder for site in cohort.clients[:3]}
    method = row_named(row)
    state: State | None = None
    if method.needs_teacher:
        print(f"teacher: trained on first use ({settings.teacher_steps} steps), then read from the cache", flush=True)
        own = method.adapt(settings)
        scanner = cohorts.teacher_scanner(own, "heterogeneous")
        taught = teacher.teacher_on(cohorts.make_repository(own, scanner), own, seed)
        state = networks.copy_state(taught.network)
    job = Job(row, settings, seed, state_hash(state) if state is not None else "")
    order = Order(job, tuple(folders), folder / f"run-{job.mark}", least=2, patience_s=900.0)
    path = write_order(folder / f"order-{job.mark}.json", order, state)
    try:
        with federation(folder) as made:
            made.start_superlink()
            for name, data in folders.items():
                made.register(name)
                made.start_node(name, data)
            print(f"SuperLink and {len(folders)} SuperNodes run on {HOST}; logs: {folder / 'logs'}", flush=True)
            made.wait(path, made.submit(path), 24 * 3600.0)
    finally:
        for name in ("secrets", "flwr", "app"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for file in folder.glob("superlink.db*"):
            file.unlink()
    noted = order.folder / "report.json"
    return f"{Report.read(noted, f'{job.mark} {our_code()}').text()}\nmodel: {order.folder / 'model.safetensors'}"
