"""What a measurement is: repeats in turn, medians, ratios of pairs with their spread, a line with its target."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: Seconds since some moment; ``time.thread_time`` counts this thread's own work only, whatever else the machine does.
Clock = Callable[[], float]


@dataclass(frozen=True)
class Effort:
    """How much work a benchmark may do."""

    repeats: int  # of all that is compared
    training: float  # CPU seconds in which each network is trained
    quick: bool  # the smallest sizes only: does it run at all?


#: Of ``make bench``, and of ``--quick``.
FULL, QUICK = Effort(7, 20.0, False), Effort(2, 0.5, True)


@dataclass(frozen=True)
class Line:
    """One measured quantity: the median over repeats, and between which values 9 of 10 of them lie."""

    what: str
    unit: str
    median: float  # infinite: never
    low: float  # 5th percentile
    high: float  # 95th percentile
    repeats: int  # of results: seeds
    at_most: float | None = None  # the target
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if self.at_most is None and self.at_least is None:
            return None
        return self.median <= (math.inf if self.at_most is None else self.at_most) and self.median >= (
            -math.inf if self.at_least is None else self.at_least
        )


def line(
    what: str, unit: str, samples: Sequence[float], at_most: float | None = None, at_least: float | None = None
) -> Line:
    """The line of some repeats.

    Raises:
        ValueError: no repeat.
    """
    if len(samples) == 0:
        raise ValueError(f"{what}: nothing was measured; at least one repeat is needed.")
    low, median, high = np.percentile(samples, [5, 50, 95])
    return Line(what, unit, float(median), float(low), float(high), len(samples), at_most, at_least)


def in_turn(
    cases: Mapping[str, Callable[[], object]], repeats: int, clock: Clock = time.thread_time
) -> dict[str, list[float]]:
    """Seconds of each case, A B C, B C A, ..., so that a machine that slows down slows all of them.

    Another one begins each time: what a case leaves in the caches and in memory is not always left to the same one.
    Each case runs once before, unmeasured: the first call allocates memory and chooses kernels.
    """
    for work in cases.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            cases[name]()
            seconds[name].append(clock() - start)
    return seconds


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """of / to, repeat by repeat: the two of a pair were measured one after the other.

    Raises:
        ValueError: another number of repeats.
    """
    return [a / b for a, b in zip(of, to, strict=True)]


def peak_bytes() -> int:
    """The most memory that this process has held so far.

    Linux counts in ``ru_maxrss`` also what the process held that started this one, so its own mark is read there.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
