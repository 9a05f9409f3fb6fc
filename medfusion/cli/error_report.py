"""`medfusion errors report`: the tables of an error analysis as CSV files, and the page that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from medfusion.errors import MedfusionError, some

if TYPE_CHECKING:
    from medfusion.analysis.definition import Definition
    from medfusion.report.page import Figure

PICTURES = 12  # of the worst errors


def write_error_report(
    definition: Definition,
    judged: pd.DataFrame,
    output: Path,
    *,
    tags: Path | None,
    costs: Mapping[str, float],
    parts: Path | None,
    split: Path | None,
    images: Path | None,
    truths: Path | None,
    overwrite: bool,
) -> None:
    """Write cases.csv, tags.csv, parts.csv, slices.csv, each where it was asked for, and report.html.

    Parameters
    ----------
    judged : the cases that may be looked at.
    parts : its cases that are sealed by ``split`` are left out.

    Raises
    ------
    MedfusionError : a file is there already, or a table cannot be used.
    """
    from medfusion.analysis.blackbox import read_log, read_split, refuse_blackbox, sealed_cases
    from medfusion.analysis.error_table import error_table
    from medfusion.analysis.parts import attribute, parts_from_table
    from medfusion.analysis.slices import find_slices
    from medfusion.analysis.tables import read_table
    from medfusion.analysis.tags import agreement, read_tags, tag_matrix
    from medfusion.report.errors import error_sections
    from medfusion.report.page import write_report

    if (output / "report.html").exists() and not overwrite:
        raise MedfusionError(f"{output}: holds a report already", fix="--overwrite replaces it")
    given = read_tags(tags) if tags else None
    if given is not None and split is not None:
        refuse_blackbox(read_split(split), given["case"])
    table = error_table(judged, tag_matrix(given), costs) if given is not None else None
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
    _write_tables(output, tables, definition.hash, overwrite)
    write_report(output / "report.html", "Error analysis", sections, subtitle=f"{definition.name} {definition.hash}")


def _write_tables(output: Path, tables: Mapping[str, pd.DataFrame | None], definition: str, overwrite: bool) -> None:
    """A CSV file of each, with the hash of the definition in every row."""
    from medfusion.io.output import staged

    for name, table in tables.items():
        if table is not None:
            with staged(output / f"{name}.csv", overwrite) as unfinished:
                table.assign(definition=definition).to_csv(unfinished)


def _pictures(judged: pd.DataFrame, images: Path, truths: Path | None) -> list[Figure]:
    """The worst errors, with the truth outlined."""
    from medfusion.io import discover, read
    from medfusion.report.figures import slice_figure
    from medfusion.report.page import Figure

    scans = {one.name: one for one in discover(images)}
    maps = {one.name: one for one in discover(truths)} if truths else {}
    worst = judged[judged["error"]].sort_values("loss", ascending=False, kind="stable").head(PICTURES)
    missing = [case for case in worst.index if case not in scans or (truths and case not in maps)]
    if missing:
        raise MedfusionError(
            f"errors without a file in {images}{f' or {truths}' if truths else ''}", cases=some(missing)
        )
    figures = []
    for case, row in worst.iterrows():
        scan = read(scans[str(case)])
        mask = (read(maps[str(case)]).array > 0).astype(np.uint8) if truths else None
        png = slice_figure(scan, mask=mask)
        caption = f"{case}: loss {row['loss']:.4g}"
        figures.append(Figure(png, f"Axial, coronal and sagittal slice. {caption}", caption))
    return figures
