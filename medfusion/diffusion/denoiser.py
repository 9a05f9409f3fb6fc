"""Denoiser: a network and how to read it; samplers and tasks see x_0 = denoise(x_t, t) and nothing else of it.

Whatever a network predicts is a combination p x_0 + q eps of the images that make x_t = alpha x_0 + sigma eps. Two
equations with two unknowns: x_t and the prediction give x_0 and eps, and these give every other parametrisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from medfusion.diffusion.process import Process, Time, combine, expand, widened

Prediction = Literal["epsilon", "x0", "v", "score", "edm"]
Variance = Literal["small", "large", "learned"]
Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t (b, c, ...), log noise ratio (b,)) -> prediction (b, c, ...), with learned variance (b, 2c, ...)."""
Guidance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (b, c, ...), t (b,), x_0 (b, c, ...)) -> the x_0 to go on with."""


def coefficients(prediction: Prediction, process: Process, t: Time, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """(p, q) of the prediction p x_0 + q eps at t.

    "epsilon" (Ho et al. 2020); "x0"; "v" = alpha eps - sigma x_0 (Salimans & Ho 2022); "score", the gradient of log
    q(x_t | x_0), - eps / sigma; "edm", what the network inside the preconditioning of Karras et al. 2022 (eq. 7) is
    asked for, (r / sigma_data x_0 - sigma_data eps) / (r^2 + sigma_data^2)^(1/2): for VP and sigma_data = 1 this is -v.
    """
    ratio, alpha, sigma = process.noise_ratio(t), process.alpha(t), process.sigma(t)
    if prediction == "epsilon":
        return torch.zeros_like(ratio), torch.ones_like(ratio)
    if prediction == "x0":
        return torch.ones_like(ratio), torch.zeros_like(ratio)
    if prediction == "v":
        return -sigma, alpha
    if prediction == "score":
        return torch.zeros_like(ratio), -1 / sigma
    if prediction == "edm":
        scale = (ratio**2 + sigma_data**2).rsqrt()
        return scale * ratio / sigma_data, -scale * sigma_data
    raise ValueError(f"prediction {prediction!r} is none of epsilon, x0, v, score, edm")


def target(
    prediction: Prediction, process: Process, x0: Tensor, noise: Tensor, t: Time, sigma_data: float = 0.5
) -> Tensor:
    """What the network should answer for x_t = alpha x_0 + sigma eps."""
    p, q = coefficients(prediction, process, t, sigma_data)
    return combine(p, x0, q, noise)


def separate(
    prediction: Prediction, process: Process, output: Tensor, x: Tensor, t: Time, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(x_0, eps) from the network's answer at x_t = x, the inverse of ``target``, for t > 0.

    To convert one parametrisation into another: ``target(b, process, *separate(a, process, output, x, t), t)``.
    """
    p, q = coefficients(prediction, process, t, sigma_data)
    alpha, sigma = process.alpha(t), process.sigma(t)
    scale = 1 / (alpha * q - sigma * p)
    return combine(q * scale, x, -sigma * scale, output), combine(alpha * scale, output, -p * scale, x)


