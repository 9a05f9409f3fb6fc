"""Features of volumes, in which ``medfusion.metrics.generative`` compares generated ones with real ones.

A denoiser's activations are useful features of an image (Baranchuk et al. 2022; Xiang et al. 2023, Denoising diffusion
autoencoders): here those of the shipped prior ``mri-patch``. Nothing is fitted to the volumes that are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medfusion.data.intensity import SEEN
from medfusion.networks.residual_unet import ResidualUNet, detail, fold, fourier
from medfusion.prior import DiffusionPrior, prior_path

PRIOR = "mri-patch"
TIME = 0.2  # what the network is told: noise with a standard deviation of 0.32; what it is shown is the volume itself
# Over 160 real T1 volumes of hippocampi, scaled as for training, these give both levels the same variance, all features
# the mean 0 and the variance 1 on average: the polynomial kernel of ``mmd`` depends on origin and unit.
LEVELS = {1: 6.9, 2: 3.1}  # at a quarter and an eighth of the resolution
CENTRE = np.array([
    9.0, 5.7, 4.9, 1.7, -2.2, 3.5, -5.4, -4.9, 2.7, 10.3, 0.6, 1.3, -12.3, 2.1, -1.8, 1.4,
    -4.1, -2.6, 1.6, 2.9, 4.3, -0.3, 2.4, 1.5, -6.8, -0.3, 4.6, -2.4, 1.4, -9.0, -1.5, -2.9,
])  # fmt: skip


def extractor() -> str:
    """Name and SHA-256 of the prior's file, for reports: features of different extractors cannot be compared."""
    return f"{PRIOR} {hashlib.sha256(prior_path(PRIOR).read_bytes()).hexdigest()}"


def features(volumes: Sequence[NDArray[Any]], device: str | torch.device = "cpu") -> NDArray[np.float64]:
    """(n, 32) features of volumes (d, h, w) in the prior's units, -1 to +1; shapes may differ, from 16^3 voxels on.

    The mean of each channel over each eighth of the volume, which keeps roughly what lies where, through one fixed
    orthogonal projection. Every volume is seen by itself, in float32.

    ``frechet_distance`` between 40 hippocampi and 40 others, its interval, and [the distance with random weights]:
    unchanged                          0 (-5 to 5)                     [0]
    blurred by 0.5, 1, 1.5 voxels      8 (2 to 13), 70, 168            [4, 20, 30]
    noise of 2, 5, 10 % of the range   0, 1 (-4 to 5), 10 (4 to 16)    [0, 0, 2]
    warped by 0.5, 1, 2 voxels (rms)   1, 1, 2 (-4 to 9)               [-1, -1, 0]
    five cases, eight times each       34 (27 to 41)                   [32]
    Weak noise and smooth warps are lost in the differences between persons; ``patch_distance`` sees 5 % noise.
    """
    prior = DiffusionPrior.load(PRIOR, device)
    log_ratio = prior.process.log_noise_ratio(TIME).float().to(device)[None]
    columns = _projection()  # of one row at a time: matrix products round a row differently among others
    return np.stack([_pooled(prior.network, volume, log_ratio) @ columns - CENTRE for volume in volumes])


@torch.no_grad()
def _pooled(network: ResidualUNet, volume: NDArray[Any], log_ratio: Tensor) -> NDArray[np.float64]:
    """(8 x channels of the LEVELS,) of one volume."""
    if volume.ndim != 3 or min(volume.shape) < 16:
        raise ValueError(f"features need volumes (d, h, w) with edges of 16 voxels or more, got {volume.shape}")
    x = torch.from_numpy(np.clip(volume, *SEEN).astype(np.float32)).to(log_ratio.device)[None, None]
    x = F.pad(x, [p for n in reversed(volume.shape) for p in (0, -n % 2 ** (max(LEVELS) + 1))], mode="replicate")
    means = []
    for k, z in enumerate(_way_down(network, x, log_ratio)):
        if k in LEVELS:
            d, h, w = (slice(-(-n // 2 ** (k + 1))) for n in volume.shape)  # without what was padded
            means.append(LEVELS[k] * F.adaptive_avg_pool3d(z[..., d, h, w], 2).flatten())
    return torch.cat(means).double().cpu().numpy()


def _way_down(network: ResidualUNet, x: Tensor, log_ratio: Tensor) -> Iterator[Tensor]:
    """The activations (1, channels, ...) of each level down to the last that is used; the way up costs as much."""
    level = network.embed(fourier(log_ratio))
    z = network.head(fold(network.first(torch.cat([x, detail(x, log_ratio)], dim=1))))
    for k in range(max(LEVELS) + 1):
        for block in network.down[k].children():
            z = block(z, level)
        yield z
        z = network.shrink[k](z)


def _projection(inputs: int = 8 * (64 + 96)) -> NDArray[np.float64]:
    """(inputs, 32) orthonormal columns, the same everywhere."""
    columns, triangle = np.linalg.qr(np.random.default_rng(0).standard_normal((inputs, len(CENTRE))))
    return columns * np.sign(np.diag(triangle))
