"""Detect: a planted lesion is found where it is, on the scan's own grid, by a prior that knows the healthy head."""

import csv
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prior_factory import CENTRE, grid, head, knowing_prior, random_prior, saved, white_prior, write_head
from scipy import ndimage

from medfusion.data.grid import canonical, resampled
from medfusion.data.intensity import measure_scale
from medfusion.data.noise import estimate_noise
from medfusion.errors import MedfusionError
from medfusion.tasks.detect import (
    NOISE_LEFT,
    SMALLEST_SD,
    SMOOTHING,
    Detection,
    detect,
    detect_volume,
    find_regions,
    standardise,
)
from medfusion.volume import Volume

NOISE = 15.0
GRIDS: dict[str, tuple[Any, ...]] = {
    "isotropic": ((44, 44, 44),),
    "anisotropic": ((64, 45, 31), (1.4, 2.0, 3.0)),
    "rotated": ((46, 44, 42), (2.0, 2.0, 2.2), "SAL", (15, -10, 20)),
    "fine and flipped": ((66, 65, 50), (1.3, 1.3, 1.7), "LPS", (0, 8, 0)),
}
LESIONS = {  # offset of the centre in mm, radius in mm, change of intensity
    "bright": ((6.0, -5.0, 4.0), 14.0, 350.0),
    "dark": ((-5.0, 6.0, -4.0), 13.0, -350.0),
}


