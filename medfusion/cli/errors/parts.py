"""`medfusion errors run, parts`: which component of a system is to blame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from medfusion.cli.errors.options import AsJson, Define, Split, about, print_json, print_table, records, tracked
from medfusion.errors import MedfusionError, some


def run_command(
    system: Annotated[Path, typer.Argument(metavar="SYSTEM", help="A Python file: docs/errors.md shows one.")],
    output: Annotated[Path, typer.Argument(metavar="TABLE", help="CSV file for `errors parts`.")],
    resume: Annotated[bool, typer.Option("--resume", help="Keep the cases that TABLE has, do the rest.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a system with every subset of its components made perfect. Each case is written when it is done."""
    import csv

    from medfusion.analysis.system import list_cases, load_system, run_case
    from medfusion.io.output import require_writable

    if output.exists() and not resume:
        raise MedfusionError(f"{output}: is there already", fix="--resume does the cases that it lacks")
    require_writable(output.parent)
    loaded = load_system(system)
    done, columns = _whole_cases(output, loaded.names) if output.exists() else (set(), None)
    cases = [case for case in list_cases(loaded) if str(case.name) not in done]
    output.parent.mkdir(parents=True, exist_ok=True)
    for case in tracked(cases, "Running"):
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
    if as_json:
        print_json({"table": str(output), "components": loaded.names, "cases": len(cases), "kept": len(done)})
    else:
        typer.echo(f"{output}: {len(cases)} cases with {2 ** len(loaded.names)} subsets of {', '.join(loaded.names)}")


def _whole_cases(output: Path, components: Sequence[str]) -> tuple[set[str], list[str]]:
    """The cases of a table and its columns; what a killed run left of the last case is dropped.

    Raises
    ------
    MedfusionError : the table was not made with these components; it stays as it is.
    """
    from medfusion.analysis.parts import subset_name
    from medfusion.analysis.tables import check_columns, read_table
    from medfusion.io.output import staged

    table = read_table(output)
    with about(output):
        check_columns(table, {"case", "patient", "fixed"})
    subsets = {subset_name(number, components) for number in range(2 ** len(components))}
    strange = set(table["fixed"].iloc[:-1]) - subsets  # the very last row may be cut short
    last = table["case"] == (table["case"].iloc[-1] if len(table) else "")
    made_of = table.groupby("case")["fixed"].agg(frozenset)
    cut_short = bool(len(table)) and (
        set(table.loc[last, "fixed"]) != subsets or not output.read_bytes().endswith(b"\n")
    )
    whole = table[~last] if cut_short else table
    if strange or any(made_of[case] != subsets for case in whole["case"].unique()):
        raise MedfusionError(
            f"{output}: was made with other components than {', '.join(components)}", fix="name another table"
        )
    if cut_short:
        with staged(output, overwrite=True) as unfinished:
            whole.to_csv(unfinished, index=False)
    return set(whole["case"]), list(table.columns)


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
    from medfusion.analysis.blackbox import eyeball_cases, read_split
    from medfusion.analysis.definition import read_definition
    from medfusion.analysis.parts import attribute, parts_from_table
    from medfusion.analysis.tables import read_table

    definition = read_definition(define)
    only = eyeball_cases(read_split(split)) if split else None
    with about(table):
        parts = parts_from_table(read_table(table), definition, component or (), only)
    found = attribute(parts, "loss" if loss else "error", level)
    if as_json:
        print_json({"definition": definition.hash, **asdict(found), "table": records(found.table)})
        return
    from medfusion.report.errors import part_lines, part_rows

    first, *more = part_lines(found)
    print_table(f"{first}  [{definition.name} {definition.hash}]", "component", *part_rows(found))
    for line in more:
        typer.echo(line)
