"""What a run shows of itself on held-out scans: losses by noise level, decibels, and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medfusion.config import Config
from medfusion.data.crops import Crop
from medfusion.diffusion import Denoiser, dpm_solver, time_steps
from medfusion.io import staged
from medfusion.metrics import psnr
from medfusion.networks import Autoencoder
from medfusion.objectives.elbo import Rebuilt, divergence, elbo
from medfusion.prior import CycleGanPrior, GanPrior, Prior, half_width
from medfusion.training.batches import Sample, Shown

VALIDATION_TIMES = (0.05, 0.1, 0.2, 0.4, 0.7, 0.95)
NOISE_LEVELS = (0.05, 0.10, 0.20)  # of the range from air to bright tissue
TISSUE = -0.8  # decibels are taken where the clean crop is above it
SAMPLES = 8  # drawn to see how they vary
IN_USE = 0.1  # standard deviation of a latent's mean
PICTURED, PICTURED_NOISE, SAMPLING_STEPS, TRAVERSED = 4, 0.2, 12, 5


@torch.no_grad()
def validation_loss(
    loss: Callable[[Shown], Tensor], config: Config, crops: Sequence[Crop], device: torch.device
) -> dict[str, float]:
    """Mean loss on fixed crops with fixed noise, for each of the fixed times."""
    result = {}
    for time in VALIDATION_TIMES:
        losses = []
        for index, crop in enumerate(crops):
            shown = Sample(crop, torch.tensor([0]), torch.tensor([time])).shown(device, config.noise_shape)
            shown = shown._replace(noise=_noise(config, index).to(device))  # the same on every device
            losses.append(float(loss(shown).mean()))
        result[f"{time:g}"] = round(sum(losses) / len(losses), 5)
    return result


@torch.no_grad()
def validation_bound(
    rebuilt: Callable[[Shown], Rebuilt], config: Config, crops: Sequence[Crop], network: Autoencoder
) -> dict[str, float]:
    """Means over crops: the bound with beta = 1 in nats and bits per voxel, its divergence, latents in use.

    A latent is in use where its mean varies over the crops by more than a tenth of the prior's spread (Burda et al.
    2016, section 5.2): posterior collapse leaves none.
    """
    bounds, divergences, means = [], [], []
    for index, crop in enumerate(crops):
        shown = Sample(crop, torch.tensor([0]), torch.tensor([0.5])).shown(network.scale.device, config.noise_shape)
        found = rebuilt(shown._replace(noise=_noise(config, index).to(network.scale.device)))
        bounds.append(float(elbo(shown.crop.image, found)))
        divergences.append(float(divergence(found).sum()))
        means.append(found.mean.float().flatten())
    bound, voxels = sum(bounds) / len(bounds), crops[0].image.numel()
    return {
        "elbo_nats": round(bound, 1),
        "bits_per_voxel": round(-bound / (voxels * math.log(2)), 5),
        "divergence_nats": round(sum(divergences) / len(divergences), 2),
    } | ({"latents_in_use": int((torch.stack(means).std(dim=0) > IN_USE).sum())} if len(means) > 1 else {})


@torch.no_grad()
def validation_game(prior: GanPrior, crops: Sequence[Crop]) -> dict[str, float]:
    """Mean logit of crops and of as many samples, and the samples' diversity: 1 where they differ as crops do.

    A gap between the logits that grows says that the discriminator knows all; a diversity that falls, that modes drop.
    """
    real = torch.cat([crop.image for crop in crops]).to(prior.device)
    generated = prior.sample([torch.Generator().manual_seed(number) for number in range(max(SAMPLES, len(crops)))])
    with half_width(prior.device):
        logits = [float(prior.network.discriminator(images).float().mean()) for images in (real, generated)]
    assert prior.config.gan is not None
    answer = "logit" if prior.config.gan.game == "nonsaturating" else "critic"
    found = {f"{answer}_real": round(logits[0], 4), f"{answer}_generated": round(logits[1], 4)}
    return found | ({"diversity": round(_apart(generated) / _apart(real), 4)} if len(real) > 1 else {})


@torch.no_grad()
def validation_cycle(prior: CycleGanPrior, crops: Sequence[Crop]) -> dict[str, float]:
    """For each domain: mean absolute error there and back, change by the translation, and the target's mean logits."""
    found: dict[str, float] = {}
    for k, name in enumerate(prior.domains):
        other = prior.domains[1 - k]
        images, targets = (torch.cat([crop.image[:, j : j + 1] for crop in crops]).to(prior.device) for j in (k, 1 - k))
        translated = prior.translate(images, other)
        judge = prior.network.discriminators[1 - k]
        with half_width(prior.device):
            logits = [float(judge(shown)[-1].float().mean()) for shown in (targets, translated)]
        found |= {
            f"{name}_cycle_error": round(float((prior.translate(translated, name) - images).abs().mean()), 4),
            f"{name}_change": round(float((translated - images).abs().mean()), 4),
            f"{other}_logit_real": round(logits[0], 4),
            f"{other}_logit_generated": round(logits[1], 4),
        }
    return found


