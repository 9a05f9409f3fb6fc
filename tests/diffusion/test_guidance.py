"""Guidance and inpainting against the oracle's classes and conditionals."""

import math

import pytest
import torch

from medfusion.diffusion import (
    VE,
    VP,
    Denoiser,
    GaussianMixture,
    classifier_free,
    classifier_guided,
    ddim,
    ddpm,
    heun,
    inpaint,
    time_steps,
)
from tests.diffusion.test_mixture import PROCESSES, all_processes, in_torch, mixture, seeded


def near():
    """Two components that noise and guidance have to tell apart: they overlap."""
    apart = mixture(2)
    return GaussianMixture(apart.weights, apart.means, 10 * apart.covariances)


def component(oracle, j):
    return GaussianMixture(torch.ones(1), oracle.means[j : j + 1], oracle.covariances[j : j + 1])


def class_posterior(oracle, process, j):
    """log p(j | x_t), by Bayes' rule; a batch is at one time."""

    def log_probability(x, t):
        joint = component(oracle, j).noised(process, t[0]).log_prob(x) + oracle.weights[j].log()
        return joint - oracle.noised(process, t[0]).log_prob(x)

    return log_probability


def noised_batch(oracle, process, t):
    return oracle.noised(process, t).sample(50, seeded(0))


@all_processes
@pytest.mark.parametrize("t", [0.01, 0.3, 0.7])
@pytest.mark.parametrize("j", [0, 1])
def test_exact_classifier_guidance_gives_the_mean_of_the_class(j, t, process):
    oracle = near()
    x = noised_batch(oracle, process, t)
    guided = classifier_guided(oracle.denoiser(process), class_posterior(oracle, process, j))
    expected = component(oracle, j).denoiser(process)(x, t)
    torch.testing.assert_close(guided(x, t), expected, rtol=1e-8, atol=1e-8)


@all_processes
def test_classifier_guidance_samples_its_class(process):
    """Mean and variances of component 0, within four standard errors and 0.02 and a tenth for the steps."""
    oracle, n = near(), 1500
    guided = classifier_guided(oracle.denoiser(process), class_posterior(oracle, process, 0))
    x = float(process.sigma(1.0)) * torch.randn(n, 2, generator=seeded(0), dtype=torch.float64)
    x = heun(guided, x, time_steps(process, 30, "log_snr"))
    mean, variance = oracle.means[0], oracle.covariances[0].diagonal()
    assert bool(((x.mean(dim=0) - mean).abs() < 4 * (variance / n).sqrt() + 0.02).all())
    assert bool(((x.var(dim=0) / variance - 1).abs() < 4 * math.sqrt(2 / n) + 0.1).all())


@all_processes
def test_classifier_guidance_adds_its_scale_of_the_gradient_to_the_score(process):
    oracle, t = near(), 0.3
    denoise, log_probability = oracle.denoiser(process), class_posterior(oracle, process, 0)
    x = noised_batch(oracle, process, t).requires_grad_()
    (gradient,) = torch.autograd.grad(log_probability(x, torch.full((50,), t, dtype=torch.float64)).sum(), x)
    for scale in (0.0, 1.0, 2.5):
        found = classifier_guided(denoise, log_probability, scale).score(x.detach(), t)
        torch.testing.assert_close(found, denoise.score(x.detach(), t) + scale * gradient, rtol=1e-8, atol=1e-8)


def test_classifier_guidance_works_inside_samplers_and_leaves_no_graph():
    process = VP("cosine")
    guided = classifier_guided(near().denoiser(process), class_posterior(near(), process, 0))
    x = ddim(guided, torch.randn(3, 2, generator=seeded(0)), time_steps(process, 5))
    assert not x.requires_grad


@pytest.mark.parametrize("shape", [(3, 2), (3, 1), ()])
def test_a_log_probability_that_is_not_one_number_a_sample_is_refused(shape):
    """Class logits, say, of which autograd would quietly take the sum."""
    guided = classifier_guided(near().denoiser(VP()), lambda x, t: x.sum() * torch.ones(shape))
    with pytest.raises(ValueError, match="log probability of 3 sample"):
        guided(torch.zeros(3, 2), 0.5)


