"""Prior: network, process, preprocessing and provenance in one ``.safetensors`` file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medfusion.config import Config
from medfusion.diffusion import VE, VP, Denoiser, Network, Process, SubVP
from medfusion.errors import MedfusionError
from medfusion.networks import Autoencoder, ResidualUNet, on_latents
from medfusion.reference import Reference

FORMAT = "medfusion-prior-1"
AUTOENCODER = "autoencoder."  # begins the names of its weights in the file
REFERENCE = "reference.{}."  # begins the names of the arrays of the healthy reference of that number


def build_network(config: Config) -> ResidualUNet:
    """The network that a config describes, freshly initialised."""
    shown = config.network
    return ResidualUNet(
        shown.channels,
        shown.blocks,
        2 if config.process.learned_variance else 1,
        stem=shown.stem,
        images=config.diffused[0],
        located=shown.located,
        labels=shown.labels,
        classes=len(shown.classes),
    )


def build_autoencoder(config: Config) -> Autoencoder | None:
    """The autoencoder that a config describes, freshly initialised, if it describes one."""
    shape = config.autoencoder
    return None if shape is None else Autoencoder(shape.channels, shape.blocks, shape.latents)


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
class Prior:
    """A trained diffusion prior.

    Attributes
    ----------
    config : process, network, preprocessing and training settings.
    network : ``ResidualUNet`` in evaluation mode.
    provenance : what it was trained on and when; printed by ``medfusion priors`` and written in ``run.json``.
    autoencoder : of a latent prior, whose network works on its latents; None: the network works on voxels.
    references : what methods of detection leave on healthy scans, at most one of a method and kind of scan.
    """

    config: Config
    network: ResidualUNet
    provenance: dict[str, Any]
    autoencoder: Autoencoder | None = None
    references: tuple[Reference, ...] = ()

    @property
    def name(self) -> str:
        """Name of the prior, as in ``--prior``."""
        return self.config.name

    @property
    def process(self) -> Process:
        """The forward process it was trained with; there is no second place to state it."""
        return build_process(self.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def to(self, device: str | torch.device) -> Prior:
        """Move the weights; returns self."""
        self.network.to(device)
        if self.autoencoder is not None:
            self.autoencoder.to(device)
        return self

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """What the denoiser works on, of images (b, 1, d, h, w): themselves, or their latents."""
        if self.autoencoder is None:
            return image
        padding = _far_side([-n % self.autoencoder.factor for n in image.shape[2:]])
        with half_width(image.device):
            return self.autoencoder.encode(_grown(image, padding)).float()

    @torch.no_grad()
    def decode(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Images (b, 1, *shape) of what the denoiser works on, the inverse of ``encode``."""
        if self.autoencoder is None:
            return x
        with half_width(x.device):
            image = self.autoencoder.decode(x).float()
        d, h, w = map(slice, shape)
        return image[..., d, h, w]

    def denoiser(
        self,
        context: Tensor | None = None,
        labels: Tensor | None = None,
        classes: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Denoiser:
        """E[x_0 | x_t] for batches (b, 1, d, h, w) of any size, padded inside to what the network needs.

        A latent prior denoises latents: x_0 is what ``encode`` gives, while all else lies on the image.
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
            padding = _far_side([-n % multiple for n in x.shape[2:]])
            x = _grown(x, padding)
            told = None if context is None else _grown_to(context.to(x.device), [n // 2 for n in x.shape[2:]])
            map_ = None if labels is None else _grown_to(labels[:, None].to(x.device), x.shape[2:])[:, 0]
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

    def save(self, path: Path) -> None:
        """Write weights in half precision, healthy references, and all else as JSON in the file's metadata."""
        from safetensors.torch import save

        weights = self.network.state_dict()
        if self.autoencoder is not None:
            weights |= {AUTOENCODER + name: tensor for name, tensor in self.autoencoder.state_dict().items()}
        weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in weights.items()}
        for number, reference in enumerate(self.references):
            arrays = reference.tensors().items()
            weights |= {REFERENCE.format(number) + name: torch.from_numpy(array.copy()) for name, array in arrays}
        metadata = {
            "format": FORMAT,
            "config": self.config.model_dump_json(),
            "provenance": json.dumps(self.provenance, sort_keys=True),
            "references": json.dumps([reference.facts() for reference in self.references]),
        }
        path.write_bytes(save(weights, metadata))  # save_file would make a file that only its owner can read

    @classmethod
    def load(cls, name_or_path: str | Path, device: str | torch.device = "cpu") -> Prior:
        """A shipped prior by name, or any by path.

        Raises
        ------
        MedfusionError : unknown name, or a file that is not a medfusion prior (pickles are refused unread).
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = prior_path(name_or_path)
        config, provenance = read_metadata(path)
        network, autoencoder = build_network(config), build_autoencoder(config)
        try:
            tensors = load_file(path)
            references = tuple(_references(path, tensors))
            weights = {name: tensor.float() for name, tensor in tensors.items()}
            if autoencoder is not None:
                inner = [name for name in weights if name.startswith(AUTOENCODER)]
                autoencoder.load_state_dict({name.removeprefix(AUTOENCODER): weights.pop(name) for name in inner})
            network.load_state_dict(weights)
        except (SafetensorError, RuntimeError) as error:
            raise MedfusionError(
                f"{path}: the weights do not fit the config beside them", problem=str(error)[:200]
            ) from error
        for module in (network, autoencoder):
            if module is not None:
                module.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return cls(config, network, provenance, autoencoder, references)


def _references(path: Path, tensors: dict[str, Tensor]) -> Iterator[Reference]:
    """The healthy references in a file, whose tensors are taken out of ``tensors``."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        facts = json.loads((file.metadata() or {}).get("references", "[]"))
    for number, known in enumerate(facts):
        begin = REFERENCE.format(number)
        names = [name for name in tensors if name.startswith(begin)]
        yield Reference.of({name.removeprefix(begin): tensors.pop(name).numpy() for name in names}, known)


