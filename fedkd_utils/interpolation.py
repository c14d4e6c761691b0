"""Trilinear interpolation, axis by axis and only where it is wanted: the numbers of PyTorch's own, in less time.

PyTorch's kernel for three axes reads eight nodes for every point. It weighs them axis by axis, the last axis first, so
three passes along one axis each give the same bits and read far less: all but the last pass are over few points.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

#: A part of a volume: a slice along each of three axes.
Box = tuple[slice, slice, slice]

WHOLE: Box = (slice(None), slice(None), slice(None))


def trilinear(fields: torch.Tensor, shape: tuple[int, int, int], box: Box = WHOLE) -> torch.Tensor:
    """Fields on the nodes of a coarse lattice, brought to a finer one whose corners are the same.

    Args:
        fields: (C, D, H, W) values at the nodes.
        shape: points of the finer lattice along the same axes.
        box: the part of them that is wanted.

    Returns:
        (C, d, h, w): the box, cut out of ``interpolate(fields[None], shape, mode="trilinear", align_corners=True)[0]``.
    """
    channels, depth, height, _ = fields.shape
    wanted = [len(range(points)[part]) for points, part in zip(shape, box, strict=True)]
    if 0 in wanted:
        return fields.new_zeros(channels, *wanted)
    x = interpolate(fields.flatten(0, 2)[None], shape[2], mode="linear", align_corners=True)[..., box[2]]
    width = wanted[2]  # an axis that keeps its length is not interpolated
    x = x.reshape(1, channels * depth, height, width)
    x = interpolate(x, (shape[1], width), mode="bilinear", align_corners=True)[:, :, box[1]]
    plane = wanted[1] * width
    x = x.reshape(1, channels, depth, plane)
    x = interpolate(x, (shape[0], plane), mode="bilinear", align_corners=True)[:, :, box[0]]
    return x.reshape(channels, *wanted)


def reach(nodes: NDArray[np.bool_], shape: tuple[int, int, int]) -> Box:
    """The box of all points of the finer lattice on which one of these nodes has an influence; it may be empty.

    Args:
        nodes: (D, H, W) mask on the coarse lattice.
        shape: points of the finer lattice.
    """
    box = []
    for axis, points in enumerate(shape):
        on = np.flatnonzero(nodes.any(tuple(other for other in range(3) if other != axis)))
        if len(on) == 0:
            return (slice(0, 0), slice(0, 0), slice(0, 0))
        place = np.linspace(0, nodes.shape[axis] - 1, points)  # in nodes; a little more for its rounding
        near = np.flatnonzero((place > on[0] - 1.001) & (place < on[-1] + 1.001))
        box.append(slice(int(near[0]), int(near[-1]) + 1) if len(near) else slice(0, 0))
    return (box[0], box[1], box[2])
