"""CycleGAN: two translators that undo each other, each with a discriminator of its target (Zhu et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from medfusion.networks.adversarial import SLOPE
from medfusion.objectives.adversarial import Game, discriminator_loss, generator_loss, penalty

GAME: Game = "nonsaturating"


class Translator(nn.Module):
    """MONAI's residual U-Net says what is added to images (b, 1, d, h, w), whose edges are multiples of ``factor``."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        from monai.networks.nets import UNet

        self.factor = 2 ** (len(channels) - 1)
        strides = [2] * (len(channels) - 1)
        # without a norm, which would make a voxel depend on how much air the volume has: it is trained on crops
        self.unet = UNet(3, 1, channels[0], channels, strides, num_res_units=2, act=SLOPE, norm=None)  # type: ignore[arg-type]
        self.last = nn.Conv3d(channels[0], 1, 1)
        nn.init.zeros_(self.last.weight)  # it begins as the identity
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, image: Tensor) -> Tensor:
        """The image as the other domain would show it."""
        change: Tensor = self.last(self.unet(image))
        return image + change


class CycleGan(nn.Module):
    """``translators[k]`` takes images of domain k to the other one, ``discriminators[k]`` tells images of domain k."""

    def __init__(self, channels: Sequence[int], layers: int) -> None:
        super().__init__()
        from monai.networks.nets import PatchDiscriminator

        self.translators = nn.ModuleList([Translator(channels) for _ in range(2)])
        self.discriminators = nn.ModuleList(
            # without a norm, as in ``Adversarial``: MONAI takes None, whatever its annotation says
            [PatchDiscriminator(3, channels[0], 1, num_layers_d=layers, norm=None, bias=True) for _ in range(2)]  # type: ignore[arg-type]
        )

    def forward(self, pairs: Tensor, cycle: float, identity: float, weight: float) -> Tensor:
        """(b,) what all four networks lose on pairs (b, 2, d, h, w) of images that have nothing else in common.

        Adversarial losses as in ``Adversarial``, means over patches; ``cycle`` times the mean absolute error of there
        and back; ``identity`` times that of an image that is in the target domain already; ``weight`` times R1.
        """
        images = pairs[:, :1], pairs[:, 1:]
        total = torch.zeros(len(pairs), device=pairs.device)
        for k, image in enumerate(images):
            there, back, target = self.translators[k], self.translators[1 - k], images[1 - k]
            translated = there(image)
            total = total + cycle * _error(back(translated), image) + identity * _error(there(target), target)
            judge = self.discriminators[1 - k]
            constants = {name: value.detach() for name, value in judge.named_parameters()}
            verdict = _patches(partial(functional_call, judge, constants), translated)
            judged = _patches(judge, target), _patches(judge, translated.detach())
            total = total + (generator_loss(verdict, GAME) + discriminator_loss(*judged, GAME)).mean(dim=1)
            if weight:
                total = total + weight * penalty(partial(_spread_over_patches, judge), target, GAME)
        return total


def _error(a: Tensor, b: Tensor) -> Tensor:
    return F.l1_loss(a.float(), b.float(), reduction="none").flatten(1).mean(dim=1)


def _patches(judge: Callable[[Tensor], list[Tensor]], image: Tensor) -> Tensor:
    """(b, patches) logits; MONAI's discriminator returns its layers, the logits last."""
    return judge(image)[-1].float().flatten(1)


def _spread_over_patches(judge: Callable[[Tensor], list[Tensor]], image: Tensor) -> Tensor:
    """(b,) whose squared gradient is the mean of those of the patches, where these do not overlap."""
    logits = _patches(judge, image)
    return logits.sum(dim=1) / logits.shape[1] ** 0.5
