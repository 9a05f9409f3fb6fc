"""`medfusion denoise` as its users run it."""

import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
from command_line import assert_refused, medfusion
from prior_factory import random_prior, saved, white_prior, write_head


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
        *(f"{name}_denoised.{kind}" for name in "ab" for kind in ("nii.gz", "json", "html")),
        "run.json",
    }
    assert nibabel.load(tmp_path / "out" / "a_denoised.nii.gz").shape == (40, 40, 40)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["command"] == "denoise"
    facts = json.loads((tmp_path / "out" / "a_denoised.json").read_text())
    assert facts["prior"] == "tiny"
    assert facts["noise"]["sigma"] > 0
    assert "(estimated, " in (tmp_path / "out" / "a_denoised.html").read_text()


def test_no_such_input(tmp_path: Path) -> None:
    done = medfusion("denoise", tmp_path / "nowhere", tmp_path / "out", "--prior", saved(white_prior(), tmp_path))
    assert_refused(done, "nowhere: no such file or folder", "  Fix  ")
    assert not (tmp_path / "out").exists()


def test_negative_noise_is_wrong_use(tmp_path: Path) -> None:
    done = medfusion("denoise", write_head(tmp_path / "a.nii.gz"), tmp_path / "out", "--sigma", -1)
    assert done.returncode == 2
    assert "--sigma" in done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_estimate_alone_writes_nothing(tmp_path: Path) -> None:
    write_head(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "in" / "broken.nii.gz").write_bytes(b"no scan")
    prior = saved(white_prior(), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    table = medfusion("denoise", tmp_path / "in", "--estimate-only", "--prior", prior)
    assert table.returncode == 1, table.stderr  # one scan of two
    assert "Noise, prior tiny" in table.stdout
    for word in ("case", "sigma", "kind", "verdict", " a ", " broken "):
        assert word in table.stdout
    listed = medfusion("denoise", tmp_path / "in", "--estimate-only", "--json", "--prior", prior)
    assert listed.returncode == 1
    first, second = json.loads(listed.stdout)
    assert set(first) == {"case", "sigma", "relative", "kind", "shared", "verdict"}
    assert first["case"] == "a"
    assert first["sigma"] > 0
    assert first["kind"] in ("gaussian", "rician")
    assert isinstance(first["shared"], float)
    assert (second["case"], second["sigma"]) == ("broken", None)
    assert second["verdict"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        (["out"], ["--estimate-only"], "--estimate-only has none"),
        ([], [], "OUT is missing"),
        (["out"], ["--json"], "--json is for --estimate-only"),
        ([], ["--estimate-only", "--samples", "2"], "--estimate-only goes with"),
        (["out"], ["--adapt", "0"], "--adapt"),
    ],
)
def test_wrong_use(tmp_path: Path, out: list[str], options: list[str], words: str) -> None:
    done = medfusion("denoise", write_head(tmp_path / "a.nii.gz"), *(tmp_path / name for name in out), *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_samples_and_maps(tmp_path: Path) -> None:
    source, prior = write_head(tmp_path / "in" / "a.nii.gz", noise=100.0), saved(white_prior(), tmp_path)
    given = ["--prior", prior, "--sigma", 100, "--kind", "gaussian"]
    done = medfusion("denoise", source.parent, tmp_path / "out", "--samples", 2, "--maps", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = ("denoised", "sample-1", "sample-2", "std", "removed", "structure")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"a_{kind}.nii.gz" for kind in kinds} | {"a_denoised.json", "a_denoised.html", "run.json"}
    images = {kind: nibabel.load(tmp_path / "out" / f"a_{kind}.nii.gz") for kind in kinds}
    original = nibabel.load(source)
    for image in images.values():
        np.testing.assert_allclose(image.affine, original.affine, atol=1e-6)
    values = {kind: image.get_fdata() for kind, image in images.items()}
    np.testing.assert_allclose(values["removed"], original.get_fdata() - values["denoised"], atol=0.01)
    assert values["removed"].std() > 10
    np.testing.assert_allclose(values["std"], np.abs(values["sample-1"] - values["sample-2"]) / 2**0.5, atol=0.1)
    assert values["std"].mean() > 10
    assert values["structure"].std() > 0
    page = (tmp_path / "out" / "a_denoised.html").read_text()
    assert "sigma 100 (given, gaussian)" in page
    assert "Standard deviation of the samples" in page


def test_adapted_first_and_resumed(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_head(tmp_path / "in" / f"{name}.nii.gz", noise=100.0, seed=seed, size=48)
    (tmp_path / "in" / "broken.nii.gz").write_bytes(b"no scan")
    given = ["--prior", saved(random_prior(), tmp_path), "--sigma", 100, "--kind", "gaussian", "--adapt", 0.05]
    done = medfusion("denoise", tmp_path / "in", tmp_path / "out", *given)
    assert done.returncode == 1, done.stdout + done.stderr  # one is broken
    assert re.search(r"adapted in \d+ steps: .* before, .* after: (kept|no gain beyond chance)", done.stdout)
    assert "not adapted to: broken: " in done.stdout
    assert (tmp_path / "out" / "adapted.safetensors").exists()
    assert (tmp_path / "out" / "b_denoised.nii.gz").exists()
    made = contents(tmp_path / "out")
    again = medfusion("denoise", tmp_path / "in", tmp_path / "out", *given, "--resume")
    assert "adapted.safetensors: as an earlier run left it" in again.stdout
    assert "2 skipped, 1 refused" in again.stdout
    now = contents(tmp_path / "out")
    assert now.pop("run.json") != made.pop("run.json")
    assert now == made
    assert_refused(medfusion("denoise", tmp_path / "in", tmp_path / "out", *given), "adapted.safetensors", "--resume")


def test_a_name_is_text_and_no_markup(tmp_path: Path) -> None:
    write_head(tmp_path / "in" / "<script>[bold]a.nii.gz")
    prior = saved(white_prior(), tmp_path)
    done = medfusion("denoise", tmp_path / "in", tmp_path / "out", "--prior", prior, "--sigma", 100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<script>[bold]a" in done.stdout
    [page] = (tmp_path / "out").glob("*.html")
    assert "<script" not in page.read_text()
    assert "&lt;script&gt;[bold]a" in page.read_text()
