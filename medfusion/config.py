"""Configurations: pydantic models that refuse what they do not know, read from YAML with ``--set a.b=c`` on top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from medfusion.errors import MedfusionError

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A frozen model that rejects unknown fields, so that a misspelt setting is an error and not a silence."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ProcessConfig(Strict):
    """The forward process x_t = alpha(t) x_0 + sigma(t) eps and what the network predicts of it."""

    family: Literal["vp", "sub-vp", "ve"] = "vp"
    schedule: Literal["linear", "scaled_linear", "sigmoid", "cosine"] = "cosine"  # of vp and sub-vp
    sigma_min: float = Field(0.01, gt=0)  # of ve, as sigma_max, in units of the images, which go from -1 to +1
    sigma_max: float = Field(50.0, gt=0)
    steps: int = Field(1000, ge=2)  # noise levels of the discrete chain, whatever the length of the training
    prediction: Literal["epsilon", "x0", "v", "score", "edm"] = "v"
    learned_variance: bool = False  # of the reverse steps; trained by the objective "hybrid"
    sigma_data: float = Field(0.7, gt=0)  # standard deviation of the images, used by "edm"

    @model_validator(mode="after")
    def _sigmas_grow(self) -> ProcessConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        return self


class NetworkConfig(Strict):
    """The norm-free residual U-Net on 2x2x2-folded voxels (``medfusion.networks.ResidualUNet``) and what it sees."""

    channels: tuple[PositiveInt, ...] = Field((48, 96, 128, 160), min_length=1)
    blocks: tuple[PositiveInt, ...] = Field((2, 2, 1, 1), min_length=1)
    stem: int = Field(0, ge=0)  # channels of the layers on voxels, before folding and after unfolding; 0: none
    located: bool = True  # shown where in the head a voxel lies, and the mean head there (to 128 mm); off elsewhere
    labels: int = Field(0, ge=0)  # values of the label map it is shown, 0 (background) included; 0: no label map
    # names of the classes it is told, as in the column of data.classes
    classes: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...] = ()

    @model_validator(mode="after")
    def _one_block_count_a_level(self) -> NetworkConfig:
        if len(self.channels) != len(self.blocks):
            raise ValueError(f"channels has {len(self.channels)} levels, blocks has {len(self.blocks)}")
        return self


class AutoencoderConfig(Strict):
    """MONAI's AutoencoderKL: its own family, or trained first for a diffusion on its latents (Rombach et al. 2022).

    It maximises log p(x | z) - beta KL(q(z | x) || N(0, 1)), in nats, of a Gaussian p whose spread is learnt.
    """

    # of each level; all but the last halve the resolution
    channels: tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...] = Field((32, 64, 64), min_length=2)
    blocks: PositiveInt = 1  # of each level
    latents: PositiveInt = 4  # channels
    beta: float = Field(1.0, ge=0)  # 0: no noise on the latents either, a plain autoencoder; 1: a VAE
    beta_warmup: float = Field(0.2, ge=0, le=1)  # share of the steps on which beta rises, against posterior collapse
    # of the first stage of latent diffusion; as a family of its own it is trained by the section training
    steps: int = Field(3000, ge=1)
    batch: int = Field(2, ge=1)  # crops of a step, over all devices
    learning_rate: float = Field(1e-4, gt=0)  # of AdamW

    @property
    def factor(self) -> int:
        """Edge of an image over that of its latents: each level but the last halves the resolution."""
        return int(2 ** (len(self.channels) - 1))


class GanConfig(Strict):
    """A generator and a discriminator of MONAI (``medfusion.networks.Adversarial``), and their game."""

    # of each level of the discriminator, which halves the edge; the generator has them the other way round
    channels: tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...] = Field((32, 64, 128), min_length=1)
    latents: PositiveInt = 64
    game: Literal["nonsaturating", "wasserstein"] = "nonsaturating"
    penalty: float = Field(1.0, ge=0)  # weight of R1, or of the gradient penalty of the Wasserstein game: 10 there
    spectral_norm: bool = False  # of the discriminator's layers (Miyato et al. 2018)


class DomainConfig(Strict):
    """One of two folders of scans, as ``data`` describes its only one."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    images: str = "*"
    masks: str = ""  # brain masks (>0): the scans are used skull-stripped, and not as they are


