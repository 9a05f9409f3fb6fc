"""DICOM: sort files into series by their headers, name what is wrong with each, read the sound ones."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medfusion.errors import MedfusionError
from medfusion.io.dicom_geometry import (
    frames_affine,
    normal,
    numbers,
    position_along_normal,
    stack_affine,
    stack_problems,
)
from medfusion.io.series import Series
from medfusion.volume import Volume

if TYPE_CHECKING:
    from pydicom import Dataset, FileDataset

# All that discovery looks at: reading only these makes it twice as fast.
HEADER_KEYWORDS = [
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality"),
    *("ImageType", "EchoTime", "EchoNumbers", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
]
# Direction cosines of one stack may differ by this much between slices.
ORIENTATION_TOLERANCE = 1e-3


def read_header(path: Path) -> FileDataset | None:
    """Header of a DICOM image, whatever its file is called, without the pixels.

    None for all else: other formats, DICOMDIR, reports, plans.

    Raises
    ------
    MedfusionError : the file is DICOM, or ends in .dcm, and cannot be read.
    """
    import pydicom

    named_dicom = path.suffix.lower() == ".dcm"  # vouches for old files that lack the mark
    try:
        if not named_dicom and not _has_mark(path):
            return None
        with _quiet_pydicom():
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*HEADER_KEYWORDS], force=named_dicom)
            list(header)  # decodes every value, so that a damaged one shows up here
            kind = _class_name(header)
            is_image = bool(_size(header)[0] * _size(header)[1] * _frames(header) and header.get("SeriesInstanceUID"))
    except OSError as error:
        what = f"{path.name}: cannot be read: {error.strerror or 'the file is damaged'}"
        raise MedfusionError(what, fix="mend or remove it") from error
    except Exception as error:  # pydicom's have no common base; not quoted, for a value may run on into a name
        raise MedfusionError(f"{path.name}: the DICOM header is damaged", fix="export it again") from error
    if not kind:
        raise MedfusionError(f"{path.name}: not a DICOM file", fix="export it again")
    if not is_image and "Image Storage" in kind:
        raise MedfusionError(f"{path.name}: the header has no image size or no series", fix="export it again")
    return header if is_image else None


def _has_mark(path: Path) -> bool:
    """Whether a file has "DICM" after its first 128 bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


@contextmanager
def _quiet_pydicom() -> Iterator[None]:
    """Without pydicom's warnings: they concern values that we check or never use, and quote them, names included."""
    import pydicom

    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def describe_dicom(headers: Iterable[FileDataset]) -> list[Series]:
    """Series of the files with these headers, told apart by UID, number, echo, image type and orientation.

    Every series is described; one that cannot be a regular volume says why in ``Series.problems``. The files of a
    series may lie in several folders; folders that hold copies of the same images make a series each.
    """
    groups = _group(headers)
    return [_describe(group, name) for group, name in zip(groups, _names(groups), strict=True)]


def _describe(group: list[FileDataset], name: str) -> Series:
    group = sorted(group, key=lambda header: (position_along_normal(header), _path(header)))
    first = group[0]
    problems, affine = _content_problems(group), None
    shape: tuple[int, ...] = (*_size(first), len(group))
    if _frames(first) > 1:
        shape, affine, frame_problems = _multi_frame_geometry(first)
        problems += frame_problems
    elif "MOSAIC" not in _image_type(first):
        irregular = stack_problems(group)
        affine = None if irregular else stack_affine(group)
        problems += irregular
    return Series(
        name=name,
        kind="dicom",
        files=tuple(_path(header) for header in group),
        modality=str(first.get("Modality") or ""),
        description=_description(first),
        shape=shape,
        affine=affine,
        problems=tuple(problems),
    )


def _path(header: FileDataset) -> Path:
    return Path(str(header.filename))


