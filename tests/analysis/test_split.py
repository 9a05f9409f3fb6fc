"""Splits: patients whole, strata even, the same person found again, other lists respected; and the seal."""

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medfusion.analysis.blackbox import (
    LOG,
    append_to_log,
    ask,
    digest,
    read_log,
    read_split,
    refilled,
    refuse_blackbox,
)
from medfusion.analysis.split import same_person, split_cases
from medfusion.errors import MedfusionError


def table(patients=300, seed=0) -> pd.DataFrame:
    """One to four scans of each patient, from three sites of unequal size."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 5, patients))
    site = rng.choice(["A", "B", "C"], patients, p=[0.7, 0.25, 0.05])[patient]
    columns = {"patient": [f"p{k}" for k in patient], "site": site}
    columns |= {"volume": [f"{ml:.2f}" for ml in rng.lognormal(size=len(patient))]}
    columns |= {"uid": [f"1.2.{k}" for k in range(len(patient))]}
    return pd.DataFrame(columns, index=pd.Index([f"scan{k}" for k in range(len(patient))], name="case"))


@pytest.mark.parametrize("seed", range(5))
def test_patients_are_whole_and_strata_even(seed: int) -> None:
    cases = table(seed=seed)
    found = split_cases(cases, len(cases) // 3, strata=["site"], seed=seed)
    eye = found.table["part"] == "eyeball"
    assert len(cases) // 3 <= eye.sum() <= len(cases) // 3 + 12
    assert eye.groupby(cases["patient"]).nunique().max() == 1
    share = eye.groupby(cases["site"]).mean()
    counts = cases["site"].value_counts()
    assert (abs(share - eye.mean()) < 8 / counts[share.index]).all()


def test_numbers_are_stratified_too() -> None:
    cases = table()
    found = split_cases(cases.assign(patient=cases.index), 200, strata=["site", "volume"])
    assert found.table["stratum"].nunique() == 9
    eye = found.table["part"] == "eyeball"
    assert eye.sum() == 200
    assert (
        abs(eye.groupby(found.table["stratum"]).mean() - eye.mean())
        < 2 / found.table["stratum"].value_counts().sort_index()
    ).all()


def test_another_seed_is_another_split() -> None:
    one, same, other = (split_cases(table(), 100, seed=seed).table["part"] for seed in (0, 0, 1))
    assert (one == same).all()
    assert 0.3 < (one == other).mean() < 0.95


def test_one_scan_under_two_names_is_one_person() -> None:
    cases = table(20).assign(hash="")
    first, second, third = (cases.index[cases["patient"] == p][0] for p in ("p1", "p2", "p3"))
    cases.loc[second, "uid"] = cases.loc[first, "uid"]
    cases.loc[[second, third], "hash"] = "abc"
    person = pd.Series(same_person(cases, ["uid", "hash"]), cases.index)
    assert person[cases["patient"].isin(["p1", "p2", "p3"])].nunique() == 1
    assert person.nunique() == 18
    for seed in range(8):
        found = split_cases(cases, len(cases) // 2, identities=["uid", "hash"], seed=seed)
        assert found.table["part"][[first, second, third]].nunique() == 1
        assert found.duplicates == tuple(sorted({tuple(sorted((first, second))), tuple(sorted((second, third)))}))


def test_patients_of_other_sets_are_left_out() -> None:
    cases = table(30)
    twin = cases.index[cases["patient"] == "p9"][0]
    cases.loc[twin, "uid"] = cases.loc[cases.index[cases["patient"] == "p4"][0], "uid"]
    scan = cases.index[cases["patient"] == "p2"][0]
    found = split_cases(cases, 20, identities=["uid"], taken={"train": ["p4", "p99"], "test": [scan]})
    assert set(cases.loc[list(found.left_out), "patient"]) == {"p2", "p4", "p9"}
    assert not set(found.left_out) & set(found.table.index)
    assert len(found.left_out) + len(found.table) == len(cases)


def test_a_person_in_two_other_sets_is_refused() -> None:
    cases = table(30)
    mine = [cases.index[cases["patient"] == patient][0] for patient in ("p3", "p5")]
    cases.loc[mine, "uid"] = "same"
    with pytest.raises(MedfusionError, match=r"1 person.* in two of the sets train, test") as error:
        split_cases(cases, 20, identities=["uid"], taken={"train": ["p3"], "test": [mine[1]]})
    assert mine[0] in error.value.facts["cases"]


def test_splits_that_cannot_be_made() -> None:
    cases = table(10)
    with pytest.raises(MedfusionError, match="leaves nothing"):
        split_cases(cases, len(cases))
    with pytest.raises(MedfusionError, match="lacks columns"):
        split_cases(cases, 3, strata=["scanner"])
    with pytest.raises(MedfusionError, match="all that there are"):
        split_cases(cases.assign(patient="one"), 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [f"s{k},p{k // 2},{k // 4},{'eyeball' if k < 8 else 'blackbox'},\n" for k in range(40)]
    text = "case,patient,person,part,stratum\n" + "".join(rows)
    (tmp_path / "split.csv").write_text(text)
    append_to_log(tmp_path, "split", sha256=digest(text))
    return tmp_path


def questions(folder: Path) -> int:
    return sum(entry["kind"] == "query" for entry in read_log(folder))


def judged(wrong: int = 8) -> pd.DataFrame:
    error = np.r_[np.zeros(8), np.arange(32) < wrong].astype(bool)
    return pd.DataFrame({"error": error, "loss": error * 0.5}, index=[f"s{k}" for k in range(40)])


def test_every_question_is_logged(folder: Path) -> None:
    first, second = (ask(folder, judged(wrong), model, "abc") for wrong, model in ((8, "one"), (4, "two")))
    assert (first["cases"], first["patients"], first["errors"], first["error_rate"]) == (32, 16, 8, 0.25)
    assert first["low"] < 0.25 < first["high"]
    assert first["mean_loss"] == 0.125
    assert (first["query"], second["query"], questions(folder)) == (1, 2, 2)
    assert [(entry["model"], entry["errors"]) for entry in read_log(folder)[1:]] == [("one", 8), ("two", 4)]
    assert all("T" in entry["date"] for entry in read_log(folder))
    with pytest.raises(MedfusionError, match="without a score") as error:
        ask(folder, judged().drop(index=["s3", "s9"]), "three", "abc")
    assert error.value.facts["cases"] == "s9"


def test_a_log_that_was_tampered_with_is_noticed(folder: Path) -> None:
    for model in "abc":
        ask(folder, judged(), model, "x")
    lines = (folder / LOG).read_text().splitlines()
    for changed in (
        [*lines[:2], lines[3]],
        lines[1:],
        [lines[0], lines[1].replace('"a"', '"d"'), *lines[2:]],
        [*lines, "{"],
    ):
        (folder / LOG).write_text("\n".join(changed) + "\n")
        with pytest.raises(MedfusionError, match="line"):
            ask(folder, judged(), "d", "x")
    (folder / LOG).write_text("\n".join(lines) + "\n")
    assert questions(folder) == 3


def test_questions_at_once_are_all_logged(folder: Path) -> None:
    threads = [threading.Thread(target=append_to_log, args=(folder, "query")) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert questions(folder) == 20


def test_the_seal(folder: Path) -> None:
    split = read_split(folder)
    refuse_blackbox(split, ["s0", "s7", "unknown"])
    with pytest.raises(MedfusionError, match="2 case") as error:
        refuse_blackbox(split, ["s7", "s8", "s39"])
    assert error.value.facts["cases"] == "s39, s8"
    (folder / "split.csv").write_text((folder / "split.csv").read_text().replace("s8,p4,2,blackbox", "s8,p4,2,eyeball"))
    with pytest.raises(MedfusionError, match="changed by hand"):
        read_split(folder)
    (folder / LOG).unlink()
    with pytest.raises(MedfusionError, match="changed by hand"):
        read_split(folder)
    with pytest.raises(MedfusionError, match="no split"):
        read_split(folder / "none")


def test_a_refill_moves_whole_persons(folder: Path) -> None:
    """Two patients who share a scan are one person: one of them in the eyeball set would show the other's."""
    split = read_split(folder)
    more = refilled(split, 5)
    moved = split.index[split["part"] != more["part"]]
    assert len(moved) == 20
    assert (more.loc[moved, "part"] == "eyeball").all()
    assert more.groupby("person")["part"].nunique().max() == 1
    for number in (0, 8):
        with pytest.raises(MedfusionError, match="cannot be moved"):
            refilled(split, number)