class CycleganConfig(Strict):
    """Translators and discriminators of MONAI (``medfusion.networks.CycleGan``), and what they are told apart by."""

    domains: tuple[DomainConfig, DomainConfig]  # in the order of --data
    # of each level of a translator
    channels: tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...] = Field((16, 32, 64), min_length=2)
    layers: PositiveInt = 2  # of a discriminator, each of which halves the edge
    cycle: float = Field(10.0, ge=0)  # weight of the error there and back (Zhu et al. 2017, section 4)
    identity: float = Field(5.0, ge=0)  # of the error on an image that is in the target domain (section 5.2)
    penalty: float = Field(1.0, ge=0)  # of R1

    @model_validator(mode="after")
    def _domains_differ(self) -> CycleganConfig:
        if self.domains[0].name == self.domains[1].name:
            raise ValueError("two domains have two names")
        return self


class PreprocessingConfig(Strict):
    """What a scan goes through before the network; stored in the prior, so training and use cannot differ."""

    modality: Literal["MR", "CT"] = "MR"
    spacing: float = Field(2.0, gt=0)  # isotropic, in millimetres, axes RAS
    percentile: float = Field(99.0, gt=50, le=100)  # of the foreground; it is mapped to +1, the background to -1


class DataConfig(Strict):
    """Which scans of the data folder are used and how crops are drawn from them.

    ``masks`` and ``labels`` say where the file that belongs to a scan lies, relative to the scan, with a * for what the
    * in ``images`` stood for: images "*_T1.nii.gz" and labels "*_seg.nii.gz", or "*.nii.gz" and "../labels/*.nii.gz".
    """

    images: str = "*"  # file-name pattern of the NIfTI files; DICOM series are always taken
    masks: str = ""  # brain masks (>0): each scan is used skull-stripped too
    labels: str = ""  # label maps: shown to the network where network.labels is set, and painted (below)
    unlabelled: bool = False  # scans without a label map are learnt from too; else each is an error
    labelled_share: float = Field(0.5, gt=0, lt=1)  # of the crops, where only some of the scans have a label map
    classes: str = ""  # a CSV file in the data folder with the columns case and class
    stripped_share: float = Field(0.3, ge=0, le=1)  # of the crops, when masks are given
    located_share: float = Field(0.7, ge=0, le=1)  # of the crops that know their position, if the network is located
    withheld_share: float = Field(0.15, ge=0, le=1)  # of the crops whose labels and class are not shown: for guidance
    zoomed_share: float = Field(0.25, ge=0, le=1)  # of the crops without position: enlarged up to twice
    remapped_share: float = Field(0.0, ge=0, le=1)  # of the crops that get another contrast by a random curve
    painted_share: float = Field(0.0, ge=0, le=1)  # of the crops that get another contrast region by region
    varied: bool = True  # the other crops are a little brighter or darker than the scan, as on another scanner
    flips: Literal["", "x", "xyz"] = "x"  # x: left and right alone; none where labels tell left from right
    validation: int = Field(8, ge=1)  # scans held out, chosen by the seed
    crop: int = Field(64, ge=16, multiple_of=16)  # edge of a training cube in voxels

    @model_validator(mode="after")
    def _shares_of_contrasts(self) -> DataConfig:
        if self.painted_share and not self.labels:
            raise ValueError("painted_share needs labels")
        if self.unlabelled and not self.labels:
            raise ValueError("unlabelled scans join labelled ones: it needs labels")
        if self.painted_share + self.remapped_share > 1:
            raise ValueError("painted_share and remapped_share are together above 1")
        return self


class TimesConfig(Strict):
    """Noise levels of the training: some about the noise of real scans, the others anywhere in the process."""

    lognormal_share: float = Field(0.6, ge=0, le=1)  # of the crops; the others have t uniform
    median: float = Field(0.25, gt=0)  # standard deviation of the noise; scans go from -1 to +1, so this is 12 %
    spread: float = Field(1.0, gt=0)  # standard deviation of the log of the noise ratio


