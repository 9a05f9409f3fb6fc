"""Slices: planted ones are found and confirmed, chance ones are not, and columns of all sorts are read."""

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from medfusion.analysis.slices import find_slices, holm
from medfusion.errors import MedfusionError


def table(seed=0, patients=600, scans=2, worse=0.0) -> pd.DataFrame:
    """Errors at 10 %, and at ``worse`` more where spacing is above 3 mm at site B."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), scans)
    site = rng.choice(["A", "B", "C"], patients)[patient]
    spacing = rng.uniform(1, 5, len(patient))
    error = rng.random(len(patient)) < 0.1 + worse * ((site == "B") & (spacing > 3))
    columns = {"patient": [f"p{k}" for k in patient], "site": site, "spacing": [f"{mm:.3f}" for mm in spacing]}
    columns |= {"age": rng.integers(20, 80, len(patient)).astype(str), "error": error, "loss": error * 1.0}
    return pd.DataFrame(columns, index=[f"case{k}" for k in range(len(patient))])


def test_a_planted_slice_is_confirmed_where_it_was_not_fitted() -> None:
    found = find_slices(table(worse=0.5), depth=2)
    worst = found.table.iloc[0]
    assert worst["slice"].startswith("site is B and spacing > ")
    assert float(worst["slice"].split(">")[1].split(" and")[0]) == pytest.approx(3, abs=0.3)
    assert worst["confirmed"]
    assert worst["low"] < 0.6 < worst["high"]
    assert worst["rest"] == pytest.approx(0.1, abs=0.04)
    assert worst["coverage"] == pytest.approx(1 / 6, abs=0.05)
    assert found.fitted + found.kept_back == 1200
    assert found.table["cases"].sum() == found.kept_back


def test_chance_is_seldom_confirmed() -> None:
    confirmed = [find_slices(table(seed, 200)).table["confirmed"].any() for seed in range(100)]
    assert np.mean(confirmed) <= 0.05 + 2 * np.sqrt(0.05 / 100)


def test_missing_values_may_be_the_slice() -> None:
    cases = table(patients=300)
    rng = np.random.default_rng(3)
    missing = rng.random(len(cases)) < 0.3
    cases.loc[missing, "spacing"] = ""
    cases["error"] = rng.random(len(cases)) < np.where(missing, 0.6, 0.05)
    worst = find_slices(cases, ["spacing"]).table.iloc[0]
    assert worst["slice"] == "spacing is missing"
    assert worst["confirmed"]


def test_columns_that_tell_nothing_are_named() -> None:
    cases = table().assign(accession=[f"x{k}" for k in range(1200)], vendor="one")
    found = find_slices(cases)
    assert found.columns == ("site", "spacing", "age")
    assert found.left_out == ("accession", "vendor")
    with pytest.raises(MedfusionError, match="no column tells"):
        find_slices(cases, ["vendor"])
    with pytest.raises(MedfusionError, match="lacks columns"):
        find_slices(cases, ["field"])
    with pytest.raises(MedfusionError, match="too few"):
        find_slices(cases.iloc[:30])


def testholm_is_that_of_statsmodels() -> None:
    p = np.random.default_rng(0).random(12) ** 3
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
