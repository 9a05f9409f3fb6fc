"""Simplex noise: smooth random fields that take the place of white noise in diffusion for anomaly detection.

White noise leaves the coarse content of a scan, and with it large lesions, in place. Wyatt et al. 2022 (AnoDDPM) noise
scans with several octaves of simplex noise (Perlin 2001) instead: random gradients at the nodes of a lattice of
tetrahedra, each fading out with the distance r, in lattice units, from its node:

    n(x) = sum over nodes p of max(0, 1/2 - r^2)^4  g_p . (x - p),   r = |x - p|

The lattice is body-centred cubic. A shear along (1, 1, 1) makes cubes of it, so that the tetrahedron around a point is
found by rounding down and sorting three numbers (Gustavson 2005).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.spatial.transform import Rotation

PERIOD = 64  # nodes along an axis of the sheared lattice after which its gradients repeat
SHEAR = np.eye(3) + 1 / 3  # world to cubes; its inverse is I - 1/6
# Standard deviation of n(x) for gradients of three standard normals: there are 2 nodes in a unit of volume, so that
# the variance is 2 x the integral of r^2 (1/2 - r^2)^8 over the ball where it is positive.
SPREAD = float(np.sqrt(4 * np.pi * special.beta(2.5, 9) * 2**-10.5))


def _corners() -> NDArray[np.int64]:
    """(4, 8, 3) corners of the tetrahedron for each outcome of (x >= y, x >= z, y >= z) read as a binary number."""
    xy, xz, yz = np.arange(8) >> 2, np.arange(8) >> 1 & 1, np.arange(8) & 1
    rank = np.stack([xy + xz, 1 - xy + yz, 2 - xz - yz], axis=1)
    return np.stack([rank >= least for least in (3, 2, 1, 0)]).astype(np.int64)


CORNERS = _corners()


def simplex_noise(
    shape: tuple[int, int, int],
    rng: np.random.Generator,
    *,
    frequency: float = 1 / 64,
    octaves: int = 6,
    persistence: float = 0.8,
) -> NDArray[np.float32]:
    """A random field (i, j, k) with mean 0 and standard deviation 1 at every voxel, over draws.

    The mean and the standard deviation of one draw differ from 0 and 1, the more the fewer lattice cells it holds.
    Octaves are turned and shifted at random, so that no direction and no voxel is special; defaults are AnoDDPM's.

    Parameters
    ----------
    frequency : lattice cells a voxel in the first octave; each further octave doubles it.
    persistence : amplitude of an octave relative to the one before.
    """
    amplitudes = persistence ** np.arange(octaves)
    amplitudes /= SPREAD * np.sqrt((amplitudes**2).sum())
    noise = np.zeros(shape, np.float32)
    for octave, amplitude in enumerate(amplitudes):
        matrix = SHEAR @ Rotation.from_quat(rng.standard_normal(4)).as_matrix() * (frequency * 2**octave)
        offset = rng.uniform(0, PERIOD, 3)
        gradients = rng.standard_normal((3, PERIOD, PERIOD, PERIOD), np.float32) * np.float32(amplitude)
        nodes = np.pad(gradients, ((0, 0), (0, 1), (0, 1), (0, 1)), mode="wrap").reshape(3, -1)
        j, k = np.ogrid[: shape[1], : shape[2]]
        for i, out in enumerate(noise):  # slice by slice: what is computed stays in the cache
            place = [a * i + b * j + c * k + shift for (a, b, c), shift in zip(matrix, offset, strict=True)]
            out += _field(place, nodes)
    return noise


def _field(place: list[NDArray[np.float64]], gradients: NDArray[np.float32]) -> NDArray[np.float32]:
    """n(x) at sheared coordinates, three arrays of one shape, for gradients (3, (PERIOD + 1)^3) whose ends repeat."""
    cells = [np.floor(p) for p in place]
    x, y, z = ((p - cell).astype(np.float32) for p, cell in zip(place, cells, strict=True))
    first = np.ravel_multi_index([cell.astype(int) % PERIOD for cell in cells], (PERIOD + 1,) * 3)
    code = (x >= y) * np.int8(4) + (x >= z) * np.int8(2) + (y >= z)
    unsheared = [d - (x + y + z) / 6 for d in (x, y, z)]
    total: NDArray[np.float32] = np.zeros_like(x)
    for corner in CORNERS:
        node = first + np.ravel_multi_index(corner.T, (PERIOD + 1,) * 3)[code]
        shift = (corner - corner.sum(axis=1, keepdims=True) / 6).astype(np.float32)
        dx, dy, dz = (d - s[code] for d, s in zip(unsheared, shift.T, strict=True))
        fade = np.square(np.maximum(0.5 - dx * dx - dy * dy - dz * dz, 0))
        gx, gy, gz = (g[node] for g in gradients)
        total += fade * fade * (gx * dx + gy * dy + gz * dz)
    return total
