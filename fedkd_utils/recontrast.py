"""Another contrast for a labelled volume, without knowing its tissues: what a repository of images and labels can do.

The labelled cartilage is one class, the rest is clustered by intensity, and every class gets a new brightness at
random. It is the idea of SynthSeg (Billot et al., MedIA 2023, doi:10.1016/j.media.2023.102789), which learns from
nothing but label maps, applied to what lies between a few labels and a whole tissue map.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.cluster.vq import kmeans2

#: Clusters of the unlabelled rest: air, cortical bone, muscle, marrow, fat, fluid and what is mixed between them.
CLUSTERS = 6


def cluster_rest(
    image: NDArray[np.float32], label: NDArray[np.uint8], rng: np.random.Generator, clusters: int = CLUSTERS
) -> NDArray[np.uint8]:
    """Classes of a volume: 0 the labelled voxels, 1 to ``clusters`` the others from dark to bright.

    k-means on the square roots of smoothed intensities. Fewer clusters come back when there are fewer distinct ones.

    Args:
        image, label: (X, Y, Z).
    """
    smooth = np.sqrt(np.clip(ndimage.gaussian_filter(image.astype(np.float32), 1.0), 0, None))  # dark tissues count too
    rest = smooth[label == 0].astype(np.float64)
    low, high = np.quantile(rest, [0.02, 0.995])
    start = np.linspace(low, high, clusters)
    some = rng.choice(rest, min(len(rest), 20_000), replace=False)
    centres = np.unique(kmeans2(some, np.unique(start), minit="matrix")[0])
    edges = (centres[:-1] + centres[1:]) / 2
    classes = (np.searchsorted(edges, smooth) + 1).astype(np.uint8)
    classes[label > 0] = 0
    return classes


def recontrast(image: NDArray[np.float32], label: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    """The same knee in a contrast that no scanner has: a new brightness and texture for every class, blur and noise.

    Args:
        image: (X, Y, Z), magnitude, any scale.
        label: (X, Y, Z), 0 where nobody labelled.

    Returns:
        (X, Y, Z) float32, not negative, about 1 where it is bright.
    """
    classes = cluster_rest(image, label, rng)
    scale = float(np.quantile(image, 0.97)) or 1.0
    new = np.zeros(image.shape, np.float32)
    for k in np.unique(classes):
        inside = classes == k
        own = image[inside] / scale
        new[inside] = rng.uniform(0.0, 1.0) + rng.uniform(-1.0, 1.0) * (own - own.mean())
    new = ndimage.gaussian_filter(new, rng.uniform(0.2, 0.7))
    noise = rng.uniform(0.01, 0.06)
    channels = noise * rng.standard_normal((2, *image.shape), dtype=np.float32)
    return np.hypot(np.clip(new, 0, None) + channels[0], channels[1]).astype(np.float32)
