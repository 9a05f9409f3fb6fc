"""Write a result as a derived DICOM series: one file per source slice, same patient, study and geometry, new identity.

Rules: DICOM PS3.3 C.7.6.1 (derived images), C.7.6.1.1.2 (image type), C.12.1 (contributing equipment).
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

import medfusion
from medfusion.errors import MedfusionError
from medfusion.io.output import staged
from medfusion.io.series import Series
from medfusion.volume import Volume

if TYPE_CHECKING:
    from pydicom.dataset import Dataset, FileDataset

    Slice: TypeAlias = FileDataset

_GRID_TOLERANCE_MM = 1e-4

# Statements about the old pixels, or about the old file as a whole, that no longer hold.
_STALE = [
    *("SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries", "LargestPixelValueInSeries"),
    *("IconImageSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "SeriesDescriptionCodeSequence"),
    *("InstanceCreatorUID", "MACParametersSequence", "DigitalSignaturesSequence", "DataSetTrailingPadding"),
]


@dataclass(frozen=True)
class _Derivation:
    """What is the same in every slice of one derived series."""

    series_uid: str
    seed: list[str]
    description: str
    text: str
    smoothing: bool
    time: datetime


def write_derived_series(
    volume: Volume,
    source: Series,
    folder: Path,
    *,
    description: str,
    derivation: str,
    smoothing: bool = False,
    overwrite: bool = False,
) -> None:
    """Write ``volume`` as a folder of ``0001.dcm``, ``0002.dcm``, ... in the order of ``source.files``, or nothing.

    Values go back through each slice's own slope and intercept, are rounded to whole numbers and, where the source's
    bits do not hold them, clipped with a warning that counts them; voxels of the source's PixelPaddingValue keep it.
    UIDs depend on the source, the voxels, ``description`` and ``derivation`` alone, so a repeated run gives the same.
    SeriesNumber is the source's times 100 plus 1. All files are Explicit VR Little Endian. Private elements are left
    out: nobody but their vendor can tell whether they still hold for the new pixels.

    Parameters
    ----------
    volume : result on the grid of ``source``, in its units.
    source : usable DICOM series of single-frame files.
    folder : appears when all files are written.
    description : what became of the source, e.g. "denoised"; follows the source's own SeriesDescription, which is cut
        so that both fit into DICOM's 64 characters.
    derivation : how the voxels were made, with the settings that matter; goes into DerivationDescription after what
        the source says of its own derivation, followed by this tool's version.
    smoothing : whether the derivation is noise reduction, coded as (113087, DCM, "Smoothing"), the nearest there is.
    overwrite : replace an existing folder.

    Raises
    ------
    MedfusionError : the grids differ; a source file is missing, unreadable, multi-frame or in colour; a voxel is
        not finite; and all that ``staged`` raises.
    """
    import pydicom

    _check(volume, source)
    derived = _derivation(volume, source, description, derivation, smoothing)
    clipped = 0
    with staged(folder, overwrite) as beside, pydicom.config.disable_value_validation():
        beside.mkdir()
        for k, path in enumerate(source.files):
            dataset = _read(path, source.name)
            clipped += _set_pixels(dataset, volume.array[:, :, k].T, source.name)
            _drop_stale(dataset)
            _set_provenance(dataset, derived)
            _set_identity(dataset, derived)
            pydicom.dcmwrite(beside / f"{k + 1:04d}.dcm", dataset, enforce_file_format=True)
    if clipped:
        logging.getLogger(__name__).warning(
            "%s: %d of %d voxels do not fit the bits of the source's pixels and were clipped",
            source.name,
            clipped,
            volume.array.size,
        )


def _check(volume: Volume, source: Series) -> None:
    """Everything that can be told before a file is opened."""
    if source.kind != "dicom" or source.affine is None:
        raise MedfusionError(f"{source.name}: not a DICOM series with geometry", fix="write the result as NIfTI")
    if len(source.files) != source.shape[2]:
        raise MedfusionError(
            f"{source.name}: a derived series of an enhanced multi-frame file cannot be written",
            frames=source.shape[2],
            files=len(source.files),
            fix="write the result as NIfTI",
        )
    if volume.shape != source.shape or not np.allclose(volume.affine, source.affine, rtol=0, atol=_GRID_TOLERANCE_MM):
        raise MedfusionError(
            f"{source.name}: the result does not lie on the grid of its source",
            result=f"{volume.shape}, affine {volume.affine[:3].round(4).tolist()}",
            source=f"{source.shape}, affine {source.affine[:3].round(4).tolist()}",
            fix="resample the result to the source",
        )
    missing = [path for path in source.files if not path.is_file()]
    if missing:
        raise MedfusionError(
            f"{source.name}: {len(missing)} of {len(source.files)} source files are not there any more",
            first=missing[0],
            fix="bring the source back",
        )
    bad = volume.array.size - np.count_nonzero(np.isfinite(volume.array))
    if bad:
        raise MedfusionError(f"{source.name}: {bad} voxels of the result are NaN or infinite", fix="report this case")


def _derivation(volume: Volume, source: Series, description: str, derivation: str, smoothing: bool) -> _Derivation:
    from pydicom.uid import generate_uid

    first = _read(source.files[0], source.name)
    voxels = hashlib.sha256(np.ascontiguousarray(volume.array).tobytes()).hexdigest()
    seed = [str(first.SeriesInstanceUID), str(first.SOPInstanceUID), description, derivation, voxels]
    text = f"{derivation} (medfusion {medfusion.__version__})"
    label = f"{source.description[: max(0, 63 - len(description))]} {description}".strip()[:64]
    label = label.replace("\\", "/")  # in DICOM a backslash separates values
    return _Derivation(generate_uid(entropy_srcs=seed), seed, label, text, smoothing, datetime.now(UTC))


def _read(path: Path, name: str) -> Slice:
    """One source slice, single-frame and grey."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        dataset = pydicom.dcmread(path, force=path.suffix.lower() == ".dcm")
    except (OSError, InvalidDicomError) as error:
        raise MedfusionError(f"{name}: a source file cannot be read", file=path, reason=error) from error
    for present, what in (
        (int(dataset.get("NumberOfFrames") or 1) > 1 or "PerFrameFunctionalGroupsSequence" in dataset, "multi-frame"),
        (dataset.get("SamplesPerPixel", 1) != 1, "in colour"),
        ("PixelData" not in dataset, "without whole-number pixels"),
        ("ModalityLUTSequence" in dataset, "rescaled by a table, which cannot be undone"),
    ):
        if present:
            raise MedfusionError(
                f"{name}: a derived series of images {what} cannot be written", file=path, fix="write NIfTI"
            )
    return dataset


