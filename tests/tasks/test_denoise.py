"""Denoise: the closed-form posterior mean comes back on the scan's own grid, in its units and in its format.

For data that are white noise N(0, 1) in the prior's units, E[x_0 | x_t] = alpha^2 y where y = x_t / alpha is the scan.
With noise_ratio r, alpha^2 = 1 / (1 + r^2), so in the scan's units every value moves towards the middle of its scale.
"""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_factory import scanner_affine, write_series
from numpy.typing import NDArray
from prior_factory import CENTRE, grid, head, random_prior, saved, white_prior, write_head

from medfusion.data.intensity import measure_scale
from medfusion.errors import MedfusionError
from medfusion.io import discover, read
from medfusion.tasks.denoise import denoise, denoise_volume
from medfusion.tasks.noise import Noise
from medfusion.volume import Volume

GRIDS = {
    name: (grid(shape, *rest), shape)
    for name, (shape, *rest) in {
        "RAS": [(40, 40, 40)],
        "odd": [(41, 37, 45), (1.9, 2.1, 1.7)],
        "flipped": [(38, 40, 44), (2.0, 2.0, 2.0), "LPS"],
        "permuted and oblique": [(45, 39, 40), (1.7, 2.0, 2.2), "PIR", (11, -7, 19)],
        "thick slices": [(60, 57, 21), (1.3, 1.4, 4.0), "LAS", (0, 25, 0)],
    }.items()
}


def scan(affine: NDArray[np.float64], shape: tuple[int, ...], noise: float = 40.0) -> Volume:
    return Volume(head(affine, shape, noise=noise), affine, "case")


def posterior_mean(array: NDArray[np.floating], sigma: float) -> NDArray[np.float64]:
    """What the prior of white noise must answer, in the scan's units."""
    scale = measure_scale(array, 99)
    middle, half = (scale.high + scale.low) / 2, (scale.high - scale.low) / 2
    return middle + (array.astype(np.float64) - middle) / (1 + (sigma / half) ** 2)


@pytest.mark.parametrize("tile", [192, 24], ids=["whole", "tiled"])
@pytest.mark.parametrize(("affine", "shape"), list(GRIDS.values()), ids=list(GRIDS))
def test_the_posterior_mean_on_any_grid(affine: NDArray[np.float64], shape: tuple[int, ...], tile: int) -> None:
    noisy = scan(affine, shape)
    before = noisy.array.copy()
    result = denoise_volume(noisy, white_prior(), noise=Noise(150.0), tile=tile)
    expected = posterior_mean(noisy.array, 150.0)
    assert np.abs(expected - noisy.array).max() > 20  # the right answer is not the scan itself
    np.testing.assert_allclose(result.volume.array, expected, atol=0.01)  # of 950: float32 and the table of times
    assert result.volume.array.dtype == np.float32
    np.testing.assert_array_equal(result.volume.affine, affine)
    np.testing.assert_array_equal(noisy.array, before)


@pytest.mark.parametrize("tile", [16, 20, 25, 31])
def test_every_orientation_of_a_scan_has_the_same_answer(tile: int) -> None:
    """With a prior that looks at neighbours, in overlapping tiles."""
    shape = (33, 36, 30)
    upright = scan(grid(shape), shape)
    turned = Volume(np.transpose(upright.array[::-1, :, ::-1], (1, 2, 0)), grid((36, 30, 33), axes="AIL"), "case")
    np.testing.assert_array_equal(turned.to_world((3, 4, 5)), upright.to_world((32 - 5, 3, 29 - 4)))
    prior = random_prior()
    first, second = (denoise_volume(v, prior, noise=Noise(60.0), tile=tile).volume.array for v in (upright, turned))
    np.testing.assert_array_equal(np.transpose(first[::-1, :, ::-1], (1, 2, 0)), second)


def test_tiles_leave_no_seams() -> None:
    """A prior that looks up to 24 voxels away has the same answer in cubes shown with 16 voxels around them."""
    shape = (96, 40, 40)
    noisy, prior = scan(grid(shape), shape), random_prior()
    whole, cut = (denoise_volume(noisy, prior, noise=Noise(60.0), tile=size).volume.array for size in (96, 32))
    change = np.sqrt(np.mean((whole - noisy.array) ** 2))
    assert change > 40.0
    assert 0 < np.sqrt(np.mean((cut - whole) ** 2)) < 0.01 * change
    assert np.abs(cut - whole).max() < 0.15 * change


