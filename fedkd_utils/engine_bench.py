"""What the engine costs, and what its protection costs: ``python -m fedkd_utils bench engine``.

One job, four ways: a bare loop over rounds and clients, the simulation of the course, Flower in one process, Flower on
real processes with TLS and node keys. Then FedAvg on a coarser grid with clipping, noise and masks, in one process.
"""

from __future__ import annotations

import json
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from fedkd_utils import cohorts, experiments, federation, hospitals, networks, teacher, transforms
from fedkd_utils.bench_growth import bare_loop
from fedkd_utils.disclosure import epsilon
from fedkd_utils.engine_connections import Order
from fedkd_utils.engine_lesson import lesson
from fedkd_utils.engine_local import local_grid
from fedkd_utils.engine_messages import Job
from fedkd_utils.engine_orders import write_order
from fedkd_utils.engine_recorded import FILE, LESSON
from fedkd_utils.engine_report import Report
from fedkd_utils.engine_server import federate
from fedkd_utils.files import rounded, write_atomically
from fedkd_utils.networks import State, TappedNetwork, largest_difference
from fedkd_utils.provenance import NUMBERS, state_hash, versions
from fedkd_utils.records import machine
from fedkd_utils.settings import QUICK, Settings
from fedkd_utils.transforms import SiteData

COMMAND = "python -m fedkd_utils bench engine"
ROW, ROUNDS, CLIENTS = "dual_kd", 3, 3

#: What runs under protection: the federation of notebook 08.
PROTECTED = replace(LESSON, rounds=6, steps_per_epoch=10)

#: The slack of the promise of privacy: far below one over three clients.
DELTA = 1e-3

#: The clipping norm: most changes are shorter, those of the first round are not.
CLIP_NORM = 20.0

#: Clipping norm, noise multiplier and masks of the protected runs.
PROTECTIONS: dict[str, tuple[float | None, float | None, bool]] = {
    "none": (None, None, False),
    "masks (SecAgg+)": (None, None, True),
    "clipped": (CLIP_NORM, None, False),
    "clipped, masks": (CLIP_NORM, None, True),
    "clipped, noise 0.01": (CLIP_NORM, 0.01, False),
    "clipped, noise 0.1": (CLIP_NORM, 0.1, False),
    "clipped, noise 1": (CLIP_NORM, 1.0, False),
}


@dataclass(frozen=True)
class Case:
    """What every way runs."""

    settings: Settings
    folders: dict[str, Path]
    sites: Sequence[SiteData]
    taught: TappedNetwork

    @property
    def state(self) -> State:
        """The teacher's weights."""
        return networks.copy_state(self.taught)

    def order(self, folder: Path) -> Order:
        """The job as an order."""
        job = Job(ROW, self.settings, 0, state_hash(self.state))
        return Order(job, tuple(self.folders), folder, least=CLIENTS, patience_s=1800.0)


def case(settings: Settings) -> Case:
    """The first clients of the made cohort whose scanners differ, and the teacher of the course."""
    folders, sites = _hospitals(settings)
    taught = teacher.teacher_on(cohorts.make_repository(settings, settings.teacher_contrast), settings)
    return Case(settings, folders, sites, taught.network)


def _hospitals(settings: Settings) -> tuple[dict[str, Path], list[SiteData]]:
    clients = cohorts.make_cohort(settings, "heterogeneous").clients[:CLIENTS]
    return {site.name: site.folder for site in clients}, [transforms.load_site(site, settings) for site in clients]


def _processes(case: Case, folder: Path) -> tuple[Report, float]:
    """The report of a run on real processes, and the CPU seconds of all of them."""
    order = case.order(folder / "run")
    path = write_order(folder / "order.json", order, case.state)
    with hospitals.federation(folder / "federation") as made, _watched(made) as spent:
        made.start_superlink()
        for name, data in case.folders.items():
            made.register(name)
            made.start_node(name, data)
        made.wait(path, made.submit(path), 3600.0)
    facts = json.loads((order.folder / "report.json").read_bytes())
    return Report(**facts), sum(spent.values())


