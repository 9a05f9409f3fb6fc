"""Volume, errors and configuration."""

from pathlib import Path

import numpy as np
import pytest

from medfusion.config import load_config
from medfusion.errors import MedfusionError
from medfusion.volume import Volume

ROOT = Path(__file__).parent.parent


def test_volume_knows_its_geometry():
    affine = np.array([[0, 0, 3.0, -10], [-1.0, 0, 0, 20], [0, 2.0, 0, 30], [0, 0, 0, 1]])
    volume = Volume(np.zeros((4, 5, 6), np.int16), affine, "case", "MR")
    assert volume.orientation == "PSR"
    assert volume.spacing.tolist() == [1, 2, 3]
    assert volume.voxel_ml == pytest.approx(0.006)
    assert volume.to_world([1, 1, 1]).tolist() == [-7, 19, 32]
    assert "4 x 5 x 6 voxels, 1 x 2 x 3 mm, PSR, int16" in repr(volume)
    with pytest.raises(ValueError, match="does not fit"):
        volume.with_array(np.zeros((4, 5, 7)))
    with pytest.raises(ValueError, match="3D"):
        Volume(np.zeros((4, 5)), affine)


def test_errors_print_as_one_block():
    error = MedfusionError("sub-07: shapes differ", image="3 x 4", mask_file="m.nii", fix="resample")
    assert str(error) == "sub-07: shapes differ\n  image      3 x 4\n  mask file  m.nii\n  Fix        resample"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path):
    config = load_config(path, ["training.steps=7", "data.images=*_x.nii.gz", "data.masks="])
    assert config.data.masks == ""
    assert config.training.steps == 7
    assert config.data.images == "*_x.nii.gz"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: x\nspeling: 1", [], "speling"),
        ("name: x\ntraining: {steps: 0}", [], "training.steps"),
        ("name: x\ntraining: {learning_rate: -1}", [], "training.learning_rate"),
        ("name: x\nnetwork: {channels: [8, 8], blocks: [1]}", [], "2 levels"),
        ("name: Bad Name", [], "name"),
        ("name: x", ["training.steps"], "not of the form"),
        ("name: x", ["name.first=1"], "not a section"),
        ("[1, 2]", [], "mapping"),
        ("a: [", [], "not valid YAML"),
    ],
)
def test_bad_configs_are_refused_by_field(tmp_path, text, overrides, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(MedfusionError) as caught:
        load_config(path, overrides)
    assert message in str(caught.value)
    with pytest.raises(MedfusionError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_a_config_may_say_only_where_it_differs_from_another(tmp_path):
    (tmp_path / "first.yaml").write_text(
        "name: first\ntraining: {steps: 7, batch: 4, times: {spread: 0.5}}\ndata: {crop: 32}\nnotes: mine\nlicence: CC0"
    )
    (tmp_path / "second.yaml").write_text("base: first.yaml\nname: second\ntraining: {steps: 9}")
    (tmp_path / "third.yaml").write_text(
        "base: second.yaml\nname: third\ndata: {crop: 48}\ntraining: {times: {median: 0.1}}\nnotes: its own"
    )
    third = load_config(tmp_path / "third.yaml", ["training.seed=5"])
    assert (third.name, third.notes, third.data.crop) == ("third", "its own", 48)
    assert (third.training.steps, third.training.batch, third.training.seed) == (9, 4, 5)
    assert (third.training.times.median, third.training.times.spread) == (0.1, 0.5)
    second = load_config(tmp_path / "second.yaml")
    assert (second.data.crop, second.notes, second.licence) == (32, "", "")  # other scans may be meant


@pytest.mark.parametrize(
    ("text", "message"),
    [("base: none.yaml\nname: x", "none.yaml: cannot be read"), ("base: c.yaml\nname: x", "builds on itself")],
)
def test_a_base_that_cannot_be_used_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(MedfusionError, match=message):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["network.labels=3"], "network.labels needs data.labels"),
        (["network.classes=[a]"], "go together"),
        (["data.classes=c.csv"], "go together"),
        (["data.painted_share=0.5"], "painted_share needs labels"),
        (["data.labels=x", "data.painted_share=0.6", "data.remapped_share=0.5"], "together above 1"),
        (["data.crop=48", "network.channels=[8, 8, 8, 8, 8]", "network.blocks=[1, 1, 1, 1, 1]"], "multiple of 32"),
        (["training.objective=hybrid"], "go together"),
        (["process.family=ve", "process.sigma_min=60"], "is not below"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(tmp_path, overrides, message):
    (tmp_path / "c.yaml").write_text("name: x")
    with pytest.raises(MedfusionError) as caught:
        load_config(tmp_path / "c.yaml", overrides)
    assert message in str(caught.value)


def test_classes_may_be_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("name: x")
    config = load_config(tmp_path / "c.yaml", ["network.classes=[0, 1]", "data.classes=../c.csv"])
    assert config.network.classes == ("0", "1")