def _set_pixels(dataset: Slice, values: NDArray[np.generic], name: str) -> int:
    """Store values (row, column) as the source stored its own; return how many had to be clipped."""
    slope, intercept = _rescale(dataset)
    if slope == 0 or values.shape != (dataset.Rows, dataset.Columns):
        raise MedfusionError(
            f"{name}: a source file does not fit the result",
            file=dataset.filename,
            slope=slope,
            rows_and_columns=f"{dataset.Rows} x {dataset.Columns}, result {values.shape[0]} x {values.shape[1]}",
            fix="find the series again",
        )
    signed = dataset.PixelRepresentation == 1
    dtype = np.dtype(f"<{'i' if signed else 'u'}{dataset.BitsAllocated // 8}")
    bits = dataset.BitsStored - signed
    low, high = -(2**bits) if signed else 0, 2**bits - 1
    stored = np.rint((values.astype(np.float64) - intercept) / slope)
    outside = (stored < low) | (stored > high)
    pixels = stored.clip(low, high).astype(dtype)
    padding = _padding(dataset)
    if padding is not None:
        pixels = np.where(padding, dataset.pixel_array, pixels).astype(dtype)
        outside &= ~padding
    dataset.add_new(
        "PixelData", "OW" if dataset.BitsAllocated > 8 else "OB", pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    )
    return int(np.count_nonzero(outside))


def _rescale(dataset: Dataset) -> tuple[float, float]:
    """Slope and intercept from stored to real values; like pydicom, only where both are given."""
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return (1.0, 0.0) if slope is None or intercept is None else (float(slope), float(intercept))


