"""The audit of synthetic cases drops those that do not show their labels and those that are copies, and no others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from segmentation_factory import SPACING, image_of, label_map

from medfusion.config import PreprocessingConfig, SegmenterConfig
from medfusion.data.crops import Case, prepare
from medfusion.tasks.audit_synthetic import FEWEST, NEAR, Audit, audit_cases, distances, lowest, nearness, thumbnails
from medfusion.tasks.segmenter import mean_dice, segment, train_segmenter
from medfusion.volume import Volume

QUICK = SegmenterConfig(channels=(8, 16), steps=60, learning_rate=1e-2)
AFFINE = np.diag([SPACING] * 3 + [1.0])


def case(name: str, seed: int) -> Case:
    labels = label_map(seed)
    scan, map_ = (Volume(array, AFFINE, name) for array in (image_of(labels, seed), labels))
    return prepare(scan, PreprocessingConfig(), labels=map_)


@pytest.fixture(scope="module")
def real() -> list[Case]:
    return [case(f"real{seed:02d}", seed) for seed in range(16)]


@pytest.fixture(scope="module")
def audit(real: list[Case]) -> Audit:
    """Of ten sound new cases, one with the labels of another, a real scan, and one that is it but for contrast."""
    good = [case(f"new{seed}", seed) for seed in range(100, 110)]
    wrong = replace(case("wrong", 110), labels=torch.from_numpy(label_map(111)).flip(1))
    copy, brighter = replace(real[3], name="copy"), replace(real[5], name="brighter", image=real[5].image * 0.8 + 0.1)
    return audit_cases(real, [*good, wrong, copy, brighter], ["real00"] * 13, 3, QUICK)


def test_it_drops_what_is_unfaithful_or_a_copy_and_little_else(audit: Audit) -> None:
    assert set(audit.dropped) >= {"wrong", "copy", "brighter"}
    assert len(audit.dropped) <= 4  # by each of the two distances one sound case in a hundred is too near
    assert audit.dropped["wrong"].startswith("does not show its labels: Dice 0.")
    assert "too near to real03 by image: 0," in audit.dropped["copy"]
    assert "too near to real05 by image" in audit.dropped["brighter"]


def test_dice_of_real_and_sound_cases_is_alike(audit: Audit) -> None:
    assert audit.real_dice.mean() > 0.8
    assert audit.faithful[:10].mean() == pytest.approx(audit.real_dice.mean(), abs=0.06)
    assert len(audit.diversity["real"]) == 16 * 15 / 2
    assert set(audit.distances) == {"Frechet distance", "MMD", "precision", "recall"}


def test_nobody_is_judged_by_a_segmenter_that_saw_it(real: list[Case]) -> None:
    """With labels that are pure chance, memory alone could give a good Dice."""
    rng = np.random.default_rng(0)
    chance = [replace(one, labels=torch.from_numpy(rng.permuted(one.labels.numpy(), axis=0))) for one in real[:FEWEST]]
    few = SegmenterConfig(channels=(8, 16), steps=20)
    children = [replace(one, name=f"child of {one.name}") for one in chance]
    found = audit_cases(chance, children, [one.name for one in chance], 3, few)
    np.testing.assert_allclose(found.faithful, found.real_dice)
    assert len(found.dropped) == FEWEST  # copies


def test_nearness_is_what_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    real, new = rng.normal(size=(12, 5)), rng.normal(size=(7, 5))
    found = nearness(real, new, [f"r{n}" for n in range(12)])
    np.testing.assert_allclose(found.distance, [min(np.linalg.norm(real - one, axis=1)) for one in new])
    assert found.nearest == tuple(f"r{np.linalg.norm(real - one, axis=1).argmin()}" for one in new)
    own = [min(np.linalg.norm(real[k] - real[m]) for m in range(12) if m != k) for k in range(12)]
    np.testing.assert_allclose(found.real, own)
    assert found.threshold == lowest(np.array(own))
    pairs = [np.linalg.norm(real[k] - real[m]) for k in range(12) for m in range(k)]
    assert found.of_pairs == pytest.approx(np.percentile(pairs, NEAR))


def test_one_new_case_in_a_hundred_is_nearer_however_many_real_cases_there_are() -> None:
    rng = np.random.default_rng(0)
    for number, low, high in ((10, 0.005, 0.03), (30, 0.005, 0.02), (200, 0.005, 0.02)):
        nearer = []
        for _ in range(200):
            drawn = rng.lognormal(1.0, 0.3, number + 100)
            nearer.append((drawn[number:] < lowest(drawn[:number])).mean())
        assert low < np.mean(nearer) < high
    assert lowest(np.array([0.0, 0.0, 1.0])) == 0.0  # copies among the real cases


def test_sets_that_are_too_small_have_no_distance(real: list[Case]) -> None:
    found = audit_cases(real, [case("new", 100)], ["real00"], 3, SegmenterConfig(channels=(4, 8), steps=1))
    assert found.distances == {}
    assert len(found.diversity["synthetic"]) == 0


def test_distances_are_near_zero_for_one_distribution_and_not_for_two() -> None:
    rng = np.random.default_rng(1)
    real, same, other = rng.normal(size=(60, 6)), rng.normal(size=(60, 6)), 2 + rng.normal(size=(60, 6))
    alike, apart = distances(real, same, seed=0), distances(real, other, seed=0)
    for name in ("Frechet distance", "MMD"):
        assert alike[name]["synthetic"].low < 0.2
        assert apart[name]["synthetic"].low > 1
    assert alike["precision"]["synthetic"].value > 0.5 > apart["precision"]["synthetic"].value


def test_thumbnails_are_cut_and_padded_about_the_middle() -> None:
    image = torch.arange(6.0 * 7 * 8).view(6, 7, 8)
    one = Case("a", image, np.zeros(3), 2.0, 1.0)
    small = thumbnails([one], (4, 9, 8))
    assert small.shape == (1, 4, 9, 8)
    np.testing.assert_array_equal(small[0, :, 1:8], image[1:5].numpy())
    np.testing.assert_array_equal(small[0, :, 0], image[1:5, 0].numpy())


def test_a_segmenter_learns_and_depends_on_its_seed_alone(real: list[Case]) -> None:
    few = SegmenterConfig(channels=(8, 16), steps=10, learning_rate=1e-2)
    torch.manual_seed(5)
    first = train_segmenter([real[:4], real[4:8]], 3, few, seed=1)
    torch.manual_seed(6)
    second, third = (train_segmenter([real[:4], real[4:8]], 3, few, seed=seed) for seed in (1, 2))
    weights = [torch.cat([w.flatten() for w in network.parameters()]) for network in (first, second, third)]
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_dice_counts_labels_that_are_in_one_map_only() -> None:
    truth = torch.tensor([[[0, 1, 1, 2]]])
    assert mean_dice(truth.numpy().astype(np.uint8), truth, 4) == 1.0
    assert mean_dice(np.array([[[0, 1, 1, 3]]], np.uint8), truth, 4) == pytest.approx(1 / 3)
    assert mean_dice(np.zeros((1, 1, 4), np.uint8), torch.zeros(1, 1, 4), 3) == 1.0


def test_volumes_of_any_size_are_segmented(real: list[Case]) -> None:
    network = train_segmenter([real[:2]], 3, SegmenterConfig(channels=(4, 8), steps=1), seed=0)
    assert segment(network, torch.zeros(13, 17, 30)).shape == (13, 17, 30)
