"""`medfusion augment` and `medfusion evaluate augment` as their users run them."""

import json
from pathlib import Path

import pytest
import yaml
from command_line import assert_refused, medfusion
from prior_factory import saved, tiny_config
from segmentation_factory import painting_prior, write_set

from medfusion.io.training_set import read_training_set
from medfusion.prior import read_metadata

QUICK = ("--steps", 1, "--audit-steps", 2)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("real") / "Dataset001_Body", 10, unlabelled=2)


def test_augment_then_evaluate(tmp_path: Path, real: Path) -> None:
    out = tmp_path / f"[out] {'long ' * 20}"
    prior = saved(painting_prior(), tmp_path)
    done = medfusion("augment", real, out, "-n", 3, "--prior", prior, "--seed", 4, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "synth-4-0001" in done.stdout
    assert f"Results: {out}\n" in done.stdout  # neither wrapped nor read as markup
    assert done.stdout.endswith(f"Report: {out / 'report.html'}\n")
    audit = json.loads((out / "audit.json").read_text())
    dropped = [case["case"] for case in audit["cases"] if case["dropped"]]
    assert f"{len(dropped)} of 3 cases dropped" in done.stdout
    report = (out / "report.html").read_text()
    for words in ("MS-SSIM", "Every case is synthetic", *dropped):
        assert words in report
    assert len(dropped) < 3
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 13 - len(dropped)
    test = write_set(tmp_path / "test", 3, first=40)
    options = ("--test", test, "--seeds", 1, "--steps", 2, "--crop", 16)
    done = medfusion("evaluate", "augment", real, out, tmp_path / "tables", *options)
    assert done.returncode == 0, done.stderr
    assert "Dice in %, 3 test cases of 3 patients" in done.stdout
    assert (tmp_path / "tables" / "cases.csv").exists()


def test_a_prior_is_learnt_where_none_is_named_and_kept(tmp_path: Path, real: Path) -> None:
    config = tiny_config(
        network={"located": False, "labels": 3}, data={"labels": "*", "unlabelled": True}, training={"steps": 2}
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    table, out = tmp_path / "classes.csv", tmp_path / "out"
    table.write_text("case,class\n" + "".join(f"{case.name},F\n" for case in read_training_set(real).cases))
    done = medfusion("augment", real, out, "-n", 1, "--config", path, "--classes", table, *QUICK)
    assert done.returncode == 0, done.stderr
    prior = out / "prior" / "prior.safetensors"
    assert read_metadata(prior)[0].network.classes == ("F",)
    made = prior.stat().st_mtime_ns
    done = medfusion("augment", real, out, "-n", 2, "--config", path, "--resume", *QUICK)
    assert done.returncode == 0, done.stderr
    assert prior.stat().st_mtime_ns == made
    done = medfusion("augment", real, out, "-n", 1, "--config", path, "--overwrite", *QUICK)
    assert done.returncode == 0, done.stderr
    assert prior.stat().st_mtime_ns > made


def test_nothing_is_learnt_for_a_request_that_makes_no_sense(tmp_path: Path, real: Path) -> None:
    assert_refused(medfusion("augment", real, tmp_path / "out", "-n", 0), "-n 0: at least one case must be asked for")
    few = write_set(tmp_path / "few", 9)
    assert_refused(medfusion("augment", few, tmp_path / "out", "-n", 1), "9 labelled case(s) are too few to learn")
    refused = medfusion("augment", real, tmp_path / "out", "-n", 1, "--class", "ill")
    assert_refused(refused, "--class ill: the prior does not know it")
    assert not (tmp_path / "out").exists()
