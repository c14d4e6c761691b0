"""Benchmark: how fast the viewer answers, in JupyterLab in a headless browser."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from fedkd_utils import browser
from fedkd_utils.timing import Effort, Line, line

SHAPE = (160, 384, 384)

_CELLS = [
    """import numpy as np
from fedkd_utils import acquisition, surfaces, transforms, viewer
shape = {shape}
x, y, z = np.ogrid[-1:1:{shape[0]}j, -1:1:{shape[1]}j, -1:1:{shape[2]}j]
distance = np.sqrt(x**2 + y**2 + z**2)
image = (np.cos(12 * distance) + np.random.default_rng(0).normal(0, 0.1, shape)).astype(np.float32)
truth = np.zeros(shape, np.uint8)
for value, radius in ((1, 0.7), (2, 0.5), (3, 0.3)):
    truth[np.abs(distance - radius) < 0.03] = value
methods = {{name: np.roll(truth, k, 1) for k, name in ((2, "A"), (4, "B"), (6, "C"))}}""",
    "_ = viewer.show_volume(image, truth, (0.7, 0.4, 0.4))",
    "_ = viewer.show_comparison(image, methods, truth, (0.7, 0.4, 0.4))",
    "knee = acquisition.scan(4, acquisition.SCANNERS['pd_fs'], 1)\n"
    "label, affine = transforms.to_ras(knee.label, knee.affine)\n"
    "two = {{'truth': label, 'moved': np.roll(label, 1, 1)}}\n"
    "_ = surfaces.show_surfaces(two, transforms.voxel_sizes_mm(affine))",
]

#: Moves a slider and waits for the frame that shows its slice, pixels read back; gives milliseconds.
_MOVES = """async ([number, slider, moves]) => {
  const root = document.querySelectorAll(".fedkd-viewer")[number];
  const input = root.querySelector(slider), canvas = root.querySelector("canvas"), times = [];
  const [low, high] = [Number(input.min), Number(input.max)];
  for (let k = 0; k < moves; k++) {
    input.value = low + ((high - low) * ((k * 7) % moves)) / moves;
    const start = performance.now();
    input.dispatchEvent(new Event("input"));
    await new Promise(requestAnimationFrame);
    canvas.getContext("2d").getImageData(0, 0, 1, 1);
    times.push(performance.now() - start);
  }
  return times;
}"""


_FRAMES = """async (moves) => {
  const times = [];
  for (let k = 0; k < moves; k++) {
    const start = performance.now();
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - start);
  }
  return times;
}"""


def viewer(effort: Effort) -> list[Line]:
    """Milliseconds from a move to its picture, by what was moved, with a volume of full size.

    Raises:
        NoBrowser: no Chromium, or no Playwright.
    """
    browser.find_browser()
    shape, moves = ((40, 96, 96), 10) if effort.quick else (SHAPE, 40)
    found: list[Line] = []

    def keep(name: str, times: list[float]) -> None:
        found.append(line(name, "ms", times))

    with tempfile.TemporaryDirectory() as folder:
        cells = [cell.format(shape=shape) for cell in _CELLS]
        browser.write_notebook(Path(folder) / "bench.ipynb", cells)
        with browser.jupyter_lab(Path(folder)) as address, browser.page_of() as (page, _):
            browser.open_and_run(page, address, "bench.ipynb")
            page.wait_for_function("() => document.querySelectorAll('.fedkd-viewer canvas').length === 8")
            keep("nothing: an empty frame of this browser", page.evaluate(_FRAMES, moves))
            for number, mode in enumerate(("three planes", "compare, 5 pictures")):
                for slider in ("slice-0", "slice-1", "slice-2", "level"):
                    times = page.evaluate(_MOVES, [number, f"input.{slider}", moves])
                    keep(f"{mode}, {slider}", times)
            keep("surfaces, 2 scenes, drag", _drag(page, moves // 2))
    return found


def _drag(page: Any, moves: int) -> list[float]:
    """Turns the first scene; milliseconds from every move of the mouse to the next frame."""
    plot = page.locator(".js-plotly-plot").first
    plot.scroll_into_view_if_needed()
    page.wait_for_selector(".js-plotly-plot canvas")
    box = plot.bounding_box()
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    times = []
    for k in range(moves):
        start = time.perf_counter()
        page.mouse.move(x + 4 * k, y)
        page.evaluate("() => new Promise(requestAnimationFrame)")
        times.append(1000 * (time.perf_counter() - start))
    page.mouse.up()
    return times
