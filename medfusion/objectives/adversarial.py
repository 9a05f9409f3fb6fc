"""Losses of generative adversarial networks, as functions of what the discriminator answers (logits, any shape).

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
    """Of each logit, low where the discriminator takes what was generated for real."""
    return F.softplus(-generated) if game == "nonsaturating" else -generated


def discriminator_loss(real: Tensor, generated: Tensor, game: Game) -> Tensor:
    """Of each pair of logits, low where it tells real from generated."""
    if game == "nonsaturating":
        return F.softplus(-real) + F.softplus(generated)
    return generated - real


def penalty(discriminate: Callable[[Tensor], Tensor], x: Tensor, game: Game) -> Tensor:
    """(b,) that keeps the game stable, to be weighed and added to the discriminator's loss.

    Of the first game R1, |grad D(x)|^2 / 2 at real images x: with it training converges near the data (Mescheder et al.
    2018, eq. 9). Of the second the gradient penalty, (|grad D(x)| - 1)^2, where x is to lie anywhere between a real and
    a generated image (Gulrajani et al. 2017, eq. 3).
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminate(x).sum(), x, create_graph=True)
    slope = gradient.float().square().flatten(1).sum(dim=1)
    return slope / 2 if game == "nonsaturating" else ((slope + 1e-12).sqrt() - 1).square()
