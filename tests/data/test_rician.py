"""Rice's distribution against draws of it."""

import numpy as np
import pytest

from medfusion.data.rician import FLOOR, rice_mean, rice_std, stabilise, unbias

SIGMA = 17.0
AMPLITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 11.9, 12.1, 20.0, 100.0]


def magnitudes(amplitude: float) -> np.ndarray:
    real, imaginary = np.random.default_rng(0).standard_normal((2, 400_000))
    return SIGMA * np.hypot(amplitude + real, imaginary)


@pytest.mark.parametrize("amplitude", AMPLITUDES)
def test_mean_and_standard_deviation(amplitude):
    drawn = magnitudes(amplitude) / SIGMA
    assert float(rice_mean(amplitude)) == pytest.approx(drawn.mean(), abs=0.005)
    assert float(rice_std(amplitude)) == pytest.approx(drawn.std(), abs=0.005)


def test_air():
    assert float(rice_mean(0.0)) == pytest.approx(FLOOR)
    assert float(rice_std(0.0)) == pytest.approx(0.6551, abs=1e-4)


@pytest.mark.parametrize("amplitude", AMPLITUDES)
def test_stabilised_noise_is_the_same_everywhere(amplitude):
    """To first order: 0.66 in air and 0.91 at an SNR of 2 become 0.89 and 1.06."""
    spread = stabilise(magnitudes(amplitude), SIGMA).std() / SIGMA
    assert 0.87 < spread < 1.07
    assert spread == pytest.approx(1, abs=0.01) or amplitude < 5


@pytest.mark.parametrize("amplitude", AMPLITUDES)
def test_the_mean_of_what_was_stabilised_gives_the_amplitude_back(amplitude):
    mean = stabilise(magnitudes(amplitude), SIGMA).mean(keepdims=True)
    # in air the inverse is steep: its square root
    assert float(unbias(mean, SIGMA)[0]) / SIGMA == pytest.approx(amplitude, abs=0.01 if amplitude else 0.1)


def test_bright_values_lose_their_small_bias_alone():
    m = SIGMA * np.array([50.0, 200.0])
    np.testing.assert_allclose(stabilise(m, SIGMA), m - SIGMA / (2 * m / SIGMA), rtol=1e-6)
