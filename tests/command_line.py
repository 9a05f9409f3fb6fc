"""Run ``medfusion`` as its users do, in a process of its own."""

import os
import subprocess
import sys


def medfusion(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The finished command; its output is text, 140 columns wide."""
    command = [sys.executable, "-m", "medfusion", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "140", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def assert_refused(done: subprocess.CompletedProcess[str], *lines: str) -> None:
    """A user error: exit code 2 and one short block on standard error that holds ``lines``, never a traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("Error  ")
    assert len(done.stderr.splitlines()) < 8
    assert "Traceback" not in done.stderr
    for line in lines:
        assert line in done.stderr
    assert done.stdout == ""
