"""Measure detection: how well one method did on one scan, and each of several methods on all scans together.

Voxels of all scans are ranked together, lesions by the weight of the regions that touch them, scans by their heaviest
region. Intervals draw patients with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medfusion.metrics.detection import (
    Lesions,
    auroc,
    average_precision,
    best_dice,
    compact,
    froc,
    match_lesions,
    regions,
    scan_auroc,
    voxel_counts,
)
from medfusion.metrics.intervals import bootstrap
from medfusion.reference import CLUSTER_P, weigh
from medfusion.tasks.detect import Detection

SIZES = (1.0, 5.0)  # ml, between the classes of lesion sizes
CLASSES = (f"< {SIZES[0]:g} ml", f"{SIZES[0]:g} to {SIZES[1]:g} ml", f"> {SIZES[1]:g} ml")
RATES = (0.5, 1.0, 2.0)  # false positive regions a scan, at which lesions are counted
LEVELS = (0.05, 0.01, 0.001)  # p of voxels, of which so many should be as low in healthy scans
FLAGGED = 0.05  # scan p, at or below which a scan is called ill
Counts = NDArray[Any]


class Estimate(NamedTuple):
    """A value and its 95 % interval over patients; nan where there is none, as the interval with one patient."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class CaseResult:
    """How one method did on one scan.

    Attributes
    ----------
    counts : (1 + len(CLASSES), n) voxels with each score: outside lesions, and in lesions of each class of sizes.
    values : (n,) the scores, rising.
    overlap : (3,) voxels of mask and truth together, of the mask, of the truth.
    voxel_ml : volume of a voxel.
    voxels : (l,) of each true lesion.
    scores : (l,) weight of the heaviest candidate region that touches it; -inf without any.
    false_positives : (m,) weights of the candidate regions that touch no lesion. Candidates are the clusters that a
        reference weighs (``medfusion.reference.weigh``).
    found : (l,) whether the mask touches the lesion.
    findings, false_findings : regions of the mask, and those that touch no lesion.
    scan_p : of the whole scan.
    low_p : (1 + len(LEVELS),) voxels outside lesions that are scored, and with a p up to each level.
    seconds : that detection took.
    """

    case: str
    patient: str
    method: str
    counts: Counts
    values: NDArray[np.float32]
    overlap: NDArray[np.int64]
    voxel_ml: float
    voxels: NDArray[np.int64]
    scores: NDArray[np.float64]
    false_positives: NDArray[np.float64]
    found: NDArray[np.bool_]
    findings: int
    false_findings: int
    scan_p: float
    low_p: NDArray[np.int64]
    seconds: float

    @property
    def ill(self) -> bool:
        """Whether there is a lesion."""
        return len(self.voxels) > 0

    @property
    def lesion_ml(self) -> NDArray[np.float64]:
        """(l,) volume of each lesion."""
        return self.voxels.astype(np.float64) * self.voxel_ml

    @property
    def heaviest(self) -> float:
        """Weight of the heaviest candidate anywhere; 0 without any."""
        return float(max(self.scores.max(initial=0.0), self.false_positives.max(initial=0.0)))


@dataclass(frozen=True, eq=False)
class Summary:
    """All scans together.

    Attributes
    ----------
    prevalence : the share of voxels in lesions: the AUPRC of chance.
    measures : method to name of a measure to its estimate, in the order of ``summarise``.
    ratios : AUPRC of the first method over that of each other one, drawn in pairs.
    """

    scans: int
    patients: int
    ill: int
    lesions: int
    prevalence: float
    measures: dict[str, dict[str, Estimate]]
    ratios: dict[str, Estimate]


def size_class(ml: NDArray[np.float64]) -> NDArray[np.int64]:
    """The index in ``CLASSES`` of volumes (l,)."""
    return np.digitize(ml, SIZES)


