"""Intervals of what was measured: Wilson's of a share, the bootstrap over patients of everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

BATCH = 2**22  # numbers in one batch of the bootstrap


def wilson(count: ArrayLike, total: ArrayLike, level: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score interval of a share, ``count`` of ``total`` (Wilson 1927); nan where ``total`` is 0.

    It never leaves [0, 1] and holds for few cases and for shares near 0 and 1, where share +- 2 standard errors does
    not (Brown, Cai and DasGupta 2001).
    """
    count, total = np.broadcast_arrays(np.asarray(count, np.float64), np.asarray(total, np.float64))
    total = np.where(total > 0, total, np.nan)
    z = stats.norm.ppf((1 + level) / 2)
    share, scale = count / total, 1 + z**2 / total
    middle = (share + z**2 / (2 * total)) / scale
    half = z / scale * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return np.where(share == 0, 0, middle - half), np.where(
        share == 1, 1, middle + half
    )  # exact there, but for rounding


def resampled(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    cases: NDArray[Any],
    groups: Sequence[str] | NDArray[Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """(draws, ...) values of a statistic of sums over cases, patients drawn with replacement (Efron 1979).

    Parameters
    ----------
    statistic : takes b sums over cases (b, ...) and returns (b, ...) values.
    cases : (n, ...) summands, such as the ``compact`` counts of n scans. ``np.eye(n)`` hands ``statistic`` the number
        of times that each case was drawn, for statistics that are no function of a sum.
    groups : the patient of each case; all scans of a patient are drawn together. None: each case is a patient.
    """
    patients, patient = np.unique(np.arange(len(cases)) if groups is None else groups, return_inverse=True)
    if len(patient) != len(cases):
        raise ValueError(f"{len(cases)} cases need as many groups, got {len(patient)}")
    table = np.zeros((len(patients), cases[0].size))
    np.add.at(table, patient, cases.reshape(len(cases), -1))
    # patients with the same summands are drawn as one kind: of rare errors there are few kinds
    _, first, counts = np.unique(table, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    kinds, share = table[first[order]], counts[order] / len(patients)
    rng = np.random.default_rng(seed)
    step = max(1, BATCH // max(kinds.shape))
    values = []
    for begin in range(0, draws, step):
        times = rng.multinomial(len(patients), share, size=min(step, draws - begin)).astype(np.float64)
        values.append(statistic((times @ kinds).reshape(-1, *cases.shape[1:])))
    return np.concatenate(values)


def bootstrap(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    cases: NDArray[Any],
    groups: Sequence[str] | NDArray[Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of a statistic (b,), over patients; arguments as in ``resampled``.

    Draws in which the statistic is nan are left out; (nan, nan) when it is in all.
    """
    values = resampled(statistic, cases, groups, draws, seed)
    values = values[~np.isnan(values)]
    low, high = np.percentile(values, (2.5, 97.5)) if len(values) else (np.nan, np.nan)
    return float(low), float(high)