class TrainingConfig(Strict):
    """The optimisation."""

    # all but "hybrid" are weights of the squared error; the times are drawn the same way for each
    objective: Literal["simple", "score_matching", "likelihood", "min_snr", "edm", "hybrid"] = "simple"
    times: TimesConfig = TimesConfig()
    start: str = ""  # a prior, shipped or a file, whose weights are the first ones
    steps: int = Field(3000, ge=1)
    batch: int = Field(2, ge=1)  # crops of a step, over all devices
    accumulate: int = Field(1, ge=1)  # parts in which a device does its share of the batch: less memory, same result
    optimizer: Literal["adamw", "muon", "adversarial"] = "adamw"  # adversarial: AdamW whose first moment forgets all
    learning_rate: float = Field(6e-4, gt=0)
    warmup: int = Field(100, ge=1)  # steps on which the rate rises; a cosine to a thousandth follows
    ema_half_life: int = Field(1000, ge=1)  # of the averaged weights, which are the prior's; in crops
    recompute: bool = False  # activations in the backward pass: large crops in half the memory for a third more time
    compile: bool = False  # see docs/training.md for where it pays
    checkpoint_every: int = Field(200, ge=1)  # steps
    validate_every: int = Field(600, ge=1)  # steps: losses on held-out scans, a picture
    seed: int = Field(0, ge=0)


class SegmenterConfig(Strict):
    """The segmenter by which synthetic training data are judged (``medfusion.tasks.segmenter``)."""

    channels: tuple[PositiveInt, ...] = Field((16, 32, 64, 128), min_length=2)  # of MONAI's U-Net
    crop: int = Field(64, ge=16, multiple_of=8)  # edge of what it is shown, in voxels; smaller volumes come whole
    steps: int = Field(600, ge=1)
    batch: int = Field(2, ge=1)
    learning_rate: float = Field(2e-3, gt=0)  # of AdamW, at the peak
    flips: bool = False  # left and right in the augmentation: not where labels tell them apart


