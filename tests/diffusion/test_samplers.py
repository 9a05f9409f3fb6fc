"""Samplers against MONAI step for step, the oracle's mixture, and what they promise: callbacks, batches, errors."""

import math
from itertools import pairwise

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

from medfusion.diffusion import (
    VE,
    VP,
    Denoiser,
    annealed_langevin,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    heun,
    inpaint,
    langevin,
    noise_like,
    predictor_corrector,
    probability_flow,
    time_steps,
)
from tests.diffusion.test_mixture import PROCESSES, all_processes, mixture, seeded

MONAI = {
    "linear": {"schedule": "linear_beta", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"schedule": "scaled_linear_beta", "beta_start": 1e-4, "beta_end": 0.02},
    "sigmoid": {"schedule": "sigmoid_beta", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"schedule": "cosine"},
}
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
SAMPLERS = {  # (denoise, x, times, generators) -> samples
    "ddim": lambda d, x, t, g: ddim(d, x, t),
    "ddim-stochastic": lambda d, x, t, g: ddim(d, x, t, eta=0.5, generators=g),
    "ddpm-small": lambda d, x, t, g: ddpm(d, x, t, generators=g),
    "ddpm-large": lambda d, x, t, g: ddpm(d, x, t, variance="large", generators=g),
    "annealed-langevin": lambda d, x, t, g: annealed_langevin(d, x, t, step_size=1.0, steps=4, generators=g),
    "euler-maruyama": lambda d, x, t, g: euler_maruyama(d, x, t, generators=g),
    "predictor-corrector": lambda d, x, t, g: predictor_corrector(d, x, t, generators=g),
    "heun": lambda d, x, t, g: heun(d, x, t),
    "dpm-solver": lambda d, x, t, g: dpm_solver(d, x, t),
}
all_samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def monai_scheduler(kind, schedule, prediction, **options):
    """MONAI's betas with what follows from them in float64: its own float32 tables lose four digits near the image."""
    theirs = kind(1000, prediction_type=PREDICTIONS[prediction], clip_sample=False, **MONAI[schedule], **options)
    theirs.betas = theirs.betas.double()
    theirs.alphas = 1 - theirs.betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(dim=0)
    return theirs


def answering(output, schedule, prediction):
    return Denoiser(lambda x, log_noise_ratio: output, VP(schedule, 1000), prediction)


