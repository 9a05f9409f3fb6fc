"""Objectives: known weights, the gradient of score matching, and the variational bound, against closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.stats import kstest
from scipy.stats import norm as normal
from torch import nn
from torch.distributions import Normal, kl_divergence

from medfusion.diffusion import (
    VE,
    VP,
    Denoiser,
    GaussianMixture,
    ImportanceSampler,
    bound_term,
    hybrid_loss,
    lognormal_times,
    noise_like,
    prior_term,
    regression_loss,
    target,
    variational_bound,
)
from medfusion.diffusion.denoiser import reverse_variance
from tests.diffusion.test_denoiser import PREDICTIONS, THREE, batch, wide, written_out
from tests.diffusion.test_process import close

WEIGHTINGS = ["simple", "score_matching", "likelihood", "min_snr", "edm"]
LINE = GaussianMixture.isotropic(*(torch.tensor(v).double() for v in ([0.5, 0.5], [[-0.4], [0.4]], [0.2, 0.3])))
PLANE = GaussianMixture(
    torch.tensor([0.5, 0.25, 0.25]),
    torch.tensor([[0.5, 0.5], [-0.5, -0.5], [-0.5, -0.5]]),
    torch.tensor([[[0.1, 0.05], [0.05, 0.1]], [[0.2, 0.0], [0.0, 0.04]], [[0.05, 0.0], [0.0, 0.05]]]),
)  # both of mean zero, as x_1 is in the bound


def average(loss):
    return loss.flatten(1).mean(dim=1)


def estimate_of_x0(x):
    """Some function D(x_t), no good as a denoiser."""
    return torch.tanh(x) + 0.1


def expressed_in(prediction, process, t):
    """The denoiser with D = estimate_of_x0, as a network that predicts this."""

    def network(seen, log_noise_ratio):
        alpha, r = wide(process.alpha(t)), wide(process.noise_ratio(t))
        x = seen * alpha * (r**2 + 0.25).sqrt() if prediction == "edm" else seen
        x0 = estimate_of_x0(x)
        return written_out(prediction, process, x0, (x - alpha * x0) / (alpha * r), t)

    return Denoiser(network, process, prediction)


# Regressions


@THREE
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_true_answer_costs_nothing_and_an_offset_its_square(process, prediction):
    x0, noise, t = batch(process, [0.1, 1.0, 10.0])
    for offset in (0.0, 0.5):
        answer = target(prediction, process, x0, noise, t) + offset
        denoise = Denoiser(lambda x, r, answer=answer: answer, process, prediction)
        close(regression_loss(denoise, x0, noise, t), [offset**2] * 3)


@THREE
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_the_known_weight_of_the_error_of_x0(process, prediction):
    """The same D costs the same in every parametrisation, but for "simple", which weights the network's own output."""
    x0, noise, t = batch(process, [0.01, 0.1, 0.5, 1.0, 10.0])
    r, sigma, alpha = process.noise_ratio(t), process.sigma(t), process.alpha(t)
    error = average((x0 - estimate_of_x0(process.add_noise(x0, noise, t))) ** 2)
    weights = {
        "score_matching": 1 / r**2,
        "likelihood": process.diffusion(t) ** 2 / 2 * (alpha / sigma**2) ** 2,
        "min_snr": torch.minimum(1 / r**2, torch.tensor(5.0)),
        "edm": (r**2 + 0.25) / (0.5 * r) ** 2,
        "simple": {
            "epsilon": 1 / r**2,
            "x0": torch.ones_like(r),
            "v": 1 / sigma**2 if isinstance(process, VP) else (alpha / r + sigma) ** 2,
            "score": (alpha / sigma**2) ** 2,
            "edm": (r**2 + 0.25) / (0.5 * r) ** 2,
        }[prediction],
    }
    for weighting in WEIGHTINGS:
        loss = regression_loss(expressed_in(prediction, process, t), x0, noise, t, weighting)
        close(loss, weights[weighting] * error, rtol=1e-8)