def deep(shape: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Voxels well inside the head."""
    world = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return np.linalg.norm(world - CENTRE, axis=-1) < 26


def found(shape: tuple[int, ...], affine: NDArray[np.float64], kind: str, name: str = "case") -> tuple[Detection, Any]:
    """The detection in a noisy scan with one lesion; the healthy head, the lesion's mask and height in noises."""
    offset, radius, change = LESIONS[kind]
    lesion = (CENTRE + offset, radius, change)
    healthy = Volume(head(affine, shape), affine, name)
    scan = healthy.with_array(head(affine, shape, noise=NOISE, seed=3, lesion=lesion))
    work = resampled(canonical(scan), 2.0).array
    scale = measure_scale(work, 99)
    sd = np.hypot(estimate_noise(work) * NOISE_LEFT**0.5, SMALLEST_SD * (scale.high - scale.low) / 2)
    threshold = abs(change) / 2 / sd  # half the lesion's height: the mask's outline is the lesion's
    detection = detect_volume(scan, knowing_prior(scan, healthy), steps=2, samples=2, threshold=threshold)
    return detection, (healthy, head(affine, shape, lesion=lesion) != healthy.array, 2 * threshold)


@pytest.mark.parametrize("kind", list(LESIONS))
@pytest.mark.parametrize("name", list(GRIDS))
def test_a_lesion_is_found_in_its_place(name: str, kind: str) -> None:
    shape, *rest = GRIDS[name]
    affine = grid(shape, *rest)
    offset, radius, _ = LESIONS[kind]
    detection, (healthy, truth, height) = found(shape, affine, kind)

    [finding] = detection.findings
    assert finding.direction == {"bright": "brighter", "dark": "darker"}[kind]
    peak = np.array([finding.x, finding.y, finding.z])
    assert np.linalg.norm(peak - (CENTRE + offset)) < radius
    np.testing.assert_allclose(peak, healthy.to_world((finding.i, finding.j, finding.k)), atol=0.051)
    # a Gaussian of 4 mm draws the surface at half the height of a ball in by sigma^2 / radius
    assert finding.volume_ml == pytest.approx(4 / 3 * np.pi * (radius - 16 / radius) ** 3 / 1000, rel=0.12)
    assert finding.peak == pytest.approx(height, rel=0.1)
    assert finding.peak == pytest.approx(detection.anomaly.array.max(), abs=0.01)

    mask = detection.mask.array.astype(bool)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.8
    for result in (detection.anomaly, detection.reconstruction, detection.mask):
        assert result.shape == shape
        np.testing.assert_array_equal(result.affine, affine)
    assert detection.anomaly.array.min() >= 0
    np.testing.assert_allclose(
        detection.reconstruction.array[deep(shape, affine)], healthy.array[deep(shape, affine)], atol=12
    )  # linear interpolation to the prior's grid and back


def test_a_healthy_scan_has_no_findings() -> None:
    shape = (44, 44, 44)
    affine = grid(shape)
    healthy = Volume(head(affine, shape), affine, "case")
    scan = healthy.with_array(head(affine, shape, noise=NOISE))
    detection = detect_volume(scan, knowing_prior(scan, healthy), steps=2, samples=2)
    assert detection.findings == []
    assert not detection.mask.array.any()
    assert detection.mask.array.dtype == np.uint8


@pytest.mark.parametrize("samples", [2, 24])
def test_the_heatmap_is_the_difference_over_the_spread_of_the_samples(samples: int) -> None:
    """One step of the prior of white noise gives alpha (alpha x_0 + sigma eps): mean and spread are known."""
    shape, t = (40, 40, 40), torch.tensor([0.35])
    scan = Volume(head(grid(shape), shape, noise=NOISE), grid(shape), "case")
    detection = detect_volume(scan, white_prior(), noise_time=float(t), steps=1, samples=samples)
    image = measure_scale(scan.array, 99).apply(scan.array)
    alpha, sigma = float(white_prior().process.alpha(t)), float(white_prior().process.sigma(t))
    variance = (1 + 1 / samples) * (alpha * sigma) ** 2 + estimate_noise(image) ** 2
    expected = np.abs(sigma**2 * ndimage.gaussian_filter(image, SMOOTHING)) / np.sqrt(
        variance * NOISE_LEFT + SMALLEST_SD**2
    )
    strong = deep(shape, grid(shape)) & (expected > 3)
    assert strong.sum() > 500
    ratio = detection.anomaly.array[strong] / expected[strong]
    assert np.median(ratio) == pytest.approx(1, abs=0.1)  # a variance from two samples is rough even when smoothed
    assert ratio.std() < 0.35 / samples**0.5  # what smoothing leaves of the noise in the samples' mean and spread


@pytest.mark.parametrize(("samples", "width"), [(4, 0.0), (16, 0.0), (4, 2.0)])
def test_where_nothing_is_wrong_the_heatmap_has_unit_standard_deviation(samples: int, width: float) -> None:
    """The image is one more draw of what the reconstructions are drawn from, white or smooth; or it is noise alone."""
    rng = np.random.default_rng(0)
    draws = [ndimage.gaussian_filter(rng.normal(0, 1, (48, 48, 48)), width) for _ in range(samples + 1)]
    image, *rebuilt = (draw / draw.std() for draw in draws)
    assert standardise(image, np.stack(rebuilt), noise=0.0).std() == pytest.approx(1, abs=0.12)
    noise = rng.normal(0, 0.5, (48, 48, 48))
    assert standardise(noise, np.zeros((samples, 48, 48, 48)), noise=0.5).std() == pytest.approx(1, abs=0.05)


def anomaly(seed: int = 0, name: str = "case") -> NDArray[np.float32]:
    shape = (34, 34, 34)
    scan = Volume(head(grid(shape, (2.4,) * 3), shape, noise=NOISE), grid(shape, (2.4,) * 3), name)
    return detect_volume(scan, random_prior(), steps=2, samples=2, seed=seed).anomaly.array


def test_seed_and_case_name_fix_the_noise() -> None:
    first = anomaly()
    np.testing.assert_array_equal(anomaly(), first)
    assert np.abs(anomaly(seed=1) - first).max() > 0.01
    assert np.abs(anomaly(name="other") - first).max() > 0.01


def test_a_case_does_not_depend_on_the_others(tmp_path: Path) -> None:
    prior = saved(random_prior(), tmp_path)
    for name in "ab":
        write_head(tmp_path / "both" / f"{name}.nii.gz", seed=ord(name))
    write_head(tmp_path / "one" / "b.nii.gz", seed=ord("b"))
    for folder in ("both", "one"):
        assert detect(tmp_path / folder, tmp_path / f"{folder}_out", prior=prior, steps=2, samples=2).exit_code == 0
    together, alone = (tmp_path / f"{folder}_out" / "b_anomaly.nii.gz" for folder in ("both", "one"))
    np.testing.assert_array_equal(nibabel.load(together).get_fdata(), nibabel.load(alone).get_fdata())


def test_files_of_a_case(tmp_path: Path) -> None:
    affine, shape = grid((46, 44, 42), (2.0, 2.0, 2.2), "SAL", (15, -10, 20)), (46, 44, 42)
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "sub-1_T1w.nii.gz"
    lesion = (CENTRE, 9.0, 350.0)
    nibabel.save(nibabel.Nifti1Image(head(affine, shape, noise=NOISE, lesion=lesion), affine), source)
    # the prior of white noise takes all that is not mid-grey for a difference: many findings
    run = detect(tmp_path / "in", tmp_path / "out", prior=saved(white_prior(), tmp_path), noise_time=0.4, threshold=0.4)
    assert run.exit_code == 0, run.cases
    kinds = ("anomaly.nii.gz", "findings.csv", "mask.nii.gz", "reconstruction.nii.gz")
    names = [f"sub-1_T1w_{kind}" for kind in kinds]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run.json", *names]
    original = nibabel.load(source)
    images = {name: nibabel.load(tmp_path / "out" / name) for name in names if name.endswith(".nii.gz")}
    for image in images.values():
        assert image.shape == shape
        np.testing.assert_array_equal(image.affine, original.affine)
    with (tmp_path / "out" / names[1]).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 0
    assert run.cases[0].message == f"{len(rows)} finding(s)"
    assert [float(row["peak"]) for row in rows] == sorted((float(row["peak"]) for row in rows), reverse=True)
    heat, mask = (images[f"sub-1_T1w_{kind}.nii.gz"].get_fdata() for kind in ("anomaly", "mask"))
    assert set(np.unique(mask)) == {0, 1}
    np.testing.assert_array_equal(mask == 1, (heat > 0.4) & (mask == 1))
    for row in rows:
        voxel = tuple(int(row[axis]) for axis in "ijk")
        assert mask[voxel] == 1
        assert heat[voxel] == pytest.approx(float(row["peak"]), abs=0.01)
        world = nibabel.affines.apply_affine(affine, voxel)
        np.testing.assert_allclose([float(row[axis]) for axis in "xyz"], world, atol=0.051)
    ml = sum(float(row["volume_ml"]) for row in rows)
    assert ml == pytest.approx(mask.sum() * 2 * 2 * 2.2 / 1000, abs=0.001 * len(rows))


def test_the_table_has_its_header_when_nothing_is_found(tmp_path: Path) -> None:
    write_head(tmp_path / "in" / "a.nii.gz")
    prior = saved(white_prior(), tmp_path)
    run = detect(tmp_path / "in", tmp_path / "out", prior=prior, steps=1, samples=2, threshold=1e6)
    assert run.cases[0].message == "0 finding(s)"
    assert (tmp_path / "out" / "a_findings.csv").read_text().split() == ["x,y,z,i,j,k,volume_ml,peak,mean,direction"]
    assert not nibabel.load(tmp_path / "out" / "a_mask.nii.gz").get_fdata().any()


def test_resume_does_a_case_again_that_lacks_a_file(tmp_path: Path) -> None:
    for name in "ab":
        write_head(tmp_path / "in" / f"{name}.nii.gz")
    options: dict[str, Any] = {"prior": saved(white_prior(), tmp_path), "steps": 1, "samples": 2}
    detect(tmp_path / "in", tmp_path / "out", **options)
    (tmp_path / "out" / "b_findings.csv").unlink()
    run = detect(tmp_path / "in", tmp_path / "out", resume=True, **options)
    assert {case.name: case.status for case in run.cases} == {"a": "skipped", "b": "done"}
    assert (tmp_path / "out" / "b_findings.csv").exists()


def test_one_file_cannot_hold_all_results(tmp_path: Path) -> None:
    write_head(tmp_path / "in" / "a.nii.gz")
    with pytest.raises(MedfusionError, match=r"out.nii.gz: one file cannot hold all results of a case"):
        detect(tmp_path / "in", tmp_path / "out.nii.gz", prior=saved(white_prior(), tmp_path))
    assert not (tmp_path / "out.nii.gz").exists()


def test_regions_are_of_one_sign_and_large_enough() -> None:
    affine = np.diag([2.0, 2.0, 2.5, 1.0])  # 0.01 ml a voxel
    signed = np.zeros((12, 12, 12), np.float32)
    signed[1:4, 1:4, 1:4] = 5.0  # 0.27 ml
    signed[4:6, 1:4, 1:4] = -6.0  # touches it, 0.18 ml
    signed[2, 2, 2] = 9.0
    signed[8:10, 8:10, 8] = 7.0  # 0.04 ml
    volume = Volume(signed, affine, "case")
    mask, findings = find_regions(volume, threshold=4.0, min_ml=0.1)
    assert [(f.direction, f.peak, f.volume_ml) for f in findings] == [("brighter", 9.0, 0.27), ("darker", 6.0, 0.18)]
    assert (findings[0].i, findings[0].j, findings[0].k) == (2, 2, 2)
    assert (findings[0].x, findings[0].y, findings[0].z) == (4.0, 4.0, 5.0)
    assert findings[0].mean == pytest.approx((26 * 5 + 9) / 27, abs=0.01)
    np.testing.assert_array_equal(mask == 1, (signed == 5) | (signed == 9) | (signed == -6))

    _, smaller_too = find_regions(volume, threshold=4.0, min_ml=0.04)
    assert [f.volume_ml for f in smaller_too] == [0.27, 0.04, 0.18]
    mask, none = find_regions(volume, threshold=9.0, min_ml=0.0)
    assert none == []
    assert not mask.any()


def test_a_scan_of_another_modality_or_a_slab_is_refused() -> None:
    affine = grid((40, 40, 40))
    with pytest.raises(MedfusionError, match="is for MR, this scan is CT"):
        detect_volume(Volume(head(affine, (40, 40, 40)), affine, "case", modality="CT"), white_prior())
    with pytest.raises(MedfusionError, match="too few voxels along one axis"):
        detect_volume(Volume(head(affine, (40, 12, 40)), affine, "case"), white_prior())
