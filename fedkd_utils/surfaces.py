"""Cartilage in 3D: live and rotatable in JupyterLab, a picture with its sentence everywhere else, both in one output.

The live part is a plotly widget. Its triangles and its library reach the browser from the kernel and are not stored:
the notebook keeps only the picture, some 100 kB, which ``rendering`` draws without a graphics card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray
from plotly.subplots import make_subplots

from fedkd_utils import acquisition, anatomy, figures, meshes, rendering
from fedkd_utils.acquisition import SCANNERS
from fedkd_utils.meshes import Mesh
from fedkd_utils.opened import opened
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES
from fedkd_utils.site_folder import Item
from fedkd_utils.viewer import show_both

Colour = Literal["class", "distance", "thickness"]
Label = ArrayLike | str | Path | Item

BONE_COLOUR = "#D9CDB4"
BONE_OPACITY = 0.25
#: What a colour says: colour map, smallest and largest value in mm, words.
SCALES: dict[str, tuple[str, float, float, str]] = {
    "distance": ("RdBu_r", -3.0, 3.0, "distance to the truth, mm (+ outside it)"),
    "thickness": ("viridis", 0.0, 5.0, "thickness, mm"),
}
#: Name -> azimuth and elevation of the eye. The first is where the live view begins.
VIEWS = {"from the front": (30.0, 15.0), "from below": (20.0, -35.0)}

#: Where plotly's lamp hangs: right, up and away from the eye, which it follows. Here at the upper left of the eye.
LAMP = {"x": -5e4, "y": 6e4, "z": -1e5}


class _Panel:
    """The surfaces of one label map, and the number at every vertex that its colour shows."""

    def __init__(self, name: str, label: NDArray[np.uint8], spacing_mm: Sequence[float]) -> None:
        self.name = name
        self.meshes = {CLASS_NAMES[c]: meshes.mesh_of(label == c, spacing_mm) for c in CARTILAGES if (label == c).any()}
        self.values: dict[str, NDArray[np.float64]] = {}

    def measure(self, colour: Colour, truth: _Panel | None) -> None:
        """Fill :attr:`values`; a cartilage that the truth does not have stays without."""
        for name, mesh in self.meshes.items():
            if colour == "thickness":
                self.values[name] = meshes.thickness_mm(mesh)
            elif truth is not None and truth is not self and name in truth.meshes:
                self.values[name] = meshes.signed_distance_mm(mesh, truth.meshes[name])

    def caption(self, colour: Colour) -> str:
        """The numbers behind the colours in one line, or what is not there."""
        if not self.meshes:
            return "draws no cartilage"
        if not self.values:
            return ""
        if colour == "thickness":
            return ", ".join(f"{name} {np.median(v):.1f}" for name, v in self.values.items()) + " mm (median)"
        apart = np.abs(np.concatenate(list(self.values.values())))
        return f"mean {apart.mean():.1f} mm, 95 % within {np.percentile(apart, 95):.1f} mm"


def show_surfaces(
    labels: Mapping[str, Label] | Label,
    spacing_mm: Sequence[float] | None = None,
    colour: Colour = "class",
    bones: ArrayLike | None = None,
    title: str = "Cartilage surfaces",
) -> go.FigureWidget:
    """Show the cartilages of one label map, or of several side by side, as surfaces in mm.

    Args:
        labels: a label map, or several by name of the method: arrays (LR, AP, SI), label files, or items of a cohort.
        spacing_mm: voxel sizes of arrays; 1 mm when not given.
        colour: by "class"; by signed "distance" to the map named "truth" in mm, positive where a surface lies outside
            the true one; or by "thickness" in mm.
        bones: a mask of the bones, or a tissue map (``anatomy.tissue_map``), on the grid of the label maps; drawn
            translucent. Of a made knee, see :func:`made_bones`.
        title: of the figure.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a label map that is none, one map that is empty, no truth to measure from or one on another grid,
            bones on another grid.
    """
    if colour not in ("class", *SCALES):
        raise ValueError(f"colour is {colour!r}: choose class, distance or thickness.")
    named: Mapping[str, Label] = labels if isinstance(labels, Mapping) else {"": labels}
    panels, shapes = [], {}
    for name, given in named.items():
        label, spacing = _label(given, spacing_mm, name or "the label")
        panels.append(_Panel(name, label, spacing))
        shapes[name] = (label.shape, spacing)
    if not any(panel.meshes for panel in panels):
        raise ValueError("there is no cartilage in the label: nothing to draw. Check the file, or the method.")
    truth = next((panel for panel in panels if panel.name == "truth"), None)
    if colour == "distance" and (truth is None or len(panels) < 2):
        raise ValueError('distances are measured from the truth: give labels={"truth": ..., "a method": ...}.')
    for panel in panels:
        if colour == "distance" and not _alike(shapes[panel.name], shapes["truth"]):
            raise ValueError(f"{panel.name} has another shape or spacing than the truth: distances need one grid.")
        if colour != "class":
            panel.measure(colour, truth)
    skeleton = _bones(bones, *next(iter(shapes.values()))) if bones is not None else None
    view = _live(panels, skeleton, colour, title)
    show_both(view, *_still(panels, skeleton, colour, title))
    return view


def _label(given: Label, spacing_mm: Sequence[float] | None, name: str) -> tuple[NDArray[np.uint8], tuple[float, ...]]:
    """A label map in RAS order, and its spacing."""
    if isinstance(given, Item):
        if given.label is None:
            raise ValueError(f"{given.name}: this item has no label, so there is no surface.")
        given = given.label
    if isinstance(given, str | Path):
        held = opened(given)
        return held.marks(given, name), held.spacing_mm
    held = opened(given, spacing_mm=spacing_mm)
    return held.marks(held.image, name), held.spacing_mm


def _alike(one: tuple[Any, Sequence[float]], other: tuple[Any, Sequence[float]]) -> bool:
    """Whether shape and spacing are the same."""
    return bool(one[0] == other[0] and np.allclose(one[1], other[1], rtol=1e-3))


def _bones(bones: ArrayLike, shape: tuple[int, ...], spacing_mm: Sequence[float]) -> Mesh:
    mask = np.asarray(bones)
    if mask.shape != shape:
        raise ValueError(f"the bones have shape {mask.shape}, the label {shape}: give both on one grid.")
    if mask.dtype != bool:
        mask = np.isin(mask, (anatomy.CORTICAL, anatomy.MARROW))
    return meshes.mesh_of(mask, spacing_mm)


def made_bones(item: Item) -> NDArray[np.bool_]:
    """The bones of a made knee on the grid of its file, in RAS order: real label files do not hold them.

    Raises:
        ValueError: the item is not from a made cohort.
    """
    try:
        made = json.loads((item.image.parents[1] / "dataset.json").read_bytes())["provenance"]
        scanner, scan_seed = SCANNERS[made["scanner"]["name"]], int(made["scan_seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{item.image}: not a made knee, so its bones are not known. Leave the bones out.") from error
    _, _, pose = acquisition.begin_scan(item.subject, scanner, scan_seed)
    tissue = anatomy.tissue_map(anatomy.draw_knee(item.subject), scanner.shape, scanner.spacing_mm, pose)
    return np.isin(tissue, (anatomy.CORTICAL, anatomy.MARROW))


def _framed(panels: Sequence[_Panel], view: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The middle of all cartilage as an eye sees it, and half its size across, up and in depth, in mm."""
    seen = np.concatenate([mesh.vertices for panel in panels for mesh in panel.meshes.values()]) @ view.T
    low, high = seen.min(axis=0), seen.max(axis=0)
    return (low + high) / 2 @ view, (high - low) / 2


