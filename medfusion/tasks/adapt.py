"""Adapt a prior to noisy scans of a kind that it does not know, without clean ones.

Stein's unbiased risk estimate (Stein 1981; Metzler et al. 2018, "Unsupervised learning with Stein's unbiased risk
estimator") is the squared error of a denoiser as far as a noisy image alone can tell it:

    E |D - x_0|^2 = E |y - D|^2 - n r^2 + 2 r^2 E div D.

A copy of the prior is trained to make it small on blocks of the scans, at their own noise; what it reaches on voxels
that were kept back decides whether the copy is used.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfusion.data.intensity import SEEN, foreground, measure_scale
from medfusion.data.rician import stabilise
from medfusion.diffusion import residual
from medfusion.errors import MedfusionError
from medfusion.io import discover, read_volumes, staged
from medfusion.io.output import check_output
from medfusion.prior import Prior
from medfusion.tasks.denoise import acquired_array, volume_noise
from medfusion.tasks.noise import NEGLIGIBLE, Kind, Noise, blocks
from medfusion.tasks.runner import pick_device
from medfusion.volume import Volume

RATE = 2e-4  # of Adam
BATCH = 4  # blocks a step
MANY = 64  # blocks of a scan
HELD_OUT = 4  # one block in so many decides, by the voxels in its middle, which no block is learnt from
FEWEST = 16  # blocks: with fewer, what is kept back decides nothing
SURE = 2.0  # standard errors by which the risk has to fall


@dataclass(frozen=True)
class Adapted:
    """The prior to use. ``before`` and ``after``: the estimated squared error on voxels kept back, over the noise's.

    ``left_out`` are the scans that nothing could be learnt from, each with the reason.
    """

    prior: Prior
    before: float
    after: float
    steps: int
    kept: bool
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Block:
    """What the network is shown, (1, 1, d, h, w), its noise ratio, and which of its voxels count."""

    y: Tensor
    ratio: float
    counted: Tensor


def adapt(scans: Sequence[Volume], noises: Sequence[Noise], prior: Prior, minutes: float, *, seed: int = 0) -> Adapted:
    """Train a copy of ``prior`` on ``scans`` with these noises for so many minutes.

    Raises
    ------
    MedfusionError : the scans have too little tissue, or too little noise, to learn from.
    """
    judged: list[_Block] = []
    learnt: list[_Block] = []
    for scan, noise in zip(scans, noises, strict=True):
        found = _blocks(scan, noise, prior)
        judged, learnt = judged + found[0], learnt + found[1]
    if len(judged) + len(learnt) < FEWEST:
        raise MedfusionError(
            f"{len(judged) + len(learnt)} blocks of tissue with noise: too few to adapt a prior",
            least=FEWEST,
            fix="give more scans, or leave --adapt out",
        )
    network = copy.deepcopy(prior.network).train().requires_grad_(True)
    adapted = replace(prior, network=network)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    began, steps = time.monotonic(), 0
    while (spent := time.monotonic() - began) < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - spent / (60 * minutes))
        optimizer.zero_grad()
        for k in torch.randint(len(learnt), (BATCH,), generator=generator).tolist():
            (_risk(adapted, learnt[k], generator) / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        steps += 1
    network.eval().requires_grad_(False)
    before, after = (_risks(each, judged) for each in (prior, adapted))
    gain = before - after
    kept = bool(gain.mean() > SURE * gain.std(ddof=1) / len(gain) ** 0.5)
    origin = {"adapted_from": prior.name, "adapted_scans": len(scans), "adapted_steps": steps}
    chosen = replace(adapted, provenance=prior.provenance | origin) if kept else prior
    return Adapted(chosen, float(before.mean()), float(after.mean()), steps, kept)


def adapt_prior(
    input: Path,
    output: Path,
    *,
    minutes: float,
    prior: str = "brain-t1",
    sigma: float | None = None,
    kind: Kind | None = None,
    seed: int = 0,
    device: str | None = None,
    volume: int | None = None,
    overwrite: bool = False,
) -> Adapted:
    """Adapt a prior to the scans under ``input`` and write it to the file ``output``, changed or not.

    Raises
    ------
    MedfusionError : as ``adapt``; nothing under ``input`` can be used; ``output`` is there already or inside ``input``.
    """
    check_output(output, input)
    with staged(output, overwrite) as beside:
        loaded = Prior.load(prior, pick_device(device))
        scans, noises, left_out = [], [], []
        for series in discover(input):
            try:
                scan = next(iter(read_volumes(series, volume)))
                noises.append(volume_noise(scan, loaded, sigma=sigma, kind=kind))
            except MedfusionError as error:
                left_out.append(error.what if error.what.startswith(series.name) else f"{series.name}: {error.what}")
            else:
                scans.append(scan)
        if not scans:
            raise MedfusionError(f"{input}: no scan that a prior can be adapted to", first=left_out[0])
        found = adapt(scans, noises, loaded, minutes, seed=seed)
        found.prior.save(beside)
    return replace(found, left_out=tuple(left_out))


def _blocks(scan: Volume, noise: Noise, prior: Prior) -> tuple[list[_Block], list[_Block]]:
    """Blocks to judge by and blocks to learn from; the voxels that count in the former do not in the latter."""
    array, sigma = acquired_array(scan, noise), noise.sigma if noise.map is None else noise.map
    if noise.kind == "rician":
        array = stabilise(array, sigma)
    scale = measure_scale(array, prior.config.preprocessing.percentile, scan.name)
    ratios = np.broadcast_to(np.float32(sigma) * np.float32(2 / (scale.high - scale.low)), array.shape)
    least = max(NEGLIGIBLE, float(prior.process.noise_ratio(1 / prior.process.steps)))
    places = [place for place in blocks(foreground(array), MANY) if float(ratios[place].mean()) > least]
    kept_back = np.zeros(array.shape, bool)

    def block(place: tuple[slice, ...], counted: NDArray[np.bool_]) -> _Block:
        y, inside = (torch.from_numpy(part)[None, None] for part in (scale.apply(array[place]).clip(*SEEN), counted))
        return _Block(y.to(prior.device), float(ratios[place].mean()), inside.to(prior.device))

    for place in places[::HELD_OUT]:
        kept_back[_middle(place)] = True
    judged = [block(place, kept_back[place]) for place in places[::HELD_OUT]]
    others = [place for k, place in enumerate(places) if k % HELD_OUT and not kept_back[place].all()]
    return judged, [block(place, ~kept_back[place]) for place in others]


def _middle(place: tuple[slice, ...]) -> tuple[slice, ...]:
    """Half of a block along each axis."""
    quarters = [(s.stop - s.start) // 4 for s in place]
    return tuple(slice(s.start + quarter, s.stop - quarter) for s, quarter in zip(place, quarters, strict=True))


def _risk(prior: Prior, block: _Block, generator: torch.Generator) -> Tensor:
    return residual(prior.denoiser(), block.y, block.ratio, [generator]).risk[block.counted].mean()


@torch.no_grad()
def _risks(prior: Prior, judged: Sequence[_Block]) -> NDArray[np.float64]:
    """Of each block, with the same random signs at every call."""
    return np.array([float(_risk(prior, block, torch.Generator().manual_seed(k))) for k, block in enumerate(judged)])
