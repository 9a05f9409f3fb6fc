"""The case loop: cases are isolated, nothing is overwritten unasked, run.json tells what happened."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from dicom_factory import PATIENT, write_series
from prior_factory import grid, head, saved, tiny_config, white_prior, write_head

import medfusion
from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.tasks.denoise import denoise
from medfusion.tasks.runner import Case, Job, Run, Settings, pick_device, run_jobs


@pytest.fixture
def prior(tmp_path: Path) -> str:
    return saved(white_prior(), tmp_path)


@pytest.fixture
def settings(tmp_path: Path, prior: str) -> Callable[..., Settings]:
    (tmp_path / "in").mkdir()
    defaults = {"device": None, "options": {"strength": 3}, "volume": None, "overwrite": False, "resume": False}

    def make(**changes: Any) -> Settings:
        return Settings("test", tmp_path / "in", tmp_path / "out", prior, **(defaults | changes))

    return make


def writing_jobs(out: Path, calls: list[str], text: str = "new") -> list[Job]:
    """Jobs a, b and c; each writes two files and notes that it was called."""

    def work(name: str, targets: list[Path], prior: Prior) -> str:
        calls.append(name)
        for target in targets:
            target.write_text(text)
        return f"{name} with {prior.name}"

    names = {name: [out / f"{name}_1.txt", out / f"{name}_2.txt"] for name in "abc"}
    return [Job(name, (), targets, partial(work, name, targets)) for name, targets in names.items()]


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def test_one_bad_case_does_not_stop_the_others(tmp_path: Path, prior: str) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a_good", "b_truncated", "e_good"):
        write_head(folder / f"{name}.nii.gz")
    truncated = folder / "b_truncated.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:20_000])
    (folder / "c_empty.nii.gz").touch()
    affine = grid((40, 40, 40))
    holed = head(affine, (40, 40, 40))
    holed[7, 8, 9] = np.nan
    nibabel.save(nibabel.Nifti1Image(holed, affine), folder / "d_holed.nii.gz")

    run = denoise(folder, out, prior=prior)

    assert {case.name: case.status for case in run.cases} == {
        "a_good": "done",
        "b_truncated": "failed",
        "c_empty": "refused",
        "d_holed": "failed",
        "e_good": "done",
    }
    assert run.exit_code == 1
    message = {case.name: case.message for case in run.cases}
    assert "the file is truncated" in message["b_truncated"]
    assert message["c_empty"] == "the file is empty"
    assert "1 of 64000 voxels are NaN or infinite" in message["d_holed"]
    written = {path.name for path in out.iterdir()}
    results = {f"{case}_denoised.{suffix}" for case in ("a_good", "e_good") for suffix in ("nii.gz", "json")}
    assert written == results | {"run.json"}
    assert [case["status"] for case in record(out)["cases"]] == [case.status for case in run.cases]


def test_an_unforeseen_exception_fails_its_case_alone(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    calls: list[str] = []
    jobs = writing_jobs(tmp_path / "out", calls)

    def divide(prior: Prior) -> str:
        return str(1 / 0)

    jobs[1] = Job("b", (), jobs[1].targets, divide)
    run = run_jobs(settings(), jobs)
    assert [case.status for case in run.cases] == ["done", "failed", "done"]
    assert run.cases[1].message == "ZeroDivisionError: division by zero"
    assert run.cases[1].outputs == []


def test_run_json_tells_the_whole_story(tmp_path: Path, settings: Callable[..., Settings], prior: str) -> None:
    out = tmp_path / "out"
    run = run_jobs(settings(device="cpu"), writing_jobs(out, []))
    assert run.exit_code == 0
    written = record(out)
    assert written["command"] == "test"
    assert written["settings"] == {
        "command": "test",
        "input": str(tmp_path / "in"),
        "output": str(out),
        "prior": prior,
        "device": "cpu",
        "options": {"strength": 3},
        "volume": None,
        "overwrite": False,
        "resume": False,
    }
    assert written["prior"]["name"] == "tiny"
    assert written["prior"]["config"]["process"] == tiny_config().process.model_dump()
    assert written["prior"]["data"] == "phantoms"
    assert written["environment"]["medfusion"] == medfusion.__version__
    assert written["environment"]["torch"] == torch.__version__
    assert written["environment"]["device"] == "cpu"
    assert written["environment"]["threads"] == torch.get_num_threads()
    assert written["interrupted"] is False
    assert [case["name"] for case in written["cases"]] == ["a", "b", "c"]
    first = written["cases"][0]
    assert (first["status"], first["message"]) == ("done", "a with tiny")
    assert first["outputs"] == [str(out / "a_1.txt"), str(out / "a_2.txt")]
    assert 0 <= first["seconds"] <= written["seconds"] < 60


def test_existing_outputs_are_refused_before_any_work(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    out, calls = tmp_path / "out", []
    out.mkdir()
    (out / "c_2.txt").write_text("old")
    with pytest.raises(MedfusionError, match=r"1 output\(s\) exist already") as error:
        run_jobs(settings(), writing_jobs(out, calls))
    assert error.value.facts["first"] == out / "c_2.txt"
    assert calls == []
    assert [path.name for path in out.iterdir()] == ["c_2.txt"]


def test_overwrite_does_everything_again(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    out, calls = tmp_path / "out", []
    run_jobs(settings(), writing_jobs(out, [], text="old"))
    run = run_jobs(settings(overwrite=True), writing_jobs(out, calls))
    assert calls == ["a", "b", "c"]
    assert [case.status for case in run.cases] == ["done"] * 3
    assert {path.read_text() for path in out.glob("*.txt")} == {"new"}


def test_resume_keeps_what_is_whole_and_does_the_rest(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    out, calls = tmp_path / "out", []
    run_jobs(settings(), writing_jobs(out, [], text="old")[:2])
    (out / "b_2.txt").unlink()  # a is whole, b is not, c was not begun
    run = run_jobs(settings(resume=True), writing_jobs(out, calls))
    assert calls == ["b", "c"]
    assert [case.status for case in run.cases] == ["skipped", "done", "done"]
    assert run.exit_code == 0
    assert (out / "a_1.txt").read_text() == "old"
    assert (out / "b_1.txt").read_text() == "new"
    assert record(out)["cases"][0]["outputs"] == [str(out / "a_1.txt"), str(out / "a_2.txt")]


def test_resume_keeps_nothing_that_other_inputs_or_settings_made(
    tmp_path: Path, settings: Callable[..., Settings]
) -> None:
    out, scan = tmp_path / "out", tmp_path / "in" / "scan"
    scan.write_text("one patient")

    def statuses(options: dict[str, Any]) -> list[str]:
        jobs = [replace(job, inputs=(scan,)) for job in writing_jobs(out, [])[:1]]
        return [case.status for case in run_jobs(settings(resume=True, options=options), jobs).cases]

    assert statuses({"sigma": 1}) == ["done"]
    assert statuses({"sigma": 1}) == ["skipped"]
    assert statuses({"sigma": 2}) == ["done"]
    scan.write_text("another one")
    assert statuses({"sigma": 2}) == ["done"]
    assert record(out)["cases"][0]["inputs"] == [str(scan)]
    (out / "run.json").write_text("{}")
    with pytest.raises(MedfusionError, match="not a record to resume from"):
        statuses({"sigma": 2})


def test_overwrite_and_resume_exclude_each_other(settings: Callable[..., Settings]) -> None:
    with pytest.raises(MedfusionError, match="exclude each other"):
        run_jobs(settings(overwrite=True, resume=True), [])


def test_a_failed_case_leaves_none_of_its_results(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    out = tmp_path / "out"
    [job, *_] = writing_jobs(out, [])

    def half(prior: Prior) -> str:
        job.targets[0].write_text("half")
        raise OSError("disk gone")

    run = run_jobs(settings(), [Job("a", (), job.targets, half)])
    assert run.cases[0].status == "failed"
    assert [path.name for path in out.iterdir()] == ["run.json"]


def test_resume_tries_a_failed_case_again(tmp_path: Path, prior: str) -> None:
    for name in "ab":
        write_head(tmp_path / "in" / f"{name}.nii.gz")
    whole = (tmp_path / "in" / "b.nii.gz").read_bytes()
    (tmp_path / "in" / "b.nii.gz").write_bytes(whole[:10_000])
    assert denoise(tmp_path / "in", tmp_path / "out", prior=prior).exit_code == 1
    (tmp_path / "in" / "b.nii.gz").write_bytes(whole)
    run = denoise(tmp_path / "in", tmp_path / "out", prior=prior, resume=True)
    assert {case.name: case.status for case in run.cases} == {"a": "skipped", "b": "done"}
    assert run.exit_code == 0


@pytest.mark.parametrize("out", ["in", "in/deeper/out", "."], ids=["same", "inside", "around"])
def test_output_and_input_must_be_apart(tmp_path: Path, prior: str, out: str) -> None:
    write_head(tmp_path / "in" / "a.nii.gz")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MedfusionError, match=r"the output (is|lies inside) the input|the input lies inside the output"):
        denoise(tmp_path / "in", tmp_path / out, prior=prior)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_prior_leaves_no_output_folder(tmp_path: Path) -> None:
    write_head(tmp_path / "in" / "a.nii.gz")
    with pytest.raises(MedfusionError, match="neither a shipped prior nor a file"):
        denoise(tmp_path / "in", tmp_path / "out", prior="nonsense")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_done_and_says_so(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    out, calls = tmp_path / "out", []
    jobs = writing_jobs(out, calls)

    def interrupted(prior: Prior) -> str:
        raise KeyboardInterrupt

    run = run_jobs(settings(), [jobs[0], Job("b", (), jobs[1].targets, interrupted), jobs[2]])
    assert run.exit_code == 130
    assert calls == ["a"]
    assert record(out)["interrupted"] is True
    assert [(case["name"], case["status"]) for case in record(out)["cases"]] == [("a", "done")]

    resumed = run_jobs(settings(resume=True), jobs)
    assert [case.status for case in resumed.cases] == ["skipped", "done", "done"]
    assert record(out)["interrupted"] is False


def test_no_patient_data_in_names_or_records(tmp_path: Path, prior: str) -> None:
    affine = grid((36, 36, 24), (2.2, 2.2, 3.4))
    array = head(affine, (36, 36, 24), noise=30).clip(0).astype(np.uint16)
    write_series(tmp_path / "in" / "good", array, affine, SeriesNumber=1)
    *_, last = write_series(tmp_path / "in" / "cut", array, affine, SeriesNumber=2)
    last.write_bytes(last.read_bytes()[:-500])
    write_series(tmp_path / "in" / "single", array[:, :, :1], affine, SeriesNumber=3)

    run = denoise(tmp_path / "in", tmp_path / "out", prior=prior)

    assert sorted(case.status for case in run.cases) == ["done", "failed", "refused"]
    seen = (tmp_path / "out" / "run.json").read_text() + "".join(map(str, (tmp_path / "out").rglob("*")))
    for secret in (*PATIENT.split("^"), "4711"):
        assert secret.lower() not in seen.replace(str(tmp_path), "").lower()


def test_the_device_is_checked() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device(None) == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("gpu", "cuda:99", "meta"):
        with pytest.raises(MedfusionError, match=f"--device {device}: cannot be used on this machine"):
            pick_device(device)


@pytest.mark.parametrize(
    ("statuses", "interrupted", "code"),
    [
        ([], False, 0),
        (["done", "skipped"], False, 0),
        (["done", "refused"], False, 1),
        (["refused", "refused"], False, 2),
        (["failed"], True, 130),
    ],
)
def test_exit_codes(statuses: list[str], interrupted: bool, code: int) -> None:
    cases = [Case("a", status) for status in statuses]  # type: ignore[arg-type]
    assert Run("test", {}, {}, {}, "now", cases=cases, interrupted=interrupted).exit_code == code
