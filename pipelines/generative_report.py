"""The tables and figures of generative_models.py: the trilemma's triangles, training curves, samples, the page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from generative_families import BATCH, CODED_FAMILIES, MODELS, QUICK, ROWS, Study, agreement_name, pairs_of, slug
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Printed
from scipy import stats

from medfusion.report import Figure as Shown
from medfusion.report import Section, Table, write_report

GOOD = 30.0  # Frechet distance: how long does a family train to come to it?
COLUMNS = {"frechet": 1, "mmd": 0, "precision": 2, "recall": 2, "texture": 2, "alike": 3, "bits": 2, "rebuilt": 1}
CORNERS = ("quality", "coverage", "speed")
DIRECTIONS = np.array([[np.cos(a), np.sin(a)] for a in np.deg2rad([90, 210, 330])])
SLOWEST, FASTEST = 0.01, 1000.0  # samples a second, at the centre and at the corner
LINE, GREY = "#0072b2", "#999999"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe & Ito: told apart by everyone

Point = tuple[float, float, float]  # precision, recall, samples a second


def report(study: Study, seeds: Sequence[int]) -> None:
    """Tables and figures of all that is there."""
    tables = [families_table(study, seeds), training_table(study, seeds), codes_table(study, seeds)]
    for table in tables:
        print_table(table)
    found = {name: [m for seed in seeds if (m := study.known(f"{slug(name)}_{seed}"))] for name in ROWS}
    speed = {name: study.known(f"time_{slug(name)}") for name in ROWS}
    points = {
        name: [(m["precision"], m["recall"], 1 / speed[name]["seconds"]) for m in found[name]]
        for name in ROWS
        if found[name] and speed[name]
    }
    curves = {QUICK[m]: [c for seed in seeds if (c := minutes_of(study, m, seed))] for m in QUICK}
    samples = {"crops of dev": study.crops("dev", BATCH)} | {
        name: np.load(path).astype(np.float32)
        for name, row in ROWS.items()
        if (path := study.run(row.model, 0) / f"{slug(name)}.npy").exists()
    }
    figures = {
        "trilemma": (
            triangles(points),
            "The trilemma: precision, recall and speed of each family, a line for each seed.",
        ),
        "training": (
            learning(curves),
            "Frechet distance to crops of dev over the minutes of the training on one core.",
        ),
        "samples": (grid(samples), "Middle slices of crops, and of samples of the first seed."),
    }
    for name, (png, _) in figures.items():
        (study.folder / f"{name}.png").write_bytes(png)
    shown = [Shown(png, caption, caption) for png, caption in figures.values()]
    write_report(study.folder / "report.html", "Generative families", [Section(study.data, [*tables, *shown])])
    print(f"report: {study.folder / 'report.html'}")


def families_table(study: Study, seeds: Sequence[int]) -> Table:
    """A row for each family and sampler, and for crops of `train`, which are as near as can be."""
    rows: list[list[object]] = []
    for name, row in ROWS.items():
        found = [study.known(f"{slug(name)}_{seed}") | study.known(f"told_{row.model}_{seed}") for seed in seeds]
        cells = [with_interval([f[c] for f in found if c in f], digits) for c, digits in COLUMNS.items()]
        speed = study.known(f"time_{slug(name)}")
        rows.append([name, row.networks, *cells, speed.get("evaluations", ""), rounded(speed.get("seconds"))])
    real = study.known("real")
    rows.append(["crops of train", "", *(f"{real[c]:.{d}f}" if c in real else "" for c, d in COLUMNS.items()), "", ""])
    columns = ("family", "networks", *COLUMNS, "evaluations", "s a sample")
    return Table(columns, rows, f"Families on {study.data}, crops of 32^3 voxels; means over seeds ± 95 % intervals")


def rounded(seconds: float | None) -> str:
    """To three digits."""
    return "" if seconds is None else f"{seconds:.3g}"


def training_table(study: Study, seeds: Sequence[int]) -> Table:
    """How long each model trains, and until its samples are good."""
    rows = []
    for model in [model for model in MODELS if study.known(f"step_{model}")]:
        seconds = study.known(f"step_{model}")["seconds"]
        curves = [curve for seed in seeds if (curve := minutes_of(study, model, seed))]
        first = [min((minutes for minutes, distance in curve if distance <= GOOD), default=None) for curve in curves]
        reached = [f"{minutes:.0f}" if minutes else "not" for minutes in first]
        rows.append([model, f"{seconds:.2f}", f"{MODELS[model].steps * seconds / 60:.0f}", ", ".join(reached)])
    columns = ("model", "s a step", "minutes", f"minutes to a Frechet distance of {GOOD:g}, each seed")
    return Table(columns, rows, f"Training on {study.data}, eight crops a step")


def minutes_of(study: Study, model: str, seed: int) -> list[tuple[float, float]]:
    """Minutes of training and Frechet distance of each snapshot; nothing where one of them is not measured."""
    step, curve = study.known(f"step_{model}"), study.known(f"curve_{model}_{seed}")
    return [(point["steps"] * step["seconds"] / 60, point["frechet"]) for point in curve] if step else []


def codes_table(study: Study, seeds: Sequence[int]) -> Table:
    """How much the codes of two models agree."""
    rows = []
    for model in CODED_FAMILIES:
        for kind in ("seeds", "widths"):
            pairs = [pair for pair in pairs_of(model, seeds) if ("narrower" in pair[1][0]) == (kind == "widths")]
            found = [f for a, b in pairs if (f := study.known(agreement_name(a, b)))]
            if found:
                cells = [with_range([f[c] for f in found if c in f]) for c in ("same", "other", "matched")]
                latents = ", ".join(str(f["pairs"]) for f in found if "pairs" in f)
                rows.append([model, f"two {kind}", *cells, latents])
    columns = ("family", "models differ in", "one crop", "two crops", "latents matched", "of them")
    return Table(columns, rows, f"Correlation of codes between models trained apart, {study.data}")


def with_interval(values: Sequence[float], digits: int) -> str:
    """Mean over seeds, and its 95 % interval by Student's t."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    reach = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean} ± {reach:.{digits}f}"


