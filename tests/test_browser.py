"""The viewer and the surfaces as a person meets them: JupyterLab in a headless browser, mouse, wheel and keys.

Everything happens in one notebook, in the order of this file.
"""

from __future__ import annotations

import base64
import io
import time

import nbformat
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from fedkd_utils import browser, rules

SHAPE, SPACING = (12, 40, 50), (4.0, 1.5, 1.0)
ORIENTATIONS = ("RAS", "PIR", "LPS", "ASL")
CELLS = [
    "import numpy as np\nfrom fedkd_utils import surfaces, viewer",
    'view = viewer.show_volume("RAS.nii.gz", "label_RAS.nii.gz", title="One")',
    f"for code in {ORIENTATIONS}:\n    _ = viewer.show_volume(f'{{code}}.nii.gz', title=code)",
    "from fedkd_utils.opened import opened\n"
    'held = opened("RAS.nii.gz", "label_RAS.nii.gz")\n'
    "drawn = {'grown': np.maximum(held.label, np.roll(held.label, 3, 2)), 'shrunk': held.label * (held.label != 2)}\n"
    'both = viewer.show_comparison(held.image, drawn, held.label, held.spacing_mm, title="Two")',
    "live = surfaces.show_surfaces({'truth': held.label, **drawn}, held.spacing_mm, title='Three')",
    "from fedkd_utils.live import progress_bar\n"
    "with progress_bar(3, 'Four') as advance:\n"
    "    for k in range(3):\n        advance(1, f'step, loss {1 / (k + 1)}')",
    "print(view.position, view.shown, view.outline)",
    "view.position = [1, 2, 3]\nview.plane = 'coronal'",
]


def write(folder):
    """A volume with a bright block at the right, the front and the top, stored in several orders of its axes."""
    x, y, _ = np.indices(SHAPE)
    image = (10 + x + y / 2).astype(np.float32)
    image[8:, 28:, 35:] = 100
    label = np.zeros(SHAPE, np.uint8)
    label[3:9, 5:25, 25:30], label[3:9, 5:25, 15:20], label[3:9, 30:34, 20:35] = 1, 2, 3
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-20, -30, -10)
    for code in ORIENTATIONS:
        for name, array in ((code, image), (f"label_{code}", label)):
            held = nib.Nifti1Image(array, affine)
            turn = nib.orientations.ornt_transform(
                nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(code)
            )
            nib.save(held.as_reoriented(turn), folder / f"{name}.nii.gz")


@pytest.fixture(scope="module")
def lab(browser_page, tmp_path_factory):
    (page, errors), folder = browser_page, tmp_path_factory.mktemp("lab")
    write(folder)
    browser.write_notebook(folder / "see.ipynb", CELLS)
    with browser.jupyter_lab(folder) as address:
        browser.open_and_run(page, address, "see.ipynb", cells=6)
        page.wait_for_function("() => document.querySelectorAll('.fedkd-viewer canvas').length === 3 + 12 + 4")
        yield Lab(page, errors, folder, address)
        page.goto("about:blank")  # a server waits for the pages it serves


class Lab:
    """The page, and hands for it."""

    def __init__(self, page, errors, folder, address):
        self.page, self.errors, self.folder, self.address = page, errors, folder, address

    def viewer(self, number=0):
        return self.page.locator(".fedkd-viewer").nth(number)

    def canvas(self, plane_or_number, viewer=0):
        places = {"sagittal": 0, "coronal": 1, "axial": 2}
        return self.viewer(viewer).locator("canvas").nth(places.get(plane_or_number, plane_or_number))

    def settle(self):
        self.page.evaluate("() => new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))")

    def pixels(self, plane_or_number, viewer=0):
        """What stands in a canvas now, (rows, columns, 3)."""
        self.settle()
        data = self.canvas(plane_or_number, viewer).evaluate("(c) => c.toDataURL()")
        return png(base64.b64decode(data.split(",")[1]))

    def screen(self, locator):
        return png(locator.screenshot())

    def until(self, locator, holds, seconds=60):
        """The picture of an element, as soon as it is as it should be."""
        end = time.monotonic() + seconds
        while not holds(picture := self.screen(locator)) and time.monotonic() < end:
            self.page.wait_for_timeout(100)
        assert holds(picture)
        return picture

    def press(self, control, key, times=1, viewer=0):
        for _ in range(times):
            self.viewer(viewer).locator(f"input.{control}").press(key)
        self.settle()

    def toggle(self, control, viewer=0):
        self.viewer(viewer).locator(f"input.{control}").click()
        self.settle()

    def place(self, viewer=0):
        self.settle()
        return [int(self.viewer(viewer).locator(f"input.slice-{axis}").input_value()) for axis in range(3)]

    def run(self, number):
        """Run one cell; what it printed."""
        cell = self.page.locator(".jp-CodeCell").nth(number)
        before = cell.locator(".jp-InputPrompt").first.inner_text()
        cell.locator(".jp-InputArea-editor").click()
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_function(
            """([n, before]) => {
                const prompt = document.querySelectorAll('.jp-CodeCell')[n].querySelector('.jp-InputPrompt');
                return prompt.innerText !== before && /\\d/.test(prompt.innerText);
            }""",
            arg=[number, before],
        )
        self.settle()
        return "".join(cell.locator(".jp-OutputArea-output").all_inner_texts())


