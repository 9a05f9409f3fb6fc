"""The features of volumes: of one volume alone, from the network as it is, and in the unit they are documented in."""

import hashlib

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

from medfusion.data.intensity import SEEN, measure_scale
from medfusion.metrics.generative import frechet_distance
from medfusion.prior import Prior, prior_path
from medfusion.tasks.features import CENTRE, LEVELS, TIME, _projection, _way_down, extractor, features


def _volume(seed: int, shape=(24, 30, 17)) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (2 * ndimage.gaussian_filter(noise, 1.5)).clip(-1, 1).astype(np.float32)


def test_features_are_those_of_each_volume_alone():
    volumes = [_volume(0), _volume(1), _volume(2, (33, 16, 20))]
    found = features(volumes)
    assert found.shape == (3, len(CENTRE))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(features(volumes[::-1]), found[::-1])
    np.testing.assert_array_equal(features(volumes[1:2]), found[1:2])
    assert np.linalg.norm(found[0] - found[1]) > 1


def test_features_see_what_a_network_is_shown():
    volume = _volume(0)
    volume[3, 4, 5] = SEEN[1]
    brighter, turned = volume.copy(), np.asfortranarray(volume.astype(np.float64))
    brighter[3, 4, 5] = 100
    np.testing.assert_array_equal(features([brighter, turned]), features([volume, volume]))


def test_what_is_padded_is_the_far_side_again():
    volume = _volume(3, (24, 31, 23))
    padded = np.pad(volume, ((0, 0), (0, 1), (0, 1)), mode="edge")
    np.testing.assert_allclose(features([padded]), features([volume]), rtol=1e-6)


def test_levels_are_those_of_the_network():
    network = Prior.load("mri-patch").network
    log_ratio = torch.tensor([-1.0915])
    x = torch.from_numpy(_volume(4, (32, 32, 16)))[None, None]
    seen = {}
    hooks = [
        stage[-1].register_forward_hook(lambda _, __, answer, k=k: seen.update({k: answer}))
        for k, stage in enumerate(network.down)
    ]
    network(x, log_ratio)
    for hook in hooks:
        hook.remove()
    found = list(_way_down(network, x, log_ratio))
    assert len(found) == max(LEVELS) + 1
    for k, z in enumerate(found):
        torch.testing.assert_close(z, seen[k], rtol=1e-4, atol=1e-4)
    assert float(Prior.load("mri-patch").process.log_noise_ratio(TIME)) == pytest.approx(-1.0915, abs=1e-4)


def test_the_projection_is_fixed():
    columns = _projection()
    np.testing.assert_allclose(columns.T @ columns, np.eye(len(CENTRE)), atol=1e-12)
    np.testing.assert_allclose(columns[:3, 0], [0.003473, -0.004398, 0.009087], atol=1e-6)


def test_the_extractor_names_its_file():
    name, digest = extractor().split()
    assert name == "mri-patch"
    assert digest == hashlib.sha256(prior_path(name).read_bytes()).hexdigest()


@pytest.mark.parametrize("shape", [(15, 20, 20), (20, 20), (1, 20, 20, 20)])
def test_other_volumes_are_refused(shape):
    with pytest.raises(ValueError, match="16 voxels"):
        features([np.zeros(shape, np.float32)])


def test_real_hippocampi_have_the_documented_scale_and_blur_is_far(real_data):
    paths = sorted((real_data / "hippocampus" / "dev" / "images").glob("*.nii.gz"))[:16]
    arrays = [np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj, np.float32) for path in paths]
    volumes = [measure_scale(array, 99).apply(array) for array in arrays]
    found = features(volumes)
    assert np.square(found.mean(axis=0)).mean() < 0.2
    assert 0.5 < found.var(axis=0).mean() < 1.5
    other = features([ndimage.gaussian_filter(volume, 1.0) for volume in volumes[8:]])
    assert abs(frechet_distance(found[:8], found[8:])) < 20
    assert frechet_distance(found[:8], other) > 40
