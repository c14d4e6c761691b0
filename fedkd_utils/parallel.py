"""Clients side by side in threads, with the results and the errors of one after the other."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from fedkd_utils.training import Progress
from fedkd_utils.transforms import SiteData

T = TypeVar("T")


def default_workers() -> int:
    """How many clients train side by side: as many as the cores hold with torch's threads for each."""
    return max((os.cpu_count() or 1) // torch.get_num_threads(), 1)


class _Stopped(Exception):
    """Ends a client's thread when another one, or the caller, failed."""


def side_by_side(
    work: Callable[[SiteData, Progress], T], sites: Sequence[SiteData], workers: int | None, advance: Progress
) -> list[T]:
    """Work on every site in threads, results in the order of the sites; progress goes to the calling thread.

    When one fails, or the caller is interrupted, the others stop at their next step, and the first error in the
    order of the sites is raised.
    """
    count = min(default_workers() if workers is None else workers, len(sites))
    if count <= 1:
        return [work(site, advance) for site in sites]
    notes: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    stop = threading.Event()

    def report(steps: int, note: str) -> None:
        if stop.is_set():
            raise _Stopped
        notes.put((steps, note))

    def start(site: SiteData) -> T:
        report(0, "")
        return work(site, report)

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(start, site) for site in sites]
        for future in futures:
            future.add_done_callback(lambda done: notes.put((0, "")))
        try:
            while not all(future.done() for future in futures) or not notes.empty():
                steps, note = notes.get()
                if steps:
                    advance(steps, note)
                if any(future.done() and future.exception() is not None for future in futures):
                    break
        finally:
            stop.set()  # after the loop nobody runs, or somebody failed
    errors = [future.exception() for future in futures]
    real = [error for error in errors if error is not None and not isinstance(error, _Stopped)]
    if real:
        raise real[0]
    return [future.result() for future in futures]
