"""The figures of docs/theory.md: what diffusion models stand on, drawn with the Gaussian mixture as the network.

python pipelines/theory.py        (half a minute on one core; writes docs/theory_*.png and prints what they show)
"""

import math
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from scipy.stats import binned_statistic_2d, norm, wasserstein_distance
from torch import Tensor
from torch.nn.functional import cosine_similarity

from medfusion.diffusion import (
    VE,
    VP,
    GaussianMixture,
    SubVP,
    annealed_langevin,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    heun,
    langevin,
    predictor_corrector,
    probability_flow,
    time_steps,
)

DOCS = Path(__file__).parent.parent / "docs"
SEED = 20240
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe & Ito: told apart by everyone
INK, GREY = "#222222", "#999999"
STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}
Errors = dict[str, tuple[list[int], list[float]]]  # of each sampler: network evaluations, and the error with them
TWO_MODES = GaussianMixture.isotropic(torch.tensor([0.8, 0.2]), torch.tensor([[-1.5], [1.5]]), torch.tensor([0.3, 0.3]))


def generator() -> list[torch.Generator]:
    """One seeded generator for a whole batch."""
    return [torch.Generator().manual_seed(SEED)]


def keep(figure: plt.Figure, name: str) -> None:
    """Write docs/theory_NAME.png."""
    figure.savefig(DOCS / f"theory_{name}.png", metadata={"Software": None})
    plt.close(figure)


def langevin_figure() -> None:
    """Langevin dynamics alone splits samples as they started; annealed, it finds the weights of the modes."""
    process = VE(0.03, 5.0)
    denoise, levels, steps = TWO_MODES.denoiser(process), 100, 10
    start = process.sigma_max * torch.randn(20_000, 1, generator=generator()[0], dtype=torch.float64)
    alone = langevin(denoise, start, 1 / process.steps, step_size=0.02, steps=levels * steps, generators=generator())
    times = time_steps(process, levels, "log_snr")
    annealed = annealed_langevin(denoise, start, times, step_size=0.4, steps=steps, generators=generator())
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.4), sharex=True, sharey=True)
    x = torch.linspace(-3, 3, 400, dtype=torch.float64)[:, None]
    for panel, title, samples in zip(panels, ("Langevin", "Annealed Langevin"), (alone, annealed), strict=True):
        left = float((samples < 0).double().mean())
        print(f"{title}: {left:.3f} of the samples in the left mode, 0.8 in truth")
        panel.hist(samples[:, 0], bins=120, range=(-3, 3), density=True, color=BLUE, alpha=0.5, label="samples")
        panel.plot(x, TWO_MODES.log_prob(x).exp(), color=INK, label="true density")
        panel.set(title=f"{title}: {left:.2f} / {1 - left:.2f} (true 0.80 / 0.20)", xlabel="x", yticks=[])
    panels[0].legend(loc="upper right")
    keep(figure, "langevin")


def manifold_figure() -> None:
    """Denoising score matching cell by cell, its least-squares answer: without noise most cells never see a sample."""
    angle = math.pi * torch.linspace(0.15, 1.35, 400)
    points, process = torch.stack([angle.cos(), angle.sin()], dim=1), VE(0.01, 1.0)
    zero = torch.zeros(len(points), 2, 2)
    exact = GaussianMixture(torch.full((len(points),), 1 / len(points)), points, zero).denoiser(process)
    edges = np.linspace(-2, 2, 16)
    centres = torch.cartesian_prod(*2 * [torch.from_numpy((edges[1:] + edges[:-1]) / 2)])
    x0 = points[torch.randint(len(points), (20_000,), generator=generator()[0])]
    noise = torch.randn(x0.shape, generator=generator()[0])
    figure, panels = plt.subplots(1, 2, figsize=(7, 3.8), sharex=True, sharey=True)
    for panel, sigma in zip(panels, (0.01, 0.5), strict=True):
        t = process.time_of(sigma)
        x = process.add_noise(x0, noise, t)
        mean = binned_statistic_2d(*x.T.numpy(), [*-noise.T.numpy()], "mean", bins=[edges, edges]).statistic
        learnt = torch.from_numpy(mean.reshape(2, -1).T)  # sigma times the score, without a number where nothing fell
        seen = ~learnt.isnan()[:, 0]
        share = float(seen.double().mean())
        alike = float(cosine_similarity(learnt[seen], exact.score(centres[seen], t)).mean())
        print(f"sigma {sigma}: {share:.0%} of the cells see a sample; cosine with the exact score there {alike:.2f}")
        panel.pcolormesh(edges, edges, seen.view(15, 15).T, cmap=ListedColormap(["white", "#dcebf5"]), rasterized=True)
        panel.scatter(*points.T, s=3, color=INK)
        arrows = {"angles": "xy", "scale_units": "xy", "scale": 6.0, "width": 0.005}
        panel.quiver(*centres[seen].T, *learnt[seen].T, color=BLUE, **arrows)
        panel.set(title=f"σ = {sigma}: {share:.0%} of the cells see a sample")
        panel.set(aspect="equal", xticks=[], yticks=[])
        panel.spines[:].set_color(GREY)
        panel.spines[:].set_visible(True)
    keep(figure, "manifold")


