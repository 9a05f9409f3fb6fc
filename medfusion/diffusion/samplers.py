"""Samplers: pure functions of (denoise, x, times) that walk samples from noise to images.

``times`` (n + 1,) fall from where x is, to where it shall be; 0 is the clean image, and ``time_steps`` makes them. The
process is that of the denoiser, and may be any: steps that need no drift are those of y = x / alpha, in which all
processes are y = x_0 + r eps.

To generate, x is ``process.sigma(times[0]) * noise``; to rebuild an image, ``process.add_noise(x0, noise, times[0])``.

``generators`` is one CPU generator a sample, so that batching never changes a sample, or one for the whole batch.
``callback`` is called after every step with its number and the x it led to, which is not a copy. Networks may answer in
half precision: samples are kept in float32 or wider. Every sampler raises ValueError for times that do not fall within
[0, 1], and FloatingPointError when the network's output is not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from medfusion.diffusion.denoiser import Denoiser, Variance, reverse_variance
from medfusion.diffusion.process import Generators, Process, Time, combine, noise_like, widened

Callback = Callable[[int, Tensor], None]
Spacing = Literal["uniform", "quadratic", "log_snr", "karras"]


def time_steps(process: Process, steps: int, spacing: Spacing = "uniform", *, start: float = 1.0) -> Tensor:
    """(steps + 1,) times from ``start`` to 0.

    "uniform" in t; "quadratic" in t (Song et al. 2021c, appendix D); evenly spaced in log SNR, "log_snr" (Lu et al.
    2022), or in r^(1/7), "karras" (Karras et al. 2022, eq. 5), down to the ratio of the process's first step.

    Raises
    ------
    ValueError : no step, a start outside (0, 1], or for "log_snr" and "karras" no room above the first step.
    """
    if steps < 1 or not 0 < start <= 1:
        raise ValueError(f"needs steps >= 1 and a start in (0, 1], got {steps} and {start}")
    share = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if spacing == "uniform":
        return start * share
    if spacing == "quadratic":
        return start * share**2
    first = 1 / process.steps
    if steps > 1 and start <= first:
        raise ValueError(f"spacing {spacing!r} of {steps} steps needs a start above the first step {first:.4g}")
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    highest, lowest = process.noise_ratio(start), process.noise_ratio(first)
    if spacing == "log_snr":
        ratios = torch.lerp(highest.log(), lowest.log(), share).exp()
    elif spacing == "karras":
        ratios = torch.lerp(highest ** (1 / 7), lowest ** (1 / 7), share) ** 7
    else:
        raise ValueError(f"spacing {spacing!r} is none of uniform, quadratic, log_snr, karras")
    times = process.time_of(ratios)
    times[0] = start  # not a rounding error before or after it
    return torch.cat([times, times.new_zeros(1)])


def silent(step: int, x: Tensor) -> None:
    """The callback that does nothing."""


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 0.0,
    generators: Generators = (),
    callback: Callback = silent,
) -> Tensor:
    """Steps along the direction to x_0 (Song et al. 2021c, eq. 12), deterministic for ``eta`` = 0.

    ``eta``, 0 to 1, times the standard deviation of the posterior q(x_s | x_t, x_0) is drawn anew: 1 is ``ddpm``.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta lies in [0, 1], got {eta}")
    process, x = denoise.process, widened(x)
    for k, (t, s) in enumerate(steps_of(times)):
        x0, sigma_s = denoise(x, t), process.sigma(s)
        fresh = eta * reverse_variance(process, s, t, "small").sqrt() if eta > 0 and s > 0 else torch.zeros_like(s)
        # alpha_s x_0 + (sigma_s^2 - fresh^2)^(1/2) eps, with eps = (x - alpha_t x_0) / sigma_t
        kept = (sigma_s**2 - fresh**2).sqrt() / process.sigma(t)
        x = combine(process.alpha(s) - kept * process.alpha(t), x0, kept, x)
        if fresh > 0:
            x.add_(noise_like(x, generators), alpha=float(fresh))
        callback(k, x)
    return x


