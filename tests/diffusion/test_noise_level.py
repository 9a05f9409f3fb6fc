"""The level at which the residual of an exact posterior mean is consistent is the noise that was added."""

import math

import pytest
import torch

from medfusion.diffusion import VE, VP, GaussianMixture, noise_ratio, residual
from tests.diffusion.test_process import close

# three voxels: two that go together, and one apart; two kinds of tissue
TISSUE = GaussianMixture(
    torch.tensor([0.4, 0.6]),
    torch.tensor([[-0.8, -0.8, 0.1], [0.7, 0.7, 0.2]]),
    torch.tensor([[[0.02, 0.018, 0.0], [0.018, 0.02, 0.0], [0.0, 0.0, 0.05]]]).repeat(2, 1, 1),
)
DRAWS = 40_000


def generator(seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed)]


def noisy(ratio: float, seed: int = 1) -> torch.Tensor:
    x0 = TISSUE.sample(DRAWS, generator(seed)[0])
    return x0 + ratio * torch.randn(x0.shape, generator=generator(seed + 1)[0], dtype=x0.dtype)


def everywhere(x0: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x0, dtype=torch.bool)


@pytest.mark.parametrize("process", [VP("cosine"), VE(0.001, 50.0)], ids=str)
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.8])
@pytest.mark.parametrize("first", [0.5, 1.0, 3.0])
def test_the_noise_that_was_added_is_found(process, ratio, first):
    found, _ = noise_ratio(
        TISSUE.denoiser(process), noisy(ratio), everywhere, first=first * ratio, generators=generator
    )
    assert found == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize("voxel", range(3))
def test_every_voxel_says_the_same(voxel):
    def counted(x0: torch.Tensor) -> torch.Tensor:
        return everywhere(x0) & (torch.arange(3) == voxel)

    found, _ = noise_ratio(TISSUE.denoiser(VP("cosine")), noisy(0.3), counted, first=0.2, generators=generator)
    assert found == pytest.approx(0.3, rel=0.03)


def test_a_clean_image_has_next_to_no_noise():
    """Less than the finest detail has: below that (1) holds at every level, and the search ends anywhere."""
    process = VP("cosine")
    x0 = TISSUE.sample(DRAWS, generator()[0])
    found, _ = noise_ratio(TISSUE.denoiser(process), x0, everywhere, first=0.3, generators=generator)
    assert found < 0.02


@pytest.mark.parametrize("ratio", [0.1, 0.6])
def test_the_products_of_neighbours_are_what_the_response_says(ratio):
    """E r_i r_j = delta_ij - dD_i/dy_j, with the derivatives of the exact denoiser on the right."""
    found = residual(TISSUE.denoiser(VP("cosine")), noisy(ratio), ratio, generator())
    products = torch.einsum("bi,bj->ij", found.removed, found.removed) / DRAWS
    responses = torch.einsum("bi,bj->ij", found.signs, found.response) / DRAWS
    close(products, torch.eye(3).double() - responses, atol=0.03)
    assert abs(float(products[0, 1])) > 0.05  # neighbours do go together
    close(found.freedom.mean(dim=0), 1 - responses.diagonal(), atol=1e-9)


def test_the_residual_is_in_units_of_the_noise():
    process, y = VE(0.001, 50.0), noisy(0.2)
    denoise = TISSUE.denoiser(process)
    found = residual(denoise, y, 0.2, generator())
    close(found.x0, denoise(y, process.time_of(0.2)), atol=1e-9)
    close(found.removed, (y - found.x0) / 0.2, atol=1e-9)
    assert math.isclose(float(found.signs.abs().mean()), 1.0)


@pytest.mark.parametrize("ratio", [0.1, 0.6])
def test_the_estimated_risk_is_the_squared_error(ratio):
    x0 = TISSUE.sample(DRAWS, generator(1)[0])
    found = residual(TISSUE.denoiser(VP("cosine")), noisy(ratio), ratio, generator())
    error = (found.x0 - x0).square().mean() / ratio**2
    assert 0.05 < float(error) < 0.9
    assert float(found.risk.mean()) == pytest.approx(float(error), abs=0.02)
