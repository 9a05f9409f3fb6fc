"""`medfusion errors`: where a system fails and what mending it is worth. Tables in, tables out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medfusion.errors import MedfusionError, some

if TYPE_CHECKING:
    import pandas as pd

    from medfusion.analysis.definition import Definition

app = typer.Typer(help="Find where a system fails, and what mending it is worth: docs/errors.md.", no_args_is_help=True)

IDENTITIES = ("series_uid", "voxels")  # columns that --images adds
Define = Annotated[Path, typer.Option("--define", metavar="YAML", help="What a case is and which are errors.")]
Cases = Annotated[Path, typer.Argument(metavar="CASES", help="A CSV file with a row for each case and its scores.")]
SplitFolder = Annotated[Path, typer.Argument(metavar="SPLIT", help="The folder that `errors split` wrote.")]
Split = Annotated[
    Path | None, typer.Option("--split", metavar="SPLIT", help="Of `errors split`: blackbox cases are left out.")
]
AsJson = Annotated[bool, typer.Option("--json", help="A JSON object instead of text.")]


@app.command("sizes")
def sizes_command(
    errors: Annotated[int, typer.Option(help="That the eyeball set should show: 10 rough, 50 good, 100 very good.")],
    error_rate: Annotated[float | None, typer.Option(help="Of the system; default: measured on --cases.")] = None,
    difference: Annotated[
        float | None, typer.Option(help="Of the error rate, that the blackbox set should detect.")
    ] = None,
    discordant: Annotated[
        float | None, typer.Option(help="Share of cases on which two versions differ; default: as if independent.")
    ] = None,
    certainty: Annotated[float, typer.Option(help="With which the errors are seen.")] = 0.9,
    scans: Annotated[float | None, typer.Option(help="Of each patient; default: 1, or measured on --cases.")] = None,
    icc: Annotated[
        float | None, typer.Option(help="How alike the errors of a patient are, 0 to 1; default: 0, or measured.")
    ] = None,
    available: Annotated[int | None, typer.Option(help="Cases that there are for both sets.")] = None,
    cases: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Measure error rate, scans and their likeness on these cases.")
    ] = None,
    define: Annotated[Path | None, typer.Option(metavar="YAML", help="Which of --cases are errors.")] = None,
    as_json: AsJson = False,
) -> None:
    """How many cases the eyeball and the blackbox set need."""
    from medfusion.analysis.sizes import plan_sizes

    if (cases is None) != (define is None):
        raise typer.BadParameter("--cases and --define go together")
    if (cases is None) == (error_rate is None):
        raise typer.BadParameter("either --error-rate or --cases says how often the system errs")
    stated: dict[str, Any] = {}
    if cases is not None and define is not None:
        definition, judged = _judged(cases, define)
        error_rate, measured_scans, measured_icc = _measured(judged)
        stated = {"definition": definition.hash}
    else:
        measured_scans, measured_icc = 1.0, 0.0
    scans = measured_scans if scans is None else scans
    icc = measured_icc if icc is None else icc
    assert error_rate is not None
    plan = plan_sizes(
        error_rate,
        errors,
        difference=difference,
        discordant=discordant,
        certainty=certainty,
        scans=scans,
        icc=icc,
        available=available,
    )
    if as_json:
        _print_json(asdict(plan) | stated)
        return
    typer.echo(
        f"Eyeball   {plan.eyeball} cases of {plan.eyeball_patients} patients show {plan.errors} errors or more with "
        f"{plan.certainty:.0%} certainty at {plan.error_rate:.2%} errors ({plan.naive} would do so half of the time)"
    )
    if plan.blackbox is not None:
        typer.echo(
            f"Blackbox  {plan.blackbox} cases of {plan.blackbox_patients} patients show a change of "
            f"{plan.difference:.2%} with 80 % power"
        )
    if plan.design_effect > 1:
        typer.echo(f"          with a design effect of {plan.design_effect:.2f} for {scans:.3g} scans of each patient")
    if plan.available is not None:
        typer.echo(f"All {plan.available} cases show {plan.errors_seen} errors or more")
        if plan.eyeball_only:
            typer.echo("These are too few for both sets: look at all of them, and keep none back")


@app.command("split")
def split_command(
    cases: Cases,
    output: Annotated[Path, typer.Argument(metavar="SPLIT", help="Folder for the split; it must not be there.")],
    define: Define,
    eyeball: Annotated[int, typer.Option(help="Cases that it should have; patients are never divided.")],
    stratify: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Both parts should be alike in it; may be repeated.")
    ] = None,
    identity: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="The same where two cases show one scan, such as a UID; may be repeated."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the scans, named as the cases: equal UIDs and voxels are found.")
    ] = None,
    taken: Annotated[
        list[Path] | None,
        typer.Option(metavar="LIST", help="Text file, a case or patient a line, of a training or test set."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Divide the cases, by patient, into an eyeball set to look at and a blackbox set that nobody does."""
    from medfusion.analysis.definition import read_definition
    from medfusion.analysis.split import split_cases
    from medfusion.analysis.tables import read_cases

    definition = read_definition(define)
    if output.exists():
        raise MedfusionError(f"{output}: is there already", fix="a split is made once; choose another folder")
    table = read_cases(cases, definition.columns.case, definition.columns.patient)
    columns = list(identity or [])
    if images is not None:
        table, columns = _with_identities(table, images), [*columns, *IDENTITIES]
    lists = {str(path): _lines(path) for path in taken or ()}
    known = {*table.index, *table["patient"]}
    found = split_cases(
        table,
        eyeball,
        strata=stratify or (),
        identities=columns,
        taken=lists,
        seed=seed,
    )
    settings = {
        "definition": definition.hash,
        "cases": str(cases),
        "eyeball": eyeball,
        "strata": list(stratify or ()),
        "identities": columns,
        "seed": seed,
        "duplicates": found.duplicates,
        "left_out": found.left_out,
    }
    _write_split(output, found.table, "split", settings)
    for path, names in lists.items():
        typer.echo(f"{path}: {len(known.intersection(names))} of {len(names)} names are in the table")
    if found.duplicates:
        typer.echo(f"The same scan, kept in one part: {some(' = '.join(names) for names in found.duplicates)}")
    if found.left_out:
        typer.echo(f"Left out, as their patients are in other sets: {some(found.left_out)}")


