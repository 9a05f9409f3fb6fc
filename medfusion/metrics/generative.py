"""How far generated volumes are from real ones, as distributions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PATCH = 5  # voxels along an edge
PATCHES = 64  # drawn from every volume and level
PROJECTIONS = 256


def patch_distance(
    real: NDArray[np.float32], generated: NDArray[np.float32], *, levels: int = 3, seed: int = 0
) -> NDArray[np.float64]:
    """Sliced Wasserstein distance between the patches of two sets of volumes, for each level of a Laplacian pyramid.

    After Karras et al. 2018 (Progressive growing of GANs, section 5), in three dimensions. Patches of 5^3 voxels are
    projected on random directions; the distance between the two distributions on a line is the mean difference of
    sorted values (W1). It is in standard deviations of the real level, so that fine texture and coarse shape count
    alike; even two sets of real volumes differ by more than 0, the less the more there are.

    Parameters
    ----------
    real, generated : (n, d, h, w), with edges divisible by 2^(levels - 1) and at least 5 voxels left at the last level.

    Returns
    -------
    (levels,) : finest level first; the last one is the low-pass image.
    """
    if real.shape != generated.shape or real.ndim != 4:
        raise ValueError(f"needs two sets (n, d, h, w) of one shape, got {real.shape} and {generated.shape}")
    distances = []
    for ours, theirs in zip(_pyramid(real, levels), _pyramid(generated, levels), strict=True):
        rng = np.random.default_rng(seed)
        directions = rng.standard_normal((PATCH**3, PROJECTIONS)).astype(np.float32)
        directions /= np.linalg.norm(directions, axis=0)
        corners = rng.integers(np.array(ours.shape[1:]) - PATCH + 1, size=(len(ours), PATCHES, 3))
        a, b = (np.sort(_patches(level, corners) @ directions, axis=0) for level in (ours, theirs))
        distances.append(np.abs(a - b).mean() / ours.std())
    return np.array(distances)


def _pyramid(volumes: NDArray[np.float32], levels: int) -> list[NDArray[np.float32]]:
    """Differences between each resolution and the next coarser one, and the coarsest."""
    bands = []
    for _ in range(levels - 1):
        n, d, h, w = volumes.shape
        coarse = volumes.reshape(n, d // 2, 2, h // 2, 2, w // 2, 2).mean(axis=(2, 4, 6))
        bands.append(volumes - coarse.repeat(2, axis=1).repeat(2, axis=2).repeat(2, axis=3))
        volumes = coarse
    return [*bands, volumes]


def _patches(volumes: NDArray[np.float32], corners: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n x PATCHES, PATCH^3) from corners (n, PATCHES, 3)."""
    windows = np.lib.stride_tricks.sliding_window_view(volumes, (PATCH,) * 3, axis=(1, 2, 3))
    which = np.arange(len(volumes))[:, None]
    return windows[which, corners[..., 0], corners[..., 1], corners[..., 2]].reshape(-1, PATCH**3)
