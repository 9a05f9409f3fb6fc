"""Definitions of an error: what each kind calls wrong, what it refuses, and that its hash tells any change."""

import math
from pathlib import Path

import pandas as pd
import pytest

from medfusion.analysis.definition import Definition, judge, read_definition
from medfusion.analysis.tables import read_cases
from medfusion.errors import MedfusionError

DICE = {"name": "dice", "case": "one scan", "error": {"kind": "value", "column": "dice", "below": 0.8}}


def definition(**stated) -> Definition:
    return Definition.model_validate(DICE | stated)


def cases(tmp_path: Path, *lines: str) -> pd.DataFrame:
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    return read_cases(tmp_path / "cases.csv")


def test_low_values_are_errors_and_severity_follows_the_loss(tmp_path: Path) -> None:
    table = cases(tmp_path, "case,patient,dice", "a,1,0.9", "b,1,0.8", "c,2,0.75", "d,3,0.1", "e,4,0")
    judged = judge(table, definition(severity={"major": 0.5, "minor": 0.1, "nothing found": 1}))
    assert judged["error"].tolist() == [False, False, True, True, True]
    assert judged["loss"].tolist() == pytest.approx([0.1, 0.2, 0.25, 0.9, 1])
    assert judged["severity"].tolist() == ["", "", "minor", "major", "nothing found"]


def test_high_values_are_errors(tmp_path: Path) -> None:
    table = cases(tmp_path, "case,patient,hd95", "a,1,3", "b,1,10", "c,2,10.5")
    judged = judge(table, definition(error={"kind": "value", "column": "hd95", "above": 10}))
    assert judged["error"].tolist() == [False, False, True]
    assert judged["loss"].tolist() == [3, 10, 10.5]
    judged = judge(table, definition(error={"kind": "value", "column": "hd95", "above": 10, "best": 4}))
    assert judged["loss"].tolist() == [1, 6, 6.5]


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"column": "x"}, "either `below` or `above`"),
        ({"column": "x", "below": 1, "above": 2}, "either `below` or `above`"),
        ({"column": "x", "below": 30}, "state `best`"),
        ({"column": "x", "above": -3}, "state `best`"),
    ],
)
def test_rules_without_a_sense(rule, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        definition(error={"kind": "value", **rule})


def test_two_classes_by_a_threshold(tmp_path: Path) -> None:
    rule = {"kind": "classification", "truth": "y", "probabilities": {"malignant": "p"}, "threshold": 0.3}
    table = cases(
        tmp_path, "case,patient,y,p", "a,1,malignant,0.3", "b,2,malignant,0.29", "c,3,benign,0.3", "d,4,benign,0"
    )
    judged = judge(table, definition(error=rule))
    assert judged["error"].tolist() == [False, True, True, False]
    assert judged["loss"].tolist() == pytest.approx([-math.log(0.3), -math.log(0.29), -math.log(0.7), 0])


def test_several_classes(tmp_path: Path) -> None:
    rule = {"kind": "classification", "truth": "y", "probabilities": {"a": "pa", "b": "pb", "c": "pc"}}
    table = cases(tmp_path, "case,patient,y,pa,pb,pc", "1,1,a,0.5,0.3,0.2", "2,2,c,0.2,0.5,0.3", "3,3,b,1,0,0")
    judged = judge(table, definition(error=rule))
    assert judged["error"].tolist() == [False, True, True]
    assert judged["loss"].tolist() == pytest.approx([-math.log(0.5), -math.log(0.3), -math.log(1e-6)])


def test_lesions(tmp_path: Path) -> None:
    rule = {"kind": "detection", "missed": "missed", "extra": "extra", "allowed_extra": 1}
    table = cases(tmp_path, "case,patient,missed,extra", "a,1,0,1", "b,1,1,0", "c,2,0,2")
    judged = judge(table, definition(error=rule))
    assert judged["error"].tolist() == [False, True, True]
    assert judged["loss"].tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("rule", "lines", "facts"),
    [
        ({"kind": "value", "column": "dice", "below": 0.8}, ["x,1,b,0.5,,0.5"], {"cases": "x ('')"}),
        ({"kind": "value", "column": "none", "below": 0.8}, ["x,1,b,0.5,0.5,0.5"], {"missing": "none"}),
        (
            {"kind": "classification", "truth": "y", "probabilities": {"a": "p", "b": "q"}},
            ["x,1,b,0.5,0,0.4", "z,1,c,0.5,0,0.5", "w,1,a,1.5,0,-0.5"],
            {"not_from_0_to_1": "w", "do_not_sum_to_1": "x", "true_classes_without_a_probability": "c"},
        ),
        (
            {"kind": "classification", "truth": "y", "probabilities": {"a": "p"}},
            ["x,1,b,0.5,0,0.4"],
            {"missing_class": "no case is a"},
        ),
    ],
)
def test_cells_that_cannot_be_judged_are_named(tmp_path: Path, rule, lines, facts) -> None:
    with pytest.raises(MedfusionError) as error:
        judge(cases(tmp_path, "case,patient,y,p,dice,q", *lines), definition(error=rule))
    assert {name: error.value.facts[name] for name in facts} == facts


def test_the_hash_tells_what_is_stated_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "error.yaml"
    path.write_text("error: {below: 0.8, column: dice, kind: value}\ncase: one scan\nname: dice\nseverity: {}\n")
    assert read_definition(path).hash == definition().hash
    assert len(definition().hash) == 12
    changes = [{"name": "x"}, {"severity": {"minor": 0.2}}, {"error": DICE["error"] | {"below": 0.81}}]
    assert len({definition(**change).hash for change in [{}, *changes]}) == 4
    path.write_text("name: dice\nerror: {kind: value, column: dice, below: 0.8, abov: 1}\n")
    with pytest.raises(MedfusionError, match="2 setting") as error:
        read_definition(path)
    assert set(error.value.facts) == {"case", "error.value.abov"}
