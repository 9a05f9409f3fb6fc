"""Write tiny real DICOM series; the affine asked for is the truth that reading must give back."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.spatial.transform import Rotation

PATIENT = "Secret^Patient"
# Directions, LPS, in which columns and rows grow on a radiologist's screen.
PLANES = {
    "axial": ([1, 0, 0], [0, 1, 0]),
    "coronal": ([1, 0, 0], [0, 0, -1]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def scanner_affine(
    plane: str = "axial",
    spacing: Sequence[float] = (0.9, 1.1, 2.5),
    origin: Sequence[float] = (-20.0, 31.0, 5.5),
    angles: Sequence[float] = (0.0, 0.0, 0.0),
    flip: bool = False,
) -> NDArray[np.float64]:
    """Voxel (column, row, slice) to RAS millimetres; ``angles`` in degrees make it oblique, ``flip`` left-handed."""
    across, down = PLANES[plane]
    axes = np.array([across, down, np.cross(across, down)], dtype=float).T
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes * spacing
    affine[:3, 2] *= -1 if flip else 1
    affine[:3, 3] = origin
    return LPS_TO_RAS @ affine


def stored_values(shape: Sequence[int] = (5, 6, 4), seed: int = 0) -> NDArray[np.uint16]:
    """Pixel values without any symmetry, 12 bits, axes (column, row, slice)."""
    return np.random.default_rng(seed).integers(0, 4096, shape, dtype=np.uint16)


def write_series(
    folder: Path,
    array: NDArray[Any] | None = None,
    affine: NDArray[np.float64] | None = None,
    *,
    modality: str = "MR",
    slopes: Sequence[float] | None = None,
    intercepts: Sequence[float] | None = None,
    file_name: Callable[[int], str] = "{:03d}.dcm".format,
    edit: Callable[[Dataset, int], object] | None = None,
    **tags: Any,
) -> list[Path]:
    """Write a series, one file a slice; ``tags`` go into every file, ``edit(dataset, k)`` changes slice k."""
    array = stored_values() if array is None else array
    affine = scanner_affine() if affine is None else affine
    series_uid, folder = tags.pop("SeriesInstanceUID", generate_uid()), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(array.shape[2]):
        dataset = slice_dataset(array[:, :, k].T, affine, k, modality)
        dataset.SeriesInstanceUID = series_uid
        if slopes is not None:
            dataset.RescaleSlope, dataset.RescaleIntercept = slopes[k], (intercepts or [0] * len(slopes))[k]
        for keyword, value in tags.items():
            setattr(dataset, keyword, value)
        if edit is not None:
            edit(dataset, k)
        paths.append(folder / file_name(k))
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def slice_dataset(pixels: NDArray[Any], affine: NDArray[np.float64], k: int, modality: str) -> Dataset:
    """One image with the attributes that its type 1 and 2 modules ask for."""
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    dataset.SOPInstanceUID, dataset.StudyInstanceUID = generate_uid(), "1.2.3"
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = "1.2.3.4", ""
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate, dataset.PatientSex = PATIENT, "4711", "", ""
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID, dataset.AccessionNumber = "20200101", "120000", "", ""
    dataset.ContentDate, dataset.ContentTime, dataset.ReferringPhysicianName = "20200101", "120000", ""
    dataset.Manufacturer, dataset.Modality = "Factory", modality
    dataset.SeriesNumber, dataset.SeriesDescription, dataset.InstanceNumber = 3, "t1 MPRAGE", k + 1
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if modality == "CT" else "M"]
    if modality == "MR":
        dataset.EchoTime, dataset.EchoNumbers = 3.5, 1
    dataset.ImagePositionPatient = (lps @ [0, 0, k, 1])[:3].round(9).tolist()
    dataset.ImageOrientationPatient = (lps[:3, :2] / spacing[:2]).T.ravel().round(12).tolist()
    dataset.PixelSpacing, dataset.SliceThickness = [spacing[1].round(9), spacing[0].round(9)], spacing[2].round(9)
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = int(pixels.dtype == np.int16)
    dataset.PixelData = np.ascontiguousarray(pixels).tobytes()
    return dataset
