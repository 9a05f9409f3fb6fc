"""Make the sample data: python sample_data/make.py  (needs nilearn; about half a minute on one core)

One synthetic adult head, T1-weighted, 2 mm: the brain is the ICBM 152 template turned into an individual (see
NOTICE.txt for its notice), skull, scalp, orbits and neck are drawn around it. Everything follows from SEED.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel
import numpy as np
from dicom_series import write_dicom_series
from nibabel.affines import apply_affine
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

SEED = 152
SPACING = 2.0  # mm
SHAPE = (92, 112, 84)  # voxels of the scan, right x anterior x superior
CENTRE = (1.5, -19.0, 12.0)  # world mm of the scan's centre
OBLIQUE = (4.0, -2.0, 3.0)  # degrees of the scan's axes against the world's, about x, y, z
PAD = ((18, 18), (18, 22), (4, 24))  # mm of room around the template for skull and scalp

# Signal of each tissue relative to white matter, as in healthy 1.5 T and 3 T scans before any bias field.
WHITE, GREY, CSF = 1.0, 0.74, 0.22
COMPACT_BONE, MARROW, MUSCLE, FAT, SKIN, VITREOUS = 0.05, 0.45, 0.52, 1.35, 0.50, 0.26
WHITE_SIGNAL = 600.0  # arbitrary units

# Where (ICBM mm), how large (semi-axes in mm), how bright relative to white matter.
LESIONS = (
    {"kind": "dark, like a chronic infarct", "centre": (-27, -8, 27), "radii": (9, 15, 9), "signal": 0.26},
    {"kind": "bright, like a subacute haemorrhage", "centre": (27, 3, 3), "radii": (6, 8, 7), "signal": 1.45},
    {"kind": "dark, like a lacune", "centre": (24, 34, 13), "radii": (5, 6, 5), "signal": 0.24},
)

Array = NDArray[np.float32]


def random_field(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    """Smooth Gaussian random field of unit variance; `scale` is its correlation length in voxels."""
    step = max(scale / 2.0, 1.0)  # large scales are drawn on a coarse grid: same field, less work
    coarse = [int(np.ceil(n / step)) + 4 for n in shape]
    noise = ndimage.gaussian_filter(rng.standard_normal(coarse), scale / step)
    noise /= noise.std()
    if step == 1.0:
        return noise[tuple(slice(n) for n in shape)].astype(np.float32)
    grid = np.meshgrid(*(np.arange(n) / step + 1.0 for n in shape), indexing="ij", sparse=True)
    return ndimage.map_coordinates(noise, np.broadcast_arrays(*grid), order=1).astype(np.float32)


def ramp(distance: Array, width: float = 1.0) -> Array:
    """0 on the negative side of a surface, 1 on the positive one, with a soft step `width` mm wide."""
    return np.clip(distance / width + 0.5, 0.0, 1.0)


def signed_distance(inside: NDArray[np.bool_]) -> Array:
    """Distance in voxels to the surface of a region: negative within it."""
    return (ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)).astype(np.float32)


def ellipsoid(world: Array, centre: tuple[float, ...], radii: tuple[float, ...]) -> Array:
    """About the distance in mm to an ellipsoid's surface, negative within it; `world` is (3, i, j, k) in mm."""
    centred = [(w - c) / r for w, c, r in zip(world, centre, radii, strict=True)]
    return (np.sqrt(sum(c * c for c in centred)) - 1.0) * np.float32(min(radii))


def template() -> tuple[Array, Array, Array, NDArray[np.float64]]:
    """T1, grey and white matter maps (0 to 1) of the ICBM 152 template at 1 mm, and their affine."""
    images = [load(resolution=1) for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)]
    t1, grey, white = (np.pad(image.get_fdata(dtype=np.float32), PAD) for image in images)
    affine = images[0].affine.copy()
    affine[:3, 3] -= [before for before, _ in PAD]
    return t1, grey, white, affine


def voxel_centres(shape: tuple[int, ...], affine: NDArray[np.float64]) -> Array:
    """World mm of every voxel's centre, (3, i, j, k)."""
    index = np.moveaxis(np.indices(shape), 0, -1)
    return np.moveaxis(apply_affine(affine, index), -1, 0).astype(np.float32)


