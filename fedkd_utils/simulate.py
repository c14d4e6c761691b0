"""Real anatomy, simulated images: label maps of bones and cartilages through the scanners of the course.

For people who hold labels without images. Bones and cartilages are where the map has them; what a map does not say is
filled in: skin, fat and muscle round the bones, menisci and fluid where two cartilages are near each other. There are
no ligaments, tendons or vessels, so a network sees real shapes of cartilage in a simplified surrounding.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedkd_utils import acquisition, anatomy, prepare, site_folder, sites, transforms
from fedkd_utils.acquisition import CLIENT_SCANNERS, SCANNERS, Scan, Scanner
from fedkd_utils.anatomy import Pose
from fedkd_utils.errors import VolumeError
from fedkd_utils.files import folder_in_one_step
from fedkd_utils.prepare import Entry
from fedkd_utils.settings import CARTILAGES
from fedkd_utils.site_folder import number_of

#: The values of a map, as the Queensland maps, OAI-ZIB and SKI10 have them -> tissue; 7 to 9 are lesions of bone.
TISSUE_OF_VALUE = {
    1: anatomy.MARROW,
    2: anatomy.FEMORAL,
    3: anatomy.MARROW,
    4: anatomy.TIBIAL,
    5: anatomy.MARROW,
    6: anatomy.PATELLAR,
    7: anatomy.MARROW,
    8: anatomy.MARROW,
    9: anatomy.MARROW,
}

#: Less bone than this, in ml, is not the femur and tibia of a knee: the map has other values. (Chosen.)
LEAST_BONE_ML = 30.0

#: Thicknesses of what surrounds the bones, in mm. (Chosen.)
SHELL_MM, SKIN_MM, FAT_MM, FRONT_MM, BEHIND_MM = 0.9, 1.6, 6.0, 9.0, 28.0

#: The radius of the ball that bridges patella and tibia, and how far fat reaches round the patella, in mm. (Chosen.)
BRIDGE_MM, PAD_MM = 40.0, 25.0

#: People that the repository (training, validation, test) and each client (and unlabelled) have at least.
LEAST_REPOSITORY, LEAST_CLIENT = 3, 4


def read_map(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A label map of bones and cartilages: its values (X, Y, Z) in the order of the file, and the affine to RAS mm.

    Raises:
        FileNotFoundError, VolumeError: see :func:`transforms.read_volume`; other values, no bone, no cartilage, or
            a knee upside down or back to front.
    """
    raw, affine = transforms.read_volume(path)
    if not np.isin(raw, (0, *TISSUE_OF_VALUE)).all():
        raise VolumeError(
            f"{path}: values other than 0 background, 1 femur, 2 femoral cartilage, 3 tibia, 4 tibial cartilage, "
            "5 patella, 6 patellar cartilage and 7 to 9 lesions of bone. Give them these numbers."
        )
    values = raw.astype(np.uint8)
    voxel_ml = float(np.prod(transforms.voxel_sizes_mm(affine))) / 1000
    if (bone := np.isin(values, (1, 3)).sum() * voxel_ml) < LEAST_BONE_ML:
        raise VolumeError(
            f"{path}: {bone:.0f} ml of femur and tibia (values 1 and 3): without bones nobody knows on which side of a "
            "cartilage the joint is. Use maps that hold them."
        )
    if not np.isin(values, (2, 4)).any():
        raise VolumeError(f"{path}: no femoral or tibial cartilage (values 2 and 4). Leave the file out.")
    femur, tibia, femoral, patellar = (transforms.middle_mm(values == value, affine) for value in (1, 3, 2, 6))
    if femur[2] < tibia[2] or patellar[1] < femoral[1]:
        raise VolumeError(
            f"{path}: the femur lies below the tibia, or patellar cartilage behind femoral: the header turns the knee, "
            "or the values are swapped. Repair one of them."
        )
    return values, affine


