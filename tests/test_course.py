"""Exercises: references against the library, classic mistakes rejected, folded solutions of the notebooks accepted."""

from __future__ import annotations

import ast
import copy
import itertools
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from fedkd_utils import (
    acquisition,
    clients,
    compression,
    course,
    disclosure,
    losses,
    metrics,
    server,
    teacher,
    training,
    transforms,
)
from fedkd_utils.exercises import EXERCISES, Exercise

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("[0-9][0-9]_*.ipynb"))
MISTAKES = [(name, hint) for name, exercise in EXERCISES.items() for hint in exercise.mistakes]
DOUBLE = Exercise(
    lambda x: 2 * x,
    [(np.array([1.0, np.nan]),), (np.array([3.0]),)],
    {"twice, not squared.": lambda x: x**2, "twice, not halved.": lambda x: x / 2},
)


# ------------------------------------------------------------------------------------------------------- the mechanism
@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (lambda x: x + x, "CORRECT"),
        (lambda x: (2 * x).astype(np.float32), "CORRECT"),
        (None, "NOT ATTEMPTED"),
        (lambda x: None, "NOT ATTEMPTED"),
        (lambda x: x * x, "WRONG: twice, not squared."),
        (lambda x: x * 0.5, "WRONG: twice, not halved."),
        (lambda x: (2 * x).tolist(), "CORRECT"),
        (lambda x: [torch.tensor(2 * v) for v in x], "CORRECT"),
        (lambda x: [str(2 * v) for v in x], "WRONG: for test input 1 "),
        (lambda x: np.array([2 * v if v == v else None for v in x]), "WRONG: for test input 1 "),
        (lambda x: [[1.0], [2.0, 3.0]], "WRONG: for test input 1 "),
        (lambda x: 1 / 0, "WRONG: it raised ZeroDivisionError: division by zero"),
        (lambda x, y: x, "WRONG: it raised TypeError: "),
        (3.0, "WRONG: it raised TypeError: 'float' object is not callable"),
        (lambda x: 2 * x if len(x) > 1 else None, "WRONG: for test input 2 the answer is an array of shape (1,)"),
        (lambda x: 2 * x[:, None], "WRONG: for test input 1 the answer is an array of shape (2,)"),
        (lambda x: "six", "WRONG: for test input 1 "),
        (lambda x: {"w": 2 * x}, "WRONG: for test input 1 "),
        (lambda x: 2 * x * (1 + 1e-4), "WRONG: for test input 1 "),
        (lambda x: np.nan_to_num(2 * x), "WRONG: for test input 1 "),
    ],
)
def test_verdicts(answer, verdict):
    given = course.judge(DOUBLE, answer)
    assert given.startswith(verdict) and (not verdict.endswith((".", "CORRECT", "ATTEMPTED")) or given == verdict)
    assert "\n" not in given


def _raises(*_):
    raise ValueError("first line\nsecond line " + 500 * "x")


_TURNS = itertools.cycle([None, 1.0])

#: What a beginner's function may hand back instead of an answer.
STRANGE = {
    "a boolean": lambda *_: True,
    "booleans": lambda *_: np.array([True, False]),
    "booleans of torch": lambda *_: torch.tensor([[True], [False]]),
    "words": lambda *_: "six\nor seven",
    "an array of words": lambda *_: np.array(["a", "b\nc"]),
    "objects": lambda *_: np.array([None, 1.0, "x"], dtype=object),
    "a ragged list": lambda *_: [[1.0], [2.0, 3.0]],
    "a list of None": lambda *_: [None],
    "None every other time": lambda *_: next(_TURNS),
    "a tuple": lambda *_: (1, "2", None),
    "a set": lambda *_: {1, 2},
    "an empty array": lambda *_: np.zeros((0, 3)),
    "another shape": lambda *_: np.zeros((1, 2, 3, 1)),
    "a complex number": lambda *_: 1 + 2j,
    "complex numbers": lambda *_: np.array([1 + 2j]),
    "an integer too large": lambda *_: 10**400,
    "an integer too large to print": lambda *_: 10**5000,
    "bfloat16 with a gradient": lambda *_: torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    "a float of torch": lambda *_: torch.tensor(1.5, requires_grad=True),
    "a dictionary": lambda *_: {"down": "x", "sent": None, "w": np.array([True])},
    "a function": lambda *_: len,
    "an array in a list": lambda *_: [np.zeros(3), np.zeros(2)],
    "an error of two lines": _raises,
}


