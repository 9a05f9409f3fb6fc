"""The training loop: cases in, one Prior out; checkpoints, exact resume, metrics.jsonl.

    medfusion train configs/brain_t1.yaml --data DIR --out RUN [--resume]

Batch, times and noise of step k are functions of (seed, k), so a resumed run repeats what an unbroken one would do.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from medfusion.config import Config
from medfusion.data.crops import Batch, Case, draw_batch, mean_atlas, split, validation_batches
from medfusion.diffusion import hybrid_loss, regression_loss
from medfusion.errors import MedfusionError
from medfusion.io import staged
from medfusion.networks import ResidualUNet
from medfusion.networks.residual_unet import ATLAS, ATLAS_REACH
from medfusion.prior import Prior, build_denoiser, build_network, fast_bfloat16

VALIDATION_TIMES = (0.05, 0.1, 0.2, 0.4, 0.7, 0.95)
WEIGHT_DECAY = 1e-5
CLIP_NORM = 1.0


def train(
    cases: Sequence[Case],
    config: Config,
    out: Path,
    *,
    data: str = "",
    resume: bool = False,
    device: str = "cpu",
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Prior:
    """Train a prior; write ``prior.safetensors``, ``metrics.jsonl`` and ``checkpoint.pt`` to the folder ``out``.

    Parameters
    ----------
    data : one line about the scans for the provenance.
    progress : called after every step with its number and its loss.

    Raises
    ------
    MedfusionError : too few cases, a loss that is not finite, or nothing to resume from.
    """
    place = torch.device(device)
    training, validation = split(cases, config.data.validation, config.training.seed)
    if not training:
        raise MedfusionError(f"{len(cases)} scan(s) and {config.data.validation} held out leave none to train on")
    torch.manual_seed(config.training.seed)
    network = build_network(config)
    network.atlas.copy_(mean_atlas(training, ATLAS, ATLAS_REACH))
    network = network.to(place, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    ema = build_network(config).to(place)
    ema.load_state_dict(network.state_dict())
    optimizer = torch.optim.AdamW(
        network.parameters(), config.training.learning_rate, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True
    )
    held_out = validation_batches(validation, config.data, config.training.seed)
    checkpoint = out / "checkpoint.pt"
    start = _restore(read_checkpoint(out, config), network, ema, optimizer) if resume else _clear(out)
    began = time.monotonic()
    for step in range(start, config.training.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.training.learning_rate * _warmup_then_cosine(step, config)
        loss = _loss_of_step(network, config, training, step, place)
        if not torch.isfinite(loss):
            raise MedfusionError(
                f"the loss of step {step} is not finite",
                last_good=f"{checkpoint}" if checkpoint.exists() else "no checkpoint yet",
                fix="begin anew with a lower training.learning_rate",
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
        _update_ema(ema, network, step, config)
        progress(step + 1, loss.item())
        if (step + 1) % config.training.checkpoint_every == 0 or step + 1 == config.training.steps:
            by_time = _validate(ema, config, held_out, place)
            _save_checkpoint(checkpoint, network, ema, optimizer, config, step + 1)
            _log(out, step + 1, loss.item(), by_time, time.monotonic() - began)
    prior = Prior(
        config, ema.eval().requires_grad_(False), _provenance(training, validation, config, data, held_out, ema)
    )
    with staged(out / "prior.safetensors", overwrite=True) as unfinished:
        prior.save(unfinished)
    return prior


def _loss_of_step(
    network: ResidualUNet, config: Config, cases: Sequence[Case], step: int, device: torch.device
) -> Tensor:
    seed, size = config.training.seed, config.training.batch
    batch = draw_batch(cases, config.data, size, seed=seed, step=step)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    # half of the times uniform, for generation; half t = u^2, half of those below 0.25, where scans are denoised
    uniform, low = torch.rand(2, size, generator=generator)
    t = torch.where(torch.rand(size, generator=generator) < 0.5, uniform, low.square())
    noise = torch.randn(batch.images.shape, generator=generator)
    return _loss(network, config, batch, noise, t.clamp(min=1 / config.process.steps), device).mean()


def _loss(
    network: ResidualUNet, config: Config, batch: Batch, noise: Tensor, t: Tensor, device: torch.device
) -> Tensor:
    """The objective of each sample (b,) for clean images, noise and times (b,) on the CPU."""
    context = batch.context.to(device)

    def with_context(x: Tensor, log_noise_ratio: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device)):
            return network(x, log_noise_ratio, context)

    x0, noise, denoise = batch.images.to(device), noise.to(device), build_denoiser(config, with_context)
    if config.training.objective == "hybrid":
        step = (t * config.process.steps).round().long().clamp(1, config.process.steps)
        return hybrid_loss(denoise, x0, noise, step)
    return regression_loss(denoise, x0, noise, t, config.training.objective)


def _warmup_then_cosine(step: int, config: Config) -> float:
    share = step / config.training.steps
    return min(1.0, (step + 1) / config.training.warmup) * (0.5 * (1 + math.cos(math.pi * share)) + 1e-3)


def _update_ema(ema: ResidualUNet, network: ResidualUNet, step: int, config: Config) -> None:
    """Half-life in images, shorter at the start so that the average does not remember the initialisation."""
    images = (step + 1) * config.training.batch
    half_life = min(config.training.ema_half_life, 0.1 * images)
    weight = 1 - 0.5 ** (config.training.batch / half_life)
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), weight)


@torch.no_grad()
def _validate(ema: ResidualUNet, config: Config, batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
    """Mean loss of the averaged network on fixed crops with fixed noise, for each of the fixed times."""
    result = {}
    for time_ in VALIDATION_TIMES:
        losses = []
        for index, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(index)
            noise = torch.randn(batch.images.shape, generator=generator)
            t = torch.full((len(batch.images),), time_)
            losses.append(float(_loss(ema, config, batch, noise, t, device).mean()))
        result[f"{time_:g}"] = sum(losses) / len(losses)
    return result


def _save_checkpoint(
    path: Path, network: ResidualUNet, ema: ResidualUNet, optimizer: torch.optim.Optimizer, config: Config, step: int
) -> None:
    state = {
        "step": step,
        "config": config.model_dump_json(),
        "network": network.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    content = io.BytesIO()  # a full disk would make torch.save raise an error that does not say so
    torch.save(state, content)
    with staged(path, overwrite=True) as unfinished:  # a checkpoint is whole or the one before it
        unfinished.write_bytes(content.getbuffer())


def read_checkpoint(out: Path, config: Config) -> dict[str, Any]:
    """What a run in the folder ``out`` is resumed from.

    Raises
    ------
    MedfusionError : there is no checkpoint, it is damaged, or it was made with another config.
    """
    path = out / "checkpoint.pt"
    if not path.is_file():
        raise MedfusionError(f"{out}: no checkpoint to resume from", fix="leave out --resume to begin anew")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")  # weights_only: nothing in it is executed
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise MedfusionError(f"{path}: damaged, or no checkpoint", fix="--overwrite to begin anew") from error
    if not isinstance(state, dict) or "config" not in state:
        raise MedfusionError(f"{path}: no checkpoint of medfusion", fix="--overwrite to begin anew")
    try:
        same = Config.model_validate_json(state["config"]) == config  # settings that are new since then have defaults
    except ValidationError:
        same = False
    if not same:
        raise MedfusionError(
            f"{path}: was made with another config", fix="resume with the same config, or choose a new --out"
        )
    return state


def _clear(out: Path) -> int:
    """Remove what a later ``resume`` would take for this run's; returns the first step."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint.pt", "metrics.jsonl", "prior.safetensors"):
        (out / name).unlink(missing_ok=True)
    return 0


def _restore(state: dict[str, Any], network: ResidualUNet, ema: ResidualUNet, optimizer: torch.optim.Optimizer) -> int:
    network.load_state_dict(state["network"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _log(out: Path, step: int, loss: float, by_time: dict[str, float], seconds: float) -> None:
    row = {"step": step, "loss": round(loss, 5), "validation": {t: round(v, 5) for t, v in by_time.items()}}
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | {"seconds": round(seconds, 1)}) + "\n")


def _provenance(
    training: Sequence[Case],
    validation: Sequence[Case],
    config: Config,
    data: str,
    held_out: Sequence[Batch],
    ema: ResidualUNet,
) -> dict[str, object]:
    from medfusion import __version__

    device = next(ema.parameters()).device
    return {
        "trained": datetime.now(UTC).date().isoformat(),
        "medfusion": __version__,
        "torch": torch.__version__,
        "data": data,
        "training_scans": len({case.name for case in training}),
        "validation_scans": len({case.name for case in validation}),
        "steps": config.training.steps,
        "parameters": sum(p.numel() for p in ema.parameters()),
        "validation_loss": _validate(ema, config, held_out, device),
        "licence": config.licence,
    }
