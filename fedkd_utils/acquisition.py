"""From tissues to images: MR signal equations, sequences and scanners.

A scan is made the way a scanner makes it: the anatomy in its pose, the signal of every tissue from the steady-state
equation of the sequence, averaging over thick slices and voxels (partial volume), a truncated k-space, the coil's bias
field, incomplete fat suppression, and Rician noise. The label of a voxel is the class that fills most of it.

Relaxation times at 3 T: cartilage, muscle, synovial fluid, fat and marrow fat from Gold et al., AJR 2004
(doi:10.2214/ajr.183.2.1830343); blood from Stanisz et al., MRM 2005 (doi:10.1002/mrm.20605). Values marked *chosen* in
:data:`TISSUE_MR` are plausible settings for short-T2 tissues and proton densities, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from fedkd_utils import anatomy
from fedkd_utils.anatomy import LABEL_OF_TISSUE, Knee, Pose, draw_knee, tissue_map
from fedkd_utils.interpolation import trilinear
from fedkd_utils.recontrast import recontrast


@dataclass(frozen=True)
class TissueMR:
    """What a scanner sees of a tissue at 3 T. A tissue is water, fat, or both."""

    water: float  # relative proton density of the water protons
    fat: float  # relative proton density of the fat protons
    t1_ms: float
    t2_ms: float
    t2_prime_ms: float  # 1/T2* = 1/T2 + 1/T2'
    texture: float  # relative spread of the signal inside the tissue


FAT_T1_MS, FAT_T2_MS = 371.0, 133.0

#: One row a tissue code, in the order of ``anatomy.TISSUES``. T1 and T2 from the sources above unless *chosen*.
TISSUE_MR: tuple[TissueMR, ...] = (
    TissueMR(0.0, 0.0, 1000, 10, 10, 0.0),  # air
    TissueMR(0.06, 0.86, 371, 133, 60, 0.13),  # fat (Gold: subcutaneous)
    TissueMR(0.75, 0.02, 1420, 32, 60, 0.14),  # muscle (Gold)
    TissueMR(0.12, 0.0, 500, 1.5, 5, 0.1),  # cortical bone: chosen
    TissueMR(0.10, 0.72, 365, 133, 20, 0.12),  # marrow (Gold); short T2' beside trabeculae: chosen
    TissueMR(0.72, 0.0, 1240, 37, 70, 0.08),  # femoral cartilage (Gold)
    TissueMR(0.72, 0.0, 1240, 37, 70, 0.08),  # tibial cartilage
    TissueMR(0.72, 0.0, 1240, 37, 70, 0.08),  # patellar cartilage
    TissueMR(0.60, 0.0, 1000, 11, 30, 0.12),  # meniscus: chosen
    TissueMR(0.50, 0.0, 900, 7, 30, 0.15),  # ligaments and tendons: chosen
    TissueMR(1.00, 0.0, 3620, 767, 200, 0.05),  # synovial fluid (Gold)
    TissueMR(0.90, 0.0, 1932, 275, 60, 0.1),  # blood (Stanisz)
    TissueMR(0.60, 0.05, 900, 25, 40, 0.1),  # skin: chosen
)

SequenceKind = Literal["spin echo", "gradient echo", "dess"]


@dataclass(frozen=True)
class Sequence:
    """A pulse sequence. ``fat_residual`` is the share of the fat signal left by fat suppression (1: none)."""

    kind: SequenceKind
    tr_ms: float
    te_ms: float
    flip_deg: float = 90.0
    fat_residual: float = 1.0


def spin_echo(tr_ms: float, te_ms: float, t1_ms: float, t2_ms: float) -> float:
    """Spin echo per unit proton density: (1 - exp(-TR/T1)) exp(-TE/T2), for TE << TR."""
    return float((1 - np.exp(-tr_ms / t1_ms)) * np.exp(-te_ms / t2_ms))


def spoiled_gradient_echo(
    tr_ms: float,
    te_ms: float,
    flip_deg: float,
    t1_ms: float,
    t2_ms: float,
    t2_prime_ms: float,
) -> float:
    """Spoiled gradient echo (Ernst): sin a (1 - E1) / (1 - E1 cos a) exp(-TE/T2*)."""
    a, e1 = np.deg2rad(flip_deg), np.exp(-tr_ms / t1_ms)
    decay = np.exp(-te_ms * (1 / t2_ms + 1 / t2_prime_ms))
    return float(np.sin(a) * (1 - e1) / (1 - e1 * np.cos(a)) * decay)


def dess_echoes(
    tr_ms: float,
    te_ms: float,
    flip_deg: float,
    t1_ms: float,
    t2_ms: float,
    t2_prime_ms: float = np.inf,
) -> tuple[float, float]:
    """The two echoes of a double-echo steady state per unit proton density (Welsch et al., MRM 2009).

    The first (FISP) is read ``te_ms`` after the pulse, the second (PSIF) ``te_ms`` before the next one
    (doi:10.1002/mrm.22036). The tests check both against an extended-phase-graph simulation.
    """
    a = np.deg2rad(flip_deg)
    e1, e2 = np.exp(-tr_ms / t1_ms), np.exp(-tr_ms / t2_ms)
    r = np.sqrt((1 - e2**2) / ((1 - e1 * np.cos(a)) ** 2 - e2**2 * (e1 - np.cos(a)) ** 2))
    fisp = np.tan(a / 2) * (1 - (e1 - np.cos(a)) * r) * np.exp(-te_ms * (1 / t2_ms + 1 / t2_prime_ms))
    psif = np.tan(a / 2) * (1 - (1 - e1 * np.cos(a)) * r) * np.exp(te_ms * (1 / t2_ms - 1 / t2_prime_ms))
    return float(fisp), float(psif)


def signal(sequence: Sequence, t1_ms: float, t2_ms: float, t2_prime_ms: float) -> float:
    """Signal of a sequence per unit proton density (DESS: root of the sum of squares of its echoes)."""
    s = sequence
    if s.kind == "spin echo":
        return spin_echo(s.tr_ms, s.te_ms, t1_ms, t2_ms)
    if s.kind == "gradient echo":
        return spoiled_gradient_echo(s.tr_ms, s.te_ms, s.flip_deg, t1_ms, t2_ms, t2_prime_ms)
    if s.kind == "dess":
        return float(np.hypot(*dess_echoes(s.tr_ms, s.te_ms, s.flip_deg, t1_ms, t2_ms, t2_prime_ms)))
    raise ValueError(f"unknown kind of sequence {s.kind!r}: use 'spin echo', 'gradient echo' or 'dess'")


def tissue_signals(sequence: Sequence, jitter: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Water and fat signal of every tissue: array (tissues, 2), the fat share before suppression.

    Args:
        sequence: the pulse sequence.
        jitter: (tissues, 3) factors on proton density, T1 and T2; ones when not given.
    """
    out = np.zeros((len(TISSUE_MR), 2))
    for code, tissue in enumerate(TISSUE_MR):
        density, t1, t2 = (1.0, 1.0, 1.0) if jitter is None else jitter[code]
        out[code, 0] = (
            density * tissue.water * signal(sequence, tissue.t1_ms * t1, tissue.t2_ms * t2, tissue.t2_prime_ms)
        )
        out[code, 1] = density * tissue.fat * signal(sequence, FAT_T1_MS, FAT_T2_MS * t2, tissue.t2_prime_ms)
    # Marrow and fat have no separate water pool to speak of: their water relaxes like muscle's.
    for code in (anatomy.FAT, anatomy.MARROW):
        muscle = TISSUE_MR[anatomy.MUSCLE]
        water = TISSUE_MR[code].water * signal(sequence, muscle.t1_ms, muscle.t2_ms, TISSUE_MR[code].t2_prime_ms)
        out[code, 0] = water if jitter is None else water * jitter[code, 0]
    return out


