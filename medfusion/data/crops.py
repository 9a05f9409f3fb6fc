"""Training crops: preprocessed scans, and crop number n as a function of (seed, n) alone.

A crop that depends on nothing but the seed and its number makes resuming exact without storing any random state, and
gives several devices, workers or parts of a batch the same crops as one.
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
from medfusion.data.contrast import paint, random_curve, remap
from medfusion.data.grid import canonical, nearest, resampled
from medfusion.data.intensity import SEEN, centre_of, foreground, measure_scale
from medfusion.volume import Volume

WHOLE_HEAD, STRIPPED = 1.0, -1.0
UNKNOWN = -1  # of labels and classes
POSITION_SCALE = 0.01  # position channels are in decimetres from the foreground's centroid
POSITION_JITTER = 5.0  # mm: the centroid of a scan with another field of view lies elsewhere
KIND_UNKNOWN = 0.5  # share of the crops for which the network is not told whether they are skull-stripped
GAIN, GAMMA = 0.08, 0.1  # standard deviations of the log of brightness and contrast changes: other scanners
AIR = -0.9  # a crop whose mean is below this is all but air


@dataclass(frozen=True)
class Case:
    """One scan as the prior sees it: (d, h, w) half precision, RAS axes, scaled; plus what its context is made of.

    ``labels`` are its label map on the same grid (uint8 or int16), ``class_index`` its class or UNKNOWN.
    ``resident`` is the image again, on the device that trains, where it was moved there.
    """

    name: str
    image: Tensor
    centre: NDArray[np.float64]
    spacing: float
    kind: float
    labels: Tensor | None = None
    class_index: int = UNKNOWN
    resident: Tensor | None = None


class Crop(NamedTuple):
    """One crop, or a batch of them with an axis in front.

    image (1, d, h, w) float32; context (4, d/2, h/2, w/2); labels (d, h, w), UNKNOWN where withheld, or None where
    the cases have none; class_index (), int64.
    """

    image: Tensor
    context: Tensor
    labels: Tensor | None
    class_index: Tensor


def stack(crops: Sequence[Crop]) -> Crop:
    """A batch."""
    images, contexts, labels, classes = zip(*crops, strict=True)
    maps = None if labels[0] is None else torch.stack(labels)
    return Crop(torch.stack(images), torch.stack(contexts), maps, torch.stack(classes))


def prepare(
    volume: Volume,
    config: PreprocessingConfig,
    kind: float = WHOLE_HEAD,
    labels: Volume | None = None,
    class_index: int = UNKNOWN,
) -> Case:
    """Reorient, resample and scale one scan, as every task does before it asks the prior; its label map likewise."""
    upright = canonical(volume)
    volume = resampled(upright, config.spacing)
    scale = measure_scale(volume.array, config.percentile, volume.name)
    image = torch.from_numpy(scale.apply(volume.array)).clamp(*SEEN).half()
    regions = None
    if labels is not None:
        regions = torch.from_numpy(nearest(canonical(labels), volume))
    centre = centre_of(foreground(volume.array))
    return Case(volume.name, image, centre, config.spacing, kind, regions, class_index)


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
            # what is not finite would enter every crop; the losses of the scan itself shall tell
            image = torch.nan_to_num(case.image.float(), -1.0, -1.0, -1.0)[None, None]
            total += F.grid_sample(image, grid[None], padding_mode="border", align_corners=True)[0, 0]
        if chosen:
            atlas[0, channel] = total / len(chosen)
    return atlas


class Crops:
    """The endless training set of a list of cases: ``crops.draw(n)`` is crop number n."""

    def __init__(self, cases: Sequence[Case], config: DataConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        kinds = {kind: [c for c in cases if c.kind == kind] for kind in (WHOLE_HEAD, STRIPPED)}
        self.whole, self.stripped = (_by_labels(pool) for pool in (kinds[WHOLE_HEAD] or cases, kinds[STRIPPED]))
        self.mapped = any(case.labels is not None for case in cases)

    def generator(self, number: int) -> np.random.Generator:
        """All that is random about crop ``number``, its noise included (``medfusion.training.batches``)."""
        return np.random.default_rng((self.seed, number))

    def case(self, rng: np.random.Generator) -> Case:
        """The scan from which the generator's next draws cut a crop."""
        kind = self.stripped if any(self.stripped) and rng.random() < self.config.stripped_share else self.whole
        labelled, unlabelled = kind
        if labelled and unlabelled:
            pool = labelled if rng.random() < self.config.labelled_share else unlabelled
        else:
            pool = labelled or unlabelled
        return pool[int(rng.integers(len(pool)))]

    def cases(self, number: int) -> list[Case]:
        """The scan that crop ``number`` is cut from."""
        return [self.case(self.generator(number))]

    def draw(self, number: int, *, located: bool) -> tuple[Crop, np.random.Generator]:
        """Crop ``number`` and its generator, to draw the noise from; the crop lies where the cases' images are.

        ``located`` : whether the network can be told positions.
        """
        rng = self.generator(number)
        crop = _draw_crop(self.case(rng), self.config, rng, located)
        if crop.labels is None and self.mapped:
            crop = crop._replace(labels=torch.full_like(crop.image[0], UNKNOWN, dtype=torch.long))
        return crop, rng


