"""Folders in the layout of the Decathlon or nnU-Net: what opens, as what, and what is refused in which words."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedkd_utils import site_folder
from fedkd_utils.errors import CohortError
from fedkd_utils.site_folder import SPLITS, Cohort


def volume(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *path.name.encode()])
    nib.save(nib.Nifti1Image(rng.integers(0, 4, (3, 4, 5)).astype(np.int16), np.eye(4)), path)


@pytest.fixture()
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "hospital"
    for name in ("a", "b", "c"):
        volume(folder / "imagesTr" / f"{name}_0000.nii.gz")
    for name in ("a", "b"):
        volume(folder / "labelsTr" / f"{name}.nii.gz")
    volume(folder / "imagesTs" / "d_0000.nii.gz")
    volume(folder / "labelsTs" / "d.nii.gz")
    return folder


def test_nnunet_folder_opens_without_dataset_json(own: Path) -> None:
    site = site_folder.open_site(own)
    assert [[i.name for i in getattr(site, s)] for s in SPLITS] == [["a", "b"], ["c"], [], ["d"]]
    assert site.name == "hospital" and {i.labelled_classes for i in site.items} == {(1, 2, 3)}
    assert len({i.subject for i in site.items}) == 4


def test_dataset_json_may_name_validation_subjects_and_classes(own: Path) -> None:
    facts = {
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],  # without _0000, as nnU-Net v1
        "validation": [{"image": "./imagesTr/b_0000.nii.gz", "label": "./labelsTr/b.nii.gz"}],
        "test": ["./imagesTs/d.nii.gz"],
        "labelled_classes": [1, 2],
        "subjects": {"a_0000.nii.gz": 7, "d.nii.gz": "9001104"},
    }
    (own / "dataset.json").write_text(json.dumps(facts))
    site = site_folder.open_site(str(own))
    assert [[i.name for i in getattr(site, s)] for s in SPLITS] == [["a"], ["c"], ["b"], ["d"]]
    assert site.training[0].subject == 7 and site.test[0].subject == 9001104
    assert site.training[0].labelled_classes == (1, 2)


def test_nnunet_v2_dataset_json_opens(own: Path) -> None:
    facts = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "FC": 1}, "numTraining": 2}
    (own / "dataset.json").write_text(json.dumps({**facts, "file_ending": ".nii.gz"}))
    site = site_folder.open_site(own)
    assert len(site.training) == 2 and {item.labelled_classes for item in site.items} == {(1,)}


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ({"background": 0, "femoral cartilage": 1, "tibial cartilage": 2}, (1, 2)),
        ({"0": "background", "1": "Femoral_Cartilage", "2": "TIBIAL", "3": "patella cartilage"}, (1, 2, 3)),
        ({"0": "background", "1": "femoral", "2": "tibial", "3": "patellar"}, (1, 2, 3)),  # as made cohorts have it
        ({"Clear Label": 0, "PatellarCartilage": 3}, (3,)),
        ({"background": "0", "FC": "1"}, (1,)),
        ({"background": 0, "Femoral cartilage (FC)": 1, "cartilage of the tibia": 2}, (1, 2)),
    ],
)
def test_what_labels_does_not_name_is_not_labelled(own: Path, labels: object, classes: tuple[int, ...]) -> None:
    (own / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert {item.labelled_classes for item in site_folder.open_site(own).items} == {classes}
    (own / "dataset.json").write_text(json.dumps({"labels": labels, "labelled_classes": {"a": classes[:1]}}))
    site = site_folder.open_site(own)
    assert [item.labelled_classes for item in site.training] == [classes[:1], classes]  # what is said of a file wins


def test_the_values_of_oaizib_cm_are_its_readers_business(own: Path) -> None:
    facts = {"labels": {"background": 0, "femur": 1, "femoral cartilage": 2, "tibia": 3, "medial tibial cartilage": 4}}
    (own / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(CohortError, match=r'names "femur" \(1\), which is no class here'):
        site_folder.open_site(own)
    volume(own / "imagesTr" / "oaizib_001_0000.nii.gz")
    assert len(site_folder.open_site(own).items) == 5


def test_subjects_may_be_pseudonyms(own: Path) -> None:
    facts = {"subjects": {"a": "P-17", "b": " P-17 ", "c": "Ä\ud800", "d": "9001104"}}
    (own / "dataset.json").write_text(json.dumps(facts))
    a, b, c, d = (item.subject for item in site_folder.open_site(own).items)
    assert a == b == site_folder.number_of(f"{own.name}/P-17") and c == site_folder.number_of(f"{own.name}/Ä\ud800")
    assert d == 9001104  # a number is that of a set, a pseudonym that of a hospital
    assert all(site_folder.is_named(str(number)) for number in (a, b, c, d))
    (own / "dataset.json").unlink()
    assert not any(site_folder.is_named(str(item.subject)) for item in site_folder.open_site(own).items)


def test_knees_that_are_numbered_with_four_digits_are_knees(tmp_path: Path) -> None:
    for number in range(5):
        volume(tmp_path / "imagesTr" / f"knee_{number:04d}.nii.gz")
    assert len(site_folder.open_site(tmp_path).items) == 5
    volume(tmp_path / "labelsTr" / "knee_0001.nii.gz")
    assert len(site_folder.open_site(tmp_path).items) == 5
    volume(tmp_path / "labelsTr" / "knee.nii.gz")  # now it is one knee with five channels
    with pytest.raises(CohortError, match="knee_0002.nii.gz: one of several channels of knee"):
        site_folder.open_site(tmp_path)


def test_what_is_there_and_cannot_be_opened_is_not_overlooked(own: Path) -> None:
    (own / "dataset.json").symlink_to("/nowhere/at/all")
    with pytest.raises(CohortError, match="dataset.json: a link to /nowhere/at/all, where no file is"):
        site_folder.open_site(own)
    (own / "dataset.json").unlink()
    (own / "labelsTr").rename(own / "moved")
    (own / "labelsTr").symlink_to(own / "gone")
    with pytest.raises(CohortError, match="labelsTr: no folder, nor a link to one"):
        site_folder.open_site(own)
    (own / "labelsTr").unlink()
    (own / "moved").rename(own / "labelsTr")
    (own / "imagesTr" / "a_0000.nii.gz").rename(own / "imagesTr" / "A_0000.NII.GZ")
    with pytest.raises(CohortError, match=r"no image of this name in imagesTr \(A_0000.NII.GZ is not read"):
        site_folder.open_site(own)


@pytest.mark.parametrize("extra", [["a_0001"], ["c_0001"], ["e_0001"], ["e_0002", "e_0001"]])
def test_a_second_channel_is_not_another_person(own: Path, extra: list[str]) -> None:
    """Beside the first channel of a labelled or unlabelled volume, or without it."""
    for name in extra:
        volume(own / "imagesTr" / f"{name}.nii.gz")
    with pytest.raises(
        CohortError, match=f"{sorted(extra)[0]}.nii.gz: one of several channels of {extra[0][0]}, .*_0000"
    ):
        site_folder.open_site(own)


def test_a_labelled_volume_with_its_second_channel_alone_is_refused_as_that(tmp_path: Path) -> None:
    volume(tmp_path / "imagesTr" / "a_0001.nii.gz")
    volume(tmp_path / "labelsTr" / "a.nii.gz")
    with pytest.raises(CohortError, match="one of several channels of a, "):
        site_folder.open_site(tmp_path)


def test_knees_with_numbers_of_four_digits_are_no_channels(tmp_path: Path) -> None:
    for name in ("knee_0000", "knee_0001", "knee_0002"):
        volume(tmp_path / "imagesTr" / f"{name}.nii.gz")
    for name in ("knee_0000", "knee_0001"):
        volume(tmp_path / "labelsTr" / f"{name}.nii.gz")
    site = site_folder.open_site(tmp_path)
    assert (len(site.training), len(site.unlabelled)) == (2, 1)


def test_two_hospitals_with_the_same_file_names_are_not_one_subject(own: Path, tmp_path: Path) -> None:
    for half in ("imagesTr", "labelsTr"):
        volume(tmp_path / "other" / half / "a.nii.gz", seed=1)
    first, second = site_folder.open_site(own), site_folder.open_site(tmp_path / "other")
    site_folder.assert_no_leakage(Cohort(first, (second,), "own"))


def test_unlabelled_only_and_test_only_sites_open(own: Path) -> None:
    shutil.rmtree(own / "labelsTr")
    assert [len(getattr(site_folder.open_site(own), s)) for s in SPLITS] == [0, 3, 0, 1]
    shutil.rmtree(own / "imagesTr")
    assert [len(getattr(site_folder.open_site(own), s)) for s in SPLITS] == [0, 0, 0, 1]


def test_what_a_site_holds_out_is_never_trained_on(own: Path) -> None:
    """Named for validation or test, or in imagesTs: with a label it is scored, without one it is left out."""
    for name in ("e", "f", "g"):
        volume(own / "imagesTr" / f"{name}_0000.nii.gz")
    volume(own / "imagesTs" / "h_0000.nii.gz")
    volume(own / "labelsTr" / "g.nii.gz")
    facts = {
        "validation": ["imagesTr/b_0000.nii.gz", {"image": "./imagesTr/e.nii.gz"}],
        "test": ["./imagesTr/f.nii.gz", {"image": "./imagesTr/g.nii.gz", "label": "./labelsTr/g.nii.gz"}],
    }
    (own / "dataset.json").write_text(json.dumps(facts))
    site = site_folder.open_site(own)
    assert [[i.name for i in getattr(site, s)] for s in SPLITS] == [["a"], ["c"], ["b"], ["g", "d"]]
    assert [i.name for i in site.left_out] == ["e", "f", "h"] and not {i.name for i in site.items} & {"e", "f", "h"}
    assert site.counts == "1 training, 1 unlabelled, 1 validation, 2 test"


def test_people_and_so_splits_do_not_depend_on_where_a_folder_lies(own: Path, tmp_path: Path) -> None:
    before = [i.subject for i in site_folder.open_site(own).items]
    (tmp_path / "elsewhere").mkdir()
    moved = own.rename(tmp_path / "elsewhere" / own.name)
    assert [i.subject for i in site_folder.open_site(moved).items] == before


def test_hidden_files_of_a_mac_are_not_volumes(own: Path) -> None:
    (own / "imagesTr" / "._a_0000.nii.gz").write_bytes(b"resource fork")
    assert len(site_folder.open_site(own).items) == 4


def test_site_without_any_volume_is_refused(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CohortError, match="no volume in imagesTr"):
            site_folder.open_site(folder)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"training": [{"image": "./imagesTr/z.nii.gz"}]}, "lists ./imagesTr/z.nii.gz, which is not there"),
        (
            {"training": [{"image": "./imagesTr/a.nii.gz"}], "validation": ["imagesTr/a_0000.nii.gz"]},
            "lists a in training and in validation. Keep it in one",
        ),
        ({"test": ["imagesTs/z.nii.gz"]}, "lists imagesTs/z.nii.gz"),
        ({"labelled_classes": [1, 9]}, r"labelled_classes is \[1, 9\]"),
        ({"labelled_classes": []}, "labelled_classes"),
        ({"labelled_classes": 3}, "must be a list of numbers"),
        ({"labelled_classes": {"a": [1, 2], "B.nii.gz": [1]}}, "labelled_classes names B, but no image is called so"),
        ({"labelled_classes": {"a": ["femural"]}}, "labelled_classes must be a list of numbers"),
        ({"labelled_classes": {"a": [1, 2, 5]}}, r"labelled_classes is \[1, 2, 5\]"),
        ({"subjects": {"patient_a.nii.gz": 1}}, "subjects names patient_a, but no image is called so"),
        ({"subjects": {"a.nii.gz": 1.5}}, "subjects must be file name -> number or pseudonym, but holds 1.5"),
        ({"subjects": {"a.nii.gz": " "}}, "subjects must be file name -> number or pseudonym"),
        ({"subjects": ["a.nii.gz"]}, "subjects must be file name -> number or pseudonym"),
        ({"subjects": None}, "subjects must be file name -> number or pseudonym, but holds null"),
        ({"test": None}, "test holds null"),
        ({"validation": None}, "validation holds null"),
        ({"training": 5}, "training holds 5. Make it a list"),
        ({"training": [1, 2]}, "training holds 1. Make it a list"),
        ({"training": [{"label": None}]}, "training holds"),
        ({"training": ["x" * 5000]}, "which is not there"),
        ({"labels": 3}, "labels is 3. Make it name -> number"),
        ({"labels": None}, "labels is null"),
        ({"labels": {"femoral": True}}, "Make it name -> number"),
        ({"labels": {"cartilage": [1, 2]}}, "Make it name -> number"),
        ({"labels": {"background": 0}}, "without a cartilage"),
        ({"labels": {"femoral": 2, "tibial": 1}}, r"In all label files change 2 to 1 \(femoral\), 1 to 2 \(tibial\)"),
        ({"labels": {"1": "patellar", "2": "femoral"}}, r"change 2 to 1 \(femoral\), 1 to 3 \(patellar\)"),
        ({"labels": {"femoral": 1, "meniscus": 4}}, r'names "meniscus" \(4\), which is no class here. If it is'),
        ({"labels": {"femur": 1, "tibia": 2, "patella": 3}}, r'names "femur" \(1\), which is no class here'),  # bones?
        ({"labels": {"femoral": 1, "medial tibial cartilage": 2}}, "give all parts of a cartilage its one value"),
        ({"labels": {"femoral": 1, "ignore": 4}}, "a label cannot say that a voxel is unknown"),
        ({"labels": {"大腿骨軟骨": 1}}, 'names "大腿骨軟骨"'),
        ({"labels": {"femoral bone": 1}}, r'names "femoral bone" \(1\), which is no class'),
        ({"labels": {"1": "tibia cartilage", "2": "tibial cartilage"}}, "names tibial cartilage twice"),
        ({"labels": {"femoral": 1, "tibial": 2}, "labelled_classes": [1, 3]}, r"but labels names only \[1, 2\]"),
        ({"labels": {"femoral": 1}, "labelled_classes": {"a": [1, 2]}}, r"but labels names only \[1\]"),
        ({"labelled_classes": None}, "must be a list of numbers"),
        ({"labelled_classes": ["1"]}, "must be a list of numbers"),
        ([], "no JSON object"),
        (None, "not readable as JSON"),
    ],
)
def test_bad_dataset_json_is_refused_by_name(own: Path, facts: object, words: str) -> None:
    (own / "dataset.json").write_text("{'a'" if facts is None else json.dumps(facts))
    with pytest.raises(CohortError, match=words) as caught:
        site_folder.open_site(own)
    assert "dataset.json" in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from("abcd0123"), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = (*SPLITS, "labels", "labelled_classes", "subjects", "name", "description", "provenance")


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1))
@example({"training": ["\ud800"], "subjects": {"\n\ud800": "\udcff"}})
@example({"subjects": {"a": "9" * 5000}, "test": ["."]})
def test_any_dataset_json_opens_or_is_refused_in_one_line_that_names_it(own: Path, facts: dict[str, object]) -> None:
    described = own / "dataset.json"
    described.write_text(json.dumps(facts))
    try:
        site = site_folder.open_site(own)
    except CohortError as error:
        assert str(error).startswith(f"{described}: ") and str(error).isprintable()
    else:
        assert len(site.items) == 4 and all(type(item.subject) is int for item in site.items)
        assert all(0 < len(item.labelled_classes) <= 3 for item in site.items) and site_folder.scanner_title(site)


def test_a_dataset_json_of_a_thousand_brackets_is_refused(own: Path) -> None:
    (own / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(CohortError, match="dataset.json: not readable as JSON"):
        site_folder.open_site(own)


@pytest.mark.parametrize("part", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize(
    ("put", "words"),
    [
        (lambda path: path.mkdir(), "a folder, though called like a file. Put the file in its place"),
        (lambda path: path.symlink_to(path.name), "a link to c.nii.gz, where no file is. Put the file itself"),
        (lambda path: path.symlink_to("gone.nii.gz"), "a link to gone.nii.gz, where no file is"),
        (os.mkfifo, "neither a file nor a link to one"),
    ],
)
def test_what_is_called_like_a_volume_and_is_none_is_refused(own: Path, part: str, put, words: str) -> None:  # type: ignore[no-untyped-def]
    (own / "imagesTr" / "c_0000.nii.gz").unlink()
    path = own / part / "c.nii.gz"
    put(path)
    with pytest.raises(CohortError, match=f"{path}: {words}"):
        site_folder.open_site(own)


def test_other_formats_are_listed_and_notes_are_not(own: Path) -> None:
    assert site_folder.passed_over(own) == []
    for name in ("e.nrrd", "f.mgz", "g.NII.GZ", "a.json", "README.txt", ".hidden.mgz"):
        (own / "imagesTr" / name).write_bytes(b"")
    (own / "labelsTs" / "patient").mkdir()
    assert [path.name for path in site_folder.passed_over(own)] == ["e.nrrd", "f.mgz", "g.NII.GZ", "patient"]
    for half in ("imagesTr", "imagesTs"):
        for path in (own / half).glob("*.nii.gz"):
            path.unlink()
    with pytest.raises(CohortError, match=r"no volume in imagesTr \(not read: e.nrrd, f.mgz, g.NII.GZ\)"):
        site_folder.open_site(own)


def test_names_that_are_no_utf_8_open_and_can_be_printed(own: Path) -> None:
    os.rename(own / "imagesTr" / "c_0000.nii.gz", os.fsencode(own / "imagesTr") + b"/c\xff_0000.nii.gz")
    site = site_folder.open_site(own)
    assert [item.name for item in site.unlabelled] == [r"c\udcff"] and site.unlabelled[0].image.is_file()


def test_label_without_image_and_doubled_volumes_are_refused(own: Path) -> None:
    volume(own / "labelsTr" / "z.nii.gz")
    with pytest.raises(CohortError, match="z.nii.gz: no image of this name in imagesTr"):
        site_folder.open_site(own)
    (own / "labelsTr" / "z.nii.gz").unlink()
    volume(own / "imagesTr" / "a.nii")
    with pytest.raises(CohortError, match="one volume twice"):
        site_folder.open_site(own)
    (own / "imagesTr" / "a.nii").unlink()
    volume(own / "imagesTs" / "a.nii.gz")
    with pytest.raises(CohortError, match="also in imagesTr"):
        site_folder.open_site(own)
