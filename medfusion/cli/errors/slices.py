"""`medfusion errors measure, slices`: what is known of each scan, and where the errors are."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfusion.cli.errors.options import (
    AsJson,
    Cases,
    Define,
    Split,
    cases_to_see,
    judged_cases,
    print_json,
    print_table,
    records,
    refuse_existing,
    scans_of,
    tracked,
)
from medfusion.errors import MedfusionError, some

if TYPE_CHECKING:
    from medfusion.volume import Volume


def measure_command(
    cases: Cases,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="CSV file: CASES with more columns.")],
    define: Define,
    images: Annotated[Path, typer.Option(help="Folder of the scans, named as the cases.")],
    truths: Annotated[Path | None, typer.Option(help="Folder of true label maps: adds their size, truth_ml.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Add what can be measured of each scan: scanner, voxel size, noise, blur; for `errors slices` and `split`."""
    import pandas as pd

    from medfusion.analysis.definition import read_definition
    from medfusion.analysis.tables import read_cases, read_table
    from medfusion.data.quality import PROPERTIES, scan_properties
    from medfusion.io import read
    from medfusion.io.output import staged

    refuse_existing(output, overwrite)
    definition = read_definition(define)
    names = list(read_cases(cases, definition.columns.case, definition.columns.patient).index)
    table, columns = read_table(cases), [*PROPERTIES, *(["truth_ml"] if truths else [])]
    if both := table.columns.intersection(columns).tolist():
        raise MedfusionError(f"{cases}: has columns that would be measured", columns=some(both), fix="rename them")
    scans, maps = scans_of(names, images), scans_of(names, truths, all_of_them=False) if truths else {}
    measured = pd.DataFrame([scan_properties(scans[case]) for case in tracked(names, "Measuring")])
    if truths:
        measured["truth_ml"] = [_volume_ml(read(maps[case])) if case in maps else math.nan for case in names]
    with staged(output, overwrite=True) as unfinished:
        table.join(measured).to_csv(unfinished, index=False)
    if as_json:
        print_json({"table": str(output), "cases": len(table), "columns": columns})
    else:
        typer.echo(f"{output}: {len(table)} cases, with {', '.join(columns)}")


def _volume_ml(labels: Volume) -> float:
    """Of all that is not 0 in a label map."""
    import numpy as np

    return float(np.count_nonzero(labels.array)) * labels.voxel_ml


def slices_command(
    cases: Cases,
    define: Define,
    column: Annotated[
        list[str] | None, typer.Option(help="What may tell cases apart; default: all but the scores; may be repeated.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, max=5, help="Conditions that a slice has at most.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the two halves.")] = 0,
    split: Split = None,
    as_json: AsJson = False,
) -> None:
    """Where the error concentrates: found on one half of the patients, confirmed on the other."""
    from medfusion.analysis.slices import find_slices

    definition, judged = judged_cases(cases, define)
    known = cases_to_see(judged, split).drop(columns=list(definition.results))
    found = find_slices(known, column or (), depth=depth, seed=seed)
    if as_json:
        print_json({"definition": definition.hash, **asdict(found), "table": records(found.table.set_index("slice"))})
        return
    from medfusion.report.errors import slice_rows

    title = f"{found.kept_back} cases that were kept back  [{definition.name} {definition.hash}]"
    print_table(title, "slice", *slice_rows(found))
    if found.left_out:
        typer.echo(f"Not used: {', '.join(found.left_out)} (the same everywhere, or too many different texts)")
    for caution in found.cautions:
        typer.echo(f"Caution  {caution}")
