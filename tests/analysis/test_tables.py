"""Tables of cases: what is read as it stands, and what is refused."""

from pathlib import Path

import pytest

from medfusion.analysis.tables import numbers, read_cases, read_table
from medfusion.errors import MedfusionError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    return path


def test_names_stay_as_they_are_written(tmp_path: Path) -> None:
    path = written(tmp_path, '\ufeffcase,patient, site ,x\r\n007,NA,"a, b",1e-3\r\n7,null,,2\r\n')
    table = read_cases(path)
    assert table.index.tolist() == ["007", "7"]
    assert table["patient"].tolist() == ["NA", "null"]
    assert table["site"].tolist() == ["a, b", ""]
    assert numbers(table, "x").tolist() == [0.001, 2]


def test_a_case_may_be_a_patient_of_its_own(tmp_path: Path) -> None:
    table = read_cases(written(tmp_path, "scan,dice\na,1\nb,2\n"), case="scan", patient="scan")
    assert table["patient"].tolist() == table.index.tolist() == ["a", "b"]
    assert list(table.columns) == ["dice", "patient"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not a CSV file"),
        ("case,patient\n", "no rows"),
        ("case,site\na,b\n", "lacks columns"),
        ("case,patient,x,x\na,b,1,2\n", "columns of the same name"),
        ("case,patient\na,1\n,2\na,3\n", "the name of a case that no other has"),
        ("case,patient\na,1\nb, \n", "cases without a patient"),
        ("case,patient\na,1\nb,2,3\n", "not a CSV file"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(MedfusionError, match=problem) as error:
        read_cases(written(tmp_path, text))
    assert "table.csv" in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MedfusionError, match="cannot be read"):
        read_table(tmp_path / "none.csv")


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    table = read_cases(written(tmp_path, "case,patient,x\na,1,1\nb,2,inf\nc,3,\nd,4,x\n"))
    with pytest.raises(MedfusionError, match="with, in 3 of 4") as error:
        numbers(table, "x")
    assert error.value.facts["cases"] == "b ('inf'), c (''), d ('x')"
