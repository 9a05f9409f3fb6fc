"""The documentation names what exists."""

import pkgutil
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
THEORY = (DOCS / "theory.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"medfusion\.diffusion(?:\.\w+)+", THEORY))))
def test_every_function_that_the_theory_names_exists(name: str) -> None:
    pkgutil.resolve_name(name)


def test_every_picture_of_the_theory_exists_and_no_other_is_kept() -> None:
    linked = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", THEORY))
    assert linked == {path.name for path in DOCS.glob("theory_*.png")}
