"""The table of findings, its summary, and the anatomical names of findings."""

import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from medfusion.errors import MedfusionError
from medfusion.io.findings import (
    Finding,
    name_findings,
    read_findings,
    read_label_names,
    write_findings,
    write_summary,
)
from medfusion.volume import Volume

FIRST = Finding(1, -12.3, 40.0, 7.5, 10, 0, 99, 1.234, 5.25, 1 / 3, "brighter", 1e-5, 'Left "hand" knob, é')
SECOND = Finding(2, 0.1, -0.2, 0.3, 1, 2, 3, 0.5, 3.0, 2.5, "changed", 0.25)


def test_findings_come_back_as_they_were(tmp_path):
    path = tmp_path / "findings.csv"
    write_findings(path, [FIRST, SECOND])
    assert read_findings(path) == [FIRST, SECOND]


def test_a_table_is_plain_csv(tmp_path):
    path = tmp_path / "findings.csv"
    write_findings(path, [replace(FIRST, x=np.float64(-12.3), label="a, b"), SECOND])
    with path.open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == "number x y z i j k volume_ml peak mean direction p label".split()
    assert (first["x"], first["k"], first["volume_ml"], first["label"]) == ("-12.3", "99", "1.234", "a, b")
    assert second["label"] == ""


def test_nothing_found_is_a_header(tmp_path):
    path = tmp_path / "findings.csv"
    write_findings(path, [])
    assert path.read_text().startswith("number,x,y,z,")
    assert len(path.read_text().splitlines()) == 1
    assert read_findings(path) == []


def test_a_table_that_a_spreadsheet_saved_again(tmp_path):
    path = tmp_path / "findings.csv"
    write_findings(path, [FIRST, SECOND])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_findings(path) == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a table of findings"),
        (b"case,psnr\na,30\n", "not a table of findings"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"HEADER\n1,2,3\n", "line 2 is no finding"),
        (b"HEADER\n1,0,0,0,0,0,0,1,1,1,brighter,0.5,\n2,0,0,0,0,x,0,1,1,1,darker,0.5,\n", "line 3 is no finding"),
        (b"HEADER\n1,0,0,0,0,0,0,1,1,1,louder,0.5,\n", "line 2 is no finding"),
    ],
)
def test_what_is_no_table_of_findings_is_refused(tmp_path, content, message):
    path = tmp_path / "findings.csv"
    path.write_bytes(content.replace(b"HEADER", ",".join(asdict(FIRST)).encode()))
    with pytest.raises(MedfusionError, match=message) as error:
        read_findings(path)
    assert str(path) in str(error.value)


def test_a_table_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(MedfusionError, match="cannot be read"):
        read_findings(tmp_path / "findings.csv")


def test_summary_holds_case_facts_and_findings(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, "sub-07", [FIRST, SECOND], {"threshold": 2.5, "options": {"samples": 4}})
    summary = json.loads(path.read_text(encoding="utf-8"))
    assert list(summary) == ["case", "threshold", "options", "findings"]
    assert (summary["case"], summary["threshold"], summary["options"]) == ("sub-07", 2.5, {"samples": 4})
    assert [Finding(**finding) for finding in summary["findings"]] == [FIRST, SECOND]
    assert "é" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "write", [write_findings, lambda path, *more: write_summary(path, "a", more[0], {}, *more[1:])]
)
def test_files_are_replaced_only_when_asked_for(tmp_path, write):
    path = tmp_path / "result"
    write(path, [FIRST])
    before = path.read_bytes()
    with pytest.raises(MedfusionError, match="exists already"):
        write(path, [])
    assert path.read_bytes() == before
    write(path, [], True)
    assert path.read_bytes() != before
    assert [file.name for file in tmp_path.iterdir()] == ["result"]


# --- Names


def at(x: float, y: float, z: float) -> Finding:
    return replace(SECOND, x=x, y=y, z=z)


def label_map(*voxels: tuple[int, int, int, int], dtype=np.int16) -> Volume:
    """An oblique, anisotropic map with these labels at these voxels (i, j, k, label)."""
    axes = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = axes * [-2.0, 3.0, 4.0]
    affine[:3, 3] = [30.0, -20.0, 10.0]
    array = np.zeros((30, 25, 20), dtype)
    for i, j, k, label in voxels:
        array[i, j, k] = label
    return Volume(array, affine)