def processes_figure() -> None:
    """alpha, sigma and log SNR of four processes; and the paths of the flow, which in x / alpha are the same."""
    processes = {
        "VP, linear": (VP("linear"), BLUE, "-"),
        "VP, cosine": (VP("cosine"), ORANGE, "-"),
        "sub-VP, linear": (SubVP("linear"), GREEN, (0, (4, 3))),
        "VE": (VE(0.01, 50.0), PINK, "-."),
    }
    figure = plt.figure(figsize=(8.4, 4.8))
    above, below = figure.subfigures(2, 1)
    alphas, sigmas, snrs = above.subplots(1, 3)
    for name, (process, colour, dash) in processes.items():
        look = {"color": colour, "linestyle": dash, "label": name, "linewidth": 3 if colour == BLUE else 1.5}
        alphas.plot(process.grid, process.alpha(process.grid), **look)
        sigmas.plot(process.grid, process.sigma(process.grid), **look)
        snrs.plot(process.grid, -2 * process.log_noise_ratio(process.grid), **look)
    alphas.set(title="signal α", xlabel="t")
    sigmas.set(title="noise σ (VE rises to 50)", xlabel="t", ylim=(-0.05, 2))
    snrs.set(title="log SNR = −2 log r", xlabel="t", ylim=(-12, 10))
    alphas.legend(fontsize=7.5, loc="lower left", bbox_to_anchor=(0, 0.02))
    *three, common = below.subplots(1, 4)
    for panel, name in zip(three, ("VP, linear", "sub-VP, linear", "VE"), strict=True):
        process, colour, dash = processes[name]
        times, path = flow_paths(process)
        panel.plot(times, path, color=colour, linewidth=0.8)
        panel.set(title=f"x of {name}", xlabel="t", ylim=(-4, 4))
        common.plot(process.noise_ratio(times), path / process.alpha(times)[:, None], color=colour, ls=dash, lw=1)
    common.set(title="x / α of all three", xlabel="noise ratio r", xscale="log", xlim=(0.02, 5), ylim=(-4, 4))
    keep(figure, "processes")


def flow_paths(process: VP | SubVP | VE) -> tuple[Tensor, Tensor]:
    """Times from 1 to 0 and paths (times, 11) of the probability flow from evenly spaced quantiles of the noise."""
    times = time_steps(process, 400, "log_snr")
    noise = torch.from_numpy(norm.ppf(np.linspace(0.05, 0.95, 11)))[:, None]
    path = [process.sigma(1.0) * noise]
    heun(TWO_MODES.denoiser(process), path[0], times, callback=lambda _, x: path.append(x))
    return times[1:-1], torch.cat(path, dim=1).T[1:-1]  # r = 0 and the far end do not fit on a logarithmic axis