def individual_brain(rng: np.random.Generator, t1: Array, grey: Array, white: Array) -> Array:
    """One brain drawn from the template's tissue probabilities.

    The template is an average of many brains, its cortex a blur. Where its maps are undecided, a random field with
    the scale of sulci decides, so that one set of gyri appears.
    """
    probability = np.stack([np.clip(1.0 - grey - white, 0.0, 1.0), grey, white])
    probability /= probability.sum(axis=0)
    levels = np.array([CSF, GREY, WHITE], dtype=np.float32)[:, None, None, None]
    unexplained = t1 / np.percentile(t1[white > 0.95], 50) - (probability * levels).sum(axis=0)
    log_odds = 3.0 * np.log(probability + 1e-3)
    log_odds[0] += 1.1  # averaging closes sulci: open them again
    for tissue, strength in enumerate((1.7, 1.1, 1.4)):
        log_odds[tissue] += strength * random_field(rng, t1.shape, 2.0)
    sharp = np.exp(log_odds - log_odds.max(axis=0))
    sharp /= sharp.sum(axis=0)
    # Deep grey matter, brainstem and cerebellum keep what the template knows beyond its three tissue maps.
    return (sharp * levels).sum(axis=0) + 0.9 * ndimage.gaussian_filter(unexplained, 1.5)


def surround(rng: np.random.Generator, brain: NDArray[np.bool_], world: Array) -> Array:
    """Cerebrospinal fluid, skull, scalp, orbits, sinuses, muscle around the brain; 0 in air."""
    shape = brain.shape
    filled = signed_distance(signed_distance(signed_distance(brain) < 14.0) < -14.0)  # closed over sulci and fissures
    thickness = 5.5 + 1.0 * random_field(rng, shape, 25.0)
    skull = ndimage.gaussian_filter(filled, 2.0) - 2.5  # distance from the inner table; 2.5 mm of CSF over the gyri
    face_and_neck = np.minimum(
        ellipsoid(world, (0, 34, -52), (62, 62, 70)), ellipsoid(world, (0, -52, -80), (64, 62, 62))
    )
    scalp = skull - thickness - 5.5 - 1.0 * random_field(rng, shape, 20.0)
    outside = ndimage.gaussian_filter(np.minimum(scalp, face_and_neck), 4.0)

    streaks = random_field(rng, shape, 2.5)
    muscle = MUSCLE * (1.0 + 0.12 * streaks)
    fat = FAT * (0.8 + 0.12 * random_field(rng, shape, 4.0))
    planes = ramp(0.16 - np.abs(random_field(rng, shape, 5.0) + 0.3 * streaks), 0.2)  # fat between the muscles
    deep = ramp(-outside - 5.0, 1.5)
    signal = fat + (muscle + (fat - muscle) * planes - fat) * deep
    signal += (SKIN - signal) * ramp(outside + 1.8)
    for side in (-1, 1):
        orbit = ellipsoid(world, (side * 31, 52, -38), (18, 27, 16)) + 1.0 * streaks
        signal += (0.7 * FAT - signal) * ramp(-orbit, 2.0)
        globe = ellipsoid(world, (side * 32, 64, -38), (12, 12, 12))
        signal += (MUSCLE - signal) * ramp(1.5 - globe)
        signal += (VITREOUS - signal) * ramp(-globe)
    marrow = ramp(thickness / 2 - 1.6 - np.abs(skull - thickness / 2))  # the diploe between the two tables
    bone = COMPACT_BONE + (MARROW + 0.10 * streaks - COMPACT_BONE) * marrow
    signal += (bone - signal) * ramp(thickness - skull)
    rough = random_field(rng, shape, 4.0)
    for centre, radii in (((0, 62, -42), (12, 26, 26)), ((0, 70, -12), (16, 7, 12)), ((0, 22, -40), (12, 12, 9))):
        sinus = ellipsoid(world, centre, radii) + 2.0 * rough
        signal += (0.02 - signal) * ramp(-sinus, 1.5) * ramp(skull - 2.0)
    signal += (CSF - signal) * ramp(-skull)
    return (signal * ramp(-outside)).astype(np.float32)


def lesion_fraction(rng: np.random.Generator, world: Array, lesion: dict) -> Array:
    """How much of each voxel is lesion, 0 to 1: an irregular blob with a border about 4 mm wide."""
    distance = ellipsoid(world, lesion["centre"], lesion["radii"])
    outline = np.clip(random_field(rng, world.shape[1:], 3.0), -1.5, 1.5)  # bounded: no islands far away
    return ramp(-distance - 0.3 * min(lesion["radii"]) * outline, 4.0)


