"""Evaluate detection on scans with true lesions: every method on every scan, simple baselines always among them.

Nothing is fitted to the scans that are evaluated: masks are those that `medfusion detect` writes, by error rates from
the healthy reference. What is measured is in ``medfusion.tasks.measure_detection``.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfusion.errors import MedfusionError, some
from medfusion.io import Series, read, staged
from medfusion.io.companions import check_patterns, companion, read_beside, scans_called
from medfusion.metrics.detection import auroc, average_precision
from medfusion.prior import Prior
from medfusion.tasks.detect import detect_volume
from medfusion.tasks.measure_detection import CaseResult, Estimate, Summary, dice, measure_case, summarise, whole
from medfusion.tasks.rebuild import METHODS
from medfusion.tasks.runner import Job, Run, Settings, pick_device, require_folder, run_jobs
from medfusion.volume import Volume

BASELINES = ("intensity", "blur", "autoencoder")  # beside every method, where the prior has their reference
LESION_COLUMNS = ("case", "method", "lesion", "ml", "found", "score")
OUTPUTS = ("cases.csv", "lesions.csv", "summary.json")


def pick_methods(prior: Prior, asked: Sequence[str] = ()) -> list[str]:
    """The methods asked for and the baselines beside them; of all, those for which the prior has a reference.

    Raises
    ------
    MedfusionError : there is no reference for one that was asked for, or for any.
    """
    known = [method for method in METHODS if any(reference.method == method for reference in prior.references)]
    missing = [method for method in asked if method not in known]
    if missing or not known:
        raise MedfusionError(
            f"{prior.name}: no healthy reference for {', '.join(missing) or 'any method'}",
            calibrated=", ".join(known) or "no method",
            methods=", ".join(METHODS),
            fix=f"medfusion calibrate {prior.name} HEALTHY_SCANS --out NEW.safetensors --method NAME",
        )
    beside = [method for method in BASELINES if method in known]
    return list(dict.fromkeys([*asked, *beside] if asked else known))


def read_patients(path: Path, cases: Sequence[str]) -> dict[str, str]:
    """The patient of each case, from a table with the columns case and patient.

    Raises
    ------
    MedfusionError : the table cannot be read, lacks a column or a case, or names two patients for one.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins its UTF-8 with a mark
            table = csv.DictReader(file)
            columns, rows = table.fieldnames or (), list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MedfusionError(f"{path}: cannot be read", reason=error) from error
    if not {"case", "patient"} <= set(columns):
        raise MedfusionError(
            f"{path}: lacks a column", columns=", ".join(columns), fix="the first line is: case,patient"
        )
    stated = {(row["case"], row["patient"]) for row in rows if row["patient"]}
    patients = dict(stated)
    without = [case for case in cases if case not in patients]
    twice = sorted({case for case, patient in stated if patients[case] != patient})
    if without or twice:
        facts = {"cases_without_a_patient": some(without), "cases_of_two_patients": some(twice)}
        raise MedfusionError(
            f"{path}: does not fit the scans",
            **{name: value for name, value in facts.items() if value},
            fix="one row for each scan, named as `medfusion inspect` does",
        )
    return {case: patients[case] for case in cases}


def evaluate_detection(
    input: Path,
    output: Path,
    *,
    truth: str,
    prior: str = "brain-t1",
    methods: Sequence[str] = (),
    images: str = "*.nii.gz",
    masks: str = "",
    healthy_without_truth: bool = False,
    patients: Path | None = None,
    fdr: float = 0.05,
    min_ml: float = 0.1,
    unlike: bool = False,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
) -> tuple[Run, Summary | None]:
    """Detect in every scan under ``input`` with every method, and compare with the true lesions beside it.

    ``output`` receives ``cases.csv``, a row for each case and method, ``lesions.csv``, a row for each lesion and
    method, and ``summary.json``. A scan that fails with one method is left out for all. There is no summary where all
    fail, or when the run was interrupted.

    Parameters
    ----------
    truth : how the true lesions beside a scan are called, 0 outside them: "*_lesions.nii.gz"; ``images`` names the
        scans: "*_T1.nii.gz". A file that is all 0 is a healthy scan's.
    methods : as ``pick_methods`` takes them; the first one is compared with the others.
    masks : how the masks are called within which voxels and regions count; without, they count in the whole scan.
    healthy_without_truth : a scan without such a file is healthy, and no mistake.
    patients : table of the patient of each case (``read_patients``); without, each case is a patient.
    fdr, min_ml, unlike, seed : as in ``detect_volume``.

    Raises
    ------
    MedfusionError : before any work. All scans that cannot be used are named at once: without truth or mask, on other
        grids than these, with lesions outside the mask. Or a method cannot be used, a table does not fit, there are
        results already.
    """
    require_folder(output)
    there = [output / name for name in OUTPUTS if (output / name).exists()]
    if there and not overwrite:
        raise MedfusionError(f"{there[0]}: exists already", fix="--overwrite, or another folder")
    if not (0 < fdr < 1 and min_ml >= 0):
        raise MedfusionError(f"false discovery rate {fdr}, min_ml {min_ml}: between 0 and 1, and 0 or above")
    check_patterns(images, truth=truth, masks=masks)
    found = scans_called(input, images, truth, masks)
    names: dict[str, Any] = {
        "images": images,
        "truth": truth,
        "masks": masks,
        "healthy_without_truth": healthy_without_truth,
    }
    check_cases(found, names)
    patient_of = read_patients(patients, [s.name for s in found]) if patients else {s.name: s.name for s in found}
    chosen = pick_methods(Prior.load(prior, pick_device(device)), methods)

    options: dict[str, Any] = {"fdr": fdr, "min_ml": min_ml, "unlike": unlike, "seed": seed}
    told = names | {"methods": chosen, "patients": patients and str(patients)}
    settings = Settings("evaluate detect", input, output, prior, device, options | told, None, overwrite, False)
    results: list[CaseResult] = []

    def work(series: Series, loaded: Prior) -> str:
        scan, lesions, inside = load_case(series, **names)
        done = []
        for method in chosen:
            began = time.perf_counter()
            detection = detect_volume(scan, loaded, method=method, **options)
            took = time.perf_counter() - began
            done.append(
                measure_case(
                    detection, lesions, method=method, patient=patient_of[series.name], inside=inside, seconds=took
                )
            )
        results.extend(done)
        number = len(done[0].voxels)
        each = ", ".join(f"{result.method} {result.found.sum()} + {result.false_findings}" for result in done)
        return f"{number} lesion(s); found + false: {each}" if number else f"healthy; found + false: {each}"

    run = run_jobs(settings, [Job(s.name, s.files, [], partial(work, s)) for s in found])
    if run.interrupted or not results:
        return run, None
    results.sort(key=lambda result: chosen.index(result.method))
    summary = summarise(results)
    write_results(output, results, summary)
    return run, summary


