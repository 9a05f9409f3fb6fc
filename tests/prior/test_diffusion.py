"""A diffusion prior as a generative model: samples, codes and images of codes."""

import pytest
import torch
from prior_factory import random_prior, tiny_config, white_prior

from medfusion.prior import DiffusionPrior


@pytest.fixture
def prior() -> DiffusionPrior:
    """Of a process that ends in noise alone."""
    return random_prior(config=tiny_config(process={"family": "ve", "sigma_max": 20.0, "prediction": "edm"}))


def test_samples_are_fixed_by_their_generators(prior: DiffusionPrior) -> None:
    one, two = prior.sample([torch.Generator().manual_seed(seed) for seed in (1, 2)])
    torch.testing.assert_close(prior.sample([torch.Generator().manual_seed(2)])[0], two, atol=1e-4, rtol=1e-4)
    assert one.shape == (1, 16, 16, 16)
    assert not torch.allclose(one, two)


def test_white_noise_is_sampled_as_such() -> None:
    drawn = white_prior().sample([torch.Generator().manual_seed(seed) for seed in range(3)])
    assert float(drawn.std()) == pytest.approx(1, abs=0.03)


def test_a_code_is_where_the_flow_comes_from(prior: DiffusionPrior) -> None:
    image = 0.5 * torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    code = prior.encode(image)
    assert code.shape == image.shape
    torch.testing.assert_close(prior.decode(code, image.shape[2:]), image, atol=0.05, rtol=0)
    torch.testing.assert_close(prior.reconstruct(image), image, atol=0.05, rtol=0)


def test_the_code_of_white_noise_is_itself() -> None:
    """The flow of N(0, 1) under a variance-preserving process stands still."""
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(white_prior().encode(image), image, atol=0.02, rtol=0.02)


def test_a_translation_is_decoded_by_the_other(prior: DiffusionPrior) -> None:
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    other = white_prior()
    torch.testing.assert_close(prior.translate(image, other), other.decode(prior.encode(image), image.shape[2:]))
