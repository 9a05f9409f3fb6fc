"""The residual U-Net: folding is exact, crops agree with the whole, the noise level and the context matter."""

import torch

from medfusion.networks import ResidualUNet
from medfusion.networks.residual_unet import CONTEXT, fold, unfold


def _network(seed=0):
    torch.manual_seed(seed)
    network = ResidualUNet((8, 16), (1, 1)).eval().requires_grad_(False)
    for parameter in network.parameters():  # the zero initialisation would hide what is tested
        parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return network


def test_unfold_inverts_fold_and_fold_gathers_neighbours():
    x = torch.arange(4 * 6 * 8, dtype=torch.float32).view(1, 1, 4, 6, 8)
    folded = fold(x)
    assert folded.shape == (1, 8, 2, 3, 4)
    torch.testing.assert_close(unfold(folded), x, rtol=0, atol=0)
    assert sorted(folded[0, :, 0, 0, 0].tolist()) == sorted(x[0, 0, :2, :2, :2].flatten().tolist())


def test_two_outputs_are_two_images():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 2, 3, 4)
    both = unfold(x)
    assert both.shape == (2, 2, 4, 6, 8)
    torch.testing.assert_close(both, torch.cat([unfold(x[:, :8]), unfold(x[:, 8:])], dim=1), rtol=0, atol=0)
    assert ResidualUNet((8, 16), (1, 1), outputs=2)(torch.randn(1, 1, 8, 8, 8), torch.zeros(1)).shape == (1, 2, 8, 8, 8)


def test_a_fresh_network_answers_nothing():
    torch.manual_seed(0)
    network = ResidualUNet((8, 16), (1, 1))
    bias = network.tail.bias.view(1, 8, 1, 1, 1).expand(2, 8, 4, 4, 4)
    torch.testing.assert_close(network(torch.randn(2, 1, 8, 8, 8), torch.zeros(2)), unfold(bias))


def test_the_middle_of_a_crop_is_the_middle_of_the_whole():
    """Without normalisation only the zero padding at the borders tells a crop from the whole volume."""
    network = _network()
    x = torch.randn(1, 1, 80, 80, 80, generator=torch.Generator().manual_seed(0))
    level = torch.zeros(1)
    whole, crop = network(x, level), network(x[..., 8:72, 8:72, 8:72], level)
    inner = slice(28, 36)
    torch.testing.assert_close(crop[..., inner, inner, inner], whole[..., 36:44, 36:44, 36:44], rtol=1e-4, atol=1e-4)


def test_level_and_context_change_the_answer_and_zeros_are_unknown():
    network = _network()
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = network(x, torch.tensor([-1.0]))
    assert not torch.allclose(plain, network(x, torch.tensor([1.0])))
    zeros = torch.zeros(1, CONTEXT, 8, 8, 8)
    torch.testing.assert_close(plain, network(x, torch.tensor([-1.0]), zeros))
    assert not torch.allclose(plain, network(x, torch.tensor([-1.0]), zeros + 1))