@torch.no_grad()
def cycle_picture(prior: CycleGanPrior, crops: Sequence[Crop], path: Path) -> None:
    """A PNG: for up to four pairs, of each domain the slice, translated, and back."""
    rows = []
    for crop in crops[:PICTURED]:
        row = []
        for k, name in enumerate(prior.domains):
            image = crop.image[:, k : k + 1].to(prior.device)
            there = prior.translate(image, prior.domains[1 - k])
            row += [each.cpu() for each in (image, there, prior.translate(there, name))]
        rows.append(row)
    _save_rows(rows, path)


def _apart(images: Tensor) -> float:
    """Mean distance between two of them."""
    return float(torch.nn.functional.pdist(images.flatten(1).float().cpu()).mean())


@torch.no_grad()
def samples_picture(prior: Prior, crops: Sequence[Crop], path: Path) -> None:
    """A PNG: for up to four held-out crops the slice, and two samples."""
    rows = []
    for index, crop in enumerate(crops[:PICTURED]):
        drawn = prior.sample([torch.Generator().manual_seed(2 * index + k) for k in range(2)]).cpu()
        rows.append((crop.image, drawn[:1], drawn[1:]))
    _save_rows(rows, path)


@torch.no_grad()
def denoising_psnr(prior: Prior, crops: Sequence[Crop]) -> dict[str, dict[str, float]]:
    """Noise level to decibels before and after one evaluation of the prior, which is told nothing but the level.

    Levels that the process does not reach are left out.
    """
    denoise, result = prior.denoiser(), {}
    for level in (level for level in NOISE_LEVELS if 2 * level <= float(prior.process.noise_ratio(1.0))):
        pairs = []
        for index, crop in enumerate(crops):
            noisy, clean = crop.image + 2 * level * _noise(prior.config, index), crop.image.numpy()
            if (clean > TISSUE).any():
                estimate = _posterior_mean(denoise, noisy.to(prior.device), 2 * level).cpu()
                pairs.append([psnr(clean, image.numpy(), clean > TISSUE, 2.0) for image in (noisy, estimate)])
        before, after = torch.tensor(pairs).mean(dim=0).tolist() if pairs else (float("nan"),) * 2
        result[f"{level:g}"] = {"noisy": round(before, 2), "denoised": round(after, 2)}
    return result


@torch.no_grad()
def reconstruction_psnr(autoencoder: Autoencoder, crops: Sequence[Crop]) -> float:
    """Decibels of whole crops rebuilt from their latents, the data range being 2."""
    rebuilt = [(crop.image.numpy(), _rebuilt(autoencoder, crop).numpy()) for crop in crops]
    return round(sum(psnr(clean, image, np.ones_like(clean, bool), 2.0) for clean, image in rebuilt) / len(rebuilt), 2)


