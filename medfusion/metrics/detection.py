"""Detection: voxel-wise measures from counts of half-precision scores, lesion-wise FROC.

A histogram with one bin for each half-precision number is small, loses nothing of scores stored in half precision, and
adds up over cases. Every measure of a ranking follows from it exactly, so that no volume has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, stats

BINS = 65536
ZERO = 32768  # the bin of 0: positive numbers lie above it, negative ones below
LARGEST = float(np.finfo(np.float16).max)
# (BINS,) the number of each bin; the bins of infinity and nan, towards both ends, stay empty
_BITS = np.where(np.arange(BINS) < ZERO, 2 * ZERO - np.arange(BINS), np.arange(BINS) - ZERO)
VALUES: NDArray[np.float32] = _BITS.astype(np.uint16).view(np.float16).astype(np.float32)


def voxel_counts(score: NDArray[Any], truth: NDArray[Any], inside: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """How many voxels have each score: (2, BINS), row 0 where ``truth`` is 0, row 1 where it is above, low to high.

    Scores are rounded to half precision; -0 counts as 0, what lies beyond its range as its largest number (65504).
    Only voxels where ``inside`` > 0 are counted; None counts all.

    Raises
    ------
    ValueError : the shapes differ, or a score is nan.
    """
    if score.shape != truth.shape or (inside is not None and inside.shape != score.shape):
        raise ValueError(f"scores {score.shape}, truth {truth.shape} and mask have to share one shape")
    keep = np.ones(score.shape, bool) if inside is None else inside > 0
    values, positive = score[keep], truth[keep] > 0
    if np.isnan(values).any():
        raise ValueError("a score is nan")
    bits = np.clip(values, -LARGEST, LARGEST).astype(np.float16).view(np.uint16).astype(np.int64)
    # sign and magnitude to one ascending number
    order = np.where(bits < ZERO, ZERO + bits, 2 * ZERO - bits)
    return np.bincount(order + BINS * positive, minlength=2 * BINS).reshape(2, BINS)


def compact(counts: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """``counts`` (..., 2, BINS) without the bins that are empty everywhere, (..., 2, n), and the scores (n,) left."""
    used = counts.any(axis=tuple(range(counts.ndim - 1)))
    return counts[..., used], VALUES[used]


def _above(counts: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Negatives and positives, (..., n) each, in a bin or above it."""
    from_top = np.cumsum(counts[..., ::-1], axis=-1, dtype=np.float64)[..., ::-1]
    return from_top[..., 0, :], from_top[..., 1, :]


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """``part / whole``, nan where ``whole`` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def average_precision(counts: NDArray[Any]) -> NDArray[np.float64]:
    """(...) sum of precision times the step in recall, equal scores in one step; nan without positives.

    ``counts`` (..., 2, n) are those of ``voxel_counts`` or ``compact``, or weighted sums of them.
    """
    false, true = _above(counts)
    precision = true / np.maximum(false + true, 1)  # counts are whole: where it is 0 there is no step either
    return _ratio((precision * counts[..., 1, :]).sum(axis=-1), true[..., 0])


def auroc(counts: NDArray[Any]) -> NDArray[np.float64]:
    """(...) share of pairs of a positive and a negative in which the positive scores higher; equal scores count half.

    ``counts`` (..., 2, n) as in ``average_precision``; nan without positives or without negatives.
    """
    false, true = _above(counts)
    below = false[..., :1] - false + counts[..., 0, :] / 2
    return _ratio((below * counts[..., 1, :]).sum(axis=-1), false[..., 0] * true[..., 0])


def best_dice(
    counts: NDArray[Any], values: NDArray[np.float32] = VALUES
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(...) the highest Dice overlap of any mask ``score > threshold``, and the highest such threshold.

    ``counts`` (..., 2, n) as in ``average_precision``, with their scores ``values`` (n,); nan without positives. The
    threshold lies half-way between two half-precision numbers, so that scores before rounding give the same mask.
    """
    false, true = _above(counts)
    positives = true[..., :1]
    dice = _ratio(2 * true, np.where(positives > 0, true + false + positives, 0))[..., ::-1]
    best = dice.argmax(axis=-1)
    half = values[::-1][best].astype(np.float16)
    threshold = (half.astype(np.float64) + np.nextafter(half, np.float16(-np.inf))) / 2
    dice = np.take_along_axis(dice, best[..., None], axis=-1)[..., 0]
    return dice, np.where(np.isnan(dice), np.nan, threshold)


