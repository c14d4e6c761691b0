"""Files that are not NIfTI: as another library reads them, or one line that names what is wrong; whatever the bytes."""

from __future__ import annotations

import gzip
import locale
import os
import re
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydicom.uid import (
    ComprehensiveSRStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from fedkd_utils import formats
from fedkd_utils.errors import VolumeError

RNG = np.random.default_rng(0)

#: Bytes to put at a place, as a share of the length of what is spoiled.
CHANGES = st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), min_size=1, max_size=6)
MANY = hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEWER = hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def hdf5(path: Path, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


def metaimage(  # type: ignore[no-untyped-def]
    path: Path, array: np.ndarray, spacing=(0.39, 0.39, 1.0), origin=(3.0, -4.0, 5.0), compressed: bool = False
) -> Path:
    """(X, Y, Z) as .mhd with its .raw or .zraw, or as .mha."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path), compressed)
    return path


def sagittal_series(  # type: ignore[no-untyped-def]
    folder: Path,
    volume: np.ndarray,
    spacing=(0.36, 0.36, 0.7),
    uid: str | None = None,
    patient: str | None = None,
    aside: float = 0.0,
) -> Path:
    """(columns, rows, slices): columns run posterior, rows down, slices to the right; file names say nothing.

    Every series is of a patient of its own unless one is named; ``aside``: mm by which a slice lies off the last one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, frame = uid or generate_uid(), generate_uid()
    order = RNG.permutation(volume.shape[2])
    for k in range(volume.shape[2]):
        d = pydicom.Dataset()
        d.file_meta = pydicom.dataset.FileMetaDataset()
        d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = MRImageStorage
        d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
        d.SeriesInstanceUID, d.StudyInstanceUID, d.FrameOfReferenceUID = series, frame, frame
        d.Modality, d.PatientID, d.PatientName = "MR", series[-30:] if patient is None else patient, "Nobody"
        d.InstanceNumber = int(order[k]) + 1
        d.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        d.ImagePositionPatient = [10 - spacing[2] * k, -20.0 + aside * k, 30.0]
        d.PixelSpacing, d.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        d.Columns, d.Rows = volume.shape[:2]
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
        d.PixelData = np.ascontiguousarray(volume[:, :, k].T).astype(np.uint16).tobytes()
        d.save_as(folder / f"{order[k]:04d}", enforce_file_format=True)
    return folder


def grey(shape: tuple[int, ...]) -> np.ndarray:
    return RNG.integers(1, 1000, shape).astype(np.float32)


def spoiled(content: bytes, changes: list[tuple[float, int]], lost: int = 0) -> bytes:
    out = bytearray(content)
    for share, value in changes:
        out[int(share * len(out))] = value
    return bytes(out[: len(out) - lost])


def loaded_or_named(load: Callable[[], np.ndarray], *names: Path) -> np.ndarray | None:
    """What ``load`` gives; None when it refuses in one line that begins with one of the files."""
    try:
        return load()
    except (VolumeError, FileNotFoundError) as error:
        text = str(error)
        assert "\n" not in text and any(text.startswith(f"{name}: ") for name in names), text
        return None


# --- MetaImage ------------------------------------------------------------

TURNS = [np.eye(3)[list(order)] * signs for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]
TYPES = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]


@MANY
@given(
    st.tuples(*[st.integers(2, 6)] * 3),
    st.sampled_from(TYPES),
    st.sampled_from(TURNS),
    st.tuples(*[st.floats(0.1, 9)] * 3),
    st.tuples(*[st.floats(-99, 99)] * 3),
    st.booleans(),
    st.sampled_from([".mhd", ".mha"]),
    st.integers(0, 2**31),
)
def test_a_metaimage_is_what_itk_reads(  # type: ignore[no-untyped-def]
    tmp_path: Path, shape, kind, turn, spacing, origin, compressed: bool, ending: str, seed: int
) -> None:
    path = tmp_path / f"a b{ending}"
    image = sitk.GetImageFromArray(np.random.default_rng(seed).integers(0, 99, shape[::-1]).astype(kind))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(turn.ravel().tolist())
    sitk.WriteImage(image, str(path), compressed)
    voxels, affine = formats.read_metaimage(path)
    again = sitk.ReadImage(str(path))
    assert voxels.dtype == kind and np.array_equal(voxels, sitk.GetArrayFromImage(again).T)
    for index in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        x, y, z = again.TransformIndexToPhysicalPoint(index)
        assert np.allclose(nib.affines.apply_affine(affine, index), (-x, -y, z), atol=1e-4)


