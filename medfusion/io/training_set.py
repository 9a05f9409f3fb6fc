"""Segmentation training sets: scans and their label maps, as nnU-Net, BIDS or two plain folders lay them out."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from medfusion.errors import MedfusionError, some
from medfusion.io.discover import discover, read
from medfusion.io.nifti import SUFFIXES
from medfusion.volume import Volume

CHANNEL = "_0000"  # how nnU-Net names the first channel of an image, and the only one that a prior has
NOT_IN_SCANS = ("desc-", "label-", "res-", "seg-", "space-")  # BIDS entities that a label map has beside its scan's
LAYOUTS = {
    "nnU-Net": "dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz",
    "BIDS": "dataset_description.json, sub-ID/anat/sub-ID_T1w.nii.gz, derivatives/TOOL/sub-ID/anat/sub-ID_dseg.nii.gz",
    "plain": "images/CASE.nii.gz, labels/CASE.nii.gz",
}


@dataclass(frozen=True)
class TrainingCase:
    """A scan and its label map, None where it has none; ``patient`` is the BIDS subject, elsewhere the name."""

    name: str
    image: Path
    labels: Path | None
    patient: str


@dataclass(frozen=True)
class TrainingSet:
    """What a folder holds to train a segmentation network on.

    Attributes
    ----------
    cases : sorted by name.
    label_names : name to value; "background" is 0. Where no table names them, "label 1" for the value 1.
    channel : "MRI", "CT", "T1w", ...: nnU-Net's name of the one channel, the suffix of BIDS, "" for plain folders.
    file_ending : ".nii.gz" or ".nii", that of all files.
    about : what else the dataset.json says: name, licence, reference, ...
    """

    root: Path
    cases: tuple[TrainingCase, ...]
    label_names: dict[str, int]
    channel: str
    file_ending: str
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def labelled(self) -> tuple[TrainingCase, ...]:
        """The cases with a label map."""
        return tuple(case for case in self.cases if case.labels)

    @property
    def unlabelled(self) -> tuple[TrainingCase, ...]:
        """The scans without one."""
        return tuple(case for case in self.cases if not case.labels)


class _Files(BaseModel):
    images: list[str]
    label: str | None = None


class _DatasetJson(BaseModel, extra="allow"):
    """The part of nnU-Net v2's dataset.json that is used here."""

    channel_names: dict[str, str]
    labels: dict[str, int | list[int]]
    file_ending: Literal[".nii.gz", ".nii"]
    dataset: Annotated[dict[str, _Files], Field(min_length=1)] | None = None
    numTraining: int = 0


def read_training_set(folder: Path) -> TrainingSet:
    """The training set in a folder, which its layout names: nnU-Net raw (v2), BIDS, or images/ and labels/.

    Voxels are read only of label maps whose values no table names.

    Raises
    ------
    MedfusionError : no such layout or no scan; a label map without its scan; what a prior has no use for: several
        channels or kinds of image, nnU-Net's regions and its label to ignore; files of two endings.
    """
    if not folder.is_dir():
        raise MedfusionError(f"{folder}: no such folder", fix="check the path")
    if (folder / "dataset.json").is_file():
        return _read_nnunet(folder)
    if (folder / "dataset_description.json").is_file():
        return _read_bids(folder)
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        return _read_plain(folder)
    only_dicom = not _nifti_in(folder, "**/*") and any(map(_is_dicom, islice(folder.rglob("*"), 1000)))
    raise MedfusionError(
        f"{folder}: " + ("holds DICOM only, a training set is NIfTI files" if only_dicom else "no known training set"),
        **LAYOUTS,
        fix="lay the files out in one of these ways" + (", converted with dcm2niix for example" if only_dicom else ""),
    )


def read_scan(case: TrainingCase) -> Volume:
    """The scan of a case, under the case's name."""
    [series] = discover(case.image)
    return replace(read(replace(series, name=case.name)), name=case.name)


def raise_any(folder: Path, problems: Sequence[str], fix: str) -> None:
    """One error with all problems, if there are any."""
    if problems:
        raise MedfusionError(
            f"{folder}: {len(problems)} problem(s) with the training set",
            **{f"problem_{number}": problem for number, problem in enumerate(problems, start=1)},
            fix=fix,
        )


