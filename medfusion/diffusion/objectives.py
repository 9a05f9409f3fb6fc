"""Objectives: what a network is trained to make small.

All regressions are one, w(t) |x_0 - D(x_t, t)|^2, and differ in the weight alone: L_simple of DDPM, denoising score
matching of NCSN, the continuous-time bound of score SDEs, min-SNR, EDM. The variational bound adds the variance.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from medfusion.diffusion.denoiser import Denoiser, Variance, coefficients, reverse_variance, separate, target
from medfusion.diffusion.process import Generators, Process, Time, expand, noise_like, widened

Weighting = Literal["simple", "score_matching", "likelihood", "min_snr", "edm"]


def regression_loss(
    denoise: Denoiser, x0: Tensor, noise: Tensor, t: Time, weighting: Weighting = "simple", *, gamma: float = 5.0
) -> Tensor:
    """Weighted squared error of each sample (b,), the mean over its voxels.

    Weights of |x_0 - D|^2, with r the noise ratio; times are the caller's to draw.

    - "simple": 1 on the network's own output (for epsilon: L_simple, Ho et al. 2020, eq. 14).
    - "score_matching": 1 / r^2, lambda = sigma^2 on the score (Song & Ermon 2019, eq. 5, times two), which is 1 on eps.
    - "likelihood": (d log r / dt) / r^2, which is g^2 / 2 on the score: with t uniform from the first step on, the
      expectation is the bound on the negative log-likelihood per voxel up to a constant (Song et al. 2021a, Theorem 1).
    - "min_snr": min(1 / r^2, gamma) (Hang et al. 2023).
    - "edm": (r^2 + sigma_data^2) / (r sigma_data)^2 (Karras et al. 2022), which is "simple" for the prediction "edm".
    """
    *_, loss = _ask(denoise, x0, noise, t)
    return loss if weighting == "simple" else loss * _output_weight(denoise, t, weighting, gamma).to(loss)


def _ask(denoise: Denoiser, x0: Tensor, noise: Tensor, t: Time) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x_t, the network's answer there, the fraction of a learned variance, and each sample's squared error (b,)."""
    x0, noise = widened(x0), widened(noise)
    x = denoise.process.add_noise(x0, noise, t)
    output, fraction = denoise.answer(x, t)
    asked = target(denoise.prediction, denoise.process, x0, noise, t, denoise.sigma_data)
    return x, output, fraction, (output - asked).square().flatten(1).mean(dim=1)


def _output_weight(denoise: Denoiser, t: Time, weighting: Weighting, gamma: float) -> Tensor:
    """w(t) (d x_0 / d output)^2: the weight of the squared error of the network's own output."""
    process = denoise.process
    p, q = coefficients(denoise.prediction, process, t, denoise.sigma_data)
    ratio, alpha, sigma = process.noise_ratio(t), process.alpha(t), process.sigma(t)
    snr = ratio**-2
    if weighting == "score_matching":
        weight = snr
    elif weighting == "likelihood":
        weight = (process.diffusion(t) / sigma) ** 2 / 2 * snr  # g^2 = 2 sigma^2 d log r / dt
    elif weighting == "min_snr":
        weight = snr.clamp(max=gamma)
    elif weighting == "edm":
        weight = snr + denoise.sigma_data**-2
    else:
        raise ValueError(f"weighting {weighting!r} is none of simple, score_matching, likelihood, min_snr, edm")
    return weight * (sigma / (alpha * q - sigma * p)) ** 2


def bound_term(denoise: Denoiser, x0: Tensor, noise: Tensor, step: Tensor, variance: Variance = "large") -> Tensor:
    """L_{k-1} of the variational bound at steps k (b,) of 1 ... T, in nats per voxel (b,) (Ho et al. 2020, eq. 5).

    For k > 1 the divergence of p(x_{k-1} | x_k) from the posterior q(x_{k-1} | x_k, x_0); for k = 1 the negative log
    density of x_0, L_0. The data are real numbers: where they are integers times ``w``, subtract log(w) for the
    probability of an integer.
    """
    process, x0, t = denoise.process, widened(x0), _time_of_step(denoise.process, step)
    x = process.add_noise(x0, widened(noise), t)
    guess, fraction = denoise.estimate(x, t)
    return _bound_term(process, x0, x, step, guess, fraction, variance)


def _bound_term(
    process: Process, x0: Tensor, x: Tensor, step: Tensor, guess: Tensor, fraction: Tensor | None, variance: Variance
) -> Tensor:
    s, t = (step.double() - 1) / process.steps, step.double() / process.steps
    mean, true_variance = process.posterior(x0, x, s, t)
    model_mean, _ = process.posterior(guess, x, s, t)
    model_variance = reverse_variance(process, s, t, variance, fraction)
    if variance != "learned":
        model_variance = expand(model_variance, x)
    error = (mean - model_mean) ** 2 / model_variance
    true_variance, log_variance = expand(true_variance, x), model_variance.log()
    divergence = log_variance - true_variance.log() + true_variance / model_variance - 1 + error
    density = math.log(2 * math.pi) + log_variance + error  # at s = 0 the posterior is the point x_0
    return 0.5 * torch.where(expand(s, x) > 0, divergence, density).flatten(1).mean(dim=1)


