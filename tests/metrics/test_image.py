"""Metrics against scikit-image's and the definition."""

import math

import numpy as np
import pytest

from medfusion.metrics import dice, psnr


def test_psnr_is_that_of_scikit_image_and_sees_only_the_mask():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    truth = rng.random((6, 6, 6))
    image, mask = truth + rng.normal(0, 0.1, truth.shape), rng.random(truth.shape) < 0.5
    expected = metrics.peak_signal_noise_ratio(truth[mask], image[mask], data_range=2.0)
    assert psnr(truth, image, mask, 2.0) == pytest.approx(expected)
    image[~mask] = 1e6
    assert psnr(truth, image, mask, 2.0) == pytest.approx(expected)
    assert psnr(truth, truth, mask, 1.0) == math.inf
    with pytest.raises(ValueError, match="empty"):
        psnr(truth, image, mask & False, 1.0)


def test_dice():
    a, b = np.zeros((4, 4, 4)), np.zeros((4, 4, 4))
    assert math.isnan(dice(a, b))
    a[:2], b[1:3] = 1, 1
    assert dice(a, b) == pytest.approx(0.5)
    assert dice(a, a) == 1.0
    assert dice(a, 0 * a) == 0.0
