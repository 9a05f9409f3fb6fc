"""Training."""

from medfusion.training.loop import train
from medfusion.training.scans import load_cases

__all__ = ["load_cases", "train"]
