"""Detect: noise a scan part of the way, let the prior rebuild it several times, and see where the scan is unlike them.

The rebuilt volumes are samples of what healthy anatomy could look like given the coarse content of the scan. Their
mean is the reconstruction, their spread says where anatomy varies. The heatmap is the distance between scan and mean
in standard deviations, so that folded cortex, which no two heads share, does not outshine a lesion.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.data.crops import context_channels
from medfusion.data.grid import canonical, onto_grid, resampled
from medfusion.data.intensity import SEEN, centre_of, foreground, measure_scale
from medfusion.data.noise import estimate_noise
from medfusion.data.seeds import case_generator
from medfusion.diffusion import ddim, noise_like, time_steps
from medfusion.errors import MedfusionError
from medfusion.io import Series, read, staged, write_nifti
from medfusion.prior import Prior
from medfusion.tasks.checks import caution, check_scan
from medfusion.tasks.runner import Run, Settings, require_folder, run_jobs, scan_jobs
from medfusion.volume import Volume

SMOOTHING = 2.0  # voxels of the prior's grid: a lesion is a region; 1 lost a quarter of the precision
NOISE_LEFT = 1 / (8 * np.pi**1.5 * SMOOTHING**3)  # of the variance of white noise: the sum of the squared Gaussian
SMALLEST_SD = 0.01  # of air to bright tissue = 2: noiseless scans exist in software only
TISSUE_MARGIN = 2  # voxels eroded from the outline of the head, where a partial volume is no finding


@dataclass(frozen=True)
class Finding:
    """One connected region of the mask.

    ``x``, ``y``, ``z`` are world RAS millimetres of its peak, ``i``, ``j``, ``k`` the voxel there; ``peak`` and
    ``mean`` are in standard deviations; ``direction`` says whether the scan is "brighter" or "darker" than expected.
    """

    x: float
    y: float
    z: float
    i: int
    j: int
    k: int
    volume_ml: float
    peak: float
    mean: float
    direction: str


@dataclass(frozen=True)
class Detection:
    """Volumes on the input's grid, and the findings, largest peak first.

    ``anomaly`` is in standard deviations, 0 or above, higher is more anomalous; ``reconstruction`` is in the scan's
    units; ``mask`` is 1 where ``anomaly`` exceeds the threshold in a region large enough.
    """

    anomaly: Volume
    reconstruction: Volume
    mask: Volume
    findings: list[Finding]


def detect_volume(
    volume: Volume,
    prior: Prior,
    *,
    noise_time: float = 0.8,
    steps: int = 3,
    samples: int = 4,
    threshold: float = 2.5,
    min_ml: float = 0.5,
    seed: int = 0,
) -> Detection:
    """Reconstruct a scan with the prior and map where it differs.

    Parameters
    ----------
    noise_time : process time in (0, 1] to which the scan is noised: later forgets more of it.
    steps : evaluations of the prior on the way back, for each of ``samples`` reconstructions.
    threshold : of the heatmap, in standard deviations; 2.5 is exceeded by 0.1 % of the brain voxels of five healthy
        scans held out of the training of brain-t1. ``min_ml`` drops smaller regions of the mask.
    seed : with the case name it fixes the noise.

    Raises
    ------
    MedfusionError : as ``denoise_volume``.
    """
    check_scan(volume, prior)
    work = resampled(canonical(volume), prior.config.preprocessing.spacing)
    scale = measure_scale(work.array, prior.config.preprocessing.percentile, volume.name)
    image = scale.apply(work.array).clip(*SEEN)
    tissue = foreground(work.array)
    rebuilt = reconstruct(image, centre_of(tissue), prior, noise_time, steps, samples, seed=seed, name=volume.name)
    z = standardise(image, rebuilt, estimate_noise(image)) * _inside(tissue)
    signed = volume.with_array(onto_grid(work.with_array(z), volume))
    anomaly = np.abs(signed.array)
    mask, findings = find_regions(signed, threshold, min_ml)
    reconstruction = onto_grid(work.with_array(scale.invert(rebuilt.mean(axis=0))), volume)
    return Detection(volume.with_array(anomaly), volume.with_array(reconstruction), volume.with_array(mask), findings)


def reconstruct(
    image: NDArray[np.float32],
    centre: NDArray[np.float64],
    prior: Prior,
    noise_time: float,
    steps: int,
    samples: int,
    *,
    seed: int,
    name: str,
) -> NDArray[np.float32]:
    """(samples, d, h, w): the image noised to ``noise_time`` and brought back by DDIM, once for each draw of noise."""
    spacing = prior.config.preprocessing.spacing
    context = context_channels(image.shape, (0, 0, 0), centre, spacing, kind=0.0)[None]
    denoise = prior.denoiser(context)
    x0 = prior.encode(torch.from_numpy(image)[None, None].to(prior.device))
    times = time_steps(prior.process, steps, start=noise_time)
    rebuilt = []
    for sample in range(samples):
        noise = noise_like(x0, [case_generator(seed, name, sample)])
        x = prior.process.add_noise(x0, noise, noise_time)
        rebuilt.append(prior.decode(ddim(denoise, x, times), image.shape)[0, 0].cpu().numpy())
    return np.stack(rebuilt)


def standardise(image: NDArray[np.float32], rebuilt: NDArray[np.float32], noise: float) -> NDArray[np.float32]:
    """(d, h, w): how many standard deviations the smoothed image lies above the smoothed reconstructions (n, d, h, w).

    The variance is that of one more draw against the mean of n, averaged over neighbours because n is small, and what
    smoothing leaves of white noise of standard deviation ``noise``.
    """
    smooth = np.stack([ndimage.gaussian_filter(volume, SMOOTHING) for volume in rebuilt])
    residual = ndimage.gaussian_filter(image, SMOOTHING) - smooth.mean(axis=0)
    between = ndimage.gaussian_filter(smooth.var(axis=0, ddof=1), 2 * SMOOTHING) * (1 + 1 / len(rebuilt))
    return (residual / np.sqrt(between + noise**2 * NOISE_LEFT + SMALLEST_SD**2)).astype(np.float32)


def find_regions(signed: Volume, threshold: float, min_ml: float) -> tuple[NDArray[np.uint8], list[Finding]]:
    """Mask and findings of a signed map: connected regions of one sign beyond ``threshold``, of ``min_ml`` or more."""
    mask, findings = np.zeros(signed.shape, np.uint8), []
    for sign, direction in ((1, "brighter"), (-1, "darker")):
        labels, _ = ndimage.label(sign * signed.array > threshold)
        for index, box in enumerate(ndimage.find_objects(labels), 1):
            region = labels[box] == index
            volume_ml = float(region.sum()) * signed.voxel_ml
            if volume_ml < min_ml:
                continue
            values = np.where(region, np.abs(signed.array[box]), 0)
            peak = np.unravel_index(values.argmax(), values.shape)
            i, j, k = (int(s.start + p) for s, p in zip(box, peak, strict=True))
            x, y, z = (round(float(c), 1) for c in signed.to_world((i, j, k)))
            mean = float(values[region].mean())
            findings.append(
                Finding(x, y, z, i, j, k, round(volume_ml, 3), round(float(values.max()), 2), round(mean, 2), direction)
            )
            mask[box][region] = 1
    return mask, sorted(findings, key=lambda finding: -finding.peak)


def _inside(tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The head with its cavities, less a margin: dark lesions and ventricles lie below Otsu's threshold too."""
    closed = ndimage.binary_closing(np.pad(tissue, 8), iterations=8)[8:-8, 8:-8, 8:-8]
    return ndimage.binary_erosion(ndimage.binary_fill_holes(closed), iterations=TISSUE_MARGIN)


