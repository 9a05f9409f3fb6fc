"""The oracle: a Gaussian mixture, for which every quantity of a diffusion model is a closed form.

Noise turns N(mu, C) into N(alpha mu, alpha^2 C + sigma^2 I): a noised mixture is a mixture, x_t has a density and a
score, and the posterior mean E[x_0 | x_t] that a network is trained for is known. Tests, figures and users' own checks
put its denoiser where a trained one would be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from medfusion.diffusion.denoiser import Denoiser
from medfusion.diffusion.process import Process, Time


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """p(x) = sum_j w_j N(x; mu_j, C_j): weights (k,), means (k, d), covariances (k, d, d), kept in float64.

    A covariance may be singular, down to zero: the data lie on a plane, or are points, and only noised densities exist.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __post_init__(self) -> None:
        for name in ("weights", "means", "covariances"):
            object.__setattr__(self, name, getattr(self, name).double())
        k, d = self.means.shape
        if self.weights.shape != (k,) or self.covariances.shape != (k, d, d):
            raise ValueError(f"{k} means in {d} dimensions need weights ({k},) and covariances ({k}, {d}, {d})")
        if not bool((self.weights >= 0).all()) or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError("the weights are not negative and sum to 1")
        object.__setattr__(self, "weights", self.weights / self.weights.sum())  # float32 ones sum to 1 + 3e-8

    @classmethod
    def isotropic(cls, weights: Tensor, means: Tensor, stds: Tensor) -> GaussianMixture:
        """Components that are round: standard deviations (k,)."""
        return cls(weights, means, torch.eye(means.shape[1]).double() * stds.double()[:, None, None] ** 2)

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """Variances (k, d) along the principal axes (k, d, d) of each component."""
        variances, vectors = torch.linalg.eigh(self.covariances)
        return variances.clamp(min=0), vectors

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """(number, d) draws, float64."""
        which = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        variances, vectors = self.axes
        z = torch.randn(number, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + torch.einsum("nij,nj->ni", vectors[which], variances[which].sqrt() * z)

    def noised(self, process: Process, t: Time) -> GaussianMixture:
        """The distribution of x_t, for one t."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        noise = sigma**2 * torch.eye(self.means.shape[1], dtype=torch.float64)
        return GaussianMixture(self.weights, alpha * self.means, alpha**2 * self.covariances + noise)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (b,) for x (b, ...)."""
        return torch.logsumexp(self._log_joint(x.double().flatten(1), x.new_zeros(len(x)).double()), dim=1)

    def denoiser(self, process: Process) -> Denoiser:
        """The exact E[x_0 | x_t] for x (b, ...) of d values a sample."""

        def network(x: Tensor, log_noise_ratio: Tensor) -> Tensor:
            ratio = log_noise_ratio.double().exp()
            y = x.double().flatten(1) / process.alpha_at(ratio)[:, None]
            return self._posterior_mean(y, ratio).to(x).view_as(x)

        return Denoiser(network, process, "x0")

    def conditional(self, known: Tensor, values: Tensor) -> GaussianMixture:
        """p(the other values | those where ``known`` (d,) bool is true are as in ``values`` (d,)), others in order."""
        a, b = ~known, known
        caa, cab, cbb = (self.covariances[:, i][:, :, j] for i, j in ((a, a), (a, b), (b, b)))
        gain = torch.linalg.solve(cbb, cab.mT).mT
        gap = values[b].double() - self.means[:, b]
        means = self.means[:, a] + torch.einsum("kij,kj->ki", gain, gap)
        of_known = GaussianMixture(self.weights, self.means[:, b], cbb)
        log_weights = of_known._log_joint(values[b].double()[None], torch.zeros(1, dtype=torch.float64))[0]
        return GaussianMixture(torch.softmax(log_weights, 0), means, caa - gain @ cab.mT)

    def _along_axes(self, y: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """y = x / alpha relative to each mean along its axes, and the variances there with the noise, (b, k, d)."""
        variances, vectors = self.axes
        if y.shape[1:] != self.means.shape[1:]:
            raise ValueError(f"samples of {y.shape[1]} values, the mixture has {self.means.shape[1]} dimensions")
        along = torch.einsum("kij,bki->bkj", vectors.to(y), y[:, None] - self.means.to(y))
        return along, variances.to(y) + ratio[:, None, None] ** 2

    def _log_joint(self, y: Tensor, ratio: Tensor) -> Tensor:
        """log w_j p_j(y) at noise ratios (b,): (b, k)."""
        along, total = self._along_axes(y, ratio)
        log_density = -0.5 * (along**2 / total + total.log() + math.log(2 * math.pi)).sum(dim=2)
        return self.weights.to(y).log() + log_density

    def _posterior_mean(self, y: Tensor, ratio: Tensor) -> Tensor:
        """sum_j p(j | y) E[x_0 | y, j]: each component keeps the share variance / (variance + r^2) of the deviation."""
        along, total = self._along_axes(y, ratio)
        variances, vectors = (v.to(y) for v in self.axes)
        each = self.means.to(y) + torch.einsum("kij,bkj->bki", vectors, variances / total * along)
        responsibility = torch.softmax(self._log_joint(y, ratio), dim=1)
        return torch.einsum("bk,bki->bi", responsibility, each)
