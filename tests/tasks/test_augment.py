"""Augment: a valid nnU-Net raw dataset that says of every case that it is synthetic."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicom_factory import scanner_affine, stored_values, write_series
from prior_factory import grid, head, random_prior, saved, white_prior, write_head
from scipy import stats

from medfusion.data.intensity import measure_scale
from medfusion.errors import MedfusionError
from medfusion.tasks.augment import augment, deformed, generate_volume
from medfusion.volume import Volume


@pytest.fixture
def prior(tmp_path: Path) -> str:
    return saved(white_prior(), tmp_path)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for name in ("first", "second"):
        write_head(tmp_path / "in" / f"{name}.nii.gz")
    return tmp_path / "in"


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def check_raw_dataset(folder: Path) -> list[str]:
    """The rules of nnU-Net v2's raw format; returns the names of the cases."""
    dataset = content(folder / "dataset.json")
    assert {"channel_names", "labels", "numTraining", "file_ending"} <= set(dataset)
    assert dataset["file_ending"] == ".nii.gz"
    assert dataset["labels"]["background"] == 0
    assert sorted(dataset["labels"].values()) == list(range(len(dataset["labels"])))
    images = sorted((folder / "imagesTr").iterdir())
    labels = sorted((folder / "labelsTr").iterdir())
    names = [path.name.removesuffix(".nii.gz") for path in labels]
    channels = [f"{int(channel):04d}" for channel in dataset["channel_names"]]
    assert [path.name for path in images] == [f"{name}_{channel}.nii.gz" for name in names for channel in channels]
    assert dataset["numTraining"] == len(names)
    for name in names:
        image = nibabel.load(folder / "imagesTr" / f"{name}_0000.nii.gz")
        label = nibabel.load(folder / "labelsTr" / f"{name}.nii.gz")
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        assert label.get_data_dtype().kind == "u"
        assert set(np.unique(label.dataobj)) <= set(dataset["labels"].values())
        assert np.isfinite(image.get_fdata()).all()
    return names


def voxels(folder: Path, name: str) -> np.ndarray:
    return nibabel.load(folder / "imagesTr" / f"{name}_0000.nii.gz").get_fdata()


def test_an_nnunet_raw_dataset(tmp_path: Path, scans: Path, prior: str) -> None:
    out = tmp_path / "Dataset900_Synthetic"
    run = augment(scans, out, number=3, prior=prior, steps=2, seed=7)
    assert run.exit_code == 0
    assert check_raw_dataset(out) == ["synth-7-0001", "synth-7-0002", "synth-7-0003"]
    assert {path.name for path in out.iterdir()} == {
        "dataset.json",
        "imagesTr",
        "labelsTr",
        "provenance.json",
        "run.json",
    }


def test_every_case_says_that_it_is_synthetic(tmp_path: Path, scans: Path, prior: str) -> None:
    out = tmp_path / "out"
    augment(scans, out, number=3, prior=prior, steps=2)
    provenance = content(out / "provenance.json")
    assert [case["case"] for case in provenance] == ["synth-0-0001", "synth-0-0002", "synth-0-0003"]
    assert [case["parent"] for case in provenance] == ["first", "second", "first"]
    for case in provenance:
        assert case["synthetic"] is True
        assert (case["prior"], case["steps"], case["seed"], case["stripped"]) == ("tiny", 2, 0, False)
        header = nibabel.load(out / "imagesTr" / f"{case['case']}_0000.nii.gz").header
        assert b"SYNTHETIC" in header["descrip"].item()
    assert "synthetic" in content(out / "dataset.json")["description"]
    assert content(out / "dataset.json")["name"] == "synthetic tiny"


def test_a_sample_follows_the_prior() -> None:
    """The prior of white noise generates N(0, 1) in its units, in the lender's field of view and units."""
    shape = (40, 38, 30)
    affine = grid(shape, (2.0, 2.2, 3.0), "LPS", (5, 10, 15))
    lender = Volume(head(affine, shape, noise=20), affine, "lender")
    new = generate_volume(lender, white_prior(), name="new", strength=1.0, steps=20)
    np.testing.assert_allclose(new.spacing, [2, 2, 2], rtol=1e-6)
    assert new.orientation == "RAS"
    extent, expected = np.array(new.shape) * 2, np.array(shape) * [2.0, 2.2, 3.0]
    assert (np.abs(extent - expected) <= 1).all()
    centres = [v.to_world((np.array(v.shape) - 1) / 2) for v in (new, lender)]
    np.testing.assert_allclose(*centres, atol=1.5)
    scale = measure_scale(lender.array, 99)
    in_units_of_the_prior = scale.apply(new.array).ravel()
    # measured on the resampled lender, so the scales differ a little; the last step halves no variance
    assert np.mean(in_units_of_the_prior) == pytest.approx(0, abs=0.1)
    assert np.std(in_units_of_the_prior) == pytest.approx(1, abs=0.15)
    assert abs(stats.kurtosis(in_units_of_the_prior)) < 0.1


