"""In which arithmetic networks run."""

from __future__ import annotations

import torch


def fast_bfloat16(device: torch.device) -> bool:
    """Whether half-width arithmetic is native there; elsewhere it is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def half_width(device: torch.device) -> torch.autocast:
    """Around a network: bfloat16 where that is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))
