"""`medfusion inspect` as its users run it."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_factory import PATIENT, scanner_affine, stored_values, write_series


def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medfusion", "inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "140"})


def write_good(folder: Path) -> np.ndarray:
    array = stored_values()
    write_series(folder, array, scanner_affine("sagittal"), SeriesNumber=1)
    return array


def write_bad(folder: Path) -> None:
    write_series(folder, stored_values((5, 6, 1)), SeriesNumber=2)


def test_a_sound_folder(tmp_path: Path) -> None:
    array = write_good(tmp_path)
    done = inspect(tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "001_t1_mprage" in line)
    for cell in ("dicom", "MR", "5×6×4", "0.9×1.1×2.5", "PIR", f"{array.min()} to {array.max()}"):
        assert cell in row


def test_json_holds_the_geometry(tmp_path: Path) -> None:
    array = write_good(tmp_path)
    volumes = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    nibabel.save(nibabel.Nifti1Image(volumes, np.diag([2, 2, 2, 1])), tmp_path / "four.nii.gz")
    done = inspect(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    dicom, nifti = json.loads(done.stdout)
    np.testing.assert_allclose(dicom.pop("affine"), scanner_affine("sagittal"), atol=1e-6)
    np.testing.assert_allclose(dicom.pop("spacing"), [0.9, 1.1, 2.5], atol=1e-6)
    assert dicom == {
        "name": "001_t1_mprage",
        "kind": "dicom",
        "modality": "MR",
        "shape": [5, 6, 4],
        "orientation": "PIR",
        "intensity_range": [array.min(), array.max()],
        "files": 4,
        "problems": [],
    }
    assert (nifti["name"], nifti["kind"], nifti["shape"], nifti["files"]) == ("four", "nifti", [2, 3, 4, 5], 1)
    assert nifti["intensity_range"] == [0, volumes[..., 0].max()]


def test_some_problems(tmp_path: Path) -> None:
    write_good(tmp_path / "good")
    write_bad(tmp_path / "bad")
    done = inspect(tmp_path)
    assert done.returncode == 1
    assert "002_t1_mprage: single slice: a volume needs two slices or more, found 1" in done.stdout


def test_damaged_voxels_are_a_problem_of_their_series_alone(tmp_path: Path) -> None:
    write_good(tmp_path / "good")
    path, *_ = write_series(tmp_path / "cut", SeriesNumber=2)
    path.write_bytes(path.read_bytes()[:-10])
    done = inspect(tmp_path, "--json")
    assert done.returncode == 1
    good, cut = json.loads(done.stdout)
    assert (good["problems"], cut["intensity_range"]) == ([], None)
    assert "the pixels cannot be read" in cut["problems"][0]
    assert "000.dcm" in cut["problems"][0]


def test_nothing_usable(tmp_path: Path) -> None:
    write_bad(tmp_path)
    assert inspect(tmp_path).returncode == 2
    assert inspect(tmp_path / "nowhere").returncode == 2


@pytest.mark.parametrize("option", [[], ["--json"]], ids=["table", "json"])
def test_patient_data_are_not_printed(tmp_path: Path, option: list[str]) -> None:
    write_good(tmp_path / "good")
    write_bad(tmp_path / "bad")
    done = inspect(tmp_path, *option)
    printed = (done.stdout + done.stderr).lower()
    assert "t1_mprage" in printed
    assert not any(word in printed for word in (*PATIENT.lower().split("^"), "4711", "1.2.3"))
