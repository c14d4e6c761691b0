"""The pixels of DICOM files, decoded by ITK; also in a process of its own, which a damaged JPEG may end."""

from __future__ import annotations

import io
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
        RuntimeError: a file that ITK cannot decode.
    """
    frames = [sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat32, "GDCMImageIO")) for path in paths]
    return np.concatenate([frame.reshape(-1, *frame.shape[-2:]) for frame in frames])


def pixels_apart(paths: Sequence[Path]) -> NDArray[np.float32]:
    """:func:`pixels` in a process of its own: what its decoders do to it does nothing to this one.

    Raises:
        RuntimeError: a file that ITK cannot decode.
    """
    done = subprocess.run([sys.executable, __file__, *map(str, paths)], capture_output=True)
    if done.returncode:
        raise RuntimeError("its compressed pixels cannot be decoded")
    return np.load(io.BytesIO(done.stdout), allow_pickle=False)


if __name__ == "__main__":
    out = io.BytesIO()
    np.save(out, pixels([Path(name) for name in sys.argv[1:]]))
    sys.stdout.buffer.write(out.getvalue())
