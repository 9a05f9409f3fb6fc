"""Training."""

from medfusion.training.loop import read_checkpoint, train
from medfusion.training.scans import load_cases

__all__ = ["load_cases", "read_checkpoint", "train"]
