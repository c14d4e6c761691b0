"""Every reader on files that the test writes in exactly the set's layout, with the traps of the set."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_formats import grey, hdf5, metaimage, sagittal_series

from fedkd_utils import formats, readers
from fedkd_utils.errors import VolumeError

RNG = np.random.default_rng(0)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([0.36, 0.36, 0.7, 1]) if affine is None else affine), path)
    return path


def one(found: list[readers.Reading], name: str) -> readers.Reading:
    return next(reading for reading in found if reading.name == name)


def codes(affine: np.ndarray) -> str:
    return "".join(nib.aff2axcodes(affine))


# --- DICOM folders ------------------------------------------------------------


def test_a_folder_of_series_is_one_without_labels(tmp_path: Path) -> None:
    series = sagittal_series(tmp_path / "säries one", grey((7, 6, 5)))
    (reading,) = readers.read_set(tmp_path)
    assert readers.layout(tmp_path) == "dicom" and reading.classes == () and reading.name == "säries one"
    assert np.array_equal(reading.load()[0], formats.read_dicom(series)[0])  # type: ignore[arg-type]


def test_series_of_one_patient_are_one_person_whose_id_is_shown_nowhere(tmp_path: Path) -> None:
    for name, patient in (("a/dess", "MRN 7731"), ("a/pd", "MRN 7731 "), ("b", "MRN 7732"), ("c", ""), ("d", "")):
        sagittal_series(tmp_path / "scans" / name, grey((7, 6, 5)), patient=patient)
    sagittal_series(tmp_path / "elsewhere" / "a", grey((7, 6, 5)), patient="MRN 7731")
    found = readers.read_set(tmp_path / "scans")
    people = {reading.name: reading.subject for reading in found}
    assert people["a_dess"] == people["a_pd"] and len(set(people.values())) == 4
    (other,) = readers.read_set(tmp_path / "elsewhere")
    assert other.subject not in people.values()  # two hospitals count their patients apart
    shown = " ".join(f"{reading.name} {reading.subject}" for reading in (*found, other))
    assert "MRN" not in shown and "7731" not in shown


# --- sets ------------------------------------------------------------


def test_oaizib_cm(tmp_path: Path) -> None:
    raw = RNG.integers(0, 6, (6, 7, 8)).astype(np.uint8)
    for number, half in ((1, "Tr"), (405, "Ts")):
        nifti(tmp_path / f"images{half}" / f"oaizib_{number:03d}_0000.nii.gz", grey(raw.shape))
        nifti(tmp_path / f"labels{half}" / f"oaizib_{number:03d}.nii.gz", raw)
    (tmp_path / "kneeSideInfo.csv").write_text("oaizib_001,right\n")
    facts = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "femur": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    assert readers.layout(tmp_path) == "oaizib_cm"
    found = readers.read_set(tmp_path)
    assert [(r.name, r.split, r.classes) for r in found] == [
        ("oaizib_001", "training", (1, 2)),
        ("oaizib_405", "test", (1, 2)),
    ]
    _, label, affine = found[0].load()
    assert np.array_equal(label, np.array([0, 0, 1, 0, 2, 2])[raw]) and np.allclose(
        np.diag(affine)[:3], (0.36, 0.36, 0.7)
    )


def test_only_the_names_of_oaizib_cm_are_oaizib_cm(tmp_path: Path) -> None:
    """What `prepare` writes of it has the classes of the course: read again by its own names, all would be wrong."""
    names = {"oaizib_001.nii.gz": "nifti", "oaizib_knee_0000.nii.gz": "nifti", "oaizib_405_0000.nii.gz": "oaizib_cm"}
    for half in ("Tr", "Ts"):
        for name, layout in names.items():
            folder = tmp_path / half / layout / name.split(".")[0]
            nifti(folder / f"images{half}" / name, grey((4, 4, 4)))
            assert readers.layout(folder) == layout


def channels(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Random tissue numbers -1 (none) to 5, and their channels."""
    tissue = RNG.integers(-1, 6, shape)
    return tissue, (tissue[..., None] == np.arange(6)).astype(np.uint8)


