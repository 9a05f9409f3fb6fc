"""Volume: a 3D scan that never loses its geometry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from medfusion.io.series import Series


@dataclass(frozen=True, eq=False)
class Volume:
    """One 3D image on one grid.

    Attributes
    ----------
    array : (i, j, k), real values in the scan's own units (HU for CT), in the voxel order of its file.
    affine : (4, 4) float64, voxel index to world millimetres, axes RAS (right, anterior, superior).
    name : case name without suffix, safe as a file name; never a patient name.
    modality : "MR", "CT" or "" where the format does not say.
    source : the Series this volume was read from, so that results are written back in the same format.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    name: str = "volume"
    modality: str = ""
    source: Series | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "affine", np.asarray(self.affine, dtype=np.float64))
        if self.array.ndim != 3:
            raise ValueError(f"a Volume is 3D, got shape {self.array.shape}")
        if self.affine.shape != (4, 4):
            raise ValueError(f"an affine is 4 x 4, got shape {self.affine.shape}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along i, j, k."""
        i, j, k = self.array.shape
        return i, j, k

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Voxel size along i, j, k in millimetres."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def orientation(self) -> str:
        """Direction in which i, j, k grow, to the nearest world axis: "RAS", "LPS", "PSR", ..."""
        import nibabel

        return "".join(nibabel.orientations.aff2axcodes(self.affine))

    def with_array(self, array: ArrayLike, *, name: str | None = None) -> Volume:
        """Other values on the same grid."""
        array = np.asarray(array)
        if array.shape != self.array.shape:
            raise ValueError(f"{self.name}: an array of shape {array.shape} does not fit the grid {self.array.shape}")
        return replace(self, array=array, name=name or self.name)

    def to_world(self, index: ArrayLike) -> NDArray[np.float64]:
        """World RAS millimetres of voxel indices (..., 3)."""
        return np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        spacing = " x ".join(f"{s:.4g}" for s in self.spacing)
        return (
            f"Volume({self.name}: {self.modality or 'unknown modality'}, {size} voxels, {spacing} mm, "
            f"{self.orientation}, {self.array.dtype}, {self.array.nbytes / 2**20:.1f} MiB)"
        )