def measure_case(
    found: Detection,
    truth: NDArray[Any],
    *,
    method: str,
    patient: str = "",
    inside: NDArray[Any] | None = None,
    seconds: float = 0.0,
) -> CaseResult:
    """What a detection found of the true lesions, ``truth`` > 0 (i, j, k), and elsewhere.

    Parameters
    ----------
    patient : whose scan it is; else the case is taken for a patient.
    inside : > 0 where voxels and regions count at all, (i, j, k); None: everywhere in the scan.
    """
    volume = found.anomaly
    inside = np.ones(volume.shape, bool) if inside is None else inside > 0
    truth, mask = (truth > 0) & inside, (found.regions.array > 0) & inside
    score, p = volume.array, found.p_value.array
    labels, _ = regions(truth)
    sizes = np.bincount(labels.ravel())[1:]
    rows = [voxel_counts(score, truth, inside & ~truth)[0]]
    class_of = np.concatenate([[-1], size_class(sizes.astype(np.float64) * volume.voxel_ml)])[labels]
    rows += [voxel_counts(score, truth, class_of == k)[1] for k in range(len(CLASSES))]
    counts, values = compact(np.stack(rows))

    height = score[p > CLUSTER_P].max(initial=0.0)
    candidates = match_lesions(*weigh(score, inside, height, volume.voxel_ml), truth)
    written, number = regions(mask)
    as_written = match_lesions(written, np.ones(number), truth)
    healthy = inside & ~truth & found.scored
    return CaseResult(
        case=volume.name,
        patient=patient or volume.name,
        method=method,
        counts=counts,
        values=values,
        overlap=np.array([(mask & truth).sum(), mask.sum(), truth.sum()]),
        voxel_ml=volume.voxel_ml,
        voxels=candidates.voxels,
        scores=candidates.scores,
        false_positives=candidates.false_positives,
        found=as_written.scores > 0,
        findings=number,
        false_findings=len(as_written.false_positives),
        scan_p=found.scan_p,
        low_p=np.array([healthy.sum(), *((healthy & (p <= level)).sum() for level in LEVELS)]),
        seconds=seconds,
    )


def stack(results: Sequence[CaseResult]) -> tuple[Counts, NDArray[np.float32]]:
    """Counts of all cases (cases, 1 + len(CLASSES), n) over the scores (n,) that any of them has, rising."""
    values = np.unique(np.concatenate([result.values for result in results]))
    counts = np.zeros((len(results), 1 + len(CLASSES), len(values)), np.int32)
    for row, result in zip(counts, results, strict=True):
        row[:, np.searchsorted(values, result.values)] = result.counts
    return counts, values


def whole(counts: Counts) -> Counts:
    """(..., 2, n): outside lesions and in lesions of any size, from (..., 1 + len(CLASSES), n)."""
    return np.stack([counts[..., 0, :], counts[..., 1:, :].sum(axis=-2)], axis=-2)


def quotient(sums: NDArray[Any]) -> NDArray[np.float64]:
    """(b,) first over second of (b, 2); nan where the second is 0."""
    sums = sums.astype(np.float64)
    return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)


def estimate(
    statistic: Callable[[NDArray[Any]], NDArray[np.float64]], cases: NDArray[Any], patients: Sequence[str]
) -> Estimate:
    """A statistic of sums over cases with its interval; arguments as of ``medfusion.metrics.intervals.bootstrap``."""
    value = float(statistic(cases.sum(axis=0)[None])[0])
    interval = bootstrap(statistic, cases, patients) if len(set(patients)) > 1 else (math.nan, math.nan)
    return Estimate(value, *interval)


def measure(results: Sequence[CaseResult]) -> dict[str, Estimate]:
    """All measures of one method on its cases.

    Of the voxels of all scans together: "auprc", "auroc", "best_dice" (at the threshold that is best on these very
    scans), "dice" (of the masks as written), "auprc of < 1 ml" and so on, where lesions of other sizes are left out.

    Of lesions: "sensitivity at 0.5" and so on, the share found at so many false positive regions a scan (FROC);
    "sensitivity of < 1 ml" and so on, at one; "found" and "false_findings" (a scan) of the masks as written.

    Of scans: "scan_auroc" by the heaviest region; "healthy_flagged" and "ill_flagged", the shares with a scan p up to
    0.05; "voxels p <= 0.05" and so on, the shares of the voxels of healthy scans.
    """
    return _of_voxels(results) | _of_lesions(results) | _of_scans(results)


def _of_voxels(results: Sequence[CaseResult]) -> dict[str, Estimate]:
    patients = [result.patient for result in results]
    counts, values = stack(results)
    voxels, overlap = whole(counts), np.stack([result.overlap for result in results])
    measures = {
        "auprc": estimate(average_precision, voxels, patients),
        "auroc": estimate(auroc, voxels, patients),
        "best_dice": estimate(lambda sums: best_dice(sums, values)[0], voxels, patients),
        "dice": estimate(dice, overlap, patients),
    }
    by_size = enumerate(CLASSES, start=1)
    return measures | {
        f"auprc of {name}": estimate(average_precision, counts[:, [0, k]], patients) for k, name in by_size
    }


