"""Which scans train: NIfTI with what belongs to them, DICOM; prepared once; every problem is named at once."""

import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from dicom_factory import write_series
from filelock import FileLock
from numpy.typing import NDArray
from prior_factory import CENTRE, grid, head, tiny_config, write_head

from medfusion.config import Config
from medfusion.data.crops import STRIPPED, UNKNOWN, WHOLE_HEAD, Case
from medfusion.errors import MedfusionError
from medfusion.training import Audit, load_cases, load_domains

T1 = {"images": "*_T1.nii.gz"}
MASKED = tiny_config(data=T1 | {"masks": "*_mask.nii.gz"})
LABELLED = tiny_config(data=T1 | {"labels": "*_labels.nii.gz"})


def regions(radius: float = 25.0, size: int = 40) -> NDArray[np.uint8]:
    """1 in a ball inside `write_head`, 2 in its right half."""
    world = nibabel.affines.apply_affine(grid((40, 40, 40)), np.moveaxis(np.indices((size, 40, 40)), 0, -1))
    ball = np.linalg.norm(world - CENTRE, axis=-1) < radius
    return (ball * (1 + (world[..., 0] > CENTRE[0]))).astype(np.uint8)


def write_map(path: Path, array: NDArray[Any] | None = None, shift: float = 0.0) -> None:
    affine = grid((40, 40, 40))
    affine[0, 3] += shift
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(regions() if array is None else array, affine), path)


def write_dicom_head(folder: Path, modality: str = "MR", number: int = 1) -> None:
    shape = (40, 40, 28)
    affine = grid(shape, (2.0, 2.0, 2.8), "LPS")
    array = head(affine, shape, noise=10).clip(0).astype(np.uint16)
    write_series(folder, array, affine, modality=modality, SeriesNumber=number)


def load(folder: Path, config: Config | None = None, *exclude: str) -> tuple[list[Case], Audit]:
    return load_cases(folder, config or tiny_config(), cache=folder.parent / "cache", exclude=exclude)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def test_every_nifti_file_becomes_a_case_and_is_prepared_once(data: Path) -> None:
    for seed, name in enumerate("ab"):
        write_head(data / f"{name}.nii.gz", seed=seed)
    told: list[tuple[int, int, str]] = []

    def cases() -> list[Case]:
        options: dict[str, Any] = {"cache": data.parent / "cache", "progress": lambda *state: told.append(state)}
        return load_cases(data, tiny_config(), **options)[0]

    first = cases()
    assert [(case.name, case.kind) for case in first] == [("a", WHOLE_HEAD), ("b", WHOLE_HEAD)]
    assert first[0].image.shape == (40, 40, 40)
    np.testing.assert_allclose(first[0].centre, 19.5, atol=0.5)
    again = cases()
    assert told == [(1, 2, "a"), (2, 2, "b")]
    assert all(torch.equal(old.image, new.image) for old, new in zip(first, again, strict=True))
    write_head(data / "b.nii.gz", seed=9)
    changed = cases()
    assert told[2:] == [(1, 1, "b")]
    assert not torch.equal(changed[1].image, first[1].image)


def test_a_damaged_file_of_the_cache_is_made_again_and_others_are_left_alone(data: Path) -> None:
    for seed, name in enumerate("ab"):
        write_head(data / f"{name}.nii.gz", seed=seed)
    load(data)
    cache = data.parent / "cache"
    damaged, whole = cache.glob("*.safetensors")
    before, untouched = damaged.read_bytes(), whole.stat().st_mtime_ns
    damaged.write_bytes(before[:1000])
    (cache / "of_another_run.safetensors").touch()
    load(data)
    assert damaged.read_bytes() == before
    assert whole.stat().st_mtime_ns == untouched
    assert (cache / "of_another_run.safetensors").exists()


def test_a_second_process_waits_and_finds_the_scans_prepared(data: Path) -> None:
    write_head(data / "a.nii.gz")
    load(data)
    filled, shared = data.parent / "cache", data.parent / "shared"
    shared.mkdir()
    told: list[tuple[int, int, str]] = []
    options: dict[str, Any] = {"cache": shared, "progress": lambda *state: told.append(state)}
    with FileLock(shared / ".lock"):  # as the process holds it that prepares
        second = threading.Thread(target=load_cases, args=(data, tiny_config()), kwargs=options)
        second.start()
        second.join(2)
        assert second.is_alive()
        for path in filled.glob("*.safetensors"):
            shutil.copy(path, shared)
    second.join()
    assert told == []


