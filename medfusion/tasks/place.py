"""A scan as the prior sees it, evenly lit, where the anatomy of the healthy lies in it, and how alike them it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.data.grid import canonical, nearest, onto_grid, resampled
from medfusion.data.intensity import SEEN, IntensityScale, foreground, measure_scale
from medfusion.data.noise import estimate_noise
from medfusion.data.registration import carried, register
from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.tasks.checks import check_scan
from medfusion.volume import Volume

MARGIN = 8  # voxels around the part that is scored: what the prior is shown beyond it
OUTLINE = 20.0  # mm around the part that is scored, by which a scan is placed: around a brain the scalp, not the neck
BIAS_WIDTH = 40.0  # mm, standard deviation of the window
STRONGEST = 4.0  # factor of a bias field, either way
SUSPECT = (2.5, 3.5)  # spreads of the healthy, from which on a voxel may be a lesion's, and from which on it is
FAINT = 1e-3  # mean square of tissue in a window, of air to bright tissue = 2: with less, far off, the field is 1
FEATURES = ("size", "stretch", "likeness", "noise", "dark", "middle", "bright", "sharpness")


@dataclass(frozen=True, eq=False)
class Seen:
    """One scan upright at the prior's spacing, in its units, clipped to SEEN.

    ``scale`` and ``bias``, the field by which ``without_bias`` divided it, lead back to the scan's units.
    """

    volume: Volume
    scale: IntensityScale
    bias: NDArray[np.float32] | float = 1.0

    def in_scan_units(self, array: NDArray[np.float32], scan: Volume) -> NDArray[np.float32]:
        """An array at its voxels, on the grid of the scan and in its units."""
        lit = ((array + 1) * self.bias - 1).astype(np.float32)
        return self.scale.invert(onto_grid(self.volume.with_array(lit), scan))


def seen_by(prior: Prior, volume: Volume) -> Seen:
    """The scan as ``prior`` sees it, of the prior's modality.

    Raises
    ------
    MedfusionError : another modality than the prior's, a slab, a constant image.
    """
    check_scan(volume, prior)
    preprocessing = prior.config.preprocessing
    work = resampled(canonical(volume), preprocessing.spacing)
    scale = measure_scale(work.array, preprocessing.percentile, volume.name)
    return Seen(replace(work, array=scale.apply(work.array).clip(*SEEN), modality=preprocessing.modality), scale)


def placed(scan: Volume, atlas: Volume, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(4, 4) as of ``register(scan, atlas)``, by what lies up to OUTLINE mm from ``inside``, the part that is scored.

    Whole heads end anywhere below the brain. (Correlation with the atlas inside, 12 heads: 0.852 by all, 0.88 so, also
    where the neck is cut off. By 16 mm the scalp of a synthetic head was pulled into the brain; by 24 its brain was
    squeezed.)

    Raises
    ------
    MedfusionError : as ``register``.
    """
    return register(scan, atlas, ndimage.distance_transform_edt(~inside, sampling=atlas.spacing) <= OUTLINE)


@dataclass(frozen=True, eq=False)
class Healthy:
    """The mean of healthy scans, and on its grid (i, j, k) their spread, and where scans are to be scored."""

    atlas: Volume
    spread: NDArray[np.float32]
    inside: NDArray[np.bool_]


def bias_field(scan: Volume, matrix: NDArray[np.float64], healthy: Healthy) -> NDArray[np.float32]:
    """(d, h, w): by how much coils and gain make a scan brighter than the mean of the healthy there, smooth.

    The factor by which the atlas comes nearest to the scan, both counted from air, in a Gaussian window: the sum of
    their products over that of the atlas's squares, inside and as far as the scan is not beyond the healthy, so
    that no lesion counts; twice, as that depends on it. ``matrix`` as of ``placed``.
    """
    atlas = healthy.atlas
    coarse, there = resampled(scan, float(atlas.spacing.min())), carried(atlas, matrix)
    covered = nearest(coarse.with_array(np.ones(coarse.shape, np.uint8)), there) > 0
    found, expected = onto_grid(coarse, there) + 1, atlas.array + 1  # air is -1
    tissue = healthy.inside & covered & (found > expected / STRONGEST)  # no brain that was cut off, no cavity
    width, bias = BIAS_WIDTH / atlas.spacing, np.ones_like(found)
    for _ in range(2):
        weight = tissue * (1 - beyond_healthy(np.abs(found / bias - expected) / healthy.spread)) * expected
        products, squares = (ndimage.gaussian_filter(weight * part, width) for part in (found, expected))
        bias = np.clip((products + FAINT) / (squares + FAINT), 1 / STRONGEST, STRONGEST)
    return on_scan(bias, atlas, matrix, scan)


