"""The table that tells the class of each scan: benign or malignant, scanner, sex."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from medfusion.errors import MedfusionError, some


def read_classes(path: Path, names: Sequence[str], known: Sequence[str] | None = None) -> dict[str, str]:
    """The class of each of the scans ``names``; rows of others are passed over.

    Parameters
    ----------
    path : a CSV file with the columns case and class.
    known : the classes there are; None: any.

    Raises
    ------
    MedfusionError : the table cannot be read, lacks a column or a scan, or has an unknown class, none or two for one.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins its UTF-8 with a mark
            rows = csv.DictReader(file)
            if not {"case", "class"} <= set(rows.fieldnames or ()):
                raise MedfusionError(
                    f"classes: {path} lacks a column",
                    columns=", ".join(rows.fieldnames or ()),
                    fix="the first line is: case,class",
                )
            stated = defaultdict(set)
            for row in rows:
                stated[row["case"]].add(row["class"] or "")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MedfusionError(f"classes: {path} cannot be read", reason=error) from error
    classes = {name: stated.get(name, set()) for name in names}
    others = set().union(*classes.values()) - set(known) if known is not None else set()
    facts = {
        "scans_without_a_row": some(name for name, found in classes.items() if not found),
        "scans_without_a_class": some(name for name, found in classes.items() if "" in found),
        "scans_of_two_classes": some(name for name, found in classes.items() if len(found) > 1),
        "unknown_classes": some(sorted(others - {""})),
    }
    if any(facts.values()):
        raise MedfusionError(
            f"classes: {path} does not fit",
            **{name: value for name, value in facts.items() if value},
            **({} if known is None else {"known_classes": ", ".join(known) or "none"}),
            fix="one row for each scan, named as `medfusion inspect` does",
        )
    return {name: found.pop() for name, found in classes.items()}
