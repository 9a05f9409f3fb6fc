"""What a training step costs: seconds and memory against crop size and channels.

    python benchmarks/training_cost.py [--beside recompute] [--device cuda]
    python benchmarks/training_cost.py --beside compile --crops 64 --channels 32,64,96,128

`configs/brain_t1.yaml` with these channels, two crops a step (for a single small one torch leaves oneDNN for
convolutions of its own, which are several times slower); weights, gradients, average and optimiser as in training, each
row in a process of its own. Seconds are the median of ``--repeats`` steps after two to warm up. Memory is what the
process grew by at its highest, on a GPU what its tensors took there; beside it what `medfusion train` predicts before
the first step. The last three columns repeat it with the setting named by ``--beside``. Prints the rows of the table in
`docs/training.md`.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from medfusion.config import Config, load_config
from medfusion.data.crops import Crop
from medfusion.networks.residual_unet import CONTEXT
from medfusion.training.batches import Sample
from medfusion.training.memory import available, step_bytes
from medfusion.training.optimizer import build_optimizers
from medfusion.training.stages import Diffusion

CONFIG = Path(__file__).parents[1] / "configs" / "brain_t1.yaml"
CROPS = (32, 48, 64)
BATCH = 2  # crops a step
WARM_UP = 2  # steps
CHANNELS = ((32, 64, 96, 128), (48, 96, 128, 160), (64, 128, 192, 256))


class Cost(NamedTuple):
    """Of a step; memory in bytes."""

    parameters: int
    seconds: float
    first: float  # seconds of the first step, which compiles
    memory: int
    predicted: int


def measure(config: Config, device: torch.device, repeats: int) -> Cost | None:
    """None where `medfusion train` would refuse because the memory is short."""
    before = psutil.Process().memory_info().rss
    stage = Diffusion(config)
    network = stage.build().to(device, memory_format=torch.channels_last_3d)
    predicted = step_bytes(stage, 1, device)
    if predicted > available(device):
        return None
    average, optimizers = deepcopy(network), build_optimizers(network, config.training)
    if config.training.compile:
        network.compile()
    shown, seconds = random_batch(config.data.crop).shown(device, config.noise_shape), []
    for _ in range(WARM_UP + repeats):
        began = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad()
        stage.loss(network, shown, 0.0).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 0.01)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else high_water() - before
    parameters = sum(p.numel() for p in network.parameters())
    return Cost(parameters, statistics.median(seconds[WARM_UP:]), seconds[0], memory, predicted)


def random_batch(edge: int) -> Sample:
    """A batch whose values do not matter."""
    image, context = torch.randn(BATCH, 1, edge, edge, edge), torch.zeros(BATCH, CONTEXT, *[edge // 2] * 3)
    crop = Crop(image, context, None, torch.full((BATCH,), -1))
    return Sample(crop, torch.arange(BATCH), torch.full((BATCH,), 0.2))


def high_water() -> int:
    """Most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def alone(
    crop: int, channels: tuple[int, ...], settings: dict[str, bool], arguments: argparse.Namespace
) -> Cost | None:
    """Measure in a process of its own, and so with a high-water mark of its own."""
    blocks = load_config(CONFIG).network.blocks[: len(channels)]
    changes = [f"network.channels={list(channels)}", f"network.blocks={list(blocks)}", f"data.crop={crop}"]
    settings = {"batch": BATCH} | settings
    changes += [f"training.{name}={json.dumps(value)}" for name, value in settings.items()]
    work = (load_config(CONFIG, changes), torch.device(arguments.device), arguments.repeats)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:  # the parent runs no thread of torch
        return pool.submit(measure, *work).result()


def cells(cost: Cost | None) -> list[str]:
    """Seconds, GiB and GiB predicted."""
    if cost is None:
        return ["does not fit", "", ""]
    return [f"{cost.seconds:.3g}", f"{cost.memory / 2**30:.2f}", f"{cost.predicted / 2**30:.2f}"]


def levels(text: str) -> tuple[int, ...]:
    """Such as 32,64,96,128."""
    return tuple(map(int, text.split(",")))


def main() -> None:
    """Measure every pair of crop and channels, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, nargs="+", default=CROPS)
    parser.add_argument("--channels", type=levels, nargs="+", default=CHANNELS)
    parser.add_argument("--beside", choices=("recompute", "compile"), default="recompute")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    three = ("s a step", "GiB", "predicted")
    head = ["crop", "channels", "parameters", "voxels/s", *three, *(f"{name}, {arguments.beside}" for name in three)]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for crop in arguments.crops:
        for channels in arguments.channels:
            plain = alone(crop, channels, {}, arguments)
            other = alone(crop, channels, {arguments.beside: True}, arguments)
            size = [f"{plain.parameters / 1e6:.1f} M", f"{BATCH * crop**3 / plain.seconds:,.0f}"] if plain else ["", ""]
            row = [f"{crop}^3", ", ".join(map(str, channels)), *size, *cells(plain), *cells(other)]
            print(f"| {' | '.join(row)} |", flush=True)
            if arguments.beside == "compile" and other:
                print(f"\nThe first step, which compiles, took {other.first:.0f} s.\n")


if __name__ == "__main__":
    main()
