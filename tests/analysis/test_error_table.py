"""The error table: the worked example of Machine Learning Yearning, overlap counted by hand, and coverage."""

import numpy as np
import pandas as pd
import pytest

from medfusion.analysis.error_table import error_table
from medfusion.errors import MedfusionError


def judged(error, loss=None, patients=None) -> pd.DataFrame:
    error = np.asarray(error, bool)
    names = [f"case{number}" for number in range(len(error))]
    loss = error.astype(float) if loss is None else loss
    return pd.DataFrame({"patient": names if patients is None else patients, "error": error, "loss": loss}, index=names)


def matrix(index, **tags) -> pd.DataFrame:
    return pd.DataFrame({name: np.asarray(given, bool) for name, given in tags.items()}, index=index)


def test_the_worked_example() -> None:
    """100 errors at 10 % error: noisy images can gain 0.6 points, malignant masses 6.3."""
    cases = judged(np.arange(1000) < 100)
    k = np.arange(100)
    found = error_table(cases, matrix(cases.index[:100], benign=k < 7, malignant=(k >= 7) & (k < 70), noisy=k >= 94))
    assert found.error_rate == 0.1
    assert list(found.tags.index) == ["malignant", "(no tag)", "benign", "noisy"]
    assert found.tags["ceiling"].tolist() == pytest.approx([0.063, 0.024, 0.007, 0.006])
    assert found.tags["after"].tolist() == pytest.approx([0.037, 0.076, 0.093, 0.094])
    assert (found.tags["ceiling_low"] < found.tags["ceiling"]).all()
    assert (found.tags["ceiling_high"] > found.tags["ceiling"]).all()
    assert found.tags.loc["noisy", ["low", "high"]].tolist() == pytest.approx([0.0278, 0.1248], abs=1e-4)
    assert found.warnings == ()


def test_a_stated_rate_stands_for_that_of_the_table() -> None:
    cases = judged(np.ones(100))
    found = error_table(cases, matrix(cases.index, noisy=np.arange(100) < 20), error_rate=0.1)
    row = found.tags.loc["noisy"]
    assert row["ceiling"] == pytest.approx(0.02)
    assert row["ceiling_low"] == pytest.approx(0.1 * (0.2 - 1.96 * 0.04), abs=1.5e-3)
    assert row["ceiling_high"] == pytest.approx(0.1 * (0.2 + 1.96 * 0.04), abs=1.5e-3)


def test_overlap_loss_and_what_is_common_among_correct_cases() -> None:
    cases = judged([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], loss=np.array([1, 2, 3, 4, 5, 0, 0, 0, 0, 0.0]))
    tags = matrix(cases.index[[0, 1, 2, 3, 5, 6]], a=[1, 1, 0, 0, 1, 0], b=[0, 1, 1, 0, 0, 0])
    found = error_table(cases, tags)
    a, none = found.tags.loc["a"], found.tags.loc["(no tag)"]
    assert (found.cases, found.errors, found.looked_at) == (10, 5, 4)
    assert (a["count"], a["share"], a["exclusive"], a["exclusive_share"]) == (2, 0.5, 1, 0.25)
    assert a["loss_share"] == pytest.approx(0.3)
    assert a["among_correct"] == 0.5
    assert (a["ceiling"], a["sure"], a["after"]) == (0.25, 0.125, 0.25)
    assert (none["count"], none["exclusive"], none["loss_share"]) == (1, 1, 0.4)
    assert found.warnings == (
        "4 errors looked at: too few for more than a first impression; 100 would be very good",
        "1 of 5 errors have not been looked at",
        "fewer than 5 errors: a, b, (no tag)",
    )


def test_cheap_work_comes_first() -> None:
    cases = judged(np.ones(10))
    tags = matrix(cases.index, large=np.arange(10) < 6, small=np.arange(10) > 7, free=np.arange(10) == 7)
    found = error_table(cases, tags, {"large": 10, "small": 1}).tags
    assert list(found.index) == ["small", "large", "free", "(no tag)"]
    assert found["gain_per_cost"].tolist() == pytest.approx([0.2, 0.06, np.nan, np.nan], nan_ok=True)


def test_intervals_are_over_patients() -> None:
    one = error_table(judged(np.arange(40) < 20), matrix([f"case{k}" for k in range(20)], a=np.arange(20) < 5)).tags
    error = np.tile(np.arange(40) < 20, 4)
    copies = judged(error, patients=np.tile([f"p{k}" for k in range(40)], 4))
    many = error_table(copies, matrix(copies.index[error], a=np.tile(np.arange(20) < 5, 4))).tags
    width = one["ceiling_high"] - one["ceiling_low"]
    assert (many["ceiling_high"] - many["ceiling_low"]).tolist() == pytest.approx(width.tolist(), rel=0.05)


def test_the_ceiling_is_covered() -> None:
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        cases = judged(rng.random(300) < 0.3)
        wrong = cases.index[cases["error"]]
        row = error_table(cases, matrix(wrong, a=rng.random(len(wrong)) < 0.4)).tags.loc["a"]
        inside += row["ceiling_low"] <= 0.3 * 0.4 <= row["ceiling_high"]
    assert 0.91 <= inside / 300 <= 0.98


def test_what_is_refused() -> None:
    cases = judged([1, 0])
    with pytest.raises(MedfusionError, match="not in the table") as error:
        error_table(cases, matrix(["case0", "other"], a=[1, 1]))
    assert error.value.facts["cases"] == "other"
    with pytest.raises(MedfusionError, match="none of the errors"):
        error_table(cases, matrix(["case1"], a=[1]))
    with pytest.raises(MedfusionError, match="costs") as error:
        error_table(cases, matrix(["case0"], a=[1]), {"a": 0, "b": 2})
    assert error.value.facts["costs"] == "a=0, b=2"