def _class_name(header: FileDataset) -> str:
    """The standard's name of what the file holds, e.g. "MR Image Storage"; "" where the file does not say."""
    from pydicom.uid import UID

    return UID(str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")).name


def _size(header: FileDataset) -> tuple[int, int]:
    """Pixels along a row and along a column."""
    return int(header.get("Columns") or 0), int(header.get("Rows") or 0)


def _frames(header: FileDataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def _description(header: FileDataset) -> str:
    """SeriesDescription; "" if it cannot be printed, for with a damaged length it runs on into the patient's name."""
    text = str(header.get("SeriesDescription") or "")
    return text if text.isprintable() else ""


def _image_type(header: FileDataset) -> tuple[str, ...]:
    return tuple(str(value) for value in np.atleast_1d(header.get("ImageType") or []))


# --- Which file belongs to which series


def _group(headers: Iterable[FileDataset]) -> list[list[FileDataset]]:
    groups: dict[tuple[object, ...], list[FileDataset]] = defaultdict(list)
    for header in headers:
        own_volume = str(_path(header)) if _frames(header) > 1 else ""
        groups[(*_family(header), *_echo(header), _image_type(header), own_volume)].append(header)
    by_orientation = [part for group in groups.values() for part in _split_by_orientation(group)]
    return [part for group in by_orientation for part in _split_copies(group)]


def _family(header: FileDataset) -> tuple[str, str]:
    return str(header.SeriesInstanceUID), str(header.get("SeriesNumber"))


def _echo(header: FileDataset) -> tuple[float, str]:
    """Echo time in milliseconds (-1 where missing) and echo number."""
    return round(float(np.nan_to_num(numbers(header, "EchoTime", 1)[0], nan=-1)), 2), str(header.get("EchoNumbers"))


def _split_by_orientation(group: list[FileDataset]) -> list[list[FileDataset]]:
    parts: list[tuple[NDArray[np.float64], list[FileDataset]]] = []
    for header in group:
        orientation = numbers(header, "ImageOrientationPatient", 6)
        for known, part in parts:
            if np.allclose(orientation, known, rtol=0, atol=ORIENTATION_TOLERANCE, equal_nan=True):
                part.append(header)
                break
        else:
            parts.append((orientation, [header]))
    return [part for _, part in parts]


def _split_copies(group: list[FileDataset]) -> list[list[FileDataset]]:
    """One part per folder where folders hold copies of the same images; else the group as it is."""
    if len({str(header.get("SOPInstanceUID")) for header in group}) == len(group):
        return [group]
    folders: dict[Path, list[FileDataset]] = defaultdict(list)
    for header in group:
        folders[_path(header).parent].append(header)
    return list(folders.values())


def _names(groups: list[list[FileDataset]]) -> list[str]:
    """``003_t1_mprage``: series number, description, what tells its parts apart; a hash where names still repeat."""
    families: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        families[_family(group[0])].append(index)
    names = [""] * len(groups)
    for members in families.values():
        firsts = [groups[index][0] for index in members]
        for index, first, distinction in zip(members, firsts, _distinctions(firsts), strict=True):
            number = numbers(first, "SeriesNumber", 1)[0]
            parts = ["" if np.isnan(number) else f"{number:03.0f}", _safe(_description(first)), distinction]
            names[index] = "_".join(part for part in parts if part) or "series"
    count = Counter(names)
    return [
        name if count[name] == 1 else f"{name}_{hashlib.sha256(_family(group[0])[0].encode()).hexdigest()[:6]}"
        for name, group in zip(names, groups, strict=True)
    ]


def _distinctions(family: list[FileDataset]) -> list[str]:
    """For each part of one series: its echo, image type and plane, as far as these differ within the series."""
    shared = set.intersection(*(set(_image_type(header)) for header in family))
    labels = np.array(
        [
            [f"te{_echo(header)[0]:g}" if header.get("EchoTime") is not None else "" for header in family],
            [_safe("_".join(value for value in _image_type(header) if value not in shared)) for header in family],
            [_plane(header) for header in family],
        ]
    )
    differing = [row for row in labels if len(set(row)) > 1]
    return ["_".join(_safe(row[part]) for row in differing if row[part]) for part in range(len(family))]


def _plane(header: FileDataset) -> str:
    """Anatomical plane nearest to the slices, "" without an orientation."""
    across = normal(header)
    return "" if np.isnan(across).any() else ("sag", "cor", "ax")[int(np.abs(across).argmax())]


def _safe(text: object) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(text or "").lower()).strip("_")[:40].strip("_")


# --- What is wrong with a series, apart from the geometry of its slices


def _content_problems(group: list[FileDataset]) -> list[str]:
    first, image_type = group[0], "\\".join(_image_type(group[0]))
    description = _description(first)
    problems = []
    colour = [h for h in group if not str(h.get("PhotometricInterpretation") or "MONOCHROME2").startswith("MONOCHROME")]
    if colour:
        problems.append(
            f"colour image: {colour[0].PhotometricInterpretation}, {colour[0].get('SamplesPerPixel')} samples per "
            f"pixel in {len(colour)} of {len(group)} files; intensities are needed"
        )
    if "LOCALIZER" in image_type:
        problems.append(f"localizer: ImageType is {image_type}")
    elif re.search(r"locali[sz]er|scout|survey|topogram|3.?plane", description, re.IGNORECASE):
        problems.append(f'localizer: SeriesDescription is "{description}"')
    if "MOSAIC" in image_type:
        problems.append(
            f"mosaic: each image of {first.Columns} x {first.Rows} pixels is tiled from the slices of a whole volume "
            f"(ImageType {image_type}); convert it to NIfTI with dcm2niix"
        )
    return problems


def _multi_frame_geometry(header: FileDataset) -> tuple[tuple[int, ...], NDArray[np.float64] | None, list[str]]:
    """Shape, affine and problems of a file with many frames: enhanced MR, CT and PET can be volumes."""
    import highdicom

    kind, frames = _class_name(header), _frames(header)
    shape = (*_size(header), frames)
    if not re.match(r"(Legacy Converted )?Enhanced (MR|CT|PET) Image", kind):
        return shape, None, [f"multi-frame: {frames} frames of {kind}; only enhanced MR, CT and PET are read"]
    try:
        with _quiet_pydicom():
            image = highdicom.imread(_path(header), lazy_frame_retrieval=True)
            geometry = image.get_volume_geometry(allow_duplicate_positions=False)
    except Exception:  # highdicom raises whatever a damaged header makes it stumble over
        return shape, None, [f"enhanced multi-frame: the geometry of its {frames} frames is damaged"]
    if geometry is None:
        return shape, None, [f"enhanced multi-frame: its {frames} frames are not one regular stack of single slices"]
    return tuple(geometry.spatial_shape[::-1]), frames_affine(geometry.affine), []


# --- Pixels


def read_dicom(series: Series) -> Volume:
    """Voxels of a series, axes (column, row, slice), rescaled slice by slice to the scan's own units (HU for CT).

    Whole numbers come as int16 (int32 or int64 where they do not fit), all else as float32. Padding stays as stored.
    So does MONOCHROME1: it tells a viewer to show small values bright, and changes no measured value.

    Raises
    ------
    MedfusionError : the series is no regular volume; a file is truncated, or needs a decoder that is not installed.
    """
    if series.affine is None:
        raise MedfusionError(f"{series.name}: {'; '.join(series.problems)}", fix="leave the series out")
    if len(series.files) == 1:
        array = _read_frames(series.files[0], series.name)
    else:
        array = np.stack([_read_slice(path, series.name) for path in series.files])
    if array.dtype == np.float64:  # slices in int32 beside others in float32
        array = array.astype(np.float32)
    return Volume(array.transpose(2, 1, 0), series.affine, series.name, series.modality, series)


def _read_slice(path: Path, name: str) -> NDArray[np.generic]:
    import pydicom
    from pydicom.pixels.processing import apply_modality_lut
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    with _damage_named(path, name):
        dataset = pydicom.dcmread(path, force=True)  # discovery has seen that it is DICOM
        if "TransferSyntaxUID" not in dataset.file_meta:  # an old file without the mark and the preface
            implicit, _ = dataset.original_encoding
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        _require_decoder(dataset, name)
        return _compact(apply_modality_lut(dataset.pixel_array, dataset))


def _read_frames(path: Path, name: str) -> NDArray[np.generic]:
    import highdicom

    with _damage_named(path, name):
        image = highdicom.imread(path)
        _require_decoder(image, name)
        volume = image.get_volume(apply_real_world_transform=False, apply_presentation_lut=False)
        return _compact(volume.array)


@contextmanager
def _damage_named(path: Path, name: str) -> Iterator[None]:
    """Turn whatever pydicom, highdicom and the decoders raise, which has no common base, into one error."""
    try:
        with _quiet_pydicom():
            yield
    except (MedfusionError, MemoryError):
        raise
    except Exception as error:
        what = f"{name}: the pixels cannot be read"
        raise MedfusionError(what, file=path, reason=error, fix="export the series again") from error


def _require_decoder(dataset: Dataset, name: str) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    if not get_decoder(syntax).is_available:
        raise MedfusionError(
            f"{name}: no decoder for its pixels is installed",
            transfer_syntax=syntax.name,
            fix="pip install python-gdcm pylibjpeg pylibjpeg-openjpeg",
        )


def _compact(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Whole numbers as the first of int16, int32, int64 that holds them, all else as float32."""
    if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
        return values.astype(np.float32)
    low, high = values.min(), values.max()
    limits = [np.iinfo(dtype) for dtype in (np.int16, np.int32, np.int64)]
    return values.astype(next(limit.dtype for limit in limits if limit.min <= low and high <= limit.max))
