"""Losses of the families beside diffusion, on tensors alone: no network, no config."""