def test_iwoai_has_visits_no_spacing_and_no_background_channel(tmp_path: Path) -> None:
    shape = (9, 8, 5)
    tissue, seg = channels(shape)
    for stem in ("train/train_001_V00", "train/train_001_V01", "valid/valid_001_V00", "test/test_001_V00"):
        hdf5(tmp_path / f"{stem}.im", data=grey(shape))
        if not stem.startswith("test"):
            hdf5(tmp_path / f"{stem}.seg", data=seg)
    found = readers.read_set(tmp_path)
    assert readers.layout(tmp_path) == "iwoai"
    assert [r.split for r in found] == ["training", "training", "validation", "test"]
    assert len({r.subject for r in found}) == 3  # two visits of train_001
    image, label, affine = found[0].load()
    assert np.array_equal(label, np.array([1, 2, 2, 3, 0, 0, 0])[tissue]) and found[0].classes == (1, 2, 3)
    assert np.allclose(nib.affines.voxel_sizes(affine), (0.3646, 0.3646, 0.7)) and codes(affine) == "IPR"
    assert image is not None and image.dtype == np.float32
    assert found[3].classes == () and found[3].load()[1] is None


def test_skm_tea_has_the_patella_first_and_some_slices_from_right_to_left(tmp_path: Path) -> None:
    shape = (9, 8, 5)
    tissue, seg = channels(shape)
    echoes = {name: {"echo1": grey(shape), "echo2": grey(shape)} for name in ("MTR_001", "MTR_002", "MTR_003")}
    for name, arrays in echoes.items():
        hdf5(tmp_path / f"v1-release/image_files/{name}.h5", **arrays, **({} if name == "MTR_003" else {"seg": seg}))
    nifti(tmp_path / "v1-release/segmentation_masks/dicom-track/MTR_003.nii.gz", (tissue + 1).astype(np.uint8))
    images = [
        {"file_name": "MTR_001.h5", "subject_id": "S1", "orientation": ["SI", "AP", "LR"]},
        {"file_name": "MTR_002.h5", "subject_id": "S1", "orientation": ["SI", "AP", "RL"]},
    ]
    notes = tmp_path / "v1-release/annotations/v1.0.0"
    notes.mkdir(parents=True)
    (notes / "train.json").write_text(json.dumps({"images": images}))
    last = {"file_name": "MTR_003.h5", "subject_id": 3, "orientation": ["SI", "AP", "LR"]}
    (notes / "test.json").write_text(json.dumps({"images": [last]}))
    assert readers.layout(tmp_path) == "skm_tea"
    found = readers.read_set(tmp_path)
    assert [(r.name, r.split) for r in found] == [("MTR_001", "training"), ("MTR_002", "training"), ("MTR_003", "test")]
    assert len({r.subject for r in found}) == 2
    expected = np.array([3, 1, 2, 2, 0, 0, 0])[tissue]
    image, label, affine = found[0].load()
    assert np.array_equal(label, expected) and np.allclose(nib.affines.voxel_sizes(affine), (0.3125, 0.3125, 0.8))
    assert np.allclose(image, np.hypot(echoes["MTR_001"]["echo1"], echoes["MTR_001"]["echo2"]))
    flipped, label, _ = found[1].load()
    assert np.array_equal(label, expected[..., ::-1])
    assert np.allclose(flipped, np.hypot(*echoes["MTR_002"].values())[..., ::-1])
    assert np.array_equal(found[2].load()[1], expected)
    (notes / "val.json").write_text("{")
    with pytest.raises(VolumeError, match=r"val\.json: not an annotation file"):
        readers.read_set(tmp_path)
    (notes / "val.json").write_text(json.dumps({"images": [{"file_name": "MTR_003.h5", "subject_id": 3}]}))
    with pytest.raises(VolumeError, match=r"val\.json: not an annotation file of SKM-TEA \('orientation'\)"):
        readers.read_set(tmp_path)
    (notes / "val.json").unlink()
    (notes / "test.json").unlink()
    with pytest.raises(VolumeError, match=r"MTR_003\.h5: not in the set's annotations"):
        one(readers.read_set(tmp_path), "MTR_003").load()
    one(readers.read_set(tmp_path), "MTR_001").load()
    (notes / "train.json").unlink()
    with pytest.raises(VolumeError, match="annotations: no annotations .* right to left"):
        readers.read_set(tmp_path)


