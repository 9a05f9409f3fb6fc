"""Trained models, one class for each family; ``Prior.load`` returns the right one."""

from medfusion.prior.arithmetic import fast_bfloat16, half_width
from medfusion.prior.autoencoder import AutoencoderPrior, build_autoencoder
from medfusion.prior.base import Prior, prior_path, read_metadata, shipped
from medfusion.prior.cyclegan import CycleGanPrior, build_cyclegan
from medfusion.prior.diffusion import (
    DiffusionPrior,
    build_denoiser,
    build_network,
    build_process,
)
from medfusion.prior.gan import GanPrior, build_adversarial

__all__ = [
    "AutoencoderPrior",
    "CycleGanPrior",
    "DiffusionPrior",
    "GanPrior",
    "Prior",
    "build_adversarial",
    "build_autoencoder",
    "build_cyclegan",
    "build_denoiser",
    "build_network",
    "build_process",
    "fast_bfloat16",
    "half_width",
    "prior_path",
    "read_metadata",
    "shipped",
]
