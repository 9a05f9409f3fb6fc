"""The benchmarks run at toy size and report what they measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from prior_factory import CENTRE, grid, head, random_prior, saved, tiny_config
from segmentation_factory import painting_prior, write_pair

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CONFIG = """
name: tiny
network: {channels: [8, 16], blocks: [1, 1]}
data: {images: "*_T1.nii.gz", masks: "*_labels.nii.gz"}
"""


def run(script: str, *options: str, data: Path) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    environment = os.environ | {"MEDFUSION_DATA": str(data), "COLUMNS": "140"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_scan(folder: Path, number: int) -> None:
    """A phantom head, and as its label map the ball inside it."""
    affine, shape = grid((32, 34, 36), axes="PSR"), (32, 34, 36)
    world = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    brain = np.linalg.norm(world - CENTRE, axis=-1) < 20
    for ending, array in (("T1", head(affine, shape, noise=5, seed=number)), ("labels", brain)):
        nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), affine), folder / f"case{number}_{ending}.nii.gz")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tiny config, and beside it the scans where the benchmarks look for them."""
    scans = tmp_path / "ixi_t1_2mm" / "train"
    scans.mkdir(parents=True)
    for number in range(5):
        write_scan(scans, number)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def test_our_loop_beside_the_tutorials(tmp_path: Path, config: Path) -> None:
    sizes = ("--minutes", "0.03", "--crop", "16", "--channels", "32", "32", "--scans", "4")
    table = run("training.py", *sizes, "--config", str(config), "--out", str(tmp_path / "out"), data=tmp_path)
    assert table.count(", bar ") == 4
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    ours, theirs = report["ours"], report["MONAI tutorial"]
    for row in (ours, theirs):
        assert row["steps"] >= 1
        assert 0 <= row["waiting"] < 1
        assert 0 < row["share of peak"] < 1
        assert row["memory"] > 2**27
    assert theirs["seconds"] >= ours["seconds"]
    assert report["gain"]["voxels/s"] == pytest.approx(ours["voxels/s"] / theirs["voxels/s"])
    for level, pair in ours["psnr"].items():
        assert pair["noisy"] == pytest.approx(-20 * np.log10(float(level)), abs=0.2)
        assert pair["noisy"] == theirs["psnr"][level]["noisy"]
        assert report["gain"][level] == pytest.approx(pair["denoised"] - theirs["psnr"][level]["denoised"])


def test_flops_are_counted_without_those_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, on 4^3 voxels: of 3 taps at 4 places 10 lie inside; the input itself needs no gradient."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from training import flops_a_crop

    class Told(torch.nn.Sequential):
        def forward(self, x: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    first, down, up = (
        torch.nn.Conv3d(1, 2, 3, padding=1),
        torch.nn.Conv3d(2, 3, 2, 2),
        torch.nn.ConvTranspose3d(3, 1, 2, 2),
    )
    once, halved = 2 * 2 * 10**3, 2 * 2 * 3 * 4**3
    assert flops_a_crop(Told(first), 4, torch.zeros(1)) == 2 * once
    assert flops_a_crop(Told(first, down, up), 4, torch.zeros(1)) == 2 * once + 3 * halved + 3 * halved // 2


def test_designs_get_the_same_flops(tmp_path: Path, config: Path) -> None:
    chosen = ("as in the config", "batch 3")
    config.write_text(CONFIG.replace("{images", "{crop: 32, images") + "training: {batch: 6}\n")
    options = ("--steps", "2", "--config", str(config), "--out", str(tmp_path / "out"), "--only", *chosen)
    printed = run("design.py", *options, data=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "out" / "design.jsonl").read_text().splitlines()]
    assert [row["design"] for row in rows] == list(chosen)
    assert [row["steps"] for row in rows] == [2, 4]
    assert all(10 < row["0.05"] < 40 for row in rows)
    assert all(name in printed for name in chosen)


def test_cost_of_a_step(tmp_path: Path) -> None:
    printed = run("training_cost.py", "--crops", "16", "--channels", "8,16", "--repeats", "1", data=tmp_path)
    head, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines())
    assert row[:3] == ["16^3", "8, 16", "0.1 M"]
    assert len(row) == len(head)
    assert all(float(cell.replace(",", "")) > 0 for cell in row[3:5])


@pytest.fixture
def hippocampi(tmp_path: Path) -> Path:
    """Labelled phantoms where the benchmarks of augmentation look for cases."""
    for kind, first in (("train", 0), ("dev", 20)):
        for seed in range(first, first + 12):
            folder = tmp_path / "hippocampus" / kind
            write_pair(folder / "images" / f"{seed}.nii.gz", folder / "labels" / f"{seed}.nii.gz", seed)
    return tmp_path


@pytest.mark.slow
def test_cost_and_quality_of_synthetic_cases(tmp_path: Path, hippocampi: Path) -> None:
    prior = saved(painting_prior(), tmp_path)
    printed = run("generation.py", "--prior", prior, "--cases", "4", "--judge-steps", "2", data=hippocampi)
    rows = [line.split() for line in printed.splitlines()]
    textures = {tuple(row[:-6]): float(row[-3]) for row in rows if row and row[0] in ("dpm_solver", "ddpm", "real")}
    assert textures.pop(("real",)) == pytest.approx(1, abs=0.2)  # of the phantoms: noise, and their edges
    assert len(textures) == 13
    assert max(textures.values()) < 0.97  # this prior paints no noise


@pytest.mark.slow
def test_ways_to_show_a_label_map(tmp_path: Path, hippocampi: Path) -> None:
    layers = {"channels": (48, 96, 128), "blocks": (2, 2, 2)}
    prior = saved(random_prior(config=tiny_config(network=layers)), tmp_path)
    sizes = ("--labelled", "3", "--steps", "2", "--judged", "1", "--judge-steps", "2")
    printed = run("conditioning.py", "--start", prior, *sizes, data=hippocampi)
    assert "channels" in printed
    assert "spade" in printed


def test_commands_of_the_error_analysis(tmp_path: Path) -> None:
    shown = run("error_tables.py", "--cases", "120", data=tmp_path)
    assert all(
        f" {name} " in shown for name in ("sizes", "split", "ask", "overfit", "table", "parts", "slices", "report")
    )
