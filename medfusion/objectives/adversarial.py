"""Losses of generative adversarial networks, as functions of what the discriminator answers (logits, b).

"nonsaturating": log(1 + e^(-D(G(z)))) for the generator, log(1 + e^(-D(x))) + log(1 + e^(D(G(z)))) for the
discriminator (Goodfellow et al. 2014, section 3). "wasserstein": D is a critic (Arjovsky et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Game = Literal["nonsaturating", "wasserstein"]


def generator_loss(generated: Tensor, game: Game) -> Tensor:
    """(b,) low where the discriminator takes what was generated for real."""
    return F.softplus(-generated) if game == "nonsaturating" else -generated


def discriminator_loss(real: Tensor, generated: Tensor, game: Game) -> Tensor:
    """(b,) low where it tells real from generated."""
    if game == "nonsaturating":
        return F.softplus(-real) + F.softplus(generated)
    return generated - real


def penalty(discriminate: Callable[[Tensor], Tensor], real: Tensor, generated: Tensor, game: Game) -> Tensor:
    """(b,) that keeps the game stable, to be weighed and added to the discriminator's loss.

    R1 of the first game, |grad D(x)|^2 / 2 at real images: with it training converges near the data (Mescheder et al.
    2018, eq. 9). The gradient penalty of the second, (|grad D(x)| - 1)^2 anywhere between a real and a generated image
    (Gulrajani et al. 2017, eq. 3); each pair's place is drawn by torch's generator.
    """
    if game == "nonsaturating":
        return _slope(discriminate, real.detach()) / 2
    share = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device, dtype=real.dtype)
    between = torch.lerp(real.detach(), generated.detach(), share)
    return ((_slope(discriminate, between) + 1e-12).sqrt() - 1).square()


def _slope(discriminate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(b,) squared length of the gradient of D by x."""
    with torch.enable_grad():
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(discriminate(x).sum(), x, create_graph=True)
    return gradient.float().square().flatten(1).sum(dim=1)
