"""Systems in a file: every subset is run, nothing twice, and what is wrong with a file is said."""

import sys
from pathlib import Path

import pytest

from medfusion.analysis.system import list_cases, load_system, run_case
from medfusion.errors import MedfusionError

SYSTEM = """
from __future__ import annotations
from collections import Counter
from dataclasses import dataclass
from medfusion.analysis.system import component

calls = Counter()

@dataclass
class Case:
    name: str
    patient: str
    signal: int

def cases():
    return [Case(name="x", patient="p", signal=3)]

@component(oracle=lambda case: calls.update(["oracle of scale"]) or 10)
def scale(case):
    calls["scale"] += 1
    return case.signal

@component(oracle=lambda case: 100)
def offset(case):
    calls["offset"] += 1
    return 7

@component(oracle=lambda case: 1000)
def total(scale, offset):
    calls["total"] += 1
    return scale + offset

def score(case, total):
    return {"value": total, "calls": dict(calls)}
"""


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "system.py").write_text(text)
    return tmp_path / "system.py"


def test_every_subset_is_run_and_nothing_twice(tmp_path: Path) -> None:
    system = load_system(written(tmp_path, SYSTEM))
    assert system.names == ("scale", "offset", "total")
    rows = list(run_case(system, system.cases()[0]))
    assert {row["fixed"]: row["value"] for row in rows} == {
        "": 10,
        "scale": 17,
        "offset": 103,
        "scale+offset": 110,
        "total": 1000,
        "scale+total": 1000,
        "offset+total": 1000,
        "scale+offset+total": 1000,
    }
    assert rows[-1]["calls"] == {"scale": 1, "offset": 1, "total": 4, "oracle of scale": 1}
    assert {(row["case"], row["patient"]) for row in rows} == {("x", "p")}


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "beside_the_system.py").write_text("SIGNAL = 5\n")
    text = SYSTEM.replace("@dataclass", "from beside_the_system import SIGNAL\n@dataclass").replace("=3)", "=SIGNAL)")
    assert load_system(written(tmp_path, text)).cases()[0].signal == 5


def test_an_oracle_may_need_what_was_made_before(tmp_path: Path) -> None:
    text = SYSTEM.replace("oracle=lambda case: 1000", "oracle=lambda case, scale: calls.update(['best']) or -scale")
    system = load_system(written(tmp_path, text))
    rows = list(run_case(system, system.cases()[0]))
    assert [row["value"] for row in rows[4:]] == [-3, -10, -3, -10]
    assert rows[-1]["calls"]["best"] == 2
    with pytest.raises(MedfusionError, match="scale takes what no component above it makes"):
        load_system(written(tmp_path, SYSTEM.replace("oracle=lambda case: calls", "oracle=lambda case, total: calls")))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("def cases", "def scans", "not a system"),
        ("def score", "def metric", "not a system"),
        ("def total(scale, offset)", "def total(scale, mask)", "total takes what no component above it makes"),
        ("import Counter", "import Nothing", "cannot be executed"),
        ("@component", "#", "not a system"),
    ],
)
def test_files_that_are_no_system(tmp_path: Path, old: str, new: str, problem: str) -> None:
    with pytest.raises(MedfusionError, match=problem):
        load_system(written(tmp_path, SYSTEM.replace(old, new)))
    with pytest.raises(MedfusionError, match="no Python file"):
        load_system(tmp_path / "none.py")


def test_a_failure_is_named(tmp_path: Path) -> None:
    system = load_system(written(tmp_path, SYSTEM.replace("return scale + offset", "return scale / (offset - 100)")))
    with pytest.raises(MedfusionError, match="x: total failed") as error:
        list(run_case(system, system.cases()[0]))
    assert error.value.facts == {"reason": "ZeroDivisionError: division by zero", "perfect": "offset"}


@pytest.mark.parametrize(
    ("cases", "problem"),
    [
        ("[]", "cases, each with a patient"),
        ("[Case('x', 'p', 1), Case('x', 'q', 1)]", "a name of its own"),
        ("[Case('x', '', 1)]", "each with a patient"),
        ("[1]", r"cases\(\) failed"),
        ("open('nowhere')", r"cases\(\) failed"),
    ],
)
def test_cases_that_cannot_be_used(tmp_path: Path, cases: str, problem: str) -> None:
    text = SYSTEM.replace('[Case(name="x", patient="p", signal=3)]', cases)
    with pytest.raises(MedfusionError, match=problem):
        list_cases(load_system(written(tmp_path, text)))
