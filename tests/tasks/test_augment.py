"""Augment: new pairs whose image shows its label map, as a dataset that says of every case that it is synthetic."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from prior_factory import conditional_prior, random_prior, saved, tiny_config, white_prior
from segmentation_factory import (
    BRIGHTNESS,
    NAMES,
    OFFSET,
    SHAPE,
    UNIT,
    label_map,
    painting_prior,
    write_pair,
    write_set,
)

from medfusion.errors import MedfusionError
from medfusion.io import discover, read
from medfusion.io.training_set import read_training_set
from medfusion.prior import build_autoencoder
from medfusion.tasks.augment import Request, augment, describe, make_cases, set_aside
from medfusion.tasks.draw_case import draw_case, read_parent


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("real") / "Dataset001_Body")


@pytest.fixture
def prior(tmp_path: Path) -> str:
    return saved(painting_prior(), tmp_path)


def made_by(real: Path, out: Path, prior: str, *, resume: bool = False, **asked: Any) -> Any:
    """Cases that nobody audits, described; returns the run."""
    run, made = make_cases(real, out, Request(**asked), prior=prior, resume=resume)
    describe(made)
    return run


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def pair(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    image = nibabel.load(folder / "imagesTr" / f"{name}_0000.nii.gz")
    labels = nibabel.load(folder / "labelsTr" / f"{name}.nii.gz")
    np.testing.assert_allclose(image.affine, labels.affine)
    assert labels.get_data_dtype() == np.uint8
    return image.get_fdata(), np.asarray(labels.dataobj)


def test_images_show_new_label_maps(real: Path, tmp_path: Path, prior: str) -> None:
    out = tmp_path / "out"
    run = made_by(real, out, prior, number=4, guidance=1.0, steps=2, seed=3)
    assert run.exit_code == 0
    cases = content(out / "manifest.json")
    assert [case["case"] for case in cases] == [f"synth-3-000{n}" for n in range(1, 5)]
    known = {case.name: case for case in read_training_set(real).cases}
    for case in cases:
        image, labels = pair(out, case["case"])
        assert all(not np.array_equal(labels, label_map(seed)) for seed in range(10))
        parent = read_parent(known[case["parents"][0]], painting_prior())
        assert image.shape == parent.image.shape
        painted = parent.scale.invert(np.array(BRIGHTNESS, np.float32)[labels])
        np.testing.assert_allclose(image, painted, atol=2e-3 * UNIT)
        assert (case["synthetic"], case["seed"], case["guidance"], case["prior"]) == (True, 3, 1.0, "tiny")
    header = nibabel.load(out / "imagesTr" / "synth-3-0001_0000.nii.gz").header
    assert b"SYNTHETIC" in header["descrip"].item()


def test_the_dataset_is_merged_with_the_real_one(real: Path, tmp_path: Path, prior: str) -> None:
    out = tmp_path / "out"
    made_by(real, out, prior, number=3, steps=2)
    dataset = content(out / "dataset.json")
    assert dataset["labels"] == NAMES
    assert dataset["numTraining"] == 13
    assert dataset["licence"] == "CC0"
    merged = read_training_set(out)
    assert len(merged.labelled) == 13
    assert {case.image.parent.parent for case in merged.cases} == {out, real}
    for split in content(out / "splits_final.json"):
        away = set(split["val"])
        for case in content(out / "manifest.json"):
            assert case["case"] not in away
            assert (case["case"] in split["train"]) == (not away & set(case["parents"]))


def test_a_case_depends_on_seed_and_number_alone(real: Path, tmp_path: Path) -> None:
    prior = saved(conditional_prior(), tmp_path)
    for name, number, seed in (("two", 2, 1), ("three", 3, 1), ("other", 2, 2)):
        made_by(real, tmp_path / name, prior, number=number, steps=2, seed=seed)
    for first, second in zip(
        pair(tmp_path / "two", "synth-1-0002"), pair(tmp_path / "three", "synth-1-0002"), strict=True
    ):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(pair(tmp_path / "two", "synth-1-0001")[1], pair(tmp_path / "other", "synth-2-0001")[1])


def test_generation_from_a_real_case_keeps_its_label_map_and_as_much_of_it_as_asked_for(tmp_path: Path) -> None:
    write_pair(tmp_path / "images" / "a.nii.gz", tmp_path / "labels" / "a.nii.gz", 1)
    [case] = read_training_set(tmp_path).cases
    prior = conditional_prior()
    parent = read_parent(case, prior)
    scan = read(discover(case.image)[0]).array
    apart = [
        np.abs(draw_case(parent, prior, label_map(1), name="a", strength=strength, steps=3).array - scan).mean()
        for strength in (0.01, 0.2, 0.6)
    ]
    assert apart[0] < 0.1 * UNIT
    assert apart[0] < apart[1] < apart[2]


def test_the_parents_image_goes_along_with_the_new_map(real: Path, tmp_path: Path) -> None:
    prior = saved(conditional_prior(), tmp_path)
    for strength in (0.02, 0.5):
        made_by(real, tmp_path / str(strength), prior, number=4, strength=strength, steps=2, guidance=1.0)
    for case in content(tmp_path / "0.02" / "manifest.json"):
        image, labels = pair(tmp_path / "0.02", case["case"])
        parent = label_map(int(case["parents"][0].removeprefix("case")))
        shown, before = (
            np.corrcoef(np.array(BRIGHTNESS)[one].ravel(), image.ravel())[0, 1] for one in (labels, parent)
        )
        assert shown > 0.9
        assert shown > before
        more, _ = pair(tmp_path / "0.5", case["case"])
        assert np.abs(more - image).mean() > 0.1 * UNIT


def test_at_strength_1_nothing_of_the_parents_image_is_left(tmp_path: Path) -> None:
    write_pair(tmp_path / "images" / "a.nii.gz", tmp_path / "labels" / "a.nii.gz", 1)
    [case] = read_training_set(tmp_path).cases
    prior = conditional_prior()
    parent, away = read_parent(case, prior), np.indices(SHAPE).astype(np.float32) + 3
    for strength, same in ((1.0, True), (0.9, False)):
        stays, goes = (
            draw_case(parent, prior, label_map(1), name="a", strength=strength, moved=moved, steps=2).array
            for moved in (None, away)
        )
        assert np.array_equal(stays, goes) == same


def test_from_real_takes_every_case_in_turn(real: Path, tmp_path: Path, prior: str) -> None:
    made_by(real, tmp_path / "out", prior, number=12, from_real=0.3, steps=2)
    parents = [case["parents"] for case in content(tmp_path / "out" / "manifest.json")]
    assert parents == [[f"case{n % 10:02d}"] for n in range(12)]
    np.testing.assert_array_equal(pair(tmp_path / "out", "synth-0-0003")[1], label_map(2))


def test_from_real_needs_no_prior_that_is_shown_labels(real: Path, tmp_path: Path) -> None:
    run = made_by(real, tmp_path / "out", saved(white_prior(), tmp_path), number=2, from_real=0.3, steps=2)
    assert run.exit_code == 0
    np.testing.assert_array_equal(pair(tmp_path / "out", "synth-0-0001")[1], label_map(0))


def write_lesions(folder: Path, ill: int = 5, healthy: int = 5) -> Path:
    """Bodies (label 1), some of them with a lesion (label 2) inside."""
    for seed in range(ill + healthy):
        labels = (label_map(seed) > 0).astype(np.uint8)
        if seed < ill:
            centre = np.argwhere(labels).mean(axis=0).round().astype(int)
            labels[tuple(slice(c - 1, c + 2) for c in centre)] = 2
        image = np.array(BRIGHTNESS, np.float32)[labels] + 0.1 * np.random.default_rng(seed).normal(size=SHAPE)
        for kind, array in (("images", UNIT * image + OFFSET), ("labels", labels)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(
                nibabel.Nifti1Image(array.astype(np.float32), np.diag([2, 2, 2, 1])), folder / kind / f"{seed}.nii"
            )
    return folder


def test_a_lesion_is_inserted_and_the_rest_of_the_scan_stays(tmp_path: Path, prior: str) -> None:
    data = write_lesions(tmp_path / "data")
    made_by(data, tmp_path / "out", prior, number=6, insert="label 2", guidance=1.0, steps=2)
    for number, case in enumerate(content(tmp_path / "out" / "manifest.json")):
        into, source = case["parents"]
        assert into == str(5 + number % 5)
        assert int(source) < 5
        old = nibabel.load(data / "images" / f"{into}.nii").get_fdata()
        before = np.asarray(nibabel.load(data / "labels" / f"{into}.nii").dataobj)
        image = nibabel.load(tmp_path / "out" / "imagesTr" / f"{case['case']}_0000.nii").get_fdata()
        labels = np.asarray(nibabel.load(tmp_path / "out" / "labelsTr" / f"{case['case']}.nii").dataobj)
        lesion = labels == 2
        assert 8 <= lesion.sum() <= 80
        assert (before[lesion] == 1).all()
        np.testing.assert_array_equal(labels[~lesion], before[~lesion])
        near = np.ones(SHAPE, bool)
        near[tuple(slice(max(0, a.min() - 2), a.max() + 3) for a in np.nonzero(lesion))] = False
        np.testing.assert_allclose(image[near], old[near], atol=1e-3)
        [parent] = [case for case in read_training_set(data).cases if case.name == into]
        painted = read_parent(parent, painting_prior()).scale.invert(np.full((1, 1, 1), BRIGHTNESS[2]))[0, 0, 0]
        np.testing.assert_allclose(image[lesion], painted, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"number": 0}, "at least one case"),
        ({"number": 1, "from_real": 0.5, "insert": "front"}, "two ways"),
        ({"number": 1, "from_real": 1.5}, "--from-real 1.5: a process time"),
        ({"number": 1, "strength": 0.0}, "--strength 0.0: a process time"),
        ({"number": 1, "insert": "lesion"}, "no such label"),
        ({"number": 1, "insert": "front"}, "every case has it"),
        ({"number": 1, "class_name": "ill"}, "--class ill"),
    ],
)
def test_requests_that_make_no_sense(
    real: Path, tmp_path: Path, prior: str, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(MedfusionError, match=problem):
        make_cases(real, tmp_path / "out", Request(**options), prior=prior)
    assert not (tmp_path / "out").exists()


def table_of_classes(path: Path, classes: str) -> str:
    """The class of each case of ``real``, a letter for each."""
    rows = [f"case{number:02d},{name}" for number, name in enumerate(classes)]
    path.write_text("\n".join(["case,class", *rows]) + "\n")
    return str(path)


def test_a_new_case_is_told_the_class_of_its_parent(real: Path, tmp_path: Path) -> None:
    prior, table = saved(conditional_prior(), tmp_path), table_of_classes(tmp_path / "classes.csv", "ababababab")
    made: dict[str, list[Any]] = {}
    for name, asked in (
        ("table", {"classes": table}),
        ("a", {"class_name": "a"}),
        ("b", {"class_name": "b"}),
        ("both", {"classes": table, "class_name": "b"}),
    ):
        made_by(real, tmp_path / name, prior, number=2, from_real=1.0, steps=2, **asked)
        manifest = content(tmp_path / name / "manifest.json")
        made[name] = [(case["class_name"], pair(tmp_path / name, case["case"])[0]) for case in manifest]
    assert [name for name, _ in made["table"]] == ["a", "b"]
    np.testing.assert_array_equal(made["table"][0][1], made["a"][0][1])
    np.testing.assert_array_equal(made["table"][1][1], made["b"][1][1])
    assert not np.array_equal(made["a"][0][1], made["b"][0][1])
    assert [name for name, _ in made["both"]] == ["b", "b"]
    np.testing.assert_array_equal(made["both"][0][1], made["b"][0][1])


def test_cases_are_made_anew_when_the_table_of_classes_has_changed(real: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"number": 1, "from_real": 1.0, "steps": 1, "classes": str(tmp_path / "classes.csv")}
    prior, out = saved(conditional_prior(), tmp_path), tmp_path / "out"
    table_of_classes(tmp_path / "classes.csv", "ababababab")
    made_by(real, out, prior, **asked)
    assert [case.status for case in made_by(real, out, prior, resume=True, **asked).cases] == ["skipped"]
    table_of_classes(tmp_path / "classes.csv", "bbabababab")
    assert [case.status for case in made_by(real, out, prior, resume=True, **asked).cases] == ["done"]
    assert content(out / "manifest.json")[0]["class_name"] == "b"


def test_classes_that_the_prior_does_not_know(real: Path, tmp_path: Path) -> None:
    prior, table = saved(conditional_prior(), tmp_path), table_of_classes(tmp_path / "classes.csv", "abcbababab")
    with pytest.raises(MedfusionError, match="does not fit") as error:
        make_cases(real, tmp_path / "out", Request(1, classes=table), prior=prior)
    assert error.value.facts["unknown_classes"] == "c"
    assert not (tmp_path / "out").exists()


def test_priors_that_were_not_trained_on_these_labels(real: Path, tmp_path: Path) -> None:
    def refused(prior: Any, problem: str) -> None:
        with pytest.raises(MedfusionError, match=problem):
            make_cases(real, tmp_path / "out", Request(1), prior=saved(prior, tmp_path))

    refused(random_prior(), "without label maps")
    config = painting_prior().config
    two = tiny_config(network={"located": False, "labels": 2}, data={"labels": "*"})
    refused(random_prior(config=two), "not trained on the labels")
    other = config.model_copy(update={"label_names": ("background", "front", "tail")})
    refused(replace(painting_prior(), config=other), "not trained on the labels")
    same = config.model_copy(update={"label_names": ("background", "Front", "Back")})
    run = made_by(real, tmp_path / "ok", saved(replace(painting_prior(), config=same), tmp_path), number=1, steps=1)
    assert run.exit_code == 0  # spelling does not matter


def test_a_latent_prior_inserts_nothing(tmp_path: Path) -> None:
    config = tiny_config(network={"labels": 3}, data={"labels": "*", "crop": 32}, autoencoder={"channels": (8, 8)})
    latent = replace(random_prior(config=config), autoencoder=build_autoencoder(config))
    data, path = write_lesions(tmp_path / "data"), saved(latent, tmp_path)
    with pytest.raises(MedfusionError, match="works on latents"):
        make_cases(data, tmp_path / "out", Request(1, insert="label 2"), prior=path)


def test_training_sets_that_cannot_be_used(tmp_path: Path, prior: str) -> None:
    few = write_set(tmp_path / "few", 7)
    with pytest.raises(MedfusionError, match="7 labelled case") as error:
        make_cases(few, tmp_path / "out", Request(1), prior=prior)
    assert str(error.value.facts["enough"]).startswith("8")
    bad = write_set(tmp_path / "bad", 9)
    off = np.diag([2.0, 2, 2, 1])
    off[0, 3] = 9
    nibabel.save(nibabel.Nifti1Image(label_map(2), off), bad / "labelsTr" / "case02.nii.gz")
    nibabel.save(
        nibabel.Nifti1Image(label_map(3) + np.float32(0.5), np.diag([2, 2, 2, 1])), bad / "labelsTr/case03.nii.gz"
    )
    with pytest.raises(MedfusionError, match="2 problem") as error:
        make_cases(bad, tmp_path / "out", Request(1), prior=prior)
    assert "case02: scan and labels lie apart" in str(error.value)
    assert "case03: labels are whole numbers" in str(error.value)


def test_a_folder_grows_with_another_seed_and_is_resumed(real: Path, tmp_path: Path, prior: str) -> None:
    out = tmp_path / "out"
    made_by(real, out, prior, number=2, steps=1)
    made_by(real, out, prior, number=1, steps=1, seed=1)
    assert [case["case"] for case in content(out / "manifest.json")] == ["synth-0-0001", "synth-0-0002", "synth-1-0001"]
    with pytest.raises(MedfusionError, match="exist already"):
        made_by(real, out, prior, number=2, steps=1)
    (out / "imagesTr" / "synth-1-0001_0000.nii.gz").unlink()
    run = made_by(real, out, prior, number=2, steps=1, seed=1, resume=True)
    assert [case.status for case in run.cases] == ["done", "done"]
    assert len(content(out / "manifest.json")) == 4
    run = made_by(real, out, prior, number=3, steps=1, seed=1, resume=True)
    assert [case.status for case in run.cases] == ["skipped", "skipped", "done"]
    with pytest.raises(MedfusionError, match="holds synthetic cases"):
        made_by(out, tmp_path / "again", prior, number=1)


def test_bids(real: Path, tmp_path: Path, prior: str) -> None:
    out = tmp_path / "out"
    made_by(real, out, prior, number=2, steps=1, bids=True)
    made = read_training_set(out)
    assert len(made.labelled) == 2
    assert made.label_names == NAMES


def test_cases_that_are_set_aside(real: Path, tmp_path: Path, prior: str) -> None:
    out = tmp_path / "out"
    _, made = make_cases(real, out, Request(3, steps=1), prior=prior)
    describe(set_aside(made, ["synth-0-0002"]))
    assert [case["case"] for case in content(out / "manifest.json")] == ["synth-0-0001", "synth-0-0003"]
    assert (out / "dropped" / "imagesTr" / "synth-0-0002_0000.nii.gz").exists()
    assert (out / "dropped" / "labelsTr" / "synth-0-0002.nii.gz").exists()
    assert content(out / "dataset.json")["numTraining"] == 12


def test_where_no_case_is_left_no_description_is(real: Path, tmp_path: Path, prior: str) -> None:
    out = tmp_path / "out"
    _, made = make_cases(real, out, Request(2, steps=1), prior=prior)
    describe(made)
    assert (out / "dataset.json").exists()
    describe(set_aside(made, ["synth-0-0001", "synth-0-0002"]))
    assert not (out / "dataset.json").exists()
    assert content(out / "manifest.json") == []
    made_by(real, out, prior, number=1, steps=1, seed=1)
    assert content(out / "dataset.json")["numTraining"] == 11


def test_lesions_that_the_border_cuts_are_not_inserted(tmp_path: Path, prior: str) -> None:
    data = write_lesions(tmp_path / "data")
    for seed in range(5):
        labels = np.zeros(SHAPE, np.float32)
        labels[:3, 10:13, 10:13] = 2
        labels[5:9, 10:13, 10:13] = 1
        nibabel.save(nibabel.Nifti1Image(labels, np.diag([2, 2, 2, 1])), data / "labels" / f"{seed}.nii")
    with pytest.raises(MedfusionError, match="cut off by the border"):
        make_cases(data, tmp_path / "out", Request(1, insert="label 2"), prior=prior)


def test_augment_audits_what_it_makes(real: Path, tmp_path: Path, prior: str) -> None:
    out = tmp_path / "out"
    run, audit = augment(real, out, Request(3, steps=1, guidance=1.0), prior=prior, audit_steps=2)
    assert run.exit_code == 0
    assert audit is not None
    assert audit.cases == ("synth-0-0001", "synth-0-0002", "synth-0-0003")
    left = {case["case"] for case in content(out / "manifest.json")} if len(audit.dropped) < 3 else set()
    assert left == set(audit.cases) - set(audit.dropped)
    assert {path.name for path in out.glob("dropped/labelsTr/*")} == {f"{name}.nii.gz" for name in audit.dropped}