@all_processes
def test_classifier_free_guidance_is_linear_from_unconditional_to_conditional(process):
    oracle, t = near(), 0.4
    conditional, unconditional = component(oracle, 0).denoiser(process), oracle.denoiser(process)
    x = noised_batch(oracle, process, t)
    without, having = unconditional(x, t), conditional(x, t)
    for scale, expected in ((0.0, without), (1.0, having), (3.0, 3 * having - 2 * without)):
        found = classifier_free(conditional, unconditional, scale)(x, t)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@all_processes
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_classifier_free_guidance_is_classifier_guidance_by_bayes(scale, process):
    """log p(y | x_t) = log p(x_t | y) - log p(x_t) + constant, so both move the score alike."""
    oracle, t = near(), 0.5
    conditional, unconditional = component(oracle, 1).denoiser(process), oracle.denoiser(process)
    x = noised_batch(oracle, process, t)
    free = classifier_free(conditional, unconditional, scale)(x, t)
    guided = classifier_guided(unconditional, class_posterior(oracle, process, 1), scale)(x, t)
    torch.testing.assert_close(free, guided, rtol=1e-8, atol=1e-8)


def test_guidance_between_two_processes_is_refused():
    with pytest.raises(ValueError, match=r"two processes: VP.* and VE"):
        classifier_free(near().denoiser(VP()), near().denoiser(VE()), 1.0)
    with pytest.raises(ValueError, match="two processes"):
        classifier_free(near().denoiser(VP("linear")), near().denoiser(VP("cosine")), 1.0)
    classifier_free(near().denoiser(VP("linear")), near().denoiser(VP("linear")), 1.0)


@pytest.mark.parametrize("sampler", [ddim, ddpm, heun])
def test_a_guidance_of_ones_own_decides_what_samplers_go_on_with(sampler):
    """One that answers with a fixed image leads there; one that only looks sees x_t, the times and x_0."""
    process, seen = VP("cosine"), []
    image = torch.tensor([0.5, -1.5], dtype=torch.float64)

    def look(x, t, x0):
        seen.append((x, t, x0))
        return x0

    denoise = near().denoiser(process)
    guided = denoise.guided(look).guided(lambda x, t, x0: image.expand_as(x0))
    given = {"generators": [seeded(0)]} if sampler is ddpm else {}
    x = torch.randn(3, 2, generator=seeded(1), dtype=torch.float64)
    times = time_steps(process, 5, start=0.9)
    torch.testing.assert_close(sampler(guided, x, times, **given), image.expand(3, 2))
    first_x, first_t, first_x0 = seen[0]
    torch.testing.assert_close(first_x, x)
    torch.testing.assert_close(first_t, torch.full((3,), 0.9, dtype=torch.float64))
    torch.testing.assert_close(first_x0, denoise(x, 0.9))


def overlapping(dimensions):
    """Two correlated components so close that a chain goes from one to the other at little noise, as RePaint needs."""
    place = torch.cartesian_prod(*[torch.arange(3.0)] * 3) if dimensions == 27 else torch.arange(2.0)[:, None]
    distance = torch.cdist(place, place)
    covariances = torch.stack([0.1 * torch.exp(-distance / 2), 0.09 * torch.exp(-distance / 2)])
    pattern = 1 + place.mean(dim=1) / 2
    return GaussianMixture(torch.tensor([0.3, 0.7]), torch.stack([-0.35 * pattern, 0.15 * pattern]), covariances)


