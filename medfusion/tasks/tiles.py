"""A large volume in cubes: each is worked on with its surroundings, and neighbours are blended where they meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product

import torch
from torch import Tensor

HALO = 16  # voxels of a cube's surroundings that are shown with it
BLEND = 8  # voxels on either side of where two cubes meet, over which one fades into the other
PACE = 16  # cubes begin at multiples of it, so that the network's strides fall on the same voxels as in the whole


def tiled(work: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """``work(x)`` for x (b, c, d, h, w), an answer (b, 1, d, h, w) on the CPU, in cubes of about ``tile`` voxels.

    Where no answer depends on what is more than HALO voxels away it is the same as that to the whole.
    """
    shape = x.shape[2:]
    pieces = [_pieces(n, tile) for n in shape]
    if all(len(along) == 1 for along in pieces):
        return work(x).cpu()
    whole = torch.zeros(len(x), 1, *shape)
    for along in product(*pieces):
        shown = tuple(slice(begin, end) for begin, end, _ in along)
        d, h, w = (weight for _, _, weight in along)
        weights = d[:, None, None] * h[:, None] * w
        whole[:, :, *shown] += weights * work(x[:, :, *shown]).cpu()
    return whole


def _pieces(n: int, tile: int) -> list[tuple[int, int, Tensor]]:
    """Begin and end of what is shown along one axis, and the weight of each voxel; at each place they sum to 1."""
    step = PACE * math.ceil(n / math.ceil(n / tile) / PACE)
    cuts = [*range(0, n, step), n]
    found = []
    for begin, end in pairwise(cuts):
        low, high = max(0, begin - HALO), min(n, end + HALO)
        place = torch.arange(low, high) + 0.5
        rising = ((place - begin) / (2 * BLEND) + 0.5).clamp(0, 1) if begin > 0 else torch.ones(high - low)
        falling = ((end - place) / (2 * BLEND) + 0.5).clamp(0, 1) if end < n else torch.ones(high - low)
        found.append((low, high, rising * falling))
    return found
