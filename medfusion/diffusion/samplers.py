"""Samplers: pure functions of (denoise, process, x, times) that walk a sample from noise to an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medfusion.diffusion.process import Process, expand

Denoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor], None]


def uniform_times(start: float, evaluations: int) -> Tensor:
    """``evaluations`` times from ``start`` down, evenly spaced; the step after the last one is the clean image."""
    return torch.linspace(start, 0, evaluations + 1, dtype=torch.float64)[:-1]


def noise_like(x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise (b, ...), each sample from its own CPU generator: batching never changes a sample."""
    return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)


def ddim(
    denoise: Denoise,
    process: Process,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] = (),
    callback: Callback | None = None,
) -> Tensor:
    """Generalised denoising steps from times[0] to the clean image (Song et al. 2021, eq. 12).

    ``eta`` = 0 is deterministic, 1 is DDPM's ancestral sampling; above 0 it needs one generator a sample.
    """
    for k, t in enumerate(times):
        x0 = denoise(x, t.expand(len(x)))
        if k + 1 == len(times):
            x = x0
        else:
            x = _step(process, x, x0, t.expand(len(x)), times[k + 1].expand(len(x)), eta, generators)
        if not torch.isfinite(x).all():
            raise FloatingPointError(
                f"the sample is not finite after step {k + 1} of {len(times)} (t = {float(t):.4f})"
            )
        if callback is not None:
            callback(k, x)
    return x


def _step(
    process: Process, x: Tensor, x0: Tensor, t: Tensor, s: Tensor, eta: float, generators: Sequence[torch.Generator]
) -> Tensor:
    alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    noise = (x - expand(alpha_t, x) * x0) / expand(sigma_t, x)
    # eq. 16: eta = 1 gives the standard deviation of the posterior q(x_s | x_t, x_0)
    fresh = eta * (sigma_s / sigma_t) * (1 - (alpha_t / alpha_s) ** 2).sqrt()
    x = expand(alpha_s, x) * x0 + expand((sigma_s**2 - fresh**2).clamp(min=0).sqrt(), x) * noise
    return x + expand(fresh, x) * noise_like(x, generators) if eta > 0 else x


def ddpm(
    denoise: Denoise,
    process: Process,
    x: Tensor,
    times: Tensor,
    *,
    generators: Sequence[torch.Generator],
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, Algorithm 2), over any subset of the times."""
    return ddim(denoise, process, x, times, eta=1.0, generators=generators, callback=callback)