@pytest.mark.parametrize("slices_first", [True, False])
def test_oai_zib_masks_take_their_pose_from_the_series(tmp_path: Path, slices_first: bool) -> None:
    volume = grey((8, 8, 5))  # columns back, rows down, slices
    anatomy = np.zeros(volume.shape, np.uint8)
    anatomy[2:6, :3], anatomy[2:6, 3], anatomy[2:6, 4, :3], anatomy[2:6, 5:] = 1, 2, 4, 3  # femur above, tibia below
    sagittal_series(tmp_path / "dicom" / "9001104", volume)
    rows = anatomy.transpose(2, 1, 0)  # (slices, rows, columns)
    stored = rows[::-1] if slices_first else np.moveaxis(rows, 0, 2)[::-1]
    mask = tmp_path / "segmentation_masks" / "9001104.segmentation_masks.mhd"
    metaimage(mask, stored.T, (1, 1, 1), (0, 0, 0))
    coarse = np.array([0, 1, 0, 2, 0], np.uint8)[stored]  # the other folder: the tibia is 2, which is cartilage here
    metaimage(tmp_path / "classification" / mask.name, coarse.T, (1, 1, 1), (0, 0, 0))
    assert readers.layout(tmp_path) == "oai_zib" and mask.with_suffix(".raw").is_file()
    (reading,) = readers.read_set(tmp_path)
    assert (reading.subject, reading.classes) == ("oai/9001104", (1, 2))
    image, label, affine = reading.load()
    assert np.array_equal(image, volume) and np.array_equal(label, np.array([0, 0, 1, 0, 2])[anatomy])
    assert np.allclose(affine, formats.read_dicom(tmp_path / "dicom" / "9001104")[1])
    metaimage(mask, (rows[:, ::-1][::-1] if slices_first else np.moveaxis(rows[:, ::-1], 0, 2)[::-1]).T)
    with pytest.raises(VolumeError, match="femur lies below the tibia"):
        reading.load()
    metaimage(mask, stored.T[:, :7])
    with pytest.raises(VolumeError, match="Pair the right ones"):
        reading.load()
    mask.with_suffix(".raw").unlink()
    with pytest.raises(VolumeError, match=r"\.raw' is missing"):
        reading.load()


def test_ski10(tmp_path: Path) -> None:
    raw = RNG.integers(0, 5, (6, 7, 8)).astype(np.uint8)
    image = grey(raw.shape)
    metaimage(tmp_path / "image-001.mhd", image)
    metaimage(tmp_path / "labels-001.mhd", raw)
    metaimage(tmp_path / "image-002.mhd", image, (0.4, 0.4, 1.5))
    assert readers.layout(tmp_path) == "ski10"
    first, second = readers.read_set(tmp_path)
    voxels, label, affine = first.load()
    assert np.array_equal(voxels, image) and np.array_equal(label, np.array([0, 0, 1, 0, 2])[raw])
    assert first.classes == (1, 2) and second.classes == () and codes(affine) == "LPS"
    header = (tmp_path / "image-002.mhd").read_text()
    turned = re.sub("TransformMatrix = .*", "TransformMatrix = 1 0 0 0.6 0.8 0 0 0 1", header)
    (tmp_path / "image-002.mhd").write_text(turned)
    with pytest.raises(VolumeError, match=r"image-002\.mhd: the affine is sheared .* at 53 degrees"):
        second.load()
    assert np.allclose(affine[:3, 3], (-3, 4, 5)) and np.allclose(nib.affines.voxel_sizes(affine), (0.39, 0.39, 1))
    metaimage(tmp_path / "labels-001.mhd", raw, (0.4, 0.42, 1.0))
    with pytest.raises(VolumeError, match="another grid"):
        first.load()
    metaimage(tmp_path / "labels-001.mhd", raw + 3)
    with pytest.raises(VolumeError, match="unknown label values"):
        first.load()


