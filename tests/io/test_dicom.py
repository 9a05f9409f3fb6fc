"""DICOM series read back as they were written, against SimpleITK, and against the references that come with scans."""

import time
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_factory import LPS_TO_RAS, scanner_affine, stored_values, write_series
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from medfusion.errors import MedfusionError
from medfusion.io.discover import discover, read
from medfusion.io.series import Series
from medfusion.volume import Volume

GEOMETRIES = {
    "axial": scanner_affine("axial"),
    "sagittal": scanner_affine("sagittal"),
    "coronal": scanner_affine("coronal"),
    "axial, head first to feet first": scanner_affine("axial", flip=True),
    "sagittal, right to left": scanner_affine("sagittal", flip=True),
    "oblique": scanner_affine("axial", angles=(12, 0, 0)),
    "double oblique": scanner_affine("coronal", angles=(12, -7, 21)),
    "double oblique, flipped": scanner_affine("sagittal", angles=(-17, 9, 4), flip=True),
}


def canonical(array: np.ndarray, affine: np.ndarray) -> nibabel.Nifti1Image:
    """The same voxels in RAS order, without resampling."""
    return nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine, dtype=array.dtype))


def assert_same_in_world(volume: Volume, array: np.ndarray, affine: np.ndarray, atol: float = 1e-6) -> None:
    found, expected = canonical(np.asarray(volume.array), volume.affine), canonical(array, affine)
    np.testing.assert_allclose(found.affine, expected.affine, atol=atol)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))


def assert_as_simpleitk(volume: Volume, series: Series) -> None:
    image = SimpleITK.ReadImage([str(file) for file in series.files])
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    far_corner = np.array(volume.shape) - 1
    np.testing.assert_allclose(volume.affine, LPS_TO_RAS @ affine, atol=1e-3)
    np.testing.assert_allclose(volume.to_world(far_corner), (LPS_TO_RAS @ affine @ [*far_corner, 1])[:3], atol=1e-3)
    values = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    np.testing.assert_array_equal(volume.array, values.astype(volume.array.dtype))


def only(folder: Path) -> Series:
    (series,) = discover(folder)
    return series


@pytest.mark.parametrize("affine", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometry_is_that_of_the_scanner(tmp_path: Path, affine: np.ndarray) -> None:
    array = stored_values()
    shuffled = [2, 0, 3, 1]  # file names say nothing about the order of slices
    write_series(tmp_path, array, affine, file_name=lambda k: f"{shuffled[k]}.dcm")
    series = only(tmp_path)
    volume = read(series)
    assert not series.problems
    assert volume.shape == series.shape == array.shape
    assert_same_in_world(volume, array, affine)
    assert_as_simpleitk(volume, series)
    first = pydicom.dcmread(series.files[0]).ImagePositionPatient
    np.testing.assert_allclose(volume.to_world([0, 0, 0]), np.array(first) * [-1, -1, 1], atol=1e-9)
    assert volume.source is series
    assert (volume.name, volume.modality) == ("003_t1_mprage", "MR")


def test_ct_is_in_hounsfield_units(tmp_path: Path) -> None:
    array = stored_values()
    write_series(tmp_path, array, modality="CT", slopes=[1] * 4, intercepts=[-1024] * 4)
    volume = read(only(tmp_path))
    np.testing.assert_array_equal(volume.array, array.astype(int) - 1024)
    assert volume.array.dtype == np.int16
    assert volume.modality == "CT"


def test_each_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    array, slopes, intercepts = stored_values(), [0.5, 1.25, 0.0010346, 2], [0, -3.5, 33.9012, 7]
    write_series(tmp_path, array, slopes=slopes, intercepts=intercepts)
    volume = read(only(tmp_path))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, (array * np.array(slopes) + intercepts).astype(np.float32))


def test_whole_numbers_beside_fractions_stay_float32(tmp_path: Path) -> None:
    array = stored_values()
    write_series(tmp_path, array, slopes=[100, 0.5, 1, 1])
    volume = read(only(tmp_path))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, (array * np.array([100, 0.5, 1, 1])).astype(np.float32))


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (stored_values().astype(np.int16) - 2000, np.int16),
        (stored_values(), np.int16),
        (stored_values() + np.uint16(60000), np.int32),
    ],
    ids=["signed", "12 bits", "16 bits"],
)
def test_whole_numbers_stay_whole(tmp_path: Path, array: np.ndarray, dtype: type) -> None:
    write_series(tmp_path, array)
    volume = read(only(tmp_path))
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, array)


