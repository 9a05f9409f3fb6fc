"""Batches: what the network is shown in step k, a function of (seed, number of the crop) alone, and who fetches it.

Crop j of step k has number k * batch + j. Of W processes, process r takes the r-th part of each step, so the union of
what they see does not depend on W; nor does it on workers, on parts of a batch, or on where a run was resumed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from medfusion.config import Config
from medfusion.data.crops import Case, Crop, Crops, Pairs, stack
from medfusion.diffusion import lognormal_times
from medfusion.prior import build_process

MOST_WORKERS = 8


class Shown(NamedTuple):
    """A batch and what is done to it: crop, noise (b, *``Config.noise_shape``), times (b,) on the CPU."""

    crop: Crop
    noise: Tensor
    t: Tensor


class Sample(NamedTuple):
    """A crop, the seed of its noise and its time; or a batch of them."""

    crop: Crop
    seed: Tensor
    t: Tensor

    def shown(self, device: torch.device, noise_shape: tuple[int, ...]) -> Shown:
        """A batch on ``device``; the noise is drawn there, whoever fetched the crops and wherever the scans lie."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        image, context, labels, class_index = self.crop
        crop = Crop(move(image), move(context), None if labels is None else move(labels), move(class_index))
        noise = [
            torch.randn(noise_shape, generator=torch.Generator(device).manual_seed(seed), device=device)
            for seed in self.seed.tolist()
        ]
        return Shown(crop, torch.stack(noise), self.t)


class Samples(Dataset[Sample]):
    """Sample n: crop number n with its time and the seed of its noise."""

    def __init__(self, cases: Sequence[Case], config: Config) -> None:
        self.config = config
        kind = Crops if config.cyclegan is None else Pairs
        self.crops: Crops | Pairs = kind(cases, config.data, config.training.seed)
        self.process = build_process(config)

    def __getitem__(self, number: int) -> Sample:
        crop, rng = self.crops.draw(number, located=self.config.network.located)
        seed, seed_of_time = rng.integers(2**62, size=2)
        return Sample(crop, torch.tensor(seed), self._time(int(seed_of_time)))

    def _time(self, seed: int) -> Tensor:
        """Log-normal noise ratio, as real scans have, or t uniform; never below the first step of the process."""
        times, generator = self.config.training.times, torch.Generator().manual_seed(seed)
        low = torch.rand((), generator=generator) < times.lognormal_share
        mean = float(torch.tensor(times.median).log())
        lognormal = lognormal_times(self.process, 1, generator, mean=mean, std=times.spread)[0].float()
        uniform = torch.rand((), generator=generator)
        return torch.where(low, lognormal, uniform).clamp(min=1 / self.process.steps)

    def scans_of_step(self, step: int) -> list[str]:
        """Names of the scans that the batch of a step is cut from."""
        batch = self.config.training.batch
        numbers = range(step * batch, (step + 1) * batch)
        return sorted({case.name for number in numbers for case in self.crops.cases(number)})


class Order(Sequence[list[int]]):
    """The sample numbers of each part of each step from ``start`` on, for process ``rank`` of ``processes``."""

    def __init__(self, config: Config, start: int, rank: int, processes: int) -> None:
        self.training, self.start, self.rank = config.training, start, rank
        self.size = config.training.batch // (processes * config.training.accumulate)  # of a part

    def __len__(self) -> int:
        return (self.training.steps - self.start) * self.training.accumulate

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        step, part = divmod(index, self.training.accumulate)
        first = (self.start + step) * self.training.batch
        first += (self.rank * self.training.accumulate + part) * self.size
        return list(range(first, first + self.size))

    def __iter__(self) -> Iterator[list[int]]:
        return (self[index] for index in range(len(self)))


def loader(samples: Samples, order: Order, workers: int) -> DataLoader[Sample]:
    """Parts of steps in ``order``, drawn by so many processes ahead of the network; 0: drawn when they are needed."""
    return DataLoader(
        samples,
        batch_sampler=order,
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        persistent_workers=False,
    )


def _collate(samples: list[Sample]) -> Sample:
    crops, seeds, t = zip(*samples, strict=True)
    return Sample(stack(crops), torch.stack(seeds), torch.stack(t))


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole group; the trainer finishes its step first."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers(parts: Iterator[Sample]) -> None:
    """End the processes behind ``iter(loader(...))``.

    The interpreter's exit asks by SIGTERM those that a traceback still keeps alive, and would wait for ever.
    """
    if isinstance(parts, _MultiProcessingDataLoaderIter):
        parts._shutdown_workers()


def default_workers(device: torch.device, resident: bool) -> int:
    """0 where the scans lie on the GPU or the CPU trains (they would take its cores), else up to eight a process."""
    if resident or device.type != "cuda":
        return 0
    cores = (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_WORKERS, max(1, cores - 1))
