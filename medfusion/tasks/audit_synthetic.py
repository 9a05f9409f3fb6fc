"""Audit synthetic cases: do they show the labels that were asked for, are they copies, are they as varied as real ones?

Faithfulness  segmenters that saw real cases only are asked about the synthetic ones
Memorisation  distance to the nearest real case, beside that of real cases to each other
Diversity     MS-SSIM between pairs
Quality       Frechet distance and MMD of ``medfusion.tasks.features``, precision and recall

Real cases are judged by the same measures, half of them against the other half: that is what to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import cdist, pdist, squareform
from torch.nn import functional as F

from medfusion.config import SegmenterConfig
from medfusion.data.crops import Case
from medfusion.metrics.generative import (
    frechet_distance,
    interval,
    mmd,
    pairwise_ms_ssim,
    precision_recall,
)
from medfusion.tasks.features import extractor, features
from medfusion.tasks.segmenter import mean_dice, segment, train_segmenter

FAITHFUL = 0.8  # of the mean Dice of real cases: a synthetic case below it is dropped
NEAR = 1.0  # percentile of the distances of real cases to their nearest other: a synthetic case below it is dropped
EDGE = 64  # voxels: thumbnails, by which images are compared, are no larger
PAIRS = 300  # of each set, for the diversity
FEWEST = 8  # labelled cases: half of them to learn from, half to judge by; and cases whose distribution is compared
KINDS = ("real", "synthetic")


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Nearness:
    """Distances (n,) of synthetic cases to the nearest real one, and its name; of real ones to their nearest other.

    ``threshold`` is the percentile NEAR of the latter, ``of_pairs`` the same percentile of all pairs of real cases.
    """

    distance: NDArray[np.float64]
    nearest: tuple[str, ...]
    real: NDArray[np.float64]
    threshold: float
    of_pairs: float


@dataclass(frozen=True)
class Audit:
    """What was found about synthetic cases, in the order of ``cases``.

    Attributes
    ----------
    faithful, real_dice : (n,) mean Dice over the labels, of synthetic and of real labelled cases.
    near : by "image" and by "features".
    diversity : "real" and "synthetic" to MS-SSIM of pairs; 1: all are equal.
    distances : as ``distances``; empty with fewer than FEWEST synthetic or twice as many real cases.
    dropped : case to why it should not be trained on.
    """

    cases: tuple[str, ...]
    faithful: NDArray[np.float64]
    real_dice: NDArray[np.float64]
    near: Mapping[str, Nearness]
    diversity: Mapping[str, NDArray[np.float64]]
    distances: Mapping[str, Mapping[str, Estimate]]
    dropped: Mapping[str, str]

    def plain(self) -> dict[str, Any]:
        """For JSON: what was found of each case, and of all together."""
        cases = [
            {
                "case": name,
                "dice": float(self.faithful[k]),
                "nearest": {by: [near.nearest[k], float(near.distance[k])] for by, near in self.near.items()},
                "dropped": self.dropped.get(name, ""),
            }
            for k, name in enumerate(self.cases)
        ]
        return {
            "cases": cases,
            "features": extractor(),
            "real_dice": self.real_dice.tolist(),
            "threshold": {by: near.threshold for by, near in self.near.items()},
            "threshold_of_pairs": {by: near.of_pairs for by, near in self.near.items()},
            "real_nearest": {by: near.real.tolist() for by, near in self.near.items()},
            "ms_ssim": {kind: values.tolist() for kind, values in self.diversity.items()},
            "distances": {
                name: {kind: [part if np.isfinite(part) else None for part in value] for kind, value in each.items()}
                for name, each in self.distances.items()
            },
        }


def audit_cases(
    real: Sequence[Case],
    synthetic: Sequence[Case],
    parents: Sequence[str],
    classes: int,
    config: SegmenterConfig,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Audit:
    """Audit ``synthetic`` cases beside all ``real`` ones that the generator may have seen, labelled or not.

    Parameters
    ----------
    parents : for each synthetic case, the real one that most of its label map comes from.
    classes : values of the label maps, 0 (background) included.
    config : of the segmenters.
    """
    labelled = [case for case in real if case.labels is not None]
    real_dice, faithful = faithfulness(labelled, synthetic, parents, classes, config, seed=seed, device=device)
    shape = np.median([case.image.shape for case in real], axis=0).astype(int).clip(max=EDGE).tolist()
    small = [thumbnails(cases, shape) for cases in (real, synthetic)]
    seen = [features([case.image.float().numpy() for case in cases]) for cases in (real, synthetic)]
    names = [case.name for case in real]
    near = {
        "image": nearness(standardised(small[0]), standardised(small[1]), names),
        "features": nearness(seen[0], seen[1], names),
    }
    drawn = {name: pairwise_ms_ssim(images, PAIRS, seed) for name, images in zip(KINDS, small, strict=True)}
    return Audit(
        cases=tuple(case.name for case in synthetic),
        faithful=faithful,
        real_dice=real_dice,
        near=near,
        diversity=drawn,
        distances=distances(*seen, seed=seed) if min(len(synthetic), len(real) // 2) >= FEWEST else {},
        dropped=_dropped(synthetic, faithful, float(real_dice.mean()), near),
    )


def distances(
    real: NDArray[np.float64], synthetic: NDArray[np.float64], *, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Measure to "synthetic" and "real" to its value, for features (n, k): one half of the real cases to the other."""
    order = np.random.default_rng(seed).permutation(len(real))
    half, other = real[order[::2]], real[order[1::2]]
    size = min(len(synthetic), len(other))  # precision and recall depend on it
    found: dict[str, dict[str, Estimate]] = {
        name: {"synthetic": _estimate(measure, real, synthetic), "real": _estimate(measure, half, other)}
        for name, measure in (("Frechet distance", frechet_distance), ("MMD", mmd))
    }
    shares = {
        "synthetic": precision_recall(half[:size], synthetic[:size]),
        "real": precision_recall(half[:size], other[:size]),
    }
    for number, name in enumerate(("precision", "recall")):
        found[name] = {kind: Estimate(share[number], np.nan, np.nan) for kind, share in shares.items()}
    return found


