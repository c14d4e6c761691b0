"""Segmenting a file: the same knee in every orientation, closed forms for the way there and back, bad files
by kind.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import math
import re
import tempfile
import warnings

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nibabel import orientations
from torch import nn

from fedkd_utils import files, metrics, segment, transforms
from fedkd_utils.__main__ import main
from fedkd_utils.errors import VolumeError
from fedkd_utils.settings import QUICK
from fedkd_utils.site_folder import Item

SMALL = dataclasses.replace(QUICK, grid_shape=(8, 16, 16), grid_spacing_mm=(4.0, 2.0, 2.0))
SPACING = (3.0, 1.3, 1.1)
SHAPE = (22, 34, 39)  # 66 x 44 x 43 mm: several windows of 32 x 32 x 32 mm


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def affine_of(spacing=SPACING, origin=(-31.0, -12.0, 7.0)):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def knee_like(shape=SHAPE, seed=0):
    """Smooth random image, (X, Y, Z) int16."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 1, 5, 6, 6)))
    image = nn.functional.interpolate(coarse, shape, mode="trilinear")[0, 0].numpy() * 900
    return (image + rng.normal(0, 20, shape)).astype(np.int16)


def save(path, image, affine=None):
    nib.save(nib.Nifti1Image(image, affine_of() if affine is None else affine), path)
    return path


def turned(image, affine, turn):
    """The same volume stored in another axis order and direction."""
    return (
        orientations.apply_orientation(image, turn),
        affine @ orientations.inv_ornt_aff(turn, image.shape),
    )


