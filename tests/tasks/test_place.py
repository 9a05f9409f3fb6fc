"""A scan among the healthy: bias fields that are known, with and without a lesion; where it lies."""

from dataclasses import replace

import numpy as np
import pytest
from prior_factory import CENTRE, grid, head, random_prior, with_neck
from scipy import ndimage

from medfusion.tasks.calibrate import head_in
from medfusion.tasks.place import Healthy, Seen, bias_field, ending, placed, seen_by, without_bias
from medfusion.volume import Volume

SIZE = (40,) * 3
AFFINE = grid(SIZE)


def seen(array: np.ndarray) -> Seen:
    return seen_by(random_prior(), Volume(array.astype(np.float32), AFFINE, "case"))


def field(array: np.ndarray, healthy: Seen) -> np.ndarray:
    """Of a phantom that lies where the healthy one does."""
    volume = healthy.volume
    spread = np.full(volume.shape, 0.1, np.float32)
    return bias_field(seen(array).volume, np.eye(4), Healthy(volume, spread, head_in(volume.array)))


def ramp() -> np.ndarray:
    """Brighter by a third on one side than on the other."""
    return np.broadcast_to(np.linspace(0.87, 1.15, SIZE[0], dtype=np.float32)[:, None, None], SIZE)


def test_a_gain_is_found_and_taken_out() -> None:
    healthy = seen(head(AFFINE, SIZE, noise=0.0))
    inside = head_in(healthy.volume.array)
    brighter = replace(healthy, volume=healthy.volume.with_array((healthy.volume.array + 1) * 1.1 - 1))
    among = np.eye(4), Healthy(healthy.volume, np.full(SIZE, 0.1, np.float32), inside)
    even = without_bias(brighter, *among)
    np.testing.assert_allclose(even.bias[inside], 1.1, rtol=1e-3)
    np.testing.assert_allclose(even.volume.array[inside], healthy.volume.array[inside], atol=0.01)
    tomography = replace(brighter, volume=replace(brighter.volume, modality="CT"))
    assert without_bias(tomography, *among) is tomography


def test_air_where_the_healthy_have_tissue_is_no_bias() -> None:
    """A brain that is cut off early, or a scan that ends, where the healthy vary much."""
    healthy = seen(head(AFFINE, SIZE, noise=0.0))
    inside = head_in(healthy.volume.array)
    among = np.eye(4), Healthy(healthy.volume, np.full(SIZE, 0.6, np.float32), inside)
    cut = np.where(ndimage.binary_erosion(inside, iterations=2), healthy.volume.array, -1).astype(np.float32)
    bias = bias_field(healthy.volume.with_array(cut), *among)
    assert np.abs(bias - 1)[inside].max() < 0.06
    part = Volume(healthy.volume.array[:, :, :24], AFFINE, "part")
    assert np.abs(bias_field(part, *among) - 1).max() < 0.01


def test_what_is_smooth_over_the_head_is_bias() -> None:
    clean = head(AFFINE, SIZE, noise=0.0)
    healthy = seen(clean)
    inside = head_in(healthy.volume.array)
    found = field(clean * ramp(), healthy)[inside]
    slope, _ = np.polyfit(np.log(ramp()[inside]), np.log(found), 1)
    assert np.corrcoef(found, ramp()[inside])[0, 1] > 0.98
    assert 0.1 < slope < 1  # the phantom is narrower than the window; a head is twice as wide


@pytest.mark.parametrize("shade", [0.0, 2.0])
def test_a_lesion_is_no_bias(shade: float) -> None:
    clean = head(AFFINE, SIZE, noise=0.0)
    healthy = seen(clean)
    inside = head_in(healthy.volume.array)
    middle = np.argwhere(inside).mean(axis=0)
    ball = np.linalg.norm(np.indices(SIZE).T - middle, axis=-1).T < 5
    ill = np.where(ball, clean * shade, clean)
    bias = field(ill, healthy)
    assert np.abs(bias / np.median(bias[inside]) - 1)[inside].max() < 0.02


def test_the_way_back_to_the_units_of_the_scan() -> None:
    clean = head(AFFINE, SIZE, noise=0.0)
    scan = Volume(clean.astype(np.float32), AFFINE, "case")
    bias = ndimage.gaussian_filter(np.random.default_rng(0).normal(1, 1, SIZE), 6).astype(np.float32).clip(0.9, 1.1)
    uneven = seen(clean)
    even = Seen(uneven.volume.with_array((uneven.volume.array + 1) / bias - 1), uneven.scale, bias)
    within = np.abs(uneven.volume.array) < 1.5  # the rest may be clipped
    np.testing.assert_allclose(even.in_scan_units(even.volume.array, scan)[within], clean[within], rtol=1e-4, atol=1e-2)


def test_a_head_is_placed_whatever_its_neck_does() -> None:
    (straight, affine, around), (bent, *_) = with_neck(0.0), with_neck(0.3)
    inside = ndimage.binary_erosion(around, iterations=7)  # some 16 mm
    matrix = placed(Volume(bent, affine, "bent"), Volume(straight, affine, "atlas"), inside)
    points = np.append(CENTRE + np.random.default_rng(0).normal(0, 15, (200, 3)), np.ones((200, 1)), axis=1)
    assert np.linalg.norm((points @ (matrix - np.eye(4)).T)[:, :3], axis=1).mean() < 1.0


def test_a_part_ends_where_its_field_of_view_does() -> None:
    part = Volume(np.ones((4, 5, 6), bool), AFFINE, "part")
    padded = ending(part)
    assert padded.shape == (6, 7, 8)
    assert padded.array.sum() == part.array.sum()
    np.testing.assert_allclose(padded.to_world((1, 1, 1)), part.to_world((0, 0, 0)))
