"""New label maps: nothing folds, tears or is lost; between two cases lies what shall; lesions lie where they may."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage, stats
from skimage.measure import euler_number

from medfusion.data import label_maps
from medfusion.data.label_maps import (
    displacement,
    flipped,
    host_labels,
    interpolated,
    lateral,
    lesion_shapes,
    new_label_map,
    occurrence,
    place,
    warp_image,
    warp_labels,
)
from medfusion.errors import MedfusionError

MM = (1.0, 1.0, 1.0)
SHAPE = (40, 48, 36)
CORNERS = np.ones((3, 3, 3))  # voxels that share a corner are connected


def rng(seed=0):
    return np.random.default_rng(seed)


def world(shape=SHAPE, spacing=MM, centre=None):
    """Millimetres (3, d, h, w) from the grid's middle, or from a voxel."""
    middle = (np.array(shape) - 1) / 2 if centre is None else np.array(centre)
    return (np.indices(shape) - middle[:, None, None, None]) * np.array(spacing)[:, None, None, None]


def ellipsoid(axes, shape=SHAPE, spacing=MM, centre=None):
    scaled = world(shape, spacing, centre) / np.array(axes, float)[:, None, None, None]
    return np.linalg.norm(scaled, axis=0) < 1


def ball(radius, *args):
    return ellipsoid((radius, radius, radius), *args)


def torus(shape=SHAPE, ring=11.0, tube=3.5):
    x, y, z = world(shape)
    return (np.hypot(x, y) - ring) ** 2 + z**2 < tube**2


def deformed(*args, **options):
    """The map alone."""
    return label_maps.deformed(*args, **options)[0]


def halves():
    """Two classes that touch in a plane, 1 before 2."""
    body = ellipsoid((11, 17, 9))
    return np.where(body, np.where(world()[1] < 2, 1, 2), 0).astype(np.uint8)


def nested(thick=2.0):
    """A core 2 in a shell 1."""
    return (ball(12.0).astype(np.uint8) + ball(12.0 - thick)).astype(np.uint8)


def pieces(mask):
    return ndimage.label(mask, CORNERS)[1]


def volumes(labels):
    return {int(value): int(count) for value, count in zip(*np.unique(labels, return_counts=True), strict=True)}


def smallest_jacobian(where):
    """Of the determinants at all corners of all cells; where these are positive, linear interpolation does not fold."""
    lowest = np.inf
    for corner in np.ndindex(2, 2, 2):
        edges = []
        for axis in range(3):
            edge = np.diff(where, axis=axis + 1)
            for other in {0, 1, 2} - {axis}:
                edge = edge.take(range(corner[other], edge.shape[other + 1] - 1 + corner[other]), axis=other + 1)
            edges.append(edge)
        lowest = min(lowest, np.linalg.det(np.moveaxis(np.stack(edges), (0, 1), (-1, -2))).min())
    return lowest


@pytest.mark.parametrize(("strength", "least"), [(1.0, 0.2), (2.0, 0.03), (5.0, 1e-4)])
@pytest.mark.parametrize("spacing", [MM, (0.8, 1.2, 3.0)])
def test_nothing_folds_at_any_strength(strength, least, spacing) -> None:
    lowest = [smallest_jacobian(displacement(SHAPE, spacing, rng(s), strength=strength)) for s in range(10)]
    assert min(lowest) > least
    assert min(lowest) < 0.8  # it is no rigid motion either


def test_steep_displacements_are_weakened_to_the_bound_and_others_left_alone() -> None:
    steepness = []
    for seed in range(10):
        field = label_maps._smooth(SHAPE, MM, rng(seed)) * label_maps.DISPLACEMENT
        steepness.append(label_maps._steepness(field, MM))
        spectral = np.linalg.norm(
            np.moveaxis([np.gradient(part) for part in field], (0, 1), (-2, -1)), 2, axis=(-2, -1)
        )
        assert spectral.max() <= steepness[-1]
    assert max(steepness) < label_maps.STEEPEST