class Pairs:
    """The endless training set of two domains: a crop of each, as two channels of one image, and nothing told of them.

    A case's domain is its ``class_index``, 0 or 1.
    """

    def __init__(self, cases: Sequence[Case], config: DataConfig, seed: int) -> None:
        domains = ([c for c in cases if c.class_index == k] for k in range(2))
        self.domains = [Crops(domain, config, seed + k) for k, domain in enumerate(domains)]

    def cases(self, number: int) -> list[Case]:
        """The scan of each domain that pair ``number`` is cut from."""
        return [case for crops in self.domains for case in crops.cases(number)]

    def draw(self, number: int, *, located: bool) -> tuple[Crop, np.random.Generator]:
        """As ``Crops``; the generator is the first domain's."""
        (first, rng), (second, _) = (crops.draw(number, located=False) for crops in self.domains)
        return first._replace(image=torch.cat([first.image, second.image])), rng


def paired(crops: Sequence[Crop]) -> list[Crop]:
    """Validation crops (batches of one) of two domains as pairs, as many as the smaller one has."""
    first, second = ([crop for crop in crops if int(crop.class_index) == k] for k in range(2))
    return [a._replace(image=torch.cat([a.image, b.image], dim=1)) for a, b in zip(first, second, strict=False)]


def _by_labels(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Those with a label map, and those without."""
    return [c for c in cases if c.labels is not None], [c for c in cases if c.labels is None]


def _draw_crop(case: Case, config: DataConfig, rng: np.random.Generator, located: bool) -> Crop:
    edge = config.crop
    located = bool(located and rng.random() < config.located_share)
    zoomed = not located and rng.random() < config.zoomed_share
    size = int(rng.integers(edge // 2, edge)) if zoomed else edge
    corner, place = _place(_at_least(case.image, size), size, rng)
    image = _at_least(case.image if case.resident is None else case.resident, size)
    crop = image[place].float()
    labels = None if case.labels is None else _at_least(case.labels, size)[place]
    crop = _other_contrast(crop, labels, config, rng)
    if zoomed:
        crop = F.interpolate(crop[None, None], size=(edge,) * 3, mode="trilinear", align_corners=False)[0, 0]
        if labels is not None:
            labels = F.interpolate(labels[None, None].float(), size=(edge,) * 3, mode="nearest-exact")[0, 0].long()
    centre = case.centre + rng.normal(0, POSITION_JITTER / case.spacing, 3) if located else None
    kind = 0.0 if rng.random() < KIND_UNKNOWN else case.kind
    context = context_channels((edge,) * 3, corner, centre, case.spacing, kind).to(image.device)
    class_index = torch.tensor(case.class_index, device=image.device)
    if rng.random() < config.withheld_share:
        labels = None if labels is None else torch.full_like(labels, UNKNOWN, dtype=torch.long)
        class_index = torch.full_like(class_index, UNKNOWN)
    crop, context, labels = _flip(crop, context, labels, config.flips, rng)
    return Crop(crop[None], context, None if labels is None else labels.long(), class_index)


def _place(image: Tensor, size: int, rng: np.random.Generator) -> tuple[list[int], tuple[slice, ...]]:
    """A random cube of ``size`` voxels in ``image``, not all of it air if ten tries find such a one.

    The image is on the CPU: a question to a GPU would wait for all that it has queued.
    """
    for _ in range(10):
        corner = [int(rng.integers(n - size + 1)) for n in image.shape]
        place = tuple(slice(c, c + size) for c in corner)
        if image[place][::4, ::4, ::4].mean(dtype=torch.float32) > AIR:
            break
    return corner, place


def _flip(
    crop: Tensor, context: Tensor, labels: Tensor | None, flips: str, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mirror along random axes of those allowed; the position channel of a mirrored axis changes its sign."""
    axes = [axis for axis, name in enumerate("xyz") if name in flips and rng.random() < 0.5]  # of RAS
    crop, context = crop.flip(axes), context.flip([axis + 1 for axis in axes])
    context[axes] *= -1
    return crop, context, None if labels is None else labels.flip(axes)


def _other_contrast(crop: Tensor, labels: Tensor | None, config: DataConfig, rng: np.random.Generator) -> Tensor:
    chosen = rng.random()
    if labels is not None and chosen < config.painted_share:
        return paint(crop, labels, rng)
    if chosen < config.painted_share + config.remapped_share:
        return remap(crop, random_curve(rng))
    if not config.varied:
        return crop
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


def validation_crops(cases: Sequence[Case], config: DataConfig, seed: int) -> list[Crop]:
    """One fixed crop of each held-out case, as a batch of one: as it is, and with all that is known about it."""
    crops = []
    for index, case in enumerate(cases):
        rng = np.random.default_rng((seed, index))
        image = _at_least(case.image, config.crop)
        corner, place = _place(image, config.crop, rng)
        context = context_channels((config.crop,) * 3, corner, case.centre, case.spacing, case.kind)
        labels = None if case.labels is None else _at_least(case.labels, config.crop)[place].long()
        crops.append(stack([Crop(image[place].float()[None], context, labels, torch.tensor(case.class_index))]))
    return crops


def split(cases: Sequence[Case], held_out: int, seed: int, *, domains: bool = False) -> tuple[list[Case], list[Case]]:
    """Training and validation cases; a scan and its skull-stripped twin (same name) stay on the same side.

    Where enough scans have no label map, the held-out ones are of those: label maps are dear. With ``domains`` so many
    are held out of each.
    """
    if domains:
        parts = [split([c for c in cases if c.class_index == k], held_out, seed) for k in range(2)]
        return [c for training, _ in parts for c in training], [c for _, validation in parts for c in validation]
    names = sorted({case.name for case in cases})
    unlabelled = sorted({case.name for case in cases if case.labels is None})
    names = unlabelled if held_out <= len(unlabelled) < len(names) else names
    chosen = set(np.random.default_rng(seed).permutation(names)[:held_out])
    return [c for c in cases if c.name not in chosen], [c for c in cases if c.name in chosen]
