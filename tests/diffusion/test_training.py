"""Small real networks on toy volumes: every objective trains, and every sampler makes volumes like the data."""

import pytest
import torch

from medfusion.diffusion import (
    VE,
    VP,
    Denoiser,
    ImportanceSampler,
    SubVP,
    annealed_langevin,
    bound_term,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    heun,
    hybrid_loss,
    inpaint,
    langevin,
    lognormal_times,
    noise_like,
    predictor_corrector,
    probability_flow,
    regression_loss,
    time_steps,
)
from medfusion.networks import ResidualUNet

COSINE, SUB_VP, EXPLODING = VP("cosine", 50), SubVP("cosine", 100), VE(0.2, 5.0, 100)


def balls(number, generator):
    """Volumes (number, 1, 8, 8, 8): a ball at 0.5 of random radius, in the middle of -0.5."""
    axis = torch.arange(8) - 3.5
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    radius = 1.5 + 2 * torch.rand(number, 1, 1, 1, 1, generator=generator)
    return 0.5 * torch.tanh(2 * (radius - distance))


def contrast(x):
    """Middle less corners of each volume, 1 for a ball."""
    return x[..., 3:5, 3:5, 3:5].flatten(1).mean(dim=1) - x[..., ::7, ::7, ::7].flatten(1).mean(dim=1)


def spread(x):
    """How much the mean of a volume varies between volumes: 0.096 for balls, as their radii do."""
    return float(x.flatten(1).mean(dim=1).std())


def train(network, steps, rate, loss):
    """Adam down to a rate of zero."""
    optimiser = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("weighting", "prediction", "process"),
    [
        ("simple", "epsilon", COSINE),  # DDPM
        ("simple", "x0", COSINE),
        ("min_snr", "v", COSINE),
        ("score_matching", "epsilon", EXPLODING),  # NCSN
        ("score_matching", "score", SUB_VP),
        ("likelihood", "score", COSINE),  # score SDEs
        ("likelihood", "epsilon", SUB_VP),
        ("likelihood", "epsilon", EXPLODING),
        ("edm", "edm", EXPLODING),  # with its log-normal times
        ("edm", "x0", COSINE),
    ],
    ids=str,
)
def test_every_regression_trains(weighting, prediction, process):
    """On volumes and noise that it has not seen the loss falls to less than 0.7 of that of a new network."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = ResidualUNet((8, 16), (1, 1))
    denoise = Denoiser(network, process, prediction)

    def draw(number):
        x0 = balls(number, generator)
        if weighting == "edm":
            t = lognormal_times(process, number, generator)
        else:
            t = 1 - (1 - 1 / process.steps) * torch.rand(number, generator=generator, dtype=torch.float64)
        return x0, torch.randn(x0.shape, generator=generator), t

    unseen = draw(64)
    before = float(regression_loss(denoise, *unseen, weighting).mean().detach())
    train(network, 80, 0.01, lambda: regression_loss(denoise, *draw(16), weighting).mean())
    assert float(regression_loss(denoise, *unseen, weighting).mean()) < 0.7 * before


@pytest.fixture(scope="module")
def trained():
    """A network with learned variance by the hybrid objective, steps drawn by importance."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = ResidualUNet((8, 16), (1, 1), outputs=2)
    denoise = Denoiser(network, COSINE, "v", learned_variance=True)
    sampler = ImportanceSampler(COSINE.steps, history=5)

    def loss():
        step, weight = sampler.draw(16, generator)
        x0 = balls(16, generator)
        each = hybrid_loss(denoise, x0, torch.randn(x0.shape, generator=generator), step)
        sampler.update(step, each)
        return (weight * each).mean()

    train(network, 300, 0.005, loss)
    assert int(sampler.seen.min()) >= 5  # no longer uniform
    return denoise


