"""The case loop: progress, one failing case does not stop the others, final table, ``run.json``, exit code."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from medfusion import __version__
from medfusion.errors import MedfusionError
from medfusion.io import Series, discover, staged
from medfusion.io.output import check_output
from medfusion.prior import Prior, prior_path

Status = Literal["done", "skipped", "refused", "failed"]


@dataclass(frozen=True)
class Settings:
    """What was asked for: the command, its folders and the options that every task has.

    ``options`` are the task's own, written to ``run.json``; ``volume`` picks one volume of 4D files.
    """

    command: str
    input: Path
    output: Path
    prior: str
    device: str | None
    options: dict[str, Any]
    volume: int | None
    overwrite: bool
    resume: bool


@dataclass(frozen=True)
class Job:
    """One case to do: ``work`` writes ``targets``, whole or not at all, and returns one line about what it found.

    ``inputs`` are the files it is made from. ``problems`` are the reasons why the scan cannot be used; a job that has
    any is refused without being tried.
    """

    name: str
    inputs: tuple[Path, ...]
    targets: list[Path]
    work: Callable[[Prior], str]
    problems: tuple[str, ...] = ()


@dataclass
class Case:
    """What became of one scan: done, skipped (whole already), refused (unusable as found) or failed.

    ``fingerprint`` stands for inputs, prior and settings: ``resume`` keeps only what they would make again.
    """

    name: str
    status: Status
    seconds: float = 0.0
    message: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    fingerprint: str = ""


@dataclass
class Run:
    """The record of a run; ``run.json`` holds it beside the outputs."""

    command: str
    settings: dict[str, Any]
    prior: dict[str, Any]
    environment: dict[str, Any]
    started: str
    seconds: float = 0.0
    cases: list[Case] = field(default_factory=list)
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some case failed or was refused, 2 no scan could be read, 130 interrupted."""
        if self.interrupted:
            return 130
        if self.cases and all(case.status == "refused" for case in self.cases):
            return 2
        return int(any(case.status in ("failed", "refused") for case in self.cases))


def single_file(output: Path) -> bool:
    """Whether ``output`` names one NIfTI file and not a folder."""
    return output.name.endswith((".nii", ".nii.gz"))


def require_folder(output: Path) -> None:
    """Refuse an output that is named like one NIfTI file, for tasks that write several files a case.

    Raises
    ------
    MedfusionError : it is.
    """
    if single_file(output):
        raise MedfusionError(f"{output}: one file cannot hold all results of a case", fix="name a folder instead")


