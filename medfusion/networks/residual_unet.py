"""A residual U-Net without normalisation layers, on voxels folded 2x2x2 into channels, between thin layers on voxels.

Without normalisation a crop and the whole volume get the same answer, so the network may be trained on cubes and used
on heads. Folding costs one eighth of the compute at full resolution, but a filter on folded voxels is learnt eight
times, once for each place in the fold; the few channels on voxels learn it once (docs/decisions.md has the
measurements).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CONTEXT = 4  # channels that say where in the head a voxel lies (x, y, z) and what kind of image this is
ATLAS = (1, 2, 64, 64, 64)  # mean whole and mean skull-stripped image around the foreground's centroid
AIR = -1.0  # what the atlas shows where there is nothing
ATLAS_REACH = 1.28  # from the centre to the outermost atlas voxels, in the unit of the position channels (decimetres)
EMBEDDING = 64
DETAIL = 0.05  # below this noise (standard deviation) detail is no longer shown in units of the noise


def fold(x: Tensor) -> Tensor:
    """(b, c, d, h, w) to (b, 8 c, d/2, h/2, w/2)."""
    b, c, d, h, w = x.shape
    x = x.reshape(b, c, d // 2, 2, h // 2, 2, w // 2, 2)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, 8 * c, d // 2, h // 2, w // 2)


def unfold(x: Tensor) -> Tensor:
    """(b, 8 c, d, h, w) to (b, c, 2d, 2h, 2w), the inverse of ``fold``."""
    b, c, d, h, w = x.shape
    x = x.reshape(b, c // 8, 2, 2, 2, d, h, w)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // 8, 2 * d, 2 * h, 2 * w)


def _conv(channels: int, outputs: int) -> nn.Conv3d:
    return nn.Conv3d(channels, outputs, 3, padding=1)


class Residual(nn.Module):
    """x + conv(relu(modulated conv(x))); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter, self.leave = _conv(channels, channels), _conv(channels, channels)
        self.modulate = nn.Linear(EMBEDDING, 2 * channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """x (b, c, d, h, w) and the embedded noise level (b, EMBEDDING)."""
        scale, shift = self.modulate(level)[:, :, None, None, None].to(x.dtype).chunk(2, dim=1)
        return x + self.leave(F.relu(self.enter(x) * (1 + scale) + shift))


class ResidualUNet(nn.Module):
    """Additive skips, strided convolutions down, transposed ones up, the noise level by scale and shift.

    Parameters
    ----------
    channels : of each resolution level, the first at half the input's resolution.
    blocks : residual blocks of each level, on the way down and again on the way up.
    stem : channels of the layers on voxels, before folding and after unfolding; 0: there are none.
    outputs : answers for each image: 2 with learned variance.
    images : channels of the input: 1, or those of latents.
    located : whether it is shown the context: where in the head a voxel lies and what kind of image this is.
    labels : how many values the label map has that it is shown; 0: it is shown none.
    classes : how many classes it can be told; 0: it is told none.

    The buffer ``atlas`` is read at the position channels and shown to the network beside them: coordinates alone are
    learnt too slowly (after 900 steps a sample still had no outline of a head).
    """

    atlas: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        blocks: Sequence[int],
        outputs: int = 1,
        *,
        stem: int = 0,
        images: int = 1,
        located: bool = True,
        labels: int = 0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.multiple = 2 ** len(channels)  # every edge of the input is a multiple of this
        self.stem, self.images, self.located, self.labels = stem, images, located, labels
        self.recompute = False  # activations in the backward pass (gradient checkpointing)
        self.embed = nn.Sequential(
            nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU()
        )
        self.classes = nn.Embedding(classes + 1, EMBEDDING, padding_idx=0) if classes else None  # 0: not told
        if located:
            self.register_buffer("atlas", torch.zeros(ATLAS))
            self.register_state_dict_post_hook(_without_air)
            self.register_load_state_dict_pre_hook(_with_air)
        if stem:
            self.first, self.refine = _conv(2 * images, stem), Residual(stem)
            self.last = _conv(stem, images * outputs)
        self.head = _conv(sum(self.inputs().values()), channels[0])
        self.down = nn.ModuleList(
            nn.ModuleList(Residual(c) for _ in range(n)) for c, n in zip(channels, blocks, strict=True)
        )
        self.shrink = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in pairs)
        self.grow = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(
            nn.ModuleList(Residual(c) for _ in range(n)) for c, n in zip(channels[:-1], blocks[:-1], strict=True)
        )
        self.tail = nn.Conv3d(channels[0], 8 * stem, 1) if stem else _conv(channels[0], 8 * images * outputs)
        nn.init.zeros_((self.last if stem else self.tail).weight)

    def inputs(self) -> dict[str, int]:
        """What the first convolution is shown, in this order, and in how many channels."""
        return {
            "image": 8 * (self.stem or self.images),
            "context": (CONTEXT + ATLAS[1]) * self.located,
            "labels": 8 * self.labels,
        }

    def forward(
        self,
        x: Tensor,
        log_noise_ratio: Tensor,
        context: Tensor | None = None,
        labels: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> Tensor:
        """The answer, (b, outputs * images, d, h, w), to x (b, images, d, h, w) at log_noise_ratio (b,).

        Zeros in ``context`` (b, CONTEXT, d/2, h/2, w/2) and -1 in ``labels`` (b, d, h, w) and ``classes`` (b,), both
        integers, mean unknown, and so does None.
        """
        level = self.embed(fourier(log_noise_ratio))
        if self.classes is not None and classes is not None:
            level = level + self.classes(classes + 1)
        if self.stem:
            x = x.contiguous(memory_format=torch.channels_last_3d)
            x = self.first(torch.cat([x, detail(x, log_noise_ratio)], dim=1))
        shown = self._shown(fold(x), context, labels).contiguous(memory_format=torch.channels_last_3d)
        z = F.conv3d(shown, self.head.weight[:, : shown.shape[1]], self.head.bias, padding=1)
        skips = []
        for k, stage in enumerate(self.down):
            for block in stage.children():
                z = self._pass(block, z, level)
            if k < len(self.shrink):
                skips.append(z)
                z = self.shrink[k](z)
        for k in reversed(range(len(self.grow))):
            z = self.grow[k](z) + skips[k]
            for block in self.up[k].children():
                z = self._pass(block, z, level)
        answer = unfold(self.tail(z))
        if self.stem:
            x = x + answer.contiguous(memory_format=torch.channels_last_3d)
            answer = self.last(self._pass(self.refine, x, level))
        return answer

    def _pass(self, block: nn.Module, z: Tensor, level: Tensor) -> Tensor:
        again = self.recompute and torch.is_grad_enabled()
        return partial(checkpoint, block, use_reentrant=False)(z, level) if again else block(z, level)

    def _shown(self, z: Tensor, context: Tensor | None, labels: Tensor | None) -> Tensor:
        """The folded image and, in channels behind it, what is known beside it, unless nothing is."""
        shown, (b, _, *grid) = [z], z.shape
        told = labels is not None and self.labels > 0
        if self.located and (context is not None or told):
            context = z.new_zeros(b, CONTEXT, *grid) if context is None else context
            shown += [context.to(z), self.expected(context).to(z)]
        if labels is not None and told:
            values = torch.arange(self.labels, device=labels.device).view(1, -1, 1, 1, 1)
            shown.append(fold((labels[:, None] == values).to(z)))
        return torch.cat(shown, dim=1)

    def expected(self, context: Tensor) -> Tensor:
        """The atlas at the positions of ``context``, (b, 2, d, h, w); zeros where a sample's position is unknown."""
        position = context[:, :3].float()
        known = position.abs().flatten(1).amax(dim=1) > 0
        # grid_sample wants the last axis first, in units of the half width
        grid = position.flip(1).permute(0, 2, 3, 4, 1) / ATLAS_REACH
        atlas = self.atlas.float().expand(len(context), *ATLAS[1:])
        sampled = F.grid_sample(atlas, grid, padding_mode="border", align_corners=True)
        return sampled * known[:, None, None, None, None]


def _without_air(network: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Leave out the skull-stripped mean where no image was such, and it is air: half a megabyte of a prior's file."""
    atlas = state[f"{prefix}atlas"]
    if bool((atlas[:, 1:] == AIR).all()):
        state[f"{prefix}atlas"] = atlas[:, :1]


def _with_air(network: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """The inverse of ``_without_air``."""
    atlas = state.get(f"{prefix}atlas")
    if atlas is not None:
        state[f"{prefix}atlas"] = F.pad(atlas, (0, 0) * 3 + (0, ATLAS[1] - atlas.shape[1]), value=AIR)


def detail(x: Tensor, log_noise_ratio: Tensor) -> Tensor:
    """x less its local mean over 3x3x3 voxels, in units of the noise or, below it, of DETAIL."""
    variance = torch.sigmoid(2 * log_noise_ratio.float())[:, None, None, None, None]  # r^2 / (1 + r^2)
    mean = F.avg_pool3d(x, 3, stride=1, padding=1, count_include_pad=False)
    return (x - mean) * (variance + DETAIL**2).rsqrt().to(x.dtype)


def fourier(log_noise_ratio: Tensor) -> Tensor:
    """(b,) to (b, EMBEDDING): sines and cosines of log(sigma / alpha) with wavelengths from 0.5 to 64."""
    wavelength = 2.0 ** torch.linspace(-1, 6, EMBEDDING // 2, device=log_noise_ratio.device)
    phase = 2 * math.pi * log_noise_ratio.float()[:, None] / wavelength
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def adopt(network: ResidualUNet, other: ResidualUNet) -> None:
    """Begin with the weights of ``other``, which has the same channels, stem and blocks.

    Inputs that only ``network`` has start with weights of zero and those that only ``other`` has are left out, as if
    they had been withheld, and classes likewise unless both have as many; so the two give the same answers where
    nothing but the image is known.

    Raises
    ------
    ValueError : the two differ in their layers.
    """

    def layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: w for name, w in state.items() if not name.startswith(("head.weight", "atlas", "classes"))}

    weights, own = other.state_dict(), network.state_dict()
    if {n: w.shape for n, w in layers(weights).items()} != {n: w.shape for n, w in layers(own).items()}:
        raise ValueError("the networks differ in channels, stem, blocks or outputs")
    head = torch.zeros_like(own["head.weight"])
    theirs, begin, end = other.inputs(), 0, 0
    for name, size in network.inputs().items():
        shared = min(size, theirs[name])
        head[:, begin : begin + shared] = weights["head.weight"][:, end : end + shared]
        begin, end = begin + size, end + theirs[name]
    taken = layers(weights) | {"head.weight": head}
    if network.classes is not None:
        embedded = weights.get("classes.weight", torch.empty(0))
        known = embedded.shape == network.classes.weight.shape
        taken["classes.weight"] = embedded if known else torch.zeros_like(network.classes.weight)
    network.load_state_dict(taken, strict=False)
