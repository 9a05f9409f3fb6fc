"""CycleGANs: images of one scanner as another would show them, learnt from two folders of unrelated scans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medfusion.config import Config
from medfusion.errors import MedfusionError
from medfusion.networks.cyclegan import CycleGan, Translator
from medfusion.prior.arithmetic import half_width
from medfusion.prior.base import Prior
from medfusion.prior.padding import far_side, grown


def build_cyclegan(config: Config) -> CycleGan:
    """The networks that a config describes, freshly initialised."""
    shape = config.cyclegan
    assert shape is not None
    return CycleGan(shape.channels, shape.layers)


@dataclass(frozen=True, eq=False)
class CycleGanPrior(Prior, family="cyclegan"):
    """Two trained translators, with their discriminators."""

    network: CycleGan

    @classmethod
    def untrained(cls, config: Config, provenance: dict[str, Any]) -> CycleGanPrior:
        """As ``Prior``."""
        return cls(config, build_cyclegan(config), provenance)

    @property
    def kind(self) -> str:
        """As ``Prior``."""
        return "a CycleGAN"

    @property
    def domains(self) -> tuple[str, str]:
        """Their names."""
        assert self.config.cyclegan is not None
        first, second = (domain.name for domain in self.config.cyclegan.domains)
        return first, second

    @torch.no_grad()
    def translate(self, image: Tensor, other: Prior | str) -> Tensor:
        """Images (b, 1, d, h, w) of the one domain as ``other``, the name of the second, would show them."""
        if other not in self.domains:
            raise MedfusionError(f"{self.name}: does not know {other}", knows=", ".join(self.domains))
        translator = self.network.translators[1 - self.domains.index(str(other))]
        assert isinstance(translator, Translator)
        d, h, w = map(slice, image.shape[2:])
        padding = far_side([-n % translator.factor for n in image.shape[2:]])
        with half_width(self.device):
            translated: Tensor = translator(grown(image.to(self.device), padding))
        return translated.float()[..., d, h, w]
