"""`medfusion translate`: by a CycleGAN trained on two folders, and between two diffusion priors."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from prior_factory import grid, head, saved, tiny_config, white_prior

from tests.command_line import assert_refused, medfusion
from tests.dicom_factory import write_series

CONFIG = """
name: two-scanners
family: cyclegan
cyclegan: {domains: [{name: a, images: "*_T1.nii.gz", masks: "*_mask.nii.gz"}, {name: b}], channels: [8, 16], layers: 1}
network: {channels: [8, 16], blocks: [1, 1]}
data: {crop: 16, validation: 1}
training: {steps: 3, warmup: 2, batch: 2, optimizer: adversarial, checkpoint_every: 3, validate_every: 3}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of scanner a with masks, those of b brighter, and a prior trained on both."""
    root = tmp_path_factory.mktemp("scans")
    affine, shape = grid((40, 40, 40)), (40, 40, 40)
    for name in "ab":
        (root / name).mkdir()
        for number in range(3):
            array = head(affine, shape, noise=5, seed=number + 10 * (name == "b"))
            ending = "_T1.nii.gz" if name == "a" else ".nii.gz"
            nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), affine), root / name / f"{name}{number}{ending}")
            if name == "a":
                mask = (array > np.median(array)).astype(np.uint8)
                nibabel.save(nibabel.Nifti1Image(mask, affine), root / name / f"a{number}_mask.nii.gz")
    (root / "config.yaml").write_text(CONFIG)
    two = ["--data", root / "a", "--data", root / "b"]
    done = medfusion("train", root / "config.yaml", *two, "--out", root / "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return root


def test_scans_come_back_on_their_grid_as_the_other_scanner_shows_them(folders: Path) -> None:
    record = json.loads((folders / "run" / "run.json").read_text())
    assert record["data"] == [str(folders / "a"), str(folders / "b")]
    assert len(record["scans"]) == 6
    assert [name for name in record["scans"] if name.startswith("a ")] == ["a a0_T1", "a a1_T1", "a a2_T1"]
    prior = folders / "run" / "prior.safetensors"
    arguments = ["translate", folders / "b", folders / "out", "--prior", prior, "--to", "a", "--device", "cpu"]
    done = medfusion(*arguments)
    assert done.returncode == 0, done.stderr
    before = nibabel.load(folders / "b" / "b0.nii.gz")
    after = nibabel.load(folders / "out" / "b0_translated.nii.gz")
    np.testing.assert_allclose(after.affine, before.affine)
    assert after.shape == before.shape
    assert 0 < np.abs(after.get_fdata() - before.get_fdata()).mean() < 0.1 * np.ptp(before.get_fdata())
    assert len(list((folders / "out").glob("*_translated.nii.gz"))) == 3
    assert_refused(medfusion(*arguments), "already")
    assert_refused(medfusion(*arguments[:-3], "c", "--overwrite"), "--to c: is no domain of two-scanners")


def test_a_dicom_series_becomes_a_derived_one(folders: Path, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 4096, (20, 21, 22), dtype=np.uint16)
    array[5:15, 5:15, 5:15] += 3000
    write_series(tmp_path / "in" / "s", array)
    prior = folders / "run" / "prior.safetensors"
    done = medfusion("translate", tmp_path / "in", tmp_path / "out", "--prior", prior, "--to", "b", "--device", "cpu")
    assert done.returncode == 0, done.stderr + done.stdout
    [series] = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert len(list(series.glob("*.dcm"))) == 22


def test_between_diffusion_priors(folders: Path, tmp_path: Path) -> None:
    """Two priors of white noise encode and decode by the identity."""
    prior = saved(white_prior(), tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b0.nii.gz").write_bytes((folders / "b" / "b0.nii.gz").read_bytes())
    arguments = ["translate", tmp_path / "in", tmp_path / "out", "--prior", prior, "--device", "cpu", "--to"]
    done = medfusion(*arguments, prior)
    assert done.returncode == 0, done.stderr
    before, after = (
        nibabel.load(path).get_fdata() for path in (tmp_path / "in/b0.nii.gz", tmp_path / "out/b0_translated.nii.gz")
    )
    assert np.abs(after - before).mean() < 0.02 * np.ptp(before)
    other = white_prior()
    finer = tiny_config(preprocessing={"spacing": 1.0}).model_copy(update={"name": "finer"})
    object.__setattr__(other, "config", finer)
    done = medfusion(*arguments, saved(other, tmp_path), "--overwrite")
    assert_refused(done, "tiny and finer see scans otherwise")
    assert_refused(medfusion(*arguments, folders / "run" / "prior.safetensors", "--overwrite"), "is a CycleGAN")


def test_as_many_folders_as_domains(folders: Path) -> None:
    one = ["train", folders / "config.yaml", "--data", folders / "a", "--out", folders / "other"]
    assert_refused(medfusion(*one), "1 folder(s) for the domains a and b")
    wrong = [*one, "--data", folders / "b", "--exclude", "a0"]
    assert_refused(medfusion(*wrong), "names no domain", "--exclude a/NAME")
    (folders / "plain.yaml").write_text("name: plain\n")
    done = medfusion("train", folders / "plain.yaml", *one[2:], "--data", folders / "b")
    assert_refused(done, "2 folders of data, and plain is trained on one")