def _padding(dataset: Slice) -> NDArray[np.bool_] | None:
    """Where the source holds padding, from PixelPaddingValue to PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    stored = dataset.pixel_array
    # Some scanners give a negative value its unsigned reading, or the other way round: wrap it as the pixels are.
    limits = np.array([value, dataset.get("PixelPaddingRangeLimit", value)], dtype=np.int64).astype(stored.dtype)
    return np.asarray((stored >= limits.min()) & (stored <= limits.max()))


def _drop_stale(dataset: Slice) -> None:
    """Remove what the new pixels make untrue, and turn what stays to little endian."""
    dataset.remove_private_tags()
    for keyword in _STALE:
        if keyword in dataset:
            del dataset[keyword]
    for tag in [tag for tag in dataset.keys() if tag.group & 0xFF01 == 0x6000]:
        if (tag.group, 0x3000) not in dataset:  # an overlay in the unused bits of the old pixels
            del dataset[tag]
    if dataset.original_encoding[1] is False:  # big endian; pydicom turns all but words of bytes
        for element in dataset.iterall():
            if element.VR == "OW" and element.keyword != "PixelData" and element.value:
                element.value = np.frombuffer(element.value, ">u2").astype("<u2").tobytes()


def _set_provenance(dataset: Slice, derived: _Derivation) -> None:
    """Say that the image is derived, from what, how and by which tool; the source's own history stays."""
    from pydicom.dataset import Dataset

    if not (derived.text + derived.description).isascii():  # the source's character set may lack a letter of it
        dataset.decode()
        dataset.SpecificCharacterSet = "ISO_IR 192"
    kind = dataset.get("ImageType") or []
    third = "AXIAL" if dataset.get("Modality") == "CT" else "OTHER"  # MR and CT are not valid without one
    dataset.ImageType = ["DERIVED", "SECONDARY", *((not isinstance(kind, str) and kind[2:]) or [third])]

    history = str(dataset.get("DerivationDescription") or "")
    room = 1024 - len(derived.text) - 2
    dataset.DerivationDescription = f"{history[:room]}; {derived.text}" if history else derived.text[:1024]
    if derived.smoothing:
        _append(dataset, "DerivationCodeSequence", _code("113087", "Smoothing"))

    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    image.PurposeOfReferenceCodeSequence = [_code("121322", "Source image for image processing operation")]
    dataset.SourceImageSequence = [image]

    tool = Dataset()
    tool.PurposeOfReferenceCodeSequence = [_code("109102", "Processing Equipment")]
    tool.Manufacturer = tool.ManufacturerModelName = "medfusion"
    tool.SoftwareVersions = medfusion.__version__
    tool.ContributionDescription = derived.description
    _append(dataset, "ContributingEquipmentSequence", tool)


def _set_identity(dataset: Slice, derived: _Derivation) -> None:
    """New instance and series; patient, study, frame of reference and InstanceNumber stay."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[*derived.seed, str(dataset.SOPInstanceUID)])
    dataset.SeriesInstanceUID = derived.series_uid
    dataset.SeriesNumber = min(int(dataset.get("SeriesNumber") or 0) * 100 + 1, 2**31 - 1)  # as much as IS holds
    dataset.SeriesDescription = derived.description

    offset = dataset.get("TimezoneOffsetFromUTC")
    now = derived.time.astimezone(datetime.strptime(offset, "%z").tzinfo if offset else None)
    for stem in ("Series", "Content", "InstanceCreation"):
        setattr(dataset, f"{stem}Date", now.strftime("%Y%m%d"))
        setattr(dataset, f"{stem}Time", now.strftime("%H%M%S.%f"))

    dataset.preamble = b"\0" * 128
    dataset.file_meta = FileMetaDataset()  # dcmwrite copies class and instance UID into it
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def _code(value: str, meaning: str) -> Dataset:
    from pydicom.dataset import Dataset

    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
    return code


def _append(dataset: Dataset, keyword: str, item: Dataset) -> None:
    setattr(dataset, keyword, [*(dataset.get(keyword) or []), item])