@THREE
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_score_matching_and_likelihood_weight_the_error_of_the_score(process, prediction):
    """sigma^2 |s - grad log q(x_t | x_0)|^2 and g^2 / 2 times the same."""
    x0, noise, t = batch(process, [0.05, 0.5, 1.0, 10.0])
    denoise = expressed_in(prediction, process, t)
    x = process.add_noise(x0, noise, t)
    error = average((denoise.score(x, t) + noise / wide(process.sigma(t))) ** 2)
    for weighting, weight in (("score_matching", process.sigma(t)), ("likelihood", process.diffusion(t) / 2**0.5)):
        close(regression_loss(denoise, x0, noise, t, weighting), weight**2 * error, rtol=1e-8)


def test_min_snr_caps_where_asked():
    x0, noise, t = batch(VP(), [0.1, 0.5, 2.0])
    denoise = expressed_in("x0", VP(), t)
    plain = regression_loss(denoise, x0, noise, t)
    close(regression_loss(denoise, x0, noise, t, "min_snr", gamma=3.0) / plain, [3.0, 3.0, 0.25])
    close(regression_loss(denoise, x0, noise, t, "min_snr") / plain, [5.0, 4.0, 0.25])


HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


@THREE
@HALVES
def test_images_and_noise_in_half_precision_cost_what_they_cost_in_float32(half, process):
    """The exact answer for points +-1, eps = (x_t - alpha sign(x_t)) / sigma, shows what x_t has lost.

    In float32 that is 1e-7 / sigma, of which the square is 1e-11 at most; x_t in bfloat16 would lose 4e-3 / sigma.
    """
    x0, noise, t = batch(process, [0.03, 0.1, 0.2])
    x0, noise = x0.sign().to(half), noise.to(half)

    def network(x, log_noise_ratio):
        alpha, sigma = wide(process.alpha(t)), wide(process.sigma(t))
        return (x - alpha * x.sign()) / sigma

    exact = Denoiser(network, process, "epsilon")
    for weighting in ("simple", "score_matching"):
        assert float(regression_loss(exact, x0, noise, t, weighting).max()) < 1e-9
    denoise, step = learned(process), torch.tensor([1, 500, 1000])
    for loss in (
        lambda x0, noise: regression_loss(Denoiser(lambda x, r: torch.tanh(x), process, "v"), x0, noise, t, "edm"),
        lambda x0, noise: bound_term(denoise, x0, noise, step, "small"),
        lambda x0, noise: hybrid_loss(denoise, x0, noise, step),
    ):
        close(loss(x0, noise), loss(x0.float(), noise.float()), rtol=0, atol=0)


