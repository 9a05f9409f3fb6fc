"""Denoiser: what samplers and tasks see of a network, x_0 = denoise(x_t, t); and the DDPM objective that trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from medfusion.diffusion.process import Process, expand

Prediction = Literal["epsilon", "x0", "v"]
Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t (b, c, d, h, w), log noise ratio (b,)) -> prediction (b, c, d, h, w)."""


def target(prediction: Prediction, process: Process, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should answer: eps, x_0, or v = alpha eps - sigma x_0 (Salimans & Ho 2022)."""
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return x0
    return expand(process.alpha(t), x0) * noise - expand(process.sigma(t), x0) * x0


def clean_image(prediction: Prediction, process: Process, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """x_0 from the network's answer at x_t = x, the inverse of ``target``."""
    if prediction == "x0":
        return output
    alpha, sigma = expand(process.alpha(t), x), expand(process.sigma(t), x)
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    return alpha * x - sigma * output


@dataclass(frozen=True)
class Denoiser:
    """The posterior mean E[x_0 | x_t] that a trained network stands for."""

    network: Network
    process: Process
    prediction: Prediction

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x_0 (b, c, d, h, w) in float32 for x_t = x and times t (b,)."""
        output = self.network(x, self.process.log_noise_ratio(t).float()).float()
        return clean_image(self.prediction, self.process, output, x.float(), t)


def simple_loss(
    network: Network, process: Process, prediction: Prediction, x0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """L_simple of DDPM (Ho et al. 2020, eq. 14) for any prediction: the mean squared error of each sample, (b,)."""
    output = network(process.add_noise(x0, noise, t), process.log_noise_ratio(t).float()).float()
    return (output - target(prediction, process, x0, noise, t)).square().flatten(1).mean(dim=1)