def random_step():
    """x and a network's answer."""
    return torch.randn(2, 3, 1, 5, 5, 5, generator=seeded(0), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", MONAI)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_steps_are_those_of_monai(variance, schedule, prediction):
    """MONAI's index k - 1 is time k / T. Its betas are float32; the cosine ones a difference of such, good to 1e-3."""
    theirs = monai_scheduler(DDPMScheduler, schedule, prediction, variance_type=f"fixed_{variance}")
    x, output = random_step()
    for k in (1, 2, 3, 100, 500, 901, 1000):
        expected, _ = theirs.step(output, k - 1, x, generator=seeded(k))
        times = torch.tensor([k, k - 1], dtype=torch.float64) / 1000
        ours = ddpm(answering(output, schedule, prediction), x, times, variance=variance, generators=[seeded(k)])
        tolerance = 1e-3 if schedule == "cosine" else 1e-5
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", MONAI)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_are_those_of_monai(eta, schedule, prediction):
    """With 50 steps MONAI goes from index k - 1 to k - 21, and from 19, k = 20, to the clean image."""
    theirs = monai_scheduler(DDIMScheduler, schedule, prediction)
    theirs.set_timesteps(50)
    x, output = random_step()
    for k in (20, 21, 100, 500, 901, 1000):
        expected, _ = theirs.step(output, k - 1, x, eta=eta, generator=seeded(k))
        times = torch.tensor([k, k - 20], dtype=torch.float64) / 1000
        ours = ddim(answering(output, schedule, prediction), x, times, eta=eta, generators=[seeded(k)])
        tolerance = 1e-3 if schedule == "cosine" else 1e-5
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# Steps, evenly spaced in log SNR, and how far they leave a sampler from the mixture: the most that was measured on
# 30 000 samples in one and two dimensions, rounded up. (weight, mean, covariance relative to the variances)
RECOVERY = {
    "ddim": (50, 0.01, 0.025, 0.2),
    "ddim-stochastic": (50, 0.015, 0.025, 0.15),
    "ddpm-small": (50, 0.025, 0.02, 0.25),
    "ddpm-large": (80, 0.02, 0.01, 0.25),
    "annealed-langevin": (50, 0.04, 0.005, 0.25),
    "euler-maruyama": (100, 0.01, 0.005, 0.1),
    "predictor-corrector": (80, 0.02, 0.01, 0.25),
    "heun": (30, 0.01, 0.015, 0.1),
    "dpm-solver": (50, 0.005, 0.005, 0.07),
}


every_process_and_dimension = pytest.mark.parametrize(
    ("process", "shape"),
    [
        pytest.param(process, shape, id=f"{name}-{math.prod(shape)}")
        for shape in ((1,), (2,), (1, 3, 3, 3))
        for name, process in PROCESSES.items()
    ],
)


@every_process_and_dimension
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_the_mixture(name, process, shape):
    """Weights, means and covariances, within four standard errors and what the steps leave."""
    dimensions = math.prod(shape)
    oracle, n = mixture(dimensions), 200 if dimensions == 27 else 1500
    steps, *allowances = RECOVERY[name]
    x = float(process.sigma(1.0)) * torch.randn(n, *shape, generator=seeded(0))
    x = SAMPLERS[name](oracle.denoiser(process), x, time_steps(process, steps, "log_snr"), [seeded(1)])
    require_mixture(x, oracle, *allowances)


@every_process_and_dimension
def test_probability_flow_follows_the_mixture(process, shape):
    dimensions = math.prod(shape)
    oracle, n = mixture(dimensions), 200 if dimensions == 27 else 1500
    x = float(process.sigma(1.0)) * torch.randn(n, *shape, generator=seeded(0))
    x = probability_flow(oracle.denoiser(process), x, 1.0, 1 / process.steps)
    require_mixture(x, oracle.noised(process, 1 / process.steps), 0, 0, 0)


def require_mixture(x, oracle, weight_allowance, mean_allowance, covariance_allowance):
    x, n = x.double().flatten(1), len(x)
    of = torch.cdist(x, oracle.means).argmin(dim=1)
    for j, (weight, mean, covariance) in enumerate(zip(oracle.weights, oracle.means, oracle.covariances, strict=True)):
        mine, deviations = x[of == j], covariance.diagonal().sqrt()
        assert abs(len(mine) / n - weight) < 4 * math.sqrt(weight * (1 - weight) / n) + weight_allowance
        error = deviations / len(mine) ** 0.5
        assert bool(((mine.mean(dim=0) - mean).abs() < 4 * error + mean_allowance).all())
        scale = torch.outer(deviations, deviations)
        error = ((scale**2 + covariance**2) / len(mine)).sqrt()  # of an entry of a normal's covariance
        gap = (mine.T.cov() - covariance).abs()
        assert bool((gap < 4 * error + covariance_allowance * scale).all())


@all_processes
def test_learned_variance_is_small_at_one_end_and_large_at_the_other(process):
    exact = mixture(2).denoiser(process)
    x, times = torch.randn(20, 2, generator=seeded(0), dtype=torch.float64), time_steps(process, 10, "log_snr")

    def answering(position):
        def network(x, log_noise_ratio):
            return torch.cat([exact.network(x, log_noise_ratio), torch.full_like(x, position)], dim=1)

        return Denoiser(network, process, "x0", learned_variance=True)

    for position, variance in ((-1.0, "small"), (1.0, "large")):
        learned = ddpm(answering(position), x, times, variance="learned", generators=[seeded(1)])
        fixed = ddpm(exact, x, times, variance=variance, generators=[seeded(1)])
        torch.testing.assert_close(learned, fixed, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="learned variance"):
        ddpm(exact, x, times, variance="learned", generators=[seeded(1)])


@all_processes
def test_langevin_steps_inside_samplers_are_where_and_as_long_as_is_said(process):
    """Of 0.1 sigma^2 after every step but that to 0; in annealed dynamics at every level, of sigma^2 unless said."""
    exact, times, evaluated = mixture(2).denoiser(process), torch.tensor([0.4, 0.3, 0.2, 0.0], dtype=torch.float64), []
    x = torch.randn(5, 2, generator=seeded(0), dtype=torch.float64)
    denoise = exact.guided(lambda x, t, x0: evaluated.append(float(t[0])) or x0)

    def corrected(x, t, size, steps, generators):
        return langevin(exact, x, t, step_size=size * float(process.sigma(t)) ** 2, steps=steps, generators=generators)

    for given, corrections in (({}, 1), ({"corrections": 2}, 2), ({"corrections": 0}, 0)):
        evaluated.clear()
        found = predictor_corrector(denoise, x, times, generators=[seeded(1)], **given)
        assert evaluated == [0.4, *[0.3] * (corrections + 1), *[0.2] * (corrections + 1)]
        generators, expected = [seeded(1)], x
        for t, s in pairwise(times):
            expected = ddpm(exact, expected, torch.stack([t, s]), variance="large", generators=generators)
            if s > 0:
                expected = corrected(expected, s, 0.1, corrections, generators)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for given, size, steps in (({}, 1.0, 5), ({"step_size": 0.3, "steps": 2}, 0.3, 2)):
        evaluated.clear()
        found = annealed_langevin(denoise, x, times, generators=[seeded(1)], **given)
        assert evaluated == [*[0.4] * steps, *[0.3] * steps, *[0.2] * (steps + 1)]
        generators, expected = [seeded(1)], x
        for t, s in pairwise(times):
            expected = corrected(expected, t, size, steps, generators)
            expected = exact(expected, t) if s == 0 else process.alpha(s) / process.alpha(t) * expected
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@all_processes
def test_the_last_step_of_heun_is_to_what_the_denoiser_says(process):
    """Exactly, though by way of the slope it would be lost in rounding where r is large."""
    denoise, x = mixture(2).denoiser(process), torch.randn(5, 2, generator=seeded(0))
    for t in (1.0, 0.5, 0.01):
        assert torch.equal(heun(denoise, x, torch.tensor([t, 0.0])), denoise(x, torch.tensor(t)))


def elementwise(process):
    """A denoiser whose answer for a sample cannot depend on the others, not even by rounding."""
    return Denoiser(lambda x, log_noise_ratio: torch.tanh(x), process, "x0")


@all_samplers
def test_a_sample_does_not_depend_on_its_batch(sampler):
    process = VP("cosine")

    def run(seeds):
        generators = [seeded(seed) for seed in seeds]
        x = noise_like(torch.empty(len(seeds), 1, 4, 4, 4), generators)
        return sampler(elementwise(process), x, time_steps(process, 6, start=0.5), generators)

    together = run([5, 6, 7])
    for k, seed in enumerate([5, 6, 7]):
        torch.testing.assert_close(together[k : k + 1], run([seed]), rtol=0, atol=0)


@pytest.mark.parametrize(
    "sampler",
    [ddim, ddpm, annealed_langevin, euler_maruyama, predictor_corrector, heun, dpm_solver],
)
def test_callback_sees_every_step_and_its_end(sampler):
    process, seen = VP("cosine"), []
    given = {} if sampler in (ddim, heun, dpm_solver) else {"generators": [seeded(0)]}
    x = sampler(
        elementwise(process),
        torch.ones(2, 1, 2, 2, 2),
        time_steps(process, 6, start=0.8),
        callback=lambda step, x: seen.append((step, x)),
        **given,
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(seen[-1][1], x)
    assert not torch.equal(seen[-2][1], x)


@pytest.mark.parametrize(
    "sampler",
    [
        *SAMPLERS.values(),
        lambda d, x, t, g: langevin(d, x, 0.5, step_size=0.1, steps=2, generators=g),
        lambda d, x, t, g: probability_flow(d, x, 0.5, 0.1),
        lambda d, x, t, g: inpaint(d, x, torch.tensor([True, False]), t, generators=g),
    ],
    ids=[*SAMPLERS, "langevin", "probability-flow", "inpaint"],
)
def test_no_graph_is_kept_of_a_network_in_training_or_of_x(sampler):
    slope = torch.tensor(1.1, requires_grad=True)
    denoise = Denoiser(lambda x, log_noise_ratio: torch.tanh(slope * x), VP("cosine"), "x0")
    assert denoise(torch.ones(3, 2), 0.5).requires_grad
    x = sampler(denoise, torch.ones(3, 2, requires_grad=True), time_steps(VP("cosine"), 4, start=0.5), [seeded(0)])
    assert not x.requires_grad


@pytest.mark.parametrize("answer", [lambda x: x, lambda x: torch.cat([x, x], dim=1)], ids=["fixed", "learned"])
def test_a_variance_that_is_none_is_refused(answer):
    x = torch.zeros(1, 4)
    denoise = Denoiser(lambda x, r: answer(x), VP(), "v", learned_variance=answer(x).shape != x.shape)
    for sampler in (ddpm, predictor_corrector):
        for times in ([0.5, 0.4], [0.5, 0.0]):
            with pytest.raises(ValueError, match="'fixed_small' is none of small, large, learned"):
                sampler(denoise, x, torch.tensor(times), variance="fixed_small", generators=[seeded(0)])


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_an_eta_outside_0_to_1_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta lies in \[0, 1\]"):
        ddim(elementwise(VP()), torch.zeros(1, 4), torch.tensor([0.5, 0.4]), eta=eta, generators=[seeded(0)])


@pytest.mark.parametrize(
    ("sampler", "given"),
    [
        (langevin, {"t": 0.5, "step_size": 0.0, "steps": 1}),
        (langevin, {"t": 0.5, "step_size": -0.1, "steps": 1}),
        (langevin, {"t": 0.5, "step_size": 0.1, "steps": -1}),
        (annealed_langevin, {"step_size": 0.0}),
        (annealed_langevin, {"step_size": -0.1}),
        (annealed_langevin, {"steps": 0}),
        (annealed_langevin, {"steps": -1}),
        (predictor_corrector, {"step_size": 0.0}),
        (predictor_corrector, {"step_size": -0.1}),
        (predictor_corrector, {"corrections": -1}),
    ],
)
def test_langevin_steps_that_cannot_be_are_refused(sampler, given):
    times = {} if sampler is langevin else {"times": torch.tensor([0.5, 0.4])}
    with pytest.raises(ValueError, match="needs "):
        sampler(elementwise(VP()), torch.zeros(1, 4), generators=[seeded(0)], **times, **given)


@all_samplers
def test_output_that_is_not_finite_stops_the_run(sampler):
    process = VP("cosine")
    for bad in (math.nan, math.inf):
        broken = Denoiser(lambda x, log_noise_ratio, bad=bad: x.where(log_noise_ratio > 0, bad), process, "v")
        with pytest.raises(FloatingPointError, match="not finite at t = 0"):
            sampler(broken, torch.zeros(1, 4), time_steps(process, 10, start=0.9), [seeded(0)])


@all_samplers
@pytest.mark.parametrize(
    "times", [[], [0.5], [0.2, 0.8], [0.8, 0.8, 0.1], [1.1, 0.5], [0.5, -0.1], [0.9, math.nan, 0.1], [[0.9, 0.1]]]
)
def test_times_that_do_not_fall_within_0_and_1_are_refused(sampler, times):
    with pytest.raises(ValueError, match="times fall from at most 1 to at least 0"):
        sampler(elementwise(VP()), torch.zeros(1, 4), torch.tensor(times), [seeded(0)])


@pytest.mark.parametrize(
    "name", ["ddim-stochastic", "ddpm-small", "annealed-langevin", "euler-maruyama", "predictor-corrector"]
)
@pytest.mark.parametrize("generators", [0, 2, 4])
def test_generators_are_one_a_sample_or_one(name, generators):
    given = [seeded(k) for k in range(generators)]
    with pytest.raises(ValueError, match=rf"3 sample\(s\) need as many generators, or one for all; got {generators}"):
        SAMPLERS[name](elementwise(VP()), torch.zeros(3, 4), torch.tensor([0.5, 0.49]), given)


def test_euler_maruyama_refuses_steps_in_which_noise_would_grow():
    """VE's log r rises by log(5000) = 8.52 over [0, 1]: 9 steps are enough and 8 are not."""
    process = VE(0.01, 50.0)
    denoise, x = mixture(2).denoiser(process), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"unstable from t = 1 to 0.875: log r would change by 1.07, at most 1"):
        euler_maruyama(denoise, x, time_steps(process, 8), generators=[seeded(0)])
    assert bool(torch.isfinite(euler_maruyama(denoise, x, time_steps(process, 9), generators=[seeded(0)])).all())
    with pytest.raises(ValueError, match="start below t = 1"):
        euler_maruyama(mixture(2).denoiser(VP("cosine")), x, time_steps(VP("cosine"), 100), generators=[seeded(0)])


@all_samplers
def test_half_precision_costs_no_more_than_its_own_rounding(sampler):
    """bfloat16 rounds to 1 part in 256: so does the last x_0, and thereby the sample."""
    process, times = VP("cosine"), time_steps(VP("cosine"), 6, start=0.5)
    halved = Denoiser(lambda x, log_noise_ratio: torch.tanh(x.bfloat16()), process, "x0")
    x = torch.randn(2, 1, 4, 4, 4, generator=seeded(0)).bfloat16()
    ours = sampler(halved, x, times, [seeded(1)])
    exact = sampler(elementwise(process), x.float(), times, [seeded(1)])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=0, atol=0.02)


