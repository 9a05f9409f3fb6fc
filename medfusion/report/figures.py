"""Figures of volumes: slices through a point in the world, as PNG bytes for a report.

Every figure cuts the world, not the voxel grid: oblique and anisotropic scans appear undistorted, and several scans
on different grids show the same anatomy side by side. Display is radiological: the patient's right is on the left.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from medfusion.data.grid import canonical
from medfusion.data.intensity import foreground
from medfusion.volume import Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# World axes (0 right, 1 anterior, 2 superior) across, up and through each plane, and the letters at its left and right.
PLANES = {
    "axial": (0, 1, 2, "R", "L"),
    "coronal": (0, 2, 1, "R", "L"),
    "sagittal": (1, 2, 0, "A", "P"),
}
CT_WINDOW = (-160.0, 240.0)  # HU, soft tissue: width 400, level 40
WIDTH = 9.6  # inches
DPI = 125
BAR = 0.9  # inches kept for a colour bar
TITLE = 0.3  # inches kept for the names of columns
GAP = 0.06  # inches between panels
HEAT, OUTLINE = "autumn", "#35e0e0"
LABEL_COLOURS = ("#35e0e0", "#ffb000", "#7fd34e", "#ff6f91", "#b794f6", "#ffe066", "#4ea8ff")
COLD_TO_WARM = ("#8fdcff", "#1f77c4", "#000000", "#c4541f", "#ffd58f")  # differences: zero is black, as air is

Box = NDArray[np.float64]  # (3, 2): lowest and highest world millimetre along right, anterior, superior


def slice_figure(
    volume: Volume,
    *,
    overlay: NDArray[np.generic] | None = None,
    threshold: float = 0.0,
    overlay_label: str = "",
    mask: NDArray[np.generic] | None = None,
    position_mm: ArrayLike | None = None,
    window: tuple[float, float] | None = None,
) -> bytes:
    """Axial, coronal and sagittal slice of one volume, as PNG.

    Parameters
    ----------
    overlay : values on the volume's grid; those above ``threshold`` are drawn as heat with a colour bar.
    mask : non-zero voxels on the volume's grid are outlined.
    position_mm : (3,) world RAS mm that all three slices pass through; default as ``slice_position`` chooses.
    window : values shown as black and white; default as ``grey_window`` chooses.
    """
    position = np.asarray(slice_position(volume, mask) if position_mm is None else position_mm, dtype=np.float64)
    box, grey = _field_of_view(volume), window or grey_window(volume)
    size = box[:, 1] - box[:, 0]
    across = sum(size[horizontal] for horizontal, *_ in PLANES.values())
    width = WIDTH - (BAR if overlay is not None else 0.0) - GAP * (len(PLANES) - 1)
    scale = width / across  # inches per millimetre, the same in every panel
    height = scale * max(size[vertical] for _, vertical, *_ in PLANES.values())
    figure = _dark_figure(height)
    left, heat = 0.0, None
    for plane, (horizontal, vertical, *_) in PLANES.items():
        panel = (scale * size[horizontal], scale * size[vertical])
        axes = _add_axes(figure, left, (height - panel[1]) / 2, *panel)
        left += panel[0] + GAP
        _draw_slice(axes, volume, plane, position, box, grey)
        if overlay is not None:
            pixels = _cut(overlay, volume, plane, position, box)
            shown = np.ma.masked_where(~(pixels > threshold), pixels)
            limits = (threshold, max(float(np.nanmax(overlay)), threshold + 1e-6))
            heat = axes.imshow(shown, cmap=HEAT, vmin=limits[0], vmax=limits[1], alpha=0.75)
        if mask is not None:
            _draw_outline(axes, mask, volume, plane, position, box)
    if heat is not None:
        _add_bar(figure, heat, height, overlay_label)
    return _png(figure)


def comparison_figure(
    columns: Mapping[str, Volume],
    *,
    difference: tuple[str, str] | None = None,
    mask: NDArray[np.generic] | None = None,
    position_mm: ArrayLike | None = None,
    window: tuple[float, float] | None = None,
) -> bytes:
    """Several volumes side by side at the same world position in the same grey window, as PNG.

    Position, window and field of view are those of the first volume unless given.

    Parameters
    ----------
    columns : the title of each column and its volume, from left to right.
    difference : two titles (a, b) on one grid: a column "a - b" beside them, blue below zero, orange above.
    mask : non-zero voxels on the first volume's grid are outlined in every column.
    position_mm, window : as in ``slice_figure``.

    Raises
    ------
    ValueError : the two volumes of ``difference`` are not on the same grid.
    """
    from matplotlib.colors import LinearSegmentedColormap

    first = next(iter(columns.values()))
    position = np.asarray(slice_position(first, mask) if position_mm is None else position_mm, dtype=np.float64)
    box, grey = _field_of_view(first), window or grey_window(first)
    size = box[:, 1] - box[:, 0]
    panels: dict[str, Volume] = {}
    for title, volume in columns.items():
        panels[title] = volume
        if difference and title in difference and panels.keys() >= set(difference):
            panels[" \N{MINUS SIGN} ".join(difference)] = _subtract(columns[difference[0]], columns[difference[1]])
    width = (WIDTH - (BAR if difference else 0.0) - GAP * (len(panels) - 1)) / len(panels)
    scale = width / max(size[horizontal] for horizontal, *_ in PLANES.values())
    height = TITLE + sum(scale * size[vertical] + GAP for _, vertical, *_ in PLANES.values())
    figure = _dark_figure(height)
    colours = LinearSegmentedColormap.from_list("difference", COLD_TO_WARM)
    changes, bottom = None, height - TITLE
    for plane, (horizontal, vertical, *_) in PLANES.items():
        panel = (scale * size[horizontal], scale * size[vertical])
        bottom -= panel[1] + GAP
        for column, (title, volume) in enumerate(panels.items()):
            left = column * (width + GAP) + (width - panel[0]) / 2
            axes = _add_axes(figure, left, bottom, *panel)
            if title in columns:
                _draw_slice(axes, volume, plane, position, box, grey)
            else:
                half = float(np.percentile(np.abs(volume.array), 99.9)) or 1.0
                changes = _draw_slice(axes, volume, plane, position, box, (-half, half), colours)
            if mask is not None:
                _draw_outline(axes, mask, first, plane, position, box)
    for column, title in enumerate(panels):
        middle = (column * (width + GAP) + width / 2) / WIDTH
        figure.text(middle, 1 - TITLE / 2 / height, title, color="white", ha="center", va="center", fontsize=10)
    if changes is not None:
        _add_bar(figure, changes, height, "difference")
    return _png(figure)


def pairs_figure(pairs: Sequence[tuple[str, Volume, NDArray[np.integer]]], columns: int = 6) -> bytes:
    """Many scans with their label maps, as PNG: title, the slice, and below it the slice with every label outlined.

    All are cut in the plane that shows most of the labels, each where its own are largest, and have a grey window of
    their own, from the 1st to the 99.5th percentile: small fields of view hold no air.

    Parameters
    ----------
    pairs : title, scan, label map on the scan's grid.
    """
    from matplotlib.figure import Figure

    rows = -(-len(pairs) // columns)
    edge = WIDTH / columns
    figure = Figure(figsize=(WIDTH, rows * (2 * edge + TITLE)), dpi=DPI, facecolor="black")
    height = rows * (2 * edge + TITLE)
    plane = _best_plane(pairs)
    for number, (title, volume, labels) in enumerate(pairs):
        row, column = divmod(number, columns)
        top = height - row * (2 * edge + TITLE)
        figure.text(
            (column + 0.5) / columns, (top - TITLE / 2) / height, title, color="white", ha="center", va="center"
        )
        box, window = _field_of_view(volume), np.percentile(volume.array, (1, 99.5))
        position = _largest(volume, labels)
        pixels = _cut(volume.array, volume, plane, position, box)
        for line in (0, 1):
            place = (column * edge + GAP / 2, top - TITLE - (line + 1) * edge + GAP / 2)
            axes = _add_axes(figure, *place, edge - GAP, edge - GAP)
            axes.imshow(pixels, cmap="gray", vmin=window[0], vmax=window[1], interpolation="bilinear")
            for value in np.unique(labels[labels > 0]) if line else ():
                inside = np.nan_to_num(_cut(labels == value, volume, plane, position, box))
                if inside.max() > 0.5:
                    axes.contour(inside, levels=[0.5], colors=[LABEL_COLOURS[int(value) % len(LABEL_COLOURS)]])
    return _png(figure)


def _sections(volume: Volume, labels: NDArray[np.integer]) -> tuple[Volume, list[NDArray[np.intp]]]:
    """The label map with its axes in the nearest RAS orientation, and its voxels in each slice along each axis."""
    upright = canonical(volume.with_array(labels))
    return upright, [np.count_nonzero(upright.array, axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]


def _best_plane(pairs: Sequence[tuple[str, Volume, NDArray[np.integer]]]) -> str:
    """The plane whose largest slices of the maps hold most labelled voxels; axial where there are none."""
    most = np.sum([[count.max() for count in _sections(*pair[1:])[1]] for pair in pairs], axis=0)
    return max(PLANES, key=lambda plane: most[PLANES[plane][2]])


def _largest(volume: Volume, labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """World RAS mm of the slices that hold most labelled voxels; the scan's own position where there are none."""
    upright, counts = _sections(volume, labels)
    return upright.to_world([count.argmax() for count in counts]) if labels.any() else slice_position(volume)


