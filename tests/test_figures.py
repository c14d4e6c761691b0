"""Figures: what is drawn is what was given, the alt text says it, and nothing is shown without one."""

from __future__ import annotations

import io
import itertools
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb, to_rgba
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from fedkd_utils import figures
from fedkd_utils.calibration import Cartilage
from fedkd_utils.methods import ROWS

matplotlib.use("Agg")
SPACING = (4.0, 1.5, 1.0)


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    figures.plt.close("all")


def knee(shape=(10, 24, 30)):
    image = np.random.default_rng(0).random(shape)
    label = np.zeros(shape, np.uint8)
    label[2:8, 6:16, 14:16], label[2:8, 6:16, 10:12], label[4:6, 17:19, 14:20] = 1, 2, 3
    return image, label


# ------------------------------------------------------------------------------------------------------------- showing
def test_show_puts_picture_and_sentence_in_one_bundle_and_closes(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda bundle, **more: shown.append((bundle, more)))
    figure, _ = figures.bars({"a": 1.0, "b": 2.0}, "Dice", "Two bars")
    figures.show(figure, "Two bars, the second twice as long.")
    ((bundle, more),) = shown
    assert Image.open(io.BytesIO(bundle.pop("image/png"))).size > (200, 50)
    assert bundle == {"text/plain": "Two bars, the second twice as long."}
    assert more["metadata"] == {"image/png": {"alt": "Two bars, the second twice as long."}} and more["raw"]
    assert not figures.plt.get_fignums()


@pytest.mark.parametrize("alt", ["", "   ", "a figure"])
def test_a_figure_without_words_is_refused(alt):
    figure, _ = figures.bars({"a": 1.0}, "Dice", "One bar")
    with pytest.raises(ValueError, match="needs an alt text"):
        figures.show(figure, alt)


def test_the_same_data_give_the_same_bytes(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda bundle, **more: shown.append(bundle["image/png"]))
    for _ in range(2):
        figures.show(*figures.montage(knee()[0], SPACING, knee()[1], 4, "Twice"))
    assert shown[0] == shown[1] and b"Software" not in shown[0]


def test_a_png_is_small_and_true_to_its_colours():
    figure, _ = figures.montage(*(knee()[0], SPACING, knee()[1]))
    whole = io.BytesIO()
    figure.savefig(whole, format="png", bbox_inches="tight")
    small = figures.png(figure)
    one, other = (np.asarray(Image.open(f).convert("RGB")).astype(int) for f in (whole, io.BytesIO(small)))
    assert len(small) < 0.9 * whole.tell() and np.abs(one - other).max() <= 2
    assert (other[0, 0] == 255).all(), "white stays white"


# ------------------------------------------------------------------------------------------------------------- colours
#: Machado, Oliveira, Fernandes 2009 (doi:10.1109/TVCG.2009.113), severity 1, on linear RGB.
BLIND = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def as_seen(code, kind):
    srgb = np.array(to_rgb(code))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(BLIND[kind]) @ linear, 0, 1)
    return rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("kind", BLIND)
def test_cartilages_can_be_told_apart_by_every_eye(kind):
    for one, other in itertools.combinations(figures.CLASS_COLOURS.values(), 2):
        assert deltaE_ciede2000(as_seen(one, kind), as_seen(other, kind)) > 10


def test_colour_is_never_alone():
    assert len(set(figures.CLASS_LINES.values())) == len(figures.CLASS_COLOURS)
    for styles in (figures.ROW_STYLE.values(), [("", *style) for style in figures._OTHERS]):
        assert len({(marker, line) for _, _, marker, line in styles}) == len(styles)
    greys = sorted(as_seen(colour, "normal")[0] for colour in figures.CLASS_COLOURS.values())
    assert min(np.diff(greys)) > 5, "the classes differ in lightness too"


