"""Clients side by side: the order, how far work runs ahead, and what happens when somebody fails or stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest
import torch

from fedkd_utils.parallel import once_a_thread, side_by_side
from fedkd_utils.training import Progress
from fedkd_utils.transforms import SiteData

NONE = torch.zeros(0)
SITES = [SiteData(f"client {k:02d}", NONE, NONE, NONE, [], [], ()) for k in range(12)]


def quiet(steps: int, note: str) -> None:
    pass


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_results_come_in_the_order_of_the_sites_however_long_each_takes(workers: int) -> None:
    caller, told = threading.get_ident(), list[tuple[int, str]]()

    def work(site: SiteData, report: Progress) -> str:
        time.sleep(0.002 * (len(SITES) - SITES.index(site)))  # the first takes longest
        report(2, site.name)
        report(3, site.name)
        return site.name

    def advance(steps: int, note: str) -> None:
        assert threading.get_ident() == caller
        told.append((steps, note))

    assert list(side_by_side(work, SITES, workers, advance)) == [site.name for site in SITES]
    assert sorted(told) == sorted((steps, site.name) for site in SITES for steps in (2, 3))  # every step, none twice


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (2, 4), (3, 6)])
def test_nobody_begins_far_ahead_of_what_was_taken(workers: int, ahead: int) -> None:
    begun, taken, most = list[str](), 0, 0

    def work(site: SiteData, report: Progress) -> None:
        begun.append(site.name)

    for _ in side_by_side(work, SITES, workers, quiet):
        time.sleep(0.01)  # time enough to begin more, if that were allowed
        most = max(most, len(begun) - taken)
        taken += 1
    assert taken == len(begun) == 12 and most == ahead


def failing(at: set[int], begun: list[int]) -> Callable[[SiteData, Progress], int]:
    def work(site: SiteData, report: Progress) -> int:
        number = SITES.index(site)
        begun.append(number)
        if number in at:
            raise RuntimeError(f"fault of {number}")
        for _ in range(200):
            time.sleep(0.001)
            report(1, "")
        return number

    return work


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_fault_ends_all_with_the_first_error_in_the_order_of_the_sites(workers: int) -> None:
    begun: list[int] = []
    with pytest.raises(RuntimeError, match="fault of 1"):
        list(side_by_side(failing({1, 3}, begun), SITES, workers, quiet))
    assert max(begun) < 8  # the others were not begun


def test_a_caller_that_stops_early_leaves_no_thread_at_work() -> None:
    begun: list[int] = []
    before = threading.active_count()
    with closing(side_by_side(failing(set(), begun), SITES, 3, quiet)) as results:
        assert next(results) == 0
    assert threading.active_count() == before and len(begun) <= 7


def test_an_error_of_the_caller_passes_through_and_stops_the_others() -> None:
    def interrupted(steps: int, note: str) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        list(side_by_side(failing(set(), []), SITES, 3, interrupted))
    assert threading.active_count() == before


def test_each_thread_makes_its_own_once() -> None:
    made = list[object]()
    at_once = threading.Barrier(2)

    def make() -> object:
        new = object()
        made.append(new)
        return new

    mine = once_a_thread(make)

    def work(site: SiteData, report: Progress) -> tuple[int, object, object]:
        at_once.wait(timeout=30)  # so that both threads work
        return threading.get_ident(), mine(), mine()

    found = list(side_by_side(work, SITES, 2, quiet))
    owners = {thread: thing for thread, thing, _ in found}
    assert len(owners) == len(made) == 2 and owners.keys() != {threading.get_ident()}
    assert all(a is b is owners[thread] for thread, a, b in found)
    first, second = owners.values()
    assert first is not second
    assert mine() is mine() and len(made) == 3  # the caller's own
