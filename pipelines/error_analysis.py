"""Does the attribution blame the right component, as surely as it says? A system with planted faults, many times over.

    python pipelines/error_analysis.py --out runs/errors [--repetitions 200]

The kidney reader (`pipelines/kidney_reader.py`) reads new synthetic scans in each repetition, with every subset of its
two components made perfect. The truth is that of the planted faults: which answers they make wrong is known without
running anything. Printed are the shares of both components in the error rate (Shapley), and of all errors those that
each is the first to mend and those that nothing mends, as the labels are wrong: as planted, as found, and how often the
90 % interval held what was planted.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import kidney_reader as reader
import numpy as np
import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

from medfusion.analysis.definition import Definition
from medfusion.analysis.parts import Attribution, attribute, parts_from_table, sequential_blame, shapley
from medfusion.analysis.system import load_system, run_case
from medfusion.config import validated

DEFINITION = validated(Definition, yaml.safe_load(reader.DEFINITION), Path("error.yaml"))
SYSTEM = Path(__file__).with_name("kidney_reader.py")


def planted_shares() -> dict[str, float]:
    """What the attribution should find, without running anything.

    What a subset answers is known from the faults: a kidney that is not found has no mass; one that is found is read
    the wrong way round where the second component is misled; a wrong label turns right into wrong and back.
    """
    shares, kinds = [], []
    for has_mass, organ, mass, label in product((False, True), repeat=4):
        given = zip((organ, mass, label), reader.SHARES.values(), strict=True)
        shares.append(0.5 * np.prod([share if on else 1 - share for on, share in given]))
        answers = [
            has_mass if subset & 2 else (not organ or bool(subset & 1)) and has_mass != mass for subset in range(4)
        ]
        kinds.append([answer != (has_mass != label) for answer in answers])
    weight, wrong = np.array(shares), np.array(kinds)
    blame = sequential_blame(wrong)
    of_errors = weight * wrong[:, 0] / (weight * wrong[:, 0]).sum()
    names = ("first to mend it: organ", "first to mend it: mass", "nothing mends it (labels)")
    blamed = {name: float(of_errors[blame == place].sum()) for place, name in enumerate(names)}
    organ_share, mass_share = shapley((weight[:, None] * wrong).sum(axis=0))
    return {"error rate, of organ": organ_share, "error rate, of mass": mass_share} | blamed


def intervals(found: Attribution) -> np.ndarray:
    """(5, 3) what was found, low and high, in the order of ``planted_shares``."""
    shares = found.table[["shapley", "low", "high"]].to_numpy()
    return np.concatenate([shares, found.table[["blamed_share", "blamed_low", "blamed_high"]], [found.unmended]])


def repetition(number: int) -> tuple[Attribution, pd.DataFrame]:
    """Read new scans, and attribute the errors."""
    system = load_system(SYSTEM)
    rows = [row for case in reader.draw_cases(reader.PATIENTS, number) for row in run_case(system, case)]
    table = pd.DataFrame(rows).astype(str)
    return attribute(parts_from_table(table, DEFINITION)), table


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/errors"))
    parser.add_argument("--repetitions", type=int, default=200)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    truth, found = planted_shares(), []
    for number in range(asked.repetitions):
        one, table = repetition(number)
        found.append(intervals(one))
        if number == 0:
            table.to_csv(asked.out / "parts.csv", index=False)
    value, low, high = np.moveaxis(np.stack(found), -1, 0)
    title = f"{asked.repetitions} repetitions of {reader.PATIENTS} patients with {reader.SCANS} scans each"
    shown = Table(title=title, title_justify="left")
    for column in ("share", "planted", "found, mean", "in the 90 % interval"):
        shown.add_column(column)
    for place, (name, true) in enumerate(truth.items()):
        inside = ((low[:, place] <= true) & (true <= high[:, place])).mean()
        shown.add_row(name, f"{true:.4f}", f"{value[:, place].mean():.4f}", f"{inside:.1%}")
    Console().print(shown)


if __name__ == "__main__":
    main()
