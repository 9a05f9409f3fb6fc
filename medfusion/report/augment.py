"""The report of `medfusion augment`: synthetic cases beside real ones, and what the audit says of them."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medfusion.io.companions import read_labels
from medfusion.io.training_set import TrainingCase, read_scan, read_training_set
from medfusion.report.figures import pairs_figure
from medfusion.report.page import Block, Figure, Section, Table, run_section
from medfusion.volume import Volume

if TYPE_CHECKING:
    from medfusion.tasks.audit_synthetic import Audit, Estimate
    from medfusion.tasks.runner import Run

SHOWN = 12  # pairs of each kind
AUDIT_TEXT = (
    "Faithfulness: Dice of segmenters that saw real cases only, and never the parent of the case they judge. Distances "
    "are to the nearest real case, in images 0 for a copy and 1.41 for no correlation. Frechet distance, MMD, precision"
    " and recall compare features of a fixed network; in the column of the real cases, one half of them with the other."
)


def augment_sections(input: Path, output: Path, run: Run, audit: Audit) -> list[Section]:
    """Pictures, the audit and the run, for ``write_report``."""
    real = read_training_set(input).labelled
    made = set(audit.cases) - set(audit.dropped)
    blocks: list[Block] = [
        "Every case is synthetic, but an image begins with that of its first parent and keeps the more of it the lower "
        "the strength: treat it as that person's. manifest.json names strength and parents of each."
    ]
    if made:
        synthetic = [case for case in read_training_set(output).labelled if case.image.is_relative_to(output)]
        for kind, cases in (("Synthetic", synthetic), ("Real", real)):
            png = pairs_figure([_pair(case) for case in cases[:SHOWN]])
            caption = f"{kind} cases, and below each its label map."
            blocks.append(Figure(png, caption, caption))
    dropped = Table(("Case", "Why"), list(audit.dropped.items()), "Dropped cases; they lie in the folder dropped.")
    return [
        Section("New cases", blocks),
        Section("Audit", [AUDIT_TEXT, Table(("Measure", "Synthetic", "Real"), audit_rows(audit)), _near_figure(audit)]),
        *([Section("Dropped", [dropped])] if audit.dropped else []),
        run_section(asdict(run)),
    ]


def audit_rows(audit: Audit) -> list[tuple[str, ...]]:
    """The measures, of synthetic and of real cases; intervals are 95 %."""
    rows: list[tuple[str, ...]] = [
        (
            "Dice to the labels asked for, mean (lowest)",
            *(f"{each.mean():.3f} ({each.min():.3f})" for each in (audit.faithful, audit.real_dice)),
        )
    ]
    for by, near in audit.near.items():
        rows.append((f"distance to the nearest real case, {by}: median", *(_median(near.distance), _median(near.real))))
        nearer = [int((each < near.threshold).sum()) for each in (near.distance, near.real)]
        rows.append((f"nearer than {near.threshold:.3g}", *(str(number) for number in nearer)))
        nearer = [int((each < near.of_pairs).sum()) for each in (near.distance, near.real)]
        rows.append((f"nearer than 1 % of all pairs of real cases, {near.of_pairs:.3g}", *map(str, nearer)))
    pairs = [audit.diversity[kind] for kind in ("synthetic", "real")]
    cells = [f"{each.mean():.3f}" if len(each) else "" for each in pairs]
    rows.append(("MS-SSIM between pairs, mean; the lower, the more varied", *cells))
    for name, values in audit.distances.items():
        rows.append((name, *(_cell(values[kind]) for kind in ("synthetic", "real"))))
    return rows


def _cell(estimate: Estimate) -> str:
    value = f"{estimate.value:.3g}"
    return value if np.isnan(estimate.low) else f"{value} ({estimate.low:.3g} to {estimate.high:.3g})"


def _median(values: NDArray[np.float64]) -> str:
    return f"{np.median(values):.3g}"


def _near_figure(audit: Audit) -> Figure:
    """Histograms of the distances to the nearest real case."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9.6, 2.6), dpi=100, layout="constrained")
    for axes, (by, near) in zip(canvas.subplots(1, len(audit.near)), audit.near.items(), strict=True):
        bins = np.histogram_bin_edges(np.concatenate([near.distance, near.real]), 30)
        for name, values in (("real", near.real), ("synthetic", near.distance)):
            axes.hist(values, bins, density=True, alpha=0.6, label=name)
        axes.axvline(near.threshold, color="black", linestyle="--", linewidth=1)
        axes.set_xlabel(f"distance to the nearest real case, {by}")
        axes.set_yticks([])
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    caption = "Distances to the nearest real case. Left of the dashed line a synthetic case is dropped as a copy."
    return Figure(buffer.getvalue(), caption, caption)


def _pair(case: TrainingCase) -> tuple[str, Volume, NDArray[np.integer]]:
    assert case.labels is not None
    scan = read_scan(case)
    return case.name, scan, read_labels(case.labels, scan).array
