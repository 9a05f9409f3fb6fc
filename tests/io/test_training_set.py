"""A segmentation training set is read in three layouts, checked, and written with synthetic cases beside it."""

import csv
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicom_factory import write_series

from medfusion.errors import MedfusionError
from medfusion.io.training_set import TrainingCase, TrainingSet, read_training_set
from medfusion.io.training_set_check import check_training_set
from medfusion.io.training_set_output import case_files, check_synthetic, read_manifest, write_description

SHAPE = (6, 7, 5)
LABELS = {"background": 0, "oedema": 1, "tumour": 2}
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": LABELS,
    "numTraining": 3,
    "file_ending": ".nii.gz",
    "name": "Tumours",
    "licence": "CC BY 4.0",
    "description": "Seven sites.",
}


def oblique_affine() -> np.ndarray:
    turn, _ = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.5, 0.75, 3.0])
    affine[:3, 3] = -30, 12.5, 4
    return affine


AFFINE = oblique_affine()


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def scan(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


def label_map(*values: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[2:4, 2:4, 1 : 1 + len(values)] = values
    return array


def write_pair(image: Path, labels: Path, seed: int, *values: int) -> None:
    write(image, scan(seed))
    write(labels, label_map(*values))


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def nnunet(folder: Path, names: tuple[str, ...] = ("a", "b.1", "c"), ending: str = ".nii.gz", **changed: Any) -> Path:
    """A raw dataset whose last case has no labels."""
    write_json(folder / "dataset.json", DATASET | {"file_ending": ending} | changed)
    for seed, name in enumerate(names):
        write(folder / f"imagesTr/{name}_0000{ending}", scan(seed))
        if name != names[-1]:
            write(folder / f"labelsTr/{name}{ending}", label_map(1, 2))
    return folder


def bids(folder: Path, suffix: str = "T1w") -> Path:
    """Two subjects, the second in two sessions, of which one has no labels."""
    write_json(folder / "dataset_description.json", {"Name": "Heads", "BIDSVersion": "1.10.0", "License": "CC0"})
    cases = {"sub-01/anat/sub-01": "_desc-manual", "sub-02/ses-1/anat/sub-02_ses-1": "_space-orig_label-tumour"}
    for seed, (stem, entities) in enumerate(cases.items()):
        write_pair(
            folder / f"{stem}_{suffix}.nii.gz",
            folder / f"derivatives/drawn/{stem}{entities}_dseg.nii.gz",
            seed,
            1,
            seed + 1,
        )
    write(folder / f"sub-02/ses-2/anat/sub-02_ses-2_{suffix}.nii.gz", scan(2))
    return folder


def plain(folder: Path, ending: str = ".nii.gz") -> Path:
    for seed, (image, labels) in enumerate({"p.1_0000": "p.1", "q": "q", "r_0000": "r_0000"}.items()):
        write_pair(folder / f"images/{image}{ending}", folder / f"labels/{labels}{ending}", seed, 1, 3)
    write(folder / f"images/u{ending}", scan(9))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(MedfusionError) as caught:
        read_training_set(folder)
    assert caught.value.fix
    return str(caught.value)


def problems(training: TrainingSet, held_out: TrainingSet | None = None) -> list[str]:
    with pytest.raises(MedfusionError) as caught:
        check_training_set(training, held_out)
    return [value for name, value in caught.value.facts.items() if name.startswith("problem_")]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nnunet_raw(tmp_path: Path, ending: str) -> None:
    training = read_training_set(nnunet(tmp_path, ending=ending))
    assert training.cases == (
        TrainingCase("a", tmp_path / f"imagesTr/a_0000{ending}", tmp_path / f"labelsTr/a{ending}", "a"),
        TrainingCase("b.1", tmp_path / f"imagesTr/b.1_0000{ending}", tmp_path / f"labelsTr/b.1{ending}", "b.1"),
        TrainingCase("c", tmp_path / f"imagesTr/c_0000{ending}", None, "c"),
    )
    assert (training.label_names, training.channel, training.file_ending) == (LABELS, "MRI", ending)
    assert training.about == {"name": "Tumours", "licence": "CC BY 4.0", "description": "Seven sites."}
    assert [case.name for case in training.labelled] == ["a", "b.1"]
    assert [case.name for case in training.unlabelled] == ["c"]
    check_training_set(training)


def test_nnunet_dataset_that_lists_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANS", str(tmp_path / "elsewhere"))
    write_pair(tmp_path / "set/in/a.nii.gz", tmp_path / "set/out/a_seg.nii.gz", 0, 1)
    write_pair(tmp_path / "elsewhere/b.nii.gz", tmp_path / "elsewhere/b_seg.nii.gz", 1, 2)
    write(tmp_path / "elsewhere/c.nii.gz", scan(2))
    listed = {
        "b": {"images": ["$SCANS/b.nii.gz"], "label": str(tmp_path / "elsewhere/b_seg.nii.gz")},
        "a": {"images": ["in/a.nii.gz"], "label": "out/a_seg.nii.gz"},
        "c": {"images": ["../elsewhere/c.nii.gz"]},
    }
    write_json(tmp_path / "set/dataset.json", DATASET | {"dataset": listed})
    training = read_training_set(tmp_path / "set")
    assert [(case.name, bool(case.labels)) for case in training.cases] == [("a", True), ("b", True), ("c", False)]
    assert training.cases[1].image == tmp_path / "elsewhere/b.nii.gz"
    assert "dataset" not in training.about
    check_training_set(training)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"channel_names": {"0": "T1", "1": "T2"}}, "images of one channel"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "labels.whole  [1, 2]"),
        ({"labels": {"background": 0, "tumour": 1, "ignore": 2}}, "label to ignore"),
        ({"file_ending": ".png"}, "dataset.json.file_ending"),
        ({"file_ending": ".nii"}, "one file ending"),
        ({"labels": {"0": "background", "1": "tumour"}}, "nnUNetv2_convert_MSD_dataset"),
        ({"dataset": {}}, "dataset.json.dataset"),
        ({"dataset": {"a": {"images": ["t1.nii.gz", "t2.nii.gz"], "label": "a.nii.gz"}}}, "2 images of a"),
    ],
    ids=["channels", "regions", "ignore", "png", "other ending", "Decathlon", "empty list", "listed channels"],
)
def test_nnunet_datasets_that_no_prior_fits_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    assert message in refusal(nnunet(tmp_path, **changed))