@contextmanager
def _watched(made: hospitals.Federation) -> Iterator[dict[tuple[int, float], float]]:
    """CPU seconds by process of a federation; looked at five times a second, for a process that ended tells no more."""
    spent: dict[tuple[int, float], float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            for process in list(made.processes.values()):
                with suppress(psutil.Error):
                    one = psutil.Process(process.pid)
                    for child in (one, *one.children(recursive=True)):
                        with suppress(psutil.Error):
                            times = child.cpu_times()
                            spent[child.pid, child.create_time()] = times.user + times.system

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield spent
    finally:
        done.set()
        thread.join()


def overhead(case: Case, folder: Path, note: Callable[[str], None]) -> tuple[list[dict[str, Any]], Report]:
    """CPU and wall seconds and bytes of the same job, four ways; and the report of the real processes."""
    lines: list[dict[str, Any]] = []

    def measure(way: str, work: Callable[[], Any]) -> Any:
        note(way)
        wall, cpu = time.perf_counter(), _cpu()
        out = work()
        lines.append({"way": way, "cpu_seconds": _cpu() - cpu, "wall_seconds": time.perf_counter() - wall})
        return out

    last = measure("bare loop", lambda: bare_loop(case.settings, case.sites, 0, True, ROW, case.taught))
    simulated = measure(
        "simulation",
        lambda: federation.run_federation(case.settings, ROW, case.sites, case.taught, 0, folder / "sim", workers=1),
    )
    local, report = measure(
        "Flower in one process",
        lambda: federate(local_grid(case.sites, folder / "nodes"), case.order(folder / "local"), case.state),
    )
    real, spent = measure("Flower on real processes", lambda: _processes(case, folder / "real"))
    lines[-1]["cpu_seconds"] = spent
    models = experiments.load_models(folder / "real" / "run" / "model.safetensors")
    name = case.sites[0].name
    apart = [largest_difference(last, _last(folder / "sim")), 0.0]
    apart += [largest_difference(model, simulated.models[name]) for model in (local.models[name], models[name])]
    sent = [(0, 0), (simulated.ledger.total("down"), simulated.ledger.total("up"))]
    sent += [(r.bytes("down"), r.bytes("up")) for r in (report, real)]
    for line, largest, (down, up) in zip(lines, apart, sent, strict=True):
        line |= {"ratio": line["cpu_seconds"] / lines[0]["cpu_seconds"], "bytes_down": down, "bytes_up": up}
        line["largest_difference_of_a_weight"] = largest
    return lines, real


def _last(folder: Path) -> State:
    tensors, facts = networks.load_checkpoint(folder / "round.safetensors")
    place = f"student/{facts['owners']['student'].index('')}/"
    return {name.removeprefix(place): t for name, t in tensors.items() if name.startswith(place)}


def protection(folder: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds, bytes, validation Dice and epsilon of FedAvg under each protection, in one process."""
    lines: list[dict[str, Any]] = []
    folders, sites = _hospitals(PROTECTED)
    plain: State = {}
    for number, (title, (clip_norm, noise, secure)) in enumerate(PROTECTIONS.items()):
        note(title)
        settings = replace(PROTECTED, clip_norm=clip_norm, noise_multiplier=noise)
        wall, cpu = time.perf_counter(), _cpu()
        place = folder / f"protection {number}"
        order = Order(Job("fedavg", settings, 0, secure=secure), tuple(folders), place / "server", least=CLIENTS)
        result, report = federate(local_grid(sites, place), order)
        model = result.models[sites[0].name]
        plain = plain or model
        lines.append(
            {
                "protection": title,
                "cpu_seconds": _cpu() - cpu,
                "wall_seconds": time.perf_counter() - wall,
                "messages": len(report.traffic),
                "bytes_down": report.bytes("down"),
                "bytes_up": report.bytes("up"),
                "validation_dice": [float(value) for value in result.validation_by_round()],
                "epsilon": epsilon(noise, settings.rounds, DELTA) if noise else None,
                "largest_difference_of_a_weight": largest_difference(model, plain),
            }
        )
    return lines


def _cpu() -> float:
    """CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(settings: Settings, note: Callable[[str], None]) -> dict[str, Any]:
    """All of it, with provenance."""
    made = case(settings)
    with tempfile.TemporaryDirectory() as folder:
        lines, report = overhead(made, Path(folder), note)
        return {
            "command": COMMAND,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": versions() | {"flwr": _flower()},
            "machine": machine(1),
            "numbers": NUMBERS,
            "row": ROW,
            "settings": asdict(settings),
            "clients": {site.name: site.examples for site in made.sites},
            "protected": {"row": "fedavg", "settings": asdict(PROTECTED)},
            "delta": DELTA,
            "weights": networks.nbytes(made.state),
            "overhead": lines,
            "protection": protection(Path(folder), note),
            "events": report.events,
            "traffic": report.traffic,
            "lesson": _lesson(note),
        }


def _lesson(note: Callable[[str], None]) -> dict[str, Any]:
    """The two runs of notebook 11."""
    note("the federation of notebook 11")
    _, sites = _hospitals(LESSON)
    return lesson(LESSON, ROW, sites, teacher.freeze(networks.build_network(LESSON, 99)))


def _flower() -> str:
    from importlib import metadata

    return metadata.version("flwr")


def report() -> None:
    """Measure, keep it in ``data/results/engine``, and print it."""
    facts = rounded(measure(replace(QUICK, rounds=ROUNDS), lambda text: print(f"... {text}", flush=True)))
    write_atomically(FILE, json.dumps(facts, indent=1).encode() + b"\n")
    print(table(facts))


def table(facts: dict[str, Any]) -> str:
    """The file for a terminal."""
    lines = [f"{'':26s} CPU s   ratio  wall s    bytes down      bytes up  largest difference"]
    lines += [
        f"{line['way']:26s} {line['cpu_seconds']:5.0f} {line['ratio']:7.2f} {line['wall_seconds']:7.0f} "
        f"{line['bytes_down']:13,d} {line['bytes_up']:13,d}  {line['largest_difference_of_a_weight']:.1g}"
        for line in facts["overhead"]
    ]
    lines.append(f"\n{'':26s} CPU s  bytes down    bytes up  best Dice  epsilon  largest difference")
    lines += [
        f"{line['protection']:26s} {line['cpu_seconds']:5.0f} {line['bytes_down']:11,d} {line['bytes_up']:11,d} "
        f"{max(line['validation_dice']):10.3f} {line['epsilon'] or float('inf'):8.3g}  "
        f"{line['largest_difference_of_a_weight']:.1g}"
        for line in facts["protection"]
    ]
    return "\n".join(lines)
