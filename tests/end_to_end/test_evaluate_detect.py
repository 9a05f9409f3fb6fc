"""`medfusion evaluate detect` as its users run it, with a prior that was calibrated on phantoms."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from command_line import assert_refused, medfusion
from prior_factory import CENTRE, grid, head, saved
from reference_factory import SIZE, calibrated, healthy

SHAPE = (SIZE,) * 3
LESION = (CENTRE + np.array((6, -5, 4)), 9.0, -500.0)
NAMES = ("--images", "*_T1.nii.gz", "--truth", "*_lesions.nii.gz")


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(calibrated(("intensity", "blur"), number=10), tmp_path_factory.mktemp("prior"))


def write(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), affine), path)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Two with a lesion, one without, and d, which is constant."""
    folder = tmp_path / "in"
    affine = grid(SHAPE)
    truth = head(affine, SHAPE, lesion=LESION) != head(affine, SHAPE)
    for name, seed, lesion in (("a", 20, LESION), ("b", 21, LESION), ("c", 22, None)):
        scan = healthy(seed, lesion=lesion)
        write(folder / f"{name}_T1.nii.gz", scan.array, scan.affine)
        write(folder / f"{name}_lesions.nii.gz", truth * (lesion is not None), scan.affine)
    write(folder / "d_T1.nii.gz", np.ones(SHAPE), affine)
    return folder


def test_a_folder_with_one_scan_that_fails(tmp_path: Path, scans: Path, prior: str) -> None:
    (tmp_path / "patients.csv").write_text("case,patient\na_T1,one\nb_T1,two\nc_T1,two\nd_T1,three\n")
    options = ["--prior", prior, "--method", "blur", "--patients", tmp_path / "patients.csv", "--device", "cpu"]
    options += ["--healthy-without-truth"]  # d has none
    done = medfusion("evaluate", "detect", scans, tmp_path / "out", *NAMES, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(" d_T1 " in line and " failed " in line for line in done.stdout.splitlines())
    assert "2 lesions in 2 of 3 scans, 2 patients" in done.stdout
    for words in ("AUPRC", "best Dice", "By lesion size", "AUPRC of blur", "Voxels of healthy scans"):
        assert words in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "cases.csv",
        "lesions.csv",
        "summary.json",
        "run.json",
    }
    rows = list(csv.DictReader((tmp_path / "out" / "cases.csv").open()))
    expected = [(case, method) for method in ("blur", "intensity") for case in ("a_T1", "b_T1", "c_T1")]
    assert [(row["case"], row["method"]) for row in rows] == expected  # the baseline beside what was asked for
    assert [row["lesions"] for row in rows] == ["1", "1", "0"] * 2
    assert all(float(row["lesion_ml"]) == pytest.approx(3.1, rel=0.2) for row in rows if row["lesions"] == "1")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    intensity = {name: each["value"] for name, each in summary["measures"]["intensity"].items()}
    assert intensity["auprc"] > 0.9  # a dark ball in heads that are much the same
    assert intensity["dice"] > 0.3
    assert (intensity["found"], intensity["scan_auroc"], intensity["sensitivity of 1 to 5 ml"]) == (1, 1, 1)
    assert summary["measures"]["intensity"]["auprc"]["low"] <= intensity["auprc"]
    assert set(summary["auprc_ratios"]) == {"intensity"}
    with (tmp_path / "out" / "lesions.csv").open() as file:
        found = [row["found"] for row in csv.DictReader(file) if row["method"] == "intensity"]
    assert found == ["1", "1"]


def test_no_truth_is_a_mistake_unless_told(tmp_path: Path, scans: Path) -> None:
    done = medfusion("evaluate", "detect", scans, tmp_path / "out", *NAMES)
    assert_refused(done, "1 of 4 scan(s) cannot be evaluated", "d_T1.nii.gz", "--healthy-without-truth")
    assert not (tmp_path / "out").exists()


def test_truth_has_to_be_named(tmp_path: Path, scans: Path) -> None:
    done = medfusion("evaluate", "detect", scans, tmp_path / "out")
    assert done.returncode == 2
    assert "--truth" in done.stderr
