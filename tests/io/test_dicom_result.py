"""Segmentation, parametric map and fused pictures of a DICOM series, read back by pydicom and highdicom."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_factory import LPS_TO_RAS, scanner_affine, write_series
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from medfusion import __version__
from medfusion.errors import MedfusionError
from medfusion.io.dicom_result import write_dicom_results
from medfusion.io.discover import discover, read
from medfusion.io.findings import Finding
from medfusion.volume import Volume

THRESHOLD = 2.0
GRIDS = {
    "axial": {"plane": "axial"},
    "sagittal": {"plane": "sagittal"},
    "coronal, against the normal": {"plane": "coronal", "flip": True},
    "oblique": {"plane": "axial", "angles": (12, -23, 31)},
}


def finding(number: int, **changes: Any) -> Finding:
    known = Finding(number, 0, 0, 0, 0, 0, 0, 1.5, 6.25, 3.0, "brighter", 0.02, "Thalamus")
    return replace(known, **changes)


def make_scan(folder: Path, affine: np.ndarray | None = None, **options: Any) -> Volume:
    """A series that is neither square nor a cube, discovered and read."""
    write_series(folder, affine=affine, **options)
    (series,) = discover(folder)
    return read(series)


def detection(scan: Volume, count: int = 2) -> dict[str, Any]:
    """Two regions, one of a single voxel, without any symmetry."""
    anomaly = np.random.default_rng(2).uniform(0, 1.9, scan.shape).astype(np.float32)
    regions = np.zeros(scan.shape, np.int32)
    if count:
        regions[0, 1, 1:3] = regions[1, 1, 1] = 1
        regions[4, 5, 3] = 2
        anomaly[regions > 0] = [2.5, 3.0, 4.0, 7.5]
    findings = [finding(1), finding(2, direction="darker", p=0.0013, label="")][:count]
    return {"regions": regions, "findings": findings, "anomaly": anomaly, "threshold": THRESHOLD}


def write(folder: Path, scan: Volume, **changes: Any) -> Path:
    write_dicom_results(folder, scan, **(detection(scan) | changes))
    return folder


def results(folder: Path) -> list[Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.rglob("*.dcm"))]


def captures(folder: Path) -> list[Dataset]:
    return [pydicom.dcmread(path) for path in sorted((folder / "fused").iterdir())]


def world(position: Any, orientation: Any, spacing: Any, row: Any, column: Any) -> np.ndarray:
    """RAS millimetres of pixels (PS3.3 C.7.6.2.1.1)."""
    across, down = np.array(orientation, dtype=float).reshape(2, 3)
    lps = np.array(position, dtype=float) + np.outer(column, across * spacing[1]) + np.outer(row, down * spacing[0])
    return lps @ LPS_TO_RAS[:3, :3]


def frames(image: Dataset) -> Iterator[tuple[Dataset, np.ndarray, Callable[[Any, Any], np.ndarray]]]:
    """Functional groups and pixels of each frame, and where its pixels lie."""
    shared = image.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    pixels = image.pixel_array.reshape(-1, image.Rows, image.Columns)
    for groups, plane in zip(image.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        yield groups, plane, lambda row, column, at=position: world(at, orientation, spacing, row, column)


def referenced(groups: Dataset) -> str:
    return groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID


def in_order(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(points.round(2).T)]


@pytest.mark.parametrize("grid", GRIDS)
def test_segments_lie_where_the_regions_do(tmp_path, grid):
    scan = make_scan(tmp_path / "in", scanner_affine(**GRIDS[grid]))
    what = detection(scan)
    image = pydicom.dcmread(write(tmp_path / "out", scan) / "segmentation.dcm")
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in scan.source.files]
    found: dict[int, list[np.ndarray]] = {1: [], 2: []}
    for groups, plane, where in frames(image):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        k = uids.index(referenced(groups))
        np.testing.assert_array_equal(plane, (what["regions"][:, :, k] == number).T)
        found[number].append(where(*np.nonzero(plane)))
    assert [len(found[number]) for number in (1, 2)] == [2, 1]  # no empty frames
    for number, points in found.items():
        truth = scan.to_world(np.argwhere(what["regions"] == number))
        np.testing.assert_allclose(in_order(np.concatenate(points)), in_order(truth), atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_map_holds_every_score_on_the_grid_of_the_scan(tmp_path, grid):
    scan = make_scan(tmp_path / "in", scanner_affine(**GRIDS[grid]))
    anomaly = detection(scan)["anomaly"]
    path = write(tmp_path / "out", scan) / "anomaly.dcm"
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in scan.source.files]
    planes = list(frames(pydicom.dcmread(path)))
    assert len(planes) == scan.shape[2]
    for groups, plane, where in planes:
        k = uids.index(referenced(groups))
        assert plane.dtype == np.float32
        np.testing.assert_array_equal(plane, anomaly[:, :, k].T)
        np.testing.assert_allclose(where([0, 5], [0, 4]), scan.to_world([(0, 0, k), (4, 5, k)]), atol=1e-3)
    volume = highdicom.imread(path).get_volume(apply_real_world_transform=True)
    voxels = np.argwhere(np.ones(volume.spatial_shape))
    ras = volume.map_indices_to_reference(voxels) @ LPS_TO_RAS[:3, :3]
    index = (ras - scan.affine[:3, 3]) @ np.linalg.inv(scan.affine[:3, :3]).T
    np.testing.assert_allclose(index, index.round(), atol=1e-3)
    np.testing.assert_array_equal(volume.array[tuple(voxels.T)], anomaly[tuple(index.round().astype(int).T)])


@pytest.mark.parametrize("grid", GRIDS)
def test_fused_pictures_lie_on_their_slices(tmp_path, grid):
    scan = make_scan(tmp_path / "in", scanner_affine(**GRIDS[grid]))
    images = captures(write(tmp_path / "out", scan))
    assert len(images) == scan.shape[2]
    for k, (image, path) in enumerate(zip(images, scan.source.files, strict=True)):
        source = pydicom.dcmread(path)
        assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert image.FrameOfReferenceUID == source.FrameOfReferenceUID
        assert (image.Rows, image.Columns, image.InstanceNumber) == (source.Rows, source.Columns, k + 1)
        there = world(image.ImagePositionPatient, image.ImageOrientationPatient, image.PixelSpacing, [0, 5], [0, 4])
        np.testing.assert_allclose(there, scan.to_world([(0, 0, k), (4, 5, k)]), atol=1e-3)


@pytest.mark.parametrize(
    ("grid", "orientation"),
    [("axial", ["L", "P"]), ("sagittal", ["P", "F"]), ("coronal, against the normal", ["L", "F"])],
)
def test_fused_pictures_tell_viewers_which_side_is_which(tmp_path, grid, orientation):
    scan = make_scan(tmp_path / "in", scanner_affine(**GRIDS[grid]))
    assert list(captures(write(tmp_path / "out", scan))[0].PatientOrientation) == orientation


def test_fused_pictures_are_grey_with_heat_above_the_threshold(tmp_path):
    scan = make_scan(tmp_path / "in")
    what = detection(scan)
    pixels = np.stack([image.pixel_array for image in captures(write(tmp_path / "out", scan))])
    pixels = pixels.transpose(2, 1, 0, 3).astype(int)
    hot = what["anomaly"] > THRESHOLD
    assert hot.sum() == 4
    grey = pixels[~hot]
    assert (grey == grey[:, :1]).all()
    np.testing.assert_array_equal(np.diff(grey[np.argsort(scan.array[~hot], kind="stable"), 0]) >= 0, True)
    assert (grey.min(), grey.max()) == (0, 255)
    red, green, blue = pixels[hot].T
    assert (red >= 191).all()
    assert (red > blue + 150).all()
    assert (np.diff((green - blue)[np.argsort(what["anomaly"][hot])]) > 0).all()


def test_ct_is_seen_through_its_own_window(tmp_path):
    values = np.full((5, 6, 4), 1064, np.int16)
    values[0], values[1], values[2] = 864, 1264, 24  # HU -160, 240, -1000; the rest 40
    scan = make_scan(
        tmp_path / "in", array=values, modality="CT", slopes=[1] * 4, intercepts=[-1024] * 4,
        WindowCenter=[40, 300], WindowWidth=[400, 1500], KVP=120,
    )  # fmt: skip
    pixels = captures(write(tmp_path / "out", scan, **detection(scan, 0)))[2].pixel_array
    assert pixels[0, :, 0].tolist() == [0, 255, 0, 128, 128]


def test_a_scan_and_map_of_one_value_can_be_written(tmp_path):
    scan = make_scan(tmp_path / "in", array=np.full((5, 6, 4), 7, np.uint16))
    folder = write(tmp_path / "out", scan, **detection(scan, 0) | {"anomaly": np.zeros(scan.shape, np.float64)})
    assert not captures(folder)[0].pixel_array.any()
    assert not pydicom.dcmread(folder / "anomaly.dcm").pixel_array.any()


def test_segments_say_what_was_found_how_sure_and_by_which_tool(tmp_path):
    scan = make_scan(tmp_path / "in")
    image = highdicom.seg.segread(write(tmp_path / "out", scan) / "segmentation.dcm")
    first, second = (image.get_segment_description(number) for number in image.segment_numbers)
    assert (first.segment_label, second.segment_label) == ("Anomaly 1 brighter, p 0.02", "Anomaly 2 darker, p 0.0013")
    assert first.SegmentDescription == "1.500 mL, peak score 6.25, mean 3, near Thalamus"
    assert second.SegmentDescription == "1.500 mL, peak score 6.25, mean 3"
    assert first.segmented_property_category.value == "49755003"
    assert first.segmented_property_type.value == "52988006"
    assert first.SegmentAlgorithmType == "AUTOMATIC"
    assert first.algorithm_identification.name == "medfusion"
    assert first.algorithm_identification.version == __version__
    assert image.SegmentationType == "BINARY"


def test_map_says_what_its_numbers_mean(tmp_path):
    image = pydicom.dcmread(write(tmp_path / "out", make_scan(tmp_path / "in")) / "anomaly.dcm")
    shared = image.SharedFunctionalGroupsSequence[0]
    mapping = shared.RealWorldValueMappingSequence[0]
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
    assert mapping.DoubleFloatRealWorldValueLastValueMapped == 7.5
    unit = mapping.MeasurementUnitsCodeSequence[0]
    assert (unit.CodeValue, unit.CodingSchemeDesignator) == ("1", "UCUM")
    quantity = mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]
    assert (quantity.CodingSchemeDesignator, quantity.CodeMeaning) == ("99MEDFUSION", "Anomaly score")
    assert image.ContentQualification == "RESEARCH"
    window = shared.FrameVOILUTSequence[0]
    assert window.WindowCenter + window.WindowWidth / 2 == pytest.approx(7.5)


def test_results_belong_to_the_patient_and_study_of_the_source(tmp_path):
    other = Dataset()
    other.PatientID, other.IssuerOfPatientID = "12", "Zürich"
    scan = make_scan(
        tmp_path / "in", SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Zoë", StudyDescription="Schädel <&>",
        PatientSex="F", PatientAge="041Y", SeriesDescription="T1\\ax", ReferringPhysicianName="Å^A",
        OtherPatientIDsSequence=[other],
    )  # fmt: skip
    source = pydicom.dcmread(scan.source.files[0])
    folder = write(tmp_path / "out", scan)
    files = results(folder)
    assert len(files) == 2 + scan.shape[2]
    for image in files:
        for keyword in ("PatientName", "PatientID", "PatientSex", "PatientAge", "StudyInstanceUID", "StudyDescription"):
            assert image[keyword].value == source[keyword].value
        assert image.ReferringPhysicianName == source.ReferringPhysicianName
        assert image.OtherPatientIDsSequence[0].IssuerOfPatientID == "Zürich"
        assert image.FrameOfReferenceUID == source.FrameOfReferenceUID
        assert image.SpecificCharacterSet == "ISO_IR 192"
        assert image.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert image.get("BurnedInAnnotation", "NO") == "NO"
        assert (image.ManufacturerModelName, image.SoftwareVersions) == ("medfusion", __version__)
    assert [image.SeriesNumber for image in files] == [303, *[304] * scan.shape[2], 302]
    assert len({image.SeriesInstanceUID for image in files} | {source.SeriesInstanceUID}) == 4
    assert len({image.SOPInstanceUID for image in files}) == len(files)
    assert len({(image.SeriesDate, image.SeriesTime) for image in files}) == 1
    assert files[-1].ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    names = " ".join(str(path.relative_to(tmp_path)) for path in folder.rglob("*"))
    assert "ller" not in names


def test_text_that_burns_in_the_source_burns_in_the_pictures(tmp_path):
    scan = make_scan(tmp_path / "in", BurnedInAnnotation="YES")
    assert {image.BurnedInAnnotation for image in captures(write(tmp_path / "out", scan))} == {"YES"}


def test_uids_depend_on_source_and_arguments_alone(tmp_path):
    scan = make_scan(tmp_path / "in")
    moved = detection(scan)["anomaly"] + np.float32(0.01)
    runs = [
        write(tmp_path / "1", scan),
        write(tmp_path / "2", scan),
        write(tmp_path / "3", scan, anomaly=moved),
        write(tmp_path / "4", scan, threshold=2.1),
    ]
    uids = [[image.SOPInstanceUID for image in results(folder)] for folder in runs]
    assert uids[0] == uids[1]
    assert len({uid for run in uids for uid in run}) == 3 * len(uids[0])


def test_without_findings_there_is_no_segmentation(tmp_path):
    scan = make_scan(tmp_path / "in")
    folder = write(tmp_path / "out", scan, **detection(scan, 0))
    assert sorted(path.name for path in folder.iterdir()) == ["anomaly.dcm", "fused"]


LACKING = ["AccessionNumber", "PatientSex", "PatientName", "PatientBirthDate", "StudyDate", "StudyID", "Manufacturer"]
LACKING += ["ReferringPhysicianName", "SliceThickness", "SeriesNumber", "SeriesDescription", "StudyTime", "PatientID"]


def without(*keywords: str) -> Callable[[Dataset, int], None]:
    def edit(dataset: Dataset, k: int) -> None:
        for keyword in keywords:
            del dataset[keyword]

    return edit


def test_what_the_source_lacks_stays_empty(tmp_path):
    scan = make_scan(tmp_path / "in", edit=without(*LACKING))
    for image in results(write(tmp_path / "out", scan)):
        assert not image.PatientSex
        assert not image.AccessionNumber
        assert not image.PatientName
        assert image.SeriesNumber in (2, 3, 4)
    measures = pydicom.dcmread(tmp_path / "out" / "anomaly.dcm").SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert float(measures[0].SliceThickness) == pytest.approx(2.5)


def test_odd_values_are_passed_on(tmp_path, caplog, recwarn):
    odd = {"PatientSex": "unknown", "PatientBirthDate": "1970", "StudyDate": "yesterday", "SeriesNumber": 2**31 - 1}
    with pydicom.config.disable_value_validation():
        scan = make_scan(tmp_path / "in", PatientName="Secret" * 20, SliceThickness=0, **odd)
    recwarn.clear()
    folder = write(tmp_path / "out", scan)
    assert not [str(warning.message) for warning in recwarn]
    assert "Secret" not in caplog.text
    for image in results(folder):
        assert (image.PatientSex, image.PatientBirthDate, image.StudyDate) == ("unknown", "1970", "yesterday")
        assert image.SeriesNumber < 2**31


def test_slices_whose_directions_differ_in_the_last_digit(tmp_path):
    def turn(dataset: Dataset, k: int) -> None:
        dataset.ImageOrientationPatient = [1, k * 1e-5, 0, -k * 1e-5, 1, 0]

    scan = make_scan(tmp_path / "in", edit=turn)
    assert len(results(write(tmp_path / "out", scan))) == 2 + scan.shape[2]


def refusals(scan: Volume) -> Iterator[tuple[str, Volume]]:
    yield "not a DICOM series", Volume(scan.array, scan.affine)
    yield "not a DICOM series", replace(scan, source=replace(scan.source, kind="nifti"))
    yield "enhanced multi-frame", replace(scan, source=replace(scan.source, files=scan.source.files[:1]))
    gone = (*scan.source.files[:-1], Path("gone.dcm"))
    yield "cannot be read", replace(scan, source=replace(scan.source, files=gone))


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    scan = make_scan(tmp_path / "in")
    for message, refused in refusals(scan):
        with pytest.raises(MedfusionError, match=message):
            write(tmp_path / "out", refused)
    broken = detection(scan)["anomaly"]
    broken[0, 0, 0] = np.nan
    with pytest.raises(MedfusionError, match="1 anomaly scores are NaN"):
        write(tmp_path / "out", scan, anomaly=broken)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (without("FrameOfReferenceUID"), "FrameOfReferenceUID is missing in 4 of 4 files"),
        (without("StudyInstanceUID"), "StudyInstanceUID is missing in 4 of 4 files"),
        (lambda dataset, k: setattr(dataset, "StudyInstanceUID", f"1.2.{k // 3}"), "2 values of StudyInstanceUID"),
        (lambda dataset, k: setattr(dataset, "SOPClassUID", "1.2.840.113619.4.26"), "1.2.840.113619.4.26"),
    ],
)
def test_series_that_cannot_be_referred_to_is_refused(tmp_path, edit, reason):
    scan = make_scan(tmp_path / "in", edit=edit)
    with pytest.raises(MedfusionError, match="cannot refer to this series") as error:
        write(tmp_path / "out", scan)
    assert reason in str(error.value)
    assert "Secret" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_source_that_was_replaced_meanwhile_is_refused(tmp_path):
    scan = make_scan(tmp_path / "in")
    dataset = pydicom.dcmread(scan.source.files[2])
    del dataset.ImagePositionPatient
    dataset.save_as(scan.source.files[2])
    with pytest.raises(MedfusionError, match="cannot refer to this series"):
        write(tmp_path / "out", scan)


def test_arguments_that_do_not_belong_together_are_refused(tmp_path):
    scan = make_scan(tmp_path / "in")
    what = detection(scan)
    for changes in (
        {"regions": what["regions"][1:]},
        {"anomaly": what["anomaly"].T},
        {"findings": [finding(2)]},
        {"findings": [finding(1)]},
        {"regions": -what["regions"]},
    ):
        with pytest.raises(ValueError, match=r"region|finding"):
            write(tmp_path / "out", scan, **changes)


def test_existing_folder_is_replaced_only_on_overwrite(tmp_path):
    scan = make_scan(tmp_path / "in")
    folder = write(tmp_path / "out", scan)
    with pytest.raises(MedfusionError, match="exists already"):
        write(folder, scan)
    write(folder, scan, **detection(scan, 0), overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["anomaly.dcm", "fused"]
    assert sorted(path.name for path in (folder / "fused").iterdir()) == [f"000{k}.dcm" for k in (1, 2, 3, 4)]


def conformance_errors(path: Path) -> list[str]:
    result = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace")
    lines = (result.stdout + result.stderr).splitlines()
    assert lines, "dciodvfy says at least which object it found"
    return [line for line in lines if line.startswith("Error -")]  # its exit status is not reliable


needs_dciodvfy = pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy (dicom3tools)")


@needs_dciodvfy
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modality": "CT", "KVP": 120},
        {"edit": without(*LACKING)},
        {"BodyPartExamined": "BRAIN", "Laterality": ""},
        {"affine": scanner_affine(**GRIDS["oblique"]), "PatientName": "Zoë", "SpecificCharacterSet": "ISO_IR 192"},
        {"LossyImageCompression": "01", "LossyImageCompressionRatio": 4, "LossyImageCompressionMethod": "ISO_10918_1"},
    ],
)
def test_results_conform_to_the_standard(tmp_path, options):
    folder = write(tmp_path / "out", make_scan(tmp_path / "in", **options))
    for path in (folder / "segmentation.dcm", folder / "anomaly.dcm", folder / "fused" / "0002.dcm"):
        assert not conformance_errors(path), path.name


@needs_dciodvfy
@pytest.mark.skipif("MEDFUSION_DATA" not in os.environ, reason="needs MEDFUSION_DATA")
@pytest.mark.parametrize("name", ["mr_t1_mprage_siemens_176", "mr_tumour_study/t1post", "ct_chest_siemens_30"])
def test_a_ball_in_a_real_scan(tmp_path, real_data, name):
    (series,) = discover(real_data / "dicom" / name)
    scan = read(series)
    centre = scan.to_world(np.array(scan.shape) // 2)
    grid = np.stack(np.meshgrid(*map(np.arange, scan.shape), indexing="ij"), axis=-1)
    away = np.linalg.norm(scan.to_world(grid) - centre, axis=-1)
    ball, anomaly = (away < 15).astype(np.int32), (30 / (away + 1)).astype(np.float32)
    folder = tmp_path / "out"
    write_dicom_results(folder, scan, regions=ball, findings=[finding(1)], anomaly=anomaly, threshold=2.0)
    points = [where(*np.nonzero(plane)) for _, plane, where in frames(pydicom.dcmread(folder / "segmentation.dcm"))]
    distances = np.linalg.norm(np.concatenate(points) - centre, axis=1)
    assert len(distances) == ball.sum()
    assert distances.max() < 15.01
    for path in (folder / "segmentation.dcm", folder / "anomaly.dcm", folder / "fused" / "0010.dcm"):
        assert not conformance_errors(path), path.name