@dataclass(frozen=True)
class Scanner:
    """A scanner with its protocol: one image per subject."""

    name: str
    title: str
    sequence: Sequence | None  # None: another one for every scan, of ``protocols``, or random when there are none
    shape: tuple[int, int, int]  # voxels along left-right (the slices), posterior-anterior, inferior-superior
    spacing_mm: tuple[float, float, float]
    noise: float = 0.03  # standard deviation of the noise in either channel, relative to the bright tissue
    bias: float = 0.25  # strength of the coil's bias field (natural log units)
    k_space: float = 0.85  # share of the in-plane k-space that is acquired; the rest is zero-filled
    orientation: str = "RAS"  # axis codes of the stored array
    recontrasted: bool = False  # every image gets a contrast of its own afterwards (see recontrast.py)
    protocols: tuple[Sequence, ...] = ()


def _clinic(name: str, title: str, sequence: Sequence, **more: object) -> Scanner:
    return Scanner(name, title, sequence, (20, 80, 80), (4.0, 1.2, 1.2), **more)  # type: ignore[arg-type]


DESS = Sequence("dess", 16.3, 4.7, 25.0, 0.04)
PD_FS = Sequence("spin echo", 3000, 35, fat_residual=0.08)
T1 = Sequence("spin echo", 650, 12)
T2_FS = Sequence("spin echo", 4000, 70, fat_residual=0.08)
GRADIENT_ECHO = Sequence("gradient echo", 20, 5.0, 20.0)

