"""Other contrasts than the scans have: random intensity curves, and label maps painted with random intensities.

A denoiser trained on one contrast takes what it has not seen for noise. Shown T1-weighted scans through random curves
(dark and bright change places, as from T1 to T2) and with regions painted anew, it learns what contrasts share: edges,
textures, smooth regions. Painting follows SynthSeg (Billot et al. 2023), with the scan's own detail put back on top.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

KNOTS = 5  # of a curve, evenly spaced from air to bright tissue
STEEPEST = 2.5  # a curve magnifies the scan's own noise by no more; noise in the target teaches to keep noise
AIR_SHARE = 0.9  # of the curves leave air black, as scanners do
REGION_SPREAD = 0.08  # standard deviation of a region's intensity about the curve, of the range from -1 to +1
DETAIL = (-1.0, 1.0)  # the scan's detail in a region is put back times a factor from this range


def random_curve(rng: np.random.Generator) -> NDArray[np.float32]:
    """(KNOTS,) values in [-1, 1] at evenly spaced intensities from -1 to 1; one of them is -1 and one +1."""
    steepest = STEEPEST * 2 / (KNOTS - 1)
    while True:
        values = rng.uniform(-1, 1, KNOTS)
        if rng.random() < AIR_SHARE:
            values[0] = min(values)
        values = 2 * (values - values.min()) / np.ptp(values) - 1
        if np.abs(np.diff(values)).max() <= steepest:
            return values.astype(np.float32)


def remap(image: Tensor, curve: NDArray[np.float32]) -> Tensor:
    """``image`` through the curve: linear between the knots, with slope 1/2 beyond them."""
    knots = torch.from_numpy(curve).to(image)
    place = (image.clamp(-1, 1) + 1) * ((KNOTS - 1) / 2)
    index = place.long().clamp(0, KNOTS - 2)  # of nan too: the loss shall say that the scan has one
    values = torch.lerp(knots[index], knots[index + 1], place - index)
    return values + (image - image.clamp(-1, 1)) / 2


def paint(image: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
    """``image`` (d, h, w) with another contrast, region by region of ``labels`` (d, h, w); label 0 is only remapped.

    Each region's mean goes through one random curve and moves a little more on its own; the detail about the mean
    comes back times a random factor. A 3x3x3 binomial filter, at random strength, softens the edges of the regions.
    """
    curve = random_curve(rng)
    remapped = remap(image, curve)
    if not labels.any():
        return remapped
    regions, index = labels.long().flatten().unique(return_inverse=True)
    count = torch.bincount(index).to(image)
    mean = torch.bincount(index, weights=image.flatten()) / count
    painted = remap(mean, curve) + torch.from_numpy(rng.normal(0, REGION_SPREAD, len(regions))).to(image)
    detail = image - mean[index].view_as(image)
    result = torch.where(labels == 0, remapped, painted[index].view_as(image) + rng.uniform(*DETAIL) * detail)
    return torch.lerp(result, _binomial(result), float(rng.random()))


def _binomial(image: Tensor) -> Tensor:
    """Weights 1/4, 1/2, 1/4 along each axis."""
    kernel = torch.tensor([0.25, 0.5, 0.25]).to(image)
    padded = F.pad(image[None, None], [1] * 6, mode="replicate")
    return F.conv3d(padded, torch.einsum("i,j,k->ijk", kernel, kernel, kernel)[None, None])[0, 0]
