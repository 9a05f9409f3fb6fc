"""The planned config of a prior for a training set, and the training set as cases."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from segmentation_factory import NAMES, SHAPE, SPACING, label_map, write_set

from medfusion.errors import MedfusionError
from medfusion.io.training_set import read_training_set
from medfusion.training import load_training_set, plan_config, with_classes


def test_the_plan_follows_the_set(tmp_path: Path) -> None:
    config = plan_config(read_training_set(write_set(tmp_path / "Dataset001_Body", 12)))
    assert config.name == "dataset001_body"
    assert config.label_names == tuple(NAMES)
    assert config.network.labels == 3
    assert config.network.located
    assert config.preprocessing.spacing == SPACING
    assert config.preprocessing.modality == "MR"
    assert config.data.crop == 16 * (min(SHAPE) // 16)
    assert config.data.flips == "x"
    assert not config.data.unlabelled


def test_labels_that_tell_left_from_right_are_not_mirrored_and_unlabelled_scans_join(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 10, unlabelled=2)
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace('"front"', '"left kidney"').replace('"MRI"', '"CT"'))
    config = plan_config(read_training_set(folder))
    assert config.data.flips == ""
    assert config.data.unlabelled
    assert config.preprocessing.modality == "CT"


def test_too_few_cases_say_how_many_would_do(tmp_path: Path) -> None:
    with pytest.raises(MedfusionError, match="9 labelled case") as error:
        plan_config(read_training_set(write_set(tmp_path / "set", 9, unlabelled=5)))
    assert str(error.value.facts["enough"]).startswith("10;")


def test_a_training_set_becomes_cases_with_and_without_label_maps(tmp_path: Path) -> None:
    real = read_training_set(write_set(tmp_path / "set", 10, unlabelled=2))
    cases, audit = load_training_set(real, plan_config(real), cache=tmp_path / "cache")
    assert {case.name: case.labels is not None for case in cases} == {f"case{n:02d}": n < 10 for n in range(12)}
    np.testing.assert_array_equal(cases[3].labels, label_map(3))
    assert cases[3].image.dtype == torch.float16
    assert "2 scan(s) without a label map" in audit.properties["label values"]
    nibabel.save(nibabel.Nifti1Image(label_map(3) * 5, np.diag([2, 2, 2, 1])), real.root / "labelsTr" / "case03.nii.gz")
    with pytest.raises(MedfusionError, match="case03: label values 5, 10"):
        load_training_set(real, plan_config(real), cache=tmp_path / "cache")


def test_the_classes_of_a_table_are_planned_for(tmp_path: Path) -> None:
    real = read_training_set(write_set(tmp_path / "set", 10, unlabelled=1))
    table = tmp_path / "sex.csv"
    table.write_text("case,class\n" + "".join(f"case{n:02d},{'FM'[n % 2]}\n" for n in range(11)))
    config = with_classes(plan_config(real), real, table)
    assert config.network.classes == ("F", "M")
    assert config == type(config).model_validate(config.model_dump())
    cases, _ = load_training_set(real, config, cache=tmp_path / "cache")
    assert {case.name: case.class_index for case in cases} == {f"case{n:02d}": n % 2 for n in range(11)}
    table.write_text("case,class\ncase00,F\n")
    with pytest.raises(MedfusionError, match="does not fit"):
        with_classes(plan_config(real), real, table)