def dice_above(counts: NDArray[Any], threshold: float, values: NDArray[np.float32] = VALUES) -> NDArray[np.float64]:
    """(...) Dice overlap of the mask ``score > threshold``; arguments as in ``best_dice``, nan without positives."""
    false, true = np.moveaxis(counts[..., values > threshold].sum(axis=-1, dtype=np.float64), -1, 0)
    positives = counts[..., 1, :].sum(axis=-1)
    return _ratio(2 * true, np.where(positives > 0, true + false + positives, 0))


def regions(mask: NDArray[Any]) -> tuple[NDArray[np.int32], int]:
    """Connected regions of ``mask`` > 0 (i, j, k), voxels that share a corner included: labels from 1, their number."""
    labels, number = ndimage.label(mask > 0, structure=np.ones((3, 3, 3)))
    return labels, number


@dataclass(frozen=True, eq=False)
class Lesions:
    """One scan's true lesions, what was found of them, and what was found elsewhere.

    Attributes
    ----------
    voxels : (n,) size of each true lesion.
    scores : (n,) highest score of a predicted region that shares a voxel with the lesion, -inf without any.
    false_positives : (m,) scores of the predicted regions that touch no lesion.
    """

    voxels: NDArray[np.int64]
    scores: NDArray[np.float64]
    false_positives: NDArray[np.float64]


def match_lesions(predicted: NDArray[Any], scores: ArrayLike, truth: NDArray[Any]) -> Lesions:
    """Which true lesions, the ``regions`` of ``truth`` (i, j, k), are touched by predicted regions.

    ``predicted`` (i, j, k) has whole numbers, 0 outside and 1 to m in the regions; ``scores`` (m,) are theirs.

    Raises
    ------
    ValueError : the shapes differ, or there is not one score, other than nan, for each region.
    """
    scores = np.asarray(scores, np.float64)
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted regions {predicted.shape} and truth {truth.shape} differ in shape")
    if scores.shape != (predicted.max(initial=0),) or np.isnan(scores).any():
        raise ValueError(f"{predicted.max(initial=0)} regions need as many scores, got {scores}")
    labels, number = regions(truth)
    both = (labels > 0) & (predicted > 0)
    lesion, region = labels[both] - 1, predicted[both] - 1
    found = np.full(number, -np.inf)
    np.maximum.at(found, lesion, scores[region])
    elsewhere = np.ones(len(scores), bool)
    elsewhere[region] = False
    return Lesions(np.bincount(labels.ravel(), minlength=1)[1:], found, scores[elsewhere])


def froc(scans: Sequence[Lesions], rates: Sequence[float] = (0.125, 0.25, 0.5, 1, 2, 4, 8)) -> NDArray[np.float64]:
    """(len(rates),) share of all lesions found at the lowest threshold with at most ``rates`` false positives a scan.

    A step function, nothing is interpolated. Scans without lesions count among the scans; nan without any lesion.
    """
    found = np.concatenate([np.empty(0), *(scan.scores for scan in scans)])
    false = np.concatenate([[-np.inf], *(scan.false_positives for scan in scans)])
    false = np.sort(false)[::-1]
    if not len(found):
        return np.full(len(rates), np.nan)
    allowed = np.floor(np.asarray(rates) * len(scans) + 1e-9).astype(int)  # 0.29 x 100 is below 29 in floating point
    # the first false positive too many bounds the threshold from below
    bound = false[np.minimum(allowed, len(false) - 1)]
    return (found > bound[:, None]).mean(axis=1)


def scan_auroc(scores: ArrayLike, ill: ArrayLike) -> float:
    """Share of pairs of an ill and a healthy scan in which the ill one scores higher; equal scores count half.

    ``scores`` (n,), ``ill`` (n,) above 0 for ill; nan where one group is empty.
    """
    scores, ill = np.asarray(scores, np.float64), np.asarray(ill) > 0
    many = int(ill.sum())
    pairs = many * (len(ill) - many)
    if not pairs:
        return float("nan")
    return float((stats.rankdata(scores)[ill].sum() - many * (many + 1) / 2) / pairs)
