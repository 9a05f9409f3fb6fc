"""Tags: what reviewers saw in each case. A CSV file with the columns case, reviewer, tag and comment.

A row for each tag of a case; a case that was looked at and has no tag has one row with an empty tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medfusion.analysis.tables import check_columns, read_table
from medfusion.errors import MedfusionError, some
from medfusion.metrics.intervals import bootstrap

WRONG_LABEL = "label is wrong"  # always among the tags: the case is no error of the system
COLUMNS = ["case", "reviewer", "tag", "comment", "definition"]
VERDICTS = {"true": "", "false": "false finding", "missed": "missed lesion"}  # of the review page, as tags


def read_tags(path: Path) -> pd.DataFrame:
    """The columns case, reviewer, tag, comment and definition of a CSV file, or of all in a folder; "" where one lacks.

    Tables of the review page of `medfusion detect` are read too: a verdict "false" is the tag "false finding", "missed"
    is "missed lesion", "unsure" is "unsure"; a case whose findings are all true has no tag.

    Raises
    ------
    MedfusionError : nothing can be read, the column case or tag is missing, or a row names no case.
    """
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise MedfusionError(f"{path}: no CSV file in this folder")
    return pd.concat([_read_file(file) for file in files], ignore_index=True)


def _read_file(path: Path) -> pd.DataFrame:
    table = read_table(path)
    if "tag" not in table and "verdict" in table:
        table = table[table["verdict"] != ""].assign(tag=lambda rows: rows["verdict"].replace(VERDICTS))
    try:
        check_columns(table, {"case", "tag"})
    except MedfusionError as error:
        first = "the first line is: case,reviewer,tag,comment"
        raise MedfusionError(f"{path}: {error.what}", fix=first, **error.facts) from error
    for column in COLUMNS:
        table[column] = table.get(column, "")
    table = table[COLUMNS].apply(lambda column: column.str.strip())
    if (table["case"] == "").any():
        raise MedfusionError(f"{path}: rows without a case", rows=some(table.index[table["case"] == ""] + 2))
    return table


def tag_matrix(tags: pd.DataFrame) -> pd.DataFrame:
    """Bool, a row for each case that was looked at and a column for each tag; both sorted.

    Of a case with several reviewers a tag counts that at least half of them gave.
    """
    looked = tags.groupby("case")["reviewer"].nunique()
    given = tags[tags["tag"] != ""].drop_duplicates(["case", "reviewer", "tag"])
    names, tag = np.unique(given["tag"].to_numpy(np.str_), return_inverse=True)
    votes = np.zeros((len(looked), len(names)))
    np.add.at(votes, (looked.index.get_indexer(pd.Index(given["case"])), tag), 1)
    counts = (votes > 0) & (votes >= looked.to_numpy()[:, None] / 2)
    return pd.DataFrame(counts, looked.index, pd.Index(names, name="tag"))


def cohen_kappa(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Agreement of two raters beyond chance, -1 to 1 (Cohen 1960); nan where chance alone agrees in all cases."""
    return float(_kappa(_four(first, second).sum(axis=0)))


def _four(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(n, 4) which of both, first only, second only, none each case is."""
    return np.stack([first & second, first & ~second, ~first & second, ~first & ~second], axis=1)


def _kappa(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(...,) of counts (..., 4)."""
    both, one, other, none = np.moveaxis(np.asarray(counts, np.float64) / np.sum(counts, axis=-1, keepdims=True), -1, 0)
    observed, first, second = both + none, both + one, both + other
    chance = first * second + (1 - first) * (1 - second)
    return np.divide(observed - chance, 1 - chance, out=np.full_like(chance, np.nan), where=chance < 1)


@dataclass(frozen=True, eq=False)
class Agreement:
    """Of two ``reviewers`` on the ``cases`` that both looked at.

    ``table`` has a row for each tag that one of them gave: to how many cases both, the first, the second gave it; kappa
    and its 95 % interval low and high.
    """

    reviewers: tuple[str, str]
    cases: int
    table: pd.DataFrame


def agreement(tags: pd.DataFrame, patients: pd.Series | None = None) -> Agreement:
    """Compare two reviewers.

    Parameters
    ----------
    tags : as ``read_tags`` returns them, of two reviewers; cases that both looked at count.
    patients : the patient of each case, by its name; None: each case is a patient. The interval (95 %) is a bootstrap
        over them.

    Raises
    ------
    MedfusionError : there are not two reviewers, they looked at no case both, or at one that ``patients`` lacks.
    """
    names = sorted(tags["reviewer"].unique())
    if len(names) != 2:
        raise MedfusionError(
            f"agreement is of two reviewers, and there are {len(names)}",
            reviewers=some(name or "(no name)" for name in names),
            fix="a file with the rows of two of them",
        )
    one, two = (tag_matrix(tags[tags["reviewer"] == name]) for name in names)
    shared = one.index.intersection(two.index)
    if shared.empty:
        raise MedfusionError("the two reviewers looked at no case both", reviewers=some(names))
    if patients is not None and len(unknown := shared.difference(patients.index)):
        raise MedfusionError("cases are tagged that are not in the table of cases", cases=some(unknown))
    who = shared.to_numpy() if patients is None else patients.loc[shared].to_numpy()
    rows = {}
    for tag in one.columns.union(two.columns):
        first, second = (_column(each, tag, shared) for each in (one, two))
        four = _four(first, second)
        low, high = bootstrap(_kappa, four, who)
        both, first_only, second_only, _ = four.sum(axis=0)
        kappa = cohen_kappa(first, second)
        rows[tag] = (both, both + first_only, both + second_only, kappa, low, high)
    columns = ["both", "first", "second", "kappa", "low", "high"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("tag")
    return Agreement((names[0], names[1]), len(shared), table)


def _column(matrix: pd.DataFrame, tag: str, cases: pd.Index) -> NDArray[np.bool_]:
    return np.asarray(matrix.loc[cases, tag] if tag in matrix else np.zeros(len(cases)), np.bool_)
