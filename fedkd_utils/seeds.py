"""Seeds: every random draw of the course starts from a name, never from the state that was left behind."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_GLOBAL_GENERATOR = threading.Lock()  # clients may train side by side in threads


def seed_of(*parts: int | str) -> int:
    """A seed of 63 bits for a named draw, e.g. ``seed_of(0, "client", "north", 3)``.

    Other names give independent seeds (SHA-256), so adding a draw never moves the others, and a draw does not
    depend on what was drawn before it.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_of(*parts: int | str) -> torch.Generator:
    """A generator on the CPU, seeded by :func:`seed_of`."""
    return torch.Generator().manual_seed(seed_of(*parts))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block and leave it as it was found.

    Only the initial weights of a network need it: PyTorch draws them from the global generator and nowhere
    else. One thread at a time.
    """
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
