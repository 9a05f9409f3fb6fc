"""Processes against MONAI's scheduler, against their own SDE, and against Gaussians conditioned by hand."""

import math

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from medfusion.diffusion import VE, VP, SubVP, expand, ncsn_ratio, noise_like, time_steps

MONAI = {
    "linear": {"schedule": "linear_beta", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"schedule": "scaled_linear_beta", "beta_start": 1e-4, "beta_end": 0.02},
    "sigmoid": {"schedule": "sigmoid_beta", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"schedule": "cosine"},
}
PROCESSES = [
    VP("cosine", 1000),
    VP("linear", 1000),
    VP("scaled_linear", 400),
    VP("sigmoid", 400),
    SubVP("linear", 1000),
    SubVP("cosine", 20),
    VE(0.01, 50.0, 1000),
    VE(0.2, 3.0, 2),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=str)


def times_of(process, number=40):
    """Times in (0, 1): random ones, and some within the first step, none on the grid."""
    late = torch.rand(number, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cat([torch.tensor([1e-3, 0.1, 0.5, 0.9], dtype=torch.float64) / process.steps, late])


def close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


# The discrete chain


@pytest.mark.parametrize("schedule", MONAI)
@pytest.mark.parametrize("steps", [50, 1000])
def test_discrete_values_are_those_of_monai(schedule, steps):
    """MONAI computes in float32: 1 - ratio in its cosine betas is known to 1e-7 at best."""
    theirs, ours = DDPMScheduler(num_train_timesteps=steps, **MONAI[schedule]), VP(schedule, steps)
    rtol, atol = (1e-4, 2e-6) if schedule == "cosine" else (1e-6, 1e-9)
    close(ours.beta, theirs.betas, rtol=rtol, atol=atol)
    close(ours.alpha_bar, theirs.alphas_cumprod, rtol=1e-4 if schedule == "cosine" else 2e-6, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "sigmoid"])
def test_betas_begin_and_end_where_asked_as_those_of_monai(schedule):
    """0.0015 to 0.0195 are those of latent diffusion models."""
    ends = {"beta_start": 0.0015, "beta_end": 0.0195}
    theirs = DDPMScheduler(num_train_timesteps=1000, **MONAI[schedule] | ends)
    close(VP(schedule, 1000, **ends).beta, theirs.betas, rtol=1e-6, atol=1e-9)
    for kind in (VP, SubVP):
        close(kind(schedule, 1000, **ends).alpha_bar, theirs.alphas_cumprod, rtol=5e-6, atol=0)
        assert kind(schedule) == kind(schedule, beta_start=1e-4, beta_end=0.02)


