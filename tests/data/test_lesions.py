"""Implanted lesions: size and place in millimetres on any grid, truth, and what happens to the intensities."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medfusion.data.lesions import KINDS, implant, place
from medfusion.errors import MedfusionError
from medfusion.volume import Volume


def grid(spacing=(2.0, 2.0, 2.0), field=(130.0, 150.0, 120.0), angles=(0.0, 0.0, 0.0), flip=1):
    """An empty volume around the world's origin."""
    shape = tuple(int(n) for n in np.ceil(np.array(field) / spacing))
    affine = np.eye(4)
    affine[:3, :3] = (
        Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing) @ np.diag([flip, 1, 1])
    )
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return Volume(np.zeros(shape, np.uint8), affine, "head")


def world(volume):
    return volume.to_world(np.moveaxis(np.indices(volume.shape), 0, -1))


def ball_brain(volume, radius=52.0):
    return volume.with_array((np.linalg.norm(world(volume), axis=-1) < radius).astype(np.uint8))


def ell(spacing=(1.0, 1.0, 1.0)):
    """20 x 30 x 16 mm less a corner, 7.04 ml, far from the origin; in the plane it is not like its mirror image."""
    empty = grid(spacing, field=(60, 60, 60))
    x, y, z = np.moveaxis(world(empty), -1, 0)
    bars = ((abs(x) < 10) & (abs(y) < 15) & (abs(z) < 8)) & ~((x > 2) & (y > -5))
    moved = empty.affine.copy()
    moved[:3, 3] += (70, -40, 25)
    return Volume(bars.astype(np.uint8), moved, "lesion")


def centred(volume, weights):
    """World positions (n, 3) of what weighs, about their centre, and the weights (n,)."""
    points, heavy = world(volume)[weights > 0], weights[weights > 0].astype(float)
    return points - np.average(points, axis=0, weights=heavy), heavy


ELL, ELL_ML = ell(), (20 * 30 - 8 * 20) * 16 / 1000
BRAIN = ball_brain(grid())
GRIDS = {
    "2 mm": grid(),
    "1.5 mm": grid((1.5, 1.5, 1.5)),
    "thick slices": grid((1.0, 1.2, 4.0)),
    "oblique": grid((2.0, 1.7, 2.3), angles=(17, -25, 33)),
    "oblique, left-handed": grid((2.0, 2.0, 1.6), angles=(8, 12, -20), flip=-1),
}


def placed(brain, seed=0, lesion=ELL):
    return place(lesion, brain, np.random.default_rng(seed))


@pytest.mark.parametrize("name", GRIDS)
def test_size_and_shape_are_kept_in_millimetres_and_only_turned_about_the_vertical(name) -> None:
    brain = ball_brain(GRIDS[name])
    deep = ndimage.binary_erosion(brain.array)
    points, heavy = centred(ELL, ELL.array)
    expected = np.cov(points.T, aweights=heavy, bias=True)
    uncut = 0
    for seed in range(12):
        weights = placed(brain, seed)
        assert weights.dtype == np.float32
        assert 0 <= weights.min() < weights.max() <= 1
        assert not weights[brain.array == 0].any()
        assert 0.85 * ELL_ML < weights.sum() * brain.voxel_ml < 1.03 * ELL_ML
        if weights[~deep].max() > 0.02:
            continue
        uncut += 1
        assert weights.sum() * brain.voxel_ml == pytest.approx(ELL_ML, rel=0.02)
        assert (weights >= 0.5).sum() * brain.voxel_ml == pytest.approx(
            ELL_ML, rel=0.17
        )  # thin arms and corners fill less
        found = np.cov(centred(brain, weights)[0].T, aweights=centred(brain, weights)[1], bias=True)
        softness = 0.7**2 * brain.affine[:3, :3] @ brain.affine[:3, :3].T  # variance that the blur adds
        voxel = brain.affine[:3, :3] @ brain.affine[:3, :3].T / 12  # and that of a voxel about its centre
        found -= softness + voxel
        assert found[2, 2] == pytest.approx(expected[2, 2], rel=0.06)
        np.testing.assert_allclose(np.linalg.eigvalsh(found[:2, :2]), np.linalg.eigvalsh(expected[:2, :2]), rtol=0.06)
        np.testing.assert_allclose(found[2, :2], 0, atol=1)
    assert uncut >= 2


def test_the_spacing_of_the_shape_does_not_matter() -> None:
    fine, coarse = (placed(BRAIN, 4, ell(spacing)) for spacing in ((0.5, 0.5, 0.5), (1.0, 1.0, 2.0)))
    assert np.abs(fine - coarse).max() < 0.2
    assert fine.sum() == pytest.approx(coarse.sum(), rel=0.02)


