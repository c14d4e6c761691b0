"""Files and folders that are never half written, and the bytes of a NIfTI file."""

from __future__ import annotations

import errno
import gzip
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

#: Significant digits in a file of results: a Dice to a ten-thousandth, a hundredth of what a seed moves.
DIGITS = 4


def write_atomically(path: Path, content: bytes) -> Path:
    """Replace a file by new content in one step: a reader or a kill sees the old file or the new one.

    Raises:
        OSError: the file cannot be written; it names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # a full disk does not say which file
            raise OSError(
                error.errno, f"cannot be written ({error.strerror}): make room, or write elsewhere", str(path)
            ) from error
        raise
    return path


@contextmanager
def folder_in_one_step(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its place when the block ends well, and is gone when it does not.

    Args:
        replace: remove what is there, and what a killed process left. Only for one who holds a lock.

    Raises:
        FileExistsError: ``folder`` exists and is not to be replaced.
        OSError: it cannot be written.
    """
    if folder.exists() and not replace:
        raise FileExistsError(errno.EEXIST, "exists already; name a new folder, or remove it first", str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if replace:
        for left in folder.parent.glob(f".{folder.name}-*.building"):
            shutil.rmtree(left, ignore_errors=True)
    try:
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".building", dir=folder.parent))
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror}): write elsewhere", str(folder)) from error
    try:
        yield building
        building.chmod(0o755)
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)  # a full disk stays no fuller than it was
        if isinstance(error, OSError) and str(error.filename).startswith(f"{building}{os.sep}"):
            place = folder / Path(error.filename).relative_to(building)  # the name that the user gave
            raise OSError(error.errno, error.strerror, str(place)) from error
        raise


def rounded(value: Any) -> Any:
    """A value as a small JSON file holds it, inside lists and mappings too: floats have :data:`DIGITS` digits.

    NaN and infinity, which JSON does not have, become None; all else stays as it is.
    """
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def zipped(content: bytes) -> bytes:
    """Gzipped; equal content gives equal bytes, in every version of Python."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0, filename="") as file:
        file.write(content)
    return out.getvalue()


def nifti_bytes(array: NDArray[Any], affine: NDArray[np.float64], levels: int = 32767) -> bytes:
    """A gzipped NIfTI file in memory: equal arrays give equal bytes.

    Args:
        array: (X, Y, Z); uint8 stays what it is, all else becomes int16 with a scale.
        affine: (4, 4) voxel index to RAS mm.
        levels: grey levels between 0 and the largest magnitude.
    """
    if array.dtype == np.uint8:
        image = nib.Nifti1Image(array, affine)
    else:
        slope = max(float(np.abs(array).max()), 1e-6) / levels
        image = nib.Nifti1Image(np.round(array / slope).astype(np.int16), affine)
        image.header.set_slope_inter(slope, 0.0)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    return zipped(image.to_bytes())
