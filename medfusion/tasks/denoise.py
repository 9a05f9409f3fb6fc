"""Denoise: a scan with noise s IS a sample of the process at the time where noise_ratio(t) = s.

One evaluation of the prior there gives the posterior mean E[x_0 | x_t], the least-squares estimate of the clean scan;
the reverse process from there gives samples of p(x_0 | x_t). Magnitude MRI is first given noise that is Gaussian
(``medfusion.data.rician``), and its bias is taken out afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medfusion.data.grid import canonical, from_canonical
from medfusion.data.intensity import SEEN, foreground, measure_scale, within
from medfusion.data.rician import stabilise, unbias
from medfusion.data.seeds import case_generator
from medfusion.data.zero_filling import acquired_shape, to_shape
from medfusion.diffusion import Denoiser, ddpm, noise_like
from medfusion.errors import MedfusionError
from medfusion.io import Series, read_volumes, staged, write_derived_series, write_nifti
from medfusion.prior import Prior
from medfusion.tasks.audit import Audit, audit_removed
from medfusion.tasks.checks import caution, check_scan
from medfusion.tasks.noise import NEGLIGIBLE, Kind, Noise, measure_noise
from medfusion.tasks.runner import Run, Settings, run_jobs, scan_jobs, single_file
from medfusion.tasks.tiles import tiled
from medfusion.volume import Volume

TILE = 192  # voxels along an edge: a tile with its surroundings needs 1.5 GB, and most MR volumes are one to four tiles
CORRELATED = 0.1  # of the noise that neighbours share: more, and half of it is taken for anatomy
LEVEL_STEP = 1.25  # between the levels that are blended where the noise differs from place to place
FEW = 5  # volumes of a 4D series whose noise is measured
# Evaluations of the prior for a posterior sample, at noise ratios from that of the scan to a sixteenth of it. The
# variance of a step is the geometric mean of the small and the large one (``reverse_variance``): the mean variance of
# samples is then 0.86 to 0.99 of the squared error at 5 to 20 % noise (one head), with the small one 0.42 to 0.59, with
# the large one 1.3.
STEPS, REACH = 10, 16.0
# Left and right exchanged or not, moved by so many voxels: the network sees voxels in pairs, and which two make a pair
# is chance. Three heads at 5, 10, 20 %: the four together 0.05, 0.07, 0.08 dB, eight mirror images 0.04, 0.04, 0.02.
ONCE: tuple[tuple[bool, int], ...] = ((False, 0),)
FOUR_TIMES: tuple[tuple[bool, int], ...] = ((False, 0), (True, 0), (False, 1), (True, 1))


@dataclass(frozen=True)
class Denoised:
    """A denoised volume on the input's grid in its units, float32 unless nothing was changed.

    ``noise`` is in the same units, ``time`` that of the process it stands for (0: nothing to remove). ``removed`` is
    what was taken off in units of the noise, upright (i, j, k), on the grid that was acquired. ``samples`` are draws of
    what the clean scan may be, none unless asked for.
    """

    volume: Volume
    noise: Noise
    time: float
    removed: NDArray[np.float32] | None = None
    samples: tuple[Volume, ...] = ()

    @property
    def std(self) -> Volume:
        """Standard deviation of the samples, of which there are two or more."""
        return self.volume.with_array(np.std([draw.array for draw in self.samples], axis=0, ddof=1))


def denoise_volume(
    volume: Volume,
    prior: Prior,
    *,
    noise: Noise | None = None,
    high_quality: bool = False,
    samples: int = 0,
    seed: int = 0,
    tile: int = TILE,
) -> Denoised:
    """The posterior mean of the clean scan, at the scan's own resolution.

    Parameters
    ----------
    noise : of the scan; None: as ``volume_noise`` finds it.
    high_quality : whether to take the mean over the scan and its mirror image, both as they are and moved by a voxel:
        a little better, four times slower.
    samples : how many draws from the posterior, STEPS times slower each; ``seed`` and the name fix them.
    tile : edge in voxels above which the volume is worked on in cubes.

    Raises
    ------
    MedfusionError : the scan is of another modality than the prior, constant, too small, or noisier than the process.
    """
    noise = noise or volume_noise(volume, prior)
    array = acquired_array(volume, noise)
    scale = measure_scale(array, prior.config.preprocessing.percentile, volume.name)
    t = _time_of(prior, noise.sigma * 2 / (scale.high - scale.low), volume.name)
    if t == 0.0:
        return Denoised(volume, noise, 0.0, samples=(volume,) * samples)
    sigma = noise.sigma if noise.map is None else noise.map
    if noise.kind == "rician":
        array = stabilise(array, sigma)
        scale = measure_scale(array, prior.config.preprocessing.percentile, volume.name)
    y = torch.from_numpy(scale.apply(array))[None, None].clamp_(*SEEN)
    ratio = torch.as_tensor(np.float32(sigma) * np.float32(2 / (scale.high - scale.low)))

    def restored(clean: Tensor) -> Volume:
        """On the scan's grid in its units and voxel order, with what lies beyond the values that are shown."""
        image = scale.apply(array)
        image -= image.clip(*SEEN)
        image += clean[0, 0].numpy()
        whole = scale.invert(image)
        whole = unbias(whole, sigma) if noise.kind == "rician" else whole
        return volume.with_array(within(_on_the_grid_of(volume, whole, noise), volume.array))

    shown = y if ratio.ndim == 0 else torch.cat([y, ratio[None, None]], dim=1)
    views = FOUR_TIMES if high_quality else ONCE
    clean = tiled(lambda x: _mean_of_views(prior, x, ratio, views), shown, tile)
    result = restored(clean)
    seeds = [case_generator(seed, volume.name, k) for k in range(samples)]
    draws = tuple(restored(_draw(prior, y, ratio, generator, tile)) for generator in seeds)
    return Denoised(result, noise, t, y.sub_(clean).div_(ratio)[0, 0].numpy(), draws)


