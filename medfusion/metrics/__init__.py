"""Measures of quality inside a mask, of overlap, and of the distance between two sets of volumes."""

from medfusion.metrics.generative import patch_distance
from medfusion.metrics.image import dice, psnr

__all__ = ["dice", "patch_distance", "psnr"]
