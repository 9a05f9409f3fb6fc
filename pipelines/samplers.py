"""Which sampler, how many steps: the shipped prior makes crops of heads with every sampler in one run.

    MEDFUSION_DATA=... python pipelines/samplers.py [--start 0.99] [--crops 64] [--scans dev] [--prior brain-t1]

Crops of 32^3 voxels (64 mm) are noised to the time ``--start`` and sampled from there, each told its position in the
head; all samplers begin with the same noise. At 0.99 (r = 55) nothing of the crop is left; a smaller start rebuilds it.
Quality is the patch distance between generated and real crops (``medfusion.metrics``; the mean of three levels, in
standard deviations), also as the difference from DDPM with 1000 steps, with the standard error of a jackknife over
eighths of the crops. Beside them stand real crops of other heads from the same positions: nearer one cannot expect to
come. Prints the table; `--out` (runs/samplers) receives `samplers.csv` and `samplers.png`. The default start and the
spacings were chosen with `--scans train`, which is not reported: the cosine schedule goes on to r = 20000 at t = 1,
where spacings in log-SNR or r^(1/7) would waste steps.
"""

import argparse
import csv
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from torch import Tensor

from medfusion.data.crops import WHOLE_HEAD, Case, context_channels, prepare
from medfusion.diffusion import (
    annealed_langevin,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    heun,
    noise_like,
    predictor_corrector,
    probability_flow,
    time_steps,
)
from medfusion.io import discover, read
from medfusion.metrics import patch_distance
from medfusion.prior import Prior

EDGE = 32
BATCH = 32

# name: (sampler, spacing, numbers of steps); the first run is what the others are compared with
METHODS: dict[str, tuple[Callable[..., Tensor], str, list[int]]] = {
    "DDPM, small variance": (ddpm, "uniform", [1000, 100, 50, 20, 10]),
    "DDPM, large variance": (partial(ddpm, variance="large"), "uniform", [100, 20]),
    "Euler-Maruyama": (euler_maruyama, "log_snr", [100, 25]),
    "predictor-corrector": (predictor_corrector, "uniform", [50, 10]),
    "annealed Langevin": (partial(annealed_langevin, steps=2), "log_snr", [100, 50]),
    "DDIM": (ddim, "uniform", [100, 50, 20, 10, 5]),
    "Heun": (heun, "karras", [25, 10, 5]),
    "DPM-Solver++ (2M)": (dpm_solver, "uniform", [50, 20, 10, 5]),
    "DPM-Solver++ (2M), Karras spacing": (dpm_solver, "karras", [20, 10]),
}
SHOWN = [("DDPM, small variance", 1000), ("DDPM, small variance", 20), ("DDIM", 20), ("DPM-Solver++ (2M)", 20)]


