"""What the commands of `medfusion errors` share: their options, how they read cases, how they print."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Around the use of a table that is read already: what is wrong with it is said of its file."""
    try:
        yield
    except MedfusionError as error:
        raise MedfusionError(f"{path}: {error.what}", fix=error.fix, **error.facts) from error


def judged_cases(cases: Path, define: Path) -> tuple[Definition, pd.DataFrame]:
    """A definition, and a table of cases judged by it."""
    from medfusion.analysis.definition import judge, read_definition
    from medfusion.analysis.tables import check_columns, read_cases

    definition = read_definition(define)
    table = read_cases(cases, definition.columns.case, definition.columns.patient)
    with about(cases):
        check_columns(table, definition.scores)
        return definition, judge(table, definition)


def cases_to_see(judged: pd.DataFrame, split: Path | None) -> pd.DataFrame:
    """The cases that may be looked at: those of the eyeball set, or all where there is no split.

    Raises
    ------
    MedfusionError : none is in the eyeball set.
    """
    if split is None:
        return judged
    from medfusion.analysis.blackbox import eyeball_cases, read_split

    table = read_split(split)
    seen = judged.index.isin(eyeball_cases(table))
    sealed, unknown = (~seen & judged.index.isin(table.index)).sum(), ~judged.index.isin(table.index)
    if not seen.any():
        raise MedfusionError(
            f"none of the cases is in the eyeball set of {split}", cases=some(judged.index), there=some(table.index)
        )
    if sealed:
        typer.echo(f"{sealed} blackbox cases stay sealed", err=True)
    if unknown.any():
        typer.echo(
            f"{unknown.sum()} cases are not in the split and are left out: {some(judged.index[unknown])}", err=True
        )
    return judged[seen]


def tags_given(tags: Path, split: Path | None, definition: Definition) -> tuple[pd.DataFrame, list[str]]:
    """Tags as ``read_tags`` returns them, and what a reader of anything made of them should know.

    Raises
    ------
    MedfusionError : one is of a case that nobody should have looked at.
    """
    from medfusion.analysis.blackbox import read_split, refuse_blackbox
    from medfusion.analysis.tags import read_tags

    given = read_tags(tags)
    if split is not None:
        refuse_blackbox(read_split(split), given["case"])
    cautions = []
    if (reviewers := given["reviewer"].nunique()) > 1:
        cautions.append(f"{reviewers} reviewers: of a case that several looked at a tag counts that half of them gave")
    if other := sorted({*given["definition"]} - {"", definition.hash}):
        cautions.append(f"tags were given by another definition of an error: {some(other)}")
    return given, cautions


def scans_of(cases: Iterable[str], folder: Path, *, all_of_them: bool = True) -> dict[str, Series]:
    """The scan or label map of each case, by its name.

    Raises
    ------
    MedfusionError : a case has none, and ``all_of_them`` should.
    """
    from medfusion.io import discover

    there, cases = {one.name: one for one in discover(folder)}, list(cases)
    missing = [case for case in cases if case not in there]
    if missing and (all_of_them or len(missing) == len(cases)):
        raise MedfusionError(
            f"{len(missing)} of {len(cases)} cases have no file in {folder}",
            cases=some(missing),
            files=some(there),
            fix="cases are called as files without .nii.gz, DICOM series as `medfusion inspect` says; leave others out",
        )
    if missing:
        typer.echo(f"{len(missing)} of {len(cases)} cases have no file in {folder}", err=True)
    return {case: there[case] for case in cases if case in there}


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Before the work: raise a MedfusionError if an output is there already and may not be replaced."""
    from medfusion.io.output import require_writable

    if path.exists() and not overwrite:
        raise MedfusionError(f"{path}: is there already", fix="--overwrite replaces it; or choose another name")
    if path.is_dir() and path.suffix:
        raise MedfusionError(f"{path}: a folder is in the way of the file", fix="choose another name")
    require_writable(path.parent)


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
