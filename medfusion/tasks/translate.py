"""Translate: scans of one scanner as another would show them, by a CycleGAN or from one diffusion prior to another."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from medfusion.data.intensity import within
from medfusion.errors import MedfusionError
from medfusion.io import Series, read_volumes, write_derived_series, write_nifti
from medfusion.prior import CycleGanPrior, DiffusionPrior, Prior, prior_path, read_metadata
from medfusion.tasks.checks import caution
from medfusion.tasks.place import seen_by
from medfusion.tasks.runner import Run, Settings, run_jobs, scan_jobs, single_file
from medfusion.volume import Volume


def translate_volume(volume: Volume, prior: Prior, to: Prior | str) -> Volume:
    """The scan as ``to`` would show it, on its own grid and in its own units, float32.

    What the translation changes at the prior's spacing is added to the scan, whose finer detail stays.

    Parameters
    ----------
    to : the name of a CycleGAN's other domain; or the diffusion prior that decodes what ``prior`` encodes.

    Raises
    ------
    MedfusionError : another modality than the prior's, a slab, a constant image; a family that does not translate.
    """
    seen = seen_by(prior, volume)
    image = torch.from_numpy(np.ascontiguousarray(seen.volume.array, np.float32))[None, None]
    translated = prior.translate(image.to(prior.device), to)[0, 0].cpu().numpy()
    change = seen.in_scan_units(translated, volume) - seen.in_scan_units(seen.volume.array, volume)
    return volume.with_array(within(volume.array + change, volume.array))


def target_of(prior: Prior, to: str) -> Prior | str:
    """What ``--to`` names: a domain of a CycleGAN, else another prior, by name or path.

    Raises
    ------
    MedfusionError : it is neither, or the other prior sees scans otherwise than this one.
    """
    if isinstance(prior, CycleGanPrior):
        if to not in prior.domains:
            raise MedfusionError(f"--to {to}: is no domain of {prior.name}", domains=", ".join(prior.domains))
        return to
    other = Prior.load(to, prior.device)
    if odd := [each for each in (prior, other) if not isinstance(each, DiffusionPrior)]:
        raise MedfusionError(
            f"{odd[0].name}: is {odd[0].kind}; codes of two diffusion priors have a meaning in common, no others",
            fix="name two diffusion priors, or a CycleGAN and one of its domains",
        )
    if odd := [each for each in (prior, other) if each.config.latent]:
        raise MedfusionError(
            f"{odd[0].name}: works on latents of its own autoencoder, which mean nothing to another prior",
            fix="name two diffusion priors without one",
        )
    ours, theirs = prior.config.preprocessing, other.config.preprocessing
    if ours != theirs:
        raise MedfusionError(
            f"{prior.name} and {other.name} see scans otherwise, so that codes of one are not codes of the other",
            **{prior.name: ours, other.name: theirs},
            fix="train both with the same section preprocessing",
        )
    return other


def translate(
    input: Path,
    output: Path,
    *,
    prior: str,
    to: str,
    device: str | None = None,
    volume: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Run:
    """Translate every scan under ``input`` and write it in its own format to ``output``.

    A NIfTI file becomes ``CASE_translated.nii.gz`` (or exactly ``output`` where that ends in .nii or .nii.gz), a DICOM
    series the folder ``CASE_translated`` with a derived series; all volumes of a 4D file are translated, or the one
    that ``volume`` picks.

    Parameters
    ----------
    prior, to : as in ``translate_volume`` and ``target_of``, by name or path.

    Raises
    ------
    MedfusionError : before any work, where the two do not go together or the output cannot be written.
    """
    loaded = Prior.load(prior)
    target_of(loaded, to)  # what is wrong with it shall be said before
    made_with, options = "", {"to": to}
    if not isinstance(loaded, CycleGanPrior):
        made_with = read_metadata(prior_path(to))[0].name
        options |= {"to_name": made_with, "to_sha256": hashlib.sha256(prior_path(to).read_bytes()).hexdigest()}
    settings = Settings("translate", input, output, prior, device, options, volume, overwrite, resume)
    replaced = overwrite or resume

    def targets(series: Series) -> list[Path]:
        dicom = series.kind == "dicom" and len(series.files) > 1
        named = output / f"{series.name}_translated{'' if dicom else '.nii.gz'}"
        return [output if single_file(output) else named]

    def work(series: Series, loaded: Prior) -> str:
        [main] = targets(series)
        target = target_of(loaded, to)
        scans = list(read_volumes(series, volume))
        results = [translate_volume(scan, loaded, target) for scan in scans]
        if single_file(main):
            write_nifti(results if len(results) > 1 else results[0], main, overwrite=replaced)
        else:
            write_derived_series(
                results[0],
                series,
                main,
                description=f"translated to {made_with or to}",
                derivation=f"Translated by {loaded.name} to {made_with or to}",
                overwrite=replaced,
            )
        change = np.abs(results[0].array - scans[0].array).mean() / np.ptp(scans[0].array)
        return f"mean change {change:.2%} of the range{caution(scans[0], loaded)}"

    return run_jobs(settings, scan_jobs(settings, targets, work))
