"""Volumes that are not NIfTI: HDF5, MetaImage and DICOM series. A damaged file is one line that names it.

HDF5 is read by h5py and DICOM by ITK. MetaImage is read here: some damaged headers make ITK end the whole process, and
with others, as a negative spacing, it guesses.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement

from fedkd_utils.errors import VolumeError, one_line
from fedkd_utils.transforms import RIGHT_ANGLE_DEGREES, by_axis, checked_voxels, refuse_sheared

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is raised as an error

#: Types of voxels by the names that MetaImage has for them.
METAIMAGE_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}

#: The names of the flag for voxels with their highest byte first.
_BIG_ENDIAN = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")

#: MetaImage and DICOM count to the left and to the back.
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

#: No MetaImage header is longer, in bytes.
METAIMAGE_HEADER = 10_000

#: The length that DICOM gives to what ends where it says so.
ANY_LENGTH = 0xFFFFFFFF

#: So many times its length a compressed file may hold: zlib packs no tighter.
TIGHTEST = 1040


# --- HDF5 ------------------------------------------------------------


def _with_hdf5(path: Path, take: Callable[[h5py.File], Any]) -> Any:
    """What ``take`` takes from an HDF5 file.

    Raises:
        VolumeError: no such file, or a damaged one.
    """
    try:
        with h5py.File(path, "r") as file:
            return take(file)
    except VolumeError:
        raise
    except Exception as error:  # h5py raises many kinds for a damaged file
        raise VolumeError(f"{path}: damaged or not HDF5 ({one_line(error)}). Fetch it again.") from error


def hdf5_keys(path: Path) -> list[str]:
    """The names at the top of an HDF5 file.

    Raises:
        VolumeError: no such file, or a damaged one.
    """
    return _with_hdf5(path, lambda file: sorted(file))


def read_hdf5(path: Path, key: str) -> NDArray[Any]:
    """One array of an HDF5 file.

    Raises:
        VolumeError: no such file, a damaged one, or one without this array.
    """

    def take(file: h5py.File) -> NDArray[Any]:
        if key not in file:
            raise VolumeError(f"{path}: has no {key!r}, only {sorted(file)}. Fetch the file again.")
        found = file[key]
        if not isinstance(found, h5py.Dataset):
            raise VolumeError(f"{path}: {key!r} is no array. Fetch the file again.")
        if found.nbytes > TIGHTEST * path.stat().st_size:  # before room is made for what a damaged header claims
            raise ValueError(f"{found.nbytes} bytes cannot be in it")
        return np.asarray(found)

    return np.asarray(_with_hdf5(path, take))


# --- MetaImage ------------------------------------------------------------


def read_metaimage(path: Path, *, posed: bool = True) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels (X, Y, Z) and affine (4, 4) to RAS mm of a MetaImage: an .mhd header with its data file, or an .mha.

    Args:
        posed: whether its header has to say the spacing. Without one it is 1 mm.

    Raises:
        FileNotFoundError: there is no such file.
        VolumeError: a damaged header, not one grey 3D volume, no spacing, sheared axes, or a data file that is not
            there, is damaged or has another length than the header says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Check the folder against the set's layout.")
    try:
        fields, behind = _metaimage_fields(path)
        voxels, affine = _metaimage_voxels(fields, behind, path), _metaimage_affine(fields, posed)
    except (ValueError, OSError, zlib.error) as error:
        raise VolumeError(f"{path}: damaged, or no MetaImage ({one_line(error)}). Fetch it again.") from error
    refuse_sheared(affine, path)
    return voxels, affine


def _metaimage_fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields of a header, and how many bytes it has: ``ElementDataFile`` is its last line."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while "ElementDataFile" not in fields and file.tell() < METAIMAGE_HEADER:
            line = file.readline(METAIMAGE_HEADER).decode("utf-8")
            if not line:
                break
            line = line.strip()
            key, equals, value = (part.strip() for part in line.partition("="))
            if not (equals and key and line.isprintable()):
                raise ValueError(f"{line[:40]!r} is no line of a header")
            if key in fields:
                raise ValueError(f"{key} is there twice")
            fields[key] = value
        if "ElementDataFile" not in fields:
            raise ValueError("no ElementDataFile at the end of its header")
        return fields, file.tell()


def _metaimage_numbers(fields: Mapping[str, str], names: Sequence[str], count: int) -> list[float] | None:
    """The numbers of a field that may have one of several names; None without any."""
    found = {fields[name]: name for name in names if name in fields}
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found.values())} differ")
    ((text, name),) = found.items()
    values = [float(word) for word in text.split()]
    if len(values) != count or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name} is {text[:60]!r} and not {count} numbers")
    return values


def _metaimage_voxels(fields: Mapping[str, str], behind: int, path: Path) -> NDArray[Any]:
    """The voxels, as a header describes them; ``behind``: where they begin in the header's own file."""
    for key, value in (("ObjectType", "Image"), ("NDims", "3"), ("ElementNumberOfChannels", "1"), ("HeaderSize", "0")):
        if fields.get(key, value) != value:
            raise ValueError(f"{key} is {fields[key][:60]!r} and not {value}")
    flags = {}
    for key, usual in (("BinaryData", "True"), ("CompressedData", "False"), *((key, "False") for key in _BIG_ENDIAN)):
        flags[key] = fields.get(key, usual).lower()
        if flags[key] not in ("true", "false"):
            raise ValueError(f"{key} is {fields[key][:60]!r} and neither True nor False")
    if flags["BinaryData"] == "false":
        raise ValueError("its voxels are written as text")
    shape = _metaimage_numbers(fields, ("DimSize",), 3)
    if shape is None or not all(n >= 1 and n == int(n) for n in shape):
        raise ValueError(f"DimSize is {fields.get('DimSize')!r} and not three whole numbers")
    kind = fields.get("ElementType")
    if kind not in METAIMAGE_TYPES:
        raise ValueError(f"ElementType is {kind!r} and not one of {', '.join(METAIMAGE_TYPES)}")
    stored = np.dtype(METAIMAGE_TYPES[kind]).newbyteorder(">" if "true" in [flags[key] for key in _BIG_ENDIAN] else "<")
    needed = math.prod(int(n) for n in shape) * stored.itemsize
    name = fields["ElementDataFile"]
    source = path if name.lower() == "local" else path.parent / name
    if not source.is_file():
        raise ValueError(f"its data file {name[:200]!r} is missing")
    content = source.read_bytes()[behind if source is path else 0 :]
    if flags["CompressedData"] == "true":
        content = zlib.decompressobj().decompress(content, needed + 1)
    if len(content) != needed:
        raise ValueError(f"{source.name} has {len(content)} bytes of voxels and not {needed}")
    return np.frombuffer(content, stored).reshape([int(n) for n in reversed(shape)]).T


