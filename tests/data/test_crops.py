"""Training crops: functions of seed and number, context that says where, shares as the config says, twins together."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from medfusion.config import DataConfig, PreprocessingConfig
from medfusion.data.crops import (
    AIR,
    STRIPPED,
    UNKNOWN,
    WHOLE_HEAD,
    Case,
    Crops,
    context_channels,
    mean_atlas,
    prepare,
    split,
    stripped,
    validation_crops,
)
from medfusion.networks import ResidualUNet
from medfusion.networks.residual_unet import ATLAS, ATLAS_REACH
from medfusion.volume import Volume
from tests.data.test_intensity import head


def _case(name, kind=WHOLE_HEAD, shape=(40, 40, 40)):
    generator = torch.Generator().manual_seed(len(name))
    return Case(name, torch.randn(shape, generator=generator).half(), np.array([20.0, 20.0, 20.0]), 2.0, kind)


def _located(number=0, **settings):
    """Crop ``number`` of a scan whose voxel (x, y, z) has the value 1600 x + 40 y + z, and the label likewise."""
    index = torch.arange(64000.0).view(40, 40, 40)
    case = Case("ramp", index, np.array([20.0, 20.0, 20.0]), 2.0, WHOLE_HEAD, labels=index.long() % 30000)
    return Crops([case], DataConfig(crop=32, **settings), seed=0).draw(number, located=True)[0]


def test_a_crop_depends_on_seed_and_number_alone():
    cases, config = [_case("a"), _case("bb"), _case("ccc", STRIPPED)], DataConfig(crop=32)
    first, again = (Crops(cases, config, seed=1).draw(7, located=True)[0] for _ in range(2))
    assert first.image.shape == (1, 32, 32, 32)
    assert first.context.shape == (4, 16, 16, 16)
    assert first.labels is None
    torch.testing.assert_close(first.image, again.image, rtol=0, atol=0)
    torch.testing.assert_close(first.context, again.context, rtol=0, atol=0)
    for seed, number in ((1, 8), (2, 7)):
        other, _ = Crops(cases, config, seed).draw(number, located=True)
        assert not torch.equal(first.image, other.image)


def test_scans_are_drawn_alike_and_stripped_ones_at_their_share():
    cases = [_case("a"), _case("bb"), _case("ccc", STRIPPED)]
    crops = Crops(cases, DataConfig(crop=32, stripped_share=0.4), seed=0)
    drawn = [crops.case(crops.generator(number)).name for number in range(2000)]
    assert drawn.count("ccc") / 2000 == pytest.approx(0.4, abs=0.04)
    assert drawn.count("a") / 2000 == pytest.approx(0.3, abs=0.04)


def test_all_scans_stripped_are_all_drawn():
    crops = Crops([_case("a", STRIPPED), _case("bb", STRIPPED)], DataConfig(crop=32), seed=0)
    assert {crops.case(crops.generator(number)).name for number in range(20)} == {"a", "bb"}


@pytest.mark.parametrize("flips", ["x", "xyz"])
def test_position_and_labels_stay_with_the_voxels_through_flips(flips, monkeypatch):
    """The first voxel of each folded pair tells its own index; the context must tell the same place."""
    monkeypatch.setattr("medfusion.data.crops.GAIN", 0.0)
    monkeypatch.setattr("medfusion.data.crops.GAMMA", 0.0)
    monkeypatch.setattr("medfusion.data.crops.POSITION_JITTER", 0.0)
    seen = set()
    for number in range(30):
        crop = _located(number, located_share=1.0, withheld_share=0.0, flips=flips)
        index = crop.image[0].round().long()
        torch.testing.assert_close(crop.labels, index % 30000)
        xyz = torch.stack([index // 1600, index // 40 % 40, index % 40]).float()
        pairs = xyz.unfold(1, 2, 2).unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2, -3))
        signs = torch.sign(xyz[(0, 1, 2), (1, 0, 0), (0, 1, 0), (0, 0, 1)] - xyz[:, 0, 0, 0])
        expected = (pairs - 20) * 0.02 * signs.view(3, 1, 1, 1)  # decimetres; mirrored heads are mirrored about 0
        torch.testing.assert_close(crop.context[:3], expected, atol=1e-5, rtol=0)
        seen.add(tuple(signs.tolist()))
    assert seen == ({(1, 1, 1), (-1, 1, 1)} if flips == "x" else set(product((1, -1), repeat=3)))


def test_a_zoomed_crop_shows_fewer_voxels_larger(monkeypatch):
    monkeypatch.setattr("medfusion.data.crops.GAIN", 0.0)
    monkeypatch.setattr("medfusion.data.crops.GAMMA", 0.0)
    steps = []
    for number in range(20):
        crop = _located(number, located_share=0.0, zoomed_share=1.0, withheld_share=0.0)
        step = float((crop.image[0, 16, 16, 1:] - crop.image[0, 16, 16, :-1])[8:-8].mean().abs())
        steps.append(step)  # voxels of the scan that one voxel of the crop advances
        assert crop.labels.shape == (32, 32, 32)
        assert bool((crop.context[:3] == 0).all())
    assert 0.5 <= min(steps) < 0.65
    assert 0.85 < max(steps) < 1


def test_labels_and_class_are_withheld_together_at_their_share():
    case = Case("a", torch.zeros(40, 40, 40), np.zeros(3), 2.0, WHOLE_HEAD, torch.ones(40, 40, 40).byte(), 1)
    crops = Crops([case], DataConfig(crop=32, withheld_share=0.3), seed=0)
    told = [
        (bool((c.labels == 1).all()), int(c.class_index)) for c, _ in (crops.draw(n, located=False) for n in range(300))
    ]
    assert set(told) == {(True, 1), (False, UNKNOWN)}
    assert told.count((False, UNKNOWN)) / 300 == pytest.approx(0.3, abs=0.08)
    withheld = next(c for c, _ in (crops.draw(n, located=False) for n in range(300)) if int(c.class_index) == UNKNOWN)
    assert bool((withheld.labels == UNKNOWN).all())


def test_scans_without_labels_join_at_their_share_as_if_labels_were_withheld():
    labelled = Case("a", torch.zeros(40, 40, 40), np.zeros(3), 2.0, WHOLE_HEAD, torch.ones(40, 40, 40).byte())
    config = DataConfig(crop=32, labels="x", unlabelled=True, labelled_share=0.7, withheld_share=0)
    crops = Crops([labelled, *(_case("b" * n) for n in range(1, 9))], config, seed=0)
    drawn = [crops.draw(n, located=False)[0].labels for n in range(300)]
    assert {tuple(labels.unique().tolist()) for labels in drawn} == {(1,), (UNKNOWN,)}
    assert all(labels.dtype == torch.int64 for labels in drawn)
    assert np.mean([bool((labels == 1).all()) for labels in drawn]) == pytest.approx(0.7, abs=0.08)


def test_scans_without_labels_are_held_out_before_those_with():
    labelled = Case("a", torch.zeros(40, 40, 40), np.zeros(3), 2.0, WHOLE_HEAD, torch.ones(40, 40, 40).byte())
    cases = [labelled, replace(labelled, name="aa"), *(_case("b" * n) for n in range(1, 5))]
    for seed in range(10):
        assert all(case.labels is None for case in split(cases, 3, seed)[1])
    assert {case.name for seed in range(20) for case in split(cases, 5, seed)[1]} == {case.name for case in cases}


def test_contrasts_are_changed_at_their_shares(monkeypatch):
    done = []
    monkeypatch.setattr("medfusion.data.crops.paint", lambda image, labels, rng: done.append("paint") or image)
    monkeypatch.setattr("medfusion.data.crops.remap", lambda image, curve: done.append("remap") or image)
    case = Case("a", torch.zeros(40, 40, 40), np.zeros(3), 2.0, WHOLE_HEAD, torch.ones(40, 40, 40).byte())
    config = DataConfig(crop=32, painted_share=0.5, remapped_share=0.3, labels="x")
    crops = Crops([case], config, seed=0)
    for number in range(400):
        crops.draw(number, located=False)
    assert done.count("paint") / 400 == pytest.approx(0.5, abs=0.08)
    assert done.count("remap") / 400 == pytest.approx(0.3, abs=0.08)


def test_a_scan_that_lies_on_the_device_gives_the_same_crops():
    case = _case("a")
    resident = replace(case, resident=case.image.clone())
    for number in range(5):
        one, other = (Crops([c], DataConfig(crop=32), seed=0).draw(number, located=True)[0] for c in (case, resident))
        torch.testing.assert_close(one.image, other.image, rtol=0, atol=0)


def test_crops_avoid_air():
    image = torch.full((120, 40, 40), -1.0)
    image[:20] = 1.0
    crops = Crops([Case("a", image, np.zeros(3), 2.0, WHOLE_HEAD)], DataConfig(crop=32), seed=0)
    full = [float(crops.draw(number, located=False)[0].image.mean()) > AIR for number in range(100)]
    assert sum(full) > 80  # one place in four is not all air


def test_context_gives_decimetres_from_the_centre():
    context = context_channels((8, 4, 4), (10, 0, 0), np.array([14.0, 1.5, 1.5]), 2.0, STRIPPED)
    assert context.shape == (4, 4, 2, 2)
    # the first folded voxel covers indices 10 and 11: 3.5 voxels of 2 mm left of the centre
    torch.testing.assert_close(context[0, :, 0, 0], torch.tensor([-0.07, -0.03, 0.01, 0.05]))
    torch.testing.assert_close(context[1, 0, :, 0], torch.tensor([-0.02, 0.02]))
    assert bool((context[3] == STRIPPED).all())
    assert bool((context_channels((4, 4, 4), (0, 0, 0), None, 2.0, 0.0) == 0).all())


def test_volumes_smaller_than_a_crop_are_padded():
    crop, _ = Crops([_case("small", shape=(20, 40, 40))], DataConfig(crop=32), seed=0).draw(0, located=True)
    assert crop.image.shape == (1, 32, 32, 32)
    assert torch.isfinite(crop.image).all()


def test_split_keeps_a_scan_and_its_twin_together():
    cases = [_case(n, kind) for n in "abcdef" for kind in (WHOLE_HEAD, STRIPPED)]
    training, validation = split(cases, 2, seed=0)
    assert {c.name for c in training}.isdisjoint(c.name for c in validation)
    assert len(validation) == 4
    assert len(training) == 8
    crops = validation_crops(validation, DataConfig(crop=32), 0)
    assert [tuple(crop.image.shape) for crop in crops] == [(1, 1, 32, 32, 32)] * 4


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


def test_crops_keep_the_contrast_of_their_scan_where_they_are_not_varied():
    """On the ramp a voxel's label says what its value was."""
    kept, varied = (_located(varied=varied, zoomed_share=0, withheld_share=0, flips="") for varied in (False, True))
    assert torch.equal(kept.image[0] % 30000, kept.labels.float())
    assert not torch.equal(varied.image[0] % 30000, varied.labels.float())
