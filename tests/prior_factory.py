"""Tiny priors whose answers are known in closed form, and one phantom head on any grid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import nn

from medfusion.config import Config
from medfusion.prior import DiffusionPrior, Prior, build_network

CENTRE = np.array([3.0, -5.0, 7.0])  # world millimetres, RAS, of the phantom's centre
RADIUS = 36.0  # mm
PROVENANCE = {"data": "phantoms", "training_scans": 4, "validation_scans": 1, "steps": 1, "licence": ""}


def tiny_config(**sections: dict[str, Any]) -> Config:
    """The smallest network on crops of 16 voxels; ``training={"steps": 5}`` changes settings of a section."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "network": {"channels": (8, 16), "blocks": (1, 1)},
        "data": {"crop": 16, "validation": 1},
        "training": {"steps": 4, "warmup": 2, "checkpoint_every": 2, "learning_rate": 3e-3},
    }
    for name, changes in sections.items():
        tree[name] = tree.get(name, {}) | changes
    return Config.model_validate(tree)


def white_prior() -> DiffusionPrior:
    """The exact prior of white noise N(0, 1): its network answers v = 0, so E[x_0 | x_t] = alpha(t) x_t."""
    config = tiny_config()
    network = build_network(config)
    nn.init.zeros_(network.tail.bias)  # the tail's weight is zero from the start
    return DiffusionPrior(config, network.eval().requires_grad_(False), PROVENANCE)


def random_prior(seed: int = 0, config: Config | None = None) -> DiffusionPrior:
    """No weight is zero: the answer depends on neighbours, noise level and all that is told."""
    config = tiny_config() if config is None else config
    network, generator = build_network(config), torch.Generator().manual_seed(seed)
    for parameter in network.requires_grad_(False).parameters():
        gain = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(gain * torch.randn(parameter.shape, generator=generator))
    if network.classes is not None:
        network.classes.weight[0] = 0  # not told
    return DiffusionPrior(config, network.eval(), PROVENANCE)


def conditional_prior() -> DiffusionPrior:
    """A random prior that is told a label map of the values 0 to 2 and one of the classes a and b."""
    shown = {"located": False, "labels": 3, "classes": ("a", "b")}
    return random_prior(config=tiny_config(network=shown, data={"labels": "*_seg.nii.gz", "classes": "classes.csv"}))


def saved(prior: Prior, folder: Path) -> str:
    """Save and return what ``--prior`` takes."""
    path = folder / f"{prior.name}.safetensors"
    prior.save(path)
    return str(path)


def grid(
    shape: Sequence[int],
    spacing: Sequence[float] = (2.0, 2.0, 2.0),
    axes: str = "RAS",
    angles: Sequence[float] = (0.0, 0.0, 0.0),
) -> NDArray[np.float64]:
    """Voxel to world of a grid around the phantom; ``angles`` in degrees turn it away from the nearest ``axes``."""
    affine = np.eye(4)
    for column, (axis, sign) in enumerate(nibabel.orientations.axcodes2ornt(axes)):
        affine[:3, column] = sign * np.eye(3)[int(axis)] * spacing[column]
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def head(
    affine: NDArray[np.float64],
    shape: Sequence[int],
    *,
    noise: float = 0.0,
    seed: int = 0,
    lesion: tuple[Sequence[float], float, float] | None = None,
) -> NDArray[np.float32]:
    """A ball of uneven tissue (350 to 950) in air (0), without symmetry; the same in world space on every grid.

    ``lesion`` is a ball: its centre in world millimetres, its radius, and what it adds to the tissue.
    """
    world = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    x, y, z = np.moveaxis(world - CENTRE, -1, 0)
    tissue = 650 + 300 * np.sin(x / 12 + 1) * np.sin(y / 15 + 0.5) * np.cos(z / 10)
    image = np.where(np.sqrt(x**2 + y**2 + z**2) < RADIUS, tissue, 0.0)
    if lesion is not None:
        centre, radius, change = lesion
        image += np.where(np.linalg.norm(world - centre, axis=-1) < radius, change, 0.0)
    return (image + noise * np.random.default_rng(seed).normal(size=image.shape)).astype(np.float32)


def with_neck(bend: float) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
    """A head on a neck that leans by ``bend`` mm a mm, its affine, and where the head is."""
    affine = grid((52, 50, 46), (2.0, 2.0, 2.2), "LAS")
    affine[2, 3] -= 34 * 2.2
    shape = (52, 50, 80)
    ball = head(affine, shape)
    x, y, z = np.moveaxis(nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)) - CENTRE, -1, 0)
    neck = (ball == 0) & (z < 0) & (np.hypot(x - bend * np.maximum(-RADIUS - z, 0), y) < 24)
    array = np.where(neck, 900 + 100 * np.sin(z / 5 + y / 4), ball).astype(np.float32)
    return array, affine, np.sqrt(x**2 + y**2 + z**2) < RADIUS + 10


def write_head(path: Path, *, noise: float = 30.0, seed: int = 0, size: int = 40) -> Path:
    """A noisy head at 2 mm as a NIfTI file of int16."""
    affine = grid((size,) * 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = head(affine, (size,) * 3, noise=noise, seed=seed)
    nibabel.save(nibabel.Nifti1Image(array.round().astype(np.int16), affine), path)
    return path
