"""Ways to rebuild: of an image each makes what the prior of white noise gives in closed form."""

from functools import partial

import numpy as np
import pytest
import torch
from prior_factory import grid, head, random_prior, white_prior
from scipy import ndimage

from medfusion.data.crops import context_channels
from medfusion.data.seeds import case_generator
from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.tasks.place import SUSPECT, Here, seen_by
from medfusion.tasks.rebuild import METHODS, Shown, at_once, examine, stitched, suspect, there_and_back
from medfusion.tasks.scores import combine, raw_maps
from medfusion.volume import Volume

SHAPE = (20, 24, 22)


def shown(image: np.ndarray, atlas: np.ndarray, prior: Prior | None = None, seed: int = 0) -> Shown:
    here = Here(atlas.astype(np.float32), np.full(SHAPE, 0.2, np.float32), np.ones(SHAPE, bool))
    context = context_channels(SHAPE, (0, 0, 0), np.array(SHAPE) / 2, 2.0, 1.0)[None]
    x = torch.from_numpy(image.astype(np.float32))[None, None]
    return Shown(x, here, prior or white_prior(), context, partial(case_generator, seed, "case"))


def smooth(seed: int = 0) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2.0)
    return 0.5 * field / field.std()


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_white_noise_is_brought_back_as_its_posterior_mean(ratio: float) -> None:
    """Of N(0, 1) the posterior mean from noise of ratio r is (x + r n) / (1 + r^2)."""
    image = smooth()
    rebuilt = at_once(shown(image, image), ratios=(ratio,), draws=1)[0, 0].numpy()
    slope = np.sum(rebuilt * image) / np.sum(image**2)
    assert slope == pytest.approx(1 / (1 + ratio**2), abs=0.03 * ratio)
    noise = rebuilt - image / (1 + ratio**2)
    assert noise.std() == pytest.approx(ratio / (1 + ratio**2), rel=0.05)


def test_draws_and_levels_are_averaged() -> None:
    image = smooth()
    four = at_once(shown(image, image), ratios=(1.0,), draws=4)[0, 0].numpy() - image / 2
    assert four.std() == pytest.approx(0.5 / 2, rel=0.05)
    levels = at_once(shown(image, image), ratios=(0.5, 2.0), draws=1)[0, 0].numpy()
    slope = np.sum(levels * image) / np.sum(image**2)
    assert slope == pytest.approx((1 / 1.25 + 1 / 5) / 2, abs=0.05)


@pytest.mark.parametrize("method", ["plain", "simplex"])
def test_there_and_back_leaves_the_image_of_white_noise_as_noisy_as_it_was(method: str) -> None:
    """DDIM is the flow that carries N(0, 1) to N(0, 1): for the white prior it keeps x_t as it is."""
    image = smooth()
    rebuilt = METHODS[method].rebuild(shown(image, image))[0, 0].numpy()
    slope = np.sum(rebuilt * image) / np.sum(image**2)
    alpha = float(white_prior().process.alpha(0.5))
    assert slope == pytest.approx(alpha, abs=0.15)
    rest = rebuilt - slope * image
    coarse = ndimage.gaussian_filter(rest, 2).std() / rest.std()
    assert (coarse > 0.5) if method == "simplex" else (coarse < 0.15)


def test_what_is_suspect_is_never_seen_by_the_prior() -> None:
    atlas, image = smooth(), smooth()
    lesion = np.linalg.norm(np.indices(SHAPE) - np.array([10, 12, 11])[:, None, None, None], axis=0) < 5
    image[lesion] += 3.0
    rebuilt = stitched(shown(image, atlas), ratios=(0.3,), draws=8)[0, 0].numpy()
    healthy = stitched(shown(atlas, atlas), ratios=(0.3,), draws=8)[0, 0].numpy()
    np.testing.assert_allclose(rebuilt[lesion], healthy[lesion], atol=0.02)
    kept = at_once(shown(image, atlas), ratios=(0.3,), draws=8)[0, 0].numpy()
    assert (kept - rebuilt)[lesion].mean() > 2.5


def test_suspicion_rises_with_the_distance_from_the_healthy() -> None:
    here = shown(smooth(), np.zeros(SHAPE)).here
    levels = [
        suspect(np.full(SHAPE, 0.2 * apart, np.float32), here).max() for apart in (0, SUSPECT[0], 3, SUSPECT[1], 9)
    ]
    np.testing.assert_allclose(levels, [0, 0, 0.5, 1, 1], atol=1e-4)


def test_noise_depends_on_the_seed_alone() -> None:
    image = smooth()
    first, again, other = (at_once(shown(image, image, seed=s), ratios=(1.0,), draws=1) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"autoencoder"}))
def test_every_method_gives_a_finite_image_of_the_same_size(method: str) -> None:
    rebuilt = METHODS[method].rebuild(shown(smooth(), smooth(1), random_prior()))
    assert rebuilt.shape == (1, 1, *SHAPE)
    assert torch.isfinite(rebuilt).all()


def test_a_prior_without_autoencoder_is_refused() -> None:
    with pytest.raises(MedfusionError, match="tiny: has no autoencoder"):
        METHODS["autoencoder"].rebuild(shown(smooth(), smooth()))


def test_only_the_part_that_is_scored_is_looked_at() -> None:
    affine = grid((40, 40, 40))
    seen = seen_by(white_prior(), Volume(head(affine, (40,) * 3, noise=20.0), affine, "case"))
    inside = np.zeros((40, 40, 40), bool)
    inside[15:25, 14:22, 2:12] = True
    here = Here(seen.volume.array, np.ones((40,) * 3, np.float32), inside)
    found = examine(seen, here, white_prior(), "blur", stripped=False, seed=0)
    assert found.box == (slice(7, 33), slice(6, 30), slice(0, 20))
    assert found.rebuilt.shape == (26, 24, 20)
    assert found.raw.shape == (2, 26, 24, 20)


def test_the_residual_has_a_sign_and_structure_has_none() -> None:
    image, rebuilt = np.full(SHAPE, 0.3, np.float32), np.full(SHAPE, 0.5, np.float32)
    residual, structure = raw_maps(image, rebuilt)
    np.testing.assert_allclose(residual, -0.2, rtol=1e-5)
    np.testing.assert_allclose(structure, np.log(0.04 + 1e-4), rtol=1e-5)
    checks = np.where(np.indices(SHAPE).sum(axis=0) % 2 == 0, 0.2, -0.2).astype(np.float32)
    residual, structure = raw_maps(checks, np.zeros(SHAPE, np.float32))
    assert np.abs(residual).max() < 0.02
    np.testing.assert_allclose(structure, np.log(0.04 + 1e-4), rtol=1e-4)


def test_scores_are_combined_as_lengths() -> None:
    z = np.array([[-3.0, 3.0, -1.0], [4.0, -4.0, 0.0]], np.float32)
    np.testing.assert_allclose(combine(z, "residual"), [3, 3, 1])
    np.testing.assert_allclose(combine(z, "structure"), [4, 0, 0])
    np.testing.assert_allclose(combine(z, "both"), [5, 3, 1])


def test_there_and_back_is_the_mean_of_its_draws() -> None:
    image = smooth()
    one, two = (there_and_back(shown(image, image), t=0.5, steps=2, draws=n)[0, 0].numpy() for n in (1, 2))
    alpha = float(white_prior().process.alpha(0.5))
    assert (two - alpha * image).std() == pytest.approx((one - alpha * image).std() / 2**0.5, rel=0.15)
