"""Training crops: reproducible step by step, context that says where, twins that stay together."""

import numpy as np
import pytest
import torch

from medfusion.config import DataConfig, PreprocessingConfig
from medfusion.data.crops import (
    STRIPPED,
    WHOLE_HEAD,
    Case,
    context_channels,
    draw_batch,
    mean_atlas,
    prepare,
    split,
    stripped,
    validation_batches,
)
from medfusion.networks import ResidualUNet
from medfusion.networks.residual_unet import ATLAS, ATLAS_REACH
from medfusion.volume import Volume
from tests.data.test_intensity import head


def _case(name, kind=WHOLE_HEAD, shape=(40, 40, 40)):
    generator = torch.Generator().manual_seed(len(name))
    return Case(name, torch.randn(shape, generator=generator).half(), np.array([20.0, 20.0, 20.0]), 2.0, kind)


def test_a_batch_depends_on_seed_and_step_alone():
    cases, config = [_case("a"), _case("bb"), _case("ccc", STRIPPED)], DataConfig(crop=32)
    first, again = (draw_batch(cases, config, 4, seed=1, step=7) for _ in range(2))
    other = draw_batch(cases, config, 4, seed=1, step=8)
    assert first.images.shape == (4, 1, 32, 32, 32)
    assert first.context.shape == (4, 4, 16, 16, 16)
    torch.testing.assert_close(first.images, again.images, rtol=0, atol=0)
    torch.testing.assert_close(first.context, again.context, rtol=0, atol=0)
    assert not torch.equal(first.images, other.images)


def test_context_gives_decimetres_from_the_centre():
    context = context_channels((8, 4, 4), (10, 0, 0), np.array([14.0, 1.5, 1.5]), 2.0, STRIPPED)
    assert context.shape == (4, 4, 2, 2)
    # the first folded voxel covers indices 10 and 11: 3.5 voxels of 2 mm left of the centre
    torch.testing.assert_close(context[0, :, 0, 0], torch.tensor([-0.07, -0.03, 0.01, 0.05]))
    torch.testing.assert_close(context[1, 0, :, 0], torch.tensor([-0.02, 0.02]))
    assert bool((context[3] == STRIPPED).all())
    assert bool((context_channels((4, 4, 4), (0, 0, 0), None, 2.0, 0.0) == 0).all())


def test_volumes_smaller_than_a_crop_are_padded():
    batch = draw_batch([_case("small", shape=(20, 40, 40))], DataConfig(crop=32), 2, seed=0, step=0)
    assert batch.images.shape == (2, 1, 32, 32, 32)
    assert torch.isfinite(batch.images).all()


def test_split_keeps_a_scan_and_its_twin_together():
    cases = [_case(n, kind) for n in "abcdef" for kind in (WHOLE_HEAD, STRIPPED)]
    training, validation = split(cases, 2, seed=0)
    assert {c.name for c in training}.isdisjoint(c.name for c in validation)
    assert len(validation) == 4
    assert len(training) == 8
    assert len(validation_batches(validation, DataConfig(crop=32), 0)) == 4


def test_prepare_makes_the_same_image_of_any_orientation():
    image, _ = head(40)
    image[5:12, 18:22, 18:22] = 900  # left and right differ
    upright = Volume(image, np.diag([2.0, 2.0, 2.0, 1.0]), "v")
    affine = np.array([[0, 0, -2.0, 78.0], [2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    turned = Volume(np.transpose(image[::-1], (1, 2, 0)), affine, "v")
    first, second = (prepare(v, PreprocessingConfig()) for v in (upright, turned))
    torch.testing.assert_close(first.image, second.image)
    np.testing.assert_allclose(first.centre, second.centre)


def test_stripping_sets_the_outside_to_the_background_and_keeps_the_brain():
    image, inside = head(40)
    image += 50
    brain = inside & (np.arange(40) < 25)[:, None, None]
    result = stripped(Volume(image, np.eye(4), "v"), brain).array
    np.testing.assert_array_equal(result[brain], image[brain])
    assert result[30:].max() == pytest.approx(image.min())


def test_the_atlas_is_the_mean_image_around_the_centroid_read_back_at_any_position():
    ramp = torch.arange(40.0)[:, None, None].expand(40, 40, 40) / 40
    cases = [
        Case("a", ramp.half(), np.array([20.0, 20.0, 20.0]), 2.0, WHOLE_HEAD),
        Case("b", (ramp + 0.5).half(), np.array([20.0, 20.0, 20.0]), 2.0, WHOLE_HEAD),
    ]
    atlas = mean_atlas(cases, ATLAS, ATLAS_REACH)
    assert atlas.shape == ATLAS
    assert bool((atlas[0, 1] == -1).all())  # no skull-stripped image was given: air
    network = ResidualUNet((8, 16), (1, 1))
    network.atlas.copy_(atlas)
    context = context_channels((8, 8, 8), (18, 10, 10), cases[0].centre, 2.0, WHOLE_HEAD)[None]
    expected = network.expected(context)[0, 0]
    # folded voxels of the block begin at index 18 and average pairs: 18.5, 20.5, ...
    torch.testing.assert_close(expected[:, 0, 0], torch.tensor([18.5, 20.5, 22.5, 24.5]) / 40 + 0.25, atol=2e-3, rtol=0)
    assert bool((network.expected(torch.zeros(1, 4, 4, 4, 4)) == 0).all())
