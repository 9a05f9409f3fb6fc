"""Seconds and memory of each command of `medfusion errors` on large tables: 10,000 cases, 20 tags, 5 components.

    python benchmarks/error_tables.py [--cases 10000]

Each should take less than 5 s and 1 GiB. Run it on an idle machine.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

TAGS, COMPONENTS = 20, "abcde"
DEFINE = ("--define", "error.yaml")
COMMANDS = (
    ("sizes", "--errors", "100", "--cases", "cases.csv", *DEFINE),
    ("split", "cases.csv", "split", *DEFINE, "--eyeball", "EYEBALL", "--stratify", "site", "--stratify", "age"),
    ("ask", "split", "cases.csv", *DEFINE, "--model", "m"),
    ("overfit", "split", "cases.csv", "cases.csv", *DEFINE, "--model", "m"),
    ("table", "cases.csv", "tags.csv", *DEFINE),
    ("agree", "cases.csv", "tags.csv", *DEFINE),
    ("parts", "parts.csv", *DEFINE),
    ("slices", "cases.csv", *DEFINE),
    ("report", "cases.csv", "out", *DEFINE, "--tags", "tags.csv", "--parts", "parts.csv"),
)


def write_tables(folder: Path, number: int) -> None:
    """Cases of patients with two scans each, tags of two reviewers, and every subset of the components."""
    rng = np.random.default_rng(0)
    (folder / "error.yaml").write_text("name: x\ncase: y\nerror: {kind: value, column: dice, below: 0.7}\n")
    cases, tags, parts = ["case,patient,dice,site,age"], ["case,reviewer,tag"], ["case,patient,fixed,dice"]
    subsets = ["+".join(name for k, name in enumerate(COMPONENTS) if s >> k & 1) for s in range(2 ** len(COMPONENTS))]
    for case in range(number):
        cases.append(f"c{case},p{case // 2},{rng.beta(6, 2):.4f},{'ABCD'[rng.integers(4)]},{rng.integers(20, 80)}")
        for reviewer in ("ann", "bob"):
            given = np.flatnonzero(rng.random(TAGS) < 2 / TAGS)
            tags += [f"c{case},{reviewer},tag{tag}" for tag in given] or [f"c{case},{reviewer},"]
        faulty = set(np.array(list(COMPONENTS))[rng.random(len(COMPONENTS)) < 0.1])
        parts += [f"c{case},p{case // 2},{subset},{0.3 if faulty - set(subset) else 0.9}" for subset in subsets]
    for name, lines in (("cases", cases), ("tags", tags), ("parts", parts)):
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    number = parser.parse_args().cases
    table = Table(title=f"{number} cases, {TAGS} tags, {len(COMPONENTS)} components", title_justify="left")
    for column in ("command", "seconds", "GiB, highest so far"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        write_tables(Path(name), number)
        for words in COMMANDS:
            asked = [str(number // 2) if word == "EYEBALL" else word for word in words]
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "medfusion", "errors", *asked], cwd=name, check=True, capture_output=True
            )
            seconds = time.perf_counter() - began
            memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            table.add_row(words[0], f"{seconds:.1f}", f"{memory:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