def acquired_array(volume: Volume, noise: Noise) -> NDArray[np.generic]:
    """The scan upright (i, j, k), without the frequencies that were only filled in."""
    array = canonical(volume).array
    return array if noise.acquired is None else to_shape(array, noise.acquired)


def _on_the_grid_of(volume: Volume, whole: NDArray[np.float32], noise: Noise) -> NDArray[np.float32]:
    """A result of ``acquired_array`` in the scan's voxel order; what is beyond the acquired frequencies stays."""
    if noise.acquired is not None:
        array = canonical(volume).array
        whole = array + to_shape(whole - to_shape(array, noise.acquired), array.shape)
    return from_canonical(whole, volume)


def _mean_of_views(prior: Prior, x: Tensor, ratio: Tensor, views: Sequence[tuple[bool, int]]) -> Tensor:
    """E[x_0 | y] (1, 1, d, h, w), the mean over views. x is y and, where ``ratio`` is not one number, that."""
    total = torch.zeros_like(x[:, :1])
    for mirrored, moved in views:
        seen = F.pad(x, [moved, 0] * 3, mode="replicate") if moved else x
        seen = (seen.flip(2) if mirrored else seen).to(prior.device)
        mean = _posterior_mean(prior.denoiser(), seen[:, :1], seen[:, 1:] if x.shape[1] == 2 else ratio).cpu()
        total += (mean.flip(2) if mirrored else mean)[..., moved:, moved:, moved:]
    return total / len(views)


@torch.no_grad()
def _posterior_mean(denoise: Denoiser, y: Tensor, ratio: Tensor) -> Tensor:
    """E[x_0 | y] where the noise ratio is ``ratio``, a number or of y's shape.

    Between powers of LEVEL_STEP it is interpolated in the logarithm.
    """
    process = denoise.process

    def at(level: float) -> Tensor:
        t = process.time_of(level)
        return denoise(float(process.alpha(t)) * y, t)

    if ratio.ndim == 0:
        return at(float(ratio))
    place = ratio.clamp(min=float(process.noise_ratio(1 / process.steps))).log() / math.log(LEVEL_STEP)
    mean = torch.zeros_like(y)
    for k in range(math.floor(float(place.min())), math.ceil(float(place.max())) + 1):
        weight = (1 - (place - k).abs()).clamp(min=0)
        if bool(weight.any()):
            mean += weight * at(LEVEL_STEP**k)
    return mean


