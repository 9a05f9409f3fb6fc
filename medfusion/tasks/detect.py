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
from medfusion.data.registration import register
from medfusion.errors import MedfusionError
from medfusion.io import Series, discover, read, write_nifti
from medfusion.io.companions import check_patterns, companion, read_beside, scans_called
from medfusion.io.dicom_result import why_unreferable, write_dicom_results
from medfusion.io.findings import Finding, name_findings, read_label_names, write_findings, write_summary
from medfusion.prior import Prior
from medfusion.reference import ANOTHER, DIFFERENT, NEIGHBOURS, Reference, false_discovery, standardise, weigh
from medfusion.tasks.checks import caution
from medfusion.tasks.place import features, healthy_at, in_box, on_scan, seen_by, tissue_ml
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
    seen = seen_by(prior, volume)
    reference = pick_reference(prior, method, tissue_ml(seen))
    work, atlas = seen.volume, reference.mean_scan
    matrix = register(work, atlas)
    here = healthy_at(work, matrix, atlas, reference.spread, reference.inside)
    apart = reference.unlikeness(features(work, here, matrix))
    if max(apart.values()) > ANOTHER and not unlike:
        worst = max(apart, key=lambda name: apart[name])
        raise MedfusionError(
            f"{volume.name}: unlike the healthy scans of the reference, so no error rate can be stated",
            **{worst: f"{apart[worst]:.1f} times as far from their median as the farthest of them"},
            fix="calibrate the prior on healthy scans of this kind, or take --unlike for scores without error rates",
        )
    found = examine(seen, here, prior, method, stripped=reference.stripped, seed=seed)
    box = in_box(work, found.box)
    mean, sd = (np.stack([on_scan(c, atlas, matrix, box) for c in both]) for both in (reference.mean, reference.sd))
    z = standardise(found.raw, found.rebuilt, mean, sd, reference.tissue)
    score, inside = combine(z, METHODS[method].score), here.inside[found.box]

    # Error rates are those of the prior's grid, on which the reference was made: interpolation lowers peaks.
    p = reference.p_values(score[inside])
    passed = score[inside][p <= false_discovery(p, fdr)]
    lowest = float(passed.min()) if passed.size else math.inf
    clusters, weights = weigh(score, inside, reference.height, work.voxel_ml)

    def back(array: NDArray[np.float32], outside: NDArray[np.float32] | float = 0.0) -> NDArray[np.float32]:
        """An array in the box at the voxels of the input; beyond the box it is ``outside``."""
        whole = np.broadcast_to(np.float32(outside), work.shape).copy()
        whole[found.box] = array
        return onto_grid(work.with_array(whole), volume)

    scored = onto_grid(work.with_array(here.inside), volume) > 0.5
    anomaly, leaning = np.where(scored, back(score), np.float32(0)), back(z[0])
    reach = 2 * WINDOW * prior.config.preprocessing.spacing
    mask = scored & (anomaly >= lowest) & within_outline(volume.with_array(anomaly), reach)
    weight_there = np.concatenate([[0.0], weights]).astype(np.float32)[nearest(box.with_array(clusters), volume)]
    regions, findings = find_regions(volume.with_array(anomaly), leaning, mask, weight_there, reference, min_ml)
    p_value = np.ones(volume.shape, np.float32)
    p_value[scored] = reference.p_values(anomaly[scored])
    reconstruction = seen.scale.invert(back(found.rebuilt, work.array))
    residual = np.where(back(np.ones_like(score)) > 0.5, seen.scale.invert(onto_grid(work, volume)) - reconstruction, 0)
    return Detection(
        anomaly=volume.with_array(anomaly),
        signed=volume.with_array(np.copysign(anomaly, leaning)),
        residual=volume.with_array(residual.astype(np.float32)),
        reconstruction=volume.with_array(reconstruction),
        p_value=volume.with_array(p_value),
        regions=volume.with_array(regions),
        scored=scored,
        findings=findings,
        threshold=float(anomaly[regions > 0].min()) if findings else reference.height,
        scan_p=reference.region_p(weights.max(initial=0.0)),
        unlikeness=apart,
    )


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
    page: Callable[[Path, Volume, Detection], None] | None = None,
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

    def targets(series: Series) -> list[Path]:
        kinds = [f"{kind}.nii.gz" for kind in IMAGES]
        kinds += ["findings.csv", "findings.json"] + ["review.html"] * (page is not None)
        kinds += ["dicom"] * (unreferable.get(series.name) == "")
        return [output / f"{series.name}_{kind}" for kind in kinds]

    def work(series: Series, loaded: Prior) -> str:
        scan = read(series, volume)
        regions = read_beside(companion(series, images, labels, "labels"), scan, "labels") if labels else None
        result = detect_volume(scan, loaded, **options)
        if regions is not None:
            result = replace(result, findings=name_findings(result.findings, regions, names))
        *paths, table, about = targets(series)[: len(IMAGES) + 2]
        for image, path in zip(IMAGES.values(), paths, strict=True):
            write_nifti(getattr(result, image), path, overwrite=replaced)
        write_findings(table, result.findings, overwrite=replaced)
        write_summary(about, scan.name, result.findings, facts(result, loaded, method), overwrite=replaced)
        if page is not None:
            page(output / f"{series.name}_review.html", scan, result)
        problem = unreferable.get(series.name)
        if problem == "":
            write_dicom_results(
                output / f"{series.name}_dicom",
                scan,
                regions=result.regions.array,
                findings=result.findings,
                anomaly=result.anomaly.array,
                threshold=result.threshold,
                overwrite=replaced,
            )
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
        jobs.append(Job(series.name, series.files + files, targets(series), partial(work, series), problems))
    return run_jobs(settings, jobs)


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
