"""Grids: to the nearest RAS orientation, to the prior's spacing, and back onto the scan's own grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.volume import Volume

SPACING_TOLERANCE = (
    0.02  # a grid within 2 % of the prior's spacing is left alone: interpolation would cost more than it mends
)


def canonical(volume: Volume) -> Volume:
    """The same voxels with axes flipped and permuted to the nearest RAS orientation; nothing is interpolated."""
    flips = orientations.io_orientation(volume.affine)
    array = orientations.apply_orientation(volume.array, flips)
    affine = volume.affine @ orientations.inv_ornt_aff(flips, volume.shape)
    return replace(volume, array=np.ascontiguousarray(array), affine=affine)


def from_canonical(array: NDArray[Any], original: Volume) -> NDArray[Any]:
    """An array in the voxel order of ``canonical(original)`` back in the voxel order of ``original``, exactly."""
    flips = orientations.io_orientation(original.affine)
    back = orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), flips)
    return np.ascontiguousarray(orientations.apply_orientation(array, back))


def resampled(volume: Volume, spacing: float) -> Volume:
    """The volume at isotropic ``spacing`` mm along its own axes (no rotation), linear, low-passed where it shrinks."""
    factor = spacing / volume.spacing
    if np.all(abs(factor - 1) < SPACING_TOLERANCE):
        return volume
    shape = tuple(int(n) for n in np.maximum(1, np.round(np.array(volume.shape) / factor)))
    offset = (factor - 1) / 2  # the outer faces of the two grids coincide, not the centres of their first voxels
    # a voxel of the coarse grid averages `factor` fine ones: a Gaussian whose variance makes up the difference
    blur = np.sqrt(np.maximum(factor**2 - 1, 0) / 12)
    array = ndimage.gaussian_filter(volume.array.astype(np.float32), blur)
    array = ndimage.affine_transform(array, factor, offset, output_shape=shape, order=1, mode="nearest")
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_world(offset)
    affine[:3, :3] = volume.affine[:3, :3] * factor
    return replace(volume, array=array, affine=affine)


def onto_grid(volume: Volume, target: Volume) -> NDArray[np.float32]:
    """The values of ``volume`` at the voxel centres of ``target``, linear; outside its field of view the nearest."""
    matrix = np.linalg.inv(volume.affine) @ target.affine
    return ndimage.affine_transform(
        volume.array.astype(np.float32),
        matrix[:3, :3],
        matrix[:3, 3],
        output_shape=target.shape,
        order=1,
        mode="nearest",
    )


def nearest(labels: Volume, target: Volume) -> NDArray[Any]:
    """The values of a label map at the voxel centres of ``target``, the nearest one; 0 outside its field of view."""
    matrix = np.linalg.inv(labels.affine) @ target.affine
    return ndimage.affine_transform(
        labels.array, matrix[:3, :3], matrix[:3, 3], output_shape=target.shape, order=0, mode="constant"
    )