@torch.no_grad()
def reconstruction_picture(autoencoder: Autoencoder, crops: Sequence[Crop], path: Path) -> None:
    """A PNG: for up to four held-out crops the slice, the same rebuilt from its latents, and a latent's traversal.

    Each row shows another latent (a map of them everywhere alike), of those that vary most over the crops the next one,
    at its mean and one and two standard deviations to either side, all others as they are.
    """
    device = autoencoder.scale.device
    with half_width(device):
        codes = [autoencoder.encode(crop.image.to(device)).float() for crop in crops]
    values = torch.cat([code.mean(dim=(2, 3, 4)) for code in codes])  # (crops, latents)
    mean, spread = values.mean(dim=0), values.std(dim=0, correction=0)
    rows = []
    for crop, code, latent in zip(crops[:PICTURED], codes, spread.argsort(descending=True).tolist(), strict=False):
        places = mean[latent] + spread[latent] * torch.linspace(-2, 2, TRAVERSED).to(device)
        moved = code.repeat(TRAVERSED, 1, 1, 1, 1)
        moved[:, latent] = places.view(-1, 1, 1, 1)
        with half_width(device):
            shown = autoencoder.decode(torch.cat([code, moved])).float().cpu()
        rows.append((crop.image, *shown.split(1)))
    _save_rows(rows, path)


@torch.no_grad()
def picture(prior: Prior, crops: Sequence[Crop], path: Path) -> None:
    """A PNG: for up to four held-out crops the clean slice, 10 % noise, that denoised, and a sample from pure noise.

    Labels, class and position of the crop are told for the sample and withheld for the denoising. Of a latent prior
    the noise is that of the latents.
    """
    rows, ratio = [], min(PICTURED_NOISE, float(prior.process.noise_ratio(1.0)))
    for index, crop in enumerate(crops[:PICTURED]):
        noise = _noise(prior.config, index).to(prior.device)
        noisy = prior.latents(crop.image.to(prior.device)) + ratio * noise
        seen = (noisy, _posterior_mean(prior.denoiser(), noisy, ratio), _sample(prior, crop, noise))
        rows.append((crop.image, *(prior.images(x, crop.image.shape[2:]).cpu() for x in seen)))
    _save_rows(rows, path)


def _save_rows(rows: Sequence[Sequence[Tensor]], path: Path) -> None:
    """The middle axial slice of every image (1, 1, d, h, w), front up, from -1 (black) to +1."""
    from matplotlib.image import imsave

    lines = [torch.cat([x[0, 0, :, :, x.shape[-1] // 2].T.flip(0) for x in row], dim=1) for row in rows]
    with staged(path, overwrite=True) as unfinished:
        imsave(unfinished, torch.cat(lines).clamp(-1, 1).numpy(), cmap="gray", vmin=-1, vmax=1, format="png")


def _rebuilt(autoencoder: Autoencoder, crop: Crop) -> Tensor:
    image = crop.image.to(autoencoder.scale.device)
    with half_width(image.device):
        return autoencoder.decode(autoencoder.encode(image)).float().cpu()


def _posterior_mean(denoise: Denoiser, noisy: Tensor, ratio: float) -> Tensor:
    """E[x_0 | x_t] for noisy = x_t / alpha(t), at the time whose noise ratio is ``ratio``."""
    t = denoise.process.time_of(ratio)
    return denoise(noisy * denoise.process.alpha(t).to(noisy), t)


def _sample(prior: Prior, crop: Crop, noise: Tensor) -> Tensor:
    """One sample from pure noise with what is known about the crop."""
    known = prior.config.network
    labels = crop.labels if known.labels else None
    classes = crop.class_index if known.classes else None
    denoise = prior.denoiser(crop.context if known.located else None, labels, classes)
    times = time_steps(prior.process, SAMPLING_STEPS, "log_snr", start=0.99)
    return dpm_solver(denoise, noise * prior.process.sigma(times[0]).to(noise), times)


def _noise(config: Config, seed: int) -> Tensor:
    return torch.randn(1, *config.noise_shape, generator=torch.Generator().manual_seed(seed))
