"""What the loop can train: a family's networks; for latent diffusion the autoencoder, then the diffusion network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medfusion.config import Config, TimesConfig
from medfusion.data.crops import Case, Crop, mean_atlas
from medfusion.errors import MedfusionError
from medfusion.networks import Adversarial, Autoencoder, CycleGan, ResidualUNet, adopt, on_latents
from medfusion.networks.residual_unet import ATLAS, ATLAS_REACH
from medfusion.prior import (
    AutoencoderPrior,
    CycleGanPrior,
    DiffusionPrior,
    GanPrior,
    Prior,
    build_adversarial,
    build_autoencoder,
    build_cyclegan,
    build_network,
)
from medfusion.training.batches import Samples, Shown
from medfusion.training.evaluate import (
    cycle_picture,
    denoising_psnr,
    picture,
    reconstruction_picture,
    reconstruction_psnr,
    samples_picture,
    validation_bound,
    validation_cycle,
    validation_game,
    validation_loss,
)
from medfusion.training.objective import adversarial_loss, autoencoder_loss, batch_loss, cyclegan_loss, rebuilt

SCALED_BY = 32  # crops from which the spread of the latents is measured


class Stage(Protocol):
    """One network's training; ``config.training`` are its settings."""

    @property
    def config(self) -> Config:
        """All settings."""

    @property
    def folder(self) -> str:
        """Of its checkpoint and pictures, within that of the run."""

    @property
    def settings(self) -> str:
        """The section of the user's config that has its steps, batch and rate."""

    @property
    def section(self) -> str:
        """The section of the config that describes the network, its channels among them."""

    def build(self) -> nn.Module:
        """The network, freshly initialised."""

    def begin(self, network: Any, cases: Sequence[Case]) -> None:
        """Give it its first weights, where they are not random."""

    def loss(self, network: nn.Module, shown: Shown, share: float) -> Tensor:
        """(b,), of a batch on the network's device, when this ``share`` of the steps is done."""

    def validate(self, network: Any, crops: Sequence[Crop]) -> dict[str, float]:
        """What is written to metrics.jsonl about the averaged network."""

    def draw(self, network: Any, crops: Sequence[Crop], path: Path) -> None:
        """A picture for people."""

    def measures(self, network: Any, crops: Sequence[Crop]) -> dict[str, Any]:
        """What else the card says of held-out crops."""

    def prior(self, network: Any, provenance: dict[str, Any] | None = None) -> Prior:
        """The prior with this network."""


@dataclass(frozen=True)
class Diffusion:
    """The network of a prior, on voxels or on the latents of a trained autoencoder."""

    config: Config
    autoencoder: Autoencoder | None = None
    folder: str = ""
    settings: str = "training"
    section: str = "network"

    def build(self) -> ResidualUNet:
        """As ``Stage``."""
        network = build_network(self.config)
        network.recompute = self.config.training.recompute
        return network

    def begin(self, network: ResidualUNet, cases: Sequence[Case]) -> None:
        """The weights of ``training.start``, and the atlas of the scans.

        Raises
        ------
        MedfusionError : ``training.start`` has other layers.
        """
        self.adopt_start(network)
        if network.located:
            network.atlas.copy_(mean_atlas(cases, ATLAS, ATLAS_REACH))

    def adopt_start(self, network: ResidualUNet) -> None:
        """The weights of ``training.start``; raises as ``begin``."""
        if self.config.training.start:
            try:
                adopt(network, DiffusionPrior.load(self.config.training.start).network)
            except ValueError as error:
                raise MedfusionError(
                    f"training.start: {error}",
                    fix="take channels and blocks from its card, or leave training.start out",
                ) from error

    def loss(self, network: nn.Module, shown: Shown, share: float) -> Tensor:
        """As ``Stage``."""
        if self.autoencoder is not None:
            context, labels = on_latents(shown.crop.context, shown.crop.labels, self.autoencoder.factor)
            assert context is not None
            prior = self.prior(network)  # crop by crop: the encoder needs more memory than what it is for
            image = torch.cat([prior.latents(one[None]) for one in shown.crop.image])
            shown = shown._replace(crop=Crop(image, context, labels, shown.crop.class_index))
        return batch_loss(network, self.config, shown)

    def validate(self, network: ResidualUNet, crops: Sequence[Crop]) -> dict[str, float]:
        """Loss at each of some times."""
        return validation_loss(
            lambda shown: self.loss(network, shown, 1.0), self.config, crops, self.prior(network).device
        )

    def draw(self, network: ResidualUNet, crops: Sequence[Crop], path: Path) -> None:
        """Clean, noisy, denoised slices and samples."""
        picture(self.prior(network), crops, path)

    def measures(self, network: ResidualUNet, crops: Sequence[Crop]) -> dict[str, Any]:
        """Decibels of held-out crops: denoised, or for latents rebuilt by the autoencoder."""
        if self.autoencoder is not None:
            return {"reconstruction_psnr": reconstruction_psnr(self.autoencoder, crops)}
        return {"denoising_psnr": denoising_psnr(self.prior(network), crops)}

    def prior(self, network: Any, provenance: dict[str, Any] | None = None) -> DiffusionPrior:
        """As ``Stage``."""
        return DiffusionPrior(self.config, network, provenance or {}, self.autoencoder)


