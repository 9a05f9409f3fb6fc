"""Rebuild: what a scan would look like if it were healthy, by the prior or by simpler means, all behind one interface.

The prior's ways noise the scan and take the noise away again: what is lost on the way comes back as healthy anatomy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medfusion.data.crops import STRIPPED, WHOLE_HEAD, context_channels
from medfusion.data.intensity import centre_of, foreground
from medfusion.data.seeds import case_generator
from medfusion.data.simplex import simplex_noise
from medfusion.diffusion import ddim, noise_like, time_steps
from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.tasks.place import Here, Seen, beyond_healthy, box_around
from medfusion.tasks.scores import Score, raw_maps


@dataclass(frozen=True, eq=False)
class Shown:
    """What a method is given of one scan.

    Attributes
    ----------
    image : (1, 1, d, h, w) in the prior's units, at its spacing.
    here : what the healthy are there, (d, h, w).
    context : (1, 4, d/2, h/2, w/2), as ``medfusion.data.crops.context_channels``.
    generator : of the k-th draw of noise.
    """

    image: Tensor
    here: Here
    prior: Prior
    context: Tensor
    generator: Callable[[int], torch.Generator]


BLUR = 5.0  # voxels

Rebuild = Callable[[Shown], Tensor]
"""(what is shown) -> the image as it would be if it were healthy, (1, 1, d, h, w)."""
Noise = Callable[[Tensor, torch.Generator], Tensor]
"""(x, generator) -> noise of unit variance in the shape of x."""


def gaussian(x: Tensor, generator: torch.Generator) -> Tensor:
    """White noise."""
    return noise_like(x, [generator])


def coarse(x: Tensor, generator: torch.Generator) -> Tensor:
    """Simplex noise, which hides what is large as well (Wyatt et al. 2022)."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    d, h, w = x.shape[2:]
    return torch.from_numpy(simplex_noise((d, h, w), rng)).to(x)[None, None]


def there_and_back(shown: Shown, *, t: float, steps: int, draws: int, noise: Noise = gaussian) -> Tensor:
    """The scan noised to t and brought back in DDIM steps, the mean of ``draws``."""
    prior = shown.prior
    x0, times = prior.latents(shown.image), time_steps(prior.process, steps, start=t)
    denoise = prior.denoiser(shown.context)
    total = torch.zeros_like(shown.image)
    for draw in range(draws):
        x = prior.process.add_noise(x0, noise(x0, shown.generator(draw)), t)
        total += prior.images(ddim(denoise, x, times), shown.image.shape[2:])
    return total / draws


@torch.no_grad()
def at_once(shown: Shown, *, ratios: tuple[float, ...], draws: int) -> Tensor:
    """The mean of E[x_0 | x_t] over noise ratios and draws: one evaluation each and no way back."""
    prior, total = shown.prior, torch.zeros_like(shown.image)
    denoise, x0 = prior.denoiser(shown.context), prior.latents(shown.image)
    for k, ratio in enumerate(ratios * draws):
        t = prior.process.time_of(ratio)
        x = prior.process.add_noise(x0, gaussian(x0, shown.generator(k)), t)
        total += prior.images(denoise(x, t), shown.image.shape[2:])
    return total / (len(ratios) * draws)


@torch.no_grad()
def stitched(shown: Shown, *, ratios: tuple[float, ...], draws: int) -> Tensor:
    """The mean of two guesses: of all the healthy, and of this scan ``at_once`` without what is suspect in it.

    What is noised and brought back keeps in part what was wrong with it; what the prior never sees it cannot keep, so
    suspect parts are replaced by the mean of the healthy before. (In AutoDDPM, Bercea et al. 2023, they are inpainted
    from a first reconstruction.) What is not far enough from the healthy to be suspect is kept: the second guess errs
    to that side, the first one by all in which heads differ.
    """
    here, image = shown.here, shown.image[0, 0].cpu().numpy()
    suspicion = torch.from_numpy(suspect(image, here))[None, None].to(shown.image)
    healthy = torch.from_numpy(here.atlas)[None, None].to(shown.image)
    mixed = torch.lerp(shown.image, healthy, suspicion)
    return (at_once(replace(shown, image=mixed), ratios=ratios, draws=draws) + healthy) / 2


