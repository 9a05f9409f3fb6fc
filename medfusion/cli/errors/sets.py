"""`medfusion errors sizes, split, refill, ask, overfit`: the eyeball set is looked at, the blackbox set is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medfusion.cli.errors.options import (
    AsJson,
    Cases,
    Define,
    SplitFolder,
    judged_cases,
    print_json,
    scans_of,
    tracked,
)
from medfusion.errors import MedfusionError, some

if TYPE_CHECKING:
    import pandas as pd

IDENTITIES = ("series_uid", "voxels")  # columns that --images adds


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
        definition, judged = judged_cases(cases, define)
        error_rate, measured_scans, measured_icc = _measured(judged)
        stated = {"definition": definition.hash}
        typer.echo(f"Measured on {cases}  [{definition.name} {definition.hash}]", err=as_json)
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
        print_json(asdict(plan) | stated)
        return
    typer.echo(
        f"Eyeball   {plan.eyeball} cases of {plan.eyeball_patients} patients show {plan.errors} errors or more with "
        f"{100 * plan.certainty:.4g} % certainty at {100 * plan.error_rate:.3g} % errors (errors over error rate: "
        f"{plan.naive}, too few half of the time)"
    )
    if plan.blackbox is not None and plan.difference is not None:
        typer.echo(
            f"Blackbox  {plan.blackbox} cases of {plan.blackbox_patients} patients show a change of "
            f"{100 * plan.difference:.3g} % with 80 % power"
        )
    if plan.design_effect > 1:
        typer.echo(f"          with a design effect of {plan.design_effect:.2f} for {scans:.3g} scans of each patient")
    if plan.available is not None:
        typer.echo(f"All {plan.available} cases show {plan.errors_seen} errors or more with as much certainty")
        if plan.eyeball_only:
            typer.echo("These are too few for both sets: look at all of them, and keep none back")


def _measured(judged: pd.DataFrame) -> tuple[float, float, float]:
    """Error rate, scans of each patient, and how alike their errors are."""
    from medfusion.analysis.sizes import intraclass_correlation

    error, patients = judged["error"].to_numpy(float), judged["patient"].to_numpy(str)
    if not 0 < error.sum() < len(error) or judged["patient"].nunique() < 2:
        raise MedfusionError(
            "the cases are too few to measure an error rate on",
            errors=f"{error.sum():.0f} of {len(error)} cases",
            patients=judged["patient"].nunique(),
            fix="state it: --error-rate",
        )
    return float(error.mean()), len(judged) / judged["patient"].nunique(), intraclass_correlation(error, patients)


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
    as_json: AsJson = False,
) -> None:
    """Divide the cases, by patient, into an eyeball set to look at and a blackbox set that nobody does."""
    from medfusion.analysis.definition import read_definition
    from medfusion.analysis.split import split_cases
    from medfusion.analysis.tables import read_cases
    from medfusion.io.output import require_writable

    definition = read_definition(define)
    if output.exists():
        raise MedfusionError(f"{output}: is there already", fix="a split is made once; choose another folder")
    require_writable(output)
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
    taken_here = {
        path: {"names": len(names), "in_table": len(known.intersection(names))} for path, names in lists.items()
    }
    if as_json:
        print_json(settings | {"parts": _counts(found.table), "taken": taken_here})
        return
    typer.echo(f"Split {output}  [{definition.name} {definition.hash}]")
    _print_counts(found.table)
    for path, of in taken_here.items():
        typer.echo(f"{path}: {of['in_table']} of {of['names']} names are in the table")
    if found.duplicates:
        typer.echo(f"The same scan, kept in one part: {some(' = '.join(names[:10]) for names in found.duplicates)}")
    if found.left_out:
        typer.echo(f"Left out, as their patients are in other sets: {some(found.left_out)}")


def _with_identities(table: pd.DataFrame, images: Path) -> pd.DataFrame:
    """The table with what tells scans in a folder apart."""
    from medfusion.data.identity import series_uid, voxel_hash

    scans = scans_of(table.index, images)
    found = [(series_uid(scans[case]), voxel_hash(scans[case])) for case in tracked(table.index, "Reading")]
    return table.assign(**dict(zip(IDENTITIES, zip(*found, strict=True), strict=True)))


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise MedfusionError(f"{path}: cannot be read", reason=error, fix="a case or patient a line") from error


def refill_command(
    split: SplitFolder,
    patients: Annotated[
        int, typer.Option(min=1, help="To move from the blackbox to the eyeball set, drawn at random.")
    ],
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Refill a worn-out eyeball set with patients of the blackbox set, for good; the log tells it."""
    from medfusion.analysis.blackbox import read_split, refilled

    after = refilled(read_split(split), patients, seed)
    settings = {"patients": patients, "seed": seed}
    _write_split(split, after, "refill", settings)
    if as_json:
        print_json(settings | {"parts": _counts(after)})
    else:
        _print_counts(after)


