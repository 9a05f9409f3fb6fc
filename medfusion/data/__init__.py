"""From Volume to tensor and back: grids, intensities, noise, training crops."""