@HALVES
def test_bound_and_hybrid_are_finite_in_half_precision_for_much_and_little_noise(half):
    """Variances of 1e-6 and 2500 and what they are divided by are beyond float16."""
    process, step = VE(0.001, 50.0), torch.tensor([1, 2, 3, 500, 1000])
    x0, noise = torch.randn(2, 5, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(half)
    for variance in ("small", "large", "learned"):
        assert bool(torch.isfinite(bound_term(learned(process), x0, noise, step, variance)).all())
    assert bool(torch.isfinite(hybrid_loss(learned(process), x0, noise, step)).all())


def test_unknown_weighting_is_refused():
    x0, noise, t = batch(VP(), [1.0])
    with pytest.raises(ValueError, match="'snr' is none of"):
        regression_loss(expressed_in("v", VP(), t), x0, noise, t, "snr")


# Why noise: the score that cannot be known, and the one that can


def trapezoid(half_width, number):
    """Nodes and weights: for smooth functions that vanish at both ends its error is exponentially small."""
    nodes = torch.linspace(-half_width, half_width, number, dtype=torch.float64)
    return nodes, (nodes[1] - nodes[0]).expand(number)


@THREE
def test_denoising_score_matching_has_the_gradient_of_score_matching(process):
    """Vincent 2011: E |s - grad log p(x_t)|^2 and E |s - grad log q(x_t | x_0)|^2 differ by what no parameter moves.

    With the weight sigma^2 the difference is 1 - sigma^2 I, I = E |grad log p(x_t)|^2 the Fisher information. All
    expectations are integrals in float64, over x_t on the one hand, over x_0 and noise on the other.
    """
    t = process.time_of(0.8)
    noised, sigma = LINE.noised(process, t), float(process.sigma(t))
    x, step = trapezoid(12 * float(process.alpha(t)), 3001)
    x = x[:, None].requires_grad_()
    log_p = noised.log_prob(x)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    x, mass = x.detach(), log_p.detach().exp() * step

    nodes, step = trapezoid(6, 401)
    x0, noise = (v.reshape(-1, 1) for v in torch.meshgrid(nodes / 2, nodes * 4 / 3, indexing="ij"))
    joint = LINE.log_prob(x0).exp() * Normal(0.0, 1.0).log_prob(noise)[:, 0].exp() * step[0] ** 2 * (2 / 3)
    assert [float(mass.sum()), float(joint.sum())] == pytest.approx([1, 1], abs=1e-10)

    constant = 1 - sigma**2 * float((mass * score[:, 0] ** 2).sum())
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        denoise = Denoiser(lambda x, r, network=network: network(x), process, "score")
        naive = sigma**2 * (mass * (network(x) - score)[:, 0] ** 2).sum()
        denoising = (joint * regression_loss(denoise, x0, noise, t, "score_matching")).sum()
        assert constant > 0.05
        assert float((denoising - naive).detach()) == pytest.approx(constant, abs=1e-8)
        gradients = (torch.autograd.grad(value, list(network.parameters())) for value in (naive, denoising))
        for one, other in zip(*gradients, strict=True):
            assert float(one.abs().max()) > 1e-3
            close(one, other, rtol=0, atol=1e-8)


# The variational bound


def learned(process):
    """A network that learns the variance too: x_0 = tanh(x_t) + 0.1, and a fraction that varies between the voxels."""
    return Denoiser(lambda x, r: torch.cat([estimate_of_x0(x), torch.sin(x)], dim=1), process, "x0", True)


@THREE
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_terms_are_the_divergences_of_their_normals(process, variance):
    """KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)) by torch.distributions, and for k = 1 - log p(x_0 | x_1)."""
    denoise, step = learned(process), torch.tensor([1, 2, 7, 500, 999, 1000])
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 1, 3, 3, 3, generator=generator, dtype=torch.float64)
    term = bound_term(denoise, x0, noise, step, variance)
    for i, k in enumerate(step.tolist()):
        s, t = (k - 1) / 1000, k / 1000
        x = process.add_noise(x0[i : i + 1], noise[i : i + 1], t)
        guess, fraction = denoise.estimate(x, t)
        mean, true_variance = process.posterior(x0[i : i + 1], x, s, t)
        model_variance = reverse_variance(process, s, t, variance, fraction)
        model = Normal(process.posterior(guess, x, s, t)[0], model_variance.sqrt().expand_as(x))
        if k == 1:
            expected = -model.log_prob(x0[i : i + 1])
        else:
            expected = kl_divergence(Normal(mean, true_variance.sqrt().expand_as(x)), model)
        close(term[i], expected.mean(), rtol=1e-7)


@THREE
def test_prior_term_is_the_divergence_from_pure_noise(process):
    x0, sigma = torch.randn(3, 1, 4, 4, 4, dtype=torch.float64), process.sigma(1.0)
    close(prior_term(process, x0), average(kl_divergence(Normal(process.alpha(1.0) * x0, sigma), Normal(0.0, sigma))))


def test_bound_is_all_terms_in_bits_and_refuses_steps_that_are_none():
    process = VP("cosine", 5)
    x0, denoise = torch.rand(3, 1, 2, 2, 2, dtype=torch.float64), learned(process)
    bound = variational_bound(denoise, x0.requires_grad_(), "learned", generators=[torch.Generator().manual_seed(3)])
    assert not bound.requires_grad
    x0 = x0.detach()
    generator = torch.Generator().manual_seed(3)
    terms = [bound_term(denoise, x0, noise_like(x0, [generator]), torch.full((3,), k), "learned") for k in range(1, 6)]
    close(bound, torch.stack([*terms, prior_term(process, x0)], dim=1) / math.log(2))
    for k in (0, 6):
        with pytest.raises(ValueError, match="1 to 5"):
            bound_term(denoise, x0, x0, torch.tensor([1, 2, k]))


