"""The losses of a batch as its config says; training and validation go through them alike."""

from __future__ import annotations

from torch import Tensor, nn

from medfusion.config import Config
from medfusion.diffusion import hybrid_loss, regression_loss
from medfusion.prior import build_denoiser, half_width
from medfusion.training.batches import Shown


def batch_loss(network: nn.Module, config: Config, shown: Shown) -> Tensor:
    """(b,), for a batch on the device of the network."""
    crop = shown.crop

    def answer(x: Tensor, log_noise_ratio: Tensor) -> Tensor:
        with half_width(x.device):
            return network(x, log_noise_ratio, crop.context, crop.labels, crop.class_index)

    denoise = build_denoiser(config, answer)
    if config.training.objective == "hybrid":
        step = (shown.t * config.process.steps).round().long().clamp(1, config.process.steps)
        return hybrid_loss(denoise, crop.image, shown.noise, step)
    return regression_loss(denoise, crop.image, shown.noise, shown.t, config.training.objective)


def autoencoder_loss(network: nn.Module, config: Config, shown: Shown) -> Tensor:
    """(b,): mean absolute error, and ``kl_weight`` times the divergence of the latents from N(0, 1), in nats.

    KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - log s^2 - 1) / 2 of each latent, summed (Kingma & Welling 2014, app. B).
    """
    assert config.autoencoder is not None
    with half_width(shown.noise.device):
        rebuilt, mean, deviation = network(shown.crop.image, shown.noise)
    mean, variance = mean.float(), deviation.float().square()
    divergence = (mean.square() + variance - variance.log() - 1).flatten(1).sum(dim=1) / 2
    error = (rebuilt.float() - shown.crop.image).abs().flatten(1).mean(dim=1)
    return error + config.autoencoder.kl_weight * divergence
