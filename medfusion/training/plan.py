"""The config of a label-conditional prior for a training set, from what the set is: nobody has to write one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes

from medfusion.config import Config
from medfusion.data.label_maps import lateral
from medfusion.errors import MedfusionError
from medfusion.io import discover
from medfusion.io.classes import read_classes
from medfusion.io.training_set import TrainingSet

FEWEST = 10  # labelled cases: the fewest with which a prior was measured (docs/augment.md)
LEVELS = 3  # of the network: crops are multiples of 2^LEVELS
LARGEST = 64  # voxels, edge of a crop


def plan_config(real: TrainingSet) -> Config:
    """Spacing, crop, labels and mirroring as the scans and names ask for; network and optimisation as hippocampus.yaml.

    Raises
    ------
    MedfusionError : too few labelled cases; it says how many are enough.
    """
    if len(real.labelled) < FEWEST:
        raise MedfusionError(
            f"{real.root}: {len(real.labelled)} labelled case(s) are too few to learn a prior from",
            enough=f"{FEWEST}; scans without label maps in the same folder help, but do not count",
            fix="label more, or name a prior that was trained on such labels: --prior",
        )
    found = [discover(case.image)[0] for case in real.cases]
    edges = np.array([voxel_sizes(one.affine) for one in found])  # mm
    spacing = round(float(np.median(edges)), 2)
    shortest = np.median((np.array([one.shape for one in found]) * edges / spacing).min(axis=1))
    names = {value: name for name, value in real.label_names.items()}
    number = max(names) + 1
    return Config.model_validate(
        {
            "name": re.sub(r"[^a-z0-9_-]+", "-", real.root.absolute().name.lower()).strip("-_") or "prior",
            "label_names": [names.get(value, f"label {value}") for value in range(number)],
            "network": {"channels": (48, 96, 128), "blocks": (2, 2, 2), "labels": number},
            "preprocessing": {"modality": "CT" if real.channel == "CT" else "MR", "spacing": spacing},
            "data": {
                "labels": "*",
                "unlabelled": bool(real.unlabelled),
                "zoomed_share": 0,
                "located_share": 0.9,  # what lies around the labels is known by where it lies
                "flips": "" if lateral(real.label_names) else "x",
                "validation": max(1, min(8, len(real.cases) // 10)),
                "crop": int(np.clip(16 * (shortest // 16), 16, LARGEST)),
            },
            "training": {
                "batch": 8,
                "steps": 3000,
                "optimizer": "muon",
                "learning_rate": 2e-3,
                "times": {"lognormal_share": 0.4, "median": 0.5, "spread": 1.2},
                "ema_half_life": 2000,
            },
        }
    )


def with_classes(config: Config, real: TrainingSet, table: Path) -> Config:
    """The config of a prior that is told the class of each scan, all those that the table states.

    Raises
    ------
    MedfusionError : as ``read_classes``, for the scans of the training set.
    """
    stated = read_classes(table, [case.name for case in real.cases])
    network = config.network.model_copy(update={"classes": tuple(sorted(set(stated.values())))})
    data = config.data.model_copy(update={"classes": str(table.absolute())})
    return config.model_copy(update={"network": network, "data": data})