def test_the_same_seed_gives_the_same_voxels_whatever_else_is_made(tmp_path: Path, scans: Path) -> None:
    prior = saved(random_prior(), tmp_path)
    augment(scans, tmp_path / "two", number=2, prior=prior, steps=2, seed=1)
    augment(scans, tmp_path / "four", number=4, prior=prior, steps=2, seed=1)
    augment(scans, tmp_path / "other", number=2, prior=prior, steps=2, seed=2)
    np.testing.assert_array_equal(voxels(tmp_path / "two", "synth-1-0002"), voxels(tmp_path / "four", "synth-1-0002"))
    first, second = (voxels(tmp_path / "two", f"synth-1-000{n}") for n in (1, 2))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.9
    assert not np.array_equal(first, voxels(tmp_path / "other", "synth-2-0001"))


def test_a_stripped_sample_is_asked_for_in_the_context() -> None:
    lender = Volume(head(grid((36, 36, 36)), (36, 36, 36), noise=20), grid((36, 36, 36)), "lender")
    whole, brain = (
        generate_volume(lender, random_prior(), name="n", strength=1.0, steps=2, stripped=s).array
        for s in (False, True)
    )
    assert np.abs(whole - brain).mean() > 1.0


@pytest.mark.parametrize("number", [0, -3])
def test_no_cases_are_refused(tmp_path: Path, scans: Path, prior: str, number: int) -> None:
    with pytest.raises(MedfusionError, match=f"-n {number}: at least one case"):
        augment(scans, tmp_path / "out", number=number, prior=prior)
    assert not (tmp_path / "out").exists()


def test_one_file_cannot_hold_a_dataset(tmp_path: Path, scans: Path, prior: str) -> None:
    with pytest.raises(MedfusionError, match=r"out.nii.gz: one file cannot hold all results"):
        augment(scans, tmp_path / "out.nii.gz", number=1, prior=prior)
    assert not (tmp_path / "out.nii.gz").exists()


def test_resume_completes_a_partial_dataset(tmp_path: Path, scans: Path, prior: str) -> None:
    out, unbroken = tmp_path / "out", tmp_path / "unbroken"
    augment(scans, unbroken, number=3, prior=prior, steps=2)
    augment(scans, out, number=2, prior=prior, steps=2)
    (out / "labelsTr" / "synth-0-0002.nii.gz").unlink()
    run = augment(scans, out, number=3, prior=prior, steps=2, resume=True)
    assert [case.status for case in run.cases] == ["skipped", "done", "done"]
    assert check_raw_dataset(out) == ["synth-0-0001", "synth-0-0002", "synth-0-0003"]
    assert [case["case"] for case in content(out / "provenance.json")] == check_raw_dataset(out)
    for name in check_raw_dataset(out):
        np.testing.assert_array_equal(voxels(out, name), voxels(unbroken, name))


def test_resume_with_other_settings_makes_the_cases_anew(tmp_path: Path, scans: Path, prior: str) -> None:
    out = tmp_path / "out"
    augment(scans, out, number=2, prior=prior, steps=2)
    run = augment(scans, out, number=1, prior=prior, steps=3, resume=True)
    assert [case.status for case in run.cases] == ["done"]
    assert [(case["case"], case["steps"]) for case in content(out / "provenance.json")] == [
        ("synth-0-0001", 3),
        ("synth-0-0002", 2),
    ]


@pytest.mark.parametrize("provenance", [None, "{", '{"a": 1}', '[{"case": "x"}]'])
def test_a_dataset_that_is_not_ours_is_left_alone(
    tmp_path: Path, scans: Path, prior: str, provenance: str | None
) -> None:
    out = tmp_path / "Dataset001_Real"
    out.mkdir()
    (out / "dataset.json").write_text("real")
    if provenance is not None:
        (out / "provenance.json").write_text(provenance)
    with pytest.raises(MedfusionError, match=r"did not make|not a list of synthetic cases"):
        augment(scans, out, number=1, prior=prior, steps=2, overwrite=True)
    assert (out / "dataset.json").read_text() == "real"
    assert not (out / "imagesTr").exists()


