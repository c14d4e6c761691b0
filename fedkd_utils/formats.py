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
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue
from pydicom.uid import UID, UID_dictionary

from fedkd_utils import decode
from fedkd_utils.errors import VolumeError, one_line, printable
from fedkd_utils.transforms import RIGHT_ANGLE_DEGREES, by_axis, checked_voxels, refuse_sheared

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

#: The fields of a MetaImage header that are used here; what else it says is passed over.
METAIMAGE_FIELDS = {
    *("ObjectType", "NDims", "ElementNumberOfChannels", "BinaryData", "CompressedData", "HeaderSize"),
    *("BinaryDataByteOrderMSB", "ElementByteOrderMSB", "DimSize", "ElementType", "ElementDataFile"),
    *("ElementSpacing", "ElementSize", "TransformMatrix", "Rotation", "Orientation", "Offset", "Position", "Origin"),
}

#: For zlib: look which of the two it is.
_ZLIB_OR_GZIP = 47

#: MetaImage and DICOM count to the left and to the back.
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

#: No MetaImage header is longer, in bytes.
METAIMAGE_HEADER = 1_000_000

#: No compressed DICOM file of a knee holds more bytes.
MOST_BYTES = 2**31

#: With this begin the classes of DICOM's own objects; those of manufacturers do not.
STANDARD_ROOT = "1.2.840.10008."

#: The length that DICOM gives to what ends where it says so.
ANY_LENGTH = 0xFFFFFFFF

#: How far a slice may lie off its place among even steps: a share of the step, or as headers round, in mm.
UNEVEN, ROUNDED_MM = 0.1, 0.2

