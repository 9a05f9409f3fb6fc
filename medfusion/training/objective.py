"""The losses of a batch as its config says; training and validation go through them alike."""

from __future__ import annotations

from torch import Tensor, nn

from medfusion.config import Config
from medfusion.diffusion import hybrid_loss, regression_loss
from medfusion.objectives.elbo import Rebuilt, elbo
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


def rebuilt(network: nn.Module, config: Config, shown: Shown) -> Rebuilt:
    """A batch through the autoencoder; where beta is 0, which would let any noise shrink to nothing, without noise."""
    assert config.autoencoder is not None
    with half_width(shown.noise.device):
        found: Rebuilt = network(shown.crop.image, shown.noise if config.autoencoder.beta else 0 * shown.noise)
    return found


def autoencoder_loss(network: nn.Module, config: Config, shown: Shown, share: float) -> Tensor:
    """(b,): the bound per voxel, negative; beta rises on the first ``share`` of the steps (Bowman et al. 2016)."""
    assert config.autoencoder is not None
    warmup = config.autoencoder.beta_warmup
    beta = config.autoencoder.beta * (min(1.0, share / warmup) if warmup else 1.0)
    return -elbo(shown.crop.image, rebuilt(network, config, shown), beta) / shown.crop.image[0].numel()


def adversarial_loss(network: nn.Module, config: Config, shown: Shown) -> Tensor:
    """(b,) what generator and discriminator lose; each one's gradient stays with it."""
    assert config.gan is not None
    with half_width(shown.noise.device):
        losses = network(shown.crop.image, shown.noise, config.gan.game, config.gan.penalty)
    return losses[0] + losses[1]


def cyclegan_loss(network: nn.Module, config: Config, shown: Shown) -> Tensor:
    """(b,) what all networks of a CycleGAN lose; each one's gradient stays with it."""
    game = config.cyclegan
    assert game is not None
    with half_width(shown.crop.image.device):
        loss: Tensor = network(shown.crop.image, game.cycle, game.identity, game.penalty)
    return loss
