"""Orders of convergence; points and Gaussian data, on which it is known what mean and variance a sampler gives."""

import math
from itertools import pairwise

import pytest
import torch

from medfusion.diffusion import (
    VP,
    Denoiser,
    GaussianMixture,
    ddpm,
    heun,
    langevin,
    noise_like,
    probability_flow,
    time_steps,
)
from tests.diffusion.test_mixture import PROCESSES, all_processes, seeded
from tests.diffusion.test_samplers import SAMPLERS


def gaussian(mean, std):
    return GaussianMixture.isotropic(torch.ones(1), torch.tensor([[mean]], dtype=torch.float64), torch.tensor([std]))


def walk_of_gaussian(step, denoise, times, mean, variance):
    """Mean and variance that a sampler gives normal samples, without drawing any.

    For Gaussian data one step is x -> a x + b + c z: its answers to x = 0, x = 1 and another z give a, b and c.
    """
    x = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    z = noise_like(x, [seeded(0), seeded(0), seeded(1)])
    for t, s in pairwise(times):
        zero, one, other = step(denoise, x, torch.stack([t, s]), [seeded(0), seeded(0), seeded(1)])
        a, c = one - zero, (other - zero) / (z[2] - z[0])
        mean, variance = a * mean + zero - c * z[0], a**2 * variance + c**2
    return float(mean), float(variance)


def falling_log_ratio(process, start, end, steps):
    """Times from start to end > 0, evenly spaced in log SNR: without the jump to the clean image."""
    high, low = process.log_noise_ratio(start), process.log_noise_ratio(end)
    times = process.time_of(torch.linspace(high, low, steps + 1, dtype=torch.float64).exp())
    times[0], times[-1] = start, end
    return times


@all_processes
@pytest.mark.parametrize("name", ["ddpm-small", "ddpm-large", "ddim-stochastic", "euler-maruyama"])
def test_stochastic_samplers_are_of_weak_order_one(name, process):
    """On Gaussian data the error of the variance falls as 1 / steps, slope 1 within 0.25; the mean is exact.

    Only the drift, which Euler-Maruyama alone sees, gives the mean an error, of the same order. Slopes are constant
    between two of 1000 grid points: half-way they are those of a smooth schedule, which the order is about.
    """
    oracle, start, end = gaussian(0.3, 0.5), 0.9005, 0.5005
    first, last = oracle.noised(process, start), oracle.noised(process, end)
    counts, errors = [20, 40, 80], []
    for count in counts:
        times = falling_log_ratio(process, start, end, count)
        if name == "euler-maruyama":
            times = torch.linspace(start, end, count + 1, dtype=torch.float64)
        mean, variance = walk_of_gaussian(
            SAMPLERS[name], oracle.denoiser(process), times, float(first.means), float(first.covariances)
        )
        errors.append([abs(variance - float(last.covariances)), abs(mean - float(last.means))])
    of_variance, of_mean = slopes(counts, errors)
    assert of_variance == pytest.approx(1, abs=0.25)
    assert of_mean == pytest.approx(1, abs=0.25) or max(error for _, error in errors) < 1e-10


def slopes(counts, errors):
    """Of log error against - log steps, by least squares, for each column of errors."""
    logs = -torch.tensor(counts).double().log()
    centred = logs - logs.mean()
    return (centred @ torch.tensor(errors).double().log() / centred.square().sum()).tolist()


DETERMINISTIC = {"ddim": 1, "heun": 2, "dpm-solver": 2}


@all_processes
@pytest.mark.parametrize("end", [0.05, 0.0])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_keep_the_noise_around_a_point(name, end, process):
    """x_s = alpha_s x_0 + sigma_s eps with the eps that they began with, in however few steps."""
    x0, noise = torch.full((5, 1), -1.2, dtype=torch.float64), torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    times = torch.tensor([0.4, 0.3, 0.15, end], dtype=torch.float64)
    x = SAMPLERS[name](gaussian(-1.2, 0.0).denoiser(process), process.add_noise(x0, noise, 0.4), times, [])
    torch.testing.assert_close(x, process.add_noise(x0, noise, end), rtol=1e-9, atol=1e-9)


