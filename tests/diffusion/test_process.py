"""The process against MONAI's schedulers and against its own inverse."""

import math

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from medfusion.diffusion import Process
from medfusion.diffusion.process import expand

MONAI = {"linear": {"schedule": "linear_beta", "beta_start": 1e-4, "beta_end": 0.02}, "cosine": {"schedule": "cosine"}}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [50, 1000])
def test_discrete_values_are_those_of_monai(schedule, steps):
    theirs = DDPMScheduler(num_train_timesteps=steps, **MONAI[schedule])
    ours = Process(schedule, steps)
    torch.testing.assert_close(ours.beta.float(), theirs.betas, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_continuous_time_meets_the_grid(schedule):
    process = Process(schedule, 1000)
    t = torch.arange(1000, dtype=torch.float64) / 999
    torch.testing.assert_close(process.alpha(t) ** 2, process.alpha_bar, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones(1000, dtype=torch.float64))
    torch.testing.assert_close(process.noise_ratio(t), process.sigma(t) / process.alpha(t), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t", [0.0, 1e-4, 0.0333, 0.5, 0.98765, 1.0])
def test_time_of_inverts_noise_ratio(schedule, t):
    process = Process(schedule)
    ratio = float(process.noise_ratio(torch.tensor(t, dtype=torch.float64)))
    assert process.time_of(ratio) == pytest.approx(t, abs=1e-9)


def test_time_of_an_impossible_ratio_is_refused():
    for ratio in (0.0, -1.0, 1e-9, 1e9, math.nan):
        with pytest.raises(ValueError, match="noise ratio"):
            Process().time_of(ratio)


def test_times_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Process().alpha(torch.tensor([0.5, 1.5]))


def test_noised_samples_have_the_marginal_mean_and_variance():
    process, generator = Process(), torch.Generator().manual_seed(0)
    x0 = torch.full((4, 1, 40, 40, 40), 0.7)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9])
    x = process.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
    torch.testing.assert_close(x.mean(dim=(1, 2, 3, 4)), 0.7 * process.alpha(t).float(), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(dim=(1, 2, 3, 4)), process.sigma(t).float(), atol=0.02, rtol=0)


def test_expand_aligns_a_batch_of_scalars():
    assert expand(torch.ones(3), torch.zeros(3, 1, 2, 2, 2)).shape == (3, 1, 1, 1, 1)
