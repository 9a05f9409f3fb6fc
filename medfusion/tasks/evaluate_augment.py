"""Evaluate augmentation: does a segmenter become better when synthetic cases are added to the real ones?

The same segmenter is trained on real cases, on synthetic ones, and on both, with classical augmentation everywhere and
the same number of steps, from several seeds and on training sets of several sizes. It is judged on cases that neither
it nor the generator saw.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from medfusion.config import PreprocessingConfig, SegmenterConfig
from medfusion.data.crops import Case
from medfusion.errors import MedfusionError, some
from medfusion.io import discover, staged
from medfusion.io.output import check_output
from medfusion.io.training_set import TrainingCase, TrainingSet, read_training_set
from medfusion.io.training_set_check import check_training_set
from medfusion.io.training_set_output import MANIFEST, case_files, read_manifest
from medfusion.metrics.intervals import bootstrap
from medfusion.tasks.runner import environment, pick_device
from medfusion.tasks.segmenter import mean_dice, prepared, segment, train_segmenter

ARMS = ("real", "synthetic", "both")
OUTPUTS = ("cases.csv", "summary.json")


class Trained(NamedTuple):
    """One training: ``dice`` (cases,) is the mean over the labels, of each case of the test set."""

    size: int
    seed: int
    arm: str
    dice: NDArray[np.float64]
    seconds: float


class Estimate(NamedTuple):
    """A mean over seeds and test cases, with its 95 % interval over patients."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """``test`` names the cases in the order of every ``dice``, ``patients`` are theirs."""

    test: tuple[str, ...]
    patients: tuple[str, ...]
    trainings: tuple[Trained, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of real cases, rising."""
        return tuple(sorted({one.size for one in self.trainings}))

    def dice(self, size: int, arm: str) -> Estimate:
        """Of one arm."""
        return self._estimate(self._of(size, arm))

    def gain(self, size: int, arm: str = "both") -> Estimate:
        """Of one arm over real cases alone, case by case and seed by seed."""
        return self._estimate(self._of(size, arm) - self._of(size, "real"))

    def _of(self, size: int, arm: str) -> NDArray[np.float64]:
        """(cases,), the mean over seeds."""
        found = [one.dice for one in self.trainings if (one.size, one.arm) == (size, arm)]
        return np.mean(found, axis=0)

    def _estimate(self, values: NDArray[np.float64]) -> Estimate:
        def mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
            return sums[:, 0] / sums[:, 1]

        interval = bootstrap(mean, np.stack([values, np.ones_like(values)], axis=1), self.patients)
        return Estimate(float(values.mean()), *interval)


def compare(
    real: Sequence[Case],
    synthetic: Sequence[Case],
    test: Sequence[Case],
    classes: int,
    config: SegmenterConfig,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    arms: Sequence[str] = ARMS,
) -> Iterator[Trained]:
    """Train the segmenter in each arm with one seed, and judge it on ``test``."""
    pools = {"real": [real], "synthetic": [synthetic], "both": [real, synthetic]}
    for arm in arms:
        began = time.perf_counter()
        network = train_segmenter(pools[arm], classes, config, seed=seed, device=device)
        seconds = time.perf_counter() - began
        dice = np.array([mean_dice(segment(network, case.image), case.labels, classes) for case in test])
        yield Trained(len(real), seed, arm, dice, seconds)