def test_displacements_are_as_strong_and_smooth_everywhere_as_said() -> None:
    fields = np.stack([label_maps._smooth((25, 13, 13), (2.0, 4.0, 4.0), rng(s)) for s in range(1500)])
    np.testing.assert_allclose(fields.std(axis=(0, 1)), 1, atol=0.06)
    assert abs(fields.mean()) < 0.02
    for n in (6, 12):
        distance = 2.0 * n
        expected = np.exp(-((distance / label_maps.SMOOTHNESS) ** 2) / 4)
        assert (fields[:, :, n:] * fields[:, :, :-n]).mean() == pytest.approx(expected, abs=0.03)
    assert abs((fields[:, 0] * fields[:, 1]).mean()) < 0.02


def test_the_deformation_in_millimetres_does_not_depend_on_the_voxels() -> None:
    fine = displacement((40, 48, 36), MM, rng(3)) * 1.0
    coarse = displacement((20, 24, 12), (2.0, 2.0, 3.0), rng(3)) * np.array([2.0, 2.0, 3.0])[:, None, None, None]
    moved_fine = fine - np.indices((40, 48, 36))
    moved_coarse = coarse - world((20, 24, 12), (2, 2, 3), (0, 0, 0))
    blocks = moved_fine.reshape(3, 20, 2, 24, 2, 12, 3).mean(axis=(2, 4, 6))
    np.testing.assert_allclose(moved_coarse, blocks, atol=0.02)
    assert np.abs(blocks).max() > 1


def test_it_is_turned_about_the_centre_that_is_given(monkeypatch) -> None:
    monkeypatch.setattr(label_maps, "DISPLACEMENT", 0)
    monkeypatch.setattr(label_maps, "SHIFT", 0)
    for centre in (None, (7, 30, 20)):
        middle = (np.array(SHAPE) - 1) / 2 if centre is None else np.array(centre)
        still = [
            np.linalg.norm(displacement(SHAPE, MM, rng(s), centre=centre) - np.indices(SHAPE), axis=0) for s in range(3)
        ]
        nearest = np.argwhere(np.max(still, axis=0) == np.max(still, axis=0).min())
        assert np.abs(nearest - middle).max() <= 1


def test_no_strength_is_the_identity_and_a_seed_gives_one_deformation() -> None:
    np.testing.assert_allclose(displacement(SHAPE, (0.7, 1, 2), rng(), strength=0), np.indices(SHAPE), atol=1e-5)
    np.testing.assert_array_equal(deformed(halves(), rng(), strength=0), halves())
    np.testing.assert_array_equal(deformed(halves(), rng(5)), deformed(halves(), rng(5)))
    assert (deformed(halves(), rng(5)) != deformed(halves(), rng(6))).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_warping_by_whole_voxels_is_exact(dtype) -> None:
    labels = rng().integers(0, 5, SHAPE).astype(dtype)  # every voxel borders on other classes
    where = np.indices(SHAPE)
    np.testing.assert_array_equal(warp_labels(labels, where), labels)
    assert warp_labels(labels, where).dtype == dtype
    shifted = warp_labels(labels, where + np.array([2, 0, -3])[:, None, None, None])
    np.testing.assert_array_equal(shifted[:-2, :, 3:], labels[2:, :, :-3])
    np.testing.assert_array_equal(shifted[-2:, :, 3:], np.repeat(labels[-1:, :, :-3], 2, axis=0))  # goes on as it ends


def test_a_turned_ellipsoid_is_nearer_to_the_truth_than_by_nearest_neighbour() -> None:
    axes = (14.0, 8.0, 6.0)
    labels = ellipsoid(axes).astype(np.uint8) * 3
    wrong, nearest = 0, 0
    for seed in range(8):
        turn = label_maps.Rotation.random(None, rng(seed)).as_matrix()
        positions = np.tensordot(turn, world(), 1) + rng(seed).uniform(-1, 1, 3)[:, None, None, None]
        truth = np.linalg.norm(positions / np.array(axes)[:, None, None, None], axis=0) < 1
        where = positions + (np.array(SHAPE)[:, None, None, None] - 1) / 2
        warped = warp_labels(labels, where)
        assert set(np.unique(warped)) == {0, 3}
        assert (warped > 0).sum() == pytest.approx(truth.sum(), rel=0.015)
        wrong += ((warped > 0) != truth).sum()
        nearest += ((ndimage.map_coordinates(labels, where, order=0) > 0) != truth).sum()
    assert wrong < 0.75 * nearest