@torch.no_grad()
def _draw(prior: Prior, y: Tensor, ratio: Tensor, generator: torch.Generator, tile: int) -> Tensor:
    """A draw of p(x_0 | y), (1, 1, d, h, w): the reverse process from where the noise is that of y.

    Where it is less than at the noisiest place, x_s is y with noise added until the process has come down to it.
    """
    answer, process, generators = prior.denoiser().network, prior.process, [generator]

    def network(x: Tensor, log_ratio: Tensor) -> Tensor:
        output = tiled(lambda part: answer(part.to(prior.device), log_ratio), x, tile)
        return torch.cat([output, torch.zeros_like(output)], dim=1)  # 0: in the middle of small and large variance

    denoise = replace(prior.denoiser(), network=network, learned_variance=True)
    levels = [float(ratio.max()) * REACH ** (-k / (STEPS - 1)) for k in range(STEPS)]
    times = torch.stack([*(process.time_of(level) for level in levels), torch.zeros((), dtype=torch.float64)])
    fresh = noise_like(y, generators)

    def from_scan(s: Tensor) -> Tensor:
        """x_s as far as y alone tells it, the noise of y where that is more."""
        more = (process.noise_ratio(s).float() ** 2 - ratio**2).clamp(min=0).sqrt()
        return float(process.alpha(s)) * (y + more * fresh)

    x = from_scan(times[0])
    for t, s in pairwise(times):
        x = ddpm(denoise, x, torch.stack([t, s]), variance="learned", generators=generators)
        if ratio.ndim:
            x = torch.where(ratio < process.noise_ratio(s), from_scan(s), x)
    return x


def volume_noise(volume: Volume, prior: Prior, *, sigma: float | None = None, kind: Kind | None = None) -> Noise:
    """The noise of a scan; what is given is not looked for. Raises as ``denoise_volume`` does."""
    check_scan(volume, prior, patches=True)
    if prior.config.latent:
        raise MedfusionError(
            f"{prior.name}: a latent prior does not denoise: its noise is that of latents, not that of a scan",
            fix="use a prior without autoencoder: `medfusion priors` lists those shipped",
        )
    array, percentile = canonical(volume).array, prior.config.preprocessing.percentile
    shape = acquired_shape(array, foreground(array))
    acquired = None if shape == array.shape else shape
    array = array if acquired is None else to_shape(array, acquired)
    scale = measure_scale(array, percentile, volume.name)
    if sigma is not None and _time_of(prior, sigma * 2 / (scale.high - scale.low), volume.name) == 0.0:
        return Noise(sigma, kind or "gaussian")
    return replace(measure_noise(array, scale, prior, sigma=sigma, kind=kind), acquired=acquired)


