"""Trainings of toy size: their scans and what they leave; run as a script, one of several processes of a launcher."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from prior_factory import grid, head, tiny_config

from medfusion.config import Config
from medfusion.data.crops import Case, prepare
from medfusion.training import train
from medfusion.training.meter import State
from medfusion.volume import Volume

TIMINGS = ("images_per_second", "waiting", "seconds")


def toy_cases(number: int = 5) -> list[Case]:
    """Heads that differ by their noise alone."""
    affine, shape = grid((40, 40, 40)), (40, 40, 40)
    volumes = [Volume(head(affine, shape, noise=5, seed=n), affine, f"case{n}") for n in range(number)]
    return [prepare(volume, tiny_config().preprocessing) for volume in volumes]


def toy_config(**training: Any) -> Config:
    return tiny_config(training=training)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_timings(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows(out)]


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """The two ended with the same bits in everything but the clock."""
    assert without_timings(one) == without_timings(other)
    first, second = checkpoint(one), checkpoint(other)
    for part in ("step", "network", "ema", "optimizers", "losses"):
        torch.testing.assert_close(second[part], first[part], rtol=0, atol=0)


def losses_by_process(out: Path, **training: Any) -> None:
    """Train as one of the processes of a launcher, and write every loss that this one saw."""
    seen: list[float] = []

    def note(state: State) -> None:
        seen.append(state.loss)

    torch.set_num_threads(1)
    said: list[str] = []
    train(toy_cases(), toy_config(**training), out, workers=0, say=said.append, progress=note)
    with (out / f"losses_{'_'.join(said[0].split()[:2])}.txt").open("a") as file:
        file.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    losses_by_process(Path(sys.argv[1]), **json.loads(sys.argv[2]))
