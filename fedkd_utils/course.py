"""Exercises that check themselves, and a report of the environment.

``f = check("name", f)`` says CORRECT, WRONG with a hint, or NOT ATTEMPTED, and hands back the reference unless the
answer was correct, so that *Run All* always completes. The exercises stand in ``exercises.py``.
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


def _same(a: Any, b: Any) -> bool:
    """Equal up to rounding, for numbers, arrays, tensors and dictionaries of them; NaN equals NaN."""
    if isinstance(b, Mapping):
        return isinstance(a, Mapping) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in b)
    if a is None:  # NumPy would read it as NaN
        return False
    try:
        x, y = (np.asarray(v.detach() if isinstance(v, torch.Tensor) else v, dtype=np.float64) for v in (a, b))
    except (TypeError, ValueError):
        return False
    return x.shape == y.shape and bool(np.allclose(x, y, rtol=1e-5, atol=1e-8, equal_nan=True))


def _results(function: Function, exercise: Exercise) -> list[Any]:
    """What a function returns for every probe; it gets copies, so that it may write into them."""
    return [function(*copy.deepcopy(probe)) for probe in exercise.probes]


def _agree(some: list[Any], others: list[Any]) -> bool:
    return all(_same(a, b) for a, b in zip(some, others, strict=True))


def judge(exercise: Exercise, answer: Function | None) -> str:
    """The verdict on an answer, one line."""
    if answer is None:
        return "NOT ATTEMPTED"
    try:
        given = _results(answer, exercise)
    except Exception as error:  # whatever a student's function may raise
        return f"WRONG: it raised {type(error).__name__}: {error}"
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
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in list(value.items())[:3]) + "}"
    if isinstance(value, (np.ndarray, torch.Tensor)) and np.ndim(value):
        array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        return f"an array of shape {array.shape} beginning {array.ravel()[:3].round(4).tolist()}"
    return f"{float(value):.6g}" if isinstance(value, (int, float, np.number, torch.Tensor)) else repr(value)


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


def environment_report() -> None:
    """Print versions, threads and device: what a digit of a training depends on."""
    print(f"Python {platform.python_version()} on {platform.machine()}")
    print(", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "monai", "numpy", "nibabel")))
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s) for torch, GPU: {gpu}")
