"""Evaluation of detection: the tables that are written, and what is refused."""

import csv
import json
from dataclasses import fields, replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from detection_factory import random_case
from prior_factory import grid, random_prior, saved

from medfusion.errors import MedfusionError
from medfusion.reference import Reference
from medfusion.tasks.evaluate_detection import (
    OUTPUTS,
    evaluate_detection,
    pick_methods,
    read_patients,
    write_results,
)
from medfusion.tasks.measure_detection import summarise
from medfusion.tasks.rebuild import METHODS


def test_tables(tmp_path: Path) -> None:
    results = [random_case(k, "ours", 3.0, patient="p", ill=k > 0) for k in range(3)]
    write_results(tmp_path, results, summarise(results))
    cases, lesions = (list(csv.DictReader((tmp_path / name).open())) for name in OUTPUTS[:2])
    assert [row["case"] for row in cases] == ["s0", "s1", "s2"]
    assert {row["patient"] for row in cases} == {"p"}
    assert (cases[0]["auprc"], cases[0]["dice"], cases[0]["lesions"]) == ("", "", "0")
    assert float(cases[1]["auprc"]) > 0.1
    assert float(cases[1]["lesion_ml"]) == 7
    assert [(row["case"], row["lesion"], row["ml"]) for row in lesions] == [
        ("s1", "1", "6"),
        ("s1", "2", "1"),
        ("s2", "1", "6"),
        ("s2", "2", "1"),
    ]
    content = json.loads((tmp_path / OUTPUTS[2]).read_text(), parse_constant=pytest.fail)  # nan is no JSON
    assert (content["scans"], content["ill"], content["patients"]) == (3, 2, 1)
    assert content["measures"]["ours"]["auprc"]["low"] is None
    assert content["auprc_ratios"] == {}


def reference(method: str) -> Reference:
    return Reference(**dict.fromkeys([field.name for field in fields(Reference)], ()) | {"method": method})


def test_baselines_stand_beside_every_method() -> None:
    prior = replace(random_prior(), references=tuple(map(reference, ("blur", "fast", "intensity", "default"))))
    assert pick_methods(prior) == [m for m in METHODS if m in ("blur", "fast", "intensity", "default")]
    assert pick_methods(prior)[0] == "default"
    assert pick_methods(prior, ["fast"]) == ["fast", "intensity", "blur"]
    assert pick_methods(prior, ["blur", "fast"]) == ["blur", "fast", "intensity"]
    with pytest.raises(MedfusionError, match="no healthy reference for plain"):
        pick_methods(prior, ["plain", "fast"])
    with pytest.raises(MedfusionError, match="no healthy reference for any method"):
        pick_methods(random_prior())


def test_patients_from_a_table(tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\na,p1\nb,p1\nc,p2\n")
    assert read_patients(table, ["a", "b"]) == {"a": "p1", "b": "p1"}
    with pytest.raises(MedfusionError) as refused:
        read_patients(table, ["a", "x", "y"])
    assert "cases without a patient  x, y" in str(refused.value)
    table.write_text("case,patient\na,p1\na,p2\n")
    with pytest.raises(MedfusionError) as refused:
        read_patients(table, ["a"])
    assert "cases of two patients  a" in str(refused.value)
    table.write_text("scan,patient\na,p1\n")
    with pytest.raises(MedfusionError, match="lacks a column"):
        read_patients(table, ["a"])
    with pytest.raises(MedfusionError, match="cannot be read"):
        read_patients(tmp_path / "none.csv", ["a"])


def write(path: Path, array: np.ndarray, spacing: float = 2.0) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), grid(array.shape, (spacing,) * 3)), path)


def test_all_problems_of_files_are_named_before_work_starts(tmp_path: Path) -> None:
    scans, prior = tmp_path / "scans", saved(random_prior(), tmp_path)
    image = np.random.default_rng(0).random((10, 10, 10))
    lesion, brain = np.zeros((10, 10, 10)), np.zeros((10, 10, 10))
    lesion[2, 2, 2] = brain[5:, 5:, 5:] = 1
    for name in ("absent", "smaller", "moved", "outside", "empty"):
        write(scans / f"{name}.nii.gz", image)
        write(scans / f"{name}_brain.nii.gz", np.ones((10, 10, 10)))
        write(scans / f"{name}_lesions.nii.gz", lesion)
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    (scans / "absent_lesions.nii.gz").unlink()
    write(scans / "smaller_lesions.nii.gz", lesion[1:])
    write(scans / "moved_lesions.nii.gz", lesion, spacing=2.5)
    write(scans / "outside_brain.nii.gz", brain)
    write(scans / "empty_brain.nii.gz", 0 * brain)
    names = {"truth": "*_lesions.nii.gz", "masks": "*_brain.nii.gz"}
    with pytest.raises(MedfusionError) as refused:
        evaluate_detection(scans, tmp_path / "out", prior=prior, **names)
    lines = str(refused.value).splitlines()
    assert lines[0] == "6 of 6 scan(s) cannot be evaluated"
    told = {line.split()[0].removesuffix(".nii.gz"): line for line in lines[1:-1]}
    expected = {
        "absent": "no truth where expected",
        "smaller": "different shapes",
        "moved": "lie apart",
        "outside": "all lesions are outside the mask",
        "empty": "the mask is empty",
        "broken": "cannot be used",
    }
    assert {name: words in told[name] for name, words in expected.items()} == dict.fromkeys(expected, True)
    assert "--healthy-without-truth" in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"truth": "lesions.nii.gz"}, "--truth: no telling which file"),
        ({"images": "*_T?_*.nii.gz"}, "--truth: no telling which file"),
        ({"masks": "brain.nii.gz"}, "--masks: no telling which file"),
        ({"fdr": 0.0}, "false discovery rate 0.0"),
        ({"min_ml": -1.0}, "min_ml -1.0"),
        ({"methods": ["magic"]}, "no healthy reference for magic"),
    ],
)
def test_wrong_use(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    for name in ("a", "a_lesions"):
        write(tmp_path / "scans" / f"{name}.nii.gz", np.random.default_rng(0).random((10, 10, 10)))
    options = {"truth": "*_lesions.nii.gz", "prior": saved(random_prior(), tmp_path)} | changes
    with pytest.raises(MedfusionError, match=words.replace(".", r"\.")):
        evaluate_detection(tmp_path / "scans", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_results_are_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cases.csv").write_text("mine")
    with pytest.raises(MedfusionError, match="exists already"):
        evaluate_detection(tmp_path, tmp_path / "out", truth="*_lesions.nii.gz")
    assert (tmp_path / "out" / "cases.csv").read_text() == "mine"
