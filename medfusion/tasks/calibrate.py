"""Calibrate: run a method of detection on healthy scans and keep, place by place, what it leaves on them.

Each healthy scan is standardised by the others, by mean and spread of what is left on them at each place. (It is in
the atlas, in the spread about it and in the factors of tissues itself, as one among all.) The pooled scores give
p-values, the heaviest region of each scan those of regions and of scans: of scans of the same kind one in twenty has a
p of 0.05 or less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.data.grid import onto_grid, resampled
from medfusion.data.intensity import foreground
from medfusion.data.registration import carried
from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.reference import SHARES, SMALLEST_SD, TISSUES, Reference, continued, height_of, standardise, weigh
from medfusion.tasks.place import (
    FEATURES,
    Healthy,
    Seen,
    ending,
    features,
    healthy_at,
    in_box,
    on_scan,
    placed,
    seen_by,
    tissue_ml,
    without_bias,
)
from medfusion.tasks.rebuild import METHODS, examine
from medfusion.tasks.scores import combine
from medfusion.volume import Volume

Progress = Callable[[str], None]

COARSE = 4.0  # mm, of the maps: after affine registration no place is known better
FEWEST = 10  # healthy scans: with fewer no p is below 0.1
RIM = 2  # voxels of the prior's grid off the outline of a head, where partial volume is no finding
HALF = 0.5  # of the healthy scans: where so many have brain, or head, is scored
SPREAD_BLUR = 1.0  # voxels of the maps: the variance of some scans is rough
ENOUGH = 1000  # voxels of a tissue to tell its spread


@dataclass(frozen=True, eq=False)
class Cohort:
    """Healthy scans as the prior sees them, and what they have in common.

    Attributes
    ----------
    scans : each at the prior's spacing, in its units, without its bias field.
    matrices : (4, 4) each, as of ``placed``.
    healthy : their mean, bias fields and all, at COARSE mm, on whose grid all maps lie; their spread without these.
    stripped : whether they are brains without the rest of the head.
    """

    scans: list[Seen]
    matrices: list[NDArray[np.float64]]
    healthy: Healthy
    stripped: bool


@dataclass(frozen=True, eq=False)
class Left:
    """What a method left on one healthy scan, within a box: reconstruction and raw maps in half precision."""

    box: Volume
    matrix: NDArray[np.float64]
    inside: NDArray[np.bool_]
    rebuilt: NDArray[np.float16]
    raw: NDArray[np.float16]


def gather(
    scans: Iterable[tuple[Volume, NDArray[np.bool_] | None]], prior: Prior, *, stripped: bool, progress: Progress
) -> Cohort:
    """Healthy scans registered to their mean.

    ``scans`` come with the part of them that is of interest, (i, j, k), or None: the head, or the brain where the scans
    are ``stripped`` of the rest.

    Raises
    ------
    MedfusionError : fewer scans than FEWEST, one that the prior cannot see or that cannot be registered, an empty part.
    """
    seen, parts = [], []
    for volume, part in scans:
        seen.append(seen_by(prior, volume))
        work = seen[-1].volume
        parts.append(head_in(work.array) if part is None else onto_grid(volume.with_array(part), work) > 0.5)
        if not parts[-1].any():
            raise MedfusionError(
                f"{volume.name}: nothing of it is of interest", fix="look at its mask, or leave it out"
            )
    if len(seen) < FEWEST:
        raise MedfusionError(f"{len(seen)} healthy scan(s) are too few for a reference", fewest=FEWEST)
    middle = int(np.argsort([part.sum() for part in parts])[len(parts) // 2])
    atlas = resampled(seen[middle].volume, COARSE)  # to begin with, a head of middling size
    inside = in_common([seen[middle]], [parts[middle]], [np.eye(4)], atlas)
    for what, every in (("one of them", len(seen) // FEWEST), ("their mean", 1)):
        chosen = seen[::every]
        progress(f"registering {len(chosen)} scans to {what}")
        matrices = [placed(each.volume, atlas, inside) for each in chosen]
        inside = in_common(chosen, parts[::every], matrices, atlas)
        brought = [_brought(each, atlas, matrix) for each, matrix in zip(chosen, matrices, strict=True)]
        halved = np.mean(brought, axis=0).astype(np.float16)  # as it is kept
        atlas = atlas.with_array(halved.astype(np.float32), name="healthy reference")
    progress(f"registering {len(seen)} scans to their final mean")
    matrices = [placed(each.volume, atlas, inside) for each in seen]
    inside = in_common(seen, parts, matrices, atlas)
    healthy = Healthy(atlas, spread_of(seen, matrices, atlas, inside), inside)
    healthy = replace(healthy, spread=spread_of(evenly_lit(seen, matrices, healthy), matrices, atlas, inside))
    return Cohort(evenly_lit(seen, matrices, healthy), matrices, healthy, stripped)


def in_common(
    scans: list[Seen], parts: list[NDArray[np.bool_]], matrices: list[NDArray[np.float64]], atlas: Volume
) -> NDArray[np.bool_]:
    """(i, j, k): where more than HALF of the scans have the part of interest, on the grid of the atlas.

    Raises
    ------
    MedfusionError : nowhere.
    """
    shares = [
        onto_grid(ending(each.volume.with_array(part)), carried(atlas, matrix))
        for each, part, matrix in zip(scans, parts, matrices, strict=True)
    ]
    inside = np.mean(shares, axis=0) > HALF
    if not inside.any():
        raise MedfusionError("the parts of interest of the healthy scans have no place in common")
    return inside


def evenly_lit(scans: list[Seen], matrices: list[NDArray[np.float64]], healthy: Healthy) -> list[Seen]:
    """Each scan without its bias field."""
    return [without_bias(seen, matrix, healthy) for seen, matrix in zip(scans, matrices, strict=True)]


def spread_of(
    scans: list[Seen], matrices: list[NDArray[np.float64]], atlas: Volume, inside: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """(i, j, k): the standard deviation of the scans on the grid of the atlas."""
    brought = np.stack([_brought(seen, atlas, matrix) for seen, matrix in zip(scans, matrices, strict=True)])
    return moments(brought.sum(axis=0), (brought**2).sum(axis=0), len(scans), inside)[1]


def _brought(seen: Seen, atlas: Volume, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """A scan on the grid of the atlas."""
    return onto_grid(seen.volume, carried(atlas, matrix)).astype(np.float64)


def head_in(array: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The head with its cavities, less a rim: ventricles and dark lesions lie below Otsu's threshold too."""
    closed = ndimage.binary_closing(np.pad(foreground(array), 8), iterations=8)[8:-8, 8:-8, 8:-8]
    return ndimage.binary_erosion(ndimage.binary_fill_holes(closed), iterations=RIM)


