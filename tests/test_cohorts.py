"""Cohorts as files: who has what, the same bytes again, mending, leaks, and the demonstration."""

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