def test_a_sheet_between_two_voxels_is_kept() -> None:
    labels = np.ones((12, 9, 9), np.uint8)
    labels[6:] = 2
    labels[5] = 7
    for shift in (-0.5, -0.3, 0.2, 0.5, 1.5):
        warped = warp_labels(labels, np.indices(labels.shape) + np.array([shift, 0, 0])[:, None, None, None])
        assert (warped == 7).any(axis=0).all()


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_topology_and_classes_and_volumes_are_kept(strength) -> None:
    ring = torus().astype(np.uint8)
    shell = nested()
    for seed in range(8):
        new = deformed(ring, rng(seed), strength=strength)
        assert euler_number(new > 0, 3) == 0  # one piece, one hole
        assert pieces(new) == 1
        new = deformed(shell, rng(seed), strength=strength)
        assert set(volumes(new)) == {0, 1, 2}
        assert strength > 1 or euler_number(new == 1, 3) == 2  # closed
        thin = deformed(nested(1.5), rng(seed), strength=strength)
        assert strength > 1 or (ndimage.binary_dilation(thin == 2) & (thin == 0)).sum() < 6  # pinholes
        new = deformed(halves(), rng(seed), strength=strength)
        assert pieces(new == 1) == pieces(new == 2) == euler_number(new > 0, 3) == 1
        torn = ndimage.binary_closing(new > 0, iterations=2) & (new == 0)
        assert torn.sum() < 40  # no gap opens where the two touch: their border has 300 voxels
        for value, count in volumes(halves()).items():
            assert 0.6**strength < volumes(new)[value] / count < 1.6**strength


def test_many_deformations_neither_grow_nor_shrink() -> None:
    for labels, low in ((halves(), 0.96), (nested(2.0), 0.96), (nested(1.2), 0.96)):
        many = [volumes(deformed(labels, rng(s))) for s in range(30)]
        for value, count in volumes(labels).items():
            assert low < np.mean([new[value] for new in many]) / count < 1.06


def test_image_and_labels_move_together() -> None:
    labels = halves()
    image = ndimage.gaussian_filter(100.0 * (labels > 0), 1.0) - 20
    for seed in range(4):
        where = displacement(SHAPE, MM, rng(seed), strength=1.5)
        moved, new = warp_image(image, where), warp_labels(labels, where)
        assert moved.dtype == np.float32
        both = ((moved > 30) & (new > 0)).sum()
        assert 2 * both / ((moved > 30).sum() + (new > 0).sum()) > 0.97
        assert image.min() <= moved.min() < moved.max() <= image.max()
    ramp = world()[1] * 3 + 5
    where = displacement(SHAPE, MM, rng(1))
    inner = (slice(8, -8),) * 3
    expected = 3 * (where[1] - (SHAPE[1] - 1) / 2) + 5
    np.testing.assert_allclose(warp_image(ramp, where)[inner], expected[inner], atol=0.05)


def test_what_is_off_centre_is_turned_and_scaled_in_place(monkeypatch) -> None:
    labels = ball(5, SHAPE, MM, (8, 12, 28)).astype(np.uint8)
    centres = [ndimage.center_of_mass(deformed(labels, rng(s))) for s in range(30)]
    np.testing.assert_allclose(np.mean(centres, axis=0), (8, 12, 28), atol=0.7)
    monkeypatch.setattr(label_maps, "DISPLACEMENT", 0)
    monkeypatch.setattr(label_maps, "SHIFT", 0)
    for seed in range(5):
        centre = ndimage.center_of_mass(deformed(labels, rng(seed), strength=3))
        np.testing.assert_allclose(centre, (8, 12, 28), atol=0.2)


