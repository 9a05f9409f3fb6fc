"""The audit: every property with its counts, and each rule on scans that break it and on scans that just do not."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prior_factory import grid, head, tiny_config

from medfusion.data.crops import prepare
from medfusion.training.audit import Audit, Scan, measure
from medfusion.volume import Volume


def scan(name: str, **changes: Any) -> Scan:
    facts = {
        "name": name,
        "shape": (40, 40, 40),
        "spacing": (2.0, 2.0, 2.0),
        "orientation": "RAS",
        "modality": "",
        "low": 0.0,
        "high": 900.0,
        "prepared": (40, 40, 40),
        "labels": (),
        "digest": name,
    }
    return Scan.model_validate(facts | changes)


def audit(*scans: Scan, **sections: dict[str, Any]) -> Audit:
    return Audit(scans, tiny_config(**sections), {})


def remarks(*scans: Scan, **sections: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [tuple(remark) for remark in audit(*scans, **sections).remarks]


def test_a_scan_is_measured_along_the_axes_of_the_world() -> None:
    affine = grid((30, 44, 50), (3.0, 1.0, 2.0), "PSR", (5, 0, 8))
    volume = Volume(head(affine, (30, 44, 50)), affine, "oblique", "MR")
    labels = volume.with_array((volume.array > 500).astype(np.uint8) * 7)
    case = prepare(volume, tiny_config().preprocessing)
    found = measure(volume, case, labels)
    assert (found.name, found.modality, found.orientation) == ("oblique", "MR", "PSR")
    assert found.shape == (50, 30, 44)
    np.testing.assert_allclose(found.spacing, (2.0, 3.0, 1.0))
    assert found.prepared == tuple(case.image.shape) == (50, 45, 22)
    assert found.labels == (0, 7)
    below, above = (volume.array < found.low).mean(), (volume.array > found.high).mean()
    assert 0 <= below <= 0.01
    assert 0.009 < above <= 0.01


def test_the_digest_tells_voxels_apart_and_not_names() -> None:
    affine = grid((40, 40, 40))
    seeds = {"a": 0, "b": 0, "c": 1}
    first, again, other = (Volume(head(affine, (40,) * 3, noise=9, seed=s), affine, n) for n, s in seeds.items())
    digests = [measure(v, prepare(v, tiny_config().preprocessing), None).digest for v in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_the_table_counts_what_is_there() -> None:
    scans = [
        scan("a", orientation="PSR", labels=(0, 3), low=-2, high=400),
        scan("b", modality="MR", labels=(0, 5), spacing=(1, 1, 1.2), shape=(80, 80, 66)),
        scan("c", digest="a"),
    ]
    found = Audit(tuple(scans), tiny_config(), {"a": "well", "b": "ill", "c": "well"}, ("x", "y")).properties
    assert found == {
        "scans": "2",
        "left out": "2 by --exclude, 1 copies",
        "voxels R x A x S": "40 x 40 x 40 (2), 80 x 80 x 66 (1)",
        "spacing in mm": "2 x 2 x 2 (2), 1 x 1 x 1.2 (1); all are resampled to 2",
        "orientation": "RAS (2), PSR (1)",
        "modality": "not stated (2), MR (1)",
        "1st percentile": "-2 to 0",
        "99th percentile": "400 to 900",
        "label values": "3, from 0 to 5; 1 scan(s) without a label map",
        "class": "well (2), ill (1)",
    }


def test_many_shapes_are_a_range() -> None:
    found = audit(*(scan(f"{n}", shape=(30 + n, 50, 40 - n)) for n in range(5))).properties
    assert found["voxels R x A x S"] == "(30 to 34) x (50) x (36 to 40), 5 different"
    assert found["spacing in mm"] == "2 x 2 x 2 (5)"


def test_copies_go_back_to_the_first_by_name() -> None:
    found = audit(scan("a"), scan("b", digest="a"), scan("c"), scan("d", digest="a"))
    assert found.copies == {"b": "a", "d": "a"}
    assert [remark.scan for remark in found.remarks] == ["b", "d"]


@pytest.mark.parametrize(
    ("odd", "rule"),
    [
        ({"spacing": (2.0, 2.0, 3.1)}, "spacing over 1.5 times off the median"),
        ({"spacing": (2.0, 1.2, 2.0)}, "spacing over 1.5 times off the median"),
        ({"high": 9100.0}, "1st to 99th percentile over 10 times wider or narrower than the median"),
        ({"high": 80.0}, "1st to 99th percentile over 10 times wider or narrower than the median"),
        ({"high": 0.0}, "1st to 99th percentile over 10 times wider or narrower than the median"),
        ({"low": -1000.0}, "1st to 99th percentile unlike MR"),
        ({"prepared": (40, 15, 40)}, "smaller than a crop of 16 voxels, its edge is repeated"),
    ],
)
def test_what_looks_wrong_is_named(odd: dict[str, Any], rule: str) -> None:
    assert [found[:2] for found in remarks(scan("a"), scan("b"), scan("odd", **odd))] == [("odd", rule)]


@pytest.mark.parametrize(
    "fair",
    [{"spacing": (2.0, 1.4, 2.9)}, {"high": 8900.0}, {"high": 95.0}, {"low": -20.0}, {"prepared": (16, 16, 16)}],
)
def test_what_differs_a_little_is_not(fair: dict[str, Any]) -> None:
    assert remarks(scan("a"), scan("b"), scan("fair", **fair)) == []


def test_mr_among_ct() -> None:
    ct = {"low": -1000.0, "high": 600.0}
    found = remarks(scan("a", **ct), scan("b", **ct), scan("c"), preprocessing={"modality": "CT"})
    assert found == [("c", "1st to 99th percentile unlike CT", "0 to 900")]


def test_the_csv_file_has_a_row_for_each_scan(tmp_path: Path) -> None:
    found = Audit((scan("a", labels=(0, 1)), scan("b", digest="a")), tiny_config(), {"a": "x, y", "b": "z"})
    found.save(tmp_path / "audit.csv")
    with (tmp_path / "audit.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["case"] == "a"
    assert [first[name] for name in ("shape", "class", "label_values", "remarks")] == ["40 x 40 x 40", "x, y", "2", ""]
    assert second["remarks"] == "same voxels as another scan, left out (a)"


def test_it_outlives_the_cache_as_json() -> None:
    one = scan("a", labels=(0, 2), low=1 / 3)
    assert Scan.model_validate_json(one.model_dump_json()) == one
