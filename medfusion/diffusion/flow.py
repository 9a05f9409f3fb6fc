"""The probability-flow ODE solved to a tolerance: encoding, decoding, likelihood (Song et al. 2021b, section 4.3).

In y = x / (alpha (1 + r^2)^(1/2)), the x of the variance-preserving process with the same noise ratio r, and u = log r
the ODE is the same for every process, smooth, and of unit scale from end to end:

    dy/du = a^2 y - a x_0(x_t, t),      a = (1 + r^2)^(-1/2)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from medfusion.diffusion.denoiser import Denoiser
from medfusion.diffusion.process import Generators, noise_like, widened
from medfusion.diffusion.samplers import Callback, silent

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

Trace = Callable[[Tensor, Tensor], Tensor]
"""(x that requires a gradient, f(x)) -> the trace of df/dx of each sample (b,)."""


@torch.no_grad()
def probability_flow(
    denoise: Denoiser,
    x: Tensor,
    start: float,
    end: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    callback: Callback = silent,
) -> Tensor:
    """x at time ``end`` for x at time ``start``, by adaptive Runge-Kutta of order 5 (scipy's RK45), either way.

    From 1 / steps to 1 it encodes a scan, uniquely; from 1 to 1 / steps it decodes, or samples when x is noise. The
    tolerance holds for the batch as a whole. ``callback`` is called at every evaluation, with its number and x there.
    """
    _require_within(denoise, start, end)
    x = widened(x)
    y = _solve(denoise, x, start, end, None, rtol, atol, callback)[0]
    return y * _scale(denoise, end).to(x)


def log_likelihood(
    denoise: Denoiser,
    x: Tensor,
    *,
    start: float | None = None,
    probes: int | None = 1,
    generators: Generators = (),
    rtol: float = 1e-5,
    atol: float = 1e-5,
    callback: Callback = silent,
) -> Tensor:
    """log p(x) in nats (b,), float64, of x at time ``start``: by default the first step of the process.

    log p(y_0) = log N(y_1; 0, r(1)^2 / (1 + r(1)^2)) + the integral of div dy/du (Song et al. 2021b, eq. 39): exact as
    far as x_1 follows that normal, which needs an r(1) far above the mean and the spread of the data. ``probes`` random
    signs a sample estimate the divergence (Hutchinson; Grathwohl et al. 2019), the same ones along the whole path; None
    computes it exactly, with one backward pass for each value of a sample.

    Raises
    ------
    ValueError : the network is not differentiable, or no probe.
    """
    start = 1 / denoise.process.steps if start is None else start
    _require_within(denoise, start, 1.0)
    x = widened(x.detach())
    with torch.enable_grad():
        if not denoise.answer(x.clone().requires_grad_(), start)[0].requires_grad:
            raise ValueError("the likelihood needs a network that is differentiable, this one keeps no graph")
    trace = _exact_trace if probes is None else _hutchinson(x, probes, generators)
    y, integral = _solve(denoise, x, start, 1.0, trace, rtol, atol, callback)
    ratio = float(denoise.process.noise_ratio(1.0))
    variance, values = ratio**2 / (1 + ratio**2), y[0].numel()
    last = -0.5 * (
        y.cpu().double().square().flatten(1).sum(dim=1) / variance + values * math.log(2 * math.pi * variance)
    )
    return last + integral - values * _scale(denoise, start).log()


def bits_per_dimension(log_likelihood: Tensor, values: int) -> Tensor:
    """- log2 p / d for a log density in nats (b,) of samples with ``values`` = d values."""
    return -log_likelihood / (values * math.log(2))


def _solve(
    denoise: Denoiser,
    x: Tensor,
    start: float,
    end: float,
    trace: Trace | None,
    rtol: float,
    atol: float,
    callback: Callback,
) -> tuple[Tensor, Tensor]:
    """y at ``end`` (b, ...) for x at ``start``, and the integral of the divergence in between (b,), 0 without trace."""
    process, n, size = denoise.process, len(x), x.numel()
    evaluations = 0

    def slope(u: float, state: NDArray[float64]) -> NDArray[float64]:
        nonlocal evaluations
        t = process.time_of(torch.tensor(u, dtype=torch.float64).exp())
        a = (1 + process.noise_ratio(t) ** 2).rsqrt()
        y = torch.from_numpy(state[:size]).to(x).view_as(x)
        here = y * (process.alpha(t) / a).to(x)
        with torch.set_grad_enabled(trace is not None):
            here.requires_grad_(trace is not None)
            x0 = denoise(here, t)
            divergence = torch.zeros(n, dtype=torch.float64)
            if trace is not None:
                divergence = float(a**2) * x[0].numel() - float(process.alpha(t)) * trace(here, x0).cpu().double()
        callback(evaluations, here.detach())
        evaluations += 1
        velocity = a**2 * y.cpu().double() - a * x0.detach().cpu().double()
        return torch.cat([velocity.flatten(), divergence]).numpy()

    first = (x / _scale(denoise, start)).cpu().double().flatten()
    state = torch.cat([first, first.new_zeros(n)]).numpy()
    span = [float(process.log_noise_ratio(t)) for t in (start, end)]
    solution = solve_ivp(slope, span, state, method="RK45", rtol=rtol, atol=atol, t_eval=span[1:])
    if not solution.success:
        raise FloatingPointError(f"the probability-flow ODE could not be solved: {solution.message}")
    final = torch.from_numpy(solution.y[:, -1])
    return final[:size].view_as(x).to(x), final[size:]


def _exact_trace(x: Tensor, value: Tensor) -> Tensor:
    flat, total = value.flatten(1), torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for i in range(flat.shape[1]):
        (gradient,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
        total = total + gradient.flatten(1)[:, i]
    return total


def _hutchinson(x: Tensor, probes: int, generators: Generators) -> Trace:
    if probes < 1:
        raise ValueError(f"needs probes >= 1, or None for the exact divergence, got {probes}")
    signs = [(noise_like(x, generators) > 0).to(x) * 2 - 1 for _ in range(probes)]

    def trace(x: Tensor, value: Tensor) -> Tensor:
        products = [torch.autograd.grad(value, x, sign, retain_graph=True)[0] * sign for sign in signs]
        return torch.stack(products).mean(dim=0).flatten(1).sum(dim=1)

    return trace


def _scale(denoise: Denoiser, t: float) -> Tensor:
    """x / y at t."""
    return denoise.process.alpha(t) * (1 + denoise.process.noise_ratio(t) ** 2).sqrt()


def _require_within(denoise: Denoiser, start: float, end: float) -> None:
    if not (0 < start <= 1 and 0 < end <= 1 and start != end):
        raise ValueError(f"the flow runs between two times in (0, 1], got {start} and {end}")