@app.command("refill")
def refill_command(
    split: SplitFolder,
    patients: Annotated[int, typer.Option(help="To move from the blackbox to the eyeball set, drawn at random.")],
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Refill a worn-out eyeball set with patients of the blackbox set, for good; the log tells it."""
    from medfusion.analysis.blackbox import read_split, refilled

    before = read_split(split)
    after = refilled(before, patients, seed)
    _write_split(split, after, "refill", {"patients": patients, "seed": seed})


def _with_identities(table: pd.DataFrame, images: Path) -> pd.DataFrame:
    """The table with what tells scans in a folder apart."""
    from rich.console import Console
    from rich.progress import track

    from medfusion.data.identity import series_uid, voxel_hash
    from medfusion.io import discover

    series = {one.name: one for one in discover(images)}
    missing = table.index.difference(list(series))
    if len(missing):
        raise MedfusionError(f"cases without a scan in {images}", cases=some(missing), scans=some(series))
    progress = Console(stderr=True)
    found = {
        name: (series_uid(series[name]), voxel_hash(series[name]))
        for name in track(table.index, "Reading", console=progress, transient=True, disable=not progress.is_terminal)
    }
    return table.assign(**{column: [found[name][k] for name in table.index] for k, column in enumerate(IDENTITIES)})


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise MedfusionError(f"{path}: cannot be read", reason=error, fix="a case or patient a line") from error


def _write_split(folder: Path, split: pd.DataFrame, kind: str, entry: Mapping[str, Any]) -> None:
    """Write and show a split. The log first: a table that is not the last one in it is refused."""
    from medfusion.analysis.blackbox import SPLIT, append_to_log, render_split
    from medfusion.io.output import staged

    text, digest = render_split(split)
    folder.mkdir(parents=True, exist_ok=True)
    append_to_log(folder, kind, **entry, sha256=digest)
    with staged(folder / SPLIT, overwrite=True) as unfinished:
        unfinished.write_text(text)
    for part, of in split.groupby("part", sort=False):
        typer.echo(f"{part:<9} {len(of)} cases of {of['patient'].nunique()} patients")


@app.command("ask")
def ask_command(
    split: SplitFolder,
    cases: Cases,
    define: Define,
    model: Annotated[str, typer.Option(help="Name and version of what is scored, for the log.")],
    as_json: AsJson = False,
) -> None:
    """Score a model on the blackbox set. Only the total is told, and the question is logged for good."""
    from medfusion.analysis.blackbox import ask

    definition, judged = _judged(cases, define)
    answer = ask(split, judged, model, definition.hash)
    if as_json:
        _print_json(answer)
        return
    from medfusion.report.errors import percent

    rate = percent(answer["error_rate"], answer["low"], answer["high"])
    typer.echo(
        f"{model}  {rate}, {answer['errors']} errors in {answer['cases']} cases of {answer['patients']} patients"
    )
    typer.echo(f"This was question {answer['query']} to this blackbox set")


@app.command("tag")
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
) -> None:
    """Look at the errors and tag them, in a browser on this machine."""
    from medfusion.cli.tag import cases_to_look_at, tag_cases

    definition, judged = _judged(cases, define)
    judged = _eyeball(judged, split)
    if images is None and (predictions or truths):
        raise typer.BadParameter("--predictions and --truths lie over --images")
    if not judged["error"].any():
        raise MedfusionError("there is no error to look at", cases=len(judged))
    raise typer.Exit(
        tag_cases(
            cases_to_look_at(judged, correct, seed),
            images,
            predictions=predictions,
            truths=truths,
            store=store,
            tags=tag or [],
            import_csv=import_csv,
            title=f"{definition.name} {definition.hash}",
            port=port,
        )
    )


@app.command("table")
def table_command(
    cases: Cases,
    tags: Annotated[
        Path, typer.Argument(metavar="TAGS", help="A CSV file, or a folder of them: case, reviewer, tag, comment.")
    ],
    define: Define,
    cost: Annotated[
        list[str] | None, typer.Option(metavar="TAG=COST", help="Of mending it, in any unit; may be repeated.")
    ] = None,
    error_rate: Annotated[
        float | None, typer.Option(help="Of the system, where CASES holds its errors alone; default: that of CASES.")
    ] = None,
    split: Split = None,
    as_json: AsJson = False,
) -> None:
    """What each kind of error costs, and how far the error falls if it is mended."""
    from medfusion.analysis.error_table import error_table
    from medfusion.analysis.tags import read_tags, tag_matrix

    definition, judged = _judged(cases, define)
    given = tag_matrix(read_tags(tags))
    found = error_table(_eyeball(judged, split, given.index), given, _costs(cost or []), error_rate)
    if as_json:
        _print_json({"definition": definition.hash, **asdict(found), "tags": _records(found.tags)})
        return
    from medfusion.report.errors import percent, tag_rows

    columns, rows = tag_rows(found)
    title = (
        f"{found.errors} errors in {found.cases} cases, {found.looked_at} looked at; error {percent(found.error_rate)}"
        f"  [{definition.name} {definition.hash}]"
    )
    _print_table(title, "tag", columns, rows)
    for warning in found.warnings:
        typer.echo(f"Caution  {warning}")


@app.command("agree")
def agree_command(
    tags: Annotated[Path, typer.Argument(metavar="TAGS", help="A CSV file of two reviewers.")], as_json: AsJson = False
) -> None:
    """How two reviewers agree on each tag: Cohen's kappa."""
    from medfusion.analysis.tags import agreement, read_tags

    found = agreement(read_tags(tags))
    if as_json:
        _print_json({"tags": _records(found)})
        return
    first, second = found.columns[2:4]
    rows = {
        tag: (*(f"{row[name]:.0f}" for name in ("both", first, second)), _kappa(row)) for tag, row in found.iterrows()
    }
    cases = int(found["cases"].iloc[0]) if len(found) else 0
    _print_table(f"Both looked at {cases} cases", "tag", ["both", str(first), str(second), "kappa"], rows)


@app.command("overfit")
def overfit_command(
    split: SplitFolder,
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="CSV of all cases: the frozen baseline.")],
    now: Annotated[Path, typer.Argument(metavar="NOW", help="CSV of all cases: the system now.")],
    define: Define,
    model: Annotated[str, typer.Option(help="Name and version of what is scored now, for the log.")],
    tolerance: Annotated[float, typer.Option(help="Error rate: a smaller gap does not matter.")] = 0.02,
    as_json: AsJson = False,
) -> None:
    """Are we overfitting the eyeball set? Asks the blackbox set, which is logged."""
    from medfusion.analysis.blackbox import ask, read_split
    from medfusion.analysis.overfit import overfit

    parts = read_split(split)
    definition, before = _judged(baseline, define)
    after = _judged(now, define)[1]
    missing = parts.index.difference(before.index.intersection(after.index))
    if len(missing):
        raise MedfusionError("cases of the split without a score at the baseline or now", cases=some(missing))
    look = ask(split, after, model, definition.hash)["query"]
    eyeball, blackbox = (
        (before.loc[cases, "error"], after.loc[cases, "error"], parts.loc[cases, "patient"])
        for cases in (parts.index[parts["part"] == part] for part in ("eyeball", "blackbox"))
    )
    found = overfit(eyeball, blackbox, look=look, tolerance=tolerance)
    if as_json:
        _print_json(asdict(found) | {"definition": definition.hash})
        return
    from medfusion.report.errors import percent

    for name, change in (("Eyeball ", found.eyeball), ("Blackbox", found.blackbox)):
        typer.echo(f"{name}  error {percent(change.before)} -> {percent(change.now)}, {change.cases} cases")
    limits = f"{100 * found.low:.1f} to {100 * found.high:.1f}"
    typer.echo(
        f"Gap       {100 * found.gap:.1f} points, {limits} at look {look}; detectable {100 * found.detectable:.1f}"
    )
    typer.echo(f"Verdict   {found.verdict}")
    if found.verdict == "overfit":
        typer.echo("The eyeball set is worn out. `medfusion errors refill` moves blackbox patients to it, for good.")


