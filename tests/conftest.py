"""What every test may use."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: two threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scans; the tests that need it are skipped where MEDFUSION_DATA does not name one."""
    folder = os.environ.get("MEDFUSION_DATA")
    if not folder:
        pytest.skip("needs real scans: set MEDFUSION_DATA")
    return Path(folder)