#: The scanners of the course. Clinics differ from the repository and from each other in contrast, grid and orientation.
SCANNERS: dict[str, Scanner] = {
    s.name: s
    for s in (
        Scanner(
            "repository_dess",
            "3D DESS, water excitation",
            DESS,
            (40, 96, 96),
            (2.0, 1.0, 1.0),
            0.03,
            0.2,
            0.95,
        ),
        _clinic(
            "pd_fs",
            "PD-weighted spin echo, fat-suppressed",
            PD_FS,
            noise=0.04,
            orientation="PIR",
        ),
        Scanner(
            "t1",
            "T1-weighted spin echo",
            T1,
            (20, 88, 88),
            (4.0, 1.1, 1.1),
            0.03,
            0.3,
            0.85,
            "PIR",
        ),
        Scanner(
            "t2_fs",
            "T2-weighted spin echo, fat-suppressed",
            T2_FS,
            (22, 80, 80),
            (3.6, 1.2, 1.2),
            0.05,
            0.3,
            0.8,
            "LPS",
        ),
        Scanner(
            "gre",
            "3D gradient echo",
            GRADIENT_ECHO,
            (54, 80, 80),
            (1.5, 1.2, 1.2),
            0.05,
            0.25,
            0.9,
            "RAS",
        ),
        Scanner(
            "random",
            "a new random sequence for every scan",
            None,
            (40, 96, 96),
            (2.0, 1.0, 1.0),
            0.04,
            0.3,
            0.85,
        ),
    )
}
SCANNERS["recontrasted"] = replace(
    SCANNERS["repository_dess"],
    name="recontrasted",
    title="3D DESS with a new contrast for every scan, from image and label alone",
    recontrasted=True,
)

#: The scanner of each client of a setting, in turn.
CLIENT_SCANNERS = {"paper_like": ("pd_fs",), "heterogeneous": ("pd_fs", "t1", "t2_fs", "gre")}


def protocols_of(setting: str) -> str:
    """The name of the scanner that has the sequences of a setting's clients: TR, TE, flip angle, fat suppression.

    Most of that stands in the header of an MR file in DICOM format; how much fat is left does not. All else is the
    "random" scanner's: grid, coil, noise, and tissues that vary twice as much as the clients'.
    """
    return f"protocols_{setting}"


for _setting, _names in CLIENT_SCANNERS.items():
    SCANNERS[protocols_of(_setting)] = replace(
        SCANNERS["random"],
        name=protocols_of(_setting),
        title="for every scan the sequence of one of the hospitals",
        protocols=tuple(s for s in (SCANNERS[name].sequence for name in _names) if s is not None),
    )


@dataclass(frozen=True)
class Scan:
    """An image with its labels, as the scanner stores it."""

    image: NDArray[np.float32]  # (X, Y, Z) in the scanner's array orientation
    label: NDArray[np.uint8]  # same shape: 0 background, 1 femoral, 2 tibial, 3 patellar cartilage
    affine: NDArray[np.float64]  # (4, 4) voxel index -> RAS mm
    side: str
    sequence: Sequence


def random_sequence(rng: np.random.Generator) -> Sequence:
    """A sequence drawn from the whole family of signal equations: the randomised-contrast repository."""
    kind = rng.choice(np.array(["spin echo", "spin echo", "gradient echo", "dess"]))
    fat = float(rng.uniform(0.02, 0.2)) if rng.random() < 0.5 else float(rng.uniform(0.6, 1.0))
    if kind == "spin echo":
        return Sequence(
            "spin echo",
            float(np.exp(rng.uniform(*np.log([450, 5000])))),
            float(rng.uniform(8, 85)),
            90.0,
            fat,
        )
    if kind == "gradient echo":
        return Sequence(
            "gradient echo",
            float(rng.uniform(10, 50)),
            float(rng.uniform(3, 12)),
            float(rng.uniform(8, 50)),
            fat,
        )
    return Sequence(
        "dess",
        float(rng.uniform(14, 26)),
        float(rng.uniform(4, 8)),
        float(rng.uniform(15, 45)),
        fat,
    )


