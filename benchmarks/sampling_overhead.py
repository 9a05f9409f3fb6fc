"""What a sampler costs beside the network, ours and MONAI's scheduler in one run.

    python benchmarks/sampling_overhead.py [--edge 64] [--steps 20] [--prior brain-t1]

Each sampler walks ``--steps`` steps on one volume of 64^3 twice: with the shipped prior, and with a function that
returns at once the image it is given. The second time divided by the first is the overhead. Nothing else should run
beside it.
"""

import argparse
import time
from collections.abc import Callable

import torch
from monai.networks.schedulers import DDIMScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor

from medfusion.diffusion import (
    Denoiser,
    annealed_langevin,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    heun,
    predictor_corrector,
    time_steps,
)
from medfusion.prior import Prior

REPEATS = 3  # the fastest counts
OURS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "heun": heun,
    "dpm_solver": dpm_solver,
    "euler_maruyama": euler_maruyama,
    "predictor_corrector": predictor_corrector,
    "annealed_langevin": annealed_langevin,
}
DETERMINISTIC = ("ddim", "heun", "dpm_solver")


def monai_ddim(denoise: Denoiser, x: Tensor, steps: int) -> Tensor:
    """MONAI's loop: the network, then ``scheduler.step``."""
    scheduler = DDIMScheduler(1000, schedule="cosine", prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(steps)
    for k in scheduler.timesteps:
        level = denoise.process.log_noise_ratio((float(k) + 1) / 1000).float().expand(len(x))
        x, _ = scheduler.step(denoise.network(x, level), int(k), x)
    return x


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of REPEATS runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    """Time every sampler and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prior", default="brain-t1")
    arguments = parser.parse_args()
    prior = Prior.load(arguments.prior)
    real = prior.denoiser()
    empty = Denoiser(lambda x, level: x, real.process, real.prediction)
    x = torch.randn(1, 1, *[arguments.edge] * 3, generator=torch.Generator().manual_seed(0))
    times = time_steps(prior.process, arguments.steps, "log_snr", start=0.98)
    table = Table(title=f"{arguments.steps} steps on {arguments.edge}^3, {torch.get_num_threads()} thread(s)")
    for column in ("sampler", "s with the prior", "s without a network", "overhead"):
        table.add_column(column, justify="left" if column == "sampler" else "right")

    def row(name: str, run: Callable[[Denoiser], object]) -> None:
        whole, bare = fastest(lambda: run(real)), fastest(lambda: run(empty))
        table.add_row(name, f"{whole:.3f}", f"{bare:.4f}", f"{bare / whole:.2%}")

    for name, sampler in OURS.items():
        draws = {} if name in DETERMINISTIC else {"generators": [torch.Generator().manual_seed(0)]}
        row(name, lambda denoise, sampler=sampler, draws=draws: sampler(denoise, x, times, **draws))
    row("MONAI DDIMScheduler", lambda denoise: monai_ddim(denoise, x, arguments.steps))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