@all_processes
@pytest.mark.parametrize("start", [1.0, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_time_steps_have_their_spacing(process, start, steps):
    share = torch.arange(steps + 1).double() / steps
    torch.testing.assert_close(time_steps(process, steps, start=start), start * (1 - share))
    torch.testing.assert_close(time_steps(process, steps, "quadratic", start=start), start * (1 - share) ** 2)
    high, low = (float(process.noise_ratio(t)) for t in (start, 1 / process.steps))
    share = torch.arange(steps).double() / max(steps - 1, 1)
    for spacing, ratios in (
        ("log_snr", high * (low / high) ** share),
        ("karras", (high ** (1 / 7) + share * (low ** (1 / 7) - high ** (1 / 7))) ** 7),
    ):
        times = time_steps(process, steps, spacing, start=start)
        assert times[0] == start
        assert times[-1] == 0
        assert len(times) == steps + 1
        assert bool((times.diff() < 0).all())
        torch.testing.assert_close(process.noise_ratio(times[:-1]), ratios, rtol=1e-9, atol=0)


def test_time_steps_that_cannot_be_are_refused():
    for steps, start in ((0, 1.0), (5, 0.0), (5, 1.1), (5, math.nan)):
        with pytest.raises(ValueError, match="needs steps >= 1 and a start in"):
            time_steps(VP(), steps, start=start)
    with pytest.raises(ValueError, match="'cubic' is none of uniform, quadratic, log_snr, karras"):
        time_steps(VP(), 5, "cubic")
    for spacing in ("log_snr", "karras"):  # the first step of 1000 is at 0.001
        with pytest.raises(ValueError, match="needs a start above the first step"):
            time_steps(VP(), 4, spacing, start=5e-4)
        assert time_steps(VP(), 1, spacing, start=5e-4).tolist() == [5e-4, 0]
