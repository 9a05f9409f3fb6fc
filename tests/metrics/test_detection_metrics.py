"""Detection metrics against scikit-learn, brute force over thresholds, and FROC curves made by hand."""

import math

import numpy as np
import pytest

from medfusion.metrics.detection import (
    BINS,
    VALUES,
    Lesions,
    auroc,
    average_precision,
    best_dice,
    compact,
    dice_above,
    froc,
    match_lesions,
    regions,
    scan_auroc,
    voxel_counts,
)
from medfusion.metrics.intervals import bootstrap

NOTHING = np.zeros((2, BINS), np.int64)


def scores_and_truth(seed, n=4000, levels=None):
    """Scores in half precision of both signs, higher where truth is; only ``levels`` different ones, if given."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.1
    score = rng.normal(truth, 1)
    if levels:
        score = np.round(score * levels) / levels
    return score.astype(np.float16), truth


def test_counts_are_ordered_by_value_and_lie_at_their_value() -> None:
    used = np.isfinite(VALUES)
    used[:1000] = False
    assert (np.diff(VALUES[used]) > 0).all()
    assert used.sum() == 2 * 31743 + 1  # the finite half-precision numbers, 0 once
    score = np.array([-3.0, -0.0, 0.0, 5.96e-8, 0.1, 1.0, 1.0, 7e4, np.inf, -1e30])
    counts = voxel_counts(score, np.array([0, 0, 1, 1, 0, 1, 1, 1, 0, 1]))
    assert counts.shape == (2, BINS)
    few, values = compact(counts)
    expected = [-65504, -3, 0, 5.9604645e-8, np.float16(0.1), 1, 65504]
    np.testing.assert_array_equal(values, np.array(expected, np.float32))
    np.testing.assert_array_equal(few, [[0, 1, 1, 0, 1, 0, 1], [1, 0, 1, 1, 0, 2, 1]])


def test_counts_see_only_what_is_inside() -> None:
    score, truth = (a.reshape(20, 20, 10) for a in scores_and_truth(0))
    inside = np.random.default_rng(1).random(score.shape) < 0.5
    expected = voxel_counts(score[inside], truth[inside])
    outside_nan = np.where(inside, score, np.nan)
    np.testing.assert_array_equal(voxel_counts(outside_nan, truth, inside), expected)
    assert expected.sum() == inside.sum()
    with pytest.raises(ValueError, match="nan"):
        voxel_counts(outside_nan, truth)
    with pytest.raises(ValueError, match="shape"):
        voxel_counts(score, truth, inside[1:])


@pytest.mark.parametrize("levels", [None, 2])
def test_rankings_are_those_of_scikit_learn_over_pooled_cases(levels) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    cases = [scores_and_truth(seed, levels=levels) for seed in range(3)]
    each = np.stack([voxel_counts(*case) for case in cases])
    pooled = [np.concatenate(parts) for parts in zip(*cases, strict=True)]
    for ours, theirs in ((average_precision, "average_precision_score"), (auroc, "roc_auc_score")):
        reference = getattr(metrics, theirs)
        assert ours(each.sum(axis=0)) == pytest.approx(reference(pooled[1], pooled[0]), abs=1e-12)
        np.testing.assert_allclose(ours(each), [reference(truth, score) for score, truth in cases], atol=1e-12)
        np.testing.assert_allclose(ours(compact(each)[0]), ours(each), rtol=1e-12)


def test_the_best_dice_is_that_of_all_thresholds_and_so_before_rounding() -> None:
    rng = np.random.default_rng(5)
    truth = rng.random(3000) < 0.1
    score = rng.normal(truth, 1)  # float64
    rounded = score.astype(np.float16)
    dice = {t: 2 * (truth & (rounded >= t)).sum() / (truth.sum() + (rounded >= t).sum()) for t in np.unique(rounded)}
    counts = voxel_counts(score, truth)
    found, threshold = best_dice(counts)
    assert found == pytest.approx(max(dice.values()), abs=1e-12)
    assert dice_above(counts, float(threshold)) == pytest.approx(found, abs=1e-12)
    lowest = max(t for t, value in dice.items() if value == max(dice.values()))
    np.testing.assert_array_equal(score > threshold, rounded >= lowest)
    few, values = compact(counts)
    assert best_dice(few, values) == (found, threshold)
    assert dice_above(few, 0.7, values) == dice_above(counts, 0.7)
    both = best_dice(np.stack([counts, counts[:, ::-1]]))
    assert both[0][0] == found
    assert both[1][0] == threshold
    assert both[0].shape == both[1].shape == (2,)


def test_dice_above_a_threshold_is_that_of_the_mask() -> None:
    score, truth = scores_and_truth(3, levels=4)
    for threshold in (-1.0, 0.25, 0.3, 9.0):  # 0.25 is itself a score: the mask lies above it
        mask = score > threshold
        expected = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
        assert dice_above(voxel_counts(score, truth), threshold) == pytest.approx(expected, abs=1e-12)


def test_what_is_not_defined_is_nan() -> None:
    score, truth = scores_and_truth(0)
    healthy, ill = voxel_counts(score, truth & False), voxel_counts(score, truth | True)
    stack = np.stack([healthy, ill, NOTHING])
    np.testing.assert_array_equal(average_precision(stack), [np.nan, 1, np.nan])
    np.testing.assert_array_equal(auroc(stack), [np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(dice_above(stack, -100.0), [np.nan, 1, np.nan])
    for values in best_dice(stack):
        np.testing.assert_array_equal(np.isnan(values), [True, False, True])


def test_regions_that_share_a_corner_are_one() -> None:
    mask = np.zeros((5, 5, 5))
    mask[0, 0, 0] = mask[1, 1, 1] = mask[4, 4, 4] = 0.5
    labels, number = regions(mask)
    assert labels.dtype == np.int32
    assert number == 2
    assert labels[0, 0, 0] == labels[1, 1, 1] != labels[4, 4, 4]


def test_lesions_take_the_best_region_that_touches_them() -> None:
    truth, predicted = np.zeros((20, 6, 6), np.uint8), np.zeros((20, 6, 6), np.int32)
    truth[0:4, :2, :2] = truth[6:9, 0, 0] = truth[12, 5, 5] = 1  # 16, 3 and 1 voxels
    predicted[0, 0, 0], predicted[3, 0, 0] = 1, 2  # both in the first lesion
    predicted[3:7, 1, 1] = 3  # the first again; it passes the second by
    predicted[8, 0, 0] = 4
    predicted[15, 0, 0], predicted[19] = 5, 6  # elsewhere
    found = match_lesions(predicted, [1.0, 7.0, 3.0, -2.0, 0.5, 9.0], truth)
    np.testing.assert_array_equal(found.voxels, [16, 3, 1])
    np.testing.assert_array_equal(found.scores, [7, -2, -np.inf])
    np.testing.assert_array_equal(found.false_positives, [0.5, 9])


def test_one_region_may_find_two_lesions_and_empty_scans_are_scans() -> None:
    truth, predicted = np.zeros((9, 3, 3)), np.ones((9, 3, 3), np.int32)
    truth[0], truth[8] = 1, 1
    found = match_lesions(predicted, [2.0], truth)
    np.testing.assert_array_equal(found.scores, [2, 2])
    assert len(found.false_positives) == 0
    nothing = match_lesions(predicted * 0, [], truth * 0)
    assert len(nothing.voxels) == len(nothing.scores) == len(nothing.false_positives) == 0
    for scores in ([], [1.0, 2.0], [np.nan]):
        with pytest.raises(ValueError, match="score"):
            match_lesions(predicted, scores, truth)
    with pytest.raises(ValueError, match="shape"):
        match_lesions(predicted, [2.0], truth[1:])


def lesions(found, false):
    return Lesions(np.ones(len(found), np.int64), np.array(found, float), np.array(false, float))


def test_froc_steps_where_a_false_positive_comes_in() -> None:
    # down the thresholds: lesion 9, false 8, lesions 7 and 6, false 5 and lesion 5 at once, lesion 3, false 2
    scans = [lesions([9, 6, -np.inf], [8]), lesions([7, 5], [5]), lesions([3], []), lesions([], [2])]
    rates = (0.0, 0.2, 0.25, 0.49, 0.5, 0.75, 1, 100)
    np.testing.assert_allclose(froc(scans, rates), np.array([1, 1, 3, 3, 5, 5, 5, 5]) / 6)
    assert len(froc(scans)) == 7
    # one hundred scans with 30 false positives, of which 29 are allowed
    many = [lesions([0.5], [k]) for k in range(1, 30)] + [lesions([0.5], [0.7])] + [lesions([0.9], [])] * 70
    np.testing.assert_allclose(froc(many, (0.28, 0.29, 0.3)), [0, 0.7, 1])
    assert np.isnan(froc([lesions([], [1.0])], (1, 2))).all()


def test_scan_auroc_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    score, ill = scores_and_truth(7, n=200, levels=3)
    assert scan_auroc(score, ill) == pytest.approx(metrics.roc_auc_score(ill, score), abs=1e-12)
    assert scan_auroc([1, 2, 3], [0, 0, 1]) == 1
    assert math.isnan(scan_auroc([1, 2], [1, 1]))


def test_draws_without_a_value_are_left_out_and_batches_change_nothing(monkeypatch) -> None:
    """Counts of a dozen scans of which two have lesions: draws with neither have no average precision."""
    each = np.stack([voxel_counts(*scores_and_truth(seed, 500)) for seed in range(12)])
    each[2:, 1] = 0
    counts, _ = compact(each)
    low, high = bootstrap(average_precision, counts, draws=200)
    assert 0 < low < high < 1
    monkeypatch.setattr("medfusion.metrics.intervals.BATCH", 1)
    assert bootstrap(average_precision, counts, draws=200) == pytest.approx((low, high), abs=1e-12)
    assert np.isnan(bootstrap(average_precision, counts[2:], draws=20)).all()
