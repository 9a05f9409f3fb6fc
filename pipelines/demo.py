"""All commands once on sample_data/ with the shipped prior, measured against the truth, in one report.

make demo        (or: python pipelines/demo.py; writes to demo/)
"""

import csv
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy import ndimage

from medfusion.cli.augment import augment_and_report, show_audit
from medfusion.cli.detect import detect_scans
from medfusion.cli.inspect import inspect
from medfusion.cli.show import show_run
from medfusion.data.grid import canonical, from_canonical
from medfusion.io import discover, read
from medfusion.io.companions import read_labels
from medfusion.io.training_set import TrainingCase, read_scan, read_training_set
from medfusion.metrics import dice, psnr
from medfusion.report import Figure, Section, Table, comparison_figure, run_section, slice_figure, write_report
from medfusion.report.augment import audit_rows
from medfusion.report.figures import pairs_figure
from medfusion.tasks.audit_synthetic import Audit
from medfusion.tasks.augment import Request
from medfusion.tasks.denoise import denoise
from medfusion.tasks.runner import Run
from medfusion.volume import Volume

ROOT = Path(__file__).parent.parent
SAMPLES, OUT = ROOT / "sample_data", ROOT / "demo"


def load(path: Path) -> Volume:
    """The one scan at a path."""
    return read(discover(path)[0])


def found_section() -> Section:
    """What inspect says, for the report."""
    rows = [(s.name, s.kind, s.modality, " x ".join(map(str, s.shape)), len(s.files)) for s in discover(SAMPLES)]
    text = "A procedural T1-weighted head made from the ICBM 152 tissue maps; sample_data/README.md says how."
    return Section("What was found", [text, Table(("Scan", "Format", "Modality", "Shape", "Files"), rows)])


def denoise_section(nifti: Run, dicom: Run) -> Section:
    """PSNR against the clean head, and a picture."""
    clean, noisy = load(SAMPLES / "head_clean.nii.gz"), load(SAMPLES / "noisy")
    brain = load(SAMPLES / "head_brain_mask.nii.gz").array
    peak = json.loads((SAMPLES / "truth.json").read_text())["percentile_99_of_head_clean"]
    results = {"noisy": noisy, "denoised": load(OUT / "denoised"), "denoised DICOM": load(OUT / "denoised_dicom")}
    rows = []
    for name, volume in results.items():  # the DICOM series is sagittal: the same voxels in another order
        same_order = from_canonical(canonical(volume).array, clean)
        rows.append((name, psnr(clean.array, same_order, brain, peak)))
        print(f"PSNR in the brain, {name}: {rows[-1][1]:.2f} dB")
    picture = comparison_figure(
        {"noisy": noisy, "denoised": results["denoised"], "truth": clean}, difference=("noisy", "denoised")
    )
    text = f"NIfTI: {nifti.cases[0].message}. DICOM series: {dicom.cases[0].message}."
    caption = "Noisy, denoised and clean head, and what was removed."
    table = Table(("Volume", "PSNR in the brain, dB"), rows)
    return Section("Denoise", [text, table, keep("denoise", picture, caption)])


def detect_section() -> Section:
    """Overlap with the planted lesions, which of them were found, and pictures."""
    scan, truth = load(SAMPLES / "lesions"), load(SAMPLES / "lesions_truth")
    anomaly, mask, rebuilt, p_value = (
        load(OUT / f"detected/head_lesions_{kind}.nii.gz") for kind in ("anomaly", "mask", "reconstruction", "pvalue")
    )
    common = float(anomaly.array[p_value.array > 1e-3].max())  # what one in a thousand healthy voxels reaches
    overlap = dice(truth.array, mask.array)
    print(f"Dice of the mask with the planted lesions: {overlap:.3f}")
    with (OUT / "detected/head_lesions_findings.csv").open() as file:
        findings = list(csv.DictReader(file))
    columns = ("number", "x", "y", "z", "volume_ml", "peak", "direction", "p")
    heat = slice_figure(
        scan, overlay=anomaly.array, threshold=common, overlay_label="standard deviations", mask=truth.array
    )
    sides = comparison_figure(
        {"scan": scan, "reconstruction": rebuilt}, difference=("scan", "reconstruction"), mask=truth.array
    )
    return Section(
        "Detect",
        [
            f"Dice of the mask with the planted lesions: {overlap:.3f}; {len(findings)} finding(s). "
            "detected/head_lesions_review.html is the page to review them on. The sample head is made by a procedure, "
            "its skull drawn: it is flagged as unlike the healthy, and much of it stands out.",
            Table(
                ("Planted lesion", "Volume, ml", "Peak of the heatmap, SD", "Found"), lesion_rows(anomaly, mask, truth)
            ),
            keep("detect", heat, "Heatmap over the scan; the planted lesions are outlined."),
            keep("reconstruction", sides, "Scan, what the prior makes of it, and their difference."),
            Table(
                columns,
                [[f[c] for c in columns] for f in findings[:15]],
                "The findings, least likely in a healthy scan first (15 at most).",
            ),
        ],
    )