def make_reference(cohort: Cohort, prior: Prior, method: str, *, seed: int = 0, progress: Progress) -> Reference:
    """What ``method`` leaves on healthy scans.

    Raises
    ------
    MedfusionError : the method needs another kind of prior.
    """
    atlas, inside, count = cohort.healthy.atlas, cohort.healthy.inside, len(cohort.scans)
    left, found = [], []
    for number, (seen, matrix) in enumerate(zip(cohort.scans, cohort.matrices, strict=True), start=1):
        scan = seen.volume
        progress(f"{method} {number}/{count} {scan.name}")
        here = healthy_at(scan, matrix, cohort.healthy)
        rest = examine(seen, here, prior, method, stripped=cohort.stripped, seed=seed)
        found.append(features(scan, here, matrix))
        halved = rest.rebuilt.astype(np.float16), rest.raw.astype(np.float16)
        left.append(Left(in_box(scan, rest.box), matrix, here.inside[rest.box], *halved))
    maps = np.stack([_on_atlas(one, atlas) for one in left]).astype(np.float64)
    total, squares = maps.sum(axis=0), (maps**2).sum(axis=0)

    def by_the_others(k: int, tissue: NDArray[np.float32]) -> NDArray[np.float32]:
        one, others = left[k], moments(total - maps[k], squares - maps[k] ** 2, count - 1, inside)
        mean, sd = (np.stack([on_scan(c, atlas, one.matrix, one.box) for c in both]) for both in others)
        return standardise(one.raw.astype(np.float32), one.rebuilt.astype(np.float32), mean, sd, tissue)

    even = np.ones((2, len(TISSUES) - 1), np.float32)
    tissue = tissue_factors((by_the_others(k, even), one) for k, one in enumerate(left))
    scores = [combine(by_the_others(k, tissue), METHODS[method].score) for k in range(count)]
    pooled = np.concatenate([score[one.inside] for score, one in zip(scores, left, strict=True)])
    tail = np.quantile(pooled, 1 - SHARES).astype(np.float32)
    weights = [weigh(s, one.inside, height_of(tail), one.box.voxel_ml)[1] for s, one in zip(scores, left, strict=True)]
    mean, sd = moments(total, squares, count, inside)
    return Reference(
        method=method,
        affine=atlas.affine,
        atlas=atlas.array.astype(np.float32),
        spread=cohort.healthy.spread,
        inside=inside,
        mean=mean,
        sd=sd,
        tissue=tissue,
        tail=tail,
        heaviest=np.array([each.max(initial=0.0) for each in weights], np.float32),
        features=np.stack(found),
        names=FEATURES,
        tissue_ml=float(np.exp(np.median(np.log([tissue_ml(seen) for seen in cohort.scans])))),
        stripped=cohort.stripped,
    )


def _on_atlas(one: Left, atlas: Volume) -> NDArray[np.float32]:
    there = carried(atlas, one.matrix)
    return np.stack([onto_grid(one.box.with_array(channel), there) for channel in one.raw])


def moments(
    total: NDArray[np.float64], squares: NDArray[np.float64], count: int, inside: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation (..., i, j, k), the latter of neighbours together and at least SMALLEST_SD.

    Both go on beyond ``inside`` as they are at its rim.
    """
    mean = total / count
    variance = continued(np.maximum(squares / count - mean**2, 0) * count / (count - 1), inside)
    blurred = ndimage.gaussian_filter(variance, SPREAD_BLUR, axes=(-3, -2, -1))
    sd = np.sqrt(blurred + SMALLEST_SD**2)
    return continued(mean.astype(np.float32), inside), continued(sd.astype(np.float32), inside)


def tissue_factors(standardised: Iterable[tuple[NDArray[np.float32], Left]]) -> NDArray[np.float32]:
    """(2, len(TISSUES) - 1): root mean square of what is standardised by place, by expected intensity."""
    squares, counts = np.zeros((2, len(TISSUES) - 1)), np.zeros(len(TISSUES) - 1)
    for z, one in standardised:
        bins = np.digitize(one.rebuilt[one.inside], TISSUES[1:-1])
        counts += np.bincount(bins, minlength=len(counts))
        squares += [np.bincount(bins, channel[one.inside] ** 2, len(counts)) for channel in z]
    rms = np.sqrt(squares / np.maximum(counts, 1))
    return np.where(counts >= ENOUGH, rms, 1.0).astype(np.float32)
