"""Intensity: exactly invertible, and unmoved by scanner scale, background share, outliers and noise."""

import numpy as np
import pytest
from scipy import ndimage

from medfusion.data.intensity import IntensityScale, foreground, measure_scale
from medfusion.data.noise import estimate_noise
from medfusion.errors import MedfusionError


def head(size=48, seed=0):
    """A ball of textured tissue (300 to 1000) in air (0)."""
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij")) - (size - 1) / 2
    inside = (grid**2).sum(axis=0) < (size * 0.38) ** 2
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=inside.shape), 4)
    return np.where(inside, 650 + 350 * texture / np.abs(texture).max(), 0.0).astype(np.float32), inside


def test_the_scale_is_exactly_invertible_even_for_outliers():
    image, _ = head()
    image[20, 20, 20] = 30000.0
    scale = measure_scale(image, 99)
    np.testing.assert_allclose(scale.invert(scale.apply(image)), image, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a * 0.01,
        lambda a: a * 37 + 500,
        lambda a: np.pad(a, 30),
        lambda a: np.where(np.random.default_rng(0).random(a.shape) < 1e-4, a * 20, a),
        lambda a: a + np.random.default_rng(0).normal(0, 100, a.shape),
    ],
    ids=["units", "offset", "more air", "outliers", "noise"],
)
def test_the_prior_sees_the_same_image_whatever_the_scanner(change):
    image, inside = head()
    changed = change(image)
    plain, other = measure_scale(image, 99).apply(image), measure_scale(changed, 99).apply(changed)
    pad = (other.shape[0] - plain.shape[0]) // 2
    other = other[pad : pad + 48, pad : pad + 48, pad : pad + 48]
    assert abs(np.median(plain[inside]) - np.median(other[inside])) < 0.04
    assert abs(np.median(plain[~inside]) - np.median(other[~inside])) < 0.04
    assert np.median(plain[~inside]) == pytest.approx(-1, abs=1e-6)


def test_foreground_is_the_tissue():
    image, inside = head()
    noisy = image + np.random.default_rng(1).normal(0, 60, image.shape)
    found = foreground(noisy)
    assert 2 * (found & inside).sum() / (found.sum() + inside.sum()) > 0.97


def test_a_constant_scan_is_refused():
    with pytest.raises(MedfusionError, match="case7: no tissue"):
        measure_scale(np.full((20, 20, 20), 3.0), 99, "case7")


@pytest.mark.parametrize("sigma", [10.0, 40.0, 120.0])
@pytest.mark.parametrize("stripped", [False, True])
def test_noise_is_estimated_within_ten_percent_also_on_a_zeroed_background(sigma, stripped):
    image, inside = head(64)
    noisy = image + np.random.default_rng(2).normal(0, sigma, image.shape)
    noisy = np.where(inside, noisy, 0) if stripped else noisy
    assert estimate_noise(noisy) == pytest.approx(sigma, rel=0.1)


def test_scale_fields_map_to_minus_one_and_one():
    assert IntensityScale(100.0, 900.0).apply(np.array([100.0, 500.0, 900.0])).tolist() == [-1, 0, 1]
