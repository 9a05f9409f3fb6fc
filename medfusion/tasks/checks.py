"""Whether a prior may be asked about a scan at all."""

from __future__ import annotations

from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.volume import Volume

COARSE = 2.0  # times the prior's spacing: thicker slices than it has ever seen
SMALLEST = 16  # voxels along an axis: fewer hold no anatomy to speak of


def check_scan(volume: Volume, prior: Prior) -> None:
    """Refuse another modality than the prior's and slabs too thin to be a volume.

    Raises
    ------
    MedfusionError : with the measured value.
    """
    wanted = prior.config.preprocessing.modality
    if volume.modality and volume.modality != wanted:
        raise MedfusionError(
            f"{volume.name}: the prior {prior.name} is for {wanted}, this scan is {volume.modality}",
            fix=f"use a prior trained on {volume.modality}: `medfusion priors` lists those shipped",
        )
    if min(volume.shape) < SMALLEST:
        raise MedfusionError(
            f"{volume.name}: too few voxels along one axis for a 3D prior",
            shape=" x ".join(map(str, volume.shape)),
            smallest=SMALLEST,
        )


def caution(volume: Volume, prior: Prior) -> str:
    """What the reader of a result should know: "" or a clause about voxels much coarser than the prior's."""
    spacing, largest = prior.config.preprocessing.spacing, float(volume.spacing.max())
    if largest <= COARSE * spacing:
        return ""
    return f"; caution: voxels of {largest:.3g} mm, the prior knows {spacing:g} mm"
