"""On a GPU every sampler walks the way it walks on the CPU: times, noise and process stay on the CPU, images do not."""

from functools import partial

import pytest
import torch

from medfusion.diffusion import (
    VP,
    GaussianMixture,
    annealed_langevin,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    heun,
    inpaint,
    langevin,
    log_likelihood,
    predictor_corrector,
    probability_flow,
    regression_loss,
    time_steps,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROCESS = VP("cosine")
MIXTURE = GaussianMixture.isotropic(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0] * 8, [0.8] * 8]), torch.ones(2) / 4)
TIMES = time_steps(PROCESS, 40, "log_snr", start=0.98)


def noise(device):
    return torch.randn(3, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0)).to(device)


def generators():
    return [torch.Generator().manual_seed(k) for k in range(3)]


@pytest.mark.parametrize("sampler", [ddim, heun, dpm_solver, partial(probability_flow, rtol=1e-6, atol=1e-6)])
def test_deterministic_samplers(sampler):
    times = {"start": 0.98, "end": 0.001} if isinstance(sampler, partial) else {"times": TIMES}
    cpu, gpu = (sampler(MIXTURE.denoiser(PROCESS), noise(device), **times) for device in ("cpu", "cuda"))
    assert gpu.device.type == "cuda"
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "sampler",
    [
        partial(ddim, eta=1.0),
        ddpm,
        partial(ddpm, variance="large"),
        annealed_langevin,
        euler_maruyama,
        predictor_corrector,
        lambda denoise, x, times, generators: inpaint(denoise, x, x > 0, times, resamplings=2, generators=generators),
    ],
)
def test_stochastic_samplers(sampler):
    cpu, gpu = (
        sampler(MIXTURE.denoiser(PROCESS), noise(device), TIMES, generators=generators()) for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-4, atol=1e-4)


def test_langevin_likelihood_and_loss():
    for function in (
        lambda x: langevin(MIXTURE.denoiser(PROCESS), x, 0.5, step_size=0.1, steps=3, generators=generators()),
        lambda x: log_likelihood(MIXTURE.denoiser(PROCESS), x, probes=2, generators=generators()).float(),
        lambda x: regression_loss(MIXTURE.denoiser(PROCESS), x, x.flip(0), torch.tensor([0.1, 0.5, 0.9]), "likelihood"),
    ):
        torch.testing.assert_close(function(noise("cuda")).cpu(), function(noise("cpu")), rtol=1e-3, atol=1e-3)