def series_noise(volumes: Sequence[Volume], prior: Prior, **given: Any) -> Noise:
    """One noise for the volumes of one series: that of which half of a few have more."""
    few = volumes[:: max(1, len(volumes) // FEW)]
    found = sorted((volume_noise(volume, prior, **given) for volume in few), key=lambda noise: noise.sigma)
    return found[len(found) // 2]


def _time_of(prior: Prior, ratio: float, name: str) -> float:
    highest = float(prior.process.noise_ratio(1.0))
    if ratio <= max(NEGLIGIBLE, float(prior.process.noise_ratio(1 / prior.process.steps))):
        return 0.0
    if ratio > highest:
        raise MedfusionError(f"{name}: more noise than any time of the prior's process has", noise_ratio=f"{ratio:.3g}")
    return float(prior.process.time_of(ratio))


def audit_denoised(volume: Volume, denoised: Denoised) -> Audit | None:
    """Whether what was taken off ``volume`` is noise; None where nothing was."""
    if denoised.removed is None:
        return None
    return audit_removed(denoised.removed, foreground(acquired_array(volume, denoised.noise)), denoised.noise.edges)


def denoise(
    input: Path,
    output: Path,
    *,
    prior: str = "brain-t1",
    sigma: float | None = None,
    kind: Kind | None = None,
    high_quality: bool = False,
    samples: int = 0,
    maps: bool = False,
    seed: int = 0,
    device: str | None = None,
    volume: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    seen: Callable[[Path, Volume, Denoised, Audit | None], None] = lambda *_: None,
) -> Run:
    """Denoise every scan under ``input`` and write it in its own format to ``output``.

    A NIfTI file becomes ``CASE_denoised.nii.gz`` (or exactly ``output`` where that ends in .nii or .nii.gz), a DICOM
    series the folder ``CASE_denoised`` with a derived series; enhanced multi-frame DICOM becomes NIfTI. Of a 4D file
    all volumes are denoised with one noise, or the one that ``volume`` picks. Beside it stands a file of the same name
    that ends in .json, with the noise and the audit of what was taken off.

    Parameters
    ----------
    sigma, kind, high_quality, samples, seed : as in ``volume_noise`` and ``denoise_volume``. Samples become
        ``CASE_sample-1.nii.gz`` and so on, their standard deviation ``CASE_std.nii.gz``.
    maps : whether to write what was taken off, in the scan's units, as ``CASE_removed.nii.gz``, and the map of the
        audit as ``CASE_structure.nii.gz``; of a 4D file those of its first volume.
    seen : called for every scan that was done with its main output, its first volume, the result and the audit.
    """
    folder = output.parent if single_file(output) else output
    given = {"sigma": sigma, "kind": kind}
    asked: dict[str, Any] = {"high_quality": high_quality, "samples": samples, "seed": seed}
    options = given | asked | {"maps": maps}
    settings = Settings("denoise", input, output, prior, device, options, volume, overwrite, resume)
    replaced = overwrite or resume

    def targets(series: Series) -> list[Path]:
        dicom = series.kind == "dicom" and len(series.files) > 1
        named = output / f"{series.name}_denoised{'' if dicom else '.nii.gz'}"
        main = output if single_file(output) else named
        drawn = [f"sample-{k}" for k in range(1, samples + 1)] + ["std"] * (samples > 1)
        drawn += ["removed", "structure"] * maps
        return [main, _beside(main, ".json"), *(folder / f"{series.name}_{kind}.nii.gz" for kind in drawn)]

    def work(series: Series, loaded: Prior) -> str:
        main, sidecar, *further = targets(series)
        scans = list(read_volumes(series, volume))
        noise = series_noise(scans, loaded, **given)
        results = [denoise_volume(scan, loaded, noise=noise, **asked) for scan in scans]
        first, audit = results[0], audit_denoised(scans[0], results[0])
        _write_result(results, audit, main, series, loaded, replaced)
        written = _drawn(results) + (_maps(scans[0], first, audit) if maps else [])
        for path, volumes in zip(further, written, strict=True):
            write_nifti(volumes, path, overwrite=replaced)
        with staged(sidecar, replaced) as unfinished:
            unfinished.write_text(json.dumps(facts(first, audit, loaded), indent=2) + "\n")
        seen(main, scans[0], first, audit)
        return summary(first, audit) + caution(scans[0], loaded)

    return run_jobs(settings, scan_jobs(settings, targets, work))


def _write_result(
    results: Sequence[Denoised], audit: Audit | None, main: Path, series: Series, prior: Prior, overwrite: bool
) -> None:
    """The main output: a NIfTI file, 4D where there are several results, or a folder with a derived series."""
    first = results[0]
    if single_file(main):
        write_nifti(_together([result.volume for result in results]), main, overwrite=overwrite)
        return
    made = f"Diffusion posterior mean, prior {prior.name}" if first.time > 0 else "Values unchanged"
    write_derived_series(
        first.volume,
        series,
        main,
        description="denoised",
        derivation=f"{made}, noise {summary(first, audit)}",
        smoothing=first.time > 0,
        overwrite=overwrite,
    )


def _drawn(results: Sequence[Denoised]) -> list[Volume | list[Volume]]:
    """The samples and, of two or more, their standard deviation; each 4D where there are several results."""
    count = len(results[0].samples)
    drawn = [_together([result.samples[k] for result in results]) for k in range(count)]
    return [*drawn, _together([result.std for result in results])] if count > 1 else drawn


def _together(volumes: list[Volume]) -> Volume | list[Volume]:
    return volumes if len(volumes) > 1 else volumes[0]


def summary(denoised: Denoised, audit: Audit | None) -> str:
    """The noise that was found, and what is to be said against the result, in a line."""
    noise = denoised.noise
    text = f"sigma {noise.sigma:.4g} ({'estimated' if noise.estimated else 'given'}, {noise.kind})"
    if noise.map is not None:
        text += f", from {noise.map.min():.4g} to {noise.map.max():.4g} over the scan"
    text += _filled(noise)
    if denoised.time == 0.0:
        return f"{text}: no noise to remove, values unchanged"
    warnings = [f"neighbours share {noise.shared:.0%} of the noise"] * (noise.shared > CORRELATED)
    warnings += audit.warnings if audit else []
    text += f", t {denoised.time:.3f}"
    return text + (f"; look at what was taken off: {', '.join(warnings)}" if warnings else "")


def noise_verdict(volume: Volume, noise: Noise, prior: Prior) -> tuple[float, str]:
    """The noise as a share of the way from air to bright tissue, and what it means for denoising, in words."""
    scale = measure_scale(acquired_array(volume, noise), prior.config.preprocessing.percentile, volume.name)
    share = noise.sigma / (scale.high - scale.low)
    if 2 * share <= NEGLIGIBLE:
        return share, "nothing to do"
    words = "white" if noise.shared <= CORRELATED else "correlated: interpolated or filtered, part of it will stay"
    uneven = "" if noise.map is None else f", {noise.map.min():.4g} to {noise.map.max():.4g} over the scan"
    return share, words + uneven + _filled(noise)


def _filled(noise: Noise) -> str:
    """A clause about a scan that was enlarged by zero-filling, or ""."""
    return "" if noise.acquired is None else f", zero-filled: acquired as {' x '.join(map(str, noise.acquired))}"


def facts(denoised: Denoised, audit: Audit | None, prior: Prior) -> dict[str, Any]:
    """What stands in the file beside a result."""
    noise = denoised.noise
    return {
        "prior": prior.name,
        "time": denoised.time,
        "noise": {
            "sigma": noise.sigma,
            "estimated": noise.estimated,
            "kind": noise.kind,
            "range": None if noise.map is None else [float(noise.map.min()), float(noise.map.max())],
            "shared_by_neighbours": noise.shared,
            "acquired_shape": noise.acquired,
        },
        "removed": None
        if audit is None
        else {
            "structured_share": audit.structured,
            "loud_share": audit.loud,
            "spectrum": audit.spectrum,
            "edge_correlation": audit.edges,
            "warnings": audit.warnings,
        },
    }


def _maps(volume: Volume, denoised: Denoised, audit: Audit | None) -> list[Volume | list[Volume]]:
    """What was taken off in the scan's units, and where it has structure."""
    removed = volume.array.astype(np.float32) - denoised.volume.array.astype(np.float32)
    if audit is None:
        return [volume.with_array(removed), volume.with_array(np.zeros_like(removed))]
    structure = from_canonical(to_shape(audit.map, canonical(volume).shape), volume)
    return [volume.with_array(removed), volume.with_array(structure)]


def _beside(main: Path, suffix: str) -> Path:
    """A file named like a result but for its suffix."""
    return main.with_name(main.name.removesuffix(".gz").removesuffix(".nii") + suffix)
