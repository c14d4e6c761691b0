"""Images for label maps: the anatomy stays what it was, the contrast is that of the sequence, and nobody leaks."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to
from scipy import ndimage

from fedkd_utils import acquisition, anatomy, simulate, sites
from fedkd_utils.__main__ import main
from fedkd_utils.acquisition import SCANNERS, Scan, Scanner
from fedkd_utils.anatomy import Pose
from fedkd_utils.errors import VolumeError

SUBJECT, SHAPE, SPACING = 3, (100, 120, 120), (1.0, 0.9, 0.9)
CARTILAGE = {2: anatomy.FEMORAL, 4: anatomy.TIBIAL, 6: anatomy.PATELLAR}


def drawn_map() -> nib.Nifti1Image:
    """A made knee as a reader of the Queensland maps would have drawn it, in a place of its own."""
    tissue = anatomy.tissue_map(anatomy.draw_knee(SUBJECT), SHAPE, SPACING)
    values = np.zeros(SHAPE, np.uint8)
    for value, code in CARTILAGE.items():
        values[tissue == code] = value
    nearest = ndimage.distance_transform_edt(values == 0, return_distances=False, return_indices=True)
    bone = np.isin(tissue, (anatomy.CORTICAL, anatomy.MARROW))
    values[bone] = values[tuple(nearest)][bone] - 1  # the bone under each cartilage
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-31, 12, 407)
    return nib.Nifti1Image(values, affine)


@pytest.fixture(scope="module")
def knee() -> tuple[np.ndarray, np.ndarray]:
    image = drawn_map()
    return np.asarray(image.dataobj), image.affine


def test_bones_and_cartilages_are_where_the_map_has_them(knee: tuple[np.ndarray, np.ndarray]) -> None:
    """Against nibabel's nearest neighbour on the same lattice."""
    values, affine = knee
    shape, spacing = (80, 160, 170), (1.1, 0.5, 0.5)
    tissue = simulate.tissue_of_map(values, affine, shape, spacing)
    found = np.argwhere(np.isin(values, list(CARTILAGE)))
    middle = nib.affines.apply_affine(affine, (found.min(axis=0) + found.max(axis=0)) / 2)
    lattice = np.diag([*spacing, 1.0])
    lattice[:3, 3] = middle - np.array(spacing) * (np.array(shape) - 1) / 2
    expected = np.asarray(resample_from_to(nib.Nifti1Image(values, affine), (shape, lattice), order=0).dataobj)
    for value, code in CARTILAGE.items():
        truth, made = expected == value, tissue == code
        assert 2 * (truth & made).sum() / (truth.sum() + made.sum()) > 0.9
    bone, made = np.isin(expected, (1, 3, 5)), np.isin(tissue, (anatomy.MARROW, anatomy.CORTICAL))
    assert 2 * (bone & made).sum() / (bone.sum() + made.sum()) > 0.97
    depth = ndimage.distance_transform_edt(made, sampling=spacing)
    assert (tissue[depth > 1.5] == anatomy.MARROW).all() and (tissue[made & (depth < 0.6)] == anatomy.CORTICAL).all()
    present = set(np.unique(tissue))
    assert {anatomy.AIR, anatomy.SKIN, anatomy.FAT, anatomy.MUSCLE, anatomy.MENISCUS, anatomy.FLUID} <= present


@pytest.mark.parametrize("order", ["PIR", "LAS", "SRP"])
def test_the_order_of_the_file_changes_nothing(knee: tuple[np.ndarray, np.ndarray], order: str) -> None:
    image = nib.Nifti1Image(*knee)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(order))
    )
    other = image.as_reoriented(turn)
    lattice = (40, 60, 60), (2.0, 1.2, 1.2)
    plain = simulate.tissue_of_map(*knee, *lattice)
    turned = simulate.tissue_of_map(np.asarray(other.dataobj), other.affine, *lattice)
    assert (plain == turned).mean() > 0.9995  # rounding on a face


