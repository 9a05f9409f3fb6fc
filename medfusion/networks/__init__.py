"""Networks."""

from medfusion.networks.residual_unet import ResidualUNet

__all__ = ["ResidualUNet"]