def test_masks_add_the_stripped_twin(data: Path) -> None:
    write_head(data / "a_T1.nii.gz")
    write_map(data / "a_mask.nii.gz")
    (whole, brain), audit = load(data, MASKED)
    assert (whole.name, brain.name) == ("a_T1", "a_T1")
    assert (whole.kind, brain.kind) == (WHOLE_HEAD, STRIPPED)
    outside = np.linalg.norm((np.indices((40, 40, 40)).T - 19.5) * 2, axis=-1).T > 30
    assert brain.image[outside].float().std() < 0.01
    assert whole.image[outside].float().std() > 0.1
    assert len(audit.scans) == 1


@pytest.mark.parametrize(
    ("images", "labels", "scan", "beside"),
    [
        ("*_T1.nii.gz", "*_labels.nii.gz", "a_T1.nii.gz", "a_labels.nii.gz"),
        ("*.nii.gz", "../labels/*.nii.gz", "a.nii.gz", "../labels/a.nii.gz"),
        ("*_0000.nii.gz", "../labelsTr/*.nii.gz", "a_0000.nii.gz", "../labelsTr/a.nii.gz"),
        (
            "sub-*_T1w.nii",
            "../../derivatives/sub-*/sub-*_dseg.nii.gz",
            "sub-1_T1w.nii",
            "../../derivatives/sub-1/sub-1_dseg.nii.gz",
        ),
    ],
)
def test_labels_are_found_where_the_star_says(tmp_path: Path, images: str, labels: str, scan: str, beside: str) -> None:
    write_head(tmp_path / "set" / "images" / scan)
    write_map((tmp_path / "set" / "images" / beside).resolve())
    config = tiny_config(data={"images": images, "labels": labels})
    [case], audit = load(tmp_path / "set" / "images", config)
    assert case.labels is not None
    assert case.labels.dtype == torch.uint8
    np.testing.assert_array_equal(case.labels, regions())
    assert audit.scans[0].labels == (0, 1, 2)


def test_twins_carry_labels_and_class(data: Path) -> None:
    for seed, name in enumerate("ab"):
        write_head(data / f"{name}_T1.nii.gz", seed=seed)
        write_map(data / f"{name}_labels.nii.gz", regions().astype(np.float32) * 200)
    (data / "classes.csv").write_text("\ufeffcase,age,class\nb_T1,50,ill\na_T1,40,well\nelsewhere,1,unheard of\n")
    both = T1 | {"masks": "*_labels.nii.gz", "labels": "*_labels.nii.gz", "classes": "classes.csv"}
    cases, audit = load(data, tiny_config(data=both, network={"classes": ("well", "ill"), "labels": 401}))
    assert [(case.name, case.class_index) for case in cases] == [("a_T1", 0)] * 2 + [("b_T1", 1)] * 2
    for case in cases:
        assert case.labels is not None
        assert case.labels.dtype == torch.int16
        np.testing.assert_array_equal(case.labels.unique(), (0, 200, 400))
    assert audit.properties["class"] == "well (1), ill (1)"
    assert load(data, tiny_config(data=T1))[0][0].class_index == UNKNOWN


def test_a_pattern_chooses(data: Path) -> None:
    for name in ("a_T1", "a_T2"):
        write_head(data / f"{name}.nii.gz")
    [case], _ = load(data, tiny_config(data=T1))
    assert case.name == "a_T1"
    with pytest.raises(MedfusionError, match="no scan found"):
        load(data, tiny_config(data={"images": "*_FLAIR.nii.gz"}))


def test_scans_are_left_out_by_name(data: Path) -> None:
    for seed, name in enumerate(("a1", "a2", "b1")):
        write_head(data / f"{name}.nii.gz", seed=seed)
    (data / "b2.nii.gz").touch()  # nobody minds a file that is left out
    cases, audit = load(data, None, "a?", "b2")
    assert [case.name for case in cases] == ["b1"]
    assert audit.excluded == ("a1", "a2", "b2")
    with pytest.raises(MedfusionError, match=r"--exclude c\*: no scan has such a name"):
        load(data, None, "a1", "c*")
    with pytest.raises(MedfusionError, match="leaves none of 4"):
        load(data, None, "*")