def test_it_is_turned_and_mirrored_and_put_anywhere() -> None:
    hands, angles, centres = [], [], []
    for seed in range(24):
        weights = placed(BRAIN, seed)
        points, heavy = centred(BRAIN, weights)
        plane = points[:, 0] + 1j * points[:, 1]
        second = np.average(plane**2, weights=heavy)
        third = np.average(plane * plane.conj() ** 2, weights=heavy)
        hands.append(np.sign((second * third**2).imag))  # turning leaves it, a mirror changes the sign (Flusser 2000)
        angles.append(np.angle(second))
        centres.append(np.average(world(BRAIN)[weights > 0], axis=0, weights=heavy))
    assert {-1, 1} == set(hands)
    assert np.histogram(angles, bins=4, range=(-np.pi, np.pi))[0].min() > 0
    assert np.std(centres, axis=0).min() > 10


def test_the_border_is_a_partial_volume_and_the_middle_is_full() -> None:
    weights = placed(BRAIN, 2)
    inner = ndimage.distance_transform_edt(weights > 0.5) * 2  # mm
    assert weights[inner >= 6].min() > 0.99
    border = (weights > 0.05) & (weights < 0.95)
    assert 0.2 < border.sum() / (weights > 0.05).sum() < 0.9
    steps = np.abs(np.diff(weights, axis=0))[(BRAIN.array[1:] & BRAIN.array[:-1]) > 0]
    assert steps.max() < 0.75  # a sharp mask steps by 1


def test_a_lesion_too_large_for_most_places_is_cut_and_one_too_large_for_all_is_refused() -> None:
    ball = ball_brain(grid((1.0, 1.0, 1.0), field=(90, 90, 90)), 24.0)
    small = ball_brain(grid(field=(90, 90, 90)), 21.0)
    weights = placed(small, 0, ball)
    assert 0.5 < weights.sum() * small.voxel_ml / (ball.array.sum() * ball.voxel_ml) < 0.75
    assert not weights[small.array == 0].any()
    with pytest.raises(MedfusionError, match="does not fit"):
        placed(ball_brain(grid(), 16.0), 0, ball)


def test_what_cannot_be_placed_is_refused() -> None:
    with pytest.raises(MedfusionError, match="lesion: the mask is empty"):
        placed(BRAIN, 0, ELL.with_array(0 * ELL.array))
    with pytest.raises(MedfusionError, match="head: the mask is empty"):
        placed(BRAIN.with_array(0 * BRAIN.array))
    speck = np.zeros_like(ELL.array)
    speck[30, 30, 30] = 1
    with pytest.raises(MedfusionError, match="too small"):
        placed(BRAIN, 0, ELL.with_array(speck))


NOISE, GREY, WHITE, CSF = 20.0, 800.0, 1200.0, 200.0


def head(seed=0, shading=0.0, noise=NOISE):
    """Sheets of grey and white matter with pools of CSF, brighter to the front by ``shading`` a millimetre."""
    x, y, z = np.moveaxis(world(BRAIN), -1, 0)
    image = np.where(np.sin(x / 2) > 0, WHITE, GREY)
    image[np.prod(np.sin([x / 7, y / 7, z / 7]), axis=0) > 0.6] = CSF
    image = image * (1 + shading * y) * BRAIN.array
    return BRAIN.with_array((image + np.random.default_rng(seed).normal(0, noise, image.shape)).astype(np.float32))


def ball(radius):
    """A softened lesion in the middle, between the pools."""
    distance = np.linalg.norm(world(BRAIN), axis=-1)
    return ndimage.gaussian_filter((distance < radius).astype(np.float32), 0.7)


WEIGHTS = ball(9)
FULL = WEIGHTS > 0.99


def implanted(kind, strength, scan, seed=0, weights=WEIGHTS):
    return implant(scan, BRAIN.array > 0, weights, kind, strength, np.random.default_rng(seed))