def suspect(image: NDArray[np.float32], here: Here) -> NDArray[np.float32]:
    """(d, h, w) in [0, 1]: 0 where the scan is as the healthy, 1 where it is more than SUSPECT[1] spreads apart."""
    apart = ndimage.gaussian_filter(np.abs(ndimage.gaussian_filter(image, 1.0) - here.atlas) / here.spread, 0.5)
    return ndimage.gaussian_filter(beyond_healthy(ndimage.maximum_filter(apart, 3)), 0.7) * here.inside


def blurred(shown: Shown) -> Tensor:
    """The scan without detail: the residual is what is small and bright or dark."""
    image = shown.image[0, 0].cpu().numpy()
    return torch.from_numpy(ndimage.gaussian_filter(image, BLUR))[None, None]


def through_autoencoder(shown: Shown) -> Tensor:
    """The scan as its latents tell it."""
    require_autoencoder(shown.prior)
    return shown.prior.images(shown.prior.latents(shown.image), shown.image.shape[2:])


def require_autoencoder(prior: Prior) -> None:
    """Raise a MedfusionError if the prior has none."""
    if prior.config.autoencoder is None:
        raise MedfusionError(f"{prior.name}: has no autoencoder", fix="train one: configs/brain_t1_autoencoder.yaml")


@dataclass(frozen=True)
class Method:
    """A way to rebuild, and the score that goes with it."""

    about: str
    rebuild: Rebuild
    score: Score = "both"


# Average precision for lesions implanted in 30 training heads (dark, bright, textured), a reference of 60 others, bias
# fields taken out: the mean of the healthy 0.64, suspect parts replaced and brought back 0.58, the mean of both 0.65,
# of textured lesions alone 0.06, 0.09 and 0.10. (In 9 other heads, with bias fields: 0.25 and 0.36 for the first two;
# noised to ratio 1.4 and brought back at once 0.09; replaced from 1.5 or from 3 spreads on a tenth less than from 2.5.)
METHODS: dict[str, Method] = {
    "default": Method(
        "the mean of the healthy and, suspect parts replaced, of four evaluations",
        partial(stitched, ratios=(0.5, 1.0), draws=2),
    ),
    "fast": Method("the same with one evaluation", partial(stitched, ratios=(0.7,), draws=1)),
    "residual": Method("as default, by brightness alone", partial(stitched, ratios=(0.5, 1.0), draws=2), "residual"),
    "structure": Method("as default, by structure alone", partial(stitched, ratios=(0.5, 1.0), draws=2), "structure"),
    "levels": Method(
        "one evaluation at each of four noise levels", partial(at_once, ratios=(0.7, 1.4, 2.8, 5.6), draws=1)
    ),
    "plain": Method(
        "Gaussian noise to one time, back by DDIM", partial(there_and_back, t=0.5, steps=10, draws=1), "residual"
    ),
    "simplex": Method(
        "the same with simplex noise", partial(there_and_back, t=0.5, steps=10, draws=1, noise=coarse), "residual"
    ),
    "autoencoder": Method("through the autoencoder of the prior, which may be a VAE", through_autoencoder, "residual"),
    "blur": Method("the scan blurred", blurred, "residual"),
    "intensity": Method(
        "the mean of the healthy", lambda shown: torch.from_numpy(shown.here.atlas)[None, None], "residual"
    ),
}


@dataclass(frozen=True, eq=False)
class Examined:
    """What a method found in a scan, within a box of its voxels: reconstruction (d, h, w), raw maps (2, d, h, w)."""

    box: tuple[slice, ...]
    rebuilt: NDArray[np.float32]
    raw: NDArray[np.float32]


def examine(
    seen: Seen,
    here: Here,
    prior: Prior,
    method: str,
    *,
    stripped: bool,
    seed: int,
) -> Examined:
    """Rebuild the part of a scan that is to be scored, and compare.

    The prior is told whether the scan is ``stripped``; ``seed`` and the scan's name fix the noise.
    """
    box, volume = box_around(here.inside), seen.volume
    image = np.ascontiguousarray(volume.array[box])
    centre = centre_of(foreground(volume.array))
    kind = STRIPPED if stripped else WHOLE_HEAD
    corner = [along.start for along in box]
    context = context_channels(image.shape, corner, centre, prior.config.preprocessing.spacing, kind)[None]
    x = torch.from_numpy(image)[None, None].to(prior.device)
    part = Here(here.atlas[box], here.spread[box], here.inside[box])
    shown = Shown(x, part, prior, context, partial(case_generator, seed, volume.name))
    rebuilt = METHODS[method].rebuild(shown)[0, 0].cpu().numpy()
    return Examined(box, rebuilt, raw_maps(image, rebuilt))
