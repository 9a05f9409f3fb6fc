"""The shipped prior finds the noise that was added to the sample head: its level, kind, place and correlation."""

import numpy as np
import pytest
from scipy import ndimage

from medfusion.data.grid import canonical
from medfusion.data.intensity import foreground
from medfusion.io import discover, read
from medfusion.prior import Prior
from medfusion.tasks.denoise import CORRELATED, denoise_volume, series_noise, volume_noise
from medfusion.tasks.noise import Noise, blocks, is_rician
from medfusion.volume import Volume


@pytest.fixture(scope="module")
def prior() -> Prior:
    return Prior.load("brain-t1")


@pytest.fixture(scope="module")
def clean() -> Volume:
    return read(discover("sample_data/head_clean.nii.gz")[0])


def with_noise(clean: Volume, sigma, *, rician: bool = False, seed: int = 0) -> Volume:
    rng = np.random.default_rng(seed)
    array = clean.array + sigma * rng.standard_normal(clean.shape)
    if rician:
        array = np.hypot(array, sigma * rng.standard_normal(clean.shape))
    return clean.with_array(array.astype(np.float32))


@pytest.mark.parametrize(("percent", "rician"), [(5, False), (20, False), (10, True)])
def test_level_and_kind(clean, prior, percent, rician):
    sigma = 7.15 * percent  # of the 99th percentile
    noise = volume_noise(with_noise(clean, sigma, rician=rician), prior)
    assert noise.sigma == pytest.approx(sigma, rel=0.08)
    assert noise.kind == ("rician" if rician else "gaussian")
    assert abs(noise.shared) < 0.05
    assert noise.map is None
    assert noise.acquired is None


def test_a_skull_stripped_scan_has_the_noise_of_its_brain(clean, prior):
    noisy = with_noise(clean, 70.0)
    brain = read(discover("sample_data/head_brain_mask.nii.gz")[0]).array > 0
    noise = volume_noise(noisy.with_array(np.where(brain, noisy.array, 0).astype(np.float32)), prior)
    assert noise.sigma == pytest.approx(70.0, rel=0.1)
    assert noise.kind == "gaussian"


def test_noise_that_neighbours_share_is_told(clean, prior):
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(clean.shape), 0.6)
    found = volume_noise(clean.with_array((clean.array + 70 * noise / noise.std()).astype(np.float32)), prior)
    assert found.shared > CORRELATED


def test_noise_that_grows_along_an_axis_has_a_map(clean, prior):
    """Three times as much at one end as at the other, as in the middle of an array of coils."""
    along = np.linspace(0.5, 1.5, clean.shape[1])[:, None] * np.full(clean.shape, 70.0)
    noisy = with_noise(clean, along)
    noise = volume_noise(noisy, prior)
    truth = canonical(clean.with_array(along)).array
    inside = foreground(canonical(clean).array)
    assert noise.map is not None
    error = np.log(noise.map / truth)[inside]
    assert np.sqrt(np.mean(error**2)) < 0.15
    own, even = (denoise_volume(noisy, prior, noise=n).volume for n in (noise, Noise(noise.sigma, noise.kind)))
    head = foreground(clean.array)
    rmse = [np.sqrt(np.mean((found.array - clean.array)[head] ** 2)) for found in (own, even)]
    assert rmse[0] < 0.97 * rmse[1]


def test_a_clean_scan_comes_back_bit_for_bit(clean, prior):
    result = denoise_volume(clean, prior)
    assert result.time == 0.0
    assert result.volume.array.dtype == clean.array.dtype
    np.testing.assert_array_equal(result.volume.array, clean.array)


def test_denoising_twice_changes_next_to_nothing(clean, prior):
    noisy = with_noise(clean, 70.0)
    once = denoise_volume(noisy, prior).volume
    twice = denoise_volume(once, prior).volume
    assert np.std(twice.array - once.array) < 0.1 * np.std(once.array - noisy.array)


def test_a_series_has_one_noise(clean, prior):
    noises = series_noise([with_noise(clean, s, seed=k) for k, s in enumerate((60.0, 60.0, 300.0))], prior)
    assert noises.sigma == pytest.approx(60.0, rel=0.1)


@pytest.mark.parametrize("change", [0.0, 100.0, -50.0])
def test_air_that_is_not_that_of_a_magnitude_says_gaussian(change):
    shape, rng = (64, 64, 64), np.random.default_rng(0)
    tissue = np.zeros(shape, bool)
    tissue[16:48, 16:48, 16:48] = True
    magnitude = np.hypot(1000 * tissue + 30 * rng.standard_normal(shape), 30 * rng.standard_normal(shape))
    assert is_rician(magnitude + change, tissue, 30.0) == (change == 0)
    assert not is_rician(np.where(tissue, magnitude, 0), tissue, 30.0)


def test_blocks_lie_in_tissue_apart_from_each_other():
    tissue = np.zeros((100, 90, 80), bool)
    tissue[20:90, 10:80, 15:75] = True
    places = blocks(tissue, 6)
    assert len(places) == 6
    assert all(tissue[place].mean() > 0.6 for place in places)
    begins = np.array([[s.start for s in place] for place in places])
    apart = np.abs(begins[:, None] - begins[None]).max(axis=-1) + 99 * np.eye(6)
    assert apart.min() >= 16
    assert places == blocks(tissue, 6)
