"""Registration: the affine map between two scans of one anatomy (SimpleITK)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medfusion.data.grid import canonical, nearest, resampled
from medfusion.errors import MedfusionError
from medfusion.volume import Volume

if TYPE_CHECKING:
    from SimpleITK import Image

SPACING = 4.0  # mm
STEP, SMALLEST_STEP, ITERATIONS = 1.0, 1e-4, 200  # of the gradient descent
BINS = 32  # of the joint histogram


def register(moving: Volume, fixed: Volume, within: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """(4, 4) from world millimetres of ``fixed`` to those of ``moving``, of the same point of the anatomy.

    First rigid, then affine, by mutual information (Mattes et al. 2003), from the centres of mass: scans that lie more
    than some 40 degrees apart are not brought together. ``within`` (i, j, k) is the part of ``fixed`` that counts:
    without it, what ``moving`` ends before is squeezed into it.

    Raises
    ------
    MedfusionError : the scans do not overlap enough to be compared.
    """
    import SimpleITK as sitk

    grid, other = (resampled(canonical(volume), SPACING) for volume in (fixed, moving))
    target, source = _image(grid), _image(other)
    masses = [_image(volume.with_array(volume.array - volume.array.min())) for volume in (grid, other)]  # air weighs 0
    counts = None
    if within is not None:
        counts = _image(grid.with_array(nearest(fixed.with_array(within.astype(np.uint8)), grid))) > 0.5
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # several add up in any order, and bits differ
    try:
        centred = sitk.CenteredTransformInitializer(
            *masses, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
        )
        rigid = sitk.Euler3DTransform(_descend(target, source, centred, counts))
        start = sitk.AffineTransform(3)
        start.SetCenter(rigid.GetCenter())
        start.SetMatrix(rigid.GetMatrix())
        start.SetTranslation(rigid.GetTranslation())
        found = sitk.AffineTransform(_descend(target, source, start, counts))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise MedfusionError(f"{moving.name}: cannot be registered to {fixed.name}", reason=reason) from error
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    matrix, centre = np.eye(4), np.array(found.GetCenter())
    matrix[:3, :3] = np.array(found.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = np.array(found.GetTranslation()) + centre - matrix[:3, :3] @ centre
    return matrix


def carried(volume: Volume, matrix: NDArray[np.float64]) -> Volume:
    """The volume where the anatomy of the other scan is: ``matrix`` as of ``register``, with ``volume`` as fixed."""
    return replace(volume, affine=matrix @ volume.affine)


def _image(volume: Volume) -> Image:
    """For SimpleITK, whose physical space is here that of RAS millimetres."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.astype(np.float32).transpose(2, 1, 0)))
    image.SetSpacing(volume.spacing.tolist())
    image.SetOrigin(volume.affine[:3, 3].tolist())
    image.SetDirection((volume.affine[:3, :3] / volume.spacing).ravel().tolist())
    return image


def _descend(fixed: Image, moving: Image, start: object, counts: Image | None) -> object:
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    if counts is not None:
        method.SetMetricFixedMask(counts)
    method.SetOptimizerAsRegularStepGradientDescent(STEP, SMALLEST_STEP, ITERATIONS)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([SPACING, SPACING / 2])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(start, inPlace=False)
    method.SetInterpolator(sitk.sitkLinear)
    result = method.Execute(fixed, moving)
    return result.GetBackTransform() if isinstance(result, sitk.CompositeTransform) else result