# RePaint is approximate: the weight of a component is drawn to that without the known voxels, 0.3. Allowed beside four
# standard errors: 0.03 of weight, 0.03 of mean, 0.08 of the variance. Measured on 20 000 samples in 2 dimensions, 3000
# in 27: 0.024, 0.023, 0.054 and 0.004, 0.012, 0.082 (with the small variance 0.033, 0.029, 0.13 and 0.03, 0.013, 0.28).
@pytest.mark.parametrize("process", [VP("cosine"), VE()], ids=["vp-cosine", "ve"])
@pytest.mark.parametrize(("shape", "steps", "n"), [((2,), 60, 1000), ((1, 3, 3, 3), 40, 300)], ids=["2", "27"])
def test_inpainting_follows_the_conditional(shape, steps, n, process):
    """The second of two values, or the middle plane, of an image whose known part leaves both components likely."""
    oracle = overlapping(math.prod(shape))
    missing = torch.zeros(shape, dtype=torch.bool)
    missing[..., 1] = True
    known = ~missing.flatten()
    samples = oracle.sample(100, seeded(0))
    values = next(v for v in samples if 0.45 < float(oracle.conditional(known, v).weights[0]) < 0.65)
    given, image = oracle.conditional(known, values), torch.where(missing, 5.0, values.view(shape)).float()
    times = time_steps(process, steps, "log_snr")
    x = inpaint(oracle.denoiser(process), image.expand(n, *shape), missing, times, generators=[seeded(0)])
    assert torch.equal(x[:, ~missing], image[~missing].expand(n, -1))

    y, expected = x[:, missing].double(), in_torch(given)
    joint = expected.component_distribution.log_prob(y[:, None]) + given.weights.log()
    weights = torch.softmax(joint, dim=1)[:, 0]  # their mean is the component's weight
    assert float(weights.mean()) == pytest.approx(float(given.weights[0]), abs=4 * float(weights.std()) / n**0.5 + 0.03)
    assert bool(((y.mean(dim=0) - expected.mean).abs() < 4 * (expected.variance / n).sqrt() + 0.03).all())
    assert bool(((y.var(dim=0) / expected.variance - 1).abs() < 4 * math.sqrt(2 / n) + 0.08).all())


def test_resampling_makes_the_missing_agree_with_the_known():
    """On a normal of correlation 0.95: the mean of the missing is off without it, and right within 5 % with 20."""
    process, n = VP("cosine"), 1000
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    oracle = GaussianMixture(torch.ones(1), torch.zeros(1, 2), 0.25 * covariance[None])
    image = torch.tensor([1.0, 0.0]).expand(n, 2)  # 0.95 is expected of the other
    missing, times = torch.tensor([False, True]), time_steps(process, 40, "log_snr")
    once, often = (
        float(
            inpaint(oracle.denoiser(process), image, missing, times, resamplings=k, generators=[seeded(0)])[:, 1].mean()
        )
        for k in (1, 20)
    )
    assert once < 0.8
    assert often == pytest.approx(0.95, rel=0.05)


@all_processes
def test_known_voxels_carry_the_noise_of_their_time(process):
    """x_s - alpha_s image is normal: mean and standard deviation of 3000 voxels within four standard errors."""
    n, missing, seen = 3000, torch.arange(4000) >= 3000, []
    image = torch.linspace(-1, 1, 4000, dtype=torch.float64)[None]
    denoise = Denoiser(lambda x, log_noise_ratio: torch.tanh(x), process, "x0")
    times = time_steps(process, 4, "log_snr", start=0.6)
    inpaint(denoise, image, missing, times, resamplings=2, generators=[seeded(0)], callback=lambda k, x: seen.append(x))
    for s, x in zip(times[1:], seen, strict=True):
        noise, sigma = (x - process.alpha(s) * image)[:, ~missing], float(process.sigma(s))
        assert abs(float(noise.mean())) <= 4 * sigma / n**0.5
        assert abs(float(noise.std()) - sigma) <= 4 * sigma / (2 * n) ** 0.5


def repaint(denoise, image, missing, times, resamplings, large, generator):
    """Lugmayr et al. 2022, Algorithm 1, with the betas and means of Ho et al. 2020, eq. 2, 4 and 7."""

    def draw():
        return torch.randn(image.shape, generator=generator, dtype=image.dtype)

    a, v = denoise.process.alpha(times), denoise.process.sigma(times) ** 2
    x = a[0] * image + v[0].sqrt() * draw()
    for k in range(len(times) - 1):
        step = a[k] / a[k + 1]
        beta = v[k] - step**2 * v[k + 1]
        for u in range(resamplings if times[k + 1] > 0 else 1):
            if u > 0:
                x = step * x + beta.sqrt() * draw()
            known = a[k + 1] * image + v[k + 1].sqrt() * draw()
            x = (a[k + 1] * beta * denoise(x, times[k]) + step * v[k + 1] * x) / v[k]
            if times[k + 1] > 0:
                x = x + (beta if large else beta * v[k + 1] / v[k]).sqrt() * draw()
            x = missing * x + ~missing * known
    return x


