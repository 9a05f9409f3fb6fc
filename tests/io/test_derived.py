"""Derived DICOM series, against tiny oblique series in many encodings and against real scanners' files."""

import logging
import os
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from medfusion.errors import MedfusionError
from medfusion.io.derived import write_derived_series
from medfusion.io.discover import discover, read
from medfusion.io.series import Series
from medfusion.volume import Volume

COLUMNS, ROWS, SLICES = 7, 5, 4
BETWEEN_ROWS, BETWEEN_COLUMNS, BETWEEN_SLICES = 1.5, 0.8, 3.3

COMMON = {
    "PatientName": "Roe^Jane",
    "PatientID": "P1",
    "PatientBirthDate": "",
    "PatientSex": "",
    "StudyDate": "20200102",
    "StudyTime": "030405",
    "StudyID": "1",
    "AccessionNumber": "",
    "ReferringPhysicianName": "",
    "SeriesDate": "20200102",
    "SeriesTime": "030500",
    "SeriesNumber": 7,
    "SeriesDescription": "T1 ax",
    "PositionReferenceIndicator": "",
    "PatientPosition": "HFS",
    "Manufacturer": "ACME",
    "AcquisitionNumber": 1,
    "AcquisitionDate": "20200102",
    "AcquisitionTime": "030500",
    "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
    "StudyInstanceUID": generate_uid(entropy_srcs=["study"]),
    "SeriesInstanceUID": generate_uid(entropy_srcs=["series"]),
    "FrameOfReferenceUID": generate_uid(entropy_srcs=["frame"]),
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "WindowCenter": 1000,
    "WindowWidth": 2000,
    "BodyPartExamined": "HEAD",
}
MR = {
    "SOPClassUID": MRImageStorage,
    "Modality": "MR",
    "ScanningSequence": "GR",
    "SequenceVariant": "NONE",
    "ScanOptions": "",
    "MRAcquisitionType": "3D",
    "EchoTime": 3.0,
    "RepetitionTime": 9.0,
    "EchoTrainLength": 1,
}
CT = {
    "SOPClassUID": CTImageStorage,
    "Modality": "CT",
    "KVP": 120,
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "RescaleSlope": 1,
    "RescaleIntercept": -1024,
    "RescaleType": "HU",
}


def make_source(folder: Path, changes: dict | None = None, syntax=ExplicitVRLittleEndian, dtype="uint16", bits=12):
    """Write a series whose file names run against its positions and discover it; ``changes`` may be lists by slice."""
    folder.mkdir()
    across, down, normal = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0].T
    normal = np.cross(across, down)
    low, high = (0, 2**bits - 1) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    stored = np.random.default_rng(4).integers(low, high + 1, (SLICES, ROWS, COLUMNS)).astype(dtype)
    for k in range(SLICES):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_compressed else syntax
        dataset.ImageOrientationPatient = [round(float(x), 8) for x in (*across, *down)]
        position = np.array([-40.25, 11.5, 90.0]) + k * BETWEEN_SLICES * normal
        dataset.ImagePositionPatient = [round(float(x), 8) for x in position]
        dataset.PixelSpacing, dataset.SliceThickness = [BETWEEN_ROWS, BETWEEN_COLUMNS], 3
        dataset.Rows, dataset.Columns = ROWS, COLUMNS
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = stored.itemsize * 8, bits, bits - 1
        dataset.PixelRepresentation = int(dtype[0] == "i")
        dataset.InstanceNumber = SLICES - k
        dataset.SOPInstanceUID = generate_uid(entropy_srcs=[str(folder), str(k)])
        for keyword, value in (COMMON | MR | (changes or {})).items():
            setattr(dataset, keyword, value[k] if isinstance(value, tuple) else value)
        pixels = stored[k] if syntax.is_little_endian else stored[k].byteswap()
        dataset.add_new("PixelData", "OW" if bits > 8 else "OB", pixels.tobytes() + b"\0" * (pixels.nbytes % 2))
        if syntax.is_compressed:
            dataset.compress(syntax, generate_instance_uid=False)
        pydicom.dcmwrite(folder / f"{SLICES - k}.dcm", dataset, enforce_file_format=True)
    (series,) = discover(folder)
    return series