def test_a_second_seed_adds_to_the_dataset(tmp_path: Path, scans: Path, prior: str) -> None:
    out = tmp_path / "out"
    augment(scans, out, number=2, prior=prior, steps=2, seed=0)
    augment(scans, out, number=1, prior=prior, steps=2, seed=1)
    assert check_raw_dataset(out) == ["synth-0-0001", "synth-0-0002", "synth-1-0001"]
    assert [case["seed"] for case in content(out / "provenance.json")] == [0, 0, 1]


def test_overwriting_fewer_cases_leaves_a_valid_dataset(tmp_path: Path, scans: Path, prior: str) -> None:
    out = tmp_path / "out"
    augment(scans, out, number=2, prior=prior, steps=2)
    augment(scans, out, number=1, prior=prior, steps=3, overwrite=True)
    assert check_raw_dataset(out) == ["synth-0-0001", "synth-0-0002"]
    assert [case["steps"] for case in content(out / "provenance.json")] == [3, 2]


def test_a_dicom_series_may_lend_its_grid(tmp_path: Path, prior: str) -> None:
    shape = (40, 40, 30)
    affine = scanner_affine("coronal", (2.0, 2.0, 2.7), angles=(3, 4, 5))
    affine[:3, 3] += np.array([3.0, -5.0, 7.0]) - nibabel.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
    write_series(tmp_path / "in", head(affine, shape, noise=20).clip(0).astype(np.uint16), affine)
    assert augment(tmp_path / "in", tmp_path / "out", number=1, prior=prior, steps=2).exit_code == 0
    assert check_raw_dataset(tmp_path / "out") == ["synth-0-0001"]


def test_strength_says_how_much_of_the_deformed_parent_is_kept() -> None:
    shape, affine = (40, 40, 40), grid((40, 40, 40))
    parent = Volume(head(affine, shape, noise=20), affine, "parent")
    correlation = []
    for strength in (0.05, 0.5, 1.0):
        new = generate_volume(parent, white_prior(), name="new", strength=strength, steps=3)
        correlation.append(np.corrcoef(new.array.ravel(), parent.array.ravel())[0, 1])
    assert correlation[0] > 0.7  # the deformation alone takes a part
    assert correlation[0] > correlation[1] + 0.1 > correlation[2] + 0.1
    assert abs(correlation[2]) < 0.05


def test_a_deformation_is_smooth_seeded_and_of_the_stated_size() -> None:
    shape = (48, 44, 40)
    index = np.indices(shape).astype(np.float32)
    moved = np.stack([deformed(axis, seed=5) - axis for axis in index])[:, 12:-12, 12:-12, 12:-12]
    np.testing.assert_array_equal(
        deformed(index[0], seed=5)[12:-12, 12:-12, 12:-12] - index[0, 12:-12, 12:-12, 12:-12], moved[0]
    )
    assert 1.0 < np.sqrt((moved**2).mean()) < 4.0
    assert np.abs(np.diff(moved, axis=1)).max() < 0.6  # voxels a voxel: nothing folds over
    assert not np.array_equal(deformed(index[0], seed=6), deformed(index[0], seed=5))


def test_unusable_scans_are_refused_by_name(tmp_path: Path, scans: Path, prior: str) -> None:
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    run = augment(scans, tmp_path / "out", number=2, prior=prior, steps=2)
    assert [(case.name, case.status) for case in run.cases] == [
        ("broken", "refused"),
        ("synth-0-0001", "done"),
        ("synth-0-0002", "done"),
    ]
    assert run.exit_code == 1
    assert check_raw_dataset(tmp_path / "out") == ["synth-0-0001", "synth-0-0002"]


def test_nothing_usable_to_lend_a_grid(tmp_path: Path, prior: str) -> None:
    write_series(tmp_path / "in", stored_values((5, 6, 1)))
    with pytest.raises(MedfusionError, match="no usable scan among 1") as error:
        augment(tmp_path / "in", tmp_path / "out", number=1, prior=prior)
    assert "single slice" in str(error.value.facts["first"])
