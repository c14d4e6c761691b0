"""An analytic knee: one subject seed in, a map of tissues out, at any resolution.

Every structure is a smooth function of position in millimetres (a signed distance, a thickness or a level set). Smooth
functions may be sampled coarsely and interpolated: all of them are evaluated on a 2 mm lattice and brought to the fine
lattice by trilinear interpolation, where layers as thin as cartilage are cut out by comparing *distance to the bone*
with *thickness*. The error of that shortcut, h^2/8 times the curvature, is below 0.05 mm for the bones.

Frame of the anatomy (a right knee): x medial -> lateral, y posterior -> anterior, z inferior -> superior, in mm, with
the origin on the joint line. In the RAS frame of a file that is x to the right, y to the front, z up. A left knee is
the mirror image.

Sizes are calibrated against manual label maps: see ``calibration.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd_utils.interpolation import Box, reach, trilinear

Array = NDArray[np.float32]

#: Tissue codes of a tissue map. The three cartilages are one tissue to a scanner and three classes to a reader.
TISSUES = (
    "air",
    "fat",
    "muscle",
    "cortical bone",
    "marrow",
    "femoral cartilage",
    "tibial cartilage",
    "patellar cartilage",
    "meniscus",
    "ligament",
    "fluid",
    "blood",
    "skin",
)
(
    AIR,
    FAT,
    MUSCLE,
    CORTICAL,
    MARROW,
    FEMORAL,
    TIBIAL,
    PATELLAR,
    MENISCUS,
    LIGAMENT,
    FLUID,
    BLOOD,
    SKIN,
) = range(13)

#: Label value (0 background, 1 femoral, 2 tibial, 3 patellar cartilage) of every tissue code.
LABEL_OF_TISSUE = np.array([0, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0], dtype=np.uint8)

LATTICE_MM = 2.0


@dataclass(frozen=True)
class Knee:
    """The shape of one subject's knee. Lengths in mm, angles in degrees; drawn by :func:`draw_knee`."""

    subject_seed: int
    side: str  # "left" or "right"
    size: NDArray[np.float64]  # (3,) scale of the whole joint along x, y, z
    condyle: NDArray[np.float64]  # (10, 3) relative radii of the ten bodies of the femur
    notch_width: float  # relative width of the intercondylar notch
    groove: float  # mm, depth added to the trochlear groove
    flexion_deg: float
    tibial_rotation_deg: float
    varus_deg: float
    tibia: NDArray[np.float64]  # (2,) relative width and depth of the plateau
    patella: NDArray[np.float64]  # (3,) relative radii
    patella_shift_mm: NDArray[np.float64]  # (3,)
    thickness_mm: NDArray[np.float64]  # (3,) femoral, tibial, patellar cartilage where they are not thinned
    lesions: NDArray[np.float64]  # (n, 5) centre x, y, z (mm), radius (mm), depth (share of the thickness lost)
    effusion: float  # 0 dry .. 1 swollen
    girth: NDArray[np.float64]  # (2,) relative leg girth, muscle bulk
    meniscus: float  # relative height of the menisci