def check_cases(found: Sequence[Series], names: Mapping[str, Any]) -> None:
    """Read every case once, by ``names`` as of ``load_case``.

    Raises
    ------
    MedfusionError : some cannot be used; all of them are named.
    """
    problems: dict[str, object] = {}
    for series in found:
        try:
            load_case(series, **names)
        except MedfusionError as error:
            problems[series.files[0].name] = "; ".join([error.what, *map(str, error.facts.values())])
    if problems:
        raise MedfusionError(
            f"{len(problems)} of {len(found)} scan(s) cannot be evaluated",
            **problems,
            fix="mend them or name the scans by --images; --healthy-without-truth where no truth means healthy",
        )


def load_case(
    series: Series, *, images: str, truth: str, masks: str, healthy_without_truth: bool
) -> tuple[Volume, NDArray[np.bool_], NDArray[np.bool_] | None]:
    """A scan, its true lesions and the mask in which it counts, or None, by the names of files.

    Raises
    ------
    MedfusionError : a file is missing, cannot be read, or lies on another grid; all lesions are outside the mask.
    """
    scan = read(series)
    lesions = np.zeros(scan.shape, bool)
    if not healthy_without_truth or _is_there(series, images, truth):
        lesions = read_beside(companion(series, images, truth, "truth"), scan, "truth").array > 0
    inside = read_beside(companion(series, images, masks, "mask"), scan, "mask").array > 0 if masks else None
    if inside is not None and not inside.any():
        raise MedfusionError(f"{series.name}: the mask is empty")
    if inside is not None and lesions.any() and not (lesions & inside).any():
        raise MedfusionError(f"{series.name}: all lesions are outside the mask")
    return scan, lesions, inside


def _is_there(series: Series, images: str, pattern: str) -> bool:
    try:
        companion(series, images, pattern, "truth")
    except MedfusionError:
        return False
    return True


def write_results(output: Path, results: Sequence[CaseResult], summary: Summary) -> None:
    """``OUTPUTS`` in a folder, all or none of them; what is there is replaced."""
    with (
        staged(output / OUTPUTS[0], overwrite=True) as cases,
        staged(output / OUTPUTS[1], overwrite=True) as lesions,
        staged(output / OUTPUTS[2], overwrite=True) as whole_,
    ):
        _write_table(cases, [_case_row(result) for result in results])
        _write_table(lesions, [row for result in results for row in _lesion_rows(result)], LESION_COLUMNS)
        whole_.write_text(json.dumps(_plain(summary), indent=2) + "\n")


def _case_row(result: CaseResult) -> dict[str, object]:
    voxels = whole(result.counts)
    numbers = {"auprc": average_precision(voxels), "auroc": auroc(voxels), "dice": dice(result.overlap[None])[0]}
    return {
        "case": result.case,
        "patient": result.patient,
        "method": result.method,
        **{name: _digits(float(value)) for name, value in numbers.items()},
        "scan_p": _digits(result.scan_p),
        "heaviest": _digits(result.heaviest),
        "lesions": len(result.voxels),
        "lesion_ml": _digits(float(result.lesion_ml.sum())),
        "found": int(result.found.sum()),
        "findings": result.findings,
        "false_findings": result.false_findings,
        "seconds": round(result.seconds, 2),
    }


def _lesion_rows(result: CaseResult) -> list[dict[str, object]]:
    each = zip(result.lesion_ml, result.found, result.scores, strict=True)
    return [
        dict(zip(LESION_COLUMNS, (result.case, result.method, k, _digits(ml), int(found), _digits(score)), strict=True))
        for k, (ml, found, score) in enumerate(each, start=1)
    ]


def _digits(value: float) -> str:
    """Six of them; "" for what there is not."""
    return f"{value:.6g}" if math.isfinite(value) else ""


def _write_table(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] = ()) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _plain(summary: Summary) -> dict[str, object]:
    """For JSON: estimates as objects, null for nan."""

    def numbers(estimates: Mapping[str, Estimate]) -> dict[str, object]:
        return {
            name: {part: None if math.isnan(value) else value for part, value in one._asdict().items()}
            for name, one in estimates.items()
        }

    facts = {name: getattr(summary, name) for name in ("scans", "patients", "ill", "lesions", "prevalence")}
    measures = {method: numbers(each) for method, each in summary.measures.items()}
    return facts | {"measures": measures, "auprc_ratios": numbers(summary.ratios)}