def derive(source: Series, folder: Path, volume: Volume | None = None, **changes) -> list[Dataset]:
    options = {"description": "denoised", "derivation": "Diffusion denoising, sigma 12.5"} | changes
    write_derived_series(volume or read(source), source, folder, **options)
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def step(source: Series) -> np.ndarray:
    """Quantisation step of each slice."""
    return np.array([float(pydicom.dcmread(path).get("RescaleSlope", 1)) for path in source.files])


def shrunk(volume: Volume) -> Volume:
    """Other, fractional values inside the range of each source slice."""
    middle = volume.array.mean(axis=(0, 1), dtype=np.float64)
    return volume.with_array(middle + 0.87 * (volume.array - middle))


def float32_rounding(volume: Volume) -> np.ndarray:
    """Rescaled values are read as float32."""
    return np.spacing(np.abs(volume.array).astype(np.float32))


ENCODINGS = {
    "explicit": {},
    "implicit": {"syntax": ImplicitVRLittleEndian},
    "big endian": {"syntax": ExplicitVRBigEndian},
    "RLE": {"syntax": RLELossless},
    "JPEG-LS": {"syntax": JPEGLSLossless},
    "signed 16 of 16 bits": {"dtype": "int16", "bits": 16},
    "signed 12 of 16 bits, big endian": {"dtype": "int16", "bits": 12, "syntax": ExplicitVRBigEndian},
    "8 bits, odd length": {"dtype": "uint8", "bits": 8},
    "32 bits": {"dtype": "uint32", "bits": 20},
    "CT": {"changes": CT},
    "slope and intercept by slice": {
        "changes": {"RescaleSlope": (0.25, 3.5, 1e-3, 12), "RescaleIntercept": (0, -50.5, 33.9, 7), "RescaleType": "US"}
    },
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_values_come_back_within_half_a_step_on_the_same_grid(tmp_path, encoding):
    source = make_source(tmp_path / "in", **ENCODINGS[encoding])
    original = read(source)
    result = shrunk(original)
    slices = derive(source, tmp_path / "out", result)
    (derived,) = discover(tmp_path / "out")
    again = read(derived)
    np.testing.assert_array_equal(again.affine, original.affine)
    off = np.abs(again.array - result.array)
    assert 0.3 < (off / step(source)).max()
    assert (off <= 0.5 * step(source) + float32_rounding(result)).all()
    assert {dataset.file_meta.TransferSyntaxUID for dataset in slices} == {ExplicitVRLittleEndian}
    for dataset, path in zip(slices, source.files, strict=True):
        before = pydicom.dcmread(path)
        for keyword in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "WindowWidth"):
            assert dataset.get(keyword) == before.get(keyword)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_unchanged_values_are_stored_unchanged(tmp_path, encoding):
    source = make_source(tmp_path / "in", **ENCODINGS[encoding])
    for dataset, path in zip(derive(source, tmp_path / "out"), source.files, strict=True):
        np.testing.assert_array_equal(dataset.pixel_array, pydicom.dcmread(path).pixel_array)