def _of_lesions(results: Sequence[CaseResult]) -> dict[str, Estimate]:
    patients = [result.patient for result in results]
    sizes = [size_class(result.lesion_ml) for result in results]

    def sensitivity(rate: float, chosen: Callable[[NDArray[np.int64]], NDArray[np.bool_]]) -> Estimate:
        scans = [
            Lesions(result.voxels[chosen(size)], result.scores[chosen(size)], result.false_positives)
            for result, size in zip(results, sizes, strict=True)
        ]
        return _of_draws(lambda drawn: float(froc([scans[k] for k in drawn], [rate])[0]), patients)

    found = np.array([(result.found.sum(), len(result.found)) for result in results])
    false = np.array([(result.false_findings, 1) for result in results])
    measures = {f"sensitivity at {rate:g}": sensitivity(rate, lambda size: size >= 0) for rate in RATES}
    measures["found"] = estimate(quotient, found, patients)
    measures["false_findings"] = estimate(quotient, false, patients)
    by_size = enumerate(CLASSES)
    return measures | {f"sensitivity of {name}": sensitivity(1.0, partial(np.equal, k)) for k, name in by_size}


def _of_scans(results: Sequence[CaseResult]) -> dict[str, Estimate]:
    patients = [result.patient for result in results]
    weights, ill = np.array([result.heaviest for result in results]), np.array([result.ill for result in results])
    flagged = np.array([result.scan_p <= FLAGGED for result in results])
    low_p = np.stack([result.low_p * (not result.ill) for result in results])
    measures = {
        "scan_auroc": _of_draws(lambda drawn: scan_auroc(weights[drawn], ill[drawn]), patients),
        "healthy_flagged": estimate(quotient, np.stack([flagged & ~ill, ~ill], axis=1), patients),
        "ill_flagged": estimate(quotient, np.stack([flagged & ill, ill], axis=1), patients),
    }
    levels = enumerate(LEVELS, start=1)
    return measures | {f"voxels p <= {level:g}": estimate(quotient, low_p[:, [k, 0]], patients) for k, level in levels}


def _of_draws(statistic: Callable[[NDArray[np.int64]], float], patients: Sequence[str]) -> Estimate:
    """The same as ``estimate`` for a statistic of the indices of the cases, each as often as it was drawn."""
    index = np.arange(len(patients))

    def of_times(times: NDArray[Any]) -> NDArray[np.float64]:
        return np.array([statistic(np.repeat(index, np.rint(row).astype(int))) for row in times])

    return estimate(of_times, np.eye(len(patients)), patients)


def dice(sums: NDArray[Any]) -> NDArray[np.float64]:
    """(b,) of voxels (b, 3) of both, of the mask and of the truth; nan without truth."""
    return quotient(np.stack([2 * sums[:, 0], (sums[:, 1] + sums[:, 2]) * (sums[:, 2] > 0)], axis=1))


def ratio(first: Sequence[CaseResult], other: Sequence[CaseResult]) -> Estimate:
    """AUPRC of one method over that of another, the same patients drawn for both."""
    both = whole(stack([*first, *other])[0])
    pairs = np.stack([both[: len(first)], both[len(first) :]], axis=1)
    return estimate(lambda sums: quotient(average_precision(sums)), pairs, [result.patient for result in first])


def summarise(results: Iterable[CaseResult]) -> Summary:
    """All measures of all methods, the first method compared with each other one.

    Raises
    ------
    ValueError : the methods were not run on the same cases in the same order, or there is none.
    """
    by_method: dict[str, list[CaseResult]] = {}
    for result in results:
        by_method.setdefault(result.method, []).append(result)
    cases = {tuple((r.case, r.patient, *r.voxels) for r in mine) for mine in by_method.values()}
    if len(cases) != 1:
        raise ValueError(f"{', '.join(by_method) or 'no method'}: not run on the same cases")
    first, *others = by_method
    mine = by_method[first]
    voxels = sum(result.counts.sum(axis=-1) for result in mine)
    return Summary(
        scans=len(mine),
        patients=len({result.patient for result in mine}),
        ill=sum(result.ill for result in mine),
        lesions=sum(len(result.voxels) for result in mine),
        prevalence=float(voxels[1:].sum() / voxels.sum()),
        measures={method: measure(each) for method, each in by_method.items()},
        ratios={other: ratio(mine, by_method[other]) for other in others},
    )
