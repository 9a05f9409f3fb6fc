"""Write what was detected in a DICOM series as DICOM: a segmentation, a parametric map, and pictures of both.

All refer to the source series. Objects: DICOM PS3.3 A.51 (Segmentation), A.75 (Parametric Map), A.8.1 (Secondary
Capture).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import medfusion
from medfusion.errors import MedfusionError
from medfusion.io.dicom_geometry import numbers
from medfusion.io.findings import Finding
from medfusion.io.output import staged
from medfusion.io.series import Series
from medfusion.volume import Volume

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom.dataset import Dataset, FileDataset

# What references are made of; the first is another in each image, the others are the same in all.
_REFERENCE = ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_PLANE = ("ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
_PLACE = ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness")
_EQUIPMENT = ("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "DeviceSerialNumber", "InstitutionName")
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
# Type 2: there, but empty, until the source's own are copied as they are, valid or not.
_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)

_COLOURS = {"brighter": "red", "darker": "blue", "changed": "yellow"}
_OPACITY = 0.75
_SCHEME = "99MEDFUSION"


@dataclass(frozen=True)
class _Source:
    """A scan and its series as highdicom is to see it.

    ``header`` is that of the middle slice, decoded; ``images`` hold, slice by slice, what references and geometry are
    made of, and no patient; ``seed`` makes the UIDs, ``time`` is that of all results.
    """

    scan: Volume
    description: str
    header: FileDataset
    images: list[Dataset]
    seed: list[str]
    time: datetime


def write_dicom_results(
    folder: Path,
    scan: Volume,
    *,
    regions: NDArray[np.int32],
    findings: Sequence[Finding],
    anomaly: NDArray[np.floating[Any]],
    threshold: float,
    overwrite: bool = False,
) -> None:
    """Write a folder of three results that refer to the series of ``scan``, all of them or nothing.

    - ``segmentation.dcm``: a binary Segmentation, one segment for each finding. DICOM has no empty segmentation, so
      there is no such file where there are no findings.
    - ``anomaly.dcm``: a Parametric Map of ``anomaly``, float32, one frame for each slice.
    - ``fused/0001.dcm``, ...: one colour Secondary Capture for each slice, in the order of the source's files: the
      scan in grey, from red to yellow what lies above ``threshold``. CT has the source's window, all else runs from
      the 1st to the 99.5th percentile of the scan.

    Series and instance UIDs depend on the source and the arguments alone, so a repeated run gives the same.
    SeriesNumber is the source's times 100 plus 2, 3 and 4. All files are Explicit VR Little Endian in UTF-8.

    Parameters
    ----------
    folder : appears when all files are written.
    scan : volume whose ``source`` is a usable DICOM series of single-frame files.
    regions : on the grid of ``scan``; n for the voxels of finding n, else 0.
    findings : numbered 1, 2, ...
    anomaly : score on the grid of ``scan``; higher is more anomalous.
    threshold : score above which the pictures have colour.
    overwrite : replace an existing folder.

    Raises
    ------
    MedfusionError : the source is no DICOM series or an enhanced multi-frame file; one of its files is missing or
        damaged; it lacks a UID that references need; a score is not finite; and all that ``staged`` raises.
    ValueError : ``regions`` and ``findings`` do not belong together, or the shapes differ.
    """
    import pydicom

    series = _checked(scan, regions, findings, anomaly)
    seed = [_digest(regions), _digest(anomaly), f"{threshold} {list(findings)}"]
    with _quiet(), staged(folder, overwrite) as beside, _refusal_told(scan.name):
        source = _read_source(scan, series, seed)
        (beside / "fused").mkdir(parents=True)
        if findings:
            result = _segmentation(source, regions, findings)
            pydicom.dcmwrite(beside / "segmentation.dcm", result, enforce_file_format=True)
        result = _parametric_map(source, anomaly)
        pydicom.dcmwrite(beside / "anomaly.dcm", result, enforce_file_format=True)
        for k, picture in enumerate(_pictures(source, anomaly, threshold)):
            result = _capture(source, k, picture)
            pydicom.dcmwrite(beside / "fused" / f"{k + 1:04d}.dcm", result, enforce_file_format=True)


def why_unreferable(series: Series) -> str:
    """Why no results can be written that refer to a series of DICOM files; "" where they can."""
    if len(series.shape) > 2 and len(series.files) != series.shape[2]:
        return "an enhanced multi-frame file"
    try:
        _check_references(series, [_read(path, series.name, list(_REFERENCE)) for path in series.files])
    except MedfusionError as error:
        return f"{error.facts.get('reason', error.what)}"
    return ""


def _checked(
    scan: Volume, regions: NDArray[np.int32], findings: Sequence[Finding], anomaly: NDArray[np.floating[Any]]
) -> Series:
    """The series of the scan, after everything that can be told before a file is opened."""
    if scan.source is None or scan.source.kind != "dicom":
        raise MedfusionError(f"{scan.name}: not a DICOM series", fix="write the results as NIfTI")
    if len(scan.source.files) != scan.shape[2]:
        raise MedfusionError(
            f"{scan.name}: DICOM results of an enhanced multi-frame file cannot be written",
            frames=scan.shape[2],
            files=len(scan.source.files),
            fix="write the results as NIfTI",
        )
    if not regions.shape == anomaly.shape == scan.shape:
        raise ValueError(f"regions {regions.shape} or anomaly {anomaly.shape} do not fit the scan {scan.shape}")
    if [finding.number for finding in findings] != list(range(1, len(findings) + 1)):
        raise ValueError("findings are not numbered 1, 2, ...")
    if regions.min() < 0 or regions.max() > len(findings):
        raise ValueError(f"regions hold {regions.min()} to {regions.max()}, there are {len(findings)} findings")
    bad = anomaly.size - np.count_nonzero(np.isfinite(anomaly))
    if bad:
        raise MedfusionError(f"{scan.name}: {bad} anomaly scores are NaN or infinite", fix="report this case")
    return scan.source


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's complaints about values that are only passed on; they quote them, names included."""
    import pydicom

    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextmanager
def _refusal_told(name: str) -> Iterator[None]:
    """Turn what highdicom raises, which has no errors of its own, into one; it has seen no patient."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MedfusionError(
            f"{name}: DICOM results cannot refer to this series", reason=repr(error), fix="write the results as NIfTI"
        ) from error


def _digest(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# --- The source


def _read_source(scan: Volume, series: Series, seed: list[str]) -> _Source:
    wanted = [*_REFERENCE, *_PLANE, "ImagePositionPatient"]
    slices = [_read(path, series.name, wanted) for path in series.files]
    header = _read(series.files[len(slices) // 2], series.name)
    _check_references(series, slices)
    images = [_image(slices[0], each, header) for each in slices]
    thickness = numbers(header, "SliceThickness", 1)[0]
    for image in images:
        image.SliceThickness = thickness if thickness > 0 else scan.spacing[2]
    seed = [str(slices[0].SeriesInstanceUID), str(slices[0].SOPInstanceUID), *seed]
    return _Source(scan, series.description, header, images, seed, datetime.now())


def _read(path: Path, name: str, keywords: list[str] | None = None) -> FileDataset:
    """Decoded header of one slice, or these elements of it."""
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=keywords, force=True)
        header.decode()  # else the source's letters stay as they are in sequences, whatever the character set
    except Exception as error:  # pydicom's have no common base; not quoted, for a value may run on into a name
        raise MedfusionError(f"{name}: a source file cannot be read", file=path, fix="bring the source back") from error
    return header


def _check_references(series: Series, slices: list[FileDataset]) -> None:
    for keyword in _REFERENCE:
        uids = [str(each.get(keyword) or "") for each in slices]
        lacking = uids.count("")
        distinct = len(slices) if keyword == "SOPInstanceUID" else 1
        if lacking or len(set(uids)) != distinct:
            raise MedfusionError(
                f"{series.name}: DICOM results cannot refer to this series",
                reason=f"{keyword} is missing in {lacking} of {len(slices)} files"
                if lacking
                else f"{len(slices)} files have {len(set(uids))} values of {keyword}",
                fix="export the series again, or write the results as NIfTI",
            )


def _image(first: FileDataset, each: FileDataset, header: FileDataset) -> Dataset:
    """One source image for highdicom: the plane of the first slice, for the directions of others may differ by 1e-3."""
    from pydicom.dataset import Dataset

    image = Dataset()
    for keyword in _EMPTY:
        setattr(image, keyword, None)
    for keywords, dataset in ((_REFERENCE, each), (_PLANE, first), ((*_EQUIPMENT, *_LOSSY, "Modality"), header)):
        for keyword in keywords:
            if keyword in dataset:
                setattr(image, keyword, dataset[keyword].value)
    image.ImagePositionPatient = each.ImagePositionPatient
    image.SpecificCharacterSet = "ISO_IR 192"
    return image


# --- The results


def _identity(source: _Source, offset: int, what: str) -> dict[str, Any]:
    """Series, equipment and time of one result."""
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    number = numbers(source.header, "SeriesNumber", 1)[0]
    number = 0 if np.isnan(number) else max(int(number), 0)
    label = f"{source.description[: 63 - len(what)]} {what}".strip()
    return {
        "series_instance_uid": generate_uid(entropy_srcs=[*source.seed, what]),
        "series_number": min(number * 100, 2**31 - 10) + offset,  # IS holds no more
        "series_description": label.replace("\\", "/"),  # in DICOM a backslash separates values
        "manufacturer": "medfusion",
        "manufacturer_model_name": "medfusion",
        "software_versions": medfusion.__version__,
        "device_serial_number": medfusion.__version__,
        "series_date": source.time.date(),
        "series_time": source.time.time(),
        "content_date": source.time.date(),
        "content_time": source.time.time(),
        "transfer_syntax_uid": ExplicitVRLittleEndian,
    }


def _instance_uid(source: _Source, what: str) -> str:
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=[*source.seed, what, "instance"]))


def _segmentation(source: _Source, regions: NDArray[np.int32], findings: Sequence[Finding]) -> Dataset:
    from highdicom.seg import Segmentation

    result = Segmentation(
        source.images,
        np.ascontiguousarray(regions.T, dtype=np.uint16),  # strided slices take highdicom ten times as long
        "BINARY",
        [_segment(finding) for finding in findings],
        sop_instance_uid=_instance_uid(source, "segmentation"),
        instance_number=1,
        content_label="ANOMALIES",
        content_description="Anomalies found by comparison with healthy anatomy",
        **_identity(source, 2, "anomalies"),
    )
    return _with_patient(result, source)


def _segment(finding: Finding) -> SegmentDescription:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    segment = SegmentDescription(
        finding.number,
        f"Anomaly {finding.number} {finding.direction}, p {finding.p:.2g}",
        codes.SCT.MorphologicallyAbnormalStructure,
        codes.SCT.Lesion,
        "AUTOMATIC",
        AlgorithmIdentificationSequence("medfusion", codes.cid7162.ArtificialIntelligence, medfusion.__version__),
        display_color=CIELabColor.from_string(_COLOURS[finding.direction]),
    )
    place = f", near {finding.label}" if finding.label else ""
    segment.SegmentDescription = (
        f"{finding.volume_ml:.3f} mL, peak score {finding.peak:.3g}, mean {finding.mean:.3g}{place}"[:1024]
    )
    return segment


def _parametric_map(source: _Source, anomaly: NDArray[np.floating[Any]]) -> Dataset:
    from highdicom import VOILUTTransformation
    from highdicom.coding_schemes import CodingSchemeIdentificationItem
    from highdicom.pm import ParametricMap, RealWorldValueMapping
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    values = np.ascontiguousarray(anomaly.T, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    mapping = RealWorldValueMapping(
        lut_label="ANOMALY",
        lut_explanation="Anomaly score",
        unit=codes.UCUM.NoUnits,
        value_range=(low, high),
        slope=1.0,
        intercept=0.0,
        quantity_definition=CodedConcept("anomaly-score", _SCHEME, "Anomaly score"),
    )
    result = ParametricMap(
        source.images,
        values,
        sop_instance_uid=_instance_uid(source, "map"),
        instance_number=1,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[  # the plain linear function has no windows below 1
            VOILUTTransformation((low + high) / 2, max(high - low, 1e-6), voi_lut_function="LINEAR_EXACT")
        ],
        content_label="ANOMALY",
        content_description="Anomaly score; higher is less like healthy anatomy",
        coding_schemes=[CodingSchemeIdentificationItem(_SCHEME, name="medfusion")],
        **_identity(source, 3, "anomaly map"),
    )
    return _with_patient(result, source)


def _capture(source: _Source, k: int, picture: NDArray[np.uint8]) -> Dataset:
    """One fused slice as an image that lies where its source does."""
    from highdicom.sc import SCImage
    from highdicom.sr import CodedConcept
    from pydicom.dataset import Dataset
    from pydicom.sr.codedict import codes

    image = source.images[k]
    along = source.scan.orientation.replace("S", "H").replace("I", "F")  # head and foot
    result = SCImage.from_ref_dataset(
        image,
        picture,
        "RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=(along[0], along[1]),
        pixel_spacing=image.PixelSpacing,
        sop_instance_uid=_instance_uid(source, f"fused {k}"),
        instance_number=k + 1,
        **_identity(source, 4, "fused"),
    )
    for keyword in (*_PLACE, *_LOSSY):
        if keyword in image:
            setattr(result, keyword, image[keyword].value)
    result.PositionReferenceIndicator = ""
    result.BurnedInAnnotation = "YES" if source.header.get("BurnedInAnnotation") == "YES" else "NO"
    result.DerivationDescription = f"Scan in grey, anomaly score in colour (medfusion {medfusion.__version__})"
    result.ImageComments = "Not for diagnosis"
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    purpose = CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)
    reference.PurposeOfReferenceCodeSequence = [purpose]
    result.SourceImageSequence = [reference]
    return _with_patient(result, source)


def _with_patient(result: Dataset, source: _Source) -> Dataset:
    """Add all that the source says of patient and study, unchecked; what it lacks stays empty."""
    result.copy_patient_and_study_information(source.header)
    if result.Modality != "SEG":  # C.7.3.1: empty where unknown, but none in a segmentation
        result.Laterality = source.header.get("Laterality", "")
    return result


# --- The pictures


def _pictures(source: _Source, anomaly: NDArray[np.floating[Any]], threshold: float) -> Iterator[NDArray[np.uint8]]:
    """(row, column, 3): each slice in grey, with a share of colour above the threshold."""
    low, high = _window(source)
    top = max(float(anomaly.max()), threshold + 1e-6)
    for k in range(source.scan.shape[2]):
        grey = (source.scan.array[:, :, k].T.astype(np.float32) - low) / (high - low)
        picture = np.repeat(grey.clip(0, 1)[:, :, None], 3, axis=2)
        score = anomaly[:, :, k].T
        hot = score > threshold
        green = (score[hot] - threshold) / (top - threshold)
        heat = np.stack([np.ones_like(green), green, np.zeros_like(green)], axis=-1)
        picture[hot] = _OPACITY * heat + (1 - _OPACITY) * picture[hot]
        yield np.rint(picture * 255).astype(np.uint8)


def _window(source: _Source) -> tuple[float, float]:
    """Values shown as black and white."""
    centre, width = (
        numbers(source.header, keyword, np.size(source.header.get(keyword)))[0]
        for keyword in ("WindowCenter", "WindowWidth")
    )
    if source.scan.modality == "CT" and np.isfinite(centre) and width > 0:
        return float(centre - width / 2), float(centre + width / 2)
    low, high = np.percentile(source.scan.array[::2, ::2, ::2], [1, 99.5])
    return float(low), max(float(high), float(low) + 1e-6)
