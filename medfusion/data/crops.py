"""Training crops: preprocessed scans in memory, and the batch of step k as a function of (seed, k) alone.

A batch that depends on nothing but the seed and the step makes resuming exact without storing any random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from medfusion.config import DataConfig, PreprocessingConfig
from medfusion.data.grid import canonical, resampled
from medfusion.data.intensity import SEEN, centre_of, foreground, measure_scale
from medfusion.volume import Volume

WHOLE_HEAD, STRIPPED = 1.0, -1.0
POSITION_SCALE = 0.01  # position channels are in decimetres from the foreground's centroid
POSITION_JITTER = 5.0  # mm: the centroid of a scan with another field of view lies elsewhere
POSITION_UNKNOWN, KIND_UNKNOWN = 0.3, 0.5  # shares of the crops for which the network is not told
GAIN, GAMMA = 0.08, 0.1  # standard deviations of the log of brightness and contrast changes: other scanners
ZOOMED = 0.25  # share, of the crops without position, that show finer voxels (down to half the prior's spacing)
AIR = -0.9  # a crop whose mean is below this is all but air


@dataclass(frozen=True)
class Case:
    """One scan as the prior sees it: (d, h, w) half precision, RAS axes, scaled; plus what its context is made of."""

    name: str
    image: Tensor
    centre: NDArray[np.float64]
    spacing: float
    kind: float


class Batch(NamedTuple):
    """images (b, 1, d, h, w) and context (b, 4, d/2, h/2, w/2), float32."""

    images: Tensor
    context: Tensor


def prepare(volume: Volume, config: PreprocessingConfig, kind: float = WHOLE_HEAD) -> Case:
    """Reorient, resample and scale one scan, as every task does before it asks the prior."""
    volume = resampled(canonical(volume), config.spacing)
    scale = measure_scale(volume.array, config.percentile, volume.name)
    image = torch.from_numpy(scale.apply(volume.array)).clamp(*SEEN).half()
    return Case(volume.name, image, centre_of(foreground(volume.array)), config.spacing, kind)


def stripped(volume: Volume, mask: NDArray[np.bool_]) -> Volume:
    """The scan with everything outside the brain set to its background, closed over the sulci as strippers do."""
    mask = ndimage.binary_closing(np.pad(mask, 4), iterations=3)[4:-4, 4:-4, 4:-4]
    mask = ndimage.binary_fill_holes(ndimage.binary_dilation(mask))
    return volume.with_array(np.where(mask, volume.array, volume.array.min()))


def context_channels(
    shape: Sequence[int], corner: Sequence[float], centre: NDArray[np.float64] | None, spacing: float, kind: float
) -> Tensor:
    """(4, d/2, h/2, w/2): x, y, z in decimetres from ``centre`` (zeros when None), and the kind of image (0 unknown).

    ``corner`` is the voxel index at which a block of ``shape`` voxels begins.
    """
    context = torch.zeros(4, *[n // 2 for n in shape])
    context[3] = kind
    if centre is not None:
        for axis, n in enumerate(shape):
            index = torch.arange(n // 2) * 2 + 0.5 + corner[axis]
            line = (index - float(centre[axis])) * spacing * POSITION_SCALE
            context[axis] = line.view([-1 if a == axis else 1 for a in range(3)])
    return context


def mean_atlas(cases: Sequence[Case], shape: Sequence[int], reach: float) -> Tensor:
    """(1, 2, n, n, n): mean of the whole and of the skull-stripped images, air where there are none.

    ``shape`` is that of the result; its outermost voxels lie ``reach`` position units from the foreground's centroid.
    """
    atlas = torch.full(tuple(shape), -1.0)
    line = torch.linspace(-reach, reach, shape[-1]) / POSITION_SCALE
    for channel, kind in enumerate((WHOLE_HEAD, STRIPPED)):
        chosen = [case for case in cases if case.kind == kind]
        total = torch.zeros(tuple(shape[2:]))
        for case in chosen:
            # millimetres from the centroid to grid_sample's -1 to 1 over the centres of the outermost voxels
            axes = [
                2 * (line / case.spacing + float(c)) / (n - 1) - 1
                for c, n in zip(case.centre, case.image.shape, strict=True)
            ]
            grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)
            image = case.image.float()[None, None]
            total += F.grid_sample(image, grid[None], padding_mode="border", align_corners=True)[0, 0]
        if chosen:
            atlas[0, channel] = total / len(chosen)
    return atlas


def draw_batch(cases: Sequence[Case], config: DataConfig, size: int, *, seed: int, step: int) -> Batch:
    """``size`` random crops for training step ``step``."""
    rng = np.random.default_rng((seed, step))
    kinds = {kind: [c for c in cases if c.kind == kind] for kind in (WHOLE_HEAD, STRIPPED)}
    crops = []
    for _ in range(size):
        kind = STRIPPED if kinds[STRIPPED] and rng.random() < config.stripped_share else WHOLE_HEAD
        pool = kinds[kind] or cases
        crops.append(_draw_crop(pool[int(rng.integers(len(pool)))], config.crop, rng))
    images, contexts = zip(*crops, strict=True)
    return Batch(torch.stack(images), torch.stack(contexts))


def _draw_crop(case: Case, edge: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    located = rng.random() >= POSITION_UNKNOWN
    size = edge if located or rng.random() >= ZOOMED else int(rng.integers(edge // 2, edge))
    image = _at_least(case.image, size)
    for _ in range(10):
        corner = [int(rng.integers(n - size + 1)) for n in image.shape]
        crop = image[tuple(slice(c, c + size) for c in corner)].float()
        if crop.mean() > AIR:
            break
    if size != edge:
        crop = F.interpolate(crop[None, None], size=(edge,) * 3, mode="trilinear", align_corners=False)[0, 0]
    centre = case.centre + rng.normal(0, POSITION_JITTER / case.spacing, 3) if located else None
    kind = 0.0 if rng.random() < KIND_UNKNOWN else case.kind
    context = context_channels((edge,) * 3, corner, centre, case.spacing, kind)
    if rng.random() < 0.5:  # left and right: axis 0 of RAS; the x channel changes its sign
        crop, context = crop.flip(0), context.flip(1)
        context[0] = -context[0]
    return _recontrast(crop, rng)[None], context


def _recontrast(crop: Tensor, rng: np.random.Generator) -> Tensor:
    gain, gamma = np.exp(rng.normal(0, (GAIN, GAMMA)))
    brightness = (crop + 1) / 2
    return 2 * gain * brightness.sign() * brightness.abs() ** gamma - 1


def _at_least(image: Tensor, size: int) -> Tensor:
    """Edge-padded on the far side of any axis shorter than ``size``."""
    missing = [max(0, size - n) for n in image.shape]
    if not any(missing):
        return image
    pad = [value for m in reversed(missing) for value in (0, m)]
    return F.pad(image[None, None].float(), pad, mode="replicate")[0, 0].to(image.dtype)


def validation_batches(cases: Sequence[Case], config: DataConfig, seed: int) -> list[Batch]:
    """One fixed crop of each held-out case, without changes of contrast, flips or gaps in the context."""
    batches = []
    for index, case in enumerate(cases):
        rng = np.random.default_rng((seed, index))
        image = _at_least(case.image, config.crop)
        corner = [int(rng.integers(n - config.crop + 1)) for n in image.shape]
        crop = image[tuple(slice(c, c + config.crop) for c in corner)].float()
        context = context_channels((config.crop,) * 3, corner, case.centre, case.spacing, case.kind)
        batches.append(Batch(crop[None, None], context[None]))
    return batches


def split(cases: Sequence[Case], held_out: int, seed: int) -> tuple[list[Case], list[Case]]:
    """Training and validation cases; a scan and its skull-stripped twin (same name) stay on the same side."""
    names = sorted({case.name for case in cases})
    chosen = set(np.random.default_rng(seed).permutation(names)[:held_out])
    return [c for c in cases if c.name not in chosen], [c for c in cases if c.name in chosen]
