"""The generative families side by side: quality, coverage, speed, likelihood and codes, of 3D crops in one run.

    MEDFUSION_DATA=... python pipelines/generative_models.py --data hippocampus --out runs/families --seeds 0 1 2

For each seed every model of MODELS is trained on crops of 32^3 voxels of `train`: networks of 1.1 to 1.2 million
parameters, and about as long on one core. What it makes is compared with crops of `dev`, which no model
saw, drawn as crops are for training. Measures of a model:
  Frechet    distance to the crops of dev, and MMD x 1000: in the features of the audit of synthetic cases, which are of
             another network; precision and recall in them
  texture    standard deviation of an image less its mean over 3^3 voxels, of that of real crops: 1 is right, less blurs
  alike      MS-SSIM of pairs: more than that of real crops means less variety
  bits       a voxel: the bound of the autoencoders, the likelihood of the flow; densities of values from -1 to +1
  rebuilt    decibels of crops of dev encoded and decoded
  codes      of one crop by two models of a family, from two seeds or of two widths: their correlation
Stages: `train`, `measure`, `time` (run it alone: it times sampling and training) and `report`, which prints the tables
and writes OUT/DATA/report.html. All that is made is kept, and not made again; several runs may share the models
between them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from generative_families import (
    BATCH,
    CODED_FAMILIES,
    DATA,
    MODELS,
    QUICK,
    ROWS,
    Study,
    agreement_name,
    drawn,
    pairs_of,
    slug,
)
from generative_report import report
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from medfusion.diffusion import bits_per_dimension, log_likelihood
from medfusion.metrics import psnr
from medfusion.metrics.generative import frechet_distance, mmd, pairwise_ms_ssim, precision_recall, texture
from medfusion.objectives.elbo import elbo
from medfusion.prior import AutoencoderPrior, DiffusionPrior, Prior, build_denoiser
from medfusion.tasks.features import features
from medfusion.training import train

PAIRS = 300
FEW, CODED, MATCHED = 16, 48, 160  # crops: whose likelihood is solved for; encoded; by which latents are matched
TIMED_STEPS = 12  # of a training, the first of which are not counted
IN_USE = 0.1  # standard deviation of a latent's mean over crops


def train_stage(study: Study, models: Sequence[str], seeds: Sequence[int]) -> None:
    """Every model from every seed; the narrower ones from one."""
    for seed in seeds:
        for model in models:
            if seed == 0 or "narrower" not in model:
                study.prior(model, seed)


def measure_stage(study: Study, models: Sequence[str], seeds: Sequence[int]) -> None:
    """All but the speed."""
    study.kept("real", lambda: quality(study, study.crops("train", study.samples)))
    for seed in seeds:
        for name, row in ROWS.items():
            if row.model in models and row.sample is not None:
                study.kept(f"{slug(name)}_{seed}", partial(measured, study, name, seed))
        for model in [model for model in models if "narrower" not in model]:
            study.kept(f"told_{model}_{seed}", partial(told, study, model, seed))
            if model in QUICK:
                study.kept(f"curve_{model}_{seed}", partial(over_time, study, model, seed))
    for model in [model for model in models if model in CODED_FAMILIES]:
        for one, other in pairs_of(model, seeds):
            study.kept(agreement_name(one, other), partial(agreement, study, one, other))


def time_stage(study: Study, models: Sequence[str], seeds: Sequence[int]) -> None:
    """The speed of every training and sampler."""
    for model in models:
        study.kept(f"step_{model}", partial(a_step, study, model))
    for name, row in ROWS.items():
        if row.model in models and row.sample is not None:
            study.kept(f"time_{slug(name)}", partial(alone, study, name))


def report_stage(study: Study, models: Sequence[str], seeds: Sequence[int]) -> None:
    """Tables and figures of all that is there."""
    report(study, seeds)


STAGES = {"train": train_stage, "measure": measure_stage, "time": time_stage, "report": report_stage}


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
    """Frechet distance and steps of each snapshot."""
    study.prior(model, seed)
    found = []
    for path in sorted(study.run(model, seed).glob("step_*.safetensors")):
        prior = Prior.load(path)
        distance = frechet_distance(study.real()[1], features(drawn(prior, ROWS[QUICK[model]], study.samples)))
        found.append({"steps": prior.provenance["steps"], "frechet": distance})
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

    The pairs, of latents that both use, and their signs, are those that agree best over crops of `train` (Hungarian
    method); the correlation is that of each over crops of `dev`: the mean correlation coefficient of the
    identifiability literature.
    """
    a, b = codes(study, *one), codes(study, *other)
    across = _correlation(a, b)
    apart = ~np.eye(len(a), dtype=bool)
    found = {"same": float(np.diag(across).mean()), "other": float(across[apart].mean())}
    if a.shape[1] < MATCHED:  # far too many for voxels
        known = [codes(study, *each, "train", MATCHED) for each in (one, other)]
        used = [values.std(axis=0) > IN_USE for values in known]
        seen = _correlation(known[0][:, used[0]].T, known[1][:, used[1]].T)
        rows, columns = linear_sum_assignment(-np.abs(seen))
        held_out = _correlation(a[:, used[0]].T, b[:, used[1]].T)[rows, columns] * np.sign(seen[rows, columns])
        found |= {"matched": float(held_out.mean()), "pairs": len(rows)} if len(rows) else {"pairs": 0}
    return found


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Of every row of one with every row of the other; 0 where a row is constant."""
    a, b = (x.astype(np.float64) - x.mean(axis=1, keepdims=True) for x in (a, b))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    return a @ b.T


def a_step(study: Study, model: str) -> dict[str, float]:
    """Seconds of a step of the training."""
    config, ends = study.config(model, 0), list[float]()
    config = config.model_copy(update={"training": config.training.model_copy(update={"steps": TIMED_STEPS})})
    with TemporaryDirectory() as folder:
        cases = study.cases(config, "train")
        train(cases, config, Path(folder), progress=lambda state: ends.append(time.perf_counter()))
    return {"seconds": float(np.median(np.diff(ends)))}


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