def draw_knee(subject_seed: int) -> Knee:
    """Draw the knee of one subject. The same seed gives the same knee, whatever else was drawn before."""
    rng = np.random.default_rng([0x4B4E4545, subject_seed])
    female = rng.random() < 0.5
    size = (0.955 if female else 1.03) * np.exp(rng.normal(0, 0.036) + rng.normal(0, 0.02, 3))
    arthritis = rng.beta(1.0, 2.5)  # most knees are healthy, some are worn
    thickness = (
        np.array([2.15, 3.0, 4.0]) * np.exp(rng.normal(0, 0.08) + rng.normal(0, 0.06, 3)) * (1 - 0.15 * arthritis)
    )
    n_lesions = rng.poisson(1.0 + 5.0 * arthritis)
    sites = np.array(
        [
            [-22, 6, 2],
            [-23, -8, 1],
            [22, 6, 2],
            [23, -10, 1],
            [0, 26, 30],
            [14, 30, 34],
            [-22, -28, 14],
            [3, 36, 40],
        ],
        dtype=float,
    )
    lesions = np.column_stack(
        [
            sites[rng.integers(len(sites), size=n_lesions)] + rng.normal(0, 5.0, (n_lesions, 3)),
            rng.uniform(4.0, 9.5, n_lesions),
            rng.uniform(0.3, 1.15, n_lesions),
        ]
    )
    return Knee(
        subject_seed=subject_seed,
        side="right" if rng.random() < 0.5 else "left",
        size=size,
        condyle=np.exp(rng.normal(0, 0.055, (10, 3))),
        notch_width=float(np.exp(rng.normal(0, 0.15))),
        groove=float(rng.uniform(-1.5, 3.0)),
        flexion_deg=float(rng.uniform(-4, 14)),
        tibial_rotation_deg=float(rng.normal(0, 4)),
        varus_deg=float(rng.normal(0, 2.5)),
        tibia=np.exp(rng.normal(0, 0.04, 2)),
        patella=np.exp(rng.normal(0, 0.07, 3)),
        patella_shift_mm=rng.normal(0, 1, 3) * np.array([2.0, 0.0, 4.0]),
        thickness_mm=thickness,
        lesions=lesions,
        effusion=float(rng.beta(1.2, 2.5)),
        girth=np.exp(rng.normal(0, [0.06, 0.12])),
        meniscus=float(np.exp(rng.normal(0, 0.12))),
    )


# --- signed distances -------------------------------------------------------------------------------------------------


def _ellipsoid(
    p: list[Array],
    centre: tuple[float, ...],
    radii: NDArray[np.float64] | tuple[float, ...],
) -> Array:
    """First-order signed distance (mm) to an ellipsoid, negative inside."""
    q = [(p[i] - np.float32(centre[i])) / np.float32(radii[i]) for i in range(3)]
    k0 = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2) + np.float32(1e-6)
    k1 = np.sqrt(sum((q[i] / np.float32(radii[i])) ** 2 for i in range(3))) + np.float32(1e-6)
    return np.asarray(k0 * (k0 - 1) / k1, dtype=np.float32)