def test_identity_is_new_and_patient_study_and_geometry_stay(tmp_path):
    source = make_source(tmp_path / "in", {"TimezoneOffsetFromUTC": "+0200"})
    slices = derive(source, tmp_path / "out")
    before = [pydicom.dcmread(path) for path in source.files]
    kept = ["PatientName", "PatientID", "StudyInstanceUID", "StudyDate", "FrameOfReferenceUID", "SOPClassUID"]
    kept += ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "InstanceNumber", "AcquisitionTime"]
    for old, new in zip(before, slices, strict=True):
        assert [new[keyword].value for keyword in kept] == [old[keyword].value for keyword in kept]
        assert new.SOPInstanceUID != old.SOPInstanceUID
        assert new.file_meta.MediaStorageSOPInstanceUID == new.SOPInstanceUID
        assert new.file_meta.MediaStorageSOPClassUID == new.SOPClassUID
        assert new.ContentDate == new.SeriesDate == new.InstanceCreationDate > "20260101"
        assert (new.SeriesNumber, new.SeriesDescription) == (701, "T1 ax denoised")
    assert len({new.SOPInstanceUID for new in slices}) == SLICES
    assert len({(new.SeriesInstanceUID, new.SeriesTime) for new in slices}) == 1
    assert slices[0].SeriesInstanceUID != before[0].SeriesInstanceUID


def test_uids_depend_on_input_settings_and_voxels_alone(tmp_path):
    source = make_source(tmp_path / "in")
    runs = [
        derive(source, tmp_path / "1"),
        derive(source, tmp_path / "2"),
        derive(source, tmp_path / "3", derivation="Diffusion denoising, sigma 13"),
        derive(source, tmp_path / "4", shrunk(read(source))),
    ]
    uids = [[dataset.SOPInstanceUID for dataset in slices] for slices in runs]
    assert uids[0] == uids[1]
    assert len({uid for run in uids for uid in run}) == 3 * SLICES
    assert len({slices[0].SeriesInstanceUID for slices in runs}) == 3


def test_provenance_names_source_tool_and_derivation(tmp_path):
    source = make_source(tmp_path / "in")
    for dataset, path in zip(derive(source, tmp_path / "out", smoothing=True), source.files, strict=True):
        assert list(dataset.ImageType) == ["DERIVED", "SECONDARY", "M", "ND"]
        assert dataset.DerivationDescription.startswith("Diffusion denoising, sigma 12.5 (medfusion ")
        assert [code.CodeValue for code in dataset.DerivationCodeSequence] == ["113087"]
        (image,) = dataset.SourceImageSequence
        assert image.ReferencedSOPInstanceUID == pydicom.dcmread(path).SOPInstanceUID
        assert image.ReferencedSOPClassUID == dataset.SOPClassUID
        assert image.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        (tool,) = dataset.ContributingEquipmentSequence
        assert (tool.Manufacturer, tool.PurposeOfReferenceCodeSequence[0].CodeValue) == ("medfusion", "109102")
        assert dataset.Manufacturer == "ACME"
    assert "DerivationCodeSequence" not in derive(source, tmp_path / "augmented", smoothing=False)[0]


def test_history_of_a_derived_source_is_kept(tmp_path):
    first = make_source(tmp_path / "in", {"LossyImageCompression": "01", "LossyImageCompressionRatio": 4})
    derive(first, tmp_path / "once", smoothing=True, derivation="x" * 900)
    (once,) = discover(tmp_path / "once")
    twice = derive(once, tmp_path / "twice", smoothing=True, derivation="second step, " + "y" * 200)[0]
    assert twice.SourceImageSequence[0].ReferencedSOPInstanceUID == pydicom.dcmread(once.files[0]).SOPInstanceUID
    assert len(twice.DerivationDescription) <= 1024
    assert twice.DerivationDescription.startswith("xxx")
    assert "; second step, yyy" in twice.DerivationDescription
    assert len(twice.ContributingEquipmentSequence) == len(twice.DerivationCodeSequence) == 2
    assert (twice.LossyImageCompression, twice.LossyImageCompressionRatio) == ("01", 4)
    assert twice.SeriesNumber == 70101


