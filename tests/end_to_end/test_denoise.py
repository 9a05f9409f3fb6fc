"""`medfusion denoise` as its users run it."""

import json
from pathlib import Path

import nibabel
from command_line import assert_refused, medfusion
from prior_factory import saved, white_prior, write_head


def test_a_folder(tmp_path: Path) -> None:
    for name in "ab":
        write_head(tmp_path / "in" / f"{name}.nii.gz")
    (tmp_path / "in" / "c.nii.gz").write_bytes(b"no scan")
    done = medfusion("denoise", tmp_path / "in", tmp_path / "out", "--prior", saved(white_prior(), tmp_path))
    assert done.returncode == 1  # c was refused
    assert "Traceback" not in done.stderr
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [["denoise", f"{n}/3"] for n in (1, 2, 3)]
    assert "medfusion denoise, prior tiny" in done.stdout
    for name, status in (("a", "done"), ("b", "done"), ("c", "refused")):
        assert any(f" {name} " in line and f" {status} " in line for line in done.stdout.splitlines())
    assert "2 done, 1 refused" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a_denoised.nii.gz",
        "b_denoised.nii.gz",
        "run.json",
    }
    assert nibabel.load(tmp_path / "out" / "a_denoised.nii.gz").shape == (40, 40, 40)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["command"] == "denoise"


def test_no_such_input(tmp_path: Path) -> None:
    done = medfusion("denoise", tmp_path / "nowhere", tmp_path / "out", "--prior", saved(white_prior(), tmp_path))
    assert_refused(done, "nowhere: no such file or folder", "  Fix  ")
    assert not (tmp_path / "out").exists()


def test_negative_noise_is_wrong_use(tmp_path: Path) -> None:
    done = medfusion("denoise", write_head(tmp_path / "a.nii.gz"), tmp_path / "out", "--sigma", -1)
    assert done.returncode == 2
    assert "--sigma" in done.stderr
