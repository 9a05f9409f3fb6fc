"""Checkpoints and metrics.jsonl: whole or absent, and resumed exactly.

The row of a step is written before its checkpoint; resuming drops the rows behind the checkpoint, so a run that was
killed anywhere ends with the files of one that was not.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from medfusion.config import Config
from medfusion.errors import MedfusionError
from medfusion.io import disk_full_told, staged

UNDECISIVE = {"accumulate", "recompute", "compile", "checkpoint_every", "validate_every"}  # for the result
CHECKPOINT, METRICS, PRIOR, CARD = "checkpoint.pt", "metrics.jsonl", "prior.safetensors", "card.md"


def save_checkpoint(
    out: Path,
    config: Config,
    step: int,
    network: nn.Module,
    ema: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    **progress: Any,
) -> None:
    """Replace the checkpoint of the folder ``out``; the old one stays until the new one is whole on the disk.

    ``progress`` is kept with it: what else the run needs to go on as if it had not been stopped.
    """
    state = progress | {
        "step": step,
        "config": config.model_dump_json(),
        "network": network.state_dict(),
        "ema": ema.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    content = io.BytesIO()  # a full disk would make torch.save raise an error that does not say so
    torch.save(state, content)
    with staged(out / CHECKPOINT, overwrite=True) as unfinished, unfinished.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # on the disk before the old one goes: a power cut would else leave neither


def read_checkpoint(out: Path, config: Config, parts: set[str] | None = None) -> dict[str, Any]:
    """What a run in the folder ``out`` is resumed from; ``parts`` of the config matter to it, or all.

    Raises
    ------
    MedfusionError : there is no checkpoint, it is damaged, or it was made with other settings that change the result.
    """
    path = out / CHECKPOINT
    if not path.is_file():
        raise MedfusionError(f"{out}: no checkpoint to resume from", fix="leave out --resume to begin anew")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")  # weights_only: nothing in it is executed
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise MedfusionError(f"{path}: damaged, or no checkpoint", fix="--overwrite to begin anew") from error
    if not isinstance(state, dict) or not {"config", "scans", "losses", "norms", "worked"} <= state.keys():
        raise MedfusionError(f"{path}: no checkpoint of this version of medfusion", fix="--overwrite to begin anew")
    try:  # settings that are new since then have defaults
        other = _decisive(Config.model_validate_json(state["config"]), parts)
    except ValidationError:
        other = {}
    changed = [name for name, value in _decisive(config, parts).items() if other.get(name) != value]
    if changed:
        raise MedfusionError(
            f"{path}: was made with another config",
            other_settings=", ".join(changed) if other else "one that does not exist",
            fix="resume with the same config, or choose a new --out",
        )
    return state


def _decisive(config: Config, parts: set[str] | None) -> dict[str, Any]:
    """The settings, by their full names, without those that may change on the way because the result does not."""
    tree = config.model_dump(include=parts, exclude={"licence": True, "notes": True, "training": UNDECISIVE})
    sections = {name: value for name, value in tree.items() if isinstance(value, dict)}
    single = {name: value for name, value in tree.items() if name not in sections}
    return single | {f"{section}.{name}": v for section, values in sections.items() for name, v in values.items()}


def begin(out: Path) -> None:
    """An empty folder ``out``: what a later ``resume`` would take for this run's is removed."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (CHECKPOINT, METRICS, PRIOR, CARD):
        (out / name).unlink(missing_ok=True)
    _sweep(out)


def forget_after(out: Path, step: int) -> None:
    """Drop what a kill left: the rows of metrics.jsonl behind ``step``, a line cut short, files half written."""
    _sweep(out)
    path = out / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    with staged(path, overwrite=True) as unfinished:
        unfinished.write_text("".join(kept))


def _sweep(out: Path) -> None:
    for rest in out.glob(".partial-*"):
        rest.unlink()


def log(out: Path, row: dict[str, Any]) -> None:
    """Append one row to metrics.jsonl; a resumed run drops what a full disk cut short.

    Raises
    ------
    MedfusionError : the disk is full.
    """
    with disk_full_told(out / METRICS), (out / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")