@torch.no_grad()
def ddpm(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    variance: Variance = "small",
    generators: Generators,
    callback: Callback = silent,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) over any subset of the times.

    ``variance`` of the steps: "small", "large", or "learned" where the denoiser has it (``reverse_variance``).
    """
    x = widened(x)
    for k, (t, s) in enumerate(steps_of(times)):
        x = ancestral_step(denoise, x, t, s, variance, generators)
        callback(k, x)
    return x


def ancestral_step(
    denoise: Denoiser, x: Tensor, t: Tensor, s: Tensor, variance: Variance, generators: Generators
) -> Tensor:
    """One draw of p(x_s | x_t = x); at s = 0 its mean, x_0."""
    x0, fraction = denoise.estimate(x, t)
    mean, _ = denoise.process.posterior(x0, x, s, t)
    model_variance = reverse_variance(denoise.process, s, t, variance, fraction)  # refuses what does not fit
    return mean if s == 0 else mean.add_(model_variance.sqrt().to(x) * noise_like(x, generators))


@torch.no_grad()
def langevin(
    denoise: Denoiser,
    x: Tensor,
    t: Time,
    *,
    step_size: float,
    steps: int,
    generators: Generators,
    callback: Callback = silent,
) -> Tensor:
    """Langevin dynamics at one noise level, x + step_size / 2 score + step_size^(1/2) z (Song & Ermon 2019, eq. 4)."""
    if not step_size > 0 or steps < 0:
        raise ValueError(f"needs step_size > 0 and steps >= 0, got {step_size} and {steps}")
    x = widened(x)
    for k in range(steps):
        x = torch.add(x, denoise.score(x, t), alpha=step_size / 2)
        x.add_(noise_like(x, generators), alpha=step_size**0.5)
        callback(k, x)
    return x


@torch.no_grad()
def annealed_langevin(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    step_size: float = 1.0,
    steps: int = 5,
    generators: Generators,
    callback: Callback = silent,
) -> Tensor:
    """``steps`` of Langevin dynamics at each level, then on to the next (Song & Ermon 2019, Algorithm 1).

    A step at t has the size ``step_size`` sigma(t)^2; NCSN's epsilon is ``step_size`` sigma_min^2, 0.2 there with 100
    steps a level. With few steps longer ones follow the falling noise better: on a mixture, 100 levels of 5 steps left
    20 to 27 % too much variance with 0.2 and 1 to 7 % with 1.0. Where the times end at 0 the last move is to x_0, which
    removes the noise of the last level (Song & Ermon 2020). The levels have to lie so close that the steps bridge them:
    many, evenly spaced in log-SNR, from where r is not far above the data.
    """
    if steps < 1:
        raise ValueError(f"needs steps >= 1, got {steps}")
    process, x = denoise.process, widened(x)
    for k, (t, s) in enumerate(steps_of(times)):
        size = step_size * float(process.sigma(t)) ** 2
        x = langevin(denoise, x, t, step_size=size, steps=steps, generators=generators)
        x = denoise(x, t) if s == 0 else process.alpha(s) / process.alpha(t) * x
        callback(k, x)
    return x


@torch.no_grad()
def euler_maruyama(
    denoise: Denoiser, x: Tensor, times: Tensor, *, generators: Generators, callback: Callback = silent
) -> Tensor:
    """The reverse SDE dx = (f x - g^2 score) dt + g dw in steps of t (Song et al. 2021b, eq. 6); the last is to x_0.

    Raises
    ------
    ValueError : a step is so long that the noise would grow rather than shrink: more than 1 in log r at its slope in t.
    """
    process, x = denoise.process, widened(x)
    for k, (t, s) in enumerate(steps_of(times)):
        length, drift, diffusion = t - s, process.drift(t), process.diffusion(t)
        if s == 0:
            x = denoise(x, t)
        elif (change := float(length * (diffusion / process.sigma(t)) ** 2 / 2)) > 1 + 1e-9:
            raise ValueError(
                f"Euler-Maruyama is unstable from t = {float(t):.4g} to {float(s):.4g}: log r would change by "
                f"{change:.3g}, at most 1 is allowed; take more steps, or start below t = {float(t):.4g}"
            )
        else:
            x = combine(1 - length * drift, x, length * diffusion**2, denoise.score(x, t))
            x.add_(noise_like(x, generators), alpha=float(diffusion * length.sqrt()))
        callback(k, x)
    return x


@torch.no_grad()
def predictor_corrector(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    variance: Variance = "large",
    corrections: int = 1,
    step_size: float = 0.1,
    generators: Generators,
    callback: Callback = silent,
) -> Tensor:
    """An ancestral step, then ``corrections`` steps of Langevin dynamics where it led (Song et al. 2021b, appendix G).

    With the large variance the former is, to first order, that paper's reverse diffusion. The latter have the size
    ``step_size`` sigma(s)^2: 0.1 is what a signal-to-noise ratio of 0.16 comes to for the score of noise, 4 (0.16 |z| /
    |score|)^2, and to measure the norms would make a sample depend on its batch. A step takes 1 + ``corrections``
    evaluations.
    """
    x = widened(x)
    for k, (t, s) in enumerate(steps_of(times)):
        x = ancestral_step(denoise, x, t, s, variance, generators)
        if s > 0:
            size = step_size * float(denoise.process.sigma(s)) ** 2
            x = langevin(denoise, x, s, step_size=size, steps=corrections, generators=generators)
        callback(k, x)
    return x


@torch.no_grad()
def heun(denoise: Denoiser, x: Tensor, times: Tensor, *, callback: Callback = silent) -> Tensor:
    """The probability-flow ODE dy/dr = (y - x_0) / r by Heun's method (Karras et al. 2022, Algorithm 1).

    Of second order; two evaluations a step, one for the last, which is to x_0.
    """
    process, x = denoise.process, widened(x)
    for k, (t, s) in enumerate(steps_of(times)):
        x0, y, ratio, ratio_s = denoise(x, t), x / process.alpha(t), process.noise_ratio(t), process.noise_ratio(s)
        slope = (y - x0) / ratio
        x = x0 if s == 0 else process.alpha(s) * (y + (ratio_s - ratio) * slope)
        if s > 0:
            slope = (slope + (x / process.alpha(s) - denoise(x, s)) / ratio_s) / 2
            x = process.alpha(s) * (y + (ratio_s - ratio) * slope)
        callback(k, x)
    return x


@torch.no_grad()
def dpm_solver(denoise: Denoiser, x: Tensor, times: Tensor, *, callback: Callback = silent) -> Tensor:
    """DPM-Solver++ (2M): second order with one evaluation a step (Lu et al. 2022, Algorithm 2).

    The solution of the probability-flow ODE is exact for an x_0 that is linear in log r through the last two
    evaluations; the first step and the one to the clean image take x_0 as it is.
    """
    process, x = denoise.process, widened(x)
    before: tuple[Tensor, Tensor] | None = None  # x_0 of the step before, and its length in -log r
    for k, (t, s) in enumerate(steps_of(times)):
        x0, length = denoise(x, t), process.log_noise_ratio(t) - process.log_noise_ratio(s)
        ahead = x0
        if before is not None and s > 0:
            ahead = torch.lerp(x0, before[0], -(length / before[1] / 2).to(x0))
        kept = torch.exp(-length)  # r_s / r_t
        x = combine(process.alpha(s) * (1 - kept), ahead, process.alpha(s) / process.alpha(t) * kept, x)
        before = x0, length
        callback(k, x)
    return x


def steps_of(times: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(from, to) of every step, on the CPU in float64.

    Raises
    ------
    ValueError : fewer than two times, or times that do not fall from at most 1 to at least 0.
    """
    times = torch.as_tensor(times, dtype=torch.float64).cpu()
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()) or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times fall from at most 1 to at least 0, got {times.tolist()}")
    return list(pairwise(times))
