"""Scans in and out: discover what is on disk, read it, write results back in the same format."""

from medfusion.io.derived import write_derived_series
from medfusion.io.discover import discover, read, read_volumes
from medfusion.io.nifti import write_nifti
from medfusion.io.output import disk_full_told, staged
from medfusion.io.series import Series

__all__ = [
    "Series",
    "discover",
    "disk_full_told",
    "read",
    "read_volumes",
    "staged",
    "write_derived_series",
    "write_nifti",
]
