"""`medfusion detect` as its users run it."""

from pathlib import Path

from command_line import assert_refused, medfusion
from prior_factory import saved, white_prior, write_head


def test_one_scan(tmp_path: Path) -> None:
    scan = write_head(tmp_path / "a.nii.gz")
    options = ("--prior", saved(white_prior(), tmp_path), "--steps", 1, "--samples", 2, "--device", "cpu")
    done = medfusion("detect", scan, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "medfusion detect, prior tiny, cpu" in done.stdout
    assert "finding(s)" in done.stdout
    kinds = ("anomaly.nii.gz", "findings.csv", "mask.nii.gz", "reconstruction.nii.gz")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", *(f"a_{kind}" for kind in kinds)}


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    scan = write_head(tmp_path / "a.nii.gz")
    done = medfusion("detect", scan, tmp_path / "out", "--prior", saved(white_prior(), tmp_path), "--device", "cuda:99")
    assert_refused(done, "--device cuda:99: cannot be used on this machine", "  Fix  ")
    assert not (tmp_path / "out").exists()
