"""Augment: new volumes from the prior, as an nnU-Net raw dataset that says of every case that it is synthetic."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.data.crops import STRIPPED, WHOLE_HEAD, context_channels
from medfusion.data.grid import canonical, resampled
from medfusion.data.intensity import SEEN, centre_of, foreground, measure_scale
from medfusion.data.seeds import case_generator
from medfusion.diffusion import ddpm, noise_like, time_steps
from medfusion.errors import MedfusionError
from medfusion.io import Series, discover, read, staged, write_nifti
from medfusion.prior import Prior
from medfusion.tasks.checks import check_scan
from medfusion.tasks.runner import Job, Run, Settings, require_folder, run_jobs
from medfusion.volume import Volume

SMOOTHNESS, DISPLACEMENT = 16.0, 2.0  # voxels: Gaussian width and root mean square of the random displacements
LINEAR = 0.03  # standard deviation of each entry of the linear part, beside the identity
LABELS = {"background": 0, "tissue": 1}  # all that a prior without labels can tell


def generate_volume(
    parent: Volume,
    prior: Prior,
    *,
    name: str,
    strength: float = 0.2,
    steps: int = 10,
    stripped: bool = False,
    seed: int = 0,
) -> Volume:
    """One new volume in the style of the prior, float32.

    The parent is deformed a little, noised to the process time ``strength`` and rebuilt by ancestral
    sampling (SDEdit, Meng et al. 2022): its coarse layout stays, what the noise hid is new.

    Parameters
    ----------
    parent : a real scan; it lends its field of view and its intensity units too.
    name : of the new case; with ``seed`` it fixes the sample.
    strength : in (0, 1]. At 1 nothing of the parent is used but grid, units and the place of its foreground's centre.
    steps : evaluations of the prior.
    stripped : whether ``parent`` is skull-stripped, and so shall be the new volume.

    Returns
    -------
    A volume on the parent's field of view at the prior's spacing, axes in the nearest RAS orientation.
    """
    check_scan(parent, prior)
    grid = resampled(canonical(parent), prior.config.preprocessing.spacing)
    scale = measure_scale(grid.array, prior.config.preprocessing.percentile, parent.name)
    image = scale.apply(grid.array).clip(*SEEN)
    generator = case_generator(seed, name)
    if strength < 1:
        image = deformed(image, seed=int(torch.randint(2**31, (1,), generator=generator)))
    kind = STRIPPED if stripped else WHOLE_HEAD
    centre = centre_of(foreground(image))
    context = context_channels(image.shape, (0, 0, 0), centre, prior.config.preprocessing.spacing, kind)[None]
    x0 = torch.from_numpy(image)[None, None].to(prior.device)
    x0 = prior.encode(x0)
    x = noise_like(x0, [generator])
    times = time_steps(prior.process, steps, start=strength)
    x = prior.process.add_noise(x0 if strength < 1 else torch.zeros_like(x0), x, strength)
    x = ddpm(prior.denoiser(context), x, times, generators=[generator])
    x = prior.decode(x, image.shape)
    return Volume(scale.invert(x[0, 0].cpu().numpy()), grid.affine, name, parent.modality)


def deformed(image: NDArray[np.float32], *, seed: int) -> NDArray[np.float32]:
    """Another head of the same layout: sheared, turned and scaled by a few percent, and displaced smoothly."""
    rng = np.random.default_rng(seed)
    smooth = np.stack([ndimage.gaussian_filter(rng.standard_normal(image.shape), SMOOTHNESS) for _ in range(3)])
    smooth *= DISPLACEMENT / smooth.std()
    centre = (np.array(image.shape) - 1)[:, None, None, None] / 2
    linear = np.eye(3) + rng.normal(0, LINEAR, (3, 3))
    where = centre + np.einsum("ij,jabc->iabc", linear, np.indices(image.shape) - centre) + smooth
    return ndimage.map_coordinates(image, where, order=1, mode="nearest")


def augment(
    input: Path,
    output: Path,
    *,
    number: int,
    prior: str = "brain-t1",
    strength: float = 0.2,
    steps: int = 10,
    stripped: bool = False,
    seed: int = 0,
    device: str | None = None,
    volume: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Run:
    """Generate ``number`` new cases as the nnU-Net raw dataset ``output``; options as in ``generate_volume``.

    The scans under ``input`` take turns as parents. Every case is named ``synth-SEED-NUMBER`` and listed with its
    parent, seed, prior and settings in ``provenance.json``; scans that cannot be used are refused. Cases that earlier
    runs left in ``output``, with another seed for instance, stay in the dataset.

    Raises
    ------
    MedfusionError : ``number`` is below 1, or no scan under ``input`` is usable.
    """
    if number < 1:
        raise MedfusionError(f"-n {number}: at least one case must be asked for")
    require_folder(output)
    earlier = _earlier_cases(output)
    found = discover(input)
    usable = [series for series in found if series.usable]
    if not usable:
        raise MedfusionError(f"{input}: no usable scan among {len(found)}", first=found[0].problems[0])
    options = {"strength": strength, "steps": steps, "stripped": stripped, "seed": seed}
    settings = Settings("augment", input, output, prior, device, options, volume, overwrite, resume)
    replace = overwrite or resume

    def work(name: str, series: Series, image: Path, label: Path, loaded: Prior) -> str:
        parent = read(series, volume)
        new = generate_volume(parent, loaded, name=name, strength=strength, steps=steps, stripped=stripped, seed=seed)
        write_nifti(new, image, overwrite=replace, description=f"SYNTHETIC, made by medfusion with {loaded.name}")
        tissue = foreground(new.array).astype(np.uint8)
        write_nifti(new.with_array(tissue), label, overwrite=replace)
        return f"from {series.name}"

    jobs = [Job(s.name, s.files, [], lambda loaded: "", s.problems) for s in found if not s.usable]
    cases = []
    for index in range(number):
        series, name = usable[index % len(usable)], f"synth-{seed}-{index + 1:04d}"
        image, label = _files_of(output, name)
        jobs.append(Job(name, series.files, [image, label], partial(work, name, series, image, label)))
        cases.append({"case": name, "synthetic": True, "parent": series.name, **options})
    run = run_jobs(settings, jobs)
    _write_dataset(output, earlier, [case | {"prior": run.prior["name"]} for case in cases], run)
    return run


def _earlier_cases(output: Path) -> list[dict[str, Any]]:
    """The provenance of the cases that earlier runs left; a dataset that is not ours is refused."""
    dataset, provenance = output / "dataset.json", output / "provenance.json"
    if not provenance.exists():
        if dataset.exists():
            raise MedfusionError(
                f"{output}: holds a dataset that medfusion did not make", fix="choose a new folder for synthetic cases"
            )
        return []
    try:
        cases = json.loads(provenance.read_text())
        return [case for case in cases if case["synthetic"] and case["case"]]
    except (ValueError, KeyError, TypeError) as error:
        raise MedfusionError(f"{provenance}: not a list of synthetic cases", fix="choose a new folder") from error


def _files_of(output: Path, name: str) -> tuple[Path, Path]:
    """Image and label of a case, as nnU-Net raw data sets name them."""
    return output / "imagesTr" / f"{name}_0000.nii.gz", output / "labelsTr" / f"{name}.nii.gz"


def _write_dataset(output: Path, earlier: list[dict[str, Any]], cases: list[dict[str, Any]], run: Run) -> None:
    """List every case that is there, those of earlier runs with the settings that made them; nothing if none is."""
    listed = {case["case"]: case for case in earlier}
    done = {case.name for case in run.cases if case.status == "done"}
    listed |= {case["case"]: case for case in cases if case["case"] in done or case["case"] not in listed}
    cases = [listed[name] for name in sorted(listed) if all(path.exists() for path in _files_of(output, name))]
    if not cases:
        return
    modality = run.prior["config"]["preprocessing"]["modality"]
    dataset = {
        "channel_names": {"0": "CT" if modality == "CT" else "MRI"},  # nnU-Net normalises "CT" in its own way
        "labels": LABELS,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "name": f"synthetic {run.prior['name']}",
        "description": "Every case is synthetic, see provenance.json. Labels: Otsu's threshold, tissue against air.",
    }
    for name, content in (("dataset.json", dataset), ("provenance.json", cases)):
        with staged(output / name, overwrite=True) as unfinished:
            unfinished.write_text(json.dumps(content, indent=2) + "\n")
