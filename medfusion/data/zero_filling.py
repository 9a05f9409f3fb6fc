"""Zero-filled scans: a console enlarges a matrix by adding empty high frequencies, and neighbours share noise.

What was acquired is a smaller grid with the same content and white noise. ``scipy.signal.resample`` goes there and back
by cutting and adding frequencies; a scan whose high frequencies are empty loses nothing on the way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal

CLIFF = 1.6  # fall of the logarithm of the power: zero-filled heads have 1.8 to 5.3, cubic splines 1.3, others 0.7
LEAST, FULLEST = 0.4, 0.9  # of an axis: matrices are doubled at most, and few empty frequencies are not worth the way
SHORTEST = 48  # voxels along an axis whose spectrum says anything
SOFT = 2.0  # voxels: standard deviation of the window's border; it smears the spectrum by a twentieth of an axis


def acquired_shape(array: NDArray[np.generic], tissue: NDArray[np.bool_]) -> tuple[int, ...]:
    """Voxels along each axis without the frequencies that are empty; the array's own shape where none are.

    Only ``tissue`` is looked at: in air and at the rim of masks, magnitudes and masks fill the empty frequencies.
    """
    window = ndimage.gaussian_filter(ndimage.binary_erosion(tissue, iterations=3).astype(np.float32), SOFT)
    inside = window > 0.5
    if not inside.any():
        return array.shape
    window *= array.astype(np.float32) - np.float32(array[inside].mean(dtype=np.float64))
    return tuple(_acquired(window, axis) for axis in range(array.ndim))


def to_shape(array: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The array with frequencies cut off or added, float32; the first voxel stays where it is."""
    out = array.astype(np.float32)
    for axis, n in enumerate(shape):
        if n != out.shape[axis]:
            out = signal.resample(out, n, axis=axis)
    return out


def _acquired(seen: NDArray[np.float32], axis: int) -> int:
    """Twice the frequency at which the power falls off a cliff: far more steeply than just before it."""
    n = seen.shape[axis]
    if n < SHORTEST:
        return n
    slices = np.moveaxis(seen, axis, -1)
    power = np.sum([np.square(np.abs(np.fft.rfft(lines))).sum(axis=0) for lines in slices], axis=0)
    power = np.maximum(power, 1e-9 * power.max())
    w = n // 24  # of the smear, on either side
    level = ndimage.uniform_filter1d(np.log(power), w)
    places = np.arange(max(3 * w, int(LEAST * n / 2)), int(FULLEST * n / 2))
    slope = np.maximum(level[places - 3 * w] - level[places - w], 0)
    falls = level[places - w] - level[places + w] - 2 * slope
    if falls.max() < CLIFF:
        return n
    near = places[falls.argmax()]
    half = power[near - 3 * w : near - w].mean() / 2
    return 2 * int(near - w + np.argmax(power[near - w : near + w] < half))
