"""``medfusion train``: read the config and the scans, show the audit, train with a bar, say where the prior is."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from medfusion.errors import MedfusionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medfusion.config import Config
    from medfusion.data.crops import Case
    from medfusion.training import Audit
    from medfusion.training.meter import State

PLAIN_EVERY = 25  # scans or steps between lines where there is no terminal to draw a bar on
RUN = ("checkpoint.pt", "prior.safetensors", "autoencoder/checkpoint.pt")  # what a run leaves
LISTED = 10  # scans named for each remark of the audit; audit.csv has them all


def train_prior(
    config_path: Path,
    data: list[Path],
    out: Path,
    overrides: list[str],
    *,
    cache: Path | None,
    exclude: list[str],
    device: str | None,
    workers: int | None,
    overwrite: bool,
    resume: bool,
) -> int:
    """Train on a folder of scans, or one of each domain, and return the exit code."""
    from medfusion.config import load_config
    from medfusion.training import load_cases, load_domains

    config = load_config(config_path, overrides)
    if config.cyclegan is not None:
        load = partial(load_domains, data, config, exclude=exclude)
    elif len(data) == 1:
        load = partial(load_cases, data[0], config, exclude=exclude)
    else:
        raise MedfusionError(f"{len(data)} folders of data, and {config.name} is trained on one", fix="one --data")
    return train_cases(
        load, config, data, out, cache=cache, device=device, workers=workers, overwrite=overwrite, resume=resume
    )


def train_cases(
    load: Callable[..., tuple[list[Case], Audit]],
    config: Config,
    data: list[Path],
    out: Path,
    *,
    cache: Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> int:
    """Train on the cases that ``load`` finds in the folders ``data``, and return the exit code.

    ``accelerate launch`` starts several processes: the first prints and writes, and each is given its device.
    """
    from medfusion.io.output import staged
    from medfusion.tasks.runner import environment, pick_device

    began = time.monotonic()
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    console = Console(stderr=True, quiet=rank > 0)
    if device is not None or processes == 1:
        device = pick_device(device)
    cache = out / "cache" if cache is None else cache
    _check_folders(config, data, out, cache, overwrite, resume)
    with _preparing(console) as note:
        cases, audit = load(cache=cache, progress=note)
    if rank == 0:
        audit.save(out / "audit.csv")
    _show(console, audit)
    name = " and ".join("/".join(folder.resolve().parts[-2:]) for folder in data)  # imagesTr alone would say little
    finished = _train(
        console,
        cases,
        config,
        out,
        data=name,
        resume=resume,
        device=device,
        workers=workers,
    )
    if rank == 0:
        record = {
            "command": "train",
            "data": [str(folder) for folder in data],
            "cache": str(cache),
            "scans": sorted({case.name for case in cases}),
            "audit": audit.summary(),
            "config": config.model_dump(),
            "environment": environment(device or f"{processes} processes of accelerate launch"),
            "seconds": round(time.monotonic() - began, 1),
            "interrupted": not finished,
            "outputs": sorted(path.name for path in out.iterdir()),
        }
        with staged(out / "run.json", overwrite=True) as unfinished:
            unfinished.write_text(json.dumps(record, indent=2) + "\n")
    if not finished:
        kept = any((out / name).exists() for name in RUN)
        _say(console, f"Interrupted{': --resume continues from the last checkpoint' if kept else ''}")
        return 130
    prior = out / "prior.safetensors"
    _say(console, f"Prior: {prior}\nCard: {out / 'card.md'}\nUse it with --prior {prior}")
    return 0


def _check_folders(config: Config, data: list[Path], out: Path, cache: Path, overwrite: bool, resume: bool) -> None:
    """Refuse, before the scans are read and before anything is written, what would spoil an earlier run or the data."""
    from medfusion.io.output import check_output
    from medfusion.training import read_run

    for folder in data:
        check_output(out, folder)
        check_output(cache, folder)
    if resume and overwrite:
        raise MedfusionError("--overwrite and --resume exclude each other", fix="choose one of them")
    if resume:
        read_run(out, config)
    elif not overwrite and any((out / name).exists() for name in RUN):
        raise MedfusionError(f"{out}: holds a run already", fix="--resume to continue it, --overwrite to begin anew")


def _train(console: Console, cases: list[Case], config: Config, out: Path, **options: Any) -> bool:
    """Whether the training came to its end; Ctrl-C and SIGTERM stop it before."""
    from medfusion.training import train

    try:
        steps = config.training.steps + (config.autoencoder.steps if config.autoencoder and config.latent else 0)
        with _bar(console, steps) as advance:
            train(cases, config, out, say=lambda line: _say(console, line), progress=advance, **options)
    except KeyboardInterrupt:
        return False
    return True


def _say(console: Console, line: str) -> None:
    """As it is: names and paths are to be copied."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _show(console: Console, audit: Audit) -> None:
    """The table of the audit, and below it what looks wrong."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE, show_header=False, pad_edge=False)
    for name, value in audit.properties.items():
        table.add_row(name, escape(value))
    console.print(table)
    rules: dict[str, list[str]] = {}
    for remark in audit.remarks:
        rules.setdefault(remark.rule, []).append(f"{remark.scan} ({remark.found})")
    for rule, found in rules.items():
        more = f" and {len(found) - LISTED} more, see audit.csv" if len(found) > LISTED else ""
        _say(console, f"Warning  {rule}: {', '.join(found[:LISTED])}{more}")


@contextmanager
def _preparing(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """The scan that was last put into the cache on a terminal, a line now and then elsewhere."""
    with console.status("reading scans") as status:

        def note(done: int, total: int, name: str) -> None:
            line = f"{done}/{total} scans prepared"
            if console.is_terminal:
                status.update(f"{line}: {name}")
            elif done % PLAIN_EVERY == 0:
                _say(console, line)

        yield note


@contextmanager
def _bar(console: Console, steps: int) -> Iterator[Callable[[State], None]]:
    """A progress bar with the smoothed loss on a terminal, a line now and then elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    average, seen = 0.0, 0

    def smooth(state: State) -> str:
        nonlocal average, seen
        if math.isnan(state.loss):  # not read yet: a GPU is asked every few steps
            return "loss ..."
        seen += 1
        average += max(0.02, 1 / seen) * (state.loss - average)
        waits = f"  waiting for data {state.waiting:.0%}" if state.waiting >= 0.01 else ""
        return f"loss {average:.4f}  {state.images_per_second:.3g} images/s{waits}"

    if not console.is_terminal:

        def line(state: State) -> None:
            text = smooth(state)
            if state.step % PLAIN_EVERY == 0 or state.step == steps:
                _say(console, f"step {state.step}/{steps}  {text}")

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)

        def advance(state: State) -> None:
            progress.update(task, completed=state.step, description=smooth(state))

        yield advance