@pytest.mark.parametrize("schedule", MONAI)
def test_posterior_is_that_of_monai(schedule):
    """MONAI's formulas on our betas: in its own float32 tables 1 - alpha_bar has lost four digits."""
    theirs, ours = DDPMScheduler(num_train_timesteps=100, **MONAI[schedule]), VP(schedule, 100)
    theirs.betas, theirs.alphas, theirs.alphas_cumprod = ours.beta, 1 - ours.beta, torch.cumprod(1 - ours.beta, dim=0)
    generator = torch.Generator().manual_seed(0)
    x0, x = (torch.randn(1, 1, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    for k in (1, 2, 3, 50, 99, 100):  # their index is k - 1
        mean, variance = ours.posterior(x0, x, (k - 1) / 100, k / 100)
        close(mean, theirs._get_mean(k - 1, x0, x))
        close(variance, theirs._get_variance(k - 1) if k > 1 else 0.0)


@pytest.mark.parametrize("schedule", MONAI)
def test_alpha_bar_is_the_product_of_one_minus_beta_and_sub_vp_shares_it(schedule):
    vp, sub_vp = VP(schedule, 200), SubVP(schedule, 200)
    close(vp.alpha_bar, torch.cumprod(1 - vp.beta, dim=0))
    close(sub_vp.alpha_bar, vp.alpha_bar)


def test_sigmas_of_ve_are_in_geometric_progression():
    process = VE(0.01, 50.0, 10)
    close(process.sigma(process.grid), [0.01 * 5000 ** (k / 9) for k in range(10)])


# Continuous time


@every_process
def test_signal_and_noise_obey_the_definition_of_the_process(process):
    t = torch.cat([torch.zeros(1, dtype=torch.float64), times_of(process), process.grid])
    alpha, sigma = process.alpha(t), process.sigma(t)
    close({VP: (1 - alpha**2).sqrt(), SubVP: 1 - alpha**2, VE: sigma}[type(process)], sigma, atol=1e-8)
    close(process.noise_ratio(t), sigma / alpha)
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)
    if isinstance(process, VE):
        close(alpha, torch.ones_like(t))


@every_process
def test_ratio_between_grid_points_is_log_linear_and_before_the_first_a_brownian_motion(process):
    first, second = process.noise_ratio(process.grid[:2]).tolist()
    close(process.noise_ratio(0.25 / process.steps), 0.5 * first)
    close(process.noise_ratio(1.25 / process.steps), first**0.75 * second**0.25)


@every_process
def test_drift_and_diffusion_are_those_of_alpha_and_sigma(process):
    """f = d log alpha / dt and g^2 = d sigma^2 / dt - 2 f sigma^2, the derivatives by autograd."""
    t = times_of(process).requires_grad_()
    (f,) = torch.autograd.grad((process.alpha(t).log() + 0 * t).sum(), t)  # alpha of VE does not depend on t
    (growth,) = torch.autograd.grad(process.sigma(t).square().sum(), t)
    with torch.no_grad():
        close(process.drift(t), f)
        close(process.diffusion(t) ** 2, growth - 2 * f * process.sigma(t) ** 2, rtol=1e-9)


@every_process
def test_drift_and_diffusion_at_a_grid_point_are_those_of_the_step_that_ends_there(process):
    """They jump there; a reverse sampler goes to the left. ``time_steps`` rounds the grid otherwise than the chain."""
    for grid in (process.grid, time_steps(process, process.steps)[:-1]):
        for value in (process.drift, process.diffusion):
            close(value(grid), value(grid - 1e-7 / process.steps), rtol=1e-6)


def test_linear_vp_is_the_sde_of_song():
    """beta(t) = 0.1 + 19.9 t (Song et al. 2021b, appendix C); the chain's - T log(1 - beta / T) is 1 % above at 1."""
    process = VP("linear", 1000)
    t = torch.arange(50, 1000, dtype=torch.float64) / 1000 - 0.0005
    beta = 0.1 + 19.9 * t
    close(process.drift(t), -beta / 2, rtol=0.011)
    close(process.diffusion(t), beta.sqrt(), rtol=0.011)
    close(process.alpha(t), torch.exp(-(0.1 * t + 9.95 * t**2) / 2), rtol=0.035)  # the integral of that 1 %


def test_diffusion_of_sub_vp_and_ve_is_the_published_one():
    """g^2 = beta (1 - exp(-2 int beta)) (Song et al. 2021b, eq. 29), g = sigma (2 log(max / min))^(1/2) (eq. 30)."""
    process = SubVP("linear", 1000)
    t = times_of(process)
    beta, integral = -2 * process.drift(t), -2 * process.alpha(t).log()
    close(process.diffusion(t), (beta * -torch.expm1(-2 * integral)).sqrt())
    process = VE(0.01, 50.0, 500)
    t = torch.linspace(0.003, 1, 50, dtype=torch.float64)
    of_song = process.sigma(t) * math.sqrt(2 * math.log(50 / 0.01))
    close(process.diffusion(t), of_song * math.sqrt(500 / 499))  # sigma_min lies at the first step, not at t = 0
    close(process.drift(t), torch.zeros_like(t))


def pairs_of(process):
    """(s, t), s < t: from the clean image, within the first step, out of it, further on."""
    share = torch.tensor([0.0, 0.3, 0.3, 0.9, 1.5], dtype=torch.float64) / process.steps
    s = torch.cat([share, 0.9 * torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)])
    return s, torch.cat([share[:3] + 0.5 / process.steps, torch.linspace(0.91, 1, 22, dtype=torch.float64)])


