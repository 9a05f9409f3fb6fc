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
    about,
    cases_to_see,
    costs_of,
    judged_cases,
    print_json,
    refuse_existing,
    scans_of,
    tags_given,
)
from medfusion.errors import MedfusionError

if TYPE_CHECKING:
    import pandas as pd

    from medfusion.report.page import Figure

TABLES = "tables"  # the folder of the CSV files
PICTURES = 12  # of the worst errors


def report_command(
    cases: Cases,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for report.html, and tables/ with a CSV file of each.")
    ],
    define: Define,
    tags: Annotated[
        Path | None, typer.Option(help="As for `errors table`: kinds of errors, and agreement of two reviewers.")
    ] = None,
    cost: Cost = None,
    parts: Annotated[Path | None, typer.Option(help="CSV file of `errors run`: which component is to blame.")] = None,
    split: Split = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the scans: pictures of the worst errors.")] = None,
    truths: Annotated[Path | None, typer.Option(help="Folder of true label maps, outlined in the pictures.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """All of it in one offline page, with the tables as CSV files beside it."""
    from medfusion.analysis.blackbox import eyeball_cases, read_log, read_split
    from medfusion.analysis.error_table import error_table
    from medfusion.analysis.parts import attribute, parts_from_table
    from medfusion.analysis.slices import find_slices
    from medfusion.analysis.tables import read_table
    from medfusion.analysis.tags import agreement, tag_matrix
    from medfusion.report.errors import error_sections
    from medfusion.report.page import write_report

    page = output / "report.html"
    refuse_existing(page, overwrite)
    if (output / TABLES).exists() and not page.exists():
        raise MedfusionError(f"{output / TABLES}: is there already, and is of no report", fix="choose another folder")
    definition, judged = judged_cases(cases, define)
    judged = cases_to_see(judged, split)
    table = agree = blamed = slices = None
    remarks: list[str] = []
    if tags:
        given, remarks = tags_given(tags, split, definition)
        with about(tags):
            table = error_table(judged, tag_matrix(given), costs_of(cost))
            if (reviewers := given["reviewer"].nunique()) == 2:
                agree = agreement(given, judged["patient"])
            elif reviewers > 2:
                remarks.append(f"No agreement: it is of two reviewers, and there are {reviewers}")
    if parts:
        with about(parts):
            only = eyeball_cases(read_split(split)) if split else None
            blamed = attribute(parts_from_table(read_table(parts), definition, only=only))
    try:
        slices = find_slices(judged.drop(columns=list(definition.results)))
        remarks += slices.cautions
    except MedfusionError as error:
        remarks.append(f"No slices: {error.what}")
    sections = error_sections(
        definition,
        judged,
        tags=table,
        agreement=agree,
        parts=blamed,
        slices=slices,
        remarks=[f"{remark}." for remark in remarks],
        log=read_log(split) if split else (),
        pictures=_pictures(judged, images, truths) if images else (),
    )
    tables = {
        "cases": judged,
        "tags": table.tags if table else None,
        "agreement": agree.table if agree else None,
        "parts": blamed.table if blamed else None,
        "slices": slices.table.set_index("slice") if slices else None,
    }
    written = {name: each for name, each in tables.items() if each is not None}
    _write_tables(output / TABLES, written, definition.hash)
    write_report(page, "Error analysis", sections, subtitle=f"{definition.name} {definition.hash}")
    if as_json:
        print_json(
            {
                "definition": definition.hash,
                "report": str(page),
                "tables": [str(output / TABLES / f"{name}.csv") for name in written],
            }
        )
    else:
        typer.echo(f"Report: {page}")


def _write_tables(folder: Path, tables: Mapping[str, pd.DataFrame], definition: str) -> None:
    """A CSV file of each in a new folder, with the hash of the definition in every row."""
    from medfusion.io.output import staged

    with staged(folder, overwrite=True) as unfinished:
        unfinished.mkdir()
        for name, table in tables.items():
            table.assign(definition=definition).to_csv(unfinished / f"{name}.csv")


def _pictures(judged: pd.DataFrame, images: Path, truths: Path | None) -> list[Figure]:
    """The worst errors, with the truth outlined."""
    import numpy as np

    from medfusion.io import read
    from medfusion.report.figures import slice_figure
    from medfusion.report.page import Figure

    worst = judged[judged["error"]].sort_values("loss", ascending=False, kind="stable").head(PICTURES)
    scans, maps = scans_of(worst.index, images), scans_of(worst.index, truths, all_of_them=False) if truths else {}
    figures = []
    for case, loss in worst["loss"].items():
        mask = (read(maps[str(case)]).array > 0).astype(np.uint8) if case in maps else None
        png = slice_figure(read(scans[str(case)]), mask=mask)
        caption = f"{case}: loss {loss:.4g}"
        figures.append(Figure(png, f"Axial, coronal and sagittal slice. {caption}", caption))
    return figures
