"""`medfusion errors tag, table, agree`: errors are looked at, tagged, and counted."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import lru_cache
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
    print_table,
    records,
    scans_of,
    tags_given,
)
from medfusion.errors import MedfusionError, some

if TYPE_CHECKING:
    import pandas as pd

    from medfusion.analysis.tag_store import TagStore
    from medfusion.io import Series

KEPT = 6  # cases whose pictures are held ready
Tags = Annotated[
    Path, typer.Argument(metavar="TAGS", help="A CSV file, or a folder of them: case, reviewer, tag, comment.")
]


def tag_command(
    cases: Cases,
    define: Define,
    store: Annotated[Path, typer.Option(help="SQLite file in which the tags are kept; made if it is not there.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the scans, named as the cases; none: look at them elsewhere.")
    ] = None,
    predictions: Annotated[Path | None, typer.Option(help="Folder of label maps that the system made.")] = None,
    truths: Annotated[Path | None, typer.Option(help="Folder of true label maps.")] = None,
    split: Split = None,
    correct: Annotated[int, typer.Option(min=0, help="Correct cases that are mixed in, blind.")] = 10,
    tag: Annotated[list[str] | None, typer.Option(help="To begin with; more can be made on the page.")] = None,
    import_csv: Annotated[
        Path | None, typer.Option("--import", metavar="CSV", help="Take in tags: case, reviewer, tag, comment.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0: any that is free.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the order and the correct cases.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Look at the errors and tag them, in a browser on this machine."""
    from medfusion.analysis.tag_store import TagStore
    from medfusion.report.tagging import Study, TaggingServer

    definition, judged = judged_cases(cases, define)
    judged = cases_to_see(judged, split)
    if images is None and (predictions or truths):
        raise typer.BadParameter("--predictions and --truths lie over --images")
    if not judged["error"].any():
        raise MedfusionError("there is no error to look at", cases=len(judged))
    shown = cases_to_look_at(judged, correct, seed)
    folders = {"scan": images, "prediction": predictions, "truth": truths}
    files = {
        name: scans_of(shown, folder, all_of_them=name == "scan")
        for name, folder in folders.items()
        if folder is not None
    }
    kept = TagStore(store, tag or [])
    if import_csv is not None:
        _take_in(kept, tags_given(import_csv, split, definition)[0], judged, import_csv)
    pictures = lru_cache(KEPT)(lambda case: _pictures({name: of[case] for name, of in files.items() if case in of}))
    title = f"{definition.name} {definition.hash}"
    try:
        server = TaggingServer(Study(title, definition.hash, shown, pictures, kept), port)
    except OSError as error:
        raise MedfusionError(f"--port {port}: cannot be used ({error.strerror})", fix="leave --port out") from error
    if as_json:
        told = {"address": server.address, "cases": len(shown), "store": str(store), "definition": definition.hash}
        typer.echo(json.dumps(told))  # a single line: whoever reads it knows when it is whole
    else:
        typer.echo(f"{len(shown)} cases to look at. Open this address on this machine, and keep it to yourself:")
        typer.echo(f"  {server.address}")
        typer.echo(f"Tags are kept in {store}. Ctrl-C ends it.")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def _take_in(store: TagStore, tags: pd.DataFrame, judged: pd.DataFrame, path: Path) -> None:
    """All of the tags, or none."""
    unknown = sorted(set(tags["case"]) - set(judged.index))
    if unknown:
        raise MedfusionError(f"{path}: tags of cases that are not among those to look at", cases=some(unknown))
    try:
        store.take_in(tags)
    except ValueError as error:
        raise MedfusionError(f"{path}: cannot be taken in", reason=error) from error


def cases_to_look_at(judged: pd.DataFrame, correct: int, seed: int) -> list[str]:
    """All errors and ``correct`` of the others, drawn at random, mixed so that nobody can tell which is which."""
    import numpy as np

    rng = np.random.default_rng(seed)
    wrong = judged.index[judged["error"]].to_numpy(str)
    right = judged.index[~judged["error"]].to_numpy(str)
    chosen = rng.choice(right, min(correct, len(right)), replace=False)
    return [str(name) for name in rng.permutation(np.concatenate([wrong, chosen]))]


def _pictures(series: dict[str, Series]) -> dict[str, bytes]:
    """What the viewer shows of a case: the scan, and where prediction and truth are not 0."""
    import numpy as np

    from medfusion.io import read
    from medfusion.report.viewer import block_affine, blocks, display_factors, nifti, scan_nifti

    pictures = {}
    for name, one in series.items():
        volume = read(one)
        factors = display_factors(volume)
        affine = block_affine(volume.affine, factors)
        if name == "scan":
            pictures[name] = scan_nifti(blocks(volume.array, factors, np.mean), affine)
        else:
            pictures[name] = nifti(blocks(volume.array > 0, factors, np.max), affine)
    return pictures


def table_command(
    cases: Cases,
    tags: Tags,
    define: Define,
    cost: Cost = None,
    error_rate: Annotated[
        float | None, typer.Option(help="Of the system, where CASES holds its errors alone; default: that of CASES.")
    ] = None,
    split: Split = None,
    as_json: AsJson = False,
) -> None:
    """What each kind of error costs, and how far the error falls if it is mended."""
    from medfusion.analysis.error_table import error_table
    from medfusion.analysis.tags import tag_matrix

    definition, judged = judged_cases(cases, define)
    given, cautions = tags_given(tags, split, definition)
    with about(tags):
        found = error_table(cases_to_see(judged, split), tag_matrix(given), costs_of(cost), error_rate)
    if as_json:
        told = asdict(found) | {"tags": records(found.tags), "warnings": [*found.warnings, *cautions]}
        print_json({"definition": definition.hash} | told)
        return
    from medfusion.report.errors import percent, tag_rows

    columns, rows = tag_rows(found)
    title = (
        f"{found.errors} errors in {found.cases} cases, {found.looked_at} looked at; error {percent(found.error_rate)}"
        f"  [{definition.name} {definition.hash}]"
    )
    print_table(title, "tag", columns, rows)
    for warning in (*found.warnings, *cautions):
        typer.echo(f"Caution  {warning}")


def agree_command(cases: Cases, tags: Tags, define: Define, split: Split = None, as_json: AsJson = False) -> None:
    """How two reviewers agree on each tag: Cohen's kappa, its interval over patients."""
    from medfusion.analysis.tags import agreement

    definition, judged = judged_cases(cases, define)
    given, _ = tags_given(tags, split, definition)
    with about(tags):
        found = agreement(given, cases_to_see(judged, split)["patient"])
    if as_json:
        told = {"reviewers": found.reviewers, "cases": found.cases, "tags": records(found.table)}
        print_json({"definition": definition.hash} | told)
        return
    rows = {
        tag: (*(f"{row[name]:.0f}" for name in ("both", "first", "second")), _kappa(row))
        for tag, row in found.table.iterrows()
    }
    title = f"Both looked at {found.cases} cases  [{definition.name} {definition.hash}]"
    print_table(title, "tag", ["both", *(name or "(no name)" for name in found.reviewers), "kappa"], rows)


def _kappa(row: pd.Series) -> str:
    return "" if math.isnan(row["kappa"]) else f"{row['kappa']:.2f} ({row['low']:.2f}\N{EN DASH}{row['high']:.2f})"
