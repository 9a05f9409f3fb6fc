"""Volumes as NiiVue (vendor/niivue) is given them: gzipped NIfTI files, coarse and rounded so that pages stay small."""

from __future__ import annotations

import gzip
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfusion.volume import Volume

VOXELS = 20_000_000  # more than these are shown at half resolution
LEVELS = 1000  # values that scan and map are rounded to
LARGE, FEW_LEVELS = 8_000_000, 250  # a scan of more voxels is rounded to fewer values


def display_factors(scan: Volume) -> tuple[int, int, int]:
    """Voxels joined along i, j, k for display: the finest axes are halved until few enough voxels are left."""
    factors = np.ones(3, dtype=int)
    while np.prod(-(-np.array(scan.shape) // factors)) > VOXELS:
        spacing = scan.spacing * factors
        factors[spacing < 1.5 * spacing.min()] *= 2
    i, j, k = factors.tolist()
    return i, j, k


def blocks(array: NDArray[Any], factors: tuple[int, int, int], join: Any) -> NDArray[Any]:
    """``join`` over blocks of that many voxels; the last block of an axis repeats its last voxel."""
    if max(factors) == 1:
        return array
    padded = np.pad(array, [(0, -n % f) for n, f in zip(array.shape, factors, strict=True)], mode="edge")
    split = [size for n, f in zip(padded.shape, factors, strict=True) for size in (n // f, f)]
    return np.asarray(join(padded.reshape(split), axis=(1, 3, 5)))


def block_affine(affine: NDArray[np.float64], factors: tuple[int, int, int]) -> NDArray[np.float64]:
    """Affine of the blocks: the centre of the first is in the middle of its voxels."""
    block = np.diag([*factors, 1.0])
    block[:3, 3] = (np.array(factors) - 1) / 2
    return affine @ block


def scan_nifti(array: NDArray[Any], affine: NDArray[np.float64]) -> bytes:
    """Clipped to the middle 99.98 % of its values."""
    low, high = (float(value) for value in np.percentile(array, (0.01, 99.99)))
    count, dtype = (FEW_LEVELS, np.uint8) if array.size > LARGE else (LEVELS, np.int16)
    step = (high - low) / count or 1.0
    levels = (np.clip(array, low, high).astype(np.float32) - low) / step
    return nifti(np.rint(levels).astype(dtype), affine, step, low)


def map_nifti(array: NDArray[Any], affine: NDArray[np.float64], least: float, peak: float) -> bytes:
    """Values farther than ``least`` from zero, up to ``peak``; the others are zero."""
    levels = np.where(np.abs(array) > least, array, 0) / (peak / LEVELS)
    return nifti(np.rint(levels).astype(np.int16), affine, peak / LEVELS)


def nifti(levels: NDArray[Any], affine: NDArray[np.float64], slope: float = 1.0, intercept: float = 0.0) -> bytes:
    """``slope`` * levels + ``intercept``."""
    import nibabel

    levels = levels.astype(np.uint8) if levels.dtype == np.bool_ else levels
    image = nibabel.Nifti1Image(levels, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(slope, intercept)
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
