"""The pixels of DICOM files, decoded by ITK; also in a process of its own, which a damaged JPEG may end."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is raised as an error


def pixels(paths: Sequence[Path]) -> NDArray[np.float32]:
    """All frames of files of one size, rescaled as each says: (frames, rows, columns).

    Raises:
        RuntimeError: a file that ITK cannot decode; names it.
    """
    frames = []
    for path in paths:
        try:
            image = sitk.ReadImage(str(path), sitk.sitkFloat32, "GDCMImageIO")
        except RuntimeError as error:
            raise RuntimeError(f"{path}: {error}") from error
        frames.append(sitk.GetArrayFromImage(image))
    return np.concatenate([frame.reshape(-1, *frame.shape[-2:]) for frame in frames])


def pixels_apart(paths: Sequence[Path]) -> NDArray[np.float32]:
    """:func:`pixels` in a process of its own: what its decoders do to it does nothing to this one.

    Raises:
        RuntimeError: a file that ITK cannot decode; names the first such file.
    """
    names = json.dumps([str(path) for path in paths]).encode()
    try:
        done = subprocess.run([sys.executable, "-P", __file__], input=names, capture_output=True)
    except OSError as error:
        raise RuntimeError(f"{paths[0]}: no process to decode it ({error.strerror})") from error
    if done.returncode:
        begun = re.findall(rb"^reading (\d+)$", done.stderr, re.MULTILINE)
        raise RuntimeError(f"{paths[int(begun[-1]) if begun else 0]}: its compressed pixels cannot be decoded")
    return np.load(io.BytesIO(done.stdout), allow_pickle=False)


def _child() -> None:
    """Decode the files that standard input names, and say on the way which one."""
    read = []
    for number, name in enumerate(json.load(sys.stdin)):
        print(f"\nreading {number}", file=sys.stderr, flush=True)
        read.append(pixels([Path(name)]))
    out = io.BytesIO()
    np.save(out, np.concatenate(read))
    sys.stdout.buffer.write(out.getvalue())


if __name__ == "__main__":
    _child()