@pytest.mark.parametrize("strange", STRANGE)
def test_every_exercise_has_a_verdict_on_whatever_comes(strange):
    for name, exercise in EXERCISES.items():
        verdict = course.judge(exercise, STRANGE[strange])
        assert verdict.startswith("WRONG"), (name, verdict)
        assert "\n" not in verdict and len(verdict) < 700


@pytest.mark.parametrize(
    ("name", "with_arrays", "with_lists"),
    [
        (
            "auc",
            lambda m, o: ((m[:, None] > o).mean() + (m[:, None] >= o).mean()) / 2,
            lambda m, o: sum((a > b) + 0.5 * (a == b) for a in m for b in o) / (len(m) * len(o)),
        ),
        (
            "on_front",
            lambda d, c: ~(((d > d[:, None]) & (c <= c[:, None])) | ((d >= d[:, None]) & (c < c[:, None]))).any(axis=1),
            lambda d, c: [
                not any((D > e and C <= f) or (D >= e and C < f) for D, C in zip(d, c, strict=True))
                for e, f in zip(d, c, strict=True)
            ],
        ),
        (
            "smallest_detectable",
            lambda a, b: 1.96 * (a - b).std(ddof=1) / len(a) ** 0.5,
            lambda a, b: 1.96 * np.std([x - y for x, y in zip(a, b, strict=True)], ddof=1) / len(a) ** 0.5,
        ),
        ("honest_score", lambda v, t: t[v.argmax()], lambda v, t: t[v.index(max(v))]),
        (
            "best_within",
            lambda dice, mb, budget: dice[mb <= budget].max(),
            lambda dice, mb, budget: max([0] + [d for d, m in zip(dice, mb, strict=True) if m <= budget]),
        ),
    ],
)
def test_code_for_arrays_and_code_for_lists_are_as_good(name, with_arrays, with_lists):
    assert course.judge(EXERCISES[name], with_arrays) == course.judge(EXERCISES[name], with_lists) == "CORRECT"


# ----------------------------------------------------------------------------------------------------------- the grade
NEEDED = {"pass": 0.68, "good": 0.77, "excellent": 0.85}


@pytest.mark.parametrize(
    ("dice", "mb", "given"),
    [
        (0.5, 1.0, "none"),
        (0.6799, 1.0, "none"),
        (0.68, 1.0, "pass"),
        (0.8, 1.5, "good"),
        (0.9, 0.0, "excellent"),
        (0.9, 1.5001, "refused"),
        (0.0, 99.0, "refused"),
    ],
)
def test_the_grade_of_a_plan(dice, mb, given, capsys):
    assert course.grade(dice, mb, 1.5, NEEDED) == given
    shown = capsys.readouterr().out
    assert shown.startswith(f"grade: {given}") and len(shown.splitlines()) == 1
    for name, least in NEEDED.items():
        assert (f"{name} needs a Dice of {least:.3f}" in shown) == (given != "refused" and dice < least)


@pytest.mark.parametrize(
    ("dice", "mb"), [(math.nan, 1.0), (86.0, 1.0), (-0.1, 1.0), (0.5, -1.0), (0.5, math.nan), (0.5, math.inf)]
)
def test_no_grade_for_what_cannot_be(dice, mb):
    with pytest.raises(ValueError, match="lies between 0 and 1|were not paid"):
        course.grade(dice, mb, 1.5, NEEDED)


def test_a_dictionary_is_compared_key_by_key():
    states = Exercise(lambda s: {n: 2 * v for n, v in s.items()}, [({"w": torch.ones(2), "b": torch.ones(1)},)], {})
    assert course.judge(states, lambda s: {n: v + v for n, v in s.items()}) == "CORRECT"
    for wrong in (
        lambda s: {"w": 2 * s["w"]},
        lambda s: {**s, "w": 2 * s["w"]},
        lambda s: [2 * v for v in s.values()],
    ):
        assert course.judge(states, wrong).startswith(
            "WRONG: for test input 1 the answer is {w: an array of shape (2,)"
        )


def test_an_answer_that_writes_into_its_input_harms_nobody():
    before = copy.deepcopy(DOUBLE.probes)

    def in_place(x):
        x *= 2
        return x

    def zeroing(x):
        x *= 0
        return x

    assert course.judge(DOUBLE, in_place) == "CORRECT"
    assert course.judge(DOUBLE, zeroing).startswith("WRONG")
    assert all(np.array_equal(a[0], b[0], equal_nan=True) for a, b in zip(before, DOUBLE.probes, strict=True))


