"""Parametrisations, preconditioning, variances and guidance, against formulas written out and the oracle."""

import math

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from medfusion.diffusion import VE, VP, Denoiser, GaussianMixture, SubVP, separate, target
from medfusion.diffusion.denoiser import reverse_variance
from tests.diffusion.test_process import MONAI, close, every_process

PREDICTIONS = ["epsilon", "x0", "v", "score", "edm"]
THREE = pytest.mark.parametrize("process", [VP("cosine"), SubVP("linear"), VE(0.01, 50.0)], ids=str)
ORACLE = GaussianMixture(
    torch.tensor([0.3, 0.7]),
    torch.tensor([[-1.0, 0.5], [0.8, 0.0]]),
    torch.tensor([[[0.1, 0.05], [0.05, 0.2]], [[0.3, 0.0], [0.0, 0.04]]]),
)


def batch(process, ratios, dtype=torch.float64):
    """x_0, noise and a time a sample, at noise ratios that the process has."""
    highest = float(process.noise_ratio(1.0))
    t = process.time_of(torch.tensor([r for r in ratios if r < highest], dtype=torch.float64))
    x0, noise = torch.randn(2, len(t), 1, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x0.to(dtype), noise.to(dtype), t


def wide(value):
    return value.view(-1, 1, 1, 1, 1)


def written_out(prediction, process, x0, noise, t, sigma_data=0.5):
    """The definitions, one by one."""
    alpha, sigma = wide(process.alpha(t)), wide(process.sigma(t))
    if prediction == "edm":  # D = c_skip y + c_out F solved for F (Karras et al. 2022, eq. 7), y = x_0 + r eps
        r = sigma / alpha
        c_skip = sigma_data**2 / (r**2 + sigma_data**2)
        c_out = r * sigma_data / (r**2 + sigma_data**2).sqrt()
        return (x0 - c_skip * (x0 + r * noise)) / c_out
    return {"epsilon": noise, "x0": x0, "v": alpha * noise - sigma * x0, "score": -noise / sigma}[prediction]


# Parametrisations


@every_process
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_is_its_definition(process, prediction):
    x0, noise, t = batch(process, [0.003, 0.1, 1.0, 10.0, 49.0])
    close(target(prediction, process, x0, noise, t), written_out(prediction, process, x0, noise, t), rtol=1e-9)


@every_process
@pytest.mark.parametrize("a", PREDICTIONS)
@pytest.mark.parametrize("b", PREDICTIONS)
def test_every_parametrisation_converts_into_every_other(process, a, b):
    """Ratios r at which the smaller of x_0 and r eps is lost in rounding by a factor of max(r, 1 / r) at most."""
    for dtype, ratios, bound in (
        (torch.float64, [0.003, 0.1, 1.0, 10.0, 49.0], 1e-10),
        (torch.float32, [0.1, 0.5, 1.0, 3.0, 10.0], 1e-5),
    ):
        x0, noise, t = batch(process, ratios, dtype)
        x = process.add_noise(x0, noise, t)
        back = separate(a, process, target(a, process, x0, noise, t), x, t)
        assert back[0].dtype == dtype
        close(back[0], x0, rtol=bound, atol=bound)
        close(back[1], noise, rtol=bound, atol=bound)
        close(target(b, process, *back, t), target(b, process, x0, noise, t), rtol=bound, atol=bound)


def test_edm_of_unit_data_on_vp_is_minus_v():
    process = VP("linear")
    x0, noise, t = batch(process, [0.01, 0.1, 1.0, 10.0, 100.0])
    close(target("edm", process, x0, noise, t, sigma_data=1.0), -target("v", process, x0, noise, t))


@every_process
def test_score_target_is_the_gradient_of_the_log_density_of_the_noise(process):
    x0, noise, t = batch(process, [0.003, 0.1, 1.0, 10.0, 49.0])
    x = process.add_noise(x0, noise, t).requires_grad_()
    log_q = torch.distributions.Normal(wide(process.alpha(t)) * x0, wide(process.sigma(t))).log_prob(x)
    (gradient,) = torch.autograd.grad(log_q.sum(), x)
    close(target("score", process, x0, noise, t), gradient, rtol=1e-8, atol=1e-8)


def test_unknown_prediction_is_refused():
    x0, noise, t = batch(VP(), [1.0])
    with pytest.raises(ValueError, match="'noise' is none of"):
        target("noise", VP(), x0, noise, t)


# The denoiser


@THREE
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_answers_the_truth_gives_the_posterior_mean(process, prediction):
    """Whatever it predicts, the optimal network stands for the oracle's E[x_0 | x_t]."""
    x0, noise, t = batch(process, [0.003, 0.1, 1.0, 10.0, 49.0])
    x0, noise = x0[:, 0, 0, 0, :2], noise[:, 0, 0, 0, :2]
    x = process.add_noise(x0, noise, t)
    mean = ORACLE.denoiser(process)(x, t)

    def network(seen, log_noise_ratio):
        ratio = log_noise_ratio.exp()[:, None]
        close(seen, x if prediction != "edm" else x / process.alpha(t)[:, None] / (ratio**2 + 0.25).sqrt())
        alpha = process.alpha(t)[:, None]
        shape = (len(x), 2, 1, 1, 1)
        eps = (x - alpha * mean) / (alpha * ratio)
        return written_out(prediction, process, mean.view(shape), eps.view(shape), t).view_as(x)

    close(Denoiser(network, process, prediction)(x, t), mean, rtol=1e-9, atol=1e-9)


@THREE
def test_edm_is_the_preconditioning_of_karras(process):
    """D = c_skip y + c_out F(c_in y) with y = x_t / alpha."""
    x0, noise, t = batch(process, [0.02, 0.1, 1.0, 10.0])
    x, sigma_data = process.add_noise(x0, noise, t), 0.7

    def network(x, log_noise_ratio):
        return torch.sin(3 * x + wide(log_noise_ratio))

    r, y = wide(process.noise_ratio(t)), x / wide(process.alpha(t))
    c_skip = sigma_data**2 / (r**2 + sigma_data**2)
    c_out = r * sigma_data / (r**2 + sigma_data**2).sqrt()
    c_in = 1 / (r**2 + sigma_data**2).sqrt()
    expected = c_skip * y + c_out * network(c_in * y, r.log())
    close(Denoiser(network, process, "edm", sigma_data=sigma_data)(x, t), expected)


@every_process
def test_score_is_the_gradient_of_the_log_density_of_the_oracle(process):
    for ratio in (0.05, 0.3, 1.0, 2.9):
        t = process.time_of(ratio)
        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(ORACLE.noised(process, t).log_prob(x).sum(), x)
        close(ORACLE.denoiser(process).score(x.detach(), t), gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(prediction, half):
    """An answer below 1 is rounded by 2^-12 in float16, 2^-9 in bfloat16; |d x_0 / d answer| <= 1 at r = 0.5."""
    process, t = VP(), VP().time_of(0.5)
    x = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).to(half)

    def network(x, log_noise_ratio):
        assert x.dtype == torch.float32
        return torch.tanh(x)

    in_half = Denoiser(lambda x, r: network(x, r).to(half), process, prediction)(x, t)
    in_single = Denoiser(network, process, prediction)(x.float(), t)
    assert in_half.dtype == torch.float32
    close(in_half, in_single, rtol=1e-6, atol=2.0**-12 if half == torch.float16 else 2.0**-9)
    assert not torch.equal(in_half, in_single)
    assert Denoiser(network, process, prediction).answer(x, t)[0].dtype == torch.float32  # what losses see


def test_a_time_serves_the_whole_batch_or_one_sample():
    denoise = ORACLE.denoiser(VP())
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    both = torch.cat([denoise(x[:1], 0.2), denoise(x[1:], torch.tensor(0.7))])
    close(denoise(x, torch.tensor([0.2, 0.7], dtype=torch.float64)), both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("answer", "learned", "t", "error", "message"),
    [
        (lambda x: x, False, 0.0, ValueError, "times in"),
        (lambda x: x, False, 1.5, ValueError, r"\[0, 1\]"),
        (lambda x: x, False, torch.tensor([0.5, 0.0]), ValueError, "times in"),
        (lambda x: x, True, 0.5, ValueError, "not 2 channels"),
        (lambda x: torch.cat([x, x], dim=1), False, 0.5, ValueError, "not 1 channels"),
        (lambda x: x[..., :2], False, 0.5, ValueError, "answers"),
        (lambda x: x / 0, False, 0.5, FloatingPointError, r"not finite at t = 0\.5"),
        (lambda x: x * math.nan, False, torch.tensor([0.1, 0.5]), FloatingPointError, "not finite"),
        (
            lambda x: torch.cat([x, x * math.nan], dim=1),
            True,
            0.5,
            FloatingPointError,
            "network's output is not finite",
        ),
    ],
)
def test_bad_times_and_answers_are_refused(answer, learned, t, error, message):
    denoise = Denoiser(lambda x, r: answer(x), VP(), "v", learned_variance=learned)
    with pytest.raises(error, match=message):
        denoise(torch.ones(2, 1, 3, 3, 3), t)


# The variance of a reverse step


@pytest.mark.parametrize("schedule", MONAI)
def test_fixed_variances_are_those_of_monai(schedule):
    small, large = (
        DDPMScheduler(num_train_timesteps=100, variance_type=f"fixed_{kind}", **MONAI[schedule])
        for kind in ("small", "large")
    )
    process = VP(schedule, 100)
    for k in (2, 3, 50, 99, 100):  # MONAI's index is k - 1
        for scheduler, kind in ((small, "small"), (large, "large")):
            variance = reverse_variance(process, (k - 1) / 100, k / 100, kind)
            close(variance, scheduler._get_variance(k - 1), rtol=2e-3 if schedule == "cosine" else 5e-4)


@every_process
def test_variances_are_those_of_posterior_and_transition(process):
    t = torch.arange(2, process.steps + 1, dtype=torch.float64) / process.steps
    s = torch.arange(1, process.steps, dtype=torch.float64) / process.steps
    x = torch.zeros(len(t), 1, dtype=torch.float64)
    close(reverse_variance(process, s, t, "small"), process.posterior(x, x, s, t)[1])
    close(reverse_variance(process, s, t, "large"), process.transition(s, t)[1])


@every_process
def test_variance_of_the_step_to_the_clean_image_is_that_of_the_one_before(process):
    """The posterior is the point x_0 there; improved DDPM takes the small variance of k = 2 for k = 1."""
    first, second = 1 / process.steps, 2 / process.steps
    close(reverse_variance(process, 0.0, first, "small"), reverse_variance(process, first, second, "small"))
    close(reverse_variance(process, 0.0, first, "large"), process.sigma(first) ** 2)


@THREE
def test_learned_variance_is_interpolated_in_its_logarithm(process):
    """exp(f log large + (1 - f) log small) (Nichol & Dhariwal 2021, eq. 15), f = (network's answer + 1) / 2."""
    steps = process.steps
    x = torch.randn(3, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, t = torch.tensor([0, 1, steps - 1]).double() / steps, torch.tensor([1, 2, steps]).double() / steps
    small, large = (wide(reverse_variance(process, s, t, kind)) for kind in ("small", "large"))
    for position, f in ((-1.0, 0.0), (0.5, 0.75), (1.0, 1.0)):
        denoise = Denoiser(lambda x, r, p=position: torch.cat([x, x * 0 + p], dim=1), process, "x0", True)
        x0, fraction = denoise.estimate(x, t)
        close(x0, x)
        close(fraction, x * 0 + f)
        variance = reverse_variance(process, s, t, "learned", fraction)
        close(variance, (large**f * small ** (1 - f)).expand_as(x))


def test_learned_variance_of_a_network_without_it_is_refused():
    _, fraction = Denoiser(lambda x, r: x, VP(), "v").estimate(torch.ones(1, 1, 2), 0.5)
    assert fraction is None
    with pytest.raises(ValueError, match="needs a denoiser with learned variance"):
        reverse_variance(VP(), 0.4, 0.5, "learned", fraction)


@pytest.mark.parametrize("fraction", [None, torch.full((1, 1, 2), 0.5)], ids=["fixed", "learned"])
def test_unknown_variances_and_steps_to_an_earlier_time_are_refused(fraction):
    for s in (0.4, 0.0):
        with pytest.raises(ValueError, match="'fixed_small' is none of small, large, learned"):
            reverse_variance(VP(), s, 0.5, "fixed_small", fraction)
    for kind in ("small", "large", "learned"):
        with pytest.raises(ValueError, match="from s to a later t"):
            reverse_variance(VP(), 0.5, 0.4, kind, fraction)


# Guidance


@pytest.mark.parametrize(
    ("guidance", "error", "message"),
    [
        (lambda x, t, x0: x0[:1], ValueError, r"answers \(2, 1, 3\) with \(1, 1, 3\)"),
        (lambda x, t, x0: x0.mean(), ValueError, r"with \(\)"),
        (lambda x, t, x0: x0 * math.nan, FloatingPointError, r"guidance's output is not finite at t = 0\.5"),
    ],
)
def test_bad_guidance_is_refused(guidance, error, message):
    denoise = Denoiser(lambda x, r: x, VP(), "v").guided(guidance)
    with pytest.raises(error, match=message):
        denoise(torch.ones(2, 1, 3), 0.5)


def test_guidance_is_applied_in_order_and_keeps_the_learned_variance():
    x, t = torch.full((2, 1, 2), 3.0), torch.tensor([0.2, 0.6], dtype=torch.float64)
    plain = Denoiser(lambda x, r: torch.cat([x, x * 0 + 0.5], dim=1), VP(), "x0", learned_variance=True)
    seen = []

    def double(x, t, x0):
        seen.append((x, t))
        return 2 * x0

    both = plain.guided(double).guided(lambda x, t, x0: x0 + 1)
    x0, fraction = both.estimate(x, t)
    close(x0, 2 * x + 1)
    close(fraction, plain.estimate(x, t)[1])
    close(seen[0][0], x)
    close(seen[0][1], t)
    close(both.answer(x, t)[0], x)  # what the network is trained on is its own answer
    close(plain(x, t), x)
    close(both.score(x, t), (VP().alpha(t)[:, None, None] * (2 * x + 1) - x) / VP().sigma(t)[:, None, None] ** 2, 1e-5)
