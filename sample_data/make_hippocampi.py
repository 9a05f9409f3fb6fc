"""Make the labelled sample set: python sample_data/make_hippocampi.py  (about three minutes on two cores)

Twelve hippocampi that nobody has: bent tubes drawn by a few numbers, with a head and a tail, and around each the
T1-weighted scan that the shipped prior `hippocampus` draws for such a label map. Everything follows from SEED.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from medfusion.data.crops import WHOLE_HEAD, context_channels
from medfusion.data.intensity import SEEN
from medfusion.diffusion import ddpm, noise_like, time_steps
from medfusion.io import write_nifti
from medfusion.prior import Prior
from medfusion.volume import Volume

SEED = 2026
NUMBER = 12
OUT = Path(__file__).parent / "hippocampi"
SHAPE, CENTRE = (36, 52, 36), (15.0, 27.0, 15.0)  # voxels of 1 mm, right x anterior x superior
LENGTH, LENGTH_SD = 39.0, 3.0  # mm, from tail to head
# From tail to head: where the middle of the cross-section lies (mm right and superior of the centre), and its half
# axes (mm): medians over the label maps that the prior was trained on.
ALONG = np.linspace(0, 1, 9)
RIGHT = (3.1, 0.9, -1.6, -2.7, -3.0, -1.7, 0.5, 2.6, 5.8)
UP = (9.8, 7.0, 3.8, 1.6, -0.1, -1.7, -2.9, -4.8, -6.7)
ACROSS = (3.8, 6.8, 6.7, 6.8, 6.7, 7.9, 9.1, 9.1, 3.9)
THICK = (1.9, 3.9, 3.7, 3.5, 3.7, 4.3, 5.0, 4.4, 1.6)
TILT = -12.0  # degrees, of the longer half axis against the horizontal
HEAD = (0.46, 0.04)  # where it begins along the tube: mean and standard deviation
BACKGROUND, HEAD_LABEL, BODY_LABEL = 0, 1, 2
UNIT = 400.0  # of the scans, arbitrary: what 1 in the prior's units is


def label_map(rng: np.random.Generator) -> NDArray[np.uint8]:
    """One bent tube."""
    length = rng.normal(LENGTH, LENGTH_SD)
    wander = [CubicSpline(ALONG, rng.normal(0, 0.6, len(ALONG))) for _ in range(2)]
    size, flat = np.exp(rng.normal(0, 0.05, 2))
    tilt = np.deg2rad(rng.normal(TILT, 6))
    x, y, z = (axis - centre for axis, centre in zip(np.indices(SHAPE).astype(float), CENTRE, strict=True))
    t = y / length + 0.5
    inside_t = np.clip(t, 0, 1)
    x = x - CubicSpline(ALONG, RIGHT)(inside_t) - wander[0](inside_t)
    z = z - CubicSpline(ALONG, UP)(inside_t) - wander[1](inside_t)
    u, v = np.cos(tilt) * x + np.sin(tilt) * z, np.cos(tilt) * z - np.sin(tilt) * x
    across, thick = (size * CubicSpline(ALONG, radii)(inside_t) for radii in (ACROSS, THICK))
    tube = ((u / across) ** 2 + (v / (thick * flat)) ** 2 < 1) & (t > 0) & (t < 1)
    return np.where(tube, np.where(t > rng.normal(*HEAD), HEAD_LABEL, BODY_LABEL), BACKGROUND).astype(np.uint8)


def scan_of(labels: NDArray[np.uint8], prior: Prior, seed: int) -> NDArray[np.float32]:
    """What the prior draws for a map, in arbitrary units."""
    generator = torch.Generator().manual_seed(seed)
    middle = (np.array(SHAPE) - 1) / 2  # about where the foreground of such a scan has its centre
    context = context_channels(SHAPE, (0, 0, 0), middle, prior.config.preprocessing.spacing, WHOLE_HEAD)[None]
    denoise = prior.denoiser(context, torch.from_numpy(labels.astype(np.int64))[None], guidance=1.5)
    noise = noise_like(torch.zeros(1, 1, *labels.shape), [generator])
    image = ddpm(denoise, noise, time_steps(prior.process, 40), generators=[generator])[0, 0].numpy()
    return (UNIT * (image - SEEN[0]).clip(0)).round().astype(np.float32)


def main() -> None:
    """Write an nnU-Net raw dataset."""
    prior, affine = Prior.load("hippocampus"), np.eye(4)
    affine[:3, 3] = -np.array(CENTRE)
    for number in range(NUMBER):
        labels = label_map(np.random.default_rng((SEED, number)))
        name = f"hippocampus_{number + 1:02d}"
        scan = Volume(scan_of(labels, prior, SEED + number).astype(np.int16), affine, name)
        write_nifti(scan, OUT / "imagesTr" / f"{name}_0000.nii.gz", overwrite=True, description="SYNTHETIC, medfusion")
        write_nifti(Volume(labels, affine, name), OUT / "labelsTr" / f"{name}.nii.gz", overwrite=True)
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": BACKGROUND, "anterior": HEAD_LABEL, "posterior": BODY_LABEL},
        "numTraining": NUMBER,
        "file_ending": ".nii.gz",
        "name": "hippocampi that nobody has",
        "licence": prior.config.licence,
    }
    (OUT / "dataset.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
