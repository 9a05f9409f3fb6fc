"""Configurations: pydantic models that refuse what they do not know, read from YAML with ``--set a.b=c`` on top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from medfusion.errors import MedfusionError


class Strict(BaseModel):
    """A frozen model that rejects unknown fields, so that a misspelt setting is an error and not a silence."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ProcessConfig(Strict):
    """The forward process x_t = alpha(t) x_0 + sigma(t) eps and what the network predicts of it."""

    family: Literal["vp", "sub-vp", "ve"] = "vp"
    schedule: Literal["linear", "scaled_linear", "sigmoid", "cosine"] = "cosine"  # of vp and sub-vp
    sigma_min: float = Field(0.01, gt=0)  # of ve, as sigma_max, in units of the images, which go from -1 to +1
    sigma_max: float = Field(50.0, gt=0)
    steps: int = Field(1000, ge=2)
    prediction: Literal["epsilon", "x0", "v", "score", "edm"] = "v"
    learned_variance: bool = False  # of the reverse steps; trained by the objective "hybrid"
    sigma_data: float = Field(0.7, gt=0)  # standard deviation of the images, used by "edm"

    @model_validator(mode="after")
    def _sigmas_grow(self) -> ProcessConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        return self


class NetworkConfig(Strict):
    """The norm-free residual U-Net on 2x2x2-folded voxels (``medfusion.networks.ResidualUNet``)."""

    channels: tuple[PositiveInt, ...] = Field((48, 96, 128, 160), min_length=1)
    blocks: tuple[PositiveInt, ...] = Field((2, 2, 1, 1), min_length=1)

    @model_validator(mode="after")
    def _one_block_count_a_level(self) -> NetworkConfig:
        if len(self.channels) != len(self.blocks):
            raise ValueError(f"channels has {len(self.channels)} levels, blocks has {len(self.blocks)}")
        return self


class PreprocessingConfig(Strict):
    """What a scan goes through before the network; stored in the prior, so training and use cannot differ."""

    modality: Literal["MR", "CT"] = "MR"
    spacing: float = Field(2.0, gt=0)  # isotropic, in millimetres, axes RAS
    percentile: float = Field(99.0, gt=50, le=100)  # of the foreground; it is mapped to +1, the background to -1


class DataConfig(Strict):
    """Which scans of the data folder are used and how crops are drawn from them."""

    images: str = "*"  # file-name pattern of the NIfTI files; DICOM series are always taken
    masks: str = ""  # same names with this ending hold brain masks (>0): adds the skull-stripped twin of each scan
    stripped_share: float = Field(0.3, ge=0, le=1)  # of the crops, when masks are given
    validation: int = Field(8, ge=1)  # scans held out, chosen by the seed
    crop: int = Field(64, ge=16, multiple_of=16)  # edge of a training cube in voxels


class TrainingConfig(Strict):
    """The optimisation."""

    # all but "hybrid" are weights of the squared error; the times are drawn the same way for each
    objective: Literal["simple", "score_matching", "likelihood", "min_snr", "edm", "hybrid"] = "simple"
    steps: int = Field(3000, ge=1)
    batch: int = Field(2, ge=1)
    learning_rate: float = Field(6e-4, gt=0)
    warmup: int = Field(100, ge=1)
    ema_half_life: int = Field(1000, ge=1)  # in images
    checkpoint_every: int = Field(200, ge=1)  # steps
    seed: int = 0


class Config(Strict):
    """Everything that ``medfusion train`` needs beside the data folder."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    process: ProcessConfig = ProcessConfig()
    network: NetworkConfig = NetworkConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    licence: str = ""  # of the weights, with the attribution that the data demand
    notes: str = ""  # printed in the model card: intended use and limits

    @model_validator(mode="after")
    def _hybrid_learns_the_variance(self) -> Config:
        if self.process.learned_variance != (self.training.objective == "hybrid"):
            raise ValueError("process.learned_variance and the objective hybrid go together")
        return self


def _parse(value: str) -> Any:
    """A YAML scalar or list; nothing, and what YAML cannot read, such as the pattern *_T1.nii.gz, is a string."""
    try:
        return yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        return value


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as ``training.steps=50``.

    Raises
    ------
    MedfusionError : the file cannot be read, an override is not ``a.b=value``, or a field is unknown or out of range.
    """
    try:
        tree: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise MedfusionError(
            f"{path}: cannot be read ({error.strerror})", fix="name a YAML file, see configs/"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MedfusionError(f"{path}: not valid YAML", problem=str(error).replace("\n", " ")) from error
    if not isinstance(tree, dict):
        raise MedfusionError(f"{path}: a config is a mapping of fields, see configs/")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise MedfusionError(f"--set {override}: not of the form a.b=value", fix="e.g. --set training.steps=500")
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise MedfusionError(f"--set {override}: {parent} is a value, not a section")
        node[leaf] = _parse(value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        rows = {".".join(map(str, e["loc"])) or "config": f"{e['msg']} (got {e['input']!r})" for e in error.errors()}
        raise MedfusionError(f"{path}: {len(rows)} setting(s) cannot be used", **rows) from error