def scan_affine() -> NDArray[np.float64]:
    """Voxel index to world RAS mm of the scan: slightly oblique, as scans are."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", OBLIQUE, degrees=True).as_matrix() * SPACING
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return affine


def anatomy_coordinates(rng: np.random.Generator, template_affine: NDArray[np.float64]) -> Array:
    """For a grid twice as fine as the scan: where each point lies in the template's voxels, (3, 2i, 2j, 2k).

    A head of its own: a few degrees of tilt, other proportions, and a smooth asymmetric displacement of a few mm.
    """
    fine = tuple(2 * n for n in SHAPE)
    index = np.stack(np.meshgrid(*(np.arange(n) / 2.0 - 0.25 for n in fine), indexing="ij"), axis=-1)
    world = apply_affine(scan_affine(), index)
    tilt = Rotation.from_euler("xyz", (-6.0, 1.5, -2.0), degrees=True).as_matrix()
    anatomy = world @ (tilt * (1.03, 0.98, 1.01)).T
    for scale, rms in ((22.0, 2.4), (7.0, 0.8)):
        anatomy += np.stack([rms * random_field(rng, fine, scale) for _ in range(3)], axis=-1)
    return np.moveaxis(apply_affine(np.linalg.inv(template_affine), anatomy), -1, 0).astype(np.float32)


def acquire(volume: Array, coordinates: Array) -> Array:
    """Sample at the fine grid, then average 2 x 2 x 2 points to a voxel: partial volume as in a scan."""
    fine = ndimage.map_coordinates(volume, coordinates, order=1)
    i, j, k = SHAPE
    return fine.reshape(i, 2, j, 2, k, 2).mean(axis=(1, 3, 5))


def bias_field(rng: np.random.Generator) -> Array:
    """Receive and transmit field: brighter in the middle of the head, with a mild tilt of its own."""
    index = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    return (1.20 - 0.42 * (index**2).sum(axis=0) + 0.04 * random_field(rng, SHAPE, 22.0)).astype(np.float32)


def rician(rng: np.random.Generator, clean: Array, sigma: float) -> Array:
    """Magnitude of the complex signal with Gaussian noise of standard deviation sigma in each channel."""
    return np.hypot(clean + sigma * rng.standard_normal(clean.shape), sigma * rng.standard_normal(clean.shape))


def save(path: Path, array: NDArray, affine: NDArray[np.float64], dtype: type) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.rint(array).astype(dtype), affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def describe(lesion: dict, fraction: Array) -> dict:
    """What truth.json says about one lesion; its volume counts voxels that are at least half lesion."""
    return {
        "kind": lesion["kind"],
        "centre_mm": np.round(apply_affine(scan_affine(), ndimage.center_of_mass(fraction)), 1).tolist(),
        "volume_ml": round(float((fraction >= 0.5).sum()) * SPACING**3 / 1000.0, 2),
    }


def main(out: Path) -> None:
    rng = np.random.default_rng(SEED)
    t1, grey, white, template_affine = template()
    brain = t1 > 0
    world = voxel_centres(t1.shape, template_affine)
    inside = ramp(-signed_distance(brain), 2.0)
    head = individual_brain(rng, t1, grey, white) * inside + surround(rng, brain, world) * (1.0 - inside)
    head *= 1.0 + 0.025 * random_field(rng, t1.shape, 1.0) + 0.015 * random_field(rng, t1.shape, 3.0)

    coordinates = anatomy_coordinates(rng, template_affine)
    bias = bias_field(rng) * WHITE_SIGNAL
    clean = np.clip(acquire(head, coordinates), 0.0, None) * bias
    brain_mask = acquire(brain.astype(np.float32), coordinates) >= 0.5
    diseased, fractions = clean.copy(), []
    for lesion in LESIONS:
        fraction = acquire(lesion_fraction(rng, world, lesion), coordinates)
        texture = 1.0 + 0.05 * random_field(rng, SHAPE, 1.0)
        diseased += fraction * (lesion["signal"] * bias * texture - diseased)
        fractions.append(fraction)

    affine = scan_affine()
    level = float(np.percentile(clean[clean > 0], 99))
    sigma, lesions_sigma = 0.07 * level, 0.02 * level
    noisy = np.rint(rician(rng, clean, sigma)).astype(np.int16)
    lesion_mask = np.max(fractions, axis=0) >= 0.5
    save(out / "head_clean.nii.gz", clean, affine, np.int16)
    save(out / "head_brain_mask.nii.gz", brain_mask, affine, np.uint8)
    save(out / "noisy" / "head_noisy.nii.gz", noisy, affine, np.int16)
    save(out / "lesions" / "head_lesions.nii.gz", rician(rng, diseased, lesions_sigma), affine, np.int16)
    save(out / "lesions_truth" / "head_lesions_mask.nii.gz", lesion_mask, affine, np.uint8)
    write_dicom_series(noisy, affine, out / "noisy_dicom")

    noises = {"noisy": sigma, "lesions": lesions_sigma}
    truth = {
        "seed": SEED,
        "percentile_99_of_head_clean": round(level, 2),
        "noise": {name: {"kind": "rician", "sigma": round(value, 3)} for name, value in noises.items()},
        "lesions": [describe(lesion, fraction) for lesion, fraction in zip(LESIONS, fractions, strict=True)],
    }
    (out / "truth.json").write_text(json.dumps(truth, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    main(parser.parse_args().out)