@pytest.mark.parametrize("flag", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])
def test_a_metaimage_with_the_highest_byte_first(tmp_path: Path, flag: str) -> None:
    array = RNG.integers(-999, 999, (3, 4, 5)).astype(">i2")
    lines = ["NDims = 3", f"{flag} = True", "DimSize = 5 4 3", "ElementSize = 1 2 3", "ElementType = MET_SHORT"]
    (tmp_path / "a.raw").write_bytes(array.tobytes())
    (tmp_path / "a.mhd").write_text("\n".join([*lines, "ElementDataFile = a.raw", ""]))
    voxels, affine = formats.read_metaimage(tmp_path / "a.mhd")
    assert np.array_equal(voxels, array.T) and np.allclose(affine, np.diag([-1, -2, 3, 1]))
    assert np.array_equal(voxels, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.mhd"))).T)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("ObjectType", "Mesh", "ObjectType is 'Mesh' and not Image"),
        ("NDims", "99", "NDims is '99' and not 3"),
        ("NDims", "-1", "NDims is '-1'"),
        ("BinaryData", "False", "written as text"),
        ("CompressedData", "Perhaps", "neither True nor False"),
        ("CompressedData", "True", "Error -3"),
        ("DimSize", "7 6", "DimSize is '7 6' and not 3 numbers"),
        ("DimSize", "7 6 0", "not three whole numbers"),
        ("DimSize", "7 6 -5", "not three whole numbers"),
        ("DimSize", "7 6 2.5", "not three whole numbers"),
        ("DimSize", "7 6 4", "a.raw has 420 bytes of voxels and not 336"),
        ("DimSize", "70000 60000 50000", "a.raw has 420 bytes"),
        ("ElementSpacing", "0.4 0 1", "ElementSpacing is 0.4 x 0 x 1"),
        ("ElementSpacing", "0.4 -0.4 1", "ElementSpacing is 0.4 x -0.4 x 1"),
        ("ElementSpacing", "0.4 nan 1", "not 3 numbers"),
        ("ElementSpacing", "0.4 0,4 1", "could not convert string to float: '0,4'"),
        ("ElementSpacing", None, "ElementSpacing is missing"),
        ("TransformMatrix", "1 " * 500, "not 9 numbers"),
        ("TransformMatrix", "0 0 0 0 1 0 0 0 1", "have not the length 1"),
        ("TransformMatrix", "1 0 0 0.6 0.8 0 0 0 1", "the affine is sheared"),
        ("TransformMatrix", "1 0 0 1 0 0 0 0 1", "the affine is sheared"),
        ("Offset", "1e999 0 0", "not 3 numbers"),
        ("Offset", "0 0 0\nOrigin = 1 1 1", "Offset and Origin differ"),
        ("Offset", "0 0 0\nOffset = 0 0 0", "Offset is there twice"),
        ("Offset", "0 0 0\nrubbish", "'rubbish' is no line of a header"),
        ("Offset", "0 0 0\nComment = " + "x" * 1_000_000, "no ElementDataFile at the end"),
        ("Offset", "0 0 0\nElementByteOrderMSB = True", "is 'false, true' and neither True nor False"),
        ("Offset", "0 0 0\nHeaderSize = -3", "HeaderSize is '-3'"),
        ("ElementType", "MET_LONG_DOUBLE", "ElementType is 'MET_LONG_DOUBLE' and not one of MET_CHAR"),
        ("ElementType", "MET_DOUBLE", "a.raw has 420 bytes of voxels and not 1680"),
        ("ElementType", "MET_SHORT\nElementNumberOfChannels = 3", "ElementNumberOfChannels is '3'"),
        ("ElementDataFile", "b.raw", "data file 'b.raw' is missing"),
        ("ElementDataFile", "%s%s%s.raw 1 5 1", "one file a slice is not read here"),
        ("ElementDataFile", "LIST 2", "one file a slice is not read here"),
        ("ElementDataFile", "LOCAL", "a.mhd has 0 bytes of voxels and not 420"),
        ("ElementDataFile", None, "no ElementDataFile at the end"),
        ("ElementDataFile", "", "data file '' is missing"),
    ],
)
def test_a_fault_in_a_metaimage_is_named(tmp_path: Path, field: str, value: str | None, words: str) -> None:
    path = metaimage(tmp_path / "a.mhd", np.zeros((7, 6, 5), np.int16))
    line = "" if value is None else f"{field} = {value}\n"
    path.write_text(re.sub(rf"{field} = .*\n", line.replace("\\", "\\\\"), path.read_text()))
    with pytest.raises(VolumeError, match=re.escape(words)) as caught:
        formats.read_metaimage(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "BinaryData = T",
        "DimSize = 7\t6  5",
        "Comment = \tMüller",
        "0008|0060 = MR\n0008|0060 = MR",
        "Comment = " + "x" * 20_000,
        "HeaderSize = -1",
        "HeaderSize = 3",
        "CompressedData = 1",
    ],
)
def test_what_other_programs_write_into_a_header_is_read(tmp_path: Path, line: str) -> None:
    array = RNG.integers(0, 999, (7, 6, 5)).astype(np.int16)
    path = metaimage(tmp_path / "a.mhd", array)
    text = path.read_text()
    key = line.split(" = ")[0]
    header = re.sub(f"{key} = .*\n", f"{line}\n", text) if f"{key} =" in text and key else f"{line}\n{text}"
    path.write_bytes(header.replace("\n", "\r\n").encode("latin-1"))
    raw = path.with_suffix(".raw")
    if key == "HeaderSize":
        raw.write_bytes(b"abc" + raw.read_bytes())
    if key == "CompressedData":
        raw.write_bytes(gzip.compress(raw.read_bytes()))
    assert np.array_equal(formats.read_metaimage(path)[0], array)


