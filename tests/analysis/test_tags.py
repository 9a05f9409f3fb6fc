"""Tags and how two reviewers agree, against scikit-learn."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from medfusion.analysis.tags import agreement, cohen_kappa, read_tags, tag_matrix
from medfusion.errors import MedfusionError


def read(tmp_path: Path, *lines: str) -> pd.DataFrame:
    (tmp_path / "tags.csv").write_text("\n".join(lines) + "\n")
    return read_tags(tmp_path / "tags.csv")


def test_a_row_for_each_tag(tmp_path: Path) -> None:
    tags = read(tmp_path, "case,reviewer,tag,comment", "b,ann,noisy,", "b,ann,label is wrong,see atlas", "a,ann,,fine")
    found = tag_matrix(tags)
    assert found.to_dict("index") == {
        "a": {"label is wrong": False, "noisy": False},
        "b": {"label is wrong": True, "noisy": True},
    }


def test_half_of_the_reviewers_make_a_tag(tmp_path: Path) -> None:
    rows = ["a,ann,x", "a,bob,", "b,ann,x", "b,bob,y", "b,eve,y", "a,ann,x"]
    found = tag_matrix(read(tmp_path, "case,reviewer,tag", *rows))
    assert found.loc["a"].tolist() == [True, False]
    assert found.loc["b"].tolist() == [False, True]


def test_tables_of_the_review_page_are_tags_too(tmp_path: Path) -> None:
    head = "case,finding,verdict,comment,reviewer"
    for case, rows in {
        "a": ["1,true,,ann", "2,false,vessel,ann", "3,,,ann"],
        "b": ["1,true,,ann", "M1,missed,,ann"],
    }.items():
        (tmp_path / f"{case}_review.csv").write_text("\n".join([head, *(f"{case},{row}" for row in rows)]) + "\n")
    (tmp_path / "c_review.csv").write_text(f"{head}\nc,1,true,,ann\n")
    found = tag_matrix(read_tags(tmp_path))
    assert found.astype(int).to_dict("index") == {
        "a": {"false finding": 1, "missed lesion": 0},
        "b": {"false finding": 0, "missed lesion": 1},
        "c": {"false finding": 0, "missed lesion": 0},
    }
    with pytest.raises(MedfusionError, match="no CSV file"):
        read_tags(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty")


def test_nobody_tagged_anything(tmp_path: Path) -> None:
    found = tag_matrix(read(tmp_path, "case,tag", "a,", "b,"))
    assert list(found.index) == ["a", "b"]
    assert list(found.columns) == []


@pytest.mark.parametrize(
    ("lines", "problem"), [(["case,reviewer", "a,b"], "lacks columns"), (["case,tag", ",x"], "without a case")]
)
def test_tags_that_cannot_be_read(tmp_path: Path, lines, problem) -> None:
    with pytest.raises(MedfusionError, match=problem):
        read(tmp_path, *lines)


def test_kappa_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for share in (0.05, 0.3, 0.9):
        first = rng.random(80) < share
        second = np.where(rng.random(80) < 0.7, first, rng.random(80) < share)
        assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    assert cohen_kappa(np.array([1, 0, 1], bool), np.array([1, 0, 1], bool)) == 1
    assert np.isnan(cohen_kappa(np.zeros(5, bool), np.zeros(5, bool)))


def test_agreement_is_of_the_cases_that_both_saw() -> None:
    rng = np.random.default_rng(1)
    rows = []
    for number in range(60):
        seen = rng.random() < 0.4
        for reviewer in ("ann", "bob") if number < 50 else ("ann",):
            given = seen if rng.random() < 0.85 else not seen
            rows.append((f"case{number:02d}", reviewer, "noisy" if given else "", ""))
    tags = pd.DataFrame(rows, columns=["case", "reviewer", "tag", "comment"])
    both = agreement(tags)
    found = both.table.loc["noisy"]
    wide = tags[tags["case"] < "case50"].pivot(index="case", columns="reviewer", values="tag") == "noisy"
    assert (both.cases, both.reviewers) == (50, ("ann", "bob"))
    assert (found["first"], found["second"], found["both"]) == (
        wide["ann"].sum(),
        wide["bob"].sum(),
        wide.all(axis=1).sum(),
    )
    assert found["kappa"] == pytest.approx(cohen_kappa_score(wide["ann"], wide["bob"]))
    assert 0 < found["low"] < found["kappa"] < found["high"] < 1


def test_agreement_takes_two() -> None:
    with pytest.raises(MedfusionError, match="there are 1"):
        agreement(pd.DataFrame({"case": ["a"], "reviewer": ["ann"], "tag": ["x"]}))
    with pytest.raises(MedfusionError, match="no case both"):
        agreement(pd.DataFrame({"case": ["a", "b"], "reviewer": ["ann", "bob"], "tag": ["x", "x"]}))
