"""The package as its users get it: a command that answers at once, and a wheel that is complete and alone."""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"SimpleITK", "accelerate", "highdicom", "matplotlib", "monai", "pydicom", "torch"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; PYTHONPATH is only what the caller sets."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed(wheel: Path, target: Path) -> Path:
    """The wheel's files as pip lays them out in a folder of packages, without its dependencies."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
    run(*pip, wheel, cwd=target.parent)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    run(*build, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_help_answers_within_half_a_second() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run(sys.executable, "-m", "medfusion", "--help", cwd=ROOT)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, medfusion.cli.main; print(*sys.modules)"
    modules = run(sys.executable, "-c", code, cwd=ROOT).split()
    assert "medfusion.cli.main" in modules
    assert HEAVY.isdisjoint(modules)


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    files = (path for path in (ROOT / "medfusion").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert "medfusion/py.typed" in packed
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_wheel_runs_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    packages = installed(wheel, tmp_path / "packages")
    # An editable install of the checkout also lies on sys.path, but behind PYTHONPATH.
    code = "import medfusion; print(medfusion.__file__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(packages)).startswith(str(packages))
    usage = run(packages / "bin" / "medfusion", "--help", cwd=tmp_path, PYTHONPATH=str(packages))
    assert "Usage" in usage


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "environment", cwd=tmp_path)
    binaries = tmp_path / "environment" / "bin"
    pip = [binaries / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    run(*pip, wheel, cwd=tmp_path)
    assert "Usage" in run(binaries / "medfusion", "--help", cwd=tmp_path)
    run(binaries / "python", "-c", "import medfusion.prior, medfusion.training", cwd=tmp_path)
