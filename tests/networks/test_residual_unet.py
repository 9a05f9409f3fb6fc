"""The residual U-Net: folding is exact, crops agree with the whole, what is told matters and may be withheld."""

import pytest
import torch

from medfusion.networks import ResidualUNet, adopt
from medfusion.networks.residual_unet import CONTEXT, detail, fold, unfold


def _network(seed=0, **shown):
    torch.manual_seed(seed)
    network = ResidualUNet((8, 16), (1, 1), **shown).eval().requires_grad_(False)
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


def test_a_fresh_network_with_a_stem_answers_nothing():
    torch.manual_seed(0)
    network = ResidualUNet((8, 16), (1, 1), stem=4)
    answer = network(torch.randn(2, 1, 8, 8, 8), torch.zeros(2))
    torch.testing.assert_close(answer, network.last.bias.view(1, 1, 1, 1, 1).expand(2, 1, 8, 8, 8))


def test_the_stem_sees_voxels_as_they_lie():
    """Where the folded part answers nothing, shifting the image by one voxel shifts the answer; folds do not matter."""
    network = _network(stem=4)
    network.tail.weight.zero_()
    network.tail.bias.zero_()
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    level, inner = torch.zeros(1), slice(5, 10)  # each voxel is asked about five around it
    answer, shifted = network(x, level), network(x.roll(1, -1), level)
    torch.testing.assert_close(
        shifted[..., inner, inner, slice(6, 11)], answer[..., inner, inner, inner], rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(answer, network(x, level + 2))


@pytest.mark.parametrize("log_noise_ratio", [-6.0, -2.0, 0.0, 4.0])
def test_detail_is_in_units_of_the_noise(log_noise_ratio):
    """Of a constant plus noise it is the noise, normalised, less what the mean of 27 voxels takes: sqrt(26 / 27)."""
    level = torch.tensor([log_noise_ratio], dtype=torch.float64)
    sigma = (torch.exp(2 * level) / (1 + torch.exp(2 * level))).sqrt()
    noise = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    found = detail(0.7 + sigma * noise, level)[..., 1:-1, 1:-1, 1:-1].std()
    expected = (26 / 27) ** 0.5 * sigma / (sigma**2 + 0.05**2).sqrt()
    torch.testing.assert_close(found, expected[0], rtol=0.02, atol=0)
    torch.testing.assert_close(detail(torch.full_like(noise, 0.7), level), torch.zeros_like(noise))


@pytest.mark.parametrize("stem", [0, 4])
def test_the_middle_of_a_crop_is_the_middle_of_the_whole(stem):
    """Without normalisation only the zero padding at the borders tells a crop from the whole volume."""
    network = _network(stem=stem)
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


X, LEVEL = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([-1.0])


def test_labels_change_the_answer_where_they_lie_and_minus_one_is_unknown():
    network = _network(located=False, labels=3)
    labels = torch.full((1, 16, 16, 16), -1)
    plain = network(X, LEVEL)
    torch.testing.assert_close(plain, network(X, LEVEL, labels=labels), rtol=0, atol=1e-4)
    answers = [network(X, LEVEL, labels=labels.index_fill(1, torch.arange(8), value)) for value in range(3)]
    for number, answer in enumerate(answers):  # background is told too: it is not the same as unknown
        assert not torch.allclose(answer, plain)
        assert all(not torch.allclose(answer, other) for other in answers[:number])
    one = labels.clone()
    one[0, 3, 9, 4] = 2
    change = (
        network.head(network._shown(fold(X), None, one)) - network.head(network._shown(fold(X), None, labels))
    ).abs()
    assert change[0].amax(0).nonzero().min(0).values.tolist() == [0, 3, 1]  # the folded voxel (1, 4, 2) and neighbours
    assert change[0].amax(0).nonzero().max(0).values.tolist() == [2, 5, 3]


def test_a_class_changes_the_answer_and_minus_one_is_unknown():
    network = _network(located=False, classes=2)
    network.classes.weight[0] = 0  # padding: the fixture filled it
    plain = network(X, LEVEL)
    unknown, first, second = (network(X, LEVEL, classes=torch.tensor([value])) for value in (-1, 0, 1))
    torch.testing.assert_close(unknown, plain, rtol=0, atol=0)
    assert not torch.allclose(first, plain)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("stem", [0, 4])
@pytest.mark.parametrize("shown", [{"located": False}, {"located": False, "labels": 3, "classes": 2}, {"labels": 2}])
def test_a_network_that_adopts_another_gives_its_answers_where_only_the_image_is_known(shown, stem):
    other = _network(labels=2, stem=stem)
    network = _network(seed=1, stem=stem, **shown)
    adopt(network, other)
    torch.testing.assert_close(network(X, LEVEL), other(X, LEVEL), atol=1e-4, rtol=1e-4)
    if network.labels == 2:
        labels = torch.randint(0, 2, (1, 16, 16, 16))
        torch.testing.assert_close(
            network(X, LEVEL, labels=labels), other(X, LEVEL, labels=labels), atol=1e-4, rtol=1e-4
        )
    if network.classes is not None:
        torch.testing.assert_close(network(X, LEVEL, classes=torch.tensor([1])), other(X, LEVEL), atol=1e-4, rtol=1e-4)


def test_classes_of_the_same_number_are_adopted():
    other, network = _network(classes=2), _network(seed=1, classes=2)
    adopt(network, other)
    told = {"classes": torch.tensor([1])}
    torch.testing.assert_close(network(X, LEVEL, **told), other(X, LEVEL, **told))


def test_networks_of_other_layers_are_not_adopted():
    with pytest.raises(ValueError, match="differ in channels"):
        adopt(ResidualUNet((8, 24), (1, 1)), _network())
    with pytest.raises(ValueError, match="differ in channels"):
        adopt(ResidualUNet((8, 16), (1, 1), stem=4), _network())


@pytest.mark.parametrize(("stripped", "channels"), [(-1.0, 1), (0.5, 2)])
def test_a_mean_of_images_that_there_were_none_of_takes_no_room(stripped: float, channels: int) -> None:
    network, other = _network(located=True), _network(located=True)
    network.atlas[0, 0] = torch.rand(network.atlas.shape[2:])
    network.atlas[0, 1] = stripped
    state = network.state_dict()
    assert state["atlas"].shape[1] == channels
    other.load_state_dict(state)
    assert torch.equal(other.atlas, network.atlas)
    assert state["atlas"].shape[1] == channels  # the caller's is left as it was
