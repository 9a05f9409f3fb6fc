"""What a denoiser took off: was it noise?

What a posterior mean takes off, r = (y - D) / sigma, has E r r^T = I - E dD/dy (``medfusion.diffusion.noise_level``).
So no filter of unit norm finds more variance in it than 1, at no frequency and at no place, and it goes together with a
filtered D only as far as D follows the noise. What goes beyond is structure, or noise that is not white or not
everywhere as strong.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from medfusion.diffusion import Residual

WIDTHS = (1.0, 2.0, 4.0)  # voxels: standard deviations of the Gaussian filters
BOUND = 4.5  # standard deviations of smoothed noise; of pure noise 2 voxels in 100 000 lie beyond at one of the widths
STRUCTURED = 1e-3  # of the tissue beyond the bound: more is not chance
WINDOW = 9  # voxels: edge of the boxes of the local variance
LOUD = 1.3  # of the noise's variance in such a box; of white noise the standard deviation there is 0.05
LOUD_SHARE = 0.02  # of the tissue
CUBE = 64  # voxels: edge of the pieces whose spectrum is taken
BANDS = 8  # of equal width, from frequency 0 to half a cycle a voxel
POWER = 1.2  # of the noise's, in a band
EDGES = 0.05  # correlation


@dataclass(frozen=True)
class Audit:
    """What was taken off, beside the noise that it should be.

    ``map`` (i, j, k), float32: what was taken off, smoothed at the width where it is most, in standard deviations of
    smoothed noise; its sign is kept. ``structured`` is the share of the tissue beyond BOUND, ``loud`` that whose local
    variance exceeds LOUD times the noise's, ``spectrum`` the power in BANDS of frequency over the noise's. ``edges``
    is the correlation of what was taken off with the curvature of what is left, less what noise makes of it: below
    zero, edges were taken off.
    """

    map: NDArray[np.float32]
    structured: float
    loud: float
    spectrum: tuple[float, ...]
    edges: float

    @property
    def warnings(self) -> list[str]:
        """What speaks against noise, in words; empty where nothing does."""
        lowest, highest = max(self.spectrum[: BANDS // 2]), max(self.spectrum[BANDS // 2 :])
        found = {
            f"structure in {self.structured:.2%} of the tissue": self.structured > STRUCTURED,
            f"more than the noise in {self.loud:.1%} of the tissue": self.loud > LOUD_SHARE,
            f"{lowest:.1f} times the noise at low frequencies": lowest > POWER,
            f"{highest:.1f} times the noise at high frequencies": highest > POWER,
            f"edges (correlation {self.edges:.2f})": abs(self.edges) > EDGES,
        }
        return [words for words, here in found.items() if here]


def audit_removed(removed: NDArray[np.float32], tissue: NDArray[np.bool_], edges: float) -> Audit:
    """Look at what was taken off, (i, j, k) in units of the noise, where ``tissue``; ``edges`` comes from elsewhere."""
    inside = tissue if tissue.any() else np.ones_like(tissue)
    loud = float((ndimage.uniform_filter(np.square(removed), WINDOW)[inside] > LOUD).mean())
    map_ = structure_map(removed)
    return Audit(
        map_,
        float((np.abs(map_[inside]) > BOUND).mean()),
        loud,
        spectrum(removed, inside),
        edges,
    )


def structure_map(removed: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest of ``removed`` smoothed by Gaussians of WIDTHS, in standard deviations of smoothed white noise."""
    largest = np.zeros_like(removed)
    for width in WIDTHS:
        smooth = ndimage.gaussian_filter(removed, width)
        smooth *= (2 * width * np.sqrt(np.pi)) ** 1.5  # over the norm of the filter (Gaussian in three dimensions)
        for most, now in zip(largest, smooth, strict=True):
            np.copyto(most, now, where=np.abs(now) > np.abs(most))
    return largest


def spectrum(removed: NDArray[np.float32], inside: NDArray[np.bool_]) -> tuple[float, ...]:
    """Mean power in BANDS of radial frequency, where ``inside``, in cubes; 1 for white noise of variance 1."""
    axes = [np.fft.fftfreq(CUBE)] * 2 + [np.fft.rfftfreq(CUBE)]
    radius = np.sqrt(sum(np.square(f) for f in np.meshgrid(*axes, indexing="ij", sparse=True)))
    band = np.minimum((radius * 2 * BANDS).astype(int), BANDS - 1).ravel()  # the corners go with the last
    total = np.zeros(BANDS)
    for corner in product(*(range(0, n, CUBE) for n in removed.shape)):
        place = tuple(slice(begin, begin + CUBE) for begin in corner)
        if inside[place].any():
            part = np.fft.rfftn(removed[place] * inside[place], (CUBE,) * 3, axes=(0, 1, 2))
            total += np.bincount(band, np.square(np.abs(part)).ravel(), minlength=BANDS)
    return tuple((total / (np.bincount(band, minlength=BANDS) * inside.sum())).tolist())


def edge_correlation(found: Residual, inside: Tensor) -> float:
    """Correlation of r with the Laplacian L D of the posterior mean where ``inside``, less that which noise makes.

    Noise alone gives E r_i (L D)_i = sigma (L dD/dy)_ii, which the random signs estimate: the error of a posterior
    mean goes together with nothing that is made of the image.
    """
    curvature, response = _laplacian(found.x0), _laplacian(found.response)
    excess = (found.removed * curvature - found.ratio * found.signs * response)[inside].mean()
    return float(excess / (found.removed[inside].std() * curvature[inside].std()).clamp(min=1e-12))


def _laplacian(x: Tensor) -> Tensor:
    kernel = torch.zeros(1, 1, 3, 3, 3).to(x)
    kernel[0, 0, 1, 1] = kernel[0, 0, 1, :, 1] = kernel[0, 0, :, 1, 1] = torch.tensor([1.0, 0.0, 1.0]).to(x)
    kernel[0, 0, 1, 1, 1] = -6
    return F.conv3d(F.pad(x, [1] * 6, mode="replicate"), kernel)
