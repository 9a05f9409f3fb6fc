"""The table that tells the class of each scan."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from medfusion.config import Config
from medfusion.errors import MedfusionError
from medfusion.io.companions import some


def read_classes(path: Path, names: Sequence[str], config: Config) -> dict[str, int]:
    """The table ``data.classes``: name of each scan to the index of its class in ``network.classes``.

    Raises
    ------
    MedfusionError : the table cannot be read, lacks a column or a scan, or has an unknown class or two for one scan.
    """
    known = config.network.classes
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins its UTF-8 with a mark
            rows = csv.DictReader(file)
            if not {"case", "class"} <= set(rows.fieldnames or ()):
                raise MedfusionError(
                    f"data.classes: {path} lacks a column",
                    columns=", ".join(rows.fieldnames or ()),
                    fix="the first line is: case,class",
                )
            stated = defaultdict(set)
            for row in rows:
                stated[row["case"]].add(row["class"])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MedfusionError(f"data.classes: {path} cannot be read", reason=error) from error
    classes = {name: stated.get(name, set()) for name in names}
    facts = {
        "scans_without_a_row": some(name for name, found in classes.items() if not found),
        "scans_of_two_classes": some(name for name, found in classes.items() if len(found) > 1),
        "unknown_classes": some(sorted({str(one) for found in classes.values() for one in found} - set(known))),
    }
    if any(facts.values()):
        raise MedfusionError(
            f"data.classes: {path} does not fit the scans and network.classes",
            **{name: value for name, value in facts.items() if value},
            known_classes=", ".join(known),
            fix="one row for each scan, named as `medfusion inspect` does",
        )
    return {name: known.index(found.pop()) for name, found in classes.items()}