def test_masks_need_no_spacing_and_a_missing_file_is_named(tmp_path: Path) -> None:
    path = metaimage(tmp_path / "a.mhd", np.zeros((7, 6, 5), np.int16))
    path.write_text(re.sub("ElementSpacing = .*\n", "", path.read_text()))
    assert np.allclose(np.diag(formats.read_metaimage(path, posed=False)[1]), (-1, -1, 1, 1))
    with pytest.raises(FileNotFoundError, match="b.mhd: no such file"):
        formats.read_metaimage(tmp_path / "b.mhd")


@MANY
@given(CHANGES, st.sampled_from([(".mhd", False), (".mhd", True), (".mha", False)]), st.integers(0, 40), st.booleans())
def test_a_damaged_metaimage_is_a_volume_or_one_line(
    tmp_path: Path, changes: list[tuple[float, int]], kind: tuple[str, bool], lost: int, in_header: bool
) -> None:
    folder = tmp_path / f"{kind}"
    path = folder / f"a{kind[0]}"
    if not folder.exists():
        metaimage(path, RNG.integers(0, 999, (7, 6, 5)).astype(np.int16), compressed=kind[1])
        for file in list(folder.iterdir()):
            file.rename(file.with_name(f"good-{file.name}"))
    for file in folder.glob("good-*"):
        content, header = file.read_bytes(), file.suffix != ".raw" and file.suffix != ".zraw"
        here = spoiled(content, changes, lost) if header == in_header else content
        (folder / file.name.removeprefix("good-")).write_bytes(here)
    found = loaded_or_named(lambda: formats.read_metaimage(path)[0], path)
    assert found is None or found.ndim == 3


# --- HDF5 ------------------------------------------------------------


@MANY
@given(CHANGES, st.booleans(), st.integers(0, 4000))
def test_a_damaged_hdf5_file_is_an_array_or_one_line(
    tmp_path: Path, changes: list[tuple[float, int]], packed: bool, lost: int
) -> None:
    good, path = tmp_path / f"good{packed}.h5", tmp_path / "a.h5"
    if not good.exists():
        with h5py.File(good, "w") as file:
            options = {"compression": "gzip", "chunks": (3, 3, 3)} if packed else {}
            file.create_dataset("data", data=RNG.random((6, 6, 6)).astype(np.float32), **options)
            file.create_group("more")["seg"] = np.zeros((6, 6, 6), np.uint8)
    content = good.read_bytes()
    path.write_bytes(spoiled(content, changes, lost if lost < len(content) else 0))
    loaded_or_named(lambda: formats.read_hdf5(path, "data"), path)
    loaded_or_named(lambda: np.array(formats.hdf5_keys(path)), path)


