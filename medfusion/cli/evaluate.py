"""`medfusion evaluate`: how well a task does on scans whose truth is known."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medfusion.cli.show import show_run

if TYPE_CHECKING:
    from medfusion.tasks.evaluate_augment import Comparison
    from medfusion.tasks.measure_detection import Estimate, Summary


def evaluate_detection_command(input: Path, output: Path, **options: Any) -> int:
    """Evaluate detection and print the tables; returns the exit code."""
    from medfusion.tasks.evaluate_detection import evaluate_detection

    run, summary = evaluate_detection(input, output, **options)
    code = show_run(run, output)
    if summary is not None:
        show_summary(summary)
    return code


def evaluate_augmentation_command(
    real: Path, synthetic: Path, output: Path, *, test: Path, steps: int, crop: int, **options: Any
) -> int:
    """Compare the segmenter's training sets and print the table; returns the exit code."""
    from medfusion.config import SegmenterConfig
    from medfusion.errors import MedfusionError
    from medfusion.tasks.evaluate_augment import evaluate_augmentation

    if crop % 8:
        raise MedfusionError(f"--crop {crop}: a multiple of 8 is needed")
    config = SegmenterConfig(steps=steps, crop=crop)
    console = Console(stderr=True)
    comparison = evaluate_augmentation(
        real, synthetic, test, output, config=config, say=partial(console.print, highlight=False), **options
    )
    show_comparison(comparison)
    return 0


def show_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print Dice in % by the number of real cases, intervals below values."""
    from medfusion.tasks.evaluate_augment import ARMS

    title = f"Dice in %, {len(comparison.test)} test cases of {len(set(comparison.patients))} patients"
    table = Table(title=title, title_justify="left")
    for column in ("real cases", *ARMS, "both \N{MINUS SIGN} real"):
        table.add_column(column, justify="right")
    for size in comparison.sizes:
        cells = [*(comparison.dice(size, arm) for arm in ARMS), comparison.gain(size)]
        table.add_row(str(size), *(_cell(cell, 100, 2) for cell in cells))
    (console or Console()).print(table)


def show_summary(summary: Summary, title: str = "Detection", console: Console | None = None) -> None:
    """Print tables of voxels, of lesions, by lesion size, of scans: a row a method, intervals below values."""
    from medfusion.tasks.measure_detection import CLASSES, FLAGGED, LEVELS, RATES

    console = console or Console()
    first = next(iter(summary.measures))
    facts = f"{title}: {summary.lesions} lesions in {summary.ill} of {summary.scans} scans, {summary.patients} patients"
    voxels = {"AUPRC": "auprc", "AUROC": "auroc", "best Dice": "best_dice", "Dice of the mask": "dice"}
    sizes = {f"AUPRC {name}": f"auprc of {name}" for name in CLASSES}
    sizes |= {f"found {name}": f"sensitivity of {name}" for name in CLASSES}
    lesions = {f"found at {rate:g} false a scan": f"sensitivity at {rate:g}" for rate in RATES}
    lesions |= {"found by the mask": "found", "false a scan": "false_findings"}
    scans = {"scan AUROC": "scan_auroc", f"ill, p <= {FLAGGED:g}": "ill_flagged"}
    scans[f"healthy, p <= {FLAGGED:g}"] = "healthy_flagged"
    levels = {f"p <= {level:g}": f"voxels p <= {level:g}" for level in LEVELS}

    def rows(names: dict[str, str]) -> dict[str, list[Estimate]]:
        return {method: [each[name] for name in names.values()] for method, each in summary.measures.items()}

    if summary.lesions:
        compared = {method: [*row, *_others(summary, method)] for method, row in rows(voxels).items()}
        by_chance = f"{facts}\nVoxels; by chance AUPRC is {summary.prevalence:.4f}"
        _show(console, by_chance, [*voxels, f"AUPRC of {first} over this"], compared)
        _show(console, "Lesions", list(lesions), rows(lesions))
        _show(console, "By lesion size, found at 1 false a scan", list(sizes), rows(sizes))
    if summary.ill < summary.scans:
        title = "Scans" if summary.lesions else f"{facts}\nScans"
        _show(console, title, [*scans, "false a scan"], rows(scans | {"": "false_findings"}))
        _show(console, "Voxels of healthy scans, % with", list(levels), rows(levels), 100)


def _others(summary: Summary, method: str) -> list[Estimate]:
    return [summary.ratios[method]] if method in summary.ratios else []


def _show(console: Console, title: str, columns: list[str], rows: dict[str, list[Estimate]], unit: float = 1) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for method, cells in rows.items():
        table.add_row(escape(method), *(_cell(cell, unit) for cell in cells))
    console.print(table)


def _cell(estimate: tuple[float, float, float], unit: float, digits: int = 3) -> str:
    """The value, and its interval on a second line."""
    if math.isnan(estimate[0]):
        return ""
    value, low, high = (f"{unit * part:.{digits}f}" for part in estimate)
    return value if math.isnan(estimate[1]) else f"{value}\n{low}\N{EN DASH}{high}"