# -------------------------------------------------------------------------------------------------------------- slices
def test_a_sagittal_slice_has_anterior_left_superior_up_and_true_proportions():
    image = np.zeros((3, 24, 30))
    image[1, -1, -1], image[1, 0, 0] = 3.0, 1.0  # front top, back bottom
    figure, _ = figures.montage(image, SPACING, None, 1)
    axis = figure.axes[0]
    drawn = np.asarray(axis.images[0].get_array())
    assert drawn.shape == (30, 24) and drawn[0, 0] == 3.0 and drawn[-1, -1] == 1.0
    figure.canvas.draw()
    box = axis.get_window_extent()
    assert box.width / box.height == pytest.approx(24 * 1.5 / (30 * 1.0), rel=0.01)
    where = {t.get_text(): t.get_position() for t in axis.texts}
    assert where["A"][0] < 0.1 and where["P"][0] > 0.9 and where["I"][1] < 0.1 and where["S"][1] > 0.9


@pytest.mark.parametrize(("slices", "shown"), [(1, 1), (4, 4), (6, 6), (7, 6), (40, 6)])
def test_a_montage_spreads_over_the_cartilage(slices, shown):
    image, label = knee()
    figure, alt = figures.montage(image, SPACING, label, slices, "A knee")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    numbers = [int(title.split()[1]) for title in titles]
    assert len(numbers) == shown and numbers == sorted(set(numbers)) and set(numbers) <= set(range(2, 8))
    assert alt.startswith(f"A knee: {shown} sagittal slices of 10, anterior to the left, with femoral, tibial, pat")


