"""What the commands of `medfusion errors` share: their options, how they read cases, how they print."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from medfusion.errors import MedfusionError, some

if TYPE_CHECKING:
    import pandas as pd

    from medfusion.analysis.definition import Definition
    from medfusion.io import Series

Define = Annotated[Path, typer.Option("--define", metavar="YAML", help="What a case is and which are errors.")]
Cases = Annotated[Path, typer.Argument(metavar="CASES", help="A CSV file with a row for each case and its scores.")]
SplitFolder = Annotated[Path, typer.Argument(metavar="SPLIT", help="The folder that `errors split` wrote.")]
Split = Annotated[
    Path | None, typer.Option("--split", metavar="SPLIT", help="Of `errors split`: blackbox cases are left out.")
]
Cost = Annotated[
    list[str] | None, typer.Option("--cost", metavar="TAG=COST", help="Of mending it, in any unit; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="A JSON object instead of text.")]
HEADER_LINES = 2
T = TypeVar("T")


def judged_cases(cases: Path, define: Path) -> tuple[Definition, pd.DataFrame]:
    """A definition, and a table of cases judged by it."""
    from medfusion.analysis.definition import judge, read_definition
    from medfusion.analysis.tables import read_cases

    definition = read_definition(define)
    table = read_cases(cases, definition.columns.case, definition.columns.patient)
    try:
        return definition, judge(table, definition)
    except MedfusionError as error:
        raise MedfusionError(f"{cases}: {error.what}", fix=error.fix, **error.facts) from error


def eyeball_cases(judged: pd.DataFrame, split: Path | None, looked_at: Iterable[str] = ()) -> pd.DataFrame:
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


def scans_of(cases: Iterable[str], folder: Path) -> dict[str, Series]:
    """The scan or label map of each case, by its name.

    Raises
    ------
    MedfusionError : a case has none.
    """
    from medfusion.io import discover

    there = {one.name: one for one in discover(folder)}
    cases = list(cases)
    missing = [case for case in cases if case not in there]
    if missing:
        raise MedfusionError(f"cases without a file in {folder}", cases=some(missing), files=some(there))
    return {case: there[case] for case in cases}


def tracked(steps: Iterable[T], title: str) -> Iterable[T]:
    """With a bar on the terminal, if standard error is one."""
    from rich.console import Console
    from rich.progress import track

    progress = Console(stderr=True)
    return track(list(steps), title, console=progress, transient=True, disable=not progress.is_terminal)


def costs_of(stated: Iterable[str] | None) -> dict[str, float]:
    """Of what --cost states: the cost of each tag."""
    costs = {}
    for each in stated or ():
        tag, separator, value = each.rpartition("=")
        try:
            costs[tag] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise MedfusionError(f"--cost {each}: not of the form TAG=COST", fix='e.g. --cost "noisy image=3"')
    return costs


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, for JSON."""
    return [{str(name): cell for name, cell in row.items()} for row in table.reset_index().to_dict("records")]


def print_json(answer: Mapping[str, Any]) -> None:
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


def print_table(title: str, name: str, columns: list[str], rows: Mapping[Any, tuple[str, ...]]) -> None:
    """As narrow as headers of two lines allow: a header says % for all its cells, intervals stand below shares."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(name, overflow="fold", min_width=min(14, max(map(len, map(str, rows)), default=0)))
    bare = {
        key: [cell.replace(" %", "").replace(" (", "\n").removesuffix(")") for cell in cells]
        for key, cells in rows.items()
    }
    for place, column in enumerate(columns):
        header = f"{column} (%)" if any("%" in cells[place] for cells in rows.values()) else column
        words = [*header.split(), *(line for cells in bare.values() for line in cells[place].splitlines())]
        longest = max(map(len, words))
        width = next(width for width in count(longest) if len(wrap(header, width)) <= HEADER_LINES)
        table.add_column(header, justify="right", width=width)
    for key, cells in bare.items():
        table.add_row(escape(str(key)), *map(escape, cells))
    console = Console()
    # a narrower one would leave the last columns out
    needed = Measurement.get(console, console.options.update(max_width=1000), table).minimum
    console.width = max(console.width, needed, 96)
    typer.echo(title)
    console.print(table)
