"""Augment: new volumes from the prior, as an nnU-Net raw dataset that says of every case that it is synthetic."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medfusion.data.crops import STRIPPED, WHOLE_HEAD, context_channels
from medfusion.data.grid import canonical, resampled
from medfusion.data.intensity import centre_of, foreground, measure_scale
from medfusion.data.seeds import case_generator
from medfusion.diffusion import ddpm, noise_like, uniform_times
from medfusion.errors import MedfusionError
from medfusion.io import Series, discover, read, staged, write_nifti
from medfusion.prior import Prior
from medfusion.tasks.checks import check_scan
from medfusion.tasks.runner import Job, Run, Settings, require_folder, run_jobs
from medfusion.volume import Volume

LABELS = {"background": 0, "tissue": 1}  # an unconditional prior knows no anatomy by name; tissue against air it does


def generate_volume(
    like: Volume, prior: Prior, *, name: str, steps: int = 50, stripped: bool = False, seed: int = 0
) -> Volume:
    """One new volume in the style of the prior, float32.

    Parameters
    ----------
    like : a real scan that lends its field of view and its intensity units; none of its anatomy is used but the place
        of the foreground's centre.
    name : of the new case; with ``seed`` it fixes the sample.
    steps : evaluations of the prior, from pure noise by ancestral sampling.
    stripped : a skull-stripped brain instead of a whole head.

    Returns
    -------
    A volume on ``like``'s field of view at the prior's spacing, axes in the nearest RAS orientation.
    """
    check_scan(like, prior)
    grid = resampled(canonical(like), prior.config.preprocessing.spacing)
    scale = measure_scale(grid.array, prior.config.preprocessing.percentile, like.name)
    centre = centre_of(foreground(grid.array))
    even = [n + n % 2 for n in grid.shape]
    kind = STRIPPED if stripped else WHOLE_HEAD
    context = context_channels(even, (0, 0, 0), centre, prior.config.preprocessing.spacing, kind)[None]
    generator = case_generator(seed, name)
    x = noise_like(torch.empty(1, 1, *grid.shape), [generator]).to(prior.device)
    times = uniform_times(1.0, steps).to(prior.device)
    x = ddpm(prior.denoiser(context), prior.process, x, times, generators=[generator])
    array = scale.invert(x[0, 0].cpu().numpy())
    return Volume(array, grid.affine, name, like.modality)


def augment(
    input: Path,
    output: Path,
    *,
    number: int,
    prior: str = "brain-t1",
    steps: int = 50,
    stripped: bool = False,
    seed: int = 0,
    device: str | None = None,
    volume: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Run:
    """Generate ``number`` new cases as the nnU-Net raw dataset ``output``; options as in ``generate_volume``.

    The scans under ``input`` take turns in lending field of view and intensity units. Every case is named
    ``synth-SEED-NUMBER`` and listed with its seed, prior and settings in ``provenance.json``. Cases that earlier runs
    left in ``output``, with another seed for instance, stay in the dataset.

    Raises
    ------
    MedfusionError : ``number`` is below 1, or no scan under ``input`` is usable.
    """
    if number < 1:
        raise MedfusionError(f"-n {number}: at least one case must be asked for")
    require_folder(output)
    found = discover(input)
    usable = [series for series in found if series.usable]
    if not usable:
        raise MedfusionError(f"{input}: no usable scan among {len(found)}", first=found[0].problems[0])
    options = {"number": number, "steps": steps, "stripped": stripped, "seed": seed}
    settings = Settings("augment", input, output, prior, device, options, volume, overwrite, resume)
    replace = overwrite or resume

    def work(name: str, series: Series, image: Path, label: Path, loaded: Prior) -> str:
        new = generate_volume(read(series, volume), loaded, name=name, steps=steps, stripped=stripped, seed=seed)
        write_nifti(new, image, overwrite=replace, description=f"medfusion {loaded.name}: SYNTHETIC, no patient")
        tissue = foreground(new.array).astype(np.uint8)
        write_nifti(new.with_array(tissue), label, overwrite=replace)
        return f"grid and units of {series.name}"

    jobs, cases = [], []
    for index in range(number):
        series, name = usable[index % len(usable)], f"synth-{seed}-{index + 1:04d}"
        image, label = _files_of(output, name)
        jobs.append(Job(name, [image, label], partial(work, name, series, image, label)))
        cases.append({"case": name, "synthetic": True, "grid_of": series.name, **options})
    run = run_jobs(settings, jobs)
    _write_dataset(output, [case | {"prior": run.prior["name"]} for case in cases], run)
    return run


def _files_of(output: Path, name: str) -> tuple[Path, Path]:
    """Image and label of a case, as nnU-Net raw data sets name them."""
    return output / "imagesTr" / f"{name}_0000.nii.gz", output / "labelsTr" / f"{name}.nii.gz"


def _write_dataset(output: Path, cases: list[dict[str, Any]], run: Run) -> None:
    """List every case that is there, those of earlier runs with the settings that made them."""
    provenance = output / "provenance.json"
    earlier = json.loads(provenance.read_text()) if provenance.exists() else []
    listed = {case["case"]: case for case in earlier}
    done = {case.name for case in run.cases if case.status == "done"}
    listed |= {case["case"]: case for case in cases if case["case"] in done or case["case"] not in listed}
    cases = [listed[name] for name in sorted(listed) if all(path.exists() for path in _files_of(output, name))]
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "name": f"synthetic {run.prior['name']}",
        "description": "Every case is synthetic, see provenance.json. Labels: Otsu's threshold, tissue against air.",
    }
    for name, content in (("dataset.json", dataset), ("provenance.json", cases)):
        with staged(output / name, overwrite=True) as partial_file:
            partial_file.write_text(json.dumps(content, indent=2) + "\n")
