"""What generative_models.py compares: the models, how each samples, and where what is made of them is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfusion.config import Config, load_config
from medfusion.data.crops import Case, Crops
from medfusion.data.intensity import SEEN
from medfusion.diffusion import (
    annealed_langevin,
    ddpm,
    dpm_solver,
    euler_maruyama,
    predictor_corrector,
    time_steps,
)
from medfusion.io import staged
from medfusion.prior import DiffusionPrior, Prior
from medfusion.tasks.features import features
from medfusion.training import load_cases, train
from medfusion.training.stages import only_stage

CONFIGS = Path(__file__).parent.parent / "configs"
BATCH = 8  # volumes that are made at once
SNAPSHOTS = 5  # of a training, evenly spaced; the last one is its end


class Data(NamedTuple):
    """A folder of training scans under MEDFUSION_DATA, one of others, and how configs differ for them."""

    train: str
    dev: str
    settings: tuple[str, ...] = ()


class Model(NamedTuple):
    """A config, settings on top of it, and steps: about 20 minutes on one core, the narrower ones less."""

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
    "vae, narrower": Model("hippocampus_vae", ("autoencoder.channels=[8,16,16,24,24,24]",), 1150),
    "ddpm, narrower": Model("hippocampus_ddpm", ("network.channels=[16,32,48]",), 2000),
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
    "VE SDE, DPM-Solver++": Row("ncsn", 1, in_steps(dpm_solver, 20, "log_snr")),
    "DDPM, ancestral": Row("ddpm", 1, in_steps(ddpm, 250, "uniform")),
    "VP SDE, Euler-Maruyama": Row("ddpm", 1, in_steps(euler_maruyama, 128, "log_snr")),
    "DDPM, DPM-Solver++": Row("ddpm", 1, in_steps(dpm_solver, 20, "log_snr")),
}
QUICK = {  # rows by which snapshots are judged
    "vae": "VAE",
    "beta-vae": "beta-VAE, 4",
    "gan": "GAN",
    "ncsn": "VE SDE, DPM-Solver++",
    "ddpm": "DDPM, DPM-Solver++",
}
CODED_FAMILIES = ("autoencoder", "vae", "beta-vae", "ncsn", "ddpm")  # the others have no encoder


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
        every = max(1, steps // SNAPSHOTS)
        own = [f"training.steps={steps}", f"training.checkpoint_every={every}", f"training.seed={seed}"]
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
        prior = Prior.load(run / "prior.safetensors")
        if prior.config != config:
            raise SystemExit(f"{run}: was trained with other settings; name another --out, or remove it")
        return prior

    @cache  # noqa: B019  (a study lives as long as the program)
    def crops(self, kind: str, number: int) -> NDArray[np.float32]:
        """(n, 32, 32, 32) of `train` or `dev`, drawn as for training."""
        config = self.config("ddpm", 0)
        crops = Crops(self.cases(config, kind), config.data, seed=1 if kind == "dev" else 2)
        return np.stack([crops.draw(n, located=False)[0].image[0].numpy() for n in range(number)])

    @cache  # noqa: B019
    def real(self) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Crops of `dev` and their features."""
        crops = self.crops("dev", self.samples)
        return crops, features(crops)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON, as it was made before or is now."""
        path = self.measure(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = make()
            with staged(path, overwrite=True) as unfinished:
                unfinished.write_text(json.dumps(made))
            print(f"{self.data}, {name}: {made}", flush=True)
        return json.loads(path.read_text())

    def measure(self, name: str) -> Path:
        """Where it is kept."""
        return self.folder / f"measures_of_{self.samples}" / f"{name}.json"

    def known(self, name: str) -> Any:
        """What was measured, or nothing."""
        path = self.measure(name)
        return json.loads(path.read_text()) if path.exists() else {}


def snapshot(run: Path, config: Config, step: int) -> None:
    """The prior of the checkpoint of a step, beside it."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["step"] == step
    stage = only_stage(config)
    network = stage.build()
    network.load_state_dict(state["ema"])
    stage.prior(network, {"steps": step}).save(run / f"step_{step:06d}.safetensors")


def drawn(prior: Prior, row: Row, number: int) -> NDArray[np.float32]:
    """(n, 32, 32, 32), from other noise for each seed of the training: models that see one noise make one sample."""
    assert row.sample is not None
    made, first = [], number * prior.config.training.seed
    for begin in range(first, first + number, BATCH):
        generators = [torch.Generator().manual_seed(n) for n in range(begin, min(begin + BATCH, first + number))]
        made.append(row.sample(prior, generators)[0][:, 0].numpy())
    return np.concatenate(made)


def pairs_of(model: str, seeds: Sequence[int]) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """Every two seeds, and each with the narrower one."""
    pairs = list(combinations([(model, seed) for seed in seeds], 2))
    return pairs + [((model, seed), (f"{model}, narrower", 0)) for seed in seeds if f"{model}, narrower" in MODELS]


def agreement_name(one: tuple[str, int], other: tuple[str, int]) -> str:
    """Of the measure."""
    return slug(f"codes {one[0]} {one[1]} {other[0]} {other[1]}")


def slug(name: str) -> str:
    """For a file's name."""
    return name.lower().replace(",", "").replace(" ", "_")