def write_findings(path: Path, findings: Sequence[Finding], overwrite: bool = False) -> None:
    """A CSV with one row for each finding; the header is there even when nothing was found."""
    with staged(path, overwrite=overwrite) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Finding)])
        writer.writeheader()
        writer.writerows(asdict(finding) for finding in findings)


def detect(
    input: Path,
    output: Path,
    *,
    prior: str = "brain-t1",
    noise_time: float = 0.8,
    steps: int = 3,
    samples: int = 4,
    threshold: float = 2.5,
    min_ml: float = 0.5,
    seed: int = 0,
    device: str | None = None,
    volume: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Run:
    """Map anomalies of every scan under ``input``.

    For each case, ``output`` receives ``CASE_anomaly.nii.gz`` (heatmap), ``CASE_reconstruction.nii.gz``,
    ``CASE_mask.nii.gz``, all on the input's grid, and ``CASE_findings.csv``. Options as in ``detect_volume``.
    """
    require_folder(output)
    if not (threshold > 0 and min_ml >= 0):
        raise MedfusionError(f"threshold {threshold}, min_ml {min_ml}: have to be above 0, and 0 or above")
    options = {
        "noise_time": noise_time,
        "steps": steps,
        "samples": samples,
        "threshold": threshold,
        "min_ml": min_ml,
        "seed": seed,
    }
    settings = Settings("detect", input, output, prior, device, options, volume, overwrite, resume)
    replace = overwrite or resume

    def targets(series: Series) -> list[Path]:
        images = [output / f"{series.name}_{kind}.nii.gz" for kind in ("anomaly", "reconstruction", "mask")]
        return [*images, output / f"{series.name}_findings.csv"]

    def work(series: Series, loaded: Prior) -> str:
        scan = read(series, volume)
        found = detect_volume(
            scan,
            loaded,
            noise_time=noise_time,
            steps=steps,
            samples=samples,
            threshold=threshold,
            min_ml=min_ml,
            seed=seed,
        )
        *images, table = targets(series)
        for result, path in zip((found.anomaly, found.reconstruction, found.mask), images, strict=True):
            write_nifti(result, path, overwrite=replace)
        write_findings(table, found.findings, overwrite=replace)
        return f"{len(found.findings)} finding(s){caution(scan, loaded)}"

    return run_jobs(settings, scan_jobs(settings, targets, work))
