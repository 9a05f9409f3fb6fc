"""The noise of a scan: how strong it is and where, of what kind, and whether neighbours share it.

The level is the one at which the prior's own residual is consistent (``medfusion.diffusion.noise_level``), in blocks of
tissue, where the prior sees the least structure. Filters read the cortex as noise: on IXI heads with 5 % of noise they
say 6 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from medfusion.data.intensity import SEEN, IntensityScale, foreground
from medfusion.data.noise import estimate_noise
from medfusion.diffusion import Residual, noise_ratio, residual
from medfusion.prior import Prior
from medfusion.tasks.audit import edge_correlation

Kind = Literal["gaussian", "rician"]

EDGE = 32  # voxels along a block
BLOCKS, MANY = 6, 27  # for one level, and for a map of levels
FULL = 0.7  # of the tissue that the fullest block has, at least, has every block
BORDER = 4  # voxels of a block at which the network misses what lies beyond
FLAT_SHARE = 0.3  # of a block's tissue counts, where the clean image is flattest
COARSE = 4  # voxels: blocks and air are looked for on every fourth voxel
AIR_SHARE = 0.05  # of the voxels: with less air, nothing says that the noise is Rician
RAYLEIGH = (0.7585, 1.1774, 1.6651)  # quartiles of the magnitude of complex noise with s = 1 in each channel
NEGLIGIBLE = 0.01  # noise ratio, half a percent of the way from air to bright tissue: a prior takes 3 % of it off
UNEVEN = 0.065  # between blocks, as a logarithm: even noise has 0.01 to 0.05, noise that triples along a head 0.09
STEP = 1.3  # between the levels at which a map looks
REACH = 2.0  # times the one level, up and down, to which a map goes


@dataclass(frozen=True)
class Noise:
    """``sigma`` in the scan's units, of each of the receiver's two channels where ``kind`` is rician.

    ``map`` is sigma voxel by voxel (i, j, k) where it differs from place to place, upright; ``sigma`` is its median in
    the tissue then. ``shared`` is the correlation of the noise of neighbours beyond what the prior expects, the largest
    of the three axes; ``edges`` as in ``medfusion.tasks.audit.Audit``. ``acquired`` is the upright scan's shape without
    the frequencies that were only filled in, where it is another; the map is on that grid.
    ``estimated`` says that sigma was not given.
    """

    sigma: float
    kind: Kind = "gaussian"
    shared: float = 0.0
    edges: float = 0.0
    map: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    acquired: tuple[int, ...] | None = None
    estimated: bool = False


def measure_noise(
    array: NDArray[np.generic],
    scale: IntensityScale,
    prior: Prior,
    *,
    sigma: float | None = None,
    kind: Kind | None = None,
) -> Noise:
    """The noise of an upright scan (i, j, k) that ``scale`` brings to the prior's units; what is given is kept."""
    tissue, unit, denoise = foreground(array), (scale.high - scale.low) / 2, prior.denoiser()
    places = blocks(tissue, BLOCKS)
    y, known = _shown(array, scale, tissue, places, prior.device)
    sigma_map, estimated = None, sigma is None
    if sigma is None:
        first = float(np.median([estimate_noise(block[0].cpu().numpy()) for block in y]))
        ratio, found = noise_ratio(denoise, y, lambda x0: _flat(x0, known), first=first, generators=_generators)
        sigma = ratio * unit
        if ratio > NEGLIGIBLE and _spread(found, _flat(found.x0, known)) > UNEVEN:
            sigma_map = unit * _map_of_levels(array, scale, tissue, prior, ratio)
            sigma = float(np.median(sigma_map[tissue]))
    else:
        found = residual(denoise, y, sigma / unit, _generators())
    flat = _flat(found.x0, known)
    kind = kind or ("rician" if is_rician(array, tissue, sigma) else "gaussian")
    return Noise(sigma, kind, _shared(found, flat), edge_correlation(found, flat), sigma_map, estimated=estimated)


def is_rician(array: NDArray[np.generic], tissue: NDArray[np.bool_], sigma: float) -> bool:
    """Whether the air around the tissue is like the magnitude of complex noise with ``sigma`` in each channel.

    Scans without air, with negative values, or with air set to a constant do not say, and count as Gaussian.
    """
    thin = (slice(None, None, COARSE),) * 3
    air = array[thin][~ndimage.binary_dilation(tissue[thin])]
    lowest = air.min(initial=0)
    air = air[air > lowest]
    if lowest < 0 or air.size < AIR_SHARE * array[thin].size:
        return False
    low, middle, high = np.quantile(air, (0.25, 0.5, 0.75)) / sigma
    return bool(abs(middle / RAYLEIGH[1] - 1) < 0.3 and abs((high - low) / (RAYLEIGH[2] - RAYLEIGH[0]) - 1) < 0.3)


