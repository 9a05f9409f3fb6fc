"""Scores: how a scan differs from its reconstruction, in brightness and in structure."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Score = Literal["residual", "structure", "both"]
WINDOW = 1.5  # voxels: a lesion is a region; with 1 the average precision was a tenth lower
LEAST = 1e-4  # squared difference, of air to bright tissue = 2, below which it tells nothing


def raw_maps(image: NDArray[np.float32], rebuilt: NDArray[np.float32]) -> NDArray[np.float32]:
    """(2, d, h, w): the signed residual in a Gaussian window, and the logarithm of its mean square there.

    The second also sees what is brighter and darker in turns, so that the residual cancels: texture that is not the
    healthy one. SSIM's contrast and structure terms (Wang et al. 2004) in its place, blind to brightness, found half of
    it.
    """
    difference = image - rebuilt
    structure = np.log(ndimage.gaussian_filter(difference**2, WINDOW) + LEAST)
    return np.stack([ndimage.gaussian_filter(difference, WINDOW), structure])


def combine(z: NDArray[np.float32], score: Score) -> NDArray[np.float32]:
    """(d, h, w), 0 or above, of standardised maps (2, d, h, w): the size of one of them, or of both together."""
    residual, structure = np.abs(z[0]), np.maximum(z[1], 0)
    return {"residual": residual, "structure": structure, "both": np.hypot(residual, structure)}[score]
