"""The study of the error analysis: the planted faults do what its table of truth says, and the walk-through walks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PIPELINES = Path(__file__).parents[1] / "pipelines"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(PIPELINES)
    import error_analysis

    return error_analysis


def test_what_is_planted_is_what_is_found_in_many_patients(study) -> None:
    """The mean over some repetitions, to within three of its standard errors."""
    found = np.stack([study.intervals(study.repetition(number)[0])[:, 0] for number in range(8)])
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - list(study.planted_shares().values())) < 3 * error + 1e-9).all()


def test_the_shares_of_the_components_and_the_labels_are_all_of_the_errors(study) -> None:
    organ, mass, *blamed = study.planted_shares().values()
    assert sum(blamed) == pytest.approx(1)
    rates = {"organ": 0.2, "mass": 0.12, "label": 0.04}
    assert study.reader.SHARES == rates
    perfect = rates["label"]
    none = sum(
        share * wrong
        for share, wrong in (
            (0.5 * rates["organ"], 1 - rates["label"]),  # a mass in a kidney that is not found
            (0.5 * rates["organ"], rates["label"]),
            ((1 - rates["organ"]) * rates["mass"], 1 - rates["label"]),
            ((1 - rates["organ"]) * (1 - rates["mass"]), rates["label"]),
        )
    )
    assert organ + mass == pytest.approx(none - perfect)


@pytest.mark.slow
def test_the_walk_through(tmp_path: Path) -> None:
    command = [sys.executable, str(PIPELINES / "error_walkthrough.py"), "--out", str(tmp_path / "kidney")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kidney" / "report" / "report.html").exists()
