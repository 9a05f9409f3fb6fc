"""Which scans train: NIfTI with or without masks, DICOM; every scan that cannot be used is named at once."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_factory import write_series
from prior_factory import CENTRE, grid, head, tiny_config, write_head

from medfusion.data.crops import STRIPPED, WHOLE_HEAD
from medfusion.errors import MedfusionError
from medfusion.training import load_cases

MASKED = tiny_config(data={"images": "*_T1.nii.gz", "masks": "_mask.nii.gz"})


def write_mask(path: Path, size: int = 40, radius: float = 25.0) -> None:
    """A brain inside `write_head`."""
    affine = grid((40, 40, 40))
    world = nibabel.affines.apply_affine(affine, np.moveaxis(np.indices((size, 40, 40)), 0, -1))
    mask = np.linalg.norm(world - CENTRE, axis=-1) < radius
    nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), affine), path)


def write_dicom_head(folder: Path, modality: str = "MR", number: int = 1) -> None:
    shape = (40, 40, 28)
    affine = grid(shape, (2.0, 2.0, 2.8), "LPS")
    array = head(affine, shape, noise=10).clip(0).astype(np.uint16)
    write_series(folder, array, affine, modality=modality, SeriesNumber=number)


def test_every_nifti_file_becomes_a_case(tmp_path: Path) -> None:
    for name in "ab":
        write_head(tmp_path / f"{name}.nii.gz")
    told: list[tuple[int, int, str]] = []
    cases = load_cases(tmp_path, tiny_config(), lambda *state: told.append(state))
    assert [(case.name, case.kind) for case in cases] == [("a", WHOLE_HEAD), ("b", WHOLE_HEAD)]
    assert told == [(1, 2, "a"), (2, 2, "b")]
    assert cases[0].image.shape == (40, 40, 40)
    np.testing.assert_allclose(cases[0].centre, 19.5, atol=0.5)


def test_masks_add_the_stripped_twin(tmp_path: Path) -> None:
    write_head(tmp_path / "a_T1.nii.gz")
    write_mask(tmp_path / "a_mask.nii.gz")
    whole, brain = load_cases(tmp_path, MASKED)
    assert (whole.name, brain.name) == ("a_T1", "a_T1")
    assert (whole.kind, brain.kind) == (WHOLE_HEAD, STRIPPED)
    outside = np.linalg.norm((np.indices((40, 40, 40)).T - 19.5) * 2, axis=-1).T > 30
    assert brain.image[outside].float().std() < 0.01
    assert whole.image[outside].float().std() > 0.1


def test_a_pattern_chooses(tmp_path: Path) -> None:
    for name in ("a_T1", "a_T2"):
        write_head(tmp_path / f"{name}.nii.gz")
    [case] = load_cases(tmp_path, tiny_config(data={"images": "*_T1.nii.gz"}))
    assert case.name == "a_T1"
    with pytest.raises(MedfusionError, match="no scan found"):
        load_cases(tmp_path, tiny_config(data={"images": "*_FLAIR.nii.gz"}))


def test_dicom_series_become_cases(tmp_path: Path) -> None:
    write_dicom_head(tmp_path / "dicom")
    [case] = load_cases(tmp_path, tiny_config())
    assert case.name.startswith("001_t1_mprage")
    assert tuple(case.image.shape) == (40, 40, 39)  # 28 slices of 2.8 mm at 2 mm


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    write_head(tmp_path / "a_good.nii.gz")
    (tmp_path / "b_empty.nii.gz").touch()
    truncated = write_head(tmp_path / "c_truncated.nii.gz")
    truncated.write_bytes(truncated.read_bytes()[:20_000])
    affine = grid((40, 40, 40))
    nibabel.save(nibabel.Nifti1Image(np.full((40, 40, 40), 7.0), affine), tmp_path / "fix.nii.gz")
    write_dicom_head(tmp_path / "ct", "CT", number=8)
    with pytest.raises(MedfusionError) as error:
        load_cases(tmp_path, tiny_config())
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
    assert "data.masks" not in error.value.fix


def test_a_missing_mask_and_a_mask_of_another_shape(tmp_path: Path) -> None:
    for name in ("none_T1", "other_T1"):
        write_head(tmp_path / f"{name}.nii.gz")
    write_mask(tmp_path / "other_mask.nii.gz", size=39)
    with pytest.raises(MedfusionError) as error:
        load_cases(tmp_path, MASKED)
    message = str(error.value)
    assert "none_T1: no mask beside it (expected none_mask.nii.gz)" in message
    assert "other_T1: image and mask have different shapes (image (40, 40, 40), mask (39, 40, 40))" in message
    assert "--set data.masks=''" in error.value.fix
