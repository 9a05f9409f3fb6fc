"""The case loop: progress, one failing case does not stop the others, final table, ``run.json``, exit code."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from medfusion import __version__
from medfusion.errors import MedfusionError
from medfusion.io import Series, discover, staged
from medfusion.io.output import check_output
from medfusion.prior import Prior

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

    ``problems`` are the reasons why the scan cannot be used; a job that has any is refused without being tried.
    """

    name: str
    targets: list[Path]
    work: Callable[[Prior], str]
    problems: tuple[str, ...] = ()


@dataclass
class Case:
    """What became of one scan: done, skipped (whole already), refused (unusable as found) or failed."""

    name: str
    status: Status
    seconds: float = 0.0
    message: str = ""
    outputs: list[str] = field(default_factory=list)


@dataclass
class Run:
    """The record of a run; ``run.json`` holds it beside the outputs."""

    command: str
    settings: dict[str, Any]
    prior: dict[str, Any]
    environment: dict[str, Any]
    seconds: float = 0.0
    cases: list[Case] = field(default_factory=list)
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some case failed or was refused, 130 interrupted."""
        if self.interrupted:
            return 130
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
    return [Job(s.name, targets(s), partial(work, s), s.problems) for s in found]


def run_jobs(settings: Settings, jobs: Sequence[Job]) -> Run:
    """Do every job, each on its own, and leave ``run.json`` beside the outputs.

    Raises
    ------
    MedfusionError : before any work, when the output cannot be written, or something is there already and neither
        ``overwrite`` nor ``resume`` was asked for.
    """
    check_output(settings.output, settings.input)
    whole = {job.name for job in jobs if all(target.exists() for target in job.targets)}
    _refuse_existing(settings, [target for job in jobs for target in job.targets if target.exists()])
    prior = Prior.load(settings.prior, pick_device(settings.device))
    run = Run(settings.command, _plain(settings), _about(prior), environment(str(prior.device)))
    folder = settings.output.parent if single_file(settings.output) else settings.output
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        for job in _progress(jobs, settings.command):
            if settings.resume and job.name in whole and not job.problems:
                run.cases.append(Case(job.name, "skipped", message="already whole", outputs=_names(job.targets)))
            else:
                run.cases.append(_run_job(job, prior))
    except KeyboardInterrupt:
        run.interrupted = True
    run.seconds = round(time.monotonic() - began, 2)
    with staged(folder / "run.json", overwrite=True) as unfinished:
        unfinished.write_text(json.dumps(asdict(run), indent=2) + "\n")
    return run


def _run_job(job: Job, prior: Prior) -> Case:
    if job.problems:
        return Case(job.name, "refused", message="; ".join(job.problems))
    began = time.monotonic()
    try:
        message = job.work(prior)
    except MedfusionError as error:
        return Case(job.name, "failed", _since(began), str(error))
    except Exception as error:  # isolation is the point: whatever one case does, the others get their turn
        return Case(job.name, "failed", _since(began), f"{type(error).__name__}: {error}")
    return Case(job.name, "done", _since(began), message, _names(job.targets))


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
    return {"name": prior.name, "process": prior.config.process.model_dump(), **prior.provenance}


def _names(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths]
