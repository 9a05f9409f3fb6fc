"""The diffusion core: process, denoiser and objective, samplers. It imports torch and nothing else."""

from medfusion.diffusion.denoiser import Denoiser, Prediction, clean_image, simple_loss, target
from medfusion.diffusion.process import Process
from medfusion.diffusion.samplers import ddim, ddpm, noise_like, uniform_times

__all__ = [
    "Denoiser",
    "Prediction",
    "Process",
    "clean_image",
    "ddim",
    "ddpm",
    "noise_like",
    "simple_loss",
    "target",
    "uniform_times",
]
