"""Grids: reorientation is exact and undone exactly; resampling keeps what lies where in the world."""

import numpy as np
import pytest
from nibabel import orientations

from medfusion.data.grid import canonical, from_canonical, onto_grid, resampled
from medfusion.volume import Volume


def oblique(codes="RAS", spacing=(1.0, 2.0, 3.0), shape=(10, 12, 14), degrees=12.0):
    angle = np.deg2rad(degrees)
    rotation = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(spacing)
    affine[:3, 3] = (-30.0, 12.5, 7.0)
    flips = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(codes))
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    turned = orientations.apply_orientation(array, flips)
    return Volume(turned, affine @ orientations.inv_ornt_aff(flips, shape), "oblique")


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "SAL", "IRP"])
def test_canonical_is_exact_and_undone_exactly(codes):
    volume = oblique(codes)
    upright = canonical(volume)
    assert volume.orientation == codes
    assert upright.orientation == "RAS"
    np.testing.assert_array_equal(upright.array, oblique("RAS").array)
    np.testing.assert_allclose(upright.affine, oblique("RAS").affine, atol=1e-12)
    np.testing.assert_array_equal(from_canonical(upright.array, volume), volume.array)


def world_ramp(volume):
    """Values that are a linear function of world position: interpolation must reproduce them anywhere."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in volume.shape], indexing="ij"), axis=-1)
    return volume.with_array((volume.to_world(index) @ [0.3, -0.5, 0.7]).astype(np.float32))


@pytest.mark.parametrize("spacing", [0.8, 2.0, 3.7])
def test_resampling_keeps_the_world_position_of_values(spacing):
    volume = world_ramp(oblique(shape=(40, 24, 20)))
    result = resampled(volume, spacing)
    np.testing.assert_allclose(result.spacing, spacing, rtol=1e-9)
    assert result.array.dtype == np.float32
    inner = tuple(slice(n // 4, -(n // 4)) for n in result.shape)
    np.testing.assert_allclose(result.array[inner], world_ramp(result).array[inner], atol=0.02)
    extent = np.array(result.shape) * result.spacing
    np.testing.assert_allclose(extent, np.array(volume.shape) * volume.spacing, atol=spacing)


def test_a_grid_at_the_wanted_spacing_is_left_alone():
    volume = oblique(spacing=(2.01, 1.99, 2.0))
    assert resampled(volume, 2.0) is volume


def test_onto_grid_brings_a_map_back_to_the_scan():
    scan = world_ramp(oblique("PSR", shape=(40, 24, 20)))
    work = resampled(canonical(scan), 2.0)
    back = onto_grid(work, scan)
    assert back.shape == scan.shape
    inner = tuple(slice(n // 4, -(n // 4)) for n in scan.shape)
    np.testing.assert_allclose(back[inner], scan.array[inner], atol=0.05)