def test_a_pose_turns_and_moves_the_knee(knee: tuple[np.ndarray, np.ndarray]) -> None:
    shape, spacing = (96, 100, 100), (1.0, 1.0, 1.0)

    def places(pose: Pose) -> list[np.ndarray]:
        tissue = simulate.tissue_of_map(*knee, shape, spacing, pose)
        return [np.argwhere(tissue == code).mean(axis=0) for code in CARTILAGE.values()]

    straight, moved = places(Pose()), places(Pose((0, 0, 0), (3.0, -4.0, 5.0)))
    for a, b in zip(straight, moved, strict=True):
        assert np.allclose(b - a, (-3, 4, -5), atol=0.3)  # the lattice moves, so the knee moves the other way
    turned = places(Pose((0.0, 0.0, 90.0)))
    x, y, z = straight[2] - straight[1]
    assert np.allclose(turned[2] - turned[1], (y, -x, z), atol=0.7)


def test_volumes_stay_and_contrasts_are_those_of_the_sequence(knee: tuple[np.ndarray, np.ndarray]) -> None:
    """A voxel has the class that fills most of it, which costs thin cartilage as much as it costs a made knee."""
    values, affine = knee
    ml = {c: (values == 2 * c).sum() * np.prod(SPACING) / 1000 for c in (1, 2, 3)}
    for name, brighter in (("repository_dess", anatomy.FEMORAL), ("t1", anatomy.MARROW)):
        scanner = SCANNERS[name]
        made = simulate.scan_map(values, affine, 5, scanner, 1)
        again = simulate.scan_map(values, affine, 5, scanner, 1)
        assert np.array_equal(made.image, again.image) and np.array_equal(made.label, again.label)
        assert nib.aff2axcodes(made.affine) == tuple(scanner.orientation)
        analytic = acquisition.scan(SUBJECT, scanner, 1).label
        for c in ml:
            assert (made.label == c).sum() == pytest.approx((analytic == c).sum(), rel=0.06)
        _, _, pose = acquisition.begin_scan(5, scanner, 1)
        fine, spacing = acquisition.fine_lattice(scanner)
        tissue = simulate.tissue_of_map(values, affine, fine, spacing, pose)
        for c, expected in ml.items():
            found = (anatomy.LABEL_OF_TISSUE[tissue] == c).sum() * np.prod(spacing) / 1000
            assert found == pytest.approx(expected, rel=0.03)
        cut = [n // m for n, m in zip(fine, scanner.shape, strict=True)]
        blocks = tissue.reshape(scanner.shape[0], cut[0], scanner.shape[1], cut[1], scanner.shape[2], cut[2])
        image = nib.as_closest_canonical(nib.Nifti1Image(made.image, made.affine)).get_fdata()
        mean = {c: image[(blocks == c).all(axis=(1, 3, 5))].mean() for c in (anatomy.FEMORAL, anatomy.MARROW)}
        assert max(mean, key=lambda c: mean[c]) == brighter
        air = image[(blocks == anatomy.AIR).all(axis=(1, 3, 5))]
        assert air.mean() < 0.3 * max(mean.values())


# --- sites ------------------------------------------------------------


def quick_scan(values: np.ndarray, affine: np.ndarray, subject: int, scanner: Scanner, visit: int) -> Scan:
    """The map itself with some noise: no lattice, no physics."""
    label = np.array([0, 0, 1, 0, 2, 0, 3, 0, 0, 0], np.uint8)[values]
    noise = np.random.default_rng([subject, visit]).normal(10, 1, values.shape)
    return Scan((noise + values).astype(np.float32), label, affine, "unknown", acquisition.DESS)


@pytest.fixture()
def maps(tmp_path: Path) -> Path:
    folder = tmp_path / "maps"
    folder.mkdir()
    values = np.zeros((12, 40, 40), np.uint8)
    values[:, 5:35, 25:40], values[:, 5:35, 22:24], values[:, 5:35, 20:22], values[:, 5:35, :20] = 1, 2, 4, 3
    values[4:8, 36:39, 25:30], values[4:8, 35, 25:30] = 5, 6
    for person in range(14):
        own = values.copy()
        if person == 2:
            own[own >= 5] = 0  # nobody drew the patella
        own[0, 0, person] = 1  # no two maps are the same
        for visit in ("00m", "96m")[: 1 + (person % 5 == 0)]:
            own[1, 0, 0] = visit == "96m"
            nib.save(
                nib.Nifti1Image(own, np.diag([4.0, 1.2, 1.2, 1])), folder / f"{9000 + person}_{visit}_Femur.nii.gz"
            )
    return folder


def test_everybody_is_in_one_site_and_one_split(maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "scan_map", quick_scan)
    out = maps.parent / "out"
    assert main(["simulate", str(maps), str(out), "--clients", "2"]) == 0
    cohort = sites.open_sites(out)  # proves that nobody leaks
    assert [site.name for site in (cohort.repository, *cohort.clients)] == ["repository", "client_1", "client_2"]
    everybody = [item for site in (cohort.repository, *cohort.clients) for item in site.items]
    assert len(everybody) == 17 and len({item.subject for item in everybody}) == 14
    assert not cohort.repository.unlabelled
    for client in cohort.clients:
        assert all((client.training, client.unlabelled, client.validation, client.test))
        assert not any((client.folder / "labelsTr" / item.image.name).exists() for item in client.unlabelled)
    labelled = {item.name[:4]: item.labelled_classes for item in everybody if item.label is not None}
    assert labelled.pop("9002", (1, 2)) == (1, 2) and set(labelled.values()) == {(1, 2, 3)}
    report = sites.check_sites(out)
    assert not report.errors and "go on with `run`" in report.verdict  # as it is, since splits are named
    assert sorted(path.name for path in out.iterdir()) == ["client_1", "client_2", "repository"]  # no truth beside them


FAULTS = {
    "labels of the course": (lambda v: np.array([0, 0, 1, 0, 2, 0, 3], np.uint8)[v], "ml of femur and tibia"),
    "another value": (lambda v: v + 9 * (v == 1).astype(np.uint8), "values other than"),
    "no cartilage": (lambda v: np.where(np.isin(v, (2, 4)), 0, v), "no femoral or tibial cartilage"),
    "upside down": (lambda v: v[:, :, ::-1], "the femur lies below the tibia"),
    "back to front": (lambda v: v[:, ::-1], "or patellar cartilage behind femoral"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_map_of_another_kind_is_named_and_nothing_stays(
    maps: Path, fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "scan_map", quick_scan)
    change, words = FAULTS[fault]
    path = maps / "9003_00m_Femur.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)).astype(np.uint8), image.affine), path)
    assert main(["simulate", str(maps), str(maps.parent / "out"), "--clients", "2"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {path}: ") and words in shown and shown.count("\n") == 1
    assert [p.name for p in maps.parent.iterdir()] == ["maps"]


@pytest.mark.parametrize("name", ["9077_00m_Femur.nii.gz", "9003_00m_Femur.nii"])
def test_a_map_that_is_there_twice_is_named(maps: Path, name: str) -> None:
    nib.save(nib.load(maps / "9003_00m_Femur.nii.gz"), maps / name)
    (maps / "._9003_00m_Femur.nii.gz").write_bytes(b"a Mac was here")
    with pytest.raises(VolumeError, match=r"the same map as 9003_00m_Femur\.nii.* Keep one of them"):
        simulate.simulate_sites(maps, maps.parent / "out", 2)
    assert [p.name for p in maps.parent.iterdir()] == ["maps"]


def test_too_few_people_are_refused(maps: Path) -> None:
    with pytest.raises(ValueError, match="0 clients: ask for one at least"):
        simulate.simulate_sites(maps, maps.parent / "out", 0)
    with pytest.raises(VolumeError, match="14 people, but 3 clients need 15"):
        simulate.simulate_sites(maps, maps.parent / "out", 3)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        simulate.simulate_sites(maps / "nowhere", maps.parent / "out")
    with pytest.raises(FileExistsError, match="exists already"):
        simulate.simulate_sites(maps, maps, 2)
