"""The segmenter by which synthetic training data are judged: one network and one recipe, whatever it is trained on.

MONAI's residual U-Net on volumes in the prior's units, with the classical augmentation of nnU-Net (Isensee et al. 2021,
supplement): what a generator adds must come on top of that. The number of steps does not depend on the number of cases,
so a larger training set is no longer training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfusion.config import PreprocessingConfig, SegmenterConfig
from medfusion.data.crops import Case, prepare
from medfusion.io.companions import read_labels
from medfusion.io.training_set import TrainingCase, read_scan
from medfusion.metrics import dice

if TYPE_CHECKING:
    from monai.transforms import Compose

MULTIPLE = 8  # of every edge that the network is shown: it halves three times


def train_segmenter(
    pools: Sequence[Sequence[Case]],
    classes: int,
    config: SegmenterConfig,
    *,
    seed: int,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A network trained on labelled cases.

    Parameters
    ----------
    pools : of cases, real and synthetic ones for instance; each gives as many crops as the others.
    classes : values of the label maps, 0 (background) included.
    seed : of the first weights, the order and the augmentation.
    """
    from monai.losses import DiceCELoss

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_segmenter(classes, config).to(device)
    augment = classical_augmentation([case for pool in pools for case in pool], config)
    augment.set_random_state(seed)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps)
    turns = cycle([_endless(pool, np.random.default_rng((seed, number))) for number, pool in enumerate(pools)])
    for _ in range(config.steps):
        drawn = [augment(_pair(next(next(turns)))) for _ in range(config.batch)]
        image, labels = (torch.stack([one[key].as_tensor() for one in drawn]).to(device) for key in ("image", "labels"))
        optimizer.zero_grad()
        criterion(network(image), labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def _endless(cases: Sequence[Case], rng: np.random.Generator) -> Iterator[Case]:
    """All cases in random order, again and again."""
    while True:
        for index in rng.permutation(len(cases)):
            yield cases[index]


def build_segmenter(classes: int, config: SegmenterConfig) -> nn.Module:
    """The network, freshly initialised."""
    from monai.networks.nets import UNet

    network: nn.Module = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=classes,
        channels=config.channels,
        strides=(2,) * (len(config.channels) - 1),
        num_res_units=2,
    )
    return network


@torch.no_grad()
def segment(network: nn.Module, image: Tensor) -> NDArray[np.uint8]:
    """The label map (d, h, w) of an image (d, h, w) in the prior's units."""
    device = next(network.parameters()).device
    padding = [value for n in reversed(image.shape) for value in (0, -n % MULTIPLE)]
    shown = nn.functional.pad(image[None, None].float(), padding, mode="replicate").to(device)
    d, h, w = map(slice, image.shape)
    labels: NDArray[np.uint8] = network(shown)[0].argmax(dim=0)[d, h, w].byte().cpu().numpy()
    return labels


def classical_augmentation(cases: Sequence[Case], config: SegmenterConfig) -> Compose:
    """Affine, blur, noise, brightness, contrast, gamma and mirroring with nnU-Net's ranges, then one crop."""
    from monai import transforms as t

    both = ["image", "labels"]
    edges = np.max([case.image.shape for case in cases], axis=0)
    size = [min(config.crop, int(-(-n // MULTIPLE) * MULTIPLE)) for n in edges]
    turn = np.deg2rad(30)
    return t.Compose(
        [
            t.RandAffined(
                both,
                prob=0.4,
                rotate_range=(turn,) * 3,
                scale_range=((-0.3, 0.4),) * 3,
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            t.SpatialPadd(both, size, mode="edge"),
            t.RandSpatialCropd(both, size, random_size=False),
            *([t.RandFlipd(both, prob=0.5, spatial_axis=0)] if config.flips else []),
            t.RandGaussianNoised("image", prob=0.1, std=0.1),
            t.RandGaussianSmoothd("image", prob=0.2, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1)),
            t.RandScaleIntensityd("image", prob=0.15, factors=0.25),
            t.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        ]
    )


def _pair(case: Case) -> dict[str, Tensor]:
    """What MONAI's transforms take: channels first."""
    assert case.labels is not None
    return {"image": case.image.float()[None], "labels": case.labels.float()[None]}


def mean_dice(found: NDArray[np.uint8], labels: Tensor | None, classes: int) -> float:
    """Over the labels 1 to ``classes`` - 1 that are in one of the two maps; 1 where none is."""
    assert labels is not None
    truth = labels.numpy()
    values = [dice(truth == k, found == k) for k in range(1, classes) if (truth == k).any() or (found == k).any()]
    return float(np.mean(values)) if values else 1.0


def prepared(case: TrainingCase, config: PreprocessingConfig) -> Case:
    """A case of a training set as priors and segmenters see it."""
    scan = read_scan(case)
    return prepare(scan, config, labels=read_labels(case.labels, scan) if case.labels else None)
