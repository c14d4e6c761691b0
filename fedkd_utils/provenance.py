"""What a stored result depends on: code, files and versions, as short hashes."""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import torch

#: The edition of all digits. Whoever changes code so that a digit moves raises it, and committed results of another
#: edition count as old; ``tests/test_golden.py`` notices a digit that moves. A hash of the code would call results old
#: whenever a name or a comment changes.
NUMBERS = 1

_PACKAGES = ("torch", "monai", "numpy", "scipy", "nibabel")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can move a digit."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


@functools.cache
def code_hash(modules: tuple[str, ...]) -> str:
    """A hash of the named modules of ``fedkd_utils`` that ignores comments, docstrings and layout.

    A cached teacher or result is remade when the code behind it changed, and only then.
    """
    digest = hashlib.sha256()
    for name in modules:
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [line for line in body if not _is_bare_string(line)]  # type: ignore[attr-defined]
        digest.update(f"{name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


def _is_bare_string(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def files_hash(paths: Iterable[Path]) -> str:
    """A hash of the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def state_hash(state: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
