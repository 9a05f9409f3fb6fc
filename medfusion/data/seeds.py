"""Seeds: a generator for each case, so that batch size, order and sharding never change a case's noise."""

from __future__ import annotations

import hashlib

import torch


def case_generator(seed: int, case: str, draw: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, case name, draw) alone."""
    digest = hashlib.sha256(f"{seed}/{case}/{draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
