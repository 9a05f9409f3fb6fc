"""What lies beside a scan on its grid: a brain mask, a label map."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from medfusion.errors import MedfusionError, some
from medfusion.io.discover import discover, read
from medfusion.io.series import Series
from medfusion.volume import Volume

GRID_TOLERANCE = 0.1  # voxels that the corners of a mask may lie off those of its scan: rounded headers, no more
LARGEST_LABEL = int(np.iinfo(np.int16).max)


def check_patterns(images: str, prefix: str = "--", **others: str) -> None:
    """Check that names of files tell which file belongs to which scan.

    ``prefix`` goes before the names of the settings in the error: "--" on the command line, "data." in a config.

    Raises
    ------
    MedfusionError : one of ``others`` that is given has no *, or ``images`` not exactly one and nothing else to match.
    """
    for name, pattern in others.items():
        if pattern and ("*" not in pattern or images.count("*") != 1 or set("?[") & set(images)):
            raise MedfusionError(
                f"{prefix}{name}: no telling which file belongs to which scan",
                **{f"{prefix}images": images, f"{prefix}{name}": pattern},
                fix=f"one * in {prefix}images, and a * for the same in the other: '*_T1.nii.gz' and '*_{name}.nii.gz'",
            )


def scans_called(input: Path, images: str, *beside: str) -> list[Series]:
    """The scans under ``input``, of NIfTI files those that ``images`` names and none of the patterns ``beside``.

    Raises
    ------
    MedfusionError : as ``discover``, or only files of the others are left.
    """
    found = [s for s in discover(input, images) if not any(fnmatchcase(s.files[0].name, p) for p in beside if p)]
    if not found:
        raise MedfusionError(f"{input}: no scan is called like {images} and not like {', '.join(beside)}")
    return found


def companion(series: Series, images: str, pattern: str, what: str) -> Path:
    """The file that ``pattern`` names for a scan; ``what`` it is ("mask", "labels") is for the error.

    Raises
    ------
    MedfusionError : the scan is no NIfTI file or not called like ``images``, or the file is not there.
    """
    if series.kind != "nifti":
        raise MedfusionError(f"{series.name}: {what} can be named for NIfTI files only", kind=series.kind)
    scan = series.files[0]
    if not fnmatchcase(scan.name, images):
        raise MedfusionError(f"{series.name}: no telling the {what} of a file that is not called like {images}")
    before, after = images.split("*")
    path = scan.parent / pattern.replace("*", scan.name[len(before) : len(scan.name) - len(after)])
    if not path.is_file():
        raise MedfusionError(f"{series.name}: no {what} where expected", expected=path)
    return path


def read_beside(path: Path, scan: Volume, what: str) -> Volume:
    """A mask or label map of a scan.

    Raises
    ------
    MedfusionError : it cannot be read, or does not lie on the grid of the scan.
    """
    [series] = discover(path)
    other = read(series)
    if other.shape != scan.shape:
        shapes = f"{scan.shape} and {other.shape}"
        raise MedfusionError(f"{scan.name}: scan and {what} have different shapes", shapes=shapes)
    corners = np.array(list(itertools.product(*((0, n - 1) for n in scan.shape))))
    apart = np.linalg.norm(other.to_world(corners) - scan.to_world(corners), axis=1).max()
    if apart > GRID_TOLERANCE * scan.spacing.min():
        raise MedfusionError(f"{scan.name}: scan and {what} lie apart", corners=f"up to {apart:.3g} mm")
    return other


def read_labels(path: Path, scan: Volume) -> Volume:
    """The label map of a scan, as uint8 where it fits and else as int16.

    Raises
    ------
    MedfusionError : as `read_beside`, or there are values that are no label.
    """
    labels = read_beside(path, scan, "labels")
    lowest, highest = labels.array.min(), labels.array.max()
    if lowest < 0 or highest > LARGEST_LABEL or (labels.array != np.rint(labels.array)).any():
        raise MedfusionError(
            f"{scan.name}: labels are whole numbers from 0 to {LARGEST_LABEL}",
            range=f"{lowest} to {highest}",
            fractions=int((labels.array != np.rint(labels.array)).sum()),
        )
    return labels.with_array(labels.array.astype(np.uint8 if highest < 256 else np.int16))


def without(found: list[Series], exclude: Sequence[str]) -> tuple[list[Series], tuple[str, ...]]:
    """The scans whose names no pattern of ``--exclude`` matches, and the names of the others.

    Raises
    ------
    MedfusionError : a pattern matches no scan, or none is left.
    """
    for pattern in exclude:
        if not any(fnmatchcase(series.name, pattern) for series in found):
            names = some(series.name for series in found)
            raise MedfusionError(f"--exclude {pattern}: no scan has such a name", scans=names)
    excluded = tuple(s.name for s in found if any(fnmatchcase(s.name, pattern) for pattern in exclude))
    if len(excluded) == len(found):
        raise MedfusionError(f"--exclude leaves none of {len(found)} scan(s)", fix="exclude fewer")
    return [series for series in found if series.name not in excluded], excluded