def _dropped(
    synthetic: Sequence[Case], faithful: NDArray[np.float64], real_dice: float, near: Mapping[str, Nearness]
) -> dict[str, str]:
    """Case to reason."""
    dropped = {}
    for index, case in enumerate(synthetic):
        reasons = [
            f"too near to {one.nearest[index]} by {by}: {one.distance[index]:.3g}, less than {one.threshold:.3g}"
            for by, one in near.items()
            if one.distance[index] < one.threshold
        ]
        if faithful[index] < FAITHFUL * real_dice:
            reasons.append(f"does not show its labels: Dice {faithful[index]:.3f}, real cases {real_dice:.3f}")
        if reasons:
            dropped[case.name] = "; ".join(reasons)
    return dropped


def faithfulness(
    real: Sequence[Case],
    synthetic: Sequence[Case],
    parents: Sequence[str],
    classes: int,
    config: SegmenterConfig,
    *,
    seed: int,
    device: str | torch.device,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean Dice over the labels, (real,) and (synthetic,), by two segmenters that saw one half of the real cases each.

    Nobody is judged by a segmenter that saw it or its parent, so Dice of real and synthetic cases may be compared.
    """
    order = np.random.default_rng(seed).permutation(len(real))
    halves = [order[::2], order[1::2]]
    networks = [
        train_segmenter([[real[i] for i in half]], classes, config, seed=seed, device=device) for half in halves
    ]
    judge = {real[i].name: networks[1 - number] for number, half in enumerate(halves) for i in half}
    return (
        np.array([mean_dice(segment(judge[case.name], case.image), case.labels, classes) for case in real]),
        np.array(
            [
                mean_dice(segment(judge[parent], case.image), case.labels, classes)
                for case, parent in zip(synthetic, parents, strict=True)
            ]
        ),
    )


def nearness(real: NDArray[np.floating], synthetic: NDArray[np.floating], names: Sequence[str]) -> Nearness:
    """Of vectors (n, k); ``names`` are those of the real cases."""
    to_real = cdist(synthetic, real)
    between = squareform(pdist(real))
    pairs = between[np.triu_indices(len(real), 1)]
    np.fill_diagonal(between, np.inf)
    own = between.min(axis=1)
    return Nearness(
        to_real.min(axis=1),
        tuple(names[k] for k in to_real.argmin(axis=1)),
        own,
        lowest(own),
        float(np.percentile(pairs, NEAR)),
    )


def lowest(distances: NDArray[np.float64]) -> float:
    """Their percentile NEAR; of fewer than 100 that of a normal distribution through their logarithms.

    The lowest of ten is their 1st percentile by counting, and one new case in ten would be below it.
    """
    if len(distances) >= 100 or not distances.all():
        return float(np.percentile(distances, NEAR))
    logs = np.log(distances)
    return float(np.exp(logs.mean() + stats.norm.ppf(NEAR / 100) * logs.std(ddof=1)))


def thumbnails(cases: Sequence[Case], shape: Sequence[int]) -> NDArray[np.float32]:
    """(n, *shape): the images, cut or padded about their middle, at a lower resolution where they are far larger."""
    return np.stack([_thumbnail(case.image.float(), shape) for case in cases])


def _thumbnail(image: torch.Tensor, shape: Sequence[int]) -> NDArray[np.float32]:
    while any(n > 3 * m for n, m in zip(image.shape, shape, strict=True)):
        image = F.avg_pool3d(image[None, None], 2, ceil_mode=True)[0, 0]
    missing = [(m - n) for n, m in zip(image.shape, shape, strict=True)]
    padding = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]  # negative: cut off
    small: NDArray[np.float32] = F.pad(image[None, None], padding, mode="replicate")[0, 0].numpy()
    return small


def standardised(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, voxels) of mean 0 and length 1: the distance of two is (2 - 2 r)^(1/2) with their correlation r."""
    flat = images.reshape(len(images), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    standardised: NDArray[np.float32] = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return standardised


def _estimate(
    statistic: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
) -> Estimate:
    return Estimate(statistic(a, b), *interval(statistic, a, b))