#: So many times its length a compressed HDF5 file may hold: zlib packs no tighter.
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
    """The fields of a header that are used here, and how many bytes it has: ``ElementDataFile`` is its last line."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while "ElementDataFile" not in fields and file.tell() < METAIMAGE_HEADER:
            line = file.readline(METAIMAGE_HEADER)
            if not line:
                break
            text = line.decode("utf-8-sig", "replace").strip()
            key, equals, value = (part.strip() for part in text.partition("="))
            if text and not (equals and key):
                raise ValueError(f"{text[:40]!r} is no line of a header")
            if key in fields:
                raise ValueError(f"{key} is there twice")
            if key in METAIMAGE_FIELDS:
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


def _metaimage_flag(fields: Mapping[str, str], names: Sequence[str], usual: str) -> bool:
    """Whether a field that may have one of several names says yes."""
    said = {fields.get(name, usual).lower() for name in names if name in fields} or {usual.lower()}
    if not said <= {"true", "t", "1"} and not said <= {"false", "f", "0"}:
        raise ValueError(f"{' or '.join(names)} is {', '.join(sorted(said))[:60]!r} and neither True nor False")
    return said <= {"true", "t", "1"}


def _metaimage_voxels(fields: Mapping[str, str], behind: int, path: Path) -> NDArray[Any]:
    """The voxels, as a header describes them; ``behind``: where they begin in the header's own file."""
    for key, value in (("ObjectType", "Image"), ("NDims", "3"), ("ElementNumberOfChannels", "1")):
        if fields.get(key, value).lower() != value.lower():
            raise ValueError(f"{key} is {fields[key][:60]!r} and not {value}")
    if not _metaimage_flag(fields, ("BinaryData",), "True"):
        raise ValueError("its voxels are written as text")
    packed = _metaimage_flag(fields, ("CompressedData",), "False")
    big_endian = _metaimage_flag(fields, ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"), "False")
    shape = _metaimage_numbers(fields, ("DimSize",), 3)
    if shape is None or not all(n >= 1 and n == int(n) for n in shape):
        raise ValueError(f"DimSize is {fields.get('DimSize')!r} and not three whole numbers")
    kind = fields.get("ElementType")
    if kind not in METAIMAGE_TYPES:
        raise ValueError(f"ElementType is {kind!r} and not one of {', '.join(METAIMAGE_TYPES)}")
    stored = np.dtype(METAIMAGE_TYPES[kind]).newbyteorder(">" if big_endian else "<")
    needed = math.prod(int(n) for n in shape) * stored.itemsize
    name = fields["ElementDataFile"]
    if name.split()[:1] == ["LIST"] or "%" in name:
        raise ValueError("one file a slice is not read here: convert it")
    source = path if name.lower() == "local" else path.parent / name
    if not name or not source.is_file():
        raise ValueError(f"its data file {name[:200]!r} is missing")
    (start,) = _metaimage_numbers(fields, ("HeaderSize",), 1) or [0.0]
    if start != int(start) or start < -1:
        raise ValueError(f"HeaderSize is {fields['HeaderSize']!r}")
    content = source.read_bytes()[behind if source is path else 0 :]
    content = content[int(start) :] if start >= 0 else content[-needed:]
    if packed:
        content = zlib.decompressobj(_ZLIB_OR_GZIP).decompress(content, needed + 1)
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


@dataclass(frozen=True)
class _Slice:
    """One slice of a series: where it lies, as DICOM says it, and whose frame it is."""

    path: Path
    frame: str  # behind its file's name: "", or ", frame 1" and so on
    size: tuple[int, int]  # rows, columns
    spacing_mm: list[float]  # PixelSpacing: between rows, between columns
    turn: list[float]  # ImageOrientationPatient: the directions along a row and along a column
    corner: list[float]  # ImagePositionPatient, mm


@dataclass(frozen=True)
class _File:
    """A DICOM file with an image."""

    path: Path
    series: str
    compression: str  # the name of the transfer syntax; "" where pixels are stored as they are
    slices: list[_Slice]


def read_dicom(folder: str | Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A DICOM series folder as one volume, slices in the order of their positions whatever their files are called.

    A file may hold one slice or, as Enhanced MR does, all of them. Grey levels are rescaled as each file says.

    Returns:
        voxels (X, Y, Z) float32 and affine (4, 4) to RAS mm.

    Raises:
        FileNotFoundError: no such folder.
        VolumeError: no or several series; a file that is damaged or no DICOM file; a slice that is missing, there
            twice, beside the others or of another size; no spacing or position; colour.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Give the folder with the series' DICOM files.")
    inside = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."]
    for path in inside:
        if printable(path) != str(path):  # ITK would end the whole process
            raise VolumeError(f"{printable(path)}: characters that cannot be printed in its path. Rename it.")
    known = [path for path in inside if is_dicom(path)]
    endings = {path.suffix.lower() for path in known} | {"", ".dcm", ".ima"}
    for path in inside:
        if path not in known and (path.suffix.lower() in endings or path.suffix[1:].isdigit()):
            raise VolumeError(
                f"{path}: does not begin as DICOM files do (128 bytes, then DICM). Export it again, or move it away."
            )
    series: dict[str, list[_File]] = {}
    for path in known:
        if (found := _file(path)) is not None:
            series.setdefault(found.series, []).append(found)
    if not series:
        raise VolumeError(f"{folder}: no DICOM image series in it. Give the folder with the files of one series.")
    if len(series) > 1:
        listed = ", ".join(f"{name} ({len(files)} files)" for name, files in list(series.items())[:6])
        raise VolumeError(f"{folder}: holds {len(series)} series: {listed}. Give each a folder of its own.")
    (files,) = series.values()
    slices = [one for file in files for one in file.slices]
    order, affine = _stack(folder, slices)
    packed = sorted({file.compression for file in files} - {""})
    try:
        decode_files = decode.pixels_apart if packed else decode.pixels
        frames = decode_files([file.path for file in files])
        if frames.shape != (len(slices), *slices[0].size):
            raise RuntimeError(f"{folder}: pixels of shape {frames.shape}")
    except (RuntimeError, ValueError) as error:
        how = f" (stored as {', '.join(packed)})" if packed else ""
        raise VolumeError(f"{one_line(error)}{how}. Export it again.") from error
    return checked_voxels(frames[order].T, folder), affine


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does."""
    if not path.is_file() or path.name[0] == ".":
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _kind(header: pydicom.Dataset) -> UID:
    """The class of a DICOM object, as MR Image Storage."""
    return UID(str(header.file_meta.get("MediaStorageSOPClassUID") or header.get("SOPClassUID")))


def holds_no_image(header: pydicom.Dataset) -> bool:
    """Whether a header is that of a DICOMDIR, a report or the like, and not of a damaged image."""
    kind = _kind(header)
    known = kind in UID_dictionary or (kind.is_valid and not kind.startswith(STANDARD_ROOT))
    return "Rows" not in header and known and "Image Storage" not in kind.name


def _file(path: Path) -> _File | None:
    """What a DICOM file says of its image; None when it is no image, as a DICOMDIR or a report.

    Raises:
        VolumeError: a damaged file, or no grey image. ITK would make room for whatever a damaged file claims to hold.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of oddities that do not matter here
            header = pydicom.dcmread(path)
            if "PixelData" not in header and holds_no_image(header):
                return None
            for tag in list(header.keys()):
                raw = header.get_item(tag)
                if isinstance(raw, RawDataElement) and raw.length != ANY_LENGTH and len(raw.value or b"") < raw.length:
                    raise ValueError(f"{tag} is shorter than it says")
            return _File(path, str(header.get("SeriesInstanceUID")), _compression(header), _slices(path, header))
    except Exception as error:  # pydicom raises many kinds for damaged files
        raise VolumeError(f"{path}: damaged or not to be used ({one_line(error)}). Export it again.") from error


def _compression(header: pydicom.Dataset) -> str:
    """How pixels are stored, "" where they are as they are; refuses colour and what the file cannot hold."""
    if int(header.get("SamplesPerPixel") or 1) != 1 or header.get("PhotometricInterpretation", "") != "MONOCHROME2":
        raise ValueError(f"PhotometricInterpretation is {header.get('PhotometricInterpretation')} and not MONOCHROME2")
    syntax = header.file_meta.TransferSyntaxUID
    voxels = int(header.Rows) * int(header.Columns) * int(header.get("NumberOfFrames") or 1)
    held = MOST_BYTES if syntax.is_compressed else len(header.PixelData)
    if voxels * int(header.BitsAllocated) > 8 * held:
        raise ValueError(f"its pixels are too few for {header.Rows} rows of {header.Columns}")
    return str(syntax.name) if syntax.is_compressed else ""


def _slices(path: Path, header: pydicom.Dataset) -> list[_Slice]:
    """Where the slices of a file lie: what its header says, or what that of each frame says."""
    count = int(header.get("NumberOfFrames") or 1)
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])
    frames = list(header.get("PerFrameFunctionalGroupsSequence") or [])
    if count > 1 and len(frames) != count:
        raise ValueError(f"{count} frames, but it says of {len(frames)} where they lie")

    def of_frame(k: int, group: str, word: str) -> list[float]:
        for facts in (*frames[k : k + 1], *shared):
            if group in facts:
                return _numbers(facts[group].value[0], word)
        return _numbers(header, word)

    group = "PixelValueTransformationSequence"
    if any(group in facts for facts in (*frames, *shared)) and "Enhanced" not in _kind(header).name:
        raise ValueError(f"{group} in what is no Enhanced image")
    if len({(*of_frame(k, group, "RescaleSlope"), *of_frame(k, group, "RescaleIntercept")) for k in range(count)}) > 1:
        raise ValueError("its frames are rescaled in several ways")
    return [
        _Slice(
            path,
            f", frame {k + 1}" if count > 1 else "",
            (int(header.Rows), int(header.Columns)),
            of_frame(k, "PixelMeasuresSequence", "PixelSpacing"),
            of_frame(k, "PlaneOrientationSequence", "ImageOrientationPatient"),
            of_frame(k, "PlanePositionSequence", "ImagePositionPatient"),
        )
        for k in range(count)
    ]