def test_less_noise_than_the_process_knows_leaves_every_value_as_it_is() -> None:
    noisy = scan(*GRIDS["flipped"])
    stored = noisy.with_array(noisy.array.round().astype(np.int16))
    result = denoise_volume(stored, white_prior(), noise=Noise(0.5))
    assert result.time == 0.0
    assert result.volume.array.dtype == np.int16
    np.testing.assert_array_equal(result.volume.array, stored.array)


def test_more_noise_than_the_process_knows_is_refused() -> None:
    with pytest.raises(MedfusionError, match="case: more noise than any time of the prior's process has"):
        denoise_volume(scan(*GRIDS["RAS"]), white_prior(), noise=Noise(1e12))


def test_a_scan_of_another_modality_is_refused() -> None:
    ct = Volume(head(*GRIDS["RAS"]), GRIDS["RAS"][0], "case", modality="CT")
    with pytest.raises(MedfusionError, match="case: the prior tiny is for MR, this scan is CT"):
        denoise_volume(ct, white_prior())


def test_a_slab_is_refused() -> None:
    with pytest.raises(MedfusionError, match="case: too few voxels along one axis") as error:
        denoise_volume(scan(grid((40, 40, 15)), (40, 40, 15)), white_prior())
    assert error.value.facts["shape"] == "40 x 40 x 15"


def test_nifti_in_nifti_out(tmp_path: Path) -> None:
    affine, shape = GRIDS["permuted and oblique"]
    source = tmp_path / "in" / "sub-07_T1w.nii.gz"
    source.parent.mkdir()
    array = head(affine, shape, noise=40).round().astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, affine), source)
    run = denoise(source.parent, tmp_path / "out", prior=saved(white_prior(), tmp_path), sigma=130.0, kind="gaussian")
    [case] = run.cases
    main, beside = tmp_path / "out" / "sub-07_T1w_denoised.nii.gz", tmp_path / "out" / "sub-07_T1w_denoised.json"
    result = nibabel.load(main)
    np.testing.assert_array_equal(result.affine, nibabel.load(source).affine)
    np.testing.assert_allclose(result.get_fdata(), posterior_mean(array, 130.0), atol=0.02)
    assert case.outputs == [str(main), str(beside)]
    assert case.message.startswith("sigma 130 (given, gaussian), t ")
    found = json.loads(beside.read_text())
    assert found["noise"]["sigma"] == 130.0
    assert found["removed"]["warnings"]  # what the prior of white noise takes off is mostly head


def test_one_file_to_one_file(tmp_path: Path) -> None:
    source = write_head(tmp_path / "a.nii.gz")
    run = denoise(source, tmp_path / "b.nii", prior=saved(white_prior(), tmp_path), sigma=200.0, kind="gaussian")
    assert run.exit_code == 0
    expected = posterior_mean(nibabel.load(source).get_fdata(), 200.0)
    np.testing.assert_allclose(nibabel.load(tmp_path / "b.nii").get_fdata(), expected, atol=0.02)
    assert run.cases[0].message.startswith("sigma 200 (given, gaussian), t ")
    assert (tmp_path / "run.json").exists()


def test_several_scans_do_not_go_into_one_file(tmp_path: Path) -> None:
    for name in "ab":
        write_head(tmp_path / "in" / f"{name}.nii.gz")
    with pytest.raises(MedfusionError, match="one file cannot hold the results of 2 scans"):
        denoise(tmp_path / "in", tmp_path / "out.nii.gz", prior=saved(white_prior(), tmp_path))
    assert not (tmp_path / "out.nii.gz").exists()


