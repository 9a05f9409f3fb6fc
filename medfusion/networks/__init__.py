"""Networks."""

from medfusion.networks.adversarial import Adversarial
from medfusion.networks.autoencoder import Autoencoder, on_latents
from medfusion.networks.cyclegan import CycleGan
from medfusion.networks.residual_unet import ResidualUNet, adopt

__all__ = ["Adversarial", "Autoencoder", "CycleGan", "ResidualUNet", "adopt", "on_latents"]
