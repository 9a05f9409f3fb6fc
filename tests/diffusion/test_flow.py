"""The probability-flow ODE: likelihood and encoding against the oracle."""

import math

import pytest
import torch

from medfusion.diffusion import (
    VE,
    VP,
    Denoiser,
    GaussianMixture,
    SubVP,
    bits_per_dimension,
    classifier_guided,
    log_likelihood,
    probability_flow,
    target,
)
from tests.diffusion.test_mixture import mixture, seeded

# The likelihood takes x_1 for pure noise: that of data of mean zero is, up to their variance beside that of the noise.
PROCESSES = {"vp-linear": VP("linear"), "vp-cosine": VP("cosine"), "sub-vp": SubVP(), "ve": VE(0.01, 1000.0)}
all_processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@pytest.mark.parametrize(
    ("process", "shape"),
    [
        pytest.param(process, shape, id=f"{name}-{math.prod(shape)}")
        for shape in ((1,), (2,), (1, 3, 3, 3))
        for name, process in PROCESSES.items()
    ],
)
def test_exact_likelihood_is_that_of_the_oracle(shape, process):
    """1e-3 nats per dimension, at samples and off them, with the trace exact."""
    dimensions = math.prod(shape)
    oracle, n = mixture(dimensions), 2 if dimensions == 27 else 10
    x = oracle.sample(n, seeded(0)).view(n, *shape)
    x = x + 0.1 * torch.randn(x.shape, generator=seeded(1), dtype=torch.float64)
    found = log_likelihood(oracle.denoiser(process), x, probes=None)
    assert found.shape == (n,)
    assert found.dtype == torch.float64
    expected = oracle.noised(process, 1 / process.steps).log_prob(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * dimensions)


@all_processes
def test_likelihood_of_noised_data_starts_at_their_time(process):
    oracle = mixture(2)
    x = oracle.noised(process, 0.3).sample(10, seeded(0))
    found = log_likelihood(oracle.denoiser(process), x, start=0.3, probes=None)
    torch.testing.assert_close(found, oracle.noised(process, 0.3).log_prob(x), rtol=0, atol=2e-3)


@pytest.mark.parametrize("process", [VP("cosine"), VE(0.01, 1000.0)], ids=["vp-cosine", "ve"])
def test_hutchinsons_likelihood_is_unbiased(process):
    """The mean over 100 copies of one sample, each with its own probes, within four standard errors of the oracle.

    With 8 probes instead of 1 their variance is an eighth: chi-square, relative standard error (4 / 100)^(1/2).
    """
    oracle, copies = mixture(2), 100
    one = torch.tensor([[0.3, -0.5]], dtype=torch.float64)
    expected = float(oracle.noised(process, 1 / process.steps).log_prob(one))
    variances = []
    for probes in (1, 8):
        found = log_likelihood(
            oracle.denoiser(process), one.expand(copies, 2), probes=probes, generators=[seeded(probes)]
        )
        assert float(found.mean()) == pytest.approx(expected, abs=4 * float(found.std()) / copies**0.5 + 1e-3)
        variances.append(float(found.var()))
    assert variances[0] / variances[1] == pytest.approx(8, rel=4 * math.sqrt(4 / copies))


@pytest.mark.parametrize("process", [VP("cosine"), SubVP("cosine"), VE(0.01, 1e4)], ids=["vp", "sub-vp", "ve"])
def test_likelihood_of_a_guided_denoiser_is_that_of_its_class(process):
    """Of components 0 and 2 of three: guidance that is exact makes the flow that of p(x | class).

    The mean of a class is not 0, as that of x_1 is taken to be; that makes less than 1e-3 where r(1) is 1e4 or more.
    """
    apart = mixture(2)
    means, covariances = (torch.cat([v, v[:1] + shift]) for v, shift in ((apart.means, 1.0), (apart.covariances, 0.0)))
    oracle = GaussianMixture(torch.tensor([0.2, 0.5, 0.3]), means, 10 * covariances)
    wanted = GaussianMixture(torch.tensor([0.4, 0.6]), means[::2], 10 * covariances[::2])

    def log_probability(x, t):  # by Bayes' rule
        return wanted.noised(process, t[0]).log_prob(x) + math.log(0.5) - oracle.noised(process, t[0]).log_prob(x)

    x = oracle.sample(6, seeded(0))
    guided = classifier_guided(oracle.denoiser(process), log_probability)
    expected = wanted.noised(process, 1 / process.steps).log_prob(x)
    torch.testing.assert_close(log_likelihood(guided, x, probes=None), expected, rtol=0, atol=1e-3)
    assert float((expected - oracle.log_prob(x)).abs().min()) > 0.1


def test_likelihood_needs_a_network_that_is_differentiable():
    """Without a graph the divergence would be that of the drift alone."""
    exact = mixture(2).denoiser(VP())
    blind = Denoiser(torch.no_grad()(exact.network), VP(), "x0")
    for probes in (None, 1):
        with pytest.raises(ValueError, match="differentiable"):
            log_likelihood(blind, torch.zeros(2, 2), probes=probes, generators=[seeded(0)])
    with torch.no_grad():  # which is the caller's, and no matter
        assert not log_likelihood(exact, torch.zeros(1, 2), start=0.9, probes=None).requires_grad


@pytest.mark.parametrize("process", [VP("cosine")])
def test_hutchinsons_probes_follow_the_sample_and_not_the_batch(process):
    oracle = mixture(2)
    x = oracle.sample(3, seeded(0))
    together = log_likelihood(oracle.denoiser(process), x, generators=[seeded(k) for k in range(3)])
    alone = log_likelihood(oracle.denoiser(process), x[1:2], generators=[seeded(1)])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-3)