class Lopsided(nn.Module):
    """A fixed random convolution: its answer changes when its input is flipped or turned."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3, padding=1)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.eval()

    def forward(self, x):
        return self.conv(x)


def bright(x):
    """Logits (B, 4, ...): the voxels that stand out of their window are femoral."""
    score = 20 * (x[:, 0] - 1.0)
    return torch.stack([-score, score, torch.full_like(score, -99), torch.full_like(score, -99)], dim=1)


# ---------------------------------------------------------------------------------------- geometry, whole way


def test_every_orientation_gives_the_same_knee_in_the_world(tmp_path):
    image, affine = knee_like(), affine_of()
    reference = None
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turn = np.array(list(zip(order, signs, strict=True)))
        stored, stored_affine = turned(image, affine, turn)
        path = save(tmp_path / "knee.nii", stored, stored_affine)
        result = segment.segment_volume(path, Lopsided(), SMALL, tmp_path / "label.nii")
        written = nib.load(tmp_path / "label.nii")
        assert written.shape == stored.shape and np.allclose(written.affine, stored_affine)
        assert np.array_equal(np.asarray(written.dataobj), result.label)
        label = np.asarray(nib.as_closest_canonical(written).dataobj)
        if reference is None:
            reference = label
            assert np.bincount(label.ravel(), minlength=4).min() > 50  # all classes: a test of something
        assert np.array_equal(label, reference)


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("spacing", [(3.0, 1.3, 1.1), (4.5, 0.6, 0.6), (1.0, 1.0, 3.0)])
def test_a_bright_ball_is_found_where_it_is(tmp_path, spacing, oblique):
    """Position and volume in world coordinates, whatever the spacing, also when the slices are tilted."""
    radius, centre = 13.0, np.array([4.0, -6.0, 9.0])
    shape = [round(64 / s) for s in spacing]
    affine = affine_of(spacing)
    if oblique:
        angle = math.radians(20)
        tilt = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
        affine[:3, :3] = tilt @ affine[:3, :3]
    affine[:3, 3] = centre + 3 - affine[:3, :3] @ (np.array(shape) / 2)  # off the middle by 3 mm
    voxels = np.moveaxis(np.indices(shape), 0, -1).reshape(-1, 3)
    world = nib.affines.apply_affine(affine, voxels).reshape(*shape, 3)
    ball = np.linalg.norm(world - centre, axis=-1) < radius
    image = (100 + 800 * ball).astype(np.float32)
    settings = dataclasses.replace(SMALL, grid_shape=(10, 24, 24))
    result = segment.segment_volume(save(tmp_path / "ball.nii.gz", image, affine), bright, settings)
    assert metrics.dice(result.label == 1, ball) > 0.9
    found = world[result.label == 1].mean(axis=0)
    assert np.linalg.norm(found - centre) < 0.8  # a fifth of the grid's 4 mm
    assert result.volumes_ml["femoral"] == pytest.approx(4 / 3 * math.pi * radius**3 / 1000, rel=0.12)
    assert result.volumes_ml["tibial"] == 0 == result.volumes_ml["patellar"]


def test_every_window_is_z_scored_by_itself(tmp_path):
    seen = []

    def watch(x):
        seen.append(x.clone())
        return bright(x)

    image = knee_like().astype(np.float32) + 5000 * np.linspace(0, 1, SHAPE[1])[None, :, None] ** 2
    segment.segment_volume(save(tmp_path / "a.nii", image), watch, SMALL)
    windows = torch.cat(seen)
    assert len(windows) > 4 and windows.shape[1:] == (1, *SMALL.grid_shape)
    assert windows.mean(dim=(1, 2, 3, 4)).abs().max() < 1e-4
    assert (windows.var(dim=(1, 2, 3, 4), correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(10, 30, 20), (10, 36, 43), (7, 50, 60)])
def test_a_volume_of_one_window_looks_as_it_does_in_training(tmp_path, shape):
    """A field of view within the grid: what the network sees is what the loader of the cohorts gives it."""
    seen = []

    def watch(x):
        seen.append(x.clone())
        return bright(x)

    path = save(tmp_path / "knee.nii", knee_like(shape) + 500)
    settings = dataclasses.replace(SMALL, grid_shape=(8, 24, 24))
    result = segment.segment_volume(path, watch, settings)
    assert result.label.shape == shape
    windows = torch.cat(seen)
    if len(windows) == 1:
        case = transforms.load_case(Item("knee", 0, path, None, (1, 2, 3)), settings)
        torch.testing.assert_close(windows[0], case.image, rtol=1e-4, atol=1e-4)
    assert (len(windows) == 1) == (shape[1] * SPACING[1] < 49 and shape[2] * SPACING[2] < 49)


def test_a_window_of_air_is_not_stretched_into_an_image():
    seen = []

    def watch(x):
        seen.append(x.clone())
        return bright(x)

    noise = torch.randn((8, 16, 48), generator=torch.Generator().manual_seed(0))
    view = torch.cat([100 + 50 * noise[..., :16], 0.5 * noise[..., 16:32], 0 * noise[..., 32:]], dim=2)
    segment.window_probabilities(view, watch, SMALL.grid_shape)
    spreads = torch.cat(seen).std(dim=(1, 2, 3, 4)).tolist()  # windows overlap by half
    assert spreads[:2] == pytest.approx([1, 1], abs=1e-3)
    assert max(spreads[2:]) < 0.1 and spreads[-1] == 0


def test_a_constant_answer_survives_the_windows():
    """The Gaussian weights of overlapping windows add up to one everywhere."""
    view = torch.randn((13, 40, 29), generator=torch.Generator().manual_seed(0))
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1]).view(1, 4, 1, 1, 1)
    probabilities = segment.window_probabilities(
        view, lambda x: logits.expand(len(x), 4, *x.shape[2:]), SMALL.grid_shape
    )
    expected = logits[0].softmax(0).expand(4, *view.shape)
    torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-5)


def test_islands_are_removed(tmp_path):
    image = np.full((16, 32, 32), 100, dtype=np.float32)
    image[4:9, 8:18, 8:18] = 900
    image[13, 28:30, 28:30] = 900
    settings = dataclasses.replace(SMALL, grid_shape=(16, 32, 32), grid_spacing_mm=(3.0, 1.3, 1.1))
    result = segment.segment_volume(save(tmp_path / "a.nii", image), bright, settings)
    assert np.array_equal(np.unique(np.nonzero(result.label)[0]), np.arange(4, 9))


# ------------------------------------------------------------------------------------------------- reading


def test_reads_what_real_files_look_like(tmp_path):
    image = knee_like()
    plain = segment.read_volume(save(tmp_path / "a.nii.gz", image))
    assert plain.image.dtype == np.float32 and np.array_equal(plain.image, image)
    assert np.allclose(plain.affine, affine_of())

    one_frame = segment.read_volume(save(tmp_path / "b.nii", image[..., None]))
    assert one_frame.image.shape == image.shape

    scaled = nib.Nifti1Image(image, affine_of())
    scaled.header.set_slope_inter(2.5, -100)
    nib.save(scaled, tmp_path / "c.nii")
    assert np.allclose(segment.read_volume(tmp_path / "c.nii").image, nib.load(tmp_path / "c.nii").get_fdata())

    nib.save(nib.Nifti2Image(image, affine_of()), tmp_path / "e.nii.gz")
    assert np.array_equal(segment.read_volume(tmp_path / "e.nii.gz").image, image)
    big_endian = nib.Nifti1Header(endianness=">")
    big_endian.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(image, affine_of(), big_endian), tmp_path / "f.nii")
    assert np.array_equal(segment.read_volume(tmp_path / "f.nii").image, image)


def with_header(path, **fields):
    """Change fields of a header on disk without nibabel mending them."""
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(content)
    return path


def spoiled(image, value, where=(3, 4, 5)):
    image = image.astype(np.float32)
    image[where] = value
    return image


def damaged_gzip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return path


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def damaged_checksum(path):
    content = path.read_bytes()
    path.write_bytes(content[:-8] + b"\0\0\0\0" + content[-4:])
    return path


def write(path, content):
    path.write_bytes(content)
    return path


IMAGE = knee_like()
PARALLEL = affine_of()
PARALLEL[:3, 2] = PARALLEL[:3, 1]
BAD_FILES = {
    "empty": (lambda d: write(d / "a.nii.gz", b""), "damaged"),
    "empty gzip": (lambda d: write(d / "a.nii.gz", gzip.compress(b"")), "damaged"),
    "text": (lambda d: write(d / "a.nii", b"not a knee " * 100), "damaged"),
    "other name": (lambda d: write(d / "a.dcm", b"DICM"), "dcm2niix"),
    "not gzip": (lambda d: write(d / "a.nii.gz", save(d / "b.nii", IMAGE).read_bytes()), "damaged"),
    "broken gzip": (lambda d: damaged_gzip(save(d / "a.nii.gz", IMAGE)), "damaged"),
    "cut gzip": (lambda d: cut(save(d / "a.nii.gz", IMAGE), 0.6), "damaged"),
    "wrong checksum": (lambda d: damaged_checksum(save(d / "a.nii.gz", IMAGE)), "damaged"),
    "cut": (lambda d: cut(save(d / "a.nii", IMAGE), 0.6), "damaged"),
    "header only": (lambda d: cut(save(d / "a.nii", IMAGE), 0.001), "damaged"),
    "4D": (lambda d: save(d / "a.nii", np.stack([IMAGE, IMAGE], -1)), "not a 3D volume"),
    "2D": (lambda d: save(d / "a.nii", IMAGE[0]), "not a 3D volume"),
    "one slice": (lambda d: save(d / "a.nii", IMAGE[:1]), "not a 3D volume"),
    "complex": (lambda d: save(d / "a.nii", IMAGE.astype(np.complex64)), "colour or complex"),
    "colour": (
        lambda d: save(d / "a.nii", np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "colour or complex",
    ),
    "NaN": (lambda d: save(d / "a.nii.gz", spoiled(IMAGE, np.nan)), "1 voxels are NaN"),
    "infinite": (lambda d: save(d / "a.nii.gz", spoiled(IMAGE, -np.inf)), "1 voxels are NaN or infinite"),
    "too large for float32": (lambda d: save(d / "a.nii", IMAGE.astype(np.float64) * 1e300), "NaN or infinite"),
    "constant": (lambda d: save(d / "a.nii", np.full(SHAPE, 7, np.uint8)), "no image"),
    "singular": (lambda d: with_header(save(d / "a.nii", IMAGE), srow_z=0), "singular"),
    "parallel axes": (lambda d: save(d / "a.nii", IMAGE, PARALLEL), "singular"),
    "NaN affine": (lambda d: with_header(save(d / "a.nii", IMAGE), srow_x=np.nan), "singular"),
    "zero spacing": (
        lambda d: with_header(save(d / "a.nii", IMAGE), pixdim=[1, 0, 1, 1, 0, 0, 0, 0]),
        "0 x 1 x 1",
    ),
    "negative spacing": (
        lambda d: with_header(save(d / "a.nii", IMAGE), pixdim=[1, 1, -2, 1, 0, 0, 0, 0]),
        "positive numbers",
    ),
    "NaN spacing": (
        lambda d: with_header(save(d / "a.nii", IMAGE), pixdim=[1, np.nan, 1, 1, 0, 0, 0, 0]),
        "positive numbers|damaged",
    ),
    "no orientation": (
        lambda d: with_header(save(d / "a.nii", IMAGE), qform_code=0, sform_code=0),
        "no orientation",
    ),
    "metres called millimetres": (
        lambda d: save(d / "a.nii", IMAGE, np.diag([3e-3, 1.3e-3, 1.1e-3, 1])),
        "unit in the header",
    ),
    "micrometres called millimetres": (
        lambda d: save(d / "a.nii", IMAGE, np.diag([3e3, 1.3e3, 1.1e3, 1])),
        "unit in the header",
    ),
    "header of a giant": (
        lambda d: with_header(save(d / "a.nii", IMAGE), dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]),
        "damaged",
    ),
    "unknown datatype": (lambda d: with_header(save(d / "a.nii", IMAGE), datatype=999), "damaged"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, kind):
    make, words = BAD_FILES[kind]
    path, out = make(tmp_path), tmp_path / "out.nii.gz"
    out.write_bytes(b"an older result")
    with pytest.raises(ValueError, match=words) as caught:
        segment.segment_volume(path, Lopsided(), SMALL, out)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 300 + len(str(path))
    assert out.read_bytes() == b"an older result"
    assert not list(tmp_path.glob(".*"))


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.nii\.gz: no such file"):
        segment.segment_volume(tmp_path / "gone.nii.gz", Lopsided(), SMALL)
    with pytest.raises(VolumeError, match="no DICOM image series"):
        segment.read_volume(tmp_path)
    path = save(tmp_path / "a.nii", IMAGE)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        segment.segment_volume(path, Lopsided(), SMALL, tmp_path / "nowhere" / "b.nii.gz")


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 347), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
def test_a_damaged_header_is_read_or_refused_but_never_crashes(tmp_path, changes, zipped):
    content = bytearray(save(tmp_path / "good.nii", IMAGE[:, :20, :20]).read_bytes())
    for place, value in changes:
        content[place] = value
    path = write(
        tmp_path / ("a.nii.gz" if zipped else "a.nii"),
        gzip.compress(bytes(content), 1) if zipped else bytes(content),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            volume = segment.read_volume(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert np.isfinite(volume.image).all() and np.isfinite(volume.affine).all()
        segment._write_label(tmp_path / "label.nii", np.ones(volume.image.shape, np.uint8), volume.header)
        assert np.allclose(nib.load(tmp_path / "label.nii").affine, volume.affine)


# ------------------------------------------------------------------------------------------------- writing


def test_the_written_file_has_the_geometry_and_nothing_of_the_patient(tmp_path):
    source = nib.Nifti1Image(knee_like(), affine_of())
    source.set_qform(affine_of(origin=(-31.0, -12.0, 7.5)), 1)  # a little elsewhere, as headers are rounded
    source.set_sform(affine_of(), 3)
    source.header["descrip"] = b"Jane Doe 1970"
    source.header.set_xyzt_units("mm", "sec")
    source.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    path = tmp_path / "knee.nii.gz"
    nib.save(source, path)
    result = segment.segment_volume(path, Lopsided(), SMALL, tmp_path / "label.nii.gz")
    written = nib.load(result.path)
    assert written.get_data_dtype() == np.uint8 and written.shape == SHAPE
    assert np.allclose(written.affine, affine_of())
    assert np.allclose(written.get_qform(), source.get_qform()) and np.allclose(written.get_sform(), affine_of())
    assert int(written.header["qform_code"]) == 1 and int(written.header["sform_code"]) == 3
    assert written.header.get_xyzt_units()[0] == "mm"
    assert b"Jane" not in gzip.decompress(result.path.read_bytes())
    voxel_ml = math.prod(SPACING) / 1000
    assert list(result.volumes_ml) == ["femoral", "tibial", "patellar"]
    for c, ml in enumerate(result.volumes_ml.values(), start=1):
        assert ml == pytest.approx((np.asarray(written.dataobj) == c).sum() * voxel_ml)


def test_an_interrupted_write_leaves_the_older_result(tmp_path, monkeypatch):
    path, out = save(tmp_path / "knee.nii", IMAGE), tmp_path / "label.nii.gz"
    out.write_bytes(b"an older result")

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)  # after the bytes, before the name
    with pytest.raises(OSError, match="No space left.*label.nii.gz"):
        segment.segment_volume(path, Lopsided(), SMALL, out)
    assert out.read_bytes() == b"an older result"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["knee.nii", "label.nii.gz"]


def test_the_volume_is_never_overwritten(tmp_path):
    path = save(tmp_path / "knee.nii.gz", IMAGE)
    before = path.read_bytes()
    (tmp_path / "link.nii.gz").symlink_to(path)
    for out in (path, tmp_path / "link.nii.gz"):
        with pytest.raises(ValueError, match="the volume itself"):
            segment.segment_volume(path, Lopsided(), SMALL, out)
    with pytest.raises(ValueError, match=r"\.nii\.gz"):
        segment.segment_volume(path, Lopsided(), SMALL, tmp_path / "label.png")
    assert path.read_bytes() == before
    assert str(segment.default_output("/some/where/knee.v2.nii.gz")) == "knee.v2_cartilage.nii.gz"
    assert str(segment.default_output("knee.nii")) == "knee_cartilage.nii.gz"


def test_the_default_output_and_the_report(tmp_path):
    (tmp_path / "far").mkdir()
    path = save(tmp_path / "far" / "knee.nii.gz", *turned(IMAGE, affine_of(), np.array([[2, 1], [0, -1], [1, 1]])))
    result = segment.segment_volume(path, Lopsided(), SMALL)
    assert (tmp_path / "knee_cartilage.nii.gz").is_file()
    lines = result.report().splitlines()
    shape, spacing, codes = "34 x 39 x 22", "1.3 x 1.1 x 3", "".join(nib.aff2axcodes(result.affine))
    assert lines[0] == f"{path}: {shape} voxels of {spacing} mm, axes {codes}" and codes == "PSR"
    assert lines[2].split()[:4] == ["tibial", "cartilage", f"{result.volumes_ml['tibial']:.1f}", "ml"]
    assert lines[2].endswith(f"{result.thickness_mm['tibial']:.1f} mm thick on average")
    assert lines[4:] == [
        "  with slices of 3 mm the thickness of thin cartilage may be off by half",
        "written: knee_cartilage.nii.gz",
    ]


def reddish(path):
    picture = matplotlib.image.imread(path)
    picture = picture[: int(0.9 * len(picture)), :, :3]  # above the legend
    return int(((picture[..., 0] > 0.7) & (picture[..., 1:].max(axis=-1) < 0.35)).sum())


def test_the_picture_shows_the_outlines_and_does_not_depend_on_the_orientation(tmp_path):
    label = np.zeros(SHAPE, np.uint8)
    label[5:15, 10:20, 10:20], label[5:15, 22:26, 10:20] = 1, 2
    pictures = []
    for turn in ([[0, 1], [1, 1], [2, 1]], [[2, -1], [0, 1], [1, -1]], [[1, 1], [2, -1], [0, -1]]):
        volume = segment.read_volume(save(tmp_path / "v.nii", *turned(IMAGE, affine_of(), np.array(turn))))
        segment.preview(volume, turned(label, affine_of(), np.array(turn))[0], tmp_path / "p.png")
        pictures.append((tmp_path / "p.png").read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]
    assert reddish(tmp_path / "p.png") > 500
    volume = segment.read_volume(save(tmp_path / "v.nii", IMAGE))
    segment.preview(volume, 0 * label, tmp_path / "p.png")
    assert reddish(tmp_path / "p.png") == 0
    with pytest.raises(VolumeError, match="shape"):
        segment.preview(volume, label[1:], tmp_path / "p.png")


def test_a_network_that_cannot_segment_is_refused(tmp_path):
    path = save(tmp_path / "knee.nii", IMAGE)
    with pytest.raises(ValueError, match="eval"):
        segment.segment_volume(path, Lopsided().train(), SMALL)
    with pytest.raises(ValueError, match="NaN"):
        segment.segment_volume(path, lambda x: bright(x) * math.nan, SMALL)
    with pytest.raises(ValueError, match="4 classes"):
        segment.segment_volume(path, lambda x: x, SMALL)


def test_the_command_reads_the_volume_once(tmp_path, monkeypatch):
    path, read = save(tmp_path / "knee.nii.gz", IMAGE), []
    original = transforms.read_nifti

    def counted(path):
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(transforms, "read_nifti", counted)
    monkeypatch.setattr("fedkd_utils.__main__._network", lambda *_: (bright, SMALL))
    assert main(["segment", str(path), "--preview", str(tmp_path / "p.png")]) == 0
    assert read == ["knee.nii.gz"] and (tmp_path / "p.png").is_file()


BAD_OUTPUTS = {
    "segmentation named as a picture": (["--out", "label.png"], "label.png: the segmentation is a NIfTI file"),
    "table named as a sheet": (["--table", "knee.xlsx"], r"knee.xlsx: the table is a CSV file.*ends in .csv"),
    "preview named as a page": (["--preview", "knee.jpg"], r"knee.jpg: the preview is a PNG picture.*ends in .png"),
    "no folder for the segmentation": (["--out", "nowhere/a.nii"], "nowhere: no such folder"),
    "no folder for the table": (["--table", "nowhere/a.csv"], "nowhere: no such folder"),
    "no folder for the preview": (["--preview", "nowhere/a.png"], "nowhere: no such folder"),
    "a folder in its place": (["--preview", "folder.png"], "folder.png: that is a folder"),
    "read-only": (["--table", "sealed/a.csv"], r"sealed/a.csv: cannot be written \(Read-only file system\)"),
    "the volume": (["--out", "knee.nii.gz"], "knee.nii.gz: that is the volume itself"),
}


@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_the_command_refuses_what_it_could_not_write_before_it_trains_anything(tmp_path, monkeypatch, capsys, kind):
    options, words = BAD_OUTPUTS[kind]
    save(tmp_path / "knee.nii.gz", IMAGE)
    for name in ("sealed", "folder.png"):
        (tmp_path / name).mkdir()
    original = tempfile.TemporaryFile

    def sealed(*, dir):
        if dir.name == "sealed":  # permissions do not stop the administrator who runs tests
            raise OSError(30, "Read-only file system")
        return original(dir=dir)

    def trains(*_):
        raise AssertionError("it trains")

    monkeypatch.setattr(tempfile, "TemporaryFile", sealed)
    monkeypatch.setattr("fedkd_utils.__main__._network", trains)
    before = sorted(tmp_path.rglob("*"))
    assert main(["segment", "knee.nii.gz", *options]) == 1
    shown = capsys.readouterr().err
    assert re.match(f"error: {words}", shown) and shown.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_refuses_a_bad_file_before_it_trains_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.nii.gz").write_bytes(b"no gzip")
    for name in ("missing.nii.gz", "broken.nii.gz"):
        assert main(["segment", str(tmp_path / name)]) == 1
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ") and name in shown.err and shown.err.count("\n") == 1
    assert not (tmp_path / "cache").exists()
