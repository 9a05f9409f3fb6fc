"""Where errors concentrate: a shallow tree over what is known of each case, fitted on one half, confirmed on the other.

A tree finds a bad slice in any table, so the half that it was fitted on proves nothing. What is reported was measured
on the patients that it never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from sklearn.tree import DecisionTreeRegressor

from medfusion.analysis.definition import JUDGED
from medfusion.analysis.tables import check_columns
from medfusion.errors import MedfusionError
from medfusion.metrics.intervals import resampled, wilson

DEPTH = 3
SUPPORT = 0.05  # share of the cases that a slice has at least, and
FEWEST = 10  # of them, in the half that the tree is fitted on
MISSING = ("", "na", "n/a", "nan", "none", "null", "-", "?")  # cells of a column of numbers
CATEGORIES = 20  # a column of text with more different values is a name, not a property
ALPHA = 0.05


@dataclass(frozen=True)
class Slices:
    """``table`` has a row for each slice, the worst first; all but ``fitted_rate`` is of the half that was kept back:

    slice : the conditions, joined by " and "
    cases, patients, coverage : how many there are, and their share of all
    errors, rate, low, high : of errors, with Wilson's 95 % interval
    rest, p : the rate among all other cases; p of no difference or a lower rate, over patients, as Holm corrects it
    confirmed : p is at most 0.05
    fitted_rate : where the tree was fitted
    """

    table: pd.DataFrame
    columns: tuple[str, ...]
    left_out: tuple[str, ...]
    fitted: int
    kept_back: int

    @property
    def cautions(self) -> tuple[str, ...]:
        """What looks like a result of the system, and no property of a case."""
        told = self.table[(self.table["rate"] == 1) & (self.table["rest"] == 0) & self.table["confirmed"]]
        return tuple(
            f"{name}: tells all errors from all that is right; if it is a result of the system, list its column under "
            "`scores` in the definition"
            for name in told["slice"]
        )


def find_slices(judged: pd.DataFrame, columns: Sequence[str] = (), *, depth: int = DEPTH, seed: int = 0) -> Slices:
    """Fit and confirm.

    Parameters
    ----------
    judged : cases as ``judge`` returns them: patient, error.
    columns : of numbers or categories, known without the truth or with it; (): all that are of either kind.
    depth : of the tree: conditions that a slice has at most.
    seed : of the halves; all cases of a patient are in one.

    Raises
    ------
    MedfusionError : a column is missing, none can be used, or there are too few cases for two halves.
    """
    check_columns(judged.drop(columns=list(JUDGED), errors="ignore"), columns)
    if judged["error"].all() or not judged["error"].any():
        raise MedfusionError(f"all {len(judged)} cases are {'errors' if judged['error'].any() else 'right'}: no slices")
    known = [name for name in judged.columns if name not in {"patient", *JUDGED}]
    features, left_out = _features(judged, list(columns) or known)
    if not features:
        raise MedfusionError("no column tells the cases apart", columns=", ".join(known) or "none")
    half = _half(judged["patient"].to_numpy(np.str_), seed)
    fewest = max(FEWEST, int(SUPPORT * half.sum()))
    if min(half.sum(), (~half).sum()) < 2 * fewest:
        raise MedfusionError(
            f"{len(judged)} cases of {judged['patient'].nunique()} patients are too few for slices",
            enough=f"about {4 * fewest} cases, and as many of them in either half of the patients",
        )
    x, names = np.column_stack([f.values for f in features]), [f.name for f in features]
    error = judged["error"].to_numpy(bool)
    tree = DecisionTreeRegressor(max_depth=depth, min_samples_leaf=fewest, random_state=seed).fit(x[half], error[half])
    leaf = tree.apply(x)
    conditions = _conditions(tree, features)
    patients = judged["patient"].to_numpy(np.str_)
    rows = [
        {"slice": conditions[number], "fitted_rate": error[half & (leaf == number)].mean()}
        | _measured(error[~half], (leaf == number)[~half], patients[~half])
        for number in np.unique(leaf[~half])
        if conditions[number]
    ]
    table = pd.DataFrame(rows, columns=["slice", *COLUMNS, "fitted_rate"])
    table["p"] = holm(table["p"].to_numpy(float))
    table["confirmed"] = table["p"] <= ALPHA
    table = table.sort_values("rate", ascending=False, kind="stable", ignore_index=True)
    return Slices(table, tuple(dict.fromkeys(names)), tuple(left_out), int(half.sum()), int((~half).sum()))


COLUMNS = ("cases", "patients", "coverage", "errors", "rate", "low", "high", "rest", "p")


@dataclass(frozen=True, eq=False)
class _Feature:
    """One input of the tree: a number, or whether a category is ``category``."""

    name: str
    values: NDArray[np.float64]
    category: str | None


def _features(judged: pd.DataFrame, columns: Sequence[str]) -> tuple[list[_Feature], list[str]]:
    """What columns become, and the names of those that cannot be used: the same everywhere, or text of all sorts.

    A missing number is the median, and whether it is missing is a feature of its own; a missing category is one.
    """
    features, left_out = [], []
    for name in columns:
        text = judged[name].astype(str).str.strip()
        empty = text.str.casefold().isin(MISSING)
        value = pd.to_numeric(text.where(~empty), errors="coerce")
        value = value.where(np.isfinite(value))
        different = text.nunique()
        if different > 1 and (value.notna() | empty).all():
            features.append(_Feature(name, value.fillna(value.median()).to_numpy(np.float64), None))
            if empty.any():
                features.append(_Feature(name, np.asarray(empty, np.float64), "missing"))
        elif 1 < different <= CATEGORIES:
            found = sorted(text.unique())
            features += [_Feature(name, np.asarray(text == each, np.float64), each or "missing") for each in found]
        else:
            left_out.append(name)
    return features, left_out


def _half(patients: NDArray[np.str_], seed: int) -> NDArray[np.bool_]:
    """(n,) the cases of a random half of the patients."""
    names, patient = np.unique(patients, return_inverse=True)
    chosen = np.random.default_rng(seed).permutation(len(names)) < len(names) / 2
    return chosen[patient]


def _conditions(tree: DecisionTreeRegressor, features: Sequence[_Feature]) -> dict[int, str]:
    """What leads to each node; bounds of one number are merged into the narrowest."""
    inner = tree.tree_
    found: dict[int, str] = {}

    def walk(node: int, low: dict[int, float], high: dict[int, float]) -> None:
        place, cut = int(inner.feature[node]), float(inner.threshold[node])
        if inner.children_left[node] == -1:
            found[node] = " and ".join(_condition(features[k], low.get(k), high.get(k)) for k in sorted({*low, *high}))
            return
        walk(int(inner.children_left[node]), low, high | {place: min(cut, high.get(place, np.inf))})
        walk(int(inner.children_right[node]), low | {place: max(cut, low.get(place, -np.inf))}, high)

    walk(0, {}, {})
    return found


def _condition(feature: _Feature, low: float | None, high: float | None) -> str:
    if feature.category is not None:
        return f"{feature.name} is {'' if low is not None else 'not '}{feature.category}"
    if low is None:
        return f"{feature.name} <= {high:.4g}"
    return f"{feature.name} > {low:.4g}" if high is None else f"{low:.4g} < {feature.name} <= {high:.4g}"


def _measured(error: NDArray[np.bool_], inside: NDArray[np.bool_], patients: NDArray[np.str_]) -> dict[str, float]:
    """A slice among the cases that were kept back."""
    cases, errors = int(inside.sum()), int(error[inside].sum())
    low, high = wilson(errors, cases)
    rest = float(error[~inside].mean())

    def difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        wrong, many, wrong_rest, many_rest = np.moveaxis(sums, -1, 0)
        defined = (many > 0) & (many_rest > 0)
        return np.where(defined, wrong / np.maximum(many, 1) - wrong_rest / np.maximum(many_rest, 1), np.nan)

    table = np.stack([error & inside, inside, error & ~inside, ~inside], axis=1)
    spread = np.nanstd(resampled(difference, table, patients))
    gap = errors / cases - rest
    p = stats.norm.sf(gap / spread) if spread > 0 else _exact(error, inside, patients)
    return {
        "cases": cases,
        "patients": len(np.unique(patients[inside])),
        "coverage": cases / len(error),
        "errors": errors,
        "rate": errors / cases,
        "low": float(low),
        "high": float(high),
        "rest": rest,
        "p": float(p),
    }


def _exact(error: NDArray[np.bool_], inside: NDArray[np.bool_], patients: NDArray[np.str_]) -> float:
    """Fisher's exact p where a slice has all errors, or none: draws of such patients do not vary."""
    who = pd.DataFrame({"error": error, "inside": inside}).groupby(patients).max()
    counts = pd.crosstab(who["inside"], who["error"]).reindex(index=[True, False], columns=[True, False], fill_value=0)
    return float(stats.fisher_exact(counts.to_numpy(), "greater").pvalue)


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corrected for as many tests as there are (Holm 1979)."""
    order = np.argsort(p)
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(corrected, 1)[np.argsort(order)]
