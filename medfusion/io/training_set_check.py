"""Check a training set before work starts: every file is read, and every problem told at once."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from medfusion.errors import MedfusionError, some
from medfusion.io.companions import read_labels
from medfusion.io.discover import discover, read
from medfusion.io.training_set import TrainingCase, TrainingSet, raise_any


def check_training_set(training: TrainingSet, held_out: TrainingSet | None = None) -> None:
    """Read every scan and label map of one or two sets, and check that they fit and that no scan is there twice.

    Copies are told by their voxels whatever they are called; the files' types of number do not matter.

    Raises
    ------
    MedfusionError : lists every problem: files that cannot be read, grids that differ, values that are no label or
        have no name, no foreground in any case, copies, and cases or patients that are in both sets.
    """
    problems: list[str] = []
    first_with: dict[str, str] = {}  # digest of the voxels to name
    foreground = False
    for case in training.cases:
        digest, values, wrong = _measured(case, training.label_names)
        problems += wrong
        foreground |= bool(values - {0})
        if digest and first_with.setdefault(digest, case.name) != case.name:
            problems.append(f"{case.name}: same voxels as {first_with[digest]}")
    if not foreground:
        problems.append("no case has a label other than background")
    if held_out:
        problems += _problems_of_held_out(training, held_out, first_with)
    raise_any(training.root, problems, "mend these cases or take them out")


def _problems_of_held_out(training: TrainingSet, held_out: TrainingSet, trained_on: dict[str, str]) -> list[str]:
    """What is wrong with the held-out set; ``trained_on``: digest to name of the scans of the other."""
    names, patients = {case.name for case in training.cases}, {case.patient for case in training.cases}
    problems = [
        f"held-out set: the label {name} has the value {value}, in the training set {training.label_names[name]}"
        for name, value in held_out.label_names.items()
        if training.label_names.get(name, value) != value
    ]
    for case in held_out.cases:
        digest, _, wrong = _measured(case, training.label_names)
        problems += [f"held-out {line}" for line in wrong]
        if digest in trained_on:
            problems.append(f"held-out {case.name}: same voxels as {trained_on[digest]} of the training set")
        elif case.name in names:
            problems.append(f"held-out {case.name}: the training set has a case of this name")
        elif case.patient in patients:
            problems.append(f"held-out {case.name}: patient {case.patient} is in the training set too")
    return problems


def _measured(case: TrainingCase, names: dict[str, int]) -> tuple[str, set[int], list[str]]:
    """Digest of the scan's voxels ("" where they cannot be read), the values of its labels, and what is wrong."""
    digest = ""
    try:
        [series] = discover(case.image)
        scan = read(replace(series, name=case.name))
        digest = hashlib.sha256(str(scan.shape).encode() + scan.array.astype(np.float32).tobytes()).hexdigest()
        values = set(np.unique(read_labels(case.labels, scan).array).tolist()) if case.labels else set[int]()
    except MedfusionError as error:
        facts = ", ".join(f"{name} {value}" for name, value in error.facts.items())
        what = error.what if error.what.startswith(f"{case.name}: ") else f"{case.name}: {error.what}"
        return digest, set(), [f"{what} ({facts})" if facts else what]
    unnamed = sorted(values - set(names.values()))
    return digest, values, [f"{case.name}: no name for the labels {some(map(str, unnamed))}"] if unnamed else []
