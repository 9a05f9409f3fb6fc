"""A residual U-Net without normalisation layers, on voxels folded 2x2x2 into channels.

Without normalisation a crop and the whole volume get the same answer, so the network may be trained on cubes and used
on heads. Folding costs one eighth of the compute at full resolution (docs/decisions.md has the measurements).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT = 4  # channels that say where in the head a voxel lies (x, y, z) and what kind of image this is
ATLAS = (1, 2, 64, 64, 64)  # mean whole and mean skull-stripped image around the foreground's centroid
ATLAS_REACH = 1.28  # from the centre to the outermost atlas voxels, in the unit of the position channels (decimetres)
EMBEDDING = 64


def fold(x: Tensor) -> Tensor:
    """(b, 1, d, h, w) to (b, 8, d/2, h/2, w/2)."""
    b, _, d, h, w = x.shape
    x = x.reshape(b, d // 2, 2, h // 2, 2, w // 2, 2)
    return x.permute(0, 2, 4, 6, 1, 3, 5).reshape(b, 8, d // 2, h // 2, w // 2)


def unfold(x: Tensor) -> Tensor:
    """(b, 8 c, d, h, w) to (b, c, 2d, 2h, 2w), the inverse of ``fold``."""
    b, c, d, h, w = x.shape
    x = x.reshape(b, c // 8, 2, 2, 2, d, h, w)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // 8, 2 * d, 2 * h, 2 * w)


class Residual(nn.Module):
    """x + conv(relu(modulated conv(x))); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = nn.Conv3d(channels, channels, 3, padding=1)
        self.leave = nn.Conv3d(channels, channels, 3, padding=1)
        self.modulate = nn.Linear(EMBEDDING, 2 * channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """x (b, c, d, h, w) and the embedded noise level (b, EMBEDDING)."""
        scale, shift = self.modulate(level)[:, :, None, None, None].to(x.dtype).chunk(2, dim=1)
        return x + self.leave(F.relu(self.enter(x) * (1 + scale) + shift))


class ResidualUNet(nn.Module):
    """Additive skips, strided convolutions down, transposed ones up, the noise level by scale and shift.

    Parameters
    ----------
    channels : of each resolution level, the first at half the input's resolution.
    blocks : residual blocks of each level, on the way down and again on the way up.
    outputs : images in the answer: 2 with learned variance.

    The buffer ``atlas`` is read at the position channels and shown to the network beside them: coordinates alone are
    learnt too slowly (after 900 steps a sample still had no outline of a head).
    """

    atlas: Tensor

    def __init__(self, channels: Sequence[int], blocks: Sequence[int], outputs: int = 1) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.multiple = 2 ** len(channels)  # every edge of the input is a multiple of this
        self.embed = nn.Sequential(
            nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU()
        )
        self.register_buffer("atlas", torch.zeros(ATLAS))
        self.head = nn.Conv3d(8 + CONTEXT + ATLAS[1], channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.ModuleList(Residual(c) for _ in range(n)) for c, n in zip(channels, blocks, strict=True)
        )
        self.shrink = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in pairs)
        self.grow = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(
            nn.ModuleList(Residual(c) for _ in range(n)) for c, n in zip(channels[:-1], blocks[:-1], strict=True)
        )
        self.tail = nn.Conv3d(channels[0], 8 * outputs, 3, padding=1)
        nn.init.zeros_(self.tail.weight)

    def forward(self, x: Tensor, log_noise_ratio: Tensor, context: Tensor | None = None) -> Tensor:
        """x (b, 1, d, h, w), log noise ratio (b,), context (b, CONTEXT, d/2, h/2, w/2); zeros mean unknown."""
        z = fold(x)
        if context is None:
            context = z.new_zeros(len(z), CONTEXT, *z.shape[2:])
        level = self.embed(fourier(log_noise_ratio))
        z = torch.cat([z, context.to(z), self.expected(context).to(z)], dim=1)
        z = self.head(z.contiguous(memory_format=torch.channels_last_3d))
        skips = []
        for k, stage in enumerate(self.down):
            for block in stage.children():
                z = block(z, level)
            if k < len(self.shrink):
                skips.append(z)
                z = self.shrink[k](z)
        for k in reversed(range(len(self.grow))):
            z = self.grow[k](z) + skips[k]
            for block in self.up[k].children():
                z = block(z, level)
        return unfold(self.tail(z))

    def expected(self, context: Tensor) -> Tensor:
        """The atlas at the positions of ``context``, (b, 2, d, h, w); zeros where a sample's position is unknown."""
        position = context[:, :3].float()
        known = position.abs().flatten(1).amax(dim=1) > 0
        # grid_sample wants the last axis first, in units of the half width
        grid = position.flip(1).permute(0, 2, 3, 4, 1) / ATLAS_REACH
        atlas = self.atlas.float().expand(len(context), *ATLAS[1:])
        sampled = F.grid_sample(atlas, grid, padding_mode="border", align_corners=True)
        return sampled * known[:, None, None, None, None]


def fourier(log_noise_ratio: Tensor) -> Tensor:
    """(b,) to (b, EMBEDDING): sines and cosines of log(sigma / alpha) with wavelengths from 0.5 to 64."""
    wavelength = 2.0 ** torch.linspace(-1, 6, EMBEDDING // 2, device=log_noise_ratio.device)
    phase = 2 * math.pi * log_noise_ratio.float()[:, None] / wavelength
    return torch.cat([phase.sin(), phase.cos()], dim=1)
