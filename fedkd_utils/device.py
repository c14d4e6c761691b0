"""Where networks compute: on a graphics processor (GPU) when there is one, else on the CPU.

Only volumes and networks move. What travels in a federation, what is averaged and what is written are float32 tensors
on the CPU, and every random number is drawn there, so that a GPU sees the same batches, masks and noise: its numbers
differ from the CPU's by rounding alone, which training then amplifies to less than another seed would change.

A network's passes run in mixed precision on a GPU that has bfloat16, with its tensors channels last: of the paper's
V-Net at the paper's grid a step then takes a fourteenth of the time (``python -m fedkd_utils bench gpu``). Weights,
gradients, losses and the optimiser stay in float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedkd_utils.provenance import versions


def compute_device() -> torch.device:
    """``cuda`` when PyTorch finds a GPU, else ``cpu``; the variable ``FEDKD_DEVICE`` names either.

    Raises:
        ValueError: ``FEDKD_DEVICE`` names no device, or a GPU that PyTorch does not find.
    """
    named = os.environ.get("FEDKD_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if named.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"FEDKD_DEVICE is {named!r}: it must be cpu or cuda, or not be set.")
    if named.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"FEDKD_DEVICE is {named!r}, but PyTorch {torch.__version__} finds no GPU: install a build for your GPU, "
            "or unset the variable."
        )
    return torch.device(named)


def device_title(device: torch.device) -> str:
    """The device in words: the GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def computes_mixed(device: torch.device) -> bool:
    """Whether networks run in mixed precision: on a GPU with bfloat16, unless ``FEDKD_PRECISION`` is ``float32``.

    Raises:
        ValueError: ``FEDKD_PRECISION`` is another word than ``mixed`` or ``float32``.
    """
    named = os.environ.get("FEDKD_PRECISION") or "mixed"
    if named not in ("mixed", "float32"):
        raise ValueError(f"FEDKD_PRECISION is {named!r}: it must be mixed or float32, or not be set.")
    return named == "mixed" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_title(device: torch.device) -> str:
    """In which numbers networks compute there, in words."""
    return "mixed (bfloat16)" if computes_mixed(device) else "float32"


def surroundings() -> dict[str, Any]:
    """What moves a digit besides code and inputs: versions, device and precision. Work begun in others begins anew."""
    device = compute_device()
    return {"versions": versions(), "device": device_title(device), "precision": precision_title(device)}


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, a GPU gives the same digits each time, and its float32 is a whole one; a CPU does so anyway."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
