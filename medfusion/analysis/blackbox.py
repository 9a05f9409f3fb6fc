"""The sealed set: a split that notices when it was changed, and a log of every time that the blackbox was asked.

A folder holds `split.csv` (case, patient, person, part, stratum) and `log.jsonl`: how the split was made, each question
to the blackbox set, each refill of the eyeball set. Every line of the log ends with a hash of itself and of the line
before, so that none can be changed or taken out of the middle unnoticed. Lines cut off at the end show only by the
number that every answer tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock

from medfusion.analysis.split import PARTS
from medfusion.analysis.tables import check_columns, read_cases
from medfusion.errors import MedfusionError, some
from medfusion.metrics.intervals import bootstrap, wilson

SPLIT, LOG = "split.csv", "log.jsonl"
COLUMNS = ["patient", "person", "part", "stratum"]


def render_split(split: pd.DataFrame) -> tuple[str, str]:
    """``split.csv`` of a table as ``read_split`` returns it, and its digest, for the log."""
    text = split[COLUMNS].to_csv(lineterminator="\n")
    return text, digest(text)


def digest(text: str) -> str:
    """SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_split(folder: Path) -> pd.DataFrame:
    """patient, person, part and stratum of each case; two patients who share a scan are one person.

    Raises
    ------
    MedfusionError : there is none, or it is not what the last `errors split` or `errors refill` wrote.
    """
    try:
        content = (folder / SPLIT).read_bytes()
    except OSError as error:
        raise MedfusionError(f"{folder}: no split is there", fix="medfusion errors split") from error
    stated = [entry["sha256"] for entry in read_log(folder) if "sha256" in entry]
    if [hashlib.sha256(content).hexdigest()] != stated[-1:]:
        raise MedfusionError(
            f"{folder / SPLIT} or {LOG} beside it: was changed by hand, so nobody can say who has seen what",
            fix="restore it, or split new cases into another folder",
        )
    split = read_cases(folder / SPLIT)
    check_columns(split, COLUMNS)
    return split


def eyeball_cases(split: pd.DataFrame) -> pd.Index:
    """The cases that may be looked at."""
    return split.index[split["part"] == PARTS[0]]


def refuse_blackbox(split: pd.DataFrame, cases: Iterable[str]) -> None:
    """Raise a MedfusionError if one of the cases is in the blackbox set: nobody may look at it."""
    sealed = sorted(set(cases) & set(split.index[split["part"] == PARTS[1]]))
    if sealed:
        raise MedfusionError(
            f"{len(sealed)} case(s) are in the blackbox set, which nobody looks at",
            cases=some(sealed),
            fix="leave them out; `medfusion errors refill` moves patients to the eyeball set for good",
        )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All queries so far, oldest first.

    Raises
    ------
    MedfusionError : a line was changed or taken out.
    """
    path = folder / LOG
    before, entries = "", []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            entry = json.loads(line)
            seal = entry.pop("seal")
        except (ValueError, KeyError, AttributeError) as error:
            raise MedfusionError(f"{path}: line {number} is damaged") from error
        if seal != digest(before + json.dumps(entry, sort_keys=True)):
            raise MedfusionError(f"{path}: line {number}, or one before it, was changed or taken out")
        before = seal
        entries.append(entry | {"seal": seal})
    return entries


def append_to_log(folder: Path, kind: str, **entry: Any) -> int:
    """Write a line, with the time, and return how many of its kind there are now; safe for several at once.

    Raises
    ------
    MedfusionError : it cannot be written, or was tampered with.
    """
    try:
        with FileLock(folder / f"{LOG}.lock"):
            earlier = read_log(folder)
            entry["kind"], entry["date"] = kind, datetime.now().astimezone().isoformat(timespec="seconds")
            seal = digest((earlier[-1]["seal"] if earlier else "") + json.dumps(entry, sort_keys=True))
            with (folder / LOG).open("a") as file:
                file.write(json.dumps(entry | {"seal": seal}) + "\n")
    except OSError as error:
        raise MedfusionError(f"{folder / LOG}: cannot be written ({error.strerror})", fix="make it writable") from error
    return 1 + sum(other["kind"] == kind for other in earlier)


def ask(folder: Path, judged: pd.DataFrame, model: str, definition: str) -> dict[str, Any]:
    """The score of a model on the blackbox set, and nothing about its cases; the question is logged first.

    Parameters
    ----------
    judged : as ``judge`` returns it, of all blackbox cases; others are passed over.
    model : name or version of what is scored, not "".
    definition : the hash of that by which it was judged.

    Returns
    -------
    model, definition, cases, patients, errors, error_rate, low, high (95 %, over patients), mean_loss, query (its
    number, from 1).

    Raises
    ------
    MedfusionError : a blackbox case is missing, or the log was tampered with.
    """
    if not model.strip():
        raise MedfusionError("the log needs a name of the model", fix="--model NAME")
    split = read_split(folder)
    sealed = split.index[split["part"] == PARTS[1]]
    missing = sealed.difference(judged.index)
    if len(missing):
        raise MedfusionError("blackbox cases without a score", cases=some(missing))
    of = judged.loc[sealed]
    error, patients = of["error"].to_numpy(float), split.loc[sealed, "patient"].to_numpy()
    low, high = bootstrap(
        lambda sums: sums[:, 0] / sums[:, 1], np.stack([error, np.ones_like(error)], axis=1), patients
    )
    if low == high:  # all patients are alike, and draws of them say nothing
        low, high = map(float, wilson(error.mean() * len(np.unique(patients)), len(np.unique(patients))))
    answer = {
        "model": model,
        "definition": definition,
        "cases": len(of),
        "patients": int(split.loc[sealed, "patient"].nunique()),
        "errors": int(error.sum()),
        "error_rate": float(error.mean()),
        "low": low,
        "high": high,
        "mean_loss": float(of["loss"].mean()),
    }
    return answer | {"query": append_to_log(folder, "query", **answer)}


def refilled(split: pd.DataFrame, persons: int, seed: int = 0) -> pd.DataFrame:
    """The split with that many persons moved from the blackbox to the eyeball set, drawn at random.

    Raises
    ------
    MedfusionError : the blackbox set has no more persons than that.
    """
    sealed = split["part"] == PARTS[1]
    there = np.unique(split.loc[sealed, "person"])
    if not 1 <= persons < len(there):
        raise MedfusionError(
            f"{persons} patients cannot be moved: from 1 to {len(there) - 1} can, as the blackbox set has {len(there)}",
            fix="new patients, split into another folder, refill both sets",
        )
    moved = np.random.default_rng(seed).choice(there, persons, replace=False)
    return split.assign(part=split["part"].where(~split["person"].isin(moved), PARTS[0]))