@every_process
def test_marginal_then_transition_is_the_later_marginal(process):
    s, t = pairs_of(process)
    scale, variance = process.transition(s, t)
    close(scale * process.alpha(s), process.alpha(t))
    close(scale**2 * process.sigma(s) ** 2 + variance, process.sigma(t) ** 2)


@every_process
def test_posterior_is_that_of_bayes(process):
    """q(x_s | x_t, x_0) from precisions: 1 / sigma_s^2 of the marginal, scale^2 / variance of the transition."""
    s, t = (times[1:] for times in pairs_of(process))
    x0, x = torch.randn(2, len(s), 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scale, variance = process.transition(s, t)
    precision = process.sigma(s) ** -2 + scale**2 / variance
    from_past = expand(process.alpha(s) / process.sigma(s) ** 2, x0) * x0
    expected = (from_past + expand(scale / variance, x) * x) / expand(precision, x)
    mean, actual = process.posterior(x0, x, s, t)
    close(mean, expected, rtol=1e-8, atol=1e-8)
    close(actual, 1 / precision, rtol=1e-8)
    mean, actual = process.posterior(x0, x, 0.0, t)
    close(mean, x0)
    assert float(actual.max()) == 0


@every_process
def test_time_of_and_noise_ratio_are_inverse(process):
    t = torch.cat([torch.tensor([0.0, 1e-9, 1.0], dtype=torch.float64), times_of(process), process.grid])
    close(process.time_of(process.noise_ratio(t)), t, atol=1e-10)
    ratio = torch.cat([torch.zeros(1), torch.logspace(-6, math.log10(float(process.noise_ratio(1.0))), 50)]).double()
    ratio = ratio.clamp(max=float(process.noise_ratio(1.0)))
    close(process.noise_ratio(process.time_of(ratio)), ratio, rtol=1e-9)


@every_process
def test_the_time_of_every_step_is_found_from_what_a_network_is_told(process):
    """Networks get log r in float32, wrong by 3e-7 at most, which may lie beyond the last step."""
    found = process.time_of(process.log_noise_ratio(process.grid).float().exp())
    close(found, process.grid, rtol=0, atol=1e-5)
    assert float(found.max()) <= 1


def test_values_come_in_the_shape_of_the_time():
    process = VP()
    assert process.alpha(0.5).shape == ()
    assert process.alpha(torch.rand(2, 3)).shape == (2, 3)
    assert process.sigma(torch.rand(2)).dtype == torch.float64


def test_add_noise_scales_image_and_noise_of_each_sample():
    process, t = SubVP(), torch.tensor([0.1, 0.7])
    x0, noise = torch.randn(2, 2, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    x = process.add_noise(x0, noise, t)
    assert x.dtype == torch.float32
    for k in range(2):
        expected = float(process.alpha(t[k])) * x0[k] + float(process.sigma(t[k])) * noise[k]
        close(x[k], expected, rtol=1e-6, atol=1e-6)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    def generators(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    batch = noise_like(torch.empty(3, 2, 4), generators(5, 6, 7))
    close(batch[1:2], noise_like(torch.empty(1, 2, 4), generators(6)), rtol=0, atol=0)
    whole = torch.randn(3, 2, 4, generator=generators(5)[0])
    close(noise_like(torch.empty(3, 2, 4), generators(5)), whole, rtol=0, atol=0)
    assert noise_like(torch.empty(2, 1, dtype=torch.bfloat16), generators(1)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="3 sample"):
        noise_like(torch.empty(3, 2), generators(1, 2))


@every_process
def test_times_outside_the_unit_interval_are_refused(process):
    for t in (-1e-9, 1.0 + 1e-9, math.nan, torch.tensor([0.5, 1.5])):
        for value in (process.alpha, process.sigma, process.noise_ratio, process.drift, process.diffusion):
            with pytest.raises(ValueError, match=r"\[0, 1\]"):
                value(t)


@every_process
def test_drift_at_the_clean_image_and_impossible_ratios_are_refused(process):
    for value in (process.drift, process.diffusion):
        with pytest.raises(ValueError, match="t > 0"):
            value(torch.tensor([0.5, 0.0]))
    for ratio in (-1e-9, 1e9, math.inf, math.nan):
        with pytest.raises(ValueError, match="noise ratio"):
            process.time_of(ratio)


@every_process
def test_steps_to_an_earlier_time_are_refused(process):
    x, s, t = torch.zeros(2, 3), torch.tensor([0.2, 0.6]), torch.tensor([0.4, 0.5])
    for call in (lambda: process.transition(s, t), lambda: process.posterior(x, x, s, t)):
        with pytest.raises(ValueError, match="from s to a later t"):
            call()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP(steps=1), "at least 2 steps"),
        (lambda: SubVP(steps=0), "at least 2 steps"),
        (lambda: VE(steps=1), "at least 2 steps"),
        (lambda: VP("lineer"), "'lineer' is none of linear, scaled_linear, sigmoid, cosine"),
        (lambda: SubVP("lineer"), "'lineer' is none of"),
        (lambda: VP(beta_start=0.0), "betas"),
        (lambda: VP(beta_start=0.03), "betas"),
        (lambda: SubVP(beta_end=1.0), "betas"),
        (lambda: VE(0.0, 1.0), "sigma_min"),
        (lambda: VE(2.0, 1.0), "sigma_min"),
        (lambda: VE(0.1, math.inf), "sigma_min"),
        (lambda: VE(0.1, math.nan), "sigma_min"),
    ],
)
def test_impossible_processes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# NCSN's noise sequence