def tissue_of_map(
    values: NDArray[np.uint8],
    affine: NDArray[np.float64],
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    pose: Pose | None = None,
) -> NDArray[np.uint8]:
    """Tissue codes (``anatomy.TISSUES``) on a lattice round the cartilages of a label map.

    Args:
        values: (X, Y, Z) of :func:`read_map`.
        affine: (4, 4) voxel index to RAS mm.
        shape: of the lattice in RAS order.
        spacing_mm: of the lattice.
        pose: how the knee lies in it; straight and centred when not given.
    """
    pose = pose or Pose()
    rx, ry, rz = pose.rotations()
    cartilage = np.argwhere(np.isin(values, (2, 4, 6)))
    middle = nib.affines.apply_affine(affine, (cartilage.min(axis=0) + cartilage.max(axis=0)) / 2)
    turn = rz @ ry @ rx
    lattice = np.eye(4)  # lattice index -> RAS mm of the map
    lattice[:3, :3] = turn @ np.diag(spacing_mm)
    lattice[:3, 3] = middle + pose.offset_mm - lattice[:3, :3] @ ((np.array(shape) - 1) / 2)
    to_map = np.linalg.inv(affine) @ lattice
    solid, best, total = np.zeros(shape, np.uint8), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for code in sorted(set(TISSUE_OF_VALUE.values())):
        mask = np.isin(values, [value for value, tissue in TISSUE_OF_VALUE.items() if tissue == code])
        share = np.zeros(shape, np.float32)
        ndimage.affine_transform(
            mask.astype(np.float32), to_map[:3, :3], to_map[:3, 3], shape, share, order=1, mode="nearest"
        )  # the shafts go on beyond the map
        solid[share > best] = code
        best, total = np.maximum(best, share), total + share
    solid[total <= 0.5] = 0
    return _surround(solid, spacing_mm)