def test_faults_of_an_hdf5_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_group("data")
        file.create_dataset("huge", shape=(10_000, 10_000, 10_000), dtype="f8", chunks=(100, 100, 100))
    with pytest.raises(VolumeError, match=r"a\.h5: 'data' is no array"):
        formats.read_hdf5(path, "data")
    with pytest.raises(VolumeError, match=r"a\.h5: damaged or not HDF5 \(8000000000000 bytes cannot be in it\)"):
        formats.read_hdf5(path, "huge")
    with pytest.raises(VolumeError, match=r"a\.h5: has no 'seg', only \['data', 'huge'\]"):
        formats.read_hdf5(path, "seg")
    with pytest.raises(VolumeError, match=r"b\.h5: damaged or not HDF5"):
        formats.hdf5_keys(tmp_path / "b.h5")


# --- DICOM ------------------------------------------------------------


def test_dicom_slices_are_ordered_by_place_and_lie_where_the_patient_was(tmp_path: Path) -> None:
    volume = grey((7, 6, 5))
    voxels, affine = formats.read_dicom(sagittal_series(tmp_path / "säries one", volume))
    turned = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))
    assert np.array_equal(turned.get_fdata(), volume.transpose(2, 0, 1)[:, ::-1, ::-1])
    assert np.allclose(nib.affines.voxel_sizes(affine), (0.36, 0.36, 0.7))
    place = nib.affines.apply_affine(affine, np.argwhere(voxels == voxels[1, 2, 3])[0])
    assert np.allclose(place, (-(10 - 0.7 * 3), -(-20 + 0.36 * 1), 30 - 0.36 * 2), atol=1e-4)


