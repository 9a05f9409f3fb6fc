"""`medfusion calibrate` as its users run it."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from command_line import assert_refused, medfusion
from prior_factory import random_prior, saved
from reference_factory import healthy

from medfusion.prior import Prior


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten phantoms with masks of their tissue."""
    folder = tmp_path_factory.mktemp("healthy")
    for seed in range(10):
        volume = healthy(seed)
        for kind, array in (("T1", volume.array.round()), ("mask", volume.array > 200)):
            nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), volume.affine), folder / f"s{seed}_{kind}.nii.gz")
    return folder


PATTERNS = ("--images", "*_T1.nii.gz", "--masks", "*_mask.nii.gz")


def test_a_prior_gains_references_and_keeps_those_it_has(scans: Path, tmp_path: Path) -> None:
    prior, first, second = (
        saved(random_prior(), tmp_path),
        tmp_path / "first.safetensors",
        tmp_path / "second.safetensors",
    )
    done = medfusion("calibrate", prior, scans, "--out", first, "--method", "intensity", *PATTERNS)
    assert done.returncode == 0, done.stderr
    assert "tiny with what intensity leave(s) on 10 healthy scans" in " ".join(done.stdout.split())
    done = medfusion(
        "calibrate", first, scans, "--out", second, "--method", "blur", "--method", "intensity", "--strip", *PATTERNS
    )
    assert done.returncode == 0, done.stderr
    known = {(reference.method, reference.stripped): reference for reference in Prior.load(second).references}
    assert set(known) == {("intensity", False), ("blur", True), ("intensity", True)}
    assert all(reference.scans == 10 for reference in known.values())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--method", "magic"), "magic: no such method of detection"),
        (("--strip", "--images", "*_T1.nii.gz"), "--strip needs brain masks"),
        (("--images", "s[0-4]_T1.nii.gz"), "5 healthy scan(s) are too few"),
        (("--images", "*_T1.nii.gz", "--masks", "*_brain.nii.gz"), "10 scan(s) cannot be used"),
        (("--images", "*_T2.nii.gz"), "*_T2.nii.gz"),
        (("--images", "*_T1.nii.gz", "--exclude", "magic*"), "--exclude magic*: no scan has such a name"),
        (("--images", "*_T1.nii.gz", "--method", "autoencoder"), "tiny: has no autoencoder"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(scans: Path, tmp_path: Path, options: tuple[str, ...], line: str) -> None:
    prior, out = saved(random_prior(), tmp_path), tmp_path / "out.safetensors"
    done = medfusion("calibrate", prior, scans, "--out", out, *options)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
    assert "registering" not in done.stderr
    assert not out.exists()


def test_only_a_prior_is_written(scans: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "other.txt").write_text("precious")
    for out in (tmp_path / "models", tmp_path / "models.safetensors"):
        out.mkdir(exist_ok=True)
        options = ("--out", out, "--overwrite", "--method", "intensity", *PATTERNS)
        assert medfusion("calibrate", saved(random_prior(), tmp_path), scans, *options).returncode == 2
        assert out.is_dir()
    assert (tmp_path / "models" / "other.txt").exists()


def test_a_prior_that_is_there_is_kept(scans: Path, tmp_path: Path) -> None:
    prior = saved(random_prior(), tmp_path)
    before = Path(prior).read_bytes()
    done = medfusion("calibrate", prior, scans, "--out", prior, "--method", "intensity", *PATTERNS)
    assert_refused(done, "exists already")
    assert Path(prior).read_bytes() == before
