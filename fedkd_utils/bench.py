"""The benchmark: everything side by side in one run, a table and a file: ``python -m fedkd_utils bench``."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedkd_utils import (
    bench_gpu,
    bench_growth,
    bench_learning,
    bench_steps,
    bench_viewer,
    bench_volumes,
    engine_recorded,
    records,
)
from fedkd_utils.device import compute_device, device_title
from fedkd_utils.files import rounded, write_atomically
from fedkd_utils.provenance import versions
from fedkd_utils.settings import PROJECT, entry_named
from fedkd_utils.timing import FULL, Effort, Line

#: Where a whole run leaves its numbers.
FILE = PROJECT / "data" / "results" / "bench" / "bench.json"


@dataclass(frozen=True)
class Part:
    """Some measurements that are made in one go."""

    measure: Callable[[Effort], list[Line]]
    on_request: bool = False  # it needs what is not everywhere: a GPU, a browser
    engine: bool = False  # it needs the engine, an extra


def _flower(effort: Effort) -> list[Line]:
    from fedkd_utils import engine_bench

    return engine_bench.flower(effort)


#: The parts, in the order of a run.
PARTS: dict[str, Part] = {
    "steps": Part(bench_steps.steps),
    "profile": Part(bench_steps.profile),
    "networks": Part(bench_learning.networks),
    "simulation": Part(bench_growth.simulation),
    "flower": Part(_flower, engine=True),
    "growth": Part(bench_growth.growth),
    "reach": Part(bench_learning.reach),
    "phantom": Part(bench_volumes.phantom),
    "inference": Part(bench_volumes.inference),
    "viewer": Part(bench_viewer.viewer, on_request=True),
    "gpu": Part(bench_gpu.gpu, on_request=True),
}


def chosen_parts(names: Sequence[str], parts: Mapping[str, Part] = PARTS) -> list[str]:
    """The parts of these names in the order of a run; without any name those that are not on request.

    Raises:
        ValueError: there is none of a name; names those that there are.
    """
    for name in names:
        entry_named(parts, name, "part of the benchmark")
    return [name for name, part in parts.items() if (name in names if names else not part.on_request)]


def run(
    names: Sequence[str] = (),
    effort: Effort = FULL,
    command: str = "python -m fedkd_utils bench",
    parts: Mapping[str, Part] = PARTS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure, print each part's table as soon as it is there, and return everything with its provenance.

    Computes on the CPU with one thread, whatever else the process uses; the part "gpu" does as it says.

    Raises:
        ValueError: an unknown part; nothing is measured.
        RuntimeError: a part is asked for by name that needs the engine, which is not installed; nothing is measured.
    """
    chosen = chosen_parts(names, parts)
    engine = [name for name in chosen if parts[name].engine]
    if engine and names:
        engine_recorded.need_engine()
    if engine and not engine_recorded.installed():
        say(f"left out: {', '.join(engine)}, for {engine_recorded.MISSING}\nThe run is kept only with --out.")
        chosen, engine = [name for name in chosen if name not in engine], []
    threads, named = torch.get_num_threads(), os.environ.get("FEDKD_DEVICE")
    torch.set_num_threads(1)
    os.environ["FEDKD_DEVICE"] = "cpu"
    facts: dict[str, Any] = {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "effort": dataclasses.asdict(effort),
        "versions": versions() | ({"flwr": metadata.version("flwr")} if engine else {}),
        "machine": records.machine(None) | {"device": device_title(compute_device())},
        "load": _load(),
        **({"gpu": device_title(torch.device("cuda"))} if "gpu" in chosen and torch.cuda.is_available() else {}),
        "parts": {},
    }
    try:
        for name in chosen:
            start = time.perf_counter()
            lines = parts[name].measure(effort)
            seconds = time.perf_counter() - start
            say(f"\n{table(name, lines)}\n({seconds:.0f} s)")
            facts["parts"][name] = {"seconds": seconds, "lines": [_packed(one) for one in lines]}
    finally:
        torch.set_num_threads(threads)
        if named is None:
            del os.environ["FEDKD_DEVICE"]
        else:
            os.environ["FEDKD_DEVICE"] = named
    return facts


def _load() -> float | None:
    """Processes that wanted a core in the last minute when the run began: above 0 others were at work."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def is_whole(facts: Mapping[str, Any], parts: Mapping[str, Part] = PARTS) -> bool:
    """Whether a run had every part that is not on request, and was not a quick one."""
    return not facts["effort"]["quick"] and set(chosen_parts((), parts)) <= set(facts["parts"])


def table(title: str, lines: Sequence[Line]) -> str:
    """Lines as text: the median, between which values 9 of 10 repeats lie, and the target."""
    width = max([len(one.what) for one in lines] + [len(title)])
    rows = [f"{title:{width}s} {'median':>9s} {'5 %':>9s} {'95 %':>9s}"]
    for one in lines:
        spread = [_number(one.low), _number(one.high)] if one.repeats > 1 else ["", ""]
        numbers = " ".join(f"{text:>9s}" for text in (_number(one.median), *spread))
        rows.append(f"{one.what:{width}s} {numbers}  {one.unit}{_target(one)}".rstrip())
    return "\n".join(rows)


def _number(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.4g}"


def _target(one: Line) -> str:
    words = [("at most", one.at_most), ("at least", one.at_least)]
    verdict = "met" if one.met else "missed"
    return "".join(f"  ({word} {value:g}: {verdict})" for word, value in words if value is not None)


def _packed(one: Line) -> dict[str, Any]:
    facts = dataclasses.asdict(one) | {"met": one.met}
    kept = {name: rounded(value) for name, value in facts.items() if value is not None}
    return kept


def write(facts: Mapping[str, Any], path: Path = FILE) -> Path:
    """Write a run, completely or not at all, one line of text per measured quantity."""
    head = {name: value for name, value in facts.items() if name != "parts"}
    lines = [f" {json.dumps(name)}: {json.dumps(rounded(value), allow_nan=False)}" for name, value in head.items()]
    parts = []
    for name, part in facts["parts"].items():
        own = ",\n".join(f"   {json.dumps(one, allow_nan=False)}" for one in part["lines"])
        parts.append(f'  {json.dumps(name)}: {{"seconds": {part["seconds"]:.0f}, "lines": [\n{own}\n  ]}}')
    lines.append(' "parts": {\n' + ",\n".join(parts) + "\n }")
    return write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def medians(facts: Mapping[str, Any]) -> dict[str, float | None]:
    """The median of every line of a file, by "part: what, unit"; None where it is infinite."""
    return {
        f"{name}: {one['what']}, {one['unit']}": one["median"]
        for name, part in facts["parts"].items()
        for one in part["lines"]
    }
