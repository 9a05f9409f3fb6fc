"""Checkpoints: a run killed at any moment ends as the unbroken one, bit for bit; what is no checkpoint is refused."""

import errno
import multiprocessing
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import assert_same_run, checkpoint, rows, toy_cases, toy_config

from medfusion.data.crops import Case
from medfusion.errors import MedfusionError
from medfusion.training import checkpoint as module
from medfusion.training import train
from medfusion.training.checkpoint import read_checkpoint
from medfusion.training.meter import State


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return toy_cases()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _train(cases: list[Case], settings: dict[str, Any], out: Path, resume: bool, workers: int, moment: str) -> None:
    """In a process of its own: train, and be killed at a moment such as "row 6"."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in a run
    where, _, step = moment.partition(" ")
    log, sync, replace_ = module.log, os.fsync, os.replace

    def killed_in_a_row(folder: Path, row: dict[str, Any]) -> None:
        if row["step"] == int(step):
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"step": 6, "lo')
            _die()
        log(folder, row)

    def killed_while_writing(number: int) -> None:
        sync(number)
        assert next(out.glob(".partial-*-checkpoint.pt")).stat().st_size > 1000
        _die()

    def killed_when_replaced(source: Path, target: Path) -> None:
        replace_(source, target)
        if target.name == "checkpoint.pt":
            _die()

    if where == "row":
        module.log = killed_in_a_row
    elif where == "writing":
        os.fsync = killed_while_writing  # type: ignore[assignment]
    elif where == "replaced":
        os.replace = killed_when_replaced  # type: ignore[assignment]

    def progress(state: State) -> None:
        if where == "step" and state.step == int(step):
            _die()

    train(cases, toy_config(**settings), out, resume=resume, workers=workers, device="cpu", progress=progress)


def _in_a_process(cases: list[Case], *arguments: Any) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["medfusion.training", "matplotlib.image", "torch._dynamo", "torch.utils.tensorboard"]
    )
    process = context.Process(target=_train, args=(cases, *arguments))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(
    ("settings", "workers"),
    [({"optimizer": "muon", "batch": 4, "accumulate": 2}, 0), ({"optimizer": "adamw"}, 2)],
    ids=["muon in parts", "adamw with workers"],
)
def test_a_run_killed_at_any_moment_ends_as_the_unbroken_one(
    tmp_path: Path, cases: list[Case], settings: dict[str, Any], workers: int
) -> None:
    settings = settings | {"steps": 8, "checkpoint_every": 3, "validate_every": 4}
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    assert _in_a_process(cases, settings, unbroken, False, workers, "") == 0
    steps = []
    for number, moment in enumerate(["step 5", "row 6", "writing", "replaced", "step 7"]):
        assert _in_a_process(cases, settings, broken, number > 0, workers, moment) == -signal.SIGKILL
        steps.append(checkpoint(broken)["step"])
    assert steps == [3, 3, 3, 6, 6]
    assert not (broken / "prior.safetensors").exists()
    assert _in_a_process(cases, settings, broken, True, workers, "") == 0
    assert_same_run(unbroken, broken)
    assert not list(broken.glob(".partial-*"))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, toy_config(), tmp_path, device="cpu")
    before, measured = checkpoint(tmp_path), rows(tmp_path)
    seen: list[State] = []
    train(cases, toy_config(), tmp_path, resume=True, device="cpu", progress=seen.append)
    assert not seen
    torch.testing.assert_close(checkpoint(tmp_path)["ema"], before["ema"], rtol=0, atol=0)
    assert rows(tmp_path) == measured


def test_a_new_run_cannot_be_resumed_from_the_checkpoint_of_the_one_before(tmp_path: Path, cases: list[Case]) -> None:
    def interrupt(state: State) -> None:
        raise KeyboardInterrupt

    train(cases, toy_config(), tmp_path, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(cases, toy_config(), tmp_path, device="cpu", progress=interrupt)
    with pytest.raises(MedfusionError, match="no checkpoint to resume from"):
        train(cases, toy_config(), tmp_path, resume=True, device="cpu")
    assert not any((tmp_path / name).exists() for name in ("prior.safetensors", "card.md", "metrics.jsonl"))


def test_another_config_and_other_scans_cannot_be_resumed(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, toy_config(), tmp_path, device="cpu")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(MedfusionError, match="was made with another config") as error:
        train(cases, toy_config(learning_rate=1e-4, steps=5), tmp_path, resume=True, device="cpu")
    assert error.value.facts["other_settings"] == "training.steps, training.learning_rate"
    with pytest.raises(MedfusionError, match="was begun with other scans") as error:
        train([*toy_cases(6)], toy_config(), tmp_path, resume=True, device="cpu")
    assert "case5" in error.value.facts["gone_or_new"]
    with pytest.raises(MedfusionError, match="was begun with other scans") as error:
        train(cases[::-1], toy_config(), tmp_path, resume=True, device="cpu")
    assert "order" in error.value.facts["gone_or_new"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_what_only_saves_memory_or_time_may_change_on_the_way(tmp_path: Path, cases: list[Case]) -> None:
    """As after running out of memory: the advice is to be followed and the run resumed."""
    settings = {"batch": 2, "steps": 4}
    unbroken = train(cases, toy_config(**settings), tmp_path / "unbroken", device="cpu")

    def interrupt(state: State) -> None:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(cases, toy_config(**settings), tmp_path / "run", device="cpu", progress=interrupt)
    changed = toy_config(**settings, accumulate=2, recompute=True, checkpoint_every=3, validate_every=2)
    resumed = train(cases, changed, tmp_path / "run", device="cpu", resume=True)
    for name, weight in unbroken.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], weight, atol=1e-4, rtol=1e-3)


def test_settings_that_do_not_exist_are_another_config_and_those_that_did_not_yet_are_not(
    tmp_path: Path, cases: list[Case]
) -> None:
    train(cases, toy_config(), tmp_path, device="cpu")
    path, state = tmp_path / "checkpoint.pt", checkpoint(tmp_path)
    torch.save(state | {"config": state["config"].replace('"batch"', '"bunch"')}, path)
    with pytest.raises(MedfusionError, match="was made with another config"):
        read_checkpoint(tmp_path, toy_config())
    assert '"family":"vp",' in state["config"]
    torch.save(state | {"config": state["config"].replace('"family":"vp",', "")}, path)
    assert read_checkpoint(tmp_path, toy_config())["step"] == 4
    torch.save({"network": {}}, path)
    with pytest.raises(MedfusionError, match="no checkpoint of this version"):
        read_checkpoint(tmp_path, toy_config())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "truncated"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, cases: list[Case], content: bytes | None) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is None:
        train(cases, toy_config(), tmp_path, device="cpu")
        content = path.read_bytes()[:-1000]
    path.write_bytes(content)
    with pytest.raises(MedfusionError, match="damaged, or no checkpoint"):
        read_checkpoint(tmp_path, toy_config())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_says_so_for_a_row_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(MedfusionError, match=r"metrics\.jsonl: no space left to write it"):
        module.log(tmp_path, {"step": 5})


def test_a_full_disk_says_so_and_leaves_the_old_checkpoint(tmp_path: Path, cases: list[Case]) -> None:
    limits, size = resource.getrlimit(resource.RLIMIT_FSIZE), list[int]()

    def fill(state: State) -> None:
        if state.step == 3:
            size.append((tmp_path / "checkpoint.pt").stat().st_size)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size[0] // 2, limits[1]))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(MedfusionError, match=r"checkpoint\.pt: no space left to write it") as error:
            train(cases, toy_config(), tmp_path, device="cpu", progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.EFBIG
    assert not list(tmp_path.glob(".partial-*"))
    assert read_checkpoint(tmp_path, toy_config())["step"] == 2
    train(cases, toy_config(), tmp_path, resume=True, device="cpu")
    train(cases, toy_config(), tmp_path / "unbroken", device="cpu")
    assert_same_run(tmp_path / "unbroken", tmp_path)