def _metaimage_affine(fields: Mapping[str, str], posed: bool) -> NDArray[np.float64]:
    """The affine (4, 4) to RAS mm that a header gives."""
    spacing = _metaimage_numbers(fields, ("ElementSpacing",), 3) or _metaimage_numbers(fields, ("ElementSize",), 3)
    if spacing is None and posed:
        raise ValueError("ElementSpacing is missing")
    spacing = spacing or [1.0, 1.0, 1.0]
    if min(spacing) <= 0:
        raise ValueError(f"ElementSpacing is {by_axis(spacing)}")
    axes = _metaimage_numbers(fields, ("TransformMatrix", "Rotation", "Orientation"), 9)
    along = np.eye(3) if axes is None else np.array(axes).reshape(3, 3).T  # the header has the axes one by one
    if not np.allclose(np.linalg.norm(along, axis=0), 1, atol=1e-3):
        raise ValueError(f"its axes {along.T.tolist()} have not the length 1")
    affine = np.eye(4)
    affine[:3, :3] = along * np.array(spacing)
    affine[:3, 3] = _metaimage_numbers(fields, ("Offset", "Position", "Origin"), 3) or [0.0, 0.0, 0.0]
    return _LPS @ affine


# --- DICOM ------------------------------------------------------------


def read_dicom(folder: str | Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A DICOM series folder as one volume, slices in the order of their positions whatever their files are called.

    Returns:
        voxels (X, Y, Z) float32 and affine (4, 4) to RAS mm.

    Raises:
        FileNotFoundError: no such folder.
        VolumeError: no or several series, a slice that is missing, there twice or beside the others, damaged files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Give the folder with the series' DICOM files.")
    series: dict[str, list[_Slice]] = {}
    for path in sorted(folder.iterdir()):
        if is_dicom(path) and (found := _slice(path)) is not None:
            series.setdefault(found.series, []).append(found)
    if not series:
        raise VolumeError(f"{folder}: no DICOM image series in it. Give the folder with the files of one series.")
    if len(series) > 1:
        listed = ", ".join(f"{name} ({len(files)} files)" for name, files in list(series.items())[:6])
        raise VolumeError(f"{folder}: holds {len(series)} series: {listed}. Give each a folder of its own.")
    (slices,) = series.values()
    if len(slices) > 1:
        slices = _in_order(folder, slices)
    try:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(one.path) for one in slices])
        image = reader.Execute()
    except RuntimeError as error:
        raise VolumeError(f"{folder}: the series cannot be read ({one_line(error)}). Export it again.") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise VolumeError(f"{folder}: not one grey 3D volume but {image.GetDimension()} dimensions. Split it first.")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    refuse_sheared(affine, folder)
    return checked_voxels(sitk.GetArrayFromImage(image).T, folder), _LPS @ affine


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does."""
    if not path.is_file() or path.name[0] == ".":
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


@dataclass(frozen=True)
class _Slice:
    """A DICOM file with an image, and where that lies; of a file with all slices only the first counts, or none."""

    path: Path
    series: str
    turn: list[float]  # ImageOrientationPatient; empty without one
    corner: list[float]  # ImagePositionPatient; empty without one


def _slice(path: Path) -> _Slice | None:
    """What a DICOM file says of its image; None when it holds none, as a DICOMDIR or a report.

    Raises:
        VolumeError: a damaged file. ITK would make room for whatever such a file claims to hold.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of oddities that do not matter here
            header = pydicom.dcmread(path)
            if "PixelData" not in header and "Rows" not in header:
                return None
            for tag in list(header.keys()):
                raw = header.get_item(tag)
                if isinstance(raw, RawDataElement) and raw.length != ANY_LENGTH and len(raw.value or b"") < raw.length:
                    raise ValueError(f"{tag} is shorter than it says")
            voxels = int(header.Rows) * int(header.Columns) * int(header.get("NumberOfFrames") or 1)
            held = len(header.PixelData) * (TIGHTEST if header.file_meta.TransferSyntaxUID.is_compressed else 1)
            if voxels * int(header.BitsAllocated) > 8 * held:
                raise ValueError(f"its pixels are too few for {header.Rows} rows of {header.Columns}")
            turn, corner = (
                [float(x) for x in header.get(f"Image{kind}Patient") or ()] for kind in ("Orientation", "Position")
            )
            return _Slice(path, str(header.get("SeriesInstanceUID")), turn, corner)
    except Exception as error:  # pydicom raises many kinds for damaged files
        raise VolumeError(f"{path}: damaged ({one_line(error)}). Export it again.") from error