def _read_nnunet(folder: Path) -> TrainingSet:
    path = folder / "dataset.json"
    try:
        dataset = _DatasetJson.model_validate_json(path.read_bytes())
    except OSError as error:
        raise MedfusionError(f"{path}: cannot be read", reason=error.strerror, fix="check its rights") from error
    except ValidationError as error:
        raise MedfusionError(
            f"{path}: not one of nnU-Net v2 for NIfTI files",
            **{".".join(map(str, ("dataset.json", *one["loc"]))): one["msg"] for one in error.errors()},
            fix="its documentation says what belongs there; nnUNetv2_convert_MSD_dataset converts the Decathlon's",
        ) from error
    if len(dataset.channel_names) != 1:
        raise _several_channels(folder, ", ".join(dataset.channel_names.values()))
    cases = _listed_cases(folder, dataset.dataset) if dataset.dataset is not None else _cases_in_folders(folder)
    _check_ending(folder, cases, dataset.file_ending)
    [channel] = dataset.channel_names.values()
    names = _label_names(folder, dataset.labels)
    return TrainingSet(folder, cases, names, channel, dataset.file_ending, dataset.model_extra or {})


def _listed_cases(folder: Path, dataset: dict[str, _Files]) -> tuple[TrainingCase, ...]:
    """Cases by their paths, which nnU-Net takes from the folder and with environment variables."""
    for name, files in dataset.items():
        if len(files.images) != 1:
            raise _several_channels(folder, f"{len(files.images)} images of {name}")
    return tuple(
        TrainingCase(
            name,
            folder / os.path.expandvars(files.images[0]),
            folder / os.path.expandvars(files.label) if files.label else None,
            name,
        )
        for name, files in sorted(dataset.items())
    )


def _cases_in_folders(folder: Path) -> tuple[TrainingCase, ...]:
    def name(path: Path) -> str:
        return _stem(path).removesuffix(CHANNEL if path.parent.name == "imagesTr" else "")

    images = _nifti_in(folder, "imagesTr/*")
    if other := [path.name for path in images if not _stem(path).endswith(CHANNEL)]:
        raise _several_channels(folder, some(other))
    return _paired(folder, images, _nifti_in(folder, "labelsTr/*"), name, name)


def _several_channels(folder: Path, found: str) -> MedfusionError:
    fix = f"a set with one of them only, as CASE{CHANNEL}.nii.gz"
    return MedfusionError(f"{folder}: a prior knows images of one channel", found=found, fix=fix)


def _label_names(folder: Path, labels: dict[str, int | list[int]]) -> dict[str, int]:
    if "ignore" in labels:
        raise MedfusionError(
            f"{folder}: nnU-Net's label to ignore has no meaning for a prior",
            ignore=labels["ignore"],
            fix="label these voxels, or leave the cases with such voxels out, and take it out of dataset.json",
        )
    if regions := {name: values for name, values in labels.items() if isinstance(values, list)}:
        raise MedfusionError(
            f"{folder}: nnU-Net's regions, names of several values, are not supported",
            **{f"labels.{name}": values for name, values in regions.items()},
            fix="name each value once in dataset.json",
        )
    return _with_background((name, value) for name, value in labels.items() if isinstance(value, int))


def _read_bids(folder: Path) -> TrainingSet:
    images = _nifti_in(folder, "sub-*/anat/*", "sub-*/ses-*/anat/*")
    labels = _nifti_in(folder, *(f"derivatives/*/sub-*/{session}anat/*_dseg.nii*" for session in ("", "ses-*/")))
    of_suffix = defaultdict(list)
    for path in images:
        of_suffix[_stem(path).split("_")[-1]].append(path.name)
    if len(of_suffix) > 1:
        raise MedfusionError(
            f"{folder}: several kinds of image, and no telling which to train on",
            **{suffix: f"{len(names)} file(s), {names[0]}" for suffix, names in of_suffix.items()},
            fix="a folder with the images of one kind, which may be links",
        )
    paired = _paired(folder, images, labels, _entities, _stem)
    cases = tuple(replace(case, patient=case.image.relative_to(folder).parts[0]) for case in paired)
    [suffix] = of_suffix
    names = _names_from_table(folder) or _names_from_values(cases)
    return TrainingSet(folder, cases, names, suffix, _check_ending(folder, cases), _about(folder))


def _entities(path: Path) -> frozenset[str]:
    return frozenset(entity for entity in _stem(path).split("_")[:-1] if not entity.startswith(NOT_IN_SCANS))


