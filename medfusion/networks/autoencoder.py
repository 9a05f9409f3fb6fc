"""MONAI's variational autoencoder, its likelihood's spread, and latents of unit variance for a diffusion on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfusion.objectives.elbo import Rebuilt

GROUPS = 8  # of the normalisation
FIRST_SPREAD = -1.0  # its logarithm, half of that of images, and
SPREAD_UNIT = 30.0  # how fast it can change: Adam moves a value by its rate at most, e.g. 1e-4 a step


class Autoencoder(nn.Module):
    """Images (b, 1, d, h, w) to latents (b, c, d / factor, h / factor, w / factor) and back.

    Every edge of an image is a multiple of ``factor``. ``scale`` is set after the training of a first stage.
    """

    scale: Tensor

    def __init__(self, channels: Sequence[int], blocks: int, latents: int) -> None:
        super().__init__()
        from monai.networks.nets import AutoencoderKL

        self.factor = 2 ** (len(channels) - 1)
        self.kl = AutoencoderKL(
            spatial_dims=3,
            num_res_blocks=blocks,
            channels=channels,
            attention_levels=[False] * len(channels),
            latent_channels=latents,
            norm_num_groups=GROUPS,
            with_encoder_nonlocal_attn=False,  # attention over all voxels is what large volumes cannot afford
            with_decoder_nonlocal_attn=False,
        )
        self.spread = nn.Parameter(torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def log_spread(self) -> Tensor:
        """Logarithm of the standard deviation of what is rebuilt, learnt with the network."""
        return FIRST_SPREAD + SPREAD_UNIT * self.spread

    def forward(self, image: Tensor, noise: Tensor) -> Rebuilt:
        """Rebuilt from noised latents; these are as the encoder gives them, not scaled."""
        mean, deviation = self.kl.encode(image)
        return Rebuilt(self.kl.decode(mean + deviation * noise), self.log_spread, mean, deviation)

    def encode(self, image: Tensor) -> Tensor:
        """Mean latents, scaled."""
        return self.kl.encode(image)[0] * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of ``encode``, as far as there is one."""
        return self.kl.decode(latents / self.scale)


def on_latents(context: Tensor | None, labels: Tensor | None, factor: int) -> tuple[Tensor | None, Tensor | None]:
    """What is known about an image, (b, c, d/2, h/2, w/2) and (b, d, h, w), on the grid of its latents.

    Positions are averaged; of the labels, the one in the middle of a latent's voxels is taken.
    """
    if context is not None:
        context = F.avg_pool3d(context, factor, ceil_mode=True, count_include_pad=False)
    if labels is not None:
        middles = [(torch.arange(0, n, factor) + factor // 2).clamp(max=n - 1) for n in labels.shape[1:]]
        labels = labels[:, middles[0]][:, :, middles[1]][..., middles[2]]
    return context, labels