@app.command("parts")
def parts_command(
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help="A CSV file with a row for each case and subset of components.")
    ],
    define: Define,
    component: Annotated[
        list[str] | None, typer.Option(help="One of them, in the order in which they work; may be repeated.")
    ] = None,
    loss: Annotated[bool, typer.Option("--loss", help="Share out the mean loss and not the error rate.")] = False,
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.9,
    split: Split = None,
    as_json: AsJson = False,
) -> None:
    """Which component is to blame: the system judged with every subset of its components made perfect."""
    from medfusion.analysis.blackbox import sealed_cases
    from medfusion.analysis.definition import read_definition
    from medfusion.analysis.parts import attribute, parts_from_table
    from medfusion.analysis.tables import read_table

    definition = read_definition(define)
    sealed = sealed_cases(split) if split else ()
    parts = parts_from_table(read_table(table), definition, component or (), sealed)
    found = attribute(parts, "loss" if loss else "error", level)
    if as_json:
        _print_json({"definition": definition.hash, **asdict(found), "table": _records(found.table)})
        return
    from medfusion.report.errors import part_lines, part_rows

    first, *more = part_lines(found)
    _print_table(f"{first}  [{definition.name} {definition.hash}]", "component", *part_rows(found))
    for line in more:
        typer.echo(line)


