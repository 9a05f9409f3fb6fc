"""Prior: trained networks, preprocessing and provenance in one ``.safetensors`` file, whatever the family."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from medfusion.config import Config
from medfusion.diffusion import Denoiser, Process, noise_like
from medfusion.errors import MedfusionError
from medfusion.reference import Reference

FORMAT = "medfusion-prior-1"
REFERENCE = "reference.{}."  # begins the names of the arrays of the healthy reference of that number


@dataclass(frozen=True, eq=False)
class Prior(ABC):
    """A trained model of one family; ``load`` returns its subclass, which says what it can do.

    Attributes
    ----------
    config : family, networks, preprocessing and training settings.
    network : in evaluation mode.
    provenance : what it was trained on and when; printed by ``medfusion priors`` and written in ``run.json``.
    references : what methods of detection leave on healthy scans, at most one of a method and kind of scan.
    """

    config: Config
    network: nn.Module
    provenance: dict[str, Any]
    references: tuple[Reference, ...] = field(default=(), kw_only=True)

    FAMILIES: ClassVar[dict[str, type[Prior]]] = {}  # by Config.family

    def __init_subclass__(cls, *, family: str) -> None:
        Prior.FAMILIES[family] = cls

    @classmethod
    @abstractmethod
    def untrained(cls, config: Config, provenance: dict[str, Any]) -> Prior:
        """With freshly initialised networks."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks, by how the names of their weights begin in the file."""
        return {"": self.network}

    @property
    @abstractmethod
    def kind(self) -> str:
        """The family in words."""

    @property
    def name(self) -> str:
        """Name of the prior, as in ``--prior``."""
        return self.config.name

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def to(self, device: str | torch.device) -> Prior:
        """Move the weights; returns self."""
        for module in self.modules.values():
            module.to(device)
        return self

    @property
    def process(self) -> Process:
        """The forward process it was trained with; there is no second place to state it.

        Raises
        ------
        MedfusionError : the family has none; so do all methods below that a family does not define.
        """
        raise self._lacks("process of noising")

    def latents(self, image: Tensor) -> Tensor:
        """Images (b, 1, d, h, w), or what their autoencoder makes of them: what a denoiser works on."""
        raise self._lacks("latents")

    def images(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Images (b, 1, *shape), the inverse of ``latents``."""
        raise self._lacks("latents")

    def denoiser(
        self,
        context: Tensor | None = None,
        labels: Tensor | None = None,
        classes: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Denoiser:
        """E[x_0 | x_t]."""
        raise self._lacks("denoiser")

    def sample(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Images (b, 1, n, n, n) of the size of the training's crops, one for each generator, which fixes it."""
        raise self._lacks("way to sample")

    def encode(self, image: Tensor) -> Tensor:
        """The code of images (b, 1, d, h, w)."""
        raise self._lacks("encoder")

    def decode(self, code: Tensor, shape: Sequence[int]) -> Tensor:
        """Images (b, 1, *shape) of codes."""
        raise self._lacks("decoder")

    def reconstruct(self, image: Tensor) -> Tensor:
        """Images (b, 1, d, h, w) as their codes tell them."""
        return self.decode(self.encode(image), image.shape[2:])

    def translate(self, image: Tensor, other: Prior | str) -> Tensor:
        """Images as the scanner of the other prior would show them: encoded by this one, decoded by the other.

        Raises
        ------
        MedfusionError : ``other`` is the name of a domain, and this family has none.
        """
        if isinstance(other, str):
            raise MedfusionError(f"{self.name}: is {self.kind}, which has no domain {other}", fix="name another prior")
        return other.decode(self.encode(image), image.shape[2:])

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """What samples are made of: normal values (b, *config.noise_shape), one generator an image."""
        return noise_like(torch.empty(len(generators), *self.config.noise_shape, device=self.device), generators)

    def _lacks(self, what: str) -> MedfusionError:
        return MedfusionError(f"{self.name}: is {self.kind}, which has no {what}", fix="use a prior of another family")

    def save(self, path: Path) -> None:
        """Write weights in half precision, healthy references, and all else as JSON in the file's metadata."""
        from safetensors.torch import save

        weights = {
            begin + name: tensor
            for begin, module in self.modules.items()
            for name, tensor in module.state_dict().items()
        }
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
    def load(cls, name_or_path: str | Path, device: str | torch.device = "cpu") -> Self:
        """A shipped prior by name, or any by path.

        Raises
        ------
        MedfusionError : unknown name, a file that is not a medfusion prior (pickles are refused unread), or one of
            another family than that of the class that was asked.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = prior_path(name_or_path)
        config, provenance = read_metadata(path)
        prior = cls.FAMILIES[config.family].untrained(config, provenance)
        if not isinstance(prior, cls):
            raise MedfusionError(f"{path}: is {prior.kind}, and a prior of another family is needed")
        try:
            tensors = load_file(path)
            references = tuple(_references(path, tensors))
            weights = {name: tensor.float() for name, tensor in tensors.items()}
            for begin, module in sorted(prior.modules.items(), reverse=True):  # the longest beginning first
                own = {name: weights.pop(name) for name in list(weights) if name.startswith(begin)}
                module.load_state_dict({name.removeprefix(begin): tensor for name, tensor in own.items()})
        except (SafetensorError, RuntimeError) as error:
            raise MedfusionError(
                f"{path}: the weights do not fit the config beside them", problem=str(error)[:200]
            ) from error
        for module in prior.modules.values():
            module.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return replace(prior, references=references)


def _references(path: Path, tensors: dict[str, Tensor]) -> Iterator[Reference]:
    """The healthy references in a file, whose tensors are taken out of ``tensors``."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        facts = json.loads((file.metadata() or {}).get("references", "[]"))
    for number, known in enumerate(facts):
        begin = REFERENCE.format(number)
        names = [name for name in tensors if name.startswith(begin)]
        yield Reference.of({name.removeprefix(begin): tensors.pop(name).numpy() for name in names}, known)


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