def test_copies_are_used_once(data: Path) -> None:
    for name in ("a_T1", "c_T1"):
        write_head(data / f"{name}.nii.gz")
        write_map(data / f"{name.removesuffix('_T1')}_mask.nii.gz")
    write_head(data / "b_T1.nii.gz", seed=1)
    write_map(data / "b_mask.nii.gz")
    cases, audit = load(data, MASKED)
    assert [case.name for case in cases] == ["a_T1", "a_T1", "b_T1", "b_T1"]
    assert audit.copies == {"c_T1": "a_T1"}


def test_scans_of_two_domains_may_have_one_name_and_a_copy_is_used_once(data: Path) -> None:
    for folder, names in (("first", "ab"), ("second", "ac")):
        for seed, name in enumerate(names):
            write_head(data / folder / f"{name}.nii.gz", seed=10 * (folder == "second") + seed)
    shutil.copy(data / "first" / "b.nii.gz", data / "second" / "d.nii.gz")
    tree = {"family": "cyclegan", "cyclegan": {"domains": [{"name": "first"}, {"name": "second"}], "layers": 1}}
    config = Config.model_validate(tiny_config().model_dump() | tree)
    folders = [data / "first", data / "second"]
    cases, audit = load_domains(folders, config, cache=data / "cache", exclude=["second/c"])
    assert [(case.name, case.class_index) for case in cases] == [("first a", 0), ("first b", 0), ("second a", 1)]
    assert audit.classes == {"first a": "first", "first b": "first", "second a": "second", "second d": "second"}
    assert audit.copies == {"second d": "first b"}
    assert audit.excluded == ("second c",)


def test_dicom_series_become_cases(data: Path) -> None:
    write_dicom_head(data / "dicom")
    [case], audit = load(data)
    assert case.name.startswith("001_t1_mprage")
    assert tuple(case.image.shape) == (40, 40, 39)  # 28 slices of 2.8 mm at 2 mm
    assert audit.properties["modality"] == "MR (1)"
    with pytest.raises(MedfusionError, match="1 of 1 scans") as error:
        load(data, tiny_config(data={"masks": "*_mask.nii.gz", "images": "*.nii.gz"}))
    assert "mask can be named for NIfTI files only" in str(error.value)


def test_all_problems_are_listed_at_once(data: Path) -> None:
    write_head(data / "a_good.nii.gz")
    (data / "b_empty.nii.gz").touch()
    truncated = write_head(data / "c_truncated.nii.gz")
    truncated.write_bytes(truncated.read_bytes()[:20_000])
    affine = grid((40, 40, 40))
    nibabel.save(nibabel.Nifti1Image(np.full((40, 40, 40), 7.0), affine), data / "fix.nii.gz")
    write_dicom_head(data / "ct", "CT", number=8)
    with pytest.raises(MedfusionError) as error:
        load(data)
    message = str(error.value)
    assert "4 of 5 scans cannot be trained on" in message
    for expected in (
        "b_empty: cannot be used (problem_1 the file is empty)",
        "c_truncated: the file is truncated",
        "fix: no tissue stands out from the background (range 7.0 to 7.0)",
        "008_t1_mprage: is CT, the config is for MR",
    ):
        assert expected in message
    assert "a_good" not in message
    assert "--exclude" in error.value.fix
    assert "data.masks" not in error.value.fix
    assert [case.name for case in load(data, None, "[bcf]*", "008*")[0]] == ["a_good"]


def test_problems_with_masks(data: Path) -> None:
    for name in ("apart", "none", "other"):
        write_head(data / f"{name}_T1.nii.gz")
    write_map(data / "apart_mask.nii.gz", shift=1.0)
    write_map(data / "other_mask.nii.gz", regions(size=39))
    with pytest.raises(MedfusionError) as error:
        load(data, MASKED)
    message = str(error.value)
    assert "apart_T1: scan and mask lie apart (corners up to 1 mm)" in message
    assert f"none_T1: no mask where expected (expected {data / 'none_mask.nii.gz'})" in message
    assert "other_T1: scan and mask have different shapes (shapes (40, 40, 40) and (39, 40, 40))" in message
    assert "--set data.masks=''" in error.value.fix


