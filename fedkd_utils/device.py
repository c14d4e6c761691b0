"""Where networks compute: on a graphics processor (GPU) when there is one, else on the CPU.

Only volumes and networks move. What travels in a federation, what is averaged and what is written are tensors on the
CPU, and every random number is drawn there, so that a GPU sees the same batches, masks and noise: its numbers differ
from the CPU's by rounding alone, which training then amplifies to less than another seed would change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, a GPU computes in whole float32, and gives the same digits each time; a CPU does so anyway."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
