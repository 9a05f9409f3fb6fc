"""Write a synthetic volume as a sagittal MR series, one file per slice, for make.py beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


def write_dicom_series(array: NDArray[np.int16], affine: NDArray[np.float64], folder: Path) -> None:
    """Write the voxels as they are, cut into slices along the first axis.

    `array` is (right, anterior, superior); a slice shows anterior on the left and superior on top, as scanners do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    right, anterior, superior = ((affine[:3, :3] / spacing).T) * RAS_TO_LPS
    top_front = [array.shape[1] - 1, array.shape[2] - 1]
    for index, plane in enumerate(array, start=1):
        dataset = header(index)
        dataset.ImageOrientationPatient = decimals([*-anterior, *-superior])
        position = apply_affine(affine, [index - 1, *top_front]) * RAS_TO_LPS
        dataset.ImagePositionPatient = decimals(position)
        dataset.SliceLocation = decimals([position @ right])[0]
        dataset.PixelSpacing = decimals([spacing[2], spacing[1]])  # between rows, between columns
        dataset.SliceThickness = dataset.SpacingBetweenSlices = decimals([spacing[0]])[0]
        dataset.set_pixel_data(
            np.ascontiguousarray(plane[::-1, ::-1].T.astype(np.uint16)), "MONOCHROME2", 16, generate_instance_uid=False
        )
        dataset.save_as(folder / f"slice_{index:03d}.dcm", enforce_file_format=True)


def decimals(values: object) -> list[str]:
    """DICOM decimal strings of at most 16 characters."""
    return [f"{value:.6f}" for value in np.asarray(values, dtype=float) + 0.0]


def uid(name: str) -> str:
    """The same name gives the same UID on every run, so that the series is reproducible."""
    return generate_uid(entropy_srcs=["medfusion sample data", name])


def header(index: int) -> Dataset:
    """Attributes of one slice, all invented."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = uid(f"slice {index}")
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid("study"), uid("series")
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = uid("frame of reference"), ""
    dataset.PatientName, dataset.PatientID = "SAMPLE^HEAD", "SAMPLE-001"
    dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientPosition = "", "O", "HFS"
    dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", "Synthetic: no patient"
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = "20200101"
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = "120000"
    dataset.StudyID, dataset.AccessionNumber, dataset.ReferringPhysicianName = "1", "", ""
    dataset.SeriesNumber, dataset.AcquisitionNumber, dataset.InstanceNumber = 3, 1, index
    dataset.StudyDescription, dataset.SeriesDescription = "Synthetic head", "T1w sagittal 2 mm, noisy, synthetic"
    dataset.Modality, dataset.BodyPartExamined = "MR", "HEAD"
    dataset.Manufacturer, dataset.ManufacturerModelName = "medfusion", "sample_data/make.py"
    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = ["GR", "IR"], ["SP", "MP"], ""
    dataset.MRAcquisitionType, dataset.ImagedNucleus = "3D", "1H"
    dataset.RepetitionTime, dataset.EchoTime, dataset.InversionTime, dataset.FlipAngle = "2000", "3", "900", "9"
    dataset.EchoTrainLength, dataset.MagneticFieldStrength = 1, "1.5"
    dataset.WindowCenter, dataset.WindowWidth = "400", "800"
    return dataset
