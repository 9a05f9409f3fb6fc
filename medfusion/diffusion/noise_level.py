"""How noisy an image is, as the prior itself finds it: no second model, and one equation.

For y = x_0 + r eps and its posterior mean D(y, r), at every pair of voxels,

    E (y - D)_i (y - D)_j = r^2 (delta_ij - E dD_i/dy_j),                                                     (1)

because y - D = - r^2 d log p(y) (Tweedie's formula), and E d_i log p d_j log p = - E d_i d_j log p (Hyvärinen 2005,
theorem 1). At i = j it is an equation for r: at a level that is too low the residual is larger than the right side
allows, at one that is too high smaller. What a prior knows as anatomy is not taken for noise, as it is by filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medfusion.diffusion.denoiser import Denoiser
from medfusion.diffusion.process import Generators, noise_like

STEP = 0.1  # of the noise: the length of the finite difference
TOLERANCE = 0.05  # of the level: its change at which the search ends; what the secant then misses is a tenth of it
SLOPE = -0.7  # of the gap in log r, before the search has seen two of them
EVALUATIONS = 8  # of both sides of (1), at most
STRIDE = 0.5  # the longest step of the search, in log r


@dataclass(frozen=True)
class Residual:
    """What (1) compares at one level, ``ratio``, voxel by voxel, (b, c, ...).

    ``x0`` is D, ``removed`` (y - D) / r, ``signs`` random signs z and ``response`` dD/dy z: the mean of z_i
    response_j, over draws or over voxels, is dD_j/dy_i (Hutchinson 1990).
    """

    ratio: float
    x0: Tensor
    removed: Tensor
    signs: Tensor
    response: Tensor

    @property
    def freedom(self) -> Tensor:
        """1 - dD/dy, the right side of (1) in units of r^2."""
        return 1 - self.signs * self.response

    @property
    def risk(self) -> Tensor:
        """Stein's unbiased estimate (Stein 1981) of (D - x_0)^2 in units of r^2: no clean image is needed for it."""
        return self.removed.square() - 1 + 2 * self.signs * self.response


def residual(denoise: Denoiser, y: Tensor, ratio: float, generators: Generators) -> Residual:
    """The residual of y = x_t / alpha(t) (b, c, ...) at the time whose noise ratio is ``ratio``; two evaluations."""
    t = denoise.process.time_of(ratio)
    alpha, step = float(denoise.process.alpha(t)), STEP * ratio
    signs = noise_like(y, generators).sign()
    x0 = denoise(alpha * y, t)
    moved = denoise(alpha * (y + step * signs), t)
    return Residual(ratio, x0, (y - x0) / ratio, signs, (moved - x0) / step)


@torch.no_grad()
def noise_ratio(
    denoise: Denoiser,
    y: Tensor,
    counted: Callable[[Tensor], Tensor],
    *,
    first: float,
    generators: Callable[[], Generators],
) -> tuple[float, Residual]:
    """The level at which (1) holds in the mean over the voxels that ``counted`` picks, by the secant method in log r.

    Parameters
    ----------
    y : images (b, c, ...) in the prior's units with one level of noise.
    counted : of x_0, the posterior mean at the level in question, which voxels count: a boolean tensor of its shape.
    first : where the search begins.
    generators : makes the generators of the random signs anew for each evaluation, so that all see the same.

    Returns
    -------
    The noise ratio, and the residual at the last level that was looked at, which is no further from it than TOLERANCE
    unless the search was given up after EVALUATIONS. The least ratio that is told is that of the process's first step.
    """
    lowest, highest = (math.log(float(denoise.process.noise_ratio(t))) for t in (1 / denoise.process.steps, 1.0))

    def look(level: float) -> tuple[float, Residual]:
        """log of the level that the residual at ``level`` speaks for, less ``level``."""
        found = residual(denoise, y, math.exp(level), generators())
        inside = counted(found.x0)
        share = found.removed[inside].square().mean() / found.freedom[inside].mean().clamp(min=1e-3)
        return 0.5 * math.log(max(float(share), 1e-12)), found

    def moved(level: float, step: float) -> float:
        return min(max(level + min(max(step, -STRIDE), STRIDE), lowest), highest)

    before = moved(math.log(first), 0.0)
    gap_before, found = look(before)
    level = moved(before, -gap_before / SLOPE)
    for _ in range(EVALUATIONS - 1):
        if abs(level - before) < TOLERANCE:
            break
        gap, found = look(level)
        slope = min((gap - gap_before) / (level - before), -0.25)  # it falls; a flatter slope is chance
        before, gap_before = level, gap
        level = moved(level, -gap / slope)
    return math.exp(level), found