def test_truth_is_what_is_half_filled_and_the_rest_of_the_scan_stays() -> None:
    scan = head()
    before = scan.array.copy()
    for kind in KINDS:
        result, truth = implanted(kind, 1.0, scan)
        assert truth.dtype == np.uint8
        np.testing.assert_array_equal(truth, WEIGHTS >= 0.5)
        np.testing.assert_array_equal(result.array[WEIGHTS == 0], before[WEIGHTS == 0])
        np.testing.assert_array_equal(result.affine, scan.affine)
        changed = result.array != before
        assert changed.any() == (kind != "unchanged")
    np.testing.assert_array_equal(scan.array, before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_unchanged_is_unchanged(dtype) -> None:
    scan = head().with_array(head().array.astype(dtype))
    result, _ = implanted("unchanged", 1.0, scan)
    np.testing.assert_array_equal(result.array, scan.array)


@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_dark_goes_towards_csf_and_bright_beyond_white_matter(strength) -> None:
    scan = head()
    low, high = np.percentile(scan.array[BRAIN.array > 0], (2, 98))
    assert low < CSF + 2 * NOISE
    assert high > WHITE
    half = (WEIGHTS > 0.4) & (WEIGHTS < 0.6)
    for kind, target in (("dark", low), ("bright", high + (high - low) / 4)):
        change = implanted(kind, strength, scan)[0].array - scan.array
        expected = strength * (target - scan.array[FULL].mean())
        assert change[FULL].mean() == pytest.approx(expected, rel=0.1)
        assert change[half].mean() == pytest.approx(WEIGHTS[half].mean() * expected, rel=0.1)


def test_noise_in_the_lesion_stays_what_it_was() -> None:
    for kind in ("dark", "bright"):
        ratios = []
        clean = implanted(kind, 0.8, head(noise=1e-3))[0].array
        for seed in range(3):
            noise = implanted(kind, 0.8, head(seed))[0].array - clean
            ratios.append(noise[FULL].std() / NOISE)
        assert np.mean(ratios) == pytest.approx(1, abs=0.05)


def test_texture_is_coarse_and_leaves_the_mean() -> None:
    clean, noisy = head(noise=1e-3), head()
    result, _ = implanted("textured", 1.0, noisy)
    added = (result.array - noisy.array).astype(float)
    assert added.sum() == pytest.approx(0, abs=1e-3 * np.abs(added).sum())
    large = ball(20)
    many = implanted("textured", 0.5, clean, 3, large)[0].array - clean.array
    low, high = np.percentile(clean.array[BRAIN.array > 0], (2, 98))
    assert many[large > 0.99].std() == pytest.approx(0.5 * (high - low) / 4, rel=0.15)
    neighbours = FULL[1:] & FULL[:-1]
    correlation = np.corrcoef(added[1:][neighbours], added[:-1][neighbours])[0, 1]
    assert 0.6 < correlation < 0.98


def test_a_lesion_is_lit_as_its_place_is() -> None:
    """The same lesion where coils make the head twice as bright as at another place."""
    scan = head(shading=0.012, noise=1e-3)
    y = world(BRAIN)[..., 1]
    around = np.linalg.norm(world(BRAIN)[..., [0, 2]] - (5, 0), axis=-1) < 6
    for kind in ("dark", "bright"):
        levels = []
        for centre in (-30, 30):
            weights = (around & (abs(y - centre) < 6)).astype(np.float32)
            result, _ = implanted(kind, 1.0, scan, weights=weights)
            levels.append(result.array[weights > 0].mean() / (1 + 0.012 * centre))
        assert levels[0] == pytest.approx(levels[1], rel=0.18)  # 2.1 times as much without regard to the place


def test_nothing_falls_below_the_darkest_of_the_brain() -> None:
    scan = head()
    result, _ = implanted("dark", 5.0, scan)
    assert result.array[BRAIN.array > 0].min() == scan.array[BRAIN.array > 0].min()


def test_one_seed_gives_one_lesion() -> None:
    np.testing.assert_array_equal(placed(BRAIN, 3), placed(BRAIN, 3))
    assert (placed(BRAIN, 3) != placed(BRAIN, 4)).any()
    first, again, other = (implanted("textured", 1.0, head(), seed)[0].array for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_what_cannot_be_implanted_is_refused() -> None:
    scan, rng = head(), np.random.default_rng(0)
    with pytest.raises(MedfusionError, match="purple"):
        implanted("purple", 1.0, scan)
    with pytest.raises(MedfusionError, match="different grids"):
        implanted("dark", 1.0, scan, weights=WEIGHTS[1:])
    with pytest.raises(MedfusionError, match="different grids"):
        implant(scan, BRAIN.array[:, 1:] > 0, WEIGHTS, "dark", 1.0, rng)
    for brain, weights in ((BRAIN.array * 0, WEIGHTS), (BRAIN.array, 0 * WEIGHTS), (1 - BRAIN.array, WEIGHTS)):
        with pytest.raises(MedfusionError, match="no lesion lies in the brain"):
            implant(scan, brain > 0, weights, "dark", 1.0, rng)