def slice_position(volume: Volume, mask: NDArray[np.generic] | None = None) -> NDArray[np.float64]:
    """World RAS mm worth looking at: inside the mask's largest component, else the centre of the foreground."""
    if mask is not None and np.any(mask):
        components, _ = ndimage.label(np.asarray(mask) != 0, structure=np.ones((3, 3, 3)))
        largest = np.argwhere(components == np.bincount(components.ravel())[1:].argmax() + 1)
        nearest = ((largest - largest.mean(axis=0)) ** 2).sum(axis=1).argmin()  # a bent lesion misses its own centroid
        return volume.to_world(largest[nearest])
    tissue = foreground(volume.array)
    if tissue.any():
        return volume.to_world(ndimage.center_of_mass(tissue))
    return volume.to_world((np.array(volume.shape) - 1) / 2)


def grey_window(volume: Volume) -> tuple[float, float]:
    """Values shown as black and white: soft tissue for CT; else air (median) to the tissue's 99.5th percentile."""
    if volume.modality == "CT":
        return CT_WINDOW
    tissue = foreground(volume.array)
    if not tissue.any() or tissue.all():
        low = float(volume.array.min())
        return low, max(float(volume.array.max()), low + 1.0)
    return float(np.median(volume.array[~tissue])), float(np.percentile(volume.array[tissue], 99.5))