def evaluate_augmentation(
    real: Path,
    synthetic: Path,
    test: Path,
    output: Path,
    *,
    sizes: Sequence[int] = (),
    seeds: int = 3,
    config: SegmenterConfig | None = None,
    device: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compare the three arms on training sets in folders; ``output`` receives ``cases.csv`` and ``summary.json``.

    Parameters
    ----------
    real, test : training sets as ``read_training_set`` takes them; they must not share a case.
    synthetic : what ``augment`` wrote, or any training set whose cases were all made from all of ``real``.
    sizes : numbers of real cases, drawn anew with each seed; none: all. Of the synthetic cases those are taken whose
        parents were all drawn. What the generator learnt from the others it still knows: for a fair curve it must be
        trained on the drawn cases alone, as pipelines/augment.py does.
    seeds : trainings of each arm and size.
    say : told each result in one line.

    Raises
    ------
    MedfusionError : before any work: the sets cannot be used, or share a case; a size is larger than the set, or leaves
        no synthetic case; there are results already.
    """
    check_output(output, real)
    if not overwrite and (there := [output / name for name in OUTPUTS if (output / name).exists()]):
        raise MedfusionError(f"{there[0]}: exists already", fix="--overwrite, or another folder")
    device = pick_device(device)
    config = config or SegmenterConfig()
    training, held_out = read_training_set(real), read_training_set(test)
    check_training_set(training, held_out)
    made = synthetic_cases(synthetic, training)
    names = sorted(case.name for case in training.labelled)
    draws = {(size, seed): drawn(names, made, size, seed) for size in sizes or [len(names)] for seed in range(seeds)}
    spacing = float(np.median([voxel_sizes(discover(case.image)[0].affine) for case in training.labelled]))
    known = PreprocessingConfig(spacing=spacing)
    cases = {case.name: prepared(case, known) for case in (*training.labelled, *made)}
    judged = [prepared(case, known) for case in held_out.labelled]
    classes = max(training.label_names.values()) + 1
    began, trainings = time.perf_counter(), []
    for (size, seed), (few, children) in draws.items():
        pools = [[cases[name] for name in pool] for pool in (few, children)]
        for one in compare(pools[0], pools[1], judged, classes, config, seed=seed, device=device):
            say(f"{size} real cases, seed {seed}, {one.arm}: Dice {one.dice.mean():.4f}, {one.seconds:.0f} s")
            trainings.append(one)
    test_names, patients = zip(*((case.name, case.patient) for case in held_out.labelled), strict=True)
    comparison = Comparison(test_names, patients, tuple(trainings))
    facts = {
        "command": "evaluate augment",
        "real": str(real),
        "synthetic": str(synthetic),
        "test": str(test),
        "segmenter": config.model_dump(),
        "spacing": spacing,
        "environment": environment(device),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_comparison(output, comparison, facts)
    return comparison


def synthetic_cases(folder: Path, real: TrainingSet) -> dict[TrainingCase, tuple[str, ...]]:
    """The synthetic cases in a folder and the real ones each was made from: all of them where no manifest tells.

    Raises
    ------
    MedfusionError : there is no such case, or one comes from a case that is not in the real set.
    """
    found, bids = read_training_set(folder), (folder / "dataset_description.json").is_file()
    everyone = tuple(case.name for case in real.labelled)
    parents = {
        case_files(folder, one["case"], found.file_ending, bids, found.channel)[0]: tuple(one["parents"])
        for one in (read_manifest(folder) if (folder / MANIFEST).exists() else [])  # another tool has none
    }
    taken = {case.image for case in real.cases}
    made = {
        case: parents.get(case.image, everyone)
        for case in found.labelled
        if (case.image in parents if parents else case.image not in taken)
    }
    known = {case.name for case in real.cases}
    strangers = sorted({parent for each in made.values() for parent in each} - known)
    if not made or strangers:
        raise MedfusionError(
            f"{folder}: " + ("its cases were made from other real ones" if strangers else "holds no synthetic case"),
            **({"parents_not_in_the_real_set": some(strangers)} if strangers else {}),
            real=real.root,
        )
    return made


def drawn(
    names: Sequence[str], made: Mapping[TrainingCase, Sequence[str]], size: int, seed: int
) -> tuple[list[str], list[str]]:
    """The names of ``size`` real cases, and of the synthetic ones that were made from these alone.

    Raises
    ------
    MedfusionError : there are fewer real cases, or no such synthetic one.
    """
    if not 1 <= size <= len(names):
        raise MedfusionError(f"--sizes {size}: the real set has {len(names)} labelled case(s)")
    few = {names[index] for index in np.random.default_rng(seed).permutation(len(names))[:size]}
    children = [case.name for case, parents in made.items() if few >= set(parents)]
    if not children:
        raise MedfusionError(
            f"--sizes {size}: no synthetic case was made from the {size} that are drawn alone",
            fix="more synthetic cases, or augment a folder of these cases only",
        )
    return sorted(few), children


def write_comparison(output: Path, comparison: Comparison, facts: Mapping[str, object]) -> None:
    """``OUTPUTS`` in a folder: a row for each training and case, and the estimates with ``facts``."""
    table = [
        {
            "size": size,
            **{arm: comparison.dice(size, arm)._asdict() for arm in ARMS},
            "gain": comparison.gain(size)._asdict(),
        }
        for size in comparison.sizes
    ]
    with (
        staged(output / OUTPUTS[0], overwrite=True) as cases,
        staged(output / OUTPUTS[1], overwrite=True) as summary,
    ):
        with cases.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("size", "seed", "arm", "case", "patient", "dice"))
            for one in comparison.trainings:
                for name, patient, dice in zip(comparison.test, comparison.patients, one.dice, strict=True):
                    rows.writerow((one.size, one.seed, one.arm, name, patient, f"{dice:.6g}"))
        summary.write_text(json.dumps({**facts, "sizes": table}, indent=2) + "\n")
