"""How many cases an eyeball and a blackbox set need.

The eyeball set is looked at, so it must show enough errors; the blackbox set is only scored, so it must be large enough
for the difference between two versions of a system to be seen (Ng, Machine Learning Yearning, ch. 17 to 19).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medfusion.errors import MedfusionError

LEVELS = {10: "rough", 50: "good", 100: "very good"}  # errors seen, and what that makes of the analysis
CERTAINTY = 0.9  # with which the errors are seen
RAREST, MOST = 1e-6, 10**9  # error rate, and number of anything: no study goes beyond
POWER, ALPHA = 0.8, 0.05  # of the two-sided comparison of two versions


def cases_for_errors(rate: float, errors: int, certainty: float = CERTAINTY) -> int:
    """The fewest cases that show at least ``errors`` errors with this certainty, where each is one at ``rate``.

    The cases up to the last of ``errors`` errors follow a negative binomial distribution; ``errors / rate`` is its
    mean, and too few half of the time.
    """
    return errors + int(stats.nbinom.ppf(certainty, errors, rate))


def cases_for_difference(
    rate: float, difference: float, discordant: float | None = None, power: float = POWER, alpha: float = ALPHA
) -> int:
    """Cases that both versions are scored on, so that McNemar's test sees the error rate fall by ``difference``.

    Parameters
    ----------
    rate : of errors of the first version.
    discordant : share of cases on which one version is wrong and the other right, at least ``difference``; None: as
        many as if the two erred independently, which is more than versions of one system do.

    Notes
    -----
    Connor, Biometrics 43 (1987): n = (z_(1 - alpha/2) sqrt(d) + z_power sqrt(d - difference^2))^2 / difference^2.
    """
    if discordant is None:
        better = rate - difference
        discordant = rate * (1 - better) + better * (1 - rate)
    level, strength = stats.norm.ppf([1 - alpha / 2, power])
    root = level * math.sqrt(discordant) + strength * math.sqrt(discordant - difference**2)
    return math.ceil((root / difference) ** 2)


def design_effect(scans: float, icc: float) -> float:
    """1 + (m - 1) ICC: by how much more cases are needed when each patient has m scans (Kish 1965)."""
    return 1 + (scans - 1) * icc


def intraclass_correlation(values: NDArray[np.float64], patients: NDArray[np.str_]) -> float:
    """How alike the cases of a patient are, 0 (not at all, or less) to 1; 0 where no patient has two.

    The estimator of the one-way analysis of variance, for groups of unequal size (Donner, Int. Stat. Rev. 54, 1986).
    """
    _, group, size = np.unique(patients, return_inverse=True, return_counts=True)
    total, groups = len(values), len(size)
    if groups == total or groups < 2:
        return 0.0
    mean = np.bincount(group, values) / size
    between = (size * (mean - values.mean()) ** 2).sum() / (groups - 1)
    within = ((values - mean[group]) ** 2).sum() / (total - groups)
    typical = (total - (size**2).sum() / total) / (groups - 1)
    spread = between + (typical - 1) * within
    return float(max(0.0, (between - within) / spread)) if spread > 0 else 0.0


@dataclass(frozen=True)
class Sizes:
    """Cases that the two sets need; ``*_patients`` where several scans come from each.

    ``eyeball_only`` says that there are too few for both; it is None where it is not known how many there are.
    """

    error_rate: float
    errors: int
    certainty: float
    design_effect: float
    eyeball: int
    eyeball_patients: int
    naive: int
    difference: float | None
    blackbox: int | None
    blackbox_patients: int | None
    available: int | None
    errors_seen: int | None
    eyeball_only: bool | None


def plan_sizes(
    rate: float,
    errors: int,
    *,
    difference: float | None = None,
    discordant: float | None = None,
    certainty: float = CERTAINTY,
    scans: float = 1.0,
    icc: float = 0.0,
    available: int | None = None,
) -> Sizes:
    """What both sets need.

    Parameters
    ----------
    rate : of errors, in (0, 1).
    errors : that the eyeball set should show.
    difference : of the error rate, that the blackbox set should detect; None: it is not sized.
    discordant : as in ``cases_for_difference``.
    scans, icc : scans of each patient, and how alike their errors are (``intraclass_correlation``).
    available : cases there are for both sets; None: not known.

    Raises
    ------
    MedfusionError : a number is out of its range.
    """
    _check(rate, errors, difference, discordant, certainty, scans, icc, available)
    effect = design_effect(scans, icc)
    eyeball = math.ceil(effect * cases_for_errors(rate, errors, certainty))
    blackbox = None if difference is None else math.ceil(effect * cases_for_difference(rate, difference, discordant))
    return Sizes(
        error_rate=rate,
        errors=errors,
        certainty=certainty,
        design_effect=effect,
        eyeball=eyeball,
        eyeball_patients=math.ceil(eyeball / scans),
        naive=math.ceil(round(errors / rate, 9)),
        difference=difference,
        blackbox=blackbox,
        blackbox_patients=None if blackbox is None else math.ceil(blackbox / scans),
        available=available,
        errors_seen=None if available is None else int(stats.binom.ppf(1 - certainty, int(available / effect), rate)),
        eyeball_only=None if available is None else available < eyeball + (blackbox or 0),
    )


def _check(
    rate: float,
    errors: int,
    difference: float | None,
    discordant: float | None,
    certainty: float,
    scans: float,
    icc: float,
    available: int | None,
) -> None:
    """Raise a MedfusionError that names all numbers that are out of their range."""
    ranges = {
        "error_rate": (RAREST <= rate < 1, rate, f"from {RAREST:g} to below 1"),
        "errors": (1 <= errors <= MOST, errors, f"1 to {MOST:,}"),
        "certainty": (0 < certainty < 1, certainty, "between 0 and 1"),
        "scans": (1 <= scans <= MOST, scans, f"1 to {MOST:,} for each patient"),
        "icc": (0 <= icc <= 1, icc, "from 0 to 1"),
        "available": (available is None or 1 <= available <= MOST, available, f"1 to {MOST:,}"),
        "difference": (
            difference is None or RAREST <= difference <= rate,
            difference,
            f"from {RAREST:g} to the error rate, that cannot fall by more",
        ),
        "discordant": (
            discordant is None or (difference is not None and difference <= discordant <= 1),
            discordant,
            "at least the difference, which has to be named too, and at most 1",
        ),
    }
    wrong = {name: f"{value}, should be {range_}" for name, (fine, value, range_) in ranges.items() if not fine}
    if wrong:
        raise MedfusionError("the sizes cannot be planned", **wrong)