def test_monochrome1_and_padding_are_as_stored(tmp_path: Path) -> None:
    array = stored_values().astype(np.int16)
    array[0] = -2000
    write_series(tmp_path, array, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=-2000)
    np.testing.assert_array_equal(read(only(tmp_path)).array, array)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.keyword)
def test_compressed_pixels(tmp_path: Path, syntax: pydicom.uid.UID) -> None:
    array = stored_values((64, 72, 3))
    write_series(tmp_path, array, edit=lambda dataset, _: dataset.compress(syntax))
    np.testing.assert_array_equal(read(only(tmp_path)).array, array)


def test_a_missing_decoder_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path, edit=lambda dataset, _: dataset.compress(JPEGLSLossless))
    monkeypatch.setattr(pydicom.pixels.decoders.JPEGLSLosslessDecoder, "_available", {})
    with pytest.raises(MedfusionError, match="003_t1_mprage: no decoder") as caught:
        read(only(tmp_path))
    assert "JPEG-LS Lossless" in str(caught.value)
    assert "pip install python-gdcm" in caught.value.fix


def test_discovery_reads_headers_only_and_reading_finds_truncated_pixels(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-20])
    series = only(tmp_path)
    assert series.usable
    with pytest.raises(MedfusionError, match="003_t1_mprage: the pixels cannot be read") as caught:
        read(series)
    assert "002.dcm" in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_truncated_compressed_pixels(tmp_path: Path) -> None:
    paths = write_series(tmp_path, stored_values((40, 30, 3)), edit=lambda dataset, _: dataset.compress(RLELossless))
    paths[1].write_bytes(paths[1].read_bytes()[:-400])
    with pytest.raises(MedfusionError, match="the pixels cannot be read"):
        read(only(tmp_path))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    series = only(tmp_path)
    paths[3].unlink()
    with pytest.raises(MedfusionError, match="the pixels cannot be read") as caught:
        read(series)
    assert "003.dcm" in str(caught.value)


