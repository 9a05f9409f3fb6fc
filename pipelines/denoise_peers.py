"""What users pick today, each with the settings that are its best or its own, for `pipelines/denoise.py`.

scikit-image NLM: patch 5, distance 4, h = 0.6 sigma, the best of a sweep on the MNI template. dipy nlmeans: its default
(blockwise) and the slower classic method (patch 1, block 5). ANTs: patch 1, search 2; it estimates the noise itself. TV
(Chambolle): the best weight of ten, picked by the truth, in its favour; its seconds are those of all ten. Wavelets:
BayesShrink with db2, mean over shifts. BM4D: its default; its licence allows measurements, no use in a product.

None but dipy and ANTs know of Rician noise: the results of the others go through the inverse of the Rician mean.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medfusion.data.rician import rice_mean
from medfusion.metrics import psnr
from medfusion.volume import Volume

THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
Method = Callable[["Noisy"], np.ndarray]


@dataclass(frozen=True)
class Noisy:
    """A scan with noise: ``code`` as "g5", ``sigma``, ``rician`` or not; and the truth, which a peer may look at."""

    volume: Volume
    code: str
    sigma: float
    rician: bool
    truth: np.ndarray
    mask: np.ndarray

    @property
    def array(self) -> np.ndarray:
        """The noisy voxels."""
        return self.volume.array


def unbiased(image: np.ndarray, noisy: Noisy) -> np.ndarray:
    """For methods that know Gaussian noise alone: the amplitudes that have these mean magnitudes."""
    if not noisy.rician:
        return image
    amplitudes = np.linspace(0, 40, 8001)
    return noisy.sigma * np.interp(image / noisy.sigma, rice_mean(amplitudes), amplitudes, left=0.0)


def skimage_nlm(noisy: Noisy) -> np.ndarray:
    """Non-local means, the fast variant."""
    from skimage.restoration import denoise_nl_means

    options = {"patch_size": 5, "patch_distance": 4, "h": 0.6 * noisy.sigma, "sigma": noisy.sigma}
    return unbiased(denoise_nl_means(noisy.array, fast_mode=True, **options), noisy)


def lowest(noisy: Noisy) -> float:
    """What dipy and ANTs, which expect magnitudes, have to be spared: 0 for magnitudes, in CT that of air."""
    return min(0.0, float(noisy.array.min()))


def dipy_blockwise(noisy: Noisy) -> np.ndarray:
    """Non-local means as dipy does by default."""
    from dipy.denoise.nlmeans import nlmeans

    floor = lowest(noisy)
    return nlmeans(noisy.array - floor, sigma=noisy.sigma, rician=noisy.rician, num_threads=THREADS) + floor


def dipy_classic(noisy: Noisy) -> np.ndarray:
    """Non-local means voxel by voxel."""
    from dipy.denoise.nlmeans import nlmeans

    options = {"patch_radius": 1, "block_radius": 5, "method": "classic", "num_threads": THREADS}
    floor = lowest(noisy)
    return nlmeans(noisy.array - floor, sigma=noisy.sigma, rician=noisy.rician, **options) + floor


def ants_denoise(noisy: Noisy) -> np.ndarray:
    """ANTs DenoiseImage; its noise level is its own."""
    import ants

    model, floor = "Rician" if noisy.rician else "Gaussian", lowest(noisy)
    return ants.denoise_image(ants.from_numpy(noisy.array - floor), p=1, r=2, noise_model=model).numpy() + floor


def total_variation(noisy: Noisy) -> np.ndarray:
    """Chambolle's algorithm with the weight that is best for this scan."""
    from skimage.restoration import denoise_tv_chambolle

    weights = noisy.sigma * np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.3])
    results = [unbiased(denoise_tv_chambolle(noisy.array, weight=w, max_num_iter=100), noisy) for w in weights]
    return max(results, key=lambda result: psnr(noisy.truth, result, noisy.mask, 1.0))


def wavelets(noisy: Noisy) -> np.ndarray:
    """BayesShrink, mean over shifts by one voxel."""
    from skimage.restoration import cycle_spin, denoise_wavelet

    options = {"sigma": noisy.sigma, "wavelet": "db2", "method": "BayesShrink", "rescale_sigma": False}
    shifted = cycle_spin(noisy.array, func=denoise_wavelet, max_shifts=1, num_workers=1, func_kw=options)
    return unbiased(shifted, noisy)


def bm4d(noisy: Noisy) -> np.ndarray:
    """BM4D."""
    from bm4d import bm4d

    return unbiased(np.asarray(bm4d(noisy.array, noisy.sigma), np.float32), noisy)


PEERS: dict[str, tuple[str, Method]] = {
    "scikit-image TV": ("skimage", total_variation),
    "scikit-image wavelets": ("skimage", wavelets),
    "scikit-image NLM": ("skimage", skimage_nlm),
    "dipy nlmeans": ("dipy", dipy_blockwise),
    "dipy nlmeans, classic": ("dipy", dipy_classic),
    "ANTs": ("ants", ants_denoise),
    "BM4D": ("bm4d", bm4d),
}
