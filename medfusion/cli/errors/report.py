"""`medfusion errors report`: all tables as CSV files, and the page that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfusion.cli.errors.options import (
    AsJson,
    Cases,
    Cost,
    Define,
    Split,
    costs_of,
    eyeball_cases,
    judged_cases,
    print_json,
    scans_of,
)
from medfusion.errors import MedfusionError

if TYPE_CHECKING:
    import pandas as pd

    from medfusion.report.page import Figure

PICTURES = 12  # of the worst errors


def report_command(
    cases: Cases,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for report.html and a CSV file of each table.")],
    define: Define,
    tags: Annotated[Path | None, typer.Option(help="CSV file of tags: a table of kinds, and agreement of two.")] = None,
    cost: Cost = None,
    parts: Annotated[Path | None, typer.Option(help="CSV file of `errors run`: which component is to blame.")] = None,
    split: Split = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the scans: pictures of the worst errors.")] = None,
    truths: Annotated[Path | None, typer.Option(help="Folder of true label maps, outlined in the pictures.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """All of it in one offline page, with the tables as CSV files beside it."""
    from medfusion.analysis.blackbox import read_log, read_split, refuse_blackbox, sealed_cases
    from medfusion.analysis.error_table import error_table
    from medfusion.analysis.parts import attribute, parts_from_table
    from medfusion.analysis.slices import find_slices
    from medfusion.analysis.tables import read_table
    from medfusion.analysis.tags import agreement, read_tags, tag_matrix
    from medfusion.report.errors import error_sections
    from medfusion.report.page import write_report

    page = output / "report.html"
    if page.exists() and not overwrite:
        raise MedfusionError(f"{output}: holds a report already", fix="--overwrite replaces it")
    definition, judged = judged_cases(cases, define)
    judged = eyeball_cases(judged, split)
    given = read_tags(tags) if tags else None
    if given is not None and split is not None:
        refuse_blackbox(read_split(split), given["case"])
    table = error_table(judged, tag_matrix(given), costs_of(cost)) if given is not None else None
    agree = agreement(given, judged["patient"]) if given is not None and given["reviewer"].nunique() == 2 else None
    sealed = sealed_cases(split) if split else ()
    blamed = attribute(parts_from_table(read_table(parts), definition, without=sealed)) if parts else None
    why = ""
    try:
        slices = find_slices(judged.drop(columns=list(definition.error.columns)))
    except MedfusionError as error:
        slices, why = None, error.what
    sections = error_sections(
        definition,
        judged,
        tags=table,
        agreement=agree,
        parts=blamed,
        slices=slices,
        remarks=[] if slices else [f"No slices: {why}."],
        log=read_log(split) if split else (),
        pictures=_pictures(judged, images, truths) if images else (),
    )
    tables = {
        "cases": judged,
        "tags": table.tags if table else None,
        "agreement": agree,
        "parts": blamed.table if blamed else None,
        "slices": slices.table.set_index("slice") if slices else None,
    }
    written = {name: each for name, each in tables.items() if each is not None}
    _write_tables(output, written, definition.hash, overwrite)
    write_report(page, "Error analysis", sections, subtitle=f"{definition.name} {definition.hash}")
    if as_json:
        print_json({"definition": definition.hash, "report": str(page), "tables": [f"{name}.csv" for name in written]})
    else:
        typer.echo(f"Report: {page}")


def _write_tables(output: Path, tables: Mapping[str, pd.DataFrame], definition: str, overwrite: bool) -> None:
    """A CSV file of each, with the hash of the definition in every row."""
    from medfusion.io.output import staged

    for name, table in tables.items():
        with staged(output / f"{name}.csv", overwrite) as unfinished:
            table.assign(definition=definition).to_csv(unfinished)


def _pictures(judged: pd.DataFrame, images: Path, truths: Path | None) -> list[Figure]:
    """The worst errors, with the truth outlined."""
    import numpy as np

    from medfusion.io import read
    from medfusion.report.figures import slice_figure
    from medfusion.report.page import Figure

    worst = judged[judged["error"]].sort_values("loss", ascending=False, kind="stable").head(PICTURES)
    scans, maps = scans_of(worst.index, images), scans_of(worst.index, truths) if truths else {}
    figures = []
    for case, loss in worst["loss"].items():
        mask = (read(maps[str(case)]).array > 0).astype(np.uint8) if truths else None
        png = slice_figure(read(scans[str(case)]), mask=mask)
        caption = f"{case}: loss {loss:.4g}"
        figures.append(Figure(png, f"Axial, coronal and sagittal slice. {caption}", caption))
    return figures
