"""The oracle against torch.distributions, sampling, quadrature, autograd and ratios of densities."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from medfusion.diffusion import VE, VP, GaussianMixture, SubVP

PROCESSES = {"vp-linear": VP("linear"), "vp-cosine": VP("cosine"), "sub-vp": SubVP(), "ve": VE(0.01, 50.0)}
all_processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def mixture(dimensions):
    """Two correlated components far enough apart to be told apart, of weights 0.3 and 0.7 and overall mean 0."""
    place = torch.arange(dimensions).double()
    pattern = 0.8 + 0.4 * torch.cos(place)
    distance = (place[:, None] - place).abs()
    covariances = torch.stack([0.01 * 0.6**distance, 0.03 * (-0.4) ** distance])
    return GaussianMixture(torch.tensor([0.3, 0.7]), torch.stack([-1.05 * pattern, 0.45 * pattern]), covariances)


def in_torch(oracle):
    components = MultivariateNormal(oracle.means, oracle.covariances)
    return MixtureSameFamily(Categorical(oracle.weights), components)


@pytest.mark.parametrize("dimensions", [1, 2, 27])
def test_log_prob_is_that_of_torch_distributions(dimensions):
    oracle = mixture(dimensions)
    x = oracle.sample(50, seeded(0)) + 0.3
    torch.testing.assert_close(oracle.log_prob(x), in_torch(oracle).log_prob(x), rtol=1e-10, atol=1e-10)


def test_samples_are_taken_with_their_weights_and_follow_their_components():
    oracle, n = mixture(2), 40_000
    x = oracle.sample(n, seeded(0))
    of = torch.cdist(x, oracle.means).argmin(dim=1)
    for j, (weight, mean, covariance) in enumerate(zip(oracle.weights, oracle.means, oracle.covariances, strict=True)):
        mine, deviations = x[of == j], covariance.diagonal().sqrt()
        count = len(mine)
        assert abs(count / n - weight) < 4 * math.sqrt(0.21 / n)
        assert bool(((mine.mean(dim=0) - mean).abs() < 4 * deviations / count**0.5).all())
        # standard error of an entry of a normal's covariance: ((c_ii c_jj + c_ij^2) / n)^(1/2)
        error = ((torch.outer(deviations, deviations) ** 2 + covariance**2) / count).sqrt()
        assert bool(((mine.T.cov() - covariance).abs() < 4 * error).all())


@all_processes
@pytest.mark.parametrize("t", [0.0004, 0.3, 0.8])
def test_noised_is_what_noise_makes_of_samples(process, t):
    """First and second moments of the whole batch; their standard errors are measured on it."""
    oracle, n = mixture(2), 40_000
    x0 = oracle.sample(n, seeded(1))
    x = process.add_noise(x0, torch.randn(n, 2, generator=seeded(2), dtype=torch.float64), t)
    expected = in_torch(oracle.noised(process, t))
    assert bool(((x.mean(dim=0) - expected.mean).abs() < 4 * x.std(dim=0) / n**0.5).all())
    squares = x**2
    second = expected.variance + expected.mean**2
    assert bool(((squares.mean(dim=0) - second).abs() < 4 * squares.std(dim=0) / n**0.5).all())
    product = x[:, 0] * x[:, 1]
    alpha, moments = process.alpha(t), oracle.covariances[:, 0, 1] + oracle.means[:, 0] * oracle.means[:, 1]
    assert abs(product.mean() - alpha**2 * oracle.weights @ moments) < 4 * product.std() / n**0.5


@all_processes
@pytest.mark.parametrize("t", [0.2, 0.7])
def test_noised_density_is_a_convolution(process, t):
    """p(x_t) = integral of p(x_0) N(x_t; alpha x_0, sigma^2) over x_0, by the trapezium rule, exact for such tails."""
    oracle = mixture(1)
    x0 = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    transition = torch.distributions.Normal(alpha * x0, sigma).log_prob(x[:, None])
    density = torch.trapezoid((in_torch(oracle).log_prob(x0[:, None]) + transition).exp(), x0)
    torch.testing.assert_close(oracle.noised(process, t).log_prob(x[:, None]), density.log(), rtol=0, atol=1e-9)


@all_processes
@pytest.mark.parametrize("shape", [(1,), (2,), (27,), (1, 3, 3, 3)])
def test_denoiser_is_tweedies_formula(process, shape):
    """E[x_0 | x_t] = (x_t + sigma^2 grad log p(x_t)) / alpha, a time for each sample."""
    oracle = mixture(math.prod(shape))
    times = torch.tensor([0.001, 0.02, 0.3, 0.6, 0.9], dtype=torch.float64)
    x0 = oracle.sample(5, seeded(0)).view(-1, *shape)
    x = process.add_noise(x0, torch.randn(x0.shape, generator=seeded(1), dtype=torch.float64), times).requires_grad_()
    for t, one, denoised in zip(times, x, oracle.denoiser(process)(x, times), strict=True):
        (score,) = torch.autograd.grad(oracle.noised(process, t).log_prob(one[None]).sum(), one)
        expected = (one + process.sigma(t) ** 2 * score) / process.alpha(t)
        torch.testing.assert_close(denoised, expected, rtol=1e-8, atol=1e-8)


@all_processes
def test_denoiser_of_points_is_their_average_by_likelihood(process):
    points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]], dtype=torch.float64)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    oracle = GaussianMixture.isotropic(weights, points, torch.zeros(3))
    x = torch.randn(6, 2, generator=seeded(0), dtype=torch.float64)
    for t in (0.0005, 0.1, 0.5):
        squares = (x[:, None] - process.alpha(t) * points).square().sum(dim=2)
        likelihoods = torch.softmax(weights.log() - squares / (2 * process.sigma(t) ** 2), dim=1)
        torch.testing.assert_close(oracle.denoiser(process)(x, t), likelihoods @ points, rtol=1e-9, atol=1e-9)


def test_denoiser_of_data_on_a_line_answers_on_the_line():
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    oracle = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.outer(direction, direction)[None])
    x0 = oracle.denoiser(VE())(torch.randn(8, 2, generator=seeded(0), dtype=torch.float64), 0.4)
    assert float((x0 @ torch.tensor([0.8, -0.6], dtype=torch.float64)).abs().max()) < 1e-12


@pytest.mark.parametrize("known", [[True, False, False], [False, True, True], [True, False, True]])
def test_conditional_is_the_ratio_of_densities(known):
    """p(a | b) = p(a, b) / p(b), with p(b) by summing p(a, b) over a grid of a. The components overlap."""
    apart, known = mixture(3), torch.tensor(known)
    oracle = GaussianMixture(apart.weights, apart.means, 20 * apart.covariances)
    values = torch.tensor([-0.7, 0.1, -0.6], dtype=torch.float64)
    axis = torch.linspace(-7, 7, 701, dtype=torch.float64)
    unknown = torch.cartesian_prod(*[axis] * int((~known).sum())).view(-1, int((~known).sum()))
    whole = values.expand(len(unknown), 3).clone()
    whole[:, ~known] = unknown
    joint = in_torch(oracle).log_prob(whole).exp()
    expected = joint / (joint.sum() * 0.02 ** unknown.shape[1])
    given = oracle.conditional(known, values)
    assert float(given.weights.min()) > 0.01
    torch.testing.assert_close(given.log_prob(unknown).exp(), expected, rtol=1e-8, atol=1e-12)


def test_shapes_and_weights_that_do_not_fit_are_refused():
    means, eye = torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)
    for weights, covariances in (
        (torch.ones(3) / 3, eye),
        (torch.ones(2) / 2, eye[:, :2]),
        (torch.ones(2) / 2, eye[:1]),
    ):
        with pytest.raises(ValueError, match="2 means in 3 dimensions"):
            GaussianMixture(weights, means, covariances)
    for weights in ([0.5, 0.6], [1.5, -0.5], [math.nan, 0.5]):
        with pytest.raises(ValueError, match="weights are not negative and sum to 1"):
            GaussianMixture(torch.tensor(weights), means, eye)
    for x in (torch.zeros(4, 2), torch.zeros(4, 1, 2, 2), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match="the mixture has 3 dimensions"):
            GaussianMixture(torch.ones(2) / 2, means, eye).log_prob(x)
        with pytest.raises(ValueError, match="the mixture has 3 dimensions"):
            GaussianMixture(torch.ones(2) / 2, means, eye).denoiser(VP())(x, 0.5)


@all_processes
def test_a_component_of_weight_zero_is_as_if_it_were_not_there(process):
    means, covariances = mixture(2).means, mixture(2).covariances
    oracle = GaussianMixture(torch.tensor([0.0, 1.0]), means, covariances)
    alone = GaussianMixture(torch.ones(1), means[1:], covariances[1:])
    x = means.repeat(3, 1) + 0.1 * torch.randn(6, 2, generator=seeded(0), dtype=torch.float64)
    torch.testing.assert_close(oracle.log_prob(x), alone.log_prob(x))
    torch.testing.assert_close(oracle.denoiser(process)(x, 0.3), alone.denoiser(process)(x, 0.3))
    assert float((oracle.sample(1000, seeded(0)) - means[0]).norm(dim=1).min()) > 0.5


def test_conditional_of_modes_so_far_that_one_has_no_density():
    """Means +-50, std 0.3: at x_1 = 49.8 the other mode's log density is lower by 55 000, its weight is exactly 0."""
    oracle = GaussianMixture.isotropic(
        torch.tensor([0.5, 0.5]), torch.tensor([[-50.0, 1.0], [50.0, 2.0]]), torch.tensor([0.3, 0.3])
    )
    given = oracle.conditional(torch.tensor([True, False]), torch.tensor([49.8, 0.0]))
    assert given.weights.tolist() == [0, 1]
    x = torch.tensor([[1.0], [2.0], [2.5]], dtype=torch.float64)
    expected = torch.distributions.Normal(2.0, 0.3).log_prob(x)[:, 0]
    torch.testing.assert_close(given.log_prob(x), expected, rtol=1e-6, atol=1e-6)
