"""What discovery finds, names and passes over, in plain, BIDS and nnU-Net folders."""

import gzip
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_factory import PATIENT, scanner_affine, stored_values, write_series

from medfusion.errors import MedfusionError
from medfusion.io import discover, read


def write_nifti(path: Path, shape: tuple[int, ...] = (4, 5, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), np.eye(4)), path)
    return path


def names(path: Path, pattern: str = "") -> list[str]:
    return [series.name for series in discover(path, pattern)]


def test_nifti_files_alone_and_in_folders(tmp_path: Path) -> None:
    write_nifti(tmp_path / "b.nii.gz")
    write_nifti(tmp_path / "deep/er/a.nii")
    write_nifti(tmp_path / "deep/four.nii.gz", (4, 5, 6, 3))
    assert names(tmp_path) == ["a", "b", "four"]
    assert names(tmp_path / "b.nii.gz") == ["b"]
    assert [series.shape for series in discover(tmp_path)] == [(4, 5, 6), (4, 5, 6), (4, 5, 6, 3)]
    four = discover(tmp_path)[2]
    assert read(four, 2).array[0, 0, 1] == 5
    assert read(discover(tmp_path)[0]).shape == (4, 5, 6)


def test_pattern_chooses_nifti_files_by_name(tmp_path: Path) -> None:
    for name in ("1_t1.nii.gz", "1_labels.nii.gz", "2_t1.nii.gz"):
        write_nifti(tmp_path / name)
    assert names(tmp_path, "*_t1.nii.gz") == ["1_t1", "2_t1"]
    with pytest.raises(MedfusionError, match="no scan found") as caught:
        discover(tmp_path, "*_t2.nii.gz")
    assert caught.value.facts["pattern"] == "*_t2.nii.gz"


