"""What two files have in common that show the same scan, under whatever name, format and patient."""

from __future__ import annotations

import hashlib

import numpy as np

from medfusion.data.grid import canonical
from medfusion.io import Series, read_volumes


def series_uid(series: Series) -> str:
    """SeriesInstanceUID of a DICOM series, "" of a NIfTI file.

    Raises
    ------
    OSError : its first file cannot be read.
    """
    if series.kind != "dicom":
        return ""
    import pydicom

    tags = pydicom.dcmread(series.files[0], stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
    return str(tags.get("SeriesInstanceUID", ""))


def voxel_hash(series: Series) -> str:
    """SHA-256 of the voxels as float32 in RAS order: the same for a DICOM series and the NIfTI file made of it.

    Raises
    ------
    MedfusionError : the scan cannot be read.
    """
    whole = hashlib.sha256()
    for volume in read_volumes(series):
        array = np.ascontiguousarray(canonical(volume).array, np.float32)
        whole.update(str(array.shape).encode())
        whole.update(array.tobytes())
    return whole.hexdigest()
