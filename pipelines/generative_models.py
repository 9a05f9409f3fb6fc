"""The generative families side by side: quality, coverage, speed, likelihood and codes, of 3D crops in one run.

    MEDFUSION_DATA=... python pipelines/generative_models.py --data hippocampus --out runs/families --seeds 0 1 2

For each seed every model of MODELS is trained on crops of 32^3 voxels of `train`: networks of about 1.1 million
parameters, and steps that take the same time on one core. What it makes is compared with crops of `dev`, which no model
saw, drawn as crops are for training. Measures of a model:
  Frechet    distance to the crops of dev, and MMD x 1000: in the features of the audit of synthetic cases, which are of
             another network; precision and recall in them
  texture    standard deviation of an image less its mean over 3^3 voxels, of that of real crops: 1 is right, less blurs
  alike      MS-SSIM of pairs: more than that of real crops means less variety
  bits       a voxel: the bound of the autoencoders, the likelihood of the flow; densities of values from -1 to +1
  rebuilt    decibels of crops of dev encoded and decoded
  codes      of one crop by two models of a family, from two seeds or of two widths: their correlation
Stages: `train`, `measure`, `time` (run it alone: it times sampling) and `report`, which prints the tables and writes
OUT/DATA/report.html. All that is made is kept, and not made again; several runs may share the models between them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from generative_figures import grid, learning, triangles
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Printed
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from medfusion.config import Config, load_config
from medfusion.data.crops import Case, Crops
from medfusion.data.intensity import SEEN
from medfusion.diffusion import (
    annealed_langevin,
    bits_per_dimension,
    ddpm,
    dpm_solver,
    euler_maruyama,
    log_likelihood,
    predictor_corrector,
    time_steps,
)
from medfusion.io import staged
from medfusion.metrics import psnr
from medfusion.metrics.generative import frechet_distance, mmd, pairwise_ms_ssim, precision_recall, texture
from medfusion.objectives.elbo import elbo
from medfusion.prior import AutoencoderPrior, DiffusionPrior, Prior, build_denoiser
from medfusion.report import Figure, Section, Table, write_report
from medfusion.tasks.features import features
from medfusion.training import load_cases, train
from medfusion.training.stages import only_stage

CONFIGS = Path(__file__).parent.parent / "configs"
BATCH = 8  # volumes that are made at once
PAIRS = 300
FEW, CODED, MATCHED = 16, 48, 160  # crops: whose likelihood is solved for; encoded; by which latents are matched
SNAPSHOTS = 5  # of a training, evenly spaced; the last one is its end
CODED_FAMILIES = ("autoencoder", "vae", "beta-vae", "ncsn", "ddpm")  # the others have no encoder


class Data(NamedTuple):
    """A folder of training scans under MEDFUSION_DATA, one of others, and how configs differ for them."""

    train: str
    dev: str
    settings: tuple[str, ...] = ()


class Model(NamedTuple):
    """A config, settings on top of it, and the steps that take 20 minutes on one core."""

    config: str
    settings: tuple[str, ...]
    steps: int


class Row(NamedTuple):
    """A model and how it samples, with the number of networks that it takes in training."""

    model: str
    networks: int
    sample: Callable[[Any, Sequence[torch.Generator]], tuple[Tensor, int]] | None


DATA = {
    "hippocampus": Data("hippocampus/train/images", "hippocampus/dev/images"),
    "ixi": Data(
        "ixi_t1_2mm/train",
        "ixi_t1_2mm/dev",
        ("data.images=*_T1.nii.gz", "preprocessing.spacing=2", "data.flips=x"),
    ),
}
MODELS = {
    "autoencoder": Model("hippocampus_vae", ("autoencoder.beta=0",), 1150),
    "vae": Model("hippocampus_vae", (), 1150),
    "beta-vae": Model("hippocampus_vae", ("autoencoder.beta=4",), 1150),
    "gan": Model("hippocampus_gan", (), 1500),
    "ncsn": Model("hippocampus_ncsn", (), 2000),
    "ddpm": Model("hippocampus_ddpm", (), 2000),
    "vae, wider": Model("hippocampus_vae", ("autoencoder.channels=[16,32,64,80,80,80]",), 480),
    "ddpm, wider": Model("hippocampus_ddpm", ("network.channels=[48,96,128]",), 1100),
}


def in_one_go(prior: Prior, generators: Sequence[torch.Generator]) -> tuple[Tensor, int]:
    """As the family samples: one evaluation."""
    return prior.sample(generators), 1


def in_steps(sampler: Callable[..., Tensor], steps: int, spacing: str) -> Callable[..., tuple[Tensor, int]]:
    """From pure noise, and the evaluations that it took; x_0 stays in the range of scans, as in Ho et al.'s program."""

    def sample(prior: DiffusionPrior, generators: Sequence[torch.Generator]) -> tuple[Tensor, int]:
        evaluations = 0

        def count(x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return x0.clamp(*SEEN)

        times = time_steps(prior.process, steps, spacing)
        x = prior.noise(generators) * prior.process.sigma(times[0])
        draws = {} if sampler is dpm_solver else {"generators": generators}
        return sampler(prior.denoiser().guided(count), x, times=times, **draws), evaluations

    return sample


# NCSN and the VE SDE are one network, so are DDPM and the VP SDE: in continuous time their objectives are the same
ROWS = {
    "autoencoder": Row("autoencoder", 2, None),
    "VAE": Row("vae", 2, in_one_go),
    "beta-VAE, 4": Row("beta-vae", 2, in_one_go),
    "GAN": Row("gan", 2, in_one_go),
    "NCSN, annealed Langevin": Row("ncsn", 1, in_steps(partial(annealed_langevin, steps=2), 64, "log_snr")),
    "VE SDE, predictor-corrector": Row("ncsn", 1, in_steps(predictor_corrector, 64, "log_snr")),
    "DDPM, ancestral": Row("ddpm", 1, in_steps(ddpm, 250, "uniform")),
    "VP SDE, Euler-Maruyama": Row("ddpm", 1, in_steps(euler_maruyama, 128, "log_snr")),
    "DDPM, DPM-Solver++": Row("ddpm", 1, in_steps(dpm_solver, 20, "log_snr")),
}
QUICK = {"vae": "VAE", "beta-vae": "beta-VAE, 4", "gan": "GAN", "ddpm": "DDPM, DPM-Solver++"}  # rows for snapshots


class Study(NamedTuple):
    """What was asked for; the methods are named for what they give, made where it is not there."""

    data: str
    out: Path
    most_steps: int
    samples: int

    @property
    def folder(self) -> Path:
        """Of this data set."""
        return self.out / self.data

    def config(self, name: str, seed: int) -> Config:
        """Of a model."""
        model = MODELS[name]
        steps = min(model.steps, self.most_steps)
        own = [f"training.steps={steps}", f"training.checkpoint_every={steps // SNAPSHOTS}", f"training.seed={seed}"]
        settings = [*model.settings, *DATA[self.data].settings, *own]
        return load_config(CONFIGS / f"{model.config}.yaml", settings)

    def run(self, name: str, seed: int) -> Path:
        """The folder of a training."""
        return self.folder / f"{name.replace(', ', '_')}_{seed}"

    def cases(self, config: Config, kind: str) -> list[Case]:
        """The scans of `train` or `dev`."""
        folder = Path(os.environ["MEDFUSION_DATA"]) / getattr(DATA[self.data], kind)
        return load_cases(folder, config, cache=self.out / "cache")[0]

    def prior(self, name: str, seed: int) -> Prior:
        """Trained, its snapshots beside it."""
        run, config = self.run(name, seed), self.config(name, seed)

        def keep(state: Any) -> None:
            if state.step % 50 == 0:
                print(f"{run.name}: step {state.step}, {state.images_per_second:.1f} crops/s", flush=True)
            if state.step % config.training.checkpoint_every == 0:
                snapshot(run, config, state.step)

        if not (run / "prior.safetensors").exists():
            resume = (run / "checkpoint.pt").exists()
            train(self.cases(config, "train"), config, run, data=self.data, resume=resume, say=print, progress=keep)
        return Prior.load(run / "prior.safetensors")

    @cache  # noqa: B019  (a study lives as long as the program)
    def crops(self, kind: str, number: int) -> NDArray[np.float32]:
        """(n, 32, 32, 32) of `train` or `dev`, drawn as for training."""
        config = self.config("ddpm", 0)
        crops = Crops(self.cases(config, kind), config.data, seed=1)
        return np.stack([crops.draw(n, located=False)[0].image[0].numpy() for n in range(number)])

    @cache  # noqa: B019
    def real(self) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Crops of `dev` and their features."""
        crops = self.crops("dev", self.samples)
        return crops, features(crops)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON, as it was made before or is now."""
        path = self.folder / "measures" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = make()
            with staged(path, overwrite=True) as unfinished:
                unfinished.write_text(json.dumps(made))
            print(f"{self.data}, {name}: {made}", flush=True)
        return json.loads(path.read_text())


def snapshot(run: Path, config: Config, step: int) -> None:
    """The prior of the checkpoint of a step, beside it."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["step"] == step
    stage = only_stage(config)
    network = stage.build()
    network.load_state_dict(state["ema"])
    stage.prior(network, {"minutes": state["worked"] / 60}).save(run / f"step_{step:06d}.safetensors")


def drawn(prior: Prior, row: Row, number: int) -> NDArray[np.float32]:
    """(n, 32, 32, 32)."""
    assert row.sample is not None
    made = []
    for begin in range(0, number, BATCH):
        generators = [torch.Generator().manual_seed(n) for n in range(begin, min(begin + BATCH, number))]
        made.append(row.sample(prior, generators)[0][:, 0].numpy())
    return np.concatenate(made)


def quality(study: Study, images: NDArray[np.float32]) -> dict[str, float]:
    """What samples are worth, beside crops of `dev`."""
    real, known = study.real()
    found = features(images)
    precision, recall = precision_recall(known, found)
    return {
        "frechet": frechet_distance(known, found),
        "mmd": 1000 * mmd(known, found),
        "precision": precision,
        "recall": recall,
        "texture": float(np.mean([texture(i) for i in images]) / np.mean([texture(i) for i in real])),
        "alike": float(pairwise_ms_ssim(images, PAIRS).mean()),
    }


def measured(study: Study, name: str, seed: int) -> dict[str, float]:
    """Samples of a row of the table, judged; some are kept to be looked at."""
    row = ROWS[name]
    prior = study.prior(row.model, seed)
    images = drawn(prior, row, study.samples)
    np.save(study.run(row.model, seed) / f"{slug(name)}.npy", images[:BATCH].astype(np.float16))
    return quality(study, images)


def told(study: Study, model: str, seed: int) -> dict[str, float]:
    """Bits a voxel, and decibels of what is rebuilt, of crops of `dev`; nothing of a family without an encoder."""
    prior = study.prior(model, seed)
    crops = torch.from_numpy(study.crops("dev", FEW))[:, None]
    generators = [torch.Generator().manual_seed(n) for n in range(FEW)]
    if isinstance(prior, AutoencoderPrior):
        bits = {} if prior.kind == "a plain autoencoder" else {"bits": bound(prior, crops, generators)}
    elif isinstance(prior, DiffusionPrior):
        bits = {"bits": flow_bits(prior, crops, generators)}
    else:
        return {}
    rebuilt = torch.cat([prior.reconstruct(some) for some in crops.split(BATCH)]).numpy()
    decibels = [psnr(a, b, np.ones(a.shape), 2.0) for a, b in zip(crops.numpy(), rebuilt, strict=True)]
    return bits | {"rebuilt": float(np.mean(decibels))}


@torch.no_grad()
def bound(prior: AutoencoderPrior, crops: Tensor, generators: Sequence[torch.Generator]) -> float:
    """The evidence lower bound in bits a voxel."""
    nats = elbo(crops, prior.network(crops, prior.noise(generators)))
    return float(bits_per_dimension(nats, crops[0].numel()).mean())


def flow_bits(prior: DiffusionPrior, crops: Tensor, generators: Sequence[torch.Generator]) -> float:
    """The likelihood of the probability flow in bits a voxel."""

    def network(x: Tensor, log_noise_ratio: Tensor) -> Tensor:
        return prior.network(x, log_noise_ratio, None, None, None)

    denoise, nats = build_denoiser(prior.config, network), []
    for begin in range(0, len(crops), BATCH):
        some = slice(begin, begin + BATCH)
        # the density of the first step of the process, where the crop has so much noise
        x = prior.process.add_noise(crops[some], prior.noise(generators[some]), 1 / prior.process.steps)
        nats.append(log_likelihood(denoise, x, generators=generators[some], rtol=1e-4, atol=1e-4))
    return float(bits_per_dimension(torch.cat(nats), crops[0].numel()).mean())


def over_time(study: Study, model: str, seed: int) -> list[dict[str, float]]:
    """Frechet distance and minutes of each snapshot."""
    study.prior(model, seed)
    found = []
    for path in sorted(study.run(model, seed).glob("step_*.safetensors")):
        prior = Prior.load(path)
        distance = frechet_distance(study.real()[1], features(drawn(prior, ROWS[QUICK[model]], study.samples)))
        found.append({"minutes": prior.provenance["minutes"], "frechet": distance})
    return found


def codes(study: Study, model: str, seed: int, kind: str = "dev", number: int = CODED) -> NDArray[np.float32]:
    """(n, k) of crops."""
    path = study.run(model, seed) / f"codes_{kind}_{number}.npy"
    if not path.exists():
        prior, crops = study.prior(model, seed), torch.from_numpy(study.crops(kind, number))[:, None]
        np.save(path, torch.cat([prior.encode(some).flatten(1) for some in crops.split(BATCH)]).numpy())
    return np.load(path)


def agreement(study: Study, one: tuple[str, int], other: tuple[str, int]) -> dict[str, float]:
    """Correlation of two models' codes: of one crop, of different ones, and with latents paired to agree best.

    The pairs, and their signs, are those that agree best over crops of `train` (Hungarian method); the correlation is
    that of each latent over crops of `dev`: the mean correlation coefficient of the identifiability literature.
    """
    a, b = codes(study, *one), codes(study, *other)
    across = _correlation(a, b)
    apart = ~np.eye(len(a), dtype=bool)
    found = {"same": float(np.diag(across).mean()), "other": float(across[apart].mean())}
    if a.shape[1] < MATCHED:  # far too many for voxels
        seen = _correlation(codes(study, *one, "train", MATCHED).T, codes(study, *other, "train", MATCHED).T)
        rows, columns = linear_sum_assignment(-np.abs(seen))
        held_out = _correlation(a.T, b.T)[rows, columns] * np.sign(seen[rows, columns])
        found["matched"] = float(held_out.mean())
    return found


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Of every row of one with every row of the other; 0 where a row is constant."""
    a, b = (x.astype(np.float64) - x.mean(axis=1, keepdims=True) for x in (a, b))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    return a @ b.T


def alone(study: Study, name: str) -> dict[str, float]:
    """Evaluations and seconds of a sample, in batches of BATCH, the better of two."""
    row = ROWS[name]
    prior, seconds = study.prior(row.model, 0), []
    assert row.sample is not None
    for seed in range(2):
        began = time.perf_counter()
        _, evaluations = row.sample(prior, [torch.Generator().manual_seed(BATCH * seed + n) for n in range(BATCH)])
        seconds.append((time.perf_counter() - began) / BATCH)
    return {"evaluations": evaluations, "seconds": min(seconds)}


def pairs_of(model: str, seeds: Sequence[int]) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """Every two seeds, and each with the wider one."""
    pairs = list(combinations([(model, seed) for seed in seeds], 2))
    return pairs + [((model, seed), (f"{model}, wider", 0)) for seed in seeds if f"{model}, wider" in MODELS]


def slug(name: str) -> str:
    """For a file's name."""
    return name.lower().replace(",", "").replace(" ", "_")


def with_interval(values: Sequence[float], digits: int) -> str:
    """Mean over seeds, and its 95 % interval by Student's t."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    reach = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean} ± {reach:.{digits}f}"


COLUMNS = {"frechet": 1, "mmd": 0, "precision": 2, "recall": 2, "texture": 2, "alike": 3, "bits": 2, "rebuilt": 1}


def families_table(study: Study, seeds: Sequence[int]) -> Table:
    """A row for each family and sampler, and for crops of `train`, which are as near as can be."""
    rows: list[list[object]] = []
    for name, row in ROWS.items():
        found = [known(study, f"{slug(name)}_{seed}") | known(study, f"told_{row.model}_{seed}") for seed in seeds]
        cells = [with_interval([f[c] for f in found if c in f], digits) for c, digits in COLUMNS.items()]
        speed = known(study, f"time_{slug(name)}")
        spent = [c[-1]["minutes"] for s in seeds if (c := known(study, f"curve_{row.model}_{s}"))]
        times = [
            speed.get("evaluations", ""),
            f"{speed['seconds']:.3f}" if speed else "",
            f"{np.mean(spent):.0f}" if spent else "",
        ]
        rows.append([name, row.networks, *cells, *times])
    real = known(study, "real")
    rows.append(
        ["crops of train", "", *(f"{real[c]:.{d}f}" if c in real else "" for c, d in COLUMNS.items()), "", "", ""]
    )
    columns = ("family", "networks", *COLUMNS, "evaluations", "s a sample", "min of training")
    return Table(columns, rows, f"Families on {study.data}, crops of 32^3 voxels; means over seeds ± 95 % intervals")


def known(study: Study, name: str) -> Any:
    """What was measured, or nothing."""
    path = study.folder / "measures" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def codes_table(study: Study, seeds: Sequence[int]) -> Table:
    """How much the codes of two models agree."""
    rows = []
    for model in CODED_FAMILIES:
        for kind in ("seeds", "widths"):
            pairs = [pair for pair in pairs_of(model, seeds) if ("wider" in pair[1][0]) == (kind == "widths")]
            found = [f for a, b in pairs if (f := known(study, agreement_name(a, b)))]
            if found:
                cells = [with_interval([f[c] for f in found if c in f], 2) for c in ("same", "other", "matched")]
                rows.append([model, f"two {kind}", *cells])
    columns = ("family", "models differ in", "one crop", "two crops", "latents matched")
    return Table(columns, rows, f"Correlation of codes between models trained apart, {study.data}")


def agreement_name(one: tuple[str, int], other: tuple[str, int]) -> str:
    """Of the measure."""
    return slug(f"codes {one[0]} {one[1]} {other[0]} {other[1]}")


def print_table(table: Table) -> None:
    """In the terminal."""
    printed = Printed(*table.columns, title=table.caption)
    for row in table.rows:
        printed.add_row(*map(str, row))
    Console(width=200).print(printed)


def train_stage(study: Study, models: Sequence[str], seeds: Sequence[int]) -> None:
    """Every model from every seed; the wider ones from one."""
    for seed in seeds:
        for model in models:
            if seed == 0 or "wider" not in model:
                study.prior(model, seed)


def measure_stage(study: Study, models: Sequence[str], seeds: Sequence[int]) -> None:
    """All but the speed."""
    study.kept("real", lambda: quality(study, study.crops("train", study.samples)))
    for seed in seeds:
        for name, row in ROWS.items():
            if row.model in models and row.sample is not None:
                study.kept(f"{slug(name)}_{seed}", partial(measured, study, name, seed))
        for model in [model for model in models if "wider" not in model]:
            study.kept(f"told_{model}_{seed}", partial(told, study, model, seed))
            if model in QUICK:
                study.kept(f"curve_{model}_{seed}", partial(over_time, study, model, seed))
    for model in [model for model in models if model in CODED_FAMILIES]:
        for one, other in pairs_of(model, seeds):
            study.kept(agreement_name(one, other), partial(agreement, study, one, other))


def time_stage(study: Study, models: Sequence[str], seeds: Sequence[int]) -> None:
    """The speed of every sampler."""
    for name, row in ROWS.items():
        if row.model in models and row.sample is not None:
            study.kept(f"time_{slug(name)}", partial(alone, study, name))


def report_stage(study: Study, models: Sequence[str], seeds: Sequence[int]) -> None:
    """Tables and figures of all that is there."""
    tables = [families_table(study, seeds), codes_table(study, seeds)]
    for table in tables:
        print_table(table)
    found = {name: [m for seed in seeds if (m := known(study, f"{slug(name)}_{seed}"))] for name in ROWS}
    speed = {name: known(study, f"time_{slug(name)}") for name in ROWS}
    points = {
        name: [(m["precision"], m["recall"], 1 / speed[name]["seconds"]) for m in found[name]]
        for name in ROWS
        if found[name] and speed[name]
    }
    curves = {QUICK[m]: [c for seed in seeds if (c := known(study, f"curve_{m}_{seed}"))] for m in QUICK}
    samples = {"crops of dev": study.crops("dev", BATCH)} | {
        name: np.load(path).astype(np.float32)
        for name, row in ROWS.items()
        if (path := study.run(row.model, 0) / f"{slug(name)}.npy").exists()
    }
    figures = {
        "trilemma": (
            triangles(points),
            "The trilemma: precision, recall and speed of each family, a line for each seed.",
        ),
        "training": (
            learning(curves),
            "Frechet distance to crops of dev over the minutes of the training on one core.",
        ),
        "samples": (grid(samples), "Middle slices of crops, and of samples of the first seed."),
    }
    for name, (png, _) in figures.items():
        (study.folder / f"{name}.png").write_bytes(png)
    shown = [Figure(png, caption, caption) for png, caption in figures.values()]
    write_report(study.folder / "report.html", "Generative families", [Section(study.data, [*tables, *shown])])
    print(f"report: {study.folder / 'report.html'}")


STAGES = {"train": train_stage, "measure": measure_stage, "time": time_stage, "report": report_stage}


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="hippocampus")
    parser.add_argument("--out", type=Path, default=Path("runs/families"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--most-steps", type=int, default=10**6, help="of each training: for a rehearsal")
    asked = parser.parse_args()
    study = Study(asked.data, asked.out, asked.most_steps, asked.samples)
    for stage in asked.stages:
        STAGES[stage](study, asked.models, asked.seeds)


if __name__ == "__main__":
    main()
