"""Batches: a function of (seed, number) alone, however they are shared out; times as the config says."""

import numpy as np
import pytest
import torch
from prior_factory import tiny_config
from toy_runs import toy_cases

from medfusion.data.crops import Case
from medfusion.prior import build_process
from medfusion.training.batches import Order, Sample, Samples, default_workers, end_workers, loader


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return toy_cases(3)


def _equal(one: Sample, other: Sample) -> None:
    pairs = zip((*one.crop, one.seed, one.t), (*other.crop, other.seed, other.t), strict=True)
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_sample_is_a_function_of_seed_and_number_whoever_draws_it(cases: list[Case]) -> None:
    config = tiny_config(training={"steps": 3, "batch": 4})
    samples = Samples(cases, config)
    alone = [samples[number] for number in reversed(range(12))][::-1]
    for workers in (0, 2):
        parts = iter(loader(samples, Order(config, 0, 0, 1), workers))
        for step, part in enumerate(parts):
            for index in range(4):
                picked = Sample(
                    type(part.crop)(*(None if x is None else x[index] for x in part.crop)),
                    part.seed[index],
                    part.t[index],
                )
                _equal(picked, alone[4 * step + index])
        end_workers(parts)
    assert not torch.equal(alone[0].seed, alone[1].seed)
    assert not torch.equal(alone[0].seed, Samples(cases, tiny_config(training={"seed": 1}))[0].seed)


def test_the_scans_named_for_a_step_are_those_it_is_cut_from(cases: list[Case]) -> None:
    chosen = tiny_config(training={"batch": 1})
    for wanted in range(3):
        marked = [Case(c.name, c.image * 0 + (i == wanted), c.centre, 2.0, 1.0) for i, c in enumerate(cases)]
        samples = Samples(marked, chosen)
        for step in range(10):
            bright = bool(samples[step].crop.image.mean() > 0.5)
            assert bright == (samples.scans_of_step(step) == [f"case{wanted}"])


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_parts_of_all_processes_are_each_step_once(accumulate: int, processes: int) -> None:
    config = tiny_config(training={"steps": 5, "batch": 12, "accumulate": accumulate})
    orders = [Order(config, 2, rank, processes) for rank in range(processes)]
    assert {len(order) for order in orders} == {3 * accumulate}
    for step in range(3):
        seen = [
            n for order in orders for part in list(order)[step * accumulate : (step + 1) * accumulate] for n in part
        ]
        assert sorted(seen) == list(range(12 * (step + 2), 12 * (step + 3)))


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_times_follow_the_config(cases: list[Case], share: float) -> None:
    times = {"lognormal_share": share, "median": 0.2, "spread": 0.5}
    config = tiny_config(training={"times": times})
    samples, process = Samples(cases, config), build_process(config)
    t = torch.stack([samples._time(seed) for seed in range(3000)])
    assert float(t.min()) >= 1 / process.steps
    assert float(t.max()) <= 1
    log = process.noise_ratio(t.double()).log()
    below = float((log < np.log(0.2)).double().mean())
    uniform_below = float(process.time_of(0.2))
    assert below == pytest.approx(share / 2 + (1 - share) * uniform_below, abs=0.03)
    within = float(((log - np.log(0.2)).abs() < 0.5).double().mean())
    ends = [float(process.time_of(0.2 * np.exp(s))) for s in (-0.5, 0.5)]
    assert within == pytest.approx(share * 0.6827 + (1 - share) * (ends[1] - ends[0]), abs=0.03)


def test_noise_is_standard_normal_and_independent_of_the_crop(cases: list[Case]) -> None:
    config = tiny_config(training={"batch": 20})
    samples = Samples(cases, config)
    batch = next(iter(loader(samples, Order(config, 0, 0, 1), 0)))
    noise = batch.shown(torch.device("cpu"), config.noise_shape).noise
    again = batch._replace(seed=batch.seed.flip(0)).shown(torch.device("cpu"), config.noise_shape).noise
    torch.testing.assert_close(again, noise.flip(0), rtol=0, atol=0)  # each crop's own, wherever it stands in a batch
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    image = torch.stack([samples[number].crop.image for number in range(20)])
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), image.flatten()]))[0, 1])) < 0.02


def test_workers_are_for_gpus_whose_scans_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_workers(torch.device("cpu"), resident=False) == 0
    assert default_workers(torch.device("cuda"), resident=True) == 0
    alone = default_workers(torch.device("cuda"), resident=False)
    assert 1 <= alone <= 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert default_workers(torch.device("cuda"), resident=False) == 1
