"""The audit of a data folder before the first step: what the scans are, and which of them look wrong.

Remarks stop nothing: a scan of another scanner may be what the user wants. Only copies are left out, because one of a
pair among the held-out scans would flatter the validation.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from medfusion.config import Config, Strict
from medfusion.data.crops import Case
from medfusion.data.grid import SPACING_TOLERANCE
from medfusion.io import staged
from medfusion.volume import Volume

SPACING_OUTLIER = 1.5  # a voxel edge this many times longer or shorter than the median of all scans
INTENSITY_OUTLIER = 10.0  # a range this many times wider or narrower than the median: scanners differ by less
HOUNSFIELD = -200.0  # CT has air near -1000 as its first percentile, MR has nothing below about 0
NARROWEST = 1e-30  # of a range: most voxels of a scan may be the same
LISTED = 3  # different values of a property; more are given as a range


class Scan(Strict):
    """One scan as it was found; lengths along the axes right, anterior, superior.

    ``low`` and ``high`` are the 1st and 99th percentile in the scan's own units, ``prepared`` the shape after
    resampling, ``labels`` the values of its label map, ``digest`` the SHA-256 of its prepared voxels.
    """

    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str
    modality: str
    low: float
    high: float
    prepared: tuple[int, int, int]
    labels: tuple[int, ...]
    digest: str


class Remark(NamedTuple):
    """What is odd about one scan: the rule, and what was found."""

    scan: str
    rule: str
    found: str


def measure(volume: Volume, case: Case, labels: Volume | None) -> Scan:
    """What the audit needs to know of a scan, the Case it became, and its label map of whole numbers from 0."""
    axes = np.argsort(orientations.io_orientation(volume.affine)[:, 0])
    low, high = np.percentile(volume.array, (1, 99))
    return Scan(
        name=volume.name,
        shape=tuple(volume.shape[axis] for axis in axes),
        spacing=tuple(float(volume.spacing[axis]) for axis in axes),
        orientation=volume.orientation,
        modality=volume.modality,
        low=float(low),
        high=float(high),
        prepared=tuple(case.image.shape),
        labels=() if labels is None else tuple(np.flatnonzero(np.bincount(labels.array.ravel())).tolist()),
        digest=hashlib.sha256(case.image.numpy().tobytes()).hexdigest(),
    )


@dataclass(frozen=True)
class Audit:
    """All usable scans by name, the names of their classes (empty without), and the scans left out on demand."""

    scans: tuple[Scan, ...]
    config: Config
    classes: dict[str, str]
    excluded: tuple[str, ...] = ()

    @cached_property
    def copies(self) -> dict[str, str]:
        """Scans that repeat the voxels of an earlier one, and its name."""
        first: dict[str, str] = {}
        for scan in self.scans:
            first.setdefault(scan.digest, scan.name)
        return {scan.name: first[scan.digest] for scan in self.scans if first[scan.digest] != scan.name}

    @cached_property
    def properties(self) -> dict[str, str]:
        """The rows of the table: a property, and what there is of it, with the number of scans in brackets."""
        scans, target = self.scans, self.config.preprocessing.spacing
        edges = np.array([scan.spacing for scan in scans])
        fits = bool(np.all(abs(target / edges - 1) < SPACING_TOLERANCE))
        values = sorted({value for scan in scans for value in scan.labels})
        unlabelled = sum(not scan.labels for scan in scans)
        without = f"; {unlabelled} scan(s) without a label map" if unlabelled else ""
        rows = {
            "scans": f"{len(scans) - len(self.copies)}"
            + (", each whole and skull-stripped" if self.config.data.masks else ""),
            "left out": ", ".join(
                f"{number} {why}"
                for number, why in ((len(self.excluded), "by --exclude"), (len(self.copies), "copies"))
                if number
            ),
            "voxels R x A x S": _kinds(scan.shape for scan in scans),
            "spacing in mm": _kinds(scan.spacing for scan in scans)
            + ("" if fits else f"; all are resampled to {target:g}"),
            "orientation": _counts(scan.orientation for scan in scans),
            "modality": _counts(scan.modality or "not stated" for scan in scans),
            "1st percentile": _range([scan.low for scan in scans]),
            "99th percentile": _range([scan.high for scan in scans]),
            "label values": f"{len(values)}, from {values[0]} to {values[-1]}{without}" if values else "",
            "class": _counts(self.classes.values()),
        }
        return {name: value for name, value in rows.items() if value}

    @cached_property
    def remarks(self) -> tuple[Remark, ...]:
        """What looks wrong, rule by rule."""
        copies = [Remark(copy, "same voxels as another scan, left out", first) for copy, first in self.copies.items()]
        odd = [*_odd_spacing(self.scans), *_odd_intensity(self.scans, self.config.preprocessing.modality)]
        crop = self.config.data.crop
        rule = f"smaller than a crop of {crop} voxels, its edge is repeated"
        small = [Remark(scan.name, rule, _times(scan.prepared)) for scan in self.scans if min(scan.prepared) < crop]
        return (*copies, *odd, *small)

    def summary(self) -> dict[str, Any]:
        """The table and the remarks, for ``run.json``."""
        return {
            "properties": self.properties,
            "excluded": list(self.excluded),
            "remarks": [remark._asdict() for remark in self.remarks],
        }

    def save(self, path: Path) -> None:
        """Write a CSV file with a row for each scan."""
        head = "case shape spacing orientation modality percentile_1 percentile_99 prepared label_values class remarks"
        remarks: dict[str, list[str]] = {}
        for remark in self.remarks:
            remarks.setdefault(remark.scan, []).append(f"{remark.rule} ({remark.found})")
        with staged(path, overwrite=True) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(head.split())
            for scan in self.scans:
                size = (_times(scan.shape), _times(scan.spacing), scan.orientation, scan.modality)
                values = (f"{scan.low:.6g}", f"{scan.high:.6g}", _times(scan.prepared), len(scan.labels) or "")
                said = (self.classes.get(scan.name, ""), "; ".join(remarks.get(scan.name, ())))
                rows.writerow([scan.name, *size, *values, *said])


def _odd_spacing(scans: Sequence[Scan]) -> Iterator[Remark]:
    edges = np.array([scan.spacing for scan in scans])
    rule = f"spacing over {SPACING_OUTLIER:g} times off the median"
    for scan, off in zip(scans, _factor(edges, np.median(edges, axis=0)).max(axis=1), strict=True):
        if off > SPACING_OUTLIER:
            yield Remark(scan.name, rule, f"{_times(scan.spacing)} mm")


def _odd_intensity(scans: Sequence[Scan], modality: str) -> Iterator[Remark]:
    widths = np.array([max(scan.high - scan.low, NARROWEST) for scan in scans])
    rule = f"1st to 99th percentile over {INTENSITY_OUTLIER:g} times wider or narrower than the median"
    for scan, off in zip(scans, _factor(widths, np.median(widths)), strict=True):
        if off > INTENSITY_OUTLIER:
            yield Remark(scan.name, rule, _range([scan.low, scan.high]))
        if (scan.low < HOUNSFIELD) != (modality == "CT"):
            yield Remark(scan.name, f"1st to 99th percentile unlike {modality}", _range([scan.low, scan.high]))


def _factor(values: NDArray[np.float64], median: Any) -> NDArray[np.float64]:
    """How many times larger or smaller than the median."""
    return np.maximum(values / median, median / values)


def _times(lengths: Iterable[float]) -> str:
    return " x ".join(f"{length:.3g}" for length in lengths)


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.4g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _kinds(triples: Iterable[Sequence[float]]) -> str:
    """Each kind with its count, or where there are many the range along each axis."""
    chosen = list(triples)
    kinds = Counter(_times(triple) for triple in chosen)
    if len(kinds) <= LISTED:
        return _counts(kinds.elements())
    return f"{' x '.join(f'({_range(axis)})' for axis in zip(*chosen, strict=True))}, {len(kinds)} different"


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{value} ({number})" for value, number in Counter(values).most_common())
