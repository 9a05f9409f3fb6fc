"""Evaluation of detection: pooled measures against scikit-learn, lesions and sizes by hand, and what is refused."""

import csv
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from prior_factory import grid, random_prior, saved

from medfusion.errors import MedfusionError
from medfusion.reference import CLUSTER_P, Reference
from medfusion.tasks.detect import Detection
from medfusion.tasks.evaluate_detection import (
    OUTPUTS,
    CaseResult,
    evaluate_detection,
    measure_case,
    pick_methods,
    read_patients,
    summarise,
    write_results,
)
from medfusion.tasks.rebuild import METHODS
from medfusion.volume import Volume

SHAPE = (12, 10, 8)
AFFINE = np.diag([5.0, 10.0, 10.0, 1.0])  # voxels of half a millilitre


def detection(
    score: np.ndarray, regions: np.ndarray | None = None, *, name: str = "case", scan_p: float = 1.0, height: float = 3
) -> Detection:
    """Scores from ``height`` on are as rare as those of clusters; the mask is ``regions``, else of scores from 4 on."""
    volume = Volume(score.astype(np.float32), AFFINE, name)
    regions = (score >= 4).astype(np.int32) if regions is None else regions
    p = np.where(score >= height, CLUSTER_P, np.where(score > 0, 0.5, 1.0)).astype(np.float32)
    other = volume.with_array(np.zeros(SHAPE, np.float32))
    parts = {"signed": volume, "residual": other, "reconstruction": other, "p_value": volume.with_array(p)}
    return Detection(
        anomaly=volume,
        **parts,
        regions=volume.with_array(regions),
        scored=score > 0,
        findings=[],
        threshold=4.0,
        scan_p=scan_p,
        unlikeness={},
    )


