"""Read and write NIfTI volumes; the affine and the header's idea of space survive a round trip bit for bit."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfusion.errors import MedfusionError
from medfusion.io.output import staged
from medfusion.io.series import Series
from medfusion.volume import Volume

SUFFIXES = (".nii", ".nii.gz")

_LARGEST = np.float64(1e30)  # beyond it the sum of squares of a few voxels overflows float32
_MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI unit codes of metres and micrometres; all others are taken as mm
_SPACE_FIELDS = """
    qform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z sform_code srow_x srow_y srow_z xyzt_units
""".split()


def describe_nifti(path: Path, name: str) -> Series:
    """Describe a NIfTI file from its header; whatever makes it unusable is listed in ``problems``, not raised.

    The shape has three axes, or four when the file holds several volumes; a fourth axis of length 1 is dropped.
    The affine is in millimetres whatever unit the header names, and None where it cannot be used.
    """
    try:
        image = _open(path)
    except ValueError as error:
        return Series(name, "nifti", (path,), problems=(str(error),))
    space = _space_problems(path, image)
    return Series(
        name,
        "nifti",
        (path,),
        description=_description(image),
        shape=_shape(image),
        affine=None if space else _affine(image),
        problems=(*_data_problems(path, image), *space),
    )


def read_nifti(series: Series, volume_index: int | None = None) -> Volume:
    """Read the voxels of a NIfTI file; ``volume_index`` chooses one volume, from 0, of a 4D file.

    Integers stored without scaling keep their type, so that labels stay labels. Everything else is float32, or
    float64 where the file stores float64 or scaled 32-bit and wider integers.

    Raises
    ------
    MedfusionError : the file is damaged or unreadable, not a 3D image of real numbers, 4D without an index, or
        holds NaN, infinite or absurdly large values.
    """
    image = _open_whole(series)
    return _volume(series, image, _volume_index(series.name, image, volume_index))


def read_nifti_volumes(series: Series) -> Iterator[Volume]:
    """The volumes of a 4D file in their order, as ``read_nifti`` gives each, from a file that is read once."""
    image = _open_whole(series)
    return (_volume(series, image, index) for index in range(math.prod(_shape(image)[3:])))


def _open_whole(series: Series) -> Any:
    """Open as a nibabel image whose file was found sound to its end."""
    path = series.files[0]
    problems = describe_nifti(path, series.name).problems
    if problems:
        raise MedfusionError(f"{series.name}: {'; '.join(problems)}", file=path, fix="mend the file or leave it out")
    image = _open(path)
    if not _gzipped(path):
        return image
    with _damage_told(series):  # all of it: nibabel stops before the checksum
        return type(image).from_bytes(gzip.decompress(path.read_bytes()))


def _volume(series: Series, image: Any, index: int) -> Volume:
    with _damage_told(series):
        array = image.dataobj[((slice(None),) * 3 + (index, 0, 0, 0))[: len(image.shape)]]
    _check_values(series.name, array)
    return Volume(array.astype(_dtype_in_memory(image, array)), _affine(image), name=series.name, source=series)


@contextmanager
def _damage_told(series: Series) -> Iterator[None]:
    path = series.files[0]
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        what = f"{series.name}: {_reason(path, error)}"
        raise MedfusionError(what, file=path, fix="copy the file again from where it came") from error


def write_nifti(
    volume: Volume | Sequence[Volume], path: Path, *, overwrite: bool = False, description: str = ""
) -> None:
    """Write a volume, or a 4D series of volumes on one grid, to ``.nii`` or ``.nii.gz``, whole or not at all.

    On the grid of a NIfTI source the affine, both space codes and the units are the source's own, bit for bit.
    Otherwise the affine is the sform (code of the source, else scanner) in mm; it is the qform too unless it has
    shear, which a qform cannot hold. Integers and booleans take the smallest of uint8, int16, int32, int64 (or
    uint64) that holds them, all else is float32, also where the source stored integers; nothing is scaled.
    ``description`` goes into the header's descrip, which holds 79 bytes; the rest is cut off.

    Raises
    ------
    MedfusionError : another suffix; NaN or infinite values; and all that ``staged`` raises.
    """
    import nibabel

    if not path.name.endswith(SUFFIXES):
        raise MedfusionError(f"{path.name}: not a NIfTI file name", fix="end it in .nii or .nii.gz")
    first = volume if isinstance(volume, Volume) else volume[0]
    array = first.array if isinstance(volume, Volume) else np.stack([each.array for each in volume], axis=-1)
    _check_values(first.name, array)
    array = array.astype(_dtype_on_disk(array), copy=False)
    source = _source_image(first)
    image_class = nibabel.Nifti1Image if source is None else type(source)
    header = image_class.header_class()
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype)
    header["descrip"] = description.encode()[:79]
    _set_space(header, first, source)
    with staged(path, overwrite) as beside:
        image_class(array, None, header).to_filename(beside)


def _source_image(volume: Volume) -> Any | None:
    """The NIfTI file that the volume came from, None when it came from elsewhere."""
    if volume.source is None or volume.source.kind != "nifti":
        return None
    try:
        return _open(volume.source.files[0])
    except ValueError as error:
        what = f"{volume.name}: its source cannot be read any more: {error}"
        raise MedfusionError(what, file=volume.source.files[0], fix="bring the source back and resume") from error


def _open(path: Path) -> Any:
    """Open as a nibabel image whose voxels are not read yet; ValueError says in one sentence why it cannot be.

    Never memory-mapped: the file may change later.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        with gzip.open(path) if _gzipped(path) else path.open("rb") as file:
            file.read(348)  # raises what nibabel would hide: no permission, not gzip, cut short
        image = nibabel.load(path, mmap=False)
    except (OSError, EOFError, zlib.error, ValueError, ImageFileError, HeaderDataError) as error:
        raise ValueError(_reason(path, error)) from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise ValueError(f"not a NIfTI file but {type(image).__name__}")
    return image