@dataclass(frozen=True)
class _Only:
    """What the families without a first stage share: random first weights, and nothing on the card but ``validate``."""

    config: Config
    folder: str = ""
    settings: str = "training"

    def begin(self, network: nn.Module, cases: Sequence[Case]) -> None:
        """Nothing: the weights are random, or as ``build`` leaves them."""

    def measures(self, network: nn.Module, crops: Sequence[Crop]) -> dict[str, Any]:
        """Nothing: ``validate`` has all."""
        return {}


@dataclass(frozen=True)
class Autoencoding(_Only):
    """An autoencoder: a family of its own, or that of a latent prior as ``autoencoding`` makes it."""

    section: str = "autoencoder"

    def build(self) -> Autoencoder:
        """As ``Stage``."""
        return build_autoencoder(self.config)

    def loss(self, network: nn.Module, shown: Shown, share: float) -> Tensor:
        """As ``Stage``."""
        return autoencoder_loss(network, self.config, shown, share)

    def validate(self, network: Autoencoder, crops: Sequence[Crop]) -> dict[str, float]:
        """The bound and its parts, which a plain autoencoder has not, and PSNR of what it rebuilds."""
        own, found = self.config.autoencoder, dict[str, float]()
        if own is not None and own.beta:
            found = validation_bound(lambda shown: rebuilt(network, self.config, shown), self.config, crops, network)
        return found | {"reconstruction_psnr": reconstruction_psnr(network, crops)}

    def draw(self, network: Autoencoder, crops: Sequence[Crop], path: Path) -> None:
        """Clean and rebuilt slices, and what single latents do."""
        reconstruction_picture(network, crops, path)

    def prior(self, network: Any, provenance: dict[str, Any] | None = None) -> AutoencoderPrior:
        """As ``Stage``."""
        return AutoencoderPrior(self.config, network, provenance or {})

    @torch.no_grad()
    def scaled(self, network: Autoencoder, samples: Samples) -> Autoencoder:
        """The network with latents of unit variance."""
        crops = [samples[number].crop.image[None].to(network.scale.device) for number in range(SCALED_BY)]
        network.scale.fill_(1.0)
        network.scale.fill_(1 / torch.cat([network.encode(crop) for crop in crops]).std())
        return network


@dataclass(frozen=True)
class Adversary(_Only):
    """A generator and a discriminator, as one network that loses what both lose."""

    section: str = "gan"

    def build(self) -> Adversarial:
        """As ``Stage``."""
        return build_adversarial(self.config)

    def loss(self, network: nn.Module, shown: Shown, share: float) -> Tensor:
        """As ``Stage``."""
        return adversarial_loss(network, self.config, shown)

    def validate(self, network: Adversarial, crops: Sequence[Crop]) -> dict[str, float]:
        """What the discriminator makes of scans and samples, and how the samples vary."""
        return validation_game(self.prior(network), crops)

    def draw(self, network: Adversarial, crops: Sequence[Crop], path: Path) -> None:
        """Held-out crops and samples."""
        samples_picture(self.prior(network), crops, path)

    def prior(self, network: Any, provenance: dict[str, Any] | None = None) -> GanPrior:
        """As ``Stage``."""
        return GanPrior(self.config, network, provenance or {})


@dataclass(frozen=True)
class Translation(_Only):
    """Two translators and two discriminators, as one network that loses what all lose."""

    section: str = "cyclegan"

    def build(self) -> CycleGan:
        """As ``Stage``."""
        return build_cyclegan(self.config)

    def loss(self, network: nn.Module, shown: Shown, share: float) -> Tensor:
        """As ``Stage``."""
        return cyclegan_loss(network, self.config, shown)

    def validate(self, network: CycleGan, crops: Sequence[Crop]) -> dict[str, float]:
        """How far an image comes back, how far it is moved, and what the discriminators make of it."""
        return validation_cycle(self.prior(network), crops)

    def draw(self, network: CycleGan, crops: Sequence[Crop], path: Path) -> None:
        """Of pairs: an image, translated, and back; for both domains."""
        cycle_picture(self.prior(network), crops, path)

    def prior(self, network: Any, provenance: dict[str, Any] | None = None) -> CycleGanPrior:
        """As ``Stage``."""
        return CycleGanPrior(self.config, network, provenance or {})


def autoencoding(config: Config) -> Autoencoding:
    """The first stage of latent diffusion: its own steps, batch and rate, what it shares as in ``config.training``."""
    own = config.autoencoder
    assert own is not None
    settings = {"steps": own.steps, "batch": own.batch, "learning_rate": own.learning_rate}
    fixed = {"optimizer": "adamw", "start": "", "recompute": False, "accumulate": 1}
    fixed |= {"objective": "simple", "times": TimesConfig()}
    training = config.training.model_copy(update=settings | fixed)
    return Autoencoding(config.model_copy(update={"training": training}), "autoencoder", "autoencoder")


def only_stage(config: Config) -> Stage:
    """That of a family without a first one."""
    kinds: dict[str, Callable[[Config], Stage]] = {
        "diffusion": Diffusion,
        "autoencoder": Autoencoding,
        "gan": Adversary,
        "cyclegan": Translation,
    }
    return kinds[config.family](config)


def with_settings(stage: Stage, section: str, **changes: object) -> Stage:
    """The same stage with other settings in a section of its config."""
    changed = getattr(stage.config, section).model_copy(update=changes)
    return replace(stage, config=stage.config.model_copy(update={section: changed}))  # type: ignore[type-var]
