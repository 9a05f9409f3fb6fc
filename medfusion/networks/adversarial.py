"""MONAI's generator and discriminator, with the loss of the game between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from medfusion.objectives.adversarial import Game, discriminator_loss, generator_loss, penalty

SLOPE = ("LEAKYRELU", {"negative_slope": 0.2})
NORMALISED = ("GROUP", {"num_groups": 8})  # statistics of each image: those of a batch would not be averaged over steps


class Adversarial(nn.Module):
    """``generator`` (b, latents) -> (b, 1, edge, edge, edge) and ``discriminator`` of these -> (b, 1).

    ``channels`` are the discriminator's, the finest level first; each level halves the edge.
    """

    def __init__(self, channels: Sequence[int], latents: int, edge: int, spectral: bool) -> None:
        super().__init__()
        from monai.networks.nets import Discriminator, Generator

        coarsest, strides = edge // 2 ** len(channels), [2] * len(channels)
        self.generator = Generator(
            (latents,),
            (channels[-1], *[coarsest] * 3),
            (*reversed(channels), 1),
            (*strides, 1),
            num_res_units=0,
            act=SLOPE,
            norm=NORMALISED,
        )
        self.discriminator = Discriminator(
            (1, edge, edge, edge),
            channels,
            strides,
            num_res_units=0,
            act=SLOPE,
            norm=None,  # an image is judged by itself, as its gradient is penalised
            dropout=None,
            last_act=None,
        )
        if spectral:
            for module in self.discriminator.modules():
                if isinstance(module, nn.Conv3d | nn.Linear):
                    spectral_norm(module)

    def forward(self, real: Tensor, noise: Tensor, game: Game, weight: float) -> tuple[Tensor, Tensor]:
        """Losses of the generator and the discriminator (b,), for one backward pass of their sum.

        Both players move at once. The generator's loss goes through a discriminator whose weights are constants, the
        discriminator's sees images that are: neither gradient reaches the other.
        """
        generated = self.generator(noise)
        constants = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        verdict = functional_call(self.discriminator, constants, (generated,))[:, 0].float()
        shown = generated.detach()
        judged = self.discriminator(torch.cat([real, shown]))[:, 0].float()
        of_real, of_generated = judged.chunk(2)
        loss = discriminator_loss(of_real, of_generated, game)
        if weight:
            at = real if game == "nonsaturating" else torch.lerp(real, shown, _any_share(noise, real))
            loss = loss + weight * penalty(lambda x: self.discriminator(x)[:, 0], at, game)
        return generator_loss(verdict, game), loss


def _any_share(noise: Tensor, like: Tensor) -> Tensor:
    """Uniform in [0, 1), one an image, as its noise fixes it: a resumed run draws again what an unbroken one does."""
    return (1e3 * noise.flatten(1).sum(dim=1)).remainder(1).view(-1, *[1] * (like.ndim - 1)).to(like)