def _names_from_table(folder: Path) -> dict[str, int]:
    """The labels that a look-up table names, which BIDS has beside the subjects; empty where there is none."""
    tables = sorted(folder.glob("derivatives/*/*dseg.tsv"))
    if not tables:
        return {}
    if len(tables) > 1:
        names = ", ".join(str(table.relative_to(folder)) for table in tables)
        raise MedfusionError(f"{folder}: several tables of labels", tables=names, fix="leave the one that holds")
    try:
        with tables[0].open(newline="", encoding="utf-8-sig") as file:
            rows = [(row["name"].strip(), int(row["index"])) for row in csv.DictReader(file, delimiter="\t")]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError, TypeError, AttributeError) as error:
        fix = "columns index (a whole number) and name, with tabs between them"
        raise MedfusionError(f"{tables[0]}: not a table of labels", reason=repr(error), fix=fix) from error
    if len({name for name, _ in rows}) < len(rows):
        raise MedfusionError(f"{tables[0]}: a name stands for two labels", fix="give each label its own name")
    return _with_background(rows)


def _about(folder: Path) -> dict[str, Any]:
    """What dataset_description.json says, by the names that a dataset.json has for it."""
    path = folder / "dataset_description.json"
    try:
        described = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise MedfusionError(f"{path}: not a description of a data set", reason=error, fix="mend its JSON") from error
    names = {"Name": "name", "License": "licence", "DatasetDOI": "reference"}
    return {name: described[key] for key, name in names.items() if key in described}


def _read_plain(folder: Path) -> TrainingSet:
    images, labels = _nifti_in(folder, "images/*"), _nifti_in(folder, "labels/*")
    labelled = {_stem(path) for path in labels}

    def name(path: Path) -> str:  # case_0000 may be the first of many cases, or the first channel of one
        stem, bare = _stem(path), _stem(path).removesuffix(CHANNEL)
        return bare if bare in labelled and stem not in labelled else stem

    if other := [path.name for path in images if re.search(r"_000[1-9]$", name(path)) and name(path)[:-5] in labelled]:
        raise _several_channels(folder, some(other))
    cases = _paired(folder, images, labels, name, name)
    return TrainingSet(folder, cases, _names_from_values(cases), "", _check_ending(folder, cases))


def _names_from_values(cases: Sequence[TrainingCase]) -> dict[str, int]:
    """Names for all whole numbers above 0 in the label maps; what else they hold, `check_training_set` tells."""
    values: set[int] = set()
    for case in cases:
        if not case.labels:
            continue
        try:
            [series] = discover(case.labels)
            found = np.unique(read(series).array)
        except MedfusionError:
            continue
        values |= {int(value) for value in found if value > 0 and value == int(value)}
    return _with_background((f"label {value}", value) for value in sorted(values))


def _with_background(names: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Whatever a table calls it: nnU-Net wants this name."""
    return {"background": 0} | {name: value for name, value in names if value != 0 and name != "background"}


def _paired(
    folder: Path,
    images: Sequence[Path],
    labels: Sequence[Path],
    key: Callable[[Path], Hashable],
    name: Callable[[Path], str],
) -> tuple[TrainingCase, ...]:
    """Scans with the label maps that have the same key."""
    if not images:
        raise MedfusionError(
            f"{folder}: a training set without a scan", **LAYOUTS, fix="lay it out in one of these ways"
        )
    files: dict[Hashable, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for role, paths in enumerate((images, labels)):
        for path in paths:
            files[key(path)][role].append(path)
    problems = []
    for scans, maps in files.values():
        problems += [] if scans else [f"{maps[0].relative_to(folder)}: no scan belongs to this label map"]
        for several in (scans, maps):
            if len(several) > 1:
                problems.append(" and ".join(str(path.relative_to(folder)) for path in several) + ": one case has both")
    raise_any(folder, problems, "each case is one scan and at most one label map, called alike")
    cases = [TrainingCase(name(scan), scan, maps[0] if maps else None, name(scan)) for [scan], maps in files.values()]
    return tuple(sorted(cases, key=lambda case: case.name))


def _check_ending(folder: Path, cases: Sequence[TrainingCase], stated: str = "") -> str:
    """The one ending of all files, which is ``stated`` where dataset.json says so."""
    with_ending: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        for path in filter(None, (case.image, case.labels)):
            with_ending[path.name[len(_stem(path)) :] or path.suffix].append(path.name)
    if len(with_ending) > 1 or (stated and stated not in with_ending):
        raise MedfusionError(
            f"{folder}: a training set has one file ending",
            **{ending: f"{len(names)} file(s), {names[0]}" for ending, names in with_ending.items()},
            **({"dataset.json": stated} if stated else {}),
            fix="convert the others: nnU-Net too takes one only",
        )
    return next(iter(with_ending))


def _nifti_in(folder: Path, *patterns: str) -> list[Path]:
    found = (path for pattern in patterns for path in folder.glob(pattern))
    return sorted(path for path in found if path.name.endswith(SUFFIXES) and not path.name.startswith("."))


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _is_dicom(path: Path) -> bool:
    if not path.is_file() or not os.access(path, os.R_OK):
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
