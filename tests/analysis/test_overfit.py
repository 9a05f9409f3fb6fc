"""The overfit alarm: its rate where there is nothing to find, its power as printed, and its verdicts."""

import numpy as np
import pytest

from medfusion.analysis.overfit import level_of_look, overfit
from medfusion.errors import MedfusionError


def part(rng, patients=100, scans=2, mended=0.3, broken=0.05, rate=0.2):
    """Errors of one part at the baseline and now, and their patients; errors of a patient are alike."""
    patient = np.repeat(np.arange(patients), scans)
    before = rng.random(len(patient)) < rng.beta(2 * rate, 2 - 2 * rate, patients)[patient]
    chance = rng.random(len(patient))
    return before, np.where(before, chance > mended, chance < broken), patient


@pytest.mark.parametrize(("sizes", "look"), [((60, 200), 1), ((150, 150), 2)])
def test_false_alarms_are_as_rare_as_stated(sizes, look) -> None:
    rng = np.random.default_rng(look)
    alarms = [overfit(part(rng, sizes[0]), part(rng, sizes[1]), look=look).verdict == "overfit" for _ in range(600)]
    assert np.mean(alarms) <= level_of_look(look) + 2 * np.sqrt(level_of_look(look) / 600)


def test_the_printed_gap_is_found_four_times_in_five() -> None:
    """A blackbox that improves less by just the gap that is said to be detectable."""
    rng = np.random.default_rng(0)
    less = 0.3
    for _ in range(3):  # what is detectable depends on the changes, and they on it
        printed = np.mean([overfit(part(rng, 200), part(rng, 400, mended=less)).detectable for _ in range(20)])
        less = 0.3 - printed / 0.2  # of the errors are mended: the error rates fall by amounts that differ by `printed`
    alarms = [overfit(part(rng, 200), part(rng, 400, mended=less)).verdict == "overfit" for _ in range(300)]
    assert np.mean(alarms) == pytest.approx(0.8, abs=0.08)


def test_over_all_looks_alarms_add_up_to_alpha() -> None:
    assert level_of_look(1) == 0.025
    assert sum(level_of_look(k) for k in range(1, 100000)) == pytest.approx(0.05, abs=1e-6)


def test_a_harder_blackbox_is_no_overfitting() -> None:
    rng = np.random.default_rng(0)
    found = overfit(part(rng, 300, rate=0.1), part(rng, 300, rate=0.4, mended=0.1), tolerance=0.2)
    assert found.blackbox.now > found.eyeball.now
    assert found.verdict == "no sign"


def test_verdicts() -> None:
    patients = np.arange(100)
    before, mended = np.arange(100) < 40, np.arange(100) < 10
    clear = overfit((before, mended, patients), (before, before, patients))
    assert (clear.gap, clear.verdict) == (pytest.approx(0.3), "overfit")
    assert (clear.eyeball.before, clear.eyeball.now) == (0.4, 0.1)
    assert clear.low < clear.gap < clear.high
    same = overfit((before, mended, patients), (before, mended, patients))
    assert (same.gap, same.verdict) == (0, "cannot tell")
    assert same.detectable > 0.1
    assert overfit((before, mended, patients), (before, mended, patients), tolerance=0.3).verdict == "no sign"
    unchanged = overfit((before, before, patients), (before, before, patients))
    assert unchanged.verdict == "cannot tell"  # one more patient in either part would be a point
    assert 0.03 < unchanged.detectable < 0.05
    large, many = np.tile(before, 10), np.arange(1000)
    assert overfit((large, large, many), (large, large, many)).verdict == "no sign"


def test_what_is_refused() -> None:
    few, many = (np.zeros(18), np.zeros(18), np.repeat(np.arange(9), 2)), (np.zeros(20), np.zeros(20), np.arange(20))
    with pytest.raises(MedfusionError, match="blackbox set has 9 patient"):
        overfit(many, few)
    with pytest.raises(MedfusionError, match="out of range"):
        overfit(many, many, look=0)