class Config(Strict):
    """Everything that ``medfusion train`` needs beside the data folder."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    family: Literal["diffusion", "autoencoder", "gan", "cyclegan"] = "diffusion"
    process: ProcessConfig = ProcessConfig()  # of a diffusion, as network
    network: NetworkConfig = NetworkConfig()
    # its own family, or for latent diffusion of large volumes; without it a diffusion works on the voxels themselves
    autoencoder: AutoencoderConfig | None = None
    gan: GanConfig | None = None
    cyclegan: CycleganConfig | None = None
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    label_names: tuple[str, ...] = ()  # of the values that network.labels counts, background first
    licence: str = ""  # of the weights, with the attribution that the data demand
    notes: str = ""  # printed in the model card: intended use and limits

    @model_validator(mode="after")
    def _hybrid_learns_the_variance(self) -> Config:
        if self.process.learned_variance != (self.training.objective == "hybrid"):
            raise ValueError("process.learned_variance and the objective hybrid go together")
        return self

    @model_validator(mode="after")
    def _every_label_has_a_name(self) -> Config:
        if self.label_names and len(self.label_names) != self.network.labels:
            raise ValueError(f"label_names has {len(self.label_names)} names for {self.network.labels} labels")
        return self

    @model_validator(mode="after")
    def _conditions_have_data(self) -> Config:
        if self.network.labels and not self.data.labels:
            raise ValueError("network.labels needs data.labels, where the label maps are")
        if bool(self.network.classes) != bool(self.data.classes):
            raise ValueError("network.classes, their names, and data.classes, the table, go together")
        return self

    @model_validator(mode="after")
    def _the_family_is_described(self) -> Config:
        if self.family != "diffusion" and getattr(self, self.family) is None:
            raise ValueError(f"the family {self.family} needs the section {self.family}")
        sections = {"autoencoder": ("autoencoder", "diffusion"), "gan": ("gan",), "cyclegan": ("cyclegan",)}
        for section, families in sections.items():
            if getattr(self, section) is not None and self.family not in families:
                raise ValueError(f"the family {self.family} has no section {section}")
        if self.training.start and self.family != "diffusion":
            raise ValueError(f"the family {self.family} starts from random weights: no training.start")
        return self

    @model_validator(mode="after")
    def _crops_can_be_halved(self) -> Config:
        if self.data.crop % self.multiple:
            raise ValueError(
                f"data.crop is no multiple of {self.multiple}, a factor of 2 for each level that halves it"
            )
        if self.cyclegan is not None and self.data.crop < 3 * 2**self.cyclegan.layers:
            raise ValueError(f"cyclegan.layers halves crops of {self.data.crop} voxels too often: 3 have to be left")
        return self

    @property
    def latent(self) -> bool:
        """Whether it is a diffusion on the latents of an autoencoder, which is trained first."""
        return self.family == "diffusion" and self.autoencoder is not None

    @property
    def multiple(self) -> int:
        """What edges of crops are multiples of."""
        if self.gan is not None:
            return int(2 ** len(self.gan.channels))
        if self.cyclegan is not None:
            return int(2 ** max(len(self.cyclegan.channels) - 1, self.cyclegan.layers))
        factor = 1 if self.autoencoder is None else self.autoencoder.factor
        return factor * (2 ** len(self.network.channels) if self.family == "diffusion" else 1)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise that belongs to a crop, channels first: of the crop itself, or of its latents; (0,) for none."""
        if self.gan is not None:
            return (self.gan.latents,)
        if self.cyclegan is not None:
            return (0,)
        if self.autoencoder is None:
            return 1, *[self.data.crop] * 3
        return self.autoencoder.latents, *[self.data.crop // self.autoencoder.factor] * 3


def _parse(value: str) -> Any:
    """A YAML scalar or list; nothing, and what YAML cannot read, such as the pattern *_T1.nii.gz, is a string."""
    try:
        return yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        return value


def _read_tree(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The sections of a file over those of its ``base``; ``above`` are the files that build on it."""
    if path in above:
        raise MedfusionError(f"{path}: builds on itself, by base", files=" -> ".join(p.name for p in (*above, path)))
    tree = read_yaml(path)
    if "base" not in tree:
        return tree
    base = _read_tree(path.parent / str(tree.pop("base")), (*above, path))
    about_the_data = {"licence", "notes"}  # of the base, which the scans of another config need not be
    return _over({name: value for name, value in base.items() if name not in about_the_data}, tree)


def _over(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the settings of ``tree`` put over it, section by section."""
    merged = dict(base)
    for name, value in tree.items():
        below = base.get(name)
        merged[name] = _over(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as ``training.steps=50``.

    A file with the line ``base: other.yaml``, a path from where it lies, says only where it differs from the other;
    licence and notes are not taken over.

    Raises
    ------
    MedfusionError : the file cannot be read, an override is not ``a.b=value``, or a field is unknown or out of range.
    """
    tree = _read_tree(path)
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
    return validated(Config, tree, path)


def validated(model: type[Model], tree: dict[str, Any], path: Path) -> Model:
    """The model that a mapping read from ``path`` describes.

    Raises
    ------
    MedfusionError : a field is unknown or out of range; all are listed.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        rows = {".".join(map(str, e["loc"])) or "config": f"{e['msg']} (got {e['input']!r})" for e in error.errors()}
        raise MedfusionError(f"{path}: {len(rows)} setting(s) cannot be used", **rows) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises
    ------
    MedfusionError : the file cannot be read or is not a mapping.
    """
    try:
        tree: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise MedfusionError(
            f"{path}: cannot be read ({error.strerror})", fix="name a YAML file, see configs/ and docs/"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MedfusionError(f"{path}: not valid YAML", problem=str(error).replace("\n", " ")) from error
    if not isinstance(tree, dict):
        raise MedfusionError(
            f"{path}: is no mapping of fields", fix="lines of the form name: value, see configs/ and docs/"
        )
    return tree