def crops_of(cases: list[Case], number: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Real crops (n, 32, 32, 32), crops of other heads at the same positions, and the contexts (n, 4, 16, 16, 16)."""
    rng = np.random.default_rng(0)
    first, second, contexts = [], [], []
    while len(first) < number:
        a, b = (cases[k] for k in rng.choice(len(cases), 2, replace=False))
        corner = np.array([rng.integers(n - EDGE + 1) for n in a.image.shape])
        other = np.round(corner - a.centre + b.centre).astype(int)
        within = (other >= 0).all() and (other + EDGE <= b.image.shape).all()
        if not within or cut(a, corner).mean() < -0.5:  # mostly air
            continue
        first.append(cut(a, corner))
        second.append(cut(b, other))
        contexts.append(context_channels((EDGE,) * 3, corner, a.centre, a.spacing, WHOLE_HEAD))
    return np.stack(first), np.stack(second), torch.stack(contexts)


def cut(case: Case, corner: np.ndarray) -> np.ndarray:
    """(32, 32, 32) float32."""
    return case.image[tuple(slice(c, c + EDGE) for c in corner)].float().numpy()


def generate(
    prior: Prior, real: np.ndarray, contexts: Tensor, start: float, sampler: Callable[..., Tensor], stochastic: bool
) -> tuple[np.ndarray, int]:
    """One crop for each real one, and the network evaluations that a sample took (for an adaptive solver, the mean)."""
    crops, evaluations = [], 0

    def count(x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += len(x)
        return x0

    for begin in range(0, len(contexts), BATCH):
        context = contexts[begin : begin + BATCH]
        generators = [torch.Generator().manual_seed(begin + k) for k in range(len(context))]
        x0 = torch.from_numpy(real[begin : begin + BATCH])[:, None]
        x = prior.process.add_noise(x0, noise_like(x0, generators), start)
        draws = {"generators": generators} if stochastic else {}
        crops.append(sampler(prior.denoiser(context).guided(count), x, **draws)[:, 0].numpy())
    return np.concatenate(crops), round(evaluations / len(contexts))


def quality(real: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Mean patch distance over the levels: of all crops, and of the crops without each of their eighths, (9,)."""
    part = np.arange(len(real)) % 8
    return np.array([patch_distance(real[part != k], generated[part != k]).mean() for k in (-1, *range(8))])


def with_error(values: np.ndarray) -> tuple[float, float]:
    """The value of all, and its standard error by the jackknife."""
    return float(values[0]), float(np.sqrt(7 * np.var(values[1:])))


def runs(prior: Prior, start: float) -> list[tuple[str, int, Callable[..., Tensor], bool]]:
    """(name, steps, sampler of (denoise, x), whether it draws noise) of every row."""
    result = []
    for name, (function, spacing, numbers) in METHODS.items():
        for steps in numbers:
            times = time_steps(prior.process, steps, spacing, start=start)
            result.append((name, steps, partial(function, times=times), function not in (ddim, heun, dpm_solver)))
    flow = partial(probability_flow, start=start, end=1 / prior.process.steps, rtol=1e-3, atol=1e-3)
    return [*result, ("Runge-Kutta 5(4), tolerance 0.001", 0, flow, False)]


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=float, default=0.99)
    parser.add_argument("--crops", type=int, default=64)
    parser.add_argument("--scans", choices=["train", "dev"], default="dev")
    parser.add_argument("--prior", default="brain-t1")
    parser.add_argument("--out", type=Path, default=Path("runs/samplers"))
    arguments = parser.parse_args()
    if "MEDFUSION_DATA" not in os.environ:
        parser.error("set MEDFUSION_DATA to the folder of scans")
    prior = Prior.load(arguments.prior)
    folder = Path(os.environ["MEDFUSION_DATA"]) / "ixi_t1_2mm" / arguments.scans
    scans = [read(series) for series in discover(folder, pattern="*_T1.nii.gz")[:23]]
    real, others, contexts = crops_of([prepare(scan, prior.config.preprocessing) for scan in scans], arguments.crops)
    pictures, reference = {"real crops": real}, np.zeros(9)
    rows: list[list] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, steps, sampler, stochastic in runs(prior, arguments.start):
        began = time.perf_counter()
        crops, evaluations = generate(prior, real, contexts, arguments.start, sampler, stochastic)
        seconds = (time.perf_counter() - began) / len(crops)
        distance = quality(real, crops)
        reference = distance if not rows else reference
        rows.append([name, evaluations, *with_error(distance), *with_error(distance - reference), seconds])
        print(" ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in rows[-1]), flush=True)
        if (name, steps) in SHOWN:
            pictures[f"{name}, {evaluations} evaluations"] = crops
    distance = quality(real, others)
    rows.append(["real crops of other heads", 0, *with_error(distance), *with_error(distance - reference), 0.0])
    with (arguments.out / "samplers.csv").open("w", newline="") as file:
        header = "sampler evaluations distance error difference difference_error seconds_per_crop".split()
        csv.writer(file).writerows([header, *rows])
    draw(pictures, arguments.out / "samplers.png")
    print_table(rows)


def draw(pictures: dict[str, np.ndarray], path: Path) -> None:
    """The middle slice of the first eight crops of each set."""
    figure, axes = pyplot.subplots(len(pictures), 8, figsize=(10, 1.4 * len(pictures)), squeeze=False)
    for line, (name, crops) in zip(axes, pictures.items(), strict=True):
        line[0].set_title(name, loc="left", fontsize=9)
        for axis, crop in zip(line, crops, strict=False):
            axis.imshow(crop[EDGE // 2].T, cmap="gray", vmin=-1, vmax=1, origin="lower")
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def print_table(rows: list[list]) -> None:
    """All rows, in the order in which they ran."""
    table = Table(title="Patch distance to real crops, and its difference from that of the first row")
    for column in ("sampler", "network evaluations", "distance", "difference", "s per crop"):
        table.add_column(column, justify="left" if column == "sampler" else "right")
    for name, evaluations, distance, error, difference, difference_error, seconds in rows:
        values = f"{distance:.3f} ± {error:.3f}", f"{difference:+.3f} ± {difference_error:.3f}"
        table.add_row(name, str(evaluations), *values, f"{seconds:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
