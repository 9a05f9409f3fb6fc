"""Other contrasts: curves that span the range and are not steep, painting that follows the regions."""

import numpy as np
import pytest
import torch

from medfusion.data.contrast import AIR_SHARE, KNOTS, STEEPEST, paint, random_curve, remap

IMAGE = torch.randn(12, 12, 12, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def test_curves_span_the_range_and_magnify_noise_only_so_much() -> None:
    rng = np.random.default_rng(0)
    curves = np.array([random_curve(rng) for _ in range(500)])
    assert curves.shape == (500, KNOTS)
    np.testing.assert_allclose(curves.min(axis=1), -1, atol=1e-6)
    np.testing.assert_allclose(curves.max(axis=1), 1, atol=1e-6)
    assert np.abs(np.diff(curves, axis=1)).max() * (KNOTS - 1) / 2 <= STEEPEST + 1e-5
    assert (curves[:, 0] == -1).mean() >= AIR_SHARE - 0.05
    falling = (np.diff(curves, axis=1) < 0).any(axis=1)
    assert falling.mean() > 0.5  # bright and dark change places


def test_a_curve_goes_through_its_knots_and_is_linear_between_and_beyond() -> None:
    curve = random_curve(np.random.default_rng(1))
    knots = torch.linspace(-1, 1, KNOTS)
    torch.testing.assert_close(remap(knots, curve), torch.from_numpy(curve))
    middles = (knots[1:] + knots[:-1]) / 2
    torch.testing.assert_close(remap(middles, curve), torch.from_numpy((curve[1:] + curve[:-1]) / 2))
    torch.testing.assert_close(
        remap(torch.tensor([-1.5, 1.5]), curve), torch.from_numpy(curve[[0, -1]]) + torch.tensor([-0.25, 0.25])
    )
    straight = np.linspace(-1, 1, KNOTS, dtype=np.float32)
    torch.testing.assert_close(remap(IMAGE, straight), IMAGE)


def test_what_is_not_finite_stays_so() -> None:
    assert torch.isnan(remap(torch.tensor([float("nan")]), np.linspace(-1, 1, KNOTS, dtype=np.float32))).all()


def test_regions_get_means_of_their_own_and_keep_their_outline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three flat regions: without softening each stays flat, and what label 0 covers is only remapped."""
    monkeypatch.setattr("medfusion.data.contrast._binomial", lambda image: image)
    labels = torch.zeros(12, 12, 12, dtype=torch.uint8)
    labels[4:8], labels[8:] = 7, 200
    image = torch.tensor([-1.0, 0.2, 0.2]).repeat_interleave(4).view(12, 1, 1).expand(12, 12, 12)
    means = []
    for seed in range(20):
        painted = paint(image, labels, np.random.default_rng(seed))
        curve = random_curve(np.random.default_rng(seed))
        torch.testing.assert_close(painted[:4], remap(image[:4], curve))
        for region in (painted[4:8], painted[8:]):
            assert float(region.std()) < 1e-5
        means.append([float(painted[5, 0, 0]), float(painted[9, 0, 0])])
    differ = np.diff(np.array(means), axis=1)
    assert np.abs(differ).min() > 1e-4  # alike in the scan, apart when painted
    assert np.array(means).std(axis=0).min() > 0.2


def test_detail_comes_back_by_one_factor_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medfusion.data.contrast._binomial", lambda image: image)
    labels = torch.ones(12, 12, 12, dtype=torch.uint8)
    painted = paint(IMAGE, labels, np.random.default_rng(3))
    detail, back = IMAGE - IMAGE.mean(), painted - painted.mean()
    factor = float((detail * back).sum() / (detail * detail).sum())
    assert -1 <= factor <= 1
    torch.testing.assert_close(back, factor * detail, atol=1e-5, rtol=0)


def test_withheld_or_empty_label_maps_are_remapped_only() -> None:
    curve = random_curve(np.random.default_rng(4))
    empty = torch.zeros(12, 12, 12, dtype=torch.uint8)
    torch.testing.assert_close(paint(IMAGE, empty, np.random.default_rng(4)), remap(IMAGE, curve))


def test_softening_never_leaves_the_range_and_moves_edges_alone() -> None:
    labels = torch.zeros(12, 12, 12, dtype=torch.uint8)
    labels[6:] = 1
    image = torch.full((12, 12, 12), -1.0)
    image[6:] = 0.5
    for seed in range(10):
        painted = paint(image, labels, np.random.default_rng(seed))
        for flat in (painted[:5], painted[7:]):
            assert float(flat.std()) < 1e-5
        low, high = sorted((float(painted[0, 0, 0]), float(painted[-1, 0, 0])))
        assert low - 1e-5 <= float(painted.min())
        assert float(painted.max()) <= high + 1e-5
