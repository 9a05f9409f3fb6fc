"""The measures of generated volumes against closed forms, brute force, and sets made by hand."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric
from scipy.linalg import sqrtm

from medfusion.metrics import patch_distance
from medfusion.metrics.generative import (
    frechet_distance,
    gaussian_distance,
    interval,
    mmd,
    ms_ssim_weights,
    pairwise_ms_ssim,
    precision_recall,
    texture,
)

SPECTRUM = 1 / np.arange(1, 33)  # standard deviations of 32 features: a few directions hold most of the variance


def _gaussian(rng, n: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    features = scale * SPECTRUM * rng.standard_normal((n, 32))
    features[:, 0] += shift
    return features


def _with_moments(rng, mean, covariance, n: int) -> np.ndarray:
    """Samples whose mean and covariance are exactly these."""
    white = rng.standard_normal((n, len(mean)))
    white -= white.mean(axis=0)
    white @= np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def test_gaussian_distance_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = (x @ x.T + np.eye(6) for x in rng.standard_normal((2, 6, 6)))
    m = rng.standard_normal(6)
    found = gaussian_distance(_with_moments(rng, 0 * m, a, 30), _with_moments(rng, m, b, 20))
    root = sqrtm(sqrtm(a) @ b @ sqrtm(a)).real
    assert found == pytest.approx(m @ m + np.trace(a + b - 2 * root))
    scaled = gaussian_distance(_with_moments(rng, m, a, 30), _with_moments(rng, m, 4 * a, 9))
    assert scaled == pytest.approx(np.trace(a))  # (2 - 1)^2 tr S


def test_gaussian_distance_of_singular_covariances():
    """Fewer samples than dimensions; turned together, nothing changes; in orthogonal planes, variances add up."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 5, 16))
    turn = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    assert gaussian_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert gaussian_distance(a @ turn, b @ turn) == pytest.approx(gaussian_distance(a, b))
    a[:, 8:], b[:, :8] = 0, 0
    expected = np.square(a.mean(0) - b.mean(0)).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    assert gaussian_distance(a, b) == pytest.approx(expected)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.7, 1.0), (0.0, 1.5)])
def test_frechet_distance_of_few_is_that_of_infinitely_many(shift, scale):
    """Sets of 24 in 32 dimensions; the mean of 40 is within 3 standard errors, the plain distance far above."""
    rng = np.random.default_rng(2)
    sets = [(_gaussian(rng, 24), _gaussian(rng, 24, shift, scale)) for _ in range(40)]
    found = np.array([frechet_distance(*pair) for pair in sets])
    plain = np.mean([gaussian_distance(*pair) for pair in sets])
    expected = shift**2 + (scale - 1) ** 2 * np.square(SPECTRUM).sum()
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - expected) < 3 * error
    assert plain - expected > 4 * error


def test_mmd_is_that_of_the_definition():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((5, 3)), rng.standard_normal((4, 3)) + 0.5

    def mean(a, b, pairs):
        return np.mean([(a[i] @ b[j] / 3 + 1) ** 3 for i, j in pairs])

    within = [mean(s, s, [(i, j) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    across = mean(x, y, [(i, j) for i in range(5) for j in range(4)])
    assert mmd(x, y) == pytest.approx(sum(within) - 2 * across)


def test_mmd_is_unbiased():
    """Its mean for sets of 6 is 0 under the null, and that for sets of 600 otherwise."""
    rng = np.random.default_rng(4)
    same = np.array([mmd(*rng.standard_normal((2, 6, 4))) for _ in range(1000)])
    assert abs(same.mean()) < 3 * same.std() / math.sqrt(1000)
    few = np.array([mmd(rng.standard_normal((6, 4)), rng.standard_normal((6, 4)) + 0.5) for _ in range(1000)])
    many = np.array([mmd(rng.standard_normal((600, 4)), rng.standard_normal((600, 4)) + 0.5) for _ in range(20)])
    error = math.hypot(few.std() / math.sqrt(1000), many.std() / math.sqrt(20))
    assert abs(few.mean() - many.mean()) < 3 * error
    assert few.mean() > 6 * error


@pytest.mark.parametrize(("statistic", "factor", "truth"), [(frechet_distance, 1.0, 0.49), (mmd, 2.0, None)])
def test_intervals_cover_the_truth(statistic, factor, truth):
    rng = np.random.default_rng(5)
    if truth is None:
        truth = np.mean([mmd(factor * _gaussian(rng, 800), factor * _gaussian(rng, 800, 0.7)) for _ in range(10)])
    inside = []
    for _ in range(15):
        low, high = interval(statistic, factor * _gaussian(rng, 20), factor * _gaussian(rng, 20, 0.7), draws=20)
        inside.append(low <= truth <= high)
    assert np.mean(inside) >= 0.8


def test_the_interval_of_equal_distributions_covers_0_and_follows_the_seed():
    rng = np.random.default_rng(6)
    a, b = _gaussian(rng, 20), _gaussian(rng, 30)
    low, high = interval(frechet_distance, a, b, seed=1, draws=40)
    assert low < 0 < high
    assert (low + high) / 2 == pytest.approx(frechet_distance(a, b))
    assert interval(frechet_distance, a, b, seed=1, draws=40) == (low, high)
    assert interval(frechet_distance, a, b, seed=2, draws=40) != (low, high)


def test_precision_and_recall_of_missing_and_of_invented_modes():
    rng = np.random.default_rng(7)
    left, right = np.array([0.0, 0.0]), np.array([100.0, 0.0])

    def cloud(centre):
        return centre + rng.standard_normal((20, 2))

    left_cloud = cloud(left)
    real = np.concatenate([left_cloud, cloud(right)])
    half_missing = np.concatenate([left_cloud, left_cloud + 1e-3])
    assert precision_recall(real, half_missing) == (1.0, 0.5)
    half_wrong = np.concatenate([left_cloud, cloud(np.array([0.0, 1e6]))])
    assert precision_recall(real, half_wrong) == (0.5, 0.5)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1e6) == (0.0, 0.0)


def test_the_balls_reach_the_kth_neighbour():
    """Members at 0, 1, 3: for k = 1 the balls reach 1, 1 and 2 to either side; the gap's edge belongs to them."""
    members = np.array([[0.0], [1.0], [3.0]])
    points = np.array([[-1.0], [-1.01], [5.0], [5.01]])
    assert precision_recall(members, points, k=1)[0] == 0.5
    assert precision_recall(members, points, k=2)[0] == 1.0  # -3 to 6
    with pytest.raises(ValueError, match="more cases"):
        precision_recall(members, points, k=3)


def test_features_of_other_widths_are_refused():
    for measure in (frechet_distance, mmd, precision_recall):
        with pytest.raises(ValueError, match="needs features"):
            measure(np.zeros((9, 3)), np.zeros((9, 4)))


def _smooth(seed: int, n: int, edge: int) -> np.ndarray:
    coarse = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (n, 1, 6, 6, 6)))
    return torch.nn.functional.interpolate(coarse, size=(edge,) * 3, mode="trilinear")[:, 0].numpy().astype(np.float32)


