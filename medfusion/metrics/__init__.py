"""Measures of quality inside a mask, and of overlap."""

from medfusion.metrics.image import dice, psnr

__all__ = ["dice", "psnr"]