# ------------------------------------------------------------------------------------------------------------ live
def _live(panels: Sequence[_Panel], bones: Mesh | None, colour: Colour, title: str) -> go.FigureWidget:
    """One scene a label map, all turning together; a click in the legend hides a cartilage everywhere."""
    grid = make_subplots(
        rows=1,
        cols=len(panels),
        specs=[[{"type": "scene"}] * len(panels)],
        subplot_titles=[f"{p.name}<br><sub>{p.caption(colour) or '&nbsp;'}</sub>" for p in panels],
        horizontal_spacing=0.01,
    )
    listed: set[str] = set()
    for column, panel in enumerate(panels, start=1):
        parts = [(name, mesh, figures.CLASS_COLOURS[name], 1.0) for name, mesh in panel.meshes.items()]
        if bones is not None:
            parts.append(("bones", bones, BONE_COLOUR, BONE_OPACITY))
        for name, mesh, plain, opacity in parts:
            trace = _trace(mesh, panel.values.get(name), plain, opacity)
            trace.update(name=name, legendgroup=name, showlegend=name not in listed)
            listed.add(name)
            grid.add_trace(trace, row=1, col=column)
    view = rendering.camera(*next(iter(VIEWS.values())))
    centre, _ = _framed(panels, view)
    everything = np.concatenate([mesh.vertices for panel in panels for mesh in panel.meshes.values()])
    reach = float(np.linalg.norm(everything - centre, axis=1).max())  # inside the picture from every side
    axes = {
        axis: {"visible": False, "range": [float(c - reach), float(c + reach)]}
        for axis, c in zip(("xaxis", "yaxis", "zaxis"), centre, strict=True)
    }
    camera = {
        "eye": dict(zip("xyz", (2.5 * view[2]).tolist(), strict=True)),
        "up": {"x": 0, "y": 0, "z": 1},
        "projection": {"type": "orthographic"},
    }
    grid.update_scenes(aspectmode="manual", aspectratio={"x": 2.1, "y": 2.1, "z": 2.1}, camera=camera, **axes)
    side = min(400, 1050 // len(panels))  # pixels of a scene
    if colour != "class":
        grid.update_layout(coloraxis=_colour_axis(colour))
    grid.update_layout(
        title={"text": title, "x": 0.02, "y": 0.98, "yanchor": "top"},
        width=max(side * len(panels) + (120 if colour != "class" else 0), 520),
        height=side + 110,
        margin={"l": 0, "r": 0, "t": 80, "b": 10},
        legend={"orientation": "h"},
    )
    live = go.FigureWidget(grid)
    live._config = {"scrollZoom": False, "displaylogo": False}  # the wheel scrolls the page
    _turn_together(live, len(panels))
    return live


def _colour_axis(colour: Colour) -> dict[str, Any]:
    """What a colour says, in plotly's words; one for all surfaces."""
    scale, low, high, words = SCALES[colour]
    colours = colormaps[scale](np.linspace(0, 1, 21))
    steps = [[n / 20, "rgb({},{},{})".format(*(int(255 * c) for c in row[:3]))] for n, row in enumerate(colours)]
    bar = {"title": {"text": words, "side": "right"}, "thickness": 12, "len": 0.8}
    return {"cmin": low, "cmax": high, "colorscale": steps, "colorbar": bar}


def _trace(mesh: Mesh, values: NDArray[np.float64] | None, plain: str, opacity: float) -> go.Mesh3d:
    x, y, z = mesh.vertices.astype(np.float32).T
    i, j, k = mesh.faces.T
    look: dict[str, Any] = {"color": plain}
    if values is not None:
        look = {"intensity": values.astype(np.float32), "coloraxis": "coloraxis"}
    return go.Mesh3d(
        x=x,
        y=y,
        z=z,
        i=i,
        j=j,
        k=k,
        opacity=opacity,
        lighting={"ambient": 0.6, "diffuse": 0.6, "specular": 0.2, "roughness": 0.6},
        lightposition=LAMP,
        hovertemplate="%{intensity:.1f} mm" if values is not None else None,
        hoverinfo="skip" if opacity < 1 else "name",
        **look,
    )


def _turn_together(live: go.FigureWidget, count: int) -> None:
    """When one scene has been turned, the others follow."""
    scenes = [live.layout["scene" if n == 0 else f"scene{n + 1}"] for n in range(count)]
    following = False

    def follow(scene: Any, camera: Any) -> None:
        nonlocal following
        if following:
            return
        following = True
        try:
            with live.batch_update():
                for other in scenes:
                    if other is not scene:
                        other.camera = camera
        finally:
            following = False

    for scene in scenes:
        scene.on_change(follow, "camera")


# ----------------------------------------------------------------------------------------------------------- still
def _still(panels: Sequence[_Panel], bones: Mesh | None, colour: Colour, title: str) -> tuple[Figure, str]:
    """A column for each label map, a row for each view, and the sentence that says so."""
    frames = {where: _framed(panels, rendering.camera(*angles)) for where, angles in VIEWS.items()}
    half = max(size.max() for _, size in frames.values()) + 2
    heights = [(size[1] + 2) / half for _, size in frames.values()]
    with figures.plt.rc_context(figures.STYLE):
        figure, axes = figures.plt.subplots(
            len(VIEWS),
            len(panels),
            figsize=(2.9 * len(panels) + 0.7, 2.9 * sum(heights) + 1.0),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
    for column, panel in enumerate(panels):
        bodies = [rendering.Body(mesh, _colours(panel, name, colour)) for name, mesh in panel.meshes.items()]
        if bones is not None:
            bodies.append(rendering.Body(bones, np.array(to_rgb(BONE_COLOUR)), BONE_OPACITY))
        for axis, height, (where, angles) in zip(axes[:, column], heights, VIEWS.items(), strict=True):
            picture = rendering.render(bodies, rendering.camera(*angles), frames[where][0], half)
            empty = int((1 - height) / 2 * len(picture))
            axis.imshow(picture[empty : len(picture) - empty])
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set_visible(False)
            if column == 0:
                axis.set_ylabel(where)
        axes[0, column].set_title(panel.name, fontsize=10)
        axes[-1, column].set_xlabel(panel.caption(colour), fontsize=8)
    present = [name for name in figures.CLASS_COLOURS if any(name in panel.meshes for panel in panels)]
    if any(not panel.values for panel in panels):
        patches = [Patch(color=figures.CLASS_COLOURS[name], label=f"{name} cartilage") for name in present]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9)
    words = "coloured by class"
    if colour != "class":
        scale, low, high, label = SCALES[colour]
        drawn = ScalarMappable(Normalize(low, high), scale)
        figure.colorbar(drawn, ax=axes, label=label, shrink=0.7, extend="both" if low < 0 else "max")
        words = f"coloured by {label.partition(',')[0]}"
    figure.suptitle(title)
    names = ", ".join(panel.name for panel in panels)
    whose = f" of {names}" if len(panels) > 1 else ""
    and_bones = ", the bones translucent" if bones is not None else ""
    return figure, (
        f"{title}: surfaces of {', '.join(present)} cartilage{whose}, {' and '.join(VIEWS)}, {words}{and_bones}."
    )


def _colours(panel: _Panel, name: str, colour: Colour) -> NDArray[np.float64]:
    """The colour of a surface, or of each of its vertices."""
    if name not in panel.values:
        return np.array(to_rgb(figures.CLASS_COLOURS[name]))
    scale, low, high, _ = SCALES[colour]
    return np.asarray(colormaps[scale](Normalize(low, high)(panel.values[name])))[:, :3]
