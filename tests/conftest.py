"""The same threads as in the Makefile, a cache whose knees are boxes, and a browser where there is one."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: digits of a training depend on the threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("FEDKD_DEVICE", "cpu")  # many tests ask for the same bits on two ways

from tiny import blobs

from fedkd_utils import browser, cohorts


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder in which cohorts and repositories are made of boxes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_cohort", "make_repository"):
            patch.setattr(cohorts, name, functools.partial(getattr(cohorts, name), workers=1, scan=blobs))
        yield tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def browser_page() -> Iterator[tuple[Any, list[str]]]:
    """A page of a headless browser and the errors of its console; without a browser its tests are skipped."""
    try:
        browser.find_browser()
    except browser.NoBrowser as error:
        pytest.skip(str(error))
    with browser.page_of() as page_and_errors:
        yield page_and_errors