@all_processes
def test_inpainting_is_repaint_with_the_variance_that_is_said(process):
    denoise, missing = mixture(2).denoiser(process), torch.tensor([[False, True]])
    image = mixture(2).sample(6, seeded(0))
    times = torch.tensor([0.6, 0.4, 0.2, 0.0], dtype=torch.float64)
    found = {}
    for given, large in (({}, True), ({"variance": "large"}, True), ({"variance": "small"}, False)):
        found[large] = inpaint(denoise, image, missing, times, resamplings=3, generators=[seeded(1)], **given)
        expected = repaint(denoise, image, missing, times, 3, large, seeded(1))
        torch.testing.assert_close(found[large], expected, rtol=1e-9, atol=1e-9)
    assert float((found[True] - found[False])[:, 1].abs().min()) > 1e-6
    learned = Denoiser(lambda x, r: torch.cat([denoise.network(x, r), -torch.ones_like(x)], 1), process, "x0", True)
    x = inpaint(learned, image, missing, times, resamplings=3, variance="learned", generators=[seeded(1)])
    torch.testing.assert_close(x, found[False], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [*PROCESSES.values(), VE(0.01, 2.0), VP("linear", 100)], ids=str)
def test_what_a_missing_part_holds_does_not_matter(process):
    """Nor where noise at t = 1 would not drown it: r(1) = 2 of VE(0.01, 2), 1.3 of a linear chain of 100 steps."""
    denoise, missing = mixture(2).denoiser(process), torch.tensor([False, True])
    found = [
        inpaint(denoise, torch.tensor([[0.4, held]]), missing, time_steps(process, 4), generators=[seeded(0)])
        for held in (0.0, 1e6, math.nan)
    ]
    assert bool(torch.isfinite(found[0]).all())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_inpainting_from_an_image_begins_with_what_it_holds():
    """From t = 0.02 a missing voxel stays in the mode that the image has there."""
    process, oracle = VP("cosine"), mixture(2)
    missing, times = torch.tensor([False, True]), time_steps(process, 10, start=0.02)
    for mean in oracle.means:
        image = mean.expand(20, 2)
        x = inpaint(oracle.denoiser(process), image, missing, times, generators=[seeded(0)])
        assert bool(
            (torch.cdist(x, oracle.means).argmin(dim=1) == torch.cdist(image, oracle.means).argmin(dim=1)).all()
        )


def test_inpainting_of_a_sample_does_not_depend_on_its_batch():
    denoise = Denoiser(lambda x, log_noise_ratio: torch.tanh(x), VP("cosine"), "x0")
    image = torch.randn(3, 1, 4, 4, 4, generator=seeded(0))
    missing, seen = image[:1] > 0, []
    times = time_steps(denoise.process, 4)

    def run(of):
        generators = [seeded(k) for k in of]
        return inpaint(denoise, image[of], missing, times, generators=generators, callback=lambda k, x: seen.append(k))

    torch.testing.assert_close(run([0, 1, 2])[1:2], run([1]), rtol=0, atol=0)
    assert seen == [0, 1, 2, 3] * 2


def test_inpainting_in_half_precision_keeps_known_voxels_and_works_in_float32():
    denoise = Denoiser(lambda x, log_noise_ratio: torch.tanh(x.bfloat16()), VP("cosine"), "x0")
    image, seen = torch.randn(2, 1, 4, 4, 4, generator=seeded(0)).bfloat16(), []
    missing = image[:1] > 0
    times = time_steps(denoise.process, 3)
    x = inpaint(denoise, image, missing, times, generators=[seeded(1)], callback=lambda k, x: seen.append(x))
    known = ~missing.expand_as(x)
    assert x.dtype == torch.float32
    assert torch.equal(x[known], image[known].float())
    assert not torch.equal(seen[0][known], seen[0][known].bfloat16().float())  # noise of known voxels is not rounded


def test_masks_and_resamplings_that_cannot_be_are_refused():
    denoise, image, times = mixture(2).denoiser(VP()), torch.zeros(1, 2), torch.tensor([0.5, 0.0])
    missing = torch.tensor([False, True])
    with pytest.raises(ValueError, match=r"needs a bool mask and resamplings >= 1, got torch\.float32 and 10"):
        inpaint(denoise, image, missing.float(), times, generators=[seeded(0)])
    with pytest.raises(ValueError, match=r"got torch\.bool and 0"):
        inpaint(denoise, image, missing, times, resamplings=0, generators=[seeded(0)])
    with pytest.raises(ValueError, match="times fall"):
        inpaint(denoise, image, missing, times.flip(0), generators=[seeded(0)])
    with pytest.raises(ValueError, match="1 sample"):
        inpaint(denoise, image, missing, times, generators=[])
