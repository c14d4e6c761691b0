"""Exercises that check themselves, the grade of the final project, and a report of the environment.

``f = check("name", f)`` says CORRECT, WRONG with a hint, or NOT ATTEMPTED, and hands back the reference unless the
answer was correct, so that *Run All* always completes. The exercises stand in ``exercises.py``. ``grade`` judges the
plan of the final project.
"""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import torch

from fedkd_utils.exercises import EXERCISES, Exercise, Function


def _array(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)


def _numbers(value: Any) -> np.ndarray[Any, Any]:
    """A number, an array, a tensor or a list of these as float64.

    Raises:
        TypeError, ValueError, OverflowError, RuntimeError: it holds anything else. (NumPy alone would read None as
            NaN, and "2" as 2.)
    """
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            raise TypeError("not numbers")
        value = value.to(torch.float64)  # NumPy has no bfloat16
    array = _array(value)
    if array.dtype.kind == "O" and not all(isinstance(v, (int, float, np.number, torch.Tensor)) for v in array.flat):
        raise TypeError("not numbers")
    if array.dtype.kind not in "biufO":
        raise TypeError("not numbers")
    return array.astype(np.float64)


def _same(a: Any, b: Any) -> bool:
    """Equal up to rounding, for numbers, arrays, tensors and dictionaries of them; NaN equals NaN."""
    if isinstance(b, Mapping):
        return isinstance(a, Mapping) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in b)
    try:
        x, y = _numbers(a), _numbers(b)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return x.shape == y.shape and bool(np.allclose(x, y, rtol=1e-5, atol=1e-8, equal_nan=True))


def _as_lists(probe: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.tolist() if isinstance(v, np.ndarray) and v.ndim == 1 else v for v in probe)


def _results(function: Function, exercise: Exercise, lists: bool = False) -> list[Any]:
    """What a function returns for every probe; it gets copies, so that it may write into them.

    Args:
        lists: give it lists where the probe holds arrays of one dimension.
    """
    return [function(*copy.deepcopy(_as_lists(probe) if lists else probe)) for probe in exercise.probes]


def _line(value: Any) -> str:
    """In one line that is not too long."""
    words = " ".join(str(value).split())
    return words if len(words) <= 200 else f"{words[:197]}..."


def _agree(some: list[Any], others: list[Any]) -> bool:
    return all(_same(a, b) for a, b in zip(some, others, strict=True))


def judge(exercise: Exercise, answer: Function | None) -> str:
    """The verdict on an answer, one line."""
    if answer is None:
        return "NOT ATTEMPTED"
    try:
        given = _results(answer, exercise)
    except Exception as error:  # whatever a student's function may raise
        try:
            given = _results(answer, exercise, lists=True)  # as good, where the text only says "the Dice of each round"
        except Exception:
            return f"WRONG: it raised {type(error).__name__}: {_line(error)}"
    if all(value is None for value in given):
        return "NOT ATTEMPTED"
    expected = _results(exercise.reference, exercise)
    if _agree(given, expected):
        return "CORRECT"
    for hint, mistake in exercise.mistakes.items():
        if _agree(given, _results(mistake, exercise)):
            return f"WRONG: {hint}"
    first = [_same(a, b) for a, b in zip(given, expected, strict=True)].index(False)
    return f"WRONG: for test input {first + 1} the answer is {_short(expected[first])}, yours {_short(given[first])}."


def _short(value: Any) -> str:
    """A value in words, whatever it is."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in list(value.items())[:3]) + "}"
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, (np.ndarray, torch.Tensor)):
        array = _array(
            value.to(torch.float64) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        )
        first = array.ravel()[:3]
        if array.ndim:
            shown = first.round(4) if array.dtype.kind in "fc" else first
            return f"an array of shape {array.shape} beginning {_line(shown.tolist())}"
        value = array[()]
    try:
        return f"{float(value):.6g}" if isinstance(value, (int, float, np.integer, np.floating)) else _line(repr(value))
    except (OverflowError, ValueError):  # an integer of hundreds of digits
        return "too large"


def check(name: str, answer: Function | None) -> Function:
    """Judge an answer, say so, and return it when correct, the reference otherwise.

    Raises:
        KeyError: there is no such exercise.
    """
    if name not in EXERCISES:
        raise KeyError(f"there is no exercise {name!r}: choose one of {', '.join(EXERCISES)}.")
    verdict = judge(EXERCISES[name], answer)
    print(f"{name}: {verdict}")
    return answer if verdict == "CORRECT" and answer is not None else EXERCISES[name].reference


def grade(dice: float, paid_mb: float, budget_mb: float, needed: Mapping[str, float]) -> str:
    """Grade a plan by its Dice on the test knees, when it kept to its budget; prints the grade and what is missing.

    Args:
        dice: mean Dice of the chosen network on the test knees.
        paid_mb: everything that the hospital sent or got.
        needed: the grades from low to high, each with the Dice that it needs.

    Returns:
        The highest grade that was reached, or "none"; "refused" when more was paid than the budget allows.

    Raises:
        ValueError: a Dice outside 0 to 1, or bytes that nobody can have paid.
    """
    if not 0 <= dice <= 1:
        raise ValueError(f"a Dice lies between 0 and 1, this is {dice}: give the mean over the test knees.")
    if not 0 <= paid_mb < float("inf"):
        raise ValueError(f"{paid_mb} MB were not paid by anybody: add up the bytes of all messages, in 10^6.")
    if paid_mb > budget_mb:
        print(f"grade: refused. {paid_mb:.3f} MB were paid, the budget is {budget_mb} MB.")
        return "refused"
    reached = [name for name, least in needed.items() if dice >= least]
    missing = [f"{name} needs a Dice of {least:.3f}" for name, least in needed.items() if dice < least]
    best = reached[-1] if reached else "none"
    print(f"grade: {best}" + (f" ({'; '.join(missing)})" if missing else ""))
    return best


def environment_report() -> None:
    """Print versions, threads and device: what a digit of a training depends on."""
    print(f"Python {platform.python_version()} on {platform.machine()}")
    print(", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "monai", "numpy", "nibabel")))
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s) for torch, GPU: {gpu}")
