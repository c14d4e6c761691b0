"""The committed results: every file is a record of a point, made with the digits and settings of today."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from fedkd_utils import grids, records, runner, statistics
from fedkd_utils.methods import COURSE_ROWS, RIVALS, ROWS
from fedkd_utils.provenance import NUMBERS
from fedkd_utils.settings import PROFILES, PROJECT

RESULTS = PROJECT / "data" / "results"
FOLDERS = [name for name in PROFILES if (RESULTS / name).is_dir()]
#: What is no profile: measurements with tests of their own.
MEASURED = {"engine", "bench", "reference_gpu"}
#: Beside the records: the tuned learning rates, the measured seconds.
OTHERS = {"learning_rates.json", "seconds.json"}
RATES = json.loads((RESULTS / "reference" / "learning_rates.json").read_bytes())


def test_no_other_results_lie_about():
    assert {path.name for path in RESULTS.iterdir()} <= {*FOLDERS, *MEASURED}


@pytest.mark.parametrize("profile", FOLDERS)
def test_every_committed_result_is_the_record_of_a_point_and_not_stale(profile):
    folder, settings = RESULTS / profile, PROFILES[profile]
    points = [point for name in grids.GRIDS for point in runner.points_of(name, settings, folder)]
    files = {path.stem for path in folder.iterdir() if path.name not in OTHERS}
    found = runner.standing(list(dict.fromkeys(points)), settings, folder)
    assert found.damaged == {} and found.stale == {}
    assert {point.name for point in found.done} == files
    for point, record in found.done.items():
        assert record.made_with["numbers"] == NUMBERS
        assert (record.row, record.setting, record.seed) == (point.row, point.setting, point.seed)
        dice = record.test_frame()["dice"].dropna()
        assert len(dice) > 0 and dice.between(0, 1).all()


def test_a_stale_or_damaged_result_is_found(tmp_path):
    (point,) = [p for p in grids.grid("rows", PROFILES["reference"], [0]) if p.name == "dual_kd-paper_like-seed0"]
    source = RESULTS / "reference" / f"{point.name}.json"
    (tmp_path / "learning_rates.json").write_text(json.dumps(RATES))
    points = runner.with_rates([point], tmp_path)

    def standing(text):
        (tmp_path / source.name).write_text(text)
        return runner.standing(points, PROFILES["reference"], tmp_path)

    assert list(standing(source.read_text()).done) == points
    older = source.read_text().replace(f'"numbers":{NUMBERS}', f'"numbers":{NUMBERS - 1}')
    assert standing(older).stale[points[0]] == ["the digits of the code have changed"]
    assert points[0] in standing(source.read_text()[:-200]).damaged


def test_every_trained_row_has_a_learning_rate_from_trials_that_still_hold():
    trained = {name for name, row in ROWS.items() if row.objective is not None}
    assert RATES["rows"].keys() == trained
    wanted = sorted((setting, rate) for setting in grids.BOTH for rate in runner.LEARNING_RATES)
    for name, facts in RATES["rows"].items():
        assert sorted((t["setting"], t["learning_rate"]) for t in facts["trials"]) == wanted
        assert {t["numbers"] for t in facts["trials"]} == {NUMBERS}
        assert {t["method"] for t in facts["trials"]} == {ROWS[name].identity()}


def test_the_chosen_rate_is_the_best_of_its_trials():
    for name, facts in RATES["rows"].items():
        dice = np.full((len(runner.LEARNING_RATES), len(grids.BOTH)), -np.inf)
        for trial in facts["trials"]:  # one that diverged has no validation and cannot win
            if trial["validation"] is not None:
                place = runner.LEARNING_RATES.index(trial["learning_rate"]), grids.BOTH.index(trial["setting"])
                dice[place] = trial["validation"]
        assert facts["chosen"] == runner.LEARNING_RATES[int(dice.mean(axis=1).argmax())], name


def test_notebook_07_says_how_the_reference_profile_differs():
    quick, reference = PROFILES["quick"], PROFILES["reference"]
    prose = (PROJECT / "notebooks" / "07_baselines_and_ablations.ipynb").read_text(encoding="utf-8")
    assert "a fifth more [rounds](glossary.md#round)" in prose
    assert "trained for twice as long and twice as many test" in prose
    twice = {"teacher_steps": 2 * quick.teacher_steps, "client_test": 2 * quick.client_test}
    assert reference == dataclasses.replace(quick, name="reference", rounds=quick.rounds * 6 // 5, **twice)


def test_the_readme_says_how_many_seeds_rows_and_rates_there_are():
    text = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    names = [path for path in (RESULTS / "reference").iterdir() if path.name not in OTHERS]
    found = [records.read_record(path) for path in names]
    plain = {seed: {(r.row, r.setting) for r in found if r.seed == seed and not r.label} for seed in grids.SEEDS}
    whole = [seed for seed in grids.SEEDS if plain[seed] == set(itertools.product(ROWS, grids.BOTH))]
    assert whole == [0, 1, 2, 3, 4], "the README says that there are five seeds of every row"
    here, asked = {path.stem for path in names}, grids.grid("all", PROFILES["reference"])
    assert {point.name for point in asked} <= here, "the README says that there are five seeds of every ablation"
    assert {point.seed for point in asked} == {0, 1, 2, 3, 4}
    assert "five seeds of every row and of every ablation" in text
    assert text.count("Rows and ablations are compared over 5 seeds.") == 1
    assert text.count("行の比較もアブレーションも、乱数シード5つによるものです。") == 1
    assert "Rows and ablations are compared over **five seeds**" in text
    second = {record.machine["device"] for record in found if record.seed == 1}
    assert "cpu" in second and len(second) == 2, "the README says that a GPU computed some"
    assert "03 to 06 train four rows" in text and len(COURSE_ROWS) == 4
    assert "from the same four" in text and len(runner.LEARNING_RATES) == 4


def runs_of(name: str) -> list[records.Record]:
    """Of all seeds that are there."""
    paths = [RESULTS / "reference" / f"{name}-seed{seed}.json" for seed in grids.SEEDS]
    return [records.read_record(path) for path in paths if path.is_file()]


def dice(name: str, clients: tuple[str, ...] = ()) -> np.ndarray:
    """Mean test Dice of each seed, of some clients or of all."""
    frames = [run.test_frame().query("components == 'all'") for run in runs_of(name)]
    return np.array([f[f["client"].isin(clients) | (not clients)]["dice"].mean() for f in frames])


def test_notebook_07_says_in_which_seeds_its_ablations_agree():
    """Its figures show means over seeds; its prose says where seeds differ."""
    one, two = (dice(f"fedavg-paper_like-client_labelled_{count}") for count in (1, 2))
    assert ((two - one) < 0.005).sum() == 1  # "in one of the five seeds a single one did as well"
    for row in ("fedavg", "dual_kd"):
        first = [
            dice(f"{row}-heterogeneous{what}", ("client_1", "client_2")) for what in ("-clients_2", "", "-clients_8")
        ]
        assert (first[2] > first[0]).all() and (first[1] > first[0]).sum() == 4  # "from four in four of the five"
    for what in ("response_weight_0.2+feature_weight_0.0078125+mask_classes_2", "feature_weight_10.0"):
        gain = dice(f"dual_kd-paper_like-{what}") - dice("fedavg-paper_like")
        assert gain.mean() < 0.002  # "gains nothing over FedAvg", "nothing either"
    gain = dice("dual_kd-paper_like-teacher_steps_100") - dice("fedavg-paper_like")
    assert gain.max() < 0.005 and gain.min() < -0.01  # "ends where FedAvg does, or below"
    text = (PROJECT / "notebooks" / "07_baselines_and_ablations.ipynb").read_text(encoding="utf-8")
    for words in ("in one of the five seeds a single", "from four in four of the five", "FedAvg does, or below"):
        assert words in text


def test_notebook_07_says_what_its_lines_of_labels_knees_and_hospitals_show():
    rows = ("fedavg", "finetune", "dual_kd", "combined_kd")
    labelled = {
        row: np.array([dice(f"{row}-paper_like-client_labelled_{count}").mean() for count in (1, 2, 4, 8)])
        for row in rows
    }
    profit = {row: line[-1] - line[0] for row, line in labelled.items()}
    assert max(profit, key=lambda row: profit[row]) == "fedavg"  # "FedAvg profits most"
    assert all(np.ptp(line[1:]) < 0.005 for line in labelled.values())  # "after that all lines are nearly flat"
    ahead = labelled["dual_kd"] - labelled["fedavg"]
    assert (ahead > 0).all() and ahead.argmax() == 0  # "ahead of FedAvg ... everywhere, most with a single label"
    assert labelled["finetune"][0] > max(labelled[row][-1] for row in rows if row != "finetune")
    for row in ("fedsemi", "dual_kd", "strong_kd"):  # "the lines of the unlabelled knees are flat"
        line = [dice(f"{row}-paper_like-client_unlabelled_{count}").mean() for count in (4, 8, 16, 32)]
        assert np.ptp(line) < 0.005
    for row, setting in itertools.product(("fedavg", "dual_kd"), grids.BOTH):  # "more hospitals help in all four lines"
        names = [f"{row}-{setting}{what}" for what in ("-clients_2", "", "-clients_8")]
        assert (np.diff([dice(name, ("client_1", "client_2")).mean() for name in names]) > 0).all()
    changes = ("hand_over_0.1_after_4", "hand_over_1.0_after_4", "release")
    cost = [(dice("dual_kd-paper_like") - dice(f"dual_kd-paper_like-{change}")).mean() for change in changes]
    assert min(cost) > 0 and max(cost) == cost[-1]  # "every change costs a little, the erased teacher most"


def test_notebook_07_says_which_interval_is_the_odd_one():
    """Its figures of masks and of normalisation count the intervals that hold zero; its prose names the others."""

    stricter = minus("strong_kd-heterogeneous-mask_classes_2", "strong_kd-heterogeneous")
    assert stricter.high < 0 and 0.01 < -stricter.mean < 0.02  # "costs more than a hundredth"
    plain, distilled = (
        minus(f"{row}-paper_like-normalisation_batch", f"{row}-paper_like") for row in ("fedavg", "dual_kd")
    )
    assert max(plain.high, distilled.high) < 0  # "with distillation as without"
    assert 0.005 < -max(plain.mean, distilled.mean) and -min(plain.mean, distilled.mean) < 0.015


def minus(one: str, other: str) -> statistics.Interval:
    return statistics.difference(*records.shared_seeds({"one": runs_of(one), "other": runs_of(other)}).values())


def test_notebook_07_says_what_the_rows_beyond_the_paper_are():
    beyond = {point.row for point in grids.grid("beyond", PROFILES["reference"], [0])}
    assert len(beyond) == 20  # "there are twenty of them"
    strong, small = (ROWS[row].adapt(PROFILES["reference"]) for row in ("strong_kd", "small_kd"))
    assert strong.response_weight == 10 * PROFILES["reference"].response_weight and strong.response_ramp == 0
    assert small.student_shrink == 4 and small.feature_weight == 0
    ours = ROWS["combined_kd"]
    assert ours.weighs_trust and ours.starts_at_teacher and ours.changes["teacher_contrast"] == "random"


def test_notebook_07_says_what_teachers_and_labels_are_worth():
    """Intervals that its prose reads from its outputs."""
    blind = {}
    for contrast in ("-teacher_contrast_pd_fs", "", "-teacher_contrast_t1"):
        frames = [
            run.test_frame().query("components == 'all'") for run in runs_of(f"teacher_only-heterogeneous{contrast}")
        ]
        by_hospital = [frame.groupby("client")["dice"].mean() for frame in frames]
        blind[contrast] = (sum(by_hospital) / len(by_hospital) < 0.05).sum()
    assert set(blind.values()) == {2}  # "each of the three is blind at two hospitals"
    for rival in ("fedavg", "mean_teacher"):  # "with T1 it is above FedAvg and the mean teacher, with DESS below both"
        assert minus("dual_kd-heterogeneous-teacher_contrast_t1", f"{rival}-heterogeneous").low > 0
        assert minus("dual_kd-heterogeneous", f"{rival}-heterogeneous").high < 0
    # "is still worth starting from", "there, dual distillation ends within a hundredth of FedAvg"
    assert minus("finetune-paper_like-teacher_contrast_t1", "fedavg-paper_like").low > 0
    assert abs(minus("dual_kd-paper_like-teacher_contrast_t1", "fedavg-paper_like").mean) < 0.01
    erased = [minus(f"dual_kd-{setting}-release", f"fedavg-{setting}") for setting in grids.BOTH]
    assert not erased[0].excludes_zero and erased[1].high < 0  # "nothing is left", "even erased ... below FedAvg"
    for change in ("repository_training_4", "teacher_steps_333"):  # "its lead over FedAvg is no longer clear of zero"
        assert not minus(f"dual_kd-paper_like-{change}", "fedavg-paper_like").excludes_zero
    labels = [f"fedavg-paper_like-client_labelled_{count}" for count in (1, 2, 8)]
    assert minus(labels[1], labels[0]).low > 0 and not minus(labels[2], labels[1]).excludes_zero  # "six more are not"
    for setting in grids.BOTH:  # FedBN "mends nothing here"
        assert minus(f"fedbn-{setting}", f"fedavg_bn-{setting}").mean < 0
        for row, teacher in (("small_kd", "teacher_only"), ("small_kd_random", "teacher_random")):
            for other in ("local_only", teacher):  # "below a hospital ... alone", "and below its own teacher"
                assert minus(f"{row}-{setting}", f"{other}-{setting}").high < 0


def test_notebook_09_says_in_how_many_seeds_claims_4_and_5_hold():
    """Its prose counts; the ratios are in its outputs, which are executed again and compared strictly."""
    text = (PROJECT / "notebooks" / "09_claims_and_cards.ipynb").read_text(encoding="utf-8")

    def ratios(row):
        """By seed: seconds near, seconds far, MB near, MB far."""
        found = [list(map(float, line.split(", "))) for line in re.findall(rf" {row} +\[([^\]]+)\]", text)]
        assert len(found) == 4 and {len(line) for line in found} == {len(grids.SEEDS)}
        return found

    seconds, seconds_far, mb, mb_far = ratios("Dual distillation")
    assert "less time than the best rival in every seed" in text and max(seconds) < 1
    assert "Fewer bytes in four seeds of five" in text and sum(ratio < 1 for ratio in mb) == 4
    assert "whether in fewer bytes is undecided" in text
    assert min(seconds_far) == min(mb_far) == float("inf")  # "far, dual distillation never has the rival's Dice"
    seconds, seconds_far, mb, mb_far = ratios("Dual distillation, any-contrast teacher")
    assert max(seconds_far) < 0.6 and max(mb_far) < 1  # "in about half of the time and in fewer bytes"
    seconds, seconds_far, mb, mb_far = ratios("Strong distillation, weighted by trust")
    assert max(seconds) < 1 and max(mb) < 1  # "holds both claims near"
    assert seconds_far.count(float("inf")) == mb_far.count(float("inf")) == 1  # "one of its five seeds is never there"
    seconds, seconds_far, mb, mb_far = ratios("Fine-tuned teacher")
    assert max(seconds + mb) < 0.2 and max(seconds_far) < 0.4  # "a fraction of either near, and less time far"


def over_both(one: str, other: str) -> statistics.Interval:
    pairs = [runs_of(f"{row}-{setting}") for row in (one, other) for setting in grids.BOTH]
    return statistics.difference(pairs[0] + pairs[1], pairs[2] + pairs[3])


def test_notebook_09_says_what_trust_is_worth_and_what_a_lone_hospital_lacks():
    near, far = grids.BOTH
    for rival in (row for row in RIVALS if ROWS[row].federated):  # "above every federated rival"
        assert over_both("trusted_kd", rival).low > 0
    for setting in grids.BOTH:  # "and above dual distillation as the paper has it in each"
        assert minus(f"trusted_kd-{setting}", f"dual_kd-{setting}").low > 0
        assert minus(f"pooled-{setting}", f"local_only-{setting}").low > 0  # "the premise holds"
    for rival in ("mean_teacher", "uamt"):  # "far by itself, it is undecided"
        assert not minus(f"trusted_kd-{far}", f"{rival}-{far}").excludes_zero
    assert minus(f"fedavg-{near}", f"local_only-{near}").low > 0  # "near, FedAvg is above a hospital alone"
    assert minus(f"fedavg-{far}", f"local_only-{far}").high < 0  # "far it is below"
    ours, paper = (ROWS[row].adapt(PROFILES["reference"]) for row in ("trusted_kd", "dual_kd"))  # the same teacher
    assert ours.teacher_contrast == paper.teacher_contrast and ROWS["trusted_kd"].assumes == ROWS["dual_kd"].assumes


def test_notebook_07_says_what_an_early_try_had_right():
    near, far = grids.BOTH
    for one, other in (("finetune", "fedavg"), ("finetune", "dual_kd")):  # "holds in both"
        assert all(minus(f"{one}-{setting}", f"{other}-{setting}").low > 0 for setting in grids.BOTH)
    assert minus(f"strong_kd-{near}", f"dual_kd-{near}").low > 0  # "worth a little more near, and a disaster far"
    assert minus(f"strong_kd-{far}", f"fedavg-{far}").mean < -0.2
    assert -0.11 < minus(f"teacher_random-{near}", f"teacher_only-{near}").mean < -0.09  # "a tenth of Dice below"
    assert minus(f"finetune_random-{far}", f"finetune-{far}").mean > 0.1  # "worth much far, cost a little near"
    assert -0.03 < minus(f"finetune_random-{near}", f"finetune-{near}").high < 0
    assert minus(f"strong_kd_random-{far}", f"fedavg-{far}").low > 0  # "help far and even cost near"
    assert minus(f"strong_kd_random-{near}", f"fedavg-{near}").high < 0
    together = [minus(f"combined_kd-{setting}", f"finetune_random-{setting}") for setting in grids.BOTH]
    assert -0.055 < together[0].mean < -0.045 and abs(together[1].mean) < 0.002  # "five hundredths", "nothing far"
    assert minus(f"trusted_kd-{near}", f"fedavg-{near}").low > 0  # "keeps what strong answers bring"
    assert not minus(f"trusted_kd-{far}", f"fedavg-{far}").excludes_zero  # "keeps FedAvg from harm"


def test_notebook_07_says_how_distilling_goes_with_sending_less():
    def lead(change):
        return minus(f"dual_kd-paper_like-{change}", f"fedavg-paper_like-{change}")

    assert min(lead(f"compression_{codec}").low for codec in ("half", "int8")) > 0.005  # "leaves what it is worth"
    assert -0.002 < lead("compression_top_10").low < 0.002  # "touches zero"
    assert max(lead(f"compression_{codec}").high for codec in ("top_1", "top_1_forgetful")) < 0  # "clearly below"
    assert lead("local_epochs_8+rounds_3").mean > lead("local_epochs_1+rounds_24").mean  # "a little more, if anything"


def test_notebook_07_says_why_rivals_gain_little_and_lone_hospitals_much():
    near, far = grids.BOTH
    for row in ("mean_teacher", "uamt"):  # "end where FedAvg ends, to a thousandth"
        assert abs(minus(f"{row}-{near}", f"fedavg-{near}").mean) < 0.001
    for row in ("fedsemi", "ssfl_published", "fedprox"):
        assert minus(f"{row}-{near}", f"fedavg-{near}").high < 0
    history = [run.history_frame().query("round == 12") for run in runs_of(f"uamt-{near}")]
    share = np.mean([h["response"].mean() for h in history]) / np.mean([h["supervised"].mean() for h in history])
    assert 0.005 < share < 0.015  # "about a hundredth of what the labels say"
    alone = dice(f"local_only-{far}", ("client_1", "client_2")).mean()
    for row in ("fedavg", "dual_kd"):  # "even eight do not bring them to where each of the two is alone"
        assert dice(f"{row}-{far}-clients_8", ("client_1", "client_2")).mean() < alone
    slow = [t["validation"] for t in RATES["rows"]["ssfl_published"]["trials"] if t["setting"] == far]
    assert max(slow) < 0.001 and RATES["rounds"] * 3 == PROFILES["reference"].rounds  # "a third of a run"
