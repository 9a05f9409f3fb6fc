"""Simplex noise: unit variance in closed form, a spectrum that falls, no seams, no direction preferred."""

import numpy as np
import pytest

from medfusion.data.simplex import simplex_noise


def noise(shape=(64, 64, 64), seed=0, **options):
    return simplex_noise(shape, np.random.default_rng(seed), **options)


@pytest.mark.parametrize("frequency", [0.11, 0.37])
def test_one_octave_has_mean_0_and_standard_deviation_1(frequency) -> None:
    field = noise((72, 72, 72), frequency=frequency, octaves=1)
    assert field.dtype == np.float32
    assert field.mean() == pytest.approx(0, abs=0.02)
    assert field.std() == pytest.approx(1, abs=0.03)


def test_octaves_add_up_to_standard_deviation_1() -> None:
    for persistence in (0.5, 0.8):
        field = noise((48, 48, 48), frequency=0.23, octaves=5, persistence=persistence)
        assert field.std() == pytest.approx(1, abs=0.04)


def spectrum(field):
    """Mean power in eight bands of frequency, from 0 to Nyquist's; tapered, for the field does not repeat."""
    taper = np.hanning(len(field))
    power = np.abs(np.fft.fftn(field * taper * taper[:, None] * taper[:, None, None])) ** 2
    frequency = np.fft.fftfreq(len(field))
    radius = np.sqrt(sum(f**2 for f in np.meshgrid(*[frequency] * 3, indexing="ij")))
    band = np.minimum(radius * 16, 8).astype(int)
    return np.array([power[band == b].mean() for b in range(8)])


def test_the_spectrum_falls_and_white_noise_does_not() -> None:
    white = np.random.default_rng(0).standard_normal((64, 64, 64))
    assert spectrum(white)[0] == pytest.approx(spectrum(white)[-1], rel=0.3)
    falling = spectrum(noise())
    assert (np.diff(falling) < 0).all()
    assert falling[0] > 100 * falling[-1]


def correlation(field, step, axis):
    a, b = np.moveaxis(field, axis, 0)[step:], np.moveaxis(field, axis, 0)[:-step]
    return float((a * b).mean() / (field**2).mean())


def test_neighbours_agree_over_a_distance_set_by_the_frequency() -> None:
    coarse = noise(frequency=1 / 16, octaves=1)
    fine = noise(frequency=1 / 8, octaves=1)
    for step in (1, 2, 4):  # half the frequency, twice the distance
        near = np.mean([correlation(fine, step, axis) for axis in range(3)])
        far = np.mean([correlation(coarse, 2 * step, axis) for axis in range(3)])
        assert far == pytest.approx(near, abs=0.06)
    assert np.mean([correlation(coarse, 1, axis) for axis in range(3)]) > 0.9
    assert abs(np.mean([correlation(coarse, 24, axis) for axis in range(3)])) < 0.1


def test_no_direction_is_preferred() -> None:
    """Along the axes and along their diagonals, correlation falls alike with the distance in voxels."""
    fields = [noise((48, 48, 48), seed, frequency=1 / 8, octaves=1) for seed in range(8)]
    along = [np.mean([correlation(field, 3, axis) for field in fields]) for axis in range(3)]
    np.testing.assert_allclose(along, np.mean(along), atol=0.05)
    diagonal = [(f[3:, 3:] * f[:-3, :-3]).mean() / (f**2).mean() for f in fields]
    further = np.mean([[correlation(field, step, axis) for step in (4, 5)] for field in fields for axis in range(3)], 0)
    assert np.mean(diagonal) == pytest.approx(further @ [0.76, 0.24], abs=0.05)  # 3 sqrt 2 = 4.24


def test_there_are_no_seams_between_cells_or_at_the_end_of_the_period() -> None:
    """Slope and curvature stay bounded along a line of 234 cells, more than the 64 after which gradients repeat."""
    frequency = 1 / 256
    line = noise((1, 2, 60000), 3, frequency=frequency, octaves=1)
    assert np.abs(line).max() > 1.5
    assert np.abs(np.diff(line)).max() < 30 * frequency
    assert np.abs(np.diff(line, n=2)).max() < 200 * frequency**2


def test_a_generator_gives_one_field_and_then_another() -> None:
    rng = np.random.default_rng(5)
    first, second = simplex_noise((8, 9, 10), rng), simplex_noise((8, 9, 10), rng)
    np.testing.assert_array_equal(first, noise((8, 9, 10), 5))
    assert not np.allclose(first, second)
    assert not np.allclose(first, noise((8, 9, 10), 6))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 50, 7), (33, 2, 1), (0, 4, 4)])
def test_any_shape_is_a_part_of_the_same_field(shape) -> None:
    field = noise(shape, 2)
    assert field.shape == shape
    np.testing.assert_allclose(field, noise((33, 50, 7), 2)[tuple(slice(n) for n in shape)], atol=1e-6)


def test_persistence_0_leaves_the_first_octave() -> None:
    np.testing.assert_allclose(noise((16, 16, 16), persistence=0.0), noise((16, 16, 16), octaves=1), atol=1e-6)
