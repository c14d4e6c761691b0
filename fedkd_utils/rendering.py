"""Pictures of surfaces without a graphics card: triangles, depth and light in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkd_utils.meshes import Mesh

Picture = NDArray[np.float64]

#: Every pixel is the mean of this many, squared.
FINER = 2


@dataclass(frozen=True)
class Body:
    """A surface with its colour: one (3,), or one per vertex (V, 3); 0 to 1. Opacity below 1 is seen through."""

    mesh: Mesh
    colour: NDArray[np.float64]
    opacity: float = 1.0


def camera(azimuth_deg: float, elevation_deg: float) -> NDArray[np.float64]:
    """Rows: to the right, up and towards the eye, in the frame (right, front, top) of the patient.

    Azimuth 0 looks from the front, so that the patient's right is on the left; 90 from the patient's left.
    """
    a, e = np.deg2rad([azimuth_deg, elevation_deg])
    eye = np.array([-np.sin(a) * np.cos(e), np.cos(a) * np.cos(e), np.sin(e)])
    right = np.cross([0.0, 0.0, 1.0], eye)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(eye, right), eye])


def render(
    bodies: Sequence[Body], view: NDArray[np.float64], centre: NDArray[np.float64], half_mm: float, pixels: int = 320
) -> Picture:
    """A square picture (pixels, pixels, 3) on white, by parallel projection.

    Args:
        view: see :func:`camera`.
        centre: what lies in the middle, in mm.
        half_mm: from the middle to the edge.
    """
    side = pixels * FINER
    picture, depth = np.ones((side, side, 3)), np.full((side, side), -np.inf)
    for body in sorted(bodies, key=lambda b: -b.opacity):  # what is seen through comes last
        colour, own = _draw(body, view, centre, half_mm, side)
        front = own > depth
        picture[front] = body.opacity * colour[front] + (1 - body.opacity) * picture[front]
        if body.opacity == 1:
            depth[front] = own[front]
    return np.clip(picture.reshape(pixels, FINER, pixels, FINER, 3).mean(axis=(1, 3)), 0, 1)


def _draw(
    body: Body, view: NDArray[np.float64], centre: NDArray[np.float64], half_mm: float, side: int
) -> tuple[Picture, NDArray[np.float64]]:
    """One lit surface: colours, and depths towards the eye (-inf where it is not)."""
    mesh = body.mesh
    seen = (mesh.vertices - centre) @ view.T
    across = np.column_stack([(seen[:, 0] / half_mm + 1) * side / 2, (1 - seen[:, 1] / half_mm) * side / 2, seen[:, 2]])
    shade = np.concatenate([_lit(mesh.normals @ view.T, body.colour), across], axis=1)  # colour, x, y, depth
    corners = shade.astype(np.float32)[mesh.faces]  # (F, 3, 6)
    (ax, bx, cx), (ay, by, cy) = corners[:, :, 3].T, corners[:, :, 4].T
    corners = corners[(bx - ax) * (cy - ay) < (by - ay) * (cx - ax)]  # those that face the eye
    edges = np.linalg.norm(corners[:, :, 3:5] - corners[:, [1, 2, 0], 3:5], axis=2).max(axis=1)
    density = np.clip(np.ceil(edges * 1.2).astype(int), 1, 200)
    samples = [_spread(corners[density == n], n) for n in np.unique(density)]
    points = np.concatenate(samples)
    column, row = (np.floor(points[:, k]).astype(int) for k in (3, 4))
    held = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    points, place = points[held], row[held] * side + column[held]
    order = np.argsort(points[:, 5], kind="stable")  # the nearest is written last and stays
    picture, depth = np.ones((side * side, 3)), np.full(side * side, -np.inf)
    picture[place[order]], depth[place[order]] = points[order, :3], points[order, 5]
    return picture.reshape(side, side, 3), depth.reshape(side, side)


def _spread(corners: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Points spread evenly over triangles, n + 1 along an edge."""
    i, j = (index.ravel() for index in np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij"))
    i, j = i[i + j <= n], j[i + j <= n]
    weights = (np.column_stack([i, j, n - i - j]) / n).astype(np.float32)
    return np.einsum("sc,fcx->fsx", weights, corners).reshape(-1, corners.shape[2])


def _lit(normals: NDArray[np.float64], colour: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colours under a lamp at the upper left of the eye, with some light from everywhere and a gloss."""
    lamp = np.array([-0.4, 0.5, 0.77])
    diffuse = np.clip(normals @ lamp, 0, 1)
    gloss = np.clip(normals @ ((lamp + [0, 0, 1]) / np.linalg.norm(lamp + [0, 0, 1])), 0, 1) ** 30
    light = 0.45 + 0.62 * diffuse
    return np.clip(light[:, None] * colour + 0.18 * gloss[:, None], 0, 1)