def test_open_knees_masks_are_cropped_and_serve_every_series(tmp_path: Path) -> None:
    """Masks in another order of axes, with a place of their own and no sform: every voxel is where it belongs."""
    fine, coarse = np.diag([0.35, 0.35, 0.7, 1.0]), np.diag([0.35, 0.35, 2.8, 1.0])
    fine[:3, 3] = coarse[:3, 3] = (-20, 30, 5)
    coarse[2, 3] += 1.05  # the middle of four fine slices
    nifti(tmp_path / "mri/mri-oks003/cartilage.nii", grey((20, 20, 16)), fine)
    nifti(tmp_path / "mri/mri-oks003/pd.nii", grey((20, 20, 4)), coarse)
    expected = np.zeros((20, 20, 16), np.uint8)
    expected[5:11, 6:10, 5:13], expected[5:11, 12:16, 5:13], expected[5:8, 12:16, 5:13] = 1, 2, 0

    def mask(name: str, c: int, box: tuple[slice, slice, slice]) -> None:
        place = fine.copy()
        place[:3, 3] = nib.affines.apply_affine(fine, [edge.start for edge in box])
        whole = nib.Nifti1Image(255 * (expected[box] == c).astype(np.uint8), place)
        turned = whole.as_reoriented(nib.orientations.axcodes2ornt(("P", "I", "R")))
        turned = nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine)
        turned.set_qform(turned.affine, 1)
        turned.set_sform(None, 0)
        (tmp_path / "seg").mkdir(exist_ok=True)
        nib.save(turned, tmp_path / "seg" / name)

    mask("oks003_FMC_AGS_03.nii", 1, np.s_[4:13, 5:11, 3:14])
    mask("oks003_TBC-M_AGS.nii", 2, np.s_[3:12, 11:18, 2:15])
    assert readers.layout(tmp_path) == "open_knees"
    found = readers.read_set(tmp_path)
    assert [r.name for r in found] == ["oks003_cartilage", "oks003_pd"] and len({r.subject for r in found}) == 1
    assert found[0].classes == (1, 2)  # no mask of the patella: not drawn
    assert np.array_equal(found[0].load()[1], expected)
    _, low, affine = found[1].load()
    assert np.allclose(affine, coarse) and np.array_equal(low, expected[:, :, 1::4])  # alike in each four slices, half


@pytest.mark.parametrize("what", ["masks", "masks and image"])
def test_open_knees_are_aligned_by_qform_whatever_the_sform_says(tmp_path: Path, what: str) -> None:
    right, wrong = np.diag([-0.35, -0.35, 0.7, 1.0]), np.diag([0.35, 0.35, 0.7, 1.0])
    right[:3, 3], wrong[:3, 3] = (20, 30, 5), (100, -3, 5)
    drawn = np.zeros((20, 20, 16), np.uint8)
    drawn[5:11, 6:10, 5:13] = 1

    def aligned(path: Path, array: np.ndarray, start: tuple[int, ...], sform: np.ndarray) -> None:
        place, image = right.copy(), nib.Nifti1Image(array, sform)
        place[:3, 3] = nib.affines.apply_affine(right, start)
        image.set_qform(place, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)

    series = tmp_path / "mri/mri-oks003/cartilage.nii"
    aligned(series, grey(drawn.shape), (0, 0, 0), right if what == "masks" else wrong)
    aligned(tmp_path / "oks003_FMC_AGS_03.nii", drawn[4:13, 5:11, 3:14], (4, 5, 3), wrong)
    (reading,) = readers.read_set(tmp_path)
    _, label, affine = reading.load()
    assert np.array_equal(label, drawn) and np.allclose(affine, right, atol=1e-5)


def test_people_of_one_initiative_may_be_in_two_sets() -> None:
    told = readers.maybe_shared({"east": "oaizib_cm", "north": "nifti", "west": "oai_zib"})
    assert told is not None and told.startswith("east, west: all from the Osteoarthritis Initiative")
    assert readers.maybe_shared({"east": "oaizib_cm", "north": "nifti"}) is None
    assert readers.maybe_shared({"maps": "oai_queensland", "west": "oai_zib"}) is None  # by number: `check` sees it
    assert set(readers.FROM_OAI) <= set(readers.READERS)


def test_oai_label_maps_without_images(tmp_path: Path) -> None:
    raw = RNG.integers(0, 10, (6, 7, 8)).astype(np.uint8)
    for visit in ("", "_00m", "_96m"):
        nifti(tmp_path / f"9001104{visit}_WB01_Femur+Tibia+Patella(Bone)_Femur+Tibia+Patella(Cartilage).nii.gz", raw)
    assert readers.layout(tmp_path) == "oai_queensland"
    found = readers.read_set(tmp_path)
    assert len(found) == 3 and len({r.subject for r in found}) == 1 and found[0].subject == "oai/9001104"
    image, label, _ = found[0].load()
    assert image is None and np.array_equal(label, np.array([0, 0, 1, 0, 2, 0, 3, 0, 0, 0])[raw])