def _time_of_step(process: Process, step: Tensor) -> Tensor:
    if not bool(((step >= 1) & (step <= process.steps)).all()):
        raise ValueError(f"steps lie in 1 to {process.steps}, got {int(step.min())} to {int(step.max())}")
    return step.double() / process.steps


def prior_term(process: Process, x0: Tensor) -> Tensor:
    """L_T of the bound, KL(q(x_T | x_0) || N(0, sigma(1)^2 I)) = x_0^2 / (2 r(1)^2), in nats per voxel (b,)."""
    return 0.5 * (x0.double() / process.noise_ratio(1.0).to(x0.device)).square().flatten(1).mean(dim=1)


@torch.no_grad()
def variational_bound(denoise: Denoiser, x0: Tensor, variance: Variance = "large", *, generators: Generators) -> Tensor:
    """Every term of the bound, one draw of noise for each, in bits per voxel: (b, T + 1), L_0, L_1, ..., L_T.

    Their sum over the last axis estimates an upper bound of - log2 p(x_0) / voxels. T network evaluations. With the
    large variance, or a learned one, the bound tightens as T grows; the small one stays wrong by a factor that T does
    not change where the data have a density.
    """
    terms = []
    for k in range(1, denoise.process.steps + 1):
        step = torch.full((len(x0),), k)
        terms.append(bound_term(denoise, x0, noise_like(x0, generators), step, variance).double())
    terms.append(prior_term(denoise.process, x0))
    return torch.stack(terms, dim=1) / math.log(2)


def hybrid_loss(denoise: Denoiser, x0: Tensor, noise: Tensor, step: Tensor, *, weight: float = 0.001) -> Tensor:
    """L_simple + weight L_vlb at steps k (b,) of 1 ... T, the latter through the variance alone (b,).

    L_vlb is estimated by T L_{k-1}, in nats per voxel, and no gradient of it reaches the mean (Nichol & Dhariwal 2021,
    eq. 16). The denoiser needs learned variance.
    """
    process, t = denoise.process, _time_of_step(denoise.process, step)
    x, output, fraction, simple = _ask(denoise, x0, noise, t)
    guess, _ = separate(denoise.prediction, process, output.detach(), x, t, denoise.sigma_data)
    return simple + weight * process.steps * _bound_term(process, widened(x0), x, step, guess, fraction, "learned")


class ImportanceSampler:
    """Draws steps of the bound in proportion to the root of their mean squared loss (Nichol & Dhariwal 2021, eq. 18).

    Uniform until every step has been seen ``history`` times; a thousandth of the draws stays uniform.
    """

    def __init__(self, steps: int, history: int = 10) -> None:
        self.losses = torch.zeros(steps, history, dtype=torch.float64)
        self.seen = torch.zeros(steps, dtype=torch.long)

    @property
    def probabilities(self) -> Tensor:
        """(steps,) of step 1 ... T."""
        uniform = torch.full((len(self.seen),), 1 / len(self.seen), dtype=torch.float64)
        if bool((self.seen < self.losses.shape[1]).any()):
            return uniform
        root = self.losses.square().mean(dim=1).sqrt()
        return 0.999 * root / root.sum() + 0.001 * uniform

    def draw(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Steps k (number,) and weights (number,): the mean of weight x term estimates the mean term, unbiased."""
        p = self.probabilities
        index = torch.multinomial(p, number, replacement=True, generator=generator)
        return index + 1, 1 / (len(p) * p[index])

    def update(self, step: Tensor, loss: Tensor) -> None:
        """Remember the unweighted terms (b,) seen at steps (b,)."""
        if not bool(((step >= 1) & (step <= len(self.seen))).all()):
            raise ValueError(f"steps lie in 1 to {len(self.seen)}, got {step.tolist()}")
        for k, value in zip((step - 1).tolist(), loss.detach().double().tolist(), strict=True):
            self.losses[k, self.seen[k] % self.losses.shape[1]] = value
            self.seen[k] += 1


def lognormal_times(
    process: Process, number: int, generator: torch.Generator, *, mean: float = -1.2, std: float = 1.2
) -> Tensor:
    """(number,) times whose log r is normal, clipped to what the process has: EDM's training distribution."""
    log = mean + std * torch.randn(number, generator=generator, dtype=torch.float64)
    return process.time_of(log.clamp(float(process.log_ratios[0]), float(process.log_ratios[-1])).exp())
