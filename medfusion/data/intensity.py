"""Intensity: one affine map per scan, background to -1 and bright tissue to +1, the same in training and in use.

The map clips nothing, so it is exactly invertible. It is measured on a lightly smoothed copy, so that noise does not
move it, and inside the foreground, so that the share of air in the field of view does not either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.errors import MedfusionError

MASKED_OUT = 0.2  # of the voxels: so many with the lowest value are a mask (skull-stripped scans), not dark tissue
SEEN = (
    -2.0,
    4.0,
)  # the values a network is shown, in training and in use: vessels and fat may be brighter, not helpful


@dataclass(frozen=True)
class IntensityScale:
    """``low`` and ``high`` in the scan's units become -1 and +1."""

    low: float
    high: float

    def apply(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """Scan units to the prior's, float32."""
        factor = 2 / (self.high - self.low)
        return by_slice(lambda x: (x.astype(np.float64) - self.low) * factor - 1, array)

    def invert(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """The prior's units to the scan's, float32."""
        factor = (self.high - self.low) / 2
        return by_slice(lambda x: (x.astype(np.float64) + 1) * factor + self.low, array)


def by_slice(work: Callable[..., NDArray[Any]], *arrays: NDArray[Any]) -> NDArray[np.float32]:
    """``work``, voxel by voxel in float64, of arrays of one shape: whole volumes would need several copies."""
    out = np.empty(arrays[0].shape, np.float32)
    for k, slices in enumerate(zip(*arrays, strict=True)):
        out[k] = work(*slices)
    return out


def within(array: NDArray[Any], scan: NDArray[Any]) -> NDArray[np.float32]:
    """An array that was made of a scan, not below the scan's lowest value: what a mask left out of it stays out."""
    lowest = scan.min()
    outside = scan == lowest
    array = np.maximum(array, lowest, dtype=np.float32)
    if outside.mean() > MASKED_OUT:
        array[outside] = lowest
    return array


def foreground(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Voxels of tissue: Otsu's threshold on a 3x3x3 mean, outliers clipped. Empty for a constant image."""
    import SimpleITK as sitk

    smooth = _smoothed(array)
    low, high = np.percentile(smooth, (0.1, 99.5))
    if not high > low:
        return np.zeros(array.shape, dtype=bool)
    image = sitk.GetImageFromArray(np.clip(smooth, low, high, out=smooth))
    return sitk.GetArrayFromImage(sitk.OtsuThreshold(image, 0, 1, 256)).astype(bool)


def _smoothed(array: NDArray[Any]) -> NDArray[np.float32]:
    """Means over 3x3x3 voxels."""
    smooth = array.astype(np.float32)
    ndimage.uniform_filter(smooth, 3, output=smooth)
    return smooth


def measure_scale(array: NDArray[Any], percentile: float, name: str = "volume") -> IntensityScale:
    """The scale of one scan: median of the background, and ``percentile`` of the foreground.

    Raises
    ------
    MedfusionError : the scan is constant.
    """
    tissue = foreground(array)
    if not tissue.any() or tissue.all():
        raise MedfusionError(
            f"{name}: no tissue stands out from the background", range=f"{array.min()} to {array.max()}"
        )
    smooth = _smoothed(array)
    low, high = float(np.median(smooth[~tissue])), float(np.percentile(smooth[tissue], percentile))
    return IntensityScale(low, high)


def centre_of(tissue: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(3,) voxel index of the foreground's centroid: the origin of the prior's position channels."""
    return np.array(ndimage.center_of_mass(tissue))
