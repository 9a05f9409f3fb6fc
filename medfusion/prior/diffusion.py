"""The diffusion prior: a network that denoises, and the process it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medfusion.config import Config
from medfusion.diffusion import VE, VP, Denoiser, Network, Process, SubVP, dpm_solver, probability_flow, time_steps
from medfusion.networks import Autoencoder, ResidualUNet, on_latents
from medfusion.prior.arithmetic import half_width
from medfusion.prior.autoencoder import build_autoencoder, image_of, latents_of
from medfusion.prior.base import Prior
from medfusion.prior.padding import far_side, grown, grown_to

AUTOENCODER = "autoencoder."  # begins the names of its weights in the file
SAMPLING_STEPS = 32  # of DPM-Solver++(2M)
LAST = 0.99  # time of pure noise: at 1 the noise ratio of some schedules is infinite
# Of the probability flow between images and codes. A hippocampus of 32^3 voxels comes back from its code with an error
# (rms, the range is 2) of 1.1, 0.11 and 0.007 at tolerances of 1e-2, 1e-3 and 1e-4, after 52, 94 and 160 evaluations.
TOLERANCE = 1e-4


def build_network(config: Config) -> ResidualUNet:
    """The network that a config describes, freshly initialised."""
    shown = config.network
    return ResidualUNet(
        shown.channels,
        shown.blocks,
        2 if config.process.learned_variance else 1,
        stem=shown.stem,
        images=config.noise_shape[0],
        located=shown.located,
        labels=shown.labels,
        classes=len(shown.classes),
    )


def build_process(config: Config) -> Process:
    """The forward process that a config describes."""
    process = config.process
    if process.family == "ve":
        return VE(process.sigma_min, process.sigma_max, process.steps)
    return (VP if process.family == "vp" else SubVP)(process.schedule, process.steps)


def build_denoiser(config: Config, network: Network) -> Denoiser:
    """How a config says that its network is to be read; training and use go through it alike."""
    process = config.process
    return Denoiser(network, build_process(config), process.prediction, process.learned_variance, process.sigma_data)


@dataclass(frozen=True, eq=False)
class DiffusionPrior(Prior, family="diffusion"):
    """A trained diffusion prior.

    Attributes
    ----------
    network : denoises.
    autoencoder : of a latent prior, whose network works on its latents; None: the network works on voxels.
    """

    network: ResidualUNet
    autoencoder: Autoencoder | None = None

    @classmethod
    def untrained(cls, config: Config, provenance: dict[str, Any]) -> DiffusionPrior:
        """As ``Prior``."""
        autoencoder = None if config.autoencoder is None else build_autoencoder(config)
        return cls(config, build_network(config), provenance, autoencoder)

    @property
    def kind(self) -> str:
        """As ``Prior``."""
        return "a diffusion prior"

    @property
    def modules(self) -> dict[str, nn.Module]:
        """As ``Prior``."""
        return super().modules | ({} if self.autoencoder is None else {AUTOENCODER: self.autoencoder})

    @property
    def process(self) -> Process:
        """As ``Prior``."""
        return build_process(self.config)

    def latents(self, image: Tensor) -> Tensor:
        """What the denoiser works on, of images (b, 1, d, h, w): themselves, or their latents."""
        return image if self.autoencoder is None else latents_of(self.autoencoder, image)

    def images(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Images (b, 1, *shape) of what the denoiser works on, the inverse of ``latents``."""
        return x if self.autoencoder is None else image_of(self.autoencoder, x, shape)

    def sample(self, generators: Sequence[torch.Generator]) -> Tensor:
        """As ``Prior``; nothing is told of position, labels and class."""
        noise = self.noise(generators)
        times = time_steps(self.process, SAMPLING_STEPS, "log_snr", start=LAST)
        x = dpm_solver(self.denoiser(), noise * self.process.sigma(times[0]).to(noise), times)
        return self.images(x, [self.config.data.crop] * 3)

    def encode(self, image: Tensor) -> Tensor:
        """The noise from which the probability flow makes an image: unique, of unit variance (Song et al. 2021b)."""
        start, end = 1 / self.process.steps, LAST
        x = self.latents(image.to(self.device)) * self.process.alpha(start).to(image)
        x = probability_flow(self.denoiser(), x, start, end, rtol=TOLERANCE, atol=TOLERANCE)
        return x / self.process.sigma(end).to(x)

    def decode(self, code: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``encode``, as far as the tolerance of the flow and the latents go."""
        start, end = LAST, 1 / self.process.steps
        x = code.to(self.device) * self.process.sigma(start).to(code)
        x = probability_flow(self.denoiser(), x, start, end, rtol=TOLERANCE, atol=TOLERANCE)
        return self.images(x / self.process.alpha(end).to(x), shape)

    def denoiser(
        self,
        context: Tensor | None = None,
        labels: Tensor | None = None,
        classes: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Denoiser:
        """E[x_0 | x_t] for batches (b, 1, d, h, w) of any size, padded inside to what the network needs.

        A latent prior denoises latents: x_0 is what ``latents`` gives, while all else lies on the image.
        ``context`` (b, 4, d/2, h/2, w/2) as in ``medfusion.data.crops.context_channels``; ``labels`` (b, d, h, w) and
        ``classes`` (b,) integers, -1 where unknown; None means unknown. ``guidance`` towards them is the scale of
        ``medfusion.diffusion.classifier_free`` of a denoiser with them and one without, asked as one batch: on a CPU in
        0.7 of the time of two.

        Raises
        ------
        ValueError : labels or classes for a prior that was trained without, or a value that it was not trained on;
            when it is asked: context or labels of another shape than the image.
        """
        known = self.config.network
        _within(labels, known.labels, "labels")
        _within(classes, len(known.classes), "classes")
        if self.autoencoder is not None:
            context, labels = on_latents(context, labels, self.autoencoder.factor)

        def network(x: Tensor, log_noise_ratio: Tensor) -> Tensor:
            multiple, shape = self.network.multiple, x.shape[2:]
            _lies_on(x, labels, 1, "labels")
            _lies_on(x, context, 2, "context")
            padding = far_side([-n % multiple for n in x.shape[2:]])
            x = grown(x, padding)
            told = None if context is None else grown_to(context.to(x.device), [n // 2 for n in x.shape[2:]])
            map_ = None if labels is None else grown_to(labels[:, None].to(x.device), x.shape[2:])[:, 0]
            class_ = None if classes is None else classes.to(x.device)
            ratio = log_noise_ratio.to(x.device)
            with half_width(x.device):
                if guidance == 1 or (map_ is None and class_ is None):
                    output = self.network(x, ratio, told, map_, class_)
                else:
                    output = self._guided(x, ratio, told, map_, class_, guidance)
            d, h, w = (slice(n) for n in shape)
            return output[..., d, h, w]

        return build_denoiser(self.config, network)

    def _guided(
        self,
        x: Tensor,
        log_noise_ratio: Tensor,
        context: Tensor | None,
        labels: Tensor | None,
        classes: Tensor | None,
        guidance: float,
    ) -> Tensor:
        """The network's answer, extrapolated: every prediction is affine in x_0, so that it moves as x_0 would."""

        def doubled(given: Tensor | None, withheld: Tensor | None) -> Tensor | None:
            return None if given is None or withheld is None else torch.cat([given, withheld])

        unknown = [None if given is None else torch.full_like(given, -1) for given in (labels, classes)]
        output = self.network(
            torch.cat([x, x]),
            torch.cat([log_noise_ratio, log_noise_ratio]),
            doubled(context, context),
            doubled(labels, unknown[0]),
            doubled(classes, unknown[1]),
        )
        told, free = output.chunk(2)
        predicted = slice(x.shape[1])  # what else there is says how to read a learned variance
        told[:, predicted] = free[:, predicted] + guidance * (told - free)[:, predicted]
        return told


def _within(given: Tensor | None, number: int, what: str) -> None:
    if given is None:
        return
    if not number:
        raise ValueError(f"the prior was trained without {what}")
    if given.is_floating_point() or int(given.min()) < -1 or int(given.max()) >= number:
        raise ValueError(f"{what} of this prior are integers from 0 to {number - 1}, or -1 for unknown")


def _lies_on(x: Tensor, given: Tensor | None, factor: int, what: str) -> None:
    """``given`` has the size of ``x`` divided by ``factor``, rounded down or up."""
    if given is None:
        return
    if any(abs(factor * m - n) >= factor for m, n in zip(given.shape[-3:], x.shape[-3:], strict=True)):
        raise ValueError(f"{what} {tuple(given.shape)} does not lie on the image {tuple(x.shape)}")