def _capsule(
    p: list[Array],
    start: tuple[float, float, float],
    end: tuple[float, float, float],
    radius: float | tuple[float, float],
    squash: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Array:
    """Signed distance (mm) to a round cone from ``start`` to ``end``; ``squash`` > 1 flattens it along an axis."""
    r0, r1 = radius if isinstance(radius, tuple) else (radius, radius)
    axis = np.array(
        [(e - s) * f for s, e, f in zip(start, end, squash, strict=True)],
        dtype=np.float32,
    )
    q = [(p[i] - np.float32(start[i])) * np.float32(squash[i]) for i in range(3)]
    along = (q[0] * axis[0] + q[1] * axis[1] + q[2] * axis[2]) / np.float32(axis @ axis)
    along = np.clip(along, 0, 1)
    gap = np.sqrt(sum((q[i] - along * axis[i]) ** 2 for i in range(3)))
    return np.asarray(gap - (np.float32(r0) + np.float32(r1 - r0) * along), dtype=np.float32)


def _join(a: Array, b: Array, blend_mm: float) -> Array:
    """Smooth union (polynomial smooth minimum) of two signed distances."""
    h = np.maximum(blend_mm - np.abs(a - b), 0) / np.float32(blend_mm)
    return np.asarray(np.minimum(a, b) - h * h * np.float32(blend_mm / 4), dtype=np.float32)


def _cut(a: Array, b: Array, blend_mm: float) -> Array:
    """Smooth intersection of two signed distances."""
    return -_join(-a, -b, blend_mm)


def _rise(x: Array, low: float, high: float) -> Array:
    """Cubic step from 0 at ``low`` to 1 at ``high``."""
    t = np.clip((x - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def _femur(p: list[Array], knee: Knee) -> tuple[Array, Array]:
    """Signed distance to the femur, and to the notch that is carved out of it."""
    bodies: list[tuple[tuple[float, float, float], tuple[float, float, float]]] = [
        ((24, -11.5, 23.5), (13, 20, 20)),  # lateral condyle, posterior
        ((-24, -12.5, 23.5), (13, 20.5, 20.5)),  # medial condyle, posterior
        ((22, 2.5, 27), (15, 22, 23.5)),  # lateral condyle, distal
        ((-21.5, 1, 27), (15.5, 22.5, 23.8)),  # medial condyle, distal
        ((16, 10.5, 34), (14.5, 18, 20)),  # trochlea, lateral ridge (the higher one)
        ((-15, 8.5, 32), (14, 17, 18.5)),  # trochlea, medial ridge
        ((0, 4 - 0.8 * knee.groove, 36), (23, 17.5, 22)),  # between the ridges
        ((0, 0, 42), (31, 18, 20)),  # epicondyles
    ]
    d: Array | None = None
    for scale, (centre, radii) in zip(knee.condyle, bodies, strict=False):
        # Radii grow away from the joint surface: the distal and anterior faces stay where the tibia and patella are.
        r = np.asarray(radii) * scale
        e = _ellipsoid(p, (centre[0], centre[1], centre[2] + float(r[2] - radii[2])), r)
        d = e if d is None else _join(d, e, 5.0)
    assert d is not None
    d = _join(d, _capsule(p, (0, 0, 46), (0, 4, 80), (21, 13.5), (0.85, 1.1, 1.0)), 10.0)
    d = _join(d, _capsule(p, (0, 4, 76), (0, 8, 170), 13.5), 8.0)
    width = 9.0 * knee.notch_width
    notch = _join(
        _ellipsoid(p, (0, -23, 10), (width, 27, 19)),
        _ellipsoid(p, (0, -34, 18), (width + 1.5, 16, 18)),
        4.0,
    )
    return _cut(d, -notch, 4.0), notch


def _rotate(
    p: list[Array],
    pivot: tuple[float, float, float],
    angles_deg: tuple[float, float, float],
) -> list[Array]:
    """Coordinates seen from a bone that was turned about ``pivot`` by angles about x, y, z (degrees)."""
    ax, ay, az = np.deg2rad(angles_deg)
    rx = np.array([[1, 0, 0], [0, np.cos(ax), -np.sin(ax)], [0, np.sin(ax), np.cos(ax)]])
    ry = np.array([[np.cos(ay), 0, np.sin(ay)], [0, 1, 0], [-np.sin(ay), 0, np.cos(ay)]])
    rz = np.array([[np.cos(az), -np.sin(az), 0], [np.sin(az), np.cos(az), 0], [0, 0, 1]])
    m = (rz @ ry @ rx).astype(np.float32)
    q = [p[i] - np.float32(pivot[i]) for i in range(3)]
    return [m[i, 0] * q[0] + m[i, 1] * q[1] + m[i, 2] * q[2] + np.float32(pivot[i]) for i in range(3)]


def _fields(
    p: list[Array],
    spacing_mm: NDArray[np.float64],
    jacobian: NDArray[np.float64],
    knee: Knee,
) -> dict[str, Array]:
    """All smooth functions of the knee at the lattice points ``p`` (anatomical mm, already divided by the size)."""
    t_f, t_t, t_p = knee.thickness_mm
    f: dict[str, Array] = {}
    femur, notch = _femur(p, knee)

    # Normals and true distance: a smooth union is not an exact distance, dividing by its slope repairs that.
    slopes = np.gradient(femur, *[float(s) for s in spacing_mm])
    inverse = np.linalg.inv(jacobian)  # d(anatomical)/d(scan), inverted: chain rule for the gradient
    normal = [sum(np.float32(inverse[j, i]) * slopes[j] for j in range(3)) for i in range(3)]
    slope = np.sqrt(normal[0] ** 2 + normal[1] ** 2 + normal[2] ** 2) + np.float32(1e-3)
    femur = femur / np.clip(slope, 0.5, 2.0)
    side = np.abs(normal[0]) / slope

    worn = np.ones_like(femur)
    for cx, cy, cz, radius, depth in knee.lesions:
        r2 = (p[0] - np.float32(cx)) ** 2 + (p[1] - np.float32(cy)) ** 2 + (p[2] - np.float32(cz)) ** 2
        worn = worn * np.maximum(1 - np.float32(depth) * np.exp(-((r2 / np.float32(radius**2)) ** 2)), 0)

    # Femoral cartilage: below a line from the trochlea's top to the posterior condyles, off the notch and the sides.
    top = 38.0 + p[1] * 0.16 + p[0] * 0.06 - _rise(-p[1], 0, 30) * 0.5
    edge = np.minimum(np.minimum(top - p[2], notch - 0.6), (0.86 - side) * 16)
    f["femur"] = femur
    f["femoral_mm"] = np.float32(t_f) * np.sqrt(np.clip(edge / 4.5, 0, 1)) * worn * (1 + 0.12 * _rise(p[1], 5, 25))

    # The tibia: a plateau, cut to the femur's shape, on a shaft.
    gap = t_f + 1.1 * t_t + 0.1
    q = _rotate(p, (0, -5, 24), (-knee.flexion_deg, knee.varus_deg, knee.tibial_rotation_deg))
    width, depth = 37.0 * knee.tibia[0], 25.0 * knee.tibia[1]
    waist = 1 - 0.47 * _rise(-q[2], 5, 42)
    rho = np.sqrt((q[0] / (width * waist)) ** 2 + ((q[1] + 2 + 6 * (waist - 1)) / (depth * waist)) ** 2)
    plateau_side = (rho - 1) * np.float32(25) * waist
    eminence = 8.5 * np.exp(-((q[0] / 6.0) ** 2) - ((q[1] + 3) / 11) ** 2)
    plateau_top = q[2] + 0.2 - eminence - 0.07 * q[1] + 0.9 * _rise(q[0], 5, 15)
    tibia = _cut(plateau_side, plateau_top, 5.0)
    tibia = _join(tibia, _capsule(q, (2, 16, -34), (2, 14, -60), (9, 6)), 10.0)  # tuberosity
    tibia = _cut(tibia, -_ellipsoid(q, (0, -29, -4), (7, 8, 16)), 4.0)
    f["tibia"] = _cut(tibia, np.float32(gap) - femur, 1.5)
    medial = np.sqrt(((q[0] + 20.5) / 13.8) ** 2 + ((q[1] + 2) / 20.5) ** 2)
    lateral = np.sqrt(((q[0] - 20.5) / 14.3) ** 2 + ((q[1] + 3) / 16.8) ** 2)
    pad = np.minimum(medial, lateral)
    on_top = _rise(q[2], -9, -5)
    f["tibial_mm"] = np.float32(t_t) * np.sqrt(np.clip((1 - pad) * 3.0, 0, 1)) * on_top * worn
    f["tibial_mm"] *= np.where(lateral < medial, 1 + 0.25 * np.clip(1 - lateral**2, 0, 1), 1)

    # Menisci: the wedge that is left between the two cartilages towards the rim of either plateau.
    height = 6.0 * knee.meniscus
    ring = np.minimum(
        np.maximum(np.abs(medial - 0.95) - 0.27, _ellipsoid(q, (0, -3, 0), (11, 11, 30)) * -0.1) * 14,
        np.maximum(np.abs(lateral - 0.95) - 0.29, _ellipsoid(q, (0, -3, 0), (10, 8, 30)) * -0.1) * 14,
    )
    f["meniscus"] = np.maximum(ring, np.maximum(f["tibia"] - height, femur - 4.5 - 0.25 * height))
    fibula = _join(
        _ellipsoid(q, (31, -20, -22), (9, 9, 9)),
        _capsule(q, (33, -20, -24), (34, -20, -120), 6.5),
        4.0,
    )

    # The patella: an ellipsoid, cut to the trochlea; its cartilage lines the cut.
    a = float(0.9 * np.tan(np.deg2rad(max(knee.flexion_deg, 0.0)) / 2))
    shift = knee.patella_shift_mm
    centre = (3 + shift[0], 39.5, 37 + shift[2] - 12 * a)
    radii = np.array([21.5, 11.5, 19.5]) * knee.patella
    gap_p = t_f + 1.05 * t_p + 0.1
    whole = _ellipsoid(p, centre, radii)
    face = np.float32(gap_p) - femur  # zero on the cut, positive towards the trochlea
    f["small bones"] = np.minimum(_cut(whole, face, 2.0), fibula)
    footprint = ((p[0] - centre[0]) / (radii[0] * 0.93)) ** 2 + ((p[2] - centre[2] - 2.5) / (radii[2] * 0.8)) ** 2
    f["patellar_mm"] = np.float32(1.2 * t_p) * np.sqrt(np.clip((1.0 - footprint) * 1.5, 0, 1)) * worn
    f["patellar_mm"] *= np.clip((6.0 - whole) / 3, 0, 1) * (p[1] > 12)

    # Ligaments and tendons.
    low = centre[2] - radii[2] * 0.8
    high = centre[2] + radii[2] * 0.8
    q_in = _rotate(p, (0, -5, 24), (-0.5 * knee.flexion_deg, 0.0, 0.0))
    cords = [
        _capsule(q_in, (-2, -26, -10), (-5, -9, 12), 4.2),  # posterior cruciate, lower part
        _capsule(q_in, (-5, -9, 12), (-7, 0, 17), 4.2),  # and upper part
        _capsule(q_in, (-1, 8, 0), (7, -13, 21), 3.6, (1.2, 1, 1)),  # anterior cruciate
        _capsule(
            p,
            (centre[0], 43.5, low),
            (centre[0] - 2, 31 - 14 * a, -38),
            2.6,
            (0.22, 1.0, 1.0),
        ),  # patellar tendon
        _capsule(p, (centre[0], 45, high), (0, 38, high + 60), 3.4, (0.25, 1.0, 1.0)),  # quadriceps tendon
        _capsule(p, (-38, -2, 26), (-34, 2, -40), 1.6, (1.0, 0.2, 1.0)),  # medial collateral
        _capsule(p, (38, -5, 26), (35, -16, -20), 1.8, (1.0, 0.6, 1.0)),  # lateral collateral
        _capsule(p, (-20, -38, 20), (-22, -60, 95), 3.0),  # semitendinosus
    ]
    f["ligament"] = np.minimum.reduce(cords).astype(np.float32)

    # Fluid: a film around the cartilage, the pouch above the patella, recesses behind.
    swell = knee.effusion
    pouch = np.minimum.reduce(
        [
            _ellipsoid(
                p,
                (0, 33 - 4 * a, high + 2),
                (16 + 8 * swell, 1.0 + 5.5 * swell, 10 + 10 * swell),
            ),
            _ellipsoid(p, (-30, 12, 34), (4 + 5 * swell, 6 + 5 * swell, 9 + 8 * swell)),
            _ellipsoid(p, (31, 12, 36), (3 + 5 * swell, 5 + 5 * swell, 8 + 8 * swell)),
            _ellipsoid(q, (-12, -32, 4), (3 + 7 * swell, 1.5 + 3 * swell, 6 + 8 * swell)),
            _ellipsoid(q, (0, 12, 4), (5 + 8 * swell, 2 + 4 * swell, 2 + 2 * swell)),
        ]
    ).astype(np.float32)
    film = np.maximum(
        femur - (f["femoral_mm"] + 0.15 + 0.45 * swell),
        np.where(f["femoral_mm"] > 0.4, -1, 1),
    )
    f["fluid"] = np.minimum(pouch, film)

    # Muscles, vessels and the outline of the leg.
    b = knee.girth[1]
    muscles = [
        _capsule(p, (-28, 20, 46), (-34, 20, 150), (15 * b, 26 * b)),  # vastus medialis
        _capsule(p, (29, 22, 60), (34, 18, 150), (13 * b, 24 * b)),  # vastus lateralis
        _capsule(p, (0, 27, 84), (0, 30, 150), (7 * b, 18 * b)),  # vastus intermedius
        _capsule(p, (-27, -42, 22), (-20, -36, 150), (12 * b, 21 * b)),  # semimembranosus
        _capsule(p, (30, -37, 18), (22, -36, 150), (9 * b, 19 * b)),  # biceps femoris
        _capsule(q, (-19, -45, 30), (-20, -42, -110), (13 * b, 24 * b)),  # gastrocnemius, medial head
        _capsule(q, (19, -45, 28), (20, -42, -110), (13 * b, 23 * b)),  # gastrocnemius, lateral head
        _capsule(q, (-4, -27, -22), (6, -26, -110), (9 * b, 19 * b)),  # popliteus and soleus
        _capsule(q, (27, 8, -34), (27, 6, -110), (5 * b, 15 * b)),  # anterior compartment
    ]
    f["muscle"] = np.minimum.reduce(muscles).astype(np.float32)
    veins = np.random.default_rng([0x5645494E, knee.subject_seed])
    vessels = [_capsule(q_in, (2, -47, -60), (0, -45, 90), 3.2), _capsule(q_in, (-6, -53, -60), (-5, -52, 90), 3.6)]
    for turn in veins.uniform(0, 2 * np.pi, 4):  # veins under the skin
        x, y, drift = 47 * np.cos(turn), 3 + 47 * np.sin(turn), veins.normal(0, 12)
        vessels.append(_capsule(p, (x, y, -60), (x + drift, y + veins.normal(0, 6), 90), veins.uniform(1.0, 2.0)))
    f["blood"] = np.minimum.reduce(vessels).astype(np.float32)
    front = 41 + 21 * np.exp(-(((p[2] - centre[2]) / 30) ** 2)) + 0.16 * np.maximum(p[2] - 40, 0)
    back = 62 + 0.06 * np.maximum(p[2], 0) - 4 * np.exp(-((p[2] / 30) ** 2))
    g = knee.girth[0]
    across = (56 + 0.12 * np.maximum(p[2] - 20, 0)) * g
    ahead = np.where(p[1] > 0, front * (0.75 + 0.25 * g), back * g)
    f["leg"] = ((np.sqrt((p[0] / across) ** 2 + (p[1] / ahead) ** 2) - 1) * 55).astype(np.float32)
    f["face"] = face
    return f


@dataclass(frozen=True)
class Pose:
    """How a knee lies in a scanner: rotation (degrees about x, y, z) and the offset (mm) of the scan's centre."""

    angles_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    offset_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def rotations(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The rotations about x, y and z, (3, 3) each; the first is applied first."""
        ax, ay, az = np.deg2rad(self.angles_deg)
        rx = np.array([[1, 0, 0], [0, np.cos(ax), -np.sin(ax)], [0, np.sin(ax), np.cos(ax)]])
        ry = np.array([[np.cos(ay), 0, np.sin(ay)], [0, 1, 0], [-np.sin(ay), 0, np.cos(ay)]])
        rz = np.array([[np.cos(az), -np.sin(az), 0], [np.sin(az), np.cos(az), 0], [0, 0, 1]])
        return rx, ry, rz


#: The centre of a scan in the anatomical frame (mm): between the condyles, a little above the joint line.
SCAN_CENTRE_MM = (0.0, 5.0, 20.0)


def tissue_map(
    knee: Knee,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    pose: Pose | None = None,
) -> NDArray[np.uint8]:
    """Tissue codes (:data:`TISSUES`) of a knee on a lattice.

    Args:
        knee: the subject.
        shape: number of voxels along x (left to right), y (posterior to anterior), z (inferior to superior).
        spacing_mm: voxel size along the same axes.
        pose: how the knee lies in the lattice; straight and centred when not given.

    Returns:
        uint8 array of the given shape, in RAS order (a left knee has its lateral side at low x).
    """
    if min(shape) < 2 or min(spacing_mm) <= 0:
        raise ValueError(
            f"a lattice needs at least 2 voxels and a positive spacing along each axis, got {shape}, {spacing_mm}"
        )
    pose = pose or Pose()
    extent = [(n - 1) * s for n, s in zip(shape, spacing_mm, strict=True)]
    nodes = [max(int(np.ceil(e / LATTICE_MM)) + 1, 2) for e in extent]
    axes = [np.linspace(-e / 2, e / 2, n) for e, n in zip(extent, nodes, strict=True)]
    step = np.array([e / (n - 1) if n > 1 else 1.0 for e, n in zip(extent, nodes, strict=True)])
    grid = np.meshgrid(*[a.astype(np.float32) for a in axes], indexing="ij")

    rx, ry, rz = pose.rotations()
    mirror = np.diag([-1.0 if knee.side == "left" else 1.0, 1.0, 1.0])
    m = np.diag(1 / knee.size) @ mirror @ rz @ ry @ rx
    offset = np.diag(1 / knee.size) @ mirror @ np.asarray(pose.offset_mm)
    p = [
        (m[i, 0] * grid[0] + m[i, 1] * grid[1] + m[i, 2] * grid[2]).astype(np.float32)
        + np.float32(offset[i] + SCAN_CENTRE_MM[i])
        for i in range(3)
    ]
    p = _bend(p, knee)
    coarse = _fields(p, step, m, knee)
    return _classify(coarse, shape)


def _bend(p: list[Array], knee: Knee) -> list[Array]:
    """A smooth random deformation of the subject (a few long sine waves, about 1.3 mm), fixed to the anatomy."""
    rng = np.random.default_rng([0x42454E44, knee.subject_seed])
    out = [q.copy() for q in p]
    for _ in range(5):
        wave = rng.normal(0, 1, 3)
        wave *= 2 * np.pi / rng.uniform(45, 110) / np.linalg.norm(wave)
        phase = (p[0] * np.float32(wave[0]) + p[1] * np.float32(wave[1]) + p[2] * np.float32(wave[2])) + np.float32(
            rng.uniform(0, 2 * np.pi)
        )
        s = np.sin(phase)
        for i, amplitude in enumerate(rng.normal(0, 0.75, 3)):
            out[i] += np.float32(amplitude) * s
    return out


def _classify(f: dict[str, Array], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Tissue codes from the fields on the coarse lattice; later lines win over earlier ones.

    A field is brought to the fine lattice only where it can decide: between nodes that are all outside a structure, no
    point is inside.
    """

    def fine(names: tuple[str, ...], where: NDArray[np.bool_]) -> tuple[Box, list[Array]]:
        box = reach(where, shape)
        stack = torch.from_numpy(np.stack([f[name] for name in names]).astype(np.float32))
        return box, list(trilinear(stack, shape, box).numpy())

    leg = fine(("leg",), np.ones_like(f["leg"], dtype=bool))[1][0]
    tissue = np.full(leg.shape, AIR, dtype=np.uint8)
    tissue[leg < 0] = SKIN
    tissue[leg < -1.6] = FAT
    tissue[np.abs(leg + 6.0) < 0.5] = SKIN  # the fascia, a thin sheet in the fat
    box, (muscle,) = fine(("muscle",), f["muscle"] < 0)
    tissue[box][(muscle < 0) & (leg[box] < -5.0)] = MUSCLE
    for name, code in (("blood", BLOOD), ("fluid", FLUID), ("ligament", LIGAMENT), ("meniscus", MENISCUS)):
        box, (field,) = fine((name,), f[name] < 0)
        tissue[box][field < 0] = code
    tibia_box, (tibia, tibial_mm) = fine(("tibia", "tibial_mm"), (f["tibia"] < 0) | (f["tibial_mm"] > 0.34))
    tissue[tibia_box][(tibia < tibial_mm) & (tibial_mm > 0.35)] = TIBIAL
    box, (face, patellar_mm) = fine(("face", "patellar_mm"), f["patellar_mm"] > 0.34)
    tissue[box][(face > 0) & (face < patellar_mm) & (patellar_mm > 0.35)] = PATELLAR
    femur_box, (femur, femoral_mm) = fine(("femur", "femoral_mm"), (f["femur"] < 0) | (f["femoral_mm"] > 0.34))
    tissue[femur_box][(femur < femoral_mm) & (femoral_mm > 0.35)] = FEMORAL
    small_box, (small,) = fine(("small bones",), f["small bones"] < 0)
    bones = ((femur_box, femur, 0.9), (tibia_box, tibia, 0.9), (small_box, small, 1.0))
    for box, bone, shell_mm in bones:
        tissue[box][bone < 0] = CORTICAL
        tissue[box][bone < -shell_mm] = MARROW
    return tissue