def pick_device(device: str | None) -> str:
    """The device asked for, else the first GPU, else the CPU.

    Raises
    ------
    MedfusionError : this machine has no such device, or none that works.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MedfusionError(
            f"--device {device}: cannot be used on this machine",
            reason=str(error).partition("\n")[0][:200],
            fix="leave the option out, or name another device: cpu, cuda, cuda:1, ...",
        ) from error
    return device


def scan_jobs(
    settings: Settings, targets: Callable[[Series], list[Path]], work: Callable[[Series, Prior], str]
) -> list[Job]:
    """One job for each scan under ``settings.input``; scans that cannot be used become jobs with problems.

    Raises
    ------
    MedfusionError : nothing is readable, or one output file is named for several scans.
    """
    found = discover(settings.input)
    if single_file(settings.output) and len(found) > 1:
        raise MedfusionError(
            f"{settings.output}: one file cannot hold the results of {len(found)} scans", fix="name a folder instead"
        )
    return [Job(s.name, s.files, targets(s), partial(work, s), s.problems) for s in found]


def run_jobs(settings: Settings, jobs: Sequence[Job]) -> Run:
    """Do every job, each on its own, and leave ``run.json`` beside the outputs.

    Raises
    ------
    MedfusionError : before any work, when the output cannot be written, or something is there already and neither
        ``overwrite`` nor ``resume`` was asked for.
    """
    check_output(settings.output, settings.input)
    _refuse_existing(settings, [target for job in jobs for target in job.targets if target.exists()])
    prior = Prior.load(settings.prior, pick_device(settings.device))
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run = Run(settings.command, _plain(settings), _about(prior), environment(str(prior.device)), started)
    record = (settings.output.parent if single_file(settings.output) else settings.output) / "run.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    made = _made_before(record) if settings.resume else {}
    maker = _sha256(prior_path(settings.prior).read_bytes())
    began = time.monotonic()
    try:
        for job in _progress(jobs, settings.command):
            fingerprint = _fingerprint(job, settings, maker)
            if made.get(job.name, {}).get("fingerprint") == fingerprint and all(t.exists() for t in job.targets):
                case = Case(job.name, "skipped", message="already whole")
            else:
                case = _run_job(job, prior)
            case.inputs, case.fingerprint = _names(job.inputs), fingerprint
            case.outputs = _names(job.targets) if case.status in ("done", "skipped") else []
            run.cases.append(case)
            run.seconds = _since(began)
            _write(run, record)  # after every case, so that a killed run can be resumed
    except KeyboardInterrupt:
        run.interrupted = True
        _write(run, record)
    return run


def _run_job(job: Job, prior: Prior) -> Case:
    if job.problems:
        return Case(job.name, "refused", message="; ".join(job.problems))
    there = {target for target in job.targets if target.exists()}
    began = time.monotonic()
    try:
        message = job.work(prior)
    except BaseException as error:  # isolation is the point: whatever one case does, the others get their turn
        for target in set(job.targets) - there:  # all results of a case or none
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        logging.getLogger(__name__).debug("%s failed", job.name, exc_info=True)
        reason = str(error) if isinstance(error, MedfusionError) else f"{type(error).__name__}: {error}"
        return Case(job.name, "failed", _since(began), reason)
    return Case(job.name, "done", _since(began), message)


def _fingerprint(job: Job, settings: Settings, maker: str) -> str:
    """Of what decides the results of a job: the files as they are now, the prior's weights and the options."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in job.inputs]
    return _sha256(json.dumps([settings.command, settings.options, settings.volume, maker, files]).encode())


def _made_before(record: Path) -> dict[str, dict[str, Any]]:
    """Cases that an earlier run in the same folder finished, by name."""
    if not record.exists():
        return {}
    try:
        cases = json.loads(record.read_text())["cases"]
        return {case["name"]: case for case in cases if case["status"] in ("done", "skipped")}
    except (ValueError, KeyError, TypeError) as error:
        raise MedfusionError(
            f"{record}: not a record to resume from", fix="--overwrite does everything anew"
        ) from error


def _write(run: Run, record: Path) -> None:
    with staged(record, overwrite=True) as unfinished:
        unfinished.write_text(json.dumps(asdict(run), indent=2) + "\n")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _since(began: float) -> float:
    return round(time.monotonic() - began, 2)


def environment(device: str) -> dict[str, Any]:
    """Versions, device and thread count, for ``run.json``."""
    return {
        "medfusion": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "monai", "numpy", "nibabel", "pydicom")},
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _refuse_existing(settings: Settings, existing: list[Path]) -> None:
    if settings.overwrite and settings.resume:
        raise MedfusionError("--overwrite and --resume exclude each other", fix="choose one of them")
    if existing and not settings.overwrite and not settings.resume:
        raise MedfusionError(
            f"{settings.output}: {len(existing)} output(s) exist already",
            first=existing[0],
            fix="--overwrite to replace them, --resume to keep those that are whole and do the rest",
        )


def _progress(jobs: Sequence[Job], command: str) -> Iterable[Job]:
    """A bar on a terminal, one plain line a case elsewhere."""
    from rich.console import Console
    from rich.progress import track

    if sys.stderr.isatty():
        return track(jobs, description=command, console=Console(stderr=True))
    return _plain_progress(jobs, command)


def _plain_progress(jobs: Sequence[Job], command: str) -> Iterable[Job]:
    for index, job in enumerate(jobs, 1):
        sys.stderr.write(f"{command} {index}/{len(jobs)} {job.name}\n")
        yield job


def _plain(settings: Settings) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}


def _about(prior: Prior) -> dict[str, Any]:
    return {"name": prior.name, "config": prior.config.model_dump(), **prior.provenance}


def _names(paths: Iterable[Path]) -> list[str]:
    return [str(path) for path in paths]
