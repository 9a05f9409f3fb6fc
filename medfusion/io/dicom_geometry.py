"""Where DICOM slices lie in the patient: affine of a stack, and what keeps slices from being one regular stack.

DICOM's world axes are LPS (left, posterior, superior); the affines here are RAS. Geometry: DICOM PS3.3, C.7.6.2.1.1.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pydicom import FileDataset

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# A slice may lie this fraction of the spacing, or this far, off its place: positions rounded to 0.1 mm are no fault.
SPACING_TOLERANCE = 0.1
POSITION_TOLERANCE_MM = 0.1
# In degrees. Rounded positions of a thin stack come near it; a tilted gantry lies far beyond it.
TILT_TOLERANCE = 0.5
SAME_POSITION_MM = 1e-3


def stack_affine(stack: list[FileDataset]) -> NDArray[np.float64]:
    """Voxel (column, row, slice) to RAS millimetres, for two or more slices sorted along their normal.

    The third axis runs from the first position to the last, so that both lie exactly where their files say.
    """
    first, last = stack[0], stack[-1]
    across, down = numbers(first, "ImageOrientationPatient", 6).reshape(2, 3)
    between_rows, between_columns = numbers(first, "PixelSpacing", 2)
    origin = numbers(first, "ImagePositionPatient", 3)
    affine = np.eye(4)
    affine[:3, 0] = across * between_columns
    affine[:3, 1] = down * between_rows
    affine[:3, 2] = (numbers(last, "ImagePositionPatient", 3) - origin) / (len(stack) - 1)
    affine[:3, 3] = origin
    return LPS_TO_RAS @ affine


def frames_affine(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """From highdicom's (slice, row, column) to LPS, to (column, row, slice) to RAS."""
    return LPS_TO_RAS @ affine[:, [2, 1, 0, 3]]


def numbers(header: FileDataset, keyword: str, count: int) -> NDArray[np.float64]:
    """Values of a tag; NaN where it is missing, no number, or of another length."""
    try:
        values = [float(value) for value in np.atleast_1d(header.get(keyword))]
    except (TypeError, ValueError):
        values = []
    return np.array(values if len(values) == count else [np.nan] * count)


def normal(header: FileDataset) -> NDArray[np.float64]:
    """Unit vector across the slice, LPS; NaN without an orientation."""
    across, down = numbers(header, "ImageOrientationPatient", 6).reshape(2, 3)
    return np.asarray(np.cross(across, down), dtype=np.float64)


def position_along_normal(header: FileDataset) -> float:
    """Millimetres along the slice normal; 0 without geometry, so that file names then decide the order."""
    along = float(numbers(header, "ImagePositionPatient", 3) @ normal(header))
    return 0.0 if np.isnan(along) else along


def stack_problems(stack: list[FileDataset]) -> list[str]:
    """Why slices, sorted along their normal, are not one regular stack; empty if they are."""
    missing = _missing_geometry(stack)
    if missing:
        return [missing]
    sizes = Counter((h.Columns, h.Rows, *numbers(h, "PixelSpacing", 2).round(4)) for h in stack)
    if len(sizes) > 1:
        listed = [f"{i} x {j} of {across:g} x {down:g} mm ({n} files)" for (i, j, down, across), n in sizes.items()]
        return [f"mixed sizes: {', '.join(listed)}"]
    if len(stack) == 1:
        return ["single slice: a volume needs two slices or more, found 1"]
    return _position_problems(stack)


def _missing_geometry(stack: list[FileDataset]) -> str:
    for keyword, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        lacking = sum(bool(np.isnan(numbers(header, keyword, count)).any()) for header in stack)
        if lacking:
            return f"no geometry: {keyword} is missing in {lacking} of {len(stack)} files"
    orientation, spacing = numbers(stack[0], "ImageOrientationPatient", 6), numbers(stack[0], "PixelSpacing", 2)
    across, down = orientation.reshape(2, 3)
    if not np.allclose([across @ across, down @ down, across @ down], [1, 1, 0], atol=0.01):
        return f"no geometry: ImageOrientationPatient {orientation.tolist()} is not two perpendicular unit vectors"
    if spacing.min() <= 0:
        return f"no geometry: PixelSpacing is {spacing.tolist()}"
    return ""


def _position_problems(stack: list[FileDataset]) -> list[str]:
    along = np.array([position_along_normal(header) for header in stack])
    positions = np.array([numbers(header, "ImagePositionPatient", 3) for header in stack])
    distinct = np.r_[True, np.diff(along) > SAME_POSITION_MM]
    problems = []
    if not distinct.all():
        problems.append(
            f"duplicate positions: {len(stack)} files lie at {distinct.sum()} positions "
            f"(the first shared one at {along[~distinct][0]:.2f} mm)"
        )
    along, positions = along[distinct], positions[distinct]
    if len(along) == 1:
        return problems
    problems += _spacing_problems(along, positions)
    length = float(np.linalg.norm(positions[-1] - positions[0]))
    tilt = np.degrees(np.arccos(np.clip((along[-1] - along[0]) / length, -1, 1)))
    if tilt > TILT_TOLERANCE:
        problems.append(f"gantry tilt: the stack of slices leans by {tilt:.1f} degrees")
    return problems


def _spacing_problems(along: NDArray[np.float64], positions: NDArray[np.float64]) -> list[str]:
    """Gaps or irregular steps of distinct positions, sorted along the normal (millimetres)."""
    steps = np.diff(along)
    spacing = float(np.percentile(steps, 50, method="lower"))
    places = np.r_[0, np.rint(steps / spacing).clip(min=1).cumsum()]
    even = positions[0] + np.outer(places / places[-1], positions[-1] - positions[0])
    off = float(np.linalg.norm(positions - even, axis=1).max())
    if off > max(SPACING_TOLERANCE * spacing, POSITION_TOLERANCE_MM):
        return [
            f"uneven spacing: steps of {steps.min():.4g} to {steps.max():.4g} mm between slices, "
            f"up to {off:.3g} mm off an even grid"
        ]
    gaps = np.diff(places).astype(int) - 1
    if not gaps.any():
        return []
    where = [f"{gaps[i]} after {along[i]:.2f} mm" for i in np.flatnonzero(gaps)]
    listed = ", ".join(where[:5]) + (", ..." if len(where) > 5 else "")
    return [f"missing slices: {gaps.sum()} at a spacing of {spacing:.4g} mm ({listed})"]
