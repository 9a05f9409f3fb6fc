"""Measures of detection: pooled over scans against scikit-learn, lesions and sizes by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from detection_factory import SHAPE, detection, random_case

from medfusion.tasks.measure_detection import measure_case, summarise


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
