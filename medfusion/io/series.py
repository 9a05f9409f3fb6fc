"""Series: what discovery found about one scan on disk, before its voxels are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Series:
    """One scan on disk: a NIfTI file, or the DICOM files that make up one volume.

    Attributes
    ----------
    name : unique within one discovery, safe as a file name, free of patient data.
    kind : "nifti" or "dicom".
    files : the file, or the DICOM slices in the order of the third array axis.
    modality : "MR", "CT", ... or "" where the format does not say.
    description : SeriesDescription, or the NIfTI header's descrip.
    shape : voxels along i, j, k (and a fourth axis for a 4D NIfTI).
    affine : voxel index to world millimetres, RAS; None where the geometry could not be read.
    problems : why this scan cannot be used, one sentence each with the measured value; empty when usable.
    """

    name: str
    kind: str
    files: tuple[Path, ...]
    modality: str = ""
    description: str = ""
    shape: tuple[int, ...] = ()
    affine: NDArray[np.float64] | None = None
    problems: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether the scan can be read and used as it is."""
        return not self.problems
