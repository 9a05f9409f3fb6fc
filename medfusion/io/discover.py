"""Find every scan under a path: NIfTI files, DICOM series, BIDS and nnU-Net raw folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from medfusion.errors import MedfusionError
from medfusion.io.series import Series
from medfusion.volume import Volume

NIFTI_SUFFIXES = (".nii", ".nii.gz")


def discover(path: Path, pattern: str = "") -> list[Series]:
    """Every scan under a path, sorted by name; headers are read, voxels are not.

    A file that is named like a scan and cannot be read becomes a Series with a problem; other files are passed over.

    Parameters
    ----------
    path : a NIfTI or DICOM file, a folder of them in any nesting, a BIDS data set (anatomical images), or an nnU-Net
        raw data set (images, not labels).
    pattern : shell pattern that the names of NIfTI files must match, e.g. ``*_T1w.nii.gz``; empty for all.

    Raises
    ------
    MedfusionError : there is no such path, or no scan under it.
    """
    path = Path(path)
    if not path.exists():
        raise MedfusionError(f"{path}: no such file or folder", fix="check the path")
    files = _candidates(path)
    nifti = [file for file in files if file.name.lower().endswith(NIFTI_SUFFIXES)]
    others = [file for file in files if file not in set(nifti)]
    wanted = [file for file in nifti if not pattern or fnmatch(file.name, pattern)]
    found = [*_discover_nifti(wanted, path), *_discover_dicom(others)]
    if not found:
        raise MedfusionError(
            f"{path}: no scan found",
            files_seen=len(files),
            **({"pattern": pattern} if pattern else {}),
            fix="give a NIfTI file (.nii, .nii.gz), or a folder with NIfTI or DICOM files",
        )
    return _with_unique_names(sorted(found, key=lambda series: (series.name, series.files)))


def read(series: Series, volume_index: int | None = None) -> Volume:
    """Voxels of a discovered scan.

    Parameters
    ----------
    series : from `discover`.
    volume_index : which volume of a 4D NIfTI, from 0; 3D scans have no choice and ignore it.

    Raises
    ------
    MedfusionError : the series has problems, all of which are listed, or its voxels cannot be read.
    """
    if series.problems:
        facts = {f"problem_{number}": problem for number, problem in enumerate(series.problems, start=1)}
        raise MedfusionError(f"{series.name}: cannot be used", **facts, fix="leave the series out, or export it again")
    if series.kind == "nifti":
        from medfusion.io.nifti import read_nifti

        return read_nifti(series, volume_index if len(series.shape) == 4 else None)
    from medfusion.io.dicom import read_dicom

    return read_dicom(series)


def read_volumes(series: Series, volume_index: int | None = None) -> Iterator[Volume]:
    """All volumes of a 4D NIfTI, read once, or the one that ``volume_index`` picks; of a 3D scan that.

    Raises
    ------
    MedfusionError : as ``read``.
    """
    if len(series.shape) < 4 or volume_index is not None or series.problems:
        return iter([read(series, volume_index)])
    from medfusion.io.nifti import read_nifti_volumes

    return read_nifti_volumes(series)


def _candidates(path: Path) -> list[Path]:
    """Files that may hold scans, in sorted order, as the folder's convention has it."""
    if path.is_file():
        return [path]
    nnunet_folders = [path / name for name in ("imagesTr", "imagesTs") if (path / name).is_dir()]
    if nnunet_folders and (path / "dataset.json").is_file():
        return [file for folder in nnunet_folders for file in _walk(folder)]
    if (path / "dataset_description.json").is_file():
        return [
            file
            for subject in sorted(path.glob("sub-*"))
            for file in _walk(subject)
            if "anat" in file.relative_to(path).parts[:-1]
        ]
    return list(_walk(path))


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, links followed, each folder once; hidden files and folders are left out."""
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _holds_no_scans(root, name))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _holds_no_scans(root: str, name: str) -> bool:
    """Labels of an nnU-Net raw data set, derivatives of a BIDS one; both may lie below a folder of data sets."""
    if name in ("labelsTr", "labelsTs"):
        return os.path.isfile(os.path.join(root, "dataset.json"))
    return name == "derivatives" and os.path.isfile(os.path.join(root, "dataset_description.json"))


def _refuse(error: OSError) -> None:
    raise MedfusionError(f"{error.filename}: the folder cannot be read", reason=error.strerror, fix="check its rights")


def _discover_nifti(files: list[Path], root: Path) -> list[Series]:
    from medfusion.io.nifti import describe_nifti

    return [describe_nifti(file, name) for file, name in zip(files, _nifti_names(files, root), strict=True)]


def _nifti_names(files: list[Path], root: Path) -> list[str]:
    """File names without suffix; with the folders below the root where file names repeat (``patient1_t1``)."""
    stems = [_stem(file.name) for file in files]
    if root.is_dir() and (root / "dataset.json").is_file() and all(stem.endswith("_0000") for stem in stems):
        stems = [stem.removesuffix("_0000") for stem in stems]  # nnU-Net, one channel
    count = Counter(stems)
    return [
        "_".join((*file.relative_to(root).parts[:-1], stem)) if count[stem] > 1 else stem
        for file, stem in zip(files, stems, strict=True)
    ]


def _stem(name: str) -> str:
    return next(name[: -len(suffix)] for suffix in reversed(NIFTI_SUFFIXES) if name.lower().endswith(suffix))


def _discover_dicom(files: list[Path]) -> list[Series]:
    if not files:
        return []
    from medfusion.io.dicom import describe_dicom, read_header

    headers, unreadable = [], []
    for file in files:
        try:
            headers.append(read_header(file))
        except MedfusionError as error:
            unreadable.append(Series(file.stem, "dicom", (file,), problems=(error.what,)))
    return [*describe_dicom(header for header in headers if header is not None), *unreadable]


def _with_unique_names(series: list[Series]) -> list[Series]:
    """Copies of one series in several folders get a number: ``003_t1_a1b2c3``, ``003_t1_a1b2c3_2``."""
    taken: set[str] = set()
    unique = []
    for one in series:
        name, number = one.name, 1
        while name in taken:
            number += 1
            name = f"{one.name}_{number}"
        taken.add(name)
        unique.append(replace(one, name=name))
    return unique
