"""The anomaly detector as a system of components with oracles: what should be improved first? A file for `errors run`.

    MEDFUSION_DATA=... medfusion errors run pipelines/detector_parts.py runs/detector/parts.csv
    medfusion errors parts runs/detector/parts.csv --define pipelines/detector_parts.yaml --loss

Heads of `ixi_t1_2mm/dev` with implanted lesions and Rician noise of 1 to 6 % of the bright tissue. What each component
hands on, and what its oracle hands on in its place, which only implants make known:
  noise      the scan                                       the scan before noise was added
  normalise  intensity scale, place and bias field of it    those of the healthy scan
  rebuild    what the prior expects (method "fast")         the healthy scan
  threshold  the mask at a false discovery rate of 5 %      the mask at the threshold of the highest Dice
Scored is the Dice of the mask with the lesions, within the brain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detect import KINDS, data, load_head, with_lesions
from numpy.typing import NDArray

from medfusion.analysis.system import component
from medfusion.data.grid import canonical, nearest, resampled
from medfusion.data.intensity import SEEN, IntensityScale
from medfusion.metrics import dice
from medfusion.prior import Prior
from medfusion.reference import Reference, false_discovery, standardise
from medfusion.tasks.detect import pick_reference
from medfusion.tasks.place import Healthy, Seen, bias_field, healthy_at, on_scan, placed, seen_by, tissue_ml
from medfusion.tasks.rebuild import METHODS, examine, raw_maps
from medfusion.tasks.scores import combine
from medfusion.volume import Volume

METHOD, FDR = "fast", 0.05
NOISE = (0.01, 0.06)  # standard deviation in each channel of the receiver, of the 99th percentile
SEED = 0

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Case:
    """One head, whose lesions are fixed by its number."""

    name: str
    number: int
    path: Path

    @property
    def patient(self) -> str:
        """Each head is another person's."""
        return self.name

    @cached_property
    def heads(self) -> tuple[Volume, Volume, Volume, Volume]:
        """Healthy, with lesions, the lesions, the brain."""
        healthy, brain = load_head(self.path)
        ill, views = with_lesions(healthy, brain, self.number, KINDS, "dev")
        truth, inside = views["all"]
        return (*(canonical(each) for each in (healthy, ill, healthy.with_array(truth), healthy.with_array(inside))),)


class Normal(NamedTuple):
    """What brings a scan into the prior's units and place."""

    scale: IntensityScale
    matrix: NDArray[np.float64]
    bias: NDArray[np.float32]


def cases() -> list[Case]:
    """The heads of `dev`."""
    files = sorted((data() / "ixi_t1_2mm" / "dev").glob("*_T1.nii.gz"))
    return [Case(file.name.removesuffix("_T1.nii.gz"), number, file) for number, file in enumerate(files)]


@cache
def prior() -> Prior:
    """The prior that ships with the package."""
    return Prior.load("brain-t1")


@cache
def reference() -> Reference:
    """That of whole heads."""
    return max((each for each in prior().references if each.method == METHOD), key=lambda each: each.tissue_ml)


def healthy_heads() -> Healthy:
    """What is known of them."""
    return Healthy(reference().mean_scan, reference().spread, reference().inside)


def normal_of(scan: Volume) -> Normal:
    """Measured on one scan."""
    seen = seen_by(prior(), scan)
    assert pick_reference(prior(), METHOD, tissue_ml(seen)) is reference()
    matrix = placed(seen.volume, reference().mean_scan, reference().inside)
    return Normal(seen.scale, matrix, bias_field(seen.volume, matrix, healthy_heads()))


def seen_with(scan: Volume, normal: Normal) -> Seen:
    """A scan in the prior's units, its bias field taken out."""
    preprocessing = prior().config.preprocessing
    work = resampled(scan, preprocessing.spacing)
    flat = normal.scale.apply(work.array).clip(*SEEN)
    even = ((flat + 1) / normal.bias - 1).clip(*SEEN).astype(np.float32)
    return Seen(replace(work, array=even, modality=preprocessing.modality), normal.scale, normal.bias)


@component(oracle=lambda case: case.heads[1])
def noise(case: Case) -> Volume:
    """The scan, with noise that is drawn by the case's number."""
    rng = np.random.default_rng((SEED, case.number))
    ill = case.heads[1]
    sigma = rng.uniform(*NOISE) * np.percentile(ill.array, 99)
    real, imaginary = sigma * rng.standard_normal((2, *ill.shape))
    return ill.with_array(np.hypot(ill.array + real, imaginary).astype(np.float32))


@component(oracle=lambda case: normal_of(case.heads[0]))
def normalise(noise: Volume) -> Normal:
    """As the detector measures it."""
    return normal_of(noise)


@component(oracle=lambda case, normalise: seen_with(case.heads[0], normalise).volume.array)
def rebuild(noise: Volume, normalise: Normal) -> NDArray[np.float32]:
    """What the prior expects, where it looks; elsewhere the scan."""
    seen = seen_with(noise, normalise)
    here = healthy_at(seen.volume, normalise.matrix, healthy_heads())
    found = examine(seen, here, prior(), METHOD, stripped=False, seed=SEED)
    whole = seen.volume.array.copy()
    whole[found.box] = found.rebuilt
    return whole


def best_mask(case: Case, noise: Volume, normalise: Normal, rebuild: NDArray[np.float32]) -> Mask:
    """At the threshold of the highest Dice."""
    score, inside = score_map(noise, normalise, rebuild)
    truth = on_grid(case.heads[2], noise, normalise) & inside
    thresholds = np.quantile(score[truth], np.linspace(0, 1, 40)) if truth.any() else [np.inf]
    return max(((score >= each) & inside for each in thresholds), key=lambda mask: dice(truth, mask))


@component(oracle=best_mask)
def threshold(noise: Volume, normalise: Normal, rebuild: NDArray[np.float32]) -> Mask:
    """At the false discovery rate that the detector is asked for."""
    score, inside = score_map(noise, normalise, rebuild)
    p = reference().p_values(score[inside])
    passed = score[inside][p <= false_discovery(p, FDR)]
    return inside & (score >= (passed.min() if passed.size else np.inf))


def score_map(noise: Volume, normal: Normal, rebuilt: NDArray[np.float32]) -> tuple[NDArray[np.float32], Mask]:
    """The detector's score of a scan against what was expected of it, and where it has one."""
    seen = seen_with(noise, normal)
    atlas = reference().mean_scan
    inside = healthy_at(seen.volume, normal.matrix, healthy_heads()).inside
    mean, sd = (
        np.stack([on_scan(each, atlas, normal.matrix, seen.volume) for each in both])
        for both in (reference().mean, reference().sd)
    )
    z = standardise(raw_maps(seen.volume.array, rebuilt), rebuilt, mean, sd, reference().tissue)
    return combine(z, METHODS[METHOD].score), inside


def on_grid(mask: Volume, noise: Volume, normal: Normal) -> Mask:
    """A mask at the voxels at which the prior sees."""
    return nearest(mask, seen_with(noise, normal).volume) > 0


def score(case: Case, noise: Volume, normalise: Normal, threshold: Mask) -> dict[str, object]:
    """Dice within the brain."""
    truth, inside = (on_grid(each, noise, normalise) for each in case.heads[2:])
    return {"dice": round(dice(truth & inside, threshold & inside), 4)}
