"""Forward processes: VP, sub-VP and VE, each the marginals of a linear SDE and each a chain of T discrete steps.

    dx = f(t) x dt + g(t) dw          x_t = alpha(t) x_0 + sigma(t) eps          (Song et al. 2021b)

One number says how far a process has gone: the noise ratio r(t) = sigma(t) / alpha(t). In the coordinate x_t / alpha(t)
every process is the same, x_0 + r eps; they differ in how alpha follows from r and in how r grows with t:

    VP       alpha^2 + sigma^2 = 1           alpha = (1 + r^2)^(-1/2)
    sub-VP   sigma = 1 - alpha^2             alpha = 2 / (r + (r^2 + 4)^(1/2))
    VE       alpha = 1

Time is continuous in [0, 1] and t = 0 is the clean image. The steps of a discrete chain are the grid t_k = k / T,
k = 1 ... T, on which the values are exactly the discrete ones; between grid points log r is interpolated linearly, and
before the first one r^2 grows from 0 in proportion to t, as the variance of Brownian motion does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from scipy.optimize import brentq
from scipy.special import ndtr
from torch import Tensor

Schedule = Literal["linear", "scaled_linear", "sigmoid", "cosine"]
Time = Tensor | float
"""A time for the whole batch (a float or a tensor without dimensions), or one a sample (b,)."""
Generators = Sequence[torch.Generator]
"""One CPU generator a sample, or one for the whole batch."""


class Process(ABC):
    """What all processes share. Values come in float64, in the shape of ``t``; every t outside [0, 1] is refused."""

    steps: int

    @cached_property
    @abstractmethod
    def log_ratios(self) -> Tensor:
        """(steps,) float64, increasing: log r at t_1 ... t_T."""

    @abstractmethod
    def alpha_at(self, ratio: Tensor) -> Tensor:
        """Signal scale alpha where the noise ratio has this value."""

    @abstractmethod
    def alpha_slope(self, ratio: Tensor) -> Tensor:
        """Derivative of log alpha by log r, 0 or below."""

    def log_noise_ratio(self, t: Time) -> Tensor:
        """Logarithm of sigma(t) / alpha(t); minus infinity at t = 0."""
        position, below = self._place(t)
        table = self.log_ratios.to(position.device)
        within = torch.lerp(table[below], table[below + 1], (position - below).clamp(min=0))
        return within + 0.5 * torch.log((position + 1).clamp(max=1))  # the second term is 0 from t_1 on

    def noise_ratio(self, t: Time) -> Tensor:
        """r(t) = sigma(t) / alpha(t): the standard deviation of the noise relative to the clean image."""
        return self.log_noise_ratio(t).exp()

    def alpha(self, t: Time) -> Tensor:
        """Scale of the clean image at t."""
        return self.alpha_at(self.noise_ratio(t))

    def sigma(self, t: Time) -> Tensor:
        """Standard deviation of the noise at t."""
        ratio = self.noise_ratio(t)
        return ratio * self.alpha_at(ratio)

    def time_of(self, ratio: Time) -> Tensor:
        """The t at which ``noise_ratio(t)`` is ``ratio``, its inverse.

        Raises
        ------
        ValueError : a ratio is negative, not a number, or beyond that of t = 1.
        """
        ratio = torch.as_tensor(ratio, dtype=torch.float64)
        table = self.log_ratios.to(ratio.device)
        first, last = float(table[0].exp()), float(table[-1].exp())
        if not bool(((ratio >= 0) & (ratio <= last * (1 + 1e-5))).all()):  # float32 may round the last one up
            raise ValueError(f"noise ratio {_range_of(ratio)} outside the process's 0 to {last:.4g}")
        log = ratio.clamp(min=first).log()
        above = torch.searchsorted(table, log.contiguous()).clamp(1, self.steps - 1)
        within = (log - table[above - 1]) / (table[above] - table[above - 1])
        late = ((above + within) / self.steps).clamp(max=1)
        return torch.where(ratio < first, (ratio / first) ** 2 / self.steps, late)

    def drift(self, t: Time) -> Tensor:
        """f(t) = d log alpha / dt of the SDE, for t in (0, 1]."""
        return self.alpha_slope(self.noise_ratio(t)) * self._log_ratio_slope(t)

    def diffusion(self, t: Time) -> Tensor:
        """g(t) of the SDE for t in (0, 1]: g^2 = d sigma^2 / dt - 2 f sigma^2 = 2 sigma^2 d log r / dt."""
        return self.sigma(t) * (2 * self._log_ratio_slope(t)).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """A sample of q(x_t | x_0): alpha(t) x_0 + sigma(t) eps for a batch (b, ...)."""
        if noise.shape != x0.shape:
            raise ValueError(f"images {tuple(x0.shape)} and noise {tuple(noise.shape)} have different shapes")
        return combine(self.alpha(t), x0, self.sigma(t), noise)

    def transition(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """q(x_t | x_s) = N(scale x_s, variance I) for s < t: (scale, variance)."""
        return self.alpha(t) / self.alpha(s), self.sigma(t) ** 2 * self.new_share(s, t)

    def posterior(self, x0: Tensor, x: Tensor, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """q(x_s | x_t = x, x_0) = N(mean, variance I) for s < t (Ho et al. 2020, eq. 6 and 7): (mean, variance)."""
        new, alpha_s, alpha_t = self.new_share(s, t), self.alpha(s), self.alpha(t)
        return combine(alpha_s * new, x0, alpha_s / alpha_t * (1 - new), x), self.sigma(s) ** 2 * new

    @cached_property
    def grid(self) -> Tensor:
        """(steps,) float64: the times t_1 ... t_T of the discrete chain."""
        return torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(steps,) float64: alpha(t_k)^2."""
        return self.alpha(self.grid) ** 2

    @cached_property
    def beta(self) -> Tensor:
        """(steps,) float64: variance of q(x_k | x_{k-1}); for VP the beta_k of DDPM."""
        return self.transition(torch.cat([self.grid.new_zeros(1), self.grid[:-1]]), self.grid)[1]

    def _place(self, t: Time) -> tuple[Tensor, Tensor]:
        """Position on the grid, -1 at t = 0 and 0 at t_1, and the last grid point before it, or the first.

        At a grid point it is where the reverse step leads, so that slopes there are those of that step.
        """
        t = torch.as_tensor(t, dtype=torch.float64)
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"times lie in [0, 1], got {_range_of(t)}")
        position = t * self.steps - 1
        below = (position - 1e-9).ceil().long() - 1  # k / T times T need not be k
        return position, below.clamp(0, self.steps - 2)

    def new_share(self, s: Time, t: Time) -> Tensor:
        """1 - (r_s / r_t)^2: how much of the noise variance at t came after s."""
        log_s, log_t = self.log_noise_ratio(s), self.log_noise_ratio(t)
        if not bool((log_s <= log_t).all()):
            raise ValueError(f"a step goes from s to a later t, got s = {s} and t = {t}")
        return -torch.expm1(2 * (log_s - log_t))

    def _log_ratio_slope(self, t: Time) -> Tensor:
        """Derivative of log r by t."""
        position, below = self._place(t)
        if not bool((position > -1).all()):
            raise ValueError("drift and diffusion are defined for t > 0")
        table = self.log_ratios.to(position.device)
        slope = (table[below + 1] - table[below]) * self.steps
        return torch.where(position < 1e-9, self.steps / (2 * (position + 1)), slope)