def _write_split(folder: Path, split: pd.DataFrame, kind: str, entry: Mapping[str, Any]) -> None:
    """Write a split. The log before the table takes its name: one that is not the last in the log is refused."""
    from medfusion.analysis.blackbox import SPLIT, append_to_log, render_split
    from medfusion.io.output import staged

    text, digest = render_split(split)
    folder.mkdir(parents=True, exist_ok=True)
    with staged(folder / SPLIT, overwrite=True) as unfinished:
        unfinished.write_bytes(text.encode())
        append_to_log(folder, kind, **entry, sha256=digest)


def _counts(split: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Cases and patients of each part."""
    from medfusion.analysis.split import PARTS

    parts = {part: split[split["part"] == part] for part in PARTS}
    return {part: {"cases": len(of), "patients": int(of["patient"].nunique())} for part, of in parts.items()}


def _print_counts(split: pd.DataFrame) -> None:
    for part, of in _counts(split).items():
        typer.echo(f"{part:<9} {of['cases']} cases of {of['patients']} patients")


def ask_command(
    split: SplitFolder,
    cases: Cases,
    define: Define,
    model: Annotated[str, typer.Option(help="Name and version of what is scored, for the log.")],
    as_json: AsJson = False,
) -> None:
    """Score a model on the blackbox set. Only the total is told, and the question is logged for good."""
    from medfusion.analysis.blackbox import ask, read_log

    definition, judged = judged_cases(cases, define)
    answer = ask(split, judged, model, definition.hash)
    before = {entry["definition"] for entry in read_log(split) if "definition" in entry} - {definition.hash}
    answer["other_definitions"] = sorted(before)
    if as_json:
        print_json(answer)
        return
    from medfusion.report.errors import percent

    rate = percent(answer["error_rate"], answer["low"], answer["high"])
    typer.echo(
        f"{model}  {rate}, {answer['errors']} errors in {answer['cases']} cases of {answer['patients']} patients"
    )
    typer.echo(f"This was question {answer['query']} to this blackbox set  [{definition.name} {definition.hash}]")
    if before:
        typer.echo(f"Caution  it was split or asked before by another definition of an error: {some(sorted(before))}")


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
    from medfusion.analysis.blackbox import ask, read_log, read_split
    from medfusion.analysis.overfit import overfit

    parts = read_split(split)
    definition, before = judged_cases(baseline, define)
    after = judged_cases(now, define)[1]
    missing = parts.index.difference(before.index.intersection(after.index))
    if len(missing):
        raise MedfusionError("cases of the split without a score at the baseline or now", cases=some(missing))
    eyeball, blackbox = (
        (before.loc[cases, "error"], after.loc[cases, "error"], parts.loc[cases, "patient"])
        for cases in (parts.index[parts["part"] == part] for part in ("eyeball", "blackbox"))
    )
    # what cannot be compared costs no question; another one may have come in between
    look = 1 + sum(entry["kind"] == "query" for entry in read_log(split))
    found = overfit(eyeball, blackbox, look=look, tolerance=tolerance)
    if (asked := ask(split, after, model, definition.hash)["query"]) != look:
        found = overfit(eyeball, blackbox, look=asked, tolerance=tolerance)
    if as_json:
        print_json(asdict(found) | {"definition": definition.hash})
        return
    from medfusion.report.errors import percent

    for name, change in (("Eyeball ", found.eyeball), ("Blackbox", found.blackbox)):
        typer.echo(f"{name}  error {percent(change.before)} -> {percent(change.now)}, {change.cases} cases")
    limits = f"{100 * found.low:.1f} to {100 * found.high:.1f}"
    typer.echo(
        f"Gap       {100 * found.gap:.1f} points, {limits} at look {found.look}; "
        f"detectable {100 * found.detectable:.1f}"
    )
    typer.echo(f"Verdict   {found.verdict}  [{definition.name} {definition.hash}]")
    if found.verdict == "overfit":
        typer.echo("The eyeball set is worn out. `medfusion errors refill` moves blackbox patients to it, for good.")
