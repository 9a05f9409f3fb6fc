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
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("Name", "Kind", "Modality", "Shape", "Spacing mm", "Axes", "Intensity", "Problems")
    table.columns[0].overflow = "fold"
    for row in rows:
        table.add_row(
            escape(row["name"]),
            row["kind"],
            escape(row["modality"]),
            " x ".join(map(str, row["shape"])),
            " x ".join(f"{length:.4g}" for length in row["spacing"] or []),
            row["orientation"],
            " to ".join(f"{value:.5g}" for value in row["intensity_range"] or []),
            str(len(row["problems"]) or ""),
        )
    console.print(table)
    for row in rows:
        for problem in row["problems"]:
            console.print(f"{row['name']}: {problem}", markup=False, highlight=False, soft_wrap=True)