def png(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def coloured(pixels, colour):
    """How many pixels lean towards a class: red, green or blue by far the strongest channel."""
    others = [c for c in range(3) if c != colour]
    return int((pixels[..., colour] > pixels[..., others].max(axis=-1) + 12).sum())


def test_without_a_browser_the_reason_says_how_to_install_one(monkeypatch):
    pytest.importorskip("playwright")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(browser.NoBrowser, match="apt-get install chromium"):
        browser.find_browser()


# ------------------------------------------------------------------------------------------------------ slice viewer
def test_proportions_are_those_of_the_spacing(lab):
    for plane, across, down in (("sagittal", 40 * 1.5, 50), ("coronal", 12 * 4, 50), ("axial", 12 * 4, 40 * 1.5)):
        height, width, _ = lab.pixels(plane).shape
        assert width / height == pytest.approx(across / down, rel=0.02)


@pytest.mark.parametrize("number", range(len(ORIENTATIONS)))
def test_anterior_stays_anterior_however_the_file_is_stored(lab, number):
    viewer = 1 + number
    assert lab.viewer(viewer).locator(".title").inner_text() == ORIENTATIONS[number]
    if lab.viewer(viewer).locator("input.crosshair").is_checked():
        lab.toggle("crosshair", viewer)
    for axis, index in enumerate((10, 35, 45)):
        lab.viewer(viewer).locator(f"input.slice-{axis}").fill(str(index))
    # The block is at the right, the front and the top: on the left and above in every plane.
    for plane in ("sagittal", "coronal", "axial"):
        grey = lab.pixels(plane, viewer)[..., 0]
        h, w = (n // 2 for n in grey.shape)
        quarter = {"left top": grey[10:h, 25:w], "right top": grey[10:h, w:-25], "left below": grey[h:-45, 25:w]}
        means = {name: part.mean() for name, part in quarter.items()}
        assert max(means, key=means.get) == "left top", (plane, means)
    text = lab.viewer(viewer).locator(".readout").inner_text()
    assert text.startswith("R 20.0 A 22.5 S 35.0 mm") and "value 100" in text


def test_a_slider_moves_its_own_plane_and_no_other(lab):
    lab.toggle("crosshair")
    before = [lab.pixels(plane) for plane in range(3)]
    place = lab.place()
    lab.press("slice-0", "ArrowRight", 3)
    after = [lab.pixels(plane) for plane in range(3)]
    assert lab.place() == [place[0] + 3, *place[1:]]
    assert (after[0] != before[0]).any() and (after[1] == before[1]).all() and (after[2] == before[2]).all()
    lab.press("slice-0", "ArrowLeft", 3)
    assert (lab.pixels(0) == before[0]).all()
    lab.toggle("crosshair")


def test_level_darkens_and_window_softens(lab):
    means = [lab.pixels("sagittal")[..., 1].mean()]
    for _ in range(3):
        lab.press("level", "ArrowRight", 15)
        means.append(lab.pixels("sagittal")[..., 1].mean())
    assert means == sorted(means, reverse=True) and means[-1] < means[0]
    lab.viewer().locator("button.reset").click()
    assert lab.pixels("sagittal")[..., 1].mean() == pytest.approx(means[0])
    lab.press("width", "PageDown", 5)
    assert lab.pixels("sagittal")[..., 1].mean() < means[0] - 1, "the dark knee lies below a narrow window"
    lab.viewer().locator("button.reset").click()


def test_class_switches_opacity_and_outline(lab):
    full = lab.pixels("sagittal")
    red, green = coloured(full, 0), coloured(full, 1)
    assert red > 500 and green > 500
    lab.toggle("class-femoral")
    assert coloured(lab.pixels("sagittal"), 0) == 0 and coloured(lab.pixels("sagittal"), 1) == green
    lab.toggle("class-femoral")
    lab.toggle("outline")
    assert 0 < coloured(lab.pixels("sagittal"), 0) < 0.7 * red
    lab.toggle("outline")
    lab.press("opacity", "Home")
    assert coloured(lab.pixels("sagittal"), 0) == coloured(lab.pixels("sagittal"), 1) == 0
    lab.viewer().locator("button.reset").click()
    assert (lab.pixels("sagittal") == full).all()


def test_the_wheel_scrolls_slices_only_after_a_click(lab):
    canvas = lab.canvas("sagittal")
    canvas.scroll_into_view_if_needed()
    lab.page.evaluate("() => document.activeElement.blur()")
    canvas.hover()
    place = lab.place()
    lab.page.mouse.wheel(0, -100)
    assert lab.place() == place
    canvas.scroll_into_view_if_needed()
    canvas.click()
    clicked = lab.place()
    lab.page.mouse.wheel(0, 100)
    lab.page.wait_for_function(
        "(n) => document.querySelector('.fedkd-viewer input.slice-0').value === String(n)", arg=clicked[0] + 1
    )
    assert lab.place()[1:] == clicked[1:]


def test_keys_move_and_switch_and_jupyterlab_does_not_hear_them(lab):
    cells = lab.page.locator(".jp-CodeCell").count()
    lab.viewer().locator("button.reset").click()
    lab.canvas("coronal").focus()
    place = lab.place()
    for key in ("PageDown", "PageDown", "PageUp", "ArrowLeft", "ArrowDown"):
        lab.page.keyboard.press(key)
    assert lab.place() == [place[0] + 1, place[1] + 1, place[2] - 1]
    for key in ("1", "o", "x", "c"):
        lab.page.keyboard.press(key)
    lab.settle()
    states = [lab.viewer().locator(f"input.{n}").is_checked() for n in ("class-femoral", "outline", "crosshair")]
    assert states == [False, True, False] and lab.viewer().locator("input.closeup").is_checked()
    assert lab.page.locator(".jp-CodeCell").count() == cells
    lab.page.keyboard.press("r")
    lab.settle()
    assert lab.place() == place and lab.viewer().locator("input.class-femoral").is_checked()


def test_a_click_moves_the_crosshair_in_all_planes(lab):
    canvas = lab.canvas("axial")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    # A quarter from the left and from the top: three quarters towards the right and the front of the patient.
    canvas.click(position={"x": box["width"] / 4, "y": box["height"] / 4})
    x, y, _ = lab.place()
    assert abs(x - 0.75 * SHAPE[0]) <= 1 and abs(y - 0.75 * SHAPE[1]) <= 1
    assert f"voxel {x}, {y}," in lab.viewer().locator(".readout").inner_text()


def test_a_drag_with_the_right_button_changes_the_window(lab):
    canvas = lab.canvas("sagittal")
    canvas.scroll_into_view_if_needed()
    box, before = canvas.bounding_box(), lab.viewer().locator("input.width").input_value()
    lab.page.mouse.move(box["x"] + 50, box["y"] + 50)
    lab.page.mouse.down(button="right")
    lab.page.mouse.move(box["x"] + 20, box["y"] + 60, steps=3)
    lab.page.mouse.up(button="right")
    lab.settle()
    assert float(lab.viewer().locator("input.width").input_value()) < float(before)
    assert lab.page.locator(".lm-Menu:visible").count() == 0


def test_one_plane_can_fill_the_viewer(lab):
    lab.viewer().locator("select.plane").select_option("axial")
    lab.settle()
    assert lab.viewer().locator("canvas:visible").count() == 1
    lab.viewer().locator("button.reset").click()
    lab.settle()
    assert lab.viewer().locator("canvas:visible").count() == 3


def test_python_and_the_page_share_the_settings(lab):
    lab.toggle("outline")
    lab.toggle("class-tibial")
    place = lab.place()
    assert f"{place} ['femoral', 'patellar'] True" in lab.run(6)
    lab.run(7)
    lab.page.wait_for_function("() => document.querySelector('.fedkd-viewer select.plane').value === 'coronal'")
    assert lab.place() == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------- compare
def test_errors_are_marked_in_the_methods_only(lab):
    two = 1 + len(ORIENTATIONS)
    captions = lab.viewer(two).locator("figcaption").all_inner_texts()
    assert captions == ["image", "truth", "grown", "shrunk"]

    def errors(number):
        """Pixels that lean to yellow (drawn, not true) and to magenta (true, not drawn)."""
        red, green, blue = np.moveaxis(lab.pixels(number, two), -1, 0)
        low = 40
        return int(((red > blue + low) & (green > blue + low)).sum()), int(
            ((red > green + low) & (blue > green + low)).sum()
        )

    lab.toggle("crosshair", two)
    plain = errors(0)  # letters and the scale bar are yellow too
    assert errors(1)[1] == 0
    assert errors(2)[0] > plain[0] + 300 and errors(2)[1] == 0
    assert errors(3)[0] < plain[0] + 30 and errors(3)[1] > 300
    lab.toggle("errors", two)
    assert errors(2)[0] < plain[0] + 30 and errors(3)[1] == 0
    lab.toggle("errors", two)
    before = [lab.pixels(number, two) for number in range(4)]
    lab.press("slice-0", "End", viewer=two)
    assert all((lab.pixels(number, two) != before[number]).any() for number in range(4))


# --------------------------------------------------------------------------------------------------------- surfaces
def test_a_drag_turns_all_surfaces_and_the_legend_hides_a_class(lab):
    plot = lab.page.locator(".js-plotly-plot").first
    plot.scroll_into_view_if_needed()
    lab.page.wait_for_selector(".js-plotly-plot canvas")
    before = lab.until(plot, lambda seen: all(coloured(part, 0) > 300 for part in np.array_split(seen, 3, axis=1)))
    box = plot.bounding_box()
    lab.page.mouse.move(box["x"] + 150, box["y"] + 230)
    lab.page.mouse.down()
    lab.page.mouse.move(box["x"] + 260, box["y"] + 260, steps=4)
    lab.page.mouse.up()
    lab.page.mouse.move(box["x"] + 5, box["y"] + box["height"] - 5)

    def turned(seen):
        changed = np.abs(seen - before).max(axis=-1) > 40
        return all(part.sum() > 500 for part in np.array_split(changed, 3, axis=1))

    after = lab.until(plot, turned)
    plot.locator(".legendtoggle").first.click()
    lab.until(plot, lambda seen: coloured(seen, 0) < 0.2 * coloured(after, 0))


# --------------------------------------------------------------------------------------------------- training curves
def test_a_training_curve_is_drawn(lab):
    lab.page.wait_for_function(
        "() => [...document.querySelectorAll('.jp-OutputArea-output img')].some((i) => i.naturalWidth > 400)"
    )


# ------------------------------------------------------------------------------------------------- what stays behind
def test_the_saved_notebook_is_small_and_shows_pictures_without_a_kernel(lab):
    lab.page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save'); }")
    saved = nbformat.read(lab.folder / "see.ipynb", as_version=4)
    outputs = [o for cell in saved.cells for o in cell.outputs if rules.WIDGET_VIEW in o.get("data", {})]
    pictures = [o for o in outputs if "image/png" in o.data]
    assert len(pictures) == 3 + len(ORIENTATIONS) and "widgets" not in saved.metadata
    assert all(rules.alt_text(o) == o.data["text/plain"] for o in pictures)
    said = {o.data["text/plain"] for o in outputs if o not in pictures}
    assert said == {"Four: finished"}
    assert (lab.folder / "see.ipynb").stat().st_size < rules.MAX_BYTES
    with browser.jupyter_lab(lab.folder) as another_person:  # who has not run it, and has not trusted it
        browser.open_notebook(lab.page, another_person, "see.ipynb")
        lab.page.wait_for_function(
            "(n) => document.querySelectorAll('.jp-OutputArea-output img').length === n", arg=len(pictures)
        )
        assert lab.page.locator(".fedkd-viewer, .js-plotly-plot").count() == 0
        lab.page.goto("about:blank")  # a server waits for the pages it serves


def test_the_console_stayed_free_of_errors(lab):
    assert lab.errors == []