def _gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _reason(path: Path, error: Exception) -> str:
    """Why the file cannot be opened or read, in one sentence."""
    if isinstance(error, FileNotFoundError):
        return "the file is not there"
    if isinstance(error, PermissionError):
        return "no permission to read the file"
    if path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, gzip.BadGzipFile | zlib.error):
        return f"the file is named .gz but its gzip data are not valid ({error})"
    if isinstance(error, EOFError) or "could the file be damaged" in str(error):
        return f"the file is truncated: it ends after {path.stat().st_size} bytes, before its voxels do"
    return f"not a NIfTI file ({getattr(error, 'strerror', None) or error})"


def _data_problems(path: Path, image: Any) -> list[str]:
    """What is wrong with the array that the header announces."""
    problems = []
    shape, dtype = _shape(image), image.get_data_dtype()
    size = " x ".join(map(str, shape))
    if len(shape) not in (3, 4):
        problems.append(f"a volume has 3 axes (4 with time), this file has {len(shape)}: {size}")
    if min(shape) < 1:
        problems.append(f"an axis has no voxels: {size}")
    if dtype.names or dtype.kind not in "iuf":
        kind = "RGB" if dtype.names else dtype.name
        problems.append(f"voxels are {kind}, not real numbers")
    expected = image.dataobj.offset + math.prod(image.shape) * dtype.itemsize
    if not _gzipped(path) and path.stat().st_size < expected:
        problems.append(f"the file is truncated: {path.stat().st_size} of {expected} bytes")
    return problems


def _space_problems(path: Path, image: Any) -> list[str]:
    """What is wrong with the affine."""
    affine = _affine(image)
    if not np.isfinite(affine).all():
        return ["the affine holds NaN or infinite values"]
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if image.header["sform_code"] < 1:  # the voxel size then comes from pixdim, where nibabel mends a 0 to 1
        with gzip.open(path) if _gzipped(path) else path.open("rb") as file:
            sizes = np.abs(type(image.header).from_fileobj(file, check=False)["pixdim"][1:4])
    if min(sizes) == 0 or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        return [f"the affine cannot be inverted: voxel size {' x '.join(f'{s:.4g}' for s in sizes)} mm"]
    return []


