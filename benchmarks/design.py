"""Which design of `configs/brain_t1.yaml` learns most at a given cost: variants of it, each trained for as many FLOPs.

    MEDFUSION_DATA=... python benchmarks/design.py [--steps 120] [--only VARIANT ...] [--out runs/design]

Each variant changes what its name says and nothing else, and is trained from nothing, in a process of its own. The
config's own design gets ``--steps`` steps, the others as many as come to the same FLOPs: wall time would be nearer to
what matters, but it changes by a fifth from run to run on a shared machine, and so would the order. Judged as in
`training.py`: PSNR in the brain of four held-out training scans at 5, 10 and 20 % noise, whole volumes, one evaluation.
OUT receives a row of `design.jsonl` for each.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from training import CONFIG, LEVELS, alone, flops_a_crop, folder, judge

from medfusion.config import load_config
from medfusion.data.crops import split
from medfusion.io import discover
from medfusion.prior import build_network
from medfusion.tasks.denoise import denoise_volume
from medfusion.tasks.noise import Noise
from medfusion.training import load_cases, train

JUDGED = 4  # of the scans
SHORT = ["training.warmup=10", "training.ema_half_life=60"]  # in proportion to the steps
VARIANTS: dict[str, list[str]] = {
    "as in the config": [],
    "AdamW 6e-4": ["training.optimizer=adamw", "training.learning_rate=6e-4"],
    "learning rate 4e-3": ["training.learning_rate=4e-3"],
    "learning rate 1e-3": ["training.learning_rate=1e-3"],
    "crop 48, batch 2": ["data.crop=48", "training.batch=2"],
    "batch 3": ["training.batch=3"],
    "batch 12": ["training.batch=12"],
    "narrower": ["network.channels=[24, 48, 96, 128]"],
    "wider": ["network.channels=[48, 96, 128, 160]"],
    "no stem": ["network.stem=0"],
    "stem 16": ["network.stem=16"],
    "depth below": ["network.blocks=[1, 3, 2, 1]"],
    "deeper": ["network.blocks=[3, 3, 2, 1]"],
    "prediction edm": ["process.prediction=edm"],
    "prediction epsilon": ["process.prediction=epsilon"],
    "weight min-SNR": ["training.objective=min_snr"],
    "times: 85 % about real noise": ["training.times={lognormal_share: 0.85}"],
    "times: all uniform": ["training.times={lognormal_share: 0}"],
    "average over 4 times as many crops": ["training.ema_half_life=240"],
    "average over a quarter": ["training.ema_half_life=15"],
}


def learn(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Train one variant and judge it."""
    changes = [f"data.validation={JUDGED}", *SHORT, *VARIANTS[name]]
    # one cache for all: what is prepared does not depend on what is varied
    cases, _ = load_cases(folder(), load_config(arguments.config, changes), cache=arguments.out / "cache")
    held_out = {case.name for case in split(cases, JUDGED, 0)[1]}
    judged = [series for series in discover(folder(), pattern="*_T1.nii.gz") if series.name in held_out]
    steps = round(arguments.steps * flops_a_step(arguments.config, []) / flops_a_step(arguments.config, VARIANTS[name]))
    changes += [f"training.steps={steps}", f"training.validate_every={steps}", f"training.checkpoint_every={steps}"]
    out = arguments.out / name.replace(" ", "_")
    prior = train(cases, load_config(arguments.config, changes), out, data="IXI", device=arguments.device)
    found = judge(judged, lambda noisy, sigma, box: denoise_volume(noisy, prior, noise=Noise(sigma)).volume.array)
    seconds = round(3600 * prior.provenance["hours"])
    row = {"design": name, "steps": steps, "seconds": seconds, "parameters": prior.provenance["parameters"]}
    return row | {level: pair["denoised"] for level, pair in found.items()}


def flops_a_step(path: Path, changes: list[str]) -> int:
    """Of the network, for the batch of a variant."""
    config = load_config(path, changes)
    return config.training.batch * flops_a_crop(build_network(config), config.data.crop, torch.zeros(1))


def print_table(rows: list[dict[str, object]]) -> None:
    """Every design beside the config's own."""
    table = Table("design", "parameters", "steps", "s", *(f"{level:.0%} dB" for level in LEVELS))
    for row in rows:
        decibels = [f"{row[f'{level:g}']:.2f}" for level in LEVELS]
        table.add_row(
            str(row["design"]), f"{row['parameters']:,}", str(row["steps"]), f"{row['seconds']:.0f}", *decibels
        )
    Console(width=100).print(table)


def main() -> None:
    """Train each variant, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/design"))
    arguments = parser.parse_args()
    if "MEDFUSION_DATA" not in os.environ:
        parser.error("set MEDFUSION_DATA to the folder of scans")
    rows = []
    for name in arguments.only:
        rows.append(alone(learn, name, arguments))
        with (arguments.out / "design.jsonl").open("a") as log:
            log.write(json.dumps(rows[-1]) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