def test_the_nearest_label_names_a_finding():
    rng = np.random.default_rng(0)
    voxels = [(*(int(n) for n in rng.integers(0, (30, 25, 20))), label) for label in range(1, 300)]
    labels = label_map(*voxels)
    names = {label: f"region {label}" for label in range(1, 300)}
    kept = np.argwhere(labels.array)
    world = labels.to_world(kept)
    peaks = labels.to_world(rng.uniform(-6, 32, (200, 3)))
    named = name_findings([at(*peak) for peak in peaks], labels, names)
    distances = np.linalg.norm(peaks[:, None] - world[None], axis=-1)
    expected = [names[labels.array[tuple(kept[row.argmin()])]] if row.min() <= 20 else "" for row in distances]
    assert [finding.label for finding in named] == expected
    assert 20 < expected.count("") < 180
    assert named[0] == replace(at(*peaks[0]), label=expected[0])


@pytest.mark.parametrize(("distance", "label"), [(0.0, "here"), (19.9, "here"), (20.1, "")])
def test_labels_reach_twenty_millimetres(distance, label):
    labels = label_map((29, 24, 19, 7))
    outwards = labels.affine[:3, 0] / 2.0
    peak = labels.to_world((29, 24, 19)) + distance * outwards
    assert name_findings([at(*peak)], labels, {7: "here"})[0].label == label


def test_far_outside_the_map_and_without_any_label():
    assert name_findings([at(500.0, 0.0, -900.0)], label_map((0, 0, 0, 1)), {1: "a"})[0].label == ""
    assert name_findings([at(30.0, -20.0, 10.0)], label_map(), {1: "a"})[0].label == ""
    assert name_findings([], label_map(), {}) == []


def test_a_label_without_a_name_gives_its_number():
    labels = label_map((3, 3, 3, 17), dtype=np.float32)
    assert name_findings([at(*labels.to_world((3, 3, 3)))], labels, {1: "a"})[0].label == "17"


TABLES = {
    "csv": "index,name\n1,Thalamus\n2,Caudate nucleus\n",
    "tsv of BIDS": "index\tname\tabbreviation\tcolor\n1\tThalamus\tTh\t#ff0000\n2\tCaudate nucleus\tCN\t#00ff00\n",
    "other columns": "Name;Colour;Value\nThalamus;red;1\n\nCaudate nucleus;blue;2\n",
    "quoted": 'label,name\n1,"Thalamus"\n2,"Caudate nucleus"\n',
    "index before label": "label,index,name\nx,1,Thalamus\ny,2,Caudate nucleus\n",
    "FreeSurfer": "#$Id\n# No. Name  R G B A\n\n1   Thalamus   0 118 14 0\n2\tCaudate nucleus  122 186 220 0\n",
    "ITK-SNAP": '# IDX R G B A VIS MSH LABEL\n  1  0 118 14  1 1 1 "Thalamus"\n  2 1 2 3 0.5 0 1  "Caudate nucleus"\n',
}


@pytest.mark.parametrize("table", TABLES)
def test_label_names_of_every_table(tmp_path, table):
    path = tmp_path / "names.txt"
    path.write_text(TABLES[table])
    assert read_label_names(path) == {1: "Thalamus", 2: "Caudate nucleus"}


def test_names_that_hold_the_delimiter_numbers_and_letters_beyond_ascii(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text('\ufeffindex,name\n1,"Gyrus, superior"\n1,"Gyrus, superior"\n2,Noyau caudé\n', encoding="utf-8")
    assert read_label_names(path) == {1: "Gyrus, superior", 2: "Noyau caudé"}
    path.write_text("44 Brodmann area 44 120 18 134 0\n")
    assert read_label_names(path) == {44: "Brodmann area 44"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no label"),
        ("# nothing\n\n", "names no label"),
        ("index,name\n1,a\ntwo,b\n", "line 3 names no label"),
        ("index,name\n1\n", "line 2 names no label"),
        ("1 Thalamus 0 118 14 0\n2 Caudate\n", "line 2 names no label"),
        ("number,title\n1,a\n", "line 1 names no label"),
        ("index,name\n1,a\n1,b\n", "line 3 names label 1 again"),
    ],
)
def test_label_names_that_cannot_be_told_are_refused(tmp_path, content, message):
    path = tmp_path / "names.csv"
    path.write_text(content)
    with pytest.raises(MedfusionError, match=message) as error:
        read_label_names(path)
    assert str(path) in str(error.value)


def test_label_names_that_are_no_text_or_not_there_are_refused(tmp_path):
    (tmp_path / "names.csv").write_bytes(b"\x89PNG\xff\xfe")
    for name in ("names.csv", "none.csv"):
        with pytest.raises(MedfusionError, match="cannot be read"):
            read_label_names(tmp_path / name)
