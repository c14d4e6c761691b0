"""A slice viewer: live in JupyterLab, a montage with its sentence everywhere else, both in one output.

The volume goes to the browser once and ``viewer.js`` draws it there, so that a slice comes up at once even while the
kernel is busy. Nothing of that is stored in the notebook.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from IPython.display import display
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from fedkd_utils import figures
from fedkd_utils.opened import Opened, Volume, opened
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES

#: Plane -> (axis it cuts, axis drawn across, axis drawn down, letters at the left, right, top, bottom). Radiological
#: view: anterior to the left in sagittal slices, the patient's right on the left elsewhere. RAS arrays grow to the
#: right, the front and the top; both drawn axes run the other way in the picture.
PLANES = {
    "sagittal": (0, 1, 2, "APSI"),
    "coronal": (1, 0, 2, "RLSI"),
    "axial": (2, 0, 1, "RLAP"),
}
ALL_PLANES = "three planes"
_HERE = Path(__file__).parent


class Viewer(anywidget.AnyWidget):
    """What :func:`show_volume` and :func:`show_comparison` show. Its controls are attributes, both ways.

    Attributes:
        position: voxel (LR, AP, SI) under the crosshair, which all pictures share.
        plane: "three planes", "sagittal", "coronal" or "axial".
        window: values drawn black and white.
        opacity: of the labels, 0 (hidden) to 1.
        shown: names of the cartilages shown.
        outline, errors, crosshair: draw labels as outlines; mark errors; draw the crosshair.
        closeup: show only the part around the cartilage.
    """

    _esm = "".join((_HERE / name).read_text(encoding="utf-8") for name in ("slices.js", "viewer.js"))
    _css = (_HERE / "viewer.css").read_text(encoding="utf-8")
    _voxels = traitlets.Bytes().tag(sync=True)  # uint16, the range of the volume spread over all its values
    _labels = traitlets.List(traitlets.Bytes()).tag(sync=True)  # uint8, gzipped: mostly background
    _facts = traitlets.Dict().tag(sync=True)
    position = traitlets.List(traitlets.Int(), minlen=3, maxlen=3).tag(sync=True)
    plane = traitlets.Enum([ALL_PLANES, *PLANES], ALL_PLANES).tag(sync=True)
    window = traitlets.List(traitlets.CFloat(), minlen=2, maxlen=2).tag(sync=True)
    opacity = traitlets.CFloat(0.4, min=0.0, max=1.0).tag(sync=True)
    shown = traitlets.List(traitlets.Enum(CLASS_NAMES[1:]), list(CLASS_NAMES[1:])).tag(sync=True)
    outline = traitlets.Bool(False).tag(sync=True)
    errors = traitlets.Bool(True).tag(sync=True)
    crosshair = traitlets.Bool(True).tag(sync=True)
    closeup = traitlets.Bool(False).tag(sync=True)

    def __init__(self, held: Opened, layers: Mapping[str, NDArray[np.uint8]], title: str, compare: bool) -> None:
        self.shape = held.image.shape
        low, high = float(held.image.min()), float(held.image.max())
        step = max(high - low, 1e-6) / 65535
        voxels = np.round((held.image.astype(np.float32) - np.float32(low)) / np.float32(step)).astype("<u2")
        super().__init__(
            _voxels=voxels.tobytes(),
            _labels=[gzip.compress(label.tobytes(), 1) for label in layers.values()],
            _facts={
                "title": title,
                "compare": compare,
                "shape": list(self.shape),
                "spacing": list(held.spacing_mm),
                "affine": held.affine.tolist(),
                "scale": [low, step],
                "closeup": _around(layers, held.spacing_mm, self.shape),
                "layers": list(layers),
                "planes": {name: list(plane) for name, plane in PLANES.items()},
                "classes": [[CLASS_NAMES[c], figures.CLASS_COLOURS[CLASS_NAMES[c]]] for c in CARTILAGES],
                "errors": [[name, colour] for name, (colour, _) in figures.ERROR_STYLE.items()],
            },
            position=_start(held.label, self.shape),
            plane="sagittal" if compare else ALL_PLANES,
            window=list(figures.grey_window(held.image)),
            outline=compare,
            closeup=compare,
        )

    @traitlets.validate("position")
    def _inside(self, proposal: Any) -> list[int]:
        position = list(proposal["value"])
        if not all(0 <= p < n for p, n in zip(position, self.shape, strict=True)):
            raise traitlets.TraitError(f"the position {position} lies outside the volume of {self.shape} voxels.")
        return position


def _start(label: NDArray[np.uint8] | None, shape: tuple[int, ...]) -> list[int]:
    """A voxel of cartilage in the sagittal slice with most of it, near the fullest other slices; or the middle."""
    if label is None:
        return [n // 2 for n in shape]
    fullest = [int(np.argmax((label > 0).sum(axis=tuple(a for a in range(3) if a != axis)))) for axis in range(3)]
    inside = np.argwhere(label[fullest[0]])
    nearest = inside[np.abs(inside - fullest[1:]).sum(axis=1).argmin()]
    return [fullest[0], *nearest.tolist()]


def _around(
    layers: Mapping[str, NDArray[np.uint8]], spacing_mm: Sequence[float], shape: tuple[int, ...], margin_mm: float = 8
) -> list[list[int]]:
    """First voxel and end, along each axis, of the part that holds all labels and a margin."""
    if not layers:
        return [[0, n] for n in shape]
    anything = np.logical_or.reduce([label > 0 for label in layers.values()])
    ends = []
    for axis, (size, count) in enumerate(zip(spacing_mm, shape, strict=True)):
        inside = np.flatnonzero(anything.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = round(margin_mm / size)
        ends.append([max(int(inside[0]) - margin, 0), min(int(inside[-1]) + margin + 1, count)])
    return ends


def show_volume(
    volume: Volume,
    label: ArrayLike | str | Path | None = None,
    spacing_mm: Sequence[float] | None = None,
    title: str = "A volume",
) -> Viewer:
    """Show a volume slice by slice, in three linked planes.

    One output holds the live viewer (JupyterLab), a montage (code hosts, HTML, PDF) and one sentence (screen readers,
    nbval). Returns the viewer, whose controls can be moved in code.

    Args:
        volume: an array (LR, AP, SI), the path of a NIfTI file, or an item of a cohort with its label, if it has one.
        label: of the volume; for a file a path, or an array in the order of the file.
        spacing_mm: of an array; 1 mm when not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not three-dimensional, colour, NaN, a spacing that is none, a label that does not fit or is empty.
    """
    held = opened(volume, label, spacing_mm)
    view = Viewer(held, {} if held.label is None else {"label": held.label}, title, compare=False)
    show_both(view, *figures.montage(held.image, held.spacing_mm, held.label, 6, title))
    return view


def show_comparison(
    volume: Volume,
    predictions: Mapping[str, ArrayLike | str | Path],
    truth: ArrayLike | str | Path | None = None,
    spacing_mm: Sequence[float] | None = None,
    title: str = "A comparison",
) -> Viewer:
    """Scroll a volume, its truth and several segmentations together, errors marked.

    Args:
        volume, spacing_mm: as for :func:`show_volume`.
        predictions: by name of the method; for a file, paths, or arrays in the order of the file. May be empty maps.
        truth: the label; an item of a cohort brings its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as for :func:`show_volume`; also no truth or nothing to compare with it.
    """
    held = opened(volume, truth, spacing_mm)
    if held.label is None:
        raise ValueError("there is no truth to compare with: give truth=, or use show_volume for one segmentation.")
    if not predictions or "truth" in predictions:
        raise ValueError('give at least one prediction, by name of its method ("truth" is taken).')
    drawn = {name: held.marks(marks, name) for name, marks in predictions.items()}
    view = Viewer(held, {"truth": held.label, **drawn}, title, compare=True)
    show_both(view, *figures.compare_segmentations(held.image, held.label, drawn, held.spacing_mm, title=title))
    return view


def show_both(view: Any, figure: Figure, alt: str) -> None:
    """Display a widget and its static twin, a figure with its alt text, as one output; close the figure."""
    bundle = {
        "application/vnd.jupyter.widget-view+json": {
            "version_major": 2,
            "version_minor": 0,
            "model_id": view.model_id,
        },
        "image/png": figures.png(figure),
        "text/plain": alt,
    }
    display(bundle, metadata={"image/png": {"alt": alt}}, raw=True)
