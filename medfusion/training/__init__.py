"""Training."""

from medfusion.training.loop import train

__all__ = ["train"]
