"""Noise and blur of scans whose noise and blur are known."""

import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from medfusion.data.quality import TREND, blur, scan_properties
from medfusion.io import discover
from tests.dicom_factory import write_series

FWHM = 2 * math.sqrt(2 * math.log(2))  # of a Gaussian, in its standard deviations


@pytest.mark.parametrize("width", [2.0, 3.0, 4.0])
def test_blur_is_that_of_smoothed_noise(width: float) -> None:
    """Along the axis on which it is widest; slices of 1.5 mm make no difference."""
    spacing = np.array([1, 1, 1.5])
    noise = np.random.default_rng(0).normal(size=(48, 48, 32))
    image = ndimage.gaussian_filter(noise, [width / FWHM / 2, width / FWHM, width / FWHM / 1.5], mode="wrap")
    everywhere = np.ones(image.shape, bool)
    assert blur(image, everywhere, spacing) == pytest.approx(width, rel=0.08)
    shading = 2 * image.std() * np.sin(np.linspace(0, np.pi, 48))[:, None, None]  # over the whole image: no blur
    assert blur(image + shading, everywhere, spacing) == pytest.approx(width, rel=0.15)
    assert width < TREND


def test_blur_of_nothing() -> None:
    image, spacing = np.random.default_rng(0).normal(size=(8, 8, 8)), np.ones(3)
    assert math.isnan(blur(image, np.zeros(image.shape, bool), spacing))
    assert math.isnan(blur(np.full(image.shape, 3.0), np.ones(image.shape, bool), spacing))


def saved(path: Path, array: np.ndarray, affine: np.ndarray) -> dict[str, float | str]:
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), affine), path)
    return scan_properties(discover(path)[0])


def test_properties_of_a_nifti_file(tmp_path: Path) -> None:
    head = np.zeros((24, 24, 24))
    head[4:-4, 4:-4, 4:-4] = 200
    head += np.random.default_rng(0).normal(0, 10, head.shape)
    found = saved(tmp_path / "a.nii.gz", head, np.diag([0.8, 0.9, 3, 1]))
    assert (found["pixel_mm"], found["slice_mm"]) == (0.8, 3)
    assert found["noise"] == pytest.approx(0.05, rel=0.15)
    assert found["manufacturer"] == found["field_tesla"] == ""
    blurred = saved(tmp_path / "b.nii.gz", ndimage.gaussian_filter(head, 1), np.diag([0.8, 0.9, 3, 1]))
    assert blurred["blur_mm"] > found["blur_mm"]
    assert saved(tmp_path / "c.nii.gz", np.stack([head, 2 * head], axis=3), np.diag([0.8, 0.9, 3, 1])) == found
    constant = saved(tmp_path / "d.nii.gz", np.ones((8, 8, 8)), np.eye(4))
    assert math.isnan(constant["noise"])
    assert math.isnan(saved(tmp_path / "e.nii.gz", head[:, :, :2], np.eye(4))["noise"])


def test_the_scanner_of_a_dicom_series(tmp_path: Path) -> None:
    write_series(tmp_path, Manufacturer="ACME", MagneticFieldStrength="1.5")
    found = scan_properties(discover(tmp_path)[0])
    assert (found["manufacturer"], found["model"], found["field_tesla"]) == ("ACME", "", "1.5")
    assert found["modality"] == "MR"
