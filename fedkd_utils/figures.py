"""Every figure of the course: one style, colours that survive colour blindness and grey, and an alt text with each.

A function returns ``(figure, alt)``; :func:`show` is the only way to display them. The alt sentence stands in the
output as text, so that strict validation compares it, a screen reader speaks it, and a changed figure is noticed.
Figures of trainings say only what does not depend on the processor.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.patheffects as patheffects
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray
from PIL import Image

from fedkd_utils import grids
from fedkd_utils.calibration import Cartilage
from fedkd_utils.methods import ROWS
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES

#: Femoral red, tibial green, patellar blue as in the paper's figures, in shades that differ in lightness too (Tol).
CLASS_COLOURS = {"femoral": "#CC3311", "tibial": "#44AA77", "patellar": "#33BBEE"}
#: What was measured on real knees.
_REAL = "#444444"

CLASS_LINES: dict[str, Any] = {"femoral": "-", "tibial": "--", "patellar": ":"}

_ROW_LOOKS: dict[str, tuple[str, str, str]] = {
    "teacher_only": ("#777777", "s", ":"),
    "local_only": ("#EE7733", "^", "--"),
    "local_uamt": ("#EE7733", "^", ":"),
    "finetune": ("#222222", "P", "-"),
    "finetune_uamt": ("#222222", "P", ":"),
    "finetune_local": ("#555500", "P", "--"),
    "fedavg": ("#0077BB", "o", "-."),
    "fedprox": ("#0077BB", "o", "--"),
    "fedbn": ("#0077BB", "o", ":"),
    "fedavg_bn": ("#0077BB", "8", "-"),
    "mean_teacher": ("#33BBEE", "v", "-"),
    "uamt": ("#33BBEE", "v", "--"),
    "ssfl_released": ("#009988", "<", "-"),
    "ssfl_published": ("#009988", "<", "--"),
    "fedsemi": ("#009988", ">", "-."),
    "dual_kd": ("#AA3377", "D", "-"),
    "feature_only": ("#AA3377", "D", "--"),
    "response_only": ("#AA3377", "D", "-."),
    "neither": ("#AA3377", "D", ":"),
    "pooled": ("#999933", "*", "-"),
    "teacher_random": ("#777777", "s", "--"),
    "finetune_random": ("#222222", "X", "-."),
    "finetune_random_local": ("#555500", "X", ":"),
    "chosen_finetune": ("#117733", "H", "-"),
    "teacher_protocols": ("#777777", "s", "-."),
    "finetune_protocols": ("#332288", "X", "-"),
    "finetune_protocols_local": ("#332288", "P", "-."),
    "mixed_protocols": ("#117733", "H", "--"),
    "dual_kd_random": ("#CC6677", "d", "-"),
    "strong_kd": ("#CC3311", "p", "-"),
    "strong_kd_random": ("#CC3311", "p", "--"),
    "trusted_kd": ("#CC3311", "p", "-."),
    "started_kd": ("#CC3311", "p", ":"),
    "combined_kd": ("#882255", "h", "-"),
    "teacher_recontrasted": ("#777777", "s", "-"),
    "finetune_recontrasted": ("#222222", "X", "--"),
    "combined_kd_recontrasted": ("#882255", "h", "--"),
    "small_fedavg": ("#0077BB", ".", "-"),
    "small_kd": ("#CC3311", ".", "--"),
    "small_kd_random": ("#882255", ".", ":"),
}
#: Rows of one family share colour and marker: how much of the marker is filled goes with the line.
_FILLS: dict[str, Any] = {"-": "full", "--": "left", "-.": "bottom", ":": "none"}

#: Title, colour, marker and line of every row of the comparison, the same in all figures.
ROW_STYLE: dict[str, tuple[str, str, str, str]] = {
    name: (method.title, *_ROW_LOOKS[name]) for name, method in ROWS.items()
}
_BY_TITLE = {title: (colour, marker, line) for title, colour, marker, line in ROW_STYLE.values()}
_OTHERS = [
    ("#0077BB", "o", "-"),
    ("#EE7733", "^", "--"),
    ("#009988", "s", "-."),
    ("#AA3377", "D", ":"),
    ("#777777", "v", "-"),
    ("#222222", "P", "--"),
]
#: What a prediction drew and the truth does not have, and the other way round: colour and marker.
ERROR_STYLE = {"drawn, not true": ("#FFDD55", "+"), "true, not drawn": ("#EE66EE", "o")}

STYLE: Any = {
    "figure.dpi": 96,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "image.cmap": "gray",
}

Volume = NDArray[Any]
Drawn = tuple[Figure, str]


def show(figure: Figure, alt: str) -> None:
    """Display a figure with its alt text in one bundle, and close it.

    Raises:
        ValueError: the alt text is missing or too short to say anything.
    """
    if len(alt.strip()) < 20:
        raise ValueError("a figure needs an alt text: one sentence that says what a reader should see in it.")
    display({"image/png": png(figure), "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)


def png(figure: Figure) -> bytes:
    """A figure as a PNG with 64 shades of each primary colour, a third smaller than with all; closes the figure."""
    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    pixels = np.asarray(Image.open(whole).convert("RGB"), dtype=np.int16)
    rounded = np.clip((pixels + 2) // 4 * 4, 0, 255).astype(np.uint8)
    Image.fromarray(rounded).save(small, format="png", optimize=True)
    return small.getvalue()


def _new(rows: int, columns: int, width: float, height: float) -> tuple[Figure, NDArray[Any]]:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, axes


def grey_window(image: Volume) -> tuple[float, float]:
    """The values drawn black and white: the 1st and the 99.5th percentile."""
    low, high = np.percentile(image, [1, 99.5])
    return float(low), float(max(high, low + 1e-6))


def _slice(axis: Any, image: Volume, index: int, spacing_mm: Sequence[float], window: tuple[float, float]) -> None:
    """One sagittal slice as a radiologist sees it: anterior to the left, superior up, true proportions."""
    axis.imshow(
        image[index].T[::-1, ::-1],
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        aspect=spacing_mm[2] / spacing_mm[1],
        interpolation="nearest",
    )
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for x, y, letter in ((0.02, 0.5, "A"), (0.93, 0.5, "P"), (0.48, 0.93, "S"), (0.48, 0.02, "I")):
        rim = [patheffects.withStroke(linewidth=1.5, foreground="black")]
        axis.text(x, y, letter, transform=axis.transAxes, color="white", fontsize=7, path_effects=rim)


def _outline(axis: Any, label: Volume, index: int) -> None:
    for value in CARTILAGES:
        mask = (label[index] == value).T[::-1, ::-1]
        if mask.any():
            name = CLASS_NAMES[value]
            axis.contour(mask, [0.5], colors=CLASS_COLOURS[name], linestyles=CLASS_LINES[name], linewidths=1.3)


def _class_legend(figure: Figure, names: Sequence[str] = tuple(CLASS_COLOURS), errors: bool = False) -> None:
    handles = [Line2D([], [], color=CLASS_COLOURS[n], linestyle=CLASS_LINES[n], label=f"{n} cartilage") for n in names]
    for name, (colour, marker) in ERROR_STYLE.items() if errors else ():
        face = "none" if marker == "o" else colour
        style: Any = {"linestyle": "none", "marker": marker, "color": colour, "markerfacecolor": face}
        on_grey = [patheffects.withStroke(linewidth=4, foreground="#444444")]  # as on a volume: yellow is lost on paper
        handles.append(Line2D([], [], label=name, path_effects=on_grey, **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def _where(label: Volume | None, slices: int, total: int) -> list[int]:
    """Slices spread over the part that holds cartilage, or over the middle; fewer when there are not so many."""
    first, end = int(0.15 * total), total - int(0.15 * total)
    if label is not None and (label > 0).any():
        inside = np.flatnonzero((label > 0).any(axis=(1, 2)))
        first, end = int(inside[0]), int(inside[-1]) + 1
    count = min(slices, end - first)
    return [first + int((k + 0.5) * (end - first) / count) for k in range(count)]


def montage(
    image: Volume, spacing_mm: Sequence[float], label: Volume | None = None, slices: int = 6, title: str = ""
) -> Drawn:
    """Sagittal slices of a volume (LR, AP, SI) with outlined cartilage."""
    chosen = _where(label, slices, image.shape[0])
    columns = min(len(chosen), 6)
    rows = -(-len(chosen) // columns)
    figure, axes = _new(rows, columns, 1.75 * columns, 2.0 * rows + 0.5)
    window = grey_window(image)
    for axis in axes.flat[len(chosen) :]:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, chosen, strict=False):
        _slice(axis, image, index, spacing_mm, window)
        axis.set_title(f"slice {index}", fontsize=8)
        if label is not None:
            _outline(axis, label, index)
    figure.suptitle(title)
    alt = f"{title or 'A knee'}: {len(chosen)} sagittal slices of {image.shape[0]}, anterior to the left"
    if label is not None:
        present = [CLASS_NAMES[c] for c in CARTILAGES if (label == c).any()]
        if present:
            _class_legend(figure, present)
        alt += f", with {', '.join(present) or 'no'} cartilage outlined"
    return figure, alt + "."


def side_by_side(volumes: Mapping[str, tuple[Volume, Volume]], spacing_mm: Mapping[str, Sequence[float]]) -> Drawn:
    """One sagittal slice per volume, the one with most cartilage classes and voxels; image above, outlined below."""
    figure, axes = _new(2, len(volumes), 2.2 * len(volumes), 4.9)
    for column, (name, (image, label)) in enumerate(volumes.items()):
        score = sum(np.sqrt((label == c).sum(axis=(1, 2))) for c in CARTILAGES)
        index, window = int(np.argmax(score)), grey_window(image)
        for row in (0, 1):
            _slice(axes[row, column], image, index, spacing_mm[name], window)
        _outline(axes[1, column], label, index)
        axes[0, column].set_title(name, fontsize=9)
    _class_legend(figure)
    return figure, (
        f"One sagittal slice of a knee in {len(volumes)} contrasts ({', '.join(volumes)}), above as scanned, below "
        "with femoral, tibial and patellar cartilage outlined."
    )


def compare_segmentations(
    image: Volume,
    truth: Volume,
    predictions: Mapping[str, Volume],
    spacing_mm: Sequence[float],
    slices: int = 4,
    title: str = "",
) -> Drawn:
    """Truth in the first row, below it each prediction with its errors, cut to where anything was drawn.

    Args:
        image, truth, predictions: (LR, AP, SI) on one grid.
    """
    chosen = _where(truth, slices, image.shape[0])
    labels = {"truth": truth, **predictions}
    near = _around(np.stack([label[chosen] for label in labels.values()]).max(axis=(0, 1)) > 0)
    height = 2.4 * (near[1].stop - near[1].start) * spacing_mm[2] / ((near[0].stop - near[0].start) * spacing_mm[1])
    figure, axes = _new(len(labels), len(chosen), 2.5 * len(chosen), (height + 0.1) * len(labels) + 0.4)
    window, part, truth = grey_window(image), image[:, *near], truth[:, *near]
    for row, (name, whole) in enumerate(labels.items()):
        label = whole[:, *near]
        for axis, index in zip(axes[row], chosen, strict=True):
            _slice(axis, part, index, spacing_mm, window)
            _outline(axis, label, index)
            _mark_errors(axis, label[index], truth[index])
        axes[row, 0].set_ylabel(name)
    for axis, index in zip(axes[0], chosen, strict=True):
        axis.set_title(f"slice {index}", fontsize=8)
    _class_legend(figure, errors=True)
    figure.suptitle(title)
    return figure, (
        f"{title}{': ' * bool(title)}{len(chosen)} sagittal slices around the cartilage: the truth outlined in the "
        f"first row, then {', '.join(predictions)}, with a + on each voxel drawn but not true and an o on each true "
        "but not drawn."
    )


def _around(mask: Volume, margin: int = 6) -> tuple[slice, slice]:
    """The rectangle that holds a mask and a margin; everything when the mask is empty."""
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1])
    ends = [np.flatnonzero(mask.any(axis=other)) for other in (1, 0)]
    x, y = (slice(max(int(e[0]) - margin, 0), int(e[-1]) + margin + 1) for e in ends)
    return slice(x.start, min(x.stop, mask.shape[0])), slice(y.start, min(y.stop, mask.shape[1]))


def _mark_errors(axis: Any, label: Volume, truth: Volume) -> None:
    wrong = label != truth
    for mask, (colour, marker) in zip((wrong & (label > 0), wrong & (label == 0)), ERROR_STYLE.values(), strict=True):
        y, x = np.nonzero(mask.T[::-1, ::-1])
        style = {"facecolors": "none", "edgecolors": colour} if marker == "o" else {"color": colour}
        axis.scatter(x, y, s=9, marker=marker, linewidths=0.7, **style)


def heat(image: Volume, values: Volume, spacing_mm: Sequence[float], name: str, slices: int = 4) -> Drawn:
    """Slices of a volume above, a map of numbers on the same slices below, with a colour bar."""
    chosen = _where(None, slices, image.shape[0])
    figure, axes = _new(2, len(chosen), 2.1 * len(chosen), 4.6)
    window, top = grey_window(image), float(np.percentile(values, 99.9))
    drawn: Any = None
    for column, index in enumerate(chosen):
        _slice(axes[0, column], image, index, spacing_mm, window)
        _slice(axes[1, column], values, index, spacing_mm, (0.0, top))
        drawn = axes[1, column].images[0]
        drawn.set_cmap("magma")
    figure.colorbar(drawn, ax=axes[1, :], label=name, shrink=0.8)
    return (
        figure,
        f"{len(chosen)} sagittal slices of a volume, and below each a map of the {name}: bright where it is large.",
    )


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, title: str, *, log_x: bool = False
) -> Drawn:
    """Lines of (x, y) points by name; ``log_x``: equal factors of x at equal distances."""
    figure, axes = _new(1, 1, 6.0, 3.4)
    axis, ends = axes[0, 0], []
    for i, (name, points) in enumerate(series.items()):
        x, y = np.array(points, dtype=float).T
        colour, marker, line = _BY_TITLE.get(name, _OTHERS[i % len(_OTHERS)])
        axis.plot(x, y, color=colour, linestyle=line, marker=marker if len(x) <= 30 else None, label=name)
        ends.append(f"{name} {'higher' if y[-1] > y[0] else 'lower' if y[-1] < y[0] else 'where it began'}")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log_x:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    columns = 2 if len(series) == 4 else min(len(series), 3)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    lines = f"{len(series)} line{'s' * (len(series) > 1)}"
    return figure, f"{title}: {ylabel} over {xlabel}, {lines}; at its end, {', '.join(ends)}."


def dots_by_row(frame: pd.DataFrame) -> Drawn:
    """Dice of every test volume as a dot, the mean as a bar: ``frame`` has the columns row, class, dice."""
    rows = [r for r in ROW_STYLE if r in set(frame["row"])]
    names = [CLASS_NAMES[c] for c in CARTILAGES]
    if not rows:
        raise ValueError(f"nothing to draw: no row of the frame is one of {', '.join(ROW_STYLE)}.")
    figure, axes = _new(1, len(names), 3.0 * len(names), 3.3)
    for axis, name in zip(axes[0], names, strict=True):
        for x, row in enumerate(rows):
            title, colour, marker, _ = ROW_STYLE[row]
            y = frame.loc[(frame["row"] == row) & (frame["class"] == name), "dice"].to_numpy(float)
            spread = np.linspace(-0.18, 0.18, len(y)) if len(y) > 1 else np.zeros(len(y))
            axis.plot(x + spread, y, marker, color=colour, markersize=4, alpha=0.7, label=title)
            if np.isfinite(y).any():  # the mean of nothing would warn
                axis.hlines(np.nanmean(y), x - 0.3, x + 0.3, color=colour, linewidth=2.5)
        axis.set(title=f"{name} cartilage", ylim=(-0.02, 1.0), xticks=range(len(rows)), ylabel="Dice")
        axis.set_xticklabels([ROW_STYLE[r][0].replace(", ", ",\n").replace(" ", "\n", 1) for r in rows], fontsize=7)
    counts = frame[frame["class"].isin(names)].groupby(["row", "class"]).size()
    count = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    titles = "; ".join(ROW_STYLE[r][0] for r in rows)
    return (
        figure,
        f"Dice of {count} test volumes for each cartilage, one dot a volume, a bar for the mean. Rows: {titles}.",
    )


def bars(values: Mapping[str, float], ylabel: str, title: str) -> Drawn:
    """One bar per name with its number, to three decimals at most; a row of the comparison in its own colour."""
    figure, axes = _new(1, 1, 6.0, 0.5 * len(values) + 1.2)
    axis, names = axes[0, 0], list(values)
    colours = [_BY_TITLE[n][0] if n in _BY_TITLE else "#0077BB" for n in names]
    drawn = axis.barh(names[::-1], [values[n] for n in names[::-1]], color=colours[::-1])
    known = [value for value in values.values() if math.isfinite(value)]
    span = max(0.0, *known) - min(0.0, *known)
    digits = 0 if span == 0 else max(0, 2 - math.floor(math.log10(span)))
    axis.bar_label(drawn, fmt=f"%.{min(digits, 3)}f", padding=3, fontsize=9)
    axis.margins(x=0.35 if min(known) < 0 else 0.12)  # room for the numbers
    axis.axvline(0, color="#222222", linewidth=0.8)
    axis.set(xlabel=ylabel, title=title)
    order = sorted(names, key=lambda n: -values[n])
    return figure, f"{title}: {ylabel} as {len(values)} bars; the highest is {order[0]}."


def made_and_real_knees(
    made: Mapping[str, Sequence[Cartilage]], literature: Mapping[str, Mapping[str, Sequence[float]]]
) -> Drawn:
    """Volume, extent and thickness of made cartilages beside what manual maps of real knees say, a column for each.

    Args:
        made: the cartilages of several subjects, by name.
        literature: as :data:`calibration.LITERATURE`.
    """
    figure, axes = _new(3, len(made), 3.0 * len(made), 7.4)
    facts = []
    for (top, middle, bottom), (name, cartilages) in zip(axes.T, made.items(), strict=True):
        known, colour, count = literature[name], CLASS_COLOURS[name], len(cartilages)
        spread = np.linspace(-0.2, 0.2, count)
        volumes_ml = [cartilage.volume_ml for cartilage in cartilages]
        top.plot(spread, volumes_ml, "o", color=colour, alpha=0.7)
        if "range_ml" in known:
            top.vlines(1, *known["range_ml"], color=_REAL, linewidth=2)
        top.plot([1], known["mean_ml"], "_", markersize=22, markeredgewidth=3, color=_REAL)
        top.plot([1], known["one_knee_ml"], "D", color=_REAL, markersize=6, fillstyle="none")
        top.set(title=f"{name} cartilage", ylabel="volume, ml", xlim=(-0.6, 1.6), xticks=[0, 1], ylim=(0, None))
        top.set_xticklabels([f"made (n = {count})", "manual maps"])
        for axis in range(3):
            extents_mm = [cartilage.extent_mm[axis] for cartilage in cartilages]
            middle.plot(axis + spread - 0.1, extents_mm, "o", color=colour, alpha=0.7, markersize=4)
            middle.plot([axis + 0.3], [known["extent_mm"][axis]], "D", color=_REAL, markersize=6, fillstyle="none")
        middle.set(ylabel="extent, mm", xlim=(-0.6, 2.7), xticks=[0, 1, 2], ylim=(0, None))
        middle.set_xticklabels(["left-right", "front-back", "up-down"], fontsize=8)
        low, high = known["thickness_mm"]
        bottom.axhspan(low, high, color=_REAL, alpha=0.15, linewidth=0)
        order = sorted(cartilages, key=lambda cartilage: float(np.median(cartilage.thickness_mm)))
        for place, cartilage in enumerate(order):
            bottom.vlines(place, *cartilage.thickness_range_mm, color=colour, linewidth=2)
            bottom.plot([place], [np.median(cartilage.thickness_mm)], "o", color=colour, markersize=4)
        bottom.set(ylabel="thickness, mm", xlabel="made knees, thin to thick", xticks=[], ylim=(0, None))
        medians_mm = [float(np.median(cartilage.thickness_mm)) for cartilage in cartilages]
        facts.append(
            f"{name}: volume {np.mean(volumes_ml):.1f} against {known['mean_ml'][0]:.1f} ml, median thickness "
            f"{min(medians_mm):.1f} to {max(medians_mm):.1f} mm against {low:g} to {high:g} mm"
        )
    handles = [
        Line2D([], [], linestyle="none", marker="_", markersize=14, markeredgewidth=3, color=_REAL, label="mean of 68"),
        Line2D([], [], color=_REAL, linewidth=2, label="range of 68"),
        Line2D([], [], linestyle="none", marker="D", fillstyle="none", color=_REAL, label="one measured knee"),
        Patch(color=_REAL, alpha=0.15, label="measured, 10 to 90 %"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure, f"Made cartilages beside manual maps of real knees. {'; '.join(facts)}."


def bars_of_bytes(ledger: pd.DataFrame) -> Drawn:
    """What travelled in each round, by direction and kind: ``ledger`` has round, direction, what, bytes."""
    sums = ledger.assign(kind=ledger["what"] + " " + ledger["direction"]).pivot_table(
        index="round", columns="kind", values="bytes", aggfunc="sum", fill_value=0
    )
    figure, axes = _new(1, 1, 6.0, 3.2)
    base = np.zeros(len(sums))
    hatches = ["", "//", "..", "xx"]
    for i, kind in enumerate(sums.columns):
        height = sums[kind].to_numpy(float) / 1e6
        axes[0, 0].bar(
            sums.index, height, bottom=base, color=_OTHERS[i % 4][0], hatch=hatches[i % 4], label=kind, alpha=0.85
        )
        base += height
    axes[0, 0].set(xlabel="round", ylabel="MB of all clients", title="What travels", ylim=(0, 1.05 * base.max()))
    figure.legend(loc="outside lower center", ncols=len(sums.columns), frameon=False)
    totals = "; ".join(f"{kind} {total / 1e6:.1f} MB" for kind, total in sums.sum().items())
    return (
        figure,
        f"Megabytes sent in each round of {sums.index.max()}, stacked by kind and direction. In all: {totals}.",
    )


def forest(frame: pd.DataFrame, title: str, xlabel: str) -> Drawn:
    """Differences with their intervals, one line each and zero marked: ``frame`` has row, difference, low and high.

    A filled marker says that the interval excludes zero. Rows keep their order, from the top. Variants of one and the
    same row are named by what differs.
    """
    figure, axes = _new(1, 1, 6.6, 0.3 * len(frame) + 1.3)
    axis, names = axes[0, 0], [_title(row) for row in frame["row"]]
    variants = {row.partition(" ")[0] for row in frame["row"]}
    if len(variants) == 1 and all(" " in row for row in frame["row"]):
        names = [_difference(row.partition(" ")[2]) for row in frame["row"]]
    above = below = 0
    for y, line in enumerate(frame.itertuples()):
        colour = ROW_STYLE[line.row][1] if line.row in ROW_STYLE else "#222222"
        clear = line.low > 0 or line.high < 0
        above, below = above + (line.low > 0), below + (line.high < 0)
        axis.plot([line.low, line.high], [y, y], color=colour, linewidth=2)
        axis.plot([line.difference], [y], "o", color=colour, fillstyle="full" if clear else "none", markersize=6)
    axis.axvline(0, color="#222222", linewidth=1)
    axis.set(title=title, xlabel=xlabel, yticks=range(len(frame)), ylim=(len(frame) - 0.5, -0.5))
    axis.set_yticklabels(names, fontsize=8)
    return figure, (
        f"{title}: {len(frame)} differences as points with 95 % intervals as bars; {above} lie above zero, {below} "
        f"below it, and {len(frame) - above - below} hold zero inside. From the top: {'; '.join(names)}."
    )


def pareto(frame: pd.DataFrame, cost: str, xlabel: str, title: str, named: Sequence[str] = ()) -> Drawn:
    """Dice against a cost, and the front, ringed: the rows that no cheaper row reaches.

    Args:
        frame: columns row, dice and the one named by ``cost``.
        named: the rows in the legend, besides those on the front; the others are small grey dots.
    """
    figure, axes = _new(1, 1, 7.4, 4.6)
    axis, front = axes[0, 0], pareto_front(frame, cost)
    shown = frame["row"].isin([*front, *named])
    rest = frame[~shown]
    others = f"{len(rest)} other row{'s' * (len(rest) > 1)}" if len(rest) else None
    axis.plot(rest[cost], rest["dice"], ".", color="#999999", markersize=5, label=others)
    for line in frame[shown].sort_values("dice", ascending=False).itertuples():  # the legend from top to bottom
        name, colour, marker, dashes = ROW_STYLE[line.row]
        x, y, fill = getattr(line, cost), line.dice, _FILLS[dashes]
        axis.plot([x], [y], marker, color=colour, markersize=8, fillstyle=fill, markerfacecoloralt="white", label=name)
    edge = frame[frame["row"].isin(front)].sort_values([cost, "dice"])
    axis.plot(edge[cost], edge["dice"], "o", color="#222222", markersize=14, fillstyle="none")
    axis.plot(edge[cost], edge["dice"], color="#222222", linewidth=1, drawstyle="steps-post", zorder=0)
    axis.set(title=title, xlabel=xlabel, ylabel="mean Dice")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    on_front = "; ".join(_title(row) for row in front)
    return (
        figure,
        f"{title}: mean Dice over {xlabel} of {len(frame)} rows. On the front, from cheap to dear: {on_front}.",
    )


def pareto_front(frame: pd.DataFrame, cost: str) -> list[str]:
    """The rows with a higher Dice than every row that costs no more, from cheap to dear."""
    front: list[str] = []
    best = -np.inf
    for line in frame.sort_values([cost, "dice"], ascending=[True, False]).itertuples():
        if line.dice > best:
            front.append(str(line.row))
            best = float(line.dice)
    return front


def _title(row: str) -> str:
    """The title of a row, or of a row and what differs, "dual_kd clients_2"."""
    name, _, label = row.partition(" ")
    return f"{ROWS[name].title} ({_difference(label)})" if label else ROWS[name].title


def _difference(label: str) -> str:
    """The label of a variant in words; behind a comma may stand where."""
    change, comma, where = label.partition(", ")
    return grids.in_words(change) + comma + where
