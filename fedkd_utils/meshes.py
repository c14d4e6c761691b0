"""From a label map to smooth surfaces in mm, and what is measured on them: distance to the truth and thickness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

Points = NDArray[np.float64]

#: No two sheets of cartilage touch over more than this; balls begin with it.
THICKEST_MM = 12.0

#: A little under one half: where a sheet leaves one slice and enters the next, both count. Moves a surface by 0.1 mm.
LEVEL = 0.45


@dataclass(frozen=True)
class Mesh:
    """A closed surface of triangles, in mm from the centre of the first voxel."""

    vertices: Points  # (V, 3)
    faces: NDArray[np.int32]  # (F, 3), seen from outside counter-clockwise
    normals: Points  # (V, 3), of length 1, outwards

    @property
    def volume_mm3(self) -> float:
        """What the surface encloses."""
        a, b, c = (self.vertices[self.faces[:, k]] for k in range(3))
        return float((np.cross(a, b) * c).sum() / 6)


def mesh_of(mask: NDArray[Any], spacing_mm: Sequence[float], step_mm: float | None = None, smoothing: int = 40) -> Mesh:
    """The surface of a mask (LR, AP, SI): brought to an even lattice, cut by marching cubes, smoothed.

    Masks of neighbouring slices are blended linearly and cut at :data:`LEVEL`. That bridges the gaps of a thin sheet
    that runs obliquely through thick slices, where shape interpolation by signed distance tears it to shreds. The
    terraces that remain are smoothed away by Taubin's filter (1995), which does not shrink.

    Args:
        step_mm: size of a triangle; by default the smallest voxel size, at least 0.8 and at most 1.5 mm.
        smoothing: rounds of the filter.

    Raises:
        ValueError: the mask is empty, so there is no surface.
    """
    mask = np.asarray(mask, dtype=bool)
    if not mask.any():
        raise ValueError("the mask is empty: there is no surface to draw.")
    spacing = np.asarray(spacing_mm, dtype=float)
    step = float(np.clip(spacing.min(), 0.8, 1.5)) if step_mm is None else step_mm
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    part = np.pad(mask[box], 2).astype(np.float32)
    extent = np.array(part.shape) * spacing
    counts = np.ceil(extent / step).astype(int)
    start = (extent - counts * step + step - spacing) / 2  # mm from the first voxel of the part
    axes = [(first + np.arange(n) * step) / s for first, n, s in zip(start, counts, spacing, strict=True)]
    even = ndimage.map_coordinates(part, np.meshgrid(*axes, indexing="ij"), order=1)
    vertices, faces, _, _ = marching_cubes(ndimage.gaussian_filter(even, 0.5), LEVEL, spacing=(step, step, step))
    vertices = vertices + start + (np.array([cut.start for cut in box]) - 2) * spacing
    vertices = _taubin(vertices, faces, smoothing)
    mesh = Mesh(vertices, faces.astype(np.int32), _normals(vertices, faces))
    if mesh.volume_mm3 < 0:
        faces = mesh.faces[:, ::-1]
        mesh = Mesh(vertices, faces, _normals(vertices, faces))
    return mesh


def _taubin(vertices: Points, faces: NDArray[Any], rounds: int, shrink: float = 0.5, grow: float = -0.53) -> Points:
    mean = _neighbours(len(vertices), faces)
    for _ in range(rounds):
        for share in (shrink, grow):
            vertices = vertices + share * (mean @ vertices - vertices)
    return vertices


def _neighbours(count: int, faces: NDArray[Any]) -> sparse.csr_array:
    """The matrix that takes the mean over the neighbours of every vertex."""
    pairs = np.concatenate([faces[:, [a, b]] for a, b in ((0, 1), (1, 2), (2, 0), (1, 0), (2, 1), (0, 2))])
    touch = sparse.csr_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    touch.data[:] = 1.0
    return sparse.csr_array(sparse.diags_array(1 / np.maximum(touch.sum(axis=1), 1)) @ touch)


def _normals(vertices: Points, faces: NDArray[Any]) -> Points:
    """Normals at the vertices: those of their triangles, weighted by area."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    across = np.cross(b - a, c - a)
    normals = np.zeros_like(vertices)
    for k in range(3):
        np.add.at(normals, faces[:, k], across)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


def _dense(mesh: Mesh) -> tuple[Points, Points]:
    """Vertices and middles of triangles, with their normals."""
    middles, between = (x[mesh.faces].mean(axis=1) for x in (mesh.vertices, mesh.normals))
    between /= np.maximum(np.linalg.norm(between, axis=1, keepdims=True), 1e-12)
    return np.concatenate([mesh.vertices, middles]), np.concatenate([mesh.normals, between])


def signed_distance_mm(mesh: Mesh, truth: Mesh) -> NDArray[np.float64]:
    """From every vertex to the true surface: positive outside it (drawn too far), negative inside.

    Measured to the tangent plane at the nearest point of a dense sample of the true surface.
    """
    points, normals = _dense(truth)
    _, nearest = cKDTree(points).query(mesh.vertices)
    return ((mesh.vertices - points[nearest]) * normals[nearest]).sum(axis=1)


def thickness_mm(mesh: Mesh) -> NDArray[np.float64]:
    """At every vertex, the diameter of the largest ball that touches the surface there and lies inside.

    On a slab or a spherical shell that is the thickness itself. Found by shrinking balls (Ma, Bae and Choi 2012).
    """
    points, _ = _dense(mesh)
    tree = cKDTree(points)
    radius = np.full(len(mesh.vertices), THICKEST_MM / 2)
    active = np.arange(len(mesh.vertices))
    for _ in range(30):
        p, n = mesh.vertices[active], mesh.normals[active]
        centre = p - radius[active, None] * n
        distance, nearest = tree.query(centre)
        smaller = distance < radius[active] - 1e-3
        active, p, n, q = active[smaller], p[smaller], n[smaller], points[nearest[smaller]]
        if not len(active):
            break
        apart = p - q
        radius[active] = (apart**2).sum(axis=1) / (2 * np.maximum((apart * n).sum(axis=1), 1e-9))
    return 2 * radius
