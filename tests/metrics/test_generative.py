"""The patch distance against closed forms on noise."""

import math

import numpy as np
import pytest

from medfusion.metrics import patch_distance


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
