"""What was acquired is told from what a console filled in, and the way there and back loses nothing."""

import numpy as np
import pytest
from prior_factory import grid, head
from scipy import ndimage

from medfusion.data.intensity import foreground
from medfusion.data.zero_filling import acquired_shape, to_shape

ACQUIRED = (64, 60, 56)


def magnitude(shape: tuple[int, ...], noise: float, seed: int = 0) -> np.ndarray:
    """A head whose real and imaginary channel are filled to ``shape`` before the magnitude is taken, as consoles do."""
    rng = np.random.default_rng(seed)
    still = head(grid(ACQUIRED, (1.4, 1.4, 1.4)), ACQUIRED)
    channels = [to_shape(part + noise * rng.standard_normal(ACQUIRED), shape) for part in (still, 0.0)]
    return np.hypot(*channels)


def found(array: np.ndarray) -> tuple[int, ...]:
    return acquired_shape(array, foreground(array))


@pytest.mark.parametrize("noise", [10.0, 30.0, 80.0])
@pytest.mark.parametrize("shape", [(128, 120, 56), (96, 60, 84), (128, 120, 112)], ids=str)
def test_the_acquired_matrix_is_found(shape, noise):
    for axis, n in enumerate(found(magnitude(shape, noise))):
        assert ACQUIRED[axis] <= n <= ACQUIRED[axis] + 4
        assert n == shape[axis] or shape[axis] > ACQUIRED[axis]


@pytest.mark.parametrize("noise", [0.0, 10.0, 80.0])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: ndimage.gaussian_filter(x, 0.8),
        lambda x: ndimage.zoom(x, 1.5, order=1),
        lambda x: ndimage.zoom(x, 1.5, order=3),
        lambda x: np.where(ndimage.binary_erosion(foreground(x), iterations=2), x, 0),
    ],
    ids=["as it is", "blurred", "linear", "cubic", "masked"],
)
def test_other_scans_are_left_on_their_grid(change, noise):
    """Linear and cubic interpolation leave power at all frequencies: cutting them would lose content."""
    array = change(magnitude(ACQUIRED, noise))
    assert found(array) == array.shape


def test_nothing_is_lost_on_the_way_to_the_acquired_grid_and_back():
    filled = to_shape(head(grid(ACQUIRED), ACQUIRED, noise=40), (96, 91, 84))
    shape = found(filled)
    assert shape < filled.shape
    np.testing.assert_allclose(to_shape(to_shape(filled, shape), filled.shape), filled, atol=0.01)


def test_the_noise_of_a_filled_scan_is_that_of_the_acquired_one():
    noise = np.random.default_rng(0).standard_normal((48, 48, 48))
    assert to_shape(noise, (96, 72, 60)).std() == pytest.approx(1.0, abs=0.02)


def test_scans_with_little_to_see_are_left_alone():
    assert acquired_shape(np.zeros((20, 70, 70)), np.zeros((20, 70, 70), bool)) == (20, 70, 70)
    thick = magnitude(ACQUIRED, 10.0)[..., ::3]
    assert found(thick) == thick.shape
