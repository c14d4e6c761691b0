"""A slice viewer: live in JupyterLab, a montage with its sentence everywhere else, both in one output."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import ipywidgets
import numpy as np
from IPython.display import display
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw

from fedkd_utils import figures
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES

#: Plane -> (axis it cuts, axis drawn across, axis drawn down, letters at the left, right, top, bottom). Radiological
#: view: anterior to the left in sagittal slices, the patient's right on the left elsewhere.
PLANES = {
    "sagittal": (0, 1, 2, "APSI"),
    "coronal": (1, 0, 2, "RLSI"),
    "axial": (2, 0, 1, "RLAP"),
}


class Viewer:
    """What :func:`show_volume` shows: its controls, and :meth:`png`, which draws one slice."""

    def __init__(
        self, image: NDArray[Any], label: NDArray[Any] | None, spacing_mm: Sequence[float], title: str
    ) -> None:
        self.image, self.label, self.spacing_mm = _checked(image, label, spacing_mm)
        self.title = title
        self.low, self.high = figures.grey_window(self.image)
        self.plane = ipywidgets.ToggleButtons(options=list(PLANES), description="plane", style={"button_width": "80px"})
        self.index = ipywidgets.IntSlider(description="slice", continuous_update=True)
        self.opacity = ipywidgets.FloatSlider(value=0.4, min=0, max=1, step=0.1, description="labels")
        self.window = ipywidgets.FloatRangeSlider(
            value=(0.0, 1.0), min=0.0, max=1.5, step=0.05, description="window", readout_format=".2f"
        )
        self.classes = {
            CLASS_NAMES[c]: ipywidgets.Checkbox(
                value=True, description=CLASS_NAMES[c], indent=False, layout={"width": "auto"}
            )
            for c in CARTILAGES
        }
        # Without these layouts JupyterLab stretches the picture and the boxes over the whole cell.
        self.picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})
        self._moving = False
        self._change_plane()
        self.plane.observe(lambda _: self._change_plane(), "value")
        for control in (self.index, self.opacity, self.window, *self.classes.values()):
            control.observe(lambda _: self._draw(), "value")
        switches = [self.opacity, ipywidgets.HBox(list(self.classes.values()))] if self.label is not None else []
        self.widget = ipywidgets.VBox([self.plane, self.index, self.window, *switches, self.picture])

    def _change_plane(self) -> None:
        axis = PLANES[self.plane.value][0]
        self._moving = True  # the slider's own changes below are one move: draw once
        self.index.max = self.image.shape[axis] - 1
        self.index.value = self._fullest(axis)
        self._moving = False
        self._draw()

    def _fullest(self, axis: int) -> int:
        """The slice with most cartilage, or the middle one."""
        if self.label is None or not (self.label > 0).any():
            return self.image.shape[axis] // 2
        others = tuple(a for a in range(3) if a != axis)
        return int(np.argmax((self.label > 0).sum(axis=others)))

    def _draw(self) -> None:
        if self._moving:
            return
        shown = [name for name, box in self.classes.items() if box.value]
        self.picture.value = self.png(self.plane.value, self.index.value, self.opacity.value, self.window.value, shown)

    def png(
        self,
        plane: str,
        index: int,
        opacity: float = 0.4,
        window: tuple[float, float] = (0.0, 1.0),
        classes: Sequence[str] = CLASS_NAMES[1:],
        height: int = 420,
    ) -> bytes:
        """One slice as a PNG in true proportions, with orientation letters and the names of the classes it shows.

        Args:
            plane: "sagittal", "coronal" or "axial".
            index: slice along the axis the plane cuts, from 0.
            opacity: of the labels, 0 (hidden) to 1.
            window: darkest and brightest value shown, 0 and 1 being the 1st and 99.5th percentile.
            height: of the picture in pixels.
        """
        axis, across, down, letters = PLANES[plane]
        span = self.high - self.low
        low, high = self.low + window[0] * span, self.low + max(window[1], window[0] + 0.01) * span
        grey = np.clip((np.take(self.image, index, axis) - low) / (high - low), 0, 1)
        rgb = np.repeat((255 * grey).astype(np.float32)[..., None], 3, axis=-1)
        named = []
        if self.label is not None and opacity > 0:
            cut = np.take(self.label, index, axis)
            for c in CARTILAGES:
                if CLASS_NAMES[c] in classes and (here := cut == c).any():
                    colour = ImageColor.getrgb(figures.CLASS_COLOURS[CLASS_NAMES[c]])
                    rgb[here] = (1 - opacity) * rgb[here] + opacity * np.array(colour)
                    named.append((CLASS_NAMES[c], colour))
        # RAS arrays grow to the right, the front and the top; all three run the other way in the picture.
        pixels = rgb.astype(np.uint8)[::-1, ::-1].swapaxes(0, 1)
        width = round(height * pixels.shape[1] * self.spacing_mm[across] / (pixels.shape[0] * self.spacing_mm[down]))
        drawn = Image.fromarray(np.ascontiguousarray(pixels)).resize((max(width, 1), height), Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(drawn)
        for letter, place in zip(
            letters,
            ((4, height // 2), (width - 12, height // 2), (width // 2, 3), (width // 2, height - 15)),
            strict=True,
        ):
            pen.text(place, letter, fill=(255, 255, 160), stroke_width=1, stroke_fill=(0, 0, 0))
        for line, (name, colour) in enumerate(named):
            pen.text((4, 3 + 13 * line), name, fill=colour, stroke_width=1, stroke_fill=(0, 0, 0))
        out = io.BytesIO()
        drawn.save(out, format="png", compress_level=1)
        return out.getvalue()


def _checked(
    image: NDArray[Any], label: NDArray[Any] | None, spacing_mm: Sequence[float]
) -> tuple[NDArray[Any], NDArray[Any] | None, tuple[float, float, float]]:
    volume = np.asarray(image)
    if volume.dtype.fields is not None:
        raise ValueError("the volume holds colours (a structured type); the viewer shows grey volumes (LR, AP, SI).")
    if volume.ndim != 3:
        raise ValueError(
            f"an array of shape {volume.shape} has {volume.ndim} axes; the viewer shows the three of one volume, "
            "(LR, AP, SI). Take one channel, or one time point, first."
        )
    if volume.shape[-1] in (3, 4) and min(volume.shape[:2]) > 16:
        raise ValueError(
            f"an array of shape {volume.shape} looks like a colour picture; the viewer shows grey volumes (LR, AP, SI)."
        )
    if not volume.size or not np.isfinite(volume).all():
        raise ValueError("the volume is empty, or holds NaN or infinite voxels: mask them before looking at it.")
    try:
        x, y, z = (float(s) for s in spacing_mm)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the spacing {spacing_mm} is not three numbers in mm.") from error
    if not all(0 < s < np.inf for s in (x, y, z)):
        raise ValueError(f"the spacing {(x, y, z)} mm is not positive.")
    if label is None:
        return volume, None, (x, y, z)
    marks = np.asarray(label)
    if marks.shape != volume.shape:
        raise ValueError(
            f"the label has shape {marks.shape}, the volume {volume.shape}: show a pair that belongs together."
        )
    if unknown := sorted(set(np.unique(marks).tolist()) - set(range(len(CLASS_NAMES)))):
        raise ValueError(
            f"the label holds {unknown[:5]}; known are 0 to {len(CLASS_NAMES) - 1} ({', '.join(CLASS_NAMES)})."
        )
    return volume, marks, (x, y, z)


def show_volume(
    image: NDArray[Any],
    label: NDArray[Any] | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "A volume",
) -> Viewer:
    """Show a volume (LR, AP, SI; see ``transforms.to_ras``) slice by slice.

    One output holds the live viewer (JupyterLab), a montage (code hosts, HTML, PDF) and one sentence (screen readers,
    nbval). Returns the viewer, whose controls can be moved in code.

    Raises:
        ValueError: not three-dimensional, colour, NaN, a spacing that is none, or a label that does not fit.
    """
    viewer = Viewer(image, label, spacing_mm, title)
    figure, alt = figures.montage(viewer.image, viewer.spacing_mm, viewer.label, 6, title)
    twin = io.BytesIO()
    figure.savefig(twin, format="png", bbox_inches="tight", metadata={"Software": None})
    figures.plt.close(figure)
    bundle = {
        "application/vnd.jupyter.widget-view+json": {
            "version_major": 2,
            "version_minor": 0,
            "model_id": viewer.widget.model_id,
        },
        "image/png": twin.getvalue(),
        "text/plain": alt,
    }
    display(bundle, metadata={"image/png": {"alt": alt}}, raw=True)
    return viewer