def test_a_missing_or_doubled_slice_and_several_series_are_refused(tmp_path: Path) -> None:
    volume = grey((7, 6, 5))
    gap = sagittal_series(tmp_path / "gap", volume)
    middle = [p for p in gap.iterdir() if abs(pydicom.dcmread(p).ImagePositionPatient[0] - 8.6) < 1e-6]
    middle[0].unlink()
    with pytest.raises(VolumeError, match="gap: slices lie 0.70 mm apart, but once 1.40 mm"):
        formats.read_dicom(gap)
    double = sagittal_series(tmp_path / "double", volume, uid="1.2.3")
    for path in sagittal_series(tmp_path / "again", volume, uid="1.2.3").iterdir():
        path.rename(double / f"x{path.name}")
    with pytest.raises(VolumeError, match="two slices lie at one place"):
        formats.read_dicom(double)
    two = sagittal_series(tmp_path / "two", volume, uid="1.2.4")
    for path in sagittal_series(tmp_path / "other", volume + 1, uid="1.2.5").iterdir():
        path.rename(two / f"x{path.name}")
    with pytest.raises(VolumeError, match=r"holds 2 series: 1\.2\.4 \(5 files\), 1\.2\.5 .* Give each a folder"):
        formats.read_dicom(two)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="no DICOM image series"):
        formats.read_dicom(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        formats.read_dicom(tmp_path / "nowhere")


def test_slices_that_slide_aside_are_refused(tmp_path: Path) -> None:
    volume = grey((7, 6, 5))
    with pytest.raises(VolumeError, match="leaning: its slices .* but 0.8 mm aside: the stack is sheared"):
        formats.read_dicom(sagittal_series(tmp_path / "leaning", volume, aside=0.2))
    formats.read_dicom(sagittal_series(tmp_path / "rounded", volume, aside=0.001))


def spoil_slice(folder: Path, change: Callable[[pydicom.Dataset], object]) -> Path:
    """Change one slice of a series, and give its file."""
    path = sorted(folder.iterdir())[2]
    header = pydicom.dcmread(path)
    change(header)
    header.save_as(path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: setattr(d, "Rows", 60_000), "its pixels are too few for 60000 rows of 7"),
        (lambda d: setattr(d, "NumberOfFrames", 9_999_999), "its pixels are too few"),
        (lambda d: delattr(d, "PixelData"), "PixelData"),
        (lambda d: delattr(d, "ImagePositionPatient"), "does not say where it lies"),
        (lambda d: setattr(d, "ImageOrientationPatient", [0, 1, 0, 0, 1, 0]), "do not meet at right angles"),
        (lambda d: setattr(d, "ImageOrientationPatient", [1, 0, 0, 0, 0, -1]), "turned against the other slices"),
        (lambda d: delattr(d, "PixelSpacing"), "PixelSpacing is [] and not two positive numbers"),
        (lambda d: setattr(d, "PixelSpacing", [0, 0]), "PixelSpacing is [0.0, 0.0] and not two positive numbers"),
        (lambda d: setattr(d, "PixelSpacing", [-0.36, -0.36]), "and not two positive numbers"),
        (lambda d: setattr(d, "PixelSpacing", [0.4, 0.4]), "6 x 7 voxels of 0.4 x 0.4 mm, but "),
        (lambda d: setattr(d, "Rows", 3), "3 x 7 voxels of 0.36 x 0.36 mm, but "),
        (lambda d: setattr(d, "PhotometricInterpretation", "RGB"), "RGB and not MONOCHROME2"),
        (lambda d: setattr(d, "PhotometricInterpretation", "MONOCHROME1"), "MONOCHROME1 and not MONOCHROME2"),
    ],
)
def test_a_slice_that_does_not_belong_is_named(
    tmp_path: Path, change: Callable[[pydicom.Dataset], object], words: str
) -> None:
    path = spoil_slice(sagittal_series(tmp_path / "a", grey((7, 6, 5))), change)
    with pytest.raises(VolumeError, match=re.escape(words)) as caught:
        formats.read_dicom(tmp_path / "a")
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("content", [b"", b"<html>quota exceeded</html>", bytes(128), bytes(200)])
@pytest.mark.parametrize("which", [0, -1])
def test_a_slice_at_the_end_that_was_lost_on_the_way_is_named(tmp_path: Path, content: bytes, which: int) -> None:
    series = sagittal_series(tmp_path / "a", grey((7, 6, 5)))
    path = sorted(series.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[0]))[which]
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=re.escape(f"{path}: does not begin as DICOM files do")):
        formats.read_dicom(series)


def moved(series: Path, place: Callable[[int], list[float]]) -> Path:
    """Put slices where ``place`` says, in the order in which they lie."""
    files = sorted(series.iterdir(), key=lambda path: -float(pydicom.dcmread(path).ImagePositionPatient[0]))
    for k, path in enumerate(files):
        header = pydicom.dcmread(path)
        header.ImagePositionPatient = place(k)
        header.save_as(path)
    return series


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (lambda k: [-(1.6 * k if k < 5 else 8 + 3.0 * (k - 5)), 0.0, 0.0], "off even steps: several stacks"),
        (lambda k: [-1.5 * k, 15.0 if k == 4 else 0.0, 0.0], "up to 15.0 mm off even steps"),
        (lambda k: [-1.5 * (k + (k > 3)), 0.0, 0.0], "slices lie 1.50 mm apart, but once 3.00 mm: one is missing"),
        (lambda k: [-1.5 * (k - (k > 3)), 0.0, 0.0], "two slices lie at one place (0"),
    ],
)
def test_slices_at_uneven_steps_are_refused(tmp_path: Path, place: Callable[[int], list[float]], words: str) -> None:
    with pytest.raises(VolumeError, match=re.escape(words)):
        formats.read_dicom(moved(sagittal_series(tmp_path / "a", grey((7, 6, 9))), place))


SCALES: dict[str, Callable[[pydicom.Dataset, int], object]] = {
    "as it is": lambda d, k: None,
    "one scale": lambda d, k: d.update({"RescaleSlope": "2.5", "RescaleIntercept": "-3"}),
    "every slice its own": lambda d, k: d.update({"RescaleSlope": f"{1 + k}", "RescaleIntercept": f"{-1000 * k}"}),
    "signed but for the first": lambda d, k: setattr(d, "PixelRepresentation", int(k > 0)),
    "run lengths": lambda d, k: d.compress(RLELossless),
}


