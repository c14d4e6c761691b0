"""Clients side by side in threads, with the results and the errors of one after the other."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from fedkd_utils.device import compute_device
from fedkd_utils.training import Progress
from fedkd_utils.transforms import SiteData

T = TypeVar("T")


def default_workers() -> int:
    """How many clients train side by side: as many as the cores hold with torch's threads for each; on a GPU one."""
    return 1 if compute_device().type == "cuda" else threads_that_fit()


def threads_that_fit() -> int:
    """How many threads of ours the cores hold when each uses torch's number of threads."""
    return max((os.cpu_count() or 1) // torch.get_num_threads(), 1)


def once_a_thread(make: Callable[[], T]) -> Callable[[], T]:
    """A function that makes its result once in each thread that calls it, and gives the same again afterwards."""
    own = threading.local()

    def made() -> T:
        if not hasattr(own, "made"):
            own.made = make()
        result: T = own.made
        return result

    return made


class _Stopped(Exception):
    """Ends a client's thread when another one, or the caller, failed."""


def side_by_side(
    work: Callable[[SiteData, Progress], T], sites: Sequence[SiteData], workers: int | None, advance: Progress
) -> Generator[T, None, None]:
    """Work on every site in threads, results in the order of the sites; progress goes to the calling thread.

    Work begins at most twice as many sites ahead of the last result that was taken as there are workers, so few results
    are there at a time. When one fails, or the caller stops early, the others stop at their next report, and the first
    error in the order of the sites is raised; a caller that may stop early closes the generator.
    """
    count = min(default_workers() if workers is None else workers, len(sites))
    if count <= 1:
        yield from (work(site, advance) for site in sites)
        return
    notes: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    stop = threading.Event()

    def report(steps: int, note: str) -> None:
        if stop.is_set():
            raise _Stopped
        notes.put((steps, note))

    def start(site: SiteData) -> T:
        report(0, "")
        return work(site, report)

    coming = iter(sites)
    begun: deque[Future[T]] = deque()
    with ThreadPoolExecutor(count) as pool:

        def begin(number: int) -> None:
            for site in itertools.islice(coming, number):
                begun.append(pool.submit(start, site))
                begun[-1].add_done_callback(lambda done: notes.put((0, "")))

        try:
            begin(2 * count)
            while begun:
                while not begun[0].done() and not _failed(begun):
                    _advance_by(notes.get(), advance)
                if _failed(begun):
                    break
                yield begun.popleft().result()
                begin(1)
            while not notes.empty():
                _advance_by(notes.get(), advance)
        finally:
            stop.set()  # after the loop nobody runs, or somebody failed
    errors = [future.exception() for future in begun]
    real = [error for error in errors if error is not None and not isinstance(error, _Stopped)]
    if real:
        raise real[0]


def _advance_by(note: tuple[int, str], advance: Progress) -> None:
    """Hand on one note of a thread, empty ones apart."""
    if note[0]:
        advance(*note)


def _failed(begun: Iterable[Future[T]]) -> bool:
    return any(future.done() and future.exception() is not None for future in begun)
