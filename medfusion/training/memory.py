"""Memory of a training step, known before the first one; and what to lower, and by how much, where it does not fit.

A CPU that runs out of memory is not told: the system kills the run. The need is therefore measured on a small crop and
scaled: networks are convolutional, so what they keep for the backward pass grows with the voxels and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medfusion.data.crops import UNKNOWN, Case, Crop
from medfusion.errors import MedfusionError
from medfusion.networks.residual_unet import Residual
from medfusion.prior import half_width
from medfusion.training.batches import Sample
from medfusion.training.stages import Stage, with_settings

# Peak resident memory of float32 steps on a CPU against this estimate: it was 1.0 to 1.7 times the peak, the most where
# there is least (docs/training.md has the table, benchmarks/training_cost.py prints it).
WORKSPACE = 1.5  # peak over what is kept for the backward pass: gradients on their way and scratch space
BASE = 288 * 2**20  # what the libraries take for themselves, whatever the crop
COPIES = 6  # of the weights: themselves, gradients, average, two moments of AdamW or Muon's and a copy at work
RESIDENT_SHARE = 0.5  # of the GPU's memory that a training step leaves free; the whole set of scans may take it
SCRATCH = 2.0  # peak of a forward pass over the input and output of its largest layer: one more of each, and casts
BLOCK = 4  # times its input is what a residual block keeps; one of them at a time when they are recomputed
REMARKS = {"accumulate": " (same result)", "recompute": " (same result, slower)"}


def require_memory(stage: Stage, processes: int, device: torch.device) -> int:
    """Bytes that a step needs on ``device``.

    Raises
    ------
    MedfusionError : it has less, with what would fit; or the batch does not go into equal parts.
    """
    settings = stage.config.training
    if settings.batch % (processes * settings.accumulate):
        raise MedfusionError(
            f"{stage.settings}.batch {settings.batch} does not go into {processes} process(es) x "
            f"{settings.accumulate} part(s)",
            fix="choose a multiple",
        )
    need = step_bytes(stage, processes, device)
    if need > available(device):
        raise advice(stage, processes, device, need)
    return need


def step_bytes(stage: Stage, processes: int, device: torch.device) -> int:
    """Peak bytes of a training step of one process, measured on one small crop."""
    config = stage.config
    voxels = config.training.batch // (processes * config.training.accumulate) * config.data.crop**3
    weights = COPIES * sum(p.nbytes for p in stage.build().parameters())
    beside = bytes_beside(stage, config.data.crop**3)
    return int(bytes_per_voxel(stage, device) * voxels) + weights + beside + BASE


def advice(stage: Stage, processes: int, device: torch.device, need: int) -> MedfusionError:
    """The error that names, for each setting alone, the first smaller value with which a step of ``need`` bytes fits.

    Where a step failed although it should have fitted, nobody knows by how much: half is advised.
    """
    settings, crop = stage.config.training, stage.config.data.crop
    section, diffusion = stage.section, stage.section == "network"
    channels = getattr(stage.config, section).channels
    free = available(device)
    limit = free if free < need else need // 2
    part = settings.batch // (processes * settings.accumulate)
    smaller = [n for n in range(part - 1, 0, -1) if part % n == 0]
    edges = [edge for edge in range(crop - 16, 0, -16) if edge % _divisor(stage) == 0]
    narrower = [tuple(max(8, c * eighths // 64 * 8) for c in channels) for eighths in range(7, 0, -1)]
    values: dict[tuple[str, str], Sequence[Any]] = {
        ("training", "accumulate"): [settings.accumulate * part // n for n in smaller if stage.settings == "training"],
        ("training", "recompute"): [] if settings.recompute or not diffusion else [True],
        ("training", "batch"): [settings.batch * n // part for n in smaller],
        ("data", "crop"): edges,
        (section, "channels"): narrower,
    }
    ways = {}
    for (where, name), candidates in values.items():
        for value in candidates:
            if step_bytes(with_settings(stage, where, **{name: value}), processes, device) <= limit:
                ways[f"{stage.settings if where == 'training' else where}.{name}"] = (
                    f"{json.dumps(value)}{REMARKS.get(name, '')}"
                )
                break
    return MedfusionError(
        f"a training step needs about {_gib(need)}, and {_gib(free)} are free",
        fix="change one of these with --set, or use a machine with more memory",
        **ways,
    )


def _divisor(stage: Stage) -> int:
    """Of the edges of crops."""
    return stage.config.multiple


def bytes_per_voxel(stage: Stage, device: torch.device) -> float:
    """Peak bytes of a training step for each voxel of a batch, beside the weights.

    The slope between two sizes of crop: what autograd keeps whatever the size, weights in half width, say, drops out.
    """
    edge = max(16, _divisor(stage))
    small, large = (_kept(stage, device, n) for n in (edge, 2 * edge))
    return WORKSPACE * (large - small) / (7 * edge**3)


def _kept(stage: Stage, device: torch.device, edge: int) -> int:
    """Bytes that autograd keeps for the backward pass of one crop, and those of a block that is recomputed."""
    stage = with_settings(stage, "data", crop=edge)
    network = stage.build().to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    images = 1 if stage.config.cyclegan is None else 2
    image, context = torch.zeros(1, images, edge, edge, edge), torch.zeros(1, 4, *[edge // 2] * 3)
    crop = Crop(image, context, None, torch.tensor([UNKNOWN]))
    kept: dict[int, int] = {}
    inputs = [0]

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def note(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0].nbytes)

    hooks = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, Residual)]
    shown = Sample(crop, torch.tensor([0]), torch.tensor([0.5])).shown(device, stage.config.noise_shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = stage.loss(network, shown, 1.0)  # held, so that no kept tensor's address is given out twice
    for hook in hooks:
        hook.remove()
    del loss
    return sum(kept.values()) + (BLOCK * max(inputs) if stage.config.training.recompute else 0)


def bytes_beside(stage: Stage, voxels: int) -> int:
    """Peak bytes of the autoencoder that encodes crops of so many voxels, one by one, for the diffusion; 0 without."""
    autoencoder = getattr(stage, "autoencoder", None)
    if autoencoder is None:
        return 0
    edge = max(16, autoencoder.factor)
    largest = [0]

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in (*arguments, output) if isinstance(x, Tensor)]
        largest.append(sum(x.nbytes for x in tensors))

    hooks = [module.register_forward_hook(note) for module in autoencoder.modules()]
    with torch.no_grad(), half_width(autoencoder.scale.device):
        autoencoder.encode(torch.zeros(1, 1, edge, edge, edge, device=autoencoder.scale.device))
    for hook in hooks:
        hook.remove()
    return int(SCRATCH * max(largest) / edge**3 * voxels)


def available(device: torch.device) -> int:
    """Bytes of a device that this process may take or has taken already; of a CPU its share of what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")  # of a container
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text().strip() != "max":
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(counts["inactive_file"])  # a cache that gives way
        free = min(free, int(limit.read_text()) - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def on_device(cases: Sequence[Case], device: torch.device, need: int) -> tuple[list[Case], bool]:
    """The scans on a GPU that has room for them beside a step of ``need`` bytes, and whether they were moved there."""
    if device.type != "cuda":
        return list(cases), False
    tensors = [t for case in cases for t in (case.image, case.labels) if t is not None]
    if sum(t.nbytes for t in tensors) > RESIDENT_SHARE * (available(device) - need):
        return list(cases), False
    return [
        replace(c, resident=c.image.to(device), labels=None if c.labels is None else c.labels.to(device)) for c in cases
    ], True


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of memory, of a GPU or of the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
