"""What counts as an error: stated in a YAML file before results are read, and named by its hash in every output.

name: hippocampus-segmentation
case: one hippocampus of one person
columns: {case: case, patient: patient}
error: {kind: value, column: dice, below: 0.8}
severity: {minor: 0.2, major: 0.5}
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, NonNegativeFloat, model_validator

from medfusion.analysis.tables import RENAME, check_columns, numbers
from medfusion.config import Strict, read_yaml, validated
from medfusion.errors import MedfusionError, some

SMALLEST = 1e-6  # probability that the loss of a classification is taken of, so that it stays finite
JUDGED = ("error", "loss", "severity")  # columns that ``judge`` adds
ROUNDING = 1e-3  # by which the probabilities of a case may miss 1


class ValueRule(Strict):
    """Wrong where a number is too low or too high: Dice, a surface distance, structure lost in denoising.

    The loss is how far the number is from ``best``: 1 where low numbers are errors, 0 where high ones are.
    """

    kind: Literal["value"]
    column: str
    below: FiniteFloat | None = None
    above: FiniteFloat | None = None
    best: FiniteFloat | None = None

    @model_validator(mode="after")
    def _one_side_is_wrong(self) -> ValueRule:
        if (self.below is None) == (self.above is None):
            raise ValueError("either `below` or `above` says which values are errors")
        best = self.ideal
        if (self.below is not None and best < self.below) or (self.above is not None and best > self.above):
            raise ValueError(f"the best value, {best:g}, would be an error; state `best`")
        return self

    @property
    def ideal(self) -> float:
        """The best value."""
        if self.best is not None:
            return self.best
        return 1.0 if self.below is not None else 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read."""
        return (self.column,)

    def judge(self, table: pd.DataFrame) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Whether each case is an error, and its loss."""
        value = numbers(table, self.column)
        low, high = (-np.inf if self.below is None else self.below), (np.inf if self.above is None else self.above)
        wrong = (value < low) | (value > high)
        return wrong, np.abs(value - self.ideal)


class ClassificationRule(Strict):
    """Wrong where the class with the highest probability is not the true one; of one class: on the other side of
    ``threshold``. The loss is -ln p of the true class.
    """

    kind: Literal["classification"]
    truth: str  # column with the name of the true class
    probabilities: dict[str, str] = Field(min_length=1)  # class: column; one class stands for it against all others
    threshold: float = Field(0.5, gt=0, lt=1)  # of one class; a probability at it counts as the class

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read."""
        return (self.truth, *self.probabilities.values())

    def judge(self, table: pd.DataFrame) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Whether each case is an error, and its loss."""
        truth = table[self.truth].to_numpy(np.str_)
        given = np.stack([numbers(table, column) for column in self.probabilities.values()], axis=1)
        self._check(table, truth, given)
        names = np.array(list(self.probabilities))
        if len(names) == 1:
            true = truth == names[0]
            wrong, p = (given[:, 0] >= self.threshold) != true, np.where(true, given[:, 0], 1 - given[:, 0])
        else:
            wrong, p = names[given.argmax(axis=1)] != truth, given[np.arange(len(given)), self._index(truth)]
        return wrong, -np.log(np.maximum(p, SMALLEST))

    def _index(self, truth: NDArray[np.str_]) -> NDArray[np.int64]:
        order = {name: place for place, name in enumerate(self.probabilities)}
        return np.array([order[name] for name in truth], int)

    def _check(self, table: pd.DataFrame, truth: NDArray[np.str_], given: NDArray[np.float64]) -> None:
        several = len(self.probabilities) > 1
        outside = np.any((given < 0) | (given > 1), axis=1)
        uneven = np.abs(given.sum(axis=1) - 1) > (ROUNDING if several else np.inf)
        unknown = sorted(set(truth) - set(self.probabilities)) if several else []
        facts = {
            "not_from_0_to_1": some(table.index[outside]),
            "do_not_sum_to_1": some(table.index[uneven & ~outside]),
            "true_classes_without_a_probability": some(unknown),
            "missing_class": ""
            if several or set(truth) & set(self.probabilities)
            else f"no case is {next(iter(self.probabilities))}",
        }
        if any(facts.values()):
            raise MedfusionError("the probabilities cannot be used", **{k: v for k, v in facts.items() if v})


class DetectionRule(Strict):
    """Wrong where a lesion is missed, or more is found that is none than is allowed. The loss is the number of both."""

    kind: Literal["detection"]
    missed: str  # column: lesions not found
    extra: str  # column: findings that are no lesion; not called "false", which YAML reads as a truth value
    allowed_extra: int = Field(0, ge=0)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read."""
        return (self.missed, self.extra)

    def judge(self, table: pd.DataFrame) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Whether each case is an error, and its loss."""
        missed, extra = (numbers(table, column) for column in self.columns)
        return (missed > 0) | (extra > self.allowed_extra), missed + extra


class Columns(Strict):
    """How the columns are called that every table has."""

    case: str = "case"
    patient: str = "patient"  # the column of the case too, where each case is a patient of its own


class Definition(Strict):
    """What a case is, which cases are errors, how bad each is."""

    name: str = Field(min_length=1)
    case: str = Field(min_length=1)  # what one row is, in words
    columns: Columns = Columns()
    error: Annotated[ValueRule | ClassificationRule | DetectionRule, Field(discriminator="kind")]
    severity: dict[str, NonNegativeFloat] = Field(
        default_factory=dict
    )  # name: the loss from which an error is called so
    scores: tuple[str, ...] = ()  # columns with other results of the system, which are no properties of a case

    @property
    def results(self) -> tuple[str, ...]:
        """Columns that say what the system made of a case, and nothing of the case."""
        return (*self.error.columns, *self.scores)

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that change with anything that is stated."""
        stated = json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(stated.encode()).hexdigest()[:12]


def read_definition(path: Path) -> Definition:
    """Read a YAML file.

    Raises
    ------
    MedfusionError : it cannot be read, or a field is unknown or missing.
    """
    return validated(Definition, read_yaml(path), path)


def judge(table: pd.DataFrame, definition: Definition) -> pd.DataFrame:
    """``table``, as ``read_cases`` returns it, with the columns error (bool), loss and severity ("" where none) added.

    Raises
    ------
    MedfusionError : a column is missing or holds what cannot be judged, all such cases are named; or one is called as
        those that are added.
    """
    check_columns(table, definition.error.columns)
    taken = [name for name in JUDGED if name in table]
    if taken:
        raise MedfusionError("columns have the names of those that a judgement adds", columns=some(taken), fix=RENAME)
    wrong, loss = definition.error.judge(table)
    severity = np.full(len(table), "", object)
    for name, least in sorted(definition.severity.items(), key=lambda item: item[1]):
        severity[wrong & (loss >= least)] = name
    return table.assign(error=wrong, loss=loss, severity=severity)
