"""`medfusion train` as its users run it; the function behind it where a process of its own adds nothing."""

import json
import os
import shutil
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

MASKED = ["data.images='*_T1.nii.gz'", "data.masks='*_mask.nii.gz'"]
OPTIONS: dict[str, Any] = {"cache": None, "exclude": [], "device": "cpu", "workers": None}


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


def run(tmp_path: Path, *overrides: str, overwrite: bool = False, resume: bool = False, **options: Any) -> int:
    """Train on NIfTI files and masks in this process."""
    config, data, out = tmp_path / "tiny.yaml", tmp_path / "data", tmp_path / "out"
    options = OPTIONS | {"overwrite": overwrite, "resume": resume} | options
    return train_prior(config, [data], out, [*MASKED, *overrides], **options)


def steps(out: Path) -> list[int]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    write_config(tmp_path)
    write_data(tmp_path / "data")
    assert run(tmp_path) == 0
    return tmp_path / "out"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nifti_files_and_masks_make_a_prior_that_denoises(tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data"), tmp_path / f"runs [old] {'long ' * 20}" / "first"
    sets = [item for setting in (*MASKED, "training.steps=6", "name=mine") for item in ("--set", setting)]
    done = medfusion("train", write_config(tmp_path), "--data", data, "--out", out, "--device", "cpu", *sets)
    assert done.returncode == 0, done.stderr
    assert "3, each whole and skull-stripped" in done.stderr
    assert "Warning" not in done.stderr
    assert "step 6/6  loss " in done.stderr
    assert f"Card: {out / 'card.md'}\n" in done.stderr
    assert f"--prior {out / 'prior.safetensors'}\n" in done.stderr
    files = {"audit.csv", "cache", "card.md", "checkpoint.pt", "metrics.jsonl", "prior.safetensors", "run.json"}
    assert files <= {path.name for path in out.iterdir()}
    assert len((out / "audit.csv").read_text().splitlines()) == 4
    assert steps(out) == [2, 4, 6]
    record = json.loads((out / "run.json").read_text())
    assert (record["command"], record["config"]["training"]["steps"]) == ("train", 6)
    assert record["environment"]["device"] == "cpu"
    assert record["scans"] == [f"case{index}_T1" for index in range(3)]
    assert record["audit"]["properties"]["orientation"] == "RAS (3)"
    assert record["audit"]["remarks"] == []
    prior = Prior.load(out / "prior.safetensors")
    assert prior.name == "mine"
    assert (prior.provenance["training_scans"], prior.provenance["validation_scans"]) == (2, 1)
    scan = data / "case0_T1.nii.gz"
    assert denoise(scan, tmp_path / "d.nii.gz", prior=str(out / "prior.safetensors")).exit_code == 0


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    command = [sys.executable, "-m", "medfusion", "train", write_config(tmp_path), "--data", data, "--out", out]
    running = subprocess.Popen(
        [*command, "--set", "training.steps=100000", "--set", "data.images=*_T1.nii.gz"],
        stderr=subprocess.PIPE,
        text=True,
    )
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
    options = OPTIONS | {"overwrite": False, "resume": False}
    assert train_prior(write_config(tmp_path), [tmp_path / "data"], out, [], **options) == 0
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
    options = OPTIONS | {"overwrite": False, "resume": False}
    for out, cache in ((data / "run", None), (tmp_path / "run", data / "cache")):
        with pytest.raises(MedfusionError, match="the output lies inside the input"):
            train_prior(write_config(tmp_path), [data], out, MASKED, **options | {"cache": cache})


def test_every_problem_is_listed(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    (data / "case1_mask.nii.gz").unlink()
    (data / "case2_T1.nii.gz").write_bytes(b"no scan")
    sets = [item for setting in MASKED for item in ("--set", setting)]
    done = medfusion("train", write_config(tmp_path), "--data", data, "--out", tmp_path / "out", *sets)
    lines = ("2 of 3 scans cannot be trained on", "case1_T1: no mask where expected", "case2_T1: cannot be used")
    assert_refused(done, *lines)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_what_the_audit_finds_is_told_and_may_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path)
    data = write_data(tmp_path / "data", 4)
    shutil.copy(data / "case0_T1.nii.gz", data / "case2_T1.nii.gz")
    (data / "case3_T1.nii.gz").write_bytes(b"no scan")
    assert run(tmp_path, exclude=["case3*"], cache=tmp_path / "shared") == 0
    said = capsys.readouterr().err
    assert "Warning  same voxels as another scan, left out: case2_T1 (case0_T1)\n" in said
    assert "1 by --exclude, 1 copies" in said
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["scans"] == ["case0_T1", "case1_T1"]
    assert record["audit"]["excluded"] == ["case3_T1"]
    assert len(list((tmp_path / "shared").glob("*.safetensors"))) == 6
    assert not (tmp_path / "out" / "cache").exists()


def test_two_processes_of_which_one_talks(tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += " --dynamo_backend no --main_process_port 0 --num_cpu_threads_per_process 1 -m medfusion train"
    sets = [item for setting in MASKED for item in ("--set", setting)]
    command = [sys.executable, *launch.split(), write_config(tmp_path), "--data", data, "--out", out, *sets]

    line, environment = [*map(str, command)], os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 4/4  loss ") == 1
    assert done.stderr.count("each whole and skull-stripped") == 1
    assert len(list((out / "cache").glob("*.safetensors"))) == 6
    assert "2 processes" in json.loads((out / "run.json").read_text())["environment"]["device"]


def test_the_launcher_gives_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path)
    write_data(tmp_path / "data")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MedfusionError, match="--device and accelerate launch exclude each other"):
        run(tmp_path)