def _in_order(folder: Path, slices: Sequence[_Slice]) -> list[_Slice]:
    """The slices of a series from the first place to the last.

    Raises:
        VolumeError: they are not a stack at even steps: ITK would stretch the others over a missing one.
    """
    for one in slices:
        if len(one.turn) != 6 or len(one.corner) != 3 or not np.isfinite([*one.turn, *one.corner]).all():
            raise VolumeError(f"{one.path}: does not say where it lies. Export it again.")
        along = np.reshape(one.turn, (2, 3))
        if not np.allclose(along @ along.T, np.eye(2), atol=1e-2):
            raise VolumeError(f"{one.path}: its rows and columns do not meet at right angles. Export it again.")
        if not np.allclose(one.turn, slices[0].turn, atol=1e-2):
            raise VolumeError(f"{one.path}: turned against the other slices of its series; a localiser? Split them.")
    through = np.cross(*np.reshape(slices[0].turn, (2, 3)))
    corners = np.array([one.corner for one in slices])
    places = corners @ through
    steps = np.diff(np.sort(places))
    usual = float(np.median(steps))
    if usual <= 1e-3 or steps.min() < 0.5 * usual:
        raise VolumeError(f"{folder}: two slices lie at one place; several echoes or times in one series? Split it.")
    if steps.max() > 1.2 * usual:
        raise VolumeError(f"{folder}: slices lie {usual:.2f} mm apart, but once {steps.max():.2f} mm: one is missing.")
    first, last = np.argmin(places), np.argmax(places)
    aside = float(np.linalg.norm(corners[last] - corners[first])) ** 2 - float(places[last] - places[first]) ** 2
    if aside > (np.tan(np.radians(RIGHT_ANGLE_DEGREES)) * (places[last] - places[first])) ** 2:
        raise VolumeError(
            f"{folder}: its slices do not lie straight above each other but {aside**0.5:.1f} mm aside: the stack is "
            "sheared. Resample it to a grid with right angles, or export it again."
        )
    return [slices[k] for k in np.argsort(places)]