def ode_errors() -> Errors:
    """Evaluations and root mean square distance from the solution of the flow, for r from 20 to 0.01."""
    process = VP("cosine")
    mixture = GaussianMixture.isotropic(
        torch.tensor([0.5, 0.3, 0.2]), torch.randn(3, 3, generator=generator()[0]), torch.tensor([0.4, 0.6, 0.5])
    )
    denoise = mixture.denoiser(process)
    start, end = (float(process.time_of(ratio)) for ratio in (20.0, 0.01))
    x = float(process.sigma(start)) * torch.randn(200, 3, generator=generator()[0], dtype=torch.float64)
    truth = probability_flow(denoise, x, start, end, rtol=1e-10, atol=1e-10)
    errors = {}
    for sampler, evaluations_a_step in ((ddim, 1), (heun, 2), (dpm_solver, 1)):
        evaluations, distances = [], []
        for steps in (8, 16, 32, 64, 128, 256):
            times = process.time_of(torch.logspace(math.log10(20), -2, steps + 1, dtype=torch.float64))
            distance = (sampler(denoise, x, times) - truth).square().mean().sqrt()
            evaluations.append(steps * evaluations_a_step)
            distances.append(float(distance))
        errors[sampler.__name__] = evaluations, distances
    return errors


def sde_errors(samples: int = 50_000) -> tuple[Errors, float]:
    """Evaluations and Wasserstein-1 distance of samples from the truth; and that of as many true samples."""
    process = VP("linear")
    denoise = TWO_MODES.denoiser(process)
    start = torch.randn(samples, 1, generator=generator()[0], dtype=torch.float64)
    truth = TWO_MODES.sample(20 * samples, torch.Generator().manual_seed(SEED + 1))[:, 0]
    other = TWO_MODES.sample(samples, torch.Generator().manual_seed(SEED + 2))[:, 0]
    errors = {}
    samplers = {
        "ddpm, small variance": (ddpm, 1),
        "ddpm, large variance": (partial(ddpm, variance="large"), 1),
        "euler_maruyama": (euler_maruyama, 1),
        "predictor_corrector": (predictor_corrector, 2),
    }
    for name, (sampler, evaluations_a_step) in samplers.items():
        evaluations, distances = [], []
        for steps in (16, 32, 64, 128):
            drawn = sampler(denoise, start, time_steps(process, steps), generators=generator())
            evaluations.append(steps * evaluations_a_step)
            distances.append(wasserstein_distance(drawn[:, 0], truth))
        errors[name] = evaluations, distances
    return errors, wasserstein_distance(other, truth)


def samplers_figure() -> None:
    """Error against network evaluations: of paths for the deterministic samplers, of distributions for the others."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.2))
    sde, floor = sde_errors()
    for panel, errors in ((left, ode_errors()), (right, sde)):
        looks = zip((BLUE, ORANGE, GREEN, PINK), "osDv", strict=True)
        for (name, (evaluations, distances)), (colour, mark) in zip(errors.items(), looks, strict=False):
            print(f"{name}: " + ", ".join(f"{e}: {d:.2g}" for e, d in zip(evaluations, distances, strict=True)))
            panel.loglog(evaluations, distances, color=colour, marker=mark, markersize=4, label=name)
        panel.set(xlabel="network evaluations")
        panel.legend(loc="lower left" if panel is left else "upper right")
    print(f"as many true samples: {floor:.2g}")
    x = np.array([24, 512])
    for order, height in ((1, 0.2), (2, 0.1)):
        y = height * (x / x[0]) ** -float(order)
        left.loglog(x, y, color=GREY, linestyle=":", linewidth=1)
        left.text(x[1] * 1.08, y[1], f"order {order}", color=GREY, va="center")
    right.axhline(floor, color=GREY, linestyle=":", linewidth=1)
    right.text(16, floor * 1.07, "as many true samples", color=GREY, va="bottom")
    right.set(title="distance of samples from the truth", ylabel="Wasserstein-1", ylim=(floor * 0.6, 0.4))
    right.set_xticks([16, 32, 64, 128, 256], labels=["16", "32", "64", "128", "256"])
    right.minorticks_off()
    left.set(title="distance from the exact path of the flow", ylabel="root mean square")
    left.set_xticks([8, 32, 128, 512], labels=["8", "32", "128", "512"])
    left.minorticks_off()
    keep(figure, "samplers")


def main() -> None:
    """Draw all figures."""
    torch.set_num_threads(1)
    plt.rcParams.update(STYLE)
    langevin_figure()
    manifold_figure()
    processes_figure()
    samplers_figure()


if __name__ == "__main__":
    main()
