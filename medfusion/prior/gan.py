"""Generative adversarial networks: images of codes, and no way back (Goodfellow et al. 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medfusion.config import Config
from medfusion.networks import Adversarial
from medfusion.prior.arithmetic import half_width
from medfusion.prior.base import Prior


def build_adversarial(config: Config) -> Adversarial:
    """The networks that a config describes, freshly initialised."""
    shape = config.gan
    assert shape is not None
    return Adversarial(shape.channels, shape.latents, config.data.crop, shape.spectral_norm)


@dataclass(frozen=True, eq=False)
class GanPrior(Prior, family="gan"):
    """A trained generator, with its discriminator. Codes are (b, latents), normal; images are crops of the training."""

    network: Adversarial

    @classmethod
    def untrained(cls, config: Config, provenance: dict[str, Any]) -> GanPrior:
        """As ``Prior``."""
        return cls(config, build_adversarial(config), provenance)

    @property
    def kind(self) -> str:
        """As ``Prior``."""
        return "a GAN"

    def sample(self, generators: Sequence[torch.Generator]) -> Tensor:
        """As ``Prior``."""
        return self.decode(self.noise(generators), [self.config.data.crop] * 3)

    @torch.no_grad()
    def decode(self, code: Tensor, shape: Sequence[int]) -> Tensor:
        """As ``Prior``.

        Raises
        ------
        ValueError : another shape than that of the training's crops.
        """
        if list(shape) != [self.config.data.crop] * 3:
            raise ValueError(f"{self.name} makes volumes of {self.config.data.crop}^3 voxels, not {tuple(shape)}")
        with half_width(self.device):
            image: Tensor = self.network.generator(code.to(self.device))
        return image.float()
