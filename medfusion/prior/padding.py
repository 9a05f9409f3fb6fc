"""Images are replicated on the far side up to the sizes that a network takes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def far_side(padding: Sequence[int]) -> list[int]:
    """Of each axis, as ``F.pad`` takes it."""
    return [value for p in reversed(padding) for value in (0, p)]


def grown(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Replicated by ``padding`` as ``far_side`` returns it; integers stay integers."""
    if not any(padding):
        return x
    real = x if x.is_floating_point() else x.float()  # integers cannot be replicated
    return F.pad(real, list(padding), mode="replicate").to(x.dtype)


def grown_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Replicated on the far side up to ``shape``."""
    return grown(x, far_side([n - m for n, m in zip(shape, x.shape[2:], strict=True)]))