def _smooth_field(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    scale_mm: float,
) -> torch.Tensor:
    """A smooth random field of about unit spread, with a correlation length of about ``scale_mm``."""
    nodes = tuple(max(int(np.ceil(n * s / scale_mm)) + 2, 2) for n, s in zip(shape, spacing, strict=True))
    coarse = torch.from_numpy(rng.standard_normal(nodes, dtype=np.float32))[None]
    return trilinear(coarse, shape)[0]


def _truncate_k_space(image: torch.Tensor, share: float) -> torch.Tensor:
    """Keep the central ``share`` of the two in-plane k-space axes (zero-filled reconstruction): blur and ringing."""
    if share >= 1.0:
        return image
    k = torch.fft.fft2(image)
    for axis in (1, 2):
        frequency = torch.fft.fftfreq(image.shape[axis]).abs()
        shape = [1, 1, 1]
        shape[axis] = -1
        k = k * (frequency <= 0.5 * share).reshape(shape)
    return torch.fft.ifft2(k).real


def _drawn_sequence(scanner: Scanner, rng: np.random.Generator) -> Sequence:
    return scanner.protocols[rng.integers(len(scanner.protocols))] if scanner.protocols else random_sequence(rng)


def begin_scan(subject_seed: int, scanner: Scanner, scan_seed: int) -> tuple[np.random.Generator, Sequence, Pose]:
    """What is settled before a knee is scanned: the generator of all that follows, the sequence and the pose."""
    rng = np.random.default_rng([0x5343414E, subject_seed, scan_seed])
    sequence = scanner.sequence or _drawn_sequence(scanner, rng)
    return rng, sequence, Pose(tuple(rng.normal(0, 4, 3)), tuple(rng.normal(0, [2.5, 4, 5])))


def scan_knee(knee: Knee, scanner: Scanner, scan_seed: int) -> Scan:
    """Scan a knee. The subject decides anatomy and tissue properties, the scan seed pose, coil and noise.

    Returns:
        image, label and affine in the scanner's array orientation; equal for equal arguments, bit for bit.
    """
    rng, sequence, pose = begin_scan(knee.subject_seed, scanner, scan_seed)
    tissue = tissue_map(knee, *fine_lattice(scanner), pose)
    return scan_tissue(tissue, scanner, knee.subject_seed, knee.side, sequence, rng)