@given(st.integers(1, 12), st.integers(1, 50), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_chosen_slices_exist(slices, total, seed):
    label = (np.random.default_rng(seed).random((total, 2, 2)) > 0.8).astype(int)
    for marks in (None, label, 0 * label):
        chosen = figures._where(marks, slices, total)
        assert chosen and chosen == sorted(set(chosen)) and len(chosen) <= slices
        assert 0 <= chosen[0] and chosen[-1] < total
        if marks is not None and marks.any():
            inside = np.flatnonzero(marks.any(axis=(1, 2)))
            assert inside[0] <= chosen[0] and chosen[-1] <= inside[-1]


def test_the_alt_text_of_a_montage_names_what_is_there():
    image, label = knee()
    assert figures.montage(image, SPACING, None, 2)[1] == "A knee: 2 sagittal slices of 10, anterior to the left."
    label[label != 2] = 0
    assert "with tibial cartilage outlined" in figures.montage(image, SPACING, label, 2)[1]
    assert "with no cartilage outlined" in figures.montage(image, SPACING, 0 * label, 2)[1]


def test_errors_are_marked_on_their_voxels_and_the_crop_holds_everything_drawn():
    image, truth = knee()
    prediction = truth.copy()
    prediction[5, 6, 14] = 0  # true, not drawn
    prediction[5, 1, 28] = 1  # an island far away
    prediction[5, 7, 14] = 2  # the wrong class
    figure, alt = figures.compare_segmentations(image, truth, {"student": prediction}, SPACING, slices=10)
    marks = {}
    for axis in figure.axes:
        for points in axis.collections:
            if points.get_offsets().size and len(points.get_paths()) == 1 and axis.get_subplotspec().rowspan.start == 1:
                marks.setdefault(tuple(np.round(points.get_edgecolor()[0], 2)), []).append(points.get_offsets())
    drawn, missed = (tuple(np.round([*to_rgb(colour), 1], 2)) for colour, _ in figures.ERROR_STYLE.values())
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown.shape == (30 - 4, 24 - 0), "rows 4 to 29 and columns 0 to 23: all that was drawn, and 6 voxels"
    (false_positives,), (false_negatives,) = marks[drawn], marks[missed]
    # Columns run from the front (index 23) to the back, rows from the top (index 29) down.
    assert {tuple(p) for p in false_positives} == {(23 - 1, 29 - 28), (23 - 7, 29 - 14)}
    assert {tuple(p) for p in false_negatives} == {(23 - 6, 29 - 14)}
    assert "truth outlined in the first row, then student" in alt
    assert [t.get_text() for t in figure.legends[0].get_texts()][3:] == list(figures.ERROR_STYLE)


def test_an_empty_prediction_and_an_empty_truth_can_be_compared():
    image, truth = knee()
    for label in (truth, 0 * truth):
        figure, _ = figures.compare_segmentations(image, label, {"nothing": 0 * truth}, SPACING)
        figure.canvas.draw()


def test_scanners_side_by_side_show_the_slice_with_most_classes():
    image, label = knee()
    figure, alt = figures.side_by_side(
        {"DESS": (image, label), "T1": (image[:8], label[:8])}, dict.fromkeys(("DESS", "T1"), SPACING)
    )
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert any((shown == image[k].T[::-1, ::-1]).all() for k in (4, 5)), "patellar cartilage is in slices 4 and 5 only"
    assert "2 contrasts (DESS, T1)" in alt


def test_a_heat_map_has_a_colour_bar_with_the_name_and_the_slices_agree():
    image, _ = knee()
    figure, alt = figures.heat(image, image**2, SPACING, "entropy, nats", 3)
    assert any(axis.get_ylabel() == "entropy, nats" for axis in figure.axes) and "map of the entropy, nats" in alt
    for above, below in zip(figure.axes[:3], figure.axes[3:6], strict=True):
        assert np.allclose(np.asarray(above.images[0].get_array()) ** 2, np.asarray(below.images[0].get_array()))


# --------------------------------------------------------------------------------------------------------------- plots
def test_curves_draw_the_points_and_say_which_way_they_go():
    series = {"FedAvg, labelled only": [(1, 0.4), (2, 0.6)], "b": [(1, 0.5), (2, 0.3)], "c": [(1, 0.2), (2, 0.2)]}
    figure, alt = figures.curves(series, "round", "mean Dice", "Dice by round")
    axis = figure.axes[0]
    assert [line.get_xydata().tolist() for line in axis.lines] == [[list(p) for p in v] for v in series.values()]
    assert axis.lines[0].get_color() == figures.ROW_STYLE["fedavg"][1]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("round", "mean Dice")
    assert alt == (
        "Dice by round: mean Dice over round, 3 lines; at its end, FedAvg, labelled only higher, b lower, c where it "
        "began."
    )


def dice_frame():
    rng = np.random.default_rng(1)
    names = ("femoral", "tibial", "patellar")
    return pd.DataFrame(
        [
            {"row": row, "class": name, "dice": rng.random()}
            for row in ("fedavg", "local_only")
            for name in names
            for _ in range(5)
        ]
    )


def test_dots_are_the_cases_and_bars_their_means():
    frame = dice_frame()
    figure, alt = figures.dots_by_row(frame)
    assert "Dice of 5 test volumes" in alt and alt.endswith("Rows: Local only; FedAvg, labelled only.")
    for axis, name in zip(figure.axes, ("femoral", "tibial", "patellar"), strict=True):
        for x, row in enumerate(("local_only", "fedavg")):
            cases = frame[(frame["row"] == row) & (frame["class"] == name)]["dice"]
            assert np.allclose(axis.lines[x].get_ydata(), cases)
            ((start, end),) = (segment for segment in axis.collections[x].get_segments())
            assert start[1] == end[1] == pytest.approx(cases.mean()) and (start[0] + end[0]) / 2 == pytest.approx(x)


def test_missing_values_are_left_out_without_a_warning():
    frame = dice_frame()
    frame.loc[(frame["row"] == "fedavg") & (frame["class"] == "patellar"), "dice"] = np.nan
    frame = frame.drop(frame.index[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, alt = figures.dots_by_row(frame)
    assert "Dice of 4 to 5 test volumes" in alt and len(figure.axes[2].collections) == 1
    with pytest.raises(ValueError, match="nothing to draw: no row of the frame is one of teacher_only"):
        figures.dots_by_row(frame.assign(row="mine"))


def test_bars_name_the_longest_and_keep_the_order():
    figure, alt = figures.bars({"DESS": 0.9, "T1": 0.1, "PD": 0.95}, "mean Dice", "One teacher")
    axis = figure.axes[0]
    assert alt == "One teacher: mean Dice as 3 bars; the highest is PD."
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.950", "0.100", "0.900"]  # every bar has its number
    bars = sorted(axis.patches, key=lambda bar: -bar.get_y())
    assert [bar.get_width() for bar in bars] == [0.9, 0.1, 0.95]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["PD", "T1", "DESS"]


def test_a_bar_of_no_length_has_a_number_and_negative_numbers_have_room():
    figure, _ = figures.bars({"a": 0.0, "b": 0.0}, "gain", "Nothing")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "0"]
    figure, _ = figures.bars({"PD": 0.013, "echo": -0.02}, "gain", "Gain")
    axis = figure.axes[0]
    figure.canvas.draw()
    left = min(text.get_window_extent().x0 for text in axis.texts)
    assert left > axis.get_window_extent().x0  # not over the names


def test_made_knees_stand_beside_the_literature():
    def cartilage(volume_ml: float, thick_mm: float) -> Cartilage:
        return Cartilage(volume_ml, (70.0, 60.0, 40.0), np.array([thick_mm - 0.5, thick_mm, thick_mm + 0.5]))

    known = {"mean_ml": (12.0,), "one_knee_ml": (11.0,), "range_ml": (9.0, 16.0), "extent_mm": (71, 65, 42)}
    known |= {"thickness_mm": (1.5, 3.0)}
    made = {"femoral": [cartilage(10.0, 2.5), cartilage(13.0, 2.0)], "tibial": [cartilage(4.0, 2.2)]}
    figure, alt = figures.made_and_real_knees(made, {"femoral": known, "tibial": {**known, "mean_ml": (5.0,)}})
    assert "femoral: volume 11.5 against 12.0 ml, median thickness 2.0 to 2.5 mm against 1.5 to 3 mm" in alt
    assert "tibial: volume 4.0 against 5.0 ml" in alt
    volume, _, extent, _, thickness, _ = figure.axes
    assert volume.lines[0].get_ydata().tolist() == [10.0, 13.0] and "ml" in volume.get_ylabel()
    assert extent.lines[1].get_ydata().tolist() == [71] and "mm" in extent.get_ylabel()
    medians = [line.get_ydata()[0] for line in thickness.lines]
    assert medians == [2.0, 2.5], "from thin to thick"


def test_a_row_has_one_colour_in_bars_curves_and_dots():
    title, colour = figures.ROW_STYLE["dual_kd"][:2]
    (bar,) = figures.bars({title: 0.5}, "Dice", "One")[0].axes[0].patches
    (line,) = figures.curves({title: [(0, 0.0), (1, 1.0)]}, "round", "Dice", "One")[0].axes[0].lines
    frame = pd.DataFrame([{"row": "dual_kd", "class": "femoral", "dice": 0.5}])
    dot = figures.dots_by_row(frame)[0].axes[0].lines[0]
    assert bar.get_facecolor() == to_rgba(colour) and line.get_color() == dot.get_color() == colour


def test_stacked_bytes_add_up():
    ledger = pd.DataFrame(
        [
            {"round": r, "direction": d, "what": "student", "bytes": 1_000_000 * (r + 1)}
            for r in (1, 2)
            for d in ("down", "up")
            for _ in range(4)
        ]
        + [{"round": 1, "direction": "down", "what": "teacher", "bytes": 500_000}]
    )
    figure, alt = figures.bars_of_bytes(ledger)
    tops = {}
    for bar in figure.axes[0].patches:
        x = round(bar.get_x() + bar.get_width() / 2)
        tops[x] = max(tops.get(x, 0), bar.get_y() + bar.get_height())
    assert tops == pytest.approx({r: v / 1e6 for r, v in ledger.groupby("round")["bytes"].sum().items()})
    assert alt.endswith("In all: student down 20.0 MB; student up 20.0 MB; teacher down 0.5 MB.")


def test_every_row_has_a_look_of_its_own():
    assert list(figures.ROW_STYLE) == list(ROWS)
    assert {row: style[0] for row, style in figures.ROW_STYLE.items()} == {row: m.title for row, m in ROWS.items()}


def test_a_forest_marks_what_excludes_zero():
    frame = pd.DataFrame(
        [
            {"row": "fedavg", "difference": 0.05, "low": 0.02, "high": 0.08},
            {"row": "finetune", "difference": -0.01, "low": -0.03, "high": 0.01},
            {"row": "fedavg clients_2", "difference": -0.2, "low": -0.3, "high": -0.1},
        ]
    )
    figure, alt = figures.forest(frame, "Dual distillation minus each", "difference in Dice")
    assert alt == (
        "Dual distillation minus each: 3 differences as points with 95 % intervals as bars; 1 lie above zero, 1 below "
        "it, and 1 hold zero inside. From the top: FedAvg, labelled only; Fine-tuned teacher; "
        "FedAvg, labelled only (clients 2)."
    )
    axis = figure.axes[0]
    bars, points = axis.lines[0:6:2], axis.lines[1:6:2]
    assert [list(bar.get_xdata()) for bar in bars] == [[0.02, 0.08], [-0.03, 0.01], [-0.3, -0.1]]
    assert [point.get_fillstyle() for point in points] == ["full", "none", "full"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first on top


def test_the_pareto_front_is_what_no_cheaper_row_reaches():
    frame = pd.DataFrame(
        [
            {"row": "fedavg", "dice": 0.7, "mb": 10.0},
            {"row": "dual_kd", "dice": 0.8, "mb": 12.0},
            {"row": "uamt", "dice": 0.75, "mb": 12.0},
            {"row": "teacher_only", "dice": 0.6, "mb": 2.0},
            {"row": "fedprox", "dice": 0.69, "mb": 11.0},
        ]
    )
    assert figures.pareto_front(frame, "mb") == ["teacher_only", "fedavg", "dual_kd"]
    figure, alt = figures.pareto(frame, "mb", "MB", "Dice against bytes")
    assert alt == (
        "Dice against bytes: mean Dice over MB of 5 rows. On the front, from cheap to dear: Teacher only; "
        "FedAvg, labelled only; Dual distillation."
    )
    others, *markers, ringed, front = figure.axes[0].lines
    drawn = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in markers}
    assert drawn["Dual distillation"] == (12.0, 0.8) and len(drawn) == 3
    assert sorted(zip(others.get_xdata(), others.get_ydata(), strict=True)) == [(11.0, 0.69), (12.0, 0.75)]
    assert list(ringed.get_ydata()) == list(front.get_ydata()) == [0.6, 0.7, 0.8]
    figure, _ = figures.pareto(frame, "mb", "MB", "Dice against bytes", named=["uamt"])
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["1 other row", *[ROWS[row].title for row in ("dual_kd", "uamt", "fedavg", "teacher_only")]]


def test_a_logarithmic_axis_is_labelled_with_the_numbers_themselves():
    figure, _ = figures.curves({"line": [(2.0, 0.1), (20.0, 0.2), (100.0, 0.3)]}, "MB", "Dice", "Bytes", log_x=True)
    figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    ticks = [tick.get_text() for tick in axis.get_ticklabels()]
    assert axis.get_scale() == "log" and {"2", "5", "10", "20", "50", "100"} <= set(ticks)
