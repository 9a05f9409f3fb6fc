"""The evidence lower bound against closed forms: linear-Gaussian data, Monte Carlo, torch's own divergence."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from medfusion.objectives.elbo import Rebuilt, divergence, elbo, log_likelihood

VALUES, LATENTS = 6, 2


def random_rebuilt(seed: int = 0) -> tuple[Tensor, Rebuilt]:
    generator = torch.Generator().manual_seed(seed)
    x, image, mean = (torch.randn(3, n, generator=generator) for n in (VALUES, VALUES, LATENTS))
    deviation = torch.rand(3, LATENTS, generator=generator) + 0.2
    return x, Rebuilt(image, torch.tensor(-0.7), mean, deviation)


def test_each_term_is_that_of_torch_distributions() -> None:
    x, rebuilt = random_rebuilt()
    likelihood = Normal(rebuilt.image, math.exp(-0.7)).log_prob(x).sum(dim=1)
    nats = kl_divergence(Normal(rebuilt.mean, rebuilt.deviation), Normal(0.0, 1.0))
    torch.testing.assert_close(log_likelihood(x, rebuilt), likelihood)
    torch.testing.assert_close(divergence(rebuilt), nats)
    torch.testing.assert_close(elbo(x, rebuilt), likelihood - nats.sum(dim=1))
    torch.testing.assert_close(elbo(x, rebuilt, beta=4.0), likelihood - 4 * nats.sum(dim=1))


def test_the_divergence_is_its_monte_carlo_estimate() -> None:
    _, rebuilt = random_rebuilt()
    q = Normal(rebuilt.mean, rebuilt.deviation)
    z = q.sample(torch.Size([200_000]))
    drawn = (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).mean(dim=0)
    torch.testing.assert_close(divergence(rebuilt), drawn, atol=0.02, rtol=0)


class Linear(nn.Module):
    """A linear encoder and decoder: enough for linear-Gaussian data (Lucas et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(VALUES, LATENTS), nn.Linear(LATENTS, VALUES)
        self.log_deviation = nn.Parameter(torch.zeros(LATENTS))
        self.log_spread = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, noise: Tensor) -> Rebuilt:
        mean, deviation = self.encoder(x), self.log_deviation.exp().expand(len(x), -1)
        return Rebuilt(self.decoder(mean + deviation * noise), self.log_spread, mean, deviation)


def probabilistic_pca(x: Tensor) -> float:
    """Mean log-likelihood of its maximum: principal axes, and one variance for the rest (Tipping & Bishop 1999)."""
    centred = x - x.mean(dim=0)
    covariance = centred.T @ centred / len(x)
    values, axes = torch.linalg.eigh(covariance)
    rest = values[:-LATENTS].mean()
    main = axes[:, -LATENTS:] * (values[-LATENTS:] - rest).sqrt()
    model = main @ main.T + rest * torch.eye(VALUES)
    return float(MultivariateNormal(x.mean(dim=0), model).log_prob(x).mean())


def test_a_linear_vae_reaches_the_likelihood_of_probabilistic_pca() -> None:
    """Within 0.01 nats a value; a bound with another beta, which is not maximised, stays below it."""
    generator = torch.Generator().manual_seed(0)
    main = torch.randn(LATENTS, VALUES, generator=generator)
    x = (
        torch.randn(2000, LATENTS, generator=generator) @ main
        + 0.3 * torch.randn(2000, VALUES, generator=generator)
        + 1
    )
    exact, reached = probabilistic_pca(x), {}
    for beta in (1.0, 4.0):
        torch.manual_seed(0)
        network = Linear()
        optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
        for step in range(1500):
            for group in optimizer.param_groups:
                group["lr"] = 0.03 * (1 - step / 1500)
            optimizer.zero_grad()
            noise = torch.randn(len(x), LATENTS, generator=generator)
            (-elbo(x, network(x, noise), beta).mean()).backward()
            optimizer.step()
        with torch.no_grad():
            draws = [elbo(x, network(x, torch.randn(len(x), LATENTS, generator=generator))).mean() for _ in range(50)]
        reached[beta] = float(torch.stack(draws).mean())
    assert reached[1.0] == pytest.approx(exact, abs=0.01 * VALUES)
    assert reached[4.0] < exact - 0.1 * VALUES
