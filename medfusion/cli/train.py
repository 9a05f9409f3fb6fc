"""``medfusion train``: read the config and the scans, train with a progress bar, say where the prior is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from medfusion.errors import MedfusionError

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAIN_EVERY = 25  # steps between lines where there is no terminal to draw a bar on


def train_prior(
    config_path: Path, data: Path, out: Path, overrides: list[str], *, device: str | None, overwrite: bool, resume: bool
) -> int:
    """Train, and return the exit code."""
    from medfusion.config import load_config
    from medfusion.io.output import check_output, staged
    from medfusion.tasks.runner import environment, pick_device
    from medfusion.training import load_cases, read_checkpoint, train

    console = Console(stderr=True)
    config = load_config(config_path, overrides)
    device = pick_device(device)
    check_output(out, data)
    if resume and overwrite:
        raise MedfusionError("--overwrite and --resume exclude each other", fix="choose one of them")
    if resume:
        read_checkpoint(out, config)  # refused before the scans are read and before anything is written
    elif not overwrite and any((out / name).exists() for name in ("checkpoint.pt", "prior.safetensors")):
        raise MedfusionError(f"{out}: holds a run already", fix="--resume to continue it, --overwrite to begin anew")
    cases = load_cases(data, config, lambda done, total, name: _note(console, f"reading {done}/{total} {name}"))
    console.print(f"{len({case.name for case in cases})} scans, {len(cases)} training images with their variants")
    began, interrupted = time.monotonic(), False
    try:
        with _bar(console, config.training.steps) as advance:
            train(cases, config, out, data=data.name, resume=resume, device=device, progress=advance)
    except KeyboardInterrupt:
        interrupted = True
    record = {
        "command": "train",
        "data": str(data),
        "scans": sorted({case.name for case in cases}),
        "config": config.model_dump(),
        "environment": environment(device),
        "seconds": round(time.monotonic() - began, 1),
        "interrupted": interrupted,
        "outputs": sorted(path.name for path in out.iterdir()),
    }
    with staged(out / "run.json", overwrite=True) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
    if interrupted:
        kept = (out / "checkpoint.pt").exists()
        console.print(f"Interrupted{': --resume continues from the last checkpoint' if kept else ''}")
        return 130
    prior = out / "prior.safetensors"
    console.print(f"Prior: {prior}\nUse it with --prior {prior}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _note(console: Console, line: str) -> None:
    if console.is_terminal:
        console.print(line, end="\r", markup=False)


@contextmanager
def _bar(console: Console, steps: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar with the smoothed loss on a terminal, a line now and then elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    average = 0.0

    def smooth(step: int, loss: float) -> float:
        nonlocal average
        weight = max(0.02, 1 / step)
        average += weight * (loss - average) if average else loss
        return average

    if not console.is_terminal:

        def line(step: int, loss: float) -> None:
            mean = smooth(step, loss)
            if step % PLAIN_EVERY == 0 or step == steps:
                sys.stderr.write(f"step {step}/{steps}  loss {mean:.4f}\n")

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)

        def advance(step: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"loss {smooth(step, loss):.4f}")

        yield advance