def test_check_returns_the_reference_unless_correct(capsys):
    def right(dice):
        return 1 - dice / (2 - dice)

    assert course.check("voe", right) is right
    assert course.check("voe", lambda dice: 1 - dice) is EXERCISES["voe"].reference
    assert course.check("voe", lambda dice: None) is course.check("voe", None) is EXERCISES["voe"].reference
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "voe: CORRECT" and lines[1].startswith("voe: WRONG: one minus Dice")
    assert lines[2:] == ["voe: NOT ATTEMPTED"] * 2
    with pytest.raises(KeyError, match="no exercise 'vow': choose one of spacing_from_affine"):
        course.check("vow", right)


# ------------------------------------------------------------------------------------------------------- the exercises
@pytest.mark.parametrize("name", EXERCISES)
def test_every_exercise_knows_two_mistakes_and_its_own_answer(name):
    assert len(EXERCISES[name].mistakes) >= 2
    assert course.judge(EXERCISES[name], EXERCISES[name].reference) == "CORRECT"


@pytest.mark.parametrize(("name", "hint"), MISTAKES)
def test_a_classic_mistake_gets_its_own_hint(name, hint):
    assert course.judge(EXERCISES[name], EXERCISES[name].mistakes[hint]) == f"WRONG: {hint}"


def gradient_by_autograd(teacher, student, tau):
    z = student.clone().requires_grad_()
    positions = student[:, 0].numel()
    (losses.feature_distillation(z, teacher, tau) * positions).backward()
    return z.grad


def fedavg_round_by_round(pulls, wishes, counts, steps, rate):
    """Rounds of local gradient steps on quadratics, until nothing moves any more."""
    theta = 7.0
    for _ in range(5000):
        ends = np.full(len(pulls), theta)
        for _ in range(steps):
            ends = ends - rate * pulls * (ends - wishes)
        theta = float((counts * ends).sum() / counts.sum())
    return theta


def _library(name):
    """The same quantity by the course's own, separately tested modules."""

    def update(k, state, count):
        return clients.Update(str(k), dict(state), count, {}, None)

    return {
        "spacing_from_affine": transforms.voxel_sizes_mm,
        "volume_ml": lambda label, spacing, value: metrics.volumes_ml(label, spacing)[value],
        "spin_echo_signal": acquisition.spin_echo,
        "dice": lambda a, b, value: metrics.dice(a == value, b == value),
        "soft_dice_loss": lambda z, y: (
            2 * losses.supervised_loss(z, y) - torch.nn.functional.cross_entropy(z, y).to(torch.float64)
        ),
        "fedavg": lambda states, counts: server.aggregate(
            [update(k, s, n) for k, (s, n) in enumerate(zip(states, counts, strict=True))]
        ),
        "temperature_softmax": lambda z, tau: (z / tau).softmax(dim=1),
        "entropy_mask": lambda p, t: losses.uncertainty_mask(losses.entropy(p), t, p.shape[1]),
        "distillation_gradient": gradient_by_autograd,
        "fedavg_end": fedavg_round_by_round,
        "feature_kl": lambda t, s: losses.feature_distillation(s, t),
        "ramp": losses.sigmoid_ramp_up,
        "hand_over": teacher.blend,
        "poly_learning_rate": training.poly_learning_rate,
        "volume_difference": metrics.vd,
        "auc": disclosure.auc,
        "clip_change": lambda change, norm: server.clipped({"w": torch.as_tensor(change)}, norm)["w"],
        "send_largest": _send_largest,
    }[name]


def _send_largest(change, missing, k):
    """By the federation's own error feedback."""
    codec = compression.Codec(
        "", lambda x: compression.to_largest(x, (k + 0.5) / len(change)), compression.from_largest
    )
    received, wanted = torch.zeros(len(change), dtype=torch.float64), torch.as_tensor(change)
    _, seen, lost = compression.compress({"w": wanted}, {"w": received}, {"w": torch.as_tensor(missing)}, codec)
    return {"sent": seen["w"], "missing": lost["w"]}


