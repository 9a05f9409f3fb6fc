"""Reference: what a method of detection leaves on healthy scans, place by place; it turns scores into probabilities.

All probabilities are shares of healthy scans, each standardised by what is left on the others and not by itself: of
their voxels, of their heaviest regions. They hold for scans that are exchangeable with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.volume import Volume

SMALLEST_SD = 0.02  # of air to bright tissue = 2: no scan is that exact
TISSUES = np.linspace(-1.0, 1.5, 11)  # edges of the bins of expected intensity, in the prior's units
SHARES = np.logspace(0, -6, 121)  # of healthy voxels, at which the tail of their scores is kept
CLUSTER_P = 1e-3  # of a voxel: regions of these are weighed
NEIGHBOURS = np.ones((3, 3, 3))
MAPS = ("spread", "mean", "sd")  # that are kept inside alone
DIFFERENT, ANOTHER = 1.0, 2.5  # unlikeness above which a scan is flagged, and above which it is refused


@dataclass(frozen=True, eq=False)
class Reference:
    """What one method leaves on n healthy scans, on a grid of its own.

    Attributes
    ----------
    method : of ``medfusion.tasks.rebuild.METHODS``.
    affine : (4, 4), voxel index of the maps to world millimetres of the mean healthy scan.
    atlas : (i, j, k), the mean healthy scan in the prior's units.
    spread : (i, j, k), the standard deviation of healthy scans there, their bias fields taken out.
    inside : (i, j, k) bool, where scores are given; maps other than the atlas are known there and go on beyond it.
    mean, sd : (2, i, j, k) of the healthy scans' residual and structural difference there.
    tissue : (2, len(TISSUES) - 1), by how much the spread in a tissue differs from that of its place.
    tail : (len(SHARES),), scores that SHARES of the healthy voxels reach.
    heaviest : (n,), the weight of the heaviest region of each scan (``weigh``).
    features : (n, len(names)), by which it is told whether another scan is of their kind; ``names`` of them.
    tissue_ml : the median volume of tissue of the scans.
    stripped : whether they were brains without the rest of the head.
    """

    method: str
    affine: NDArray[np.float64]
    atlas: NDArray[np.float32]
    spread: NDArray[np.float32]
    inside: NDArray[np.bool_]
    mean: NDArray[np.float32]
    sd: NDArray[np.float32]
    tissue: NDArray[np.float32]
    tail: NDArray[np.float32]
    heaviest: NDArray[np.float32]
    features: NDArray[np.float32]
    names: tuple[str, ...]
    tissue_ml: float
    stripped: bool

    @property
    def scans(self) -> int:
        """How many healthy scans it stands for."""
        return len(self.heaviest)

    @property
    def height(self) -> float:
        """The score that CLUSTER_P of the healthy voxels reach."""
        return height_of(self.tail)

    @property
    def mean_scan(self) -> Volume:
        """The atlas, and the grid of all maps."""
        return Volume(self.atlas, self.affine, "healthy reference")

    def p_values(self, score: NDArray[np.float32]) -> NDArray[np.float32]:
        """The share of healthy voxels with a score as high, of the same shape; SHARES[-1] where none was as high."""
        # of equal scores the rarest counts last: np.interp wants them to rise
        rising = np.maximum.accumulate(self.tail.astype(np.float64) + np.arange(len(SHARES)) * 1e-9)
        return np.exp(np.interp(score, rising, np.log(SHARES), left=0.0)).astype(np.float32)

    def region_p(self, weight: float) -> float:
        """The share of healthy scans, this one counted, that have a region as heavy; in (0, 1]."""
        return float(1 + np.count_nonzero(self.heaviest >= weight)) / (self.scans + 1)

    def unlikeness(self, features: NDArray[np.float32]) -> dict[str, float]:
        """By feature: how far (m,) lie from the median of the healthy scans, where the farthest of them lies at 1."""
        middle = np.median(self.features, axis=0)
        spread = np.median(np.abs(self.features - middle), axis=0) + 1e-6
        farthest = float((np.abs(self.features - middle) / spread).max())
        return dict(zip(self.names, (np.abs(features - middle) / spread / farthest).tolist(), strict=True))

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """Its arrays, maps in half precision and but for the atlas inside alone; ``of`` takes them back."""
        known = {name: getattr(self, name)[..., self.inside].astype(np.float16) for name in MAPS}
        whole = {name: getattr(self, name) for name in ("affine", "tissue", "tail", "heaviest", "features")}
        return known | whole | {"atlas": self.atlas.astype(np.float16), "inside": np.packbits(self.inside)}

    def facts(self) -> dict[str, Any]:
        """What is no array."""
        return {name: getattr(self, name) for name in ("method", "names", "tissue_ml", "stripped")}

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> Reference:
        """From ``tensors`` and ``facts``."""
        arrays = {name: array.astype(np.float32) for name, array in tensors.items()}
        shape = arrays["atlas"].shape
        inside = np.unpackbits(tensors["inside"], count=math.prod(shape)).reshape(shape) > 0
        for name in MAPS:
            whole = np.zeros((*arrays[name].shape[:-1], *shape), np.float32)
            whole[..., inside] = arrays[name]
            arrays[name] = continued(whole, inside)
        exact = {"affine": tensors["affine"].astype(np.float64), "inside": inside}
        return cls(**arrays | exact | dict(facts) | {"names": tuple(facts["names"])})


def continued(maps: NDArray[Any], inside: NDArray[np.bool_]) -> NDArray[Any]:
    """Maps (..., i, j, k) with, beyond ``inside``, the value of its nearest voxel: to interpolate at its rim."""
    i, j, k = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return maps[..., i, j, k]


def standardise(
    raw: NDArray[np.float32],
    rebuilt: NDArray[np.float32],
    mean: NDArray[np.float32],
    sd: NDArray[np.float32],
    tissue: NDArray[np.float32],
) -> NDArray[np.float32]:
    """(raw - mean) / (sd tissue), (2, d, h, w), with the tissue factor that belongs to the expected intensity."""
    return (raw - mean) / (sd * tissue[:, np.digitize(rebuilt, TISSUES[1:-1])])


def height_of(tail: NDArray[np.float32]) -> float:
    """The score that CLUSTER_P of the healthy voxels reach, from the tail of their scores."""
    return float(np.interp(-np.log(CLUSTER_P), -np.log(SHARES), tail))


def weigh(
    score: NDArray[np.float32], inside: NDArray[np.bool_], height: float, voxel_ml: float
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Connected regions (d, h, w) where the score is above ``height``, 1 to n, and the weight of each, (n,).

    Weight is the volume times the mean excess over the height: the mass of a cluster (Bullmore et al. 1999), in ml.
    """
    labels, number = ndimage.label(inside & (score > height), structure=NEIGHBOURS)
    weights = ndimage.sum_labels(score - height, labels, np.arange(1, number + 1)) * voxel_ml
    return labels, np.atleast_1d(weights).astype(np.float64)


def false_discovery(p: NDArray[np.float32], rate: float) -> float:
    """The highest p among (n,) of which, by expectation, no more than ``rate`` are false discoveries; 0: none is.

    Benjamini & Hochberg 1995: the largest p_(k) <= rate k / n.
    """
    ordered = np.sort(p, axis=None).astype(np.float64)
    passed = np.flatnonzero(ordered <= rate * np.arange(1, len(ordered) + 1) / len(ordered))
    return float(ordered[passed[-1]]) if len(passed) else 0.0
