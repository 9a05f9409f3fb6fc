"""Tables on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medfusion.errors import MedfusionError

if TYPE_CHECKING:
    from medfusion.tasks.runner import Run


def show_run(run: Run, output: Path) -> int:
    """Print what became of each case and where the results are; returns the exit code."""
    console = Console()
    table = Table(
        title=f"medfusion {run.command}, prior {run.prior['name']}, {run.environment['device']}", title_justify="left"
    )
    for column in ("case", "status", "seconds", "result"):
        table.add_column(column, justify="right" if column == "seconds" else "left", overflow="fold")
    colour = {"done": "green", "skipped": "cyan", "refused": "yellow", "failed": "red"}
    for case in run.cases:
        status = f"[{colour[case.status]}]{case.status}[/]"
        table.add_row(escape(case.name), status, f"{case.seconds:.1f}", escape(case.message))
    console.print(table)
    count = {status: sum(case.status == status for case in run.cases) for status in colour}
    summary = ", ".join(f"{n} {status}" for status, n in count.items() if n) or "nothing done"
    line = f"{summary} in {run.seconds:.1f} s{' (interrupted)' if run.interrupted else ''}. Results: {output}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)  # a path is to be copied as it is
    return run.exit_code


def show_priors(name: str | None) -> int:
    """Print the shipped priors as a table, or the card of one."""
    from medfusion.prior import read_metadata, shipped

    console, priors = Console(), shipped()
    if name is not None:
        if name not in priors:
            raise MedfusionError(f"{name}: no shipped prior has this name", shipped=", ".join(priors) or "none")
        console.print(priors[name].with_suffix(".md").read_text(encoding="utf-8"), markup=False, highlight=False)
        return 0
    table = Table(title="Shipped priors", title_justify="left")
    for column in ("name", "modality", "spacing", "size", "trained on", "steps", "licence"):
        table.add_column(column, overflow="fold")
    for path in priors.values():
        config, provenance = read_metadata(path)
        table.add_row(
            config.name,
            config.preprocessing.modality,
            f"{config.preprocessing.spacing:g} mm",
            f"{path.stat().st_size / 1e6:.1f} MB",
            f"{provenance['training_scans']} scans: {provenance['data']}",
            str(provenance["steps"]),
            config.licence.split(". ")[0],  # the attribution stands in the card
        )
    console.print(table)
    console.print("Card of one: medfusion priors NAME")
    return 0
