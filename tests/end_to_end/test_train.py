"""`medfusion train` as its users run it; the function behind it where a process of its own adds nothing."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml
from command_line import assert_refused, medfusion
from dicom_factory import write_series
from prior_factory import CENTRE, grid, head, tiny_config, write_head

from medfusion.cli.train import train_prior
from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.tasks.denoise import denoise

MASKED = ["data.images='*_T1.nii.gz'", "data.masks='_mask.nii.gz'"]


def write_config(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config().model_dump(mode="json")))
    return path


def write_data(folder: Path, number: int = 3) -> Path:
    """Heads and their brain masks."""
    affine = grid((40, 40, 40))
    world = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices((40, 40, 40)), 0, -1))
    mask = (np.linalg.norm(world - CENTRE, axis=-1) < 25).astype(np.uint8)
    for index in range(number):
        write_head(folder / f"case{index}_T1.nii.gz", seed=index)
        nibabel.save(nibabel.Nifti1Image(mask, affine), folder / f"case{index}_mask.nii.gz")
    return folder


def run(tmp_path: Path, *overrides: str, overwrite: bool = False, resume: bool = False) -> int:
    """Train on NIfTI files and masks in this process."""
    config, data, out = tmp_path / "tiny.yaml", tmp_path / "data", tmp_path / "out"
    return train_prior(config, data, out, [*MASKED, *overrides], device="cpu", overwrite=overwrite, resume=resume)


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    write_config(tmp_path)
    write_data(tmp_path / "data")
    assert run(tmp_path) == 0
    return tmp_path / "out"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nifti_files_and_masks_make_a_prior_that_denoises(tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data"), tmp_path / f"runs [old] {'long ' * 20}" / "first"
    sets = [item for setting in (*MASKED, "training.steps=6", "name=mine") for item in ("--set", setting)]
    done = medfusion("train", write_config(tmp_path), "--data", data, "--out", out, "--device", "cpu", *sets)
    assert done.returncode == 0, done.stderr
    assert "3 scans, 6 training images with their variants" in done.stderr
    assert "step 6/6  loss " in done.stderr
    assert f"--prior {out / 'prior.safetensors'}\n" in done.stderr
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "metrics.jsonl", "prior.safetensors", "run.json"}
    assert steps(out) == [2, 4, 6]
    record = json.loads((out / "run.json").read_text())
    assert (record["command"], record["config"]["training"]["steps"]) == ("train", 6)
    assert record["environment"]["device"] == "cpu"
    prior = Prior.load(out / "prior.safetensors")
    assert prior.name == "mine"
    assert (prior.provenance["training_scans"], prior.provenance["validation_scans"]) == (2, 1)
    scan = data / "case0_T1.nii.gz"
    assert denoise(scan, tmp_path / "d.nii.gz", prior=str(out / "prior.safetensors")).exit_code == 0


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    command = [sys.executable, "-m", "medfusion", "train", write_config(tmp_path), "--data", data, "--out", out]
    running = subprocess.Popen([*command, "--set", "training.steps=100000"], stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("step "):
            running.send_signal(signal.SIGINT)
            break
    assert running.communicate(timeout=30)[1].endswith("Interrupted: --resume continues from the last checkpoint\n")
    assert running.returncode == 130
    assert not (out / "prior.safetensors").exists()


def test_dicom_series_without_masks(tmp_path: Path) -> None:
    shape = (40, 40, 28)
    affine = grid(shape, (2.0, 2.0, 2.8), "LPS", (4, 5, 6))
    for number in (1, 2):
        array = head(affine, shape, noise=10, seed=number).clip(0).astype(np.uint16)
        write_series(tmp_path / "data" / str(number), array, affine, SeriesNumber=number)
    out = tmp_path / "out"
    options: dict[str, Any] = {"device": "cpu", "overwrite": False, "resume": False}
    assert train_prior(write_config(tmp_path), tmp_path / "data", out, [], **options) == 0
    assert Prior.load(out / "prior.safetensors").provenance["training_scans"] == 1


def test_a_finished_run_is_not_overwritten_unasked(tmp_path: Path, trained: Path) -> None:
    before = snapshot(trained)
    with pytest.raises(MedfusionError, match="out: holds a run already") as error:
        run(tmp_path)
    assert "--resume" in error.value.fix
    (trained / "checkpoint.pt").unlink()  # large: many will not keep it
    with pytest.raises(MedfusionError, match="holds a run already"):
        run(tmp_path)
    del before["checkpoint.pt"]
    assert snapshot(trained) == before


def test_overwrite_begins_anew(tmp_path: Path, trained: Path) -> None:
    assert run(tmp_path, "training.steps=2", overwrite=True) == 0
    assert steps(trained) == [2]
    assert Prior.load(trained / "prior.safetensors").config.training.steps == 2


def test_resume_continues(tmp_path: Path, trained: Path) -> None:
    (trained / "prior.safetensors").unlink()
    assert run(tmp_path, resume=True) == 0
    assert steps(trained) == [2, 4]
    assert (trained / "prior.safetensors").exists()


def test_another_config_is_refused_before_anything_is_written(tmp_path: Path, trained: Path) -> None:
    before = snapshot(trained)
    with pytest.raises(MedfusionError, match="was made with another config"):
        run(tmp_path, "training.learning_rate=1e-5", resume=True)
    assert snapshot(trained) == before


def test_nothing_to_resume(tmp_path: Path) -> None:
    write_config(tmp_path)
    write_data(tmp_path / "data")
    with pytest.raises(MedfusionError, match="no checkpoint to resume from"):
        run(tmp_path, resume=True)
    assert not (tmp_path / "out").exists()


def test_the_output_lies_apart_from_the_data(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    options: dict[str, Any] = {"device": "cpu", "overwrite": False, "resume": False}
    with pytest.raises(MedfusionError, match="the output lies inside the input"):
        train_prior(write_config(tmp_path), data, data / "run", MASKED, **options)


def test_every_problem_is_listed(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    (data / "case1_mask.nii.gz").unlink()
    (data / "case2_T1.nii.gz").write_bytes(b"no scan")
    sets = [item for setting in MASKED for item in ("--set", setting)]
    done = medfusion("train", write_config(tmp_path), "--data", data, "--out", tmp_path / "out", *sets)
    assert_refused(done, "2 of 3 scans cannot be trained on", "case1_T1: no mask beside it", "case2_T1: cannot be used")
    assert not (tmp_path / "out").exists()