@app.command("run")
def run_command(
    system: Annotated[Path, typer.Argument(metavar="SYSTEM", help="A Python file: docs/errors.md shows one.")],
    output: Annotated[Path, typer.Argument(metavar="TABLE", help="CSV file for `errors parts`.")],
    resume: Annotated[bool, typer.Option("--resume", help="Keep the cases that TABLE has, do the rest.")] = False,
) -> None:
    """Run a system with every subset of its components made perfect. Each case is written when it is done."""
    import csv

    from rich.console import Console
    from rich.progress import track

    from medfusion.analysis.system import list_cases, load_system, run_case

    if output.exists() and not resume:
        raise MedfusionError(f"{output}: is there already", fix="--resume does the cases that it lacks")
    loaded = load_system(system)
    done, columns = _whole_cases(output, 2 ** len(loaded.names)) if output.exists() else (set(), None)
    cases = [case for case in list_cases(loaded) if case.name not in done]
    progress = Console(stderr=True)
    for case in track(cases, "Running", console=progress, transient=True, disable=not progress.is_terminal):
        rows = list(run_case(loaded, case))
        if columns is not None and list(rows[0]) != columns:
            raise MedfusionError(
                f"{output}: other columns than `score` returns", columns=some(columns), now=some(rows[0])
            )
        with output.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if columns is None:
                writer.writeheader()
            writer.writerows(rows)
        columns = list(rows[0])
    typer.echo(f"{output}: {len(cases)} cases with {2 ** len(loaded.names)} subsets of {', '.join(loaded.names)}")


def _whole_cases(output: Path, subsets: int) -> tuple[set[str], list[str]]:
    """The cases of a table that have all subsets, and its columns; what a killed run left of another is dropped."""
    from medfusion.analysis.tables import check_columns, read_table
    from medfusion.io.output import staged

    table = read_table(output)
    check_columns(table, {"case", "fixed"})
    whole = table.groupby("case")["fixed"].transform("nunique") == subsets
    if len(table) and not output.read_bytes().endswith(b"\n"):
        whole &= table["case"] != table["case"].iloc[-1]  # its last line may lack a digit
    with staged(output, overwrite=True) as unfinished:
        table[whole].to_csv(unfinished, index=False)
    return set(table.loc[whole, "case"]), list(table.columns)


@app.command("slices")
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

    definition, judged = _judged(cases, define)
    known = _eyeball(judged, split).drop(columns=list(definition.error.columns))
    found = find_slices(known, column or (), depth=depth, seed=seed)
    if as_json:
        _print_json({"definition": definition.hash, **asdict(found), "table": _records(found.table)})
        return
    from medfusion.report.errors import slice_rows

    title = f"{found.kept_back} cases that were kept back  [{definition.name} {definition.hash}]"
    _print_table(title, "slice", *slice_rows(found))
    if found.left_out:
        typer.echo(f"Not used: {', '.join(found.left_out)} (the same everywhere, or too many names)")


