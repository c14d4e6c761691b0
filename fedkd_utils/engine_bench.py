"""What the engine costs, and what its protection costs.

One job, four ways: a bare loop over rounds and clients, the simulation of the course, Flower in one process, Flower on
real processes with TLS and node keys. ``make bench`` repeats them in turn (its part "flower").
``python -m fedkd_utils bench engine`` runs each once, records every message for notebook 11, and then FedAvg on a
coarser grid with clipping, noise and masks, in one process.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedkd_utils import cohorts, federation, hospitals, networks, teacher, transforms
from fedkd_utils.bench_growth import LOOP, bare_loop
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
from fedkd_utils.timing import Effort, Line, in_turn, line, ratios
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


def _ways(case: Case) -> dict[str, Callable[[Path], tuple[State, tuple[int, int]]]]:
    """The ways in one process. Each takes a new folder and gives the last average and the bytes down and up."""

    def bare(folder: Path) -> tuple[State, tuple[int, int]]:
        return bare_loop(case.settings, case.sites, 0, True, ROW, case.taught), (0, 0)

    def simulated(folder: Path) -> tuple[State, tuple[int, int]]:
        result = federation.run_federation(case.settings, ROW, case.sites, case.taught, 0, folder, workers=1)
        return _last(folder), (result.ledger.total("down"), result.ledger.total("up"))

    def flower(folder: Path) -> tuple[State, tuple[int, int]]:
        _, report = federate(local_grid(case.sites, folder / "nodes"), case.order(folder / "server"), case.state)
        return _last(folder / "server"), (report.bytes("down"), report.bytes("up"))

    return {"bare loop": bare, "simulation": simulated, "Flower in one process": flower}


REAL = "Flower on real processes"


def flower(effort: Effort) -> list[Line]:
    """One round of the job four ways, for ``make bench``; its teacher is not trained, which costs a step the same."""
    settings = replace(LESSON if effort.quick else QUICK, rounds=1)
    folders, sites = _hospitals(settings)
    made = Case(settings, folders, sites, teacher.freeze(networks.build_network(settings, 99)))
    job, last = f"a round of {CLIENTS} clients ({ROW}): ", {}
    with tempfile.TemporaryDirectory() as folder:

        def once(way: str, run: Callable[[Path], tuple[State, tuple[int, int]]]) -> None:
            last[way], _ = run(Path(tempfile.mkdtemp(dir=folder)))

        cases = {way: partial(once, way, run) for way, run in _ways(made).items()}
        seconds = in_turn(cases, min(effort.repeats, 3), time.process_time)
        place, wall = Path(folder) / "real", time.perf_counter()
        _, spent = _processes(made, place)
        wall = time.perf_counter() - wall
        last[REAL] = _last(place / "run")
    bare = seconds["bare loop"]
    lines = [line(job + way, "CPU s", own) for way, own in seconds.items()]
    for way, target in (("simulation", LOOP), ("Flower in one process", None)):
        lines.append(line(f"{way} / bare loop", "ratio", ratios(seconds[way], bare), at_most=target))
    lines.append(line(job + REAL, "CPU s", [spent]))
    lines.append(line(job + REAL, "s", [wall]))
    lines.append(line(f"{REAL} / bare loop", "ratio", [spent / float(np.median(bare))]))
    first, *others = last.values()
    apart = float(np.max([largest_difference(first, state) for state in others]))  # NaN stays
    return [*lines, line("weights after the last round, largest difference", "", [apart], at_most=0.0)]


def overhead(case: Case, folder: Path, note: Callable[[str], None]) -> tuple[list[dict[str, Any]], Report]:
    """CPU and wall seconds and bytes of the same job, four ways; and the report of the real processes."""
    lines: list[dict[str, Any]] = []
    last: list[State] = []
    for number, (way, run) in enumerate(_ways(case).items()):
        note(way)
        wall, cpu = time.perf_counter(), time.process_time()
        state, (down, up) = run(folder / str(number))
        lines.append({"way": way, "cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall})
        lines[-1] |= {"bytes_down": down, "bytes_up": up}
        last.append(state)
    note(REAL)
    wall = time.perf_counter()
    report, spent = _processes(case, folder / "real")
    lines.append({"way": REAL, "cpu_seconds": spent, "wall_seconds": time.perf_counter() - wall})
    lines[-1] |= {"bytes_down": report.bytes("down"), "bytes_up": report.bytes("up")}
    last.append(_last(folder / "real" / "run"))
    for one, state in zip(lines, last, strict=True):
        one["ratio"] = one["cpu_seconds"] / lines[0]["cpu_seconds"]
        one["largest_difference_of_a_weight"] = largest_difference(last[0], state)
    return lines, report


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
        wall, cpu = time.perf_counter(), time.process_time()
        place = folder / f"protection {number}"
        order = Order(Job("fedavg", settings, 0, secure=secure), tuple(folders), place / "server", least=CLIENTS)
        result, report = federate(local_grid(sites, place), order)
        model = result.models[sites[0].name]
        plain = plain or model
        lines.append(
            {
                "protection": title,
                "cpu_seconds": time.process_time() - cpu,
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


def measure(settings: Settings, note: Callable[[str], None]) -> dict[str, Any]:
    """All of it, with provenance."""
    made = case(settings)
    with tempfile.TemporaryDirectory() as folder:
        lines, report = overhead(made, Path(folder), note)
        return {
            "command": COMMAND,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": versions() | {"flwr": metadata.version("flwr")},
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