@pytest.mark.parametrize(
    "name",
    ["spacing_from_affine", "volume_ml", "spin_echo_signal", "dice", "soft_dice_loss", "fedavg", "temperature_softmax"]
    + ["entropy_mask", "feature_kl", "ramp", "hand_over", "poly_learning_rate"]
    + ["volume_difference", "auc", "clip_change", "send_largest", "distillation_gradient", "fedavg_end"],
)
def test_a_reference_agrees_with_the_library(name):
    assert course.judge(EXERCISES[name], _library(name)) == "CORRECT"


def test_the_other_references_in_closed_form():
    assert EXERCISES["run_bytes"].reference(10, 3, 2) == {"down": 3 * 10 * 4, "up": 3 * 10 * 2}
    assert EXERCISES["round_time"].reference([1.0, 5.0], 3.0) == {"seconds": 3.0, "answers": 1}
    sent = np.zeros((2, 3))
    assert EXERCISES["usable"].reference([sent, sent, sent[:1], sent / 1 + np.inf], [1, 0, 1, 1], sent, 1) == [
        *[True, False, False, False]
    ]
    assert EXERCISES["z_score"].reference(np.array([1.0, 3.0])).tolist() == [-1.0, 1.0]
    assert EXERCISES["voe"].reference(0.5) == pytest.approx(1 - 1 / 3)  # of 3 voxels in the union, 1 is shared
    state = {"w": torch.tensor([3.0, 4.0])}
    assert EXERCISES["fedprox_term"].reference(state, {"w": torch.zeros(2)}, 0.1) == pytest.approx(0.05 * 25)
    assert EXERCISES["bytes_of_state"].reference({"w": torch.zeros(3), "n": torch.tensor(1)}) == 3 * 4 + 8
    once, every_round = 2 * 7, 2 * 5 * 2 * 7  # 2 clients, 5 rounds, a teacher of 7 bytes, down and up
    assert EXERCISES["bytes_saved"].reference(7, 5, 2) == every_round - once
    far, near = np.array([[0, 0, 0], [3, 0, 0]]), np.array([[0, 0, 0]])  # 3 slices of 4 mm apart, one way only
    assert EXERCISES["hausdorff_mm"].reference(far, near, (4.0, 1.2, 1.2)) == pytest.approx(12)
    both = EXERCISES["hausdorff_mm"].reference(near, far, (4.0, 1.2, 1.2))
    assert both == pytest.approx(12)  # the other way
    assert EXERCISES["teacher_left"].reference([0.5, 0.5]) == pytest.approx(0.25)
    for noise, rounds in ((1.0, 9), (3.0, 4)):  # so many rounds cost what one costs
        several = EXERCISES["noise_for_rounds"].reference(noise, rounds)
        assert disclosure.epsilon(several, rounds, 1e-5) == pytest.approx(disclosure.epsilon(noise, 1, 1e-5), rel=1e-9)
    assert math.isnan(EXERCISES["dice"].reference(np.zeros(3), np.zeros(3), 1))


def test_the_gradient_of_soft_dice_is_that_of_autograd():
    g = torch.Generator().manual_seed(4)
    p = torch.rand(3, 4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    y = (torch.rand(3, 4, 5, generator=g) < 0.3).double()
    (1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)).backward()
    ours = EXERCISES["soft_dice_gradient"].reference(p.detach().numpy(), y.numpy())
    assert np.allclose(ours, p.grad.numpy(), rtol=1e-12)


def test_the_best_echo_is_where_a_fine_search_finds_it():
    te = np.linspace(0, 400, 400_001)
    for one, other in ((133.0, 37.0), (37.0, 133.0), (90.0, 60.0)):
        found = te[np.abs(np.exp(-te / one) - np.exp(-te / other)).argmax()]
        assert EXERCISES["best_echo_ms"].reference(one, other) == pytest.approx(found, abs=2e-3)


def test_the_spread_of_the_bootstrap_is_that_of_all_its_draws():
    values = np.array([0.55, 0.61, 0.47, 0.7])
    every = np.stack(np.meshgrid(*[values] * 4)).reshape(4, -1).mean(axis=0)  # all 256 draws, equally likely
    assert EXERCISES["bootstrap_spread"].reference(values) == pytest.approx(every.std(), rel=1e-12)