@dataclass(frozen=True)
class Scheduled(Process):
    """A process whose alpha is that of DDPM's chain: alpha_bar is the product of 1 - beta.

    ``schedule`` is "linear" (beta from ``beta_start`` to ``beta_end``, Ho et al. 2020), "scaled_linear" (its root is
    linear), "sigmoid", or "cosine" (Nichol & Dhariwal 2021, eq. 17), which has no such ends. As in DDPM and MONAI the
    betas do not scale with the steps: the default ends make noise of an image in 1000 steps, not in 100.
    """

    schedule: Schedule = "cosine"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        _require_steps(self.steps)
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule {self.schedule!r} is none of {', '.join(get_args(Schedule))}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas need 0 < start <= end < 1, got {self.beta_start} and {self.beta_end}")

    @property
    def _log_alpha_bar(self) -> Tensor:
        """(steps,) float64: log of the product of 1 - beta up to step k."""
        first, last, steps = self.beta_start, self.beta_end, self.steps
        if self.schedule == "linear":
            beta = torch.linspace(first, last, steps, dtype=torch.float64)
        elif self.schedule == "scaled_linear":
            beta = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
        elif self.schedule == "sigmoid":
            beta = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (last - first) + first
        else:
            offset = 0.008
            t = torch.arange(steps + 1, dtype=torch.float64) / steps
            f = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        return torch.cumsum(torch.log1p(-beta), dim=0)


@dataclass(frozen=True)
class VP(Scheduled):
    """Variance-preserving, alpha^2 + sigma^2 = 1: DDPM, and the VP SDE."""

    @cached_property
    def log_ratios(self) -> Tensor:
        """log of ((1 - alpha_bar) / alpha_bar)^(1/2)."""
        return 0.5 * (torch.log(-torch.expm1(self._log_alpha_bar)) - self._log_alpha_bar)

    def alpha_at(self, ratio: Tensor) -> Tensor:
        """alpha^2 (1 + r^2) = 1."""
        return (1 + ratio**2).rsqrt()

    def alpha_slope(self, ratio: Tensor) -> Tensor:
        """- r^2 / (1 + r^2) = - sigma^2."""
        return -(ratio**2) / (1 + ratio**2)