def beyond_healthy(apart: NDArray[np.float32]) -> NDArray[np.float32]:
    """0 where a voxel is ``apart`` from the mean of the healthy by SUSPECT[0] of their spreads or less, 1 from [1]."""
    low, high = SUSPECT
    return np.clip((apart - low) / (high - low), 0, 1)


def without_bias(seen: Seen, matrix: NDArray[np.float64], healthy: Healthy) -> Seen:
    """The scan divided by its bias field, counted from air, and clipped to SEEN; CT has no such field."""
    if seen.volume.modality == "CT":
        return seen
    bias = bias_field(seen.volume, matrix, healthy)
    even = ((seen.volume.array + 1) / bias - 1).clip(*SEEN)
    return Seen(seen.volume.with_array(even), seen.scale, bias)


def tissue_ml(seen: Seen) -> float:
    """How much tissue there is: of a head about three times as much as of a brain without skull."""
    return float(foreground(seen.volume.array).sum()) * seen.volume.voxel_ml


def box_around(inside: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box that holds ``inside`` (d, h, w) and MARGIN voxels around it, within the volume."""
    return tuple(
        slice(max(0, int(along.min()) - MARGIN), int(along.max()) + MARGIN + 1) for along in np.nonzero(inside)
    )


def in_box(volume: Volume, box: tuple[slice, ...]) -> Volume:
    """That part of a volume, in its place."""
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_world([along.start for along in box])
    return replace(volume, array=volume.array[box], affine=affine)


def on_scan(
    values: NDArray[np.generic], atlas: Volume, matrix: NDArray[np.float64], scan: Volume
) -> NDArray[np.float32]:
    """A map on the grid of ``atlas``, at the voxels of a scan; ``matrix`` as of ``placed``."""
    return onto_grid(carried(atlas.with_array(values), matrix), scan)


def ending(part: Volume) -> Volume:
    """A mask, 0 or 1, with a voxel of 0 around it: so it ends where its field of view does."""
    affine = part.affine.copy()
    affine[:3, 3] = part.to_world((-1, -1, -1))
    return replace(part, array=np.pad(part.array, 1).astype(np.float32), affine=affine)


@dataclass(frozen=True, eq=False)
class Here:
    """What the healthy are at each voxel (d, h, w) of one scan: their mean, their spread; where it is to be scored."""

    atlas: NDArray[np.float32]
    spread: NDArray[np.float32]
    inside: NDArray[np.bool_]


def healthy_at(scan: Volume, matrix: NDArray[np.float64], healthy: Healthy) -> Here:
    """What the healthy are at the voxels of a scan; ``matrix`` as of ``placed``.

    Raises
    ------
    MedfusionError : nothing of the part that is scored is in the scan's field of view.
    """
    atlas, part = healthy.atlas, ending(healthy.atlas.with_array(healthy.inside))
    scored = on_scan(part.array, part, matrix, scan) > 0.5
    if not scored.any():
        raise MedfusionError(f"{scan.name}: nothing of what the healthy reference knows is in the field of view")
    return Here(on_scan(atlas.array, atlas, matrix, scan), on_scan(healthy.spread, atlas, matrix, scan), scored)


def features(scan: Volume, here: Here, matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """(len(FEATURES),) by which one tells whether a scan in the prior's units is of the kind of healthy ones.

    Volume and largest stretch of the affine map from the atlas, correlation with it (Fisher's z), noise, three
    percentiles of the intensity, share of detail. No lesion of some per cent of the brain moves one of them by much.
    """
    stretches = np.linalg.svd(matrix[:3, :3], compute_uv=False)
    values, smooth = scan.array[here.inside], ndimage.gaussian_filter(scan.array, 1.0)[here.inside]
    alike, detail = np.corrcoef(smooth, here.atlas[here.inside])[0, 1], values - smooth
    found = (
        np.log(stretches.prod()),
        np.log(stretches[0] / stretches[-1]),
        np.arctanh(np.clip(alike, -0.999, 0.999)),
        np.log(estimate_noise(scan.array) + 1e-3),
        *np.percentile(values, (10, 50, 90)),
        np.log((np.median(np.abs(detail)) + 1e-3) / (np.ptp(np.percentile(values, (10, 90))) + 1e-3)),
    )
    return np.array(found, dtype=np.float32)
