"""The sample data are there, small, and agree with what truth.json says of them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage

from medfusion.io.training_set import read_training_set
from medfusion.io.training_set_check import check_training_set

SAMPLE = Path(__file__).parents[1] / "sample_data"
TRUTH = json.loads((SAMPLE / "truth.json").read_text())


def load(name: str) -> np.ndarray:
    return nibabel.load(SAMPLE / name).get_fdata()


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return load("head_clean.nii.gz")


def test_all_images_share_one_oblique_grid(clean: np.ndarray) -> None:
    affine = nibabel.load(SAMPLE / "head_clean.nii.gz").affine
    assert not np.allclose(affine[:3, :3], np.diag(np.diag(affine[:3, :3])))
    for path in SAMPLE.rglob("head_*.nii.gz"):
        image = nibabel.load(path)
        assert image.shape == clean.shape, path
        np.testing.assert_array_equal(image.affine, affine)
        np.testing.assert_allclose(image.header.get_zooms(), 2.0, rtol=1e-6)


def test_small_enough_to_ship_and_carries_its_notice() -> None:
    assert sum(p.stat().st_size for p in SAMPLE.rglob("*") if p.is_file() and p.suffix != ".pyc") < 7e6
    assert "Copyright (C) 1993-2004 Louis Collins" in (SAMPLE / "NOTICE.txt").read_text()


def test_the_hippocampi_are_a_training_set_of_the_scripts_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SAMPLE))
    from make_hippocampi import NUMBER, SEED, label_map

    real = read_training_set(SAMPLE / "hippocampi")
    check_training_set(real)
    assert real.label_names == {"background": 0, "anterior": 1, "posterior": 2}
    assert "CC BY-SA 4.0" in real.about["licence"]
    assert len(real.labelled) == NUMBER
    for number, case in enumerate(real.labelled):
        np.testing.assert_array_equal(load(case.labels), label_map(np.random.default_rng((SEED, number))))


@pytest.mark.parametrize("name", ["noisy", "lesions"])
def test_noise_is_rician_of_the_stated_sigma(clean: np.ndarray, name: str) -> None:
    sigma = TRUTH["noise"][name]["sigma"]
    image = load(f"{name}/head_{name}.nii.gz")
    # In air a Rician magnitude has mean square 2 sigma^2; where the signal is strong its error has variance sigma^2.
    air, strong = clean == 0, clean > 8 * sigma
    if name == "lesions":  # a lesion's soft border reaches beyond its mask
        strong &= ~ndimage.binary_dilation(load("lesions_truth/head_lesions_mask.nii.gz") > 0, iterations=4)
    assert np.sqrt((image[air] ** 2).mean() / 2) == pytest.approx(sigma, rel=0.02)
    assert (image - clean)[strong].std() == pytest.approx(sigma, rel=0.02)


def test_noisy_psnr_follows_from_sigma(clean: np.ndarray) -> None:
    level, brain = TRUTH["percentile_99_of_head_clean"], load("head_brain_mask.nii.gz") > 0
    assert np.percentile(clean[clean > 0], 99) == pytest.approx(level, rel=0.01)
    error = (load("noisy/head_noisy.nii.gz") - clean)[brain]
    psnr = 10 * np.log10(level**2 / (error**2).mean())
    assert psnr == pytest.approx(20 * np.log10(1 / 0.07), abs=0.2)  # 23.1 dB at 7 %


def test_brain_mask_is_one_brain_of_human_size() -> None:
    brain = load("head_brain_mask.nii.gz")
    assert set(np.unique(brain)) == {0, 1}
    parts, _ = ndimage.label(brain)
    assert np.bincount(parts.ravel())[1:].max() / brain.sum() > 0.999
    assert 1000 < brain.sum() * 8 / 1000 < 2100  # ml


def test_lesions_are_where_truth_says_and_nowhere_else(clean: np.ndarray) -> None:
    mask = load("lesions_truth/head_lesions_mask.nii.gz") > 0
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    assert count == len(TRUTH["lesions"])
    sigma = TRUTH["noise"]["lesions"]["sigma"]
    difference = load("lesions/head_lesions.nii.gz") - clean
    affine = nibabel.load(SAMPLE / "head_clean.nii.gz").affine
    for lesion in TRUTH["lesions"]:
        centre = np.rint(apply_affine(np.linalg.inv(affine), lesion["centre_mm"])).astype(int)
        region = labels == labels[tuple(centre)]
        assert mask[tuple(centre)]
        assert region.sum() * 0.008 == pytest.approx(lesion["volume_ml"], abs=0.01)
        sign = 1 if lesion["kind"].startswith("bright") else -1
        assert sign * np.median(difference[region]) > 6 * sigma
    assert mask[load("head_brain_mask.nii.gz") == 0].sum() == 0
    elsewhere = ~ndimage.binary_dilation(mask, iterations=4)
    assert np.abs(difference[elsewhere]).max() < 8 * sigma


def test_dicom_series_holds_the_voxels_of_the_nifti() -> None:
    noisy = nibabel.load(SAMPLE / "noisy" / "head_noisy.nii.gz")
    voxels = noisy.get_fdata()
    files = sorted((SAMPLE / "noisy_dicom").glob("*.dcm"))
    assert len(files) == voxels.shape[0]
    for index in (0, 40, len(files) - 1):
        data = pydicom.dcmread(files[index])
        assert str(data.PatientName) == "SAMPLE^HEAD"
        rows, columns = data.pixel_array.shape
        row, column = rows // 3, columns // 4
        along_row, along_column = np.reshape(data.ImageOrientationPatient, (2, 3)).astype(float)
        step = column * data.PixelSpacing[1] * along_row + row * data.PixelSpacing[0] * along_column
        world = (np.array(data.ImagePositionPatient, dtype=float) + step) * [-1, -1, 1]  # LPS to RAS
        voxel = apply_affine(np.linalg.inv(noisy.affine), world)
        np.testing.assert_allclose(voxel, np.rint(voxel), atol=1e-3)
        assert data.pixel_array[row, column] == voxels[tuple(np.rint(voxel).astype(int))]


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed")
def test_dicom_conforms() -> None:
    for path in sorted((SAMPLE / "noisy_dicom").glob("*.dcm"))[::30]:
        report = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
        said = report.stdout + report.stderr
        assert said.strip() == "MRImage"  # neither an error nor a warning