def test_the_sum_of_answers_is_that_of_the_protocol():
    names, values = ["a", "b", "c", "d"], {"a": -7.0, "b": 30.0, "c": -52.0, "d": 11.0}
    seeds = disclosure.pair_seeds(names, seed=0, round_number=1)
    masked = {
        n: (disclosure.to_fixed(torch.tensor([v]), 4) + disclosure.mask_of(n, seeds[n], 1)) % 2**32
        for n, v in values.items()
    }
    answered = {n: m for n, m in masked.items() if n != "c"}
    truth = disclosure.unmasked_sum(answered, {"c": {n: seeds[n]["c"] for n in answered}})
    secrets = np.zeros((4, 4), dtype=np.int64)
    for k, one in enumerate(names):
        for j in range(k + 1, 4):
            secrets[k, j] = int(disclosure.mask_of(one, {names[j]: seeds[one][names[j]]}, 1)) % 2**32
    messages = np.array([int(masked[n]) % 2**32 for n in names])
    given = EXERCISES["sum_of_answers"].reference(messages, np.array([n != "c" for n in names]), secrets)
    assert given / 2**20 == float(truth) == -7 + 30 + 11


def test_no_person_is_on_both_sides():
    people = np.random.default_rng(0).choice(list("abcdefgh"), 40).tolist()
    for share in (0.1, 0.3, 0.5):
        test = EXERCISES["test_side"].reference(people, share)
        chosen = {p for p, t in zip(people, test, strict=True) if t}
        assert not chosen & {p for p, t in zip(people, test, strict=True) if not t}
        assert test.mean() >= share
        last = [p for p in dict.fromkeys(people) if p in chosen][-1]
        assert sum(p in chosen - {last} for p in people) < share * len(people)  # without the last there were too few


# -------------------------------------------------------------------------------------- the exercises in the notebooks
def exercises_of(nb):
    """(exercise, name of the answer, import cell, stub cell, solution) of each check in a notebook."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for position, cell in enumerate(nb.cells):
        if cell.cell_type != "code" or "course.check(" not in cell.source:
            continue
        calls = [
            node
            for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "course.check"
        ]
        assert len(calls) == 1, f"one check a cell, here are {len(calls)}"
        name, answer = ast.literal_eval(calls[0].args[0]), ast.unparse(calls[0].args[1])
        below = nb.cells[position + 1].source if position + 1 < len(nb.cells) else ""
        match = re.search(r"<details>\s*<summary>.*?</summary>\s*\n```python\n(.*?)```\s*</details>", below, re.S)
        assert match, f"no folded solution right below the exercise {name!r}"
        yield name, answer, code[0].source, cell.source, match[1]


def solve(answer, imports, source):
    """What a cell that holds `source` after the import cell leaves under the name `answer`."""
    namespace = {}
    exec(compile(imports, "imports", "exec"), namespace)
    exec(compile(source, "answer", "exec"), namespace)
    return namespace[answer]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_folded_solutions_are_correct_and_stubs_not_attempted(path, capsys):
    for name, answer, imports, stub, solution in exercises_of(nbformat.read(path, as_version=4)):
        assert name in EXERCISES
        assert course.judge(EXERCISES[name], solve(answer, imports, solution)) == "CORRECT", name
        solve(answer, imports, stub)
        assert capsys.readouterr().out.splitlines()[-1] == f"{name}: NOT ATTEMPTED"


def test_every_exercise_stands_in_one_notebook():
    names = [e[0] for path in NOTEBOOKS for e in exercises_of(nbformat.read(path, as_version=4))]
    assert sorted(names) == sorted(EXERCISES)


def test_a_wrong_or_missing_solution_is_found():
    stub = 'def voe(d):\n    return None\n\n\nvoe = course.check("voe", voe)'
    folded = "<details><summary>Solution</summary>\n\n```python\n{}\n```\n\n</details>"
    cells = [nbformat.v4.new_code_cell("from fedkd_utils import course"), nbformat.v4.new_code_cell(stub)]
    for code, verdict in (("voe = lambda d: 1 - d / (2 - d)", "CORRECT"), ("voe = lambda d: 1 - d", "WRONG")):
        nb = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_markdown_cell(folded.format(code))])
        ((name, answer, imports, _, solution),) = exercises_of(nb)
        assert course.judge(EXERCISES[name], solve(answer, imports, solution)).startswith(verdict)
    with pytest.raises(AssertionError, match="no folded solution right below the exercise 'voe'"):
        list(exercises_of(nbformat.v4.new_notebook(cells=cells)))


def test_the_environment_report_names_versions_and_threads(capsys):
    course.environment_report()
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__}" in shown and f"{torch.get_num_threads()} thread(s)" in shown
    assert len(shown.splitlines()) == 3
