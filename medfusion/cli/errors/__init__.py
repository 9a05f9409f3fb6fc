"""`medfusion errors`: where a system fails and what mending it is worth. Tables in, tables out."""

from collections.abc import Callable

import typer

from medfusion.cli.errors import parts, report, sets, slices, tags

app = typer.Typer(help="Find where a system fails, and what mending it is worth: docs/errors.md.", no_args_is_help=True)

COMMANDS: dict[str, Callable[..., None]] = {
    "sizes": sets.sizes_command,
    "split": sets.split_command,
    "refill": sets.refill_command,
    "ask": sets.ask_command,
    "overfit": sets.overfit_command,
    "tag": tags.tag_command,
    "table": tags.table_command,
    "agree": tags.agree_command,
    "run": parts.run_command,
    "parts": parts.parts_command,
    "measure": slices.measure_command,
    "slices": slices.slices_command,
    "report": report.report_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