def with_range(values: Sequence[float]) -> str:
    """Mean, lowest and highest: pairs of models are not independent, so that there is no interval."""
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def print_table(table: Table) -> None:
    """In the terminal."""
    printed = Printed(*table.columns, title=table.caption)
    for row in table.rows:
        printed.add_row(*map(str, row))
    Console(width=200).print(printed)


def triangles(points: Mapping[str, Sequence[Point]], columns: int = 4) -> bytes:
    """A triangle for each family, as PNG: the farther a corner, the better; a line for each seed."""
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(9.6, 2.5 * rows), dpi=110, layout="constrained")
    for number, (name, seeds) in enumerate(points.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(name, fontsize=9)
        _frame(axes)
        for precision, recall, rate in seeds:
            speed = np.log(rate / SLOWEST) / np.log(FASTEST / SLOWEST)
            reached = np.clip([precision, recall, speed], 0, 1)[:, None] * DIRECTIONS
            axes.fill(*reached.T, facecolor=LINE, alpha=0.15)
            axes.plot(*np.vstack([reached, reached[:1]]).T, color=LINE, linewidth=1.5)
    return _png(figure)


def _frame(axes: Axes) -> None:
    """The whole triangle, its half, and what its corners mean."""
    for share in (0.5, 1.0):
        axes.plot(*(share * np.vstack([DIRECTIONS, DIRECTIONS[:1]])).T, color=GREY, linewidth=0.5)
    for direction, corner in zip(DIRECTIONS, CORNERS, strict=True):
        axes.plot(*np.stack([0 * direction, direction]).T, color=GREY, linewidth=0.5)
        axes.text(*(1.18 * direction), corner, ha="center", va="center", fontsize=8)
    axes.set(xlim=(-1.3, 1.3), ylim=(-0.85, 1.35), aspect="equal")
    axes.axis("off")


def learning(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> bytes:
    """Frechet distance over minutes of training, as PNG: a colour for each family, a line for each seed."""
    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for (name, seeds), colour in zip(curves.items(), COLOURS, strict=True):
        for number, curve in enumerate(seeds):
            axes.plot(*zip(*curve, strict=True), color=colour, marker=".", label=None if number else name)
    axes.set(xlabel="minutes of training", ylabel="Frechet distance", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def grid(samples: Mapping[str, Sequence[NDArray[np.float32]]]) -> bytes:
    """The middle axial slices of volumes (d, h, w), from -1 to +1, as PNG: a row for each name."""
    most = max(len(volumes) for volumes in samples.values())
    figure = Figure(figsize=(9.6, 1.35 * len(samples)), dpi=110, layout="constrained")
    places = figure.subplots(len(samples), most, squeeze=False)
    for line, (name, volumes) in zip(places, samples.items(), strict=True):
        line[0].set_title(name, loc="left", fontsize=9)
        for axes in line:
            axes.axis("off")
        for axes, volume in zip(line, volumes, strict=False):
            axes.imshow(volume[:, :, volume.shape[2] // 2].T, cmap="gray", vmin=-1, vmax=1, origin="lower")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
