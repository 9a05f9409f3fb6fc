"""Image quality in a mask, and overlap of masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def psnr(truth: NDArray[Any], image: NDArray[Any], mask: NDArray[Any], data_range: float) -> float:
    """Peak signal-to-noise ratio in dB over the voxels where ``mask`` > 0: 10 log10(data_range^2 / mean squared error).

    Infinite for identical images.

    Raises
    ------
    ValueError : the mask is empty.
    """
    inside = mask > 0
    if not inside.any():
        raise ValueError("the mask is empty")
    error = float(np.mean((truth[inside].astype(np.float64) - image[inside]) ** 2))
    return float(10 * np.log10(data_range**2 / error)) if error > 0 else float("inf")


def dice(truth: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Overlap 2 |A and B| / (|A| + |B|) of the voxels above 0, in [0, 1]; nan when both masks are empty."""
    a, b = truth > 0, prediction > 0
    total = int(a.sum() + b.sum())
    return float(2 * int((a & b).sum()) / total) if total else float("nan")