def exact_gap(steps, variance):
    """Bound minus E[- log p(x_0)] for ``LINE`` and its own denoiser, in nats; expectations as integrals, to 1e-4."""
    process = VP("cosine", steps)
    nodes, step = trapezoid(6, 31)
    z, noise = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    mass = (Normal(0.0, 1.0).log_prob(z) + Normal(0.0, 1.0).log_prob(noise))[:, 0].exp() * step[0] ** 2
    x0 = torch.cat(
        [mean + covariance.sqrt() * z for mean, covariance in zip(LINE.means, LINE.covariances, strict=True)]
    )
    noise, mass = noise.repeat(2, 1), mass.repeat(2) / 2
    gap = prior_term(process, x0) + LINE.log_prob(x0)
    for k in range(1, steps + 1):
        gap += bound_term(LINE.denoiser(process), x0, noise, torch.full((len(x0),), k), variance)
    return float((mass * gap).sum())


def test_bound_lies_above_the_likelihood_and_tightens_with_the_number_of_steps():
    """With the large variance, the right one for short steps, the gap goes to zero like 1 / T; not with the small one.

    While the data look flat, the small variance of step k is a fraction of the right one that T does not change.
    """
    gaps = [exact_gap(steps, "large") for steps in (10, 30, 100, 300)]
    assert all(later < 0.45 * earlier for earlier, later in pairwise(gaps))
    assert 0 < gaps[-1] < 0.01
    assert exact_gap(30, "small") > gaps[1]


@pytest.mark.parametrize("variance", ["small", "large"])
def test_bound_lies_above_the_likelihood_in_the_plane(variance):
    """Of 4000 samples, with 4 standard errors of the mean, which are measured (0.02 to 0.03 bits)."""
    generator, process = torch.Generator().manual_seed(0), VP("cosine", 100)
    x0 = PLANE.sample(4000, generator)
    bound = variational_bound(PLANE.denoiser(process), x0, variance, generators=[generator])
    gap = bound.sum(dim=1) + PLANE.log_prob(x0) / (2 * math.log(2))
    error = float(gap.std()) / math.sqrt(len(gap))
    assert error < 0.04
    assert float(gap.mean()) > -4 * error
    if variance == "large":
        assert float(gap.mean()) < 0.05 + 4 * error


@pytest.mark.parametrize("variance", ["small", "large"])
def test_every_term_of_gaussian_data_is_its_closed_form(variance):
    """x_0 ~ N(0, v): E |x_0 - D|^2 = v (1 - a) / (v a + 1 - a), a = alpha_bar; each term within 5 standard errors."""
    v, steps = 0.25, 50
    process, generator = VP("cosine", steps), torch.Generator().manual_seed(0)
    data = GaussianMixture.isotropic(torch.ones(1), torch.zeros(1, 8), torch.tensor([v**0.5]))
    bound = variational_bound(data.denoiser(process), data.sample(4000, generator), variance, generators=[generator])

    beta = process.beta
    a = torch.cumprod(1 - beta, dim=0)
    before = torch.cat([torch.ones(1), a[:-1]])
    error = v * (1 - a) / (v * a + 1 - a)
    posterior = beta * (1 - before) / (1 - a)
    model = beta if variance == "large" else torch.cat([posterior[1:2], posterior[1:]])
    expected = 0.5 * (model / posterior).log() + 0.5 * (posterior / model - 1)
    expected = expected + before * beta**2 / (1 - a) ** 2 * error / (2 * model)
    expected[0] = 0.5 * (2 * math.pi * model[0]).log() + error[0] / (2 * model[0])
    expected = torch.cat([expected, v * a[-1:] / (2 * (1 - a[-1:]))]) / math.log(2)
    deviation = (bound.mean(dim=0) - expected) / (bound.std(dim=0) / math.sqrt(len(bound)))
    assert float(deviation.abs().max()) < 5
    entropy = 0.5 * math.log2(2 * math.pi * math.e * v)
    assert float(expected.sum()) > entropy
    assert variance == "small" or float(expected.sum()) < entropy + 0.1


# The hybrid objective, and which times are drawn


