"""The report of an error analysis: what an error is, what kinds there are, who is to blame, where they concentrate."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from medfusion.report.page import Block, Details, Figure, KeyValues, Section, Table

if TYPE_CHECKING:
    from medfusion.analysis.definition import Definition
    from medfusion.analysis.error_table import ErrorTable
    from medfusion.analysis.parts import Attribution
    from medfusion.analysis.slices import Slices
    from medfusion.analysis.tags import Agreement

FEW = 10  # patients
LISTED = 20  # cases that are named


def percent(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """In %, with an interval if there is one; "" for nan."""
    if math.isnan(value):
        return ""
    text = f"{100 * value:.1f} %"
    return text if math.isnan(low) else f"{text} ({100 * low:.1f}\N{EN DASH}{100 * high:.1f})"


def plain(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """As it is, with an interval if there is one; "" for nan."""
    if math.isnan(value):
        return ""
    return f"{value:.4g}" if math.isnan(low) else f"{value:.4g} ({low:.4g}\N{EN DASH}{high:.4g})"


def tag_rows(found: ErrorTable) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Columns, and the cells of each tag."""
    costs = found.tags["cost"].notna().any()
    columns = ["errors", "share", "alone", "of loss", "of correct", "gain at most", "error after"]
    rows = {
        str(tag): (
            f"{row['count']:.0f}",
            percent(row["share"], row["low"], row["high"]),
            f"{row['exclusive']:.0f}",
            percent(row["loss_share"]),
            percent(row["among_correct"]),
            percent(row["ceiling"], row["ceiling_low"], row["ceiling_high"]),
            percent(row["after"]),
            *((plain(100 * row["gain_per_cost"]),) if costs else ()),
        )
        for tag, row in found.tags.iterrows()
    }
    return [*columns, *(["gain/cost"] if costs else [])], rows


def part_rows(found: Attribution) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Columns, and the cells of each component."""
    loss = found.measure == "loss"
    number = plain if loss else percent
    what = "mean loss" if loss else "error rate"
    columns = [f"of the {what}, {found.level:.0%} interval", "alone", "last of all", "errors it mends first", "harms"]
    rows: dict[str, tuple[str, ...]] = {
        str(name): (
            number(row["shapley"], row["low"], row["high"]),
            number(row["alone"]),
            number(row["last"]),
            percent(row["blamed_share"], row["blamed_low"], row["blamed_high"]),
            f"{row['harmful']:.0f}",
        )
        for name, row in found.table.iterrows()
    }
    return columns, rows


def part_lines(found: Attribution) -> list[str]:
    """What the table does not say: totals, order of work, what nothing mends, what harms."""
    number = plain if found.measure == "loss" else percent
    what = "Mean loss" if found.measure == "loss" else "Error rate"
    worth, left = [], found.none
    for name, then in found.order:
        worth += [f"{name} (to {number(then)})"] * (then < left)
        left = then
    lines = [
        f"{what} {number(found.none)}, and {number(found.all)} when all components are perfect; {found.cases} cases of "
        f"{found.patients} patients",
        f"Work on {', then '.join(worth)}" if worth else "No component is worth working on",
    ]
    if found.patients < FEW:
        lines.append(f"Caution: of {found.patients} patients, and intervals say little of fewer than {FEW}")
    if found.residual:
        names = ", ".join(found.residual[:LISTED]) + (" and more" if len(found.residual) > LISTED else "")
        share = percent(*found.unmended)
        lines.append(f"Nothing mends {share} of the errors, by a bad label, metric or design: {names}")
    if found.harmed:
        pairs = ", ".join(f"{case} by {name}" for name, case in found.harmed[:LISTED])
        lines.append(f"Made wrong by a perfect component: {pairs}{' and more' if len(found.harmed) > LISTED else ''}")
    return lines


def slice_rows(found: Slices) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Columns, and the cells of each slice."""
    rows: dict[str, tuple[str, ...]] = {
        str(row["slice"]): (
            f"{row['cases']:.0f} of {row['patients']:.0f} patients",
            percent(row["coverage"]),
            percent(row["rate"], row["low"], row["high"]),
            percent(row["rest"]),
            f"{row['p']:.2g}" + (" *" if row["confirmed"] else ""),
        )
        for _, row in found.table.iterrows()
    }
    return ["cases", "of all", "error", "elsewhere", "p"], rows