def test_hybrid_trains_the_image_and_the_variance(trained):
    """The image as other objectives do; the learned variance makes the bound tighter than both fixed ones."""
    generator = torch.Generator().manual_seed(1)
    step = torch.arange(1, 51).repeat(4)
    x0 = balls(200, generator)
    noise = torch.randn(x0.shape, generator=generator)
    of_nothing = Denoiser(lambda x, r: torch.zeros_like(x), COSINE, "v")
    losses = [float(regression_loss(d, x0, noise, step / 50.0).mean()) for d in (trained, of_nothing)]
    assert losses[0] < 0.4 * losses[1]
    bounds = [float(bound_term(trained, x0, noise, step, v).mean()) for v in ("learned", "small", "large")]
    assert bounds[0] < min(bounds[1:])


def each_one(number=16):
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


TIMES = time_steps(COSINE, 25)
LEVELS = time_steps(COSINE, 25, "log_snr", start=0.95)  # near enough for Langevin dynamics to follow
FINE = time_steps(COSINE, 100, start=0.9)  # Euler-Maruyama is unstable nearer to pure noise
SAMPLERS = {
    "ddim": lambda d, x: ddim(d, x, TIMES),
    "ddim, eta 1": lambda d, x: ddim(d, x, TIMES, eta=1.0, generators=each_one()),
    "ddpm, small": lambda d, x: ddpm(d, x, time_steps(COSINE, 50), generators=each_one()),
    "ddpm, large": lambda d, x: ddpm(d, x, time_steps(COSINE, 50), variance="large", generators=each_one()),
    "ddpm, learned": lambda d, x: ddpm(d, x, time_steps(COSINE, 50), variance="learned", generators=each_one()),
    "langevin": lambda d, x: d(langevin(d, x, 0.5, step_size=0.05, steps=60, generators=each_one()), 0.5),
    "annealed_langevin": lambda d, x: annealed_langevin(d, x, LEVELS, generators=each_one()),
    "euler_maruyama": lambda d, x: euler_maruyama(d, x, FINE, generators=each_one()),
    "predictor_corrector": lambda d, x: predictor_corrector(d, x, TIMES, generators=each_one()),
    "heun": lambda d, x: heun(d, x, TIMES),
    "dpm_solver": lambda d, x: dpm_solver(d, x, time_steps(COSINE, 15, "log_snr")),
    "probability_flow": lambda d, x: probability_flow(d, x, 1.0, 1 / 50, rtol=1e-3, atol=1e-3),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_makes_balls_of_noise(trained, sampler):
    """16 volumes: as bright as the data, -0.34, with a ball of contrast 1 in the middle, and not all the same ball.

    Radii make the mean of 16 volumes uncertain by 0.095 / 4; the rest is what so small a network allows. It makes the
    mean of a volume vary by 0.03 to 0.05; its one answer to pure noise, the mean of all data, varies by less than 0.01.
    """
    noise = noise_like(torch.empty(16, 1, 8, 8, 8), each_one())
    x = SAMPLERS[sampler](trained, noise)
    assert spread(trained(noise, 1.0)) < 0.02 < spread(x)
    assert bool(torch.isfinite(x).all())
    assert float(x.mean()) == pytest.approx(-0.34, abs=0.08)
    assert float(contrast(x).mean()) == pytest.approx(0.99, abs=0.2)


def test_inpainting_completes_the_ball(trained):
    """Half of each of 48 balls is lost, and drawn as large as the known half; by chance they correlate by 1 / 7."""
    image = balls(48, torch.Generator().manual_seed(2))
    x = inpaint(trained, image, torch.arange(8) < 4, TIMES, generators=each_one(48))
    assert torch.equal(x[..., 4:], image[..., 4:])
    lost, known = (half.flatten(1).mean(dim=1) for half in (x[..., :4], x[..., 4:]))
    assert float(lost.mean()) == pytest.approx(float(known.mean()), abs=0.08)
    assert float(torch.corrcoef(torch.stack([lost, known]))[0, 1]) > 0.6
