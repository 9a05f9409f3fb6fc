"""What each kind of error costs, and what fixing it is worth.

A tag's share of the errors times the error rate is the most that fixing it can gain: its ceiling (Ng, Machine Learning
Yearning, ch. 13 to 16). Tags overlap, so shares add up to more than 1; the cases that have this tag and no other are
what fixing it alone is sure to mend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medfusion.analysis.sizes import LEVELS
from medfusion.errors import MedfusionError, some
from medfusion.metrics.intervals import resampled, wilson

SMALLEST_COST = 1e-9
FEW = 5  # cases of a tag; of fewer its share is hardly known
NO_TAG = "(no tag)"


@dataclass(frozen=True)
class ErrorTable:
    """``tags`` has a row for each tag, by what fixing it is worth:

    count, share, low, high : errors that have it, of all that were looked at, with Wilson's 95 % interval
    exclusive, exclusive_share : those that have it alone
    loss_share : of the loss of all errors that were looked at
    among_correct : share of the correct cases that were looked at, nan without any: a tag that is as common there
        explains nothing
    ceiling, ceiling_low, ceiling_high : how far the error rate falls at most, with a 95 % interval over patients
    sure : how far it falls at least: by the cases that have this tag alone
    after : the error rate that is left when the ceiling is reached
    cost, gain_per_cost : as stated, and the ceiling over it; nan where none is
    """

    tags: pd.DataFrame
    cases: int
    errors: int
    looked_at: int
    error_rate: float
    warnings: tuple[str, ...]


def error_table(
    judged: pd.DataFrame, tags: pd.DataFrame, costs: Mapping[str, float] | None = None, error_rate: float | None = None
) -> ErrorTable:
    """Count tags among errors.

    Parameters
    ----------
    judged : cases as ``judge`` returns them: patient, error, loss.
    tags : ``tag_matrix`` of those cases that were looked at.
    costs : of fixing each tag, in any unit that all share.
    error_rate : of the system, where ``judged`` holds its errors and few or no correct cases; None: that of ``judged``.

    Raises
    ------
    MedfusionError : a tagged case is not in ``judged``; no error was looked at; a cost is not above 0 or of no tag; the
        error rate is none.
    """
    costs = dict(costs or {})
    if error_rate is not None and not 0 < error_rate <= 1:
        raise MedfusionError(f"error rate {error_rate:g}: not above 0 and at most 1")
    _check(judged, tags, costs)
    looked = judged.index.isin(tags.index)
    error, loss = judged["error"].to_numpy(bool), judged["loss"].to_numpy(float)
    given = tags.reindex(judged.index, fill_value=False)
    given[NO_TAG] = looked & ~given.any(axis=1).to_numpy()
    seen, correct = error & looked, looked & ~error
    alone = given.sum(axis=1).to_numpy() == 1
    rate = float(error.mean()) if error_rate is None else error_rate
    found = list(given.columns[given[seen].any(axis=0)])
    lows, highs = _ceilings(error, seen, given[found].to_numpy(bool), judged["patient"].to_numpy(), error_rate)
    rows = {}
    for tag, ceiling_low, ceiling_high in zip(found, lows, highs, strict=True):
        has = given[tag].to_numpy(bool)
        count, exclusive = int((seen & has).sum()), int((seen & has & alone).sum())
        low, high = wilson(count, seen.sum())
        rows[tag] = {
            "count": count,
            "share": count / seen.sum(),
            "low": float(low),
            "high": float(high),
            "exclusive": exclusive,
            "exclusive_share": exclusive / seen.sum(),
            "loss_share": loss[seen & has].sum() / loss[seen].sum() if loss[seen].sum() > 0 else np.nan,
            "among_correct": (correct & has).sum() / correct.sum() if correct.any() else np.nan,
            "ceiling": rate * count / seen.sum(),
            "ceiling_low": ceiling_low,
            "ceiling_high": ceiling_high,
            "sure": rate * exclusive / seen.sum(),
            "after": rate * (1 - count / seen.sum()),
            "cost": costs.get(tag, np.nan),
            "gain_per_cost": rate * count / seen.sum() / costs.get(tag, np.nan),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("tag")
    by = ["gain_per_cost", "ceiling"] if costs else ["ceiling"]
    table = table.sort_values(by, ascending=False, kind="stable", na_position="last")
    return ErrorTable(
        tags=table,
        cases=len(judged),
        errors=int(error.sum()),
        looked_at=int(seen.sum()),
        error_rate=rate,
        warnings=_warnings(table, int(seen.sum()), int(error.sum())),
    )


def _ceilings(
    error: NDArray[np.bool_],
    seen: NDArray[np.bool_],
    given: NDArray[np.bool_],
    patients: NDArray[np.str_],
    error_rate: float | None,
) -> NDArray[np.float64]:
    """(2, tags) interval of the error rate times the share of each tag; a rate that is stated does not vary."""

    def ceilings(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        cases, errors, looked_at = (sums[:, k, None] for k in range(3))
        rate = errors / cases if error_rate is None else error_rate
        return rate * np.divide(sums[:, 3:], looked_at, out=np.full_like(sums[:, 3:], np.nan), where=looked_at > 0)

    counted = np.column_stack([np.ones_like(error), error, seen, seen[:, None] & given])
    return np.nanpercentile(resampled(ceilings, counted, patients), (2.5, 97.5), axis=0)


def _check(judged: pd.DataFrame, tags: pd.DataFrame, costs: dict[str, float]) -> None:
    unknown = tags.index.difference(judged.index)
    if len(unknown):
        raise MedfusionError("cases are tagged that are not in the table of cases", cases=some(unknown))
    if not judged.loc[tags.index, "error"].any():
        raise MedfusionError("none of the errors has been looked at", errors=int(judged["error"].sum()))
    wrong = {
        name: cost for name, cost in costs.items() if name not in tags.columns or not SMALLEST_COST < cost < np.inf
    }
    if wrong:
        raise MedfusionError(
            "costs that cannot be used", costs=some(f"{k}={v:g}" for k, v in wrong.items()), tags=some(tags.columns)
        )


def _warnings(table: pd.DataFrame, seen: int, errors: int) -> tuple[str, ...]:
    found = []
    level = [name for least, name in LEVELS.items() if seen >= least]
    if seen < max(LEVELS):
        judgement = level[-1] if level else "too few for more than a first impression"
        found.append(f"{seen} errors looked at: {judgement}; 100 would be very good")
    if seen < errors:
        found.append(f"{errors - seen} of {errors} errors have not been looked at")
    few = [tag for tag, count in table["count"].items() if count < FEW]
    if few:
        found.append(f"fewer than {FEW} errors: {some(few)}")
    return tuple(found)
