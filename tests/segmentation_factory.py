"""A segmentation training set of phantoms: two touching parts of a body, brighter the one than the other."""

import json
from pathlib import Path

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from prior_factory import PROVENANCE, tiny_config

from medfusion.prior import DiffusionPrior, Prior, build_network

SHAPE, SPACING = (24, 26, 22), 2.0
BRIGHTNESS = (-1.0, 0.2, 0.8)  # of background and the two parts, in the units of priors
UNIT, OFFSET = 200.0, 200.0  # of a scan: what 1 and 0 in those units are
NAMES = {"background": 0, "front": 1, "back": 2}


def label_map(seed: int) -> NDArray[np.uint8]:
    """An ellipsoid of random size, turned a little, cut into a front and a back part."""
    rng = np.random.default_rng(seed)
    x, y, z = np.moveaxis(
        np.moveaxis(np.indices(SHAPE), 0, -1) - (np.array(SHAPE) - 1) / 2 - rng.normal(0, 0.7, 3), -1, 0
    )
    a, b, c = rng.uniform(5, 8, 3)
    turn = rng.normal(0, 0.3)
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    body = (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 < 1
    return np.where(body, np.where(y > rng.normal(0, 1), 1, 2), 0).astype(np.uint8)


def image_of(labels: NDArray[np.uint8], seed: int, noise: float = 0.1) -> NDArray[np.float32]:
    """A scan that shows a map."""
    painted = np.array(BRIGHTNESS)[labels] + noise * np.random.default_rng(seed).normal(size=labels.shape)
    return (UNIT * painted + OFFSET).astype(np.float32)


def write_pair(image: Path, labels: Path, seed: int, affine: NDArray[np.float64] | None = None) -> None:
    """Scan and label map number ``seed``."""
    affine = np.diag([SPACING] * 3 + [1.0]) if affine is None else affine
    map_ = label_map(seed)
    for path, array in ((image, image_of(map_, seed)), (labels, map_)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_set(folder: Path, number: int = 10, first: int = 0, *, unlabelled: int = 0) -> Path:
    """An nnU-Net raw dataset."""
    for seed in range(first, first + number + unlabelled):
        labels = folder / "labelsTr" / f"case{seed:02d}.nii.gz"
        write_pair(folder / "imagesTr" / f"case{seed:02d}_0000.nii.gz", labels, seed)
        if seed >= first + number:
            labels.unlink()
    about = {"channel_names": {"0": "MRI"}, "labels": NAMES, "numTraining": number, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about | {"licence": "CC0"}))
    return folder


def painting_prior() -> Prior:
    """The exact prior of scans that are BRIGHTNESS of their labels and nothing else: its network answers that as x_0.

    Without a label map it answers 0. Of the network only the way from the shown labels to the answer is left.
    """
    config = tiny_config(
        process={"prediction": "x0"},
        network={"located": False, "labels": 3, "channels": (8, 16)},
        data={"labels": "*_seg.nii.gz"},
    )
    network = build_network(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(("head", "grow", "tail")) or ".leave." in name:
                parameter.zero_()
        for place in range(8):  # of a voxel in the fold
            for value, brightness in enumerate(BRIGHTNESS):
                network.head.weight[place, 8 + 8 * value + place, 1, 1, 1] = brightness
            network.tail.weight[place, place, 1, 1, 1] = 1
    return DiffusionPrior(config, network.eval().requires_grad_(False), PROVENANCE)