def _field_of_view(volume: Volume) -> Box:
    """World box around the foreground, 8 mm of air with it, within the box around the whole grid."""
    grid = _world_box(volume, np.array([[0, n] for n in volume.shape]) - 0.5)
    tissue = foreground(volume.array)
    if not tissue.any():
        return grid
    rows = [np.flatnonzero(tissue.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    inner = _world_box(volume, np.array([[row[0] - 0.5, row[-1] + 0.5] for row in rows]))
    return np.stack([np.maximum(grid[:, 0], inner[:, 0] - 8.0), np.minimum(grid[:, 1], inner[:, 1] + 8.0)], axis=1)


def _world_box(volume: Volume, index_box: NDArray[np.float64]) -> Box:
    corners = volume.to_world(np.stack(np.meshgrid(*index_box, indexing="ij"), axis=-1).reshape(-1, 3))
    return np.stack([corners.min(axis=0), corners.max(axis=0)], axis=1)


def _cut(
    array: NDArray[np.generic], volume: Volume, plane: str, position: NDArray[np.float64], box: Box
) -> NDArray[np.float64]:
    """Linear interpolation on one world plane, (rows, columns); NaN outside the scan.

    Rows run downwards from superior or anterior, columns from the patient's right or front, one pixel per finest voxel.
    """
    horizontal, vertical, normal, *_ = PLANES[plane]
    pixel = max(float(volume.spacing.min()), float((box[:, 1] - box[:, 0]).max()) / 512)
    columns = np.arange(box[horizontal, 1] - pixel / 2, box[horizontal, 0], -pixel)
    rows = np.arange(box[vertical, 1] - pixel / 2, box[vertical, 0], -pixel)
    world = np.empty((len(rows), len(columns), 3))
    world[..., horizontal], world[..., vertical], world[..., normal] = columns, rows[:, None], position[normal]
    inverse = np.linalg.inv(volume.affine)
    index = np.moveaxis(world @ inverse[:3, :3].T + inverse[:3, 3], -1, 0)
    pixels = ndimage.map_coordinates(np.asarray(array, dtype=np.float32), index, order=1, mode="nearest")
    last = np.array(volume.shape)[:, None, None] - 0.5
    return np.where(((index >= -0.5) & (index <= last)).all(axis=0), pixels, np.nan)


def _draw_slice(
    axes: Axes,
    volume: Volume,
    plane: str,
    position: NDArray[np.float64],
    box: Box,
    window: tuple[float, float],
    colours: str | Colormap = "gray",
) -> AxesImage:
    from matplotlib.patheffects import withStroke

    pixels = _cut(volume.array, volume, plane, position, box)
    image = axes.imshow(pixels, cmap=colours, vmin=window[0], vmax=window[1], aspect="auto", interpolation="bilinear")
    _, _, normal, at_left, at_right = PLANES[plane]
    outlined = [withStroke(linewidth=2, foreground="black")]  # legible on bright tissue too
    label: dict[str, Any] = {"color": "#dddddd", "fontsize": 8, "transform": axes.transAxes, "path_effects": outlined}
    axes.text(0.015, 0.5, at_left, ha="left", va="center", **label)
    axes.text(0.985, 0.5, at_right, ha="right", va="center", **label)
    where = f"{plane}  {'xyz'[normal]} = {position[normal]:.0f} mm".replace("-", "\N{MINUS SIGN}")
    axes.text(0.015, 0.015, where, ha="left", va="bottom", **label)
    return image


def _draw_outline(
    axes: Axes, mask: NDArray[np.generic], volume: Volume, plane: str, position: NDArray[np.float64], box: Box
) -> None:
    pixels = np.nan_to_num(_cut(np.asarray(mask) != 0, volume, plane, position, box))
    if pixels.max() > 0.5:  # the plane may miss the mask
        axes.contour(pixels, levels=[0.5], colors=OUTLINE, linewidths=1.0)


def _subtract(a: Volume, b: Volume) -> Volume:
    if a.shape != b.shape or not np.allclose(a.affine, b.affine, atol=1e-3):
        raise ValueError(f"{a.name} and {b.name} are not on the same grid: {a.shape} and {b.shape}")
    return a.with_array(a.array.astype(np.float32) - b.array.astype(np.float32))


def _dark_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="black")


def _add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes without frame or ticks, placed in inches."""
    total_width, total_height = figure.get_size_inches()
    place = (left / total_width, bottom / total_height, width / total_width, height / total_height)
    axes = figure.add_axes(place)
    axes.set_axis_off()
    return axes


def _add_bar(figure: Figure, image: AxesImage, height: float, label: str) -> None:
    axes = _add_axes(figure, WIDTH - BAR + 0.12, 0.15 * height, 0.14, 0.7 * height)
    axes.set_axis_on()
    bar = figure.colorbar(image, cax=axes)
    bar.ax.tick_params(colors="white", labelsize=8)
    bar.outline.set_edgecolor("#666666")
    bar.set_label(label, color="white", fontsize=8)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="black", metadata={"Software": None})
    return buffer.getvalue()