def test_the_courses_own_layout_with_a_label_of_another_grid(tmp_path: Path) -> None:
    raw = RNG.integers(0, 4, (6, 7, 8)).astype(np.uint8)
    nifti(tmp_path / "imagesTr/a_0000.nii.gz", grey(raw.shape))
    nifti(tmp_path / "imagesTr/b_0000.nii.gz", grey(raw.shape))
    nifti(tmp_path / "labelsTr/a.nii.gz", raw)
    (tmp_path / "dataset.json").write_text(json.dumps({"labelled_classes": {"a": [1, 3]}}))
    first, second = readers.read_set(tmp_path)
    assert first.classes == (1, 3) and second.classes == () and np.array_equal(first.load()[1], raw)
    nifti(tmp_path / "labelsTr/a.nii.gz", raw, np.diag([1.0, 1, 1, 1]))
    with pytest.raises(VolumeError, match="another grid than its image"):
        first.load()


# --- faults ------------------------------------------------------------


@pytest.mark.parametrize("bad", ["channels", "values", "text", "key", "nan", "shape"])
def test_a_bad_hdf5_file_is_refused_by_name(tmp_path: Path, bad: str) -> None:
    shape = (9, 8, 5)
    _, seg = channels(shape)
    image, arrays = grey(shape), {"data": seg}
    if bad == "channels":
        arrays = {"data": seg[..., :4]}
    elif bad == "values":
        arrays = {"data": seg * 7}
    elif bad == "key":
        arrays = {"mask": seg}
    elif bad == "shape":
        arrays = {"data": seg[1:]}
    elif bad == "nan":
        image[0, 0, 0] = np.nan
    hdf5(tmp_path / "train/train_001_V00.im", data=image)
    label = hdf5(tmp_path / "train/train_001_V00.seg", **arrays)
    if bad == "text":
        label.write_bytes(b"not hdf5")
    (reading,) = readers.read_set(tmp_path)
    with pytest.raises(VolumeError, match=r"train_001_V00\.(seg|im): ") as caught:
        reading.load()
    assert "\n" not in str(caught.value)


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="no layout that is known"):
        readers.read_set(tmp_path)
    assert readers.layout(tmp_path / "nowhere") is None


def test_every_reader_of_nifti_files_refuses_the_same_headers(tmp_path: Path) -> None:
    raw = RNG.integers(0, 2, (6, 7, 8)).astype(np.uint8)
    nifti(tmp_path / "a/imagesTr/a.nii.gz", grey(raw.shape))
    nifti(tmp_path / "a/labelsTr/a.nii.gz", raw)
    nifti(tmp_path / "b/mri/mri-oks003/a.nii.gz", grey(raw.shape))
    nifti(tmp_path / "b/oks003_FMC_AGS.nii.gz", raw)
    hdf5(tmp_path / "c/image_files/MTR_001.h5", echo1=grey(raw.shape), echo2=grey(raw.shape))
    nifti(tmp_path / "c/segmentation_masks/dicom-track/MTR_001.nii.gz", raw)
    (tmp_path / "c/annotations/v1.0.0").mkdir(parents=True)
    known = {"file_name": "MTR_001.h5", "subject_id": 1, "orientation": ["SI", "AP", "LR"]}
    (tmp_path / "c/annotations/v1.0.0/train.json").write_text(json.dumps({"images": [known]}))
    nifti(tmp_path / "d/9_Cartilage.nii.gz", raw)
    for path in sorted(tmp_path.rglob("*.nii.gz")):
        (reading,) = readers.read_set(tmp_path / path.relative_to(tmp_path).parts[0])
        reading.load()
        good = path.read_bytes()
        content = bytearray(gzip.decompress(good))
        content[252:256] = bytes(4)  # qform_code, sform_code
        path.write_bytes(gzip.compress(bytes(content)))
        with pytest.raises(VolumeError, match=f"{path.name}: its header has no orientation"):
            reading.load()
        path.write_bytes(good)


def test_people_do_not_depend_on_where_a_folder_lies(tmp_path: Path) -> None:
    series = sagittal_series(tmp_path / "here/scans/one/knee", grey((7, 6, 5)))
    nifti(tmp_path / "here/north/imagesTr/a.nii.gz", grey((6, 7, 8)))
    here = {site: [r.subject for r in readers.read_set(tmp_path / "here" / site)] for site in ("scans", "north")}
    assert series.is_dir()
    (tmp_path / "here").rename(tmp_path / "there")
    for site, people in here.items():
        assert [r.subject for r in readers.read_set(tmp_path / "there" / site)] == people
        (tmp_path / "there" / site).rename(tmp_path / "there" / "other")
        assert [r.subject for r in readers.read_set(tmp_path / "there" / "other")] != people  # two sites, two people
        (tmp_path / "there" / "other").rename(tmp_path / "there" / site)