@pytest.mark.parametrize("spacing", [MM, (2.0, 2.0, 2.0)])
def test_depth_is_measured_from_between_the_voxels(spacing) -> None:
    mask = np.arange(12)[:, None, None] * np.ones((1, 3, 3)) > 4
    expected = (np.arange(12) - 4.5) * spacing[0]
    np.testing.assert_allclose(label_maps._depth(mask, spacing)[:, 1, 1], expected)


def test_a_flip_is_from_left_to_right() -> None:
    labels = halves()
    labels[3, 4, 5] = 9
    assert flipped(labels)[-4, 4, 5] == 9
    np.testing.assert_array_equal(flipped(flipped(labels)), labels)


LATERAL = """left kidney|Kidney_Right|kidney_left|Hippocampus_L|ctx-rh-insula|ctx_lh_bankssts|R hippocampus|lh.|rh|lh|
Left-Thalamus|kidneyLeft|leftKidney|leftkidney|kidneyright|lHippocampus|RHippocampus|HippocampusR|rib_left_1|L. kidney|
rib_right_12|Precentral_R|LV|RV cavity|Lt lung|lung (r)|ren sinister|ren dexter|LEFT KIDNEY|HIPPOCAMPUS_L|left2|
heart_atrium_left|ctx-lh-G_and_S|LKidney|Right Accumbens Area"""
NOT_LATERAL = """liver|rib|brain|cleft|cleft palate|bright spot|brightness|upright|lesion|lung|lower lobe|rectum|L1|
vertebrae_L5|vertebrae_T12|R2star|background|anterior|posterior|CSF|WM|GM|tumor|edema|spleen|prostate_PZ|LGN|lens|retina|
hippocampus|T1w|ET|NCR|aorta|larynx|rim|relapse||3rd ventricle|Brain Stem|caudal|central"""


def names(text):
    return [name.strip("\n") for name in text.split("|")]


def test_names_that_tell_left_from_right() -> None:
    assert lateral(names(LATERAL)) == names(LATERAL)
    assert lateral(names(NOT_LATERAL)) == []
    assert lateral(["liver", "left lung", "spleen"]) == ["left lung"]


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("spacing", [MM, (1.0, 1.0, 2.0)])
def test_between_two_balls_lies_the_ball_of_the_radius_in_between(weight, spacing) -> None:
    a, b = ball(6.0, (40, 40, 30), spacing).astype(np.uint8), ball(13.0, (34, 38, 32), spacing).astype(np.uint8)
    new = interpolated(a, b, weight, spacing)
    radius = (1 - weight) * 6 + weight * 13
    assert new.shape == a.shape
    expected = ball(radius, a.shape, spacing)
    volume = 4 / 3 * np.pi * radius**3 / np.prod(spacing)
    assert new.sum() == pytest.approx(volume, rel=0.03)
    assert (new != expected).sum() < 0.2 * 3 * volume / radius  # of the voxels that the surface goes through


def test_between_two_ellipsoids_the_axes_lie_between() -> None:
    axes = np.array([(14.0, 7.0, 7.0), (8.0, 9.0, 12.0)])
    a, b = (ellipsoid(three).astype(np.uint8) for three in axes)
    for weight in (0.25, 0.5, 0.75):
        new = interpolated(a, b, weight)
        expected = (1 - weight) * axes[0] + weight * axes[1]
        found = np.sqrt(5 * np.diag(np.cov(np.argwhere(new).T)))
        np.testing.assert_allclose(found, expected, rtol=0.05)
        assert pieces(new) == 1