def lesion_rows(anomaly: Volume, mask: Volume, truth: Volume) -> list[tuple[object, ...]]:
    """Kind, volume, highest heat and whether the mask touches it, for each planted lesion."""
    regions, _ = ndimage.label(truth.array)
    rows = []
    for lesion in json.loads((SAMPLES / "truth.json").read_text())["lesions"]:
        distance = np.linalg.norm(truth.to_world(np.argwhere(regions)) - lesion["centre_mm"], axis=1)
        region = regions == regions[tuple(np.argwhere(regions)[distance.argmin()])]
        found = "yes" if mask.array[region].any() else "no"
        rows.append((lesion["kind"], lesion["volume_ml"], float(anomaly.array[region].max()), found))
    return rows


def augment_section(audit: Audit) -> Section:
    """The new pairs beside real ones, and the audit."""
    real, kept = read_training_set(SAMPLES / "hippocampi").labelled, read_training_set(OUT / "augmented").labelled
    made = [case for case in kept if case.name in audit.cases]
    pairs = [(f"{kind} {k}", case) for kind, cases in (("sample", real), ("new", made)) for k, case in shown(cases)]
    scans = [(title, read_scan(case)) for title, case in pairs]
    labels = [read_labels(case.labels, scan).array for (_, case), (_, scan) in zip(pairs, scans, strict=True)]
    picture = pairs_figure([(title, scan, map_) for (title, scan), map_ in zip(scans, labels, strict=True)])
    text = (
        f"{len(audit.cases)} new pairs for a training set of {len(real)}, {len(audit.dropped)} of them dropped by the "
        "audit; augmented/report.html has it all. The sample scans are drawn by the same prior for label maps made of "
        "a few numbers (sample_data/README.md), so this shows the command, and not what it is worth on real scans."
    )
    caption = "Pairs of the sample set and new ones, and below each its label map."
    table = Table(("Measure", "Synthetic", "Sample"), audit_rows(audit))
    return Section("Augment", [text, keep("augment", picture, caption), table])


def shown(cases: Sequence[TrainingCase]) -> Iterable[tuple[int, TrainingCase]]:
    """The first six, numbered."""
    return enumerate(cases[:6], 1)


def keep(name: str, png: bytes, caption: str) -> Figure:
    """The figure for the report; a copy lies in figures/ (the README's are from there)."""
    path = OUT / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)
    return Figure(png, caption, caption)


def main() -> None:
    """Run the demo."""
    began = time.monotonic()
    inspect(SAMPLES, as_json=False)
    runs = {}
    runs["denoised"] = denoise(SAMPLES / "noisy", OUT / "denoised", overwrite=True)
    runs["denoised_dicom"] = denoise(SAMPLES / "noisy_dicom", OUT / "denoised_dicom", overwrite=True)
    runs["detected"] = detect_scans(
        SAMPLES / "lesions", OUT / "detected", prior="brain-t1", method="default", overwrite=True, resume=False
    )
    shutil.rmtree(OUT / "augmented", ignore_errors=True)  # cases of an earlier demo would stay in the dataset
    request = Request(
        8, strength=0.95
    )  # the samples have nothing in common but their layout (sample_data/make_hippocampi.py)
    runs["augmented"], audit = augment_and_report(
        SAMPLES / "hippocampi", OUT / "augmented", request, prior="hippocampus", audit_steps=300
    )
    show_audit(audit)
    failed = sum(show_run(run, OUT / folder) for folder, run in runs.items())
    if failed:
        raise SystemExit(1)
    sections = [
        found_section(),
        denoise_section(runs["denoised"], runs["denoised_dicom"]),
        detect_section(),
        augment_section(audit),
        *(run_section(asdict(run), f"Run: {run.command} ({folder})") for folder, run in runs.items()),
    ]
    report = OUT / "report.html"
    write_report(report, "medfusion on its sample data", sections)
    print(f"Done in {time.monotonic() - began:.0f} s. Report: {report}")


if __name__ == "__main__":
    main()