def fine_lattice(scanner: Scanner) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Shape and spacing (mm) of the sub-voxels on which tissue is scanned, so that thick slices blur what they cut.

    About 1 mm across slices, 0.6 mm in the plane.
    """
    a, b, c = _sub_voxels(scanner)
    (x, y, z), (dx, dy, dz) = scanner.shape, scanner.spacing_mm
    return (x * a, y * b, z * c), (dx / a, dy / b, dz / c)


def _sub_voxels(scanner: Scanner) -> list[int]:
    return [max(round(s / t), 1) for s, t in zip(scanner.spacing_mm, (1.0, 0.55, 0.55), strict=True)]


def scan_tissue(
    tissue: NDArray[np.uint8],
    scanner: Scanner,
    subject_seed: int,
    side: str,
    sequence: Sequence,
    rng: np.random.Generator,
) -> Scan:
    """Scan a map of tissue codes, of whatever anatomy; sequence and generator are those of :func:`begin_scan`.

    Args:
        tissue: codes of ``anatomy.TISSUES`` on :func:`fine_lattice`, in RAS order.
    """
    sub = _sub_voxels(scanner)
    fine_shape, fine_mm = fine_lattice(scanner)
    subject = np.random.default_rng([0x54495353, subject_seed])
    randomised = scanner.sequence is None

    spread = np.array([0.06, 0.08, 0.10]) * (2.0 if randomised else 1.0)
    jitter = np.exp(subject.normal(0, 1, (len(TISSUE_MR), 3)) * spread)
    jitter[anatomy.FEMORAL : anatomy.PATELLAR + 1] = jitter[anatomy.FEMORAL] ** 0.5  # cartilage is one tissue
    values = tissue_signals(sequence, jitter)
    if sequence.kind == "spin echo":
        values[anatomy.BLOOD] *= rng.uniform(0.05, 0.5)  # flow void
    codes = torch.from_numpy(tissue.astype(np.int64))
    water = torch.from_numpy(values[:, 0].astype(np.float32))[codes]
    fat = torch.from_numpy(values[:, 1].astype(np.float32))[codes]
    # In place where it can be: most of the time of these lines is that of asking for memory.
    grain = _smooth_field(rng, fine_shape, fine_mm, 2.5).mul_(0.75)
    grain.add_(_smooth_field(rng, fine_shape, fine_mm, 9.0).mul_(0.65))
    texture = torch.tensor([t.texture for t in TISSUE_MR])[codes]
    grain = texture.mul_(grain).add_(1).clamp_(min=0.2)

    def average(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool3d(x[None, None], sub)[0, 0]

    # Fat suppression fails smoothly towards the edge of the field of view.
    shape = scanner.shape
    residual = sequence.fat_residual * torch.exp(0.5 * _smooth_field(rng, shape, scanner.spacing_mm, 50.0))
    # Septa, vessels and oedema: the little water in fat and marrow is uneven, which fat suppression lays bare.
    fatty = torch.zeros(len(TISSUE_MR))
    fatty[[anatomy.FAT, anatomy.MARROW]] = 4.0
    water.mul_(grain).mul_(fatty[codes].mul_(grain - 1).exp_())
    image = average(water) + average(fat.mul_(grain)) * residual.clamp(max=1.0)
    image = _truncate_k_space(image, scanner.k_space)
    bright = float(torch.quantile(image.flatten()[::7], 0.97))

    axes = [torch.linspace(-1, 1, n) for n in shape]
    tilt = rng.normal(0, 0.5, 3)
    # A knee coil is most sensitive near its wall: brighter skin and muscle than joint.
    wall = 0.45 * (axes[1].reshape(1, -1, 1) ** 2 + axes[2].reshape(1, 1, -1) ** 2)
    bias = wall + sum(
        float(t) * a.reshape([-1 if i == j else 1 for j in range(3)])
        for i, (t, a) in enumerate(zip(tilt, axes, strict=True))
    )
    image = image * torch.exp(scanner.bias * (bias + 0.7 * _smooth_field(rng, shape, scanner.spacing_mm, 60.0)))
    noise = scanner.noise * bright * (rng.uniform(0.5, 1.8) if randomised else rng.uniform(0.8, 1.25))
    channels = torch.from_numpy(rng.standard_normal((2, *shape), dtype=np.float32)) * noise
    image = torch.sqrt((image + channels[0]) ** 2 + channels[1] ** 2) / bright

    # The class that fills most of the voxel.
    label = torch.from_numpy(LABEL_OF_TISSUE)[codes]
    share = torch.stack([average((label == c).float()) for c in (1, 2, 3)])
    best, which = share.max(dim=0)
    voted = torch.where(best > (1 - share.sum(dim=0)), which + 1, 0).to(torch.uint8)

    affine = np.diag([*scanner.spacing_mm, 1.0])
    middle = (np.asarray(shape) - 1) / 2 * np.asarray(scanner.spacing_mm)
    affine[:3, 3] = rng.normal(0, 20, 3).round(1) - middle
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"),
        nib.orientations.axcodes2ornt(tuple(scanner.orientation)),
    )
    affine = affine @ nib.orientations.inv_ornt_aff(turn, shape)
    return Scan(
        image=np.ascontiguousarray(nib.orientations.apply_orientation(image.numpy().astype(np.float32), turn)),
        label=np.ascontiguousarray(nib.orientations.apply_orientation(voted.numpy(), turn)),
        affine=affine,
        side=side,
        sequence=sequence,
    )


def scan(subject_seed: int, scanner: Scanner, scan_seed: int) -> Scan:
    """Draw a subject's knee and scan it: see :func:`anatomy.draw_knee` and :func:`scan_knee`."""
    made = scan_knee(draw_knee(subject_seed), scanner, scan_seed)
    if not scanner.recontrasted:
        return made
    rng = np.random.default_rng([0x52454354, subject_seed, scan_seed])
    return replace(made, image=recontrast(made.image, made.label, rng))