def test_the_ends_are_the_two_maps() -> None:
    a, b = halves(), deformed(halves(), rng(3), strength=2)
    np.testing.assert_array_equal(interpolated(a, b, 0), a)
    other = np.pad(b, ((3, 0), (0, 5), (7, 1)))[:-2]
    moved = interpolated(a, other, 1)
    low = np.argwhere(moved).min(axis=0) - np.argwhere(b).min(axis=0)
    np.testing.assert_array_equal(moved, np.roll(b, low, axis=(0, 1, 2)))  # by whole voxels
    distance = np.subtract(ndimage.center_of_mass(moved > 0), ndimage.center_of_mass(a > 0))
    assert np.abs(distance).max() <= 0.5
    for end, near in ((0, 1e-6), (1, 1 - 1e-6)):  # and what lies next to them hardly differs
        assert (interpolated(a, other, near) != interpolated(a, other, end)).sum() <= 20


def test_volumes_of_unlike_shapes_lie_between() -> None:
    for seed in range(6):
        a, b = (deformed(halves(), rng((seed, n)), strength=2) for n in (0, 1))
        new = interpolated(a, b, 0.5)
        for value in (1, 2):
            sizes = [np.cbrt(volumes(labels)[value]) for labels in (a, b, new)]
            assert sizes[2] == pytest.approx((sizes[0] + sizes[1]) / 2, rel=0.02)
    shell = interpolated(nested(), deformed(nested(), rng(4)), 0.5)
    assert euler_number(shell == 1, 3) == 2


def test_a_class_of_one_alone_shrinks() -> None:
    a = (ball(12).astype(np.uint8) + ball(5)).astype(np.uint8)
    b = ball(12).astype(np.uint8)
    for first, second, weights in ((a, b, (0, 0.1, 0.25, 0.5, 0.9, 1)), (b, a, (1, 0.9, 0.75, 0.5, 0.1, 0))):
        sizes = [(interpolated(first, second, weight) == 2).sum() for weight in weights]
        assert sizes == sorted(sizes, reverse=True)
        assert 0.15 * sizes[0] < sizes[2] < 0.5 * sizes[0]  # 0.42 were it alone
        assert sizes[-1] == 0


def test_what_cannot_be_interpolated_is_refused() -> None:
    for a, b in ((halves(), 0 * halves()), (0 * halves(), halves())):
        with pytest.raises(MedfusionError, match="empty"):
            interpolated(a, b, 0.5)
    for weight in (-0.1, 1.5, np.nan):
        with pytest.raises(MedfusionError, match="from 0 to 1"):
            interpolated(halves(), halves(), weight)
    with pytest.raises(MedfusionError, match="empty"):
        deformed(0 * halves(), rng())


def test_maps_of_one_voxel_or_one_class_are_no_trouble() -> None:
    speck = np.zeros(SHAPE, np.uint8)
    speck[20, 20, 20] = 1
    np.testing.assert_array_equal(interpolated(speck, np.roll(speck, 2), 0.5), speck)
    full = np.full((8, 9, 10), 3, np.int16)
    np.testing.assert_array_equal(deformed(full, rng()), full)
    np.testing.assert_array_equal(interpolated(full, full, 0.5), full)


L_SHAPE = np.zeros((6, 4, 2), bool)
L_SHAPE[:, :2] = L_SHAPE[:2] = True
LESION = 5


def patient():
    """A brain of 1 with a core of 2 in air, with lesions of 5 in 1, one of them cut by the border of the map."""
    labels = ball(15).astype(np.uint8) + ball(6)
    labels = labels.astype(np.uint8)
    labels[8:14, 20:24, 16:18][L_SHAPE] = LESION
    labels[30, 24, 18] = labels[31, 25, 19] = LESION  # one lesion: they share a corner
    labels[0, 3:6, 3:6] = LESION
    return labels


def test_lesions_are_cut_out_one_by_one() -> None:
    shapes = lesion_shapes([patient(), 0 * patient()], LESION)
    assert len(shapes) == 2
    np.testing.assert_array_equal(shapes[0], L_SHAPE)
    np.testing.assert_array_equal(shapes[1], np.eye(2, dtype=bool)[:, :, None] & np.eye(2, dtype=bool)[:, None])
    near = np.zeros((9, 9, 9), np.uint8)
    near[1:3, 1:8, 1] = near[1:8, 1, 1] = near[7, 7, 7] = near[5, 4, 1] = 1
    assert [int(s.sum()) for s in lesion_shapes([near], 1)] == [19, 1, 1]  # the others lie in its box and are not in it