def _numbers(facts: pydicom.Dataset, word: str) -> list[float]:
    """The numbers of an element; none when it is not there."""
    value = facts.get(word)
    return [] if value is None else [float(x) for x in (value if isinstance(value, MultiValue) else [value])]


def _directions(turn: Sequence[float]) -> NDArray[np.float64] | None:
    """Unit vectors (2, 3) along a row and along a column; None where ImageOrientationPatient has no such two."""
    along = np.reshape(turn, (2, 3))
    lengths = np.linalg.norm(along, axis=1, keepdims=True)
    if np.abs(lengths - 1).max() > 0.1:
        return None
    along = along / lengths
    return along if abs(float(along[0] @ along[1])) < math.sin(math.radians(RIGHT_ANGLE_DEGREES)) else None


def _stack(folder: Path, slices: Sequence[_Slice]) -> tuple[list[int], NDArray[np.float64]]:
    """The order of the slices from the first place to the last, and the affine (4, 4) to RAS mm of their stack.

    Raises:
        VolumeError: they are not a stack at even steps.
    """
    first = slices[0]
    for one in slices:
        name = f"{one.path}{one.frame}"
        if len(one.turn) != 6 or len(one.corner) != 3 or not np.isfinite([*one.turn, *one.corner]).all():
            raise VolumeError(f"{name}: does not say where it lies. Export it again.")
        along = _directions(one.turn)
        if along is None:
            raise VolumeError(f"{name}: its rows and columns do not meet at right angles. Export it again.")
        if not np.allclose(one.turn, first.turn, atol=1e-2):
            raise VolumeError(f"{name}: turned against the other slices of its series; a localiser? Split them.")
        if len(one.spacing_mm) != 2 or not all(math.isfinite(step) and step > 0 for step in one.spacing_mm):
            raise VolumeError(
                f"{name}: PixelSpacing is {one.spacing_mm} and not two positive numbers. Export it again."
            )
        if one.size != first.size or not np.allclose(one.spacing_mm, first.spacing_mm, rtol=1e-3):
            sizes = [f"{by_axis(x.size)} voxels of {by_axis(x.spacing_mm)} mm" for x in (one, first)]
            raise VolumeError(f"{name}: {sizes[0]}, but {first.path.name} has {sizes[1]}. Split the series.")
    if len(slices) < 2:
        raise VolumeError(f"{folder}: one slice is not a 3D volume. Give the folder with all files of the series.")
    rows = _directions(first.turn)
    assert rows is not None  # else refused above
    corners = np.array([one.corner for one in slices])
    places = corners @ np.cross(*rows)
    order = [int(k) for k in np.argsort(places, kind="stable")]
    steps = np.diff(places[order])
    usual = float(np.median(steps))
    if usual <= 1e-3 or steps.min() < 0.5 * usual:
        k = int(steps.argmin())
        two = " and ".join(slices[i].path.name + slices[i].frame for i in order[k : k + 2])
        raise VolumeError(
            f"{folder}: two slices lie at one place ({two}); a copy, or several echoes or times? Split it."
        )
    most = min(max(UNEVEN * usual, ROUNDED_MM), usual / 2)
    if steps.max() > 1.5 * usual and np.allclose(steps, np.round(steps / usual) * usual, atol=UNEVEN * usual):
        raise VolumeError(f"{folder}: slices lie {usual:.2f} mm apart, but once {steps.max():.2f} mm: one is missing.")
    step = (corners[order[-1]] - corners[order[0]]) / (len(order) - 1)
    off = np.linalg.norm(corners[order] - corners[order[0]] - np.arange(len(order))[:, None] * step, axis=1).max()
    if off > most:
        raise VolumeError(f"{folder}: up to {off:.1f} mm off even steps: several stacks in one series? Split it.")
    aside = float(np.linalg.norm(np.cross(step, np.cross(*rows)))) * (len(order) - 1)
    if aside > np.tan(np.radians(RIGHT_ANGLE_DEGREES)) * (places.max() - places.min()):
        raise VolumeError(
            f"{folder}: its slices do not lie straight above each other but {aside:.1f} mm aside: the stack is "
            "sheared. Resample it to a grid with right angles, or export it again."
        )
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = rows[0] * first.spacing_mm[1], rows[1] * first.spacing_mm[0]
    affine[:3, 2], affine[:3, 3] = step, corners[order[0]]
    return order, _LPS @ affine
