"""Findings: the regions of a scan that are unlike healthy anatomy, as a table, a summary, and with anatomical names."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from medfusion.errors import MedfusionError
from medfusion.io.output import staged
from medfusion.volume import Volume

DIRECTIONS = ("brighter", "darker", "changed")
REACH_MM = 20.0  # a label further away says nothing about where a finding lies

_INDEX_COLUMNS = ("index", "value", "label")
_FREESURFER = re.compile(r"(\d+)\s+(\S.*?)(?:\s+\d+){4}")
_ITK_SNAP = re.compile(r'(\d+)(?:\s+\d+){3}\s+[\d.]+\s+[01]\s+[01]\s+"(.*)"')


@dataclass(frozen=True)
class Finding:
    """One connected region of a scan that is unlike healthy anatomy.

    Attributes
    ----------
    number : 1, 2, ...: the value of its voxels in a map of regions.
    x, y, z : world RAS millimetres of its peak, to 0.1.
    i, j, k : the voxel there, in the voxel order of the scan's file.
    volume_ml : millilitres, to 0.001.
    peak, mean : highest and mean anomaly score of its voxels.
    direction : "brighter" or "darker" than expected, or "changed" where it is neither (texture).
    p : probability of a region this heavy somewhere in a healthy scan.
    label : nearest anatomical label, "" where none was given or near.
    """

    number: int
    x: float
    y: float
    z: float
    i: int
    j: int
    k: int
    volume_ml: float
    peak: float
    mean: float
    direction: str
    p: float
    label: str = ""


_COLUMNS = [field.name for field in fields(Finding)]
_TYPES = {"int": int, "float": float, "str": str}


def write_findings(path: Path, findings: Sequence[Finding], overwrite: bool = False) -> None:
    """A CSV with one row for each finding, columns as in ``Finding``; only the header where nothing was found.

    Raises
    ------
    MedfusionError : all that ``staged`` raises.
    """
    with staged(path, overwrite) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        rows.writeheader()
        rows.writerows(asdict(finding) for finding in findings)


def read_findings(path: Path) -> list[Finding]:
    """The findings that ``write_findings`` wrote.

    Raises
    ------
    MedfusionError : the file cannot be read, has other columns, or a row of it is no finding.
    """
    lines = _lines(path)
    header, *rows = list(csv.reader(lines)) or [[]]
    if header != _COLUMNS:
        raise MedfusionError(
            f"{path.name}: not a table of findings",
            file=path,
            columns=",".join(header),
            expected=",".join(_COLUMNS),
            fix="give the findings.csv of a detection",
        )
    return [_finding(path, number, row) for number, row in enumerate(rows, start=2) if row]


def write_summary(
    path: Path, case: str, findings: Sequence[Finding], facts: Mapping[str, object], overwrite: bool = False
) -> None:
    """A JSON object: "case", then all ``facts``, then "findings", a list of objects with the fields of ``Finding``.

    Raises
    ------
    MedfusionError : all that ``staged`` raises.
    """
    content = {"case": case, **facts, "findings": [asdict(finding) for finding in findings]}
    with staged(path, overwrite) as beside:
        beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def name_findings(findings: Sequence[Finding], labels: Volume, names: Mapping[int, str]) -> list[Finding]:
    """The same findings with ``label`` set to the name of the nearest label that is not 0.

    Distance is from the finding's peak to the centres of the labelled voxels, in world millimetres, so ``labels`` may
    lie on any grid. A finding with none within 20 mm gets "", a label without a name its number.
    """
    return [replace(finding, label=_nearest(finding, labels, names)) for finding in findings]


def read_label_names(path: Path) -> dict[int, str]:
    """Names of a label map's values.

    Parameters
    ----------
    path : a table, separated by commas, semicolons or tabs, with a column "name" and a column "index", "value" or
        "label" (the first of these that is there); or a lookup table of FreeSurfer ("index name r g b a") or ITK-SNAP.

    Raises
    ------
    MedfusionError : the file cannot be read, or a line of it names no value, or another line names it otherwise.
    """
    lines = [(number, line.strip()) for number, line in enumerate(_lines(path), start=1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise MedfusionError(f"{path.name}: names no label", file=path, fix="give a table with columns index and name")
    names: dict[int, str] = {}
    for number, index, name in _name_rows(path, lines):
        if names.setdefault(index, name) != name:
            raise MedfusionError(
                f"{path.name}: line {number} names label {index} again",
                file=path,
                names=f"{names[index]}, {name}",
                fix="leave one of them",
            )
    return names


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise MedfusionError(f"{path.name}: the table cannot be read", file=path, reason=reason) from error


def _finding(path: Path, number: int, row: list[str]) -> Finding:
    try:
        values = {f.name: _TYPES[str(f.type)](value) for f, value in zip(fields(Finding), row, strict=True)}
        if values["direction"] not in DIRECTIONS:
            raise ValueError(f"direction is {values['direction']!r}, not one of {', '.join(DIRECTIONS)}")
    except ValueError as error:
        what = f"{path.name}: line {number} is no finding"
        raise MedfusionError(what, file=path, reason=error, fix="write the table again") from error
    return Finding(**values)


def _nearest(finding: Finding, labels: Volume, names: Mapping[int, str]) -> str:
    to_index = np.linalg.inv(labels.affine)
    peak = np.array([finding.x, finding.y, finding.z])
    centre = to_index[:3, :3] @ peak + to_index[:3, 3]
    reach = REACH_MM * np.linalg.norm(to_index[:3, :3], axis=1)  # half the box around a ball, in voxels
    low = np.clip(np.ceil(centre - reach), 0, labels.shape).astype(int)
    high = np.clip(np.floor(centre + reach) + 1, low, labels.shape).astype(int)
    box = labels.array[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    labelled = np.argwhere(box != 0)
    if not len(labelled):
        return ""
    distance = np.linalg.norm(labels.to_world(labelled + low) - peak, axis=1)
    nearest = distance.argmin()
    if distance[nearest] > REACH_MM:
        return ""
    value = int(box[tuple(labelled[nearest])])
    return names.get(value, str(value))


def _name_rows(path: Path, lines: Sequence[tuple[int, str]]) -> Iterable[tuple[int, int, str]]:
    """Line number, label and name of each row of a table or lookup table."""
    delimiter = max("\t,;", key=lines[0][1].count)
    header = [column.strip().lower() for column in next(csv.reader([lines[0][1]], delimiter=delimiter))]
    index_column = next((header.index(column) for column in _INDEX_COLUMNS if column in header), None)
    if index_column is None or "name" not in header:
        for number, line in lines:
            match = _ITK_SNAP.fullmatch(line) or _FREESURFER.fullmatch(line)
            if match is None:
                raise _no_name(path, number, line)
            yield number, int(match[1]), match[2]
        return
    for number, line in lines[1:]:
        row = next(csv.reader([line], delimiter=delimiter))
        try:
            yield number, int(row[index_column]), row[header.index("name")].strip()
        except (IndexError, ValueError) as error:
            raise _no_name(path, number, line) from error


def _no_name(path: Path, number: int, line: str) -> MedfusionError:
    return MedfusionError(
        f"{path.name}: line {number} names no label",
        file=path,
        line=line[:80],
        fix='give a table with columns index and name, or a lookup table with lines "index name r g b a"',
    )
