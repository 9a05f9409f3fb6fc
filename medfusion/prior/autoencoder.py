"""Autoencoders: plain, variational (Kingma & Welling 2014), or with another weight beta of the divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medfusion.config import Config
from medfusion.networks import Autoencoder
from medfusion.prior.arithmetic import half_width
from medfusion.prior.base import Prior
from medfusion.prior.padding import far_side, grown


def build_autoencoder(config: Config) -> Autoencoder:
    """The autoencoder that a config describes, freshly initialised."""
    shape = config.autoencoder
    assert shape is not None
    return Autoencoder(shape.channels, shape.blocks, shape.latents)


@torch.no_grad()
def latents_of(autoencoder: Autoencoder, image: Tensor) -> Tensor:
    """Mean latents of unit variance, of images (b, 1, d, h, w) of any size."""
    padding = far_side([-n % autoencoder.factor for n in image.shape[2:]])
    with half_width(image.device):
        return autoencoder.encode(grown(image, padding)).float()


@torch.no_grad()
def image_of(autoencoder: Autoencoder, latents: Tensor, shape: Sequence[int]) -> Tensor:
    """Images (b, 1, *shape), the inverse of ``latents_of`` as far as there is one."""
    with half_width(latents.device):
        image = autoencoder.decode(latents).float()
    d, h, w = map(slice, shape)
    return image[..., d, h, w]


@dataclass(frozen=True, eq=False)
class AutoencoderPrior(Prior, family="autoencoder"):
    """A trained autoencoder. Its codes are (b, c, d / factor, h / factor, w / factor), the means of the posterior."""

    network: Autoencoder

    @classmethod
    def untrained(cls, config: Config, provenance: dict[str, Any]) -> AutoencoderPrior:
        """As ``Prior``."""
        return cls(config, build_autoencoder(config), provenance)

    @property
    def kind(self) -> str:
        """As ``Prior``."""
        return {0.0: "a plain autoencoder", 1.0: "a VAE"}.get(self._beta, f"a beta-VAE with beta {self._beta:g}")

    @property
    def _beta(self) -> float:
        assert self.config.autoencoder is not None
        return self.config.autoencoder.beta

    def sample(self, generators: Sequence[torch.Generator]) -> Tensor:
        """As ``Prior``: decoded from N(0, 1), of which a plain autoencoder knows nothing."""
        if not self._beta:
            raise self._lacks("way to sample")
        return self.decode(self.noise(generators), [self.config.data.crop] * 3)

    def encode(self, image: Tensor) -> Tensor:
        """As ``Prior``."""
        return latents_of(self.network, image.to(self.device))

    def decode(self, code: Tensor, shape: Sequence[int]) -> Tensor:
        """As ``Prior``."""
        return image_of(self.network, code.to(self.device), shape)

    def latents(self, image: Tensor) -> Tensor:
        """As ``Prior``: the codes."""
        return self.encode(image)

    def images(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """As ``Prior``."""
        return self.decode(x, shape)
