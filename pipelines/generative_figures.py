"""How the families of generative_models.py are drawn: triangles of the trilemma, training curves, samples."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

CORNERS = ("quality", "coverage", "speed")
DIRECTIONS = np.array([[np.cos(a), np.sin(a)] for a in np.deg2rad([90, 210, 330])])
SLOWEST, FASTEST = 0.01, 1000.0  # samples a second, at the centre and at the corner
LINE, GREY = "#0072b2", "#999999"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe & Ito: told apart by everyone

Point = tuple[float, float, float]  # precision, recall, samples a second


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


def learning(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> bytes:
    """Frechet distance over minutes of training, as PNG: a colour for each family, a line for each seed."""
    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for (name, seeds), colour in zip(curves.items(), COLOURS, strict=True):
        for number, curve in enumerate(seeds):
            minutes, distance = ([point[key] for point in curve] for key in ("minutes", "frechet"))
            axes.plot(minutes, distance, color=colour, marker=".", label=None if number else name)
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