def _surround(solid: NDArray[np.uint8], spacing_mm: tuple[float, float, float]) -> NDArray[np.uint8]:
    """Bones and cartilages (MARROW, FEMORAL, TIBIAL, PATELLAR or 0) -> all tissues, (X, Y, Z) in RAS order."""

    def distance(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        """To the mask, in mm; far away when there is none."""
        if not mask.any():
            return np.full(mask.shape, 1e3, np.float32)
        return ndimage.distance_transform_edt(~mask, sampling=spacing_mm).astype(np.float32)

    bone = solid == anatomy.MARROW
    # A ball of this radius, rolled round the bones, touches the skin: it bridges patella and tibia.
    core = ndimage.distance_transform_edt(distance(solid > 0) < BRIDGE_MM, sampling=spacing_mm) >= BRIDGE_MM
    far = distance(core)
    # Less covers the bones in front than behind.
    y = np.arange(solid.shape[1])[None, :, None]
    front = np.where(core.any(axis=1), solid.shape[1] - 1 - np.argmax(core[:, ::-1], axis=1), 0)
    depth = (np.where(front > 0, front, np.median(front[front > 0]))[:, None, :] - y) * spacing_mm[1]
    cover = FRONT_MM + (BEHIND_MM - FRONT_MM) * np.clip(depth / 40, 0, 1)
    leg = ndimage.gaussian_filter(far - cover.astype(np.float32), [4 / step for step in spacing_mm])  # < 0 inside

    tissue = np.full(solid.shape, anatomy.AIR, np.uint8)
    tissue[leg < 0] = anatomy.SKIN
    tissue[leg < -SKIN_MM] = anatomy.FAT
    near = {code: distance(solid == code) for code in (anatomy.FEMORAL, anatomy.TIBIAL, anatomy.PATELLAR)}
    tissue[(leg < -SKIN_MM - FAT_MM) & (near[anatomy.PATELLAR] > PAD_MM)] = anatomy.MUSCLE
    between = near[anatomy.FEMORAL] + near[anatomy.TIBIAL]
    tissue[between < 8] = anatomy.MENISCUS
    tissue[np.minimum(between, near[anatomy.FEMORAL] + near[anatomy.PATELLAR]) < 2.5] = anatomy.FLUID
    tissue[solid > 0] = solid[solid > 0]
    tissue[bone & (distance(~bone) <= SHELL_MM)] = anatomy.CORTICAL
    return tissue


def scan_map(
    values: NDArray[np.uint8], affine: NDArray[np.float64], subject: int, scanner: Scanner, visit: int
) -> Scan:
    """Scan a label map: as :func:`acquisition.scan_knee` does a made knee, equal for equal arguments, bit for bit.

    Args:
        values: (X, Y, Z) of :func:`read_map`.
        affine: (4, 4) voxel index to RAS mm.
        subject: decides the properties of the tissues.
        visit: decides pose, coil and noise.
    """
    rng, sequence, pose = acquisition.begin_scan(subject, scanner, visit)
    tissue = tissue_of_map(values, affine, *acquisition.fine_lattice(scanner), pose)
    return acquisition.scan_tissue(tissue, scanner, subject, "unknown", sequence, rng)


def simulate_sites(
    folder: str | Path,
    out: str | Path,
    clients: int = 4,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Make a repository and clients with scanners of their own from a folder of label maps (:func:`read_map`).

    ``out`` gets one site a folder, in the Decathlon layout, for :func:`sites.open_sites`. Nobody is in two sites or two
    splits: 4 of 10 people are the repository's (DESS), the others are dealt to the clients. Of a client's people a
    quarter is for test, an eighth for validation, a third of the others is labelled. A class that a map does not have
    is not labelled there.

    Args:
        folder: NIfTI label maps; a file's name up to the first ``_`` is the person.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError, VolumeError: no such folder, a map that cannot be used or is there twice, or too few people.
        ValueError: no client.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Give the folder that holds the label maps.")
    maps: dict[str, list[Path]] = {}
    seen: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if site_folder.is_volume(path)):
        values, _ = read_map(path)  # all of them, before anything is made
        name = path.name.split(".nii")[0]
        for key in (name, hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()):
            if (other := seen.setdefault(key, path)) != path:
                raise VolumeError(f"{path}: the same map as {other.name}, or of the same name. Keep one of them.")
        maps.setdefault(name.split("_")[0], []).append(path)
    least = LEAST_REPOSITORY + LEAST_CLIENT * clients
    if clients < 1:
        raise ValueError(f"{clients} clients: ask for one at least.")
    if len(maps) < least:
        raise VolumeError(
            f"{folder}: maps of {len(maps)} people, but {clients} clients need {least}. Add maps, or ask for "
            "fewer clients."
        )
    people = sorted(maps)
    people = [people[i] for i in np.random.default_rng(seed).permutation(len(people))]
    taught = max(LEAST_REPOSITORY, min(len(people) * 4 // 10, len(people) - LEAST_CLIENT * clients))
    dealt = {sites.REPOSITORY: people[:taught]}
    dealt |= {f"client_{k + 1}": people[taught + k :: clients] for k in range(clients)}
    clinics = itertools.cycle(CLIENT_SCANNERS["heterogeneous"])
    with folder_in_one_step(out) as building:
        for site, own in dealt.items():
            teaches = site == sites.REPOSITORY
            scanner = SCANNERS["repository_dess" if teaches else next(clinics)]
            prepare.write_site(
                building / site,
                f"Real label maps through a simulated scanner: {scanner.title}",
                _scans(maps, _splits(own, teaches), scanner, progress),
            )


def _splits(people: Sequence[str], teaches: bool) -> dict[str, str]:
    """The split of every person of a site; the repository has no unlabelled ones."""
    test = max(len(people) // 4, 1)
    validation = max(len(people) // 8, 1)
    rest = len(people) - test - validation
    labelled = rest if teaches else max(rest // 3, 1)
    counts = {"test": test, "validation": validation, "training": labelled, "unlabelled": rest - labelled}
    return dict(zip(people, [split for split, count in counts.items() for _ in range(count)], strict=True))


def _scans(
    maps: Mapping[str, Sequence[Path]],
    splits: Mapping[str, str],
    scanner: Scanner,
    progress: Callable[[str], None] | None,
) -> Iterator[Entry]:
    for person, split in splits.items():
        for visit, path in enumerate(maps[person], start=1):
            if progress is not None:
                progress(path.name)
            values, affine = read_map(path)
            made = scan_map(values, affine, number_of(person), scanner, visit)
            name, label = path.name.split(".nii")[0], made.label
            classes = tuple(c for c in CARTILAGES if (values == 2 * c).any())
            yield Entry(name, split, person, made.image, None if split == "unlabelled" else label, made.affine, classes)
