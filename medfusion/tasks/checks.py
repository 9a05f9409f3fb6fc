"""Whether a prior may be asked about a scan at all."""

from __future__ import annotations

from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.volume import Volume

COARSE = 2.0  # times the prior's spacing: thicker slices than it has ever seen
SMALLEST = 16  # voxels along an axis: fewer hold no anatomy to speak of


def check_scan(volume: Volume, prior: Prior, *, patches: bool = False) -> None:
    """Refuse another modality than the prior's and slabs too thin to be a volume.

    With ``patches`` a prior that is not told where it looks is asked about any modality.

    Raises
    ------
    MedfusionError : with the measured value.
    """
    wanted = prior.config.preprocessing.modality
    if volume.modality not in ("", wanted) and not (patches and not prior.config.network.located):
        raise MedfusionError(
            f"{volume.name}: the prior {prior.name} is for {wanted}, this scan is {volume.modality}",
            fix=f"use a prior trained on {volume.modality}" + ", or mri-patch, with a caution" * patches,
        )
    if min(volume.shape) < SMALLEST:
        raise MedfusionError(
            f"{volume.name}: too few voxels along one axis for a 3D prior",
            shape=" x ".join(map(str, volume.shape)),
            smallest=SMALLEST,
        )


def caution(volume: Volume, prior: Prior) -> str:
    """What a reader of a result should know, clauses or "": voxels much coarser than the prior's, another modality."""
    known, largest = prior.config.preprocessing, float(volume.spacing.max())
    found = [f"; caution: voxels of {largest:.3g} mm, the prior knows {known.spacing:g} mm"] * (
        largest > COARSE * known.spacing
    )
    found += [f"; caution: the prior knows {known.modality}, not {volume.modality}"] * (
        volume.modality not in ("", known.modality)
    )
    return "".join(found)