def test_hosts_are_what_surrounds_lesions() -> None:
    labels = patient()
    labels[0] = 0
    assert host_labels([labels, 0 * labels], LESION) == (1,)
    labels[10:12, 20, 17] = 2  # a few voxels of another label
    assert host_labels([labels], LESION) == (1,)
    assert host_labels([(labels == LESION).astype(np.uint8)], 1) == (0,)
    with pytest.raises(MedfusionError, match="label 8"):
        host_labels([labels], 8)


def test_lesions_occur_in_their_hosts() -> None:
    labels = patient()
    allowed = occurrence(labels, LESION, (1,))
    np.testing.assert_array_equal(allowed, (labels == 1) | (labels == LESION))
    np.testing.assert_array_equal(occurrence(labels, LESION, (1,), labels > 1), labels == LESION)


def test_all_of_a_placed_lesion_lies_where_it_may() -> None:
    labels = patient()
    before, allowed = labels.copy(), (labels == 1)
    centres, sizes = [], []
    for seed in range(300):
        new, mask = place(labels, L_SHAPE, LESION, allowed, rng(seed))
        assert mask.any()
        assert not (mask & ~allowed).any()
        np.testing.assert_array_equal(new, np.where(mask, LESION, before))
        assert new.dtype == labels.dtype
        assert pieces(mask) == 1
        centres.append(ndimage.center_of_mass(mask))
        sizes.append(mask.sum() / L_SHAPE.sum())
    np.testing.assert_array_equal(labels, before)
    assert np.std(centres, axis=0).min() > 5
    assert 1 / 1.25**3 - 0.02 < min(sizes) < 0.65
    assert 1.6 < max(sizes) < 1.25**3 + 0.02
    assert np.mean(sizes) == pytest.approx(np.sinh(3 * np.log(1.25)) / (3 * np.log(1.25)), abs=0.08)


def test_one_seed_gives_one_place() -> None:
    for first, second in zip(
        place(patient(), L_SHAPE, LESION, patient() == 1, rng(2)),
        place(patient(), L_SHAPE, LESION, patient() == 1, rng(2)),
        strict=True,
    ):
        np.testing.assert_array_equal(first, second)


def test_lesions_are_turned_every_way_and_keep_their_millimetres() -> None:
    rod = np.zeros((1, 1, 12), bool)
    rod[:] = True
    directions = []
    for seed in range(200):
        mask = place(np.zeros((30, 30, 30), np.uint8), np.repeat(rod, 2, 0), 1, np.ones((30, 30, 30), bool), rng(seed))[
            1
        ]
        points = np.argwhere(mask)
        values, vectors = np.linalg.eigh(np.cov(points.T))
        directions.append(vectors[:, -1])
        assert 0.7 * 12 / 1.25 < np.sqrt(12 * values[-1]) < 1.15 * 12 * 1.25
    spread = np.mean([np.outer(one, one) for one in directions], axis=0)
    np.testing.assert_allclose(spread, np.eye(3) / 3, atol=0.09)
    flat = np.ones((9, 9, 3), bool)  # a cube of 9 mm
    thick = [
        place(np.zeros((25, 25, 9), np.uint8), flat, 1, np.ones((25, 25, 9), bool), rng(s), (1, 1, 3))[1].sum() / 243
        for s in range(40)
    ]
    assert 0.5 < min(thick) < max(thick) < 2


def test_places_that_fit_are_equally_probable(monkeypatch) -> None:
    """A rod of two voxels in a bent corridor: every place and direction that fits, counted by hand."""
    monkeypatch.setattr(label_maps, "_turned", lambda lesion, generator, spacing: lesion)
    allowed = np.zeros((6, 5, 4), bool)
    allowed[1, 1:5, 2] = allowed[1:6, 1, 2] = allowed[0, 0, 0] = True
    rod = np.ones((2, 1, 1), bool)
    expected = {(x, 1, 2) for x in range(1, 5)}
    found = {}
    for seed in range(400):
        mask = place(np.zeros(allowed.shape, np.uint8), rod, 1, allowed, rng(seed))[1]
        first = tuple(int(i) for i in np.argwhere(mask)[0])
        found[first] = found.get(first, 0) + 1
    assert set(found) == expected
    assert stats.chisquare(list(found.values())).pvalue > 1e-3