def test_old_files_without_mark_and_preface(tmp_path: Path) -> None:
    array = stored_values()
    for path in write_series(tmp_path, array):
        dataset = pydicom.dcmread(path)
        del dataset.file_meta
        dataset.save_as(path, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(read(only(tmp_path)).array, array)


def move_slice(dataset: pydicom.Dataset, millimetres: float, axis: int = 2) -> None:
    position = list(dataset.ImagePositionPatient)
    position[axis] += millimetres
    dataset.ImagePositionPatient = position


def delete(keyword: str, where: int):
    return lambda dataset, k: dataset.__delattr__(keyword) if k == where else None


def make_colour(dataset: pydicom.Dataset, _: int) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = bytes(3 * dataset.Rows * dataset.Columns)


def make_smaller(dataset: pydicom.Dataset, k: int) -> None:
    if k == 1:
        dataset.Rows, dataset.PixelData = 4, dataset.PixelData[: 2 * 4 * dataset.Columns]


# In the axial geometry slices lie at 5.5, 8, 10.5, ... mm.
EDITS = {
    "uneven": (
        lambda dataset, k: move_slice(dataset, 0.5 if k == 2 else 0),
        "uneven spacing: steps of 2 to 3 mm between slices, up to 0.5 mm off an even grid",
    ),
    "shifted in plane": (
        lambda dataset, k: move_slice(dataset, 0.5 if k == 2 else 0, axis=0),
        "uneven spacing: steps of 2.5 to 2.5 mm between slices, up to 0.5 mm off an even grid",
    ),
    "duplicate": (
        lambda dataset, k: move_slice(dataset, -2.5 if k == 5 else 0),
        "duplicate positions: 6 files lie at 5 positions (the first shared one at 15.50 mm)",
    ),
    "tilted": (
        lambda dataset, k: move_slice(dataset, k * 2.5 * np.tan(np.radians(12)), axis=1),
        "gantry tilt: the stack of slices leans by 12.0 degrees",
    ),
    "colour": (make_colour, "colour image: RGB, 3 samples per pixel in 6 of 6 files; intensities are needed"),
    "localizer": (
        lambda dataset, _: setattr(dataset, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        r"localizer: ImageType is ORIGINAL\PRIMARY\LOCALIZER",
    ),
    "scout": (
        lambda dataset, _: setattr(dataset, "SeriesDescription", "AAHead_Scout"),
        'localizer: SeriesDescription is "AAHead_Scout"',
    ),
    "mosaic": (
        lambda dataset, _: setattr(dataset, "ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]),
        "mosaic: each image of 5 x 6 pixels is tiled from the slices of a whole volume "
        r"(ImageType ORIGINAL\PRIMARY\M\MOSAIC); convert it to NIfTI with dcm2niix",
    ),
    "mixed sizes": (make_smaller, "mixed sizes: 5 x 6 of 0.9 x 1.1 mm (5 files), 5 x 4 of 0.9 x 1.1 mm (1 files)"),
    "no position": (
        delete("ImagePositionPatient", 4),
        "no geometry: ImagePositionPatient is missing in 1 of 6 files",
    ),
    "no spacing": (delete("PixelSpacing", 0), "no geometry: PixelSpacing is missing in 1 of 6 files"),
    "no size": (
        lambda dataset, _: setattr(dataset, "PixelSpacing", [0, 1]),
        "no geometry: PixelSpacing is [0.0, 1.0]",
    ),
    "skewed": (
        lambda dataset, _: setattr(dataset, "ImageOrientationPatient", [1, 0, 0, 0.5, 0.5, 0]),
        "no geometry: ImageOrientationPatient [1.0, 0.0, 0.0, 0.5, 0.5, 0.0] is not two perpendicular unit vectors",
    ),
}


@pytest.mark.parametrize(("edit", "problem"), EDITS.values(), ids=EDITS)
def test_every_problem_is_named_with_its_measure(tmp_path: Path, edit, problem: str) -> None:
    write_series(tmp_path / "bad", stored_values((5, 6, 6)), edit=edit)
    write_series(tmp_path / "good", SeriesNumber=9)
    bad, good = discover(tmp_path)
    assert bad.problems == (problem,)
    assert good.usable
    with pytest.raises(MedfusionError, match="cannot be used") as caught:
        read(bad)
    assert problem in str(caught.value)


def test_missing_slices_are_counted_and_placed(tmp_path: Path) -> None:
    paths = write_series(tmp_path, stored_values((5, 6, 12)))
    for k in (3, 8, 9):
        paths[k].unlink()
    assert only(tmp_path).problems == ("missing slices: 3 at a spacing of 2.5 mm (1 after 10.50 mm, 2 after 23.00 mm)",)


def test_repeated_time_points_are_duplicates(tmp_path: Path) -> None:
    for repeat in range(3):
        write_series(tmp_path, SeriesInstanceUID="1.2.840.9", file_name=lambda k, repeat=repeat: f"{repeat}_{k}")
    (problem,) = only(tmp_path).problems
    assert problem == "duplicate positions: 12 files lie at 4 positions (the first shared one at 5.50 mm)"


def test_a_single_slice_is_no_volume(tmp_path: Path) -> None:
    write_series(tmp_path, stored_values((5, 6, 1)))
    assert only(tmp_path).problems == ("single slice: a volume needs two slices or more, found 1",)


def test_rounded_positions_are_no_problem(tmp_path: Path) -> None:
    affine = scanner_affine(spacing=(0.5, 0.5, 0.625), angles=(10, 5, 0))

    def round_position(dataset: pydicom.Dataset, _: int) -> None:
        dataset.ImagePositionPatient = np.round(np.array(dataset.ImagePositionPatient, float), 1).tolist()

    write_series(tmp_path, stored_values((4, 4, 40)), affine, edit=round_position)
    assert only(tmp_path).problems == ()


def write_multi_frame(folder: Path, affine: np.ndarray, array: np.ndarray) -> None:
    from highdicom.legacy import LegacyConvertedEnhancedMRImage

    datasets = [pydicom.dcmread(path) for path in write_series(folder / "slices", array, affine)]
    image = LegacyConvertedEnhancedMRImage(datasets, "1.2.3.5", 5, "1.2.3.6", 1)
    (folder / "enhanced").mkdir()
    image.save_as(folder / "enhanced" / "image", enforce_file_format=True)


def test_enhanced_multi_frame_is_read(tmp_path: Path) -> None:
    affine, array = scanner_affine("sagittal", angles=(5, 10, -3)), stored_values()
    write_multi_frame(tmp_path, affine, array)
    series = only(tmp_path / "enhanced")
    assert series.usable
    assert series.shape == array.shape
    assert_same_in_world(read(series), array, affine, atol=1e-5)


def test_enhanced_multi_frame_with_a_gap_is_refused(tmp_path: Path) -> None:
    write_multi_frame(tmp_path, scanner_affine(), stored_values())
    path = tmp_path / "enhanced" / "image"
    dataset = pydicom.dcmread(path)
    last = dataset.PerFrameFunctionalGroupsSequence[-1].PlanePositionSequence[0]
    move_slice(last, 40.0)
    dataset.save_as(path)
    (problem,) = only(tmp_path / "enhanced").problems
    assert problem == "enhanced multi-frame: its 4 frames are not one regular stack of single slices"


def test_other_multi_frame_images_are_refused(tmp_path: Path) -> None:
    write_series(
        tmp_path, stored_values((5, 6, 1)), NumberOfFrames=7, SOPClassUID=pydicom.uid.UltrasoundMultiFrameImageStorage
    )
    (problem,) = only(tmp_path).problems
    assert problem.startswith("multi-frame: 7 frames of Ultrasound Multi-frame Image Storage")


def test_hundreds_of_files_are_discovered_at_once(tmp_path: Path) -> None:
    write_series(tmp_path, stored_values((256, 256, 176)))
    start = time.perf_counter()
    assert only(tmp_path).usable
    assert time.perf_counter() - start < 2


# --- Real scans

EXPECTED = {  # folder: (number of series, start of the problems found)
    "ct_chest_siemens_30": (1, set()),
    "dual_echo/In": (2, set()),
    "mr_t1_mprage_siemens_176": (1, set()),
    "mr_tumour_study": (3, set()),
    "transfer_syntaxes/In": (9, {"mosaic"}),
    "vendors/ge_anatomical/001": (1, set()),
    "vendors/ge_anatomical/001_implicit": (1, set()),
    "vendors/ge_anatomical/001_single_slice": (1, {"single slice"}),
    "vendors/generic_anatomical/001": (1, set()),
    "vendors/generic_anatomical/001_implicit": (1, set()),
    "vendors/generic_anatomical/002_non_isotropic": (1, set()),
    "vendors/generic_compressed/001": (1, set()),
    "vendors/generic_compressed_j2k/001": (1, set()),
    "vendors/generic_compressed_jpeg/001": (1, set()),
    "vendors/generic_compressed_jpegls/001": (1, set()),
    "vendors/generic_compressed_rle/001": (1, set()),
    "vendors/generic_rgb/001": (1, {"colour image"}),
    "vendors/philips_anatomical/001": (1, set()),
    "vendors/philips_anatomical/002": (2, set()),
    "vendors/siemens_anatomical/001": (1, set()),
    "vendors/siemens_anatomical/001_implicit": (1, set()),
}


@pytest.mark.parametrize("folder", EXPECTED)
def test_real_series_are_found_and_read_as_by_simpleitk(real_data: Path, folder: str) -> None:
    found = discover(real_data / "dicom" / folder)
    problems = {problem.split(":")[0] for series in found for problem in series.problems}
    assert (len(found), problems) == EXPECTED[folder]
    for series in found:
        if series.usable:
            assert_as_simpleitk(read(series), series)


def test_all_folders_at_once_hold_the_same_series(real_data: Path) -> None:
    """Copies of one series in several folders, compressed in several ways, stay apart."""
    found = [series for series in discover(real_data / "dicom") if series.kind == "dicom"]
    assert len(found) == sum(count for count, _ in EXPECTED.values())
    assert len({series.name for series in found}) == len(found)


@pytest.mark.parametrize("folder", [name for name in EXPECTED if name.startswith("vendors") and EXPECTED[name][0] == 1])
def test_real_series_are_as_their_reference(real_data: Path, folder: str) -> None:
    reference = real_data / "dicom" / f"{folder}_ground_truth.nii.gz"
    (series,) = discover(real_data / "dicom" / folder)
    if not series.usable:
        assert series.problems
        return
    image = nibabel.load(reference)
    volume = read(series)
    expected = np.asanyarray(image.dataobj).astype(volume.array.dtype)
    assert_same_in_world(volume, expected, image.affine, atol=1e-3)


def test_both_echoes_are_as_their_reference(real_data: Path) -> None:
    found = discover(real_data / "dicom/dual_echo/In")
    references = sorted((real_data / "dicom/dual_echo/Ref").glob("*.nii"))
    assert [series.name[-4:] for series in found] == ["te11", "te92"]
    for series, reference in zip(found, references, strict=True):
        image = nibabel.load(reference)
        assert_same_in_world(read(series), np.asanyarray(image.dataobj), image.affine, atol=1e-3)


def test_every_transfer_syntax_decodes_to_the_reference(real_data: Path) -> None:
    """Mosaics are refused as volumes, so each is read as if it were two equal slices, and cut into its tiles here."""
    for series in discover(real_data / "dicom/transfer_syntaxes/In"):
        mosaic = read(replace(series, files=series.files * 2, affine=np.eye(4), problems=())).array[:, :, 0]
        tiles = mosaic.reshape(6, 64, 6, 64).transpose(1, 3, 2, 0).reshape(64, 64, 36)[:, ::-1, :35]
        reference = nibabel.load(real_data / "dicom/transfer_syntaxes/Ref" / f"{series.files[0].stem}.nii")
        np.testing.assert_array_equal(tiles, np.asanyarray(reference.dataobj))
