"""`medfusion translate`: by a CycleGAN trained on two folders, and between two diffusion priors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from prior_factory import grid, head, saved, tiny_config, white_prior
from torch import nn

from medfusion.config import Config
from medfusion.prior import DiffusionPrior
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


def test_every_volume_of_a_4d_file_and_no_slab(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    scans = [nibabel.load(folders / "b" / f"b{number}.nii.gz") for number in range(2)]
    both = np.stack([scan.get_fdata() for scan in scans], axis=-1)
    nibabel.save(nibabel.Nifti1Image(both.astype(np.float32), scans[0].affine), tmp_path / "in" / "both.nii.gz")
    nibabel.save(nibabel.Nifti1Image(both[..., :9, 0], scans[0].affine), tmp_path / "in" / "slab.nii.gz")
    prior = folders / "run" / "prior.safetensors"
    done = medfusion("translate", tmp_path / "in", tmp_path / "out", "--prior", prior, "--to", "a", "--device", "cpu")
    assert done.returncode == 1
    assert "slab: too few voxels along one axis" in " ".join((done.stdout + done.stderr).split())
    made = nibabel.load(tmp_path / "out" / "both_translated.nii.gz").get_fdata()
    assert made.shape == both.shape
    for number in range(2):  # each as it is by itself
        alone = ["translate", folders / "b" / f"b{number}.nii.gz", tmp_path / f"{number}.nii.gz", "--prior", prior]
        assert medfusion(*alone, "--to", "a", "--device", "cpu").returncode == 0
        single = nibabel.load(tmp_path / f"{number}.nii.gz").get_fdata()
        np.testing.assert_allclose(made[..., number], single, atol=1e-3 * np.ptp(single))


def renamed(prior: DiffusionPrior, name: str, **sections: dict[str, Any]) -> DiffusionPrior:
    return replace(prior, config=tiny_config(**sections).model_copy(update={"name": name}))


def test_between_diffusion_priors(folders: Path, tmp_path: Path) -> None:
    """A prior of white noise encodes and decodes by the identity; one whose network answers v < 0, by brightening."""
    white, bright = saved(white_prior(), tmp_path), renamed(white_prior(), "bright")
    nn.init.constant_(bright.network.tail.bias, -0.1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b0.nii.gz").write_bytes((folders / "b" / "b0.nii.gz").read_bytes())
    before = nibabel.load(tmp_path / "in" / "b0.nii.gz").get_fdata()
    arguments = ["translate", tmp_path / "in", tmp_path / "out", "--device", "cpu", "--prior"]

    def change(prior: str, to: str, *more: str) -> NDArray[np.float64]:
        done = medfusion(*arguments, prior, "--to", to, *more)
        assert done.returncode == 0, done.stderr
        return (nibabel.load(tmp_path / "out" / "b0_translated.nii.gz").get_fdata() - before) / np.ptp(before)

    assert np.abs(change(white, white)).mean() < 0.02
    brighter = change(white, saved(bright, tmp_path), "--overwrite")[12:28, 12:28, 12:28].mean()
    assert brighter > 0.02
    assert change(saved(bright, tmp_path), white, "--overwrite")[12:28, 12:28, 12:28].mean() < -0.02
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["settings"]["options"]["to_name"] == "tiny"
    # the other prior, made anew in its place, is another setting: nothing of the old one is kept
    change(white, saved(bright, tmp_path), "--overwrite")
    nn.init.zeros_(bright.network.tail.bias)
    assert np.abs(change(white, saved(bright, tmp_path), "--resume")).mean() < 0.02


def test_priors_whose_codes_have_no_meaning_in_common(folders: Path, tmp_path: Path) -> None:
    white = saved(white_prior(), tmp_path)
    arguments = ["translate", folders / "b", tmp_path / "out", "--device", "cpu", "--prior", white, "--to"]
    finer = saved(renamed(white_prior(), "finer", preprocessing={"spacing": 1.0}), tmp_path)
    assert_refused(medfusion(*arguments, finer), "tiny and finer see scans otherwise")
    assert_refused(medfusion(*arguments, folders / "run" / "prior.safetensors"), "is a CycleGAN")
    tree = tiny_config().model_dump() | {"name": "latent", "autoencoder": {"channels": (8, 16), "latents": 1}}
    latent = saved(DiffusionPrior.untrained(Config.model_validate(tree), {}), tmp_path)
    assert_refused(medfusion(*arguments, latent), "latent: works on latents of its own autoencoder")


def test_as_many_folders_as_domains(folders: Path) -> None:
    one = ["train", folders / "config.yaml", "--data", folders / "a", "--out", folders / "other"]
    assert_refused(medfusion(*one), "1 folder(s) for the domains a and b")
    wrong = [*one, "--data", folders / "b", "--exclude", "a0"]
    assert_refused(medfusion(*wrong), "names no domain", "--exclude a/NAME")
    (folders / "plain.yaml").write_text("name: plain\n")
    done = medfusion("train", folders / "plain.yaml", *one[2:], "--data", folders / "b")
    assert_refused(done, "2 folders of data, and plain is trained on one")