def test_nnunet_files_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    write(nnunet(tmp_path / "channels") / "imagesTr/a_0001.nii.gz", scan(5))
    assert "a_0001.nii.gz" in refusal(tmp_path / "channels")
    write(nnunet(tmp_path / "orphans") / "labelsTr/lost.nii.gz", label_map(1))
    write(tmp_path / "orphans/labelsTr/gone.nii.gz", label_map(1))
    text = refusal(tmp_path / "orphans")
    assert "2 problem(s)" in text
    assert "labelsTr/lost.nii.gz: no scan belongs" in text
    write(nnunet(tmp_path / "twice") / "imagesTr/a_0000.nii", scan(5))
    assert "imagesTr/a_0000.nii and imagesTr/a_0000.nii.gz: one case has both" in refusal(tmp_path / "twice")
    write_json(tmp_path / "empty/dataset.json", DATASET)
    assert "without a scan" in refusal(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/dataset.json").write_text("{")
    assert "not one of nnU-Net v2" in refusal(tmp_path / "broken")


def test_background_is_always_named(tmp_path: Path) -> None:
    training = read_training_set(nnunet(tmp_path, labels={"air": 0, "oedema": 1, "tumour": 2}))
    assert training.label_names == LABELS


def test_bids(tmp_path: Path) -> None:
    training = read_training_set(bids(tmp_path))
    assert [(case.name, case.patient) for case in training.cases] == [
        ("sub-01_T1w", "sub-01"),
        ("sub-02_ses-1_T1w", "sub-02"),
        ("sub-02_ses-2_T1w", "sub-02"),
    ]
    assert training.cases[0].labels == tmp_path / "derivatives/drawn/sub-01/anat/sub-01_desc-manual_dseg.nii.gz"
    assert [case.name for case in training.unlabelled] == ["sub-02_ses-2_T1w"]
    assert training.label_names == {"background": 0, "label 1": 1, "label 2": 2}
    assert (training.channel, training.file_ending) == ("T1w", ".nii.gz")
    assert training.about == {"name": "Heads", "licence": "CC0"}
    check_training_set(training)


def test_bids_names_labels_in_a_table(tmp_path: Path) -> None:
    table = bids(tmp_path) / "derivatives/drawn/desc-manual_dseg.tsv"
    table.write_text("index\tname\tcolor\n0\tUnknown\t#000000\n2\ttumour\t#ff0000\n1\toedema\t#00ff00\n")
    assert read_training_set(tmp_path).label_names == {"background": 0, "tumour": 2, "oedema": 1}
    for text, message in {
        "index,name\n1,tumour\n": "not a table of labels",
        "index\tname\none\ttumour\n": "not a table of labels",
        "index\tname\n1\ttumour\n2\ttumour\n": "a name stands for two labels",
    }.items():
        table.write_text(text)
        assert message in refusal(tmp_path)
    (tmp_path / "derivatives/other").mkdir()
    (tmp_path / "derivatives/other/dseg.tsv").write_text("index\tname\n")
    assert "several tables" in refusal(tmp_path)


def test_bids_refusals(tmp_path: Path) -> None:
    write(bids(tmp_path / "kinds") / "sub-01/anat/sub-01_FLAIR.nii.gz", scan(5))
    text = refusal(tmp_path / "kinds")
    assert "FLAIR  1 file(s), sub-01_FLAIR.nii.gz" in text
    assert "T1w    3 file(s)" in text
    second = "derivatives/second/sub-01/anat/sub-01_dseg.nii.gz"
    write(bids(tmp_path / "two") / second, label_map(1))
    assert f"and {second}: one case has both" in refusal(tmp_path / "two")
    orphan = "derivatives/drawn/sub-03/anat/sub-03_dseg.nii.gz"
    write(bids(tmp_path / "orphan") / orphan, label_map(1))
    assert f"{orphan}: no scan belongs" in refusal(tmp_path / "orphan")
    (bids(tmp_path / "broken") / "dataset_description.json").write_text("[1]")
    assert "not a description of a data set" in refusal(tmp_path / "broken")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_plain_folders(tmp_path: Path, ending: str) -> None:
    training = read_training_set(plain(tmp_path, ending))
    assert [(case.name, case.patient, case.labels) for case in training.cases] == [
        ("p.1", "p.1", tmp_path / f"labels/p.1{ending}"),
        ("q", "q", tmp_path / f"labels/q{ending}"),
        ("r_0000", "r_0000", tmp_path / f"labels/r_0000{ending}"),
        ("u", "u", None),
    ]
    assert training.label_names == {"background": 0, "label 1": 1, "label 3": 3}
    assert (training.channel, training.file_ending, training.about) == ("", ending, {})
    check_training_set(training)


def test_plain_folders_with_cases_numbered_from_0(tmp_path: Path) -> None:
    for number in range(3):
        name = f"case_{number:04d}.nii.gz"
        write_pair(tmp_path / "images" / name, tmp_path / "labels" / name, number, 1)
    assert [case.name for case in read_training_set(tmp_path).labelled] == ["case_0000", "case_0001", "case_0002"]


def test_plain_folders_that_are_refused(tmp_path: Path) -> None:
    write(plain(tmp_path / "channels") / "images/p.1_0001.nii.gz", scan(5))
    assert "p.1_0001.nii.gz" in refusal(tmp_path / "channels")
    write(plain(tmp_path / "endings") / "images/v.nii", scan(5))
    text = refusal(tmp_path / "endings")
    assert ".nii     1 file(s), v.nii" in text
    assert ".nii.gz  7 file(s)" in text
    write(plain(tmp_path / "orphan") / "labels/lost.nii.gz", label_map(1))
    assert "labels/lost.nii.gz: no scan belongs" in refusal(tmp_path / "orphan")


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    (plain(tmp_path) / "images/._q.nii.gz").write_bytes(b"left by macOS")
    (tmp_path / "labels/notes.txt").write_text("drawn in May")
    assert len(read_training_set(tmp_path).cases) == 4


def test_what_is_no_training_set_is_told_the_layouts(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    write(tmp_path / "loose/a.nii.gz", scan(0))
    write_series(tmp_path / "dicom/study", file_name="{:04d}".format)
    for folder, message in (("loose", "no known training set"), ("dicom", "holds DICOM only")):
        text = refusal(tmp_path / folder)
        assert message in text
        assert all(word in text for word in ("imagesTr", "dataset_description.json", "images/CASE.nii.gz"))
    write(tmp_path / "dicom/a.nii.gz", scan(0))
    assert "DICOM" not in refusal(tmp_path / "dicom")


def test_every_problem_is_listed(tmp_path: Path) -> None:
    nnunet(tmp_path, ("a", "apart", "fraction", "shape", "torn", "unnamed", "nan", "copy", "last"))
    moved = AFFINE.copy()
    moved[0, 3] += 5
    write(tmp_path / "labelsTr/apart.nii.gz", label_map(1), moved)
    write(tmp_path / "labelsTr/fraction.nii.gz", label_map(1).astype(np.float32) * 1.5)
    write(tmp_path / "labelsTr/shape.nii.gz", label_map(1)[:-1])
    torn = tmp_path / "imagesTr/torn_0000.nii.gz"
    torn.write_bytes(torn.read_bytes()[:200])
    write(tmp_path / "labelsTr/unnamed.nii.gz", label_map(1, 2, 7))
    write(tmp_path / "imagesTr/nan_0000.nii.gz", np.where(scan(0) > 100, np.nan, scan(0)))
    write(tmp_path / "imagesTr/copy_0000.nii.gz", scan(1).astype(np.float64))  # of "apart", whose labels are wrong
    found = {line.split(":")[0]: line for line in problems(read_training_set(tmp_path))}
    assert list(found) == ["apart", "copy", "fraction", "nan", "shape", "torn", "unnamed"]
    assert "lie apart" in found["apart"]
    assert "same voxels as apart" in found["copy"]
    assert "whole numbers" in found["fraction"]
    assert "NaN" in found["nan"]
    assert "different shapes" in found["shape"]
    assert "7" in found["unnamed"]


def test_a_listed_file_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.nii.gz", tmp_path / "a_seg.nii.gz", 0, 1)
    listed = {
        name: {"images": [f"{image}.nii.gz"], "label": f"{labels}.nii.gz"}
        for name, image, labels in (("a", "a", "a_seg"), ("b", "b", "a_seg"), ("c", "a", "c_seg"))
    }
    write_json(tmp_path / "dataset.json", DATASET | {"dataset": listed})
    found = problems(read_training_set(tmp_path))
    assert [line.split(":")[0] for line in found] == ["b", "c", "c"]
    assert all("no such file" in found[index] for index in (0, 1))
    assert "same voxels as a" in found[2]


def test_a_set_without_foreground_is_refused(tmp_path: Path) -> None:
    nnunet(tmp_path)
    for name in ("a", "b.1"):
        write(tmp_path / f"labelsTr/{name}.nii.gz", label_map())
    assert problems(read_training_set(tmp_path)) == ["no case has a label other than background"]


def test_label_maps_without_names_may_be_broken(tmp_path: Path) -> None:
    """Reading names the values that are there; the check tells of the rest."""
    plain(tmp_path)
    write(tmp_path / "labels/q.nii.gz", label_map(1, 5).astype(np.float32) * 0.5)
    (tmp_path / "labels/p.1.nii.gz").write_bytes(b"torn")
    training = read_training_set(tmp_path)
    assert training.label_names == {"background": 0, "label 1": 1, "label 3": 3}
    assert [line.split(":")[0] for line in problems(training)] == ["p.1", "q"]


def test_the_held_out_set_shares_nothing(tmp_path: Path) -> None:
    training = read_training_set(nnunet(tmp_path / "training"))
    apart = tmp_path / "apart"
    for seed, name in enumerate(("x", "y"), start=20):
        write_pair(apart / f"images/{name}.nii", apart / f"labels/{name}.nii", seed, 1, 2)
    check_training_set(training, read_training_set(apart))
    write(apart / "images/y.nii", scan(1).astype(np.float64))
    write(apart / "images/a.nii", scan(30))
    write(apart / "labels/x.nii", label_map(3))
    assert problems(training, read_training_set(apart)) == [
        "held-out a: the training set has a case of this name",
        "held-out x: no name for the labels 3",
        "held-out y: same voxels as b.1 of the training set",
    ]


def test_the_held_out_set_has_other_patients(tmp_path: Path) -> None:
    training = read_training_set(bids(tmp_path / "training"))
    write_json(tmp_path / "held/dataset_description.json", {})
    for seed, name in enumerate(("sub-02_ses-9", "sub-07")):
        subject = name.split("_")[0]
        write_pair(
            tmp_path / f"held/{subject}/anat/{name}_T1w.nii.gz",
            tmp_path / f"held/derivatives/drawn/{subject}/anat/{name}_dseg.nii.gz",
            seed + 40,
            1,
        )
    held_out = read_training_set(tmp_path / "held")
    assert problems(training, held_out) == ["held-out sub-02_ses-9_T1w: patient sub-02 is in the training set too"]


def test_the_held_out_set_names_labels_alike(tmp_path: Path) -> None:
    training = read_training_set(nnunet(tmp_path / "training"))
    names = ("x", "y", "z")
    held_out = nnunet(tmp_path / "held", names, labels={"background": 0, "tumour": 1, "oedema": 2})
    for seed, name in enumerate(names, start=20):
        write(held_out / f"imagesTr/{name}_0000.nii.gz", scan(seed))
    found = problems(training, read_training_set(held_out))
    assert found[0] == "held-out set: the label tumour has the value 1, in the training set 2"


def synthesise(output: Path, real: TrainingSet, parents: dict[str, list[str]], bids: bool = False) -> list[dict]:
    """Synthetic cases, by name with their parents, written as the task would."""
    cases = []
    for seed, (name, of) in enumerate(parents.items(), start=1000):
        image, labels = case_files(output, name, real.file_ending, bids, "T1w")
        write_pair(image, labels, seed, 1, 2)
        cases.append({"case": name, "synthetic": True, "parents": of, "seed": seed, "prior": "brain-t1"})
    return cases


def real_set(folder: Path, patients: int = 6, ending: str = ".nii.gz") -> TrainingSet:
    """Labelled cases r0, r1, ... and an unlabelled one."""
    return read_training_set(nnunet(folder, (*(f"r{n}" for n in range(patients)), "unlabelled"), ending))


def check_as_nnunet(folder: Path) -> dict[str, dict[str, Any]]:
    """What nnU-Net v2's `verify_dataset_integrity` asks of a raw dataset, restated; returns name to files."""
    dataset = read_json(folder / "dataset.json")
    assert {"labels", "channel_names", "numTraining", "file_ending"} <= set(dataset)
    assert len(dataset["channel_names"]) == 1
    assert dataset["labels"]["background"] == 0
    values = sorted(dataset["labels"].values())
    assert values == list(range(len(values)))
    assert len(dataset["dataset"]) == dataset["numTraining"]
    for files in dataset["dataset"].values():
        [path] = files["images"]
        assert all(name.endswith(dataset["file_ending"]) for name in (path, files["label"]))
        image, labels = nibabel.load(folder / path), nibabel.load(folder / files["label"])
        assert image.shape == labels.shape
        np.testing.assert_allclose(image.header.get_zooms(), labels.header.get_zooms(), rtol=1e-5)
        np.testing.assert_allclose(image.affine, labels.affine, rtol=1e-5, atol=1e-8)
        assert not np.isnan(image.get_fdata()).any()
        assert set(np.unique(labels.dataobj)) <= set(values)
    return dataset["dataset"]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nnunet_description_lists_real_and_synthetic_cases(tmp_path: Path, ending: str) -> None:
    real, output = real_set(tmp_path / "real", ending=ending), tmp_path / "out"
    cases = synthesise(output, real, {"synth-0-0001": ["r0"], "synth-0-0002": ["r1", "r2"]})
    write_description(output, real, cases, bids=False, seed=0)
    listed = check_as_nnunet(output)
    assert list(listed) == ["r0", "r1", "r2", "r3", "r4", "r5", "synth-0-0001", "synth-0-0002"]
    assert listed["r0"]["images"] == [str(tmp_path / f"real/imagesTr/r0_0000{ending}")]
    assert listed["synth-0-0001"] == {
        "images": [f"imagesTr/synth-0-0001_0000{ending}"],
        "label": f"labelsTr/synth-0-0001{ending}",
    }
    dataset = read_json(output / "dataset.json")
    assert {key: dataset[key] for key in ("labels", "channel_names", "licence")} == {
        "labels": LABELS,
        "channel_names": {"0": "MRI"},
        "licence": "CC BY 4.0",
    }
    assert dataset["description"] == "Seven sites. 2 of the cases are synthetic, see manifest.json."
    assert read_manifest(output) == cases
    assert len(read_training_set(output).labelled) == 8


def test_nnunet_itself_accepts_the_description(tmp_path: Path) -> None:
    integrity = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity")
    real, output = real_set(tmp_path / "real"), tmp_path / "Dataset001_Out"
    cases = synthesise(output, real, {"synth-0-0001": ["r0"], "synth-0-0002": ["r1", "r2"]})
    write_description(output, real, cases, bids=False, seed=0)
    integrity.verify_dataset_integrity(str(output), 1)


def folds(output: Path) -> list[dict[str, list[str]]]:
    return read_json(output / "splits_final.json")


@pytest.mark.parametrize("seed", range(25))
def test_no_fold_trains_on_a_child_of_a_patient_it_validates(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    image = Path("nowhere.nii.gz")  # nothing is read
    names = [f"r{n}" for n in range(rng.randint(2, 14))]
    patient = {name: f"p{rng.randint(0, 9)}" for name in names} | {names[0]: "p0", names[1]: "p1"}
    labelled = {name: rng.random() < 0.8 for name in names} | {names[0]: True, names[1]: True}
    cases = tuple(TrainingCase(name, image, image if labelled[name] else None, patient[name]) for name in names)
    real = TrainingSet(tmp_path, cases, LABELS, "MRI", ".nii.gz")
    parents = {f"s{n}": rng.sample(names, rng.randint(1, min(3, len(names)))) for n in range(rng.randint(1, 30))}
    synthetic = [{"case": name, "parents": of} for name, of in parents.items()]
    number = rng.randint(2, 6)
    write_description(tmp_path, real, synthetic, bids=False, folds=number, seed=seed)

    splits = folds(tmp_path)
    real_names = {case.name for case in real.labelled}
    assert len(splits) == min(number, len({patient[name] for name in real_names}))
    assert sorted(name for split in splits for name in split["val"]) == sorted(real_names)
    for split in splits:
        away = {patient[name] for name in split["val"]}
        assert split["val"]
        assert not set(split["train"]) & set(split["val"])
        allowed = {name for name, of in parents.items() if not away & {patient[parent] for parent in of}}
        assert set(split["train"]) == {name for name in real_names if patient[name] not in away} | allowed


def test_folds_are_even_shuffled_and_repeatable(tmp_path: Path) -> None:
    real = real_set(tmp_path / "real", 10)
    cases = synthesise(tmp_path / "out", real, {"s": ["r0"]})

    def validated(seed: int) -> list[list[str]]:
        write_description(tmp_path / "out", real, cases, bids=False, seed=seed)
        return [split["val"] for split in folds(tmp_path / "out")]

    assert [len(names) for names in validated(0)] == [2] * 5
    assert validated(0) == validated(0)
    assert validated(0) != validated(1)


def test_small_sets_have_fewer_folds_and_one_case_none(tmp_path: Path) -> None:
    for number, expected in ((3, 3), (2, 2), (1, None)):
        real, output = real_set(tmp_path / f"real{number}", number), tmp_path / f"out{number}"
        write_description(output, real, synthesise(output, real, {"s": ["r0"]}), bids=False, seed=0)
        check_as_nnunet(output)
        assert (output / "splits_final.json").exists() == (output / "datalists").exists() == bool(expected)
        if expected:
            assert len(folds(output)) == len(list((output / "datalists").iterdir())) == expected


def test_monai_reads_the_datalists(tmp_path: Path) -> None:
    from monai.data import load_decathlon_datalist

    real, output = real_set(tmp_path / "real"), tmp_path / "out"
    write_description(output, real, synthesise(output, real, {"s1": ["r0"], "s2": ["r1"]}), bids=False, seed=0)
    for number, split in enumerate(folds(output)):
        for key, names in (("training", split["train"]), ("validation", split["val"])):
            items = load_decathlon_datalist(output / f"datalists/datalist_fold{number}.json", data_list_key=key)
            assert [item["synthetic"] for item in items] == [name in ("s1", "s2") for name in names]
            for item, name in zip(items, names, strict=True):
                assert nibabel.load(item["image"]).shape == nibabel.load(item["label"]).shape
                assert Path(item["label"]).name == f"{name}.nii.gz"


def test_another_run_adds_cases(tmp_path: Path) -> None:
    real, output = real_set(tmp_path / "real"), tmp_path / "out"
    assert read_manifest(output) == []
    write_description(output, real, [], bids=False, seed=0)
    assert not output.exists()
    write_description(output, real, synthesise(output, real, {"synth-0-0001": ["r0"]}), bids=False, seed=0)
    more = [*read_manifest(output), *synthesise(output, real, {"synth-1-0001": ["r0"]})]
    write_description(output, real, more, bids=False, seed=0)
    assert [case["case"] for case in read_manifest(output)] == ["synth-0-0001", "synth-1-0001"]
    assert len(check_as_nnunet(output)) == 8


@pytest.mark.parametrize("description", ["dataset.json", "dataset_description.json"])
def test_a_dataset_of_others_is_refused(tmp_path: Path, description: str) -> None:
    write_json(tmp_path / description, {})
    with pytest.raises(MedfusionError, match="that medfusion did not make"):
        read_manifest(tmp_path)
    for content in ({"version": 1}, [1], [{"case": "a"}], [{"case": 1, "parents": []}], 3):
        write_json(tmp_path / "manifest.json", content)
        with pytest.raises(MedfusionError, match="not a list of synthetic cases"):
            read_manifest(tmp_path)


def test_what_cannot_be_described_is_told_before_the_work(tmp_path: Path) -> None:
    real = real_set(tmp_path / "real")

    def refused(message: str, *cases: dict[str, Any], of: TrainingSet = real, bids: bool = False) -> None:
        with pytest.raises(MedfusionError, match=message):
            check_synthetic(tmp_path / "out", of, cases, bids=bids)

    case = {"case": "s", "parents": ["r0"]}
    check_synthetic(tmp_path / "out", real, [case], bids=False)
    refused("two cases have one name", case, case)
    refused("two cases have one name", case | {"case": "r1"})
    refused("two cases have one name", case | {"case": "s-1"}, case | {"case": "s_1"}, bids=True)
    refused("1 synthetic case.* not in the training set", case, {"case": "t", "parents": ["r0", "held"]})
    gaps = read_training_set(plain(tmp_path / "gaps"))
    refused("without a gap", {"case": "s", "parents": ["q"]}, of=gaps)
    check_synthetic(tmp_path / "out", gaps, [{"case": "s", "parents": ["q"]}], bids=True)
    write_description(tmp_path / "out", real, [case], bids=False, seed=0)
    refused("other layout", case, bids=True)
    assert not (tmp_path / "out/participants.tsv").exists()


def test_bids_description(tmp_path: Path) -> None:
    real, output = real_set(tmp_path / "real"), tmp_path / "out"
    cases = synthesise(output, real, {"synth-0-0001": ["r0"], "synth-0-0002": ["r1", "r2"]}, bids=True)
    cases[1]["stripped"] = True
    write_description(output, real, cases, bids=True, seed=0)
    assert read_manifest(output) == cases
    description = read_json(output / "dataset_description.json")
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "medfusion"
    assert description["License"] == "CC BY 4.0"
    assert read_json(output / "derivatives/medfusion/dataset_description.json")["GeneratedBy"]
    assert "manifest.json" in (output / ".bidsignore").read_text().splitlines()
    assert read_table(output / "participants.tsv") == [
        {"participant_id": "sub-synthx0x0001", "synthetic": "true", "parents": "r0"},
        {"participant_id": "sub-synthx0x0002", "synthetic": "true", "parents": "r1,r2"},
    ]
    for number, stripped in ((1, False), (2, True)):
        sidecar = read_json(output / f"sub-synthx0x000{number}/anat/sub-synthx0x000{number}_T1w.json")
        assert sidecar == {
            "Description": "Synthetic, made in part from the image of its first parent",
            "SkullStripped": stripped,
        }
    again = read_training_set(output)
    assert [case.name for case in again.labelled] == ["sub-synthx0x0001_T1w", "sub-synthx0x0002_T1w"]
    assert again.label_names == LABELS
    check_training_set(again)


@pytest.mark.skipif(not shutil.which("bids-validator-deno"), reason="needs bids-validator-deno")
def test_the_bids_validator_accepts_the_description(tmp_path: Path) -> None:
    real, output = real_set(tmp_path / "real"), tmp_path / "out"
    cases = synthesise(output, real, {"synth-0-0001": ["r0"], "synth-0-0002": ["r1", "r2"]}, bids=True)
    write_description(output, real, cases, bids=True, seed=0)
    done = subprocess.run(["bids-validator-deno", output, "--recursive"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_in_bids_stay_apart() -> None:
    files = {case_files(Path(), name, ".nii.gz", True, "T1w") for name in ("synth-1-10001", "synth-11-0001")}
    assert len(files) == 2
    assert all(path.name.split("_")[0].removeprefix("sub-").isalnum() for pair in files for path in pair)
