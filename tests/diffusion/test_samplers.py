"""Samplers against MONAI step for step, and against a Gaussian mixture whose denoiser is a closed form."""

import math

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

from medfusion.diffusion import Process, ddim, ddpm, noise_like, uniform_times
from medfusion.diffusion.samplers import _step
from tests.diffusion.test_process import MONAI

WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.0, 0.8], [0.2, 0.3]))


def mixture_denoiser(process):
    """E[x_0 | x_t] when every voxel is drawn from p(x_0) = sum_j w_j N(mu_j, s_j^2)."""

    def denoise(x, t):
        alpha, sigma = process.alpha(t).view(-1, 1, 1, 1, 1, 1), process.sigma(t).view(-1, 1, 1, 1, 1, 1)
        y = x.double()[..., None]
        variance = alpha**2 * STDS**2 + sigma**2
        log_weight = WEIGHTS.log() - 0.5 * variance.log() - (y - alpha * MEANS) ** 2 / (2 * variance)
        means = (MEANS * sigma**2 + alpha * STDS**2 * y) / variance
        return (torch.softmax(log_weight, dim=-1) * means).sum(dim=-1).to(x.dtype)

    return denoise


def _generators(n):
    return [torch.Generator().manual_seed(k) for k in range(n)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_follow_the_mixture(sampler):
    process = Process()
    x = noise_like(torch.empty(2, 1, 20, 20, 20), _generators(2))
    denoise, times = mixture_denoiser(process), uniform_times(1.0, 200)
    if sampler == "ddim":
        x = ddim(denoise, process, x, times)
    else:
        x = ddpm(denoise, process, x, times, generators=_generators(2))
    left = x < -0.2
    n = x.numel()
    assert float(left.float().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / n) + 0.005)
    assert float(x[left].mean()) == pytest.approx(-1.0, abs=0.02)
    assert float(x[~left].mean()) == pytest.approx(0.8, abs=0.02)
    assert float(x[left].std()) == pytest.approx(0.2, abs=0.02)
    assert float(x[~left].std()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_step_is_that_of_monai(schedule, eta):
    process = Process(schedule, 1000)
    theirs = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, **MONAI[schedule])
    theirs.set_timesteps(50)
    generator = torch.Generator().manual_seed(3)
    x, noise = (torch.randn(1, 1, 6, 6, 6, generator=generator) for _ in range(2))
    for k in (900, 500, 100):
        t, s = (torch.tensor([n / 999], dtype=torch.float64) for n in (k, k - 20))
        x0 = (x - process.sigma(t) * noise) / process.alpha(t)
        expected, _ = theirs.step(noise, k, x, eta=eta, generator=torch.Generator().manual_seed(7))
        ours = _step(process, x, x0.float(), t, s, eta, [torch.Generator().manual_seed(7)])
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_step_is_that_of_monai(schedule):
    process = Process(schedule, 1000)
    theirs = DDPMScheduler(num_train_timesteps=1000, clip_sample=False, **MONAI[schedule])
    generator = torch.Generator().manual_seed(3)
    x, noise = (torch.randn(1, 1, 6, 6, 6, generator=generator) for _ in range(2))
    for k in (900, 500, 1):
        t, s = (torch.tensor([n / 999], dtype=torch.float64) for n in (k, k - 1))
        x0 = (x - process.sigma(t) * noise) / process.alpha(t)
        expected, _ = theirs.step(noise, k, x, generator=torch.Generator().manual_seed(7))
        ours = _step(process, x, x0.float(), t, s, 1.0, [torch.Generator().manual_seed(7)])
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_a_sample_does_not_depend_on_its_batch():
    process = Process()
    denoise, times = mixture_denoiser(process), uniform_times(1.0, 10)

    def run(seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        x = noise_like(torch.empty(len(seeds), 1, 4, 4, 4), generators)
        return ddpm(denoise, process, x, times, generators=generators)

    torch.testing.assert_close(run([5, 6, 7])[1:2], run([6]), rtol=0, atol=0)


def test_partial_noising_of_a_known_image_comes_back_near_it():
    process = Process()
    x0 = torch.where(torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3, -1.0, 0.8)
    times = uniform_times(0.1, 5)
    x = process.add_noise(x0, noise_like(x0, _generators(1)), times[:1])
    back = ddim(mixture_denoiser(process), process, x, times)
    assert float((back - x0).abs().mean()) < 0.2
    assert bool(((back > 0) == (x0 > 0)).all())


def test_callback_sees_every_step_and_non_finite_output_stops_the_run():
    process, seen = Process(), []
    times = uniform_times(0.5, 4)
    ddim(mixture_denoiser(process), process, torch.zeros(1, 1, 2, 2, 2), times, callback=lambda k, x: seen.append(k))
    assert seen == [0, 1, 2, 3]
    with pytest.raises(FloatingPointError, match="step 1 of 4"):
        ddim(lambda x, t: x * math.nan, process, torch.zeros(1, 1, 2, 2, 2), times)
