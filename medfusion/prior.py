"""Prior: network, process, preprocessing and provenance in one ``.safetensors`` file."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from medfusion.networks import ResidualUNet

FORMAT = "medfusion-prior-1"


def build_network(config: Config) -> ResidualUNet:
    """The network that a config describes, freshly initialised."""
    return ResidualUNet(config.network.channels, config.network.blocks, 2 if config.process.learned_variance else 1)


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
    """

    config: Config
    network: ResidualUNet
    provenance: dict[str, Any]

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
        return self

    def denoiser(self, context: Tensor | None = None, *, margin: int = 0) -> Denoiser:
        """E[x_0 | x_t] for batches (b, 1, d, h, w) of any size, padded inside to what the network needs.

        ``context`` (b, 4, d/2, h/2, w/2) as in ``medfusion.data.crops.context_channels``; None means unknown.
        ``margin`` adds that many replicated voxels on every side first; it goes with an unknown context only.
        """

        def network(x: Tensor, log_noise_ratio: Tensor) -> Tensor:
            multiple, shape = self.network.multiple, x.shape[2:]
            x = F.pad(x, [margin] * 6, mode="replicate") if margin else x
            padding = [-n % multiple for n in x.shape[2:]]
            x = F.pad(x, _far_side(padding), mode="replicate") if any(padding) else x
            given = context
            if given is not None:
                grown = [n // 2 - m for n, m in zip(x.shape[2:], given.shape[2:], strict=True)]
                given = (
                    F.pad(given.to(x.device), _far_side(grown), mode="replicate") if any(grown) else given.to(x.device)
                )
            with torch.autocast(x.device.type, torch.bfloat16, enabled=fast_bfloat16(x.device)):
                output = self.network(x, log_noise_ratio.to(x.device), given)
            d, h, w = (slice(margin, margin + n) for n in shape)
            return output[..., d, h, w]

        return build_denoiser(self.config, network)

    def save(self, path: Path) -> None:
        """Write weights in half precision and everything else as JSON in the file's metadata."""
        from safetensors.torch import save

        weights = {
            name: tensor.detach().cpu().half().contiguous() for name, tensor in self.network.state_dict().items()
        }
        metadata = {
            "format": FORMAT,
            "config": self.config.model_dump_json(),
            "provenance": json.dumps(self.provenance, sort_keys=True),
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
        network = build_network(config)
        try:
            network.load_state_dict({key: value.float() for key, value in load_file(path).items()})
        except (SafetensorError, RuntimeError) as error:
            raise MedfusionError(
                f"{path}: the weights do not fit the config beside them", problem=str(error)[:200]
            ) from error
        network.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return cls(config, network, provenance)


def _far_side(padding: Sequence[int]) -> list[int]:
    return [value for p in reversed(padding) for value in (0, p)]


def fast_bfloat16(device: torch.device) -> bool:
    """Whether half-width arithmetic is native there; elsewhere it is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


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