def after_langevin(w, h, steps):
    """Variance of the noise in units of sigma^2 that steps of the size h sigma^2 leave of w."""
    for _ in range(steps):
        w = (1 - h / 2) ** 2 * w + h
    return w


# Of w at t and q = (r_s / r_t)^2, as every mean is exact: w at s, which stays 1 where a sampler is exact.
AROUND_A_POINT = {
    "ddim-stochastic": lambda w, q, growth: w,
    "ddpm-small": lambda w, q, growth: q * w + 1 - q,
    "ddpm-large": lambda w, q, growth: q * w + (1 - q) / growth,
    "predictor-corrector": lambda w, q, growth: after_langevin(q * w + (1 - q) / growth, 0.1, 1),
    "annealed-langevin": lambda w, q, growth: after_langevin(w, 1.0, 4) / q,
}


@all_processes
@pytest.mark.parametrize("name", AROUND_A_POINT)
def test_stochastic_samplers_leave_the_noise_around_a_point_that_they_should(name, process):
    """(x_s - alpha_s x_0) / sigma_s has the mean 0 and the variance w: of 20 000, within four standard errors."""
    n, w, times = 20_000, 1.0, torch.tensor([0.4, 0.35, 0.3, 0.25], dtype=torch.float64)
    for t, s in pairwise(times):
        q, growth = ((f(s) / f(t)) ** 2 for f in (process.noise_ratio, process.sigma))
        w = float(AROUND_A_POINT[name](w, q, growth))
    x0 = torch.full((n, 1), -1.2, dtype=torch.float64)
    x = process.add_noise(x0, torch.randn(n, 1, generator=seeded(0), dtype=torch.float64), 0.4)
    x = SAMPLERS[name](gaussian(-1.2, 0.0).denoiser(process), x, times, [seeded(1)])
    noise = (x - process.alpha(0.25) * x0) / process.sigma(0.25)
    assert float(noise.mean()) == pytest.approx(0, abs=4 * (w / n) ** 0.5)
    assert float(noise.var()) == pytest.approx(w, rel=4 * (2 / n) ** 0.5)


