"""One self-contained HTML page: text, tables and figures in sections; it opens offline and runs no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfusion import __version__
from medfusion.io.output import staged

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Figure:
    """A PNG; ``alt`` says in words what it shows, for those who cannot see it."""

    png: bytes
    alt: str
    caption: str = ""

    @property
    def source(self) -> str:
        """The image itself as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; a cell that says "done", "skipped", "refused" or "failed" is drawn as a badge."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclass(frozen=True)
class KeyValues:
    """Names and values in two columns."""

    values: Mapping[str, object]


@dataclass(frozen=True)
class Details:
    """Text as it stands, in a box that opens on a click."""

    summary: str
    text: str


Block = str | Figure | Table | KeyValues | Details  # a plain string is a paragraph


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


def write_report(path: Path, title: str, sections: Sequence[Section], *, subtitle: str = "") -> None:
    """Write the page to ``path``, whole or not at all; an existing page is replaced.

    All text is escaped: what a scan's header says is shown, never interpreted. The page is self-contained.

    Raises
    ------
    MedfusionError : the folder of ``path`` cannot be written.
    """
    environment = template_environment()
    environment.tests["a"] = lambda block, kind: type(block).__name__ == kind
    html = environment.get_template("template.html").render(title=title, subtitle=subtitle, sections=sections)
    with staged(path, overwrite=True) as beside:
        beside.write_text(html, encoding="utf-8")


def template_environment() -> Environment:
    """Templates of this folder; text is escaped, and ``version``, ``written`` and the filter ``cell`` are there."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = format_cell
    environment.globals.update(version=__version__, written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    return environment


def run_section(run: Mapping[str, Any], title: str = "This run") -> Section:
    """What was done, with what, and what failed, from the content of ``run.json``."""
    import yaml

    cases = run["cases"]
    troubled = [case["name"] for case in cases if case["status"] in ("failed", "refused")]
    count = f"{len(cases)} case{'' if len(cases) == 1 else 's'}"
    verdict = f"{len(troubled)} of {count} failed: {', '.join(troubled)}." if troubled else f"{count}, none failed."
    facts = {
        "Command": run["command"],
        "Prior": run["prior"]["name"],
        "Device": run["environment"]["device"],
        "Duration": format_seconds(run["seconds"]),
    }
    rows = [
        (
            case["name"],
            case["status"],
            format_seconds(case["seconds"]),
            "\n".join(Path(output).name for output in case["outputs"]),
            case["message"],
        )
        for case in cases
    ]
    table = Table(("Case", "Status", "Time", "Outputs", "Result"), rows)
    details = {key: run[key] for key in ("settings", "prior", "environment")}
    return Section(
        title, [verdict, KeyValues(facts), table, Details("Settings", yaml.safe_dump(details, sort_keys=False))]
    )


def format_cell(value: object) -> str:
    """A cell's text: four significant digits for a fraction, a dash for what is missing."""
    if value is None or value == "":
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
    return str(value)


def format_seconds(seconds: float) -> str:
    """A duration to read, with unbreakable spaces: "0.42 s", "38 s", "5 min 12 s", "2 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        text = f"{minutes // 60} h {minutes % 60:02d} min"
    elif minutes >= 1:
        text = f"{minutes} min {rest:02d} s"
    else:
        text = f"{seconds:.2g} s" if seconds < 10 else f"{rest} s"
    return text.replace(" ", "\N{NO-BREAK SPACE}")