def _map_of_levels(
    array: NDArray[np.generic], scale: IntensityScale, tissue: NDArray[np.bool_], prior: Prior, ratio: float
) -> NDArray[np.float32]:
    """The noise ratio voxel by voxel: a polynomial of second order through the logarithms of what blocks say.

    Each block is looked at with levels from ratio / REACH to ratio * REACH; its own is where (1) of ``noise_level``
    holds. Maps of parallel imaging are as smooth as the coils' sensitivities.
    """
    places = blocks(tissue, MANY)
    y, known = _shown(array, scale, tissue, places, prior.device)
    count = 2 * math.ceil(math.log(REACH) / math.log(STEP)) + 1
    levels = np.log(ratio) + np.linspace(-np.log(REACH), np.log(REACH), count)
    gaps = []
    for level in levels:
        found = residual(prior.denoiser(), y, math.exp(level), _generators())
        gaps.append(_gaps(found, _flat(found.x0, known)))
    own = [np.interp(0.0, np.maximum.accumulate(-gap), levels) for gap in np.transpose(gaps)]  # where it crosses 0
    middles = [[(s.start + s.stop) / 2 for s in place] for place in places]
    terms = 1 if len(places) < 8 else 4 if len(places) < 20 else 10
    design = _polynomial([np.array(axis) for axis in zip(*middles, strict=True)], tissue.shape)[:terms]
    weights, *_ = np.linalg.lstsq(np.stack(design, axis=1), own, rcond=None)
    axes = list(np.meshgrid(*map(np.arange, tissue.shape), indexing="ij", sparse=True))
    whole = sum(w * term for w, term in zip(weights, _polynomial(axes, tissue.shape), strict=False))
    return np.exp(np.broadcast_to(whole, tissue.shape).clip(min(own), max(own))).astype(np.float32)


def _polynomial(axes: Sequence[NDArray[Any]], shape: tuple[int, ...]) -> list[NDArray[np.float64]]:
    """1, x, y, z, and their six products, of coordinates from -1 to 1 along the axes of a volume."""
    x = [2 * np.asarray(axis, np.float64) / (n - 1) - 1 for axis, n in zip(axes, shape, strict=True)]
    return [np.ones_like(x[0]), *x, *(a * b for a, b in combinations_with_replacement(x, 2))]


def blocks(tissue: NDArray[np.bool_], number: int) -> list[tuple[slice, ...]]:
    """Up to ``number`` cubes with much tissue, as far from each other as they can lie; the same ones every time."""
    edges = [min(EDGE, n) for n in tissue.shape]
    begins = [np.arange(0, n - edge + 1, COARSE) for n, edge in zip(tissue.shape, edges, strict=True)]
    thin = tissue[::COARSE, ::COARSE, ::COARSE].astype(np.float32)
    size = [max(1, edge // COARSE) for edge in edges]
    share = ndimage.uniform_filter(thin, size, mode="constant", origin=[-(s // 2) for s in size])
    share = share[tuple(slice(len(b)) for b in begins)]  # of the cube that begins there
    corners = np.argwhere(share >= FULL * share.max()) * COARSE
    chosen = [corners[len(corners) // 2]]
    while len(chosen) < number:
        distance = np.min([np.abs(corners - corner).max(axis=1) for corner in chosen], axis=0)
        if distance.max() < EDGE // 4:
            break
        chosen.append(corners[distance.argmax()])
    return [tuple(slice(c, c + edge) for c, edge in zip(corner, edges, strict=True)) for corner in chosen]


def _shown(
    array: NDArray[np.generic],
    scale: IntensityScale,
    tissue: NDArray[np.bool_],
    places: list[tuple[slice, ...]],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """What the network is shown of the blocks, (b, 1, d, h, w), and which of their voxels are tissue off the border."""
    y = np.stack([scale.apply(array[place]).clip(*SEEN) for place in places])
    known = torch.from_numpy(np.stack([tissue[place] for place in places]))
    inner = known[..., BORDER:-BORDER, BORDER:-BORDER, BORDER:-BORDER]
    inner = inner | ~inner.flatten(1).any(dim=1)[:, None, None, None]  # a sliver of tissue: all of its block counts
    return torch.from_numpy(y)[:, None].to(device), F.pad(inner, [BORDER] * 6)[:, None].to(device)


def _flat(x0: Tensor, known: Tensor) -> Tensor:
    """FLAT_SHARE of each block's ``known`` voxels, where the clean image is flattest."""
    smooth = F.avg_pool3d(x0, 3, stride=1, padding=1, count_include_pad=False)
    slope = torch.stack(torch.gradient(smooth, dim=(2, 3, 4))).square().sum(dim=0).sqrt()
    steep = torch.stack([torch.quantile(s[k], FLAT_SHARE) for s, k in zip(slope, known, strict=True)])
    return known & (slope <= steep[:, None, None, None, None])


def _gaps(found: Residual, flat: Tensor) -> NDArray[np.float64]:
    """Of each block half the log of the ratio of the sides of (1) of ``noise_level``: above 0 where noise is more."""
    inside = flat.double()
    sums = [(side * inside).flatten(1).sum(dim=1) for side in (found.removed.square(), found.freedom)]
    return 0.5 * (sums[0] / sums[1].clamp(min=1e-3)).clamp(min=1e-12).log().cpu().numpy()


def _spread(found: Residual, flat: Tensor) -> float:
    """Standard deviation of the gaps between blocks."""
    return float(np.std(_gaps(found, flat)))


def _shared(found: Residual, inside: Tensor) -> float:
    """The largest correlation of neighbours' noise along an axis: that of the residual, less what the prior expects.

    E r_i r_j / r^2 = delta_ij - dD_i/dy_j, so white noise leaves the sum of the two products below at zero.
    """
    largest = -1.0
    for axis in (2, 3, 4):
        n = inside.shape[axis] - 1
        both = inside.narrow(axis, 0, n) & inside.narrow(axis, 1, n)
        product = found.removed.narrow(axis, 0, n) * found.removed.narrow(axis, 1, n)
        expected = found.signs.narrow(axis, 0, n) * found.response.narrow(axis, 1, n)
        largest = max(largest, float((product + expected)[both].mean()))
    return largest


def _generators() -> list[torch.Generator]:
    """The same random signs at every evaluation."""
    return [torch.Generator().manual_seed(0)]
