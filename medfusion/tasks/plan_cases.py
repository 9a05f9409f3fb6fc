"""Plan new cases from those of a training set: which label map each shows, whose scan it is in, what of it is drawn.

a new map   deformed, mirrored, between two cases; the parent's image goes along, is noised and drawn anew
from real   the map of a real case; its image is noised in part and rebuilt, so texture and contrast are new
insert      a lesion of one case in a scan that has none; only what lies in and around it is drawn
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.data.grid import canonical, nearest, resampled
from medfusion.data.intensity import foreground
from medfusion.data.label_maps import host_labels, lesion_shapes, new_label_map, occurrence, place
from medfusion.errors import MedfusionError
from medfusion.io.companions import read_labels
from medfusion.io.training_set import TrainingCase, TrainingSet, read_scan

KEPT = 256  # label maps that are kept in memory
MARGIN = 2  # voxels around an inserted lesion that are drawn anew with it


class Maps(Sequence[NDArray[Any]]):
    """The label maps of cases on the prior's spacing, axes RAS, read when they are asked for."""

    def __init__(self, cases: Sequence[TrainingCase], spacing: float) -> None:
        self.cases, self.spacing = cases, spacing
        self._read = lru_cache(KEPT)(self._map)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> NDArray[Any]:  # type: ignore[override]
        return self._read(range(len(self))[index])

    def _map(self, index: int) -> NDArray[Any]:
        case = self.cases[index]
        assert case.labels is not None
        scan = read_scan(case)
        return nearest(canonical(read_labels(case.labels, scan)), resampled(canonical(scan), self.spacing))


class Plan(NamedTuple):
    """A case to be made: its real parents, the first of which lends grid, units and image; the label map.

    ``moved`` (3, d, h, w) is where in the parent's image each voxel comes from, None: it stays; ``drawn`` (d, h, w)
    what alone is drawn anew.
    """

    parents: tuple[TrainingCase, ...]
    labels: NDArray[Any]
    moved: NDArray[np.float32] | None = None
    drawn: NDArray[np.bool_] | None = None


Planner = Callable[[int, np.random.Generator], Plan]  # of the case of a number


def new_maps(real: TrainingSet, spacing: float, flips: bool) -> Planner:
    """Maps that no case has."""
    everyone = Maps(real.labelled, spacing)
    maps = Maps([case for case, labels in zip(everyone.cases, everyone, strict=True) if labels.any()], spacing)

    def plan(number: int, rng: np.random.Generator) -> Plan:
        labels, parents, where = new_label_map(maps, rng, (spacing,) * 3, flips=flips)
        return Plan(tuple(maps.cases[index] for index in parents), labels, where)

    return plan


def real_maps(real: TrainingSet, spacing: float) -> Planner:
    """The maps of the real cases, which take turns."""
    maps = Maps(real.labelled, spacing)
    return lambda number, rng: Plan((maps.cases[number % len(maps)],), maps[number % len(maps)])


def insertions(real: TrainingSet, name: str, spacing: float) -> Planner:
    """One lesion of a label more in the cases without any, which take turns.

    Raises
    ------
    MedfusionError : there is no such label, no whole lesion of it, or no case without.
    """
    if name not in real.label_names or name == "background":
        raise MedfusionError(f"--insert {name}: no such label", labels=", ".join(real.label_names))
    value, maps = real.label_names[name], Maps(real.labelled, spacing)
    ill = [index for index, labels in enumerate(maps) if (labels == value).any()]
    healthy = [index for index in range(len(maps)) if index not in set(ill)]
    if not ill or not healthy:
        raise MedfusionError(
            f"--insert {name}: " + ("no case has it" if healthy else "every case has it"),
            with_it=len(ill),
            without=len(healthy),
            fix="cases of both kinds; a healthy scan's label map is 0 where there is nothing else to label",
        )
    shapes = [(index, shape) for index in ill for shape in lesion_shapes([maps[index]], value)]
    if not shapes:
        raise MedfusionError(f"--insert {name}: every lesion is cut off by the border of its scan", cases=len(ill))
    hosts = host_labels([maps[index] for index in ill], value)

    def plan(number: int, rng: np.random.Generator) -> Plan:
        into, (source, shape) = healthy[number % len(healthy)], shapes[int(rng.integers(len(shapes)))]
        scan = resampled(canonical(read_scan(maps.cases[into])), spacing)
        within = foreground(scan.array) if 0 in hosts else None  # the background holds air too
        allowed = occurrence(maps[into], value, hosts, within)
        labels, placed = place(maps[into], shape, value, allowed, rng)
        drawn = ndimage.binary_dilation(placed, iterations=MARGIN)
        return Plan((maps.cases[into], maps.cases[source]), labels, drawn=drawn)

    return plan
