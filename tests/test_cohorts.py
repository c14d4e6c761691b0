"""Cohorts as files: who has what, the same bytes again, mending, leaks, readers' own folders, and the demonstration."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedkd_utils import acquisition, cohorts, site_folder
from fedkd_utils.acquisition import SCANNERS, Scan, Scanner
from fedkd_utils.errors import CohortError
from fedkd_utils.settings import PAPER, PAPER_SHORT, QUICK, REFERENCE
from fedkd_utils.site_folder import SPLITS, Cohort, Item, Site

TINY = replace(tiny.TINY, repository_training=2, client_test=1)
HERE = Path(__file__).parent


def boxes(subject: int, scanner: Scanner, scan_seed: int) -> Scan:
    """A volume in a millisecond: noise that depends on the subject and the scanner, on a tilted grid."""
    rng = np.random.default_rng([subject, scan_seed, len(scanner.name)])
    label = np.zeros((4, 8, 9), np.uint8)
    label[1:3, 2:4, 2:7], label[1:3, 5:7, 2:7], label[2, 1, 1] = 1, 2, 3
    affine = np.diag([4.0, 1.2, 1.2, 1.0])
    affine[:3, :3] = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = rng.normal(0, 20, 3).round(1)
    image = np.abs(label + rng.normal(1, 0.1, label.shape)).astype(np.float32)
    return Scan(image, label, affine, "left", acquisition.T1)


def slow_boxes(subject: int, scanner: Scanner, scan_seed: int) -> Scan:
    time.sleep(0.15)
    return boxes(subject, scanner, scan_seed)


def make(root: Path, setting: str = "paper_like", **more: object) -> Cohort:
    return cohorts.make_cohort(TINY, setting, root=root, **{"workers": 1, "scan": boxes, **more})  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def everything(cohort: Cohort) -> list[Item]:
    return [i for site in (cohort.repository, *cohort.clients) for i in site.items]


# --- who has what ------------------------------------------------------------


def test_sites_hold_what_the_settings_say(tmp_path: Path) -> None:
    cohort = make(tmp_path)
    assert [len(getattr(cohort.repository, s)) for s in SPLITS] == [2, 0, 1, 1]
    assert [[len(getattr(c, s)) for s in SPLITS] for c in cohort.clients] == [[1, 2, 1, 1]] * 2
    assert [c.name for c in cohort.clients] == ["client_1", "client_2"] and cohort.setting == "paper_like"
    for site in (cohort.repository, *cohort.clients):
        assert all(i.label is None for i in site.unlabelled)
        assert all(i.label and i.label.is_file() for s in ("training", "validation", "test") for i in getattr(site, s))
    names = [i.name for i in everything(cohort)]
    assert len(set(names)) == len(names) and all(i.name == f"knee_{i.subject:05d}" for i in everything(cohort))


def test_paper_like_clients_share_a_scanner_and_heterogeneous_ones_do_not(tmp_path: Path) -> None:
    four = replace(TINY, clients=4)
    alike, different = (
        cohorts.make_clients(four, s, root=tmp_path, workers=1, scan=boxes) for s in ("paper_like", "heterogeneous")
    )
    assert {site_folder.scanner_title(c) for c in alike} == {SCANNERS["pd_fs"].title}
    titles = [SCANNERS[n].title for n in ("pd_fs", "t1", "t2_fs", "gre")]
    assert [site_folder.scanner_title(c) for c in different] == titles
    assert [[i.subject for i in c.items] for c in alike] == [[i.subject for i in c.items] for c in different]


@pytest.mark.parametrize("name", list(SCANNERS))
def test_in_the_plane_every_scanner_resolves_what_the_grid_asks_for(name: str) -> None:
    scanner = SCANNERS[name]
    assert cohorts.scanner_for(QUICK, name) is scanner and cohorts.scanner_for(REFERENCE, name) is scanner
    fine = cohorts.scanner_for(PAPER, name)
    assert fine.shape == (scanner.shape[0], 288, 352) and fine.spacing_mm == (scanner.spacing_mm[0], 0.30, 0.30)
    assert replace(fine, shape=scanner.shape, spacing_mm=scanner.spacing_mm) == scanner


@pytest.mark.parametrize("settings", [QUICK, REFERENCE, PAPER, PAPER_SHORT])
def test_no_subject_number_is_given_twice(settings: object) -> None:
    seen: set[int] = set()
    for seed in (0, 1, 2):
        for numbers in cohorts._subjects(settings, seed).values():  # type: ignore[arg-type]
            assert not seen & set(numbers)
            seen |= set(numbers)
    assert cohorts.DEMONSTRATION_SUBJECT not in seen


def test_too_many_volumes_are_refused() -> None:
    with pytest.raises(CohortError, match="too many volumes"):
        cohorts._subjects(replace(PAPER, client_unlabelled=2000), 0)
    with pytest.raises(CohortError, match="too many volumes"):
        cohorts._subjects(replace(PAPER, repository_training=6000), 0)


def test_both_settings_share_one_repository_and_the_random_one_its_subjects(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path, "heterogeneous")
    assert first.repository == second.repository
    other = cohorts.make_repository(TINY, "random", root=tmp_path, workers=1, scan=boxes)
    assert other.folder != first.repository.folder
    assert [i.subject for i in other.items] == [i.subject for i in first.repository.items]


def test_truth_of_unlabelled_volumes_lies_beside_the_clients(tmp_path: Path) -> None:
    for client in make(tmp_path).clients:
        for item in client.unlabelled:
            hidden = cohorts.hidden_label(item)
            assert hidden.is_file() and client.folder not in hidden.parents
            assert set(np.unique(np.asarray(nib.load(hidden).dataobj))) == {0, 1, 2, 3}
        assert not {i.image.name for i in client.unlabelled} & set(os.listdir(client.folder / "labelsTr"))


# --- the files ------------------------------------------------------------


def test_files_hold_the_scan_with_its_geometry(tmp_path: Path) -> None:
    for item in make(tmp_path).clients[0].training:
        made = boxes(item.subject, SCANNERS["pd_fs"], cohorts.SCAN_SEED)
        image, label = nib.load(item.image), nib.load(item.label)  # type: ignore[arg-type]
        assert image.header.get_data_dtype() == np.int16 and label.header.get_data_dtype() == np.uint8
        np.testing.assert_allclose(image.get_fdata(), made.image, atol=made.image.max() / 32767)
        np.testing.assert_array_equal(np.asarray(label.dataobj), made.label)
        for volume in (image, label):
            np.testing.assert_allclose(volume.affine, made.affine, atol=1e-5)
            np.testing.assert_allclose(volume.header.get_qform(), made.affine, atol=1e-4)
            assert (int(volume.header["sform_code"]), int(volume.header["qform_code"])) == (1, 1)
            assert volume.header.get_xyzt_units()[0] == "mm"


def test_dataset_json_has_the_keys_of_the_decathlon(tmp_path: Path) -> None:
    client = make(tmp_path).clients[0]
    facts = json.loads((client.folder / "dataset.json").read_text())
    assert facts["tensorImageSize"] == "3D" and facts["modality"] == {"0": "MRI"} and facts["licence"] == "Apache-2.0"
    assert facts["labels"] == {"0": "background", "1": "femoral", "2": "tibial", "3": "patellar"}
    assert (facts["numTraining"], facts["numTest"]) == (1, 1) == (len(facts["training"]), len(facts["test"]))
    assert {"name", "description", "reference"} <= set(facts)
    assert len(facts["validation"]) == 1 and len(facts["unlabelled"]) == 2 and len(facts["subjects"]) == 5
    assert facts["provenance"]["scanner"]["sequence"]["tr_ms"] == 3000 and len(facts["provenance"]["code_sha256"]) == 64


def test_same_seed_same_bytes_and_other_seed_other_subjects(tmp_path: Path) -> None:
    make(tmp_path / "a"), make(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    other = cohorts.make_cohort(TINY, "paper_like", 1, tmp_path / "a", workers=1, scan=boxes)
    assert not {i.subject for i in everything(other)} & {i.subject for i in everything(make(tmp_path / "a"))}


def test_processes_make_the_same_bytes_as_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "one")
    make(tmp_path / "two", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert capfd.readouterr() == ("", "")  # silent unless the error stream is a terminal


def test_threads_of_the_caller_are_left_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make(tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_true_scans_arrive_in_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(SCANNERS["pd_fs"], shape=(10, 40, 40), spacing_mm=(8.0, 2.4, 2.4))
    monkeypatch.setitem(SCANNERS, "pd_fs", small)
    one = replace(TINY, clients=1, client_unlabelled=0, grid_spacing_mm=small.spacing_mm)
    (client,) = cohorts.make_clients(one, "paper_like", root=tmp_path, workers=1)
    item = client.test[0]
    made = acquisition.scan(item.subject, small, cohorts.SCAN_SEED)
    np.testing.assert_array_equal(np.asarray(nib.load(item.label).dataobj), made.label)  # type: ignore[arg-type]
    np.testing.assert_allclose(nib.load(item.image).get_fdata(), made.image, atol=made.image.max() / 32767)
    assert nib.aff2axcodes(nib.load(item.image).affine) == tuple("PIR") and made.label.max() >= 1


# --- mending ------------------------------------------------------------


def no_scan(*args: object) -> Scan:
    raise AssertionError("nothing was to be made")


no_scan.__module__, no_scan.__qualname__ = boxes.__module__, boxes.__qualname__


def test_second_call_makes_nothing_and_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path)
    monkeypatch.setattr(cohorts, "_lock", no_scan)
    assert make(tmp_path, scan=no_scan) == first


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "dataset", "label", "hidden"])
def test_only_damaged_files_are_made_again_with_the_same_bytes(tmp_path: Path, damage: str) -> None:
    client = make(tmp_path).clients[0]
    before = files(tmp_path)
    victim = client.training[0].image
    if damage in ("label", "hidden"):
        victim = client.training[0].label if damage == "label" else cohorts.hidden_label(client.unlabelled[0])  # type: ignore[assignment]
        victim.write_bytes(b"not a volume")
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:200])
    elif damage == "remove":
        victim.unlink()
    elif damage == "flip":
        raw = bytearray(victim.read_bytes())
        raw[len(raw) // 2] ^= 1
        victim.write_bytes(bytes(raw))
    else:
        (client.folder / "dataset.json").write_text("{")
    made: list[int] = []

    def counting(subject: int, scanner: Scanner, scan_seed: int) -> Scan:
        made.append(subject)
        return boxes(subject, scanner, scan_seed)

    counting.__module__, counting.__qualname__ = boxes.__module__, boxes.__qualname__
    make(tmp_path, scan=counting)
    assert files(tmp_path) == before
    assert len(made) == (0 if damage == "dataset" else 1)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"{}", b"\xff\xfe"])
def test_lost_checksums_lead_to_a_new_cohort(tmp_path: Path, content: bytes | None) -> None:
    folder = make(tmp_path).repository.folder.parent
    before = files(tmp_path)
    if content is None:
        (folder / "checksums.json").unlink()
    else:
        (folder / "checksums.json").write_bytes(content)
    make(tmp_path)
    assert files(tmp_path) == before


def test_cohort_of_another_library_version_is_made_anew(tmp_path: Path) -> None:
    item = make(tmp_path).repository.training[0]
    before = files(tmp_path)
    folder = item.image.parents[2]
    sums = json.loads((folder / "checksums.json").read_text())
    key = f"repository/imagesTr/{item.image.name}"
    sums[key] = "0" * 64  # as if the old bytes came from another zlib, and the file is damaged now
    (folder / "checksums.json").write_text(json.dumps(sums))
    make(tmp_path)
    assert files(tmp_path) == before


SCRIPT = "import sys; sys.path.insert(0, sys.argv[1]); import test_cohorts as t, pathlib; "
SCRIPT += "t.make(pathlib.Path(sys.argv[2]), scan=t.slow_boxes); print('made')"


def start(root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    arguments = [sys.executable, "-c", SCRIPT, str(HERE), str(root)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


def test_kill_half_way_leaves_no_broken_cohort(tmp_path: Path) -> None:
    process = start(tmp_path)
    for _ in range(600):
        if any(tmp_path.rglob("knee_*.nii.gz")):
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("clients-*"))
    cohort = make(tmp_path, scan=slow_boxes)
    assert not list(tmp_path.glob(".*building")) and len(everything(cohort)) == 14


def test_two_processes_at_once_make_one_cohort(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]
    assert [p.communicate(timeout=120)[0].strip() for p in both] == ["made", "made"]
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir() if p.is_dir()) == ["clients", "repository"]
    make(tmp_path, scan=slow_boxes)


def test_script_without_a_main_guard_ends_and_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("scan=t.slow_boxes", "workers=2"))
    arguments = [sys.executable, str(script), str(HERE), str(tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "made"  # by the script itself, without workers
    assert "must be guarded by `if __name__ == '__main__':`" in done.stderr


def test_full_disk_names_the_folder_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = cohorts.write_atomically, []

    def full(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, content)

    monkeypatch.setattr(cohorts, "write_atomically", full)
    with pytest.raises(CohortError, match="repository-.*No space left.*FEDKD_CACHE"):
        make(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    monkeypatch.setattr(cohorts, "write_atomically", original)
    make(tmp_path)


def test_root_that_is_no_folder_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CohortError, match="FEDKD_CACHE"):
        make(tmp_path / "file")


def test_root_is_the_cache_folder_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "elsewhere"))
    site = cohorts.make_repository(TINY, workers=1, scan=boxes)
    assert tmp_path / "elsewhere" in site.folder.parents


def test_unknown_setting_or_scanner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="paper_like"):
        cohorts.make_clients(TINY, "iid", root=tmp_path)
    with pytest.raises(CohortError, match="repository_dess"):
        cohorts.make_repository(TINY, "ct", root=tmp_path)


# --- leaks ------------------------------------------------------------


def test_made_cohorts_have_no_leak(tmp_path: Path) -> None:
    for setting in ("paper_like", "heterogeneous"):
        site_folder.assert_no_leakage(make(tmp_path, setting))


def with_client(cohort: Cohort, client: Site) -> Cohort:
    return replace(cohort, clients=(client, *cohort.clients[1:]))


@pytest.mark.parametrize("into", SPLITS)
def test_a_subject_of_the_repository_at_a_client_is_found(tmp_path: Path, into: str) -> None:
    cohort = make(tmp_path)
    thief, client = cohort.repository.training[0].subject, cohort.clients[0]
    first, *rest = getattr(client, into)
    leaking = replace(client, **{into: (replace(first, subject=thief), *rest)})
    with pytest.raises(CohortError, match=f"same subject twice: repository training.*client_1 {into}"):
        site_folder.assert_no_leakage(with_client(cohort, leaking))


@pytest.mark.parametrize("how", ["copy", "recompressed", "unzipped"])
def test_a_renamed_copy_is_found_by_its_content(tmp_path: Path, how: str) -> None:
    cohort = make(tmp_path)
    source, client = cohort.clients[1].test[0], cohort.clients[0]
    target = client.folder / "imagesTr" / ("innocent.nii" if how == "unzipped" else "innocent.nii.gz")
    if how == "copy":
        shutil.copy(source.image, target)
    else:
        raw = gzip.decompress(source.image.read_bytes())
        target.write_bytes(raw if how == "unzipped" else gzip.compress(raw, 9))
    with pytest.raises(CohortError, match="same content twice.*innocent"):
        site_folder.assert_no_leakage(with_client(cohort, site_folder.open_site(client.folder)))


def test_a_volume_in_two_splits_of_a_site_is_found(tmp_path: Path) -> None:
    cohort = make(tmp_path)
    client = cohort.clients[0]
    with pytest.raises(CohortError, match="client_1 training.*client_1 test"):
        site_folder.assert_no_leakage(with_client(cohort, replace(client, test=(*client.test, client.training[0]))))


def test_make_cohort_itself_refuses_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = boxes(1, SCANNERS["pd_fs"], 1)
    with pytest.raises(CohortError, match="same content twice"):
        make(tmp_path, scan=lambda *args: twin)


def test_leak_check_names_a_damaged_file(tmp_path: Path) -> None:
    cohort = make(tmp_path)
    victim = cohort.clients[0].test[0].image
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(CohortError, match=f"{victim.name}: damaged"):
        site_folder.assert_no_leakage(cohort)


# --- a reader's own folder ------------------------------------------------------------


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


# --- the demonstration ------------------------------------------------------------


def test_demonstration_is_small_and_made_again_voxel_by_voxel(tmp_path: Path) -> None:
    committed = HERE.parent / "data" / "demo"
    assert sum(p.stat().st_size for p in committed.iterdir()) < 2_000_000
    facts = json.loads((committed / "provenance.json").read_text())
    assert {p.name for p in committed.glob("*.nii.gz")} == set(facts["sha256"])
    for name, value in facts["sha256"].items():
        assert cohorts._sha256(committed / name) == value
    cohorts.write_demonstration(tmp_path)
    for name in facts["sha256"]:
        old, new = nib.load(committed / name), nib.load(tmp_path / name)
        a, b = np.asarray(old.dataobj), np.asarray(new.dataobj)
        if name.startswith("label"):
            assert (a != b).mean() < 1e-4 and {1, 2, 3} <= set(np.unique(a))
        else:  # another processor may round the last bit of a sum the other way: one grey level, rarely
            apart, level = np.abs(a - b), a.max() / 4095
            assert apart.max() <= 2 * level and (apart > level / 2).mean() < 0.01
        np.testing.assert_allclose(old.affine, new.affine, atol=1e-5)
    assert len({nib.load(committed / f"knee_{n}.nii.gz").shape for n in cohorts.DEMONSTRATION}) >= 4
