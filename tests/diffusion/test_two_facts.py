"""The two facts that noise levels exist for (Song & Ermon 2019, section 3), on the oracle.

Langevin dynamics alone gives modes the wrong weights, annealed Langevin dynamics the right ones; and where there are no
data the score says nothing of use, unless there is enough noise.
"""

import math
from itertools import pairwise

import pytest
import torch

from medfusion.diffusion import VE, GaussianMixture, annealed_langevin, langevin, time_steps
from tests.diffusion.test_mixture import seeded

PROCESS = VE(0.01, 20.0)


def modes(heavy):
    """Song & Ermon's example: two normals of variance 1 around (5, 5) and (-5, -5)."""
    means = torch.tensor([[5.0, 5.0], [-5.0, -5.0]])
    return GaussianMixture.isotropic(torch.tensor([heavy, 1 - heavy]), means, torch.ones(2))


def share_of_first_mode(x):
    return float((x.sum(dim=1) > 0).double().mean())


def test_langevin_alone_weighs_separated_modes_equally():
    """From a start that is symmetric a chain stays in the half it began in: a half, within four standard errors.

    The watershed lies where the components' weighted densities meet, log(4) / (10 2^(1/2)) = 0.1 beyond the diagonal
    in the disfavour of the light mode, where 0.1 2^(1/2) / 16 = 0.9 % of the start begins (and the noise blurs it).
    """
    n = 4000
    x = 16 * torch.rand(n, 2, generator=seeded(0)) - 8
    first = 1 / PROCESS.steps
    x = langevin(modes(0.8).denoiser(PROCESS), x, first, step_size=0.1, steps=200, generators=[seeded(1)])
    share = share_of_first_mode(x)
    assert share == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / n) + 0.02)
    within = torch.minimum(*torch.cdist(x, modes(0.8).means.float()).unbind(dim=1)).square()
    assert float(within.mean()) == pytest.approx(2, rel=0.1)  # each mode itself is right: variance 1 in 2 dimensions


def test_annealed_langevin_weighs_them_as_they_are():
    """Within four standard errors and 0.02 for the steps."""
    n = 2000
    x = PROCESS.sigma_max * torch.randn(n, 2, generator=seeded(0))
    times = time_steps(PROCESS, 100, "log_snr")
    x = annealed_langevin(modes(0.8).denoiser(PROCESS), x, times, step_size=0.5, steps=4, generators=[seeded(1)])
    assert share_of_first_mode(x) == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / n) + 0.02)


def score(oracle, x, sigma):
    return oracle.denoiser(PROCESS).score(x, PROCESS.time_of(sigma))


def test_between_modes_the_score_does_not_know_their_weights_without_noise():
    """Nearer to one mode the other's share is below exp(-30); at sigma = 20 the weights decide a third of it."""
    x = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [6.0, 2.0]], dtype=torch.float64)
    barely, noisy = ((score(modes(0.8), x, r) - score(modes(0.2), x, r)).norm(dim=1) for r in (0.01, 20.0))
    assert float(barely.max()) < 1e-9
    assert float((noisy / score(modes(0.8), x, 20.0).norm(dim=1)).min()) > 0.3


def test_with_noise_the_denoiser_points_to_the_mean_of_all_data():
    """E[x_0 | x_t] = mean + (Cov x_t - Cov(x_0, |x_0|^2) / 2) / sigma^2 + O(sigma^-4).

    It is the mean of p(x_0) tilted by exp((x_t x_0 - |x_0|^2 / 2) / sigma^2). For the two modes Cov(x_0, |x_0|^2) is
    E[x_0 |x_0|^2] - mean E|x_0|^2 = (54 - 52) mean.
    """
    process, heavy = VE(0.01, 1000.0), 0.8
    mean = torch.full((2,), 10 * heavy - 5, dtype=torch.float64)
    covariance = torch.full((2, 2), 100 * heavy * (1 - heavy), dtype=torch.float64) + torch.eye(2, dtype=torch.float64)
    x = torch.tensor([[30.0, -10.0], [-20.0, -20.0]], dtype=torch.float64)
    remainders = []
    for sigma in (200.0, 400.0, 800.0):
        x0 = modes(heavy).denoiser(process)(x, process.time_of(sigma))
        remainders.append(float((x0 - mean - (x @ covariance - mean) / sigma**2).norm()))
    assert remainders[-1] < 1e-6
    for larger, smaller in pairwise(remainders):
        assert larger / smaller == pytest.approx(16, rel=0.1)


def test_off_the_data_the_score_diverges_as_noise_vanishes():
    """Data on the line y = 0: at height h the score's y is - h / sigma^2 whatever sigma, and its x stays finite."""
    line = GaussianMixture(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[-1.0, 0.0], [1.0, 0.0]]),
        torch.diag(torch.tensor([0.25, 0.0])).expand(2, 2, 2),
    )
    x = torch.tensor([[-0.5, 0.3], [0.2, -0.1], [2.0, 1.0]], dtype=torch.float64)
    for sigma in (10.0, 1.0, 0.1, 0.01):
        s = score(line, x, sigma)
        torch.testing.assert_close(s[:, 1], -x[:, 1] / sigma**2, rtol=1e-9, atol=0)
        assert float(s[:, 0].abs().max()) < 3 / (0.25 + sigma**2)


def test_a_score_estimated_from_samples_is_good_only_with_noise():
    """Of 400 samples, over the square they lie in; the estimate is the score of the noised empirical distribution.

    With little of it the estimate pulls to the nearest sample with a force of 1 / sigma^2, a hundredfold what is right.
    """
    truth, n = modes(0.8), 400
    samples = truth.sample(n, seeded(0))
    estimate = GaussianMixture.isotropic(torch.full((n,), 1 / n), samples, torch.zeros(n))
    x = torch.cartesian_prod(*[torch.linspace(-8, 8, 17, dtype=torch.float64)] * 2)

    def relative_error(sigma):
        true = score(truth, x, sigma)
        return float((score(estimate, x, sigma) - true).norm() / true.norm())

    assert relative_error(0.03) > 100
    assert relative_error(10.0) < 0.1
