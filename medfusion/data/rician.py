"""Magnitude MRI: |a + noise| in the two channels of the receiver has Rice's distribution, not a Gaussian one.

    m = ((a + s n_1)^2 + (s n_2)^2)^(1/2)

In air it has the mean 1.25 s and the standard deviation 0.66 s. ``stabilise`` turns magnitudes into values with
Gaussian noise of standard deviation s about a value that ``unbias`` knows how to turn back into a (Foi 2011).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.integrate import cumulative_trapezoid

from medfusion.data.intensity import by_slice

FLOOR = float(np.sqrt(np.pi / 2))  # mean magnitude of pure noise
BRIGHT = 12.0  # above this the distribution is Gaussian to 3e-4 and the tables end


def rice_mean(a: NDArray[Any]) -> NDArray[np.float64]:
    """E m for true amplitudes a >= 0, both in units of s: (pi/2)^(1/2) L_{1/2}(-a^2 / 2)."""
    h = np.square(np.asarray(a, np.float64)) / 4
    return FLOOR * ((1 + 2 * h) * special.ive(0, h) + 2 * h * special.ive(1, h))


def rice_std(a: NDArray[Any]) -> NDArray[np.float64]:
    """Standard deviation of m: E m^2 = a^2 + 2."""
    return np.sqrt(np.square(np.asarray(a, np.float64)) + 2 - rice_mean(a) ** 2)


@cache
def _tables() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Magnitudes m with their stabilised values f(m), and amplitudes a with E f(m | a).

    f has the slope 1 / std(m) where the mean magnitude is m, which makes the noise of f(m) one to first order
    (Foi 2011, section 2), and equals m - 1 / (2 m) for bright ones, the mean magnitude less its bias.
    """
    amplitudes = np.linspace(0, BRIGHT, 481)
    means, stds = rice_mean(amplitudes), rice_std(amplitudes)
    magnitudes = np.linspace(0, 2 * BRIGHT, 2401)
    slope = 1 / np.interp(magnitudes, means, stds)  # below the floor that of air, above the table that of its end
    values = cumulative_trapezoid(slope, magnitudes, initial=0)
    bright = magnitudes.searchsorted(BRIGHT)
    values += BRIGHT - 1 / (2 * BRIGHT) - values[bright]
    # E f(m | a) over the density m exp(-(m - a)^2 / 2) I0e(m a), on a grid of the magnitudes that have weight
    expected = np.empty_like(amplitudes)
    for k, a in enumerate(amplitudes):
        near = np.abs(magnitudes - a) < 8
        m = magnitudes[near]
        density = m * np.exp(-((m - a) ** 2) / 2) * special.ive(0, m * a)
        expected[k] = np.trapezoid(density * values[near], m) / np.trapezoid(density, m)
    return magnitudes, values, amplitudes, expected


def stabilise(array: NDArray[Any], sigma: float | NDArray[Any]) -> NDArray[np.float32]:
    """Magnitudes to values whose noise has the standard deviation ``sigma`` everywhere, in the same units."""
    magnitudes, values, _, _ = _tables()

    def work(x: NDArray[Any], s: NDArray[Any]) -> NDArray[np.float64]:
        m = np.asarray(x, np.float64) / s
        bright = m - 1 / (2 * np.maximum(m, BRIGHT))
        return s * np.where(m < BRIGHT, np.interp(m, magnitudes, values), bright)

    return by_slice(work, array, np.broadcast_to(sigma, array.shape))


def unbias(array: NDArray[Any], sigma: float | NDArray[Any]) -> NDArray[np.float32]:
    """The amplitudes whose stabilised magnitudes have these means: the exact unbiased inverse of ``stabilise``."""
    _, _, amplitudes, expected = _tables()
    top = expected[-1]

    def work(x: NDArray[Any], s: NDArray[Any]) -> NDArray[np.float64]:
        mean = np.asarray(x, np.float64) / s
        return s * np.where(mean < top, np.interp(mean, expected, amplitudes), mean + BRIGHT - top)

    return by_slice(work, array, np.broadcast_to(sigma, array.shape))
