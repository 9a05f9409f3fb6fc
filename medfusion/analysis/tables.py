"""Tables of cases: CSV files with a row for each, read once and checked; anything that is amiss is named."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medfusion.errors import MedfusionError, some

RENAME = "rename them in the CSV file"
OTHER_SEPARATORS = (";", "\t")
FORM = "cells separated by commas, numbers with a point, UTF-8: of Excel, 'CSV UTF-8 (comma delimited)'"
LARGEST = 1e100  # of a number: sums and squares stay finite


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file, every cell as text, "" where it is empty.

    Raises
    ------
    MedfusionError : it cannot be read, or names a column twice.
    """
    try:
        # as text: a patient 007 is not 7, and "NA" may be a name
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", header=None)
    except OSError as error:
        raise MedfusionError(f"{path}: cannot be read ({error.strerror})", fix="name a CSV file") from error
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own errors are ValueErrors
        raise MedfusionError(f"{path}: not a CSV file", problem=str(error).strip(), fix=FORM) from error
    names = [str(name).strip() for name in table.iloc[0]]
    if len(names) == 1 and any(mark in names[0] for mark in OTHER_SEPARATORS):
        raise MedfusionError(f"{path}: its cells are not separated by commas", first_line=names[0], fix=FORM)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MedfusionError(f"{path}: columns of the same name", columns=some(twice))
    return table.iloc[1:].set_axis(names, axis=1).reset_index(drop=True)


def read_cases(path: Path, case: str = "case", patient: str = "patient") -> pd.DataFrame:
    """A table with a row for each case, by its name, and the column patient; every cell is text.

    Parameters
    ----------
    case, patient : how their columns are called; the same where each case is a patient of its own.

    Raises
    ------
    MedfusionError : it cannot be read, has no rows, lacks a column, names a case twice or not, or lacks a patient.
    """
    table = read_table(path)
    try:
        return by_case(table, case, patient)
    except MedfusionError as error:
        raise MedfusionError(f"{path}: {error.what}", fix=error.fix, **error.facts) from error


def by_case(table: pd.DataFrame, case: str = "case", patient: str = "patient") -> pd.DataFrame:
    """What ``read_cases`` returns, of a table that is read already."""
    check_columns(table, {case, patient})
    hidden = [name for name, renamed in (("case", case), ("patient", patient)) if renamed != name and name in table]
    if hidden:
        raise MedfusionError("columns have names that the tables here use for others", columns=some(hidden), fix=RENAME)
    if table.empty:
        raise MedfusionError("the table has no rows")
    names = table[case].str.strip()
    odd = names[~names.map(str.isprintable)]
    if len(odd):
        raise MedfusionError("names of cases have characters that cannot be printed", cases=some(map(repr, odd)))
    twice = names[names.duplicated() & (names != "")].unique()
    if (names == "").any() or len(twice):
        raise MedfusionError(
            "each row needs the name of a case that no other has",
            **({"named_twice": some(twice)} if len(twice) else {}),
            **({"rows_without_a_name": some(table.index[names == ""] + 2)} if (names == "").any() else {}),
        )
    patients = table[patient].str.strip()
    if (patients == "").any():
        raise MedfusionError(
            "cases without a patient: scans of one person could not be kept together",
            cases=some(names[patients == ""]),
            fix="fill in the column; where every case is a person of its own, name the column of the case",
        )
    rest = table.drop(columns=list({case, patient} - {"patient"}))
    return rest.assign(patient=patients.to_numpy()).set_axis(pd.Index(names, name="case"), axis=0)


def check_columns(table: pd.DataFrame, columns: Iterable[str]) -> None:
    """Raise a MedfusionError if a table lacks one of the columns."""
    missing = sorted(set(columns) - set(table.columns))
    if missing:
        raise MedfusionError("the table lacks columns", missing=some(missing), columns=some(table.columns))


def numbers(table: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """A column as finite numbers.

    Raises
    ------
    MedfusionError : a cell is empty, or no number; the cases are named.
    """
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64)
    bad = ~(np.abs(values) < LARGEST)
    if bad.any():
        raise MedfusionError(
            f"column {column}: not a number, or none that can be reckoned with, in {bad.sum()} of {len(table)} cases",
            cases=some(f"{name} ({cell!r})" for name, cell in table.loc[bad, column].items()),
            fix="a case on which the system failed gets the worst value that there is",
        )
    return values
