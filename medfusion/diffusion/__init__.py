"""The diffusion core: one mathematics for DDPM, score matching and SDEs, tested against closed forms (docs/theory.md).

process     VP, sub-VP, VE: how an image becomes noise
denoiser    a network and how to read it: x_0 = denoise(x_t, t)
objectives  what a network is trained to make small
samplers    from noise to images
noise_level  which level of noise an image has, by the prior's own residual
flow        the probability-flow ODE: encoding, decoding, likelihood
guidance    classes, one's own guidance, inpainting
mixture     the Gaussian mixture whose answers are closed forms

It imports torch and scipy, and receives any callable as a network.
"""

from medfusion.diffusion.denoiser import Denoiser, Guidance, Network, Prediction, Variance, separate, target
from medfusion.diffusion.flow import bits_per_dimension, log_likelihood, probability_flow
from medfusion.diffusion.guidance import classifier_free, classifier_guided, inpaint
from medfusion.diffusion.mixture import GaussianMixture
from medfusion.diffusion.noise_level import Residual, noise_ratio, residual
from medfusion.diffusion.objectives import (
    ImportanceSampler,
    bound_term,
    hybrid_loss,
    lognormal_times,
    prior_term,
    regression_loss,
    variational_bound,
)
from medfusion.diffusion.process import VE, VP, Process, SubVP, expand, ncsn_ratio, noise_like
from medfusion.diffusion.samplers import (
    annealed_langevin,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    heun,
    langevin,
    predictor_corrector,
    time_steps,
)

__all__ = [
    "VE",
    "VP",
    "Denoiser",
    "GaussianMixture",
    "Guidance",
    "ImportanceSampler",
    "Network",
    "Prediction",
    "Process",
    "Residual",
    "SubVP",
    "Variance",
    "annealed_langevin",
    "bits_per_dimension",
    "bound_term",
    "classifier_free",
    "classifier_guided",
    "ddim",
    "ddpm",
    "dpm_solver",
    "euler_maruyama",
    "expand",
    "heun",
    "hybrid_loss",
    "inpaint",
    "langevin",
    "log_likelihood",
    "lognormal_times",
    "ncsn_ratio",
    "noise_like",
    "noise_ratio",
    "predictor_corrector",
    "prior_term",
    "probability_flow",
    "regression_loss",
    "residual",
    "separate",
    "target",
    "time_steps",
    "variational_bound",
]
