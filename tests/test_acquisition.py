"""Signal equations against simulation and closed forms; scans against physics."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from fedkd_utils import acquisition, anatomy
from fedkd_utils.acquisition import SCANNERS, Sequence, dess_echoes, scan, spin_echo, spoiled_gradient_echo


def epg_steady_state(tr_ms: float, te_ms: float, flip_deg: float, t1_ms: float, t2_ms: float) -> tuple[float, float]:
    """Both echoes of a DESS by an extended phase graph, pulse after pulse until nothing changes."""
    states = 120
    a = np.deg2rad(flip_deg)
    c2, s2, s = np.cos(a / 2) ** 2, np.sin(a / 2) ** 2, np.sin(a)
    pulse = np.array([[c2, -s2, s], [-s2, c2, s], [-s / 2, -s / 2, np.cos(a)]])  # rotation about y: real states
    f_plus, f_minus, z = np.zeros(states), np.zeros(states), np.zeros(states)
    z[0] = 1.0
    e1, e2 = np.exp(-tr_ms / t1_ms), np.exp(-tr_ms / t2_ms)
    fisp = psif = 0.0
    for _ in range(2500):
        f_plus, f_minus, z = pulse @ np.stack([f_plus, f_minus, z])
        fisp = abs(f_plus[0]) * np.exp(-te_ms / t2_ms)
        f_plus, f_minus, z = f_plus * e2, f_minus * e2, z * e1
        z[0] += 1 - e1
        f_plus = np.concatenate([[0.0], f_plus[:-1]])
        f_minus = np.concatenate([f_minus[1:], [0.0]])
        f_plus[0] = f_minus[0]
        psif = abs(f_minus[0]) * np.exp(te_ms / t2_ms)
    return fisp, psif


@pytest.mark.parametrize(
    ("flip", "t1", "t2"), [(25.0, 1240.0, 37.0), (25.0, 3620.0, 767.0), (60.0, 371.0, 133.0), (10.0, 1420.0, 32.0)]
)
def test_dess_equals_an_extended_phase_graph_simulation(flip, t1, t2):
    assert dess_echoes(16.3, 4.7, flip, t1, t2) == pytest.approx(epg_steady_state(16.3, 4.7, flip, t1, t2), rel=1e-4)


def test_gradient_echo_is_largest_at_the_ernst_angle():
    tr, t1 = 20.0, 1240.0
    angles = np.linspace(1, 60, 5901)
    best = angles[np.argmax([spoiled_gradient_echo(tr, 5, a, t1, 37, 70) for a in angles])]
    assert best == pytest.approx(np.rad2deg(np.arccos(np.exp(-tr / t1))), abs=0.02)


def test_gradient_echo_equals_an_iterated_recovery():
    tr, te, flip, t1, t2, t2_prime = 20.0, 5.0, 20.0, 371.0, 133.0, 60.0
    mz = 1.0
    for _ in range(2000):
        transverse = mz * np.sin(np.deg2rad(flip))
        mz = 1 - (1 - mz * np.cos(np.deg2rad(flip))) * np.exp(-tr / t1)
    expected = transverse * np.exp(-te / t2) * np.exp(-te / t2_prime)
    assert spoiled_gradient_echo(tr, te, flip, t1, t2, t2_prime) == pytest.approx(expected, rel=1e-9)


def test_spin_echo_limits():
    assert spin_echo(1e9, 0, 1000, 50) == pytest.approx(1.0)
    assert spin_echo(1000 * np.log(2), 0, 1000, 50) == pytest.approx(0.5)
    assert spin_echo(1e9, 50 * np.log(2), 1000, 50) == pytest.approx(0.5)


def test_unknown_sequence_is_refused():
    with pytest.raises(ValueError, match="spin echo"):
        acquisition.signal(Sequence("echo planar", 100, 10), 1000, 50, 50)  # type: ignore[arg-type]


def order(name: str) -> dict[str, float]:
    sequence = SCANNERS[name].sequence
    values = acquisition.tissue_signals(sequence) @ np.array([1.0, sequence.fat_residual])
    return dict(zip(anatomy.TISSUES, values, strict=True))


def test_contrasts_are_those_a_radiologist_knows():
    dess, pd, t1, t2 = (order(n) for n in ("repository_dess", "pd_fs", "t1", "t2_fs"))
    for fat_suppressed in (dess, pd, t2):
        assert fat_suppressed["fluid"] > fat_suppressed["femoral cartilage"] > 2 * fat_suppressed["marrow"]
    assert t1["marrow"] > 1.5 * t1["femoral cartilage"] > t1["fluid"], "T1: bright marrow, dark fluid"
    assert t2["fluid"] / t2["femoral cartilage"] > 1.5 * pd["fluid"] / pd["femoral cartilage"]
    for weighted in (dess, pd, t1, t2):
        assert weighted["cortical bone"] < 0.35 * weighted["femoral cartilage"]
        assert weighted["meniscus"] < weighted["femoral cartilage"]


@pytest.mark.parametrize("name", list(SCANNERS))
def test_scans_are_reproducible_and_complete(name):
    first, second = scan(5, SCANNERS[name], 1), scan(5, SCANNERS[name], 1)
    assert np.array_equal(first.image, second.image) and np.array_equal(first.label, second.label)
    assert np.isfinite(first.image).all() and first.image.min() >= 0
    assert set(np.unique(first.label)) == {0, 1, 2, 3}
    sizes = np.linalg.norm(first.affine[:3, :3], axis=0)
    np.testing.assert_allclose(sorted(sizes), sorted(SCANNERS[name].spacing_mm))
    assert "".join(nib.aff2axcodes(first.affine)) == SCANNERS[name].orientation


def test_another_scan_of_the_subject_is_the_same_knee_elsewhere():
    one, two = scan(5, SCANNERS["pd_fs"], 1), scan(5, SCANNERS["pd_fs"], 2)
    assert not np.array_equal(one.image, two.image)
    for label in (1, 2, 3):
        assert (one.label == label).sum() == pytest.approx((two.label == label).sum(), rel=0.15)


def test_stored_orientation_changes_nothing_in_the_world():
    scanner = SCANNERS["pd_fs"]
    turned = scan(6, scanner, 1)
    plain = scan(6, replace(scanner, orientation="RAS"), 1)
    back = nib.as_closest_canonical(nib.Nifti1Image(turned.image, turned.affine))
    np.testing.assert_array_equal(np.asarray(back.dataobj), plain.image)
    np.testing.assert_allclose(back.affine, plain.affine)


def test_thick_slices_keep_the_volume_of_cartilage():
    knee = anatomy.draw_knee(8)
    thin = replace(SCANNERS["pd_fs"], shape=(80, 80, 80), spacing_mm=(1.0, 1.2, 1.2))
    thick = SCANNERS["pd_fs"]
    fine, coarse = (acquisition.scan_knee(knee, s, 1) for s in (thin, thick))
    for label in (1, 2, 3):
        assert (coarse.label == label).sum() * 4 == pytest.approx((fine.label == label).sum(), rel=0.2)


def test_partial_volume_blurs_thick_slices():
    knee = anatomy.draw_knee(8)
    quiet = replace(SCANNERS["t1"], noise=0.0, bias=0.0, k_space=1.0, orientation="RAS")
    thick = acquisition.scan_knee(knee, quiet, 1).image
    thin = acquisition.scan_knee(knee, replace(quiet, shape=(80, 88, 88), spacing_mm=(1.0, 1.1, 1.1)), 1).image
    steps = [np.abs(np.diff(image, axis=1)).mean() for image in (thick, thin)]
    assert steps[0] < steps[1]


def test_noise_in_air_is_rayleigh():
    """|n1 + i n2| has mean sigma sqrt(pi/2) and standard deviation sigma sqrt(2 - pi/2)."""
    loud = replace(SCANNERS["pd_fs"], noise=0.05, bias=0.0, k_space=1.0, orientation="RAS")
    knee = anatomy.draw_knee(3)
    image = acquisition.scan_knee(knee, loud, 1).image
    silent = acquisition.scan_knee(knee, replace(loud, noise=0.0), 1).image
    air = image[silent < 1e-6]
    assert len(air) > 500
    assert air.mean() / air.std() == pytest.approx(np.sqrt(np.pi / 2) / np.sqrt(2 - np.pi / 2), rel=0.05)


def test_k_space_truncation_is_a_projection():
    x = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(acquisition._truncate_k_space(x, 1.0), x)
    once = acquisition._truncate_k_space(x, 0.6)
    torch.testing.assert_close(acquisition._truncate_k_space(once, 0.6), once, atol=1e-5, rtol=0)
    assert once.norm() < x.norm()
    torch.testing.assert_close(once.mean(), x.mean())


def test_random_sequences_cover_light_and_dark_marrow():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(200):
        s = acquisition.random_sequence(rng)
        v = acquisition.tissue_signals(s) @ np.array([1.0, s.fat_residual])
        ratios.append(v[anatomy.MARROW] / v[anatomy.FEMORAL])
    assert np.mean(np.array(ratios) < 0.5) > 0.2 and np.mean(np.array(ratios) > 1.2) > 0.2


@pytest.mark.parametrize("setting", list(acquisition.CLIENT_SCANNERS))
def test_protocols_are_the_sequences_of_the_clients_and_nothing_else_of_theirs(setting: str) -> None:
    scanner = SCANNERS[acquisition.protocols_of(setting)]
    clients = [SCANNERS[name] for name in acquisition.CLIENT_SCANNERS[setting]]
    drawn = [acquisition.begin_scan(subject, scanner, 1)[1] for subject in range(400)]
    counts = {client.name: drawn.count(client.sequence) for client in clients}
    assert sum(counts.values()) == 400
    assert min(counts.values()) > 0.8 * 400 / len(clients)  # 3 sigma of a binomial(400, 1/4) is 26
    own = {"name": "", "title": "", "protocols": ()}
    assert replace(scanner, **own) == replace(SCANNERS["random"], **own)
