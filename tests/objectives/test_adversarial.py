"""Adversarial losses against closed forms, and games on a mixture whose modes are known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medfusion.diffusion import GaussianMixture
from medfusion.metrics.generative import modes_found
from medfusion.objectives.adversarial import Game, discriminator_loss, generator_loss, penalty


def test_the_losses_are_cross_entropies() -> None:
    real, generated = torch.tensor([0.3, -2.0, 5.0]), torch.tensor([1.0, 0.0, -4.0])
    entropy = nn.BCEWithLogitsLoss(reduction="none")
    torch.testing.assert_close(generator_loss(generated, "nonsaturating"), entropy(generated, torch.ones(3)))
    both = entropy(real, torch.ones(3)) + entropy(generated, torch.zeros(3))
    torch.testing.assert_close(discriminator_loss(real, generated, "nonsaturating"), both)
    torch.testing.assert_close(discriminator_loss(real, generated, "wasserstein"), generated - real)
    torch.testing.assert_close(generator_loss(generated, "wasserstein"), -generated)


def test_penalties_of_functions_whose_gradient_is_known() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    slope = torch.tensor([1.0, -2.0, 2.0])
    torch.testing.assert_close(penalty(lambda x: x @ slope, x, "nonsaturating"), torch.full((4,), 4.5))
    torch.testing.assert_close(penalty(lambda x: x @ slope, x, "wasserstein"), torch.full((4,), 4.0))
    bowl = penalty(lambda x: x.square().sum(dim=1) / 2, x, "nonsaturating")
    torch.testing.assert_close(bowl, x.square().sum(dim=1) / 2)


def test_the_penalty_trains_the_discriminator() -> None:
    weight = torch.tensor([3.0], requires_grad=True)
    penalty(lambda x: (x * weight).sum(dim=1), torch.ones(2, 1), "nonsaturating").mean().backward()
    assert weight.grad is not None
    assert float(weight.grad) == pytest.approx(3)


SPREAD = torch.full((8,), 0.1)


def ring(modes: int = 8) -> GaussianMixture:
    angles = torch.arange(modes) * 2 * math.pi / modes
    means = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture.isotropic(torch.full((modes,), 1 / modes), means, SPREAD)


def network(inputs: int, outputs: int) -> nn.Sequential:
    width = 64
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )


def played(game: Game, weight: float, steps: int) -> Tensor:
    """Samples of a generator trained on the ring."""
    torch.manual_seed(0)
    data, generator, discriminator = ring(), network(4, 2), network(2, 1)
    draw = torch.Generator().manual_seed(0)

    def discriminate(x: Tensor) -> Tensor:
        return discriminator(x)[:, 0]

    optimizers = [torch.optim.Adam(each.parameters(), 2e-3, (0.0, 0.99)) for each in (generator, discriminator)]
    for _ in range(steps):
        real = data.sample(128, draw).float()
        generated = generator(torch.randn(128, 4, generator=draw))
        loss = discriminator_loss(discriminate(real), discriminate(generated.detach()), game)
        at = real if game == "nonsaturating" else torch.lerp(real, generated, torch.rand(128, 1, generator=draw))
        loss = loss + weight * penalty(discriminate, at, game)
        for optimizer, value in zip(optimizers, (generator_loss(discriminate(generated), game), loss), strict=True):
            optimizer.zero_grad()
            value.mean().backward(retain_graph=True)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        return generator(torch.randn(2000, 4, generator=draw))


@pytest.mark.parametrize(("game", "weight"), [("nonsaturating", 0.5), ("wasserstein", 1.0)])
def test_a_game_finds_the_modes_of_a_ring(game: Game, weight: float) -> None:
    mixture = ring()
    means, deviations = mixture.means.numpy(), SPREAD.numpy()
    found, near = modes_found(played(game, weight, 1500).numpy(), means, deviations)
    assert found >= 7
    assert near > 0.3
    everything = mixture.sample(2000, torch.Generator().manual_seed(1)).numpy()
    assert modes_found(everything, means, deviations)[0] == 8
    one = means[:1] + 0.05 * np.random.default_rng(0).normal(size=(2000, 2))
    assert modes_found(one, means, deviations) == (1, 1.0)
