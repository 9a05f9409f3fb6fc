"""Calibrate: what is said of healthy scans holds for healthy scans that the reference has not seen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prior_factory import grid, head, random_prior, saved
from reference_factory import SIZE, calibrated, cohort, healthy, silent
from scipy import stats

from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.reference import CLUSTER_P, SHARES, TISSUES, Reference, false_discovery, standardise, weigh
from medfusion.tasks.calibrate import gather, head_in, make_reference, moments, tissue_factors
from medfusion.tasks.detect import detect_volume
from medfusion.tasks.place import healthy_at, in_box, on_scan
from medfusion.tasks.rebuild import METHODS, examine
from medfusion.tasks.scores import combine
from medfusion.volume import Volume


@pytest.fixture(scope="module")
def prior() -> Prior:
    return calibrated(("intensity",), number=20)


def test_healthy_scans_it_has_not_seen_score_as_it_says(prior: Prior) -> None:
    shares, scan_ps = [], []
    for seed in range(100, 112):
        found = detect_volume(healthy(seed), prior, method="intensity")
        p = found.p_value.array[found.p_value.array < 1]
        shares.append([np.mean(p < level) for level in (0.05, 0.01)])
        scan_ps.append(found.scan_p)
    ratios = np.mean(shares, axis=0) / (0.05, 0.01)  # a dozen phantoms: one that is unlike the others counts for much
    assert (np.abs(np.log(ratios)) < np.log(3.5)).all()
    # a scan without any cluster has a p of 1, as many healthy ones do: low ones must not come too often
    assert stats.kstest(scan_ps, "uniform", alternative="greater").pvalue > 0.05
    assert min(scan_ps) < 0.5


def test_a_scan_is_standardised_by_the_others_alone() -> None:
    prior = random_prior()
    scans = cohort(prior, 10)
    rest = replace(scans, scans=scans.scans[1:], matrices=scans.matrices[1:])
    full, others = (make_reference(each, prior, "blur", progress=silent) for each in (scans, rest))
    seen, matrix, atlas = scans.scans[0], scans.matrices[0], scans.healthy.atlas
    here = healthy_at(seen.volume, matrix, scans.healthy)
    found = examine(seen, here, prior, "blur", stripped=False, seed=0)
    box = in_box(seen.volume, found.box)
    mean, sd = (np.stack([on_scan(c, atlas, matrix, box) for c in both]) for both in (others.mean, others.sd))
    z = standardise(found.raw, found.rebuilt, mean, sd, full.tissue)
    inside = here.inside[found.box]
    _, weights = weigh(combine(z, METHODS["blur"].score), inside, full.height, box.voxel_ml)
    assert weights.max(initial=0.0) == pytest.approx(full.heaviest[0], rel=0.02, abs=1e-3)
    by_itself = standardise(
        found.raw,
        found.rebuilt,
        *(np.stack([on_scan(c, atlas, matrix, box) for c in both]) for both in (full.mean, full.sd)),
        full.tissue,
    )
    assert np.abs(z[0][inside]).mean() > 1.03 * np.abs(by_itself[0][inside]).mean()


def test_the_maps_go_on_beyond_the_part_that_is_scored() -> None:
    inside = np.zeros((9, 9, 9), bool)
    inside[3:6, 3:6, 3:6] = True
    values = np.where(inside, np.arange(729).reshape(9, 9, 9), -1e6)[None]
    mean, _ = moments(values * 2, values**2 * 2, 2, inside)
    assert mean[0, 0, 4, 4] == mean[0, 3, 4, 4] == values[0, 3, 4, 4]


def test_a_tissue_that_varies_twice_as_much_has_a_factor_of_two() -> None:
    rng = np.random.default_rng(0)
    rebuilt = np.where(np.indices((20, 20, 20))[0] < 10, -0.4, 0.6).astype(np.float16)
    z = rng.normal(size=(2, 20, 20, 20)).astype(np.float32) * np.where(rebuilt > 0, 2, 1)

    class One:
        inside = np.ones((20, 20, 20), bool)

    One.rebuilt = rebuilt  # type: ignore[attr-defined]
    factors = tissue_factors([(z, One)])  # type: ignore[list-item]
    dark, bright = np.digitize([-0.4, 0.6], TISSUES[1:-1])
    np.testing.assert_allclose(factors[:, [dark, bright]], [[1, 2], [1, 2]], rtol=0.05)
    np.testing.assert_array_equal(np.delete(factors, [dark, bright], axis=1), 1)


def test_a_reference_is_kept_in_the_file_of_the_prior(prior: Prior, tmp_path: Path) -> None:
    [before] = prior.references
    [after] = Prior.load(saved(prior, tmp_path)).references
    assert (after.method, after.names, after.stripped) == (before.method, before.names, before.stripped)
    assert after.tissue_ml == pytest.approx(before.tissue_ml)
    np.testing.assert_array_equal(after.inside, before.inside)
    np.testing.assert_array_equal(after.affine, before.affine)
    for name in ("tail", "heaviest", "features", "tissue"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    for name in ("mean", "sd", "spread"):  # inside in half precision, beyond it as at the rim
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), rtol=1e-3, atol=1e-3)
    scan = healthy(50)
    one, other = (detect_volume(scan, p, method="intensity") for p in (prior, Prior.load(saved(prior, tmp_path))))
    np.testing.assert_allclose(one.anomaly.array, other.anomaly.array, atol=0.05)


def table(tail: np.ndarray, heaviest: list[float]) -> Reference:
    """A reference of which the tables alone matter."""
    maps = np.zeros((2, 1, 1, 1), np.float32)
    features = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]], np.float32)
    one = maps[0]
    return Reference(
        method="intensity",
        affine=np.eye(4),
        atlas=one,
        spread=one,
        inside=one > 0,
        mean=maps,
        sd=maps,
        tissue=maps,
        tail=tail.astype(np.float32),
        heaviest=np.array(heaviest, np.float32),
        features=features,
        names=("size",),
        tissue_ml=1.0,
        stripped=False,
    )


def test_p_values_are_the_shares_of_healthy_voxels() -> None:
    reference = table(stats.norm.isf(SHARES / 2), [])
    scores = np.array([0.0, 0.5, 1.0, 1.96, 3.29, 4.0, 99.0], np.float32)
    expected = 2 * stats.norm.sf(scores)
    np.testing.assert_allclose(reference.p_values(scores)[:-1], expected[:-1], rtol=0.02)
    assert reference.p_values(scores)[-1] == pytest.approx(1e-6)
    assert reference.height == pytest.approx(stats.norm.isf(CLUSTER_P / 2), rel=1e-3)


def test_the_p_of_a_region_counts_the_scan_itself() -> None:
    reference = table(np.zeros(len(SHARES)), [0.0, 0.2, 0.5, 0.5, 3.0])
    assert [reference.region_p(weight) for weight in (0.0, 0.3, 0.5, 2.0, 9.0)] == [1, 4 / 6, 4 / 6, 2 / 6, 1 / 6]


def test_the_farthest_healthy_scan_lies_at_one() -> None:
    reference = table(np.zeros(len(SHARES)), [])
    assert [round(reference.unlikeness(np.array([x]))["size"], 3) for x in (0.0, 2.0, 4.0, 8.0)] == [1, 0, 1, 3]


def test_false_discoveries_are_those_of_benjamini_and_hochberg() -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.uniform(size=900), rng.beta(0.2, 20, 100)]).astype(np.float32)
    limit = false_discovery(p, 0.1)
    np.testing.assert_array_equal(p <= limit, stats.false_discovery_control(p) <= 0.1)
    assert false_discovery(np.linspace(0.2, 1, 100, dtype=np.float32), 0.05) == 0.0


def test_a_region_weighs_its_volume_times_its_excess() -> None:
    score = np.zeros((9, 9, 9), np.float32)
    score[1:3, 1:3, 1:3] = 5.0
    score[3, 3, 3] = 4.5  # touches it by a corner
    score[6:8, 6:8, 6] = 8.0
    inside = np.ones(score.shape, bool)
    inside[7, 7, 6] = False
    labels, weights = weigh(score, inside, 4.0, 0.5)
    assert sorted(weights) == pytest.approx([(8 * 1.0 + 0.5) * 0.5, 3 * 4.0 * 0.5])
    assert (labels > 0).sum() == 12


def test_the_head_is_scored_with_its_cavities_and_without_its_rim() -> None:
    shape = (SIZE,) * 3
    array = head(grid(shape), shape, noise=10.0)
    hole = np.linalg.norm(np.indices(shape) - np.array([20, 18, 21])[:, None, None, None], axis=0) < 4
    array[hole] = 0
    part = head_in(array)
    assert part[hole].all()
    distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - 19.5, axis=-1) * 2
    assert not part[distance > 34].any()
    assert part[distance < 30].mean() > 0.99


def test_a_mask_says_what_is_scored() -> None:
    scans = [healthy(seed) for seed in range(10)]
    half = np.zeros((SIZE,) * 3, bool)
    half[: SIZE // 2] = True
    inside = gather(((scan, half) for scan in scans), random_prior(), stripped=False, progress=silent).healthy.inside
    left, right = inside[: inside.shape[0] // 2 - 1], inside[inside.shape[0] // 2 + 1 :]
    assert left.mean() > 0.9
    assert right.mean() < 0.1


def test_masks_without_a_place_in_common_are_refused() -> None:
    quarters = np.arange(4) == np.arange(SIZE)[:, None] * 4 // SIZE
    parts = [np.broadcast_to(quarters[:, seed % 4, None, None], (SIZE,) * 3) for seed in range(12)]
    with pytest.raises(MedfusionError, match="no place in common"):
        gather(((healthy(seed), parts[seed]) for seed in range(12)), random_prior(), stripped=False, progress=silent)


def test_an_empty_mask_is_named() -> None:
    parts = [np.full((SIZE,) * 3, seed != 3) for seed in range(10)]
    with pytest.raises(MedfusionError, match="head-3: nothing of it is of interest"):
        gather(((healthy(seed), parts[seed]) for seed in range(10)), random_prior(), stripped=False, progress=silent)


def test_too_few_scans_are_refused() -> None:
    with pytest.raises(MedfusionError, match=r"9 healthy scan\(s\) are too few"):
        cohort(random_prior(), 9)


def test_a_scan_that_the_prior_cannot_see_is_named() -> None:
    scans = [healthy(seed) for seed in range(10)]
    scans[3] = Volume(np.full((SIZE,) * 3, 5.0), scans[3].affine, "constant")
    with pytest.raises(MedfusionError, match="constant: no tissue"):
        gather(((scan, None) for scan in scans), random_prior(), stripped=False, progress=silent)
