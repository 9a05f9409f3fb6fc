"""medfusion: one diffusion prior for denoising, anomaly detection and augmentation of 3D MRI and CT."""

__version__ = "0.1.0"
