"""Sizes against exact binomial tails, a simulation of McNemar's test, and the analysis of variance."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from medfusion.analysis.sizes import (
    cases_for_difference,
    cases_for_errors,
    design_effect,
    intraclass_correlation,
    plan_sizes,
)
from medfusion.errors import MedfusionError


def test_the_figures_of_the_plan() -> None:
    assert cases_for_errors(0.05, 100) == 2254  # 2000 would show 100 half of the time
    assert cases_for_errors(0.2, 50) == 291


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("errors", [1, 10, 50])
@pytest.mark.parametrize("certainty", [0.5, 0.9, 0.99])
def test_no_fewer_cases_are_enough(rate: float, errors: int, certainty: float) -> None:
    enough = cases_for_errors(rate, errors, certainty)
    assert stats.binom.sf(errors - 1, enough, rate) >= certainty
    assert stats.binom.sf(errors - 1, enough - 1, rate) < certainty


@pytest.mark.parametrize(
    ("rate", "difference", "discordant"), [(0.2, 0.05, 0.08), (0.2, 0.05, None), (0.05, 0.02, 0.04)]
)
def test_a_difference_is_detected_as_often_as_planned(rate: float, difference: float, discordant: float | None) -> None:
    cases = cases_for_difference(rate, difference, discordant)
    both = discordant if discordant is not None else rate * (1 - rate + difference) + (rate - difference) * (1 - rate)
    mended, broken = (both + difference) / 2, (both - difference) / 2
    rng = np.random.default_rng(0)
    counts = rng.multinomial(cases, [mended, broken, 1 - both], size=1000)[:, :2]
    found = [mcnemar([[0, m], [b, 0]], exact=False, correction=False).pvalue < 0.05 for m, b in counts]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_more_cases_where_scans_of_a_patient_are_alike() -> None:
    plan = plan_sizes(0.1, 20, difference=0.05, scans=4, icc=0.5)
    plain = plan_sizes(0.1, 20, difference=0.05)
    assert plan.design_effect == design_effect(4, 0.5) == 2.5
    assert plan.eyeball == np.ceil(2.5 * plain.eyeball)
    assert plan.eyeball_patients == np.ceil(plan.eyeball / 4)
    assert plan.blackbox == np.ceil(2.5 * plain.blackbox)
    assert plain.naive == 200
    assert plain.eyeball_only is None


def test_too_few_cases_are_for_the_eyeball_alone() -> None:
    needed = plan_sizes(0.1, 50, difference=0.05)
    enough = needed.eyeball + needed.blackbox
    assert not plan_sizes(0.1, 50, difference=0.05, available=enough).eyeball_only
    few = plan_sizes(0.1, 50, difference=0.05, available=enough - 1)
    assert few.eyeball_only
    assert stats.binom.sf(few.errors_seen - 1, enough - 1, 0.1) >= 0.9
    assert stats.binom.sf(few.errors_seen, enough - 1, 0.1) < 0.9


def test_alike_as_in_the_analysis_of_variance() -> None:
    """Of equal groups: (F - 1) / (F + m - 1)."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 4)) + rng.normal(size=(30, 1))
    f = stats.f_oneway(*values).statistic
    found = intraclass_correlation(values.ravel(), np.repeat(np.arange(30).astype(str), 4))
    assert found == pytest.approx((f - 1) / (f + 3))
    assert intraclass_correlation(rng.normal(size=9), np.arange(9).astype(str)) == 0
    assert intraclass_correlation(np.zeros(8), np.repeat(["a", "b"], 4)) == 0


def test_alike_in_groups_of_unequal_size() -> None:
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(4000), rng.integers(1, 6, 4000))
    values = rng.normal(size=len(patients)) + 0.7 * rng.normal(size=4000)[patients]
    assert intraclass_correlation(values, patients.astype(str)) == pytest.approx(0.49 / 1.49, abs=0.03)


def test_numbers_out_of_range_are_all_named() -> None:
    with pytest.raises(MedfusionError, match="cannot be planned") as error:
        plan_sizes(1.2, 0, difference=0.3, discordant=0.1, certainty=1, scans=0.5, icc=2, available=0)
    assert set(error.value.facts) == {"error_rate", "errors", "certainty", "scans", "icc", "available", "discordant"}
    with pytest.raises(MedfusionError) as error:
        plan_sizes(0.1, 10, difference=0.2)
    assert set(error.value.facts) == {"difference"}