@pytest.mark.parametrize(("edge", "scales"), [(7, 1), (24, 2), (28, 3), (62, 3), (63, 4), (112, 5), (128, 5)])
def test_scales_that_fit(edge, scales):
    weights = ms_ssim_weights(edge)
    assert len(weights) == scales
    assert sum(weights) == pytest.approx(1)
    assert weights[0] / weights[-1] == pytest.approx(0.0448 / (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[scales - 1])


@pytest.mark.parametrize("edge", [24, 28])
def test_ms_ssim_is_monais_on_volumes_from_0_on(edge):
    volumes = _smooth(9, 3, edge)
    metric = MultiScaleSSIMMetric(3, data_range=1.0, kernel_size=7, weights=ms_ssim_weights(edge))
    unit = torch.from_numpy(volumes + 1)[:, None] / 2
    expected = [float(metric(unit[[i]], unit[[j]])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert pairwise_ms_ssim(volumes) == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_is_1_for_equal_volumes_and_falls_with_noise():
    one = _smooth(10, 1, 24)
    noise = np.random.default_rng(11).standard_normal(one.shape).astype(np.float32)
    set_ = np.concatenate([one, one, one + 0.05 * noise, one + 0.2 * noise])
    equal, little, much, *_ = pairwise_ms_ssim(set_)
    assert equal == pytest.approx(1)
    assert equal - 0.001 > little > much + 0.05


def test_so_many_pairs_by_seed():
    volumes = _smooth(12, 1, 14) + 0.3 * _smooth(13, 6, 14)
    every = pairwise_ms_ssim(volumes)
    some = pairwise_ms_ssim(volumes, most=5, seed=1)
    assert len(every) == 15
    assert len(set(some)) == 5
    assert set(some) < set(every)
    assert some.tolist() == pairwise_ms_ssim(volumes, most=5, seed=1).tolist()
    assert set(some) != set(pairwise_ms_ssim(volumes, most=5, seed=2))
    assert pairwise_ms_ssim(volumes, most=99).tolist() == every.tolist()


def test_volumes_smaller_than_a_window_are_refused():
    with pytest.raises(ValueError, match="edges of 7"):
        pairwise_ms_ssim(np.zeros((2, 6, 9, 9), np.float32))


def _noise(seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return (shift + scale * np.random.default_rng(seed).standard_normal((16, 24, 24, 24))).astype(np.float32)


def test_a_set_is_at_no_distance_from_itself_in_any_order():
    volumes = _noise(0)
    assert patch_distance(volumes, volumes).tolist() == [0, 0, 0]
    assert patch_distance(volumes, volumes.copy(), levels=1)[0] == 0


def test_two_sets_of_the_same_noise_are_near():
    assert patch_distance(_noise(0), _noise(1), levels=2).max() < 0.07  # 1000 patches: 1 / 1000^(1/2) and a half


def test_stronger_noise_is_farther_by_the_difference_of_the_spreads():
    """W1 of N(0, 1) and N(0, s^2) is |s - 1| E|z| = |s - 1| (2 / pi)^(1/2), at every level of white noise."""
    expected = 0.5 * math.sqrt(2 / math.pi)
    assert patch_distance(_noise(0), _noise(1, scale=1.5), levels=2) == pytest.approx([expected] * 2, rel=0.06)


def test_brightness_is_seen_at_the_coarsest_level_alone():
    fine, middle, coarse = patch_distance(_noise(0), _noise(0, shift=0.5))
    assert max(fine, middle) < 1e-5
    # a constant c projected on a random unit vector is c z, of mean size c (2 / pi)^(1/2); the level's sd is 1 / 8
    assert coarse == pytest.approx(0.5 * 8 * math.sqrt(2 / math.pi), rel=0.1)


def test_sets_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        patch_distance(_noise(0), _noise(1)[:8])


def test_texture_is_what_differs_from_its_surroundings() -> None:
    """Nothing of a ramp; of white noise all but the mean of 27 voxels, 1 - 1/27 of the variance."""
    ramp = np.add.outer(np.arange(20.0), np.add.outer(2 * np.arange(21.0), -np.arange(22.0)))
    assert texture(ramp) < 1e-10
    noise = np.random.default_rng(0).standard_normal((48, 48, 48))
    np.testing.assert_allclose(texture(3 * noise), 3 * (1 - 1 / 27) ** 0.5, rtol=0.01)
