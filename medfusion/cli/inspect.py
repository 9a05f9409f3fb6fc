"""`medfusion inspect`: what is in a folder, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medfusion.errors import MedfusionError
from medfusion.io import Series, discover, read


def inspect(path: Path, as_json: bool) -> int:
    """Print every scan under a path, with its geometry, intensities and problems; patient data are never printed.

    Every scan is read in full, so that a damaged one is found here and not in the middle of a long job.

    Returns
    -------
    int : 0 if every scan is usable, 1 if some are not, 2 if none is.

    Raises
    ------
    MedfusionError : there is no such path, or no scan under it.
    """
    import typer
    from rich.console import Console
    from rich.progress import track

    progress = Console(stderr=True)
    found = track(discover(path), "Reading", console=progress, transient=True, disable=not progress.is_terminal)
    rows = [_examine(series) for series in found]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    unusable = sum(bool(row["problems"]) for row in rows)
    return 0 if unusable == 0 else 2 if unusable == len(rows) else 1


def _examine(series: Series) -> dict[str, Any]:
    """One scan as a JSON object; lengths in millimetres, axes RAS."""
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import aff2axcodes

    row: dict[str, Any] = {
        "name": series.name,
        "kind": series.kind,
        "modality": series.modality,
        "shape": [int(length) for length in series.shape],
        "spacing": None,
        "orientation": None,
        "affine": None,
        "intensity_range": None,
        "files": len(series.files),
        "problems": list(series.problems),
    }
    if series.affine is not None:
        row["spacing"] = voxel_sizes(series.affine).tolist()
        row["orientation"] = "".join(aff2axcodes(series.affine))
        row["affine"] = series.affine.tolist()
    if series.usable:
        try:
            row["intensity_range"] = _intensity_range(series)
        except MedfusionError as error:
            facts = ", ".join(f"{name} {value}" for name, value in error.facts.items())
            row["problems"].append(f"{error.what} ({facts})" if facts else error.what)
    return row


def _intensity_range(series: Series) -> list[float]:
    """Lowest and highest value; of the first volume if the scan is 4D."""
    array = read(series, 0 if len(series.shape) == 4 else None).array
    return [array.min().item(), array.max().item()]


def _print_table(rows: list[dict[str, Any]]) -> None:
    """A table that fits 80 columns, every problem in full below it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("Name", "Format", "Shape", "Spacing mm", "Axes", "Intensity", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in rows:
        table.add_row(
            escape(row["name"]),
            escape(f"{row['modality']} {row['kind']}".strip()),
            "×".join(map(str, row["shape"])),
            "×".join(f"{length:.3g}" for length in row["spacing"] or []),
            row["orientation"],
            "see below" if row["problems"] else " to ".join(f"{value:.5g}" for value in row["intensity_range"]),
        )
    console.print(table)
    troubled = [row for row in rows if row["problems"]]
    if troubled:
        console.print(f"Problems in {len(troubled)} of {len(rows)}:", highlight=False)
    for row in troubled:
        for problem in row["problems"]:
            console.print(f"  {row['name']}: {problem}", markup=False, highlight=False, soft_wrap=True)
