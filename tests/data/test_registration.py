"""Registration: a known affine map between two grids of one phantom is found again."""

import numpy as np
import pytest
from prior_factory import CENTRE, grid, head, with_neck
from scipy.spatial.transform import Rotation

from medfusion.data.registration import carried, register
from medfusion.errors import MedfusionError
from medfusion.volume import Volume


def moved(volume: Volume, matrix: np.ndarray) -> Volume:
    """The same anatomy elsewhere: world to world by ``matrix``."""
    return Volume(volume.array, matrix @ volume.affine, "moved")


def egg() -> Volume:
    """A phantom longer than wide, as heads are: a ball would tell little of how it is turned."""
    shape = (52, 50, 46)
    affine = grid(shape, (2.0, 2.0, 2.2), "LAS", (4, 0, -7))
    ball = Volume(head(affine, shape, lesion=(CENTRE + 12, 9.0, 300.0)), affine, "fixed")
    return Volume(ball.array, around_centre(np.diag([0.9, 1.4, 1.1]), np.zeros(3)) @ affine, "fixed")


def around_centre(linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = CENTRE + shift - linear @ CENTRE
    return matrix


def distance(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean, in mm, between where two maps take points around the phantom's centre."""
    points = np.append(CENTRE + np.random.default_rng(0).normal(0, 15, (200, 3)), np.ones((200, 1)), axis=1)
    return float(np.linalg.norm((points @ (found - truth).T)[:, :3], axis=1).mean())


@pytest.mark.parametrize(
    ("angles", "stretch", "shift"),
    [
        ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
        ((12, -8, 15), (1, 1, 1), (9, -14, 6)),
        ((5, 10, -6), (1.12, 0.92, 1.05), (-5, 8, 12)),
    ],
)
def test_a_known_map_is_found_to_half_a_voxel(angles: tuple, stretch: tuple, shift: tuple) -> None:
    fixed = egg()
    truth = around_centre(Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(stretch), shift)
    assert distance(register(moved(fixed, truth), fixed), truth) < 1.0


def test_what_lies_beyond_the_part_of_interest_does_not_count() -> None:
    (straight, affine, part), (bent, *_) = with_neck(0.0), with_neck(0.3)
    fixed = Volume(straight, affine, "fixed")
    truth = around_centre(Rotation.from_euler("xyz", (8, 5, -6), degrees=True).as_matrix() * 1.02, np.array([5, -8, 6]))
    moving = moved(fixed.with_array(bent), truth)
    by_all, by_part = (distance(register(moving, fixed, within), truth) for within in (None, part))
    assert by_part < 1.0
    assert by_all > 3 * by_part


def test_air_that_is_below_zero_has_no_weight() -> None:
    """As in a prior's units: however much of it is on one side."""
    fixed = egg()
    fixed = fixed.with_array(fixed.array / 500 - 1)
    truth = around_centre(Rotation.from_euler("xyz", (5, -4, 8), degrees=True).as_matrix(), np.array([6, -9, 4]))
    beside = Volume(np.pad(fixed.array, ((0, 90), (0, 0), (0, 0)), constant_values=-1), truth @ fixed.affine, "moved")
    assert distance(register(beside, fixed), truth) < 1.0


def test_it_does_not_depend_on_brightness_or_chance() -> None:
    fixed = egg()
    truth = around_centre(np.eye(3) * 1.05, np.array([6.0, -4.0, 3.0]))
    inverted = moved(fixed.with_array(1000 - fixed.array**1.3), truth)
    first = register(inverted, fixed)
    np.testing.assert_array_equal(register(inverted, fixed), first)
    apart = (first - truth) @ np.append(CENTRE + 10, 1)
    assert np.linalg.norm(apart[:3]) < 1.5


def test_a_volume_carried_over_lies_where_the_other_scan_is() -> None:
    affine, matrix = grid((20, 20, 20)), around_centre(np.diag([1.1, 0.9, 1.0]), np.array([3.0, 4.0, 5.0]))
    volume = Volume(np.zeros((20, 20, 20)), affine, "atlas")
    point = np.append(volume.to_world((3, 4, 5)), 1)
    np.testing.assert_allclose(carried(volume, matrix).to_world((3, 4, 5)), (matrix @ point)[:3])


def test_scans_that_do_not_meet_are_refused_by_name() -> None:
    shape = (32, 32, 32)
    affine = grid(shape)
    constant = Volume(np.zeros(shape, np.float32), affine, "empty")
    with pytest.raises(MedfusionError, match="empty: cannot be registered to fixed"):
        register(constant, Volume(head(affine, shape), affine, "fixed"))
