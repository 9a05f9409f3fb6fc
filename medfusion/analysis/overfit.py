"""Is a team overfitting its eyeball set?

The gap between the two sets does not tell, as one may be harder; what does is whether the eyeball set has improved more
than the blackbox set since a frozen baseline:

    gap = (blackbox now - blackbox then) - (eyeball now - eyeball then)

Every case is compared with itself; patients are independent, their scans are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from medfusion.errors import MedfusionError
from medfusion.metrics.intervals import resampled

ALPHA, POWER = 0.05, 0.8
TOLERANCE = 0.02  # error rate: a smaller gap does not matter
FEWEST = 10  # patients in a part
DRAWS, MOST_DRAWS = 4000, 200_000
BELOW = 50  # draws below a limit

Verdict = Literal["overfit", "no sign", "cannot tell"]


@dataclass(frozen=True)
class Change:
    """Error rate of one part, or its mean loss, at the baseline and now."""

    cases: int
    patients: int
    before: float
    now: float


@dataclass(frozen=True)
class Overfit:
    """``low`` and ``high`` are the one-sided limits of ``gap`` at ``level``; ``detectable`` is the gap that is found 80
    times in 100.
    """

    eyeball: Change
    blackbox: Change
    gap: float
    low: float
    high: float
    level: float
    look: int
    detectable: float
    tolerance: float
    verdict: Verdict


def level_of_look(look: int, alpha: float = ALPHA) -> float:
    """alpha / (k (k + 1)) at look k = 1, 2, ...: over all looks there will ever be, false alarms add up to alpha."""
    return alpha / (look * (look + 1))


def overfit(
    eyeball: tuple[ArrayLike, ArrayLike, ArrayLike],
    blackbox: tuple[ArrayLike, ArrayLike, ArrayLike],
    *,
    look: int = 1,
    tolerance: float = TOLERANCE,
    alpha: float = ALPHA,
) -> Overfit:
    """Compare how far both parts have come since the baseline.

    Parameters
    ----------
    eyeball, blackbox : of each case of the part: its error (or loss) at the baseline, now, and its patient.
    look : how often the blackbox set has been asked, this time included.
    tolerance : a gap that does not matter. Where it could not be told from none there is no verdict "no sign".

    Raises
    ------
    MedfusionError : a part has fewer than ten patients, or a number is out of its range.

    Notes
    -----
    The limits are percentiles of a bootstrap over the patients of each part, with 50 draws or more below each; from
    look 14 on those of a normal distribution with the spread of the draws.
    """
    if look < 1 or not tolerance > 0:
        raise MedfusionError("overfit: out of range", look=f"{look}, from 1", tolerance=f"{tolerance:g}, above 0")
    level = level_of_look(look, alpha)
    draws = min(max(DRAWS, int(BELOW / level)), MOST_DRAWS)
    eye, eye_draws = _change(*eyeball, "eyeball", draws, seed=0)
    black, black_draws = _change(*blackbox, "blackbox", draws, seed=1)
    gap = (black.now - black.before) - (eye.now - eye.before)
    drawn = black_draws - eye_draws
    # where no patient changed, draws do not vary; that one in each part might have is the least that is allowed for
    spread = max(float(drawn.std()), math.hypot(1 / eye.patients, 1 / black.patients))
    low, high = np.quantile(drawn, (level, 1 - level))
    if draws * level < BELOW:  # late looks would need millions of draws
        low, high = gap + stats.norm.ppf([level, 1 - level]) * spread
    detectable = float(stats.norm.ppf([1 - level, POWER]).sum() * spread)
    verdict: Verdict = "overfit" if low > 0 else "no sign" if detectable <= tolerance else "cannot tell"
    return Overfit(
        eyeball=eye,
        blackbox=black,
        gap=gap,
        low=float(low),
        high=float(high),
        level=level,
        look=look,
        detectable=detectable,
        tolerance=tolerance,
        verdict=verdict,
    )


def _change(
    before: ArrayLike, now: ArrayLike, patients: ArrayLike, name: str, draws: int, seed: int
) -> tuple[Change, NDArray[np.float64]]:
    """What became of a part, and its mean change in each draw of its patients."""
    start, end, patient = np.asarray(before, np.float64), np.asarray(now, np.float64), np.asarray(patients)
    many = len(np.unique(patient))
    if many < FEWEST:
        raise MedfusionError(f"the {name} set has {many} patient(s), too few to tell chance from change", fewest=FEWEST)
    summed = np.stack([end - start, np.ones(len(start))], axis=1)
    drawn = resampled(lambda sums: sums[:, 0] / sums[:, 1], summed, patient, draws, seed)
    return Change(len(start), many, float(start.mean()), float(end.mean())), drawn