def random_case(seed: int, method: str, signal: float, patient: str = "", ill: bool = True) -> CaseResult:
    """Scores of a coarse scale, higher by ``signal`` in two lesions of 12 and 2 voxels."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(SHAPE)
    if ill:
        truth[1:4, 1:5, 1] = truth[8:10, 8, 6] = 1
    noise = np.abs(np.random.default_rng(seed + 1000 * len(method)).normal(size=SHAPE))
    score = np.round(noise + signal * truth * rng.uniform(0.5, 1.5), 1)
    return measure_case(detection(score, name=f"s{seed}"), truth, method=method, patient=patient)


def test_pooled_voxels_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    results, scores, truths, masks = [], [], [], []
    for k in range(5):
        truth = np.zeros(SHAPE)
        if k:
            truth[2:6, 2 : 2 + k, 3] = 1
            truth[9, 8, 6:] = 1
        inside = rng.random(SHAPE) < 0.9
        score = np.abs(rng.normal(size=SHAPE) + 2 * truth).round(1).astype(np.float16)
        mask = rng.random(SHAPE) < 0.1 + 0.5 * truth
        results.append(
            measure_case(detection(score, mask.astype(np.int32), name=f"s{k}"), truth, method="ours", inside=inside)
        )
        for collected, array in ((scores, score), (truths, truth), (masks, mask)):
            collected.append(array[inside])
    score, truth, mask = np.concatenate(scores), np.concatenate(truths), np.concatenate(masks)
    summary = summarise(results)
    measures = summary.measures["ours"]
    assert measures["auprc"].value == pytest.approx(metrics.average_precision_score(truth, score))
    assert measures["auroc"].value == pytest.approx(metrics.roc_auc_score(truth, score))
    assert measures["dice"].value == pytest.approx(metrics.f1_score(truth, mask))
    best = max(metrics.f1_score(truth, score >= threshold) for threshold in np.unique(score))
    assert measures["best_dice"].value == pytest.approx(best)
    assert summary.prevalence == pytest.approx(truth.mean())
    for estimate in (measures[name] for name in ("auprc", "auroc", "dice", "best_dice")):
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.low < estimate.high


def blobs(*centres: tuple[int, int, int], height: float = 5.0) -> np.ndarray:
    score = np.zeros(SHAPE)
    for centre in centres:
        score[centre] = height
    return score


def test_lesions_are_found_by_candidates_and_by_the_mask() -> None:
    truth = np.zeros(SHAPE)
    truth[1, 1, 1] = 1  # 0.5 ml
    truth[4:8, 5, 5] = 1  # 2 ml
    truth[1:4, 6:9, 1:3] = 1  # 9 ml
    score = np.zeros(SHAPE)
    score[1, 1, 1], score[4, 5, 5], score[10, 1, 1], score[10, 1, 6] = 9, 3.5, 6, 2
    result = measure_case(detection(score), truth, method="ours", seconds=2.5)
    np.testing.assert_array_equal(result.voxels, [1, 18, 4])
    np.testing.assert_allclose(result.lesion_ml, [0.5, 9, 2])
    # weight is ml times the excess over the highest score that is too common for a cluster, 2
    np.testing.assert_allclose(result.scores, [0.5 * 7, -np.inf, 0.5 * 1.5], rtol=1e-5)
    np.testing.assert_allclose(result.false_positives, [0.5 * 4], rtol=1e-5)
    assert result.heaviest == pytest.approx(3.5, rel=1e-5)
    np.testing.assert_array_equal(result.found, [True, False, False])
    assert (result.findings, result.false_findings) == (2, 1)
    np.testing.assert_array_equal(result.overlap, [1, 2, 23])
    np.testing.assert_array_equal(result.counts[:, result.values > 0].sum(axis=1), [2, 1, 1, 0])
    np.testing.assert_array_equal(result.counts.sum(axis=1), [np.prod(SHAPE) - 23, 1, 4, 18])
    np.testing.assert_array_equal(result.low_p, [2, 1, 1, 1])

    # the lesion of 2 ml and the false positive at [10, 1, 1] do not count outside the mask
    inside = np.ones(SHAPE)
    inside[4:, :, :] = 0
    result = measure_case(detection(score), truth, method="ours", inside=inside)
    np.testing.assert_array_equal(result.voxels, [1, 18])
    assert (result.findings, result.false_findings, len(result.false_positives)) == (1, 0, 0)
    assert result.counts.sum() == 4 * 10 * 8


def test_froc_by_size_and_scans() -> None:
    small, large = np.zeros(SHAPE), np.zeros(SHAPE)
    small[1, 1, 1] = 1
    large[1:4, 6:9, 1:3] = 1
    weak, strong = blobs((1, 1, 1), height=3.5), blobs((2, 7, 2), height=9)
    wrong = blobs((10, 1, 1), height=6)
    cases = [
        detection(weak + wrong, name="a", scan_p=0.2),
        detection(strong, name="b", scan_p=0.01),
        detection(blobs((5, 5, 5), height=3.2), name="c", scan_p=0.04),
        detection(blobs((5, 5, 5), height=2), name="d", scan_p=0.5),
    ]
    truths = (small, large, np.zeros(SHAPE), np.zeros(SHAPE))
    summary = summarise(measure_case(case, truth, method="ours") for case, truth in zip(cases, truths, strict=True))
    assert (summary.scans, summary.ill, summary.lesions, summary.patients) == (4, 2, 2, 4)
    values = {name: estimate.value for name, estimate in summary.measures["ours"].items()}
    # of two false positives, in a and c, the first is allowed at half a one a scan, the second not
    assert [values[f"sensitivity at {rate:g}"] for rate in (0.5, 1, 2)] == [1, 1, 1]
    assert values["sensitivity of < 1 ml"] == 1
    assert values["sensitivity of > 5 ml"] == 1
    assert math.isnan(values["sensitivity of 1 to 5 ml"])
    assert math.isnan(values["auprc of 1 to 5 ml"])
    assert values["auprc of > 5 ml"] == pytest.approx(1 / 18 + 17 / 18 * 18 / (4 * np.prod(SHAPE) - 1), rel=1e-3)
    assert (values["found"], values["false_findings"]) == (0.5, 0.25)
    assert values["scan_auroc"] == 1
    assert (values["healthy_flagged"], values["ill_flagged"]) == (0.5, 0.5)
    assert values["voxels p <= 0.05"] == 0.5


def test_a_false_positive_too_many_hides_the_weaker_lesion() -> None:
    truth = np.zeros(SHAPE)
    truth[1, 1, 1] = 1
    scans = [blobs((1, 1, 1), height=4.0), blobs((1, 1, 1), height=5.0) + blobs((9, 1, 1), (9, 5, 5), height=7.0)]
    summary = summarise(
        measure_case(detection(score, name=f"{k}"), truth, method="ours") for k, score in enumerate(scans)
    )
    values = summary.measures["ours"]
    assert [values[f"sensitivity at {rate:g}"].value for rate in (0.5, 1, 2)] == [0, 1, 1]


def test_ratios_are_paired_and_patients_are_drawn_whole() -> None:
    """The same case again as another scan of the patient changes no interval; pairs vary less than their parts."""
    ours = [random_case(k, "ours", 3.0) for k in range(12)]
    same = [replace(result, method="the same") for result in ours]
    worse = [random_case(k, "other", 1.0) for k in range(12)]
    summary = summarise([*ours, *same, *worse])
    assert list(summary.measures) == ["ours", "the same", "other"]
    assert summary.ratios["the same"] == (1, 1, 1)
    ratio = summary.ratios["other"]
    parts = summary.measures["ours"]["auprc"].value / summary.measures["other"]["auprc"].value
    assert ratio.value == pytest.approx(parts)
    assert 1 < ratio.low < ratio.value < ratio.high

    twice = [replace(r, case=r.case + "x") for r in ours]
    again = summarise([*ours, *twice])
    assert (again.scans, again.patients) == (24, 12)
    for name in ("auprc", "found", "sensitivity at 1"):
        assert again.measures["ours"][name] == pytest.approx(summary.measures["ours"][name])


def test_one_patient_has_no_interval() -> None:
    estimate = summarise([random_case(0, "ours", 2.0)]).measures["ours"]["auprc"]
    assert 0 < estimate.value < 1
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_methods_have_to_share_their_cases() -> None:
    with pytest.raises(ValueError, match="ours, other: not run on the same cases"):
        summarise([random_case(0, "ours", 2.0), random_case(1, "other", 2.0)])
    with pytest.raises(ValueError, match="no method"):
        summarise([])


def test_tables(tmp_path: Path) -> None:
    results = [random_case(k, "ours", 3.0, patient="p", ill=k > 0) for k in range(3)]
    write_results(tmp_path, results, summarise(results))
    cases, lesions = (list(csv.DictReader((tmp_path / name).open())) for name in OUTPUTS[:2])
    assert [row["case"] for row in cases] == ["s0", "s1", "s2"]
    assert {row["patient"] for row in cases} == {"p"}
    assert (cases[0]["auprc"], cases[0]["dice"], cases[0]["lesions"]) == ("", "", "0")
    assert float(cases[1]["auprc"]) > 0.1
    assert float(cases[1]["lesion_ml"]) == 7
    assert [(row["case"], row["lesion"], row["ml"]) for row in lesions] == [
        ("s1", "1", "6"),
        ("s1", "2", "1"),
        ("s2", "1", "6"),
        ("s2", "2", "1"),
    ]
    content = json.loads((tmp_path / OUTPUTS[2]).read_text(), parse_constant=pytest.fail)  # nan is no JSON
    assert (content["scans"], content["ill"], content["patients"]) == (3, 2, 1)
    assert content["measures"]["ours"]["auprc"]["low"] is None
    assert content["auprc_ratios"] == {}


def reference(method: str) -> Reference:
    return Reference(**dict.fromkeys([field.name for field in fields(Reference)], ()) | {"method": method})


def test_baselines_stand_beside_every_method() -> None:
    prior = replace(random_prior(), references=tuple(map(reference, ("blur", "fast", "intensity", "default"))))
    assert pick_methods(prior) == [m for m in METHODS if m in ("blur", "fast", "intensity", "default")]
    assert pick_methods(prior)[0] == "default"
    assert pick_methods(prior, ["fast"]) == ["fast", "intensity", "blur"]
    assert pick_methods(prior, ["blur", "fast"]) == ["blur", "fast", "intensity"]
    with pytest.raises(MedfusionError, match="no healthy reference for plain"):
        pick_methods(prior, ["plain", "fast"])
    with pytest.raises(MedfusionError, match="no healthy reference for any method"):
        pick_methods(random_prior())


def test_patients_from_a_table(tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\na,p1\nb,p1\nc,p2\n")
    assert read_patients(table, ["a", "b"]) == {"a": "p1", "b": "p1"}
    with pytest.raises(MedfusionError) as refused:
        read_patients(table, ["a", "x", "y"])
    assert "cases without a patient  x, y" in str(refused.value)
    table.write_text("case,patient\na,p1\na,p2\n")
    with pytest.raises(MedfusionError) as refused:
        read_patients(table, ["a"])
    assert "cases of two patients  a" in str(refused.value)
    table.write_text("scan,patient\na,p1\n")
    with pytest.raises(MedfusionError, match="lacks a column"):
        read_patients(table, ["a"])
    with pytest.raises(MedfusionError, match="cannot be read"):
        read_patients(tmp_path / "none.csv", ["a"])


def write(path: Path, array: np.ndarray, spacing: float = 2.0) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), grid(array.shape, (spacing,) * 3)), path)


def test_all_problems_of_files_are_named_before_work_starts(tmp_path: Path) -> None:
    scans, prior = tmp_path / "scans", saved(random_prior(), tmp_path)
    image = np.random.default_rng(0).random((10, 10, 10))
    lesion, brain = np.zeros((10, 10, 10)), np.zeros((10, 10, 10))
    lesion[2, 2, 2] = brain[5:, 5:, 5:] = 1
    for name in ("absent", "smaller", "moved", "outside", "empty"):
        write(scans / f"{name}.nii.gz", image)
        write(scans / f"{name}_brain.nii.gz", np.ones((10, 10, 10)))
        write(scans / f"{name}_lesions.nii.gz", lesion)
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    (scans / "absent_lesions.nii.gz").unlink()
    write(scans / "smaller_lesions.nii.gz", lesion[1:])
    write(scans / "moved_lesions.nii.gz", lesion, spacing=2.5)
    write(scans / "outside_brain.nii.gz", brain)
    write(scans / "empty_brain.nii.gz", 0 * brain)
    names = {"truth": "*_lesions.nii.gz", "masks": "*_brain.nii.gz"}
    with pytest.raises(MedfusionError) as refused:
        evaluate_detection(scans, tmp_path / "out", prior=prior, **names)
    lines = str(refused.value).splitlines()
    assert lines[0] == "6 of 6 scan(s) cannot be evaluated"
    told = {line.split()[0].removesuffix(".nii.gz"): line for line in lines[1:-1]}
    expected = {
        "absent": "no truth where expected",
        "smaller": "different shapes",
        "moved": "lie apart",
        "outside": "all lesions are outside the mask",
        "empty": "the mask is empty",
        "broken": "cannot be used",
    }
    assert {name: words in told[name] for name, words in expected.items()} == dict.fromkeys(expected, True)
    assert "--healthy-without-truth" in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"truth": "lesions.nii.gz"}, "--truth: no telling which file"),
        ({"images": "*_T?_*.nii.gz"}, "--truth: no telling which file"),
        ({"masks": "brain.nii.gz"}, "--masks: no telling which file"),
        ({"fdr": 0.0}, "false discovery rate 0.0"),
        ({"min_ml": -1.0}, "min_ml -1.0"),
        ({"methods": ["magic"]}, "no healthy reference for magic"),
    ],
)
def test_wrong_use(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    for name in ("a", "a_lesions"):
        write(tmp_path / "scans" / f"{name}.nii.gz", np.random.default_rng(0).random((10, 10, 10)))
    options = {"truth": "*_lesions.nii.gz", "prior": saved(random_prior(), tmp_path)} | changes
    with pytest.raises(MedfusionError, match=words.replace(".", r"\.")):
        evaluate_detection(tmp_path / "scans", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_results_are_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cases.csv").write_text("mine")
    with pytest.raises(MedfusionError, match="exists already"):
        evaluate_detection(tmp_path, tmp_path / "out", truth="*_lesions.nii.gz")
    assert (tmp_path / "out" / "cases.csv").read_text() == "mine"
