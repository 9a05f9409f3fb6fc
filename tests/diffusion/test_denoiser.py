"""Parametrisations are inverse to each other, and the objective is zero for the true answer."""

import pytest
import torch

from medfusion.diffusion import Denoiser, Process, clean_image, simple_loss, target

PREDICTIONS = ["epsilon", "x0", "v"]


def _sample(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(5, 1, 4, 4, 4, generator=generator, dtype=dtype) for _ in range(2))
    return x0, noise, torch.tensor([0.01, 0.2, 0.5, 0.8, 0.95])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clean_image_inverts_target(prediction, schedule):
    process = Process(schedule)
    x0, noise, t = _sample()
    answer = target(prediction, process, x0, noise, t)
    x = process.add_noise(x0, noise, t)
    torch.testing.assert_close(clean_image(prediction, process, answer, x, t), x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_answer_has_no_loss_and_a_wrong_one_its_squared_error(prediction):
    process = Process()
    x0, noise, t = _sample(torch.float32)

    def network(x, log_noise_ratio):
        torch.testing.assert_close(x, process.add_noise(x0, noise, t))
        torch.testing.assert_close(log_noise_ratio, process.log_noise_ratio(t).float())
        return target(prediction, process, x0, noise, t) + shift

    for shift in (0.0, 0.5):
        loss = simple_loss(network, process, prediction, x0, noise, t)
        torch.testing.assert_close(loss, torch.full((5,), shift**2), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_is_the_posterior_mean_on_gaussian_data(prediction):
    """For x_0 ~ N(m, s^2) the optimal network is known, and so is E[x_0 | x_t] (conjugate Gaussians)."""
    process, mean, std = Process(), 0.3, 0.4
    t = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    x = torch.linspace(-2, 2, 3 * 8, dtype=torch.float64).view(3, 1, 2, 2, 2)

    def posterior_mean(x, t):
        alpha, sigma = (f(t).view(-1, 1, 1, 1, 1) for f in (process.alpha, process.sigma))
        return (mean * sigma**2 + alpha * std**2 * x) / (alpha**2 * std**2 + sigma**2)

    def network(x, log_noise_ratio):
        x0 = posterior_mean(x.double(), t)
        alpha, sigma = (f(t).view(-1, 1, 1, 1, 1) for f in (process.alpha, process.sigma))
        return {"x0": x0, "epsilon": (x - alpha * x0) / sigma, "v": (alpha * x - x0) / sigma}[prediction]

    denoised = Denoiser(network, process, prediction)(x, t)
    torch.testing.assert_close(denoised.double(), posterior_mean(x, t), rtol=1e-3, atol=1e-4)
