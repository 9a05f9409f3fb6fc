"""The variance-preserving process q(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I), alpha^2 + sigma^2 = 1.

Time is continuous in [0, 1]; the T steps of DDPM (Ho et al. 2020) are the grid t_k = k / (T - 1), on which the values
are exactly the discrete ones. Between grid points log(sigma / alpha) is interpolated linearly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Process:
    """A noise schedule of ``steps`` steps: "linear" (Ho et al. 2020) or "cosine" (Nichol & Dhariwal 2021, eq. 17)."""

    schedule: Literal["linear", "cosine"] = "cosine"
    steps: int = 1000

    @cached_property
    def beta(self) -> Tensor:
        """(steps,) float64: variance added at each discrete step."""
        if self.schedule == "linear":
            return torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64)
        offset = 0.008
        t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        f = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(steps,) float64: alpha(t_k)^2, the product of 1 - beta up to step k."""
        return torch.cumprod(1 - self.beta, dim=0)

    @cached_property
    def _log_ratio(self) -> Tensor:
        return 0.5 * (torch.log1p(-self.alpha_bar) - torch.log(self.alpha_bar))

    def log_noise_ratio(self, t: Tensor) -> Tensor:
        """log(sigma(t) / alpha(t)), float64, for times in [0, 1] of any shape."""
        if bool(((t < 0) | (t > 1)).any()):
            raise ValueError(f"times lie in [0, 1], got {float(t.min()):.4g} to {float(t.max()):.4g}")
        table = self._log_ratio.to(t.device)
        position = t.double() * (self.steps - 1)
        below = position.floor().long().clamp(max=self.steps - 2)
        return torch.lerp(table[below], table[below + 1], position - below)

    def noise_ratio(self, t: Tensor) -> Tensor:
        """sigma(t) / alpha(t): the standard deviation of the noise relative to the clean image."""
        return self.log_noise_ratio(t).exp()

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at t, float64."""
        return torch.sigmoid(-2 * self.log_noise_ratio(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise standard deviation at t, float64."""
        return torch.sigmoid(2 * self.log_noise_ratio(t)).sqrt()

    def time_of(self, noise_ratio: float) -> float:
        """The t at which ``noise_ratio(t)`` is the given value, the inverse of ``noise_ratio``.

        Raises
        ------
        ValueError : the value lies outside the range of the schedule.
        """
        low, high = float(self._log_ratio[0]), float(self._log_ratio[-1])
        if not (noise_ratio > 0 and low - 1e-9 <= math.log(noise_ratio) <= high + 1e-9):
            raise ValueError(
                f"noise ratio {noise_ratio:.4g} outside the schedule's {math.exp(low):.4g} to {math.exp(high):.4g}"
            )
        target = torch.tensor(math.log(noise_ratio), dtype=torch.float64)
        above = int(torch.searchsorted(self._log_ratio, target).clamp(1, self.steps - 1))
        left, right = self._log_ratio[above - 1], self._log_ratio[above]
        return float(((above - 1 + (target - left) / (right - left)) / (self.steps - 1)).clamp(0, 1))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x_0 + sigma(t) eps for a batch x0 (b, ...) and times t (b,)."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise


def expand(value: Tensor, like: Tensor) -> Tensor:
    """(b,) to (b, 1, 1, ...) in the dtype of ``like``."""
    return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
