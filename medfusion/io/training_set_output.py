"""Synthetic cases beside the real ones they come from: what describes both to nnU-Net, MONAI and readers of BIDS.

nnU-Net layout: the dataset.json lists the real cases where they lie and the synthetic ones in this folder, and no fold
of splits_final.json or of datalists/ trains on a case that was made from a patient it validates on.
BIDS layout: a derivative of the real set that holds the synthetic cases alone, their label maps in a derivative of it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medfusion import __version__
from medfusion.errors import MedfusionError, some
from medfusion.io.output import staged
from medfusion.io.training_set import CHANNEL, TrainingSet

MANIFEST = "manifest.json"
DESCRIPTIONS = {False: "dataset.json", True: "dataset_description.json"}  # by whether the layout is BIDS
BIDS_VERSION = "1.10.0"
Fold = dict[str, list[str]]  # "train" and "val" to names, as in splits_final.json
PARTICIPANTS = {
    "synthetic": {"Description": "true: the image was generated, in part from that of its first parent"},
    "parents": {"Description": "the real cases it was made from, with commas between them"},
}


def case_files(output: Path, name: str, ending: str, bids: bool, suffix: str) -> tuple[Path, Path]:
    """Where image and label map of a synthetic case go; ``suffix`` ("T1w") is for BIDS only."""
    if not bids:
        return output / "imagesTr" / f"{name}{CHANNEL}{ending}", output / "labelsTr" / f"{name}{ending}"
    subject = _subject(name)
    anat = Path(subject, "anat")
    labels = output / "derivatives" / "medfusion" / anat / f"{subject}_dseg{ending}"
    return output / anat / f"{subject}_{suffix}{ending}", labels


def read_manifest(output: Path) -> list[dict[str, Any]]:
    """The synthetic cases that earlier runs left in a folder, none where there was no run.

    Raises
    ------
    MedfusionError : the folder holds a dataset that medfusion did not make.
    """
    path = output / MANIFEST
    if not path.exists():
        for description in DESCRIPTIONS.values():
            if (output / description).exists():
                raise MedfusionError(
                    f"{output}: holds a dataset that medfusion did not make",
                    found=description,
                    fix="choose a new folder for synthetic cases",
                )
        return []
    try:
        cases = json.loads(path.read_text())
        if not all(isinstance(case["case"], str) and isinstance(case["parents"], list) for case in cases):
            raise ValueError("a case without a name or a list of parents")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedfusionError(f"{path}: not a list of synthetic cases", fix="choose a new folder") from error
    return list(cases)


def check_synthetic(output: Path, real: TrainingSet, synthetic: Sequence[dict[str, Any]], *, bids: bool) -> None:
    """Check, before work starts, that `write_description` can describe these cases, made already or planned.

    Raises
    ------
    MedfusionError : names that are not unique; a parent that is not in the real set; for nnU-Net, label values that do
        not count from 0 without a gap; ``output`` is in the other layout.
    """
    names = [case["case"] for case in synthetic]
    known = {case.name for case in real.cases}
    twice = Counter([*map(_subject, names)] if bids else [*names, *known])
    if repeated := [name for name, count in twice.items() if count > 1]:
        raise MedfusionError(f"{output}: two cases have one name", names=some(repeated), fix="name the new ones apart")
    if strangers := {case["case"]: parent for case in synthetic for parent in case["parents"] if parent not in known}:
        raise MedfusionError(
            f"{output}: {len(strangers)} synthetic case(s) come from scans that are not in the training set",
            cases=some(f"{name} from {parent}" for name, parent in strangers.items()),
            training_set=real.root,
            fix="a new folder: a scan that was taken out, to be held out perhaps, must not come back in its children",
        )
    values = sorted(real.label_names.values())
    if not bids and values != list(range(len(values))):
        raise MedfusionError(
            f"{real.root}: nnU-Net takes labels that count 0, 1, 2, ... without a gap",
            labels=some(map(str, values)),
            fix="renumber the labels of the real set, or write BIDS",
        )
    if (output / DESCRIPTIONS[not bids]).exists():
        raise MedfusionError(f"{output}: is a dataset in the other layout", fix="choose another folder")


def write_description(
    output: Path, real: TrainingSet, synthetic: Sequence[dict[str, Any]], *, bids: bool, folds: int = 5, seed: int
) -> None:
    """Describe all synthetic cases, whose files lie where `case_files` has them.

    Where there are none, an earlier description goes: it would list cases that are there no more.

    Parameters
    ----------
    synthetic : the entries of manifest.json. ``case`` is the name, ``parents`` are the names of the real cases that it
        was made from; ``stripped``, False where missing, is whether it shows a brain alone, which BIDS has to say.
    folds : of cross-validation over the labelled real cases, at most one a patient; none for one patient. nnU-Net
        splits at random, children and all, for a fold that is not there. A case with parents in every fold is in none.
    seed : of the folds. Another one makes other folds, with which nnU-Net does not go on in a preprocessed dataset.

    Raises
    ------
    MedfusionError : as `check_synthetic`, or the folder cannot be written.
    """
    if not synthetic:
        if (output / MANIFEST).exists():
            write_manifest(output, [])
            (output / DESCRIPTIONS[bids]).unlink(missing_ok=True)
        return
    check_synthetic(output, real, synthetic, bids=bids)
    write_manifest(output, synthetic)  # first: with a description alone the dataset would not be ours
    if bids:
        _write_bids(output, real, synthetic)
    else:
        _write_nnunet(output, real, synthetic, _folds(real, synthetic, folds, seed))


def write_manifest(output: Path, synthetic: Sequence[dict[str, Any]]) -> None:
    """What `read_manifest` reads."""
    _write_json(output / MANIFEST, list(synthetic))


def _folds(real: TrainingSet, synthetic: Sequence[dict[str, Any]], folds: int, seed: int) -> list[Fold]:
    """Each patient is validated on once, and no fold trains on what was made from those it validates on."""
    patient_of = {case.name: case.patient for case in real.cases}
    cases_of = defaultdict(list)
    for case in real.labelled:
        cases_of[case.patient].append(case.name)
    number = min(folds, len(cases_of))
    if number < 2:
        return []
    shuffled = np.random.default_rng(seed).permutation(sorted(cases_of)).tolist()
    validated: list[list[str]] = [[] for _ in range(number)]
    for patient in sorted(shuffled, key=lambda patient: -len(cases_of[patient])):  # the largest first: even folds
        min(validated, key=len).extend(cases_of[patient])
    splits = []
    for names in validated:
        away = {patient_of[name] for name in names}
        train = [case.name for case in real.labelled if case.patient not in away]
        train += [case["case"] for case in synthetic if not away & {patient_of[name] for name in case["parents"]}]
        splits.append({"train": train, "val": sorted(names)})
    return splits


def _write_nnunet(output: Path, real: TrainingSet, synthetic: Sequence[dict[str, Any]], splits: list[Fold]) -> None:
    files = {case.name: (case.image.absolute(), case.labels.absolute()) for case in real.cases if case.labels}
    for case in synthetic:
        files[case["case"]] = case_files(Path(), case["case"], real.file_ending, bids=False, suffix="")
    note = f"{len(synthetic)} of the cases are synthetic, see {MANIFEST}."
    dataset = real.about | {
        "channel_names": {"0": real.channel or "unknown"},
        "labels": real.label_names,
        "numTraining": len(files),
        "file_ending": real.file_ending,
        "name": f"{_name(real)} with synthetic cases",
        "description": " ".join(filter(None, (real.about.get("description"), note))),
        "dataset": {name: {"images": [str(image)], "label": str(labels)} for name, (image, labels) in files.items()},
    }
    _write_json(output / DESCRIPTIONS[False], dataset)
    if not splits:
        return
    _write_json(output / "splits_final.json", splits)
    made = {case["case"] for case in synthetic}
    with staged(output / "datalists", overwrite=True) as folder:
        folder.mkdir()
        for number, split in enumerate(splits):
            _write_json(folder / f"datalist_fold{number}.json", _datalist(real, files, split, made))


def _datalist(real: TrainingSet, files: dict[str, tuple[Path, Path]], split: Fold, made: set[str]) -> dict[str, Any]:
    """One fold as MONAI reads it, paths from its own folder; one list for all folds could not leave children out."""

    def items(names: Iterable[str]) -> list[dict[str, Any]]:
        return [
            {"image": _from_datalists(image), "label": _from_datalists(labels), "synthetic": name in made}
            for name in names
            for image, labels in [files[name]]
        ]

    return {
        "name": _name(real),
        "modality": {"0": real.channel or "unknown"},
        "labels": {str(value): name for name, value in real.label_names.items()},
        "numTraining": len(split["train"]),
        "training": items(split["train"]),
        "validation": items(split["val"]),
    }


def _from_datalists(path: Path) -> str:
    return str(path) if path.is_absolute() else os.path.join("..", path)


def _write_bids(output: Path, real: TrainingSet, synthetic: Sequence[dict[str, Any]]) -> None:
    about = {
        "Name": f"Synthetic cases after {_name(real)}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "medfusion", "Version": __version__, "Description": f"Synthetic, see {MANIFEST}"}],
        "SourceDatasets": [{"URL": real.root.absolute().as_uri()}],
        **({"License": real.about["licence"]} if "licence" in real.about else {}),
    }
    labels = about | {"Name": f"Label maps of the {about['Name']}"}
    people = [(_subject(case["case"]), "true", ",".join(case["parents"]) or "n/a") for case in synthetic]
    for case in synthetic:
        for image in output.glob(f"{_subject(case['case'])}/anat/*.nii*"):
            sidecar = {
                "Description": "Synthetic, made in part from the image of its first parent",
                "SkullStripped": bool(case.get("stripped")),
            }
            _write_json(image.with_name(image.name.split(".")[0] + ".json"), sidecar)
    _write(output / ".bidsignore", f"{MANIFEST}\nrun.json\n")
    _write_json(output / "participants.json", PARTICIPANTS)
    _write(output / "participants.tsv", _table(("participant_id", *PARTICIPANTS), sorted(people)))
    derivative = output / "derivatives" / "medfusion"
    _write(derivative / "dseg.tsv", _table(("index", "name"), [(v, name) for name, v in real.label_names.items()]))
    _write_json(derivative / DESCRIPTIONS[True], labels)
    _write_json(output / DESCRIPTIONS[True], about)


def _subject(name: str) -> str:
    """The name with letters and digits alone, as BIDS has it; an x parts what else would become one."""
    return "sub-" + re.sub(r"[^A-Za-z0-9]+", "x", name)


def _name(real: TrainingSet) -> str:
    return str(real.about.get("name") or real.root.absolute().name)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def _write_json(path: Path, content: object) -> None:
    _write(path, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    with staged(path, overwrite=True) as unfinished:
        unfinished.write_text(text)