def test_problems_with_labels(data: Path) -> None:
    maps = {
        "fraction": regions() + np.float32(0.5),
        "good": regions(),
        "huge": regions().astype(np.int32) * 40_000,
        "negative": -regions().astype(np.int16),
    }
    for seed, (name, array) in enumerate(maps.items()):
        write_head(data / f"{name}_T1.nii.gz", seed=seed)
        write_map(data / f"{name}_labels.nii.gz", array)
    with pytest.raises(MedfusionError, match="3 of 4 scans") as error:
        load(data, LABELLED)
    message = str(error.value)
    assert "fraction_T1: labels are whole numbers from 0 to 32767 (range 0.5 to 2.5, fractions 64000)" in message
    assert "huge_T1: labels are whole numbers from 0 to 32767 (range 0 to 80000" in message
    assert "negative_T1: labels are whole numbers from 0 to 32767 (range -2 to 0" in message


def test_labels_that_the_network_does_not_know(data: Path) -> None:
    for seed, (name, factor) in enumerate({"a": 1, "b": 3}.items()):
        write_head(data / f"{name}_T1.nii.gz", seed=seed)
        write_map(data / f"{name}_labels.nii.gz", regions() * np.uint8(factor))
    assert len(load(data, LABELLED)[0]) == 2  # painted, not shown: any value will do
    config = tiny_config(data=T1 | {"labels": "*_labels.nii.gz"}, network={"labels": 4})
    with pytest.raises(MedfusionError, match="1 of 2 scans") as error:
        load(data, config)
    assert "b_T1: label values 6, network.labels has 0 to 3" in str(error.value)


def test_scans_without_a_label_map_join_where_that_is_allowed(data: Path) -> None:
    for seed, name in enumerate("abc"):
        write_head(data / f"{name}_T1.nii.gz", seed=seed)
    allowed = tiny_config(data=T1 | {"labels": "*_labels.nii.gz", "unlabelled": True})
    with pytest.raises(MedfusionError, match="no scan has a label map"):
        load(data, allowed)
    write_map(data / "b_labels.nii.gz", regions())
    with pytest.raises(MedfusionError, match="2 of 3 scans"):
        load(data, LABELLED)
    cases, audit = load(data, allowed)
    assert {case.name: case.labels is not None for case in cases} == {"a_T1": False, "b_T1": True, "c_T1": False}
    assert audit.properties["label values"] == "3, from 0 to 2; 2 scan(s) without a label map"


@pytest.mark.parametrize(
    ("images", "masks"),
    [("T1.nii.gz", "*_mask.nii.gz"), ("*_T1.nii.gz", "_mask.nii.gz"), ("*_T?.nii.gz", "*_mask.nii.gz"), ("*_*", "*")],
)
def test_patterns_without_a_star_in_common(data: Path, images: str, masks: str) -> None:
    with pytest.raises(MedfusionError, match=r"data\.masks: no telling which file belongs to which scan"):
        load(data, tiny_config(data={"images": images, "masks": masks}))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("", "lacks a column"),
        ("name,class\na,well\n", "columns    name, class"),
        ("case,class\na,well\n", "scans without a row  b"),
        ("case,class\na,well\nb,unwell\n", "unknown classes  unwell"),
        ("case,class\na,well\nb,ill\nb,well\n", "scans of two classes  b"),
        ("case,class\na,well\nb,\n", "scans without a class  b"),
        (None, "cannot be read"),
    ],
)
def test_problems_with_classes(data: Path, table: str | None, expected: str) -> None:
    for name in "ab":
        write_head(data / f"{name}.nii.gz")
    if table is not None:
        (data / "classes.csv").write_text(table)
    config = tiny_config(network={"classes": ("well", "ill")}, data={"classes": "classes.csv"})
    with pytest.raises(MedfusionError, match="classes: ") as error:
        load(data, config)
    assert " ".join(expected.split()) in " ".join(str(error.value).split())
    assert not (data.parent / "cache").exists()


def test_a_full_disk_is_no_problem_of_the_scans(data: Path) -> None:
    for seed, name in enumerate("ab"):
        write_head(data / f"{name}.nii.gz", seed=seed)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # of 128 kB that a case takes
    try:
        with pytest.raises(MedfusionError, match="no space left to write it"):
            load(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in (data.parent / "cache").iterdir()} <= {".lock"}