@pytest.mark.parametrize(
    ("before", "after"), [("", "denoised"), (None, "denoised"), ("x" * 64, "x" * 55 + " denoised")]
)
def test_series_description_says_what_became_of_which_series(tmp_path, before, after):
    source = make_source(tmp_path / "in", {"SeriesDescription": before})
    assert derive(source, tmp_path / "out")[0].SeriesDescription == after


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY"]}, ["DERIVED", "SECONDARY", "OTHER"]),
        ({"ImageType": None}, ["DERIVED", "SECONDARY", "OTHER"]),
        (CT | {"ImageType": ["ORIGINAL", "PRIMARY"]}, ["DERIVED", "SECONDARY", "AXIAL"]),
    ],
)
def test_image_type_gets_the_third_value_it_lacks(tmp_path, changes, expected):
    source = make_source(tmp_path / "in", changes)
    assert list(derive(source, tmp_path / "out")[0].ImageType) == expected


@pytest.mark.parametrize(("number", "expected"), [(None, 1), (747197466, 2**31 - 1)])
def test_series_number_that_is_missing_or_huge(tmp_path, number, expected):
    source = make_source(tmp_path / "in", {"SeriesNumber": number})
    assert derive(source, tmp_path / "out")[0].SeriesNumber == expected


def test_text_is_fitted_to_dicom(tmp_path):
    source = make_source(tmp_path / "in", {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Zoë"})
    dataset = derive(source, tmp_path / "out", description="a\\b " + "z" * 57, derivation="σ = 12")[0]
    assert dataset.SeriesDescription == "T1 a/b " + "z" * 57
    assert dataset.DerivationDescription.startswith("σ = 12 (medfusion")
    assert dataset.PatientName == "Müller^Zoë"


@pytest.mark.parametrize(
    ("dtype", "padding", "limit"),
    [("int16", -2000, None), ("int16", 63536, None), ("uint16", 0, None), ("int16", -2048, -2000)],
)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_padding_keeps_its_stored_value(tmp_path, syntax, dtype, padding, limit):
    source = make_source(tmp_path / "in", syntax=syntax, dtype=dtype)
    wrapped = np.array(padding).astype(dtype)
    for path in source.files:
        dataset = pydicom.dcmread(path)
        pixels = dataset.pixel_array.clip(5, None)
        pixels[:2] = wrapped
        dataset.PixelData = pixels.tobytes()
        vr = "SS" if padding < 0 else "US"
        dataset.add_new("PixelPaddingValue", vr, padding)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", vr, limit)
            pixels[1] = limit
            dataset.PixelData = pixels.tobytes()
        dataset.save_as(path)
    volume = read(source)
    result = volume.with_array(volume.array + 100.0)
    for dataset, path in zip(derive(source, tmp_path / "out", result), source.files, strict=True):
        before = pydicom.dcmread(path).pixel_array.astype(int)
        before[2:] = np.minimum(before[2:] + 100, 4095 if dtype == "uint16" else 2047)
        np.testing.assert_array_equal(dataset.pixel_array, before)
        assert np.array(dataset.PixelPaddingValue).astype(dtype) == wrapped


def test_clipped_voxels_are_counted_in_one_warning(tmp_path, caplog):
    source = make_source(tmp_path / "in")
    volume = read(source)
    array = shrunk(volume).array
    array[0, 0, 0], array[1, 2, 3], array[2, 2, 2] = -0.6, 4095.6, 4095.4
    with caplog.at_level(logging.WARNING, logger="medfusion"):
        slices = derive(source, tmp_path / "out", volume.with_array(array))
    (record,) = caplog.records
    assert "2 of 140 voxels" in record.getMessage()
    assert slices[0].pixel_array[0, 0] == 0
    assert slices[3].pixel_array[2, 1] == 4095
    caplog.clear()
    derive(source, tmp_path / "sound")
    assert not caplog.records


def test_statements_about_the_old_pixels_are_dropped(tmp_path):
    source = make_source(tmp_path / "in", syntax=ImplicitVRLittleEndian)
    for path in source.files:
        dataset = pydicom.dcmread(path)
        dataset.add_new("SmallestImagePixelValue", "US", 0)
        dataset.add_new("LargestImagePixelValue", "US", 4095)
        block = dataset.private_block(0x0029, "ACME HEADER", create=True)
        block.add_new(0x10, "DS", "0.5")
        icon = Dataset()
        icon.Rows = 1
        dataset.IconImageSequence = [icon]
        for group in (0x6000, 0x6002):
            dataset.add_new((group, 0x0010), "US", ROWS)
        dataset.add_new((0x6002, 0x3000), "OW", b"\1\0\2\0")
        dataset.save_as(path)
    dataset = derive(source, tmp_path / "out")[0]
    for keyword in ("SmallestImagePixelValue", "LargestImagePixelValue", "IconImageSequence"):
        assert keyword not in dataset
    assert not any(tag.is_private for tag in dataset)
    assert (0x6000, 0x0010) not in dataset
    assert dataset[0x6002, 0x3000].value == b"\1\0\2\0"


def test_big_endian_words_and_numbers_are_turned(tmp_path):
    source = make_source(tmp_path / "in", syntax=ExplicitVRBigEndian)
    for path in source.files:
        dataset = pydicom.dcmread(path)
        lut = Dataset()
        lut.LUTDescriptor = [2, 0, 16]
        lut.add_new("LUTData", "OW", b"\1\2\3\4")
        dataset.VOILUTSequence = [lut]
        pydicom.dcmwrite(path, dataset)
    dataset = derive(source, tmp_path / "out")[0]
    assert dataset.VOILUTSequence[0].LUTData == b"\2\1\4\3"
    assert list(dataset.VOILUTSequence[0].LUTDescriptor) == [2, 0, 16]
    assert (dataset.Rows, dataset.Columns) == (ROWS, COLUMNS)


def refusals(source: Series, volume: Volume) -> Iterator[tuple[str, Series, Volume]]:
    moved = volume.affine.copy()
    moved[2, 3] += 0.01
    broken = volume.array.astype(float)
    broken[0, 0, 0] = np.nan
    yield "grid of its source", source, replace(volume, affine=moved)
    yield "grid of its source", source, Volume(volume.array[:, :, 1:], volume.affine)
    yield "1 voxels of the result are NaN", source, volume.with_array(broken)
    yield "multi-frame", replace(source, files=source.files[:1]), volume
    yield "not a DICOM series", replace(source, kind="nifti"), volume
    yield "1 of 4 source files are not there", replace(source, files=(*source.files[:3], Path("gone.dcm"))), volume


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    source = make_source(tmp_path / "in")
    for message, series, volume in refusals(source, read(source)):
        with pytest.raises(MedfusionError, match=message):
            derive(series, tmp_path / "out", volume)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NumberOfFrames": 2}, "multi-frame"),
        ({"PerFrameFunctionalGroupsSequence": [Dataset()]}, "multi-frame"),
        ({"SamplesPerPixel": 3}, "in colour"),
        ({"ModalityLUTSequence": [Dataset()]}, "rescaled by a table"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "does not fit"),
        ({"Rows": ROWS + 1}, "does not fit"),
        ({"PixelData": None}, "without whole-number pixels"),
    ],
)
def test_unfit_last_source_file_leaves_nothing(tmp_path, changes, message):
    source = make_source(tmp_path / "in")
    volume = read(source)
    dataset = pydicom.dcmread(source.files[-1])
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
        if value is None:
            delattr(dataset, keyword)
    dataset.save_as(source.files[-1])
    with pytest.raises(MedfusionError, match=message) as error:
        derive(source, tmp_path / "out", volume)
    assert str(source.files[-1]) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_source_file_overwritten_by_another_is_an_error(tmp_path):
    source = make_source(tmp_path / "in")
    volume = read(source)
    source.files[-1].rename(tmp_path / "scan")
    (tmp_path / "scan").write_text("no DICOM" * 99)
    with pytest.raises(MedfusionError, match="cannot be read"):
        derive(replace(source, files=(*source.files[:-1], tmp_path / "scan")), tmp_path / "out", volume)
    assert not (tmp_path / "out").exists()


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    source = make_source(tmp_path / "in")
    volume = read(source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(MedfusionError, match="no space left"):
            derive(source, tmp_path / "out", volume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_existing_folder_is_replaced_only_on_overwrite(tmp_path):
    source = make_source(tmp_path / "in")
    derive(source, tmp_path / "out")
    (tmp_path / "out" / "extra.dcm").touch()
    with pytest.raises(MedfusionError, match="exists already"):
        derive(source, tmp_path / "out")
    derive(source, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"000{k}.dcm" for k in (1, 2, 3, 4)]


@pytest.mark.parametrize("changes", [{}, CT])
def test_other_readers_see_the_geometry_and_values_of_the_source(tmp_path, changes):
    source = make_source(tmp_path / "in", changes)
    result = shrunk(read(source))
    derive(source, tmp_path / "out", result)
    images = []
    for folder in (tmp_path / "in", tmp_path / "out"):
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        images.append(reader.Execute())
    old, new = images
    for geometry in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        assert getattr(old, geometry)() == getattr(new, geometry)()
    np.testing.assert_allclose(sitk.GetArrayFromImage(new).T, result.array, atol=0.5)
    files = [[pydicom.dcmread(path) for path in folder.iterdir()] for folder in (tmp_path / "in", tmp_path / "out")]
    old, new = (highdicom.get_volume_from_series(datasets) for datasets in files)
    np.testing.assert_array_equal(old.affine, new.affine)


def conformance_errors(path: Path) -> Counter[str]:
    result = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace")
    lines = (result.stdout + result.stderr).splitlines()
    assert lines, "dciodvfy says at least which object it found"
    return Counter(line for line in lines if line.startswith("Error -"))  # its exit status is not reliable


def assert_no_new_errors(source: Series, derived: Series, slices: int) -> None:
    for k in np.linspace(0, len(source.files) - 1, slices).astype(int):
        new = conformance_errors(derived.files[k]) - conformance_errors(source.files[k])
        assert not new, f"{source.name}, slice {k}: {new}"


needs_dciodvfy = pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy (dicom3tools)")


@needs_dciodvfy
@pytest.mark.parametrize("changes", [{}, CT])
def test_sound_source_gives_a_series_without_conformance_errors(tmp_path, changes):
    source = make_source(tmp_path / "in", changes)
    assert not conformance_errors(source.files[0])
    derive(source, tmp_path / "out", smoothing=True)
    assert_no_new_errors(source, discover(tmp_path / "out")[0], SLICES)


@needs_dciodvfy
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_encoding_adds_conformance_errors(tmp_path, encoding):
    source = make_source(tmp_path / "in", **ENCODINGS[encoding])
    derive(source, tmp_path / "out")
    assert_no_new_errors(source, discover(tmp_path / "out")[0], 1)


@pytest.mark.skipif("MEDFUSION_DATA" not in os.environ, reason="needs MEDFUSION_DATA")
def test_real_series_come_back_and_add_no_conformance_errors(tmp_path):
    usable = [s for s in discover(Path(os.environ["MEDFUSION_DATA"]) / "dicom") if s.kind == "dicom" and s.usable]
    assert len(usable) > 15
    for number, source in enumerate(usable):
        volume = read(source)
        low, high = float(volume.array.min()), float(volume.array.max())
        noise = np.random.default_rng(0).standard_normal(volume.shape, np.float32)
        result = volume.with_array((volume.array + noise * (high - low) / 100).clip(low, high).astype(np.float32))
        write_derived_series(result, source, tmp_path / str(number), description="noisy", derivation="noise added")
        (derived,) = discover(tmp_path / str(number))
        again = read(derived)
        np.testing.assert_array_equal(again.affine, volume.affine)
        off = np.abs(again.array - result.array.astype(np.float64))
        assert (off <= 0.5 * step(source) + float32_rounding(result)).all(), source.name
        if shutil.which("dciodvfy"):
            assert_no_new_errors(source, derived, 3)
