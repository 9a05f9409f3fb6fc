"""`medfusion detect` as its users run it."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from command_line import assert_refused, medfusion
from prior_factory import random_prior, saved, write_head
from reference_factory import calibrated, healthy


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(calibrated(("fast",)), tmp_path_factory.mktemp("prior"))


def write(seed: int, path: Path) -> Path:
    volume = healthy(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume.array.round().astype(np.int16), volume.affine), path)
    return path


def test_one_scan(prior: str, tmp_path: Path) -> None:
    done = medfusion("detect", write(50, tmp_path / "a.nii.gz"), tmp_path / "out", "--prior", prior, "--fast")
    assert done.returncode == 0, done.stderr
    assert "medfusion detect, prior tiny, cpu" in done.stdout
    assert "finding(s)" in done.stdout
    kinds = ("anomaly.nii.gz", "mask.nii.gz", "pvalue.nii.gz", "reconstruction.nii.gz", "residual.nii.gz")
    kinds += ("findings.csv", "findings.json", "review.html")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", *(f"a_{kind}" for kind in kinds)}
    assert "p of the heaviest region" in (tmp_path / "out" / "a_review.html").read_text()


def test_a_prior_without_reference(tmp_path: Path) -> None:
    scan = write_head(tmp_path / "a.nii.gz")
    done = medfusion("detect", scan, tmp_path / "out", "--prior", saved(random_prior(), tmp_path))
    assert_refused(done, "no healthy reference for the method 'default'", "medfusion calibrate")
    assert not (tmp_path / "out").exists()


def test_fast_is_a_method(prior: str, tmp_path: Path) -> None:
    scan = write_head(tmp_path / "a.nii.gz")
    done = medfusion("detect", scan, tmp_path / "out", "--prior", prior, "--fast", "--method", "blur")
    assert done.returncode == 2
    assert "--fast is a method, and --method names one" in done.stderr


def test_a_device_that_is_not_there(prior: str, tmp_path: Path) -> None:
    scan = write_head(tmp_path / "a.nii.gz")
    done = medfusion("detect", scan, tmp_path / "out", "--prior", prior, "--fast", "--device", "cuda:99")
    assert_refused(done, "--device cuda:99: cannot be used on this machine", "  Fix  ")
    assert not (tmp_path / "out").exists()