def _shape(image: Any) -> tuple[int, ...]:
    """Shape without trailing axes of length 1 beyond the third."""
    shape: tuple[int, ...] = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _affine(image: Any) -> NDArray[np.float64]:
    """Voxel index to millimetres: sform, else qform, else voxel sizes alone, as nibabel picks them."""
    affine: NDArray[np.float64] = image.affine.astype(np.float64)
    affine[:3] *= _unit(image)
    return affine


def _unit(image: Any) -> float:
    return _MILLIMETRES.get(int(image.header["xyzt_units"]) & 7, 1.0)


def _description(image: Any) -> str:
    return bytes(image.header["descrip"]).split(b"\0")[0].decode("utf-8", errors="replace").strip()


def _volume_index(name: str, image: Any, volume_index: int | None) -> int:
    """Check the choice of a volume; a 3D file is one volume, number 0."""
    count = math.prod(_shape(image)[3:])
    if volume_index is None and count > 1:
        raise MedfusionError(
            f"{name}: which of its {count} volumes (0 to {count - 1})?",
            shape=" x ".join(map(str, _shape(image))),
            fix="--volume N",
        )
    index = volume_index or 0
    if not 0 <= index < count:
        raise MedfusionError(
            f"{name}: there is no volume {index}", volumes=count, fix=f"--volume N with N from 0 to {count - 1}"
        )
    return index


def _check_values(name: str, array: NDArray[np.generic]) -> None:
    """Raise on NaN, infinite and absurdly large values, with their number and the first place."""
    if array.dtype.kind != "f":
        return
    sound = np.isfinite(array)
    what = "are NaN or infinite"
    if sound.all():
        sound = np.abs(array) <= _LARGEST
        what = f"are larger than {_LARGEST:g}"
    if not sound.all():
        first = np.unravel_index(int(np.argmin(sound)), array.shape)
        raise MedfusionError(
            f"{name}: {np.count_nonzero(~sound)} of {array.size} voxels {what}",
            first=f"voxel ({', '.join(map(str, first))}) is {array[first]}",
            fix="replace these values or leave the case out",
        )


def _dtype_in_memory(image: Any, array: NDArray[np.generic]) -> np.dtype[Any]:
    stored = image.get_data_dtype()
    if array.dtype.kind in "iu":  # nibabel scales to float, so these were stored without scaling
        return np.dtype(array.dtype.newbyteorder("="))
    wide = stored.itemsize > (4 if stored.kind == "f" else 2)
    return np.dtype(np.float64 if wide else np.float32)


def _dtype_on_disk(array: NDArray[np.generic]) -> np.dtype[Any]:
    if array.dtype.kind not in "biu":
        return np.dtype(np.float32)
    lowest, highest = int(array.min()), int(array.max())
    limits = [np.iinfo(t) for t in ("uint8", "int16", "int32", "int64", "uint64")]
    return next(limit.dtype for limit in limits if limit.min <= lowest and highest <= limit.max)


def _set_space(header: Any, volume: Volume, source: Any | None) -> None:
    """Copy the source's geometry on its own grid; describe another grid in the same world."""
    if source is not None and _unit(source) == 1 and _same_grid(volume, source):
        header["pixdim"][:5] = source.header["pixdim"][:5]  # the fifth is the time between volumes
        for field in _SPACE_FIELDS:
            header[field] = source.header[field]
        return
    world = 0 if source is None else int(source.header["sform_code"]) or int(source.header["qform_code"])
    code = world or 1
    header.set_xyzt_units("mm")
    header.set_sform(volume.affine, code)
    header.set_qform(volume.affine, code)
    if not np.allclose(header.get_qform(), volume.affine, atol=1e-3):
        header["qform_code"] = 0  # readers that prefer the qform must not get an affine without its shear


def _same_grid(volume: Volume, source: Any) -> bool:
    return volume.shape == source.shape[:3] and np.array_equal(volume.affine, source.affine)