@all_processes
@pytest.mark.parametrize(("name", "order"), DETERMINISTIC.items(), ids=DETERMINISTIC.keys())
def test_order_of_convergence(name, order, process):
    """Error against the flow solved to 1e-8, on a mixture that is smooth: slope as it should be, within 0.25."""
    oracle = GaussianMixture.isotropic(
        torch.tensor([0.4, 0.6]), torch.tensor([[-0.6, 0.3], [0.4, -0.2]]), torch.tensor([0.4, 0.5])
    )
    denoise, start, end = oracle.denoiser(process), 0.9, 0.3
    x = oracle.noised(process, start).sample(20, seeded(0))
    exact = probability_flow(denoise, x, start, end, rtol=1e-8, atol=1e-8)
    counts, errors = [20, 40, 80], []
    for count in counts:
        ours = SAMPLERS[name](denoise, x, falling_log_ratio(process, start, end, count), [])
        errors.append([float((ours - exact).norm())])
    assert slopes(counts, errors)[0] == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(
    ("process", "variance", "std"),
    [(process, *case) for process in PROCESSES.values() for case in (("small", 0.0), ("learned", 0.4))]
    + [(VP(schedule), "large", 1.0) for schedule in ("linear", "cosine")],
)
def test_ancestral_sampling_is_exact_where_its_variance_is_right(process, variance, std):
    """In however few steps: "small" for a point, "large" for data like white noise, "learned" for a normal in between.

    x_s given x_t has the posterior's variance and that of x_0 given x_t, (alpha^2 / sigma^2 + 1 / std^2)^(-1), seen
    through the posterior's mean. "large" is right under VP alone, which leaves white noise as it is.
    """
    oracle, times = gaussian(0.3 if std < 1 else 0.0, std), torch.tensor([0.9, 0.6, 0.35, 0.1], dtype=torch.float64)
    exact = oracle.denoiser(process)

    def step(denoise, x, pair, generators):
        (small, large), x0_variance = reverse_variances(process, *pair.flip(0)), 0.0
        if std > 0:
            x0_variance = 1 / (process.alpha(pair[0]) ** 2 / process.sigma(pair[0]) ** 2 + 1 / std**2)
        weight = process.posterior(torch.ones(1, 1), torch.zeros(1, 1), pair[1], pair[0])[0].double()
        position = 2 * ((small + weight**2 * x0_variance).log() - small.log()) / (large.log() - small.log()) - 1

        def network(x, log_noise_ratio):
            return torch.cat([denoise.network(x, log_noise_ratio), position.expand_as(x)], dim=1)

        learned = Denoiser(network, process, "x0", learned_variance=True)
        return ddpm(learned, x, pair, variance=variance, generators=generators)

    first, last = oracle.noised(process, times[0]), oracle.noised(process, times[-1])
    mean, found = walk_of_gaussian(step, exact, times, float(first.means), float(first.covariances))
    assert mean == pytest.approx(float(last.means), rel=1e-6, abs=1e-6)
    assert found == pytest.approx(float(last.covariances), rel=1e-6)


def reverse_variances(process, s, t):
    """The small and the large one, from alpha and sigma (Ho et al. 2020, eq. 7 and section 3.2)."""
    forward = process.sigma(t) ** 2 - (process.alpha(t) / process.alpha(s)) ** 2 * process.sigma(s) ** 2
    return forward * (process.sigma(s) / process.sigma(t)) ** 2, forward


@all_processes
def test_langevin_has_the_stationary_variance_of_its_recursion(process):
    """For variance v and a size of h v a step is x -> (1 - h / 2) x + (h v)^(1/2) z, at rest at v / (1 - h / 4)."""
    t, h = 0.4, 0.3
    noised = gaussian(0.0, 0.5).noised(process, t)
    v = float(noised.covariances)
    denoise = gaussian(0.0, 0.5).denoiser(process)

    def step(denoise, x, pair, generators):
        return langevin(denoise, x, t, step_size=h * v, steps=1, generators=generators)

    mean, variance = walk_of_gaussian(step, denoise, torch.linspace(1, 0, 101).double(), 5.0, 0.0)
    assert variance == pytest.approx(v / (1 - h / 4), rel=1e-9)
    assert mean == pytest.approx(5 * (1 - h / 2) ** 100, abs=1e-9)


@pytest.mark.parametrize("start", [0.05, 0.2, 0.5])
@all_processes
def test_partial_noising_comes_home(process, start):
    """The flow keeps quantiles, so x_t comes back as correlated with x_0 as x_t is, alpha std / std(x_t).

    The mean squared error is 2 std^2 (1 - that), within four standard errors and a twentieth for the steps.
    """
    std = 0.5
    oracle, n = gaussian(0.0, std), 4000
    x0 = oracle.sample(n, seeded(0))
    x = process.add_noise(x0, torch.randn(n, 1, generator=seeded(1), dtype=torch.float64), start)
    back = heun(oracle.denoiser(process), x, time_steps(process, 40, "log_snr", start=start))
    alpha, sigma = float(process.alpha(start)), float(process.sigma(start))
    expected = 2 * std**2 * (1 - alpha * std / math.hypot(alpha * std, sigma))
    squares = (back - x0).square()
    assert float(squares.mean()) == pytest.approx(expected, abs=4 * float(squares.std()) / n**0.5 + 0.05 * expected)
