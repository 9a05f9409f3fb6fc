"""Denoise: a scan with noise s IS a sample of the process at the time where noise_ratio(t) = s.

One evaluation of the prior there gives the posterior mean E[x_0 | x_t], the least-squares estimate of the clean scan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor

from medfusion.data.grid import canonical, from_canonical
from medfusion.data.intensity import SEEN, measure_scale
from medfusion.data.noise import estimate_noise
from medfusion.errors import MedfusionError
from medfusion.io import Series, read, write_derived_series, write_nifti
from medfusion.prior import Prior
from medfusion.tasks.checks import caution, check_scan
from medfusion.tasks.runner import Run, Settings, run_jobs, scan_jobs, single_file
from medfusion.volume import Volume

TILE = 192  # voxels along an edge: a tile needs about 2 GiB, and most MR volumes are one to four tiles
MASKED_OUT = 0.2  # of the voxels: so many with the lowest value are a mask (skull-stripped scans), not dark tissue
MARGIN = 16  # voxels of replicated border: the zeros that convolutions see beyond it are mid-grey to the network
OVERLAP = 0.25  # of a tile; blended with Gaussian weights


@dataclass(frozen=True)
class Denoised:
    """A denoised volume on the input's grid in its units, float32 unless nothing was changed.

    ``sigma`` is the noise in the same units, ``time`` that of the process it stands for (0: nothing to remove).
    """

    volume: Volume
    sigma: float
    time: float


def denoise_volume(volume: Volume, prior: Prior, *, sigma: float | None = None, tile: int = TILE) -> Denoised:
    """The posterior mean of the clean scan, at the scan's own resolution.

    Parameters
    ----------
    sigma : standard deviation of the noise in the scan's units; estimated in the foreground when None.
    tile : edge in voxels above which the volume is worked on in overlapping tiles.

    Raises
    ------
    MedfusionError : the scan is of another modality than the prior, constant, too small, or noisier than the process.
    """
    check_scan(volume, prior)
    if prior.autoencoder is not None:
        raise MedfusionError(
            f"{prior.name}: a latent prior does not denoise: its noise is that of latents, not that of a scan",
            fix="use a prior without autoencoder: `medfusion priors` lists those shipped",
        )
    upright = canonical(volume)
    scale = measure_scale(upright.array, prior.config.preprocessing.percentile, volume.name)
    sigma = estimate_noise(upright.array) if sigma is None else sigma
    ratio = sigma * 2 / (scale.high - scale.low)
    t = _time_of(prior, ratio, volume.name)
    if t == 0.0:
        return Denoised(volume, sigma, 0.0)
    image = scale.apply(upright.array)
    seen = image.clip(*SEEN)
    clean = _posterior_mean(prior, torch.from_numpy(seen), t, tile).cpu().numpy() + (image - seen)
    lowest = volume.array.min()
    array = np.maximum(from_canonical(scale.invert(clean), volume), lowest)  # noise only widens the range of values
    if np.mean(volume.array == lowest) > MASKED_OUT:
        array[volume.array == lowest] = lowest  # other tools crop to, or mask by, the constant
    return Denoised(volume.with_array(array), sigma, t)


def _time_of(prior: Prior, ratio: float, name: str) -> float:
    # below the first step of the process the network has seen nothing, and there is next to nothing to remove
    lowest, highest = (float(prior.process.noise_ratio(t)) for t in (1 / prior.process.steps, 1.0))
    if ratio <= lowest:
        return 0.0
    if ratio > highest:
        raise MedfusionError(f"{name}: more noise than any time of the prior's process has", noise_ratio=f"{ratio:.3g}")
    return float(prior.process.time_of(ratio))


def _posterior_mean(prior: Prior, image: Tensor, t: float, tile: int) -> Tensor:
    """E[x_0 | x_t] for image = x_t / alpha(t), (d, h, w)."""
    x = (image * float(prior.process.alpha(t)))[None, None].to(prior.device)
    denoise = prior.denoiser(margin=MARGIN)
    size = tuple(min(tile, n) for n in image.shape)
    if size == tuple(image.shape):
        return denoise(x, t)[0, 0]
    tiles = sliding_window_inference(x, size, 1, partial(denoise, t=t), overlap=OVERLAP, mode="gaussian")
    return torch.as_tensor(tiles)[0, 0]


def denoise(
    input: Path,
    output: Path,
    *,
    prior: str = "brain-t1",
    sigma: float | None = None,
    device: str | None = None,
    volume: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Run:
    """Denoise every scan under ``input`` and write it in its own format to ``output``.

    A NIfTI file becomes ``CASE_denoised.nii.gz`` (or exactly ``output`` where that ends in .nii or .nii.gz), a DICOM
    series the folder ``CASE_denoised`` with a derived series; enhanced multi-frame DICOM becomes NIfTI.
    ``volume`` picks one volume of 4D files.
    """
    settings = Settings("denoise", input, output, prior, device, {"sigma": sigma}, volume, overwrite, resume)
    replace = overwrite or resume

    def as_dicom(series: Series) -> bool:
        return series.kind == "dicom" and len(series.files) > 1 and not single_file(output)

    def targets(series: Series) -> list[Path]:
        if single_file(output):
            return [output]
        return [output / f"{series.name}_denoised{'' if as_dicom(series) else '.nii.gz'}"]

    def work(series: Series, loaded: Prior) -> str:
        scan = read(series, volume)
        result = denoise_volume(scan, loaded, sigma=sigma)
        how = f"sigma {result.sigma:.4g} ({'estimated' if sigma is None else 'given'}), t {result.time:.3f}"
        [target] = targets(series)
        if as_dicom(series):
            made = f"Diffusion posterior mean, prior {loaded.name}" if result.time > 0 else "Values unchanged"
            write_derived_series(
                result.volume,
                series,
                target,
                description="denoised",
                derivation=f"{made}, noise {how}",
                smoothing=result.time > 0,
                overwrite=replace,
            )
        else:
            write_nifti(result.volume, target, overwrite=replace)
        nothing = "" if result.time > 0 else ": no noise to remove, values unchanged"
        return how + nothing + caution(scan, loaded)

    return run_jobs(settings, scan_jobs(settings, targets, work))
