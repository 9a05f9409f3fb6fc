"""White noise passes the audit, and structure, coloured noise and blurred edges do not."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from medfusion.diffusion import Residual
from medfusion.tasks.audit import BANDS, audit_removed, edge_correlation, spectrum, structure_map

SHAPE = (56, 48, 52)
TISSUE = ndimage.binary_dilation(np.pad(np.ones((30, 26, 28), bool), [(12, 14), (10, 12), (11, 13)]), iterations=4)


def white(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_noise_is_noise(seed, strength):
    audit = audit_removed(strength * white(seed), TISSUE, edges=0.0)
    assert audit.warnings == []
    assert audit.structured < 2e-4
    assert audit.loud < 1e-3
    np.testing.assert_allclose(audit.spectrum[2:], strength**2, rtol=0.1)
    np.testing.assert_allclose(audit.spectrum[:2], strength**2, rtol=0.6)  # of few waves


def test_a_faint_blob_is_found_where_it_is_with_its_sign():
    blob = np.zeros(SHAPE, np.float32)
    blob[28, 24, 26] = 1
    blob = ndimage.gaussian_filter(blob, 3)
    audit = audit_removed(white() - 1.2 * blob / blob.max(), TISSUE, edges=0.0)
    assert any("structure" in words for words in audit.warnings)
    place = np.unravel_index(np.abs(audit.map).argmax(), SHAPE)
    np.testing.assert_allclose(place, (28, 24, 26), atol=3)
    assert audit.map[place] < -5


def test_the_map_is_in_standard_deviations_of_smoothed_noise():
    inner = structure_map(white())[12:-12, 12:-12, 12:-12]
    assert np.abs(inner).std() < 1
    for width in (1.0, 2.0, 4.0):
        smooth = ndimage.gaussian_filter(white(), width) * (2 * width * np.sqrt(np.pi)) ** 1.5
        assert smooth[12:-12, 12:-12, 12:-12].std() == pytest.approx(1, abs=0.15)


def test_more_than_the_noise_in_a_corner():
    removed = white()
    removed[:20] *= 1.5
    audit = audit_removed(removed, TISSUE, edges=0.0)
    assert any("more than the noise" in words for words in audit.warnings)
    assert 0.05 < audit.loud < 0.5


def test_coloured_noise_has_too_much_power_at_low_frequencies():
    low = ndimage.gaussian_filter(white(), 1)
    audit = audit_removed(low / low.std(), TISSUE, edges=0.0)
    assert any("low frequencies" in words for words in audit.warnings)
    assert audit.spectrum[0] > 3 > 1 > audit.spectrum[-1]


def test_a_wave_stands_in_its_band():
    along = np.arange(SHAPE[0])[:, None, None]
    wave = np.broadcast_to(np.sqrt(2) * np.cos(2 * np.pi * 0.28 * along), SHAPE).astype(np.float32)
    power = spectrum(wave, np.ones(SHAPE, bool))
    assert int(np.argmax(power)) == int(0.28 * 2 * BANDS)


@pytest.mark.parametrize("smoother", [1.0, 4.0])
def test_edges_taken_off_are_told_from_noise(smoother):
    """Of a Gaussian field with the spectrum S, D = S / (S + r^2) y is the posterior mean, and takes off noise alone.

    With a fourth of S it takes off edges too.
    """
    ratio, generator = 0.2, torch.Generator().manual_seed(0)
    shape = (48, 48, 48)
    squares = sum(f**2 for f in torch.meshgrid([torch.fft.fftfreq(48)] * 3, indexing="ij"))
    power = torch.exp(-squares / (2 * 0.12**2))

    def filtered(x, transfer):
        return torch.fft.ifftn(transfer * torch.fft.fftn(x)).real[None, None]

    y = filtered(torch.randn(shape, generator=generator), power.sqrt())
    y = y + ratio * torch.randn(y.shape, generator=generator)
    transfer = power / (power + smoother * ratio**2)
    signs = torch.randn(y.shape, generator=generator).sign()
    x0 = filtered(y[0, 0], transfer)
    found = Residual(ratio, x0, (y - x0) / ratio, signs, filtered(signs[0, 0], transfer))
    correlation = edge_correlation(found, torch.ones_like(y, dtype=torch.bool))
    assert correlation < -0.1 if smoother > 1 else abs(correlation) < 0.03