def _far_side(padding: Sequence[int]) -> list[int]:
    return [value for p in reversed(padding) for value in (0, p)]


def _grown(x: Tensor, padding: Sequence[int]) -> Tensor:
    if not any(padding):
        return x
    real = x if x.is_floating_point() else x.float()  # integers cannot be replicated
    return F.pad(real, list(padding), mode="replicate").to(x.dtype)


def _grown_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Replicated on the far side up to ``shape``."""
    return _grown(x, _far_side([n - m for n, m in zip(shape, x.shape[2:], strict=True)]))


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


def fast_bfloat16(device: torch.device) -> bool:
    """Whether half-width arithmetic is native there; elsewhere it is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def half_width(device: torch.device) -> torch.autocast:
    """Around a network: bfloat16 where that is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


def shipped() -> dict[str, Path]:
    """Name to file of the priors in the package."""
    folder = Path(str(resources.files("medfusion") / "priors"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def prior_path(name_or_path: str | Path) -> Path:
    """The file behind a shipped name or a path."""
    if str(name_or_path) in shipped():
        return shipped()[str(name_or_path)]
    path = Path(name_or_path)
    if not path.is_file():
        raise MedfusionError(
            f"{name_or_path}: neither a shipped prior nor a file",
            shipped=", ".join(shipped()) or "none",
            fix="see `medfusion priors`, or give the prior.safetensors that `medfusion train` wrote",
        )
    return path


def read_metadata(path: Path) -> tuple[Config, dict[str, Any]]:
    """Config and provenance of a prior without reading its weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise MedfusionError(f"{path}: not a safetensors file", problem=str(error)) from error
    if metadata.get("format") != FORMAT:
        raise MedfusionError(f"{path}: not a medfusion prior", format=metadata.get("format", "none"), expected=FORMAT)
    try:
        return Config.model_validate_json(metadata["config"]), json.loads(metadata["provenance"])
    except (KeyError, ValueError) as error:
        raise MedfusionError(f"{path}: its metadata cannot be read", problem=str(error)[:200]) from error
