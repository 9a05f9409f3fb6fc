"""Detect: a planted lesion is found where it is, on the scan's own grid, with the error rates of the reference."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicom_factory import write_series
from prior_factory import CENTRE, grid, head, random_prior, saved
from reference_factory import NOISE, SIZE, calibrated, healthy

from medfusion.data.grid import onto_grid
from medfusion.errors import MedfusionError
from medfusion.io import discover
from medfusion.prior import Prior
from medfusion.tasks.detect import detect, detect_volume, find_regions, pick_reference, within_outline
from medfusion.volume import Volume

GRIDS: dict[str, tuple[Any, ...]] = {
    "isotropic": ((44, 44, 44),),
    "anisotropic": ((64, 45, 31), (1.4, 2.0, 3.0)),
    "rotated": ((46, 44, 42), (2.0, 2.0, 2.2), "SAL", (15, -10, 20)),
    "fine and flipped": ((66, 65, 50), (1.3, 1.3, 1.7), "LPS", (0, 8, 0)),
}
LESIONS = {"brighter": ((10.0, -8.0, 6.0), 7.0, 260.0), "darker": ((-9.0, 8.0, -7.0), 7.0, -300.0)}
NUMBER = 20  # healthy phantoms of the reference


@pytest.fixture(scope="module")
def prior() -> Prior:
    return calibrated(("intensity", "default"), NUMBER)


def ill(direction: str, name: str = "isotropic", seed: int = 1) -> tuple[Volume, np.ndarray]:
    """A phantom with a lesion, and where that is."""
    shape, *rest = GRIDS[name]
    affine = grid(shape, *rest)
    offset, radius, change = LESIONS[direction]
    array = head(affine, shape, noise=NOISE, seed=seed, lesion=(CENTRE + offset, radius, change))
    world = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return Volume(array, affine, "case"), np.linalg.norm(world - CENTRE - offset, axis=-1) < radius


@pytest.mark.parametrize("direction", list(LESIONS))
@pytest.mark.parametrize("name", list(GRIDS))
def test_a_lesion_is_found_in_its_place(prior: Prior, name: str, direction: str) -> None:
    scan, truth = ill(direction, name)
    found = detect_volume(scan, prior, method="intensity")
    first = found.findings[0]
    assert first.direction == direction
    assert np.linalg.norm(np.array([first.x, first.y, first.z]) - CENTRE - LESIONS[direction][0]) < 7.0
    assert (first.p, found.scan_p) == pytest.approx((1 / (NUMBER + 1),) * 2, abs=1e-4)
    np.testing.assert_allclose((first.x, first.y, first.z), scan.to_world((first.i, first.j, first.k)), atol=0.051)
    region = found.regions.array == 1
    dice = 2 * (region & truth).sum() / (region.sum() + truth.sum())
    assert dice > 0.6
    assert first.volume_ml == pytest.approx(region.sum() * scan.voxel_ml, abs=0.001)
    assert first.peak == pytest.approx(found.anomaly.array[region].max(), abs=0.01)
    for result in (found.anomaly, found.residual, found.reconstruction, found.p_value, found.mask):
        assert result.shape == scan.shape
        np.testing.assert_array_equal(result.affine, scan.affine)


def test_the_prior_finds_it_too_and_says_what_would_be_healthy(prior: Prior) -> None:
    scan, truth = ill("darker")
    found = detect_volume(scan, prior)
    assert found.scan_p == pytest.approx(1 / (NUMBER + 1), abs=1e-4)
    assert (found.mask.array[truth] == 1).mean() > 0.5
    deep = truth & (found.p_value.array < 1)
    np.testing.assert_allclose(
        (found.residual.array + found.reconstruction.array)[deep], scan.array[deep], atol=6 * NOISE
    )
    assert (found.signed.array[deep] < 0).mean() > 0.9
    np.testing.assert_array_equal(np.abs(found.signed.array), found.anomaly.array)


def test_maps_agree_with_each_other(prior: Prior) -> None:
    found = detect_volume(ill("brighter")[0], prior, method="intensity", fdr=0.1, min_ml=0.2)
    anomaly, p, mask = found.anomaly.array, found.p_value.array, found.mask.array > 0
    assert anomaly.min() == 0.0
    assert (p[anomaly == 0] == 1).all()
    order = np.argsort(anomaly[p < 1])
    assert (np.diff(p[p < 1][order]) <= 0).all()
    assert mask.any()
    assert p[mask].max() <= 0.1
    assert found.threshold == anomaly[mask].min()
    assert all(finding.volume_ml >= 0.2 for finding in found.findings)
    assert sorted(np.unique(found.regions.array)) == list(range(len(found.findings) + 1))


def test_a_healthy_scan_has_the_threshold_of_the_reference(prior: Prior) -> None:
    found = detect_volume(healthy(300), prior, method="intensity", min_ml=50.0)
    assert found.findings == []
    assert not found.mask.array.any()
    assert found.threshold == prior.references[0].height


def test_seed_and_case_name_fix_the_noise(prior: Prior) -> None:
    scan, _ = ill("darker")
    first = detect_volume(scan, prior).anomaly.array
    np.testing.assert_array_equal(detect_volume(scan, prior).anomaly.array, first)
    for other in (detect_volume(scan, prior, seed=1), detect_volume(replace(scan, name="other"), prior)):
        assert np.abs(other.anomaly.array - first).max() > 0.01


def test_a_scan_of_another_kind_is_refused_or_flagged(prior: Prior) -> None:
    scan = healthy(7)
    other = scan.with_array(
        np.where(scan.array > 200, 1300 - scan.array, scan.array)
    )  # dark is bright: another contrast
    with pytest.raises(MedfusionError, match="head-7: unlike the healthy scans of the reference"):
        detect_volume(other, prior, method="intensity")
    found = detect_volume(other, prior, method="intensity", unlike=True)
    assert "unlike the healthy reference in" in found.flag
    assert detect_volume(scan, prior, method="intensity").flag == ""


def test_without_a_reference_no_error_rate_is_stated() -> None:
    with pytest.raises(MedfusionError, match="tiny: no healthy reference for the method 'default'") as caught:
        detect_volume(healthy(7), random_prior())
    assert "medfusion calibrate" in caught.value.fix
    with pytest.raises(MedfusionError, match="magic: no method of detection"):
        detect_volume(healthy(7), random_prior(), method="magic")


def test_the_reference_is_that_of_scans_with_as_much_tissue(prior: Prior) -> None:
    head_, brain = (replace(prior.references[0], tissue_ml=ml) for ml in (4000.0, 1400.0))
    both = replace(prior, references=(head_, brain))
    assert pick_reference(both, "intensity", 3300.0) is head_
    assert pick_reference(both, "intensity", 1700.0) is brain


def test_a_scan_of_another_modality_or_a_slab_is_refused(prior: Prior) -> None:
    affine = grid((40, 40, 40))
    with pytest.raises(MedfusionError, match="is for MR, this scan is CT"):
        detect_volume(Volume(head(affine, (40, 40, 40)), affine, "case", modality="CT"), prior)
    with pytest.raises(MedfusionError, match="too few voxels along one axis"):
        detect_volume(Volume(head(affine, (40, 12, 40)), affine, "case"), prior)


def test_regions_are_large_enough_and_sorted_by_p(prior: Prior) -> None:
    affine, reference = np.diag([2.0, 2.0, 2.5, 1.0]), prior.references[0]  # 0.01 ml a voxel
    score, weight = np.zeros((2, 14, 14, 14), np.float32)
    for place, value, heavy in (
        (np.s_[1:4, 1:4, 1:4], 5.0, 0.0),  # 0.27 ml, no cluster in it
        (np.s_[8:13, 8:13, 8:12], 30.0, 1e6),  # 1 ml
        (np.s_[1:3, 8:10, 1], 9.0, 1e6),  # 0.04 ml
    ):
        score[place], weight[place] = value, heavy
    leaning = np.where(score == 5.0, -3.0, 0.2).astype(np.float32)
    regions, findings = find_regions(Volume(score, affine, "case"), leaning, score > 0, weight, reference, 0.1)
    assert [(f.number, f.volume_ml, f.direction) for f in findings] == [(1, 1.0, "changed"), (2, 0.27, "darker")]
    assert [f.p for f in findings] == pytest.approx([1 / (NUMBER + 1), 1.0], abs=1e-4)
    np.testing.assert_array_equal(regions == 1, score == 30.0)
    np.testing.assert_array_equal(regions == 2, score == 5.0)


def test_a_region_ends_at_half_of_its_peak() -> None:
    score = np.zeros((30, 12, 12), np.float32)
    score[2:7] = np.array([4.0, 6.0, 10.0, 6.0, 4.0], np.float32)[:, None, None]
    score[20] = 3.0  # farther than the reach
    inside = within_outline(Volume(score, np.diag([2.0, 2.0, 4.0, 1.0]), "case"), 6.0)
    along = inside[:, 6, 6] & (score[:, 6, 6] > 0)
    assert np.flatnonzero(along).tolist() == [3, 4, 5, 20]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 5.0)])
def test_error_rates_are_those_of_the_grid_of_the_prior(prior: Prior, spacing: tuple[float, ...]) -> None:
    """A fine or thick grid of the same scan, interpolated, is as likely to be healthy."""
    for seed in range(400, 404):
        scan = healthy(seed)
        shape = tuple(int(SIZE * 2 / s) for s in spacing)
        scale = np.diag([*(np.array(spacing) / 2), 1.0])
        scale[:3, 3] = (np.array(spacing) / 2 - 1) / 2
        other = Volume(np.zeros(shape, np.float32), scan.affine @ scale, scan.name)
        found = detect_volume(other.with_array(onto_grid(scan, other)), prior, method="intensity", unlike=True)
        plain = detect_volume(scan, prior, method="intensity")
        assert found.scored.sum() == pytest.approx(plain.scored.sum() * 8 / np.prod(spacing), rel=0.1)
        assert abs(np.log(found.scan_p / plain.scan_p)) < np.log(4) + (spacing[2] > 2) * np.log(3)


def write(volume: Volume, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume.array.round().astype(np.int16), volume.affine), path)
    return path


KINDS = ("anomaly.nii.gz", "mask.nii.gz", "pvalue.nii.gz", "reconstruction.nii.gz", "residual.nii.gz")


def test_files_of_a_case(prior: Prior, tmp_path: Path) -> None:
    scan, truth = ill("darker", "rotated")
    source = write(scan, tmp_path / "in" / "sub-1_T1w.nii.gz")
    labels = np.where(truth, 17, np.where(scan.array > 100, 3, 0))
    write(scan.with_array(labels), tmp_path / "in" / "sub-1_dseg.nii.gz")
    (tmp_path / "names.csv").write_text("index,name\n17,Left-Hippocampus\n3,Cortex\n")
    run = detect(
        source.parent,
        tmp_path / "out",
        prior=saved(prior, tmp_path),
        method="intensity",
        images="*_T1w.nii.gz",
        labels="*_dseg.nii.gz",
        label_names=tmp_path / "names.csv",
    )
    assert run.exit_code == 0, run.cases
    names = sorted(f"sub-1_T1w_{kind}" for kind in (*KINDS, "findings.csv", "findings.json"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run.json", *names]
    for kind in KINDS:
        image = nibabel.load(tmp_path / "out" / f"sub-1_T1w_{kind}")
        assert image.shape == scan.shape
        np.testing.assert_allclose(image.affine, nibabel.load(source).affine, atol=1e-5)
    rows = list(csv.DictReader((tmp_path / "out" / "sub-1_T1w_findings.csv").open()))
    assert rows[0]["label"] == "Left-Hippocampus"
    about = json.loads((tmp_path / "out" / "sub-1_T1w_findings.json").read_text())
    assert about["case"] == "sub-1_T1w"
    assert about["scan_p"] == pytest.approx(1 / (NUMBER + 1))
    assert about["method"] == "intensity"
    assert len(about["findings"]) == len(rows)
    assert run.cases[0].message.startswith(f"{len(rows)} finding(s), ")
    mask = nibabel.load(tmp_path / "out" / "sub-1_T1w_mask.nii.gz").get_fdata()
    assert set(np.unique(mask)) == {0, 1}


def test_a_scan_without_its_label_map_does_not_stop_the_others(prior: Prior, tmp_path: Path) -> None:
    for name in "ab":
        write(healthy(1), tmp_path / "in" / f"{name}_T1.nii.gz")
    write(healthy(1), tmp_path / "in" / "a_dseg.nii.gz")
    names = {"images": "*_T1.nii.gz", "labels": "*_dseg.nii.gz", "method": "intensity"}
    run = detect(tmp_path / "in", tmp_path / "out", prior=saved(prior, tmp_path), **names)
    assert {case.name: case.status for case in run.cases} == {"a_T1": "done", "b_T1": "refused"}
    assert "no labels where expected" in run.cases[1].message
    assert run.exit_code == 1


def test_a_dicom_series_has_dicom_results(prior: Prior, tmp_path: Path) -> None:
    scan = healthy(5)
    array = np.maximum(scan.array, 0).round().astype(np.uint16)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])  # flips of RAS that keep voxels where they are
    write_series(tmp_path / "in", array[::-1, ::-1], scan.affine @ lps @ _to_the_far_side())
    run = detect(tmp_path / "in", tmp_path / "out", prior=saved(prior, tmp_path), method="intensity", unlike=True)
    assert run.exit_code == 0, run.cases
    [series] = discover(tmp_path / "in")
    folder = tmp_path / "out" / f"{series.name}_dicom"
    if "no DICOM results" in run.cases[0].message:
        pytest.fail(run.cases[0].message)
    assert (folder / "anomaly.dcm").exists()
    assert len(list((folder / "fused").iterdir())) == SIZE


def _to_the_far_side() -> np.ndarray:
    flip = np.eye(4)
    flip[:2, 3] = -(SIZE - 1)
    return flip


def test_a_series_that_nothing_can_refer_to_keeps_its_other_results(prior: Prior, tmp_path: Path) -> None:
    scan = healthy(5)
    array = np.maximum(scan.array, 0).round().astype(np.uint16)

    def edit(dataset: Any, k: int) -> None:
        del dataset.FrameOfReferenceUID

    write_series(tmp_path / "in", array, scan.affine, edit=edit)
    run = detect(tmp_path / "in", tmp_path / "out", prior=saved(prior, tmp_path), method="intensity", unlike=True)
    assert run.exit_code == 0, run.cases
    assert "; no DICOM results: " in run.cases[0].message
    assert list((tmp_path / "out").glob("*_mask.nii.gz"))


def test_resume_does_a_case_again_that_lacks_a_file(prior: Prior, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write(healthy(seed), tmp_path / "in" / f"{name}.nii.gz")
    options: dict[str, Any] = {"prior": saved(prior, tmp_path), "method": "intensity"}
    assert detect(tmp_path / "in", tmp_path / "out", **options).exit_code == 0
    (tmp_path / "out" / "b_findings.csv").unlink()
    run = detect(tmp_path / "in", tmp_path / "out", resume=True, **options)
    assert {case.name: case.status for case in run.cases} == {"a": "skipped", "b": "done"}


def test_a_case_does_not_depend_on_the_others(prior: Prior, tmp_path: Path) -> None:
    path = saved(prior, tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        write(healthy(seed), tmp_path / "both" / f"{name}.nii.gz")
    write(healthy(2), tmp_path / "one" / "b.nii.gz")
    for folder in ("both", "one"):
        assert detect(tmp_path / folder, tmp_path / f"{folder}_out", prior=path).exit_code == 0
    together, alone = (tmp_path / f"{folder}_out" / "b_anomaly.nii.gz" for folder in ("both", "one"))
    np.testing.assert_array_equal(nibabel.load(together).get_fdata(), nibabel.load(alone).get_fdata())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"fdr": 0.0}, "false discovery rate 0.0"),
        ({"min_ml": -1.0}, "min_ml -1.0"),
        ({"label_names": Path("names.csv")}, "names of labels without label maps"),
        ({"labels": "labels.nii.gz"}, "--labels: no telling which file belongs to which scan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    write(healthy(1), tmp_path / "in" / "a.nii.gz")
    with pytest.raises(MedfusionError, match=what):
        detect(tmp_path / "in", tmp_path / "out", prior=saved(random_prior(), tmp_path), **options)
    assert not (tmp_path / "out").exists()


def test_one_file_cannot_hold_all_results(tmp_path: Path) -> None:
    write(healthy(1), tmp_path / "in" / "a.nii.gz")
    with pytest.raises(MedfusionError, match=r"out.nii.gz: one file cannot hold all results of a case"):
        detect(tmp_path / "in", tmp_path / "out.nii.gz", prior=saved(random_prior(), tmp_path))
