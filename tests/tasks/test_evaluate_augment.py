"""The comparison of training sets: arms, seeds and sizes as asked for, intervals over patients, nothing leaks."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prior_factory import saved
from segmentation_factory import painting_prior, write_set

from medfusion.config import SegmenterConfig
from medfusion.errors import MedfusionError
from medfusion.io.training_set import read_training_set
from medfusion.tasks.augment import Request, describe, make_cases
from medfusion.tasks.evaluate_augment import ARMS, Comparison, Trained, drawn, evaluate_augmentation, synthetic_cases

QUICK = SegmenterConfig(channels=(4, 8), steps=2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real and test set, and twelve synthetic cases in both layouts."""
    folder = tmp_path_factory.mktemp("sets")
    prior = saved(painting_prior(), folder)
    paths = {"real": write_set(folder / "real"), "test": write_set(folder / "test", 4, first=50)}
    for name, bids in (("nnunet", False), ("bids", True)):
        request = Request(12, steps=1, bids=bids)
        describe(make_cases(paths["real"], folder / name, request, prior=prior)[1])
        paths[name] = folder / name
    return paths


@pytest.mark.parametrize("layout", ["nnunet", "bids"])
def test_every_training_is_judged_on_every_test_case(sets: dict[str, Path], tmp_path: Path, layout: str) -> None:
    told: list[str] = []
    paths = sets["real"], sets[layout], sets["test"], tmp_path / "out"
    found = evaluate_augmentation(*paths, sizes=[6, 10], seeds=2, config=QUICK, device="cpu", say=told.append)
    assert {(one.size, one.seed, one.arm) for one in found.trainings} == {
        (size, seed, arm) for size in (6, 10) for seed in (0, 1) for arm in ARMS
    }
    assert len(told) == 12
    with (tmp_path / "out" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 4
    assert {row["case"] for row in rows} == {f"case{n}" for n in range(50, 54)}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for line in summary["sizes"]:
        for arm in ARMS:
            values = [float(row["dice"]) for row in rows if (int(row["size"]), row["arm"]) == (line["size"], arm)]
            assert line[arm]["value"] == pytest.approx(np.mean(values), abs=1e-5)
    with pytest.raises(MedfusionError, match="exists already"):
        evaluate_augmentation(*paths, config=QUICK)


def test_a_small_training_set_gets_the_children_of_its_own_cases_only(sets: dict[str, Path]) -> None:
    real = read_training_set(sets["real"])
    made = synthetic_cases(sets["nnunet"], real)
    assert len(made) == 12
    names = sorted(case.name for case in real.labelled)
    parents = {case.name: set(each) for case, each in made.items()}
    for seed in range(5):
        few, children = drawn(names, made, 7, seed)
        assert len(few) == 7
        assert set(children) == {name for name, each in parents.items() if each <= set(few)}
    assert drawn(names, made, 10, 0) == (names, [case.name for case in made])
    assert drawn(names, made, 7, 0)[0] != drawn(names, made, 7, 1)[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"test": "real"}, "10 problem"),
        ({"sizes": [11]}, "has 10 labelled"),
        ({"sizes": [0]}, "has 10 labelled"),
        ({"synthetic": "real"}, "holds no synthetic case"),
        ({"real": "test", "test": "real"}, "made from other real ones"),
    ],
)
def test_what_cannot_be_compared(sets: dict[str, Path], tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    chosen = {"real": "real", "synthetic": "nnunet", "test": "test"} | {
        name: value for name, value in change.items() if name != "sizes"
    }
    paths = (sets[chosen[name]] for name in ("real", "synthetic", "test"))
    with pytest.raises(MedfusionError, match=problem):
        evaluate_augmentation(*paths, tmp_path / "out", sizes=change.get("sizes", []), config=QUICK)
    assert not (tmp_path / "out").exists()


def test_a_set_of_another_tool_is_taken_as_made_from_all_real_cases(sets: dict[str, Path], tmp_path: Path) -> None:
    other = write_set(tmp_path / "other", 3, first=70)
    made = synthetic_cases(other, read_training_set(sets["real"]))
    assert {case.name for case in made} == {"case70", "case71", "case72"}
    assert all(len(parents) == 10 for parents in made.values())


def test_gain_and_interval_are_paired_over_patients() -> None:
    """Both arms vary much from patient to patient, their difference hardly."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 2)
    base = rng.normal(0.8, 0.1, 40)[patients]
    trainings = [
        Trained(10, seed, arm, base + (arm == "both") * (0.02 + rng.normal(0, 0.01, 80)), 1.0)
        for seed in range(3)
        for arm in ARMS
    ]
    found = Comparison(tuple(map(str, range(80))), tuple(map(str, patients)), tuple(trainings))
    gain, real = found.gain(10), found.dice(10, "real")
    assert gain.value == pytest.approx(0.02, abs=0.002)
    assert gain.high - gain.low < 0.006
    assert real.high - real.low == pytest.approx(2 * 1.96 * base.std() / 40**0.5, rel=0.25)