def error_sections(
    definition: Definition,
    judged: pd.DataFrame,
    *,
    tags: ErrorTable | None = None,
    agreement: Agreement | None = None,
    parts: Attribution | None = None,
    slices: Slices | None = None,
    remarks: Sequence[str] = (),
    log: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[Figure] = (),
) -> list[Section]:
    """For ``write_report``; what is None was not asked for.

    Parameters
    ----------
    judged : the cases that may be looked at.
    remarks : on what could not be done.
    log : of the blackbox set, as ``read_log`` returns it.
    pictures : of errors.
    """
    sections = [_definition_section(definition, judged, remarks)]
    if tags is not None:
        sections.append(_tag_section(tags, agreement))
    if parts is not None:
        columns, rows = part_rows(parts)
        bars = _bars(parts.table["shapley"], parts.table["low"], parts.table["high"], f"share of the {parts.measure}")
        blocks: list[Block] = [*part_lines(parts), bars, _table("component", columns, rows)]
        sections.append(Section("Components", blocks))
    if slices is not None:
        columns, rows = slice_rows(slices)
        text = (
            f"Found on {slices.fitted} cases, measured on {slices.kept_back} of other patients. A star marks what was "
            "confirmed there at p of 0.05 or less, corrected for the number of slices."
        )
        sections.append(Section("Slices", [text, _table("slice", columns, rows)]))
    if log:
        sections.append(_log_section(log))
    if pictures:
        sections.append(Section("The worst errors", list(pictures)))
    return sections


def _definition_section(definition: Definition, judged: pd.DataFrame, remarks: Sequence[str]) -> Section:
    error = judged["error"].to_numpy(bool)
    severity = judged.loc[error, "severity"].value_counts()
    facts = {
        "Definition": f"{definition.name} {definition.hash}",
        "A case is": definition.case,
        "Cases": f"{len(judged)} of {judged['patient'].nunique()} patients",
        "Errors": f"{error.sum()}, {percent(float(error.mean()))}",
        "Mean loss": plain(float(judged["loss"].mean())),
        **{f"Severity {name}": int(count) for name, count in severity.items() if name},
    }
    worst = judged[error].sort_values("loss", ascending=False, kind="stable").head(LISTED)
    rows = [(case, row["patient"], float(row["loss"]), row["severity"]) for case, row in worst.iterrows()]
    text = yaml.safe_dump(definition.model_dump(exclude_defaults=True), sort_keys=False)
    listed = Table(("Case", "Patient", "Loss", "Severity"), rows, f"The {len(rows)} worst errors.")
    return Section("What an error is", [KeyValues(facts), *remarks, listed, Details("The definition", text)])


def _tag_section(tags: ErrorTable, agreement: Agreement | None) -> Section:
    columns, rows = tag_rows(tags)
    rate = percent(tags.error_rate)
    text = (
        f"{tags.looked_at} of {tags.errors} errors were seen. A tag's share of them, times the error rate of {rate},"
        " is the most that mending it gains. Tags overlap: sure to be mended are the errors that have this one alone."
    )
    bars = _bars(tags.tags["ceiling"], tags.tags["ceiling_low"], tags.tags["ceiling_high"], "gain at most, error rate")
    blocks: list[Block] = [text, *tags.warnings, bars, _table("tag", columns, rows)]
    if agreement is not None:
        kappas = {str(tag): (plain(row["kappa"], row["low"], row["high"]),) for tag, row in agreement.table.iterrows()}
        blocks.append(_table("tag", [f"kappa of the two reviewers, {agreement.cases} cases"], kappas))
    return Section("Kinds of errors", blocks)


def _log_section(log: Sequence[Mapping[str, Any]]) -> Section:
    questions = [entry for entry in log if entry["kind"] == "query"]
    rows = [
        (number, entry["date"], entry["model"], percent(entry["error_rate"], entry["low"], entry["high"]))
        for number, entry in enumerate(questions, start=1)
    ]
    refills = sum(entry["kind"] == "refill" for entry in log)
    text = f"Asked {len(questions)} times; the eyeball set was refilled {refills} times. Its cases are shown to nobody."
    return Section("Blackbox set", [text, Table(("Question", "Date", "Model", "Error"), rows)])


def _table(name: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    return Table((name, *columns), [(first, *cells) for first, cells in rows.items()])


def _bars(values: pd.Series, low: pd.Series, high: pd.Series, label: str) -> Figure:
    """A bar for each row, the first on top, with its interval."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9.6, 0.6 + 0.32 * len(values)), dpi=100, layout="constrained")
    axes = canvas.subplots()
    spread = np.abs(np.stack([values - low, high - values]))
    axes.barh([str(name) for name in values.index], values, xerr=np.nan_to_num(spread), color="#2f7dba", capsize=3)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    axes.spines[["top", "right", "left"]].set_visible(False)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return Figure(buffer.getvalue(), f"Bars: {label} of each row of the table below, with intervals.")
