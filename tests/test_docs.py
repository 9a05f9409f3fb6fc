"""The documentation names what exists, and its examples run."""

import pkgutil
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
THEORY = (DOCS / "theory.md").read_text()
EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in (ROOT / "README.md", DOCS / "theory.md")
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
    if "medfusion.diffusion" in block
]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"medfusion\.diffusion(?:\.\w+)+", THEORY))))
def test_every_function_that_the_theory_names_exists(name: str) -> None:
    pkgutil.resolve_name(name)


def test_every_picture_of_the_theory_exists_and_no_other_is_kept() -> None:
    linked = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", THEORY))
    assert linked == {path.name for path in DOCS.glob("theory_*.png")}


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_the_diffusion_core_runs(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(example, "example", "exec"), {})


def test_readme_and_theory_have_such_examples() -> None:
    assert {str(example.id).split("-")[0] for example in EXAMPLES} == {"README", "theory"}