def test_single_voxels_go_everywhere_that_is_allowed() -> None:
    allowed = rng().random((5, 5, 5)) < 0.15
    hits = sum(
        place(np.zeros(allowed.shape, np.uint8), np.ones((1, 1, 1), bool), 1, allowed, rng(s))[1].astype(int)
        for s in range(30 * allowed.sum())
    )
    assert not hits[~allowed].any()
    assert stats.chisquare(hits[allowed]).pvalue > 1e-3


def test_a_lesion_that_fits_nowhere_is_refused() -> None:
    labels = patient()
    for shape, allowed in (
        (np.ones((14, 14, 14), bool), labels == 2),
        (L_SHAPE, np.zeros(SHAPE, bool)),
        (np.ones((3, 3, 3), bool), rng().random(SHAPE) < 0.3),
    ):
        with pytest.raises(MedfusionError, match="fits nowhere") as caught:
            place(labels, shape, LESION, allowed, rng())
        assert "voxels" in str(caught.value)
    with pytest.raises(MedfusionError, match="a lesion is empty"):
        place(labels, 0 * L_SHAPE, LESION, labels == 1, rng())


def family():
    """Three patients on grids of their own."""
    first = halves()
    second = np.pad(deformed(first, rng(1), strength=2), ((0, 3), (2, 0), (0, 0)))
    third = deformed(first, rng(2), strength=2)[:, 2:, 1:]
    return [first, second, third]


def test_new_maps_lie_on_their_first_parents_grid_and_name_their_parents() -> None:
    maps = family()
    before = [labels.copy() for labels in maps]
    seen, mixed = set(), 0
    for seed in range(45):
        new, parents, where = new_label_map(maps, rng(seed))
        assert where.shape == (3, *new.shape)
        assert new.shape == maps[parents[0]].shape
        assert new.dtype == np.uint8
        assert set(np.unique(new)) == {0, 1, 2}
        assert all((new != labels).any() for labels in maps if labels.shape == new.shape)
        assert len(set(parents)) == len(parents) <= 2
        assert all(type(index) is int for index in parents)
        seen |= {parents}
        mixed += len(parents) - 1
    assert len(seen) == 9  # three alone, six ordered pairs
    assert 14 <= mixed <= 31
    for labels, copy in zip(maps, before, strict=True):
        np.testing.assert_array_equal(labels, copy)
    np.testing.assert_array_equal(new_label_map(maps, rng(7))[0], new_label_map(maps, rng(7))[0])


def test_mixing_and_flips_are_asked_for() -> None:
    maps = family()
    assert {len(new_label_map(maps, rng(s), mixing=0)[1]) for s in range(10)} == {1}
    assert {len(new_label_map(maps, rng(s), mixing=1)[1]) for s in range(10)} == {2}
    assert new_label_map(maps[:1], rng(), mixing=1)[1] == (0,)
    left = halves() * (world()[0] < 3)  # cut off on the right: its mirror image on the left
    left = left.astype(np.uint8)
    sides = [ndimage.center_of_mass(new_label_map([left], rng(s), flips=True)[0] > 0)[0] > 19.5 for s in range(30)]
    assert 7 <= sum(sides) <= 23
    assert not any(ndimage.center_of_mass(new_label_map([left], rng(s))[0] > 0)[0] > 19.5 for s in range(10))