def test_bits_per_dimension_of_uniform_bytes_is_8():
    assert float(bits_per_dimension(torch.tensor([-27 * math.log(256)]), 27)) == pytest.approx(8)


def test_bits_per_dimension_of_a_normal_is_its_entropy_on_average():
    """log2(2 pi e) / 2 = 2.047 for variance 1."""
    normal = GaussianMixture.isotropic(torch.ones(1), torch.zeros(1, 27), torch.ones(1))
    x, n = normal.sample(400, seeded(0)), 400
    bits = bits_per_dimension(normal.log_prob(x), 27)
    assert float(bits.mean()) == pytest.approx(
        0.5 * math.log2(2 * math.pi * math.e), abs=4 * float(bits.std()) / n**0.5
    )


@all_processes
@pytest.mark.parametrize("shape", [(1,), (2,), (1, 3, 3, 3)], ids=["1", "2", "27"])
def test_decoding_an_encoding_returns_the_image(shape, process):
    n, dimensions = 20, math.prod(shape)
    denoise = mixture(dimensions).denoiser(process)
    x = mixture(dimensions).sample(n, seeded(0)).view(n, *shape)
    code = probability_flow(denoise, x, 1 / process.steps, 1.0)
    back = probability_flow(denoise, code, 1.0, 1 / process.steps)
    assert float((back - x).abs().max()) < 1e-3
    assert float((code - x).abs().max()) > 0.1


@all_processes
def test_encoding_of_gaussian_data_is_their_quantile(process):
    """The flow keeps x_t at the same number of standard deviations from its mean."""
    oracle = GaussianMixture.isotropic(torch.ones(1), torch.tensor([[0.3]]), torch.tensor([0.5]))
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    place = {}
    for t in (1 / process.steps, 0.5, 1.0):
        noised = oracle.noised(process, t)
        place[t] = noised.means + noised.covariances[0].sqrt() * z
    start = place[1 / process.steps]
    for t in (0.5, 1.0):
        code = probability_flow(oracle.denoiser(process), start, 1 / process.steps, t, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(code, place[t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "edm"])
def test_encoding_is_that_of_the_data_and_not_of_the_network(prediction):
    """Networks that agree on E[x_0 | x_t] in whatever words give one code, which is unique (Song et al. 2021b)."""
    process = VP("cosine")
    first = mixture(2).denoiser(process)

    def network(seen, log_noise_ratio):
        t = process.time_of(log_noise_ratio.exp().clamp(max=float(process.noise_ratio(1.0))))
        x = seen
        if prediction == "edm":  # it is shown y / (r^2 + sigma_data^2)^(1/2)
            ratio = process.noise_ratio(t)
            x = seen * (process.alpha(t) * (ratio**2 + 0.25).sqrt())[:, None]
        x0 = first(x, t)
        noise = (x - process.alpha(t)[:, None] * x0) / process.sigma(t)[:, None]
        return target(prediction, process, x0, noise, t)

    x = mixture(2).sample(10, seeded(0))
    codes = [
        probability_flow(denoise, x, 1 / process.steps, 1.0, rtol=1e-6, atol=1e-6)
        for denoise in (first, Denoiser(network, process, prediction))
    ]
    torch.testing.assert_close(*codes, rtol=0, atol=1e-4)


def test_callback_sees_every_evaluation():
    process, seen = VP("cosine"), []
    x = mixture(2).sample(4, seeded(0))
    probability_flow(mixture(2).denoiser(process), x, 0.1, 0.5, callback=lambda k, x: seen.append((k, x)))
    assert [k for k, _ in seen] == list(range(len(seen)))
    torch.testing.assert_close(seen[0][1], x)
    assert all(here.shape == x.shape and not here.requires_grad for _, here in seen)


@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 1.0), (0.5, 1.5), (-0.1, 0.5), (1.0, 0.0), (0.5, 0.5), (math.nan, 1.0)]
)
def test_times_the_flow_cannot_run_between_are_refused(start, end):
    with pytest.raises(ValueError, match="two times in"):
        probability_flow(mixture(2).denoiser(VP()), torch.zeros(1, 2), start, end)
    if end == 1.0:
        with pytest.raises(ValueError, match="two times in"):
            log_likelihood(mixture(2).denoiser(VP()), torch.zeros(1, 2), start=start, probes=None)


def test_output_that_is_not_finite_stops_the_flow():
    broken = Denoiser(lambda x, log_noise_ratio: x * math.nan, VP("cosine"), "v")
    with pytest.raises(FloatingPointError, match="not finite"):
        probability_flow(broken, torch.zeros(1, 2), 0.9, 0.1)


def test_probes_need_a_generator_a_sample_or_one():
    with pytest.raises(ValueError, match="3 sample"):
        log_likelihood(mixture(2).denoiser(VP()), torch.zeros(3, 2))


def test_half_precision_is_widened():
    halved = Denoiser(lambda x, log_noise_ratio: torch.tanh(x.bfloat16()), VP("cosine"), "x0")
    exact = Denoiser(lambda x, log_noise_ratio: torch.tanh(x), VP("cosine"), "x0")
    x = torch.randn(4, 2, generator=seeded(0)).bfloat16()
    ours = probability_flow(halved, x, 0.5, 0.1, rtol=1e-2, atol=1e-2)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, probability_flow(exact, x.float(), 0.5, 0.1), rtol=0, atol=0.02)
