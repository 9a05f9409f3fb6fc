"""A scan as the prior sees it, where the anatomy of the healthy lies in it, and how alike them it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.data.grid import canonical, onto_grid, resampled
from medfusion.data.intensity import SEEN, IntensityScale, foreground, measure_scale
from medfusion.data.noise import estimate_noise
from medfusion.data.registration import carried
from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.tasks.checks import check_scan
from medfusion.volume import Volume

MARGIN = 8  # voxels around the part that is scored: what the prior is shown beyond it
FEATURES = ("size", "stretch", "likeness", "noise", "dark", "middle", "bright", "sharpness")


@dataclass(frozen=True, eq=False)
class Seen:
    """One scan upright at the prior's spacing, in its units, clipped to SEEN; ``scale`` leads back to the scan's."""

    volume: Volume
    scale: IntensityScale


def seen_by(prior: Prior, volume: Volume) -> Seen:
    """The scan as ``prior`` sees it.

    Raises
    ------
    MedfusionError : another modality than the prior's, a slab, a constant image.
    """
    check_scan(volume, prior)
    work = resampled(canonical(volume), prior.config.preprocessing.spacing)
    scale = measure_scale(work.array, prior.config.preprocessing.percentile, volume.name)
    return Seen(work.with_array(scale.apply(work.array).clip(*SEEN)), scale)


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
    """A map on the grid of ``atlas``, at the voxels of a scan; ``matrix`` as of ``register(scan, atlas)``."""
    return onto_grid(carried(atlas.with_array(values), matrix), scan)


@dataclass(frozen=True, eq=False)
class Here:
    """What the healthy are at each voxel (d, h, w) of one scan: their mean, their spread; where it is to be scored."""

    atlas: NDArray[np.float32]
    spread: NDArray[np.float32]
    inside: NDArray[np.bool_]


def healthy_at(
    scan: Volume,
    matrix: NDArray[np.float64],
    atlas: Volume,
    spread: NDArray[np.float32],
    inside: NDArray[np.bool_],
) -> Here:
    """Maps on the grid of ``atlas`` at the voxels of a scan; ``matrix`` as of ``register(scan, atlas)``.

    Raises
    ------
    MedfusionError : nothing of the part that is scored is in the scan's field of view.
    """
    part = np.pad(inside, 1).astype(np.float32)  # which ends where the field of view of the atlas does
    affine = atlas.affine.copy()
    affine[:3, 3] = atlas.to_world((-1, -1, -1))
    scored = on_scan(part, Volume(part, affine), matrix, scan) > 0.5
    if not scored.any():
        raise MedfusionError(f"{scan.name}: nothing of what the healthy reference knows is in the field of view")
    return Here(on_scan(atlas.array, atlas, matrix, scan), on_scan(spread, atlas, matrix, scan), scored)


def features(scan: Volume, here: Here, matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """(len(FEATURES),) by which one tells whether a scan in the prior's units is of the kind of healthy ones.

    Volume and largest stretch of the affine map from the atlas, correlation with it (Fisher's z), noise, three
    percentiles of the intensity, share of detail. No lesion of some per cent of the brain moves one of them by much.
    """
    stretches = np.linalg.svd(matrix[:3, :3], compute_uv=False)
    values = scan.array[here.inside]
    alike = np.corrcoef(ndimage.gaussian_filter(scan.array, 1.0)[here.inside], here.atlas[here.inside])[0, 1]
    detail = (scan.array - ndimage.gaussian_filter(scan.array, 1.0))[here.inside]
    found = (
        np.log(stretches.prod()),
        np.log(stretches[0] / stretches[-1]),
        np.arctanh(np.clip(alike, -0.999, 0.999)),
        np.log(estimate_noise(scan.array) + 1e-3),
        *np.percentile(values, (10, 50, 90)),
        np.log((np.median(np.abs(detail)) + 1e-3) / (np.ptp(np.percentile(values, (10, 90))) + 1e-3)),
    )
    return np.array(found, dtype=np.float32)
