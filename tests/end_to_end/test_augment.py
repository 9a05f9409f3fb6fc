"""`medfusion augment` as its users run it."""

import json
from pathlib import Path

from command_line import assert_refused, medfusion
from prior_factory import saved, white_prior, write_head


def test_two_cases(tmp_path: Path) -> None:
    scan, out = write_head(tmp_path / "in" / "a.nii.gz"), tmp_path / f"[out] {'long ' * 20}"
    options = ("--prior", saved(white_prior(), tmp_path), "--steps", 2, "-n", 2, "--seed", 4)
    done = medfusion("augment", scan.parent, out, *options)
    assert done.returncode == 0, done.stderr
    assert "synth-4-0001" in done.stdout
    assert done.stdout.endswith(f"Results: {out}\n")  # neither wrapped nor read as markup
    assert sorted(path.name for path in (out / "imagesTr").iterdir()) == [
        "synth-4-0001_0000.nii.gz",
        "synth-4-0002_0000.nii.gz",
    ]
    assert sorted(path.name for path in (out / "labelsTr").iterdir()) == [
        "synth-4-0001.nii.gz",
        "synth-4-0002.nii.gz",
    ]
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 2


def test_no_case_asked_for(tmp_path: Path) -> None:
    done = medfusion("augment", write_head(tmp_path / "a.nii.gz"), tmp_path / "out", "-n", 0)
    assert_refused(done, "-n 0: at least one case must be asked for")