@dataclass(frozen=True)
class SubVP(Scheduled):
    """The sub-VP SDE (Song et al. 2021b, eq. 29): alpha as of VP, less noise, sigma = 1 - alpha^2."""

    schedule: Schedule = "linear"

    @cached_property
    def log_ratios(self) -> Tensor:
        """log of (1 - alpha_bar) / alpha_bar^(1/2)."""
        return torch.log(-torch.expm1(self._log_alpha_bar)) - 0.5 * self._log_alpha_bar

    def alpha_at(self, ratio: Tensor) -> Tensor:
        """The positive root of alpha^2 + r alpha = 1."""
        return 2 / (ratio + (ratio**2 + 4).sqrt())

    def alpha_slope(self, ratio: Tensor) -> Tensor:
        """- r / (r^2 + 4)^(1/2)."""
        return -ratio * (ratio**2 + 4).rsqrt()


@dataclass(frozen=True)
class VE(Process):
    """Variance-exploding: x_0 + sigma eps with sigmas in geometric progression (NCSN, Song & Ermon 2019)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    steps: int = 1000

    def __post_init__(self) -> None:
        _require_steps(self.steps)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"VE needs 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @classmethod
    def of_data(cls, data: Tensor, sigma_min: float = 0.01) -> VE:
        """NCSN's noise sequence for a data set (n, ...) (Song & Ermon 2020, Techniques 1 and 2).

        The largest sigma is the largest distance between two samples, so that noise bridges all of them; the number of
        steps makes the ratio of neighbouring sigmas no larger than ``ncsn_ratio`` of the dimension.

        Raises
        ------
        ValueError : fewer than two different samples, or fewer than five dimensions.
        """
        flat = data.double().flatten(1)
        sigma_max = float(torch.pdist(flat).max()) if len(flat) > 1 else 0.0
        if not sigma_min < sigma_max < math.inf:
            raise ValueError(f"largest distance of {len(flat)} sample(s) is {sigma_max}, sigma_min is {sigma_min}")
        steps = 1 + math.ceil(math.log(sigma_max / sigma_min) / math.log(ncsn_ratio(flat.shape[1])))
        return cls(sigma_min, sigma_max, max(steps, 2))

    @cached_property
    def log_ratios(self) -> Tensor:
        """log sigma, evenly spaced."""
        return torch.linspace(math.log(self.sigma_min), math.log(self.sigma_max), self.steps, dtype=torch.float64)

    def alpha_at(self, ratio: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(ratio)

    def alpha_slope(self, ratio: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(ratio)


def ncsn_ratio(dimensions: int) -> float:
    """The ratio gamma of neighbouring sigmas at which the shells that noise draws in D dimensions overlap by half.

    It solves Phi(sqrt(2D) (gamma - 1) + 3 gamma) - Phi(sqrt(2D) (gamma - 1) - 3 gamma) = 0.5 (Song & Ermon 2020,
    Technique 2).

    Raises
    ------
    ValueError : fewer than five dimensions, where the overlap never falls to a half.
    """
    if dimensions < 5:
        raise ValueError(f"{dimensions} dimension(s): the overlap of noise levels falls to a half from 5 on")
    root = math.sqrt(2 * dimensions)

    def excess(gamma: float) -> float:
        shift = root * (gamma - 1)
        return float(ndtr(shift + 3 * gamma) - ndtr(shift - 3 * gamma)) - 0.5

    return float(brentq(excess, 1.0, 2 * root / (root - 3), xtol=1e-12))


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Numbers to multiply a batch with: one a sample (b,) as (b, 1, 1, ...), one for all as it is, which is faster."""
    return value.to(like.dtype) if value.ndim == 0 else value.to(like).view(-1, *[1] * (like.ndim - 1))


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """The batch a x + b y, with a and b one number a sample (b,) or one for all.

    In place on the first product: a new volume costs more time, in page faults, than the arithmetic on it.
    """
    if b.ndim == 0:
        return (expand(a, x) * x).add_(y, alpha=float(b))
    return (expand(a, x) * x).add_(expand(b, y) * y)


def widened(x: Tensor) -> Tensor:
    """At least float32: in half precision a step smaller than 1/256 of the value would be lost."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def noise_like(x: Tensor, generators: Generators) -> Tensor:
    """Standard normal noise (b, ...) in the dtype and on the device of ``x``, drawn on the CPU.

    Each sample has its own generator, so that batching never changes a sample; one generator serves a whole batch.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if len(generators) == 1:
        return torch.randn(x.shape, generator=generators[0], dtype=dtype).to(x)
    if len(generators) != len(x):
        raise ValueError(f"{len(x)} sample(s) need as many generators, or one for all; got {len(generators)}")
    return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=dtype) for g in generators]).to(x)


def _require_steps(steps: int) -> None:
    if steps < 2:
        raise ValueError(f"a process has at least 2 steps, got {steps}")


def _range_of(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