@pytest.mark.parametrize("kind", SCALES)
def test_grey_levels_are_those_that_every_slice_says(tmp_path: Path, kind: str) -> None:
    series = sagittal_series(tmp_path / "a", grey((40, 48, 5)) * 60)
    expected = []
    for k, path in enumerate(sorted(series.iterdir())):
        header = pydicom.dcmread(path)
        SCALES[kind](header, k)
        header.save_as(path)
        slope, shift = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
        expected.append((-float(header.ImagePositionPatient[0]), header.pixel_array * slope + shift))
    voxels, affine = formats.read_dicom(series)
    expected.sort(key=lambda pair: pair[0])
    assert np.allclose(voxels, np.stack([plane for _, plane in expected]).T)
    assert np.allclose(affine[0], (0, 0, 0.7, -10))


def enhanced(path: Path, volume: np.ndarray, order: list[int], spacing_mm: float = 0.7) -> Path:
    """(columns, rows, slices) as one Enhanced MR file, its frames in any order."""
    one = sorted(sagittal_series(path.parent / "single", volume[..., :1]).iterdir())[0]
    header = pydicom.dcmread(one)
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = EnhancedMRImageStorage
    header.NumberOfFrames = len(order)
    header.PixelData = b"".join(np.ascontiguousarray(volume[:, :, k].T).astype("<u2").tobytes() for k in order)
    turn, measures, shared = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    turn.ImageOrientationPatient, measures.PixelSpacing = header.ImageOrientationPatient, header.PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [turn], [measures]
    header.SharedFunctionalGroupsSequence, frames = [shared], []
    for k in order:
        place, frame = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = [10 - spacing_mm * k, -20.0, 30.0]
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    header.PerFrameFunctionalGroupsSequence = frames
    del header.ImagePositionPatient, header.ImageOrientationPatient, header.PixelSpacing
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path)
    return path


def test_an_enhanced_file_is_read_like_a_series_of_single_slices(tmp_path: Path) -> None:
    volume = grey((7, 6, 5))
    expected = formats.read_dicom(sagittal_series(tmp_path / "a", volume))
    for k, order in enumerate(([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 2, 4, 1, 3])):
        path = enhanced(tmp_path / f"b{k}" / "enhanced.dcm", volume, order)
        voxels, affine = formats.read_dicom(path.parent)
        assert np.array_equal(voxels, expected[0]) and np.allclose(affine, expected[1])
    path = enhanced(tmp_path / "c" / "enhanced.dcm", volume, [0, 1, 1, 2])
    with pytest.raises(VolumeError, match=r"one place \(enhanced\.dcm, frame 2 and enhanced\.dcm, frame 3\)"):
        formats.read_dicom(path.parent)
    header = pydicom.dcmread(path)
    del header.PerFrameFunctionalGroupsSequence
    header.save_as(path)
    with pytest.raises(VolumeError, match="4 frames, but it says of 0 where they lie"):
        formats.read_dicom(path.parent)


def compressed(series: Path, compressor: str) -> Path:
    """A series with the pixels of every file compressed by GDCM, in files with the ending .dcm."""
    before = locale.setlocale(locale.LC_ALL)
    for path in list(series.iterdir()):
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.SetFileName(f"{path}.dcm")
        writer.Execute(reader.Execute())
        path.unlink()
    locale.setlocale(locale.LC_ALL, before)  # GDCM leaves that of C behind
    return series


