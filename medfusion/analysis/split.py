"""Split cases into an eyeball set, that people look at, and a blackbox set, that nobody does: by patient, stratified.

Patients who share a scan (one series under two names, or the same voxels) are taken for one person.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medfusion.analysis.tables import check_columns
from medfusion.errors import MedfusionError, some

PARTS = ("eyeball", "blackbox")
BINS = 3  # into which a number is cut that is a stratum


@dataclass(frozen=True, eq=False)
class Split:
    """``table`` has patient, person (a number), part ("eyeball" or "blackbox") and stratum of each case that was split.

    ``duplicates`` are sets of cases that show the same scan; ``left_out`` the cases whose patient is in another list.
    """

    table: pd.DataFrame
    duplicates: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...]


def split_cases(
    cases: pd.DataFrame,
    eyeball: int,
    *,
    strata: Sequence[str] = (),
    identities: Sequence[str] = (),
    taken: Mapping[str, Iterable[str]] | None = None,
    seed: int = 0,
) -> Split:
    """Draw the eyeball set; the rest is the blackbox set.

    Parameters
    ----------
    cases : as ``read_cases`` returns them.
    eyeball : cases that it should have, at least. A patient is never divided.
    strata : columns in which both parts should be alike; a number is cut into three classes of equal size.
    identities : columns that are the same where two cases show the same scan, SOPInstanceUID or a hash of its voxels;
        an empty cell says nothing.
    taken : cases or patients of existing sets, by the name of the set. All cases of these patients are left out; names
        that are not in the table are passed over.

    Raises
    ------
    MedfusionError : a column is missing, a person is in two of the sets in ``taken``, or too few cases are there.
    """
    check_columns(cases, [*strata, *identities])
    names = cases.index.to_numpy(np.str_)
    person = same_person(cases, identities)
    twins = _duplicates(cases, identities)
    away = _away(cases, person, {name: set(listed) for name, listed in (taken or {}).items()})
    if not 1 <= eyeball < (~away).sum():
        raise MedfusionError(
            f"an eyeball set of {eyeball} cases leaves nothing to the blackbox set",
            cases_to_split=int((~away).sum()),
            fix="with so few cases look at all of them, and do without a blackbox set",
        )
    stratum = _strata(cases, strata)
    chosen = _drawn(person[~away], stratum[~away], eyeball, np.random.default_rng(seed))
    if chosen.all():
        raise MedfusionError(f"the patients of {eyeball} eyeball cases are all that there are", fix="ask for fewer")
    table = cases.loc[~away, ["patient"]]
    table = table.assign(person=person[~away], part=np.where(chosen, *PARTS), stratum=stratum[~away])
    return Split(
        table=table,
        duplicates=twins,
        left_out=tuple(names[away]),
    )


def _away(cases: pd.DataFrame, person: NDArray[np.int64], taken: Mapping[str, set[str]]) -> NDArray[np.bool_]:
    """(n,) the cases of all persons who are in one of the sets."""
    names, patients = cases.index.to_numpy(np.str_), cases["patient"].to_numpy(np.str_)
    times = np.zeros(person.max() + 1, int)
    for listed in taken.values():
        listed_here = np.isin(names, list(listed)) | np.isin(patients, list(listed))
        times[np.unique(person[listed_here])] += 1
    if (times > 1).any():
        raise MedfusionError(
            f"{(times > 1).sum()} person(s) are in two of the sets {', '.join(taken)}",
            cases=some(names[times[person] > 1]),
            fix="take them out of one of the lists: what was tuned on one would be measured on it",
        )
    return times[person] > 0


def same_person(cases: pd.DataFrame, identities: Sequence[str]) -> NDArray[np.int64]:
    """(n,) a number for each person: cases of one patient, and of all patients who share a scan."""
    _, patient = np.unique(cases["patient"].to_numpy(np.str_), return_inverse=True)
    nodes = int(patient.max()) + 1
    rows, columns = [np.empty(0, int)], [np.empty(0, int)]  # edges from patients to the scans they have
    for column in identities:
        value = np.char.strip(cases[column].to_numpy(np.str_))
        _, scan = np.unique(value[value != ""], return_inverse=True)
        rows.append(patient[value != ""])
        columns.append(nodes + scan)
        nodes += int(scan.max(initial=-1)) + 1
    row, scan = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(len(row)), (row, scan)), (nodes, nodes))
    return connected_components(graph, directed=False)[1][patient].astype(np.int64)


def _duplicates(cases: pd.DataFrame, identities: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Cases that show the same scan."""
    found: dict[tuple[str, ...], None] = {}
    for column in identities:
        stated = cases[cases[column].str.strip() != ""]
        for names in stated.groupby(column).groups.values():
            if len(names) > 1:
                found[tuple(sorted(map(str, names)))] = None
    return tuple(sorted(found))


def _strata(cases: pd.DataFrame, columns: Sequence[str]) -> NDArray[np.str_]:
    """(n,) what each case is, in words; numbers that differ much are cut at their terciles."""
    words = []
    for name in columns:
        text = cases[name].astype(str).str.strip()
        value = pd.to_numeric(text.where(text != ""), errors="coerce")
        if text.nunique() > 2 * BINS and value.notna().sum() == (text != "").sum():
            text = pd.qcut(value, BINS, duplicates="drop").astype(str).where(text != "", "")
        words.append(name + " " + text.where(text != "", "missing"))
    return np.array([", ".join(each) for each in zip(*words, strict=True)] if words else [""] * len(cases), np.str_)


def _drawn(
    person: NDArray[np.int64], stratum: NDArray[np.str_], number: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """(n,) the cases of persons drawn evenly from all strata, at least ``number``.

    A person belongs to the rarest stratum of its scans. Persons are laid out by stratum and number of scans, else at
    random, and every so-manieth is drawn: all are as likely to be, and no stratum has one more or less than its share.
    """
    kinds, kind, count = np.unique(stratum, return_inverse=True, return_counts=True)
    people, who, scans = np.unique(person, return_inverse=True, return_counts=True)
    rarity = np.full(len(people), len(kinds))
    np.minimum.at(rarity, who, np.argsort(np.argsort(count, kind="stable"))[kind])
    line = np.lexsort((rng.random(len(people)), scans, rarity))
    steps = np.floor(np.arange(len(people) + 1) * number / len(person) + rng.random())
    drawn = np.zeros(len(people), bool)
    drawn[line[np.diff(steps) > 0]] = True
    for extra in rng.permutation(np.flatnonzero(~drawn)):
        if scans[drawn].sum() >= number:
            break
        drawn[extra] = True
    return drawn[who]