def test_an_image_goes_along_with_a_new_map() -> None:
    maps = family()
    for seed in range(10):
        new, parents, where = new_label_map(maps, rng(seed), mixing=0, flips=True)
        np.testing.assert_array_equal(warp_labels(maps[parents[0]], where), new)
        new, parents, where = new_label_map(maps, rng(seed), mixing=1, flips=True)
        moved, old = warp_labels(maps[parents[0]], where) > 0, maps[parents[0]] > 0
        overlap = 2 * (moved & (new > 0)).sum() / (moved.sum() + (new > 0).sum())
        assert overlap > 0.85  # what is left is the shape that was interpolated
        assert overlap > 2 * (old & (new > 0)).sum() / (old.sum() + (new > 0).sum())


def test_the_foreground_stays_in_the_field_of_view() -> None:
    tight = halves()
    low, high = np.argwhere(tight).min(axis=0) - 1, np.argwhere(tight).max(axis=0) + 2
    tight = tight[tuple(map(slice, low, high))]
    assert any(label_maps._touches(deformed(tight, rng(s))).any() for s in range(10))
    made = 0
    for seed in range(20):
        try:
            new, *_ = new_label_map([tight, tight[:, :-1]], rng(seed), mixing=0.3)
        except MedfusionError:
            continue
        made += 1
        assert not label_maps._touches(new)[[0, 1, 2, 4, 5]].any()
    assert made > 10
    open_below = tight[:, :, 4:]  # where a parent touches, so may its child
    assert sum(bool(label_maps._touches(new_label_map([open_below], rng(s))[0])[4]) for s in range(5)) == 5
    with pytest.raises(MedfusionError, match="leave the field of view"):
        new_label_map([tight], rng(), strength=50)


def test_no_maps_or_empty_maps_are_refused() -> None:
    with pytest.raises(MedfusionError, match="no label map"):
        new_label_map([], rng())
    with pytest.raises(MedfusionError, match="empty"):
        new_label_map([0 * halves()], rng())


def hippocampi(folder):
    files = sorted((folder / "hippocampus" / "train" / "labels").glob("*.nii.gz"))[::2]
    return [np.asarray(nib.load(file).dataobj).astype(np.uint8) for file in files]


def spread(maps):
    """Standard deviation of the logarithms of volume (1,) and principal axes (3,)."""
    shapes = [np.linalg.eigvalsh(np.cov(np.argwhere(labels).T)) for labels in maps]
    return np.log([[(labels > 0).sum(), *np.sqrt(s)] for labels, s in zip(maps, shapes, strict=True)]).std(axis=0)


def dice(a, b):
    """Of two foregrounds, the second moved to the centre of the first."""
    a, b = (np.pad(labels > 0, 20) for labels in (a, b))
    middle = np.round(ndimage.center_of_mass(a)).astype(int), np.round(ndimage.center_of_mass(b)).astype(int)
    a, b = (m[tuple(slice(c - 20, c + 20) for c in centre)] for m, centre in zip((a, b), middle, strict=True))
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_new_hippocampi_vary_as_people_do(real_data) -> None:
    real = hippocampi(real_data)
    made = [new_label_map(real, rng(s)) for s in range(80)]
    new = [labels for labels, *_ in made]
    np.testing.assert_array_less(spread(new) / spread(real), 1.6)
    np.testing.assert_array_less(0.8, spread(new) / spread(real))
    pairs = rng().integers(80, size=(300, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    people, children = (np.median([dice(maps[i], maps[j]) for i, j in pairs]) for maps in (real, new))
    assert people - 0.06 < children < people + 0.04
    own = np.median([dice(labels, real[parents[0]]) for labels, parents, _ in made])
    assert people + 0.05 < own < 0.87
    assert np.mean([pieces(labels == value) > 1 for labels in new for value in (1, 2)]) < 0.03


def test_hippocampi_in_between_have_the_volume_in_between(real_data) -> None:
    real = hippocampi(real_data)
    for a, b in rng(1).choice(len(real), (15, 2), replace=False):
        new = interpolated(np.pad(real[a], 5), real[b], 0.5)
        for value in (1, 2):
            sizes = [np.cbrt((labels == value).sum()) for labels in (real[a], real[b], new)]
            assert sizes[2] == pytest.approx((sizes[0] + sizes[1]) / 2, rel=0.015)
            assert pieces(new == value) == 1