def test_a_damaged_jpeg_ends_nothing_but_its_decoder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One byte of a lossless JPEG, the bits of a pixel, makes GDCM end its process."""
    series = sagittal_series(tmp_path / "a", grey((7, 6, 5)))
    whole, _ = formats.read_dicom(series)
    compressed(series, "JPEG")
    path = sorted(series.iterdir())[2]
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEGLosslessSV1
    assert np.array_equal(formats.read_dicom(series)[0], whole)
    content = bytearray(path.read_bytes())
    content[content.rfind(b"\xff\xc3") + 4] = 0xFF
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=re.escape(f"{path}: its compressed pixels cannot")):
        formats.read_dicom(series)
    assert capfd.readouterr().err == ""


def test_positions_and_directions_that_were_rounded_are_taken(tmp_path: Path) -> None:
    turn = np.array([[0.0, np.cos(0.2), np.sin(0.2)], [0.0, np.sin(0.2), -np.cos(0.2)]])
    series = moved(sagittal_series(tmp_path / "a", grey((7, 6, 60))), lambda k: [round(-0.36 * k, 1), 0.0, 0.0])
    for path in series.iterdir():
        header = pydicom.dcmread(path)
        header.ImageOrientationPatient = turn.round(2).ravel().tolist()
        header.save_as(path)
    _, affine = formats.read_dicom(series)
    assert np.allclose(nib.affines.voxel_sizes(affine), (0.36, 0.36, 0.36), atol=2e-3)


def test_blank_slices_take_few_bytes(tmp_path: Path) -> None:
    volume = grey((96, 96, 4))
    volume[..., [0, 3]] = 0
    series = compressed(sagittal_series(tmp_path / "a", volume), "JPEG2000")
    assert np.array_equal(np.sort(formats.read_dicom(series)[0].ravel()), np.sort(volume.ravel()))


def test_a_path_that_itk_cannot_take_is_named(tmp_path: Path) -> None:
    series = sagittal_series(tmp_path / "a", grey((7, 6, 5)))
    moved_to = Path(os.fsdecode(os.fsencode(tmp_path) + b"/Kn\xfc"))
    series.rename(moved_to)
    with pytest.raises(VolumeError, match=r"Kn\\udcfc/.*: characters that cannot be printed in its path. Rename it"):
        formats.read_dicom(moved_to)


def test_a_scale_of_frames_that_nobody_applies_is_refused(tmp_path: Path) -> None:
    path = enhanced(tmp_path / "a" / "enhanced.dcm", grey((7, 6, 5)), [0, 1, 2, 3, 4])
    header = pydicom.dcmread(path)
    scale = pydicom.Dataset()
    scale.RescaleSlope, scale.RescaleIntercept = "2", "0"
    header.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = [scale]
    header.save_as(path)
    voxels, _ = formats.read_dicom(path.parent)
    assert voxels.max() > 1000  # twice the numbers below 1000
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = MRImageStorage
    header.save_as(path)
    with pytest.raises(VolumeError, match="in what is no Enhanced image"):
        formats.read_dicom(path.parent)


def test_what_is_no_image_beside_a_series_is_passed_over(tmp_path: Path) -> None:
    volume = grey((7, 6, 5))
    whole, _ = formats.read_dicom(sagittal_series(tmp_path / "a", volume))
    report = sagittal_series(tmp_path / "b", volume[..., :3])
    for path in list(report.iterdir())[1:]:
        path.unlink()
    (path,) = report.iterdir()
    header = pydicom.dcmread(path)
    for word in ("PixelData", "Rows", "Columns"):
        delattr(header, word)
    for name, kind in (("report", ComprehensiveSRStorage), ("Siemens", "1.3.12.2.1107.5.9.1")):
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = kind
        header.save_as(tmp_path / "a" / name)
    (tmp_path / "a" / "notes.txt").write_text("knee")
    assert np.array_equal(formats.read_dicom(tmp_path / "a")[0], whole)


@FEWER
@given(CHANGES, st.integers(0, 4), st.booleans(), st.integers(0, 300))
def test_a_damaged_dicom_series_is_a_volume_or_one_line(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    changes: list[tuple[float, int]],
    which: int,
    in_header: bool,
    lost: int,
) -> None:
    good, folder = tmp_path / "good", tmp_path / "series"
    if not good.exists():
        sagittal_series(good, grey((7, 6, 5)))
        folder.mkdir()
    for k, file in enumerate(sorted(good.iterdir())):
        content = file.read_bytes()
        if k == which:  # behind the preamble and the word DICM; the pixels are the last 84 bytes
            end = len(content) - 84 if in_header else len(content)
            content = content[:132] + spoiled(content[132:end], changes) + content[end:]
            content = content[: len(content) - lost]
        (folder / file.name).write_bytes(content)
    found = loaded_or_named(lambda: formats.read_dicom(folder)[0], folder, *folder.iterdir())
    assert found is None or (found.ndim == 3 and np.isfinite(found).all())
    assert capfd.readouterr().err == ""
