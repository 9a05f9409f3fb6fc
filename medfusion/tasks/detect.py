"""Detect: where a scan is unlike what the prior makes of it, by more than healthy scans are there, with error rates.

The reconstruction is compared with the scan, the difference standardised by what the same method leaves on healthy
scans at that place and tissue (``medfusion.reference``, made by ``medfusion calibrate``), and the score turned into a
p-value a voxel, a region and a scan. No lesion is needed anywhere on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.data.grid import nearest, onto_grid
from medfusion.errors import MedfusionError
from medfusion.io import Series, discover, read, write_nifti
from medfusion.io.companions import check_patterns, companion, read_beside, scans_called
from medfusion.io.dicom_result import why_unreferable, write_dicom_results
from medfusion.io.findings import Finding, name_findings, read_label_names, write_findings, write_summary
from medfusion.prior import Prior
from medfusion.reference import ANOTHER, DIFFERENT, NEIGHBOURS, Reference, false_discovery, standardise, weigh
from medfusion.tasks.checks import caution
from medfusion.tasks.place import (
    Healthy,
    Seen,
    features,
    healthy_at,
    in_box,
    on_scan,
    placed,
    seen_by,
    tissue_ml,
    without_bias,
)
from medfusion.tasks.rebuild import METHODS, examine
from medfusion.tasks.runner import Job, Run, Settings, require_folder, run_jobs
from medfusion.tasks.scores import WINDOW, combine
from medfusion.volume import Volume

IMAGES = {  # how files end, and what of a Detection they hold
    "mask": "mask",
    "anomaly": "anomaly",
    "residual": "residual",
    "reconstruction": "reconstruction",
    "pvalue": "p_value",
}
SIGNED = 1.0  # mean standardised residual of a region below which it is neither brighter nor darker


@dataclass(frozen=True, eq=False)
class Detection:
    """Volumes on the input's grid, and what was found, the least likely to be healthy first.

    Attributes
    ----------
    anomaly : in standard deviations of healthy scans, 0 or above, higher is more anomalous; 0 where nothing is scored.
    signed : the same, below 0 where the scan is darker than expected.
    residual : the scan, as the prior sees it (at its resolution, clipped to SEEN), less the reconstruction, in the
        scan's units.
    reconstruction : in the scan's units.
    p_value : the share of healthy voxels with a score as high; 1 where nothing is scored.
    regions : 0, or the number of the finding there; ``mask`` is 1 in all of them.
    threshold : the lowest anomaly in the mask; where that is empty, what one in a thousand healthy voxels reaches.
    scored : bool (i, j, k), where there is a score at all.
    scan_p : of the heaviest region: the share of healthy scans, this one counted, that have one as heavy.
    unlikeness : by feature, where the healthy scan farthest from their median lies at 1.
    """

    anomaly: Volume
    signed: Volume
    residual: Volume
    reconstruction: Volume
    p_value: Volume
    regions: Volume
    scored: NDArray[np.bool_]
    findings: list[Finding]
    threshold: float
    scan_p: float
    unlikeness: dict[str, float]

    @property
    def mask(self) -> Volume:
        """1 where a finding is."""
        return self.regions.with_array((self.regions.array > 0).astype(np.uint8))

    @property
    def flag(self) -> str:
        """By which features the scan is unlike the healthy ones, so that p-values may not hold; or ""."""
        apart = [f"{name} ({value:.1f})" for name, value in self.unlikeness.items() if value > DIFFERENT]
        return f"unlike the healthy reference in {', '.join(apart)}: p-values may not hold" if apart else ""


Page = Callable[[Path, Volume, Detection], None]
"""(path, scan, what was found) -> writes the review page there."""


def detect_volume(
    volume: Volume,
    prior: Prior,
    *,
    method: str = "default",
    fdr: float = 0.05,
    min_ml: float = 0.1,
    unlike: bool = False,
    seed: int = 0,
) -> Detection:
    """Rebuild a scan and map where it differs by more than healthy scans do.

    Parameters
    ----------
    method : of ``medfusion.tasks.rebuild.METHODS``, for which the prior has a healthy reference.
    fdr : expected share of false ones among the voxels of the mask. ``min_ml`` drops smaller regions of it.
    unlike : whether to score a scan that is not of the reference's kind; its p-values do not hold.
    seed : with the case name it fixes the noise.

    Raises
    ------
    MedfusionError : the prior has no reference for the method, or is for another modality; the scan is unlike the
        healthy ones, constant, a slab, or cannot be registered.
    """
    scored = score_scan(volume, prior, method, unlike=unlike, seed=seed)
    reference, work, inside = scored.reference, scored.seen.volume, scored.inside

    # Error rates are those of the prior's grid, on which the reference was made: interpolation lowers peaks.
    p = reference.p_values(scored.score[inside])
    passed = scored.score[inside][p <= false_discovery(p, fdr)]
    lowest = float(passed.min()) if passed.size else math.inf
    clusters, weights = weigh(scored.score, inside, reference.height, work.voxel_ml)

    there = onto_grid(work.with_array(inside), volume) > 0.5
    score, leaning = (onto_grid(work.with_array(array), volume) for array in (scored.score, scored.leaning))
    anomaly = volume.with_array(np.where(there, score, np.float32(0)))
    reach = 2 * WINDOW * prior.config.preprocessing.spacing
    mask = there & (anomaly.array >= lowest) & within_outline(anomaly, reach)
    weight_of = np.concatenate([[0.0], weights]).astype(np.float32)
    weight = weight_of[nearest(work.with_array(clusters), volume)]
    regions, findings = find_regions(anomaly, leaning, mask, weight, reference, min_ml)
    p_value = np.ones(volume.shape, np.float32)
    p_value[there] = reference.p_values(anomaly.array[there])
    as_seen, rebuilt = (scored.seen.in_scan_units(array, volume) for array in (work.array, scored.rebuilt))
    return Detection(
        anomaly=anomaly,
        signed=volume.with_array(np.copysign(anomaly.array, leaning)),
        residual=volume.with_array(as_seen - rebuilt),
        reconstruction=volume.with_array(rebuilt),
        p_value=volume.with_array(p_value),
        regions=volume.with_array(regions),
        scored=there,
        findings=findings,
        threshold=float(anomaly.array[regions > 0].min()) if findings else reference.height,
        scan_p=reference.region_p(weights.max(initial=0.0)),
        unlikeness=scored.unlikeness,
    )


@dataclass(frozen=True, eq=False)
class Scored:
    """What a method leaves on one scan, by the standards of its healthy reference, at the prior's spacing.

    Attributes
    ----------
    seen : the scan without its bias field.
    inside : bool (d, h, w), where there is a score at all.
    rebuilt, score, leaning : (d, h, w), in a box around ``inside`` that was rebuilt, the score, 0 or above, and the
        standardised residual; beyond it the scan as it is, 0 and 0.
    unlikeness : as of ``Reference.unlikeness``.
    """

    reference: Reference
    seen: Seen
    inside: NDArray[np.bool_]
    rebuilt: NDArray[np.float32]
    score: NDArray[np.float32]
    leaning: NDArray[np.float32]
    unlikeness: dict[str, float]


def score_scan(volume: Volume, prior: Prior, method: str, *, unlike: bool, seed: int) -> Scored:
    """Register a scan to the healthy, take its bias field out, rebuild it and compare; as ``detect_volume``."""
    uneven = seen_by(prior, volume)
    reference = pick_reference(prior, method, tissue_ml(uneven))
    atlas = reference.mean_scan
    healthy = Healthy(atlas, reference.spread, reference.inside)
    matrix = placed(uneven.volume, atlas, reference.inside)
    seen = without_bias(uneven, matrix, healthy)
    here = healthy_at(seen.volume, matrix, healthy)
    apart = reference.unlikeness(features(seen.volume, here, matrix))
    if max(apart.values()) > ANOTHER and not unlike:
        worst = max(apart, key=lambda name: apart[name])
        raise MedfusionError(
            f"{volume.name}: unlike the healthy scans of the reference, so no error rate can be stated",
            **{worst: f"{apart[worst]:.1f} times as far from their median as the farthest of them"},
            fix="calibrate the prior on healthy scans of this kind, or take --unlike for scores without error rates",
        )
    found = examine(seen, here, prior, method, stripped=reference.stripped, seed=seed)
    part = in_box(seen.volume, found.box)
    mean, sd = (np.stack([on_scan(c, atlas, matrix, part) for c in both]) for both in (reference.mean, reference.sd))
    z = standardise(found.raw, found.rebuilt, mean, sd, reference.tissue)
    score = combine(z, METHODS[method].score)

    def whole(part: NDArray[np.float32], beyond: NDArray[np.float32]) -> NDArray[np.float32]:
        filled = beyond.copy()
        filled[found.box] = part
        return filled

    nothing = np.zeros_like(seen.volume.array)
    rebuilt = whole(found.rebuilt, seen.volume.array)
    return Scored(reference, seen, here.inside, rebuilt, whole(score, nothing), whole(z[0], nothing), apart)


def within_outline(anomaly: Volume, reach: float) -> NDArray[np.bool_]:
    """(i, j, k): where the anomaly is at least half of its highest value in a box of ``reach`` mm to each side.

    Scores are those of a Gaussian window, which carries them beyond a lesion; at the border of one that is wider than
    the window they are half of what they are within.
    """
    size = [2 * round(reach / s) + 1 for s in anomaly.spacing]
    return anomaly.array >= ndimage.maximum_filter(anomaly.array, size) / 2


def pick_reference(prior: Prior, method: str, tissue: float) -> Reference:
    """The reference for a method whose scans have most nearly so much tissue, in ml: whole heads, or brains.

    Raises
    ------
    MedfusionError : there is no such method, or no reference for it.
    """
    if method not in METHODS:
        raise MedfusionError(f"{method}: no method of detection", methods=", ".join(METHODS))
    fitting = [reference for reference in prior.references if reference.method == method]
    if not fitting:
        raise MedfusionError(
            f"{prior.name}: no healthy reference for the method {method!r}, so no error rate can be stated",
            calibrated=", ".join(sorted({reference.method for reference in prior.references})) or "for no method",
            fix=f"medfusion calibrate {prior.name} HEALTHY_SCANS --out NEW.safetensors --method {method}",
        )
    return min(fitting, key=lambda reference: abs(math.log(reference.tissue_ml / tissue)))


def find_regions(
    anomaly: Volume,
    leaning: NDArray[np.float32],
    mask: NDArray[np.bool_],
    weight: NDArray[np.float32],
    reference: Reference,
    min_ml: float,
) -> tuple[NDArray[np.int32], list[Finding]]:
    """Numbered regions (i, j, k) of a mask that are large enough, and the findings.

    The direction is that of the mean of ``leaning``, the standardised residual. p is that of the heaviest cluster that
    a finding touches, of which ``weight`` has the weight at each voxel; 1 where it touches none.
    """
    labels, _ = ndimage.label(mask, structure=NEIGHBOURS)
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        region = labels[box] == index
        volume_ml = float(region.sum()) * anomaly.voxel_ml
        if volume_ml < min_ml:
            continue
        values = np.where(region, anomaly.array[box], 0)
        peak = np.unravel_index(values.argmax(), values.shape)
        i, j, k = (int(s.start + p) for s, p in zip(box, peak, strict=True))
        x, y, z = (round(float(c), 1) for c in anomaly.to_world((i, j, k)))
        mean = float(leaning[box][region].mean())
        direction = "changed" if abs(mean) < SIGNED else "brighter" if mean > 0 else "darker"
        p = reference.region_p(float(weight[box][region].max()))
        sizes = round(volume_ml, 3), round(float(values.max()), 2), round(float(values[region].mean()), 2)
        found.append((index, Finding(0, x, y, z, i, j, k, *sizes, direction, round(p, 4))))
    found.sort(key=lambda pair: (pair[1].p, -pair[1].peak))
    numbers = np.zeros(labels.max() + 1, np.int32)
    numbers[[index for index, _ in found]] = np.arange(1, len(found) + 1)
    return numbers[labels], [replace(f, number=n) for n, (_, f) in enumerate(found, start=1)]


def summary(detection: Detection) -> str:
    """One line about a scan."""
    likely = sum(finding.p <= 0.05 for finding in detection.findings)
    text = f"{len(detection.findings)} finding(s), {likely} of them with p up to 0.05; p of the heaviest region: "
    return text + f"{detection.scan_p:.3g}" + (f"; {detection.flag}" if detection.flag else "")


def detect(
    input: Path,
    output: Path,
    *,
    prior: str = "brain-t1",
    method: str = "default",
    fdr: float = 0.05,
    min_ml: float = 0.1,
    unlike: bool = False,
    images: str = "*.nii.gz",
    labels: str = "",
    label_names: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    volume: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    page: Page | None = None,
) -> Run:
    """Map anomalies of every scan under ``input``.

    For each case, ``output`` receives ``CASE_anomaly``, ``CASE_residual``, ``CASE_reconstruction``, ``CASE_pvalue`` and
    ``CASE_mask`` as ``.nii.gz`` on the input's grid, ``CASE_findings.csv``, and ``CASE_findings.json``, which has what
    is said of the whole scan too. Of a DICOM series also the folder ``CASE_dicom`` (``write_dicom_results``), unless
    the series lacks what references need: then the message says so. Where label maps are asked for, only scans that
    ``images`` names are taken.

    Parameters
    ----------
    method, fdr, min_ml, unlike, seed : as in ``detect_volume``.
    images, labels : patterns of file names, "*_T1.nii.gz" and "*_labels.nii.gz": the label map that lies beside a scan
        and names the places of findings, by ``label_names`` (``read_label_names``) or by number. Without: none.
    page : writes ``CASE_review.html``, whose path it is given, of the scan and the detection.

    Raises
    ------
    MedfusionError : before any work, also where the prior has no reference for the method.
    """
    require_folder(output)
    if not (0 < fdr < 1 and min_ml >= 0):
        raise MedfusionError(f"false discovery rate {fdr}, min_ml {min_ml}: between 0 and 1, and 0 or above")
    if label_names is not None and not labels:
        raise MedfusionError("names of labels without label maps", fix="say how they are called: --labels")
    check_patterns(images, labels=labels)
    options: dict[str, Any] = {"method": method, "fdr": fdr, "min_ml": min_ml, "unlike": unlike, "seed": seed}
    told = {"images": images, "labels": labels, "label_names": label_names and str(label_names)}
    settings = Settings("detect", input, output, prior, device, options | told, volume, overwrite, resume)
    replaced, names = overwrite or resume, read_label_names(label_names) if label_names else {}

    pick_reference(Prior.load(prior), method, tissue=1.0)
    found = scans_called(input, images, labels) if labels else discover(input)
    unreferable = {s.name: why_unreferable(s) for s in found if s.kind == "dicom"}

    def targets(series: Series) -> dict[str, Path]:
        return case_files(output, series.name, page is not None, unreferable.get(series.name) == "")

    def work(series: Series, loaded: Prior) -> str:
        scan = read(series, volume)
        regions = read_beside(companion(series, images, labels, "labels"), scan, "labels") if labels else None
        result = detect_volume(scan, loaded, **options)
        if regions is not None:
            result = replace(result, findings=name_findings(result.findings, regions, names))
        write_case(targets(series), scan, result, facts(result, loaded, method), page, overwrite=replaced)
        problem = unreferable.get(series.name)
        return summary(result) + caution(scan, loaded) + (f"; no DICOM results: {problem}" if problem else "")

    def beside(series: Series) -> tuple[tuple[Path, ...], tuple[str, ...]]:
        """Files that decide the names of places, or why they cannot be told: that stops this scan alone."""
        if not labels:
            return (), ()
        try:
            return (companion(series, images, labels, "labels"), *([label_names] if label_names else ())), ()
        except MedfusionError as error:
            return (), (error.what,)

    jobs = []
    for series in found:
        files, missing = beside(series)
        problems = series.problems + missing
        written = list(targets(series).values())
        jobs.append(Job(series.name, series.files + files, written, partial(work, series), problems))
    return run_jobs(settings, jobs)


def case_files(output: Path, name: str, page: bool, dicom: bool) -> dict[str, Path]:
    """What is written of a case, and where; the review page and DICOM results where they are asked for."""
    endings = {kind: f"{kind}.nii.gz" for kind in IMAGES} | {"findings": "findings.csv", "summary": "findings.json"}
    endings |= {"page": "review.html"} if page else {}
    endings |= {"dicom": "dicom"} if dicom else {}
    return {kind: output / f"{name}_{ending}" for kind, ending in endings.items()}


def write_case(
    files: dict[str, Path],
    scan: Volume,
    found: Detection,
    about: dict[str, object],
    page: Page | None,
    *,
    overwrite: bool,
) -> None:
    """Write the results of a scan to ``files``, as of ``case_files``; ``about`` it as of ``facts``."""
    for kind, part in IMAGES.items():
        write_nifti(getattr(found, part), files[kind], overwrite=overwrite)
    write_findings(files["findings"], found.findings, overwrite=overwrite)
    write_summary(files["summary"], scan.name, found.findings, about, overwrite=overwrite)
    if page is not None:
        page(files["page"], scan, found)
    if "dicom" in files:
        write_dicom_results(
            files["dicom"],
            scan,
            regions=found.regions.array,
            findings=found.findings,
            anomaly=found.anomaly.array,
            threshold=found.threshold,
            overwrite=overwrite,
        )


def facts(found: Detection, prior: Prior, method: str) -> dict[str, object]:
    """What is said of the whole scan, for its summary and the review page."""
    return {
        "scan_p": found.scan_p,
        "threshold": found.threshold,
        "flag": found.flag,
        "unlikeness": {name: round(value, 2) for name, value in found.unlikeness.items()},
        "prior": prior.name,
        "method": method,
    }
