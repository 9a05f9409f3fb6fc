"""Cubes are blended without seams, and work that looks no further than the surroundings sees no difference."""

import pytest
import torch
from torch.nn import functional as F

from medfusion.tasks.tiles import HALO, tiled


@pytest.mark.parametrize("shape", [(40, 33, 70), (16, 16, 100), (65, 64, 63)])
@pytest.mark.parametrize("tile", [16, 24, 32, 50])
def test_work_that_looks_no_further_than_the_surroundings(shape, tile):
    x = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(0))

    def blurred(part):
        return F.avg_pool3d(part, 7, stride=1, padding=3, count_include_pad=False)

    torch.testing.assert_close(tiled(blurred, x, tile), blurred(x), atol=1e-5, rtol=0)


def test_no_part_is_larger_than_a_tile_with_its_surroundings():
    seen = []

    def work(part):
        seen.append(part.shape[2:])
        return part[:, :1]

    x = torch.randn(1, 2, 70, 130, 20)
    torch.testing.assert_close(tiled(work, x, 32), x[:, :1], atol=1e-6, rtol=0)
    assert len(seen) == 3 * 5
    assert max(map(max, seen)) == 32 + 2 * HALO


def test_where_parts_disagree_one_fades_into_the_other():
    values = iter(range(10))
    ramp = tiled(lambda part: torch.full_like(part, next(values)), torch.zeros(1, 1, 64, 8, 8), 32)[0, 0, :, 0, 0]
    assert (ramp[:24], ramp[40:]) == (pytest.approx(0), pytest.approx(1))
    torch.testing.assert_close(ramp.diff()[24:39], torch.full((15,), 1 / 16))


def test_what_fits_is_done_at_once():
    calls = []
    tiled(lambda part: calls.append(part.shape) or part, torch.zeros(1, 1, 30, 20, 32), 32)
    assert calls == [(1, 1, 30, 20, 32)]