@THREE
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_hybrid_trains_the_mean_by_the_simple_loss_and_the_variance_by_the_bound(process, prediction):
    a, c = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, 1.3))
    denoise = Denoiser(lambda x, r: torch.cat([a * x, torch.sin(c * x)], dim=1), process, prediction, True)
    step = torch.tensor([1, 2, 300, 1000])
    x0, noise = torch.randn(2, 4, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    simple = regression_loss(denoise, x0, noise, step / 1000.0)
    term = bound_term(denoise, x0, noise, step, "learned")
    hybrid = hybrid_loss(denoise, x0, noise, step, weight=0.01)
    close(hybrid, simple + 0.01 * 1000 * term, rtol=1e-6)
    of_mean, of_variance = torch.autograd.grad(hybrid.sum(), (a, c))
    close(of_mean, torch.autograd.grad(simple.sum(), a)[0], rtol=1e-6)
    close(of_variance, 10 * torch.autograd.grad(term.sum(), c)[0], rtol=1e-6)
    assert float(of_variance.abs()) > 1e-6


def test_hybrid_without_learned_variance_is_refused():
    with pytest.raises(ValueError, match="needs a denoiser with learned variance"):
        hybrid_loss(Denoiser(lambda x, r: x, VP(), "v"), *torch.zeros(2, 1, 1, 4), torch.tensor([3]))


def test_importance_sampling_is_unbiased_with_less_variance_than_uniform_draws():
    """Terms that fall like 1 / k, times noise of mean one: 20000 draws, 4 standard errors of the weighted mean."""
    generator, size = torch.Generator().manual_seed(0), 1 / torch.arange(1, 51, dtype=torch.float64)
    sampler = ImportanceSampler(50, history=4)

    def term(step):
        return size[step - 1] * (0.5 + torch.rand(len(step), generator=generator, dtype=torch.float64))

    for seen in range(4):
        close(sampler.probabilities, [0.02] * 50)
        assert set(sampler.draw(50, generator)[1].tolist()) == {1.0}
        step = torch.arange(1, 51)
        sampler.update(step, term(step) if seen > 0 else torch.full((50,), 1e6))
    sampler.update(step, term(step))  # which forgets the oldest
    root = sampler.losses.square().mean(dim=1).sqrt()
    assert float(sampler.losses.max()) < 2
    close(sampler.probabilities, 0.999 * root / root.sum() + 0.001 / 50)
    step, weight = sampler.draw(20000, generator)
    close(weight, 1 / (50 * sampler.probabilities[step - 1]))
    weighted, uniform = weight * term(step), term(torch.randint(1, 51, (20000,), generator=generator))
    assert float(weighted.mean()) == pytest.approx(float(size.mean()), abs=4 * float(weighted.std()) / math.sqrt(20000))
    assert float(weighted.std()) < 0.4 * float(uniform.std())


@pytest.mark.parametrize("step", [[0, 3], [1, 51], [-1, 1]])
def test_importance_of_steps_that_are_none_is_refused(step):
    """An index of -1 would quietly be that of the last step."""
    sampler = ImportanceSampler(50)
    with pytest.raises(ValueError, match="steps lie in 1 to 50"):
        sampler.update(torch.tensor(step), torch.ones(2))
    assert int(sampler.seen.sum()) == 0


def test_lognormal_times_have_a_normal_log_ratio_clipped_to_the_process():
    """Kolmogorov-Smirnov with 50000 draws, then the shares at both ends within 4 standard errors."""
    process = VE(1e-4, 1e4)
    t = lognormal_times(process, 50000, torch.Generator().manual_seed(0))
    assert kstest(process.log_noise_ratio(t).numpy(), normal(-1.2, 1.2).cdf).pvalue > 0.01
    narrow = VE(0.1, 1.0)
    t = lognormal_times(narrow, 5000, torch.Generator().manual_seed(0), mean=-1.0, std=2.0)
    ratio = narrow.noise_ratio(t)
    for end, share in ((0.1, normal.cdf((math.log(0.1) + 1) / 2)), (1.0, normal.sf(0.5))):
        assert float((ratio / end - 1).abs().lt(1e-6).double().mean()) == pytest.approx(
            share, abs=4 * math.sqrt(share * (1 - share) / 5000)
        )
    assert float(lognormal_times(VP("linear"), 1000, torch.Generator().manual_seed(0), std=9.0).max()) <= 1