def test_a_4d_file_comes_back_as_one_with_one_noise(tmp_path: Path) -> None:
    affine, shape = grid((38, 38, 38)), (38, 38, 38)
    volumes = np.stack([head(affine, shape, noise=20, seed=seed) * (1 + seed) for seed in range(3)], axis=-1)
    (tmp_path / "in").mkdir()
    four = nibabel.Nifti1Image(volumes, affine)
    four.header.set_zooms((2.0, 2.0, 2.0, 0.72))
    nibabel.save(four, tmp_path / "in" / "four.nii.gz")
    options = {"prior": saved(white_prior(), tmp_path), "sigma": 300.0, "kind": "gaussian"}
    run = denoise(tmp_path / "in", tmp_path / "out", samples=2, **options)
    assert run.exit_code == 0, run.cases
    result = nibabel.load(tmp_path / "out" / "four_denoised.nii.gz")
    expected = np.stack([posterior_mean(volumes[..., k], 300.0) for k in range(3)], axis=-1)
    np.testing.assert_allclose(result.get_fdata(), expected, atol=0.03)
    assert result.header.get_zooms() == pytest.approx((2.0, 2.0, 2.0, 0.72))
    files = [tmp_path / "out" / f"four_{kind}.nii.gz" for kind in ("sample-1", "sample-2", "std")]
    draws = [nibabel.load(file).get_fdata() for file in files]
    np.testing.assert_allclose(draws[2], np.std(draws[:2], axis=0, ddof=1), rtol=1e-3, atol=1e-2)
    one = denoise(tmp_path / "in", tmp_path / "one", volume=1, **options)
    assert one.exit_code == 0
    alone = nibabel.load(tmp_path / "one" / "four_denoised.nii.gz").get_fdata()
    np.testing.assert_array_equal(alone, result.get_fdata()[..., 1])


def write_dicom(folder: Path, modality: str = "MR") -> NDArray[np.float64]:
    """A sagittal oblique series of the phantom; returns the affine of its voxels."""
    shape = (44, 40, 30)
    affine = scanner_affine("sagittal", (1.8, 2.0, 2.6), angles=(8, -5, 12))
    affine[:3, 3] += CENTRE - nibabel.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
    array = (head(affine, shape, noise=40) + 200).clip(0).round().astype(np.uint16)
    write_series(folder, array, affine, modality=modality)
    return affine


def test_dicom_in_derived_dicom_out(tmp_path: Path) -> None:
    affine = write_dicom(tmp_path / "in")
    run = denoise(tmp_path / "in", tmp_path / "out", prior=saved(white_prior(), tmp_path), sigma=150.0)
    assert run.exit_code == 0, run.cases
    [source], [series] = discover(tmp_path / "in"), discover(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == [f"{source.name}_denoised"]
    original, result = read(source), read(series)
    assert result.modality == "MR"
    np.testing.assert_allclose(result.affine, affine, atol=1e-6)
    expected = posterior_mean(original.array, 150.0)
    np.testing.assert_allclose(result.array, expected, atol=0.5 + 0.02)  # pixels are whole numbers


def test_dicom_in_one_nifti_file_out(tmp_path: Path) -> None:
    affine = write_dicom(tmp_path / "in")
    run = denoise(tmp_path / "in", tmp_path / "out.nii.gz", prior=saved(white_prior(), tmp_path), sigma=150.0)
    assert run.exit_code == 0, run.cases
    result = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(result.affine, affine, atol=1e-4)
    expected = posterior_mean(read(discover(tmp_path / "in")[0]).array, 150.0)
    np.testing.assert_allclose(result.get_fdata(), expected, atol=0.02)


def test_the_constant_outside_a_skull_stripped_brain_is_kept() -> None:
    shape = (40, 40, 40)
    affine = grid(shape)
    scan = head(affine, shape, noise=20)
    outside = head(affine, shape) < 100
    scan[outside] = 0
    result = denoise_volume(Volume(scan, affine, "stripped"), white_prior(), noise=Noise(100.0)).volume.array
    assert outside.mean() > 0.2
    assert (result[outside] == 0).all()
    assert not np.array_equal(result[~outside], scan[~outside])


def test_an_outlier_keeps_its_height_and_disturbs_nothing() -> None:
    shape = (40, 40, 40)
    affine = grid(shape)
    scan = head(affine, shape, noise=20)
    wild = scan.copy()
    wild[20, 20, 20] = 1e7
    plain, with_outlier = (
        denoise_volume(Volume(a, affine, "v"), random_prior(), noise=Noise(40.0)).volume.array for a in (scan, wild)
    )
    assert with_outlier[20, 20, 20] == pytest.approx(1e7, rel=0.01)
    far = np.ones(shape, bool)
    far[8:33, 8:33, 8:33] = False
    np.testing.assert_allclose(with_outlier[far], plain[far], atol=20)


def test_a_ct_series_fails_and_leaves_nothing(tmp_path: Path) -> None:
    write_dicom(tmp_path / "in", modality="CT")
    run = denoise(tmp_path / "in", tmp_path / "out", prior=saved(white_prior(), tmp_path))
    assert (run.exit_code, run.cases[0].status) == (1, "failed")
    assert "is for MR, this scan is CT" in run.cases[0].message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
