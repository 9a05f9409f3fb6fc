"""The evidence lower bound of variational autoencoders (Kingma & Welling 2014).

    log p(x) >= log p(x | z) - KL(q(z | x) || N(0, 1)),      z ~ q(z | x) = N(mean, deviation^2)

All in nats, of densities: an image whose values are known to 0.01 has n log 0.01 nats less than its density says.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Rebuilt(NamedTuple):
    """What an autoencoder makes of images: p(x | z) = N(image, exp(log_spread)^2), and q(z | x) of each latent."""

    image: Tensor
    log_spread: Tensor
    mean: Tensor
    deviation: Tensor


def log_likelihood(x: Tensor, rebuilt: Rebuilt) -> Tensor:
    """log p(x | z) of each image (b,).

    One spread is learnt for all values (Rybkin et al. 2021): at its best it is the root mean square error, so that
    nobody has to weigh error against divergence.
    """
    error = ((x.float() - rebuilt.image.float()) * (-rebuilt.log_spread).exp()).square().flatten(1).sum(dim=1)
    return -error / 2 - x[0].numel() * (rebuilt.log_spread + math.log(2 * math.pi) / 2)


def divergence(rebuilt: Rebuilt) -> Tensor:
    """KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - log s^2 - 1) / 2 of each latent (b, ...) (appendix B)."""
    mean, variance = rebuilt.mean.float(), rebuilt.deviation.float().square()
    return (mean.square() + variance - variance.log() - 1) / 2


def elbo(x: Tensor, rebuilt: Rebuilt, beta: float = 1.0) -> Tensor:
    """The bound for each image (b,), one sample of z each; ``beta`` weighs the divergence (Higgins et al. 2017)."""
    return log_likelihood(x, rebuilt) - beta * divergence(rebuilt).flatten(1).sum(dim=1)