@dataclass(frozen=True)
class Denoiser:
    """The posterior mean E[x_0 | x_t] that a network stands for, with the process it belongs to.

    Attributes
    ----------
    network : called with x_t and log r(t); a condition, such as a label, is bound to it before.
    process : the forward process that it was trained on.
    prediction : what it answers with, see ``coefficients``.
    learned_variance : whether it answers with twice the channels, the second half saying where between log of the small
        and log of the large variance that of a reverse step lies, -1 to 1 (Nichol & Dhariwal 2021, eq. 15).
    sigma_data : standard deviation of the data; only "edm" uses it.
    guidance : what revises x_0 before anyone sees it; see ``guided``.
    """

    network: Network
    process: Process
    prediction: Prediction
    learned_variance: bool = False
    sigma_data: float = 0.5
    guidance: Guidance | None = None

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """x_0 (b, c, ...) for x_t = x and t in (0, 1], in float32 or wider.

        Raises
        ------
        ValueError : a time out of range.
        FloatingPointError : the output of the network, or of the guidance, is not finite.
        """
        return self.estimate(x, t)[0]

    def estimate(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor | None]:
        """x_0, and for learned variance where between small (0) and large (1) it lies, both (b, c, ...)."""
        x, t = widened(x), torch.as_tensor(t, dtype=torch.float64)
        output, fraction = self.answer(x, t)
        x0, _ = separate(self.prediction, self.process, output, x, t, self.sigma_data)
        _require_finite("network", t, x0, fraction)
        if self.guidance is not None:
            x0 = self.guidance(x, t.expand(len(x)), x0)
            if x0.shape != x.shape:
                raise ValueError(f"the guidance answers {tuple(x.shape)} with {tuple(x0.shape)}")
            _require_finite("guidance", t, x0)
        return x0, fraction

    def answer(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor | None]:
        """The network's prediction as it is, which is what objectives compare with ``target``; and the fraction."""
        x, t = widened(x), torch.as_tensor(t, dtype=torch.float64)
        if not bool((t > 0).all()):
            raise ValueError("a denoiser is asked for times in (0, 1]; at t = 0 the image is clean")
        seen = x
        if self.prediction == "edm":
            ratio = self.process.noise_ratio(t)
            seen = expand((ratio**2 + self.sigma_data**2).rsqrt() / self.process.alpha(t), x) * x
        output = self.network(seen, self.process.log_noise_ratio(t).to(x).expand(len(x))).to(x)
        channels = 2 * x.shape[1] if self.learned_variance else x.shape[1]
        if output.shape != (len(x), channels, *x.shape[2:]):
            raise ValueError(
                f"the network answers {tuple(x.shape)} with {tuple(output.shape)}, not {channels} channels"
            )
        if not self.learned_variance:
            return output, None
        output, position = output.chunk(2, dim=1)
        return output, (position + 1) / 2

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Gradient of log p(x_t) by x_t, (alpha x_0 - x_t) / sigma^2 (Tweedie's formula)."""
        x, precision = widened(x), self.process.sigma(t) ** -2
        return combine(self.process.alpha(t) * precision, self(x, t), -precision, x)

    def guided(self, guidance: Guidance) -> Denoiser:
        """The same denoiser with ``guidance`` applied to its x_0, after the guidance that it has already."""
        earlier = self.guidance
        if earlier is None:
            return replace(self, guidance=guidance)
        return replace(self, guidance=lambda x, t, x0: guidance(x, t, earlier(x, t, x0)))


def reverse_variance(process: Process, s: Time, t: Time, kind: Variance, fraction: Tensor | None = None) -> Tensor:
    """Variance of p(x_s | x_t) for s < t: one a time in float64, or with "learned" one a voxel, as ``fraction``.

    "small" is that of the posterior q(x_s | x_t, x_0), "large" that of the transition q(x_t | x_s): the right ones for
    data that are one point and for data that are white noise (Ho et al. 2020, section 3.2). At s = 0 the small variance
    is zero; as Nichol & Dhariwal do, that of the step before stands in.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    s = torch.as_tensor(s, dtype=torch.float64)
    if kind not in get_args(Variance):
        raise ValueError(f"variance {kind!r} is none of {', '.join(get_args(Variance))}")
    if kind == "large":
        return process.sigma(t) ** 2 * process.new_share(s, t)
    low, high = torch.where(s > 0, s, t), torch.where(s > 0, t, (2 * t).clamp(max=1))
    small = process.sigma(low) ** 2 * process.new_share(low, high)
    if kind == "small":
        return small
    if fraction is None:
        raise ValueError("variance 'learned' needs a denoiser with learned variance")
    large = reverse_variance(process, s, t, "large")
    return (expand(small.log(), fraction) + fraction * expand((large / small).log(), fraction)).exp()  # eq. 15


def _require_finite(source: str, t: Tensor, *outputs: Tensor | None) -> None:
    for output in outputs:
        # the sum is finite where all values are, but for overflow, and ten times quicker to look at
        if output is None or bool(torch.isfinite(output.sum())) or bool(torch.isfinite(output).all()):
            continue
        raise FloatingPointError(f"the {source}'s output is not finite at t = {float(t.max()):.4g}")
