"""Draw the image of a new case: given its label map and a real parent, by a prior that is shown label maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medfusion.data.crops import STRIPPED, UNKNOWN, WHOLE_HEAD, context_channels
from medfusion.data.grid import canonical, resampled
from medfusion.data.intensity import SEEN, IntensityScale, centre_of, foreground, measure_scale
from medfusion.data.label_maps import warp_image
from medfusion.data.seeds import case_generator
from medfusion.diffusion import dpm_solver, inpaint, noise_like, time_steps
from medfusion.io.training_set import TrainingCase, read_scan
from medfusion.prior import Prior
from medfusion.tasks.checks import check_scan
from medfusion.volume import Volume

STEPS = 10  # evaluations of the prior
GUIDANCE = 1.5
STRENGTH = 0.8  # process time to which the parent's image is noised
WEAKEST, LAST = 0.01, 0.99  # and the limits of it: steps are even in log-SNR, which has no end at 0 and 1
RESAMPLINGS = 4  # of inpainting


@dataclass(frozen=True)
class Parent:
    """A real case as the prior sees it: axes RAS, on the prior's spacing and in its units, and the way back.

    ``image`` (d, h, w) float32; ``grid`` is the scan on the same grid in its own units.
    """

    grid: Volume
    scale: IntensityScale
    image: NDArray[np.float32]


def read_parent(case: TrainingCase, prior: Prior) -> Parent:
    """Read and prepare the scan of a case.

    Raises
    ------
    MedfusionError : as ``check_scan``, or a file cannot be read.
    """
    scan = read_scan(case)
    check_scan(scan, prior)
    known = prior.config.preprocessing
    grid = resampled(canonical(scan), known.spacing)
    scale = measure_scale(grid.array, known.percentile, case.name)
    return Parent(grid, scale, scale.apply(grid.array).clip(*SEEN))


def draw_case(
    parent: Parent,
    prior: Prior,
    labels: NDArray[Any] | None,
    *,
    name: str,
    strength: float = STRENGTH,
    moved: NDArray[np.float32] | None = None,
    drawn: NDArray[np.bool_] | None = None,
    guidance: float = GUIDANCE,
    steps: int = STEPS,
    stripped: bool = False,
    class_index: int = UNKNOWN,
    seed: int = 0,
) -> Volume:
    """A new image that shows ``labels``, on the parent's grid and in its units, float32.

    Parameters
    ----------
    labels : (d, h, w) on the parent's grid; None for a prior that is shown none.
    name : of the new case; with ``seed`` it fixes the sample.
    strength : in [WEAKEST, 1]: the process time to which the parent is noised (SDEdit, Meng et al. 2022). At 1 nothing
        of it is kept but its field of view, its units and the place of its foreground's centre.
    moved : (3, d, h, w), where in the parent each voxel comes from, in voxels; None: all stay.
    drawn : (d, h, w), the voxels that are drawn given the others, which stay the parent's (RePaint); None: all.
    guidance : scale of classifier-free guidance towards the labels and the class; 1: none.
    steps : evaluations of the prior.
    stripped : whether the scans are skull-stripped.
    class_index : of the prior's classes, UNKNOWN for none.
    """
    generator = case_generator(seed, name)
    centre, kind = centre_of(foreground(parent.image)), STRIPPED if stripped else WHOLE_HEAD
    known = prior.config.preprocessing
    context = context_channels(parent.image.shape, (0, 0, 0), centre, known.spacing, kind)[None]
    shown = None if labels is None else torch.from_numpy(labels.astype(np.int64))[None]
    told = None if class_index == UNKNOWN else torch.tensor([class_index])
    denoise = prior.denoiser(context, shown, told, guidance)
    image = parent.image if moved is None else warp_image(parent.image, moved)
    x0 = prior.latents(torch.from_numpy(image)[None, None].to(prior.device))
    if drawn is not None:
        times = time_steps(prior.process, steps)
        missing = torch.from_numpy(drawn)[None, None].to(x0.device)
        x = inpaint(denoise, x0, missing, times, resamplings=RESAMPLINGS, generators=[generator])
    else:
        start = min(strength, LAST)
        x = prior.process.add_noise(x0 if strength < 1 else torch.zeros_like(x0), noise_like(x0, [generator]), start)
        x = dpm_solver(denoise, x, time_steps(prior.process, steps, "log_snr", start=start))
    image = parent.scale.invert(prior.images(x, parent.image.shape)[0, 0].cpu().numpy())
    if drawn is not None:
        image = np.where(drawn, image, parent.grid.array)  # unclipped
    return Volume(image, parent.grid.affine, name, parent.grid.modality)
