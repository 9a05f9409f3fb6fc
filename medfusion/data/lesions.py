"""Lesions implanted with exact truth: real lesion shapes put at random places of healthy heads, to measure detection.

    x' = x + s w (target - m)        "dark": target = g CSF, "bright": target = g (WM + (WM - CSF) / 4)
    x' = x + s w (pattern - mean)    "textured": pattern of standard deviation g (WM - CSF) / 4
    x' = x                           "unchanged"

w in [0, 1] is the share of each voxel that the lesion fills, s the strength, m the mean of x nearby. CSF and WM are
percentiles of the brain, g is how bright the coils make this part of it (1 on average), mean is that of the pattern
weighted by w. Only the local mean is moved: the scan's noise and fine detail stay, so that no implant is found by the
noise that it lacks. Made for MRI magnitudes, 0 and above, where CSF is dark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medfusion.errors import MedfusionError
from medfusion.volume import Volume

TRIES = 200  # places looked at before the best of them is taken
WANTED, LEAST = 0.9, 0.5  # share of a lesion that has to lie in the brain: at the first place taken, at the best
PROBES = 2000  # voxels of the shape, drawn at random, that measure this share
SOFTNESS = 0.7  # voxels; standard deviation of the Gaussian over the lesion's border: scans have no sharper edges
LOCAL = 2.0  # voxels; standard deviation of the local mean. It takes 2 % of the variance of white noise along
SHADING = 15.0  # mm; standard deviation of the mean that tells g: a lesion lit otherwise than its place looks glued on
CSF, WHITE = 2, 98  # percentiles of the brain, evenly lit
ABOVE = 0.25  # of the range from CSF to white matter, by which "bright" goes beyond white matter
TEXTURE = 0.25  # of this range; standard deviation of "textured"
GRAIN = 1.5  # voxels; standard deviation of the Gaussian that makes its pattern coarse


def place(shape: Volume, brain: Volume, rng: np.random.Generator) -> NDArray[np.float32]:
    """The share (i, j, k) in [0, 1] of each voxel of ``brain`` that a lesion fills at a random place; 0 outside it.

    The shape keeps its size in millimetres. It is mirrored left to right or not, turned about the vertical axis, and
    moved to a random place of the brain where 90 % of it lie inside; the best of ``TRIES`` places if there is none.
    Its voxels are averaged over those of the grid, blurred as a scan would, and cut to the brain.

    Parameters
    ----------
    shape : lesion > 0, on its own grid. ``brain`` : brain > 0, on the grid of the scan.

    Raises
    ------
    MedfusionError : the shape or the brain is empty; no place has half of the shape inside; no voxel is half filled.
    """
    for mask in (shape, brain):
        if not (mask.array > 0).any():
            raise MedfusionError(f"{mask.name}: the mask is empty", fix="leave it out")
    move = _find_place(shape, brain, rng)
    weights = _filled(shape, move, brain) * (brain.array > 0)
    if weights.max() < 0.5:
        raise MedfusionError(
            f"{shape.name}: the lesion is too small for the grid: no voxel is filled by half",
            lesion=f"{(shape.array > 0).sum() * shape.voxel_ml:.3g} ml",
            voxel=f"{brain.voxel_ml:.3g} ml",
        )
    return weights


def _find_place(shape: Volume, brain: Volume, rng: np.random.Generator) -> NDArray[np.float64]:
    """(4, 4) rigid motion, with or without a mirror, from the world of the shape to that of the brain."""
    points = shape.to_world(np.argwhere(shape.array > 0))
    centre, probes = points.mean(axis=0), rng.choice(points, PROBES)
    inside = (brain.array > 0).astype(np.uint8)
    goals = np.argwhere(inside)
    best, most = np.eye(4), 0.0
    for _ in range(TRIES):
        move = np.eye(4)
        turn = Rotation.from_euler("z", rng.uniform(0, 2 * np.pi)).as_matrix()
        move[:3, :3] = turn @ np.diag([rng.choice((-1, 1)), 1, 1])
        goal = brain.to_world(goals[rng.integers(len(goals))] + rng.uniform(-0.5, 0.5, 3))
        move[:3, 3] = goal - move[:3, :3] @ centre
        index = _transform(np.linalg.inv(brain.affine) @ move, probes)
        share = float(ndimage.map_coordinates(inside, index.T, order=0, mode="grid-constant").mean())
        if share > most:
            best, most = move, share
        if most >= WANTED:
            break
    if most < LEAST:
        raise MedfusionError(
            f"{shape.name}: the lesion does not fit into the brain of {brain.name}",
            lesion=f"{len(points) * shape.voxel_ml:.3g} ml",
            brain=f"{len(goals) * brain.voxel_ml:.3g} ml",
            inside=f"{most:.0%} at the best of {TRIES} places",
        )
    return best


def _filled(shape: Volume, move: NDArray[np.float64], brain: Volume) -> NDArray[np.float32]:
    """The share (i, j, k) of each voxel of ``brain`` that the moved shape fills, blurred."""
    to_grid = np.linalg.inv(brain.affine) @ move @ shape.affine
    index = _transform(to_grid, np.argwhere(shape.array > 0))
    margin = np.ceil(4 * SOFTNESS + np.abs(to_grid[:3, :3]).sum(axis=1) / 2)
    low = np.maximum(np.floor(index.min(axis=0)) - margin, 0).astype(int)
    high = np.minimum(np.ceil(index.max(axis=0)) + margin + 1, brain.shape).astype(int)
    # each voxel is the mean of n_i x n_j x n_k points in it, two or more for each voxel of the shape
    to_shape = np.linalg.inv(to_grid)
    n = np.ceil(2 * np.linalg.norm(to_shape[:3, :3], axis=0)).astype(int)
    size = high - low
    points = ndimage.affine_transform(
        (shape.array > 0).astype(np.float32),
        to_shape[:3, :3] / n,
        _transform(to_shape, low + (1 / n - 1) / 2),
        output_shape=tuple(size * n),
        order=0,
        mode="grid-constant",
    )
    share = points.reshape(size[0], n[0], size[1], n[1], size[2], n[2]).mean(axis=(1, 3, 5))
    weights = np.zeros(brain.shape, np.float32)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    weights[box] = ndimage.gaussian_filter(share, SOFTNESS, mode="constant").clip(0, 1)
    return weights


def _transform(matrix: NDArray[Any], points: NDArray[Any]) -> NDArray[np.float64]:
    """Points (..., 3) through a matrix (4, 4)."""
    return np.asarray(points @ matrix[:3, :3].T + matrix[:3, 3], np.float64)


def implant(
    volume: Volume,
    brain: NDArray[Any],
    weights: NDArray[np.float32],
    kind: str,
    strength: float,
    rng: np.random.Generator,
) -> tuple[Volume, NDArray[np.uint8]]:
    """The scan with a lesion, and its truth (i, j, k): 1 where the lesion fills half of a voxel or more.

    Nothing changes outside the brain or where ``weights`` are 0, and nothing becomes lower than the brain's lowest
    voxel: magnitudes are not negative.

    Parameters
    ----------
    brain : (i, j, k), above 0 in the brain. ``weights`` : (i, j, k) from ``place``. Both on the grid of ``volume``.
    kind : one of ``KINDS``. ``strength`` : 1 for the whole change, less for a part of it.

    Raises
    ------
    MedfusionError : the kind is unknown, the shapes differ, or no voxel of the brain has a weight.
    """
    if kind not in KINDS:
        raise MedfusionError(f"{kind}: no such kind of lesion", fix=f"choose one of {', '.join(KINDS)}")
    if not volume.shape == brain.shape == weights.shape:
        raise MedfusionError(
            f"{volume.name}: scan, brain and lesion lie on different grids",
            scan=volume.shape,
            brain=brain.shape,
            lesion=weights.shape,
        )
    brain = brain > 0
    weights = weights * brain
    if not weights.any():
        raise MedfusionError(f"{volume.name}: no lesion lies in the brain", fix="take the weights from place()")
    image = volume.array.astype(np.result_type(volume.array, np.float32))
    gain = _mean(image, brain, SHADING / volume.spacing) / image[brain].mean()
    low, high = (gain * level for level in np.percentile(image[brain] / gain[brain], (CSF, WHITE)))
    change = KINDS[kind](_mean(image, brain, LOCAL), low, high, weights, rng)
    filled = weights > 0
    lowest = image[brain].min()
    image[filled] = np.maximum(image[filled] + strength * (weights * change)[filled], lowest)
    return volume.with_array(image), (weights >= 0.5).astype(np.uint8)


def _mean(image: NDArray[Any], brain: NDArray[np.bool_], width: float | NDArray[Any]) -> NDArray[np.float64]:
    """(i, j, k) Gaussian mean, of standard deviation ``width`` voxels, over the brain alone; 0 outside the brain."""
    total = ndimage.gaussian_filter(np.where(brain, image, 0.0), width, mode="constant")
    share = ndimage.gaussian_filter(brain.astype(np.float64), width, mode="constant")
    return np.divide(total, share, out=np.zeros_like(total), where=brain)


def _texture(
    mean: NDArray[Any], low: NDArray[Any], high: NDArray[Any], weights: NDArray[Any], rng: np.random.Generator
) -> NDArray[Any]:
    """A coarse pattern of standard deviation ``TEXTURE`` (high - low) whose mean in the lesion is 0."""
    pattern = ndimage.gaussian_filter(rng.standard_normal(mean.shape), GRAIN, mode="wrap")
    # the sum of the squared Gaussian is 1 / ((4 pi)^(3/2) GRAIN^3)
    pattern *= TEXTURE * (high - low) * (4 * np.pi) ** 0.75 * GRAIN**1.5
    return pattern - np.average(pattern, weights=weights)


# What is added at strength 1 to a voxel that the lesion fills, from the local mean, the intensities of CSF and of white
# matter there, the weights, and a generator.
KINDS: dict[str, Callable[..., NDArray[Any]]] = {
    # an old infarct on T1: the local mean becomes that of CSF
    "dark": lambda mean, low, high, weights, rng: low - mean,
    # the local mean becomes brighter than white matter
    "bright": lambda mean, low, high, weights, rng: high + ABOVE * (high - low) - mean,
    # the mean in the lesion stays
    "textured": _texture,
    # a control that nothing can detect
    "unchanged": lambda mean, low, high, weights, rng: 0 * mean,
}