def test_the_same_file_name_in_two_folders_gets_the_folder_into_its_name(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_nifti(tmp_path / folder / "t1.nii.gz")
    write_nifti(tmp_path / "one/t2.nii.gz")
    assert names(tmp_path) == ["one_t1", "t2", "two_t1"]


def test_series_mixed_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    write_series(tmp_path, file_name="a{}".format)
    write_series(tmp_path, file_name="b{}".format, SeriesNumber=12, SeriesDescription="T2 (TSE) / cor")
    write_nifti(tmp_path / "other.nii.gz")
    assert names(tmp_path) == ["003_t1_mprage", "012_t2_tse_cor", "other"]
    assert all(read(series).shape for series in discover(tmp_path))


def test_a_series_spread_over_folders_is_one(tmp_path: Path) -> None:
    write_series(
        tmp_path,
        file_name="DICOM/{:04d}/image".format,
        edit=lambda _, k: (tmp_path / f"DICOM/{k:04d}").mkdir(parents=True),
    )
    (series,) = discover(tmp_path)
    assert len(series.files) == 4
    assert series.usable


def test_one_series_is_split_by_echo_orientation_and_image_type(tmp_path: Path) -> None:
    uid = "1.2.840.77"
    magnitude, phase = ["ORIGINAL", "PRIMARY", "M", "ND"], ["ORIGINAL", "PRIMARY", "P", "ND"]
    write_series(tmp_path, SeriesInstanceUID=uid, file_name="a{}".format, ImageType=magnitude)
    write_series(tmp_path, SeriesInstanceUID=uid, file_name="b{}".format, ImageType=phase)
    write_series(tmp_path, SeriesInstanceUID=uid, file_name="c{}".format, ImageType=magnitude, EchoTime=92.5)
    sagittal = scanner_affine("sagittal")
    write_series(tmp_path, None, sagittal, SeriesInstanceUID=uid, file_name="d{}".format, ImageType=magnitude)
    found = discover(tmp_path)
    assert [series.name for series in found] == [
        "003_t1_mprage_te3_5_m_ax",
        "003_t1_mprage_te3_5_m_sag",
        "003_t1_mprage_te3_5_p_ax",
        "003_t1_mprage_te92_5_m_ax",
    ]
    assert [len(series.files) for series in found] == [4, 4, 4, 4]
    assert all(series.usable for series in found)


def test_jitter_of_the_orientation_does_not_split_a_series(tmp_path: Path) -> None:
    def jitter(dataset: pydicom.Dataset, k: int) -> None:
        dataset.ImageOrientationPatient = [1, 0.0005 + 1e-5 * (-1) ** k, 0, -0.0005, 1, 0]

    write_series(tmp_path, stored_values((5, 6, 8)), edit=jitter)
    (series,) = discover(tmp_path)
    assert series.usable


def test_equal_names_of_two_patients_get_a_hash_of_the_series_uid(tmp_path: Path) -> None:
    for patient in ("a", "b"):
        write_series(tmp_path / patient, SeriesInstanceUID=f"1.2.{ord(patient)}")
    found = names(tmp_path)
    assert len(set(found)) == 2
    assert all(name.startswith("003_t1_mprage_") and len(name) == len("003_t1_mprage_123456") for name in found)


def test_copies_of_a_series_stay_apart(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for path in paths:
        (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    first, second = discover(tmp_path)
    assert first.usable
    assert second.usable
    assert second.name == f"{first.name}_2"


def test_names_are_safe_and_free_of_patient_data(tmp_path: Path) -> None:
    write_series(tmp_path, SeriesDescription="../T1 *öä/ :x", file_name="a{}".format)
    write_series(tmp_path, SeriesDescription="", SeriesNumber=None, file_name="b{}".format)
    found = discover(tmp_path)
    assert [series.name for series in found] == ["003_t1_x", "series"]
    assert not any(word in str(series).lower() for series in found for word in (*PATIENT.lower().split("^"), "4711"))


def test_files_that_are_no_scans_are_passed_over(tmp_path: Path) -> None:
    paths = write_series(tmp_path, file_name="IM{}".format)  # no suffix
    for name in ("notes.txt", "side.json", "picture.png", "README", ".hidden.nii.gz", ".DS_Store"):
        (tmp_path / name).write_bytes(b"not a scan" * 50)
    directory = pydicom.dcmread(paths[0])
    for keyword in ("SOPClassUID", "Rows", "Columns", "PixelData"):
        delattr(directory, keyword)
    directory.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    directory.save_as(tmp_path / "DICOMDIR", enforce_file_format=False)
    report = pydicom.dcmread(paths[0])
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = pydicom.uid.BasicTextSRStorage
    for keyword in ("Rows", "Columns", "PixelData"):
        delattr(report, keyword)
    report.save_as(tmp_path / "report.dcm")
    (series,) = discover(tmp_path)
    assert len(series.files) == 4
    assert series.usable


@pytest.mark.parametrize("size", [0, 1, 100, 140, 420, 700])
def test_a_damaged_file_does_not_stop_the_rest(tmp_path: Path, size: int) -> None:
    (path, *_) = write_series(tmp_path / "source")
    good = write_nifti(tmp_path / "in/good.nii.gz").read_bytes()
    (tmp_path / "in/bad.dcm").write_bytes(path.read_bytes()[:size])
    (tmp_path / "in/cut.nii.gz").write_bytes(good[: size // 20])
    (tmp_path / "in/text.nii.gz").write_bytes(gzip.compress(b"text"))
    found = {series.name: series for series in discover(tmp_path / "in")}
    assert list(found) == ["bad", "cut", "good", "text"]
    assert {name for name, series in found.items() if series.usable} == {"good"}
    with pytest.raises(MedfusionError, match="bad: cannot be used") as caught:
        read(found["bad"])
    assert found["bad"].problems[0] in str(caught.value)


@pytest.mark.filterwarnings("error")  # pydicom's warnings quote values, and with them names
def test_random_bytes_do_not_stop_the_rest(tmp_path: Path) -> None:
    """Damage anywhere in a header ends in a series, with or without problems, never in an exception."""
    write_series(tmp_path / "good", SeriesNumber=1)
    (path, *_) = write_series(tmp_path / "source")
    generator = np.random.default_rng(0)
    original = np.frombuffer(path.read_bytes(), np.uint8)
    (tmp_path / "good/noise.dcm").write_bytes(generator.bytes(2000))
    for trial in range(300):
        damaged = original.copy()
        where = generator.integers(132, damaged.size, 6)
        damaged[where] = generator.integers(0, 256, where.size)
        (tmp_path / f"good/{trial}.dcm").write_bytes(damaged.tobytes())
    found = discover(tmp_path / "good")
    assert any(series.usable and len(series.files) == 4 for series in found)
    assert any(problem for series in found for problem in series.problems)


def test_a_broken_link_is_a_problem(tmp_path: Path) -> None:
    write_nifti(tmp_path / "good.nii.gz")
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    (tmp_path / "gone.dcm").symlink_to(tmp_path / "nowhere.dcm")
    assert [(series.name, series.usable) for series in discover(tmp_path)] == [
        ("gone", False),
        ("gone_2", False),
        ("good", True),
    ]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write_nifti(tmp_path / "store/t1.nii.gz")
    (tmp_path / "study").mkdir()
    (tmp_path / "study/link").symlink_to(tmp_path / "store")
    (tmp_path / "study/loop").symlink_to(tmp_path / "study")
    assert names(tmp_path / "study") == ["t1"]


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    created = ("c", "a", "b")
    for name in created:
        write_series(tmp_path / name, SeriesInstanceUID=f"1.2.{ord(name)}", SeriesDescription=name)
    first, second = (
        [(series.name, series.files) for series in discover(tmp_path)],
        [(series.name, series.files) for series in discover(tmp_path)],
    )
    assert first == second
    assert [name for name, _ in first] == ["003_a", "003_b", "003_c"]


def test_bids_gives_the_anatomical_images(tmp_path: Path) -> None:
    (tmp_path / "dataset_description.json").write_text("{}")
    for name in (
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_FLAIR.nii.gz",
        "sub-02/ses-1/func/sub-02_ses-1_bold.nii.gz",
        "derivatives/tool/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
    ):
        write_nifti(tmp_path / name)
    assert names(tmp_path) == ["sub-01_T1w", "sub-02_ses-1_FLAIR"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["imagesTr/a_0000", "imagesTr/b_0000", "imagesTs/c_0000"], ["a", "b", "c"]),
        (["imagesTr/a_0000", "imagesTr/a_0001"], ["a_0000", "a_0001"]),
    ],
    ids=["one channel", "two channels"],
)
def test_nnunet_raw_gives_the_images(tmp_path: Path, files: list[str], expected: list[str]) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    for name in [*files, "labelsTr/a"]:
        write_nifti(tmp_path / f"{name}.nii.gz")
    assert names(tmp_path) == expected


def test_nowhere_and_nothing_are_errors_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(MedfusionError, match="no such file or folder") as caught:
        discover(tmp_path / "nowhere")
    assert caught.value.fix
    (tmp_path / "notes.txt").write_text("nothing")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(MedfusionError, match="no scan found") as caught:
            discover(path)
        assert caught.value.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    write_nifti(tmp_path / "open/t1.nii.gz")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(MedfusionError, match="closed: the folder cannot be read"):
        discover(tmp_path)


def test_conventions_hold_below_a_folder_of_data_sets(tmp_path: Path) -> None:
    for name in (
        "Dataset001_A/imagesTr/a_0000.nii.gz",
        "Dataset001_A/labelsTr/a.nii.gz",
        "study/sub-1/anat/sub-1_T1w.nii.gz",
        "study/derivatives/tool/sub-1_seg.nii.gz",
    ):
        write_nifti(tmp_path / name)
    (tmp_path / "Dataset001_A" / "dataset.json").write_text("{}")
    (tmp_path / "study" / "dataset_description.json").write_text("{}")
    assert names(tmp_path) == ["a_0000", "sub-1_T1w"]