@pytest.mark.parametrize("dimensions", [5, 27, 3072, 64**3])
def test_ncsn_ratio_solves_its_equation(dimensions):
    """The normal distribution function is written with math.erf; the slope in gamma is below 1e4."""

    def phi(z):
        return (1 + math.erf(z / math.sqrt(2))) / 2

    gamma, root = ncsn_ratio(dimensions), math.sqrt(2 * dimensions)
    overlap = phi(root * (gamma - 1) + 3 * gamma) - phi(root * (gamma - 1) - 3 * gamma)
    assert gamma > 1
    assert overlap == pytest.approx(0.5, abs=1e-8)


def test_noise_sequence_of_data_spans_the_largest_distance_in_small_enough_steps():
    data = torch.randn(7, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    process = VE.of_data(data, sigma_min=0.02)
    flat = data.double().flatten(1).tolist()
    assert process.sigma_max == pytest.approx(max(math.dist(a, b) for a in flat for b in flat), rel=1e-12)
    assert process.sigma_min == 0.02
    gamma, span = ncsn_ratio(8), process.sigma_max / 0.02
    assert span ** (1 / (process.steps - 1)) <= gamma < span ** (1 / (process.steps - 2))
    assert process.noise_ratio(process.grid).diff().min() > 0


def test_noise_sequence_without_distance_or_dimension_is_refused():
    for data in (torch.zeros(1, 8), torch.ones(3, 8), torch.full((3, 8), math.nan)):
        with pytest.raises(ValueError, match="largest distance"):
            VE.of_data(data)
    with pytest.raises(ValueError, match="4 dimension"):
        VE.of_data(torch.eye(4))
    for dimensions in (-1, 0, 4):
        with pytest.raises(ValueError, match="dimension"):
            ncsn_ratio(dimensions)
