"""A tiny prior calibrated on phantom heads, made once for all tests of a file."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from prior_factory import CENTRE, grid, head, random_prior
from scipy import ndimage

from medfusion.prior import Prior
from medfusion.tasks.calibrate import Cohort, gather, make_reference
from medfusion.volume import Volume

NOISE = 40.0
SIZE = 40


def silent(line: str) -> None:
    """No progress."""


def healthy(seed: int, noise: float = NOISE, **changes: object) -> Volume:
    """One phantom head of its own brightness, size and noise, and uneven within, as no two are alike."""
    rng = np.random.default_rng(seed)
    affine = grid((SIZE,) * 3)
    patches = ndimage.gaussian_filter(np.random.default_rng((seed, 1)).normal(size=(SIZE,) * 3), 3.0)
    array = head(affine, (SIZE,) * 3, noise=noise, seed=seed, **changes) * rng.uniform(0.9, 1.1)
    array = (array * (1 + 0.04 * patches / patches.std())).astype(np.float32)
    larger = np.eye(4)
    larger[:3, :3] *= rng.uniform(0.95, 1.05)
    larger[:3, 3] = CENTRE - larger[:3, :3] @ CENTRE + rng.normal(0, 2, 3)
    return Volume(array, larger @ affine, f"head-{seed}")


def cohort(prior: Prior, number: int = 12) -> Cohort:
    """Phantoms, registered."""
    return gather(((healthy(seed), None) for seed in range(number)), prior, stripped=False, progress=silent)


def calibrated(methods: Sequence[str] = ("intensity",), number: int = 12) -> Prior:
    """A random prior with what methods leave on phantoms."""
    prior = random_prior()
    scans = cohort(prior, number)
    return replace(prior, references=tuple(make_reference(scans, prior, m, progress=silent) for m in methods))