@app.command("report")
def report_command(
    cases: Cases,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for report.html and a CSV file of each table.")],
    define: Define,
    tags: Annotated[Path | None, typer.Option(help="CSV file of tags: a table of kinds, and agreement of two.")] = None,
    cost: Annotated[list[str] | None, typer.Option(metavar="TAG=COST", help="As for `errors table`.")] = None,
    parts: Annotated[Path | None, typer.Option(help="CSV file of `errors run`: which component is to blame.")] = None,
    split: Split = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the scans: pictures of the worst errors.")] = None,
    truths: Annotated[Path | None, typer.Option(help="Folder of true label maps, outlined in the pictures.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """All of it in one offline page, with the tables as CSV files beside it."""
    from medfusion.cli.error_report import write_error_report

    definition, judged = _judged(cases, define)
    write_error_report(
        definition,
        _eyeball(judged, split),
        output,
        tags=tags,
        costs=_costs(cost or []),
        parts=parts,
        split=split,
        images=images,
        truths=truths,
        overwrite=overwrite,
    )
    typer.echo(f"Report: {output / 'report.html'}")


def _eyeball(judged: pd.DataFrame, split: Path | None, looked_at: Iterable[str] = ()) -> pd.DataFrame:
    """The cases that may be looked at; all where there is no split.

    Raises
    ------
    MedfusionError : one of the cases ``looked_at`` should not have been.
    """
    if split is None:
        return judged
    from medfusion.analysis.blackbox import read_split, refuse_blackbox, sealed_cases

    refuse_blackbox(read_split(split), looked_at)
    sealed = judged.index.isin(sealed_cases(split))
    if sealed.any():
        typer.echo(f"{sealed.sum()} blackbox cases stay sealed", err=True)
    return judged[~sealed]


def _judged(cases: Path, define: Path) -> tuple[Definition, pd.DataFrame]:
    """A definition, and a table of cases judged by it."""
    from medfusion.analysis.definition import judge, read_definition
    from medfusion.analysis.tables import read_cases

    definition = read_definition(define)
    table = read_cases(cases, definition.columns.case, definition.columns.patient)
    try:
        return definition, judge(table, definition)
    except MedfusionError as error:
        raise MedfusionError(f"{cases}: {error.what}", fix=error.fix, **error.facts) from error


def _measured(judged: pd.DataFrame) -> tuple[float, float, float]:
    """Error rate, scans of each patient, and how alike their errors are."""
    from medfusion.analysis.sizes import intraclass_correlation

    error, patients = judged["error"].to_numpy(float), judged["patient"].to_numpy(str)
    return float(error.mean()), len(judged) / judged["patient"].nunique(), intraclass_correlation(error, patients)


def _costs(stated: list[str]) -> dict[str, float]:
    costs = {}
    for each in stated:
        tag, separator, value = each.rpartition("=")
        try:
            costs[tag] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise MedfusionError(f"--cost {each}: not of the form TAG=COST", fix='e.g. --cost "noisy image=3"')
    return costs


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): cell for name, cell in row.items()} for row in table.reset_index().to_dict("records")]


def _print_json(answer: Mapping[str, Any]) -> None:
    """On standard output; what is not a number is null."""
    typer.echo(json.dumps(_finite(answer), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _kappa(row: pd.Series) -> str:
    return "" if math.isnan(row["kappa"]) else f"{row['kappa']:.2f} ({row['low']:.2f}\N{EN DASH}{row['high']:.2f})"


def _print_table(title: str, name: str, columns: list[str], rows: Mapping[Any, tuple[str, ...]]) -> None:
    """As narrow as it can be: shares are in % without saying so in each cell, intervals stand below."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(name, overflow="fold", min_width=min(14, max(map(len, map(str, rows)), default=0)))
    bare = {
        key: [cell.replace(" %", "").replace(" (", "\n").removesuffix(")") for cell in cells]
        for key, cells in rows.items()
    }
    for place, column in enumerate(columns):
        header = f"{column} (%)" if any("%" in cells[place] for cells in rows.values()) else column
        words = [*header.split(), *(line for cells in bare.values() for line in cells[place].splitlines())]
        table.add_column(header, justify="right", min_width=max(map(len, words)))
    for key, cells in bare.items():
        table.add_row(escape(str(key)), *map(escape, cells))
    console = Console()
    console.width = max(console.width, 96)  # a narrower one would leave the last columns out
    console.print(table)
